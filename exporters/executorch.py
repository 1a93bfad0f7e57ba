"""ExecuTorch: programs (.pte) whose operators run in XNNPACK, fp32, int8 and int8-dynamic."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

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
    Precision,
    Ranges,
    Recipe,
    Session,
    Source,
    TensorSpec,
    Unavailable,
    Workload,
)
from portcall.targets.agent.errors import CellFailed, UnsupportedError
from portcall.targets.agent.probing import probe_modules
from portcall.targets.agent.profiling import Profiler

PROGRAM = "model.pte"
METHOD = "forward"
DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool",
}  # fmt: skip
"""ExecuTorch's numbers of scalar types (those of torch) -> NumPy's names."""


def probe(role: str) -> Union[Available, Unavailable]:
    found = ["onnx", "torchao"] if role == "export" else []
    return probe_modules("executorch", ["executorch.runtime", "torch"], found, distribution="executorch")


def lower(source: Source, directory: Path) -> Graph:
    from portcall.exporters import _onnx

    return _onnx.lower(source, directory)


def export(graph: Graph, recipe: Recipe, ranges: Optional[Ranges], directory: Path) -> Exported:
    from importlib.metadata import version

    from portcall.exporters import _executorch_convert

    source = graph.source
    converted = _executorch_convert.convert(graph, recipe, ranges, directory)
    (directory / PROGRAM).write_bytes(converted.program)
    # A program's inputs and outputs have a position and no name.
    inputs = tuple(
        BoundTensor(t.name, f"input_{i}", source.example_shapes[t.name], t.dtype)
        for i, t in enumerate(source.inputs)
    )
    outputs = tuple(
        BoundTensor(t.name, f"output_{i}", shape, t.dtype)
        for i, (t, shape) in enumerate(zip(source.outputs, converted.output_shapes))
    )
    versions = {name: version(name) for name in ("executorch", "torch", "torchao", "onnx")}
    written_by = versions["executorch"].partition("+")[0]
    files = (PROGRAM, _executorch_convert.LEFT_OUT) if source.quantized else (PROGRAM,)
    return Exported(PROGRAM, files, inputs, outputs, versions, converted.notes, written_by)


def census(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Census:
    from portcall.exporters import _executorch_program

    return _executorch_program.census(artifact.path)


def contents(artifact: Artifact, shapes: Mapping[str, Tuple[int, ...]]) -> Contents:
    from portcall.exporters import _contents_executorch

    return _contents_executorch.read(artifact)


class ExecuTorchSession(Session):
    """A method of a loaded program. Its threads are those of the process: ExecuTorch has one pool.

    The first session sets its size; a program that runs must not lose the pool that it was loaded with.
    """

    _is_pool_set = False

    def __init__(self, path: Path, threads: int) -> None:
        from importlib.metadata import version

        from executorch.extension.pybindings import portable_lib

        if not ExecuTorchSession._is_pool_set:
            portable_lib._unsafe_reset_threadpool(threads)
            ExecuTorchSession._is_pool_set = True
        try:
            self._program = portable_lib._load_program(str(path))
            self._method = self._program.load_method(METHOD)
        except RuntimeError as error:
            raise CellFailed(
                f"ExecuTorch cannot load {path.name}: {error}",
                "Export it again with the version of ExecuTorch that runs it",
            ) from error
        meta = self._method.method_meta()
        self.inputs = tuple(_spec(f"input_{i}", meta.input_tensor_meta(i)) for i in range(meta.num_inputs()))
        self.outputs = tuple(
            _spec(f"output_{i}", meta.output_tensor_meta(i)) for i in range(meta.num_outputs())
        )
        self.environment = {
            "runtime": f"executorch {version('executorch')}",
            "threads": int(portable_lib._threadpool_get_thread_count()),
            "delegate": "XNNPACK",
        }

    def set_inputs(self, arrays: Mapping[str, Any]) -> None:
        import torch

        tensors = []
        for spec in self.inputs:
            array = arrays[spec.name]
            if tuple(array.shape) != spec.shape:
                raise UnsupportedError(
                    f"{spec.name} has shape {tuple(array.shape)}, this program only {spec.shape}",
                    "Export it again with --shape",
                )
            # torch's own strides: ExecuTorch takes those of an axis of size 1 for another order of axes.
            tensor = torch.empty(array.shape, dtype=getattr(torch, spec.dtype))
            tensors.append(tensor.copy_(torch.from_numpy(array)))
        self._held = tensors
        self._method.set_inputs(tensors)

    def infer(self) -> None:
        self._method.execute()

    def get_outputs(self) -> Dict[str, Any]:
        values = self._method.get_outputs()
        return {spec.name: value.numpy() for spec, value in zip(self.outputs, values)}


def _spec(name: str, info: Any) -> TensorSpec:
    kind = int(info.dtype())
    return TensorSpec(name, tuple(int(d) for d in info.sizes()), DTYPES.get(kind, f"type {kind}"))


@contextmanager
def load(artifact: Artifact, workload: Workload) -> Iterator[Session]:
    yield ExecuTorchSession(artifact.path, workload.threads)


@contextmanager
def profile(artifact: Artifact, workload: Workload) -> Iterator[Profiler]:
    from portcall.exporters._profile_executorch import ExecuTorchProfiler

    yield ExecuTorchProfiler(artifact, workload)


EXAMPLE = '''"""Run this artifact with ExecuTorch alone: pip install executorch numpy"""
import json
import pathlib

import numpy
import torch
from executorch.runtime import Runtime

@COMMON@


manifest = json.loads((here / "manifest.json").read_text())
method = Runtime.get().load_program(here / "@ENTRY@").load_method("forward")
feeds = []
for tensor in manifest["inputs"]:
    array = samples[tensor["source"]][0]
    feeds.append(torch.empty(array.shape, dtype=getattr(torch, tensor["dtype"])).copy_(torch.from_numpy(array)))
for tensor, value in zip(manifest["outputs"], method.execute(feeds)):
    show(tensor["source"], value.numpy())
'''

BACKEND = Backend(
    name="executorch",
    graph="onnx",
    capabilities=Capabilities(
        source_formats=("onnx", "pt2", "torch"),
        precisions={
            "fp32": Precision("float32"),
            "int8-dynamic": Precision(
                "int8 per-channel weights in matrix products and ordinary convolutions, their activations quantized at "
                "run time",
                integer=True,
            ),
            "int8": Precision(
                "int8 asymmetric activations, int8 per-channel weights", calibrated=True, integer=True
            ),
        },
        suffixes=(".pte",),
    ),
    probe=probe,
    lower=lower,
    export=export,
    load=load,
    census=census,
    contents=contents,
    example=EXAMPLE,
    profile=profile,
)
