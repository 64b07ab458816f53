"""Triton's command line: what it sets, and what it says about mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from trine.cli.repository_options import (
    WITHOUT_EFFECT,
    add_repository_options,
    repository_settings,
    server_settings,
    warn_without_effect,
)
from trine.core.errors import ConfigurationError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--drain-timeout", type=float, default=30.0)
    add_repository_options(parser)
    return parser.parse_args(list(arguments))


def test_the_defaults_are_tritons() -> None:
    settings, repository = server_settings(parse()), repository_settings(parse())
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (8000, 8001, 8002)
    assert settings.max_body == 64 << 20
    assert not settings.client_shared_memory
    assert settings.server_id == "triton"
    assert (repository.control_mode, repository.poll_seconds, repository.load_threads) == ("none", 15.0, 4)
    assert repository.exit_on_error
    assert repository.strict_readiness
    assert repository.auto_complete


def test_the_repository() -> None:
    given = repository_settings(
        parse(
            "--model-repository=a",
            "--model-store=b",
            "--model-control-mode=explicit",
            "--load-model=x",
            "--load-model=y",
            "--exit-on-error=false",
            "--strict-readiness",
            "false",
            "--disable-auto-complete-config",
            "--backend-config=onnxruntime,threads=2",
            "--backend-config=default-max-batch-size=8",
            "--cache-config=local,size=1048576",
            "--rate-limit=execution_count",
            "--rate-limit-resource=R1:4",
            "--rate-limit-resource=R2:2:0",
            "--exit-timeout-secs=5",
        )
    )
    assert given.directories == ("a", "b")
    assert given.load_models == ("x", "y")
    assert not given.exit_on_error
    assert not given.strict_readiness
    assert not given.auto_complete
    assert given.backend_settings == {"onnxruntime": {"threads": "2"}, "": {"default-max-batch-size": "8"}}
    assert given.cache_size == 1 << 20
    assert given.rate_limit
    assert given.rate_limit_resources == {("R1", None): 4, ("R2", 0): 2}
    assert given.drain_seconds == 5.0
    redis = repository_settings(parse("--cache-config=redis,host=h", "--cache-config=redis,port=1"))
    assert redis.cache_url == "redis://h:1/0"


def test_the_protocols() -> None:
    given = server_settings(
        parse(
            "--port=9000",
            "--allow-grpc=false",
            "--metrics-port=7",
            "--http-restricted-api=health,metadata:key=value",
            "--grpc-restricted-protocol=model-repository:k=v=w",
            "--http-header-forward-pattern=x-.*",
            "--grpc-infer-response-compression-level=medium",
            "--grpc-max-connection-age=60000",
            "--allow-client-shm=true",
            "--trace-config=level=TIMESTAMPS",
            "--trace-config=rate=7",
            "--trace-config=triton,file=/tmp/t",
            "--trace-config=triton,log-frequency=3",
            "--metrics-config=histogram_latencies=true",
            "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",
        )
    )
    assert (given.http_port, given.grpc_port, given.metrics_port) == (9000, None, 7)
    assert given.restricted_http == {"health": ("key", "value"), "metadata": ("key", "value")}
    assert given.restricted_grpc == {"model-repository": ("k", "v=w")}
    assert given.grpc.compression == 6
    assert given.grpc.max_age == 60.0
    assert given.client_shared_memory
    assert given.trace == {"trace_level": ["TIMESTAMPS"], "trace_rate": 7, "log_frequency": 3}
    assert given.trace_file == "/tmp/t"
    assert given.metrics.quantiles == (0.5, 0.99)


def test_opentelemetry() -> None:
    given = server_settings(
        parse("--trace-config=mode=opentelemetry", "--trace-config=opentelemetry,url=http://c:4318/v1/traces")
    )
    assert (given.trace_mode, given.trace_url) == ("opentelemetry", "http://c:4318/v1/traces")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--http-restricted-api=nothing:k=v"], "'nothing' is no API"),
        (["--http-restricted-api=health"], "write API[,API…]:HEADER=VALUE"),
        (["--http-restricted-api=health:a=b", "--http-restricted-api=health:c=d"], "restricted twice"),
        (["--http-header-forward-pattern=("], "is no regular expression"),
        (["--http-port=70000"], "from 0 (any free port) to 65535"),
        (["--grpc-use-ssl=true"], "needs --grpc-server-cert"),
        (["--http-server-cert=x"], "needs both"),
        (["--trace-config=bogus=1"], "use mode, level, rate"),
        (["--trace-config=level=LOUD"], "use OFF, TIMESTAMPS or TENSORS"),
        (["--trace-config=rate=x"], "is not a number"),
        (["--trace-config=mode=x"], "use triton or opentelemetry"),
        (["--metrics-config=bogus=1"], "use counter_latencies"),
        (["--metrics-config=counter_latencies=maybe"], "neither true nor false"),
        (["--cache-config=local,sice=5"], "local,size=BYTES"),
        (["--cache-config=local,size=x"], "is not a number"),
        (["--rate-limit-resource=R"], "write NAME:COUNT"),
        (["--backend-config=x"], "write KEY=VALUE"),
    ],
)
def test_mistakes_are_named(arguments: Sequence[str], text: str) -> None:
    args = parse(*arguments)
    with pytest.raises(ConfigurationError) as failure:
        _ = (repository_settings(args), server_settings(args))
    assert text in failure.value.message


def test_options_without_effect_are_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    args = parse(*(f"--{name}=1" for name in WITHOUT_EFFECT))
    with caplog.at_level("INFO", logger="trine.server"):
        warn_without_effect(args)
    assert "--http-thread-count" in caplog.text
    server_settings(args)


def test_every_option_of_triton_is_known() -> None:
    """Options that scripts give; each is taken in some way."""
    text = Path(__file__).with_name("triton_options.txt").read_text().split()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_repository_options(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert [name for name in text if f"--{name}" not in known] == []
