"""What can be set about the service, apart from the engine."""

from __future__ import annotations

from dataclasses import dataclass

from trine.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Settings of the HTTP service.

    served_model_names: names that requests may give in `model`; the first is the one in answers, empty means the
    engine's own. embedding_model: directory or hub name of a BERT-type encoder for /v1/embeddings. api_keys: keys that
    the inference endpoints ask for; none means open. cors_origins: origins that browsers may call from ("*" for any).
    max_body_bytes: largest request body. drain_timeout: seconds that running requests get to finish after SIGTERM.
    tool_parser, reasoning_parser: a parser's name, "auto" (by the chat template) or "none". chat_template: Jinja text
    in place of the checkpoint's own. access_log: a line a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    embedding_model: str | None = None
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    drain_timeout: float = 30.0
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    chat_template: str | None = None
    access_log: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port={self.port}: give a number from 0 (any free port) to 65535", param="port")
        if self.max_body_bytes < 1024:
            raise ConfigurationError(
                f"max_body_bytes={self.max_body_bytes} is too small: give at least 1024", param="max_body_bytes"
            )
        if self.drain_timeout < 0:
            raise ConfigurationError(
                f"drain_timeout={self.drain_timeout}: give 0 or more seconds", param="drain_timeout"
            )
        if any(not key for key in self.api_keys):
            raise ConfigurationError(
                "api_keys: an empty key would let anybody in; give a non-empty one", param="api_keys"
            )
