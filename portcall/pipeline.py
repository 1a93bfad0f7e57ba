"""Export from end to end: open the source, lower it once per graph kind, calibrate, export each cell, verify it.

This is the parent's side: it plans, starts workers and moves finished folders into place. It imports no runtime.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import portcall
from portcall import artifact as artifacts
from portcall.calibration.table import (
    METHODS,
    CalibrationTable,
    DataRecord,
    Section,
    check_method,
    table_sha256,
)
from portcall.core import (
    Artifact,
    Backend,
    BadInput,
    Cell,
    CellFailed,
    Graph,
    Outcome,
    PortcallError,
    Ranges,
    Recipe,
    Source,
    VerificationFailed,
    outcome_of,
)
from portcall.exporters import get_backend
from portcall.workspace import (
    DataArgument,
    Workspace,
    lower,
    observe,
    open_source,
    read_data,
    run_reference,
    with_data_shapes,
)

SYNTHETIC_SAMPLES = 4


@dataclass(slots=True)
class ExportPlan:
    """Everything ``export`` was asked for."""

    model: str
    cells: Sequence[Cell]
    output: Path
    data: DataArgument | None = None
    evaluation: DataArgument | None = None
    table: Path | None = None
    method: str = "minmax"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def run_export(work: Workspace, plan: ExportPlan) -> list[dict[str, Any]]:
    """Export, verify and place every cell; return the ``results`` of the JSON contract, in the order asked for.

    Raises BadInput before anything is written where the input is unusable.
    """
    backends = {c.backend: get_backend(c.backend) for c in plan.cells}
    calibrated = [
        c for c in plan.cells if backends[c.backend].capabilities.precisions[c.precision].calibrated
    ]
    if calibrated and plan.data is None and plan.table is None:
        raise BadInput(
            f"{calibrated[0]} needs calibration data, and neither --data nor --table was given",
            f"Run: portcall export {plan.model} --to {calibrated[0]} --data DATA -o DIR",
        )
    check_method(plan.method)
    if plan.method not in METHODS:
        raise BadInput(f"no calibration method {plan.method!r}", f"There are: {', '.join(METHODS)}")
    table = None if plan.table is None else CalibrationTable.load(plan.table)
    if table is not None and not table.sections:
        raise BadInput(f"{plan.table} holds no section", "Calibrate again")
    probing = {name: _attempt(partial(work.probe, name, "export")) for name in backends}
    source = open_source(work, plan.model, plan.shapes)
    if table is not None:
        _check_table(plan, table, source)
    _check_output(plan.output, source)
    evaluation, calibration = _choose_samples(work, plan, source)
    source = evaluation.source
    cells = _Cells(work, plan, source, table, calibration, backends, probing)
    work.logs = plan.output / "logs"
    results = []
    samples: _Samples | None = None
    for cell in plan.cells:
        start = time.perf_counter()
        try:
            cells.prepare(cell)
            if samples is None:
                samples = _reference(work, source, evaluation)
            results.append(cells.run(cell, samples, start))
        except BadInput:
            raise
        except PortcallError as error:
            results.append(_failed(cell, error, time.perf_counter() - start))
    return results


def _attempt(action: Callable[[], None]) -> PortcallError | None:
    try:
        action()
    except PortcallError as error:
        return error
    return None


def _check_table(plan: ExportPlan, table: CalibrationTable, source: Source) -> None:
    """Refuse a table that was made from another model."""
    made_from = [s.source_sha256 for s in table.sections.values()]
    if source.sha256 not in made_from:
        raise BadInput(
            f"{plan.table} was made from another model (source sha256 {made_from[0][:12]}, "
            f"this model has {source.sha256[:12]})",
            f"Run: portcall calibrate {plan.model} --data DATA -o {plan.table}",
        )


def _check_output(output: Path, source: Source) -> None:
    """Refuse an output folder with other content than artifacts of this very model, or that cannot be made."""
    artifacts.check_output_folder(output)
    for entry in output.iterdir() if output.exists() else ():
        if entry.name in ("logs", "export.json", "bench.json", "raw") or entry.name.startswith(".portcall-"):
            continue
        if not (entry / artifacts.MANIFEST).is_file():
            raise BadInput(
                f"-o {output} has other content: {entry.name}", "Name a folder that is new or empty"
            )
        manifest = artifacts.read_manifest(entry)
        if manifest["source"]["sha256"] != source.sha256:
            raise BadInput(
                f"-o {output} holds artifacts of another model: {entry.name} came from {manifest['source']['spec']}",
                "Name a folder that is new or empty",
            )


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The samples that parity is measured on: their kind ("eval", "held-out", ...), and where they come from."""

    kind: str
    n: int
    record: DataRecord | None
    source: Source


