"""The per-operator profile of ExecuTorch: its ETDump, which holds XNNPACK's kernels and the operators outside.

Tried with executorch 1.5: the Python runtime's module records events in whole microseconds inside of delegates and in
nanoseconds outside. Its events have no names of layers, a program has none.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from portcall.exporters.executorch import METHOD as FORWARD
from portcall.exporters.executorch import ExecuTorchSession
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import UnavailableError
from portcall.targets.agent.profiling import Operator, Placed, Profiler

UNIT = "XNNPACK"
PORTABLE = "ExecuTorch's own kernels"
NATIVE = "native_call_"
"""Begins the name of the event of a kernel outside of delegates; OPERATOR_CALL around it also counts its set-up."""
METHOD = "ExecuTorch's ETDump: kernels inside of XNNPACK in whole microseconds, operators outside of it in nanoseconds"


class ExecuTorchProfiler(ExecuTorchSession, Profiler):
    """The session tells inputs and outputs; the same program, loaded with the event tracer, runs."""

    def __init__(self, artifact: Artifact, workload: Workload) -> None:
        from executorch.extension.pybindings import portable_lib

        super().__init__(artifact.path, workload.threads)
        self._module = portable_lib._load_for_executorch(str(artifact.path), enable_etdump=True)
        if not self._module.has_etdump():
            raise UnavailableError(
                "this ExecuTorch was built without its event tracer", "Use executorch 1.5 of PyPI"
            )
        self._outputs: Sequence[Any] = ()
        self._runs = self._dropped = 0

    def infer(self) -> None:
        self._outputs = self._module.run_method(FORWARD, self._held)

    def get_outputs(self) -> Dict[str, Any]:
        return {spec.name: value.numpy().copy() for spec, value in zip(self.outputs, self._outputs)}

    def collect(self) -> None:
        self._runs += 1

    def forget(self) -> None:
        self._dropped = self._runs

    def placed(self, numbers: Sequence[int]) -> Placed:
        operators: List[Operator] = []
        for event in self._events():
            taken = event["delegated"]
            times = event["times_ms"][-(self._runs - self._dropped) :]
            # ETDump numbers kernels of one name within a delegate: "Convert (NC) #2".
            kernel = event["name"].partition(" #")[0].replace(NATIVE, "")
            operators.append(
                Operator(
                    name=event["name"].replace(NATIVE, ""),
                    operator=kernel.split(" (")[0],
                    kernel=kernel,
                    unit=UNIT if taken else PORTABLE,
                    on_unit=taken,
                    reason=None if taken else f"XNNPACK's partitioner did not take it; {PORTABLE} run it",
                    time_ns=1e6 * sum(times[i] for i in numbers) / len(numbers),
                )
            )
        return Placed(UNIT, tuple(operators), METHOD)

    def _events(self) -> List[Mapping[str, Any]]:
        """Return {"name", "delegated", "times_ms": one per inference} of every kernel, in the order of execution."""
        with tempfile.TemporaryDirectory(prefix="portcall-profile-") as folder:
            path = Path(folder) / "profile.etdump"
            self._module.write_etdump_result_to_file(str(path), str(Path(folder) / "debug.bin"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it misses the tensors, which nobody recorded
                from executorch.devtools import Inspector

                blocks = Inspector(etdump_path=str(path)).event_blocks
        return [
            {"name": str(e.name), "delegated": bool(e.is_delegated_op), "times_ms": list(e.perf_data.raw)}
            for block in blocks
            if block.name == "Execute"
            for e in block.events
            if e.perf_data is not None and (e.is_delegated_op or str(e.name).startswith(NATIVE))
        ]
