"""What ``make bench-calibration`` needs before the first round: graphs, samples, and the contenders' environments."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

from examples.efficientnet_lite0 import _crops  # its own functions fix the number of samples
from portcall.core import Graph, PortcallError, UnavailableError
from portcall.exporters import get_backend
from portcall.progress import Reporter
from portcall.workspace import lower, open_source, open_workspace

MODEL = "examples.efficientnet_lite0:model"
BACKENDS = {"onnx": "onnxruntime", "tflite": "tflite"}
"""Kind of graph -> the backend that lowers to it."""

VENVS = {
    "nncf": (("nncf==3.4.0", "openvino==2026.4.1", "numpy==2.4.6"),),
    # torch first and pinned: it then takes a CPU build where one is at hand.
    "modelopt": (("torch==2.13.0",), ("nvidia-modelopt[onnx]==0.47.0",)),
}
"""Environment -> what pip installs into it, one call after the other."""


def lower_graphs(kinds: Collection[str], folder: Path) -> dict[str, Graph | PortcallError]:
    """Lower the model as the product does; return kind -> graph in a folder of its own, or why there is none."""
    graphs: dict[str, Graph | PortcallError] = {}
    with open_workspace(Reporter(True), timeout_s=1800) as work:
        source = open_source(work, MODEL, {})
        for kind in kinds:
            backend = get_backend(BACKENDS[kind])
            place = folder / kind
            shutil.rmtree(place, ignore_errors=True)
            try:
                work.probe(backend.name, "export")
                graph = lower(work, source, backend)
            except PortcallError as error:
                graphs[kind] = error
                continue
            shutil.copytree(graph.path.parent, place)
            graphs[kind] = replace(graph, path=place / graph.path.name)
    return graphs


def write_images(count: int, path: Path) -> None:
    """Write *count* of the example's calibration crops as an ``.npz`` of one array, float32[count, 3, 224, 224]."""
    crops = _crops(count, seed=1, left=True)
    first = next(crops)
    [(name, array)] = first.items()
    header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False}
    with ZipFile(path, "w") as archive, archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        npy.write_array_header_1_0(stream, {**header, "shape": (count, *array.shape[1:])})
        for crop in [first, *crops]:
            stream.write(np.ascontiguousarray(crop[name]).tobytes())


def environment(name: str | None, folder: Path) -> Path:
    """Return the interpreter of an environment, made on first use; of this one if *name* is None.

    Raises UnavailableError where pip cannot install it.
    """
    if name is None:
        return Path(sys.executable)
    place = folder / f"venv-{name}"
    python, done = place / "bin" / "python", place / "installed.txt"
    wanted = "\n".join(requirement for call in VENVS[name] for requirement in call)
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"making {place} ...", file=sys.stderr)
    venv.create(place, clear=True, with_pip=True)
    for call in VENVS[name]:
        command = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", *call]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode:
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
            said = errors[-1] if errors else f"pip exited with status {pip.returncode}"
            raise UnavailableError(f"pip install {' '.join(call)} failed: {said[:200]}", "See pip's message")
    done.write_text(wanted)
    return python
