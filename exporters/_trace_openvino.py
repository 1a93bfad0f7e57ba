"""Intermediate tensors of an OpenVINO model: every tensor of the IR that carries a name of the ONNX graph."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

from portcall.targets.agent.binding import to_runtime
from portcall.targets.agent.contract import Artifact, Shown, Trace

BEHIND_PAIR = "_DequantizeLinear_Output"
"""What ONNX Runtime's quantizer appends to a tensor's name for the end of its Q/DQ pair."""


class OpenVinoTrace(Trace):
    """The IR compiled for the CPU with further outputs, products in float32 between its FakeQuantize operators."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(str(artifact.path))
        given = {name for port in model.inputs for name in port.get_names()}
        ends = {name for port in model.outputs for name in port.get_names()}
        found: List[Tuple[Shown, str]] = []
        for node in model.get_ordered_ops():
            if node.get_type_name() in ("Constant", "Result", "Parameter"):
                continue
            for port in node.outputs():
                if node.get_type_name() == "FakeQuantize" and not port.get_names():
                    _name_after_input(node, port)
                names = sorted(port.get_names())
                if not names or port.get_element_type() not in (ov.Type.f32, ov.Type.f16):
                    continue
                shown = _shown(node, names, port)
                if shown is not None:
                    found.append((shown, names[0]))
        ports = model.add_outputs([name for _, name in found if name not in ends])
        assert len(ports) == len([n for _, n in found if n not in ends])
        self._inputs = [
            (t, next(p for p in model.inputs if t.name in p.get_names())) for t in artifact.inputs
        ]
        for name in given:
            found.insert(0, (Shown(name), name))
        self._found = found
        self.tensors = tuple(shown for shown, _ in found)
        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # What is compared is the file as it stands.
            "LP_TRANSFORMS_MODE": "NO",
            # Without them int8 weights would let it round activations at run time.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._compiled = core.compile_model(model, "CPU", config)
        self._index = {
            name: number for number, port in enumerate(self._compiled.outputs) for name in port.get_names()
        }
        self.how = f"openvino {ov.__version__} on the CPU, Q/DQ in float32 without its low precision passes"

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        import numpy as np

        feeds = {t.name: to_runtime(t, arrays[t.source]) for t, _ in self._inputs}
        results = self._compiled(feeds)
        values: Dict[str, Any] = {name: results[number] for name, number in self._index.items()}
        values.update(feeds)
        return [np.asarray(values[name], np.float32) for _, name in self._found]


def _name_after_input(node: Any, port: Any) -> None:
    """Name a FakeQuantize that lost its name, when a Transpose behind it went into a product, as the quantizer did."""
    before = sorted(node.input_value(0).get_names())
    if before:
        port.get_tensor().set_names({before[0] + BEHIND_PAIR})


def _shown(node: Any, names: Sequence[str], port: Any) -> Any:
    """Return what a port shows, or None for what a Q/DQ pair follows, in which a Relu may have been absorbed."""
    base = next((n[: -len(BEHIND_PAIR)] for n in names if n.endswith(BEHIND_PAIR)), None)
    if node.get_type_name() == "FakeQuantize":
        low, high = (float(node.input_value(i).get_node().get_data().reshape(-1)[0]) for i in (3, 4))
        levels = node.get_attributes()["levels"] - 1
        scale = (high - low) / levels or 1.0
        name = base if base is not None else names[0]
        readers = _readers(port)
        return Shown(name, scale, round(-low / scale), (0, int(levels)), readers)
    if base is not None:
        return None  # a weight
    readers = _readers(port)
    targets = [t.get_node().get_type_name() for t in port.get_target_inputs()]
    if targets and all(t == "FakeQuantize" for t in targets):
        return None
    return Shown(names[0], readers=readers)


def _readers(port: Any) -> Tuple[str, ...]:
    """Return the operators that read a port, by their ONNX names: the converter splits a convolution from its bias."""
    names = [t.get_node().get_friendly_name() for t in port.get_target_inputs()]
    return tuple(n[: -len("/WithoutBiases")] if n.endswith("/WithoutBiases") else n for n in names)
