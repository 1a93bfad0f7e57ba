"""Sessions of a Core ML package: Core ML itself on a Mac, the MIL interpreter elsewhere."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Artifact, BoundTensor, Session, TensorSpec


def feeds(
    inputs: Sequence[Any], names: Sequence[str], arrays: Mapping[str, Any], images: Mapping[str, Any]
) -> Dict[str, Any]:
    """Return the source's *arrays* (by source name) as the package takes them: float32, int32, pixels."""
    import numpy as np

    from portcall.exporters import _coreml

    made: Dict[str, Any] = {}
    for tensor, name in zip(inputs, names):
        source = getattr(tensor, "source", tensor.name)
        array = np.asarray(arrays[source])
        if source in images:
            made[name] = images[source].pixels(array).astype(np.float32)
        else:
            made[name] = np.atleast_1d(array.astype(_coreml.runtime_dtype(tensor.dtype)))
    return made


class CoreMlSession(Session):
    """What both runtimes share: the source's arrays are made into the package's before the timed inference."""

    def __init__(
        self, artifact: Artifact, described: Tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
    ) -> None:
        from portcall.exporters import _coreml_options

        self._images = _coreml_options.parse_images(str(artifact.options.get("image", "")))
        bare = [tuple(BoundTensor(t.name, t.name, t.shape, t.dtype) for t in specs) for specs in described]
        self._bound_inputs, self._bound_outputs = artifact.inputs or bare[0], artifact.outputs or bare[1]
        self.inputs = tuple(TensorSpec(t.name, t.shape, t.dtype) for t in self._bound_inputs)
        self.outputs = tuple(TensorSpec(t.name, t.shape, t.dtype) for t in self._bound_outputs)
        self._made: Dict[str, Any] = {}

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        by_source = {t.source: arrays[t.name] for t in self._bound_inputs}
        names = [t.name for t in self._bound_inputs]
        self._given = feeds(self._bound_inputs, names, by_source, self._images)

    def get_outputs(self) -> Dict[str, Any]:
        import numpy as np

        found: Dict[str, Any] = {}
        for tensor in self._bound_outputs:
            array = np.asarray(self._made[tensor.name])
            if not tensor.shape and array.size == 1:  # a package has no scalars
                array = array.reshape(())
            found[tensor.name] = array.astype(tensor.dtype)
        return found


class InterpretedSession(CoreMlSession):
    """The saved package in the MIL interpreter: right values, no latency that means anything."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import torch

        from portcall.exporters._mil import Program

        torch.set_num_threads(threads)
        self._program = Program(artifact.path)
        super().__init__(artifact, (self._program.inputs, self._program.outputs))
        self.environment = {
            "runtime": f"interpreted by portcall, coremltools {importlib.metadata.version('coremltools')}",
            "arithmetic": "float32, rounded to the program's type after every operator",
        }

    def infer(self) -> None:
        self._made = self._program.run(self._given)


class PredictSession(CoreMlSession):
    """Core ML itself. Unproven: written after coremltools 9.0's documentation, and run on no Mac yet."""

    def __init__(self, artifact: Artifact) -> None:
        import platform

        from portcall.exporters import _coreml_options
        from portcall.exporters._coreml_tools import coremltools
        from portcall.exporters._mil import described

        _coreml_options.check_macos(artifact.min_runtime, platform.mac_ver()[0])
        ct = coremltools()
        units = str(artifact.options.get("compute_units", "ALL"))
        wanted = getattr(ct.ComputeUnit, units)
        package = ct.models.MLModel(str(artifact.path), skip_model_load=True)
        super().__init__(artifact, described(package.get_spec()))
        compiled = artifact.finished
        if compiled is None:
            self._model = ct.models.MLModel(str(artifact.path), compute_units=wanted)
            compiled = Path(self._model.get_compiled_model_path())  # it lives as long as the model
        else:
            self._model = ct.models.CompiledMLModel(str(compiled), compute_units=wanted)
        self.environment = {
            "runtime": f"coremltools {ct.__version__}",
            "macos": platform.mac_ver()[0],
            "compute_units": units,
            "operators_by_unit": _operators_by_unit(ct, compiled, wanted),
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        super().set_inputs(arrays)
        for tensor in self._bound_inputs:
            if tensor.source in self._images:
                from PIL import Image

                pixels = self._given[tensor.name][0].astype("uint8").transpose(1, 2, 0)
                color = self._images[tensor.source].color
                ordered = (
                    pixels[..., ::-1] if color == "BGR" else pixels[..., 0] if color == "GRAY" else pixels
                )
                self._given[tensor.name] = Image.fromarray(ordered)

    def infer(self) -> None:
        self._made = self._model.predict(self._given)


def _operators_by_unit(ct: Any, compiled: Path, units: Any) -> Optional[Dict[str, int]]:
    """Return how many operators Core ML plans for each unit (CPU, GPU, NeuralEngine); None before macOS 14.4."""
    try:
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(str(compiled), compute_units=units)
    except (AttributeError, ValueError, RuntimeError):
        return None
    counts: Dict[str, int] = {}
    for operation in plan.model_structure.program.functions["main"].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None:
            unit = (
                type(usage.preferred_compute_device).__name__.replace("ComputeDevice", "").replace("ML", "")
            )
            counts[unit] = counts.get(unit, 0) + 1
    return counts
