"""What a Core ML package holds: constants of its ML program, and what the constexpr_ operators unpack."""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Artifact, BoundTensor
from portcall.targets.agent.stored import Stored, signs_of, swapped, upright, weight

WEIGHT_INPUTS: Mapping[str, Tuple[str, ...]] = {
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "linear": ("weight",),
    "matmul": ("y", "x"),
    "gather": ("x",),
    "lstm": ("weight_ih", "weight_hh"),
    "gru": ("weight_ih", "weight_hh"),
    "rnn": ("weight_ih", "weight_hh"),
}
DATA: Mapping[str, str] = {
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
    "constexpr_lut_to_dense": "indices",
    "constexpr_sparse_to_dense": "nonzero_data",
    "constexpr_cast": "source_val",
    "dequantize": "input",
}
"""What unpacks a weight -> its parameter that holds the stored elements."""


def read(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    """Return the contents of a package.

    shapes: of its inputs, for multiply-accumulates, which are counted on one run of the interpreter (``_mil``); empty:
    they are not. Raises BadInput for a folder that is no ML program.
    """
    from portcall.exporters._mil import Program

    program = Program(artifact.path)
    macs, notes = _count_macs(artifact, program, shapes) if shapes else (None, ())
    reader = _Reader(program.function, macs or {})
    weights = reader.weights()
    other, zeros = reader.others()
    operators = Counter(o.op_type for o in reader.operations if o.op_type != "const")
    return Contents(
        format="coreml",
        inputs=program.inputs,
        outputs=program.outputs,
        weights=tuple(weights),
        operators=operators,
        quantize_nodes=operators["quantize"] + operators["dequantize"],
        other_parameters=other,
        other_zeros=zeros,
        macs=None if macs is None else sum(macs.values()),
        notes=notes,
    )


def _count_macs(
    artifact: Artifact, program: Any, shapes: Mapping[str, Tuple[int, ...]]
) -> Tuple[Optional[Dict[str, int]], Tuple[str, ...]]:
    """Return the multiply-accumulates of each product by the name of its output, or None and why not."""
    import numpy as np

    from portcall.exporters import _coreml_census, _coreml_options
    from portcall.exporters._coreml_session import feeds

    inputs = artifact.inputs or tuple(BoundTensor(t.name, t.name, t.shape, t.dtype) for t in program.inputs)
    missing = [t.source for t in inputs if t.source not in shapes]
    if missing:
        return None, (f"no multiply-accumulates: the shape of input {missing[0]!r} is dynamic; give --shape",)
    found: Dict[str, int] = {}

    def watch(step: Any, given: Mapping[str, Any], outputs: Any) -> None:
        if step.kind in _coreml_census.COMPUTE_OPS:
            found[step.outputs[0][0]] = _coreml_census.macs_of(step.kind, given, outputs[0])

    images = _coreml_options.parse_images(str(artifact.options.get("image", "")))
    try:
        zeros = {t.source: np.zeros(shapes[t.source], t.dtype) for t in inputs}
        program.run(feeds(inputs, [t.name for t in inputs], zeros, images), watch)
    except Exception as error:  # of a bare package: whatever an operator makes of zeros
        return None, (f"no multiply-accumulates: the interpreter cannot run it: {error}",)
    return found, ()


class _Reader:
    """Finds the constant weight of each layer of a program's main function."""

    def __init__(self, function: Any, macs: Mapping[str, int]) -> None:
        self.operations = list(function.operations)
        self._macs = macs
        self._used: Set[str] = set()

    def weights(self) -> List[Weight]:
        found: List[Weight] = []
        for operation in self.operations:
            kind = operation.op_type
            for parameter in WEIGHT_INPUTS.get(kind, ()):
                given = operation.inputs.get(parameter)
                stored = None if given is None else self._stored(given)
                if stored is None or stored.values.ndim < 2 or (kind == "gather" and stored.values.ndim != 2):
                    continue
                found.append(self._described(operation, parameter, stored))
                if kind not in ("lstm", "gru", "rnn"):
                    break
        return found

    def _stored(self, variable: Any) -> Optional[Stored]:
        """Return a constant, or what is unpacked from constants; None where it is computed."""
        import numpy as np

        maker = variable.op
        if maker is None:
            return None
        if maker.op_type == "const":
            self._used.add(variable.name)
            values = np.asarray(maker.val.val)
            if values.dtype.kind not in "fiu":
                return None
            return Stored(variable.name, values.shape, values.dtype.name, values.dtype.itemsize * 8, values)
        if maker.op_type not in DATA and maker.op_type not in _pairs():
            return self._stored(maker.inputs["x"]) if maker.op_type in ("transpose", "cast") else None
        return self._unpacked(variable, maker)

    def _unpacked(self, variable: Any, maker: Any) -> Optional[Stored]:
        """Return what a constexpr_ operator or a dequantize of a constant stands for."""
        import numpy as np

        given = {k: v for k, v in maker.inputs.items() if v is not None}
        values = {k: self._values(v) for k, v in given.items()}
        if any(v is None for v in values.values()):
            return None
        from portcall.exporters import _mil_weights

        result = _mil_weights.operators()[maker.op_type](**values)
        if isinstance(result, list):
            result = result[maker.outputs.index(variable)]
        if maker.op_type in _pairs():
            return Stored(variable.name, tuple(result.shape), "sparse", 8, result)
        data = given[DATA[maker.op_type]]
        dense = np.asarray(result)
        shape, scale = tuple(dense.shape), values.get("scale")
        zero = values.get("zero_point", values.get("offset"))
        if maker.op_type == "constexpr_lut_to_dense":
            entries = np.asarray(values["lut"])
            size = entries.size if "shape" in values else entries.shape[-2]
            bits = max(1, int(np.ceil(np.log2(max(2, size)))))
            return Stored(data.name, shape, "palette", bits, dense)
        held = np.asarray(values[DATA[maker.op_type]])
        dtype, bits = _type_of(data, held)
        if maker.op_type == "constexpr_sparse_to_dense":
            return Stored(data.name, shape, f"sparse {dtype}", bits, dense)
        if scale is None:
            return Stored(data.name, shape, dtype, bits, dense)
        return Stored(data.name, shape, dtype, bits, signs_of(dense), scale, zero)

    def _values(self, variable: Any) -> Any:
        """Return the value of a constant operand; of a pair of operators, what the first unpacks."""
        import numpy as np

        if variable.op is None:
            return None
        if variable.op.op_type == "const":
            self._used.add(variable.name)
            value = variable.op.val.val
            return value if isinstance(value, str) else _plain(np.asarray(value))
        if variable.op.op_type.startswith("constexpr_"):
            held = self._unpacked(variable, variable.op)
            return None if held is None else held.values
        return None

    def _described(self, operation: Any, parameter: str, stored: Stored) -> Weight:
        kind, output = operation.op_type, operation.outputs[0].name
        macs, values, rank = self._macs.get(output), stored.values, stored.values.ndim
        groups = operation.inputs.get("groups")
        split = int(groups.val) if groups is not None and groups.val is not None else 1
        if kind == "conv":
            return weight(output, kind, stored, values, (0, 1), split, macs)
        if kind == "conv_transpose":
            return weight(output, kind, stored, swapped(values, split), (1, 0), split, macs)
        if kind == "matmul":
            turned = operation.inputs.get("transpose_x" if parameter == "x" else "transpose_y")
            is_turned = turned is not None and bool(turned.val)
            inputs_last = (parameter == "x") != is_turned
            axes = (rank - 2, rank - 1) if inputs_last else (rank - 1, rank - 2)
            return weight(output, kind, stored, upright(values, inputs_last), axes, 1, macs)
        part = "" if kind in ("linear", "gather") else f".{parameter}"
        return weight(output + part, kind, stored, upright(values, True), (rank - 2, rank - 1), 1, macs)

    def others(self) -> Tuple[int, int]:
        """Return the elements of the other float constants of at least one axis, and their zeros."""
        import numpy as np

        count = zeros = 0
        for operation in self.operations:
            if operation.op_type != "const" or operation.outputs[0].name in self._used:
                continue
            values = operation.val.val
            if isinstance(values, np.ndarray) and values.ndim and values.dtype.kind == "f":
                count += int(values.size)
                zeros += int(values.size - np.count_nonzero(values))
        return count, zeros


def _pairs() -> Tuple[str, ...]:
    """Return the operators that give a mask and values, for a constexpr_sparse_to_dense after them."""
    return ("constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale")


def _type_of(variable: Any, held: Any) -> Tuple[str, int]:
    """Return the stored type and its bits; MIL keeps integers of 1 to 7 bits in bytes."""
    from coremltools.converters.mil.mil import types

    name = str(types.builtin_to_string(variable.dtype)) if variable.dtype is not None else held.dtype.name
    names: Dict[str, str] = {"fp32": "float32", "fp16": "float16"}
    digits = "".join(c for c in name if c.isdigit())
    return names.get(name, name), int(digits or held.dtype.itemsize * 8)


def _plain(values: Any) -> Any:
    """Return float16 as float32; coremltools' own integers of few bits as they are."""
    import numpy as np

    return values.astype(np.float32) if values.dtype == np.float16 else values
