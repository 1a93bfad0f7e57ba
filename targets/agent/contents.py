"""What the files of a model hold: its layers' weights with their zeros and scales, its operators, its size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import TensorSpec

DENSE, UNSTRUCTURED, TWO_OF_FOUR, CHANNELS = "dense", "unstructured", "2:4", "channels"
"""Sparsity patterns: see ``portcall.exporters._contents.pattern_of``."""

STRUCTURAL_SHARE = 0.1
"""A layer with this share of exact zeros was pruned: rounding alone seldom makes as many."""


@dataclass(frozen=True)
class Weight:
    """The constant weight of one layer (convolution, product, embedding, recurrent cell).

    name: of the layer; tensor: of what is stored. shape: as stored. dtype: as stored ("int8", "float16", "palette" for
    indices into a table); bits: of one element. zeros: elements whose real value is exactly 0, which for integers means
    that they equal the zero point. output_axis, input_axis: of *shape*, None where it has none (packed formats).
    zero_outputs, zero_inputs: whole channels of zeros. scales: how many there are, with the least and the largest.
    zero_point: the least and the largest. table_zeros: entries of a palette that are 0. macs: multiply-accumulates of
    one inference in this layer. signs: int8[outputs, inputs / groups, *kernel] of -1, 0 and 1, whatever the layout of
    the file: what two formats are compared by.
    """

    name: str
    operator: str
    tensor: str
    shape: Tuple[int, ...]
    dtype: str
    bits: int
    elements: int
    zeros: int
    pattern: str
    output_axis: Optional[int]
    input_axis: Optional[int]
    zero_outputs: int
    zero_inputs: int
    scales: int
    scale_min: Optional[float]
    scale_max: Optional[float]
    zero_point: Optional[Tuple[int, int]]
    macs: Optional[int]
    signs: Any = field(default=None, repr=False, compare=False)

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def is_structural(self) -> bool:
        """Tell whether its zeros were put there on purpose: by their number, or by their pattern."""
        return self.pattern in (TWO_OF_FOUR, CHANNELS) or self.zero_fraction >= STRUCTURAL_SHARE

    def to_json(self) -> Dict[str, Any]:
        return {
            "name": self.name,
            "operator": self.operator,
            "tensor": self.tensor,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bits": self.bits,
            "elements": self.elements,
            "zeros": self.zeros,
            "zero_fraction": self.zero_fraction,
            "pattern": self.pattern,
            "output_axis": self.output_axis,
            "input_axis": self.input_axis,
            "zero_outputs": self.zero_outputs,
            "zero_inputs": self.zero_inputs,
            "scales": self.scales,
            "scale_min": self.scale_min,
            "scale_max": self.scale_max,
            "zero_point": None if self.zero_point is None else list(self.zero_point),
            "macs": self.macs,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Weight:
        values = {k: v for k, v in data.items() if k != "zero_fraction"}
        values["shape"] = tuple(values["shape"])
        values["zero_point"] = None if values["zero_point"] is None else tuple(values["zero_point"])
        return Weight(**values)


@dataclass(frozen=True)
class Contents:
    """What the files of a model hold.

    weights: of every layer, in the order of the graph. operators: how often each type occurs. quantize_nodes: operators
    that quantize, dequantize or compute on integers. other_parameters, other_zeros: elements of the constants beside
    the layers' weights (biases, norms, tables of shapes left out), and those of them that are 0. macs: of one inference
    in all, None where a shape is unknown. notes: what could not be read, and why.
    """

    format: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    weights: Tuple[Weight, ...]
    operators: Mapping[str, int]
    quantize_nodes: int
    other_parameters: int
    other_zeros: int
    macs: Optional[int]
    notes: Tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of the layers' weights, one that several layers share counted once."""
        return sum(w.elements for w in self._distinct())

    @property
    def zeros(self) -> int:
        return sum(w.zeros for w in self._distinct())

    @property
    def zero_fraction(self) -> Optional[float]:
        """The share of zeros in the layers' weights; None without any."""
        return self.zeros / self.elements if self.elements else None

    def _distinct(self) -> List[Weight]:
        return list({w.tensor: w for w in self.weights}.values())

    def to_json(self) -> Dict[str, Any]:
        parameters = self.elements + self.other_parameters
        return {
            "format": self.format,
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "operators": dict(sorted(self.operators.items())),
            "quantize_nodes": self.quantize_nodes,
            "parameters": parameters,
            "nonzero": parameters - self.zeros - self.other_zeros,
            "weights": {"elements": self.elements, "zeros": self.zeros, "zero_fraction": self.zero_fraction},
            "macs": self.macs,
            "layers": [w.to_json() for w in self.weights],
            "notes": list(self.notes),
        }
