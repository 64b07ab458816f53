"""/v1/embeddings."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.conformance.harness import MODEL, Api, Server

TEXTS = ["The cat sleeps.", "A feline is asleep.", "Stocks fell on Monday."]


@pytest.fixture
def name(encoder: Path) -> str:
    return encoder.resolve().name


def embed(api: Api, name: str, value: Any, **fields: Any) -> Any:
    return api.call(lambda client: client.embeddings.create(model=name, input=value, **fields))


def test_similar_texts_are_near(api: Api, name: str) -> None:
    answer = embed(api, name, TEXTS)
    assert (answer.object, answer.model) == ("list", name)
    assert [item.index for item in answer.data] == [0, 1, 2]
    vectors = np.array([item.embedding for item in answer.data])
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_one_text_and_both_encodings(api: Api, server: Server, name: str) -> None:
    by_client = embed(api, name, TEXTS[0]).data[0].embedding  # base64 on the wire
    as_numbers = embed(api, name, TEXTS[0], encoding_format="float").data[0].embedding
    assert by_client == pytest.approx(as_numbers, abs=1e-6)
    body = {"model": name, "input": TEXTS[0], "encoding_format": "base64"}
    raw = httpx.post(f"{server.url}/v1/embeddings", json=body).json()
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert decoded == pytest.approx(as_numbers, abs=1e-6)
    assert set(raw["usage"]) == {"prompt_tokens", "total_tokens"}


def test_token_ids(api: Api, name: str) -> None:
    ids = [101, 1996, 4937, 102]
    one = embed(api, name, ids).data
    two = embed(api, name, [ids, ids[:3]]).data
    assert len(one) == 1
    assert len(two) == 2
    assert two[0].embedding == pytest.approx(one[0].embedding, abs=1e-5)


def test_fewer_dimensions(api: Api, name: str) -> None:
    whole = np.array(embed(api, name, TEXTS[0]).data[0].embedding)
    short = np.array(embed(api, name, TEXTS[0], dimensions=128).data[0].embedding)
    assert short == pytest.approx(whole[:128] / np.linalg.norm(whole[:128]), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"input": []}, "input"), ({"input": ["a", 3]}, "input"), ({"input": "a", "dimensions": 100000}, "dimensions")],
)
def test_refusals(api: Api, name: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.call(lambda client: client.embeddings.create(model=name, **fields))
    assert caught.value.param == param


def test_a_language_model_does_not_embed(api: Api) -> None:
    with pytest.raises(openai.BadRequestError, match="--embedding-model"):
        embed(api, MODEL, "a")
