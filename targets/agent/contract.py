"""The contract between portcall and a backend: what a backend is, and what runs one inference.

A backend is one file in ``exporters/`` that ends in ``BACKEND = Backend(...)``. That file imports nothing
at its top beyond this package, so that it can travel to a device together with the agent. Long because it is the whole
contract: data, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

if TYPE_CHECKING:
    from portcall.targets.agent.contents import Contents
    from portcall.targets.agent.profiling import Profiler

Dim = Union[int, str]
"""A dimension: a fixed size, or the name of a dynamic one."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, shape (a str is a dynamic dimension) and NumPy dtype name."""

    name: str
    shape: Tuple[Dim, ...]
    dtype: str

    def to_json(self) -> Dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorSpec:
        return TensorSpec(str(data["name"]), tuple(data["shape"]), str(data["dtype"]))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class Available:
    """The backend works here; *version* is that of its runtime or converter."""

    version: str


@dataclass(frozen=True)
class Unavailable:
    """The backend does not work here: why, and the command or step that changes it."""

    reason: str
    fix: str


@dataclass(frozen=True)
class Range:
    """The clipping range of one tensor, in its own unit; *symmetric* ranges have minimum == -maximum.

    Others contain zero, which has to be exactly representable. channel_mean: the mean of every channel over the
    calibration samples (axis 1 of a convolution's input, else the last axis), for tensors that meet constant weights.
    """

    minimum: float
    maximum: float
    symmetric: bool = False
    channel_mean: Optional[Tuple[float, ...]] = None

    def to_json(self) -> List[Any]:
        return [self.minimum, self.maximum, self.symmetric, self.channel_mean]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Range:
        low, high, symmetric, means = data
        return Range(low, high, symmetric, None if means is None else tuple(means))

    def is_beyond_int8(self) -> bool:
        """Tell whether the tensor mixes ordinary values with magnitudes of 10,000 or more.

        Those are sentinels (an attention mask adds -1e4, -1e9 or the least float32): 8 bits over such a range leave
        nothing of the ordinary values, so that operators around it stay in floating point.
        """
        return max(-self.minimum, self.maximum) >= SENTINEL


SENTINEL = 1e4

Ranges = Mapping[str, Range]
"""Tensor name in the tapped graph -> range. No exporter sees histograms."""


@dataclass(frozen=True)
class Recipe:
    """How to export: the precision word, the calibration method and options.

    Options of every backend: "bias_correction", "keep_float", "weights", "weight_symmetric", "opset" (of ONNX files)
    and "min_runtime" (a version of the backend's runtime that must still load the artifact). Others are the
    backend's own: see ``Capabilities.options``; one that was not given is absent.
    """

    precision: str
    method: str = "minmax"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Dict[str, Any]:
        return {"precision": self.precision, "method": self.method, "options": dict(self.options)}


@dataclass(frozen=True)
class Source:
    """The model as it came in, opened and checked: see ``portcall.source``.

    format: "onnx", "pt2" or "torch" (a factory). path: the file that can be lowered (``.onnx``, or the
    ``.pt2`` that a factory was exported to). example_shapes: the concrete shape of every input. notes: sentences for
    the manifest on what opening it changed (parametrizations folded). quantized: its activations are quantized with
    scales of its own (Q/DQ, quantization-aware training).
    """

    spec: str
    format: str
    path: Path
    sha256: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    example_shapes: Mapping[str, Tuple[int, ...]]
    notes: Tuple[str, ...] = ()
    quantized: bool = False

    def to_json(self) -> Dict[str, Any]:
        return {
            "spec": self.spec,
            "format": self.format,
            "path": str(self.path),
            "sha256": self.sha256,
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "example_shapes": {k: list(v) for k, v in self.example_shapes.items()},
            "notes": list(self.notes),
            "quantized": self.quantized,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Source:
        return Source(
            spec=data["spec"],
            format=data["format"],
            path=Path(data["path"]),
            sha256=data["sha256"],
            inputs=tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(t) for t in data["outputs"]),
            example_shapes={k: tuple(v) for k, v in data["example_shapes"].items()},
            notes=tuple(data.get("notes", ())),
            quantized=bool(data.get("quantized", False)),
        )


