"""The MIL interpreter on whole packages: weights in few bits, bytes from disk, what it refuses."""

from __future__ import annotations

import gc
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portcall.exporters import _mil_weights
from portcall.exporters._coreml_tools import coremltools, quiet, save
from portcall.exporters._mil import Program
from portcall.targets.agent.errors import BadInput, UnsupportedError
from tests.exporters.ranges import sqnr_db

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("coremltools is not installed: pip install 'portcall[coreml]'", allow_module_level=True)

Array = np.ndarray[Any, Any]

ct = coremltools()
cto = ct.optimize.coreml
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402  # only after the quiet import
from coremltools.converters.mil.mil import types  # noqa: E402

X = np.random.default_rng(0).standard_normal((2, 64, 5, 5)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Take what is loaded out of garbage collection: ct.convert collects at every call."""
    gc.freeze()
    yield
    gc.unfreeze()


def build(function: Any, target: Any, shape: tuple[int, ...] = X.shape, half: bool = False) -> Any:
    with quiet():
        spec = mb.TensorSpec(shape=shape, dtype=types.fp16 if half else types.fp32)
        program = mb.program(input_specs=[spec], opset_version=target)(lambda x: function(x))
        return ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )


def saved(model: Any, folder: Path) -> Path:
    package = folder / "m.mlpackage"
    shutil.rmtree(package, ignore_errors=True)
    save(model, package)
    return package


def output(package: Path, x: Array = X) -> Array:
    [found] = Program(package).run({"x": x}).values()
    return np.asarray(found)


@pytest.fixture(scope="module", params=["iOS16", "iOS18"])
def float_model(request: pytest.FixtureRequest) -> Any:
    """relu(conv(x)) with 64 x 64 x 3 x 3 weights of a normal distribution."""
    weight = np.random.default_rng(1).standard_normal((64, 64, 3, 3)).astype(np.float32)

    def function(x: Any) -> Any:
        return mb.relu(x=mb.conv(x=x, weight=weight, pad_type="valid"))

    return build(function, getattr(ct.target, request.param))


SCHEMES = {
    "int8": cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel"),
    "uint8": cto.OpLinearQuantizerConfig(mode="linear", dtype="uint8", granularity="per_tensor"),
    "int4": cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
    ),
    "uint4": cto.OpLinearQuantizerConfig(
        mode="linear", dtype="uint4", granularity="per_block", block_size=16
    ),
    "palette4": cto.OpPalettizerConfig(mode="kmeans", nbits=4),
    "palette6": cto.OpPalettizerConfig(mode="uniform", nbits=6),
    "palette2 in groups": cto.OpPalettizerConfig(
        mode="uniform", nbits=2, granularity="per_grouped_channel", group_size=16
    ),
    "sparse": cto.OpMagnitudePrunerConfig(target_sparsity=0.6),
}
FUNCTIONS = {"i": cto.linear_quantize_weights, "u": cto.linear_quantize_weights, "p": cto.palettize_weights}
NEWER = ("int4", "uint4", "palette2 in groups")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_in_few_bits_are_what_coremltools_decompresses(
    float_model: Any, scheme: str, tmp_path: Path
) -> None:
    if scheme in NEWER and float_model.get_spec().specificationVersion < 9:
        with quiet(), pytest.raises(ValueError, match="iOS18"):
            FUNCTIONS[scheme[0]](float_model, cto.OptimizationConfig(global_config=SCHEMES[scheme]))
        return
    function = FUNCTIONS.get(scheme[0], cto.prune_weights)
    with quiet():
        compressed = function(float_model, cto.OptimizationConfig(global_config=SCHEMES[scheme]))
        plain = cto.decompress_weights(compressed)
    small = saved(compressed, tmp_path)
    size = (small / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    found = output(small)
    wanted = output(saved(plain, tmp_path))
    assert size < 0.6 * (tmp_path / "m.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert sqnr_db(output(saved(float_model, tmp_path)), found) < 60  # it did lose something


def test_sparse_weights_in_a_palette(float_model: Any, tmp_path: Path) -> None:
    if float_model.get_spec().specificationVersion < 9:
        return  # joint compression came with iOS18: the other parameter runs it
    with quiet():
        sparse = cto.prune_weights(float_model, cto.OptimizationConfig(global_config=SCHEMES["sparse"]))
        joint = cto.palettize_weights(
            sparse, cto.OptimizationConfig(global_config=SCHEMES["palette4"]), joint_compression=True
        )
        plain = cto.decompress_weights(joint)
    package = saved(joint, tmp_path)
    assert "constexpr_lut_to_sparse" in str(Program(package).spec.mlProgram)
    found = output(package)
    np.testing.assert_allclose(found, output(saved(plain, tmp_path)), rtol=1e-5, atol=1e-4)


def test_four_bits_are_read_from_the_low_half_of_a_byte_first(tmp_path: Path) -> None:
    integers = np.arange(-8, 8).reshape(1, 16)
    int4 = types.nptype_from_builtin(types.int4)

    def function(x: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(
            data=integers.astype(int4), scale=np.array([[0.5]], np.float32)
        )
        return mb.matmul(x=x, y=weight, transpose_y=True)

    package = saved(build(function, ct.target.iOS18, (16, 16)), tmp_path)
    found = output(package, np.eye(16, dtype=np.float32))
    np.testing.assert_array_equal(found.reshape(-1), np.arange(-8, 8) / 2)
    raw = bytes(range(8))
    assert list(_mil_weights.unpack(np.frombuffer(raw, np.uint8), 4, 16)) == [
        b for n in range(8) for b in (n, 0)
    ]
    assert list(_mil_weights.unpack(np.array([0b10_110_001, 0b1], np.uint8), 3, 3)) == [1, 6, 6]


@pytest.mark.parametrize("where", ["first", "last"])
def test_one_changed_byte_of_the_weights_changes_the_output(
    float_model: Any, tmp_path: Path, where: str
) -> None:
    with quiet():
        model = cto.linear_quantize_weights(
            float_model, cto.OptimizationConfig(global_config=SCHEMES["int8"])
        )
    package = saved(model, tmp_path)
    before = output(package)
    blob = package / "Data/com.apple.CoreML/weights/weight.bin"
    raw = bytearray(blob.read_bytes())
    weights = [i for i, byte in enumerate(raw) if byte not in (0, 1, 255)]
    at = weights[len(weights) // 3 if where == "first" else 2 * len(weights) // 3]
    raw[at] ^= 0x40
    blob.write_bytes(bytes(raw))
    after = output(package)
    assert not np.array_equal(before, after)
    assert sqnr_db(before, after) > 20  # one weight of 36,864


def test_half_precision_is_torchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]

    def function(x: Any) -> Any:
        for layer in layers:
            weight, bias = (p.detach().half().numpy() for p in layer.parameters())
            x = mb.relu(x=mb.conv(x=x, weight=weight, bias=bias, pad_type="custom", pad=[1, 1, 1, 1]))
        return x

    def reference(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = torch.relu(layer(x))
        return x

    package = saved(build(function, ct.target.iOS16, half=True), tmp_path)
    found = output(package, X.astype(np.float16))
    with torch.no_grad():
        exact = reference(torch.from_numpy(X)).numpy()
        for layer in layers:
            layer.half()
        half = reference(torch.from_numpy(X).half()).float().numpy()
    assert found.dtype == np.float16
    assert abs(sqnr_db(exact, found) - sqnr_db(exact, half)) < 1
    assert 50 < sqnr_db(exact, found) < 80


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        return mb.random_normal(shape=mb.shape(x=x), mean=0.0, stddev=1.0, name="noise")

    package = saved(build(function, ct.target.iOS15), tmp_path)
    with pytest.raises(UnsupportedError, match="no operator 'random_normal', which makes 'noise'") as caught:
        Program(package)
    assert "Mac" in caught.value.fix


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mlpackage").mkdir()
    for name in ("empty.mlpackage", "missing.mlpackage"):
        with pytest.raises(BadInput, match=f"{name} is no Core ML package"):
            Program(tmp_path / name)


def test_a_step_sees_what_it_reads_and_intermediates_are_let_go(float_model: Any, tmp_path: Path) -> None:
    program = Program(saved(float_model, tmp_path))
    seen: list[tuple[str, tuple[int, ...]]] = []
    program.run({"x": X}, lambda step, inputs, outputs: seen.append((step.kind, outputs[0].shape)))
    assert seen == [("conv", (2, 64, 3, 3)), ("relu", (2, 64, 3, 3))]
    assert [s.made_from.get("x") for s in program.steps] == ["", "conv"]
    assert program.inputs[0].shape == (2, 64, 5, 5) and program.inputs[0].dtype == "float32"
