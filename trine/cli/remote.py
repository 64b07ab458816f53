"""What commands say to a running server's /v2 API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from argparse import ArgumentParser
from typing import Any

from trine.core.errors import TrineError

DEFAULT_URL = "http://127.0.0.1:8000"


def add_url(parser: ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"where the server is (default: {DEFAULT_URL})")


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer to a GET, or with a body to a POST. TrineError: nobody answers, or with an error."""
    data = None if body is None else json.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            found: dict[str, Any] = json.loads(response.read())
            return found
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            text = f"HTTP status {error.code}"
        raise TrineError(str(text)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrineError(f"no answer from {url}: {reason}; start `trine serve`, or name the server by --url") from error
