"""config.pbtxt: the whole grammar, mistakes with their place, what is checked and what is filled in."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from trine.core.errors import ConfigurationError
from trine.server.configuration import check_config, complete_config, config_from_json, config_from_text
from trine.server.configuration.complete import fill_backend
from trine.server.proto import pb

WHOLE = """
# a comment
name: "m"  ; platform: 'onnxruntime_onnx',
max_batch_size: 8,
input [
  { name: "a" "b"  data_type: TYPE_FP32, dims: [ -1, 3 ] },   # adjacent strings are one
  { name: 'c\\x41' data_type: 13; dims: [1,], reshape: { shape: [ ] } },
]
output { name: "o" data_type: TYPE_FP32 dims: 2 dims: 3 }
instance_group [ { count: 2 kind: KIND_CPU }, ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 },
parameters: { key: "k" value: { string_value: "[1, 2,, ]; # no comment" } }
version_policy: { all { }}
"""


def test_the_grammar() -> None:
    config = config_from_text(WHOLE)
    assert [tensor.name for tensor in config.input] == ["ab", "cA"]
    assert list(config.input[0].dims) == [-1, 3]
    assert config.input[1].data_type == pb.DataType.Value("TYPE_STRING")
    assert config.input[1].HasField("reshape")
    assert list(config.output[0].dims) == [2, 3]
    assert config.parameters["k"].string_value == "[1, 2,, ]; # no comment"
    assert config.version_policy.HasField("all")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_sise: 8", "dir/config.pbtxt:1:1: .*max_batch_sise.*Did you mean 'max_batch_size'"),
        ("\n\n  input [{ nam: 'x' }]", "dir/config.pbtxt:3:12: .*Did you mean 'name'"),
        ("input [{ data_type: TYPE_FP23 }]", "dir/config.pbtxt:1:21: .*Did you mean 'TYPE_FP32'"),
        ("max_batch_size: many", "dir/config.pbtxt:1:17: "),
        ("input [{ name: 'x' ", "dir/config.pbtxt:1:"),
        ("dynamic_batching { priority_queue_policy { key: 1 value { timeout_action: DROP } } }", "REJECT"),
    ],
)
def test_mistakes_name_their_place(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        config_from_text(text, "dir/config.pbtxt")


def test_json() -> None:
    config = config_from_json('{"name": "m", "maxBatchSize": 4, "input": [{"name": "x", "dataType": "TYPE_INT8"}]}')
    assert (config.max_batch_size, config.input[0].data_type) == (4, pb.DataType.Value("TYPE_INT8"))
    for text in ("{", "[]", '{"max_batch_sise": 1}', '{"max_batch_size": "x"}', '{"name": 5}', "null" * 100, ""):
        with pytest.raises(ConfigurationError, match="config"):
            config_from_json(text)
    with pytest.raises(ConfigurationError, match="Did you mean 'max_batch_size'"):
        config_from_json('{"max_batch_sise": 1}')


@given(st.text(max_size=200))
def test_no_text_is_more_than_a_configuration_error(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        config_from_text(text)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_what_is_printed_is_read_again(value: Any) -> None:
    config = pb.ModelConfig(name=repr(value), max_batch_size=3)
    config.parameters["x"].string_value = f"{value!r},,;[ ]\n\"'#"
    assert config_from_text(text_format.MessageToString(config)) == config


BASE = """name: "m" backend: "identity" max_batch_size: 4
input [{ name: "i" data_type: TYPE_FP32 dims: [2] }] output [{ name: "o" data_type: TYPE_FP32 dims: [2] }]
"""


def completed(text: str, gpus: int = 0) -> Any:
    config = config_from_text(text)
    fill_backend(config, config.name or "m", None)
    complete_config(config, gpus=gpus)
    check_config(config, gpus=gpus)
    return config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.replace("4", "-1", 1), "'max_batch_size' must be non-negative value for m"),
        (BASE.replace("dims: [2] }] o", "dims: [0] }] o"), "dimension must be integer >= 1, or -1"),
        (BASE.replace("dims: [2] }] o", "}] o"), "model input 'i' must specify 'dims' for m"),
        (BASE.replace('name: "i" ', ""), "model input must specify 'name' for m"),
        (BASE.replace("data_type: TYPE_FP32 dims: [2] }] o", "dims: [2] }] o"), "must specify 'data_type'"),
        (BASE.replace("dims: [2] }] o", "dims: [2] reshape { shape: [3] } }] o"), "different size for dims"),
        (BASE + "dynamic_batching { preferred_batch_size: 9 }", "preferred size must be <= max batch size for m"),
        (BASE + "dynamic_batching { preferred_batch_size: 0 }", "preferred size must be positive"),
        (BASE + "dynamic_batching { priority_levels: 2 }", r"default priority level must be in range \[1, 2\]"),
        (
            BASE + "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            "Only one priority level is allowed when 'preserve_ordering' is true",
        ),
        (
            BASE
            + """dynamic_batching { preserve_ordering: true
            default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 } }""",
            "can not have DELAY as timeout action",
        ),
        (BASE + "instance_group [{ kind: KIND_GPU }]", "KIND_GPU but no GPUs are available"),
        (BASE + "instance_group [{ kind: KIND_CPU gpus: [0] }]", "KIND_CPU but specifies one or more GPUs"),
        (
            BASE + "response_cache { enable: true } model_transaction_policy { decoupled: true }",
            "Response Cache does not currently support model m with 'decoupled' transaction policy",
        ),
        (BASE + "response_cache { enable: true } sequence_batching { }", "with sequence batching scheduler"),
        (
            BASE + 'sequence_batching { control_input [{ name: "s" control [{ kind: CONTROL_SEQUENCE_START }] }] }',
            "must specify exactly one of 'int32_false_true'",
        ),
        (
            BASE
            + """sequence_batching { control_input [{ name: "s" control [
            { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] },
            { kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] }] }] }""",
            "control tensor 's' is specified for multiple control kinds for m",
        ),
        (
            BASE + 'batch_input [{ kind: BATCH_ITEM_SHAPE target_name: "t" data_type: TYPE_INT8 source_input: "i" }]',
            "batch input data type must be TYPE_INT32 or TYPE_FP32",
        ),
        (
            BASE + 'batch_input [{ kind: BATCH_ITEM_SHAPE target_name: "t" data_type: TYPE_FP32 source_input: "z" }]',
            "unknown source input name 'z'",
        ),
        ('name: "m" platform: "onnxruntime_onnx" backend: "pytorch"', "unexpected 'platform' and 'backend' pair"),
        ('name: "m" max_batch_size: 1', "must specify 'platform' or 'backend' for 'm'"),
        ('name: "m" platform: "ensemble"', "ensemble scheduling must be set for ensemble m"),
        (BASE + "ensemble_scheduling { }", "whose platform is not ensemble"),
        (
            'name: "m" platform: "ensemble" ensemble_scheduling { step { model_name: "a" } } instance_group { }',
            "instance group should not be specified for ensemble 'm'",
        ),
        ('name: "m" platform: "ensemble" ensemble_scheduling { }', "must specify 'step' for ensemble 'm'"),
    ],
)
def test_contradictions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        completed(text)


def test_defaults_are_filled_as_tritons_clients_see_them() -> None:
    config = completed(BASE + "dynamic_batching { }")
    assert config.version_policy.latest.num_versions == 1
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.optimization.input_pinned_memory.enable
    group = config.instance_group[0]
    assert (group.name, group.count, pb.ModelInstanceGroup.Kind.Name(group.kind)) == ("m", 1, "KIND_CPU")
    config = completed(BASE.replace("identity", "onnxruntime"))
    assert (config.platform, config.default_model_filename) == ("onnxruntime_onnx", "model.onnx")
    assert config.instance_group[0].count == 2
    config = completed(BASE + "instance_group [{ }, { count: 3 kind: KIND_CPU }]", gpus=2)
    kinds = [pb.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group]
    assert kinds == ["KIND_GPU", "KIND_CPU"]
    assert [list(group.gpus) for group in config.instance_group] == [[0, 1], []]
    assert [group.name for group in config.instance_group] == ["m_0", "m_1"]
    sequence = completed(BASE + "sequence_batching { oldest { } }").sequence_batching
    assert sequence.max_sequence_idle_microseconds == 1_000_000
    assert list(sequence.oldest.preferred_batch_size) == [4]


def test_a_folder_named_after_its_back_end() -> None:
    config = pb.ModelConfig()
    fill_backend(config, "resnet.onnxruntime", None)
    assert (config.name, config.backend, config.platform) == ("resnet.onnxruntime", "onnxruntime", "onnxruntime_onnx")
