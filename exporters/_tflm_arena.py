"""How much memory TensorFlow Lite Micro needs for a model: by running its interpreter with arenas of many sizes.

An arena that is far too small makes the interpreter crash and not raise, so that every try is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from portcall.targets.agent.errors import CellFailed

ALIGNMENT = 16
TIMEOUT_S = 900
TRY_S = 120

_POINTERS = ("TfLiteEvalTensor data", "Persistent TfLiteTensor data", "NodeAndRegistration struct")
"""Parts of the arena that are nearly all pointers: half as large where a pointer has 32 bits."""

_CHILD = """
import json, sys
job = json.load(sys.stdin)
sys.path[:] = job["path"]
from portcall.exporters._tflm_arena import _answer
print(json.dumps(_answer(job)))
"""


@dataclass(frozen=True)
class Arena:
    """What a model's arena takes on the host, in bytes.

    bytes: the smallest multiple of 16 that works, by bisection. reported: what the interpreter says that it uses,
    head (activations and scratch) + tail (what lives as long as the interpreter). parts: of the tail, by name.
    estimate_32bit: what *bytes* would be where a pointer has 32 bits: an estimate.
    """

    bytes: int
    reported: int
    head: int
    tail: int
    parts: Mapping[str, int]
    estimate_32bit: int

    def to_json(self) -> Dict[str, Any]:
        return {
            "bytes": self.bytes,
            "method": "bisection with TFLM's interpreter and reference kernels on the host (64-bit pointers)",
            "reported_bytes": self.reported,
            "head_bytes": self.head,
            "tail_bytes": self.tail,
            "parts": dict(self.parts),
            "estimate_32bit_bytes": self.estimate_32bit,
        }


def measure(model: Path, largest: int) -> Arena:
    """Return the arena that *model* needs, up to *largest* bytes.

    Raises CellFailed with TFLM's own words where it does not run at all.
    """
    answer = _ask({"model": str(model), "largest": rounded(largest)})
    if answer["reason"]:
        raise CellFailed(
            f"TensorFlow Lite Micro does not run this model: {answer['reason']}",
            "Replace the layer that it names, or export to tflite",
        )
    sizes = {"total": 0, "head": 0, "tail": 0}
    for name, size in re.findall(r"Arena allocation (total|head|tail) (\d+) bytes", answer["allocations"]):
        sizes[name] = int(size)
    parts = {
        name: int(size) for name, size in re.findall(r"'([^']+)' used (\d+) bytes", answer["allocations"])
    }
    saved = sum(parts.get(name, 0) // 2 for name in _POINTERS)
    return Arena(
        answer["bytes"],
        sizes["total"],
        sizes["head"],
        sizes["tail"],
        parts,
        rounded(answer["bytes"] - saved),
    )


def failures(model: Path, sizes: Sequence[int]) -> List[Optional[str]]:
    """Return for each arena size why *model* does not run with it, None where it does."""
    return [reason or None for reason in _ask({"model": str(model), "sizes": list(sizes)})["reasons"]]


def rounded(size: float) -> int:
    """Return *size* rounded up to a multiple of the arena's alignment."""
    return -(-int(-(-size // 1)) // ALIGNMENT) * ALIGNMENT


def _ask(job: Mapping[str, Any]) -> Dict[str, Any]:
    """Let a process of its own do *job*: one thread, so that it may fork, and nothing else to lose."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps({**job, "path": sys.path}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CellFailed(
            f"finding the arena took longer than {TIMEOUT_S} s", "Export a smaller model"
        ) from error
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CellFailed(f"TensorFlow Lite Micro could not be asked for its arena: {tail}", "portcall doctor")
    answer: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(job: Mapping[str, Any]) -> Dict[str, Any]:
    """Do one job in the child process."""
    model = Path(job["model"]).read_bytes()
    if "sizes" in job:
        return {"reasons": [_attempt(model, size)[0] for size in job["sizes"]]}
    largest = job["largest"]
    reason, printed = _attempt(model, largest)
    if reason:
        return {"reason": reason}
    low, high = 0, largest // ALIGNMENT  # in units of the alignment: low fails, high works
    reported = re.search(r"Arena allocation total (\d+) bytes", printed)
    if reported:
        near = int(reported.group(1)) // ALIGNMENT
        for guess in (near + 64, near):  # so that few tries are far off
            if low < guess < high:
                low, high = (guess, high) if _attempt(model, guess * ALIGNMENT)[0] else (low, guess)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _attempt(model, middle * ALIGNMENT)[0] else (low, middle)
    return {"reason": "", "bytes": high * ALIGNMENT, "allocations": printed}


def _attempt(model: bytes, size: int) -> "tuple[str, str]":
    """Run one inference on zeros in a forked process; return why it failed ("" where not) and what was printed."""
    import tempfile

    import tflite_micro.python.tflite_micro.runtime  # noqa: F401  # once, here: the forks share it

    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(TRY_S)
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                _run(model, size)
                code = 0
            except Exception as error:  # the parent reads it; the kinds are the runtime's own
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        printed = log.read().decode(errors="replace")
    if status == 0:
        return "", printed
    ended = f"killed by signal {status & 127}" if status & 127 else "failed"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or ended, printed


def _run(model: bytes, size: int) -> None:
    import numpy as np
    from tflite_micro.python.tflite_micro import runtime

    interpreter = runtime.Interpreter.from_bytes(model, arena_size=size)
    graph = runtime.schema_fb.Model.GetRootAsModel(model, 0).Subgraphs(0)
    for index in range(graph.InputsLength()):
        detail = interpreter.get_input_details(index)
        interpreter.set_input(np.zeros(detail["shape"], detail["dtype"]), index)
    interpreter.invoke()
    interpreter.print_allocations()
