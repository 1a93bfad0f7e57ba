"""The canonical ONNX graph as a Core ML program: ONNX to torch, torch.export, and coremltools' converter.

torch.export keeps dynamic dimensions and Q/DQ pairs, which torch.jit.trace makes constants of.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Source, TensorSpec
from portcall.targets.agent.errors import CellFailed, UnsupportedError

if TYPE_CHECKING:
    from portcall.exporters._coreml_options import Image

LARGEST_DIM = 2048
"""The upper bound of a dynamic dimension, unless the example is larger."""
LARGEST_HALF = 65504.0
SMALLEST_HALF = 2.0**-14
"""Of float16's numbers with full precision."""


def runtime_dtype(dtype: str) -> str:
    """Return the dtype that a package takes for the source's *dtype*: Core ML's arrays are float32 or int32."""
    return "float32" if dtype.startswith(("float", "bfloat")) else "int32"


def example_shapes(source: Source, fixed: bool) -> Dict[str, Tuple[int, ...]]:
    """Return the shapes to convert with: the examples', at least 2 where a dimension stays dynamic.

    (torch.export takes a dynamic dimension of size 1 for a constant.)
    """
    return {
        t.name: tuple(
            max(2, example) if isinstance(dim, str) and not fixed else example
            for dim, example in zip(t.shape, source.example_shapes[t.name])
        )
        for t in source.inputs
    }


def to_program(path: Path, source: Source, fixed: bool) -> Tuple[Any, Any]:
    """Return the ONNX graph at *path* as a torch module and as an ExportedProgram with the source's tensors in order.

    Its inputs and outputs are float32 and int32. Raises UnsupportedError where a dynamic dimension cannot be kept.
    """
    import torch

    from portcall.exporters._coreml_tools import quiet
    from portcall.exporters._onnx_to_torch import to_module

    module = to_module(path).eval()
    wrapped = _casting(torch, module, source)
    shapes = example_shapes(source, fixed)
    examples = tuple(
        torch.zeros(shapes[t.name], dtype=getattr(torch, runtime_dtype(t.dtype))) for t in source.inputs
    )
    dynamic = torch.export.Dim.DYNAMIC
    open_dims = tuple(
        {i: dynamic for i, d in enumerate(t.shape) if isinstance(d, str) and not fixed} for t in source.inputs
    )
    with torch.no_grad(), quiet():
        try:
            program = torch.export.export(wrapped, examples, dynamic_shapes=(open_dims,))
            program = program.run_decompositions({})
            _name_after_onnx(program)
            return module, program
        except UnsupportedError:
            raise
        except Exception as error:  # torch raises kinds of its own for a dimension that it must fix
            if not any(open_dims):
                raise CellFailed(
                    f"torch.export of the graph failed: {_first_line(error)}", "See the log"
                ) from error
            raise UnsupportedError(
                f"the dynamic dimensions cannot be kept: {_first_line(error)}",
                "Fix them: --shape NAME=1x128 and the option coreml.shapes=fixed",
            ) from error


def _casting(torch: Any, module: Any, source: Source) -> Any:
    """Return *module* with the source's inputs and outputs in order, as float32 and int32."""

    class Casting(torch.nn.Module):  # type: ignore[misc]  # torch is Any here
        def __init__(self) -> None:
            super().__init__()
            self.onnx = module  # "graph" is taken in a torch.fx module

        def forward(self, *arrays: Any) -> Any:
            given = {t.name: _as(torch, a, t.dtype) for t, a in zip(source.inputs, arrays)}
            made = module(*(given[name] for name in module.input_names))
            found = dict(zip(module.output_names, made))
            outputs = (found[t.name] for t in source.outputs)
            return tuple(_as(torch, o, runtime_dtype(t.dtype)) for t, o in zip(source.outputs, outputs))

    return Casting().eval()


def _as(torch: Any, tensor: Any, dtype: str) -> Any:
    wanted = getattr(torch, dtype)
    if tensor.dtype == wanted:
        return tensor
    return tensor != 0 if wanted == torch.bool else tensor.to(wanted)


