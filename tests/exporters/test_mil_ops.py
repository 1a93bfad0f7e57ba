"""The MIL interpreter's operators against torch, or against their closed form, each in a saved package of its own.

Long because it is one table with a row for every operator.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from portcall.exporters._coreml_tools import coremltools, quiet, save
from portcall.exporters._mil import Program

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("coremltools is not installed: pip install 'portcall[coreml]'", allow_module_level=True)

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)

ct = coremltools()
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402  # only after the quiet import
from coremltools.converters.mil.mil import types  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Take what is loaded out of garbage collection: ct.convert collects at every call, 0.4 s of its 0.41."""
    gc.freeze()
    yield
    gc.unfreeze()


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def run(
    tmp_path: Path,
    build: Callable[..., Any],
    arrays: Sequence[Array],
    target: str = "iOS17",
    half: bool = False,
) -> list[Array]:
    """Return the outputs of a one-operator program after saving it and reading it back."""
    dtypes = {"float32": types.fp16 if half else types.fp32, "int32": types.int32, "bool": types.bool}
    specs = [mb.TensorSpec(shape=a.shape, dtype=dtypes[a.dtype.name]) for a in arrays]
    names = ["x", "y", "z"][: len(arrays)]
    version = getattr(ct.target, target)
    code = f"lambda {', '.join(names)}: build({', '.join(names)})"  # coremltools reads the names of the parameters
    with quiet():
        program = mb.program(input_specs=specs, opset_version=version)(eval(code, {"build": build}))
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=version,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    package = tmp_path / "op.mlpackage"
    save(model, package)
    feeds = {
        n: a.astype(np.float16) if half and a.dtype == np.float32 else a
        for n, a in zip(names, arrays, strict=True)
    }
    return list(Program(package).run(feeds).values())


X4, X3, X2 = normal(2, 6, 7, 9), normal(2, 5, 4), normal(3, 4)
P4 = np.abs(X4) + np.float32(0.1)
POS = np.abs(X2) + np.float32(0.1)
UNIT = np.clip(X2 / 3, -0.9, 0.9)
OTHER = normal(3, 4)
I2 = np.array([[0, 2, 1, 2], [1, 1, 0, 2], [2, 0, 0, 1]], np.int32)
CHANNELS = np.linspace(0.5, 2, 6, dtype=np.float32)

UNARY: dict[str, tuple[Array, Callable[[torch.Tensor], torch.Tensor]]] = {
    "abs": (X2, torch.abs),
    "acos": (UNIT, torch.acos),
    "asin": (UNIT, torch.asin),
    "atan": (X2, torch.atan),
    "atanh": (UNIT, torch.atanh),
    "ceil": (X2, torch.ceil),
    "cos": (X2, torch.cos),
    "cosh": (X2, torch.cosh),
    "erf": (X2, torch.erf),
    "exp": (X2, torch.exp),
    "exp2": (X2, torch.exp2),
    "floor": (X2, torch.floor),
    "identity": (X2, lambda x: x),
    "relu": (X2, torch.relu),
    "relu6": (X2 * 5, F.relu6),
    "round": (np.array([[-2.5, -0.5, 0.5, 1.5]], np.float32), torch.round),
    "sigmoid": (X2 * 20, torch.sigmoid),
    "sign": (X2, torch.sign),
    "silu": (X2, F.silu),
    "sin": (X2, torch.sin),
    "sinh": (X2, torch.sinh),
    "softplus": (X2 * 30, F.softplus),
    "softsign": (X2, F.softsign),
    "sqrt": (POS, torch.sqrt),
    "square": (X2, torch.square),
    "tan": (X2, torch.tan),
    "tanh": (X2, torch.tanh),
}


@pytest.mark.parametrize("name", UNARY)
def test_elementwise_operators_of_one_input(tmp_path: Path, name: str) -> None:
    x, reference = UNARY[name]
    [found] = run(tmp_path, lambda x: getattr(mb, name)(x=x), [x])
    np.testing.assert_allclose(found, reference(torch.from_numpy(x)), rtol=2e-5, atol=2e-6)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": np.divide,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


