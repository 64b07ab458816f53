"""The options of `trine serve --model-repository`: Triton's, under Triton's names."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trine.core.errors import ConfigurationError

if TYPE_CHECKING:
    from trine.server.application import ServerSettings
    from trine.server.repository import RepositorySettings

logger = logging.getLogger("trine.server")

WITHOUT_EFFECT = (
    "allow-cpu-metrics",
    "allow-gpu-metrics",
    "allow-sagemaker",
    "allow-vertex-ai",
    "backend-directory",
    "buffer-manager-thread-count",
    "cache-directory",
    "cuda-memory-pool-byte-size",
    "cuda-virtual-address-size",
    "enable-peer-access",
    "grpc-http2-max-ping-strikes",
    "grpc-http2-max-pings-without-data",
    "grpc-http2-min-recv-ping-interval-without-data",
    "grpc-infer-allocation-pool-size",
    "grpc-infer-thread-count",
    "grpc-keepalive-permit-without-calls",
    "grpc-max-response-pool-size",
    "host-policy",
    "http-thread-count",
    "metrics-interval-ms",
    "min-supported-compute-capability",
    "model-load-gpu-limit",
    "pinned-memory-pool-byte-size",
    "repoagent-directory",
    "sagemaker-port",
    "sagemaker-safe-port-range",
    "sagemaker-thread-count",
    "vertex-ai-default-model",
    "vertex-ai-port",
    "vertex-ai-thread-count",
)
"""Options that scripts give Triton and that have nothing to set here: taken, and named once in the log."""

_COMPRESSION = {"none": 0, "low": 1, "medium": 6, "high": 9}


def boolean(text: str) -> bool:
    """As Triton writes them."""
    lowered = text.lower()
    if lowered in ("true", "1", "on"):
        return True
    if lowered in ("false", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_repository_options(parser: argparse.ArgumentParser) -> None:
    _add_models(parser.add_argument_group("model repository"))
    _add_protocols(parser.add_argument_group("protocols of the model repository (/v2, gRPC, metrics)"))
    _add_observability(parser.add_argument_group("metrics, traces and logs of the model repository"))
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="append", nargs="?", const="true", help=argparse.SUPPRESS)


def _flag(group: Any, name: str, default: bool, help_text: str) -> None:
    group.add_argument(
        f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help_text
    )


def _add_models(group: Any) -> None:
    add = group.add_argument
    add(
        "--model-repository",
        "--model-store",
        action="append",
        default=[],
        metavar="DIR",
        help="serve the models of this folder (or s3:// URL) with the v2 protocol; may be repeated",
    )
    add("--model-control-mode", default="none", choices=("none", "poll", "explicit"), help="when models come and go")
    add("--repository-poll-secs", type=float, default=15.0, metavar="S", help="between two looks, with poll")
    add("--load-model", action="append", default=[], metavar="M", help="load at start, with explicit; * for all")
    add("--model-load-thread-count", type=int, default=4, metavar="N", help="models loaded at a time")
    add("--model-load-retry-count", type=int, default=0, metavar="N", help="further attempts at a failed load")
    add("--max-loaded-models", type=int, default=0, metavar="N", help="load on demand, at most so many; 0: off")
    add("--model-config-name", default="", metavar="NAME", help="prefer configs/NAME.pbtxt in a model's folder")
    _flag(group, "model-namespacing", False, "allow one name in several repositories")
    _flag(group, "exit-on-error", True, "end when a model can't be loaded at start (default: true)")
    _flag(group, "strict-readiness", True, "be ready only when every model is (default: true)")
    _flag(group, "disable-auto-complete-config", False, "take configurations as they are written")
    _flag(group, "strict-model-config", False, "the same, under its old name")
    add(
        "--backend-config",
        action="append",
        default=[],
        metavar="[B,]KEY=VALUE",
        help="a setting of a back end, or of all",
    )
    add("--cache-config", action="append", default=[], metavar="local,size=N", help="a response cache (or redis,…)")
    add("--response-cache-byte-size", type=int, default=0, metavar="N", help="the same, under its old name")
    add("--rate-limit", default="off", choices=("off", "execution_count"), help="honour rate limiters")
    add(
        "--rate-limit-resource",
        action="append",
        default=[],
        metavar="NAME:COUNT[:DEVICE]",
        help="how much of a resource there is",
    )


def _add_protocols(group: Any) -> None:
    add = group.add_argument
    add("--id", dest="server_id", default="triton", metavar="NAME", help="the server's name in its metadata")
    add("--http-port", type=int, metavar="N", help="(default: 8000)")
    add("--grpc-port", type=int, metavar="N", help="(default: 8001)")
    add("--metrics-port", type=int, metavar="N", help="(default: 8002)")
    for name in ("http", "grpc", "metrics"):
        _flag(group, f"allow-{name}", True, f"serve {name} (default: true)")
        add(f"--{name}-address", default="", metavar="ADDRESS", help="address to listen on (default: --host)")
    _flag(group, "reuse-http-port", False, "let other processes listen on the port too")
    _flag(group, "reuse-grpc-port", False, "let other processes listen on the port too")
    add("--http-max-input-size", type=int, default=64 << 20, metavar="BYTES", help="largest body (default: 64 MiB)")
    add("--http-header-forward-pattern", default="", metavar="REGEX", help="headers that become parameters")
    add("--grpc-header-forward-pattern", default="", metavar="REGEX", help="metadata that becomes parameters")
    add("--http-restricted-api", action="append", default=[], metavar="APIS:HEADER=VALUE", help="ask for a header")
    add(
        "--grpc-restricted-protocol",
        action="append",
        default=[],
        metavar="APIS:KEY=VALUE",
        help="ask for a metadata key",
    )
    add("--http-server-cert", default="", metavar="FILE", help="HTTPS: the certificate")
    add("--http-server-key", default="", metavar="FILE", help="HTTPS: its key")
    _flag(group, "grpc-use-ssl", False, "TLS for gRPC")
    _flag(group, "grpc-use-ssl-mutual", False, "ask clients for a certificate too")
    for name in ("server-cert", "server-key", "root-cert"):
        add(f"--grpc-{name}", default="", metavar="FILE", help="TLS for gRPC: a PEM file")
    add("--grpc-infer-response-compression-level", default="none", choices=tuple(_COMPRESSION), help="of gRPC answers")
    add("--grpc-keepalive-time", type=int, default=7_200_000, metavar="MS", help="silence before a client is asked")
    add("--grpc-keepalive-timeout", type=int, default=20_000, metavar="MS", help="for its answer")
    add("--grpc-max-connection-age", type=int, default=0, metavar="MS", help="0: connections may grow old")
    add("--grpc-max-connection-age-grace", type=int, default=0, metavar="MS", help="for calls of an old connection")
    _flag(group, "allow-client-shm", False, "let clients register shared memory (default: false)")
    add("--exit-timeout-secs", type=float, metavar="S", help="for running requests at the end (default: 30)")


def _add_observability(group: Any) -> None:
    add = group.add_argument
    add("--metrics-config", action="append", default=[], metavar="KEY=VALUE", help="counter_latencies=false, …")
    add("--trace-config", action="append", default=[], metavar="[MODE,]KEY=VALUE", help="level=TIMESTAMPS, rate=100, …")
    for name in ("file", "level", "rate", "count", "log-frequency"):
        add(f"--trace-{name}", help=argparse.SUPPRESS)
    add("--log-verbose", type=int, default=0, metavar="N", help="above 0: log details")
    for name in ("info", "warning", "error"):
        _flag(group, f"log-{name}", True, f"log {name} lines (default: true)")
    add("--log-format", default="default", choices=("default", "ISO8601"), help=argparse.SUPPRESS)
    add("--log-file", default="", metavar="FILE", help="log there instead of to standard error")


def pairs(items: list[str], flag: str) -> list[tuple[str, str, str]]:
    """`scope,key=value` apart; the scope may be missing. ConfigurationError names the flag."""
    found = []
    for item in items:
        scope, comma, rest = item.partition(",")
        if not comma or "=" in scope:
            scope, rest = "", item
        key, equals, value = rest.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"{flag}={item!r}: write KEY=VALUE, or NAME,KEY=VALUE", param=flag)
        found.append((scope, key, value))
    return found


def restricted(items: list[str], flag: str) -> dict[str, tuple[str, str]]:
    """API group to header and value."""
    from trine.server.http.api import API_GROUPS

    found: dict[str, tuple[str, str]] = {}
    for item in items:
        match = re.fullmatch(r"([^:]+):([^=]+)=(.*)", item)
        if match is None:
            raise ConfigurationError(f"{flag}={item!r}: write API[,API…]:HEADER=VALUE", param=flag)
        for group in match[1].split(","):
            if group not in API_GROUPS:
                raise ConfigurationError(
                    f"{flag}: {group!r} is no API: choose from {', '.join(API_GROUPS)}", param=flag
                )
            if group in found:
                raise ConfigurationError(f"{flag}: {group!r} is restricted twice", param=flag)
            found[group] = (match[2], match[3])
    return found


def repository_settings(args: argparse.Namespace) -> RepositorySettings:
    """What the command line says about the repository."""
    from trine.server.repository import RepositorySettings

    backends: dict[str, dict[str, str]] = {}
    for scope, key, value in pairs(args.backend_config, "--backend-config"):
        backends.setdefault(scope, {})[key] = value
    cache_size, cache_url = args.response_cache_byte_size, ""
    caches: dict[str, dict[str, str]] = {}
    for scope, key, value in pairs(args.cache_config, "--cache-config"):
        caches.setdefault(scope, {})[key] = value
    for scope, values in caches.items():
        if scope == "local" and set(values) <= {"size"}:
            cache_size = _integer(values.get("size", "0"), "--cache-config=local,size")
        elif scope == "redis" and set(values) <= {"host", "port", "user", "username", "password", "db", "url"}:
            user = values.get("user", values.get("username", ""))
            secret = f"{user}:{values['password']}@" if "password" in values else f"{user}@" if user else ""
            place = f"{values.get('host', 'localhost')}:{values.get('port', '6379')}/{values.get('db', '0')}"
            cache_url = values.get("url") or f"redis://{secret}{place}"
        else:
            raise ConfigurationError(
                f"--cache-config={scope},…: write local,size=BYTES or redis,host=… and redis,port=…",
                param="--cache-config",
            )
    return RepositorySettings(
        directories=tuple(args.model_repository),
        control_mode=args.model_control_mode,
        poll_seconds=args.repository_poll_secs,
        load_models=tuple(args.load_model),
        exit_on_error=args.exit_on_error,
        strict_readiness=args.strict_readiness,
        load_threads=args.model_load_thread_count,
        load_retries=args.model_load_retry_count,
        auto_complete=not (args.disable_auto_complete_config or args.strict_model_config),
        config_name=args.model_config_name,
        namespacing=args.model_namespacing,
        backend_settings=backends,
        max_loaded=args.max_loaded_models,
        cache_size=cache_size,
        cache_url=cache_url,
        rate_limit=args.rate_limit == "execution_count",
        rate_limit_resources=dict(map(_resource, args.rate_limit_resource)),
        drain_seconds=drain_seconds(args),
    )


def _integer(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{flag}={text!r} is not a number", param=flag) from None


def _resource(text: str) -> tuple[tuple[str, int | None], int]:
    match = re.fullmatch(r"([^:]+):(\d+)(?::(\d+|global))?", text)
    if match is None:
        raise ConfigurationError(
            f"--rate-limit-resource={text!r}: write NAME:COUNT or NAME:COUNT:DEVICE", param="--rate-limit-resource"
        )
    device = None if match[3] in (None, "global") else int(match[3])
    return (match[1], device), int(match[2])


def drain_seconds(args: argparse.Namespace) -> float:
    seconds: float = args.drain_timeout if args.exit_timeout_secs is None else args.exit_timeout_secs
    return seconds


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """What the command line says about protocols, metrics, traces and logs."""
    from trine.server.application import GrpcSettings, ServerSettings

    trace_mode, trace_file, trace_url, trace = _trace(args)
    if bool(args.http_server_cert) != bool(args.http_server_key):
        raise ConfigurationError("HTTPS needs both --http-server-cert and --http-server-key", param="http_server_cert")
    if (args.grpc_use_ssl or args.grpc_use_ssl_mutual) and not args.grpc_server_cert:
        raise ConfigurationError("--grpc-use-ssl needs --grpc-server-cert and --grpc-server-key", param="grpc_use_ssl")
    uses_tls = args.grpc_use_ssl or args.grpc_use_ssl_mutual
    grpc = GrpcSettings(
        certificate=args.grpc_server_cert if uses_tls else "",
        key=args.grpc_server_key,
        root=args.grpc_root_cert,
        mutual=args.grpc_use_ssl_mutual,
        compression=_COMPRESSION[args.grpc_infer_response_compression_level],
        keepalive=args.grpc_keepalive_time / 1000,
        keepalive_timeout=args.grpc_keepalive_timeout / 1000,
        max_age=args.grpc_max_connection_age / 1000 or None,
        age_grace=args.grpc_max_connection_age_grace / 1000 or 5.0,
    )
    return ServerSettings(
        server_id=args.server_id,
        host=args.http_address or args.host,
        http_port=_port(args, "http", args.port),
        grpc_port=_port(args, "grpc", _next(args.port, 1)),
        metrics_port=_port(args, "metrics", _next(args.port, 2)),
        grpc_host=args.grpc_address or args.host,
        metrics_host=args.metrics_address or args.http_address or args.host,
        reuse_http_port=args.reuse_http_port,
        reuse_grpc_port=args.reuse_grpc_port,
        max_body=args.http_max_input_size,
        http_tls=(args.http_server_cert, args.http_server_key) if args.http_server_cert else None,
        restricted_http=restricted(args.http_restricted_api, "--http-restricted-api"),
        restricted_grpc=restricted(args.grpc_restricted_protocol, "--grpc-restricted-protocol"),
        forward_http=_pattern(args.http_header_forward_pattern, "--http-header-forward-pattern"),
        forward_grpc=_pattern(args.grpc_header_forward_pattern, "--grpc-header-forward-pattern"),
        client_shared_memory=args.allow_client_shm,
        grpc=grpc,
        metrics=metrics_settings(args.metrics_config),
        trace_file=trace_file,
        trace_mode=trace_mode,
        trace_url=trace_url,
        trace=trace,
        log_file=args.log_file,
        drain_seconds=drain_seconds(args),
    )


def _next(port: int, step: int) -> int:
    """Beside port 8000 lie 8001 and 8002; beside "any" lies "any"."""
    return port + step if port else 0


def _port(args: argparse.Namespace, name: str, default: int) -> int | None:
    if not getattr(args, f"allow_{name}"):
        return None
    given: int | None = getattr(args, f"{name}_port")
    port = default if given is None else given
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"--{name}-port={port}: give a number from 0 (any free port) to 65535", param=name)
    return port


def _pattern(text: str, flag: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigurationError(f"{flag}={text!r} is no regular expression: {error}", param=flag) from None
    return text


def metrics_settings(items: list[str]) -> Any:
    from trine.server.metrics import MetricsSettings

    chosen: dict[str, Any] = {}
    for _, key, value in pairs(items, "--metrics-config"):
        if key in ("counter_latencies", "histogram_latencies", "summary_latencies"):
            chosen[key] = _convert(boolean, value, f"--metrics-config={key}")
        elif key == "summary_quantiles":
            chosen["quantiles"] = tuple(
                _convert(float, part.partition(":")[0], "--metrics-config=summary_quantiles")
                for part in value.split(",")
            )
        else:
            raise ConfigurationError(
                f"--metrics-config={key}=…: use counter_latencies, histogram_latencies, summary_latencies or "
                "summary_quantiles",
                param="--metrics-config",
            )
    return MetricsSettings(**chosen)


def _convert(convert: Callable[[str], Any], text: str, flag: str) -> Any:
    try:
        return convert(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigurationError(f"{flag}={text!r} can't be used: {error}", param=flag) from None


def _trace(args: argparse.Namespace) -> tuple[str, str, str, dict[str, Any]]:
    """Mode, file, collector's URL, and the settings that clients may change."""
    given: dict[str, str] = {}
    for name in ("file", "level", "rate", "count", "log_frequency"):
        value = getattr(args, f"trace_{name}")
        if value is not None:
            given[name] = value
    mode, url, levels = "triton", "", []
    for scope, key, value in pairs(args.trace_config, "--trace-config"):
        if key == "mode":
            if value not in ("triton", "opentelemetry"):
                raise ConfigurationError(f"--trace-config=mode={value}: use triton or opentelemetry", param="trace")
            mode = value
        elif key == "level":
            levels.append(value)
        elif scope == "opentelemetry" and key == "url":
            url = value
        elif scope != "opentelemetry":
            key = key.replace("-", "_")
            if key not in ("file", "rate", "count", "log_frequency"):
                raise ConfigurationError(
                    f"--trace-config={key}=…: use mode, level, rate, count, triton,file, triton,log-frequency or "
                    "opentelemetry,url",
                    param="trace",
                )
            given[key] = value
    if "level" in given:
        levels.append(given.pop("level"))
    file = given.pop("file", "")
    settings: dict[str, Any] = {
        ("log_frequency" if key == "log_frequency" else f"trace_{key}"): _integer(value, f"--trace-config={key}")
        for key, value in given.items()
    }
    active = [level for level in levels if level != "OFF"]
    unknown = [level for level in active if level not in ("TIMESTAMPS", "TENSORS")]
    if unknown:
        raise ConfigurationError(f"--trace-config=level={unknown[0]}: use OFF, TIMESTAMPS or TENSORS", param="trace")
    if active:
        settings["trace_level"] = active
    return mode, file, url, settings


def warn_without_effect(args: argparse.Namespace) -> None:
    """Say which options were taken and change nothing."""
    given = [f"--{name}" for name in WITHOUT_EFFECT if getattr(args, name.replace("-", "_")) is not None]
    if given:
        logger.info("without effect here: %s", ", ".join(given))
