"""`trine serve`: a model over HTTP, or a repository of models over HTTP and gRPC."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from trine.cli.options import MODEL_HELP, add_engine_options, engine_options, positive, size
from trine.cli.repository_options import (
    add_repository_options,
    repository_settings,
    server_settings,
    warn_without_effect,
)

if TYPE_CHECKING:
    from trine.service.settings import ServiceSettings

USAGE = "MODEL [options]  or  --model-repository DIR [options]"

DESCRIPTION = """\
Serve a model over HTTP with OpenAI's API, and a playground page at /.

Nothing has to be set: concurrent requests are batched, shared beginnings of prompts are computed once, and the limits
come from the memory that is there; they are printed at start. Ctrl-C (or SIGTERM) lets running requests finish.

With --model-repository, serve a Triton model repository. Either way the KServe v2 protocol is there too: over HTTP on
the same port, over gRPC on the next one (8001), and metrics on the one after (8002).
"""

EXAMPLES = """\
examples:
  trine serve tiny
  trine serve ./Qwen2.5-0.5B-Instruct --port 8001 --served-model-name qwen
  trine serve ./Llama-3.1-8B-Instruct --quantization int8 --max-model-len 8192
  trine serve tiny --embedding-model ./all-MiniLM-L6-v2      /v1/embeddings too
  trine serve --model-repository ./models                    HTTP on 8000, gRPC on 8001, metrics on 8002
  TRINE_API_KEY=secret trine serve tiny --host 0.0.0.0       ask callers for a key
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    service = parser.add_argument_group("service")
    service.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)"
    )
    service.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    service.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model; may be repeated (default: the directory's name)",
    )
    service.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="refuse callers without it; may be repeated (better: in TRINE_API_KEY, unseen by `ps`)",
    )
    service.add_argument("--embedding-model", metavar="MODEL", help="a BERT-type encoder for /v1/embeddings")
    service.add_argument("--chat-template", metavar="FILE", help="a Jinja file in place of the checkpoint's template")
    service.add_argument(
        "--tool-parser",
        default="auto",
        metavar="NAME",
        help="how the model writes tool calls (default: auto, by its chat template; none: plain text)",
    )
    service.add_argument(
        "--reasoning-parser",
        default="auto",
        metavar="NAME",
        help="how the model marks its reasoning (default: auto; none: plain text)",
    )
    service.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin call from a browser; * for any",
    )
    service.add_argument(
        "--max-waiting", type=positive, metavar="N", help="requests queued before new ones are refused with 429"
    )
    service.add_argument(
        "--max-body-size",
        type=size,
        default="32MiB",
        metavar="SIZE",
        help="largest request body, for example 64MiB (default: 32MiB)",
    )
    service.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get at shutdown (default: 30)",
    )
    service.add_argument(
        "--no-engine-process",
        action="store_true",
        help="run the engine in the service's process: simpler to debug, slower",
    )
    service.add_argument("--no-access-log", action="store_true", help="no line for each request")
    service.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    service.add_argument("--log-json", action="store_true", help="log lines as JSON")
    add_engine_options(parser)
    add_repository_options(parser)


def run(args: argparse.Namespace) -> int:
    from trine.core.errors import ConfigurationError
    from trine.core.logging import configure

    if args.model_repository:
        return serve_repository(args)
    if args.model is None and args.embedding_model is None:
        raise ConfigurationError("give a MODEL to serve, for example `trine serve tiny`, or --embedding-model")
    configure(args.log_level, json_lines=args.log_json)
    from trine.service.server import serve

    ports = server_settings(args)
    given = {name for name in ("grpc", "metrics") if getattr(args, f"{name}_port") is not None}
    ports = replace(ports, optional_ports=frozenset({"grpc", "metrics"} - given))
    settings = service_settings(args, args.port if args.http_port is None else args.http_port)
    options = engine_options(args)
    if args.max_waiting is not None:
        options["max_waiting"] = args.max_waiting
    return serve(args.model, settings, options, engine_process=not args.no_engine_process, ports=ports)


def serve_repository(args: argparse.Namespace) -> int:
    """Serve folders of models until a signal."""
    from trine.core.errors import ConfigurationError
    from trine.core.logging import configure

    if args.model is not None:
        raise ConfigurationError("give either a MODEL or --model-repository; an `llm` model can lie in a repository")
    level = "debug" if args.log_verbose > 0 else args.log_level if args.log_info else "warning"
    stream = open(args.log_file, "a", encoding="utf-8", buffering=1) if args.log_file else None  # noqa: SIM115
    configure(level, json_lines=args.log_json, stream=stream)
    warn_without_effect(args)
    from trine.server.repository import Repository
    from trine.service.server import serve_repository as serve

    ports = server_settings(args)
    return serve(Repository(repository_settings(args)), ports, service_settings(args, ports.http_port or 0))


def service_settings(args: argparse.Namespace, port: int) -> ServiceSettings:
    """What the command line says about OpenAI's routes."""
    from trine.service.settings import ServiceSettings

    environment_key = os.environ.get("TRINE_API_KEY", "")
    return ServiceSettings(
        host=args.host,
        port=port,
        served_model_names=tuple(args.served_model_name),
        embedding_model=args.embedding_model,
        api_keys=tuple(args.api_key) or ((environment_key,) if environment_key else ()),
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=args.max_body_size,
        drain_timeout=args.drain_timeout,
        tool_parser=args.tool_parser,
        reasoning_parser=args.reasoning_parser,
        chat_template=read_text(args.chat_template),
        access_log=not args.no_access_log,
    )


def read_text(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return file.read()