@pytest.mark.parametrize("name", BINARY)
def test_elementwise_operators_of_two_inputs_broadcast(tmp_path: Path, name: str) -> None:
    x, y = POS, np.abs(OTHER[:1]) + np.float32(0.5)
    x[0, 0] = y[0, 0]
    [found] = run(tmp_path, lambda x, y: getattr(mb, name)(x=x, y=y), [x, y])
    np.testing.assert_allclose(found, BINARY[name](x, y), rtol=1e-6)


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_logic(tmp_path: Path, name: str) -> None:
    def build(x: Any, y: Any) -> Any:
        return getattr(mb, name)(x=mb.greater(x=x, y=0.0), y=mb.logical_not(x=mb.less(x=y, y=0.0)))

    [found] = run(tmp_path, build, [X2, OTHER])
    np.testing.assert_array_equal(found, getattr(np, name)(X2 > 0, OTHER >= 0))


# name -> (builder, inputs, what torch or the closed form gives)
T = torch.from_numpy
Case = tuple[Callable[..., Any], list[Array], Callable[[], Any]]
W = normal(4, 3, 3, 2)
B = normal(4)
WT = normal(6, 2, 3, 3)
EINSUM = normal(2, 9, 7, 4)


def conv(**options: Any) -> Callable[..., Any]:
    return lambda x: mb.conv(x=x, weight=W, bias=B, groups=2, **options)


def transposed(**options: Any) -> Callable[..., Any]:
    return lambda x: mb.conv_transpose(x=x, weight=WT, groups=2, strides=[2, 2], **options)


def torch_conv(x: Array, **options: Any) -> torch.Tensor:
    return F.conv2d(T(x), T(W), T(B), groups=2, **options)


def torch_transposed(**options: Any) -> torch.Tensor:
    return F.conv_transpose2d(T(X4), T(WT), groups=2, stride=2, **options)


