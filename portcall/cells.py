"""The cells of an export: each is exported into a hidden folder, verified, counted and moved into place."""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import portcall
from portcall import artifact as artifacts
from portcall import compression, trained
from portcall.accuracy import BudgetExceeded, check_budget
from portcall.calibrating import CalibrationOptions, observe
from portcall.calibration.table import CalibrationTable, DataRecord, Section, table_sha256
from portcall.core import (
    Artifact,
    Backend,
    BadInput,
    Cell,
    CellFailed,
    Graph,
    Outcome,
    PortcallError,
    Precision,
    Ranges,
    Recipe,
    Source,
    VerificationFailed,
    outcome_of,
)
from portcall.example import example_text
from portcall.exporters import get_backend
from portcall.ladder import climb
from portcall.plan import ExportPlan, Samples
from portcall.recipe import cell_options
from portcall.workspace import DataArgument, Workspace, lower, read_data

T = TypeVar("T")


class Cells:
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
        self._contents: dict[str, str | PortcallError] = {}

    def prepare(self, cell: Cell) -> None:
        """Lower the cell's graph and find its ranges, once per kind; raise what keeps it from being exported."""
        error = self._probing[cell.backend]
        if error is not None:
            raise error
        backend = self._backends[cell.backend]
        if self._source.quantized:
            trained.check_cell(cell, self._source)
        graph = _once(self._graphs, backend.graph, lambda: self._lower(backend))
        if backend.capabilities.precisions[cell.precision].calibrated and self._needs_ranges(graph, cell):
            section = _once(self._sections, graph.kind, lambda: self._find_section(graph, cell.backend))
            if self._plan.method == "auto":
                section.chosen(backend.capabilities.precisions[cell.precision].symmetric)

    def _needs_ranges(self, graph: Graph, cell: Cell) -> bool:
        """Tell whether calibration has to find ranges. Raises BadInput where that lacks DATA."""
        if not self._source.quantized:
            return True
        missing = trained.without_range(graph)
        if missing and self._calibration is None:
            raise BadInput(
                f"{cell}: {trained.no_range(missing)}",
                f"Give DATA to calibrate these on: portcall export {self._plan.model} --to {cell} --data DATA -o DIR",
            )
        return bool(missing)

    def ladder(self, cell: Cell, samples: Samples) -> dict[str, Any]:
        """Return the parity ladder of the artifact of *cell* (``--parity-report``): see ``portcall.ladder``."""
        graph = self._graphs[self._backends[cell.backend].graph]
        assert isinstance(graph, Graph)
        artifact, manifest = artifacts.open_artifact(self._plan.output.resolve() / cell.folder)
        return climb(self._work, artifact, manifest, graph, samples.folder, samples.packed_n or 1)

    def _lower(self, backend: Backend) -> Graph:
        return lower(self._work, self._source, backend, self._plan.equalize)

    def run(self, cell: Cell, samples: Samples, start: float) -> dict[str, Any]:
        """Export one prepared cell, verify it and move it into place; return its entry of ``results``.

        start: when work on this cell began (``time.perf_counter``).
        """
        backend = self._backends[cell.backend]
        graph = self._graphs[backend.graph]
        assert isinstance(graph, Graph)
        found = self._sections.get(graph.kind)
        precision = backend.capabilities.precisions[cell.precision]
        section = found if precision.calibrated and isinstance(found, Section) else None
        options = cell_options(cell, self._plan.options, self._plan.backend_options)
        recipe = Recipe(cell.precision, self._plan.method, options)
        staging = _staging(self._plan.output)
        try:
            exported = self._work.call(
                "portcall.stages:export",
                {
                    "backend": cell.backend,
                    "graph": graph.to_json(),
                    "recipe": recipe.to_json(),
                    "ranges": None if section is None else _plain(_ranges(section, recipe, precision)),
                    "equalize": self._plan.equalize,
                    "directory": str(staging),
                },
                f"export {cell}",
                cell.backend,
            )
            artifact = Artifact.from_json(
                {
                    **exported,
                    "directory": str(staging),
                    "backend": cell.backend,
                    "precision": cell.precision,
                    "options": options,
                }
            )
            verified = self._verify(artifact, samples)
            for sentence in (verified["eval"] or {}).get("warnings", ()):
                self._work.reporter.warn(f"{cell}: {sentence}")
            check_budget(verified["eval"], verified["parity"])
            census, kept, told = self._census(artifact, cell, graph)
            exported["notes"] = [*self._source.notes, *exported["notes"], *told]
            manifest = self._manifest(cell, recipe, graph, section, exported, verified, census, samples)
            manifest["compression"] = kept
            manifest["seconds"] = round(time.perf_counter() - start, 3)
            try:
                if samples.packed_n:
                    shutil.copyfile(samples.packed, staging / artifacts.SAMPLES)
                (staging / artifacts.EXAMPLE).write_text(
                    example_text(backend, artifact, self._source, samples.packed_n)
                )
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
            "peak_rss_bytes": max(exported["peak_rss_bytes"], graph.peak_rss_bytes),
            "parity": manifest["parity"],
            "eval": manifest["eval"],
            "arithmetic": manifest["arithmetic"],
            "compression": manifest["compression"],
            "notes": manifest["notes"],
            "trained": manifest["trained"],
        }

    def _find_section(self, graph: Graph, backend: str) -> Section:
        record = self._calibration
        if self._table is not None:
            if graph.sha256 in self._table.sections:
                section = self._table.sections[graph.sha256]
                if not section.is_complete:
                    raise BadInput(
                        f"{self._plan.table} holds {section.n} of {section.planned[1]} samples: it is a shard",
                        "Add up all shards: portcall merge PART... -o TABLE",
                    )
                return section
            if record is None:
                record = self._recorded(graph)
        assert record is not None
        options = CalibrationOptions(auto=self._plan.method == "auto", equalize=self._plan.equalize)
        onnx = None
        if options.auto and graph.kind != "onnx":  # methods are chosen on the ONNX graph
            source = get_backend("onnxruntime")
            self._work.need(source.name, "export")
            other = _once(self._graphs, source.graph, lambda: self._lower(source))
            onnx = _once(self._sections, other.kind, lambda: self._find_section(other, source.name))
        return observe(self._work, graph, backend, record, options, onnx)[0]

    def _recorded(self, graph: Graph) -> DataRecord:
        """Return the DATA that the table was made from, if it is still there and unchanged."""
        assert self._table is not None
        was = next(s.data for s in self._table.sections.values() if s.source_sha256 == graph.source.sha256)
        options = "" if graph.kind == "onnx" else f" --for {graph.kind}"
        options += " --equalize" if self._plan.equalize else ""
        fix = f"Run: portcall calibrate {self._plan.model} --data DATA{options} -o {self._plan.table}"
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

    def _verify(self, artifact: Artifact, samples: Samples) -> dict[str, Any]:
        outputs = samples.scored.place()
        job = {
            "artifact": artifact.to_json(),
            "samples": str(samples.folder),
            "outputs": outputs,
            "head": samples.packed_n,
            "threads": self._work.threads,
            "interpret": self._work.must_interpret(self._backends[artifact.backend]),
        }
        label = f"verify {artifact.backend}:{artifact.precision}"
        found: dict[str, Any] = self._work.call(
            "portcall.targets.agent.jobs:verify", job, label, artifact.backend
        )
        return {**found, "eval": samples.scored.evaluate(outputs)}

    def _census(
        self, artifact: Artifact, cell: Cell, graph: Graph
    ) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
        """Return the manifest's "arithmetic" and "compression", and notes on what could not be told."""
        notes: list[str] = []
        before: str | None = None
        try:
            if self._backends[cell.backend].contents is not None:
                before = _once(self._contents, graph.kind, lambda: self._read_source(graph))
        except PortcallError as error:
            notes.append(compression.why_not(error))
        job = {
            "artifact": artifact.to_json(),
            "shapes": {k: list(v) for k, v in self._source.example_shapes.items()},
            "before": before,
        }
        found: dict[str, Any] = self._work.call("portcall.stages:census", job, f"count {cell}", cell.backend)
        kept, unread = found.pop("compression"), found.pop("unread")
        check_integer(self._backends[cell.backend], cell, found)
        if kept is not None:
            compression.check_kept(cell, kept)
            notes += compression.notes(kept)
        return found, kept, notes if unread is None else [*notes, unread]

    def _read_source(self, graph: Graph) -> str:
        """Return the folder with the contents of the source, read once; Keras models by kind of graph."""
        folder = str(self._work.folder / f"contents-{graph.kind}")
        job = {"source": self._source.to_json(), "graph": graph.to_json(), "directory": folder}
        self._work.call("portcall.compression:read_source", job, "read weights")
        return folder

    def _manifest(
        self,
        cell: Cell,
        recipe: Recipe,
        graph: Graph,
        section: Section | None,
        exported: Mapping[str, Any],
        verified: Mapping[str, Any],
        census: Mapping[str, Any],
        samples: Samples,
    ) -> dict[str, Any]:
        calibration = None
        precision = self._backends[cell.backend].capabilities.precisions[cell.precision]
        if section is not None:
            calibration = {
                "table_sha256": None if self._plan.table is None else table_sha256(self._plan.table),
                "method": recipe.method,
                "data_sha256": section.data.sha256,
                "n": section.n,
                "ranges": {k: r.to_json()[:3] for k, r in _ranges(section, recipe, precision).items()},
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
            "min_runtime": exported["min_runtime"],
            "notes": [*exported["notes"], *samples.notes, *(verified["eval"] or {}).get("warnings", ())],
            "trained": exported["trained"],
            "arithmetic": census,
            "parity": verified["parity"],
            "eval": verified["eval"],
            "samples": {"n": samples.packed_n, "sqnr_db": verified["head_sqnr_db"]},
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _once(made: dict[str, T | PortcallError], key: str, make: Callable[[], T]) -> T:
    """Return ``made[key]``, made at the first call; an error is kept and raised again. BadInput ends the command."""
    if key not in made:
        try:
            made[key] = make()
        except BadInput:
            raise
        except PortcallError as error:
            made[key] = error
    found = made[key]
    if isinstance(found, PortcallError):
        raise found
    return found


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


def _ranges(section: Section, recipe: Recipe, precision: Precision) -> Ranges:
    return section.ranges(recipe.method, precision.symmetric, precision.bits)


def _plain(ranges: Ranges) -> dict[str, Any]:
    return {name: r.to_json() for name, r in ranges.items()}


def _absolute(spec: str) -> str:
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def failed_cell(cell: Cell, error: PortcallError, seconds: float) -> dict[str, Any]:
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
        "peak_rss_bytes": None,
        "parity": error.parity if isinstance(error, BudgetExceeded) else None,
        "eval": error.evaluation if isinstance(error, BudgetExceeded) else None,
    }
