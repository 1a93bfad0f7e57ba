"""TensorFlow Lite Micro (TFLM): fp32, int8 and int16x8 for microcontrollers, with firmware and the arena's size.

Verified by TFLM itself: its interpreter with reference kernels runs on the host. That is never a device's latency.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
    Capabilities,
    Census,
    Exported,
    Graph,
    Option,
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    TensorSpec,
    Trace,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules

RUNTIME = "tflite_micro.python.tflite_micro.runtime"
MEMORY = "memory.json"
LAYERS = "layers.json"
CORE = "cortex-m4"
ARENA_MARGIN = 0.1

OPTIONS: Mapping[str, Option] = {
    "io": Option(
        "type of inputs and outputs; integers are round(x / scale) + zero_point of the manifest",
        ("float", "int8", "int16"),
        precisions=("int8", "int16x8"),
    ),
    "layout": Option(
        "order of axes of inputs and outputs: the source's, or channels last where that saves a TRANSPOSE",
        ("source", "channels_last"),
    ),
    "core": Option(
        f"the core that the firmware's build files name; {CORE} unless told",
        ("cortex-m0", "cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55"),
    ),
    "arena_margin": Option(
        f"share of the arena to add to what the host needs; {ARENA_MARGIN} unless told", kind="float"
    ),
    "flash_kb": Option("budget of 1024 bytes each for the model's data; code is not counted", kind="int"),
    "ram_kb": Option("budget of 1024 bytes each for the arena with its margin", kind="int"),
}


def probe(role: str) -> Union[Available, Unavailable]:
    if role == "run":
        return probe_modules("tflite_micro", [RUNTIME], distribution="tflite_micro")
    return probe_modules(
        "tflite_micro",
        [RUNTIME, "ai_edge_litert.interpreter", "ai_edge_quantizer"],
        found=["torch", "litert_torch"],
        distribution="tflite_micro",
    )


def lower(source: Source, directory: Path) -> Graph:
    """Return the float flatbuffer of the tflite backend: both share it, and its section of a calibration table."""
    from portcall.exporters import tflite

    return tflite.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    """Write ``model.tflite``, ``firmware/``, ``memory.json`` and ``layers.json``.

    Raises UnsupportedError for operators, types or inputs that TFLM lacks, and where a budget is exceeded.
    """
    from importlib.metadata import version

    from portcall.exporters import (
        _tflite,
        _tflite_io,
        _tflite_quantize,
        _tflm_arena,
        _tflm_firmware,
        _tflm_layers,
        _tflm_model,
        _trained_tflite,
        tflite,
    )

    options = dict(recipe.options)
    own = {name: options.pop(name, None) for name in OPTIONS}
    margin = ARENA_MARGIN if own["arena_margin"] is None else own["arena_margin"]
    if not 0 <= margin <= 10:
        raise BadInput(
            f"tflite_micro.arena_margin is {margin}", "Give a share from 0 to 10, such as 0.1 for 10 %"
        )
    flatbuffer, notes = graph.path.read_bytes(), ()  # type: Tuple[bytes, Tuple[str, ...]]
    _tflm_model.check_interface(_tflite._read(flatbuffer))
    trained = _trained_tflite.load(graph.path) if graph.source.quantized else None
    if recipe.precision != "fp32":
        flatbuffer, notes = _tflite_quantize.quantize(
            graph.path, recipe.precision, ranges, options, hybrid=False, trained=trained
        )
    flatbuffer, permutations, more = _tflite_io.with_interface(
        flatbuffer, recipe.precision, own, "tflite_micro"
    )
    notes += more
    model = _tflite._read(flatbuffer)
    operators = _tflm_model.used_operators(model)
    flatbuffer = _tflite._write(model)
    path = directory / "model.tflite"
    path.write_bytes(flatbuffer)

    sizes = _tflm_model.tensors(model)
    plenty = _tflm_arena.rounded(4 * sum(t.bytes for t in sizes) + (1 << 20))
    arena = _tflm_arena.measure(path, plenty)
    arena_bytes = _tflm_arena.rounded(arena.bytes * (1 + margin))
    _check_budget("flash", own["flash_kb"], len(flatbuffer), "model.tflite", [t for t in sizes if t.constant])
    _check_budget("ram", own["ram_kb"], arena_bytes, "the arena", [t for t in sizes if not t.constant])

    inputs, outputs = _tflite_io.bound(flatbuffer, permutations, graph.source)
    layers = _tflm_layers.compare(flatbuffer, _tflm_layers.random_inputs(model, ranges), plenty)
    said = (
        f"arena: {arena.bytes} bytes by bisection on the host ({arena.reported} reported: {arena.head} for "
        f"activations, {arena.tail} that stay), {arena_bytes} with a margin of {margin:.0%} in the firmware",
        f"arena on a 32-bit core: about {arena.estimate_32bit} bytes (estimate; reference kernels, without the "
        "scratch memory of optimized ones)",
    )
    memory = {
        "schema": 1,
        "flash": {"model_bytes": len(flatbuffer), "code": "not counted"},
        "arena": {**arena.to_json(), "margin": margin, "with_margin_bytes": arena_bytes},
        "operators": list(operators),
    }
    (directory / MEMORY).write_text(json.dumps(memory, indent=2) + "\n")
    (directory / LAYERS).write_text(json.dumps(layers, indent=2) + "\n")
    firmware = _tflm_firmware.Firmware(
        model=flatbuffer,
        methods=[_tflm_model.METHODS[name] for name in operators],
        core=own["core"] or CORE,
        arena_bytes=arena_bytes,
        arena_comment=said,
        input_bytes=sum(_tensor_bytes(t) for t in inputs),
        inputs=inputs,
        outputs=outputs,
    )
    files = (path.name, MEMORY, LAYERS, *_tflm_firmware.write(firmware, directory))
    versions = {d: version(d) for d in ("tflite_micro", *tflite._converters(graph.source.format))}
    notes = (*notes, *said, *_tflm_layers.notes(layers))
    return Exported(path.name, files, inputs, outputs, versions, notes)


def _check_budget(kind: str, budget_kb: Optional[int], needed: int, what: str, parts: List[Any]) -> None:
    """Raise UnsupportedError where *needed* bytes exceed the budget: both numbers, and the largest tensors."""
    if budget_kb is None:
        return
    if budget_kb <= 0:
        raise BadInput(f"tflite_micro.{kind}_kb is {budget_kb}", "Give a number of KB above 0")
    if needed > budget_kb * 1024:
        largest = ", ".join(f"{part.name!r} {part.bytes}" for part in parts[:3])
        advice = {
            "flash": "Use int8, prune channels, or raise the budget (code is not even counted)",
            "ram": "Use int8, a smaller input or fewer channels early on, or raise the budget",
        }[kind]
        raise UnsupportedError(
            f"the {kind} budget is {budget_kb * 1024} bytes ({kind}_kb={budget_kb}), {what} takes {needed}; "
            f"largest tensors in bytes: {largest}",
            advice,
        )


def _tensor_bytes(tensor: BoundTensor) -> int:
    import numpy as np

    count = 1
    for dim in tensor.shape:
        count *= int(dim)
    return count * np.dtype(tensor.dtype).itemsize


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _tflite

    return _tflite.census(artifact.path)


class MicroSession(Session):
    """TFLM's interpreter with its reference kernels on the host; inputs and outputs go by their signature names.

    An inference overwrites its inputs, which share the arena: ``infer`` copies them in again each time.
    """

    def __init__(self, artifact: Artifact) -> None:
        from importlib.metadata import version

        from tflite_micro.python.tflite_micro import runtime

        data = artifact.path.read_bytes()
        arena_bytes = _arena_bytes(artifact)
        self._interpreter = _run_native(
            "loading the model", lambda: runtime.Interpreter.from_bytes(data, arena_size=arena_bytes)
        )
        graph = runtime.schema_fb.Model.GetRootAsModel(data, 0).Subgraphs(0)
        names = _names(runtime, data)
        self.inputs, self.outputs = (
            tuple(_spec(names[end][index], detail(index)) for index in range(count))
            for end, count, detail in (
                ("input", graph.InputsLength(), self._interpreter.get_input_details),
                ("output", graph.OutputsLength(), self._interpreter.get_output_details),
            )
        )
        self._arrays: List[Any] = []
        self.environment = {
            "runtime": f"tflite_micro {version('tflite_micro')}",
            "threads": 1,
            "kernels": "TFLM reference kernels on the host: not a device's latency",
            "arena_bytes": arena_bytes,
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        for spec in self.inputs:
            if tuple(arrays[spec.name].shape) != spec.shape:
                raise UnsupportedError(
                    f"input {spec.name!r} has shape {arrays[spec.name].shape}, this flatbuffer only {spec.shape}",
                    "Export it again with --shape",
                )
        self._arrays = [arrays[spec.name] for spec in self.inputs]

    def infer(self) -> None:
        for index, array in enumerate(self._arrays):
            self._interpreter.set_input(array, index)
        self._interpreter.invoke()

    def memory_figures(self) -> Dict[str, int]:
        """Return the arena's size and what of it is used: head (activations), tail (what stays)."""
        import re

        printed = _printed(self._interpreter.print_allocations)
        found = re.findall(r"Arena allocation (total|head|tail) (\d+) bytes", printed)
        used = {f"arena_{part}_bytes": int(size) for part, size in found}
        return {"arena_bytes": int(self.environment["arena_bytes"]), **used}

    def get_outputs(self) -> Dict[str, Any]:
        return {spec.name: self._interpreter.get_output(i).copy() for i, spec in enumerate(self.outputs)}


