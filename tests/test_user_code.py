"""The user's own code may import from the current folder, also late, and is blamed by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTORY = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        import own_constant  # only now, from the folder that portcall runs in
        return x * own_constant.FACTOR

def model():
    return Net().eval(), (torch.randn(1, 4),)
"""


def test_a_late_import_finds_the_current_folder(portcall: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(FACTORY)
    (tmp_path / "own_constant.py").write_text("FACTOR = 3.0\n")
    done = portcall(
        "export", "own_model:model", "--to", "onnxruntime:fp32", "-o", "out", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["outcome"] == "artifact", result["reason"]


def test_a_factory_that_raises_is_blamed(portcall: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text("def model():\n    return 1 / 0\n")
    done = portcall("export", "own_model:model", "--to", "onnxruntime:fp32", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "own_model:model() failed: ZeroDivisionError" in done.stderr
    assert "Fix that code" in done.stderr
