"""The torch tap shows what running the module computes, and holds a tensor no longer than its readers need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import portcall.api
from portcall.calibration import _tap_torch
from portcall.calibration.histogram import Accumulator
from portcall.calibration.table import CalibrationTable, Section
from portcall.progress import Reporter
from portcall.targets.agent.contract import Graph, Source, TensorSpec
from portcall.targets.agent.errors import BadInput
from tests.models import tiny_cnn, tiny_cnn_data, two_inputs, two_inputs_data

Array = np.ndarray[Any, Any]


def torch_section(model: str, data: str, folder: Path) -> Section:
    answer = portcall.api.calibrate(model, data, folder / "t.pctable", kinds=["torch"])
    assert [s["kind"] for s in answer["sections"]] == ["onnx", "torch"]
    sections = CalibrationTable.load(folder / "t.pctable").sections.values()
    return next(s for s in sections if s.kind == "torch")


def graph_of_module(module: nn.Module, example: torch.Tensor, path: Path) -> Graph:
    """Export *module* of one input "x"; a graph as ``calibrating.torch_graph`` makes it."""
    torch.export.save(torch.export.export(module.eval(), (example,)), path)
    specs = (TensorSpec("x", tuple(example.shape), "float32"),), (TensorSpec("y", (1,), "float32"),)
    shapes = {"x": tuple(example.shape)}
    return Graph("torch", path, "0", Source(str(path), "pt2", path, "0", *specs, shapes), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tap_sees_what_hooks_see(tmp_path: Path) -> None:
    section = torch_section("tests.models:tiny_cnn", "tests.models:tiny_cnn_data", tmp_path)
    module = tiny_cnn()[0]
    seen: list[Accumulator] = []
    leaves = [m for m in module.modules() if not list(m.children())]
    made: list[torch.Tensor] = []
    for leaf in leaves:
        leaf.register_forward_hook(lambda _module, _inputs, output: made.append(output.clone()))
    # x + pointwise(...) and flatten are no modules
    with torch.no_grad():
        for sample in tiny_cnn_data():
            made.clear()
            x = torch.from_numpy(sample["x"])
            module(x)
            stem, branch, pooled, head = made[:3], made[3:8], made[8], made[9]
            assert len(made) == 10
            values = [x, *stem, *branch, stem[-1] + branch[-1], pooled, torch.flatten(pooled, 1), head]
            seen = seen or [Accumulator() for _ in values]
            for accumulator, value in zip(seen, values, strict=True):
                accumulator.add(value.numpy())
    assert section.n == 24 and len(section.histograms) == len(seen) == 13
    for (name, found), accumulator in zip(section.histograms.items(), seen, strict=True):
        wanted = accumulator.histogram()
        assert found.n == wanted.n, name
        extent = wanted.maximum - wanted.minimum
        assert abs(found.minimum - wanted.minimum) <= 1e-5 * extent, name
        assert abs(found.maximum - wanted.maximum) <= 1e-5 * extent, name
        # counts too: but for values that the last bit carries over an edge
        assert found.exponent == wanted.exponent and found.first == wanted.first, name
        assert np.abs(found.counts - wanted.counts).sum() <= 0.01 * wanted.n, name


def test_inputs_of_integers_are_no_activations(tmp_path: Path) -> None:
    section = torch_section("tests.models:two_inputs", "tests.models:two_inputs_data", tmp_path)
    assert "features" in section.histograms and "token_ids" not in section.histograms
    wanted = np.stack([s["features"] for s in two_inputs_data()])
    assert section.histograms["features"].minimum == wanted.min()
    assert section.histograms["features"].maximum == wanted.max()
    module, _, _ = two_inputs()
    with torch.no_grad():
        outputs = [
            module(torch.from_numpy(s["token_ids"]), torch.from_numpy(s["features"]))
            for s in two_inputs_data()
        ]
    scores = torch.cat([o["scores"] for o in outputs])
    found = list(section.histograms.values())
    close = [
        h for h in found if h.n == scores.numel() and abs(h.maximum - float(scores.max())) < 1e-5
    ]  # the head's output
    assert close and abs(close[0].minimum - float(scores.min())) < 1e-5


def test_what_a_pass_promises_is_what_it_shows(tmp_path: Path) -> None:
    """An interrupted run is taken up at the pass whose first tensor it has seen: an integer input is no tensor."""

    class Ids(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.relu(ids.float() - 2)

    path = tmp_path / "ids.pt2"
    torch.export.save(torch.export.export(Ids().eval(), (torch.arange(4),)), path)
    specs = (TensorSpec("ids", (4,), "int64"),), (TensorSpec("y", (4,), "float32"),)
    graph = Graph("torch", path, "0", Source(str(path), "pt2", path, "0", *specs, {"ids": (4,)}), {})
    one = _tap_torch.open_tap(graph, 1).passes[0]
    shown = [name for name, _ in one.open_runners()[0]({"ids": np.arange(4)})]
    assert shown and list(one.tensors) == shown


class Chain(nn.Module):
    """Twelve additions in a row; what the first one gave is read by the last as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = x + 1
        for _ in range(11):
            x = x + 1
        x = x * first
        for _ in range(4):
            x = x + 1
        return x


def test_a_tensor_is_dropped_after_its_last_reader(tmp_path: Path) -> None:
    example = torch.randn(1, 64)
    tap = _tap_torch.open_tap(graph_of_module(Chain(), example, tmp_path / "chain.pt2"), 1)
    shown: Any = tap.passes[0].open_runners()[0]({"x": example.numpy()})
    names: list[str] = []
    alive: list[set[int]] = []
    for name, _ in shown:
        names.append(name)
        # what the interpreter holds is all that keeps a tensor
        held = {node.name for node in shown.gi_frame.f_locals["interpreter"].env}
        alive.append({i for i, one in enumerate(names) if one in held})
    assert len(names) == 1 + 12 + 1 + 4
    # 0 is x, 1 is ``first``, 13 the product: the inputs of a node and its result, and ``first`` until 13 has run
    assert all(now <= {1, i - 1, i} for i, now in enumerate(alive)), alive
    assert all(1 in now for now in alive[1:14]) and not any(1 in now for now in alive[14:]), alive
    assert all(i in now for i, now in enumerate(alive))


def test_the_tap_is_refused_for_onnx_sources(
    portcall: Any, tiny_onnx: Path, tiny_data: Path, tmp_path: Path
) -> None:
    done = portcall(
        "calibrate", tiny_onnx, "--data", tiny_data, "--for", "torch", "-o", tmp_path / "t.pctable"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"--for torch needs a torch model, and {tiny_onnx} is onnx" in done.stderr
    assert "package.module:factory" in done.stderr
    assert not (tmp_path / "t.pctable").exists()


def test_a_refusal_comes_before_the_work(tiny_onnx: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Nothing is calibrated first: that may take an hour."""
    work: list[str] = []

    class Listening(Reporter):
        def stage(self, label: str) -> Any:
            work.append(label)
            return super().stage(label)

    with pytest.raises(BadInput, match="--for torch needs a torch model"):
        portcall.api.calibrate(
            tiny_onnx, tiny_data, tmp_path / "t.pctable", kinds=["torch"], reporter=Listening(False)
        )
    assert work and not [label for label in work if label.startswith("calibrate")], work
