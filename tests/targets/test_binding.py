"""What lies between the source's tensors and an artifact's."""

from __future__ import annotations

import numpy as np
import pytest

from portcall.targets.agent.binding import source_spec, to_runtime, to_source
from portcall.targets.agent.contract import BoundTensor, TensorSpec


def test_a_plain_tensor_passes_through() -> None:
    tensor = BoundTensor("x", "x0", (2, 3), "float32")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert to_runtime(tensor, array) is array and to_source(tensor, array) is array
    assert source_spec(tensor) == TensorSpec("x", (2, 3), "float32")
    scalar = np.asarray(3, np.float32)
    assert to_runtime(BoundTensor("f", "f", (), "float32"), scalar).shape == ()


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int8", -128, 127), ("uint8", 0, 255), ("int16", -32768, 32767)]
)
def test_integers_for_floats(dtype: str, low: int, high: int) -> None:
    zero_point = 3 if dtype != "int16" else 0
    tensor = BoundTensor("x", "x", (7,), dtype, scale=0.5, zero_point=zero_point)
    values = np.array([0, 0.5, -0.5, 0.25, 0.75, -1e9, 1e9], np.float32)
    found = to_runtime(tensor, values)
    # Halves go to the even level: 0.25 / 0.5 = 0.5 -> 0, 0.75 / 0.5 = 1.5 -> 2.
    assert found.dtype == dtype
    wanted = np.clip(np.array([0, 1, -1, 0, 2]) + zero_point, low, high)
    np.testing.assert_array_equal(found, [*wanted, low, high])
    back = to_source(tensor, found)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back[:2], [0, 0.5])
    assert source_spec(tensor).dtype == "float32"


def test_permuted_axes() -> None:
    tensor = BoundTensor("x", "x", (1, 4, 5, 3), "float32", permutation=(0, 2, 3, 1))
    array = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype(np.float32)
    found = to_runtime(tensor, array)
    assert found.shape == (1, 4, 5, 3) and found.flags.c_contiguous
    np.testing.assert_array_equal(found[0, 1, 2], array[0, :, 1, 2])
    np.testing.assert_array_equal(to_source(tensor, found), array)
    assert source_spec(tensor).shape == (1, 3, 4, 5)
    assert BoundTensor.from_json(tensor.to_json()) == tensor
