"""Sessions on QNN: a device's context, and the emulation of its processor on an x86 host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from portcall.exporters.onnxruntime import OnnxRuntimeSession
from portcall.targets.agent.errors import UnsupportedError


class FixedSession(OnnxRuntimeSession):
    """model.onnx on ONNX Runtime's CPU, and what all sessions here share: inputs have one shape."""

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        for spec in self.inputs:
            if tuple(arrays[spec.name].shape) != spec.shape:
                raise UnsupportedError(
                    f"input {spec.name!r} has shape {tuple(arrays[spec.name].shape)}, this artifact only {spec.shape}",
                    f"Give that shape, or export with --shape {spec.name}="
                    + "x".join(map(str, arrays[spec.name].shape)),
                )
        super().set_inputs(arrays)


class EmulatedSession(FixedSession):
    """A context binary as the HTP of its architecture computes it, emulated: for parity, never for a latency.

    The emulation rounds as the architecture of the context does, whatever the provider's options name.
    """

    def __init__(self, path: Path, threads: int, architecture: str) -> None:
        self._architecture = architecture
        super().__init__(path, threads)
        self.environment["arithmetic"] = f"x86 emulation of HTP v{architecture}"
        self.environment["context"] = path.name

    def _open(self, path: Path, options: Any) -> Any:
        from portcall.exporters import _qnn

        return _qnn.open_session(path, options, _qnn.provider_options(self._architecture))


class DeviceSession(FixedSession):
    """A context binary, or a bare ONNX file, on the HTP of this device. Unproven: no such device was at hand."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        self.environment["context"] = path.name

    def _open(self, path: Path, options: Any) -> Any:
        import onnxruntime_qnn

        from portcall.exporters import _qnn

        provider: Mapping[str, str] = {"backend_path": str(onnxruntime_qnn.get_qnn_htp_path())}
        return _qnn.open_session(path, options, provider)
