"""Logging: one line a record, with what the caller adds, for people or as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from trine.core.errors import ConfigurationError
from trine.core.logging import configure


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("trine", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def test_lines_for_people() -> None:
    stream = io.StringIO()
    configure("info", stream=stream)
    logger = logging.getLogger("trine.test")
    logger.debug("not shown")
    logger.info("answered %d", 7, extra={"request_id": "r1"})
    assert stream.getvalue().endswith("INFO    trine.test answered 7 request_id=r1\n")
    assert stream.getvalue().count("\n") == 1


def test_json_lines() -> None:
    stream = io.StringIO()
    configure("debug", json_lines=True, stream=stream)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("trine").exception("it\nfailed", extra={"tokens": 3})
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["message"], entry["tokens"]) == ("error", "trine", "it\nfailed", 3)
    assert "ValueError: bad" in entry["exception"]


def test_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(stream=first)
    configure(stream=second)
    logging.getLogger("trine").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_an_unknown_level() -> None:
    with pytest.raises(ConfigurationError, match="debug, info, warning, error"):
        configure("loud")
