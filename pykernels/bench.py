"""Bridge to the benchmarks: `bench/` beside this package in a checkout, inside it once installed."""

import pathlib

_here = pathlib.Path(__file__).parent
__path__ = [str(path) for path in (_here / "bench", _here.parent / "bench") if path.is_dir()][:1]
