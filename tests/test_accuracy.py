"""Accuracy with its interval, budgets and wrong baselines: scores as workers give them, and the commands end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall as library
from portcall.accuracy import Accuracy, baseline_warnings, compare, judge
from portcall.core import BadInput
from portcall.scoring import score
from tests.conftest import Portcall

Array = np.ndarray[Any, Any]


# ------------------------------------------------------------------------------------------- from scores to a verdict


def _outcomes(n: int, lost: int, gained: int) -> tuple[Array, Array]:
    """Return right or wrong of source and artifact over n samples, of which some differ."""
    reference, value = np.ones(n), np.ones(n)
    value[:lost] = 0
    reference[lost : lost + gained] = 0
    return reference, value


def test_paired_outcomes_give_figures_that_fit_each_other() -> None:
    found = compare(*_outcomes(2000, 40, 10), Accuracy())
    assert (found["metric"], found["n"], found["method"]) == ("top1", 2000, "mcnemar")
    assert (found["reference"], found["value"]) == (0.995, 0.98)
    assert found["difference"] == pytest.approx(-0.015) and found["discordant"] == [40, 10]
    low, high = found["ci95"]
    assert low < -0.015 < high < 0 and found["p_value"] < 0.01
    assert found["smallest_drop"] == pytest.approx(50 * (high - low))
    assert found["verdict"] is None and found["max_drop"] is None and found["warnings"] == []


@pytest.mark.parametrize(
    ("lost", "n", "budget", "verdict"),
    [
        (100, 1000, 5.0, "exceeded"),
        (0, 1000, 0.5, "within"),
        (0, 100, 0.5, "inconclusive"),
        (6, 1000, 0.5, "inconclusive"),
    ],
)
def test_verdicts(lost: int, n: int, budget: float, verdict: str) -> None:
    found = compare(*_outcomes(n, lost, 0), Accuracy(max_drop=budget))
    assert found["verdict"] == verdict and found["max_drop"] == budget
    assert bool(found["warnings"]) == (verdict == "inconclusive")
    if verdict == "inconclusive":
        assert f"n={n} cannot tell whether the drop exceeds 0.5 points" in found["warnings"][0]


def test_judge_at_the_border() -> None:
    assert judge((-0.5, 0.1), 0.5) == "within" and judge((-0.6, -0.5), 0.5) == "inconclusive"
    assert judge((-0.7, -0.51), 0.5) == "exceeded" and judge(None, 0.5) == "inconclusive"


def test_too_few_samples_are_said_with_how_many_would_do() -> None:
    [warning] = compare(*_outcomes(120, 2, 1), Accuracy())["warnings"]
    assert warning.startswith("n=120 is too small to tell a one-point drop") and "samples would do" in warning
    needed = int(warning.split("about ")[1].split()[0])
    scaled = compare(*_outcomes(needed, needed * 2 // 120, needed // 120), Accuracy())
    assert scaled["warnings"] == [] and 0.8 < scaled["smallest_drop"] <= 1.02


def test_a_real_valued_metric_is_in_its_own_units() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random(400)
    value = reference - rng.normal(0.3, 0.05, 400)
    found = compare(reference, value, Accuracy("pack.age:iou", max_drop=0.2))
    assert (found["method"], found["p_value"], found["verdict"]) == ("paired t", None, "exceeded")
    assert found["smallest_drop"] == pytest.approx((found["ci95"][1] - found["ci95"][0]) / 2)
    one = compare(reference[:1], value[:1], Accuracy("pack.age:iou", max_drop=0.2))
    assert (one["ci95"], one["smallest_drop"], one["verdict"]) == (None, None, "inconclusive")


# ----------------------------------------------------------------------------------------------------- wrong baselines


def _classes(predicted: Array, labels: Array, count: int) -> tuple[Array, dict[str, Any]]:
    from portcall.scoring import _Classes

    classes = _Classes()
    classes.add(predicted, labels, count)
    return (predicted == labels).astype(float), classes.summary()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y, rng: rng.integers(0, 10, y.size), ["near chance", "10.0%", "preprocessing"]),
        (lambda y, rng: np.zeros_like(y), ["near chance"]),
        (lambda y, rng: (y + 1) % 10, ["off by one"]),
        (lambda y, rng: (7 * y + 3) % 10, ["another order"]),
    ],
)
def test_a_source_near_chance_is_told(change: Callable[..., Array], words: list[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300)
    [warning] = baseline_warnings(*_classes(change(labels, rng), labels, 10))
    assert all(w in warning for w in words) and "n=300" in warning


def test_labels_beyond_the_classes_are_told() -> None:
    labels = np.arange(1, 11).repeat(5)
    [warning] = baseline_warnings(*_classes(labels - 1, labels, 10))
    assert "labels run from 1 to 10" in warning and "0 to 9" in warning


@pytest.mark.parametrize("n", [1, 2, 5, 20, 300])
@pytest.mark.parametrize("accuracy", [0.7, 0.95, 1.0])
def test_an_honest_source_is_left_alone(n: int, accuracy: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 10, n)
        predicted = np.where(np.arange(n) < round(accuracy * n), labels, (labels + 1) % 10)
        assert baseline_warnings(*_classes(predicted, labels, 10)) == []
    one_class = np.full(n, 3)
    assert baseline_warnings(*_classes(one_class, one_class, 10)) == []


def test_no_better_than_the_commonest_class_is_told() -> None:
    labels = np.arange(200) % 10 == 0
    [warning] = baseline_warnings(*_classes(np.zeros(200, np.int64), labels.astype(np.int64), 2))
    assert "always answering 0 90.0%" in warning


# ------------------------------------------------------------------------------------------ the commands, end to end


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("with a space")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A linear classifier of the digits by least squares: "pixels" float32[batch, 64] to "scores" [batch, 10]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    pixels, labels = _digits()
    wanted = np.eye(10)[labels[:1000]] * 2 - 1
    known = np.concatenate([pixels[:1000], np.ones((1000, 1))], axis=1)
    solved = np.linalg.solve(known.T @ known + 0.1 * np.eye(65), known.T @ wanted).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["pixels", "w", "b"], ["scores"], "readout")],
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(solved[:-1], "w"), numpy_helper.from_array(solved[-1], "b")],
    )
    path = place / "digits.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def _digits() -> tuple[Array, Array]:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="pip install scikit-learn: it brings the digits"
    )
    found = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.data))
    return (found.data[order] / 16).astype(np.float32), found.target[order]


@pytest.fixture(scope="module")
def data(place: Path, model: Path) -> Path:
    """calibration.npz, and eval.npz with labels; faint.npz: calibration data of another scale."""
    pixels, labels = _digits()
    np.savez(place / "calibration.npz", pixels=pixels[:100])
    np.savez(place / "faint.npz", pixels=pixels[:100] / 16)
    np.savez(place / "eval.npz", pixels=pixels[1000:1600], labels=labels[1000:1600])
    np.savez(place / "plain.npz", pixels=pixels[1000:1100])
    np.savez(place / "off.npz", pixels=pixels[1000:1100], labels=(labels[1000:1100] + 1) % 10)
    np.savez(place / "soft.npz", pixels=pixels[1000:1100], labels=np.eye(10)[labels[1000:1100]])
    return place


def test_an_export_within_its_budget(model: Path, data: Path, tmp_path: Path) -> None:
    answer = library.export(
        model,
        "onnxruntime:fp32,int8",
        tmp_path / "o",
        data=data / "calibration.npz",
        evaluation=data / "eval.npz",
        max_drop=5,
    )
    assert answer["warnings"] == []
    for result in answer["results"]:
        found = result["eval"]
        assert (found["metric"], found["n"], found["verdict"]) == ("top1", 600, "within")
        assert found["difference"] == pytest.approx(found["value"] - found["reference"])
        assert 0.85 < found["reference"] < 1 and found["ci95"][0] <= found["difference"] <= found["ci95"][1]
        manifest = json.loads((Path(result["path"]) / "manifest.json").read_text())
        assert manifest["eval"] == found
    fp32 = answer["results"][0]["eval"]
    assert fp32["difference"] == 0 and fp32["discordant"] == [0, 0] and fp32["p_value"] == 1


def test_a_proven_drop_fails_and_a_possible_one_is_inconclusive(
    portcall: Portcall, model: Path, data: Path, tmp_path: Path
) -> None:
    """Calibrated on values 16 times too small, int8 clips nearly everything; fp32 beside it needs no calibration."""
    options = ["--data", data / "faint.npz", "--eval", data / "eval.npz", "--max-drop", "0.1"]
    to = ["--to", "onnxruntime:fp32,int8"]
    done = portcall("export", model, *to, *options, "-o", tmp_path / "o", "--json")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    fp32, int8 = answer["results"]
    assert (fp32["outcome"], fp32["eval"]["verdict"]) == ("artifact", "inconclusive")
    assert (int8["outcome"], int8["error_kind"], int8["eval"]["verdict"]) == (
        "failed",
        "verification",
        "exceeded",
    )
    assert "exceeds --max-drop 0.1" in int8["reason"] and int8["path"] is None and int8["parity"]["n"] == 600
    assert not (tmp_path / "o" / "onnxruntime-int8").exists()
    assert int8["eval"]["ci95"][1] < -0.001
    assert any("'pixels'" in w and "scaling" in w for w in answer["warnings"])
    assert "warning: input 'pixels'" in done.stderr
    artifact = tmp_path / "o" / "onnxruntime-fp32"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert any("scaling" in note for note in manifest["notes"])

    done = portcall("verify", artifact, "--eval", data / "eval.npz", "--max-drop", "0.1")
    assert done.returncode == 3, done.stderr
    assert "inconclusive" in done.stdout and "top1 " in done.stdout and " -> " in done.stdout
    assert "about" in done.stderr and "samples would do" in done.stderr
    assert portcall("verify", artifact, "--eval", data / "eval.npz", "--max-drop", "5").returncode == 0


METRICS = """
import numpy as np

