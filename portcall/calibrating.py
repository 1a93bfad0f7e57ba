"""Calibration from end to end, the parent's side: lower, plan the tap, observe, choose methods, write the table."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import portcall
import portcall.calibration
from portcall.calibration.auto import held_every, transferred, with_choices
from portcall.calibration.methods import METHODS, derive
from portcall.calibration.table import CalibrationTable, DataRecord, Section
from portcall.core import BadInput, Graph, Source
from portcall.exporters import backend_names, get_backend
from portcall.workspace import (
    DataArgument,
    Workspace,
    code_sha256,
    lower,
    open_source,
    read_data,
    with_data_shapes,
)

MEMORY_BYTES = 256 << 20
CHECKPOINTS_KEPT_S = 7 * 86400
TORCH = "torch"
"""A kind of graph that no backend lowers to: the exported program itself."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to observe.

    auto: hold samples back and choose a method per tensor on them. step: count every step-th element only.
    shard: (i, n), the i-th of n parts of the samples, from 1. memory_bytes: for the watched tensors of the samples
    that run at once. equalize: on the graph after cross-layer equalization.
    """

    auto: bool = False
    step: int = 1
    shard: tuple[int, int] = (1, 1)
    memory_bytes: int = MEMORY_BYTES
    equalize: bool = False


@dataclass(slots=True)
class CalibrationPlan:
    """Everything ``calibrate`` was asked for. kinds: backends whose graphs are tapped too, or "torch"."""

    model: str
    data: DataArgument
    output: Path
    kinds: Sequence[str] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    options: CalibrationOptions = field(default_factory=CalibrationOptions)


def run_calibrate(work: Workspace, plan: CalibrationPlan) -> tuple[CalibrationTable, list[dict[str, Any]]]:
    """Calibrate, write the table, and return it with what is to be said of each section.

    Raises BadInput before anything is run where the output cannot be written there.
    """
    _check(plan)
    names = {get_backend(n).graph: n for n in ["onnxruntime", *(k for k in plan.kinds if k != TORCH)]}
    for name in names.values():
        work.need(name, "export")
    source = open_source(work, plan.model, plan.shapes)
    record, found = read_data(work, source, plan.data, "--data")
    if record.n == 1:
        work.reporter.warn("DATA has one sample: ranges from one sample rarely hold for others")
    source = with_data_shapes(source, found, plan.shapes)
    table = CalibrationTable({})
    answers = []
    onnx: Section | None = None
    # All graphs come first: what one of them cannot take must not be found out after the work on another.
    graphs: list[tuple[Graph, str | None]] = [
        (lower(work, source, get_backend(name), plan.options.equalize), name) for name in names.values()
    ]
    if TORCH in plan.kinds:
        graphs.append((torch_graph(source), None))
    for graph, backend in graphs:
        section, answer = observe(work, graph, backend, record, plan.options, onnx)
        onnx = onnx or section
        table = table.with_section(section)
        answers.append(answer)
    table.save(plan.output)
    return table, answers


def _check(plan: CalibrationPlan) -> None:
    output = plan.output
    if not output.absolute().parent.is_dir():
        raise BadInput(f"no folder {output.absolute().parent} for the table", "Create it, or name another -o")
    if output.is_dir():
        raise BadInput(f"-o {output} is a folder", f"Name a file in it: -o {output / 'table.pctable'}")
    unknown = [k for k in plan.kinds if k != TORCH and k not in backend_names()]
    if unknown:
        get_backend(unknown[0])
    number, of = plan.options.shard
    if not 1 <= number <= of:
        raise BadInput(f"there is no shard {number}/{of}", "Write --shard 1/2, then --shard 2/2")
    if plan.options.auto and of > 1:
        raise BadInput(
            "--auto needs the whole table, and --shard makes a part of it",
            "Make the shards, merge them with portcall merge, and use another --method",
        )


def torch_graph(source: Source) -> Graph:
    """Return the exported program of a torch source as a graph to tap. Raises BadInput for other sources."""
    if source.format not in ("pt2", "torch"):
        raise BadInput(
            f"--for torch needs a torch model, and {source.spec} is {source.format}",
            "Give the torch model: package.module:factory, or a .pt2 of it",
        )
    return Graph(TORCH, source.path, source.sha256, source, {})


def observe(
    work: Workspace,
    graph: Graph,
    backend: str | None,
    record: DataRecord,
    options: CalibrationOptions,
    onnx: Section | None = None,
) -> tuple[Section, dict[str, Any]]:
    """Run the samples of *record* through *graph*; return the section of a table, and what is to be said of it.

    onnx: the section of the same model's ONNX graph, where ``auto`` has chosen its methods; other kinds take them
    over for the tensors that hold the same values.
    """
    start = time.perf_counter()
    if options.auto and not held_every(record.n):
        raise BadInput(
            "auto chooses methods on samples that are kept out of the histograms, and DATA has one sample",
            "Give two samples or more (20 are few), or choose another method",
        )
    number, of = options.shard
    shard = (record.n * (number - 1) // of, record.n * number // of)
    if shard[0] == shard[1]:
        raise BadInput(
            f"{record.n} samples cannot be cut into {of} shards", "Use fewer shards, or more samples"
        )
    plan: dict[str, Any] | None = None
    if graph.kind == "onnx":
        job: dict[str, Any] = {
            "graph": graph.to_json(),
            "shapes": record.largest,
            "budget_bytes": options.memory_bytes,
            "threads": work.threads,
        }
        plan = work.call("portcall.calibration.taps:plan_onnx", job, "plan taps", backend)
    output = work.folder / f"{graph.kind}-{graph.sha256[:16]}.pctable"
    job = {
        "graph": graph.to_json(),
        "plan": plan,
        "data": record.to_json(),
        "planned": [0, record.n],
        "shard": list(shard),
        "step": options.step,
        "held_every": held_every(record.n) if options.auto else 0,
        "threads": work.threads,
        "output": str(output),
    }
    checkpoint = _checkpoint(work, job)
    job["checkpoint"] = None if checkpoint is None else str(checkpoint)
    seen = work.call("portcall.calibration.taps:observe", job, f"calibrate {graph.kind}", backend)
    section = CalibrationTable.load(output).sections[graph.sha256]
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    if options.auto and section.held_every:
        if graph.kind == "onnx":
            section = with_choices(work, graph, backend, section)
        elif onnx is not None:
            section = transferred(section, onnx)
    fewest = min((h.n for h in section.histograms.values()), default=0)
    return section, {
        "kind": graph.kind,
        "tensors": len(section.histograms),
        "n": section.n,
        "complete": section.is_complete,
        "passes": seen["passes"],
        "at_once": plan["width"] if plan else None,
        "watched_bytes_per_sample": plan["bytes"] if plan else None,
        "memory_budget_bytes": options.memory_bytes,
        "peak_rss_bytes": seen["peak_rss_bytes"],
        "resumed_from": seen["resumed_from"],
        "step": options.step,
        "quantile_error": None
        if options.step == 1 or not fewest
        else math.sqrt(math.log(2 / 0.05) / (2 * fewest)),
        "choices": {k: {**c.to_json(), "methods": _tally(c.methods)} for k, c in section.choices.items()},
        "seconds": round(time.perf_counter() - start, 3),
    }


def _tally(methods: Mapping[str, str]) -> dict[str, int]:
    return {m: list(methods.values()).count(m) for m in sorted(set(methods.values()))}


def _checkpoint(work: Workspace, job: Mapping[str, Any]) -> Path | None:
    """Return where this very observation saves its state; None where the cache cannot be written."""
    folder = work.settings.cache / "calibration"
    key = {k: v for k, v in job.items() if k != "output"}
    key |= {"portcall": portcall.__version__, "code": code_sha256(portcall.calibration)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    for old in folder.iterdir():
        with contextlib.suppress(OSError):  # another command was first
            if time.time() - old.stat().st_mtime > CHECKPOINTS_KEPT_S:
                old.unlink()
    return folder / f"{name}.pctable"


def run_merge(parts: Sequence[Path], output: Path) -> CalibrationTable:
    """Add up the shards of one calibration and write the table: the same bytes as without shards.

    Raises BadInput where they are not shards of the same, or one is missing.
    """
    table = CalibrationTable.load(parts[0])
    for part in parts[1:]:
        table = table.merged(CalibrationTable.load(part))
    for section in table.sections.values():
        if not section.is_complete:
            held = ", ".join(f"[{a}, {b})" for a, b in section.observed)
            raise BadInput(
                f"the tables hold samples {held} of [{section.planned[0]}, {section.planned[1]})",
                "Give all shards",
            )
    table.save(output)
    return table


def run_ranges(
    path: Path, method: str, kind: str, symmetric: bool, write: str | None, output: Path | None
) -> list[dict[str, Any]]:
    """Return the range of every tensor of a table, and write them for another tool where asked to."""
    from portcall.exporters import _encodings

    if write not in (None, "qnn", "tensorrt-cache"):
        raise BadInput(f"no format {write!r} to write", "There are: qnn, tensorrt-cache")
    if (write is None) != (output is None):
        raise BadInput("--write and -o belong together", "Write e.g. --write qnn -o encodings.json")
    section = find_section(CalibrationTable.load(path), path, kind)
    symmetric = symmetric or write == "tensorrt-cache"
    ranges = section.ranges(method, symmetric)
    if output is not None:
        text = (
            _encodings.tensorrt_cache(ranges)
            if write == "tensorrt-cache"
            else json.dumps(_encodings.qnn_encodings(ranges), indent=1)
        )
        part = output.with_name(f".{output.name}.part")
        try:
            part.write_text(text)
            part.replace(output)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise BadInput(f"cannot write {output}: {error.strerror}", "Name another -o") from error
    methods = section.chosen(symmetric) if method == "auto" else dict.fromkeys(ranges, method)
    return [
        {
            "tensor": name,
            "method": methods[name],
            "minimum": r.minimum,
            "maximum": r.maximum,
            "symmetric": r.symmetric,
            "observed_minimum": section.histograms[name].minimum,
            "observed_maximum": section.histograms[name].maximum,
        }
        for name, r in ranges.items()
    ]


def find_section(table: CalibrationTable, path: Path, kind: str) -> Section:
    """Return the section of the first graph of *kind*. Raises BadInput with the kinds that there are."""
    for section in table.sections.values():
        if section.kind == kind:
            return section
    kinds = ", ".join(s.kind for s in table.sections.values()) or "none"
    raise BadInput(
        f"{path} holds no section of kind {kind!r}; it holds: {kinds}", "Choose one of these with --kind"
    )


def run_show(path: Path, tensor: str) -> dict[str, Any]:
    """Return what is known of one tensor of a table. Raises BadInput with near names for one that is not there."""
    table = CalibrationTable.load(path)
    holding = [s for s in table.sections.values() if tensor in s.histograms]
    if not holding:
        names = [n for s in table.sections.values() for n in s.histograms]
        near = difflib.get_close_matches(tensor, names, 3, 0.3) or names[:3]
        raise BadInput(
            f"{path} holds no tensor {tensor!r}, among {len(names)}",
            f"Near names: {', '.join(near)}; all of them: portcall ranges {path}",
        )
    section = min(holding, key=lambda s: s.kind != "onnx")  # most backends take their ranges from that one
    histogram = section.histograms[tensor]
    schemes = {"asymmetric": False, "symmetric": True}
    chosen = {scheme: choice.methods.get(tensor) for scheme, choice in section.choices.items()}
    return {
        "kind": section.kind,
        "tensor": tensor,
        "n": histogram.n,
        "minimum": histogram.minimum,
        "maximum": histogram.maximum,
        "counts": histogram.counts.tolist(),
        "edges": [float(histogram.edges[0]), float(histogram.edges[-1])],
        "ranges": {
            method: {
                scheme: [(r := derive(histogram, method, symmetric)).minimum, r.maximum]
                for scheme, symmetric in schemes.items()
            }
            for method in dict.fromkeys([*METHODS, *filter(None, chosen.values())])
        },
        "chosen": chosen,
    }
