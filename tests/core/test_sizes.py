from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trine.core.errors import ConfigurationError
from trine.core.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        (4096, 4096),
        ("1kB", 1000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("1.5 GiB", 3 * 2**29),
        ("4G", 4 * 10**9),
        ("512mi", 512 * 2**20),
        (" 2 TB ", 2 * 10**12),
    ],
)
def test_parse_size(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e9", "one", "4 G iB", "1..5G"])
def test_parse_size_refuses_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cache_memory=.*GiB"):
        parse_size(text, name="cache_memory")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (23.4 * 2**30, "23.4 GiB"),
        (2**40 * 5000, "5000 TiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=0, max_value=2**50))
def test_format_bytes_reads_back(count: int) -> None:
    assert parse_size(format_bytes(count)) == pytest.approx(count, rel=0.006, abs=1)
