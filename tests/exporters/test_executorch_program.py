"""The .pte file itself: what is read from it, what a damaged one does, and the session that runs it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portcall.exporters import _qdq, executorch
from portcall.targets.agent.contract import Artifact, Available, Range, Recipe, Workload
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from tests.exporters.graphs import conv_add_mul, graph_of
from tests.exporters.ranges import onnx_ranges

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao and ExecuTorch warn while they are imported
    _FOUND = executorch.probe("export")
if not isinstance(_FOUND, Available):
    pytest.skip(f"executorch: {_FOUND.reason}; fix: {_FOUND.fix}", allow_module_level=True)

from portcall.exporters import _executorch_program  # after the skip

RNG = np.random.default_rng(2)
SAMPLE = {
    "x": RNG.standard_normal((1, 3, 8, 8)).astype(np.float32),
    "x2": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32),
}
INPUTS = {"input_0": SAMPLE["x"], "input_1": SAMPLE["x2"]}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The same graph as fp32 and int8, and int8 a second time."""
    folder = tmp_path_factory.mktemp("a folder")
    path = conv_add_mul(folder / "m.onnx")
    ranges = onnx_ranges(path, [SAMPLE])
    made = {}
    for name, precision in (("fp32", "fp32"), ("int8", "int8"), ("again", "int8")):
        out = folder / name
        out.mkdir()
        found = executorch.export(graph_of(path), Recipe(precision), ranges, out)
        made[name] = Artifact(out, found.entry, "executorch", precision, found.inputs, found.outputs)
    return made


def test_the_same_export_gives_the_same_bytes(artifacts: dict[str, Artifact]) -> None:
    assert artifacts["int8"].path.read_bytes() == artifacts["again"].path.read_bytes()


def test_two_programs_in_one_process(artifacts: dict[str, Artifact]) -> None:
    with (
        executorch.load(artifacts["fp32"], Workload(threads=2)) as first,
        executorch.load(artifacts["int8"], Workload()) as second,
    ):
        assert second.environment["threads"] == first.environment["threads"]  # one pool, said as it is
        assert second.environment["delegate"] == "XNNPACK"
        assert [(t.name, t.shape, t.dtype) for t in first.inputs] == [
            ("input_0", (1, 3, 8, 8), "float32"),
            ("input_1", (1, 4, 8, 8), "float32"),
        ]
        for session in (first, second):
            session.set_inputs(INPUTS)
            session.infer()
        wanted, found = (s.get_outputs()["output_0"] for s in (first, second))
        kept = wanted.copy()
        first.set_inputs({k: 2 * v for k, v in INPUTS.items()})
        first.infer()
        np.testing.assert_array_equal(wanted, kept)  # a copy, not the runtime's memory
        assert not np.array_equal(first.get_outputs()["output_0"], kept)
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()


def test_inputs_with_other_strides(artifacts: dict[str, Artifact]) -> None:
    turned = {k: np.asfortranarray(v) for k, v in INPUTS.items()}
    with executorch.load(artifacts["fp32"], Workload()) as session:
        results = []
        for arrays in (INPUTS, turned):
            session.set_inputs(arrays)
            session.infer()
            results.append(session.get_outputs()["output_0"])
        np.testing.assert_array_equal(*results)
        with pytest.raises(UnsupportedError, match=r"input_0 has shape \(2, 3, 8, 8\), this program only"):
            session.set_inputs({**INPUTS, "input_0": np.zeros((2, 3, 8, 8), np.float32)})


def test_census_reads_the_file(artifacts: dict[str, Artifact]) -> None:
    whole, float_ = (executorch.census(artifacts[name], {}) for name in ("int8", "fp32"))
    assert whole.macs == float_.macs == whole.integer_macs == 4 * 8 * 8 * 27
    assert whole.quantize_nodes > 0 == float_.quantize_nodes and float_.integer_macs == 0
    assert float_.float_nodes == ("Conv2d 2 [4, 3, 3, 3]",)


def test_one_changed_weight_changes_the_output(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = artifacts["int8"]
    program = _executorch_program.read(artifact.path)
    [operator] = [o for part in program.delegates for o in part if o.kind == "Conv2d"]
    key = operator.inputs[1].data
    assert key is not None
    content = bytearray(artifact.path.read_bytes())
    place = content.find(program.data[key][: 4 * 27])
    content[place] ^= 0x40
    (tmp_path / "model.pte").write_bytes(bytes(content))
    outputs = []
    for folder in (artifact.directory, tmp_path):
        with executorch.load(replace(artifact, directory=folder), Workload()) as session:
            session.set_inputs(INPUTS)
            session.infer()
            outputs.append(session.get_outputs()["output_0"])
    assert not np.array_equal(*outputs)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_named(artifacts: dict[str, Artifact], tmp_path: Path, damage: str) -> None:
    content = artifacts["int8"].path.read_bytes()
    (tmp_path / "model.pte").write_bytes({"cut": content[:300], "empty": b"", "other": b"PK" * 400}[damage])
    broken = replace(artifacts["int8"], directory=tmp_path)
    with pytest.raises(CellFailed, match=r"model\.pte is no readable ExecuTorch program"):
        executorch.census(broken, {})
    with (
        pytest.raises(CellFailed, match=r"ExecuTorch cannot load model\.pte"),
        executorch.load(broken, Workload()),
    ):
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of its own types
def test_contents_are_the_weights_of_the_source(tmp_path: Path) -> None:
    """Plain, depthwise, grouped and transposed convolutions and a product, with pruned weights."""
    import torch
    from torch import nn

    from portcall.source import open_source
    from portcall.targets.agent.contract import Source

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, (3, 5), padding=(1, 2)),
                nn.Conv2d(8, 16, 3, padding=1, groups=8),
                nn.Conv2d(16, 12, 3, padding=1, groups=4),
                nn.ConvTranspose2d(12, 6, 2, stride=2),
            )
            self.head = nn.Linear(6, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(torch.mean(self.layers(x), (2, 3)))
            return found

    torch.manual_seed(0)
    net = Net().eval()
    for parameter in net.parameters():
        parameter.data[torch.rand_like(parameter) < 0.5] = 0.0
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 9, 9),)), tmp_path / "net.pt2")
    job = {"spec": str(tmp_path / "net.pt2"), "directory": str(tmp_path), "shapes": {}}
    graph = executorch.lower(Source.from_json(open_source(job, None)), tmp_path)
    ranges = {name: Range(-4.0, 4.0) for name in _qdq.tapped_tensors(graph.path)}
    wanted = [np.sign(p.detach().numpy()) for name, p in net.named_parameters() if "weight" in name]
    wanted[3] = wanted[3].transpose(1, 0, 2, 3)
    for precision, bits in (("fp32", 32), ("int8", 8)):
        folder = tmp_path / precision
        folder.mkdir()
        executorch.export(graph, Recipe(precision), ranges, folder)
        found = executorch.contents(Artifact(folder, "model.pte", "executorch", precision), {})
        assert found.notes == ()
        assert (
            found.macs == executorch.census(Artifact(folder, "model.pte", "executorch", precision), {}).macs
        )
        for layer, signs in zip(found.weights, wanted, strict=True):
            is_float = layer.operator == "ConvTranspose2d"  # the mean after it leaves it in float
            assert layer.bits == (32 if is_float else bits)
            assert layer.zeros >= np.count_nonzero(signs == 0)
            assert np.all(layer.signs[signs == 0] == 0)  # no zero is lost
            assert np.all((layer.signs == signs) | (layer.signs == 0))
            assert layer.scales == (0 if layer.bits == 32 else signs.shape[0])
