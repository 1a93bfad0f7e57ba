"""An interpreter of Core ML's programs (MIL) for machines without Core ML: the saved ``.mlpackage``, weights from disk.

It computes what the specification says, not what a chip does: every operator in float32, its result rounded to the
type that the program declares (float16 after every operator of a float16 program). Core ML may keep more precision
within fused operators, or on the Neural Engine less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from portcall.targets.agent.contract import Dim, TensorSpec
from portcall.targets.agent.errors import BadInput, UnsupportedError

Watch = Callable[["Step", Mapping[str, Any], Sequence[Any]], None]
"""Sees every operator that runs: the step, its inputs by name, and its outputs."""


class Name(str):
    """The name of a tensor, where a step's input is no constant."""


Input = Union[Name, List[Any], Any]
"""A tensor's name, a list of names and constants, or a constant."""


class Step(NamedTuple):
    """One operator: its type, its inputs by MIL's parameter names, and the name and dtype of every output."""

    kind: str
    inputs: Mapping[str, Input]
    outputs: Tuple[Tuple[str, str], ...]
    made_from: Mapping[str, str]
    """Parameter -> type of the operator that made it ("const" for constants, "" for inputs of the program)."""


class Program:
    """The main function of a saved package. inputs, outputs: as the package describes them (images: "image").

    function: coremltools' own object of it.

    Raises BadInput for a folder that is no ML program, UnsupportedError for an operator that is not known here.
    """

    def __init__(self, package: Path) -> None:
        from portcall.exporters._coreml_tools import coremltools

        MLModel = coremltools().models.MLModel
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            model = MLModel(str(package), skip_model_load=True)
            self.spec = model.get_spec()
        except Exception as error:  # coremltools raises what its C++ part and protobuf happen to raise
            raise BadInput(
                f"{package} is no Core ML package: {error}", "Give the .mlpackage folder of an artifact"
            ) from error
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise BadInput(
                f"{package} holds a {self.spec.WhichOneof('Type')}, no ML program", "Export it again"
            )
        main = load(
            self.spec,
            specification_version=self.spec.specificationVersion,
            file_weights_dir=model.weights_dir,
        ).functions["main"]
        self.function = main
        self.inputs, self.outputs = described(self.spec)
        self._results = [v.name for v in main.outputs]
        self._operators = _operators()
        self._constants: Dict[str, Any] = {}
        self.steps: List[Step] = []
        self._origin: Dict[str, str] = {name: "" for name in main.inputs}
        for operation in main.operations:
            self._add(operation)
        last_use: Dict[str, int] = {}
        for number, step in enumerate(self.steps):
            last_use.update({name: number for name in _names(step.inputs)})
        self._unused_after: List[List[str]] = [[] for _ in self.steps]
        for name, number in last_use.items():
            if name not in self._results:
                self._unused_after[number].append(name)

    def _add(self, operation: Any) -> None:
        """Take over one operator: constants, stored in few bits or not, are made here, the others when running."""
        from coremltools.converters.mil.mil import types

        kind = operation.op_type
        for output in operation.outputs:
            self._origin[output.name] = kind
        if kind == "const":
            self._constants[operation.outputs[0].name] = _widened(operation.val.val)
            return
        outputs = tuple((v.name, _dtype_name(types.nptype_from_builtin(v.dtype))) for v in operation.outputs)
        if kind not in self._operators or operation.blocks:
            raise UnsupportedError(
                f"the interpreter has no operator {kind!r}, which makes {outputs[0][0]!r}",
                "Verify this artifact on a Mac, where Core ML runs it",
            )
        given = {k: v for k, v in operation.inputs.items() if v is not None}
        inputs = {k: self._input(v) for k, v in given.items()}
        made_from = {k: self._origin[v.name] for k, v in given.items() if not isinstance(v, (tuple, list))}
        step = Step(kind, inputs, outputs, made_from)
        if kind.startswith("constexpr_"):
            results = self._compute(step, inputs)
            self._constants.update({name: _widened(v) for (name, _), v in zip(outputs, results)})
        else:
            self.steps.append(step)

    def _input(self, value: Any) -> Input:
        if isinstance(value, (tuple, list)):
            return [self._input(v) for v in value]
        return self._constants[value.name] if value.name in self._constants else Name(value.name)

    def _compute(self, step: Step, inputs: Mapping[str, Any]) -> List[Any]:
        """Run one operator and round its outputs to their declared types."""
        import numpy as np

        found = self._operators[step.kind](**inputs)
        results = found if isinstance(found, list) else [found]
        return [np.asarray(r).astype(dtype, copy=False) for r, (_, dtype) in zip(results, step.outputs)]

    def run(self, feeds: Mapping[str, Any], watch: Optional[Watch] = None) -> Dict[str, Any]:
        """Return the program's outputs by name. feeds: arrays by input name, of the program's dtypes.

        watch sees every operator. Overflow of float16 gives infinity, as on the device.
        """
        import numpy as np

        values: Dict[str, Any] = dict(feeds)
        with np.errstate(all="ignore"):
            for step, unused in zip(self.steps, self._unused_after):
                inputs = {k: _resolve(v, values) for k, v in step.inputs.items()}
                results = self._compute(step, inputs)
                if watch is not None:
                    watch(step, inputs, results)
                values.update({name: r for (name, _), r in zip(step.outputs, results)})
                for name in unused:
                    del values[name]
        constants = self._constants
        return {n: np.array(values[n] if n in values else constants[n]) for n in self._results}


def _operators() -> Dict[str, Callable[..., Any]]:
    from portcall.exporters import _mil_moving, _mil_nn, _mil_ops, _mil_resize, _mil_weights

    parts = (_mil_ops, _mil_moving, _mil_nn, _mil_resize, _mil_weights)
    return {name: f for part in parts for name, f in part.operators().items()}


def _widened(value: Any) -> Any:
    """Return float16 arrays as float32, in which operators compute; anything else as it is."""
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float16:
        return value.astype(np.float32)
    return value


def _resolve(value: Input, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Name):
        return _widened(values[value])
    return [_resolve(v, values) for v in value] if isinstance(value, list) else value


def _names(inputs: Mapping[str, Input]) -> List[str]:
    flat = [v for value in inputs.values() for v in (value if isinstance(value, list) else [value])]
    return [str(v) for v in flat if isinstance(v, Name)]


def _dtype_name(dtype: Any) -> str:
    import numpy as np

    return "str" if dtype is str else np.dtype(dtype).name


def described(spec: Any) -> Tuple[Tuple[TensorSpec, ...], Tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a package's specification."""
    description = spec.description
    return tuple(map(_described, description.input)), tuple(map(_described, description.output))


def _described(feature: Any) -> TensorSpec:
    """Return an input or output of the package's description; flexible dimensions are called dim_0, dim_1, ..."""
    kind = feature.type.WhichOneof("Type")
    if kind == "imageType":
        image = feature.type.imageType
        return TensorSpec(feature.name, (int(image.height), int(image.width)), "image")
    array = feature.type.multiArrayType
    dtypes = {
        array.FLOAT32: "float32",
        array.FLOAT16: "float16",
        array.INT32: "int32",
        array.DOUBLE: "float64",
    }
    shape: List[Dim] = [int(d) for d in array.shape]
    for axis, bounds in enumerate(array.shapeRange.sizeRanges):
        if bounds.upperBound != bounds.lowerBound:
            shape[axis] = f"dim_{axis}"
    return TensorSpec(feature.name, tuple(shape), dtypes.get(array.dataType, str(array.dataType)))
