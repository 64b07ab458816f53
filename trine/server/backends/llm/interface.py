"""The tensors of a language model: text in and out, or token ids in and out as in TensorRT-LLM's back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trine.server.configuration.types import datatype_number

ModelConfig = Any

TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
TOKEN_INPUT, TOKEN_OUTPUT = "input_ids", "output_ids"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the interface."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)


TEXT_INPUTS = (
    TensorSpec(TEXT_INPUT, "BYTES"),
    TensorSpec("max_tokens", "INT32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("min_p", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    TensorSpec("random_seed", "UINT64"),
    TensorSpec("seed", "UINT64"),
    TensorSpec("stop", "BYTES", (-1,)),
    TensorSpec("stop_words", "BYTES", (-1,)),
    TensorSpec("bad_words", "BYTES", (-1,)),
    TensorSpec("end_id", "INT32"),
    TensorSpec("pad_id", "INT32"),
    TensorSpec("ignore_eos", "BOOL"),
    TensorSpec("num_return_sequences", "INT32"),
    TensorSpec("beam_width", "INT32"),
    TensorSpec("length_penalty", "FP32"),
    TensorSpec("stream", "BOOL"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("sampling_parameters", "BYTES"),
    TensorSpec("guided_decoding_guide_type", "BYTES"),
    TensorSpec("guided_decoding_guide", "BYTES"),
    TensorSpec("return_log_probs", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_cumulative_logprob", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
)
"""Every input but text_input is optional. What is not given as a tensor may be given as a request parameter."""

TEXT_OUTPUTS = (
    TensorSpec(TEXT_OUTPUT, "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,)),
    TensorSpec("cumulative_logprob", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("num_input_tokens", "INT32"),
    TensorSpec("num_output_tokens", "INT32", (-1,)),
)

ASKED_BY = {
    "finish_reason": "return_finish_reason",
    "cumulative_logprob": "return_cumulative_logprob",
    "output_log_probs": "return_log_probs",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
}
"""Outputs of the text interface that come when they are asked for: by name, or by this input."""


def complete_text_interface(config: ModelConfig) -> None:
    """Declare the text interface's tensors where the configuration declares none."""
    if not config.input:
        for spec in TEXT_INPUTS:
            tensor = config.input.add(name=spec.name, data_type=datatype_number(spec.datatype), dims=spec.dims)
            tensor.optional = spec.name != TEXT_INPUT
    if not config.output:
        for spec in TEXT_OUTPUTS:
            config.output.add(name=spec.name, data_type=datatype_number(spec.datatype), dims=spec.dims)


def takes_tokens(config: ModelConfig) -> bool:
    """Whether the configuration has the interface of token ids."""
    return any(tensor.name == TOKEN_INPUT for tensor in config.input)
