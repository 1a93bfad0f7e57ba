"""``portcall inspect``: what the files of a model, an artifact or a bare file hold. Workers read them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from portcall import artifact as artifacts
from portcall.bench.report import ABSENT, align
from portcall.core import Artifact, BadInput, Source, UnavailableError
from portcall.exporters import get_backend
from portcall.source import classify, fits, single_sample_shape
from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import TensorSpec
from portcall.workspace import Workspace, lower, open_source

READERS: Mapping[str, str] = {
    ".onnx": "onnxruntime",
    ".tflite": "tflite",
    ".xml": "openvino",
    ".mlpackage": "coreml",
}
"""Suffix of a bare file -> the backend that reads it."""
ENGINES = (".engine", ".plan", ".mlmodelc")
KINDS = "an artifact folder, .onnx, .tflite, .xml, .mlpackage, .pt2, .keras, a SavedModel or package.module:factory"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is inspected: an artifact or a bare file that a backend reads, or a source (artifact is None)."""

    spec: str
    kind: str
    artifact: Artifact | None
    files: tuple[Path, ...] = ()


def run_inspect(work: Workspace, spec: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what *spec* holds: the keys of ``portcall inspect --json`` without "schema" (docs/inspect.md).

    shapes: of inputs with dynamic dimensions. Raises BadInput for what cannot be read, UnavailableError without the
    package that reads it.
    """
    subject = _open(spec)
    if subject.artifact is None:
        found = _inspect_source(work, subject, shapes)
    else:
        job = {
            "artifact": subject.artifact.to_json(),
            "files": [str(f) for f in subject.files],
            "shapes": {k: list(v) for k, v in shapes.items()},
        }
        found = work.call("portcall.inspection:read_artifact", job, "inspect", subject.artifact.backend)
    unknown = sorted(set(shapes) - {t["name"] for t in found["inputs"]} - _sources(subject.artifact))
    if unknown:
        names = ", ".join(t["name"] for t in found["inputs"]) or "none"
        raise BadInput(f"--shape names no input {unknown[0]!r}", f"The inputs are: {names}")
    return {
        "path": spec,
        "kind": subject.kind,
        "backend": None
        if subject.artifact is None or subject.kind != "artifact"
        else subject.artifact.backend,
        "precision": None
        if subject.artifact is None or subject.kind != "artifact"
        else subject.artifact.precision,
        **found,
    }


def _sources(artifact: Artifact | None) -> set[str]:
    return set() if artifact is None else {t.source for t in artifact.inputs}


def _open(spec: str) -> _Subject:
    path = Path(spec)
    if path.is_dir() and (path / artifacts.MANIFEST).exists():
        artifact, manifest = artifacts.open_artifact(path.resolve())
        if get_backend(artifact.backend).contents is None:
            raise BadInput(
                f"{spec} is of backend {artifact.backend}, which holds no weights", f"Give {KINDS}"
            )
        entry = manifest["entry"]
        loaded = (entry, entry + ".data", Path(entry).with_suffix(".bin").name)
        files = [n for n in manifest["files"] if n in loaded or n.startswith(entry + "/")]
        return _Subject(spec, "artifact", artifact, tuple(artifact.directory / n for n in sorted(files)))
    if path.suffix in ENGINES and path.exists():
        raise BadInput(
            f"{spec} was built for one device: nothing but its runtime reads it",
            "Inspect what it was built from",
        )
    if path.suffix in READERS and path.exists() and (path.is_dir() == (path.suffix == ".mlpackage")):
        whole = path.resolve()
        backend = READERS[path.suffix]
        bare = Artifact(whole.parent, whole.name, backend, "as is")
        return _Subject(spec, "file", bare, tuple(_files(whole)))
    if path.is_dir() and not (path / "saved_model.pb").is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{artifacts.MANIFEST}"))
        fix = f"Give one of them: {', '.join(str(path / n) for n in inside)}" if inside else f"Give {KINDS}"
        raise BadInput(f"{spec} is no artifact: it has no {artifacts.MANIFEST}", fix)
    if not path.exists() and path.suffix in (*READERS, *ENGINES):
        raise BadInput(f"no file {spec!r}", f"Give {KINDS}")
    try:
        classify(spec)
    except BadInput as error:
        raise BadInput(f"cannot inspect {spec!r}: {error.message}", f"Give {KINDS}") from error
    return _Subject(spec, "source", None)


def _files(path: Path) -> list[Path]:
    """Return the files of a bare model, with those of its weights beside it."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    beside = {".xml": path.with_suffix(".bin"), ".onnx": path.with_name(path.name + ".data")}.get(path.suffix)
    return [path, *([beside] if beside is not None and beside.is_file() else [])]


def _inspect_source(
    work: Workspace, subject: _Subject, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Inspect a torch or Keras source: opening it runs its code, in a worker."""
    source = open_source(work, subject.spec, shapes)
    graph = None
    if source.format in ("keras", "savedmodel"):
        backend = get_backend("tflite")
        work.need(backend.name, "export")
        graph = lower(work, source, backend).to_json()
    job = {"source": source.to_json(), "graph": graph}
    found: dict[str, Any] = work.call("portcall.inspection:read_source", job, "inspect")
    return found


# What runs in workers.


def read_artifact(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Read the files of an artifact or a bare model by its backend; the answer is part of ``inspect --json``."""
    artifact = Artifact.from_json(arguments["artifact"])
    given = {k: tuple(v) for k, v in arguments["shapes"].items()}
    read = get_backend(artifact.backend).contents
    assert read is not None
    try:
        described = read(artifact, {})
        specs = artifact.inputs or described.inputs
        shapes = _shapes([TensorSpec(_name(t), t.shape, t.dtype) for t in specs], given)
        contents = read(artifact, shapes) if shapes else described
    except ImportError as error:
        raise UnavailableError(
            f"reading {artifact.path.name} needs a package: {error}",
            f"pip install 'portcall[{artifact.backend}]'",
        ) from error
    if not shapes and specs and contents.macs is None:
        unknown = f"no multiply-accumulates: the shape of input {_name(specs[0])!r} is dynamic; give --shape"
        contents = replace(contents, notes=(*contents.notes, unknown))
    return _answer(contents, [Path(f) for f in arguments["files"]])


def _name(tensor: Any) -> str:
    return str(getattr(tensor, "source", tensor.name))


def _shapes(specs: Sequence[TensorSpec], given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input that is known: as given, else of one sample.

    Raises BadInput for one that does not fit its input.
    """
    found: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        shape = given.get(spec.name, single_sample_shape(spec))
        if shape is None:
            continue
        if not fits(spec.shape, shape):
            raise BadInput(
                f"--shape {spec.name}={'x'.join(map(str, shape))} does not fit", f"The input is {spec}"
            )
        found[spec.name] = shape
    return found


def read_source(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Read a torch or Keras source; the answer is part of ``inspect --json``."""
    from portcall.compression import source_contents
    from portcall.targets.agent.contract import Graph

    source = Source.from_json(arguments["source"])
    graph = None if arguments["graph"] is None else Graph.from_json(arguments["graph"])
    contents = source_contents(source, graph)
    path = source.path if graph is None else graph.path
    answer = _answer(contents, [path])
    notes = [*source.notes, *answer["notes"]]
    if graph is not None:
        notes.append("read from the float flatbuffer that TensorFlow's converter makes of it")
    return {**answer, "notes": notes}


def _answer(contents: Contents, files: Sequence[Path]) -> dict[str, Any]:
    return {**contents.to_json(), "size": sizes(files)}


def sizes(files: Iterable[Path]) -> dict[str, Any]:
    """Return {"bytes", "compressed_bytes", "method"}: the files one after the other in order of path, as one stream.

    method: "zstd-3" where the standard library or the package zstandard has it, else "zlib-6".
    """
    method, compress, flush = _compressor()
    raw = packed = 0
    for chunk in _chunks(sorted(files)):
        raw += len(chunk)
        packed += len(compress(chunk))
    return {"bytes": raw, "compressed_bytes": packed + len(flush()), "method": method}


def _compressor() -> tuple[str, Callable[[bytes], bytes], Callable[[], bytes]]:
    import importlib

    for module in ("compression.zstd", "zstandard"):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        maker = found.ZstdCompressor(level=3)
        stream = maker if module == "compression.zstd" else maker.compressobj()
        return "zstd-3", stream.compress, stream.flush
    plain = zlib.compressobj(6)
    return "zlib-6", plain.compress, plain.flush


def _chunks(files: Iterable[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            yield from iter(lambda: stream.read(CHUNK), b"")


# The table.

HEADER = (
    "layer", "operator", "shape", "params", "zeros %", "pattern", "bits", "scales", "scale range", "MACs",
)  # fmt: skip


def inspect_table(answer: Mapping[str, Any]) -> str:
    """Return the answer of ``inspect`` as text: inputs and outputs, a line per layer, totals."""
    name = f"{answer['backend']}:{answer['precision']}" if answer["backend"] else answer["format"]
    lines = [f"{answer['path']} ({answer['kind']}, {name})"]
    for end in ("inputs", "outputs"):
        lines.append(f"{end}: " + ", ".join(str(TensorSpec.from_json(t)) for t in answer[end]))
    rows = [_row(layer) for layer in answer["layers"]]
    if rows:
        lines += ["", align(HEADER, rows, left=3)]
    lines += ["", *_totals(answer)]
    return "\n".join([*lines, *(f"note: {n}" for n in answer["notes"])])


def _row(layer: Mapping[str, Any]) -> list[str]:
    low, high = layer["scale_min"], layer["scale_max"]
    return [
        layer["name"],
        layer["operator"],
        "x".join(map(str, layer["shape"])),
        f"{layer['elements']:,}",
        f"{100 * layer['zero_fraction']:.2f}",
        layer["pattern"],
        f"{layer['bits']} {layer['dtype']}",
        str(layer["scales"]) if layer["scales"] else ABSENT,
        ABSENT if low is None else f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}",
        ABSENT if layer["macs"] is None else f"{layer['macs']:,}",
    ]


def _totals(answer: Mapping[str, Any]) -> list[str]:
    size, weights = answer["size"], answer["weights"]
    share = weights["zero_fraction"]
    macs = "unknown" if answer["macs"] is None else f"{answer['macs']:,}"
    zeros = "" if share is None else f", {100 * share:.2f} % of the layers' weights are zero"
    operators = ", ".join(f"{n} {name}" for name, n in answer["operators"].items())
    return [
        f"parameters: {answer['parameters']:,}, non-zero {answer['nonzero']:,}{zeros}",
        f"multiply-accumulates: {macs}",
        f"operators: {operators or 'none'}",
        f"nodes that quantize, dequantize or compute on integers: {answer['quantize_nodes']}",
        f"size: {size['bytes']:,} bytes, compressed {size['compressed_bytes']:,} ({size['method']})",
    ]
