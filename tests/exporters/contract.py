"""What every backend must do, as an abstract test class: a subclass states the facts of one backend.

The class holds the cases; ``test_contract.py`` has one subclass per backend. The exports are shared: see
``conftest.py``. Long because the whole contract is one class.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import portcall.api
import tests.models
from portcall import artifact as artifacts
from portcall.core import BadInput, Cell, CellFailed, UnsupportedError, parse_cells
from portcall.exporters import backend_names, get_backend
from portcall.targets.agent.contract import Backend, Unavailable
from portcall.worker import WorkerPool

Array = np.ndarray[Any, Any]

WORDS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "int16x8", "palette4",
         "palette6")  # fmt: skip
"""Every precision word of portcall; a backend refuses those that it does not have."""

REQUIRED = os.environ.get("PORTCALL_REQUIRED_BACKENDS", "").split()
"""Backends whose absence is a failure and no skip: CI names them."""

HEAVY = (
    "ai_edge_litert",
    "ai_edge_quantizer",
    "coremltools",
    "executorch",
    "litert_torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime_qnn",
    "openvino",
    "tensorflow",
    "tensorrt_rtx",
    "tflite_micro",
    "torch",
    "torchao",
)

LIGHT = {
    "portcall",
    "portcall.exporters",
    "portcall.targets",
    "portcall.targets.agent",
    "portcall.targets.agent.contents",
    "portcall.targets.agent.contract",
    "portcall.targets.agent.errors",
    "portcall.targets.agent.probing",
    "portcall.targets.agent.profiling",
}

# Stands in a fresh interpreter before the first import: MISSING modules are as if never installed, BROKEN ones
# raise while they load, as they do where a shared library is missing.
BLOCKER = """
import importlib.abc, importlib.machinery, sys
MISSING, BROKEN = {missing!r}, {broken!r}

class Absent:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        found = name.partition(".")[0] in BROKEN
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None
    def exec_module(self, module):
        raise OSError("libbroken.so.1: cannot open shared object file")

sys.meta_path[:] = [Broken(), *(Absent(f) for f in sys.meta_path)]
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A source to export, the DATA for it, and the precisions to export it at (None: all that a backend has)."""

    format: str
    spec: str
    data: str
    precisions: tuple[str, ...] | None


def base_precision(backend: str) -> str:
    """Return the float precision that a backend's tests start from: fp32, or its first where it has none."""
    known = get_backend(backend).capabilities.precisions
    return "fp32" if "fp32" in known else next(iter(known))


class Exports:
    """Exports each model once, for all backends of this test session, when a test first asks for it."""

    def __init__(self, models: Mapping[str, Model], backends: Sequence[str], folder: Path) -> None:
        self._models, self._backends, self._folder = models, backends, folder
        self._results: dict[str, dict[Cell, dict[str, Any]]] = {}

    def result(self, model: str, backend: str, precision: str) -> dict[str, Any]:
        """Return the cell's entry of ``results``."""
        if model not in self._results:
            wanted = self._models[model]
            cells = [
                Cell(name, word)
                for name in self._backends
                for word in get_backend(name).capabilities.precisions
                if wanted.precisions is None or word in (*wanted.precisions, base_precision(name))
            ]
            answer = portcall.api.export(
                wanted.spec, [str(c) for c in cells], self._folder / model, data=wanted.data
            )
            self._results[model] = dict(zip(cells, answer["results"], strict=True))
        result = self._results[model][Cell(backend, precision)]
        if result["outcome"] == "unavailable" and backend not in REQUIRED:
            pytest.skip(f"{backend} is unavailable here: {result['reason']}; fix: {result['fix']}")
        return result

    def artifact(self, model: str, backend: str, precision: str | None = None) -> Path:
        """Return the folder of an artifact (None: of the float one); fail with the reason where there is none."""
        precision = precision or base_precision(backend)
        result = self.result(model, backend, precision)
        assert result["outcome"] == "artifact", f"{model} {backend}:{precision}: {result['reason']}"
        return Path(result["path"])


