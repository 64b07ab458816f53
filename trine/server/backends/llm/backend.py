"""The back end `llm`: a checkpoint, run by Trine's engine in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trine.core.errors import ConfigurationError
from trine.server.backends.base import Device, ModelFiles
from trine.server.backends.llm.instance import LlmInstance
from trine.server.backends.llm.interface import complete_text_interface
from trine.server.backends.llm.options import engine_options, parameters_of
from trine.server.proto import pb

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM

ModelConfig = Any


class LlmBackend:
    """Serves language models. Requests are not queued here: they run side by side in the engine."""

    name = "llm"

    def __init__(self, settings: Mapping[str, str]) -> None:
        """There is nothing to set for all models."""

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Declare the text interface, and any number of responses a request, where nothing is declared."""
        if not config.input and not config.HasField("model_transaction_policy"):
            config.model_transaction_policy.decoupled = True
        complete_text_interface(config)

    def load(self, config: ModelConfig, files: ModelFiles) -> LlmModel:
        from trine.llm.api import AsyncLLM

        options = engine_options(config, files.version_directory)
        return LlmModel(config, AsyncLLM(options.pop("model"), **options), owned=True)


class LlmModel:
    """A model with its engine. Several instances share it: one engine runs any number of requests."""

    def __init__(self, config: ModelConfig, engine: AsyncLLM, *, owned: bool) -> None:
        self._config = config
        self._engine = engine
        self._owned = owned
        given = parameters_of(config).get("exclude_input_in_output", "").lower()
        if given not in ("", "true", "false"):
            raise ConfigurationError(
                f"model '{config.name}': exclude_input_in_output={given!r}: expected true or false"
            )
        self._excludes_input = None if not given else given == "true"

    def instance(self, device: Device, index: int) -> LlmInstance:
        return LlmInstance(self._config, self._engine, owned=self._owned and index == 0, excludes=self._excludes_input)

    def close(self) -> None:
        """The engine ends with its first instance."""


def text_config(name: str) -> ModelConfig:
    """The configuration of a language model that is served without a folder."""
    config = pb.ModelConfig(name=name, backend="llm")
    config.model_transaction_policy.decoupled = True
    complete_text_interface(config)
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(name=name, count=1, kind=pb.ModelInstanceGroup.Kind.Value("KIND_CPU"))
    return config


def engine_model(name: str, engine: AsyncLLM) -> tuple[ModelConfig, LlmModel]:
    """An engine that somebody else starts and ends, as a model: its configuration, and what makes instances."""
    config = text_config(name)
    return config, LlmModel(config, engine, owned=False)
