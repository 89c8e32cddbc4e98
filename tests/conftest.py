import ctypes
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # pytest -n has more threads than cores: none may spin for another

import pytest
import torch
from cuda_host import build, host

if host.MODE and build.missing() is None:
    host.load()  # the registry looks for its entries when it is imported

from pykernels.core import native
from pykernels.core.backends import INTERPRET

if INTERPRET:
    # Each call of a device function makes Triton's language the interpreter's anew, which takes more than half of the
    # time: here it is done once a module, for good.
    from triton.runtime import interpreter

    patched, patch = {}, interpreter._patch_lang
    interpreter._patch_lang = lambda fn: patched.get(fn.__module__) or patched.setdefault(fn.__module__, patch(fn))
    interpreter._LangPatchScope.restore = lambda scope: None

torch.set_num_threads(2)  # how work is split depends on it, and the samples' sizes reach each way with two


@pytest.fixture(scope="session", autouse=True)
def least_work():
    """The CPU kernels' threshold in nanoseconds, by default and as a variable: here even the least work is shared."""
    if native.level() is None:
        yield None
        return
    library = next(native.HERE.glob(f"_C_{native.level()}.abi3.*"))
    variable = ctypes.c_int64.in_dll(ctypes.CDLL(str(library)), "pykernels_least_work")
    default, variable.value = variable.value, 0
    yield default, variable
    variable.value = default


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """New random inputs on every run; the seed is printed with a failure, and PYTEST_SEED repeats it."""
    seed = int(os.environ.get("PYTEST_SEED") or torch.seed() % 2**31)
    torch.manual_seed(seed)
    print(f"PYTEST_SEED={seed}")


def pytest_collection_modifyitems(config, items):
    """Under TRITON_INTERPRET=1 or CUDA_ON_HOST only what is about these runs: the rest needs another process."""
    marker = "triton" if INTERPRET else "cuda_host" if host.MODE else None
    if marker:
        wanted = [item for item in items if marker in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
