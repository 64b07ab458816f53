"""How a repository behaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ControlMode = Literal["none", "poll", "explicit"]


@dataclass(frozen=True, slots=True)
class RepositorySettings:
    """Settings of `Repository`.

    directories          folders of models, or URLs that fsspec reads (s3://…)
    control_mode         none: load all at start; poll: follow the folders; explicit: load on request
    poll_seconds         between two looks at the folders, in poll mode
    load_models          explicit mode: what to load at start; ("*",) for all
    exit_on_error        whether a model that fails at start is an error of `start`
    strict_readiness     whether the server is ready only once every model that should be is
    load_threads         models loaded at a time
    load_retries         further attempts at a model whose load fails
    auto_complete        fill configurations from model files
    config_name          configs/<name>.pbtxt is preferred
    namespacing          a model name may occur in several folders: the first one's is served
    backend_settings     by back end ("" for all): `--backend-config=onnxruntime,key=value`
    max_loaded           load on demand, unloading the model unused for longest beyond so many; 0: off
    cache_size           bytes of the local response cache; 0: none
    cache_url            redis://… of a shared response cache
    rate_limit           whether instance groups' rate limiters are honoured
    rate_limit_resources by device (None: global) and name: how much there is
    drain_seconds        running requests get at shutdown
    """

    directories: tuple[str, ...] = ()
    control_mode: ControlMode = "none"
    poll_seconds: float = 15.0
    load_models: tuple[str, ...] = ()
    exit_on_error: bool = True
    strict_readiness: bool = True
    load_threads: int = 4
    load_retries: int = 0
    auto_complete: bool = True
    config_name: str = ""
    namespacing: bool = False
    backend_settings: dict[str, dict[str, str]] = field(default_factory=dict)
    max_loaded: int = 0
    cache_size: int = 0
    cache_url: str = ""
    rate_limit: bool = False
    rate_limit_resources: dict[tuple[str, int | None], int] = field(default_factory=dict)
    drain_seconds: float = 30.0
