"""Core ML: ML programs (.mlpackage) for iOS 15, macOS 12 and newer, from the canonical ONNX graph.

Exported anywhere, run on a Mac. Elsewhere ``interpret`` runs the saved package operator by operator: see ``_mil``.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contents import Contents
from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
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
    TensorSpec,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules

PACKAGE = "model.mlpackage"
COMPILED = "model.mlmodelc"
COMPUTE_UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")
ENOUGH_DB = 20.0
"""A float program at another size of its dynamic dimensions is at least this close to torch, or they are frozen."""
INT8_NOTE = (
    "Core ML computes these int8 products on integers on the Neural Engine of A17 Pro, M4 and newer; elsewhere "
    "in float16, on the same rounded values"
)


def probe(role: str) -> Union[Available, Unavailable]:
    # Importing coremltools takes 3 to 10 s: its modules are only looked for.
    found = probe_modules(
        "coreml", [], ["coremltools", "torch", "onnx"] if role == "export" else ["coremltools"]
    )
    if isinstance(found, Unavailable) or role == "export" or sys.platform == "darwin":
        return found
    return Unavailable(
        f"Core ML runs on macOS only, this is {sys.platform}",
        "Measure on a Mac; here the saved package is verified by an interpreter",
    )


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    from importlib.metadata import version

    import onnx

    from portcall.exporters import (
        _coreml,
        _coreml_options,
        _coreml_tools,
        _coreml_weights,
        _half_weights,
        _onnx,
        _qdq,
        _qdq_symmetric,
        _trained_rewrite,
    )
    from portcall.exporters._mil import Program

    options, source = recipe.options, graph.source
    needed = _coreml_weights.needed(recipe.precision, options)
    target = _coreml_options.target_of(options.get("min_runtime"), needed, f"coreml:{recipe.precision}")
    images = _coreml_options.parse_images(str(options.get("image", "")))
    unknown = sorted(set(images) - {t.name for t in source.inputs})
    if unknown:
        names = ", ".join(t.name for t in source.inputs)
        raise BadInput(f"the option image names {unknown[0]!r}, no input of this model", f"It has: {names}")
    fixed = options.get("shapes") == "fixed" or bool(images)  # Core ML's images have one size
    notes: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()
    path = graph.path
    if graph.source.quantized:
        path = directory / "quantized.onnx"
        files, notes = _trained_rewrite.write(graph.path, path, float_bias=True), (INT8_NOTE,)
    elif recipe.precision == "int8":
        assert ranges is not None
        _check_scheme(options)
        path = directory / "quantized.onnx"
        files, found = _qdq_symmetric.quantize(graph, ranges, path, options)
        notes += (*found, INT8_NOTE)
    elif recipe.precision == "fp16":
        path = directory / "rounded.onnx"
        rounded = onnx.load(str(graph.path))
        _half_weights.round_weights(rounded)
        files = _onnx.save(rounded, path)
    module, program = _coreml.to_program(path, source, fixed)
    half = recipe.precision != "fp32"
    model, target = _coreml.convert(module, program, source, fixed, target, half, images)
    package = directory / PACKAGE
    if recipe.precision in _coreml_weights.BITS:
        kept, nodes = _kept_nodes(graph.path, options), _coreml_weights.nodes_by_weight(graph.path)
        model, found = _coreml_weights.compress(model, recipe.precision, options, nodes, kept)
        notes += (*found, *_qdq.kept_notes(kept))
        if options.get("bias_correction"):
            notes += ("no bias correction: it needs calibrated ranges, as int8 has them",)
    _coreml_tools.save(model, package)
    saved = Program(package)
    for file in files:
        (directory / file).unlink()
    dynamic = not fixed and any(isinstance(d, str) for t in source.inputs for d in t.shape)
    if dynamic:
        _check_dynamic(saved, module, source, images, recipe.precision)
    inputs, outputs = _bound(source, saved, fixed)
    notes += _interface_notes(source, images, dynamic)
    versions = {name: version(name) for name in ("coremltools", "torch", "onnx")}
    return Exported(PACKAGE, tuple(_coreml_tools.files_of(package)), inputs, outputs, versions, notes, target)


def _check_scheme(options: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for int8 weights that Core ML's integer kernels do not take."""
    from portcall.calibration.weights import scheme_of

    scheme = scheme_of(options)
    if scheme.block or not scheme.symmetric:
        raise UnsupportedError(
            f"Core ML's int8 products take no weights by {scheme}: they have zero point 0 and no groups",
            'Use "weights": "channel" (the default) or "tensor", or int8-weights',
        )


