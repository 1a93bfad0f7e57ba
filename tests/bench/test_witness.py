"""``bench --witness`` end to end: the tools that are installed, stand-in programs, and every way a tool can fail."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import portcall.api
from portcall.bench.witness import litert, tflite
from portcall.bench.witness.pairs import verdict, write_uniform
from portcall.core import BadInput, UnsupportedError, Workload
from tests.conftest import ROOT, Portcall
from tests.processes import left_running, running

QUICK = Workload(processes=1, min_time_s=0.02, warmup_s=0.01)

PERF_TEST = """
import time
import numpy, onnx, onnxruntime
from onnx import numpy_helper

arguments = sys.argv[1:]
assert arguments[-1] == "model.onnx" and arguments[arguments.index("-x") + 1] == "1"
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
feeds = {}
for value in session.get_inputs():
    tensor = onnx.load_tensor(f"test_data_set_0/input_{len(feeds)}.pb")
    assert tensor.name == value.name
    feeds[tensor.name] = numpy_helper.to_array(tensor)
times = []
for _ in range(int(arguments[arguments.index("-r") + 1])):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print("Session creation time cost: 0.1 s")
print(f"Total inference requests: {len(times)}")
print(f"Average inference time cost total: {numpy.mean(times) * 1e3:f} ms")
print(f"P50 Latency: {numpy.median(times):g} s")
"""
"""Stands in for onnxruntime_perf_test, which is in no package registry: the same files, options and lines."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two convolutions: long enough for tools that print 0.01 ms."""
    folder = tmp_path_factory.mktemp("a folder")
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(np.float32), name)
        for name, shape in (("w1", (32, 3, 3, 3)), ("w2", (32, 32, 3, 3)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "w2"], ["d"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["d"], ["y"], "pool"),
    ]
    _save(folder / "two.onnx", nodes, [("x", TensorProto.FLOAT, ["n", 3, 64, 64])], ["n", 32, 1, 1], weights)
    np.savez(folder / "data.npz", x=rng.standard_normal((12, 3, 64, 64)).astype(np.float32))
    answer = portcall.api.export(
        folder / "two.onnx",
        ["onnxruntime:fp32", "openvino:fp32", "tflite:fp32"],
        folder / "out",
        data=folder / "data.npz",
    )
    assert [r["outcome"] for r in answer["results"]] == ["artifact"] * 3, answer
    return folder / "out"


def _save(path: Path, nodes: list[Any], inputs: list[Any], output: list[Any], weights: list[Any]) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def program(path: Path, body: str) -> Path:
    """Write an executable that runs *body*; *path* stands in its command line."""
    script = path.with_suffix(".py")
    script.write_text(f"import sys\n{body}\n")
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$@\"\n")
    path.chmod(0o755)
    return path


def witnessed(path: Path, pairs: int = 2, **options: Any) -> dict[str, Any]:
    """Return the witness of a bench of *path*, whose own measurement must have succeeded."""
    [result] = portcall.api.benchmark(path, workload=QUICK, witness_pairs=pairs, **options)["results"]
    assert result["outcome"] == "measurement", result["reason"]
    found: dict[str, Any] = result["witness"]
    return found


@pytest.mark.parametrize(
    ("artifact", "tool"), [("openvino-fp32", "benchmark_app"), ("tflite-fp32", "litert-benchmark")]
)
def test_the_tool_of_the_runtime_s_own_package(artifacts: Path, artifact: str, tool: str) -> None:
    found = witnessed(artifacts / artifact, pairs=3)
    assert (found["outcome"], found["tool"], found["pairs"]) == ("compared", tool, 3), found["reason"]
    assert found["version"] and found["command"].startswith(tool)
    assert found["statistic"] == "p50" and found["verdict"] == "not judged"
    ratios = [
        a["p50_ns"] / b["p50_ns"] for a, b in zip(found["ours"]["runs"], found["theirs"]["runs"], strict=True)
    ]
    assert found["ratios"] == pytest.approx(ratios)
    assert found["p50_ratio"] == pytest.approx(math.exp(np.mean(np.log(ratios))))
    assert found["ci"][0] <= found["p50_ratio"] <= found["ci"][1]
    assert found["differences"]
    counts = [run["n"] for run in found["theirs"]["runs"]]
    assert min(counts) >= 5