CASES: dict[str, Case] = {
    "conv": (
        conv(strides=[2, 1], dilations=[1, 2], pad_type="custom", pad=[1, 1, 2, 2]),
        [X4],
        lambda: torch_conv(X4, stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
    ),
    "conv valid": (conv(pad_type="valid"), [X4], lambda: torch_conv(X4)),
    "conv same": (
        conv(pad_type="same", strides=[2, 2]),
        [X4],
        lambda: F.conv2d(F.pad(T(X4), (0, 1, 1, 1)), T(W), T(B), 2, groups=2),
    ),
    "conv same_lower": (
        conv(pad_type="same_lower"),
        [X4],
        lambda: F.conv2d(F.pad(T(X4), (1, 0, 1, 1)), T(W), T(B), groups=2),
    ),
    "conv 1d": (
        lambda x: mb.conv(x=x, weight=normal(3, 5, 2) * 0 + 1, pad_type="valid"),
        [X3],
        lambda: F.conv1d(T(X3), torch.ones(3, 5, 2)),
    ),
    "conv 3d": (
        lambda x: mb.conv(x=x, weight=np.ones((2, 3, 2, 2, 2), np.float32), pad_type="valid"),
        [X4.reshape(2, 3, 2, 7, 9)],
        lambda: F.conv3d(T(X4.reshape(2, 3, 2, 7, 9)), torch.ones(2, 3, 2, 2, 2)),
    ),
    "conv_transpose": (
        transposed(pad_type="custom", pad=[1, 1, 1, 1], bias=B),
        [X4],
        lambda: torch_transposed(padding=1, bias=T(B)),
    ),
    "conv_transpose output_shape": (
        transposed(pad_type="custom", pad=[1, 1, 1, 1], output_shape=[2, 4, 14, 18]),
        [X4],
        lambda: torch_transposed(padding=1, output_padding=1),
    ),
    "conv_transpose same": (
        transposed(pad_type="same"),
        [X4],
        lambda: torch_transposed()[:, :, :14, :18],
    ),
    "max_pool": (
        lambda x: mb.max_pool(
            x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True
        ),
        [X4],
        lambda: F.max_pool2d(T(X4), (3, 2), 2, (1, 1), ceil_mode=True),
    ),
    "avg_pool": (
        lambda x: mb.avg_pool(
            x=x,
            kernel_sizes=[3, 3],
            strides=[2, 2],
            pad_type="custom",
            pad=[1, 1, 1, 1],
            exclude_padding_from_average=True,
        ),
        [X4],
        lambda: F.avg_pool2d(T(X4), 3, 2, 1, count_include_pad=False),
    ),
    "avg_pool counts its padding, and not what ceil_mode adds": (
        lambda x: mb.avg_pool(
            x=x, kernel_sizes=[3, 4], strides=[3, 3], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True
        ),
        [X4],
        lambda: F.avg_pool2d(T(X4), (3, 4), 3, 1, ceil_mode=True),
    ),
    "l2_pool": (
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 3], strides=[1, 2], pad_type="valid"),
        [X4],
        lambda: F.lp_pool2d(T(X4), 2.0, (2, 3), (1, 2)),
    ),
    "batch_norm": (
        lambda x: mb.batch_norm(
            x=x,
            mean=CHANNELS / 3,
            variance=CHANNELS,
            gamma=CHANNELS[::-1].copy(),
            beta=CHANNELS - 1,
            epsilon=0.01,
        ),
        [X4],
        lambda: F.batch_norm(
            T(X4), T(CHANNELS / 3), T(CHANNELS), T(CHANNELS[::-1].copy()), T(CHANNELS - 1), eps=0.01
        ),
    ),
    "instance_norm": (
        lambda x: mb.instance_norm(x=x, gamma=CHANNELS, beta=CHANNELS - 1, epsilon=0.01),
        [X4],
        lambda: F.instance_norm(T(X4), weight=T(CHANNELS), bias=T(CHANNELS - 1), eps=0.01),
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(
            x=x, axes=[-1], gamma=CHANNELS[:4].copy(), beta=CHANNELS[2:].copy(), epsilon=0.01
        ),
        [X3],
        lambda: F.layer_norm(T(X3), (4,), T(CHANNELS[:4]), T(CHANNELS[2:]), 0.01),
    ),
    "layer_norm of two axes": (
        lambda x: mb.layer_norm(x=x, axes=[-2, -1], epsilon=0.01),
        [X3],
        lambda: F.layer_norm(T(X3), (5, 4), eps=0.01),
    ),
    "l2_norm": (
        lambda x: mb.l2_norm(x=x, epsilon=0.01),
        [X4],
        lambda: X4 / np.sqrt((X4**2).sum((1, 2, 3), keepdims=True) + 0.01),
    ),
    "local_response_norm": (
        lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.75, k=1.5),
        [X4],
        lambda: F.local_response_norm(T(X4), 3, 0.1, 0.75, 1.5),
    ),
    "linear": (
        lambda x: mb.linear(x=x, weight=OTHER, bias=CHANNELS[:3].copy()),
        [X3],
        lambda: F.linear(T(X3), T(OTHER), T(CHANNELS[:3])),
    ),
    "matmul": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_y=True),
        [X3, normal(2, 3, 4) * 0 + X3[:, :3]],
        lambda: T(X3) @ T(X3[:, :3]).transpose(1, 2),
    ),
    "matmul transpose_x": (
        lambda x: mb.matmul(x=x, y=normal(5, 2) * 0 + 1, transpose_x=True),
        [X3],
        lambda: T(X3).transpose(1, 2) @ torch.ones(5, 2),
    ),
    "einsum": (
        lambda x, y: mb.einsum(values=(x, y), equation="bijk,bkjl->bijl"),
        [X4, EINSUM],
        lambda: torch.einsum("bijk,bkjl->bijl", T(X4), T(EINSUM)),
    ),
    "scaled_dot_product_attention": (
        lambda x, y: mb.scaled_dot_product_attention(
            query=x, key=y, value=y, attn_mask=mb.greater(x=x, y=-1.0)
        ),
        [X4[..., :7].copy(), X4[..., 2:].copy()],
        lambda: F.scaled_dot_product_attention(
            T(X4[..., :7]), T(X4[..., 2:]), T(X4[..., 2:]), T(X4[..., :7] > -1)
        ),
    ),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), [X3 * 50], lambda: F.softmax(T(X3 * 50), 1)),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), [X2], lambda: F.elu(T(X2), 0.7)),
    "gelu": (lambda x: mb.gelu(x=x, mode="EXACT"), [X2], lambda: F.gelu(T(X2))),
    "gelu tanh": (
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        [X2],
        lambda: F.gelu(T(X2), approximate="tanh"),
    ),
    "gelu sigmoid": (
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        [X2],
        lambda: T(X2) * torch.sigmoid(1.702 * T(X2)),
    ),
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.2), [X2], lambda: F.leaky_relu(T(X2), 0.2)),
    "prelu": (lambda x: mb.prelu(x=x, alpha=CHANNELS), [X4], lambda: F.prelu(T(X4), T(CHANNELS))),
    "clamped_relu": (
        lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.5),
        [X2],
        lambda: F.leaky_relu(T(X2), 0.1).clamp(max=0.5),
    ),
    "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=3.0), [X2], lambda: 2 * X2 + 3),
    "scaled_tanh": (lambda x: mb.scaled_tanh(x=x, alpha=2.0, beta=3.0), [X2], lambda: 2 * np.tanh(3 * X2)),
    "sigmoid_hard": (
        lambda x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5),
        [X2 * 5],
        lambda: F.hardsigmoid(T(X2 * 5)),
    ),
    "softplus_parametric": (
        lambda x: mb.softplus_parametric(x=x, alpha=CHANNELS, beta=CHANNELS[::-1].copy()),
        [X4],
        lambda: T(CHANNELS)[:, None, None] * F.softplus(T(CHANNELS[::-1].copy())[:, None, None] * T(X4)),
    ),
    "thresholded_relu": (
        lambda x: mb.thresholded_relu(x=x, alpha=0.5),
        [X2],
        lambda: np.where(X2 >= 0.5, X2, 0),
    ),
    "threshold": (lambda x: mb.threshold(x=x, alpha=0.5), [X2], lambda: np.maximum(X2, 0.5)),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), [X2], lambda: np.clip(X2, -0.5, 0.7)),
    "inverse": (lambda x: mb.inverse(x=x, epsilon=0.1), [POS], lambda: 1 / (POS + 0.1)),
    "log": (lambda x: mb.log(x=x, epsilon=0.1), [POS], lambda: np.log(POS + 0.1)),
    "rsqrt": (lambda x: mb.rsqrt(x=x, epsilon=0.1), [POS], lambda: 1 / np.sqrt(POS + 0.1)),
    "cast to int32 cuts": (
        lambda x: mb.cast(x=x, dtype="int32"),
        [X2 * 5],
        lambda: (X2 * 5).astype(np.int32),
    ),
    "cast to bool": (lambda x: mb.cast(x=x, dtype="bool"), [I2], lambda: I2.astype(bool)),
    "select": (
        lambda x, y: mb.select(cond=mb.greater(x=x, y=y), a=x, b=y),
        [X2, OTHER],
        lambda: np.maximum(X2, OTHER),
    ),
    "integers divide to integers": (
        lambda x: mb.real_div(x=mb.mul(x=x, y=np.int32(7)), y=np.int32(2)),
        [I2],
        lambda: I2 * 7 // 2,
    ),
    # moving
    "reshape": (lambda x: mb.reshape(x=x, shape=[2, -1, 2]), [X3], lambda: X3.reshape(2, 10, 2)),
    "reshape keeps at 0": (lambda x: mb.reshape(x=x, shape=[0, -1]), [X3], lambda: X3.reshape(2, 20)),
    "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, 1]), [X3], lambda: X3.transpose(2, 0, 1)),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), [X2], lambda: X2[None, :, :, None]),
    "squeeze": (lambda x: mb.squeeze(x=x, axes=[1]), [X3[:, :1].copy()], lambda: X3[:, 0]),
    "slice_by_index": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 1, 6, 0],
            end=[0, -1, 0, 5],
            stride=[1, 2, -2, 1],
            begin_mask=[False, False, False, True],
            squeeze_mask=[True, False, False, False],
        ),
        [X4],
        lambda: X4[0, 1:-1:2, 6:0:-2, :5],
    ),
    "slice_by_index to the end": (
        lambda x: mb.slice_by_index(x=x, begin=[1, -3], end=[0, 0], end_mask=[True, True]),
        [X2],
        lambda: X2[1:, -3:],
    ),
    "slice_by_size": (
        lambda x: mb.slice_by_size(x=x, begin=[1, 0], size=[-1, 2]),
        [X2],
        lambda: X2[1:, :2],
    ),
    "concat": (lambda x, y: mb.concat(values=(x, y), axis=1), [X2, OTHER], lambda: np.hstack([X2, OTHER])),
    "concat interleaved": (
        lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        [X2, OTHER],
        lambda: np.stack([X2, OTHER], 2).reshape(3, 8),
    ),
    "stack": (lambda x, y: mb.stack(values=(x, y), axis=1), [X2, OTHER], lambda: np.stack([X2, OTHER], 1)),
    "split": (
        lambda x: mb.split(x=x, split_sizes=[1, 3], axis=1)[1],
        [X2],
        lambda: X2[:, 1:],
    ),
    "split evenly": (lambda x: mb.split(x=x, num_splits=2, axis=-1)[0], [X2], lambda: X2[:, :2]),
    "tile": (lambda x: mb.tile(x=x, reps=[2, 3]), [X2], lambda: np.tile(X2, (2, 3))),
    "pad": (
        lambda x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="constant", constant_val=0.5),
        [X3],
        lambda: np.pad(X3, [(0, 0), (1, 0), (2, 1)], constant_values=0.5),
    ),
    "pad reflect": (
        lambda x: mb.pad(x=x, pad=[1, 2], mode="reflect"),
        [X3],
        lambda: F.pad(T(X3), (1, 2), "reflect"),
    ),
    "pad replicate": (
        lambda x: mb.pad(x=x, pad=[1, 2], mode="replicate"),
        [X3],
        lambda: F.pad(T(X3), (1, 2), "replicate"),
    ),
    "gather an embedding": (lambda x: mb.gather(x=OTHER, indices=x, axis=0), [I2], lambda: OTHER[I2]),
    "gather": (
        lambda x: mb.gather(x=x, indices=np.array([[3, -1], [0, 1]], np.int32), axis=1),
        [X3],
        lambda: X3[:, [[3, -1], [0, 1]]],
    ),
    "gather batch_dims": (
        lambda x, y: mb.gather(x=x, indices=y, axis=1, batch_dims=1),
        [X3[:, :, 0].copy(), np.array([[1, 4], [0, 0]], np.int32)],
        lambda: np.take_along_axis(X3[:, :, 0], np.array([[1, 4], [0, 0]]), 1),
    ),
    "gather_along_axis": (
        lambda x, y: mb.gather_along_axis(x=x, indices=y, axis=0),
        [X2, I2],
        lambda: torch.gather(T(X2), 0, T(I2).long()),
    ),
    "gather_nd": (
        lambda x: mb.gather_nd(x=x, indices=np.array([[0, 1], [2, 3]], np.int32)),
        [X2],
        lambda: X2[[0, 2], [1, 3]],
    ),
    "scatter": (
        lambda x, y: mb.scatter(data=x, indices=np.array([2, 0], np.int32), updates=y, axis=0, mode="add"),
        [X2, OTHER[:2].copy()],
        lambda: T(X2).index_add(0, torch.tensor([2, 0]), T(OTHER[:2])),
    ),
    "scatter_along_axis": (
        lambda x, y: mb.scatter_along_axis(
            data=x, indices=I2[:, :2].copy(), updates=y, axis=1, mode="update"
        ),
        [X2, OTHER[:, :2].copy()],
        lambda: _put(X2, I2[:, :2], OTHER[:, :2]),
    ),
    "scatter_nd": (
        lambda x: mb.scatter_nd(
            data=x,
            indices=np.array([[0, 1], [0, 1]], np.int32),
            updates=np.array([2, 3], np.float32),
            mode="add",
        ),
        [X2],
        lambda: X2 + 5 * (np.arange(12).reshape(3, 4) == 1),
    ),
    "cumsum": (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        [X2],
        lambda: np.cumsum(X2[:, ::-1], 1)[:, ::-1] - X2,
    ),
    "band_part": (lambda x: mb.band_part(x=x, lower=0, upper=-1), [X3], lambda: np.triu(X3)),
    "one_hot": (
        lambda x: mb.one_hot(indices=x, one_hot_vector_size=3, axis=-1, on_value=2.0, off_value=-1.0),
        [I2],
        lambda: 3.0 * np.eye(3)[I2] - 1,
    ),
    "reverse": (lambda x: mb.reverse(x=x, axes=[1]), [X2], lambda: X2[:, ::-1]),
    "fill": (lambda x: mb.fill(shape=mb.shape(x=x), value=2.5), [X2], lambda: np.full((3, 4), 2.5)),
    "fill_like": (lambda x: mb.fill_like(ref_tensor=x, value=2.5), [X2], lambda: np.full((3, 4), 2.5)),
    "flatten2d": (lambda x: mb.flatten2d(x=x, axis=2), [X4], lambda: X4.reshape(12, 63)),
    "range_1d": (
        lambda x: mb.range_1d(
            start=np.int32(1),
            end=mb.slice_by_index(x=mb.shape(x=x), begin=[1], end=[0], squeeze_mask=[True]),
            step=np.int32(2),
        ),
        [X2],
        lambda: np.array([1, 3]),
    ),
    "non_zero": (lambda x: mb.non_zero(x=x), [I2], lambda: np.argwhere(I2)),
    "argsort": (lambda x: mb.argsort(x=x, axis=1, ascending=True), [X2], lambda: np.argsort(X2, 1)),
    "topk": (lambda x: mb.topk(x=x, k=2, axis=1)[0], [X2], lambda: torch.topk(T(X2), 2, 1).values),
    "topk indices": (lambda x: mb.topk(x=x, k=2, axis=0)[1], [X2], lambda: torch.topk(T(X2), 2, 0).indices),
    "depth_to_space": (
        lambda x: mb.depth_to_space(x=x, block_size=2),
        [X4[:1, :4, :2, :3].copy()],
        lambda: X4[:1, :4, :2, :3].reshape(2, 2, 2, 3).transpose(2, 0, 3, 1).reshape(1, 1, 4, 6),
    ),
    "space_to_depth": (
        lambda x: mb.depth_to_space(x=mb.space_to_depth(x=x, block_size=2), block_size=2),
        [X4[:, :, :6, :8].copy()],
        lambda: X4[:, :, :6, :8],
    ),
    "pixel_shuffle": (
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        [X4[:, :4].copy()],
        lambda: F.pixel_shuffle(T(X4[:, :4]), 2),
    ),
    "pixel_unshuffle": (
        lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        [X4[:, :, :6, :8].copy()],
        lambda: F.pixel_unshuffle(T(X4[:, :, :6, :8]), 2),
    ),
    # resizing
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        [X4],
        lambda: F.interpolate(T(X4), scale_factor=(2, 3)),
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=10, target_size_width=5),
        [X4],
        lambda: F.interpolate(T(X4), size=(10, 5)),
    ),
    "resize to the nearest": (
        lambda x: mb.resize(
            x=x, shape=[10, 5], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"
        ),
        [X4],
        lambda: F.interpolate(T(X4), size=(10, 5)),
    ),
    "crop": (
        lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]),
        [X4],
        lambda: X4[:, :, 1:-2, :-3],
    ),
}


