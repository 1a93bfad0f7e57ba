"""The per-operator profile of ONNX Runtime: its own profiler's kernel times, and the graph as it was optimized.

Tried with onnxruntime 1.31: ``enable_profiling`` writes one event per executed node and inference (whole microseconds),
with the node's operator, provider and the types of its inputs and outputs, but no tensor names. These come from the
optimized graph, whose nodes ONNX Runtime writes in the order in which it executes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.exporters.onnxruntime import OnnxRuntimeSession
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import UnavailableError
from portcall.targets.agent.profiling import Operator, Placed, Profiler, Times, owner

CPU = "CPUExecutionProvider"
FLOATS = ("float", "float16", "bfloat16", "double")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CONTROL = ("If", "Loop", "Scan", "SequenceMap")
"""Operators whose time contains that of the operators in their bodies."""
PRODUCTS = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "LSTM",
    "GRU",
    "Attention",
)
DYNAMIC = (
    "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeLSTM",
)  # fmt: skip
"""Integer kernels that quantize activations at run time; some of them end in floats."""
INTEGER = re.compile(r"^(QLinear|QGemm|QAttention|QMoE|QOrdered|QEmbed|Q(Conv|Gather|Softmax|Where|Concat))")
METHOD = (
    "onnxruntime's profiler (enable_profiling): each kernel of the optimized graph, in whole microseconds; a fused "
    "node holds several operators"
)


class Node:
    """A node of the optimized graph, or of the file."""

    def __init__(self, proto: Any) -> None:
        self.name, self.operator = str(proto.name), str(proto.op_type)
        self.inputs, self.outputs = [str(i) for i in proto.input], [str(o) for o in proto.output]


class OnnxRuntimeProfiler(OnnxRuntimeSession, Profiler):
    """A session with ``enable_profiling``. *folder*: for the trace and the optimized graph."""

    _is_graph_written = True

    def __init__(self, artifact: Artifact, workload: Workload, folder: Path) -> None:
        self._folder, self._artifact = folder, artifact
        self._runs = self._dropped = 0
        super().__init__(artifact.path, workload.threads)

    def _open(self, path: Path, options: Any) -> Any:
        self._ask(options)
        return super()._open(path, options)

    def _ask(self, options: Any) -> None:
        """Have a session write its events and its optimized graph."""
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / "profile")
        if self._is_graph_written:
            options.optimized_model_filepath = str(self._folder / "optimized.onnx")
            entry = "session.optimized_model_external_initializers_"
            options.add_session_config_entry(entry + "file_name", "optimized.bin")
            options.add_session_config_entry(entry + "min_size_in_bytes", "1024")

    def collect(self) -> None:
        self._runs += 1

    def forget(self) -> None:
        self._dropped = self._runs

    def placed(self, numbers: Sequence[int]) -> Placed:
        inputs, nodes = _graph(self._folder / "optimized.onnx")
        _, written = _graph(self._artifact.path)
        return _placed(self.runs(), numbers, nodes, written, inputs, self._artifact.precision)

    def runs(self) -> List[List[Mapping[str, Any]]]:
        """End the profile; return the events of each inference since ``forget``."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        # The runs that a check of the inputs or the runtime itself adds come first.
        return _runs(events)[-(self._runs - self._dropped) :]


def kernels(profiler: OnnxRuntimeProfiler, numbers: Sequence[int]) -> List[Operator]:
    """Return the executed nodes with their providers and times, not judged and without layers."""
    runs = profiler.runs()
    times = Times([_sums(run) for run in runs])
    return [
        Operator(
            name=event["name"][: -len("_kernel_time")],
            operator=event["args"]["op_name"],
            kernel=_kernel(event["args"]),
            unit=event["args"]["provider"],
            on_unit=True,
            time_ns=times.mean(event["args"]["node_index"], numbers),
        )
        for event in _distinct(runs[numbers[0]])
    ]


