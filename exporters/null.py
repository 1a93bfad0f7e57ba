"""A backend that computes nothing: it hands an input back. For tests, and to measure the harness itself.

It takes any model whose every output is an unchanged input, and refuses the others by name.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

from portcall.targets.agent.contract import (
    Artifact,
    Available,
    Backend,
    BoundTensor,
    Capabilities,
    Census,
    Exported,
    Graph,
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    TensorSpec,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import UnsupportedError
from portcall.targets.agent.probing import probe_modules


def probe(role: str) -> Union[Available, Unavailable]:
    return Available("1") if role == "run" else probe_modules("onnxruntime", ["onnx"])


def lower(source: Source, directory: Path) -> Graph:
    """Write which input each output copies. Only ONNX sources: their graphs can be read without running anything."""
    import onnx

    model = onnx.load(str(source.path), load_external_data=False)
    made_by = {name: node for node in model.graph.node for name in node.output}
    copies = {}
    for output in source.outputs:
        name = output.name
        while name in made_by:
            node = made_by[name]
            if node.op_type != "Identity":
                raise UnsupportedError(
                    f"null copies inputs; {node.op_type} {node.name!r} computes",
                    "Use a backend that runs models",
                )
            name = node.input[0]
        copies[output.name] = name
    path = directory / "graph.null"  # graph.json is the pipeline's
    path.write_text(json.dumps({"inputs": [t.to_json() for t in source.inputs], "copies": copies}))
    names = {t.name: t.name for t in (*source.inputs, *source.outputs)}
    return Graph("null", path, hashlib.sha256(path.read_bytes()).hexdigest(), source, names)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    (directory / "model.null").write_bytes(graph.path.read_bytes())
    source = graph.source
    inputs = tuple(BoundTensor(t.name, t.name, t.shape, t.dtype) for t in source.inputs)
    outputs = tuple(BoundTensor(t.name, t.name, t.shape, t.dtype) for t in source.outputs)
    return Exported("model.null", ("model.null",), inputs, outputs, {"null": "1"})


class NullSession(Session):
    """Does nothing in ``infer``: what is measured on it is the harness's own overhead."""

    def __init__(self, path: Path) -> None:
        model = json.loads(path.read_text())
        self._copies: Dict[str, str] = model["copies"]
        self.inputs = tuple(TensorSpec.from_json(t) for t in model["inputs"])
        by_name = {t.name: t for t in self.inputs}
        self.outputs = tuple(
            TensorSpec(o, by_name[i].shape, by_name[i].dtype) for o, i in self._copies.items()
        )
        self.environment = {"runtime": "null 1"}

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = dict(arrays)

    def infer(self) -> None:
        pass

    def get_outputs(self) -> Dict[str, Any]:
        return {output: self._arrays[source].copy() for output, source in self._copies.items()}


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield NullSession(artifact.path)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    return Census(0, 0, 0, (), "nothing is computed")


EXAMPLE = '''"""Run this artifact: it copies its inputs (null backend)."""
import json
import pathlib

print(json.loads((pathlib.Path(__file__).parent / "@ENTRY@").read_text())["copies"])
'''

BACKEND = Backend(
    name="null",
    graph="null",
    capabilities=Capabilities(
        source_formats=("onnx",), precisions={"fp32": Precision("a copy of the input")}, suffixes=(".null",)
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    example=EXAMPLE,
)
