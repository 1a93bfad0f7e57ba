"""The verbs as functions: each equals the command of its name, prints nothing and returns what ``--json`` prints.

``bench`` is called ``benchmark`` here, since ``portcall.bench`` is the package that does it.
Long because every verb is here, with its documentation.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.accuracy import Accuracy
from portcall.bench.compare import CompareOptions, run_compare
from portcall.bench.compare_saved import compare_saved, is_saved
from portcall.bench.formats import check_write, write_results
from portcall.bench.modes import Mode, get_mode
from portcall.bench.modes_run import run_mode
from portcall.bench.passes import Passes
from portcall.bench.placement import check_budgets
from portcall.bench.profile import run_profile
from portcall.bench.run import run_bench
from portcall.bench.saved import load_all
from portcall.calibrating import (
    MEMORY_BYTES,
    CalibrationOptions,
    CalibrationPlan,
    run_calibrate,
    run_merge,
    run_ranges,
    run_show,
)
from portcall.calibration.histogram import is_compiled
from portcall.core import Artifact, BadInput, PortcallError, Workload, parse_cells
from portcall.exporters import backend_names, get_backend
from portcall.inspection import run_inspect
from portcall.ladder import run_debug, write_parity
from portcall.pipeline import run_export
from portcall.plan import ExportPlan
from portcall.progress import Reporter
from portcall.recipe import backend_options, shared_options
from portcall.targets import get_target, target_names
from portcall.targets.agent.binding import source_spec, to_runtime, to_source
from portcall.targets.agent.contract import Session
from portcall.targets.agent.opening import ready
from portcall.verification import run_verify
from portcall.workspace import DataArgument, open_workspace

SCHEMA = 1
TIMEOUT_S = 1800.0

Shapes = Mapping[str, tuple[int, ...]]


def _data(spec: str | Path | None, preprocess: str | None) -> DataArgument | None:
    return None if spec is None else DataArgument(str(spec), preprocess)


def export(
    model: str | Path,
    to: str | Sequence[str],
    output: str | Path,
    *,
    data: str | Path | None = None,
    evaluation: str | Path | None = None,
    table: str | Path | None = None,
    method: str = "minmax",
    keep_float: Sequence[str] = (),
    weights: str | None = None,
    symmetric_weights: bool = True,
    bias_correction: bool = False,
    equalize: bool = False,
    parity_report: bool = False,
    options: Mapping[str, Any] | None = None,
    preprocess: str | None = None,
    shapes: Shapes | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Export *model* to every ``BACKEND:PRECISION`` in *to*, verify each, and leave artifacts in *output*.

    keep_float: layers left in float, by name, glob or "type:OPERATOR". weights: what shares a scale ("channel",
    "tensor", "group32", ...). bias_correction, equalize: see the documentation of calibration. options: of single
    backends, {"BACKEND.NAME": value}: see theirs. metric: "package.module:callable" instead of top-1. max_drop: in
    percentage points of top-1 or units of the metric; an artifact that provably loses more is a failed cell.
    parity_report: what ``debug`` finds, as "parity_report" of each artifact and in ``logs/parity.json``.
    Returns {"schema", "results": [...]}; a cell that could not be exported holds its reason and fix. Raises
    BadInput where nothing could be run at all.
    """
    output = Path(output)
    cells = parse_cells([to] if isinstance(to, str) else list(to))
    plan = ExportPlan(
        model=str(model),
        cells=cells,
        output=output,
        data=_data(data, preprocess),
        evaluation=_data(evaluation, preprocess),
        table=None if table is None else Path(table),
        method=method,
        options=shared_options(keep_float, weights, symmetric_weights, bias_correction),
        backend_options=backend_options(options or {}, cells),
        equalize=equalize,
        parity_report=parity_report,
        shapes=dict(shapes or {}),
        accuracy=Accuracy(metric, max_drop),
    )
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        results = run_export(work, plan)
        answer = {"schema": SCHEMA, "results": results, "warnings": work.reporter.warnings}
    if output.is_dir():
        with contextlib.suppress(OSError):
            if parity_report:
                write_parity(output, results)
            artifacts.write_json(output / "export.json", answer)
    return answer


