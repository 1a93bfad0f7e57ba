"""A QNN context's profile, in the x86 emulation of the processor: what is counted, never what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portcall.api
from portcall import artifact as artifacts
from portcall.core import Workload
from portcall.exporters import get_backend
from portcall.targets.agent.contract import Unavailable
from tests.exporters.cumulative import write_data, write_onnx


def test_the_context_is_on_the_processor_and_its_ends_are_not(tmp_path: Path) -> None:
    found = get_backend("qnn").probe("export")
    if isinstance(found, Unavailable):
        pytest.skip(f"{found.reason}: {found.fix}")
    from portcall.exporters import _qnn
    from portcall.exporters._profile_qnn import QnnProfiler

    class Emulated(QnnProfiler):
        def _open(self, path: Path, options: Any) -> Any:
            self._ask(options)
            return _qnn.open_session(path, options, _qnn.provider_options("75"))

    model, data = write_onnx(tmp_path / "model.onnx"), write_data(tmp_path / "data.npz")
    shapes = {"picture": (1, 3, 24, 24)}
    [result] = portcall.api.export(
        model, "qnn:int8", tmp_path / "out", data=data, shapes=shapes, options={"qnn.htp_arch": "75"}
    )["results"]
    assert result["outcome"] == "artifact", result["reason"]
    folder = Path(result["path"]).resolve()
    artifact = artifacts.from_manifest(folder, artifacts.read_manifest(folder))
    [context] = json.loads((folder / "contexts.json").read_text())["contexts"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    session = Emulated(artifact, Workload(), scratch, context)
    with np.load(folder / "samples.npz") as samples:
        session.set_inputs({t.name: samples[t.source][0] for t in artifact.inputs})
    for _ in range(2):
        session.infer()
        session.collect()
    placed = session.placed([0, 1])
    assert placed.counted == (3, 3), "two convolutions and a sum"
    assert [o.operator for o in placed.operators if not o.on_unit] == ["QuantizeLinear", "DequantizeLinear"]
    assert [o.unit for o in placed.operators if o.on_unit] == ["QNNExecutionProvider"]
    assert all(o.time_ns for o in placed.operators)
