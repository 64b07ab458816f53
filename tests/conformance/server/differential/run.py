"""Puts the requests to a server and notes the answers in a comparable form.

    python -m tests.conformance.server.differential.run record --python PYTHON

records what real Triton answers (nvidia-pytriton in PYTHON) into `triton.json`.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import http.client
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

from tests.conformance.server.differential.cases import Case, all_cases
from tests.conformance.server.differential.models import write_models

RECORDED = Path(__file__).with_name("triton.json")
ROOT = Path(__file__).resolve().parents[4]
COUNTED = ("success", "fail", "cache_hit", "cache_miss")


class Target:
    """A running server."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self.http_url = http_url
        self.channel = grpc.insecure_channel(grpc_url)

    def answer(self, case: Case) -> dict[str, Any]:
        if case.protocol == "http":
            return self._http(case)
        return self._stream(case) if case.protocol == "stream" else self._unary(case)

    def _http(self, case: Case) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.http_url, timeout=20)
        connection.request(case.method, case.path, case.body or None, case.headers)
        response = connection.getresponse()
        body = response.read()
        encoding = response.getheader("Content-Encoding")
        length = response.getheader("Inference-Header-Content-Length")
        connection.close()
        if encoding:
            body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
        answer: dict[str, Any] = {"status": response.status}
        if encoding:
            answer["encoding"] = encoding
        if length is not None:
            answer["binary"] = base64.b64encode(body[int(length) :]).decode()
            body = body[: int(length)]
        text = body.decode("utf-8", "replace")
        try:
            answer["body"] = json.loads(text)
        except ValueError:
            answer["body"] = text
        return answer

    def _unary(self, case: Case) -> dict[str, Any]:
        kind = getattr(pb, f"{case.method}Response")
        call = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{case.method}", response_deserializer=kind.FromString
        )
        try:
            return {"status": "OK", "body": as_dict(call(case.body, timeout=20))}
        except grpc.RpcError as error:
            return {"status": error.code().name, "body": {"error": error.details()}}

    def _stream(self, case: Case) -> dict[str, Any]:
        messages, rest = [], case.body
        while rest:
            size = int.from_bytes(rest[:4], "little")
            messages.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        call = self.channel.stream_stream(
            f"/inference.GRPCInferenceService/{case.method}",
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        try:
            answers = [as_dict(answer) for answer in call(iter(messages), timeout=20)]
            return {"status": "OK", "body": [stream_part(answer) for answer in answers]}
        except grpc.RpcError as error:
            return {"status": error.code().name, "body": {"error": error.details()}}

    def statistics(self) -> dict[str, dict[str, int]]:
        """The counts of every version of every model."""
        connection = http.client.HTTPConnection(self.http_url, timeout=20)
        connection.request("GET", "/v2/models/stats")
        found = json.loads(connection.getresponse().read())["model_stats"]
        connection.close()
        return {
            f"{stats['name']} {stats['version']}": {
                "inference_count": stats["inference_count"],
                "execution_count": stats["execution_count"],
                **{part: stats["inference_stats"][part]["count"] for part in COUNTED},
            }
            for stats in found
        }


def as_dict(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def stream_part(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of a stream. Of an error only its text is compared."""
    if "error_message" in answer:
        return {"error": answer["error_message"]}
    return answer


def run(target: Target) -> dict[str, Any]:
    """Every answer by the case's name, and the statistics after all."""
    answers = {case.name: target.answer(case) for case in all_cases()}
    return {"answers": answers, "statistics": target.statistics()}


def wait_ready(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    for _ in range(240):
        try:
            connection = http.client.HTTPConnection(url, timeout=2)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        time.sleep(0.25)
    raise TimeoutError(url)


def run_triton(python: str) -> dict[str, Any]:
    """The answers of real Triton, started for it."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        launcher = str(ROOT / "bench" / "peers" / "triton_server.py")
        ports = ["--http-port=18100", "--grpc-port=18101", "--metrics-port=18102"]
        modes = ["--model-control-mode=explicit", "--load-model=*"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen([python, launcher, folder, *ports, *modes], stdout=log, stderr=log)
            try:
                wait_ready("127.0.0.1:18100", process)
                return run(Target("127.0.0.1:18100", "127.0.0.1:18101"))
            finally:
                process.terminate()
                process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record",))
    parser.add_argument("--python", default=sys.executable, help="a Python that has nvidia-pytriton")
    args = parser.parse_args()
    recorded = run_triton(args.python)
    RECORDED.write_text(json.dumps(recorded, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"{len(recorded['answers'])} answers in {RECORDED}")


if __name__ == "__main__":
    main()
