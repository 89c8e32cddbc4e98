"""Bridge to the Triton kernels: `kernels/` beside this package in a checkout, inside it once installed."""

import pathlib

_here = pathlib.Path(__file__).parent
__path__ = [str(path) for path in (_here / "kernels", _here.parent / "kernels") if path.is_dir()][:1]
