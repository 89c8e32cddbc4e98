import ctypes
import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # pytest -n has more threads than cores: none may spin for another

import pytest
import torch
from cuda_host import build, host
from drawing import left_out

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

pytest.register_assert_rewrite("kit")  # before a test file imports it
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


def pytest_addoption(parser):
    group = parser.getgroup("drawing")
    group.addoption("--all", action="store_true", help="run all of the families of which a run takes a share")
    group.addoption("--draw-seed", type=int, metavar="N", help="draw the shares that the run of this seed drew")


def pytest_configure(config):
    """The seed stands in the environment, which xdist's workers inherit: they draw as their controller does."""
    config.addinivalue_line("markers", "drawn(share, of=None): of its family, or of an op's part, a run takes a share")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        seed = config.option.draw_seed
        os.environ["PYTEST_DRAW_SEED"] = str(random.SystemRandom().randrange(2**31) if seed is None else seed)
    config.option.draw_seed = int(os.environ["PYTEST_DRAW_SEED"])


def is_all_wanted(config):
    """With --all, and where tests are named: by ::, by -k."""
    return config.option.all or bool(config.option.keyword) or any("::" in argument for argument in config.args)


def pytest_report_header(config):
    seed = config.option.draw_seed
    return "drawn: all" if is_all_wanted(config) else f"drawn: a share, again by --draw-seed {seed}; all by --all"


def family_and_share(item):
    """A drawn test's: its function and the mark's `of`, an op's name where each op is to keep its share."""
    marker = item.get_closest_marker("drawn")
    if marker is None:
        return None, None
    return f"{item.nodeid.partition('[')[0]} {marker.kwargs.get('of')}", marker.args[0]


def keep(config, items, wanted):
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


def pytest_collection_modifyitems(config, items):
    """Under TRITON_INTERPRET=1 or CUDA_ON_HOST only what is about these runs: the rest needs another process."""
    marker = "triton" if INTERPRET else "cuda_host" if host.MODE else None
    if marker:
        keep(config, items, lambda item: marker in item.keywords)
    if not is_all_wanted(config):
        left = left_out([(item.nodeid, *family_and_share(item)) for item in items], config.option.draw_seed)
        keep(config, items, lambda item: item.nodeid not in left)