def close(outputs, label):
    [scores] = outputs.values()
    return -float(np.square(scores[0] - (2 * label - 1)).mean())

def confident(outputs, label):
    assert label is None
    return outputs["scores"].max()

def fails(outputs, label):
    return 1 / (label != 7) if True else 0

def text(outputs, label): return "good"
def nothing(outputs, label): return None
def many(outputs, label): return outputs["scores"][0]
def nan(outputs, label): return float("nan")
def alone(outputs): return 1
"""


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_metrics.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    return "my_metrics"


def test_a_metric_gets_outputs_by_name_and_labels_of_any_shape(
    model: Path, data: Path, metrics: str, tmp_path: Path
) -> None:
    [result] = library.export(
        model,
        "onnxruntime:int8",
        "out",
        data=data / "calibration.npz",
        evaluation=data / "soft.npz",
        metric=f"{metrics}:close",
        max_drop=0.5,
    )["results"]
    found = result["eval"]
    assert (found["metric"], found["n"], found["method"]) == (f"{metrics}:close", 100, "paired t")
    assert found["verdict"] == "within" and found["max_drop"] == 0.5 and found["value"] < 0
    assert 0 < abs(found["difference"]) < 0.05 and sum(found["discordant"]) == 100
    [result] = library.verify(
        "out/onnxruntime-int8", evaluation=data / "plain.npz", metric=f"{metrics}:confident"
    )["results"]
    assert result["eval"]["n"] == 100 and result["eval"]["reference"] > 0


def _stored(folder: Path, labels: list[Any], outputs: Array) -> dict[str, Any]:
    """Write what the reference job leaves, for the scoring job; return that job."""
    for number, (label, output) in enumerate(zip(labels, outputs, strict=True)):
        stored: dict[str, Any] = {"reference/scores": output}
        np.savez(folder / f"{number:06d}.npz", **stored)
        np.save(folder / f"{number:06d}.label.npy", np.asarray(label))
    (folder / "index.json").write_text(json.dumps({"n": len(labels), "labelled": True}))
    scores = str(folder / "scores.npy")
    return {"samples": str(folder), "outputs": None, "order": ["scores"], "metric": None, "scores": scores}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", ["raised ZeroDivisionError at sample 2"]),
        ("text", ["returned text at sample 0"]),
        ("nothing", ["returned a NoneType at sample 0"]),
        ("many", ["returned an array of shape [10]"]),
        ("nan", ["returned nan at sample 0"]),
        ("alone", ["raised TypeError at sample 0", "positional"]),
        ("clse", ["has no 'clse'", "Did you mean 'close'"]),
    ],
)
def test_a_metric_that_fails_is_named_with_its_sample(
    metrics: str, tmp_path: Path, name: str, words: list[str]
) -> None:
    job = _stored(tmp_path, [3, 4, 7], np.ones((3, 1, 10)))
    with pytest.raises(BadInput) as caught:
        score({**job, "metric": f"{metrics}:{name}"}, lambda done, total: None)
    assert all(w in str(caught.value) for w in [*words, metrics]) and caught.value.fix


@pytest.mark.parametrize(
    ("labels", "shape", "words"),
    [([1], (1, 10, 4, 4), "no output has rank 2"), ([1], (2, 10), "1 labels, and its output 2 rows")],
)
def test_top1_needs_classes_that_fit(
    tmp_path: Path, labels: list[Any], shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        score(_stored(tmp_path, labels, np.ones((1, *shape))), lambda done, total: None)


def test_top1_of_a_batch_counts_every_row(tmp_path: Path) -> None:
    job = _stored(tmp_path, [[1, 2], [0, 0]], np.stack([np.eye(3)[[1, 0]], np.eye(3)[[0, 0]]]))
    score(job, lambda done, total: None)
    np.testing.assert_array_equal(np.load(job["scores"]), [1, 0, 1, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval", "plain.npz", "--max-drop", "1"], ["--max-drop needs labels", "--metric"]),
        (["--max-drop", "1"], ["--max-drop needs samples", "--eval DATA"]),
        (["--eval", "soft.npz"], ["float64, not integers", "--metric"]),
        (["--eval", "eval.npz", "--max-drop", "-1"], ["'-1' is not a number from 0 up"]),
        (["--eval", "eval.npz", "--metric", "accuracy"], ["no package.module:callable"]),
        (["--eval", "eval.npz", "--metric", "no_such_module:f"], ["cannot import 'no_such_module'"]),
    ],
)
def test_bad_input(
    portcall: Portcall, model: Path, data: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    to = ["--to", "onnxruntime:fp32", "-o", tmp_path / "o"]
    done = portcall("export", model, *to, *options, cwd=data, env=_environment(tmp_path))
    assert done.returncode == 2, done.stderr
    assert all(w in done.stderr for w in words) and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").glob("*/manifest.json"))


def _environment(tmp_path: Path) -> dict[str, str]:
    import os

    root = str(Path(library.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root}


def test_eval_without_labels_is_said_and_wrong_labels_are_caught(
    portcall: Portcall, model: Path, data: Path, tmp_path: Path
) -> None:
    to = ["--to", "onnxruntime:fp32", "--json"]
    answer = json.loads(
        portcall("export", model, *to, "--eval", data / "plain.npz", "-o", tmp_path / "a").stdout
    )
    assert answer["results"][0]["eval"] is None and "no labels" in answer["warnings"][0]
    answer = json.loads(
        portcall("export", model, *to, "--eval", data / "off.npz", "-o", tmp_path / "b").stdout
    )
    assert any("off by one" in w for w in answer["warnings"])
    [result] = answer["results"]
    assert any("off by one" in note for note in result["notes"])


def test_verify_without_eval_refuses_a_budget(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--max-drop needs samples"):
        library.verify(tmp_path, max_drop=1)
    with pytest.raises(BadInput, match="--metric needs samples"):
        library.verify(tmp_path, metric="a:b")