def convert(
    module: Any,
    program: Any,
    source: Source,
    fixed: bool,
    target: str,
    half: bool,
    images: Mapping[str, Image],
) -> Tuple[Any, str]:
    """Convert *program*, exported from *module*; return coremltools' model and the target that its operators need.

    Raises UnsupportedError with the ONNX node of an operator that Core ML lacks.
    """
    from portcall.exporters import _coreml_pad
    from portcall.exporters._coreml_options import TARGETS
    from portcall.exporters._coreml_tools import coremltools, quiet

    ct = coremltools()
    inputs, dims = [], {}  # type: List[Any], Dict[str, Any]
    for spec in source.inputs:
        inputs.append(_input_type(ct, spec, source.example_shapes[spec.name], fixed, images, dims))
    outputs = [ct.TensorType(name=t.name) for t in source.outputs]
    precision = ct.transform.FP16ComputePrecision(op_selector=fits_half) if half else ct.precision.FLOAT32
    while True:
        with quiet() as errors:
            try:
                model = ct.convert(
                    program,
                    inputs=inputs,
                    outputs=outputs,
                    convert_to="mlprogram",
                    compute_precision=precision,
                    minimum_deployment_target=getattr(ct.target, target),
                    pass_pipeline=_coreml_pad.pipeline(source.quantized),
                    skip_model_load=True,
                )
                return model, target
            except Exception as error:  # coremltools raises ValueError, NotImplementedError, KeyError, ...
                newer = re.search(r"to at least coremltools\.target\.(iOS\d+)", str(error))
                if newer and TARGETS.get(newer[1], 0) > TARGETS[target]:
                    target = newer[1]
                    continue
                raise _refused(module, program, error, errors) from error


