"""The memory pass on drop-in backends that hold, or briefly take, a known number of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.exporters
from portcall.bench.memory import pool, run_memory
from portcall.core import Artifact, Workload
from portcall.progress import Reporter
from portcall.targets import get_target
from portcall.targets.agent import memory
from portcall.workspace import open_workspace

MB = 1 << 20
PLANTED = 50 * MB
NEAR = MB

BACKEND = '''
"""The null backend, and PLANTED touched bytes: from load on, or in each inference (by the name of the file)."""
from contextlib import contextmanager
from dataclasses import replace

from portcall.exporters.null import BACKEND as NULL


def block():
    import numpy
    return numpy.ones(50 << 20, numpy.uint8)


@contextmanager
def load(artifact, workload):
    with NULL.load(artifact, workload) as session:
        held = block() if artifact.path.stem == "load" else None
        if artifact.path.stem == "freed":
            small = [b"x" * 4096 for _ in range(12800)]
            pin = b"y" * 4096  # on top of the heap: what is below cannot go back by itself
            del small
        if artifact.path.stem == "infer":
            session.infer = lambda: (block(), None)[1]
        session.memory_figures = lambda: {"arena_bytes": 7}
        yield session


BACKEND = replace(NULL, name="planted", load=load, capabilities=replace(NULL.capabilities, suffixes=(".planted",)))
'''

needs_peak = pytest.mark.skipif(
    memory.METHOD != "VmHWM", reason="no VmHWM in /proc/self/status here: run it on Linux"
)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a space in its name that holds the files for the drop-in backend."""
    (tmp_path / "drop-in").mkdir()
    (tmp_path / "drop-in" / "planted.py").write_text(BACKEND)
    paths = [*portcall.exporters.__path__, str(tmp_path / "drop-in")]
    monkeypatch.setattr(portcall.exporters, "__path__", paths)
    folder = tmp_path / "my files"
    folder.mkdir()
    for name in ("plain", "load", "infer", "freed"):
        tensor = {"name": "x", "shape": ["batch", 4], "dtype": "float32"}
        (folder / f"{name}.planted").write_text(json.dumps({"inputs": [tensor], "copies": {"y": "x"}}))
    np.savez(tmp_path / "x.npz", x=np.ones((2, 1, 4), np.float32))
    return folder


def figures(path: Path, data: str = "x.npz") -> dict[str, Any]:
    """Return what ``bench`` would say of a bare file, without its timed part."""
    artifact = Artifact(path.parent, path.name, "planted", "as is")
    job = {
        "artifact": artifact.to_json(),
        "workload": Workload().to_json(),
        "inputs": str(path.parent.parent / data),
        "expected_sqnr_db": [],
    }
    with open_workspace(Reporter(False), 60.0) as work:
        driver = get_target("local").driver(work)

        def read(layout: str, held: bool) -> Any:
            return driver.run("measure_memory", {**job, "layout": layout, "held": held}, "memory", "planted")

        return run_memory(read)[0]


@needs_peak
def test_planted_bytes_are_seen_within_1_mb_where_they_are(planted: Path) -> None:
    plain, load, infer = (figures(planted / f"{n}.planted") for n in ("plain", "load", "infer"))
    for key in ("model_bytes", "peak_bytes", "load_peak_bytes", "loaded_bytes", "private_bytes"):
        assert abs(load[key] - plain[key] - PLANTED) < NEAR, key
    assert abs(infer["infer_peak_bytes"] - plain["infer_peak_bytes"] - PLANTED) < NEAR
    assert abs(infer["peak_bytes"] - plain["peak_bytes"] - PLANTED) < NEAR
    assert abs(infer["model_bytes"] - plain["model_bytes"]) < NEAR
    assert abs(infer["inferred_bytes"] - plain["inferred_bytes"]) < NEAR, "it was given back"
    assert plain["repeatable"] and plain["processes"] == 3
    assert plain["runtime"] == {"arena_bytes": 7}


@needs_peak
def test_what_loading_freed_is_told_apart_from_what_the_model_holds(planted: Path) -> None:
    plain, freed = figures(planted / "plain.planted"), figures(planted / "freed.planted")
    if plain["freed_bytes"] is None:
        assert "malloc_trim" in plain["absent"]["freed_bytes"]
        pytest.skip("this C library has no malloc_trim: run it with glibc")
    assert freed["freed_bytes"] + freed["model_bytes"] == pytest.approx(
        freed["loaded_bytes"] - freed["baseline_bytes"], abs=NEAR
    )
    assert freed["model_bytes"] - plain["model_bytes"] < 10 * MB


def test_samples_do_not_count(planted: Path) -> None:
    """80 MB of samples of which the smallest part is bound."""
    np.savez(planted.parent / "many.npz", x=np.ones((5 << 20, 1, 4), np.float32))
    found = figures(planted / "plain.planted", "many.npz")
    assert found["model_bytes"] < 10 * MB
    assert found["peak_bytes"] < 80 * MB


def test_every_absent_figure_has_its_reason(planted: Path) -> None:
    found = figures(planted / "plain.planted")
    missing = {k for k, v in found.items() if v is None and k != "limit"}
    assert missing == set(found["absent"])


def answer(peak: int, layout: str = "fixed", freed: int | None = 3) -> dict[str, Any]:
    absent = {} if freed is not None else {"freed_bytes": "none here"}
    return {
        "layout": layout, "baseline_bytes": 10 * MB, "model_bytes": 5 * MB, "loaded_bytes": 18 * MB,
        "freed_bytes": freed, "peak_bytes": peak, "gpu_bytes": None, "absent": absent, "method": "VmHWM",
    }  # fmt: skip


def test_a_peak_that_depends_on_the_addresses_is_said_and_more_processes_are_read() -> None:
    asked: list[tuple[str, bool]] = []

    def read(layout: str, held: bool) -> dict[str, Any]:
        asked.append((layout, held))
        return answer(100 * MB if layout == "fixed" else (100 + 5 * len(asked)) * MB, layout)

    found, warnings = run_memory(read)
    assert asked[:3] == [("fixed", False), ("fixed", True), ("random", False)]
    assert asked[3:] == [("fixed", False), ("random", False), ("random", False)]
    assert found["peak_bytes"] == 100 * MB
    assert found["spread"]["peak_bytes"] == [100 * MB, 130 * MB]
    assert (found["processes"], found["repeatable"]) == (6, False)
    assert "plan for more than the largest" in warnings[0]


def test_one_that_differs_at_fixed_addresses_gets_up_to_five_processes() -> None:
    peaks = iter(range(100, 200, 10))
    found, warnings = run_memory(lambda layout, held: answer(next(peaks) * MB, layout))
    assert found["processes"] == 5 + 3 + 1 and warnings


def test_without_fixed_addresses_all_processes_are_pooled() -> None:
    peaks = iter([100, 100, 120, 100, 110, 130, 100, 100, 100])
    found, _ = run_memory(lambda layout, held: answer(next(peaks) * MB, "random"))
    assert found["layout"] == "random"
    assert found["peak_bytes"] == 110 * MB


def test_pooling_keeps_a_missing_figure_missing() -> None:
    found = pool([answer(5), answer(9)], answer(5, freed=None))
    assert found["peak_bytes"] == 7 and found["gpu_bytes"] is None
    assert found["freed_bytes"] is None and found["absent"]["freed_bytes"] == "none here"
