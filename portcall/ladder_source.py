"""Intermediate tensors of a source in its own framework, where their names are those of the exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from portcall.targets.agent.contract import Source

Array = np.ndarray[Any, Any]


def source_tensors(source: Source) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Return a function from one sample to the source's float tensors by name; empty for Keras.

    An ONNX source names its own. Torch's are the nodes of the exported program; the exported graph keeps their names
    where an operator is lowered as it is, and whoever compares has to check that both are the same tensor.
    """
    if source.format == "onnx":
        return _onnx(source)
    if source.format in ("pt2", "torch"):
        return _torch(source)
    return lambda sample: {}


def _onnx(source: Source) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    import onnx
    import onnxruntime as ort

    from portcall.exporters._trace_onnx import _float_tensors, open_session

    model = onnx.load(str(source.path), load_external_data=False)
    floats = _float_tensors(model, onnx.TensorProto)
    known = {v.name for v in model.graph.output}
    names = [n for node in model.graph.node for n in node.output if n in floats]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    session = open_session(ort, model, source.path, 1)
    return lambda sample: dict(zip(names, session.run(names, dict(sample)), strict=True))


def _torch(source: Source) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    import torch

    from portcall.source_torch import load_program

    module = load_program(source.path).module(check_guards=False)
    names = [str(n.name) for n in module.graph.nodes if n.op == "placeholder"]

    class Recorder(torch.fx.Interpreter):
        found: ClassVar[dict[str, Array]] = {}

        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
                self.found[str(n.name)] = value.detach().numpy().copy()
            return value

    def run(sample: Mapping[str, Array]) -> dict[str, Array]:
        recorder = Recorder(module)
        recorder.found.clear()
        ordered = [torch.from_numpy(sample[t.name]) for t in source.inputs]
        if len(ordered) != len(names):
            return {}
        with torch.no_grad():
            recorder.run(*ordered, enable_io_processing=False)
        return dict(recorder.found)

    return run
