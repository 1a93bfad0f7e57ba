"""A small version of ``benchmarks/micro.py``: a trained DS-CNN in TFLM, LiteRT's reference kernels and XNNPACK."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import micro

SAMPLES = 300


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime",
        reason="tflite_micro is not installed; fix: pip install 'portcall[tflite_micro]'",
    )
    folder = tmp_path_factory.mktemp("micro")
    [network] = [n for n in micro.NETWORKS if n.name == "ds_cnn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(micro.VARIABLE, str(folder))
        patch.setenv("PORTCALL_CACHE", os.environ.get("PORTCALL_CACHE", str(folder / "cache")))
        small = replace(network, train=1500, epochs=2)
        micro.train(small)
        return micro.compare(small, SAMPLES, folder)


def test_the_network_has_learned_something_and_int8_keeps_it(row: dict[str, Any]) -> None:
    assert row["n"] == SAMPLES and row["metric"] == "top-1"
    assert 0.5 < row["accuracy"]["float"] < 1.0
    assert abs(row["accuracy"]["tflm"] - row["accuracy"]["float"]) < 0.05


def test_tflm_is_within_half_a_point_of_the_reference_kernels(row: dict[str, Any]) -> None:
    assert abs(row["accuracy"]["tflm"] - row["accuracy"]["litert_reference"]) <= 0.005
    assert row["identical"]["litert_reference"] >= 0.9
    assert abs(row["accuracy"]["tflm"] - row["accuracy"]["litert_xnnpack"]) <= 0.05


def test_the_table_holds_the_row_and_a_reason(row: dict[str, Any]) -> None:
    lines = micro.table([row, {"network": "other", "reason": "no such thing"}]).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "network"
    assert str(row["arena_bytes"]) in lines[1] and lines[1].split()[-1] == str(SAMPLES)
    assert lines[2].startswith("other") and "no such thing" in lines[2]


@pytest.mark.parametrize("network", micro.NETWORKS, ids=lambda n: n.name)
def test_the_data_is_drawn_by_seed_and_has_every_class(network: micro.Network) -> None:
    images, labels = network.test(120, 300)
    again, _ = network.test(120, 300)
    other, _ = network.test(120, 301)
    assert (images == again).all() and not (images == other).all()
    assert images.dtype.name == "float32" and len(images) == len(labels) == 120
    classes = {"resnet8": 10, "ds_cnn": 12, "mobilenet": 2, "autoencoder": 2, "digits": 10}[network.name]
    assert set(labels.tolist()) == set(range(classes))


def test_the_networks_keep_their_sizes() -> None:
    """Counted once: figures in the documentation belong to these networks and no others."""
    built = {n.name: n.build() for n in micro.NETWORKS if n.epochs}
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in built.items()}
    assert found == {"resnet8": 77946, "ds_cnn": 23180, "mobilenet": 213586, "autoencoder": 267928}


def test_the_script_names_its_folder_in_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(micro.VARIABLE, str(tmp_path))
    assert micro._weights(micro.NETWORKS[0]) == tmp_path / "resnet8.pt"
