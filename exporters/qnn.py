"""QNN, for the Hexagon tensor processor (HTP) of Snapdragon chips: int8 and int16x8 as Q/DQ, fp16 in its arithmetic.

An artifact holds ``model.onnx`` (portable: QNN's provider or the CPU runs it), a context binary per HTP architecture
with its ONNX wrapper, compiled on the host, ``contexts.json``, which tells what each holds, and ``encodings.json``.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    Capabilities,
    Census,
    Exported,
    Graph,
    Option,
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

DISTRIBUTION = "onnxruntime-qnn"
CONTEXTS = "contexts.json"
ARM64 = ("aarch64", "arm64")


def probe(role: str) -> Union[Available, Unavailable]:
    """Tell whether contexts can be built here, or run: the first needs an x86-64 host, the second the processor."""
    import platform

    modules = ["onnxruntime_qnn", "onnxruntime"]
    found = probe_modules(
        "qnn", [*modules, "onnx"] if role == "export" else modules, distribution=DISTRIBUTION
    )
    if isinstance(found, Unavailable):
        return found
    on_device = platform.machine().lower() in ARM64
    if role == "run" and not on_device:
        return Unavailable(
            f"QNN runs on a Snapdragon's HTP, this is {platform.system()} on {platform.machine()}",
            "Run it on Windows, Linux or Android on ARM64 with a Snapdragon; here its x86 emulation checks parity",
        )
    if role == "export" and on_device:
        return Unavailable(
            "the package for ARM64 holds no compiler of HTP contexts", "Export on an x86-64 host with Linux"
        )
    return _probe_provider(found)


def _probe_provider(found: Available) -> Union[Available, Unavailable]:
    """Return *found*, or what the provider's own libraries lack. A crash of theirs is the worker's to report."""
    import onnxruntime_qnn

    from portcall.exporters import _qnn

    fix = "pip install 'portcall[qnn]' --force-reinstall"
    for path in (onnxruntime_qnn.get_library_path(), onnxruntime_qnn.get_qnn_htp_path()):
        if not Path(path).is_file():
            return Unavailable(f"onnxruntime_qnn lacks its library {Path(path).name}", fix)
    try:
        _qnn.devices()
    except Exception as error:  # ONNX Runtime raises kinds of its own where a library does not load
        return Unavailable(f"QNN's execution provider does not load: {error}", fix)
    return found


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    """Write model.onnx, a context per HTP architecture, contexts.json, encodings.json and, with an SDK, model.dlc.

    Raises BadInput for an unknown architecture, UnsupportedError where QNN takes nothing of the graph.
    """
    import tempfile

    import onnx
    import onnxruntime as ort

    from portcall.exporters import _qnn, _qnn_dlc, _qnn_model

    chosen = _architectures(recipe.options, recipe.precision)
    built_by = _version(recipe.options)
    path = directory / "model.onnx"
    with tempfile.TemporaryDirectory(prefix="portcall-qnn-") as folder:
        fixed = _qnn_model.fix_shapes(graph, Path(folder))
        files, notes = _qnn_model.write_model(fixed, recipe, ranges, path)
    inputs, outputs = _qnn_model.bound_tensors(graph, path)
    notes = (*notes, *_shape_notes(graph))
    contexts = []
    for architecture in chosen:
        context = _qnn.build_context(path, architecture)
        contexts.append(context)
        files = (*files, context.wrapper, *context.binaries)
        notes = (*notes, context.note())
    (directory / CONTEXTS).write_text(
        json.dumps({"schema": 1, "contexts": [c.to_json() for c in contexts]}, indent=1), encoding="utf-8"
    )
    files = (*files, CONTEXTS)
    if ranges is not None or graph.source.quantized:
        files = (*files, _qnn_model.write_encodings(path, directory))
    dlc, told = _qnn_dlc.convert(path)
    versions = {
        DISTRIBUTION: built_by,
        "onnxruntime": str(ort.__version__),
        "onnx": str(onnx.__version__),
        "qnn_sdk": contexts[0].sdk,
    }
    files = files if dlc is None else (*files, dlc)
    return Exported(path.name, files, inputs, outputs, versions, (*notes, *told), built_by)


def _architectures(options: Mapping[str, Any], precision: str) -> List[str]:
    from portcall.exporters import _qnn

    text = str(options.get("htp_arch", _qnn.DEFAULT_ARCHITECTURES))
    return _qnn.architectures(text, float16=precision == "fp16")


def _version(options: Mapping[str, Any]) -> str:
    """Return the version of onnxruntime-qnn that builds: older ones do not load its contexts."""
    import importlib.metadata

    from portcall.targets.agent.opening import is_older

    here = importlib.metadata.version(DISTRIBUTION)
    asked = str(options.get("min_runtime", here))
    if is_older(asked, here):
        raise UnsupportedError(
            f"a context of {DISTRIBUTION} {here} loads in that version and newer ones, min_runtime is {asked}",
            f"Export where {DISTRIBUTION} {asked} is installed",
        )
    return here


def _shape_notes(graph: Graph) -> Tuple[str, ...]:
    """Return the note that says which dynamic dimensions were fixed."""
    dynamic = [t for t in graph.source.inputs if any(isinstance(d, str) for d in t.shape)]
    shapes = graph.source.example_shapes
    if not dynamic:
        return ()
    fixed = ", ".join(f"{t.name}={'x'.join(map(str, shapes[t.name]))}" for t in dynamic)
    return (f"QNN compiles for one shape, fixed at {fixed}; samples have that shape; --shape gives another",)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _onnx

    return _onnx.census(artifact.path, shapes)


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_onnx

    return _contents_onnx.read(artifact.path, shapes)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the context of this device's architecture: the first that QNN loads. Unproven: no such device was at hand.

    Raises CellFailed with what each context said where none loads.
    """
    from portcall.exporters import _qnn_session

    path = artifact.directory / CONTEXTS
    if not path.is_file():  # a bare file
        yield _qnn_session.DeviceSession(artifact.path, workload.threads)
        return
    errors: Dict[str, str] = {}
    for context in _contexts(artifact):
        try:
            session = _qnn_session.DeviceSession(artifact.directory / context["wrapper"], workload.threads)
        except CellFailed as error:
            errors[context["htp_arch"]] = error.message
            continue
        yield session
        return
    said = "; ".join(f"v{name}: {message}" for name, message in errors.items())
    raise CellFailed(
        f"no context of this artifact loads here: {said}",
        "Export for this chip: --option qnn.htp_arch=NUMBER (see docs/backends/qnn.md)",
    )


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    """Like ``load``, with ONNX Runtime's profiler. Unproven on a device: none was at hand."""
    import tempfile

    from portcall.exporters._profile_qnn import QnnProfiler

    if not (artifact.directory / CONTEXTS).is_file():
        raise UnsupportedError("a bare file does not tell what its context holds", "Profile an artifact")
    errors: List[str] = []
    for context in _contexts(artifact):
        with tempfile.TemporaryDirectory(prefix="portcall-profile-") as folder:
            try:
                session = QnnProfiler(artifact, workload, Path(folder), context)
            except CellFailed as error:
                errors.append(error.message)
                continue
            yield session
            return
    raise CellFailed(
        f"no context of this artifact loads here: {'; '.join(errors)}",
        "Export for this chip: --option qnn.htp_arch=NUMBER (see docs/backends/qnn.md)",
    )


