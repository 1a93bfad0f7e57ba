"""What each contender of ``make bench-calibration`` runs.

The contenders' own environments import this module too, so its top imports the standard library and numpy alone, and
portcall is imported by portcall's contenders only. Whoever is compared gets its defaults, its own streaming interface
where it has one, and samples from the same reader (portcall streams the same file with the product's own).
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration_samples import Images, Reader

STRIDE = 10
"""Samples per step of CalibStridedMinMax: the largest divisor of their number up to this."""


class Watch:
    """Seconds of the parts of a step ("import", "plan", "pass", "ranges"), and peak memory up to the end of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peak_rss_bytes[name] = _peak_rss_bytes()


def _peak_rss_bytes() -> int:
    """Return VmHWM, which starts with this program; where there is no /proc, ru_maxrss."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class Job:
    """What a step gets. previous: what the contender's step before it answered."""

    model: str
    graph: dict[str, Any]
    images: str
    threads: int
    previous: Any


Step = Callable[[Job, Watch], Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of the table.

    steps: each runs in a fresh process; the last one answers how many tensors got a range (None: it derives none).
    graph: "onnx" or "tflite". included: what the seconds hold. venv: the environment it needs, None for this one.
    heavy: why it runs once, on 100 images at most, unless asked; empty for one that runs as often as all.
    """

    name: str
    steps: tuple[Step, ...]
    graph: str
    included: str
    distributions: tuple[str, ...]
    venv: str | None = None
    heavy: str = ""


def limit(job: Job, watch: Watch) -> None:
    with watch.part("import"):
        import onnxruntime
    with watch.part("pass"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        session = onnxruntime.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
        for feed in Images(job.images):
            session.run(None, feed)


def limit_tflite(job: Job, watch: Watch) -> None:
    with watch.part("import"):
        from ai_edge_litert.interpreter import Interpreter
    with watch.part("pass"):
        interpreter = Interpreter(job.model, num_threads=job.threads)
        run = interpreter.get_signature_runner()
        for feed in Images(job.images):
            run(**feed)


def portcall_plan(job: Job, watch: Watch) -> Any:
    """Plan the taps of the ONNX graph: the product, too, does this in a process of its own."""
    with watch.part("import onnx"):
        import onnxruntime.quantization.registry  # noqa: F401  # plan_onnx imports it inside

        from portcall.calibrating import MEMORY_BYTES
        from portcall.calibration import taps
        from portcall.exporters import _onnx, _qdq  # noqa: F401  # likewise
    images = Images(job.images)
    with watch.part("plan"):
        shapes = {images.name: list(images.shape)}
        arguments = {
            "graph": job.graph,
            "shapes": shapes,
            "budget_bytes": MEMORY_BYTES,
            "threads": job.threads,
        }
        return taps.plan_onnx(arguments, _silent)


def portcall_onnx(job: Job, watch: Watch) -> None:
    with watch.part("import onnxruntime"):
        import onnxruntime  # noqa: F401  # observe imports it inside
    _portcall_observe(job, watch)


def portcall_tflite(job: Job, watch: Watch) -> None:
    with watch.part("import ai_edge_litert"):
        import ai_edge_litert.interpreter
        import ai_edge_litert.tools.flatbuffer_utils  # noqa: F401  # observe imports them inside
    _portcall_observe(job, watch)


def _portcall_observe(job: Job, watch: Watch) -> None:
    """Run the product's calibration pass, which writes a table."""
    with watch.part("import taps"):
        from portcall.calibration import taps
        from portcall.calibration.table import DataRecord
    images = Images(job.images)
    count = len(images)
    # The product has hashed the samples before this pass: that reading is not in the seconds.
    record = DataRecord(job.images, None, 0, None, "", count, {images.name: images.shape})
    arguments = {
        "graph": job.graph,
        "plan": job.previous,
        "data": record.to_json(),
        "planned": [0, count],
        "shard": [0, count],
        "step": 1,
        "held_every": 0,
        "threads": job.threads,
        "checkpoint": None,
        "output": str(_table(job)),
    }
    with watch.part("pass"):
        taps.observe(arguments, _silent)


def portcall_ranges(job: Job, watch: Watch) -> int:
    """Derive the ranges of every method from the table: the product, too, does this in a process of its own."""
    with watch.part("import methods"):
        from portcall.calibration.methods import METHODS
        from portcall.calibration.table import CalibrationTable
    with watch.part("ranges"):
        section = CalibrationTable.load(_table(job)).sections[job.graph["sha256"]]
        ranges = [section.ranges(method) for method in METHODS]
    return len(ranges[0])


def _table(job: Job) -> Path:
    return Path(job.model).with_name("observed.pctable")


def _silent(done: int, total: int | None) -> None:
    """Take progress and show none."""


def ai_edge_quantizer(mode: str) -> Step:
    def run(job: Job, watch: Watch) -> int:
        with watch.part("import"):
            from ai_edge_quantizer import calibrator, quantizer, recipe
        with watch.part("pass"):
            work = quantizer.Quantizer(job.model)
            work.load_quantization_recipe(recipe.static_wi8_ai8())
            result = work.calibrate(
                {"serving_default": Images(job.images)},
                num_threads=job.threads,
                mode=calibrator.CalibrationMode[mode],
            )
        return sum(bool(qsv) for qsv in result.values())

    return run


def onnxruntime_calibrator(method: str, strided: bool = False, max_intermediate: int | None = None) -> Step:
    """Do what quantize_static does up to the ranges (onnxruntime 1.31.1, quantization/quantize.py)."""

    def run(job: Job, watch: Watch) -> int:
        with watch.part("import"):
            from onnxruntime.quantization import CalibrationMethod, calibrate
            from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
        with watch.part("pass"):
            images = Images(job.images)
            reader = Reader(images)
            calibrator = calibrate.create_calibrator(
                Path(job.model),
                list({*QLinearOpsRegistry, *QDQRegistry}),
                augmented_model_path=str(Path(job.model).with_name("augmented.onnx")),
                calibrate_method=CalibrationMethod[method],
                extra_options={"max_intermediate_outputs": max_intermediate} if max_intermediate else {},
            )
            if strided:
                stride = max(d for d in range(1, STRIDE + 1) if len(images) % d == 0)
                for start in range(0, len(images), stride):
                    reader.set_range(start, start + stride)
                    calibrator.collect_data(reader)
            else:
                calibrator.collect_data(reader)
        with watch.part("ranges"):
            ranges = calibrator.compute_data()
        return len(ranges.data)

    return run


def nncf(bias_correction: bool) -> Step:
    def run(job: Job, watch: Watch) -> int:
        with watch.part("import"):
            import nncf
            import openvino
        with watch.part("pass"):
            images = Images(job.images)
            model = openvino.Core().read_model(job.model)
            model.reshape(list(images.shape))
            advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=not bias_correction)
            quantized = nncf.quantize(
                model, nncf.Dataset(images), subset_size=len(images), advanced_parameters=advanced
            )
        fakes = [op for op in quantized.get_ops() if op.get_type_name() == "FakeQuantize"]
        sources = [op.input_value(0).get_node().get_type_name() for op in fakes]
        return sum(kind not in ("Constant", "Convert") for kind in sources)  # those are weights

    return run


