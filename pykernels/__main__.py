"""The command line: python -m pykernels doctor | check | bench | audit | gpu (also installed as `pykernels`)."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "doctor": ("pykernels.tools.doctor", "versions, devices, and which backends each op has here"),
    "check": ("pykernels.tools.check", "every kernel against its fp64 reference, forward and backward"),
    "bench": ("pykernels.bench.run", "time the ops against eager PyTorch, torch.compile and their peers"),
    "audit": (
        "pykernels.tools.audit",
        "compile the GPU kernels for every target and inspect the result; needs no GPU",
    ),
    "gpu": ("pykernels.tools.gpu", "all of these on a GPU, with the audit's predictions beside, into one JSON file"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="pykernels", description="Fused kernels as PyTorch ops.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, (path, summary) in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary)
        if argv and argv[0] == name:  # only the command that runs is imported
            module = importlib.import_module(path)
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.main(args)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        sys.exit(f"pykernels {args.command} needs matplotlib: pip install 'pykernels[bench]' or pip install matplotlib")


if __name__ == "__main__":
    sys.exit(main())