def _kept_nodes(path: Path, options: Mapping[str, Any]) -> List[str]:
    """Return the ONNX nodes that ``keep_float`` selects."""
    import onnx

    from portcall.exporters import _selection

    graph = onnx.load(str(path), load_external_data=False).graph
    return _selection.select([(n.name, n.op_type) for n in graph.node], options.get("keep_float", ()))


def _check_dynamic(
    saved: Any, module: Any, source: Source, images: Mapping[str, Any], precision: str
) -> None:
    """Run the package at another size of its dynamic dimensions. Raises UnsupportedError where they are frozen."""
    import numpy as np
    import torch

    from portcall.exporters import _coreml
    from portcall.exporters._coreml_session import feeds

    arrays = _coreml.random_inputs(source.inputs, _coreml.other_shapes(source))
    wanted = module(*(torch.from_numpy(arrays[name]) for name in module.input_names))
    reference = dict(zip(module.output_names, (w.detach().numpy() for w in wanted)))
    exact = precision in ("fp32", "fp16") and not images
    problem = ""
    try:
        found = saved.run(feeds(source.inputs, [t.name for t in saved.inputs], arrays, images))
    except (ValueError, RuntimeError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        for spec, array in zip(source.outputs, found.values()):
            expected = reference[spec.name]
            if array.shape != expected.shape:
                problem = f"output {spec.name!r} has shape {array.shape}, not {expected.shape}"
            elif exact and np.all(np.isfinite(expected)) and _coreml.sqnr_db(expected, array) < ENOUGH_DB:
                problem = f"output {spec.name!r} differs from the source's"
    if problem:
        raise UnsupportedError(
            f"the conversion froze a dynamic dimension: {problem}",
            "Fix the shapes: --shape NAME=1x128 and the option coreml.shapes=fixed",
        )


def _bound(
    source: Source, saved: Any, fixed: bool
) -> Tuple[Tuple[BoundTensor, ...], Tuple[BoundTensor, ...]]:
    """Return the inputs and outputs: names of the package, shapes and dtypes of the source (the session casts)."""
    if len(saved.inputs) != len(source.inputs) or len(saved.outputs) != len(source.outputs):
        raise CellFailed(
            f"the package has {len(saved.inputs)} inputs and {len(saved.outputs)} outputs, "
            f"the model {len(source.inputs)} and {len(source.outputs)}",
            "Remove inputs that the model does not use",
        )

    def shape(spec: TensorSpec) -> Tuple[Any, ...]:
        return source.example_shapes[spec.name] if fixed and spec in source.inputs else spec.shape

    pairs = (zip(source.inputs, saved.inputs), zip(source.outputs, saved.outputs))
    inputs, outputs = (
        tuple(BoundTensor(s.name, p.name, shape(s), s.dtype) for s, p in both) for both in pairs
    )
    return inputs, outputs


def _interface_notes(source: Source, images: Mapping[str, Any], dynamic: bool) -> Tuple[str, ...]:
    from portcall.exporters import _coreml

    notes: List[str] = []
    for spec in (*source.inputs, *source.outputs):
        stored = _coreml.runtime_dtype(spec.dtype)
        if spec.name in images:
            image = images[spec.name]
            notes.append(
                f"{spec.name} is a {image.color} image of 8 bits, x = {image.scale:g} * pixel + "
                f"{'/'.join(f'{b:g}' for b in image.bias)}: the source's values are rounded to pixels"
            )
        elif spec.dtype != stored:
            notes.append(
                f"{spec.name} is {spec.dtype} in the model and {stored} in the package: the session casts"
            )
    if dynamic:
        notes.append(
            "its dimensions are flexible (1 to 2048): the Neural Engine may not take such a model; "
            "coreml.shapes=fixed makes one for the example's shapes"
        )
    return tuple(notes)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _coreml_census

    return _coreml_census.census(artifact, shapes)


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run it by Core ML. Unproven: see ``_coreml_session.PredictSession``. Core ML takes no number of threads."""
    from portcall.exporters._coreml_session import PredictSession

    yield PredictSession(artifact)


@contextmanager
def interpret(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    """Run the saved package, weights from disk, in the MIL interpreter."""
    from portcall.exporters._coreml_session import InterpretedSession

    yield InterpretedSession(artifact, workload.threads)


def finish(artifact: Artifact, workload: Workload, directory: Path) -> str:
    """Compile the package for this Mac. Unproven: see ``_coreml_session.PredictSession``."""
    from portcall.exporters._coreml_tools import coremltools

    coremltools().models.utils.compile_model(str(artifact.path), str(directory / COMPILED))
    return COMPILED


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_coreml

    return _contents_coreml.read(artifact, shapes)


EXAMPLE = '''"""Run this artifact with Core ML alone, on a Mac: pip install coremltools numpy"""
import json
import pathlib

import coremltools
import numpy

@COMMON@


manifest = json.loads((here / "manifest.json").read_text())
options = manifest["recipe"]["options"]
units = getattr(coremltools.ComputeUnit, options.get("compute_units", "ALL"))
model = coremltools.models.MLModel(str(here / "@ENTRY@"), compute_units=units)
if options.get("image"):
    raise SystemExit("This model takes images: give model.predict a PIL image for each of " + options["image"])
feeds = {}
for tensor in manifest["inputs"]:
    array = samples[tensor["source"]][0]
    feeds[tensor["name"]] = array.astype("float32" if "float" in tensor["dtype"] else "int32")
outputs = model.predict(feeds)
for tensor in manifest["outputs"]:
    show(tensor["source"], outputs[tensor["name"]])
'''

_COMPRESSED = ("int8-weights", "int4-weights", "palette4", "palette6")

BACKEND = Backend(
    name="coreml",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp32": Precision("float32 arithmetic (CPU and GPU only: the Neural Engine has none)"),
            "fp16": Precision("compute: float16 arithmetic"),
            "int8": Precision(
                "Q/DQ: int8 symmetric activations, int8 per-channel weights, float16 between them",
                calibrated=True,
                symmetric=True,
                integer=True,
            ),
            "int8-weights": Precision("storage: int8 weights per channel, float16 arithmetic"),
            "int4-weights": Precision(
                "storage: int4 weights in blocks of 32 inputs (int8 per channel where they do not divide), "
                "float16 arithmetic"
            ),
            "palette4": Precision("storage: weights from a table of 16 values, float16 arithmetic"),
            "palette6": Precision("storage: weights from a table of 64 values, float16 arithmetic"),
        },
        host="darwin",
        options={
            "compute_units": Option("which units Core ML may use (default ALL)", COMPUTE_UNITS),
            "shapes": Option(
                "flexible keeps dynamic dimensions (default), fixed takes the example's shapes",
                ("flexible", "fixed"),
            ),
            "image": Option("inputs that are images: x:scale=0.0078,bias=-1/-1/-1,color=RGB (or BGR, GRAY)"),
            "min_runtime": Option(
                "oldest system that has to load it: iOS15 to iOS18, macOS12 to macOS15, ..."
            ),
            "palette_group": Option(
                "channels that share a table (default: all of a tensor); needs iOS18",
                kind="int",
                precisions=("palette4", "palette6"),
            ),
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
    finish=finish,
)
