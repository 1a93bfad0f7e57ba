"""A ``.dlc`` beside the ONNX file, where a Qualcomm SDK of the user is on PATH.

Unproven: the SDK is not on any package index. The tests run a stand-in for it, so that they check the command line and
the handling of its files, and nothing of what a converter makes of a graph.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Optional, Tuple

CONVERTERS = ("qairt-converter", "snpe-onnx-to-dlc")
"""The first one found converts. Both take --input_network and --output_path, and keep the scales of Q/DQ nodes."""
TIMEOUT_S = 1800
DLC = "model.dlc"


def convert(model: Path, converters: Tuple[str, ...] = CONVERTERS) -> Tuple[Optional[str], Tuple[str, ...]]:
    """Convert *model* with the first converter on PATH; return the file's name (None: none was made), and notes.

    A converter that fails costs the ``.dlc`` alone: the note says why.
    """
    found = next((path for path in map(shutil.which, converters) if path), None)
    if found is None:
        return None, ()
    name = Path(found).name
    output = model.with_name(DLC)
    command = [found, "--input_network", str(model), "--output_path", str(output)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        output.unlink() if output.exists() else None
        return None, (f"no {DLC}: {name} failed: {error}",)
    if done.returncode or not output.is_file() or not output.stat().st_size:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        if output.exists():
            output.unlink()
        return None, (f"no {DLC}: {name} ended with code {done.returncode} and said: {said}",)
    return DLC, (
        f"{DLC}: {output.stat().st_size} bytes, by {name} of the SDK on PATH; portcall has not run it anywhere",
    )
