"""``python -m benchmarks.executorch``: ExecuTorch beside LiteRT, int8 from the same calibration.

Per cell: size, SQNR and agreement against the source, seconds of the export, the share of multiply-accumulates on
integers, and for ExecuTorch how many operators lie inside XNNPACK's delegates and outside. The last column is the
difference of an int8 program's SQNR from LiteRT's: both have int8 asymmetric activations, int8 weights per channel, and
the ranges of one calibration table, each of its own graph's tensors.

Models and their DATA: see ``benchmarks/formats.py`` (ResNet-20 needs PORTCALL_CIFAR10_RESNET).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import portcall
from benchmarks.formats import CHOSEN, MODELS
from portcall.artifact import write_json
from portcall.bench.report import align
from portcall.exporters import _executorch_program
from portcall.progress import Reporter
from portcall.targets.agent.errors import PortcallError

CELLS = "executorch:all,tflite:fp32,tflite:int8-dynamic,tflite:int8"
HEADER = (
    "model", "backend", "precision", "outcome", "MB", "SQNR dB", "agree %", "n", "export s", "integer %", "delegates",
    "inside", "outside", "dB - LiteRT",
)  # fmt: skip


def rows_of(model: str, folder: Path, cells: str) -> list[dict[str, Any]]:
    """Calibrate *model*, export it to *cells* below *folder*, and return the results with what this file adds."""
    os.environ[CHOSEN] = model
    table = folder / f"{model}.pctable"
    if not table.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        portcall.calibrate(
            MODELS[model].factory,
            "benchmarks.formats:calibration",
            table,
            kinds=["tflite"],
            reporter=Reporter(True),
        )
    answer = portcall.export(
        MODELS[model].factory,
        cells,
        folder / model,
        table=table,
        evaluation="benchmarks.formats:evaluation",
        reporter=Reporter(True),
    )
    peers = {r["precision"]: r["parity"] for r in answer["results"] if r["backend"] == "tflite"}
    rows = []
    for result in answer["results"]:
        row = {"model": model, **result, "operators": None, "difference_db": None}
        peer = peers.get(result["precision"])
        if result["backend"] == "executorch" and result["outcome"] == "artifact":
            program = _executorch_program.read(Path(result["path"]) / "model.pte")
            inside = sum(map(len, program.delegates))
            row["operators"] = {
                "delegates": len(program.delegates), "inside": inside, "outside": len(program.outside),
            }  # fmt: skip
            if peer is not None and result["precision"].startswith("int8"):
                row["difference_db"] = result["parity"]["sqnr_db"] - peer["sqnr_db"]
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> list[str]:
    if row["parity"] is None:
        return [row["model"], row["backend"], row["precision"], row["outcome"], *["-"] * 9, row["reason"]]
    parity, operators, share = row["parity"], row["operators"], row["arithmetic"]["integer_macs_share"]
    counts = ["-"] * 3 if operators is None else [str(n) for n in operators.values()]
    difference = row["difference_db"]
    return [
        row["model"],
        row["backend"],
        row["precision"],
        row["outcome"],
        f"{row['size_bytes'] / 1e6:.2f}",
        f"{parity['sqnr_db']:.2f}",
        "-" if parity["agreement"] is None else f"{100 * parity['agreement']:.1f}",
        str(parity["n"]),
        f"{row['seconds']:.1f}",
        "-" if share is None else f"{100 * share:.1f}",
        *counts,
        "-" if difference is None else f"{difference:+.2f}",
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return align(HEADER, [_line(row) for row in rows], left=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="ExecuTorch beside LiteRT: closeness, size, what is delegated"
    )
    parser.add_argument("--models", default="efficientnet-lite0,resnet20,digits", help="default: %(default)s")
    parser.add_argument("--cells", default=CELLS, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-executorch"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        if model not in MODELS:
            sys.exit(f"error: no model {model!r}; there are: {', '.join(MODELS)}")
        try:
            rows += rows_of(model, arguments.folder, arguments.cells)
        except (PortcallError, ImportError) as error:
            print(f"error: {model}: {error}", file=sys.stderr)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"schema": 1, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