def _input_type(
    ct: Any,
    spec: TensorSpec,
    example: Sequence[int],
    fixed: bool,
    images: Mapping[str, Image],
    dims: Dict[str, Any],
) -> Any:
    """Return what coremltools takes for an input; inputs share the RangeDim of a dynamic dimension's name."""
    import numpy as np

    from portcall.exporters._coreml_options import check_image

    shape: List[Any] = []
    for dim, size in zip(spec.shape, example):
        if isinstance(dim, str) and not fixed:
            bound = max(LARGEST_DIM, size)
            dims.setdefault(dim, ct.RangeDim(lower_bound=1, upper_bound=bound, default=size))
            shape.append(dims[dim])
        else:
            shape.append(size)
    if spec.name not in images:
        return ct.TensorType(
            name=spec.name, shape=tuple(shape) or (1,), dtype=np.dtype(runtime_dtype(spec.dtype)).type
        )
    image = images[spec.name]
    check_image(spec, example, image)
    layout = {"RGB": ct.colorlayout.RGB, "BGR": ct.colorlayout.BGR, "GRAY": ct.colorlayout.GRAYSCALE}
    channels = 1 if image.color == "GRAY" else 3
    bias = list(image.bias) * (channels // len(image.bias))
    return ct.ImageType(
        name=spec.name,
        shape=tuple(example),
        scale=image.scale,
        bias=bias[0] if channels == 1 else bias,
        color_layout=layout[image.color],
    )


def fits_half(operation: Any) -> bool:
    """Tell whether an operator can compute in float16: none of its constants is finite and beyond its range.

    An attention mask of -3.4e38 would become -infinity, and 0 times that NaN; a scale below 2**-14 loses its digits.
    """
    import numpy as np

    if operation.op_type in ("quantize", "dequantize") and np.min(operation.scale.val) < SMALLEST_HALF:
        return False

    for value in operation.inputs.values():
        for var in value if isinstance(value, (tuple, list)) else [value]:
            array = getattr(var, "val", None)
            if isinstance(array, (np.ndarray, np.floating)) and array.dtype.kind == "f" and array.size:
                largest = np.max(np.abs(array), initial=0.0, where=np.isfinite(array))
                if largest > LARGEST_HALF:
                    return False
    return True


def _refused(module: Any, program: Any, error: Exception, logged: Sequence[str]) -> UnsupportedError:
    """Return the error for what coremltools does not convert: the operator, and the ONNX node that it comes from."""
    missing = re.search(r"Unsupported fx node (\S+), kind (\S+?)\.?$", str(error), re.MULTILINE)
    failed = [found[1] for found in (re.search(r"converting '([^']+)' op", text) for text in logged) if found]
    kind = missing[2] if missing else failed[-1] if failed else None
    name = missing[1] if missing else _only_node(program, kind)
    node = _onnx_node(module, name)
    what = "Core ML has no operator for" if missing else "coremltools cannot convert"
    detail = "" if missing else f": {_first_line(error)}"
    return UnsupportedError(
        f"{what} {node or 'this model'}{f', torch operator {kind}' if kind else ''}{detail}",
        "Replace that node in the model by operators that Core ML has, leave it outside of the model, "
        "or export to another backend",
    )


def _onnx_node(module: Any, name: Optional[str]) -> Optional[str]:
    """Return an ONNX node's name and type for the name of a torch operator: see ``_name_after_onnx``."""
    for identifier in (name or "", re.sub(r"_\d+$", "", name or "")):
        if identifier in module.node_names:
            op_type = getattr(module.nodes, identifier).node.op_type
            return f"{module.node_names[identifier]!r} ({op_type})"
    return name


def _name_after_onnx(program: Any) -> None:
    """Name every operator after its ONNX node (as an identifier): the operators of the package take these names."""
    taken = {node.name for node in program.graph.nodes}
    renamed: Dict[str, str] = {}
    for node in program.graph.nodes:
        paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op != "call_function" or not paths or ".nodes." not in paths[-1]:
            continue
        stem = paths[-1].rpartition(".nodes.")[2]
        name, number = stem, 0
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        renamed[node.name] = name
        node.name = name
    for spec in program.graph_signature.output_specs:
        spec.arg.name = renamed.get(spec.arg.name, spec.arg.name)


def _only_node(program: Any, kind: Optional[str]) -> Optional[str]:
    """Return the name of the torch operator of that kind, where there is only one."""
    wanted = (kind or "").rpartition("::")[2].split(".")[0]
    found = [
        str(node.name)
        for node in program.graph.nodes
        if getattr(getattr(node.target, "_schema", None), "name", "").rpartition("::")[2] == wanted
    ]
    return found[0] if len(found) == 1 else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")


def other_shapes(source: Source) -> Dict[str, Tuple[int, ...]]:
    """Return shapes with every dynamic dimension another size than in the example: to check that they are dynamic."""
    sizes: Dict[str, int] = {}
    for spec in source.inputs:
        for dim, example in zip(spec.shape, source.example_shapes[spec.name]):
            if isinstance(dim, str):
                sizes.setdefault(dim, example + 1)
    return {
        t.name: tuple(
            sizes[d] if isinstance(d, str) else e for d, e in zip(t.shape, source.example_shapes[t.name])
        )
        for t in source.inputs
    }


def random_inputs(inputs: Sequence[TensorSpec], shapes: Mapping[str, Tuple[int, ...]]) -> Dict[str, Any]:
    """Return random arrays of *shapes*: standard normal floats, integers and booleans 0 or 1 (valid as any index)."""
    import numpy as np

    rng = np.random.default_rng(0)
    made: Dict[str, Any] = {}
    for spec in inputs:
        dtype, shape = np.dtype(spec.dtype), shapes[spec.name]
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        made[spec.name] = np.asarray(values).astype(dtype)
    return made


def sqnr_db(wanted: Any, found: Any) -> float:
    """Return the signal to noise ratio in dB; infinity where both are equal."""
    import numpy as np

    wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
    noise = float(((wanted - found) ** 2).sum())
    signal = float((wanted**2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