def _arena_bytes(artifact: Artifact) -> int:
    """Return the arena of the artifact's firmware; for a bare file, more than enough."""
    path = artifact.directory / MEMORY
    if artifact.identity or path.is_file():
        return int(json.loads(path.read_text())["arena"]["with_margin_bytes"])
    return 10 * artifact.path.stat().st_size + (8 << 20)


def _names(runtime: Any, data: bytes) -> Dict[str, List[str]]:
    """Return the names of inputs and outputs in the subgraph's order: of the signature, else of the tensors."""
    model = runtime.convert_bytearray_to_object(data)
    graph = model.subgraphs[0]
    signature = model.signatureDefs[0] if model.signatureDefs else None
    found = {}
    for end, indices in (("input", graph.inputs), ("output", graph.outputs)):
        maps = getattr(signature, f"{end}s") if signature is not None else []
        named = {int(m.tensorIndex): m.name.decode() for m in maps}
        found[end] = [named.get(int(i), graph.tensors[int(i)].name.decode()) for i in indices]
    return found


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    import numpy as np

    return TensorSpec(name, tuple(int(d) for d in detail["shape"]), np.dtype(detail["dtype"]).name)


def _printed(function: Callable[[], Any]) -> str:
    """Return what native code prints to stdout and stderr while *function* runs."""
    import tempfile

    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            function()
        finally:
            for number, fd in enumerate(kept, 1):
                os.dup2(fd, number)
                os.close(fd)
        log.seek(0)
        return log.read().decode(errors="replace")


