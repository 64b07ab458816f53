"""Requests that don't fit their model: the texts that Triton's clients know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trine.server.configuration import config_from_text
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, RequestedOutput
from trine.server.tensors import Tensor
from trine.server.validation import RequestChecker

BATCHING = """name: "m" max_batch_size: 8
input [{ name: "a" data_type: TYPE_FP32 dims: [16] }, { name: "b" data_type: TYPE_STRING dims: [-1] }]
output [{ name: "o" data_type: TYPE_FP32 dims: [16] }]"""
PLAIN = """name: "m"
input [{ name: "a" data_type: TYPE_INT64 dims: [2, -1] }, { name: "b" data_type: TYPE_BOOL dims: [1] optional: true }]
output [{ name: "o" data_type: TYPE_INT64 dims: [-1] }]"""
NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
PREFIX = "[request id: <id_unknown>] "


def a(rows: int = 1, width: int = 16) -> Tensor:
    return Tensor.of("a", np.zeros((rows, width), np.float32))


def b(rows: int = 1, count: int = 2) -> Tensor:
    return Tensor("b", "BYTES", (rows, count), None, b"\x01\0\0\0x" * (rows * count))


def request(*tensors: Tensor, **options: Any) -> InferRequest:
    return InferRequest("m", {tensor.name: tensor for tensor in tensors}, lambda response: None, **options)


def refused(config: str, made: InferRequest) -> str:
    """The message, the same for a request that follows one that fits."""
    checker = RequestChecker(config_from_text(config))
    with pytest.raises(ServerError) as first:
        checker.check(made)
    assert first.value.error_code is Code.INVALID_ARGUMENT
    if config is BATCHING:
        for rows in (1, 2, 3):
            checker.check(request(a(rows), b(rows)))
    with pytest.raises(ServerError) as second:
        checker.check(made)
    assert second.value.message == first.value.message
    return first.value.message


def test_what_fits_is_known_with_its_rows() -> None:
    checker = RequestChecker(config_from_text(BATCHING))
    for rows in (3, 1, 3, 8):
        fitting = request(a(rows), b(rows))
        checker.check(fitting)
        assert fitting.batch_size == rows
    assert request(a(2), b(2)).batch_size == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            request(a()),
            PREFIX
            + "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['a'], but missing required input(s) "
            "['b']. Please provide all required input(s).",
        ),
        (
            request(id="7"),
            "[request id: 7] expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required "
            "input(s) ['a','b']. Please provide all required input(s).",
        ),
        (request(a(), Tensor("z", "FP32", (1,), None, b"1234")), "unexpected inference input 'z' for model 'm'"),
        (
            request(a(width=8), b()),
            f"{PREFIX}unexpected shape for input 'a' for model 'm'. Expected [-1,16], got [1,8]. {NOTE}",
        ),
        (
            request(Tensor("a", "FP32", (), None, bytes(4)), b()),
            f"{PREFIX}input 'a' has no shape but model requires batch dimension for 'm'",
        ),
        (request(a(9), b(9)), f"{PREFIX}inference request batch-size must be <= 8 for 'm'"),
        (request(a(2), b(3)), f"{PREFIX}input 'b' batch size does not match other inputs for 'm'"),
        (
            request(Tensor("a", "INT32", (1, 16), None, bytes(64)), b()),
            f"{PREFIX}inference input 'a' data-type is 'INT32', but model 'm' expects 'FP32'",
        ),
        (
            request(Tensor("a", "FP32", (1, 16), None, bytes(63)), b()),
            f"{PREFIX}input byte size mismatch for input 'a' for model 'm'. Expected 64, got 63",
        ),
        (
            request(a(), Tensor("b", "BYTES", (1, 2), None, b"\1\0\0\0x")),
            f"{PREFIX}expected 2 string elements for inference input 'b' for model 'm', got 1",
        ),
        (
            request(a(), Tensor("b", "BYTES", (1, 1), None, b"\1\0\0\0x" * 2)),
            f"{PREFIX}unexpected number of string elements 2 for inference input 'b' for model 'm', expecting 1",
        ),
        (
            request(a(), Tensor("b", "BYTES", (1, 1), None, b"\1\0\0\0x\0\0")),
            f"{PREFIX}incomplete string length indicator for inference input 'b' for model 'm', expecting 4 bytes but "
            "only 2 bytes available. Please make sure the string length indicator is in one buffer.",
        ),
        (
            request(a(), Tensor("b", "BYTES", (1, 1), None, b"\x09\0\0\0x")),
            f"{PREFIX}incomplete string data for inference input 'b' for model 'm', the last element's length goes 8 "
            "bytes past the end",
        ),
        (
            request(a(), b(), outputs=[RequestedOutput("none")]),
            "unexpected inference output 'none' for model 'm'",
        ),
    ],
)
def test_what_does_not_fit(made: InferRequest, message: str) -> None:
    assert refused(BATCHING, made) == message


def test_without_a_batch_dimension() -> None:
    def whole(*shape: int) -> Tensor:
        return Tensor.of("a", np.zeros(shape, np.int64))

    checker = RequestChecker(config_from_text(PLAIN))
    checker.check(request(whole(2, 5)))
    checker.check(request(whole(2, 0), Tensor("b", "BOOL", (1,), None, b"\1")))
    assert refused(PLAIN, request(whole(3, 5))) == (
        f"{PREFIX}unexpected shape for input 'a' for model 'm'. Expected [2,-1], got [3,5]. "
    )
    assert refused(PLAIN, request(Tensor("b", "BOOL", (1,), None, b"\1"))) == (
        f"{PREFIX}expected number of inputs between 1 and 2 but got 1 inputs for model 'm'. Got input(s) ['b'], but "
        "missing required input(s) ['a']. Please provide all required input(s)."
    )
    assert "All input dimensions should be specified" in refused(
        PLAIN, request(Tensor("a", "INT64", (2, -1), None, b""))
    )


def test_requests_that_differ_where_they_may_are_told_apart() -> None:
    checker = RequestChecker(config_from_text(BATCHING))
    one, two, three = request(a(), b(1, 2)), request(a(3), b(3, 2)), request(a(), b(1, 5))
    for made in (one, two, three):
        checker.check(made)
    assert one.signature == two.signature != three.signature


def test_reshape() -> None:
    config = config_from_text(
        """name: "m" max_batch_size: 4 input [
        { name: "a" data_type: TYPE_INT8 dims: [-1, 4, -1] reshape { shape: [-1, 2, 2, -1] } },
        { name: "s" data_type: TYPE_INT8 dims: [1] reshape { shape: [] } }]"""
    )
    made = request(Tensor("a", "INT8", (2, 3, 4, 5), None, bytes(120)), Tensor("s", "INT8", (2, 1), None, bytes(2)))
    RequestChecker(config).check(made)
    assert made.inputs["a"].shape == (2, 3, 2, 2, 5)
    assert made.inputs["s"].shape == (2,)