def test_perf_test_gets_our_model_and_our_inputs(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTCALL_ONNXRUNTIME_PERF_TEST", str(program(tmp_path / "perf test", PERF_TEST)))
    found = witnessed(artifacts / "onnxruntime-fp32")
    assert (found["outcome"], found["pairs"]) == ("compared", 2), found["reason"]
    assert found["version"] is None and any("version" in text for text in found["differences"])


def test_a_tool_without_a_median_is_compared_by_the_mean(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        'print("count=1 curr=9\\n\\ncount=9 first=9 curr=9 min=8 max=9 avg=8.5 std=1\\nInference (avg): 8.5")'
    )
    monkeypatch.setenv("PORTCALL_BENCHMARK_MODEL", str(program(tmp_path / "benchmark_model", body)))
    found = witnessed(artifacts / "tflite-fp32")
    assert (found["tool"], found["statistic"], found["p50_ratio"]) == ("benchmark_model", "mean", None)
    assert found["mean_ratio"] == pytest.approx(
        math.exp(np.mean([math.log(r["mean_ns"] / 8500) for r in found["ours"]["runs"]]))
    )
    assert any("means are compared" in text for text in found["differences"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "print('loading'); print('Error: bad model'); sys.exit(7)",
            "ended with status 7; it said: Error: bad model",
        ),
        ("print('all fine')", "printed no latency that portcall can read; it said: all fine"),
        ("pass", "it said: nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with status -11"),
    ],
)
def test_a_tool_that_fails_never_fails_the_measurement(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    monkeypatch.setenv("PORTCALL_ONNXRUNTIME_PERF_TEST", str(program(tmp_path / "tool", body)))
    found = witnessed(artifacts / "onnxruntime-fp32")
    assert found["outcome"] == "failed"
    assert said in found["reason"] and found["fix"]
    assert found["p50_ratio"] is None and found["theirs"] is None and found["command"]


def test_a_tool_that_hangs_is_ended(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = program(tmp_path / "hanging-tool", "import time; time.sleep(600)")
    monkeypatch.setenv("PORTCALL_ONNXRUNTIME_PERF_TEST", str(tool))
    found = witnessed(artifacts / "onnxruntime-fp32", timeout_s=8.0)
    assert found["outcome"] == "failed" and "no answer within 8 s" in found["reason"]
    assert not left_running("hanging-tool")


def test_a_missing_tool_is_unavailable(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = witnessed(artifacts / "onnxruntime-fp32")
    assert (found["outcome"], found["tool"]) == ("unavailable", "onnxruntime_perf_test")
    assert "PORTCALL_ONNXRUNTIME_PERF_TEST" in found["fix"]
    monkeypatch.setenv("PORTCALL_BENCHMARK_MODEL", "/nowhere/benchmark_model")
    found = witnessed(artifacts / "tflite-fp32")  # litert-benchmark is there, but another one was asked for
    assert found["outcome"] == "unavailable" and "/nowhere/benchmark_model" in found["reason"]


def test_a_backend_without_a_tool(identity_onnx: Path, tmp_path: Path) -> None:
    portcall.api.export(identity_onnx, "null:fp32", tmp_path / "out")
    found = witnessed(tmp_path / "out")
    assert found["outcome"] == "unsupported" and "null" in found["reason"]


def test_integers_are_not_filled_with_random_values(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "in.npz", features=np.zeros((4, 1, 3), np.float32), token_ids=np.zeros((4, 1, 7), np.int64)
    )
    with pytest.raises(UnsupportedError, match="token_ids"):
        write_uniform(tmp_path / "in.npz", tmp_path / "out.npz", litert.TOOL)


def test_floats_are_filled_as_the_tool_does(tmp_path: Path) -> None:
    reference = {"reference/y": np.ones((4, 1), np.float32)}
    np.savez(tmp_path / "in.npz", x=np.full((4, 1, 3, 50, 50), 7, np.float16), **reference)  # type: ignore[arg-type]
    write_uniform(tmp_path / "in.npz", tmp_path / "out.npz", tflite.TOOL)
    with np.load(tmp_path / "out.npz") as stored:
        assert stored.files == ["x"]
        x = stored["x"]
    assert x.shape == (1, 1, 3, 50, 50) and x.dtype == np.float16
    assert -0.5 <= x.min() < -0.45 and 0.45 < x.max() <= 0.5


def test_two_inputs_of_which_one_is_integer(tmp_path: Path) -> None:
    """benchmark_app takes them from files, in their own types."""
    rng = np.random.default_rng(0)
    table = numpy_helper.from_array(rng.standard_normal((50, 4)).astype(np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "token_ids"], ["rows"], "look up"),
        helper.make_node("MatMul", ["rows", "features"], ["y"], "multiply"),
    ]
    inputs = [("token_ids", TensorProto.INT64, ["n", 7]), ("features", TensorProto.FLOAT, ["n", 4, 2])]
    _save(tmp_path / "two inputs.onnx", nodes, inputs, ["n", 7, 2], [table])
    data = tmp_path / "data.npz"
    np.savez(
        data,
        token_ids=rng.integers(0, 50, (12, 7)),
        features=rng.standard_normal((12, 4, 2)).astype(np.float32),
    )
    answer = portcall.api.export(tmp_path / "two inputs.onnx", "openvino:fp32", tmp_path / "out", data=data)
    found = witnessed(Path(answer["results"][0]["path"]))
    assert found["outcome"] == "compared", found["reason"]
    assert "i64" in found["command"] and "f32" in found["command"]


def test_no_pairs_is_bad_input(artifacts: Path) -> None:
    with pytest.raises(BadInput, match="witness_pairs is 0"):
        portcall.api.benchmark(artifacts, witness_pairs=0)


def test_without_asking_there_is_none(artifacts: Path) -> None:
    [result] = portcall.api.benchmark(artifacts / "openvino-fp32", workload=QUICK)["results"]
    assert result["witness"] is None


def test_the_command_prints_both(artifacts: Path, portcall: Portcall) -> None:
    quick = ["--processes", "1", "--min-time", "0.02", "--witness", "--witness-pairs", "2"]
    done = portcall("bench", artifacts / "openvino-fp32", artifacts / "onnxruntime-fp32", *quick)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("\n\n")[-2]
    assert "theirs ms" in table and "benchmark_app" in table and "unavailable" in table
    assert "onnxruntime:fp32: onnxruntime_perf_test is not in PATH; fix: " in done.stdout
    assert "differs: " in done.stdout


def test_ctrl_c_ends_the_tool_too(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"sleeping-tool-{tmp_path.name}"
    tool = program(tmp_path / mark, "import time; time.sleep(600)")
    monkeypatch.setenv("PORTCALL_ONNXRUNTIME_PERF_TEST", str(tool))
    command = [
        sys.executable,
        "-m",
        "portcall",
        "bench",
        str(artifacts / "onnxruntime-fp32"),
        "--processes",
        "1",
    ]
    process = subprocess.Popen(
        [*command, "--min-time", "0.02", "--witness", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not running(mark) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    started = running(mark)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert started, "the tool never started"
    assert process.returncode == 130
    assert json.loads(output)["error"]["kind"] == "interrupted"
    assert not left_running(mark)


@pytest.mark.parametrize(
    ("their_ns", "interval", "expected"),
    [
        (5e6, (0.98, 1.02), "agrees"),
        (5e6, (0.90, 1.10), "undecided"),
        (5e6, (1.05, 1.15), "differs"),
        (5e6, (0.85, 0.96), "differs"),
        (5e6, None, "undecided"),
        (3.9e6, (0.99, 1.01), "not judged"),
        (4e6, (0.97, 1.03), "agrees"),
    ],
)
def test_the_verdict_is_the_interval_s(
    their_ns: float, interval: tuple[float, float] | None, expected: str
) -> None:
    assert verdict(their_ns, interval) == expected
