"""Keras models and SavedModels as float flatbuffers, by TensorFlow's own converter."""

from __future__ import annotations

import re
import tempfile
from typing import Any, List

from portcall.targets.agent.contract import Source
from portcall.targets.agent.errors import CellFailed, UnsupportedError


def convert(source: Source) -> bytes:
    """Return *source* as a float flatbuffer of its example shapes, with one signature in the source's names.

    Raises UnsupportedError, naming the operators, where LiteRT's own do not suffice.
    """
    from portcall import source_keras

    tf = source_keras.tensorflow(source.spec)
    network = source_keras.load(source.path, source.format, source.spec)
    # The converter keeps signatures of SavedModels only; inputs go by name there, not in a dict.
    specs = [tf.TensorSpec(source.example_shapes[t.name], t.dtype, name=t.name) for t in source.inputs]
    names = [t.name for t in source.inputs]
    module = tf.Module()
    module.held = list(network.variables)
    module.serve = tf.function(
        lambda *values: network.call(dict(zip(names, values))), input_signature=specs, autograph=False
    )
    with tempfile.TemporaryDirectory(prefix="portcall-savedmodel-") as folder:
        tf.saved_model.save(module, folder, signatures={"serving_default": module.serve})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
        try:
            return bytes(converter.convert())
        except Exception as error:  # TensorFlow's converter has its own kinds, depending on the stage
            raise _refused(source, str(error)) from error


def _refused(source: Source, text: str) -> Exception:
    """Return the error for what the converter said."""
    found: List[Any] = re.findall(r"(?:Flex|Custom) ops?: ([\w, ]+)", text) or re.findall(
        r"'(tf\.\w+)' op", text
    )
    operators = sorted({name.strip() for group in found for name in group.split(",")})
    if operators:
        return UnsupportedError(
            f"LiteRT has no operator for {', '.join(operators)} of {source.spec}",
            "Replace the layer that uses it; the log of this step names it",
        )
    first = next((line for line in text.splitlines() if line.strip()), "no reason given")
    return CellFailed(f"TensorFlow's converter failed: {first}", "See the log of this step")
