"""The ``example.py`` of an artifact, which needs only its runtime."""

from __future__ import annotations

from portcall.core import Artifact, Backend, Source


def example_text(backend: Backend, artifact: Artifact, source: Source, packed: int) -> str:
    """Return the text of example.py: on the *packed* samples that lie beside it, or on zeros where there are none."""
    inputs = 'numpy.load(here / "samples.npz")'
    if not packed:
        shapes = {t.name: (1, *source.example_shapes[t.name]) for t in source.inputs}
        zeros = (f'"{t.name}": numpy.zeros({shapes[t.name]}, "{t.dtype}")' for t in source.inputs)
        inputs = "{" + ", ".join(zeros) + "}"
    ends = (*artifact.inputs, *artifact.outputs)
    moved = {t.source: t.permutation for t in ends if t.permutation is not None}
    axes = ""
    if moved:
        axes = _AXES.replace("@ENTRIES@", "\n".join(f'    "{n}": {order!r},' for n, order in moved.items()))
    converted = {t.source: t for t in ends if t.scale is not None}
    integers = ""
    if converted:
        entries = (
            f'    "{t.source}": ({t.scale!r}, {t.zero_point!r}, "{t.dtype}"),' for t in converted.values()
        )
        integers = _INTEGERS.replace("@ENTRIES@", "\n".join(entries))
    common = _COMMON.replace("@SAMPLES@", inputs).replace("@INTEGERS@", axes + integers)
    back = (_DEQUANTIZE if converted else "") + (_MOVE_BACK if moved else "")
    common = common.replace("@BACK@", back)
    return backend.example.replace("@COMMON@", common).replace("@ENTRY@", artifact.entry)


_COMMON = '''here = pathlib.Path(__file__).parent
samples = @SAMPLES@
@INTEGERS@

def show(name, value):
    """Print an output, and how far it is from the source model's where the artifact carries that."""
    print(name, value.shape)
@BACK@    if "reference/" + name in samples:
        reference = numpy.asarray(samples["reference/" + name][0], "float64")
        difference = abs(numpy.asarray(value, "float64") - reference).max()
        print("  largest difference from the source model:", difference)'''


_INTEGERS = """
# Inputs and outputs that are integers: scale, zero point, dtype.
integers = {
@ENTRIES@
}
samples = dict(samples)
for name, (scale, zero_point, dtype) in integers.items():
    if name in samples:
        limits = numpy.iinfo(dtype)
        levels = numpy.rint(samples[name] / scale) + zero_point
        samples[name] = numpy.clip(levels, limits.min, limits.max).astype(dtype)

"""

_AXES = """
# Inputs and outputs whose axes are in another order than the source's.
axes = {
@ENTRIES@
}
samples = dict(samples)
for name, order in axes.items():
    if name in samples:
        samples[name] = numpy.ascontiguousarray(samples[name].transpose(0, *(1 + axis for axis in order)))

"""

_MOVE_BACK = """    if name in axes:
        value = value.transpose(numpy.argsort(axes[name]))
"""

_DEQUANTIZE = """    if name in integers:
        scale, zero_point, _ = integers[name]
        value = (value.astype("float64") - zero_point) * scale
"""