def bilinear_cases(align: bool) -> dict[str, Case]:
    mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS"

    def upsampled(x: Any) -> Any:
        return mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=align)

    def resized(x: Any) -> Any:
        return mb.resize_bilinear(x=x, target_size_height=10, target_size_width=4, sampling_mode=mode)

    def reshaped(x: Any) -> Any:
        options = {"interpolation_mode": "LINEAR", "sampling_mode": mode}
        return mb.resize(x=x, shape=[10, 0], resized_dims=np.uint32(2), **options)

    def reference(height: int, width: int) -> Callable[[], torch.Tensor]:
        return lambda: F.interpolate(T(X4), size=(height, width), mode="bilinear", align_corners=align)

    return {
        f"upsample_bilinear align_corners={align}": (upsampled, [X4], reference(14, 27)),
        f"resize_bilinear {mode}": (resized, [X4], reference(10, 4)),
        f"resize {mode}": (reshaped, [X4], reference(10, 9)),
    }


def reduction(name: str, function: Callable[..., torch.Tensor]) -> Case:
    def build(x: Any) -> Any:
        return getattr(mb, name)(x=x, axes=[0, -1], keep_dims=True)

    return build, [X3], lambda: function(T(X3), (0, -1), keepdim=True)


CASES.update({**bilinear_cases(False), **bilinear_cases(True)})
CASES["reduce_sum"] = reduction("reduce_sum", torch.sum)
CASES["reduce_mean"] = reduction("reduce_mean", torch.mean)
CASES["reduce_max"] = reduction("reduce_max", torch.amax)
CASES["reduce_min"] = reduction("reduce_min", torch.amin)
CASES["reduce_log_sum_exp"] = reduction("reduce_log_sum_exp", torch.logsumexp)
CASES["reduce_l1_norm"] = (lambda x: mb.reduce_l1_norm(x=x, axes=[1]), [X3], lambda: np.abs(X3).sum(1))
CASES["reduce_l2_norm"] = (lambda x: mb.reduce_l2_norm(x=x, axes=[1]), [X3], lambda: T(X3).norm(dim=1))
CASES["reduce_prod"] = (lambda x: mb.reduce_prod(x=x, axes=[1]), [X3], lambda: X3.prod(1))
CASES["reduce_log_sum"] = (lambda x: mb.reduce_log_sum(x=x, axes=[1]), [P4], lambda: np.log(P4.sum(1)))
CASES["reduce_sum_square"] = (
    lambda x: mb.reduce_sum_square(x=x, axes=[1]),
    [X3],
    lambda: (X3**2).sum(1),
)
CASES["reduce_argmax"] = (lambda x: mb.reduce_argmax(x=x, axis=1), [X3], lambda: X3.argmax(1))
CASES["reduce_argmin"] = (
    lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True),
    [X3],
    lambda: X3.argmin(-1)[..., None],
)


