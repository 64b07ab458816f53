"""Health, version and what else describes the service: no model runs here, and no key is asked for health."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import metadata as packages
from typing import TYPE_CHECKING

import msgspec

import trine
from trine.service.asgi import Request, Response
from trine.service.openai.errors import RETRY_SECONDS, retry_headers
from trine.service.openai.structs.models import Health, LicenseInfo, Manifest, Metadata, ModelInfo, Version

if TYPE_CHECKING:
    from trine.service.openai.context import Service

LICENSE_NAME = "Apache-2.0"
LICENSE_URL = "https://www.apache.org/licenses/LICENSE-2.0"


async def live(service: Service, request: Request) -> Response:
    """200 as long as the process answers."""
    return Response(msgspec.json.encode(Health(message="Service is live.", status="ok")))


async def ready(service: Service, request: Request) -> Response:
    """200 when a request would be served now, else 503 with the reason."""
    reason = service.unavailable
    if reason is None:
        return Response(msgspec.json.encode(Health(message="Service is ready.", status="ok")))
    body = msgspec.json.encode(Health(message=f"Service is not ready: {reason}.", status="unavailable"))
    return Response(body, status=503, headers=retry_headers(RETRY_SECONDS))


async def version(service: Service, request: Request) -> Response:
    """The release of Trine."""
    answer = Version(version=trine.__version__, release=trine.__version__, api="v1")
    return Response(msgspec.json.encode(answer))


async def license_text(service: Service, request: Request) -> Response:
    """The licence of the software; that of the models is theirs."""
    return Response(msgspec.json.encode(license_info()))


async def metadata(service: Service, request: Request) -> Response:
    """What is served and by which release."""
    models = []
    if service.engine is not None:
        models.append(ModelInfo(modelUrl=service.engine.options.model, shortName=service.model_names[0]))
    if service.settings.embedding_model is not None:
        models.append(ModelInfo(modelUrl=service.settings.embedding_model, shortName=service.embedding_names[0]))
    answer = Metadata(version=trine.__version__, assetInfo=[], licenseInfo=license_info(), modelInfo=models)
    return Response(msgspec.json.encode(answer))


async def manifest(service: Service, request: Request) -> Response:
    """The engine's options and what it chose from them, one `key: value` a line."""
    lines = [f"trine: {trine.__version__}", f"python: {sys.version.split()[0]}"]
    repository = service.settings.embedding_model or ""
    engine = service.engine
    if engine is not None:
        repository = engine.options.model
        lines += [f"{key}: {value}" for key, value in asdict(engine.options).items()]
        if service.info is not None:
            lines += [f"resolved_{key}: {value}" for key, value in asdict(service.info).items() if key != "summary"]
    return Response(msgspec.json.encode(Manifest(manifest_file="\n".join(lines) + "\n", repository=repository)))


def license_info() -> LicenseInfo:
    """The LICENSE that the installed package carries."""
    text = ""
    try:
        for file in packages.files("trine") or []:
            if file.name == "LICENSE":
                text = file.read_text()
    except (packages.PackageNotFoundError, OSError):
        text = ""
    return LicenseInfo(name=LICENSE_NAME, path="LICENSE", size=len(text.encode()), url=LICENSE_URL, content=text)
