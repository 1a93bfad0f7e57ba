"""TensorRT's recipe: profiles, versions, build.json and trtexec.txt, the engine that a device finishes."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portcall.exporters import _encodings, _tensorrt, _tensorrt_recipe, tensorrt, tensorrt_rtx
from portcall.exporters._tensorrt import Limits
from portcall.targets.agent.contract import (
    Artifact,
    Backend,
    BoundTensor,
    Exported,
    Recipe,
    TensorSpec,
    Workload,
)
from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError
from tests.exporters.contract import run_python
from tests.exporters.graphs import graph_of
from tests.exporters.test_qdq_symmetric import image, observed, residual_net

X, IDS = TensorSpec("x", ("batch", 3, 8, 8), "float32"), TensorSpec("a:ids", ("batch", "length"), "int64")
FIXED = TensorSpec("fixed", (1, 4), "float32")


# profiles


def test_a_profile_is_read_in_three_shapes_or_one() -> None:
    text = "x:1x3x8x8..2x3x8x8..4x3x8x8,a:ids:1x8..1x16..4x64"
    found = _tensorrt.parse_profile(text, (X, IDS, FIXED))
    assert found == {
        "x": Limits((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
        "a:ids": Limits((1, 8), (1, 16), (4, 64)),
    }
    assert _tensorrt.parse_profile("x:2x3x8x8", (X,)) == {"x": Limits(*[(2, 3, 8, 8)] * 3)}
    assert _tensorrt.profile_from_json(json.loads(json.dumps(_tensorrt.profile_json(found)))) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "cannot read 'x' in profile"),
        ("x:1x3x8x8..2x3x8x8", "cannot read"),
        ("x:1x3xQx8", "cannot read"),
        ("x:", "cannot read"),
        ("y:1x3x8x8", "names 'y', which is no input with a dynamic dimension"),
        ("fixed:1x4", "names 'fixed', which is no input with a dynamic dimension"),
        ("x:1x3x8", r"does not fit x: float32\[batch, 3, 8, 8\]"),
        ("x:1x4x8x8", "does not fit"),
        ("x:2x3x8x8..1x3x8x8..4x3x8x8", "does not fit"),
        ("x:1x3x8x8", "has no shapes for input 'a:ids'"),
    ],
)
def test_other_profiles_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        _tensorrt.parse_profile(text, (X, IDS, FIXED))
    assert caught.value.fix


def test_the_default_profile_lies_around_the_example() -> None:
    examples = {"x": (1, 3, 8, 8), "a:ids": (16, 12), "fixed": (1, 4)}
    assert _tensorrt.default_profile((X, IDS, FIXED), examples) == {
        "x": Limits((1, 3, 8, 8), (1, 3, 8, 8), (8, 3, 8, 8)),
        "a:ids": Limits((1, 1), (16, 12), (16, 48)),
    }


def test_a_profile_is_tuned_for_a_workload_and_widened() -> None:
    profile = {
        "runtime_x": Limits((1, 3, 8, 8), (1, 3, 8, 8), (8, 3, 8, 8)),
        "a:ids": Limits((1, 1), (1, 12), (8, 48)),
    }
    bound = (
        BoundTensor("x", "runtime_x", X.shape, X.dtype),
        BoundTensor("ids", "a:ids", IDS.shape, IDS.dtype),
    )
    artifact = Artifact(Path(), "model.onnx", "tensorrt", "fp32", bound)
    assert _tensorrt.tuned_profile(profile, artifact, Workload()) == profile
    tuned = _tensorrt.tuned_profile(profile, artifact, Workload(batch=16, shapes={"ids": (1, 100)}))
    assert tuned == {
        "runtime_x": Limits((1, 3, 8, 8), (16, 3, 8, 8), (16, 3, 8, 8)),
        "a:ids": Limits((1, 1), (16, 100), (16, 100)),
    }


def test_limits_hold_shapes() -> None:
    limits = Limits((1, 3), (2, 3), (8, 3))
    assert limits.hold((1, 3)) and limits.hold((8, 3))
    assert not limits.hold((9, 3)) and not limits.hold((1, 4)) and not limits.hold((3,))


# versions


@pytest.mark.parametrize(
    ("precision", "options", "oldest"),
    [
        ("fp32", {}, "8.6"),
        ("int8", {"trt_version": "8.6.1"}, "8.6"),
        ("int8", {"float": "fp16"}, "10.0"),
        ("fp16", {"min_runtime": "10.3"}, "10.0"),
        ("bf16", {}, "10.0"),
    ],
)
def test_the_oldest_runtime_of_a_recipe(precision: str, options: dict[str, Any], oldest: str) -> None:
    assert _tensorrt_recipe.oldest_runtime(precision, options) == oldest


@pytest.mark.parametrize(
    ("precision", "options", "message", "fix"),
    [
        ("fp16", {"min_runtime": "8.6"}, "min_runtime 8.6 cannot build this fp16", "trtexec --fp16"),
        (
            "int8",
            {"trt_version": "8.6.1", "float": "fp16"},
            "trt_version 8.6.1 cannot build this int8",
            "fp32",
        ),
        ("fp32", {"min_runtime": "8.2.5"}, "min_runtime 8.2.5 cannot build this fp32", "Use 8.6"),
    ],
)
def test_older_runtimes_are_refused(precision: str, options: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        _tensorrt_recipe.oldest_runtime(precision, options)
    assert fix in caught.value.fix
    with pytest.raises(BadInput, match="'new' is no version of TensorRT"):
        _tensorrt_recipe.oldest_runtime(precision, {"min_runtime": "new"})


# the artifact


def exported_to(folder: Path, path: Path, precision: str, **options: Any) -> Exported:
    folder.mkdir()
    ranges = observed(path, image()) if precision == "int8" else None
    return tensorrt.export(graph_of(path), Recipe(precision, options=options), ranges, folder)


def test_the_recipe_travels_in_build_json_and_trtexec_txt(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    profile = "x:1x8x8x8..4x8x8x8..32x8x8x8"
    exported = exported_to(tmp_path / "a", path, "int8", profile=profile)
    assert exported.files == ("model.onnx", "calibration.cache", "build.json", "trtexec.txt")
    limits = Limits((1, 8, 8, 8), (4, 8, 8, 8), (32, 8, 8, 8))
    assert _tensorrt_recipe.read(tmp_path / "a") == {
        "schema": 1,
        "onnx": "model.onnx",
        "precision": "int8",
        "typed": False,
        "profile": {"x": limits},
    }
    lines = (tmp_path / "a" / "trtexec.txt").read_text().splitlines()
    shapes = "--minShapes=x:1x8x8x8 --optShapes=x:4x8x8x8 --maxShapes=x:32x8x8x8"
    commands = [line for line in lines if not line.startswith("#")]
    typed, eight, cached, timed = commands
    assert typed.startswith("trtexec --onnx=model.onnx --stronglyTyped --noTF32 " + shapes)
    assert eight.startswith("trtexec --onnx=model.onnx --int8 --noTF32 " + shapes)
    assert cached.startswith("trtexec --onnx=FP32_ARTIFACT/model.onnx --int8 --calib=calibration.cache")
    assert timed.startswith("trtexec --loadEngine=model.engine --shapes=x:4x8x8x8 ")
    assert exported.notes[-1] == f"to build the engine by hand: {typed}"
    assert exported.min_runtime == "8.6"


@pytest.mark.parametrize(
    ("version", "header"), [("8.6.1", "TRT-8601-"), ("10.8.0", "TRT-100800-"), ("11.0.0", None)]
)
def test_the_cache_is_for_the_version_asked_for(version: str, header: str | None, tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    exported = exported_to(tmp_path / "a", path, "int8", trt_version=version)
    cache = tmp_path / "a" / "calibration.cache"
    assert ("calibration.cache" in exported.files) == cache.exists() == (header is not None)
    lines = (tmp_path / "a" / "trtexec.txt").read_text()
    assert ("--calib=" in lines) == cache.exists()
    if header is not None:
        assert cache.read_text().startswith(header + "EntropyCalibration2\n")
        assert len(_encodings.read_tensorrt_cache(cache.read_text())) == 7
        assert exported.notes[0].startswith(f"calibration.cache is for TensorRT {version} without Q/DQ")
    assert ("--int8" in exported.notes[-1]) == (version == "8.6.1")  # the command of that generation
    said = [n for n in exported.notes if n.startswith("operator set 18: the parser of TensorRT 8.6")]
    assert bool(said) == (version == "8.6.1")


def test_half_networks_are_built_typed_alone(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx")
    exported = exported_to(tmp_path / "a", path, "fp16")
    commands = [n for n in (tmp_path / "a" / "trtexec.txt").read_text().splitlines() if "--onnx" in n]
    assert len(commands) == 1 and "--stronglyTyped" in commands[0]
    assert _tensorrt_recipe.read(tmp_path / "a")["typed"] is True and exported.min_runtime == "10.0"


def test_a_damaged_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CellFailed, match=r"build\.json cannot be used"):
        _tensorrt_recipe.read(tmp_path)
    (tmp_path / "build.json").write_text('{"schema": 2}')
    with pytest.raises(CellFailed, match="schema 2, this portcall reads 1") as caught:
        _tensorrt_recipe.read(tmp_path)
    assert caught.value.fix == "Export the artifact again"


# the device's part, with TensorRT-RTX's real parser and builder in TensorRT's place: no GPU is needed for them

FINISH = """
import json, pathlib, sys, types
import tensorrt_rtx