@pytest.mark.parametrize("name", CASES)
def test_operator(tmp_path: Path, name: str) -> None:
    build, arrays, reference = CASES[name]
    target = "iOS18" if "attention" in name else "iOS17"
    if name.startswith(("upsample", "resize_")):
        target = "iOS15"
    [found] = run(tmp_path, build, arrays, target)
    wanted = np.asarray(reference())
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("mode", "count", "points"),
    [
        ("UNALIGN_CORNERS", 5, [0, 0.1, 0.5, 0.9, 1]),
        ("ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("UNALIGN_CORNERS", 6, [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ("DEFAULT", 6, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("OFFSET_CORNERS", 6, [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12]),
        ("ALIGN_CORNERS", 1, [0.5]),
        ("STRICT_ALIGN_CORNERS", 1, [0]),
    ],
)
def test_where_a_resized_axis_is_sampled(tmp_path: Path, mode: str, count: int, points: list[float]) -> None:
    """The examples of coremltools' iOS15 ``resize_bilinear``: the input is [0, 1], so the output is the grid."""

    def build(x: Any) -> Any:
        return mb.resize_bilinear(x=x, target_size_height=1, target_size_width=count, sampling_mode=mode)

    [found] = run(tmp_path, build, [np.array([[[0, 1]]], np.float32)], "iOS15")
    np.testing.assert_allclose(found.reshape(-1), points, atol=1e-6)


