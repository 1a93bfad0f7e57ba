"""What NVIDIA's management library tells: GPU memory of this process, and the energy counters of the GPUs.

Needs the package nvidia-ml-py (module ``pynvml``) and the driver. Everything else is Absent with a reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple, Union


@dataclass(frozen=True)
class Absent:
    """A figure that this machine does not tell: why, and what changes it ("" for nothing)."""

    reason: str
    fix: str = ""

    def to_json(self) -> Dict[str, Any]:
        return {"available": False, "reason": self.reason, "fix": self.fix or None}


def open_library() -> Union[Any, Absent]:
    """Return the module ``pynvml``, initialised, or Absent."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]  # optional
    except ImportError:
        return Absent(
            "nvidia-ml-py is not installed", "On a machine with an NVIDIA GPU: pip install nvidia-ml-py"
        )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Absent("NVML cannot be used: %s" % error, "Check nvidia-smi")
    return pynvml


def handles(library: Any) -> List[Tuple[int, Any]]:
    """Return (index, handle) of every GPU."""
    return [(i, library.nvmlDeviceGetHandleByIndex(i)) for i in range(library.nvmlDeviceGetCount())]


def process_memory() -> Union[int, Absent]:
    """Return the bytes of GPU memory that this process holds, over all GPUs; context and libraries included.

    0 means that it holds none. Absent where NVML is missing or the driver does not tell it per process (as in some
    containers, where process ids differ, and under MIG).
    """
    library = open_library()
    if isinstance(library, Absent):
        return library
    total = 0
    try:
        for _, handle in handles(library):
            for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid():
                    if process.usedGpuMemory is None:
                        return Absent(
                            "the driver does not tell GPU memory per process (MIG, or Windows' WDDM)"
                        )
                    total += int(process.usedGpuMemory)
    except library.NVMLError as error:
        return Absent("NVML does not tell GPU memory per process: %s" % error)
    finally:
        library.nvmlShutdown()
    return total
