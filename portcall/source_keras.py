"""Keras sources (``.keras``) and TensorFlow's SavedModel folders. Everything here runs in a worker.

Loading a ``.keras`` runs no code of its author: Keras' safe mode refuses Lambda layers. TensorFlow stays quiet and on
the CPU, in float32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portcall.source import Reference, require, single_sample_shape
from portcall.targets.agent.contract import Dim, Source, TensorSpec
from portcall.targets.agent.errors import BadInput, UnsupportedError

EXPORT = "save it from where it was made with model.export(FOLDER) and give that folder"


@dataclass(frozen=True, slots=True)
class Network:
    """A loaded network: its named inputs and outputs, and how to call it.

    call: tensors by input name -> tensors by output name. variables: what it was trained to; TensorFlow forgets those
    that nothing else holds.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    call: Callable[[Mapping[str, Any]], dict[str, Any]]
    variables: Sequence[Any]


def open_keras(spec: str, kind: str) -> Source:
    """Open a ``.keras`` file ("keras") or a SavedModel folder ("savedmodel")."""
    path = Path(spec).resolve()
    network = load(path, kind, spec)
    shapes = {t.name: s for t in network.inputs if (s := single_sample_shape(t)) is not None}
    return Source(spec, kind, path, _hash(network), network.inputs, network.outputs, shapes)


def keras_reference(source: Source) -> Reference:
    """Run the network in TensorFlow on the CPU, in float32."""
    tf = tensorflow(source.spec)
    network = load(source.path, source.format, source.spec)
    call = tf.function(network.call, autograph=False, reduce_retracing=True)

    def run(sample: Mapping[str, Any]) -> dict[str, Any]:
        assert network.variables is not None  # held while this function is
        found = call({t.name: tf.constant(sample[t.name]) for t in source.inputs})
        return {t.name: found[t.name].numpy() for t in source.outputs}

    return run


def tensorflow(what: str) -> Any:
    """Import TensorFlow, quiet and without a GPU; Keras on top of it. Raises UnavailableError without it."""
    os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
    # oneDNN's kernels add up in another order.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    tf = require("tensorflow", what, "keras")
    tf.get_logger().setLevel("ERROR")
    tf.autograph.set_verbosity(0)
    return tf


def load(path: Path, kind: str, spec: str) -> Network:
    """Load a source's network. Raises BadInput for a file that is none, or would run its author's code."""
    tf = tensorflow(spec)
    return _load_keras(path, spec) if kind == "keras" else _load_saved_model(tf, path, spec)


def _load_keras(path: Path, spec: str) -> Network:
    keras = require("keras", spec, "keras")
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds: for Lambda layers, unknown classes, damaged files
        text = str(error)
        if "unsafe" in text.lower() or "lambda" in text.lower():
            raise BadInput(
                f"{spec!r} holds Python code (a Lambda layer), which portcall does not run",
                f"Replace the Lambda by layers or keras.ops, or {EXPORT}",
            ) from error
        if "Could not locate" in text:
            raise BadInput(
                f"{spec!r} needs a class that only its author has: {_first_line(text)}", EXPORT.capitalize()
            ) from error
        raise BadInput(
            f"{spec!r} is not a readable .keras file: {type(error).__name__}: {_first_line(text)}",
            "Write it with model.save('model.keras') of Keras 3",
        ) from error
    if not getattr(model, "inputs", None) or not getattr(model, "outputs", None):
        raise BadInput(
            f"{spec!r} has no fixed inputs: it is a subclassed or unbuilt model",
            f"Make it with keras.Input(shape), or {EXPORT}",
        )
    policy = model.dtype_policy
    if policy.compute_dtype != "float32":
        raise BadInput(
            f"{spec!r} computes in {policy.compute_dtype}", "Save it with the dtype policy float32"
        )
    inputs = _unique([t.name for t in model.inputs])
    outputs = _unique(list(getattr(model, "output_names", None) or [t.name for t in model.outputs]))

    # A Sequential that was loaded has inputs, but no ``input``.
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def call(values: Mapping[str, Any]) -> dict[str, Any]:
        packed = keras.tree.pack_sequence_as(structure, [values[name] for name in inputs])
        return dict(zip(outputs, keras.tree.flatten(model(packed, training=False)), strict=True))

    return Network(
        tuple(_spec(n, t.shape, t.dtype, spec) for n, t in zip(inputs, model.inputs, strict=True)),
        tuple(_spec(n, t.shape, t.dtype, spec) for n, t in zip(outputs, model.outputs, strict=True)),
        call,
        [variable.value for variable in model.variables],
    )


