"""Sessions on QNN: a device's context, and the emulation of its processor on an x86 host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from portcall.exporters.onnxruntime import OnnxRuntimeSession


class EmulatedSession(OnnxRuntimeSession):
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


class DeviceSession(OnnxRuntimeSession):
    """A context binary, or a bare ONNX file, on the HTP of this device. Unproven: no such device was at hand."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        self.environment["context"] = path.name

    def _open(self, path: Path, options: Any) -> Any:
        import onnxruntime_qnn

        from portcall.exporters import _qnn

        provider: Mapping[str, str] = {"backend_path": str(onnxruntime_qnn.get_qnn_htp_path())}
        return _qnn.open_session(path, options, provider)