@dataclass(frozen=True)
class Graph:
    """A source lowered to the form that is tapped and exported.

    kind: "onnx" (the canonical ONNX graph) or "tflite" (the float flatbuffer). Backends of one kind share it.
    names: name of an input or output in the source -> its name in this graph. peak_rss_bytes: of the process that
    lowered it.
    """

    kind: str
    path: Path
    sha256: str
    source: Source
    names: Mapping[str, str]
    peak_rss_bytes: int = 0

    def to_json(self) -> Dict[str, Any]:
        return {
            "kind": self.kind,
            "path": str(self.path),
            "sha256": self.sha256,
            "source": self.source.to_json(),
            "names": dict(self.names),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Graph:
        return Graph(
            data["kind"],
            Path(data["path"]),
            data["sha256"],
            Source.from_json(data["source"]),
            data["names"],
            data["peak_rss_bytes"],
        )


@dataclass(frozen=True)
class BoundTensor:
    """An input or output of an artifact: its name in the source, and what the runtime calls it.

    name, shape and dtype are the runtime's. permutation: the axes of the source's tensor in the runtime's order, None
    for the same order. scale, zero_point: where the runtime takes integers for the source's float x, those are
    round(x / scale) + zero_point, saturated.
    """

    source: str
    name: str
    shape: Tuple[Dim, ...]
    dtype: str
    permutation: Optional[Tuple[int, ...]] = None
    scale: Optional[float] = None
    zero_point: Optional[int] = None

    def to_json(self) -> Dict[str, Any]:
        return {
            "source": self.source,
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "permutation": None if self.permutation is None else list(self.permutation),
            "scale": self.scale,
            "zero_point": self.zero_point,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BoundTensor:
        permutation = data.get("permutation")
        return BoundTensor(
            data["source"],
            data["name"],
            tuple(data["shape"]),
            data["dtype"],
            None if permutation is None else tuple(permutation),
            data.get("scale"),
            data.get("zero_point"),
        )


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote into its folder: the file (or folder) to load, all files, and the tensors.

    files: relative to the folder, with "/" between the parts. notes: sentences for the manifest that a user should
    know (a layer left in float, a rounding). min_runtime: the oldest version of the backend's runtime that loads it,
    None where that is unknown.
    """

    entry: str
    files: Tuple[str, ...]
    inputs: Tuple[BoundTensor, ...]
    outputs: Tuple[BoundTensor, ...]
    versions: Mapping[str, str]
    notes: Tuple[str, ...] = ()
    min_runtime: Optional[str] = None


@dataclass(frozen=True)
class Census:
    """What arithmetic an artifact really uses.

    quantize_nodes: operators that quantize, dequantize or compute in integers. macs and integer_macs: multiply-
    accumulates of one inference in all, and those computed on integers; None where a shape is unknown.
    float_nodes: names of the compute operators (convolution, matrix product) that stayed in floating point.
    """

    quantize_nodes: int
    macs: Optional[int]
    integer_macs: Optional[int]
    float_nodes: Tuple[str, ...]
    method: str

    def to_json(self) -> Dict[str, Any]:
        share = None if not self.macs or self.integer_macs is None else self.integer_macs / self.macs
        return {
            "quantize_nodes": self.quantize_nodes,
            "macs": self.macs,
            "integer_macs": self.integer_macs,
            "integer_macs_share": share,
            "float_nodes": list(self.float_nodes),
            "method": self.method,
        }


@dataclass(frozen=True)
class Workload:
    """How an artifact is measured. Times in seconds; *threads* is the runtime's intra-op count.

    warmup_s and max_warmup_s: the least and the longest warm-up; in between it ends when the series is stationary.
    A process times at least min_time_s and min_count inferences. max_time_s caps one cell (all its processes, start-up
    included); None means no cap. ci_width: processes are added until the 95 % interval of P50, upper minus lower end
    over P50, is that narrow (0.01 is 1 %); None for exactly *processes*.
    affinity: the CPUs that a process may run on. priority: "nice:N" or "fifo:N". spinning: whether waiting threads of
    the runtime spin. None leaves each as it is: see ``portcall.targets.agent.settings``.
    """

    batch: int = 1
    threads: int = 1
    processes: int = 5
    warmup_s: float = 0.25
    min_time_s: float = 1.0
    max_time_s: Optional[float] = None
    shapes: Mapping[str, Tuple[int, ...]] = field(default_factory=dict)
    max_warmup_s: float = 3.0
    min_count: int = 5
    ci_width: Optional[float] = None
    affinity: Optional[Tuple[int, ...]] = None
    priority: Optional[str] = None
    spinning: Optional[bool] = None

    def to_json(self) -> Dict[str, Any]:
        return {
            "batch": self.batch,
            "threads": self.threads,
            "processes": self.processes,
            "warmup_s": self.warmup_s,
            "min_time_s": self.min_time_s,
            "max_time_s": self.max_time_s,
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "max_warmup_s": self.max_warmup_s,
            "min_count": self.min_count,
            "ci_width": self.ci_width,
            "affinity": None if self.affinity is None else list(self.affinity),
            "priority": self.priority,
            "spinning": self.spinning,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Workload:
        values = dict(data)
        values["shapes"] = {k: tuple(v) for k, v in data.get("shapes", {}).items()}
        if data.get("affinity") is not None:
            values["affinity"] = tuple(data["affinity"])
        return Workload(**values)


class Session:
    """A loaded artifact. ``set_inputs`` binds once, untimed; ``infer`` does one inference and nothing else.

    inputs and outputs name the runtime's own tensors. environment holds what the runtime says of itself
    (threads, inference precision as read back): it is stored with every measurement. device_times_ns: of every
    ``infer`` so far, where the device has a clock of its own (a GPU's events).
    """

    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    environment: Dict[str, Any]
    device_times_ns: Sequence[float] = ()
    no_memory_figures: str = "the runtime's Python API tells no memory figures"

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        """Bind *arrays* (runtime name -> ndarray of the runtime's shape and dtype)."""
        raise NotImplementedError

    def infer(self) -> None:
        """Do one inference on the bound inputs, synchronously."""
        raise NotImplementedError

    def get_outputs(self) -> Dict[str, Any]:
        """Return copies of the outputs of the last inference (runtime name -> ndarray)."""
        raise NotImplementedError

    def memory_figures(self) -> Mapping[str, int]:
        """Return what the runtime itself says of its memory, name -> bytes; empty: see ``no_memory_figures``."""
        return {}


@dataclass(frozen=True)
class Shown:
    """A tensor that an artifact shows, by its name in the graph that the artifact was made from.

    scale, zero_point, levels: where it holds integers q in levels[0]..levels[1]; its values are
    scale * (q - zero_point). readers: names of that graph's operators that read this very value, where the artifact
    holds the tensor both in floats and in integers; empty for all.
    """

    name: str
    scale: Optional[float] = None
    zero_point: int = 0
    levels: Tuple[int, int] = (0, 0)
    readers: Tuple[str, ...] = ()

    def to_json(self) -> Dict[str, Any]:
        return {
            "name": self.name,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "levels": list(self.levels),
            "readers": list(self.readers),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Shown:
        levels = (int(data["levels"][0]), int(data["levels"][1]))
        return Shown(data["name"], data["scale"], data["zero_point"], levels, tuple(data["readers"]))


class Trace:
    """An artifact whose intermediate tensors can be seen. how: the runtime, and what differs from a deployed run."""

    tensors: Tuple[Shown, ...]
    how: str

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """Return float arrays in the order of ``tensors`` and in their graph's order of axes, for one sample.

        arrays: source input name -> ndarray as the source takes it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Artifact:
    """An artifact, or a bare file, as a device sees it: its folder, the file to load, and its tensors.

    inputs and outputs are empty for a bare file: then the runtime's own names serve as source names. options: of the
    recipe. identity: of the manifest; "" for a bare file. finished: what ``Backend.finish`` made of it here.
    """

    directory: Path
    entry: str
    backend: str
    precision: str
    inputs: Tuple[BoundTensor, ...] = ()
    outputs: Tuple[BoundTensor, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    min_runtime: Optional[str] = None
    identity: str = ""
    finished: Optional[Path] = None

    @property
    def path(self) -> Path:
        return self.directory / self.entry

    def to_json(self) -> Dict[str, Any]:
        return {
            "directory": str(self.directory),
            "entry": self.entry,
            "backend": self.backend,
            "precision": self.precision,
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "options": dict(self.options),
            "min_runtime": self.min_runtime,
            "identity": self.identity,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Artifact:
        return Artifact(
            Path(data["directory"]),
            data["entry"],
            data["backend"],
            data["precision"],
            tuple(BoundTensor.from_json(t) for t in data["inputs"]),
            tuple(BoundTensor.from_json(t) for t in data["outputs"]),
            dict(data.get("options", {})),
            data.get("min_runtime"),
            data.get("identity", ""),
        )


@dataclass(frozen=True)
class Precision:
    """One precision of a backend: what the word means there."""

    meaning: str
    calibrated: bool = False
    """True where an export needs ranges from a calibration table."""
    symmetric: bool = False
    """True where its activations need symmetric ranges."""
    bits: int = 8
    """Of a calibrated activation."""
    integer: bool = False
    """True where an artifact without any integer arithmetic is a failed export."""


@dataclass(frozen=True)
class Option:
    """An option of a backend's recipe: what it does, and the values it takes.

    choices: of a word. kind: of other values, "text", "int", "float", "bool" or "path" (of a file that is read when
    exporting). precisions: those that it concerns; empty for all.
    """

    meaning: str
    choices: Tuple[str, ...] = ()
    kind: str = "text"
    precisions: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """The static facts of a backend.

    source_formats: of ``Source.format``. suffixes: of bare files that ``bench`` accepts for it.
    host: where it can run ("any", or a platform's name). options: its own, by name, beside those of every recipe.
    """

    source_formats: Tuple[str, ...]
    precisions: Mapping[str, Precision]
    suffixes: Tuple[str, ...] = ()
    host: str = "any"
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """One runtime and its file format, as functions.

    probe(role): "export" or "run"; never raises; runs in a worker, so importing the runtime is fine.
    lower(source, dir): once per model and graph kind, cached. export(graph, recipe, ranges, dir) writes the
    files of one artifact. load(artifact, workload): a context manager of a Session. census(artifact, shapes):
    counts integer arithmetic (shapes: source input name -> concrete shape).
    contents(artifact, shapes): reads what the files hold (weights with their zeros, operators) without running them;
    shapes as for census, empty where nobody asks for multiply-accumulates. artifact may be a bare file.
    finish(artifact, workload, dir): on the device, writes what it builds of the artifact (an engine, a compiled model)
    into *dir* and returns its file's name; cached by the agent, and given to load as ``Artifact.finished``.
    interpret: like load, for a backend whose runtime is not at hand where it exports: runs the portable part of the
    artifact with another runtime. ``verify`` falls back on it and labels the parity; ``bench`` never uses it.
    trace: shows the intermediate tensors of an artifact, for ``debug``; without it only the outputs are compared.
    load_streams(artifact, workload, n): like load, for n sessions that infer at the same time, each from a thread of
    its own and with ``workload.threads`` threads; where it is None, n sessions are loaded one by one.
    profile: like load, with the runtime's profiler on; tells which unit runs which operator. Without it no placement.
    example: the text of an ``example.py`` that needs only the runtime; @ENTRY@ stands for the file to load, @COMMON@
    for what defines ``here``, ``samples`` and ``show(name, value)``.
    """

    name: str
    graph: str
    capabilities: Capabilities
    probe: Callable[[str], Union[Available, Unavailable]]
    lower: Callable[[Source, Path], Graph]
    export: Callable[[Graph, Recipe, Optional[Ranges], Path], Exported]
    load: Callable[[Artifact, Workload], ContextManager[Session]]
    census: Callable[[Artifact, Mapping[str, Tuple[int, ...]]], Census]
    example: str
    interpret: Optional[Callable[[Artifact, Workload], ContextManager[Session]]] = None
    finish: Optional[Callable[[Artifact, Workload, Path], str]] = None
    contents: Optional[Callable[[Artifact, Mapping[str, Tuple[int, ...]]], Contents]] = None
    trace: Optional[Callable[[Artifact, Workload], ContextManager[Trace]]] = None
    load_streams: Optional[Callable[[Artifact, Workload, int], ContextManager[Sequence[Session]]]] = None
    profile: Optional[Callable[[Artifact, Workload], ContextManager[Profiler]]] = None