def run_python(code: str, *flags: str, cwd: Path | None = None) -> str:
    """Run *code* in a fresh interpreter and return its output."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_outputs(model: str, inputs: Mapping[str, Array], artifact: Path) -> dict[str, Array]:
    """Run the source on *inputs* in this process."""
    import torch

    if model == "copy":
        return {"y": inputs["x"]}
    if model == "onnx":
        import onnxruntime as ort

        path = artifacts.read_manifest(artifact)["source"]["spec"]
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return dict(zip(["y"], session.run(["y"], dict(inputs)), strict=True))
    factory = tests.models.tiny_cnn if model == "image" else tests.models.two_inputs
    module = factory()[0]
    with torch.no_grad():
        found = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    named = found if isinstance(found, dict) else {"output": found}
    return {k: v.numpy() for k, v in named.items()}


def random_inputs(model: str, batch: int, sequence: int = 7) -> dict[str, Array]:
    rng = np.random.default_rng(11)
    if model == "copy":
        return {"x": rng.standard_normal((batch, 4)).astype(np.float32)}
    if model != "two_inputs":
        return {"x": rng.standard_normal((batch, 3, 16, 16)).astype(np.float32)}
    features = rng.standard_normal((batch, 4)).astype(np.float32)
    return {"token_ids": rng.integers(0, 50, (batch, sequence)), "features": features}


INTERFACES = {
    "image": ({"x": ("float32", 4)}, {"output": ("float32", 2)}),
    "two_inputs": (
        {"token_ids": ("int64", 2), "features": ("float32", 2)},
        {"scores": ("float32", 2), "hidden": ("float32", 3)},
    ),
    "onnx": ({"x": ("float32", 4)}, {"y": ("float32", 2)}),
    "copy": ({"x": ("float32", 2)}, {"y": ("float32", 2)}),
}
"""Per model: inputs and outputs of the source, name -> dtype and rank, in order."""

MACS = {
    "image": 16 * 8 * 8 * 27 + 16 * 8 * 8 * 9 + 16 * 8 * 8 * 16 + 16 * 10,
    "two_inputs": 7 * 16 * 16 + 20 * 5,
    "onnx": 16 * 8 * 8 * 27 + 16 * 8 * 8 * 16 + 16 * 10,
    "copy": 0,
}
"""Per model: multiply-accumulates of one sample, counted by hand."""


class BackendContract:
    """The cases. A subclass states the facts below, where they differ from the usual.

    runtime: top-level modules that example.py and running need, numpy aside. export_needs: further ones that
    exporting imports; export_finds: those that its probe only looks for, since importing them takes seconds.
    models: keys of ``conftest.models``; refused_models: those that it must refuse by name. floors_db: the lowest
    SQNR that passes, per precision. dynamic: whether artifacts keep the source's dynamic dimensions. interpreted:
    artifacts are verified without the runtime where it is missing, and exporting does not need it. float_macs: what an
    integer precision leaves in float of the first model.
    """

    name: ClassVar[str]
    runtime: ClassVar[tuple[str, ...]]
    export_needs: ClassVar[tuple[str, ...]] = ()
    export_finds: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[str, ...]] = ("image", "two_inputs", "onnx")
    refused_models: ClassVar[tuple[str, ...]] = ()
    floors_db: ClassVar[dict[str, float]]
    census_method: ClassVar[str]
    dynamic: ClassVar[bool] = True
    computes: ClassVar[bool] = True
    interpreted: ClassVar[bool] = False
    float_macs: ClassVar[dict[str, int]] = {}
    alternatives: ClassVar[tuple[str, ...]] = ()

    @property
    def backend(self) -> Backend:
        return get_backend(self.name)

    @property
    def base(self) -> str:
        return base_precision(self.name)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "precision" in metafunc.fixturenames:
            metafunc.parametrize("precision", list(self.backend.capabilities.precisions))
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", self.models)

    @pytest.fixture
    def artifact(self, exports: Exports) -> Path:
        """The float artifact of this backend's first model."""
        return exports.artifact(self.models[0], self.name)

    # what is known without running anything

    def test_one_name_everywhere(self, artifact: Path) -> None:
        module = importlib.import_module(f"portcall.exporters.{self.name}")
        assert module.__file__ is not None
        assert Path(module.__file__).stem == self.name == self.backend.name
        assert self.name in backend_names()
        assert parse_cells([f"{self.name}:{self.base}"]) == [Cell(self.name, self.base)]
        assert artifacts.read_manifest(artifact)["backend"] == self.name
        assert artifact.name == f"{self.name}-{self.base}"

    def test_precisions_are_known_words_with_a_meaning(self) -> None:
        for word, precision in self.backend.capabilities.precisions.items():
            assert word in WORDS and precision.meaning
        assert set(self.floors_db) == set(self.backend.capabilities.precisions)

    def test_refuses_words_that_it_does_not_have(self) -> None:
        known = self.backend.capabilities.precisions
        for word in set(WORDS) - set(known):
            with pytest.raises(BadInput, match=f"{self.name} has no precision '{word}'") as caught:
                parse_cells([f"{self.name}:{word}"])
            assert caught.value.fix.startswith(f"It has: {', '.join(known)}.")

    def test_suggests_the_nearest_word(self, precision: str) -> None:
        with pytest.raises(BadInput) as caught:
            parse_cells([f"{self.name}:{precision}x"])
        assert f"Did you mean {precision!r}?" in caught.value.fix

    def test_file_is_python_3_8_and_imports_only_the_agent(self) -> None:
        module = importlib.import_module(f"portcall.exporters.{self.name}")
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
        assert_light_imports(tree)

    def test_import_loads_nothing_heavy(self) -> None:
        module = importlib.import_module(f"portcall.exporters.{self.name}")
        assert module.__file__ is not None
        folder = str(Path(module.__file__).parent)
        code = f"""
import json, sys
before = set(sys.modules)
import portcall.exporters
if {folder!r} not in portcall.exporters.__path__: portcall.exporters.__path__.append({folder!r})
import portcall.exporters.{self.name}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
        loaded = set(json.loads(run_python(code)))
        foreign = {m for m in loaded if m.partition(".")[0] not in sys.stdlib_module_names}
        assert foreign <= LIGHT | {f"portcall.exporters.{self.name}"}

    def _need_runtime(self) -> None:
        """Skip with the probe's reason where a backend that is verified by an interpreter cannot run here."""
        found = self.backend.probe("run")
        if isinstance(found, Unavailable) and self.backend.interpret is not None:
            pytest.skip(f"{self.name} cannot run here: {found.reason}; fix: {found.fix}")

    # probe

    @pytest.mark.parametrize("role", ["export", "run"])
    def test_probe_says_available_here(self, role: str) -> None:
        if role == "run":
            self._need_runtime()
        with WorkerPool() as pool:
            found = pool.call("portcall.targets.agent.jobs:probe", {"backend": self.name, "role": role})
        assert found["available"], found["reason"]
        assert found["version"]

    @pytest.mark.parametrize("fault", ["missing", "broken"])
    def test_probe_without_its_runtime_says_why_and_what_to_do(self, fault: str) -> None:
        for role, needs in (
            ("run", self.runtime),
            ("export", (*self.export_needs, *self.export_finds, *(() if self.interpreted else self.runtime))),
        ):
            for need in needs:
                if fault == "broken" and need in self.export_finds:
                    continue
                found = self._probe(role, need, fault)
                assert found["available"] is False, f"{role} without {need}"
                assert need in found["reason"] and found["fix"].startswith("pip install ")

    def _probe(self, role: str, need: str, fault: str) -> dict[str, Any]:
        module = importlib.import_module(f"portcall.exporters.{self.name}")
        assert module.__file__ is not None
        blocked = {"missing": list(self.alternatives), "broken": []}
        blocked[fault] = [*blocked[fault], need]
        code = BLOCKER.format(**blocked) + (
            "import json, portcall.exporters\n"
            f"portcall.exporters.__path__.append({str(Path(module.__file__).parent)!r})\n"
            "from portcall.targets.agent.jobs import probe\n"
            f"print(json.dumps(probe({{'backend': {self.name!r}, 'role': {role!r}}}, None)))"
        )
        found: dict[str, Any] = json.loads(run_python(code).splitlines()[-1])
        return found

    # export

    def test_float_matches_the_source(self, exports: Exports, model: str) -> None:
        parity = exports.result(model, self.name, self.base)["parity"]
        assert parity["reference"] == "source" and parity["samples"] == "held-out" and parity["n"] >= 1
        assert parity["worst_sqnr_db"] >= self.floors_db[self.base]
        assert [o["name"] for o in parity["outputs"]] == list(INTERFACES[model][1])

    def test_every_precision_exports_and_verifies(self, exports: Exports, precision: str) -> None:
        result = exports.result(self.models[0], self.name, precision)
        artifact = exports.artifact(self.models[0], self.name, precision)
        assert result["parity"]["sqnr_db"] >= self.floors_db[precision]
        assert result["size_bytes"] > 0 and result["seconds"] > 0
        [verified] = portcall.api.verify(artifact)["results"]
        assert verified["outcome"] == "artifact", verified["reason"]
        assert verified["parity"]["sqnr_db"] >= self.floors_db[precision]
        manifest = artifacts.read_manifest(artifact)
        kind = self.backend.capabilities.precisions[precision]
        assert manifest["precision"] == precision and manifest["meaning"] == kind.meaning
        assert (manifest["calibration"] is not None) == kind.calibrated

    def test_counts_its_arithmetic(self, exports: Exports, precision: str) -> None:
        kind = self.backend.capabilities.precisions[precision]
        for model in self.models:
            if model != self.models[0] and precision not in (self.base, "int8"):
                continue
            found = exports.result(model, self.name, precision)["arithmetic"]
            assert found["method"] == self.census_method
            assert found["macs"] == MACS[model], model
            left = self.float_macs.get(precision, 0)
            assert found["integer_macs"] == (MACS[model] - left if kind.integer else 0)
            assert bool(found["quantize_nodes"]) == kind.integer
            assert bool(found["float_nodes"]) == (self.computes and (not kind.integer or left > 0))

    def test_other_models_are_refused_by_name(self, exports: Exports, models: dict[str, Model]) -> None:
        for refused in self.refused_models:
            result = exports.result(refused, self.name, self.base)
            assert result["outcome"] == "unsupported" and result["fix"] and result["path"] is None
            if models[refused].format not in self.backend.capabilities.source_formats:
                taken = ", ".join(self.backend.capabilities.source_formats)
                assert f"{self.name} cannot take {models[refused].format} models" in result["reason"]
                assert result["reason"].endswith(f"it takes: {taken}")

    def test_keeps_names_dtypes_and_layout(self, exports: Exports, model: str) -> None:
        for precision in (self.base, "int8"):
            if precision not in self.backend.capabilities.precisions:
                continue
            manifest = artifacts.read_manifest(exports.artifact(model, self.name, precision))
            for entries, wanted in zip(
                (manifest["inputs"], manifest["outputs"]), INTERFACES[model], strict=True
            ):
                assert {e["source"]: (e["dtype"], len(e["shape"])) for e in entries} == wanted
                assert [e["source"] for e in entries] == list(wanted)
                for entry in entries:
                    assert entry["permutation"] is entry["scale"] is entry["zero_point"] is None
                    assert isinstance(entry["shape"][0], str) == self.dynamic

    # the artifact

    def test_manifest_round_trips(self, artifact: Path) -> None:
        manifest = artifacts.read_manifest(artifact)
        assert manifest == json.loads((artifact / "manifest.json").read_text())
        assert manifest == artifacts.open_artifact(artifact)[1]
        assert artifacts.identity(manifest) == manifest["identity"]
        elsewhere = {**manifest, "created": "2000-01-01", "seconds": 0.5}
        elsewhere["source"] = {**manifest["source"], "spec": "/somewhere/else.onnx"}
        assert artifacts.identity(elsewhere) == manifest["identity"]
        assert artifacts.identity({**manifest, "precision": "fp64"}) != manifest["identity"]
        files = {p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()}
        files -= {"manifest.json"}
        assert set(manifest["files"]) == files >= {"samples.npz", "example.py"}
        assert any(
            f"{name}/".startswith(f"{manifest['entry']}/") for name in files
        )  # an entry may be a folder

    def test_tampering_is_refused(self, artifact: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(artifact, tmp_path / "copy")
        for name in artifacts.read_manifest(copy)["files"]:
            held = (copy / name).read_bytes()
            (copy / name).write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
            with pytest.raises(CellFailed, match="sha256 differs"):
                portcall.api.load(copy)
            (copy / name).unlink()
            with pytest.raises(CellFailed, match=f"lacks its file {name}"):
                portcall.api.load(copy)
            (copy / name).write_bytes(held)
        artifacts.open_artifact(copy)

    def test_tampered_artifact_fails_verification(self, artifact: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(artifact, tmp_path / "copy")
        entry = artifacts.read_manifest(copy)["entry"]
        if (copy / entry).is_dir():
            entry = next(n for n in artifacts.read_manifest(copy)["files"] if n.startswith(f"{entry}/"))
        with (copy / entry).open("ab") as stream:
            stream.write(b"\0")
        [result] = portcall.api.verify(copy)["results"]
        assert result["outcome"] == "failed" and "sha256 differs" in result["reason"] and result["fix"]

    @pytest.mark.parametrize(
        "name", ["../x", "/etc/passwd", "sub/../../x", "sub//x", "..", "", "not-listed.bin"]
    )
    def test_a_manifest_that_names_other_files_is_refused(
        self, artifact: Path, tmp_path: Path, name: str
    ) -> None:
        copy = shutil.copytree(artifact, tmp_path / "copy")
        manifest = json.loads((copy / "manifest.json").read_text())
        (tmp_path / "x").write_bytes((copy / "samples.npz").read_bytes())
        for changed in (
            {**manifest, "entry": name},
            {**manifest, "files": {**manifest["files"], name: next(iter(manifest["files"].values()))}},
        ):
            if name == "not-listed.bin" and changed["entry"] != name:
                continue
            (copy / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(BadInput, match=re.escape(name) or "manifest.json"):
                artifacts.read_manifest(copy)

    # running

    def test_example_needs_only_the_runtime(self, exports: Exports, tmp_path: Path, model: str) -> None:
        self._need_runtime()
        copy = shutil.copytree(exports.artifact(model, self.name), tmp_path / "a folder with spaces")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        blocked = [m for m in (*HEAVY, "portcall") if m not in (*self.runtime, "numpy")]
        code = BLOCKER.format(missing=blocked, broken=[]) + (
            f"import runpy\nrunpy.run_path({str(copy / 'example.py')!r}, run_name='__main__')"
        )
        printed = run_python(code, "-I", cwd=elsewhere)
        differences = re.findall(r"largest difference from the source model: (\S+)", printed)
        assert all(name in printed for name in INTERFACES[model][1])
        assert len(differences) == (len(INTERFACES[model][1]) if self.computes else 0)
        assert all(0 <= float(d) < 1e-4 for d in differences)
        assert not list(elsewhere.iterdir())

    def test_load_and_infer_equal_the_source(self, exports: Exports, model: str) -> None:
        self._need_runtime()
        artifact = exports.artifact(model, self.name)
        inputs = random_inputs(model, batch=1)
        wanted = source_outputs(model, inputs, artifact)
        with portcall.api.load(artifact) as opened:
            for _ in range(2):
                found = opened.infer(inputs)
            assert list(found) == list(wanted)
            for name, array in wanted.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)
            first = {k: v.copy() for k, v in found.items()}
            opened.infer({k: np.zeros_like(v) for k, v in inputs.items()})
            for name in first:  # outputs are copies: the next inference leaves them alone
                np.testing.assert_array_equal(found[name], first[name])

    def test_infer_refuses_wrong_inputs(self, artifact: Path) -> None:
        self._need_runtime()
        inputs = random_inputs(self.models[0], batch=1)
        with portcall.api.load(artifact) as opened:
            with pytest.raises(BadInput, match=r"no input 'x' given\. Give: x"):
                opened.infer({"wrong": inputs["x"]})
            with pytest.raises(
                BadInput, match=r"input 'x' is float64, not float32. Use .astype\('float32'\)"
            ):
                opened.infer({"x": inputs["x"].astype(np.float64)})
            transposed = np.asfortranarray(inputs["x"])
            np.testing.assert_array_equal(
                next(iter(opened.infer({"x": transposed}).values())),
                next(iter(opened.infer(inputs).values())),
            )

    def test_dynamic_dimensions(self, exports: Exports, model: str) -> None:
        self._need_runtime()
        for precision, tolerance in (("fp32", 1e-5), ("int8", 0.5)):
            if precision not in self.backend.capabilities.precisions:
                continue
            artifact = exports.artifact(model, self.name, precision)
            inputs = random_inputs(model, batch=3, sequence=11)
            with portcall.api.load(artifact) as opened:
                if not self.dynamic:
                    with pytest.raises(UnsupportedError, match=r"this (flatbuffer|program) only \(1, "):
                        opened.infer(inputs)
                    continue
                found = opened.infer(inputs)
            for name, array in source_outputs(model, inputs, artifact).items():
                np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=tolerance)


def assert_light_imports(tree: ast.Module, siblings: bool = False) -> None:
    """Check that a module's top-level imports are the standard library and the agent.

    siblings: and other exporters' modules, which travel with it and are checked themselves.
    """
    allowed = ["portcall.targets.agent", *(["portcall.exporters"] if siblings else [])]
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            travels = any(name == package or name.startswith(f"{package}.") for package in allowed)
            assert travels or name.partition(".")[0] in sys.stdlib_module_names, f"imports {name} at its top"
