"""What the export pipeline does in workers: data checks, lowering, the reference, one export, one manifest."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration._rows import Label
from portcall.calibration.data import open_data, survey
from portcall.source import open_reference
from portcall.source_torch import flat_examples, load_program
from portcall.targets.agent import memory
from portcall.targets.agent.contract import Artifact, Graph, Range, Recipe, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, CellFailed, PortcallError

Progress = Callable[[int, int | None], None]
Arrays = dict[str, "np.ndarray[Any, Any]"]


def check_data(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Read all of DATA once: its hash, number of samples, the shapes of the first and the largest one, statistics.

    classes: the labels are to be class indices, since top-1 is measured with them.
    """
    inputs = [TensorSpec.from_json(t) for t in arguments["inputs"]]
    data = open_data(arguments["spec"], inputs, preprocess=arguments["preprocess"])
    data = data.with_slice(arguments["start"], arguments["stop"])
    if arguments["classes"]:
        data.check_classes()
    found = survey(data)
    if found.n == 0:
        raise BadInput(f"no samples in {arguments['spec']!r}", "Give at least one sample")
    return {
        "sha256": found.sha256,
        "n": found.n,
        "shapes": found.first,
        "largest": found.largest,
        "labels": data.has_labels(),
        "statistics": found.statistics,
    }


def lower(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Lower a source for one backend into a folder; the answer is the Graph, also left there as graph.json."""
    from portcall.exporters import get_backend

    directory = Path(arguments["directory"])
    with _writing(directory, "Free space there, or set PORTCALL_CACHE to another folder"):
        graph = get_backend(arguments["backend"]).lower(Source.from_json(arguments["source"]), directory)
        if arguments["equalize"]:
            from portcall.exporters import _equalize

            graph = _equalize.equalize(graph, directory)
        graph = replace(graph, peak_rss_bytes=memory.peak_rss_bytes())
        (directory / "graph.json").write_text(json.dumps(graph.to_json()))
    return graph.to_json()


@contextlib.contextmanager
def _writing(directory: Path, fix: str) -> Iterator[None]:
    """Raise CellFailed for a disk that is full; runtimes say so in words of their own, or not at all."""
    try:
        yield
    except PortcallError:
        raise
    except Exception as error:  # each runtime has its own kind for a file that it cannot write
        full = shutil.disk_usage(directory).free < 1 << 16
        if not full and not isinstance(error, OSError):
            raise
        reason = os.strerror(errno.ENOSPC) if full else getattr(error, "strerror", None) or str(error)
        raise CellFailed(f"cannot write {directory.parent}: {reason}", fix) from error


def reference(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run the source on the evaluation samples; store inputs and outputs as ``000000.npz`` and ``index.json``.

    A sample's label goes to ``000000.label.npy``.

    Raises CellFailed where the source itself gives NaN or infinity (names sample and output).
    """
    source = Source.from_json(arguments["source"])
    folder = Path(arguments["directory"])
    run = open_reference(source)
    labelled = True
    n = 0
    for arrays, label in _evaluation_samples(source, arguments):
        outputs = run(arrays)
        for name, array in outputs.items():
            if not np.all(np.isfinite(array)):
                raise CellFailed(
                    f"the source model's output {name!r} holds NaN or infinity for sample {n}",
                    "Nothing can be compared with it: check the model and its input",
                )
        stored: dict[str, Any] = {**arrays, **{f"reference/{k}": v for k, v in outputs.items()}}
        np.savez(folder / f"{n:06d}.npz", **stored)
        labelled = labelled and label is not None
        if labelled:
            np.save(folder / f"{n:06d}.label.npy", np.asarray(label))
        n += 1
        progress(n, arguments["n"])
    index = {"n": n, "labelled": labelled, "samples": arguments["samples"]}
    (folder / "index.json").write_text(json.dumps(index))
    return {"n": n}


def _evaluation_samples(
    source: Source, arguments: Mapping[str, Any]
) -> Iterator[tuple[Arrays, Label | None]]:
    record = arguments["data"]
    if record is not None:
        data = open_data(record["spec"], source.inputs, preprocess=record["preprocess"])
        for sample in data.with_slice(record["start"], record["stop"]):
            yield sample.inputs, sample.label
    elif arguments["samples"] == "example":
        yield _examples(source), None
    else:
        for seed in range(arguments["n"]):
            yield synthetic(source.inputs, source.example_shapes, seed), None


def has_examples(arguments: Mapping[str, Any], progress: Progress) -> bool:
    """Tell whether a torch source has example inputs that are worth comparing: not all constant (zeros, ones)."""
    source = Source.from_json(arguments["source"])
    if source.format not in ("pt2", "torch"):
        return False
    return any(np.ptp(a.astype(np.float64)) > 0 for a in _examples(source).values() if a.size > 1)


def _examples(source: Source) -> Arrays:
    """Return the example inputs of a torch source, cut to its example shapes where the batch is dynamic."""
    program = load_program(source.path)
    flat = [t.numpy() for t in flat_examples(program)]
    shapes = source.example_shapes
    return {
        spec.name: np.asarray(array[tuple(slice(0, d) for d in shapes[spec.name])], order="C")
        for spec, array in zip(source.inputs, flat, strict=True)
    }


def synthetic(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, tuple[int, ...]], seed: int) -> Arrays:
    """Return random inputs: standard normal floats, integers and booleans 0 or 1 (valid as any index)."""
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for spec in inputs:
        dtype = np.dtype(spec.dtype)
        values = (
            rng.standard_normal(shapes[spec.name])
            if dtype.kind == "f"
            else rng.integers(0, 2, shapes[spec.name])
        )
        made[spec.name] = values.astype(dtype)
    return made


