"""Trained scales as they stand in a .pte file, whose tensors have no names: each is looked for by its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, Sequence, Set, Tuple

from portcall.exporters._executorch_convert import LEFT_OUT
from portcall.exporters._trained import Entry, Quantization

Key = Tuple[str, bool]


def left_out(path: Path, entries: Sequence[Entry]) -> Set[Key]:
    """Return the trained tensors that the exporter left in float: XNNPACK has no integer kernel for them."""
    names = set(json.loads(path.with_name(LEFT_OUT).read_text(encoding="utf-8")))
    return {(e.tensor, e.is_weight) for e in entries if e.tensor in names}


def found(path: Path, entries: Sequence[Entry]) -> Dict[Key, List[Quantization]]:
    """Return the expected quantization of every trained tensor whose scales and zero points the file holds.

    Two tensors of equal scales are one here: a loss is seen unless another tensor has just that quantization.
    """
    import numpy as np

    from portcall.exporters import _executorch_program

    program = _executorch_program.read(path)
    values = [v for ops in program.delegates for op in ops for v in (*op.inputs, *op.outputs)]
    # Decompiled values have six decimals; the exact bits of a scale are looked for in the payload below.
    single = {(round(v.scale, 6), v.zero_point) for v in values if v.scale is not None}
    several = {np.asarray(v.scales, np.float32).tobytes() for v in values if v.scales}
    several |= {bytes(program.data.get(v.scales_data, b"")) for v in values if v.scales_data is not None}
    result: Dict[Key, List[Quantization]] = {}
    for entry in entries:
        wanted = entry.quantization.symmetric() if entry.is_weight else entry.quantization.as_int8()
        if len(wanted.scales) == 1:
            scale = wanted.scales[0]
            held = (round(scale, 6), wanted.zero_points[0]) in single
            held = held and any(np.float32(scale).tobytes() in payload for payload in program.payloads)
        else:
            scales = np.asarray(wanted.scales, np.float32).tobytes()
            held = any(blob[: len(scales)] == scales for blob in several)
        if held:
            result.setdefault((entry.tensor, entry.is_weight), []).append(wanted)
    return result