def _run_native(what: str, function: Callable[[], Any]) -> Any:
    """Return function(); TFLM's RuntimeError says little, its native output says why: raise CellFailed with both."""
    import tempfile

    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            return function()
        except RuntimeError as error:
            log.seek(0)
            lines = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
            ]
            raise CellFailed(
                f"TensorFlow Lite Micro failed while {what}: {error}: {' / '.join(lines[-3:]) or 'nothing printed'}",
                "Compare the installed tflite_micro with the manifest's version, or export again",
            ) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield MicroSession(artifact)


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_tflite

    return _contents_tflite.read(artifact.path)


def trace(artifact: Artifact, workload: Workload) -> ContextManager[Trace]:
    """Show the tensors of the flatbuffer in LiteRT: TFLM's interpreter shows outputs alone."""
    from portcall.exporters import _trace_tflite

    return _trace_tflite.trace(artifact, workload)


EXAMPLE = '''"""Run this artifact with TensorFlow Lite Micro alone, on the host: pip install tflite_micro numpy"""
import pathlib

import numpy
from tflite_micro.python.tflite_micro import runtime

@COMMON@


path = here / "@ENTRY@"
signature = runtime.convert_bytearray_to_object(path.read_bytes()).signatureDefs[0]
graph = runtime.convert_bytearray_to_object(path.read_bytes()).subgraphs[0]
names = {entry.tensorIndex: entry.name.decode() for entry in [*signature.inputs, *signature.outputs]}
interpreter = runtime.Interpreter.from_file(str(path), arena_size=10 * path.stat().st_size + 8 * 2**20)
for position, index in enumerate(graph.inputs):
    interpreter.set_input(samples[names[index]][0], position)
interpreter.invoke()
for position, index in enumerate(graph.outputs):
    show(names[index], interpreter.get_output(position))
'''

BACKEND = Backend(
    name="tflite_micro",
    graph="tflite",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch", "keras", "savedmodel"),
        precisions={
            "fp32": Precision("float32"),
            "int8": Precision(
                "int8 asymmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
            "int16x8": Precision(
                "int16 symmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
        },
        options=OPTIONS,
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    trace=trace,
)