def export(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Export one cell into a folder; return what was written. Runs in the backend's interpreter."""
    from portcall.exporters import get_backend

    backend = get_backend(arguments["backend"])
    graph = Graph.from_json(arguments["graph"])
    recipe = Recipe(**arguments["recipe"])
    ranges = arguments["ranges"]
    if ranges is not None:
        ranges = {name: Range.from_json(entry) for name, entry in ranges.items()}
    directory = Path(arguments["directory"])
    with _writing(directory, "Free space there or choose another -o"):
        exported = backend.export(graph, recipe, ranges, directory)
    missing = [name for name in exported.files if not (directory / name).is_file()]
    if missing:
        raise CellFailed(f"the exporter left no {missing[0]}", "See the log; is the disk full?")
    trained, told = None, ()  # type: dict[str, Any] | None, tuple[str, ...]
    if graph.source.quantized:
        from portcall.exporters import _trained_check

        trained, told = _trained_check.check(backend.name, graph, directory / exported.entry)
    return {
        "entry": exported.entry,
        "files": list(exported.files),
        "inputs": [t.to_json() for t in exported.inputs],
        "outputs": [t.to_json() for t in exported.outputs],
        "versions": dict(exported.versions),
        "min_runtime": exported.min_runtime,
        "peak_rss_bytes": memory.peak_rss_bytes(),
        "notes": [*exported.notes, *told, *_equalization(graph, arguments)],
        "trained": trained,
    }


def _equalization(graph: Graph, arguments: Mapping[str, Any]) -> Sequence[str]:
    if not arguments["equalize"]:
        return ()
    from portcall.exporters import _equalize

    return _equalize.notes(graph)


def census(arguments: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Count the integer arithmetic of an artifact at the shapes of its samples.

    before: a folder with the contents of the source, or None; what became of its zeros is then "compression", and
    "unread" says why that could not be told.
    """
    from portcall import compression
    from portcall.exporters import get_backend

    artifact = Artifact.from_json(arguments["artifact"])
    shapes = {k: tuple(v) for k, v in arguments["shapes"].items()}
    backend = get_backend(artifact.backend)
    answer = {**backend.census(artifact, shapes).to_json(), "compression": None, "unread": None}
    if arguments["before"] is None or backend.contents is None:
        return answer
    try:
        answer["compression"] = compression.compared(backend.contents(artifact, {}), arguments["before"])
    except Exception as error:  # of a reader: the artifact itself is not at fault, and its manifest says so
        answer["unread"] = compression.why_not(error)
    return answer


def write_inputs(arguments: Mapping[str, Any], progress: Progress) -> None:
    """Write up to 8 samples of DATA, or random ones, stacked by input name as ``samples.npz`` is."""
    inputs = tuple(TensorSpec.from_json(t) for t in arguments["inputs"])
    if arguments["data"] is not None:
        data = open_data(arguments["data"]["spec"], inputs, preprocess=arguments["data"]["preprocess"])
        samples = [s.inputs for s in data.with_slice(0, 8)]
        if not samples:
            raise BadInput(f"no samples in {arguments['data']['spec']!r}", "Give at least one sample")
        shapes = {k: v.shape for k, v in samples[0].items()}
        samples = [s for s in samples if {k: v.shape for k, v in s.items()} == shapes]
    else:
        shapes = {k: tuple(v) for k, v in arguments["shapes"].items()}
        samples = [synthetic(inputs, shapes, 0)]
    stacked: dict[str, Any] = {t.name: np.stack([s[t.name] for s in samples]) for t in inputs}
    np.savez(arguments["path"], **stacked)
