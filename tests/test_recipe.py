"""Options of single backends, as they come from the command line and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portcall.core import BadInput, Cell
from portcall.recipe import _value, backend_options, cell_options
from portcall.targets.agent.contract import Option

CELLS = [Cell("onnxruntime", "int8"), Cell("onnxruntime", "fp32"), Cell("null", "fp32")]


def test_by_backend_and_typed() -> None:
    found = backend_options({"onnxruntime.opset": "13", "onnxruntime.min_runtime": "1.16"}, CELLS)
    assert found == {"onnxruntime": {"opset": 13, "min_runtime": "1.16"}}
    shared = {"bias_correction": False}
    assert cell_options(CELLS[0], shared, found) == {**shared, "opset": 13, "min_runtime": "1.16"}
    assert cell_options(CELLS[2], shared, found) == shared


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"opset": "13"}, r"cannot read the option 'opset'.*BACKEND\.NAME=VALUE"),
        (
            {"onnxruntime.ops": "13"},
            r"onnxruntime has no option 'ops'. It has: opset, min_runtime. Did you mean 'opset'",
        ),
        ({"null.opset": "13"}, r"null has no option 'opset'. It has: none of its own"),
        ({"openvino.opset": "13"}, r"is for openvino, to which nothing is exported"),
        ({"onnxrt.opset": "13"}, r"no backend 'onnxrt'"),
        ({"onnxruntime.opset": "new"}, r"onnxruntime\.opset is 'new', no number"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        backend_options(given, CELLS)


def test_kinds(tmp_path: Path) -> None:
    word = Option("io", choices=("float", "int8"))
    assert _value("b.io", word, "int8") == "int8"
    with pytest.raises(BadInput, match=r"b\.io is 'int4'. It takes: float, int8"):
        _value("b.io", word, "int4")
    flag = Option("f", kind="bool")
    assert [_value("b.f", flag, v) for v in ("true", "false", True, False)] == [True, False, True, False]
    with pytest.raises(BadInput, match="true or false"):
        _value("b.f", flag, "yes")
    file = Option("p", kind="path")
    (tmp_path / "f").write_text("")
    assert _value("b.p", file, str(tmp_path / "f")) == str(tmp_path / "f")
    with pytest.raises(BadInput, match="names no file"):
        _value("b.p", file, str(tmp_path / "none"))
    assert _value("b.x", Option("x", kind="float"), "0.25") == 0.25
    with pytest.raises(BadInput, match="no text"):
        _value("b.t", Option("t"), "")
