"""The audit with another Triton than the installed one, which the rest of the environment stays beside."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import sysconfig
import venv

ROOT = pathlib.Path(__file__).parents[3]


def python(version: str, folder: pathlib.Path | None = None) -> str:
    """The interpreter of an environment with triton==version, made under build/ at its first use.

    All else comes from the environment that runs, through a .pth, whose paths follow those of its own packages.
    Raises RuntimeError if that Triton cannot be installed.
    """
    if version == importlib.metadata.version("triton"):
        return sys.executable
    folder = folder or ROOT / "build" / f"triton-{version}"
    made = folder / "made"
    paths = sysconfig.get_paths("posix_prefix", {"base": str(folder), "platbase": str(folder)})
    executable = str(pathlib.Path(paths["scripts"]) / "python")
    if not made.exists():
        venv.create(folder, clear=True, symlinks=True)
        install = ["install", "--quiet", "--disable-pip-version-check", f"triton=={version}"]
        if subprocess.run([sys.executable, "-m", "pip", "--python", executable, *install]).returncode:
            raise RuntimeError(f"triton: expected a version that pip can install, got {version!r}")
        others = {str(ROOT): None, **dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))}
        (pathlib.Path(paths["purelib"]) / "others.pth").write_text("\n".join(others) + "\n")
        made.touch()
    return executable