class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config

stand_in = types.ModuleType("tensorrt")
stand_in.__dict__.update({k: v for k, v in vars(tensorrt_rtx).items() if k != "__name__"})
stand_in.Builder = Builder
sys.modules["tensorrt"] = stand_in
from portcall.exporters import tensorrt
from portcall.targets.agent.contract import Artifact, Workload
folder = pathlib.Path(sys.argv[1])
artifact = Artifact(folder, "model.onnx", "tensorrt", sys.argv[2])
name = tensorrt.finish(artifact, Workload(batch=4), folder.parent)
print(json.dumps([name, (folder.parent / name).stat().st_size]))
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_device_finishes_the_engine_and_keeps_a_timing_cache(precision: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no builder to ask; fix: pip install tensorrt-rtx")
    exported_to(tmp_path / "a", residual_net(tmp_path / "m.onnx"), precision)
    environment = {**os.environ, "PORTCALL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FINISH, str(tmp_path / "a"), precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    name, size = json.loads(done.stdout.splitlines()[-1])
    assert name == "model.engine" and size > 10_000
    [cache] = (tmp_path / "cache").iterdir()
    assert cache.name.startswith("tensorrt-1.") and cache.name.endswith(".timing-cache")
    assert cache.stat().st_size > 0


GENERATIONS = """
import pathlib, types
import tensorrt_rtx
from portcall.exporters._tensorrt import EngineBuilder
from portcall.targets.agent.errors import UnsupportedError
for flags in ({{"STRONGLY_TYPED": 0, "EXPLICIT_BATCH": 1}}, {{"STRONGLY_TYPED": 0}}, {{}}, {{"EXPLICIT_BATCH": 0}}):
    stand_in = types.SimpleNamespace(**vars(tensorrt_rtx))
    stand_in.NetworkDefinitionCreationFlag = types.SimpleNamespace(**flags)
    try:
        print(EngineBuilder(stand_in, pathlib.Path({path!r}), "fp16", needs_types=True).is_typed)
    except UnsupportedError as error:
        print(error)
"""


def test_networks_are_typed_from_tensorrt_10_on(tmp_path: Path) -> None:
    """The flags of TensorRT 10, RTX, 11 and 8.6, around RTX's own parser."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: no parser to ask; fix: pip install tensorrt-rtx")
    exported_to(tmp_path / "a", residual_net(tmp_path / "m.onnx"), "fp16")
    *typed, refused = run_python(GENERATIONS.format(path=str(tmp_path / "a" / "model.onnx"))).splitlines()
    assert typed == ["True"] * 3
    assert "has no networks typed by their tensors, which fp16 needs" in refused and "--fp16" in refused


@pytest.mark.parametrize("backend", [tensorrt.BACKEND, tensorrt_rtx.BACKEND], ids=lambda b: b.name)
def test_the_example_is_python_and_imports_the_runtime_alone(backend: Backend) -> None:
    text = backend.example.replace("@COMMON@", "here, samples, show = pathlib.Path(), {}, print")
    tree = ast.parse(text.replace("@ENTRY@", "model.onnx"))
    names = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    assert names - {"json", "pathlib", "numpy"} == {backend.name}
    wanted = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert wanted == ["cuda.bindings"]


# probing


def test_a_tensorrt_that_crashes_is_unavailable_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("import ctypes\nctypes.string_at(0)\n")
    command = [sys.executable, "-m", "portcall", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    [found] = [b for b in json.loads(done.stdout)["backends"] if b["name"] == "tensorrt"]
    assert found["run"]["available"] is False and "killed by SIGSEGV" in found["run"]["reason"]
    assert found["export"]["available"] is True


def test_probe_of_a_broken_driver_names_its_error() -> None:
    code = """
import ctypes
class Driver:
    def cuInit(self, flags): return 999
ctypes.CDLL = lambda name: Driver()
from portcall.exporters.tensorrt import probe_gpu
from portcall.targets.agent.contract import Available
print(probe_gpu("tensorrt", Available("10.3.0")))
"""
    assert "the NVIDIA driver answers with CUDA error 999" in run_python(code)