def verify(
    artifact: str | Path,
    *,
    evaluation: str | Path | None = None,
    preprocess: str | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Check an artifact: every file's hash, and its outputs against the source's on its own samples.

    With *evaluation* the source model is run on that DATA and compared; metric, max_drop: as in ``export``.
    Returns {"schema", "results": [one]}.
    """
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        result = run_verify(work, Path(artifact), _data(evaluation, preprocess), Accuracy(metric, max_drop))
        return {"schema": SCHEMA, "results": [result], "warnings": work.reporter.warnings}


def inspect(
    model_or_artifact: str | Path,
    *,
    shapes: Shapes | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Return what the files of a model, an artifact or a bare file hold; what ``portcall inspect --json`` prints.

    Inputs and outputs, operators, parameters, per layer the weight's zeros, sparsity pattern, bits, scales and
    multiply-accumulates, and the size raw and compressed: see docs/inspect.md. shapes: of inputs with dynamic
    dimensions. Raises BadInput for what cannot be read.
    """
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        return {"schema": SCHEMA, **run_inspect(work, str(model_or_artifact), dict(shapes or {}))}


def debug(
    artifact: str | Path, *, timeout_s: float = TIMEOUT_S, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Compare an artifact with its source tensor by tensor, on its own samples, and name the first that diverges.

    Returns {"schema", "artifact", "outcome", "parity", "stages", "first_divergence": {"layer", "tensor", "sqnr_db",
    ...} | None, "tensors": [...], "notes"}: see the documentation of parity. Raises BadInput where the source is
    missing or has changed.
    """
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        return run_debug(work, Path(artifact))


def benchmark(
    artifacts_or_files: str | Path | Sequence[str | Path],
    *,
    target: str = "local",
    workload: Workload | None = None,
    mode: str | Mode = "latency",
    witness_pairs: int | None = None,
    data: str | Path | None = None,
    preprocess: str | None = None,
    output: str | Path | None = None,
    write: Sequence[tuple[str, str | Path]] = (),
    placement: bool = True,
    find_memory_limit: bool = False,
    min_placement: Mapping[str, float] | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure latency, memory and energy of artifacts or bare files; what ``portcall bench --json`` prints.

    mode: "latency", "throughput", "cold", "sustained", or one of ``portcall.bench.modes`` with its settings, such as
    ``Arrival(rate_per_s=100)``; its figures stand in the result's object of its name.
    witness_pairs: also run the runtime's own benchmark tool on the same file, in that many pairs with processes of
    ours: "witness" of each result, see the documentation of witness.
    find_memory_limit: also find the smallest memory limit in which each still runs (Linux, cgroups; docs/memory.md).
    placement: profile one more process of each, to tell which operators run where. min_placement: "operators" or
    "time" -> the least share (0 to 1) on the intended unit; a result below it is a failed one with error_kind "budget",
    and keeps its figures.
    output: a folder for ``bench.json`` and the raw samples. write: (format, file) pairs, as ``report`` writes them;
    "written" then lists them. Where something cannot be written, "error" stands beside the results.
    """
    for name, path in write:
        check_write(name, Path(path))
    single = isinstance(artifacts_or_files, str | Path)
    specs = [artifacts_or_files] if single else list(artifacts_or_files)  # type: ignore[arg-type]  # narrowed by single
    if witness_pairs is not None and witness_pairs < 1:
        raise BadInput(f"witness_pairs is {witness_pairs}", "Give at least 1, or None for no witness")
    chosen, wanted = (
        get_mode(mode),
        Passes(witness_pairs, placement, find_memory_limit, check_budgets(min_placement, placement)),
    )
    written: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = None if output is None else Path(output)
        if folder is None and write:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="portcall-"))) / "bench"
        with open_workspace(reporter or Reporter(False), timeout_s) as work:
            paths, given = [str(s) for s in specs], _data(data, preprocess)
            if chosen is None:
                results, unsaved = run_bench(
                    work, paths, target, workload or Workload(), given, folder, wanted
                )
            else:
                planned = workload or Workload(processes=chosen.processes)
                results, unsaved = run_mode(work, paths, target, planned, chosen, given, folder)
        if folder is not None and unsaved is None:
            try:
                for name, path in write:
                    written.append(write_results(load_all([folder]), name, Path(path)))
            except PortcallError as error:
                unsaved = error
    if output is None:
        results = [{**r, "raw": None} for r in results]  # they were kept for --write alone
    answer: dict[str, Any] = {"schema": SCHEMA, "results": results}
    if write:
        answer["written"] = written
    if unsaved is not None:
        answer["error"] = {"kind": unsaved.kind, "message": unsaved.message, "fix": unsaved.fix or None}
    return answer


