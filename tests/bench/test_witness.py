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
import pytest

import portcall.api
from portcall.bench.witness.pairs import verdict
from portcall.core import BadInput, Workload
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
def artifacts(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Path:
    folder = tmp_path_factory.mktemp("a folder") / "out"
    data = folder.parent / "data.npz"
    np.savez(data, x=np.random.default_rng(1).standard_normal((24, 3, 16, 16)).astype(np.float32))
    answer = portcall.api.export(
        tiny_onnx, ["onnxruntime:fp32", "openvino:fp32", "tflite:fp32"], folder, data=data
    )
    assert [r["outcome"] for r in answer["results"]] == ["artifact"] * 3, answer
    return folder


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' - \"$@\" <<'END'\nimport sys\n{body}\nEND\n")
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
    body = 'print("count=1 curr=9\\n\\ncount=9 first=9 curr=9 min=8 max=9 avg=8.5 std=1")\nprint("Inference (avg): 8.5")'
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
    found = witnessed(artifacts / "onnxruntime-fp32", timeout_s=15.0)
    assert found["outcome"] == "failed" and "no answer within 15 s" in found["reason"]
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
    answer = portcall.api.export(
        "tests.models:two_inputs", "tflite:fp32", tmp_path / "out", data="tests.models:two_inputs_data"
    )
    found = witnessed(Path(answer["results"][0]["path"]))
    assert found["outcome"] == "unsupported" and "token_ids" in found["reason"]


def test_two_inputs_of_which_one_is_integer(tmp_path: Path) -> None:
    """benchmark_app takes them from files, in their own types."""
    answer = portcall.api.export(
        "tests.models:two_inputs", "openvino:fp32", tmp_path / "out", data="tests.models:two_inputs_data"
    )
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
    assert running(mark), "the tool never started"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
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
