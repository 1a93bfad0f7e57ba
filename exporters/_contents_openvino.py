"""What an OpenVINO IR holds: constants behind Convert, Subtract, Multiply, FakeQuantize, Reshape and Transpose."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from portcall.targets.agent.contents import Contents, Weight
from portcall.targets.agent.contract import Dim, TensorSpec
from portcall.targets.agent.errors import BadInput
from portcall.targets.agent.stored import Stored, signs_of, swapped, unpacked, upright, weight

WEIGHT_INPUTS: Mapping[str, Tuple[int, ...]] = {
    "Convolution": (1,),
    "GroupConvolution": (1,),
    "ConvolutionBackpropData": (1,),
    "GroupConvolutionBackpropData": (1,),
    "MatMul": (1, 0),
    "Gather": (0,),
    "LSTMSequence": (4, 5),
    "GRUSequence": (3, 4),
    "RNNSequence": (3, 4),
    "LSTMCell": (3, 4),
}
PASSING = ("Convert", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "FakeConvert")


def read(path: Path, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    """Return the contents of an IR (.xml with its .bin).

    shapes: of its inputs, for multiply-accumulates (without them those are counted where the file's shapes are fixed).
    Raises BadInput for a file that OpenVINO cannot read.
    """
    import openvino as ov

    try:
        model = ov.Core().read_model(str(path))
        names = {name for port in model.inputs for name in port.get_names()}
        known = {name: list(shape) for name, shape in shapes.items() if name in names}
        if known:
            model.reshape(known)
    except RuntimeError as error:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{path} is not a readable OpenVINO model: {last}", "Export it again") from error
    reader = _Reader(model)
    weights = reader.weights()
    other, zeros = reader.others()
    macs = [reader.macs[id] for id in reader.macs]
    return Contents(
        format="openvino",
        inputs=tuple(map(_spec, model.inputs)),
        outputs=tuple(map(_spec, model.outputs)),
        weights=tuple(weights),
        operators=Counter(
            n.get_type_name() for n in reader.nodes if n.get_type_name() not in ("Parameter", "Result")
        ),
        quantize_nodes=sum(n.get_type_name() in ("FakeQuantize", "FakeConvert") for n in reader.nodes)
        + sum(reader.is_decompression(n) for n in reader.nodes),
        other_parameters=other,
        other_zeros=zeros,
        macs=None if None in macs else sum(m for m in macs if m is not None),
        notes=() if None not in macs else ("no multiply-accumulates: a shape is dynamic; give --shape",),
    )


def _spec(port: Any) -> TensorSpec:
    names = sorted(port.get_names())
    dims: List[Dim] = [
        f"dim_{i}" if d.is_dynamic else int(d.get_length()) for i, d in enumerate(port.get_partial_shape())
    ]
    return TensorSpec(
        names[0] if names else port.get_node().get_friendly_name(),
        tuple(dims),
        port.get_element_type().to_dtype().name,
    )


class _Reader:
    """Finds the constant weight of each layer; macs: of every product, by its name, None where a shape is dynamic."""

    def __init__(self, model: Any) -> None:
        self.nodes = list(model.get_ordered_ops())
        self._used: Set[str] = set()
        self.macs: Dict[str, Optional[int]] = {}

    @staticmethod
    def is_decompression(node: Any) -> bool:
        """Tell whether a node turns stored integers into floats."""
        if node.get_type_name() != "Convert" or not node.get_element_type().is_real():
            return False
        source = node.input_value(0).get_node()
        return source.get_type_name() == "Constant" and not source.get_element_type().is_real()

    def weights(self) -> List[Weight]:
        found: List[Weight] = []
        for node in self.nodes:
            kind = node.get_type_name()
            if kind in ("Convolution", "MatMul") or "BackpropData" in kind or kind == "GroupConvolution":
                self.macs[node.get_friendly_name()] = _macs(node, kind)
            for index in WEIGHT_INPUTS.get(kind, ()):
                stored = self._stored(node.input_value(index).get_node())
                if stored is None or stored.values.ndim < 2 or (kind == "Gather" and not _is_table(stored)):
                    continue
                found.append(self._described(node, kind, index, stored))
                if "Sequence" not in kind and "Cell" not in kind:
                    break
        return found

    def _stored(self, node: Any) -> Optional[Stored]:
        """Return what *node* computes from constants alone, by the signs of its elements; None for anything else."""
        import numpy as np

        kind = node.get_type_name()
        if kind == "Constant":
            return self._constant(node)
        if kind in PASSING:
            held = self._stored(node.input_value(0).get_node())
            if held is None or kind in ("Convert", "FakeConvert"):
                return held
            if kind == "Transpose":
                order = node.input_value(1).get_node()
                return held._replace(values=held.values.transpose([int(a) for a in order.data.reshape(-1)]))
            shape = [int(d) for d in node.get_output_shape(0)]
            return held._replace(values=held.values.reshape(shape))
        if kind not in ("Subtract", "Multiply", "FakeQuantize"):
            return None
        others = [self._array(node.input_value(i).get_node()) for i in range(1, node.get_input_size())]
        held = self._stored(node.input_value(0).get_node())
        if held is None or any(o is None for o in others):
            return None
        if kind == "Subtract":
            zero = others[0]
            return held._replace(
                values=signs_of(held.values.astype(np.float64) - zero), zero_point=np.rint(zero)
            )
        if kind == "Multiply":
            return held._replace(values=np.sign(held.values) * np.sign(others[0]), scale=others[0])
        low, high, out_low, out_high = (np.asarray(o, np.float64) for o in others)
        levels = int(node.get_attributes()["levels"])
        clipped = np.clip(held.values, np.minimum(low, high), np.maximum(low, high))
        steps = np.rint((clipped - low) / (high - low) * (levels - 1))
        scale = (out_high - out_low) / (levels - 1)
        rounded = steps * scale + out_low
        zero = np.abs(rounded) < np.abs(scale) * 1e-3  # a step away from zero is a whole scale
        return held._replace(values=np.where(zero, 0, np.sign(rounded)), scale=scale)

    def _array(self, node: Any) -> Any:
        """Return a small constant operand (scale, zero point, range) as float64, through Convert and Reshape."""
        import numpy as np

        self._used.add(node.get_friendly_name())
        if node.get_type_name() == "Constant":
            return np.asarray(self._constant(node).values, np.float64)
        if node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
            held = self._array(node.input_value(0).get_node())
            if held is None or node.get_type_name() == "Convert":
                return held
            return held.reshape([int(d) for d in node.get_output_shape(0)])
        return None

    def _constant(self, node: Any) -> Stored:
        import numpy as np

        name, kind = node.get_friendly_name(), node.get_element_type().get_type_name()
        self._used.add(name)
        shape = tuple(int(d) for d in node.get_output_shape(0))
        bits = 32 if kind == "boolean" else int("".join(c for c in kind if c.isdigit())[:2] or 8)
        if kind in ("i4", "u4"):
            packed = np.ascontiguousarray(node.data).view(np.uint8).tobytes()
            values = unpacked(packed, 4, math.prod(shape), kind == "i4").reshape(shape)
        elif kind == "bf16":
            values = node.get_data(dtype=np.float32)
        else:
            values = np.asarray(node.data)
        names = {"f32": "float32", "f16": "float16", "f64": "float64", "bf16": "bfloat16"}
        dtype = names.get(kind) or kind.replace("i", "int").replace("uint", "u").replace("u", "uint")
        return Stored(name, shape, dtype, bits, values.reshape(shape))

    def _described(self, node: Any, kind: str, index: int, stored: Stored) -> Weight:
        name, rank, values = node.get_friendly_name(), stored.values.ndim, stored.values
        macs = self.macs.get(name)
        if kind == "Convolution":
            return weight(name, kind, stored, values, (0, 1), 1, macs)
        if kind == "ConvolutionBackpropData":
            return weight(name, kind, stored, swapped(values, 1), (1, 0), 1, macs)
        if kind == "GroupConvolution":  # [groups, outputs / groups, inputs / groups, *kernel]
            whole = values.reshape(-1, *values.shape[2:])
            return weight(name, kind, stored, whole, _axes(stored, rank, 1, 2), values.shape[0], macs)
        if kind == "GroupConvolutionBackpropData":  # [groups, inputs / groups, outputs / groups, *kernel]
            whole = values.swapaxes(1, 2).reshape(-1, values.shape[1], *values.shape[3:])
            return weight(name, kind, stored, whole, _axes(stored, rank, 2, 1), values.shape[0], macs)
        if kind != "MatMul":
            part = "" if kind == "Gather" else f".{index}"
            return weight(
                name + part, kind, stored, values.reshape(-1, values.shape[-1]), (rank - 2, rank - 1)
            )
        turned = bool(node.get_attributes()["transpose_a" if index == 0 else "transpose_b"])
        inputs_last = (index == 0) != turned
        axes = (rank - 2, rank - 1) if inputs_last else (rank - 1, rank - 2)
        return weight(name, kind, stored, upright(values, inputs_last), axes, 1, macs)

    def others(self) -> Tuple[int, int]:
        """Return the elements of the other float constants of at least one axis, and their zeros."""
        import numpy as np

        count = zeros = 0
        for node in self.nodes:
            real = node.get_type_name() == "Constant" and node.get_element_type().is_real()
            if real and node.get_friendly_name() not in self._used and len(node.get_output_shape(0)):
                values = self._constant(node).values
                count += int(values.size)
                zeros += int(values.size - np.count_nonzero(values))
        return count, zeros


def _axes(stored: Stored, rank: int, output: int, inputs: int) -> Tuple[Optional[int], Optional[int]]:
    """Return the axes in the stored shape, where a Reshape has not changed it."""
    return (output, inputs) if len(stored.shape) == rank else (None, None)


def _is_table(stored: Stored) -> bool:
    """Tell whether a Gather reads an embedding: a matrix of weights."""
    return stored.values.ndim == 2 and (stored.scale is not None or "float" in stored.dtype)


def _macs(node: Any, kind: str) -> Optional[int]:
    """Return the multiply-accumulates of a product, or None where a shape is dynamic."""
    parts = [node.get_output_partial_shape(0), *(node.input_value(i).get_partial_shape() for i in (0, 1))]
    if any(p.is_dynamic for p in parts):
        return None
    output, first, second = ([int(d.get_length()) for d in p] for p in parts)
    if kind == "MatMul":
        return math.prod(output) * first[-2 if node.get_attributes()["transpose_a"] else -1]
    grouped = kind.startswith("Group")
    per_element = second[2 if grouped else 1 :]  # [inputs, *kernel]; transposed: [outputs, *kernel]
    return math.prod(first if "Backprop" in kind else output) * math.prod(per_element)
