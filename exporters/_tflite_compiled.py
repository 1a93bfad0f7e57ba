"""LiteRT's CompiledModel, the interface that its own benchmark tool uses, as a Session for ``bench --witness``.

It reads inputs from and writes outputs to buffers of its own; an Interpreter holds them in its arena. On the CPU both
run XNNPACK.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping

from portcall.targets.agent.contract import Session, TensorSpec, Workload
from portcall.targets.agent.errors import UnsupportedError


class CompiledModelSession(Session):
    """A CompiledModel on the CPU; inputs and outputs go by their signature names. ai-edge-litert 2.3 or newer."""

    def __init__(self, path: Path, workload: Workload) -> None:
        from importlib.metadata import version

        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.environment import Environment, EnvironmentOptions
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import CpuOptions, Options

        options = Options(
            hardware_accelerators=HardwareAccelerator.CPU,
            cpu_options=CpuOptions(num_threads=workload.threads),
        )
        self._environment = Environment.create(options=EnvironmentOptions())
        self._model = CompiledModel.from_file(str(path), environment=self._environment, options=options)
        self._key = next(iter(self._model.get_signature_list()), "serving_default")
        self._details = self._model.get_input_tensor_details(self._key)
        outputs = self._model.get_output_tensor_details(self._key)
        self.inputs = tuple(_spec(n, d) for n, d in self._details.items())
        self.outputs = tuple(_spec(n, d) for n, d in outputs.items())
        self._read = {n: self._model.create_input_buffer_by_name(self._key, n) for n in self._details}
        self._written = {n: self._model.create_output_buffer_by_name(self._key, n) for n in outputs}
        self.environment = {
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
            "threads": workload.threads,
            "delegate": "XNNPACK",
            "api": "CompiledModel",
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        for spec in self.inputs:
            if tuple(arrays[spec.name].shape) != spec.shape:
                raise UnsupportedError(
                    f"input {spec.name!r} has shape {arrays[spec.name].shape}, this flatbuffer only {spec.shape}",
                    "Export it again with --shape",
                )
            self._read[spec.name].write(arrays[spec.name])

    def infer(self) -> None:
        self._model.run_by_name(self._key, self._read, self._written)

    def get_outputs(self) -> Dict[str, Any]:
        import numpy as np

        found = {}
        for spec in self.outputs:
            shape = tuple(int(d) for d in spec.shape)
            flat = np.asarray(self._written[spec.name].read(int(np.prod(shape)), np.dtype(spec.dtype).type))
            found[spec.name] = flat.reshape(shape).copy()
        return found


def _spec(name: str, detail: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name, tuple(int(d) for d in detail["shape"]), str(detail["dtype"]))
