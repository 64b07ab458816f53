"""A model's configuration as its author sees it: look-ups, and completion by `auto_complete_config`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trine.server.backends.python.stub.tensors import TYPE_NUMBERS, join_strings, split_strings
from trine.server.backends.python.wire import DATATYPE_TO_NUMPY, NUMPY_TO_DATATYPE

Properties = dict[str, Any]

TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}": bool if name == "BOOL" else dtype.type
    for name, dtype in DATATYPE_TO_NUMPY.items()
}
_NUMBERS_TO_NUMPY: dict[int, Any] = {TYPE_NUMBERS[name]: dtype.type for name, dtype in DATATYPE_TO_NUMPY.items()}


def get_input_tensor_by_name(inference_request: Any, name: str) -> Any:
    """The request's input of that name, or None."""
    for tensor in inference_request.inputs():
        if tensor.name() == name:
            return tensor
    return None


def get_output_tensor_by_name(inference_response: Any, name: str) -> Any:
    """The response's tensor of that name, or None."""
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Properties, name: str) -> Properties | None:
    """The properties of an input in a configuration, or None."""
    return next((item for item in model_config.get("input", []) if item["name"] == name), None)


def get_output_config_by_name(model_config: Properties, name: str) -> Properties | None:
    """The properties of an output in a configuration, or None."""
    return next((item for item in model_config.get("output", []) if item["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Properties) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_to_numpy_type(data_type: int) -> Any:
    """numpy's type of Triton's number of a datatype; None where there is none."""
    return _NUMBERS_TO_NUMPY.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    """Triton's number of numpy's type; None where there is none."""
    datatype = NUMPY_TO_DATATYPE.get(np.dtype(data_type).char)
    return None if datatype is None else TYPE_NUMBERS[datatype]


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """numpy's type of a configuration's data type, for example "TYPE_FP32"."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def serialize_byte_tensor(input_tensor: np.ndarray[Any, Any]) -> Any:
    """The binary form of a tensor of strings; () when it has no element, None when it holds something else."""
    if input_tensor.size == 0:
        return ()
    if input_tensor.dtype == np.object_ or input_tensor.dtype.type == np.bytes_:
        return join_strings(input_tensor)
    return None


def deserialize_bytes_tensor(encoded_tensor: Any) -> np.ndarray[Any, Any]:
    """The strings of their binary form, in one dimension."""
    return split_strings(np.frombuffer(encoded_tensor, np.uint8))


class ModelConfig:
    """The configuration so far, which `auto_complete_config` adds to. Contradictions are ValueErrors."""

    def __init__(self, model_config: str) -> None:
        self._model_config: Properties = json.loads(model_config)

    def as_dict(self) -> Properties:
        """The configuration, to read."""
        return self._model_config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        given = self._model_config.get("max_batch_size", 0)
        if given > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {given}, but in auto-complete-config function for model "
                f"'{self._name}' specified max_batch_size {max_batch_size}"
            )
        self._model_config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Batch dynamically unless the configuration has a scheduler already."""
        for scheduler in ("sequence_batching", "ensemble_scheduling"):
            if scheduler in self._model_config:
                raise ValueError(
                    f"Configuration specified scheduling_choice as '{scheduler}', but auto-complete-config function "
                    f"for model '{self._name}' tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._model_config.setdefault("dynamic_batching", {})

    def add_input(self, input: Properties) -> None:
        """Add an input: name, data_type, dims, and optional (bool)."""
        self._add("input", input, ("name", "data_type", "dims", "optional"))

    def add_output(self, output: Properties) -> None:
        """Add an output: name, data_type, dims."""
        self._add("output", output, ("name", "data_type", "dims"))

    def set_model_transaction_policy(self, transaction_policy_dict: Properties) -> None:
        """{"decoupled": bool}."""
        if set(transaction_policy_dict) - {"decoupled"}:
            raise ValueError(
                f"model transaction property in auto-complete-config function for model '{self._name}' contains "
                "property other than 'decoupled'."
            )
        policy = self._model_config.setdefault("model_transaction_policy", {})
        if "decoupled" not in transaction_policy_dict:
            return
        wanted = transaction_policy_dict["decoupled"]
        if policy.get("decoupled", wanted) != wanted:
            raise ValueError(
                f"trying to change decoupled property in auto-complete-config for model '{self._name}', which is "
                f"already set to '{policy['decoupled']}'."
            )
        policy["decoupled"] = wanted

    @property
    def _name(self) -> str:
        return str(self._model_config.get("name", ""))

    def _add(self, kind: str, properties: Properties, known: tuple[str, ...]) -> None:
        self._check_properties(kind, properties, known)
        existing = self._model_config.setdefault(kind, [])
        for current in existing:
            if current["name"] == properties["name"]:
                self._check_same(kind, current, properties)
                current.update(properties)
                return
        existing.append(dict(properties))

    def _check_properties(self, kind: str, properties: Properties, known: tuple[str, ...]) -> None:
        place = f"in auto-complete-config function for model '{self._name}'"
        shown = f"{kind} '{properties['name']}'" if "name" in properties else kind
        if set(properties) - set(known):
            names = ", ".join(f"'{name}'" for name in known[:-1]) + f" and '{known[-1]}'"
            raise ValueError(f"{shown} {place} contains property other than {names}.")
        for needed in ("name", "data_type", "dims"):
            if needed not in properties:
                raise ValueError(f"{shown} {place} is missing '{needed}' property.")

    def _check_same(self, kind: str, current: Properties, properties: Properties) -> None:
        name = properties["name"]
        if current.get("data_type", "TYPE_INVALID") not in ("TYPE_INVALID", properties["data_type"]):
            raise ValueError(
                f"unable to load model '{self._name}', configuration expects datatype {current['data_type']} for "
                f"{kind} '{name}', model provides {properties['data_type']}"
            )
        for key, is_given in (("dims", bool(current.get("dims"))), ("optional", "optional" in current)):
            if is_given and key in properties and list_of(current[key]) != list_of(properties[key]):
                raise ValueError(
                    f"model '{self._name}', tensor '{name}': the model expects {key} {properties[key]} but the model "
                    f"configuration specifies {key} {current[key]}"
                )


def list_of(value: Any) -> Any:
    """Tuples and lists of the same dimensions are the same."""
    return list(value) if isinstance(value, list | tuple) else value
