"""``portcall profile``: its figures, its table and its plots, on real runtimes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portcall.api
from portcall.bench.profile import _warnings, profile_table, summary
from portcall.core import BadInput, UnsupportedError, Workload
from tests.exporters.cumulative import write_data, write_onnx, write_tflite

QUICK = Workload(min_time_s=0.1, warmup_s=0.02, shapes={"picture": (1, 3, 24, 24)})


def _found(*times_ns: float | None, untimed: str | None = None) -> dict[str, Any]:
    operators: list[dict[str, Any]] = [
        {"name": f"op{i}", "operator": "Op", "on_unit": True, "time_ns": t, "layers": []}
        for i, t in enumerate(times_ns)
    ]
    return {
        "unit": "CPU", "method": "m", "inferences": 10, "p50_ns": 120.0, "mean_ns": 100.0, "operators": operators,
        "untimed": untimed, "counted": None,
    }  # fmt: skip


def test_coverage_overhead_and_shares() -> None:
    found = summary(_found(10.0, 50.0, 20.0), plain_ns=100.0)
    assert (found["sum_ns"], found["coverage"], found["coverage_of_p50"]) == (80.0, 0.8, 0.8)
    assert found["overhead"] == 1.2
    assert [o["name"] for o in found["operators"]] == ["op1", "op2", "op0"]
    assert [o["share"] for o in found["operators"]] == [0.625, 0.25, 0.125]
    assert [o["cumulative"] for o in found["operators"]] == [0.625, 0.875, 1.0]


@pytest.mark.parametrize("found", [_found(0.0, 0.0), _found(None, untimed="no clock"), _found()])
def test_shares_of_nothing_are_none(found: dict[str, Any]) -> None:
    answer = summary(found, plain_ns=100.0)
    assert (answer["sum_ns"], answer["coverage"], answer["coverage_of_p50"]) == (None, None, None)
    assert all(o["share"] is None and o["cumulative"] is None for o in answer["operators"])


@pytest.mark.parametrize(
    ("coverage", "of_p50", "overhead", "said"),
    [
        (0.95, 0.9, 1.0, []),
        (0.5, 0.6, 1.05, ["the operators explain 60% of an inference"]),
        (0.6, 0.98, 1.0, []),  # what the profiler adds lies outside of the operators
        (0.4, 4.0, 8.0, ["the operators explain 40%", "8.00 times as long"]),
        (3.0, 3.1, 1.0, ["add up to 300%"]),
        (None, None, 1.0, []),
    ],
)
def test_what_a_profile_is_worth_is_warned_of(
    coverage: float | None, of_p50: float | None, overhead: float, said: list[str]
) -> None:
    found = _warnings({"coverage": coverage, "coverage_of_p50": of_p50, "overhead": overhead})
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


# ------------------------------------------------------------------------------------------------ real runtimes


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("to profile")
    model, data = write_onnx(folder / "model.onnx"), write_data(folder / "data.npz")
    portcall.api.export(model, ["onnxruntime:int8", "openvino:int8"], folder / "out", data=data)
    write_tflite(folder / "model.tflite")
    return folder


@pytest.fixture(scope="module")
def profiled(exported: Path) -> dict[str, dict[str, Any]]:
    paths = {
        "onnxruntime": exported / "out" / "onnxruntime-int8",
        "openvino": exported / "out" / "openvino-int8",
        "tflite": exported / "model.tflite",
        "bare": exported / "model.onnx",
    }
    workloads = {"bare": QUICK}
    plain = Workload(min_time_s=0.1, warmup_s=0.02)
    return {k: portcall.api.profile(p, workload=workloads.get(k, plain)) for k, p in paths.items()}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tflite", "bare"])
def test_the_answer_is_whole_and_consistent(profiled: dict[str, dict[str, Any]], name: str) -> None:
    answer = profiled[name]
    assert answer["schema"] == 1 and json.loads(json.dumps(answer)) == answer
    operators = answer["operators"]
    assert operators == sorted(operators, key=lambda o: -o["time_ns"])
    assert sum(o["time_ns"] for o in operators) == pytest.approx(answer["sum_ns"])
    assert sum(o["share"] for o in operators) == pytest.approx(1)
    assert operators[-1]["cumulative"] == pytest.approx(1)
    assert answer["coverage"] == pytest.approx(answer["sum_ns"] / answer["mean_ns"])
    assert answer["coverage_of_p50"] == pytest.approx(answer["sum_ns"] / answer["p50_ns"])
    assert answer["overhead"] == pytest.approx(answer["profiled_p50_ns"] / answer["p50_ns"])
    if name != "openvino":  # its means hold disturbed inferences
        assert 0 < answer["coverage"] <= 1.05, "operators that run one after another fit into their inference"
    assert answer["inferences"] >= 10
    assert answer["placement"]["unit"] == answer["unit"]


LAYERS = {
    "onnxruntime": ("QLinearConv", {"body.first", "first"}),
    "openvino": ("Convolution", {"body.first", "first"}),
    "bare": ("Conv", {"body.first", "first"}),
    "tflite": ("CONV_2D", {"body/first"}),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_kernels_are_mapped_to_the_layers_of_the_source(
    profiled: dict[str, dict[str, Any]], name: str
) -> None:
    operator, layers = LAYERS[name]
    operators = profiled[name]["operators"]
    held = [o for o in operators if layers <= set(o["layers"])]
    assert [o["operator"] for o in held] == [operator]
    assert held[0]["kernel"] and held[0]["unit"]
    sums = [o for o in operators if o["operator"].upper() == "CUMSUM"]
    assert len(sums) == 1 and sums[0]["layers"] in (["sum"], ["body/sum"])


def test_a_fused_kernel_carries_the_names_of_all_that_it_holds(profiled: dict[str, dict[str, Any]]) -> None:
    [fused] = [o for o in profiled["bare"]["operators"] if "first" in o["layers"]]
    assert {"first", "relu"} <= set(fused["layers"])


def test_the_table(profiled: dict[str, dict[str, Any]]) -> None:
    answer = profiled["onnxruntime"]
    lines = profile_table(answer, top=3).splitlines()
    header = lines[2]
    assert header.split() == [
        "time",
        "%",
        "sum",
        "%",
        "us",
        "operator",
        "kernel",
        "unit",
        "source",
        "layers",
        "name",
    ]
    longest = answer["operators"][0]
    assert lines[3].split()[0] == f"{100 * longest['share']:.1f}" and longest["kernel"] in lines[3]
    assert lines[3].index(longest["kernel"]) == header.index("kernel")
    text = "\n".join(lines)
    assert f"{len(answer['operators']) - 3} more operators: --top" in text
    assert "without the profiler" in text and "coverage: the operators' times add up to" in text
    assert "CumSum): float32" in text


def test_long_names_are_cut_in_the_table_alone(profiled: dict[str, dict[str, Any]]) -> None:
    answer = json.loads(json.dumps(profiled["tflite"]))
    answer["operators"][0]["name"] = "model/" * 20 + "conv"
    answer["operators"][0]["layers"] = [f"{'model/' * 20}layer{i}" for i in range(5)]
    text = profile_table(answer)
    assert "/model/conv" in text and "layer1 and 3 more" in text
    assert max(len(line) for line in text.splitlines()[:6]) < 250


def _profile(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "portcall", "profile", *map(str, arguments), "--min-time", "0.05"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_writes_plots_and_json(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'portcall[plot]'")
    output = tmp_path / "a profile"
    done = _profile(exported / "out" / "openvino-int8", "-o", output, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert sorted(p.name for p in output.iterdir()) == ["profile.json", "profile.png", "profile.svg"]
    assert json.loads((output / "profile.json").read_text()) == answer
    assert [Path(f).name for f in answer["plot"]["files"]] == ["profile.svg", "profile.png"]
    assert (output / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (output / "profile.svg").read_text()


def test_without_matplotlib_the_reason_is_given(
    profiled: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from portcall.bench.profile_plot import plot

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = plot(profiled["openvino"], tmp_path)
    assert found["files"] == [] and "pip install 'portcall[plot]'" in found["reason"]
    assert not list(tmp_path.iterdir())


def test_many_operators_share_the_last_bar(profiled: dict[str, dict[str, Any]]) -> None:
    from portcall.bench.profile_plot import BARS, _bars

    operators = profiled["openvino"]["operators"] * 20
    bars = _bars({"operators": operators})
    assert len(bars) == BARS + 1 and bars[-1][0] == f"{len(operators) - BARS} others"
    assert sum(b[1] for b in bars) == pytest.approx(sum(o["time_ns"] for o in operators) / 1e3)


def test_a_batch_is_profiled_whole(exported: Path) -> None:
    [one, two] = [
        portcall.api.profile(
            exported / "out" / "onnxruntime-int8", workload=Workload(batch=b, min_time_s=0.1, warmup_s=0.02)
        )
        for b in (1, 16)
    ]
    assert two["sum_ns"] > 3 * one["sum_ns"]


def test_a_folder_of_several_artifacts_is_refused(exported: Path) -> None:
    with pytest.raises(BadInput, match="holds 2 artifacts"):
        portcall.api.profile(exported / "out")
    done = _profile(exported / "nothing.onnx")
    assert done.returncode == 2 and "no artifact or model file" in done.stderr


def test_a_backend_that_tells_nothing_is_unsupported(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="no profile of null"):
        portcall.api.profile(tmp_path / "out")
    done = _profile(tmp_path / "out", "--json")
    assert done.returncode == 4 and json.loads(done.stdout)["error"]["kind"] == "unsupported"
