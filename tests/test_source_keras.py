"""Keras and SavedModel sources: what is read off them, their hash, the reference, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall import source as sources
from portcall.targets.agent.contract import Source, TensorSpec
from portcall.targets.agent.errors import BadInput

pytest.importorskip("tensorflow", reason="TensorFlow is not installed; fix: pip install 'portcall[keras]'")

MAKE = """
import sys
import keras
from keras import layers

folder = sys.argv[1]
for seed in (1, 0):
    keras.utils.set_random_seed(seed)
    image, features = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="features")
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), features])
    model = keras.Model([image, features], [layers.Dense(5, name="scores")(x), layers.Dense(3, name="boxes")(x)])
    model.save(f"{folder}/two_{seed}.keras")
    model.export(f"{folder}/saved_{seed}", verbose=False)
model.save(f"{folder}/again.keras")
inputs = keras.Input((4,))
keras.Model(inputs, layers.Lambda(lambda t: t * 2)(inputs)).save(f"{folder}/lambda.keras")

class Mine(layers.Layer):
    def call(self, t):
        return t

keras.Model(inputs, Mine()(inputs)).save(f"{folder}/mine.keras")
keras.Sequential([layers.Dense(2)]).save(f"{folder}/unbuilt.keras")
keras.Sequential([keras.Input((4,), name="features"), layers.Dense(2)]).save(f"{folder}/sequential.keras")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("keras models")
    quiet = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", MAKE, str(made)]
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made / "broken.keras").write_bytes(b"PK no zip at all")
    (made / "broken_saved").mkdir()
    (made / "broken_saved" / "saved_model.pb").write_bytes(b"no protocol buffer")
    return made


OPEN = """
import json, sys
import numpy as np
from portcall.source import open_reference, open_source
from portcall.targets.agent.contract import Source
from portcall.targets.agent.errors import PortcallError

folder, *names = sys.argv[1:]
found, outputs = {}, {}
for name in names:
    try:
        found[name] = open_source({"spec": f"{folder}/{name}", "shapes": {}, "directory": folder}, None)
    except PortcallError as error:
        found[name] = {"kind": error.kind, "message": error.message, "fix": error.fix}
sample = dict(np.load(f"{folder}/sample.npz"))
for name in set(names) & {"two_0.keras", "saved_0"}:
    run = open_reference(Source.from_json(found[name]))
    outputs[name] = {k: v.tolist() for k, v in run(sample).items()}
import keras
predicted = keras.models.load_model(f"{folder}/two_0.keras").predict(sample, verbose=0)
print(json.dumps({"found": found, "outputs": outputs, "predicted": [a.tolist() for a in predicted]}))
"""
NAMES = ("two_0.keras", "again.keras", "two_1.keras", "sequential.keras", "saved_0", "saved_1")
BAD = ("lambda.keras", "mine.keras", "unbuilt.keras", "broken.keras", "broken_saved")


def run_open(folder: Path, *names: str) -> dict[str, Any]:
    """Open models in a process of its own, as a worker does: TensorFlow stays out of this one."""
    command = [sys.executable, "-c", OPEN, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def answer(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "sample.npz",
        image=rng.standard_normal((1, 8, 8, 3)).astype(np.float32),
        features=rng.standard_normal((1, 4)).astype(np.float32),
    )
    return run_open(folder, *NAMES, *BAD)


@pytest.fixture(scope="module")
def opened(answer: dict[str, Any]) -> dict[str, Source]:
    return {name: Source.from_json(answer["found"][name]) for name in NAMES}


def test_classify_tells_the_formats_by_name(folder: Path) -> None:
    assert sources.classify(str(folder / "two_0.keras")) == "keras"
    assert sources.classify(str(folder / "saved_0")) == "savedmodel"
    with pytest.raises(BadInput, match="no model file"):
        sources.classify(str(folder / "missing.keras"))
    with pytest.raises(BadInput, match="cannot open") as caught:
        sources.classify(str(folder))
    assert "SavedModel" in caught.value.fix
    with pytest.raises(BadInput) as caught:
        sources.classify("old.h5")
    assert "model.save('model.keras')" in caught.value.fix


def test_keras_inputs_and_outputs_keep_names_and_order(opened: dict[str, Source]) -> None:
    source = opened["two_0.keras"]
    assert source.format == "keras" and source.path.name == "two_0.keras"
    assert source.inputs == (
        TensorSpec("image", ("batch", 8, 8, 3), "float32"),
        TensorSpec("features", ("batch", 4), "float32"),
    )
    assert [t.name for t in source.outputs] == ["scores", "boxes"]
    assert source.example_shapes == {"image": (1, 8, 8, 3), "features": (1, 4)}


def test_a_sequential_opens_like_any_other(opened: dict[str, Source]) -> None:
    source = opened["sequential.keras"]
    assert [t.shape for t in source.inputs] == [("batch", 4)] and len(source.outputs) == 1


def test_saved_models_go_by_the_names_of_their_signature(opened: dict[str, Source]) -> None:
    source = opened["saved_0"]
    assert source.format == "savedmodel"
    assert [t.name for t in source.inputs] == ["features", "image"]
    assert [t.shape for t in source.outputs] == [("batch", 5), ("batch", 3)]
    assert source.example_shapes == {"image": (1, 8, 8, 3), "features": (1, 4)}


def test_equal_networks_have_equal_hashes(folder: Path, opened: dict[str, Source]) -> None:
    assert opened["two_0.keras"].sha256 == opened["again.keras"].sha256
    assert opened["two_0.keras"].sha256 != opened["two_1.keras"].sha256
    assert opened["saved_0"].sha256 != opened["saved_1"].sha256
    again = run_open(folder, "saved_0", "two_0.keras")["found"]  # another process, another order
    for name, source in again.items():
        assert source["sha256"] == opened[name].sha256


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("lambda.keras", "Lambda layer", "model.export"),
        ("mine.keras", "needs a class", "model.export"),
        ("unbuilt.keras", "no fixed inputs", "keras.Input"),
        ("broken.keras", "not a readable .keras", "model.save"),
        ("broken_saved", "not a readable SavedModel", "model.export"),
    ],
)
def test_what_cannot_be_opened_says_why(answer: dict[str, Any], name: str, message: str, fix: str) -> None:
    error = answer["found"][name]
    assert error["kind"] == "bad_input"
    assert message in error["message"] and name in error["message"] and fix in error["fix"]


@pytest.mark.parametrize("name", ["two_0.keras", "saved_0"])
def test_the_reference_is_tensorflow_in_float32(answer: dict[str, Any], name: str) -> None:
    found = list(answer["outputs"][name].values())
    assert len(found) == 2
    for one, other in zip(found, answer["predicted"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_other_backends_refuse_keras_by_name(folder: Path, tmp_path: Path) -> None:
    import portcall.api

    answer: dict[str, Any] = portcall.api.export(
        folder / "two_0.keras", ["onnxruntime:fp32"], tmp_path / "out"
    )
    [result] = answer["results"]
    assert result["outcome"] == "unsupported" and "cannot take keras models" in result["reason"]
