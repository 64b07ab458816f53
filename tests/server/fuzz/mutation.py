"""Random messages: valid ones, ones made by the grammar with wrong parts, and bytes broken anywhere."""

from __future__ import annotations

import json
import random
from typing import Any

from trine.server.grpc import frames
from trine.server.proto import pb

_NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    16,
    255,
    2**31,
    2**63,
    -(2**63),
    2**64,
    1e308,
    0.5,
    True,
    None,
    "",
    "x",
    [],
    {},
    [[]],
)
_NAMES = ("INPUT0", "OUTPUT0", "IN", "", "x" * 300, "é\u2028", "triton_x", "\0", "../..", "a b")
_DATATYPES = ("FP32", "INT32", "BYTES", "BOOL", "FP16", "BF16", "UINT64", "nothing", "", "fp32")
_MODELS = ("identity_fp32", "simple", "repeat", "text", "accumulate", "nobody", "", "%00", "..%2f..", "identity_bytes")
_PATHS = (
    "/v2",
    "/v2/health/ready",
    "/v2/models/a/versions/99999999999999999999/infer",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/systemsharedmemory/region/r/register",
    "/v2/repository/index",
    "//v2//",
    "/v2/%ff%fe",
)


class Maker:
    """Messages from one seed: the same seed makes the same messages."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def often(self, right: Any, wrong: Any) -> Any:
        """Mostly right: a message with one mistake gets further than one with ten."""
        return right if self.random.random() < 0.85 else wrong

    def odd(self) -> Any:
        return self.random.choice(_NUMBERS)

    def broken(self, data: bytes) -> bytes:
        """Some bytes changed, left out, doubled or cut off."""
        mutable = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            if not mutable:
                break
            at = self.random.randrange(len(mutable))
            kind = self.random.randrange(5)
            if kind == 0:
                mutable[at] = self.random.randrange(256)
            elif kind == 1:
                del mutable[at : at + self.random.randint(1, 8)]
            elif kind == 2:
                mutable[at:at] = self.random.randbytes(self.random.randint(1, 8))
            elif kind == 3:
                mutable[at] ^= 1 << self.random.randrange(8)
            else:
                del mutable[at:]
        return bytes(mutable)

    # HTTP.

    def document(self) -> Any:
        shape = self.often([4], self.pick([], [2, 2], [-1], [2**40, 2**40], [0], "x", None, [1.5], [10**30]))
        tensor: dict[str, Any] = {
            "name": self.often("INPUT0", self.pick(*_NAMES, 5)),
            "shape": shape,
            "datatype": self.often("FP32", self.pick(*_DATATYPES, 7)),
        }
        if self.random.random() < 0.5:
            tensor["data"] = self.often(
                [1, 2, 3, 4], self.pick([1], ["a"], [[1, 2], [3, 4]], {}, [self.odd()] * 4, "x")
            )
        if "data" not in tensor or self.random.random() < 0.1:
            names = (
                "binary_data_size",
                "shared_memory_region",
                "shared_memory_byte_size",
                "classification",
                "binary_data",
            )
            tensor["parameters"] = self.often(
                {"binary_data_size": 16}, {self.pick(*names): self.odd() for _ in range(2)}
            )
        document: dict[str, Any] = {"inputs": self.often([tensor], self.pick([], [tensor] * 2, {}, 5, None))}
        if self.random.random() < 0.3:
            output = {"name": self.often("OUTPUT0", self.pick(*_NAMES)), "parameters": {"classification": self.odd()}}
            document["outputs"] = self.often([output], self.odd())
        if self.random.random() < 0.3:
            names = ("sequence_id", "priority", "timeout", "sequence_start", "binary_data_output", "triton_y", "mine")
            document["parameters"] = self.often({self.pick(*names): self.odd()}, self.odd())
        if self.random.random() < 0.2:
            document["id"] = self.often("an id", self.odd())
        return self.often(document, self.pick([], 5, None, "x", {"text_input": self.odd()}))

    def http(self) -> bytes:
        """A whole request."""
        body = json.dumps(self.document()).encode()
        headers = [b"Host: x"]
        if self.random.random() < 0.5:
            headers.append(b"Inference-Header-Content-Length: %d" % self.often(len(body), self.pick(0, -1, 5, 10**20)))
            body += bytes(self.often(16, self.pick(0, 15, 17, 1000)))
        if self.random.random() < 0.1:
            headers.append(self.pick(b"Content-Encoding: gzip", b"Content-Encoding: br", b"Accept-Encoding: gzip;q=x"))
        if self.random.random() < 0.15:
            body = self.broken(body)
        verb = self.often("infer", self.pick("generate", "generate_stream", "stats", "config", "ready", "load", "x"))
        path = f"/v2/models/{self.often('identity_fp32', self.pick(*_MODELS))}/{verb}"
        path = self.often(path, self.pick(*_PATHS))
        method = self.often("POST", self.pick("GET", "PUT", "HEAD", "OPTIONS"))
        if self.random.random() < 0.1:
            headers.append(b"Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (self.often(len(body), 5), body)
        else:
            headers.append(b"Content-Length: %d" % len(body))
        head = f"{method} {path} HTTP/1.1\r\n".encode("latin-1", "replace") + b"\r\n".join(headers) + b"\r\n\r\n"
        return self.broken(head + body) if self.random.random() < 0.1 else head + body

    # gRPC.

    def infer_message(self) -> bytes:
        request = pb.ModelInferRequest(model_name=self.often("identity_fp32", self.pick(*_MODELS)))
        tensor = request.inputs.add(
            name=self.often("INPUT0", self.pick(*_NAMES)),
            datatype=self.often("FP32", self.pick(*_DATATYPES)),
            shape=self.often([4], self.pick([], [-1], [2**62, 4], [0], [2, 2])),
        )
        if self.random.random() < 0.3:
            tensor.contents.fp32_contents.extend([1.0] * self.often(4, 3))
        if self.random.random() < 0.8:
            request.raw_input_contents.append(bytes(self.often(16, self.random.randrange(40))))
        if self.random.random() < 0.2:
            request.parameters[
                self.pick("sequence_id", "priority", "timeout", "triton_z", "y")
            ].int64_param = self.pick(-1, 5)
        if self.random.random() < 0.2:
            request.outputs.add(name=self.often("OUTPUT0", "x")).parameters["classification"].int64_param = self.pick(
                -1, 2
            )
        data: bytes = request.SerializeToString()
        return self.broken(data) if self.random.random() < 0.3 else data

    def call(self, number: int) -> bytes:
        """The frames of one call, its header block without tables."""
        method = self.often(
            "ModelInfer", self.pick("ModelStreamInfer", "ModelMetadata", "RepositoryIndex", "TraceSetting", "X")
        )
        fields = [
            (":method", self.often("POST", "GET")),
            (":scheme", "http"),
            (":path", f"/inference.GRPCInferenceService/{method}"),
            (":authority", "x"),
            ("te", "trailers"),
            ("content-type", self.often("application/grpc", "text/plain")),
        ]
        if self.random.random() < 0.1:
            fields.append(("grpc-timeout", self.pick("1S", "0n", "x", "99999999H", "-1S")))
        if self.random.random() < 0.1:
            fields.append(("grpc-encoding", self.pick("gzip", "br")))
        block = b"".join(frames.literal(name, value) for name, value in fields)
        if self.random.random() < 0.05:
            block = self.broken(block)
        message = self.infer_message()
        flag = self.often(0, self.pick(1, 7))
        payload = bytes((flag,)) + self.often(len(message), self.random.randrange(2**32)).to_bytes(4, "big") + message
        parts = [frames.frame(frames.HEADERS, frames.END_HEADERS | self.often(0, frames.END_STREAM), number, block)]
        cut = self.random.randrange(len(payload)) if self.random.random() < 0.2 else 0
        if cut:
            parts.append(frames.frame(frames.DATA, 0, number, payload[:cut]))
        parts.append(frames.frame(frames.DATA, self.often(frames.END_STREAM, frames.PADDED), number, payload[cut:]))
        if self.random.random() < 0.15:
            parts.insert(self.random.randrange(len(parts) + 1), self._control(number))
        return b"".join(parts)

    def _control(self, number: int) -> bytes:
        return bytes(
            self.pick(
                frames.rst_stream(number, 8),
                frames.frame(frames.PING, 0, 0, bytes(8)),
                frames.frame(frames.PING, 0, 1, b"x"),
                frames.settings({frames.INITIAL_WINDOW_SIZE: self.pick(0, 5, 2**31, 65535)}),
                frames.settings({frames.MAX_FRAME_SIZE: self.pick(16384, 1, 2**24 - 1)}),
                frames.window_update(self.pick(0, number), self.pick(0, 1, 2**31 - 1)),
                frames.frame(frames.CONTINUATION, 4, number, b"x"),
                frames.frame(frames.PRIORITY, 0, number, bytes(5)),
                frames.frame(frames.PUSH_PROMISE, 0, number, b""),
                frames.goaway(0, 0),
                frames.frame(200, 255, number, b"unknown"),
            )
        )
