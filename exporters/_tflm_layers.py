"""Layer by layer: TensorFlow Lite Micro against LiteRT's reference kernels and against XNNPACK, on the same inputs."""

from __future__ import annotations

import warnings
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from portcall.targets.agent.contract import Ranges

SAMPLES = 4
SEED = 0
PEERS = {"reference": "LiteRT's reference kernels", "xnnpack": "LiteRT with XNNPACK"}


def random_inputs(model: Any, ranges: Optional[Ranges]) -> List[List[Any]]:
    """Return SAMPLES inputs, each the arrays of all inputs in the subgraph's order, always the same.

    Floats are uniform in their calibrated range, normal without one; integers with a scale span their type (they are
    quantized floats), others are 0 or 1, valid as any index.
    """
    import numpy as np
    from ai_edge_litert.schema_py_generated import TensorType

    types = {v: k.lower() for k, v in vars(TensorType).items() if isinstance(v, int)}
    rng = np.random.default_rng(SEED)
    graph = model.subgraphs[0]
    samples = []
    for _ in range(SAMPLES):
        arrays = []
        for index in graph.inputs:
            tensor = graph.tensors[index]
            dtype, shape = np.dtype(types[tensor.type]), [int(d) for d in tensor.shape]
            found = ranges.get(tensor.name.decode()) if ranges is not None else None
            values: Any
            if dtype.kind == "f" and found is not None:
                values = rng.uniform(found.minimum, found.maximum, shape)
            elif dtype.kind == "f":
                values = rng.standard_normal(shape)
            elif tensor.quantization is not None and tensor.quantization.scale is not None:
                values = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, endpoint=True)
            else:
                values = rng.integers(0, 2, shape)
            arrays.append(np.asarray(values, dtype))
        samples.append(arrays)
    return samples


def compare(flatbuffer: bytes, samples: Sequence[Sequence[Any]], arena_bytes: int) -> Dict[str, Any]:
    """Return how far each operator's output is from TFLM's, over all *samples* together.

    samples: arrays in the order of the subgraph's inputs. arena_bytes: enough to keep every tensor.
    Per layer and peer: max_difference (steps of an integer, else absolute), share of elements that differ, and origin:
    whether it differs on a sample where all its own inputs are the same (else it may only pass a difference on).
    """
    from importlib.metadata import version

    import numpy as np
    from ai_edge_litert.schema_py_generated import TensorType

    from portcall.exporters import _tflite

    model = _tflite._read(flatbuffer)
    operators = _tflite.operators(model)
    graph = model.subgraphs[0]
    made = [int(o) for op, _ in operators for o in op.outputs]
    layers: Dict[int, Dict[str, Any]] = {}
    types = {v: k.lower() for k, v in vars(TensorType).items() if isinstance(v, int)}
    for op, kind in operators:
        for output in op.outputs:
            tensor = graph.tensors[output]
            layers[int(output)] = {
                "name": tensor.name.decode(),
                "operator": kind,
                "dtype": types[tensor.type],
            }
            for peer in PEERS:
                layers[int(output)][peer] = {"max_difference": 0, "share": 0.0, "origin": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that preserving all tensors takes memory
        micro = _micro(flatbuffer, arena_bytes)
        peers = {
            "reference": _reference(flatbuffer),
            "xnnpack": _xnnpack(_tflite.with_outputs(flatbuffer, made)),
        }
        for arrays in samples:
            ours = micro(arrays, made)
            for peer, run in peers.items():
                theirs = run(arrays, made)
                for op, _ in operators:
                    same = all(np.array_equal(ours[i], theirs[i]) for i in map(int, op.inputs) if i in ours)
                    for output in map(int, op.outputs):
                        _add(layers[output][peer], ours[output], theirs[output], same, len(samples))
    return {
        "schema": 1,
        "samples": len(samples),
        "inputs": f"random within the calibrated ranges, seed {SEED}",
        "versions": {d: version(d) for d in ("tflite_micro", "ai-edge-litert")},
        "layers": list(layers.values()),
    }


def _add(entry: Dict[str, Any], ours: Any, theirs: Any, same_inputs: bool, samples: int) -> None:
    import numpy as np

    wide = np.float64 if ours.dtype.kind == "f" else np.int64
    difference = np.nan_to_num(np.abs(ours.astype(wide) - theirs.astype(wide)))  # JSON has no NaN
    entry["max_difference"] = max(entry["max_difference"], difference.max(initial=0).item())
    entry["share"] += float(np.count_nonzero(difference)) / max(1, difference.size) / samples
    entry["origin"] |= bool(same_inputs and difference.any())


def _micro(flatbuffer: bytes, arena_bytes: int) -> Any:
    from tflite_micro.python.tflite_micro import runtime

    keep = runtime.InterpreterConfig.kPreserveAllTensors
    interpreter = runtime.Interpreter.from_bytes(flatbuffer, arena_size=arena_bytes, intrepreter_config=keep)

    def run(arrays: Sequence[Any], wanted: Sequence[int]) -> Dict[int, Any]:
        for position, array in enumerate(arrays):
            interpreter.set_input(array, position)
        interpreter.invoke()
        return {i: interpreter.GetTensor(i, 0)["tensor_data"].copy() for i in wanted}

    return run


def _reference(flatbuffer: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    return _litert(
        Interpreter(
            model_content=flatbuffer,
            experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
            experimental_preserve_all_tensors=True,
        )
    )


def _xnnpack(flatbuffer: bytes) -> Any:
    """Every tensor that is asked for is an output of this file: the delegate keeps no others."""
    from ai_edge_litert.interpreter import Interpreter

    return _litert(Interpreter(model_content=flatbuffer))


def _litert(interpreter: Any) -> Any:
    interpreter.allocate_tensors()
    inputs = [detail["index"] for detail in interpreter.get_input_details()]

    def run(arrays: Sequence[Any], wanted: Sequence[int]) -> Dict[int, Any]:
        for index, array in zip(inputs, arrays):
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return {i: interpreter.get_tensor(i) for i in wanted}

    return run


def notes(report: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return a sentence per peer for the manifest: in how many layers TFLM differs from it, where first, how far."""
    said = []
    for peer, name in PEERS.items():
        layers = report["layers"]
        differing = [layer for layer in layers if layer[peer]["max_difference"]]
        where = f"{len(layers)} layers on {report['samples']} random inputs"
        if not differing:
            said.append(f"TFLM (on the host) equals {name} bit for bit in all {where}")
            continue
        first = differing[0]
        integers = [layer for layer in differing if not layer["dtype"].startswith("float")]
        largest = max(layer[peer]["max_difference"] for layer in integers or differing)
        unit = "integer step(s)" if integers else "(absolute)"
        said.append(
            f"TFLM (on the host) differs from {name} in {len(differing)} of {where}, first in {first['name']!r} "
            f"({first['operator']}), by at most {largest:.4g} {unit}: see layers.json"
        )
    return tuple(said)
