"""Shared memory that clients register: tensors that never go through the socket.

System regions are POSIX shared memory objects. CUDA regions need a GPU that the client's handle opens on; without one
registering says so. Both kinds have one namespace.
"""

from __future__ import annotations

import base64
import binascii
import mmap
import os
from pathlib import Path
from typing import Any, Literal

from trine.server.errors import Code, ServerError
from trine.server.plan import Plan, Region

Kind = Literal["system", "cuda"]
_DIRECTORY = Path("/dev/shm")
_HANDLE_BYTES = 64
RESERVED_KEYS = "trine_python_backend"
"""Keys that begin so are the server's own; clients must not map them."""


class SystemRegion:
    """A mapped object."""

    def __init__(self, name: str, key: str, offset: int, byte_size: int, mapping: mmap.mmap) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self.mapping = mapping
        self.view = memoryview(mapping)[offset : offset + byte_size]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


class SharedMemory:
    """The registered regions. `allowed`: whether clients may register any (`--allow-client-shm`)."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.allowed = allowed
        self._regions: dict[str, SystemRegion] = {}

    def check_allowed(self) -> None:
        if not self.allowed:
            raise ServerError(
                "client shared memory is disabled on this server: start it with --allow-client-shm=true",
                Code.UNSUPPORTED,
            )

    def register_system(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map an object that exists. Raises ServerError: the name is taken, there is no such object."""
        self.check_allowed()
        if name in self._regions:
            raise ServerError(f"shared memory region '{name}' already in manager", Code.ALREADY_EXISTS)
        plain = key.removeprefix("/")
        if not plain or "/" in plain or plain in (".", "..") or "\0" in plain:
            raise ServerError(f"Unable to open shared memory region: '{key}': a key is one name after a slash")
        if plain.startswith(RESERVED_KEYS):
            raise ServerError(f"cannot register shared memory region '{name}' with key '{key}': it is the server's own")
        if byte_size <= 0 or offset < 0:
            raise ServerError(
                f"shared memory region '{name}': offset must be 0 or more and byte_size at least 1, got {offset} and "
                f"{byte_size}"
            )
        mapping = _map(name, key, plain, offset + byte_size)
        self._regions[name] = SystemRegion(name, key, offset, byte_size, mapping)

    def register_cuda(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Raises ServerError: this server maps no GPU memory of other processes."""
        self.check_allowed()
        if len(raw_handle) != _HANDLE_BYTES:
            raise ServerError("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")
        raise ServerError(
            f"cannot register CUDA shared memory region '{name}' on device {device_id}: no GPU is available to this "
            "server",
        )

    def unregister(self, name: str | None, kind: Kind) -> None:
        """Forget a region (None: every one). One that is not there is no error. Requests that use it keep it."""
        self.check_allowed()
        if kind == "cuda":
            return
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: str | None, kind: Kind) -> list[dict[str, Any]]:
        """What is registered; NOT_FOUND for a name that is not."""
        if name is None:
            return [region.describe() for region in self._regions.values()] if kind == "system" else []
        region = self._regions.get(name) if kind == "system" else None
        if region is None:
            raise ServerError(f"Unable to find {kind} shared memory region: '{name}'", Code.NOT_FOUND)
        return [region.describe()]

    def check(self, plan: Plan) -> None:
        """Where the outputs of a request are to go is there. Raises ServerError, before anything is computed."""
        for answer in plan.answers.values():
            if answer.region is not None:
                self._part(answer.region)

    def read(self, wanted: Region) -> memoryview:
        """An input's bytes, where they lie."""
        return self._part(wanted).toreadonly()

    def write(self, wanted: Region, raw: bytes | memoryview, output: str) -> int:
        """Put an output there; returns its bytes."""
        size = len(raw)
        if size > wanted.byte_size:
            raise ServerError(
                f"shared memory size specified with the request for output '{output}' ({wanted.byte_size} bytes) "
                f"should be at least {size} bytes to hold the results"
            )
        self._part(wanted)[:size] = raw
        return size

    def _part(self, wanted: Region) -> memoryview:
        self.check_allowed()
        region = self._regions.get(wanted.name)
        if region is None:
            raise ServerError(f"Unable to find shared memory region: '{wanted.name}'", Code.NOT_FOUND)
        end = wanted.offset + wanted.byte_size
        if end > region.byte_size:
            raise ServerError(
                f"Invalid offset + byte size for shared memory region: '{wanted.name}': {end} is past its "
                f"{region.byte_size} bytes"
            )
        return region.view[wanted.offset : end]

    def close(self) -> None:
        self._regions.clear()


def _map(name: str, key: str, plain: str, needed: int) -> mmap.mmap:
    try:
        descriptor = os.open(_DIRECTORY / plain, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ServerError(f"Unable to open shared memory region: '{key}'") from error
    try:
        size = os.fstat(descriptor).st_size
        if needed > size:
            raise ServerError(
                f"failed to register shared memory region '{name}': invalid args: it ends at byte {needed}, but "
                f"'{key}' has {size} bytes"
            )
        return mmap.mmap(descriptor, size)
    except (OSError, ValueError) as error:
        raise ServerError(f"unable to map shared memory region '{key}': {error}") from error
    finally:
        os.close(descriptor)


def decode_handle(text: object) -> bytes:
    """A CUDA memory handle out of its base64 form."""
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise ServerError("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t") from None
