"""What the endpoints share: the models served, the settings, the counts, and whether requests are taken."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trine
from trine.core.errors import EngineDeadError, RequestError
from trine.service.asgi import Headers
from trine.service.openai.errors import UnavailableError, unknown_model
from trine.service.openai.metrics import RequestMeter, ServiceMetrics
from trine.service.openai.parsing import check_parser_names
from trine.service.settings import ServiceSettings

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.client import EngineInfo
    from trine.llm.embedding import EmbeddingModel
    from trine.llm.tokenizer import Tokenizer


class Service:
    """One application: a language model, an embedding model, or both.

    `embedding` may be set after the application was made (it loads in the background), when the settings name one.
    `draining` stops new requests. `active` counts the requests being answered.
    """

    def __init__(
        self,
        engine: AsyncLLM | None,
        embedding: EmbeddingModel | None,
        settings: ServiceSettings,
    ) -> None:
        self._engine = engine
        self.embedding = embedding
        check_parser_names(settings)
        self.settings = settings
        self.metrics = ServiceMetrics()
        self.metrics.watch(self)
        self.created = int(time.time())
        self.draining = False
        self.active = 0
        self._info: EngineInfo | None = None
        model = engine.options.model if engine is not None else ""
        self.fingerprint = "fp_" + hashlib.sha256(f"{trine.__version__}/{model}".encode()).hexdigest()[:10]

    # --- models ----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> AsyncLLM | None:
        """The language model's engine; of several the first."""
        return self._engine

    def engine_named(self, name: str) -> AsyncLLM | None:
        """The engine of one of `model_names`."""
        return self.engine

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the language model, the one that answers carry first."""
        if self.engine is None:
            return ()
        return self.settings.served_model_names or (default_name(self.engine.options.model),)

    @property
    def model_name(self) -> str | None:
        names = self.model_names
        return names[0] if names and self.info is not None else None

    @property
    def info(self) -> EngineInfo | None:
        """What the engine decided when it started; None before it has. Kept while it is started again."""
        if self._info is None or (self.engine is not None and self.engine.is_ready):
            with contextlib.suppress(EngineDeadError):
                self._info = self.engine.info if self.engine is not None else None
        return self._info

    @property
    def embedding_names(self) -> tuple[str, ...]:
        if self.settings.embedding_model is None:
            return ()
        alone = self.engine is None and self.settings.served_model_names
        return alone or (default_name(self.settings.embedding_model),)

    def language_model(self, name: str | None) -> AsyncLLM:
        """The engine that serves `name` (None: whichever there is). Raises model_not_found, or 503 while it loads."""
        if name is not None and name not in self.model_names:
            if name in self.embedding_names:
                raise RequestError(f"the model {name!r} only embeds: use /v1/embeddings", param="model")
            raise unknown_model(name, [*self.model_names, *self.embedding_names])
        engine = self.engine if name is None else self.engine_named(name)
        if engine is None:
            raise RequestError("no language model is served here, only embeddings", param="model")
        self.check_ready()
        return engine

    def tokenizer(self, engine: AsyncLLM) -> Tokenizer:
        if engine.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer: send token ids to /v1/completions")
        return engine.tokenizer

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def unavailable(self) -> str | None:
        """Why no request would be served now; None when one would."""
        if self.draining:
            return "the service is shutting down: send the request to another"
        if self.engine is not None and not self.engine.is_ready:
            return "the model is being loaded again after a failure" if self.info else "the model is loading"
        if self.settings.embedding_model is not None and self.embedding is None:
            return "the embedding model is loading"
        return None

    def check_ready(self) -> None:
        reason = self.unavailable
        if reason is not None:
            raise UnavailableError(f"{reason}; try again shortly")

    def meter(self, arrival: float) -> RequestMeter:
        return RequestMeter(self.metrics, self.model_names[0], arrival)

    def limit_headers(self) -> Headers:
        """OpenAI's rate limit headers, of the limits there are: places in the queue, and tokens in the cache."""
        engine = self.engine
        if engine is None or not engine.is_ready:
            return []
        info, stats = engine.info, engine.stats
        requests = info.max_num_seqs + engine.options.max_waiting
        remaining = max(0, requests - engine.num_requests)
        tokens = info.num_blocks * info.block_size
        return [
            (b"x-ratelimit-limit-requests", b"%d" % requests),
            (b"x-ratelimit-remaining-requests", b"%d" % remaining),
            (b"x-ratelimit-reset-requests", b"0s" if remaining else b"1s"),
            (b"x-ratelimit-limit-tokens", b"%d" % tokens),
            (b"x-ratelimit-remaining-tokens", b"%d" % max(0, tokens - stats.blocks_used * info.block_size)),
            (
                b"x-ratelimit-reset-tokens",
                b"0s" if stats.blocks_used < stats.blocks_total or not stats.steps else b"1s",
            ),
        ]


def default_name(model: str) -> str:
    """The name a model is served under: its directory's, or the hub's name for it."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model
