"""Messages taken apart by hand agree with protobuf's own runtime."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trine.server.errors import ServerError
from trine.server.grpc.codec import Decoder, Encoder, split, tensors_of
from trine.server.grpc.heads import HeadReader, parse_timeout
from trine.server.plan import Plan
from trine.server.proto import pb
from trine.server.request import InferResponse
from trine.server.shared_memory import SharedMemory
from trine.server.tensors import Tensor


def message(raws: list[bytes], **fields: object) -> bytes:
    request = pb.ModelInferRequest(model_name="m", **fields)
    for index in range(len(raws)):
        request.inputs.add(name=f"I{index}", datatype="UINT8", shape=[len(raws[index])])
    request.raw_input_contents.extend(raws)
    data: bytes = request.SerializeToString()
    return data


@pytest.mark.parametrize("sizes", [[], [0], [1], [127, 128], [0, 5, 70_000]])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_raw_contents_are_found_where_they_lie(sizes: list[int], kind: type) -> None:
    raws = [random.Random(size).randbytes(size) for size in sizes]
    data = message(raws, id="x")
    head, found = split(kind(data))
    assert [bytes(raw) for raw in found] == raws
    expected = pb.ModelInferRequest.FromString(data)
    del expected.raw_input_contents[:]
    assert pb.ModelInferRequest.FromString(head) == expected


def test_fields_in_another_order() -> None:
    """Contents may come before what they belong to."""
    first = pb.ModelInferRequest(raw_input_contents=[b"abc"]).SerializeToString()
    rest = pb.ModelInferRequest(model_name="m", inputs=[{"name": "I", "datatype": "UINT8", "shape": [3]}])
    again = pb.ModelInferRequest(raw_input_contents=[b""], id="later").SerializeToString()
    head, raws = split(first + rest.SerializeToString() + again)
    assert raws == [b"abc", b""]
    parsed = pb.ModelInferRequest.FromString(head)
    assert (parsed.model_name, parsed.id) == ("m", "later")


def test_every_cut_is_an_error_or_a_message() -> None:
    data = message([bytes(10), bytes(200)], id="an id")
    decoder = Decoder()
    for end in range(len(data)):
        try:
            plan, raws = decoder.decode(data[:end])
            tensors_of(plan, raws, SharedMemory())
        except ServerError:
            continue


def test_the_same_head_is_decoded_once() -> None:
    decoder = Decoder()
    first, _ = decoder.decode(message([b"one"]))
    second, raws = decoder.decode(message([b"two"]))
    assert first is second
    assert raws == [b"two"]
    other, raws = decoder.decode(message([b"two"], id="other"))
    assert other is not first
    assert other.id == "other"
    third, raws = decoder.decode(message([b"thr"]))
    assert third is first
    longer, raws = decoder.decode(message([b"longer"]))
    assert longer.inputs[0].shape == (6,)


def test_responses() -> None:
    encoder = Encoder(SharedMemory(), None)
    plan = Plan()
    plan.id = "x"

    class Model:
        name, version = "m", "3"

    for values in (np.arange(4, dtype=np.int32), np.arange(5, dtype=np.int32), np.zeros((0, 2), np.int32)):
        for parameters in (None, {"a": 1, "b": "t", "c": True, "d": 0.5, "e": 2**63}):
            response = InferResponse([Tensor.of("O", values), Tensor.of("P", values)], parameters=parameters)
            parts, length = encoder.encode(plan, Model, response)
            data = b"".join(parts)
            assert len(data) == length
            parsed = pb.ModelInferResponse.FromString(data)
            assert (parsed.model_name, parsed.model_version, parsed.id) == ("m", "3", "x")
            assert [list(output.shape) for output in parsed.outputs] == [list(values.shape)] * 2
            assert list(parsed.raw_output_contents) == [values.tobytes()] * 2
            got = {
                key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in parsed.parameters.items()
            }
            assert got == (parameters or {})


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("1S", 10**9), ("20m", 2 * 10**7), ("5u", 5000), ("7n", 7), ("2M", 12 * 10**10), ("1H", 36 * 10**11)]
    + [(text, None) for text in ("", "S", "-1S", "1", "1x", "123456789S")],
)
def test_timeouts(text: str, nanoseconds: int | None) -> None:
    assert parse_timeout(text) == nanoseconds


def test_header_blocks_mean_what_the_table_says_now() -> None:
    """A block that was remembered means something else once the table has moved on."""
    from hpack import Encoder as HeaderEncoder

    encoder, reader = HeaderEncoder(), HeadReader()

    def send(path: str) -> str:
        fields = [(":method", "POST"), (":path", path), ("content-type", "application/grpc"), ("x-more", path * 20)]
        return reader.read(encoder.encode(fields)).path

    for _ in range(3):
        for number in range(200):
            assert send(f"/{number % 7}") == f"/{number % 7}"
            assert send(f"/{number}") == f"/{number}"
