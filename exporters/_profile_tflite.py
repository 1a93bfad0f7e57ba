"""The per-operator profile of LiteRT with XNNPACK on, and which operators XNNPACK did not take.

The Interpreter of the Python package (2.3) has no profiler; the library beside it has, and sees inside of XNNPACK: see
``_litert_c``. The same wheel, the same delegate and options as in the Interpreter that ``bench`` times; which operators
the delegate takes is read from both and has to agree.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from portcall.exporters import _litert_c
from portcall.exporters.tflite import LiteRtSession
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import UnsupportedError
from portcall.targets.agent.profiling import Operator, Placed, Profiler, Times

UNIT = "XNNPACK"
BUILTIN = "LiteRT's own kernels"
METHOD = (
    "LiteRT's profiler through its C API with XNNPACK on: whole microseconds of each kernel, rounded down"
)
FAMILIES: Mapping[str, Tuple[str, ...]] = {
    "Convolution": ("CONV_2D", "DEPTHWISE_CONV_2D"),
    "Deconvolution": ("TRANSPOSE_CONV",),
    "Fully Connected": ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL"),
    "Batch Matrix Multiply": ("BATCH_MATMUL",),
    "Convert": ("QUANTIZE", "DEQUANTIZE", "CAST"),
    "Transpose": ("TRANSPOSE",),
    "Static Reshape": ("RESHAPE", "EXPAND_DIMS", "SQUEEZE"),
    "Copy": ("RESHAPE", "EXPAND_DIMS", "SQUEEZE", "CONCATENATION"),
    "Constant Pad": ("PAD", "PADV2"),
    "Add": ("ADD",),
    "Subtract": ("SUB",),
    "Multiply": ("MUL",),
    "Divide": ("DIV",),
    "Maximum": ("MAXIMUM",),
    "Minimum": ("MINIMUM",),
    "Squared Difference": ("SQUARED_DIFFERENCE",),
    "Mean": ("MEAN",),
    "Sum": ("SUM",),
    "Global Average Pooling": ("MEAN",),
    "Average Pooling": ("AVERAGE_POOL_2D",),
    "Max Pooling": ("MAX_POOL_2D",),
    "Softmax": ("SOFTMAX",),
    "Sigmoid": ("LOGISTIC",),
    "Tanh": ("TANH",),
    "GELU": ("GELU",),
    "ELU": ("ELU",),
    "HardSwish": ("HARD_SWISH",),
    "LeakyReLU": ("LEAKY_RELU",),
    "PReLU": ("PRELU",),
    "Clamp": ("RELU", "RELU6", "RELU_N1_TO_1", "CLIP"),
    "Square Root": ("SQRT",),
    "Reciprocal Square Root": ("RSQRT",),
    "Exp": ("EXP",),
    "Resize Bilinear": ("RESIZE_BILINEAR",),
    "Slice": ("SLICE", "STRIDED_SLICE", "SPLIT"),
    "Even Split": ("SPLIT",),
    "Concatenate": ("CONCATENATION",),
}
"""How the name of an XNNPACK kernel begins -> what it may come from in the flatbuffer."""


class LiteRtProfiler(LiteRtSession, Profiler):
    """The Interpreter tells names and placement, the library runs and tells times."""

    def __init__(self, artifact: Artifact, workload: Workload) -> None:
        super().__init__(artifact.path, workload)
        self._path = artifact.path
        self._model = _litert_c.ProfiledModel(artifact.path, workload.threads)
        by_name = {p.name: p for p in self._model.inputs}
        by_tensor = {p.tensor: p for p in self._model.inputs}
        self._bound = {
            name: by_name.get(name) or by_tensor.get(str(detail["name"]))
            for name, detail in self._inputs.items()
        }
        lost = [name for name, port in self._bound.items() if port is None]
        if lost:
            raise UnsupportedError(
                f"LiteRT's library names no input {lost[0]!r}", "Give the inputs a signature"
            )
        self.forget()

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        super().set_inputs(arrays)
        for name, port in self._bound.items():
            assert port is not None
            self._model.write(port, arrays[name].tobytes())

    def infer(self) -> None:
        self._model.run()

    def get_outputs(self) -> Dict[str, Any]:
        import numpy as np

        ports = {p.name: p for p in self._model.outputs}
        ports.update({p.tensor: p for p in self._model.outputs})
        return {
            name: np.frombuffer(self._model.read(ports[name]), d["dtype"]).reshape(d["shape"])
            for name, d in self._outputs.items()
        }

    def forget(self) -> None:
        self._model.take_events()
        self._times = Times()
        self._events: List[_litert_c.Event] = []

    def collect(self) -> None:
        """Keys: (True, position) of a kernel inside of delegates, (False, index) of an operator outside."""
        events = [e for e in self._model.take_events() if e.kind in KINDS and e.subgraph == 0]
        self._events = self._events or events
        row: Dict[Tuple[bool, int], float] = {}
        for key, event in zip(_keys(events), events):
            row[key] = row.get(key, 0.0) + 1e3 * event.elapsed_us
        self._times.rows.append(row)

    def placed(self, numbers: Sequence[int]) -> Placed:
        details = self._interpreter._get_ops_details()
        written = [d for d in details if d["op_name"] != "DELEGATE"]
        names = {d["index"]: self._tensor_name(int(d["outputs"][0])) for d in written if len(d["outputs"])}
        kinds = {d["index"]: str(d["op_name"]) for d in written}
        outside = {e.number for e in self._events if e.kind == _litert_c.OPERATOR}
        seen = delegated(details)
        notes = [
            "with the profiler on, LiteRT's CompiledModel runs the file, whose call costs more than that of the "
            "Interpreter that bench times"
        ]
        if set(kinds) - seen != outside:
            notes.append(
                "the library places other operators in XNNPACK than the Interpreter that bench times: times are the "
                "library's, operators the Interpreter's"
            )
        kernels = [e for e in self._events if e.kind != _litert_c.OPERATOR]
        sources = align([e.tag for e in kernels], [(i, kinds[i]) for i in sorted(seen)])
        operators: List[Operator] = []
        inside = iter(sources)
        for key, event in zip(_keys(self._events), self._events):
            taken = event.kind != _litert_c.OPERATOR
            index = next(inside) if taken else event.number
            held = () if index is None else (index,)
            operators.append(
                Operator(
                    name=event.tag if index is None else layers_of(names.get(index, ""))[0],
                    operator=event.tag.split(" (")[0] if index is None else kinds.get(index, event.tag),
                    kernel=event.tag,
                    unit=UNIT if taken else BUILTIN,
                    on_unit=taken,
                    reason=None if taken else self._reason(kinds.get(event.number, event.tag)),
                    layers=tuple(n for i in held if i in names for n in layers_of(names[i])),
                    time_ns=self._times.mean(key, numbers),
                )
            )
        counted = (len(kinds), len(seen))
        return Placed(UNIT, tuple(operators), METHOD, counted, tuple(notes))

    def _reason(self, kind: str) -> str:
        return f"XNNPACK does not take this {kind} (its type, shape or options); {BUILTIN} run it"

    def _tensor_name(self, index: int) -> str:
        return str(self._interpreter._get_tensor_details(index, 0)["name"])


KINDS = (_litert_c.OPERATOR, _litert_c.DELEGATE_OPERATOR, _litert_c.DELEGATE_PROFILED)


def _keys(events: Sequence[_litert_c.Event]) -> List[Tuple[bool, int]]:
    """Return a key per event that is the same in every inference: several delegates number their kernels from 0."""
    found, position = [], 0
    for event in events:
        taken = event.kind != _litert_c.OPERATOR
        found.append((taken, position if taken else event.number))
        position += taken
    return found


def delegated(details: Sequence[Mapping[str, Any]]) -> Set[int]:
    """Return the operators that DELEGATE nodes replaced: back from a delegate's outputs to its inputs.

    details: of ``Interpreter._get_ops_details`` after ``allocate_tensors``.
    """
    made_by = {int(o): d for d in details if d["op_name"] != "DELEGATE" for o in d["outputs"]}
    found: Set[int] = set()
    for delegate in details:
        if delegate["op_name"] != "DELEGATE":
            continue
        stop = {int(i) for i in delegate["inputs"]}
        todo = [int(o) for o in delegate["outputs"]]
        while todo:
            maker = made_by.get(todo.pop())
            if maker is None or int(maker["index"]) in found:
                continue
            found.add(int(maker["index"]))
            todo += [int(i) for i in maker["inputs"] if int(i) >= 0 and int(i) not in stop]
    return found


def align(tags: Sequence[str], operators: Sequence[Tuple[int, str]]) -> List[Optional[int]]:
    """Return, per XNNPACK kernel in order, the flatbuffer operator that it computes, None where it is unsure.

    Both lie in the order of the graph; XNNPACK drops some operators (padding goes into a convolution) and adds others.
    The longest common subsequence under FAMILIES; an operator that more than one longest alignment would place
    differently is left out.
    """
    width, height = len(operators), len(tags)
    fits = [[kind in _family(tag) for _, kind in operators] for tag in tags]
    ahead = _lengths(fits, height, width)
    behind = _lengths([row[::-1] for row in fits[::-1]], height, width)
    total = ahead[0][0]
    found: List[Optional[int]] = []
    for i in range(height):
        able = [
            j
            for j in range(width)
            if fits[i][j] and behind[height - i][width - j] + 1 + ahead[i + 1][j + 1] == total
        ]
        found.append(operators[able[0]][0] if len(able) == 1 else None)
    return found


def _lengths(fits: Sequence[Sequence[bool]], height: int, width: int) -> List[List[int]]:
    """Return the length of the longest common subsequence of what lies from (i, j) on."""
    table = [[0] * (width + 1) for _ in range(height + 1)]
    for i in range(height - 1, -1, -1):
        for j in range(width - 1, -1, -1):
            best = max(table[i + 1][j], table[i][j + 1])
            table[i][j] = max(best, table[i + 1][j + 1] + 1) if fits[i][j] else best
    return table


def _family(tag: str) -> Tuple[str, ...]:
    head = tag.split(" (")[0]
    if head == "Convolution":  # "Convolution (NHWC, QC8) DWConv"
        return ("DEPTHWISE_CONV_2D",) if "DWConv" in tag else ("CONV_2D", "DEPTHWISE_CONV_2D")
    return FAMILIES.get(head, ())


def layers_of(tensor: str) -> Tuple[str, ...]:
    """Return the layers of an operator by the name of its output, which its converter made of their names.

    torch's holds classes, the last layer first: ``net.Cnn/torch.nn.modules.container.Sequential_stem/
    torch.nn.modules.conv.Conv2d_0;`` is ("stem.0",). TensorFlow's joins those of all fused operators with ";".
    """
    parts = [p for p in tensor.split(";") if "/" in p]
    if not parts:
        return (tensor.rstrip(";"),)
    names = []
    for piece in parts[-1].split("/")[1:]:
        head, _, name = piece.partition("_")
        if "." not in head or not head.rpartition(".")[2][:1].isupper() or not name:
            return tuple(dict.fromkeys(parts))
        names.append(name)
    return (".".join(names),)
