"""/v1/models, health and the other descriptions of the service on the wire."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType, field

from trine.service.openai.structs.base import ResponseStruct


class Model(ResponseStruct, kw_only=True):
    """`root`: what was loaded. `max_model_len` is an extension: tokens of prompt and output."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trine"
    root: str
    parent: str | None = None
    max_model_len: int | UnsetType = UNSET
    permission: list[Any] = field(default_factory=list)


class ModelList(ResponseStruct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(ResponseStruct, kw_only=True):
    object: Literal["health.response"] = "health.response"
    message: str
    status: Literal["ok", "unavailable"]


class Version(ResponseStruct, kw_only=True):
    """`release` and `api` are NIM's names."""

    version: str
    release: str
    api: str


class LicenseInfo(ResponseStruct, kw_only=True):
    name: str
    path: str
    size: int
    url: str
    type: Literal["file"] = "file"
    content: str


class ModelInfo(ResponseStruct, kw_only=True):
    modelUrl: str  # noqa: N815 - NIM's name
    shortName: str  # noqa: N815


class Metadata(ResponseStruct, kw_only=True):
    """NIM's description of a service."""

    version: str
    assetInfo: list[str]  # noqa: N815
    licenseInfo: LicenseInfo  # noqa: N815
    modelInfo: list[ModelInfo]  # noqa: N815
    repository_override: str = ""


class Manifest(ResponseStruct, kw_only=True):
    """The resolved configuration of each model, as `key: value` lines."""

    manifest_file: str
    repository: str