def report(
    results: str | Path | Sequence[str | Path], output: str | Path, *, to: str = "html"
) -> dict[str, Any]:
    """Write what ``bench -o`` saved as a report, a plot, raw samples, or in another tool's format.

    results: folders of ``bench -o``, or files that hold what ``bench --json`` printed. to: a name in
    ``portcall.bench.formats.FORMATS``. Returns {"schema", "written": [{"format", "path", "results", "left_out"}]}.
    Raises BadInput for unusable results, an unknown format or path; UnavailableError where a package is missing.
    """
    check_write(to, Path(output))
    given = [results] if isinstance(results, str | Path) else list(results)
    return {"schema": SCHEMA, "written": [write_results(load_all(given), to, Path(output))]}


def compare(
    base: str | Path,
    candidate: str | Path,
    *,
    target: str = "local",
    options: CompareOptions | None = None,
    data: str | Path | None = None,
    preprocess: str | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Tell whether *candidate* is slower than *base* (artifacts or bare files, each optionally ``@ENV``; or both what
    ``bench -o`` saved).

    Returns what ``portcall compare --json`` prints. Raises the PortcallError of a side that cannot be measured.
    """
    chosen = options or CompareOptions()
    saved = [is_saved(str(side)) for side in (base, candidate)]
    if all(saved):
        return compare_saved(str(base), str(candidate), chosen.metric, chosen.margin)
    if any(saved):
        raise BadInput(
            "one side is a saved bench, the other is not", "Give two saved benches, or two artifacts"
        )
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        return run_compare(work, str(base), str(candidate), target, chosen, _data(data, preprocess))


def profile(
    artifact_or_file: str | Path,
    *,
    target: str = "local",
    workload: Workload | None = None,
    data: str | Path | None = None,
    preprocess: str | None = None,
    output: str | Path | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Profile an artifact or a bare file operator by operator; what ``portcall profile --json`` prints.

    output: a folder for ``profile.json``, ``profile.svg`` and ``profile.png``. Returns {"schema", "operators":
    [{"name", "operator", "kernel", "unit", "layers", "time_ns", "share", "cumulative", ...}], "coverage", "overhead",
    "placement", ...}: see the documentation of placement. Raises BadInput for what is no artifact, UnsupportedError
    for a backend that tells nothing of its operators.
    """
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        answer = run_profile(
            work,
            str(artifact_or_file),
            target,
            workload or Workload(),
            _data(data, preprocess),
            None if output is None else Path(output),
        )
    return {"schema": SCHEMA, **answer}


def calibrate(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    auto: bool = False,
    kinds: Sequence[str] = (),
    memory_bytes: int = MEMORY_BYTES,
    shard: tuple[int, int] = (1, 1),
    subsample: int = 1,
    equalize: bool = False,
    preprocess: str | None = None,
    shapes: Shapes | None = None,
    timeout_s: float = TIMEOUT_S,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run *data* through the model's canonical ONNX graph, and through the graph of each backend in *kinds*.

    kinds may hold "torch": the exported program. auto: choose a method per tensor on held-back samples. memory_bytes:
    for watched tensors. shard (i, n): only the i-th of n parts. subsample k: count every k-th value.
    Writes the table to *output*; returns {"schema", "table", "sections": [{"kind", "tensors", "n", ...}]}.
    """
    plan = CalibrationPlan(
        model=str(model),
        data=DataArgument(str(data), preprocess),
        output=Path(output),
        kinds=kinds,
        shapes=dict(shapes or {}),
        options=CalibrationOptions(auto, subsample, shard, memory_bytes, equalize),
    )
    with open_workspace(reporter or Reporter(False), timeout_s) as work:
        _, sections = run_calibrate(work, plan)
        warnings = work.reporter.warnings
    return {"schema": SCHEMA, "table": str(output), "sections": sections, "warnings": warnings}


def merge(parts: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Add up the shards of one calibration; the table is the same, bit for bit, as that of one run."""
    table = run_merge([Path(p) for p in parts], Path(output))
    sections = [{"kind": s.kind, "tensors": len(s.histograms), "n": s.n} for s in table.sections.values()]
    return {"schema": SCHEMA, "table": str(output), "sections": sections}


def ranges(
    table: str | Path,
    *,
    method: str = "minmax",
    kind: str = "onnx",
    symmetric: bool = False,
    write: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Derive the range of every tensor from a table; the model is not needed.

    write: "qnn" (quantization overrides) or "tensorrt-cache" (implies symmetric) puts them into *output*.
    Returns {"schema", "ranges": [{"tensor", "method", "minimum", "maximum", "symmetric", "observed_minimum", ...}]}.
    """
    entries = run_ranges(
        Path(table), method, kind, symmetric, write, None if output is None else Path(output)
    )
    return {"schema": SCHEMA, "table": str(table), "kind": kind, "method": method, "ranges": entries}


def show(table: str | Path, tensor: str) -> dict[str, Any]:
    """Return the histogram of one tensor of a table, and its ranges by every method.

    Returns {"schema", "kind", "tensor", "n", "minimum", "maximum", "counts", "edges", "ranges": {method:
    {"asymmetric" | "symmetric": [minimum, maximum]}}, "chosen": {scheme: method}}. Raises BadInput for an
    unknown tensor.
    """
    return {"schema": SCHEMA, "table": str(table), **run_show(Path(table), tensor)}


def doctor(*, timeout_s: float = 120.0) -> dict[str, Any]:
    """Return what can be exported and run here, with the reason and the fix where it cannot."""
    entries = []
    with open_workspace(Reporter(False), timeout_s) as work:
        for name in backend_names():
            backend = get_backend(name)
            entry: dict[str, Any] = {
                "name": name,
                "precisions": list(backend.capabilities.precisions),
                "meanings": {k: p.meaning for k, p in backend.capabilities.precisions.items()},
                "source_formats": list(backend.capabilities.source_formats),
                "options": [
                    {"name": k, "kind": o.kind, "choices": list(o.choices), "meaning": o.meaning}
                    for k, o in backend.capabilities.options.items()
                ],
            }
            for role in ("export", "run"):
                entry[role] = work.probe(name, role)
            entry["state"] = _state(entry, backend.interpret is not None)
            entries.append(entry)
    targets = [{"name": n, "description": get_target(n).description} for n in target_names()]
    return {
        "schema": SCHEMA,
        "backends": entries,
        "targets": targets,
        "calibration": {
            "kernel": "compiled" if is_compiled() else "numpy (slow)",
            "fix": None
            if is_compiled()
            else "Install a C compiler, reinstall portcall; unset PORTCALL_NO_EXTENSION",
        },
    }


def _state(entry: Mapping[str, Any], interpreter: bool) -> str:
    """Return what becomes of an export here: "run", "interpreted", "blind" (nothing can check it) or "no"."""
    if not entry["export"]["available"]:
        return "no"
    if entry["run"]["available"]:
        return "run"
    return "interpreted" if interpreter else "blind"


class LoadedArtifact:
    """An artifact in this process: ``infer`` takes and returns arrays by the source's names."""

    def __init__(self, artifact: Artifact, session: Session, stack: contextlib.ExitStack) -> None:
        self._artifact, self._session, self._stack = artifact, session, stack
        self.inputs = artifact.inputs
        self.outputs = artifact.outputs

    def infer(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs for one set of *inputs*. Raises BadInput for a wrong name or dtype."""
        arrays = {}
        names = [t.source for t in self.inputs]
        missing, unknown = [n for n in names if n not in inputs], [n for n in inputs if n not in names]
        if missing:
            raise BadInput(f"no input {missing[0]!r} given", f"Give: {', '.join(names)}")
        if unknown:
            raise BadInput(f"the model has no input {unknown[0]!r}", f"Give: {', '.join(names)}")
        for tensor in self._artifact.inputs:
            array, wanted = np.asarray(inputs[tensor.source]), source_spec(tensor).dtype
            if array.dtype != np.dtype(wanted):
                raise BadInput(
                    f"input {tensor.source!r} is {array.dtype}, not {wanted}", f"Use .astype({wanted!r})"
                )
            arrays[tensor.name] = to_runtime(tensor, array)
        self._session.set_inputs(arrays)
        self._session.infer()
        results = self._session.get_outputs()
        return {t.source: to_source(t, results[t.name]) for t in self._artifact.outputs}

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> LoadedArtifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(artifact: str | Path, *, threads: int = 1) -> LoadedArtifact:
    """Load an artifact into this process, its files checked by hash: ``portcall.load(a).infer({"x": array})``."""
    opened, _ = artifacts.open_artifact(Path(artifact).resolve())
    workload = Workload(threads=threads)
    backend, opened, _ = ready(opened, workload)
    stack = contextlib.ExitStack()
    session = stack.enter_context(backend.load(opened, workload))
    return LoadedArtifact(opened, session, stack)
