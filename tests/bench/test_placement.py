"""Placement: what the shares mean, how budgets are judged, and a real network that no fast unit takes whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portcall.api
from portcall.bench.placement import judge, placement_line, placement_of
from portcall.core import BadInput, Workload
from tests.exporters.cumulative import write_data, write_onnx, write_tflite

QUICK = Workload(processes=1, min_time_s=0.05, warmup_s=0.02)


def _operator(name: str, on_unit: bool, time_ns: float | None = 0.0) -> dict[str, Any]:
    reason = None if on_unit else "it is slow"
    return {
        "name": name, "operator": "Op", "kernel": None, "unit": "CPU", "on_unit": on_unit, "reason": reason,
        "layers": [], "time_ns": time_ns,
    }  # fmt: skip


def _profile(*operators: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"unit": "NPU", "method": "m", "operators": operators, "counted": None, "untimed": None, **more}


def test_shares_of_operators_and_of_time() -> None:
    found = placement_of(_profile(_operator("a", True, 30.0), _operator("b", False, 10.0)))
    assert (found["unit"], found["operators"], found["on_unit"]) == ("NPU", 2, 1)
    assert (found["share"], found["time_share"], found["reason"]) == (0.5, 0.75, None)
    assert found["rest"] == [
        {"name": "b", "operator": "Op", "unit": "CPU", "reason": "it is slow", "time_share": 0.25}
    ]


def test_operators_of_the_file_count_where_a_delegate_hides_them() -> None:
    found = placement_of(
        _profile(_operator("delegate", True, 9.0), _operator("b", False, 1.0), counted=[10, 9])
    )
    assert (found["operators"], found["on_unit"], found["share"]) == (10, 9, 0.9)


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (_profile(_operator("a", True), _operator("b", False)), "faster than the microsecond"),
        (_profile(_operator("a", True, None), untimed="the runtime has no clock"), "has no clock"),
        (_profile(), "executes no operator"),
    ],
)
def test_a_share_that_is_unknown_is_none_with_its_reason(profile: dict[str, Any], reason: str) -> None:
    found = placement_of(profile)
    assert found["time_share"] is None
    assert reason in found["reason"]


def test_a_budget_names_the_slowest_operators_first() -> None:
    many = [_operator(f"op{i}", False, float(i)) for i in range(20)]
    found = placement_of(_profile(_operator("a", True, 1000.0), *many))
    assert judge(found, {}) is None
    assert judge(found, {"operators": 1 / 21, "time": 0.5}) is None
    error = judge(found, {"time": 0.9})
    assert error is not None and error.kind == "budget"
    assert error.message.startswith(
        "84% of the time run on NPU, the budget is 90%; not on it: op19 (Op: it is slow)"
    )
    assert error.message.endswith(" and 12 more")
    error = judge(found, {"operators": 0.95})
    assert error is not None and "(1 of 21)" in error.message


def test_a_share_is_never_rounded_up_to_its_budget() -> None:
    found = placement_of(
        _profile(*[_operator(f"a{i}", True, 1.0) for i in range(9999)], _operator("b", False))
    )
    error = judge(found, {"operators": 1.0})
    assert error is not None and error.message.startswith("99.9% of the operators")


def test_a_budget_on_an_unknown_share_cannot_be_kept() -> None:
    error = judge(placement_of(_profile(_operator("a", True, None), untimed="no clock")), {"time": 0.1})
    assert error is not None and (error.kind, "no clock" in error.message) == ("failed", True)


def test_the_line_of_the_table() -> None:
    found = placement_of(_profile(_operator("a", True, 30.0), _operator("b", False, 10.0)))
    line = placement_line("tflite:int8", found)
    assert line == "tflite:int8: 1 of 2 operators and 75.0 % of the time on NPU; not: Op"


# ------------------------------------------------------------------------------------------------ real runtimes


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the network with a cumulative sum, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("cumulative model")
    model, data = write_onnx(folder / "model.onnx"), write_data(folder / "data.npz")
    cells = ["onnxruntime:fp32,int8", "openvino:fp32,int8"]
    results = portcall.api.export(model, cells, folder / "out", data=data)["results"]
    assert [r["outcome"] for r in results] == ["artifact"] * 4, [r["reason"] for r in results]
    return folder / "out"


@pytest.fixture(scope="module")
def placed(exported: Path) -> dict[str, dict[str, Any]]:
    """``placement`` of each artifact, and of the bare files, by name."""
    bare = [exported.parent / "model.onnx", exported / "openvino-fp32" / "model.xml"]
    bare.append(write_tflite(exported.parent / "model.tflite"))
    shapes = {"picture": (1, 3, 24, 24)}
    artifacts = portcall.api.benchmark(exported, workload=QUICK)["results"]
    found = {f"{r['backend']}:{r['precision']}": r for r in artifacts}
    for path in bare:
        workload = (
            QUICK if path.suffix == ".tflite" else Workload(processes=1, min_time_s=0.05, shapes=shapes)
        )
        [result] = portcall.api.benchmark(path, workload=workload)["results"]
        found[path.suffix] = result
    assert {k: r["reason"] for k, r in found.items() if r["outcome"] != "measurement"} == {}
    return {k: r["placement"] for k, r in found.items()}


@pytest.mark.parametrize(
    "name",
    ["onnxruntime:fp32", "onnxruntime:int8", "openvino:fp32", "openvino:int8", ".onnx", ".xml", ".tflite"],
)
def test_every_placement_is_whole_and_consistent(placed: dict[str, dict[str, Any]], name: str) -> None:
    found = placed[name]
    assert found["operators"] >= found["on_unit"] > 0
    assert found["share"] == found["on_unit"] / found["operators"]
    assert found["operators"] - found["on_unit"] == len(found["rest"])
    assert all(r["name"] and r["operator"] and r["reason"] for r in found["rest"])
    assert found["unit"] and found["method"]
    if found["time_share"] is None:
        assert found["reason"]
    else:
        assert found["time_share"] + sum(r["time_share"] for r in found["rest"]) == pytest.approx(1)


def test_onnxruntime_int8_leaves_the_sum_in_float(placed: dict[str, dict[str, Any]]) -> None:
    found = placed["onnxruntime:int8"]
    assert found["unit"] == "CPUExecutionProvider, integer kernels"
    reasons = {r["operator"]: r["reason"] for r in found["rest"]}
    assert "float32" in reasons["CumSum"]
    assert set(reasons) <= {"CumSum", "QuantizeLinear", "DequantizeLinear"}, (
        "convolutions are integer kernels"
    )


@pytest.mark.parametrize("name", ["onnxruntime:fp32", ".onnx"])
def test_onnxruntime_in_float_is_whole_on_its_provider(placed: dict[str, dict[str, Any]], name: str) -> None:
    found = placed[name]
    assert (found["unit"], found["share"], found["rest"]) == ("CPUExecutionProvider", 1.0, [])


@pytest.mark.parametrize("name", ["openvino:fp32", "openvino:int8", ".xml"])
def test_openvino_runs_the_sum_in_a_reference_kernel(placed: dict[str, dict[str, Any]], name: str) -> None:
    [reason] = [r["reason"] for r in placed[name]["rest"] if r["operator"] == "CumSum"]
    assert reason.startswith("reference kernel ref_")
    if name != "openvino:int8":
        assert len(placed[name]["rest"]) == 1


def test_xnnpack_does_not_take_the_sum(placed: dict[str, dict[str, Any]]) -> None:
    found = placed[".tflite"]
    assert (found["unit"], found["operators"], found["on_unit"]) == ("XNNPACK", 3, 2)
    [rest] = found["rest"]
    assert (rest["name"], rest["operator"]) == ("body/sum", "CUMSUM")


def _bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "portcall", "bench", *map(str, arguments), "--processes", "1"]
    return subprocess.run(
        [*command, "--min-time", "0.02"], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_broken_budget_fails_what_was_measured(exported: Path) -> None:
    done = _bench(
        exported / "onnxruntime-int8", "--min-placement", "95%", "--min-placement", "time=0%", "--json"
    )
    assert done.returncode == 1, done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert (result["outcome"], result["error_kind"]) == ("failed", "budget")
    assert "CumSum" in result["reason"] and "the budget is 95%" in result["reason"] and result["fix"]
    assert result["latency"]["p50_ns"] > 0 and result["memory"] and result["placement"]["rest"]


def test_a_budget_that_holds_changes_nothing(exported: Path) -> None:
    done = _bench(exported / "onnxruntime-fp32", "--min-placement", "100%")
    assert done.returncode == 0, done.stderr
    assert " operators and 100.0 % of the time on CPUExecutionProvider" in done.stdout


def test_without_the_profiled_process(exported: Path) -> None:
    [result] = portcall.api.benchmark(exported / "onnxruntime-fp32", workload=QUICK, placement=False)[
        "results"
    ]
    assert result["outcome"] == "measurement"
    assert result["placement"]["share"] is None and "--no-placement" in result["placement"]["reason"]


def test_a_backend_that_tells_nothing(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "out")
    [result] = portcall.api.benchmark(tmp_path / "out", workload=QUICK)["results"]
    assert result["outcome"] == "measurement"
    assert result["placement"]["share"] is None and "no profile of null" in result["placement"]["reason"]
    done = _bench(tmp_path / "out", "--min-placement", "50%", "--json")
    assert done.returncode == 4
    assert "unknown" in json.loads(done.stdout)["results"][0]["reason"]


@pytest.mark.parametrize("text", ["95", "cores=95%", "time=101%", "time=", "%", "-5%"])
def test_a_budget_that_cannot_be_read(text: str) -> None:
    done = _bench("model.onnx", f"--min-placement={text}")
    assert done.returncode == 2 and "is not 95%, operators=95% or time=95%" in done.stderr


def test_a_budget_without_its_process(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="needs the placement"):
        portcall.api.benchmark(tmp_path, placement=False, min_placement={"operators": 0.5})
    with pytest.raises(BadInput, match="0 to 1"):
        portcall.api.benchmark(tmp_path, min_placement={"operators": 95})
