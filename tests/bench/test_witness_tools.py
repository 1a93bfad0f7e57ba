"""Each tool's command line, and how its output is read: real output of every tool, see ``golden/*.json``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from portcall.bench.witness import litert, onnxruntime, openvino, tensorrt, tensorrt_rtx, tflite, tools_for
from portcall.bench.witness.tool import Case, Input, Output, Reading, Tool
from portcall.core import CellFailed, UnsupportedError, Workload
from portcall.exporters import backend_names

TOOLS = [tool for backend in backend_names() for tool in tools_for(backend)]
GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Output:
    stored = json.loads((GOLDEN / f"{name}.json").read_text())
    return Output(stored["text"], stored["report"])


def case(**changes: Any) -> Case:
    """A model in a folder with a space, two inputs of which one is dynamic, 4 threads, 1 s of 5 ms each."""
    values: dict[str, Any] = {
        "model": Path("/models/my net/model.bin"),
        "inputs": (
            Input("image", (1, 3, 8, 8), "float32", True, "input_0.npy"),
            Input("token ids", (1, 7), "int64", False, "input_1.npy"),
        ),
        "workload": Workload(threads=4, min_time_s=1.0, warmup_s=0.25),
        "p50_ns": 5e6,
        "version": "10.3.0",
    }
    return Case(**{**values, **changes})


def one_input(**changes: Any) -> Case:
    return case(inputs=(Input("x", (1, 3, 8, 8), "float32", False, "input_0.npy"),), **changes)


def test_every_tool_is_listed_under_its_own_backend() -> None:
    assert [t.name for t in TOOLS] == [
        "onnxruntime_perf_test", "benchmark_app", "trtexec", "tensorrt_rtx", "litert-benchmark", "benchmark_model",
    ]  # fmt: skip
    assert tools_for("null") == ()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.name)
def test_a_command_names_the_file_and_says_what_differs(tool: Tool) -> None:
    planned = tool.plan(one_input())
    assert planned.differences
    files = [*planned.arguments, *map(str, planned.files.values())]
    assert any("/models/my net/model.bin" in text for text in files)
    assert shlex.split(shlex.join(planned.arguments)) == list(planned.arguments)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.name)
@pytest.mark.parametrize("text", ["", "no such option: --frobnicate\n", "{", "Latency:\n   Median: soon"])
def test_an_output_of_unknown_form_is_a_failure_that_quotes_it(tool: Tool, text: str) -> None:
    with pytest.raises(CellFailed) as caught:
        tool.read(Output(text, text))
    assert tool.name in caught.value.message
    assert (text.splitlines() or ["nothing"])[-1].strip() in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("tool", "name", "expected"),
    [
        (tflite, "benchmark_model_median", Reading(141_253e3, 145_528e3, 25, {
            "min_ns": 140_071e3, "max_ns": 195_121e3, "std_ns": 13_583e3, "p5_ns": 140_545e3, "p95_ns": 187_533e3,
        })),
        (tflite, "benchmark_model_mean", Reading(None, 2_950_340e3, 50, {
            "min_ns": 2_727_568e3, "max_ns": 3_189_954e3, "std_ns": 109_798e3,
        })),
        (onnxruntime, "onnxruntime_perf_test", Reading(99_508_600.0, 98_961_997.0, 5, {
            "min_ns": 95_820_400.0, "max_ns": 101_519_000.0, "p90_ns": 101_519_000.0, "p95_ns": 101_519_000.0,
            "p99_ns": 101_519_000.0, "p999_ns": 101_519_000.0,
        })),
        (onnxruntime, "onnxruntime_perf_test_old", Reading(58_710_800.0, 58_805_300.0, 1000, {
            "min_ns": 55_977_700.0, "max_ns": 62_347_200.0, "p90_ns": 59_984_500.0, "p95_ns": 60_567_600.0,
            "p99_ns": 61_951_700.0, "p999_ns": 62_347_200.0,
        })),
        (tensorrt, "trtexec_8", Reading(7_760_990.0, 7_765_490.0, None, {
            "min_ns": 7_747_180.0, "max_ns": 7_896_450.0, "p99_ns": 7_888_920.0,
        })),
        (tensorrt, "trtexec_10", Reading(6_788_090.0, 6_752_040.0, None, {
            "min_ns": 6_123_540.0, "max_ns": 7_723_140.0, "p90_ns": 7_236_600.0, "p95_ns": 7_516_140.0,
            "p99_ns": 7_683_070.0,
        })),
    ],
)  # fmt: skip
def test_what_a_tool_printed_elsewhere(tool: Any, name: str, expected: Reading) -> None:
    found = tool.read(golden(name))
    assert found.n == expected.n
    assert (found.p50_ns is None) == (expected.p50_ns is None)
    assert _figures(found) == pytest.approx(_figures(expected), rel=1e-9)


def _figures(reading: Reading) -> dict[str, float]:
    return {key: value for key, value in reading.to_json().items() if value is not None}


def test_benchmark_app_reads_its_report() -> None:
    output = golden("benchmark_app_ms")
    found = openvino.read(output)
    results = json.loads(output.report or "")["execution_results"]
    assert found.p50_ns == pytest.approx(float(results["latency (ms)"]) * 1e6)
    assert found.mean_ns == pytest.approx(float(results["avg latency"]) * 1e6)
    assert found.n == 50
    assert openvino.read(Output(output.text)).p50_ns == found.p50_ns  # the console says the same


def test_benchmark_app_below_1_ms_is_read_from_the_console() -> None:
    """The report of the same run says 0.02 ms."""
    found = openvino.read(golden("benchmark_app_us"))
    assert (found.p50_ns, found.mean_ns, found.others["max_ns"]) == pytest.approx((16_350, 18_930, 137_110))


def test_benchmark_app_that_failed_is_quoted() -> None:
    with pytest.raises(CellFailed, match="Input inputs is dynamic"):
        openvino.read(golden("benchmark_app_error"))


def test_litert_reads_its_report() -> None:
    output = golden("litert_benchmark")
    found = litert.read(output)
    printed = re.search(r"\(median\): +([\d.]+) ms", output.text)
    assert printed is not None and found.p50_ns is not None
    assert found.p50_ns == pytest.approx(float(printed[1]) * 1e6)
    assert found.n == 50 and found.mean_ns is not None and found.others["p95_ns"] >= found.p50_ns


def test_litert_prints_too_few_digits_for_a_tiny_model() -> None:
    with pytest.raises(UnsupportedError, match=r"0\.01 ms"):
        litert.read(Output("", '{"latency": {"median_ms": 0.0}}'))


def test_benchmark_app_keeps_the_types_of_several_inputs() -> None:
    arguments = openvino.plan(case()).arguments
    assert arguments[arguments.index("-iop") + 1] == "image:f32,token ids:i64"
    assert arguments[arguments.index("-i") + 1] == "input_0.npy,input_1.npy"
    arguments = openvino.plan(one_input()).arguments
    assert arguments[arguments.index("-ip") + 1] == "f32"
    assert arguments[arguments.index("-nthreads") + 1] == "4"
    assert arguments[arguments.index("-niter") + 1] == "200"


def test_benchmark_app_has_no_bfloat16() -> None:
    inputs = (Input("x", (1,), "bfloat16", False, "input_0.npy"),)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        openvino.plan(case(inputs=inputs))


def test_the_warm_up_and_the_loop_last_as_long_as_ours() -> None:
    assert {"--num_threads=4", "--warmup_runs=50", "--num_runs=200"} <= set(litert.plan(case()).arguments)
    assert {"--num_threads=4", "--warmup_runs=50", "--num_runs=200"} <= set(tflite.plan(case()).arguments)
    slow = one_input(p50_ns=60e9)
    assert "--num_runs=5" in litert.plan(slow).arguments and "--warmup_runs=1" in litert.plan(slow).arguments


def test_perf_test_gets_the_model_with_its_external_data(tmp_path: Path) -> None:
    for name in ("net.onnx", "net.onnx.data", "net.data", "other.onnx"):
        (tmp_path / name).touch()
    planned = onnxruntime.plan(one_input(model=tmp_path / "net.onnx"))
    assert set(planned.files) == {"model.onnx", "net.onnx.data", "net.data"}
    assert planned.arguments[-1] == "model.onnx"
    assert any("spin" in text for text in planned.differences)


@pytest.mark.parametrize(
    ("version", "options", "given", "absent"),
    [
        ("10.3.0", {}, ["--noDataTransfers"], ["--useCudaGraph", "--noCudaGraph", "--noSpinWait"]),
        ("8.6.1", {"transfers": "included", "cuda_graph": True}, ["--useCudaGraph"], ["--noDataTransfers"]),
        ("11.1.0", {}, ["--noCudaGraph", "--noSpinWait"], ["--includeDataTransfers", "--noDataTransfers"]),
        (
            "11.0.0",
            {"transfers": "included", "cuda_graph": True},
            ["--includeDataTransfers"],
            ["--noCudaGraph"],
        ),
    ],
)
def test_trtexec_states_what_its_version_would_choose(
    version: str, options: dict[str, Any], given: list[str], absent: list[str]
) -> None:
    arguments = tensorrt.plan(one_input(version=version, options=options)).arguments
    assert set(given) <= set(arguments)
    assert not set(absent) & set(arguments)


def test_trtexec_gives_a_shape_to_dynamic_inputs_alone() -> None:
    arguments = tensorrt.plan(case()).arguments
    assert "--shapes='image':1x3x8x8" in arguments
    assert "--loadInputs='image':input_0.npy,'token ids':input_1.npy" in arguments


def test_trtexec_refuses_what_it_cannot_know() -> None:
    with pytest.raises(UnsupportedError, match="version"):
        tensorrt.plan(one_input(version=None))
    for module in (tensorrt, tensorrt_rtx):
        with pytest.raises(UnsupportedError, match="no engine"):
            module.plan(one_input(model=Path("model.onnx")))


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # trtexec", "8.6.2"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300]", "10.3.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b106]", "11.1.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v11.1.0.106] [b48]", "11.1.0.106"),
        ("trtexec: command line tool", None),
    ],
)
def test_the_version_in_trtexec_s_banner(banner: str, version: str | None) -> None:
    assert tensorrt.read_version(banner) == version


def test_tensorrt_rtx_states_its_defaults() -> None:
    assert "--rtxCudaGraphStrategy=disable" in tensorrt_rtx.plan(one_input()).arguments
    options = {"cuda_graph": True, "transfers": "included"}
    arguments = tensorrt_rtx.plan(one_input(options=options)).arguments
    assert {"--rtxCudaGraphStrategy=wholeGraph", "--includeDataTransfers"} <= set(arguments)