def _put(data: Array, indices: Array, updates: Array) -> Array:
    """Set data[i, indices[i, j]] to updates[i, j], one after the other."""
    result = data.copy()
    for i, j in itertools.product(*map(range, indices.shape)):
        result[i, indices[i, j]] = updates[i, j]
    return result


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantize_and_dequantize(tmp_path: Path, dtype: str) -> None:
    zero = np.array(-3 if dtype == "int8" else 100, dtype)
    x = np.concatenate([X2.reshape(-1), np.array([-100, 100, 0.015, 0.025], np.float32)])

    def build(x: Any) -> Any:
        integers = mb.quantize(input=x, scale=np.float32(0.01), zero_point=zero, output_dtype=dtype)
        return mb.dequantize(input=integers, scale=np.float32(0.01), zero_point=zero)

    [found] = run(tmp_path, build, [x])
    limits = np.iinfo(dtype)
    wanted = np.clip(np.rint(x / np.float32(0.01)) + zero, limits.min, limits.max)
    np.testing.assert_allclose(found, (wanted - zero) * np.float32(0.01), rtol=1e-6)


def test_every_operator_rounds_to_float16(tmp_path: Path) -> None:
    [found] = run(tmp_path, lambda x: mb.mul(x=mb.exp(x=x), y=np.float16(1.1)), [X2], half=True)
    step = torch.exp(T(X2).half().float()).half()
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, (step.float() * float(np.float16(1.1))).half())


def test_float16_overflows_to_infinity(tmp_path: Path) -> None:
    x = np.array([300.0, 2.0], np.float32)
    [found] = run(tmp_path, lambda x: mb.square(x=x), [x], half=True)
    np.testing.assert_array_equal(found, np.array([np.inf, 4], np.float16))
