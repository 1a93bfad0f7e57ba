"""What an export of a quantized source may ask for, and what it still needs data for. The parent's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from portcall.core import BadInput, Cell, Graph, Source, UnsupportedError
from portcall.exporters import _trained_check, _trained_tflite

if TYPE_CHECKING:
    from portcall.plan import ExportPlan

PRECISION = "int8"


def check_plan(plan: ExportPlan, source: Source) -> None:
    """Raise BadInput for options that would choose scales: this source has its own."""
    options = plan.options
    asked = [
        ("--method " + plan.method, plan.method != "minmax"),
        ("--table", plan.table is not None),
        ("--equalize", plan.equalize),
        ("--bias-correction", bool(options.get("bias_correction"))),
        ("--weights", "weights" in options or "weight_symmetric" in options),
        ("--keep-float", "keep_float" in options),
    ]
    wrong = [name for name, is_given in asked if is_given]
    if wrong:
        raise BadInput(
            f"{source.spec} is quantized already, its trained scales are kept: {', '.join(wrong)} would change them",
            f"Leave out {', '.join(wrong)}, or give the float model",
        )


def check_cell(cell: Cell, source: Source) -> None:
    """Raise UnsupportedError for what would drop the training, and for backends that cannot prove to keep it."""
    if cell.precision != PRECISION:
        raise UnsupportedError(
            f"{source.spec} is quantized: {cell.precision} would drop the scales that it was trained with",
            f"Use {cell.backend}:{PRECISION}, or give the float model",
        )
    if cell.backend not in _trained_check.BACKENDS:
        raise UnsupportedError(
            f"{cell.backend} takes no quantized models yet ({source.spec} is one)",
            f"Give the float model, or export to: {', '.join(_trained_check.BACKENDS)}",
        )


def without_range(graph: Graph) -> Sequence[str]:
    """Return the tensors of *graph* for which the source has no scale and nothing derives one; none in Q/DQ graphs."""
    if graph.kind != "tflite":
        return ()
    missing: list[str] = _trained_tflite.load(graph.path)["missing"]
    return missing


def no_range(missing: Sequence[str]) -> str:
    return _trained_tflite.no_range(missing)
