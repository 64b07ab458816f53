"""What must hold before any test module is imported."""

import gc
import os
from typing import Any

# Tensors are small here, and servers, compilers and other tests want the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Shared machines are slow at random moments: no test fails for the time it takes.
settings.register_profile("trine", deadline=None)
settings.load_profile("trine")

if not torch.cuda.is_available():  # the GPU kernels run in Triton's interpreter, chosen before its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Modules are imported by now, and stay: a tenth of the tests' time was the garbage collector's looks at them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a worker takes a file; the conformance tests' folders have a server each."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return os.path.dirname(file) if file.startswith("tests/conformance") else file

    return ByServer(config, log) if config.getvalue("dist") == "loadfile" else None
