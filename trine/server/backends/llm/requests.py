"""A request's tensors and parameters as the engine's sampling parameters, under every name that clients use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from trine.llm.sampling.params import GuidedParams, SamplingParams
from trine.server.errors import ServerError
from trine.server.request import InferRequest

_NUMBERS: dict[str, tuple[str, type]] = {
    "max_tokens": ("max_tokens", int),
    "request_output_len": ("max_tokens", int),
    "min_tokens": ("min_tokens", int),
    "min_length": ("min_tokens", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "runtime_top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "runtime_top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "length_penalty": ("length_penalty", float),
    "len_penalty": ("length_penalty", float),
    "random_seed": ("seed", int),
    "seed": ("seed", int),
    "num_return_sequences": ("n", int),
    "n": ("n", int),
    "ignore_eos": ("ignore_eos", bool),
    "include_stop_str_in_output": ("include_stop_str_in_output", bool),
    "skip_special_tokens": ("skip_special_tokens", bool),
}
"""Names of requests to fields of SamplingParams. The first that is given counts."""

_GUIDES = {
    "json": "json_object",
    "json_schema": "json",
    "regex": "regex",
    "ebnf_grammar": "grammar",
    "grammar": "grammar",
}


class RequestReader:
    """Looks names up among a request's tensors (one row of them), its JSON `sampling_parameters`, its parameters."""

    def __init__(self, request: InferRequest, row: int, batches: bool) -> None:
        self._request = request
        self._row = row
        self._batches = batches
        self._more: Mapping[str, Any] = request.parameters
        given = self.strings("sampling_parameters")
        if given:
            self._more = {**request.parameters, **_json_object(given[0])}

    def array(self, name: str) -> np.ndarray[Any, Any] | None:
        """A tensor's row, or None."""
        tensor = self._request.inputs.get(name)
        if tensor is None:
            return None
        return tensor.array[self._row] if self._batches and tensor.array.ndim else tensor.array

    def scalar(self, name: str, kind: type) -> Any:
        """One value, or None."""
        array = self.array(name)
        if array is None:
            value = self._more.get(name)
        elif array.size == 0:
            return None
        elif array.size > 1:
            raise ServerError(f"input '{name}' takes one value, got {array.size}")
        else:
            value = array.reshape(-1)[0]
        if value is None:
            return None
        return _as(name, value, kind)

    def strings(self, name: str) -> list[str]:
        """All strings; none where there are none or only empty ones."""
        array = self.array(name)
        items: Any = self._more.get(name) if array is None else array.reshape(-1).tolist()
        if items is None:
            return []
        if isinstance(items, str | bytes):
            items = [items]
        if not isinstance(items, list):
            raise ServerError(f"{name}={items!r}: expected strings")
        return [text for text in (_text(name, item) for item in items) if text]

    def flag(self, name: str) -> bool:
        return bool(self.scalar(name, bool))


def sampling_params(reader: RequestReader, *, temperature_samples: bool) -> SamplingParams:
    """How to sample. RequestError or ServerError names what can't be.

    With none of top_k, top_p and min_p the most probable token is taken, unless temperature_samples and a temperature
    is given: TensorRT-LLM's clients always send one. 0 for top_p means off.
    """
    values: dict[str, Any] = {}
    for name, (field, kind) in _NUMBERS.items():
        if field not in values:
            value = reader.scalar(name, kind)
            if value is not None:
                values[field] = value
    if values.get("top_p") == 0:
        del values["top_p"]
    deciding = ("top_k", "top_p", "min_p", "temperature") if temperature_samples else ("top_k", "top_p", "min_p")
    if not any(values.get(field) for field in deciding):
        values["temperature"] = 0.0
    beams = reader.scalar("beam_width", int) or 1
    if beams > 1:
        returned = values.get("n", 1)
        values |= {"use_beam_search": True, "temperature": 0.0, "n": returned, "best_of": max(beams, returned)}
    end_id = reader.scalar("end_id", int)
    if end_id is not None:
        values["stop_token_ids"] = (end_id,) if end_id >= 0 else ()
        values["ignore_eos"] = values.get("ignore_eos", False) or end_id < 0
    values["stop"] = tuple(reader.strings("stop_words") or (reader.strings("stop") if not _is_bool(reader) else []))
    values["bad_words"] = tuple(reader.strings("bad_words"))
    values["guided"] = _guided(reader)
    return SamplingParams(**values)


def word_ids(reader: RequestReader, name: str) -> list[list[int]]:
    """TensorRT-LLM's word lists: a row of token ids, and a row with the end of each word in it, -1 after the last."""
    array = reader.array(name)
    if array is None or not array.size:
        return []
    rows = array.reshape(-1, array.shape[-1]) if array.ndim >= 2 else None
    if rows is None or rows.shape[0] != 2:
        raise ServerError(f"input '{name}' has shape {list(array.shape)}: expected two rows, token ids and word ends")
    ids, ends = rows.tolist()
    words, begin = [], 0
    for end in ends:
        if end < 0:
            break
        if not begin <= end <= len(ids):
            raise ServerError(f"input '{name}': word end {end} after {begin} in a row of {len(ids)} token ids")
        if end > begin:
            words.append(ids[begin:end])
        begin = end
    return words


def _is_bool(reader: RequestReader) -> bool:
    """TensorRT-LLM's `stop` is a flag that ends a request; elsewhere it holds stop words."""
    array = reader.array("stop")
    return array is not None and array.dtype == np.bool_


def _guided(reader: RequestReader) -> GuidedParams | None:
    kind = reader.strings("guided_decoding_guide_type")
    guide = reader.strings("guided_decoding_guide")
    if not kind:
        return None
    field = _GUIDES.get(kind[0])
    if field is None:
        raise ServerError(f"guided_decoding_guide_type={kind[0]!r}: expected one of {', '.join(_GUIDES)}")
    if field == "json_object":
        return GuidedParams(json_object=True)
    if not guide:
        raise ServerError(f"guided_decoding_guide_type={kind[0]!r} needs guided_decoding_guide")
    chosen: dict[str, Any] = {field: guide[0]}
    return GuidedParams(**chosen)


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ServerError(f"sampling_parameters is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ServerError("sampling_parameters: expected a JSON object")
    return content


def _as(name: str, value: Any, kind: type) -> Any:
    """A value that came as a number, or as text (JSON clients send "0.5" and "true" as well)."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    try:
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "1": True, "false": False, "0": False, "": False}[value.lower()]
            return bool(value)
        if kind is int and not isinstance(value, str) and float(value) != int(value):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ServerError(f"{name}={value!r}: expected {'true or false' if kind is bool else 'a number'}") from None


def _text(name: str, item: Any) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, bytes):
        raise ServerError(f"{name}: expected strings, got {item!r}")
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise ServerError(f"{name}: a string is not UTF-8: {error}") from None
