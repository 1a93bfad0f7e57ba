"""Other people's programs on the device: found, run, fed. The programs here are small scripts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from portcall.targets.agent import tools
from portcall.targets.agent.errors import UnavailableError


def progress(done: int, total: int | None) -> None:
    pass


def script(path: Path, body: str) -> Path:
    """Write an executable that runs *body* in this interpreter."""
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' - \"$@\" <<'END'\nimport sys\n{body}\nEND\n")
    path.chmod(0o755)
    return path


def asked(**changes: Any) -> dict[str, Any]:
    values = {
        "name": "mytool",
        "module": None,
        "distribution": None,
        "variable": "MYTOOL",
        "ask": None,
        "fix": "get it",
    }
    return {**values, **changes}


def test_a_program_is_found_by_its_variable_or_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    program = script(folder / "mytool", "print('version', sys.argv[1])")
    with pytest.raises(UnavailableError, match="not in PATH") as caught:
        tools.find_tool(asked(), progress)
    assert caught.value.fix == "get it"
    monkeypatch.setenv("MYTOOL", str(program))
    found = tools.find_tool(asked(ask=("--help",)), progress)
    assert found == {
        "command": [str(program)], "version": None, "output": "version --help\n", "chosen": True,
    }  # fmt: skip
    monkeypatch.delenv("MYTOOL")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    found = tools.find_tool(asked(), progress)
    assert found["command"] == [str(program)] and not found["chosen"]


def test_a_variable_that_names_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no program")
    monkeypatch.setenv("MYTOOL", str(tmp_path / "text"))
    with pytest.raises(UnavailableError, match=r"MYTOOL=.*text is no program"):
        tools.find_tool(asked(), progress)


def test_a_program_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mytool"
    program.write_bytes(b"\x7fELF of something else")
    program.chmod(0o755)
    monkeypatch.setenv("MYTOOL", str(program))
    with pytest.raises(UnavailableError, match="does not start"):
        tools.find_tool(asked(ask=("--help",)), progress)
    job = {"command": [str(program)], "directory": str(tmp_path), "report": None}
    with pytest.raises(UnavailableError, match="does not start"):
        tools.run_tool(job, progress)


def test_a_module_that_is_not_installed() -> None:
    with pytest.raises(UnavailableError, match=r"no module nowhere\.tool"):
        tools.find_tool(asked(module="nowhere.tool", distribution="nowhere"), progress)


def test_a_run_leaves_its_status_output_and_report(tmp_path: Path) -> None:
    program = script(tmp_path / "tool", "print('out'); open('report.txt', 'w').write('told'); sys.exit(3)")
    job = {"command": [str(program)], "directory": str(tmp_path), "report": "report.txt"}
    assert tools.run_tool(job, progress) == {"status": 3, "output": "out\n", "report": "told"}
    silent = {**job, "command": [str(script(tmp_path / "silent", "pass"))]}
    assert tools.run_tool(silent, progress)["report"] is None, "the report of the run before was taken"


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "float64", "int64", "int8", "uint8", "bool", "int32"]
)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4), (1, 300)])
def test_onnx_reads_our_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    tensor = onnx.TensorProto()
    tensor.ParseFromString(tools.tensor_proto("näme/0", array))
    assert tensor.name == "näme/0"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), array)
    assert numpy_helper.to_array(tensor).dtype == array.dtype
