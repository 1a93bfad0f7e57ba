"""From an ONNX file to a serialized engine: optimization profiles, the parser and builder of TensorRT and TensorRT-RTX.

The module ``tensorrt`` (8.6 and newer) or ``tensorrt_rtx`` is handed in as *trt*: their Python interfaces are one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Artifact, TensorSpec, Workload
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError

Shape = Tuple[int, ...]


class Limits(NamedTuple):
    """The shapes of one input that an engine takes: the smallest, the one it is tuned for, the largest."""

    min: Shape
    opt: Shape
    max: Shape

    def hold(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.min) and all(
            low <= d <= high for low, d, high in zip(self.min, shape, self.max)
        )


Profile = Mapping[str, Limits]
"""Input with dynamic dimensions -> its limits."""

BATCH_MAX = 8
OTHER_MAX = 4
"""Without an option "profile": the largest first dimension, and how many times the example the other ones may be."""


def parse_profile(text: str, inputs: Sequence[TensorSpec]) -> Dict[str, Limits]:
    """Return the profile that *text* gives: "x:1x3x224x224..1x3x224x224..8x3x224x224,mask:1x8..1x64..8x512".

    One shape instead of three is that shape alone. Raises BadInput for other text, an input that is not in *inputs* or
    has no dynamic dimension, one that is left out, and shapes that are no minimum, optimum and maximum of it.
    """
    known = {t.name: t for t in inputs if is_dynamic(t)}
    found: Dict[str, Limits] = {}
    for part in text.split(","):
        name, colon, shapes = part.rpartition(":")
        try:
            parsed = [tuple(int(d) for d in shape.split("x")) for shape in shapes.split("..")]
        except ValueError:
            parsed = []
        if not colon or len(parsed) not in (1, 3):
            raise BadInput(
                f"cannot read {part!r} in profile {text!r}",
                "Write INPUT:MIN..OPT..MAX, e.g. x:1x3x224x224..4x3x224x224..8x3x224x224",
            )
        if name not in known:
            raise BadInput(
                f"profile names {name!r}, which is no input with a dynamic dimension",
                f"There are: {', '.join(known) or 'none, so leave the profile out'}",
            )
        limits = Limits(*(parsed * 3 if len(parsed) == 1 else parsed))
        if not _fits(limits, known[name]):
            raise BadInput(
                f"profile {part!r} does not fit {known[name]}",
                "Keep its fixed dimensions, and minimum <= optimum <= maximum in the others",
            )
        found[name] = limits
    missing = [name for name in known if name not in found]
    if missing:
        raise BadInput(
            f"profile has no shapes for input {missing[0]!r}", "Give each dynamic input its shapes"
        )
    return found


def is_dynamic(tensor: TensorSpec) -> bool:
    return any(isinstance(d, str) for d in tensor.shape)


def _fits(limits: Limits, tensor: TensorSpec) -> bool:
    if any(len(shape) != len(tensor.shape) for shape in limits):
        return False
    return all(
        low >= 0 and low <= best <= high and (isinstance(d, str) or low == high == d)
        for low, best, high, d in zip(*limits, tensor.shape)
    )


def default_profile(inputs: Sequence[TensorSpec], examples: Mapping[str, Shape]) -> Dict[str, Limits]:
    """Return limits around the *examples* (input -> shape): from 1 up to BATCH_MAX and OTHER_MAX times the example."""
    return {t.name: _around(t, examples[t.name]) for t in inputs if is_dynamic(t)}


def _around(tensor: TensorSpec, example: Shape) -> Limits:
    dynamic = [isinstance(d, str) for d in tensor.shape]
    return Limits(
        tuple(min(1, d) if free else d for d, free in zip(example, dynamic)),
        tuple(example),
        tuple(
            (max(BATCH_MAX, d) if axis == 0 else OTHER_MAX * d) if free else d
            for axis, (d, free) in enumerate(zip(example, dynamic))
        ),
    )


def chosen_profile(
    options: Mapping[str, Any], inputs: Sequence[TensorSpec], examples: Mapping[str, Shape]
) -> Any:
    """Return the profile of a recipe: its option "profile", else the default."""
    if "profile" in options:
        return parse_profile(str(options["profile"]), inputs)
    return default_profile(inputs, examples)


def tuned_profile(profile: Profile, artifact: Artifact, workload: Workload) -> Dict[str, Limits]:
    """Return *profile* tuned for the shapes and the batch of *workload*, and widened where they lie outside of it."""
    sources = {t.name: t for t in artifact.inputs}
    tuned = {}
    for name, limits in profile.items():
        bound = sources.get(name)
        given = workload.shapes.get(bound.source if bound else name)
        best = list(limits.opt if given is None else given)
        if workload.batch > 1 and (bound is None or isinstance(bound.shape[0], str)):
            best[0] = workload.batch
        tuned[name] = Limits(
            tuple(map(min, limits.min, best)), tuple(best), tuple(map(max, limits.max, best))
        )
    return tuned


def profile_json(profile: Profile) -> Dict[str, Dict[str, List[int]]]:
    return {name: {k: list(v) for k, v in limits._asdict().items()} for name, limits in profile.items()}


def profile_from_json(data: Mapping[str, Mapping[str, Sequence[int]]]) -> Dict[str, Limits]:
    return {name: Limits(*(tuple(v[k]) for k in Limits._fields)) for name, v in data.items()}


class EngineBuilder:
    """An ONNX file as a network of *trt*, typed by its tensors where that is known (TensorRT 10 and newer, RTX).

    TensorRT 8 chooses types itself: there, precision "int8" turns its Q/DQ kernels on, and graphs that need their types
    kept are refused. Raises UnsupportedError for that, and with the names of the nodes that the parser refuses.
    """

    def __init__(self, trt: Any, path: Path, precision: str = "fp32", needs_types: bool = False) -> None:
        self._trt = trt
        self._precision = precision
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._builder = trt.Builder(self._logger)
        flags = trt.NetworkDefinitionCreationFlag
        typed: Any = getattr(flags, "STRONGLY_TYPED", None)
        batch: Any = getattr(flags, "EXPLICIT_BATCH", None)
        # 8.6 has the latter flag alone, 10 has both, RTX the former; with neither (11) every network is typed.
        self.is_typed = typed is not None or batch is None
        flag = batch if typed is None else typed
        if needs_types and not self.is_typed:
            raise UnsupportedError(
                f"TensorRT {trt.__version__} has no networks typed by their tensors, which {precision} needs",
                "Use TensorRT 10, or the fp32 artifact with trtexec --fp16",
            )
        self._network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        self._parser = trt.OnnxParser(self._network, self._logger)
        if not self._parser.parse_from_file(str(path)):
            raise self._refusal(path)
        network = self._network
        self.inputs = tuple(self._spec(network.get_input(i)) for i in range(network.num_inputs))
        self.outputs = tuple(self._spec(network.get_output(i)) for i in range(network.num_outputs))

    def _refusal(self, path: Path) -> UnsupportedError:
        errors = [self._parser.get_error(i) for i in range(self._parser.num_errors)]
        names = list(dict.fromkeys(e.node_name() or e.desc() for e in errors))
        shown = ", ".join(repr(n) for n in names[:5]) + (
            f" and {len(names) - 5} more" if len(names) > 5 else ""
        )
        return UnsupportedError(
            f"TensorRT's ONNX parser refuses {path.name} at {shown}: {errors[0].desc().rstrip('.')}",
            "Keep that node in float (keep_float), or use a newer TensorRT",
        )

    def _spec(self, tensor: Any) -> TensorSpec:
        return tensor_spec(self._trt, tensor.name, tensor.shape, tensor.dtype)

    def configure(self, config: Any) -> Any:
        """Return *config* set up: float32 stays float32, it is no TensorFloat-32."""
        config.clear_flag(self._trt.BuilderFlag.TF32)
        if not self.is_typed and self._precision == "int8":
            config.set_flag(self._trt.BuilderFlag.INT8)
        return config

    def build(self, profile: Profile, timing_cache: Optional[Path] = None) -> Any:
        """Return the serialized engine for the shapes of *profile*. Raises CellFailed without one.

        timing_cache: a file of the measured times of kernels, read if it is there and written anew: later builds on
        the same device take less time and choose the same kernels.
        """
        config = self.configure(self._builder.create_builder_config())
        cache = None
        if timing_cache is not None:
            held = timing_cache.read_bytes() if timing_cache.is_file() else b""
            cache = config.create_timing_cache(held)
            # One of another version or device is refused; it is then replaced.
            config.set_timing_cache(cache, ignore_mismatch=False)
        limits = self._builder.create_optimization_profile()
        for spec in self.inputs:
            if is_dynamic(spec):
                limits.set_shape(spec.name, *profile[spec.name])
        config.add_optimization_profile(limits)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise CellFailed("TensorRT built no engine; its log says why", "Use a newer TensorRT, or fp32")
        if timing_cache is not None and cache is not None:
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
            part = timing_cache.with_name(f"{timing_cache.name}.{os.getpid()}")
            part.write_bytes(bytes(config.get_timing_cache().serialize()))
            part.replace(timing_cache)
        return plan


def tensor_spec(trt: Any, name: str, shape: Sequence[int], dtype: Any) -> TensorSpec:
    """Return an input or output of a network or engine of *trt*; -1 becomes a named dimension."""
    import numpy as np

    dims = tuple(f"dim_{i}" if d < 0 else int(d) for i, d in enumerate(shape))
    return TensorSpec(name, dims, np.dtype(trt.nptype(dtype)).name)
