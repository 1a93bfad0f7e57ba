"""The profile of a TensorRT engine: its IProfiler's time of each layer, and what the engine inspector tells of it.

*trt* is ``tensorrt`` or ``tensorrt_rtx``. Unproven: written after NVIDIA's documentation (IProfiler, EngineInspector)
and run on no GPU yet; tests run it on stand-ins.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.exporters._tensorrt_session import EngineSession, Rebuild
from portcall.targets.agent.contract import Artifact
from portcall.targets.agent.profiling import Operator, Placed, Profiler, Times

GPU, INT8 = "GPU", "GPU, int8 layers"
MOVING = ("Reformat", "NoOp", "Constant", "Shuffle", "Signal", "Wait", "Myelin")
"""How types of layers begin that move data, or whose arithmetic the inspector does not tell."""
METHOD = "TensorRT's IProfiler: GPU time of each layer of the engine; what a layer is by the engine inspector"


class EngineProfiler(EngineSession, Profiler):
    """An engine with an IProfiler; launched layer by layer, since a CUDA graph reports no layers."""

    def __init__(
        self, trt: Any, cuda: Any, plan: Any, artifact: Artifact, origin: str, rebuild: Optional[Rebuild]
    ) -> None:
        self._as_graph = bool(artifact.options.get("cuda_graph"))
        self._precision = artifact.precision
        self._watch = _watch(trt)
        without = replace(artifact, options={**artifact.options, "cuda_graph": False})
        super().__init__(trt, cuda, plan, without, origin, rebuild)
        self.forget()

    def _load(self, plan: Any) -> None:
        super()._load(plan)
        self._context.profiler = self._watch

    def forget(self) -> None:
        self._times = Times()
        self._watch.row = {}

    def collect(self) -> None:
        self._times.rows.append(self._watch.row)
        self._watch.row = {}

    def placed(self, numbers: Sequence[int]) -> Placed:
        told = _layers(self._trt, self._engine, self._context)
        is_integer = self._precision == "int8" and any(_types(layer) for layer in told.values())
        operators: List[Operator] = []
        for name in dict.fromkeys(n for row in self._times.rows for n in row):
            layer = told.get(name, {})
            reason = _reason(layer) if is_integer else None
            operators.append(
                Operator(
                    name=name,
                    operator=str(layer.get("LayerType", "layer")),
                    kernel=layer.get("TacticName") or None,
                    unit=GPU,
                    on_unit=reason is None,
                    reason=reason,
                    layers=tuple(name.split(" + ")),
                    time_ns=self._times.mean(name, numbers),
                )
            )
        notes = []
        if self._precision == "int8" and not is_integer:
            notes.append("the engine was built without detailed layers: which of them are on int8 is unknown")
        if self._as_graph:
            notes.append(
                "profiled without the CUDA graph that bench launches: gaps between layers are larger"
            )
        return Placed(INT8 if is_integer else GPU, tuple(operators), METHOD, notes=tuple(notes))


def _watch(trt: Any) -> Any:
    """Return an IProfiler that adds up the ns of each layer in its *row*."""

    class Watch(trt.IProfiler):  # type: ignore[misc]  # a class of a package that is handed in
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.row: Dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.row[layer_name] = self.row.get(layer_name, 0.0) + 1e6 * ms

    return Watch()


def _layers(trt: Any, engine: Any, context: Any) -> Dict[str, Mapping[str, Any]]:
    """Return what the inspector tells of each layer by name; of an engine built without details, names alone."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return {
        (str(layer["Name"]) if isinstance(layer, dict) else str(layer)): (
            layer if isinstance(layer, dict) else {}
        )
        for layer in told.get("Layers", [])
    }


def _types(layer: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return the types of a layer's inputs: "Int8 NHWC ..." of "Format/Datatype" (older) or "Format" and "Datatype"."""
    ends = [e for e in layer.get("Inputs", []) if isinstance(e, dict)]
    return tuple(str(e.get("Format/Datatype") or e.get("Datatype") or e.get("Format") or "") for e in ends)


def _reason(layer: Mapping[str, Any]) -> Optional[str]:
    types = _types(layer)
    if not types or str(layer.get("LayerType", "")).startswith(MOVING):
        return None
    if any("int8" in t.lower() for t in types):
        return None
    return f"its inputs are {types[0]}, none of them int8"
