"""Weights rounded to nearest: known numbers, the vendors' quantizers, and the bound of half a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_quantizer import qtyping
from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor
from onnxruntime.quantization import quant_utils

from portcall.calibration import weights
from portcall.calibration.weights import Scheme, scheme_of
from portcall.targets.agent.errors import BadInput

Array = np.ndarray[Any, Any]


def f32(*values: Any) -> Array:
    return np.asarray(values, np.float32)


def random_weight(seed: int, *shape: int) -> Array:
    """Normal weights whose channels differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-4, 2, (shape[0], *[1] * (len(shape) - 1)))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def test_symmetric_8_bits_have_127_steps_on_either_side() -> None:
    q = weights.quantize(f32(-2.54, 0.0, 0.01, 0.029, 1.0))
    assert q.scale.shape == () and q.scale == np.float32(0.02) and q.scale.dtype == np.float32
    assert q.zero_point.shape == () and q.zero_point == 0 and q.zero_point.dtype == np.int8
    assert q.integers.dtype == np.int8 and q.integers.tolist() == [-127, 0, 0, 1, 50]
    np.testing.assert_allclose(q.dequantize(), [-2.54, 0, 0, 0.02, 1.0], rtol=1e-6)


def test_asymmetric_8_bits_use_all_values_and_represent_zero() -> None:
    q = weights.quantize(f32(-0.5, 0.0, 2.05), symmetric=False)
    assert q.scale == np.float32(0.01) and q.zero_point == -128 + 50
    assert q.integers.tolist() == [-128, -78, 127]
    np.testing.assert_allclose(q.dequantize(), [-0.5, 0, 2.05], atol=1e-6)
    positive = weights.quantize(f32(1.0, 2.55), symmetric=False)
    assert positive.scale == np.float32(0.01) and positive.zero_point == -128


def test_4_bits_use_all_16_values() -> None:
    q = weights.quantize(f32(-7.5, -4.0, 0.0, 0.6, 7.5), bits=4)
    assert q.scale == 1.0 and q.zero_point == 0 and q.integers.tolist() == [-8, -4, 0, 1, 7]
    q = weights.quantize(f32(-5.0, 0.0, 10.0), bits=4, symmetric=False)
    assert q.scale == 1.0 and q.zero_point == -3 and q.integers.tolist() == [-8, -3, 7]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_equals_channel_by_channel(axis: int) -> None:
    weight = random_weight(1, 6, 5, 4)
    for symmetric in (True, False):
        q = weights.quantize(weight, symmetric=symmetric, axis=axis)
        assert q.scale.shape == q.zero_point.shape == (weight.shape[axis],)
        assert q.axis == axis % 3 and q.integers.shape == weight.shape
        for channel in range(weight.shape[axis]):
            one = weights.quantize(weight.take(channel, axis), symmetric=symmetric)
            assert one.scale == q.scale[channel] and one.zero_point == q.zero_point[channel]
            np.testing.assert_array_equal(one.integers, q.integers.take(channel, axis))
            np.testing.assert_array_equal(one.dequantize(), q.dequantize().take(channel, axis))


@pytest.mark.parametrize("block", weights.GROUPS)
@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("length", [31, 32, 64, 100, 129])
def test_groups_equal_group_by_group_and_the_last_may_be_short(block: int, axis: int, length: int) -> None:
    shape = (length, 3) if axis % 2 == 0 else (3, length)
    weight = random_weight(2, *shape)
    for bits in (4, 8):
        for symmetric in (True, False):
            q = weights.quantize(weight, bits, symmetric, axis, block)
            groups = -(-length // block)
            wanted = (groups, 3) if axis % 2 == 0 else (3, groups)
            assert q.scale.shape == q.zero_point.shape == wanted
            for group in range(groups):
                cut = np.arange(group * block, min((group + 1) * block, length))
                one = weights.quantize(weight.take(cut, axis), bits, symmetric, 1 - axis % 2)
                np.testing.assert_array_equal(one.scale, q.scale.take(group, axis))
                np.testing.assert_array_equal(one.integers, q.integers.take(cut, axis))
                np.testing.assert_array_equal(one.dequantize(), q.dequantize().take(cut, axis))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("axis", "block"), [(None, 0), (0, 0), (1, 0), (0, 32), (1, 32)])
