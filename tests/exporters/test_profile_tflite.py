"""LiteRT's profiler: the library beside the Interpreter computes and places the same; kernels find their operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.core import Artifact, Workload
from portcall.exporters import _litert_c
from portcall.exporters._profile_tflite import KINDS, align, delegated, layers_of
from portcall.targets.agent.errors import CellFailed, UnavailableError
from tests.exporters.cumulative import write_tflite


@pytest.mark.parametrize("signature", [True, False])
def test_the_library_computes_and_places_what_the_interpreter_does(tmp_path: Path, signature: bool) -> None:
    from portcall.exporters._profile_tflite import LiteRtProfiler
    from portcall.exporters.tflite import LiteRtSession

    path = write_tflite(tmp_path / "model with spaces.tflite", signature)
    artifact = Artifact(tmp_path, path.name, "tflite", "as is")
    profiler, session = LiteRtProfiler(artifact, Workload()), LiteRtSession(path, Workload())
    name = "given" if signature else "picture"
    picture = np.random.default_rng(2).standard_normal((1, 24, 24, 3)).astype(np.float32)
    for one in (profiler, session):
        one.set_inputs({name: picture})
        one.infer()
    profiler.collect()
    [[output, made]] = profiler.get_outputs().items()
    assert output == ("made" if signature else "scores")
    assert np.array_equal(made, session.get_outputs()[output])
    placed = profiler.placed([0])
    assert placed.counted == (3, 2)
    assert [(o.operator, o.on_unit) for o in placed.operators] == [
        ("CONV_2D", True), ("CUMSUM", False), ("CONV_2D", True),
    ]  # fmt: skip
    assert not [n for n in placed.notes if "other operators" in n]
    assert all(o.kernel is not None and "Convolution (NHWC, F32)" in o.kernel for o in placed.operators[::2])


def test_events_of_another_inference_are_gone(tmp_path: Path) -> None:
    model = _litert_c.ProfiledModel(write_tflite(tmp_path / "model.tflite"), 1)
    counts = []
    for _ in range(3):
        model.run()
        counts.append(sum(e.kind in KINDS for e in model.take_events()))
    assert counts == [3, 3, 3]
    assert model.take_events() == []


def test_an_input_of_another_size_is_refused(tmp_path: Path) -> None:
    model = _litert_c.ProfiledModel(write_tflite(tmp_path / "model.tflite"), 1)
    with pytest.raises(CellFailed, match="takes 6912 bytes, not 4"):
        model.write(model.inputs[0], b"1234")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.tflite").write_bytes(b"no flatbuffer at all")
    with pytest.raises(CellFailed, match="LiteRtCreateModelFromFile"):
        _litert_c.ProfiledModel(tmp_path / "broken.tflite", 1)


def test_structures_of_another_size_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LiteRT with other structures must not be read as garbage."""
    import ctypes

    class Larger(ctypes.Structure):
        _fields_ = [*_litert_c._Event._fields_, ("new", ctypes.c_uint64)]

    monkeypatch.setattr(_litert_c, "_Event", Larger)
    model = _litert_c.ProfiledModel(write_tflite(tmp_path / "model.tflite"), 1)
    model.run()
    with pytest.raises(UnavailableError, match="profiler events"):
        model.take_events()


def test_without_the_library_the_fix_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError) as error:
        _litert_c.Library()
    assert "pip install" in error.value.fix


def _details(*operators: tuple[str, list[int], list[int]]) -> list[dict[str, Any]]:
    return [
        {"index": i, "op_name": name, "inputs": inputs, "outputs": outputs}
        for i, (name, inputs, outputs) in enumerate(operators)
    ]


def test_what_delegates_replaced() -> None:
    """0 -> A -> 1 -> B -> 2 -> C -> 3, with A and C in two delegates, B outside."""
    details = _details(
        ("A", [0], [1]),
        ("B", [1], [2]),
        ("C", [2, -1], [3]),
        ("DELEGATE", [0], [1]),
        ("DELEGATE", [2], [3]),
    )
    assert delegated(details) == {0, 2}
    assert delegated(details[:3]) == set()


CONV, DEPTHWISE = "Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, QC8) DWConv"


@pytest.mark.parametrize(
    ("tags", "operators", "found"),
    [
        ([CONV, "Add (ND)"], [(0, "PAD"), (1, "CONV_2D"), (2, "ADD")], [1, 2]),
        ([CONV, DEPTHWISE], [(0, "CONV_2D"), (1, "DEPTHWISE_CONV_2D")], [0, 1]),
        (["Fully Connected (NC, F32) GEMM"], [(4, "CONV_2D")], [4]),
        ([CONV], [(0, "CONV_2D"), (1, "CONV_2D")], [None]),  # either may have been dropped
        (["Something new", CONV], [(0, "CONV_2D")], [None, 0]),
        (["Transpose (ND, X8)", CONV], [(0, "CONV_2D")], [None, 0]),
        ([], [(0, "CONV_2D")], []),
    ],
)
def test_kernels_find_their_operators(
    tags: list[str], operators: list[tuple[int, str]], found: list[int | None]
) -> None:
    assert align(tags, operators) == found


@pytest.mark.parametrize(
    ("tensor", "layers"),
    [
        (
            "net.Cnn/torch.nn.modules.container.Sequential_stem/torch.nn.modules.batchnorm.BatchNorm2d_1;;"
            "net.Cnn/torch.nn.modules.container.Sequential_stem/torch.nn.modules.conv.Conv2d_0;2",
            ("stem.0",),
        ),
        ("net.Cnn;", ("net.Cnn",)),
        ("model/conv2d/BiasAdd", ("model/conv2d/BiasAdd",)),
        (
            "model/relu/Relu6;model/conv2d/convolution;model/bias",
            ("model/relu/Relu6", "model/conv2d/convolution", "model/bias"),
        ),
        ("serving_default_x", ("serving_default_x",)),
        ("", ("",)),
    ],
)
def test_names_of_layers(tensor: str, layers: tuple[str, ...]) -> None:
    assert layers_of(tensor) == layers