def _choose_samples(
    work: Workspace, plan: ExportPlan, source: Source
) -> tuple[_Evaluation, DataRecord | None]:
    """Split DATA as DESIGN says: --eval, else the last 10 % of DATA, else examples, else synthetic."""
    calibration: DataRecord | None = None
    evaluation: _Evaluation | None = None
    if plan.data is not None:
        whole, found = read_data(work, source, plan.data, "--data")
        source = with_data_shapes(source, found, plan.shapes)
        calibration = whole
        if plan.evaluation is None:
            held_out = max(1, whole.n // 10)
            first = whole.n - held_out
            if first > 0:
                calibration, _ = read_data(work, source, plan.data, "calibration part", 0, first)
            else:
                work.reporter.warn("DATA has one sample: it serves for calibration and for parity alike")
            rest = replace(whole, start=first, stop=None, n=held_out)
            evaluation = _Evaluation("held-out", held_out, rest, source)
    if plan.evaluation is not None:
        record, found = read_data(work, source, plan.evaluation, "--eval")
        if plan.data is None:
            source = with_data_shapes(source, found, plan.shapes)
        evaluation = _Evaluation("eval", record.n, record, source)
    if evaluation is None:
        job = {"source": source.to_json()}
        if work.call("portcall.stages:has_examples", job, "look at examples"):
            evaluation = _Evaluation("example", 1, None, source)
        else:
            evaluation = _Evaluation("synthetic", SYNTHETIC_SAMPLES, None, source)
            missing = [t.name for t in source.inputs if t.name not in source.example_shapes]
            if missing:
                raise BadInput(
                    f"the shape of input {missing[0]!r} is dynamic",
                    f"Give --data, or --shape {missing[0]}=1x128",
                )
            work.reporter.warn(
                "no DATA: parity is measured on random inputs (synthetic); give --eval for real ones"
            )
    return replace(evaluation, source=source), calibration


def _reference(work: Workspace, source: Source, evaluation: _Evaluation) -> _Samples:
    folder = run_reference(work, source, evaluation.kind, evaluation.n, evaluation.record)
    return _Samples(folder, *_pack(folder, min(artifacts.MAX_SAMPLES, evaluation.n)))


@dataclass(frozen=True, slots=True)
class _Samples:
    """The evaluation samples with the reference's outputs, and the few of them that every artifact carries."""

    folder: Path
    packed: Path
    packed_n: int


def _pack(folder: Path, count: int) -> tuple[Path, int]:
    import numpy as np

    arrays = []
    for number in range(count):
        with np.load(folder / f"{number:06d}.npz") as stored:
            arrays.append({k: stored[k] for k in stored.files})
    path = folder / artifacts.SAMPLES
    return path, artifacts.pack_samples(arrays, path)


class _Cells:
    """Turns one cell after the other into an artifact; graphs and ranges are made once per kind and shared."""

    def __init__(
        self,
        work: Workspace,
        plan: ExportPlan,
        source: Source,
        table: CalibrationTable | None,
        calibration: DataRecord | None,
        backends: Mapping[str, Backend],
        probing: Mapping[str, PortcallError | None],
    ) -> None:
        self._work, self._plan, self._source, self._table = work, plan, source, table
        self._calibration, self._backends, self._probing = calibration, backends, probing
        self._graphs: dict[str, Graph | PortcallError] = {}
        self._sections: dict[str, Section | PortcallError] = {}

    def prepare(self, cell: Cell) -> None:
        """Raise what keeps *cell* from being exported at all; lower its graph."""
        backend = self._backends[cell.backend]
        error = self._probing[cell.backend]
        if error is not None:
            raise error
        if backend.graph not in self._graphs:
            try:
                self._graphs[backend.graph] = lower(self._work, self._source, backend)
            except BadInput:
                raise
            except PortcallError as failure:
                self._graphs[backend.graph] = failure
        graph = self._graphs[backend.graph]
        if isinstance(graph, PortcallError):
            raise graph

    def run(self, cell: Cell, samples: _Samples, start: float) -> dict[str, Any]:
        backend = self._backends[cell.backend]
        graph = self._graphs[backend.graph]
        assert isinstance(graph, Graph)
        section = None
        if backend.capabilities.precisions[cell.precision].calibrated:
            section = self._section(graph, cell.backend)
        recipe = Recipe(cell.precision, self._plan.method)
        staging = _staging(self._plan.output)
        try:
            exported = self._work.call(
                "portcall.stages:export",
                {
                    "backend": cell.backend,
                    "graph": graph.to_json(),
                    "recipe": recipe.to_json(),
                    "ranges": None if section is None else _plain(section.ranges(recipe.method)),
                    "directory": str(staging),
                },
                f"export {cell}",
                cell.backend,
            )
            artifact = Artifact.from_json(
                {**exported, "directory": str(staging), "backend": cell.backend, "precision": cell.precision}
            )
            verified = self._verify(artifact, samples)
            census = self._census(artifact, cell)
            manifest = self._manifest(cell, recipe, graph, section, exported, verified, census, samples)
            manifest["seconds"] = round(time.perf_counter() - start, 3)
            try:
                if samples.packed_n:
                    shutil.copyfile(samples.packed, staging / artifacts.SAMPLES)
                text = self._backends[cell.backend].example.replace("@ENTRY@", artifact.entry)
                (staging / artifacts.EXAMPLE).write_text(text)
                manifest = artifacts.finish(staging, self._plan.output / cell.folder, manifest)
            except OSError as error:
                raise CellFailed(
                    f"cannot write {self._plan.output}: {error.strerror}",
                    "Free space there or choose another -o",
                ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {
            "backend": cell.backend,
            "precision": cell.precision,
            "outcome": Outcome.ARTIFACT.value,
            "error_kind": None,
            "reason": None,
            "fix": None,
            "path": str(self._plan.output / cell.folder),
            "size_bytes": artifacts.model_bytes(manifest),
            "seconds": manifest["seconds"],
            "parity": manifest["parity"],
            "eval": manifest["eval"],
            "arithmetic": manifest["arithmetic"],
            "notes": manifest["notes"],
        }

    def _section(self, graph: Graph, backend: str) -> Section:
        """Return the table's section of this graph, else tap it on DATA, once per kind."""
        if graph.kind not in self._sections:
            try:
                self._sections[graph.kind] = self._find_section(graph, backend)
            except BadInput:
                raise
            except PortcallError as error:
                self._sections[graph.kind] = error
        section = self._sections[graph.kind]
        if isinstance(section, PortcallError):
            raise section
        return section

    def _find_section(self, graph: Graph, backend: str) -> Section:
        record = self._calibration
        if self._table is not None:
            if graph.sha256 in self._table.sections:
                return self._table.sections[graph.sha256]
            if record is None:
                record = self._recorded(graph)
        assert record is not None
        return observe(self._work, graph, backend, record)

    def _recorded(self, graph: Graph) -> DataRecord:
        """Return the DATA that the table was made from, if it is still there and unchanged."""
        assert self._table is not None
        was = next(s.data for s in self._table.sections.values() if s.source_sha256 == graph.source.sha256)
        fix = (
            f"Run: portcall calibrate {self._plan.model} --data DATA --for {graph.kind} -o {self._plan.table}"
        )
        try:
            now, _ = read_data(
                self._work,
                graph.source,
                DataArgument(was.spec, was.preprocess),
                "recorded DATA",
                was.start,
                was.stop,
            )
        except BadInput as error:
            raise BadInput(
                f"the table has no {graph.kind} section, and its DATA cannot be read: {error.message}", fix
            ) from error
        if now.sha256 != was.sha256:
            raise BadInput(
                f"the table has no {graph.kind} section, and its DATA {was.spec!r} has changed since", fix
            )
        return now

    def _verify(self, artifact: Artifact, samples: _Samples) -> dict[str, Any]:
        self._work.probe(artifact.backend, "run")
        job = {
            "artifact": artifact.to_json(),
            "samples": str(samples.folder),
            "head": samples.packed_n,
            "threads": os.cpu_count() or 1,
        }
        label = f"verify {artifact.backend}:{artifact.precision}"
        found: dict[str, Any] = self._work.call(
            "portcall.targets.agent.jobs:verify", job, label, artifact.backend
        )
        return found

    def _census(self, artifact: Artifact, cell: Cell) -> dict[str, Any]:
        job = {
            "artifact": artifact.to_json(),
            "shapes": {k: list(v) for k, v in self._source.example_shapes.items()},
        }
        found: dict[str, Any] = self._work.call("portcall.stages:census", job, f"count {cell}", cell.backend)
        check_integer(self._backends[cell.backend], cell, found)
        return found

    def _manifest(
        self,
        cell: Cell,
        recipe: Recipe,
        graph: Graph,
        section: Section | None,
        exported: Mapping[str, Any],
        verified: Mapping[str, Any],
        census: Mapping[str, Any],
        samples: _Samples,
    ) -> dict[str, Any]:
        calibration = None
        if section is not None:
            calibration = {
                "table_sha256": None if self._plan.table is None else table_sha256(self._plan.table),
                "method": recipe.method,
                "data_sha256": section.data.sha256,
                "n": section.data.n,
            }
        data = self._plan.data or self._plan.evaluation
        return {
            "schema": artifacts.SCHEMA,
            "portcall": portcall.__version__,
            "backend": cell.backend,
            "precision": cell.precision,
            "meaning": self._backends[cell.backend].capabilities.precisions[cell.precision].meaning,
            "recipe": recipe.to_json(),
            "entry": exported["entry"],
            "inputs": exported["inputs"],
            "outputs": exported["outputs"],
            "preprocessing": None if data is None else data.preprocess,
            "classes": None,
            "source": {
                "spec": _absolute(self._source.spec),
                "format": self._source.format,
                "sha256": self._source.sha256,
            },
            "graph_sha256": graph.sha256,
            "calibration": calibration,
            "versions": exported["versions"],
            "notes": exported["notes"],
            "arithmetic": census,
            "parity": verified["parity"],
            "eval": verified["eval"],
            "samples": {"n": samples.packed_n, "sqnr_db": verified["head_sqnr_db"]},
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def check_integer(backend: Backend, cell: Cell, census: Mapping[str, Any]) -> None:
    """Raise VerificationFailed where an integer precision holds no integer arithmetic at all."""
    if not backend.capabilities.precisions[cell.precision].integer:
        return
    nodes = census["float_nodes"]
    if census["quantize_nodes"] == 0 or (nodes and census["integer_macs"] == 0):
        shown = ", ".join(nodes[:5]) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")
        raise VerificationFailed(
            f"{cell} stayed in floating point: {shown or 'no operator was quantized'}",
            "No operator of this model can be quantized here; use fp32 or fp16",
        )


def _staging(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".portcall-", dir=output))
    except OSError as error:
        raise CellFailed(
            f"cannot write {output}: {error.strerror}", "Free space there or choose another -o"
        ) from error


def _plain(ranges: Ranges) -> dict[str, list[float]]:
    return {name: [r.minimum, r.maximum] for name, r in ranges.items()}


def _absolute(spec: str) -> str:
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def _failed(cell: Cell, error: PortcallError, seconds: float) -> dict[str, Any]:
    return {
        "backend": cell.backend,
        "precision": cell.precision,
        "outcome": outcome_of(error).value,
        "error_kind": error.kind,
        "reason": error.message,
        "fix": error.fix or None,
        "path": None,
        "size_bytes": None,
        "seconds": round(seconds, 3),
        "parity": None,
        "eval": None,
    }
