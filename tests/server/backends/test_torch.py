"""TorchScript and exported programs: how names reach `forward`, datatypes, devices, errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.server.backends.served import Served, ServerError, write_model
from trine.core.errors import ModelLoadError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class AddSub(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left + right, left - right


class Dictionary(torch.nn.Module):
    def forward(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"double": values["x"] * 2, "sum": values["x"] + values["y"]}


class Shout(torch.nn.Module):
    def forward(self, texts: list[str]) -> list[str]:
        found: list[str] = []
        for text in texts:
            found.append(text + "!")
        return found


class Halve(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)  # in place: must not change the request
        return x


class Narrow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16) + 1


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layer(features)}


def tensors(kind: str, *names: str, datatype: str = "TYPE_FP32", dims: str = "4") -> str:
    return "".join(f'{kind} {{ name: "{name}" data_type: {datatype} dims: [ {dims} ] }}\n' for name in names)


def write_script(folder: Path, name: str, module: torch.nn.Module, config: str) -> None:
    place = write_model(folder, name, f'backend: "pytorch"\n{config}', {"1/keep": ""})
    torch.jit.script(module).save(place / "1" / "model.pt")


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, net: Net) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    outputs = tensors("output", "OUT__0", "OUT__1")
    write_script(folder, "arguments", AddSub(), tensors("input", "right", "left") + outputs)
    write_script(folder, "positions", AddSub(), tensors("input", "B__1", "A__0") + tensors("output", "D__1", "S__0"))
    write_script(folder, "order", AddSub(), tensors("input", "FIRST", "SECOND") + tensors("output", "SUM", "DIFF"))
    write_script(folder, "dictionary", Dictionary(), tensors("input", "x", "y") + tensors("output", "sum", "double"))
    write_script(
        folder,
        "strings",
        Shout(),
        tensors("input", "TEXT", datatype="TYPE_STRING", dims="-1")
        + tensors("output", "LOUD", datatype="TYPE_STRING", dims="-1"),
    )
    write_script(folder, "in_place", Halve(), tensors("input", "x") + tensors("output", "y"))
    write_script(folder, "narrow", Narrow(), tensors("input", "x") + tensors("output", "y", datatype="TYPE_BF16"))
    write_script(
        folder,
        "wrong_type",
        AddSub(),
        tensors("input", "left", "right") + tensors("output", "S__0", datatype="TYPE_INT32"),
    )
    parameters = 'parameters { key: "ENABLE_WEIGHT_SHARING" value { string_value: "true" } }\n'
    write_script(
        folder,
        "batched",
        AddSub(),
        "max_batch_size: 8\ndynamic_batching { }\ninstance_group { count: 2 kind: KIND_CPU }\n"
        + parameters
        + tensors("input", "left", "right")
        + outputs,
    )
    exported = write_model(folder, "exported", "", {"1/keep": ""})
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.zeros(2, 8),), dynamic_shapes={"features": {0: batch}})
    torch.export.save(program, exported / "1" / "model.pt2")
    export_dictionary(write_model(folder, "exported_dictionary", "", {"1/keep": ""}) / "1" / "model.pt2")
    with Served(folder) as repository:
        yield repository


def export_dictionary(file: Path) -> None:
    program = torch.export.export(Dictionary(), ({"x": torch.zeros(4), "y": torch.zeros(4)},))
    torch.export.save(program, file)


LEFT, RIGHT = np.arange(4, dtype=np.float32), np.full(4, 10, dtype=np.float32)


@pytest.mark.parametrize(
    ("model", "left", "right", "total", "difference"),
    [
        ("arguments", "left", "right", "OUT__0", "OUT__1"),
        ("positions", "A__0", "B__1", "S__0", "D__1"),
        ("order", "FIRST", "SECOND", "SUM", "DIFF"),
    ],
)
def test_names_reach_forward(served: Served, model: str, left: str, right: str, total: str, difference: str) -> None:
    answer = served.ask(model, {right: RIGHT, left: LEFT})
    np.testing.assert_array_equal(answer[total], LEFT + RIGHT)
    np.testing.assert_array_equal(answer[difference], LEFT - RIGHT)


def test_dictionary_in_and_out(served: Served) -> None:
    answer = served.ask("dictionary", {"x": LEFT, "y": RIGHT})
    np.testing.assert_array_equal(answer["sum"], LEFT + RIGHT)
    np.testing.assert_array_equal(answer["double"], LEFT * 2)


@pytest.mark.parametrize("model", ["dictionary", "exported_dictionary"])
def test_only_the_wanted_outputs(served: Served, model: str) -> None:
    assert list(served.ask(model, {"x": LEFT, "y": RIGHT}, outputs=["double"])) == ["double"]


def test_strings(served: Served) -> None:
    answer = served.ask("strings", {"TEXT": np.array([b"a", "ö".encode()], dtype=object)})
    assert answer["LOUD"].tolist() == [b"a!", "ö!".encode()]


def test_strings_that_are_no_text_are_refused(served: Served) -> None:
    with pytest.raises(ServerError, match="UTF-8") as caught:
        served.ask("strings", {"TEXT": np.array([b"\xff"], dtype=object)})
    assert caught.value.status == 400


def test_models_that_write_into_their_input_change_nobody_elses(served: Served) -> None:
    given = np.ones(4, dtype=np.float32)
    given.flags.writeable = False
    np.testing.assert_array_equal(served.ask("in_place", {"x": given})["y"], np.full(4, 0.5))
    np.testing.assert_array_equal(given, np.ones(4))


def test_bfloat16(served: Served) -> None:
    bits = served.ask("narrow", {"x": LEFT})["y"]
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32), LEFT + 1)


def test_batches_are_computed_together(served: Served) -> None:
    asked = [served.submit("batched", {"left": LEFT[None] * index, "right": RIGHT[None]}) for index in range(6)]
    for index, one in enumerate(asked):
        served.run(one.finished)
        (response,) = one.responses
        np.testing.assert_array_equal(response.outputs[0].array, LEFT[None] * index + RIGHT)


def test_an_exported_program_needs_no_configuration(served: Served, net: Net) -> None:
    model = served.repository.model("exported")
    assert [(tensor.name, list(tensor.dims)) for tensor in model.config.input] == [("features", [8])]
    assert [(tensor.name, list(tensor.dims)) for tensor in model.config.output] == [("scores", [3])]
    assert model.config.max_batch_size == 4
    features = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)
    expected = net(torch.from_numpy(features))["scores"].detach().numpy()
    np.testing.assert_allclose(served.ask("exported", {"features": features})["scores"], expected, rtol=1e-5)


def test_another_datatype_than_configured_is_an_error(served: Served) -> None:
    with pytest.raises(ServerError, match="expects datatype INT32 for output 'S__0', model provides FP32") as caught:
        served.ask("wrong_type", {"left": LEFT, "right": RIGHT})
    assert caught.value.status == 500


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (b"no model", tensors("input", "a") + tensors("output", "b"), "can't load .*model.pt as TorchScript"),
        (None, tensors("input", "a", "b", "c") + tensors("output", "S__0"), "3 inputs are configured, .* takes 2"),
        (None, tensors("input", "A__0", "B__2") + tensors("output", "S__0"), "must be 0 to 1"),
    ],
)
def test_models_that_can_not_be_served_say_why(
    tmp_path: Path, content: bytes | None, config: str, message: str
) -> None:
    write_script(tmp_path, "broken", AddSub(), config)
    if content is not None:
        (tmp_path / "broken" / "1" / "model.pt").write_bytes(content)
    with pytest.raises(ModelLoadError, match=message), Served(tmp_path):
        pass
