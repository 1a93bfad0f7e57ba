"""Export from end to end: open the source, lower it once per graph kind, calibrate, export each cell, verify it.

This is the parent's side: it plans, starts workers and moves finished folders into place. It imports no runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from portcall import artifact as artifacts
from portcall import trained
from portcall.accuracy import Accuracy, Scored
from portcall.calibration.input_statistics import compare
from portcall.calibration.methods import check_method
from portcall.calibration.table import CalibrationTable, DataRecord
from portcall.cells import Cells, failed_cell
from portcall.core import BadInput, PortcallError, Source
from portcall.exporters import get_backend
from portcall.plan import ExportPlan, Samples
from portcall.workspace import Workspace, open_source, read_data, run_reference, with_data_shapes

SYNTHETIC_SAMPLES = 4


def run_export(work: Workspace, plan: ExportPlan) -> list[dict[str, Any]]:
    """Export, verify and place every cell; return the ``results`` of the JSON contract, in the order asked for.

    Raises BadInput before anything is written where the input is unusable.
    """
    backends = {c.backend: get_backend(c.backend) for c in plan.cells}
    calibrated = [
        c for c in plan.cells if backends[c.backend].capabilities.precisions[c.precision].calibrated
    ]
    check_method(plan.method)
    plan.accuracy.check()
    table = None if plan.table is None else CalibrationTable.load(plan.table)
    if table is not None and not table.sections:
        raise BadInput(f"{plan.table} holds no section", "Calibrate again")
    probing = {name: _attempt(partial(work.need, name, "export")) for name in backends}
    source = open_source(work, plan.model, plan.shapes)
    if source.quantized:
        trained.check_plan(plan, source)
    elif calibrated and plan.data is None and plan.table is None:
        raise BadInput(
            f"{calibrated[0]} needs calibration data, and neither --data nor --table was given",
            f"Run: portcall export {plan.model} --to {calibrated[0]} --data DATA -o DIR",
        )
    if table is not None:
        _check_table(plan, table, source)
    _check_output(plan.output, source)
    evaluation, calibration = _choose_samples(work, plan, source)
    source = evaluation.source
    cells = Cells(work, plan, source, table, calibration, backends, probing)
    work.logs = plan.output / "logs"
    # All that can turn out to be bad input comes before the first artifact.
    errors = {cell: _attempt(partial(cells.prepare, cell)) for cell in plan.cells}
    samples: Samples | PortcallError | None = None
    results = []
    for cell in plan.cells:
        start = time.perf_counter()
        try:
            if (error := errors[cell]) is not None:
                raise error
            if samples is None:
                samples = _reference(work, source, evaluation, plan.accuracy)
            if isinstance(samples, PortcallError):
                raise samples
            results.append(cells.run(cell, samples, start))
            if plan.parity_report:
                results[-1]["parity_report"] = cells.ladder(cell, samples)
        except PortcallError as error:
            # What no check before could see ends the command as long as nothing was written.
            if isinstance(error, BadInput) and not any(r["path"] for r in results):
                raise
            results.append(failed_cell(cell, error, time.perf_counter() - start))
    return results


def _attempt(action: Callable[[], None]) -> PortcallError | None:
    """Return the error that *action* ends in, for the cells that it concerns; bad input ends the whole command."""
    try:
        action()
    except BadInput:
        raise
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
    notes: tuple[str, ...] = ()


def _choose_samples(
    work: Workspace, plan: ExportPlan, source: Source
) -> tuple[_Evaluation, DataRecord | None]:
    """Split DATA as DESIGN says: --eval, else the last 10 % of DATA, else examples, else synthetic."""
    calibration: DataRecord | None = None
    evaluation: _Evaluation | None = None
    whole_found: dict[str, Any] = {}
    labels = False
    classes = plan.accuracy.metric is None
    if plan.data is not None:
        whole, found = read_data(
            work, source, plan.data, "--data", classes=classes and plan.evaluation is None
        )
        whole_found, labels = found, found["labels"]
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
        record, found = read_data(work, source, plan.evaluation, "--eval", classes=classes)
        labels = found["labels"]
        if plan.data is None:
            source = with_data_shapes(source, found, plan.shapes)
        notes = compare(whole_found.get("statistics", {}), found["statistics"])
        evaluation = _Evaluation("eval", record.n, record, source, tuple(notes))
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
    sentence = plan.accuracy.check_labels(evaluation.kind, labels)
    for warning in (*evaluation.notes, *([] if sentence is None else [sentence])):
        work.reporter.warn(warning)
    return replace(evaluation, source=source), calibration


def _reference(
    work: Workspace, source: Source, evaluation: _Evaluation, accuracy: Accuracy
) -> Samples | PortcallError:
    """Run the source on the evaluation samples and score it; an error there is every cell's."""
    try:
        folder = run_reference(work, source, evaluation.kind, evaluation.n, evaluation.record)
        scored = Scored(work, source, accuracy, folder)
    except BadInput:
        raise
    except PortcallError as error:
        return error
    for sentence in scored.warnings:
        work.reporter.warn(sentence)
    packed, packed_n = _pack(folder, min(artifacts.MAX_SAMPLES, evaluation.n))
    return Samples(folder, packed, packed_n, scored, (*evaluation.notes, *scored.warnings))


def _pack(folder: Path, count: int) -> tuple[Path, int]:
    import numpy as np

    arrays = []
    for number in range(count):
        with np.load(folder / f"{number:06d}.npz") as stored:
            arrays.append({k: stored[k] for k in stored.files})
    path = folder / artifacts.SAMPLES
    return path, artifacts.pack_samples(arrays, path)