def _load_saved_model(tf: Any, path: Path, spec: str) -> Network:
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow raises many kinds for a damaged folder
        raise BadInput(
            f"{spec!r} is not a readable SavedModel: {type(error).__name__}: {_first_line(str(error))}",
            "Write it with model.export(FOLDER) or tf.saved_model.save",
        ) from error
    signatures = dict(loaded.signatures)
    if "serving_default" not in signatures and len(signatures) != 1:
        raise BadInput(
            f"{spec!r} has {len(signatures)} signatures ({', '.join(signatures) or 'none'}) and no serving_default",
            "Save it with one signature: tf.saved_model.save(model, FOLDER, signatures=FUNCTION)",
        )
    signature = signatures.get("serving_default") or next(iter(signatures.values()))
    _, keywords = signature.structured_input_signature
    found = signature.structured_outputs
    # A signature has names and no order: both are sorted here.
    return Network(
        tuple(_spec(name, t.shape, t.dtype.name, spec) for name, t in sorted(keywords.items())),
        tuple(_spec(name, t.shape, t.dtype.name, spec) for name, t in sorted(found.items())),
        lambda values: dict(signature(**values)),
        (loaded, *signature.variables),
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names, later ones numbered where they repeat."""
    return [n if n not in names[:i] else f"{n}_{i}" for i, n in enumerate(names)]


def _spec(name: str, shape: Any, dtype: Any, spec: str) -> TensorSpec:
    if getattr(shape, "rank", 0) is None:
        raise UnsupportedError(f"{spec}: {name!r} has no fixed rank", "Save it with the number of dimensions")
    if str(dtype) == "string":
        raise UnsupportedError(f"{spec}: {name!r} holds strings", "Use numeric tensors")
    dims: list[Dim] = []
    for axis, size in enumerate(shape):
        dims.append(int(size) if size is not None else "batch" if axis == 0 else f"dim_{axis}")
    return TensorSpec(name, tuple(dims), str(dtype))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def concrete(tf: Any, network: Network, shapes: Mapping[str, Sequence[int | None]]) -> Any:
    """Return the network as one traced function of named inputs of the given shapes (None: any size)."""
    specs = {t.name: tf.TensorSpec(shapes[t.name], t.dtype, name=t.name) for t in network.inputs}
    return tf.function(network.call, autograph=False).get_concrete_function(specs)


def _hash(network: Network) -> str:
    """Return a sha256 over the operators and weights, equal for equal networks whatever file or names hold them."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    shapes = {t.name: [d if isinstance(d, int) else None for d in t.shape] for t in network.inputs}
    frozen = convert_variables_to_constants_v2(concrete(tf, network, shapes)).graph.as_graph_def()
    digest = hashlib.sha256()
    number = {node.name: i for i, node in enumerate(frozen.node)}
    for node in frozen.node:
        inputs = [
            f"{number[name.lstrip('^').partition(':')[0]]}:{name.partition(':')[2]}" for name in node.input
        ]
        digest.update(f"{node.op} {inputs}".encode())
        for key in sorted(node.attr):
            if not key.startswith("_"):
                digest.update(key.encode() + node.attr[key].SerializeToString(deterministic=True))
    return digest.hexdigest()
