"""Runs pytest on the CUDA kernels compiled for the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/cuda_host/run.py [--plain] tests/ops/test_matrix.py -x …     --plain: without the sanitizers, optimised
"""

import os
import sys

import build


def main() -> None:
    arguments = sys.argv[1:]
    sanitize = "--plain" not in arguments
    arguments = [argument for argument in arguments if argument != "--plain"]
    if build.missing() is None:
        build.build(sanitize=sanitize)  # once, before pytest's workers ask for it
    environment = {**os.environ, "CUDA_ON_HOST": "sanitize" if sanitize else "1"}
    if sanitize and build.missing() is None:
        environment |= build.environment()
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *arguments], environment)


if __name__ == "__main__":
    main()
