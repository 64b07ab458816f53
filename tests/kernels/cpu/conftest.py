"""The fixture that runs the native CPU kernels' tests in every build and with one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trine.kernels import cpu


def runnable_builds() -> list[str]:
    """The builds of the kernels that this processor can run; the tile code also on emulated tiles."""
    if not cpu.available():
        return []
    best = cpu.isa()
    builds = [name for name in ("avx2", "avx512", "avx512_bf16", "amx", "emulated") if cpu.set_isa(name)]
    cpu.set_isa(best)
    return builds


@pytest.fixture(
    params=[(isa, threads) for isa in runnable_builds() for threads in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """The build in use for the test. Tests are skipped where there is no native library."""
    isa, threads = request.param
    before = cpu.isa(), cpu.num_threads()
    cpu.set_isa(isa)
    cpu.set_num_threads(threads)
    yield isa
    cpu.set_isa(before[0])
    cpu.set_num_threads(before[1])
