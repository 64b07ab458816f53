"""What `trine serve` prints when it is ready: where it is, and two ways to use it that can be copied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import trine

if TYPE_CHECKING:
    from trine.service.openai.context import Service

_EVERYWHERE = {"0.0.0.0", "::", ""}


def banner(service: Service, port: int) -> str:
    """Several lines for a terminal."""
    url = base_url(service.settings.host, port)
    names = ", ".join((*service.model_names, *service.embedding_names))
    lines = [
        f"Trine {trine.__version__} serves {names} at {url}",
        f"playground {url}/   API {url}/docs   metrics {url}/metrics",
    ]
    if service.info is not None:
        lines += [f"  {line}" for line in service.info.summary]
    return "\n".join([*lines, "", curl_line(service, url), "", openai_snippet(service, url), ""])


def base_url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def curl_line(service: Service, url: str) -> str:
    """One line, to be pasted into a shell."""
    path, body = _example(service)
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if service.settings.api_keys else ""
    return f"curl {url}{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"


def openai_snippet(service: Service, url: str) -> str:
    """Python, to be pasted into a file."""
    path, body = _example(service)
    calls = {
        "/v1/chat/completions": ("chat.completions", "answer.choices[0].message.content"),
        "/v1/completions": ("completions", "answer.choices[0].text"),
        "/v1/embeddings": ("embeddings", "answer.data[0].embedding"),
    }
    method, result = calls[path]
    key = "YOUR_API_KEY" if service.settings.api_keys else "none"
    arguments = ", ".join(f"{name}={value!r}" for name, value in body.items())
    return "\n".join(
        [
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{url}/v1", api_key="{key}")',
            f"answer = client.{method}.create({arguments})",
            f"print({result})",
        ]
    )


def _example(service: Service) -> tuple[str, dict[str, object]]:
    if service.engine is None:
        return "/v1/embeddings", {"model": service.embedding_names[0], "input": "A sentence to compare with others."}
    model = service.model_names[0]
    tokenizer = service.engine.tokenizer
    if tokenizer is not None and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": "What is 12 + 30?"}]
        return "/v1/chat/completions", {"model": model, "messages": messages}
    prompt: object = "Once upon a time" if tokenizer is not None else [1, 2, 3]
    return "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 32}