def modelopt(method: str) -> Step:
    def run(job: Job, watch: Watch) -> int:
        with watch.part("import"):
            import onnx
            from modelopt.onnx.quantization import quantize
        output = str(Path(job.model).with_name("quantized.onnx"))
        with watch.part("pass"):
            quantize(
                job.model,
                calibration_data_reader=Reader(Images(job.images)),
                calibration_method=method,
                calibration_eps=["cpu"],
                high_precision_dtype="fp32",
                output_path=output,
            )
        graph = onnx.load(output).graph
        weights = {t.name for t in graph.initializer}
        return sum(n.op_type == "QuantizeLinear" and n.input[0] not in weights for n in graph.node)

    return run


_PEER = ("ai-edge-quantizer", "ai-edge-litert")
_ORT = "graph edit, collect_data, compute_data"
_EXPLODES = "keeps every intermediate output of every sample"
_SLOW = "slow histograms in numpy"

CONTENDERS = (
    Contender("limit", (limit,), "onnx", "session, plain fp32 inference; no ranges", ("onnxruntime",)),
    Contender("limit-tflite", (limit_tflite,), "tflite", "the same by LiteRT with XNNPACK", _PEER[1:]),
    Contender(
        "portcall-onnx", (portcall_plan, portcall_onnx, portcall_ranges), "onnx",
        "graph edit, one pass, ranges by every method, a process for each; samples hashed before",
        ("portcall", "onnxruntime"),
    ),
    Contender(
        "portcall-tflite", (portcall_tflite, portcall_ranges), "tflite",
        "one pass, ranges by every method, a process for each; samples hashed before",
        ("portcall", "ai-edge-litert"),
    ),
    Contender(
        "aeq", (ai_edge_quantizer("CALIBRATION_PRESERVE_ALL_TENSORS"),), "tflite",
        "Quantizer, calibrate: moving average of min and max", _PEER,
    ),
    Contender(
        "aeq-profiler", (ai_edge_quantizer("CALIBRATION_PROFILER_BASED"),), "tflite",
        "the same in C++ (CALIBRATION_PROFILER_BASED)", _PEER,
    ),
    Contender("ort-minmax", (onnxruntime_calibrator("MinMax"),), "onnx", _ORT, ("onnxruntime", "onnx")),
    Contender(
        "ort-minmax-strided", (onnxruntime_calibrator("MinMax", strided=True),), "onnx",
        f"{_ORT}; CalibStridedMinMax <= {STRIDE}", ("onnxruntime", "onnx"),
    ),
    # onnxruntime 1.31.1 drops a full list of outputs unread (calibrate.py, MinMaxCalibrater.collect_data): it sees the
    # samples after the last full list alone, and fails where there are none.
    Contender(
        "ort-minmax-capped", (onnxruntime_calibrator("MinMax", max_intermediate=STRIDE),), "onnx",
        f"{_ORT}; CalibMaxIntermediateOutputs {STRIDE}: the last samples only", ("onnxruntime", "onnx"),
    ),
    Contender(
        "nncf", (nncf(True),), "onnx",
        "nncf.quantize: read, statistics, ranges, fast bias correction, int8 model", ("nncf", "openvino"), "nncf",
    ),
    Contender(
        "nncf-ranges", (nncf(False),), "onnx", "the same without bias correction", ("nncf", "openvino"), "nncf",
    ),
    Contender(
        "modelopt-max", (modelopt("max"),), "onnx", "quantize: preprocessing, ranges, int8 ONNX file",
        ("nvidia-modelopt", "onnxruntime-gpu"), "modelopt",
    ),
    Contender(
        "modelopt-entropy", (modelopt("entropy"),), "onnx", "quantize: preprocessing, ranges, int8 ONNX file",
        ("nvidia-modelopt", "onnxruntime-gpu"), "modelopt",
    ),
    Contender(
        "ort-percentile-strided", (onnxruntime_calibrator("Percentile", strided=True),), "onnx",
        f"{_ORT}; CalibStridedMinMax <= {STRIDE}", ("onnxruntime", "onnx"), heavy=_SLOW,
    ),
    Contender(
        "ort-entropy-strided", (onnxruntime_calibrator("Entropy", strided=True),), "onnx",
        f"{_ORT}; CalibStridedMinMax <= {STRIDE}", ("onnxruntime", "onnx"), heavy=_SLOW,
    ),
    Contender(
        "ort-percentile", (onnxruntime_calibrator("Percentile"),), "onnx", _ORT, ("onnxruntime", "onnx"),
        heavy=_EXPLODES,
    ),
    Contender(
        "ort-entropy", (onnxruntime_calibrator("Entropy"),), "onnx", _ORT, ("onnxruntime", "onnx"),
        heavy=_EXPLODES,
    ),
)  # fmt: skip
"""In the order of the table and of a round; what is heavy comes last, so that a round begins undisturbed."""


def find(name: str) -> Contender:
    return next(c for c in CONTENDERS if c.name == name)