def _distinct(run: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    return list({e["args"]["node_index"]: e for e in run}.values())


def _graph(path: Path) -> Tuple[Set[str], List[Node]]:
    """Return the names of a file's inputs, and its nodes in order."""
    try:
        import onnx
    except ImportError as error:
        raise UnavailableError(
            "the profile needs the package onnx, to read the graph that ONNX Runtime made", "pip install onnx"
        ) from error
    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    return {v.name for v in graph.input} - constants, [Node(n) for n in graph.node]


def _runs(events: Sequence[Mapping[str, Any]]) -> List[List[Mapping[str, Any]]]:
    """Return the node events of each inference, in the order of execution, without those inside of control flow."""
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run"]
    spans.sort()
    found: List[List[Mapping[str, Any]]] = [[] for _ in spans]
    current = 0
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    # Stable: events of one microsecond keep the order in which they were written.
    for event in sorted(kernels, key=lambda e: int(e["ts"])):
        while current < len(spans) and event["ts"] > spans[current][1]:
            current += 1
        if current == len(spans):
            break
        if event["ts"] >= spans[current][0]:
            found[current].append(event)
    return [_top_level(run) for run in found]


def _top_level(run: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    outer = [e for e in run if e["args"]["op_name"] in CONTROL]

    def is_inside(event: Mapping[str, Any]) -> bool:
        start, end = event["ts"], event["ts"] + event["dur"]
        return any(
            o is not event and o["ts"] <= start and end <= o["ts"] + o["dur"] and o["dur"] > event["dur"]
            for o in outer
        )

    return [e for e in run if not is_inside(e)] if outer else list(run)


def _placed(
    runs: Sequence[Sequence[Mapping[str, Any]]],
    numbers: Sequence[int],
    nodes: Sequence[Node],
    written: Sequence[Node],
    inputs: Set[str],
    precision: str,
) -> Placed:
    times = Times([_sums(run) for run in runs])
    numbers = [i for i in numbers if i < len(runs) and runs[i]]  # the profiler stops at a million events
    first = _distinct(runs[numbers[0]]) if numbers else []
    matched = _matched(first, nodes)
    kinds = {e["args"]["op_name"] for e in first}
    style = _style(kinds, precision)
    judge = _Judge(style, nodes, inputs)
    layers = _Layers(nodes, written)
    operators = []
    for event, node in zip(first, matched):
        arguments = event["args"]
        reason = judge.reason(event, node)
        name = event["name"][: -len("_kernel_time")]
        operators.append(
            Operator(
                name=name,
                operator=arguments["op_name"],
                kernel=_kernel(arguments),
                unit=arguments["provider"],
                on_unit=reason is None,
                reason=reason,
                layers=layers.of(node, name),
                time_ns=times.mean(arguments["node_index"], numbers),
            )
        )
    notes = (
        ()
        if all(matched)
        else ("some kernels could not be found in the optimized graph: no layers for them",)
    )
    return Placed(_UNITS[style], tuple(operators), METHOD, notes=notes)


def _sums(run: Sequence[Mapping[str, Any]]) -> Dict[str, float]:
    found: Dict[str, float] = {}
    for event in run:
        index = event["args"]["node_index"]
        found[index] = found.get(index, 0.0) + 1e3 * event["dur"]
    return found


def _matched(events: Sequence[Mapping[str, Any]], nodes: Sequence[Node]) -> List[Optional[Node]]:
    """Return the node of each event: by position where all operators agree, else by name."""
    if [e["args"]["op_name"] for e in events] == [n.operator for n in nodes]:
        return list(nodes)
    by_name = {n.name: n for n in nodes if n.name}
    return [by_name.get(e["name"][: -len("_kernel_time")]) for e in events]


FLOAT, STATIC, DYNAMICALLY = "float", "static", "dynamic"
_UNITS = {
    FLOAT: CPU,
    STATIC: f"{CPU}, integer kernels",
    DYNAMICALLY: f"{CPU}, integer kernels for products",
}


def _style(kinds: Set[str], precision: str) -> str:
    """Return what the file asks for: floats, static integers (Q/DQ), or integers in products with floats around."""
    if precision in ("fp32", "fp16", "int8-weights", "int4-weights"):
        return FLOAT
    if precision == "int8-dynamic" or kinds & set(DYNAMIC):
        return DYNAMICALLY
    integer = QUANTIZE in kinds or any(INTEGER.match(k) for k in kinds)
    return STATIC if integer or precision in ("int8", "int16x8") else FLOAT


class _Judge:
    """Tells why an operator is not on the intended unit."""

    def __init__(self, style: str, nodes: Sequence[Node], inputs: Set[str]) -> None:
        self._style, self._inputs = style, inputs
        self._made_by = {o: n for n in nodes for o in n.outputs}
        self._readers: Dict[str, List[Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)

    def reason(self, event: Mapping[str, Any], node: Optional[Node]) -> Optional[str]:
        arguments = event["args"]
        operator, provider = arguments["op_name"], arguments["provider"]
        if provider != CPU:
            return f"runs on {provider}"
        if self._style == FLOAT:
            return None
        has_float = any(t in FLOATS for t in _types(arguments, "output"))
        if self._style == DYNAMICALLY:
            return "product in float32" if has_float and operator in PRODUCTS else None
        if operator in (QUANTIZE, DEQUANTIZE):
            if node is None or self._is_boundary(node):
                return None
            return "converts inside of the graph, next to an operator in float32"
        if not has_float or INTEGER.match(operator):
            return None
        if node is not None and self._is_between_pairs(node):
            return "float32 between a DequantizeLinear and a QuantizeLinear that no integer kernel took in"
        return "float32: no Q/DQ pair stands around it"

    def _is_boundary(self, node: Node) -> bool:
        """Tell whether a Q reads an input of the graph, or a DQ makes one of its outputs; moving operators between."""
        if node.operator == QUANTIZE:
            maker = self._made_by.get(node.inputs[0])
            while maker is not None and maker.operator in MOVING:
                node, maker = maker, self._made_by.get(maker.inputs[0])
            return node.inputs[0] in self._inputs
        readers = self._readers.get(node.outputs[0], [])
        while len(readers) == 1 and readers[0].operator in MOVING:
            readers = self._readers.get(readers[0].outputs[0], [])
        return not readers

    def _is_between_pairs(self, node: Node) -> bool:
        makers = [self._made_by.get(i) for i in node.inputs if i]
        readers = [r for o in node.outputs for r in self._readers.get(o, [])]
        return any(m is not None and m.operator == DEQUANTIZE for m in makers) and any(
            r.operator == QUANTIZE for r in readers
        )


MOVING = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
REORDER, BLOCKED = "ReorderOutput", "_nchwc"


def _types(arguments: Mapping[str, Any], end: str) -> List[str]:
    return [str(next(iter(t))) for t in arguments.get(f"{end}_type_shape", []) if t]


def _kernel(arguments: Mapping[str, Any]) -> str:
    """``QLinearConv uint8 -> uint8``: the operator with the types of its first input and output."""
    ends = [_types(arguments, end)[:1] for end in ("input", "output")]
    return " ".join([arguments["op_name"], *ends[0], "->", *ends[1]])


class _Layers:
    """Finds the file's operators inside of the optimized ones: back from an output to what other nodes make."""

    def __init__(self, nodes: Sequence[Node], written: Sequence[Node]) -> None:
        self._made_by = {o: n for n in written for o in n.outputs if o}
        self._names = {n.name: n for n in written if n.name}
        self._known = {name for n in nodes for name in (*n.inputs, *n.outputs, *_blocked(n))}
        self._claimed = {id(self._by_name(n.name)) for n in nodes}
        self._reordered: Dict[str, List[str]] = {}
        for node in nodes:
            if node.operator == REORDER:
                self._reordered.setdefault(node.inputs[0], []).extend(node.outputs)

    def of(self, node: Optional[Node], name: str) -> Tuple[str, ...]:
        """Return modules that the weights belong to, then names of operators; Q, DQ and reordering have none."""
        own = self._by_name(name)
        held = [] if own is None else [own]
        if node is not None:
            held += [n for n in self._held(node, own) if n is not own]
        owners = [o for n in held for o in self._owners(n)]
        names = [n.name for n in held if n.name and n.operator not in (QUANTIZE, DEQUANTIZE)]
        return tuple(dict.fromkeys([*owners, *names]))

    def _held(self, node: Node, own: Optional[Node]) -> List[Node]:
        if node.operator == REORDER:
            return []
        ends = [*node.outputs, *_blocked(node)]
        ends += [e for o in node.outputs for e in self._reordered.get(o, [])]
        stop = self._known - set(ends)
        found: Dict[int, Node] = {}
        todo = list(ends)
        while todo:
            maker = self._made_by.get(todo.pop())
            if maker is None or id(maker) in found or (id(maker) in self._claimed and maker is not own):
                continue
            found[id(maker)] = maker
            todo += [i for i in maker.inputs if i and i not in stop]
        return list(found.values())

    def _by_name(self, name: str) -> Optional[Node]:
        """``node_Conv_56_token_1``: what ONNX Runtime made of node_Conv_56."""
        parts = name.split("_")
        for count in range(len(parts), 0, -1):
            found = self._names.get("_".join(parts[:count]))
            if found is not None:
                return found
        return None

    def _owners(self, node: Node) -> List[str]:
        if node.operator in (QUANTIZE, DEQUANTIZE):
            return []
        return [o for o in map(owner, node.inputs) if o is not None]


def _blocked(node: Node) -> List[str]:
    """Return the tensor that a convolution in the blocked layout makes: its own output has a name made up."""
    return [node.name[: -len(BLOCKED)]] if node.name.endswith(BLOCKED) else []