def test_no_weight_is_off_by_more_than_half_a_step(
    bits: int, symmetric: bool, axis: int | None, block: int
) -> None:
    weight = random_weight(3, 70, 50)
    q = weights.quantize(weight, bits, symmetric, axis, block)
    least, most = (-127 if symmetric else -128, 127) if bits == 8 else (-8, 7)
    assert least <= q.integers.min() and q.integers.max() <= most
    one = weights.Quantized(
        np.ones_like(q.integers), q.scale, np.zeros_like(q.zero_point), q.bits, q.axis, q.block
    )
    step = one.dequantize()
    # Asymmetric zero points are rounded as well: half a step more at the ends.
    bound = 0.5001 if symmetric else 1.0001
    assert (np.abs(q.dequantize() - weight) <= bound * step).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_channels_have_scale_1(symmetric: bool) -> None:
    weight = random_weight(4, 5, 8)
    weight[[1, 3]] = 0
    with np.errstate(all="raise"):
        q = weights.quantize(weight, symmetric=symmetric, axis=0)
    assert q.scale[[1, 3]].tolist() == [1.0, 1.0] and not q.zero_point[[1, 3]].any()
    assert not q.dequantize()[[1, 3]].any()
    zeros = weights.quantize(np.zeros((4, 4), np.float32), symmetric=symmetric)
    assert zeros.scale == 1.0 and not zeros.dequantize().any()
    subnormal = weights.quantize(np.full(3, 1e-42, np.float32), symmetric=symmetric)
    assert subnormal.scale == 1.0 and not subnormal.integers.any()


def test_pruned_zeros_stay_zero() -> None:
    weight = random_weight(5, 64, 64)
    weight[np.random.default_rng(0).random(weight.shape) < 0.7] = 0
    for symmetric in (True, False):
        for q in (
            weights.quantize(weight, 8, symmetric, 0),
            weights.quantize(weight, 4, symmetric, 1, 32),
        ):
            assert not q.dequantize()[weight == 0].any()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_those_of_onnx_runtime(seed: int, symmetric: bool) -> None:
    weight = random_weight(seed, 7, 3, 3)
    if seed % 2:
        weight = np.abs(weight)
    for bits, kind in ((8, onnx.TensorProto.INT8), (4, onnx.TensorProto.INT4)):
        zero, scale, integers = quant_utils.quantize_data(weight.ravel(), kind, symmetric)
        ours = weights.quantize(weight, bits, symmetric)
        assert ours.scale == scale and int(ours.zero_point) == int(zero)
        np.testing.assert_array_equal(ours.integers.ravel(), integers.astype(np.int8))


@pytest.mark.parametrize("seed", range(20))
def test_integers_are_those_of_ai_edge_quantizer(seed: int) -> None:
    weight = random_weight(seed, 7, 3, 3, 4)
    largest = np.abs(weight).max((1, 2, 3), keepdims=True)
    zero, scale = uniform_quantize_tensor.tensor_zp_scale_from_min_max(
        -largest, largest, 8, True, qtyping.QuantGranularity.CHANNELWISE
    )
    parameters = qtyping.UniformQuantParams(8, 0, scale, zero)
    integers = uniform_quantize_tensor.uniform_quantize(weight, parameters)
    ours = weights.quantize(weight, axis=0)
    np.testing.assert_array_equal(ours.scale, scale.ravel())
    np.testing.assert_array_equal(ours.integers, integers)


def test_float16_and_float64_weights_are_taken_as_float32() -> None:
    weight = random_weight(6, 9, 9).clip(-100, 100)
    for dtype in (np.float16, np.float64):
        given = weight.astype(dtype)
        q, wanted = weights.quantize(given, axis=0), weights.quantize(given.astype(np.float32), axis=0)
        np.testing.assert_array_equal(q.scale, wanted.scale)
        np.testing.assert_array_equal(q.integers, wanted.integers)
        assert q.dequantize().dtype == np.float32


@pytest.mark.parametrize(
    ("options", "scheme", "shown"),
    [
        ({}, Scheme(), "channel"),
        ({"weights": "channel", "weight_symmetric": True}, Scheme(), "channel"),
        ({"weights": "tensor"}, Scheme(per_channel=False), "tensor"),
        ({"weights": "group64"}, Scheme(block=64), "group64"),
        ({"weight_symmetric": False}, Scheme(symmetric=False), "channel, asymmetric"),
    ],
)
def test_options_name_a_scheme(options: dict[str, Any], scheme: Scheme, shown: str) -> None:
    assert scheme_of(options) == scheme and str(scheme) == shown


def test_the_default_scheme_is_the_precisions_own() -> None:
    assert scheme_of({}, "group32") == Scheme(block=32)
    assert scheme_of({"weights": "channel"}, "group32") == Scheme()


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"weights": "row"}, "no weight granularity 'row'", "channel, tensor, group32, group64, group128"),
        ({"weights": "group16"}, "no weight granularity 'group16'", "group32"),
        ({"weights": None}, "no weight granularity None", "channel"),
        ({"weight_symmetric": "no"}, "weight_symmetric is 'no'", "true or false"),
    ],
)
def test_unknown_schemes_are_refused(options: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        scheme_of(options)
    assert fix in caught.value.fix