def _contexts(artifact: Artifact) -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = json.loads((artifact.directory / CONTEXTS).read_text())["contexts"]
    return found


@contextmanager
def interpret(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the first context binary in QNN's x86 emulation of the HTP; every other one has to load as well.

    Where the recipe asks for ``parity=cpu``, run model.onnx on the CPU instead.
    """
    from portcall.exporters import _qnn_session

    if artifact.options.get("parity") == "cpu":
        session = _qnn_session.FixedSession(artifact.path, workload.threads)
        session.environment["arithmetic"] = "ONNX Runtime on the CPU, not QNN"
        yield session
        return
    first, *others = _contexts(artifact)
    for context in others:
        _qnn_session.EmulatedSession(
            artifact.directory / context["wrapper"], workload.threads, context["htp_arch"]
        )
    yield _qnn_session.EmulatedSession(
        artifact.directory / first["wrapper"], workload.threads, first["htp_arch"]
    )


EXAMPLE = '''"""Run this artifact with ONNX Runtime and QNN alone: pip install onnxruntime-qnn numpy

On a Snapdragon the first context binary that loads runs; elsewhere QNN emulates its processor, slowly.
"""
import pathlib
import platform

import numpy
import onnxruntime
import onnxruntime_qnn

@COMMON@


name = "QNNExecutionProvider"
onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name][:1]
on_device = platform.machine().lower() in ("aarch64", "arm64")
found = None
for path in sorted(here.glob("model_v*.onnx")):
    options = onnxruntime.SessionOptions()
    provider = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices, provider)
    try:
        found = onnxruntime.InferenceSession(str(path), options, enable_fallback=0)
        print("emulated on x86:" if not on_device else "running", path.name)
        break
    except Exception as error:
        print(path.name, "does not load here:", error)
if found is None:
    raise SystemExit("no context of this artifact is for this chip: export with --option qnn.htp_arch=NUMBER")
feeds = {i.name: samples[i.name][0] for i in found.get_inputs()}
for output, value in zip(found.get_outputs(), found.run(None, feeds)):
    show(output.name, value)
'''

BACKEND = Backend(
    name="qnn",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp16": Precision("compute: float16 on the HTP (v69 and newer); model.onnx itself is float32"),
            "int8": Precision(
                "Q/DQ: uint8 asymmetric activations, int8 weights (per tensor in MatMul, else channel), rest float16",
                calibrated=True,
                integer=True,
            ),
            "int16x8": Precision(
                "Q/DQ: uint16 asymmetric activations, int8 weights (per channel; per tensor in MatMul)",
                calibrated=True,
                bits=16,
                integer=True,
            ),
        },
        host="Snapdragon",
        options={
            "htp_arch": Option(
                "HTP architectures to build a context for: 68, 69, 73, 75, 79, 81 (default: 73,75)"
            ),
            "parity": Option(
                "what checks the export here: QNN's x86 emulation (default), or the CPU, which is faster",
                choices=("emulated", "cpu"),
            ),
            "min_runtime": Option(f"version of {DISTRIBUTION} that has to load the contexts"),
        },
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    interpret=interpret,
    profile=profile,
)
