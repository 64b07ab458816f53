"""The fixture that runs the native CPU kernels' tests in every build and with one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trine.kernels import cpu

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use for the test; builds that this processor can't run are skipped."""
    if not cpu.available():
        pytest.skip(f"native CPU kernels: {cpu.status()}")
    isa, threads = request.param
    before = cpu.isa(), cpu.num_threads()
    if not cpu.set_isa(isa):
        pytest.skip(f"this processor does not run {isa}")
    cpu.set_num_threads(threads)
    yield isa
    cpu.set_isa(before[0])
    cpu.set_num_threads(before[1])
