"""Programs that others wrote, on the device: where they are, and one run of them. For ``bench --witness``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from portcall.targets.agent.errors import UnavailableError

Progress = Callable[[int, Optional[int]], None]

_KEPT = 400_000
"""Characters of a program's output that travel back: the end of it, where the figures are."""

_MODULE = (
    "import importlib, sys; sys.modules['openvino_telemetry'] = None; sys.argv[0] = {name!r}; "
    "sys.exit(importlib.import_module({module!r}).main())"
)
"""Runs a tool that is a Python module, without what OpenVINO's reports to its maker."""


def find_tool(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Return how a tool is started here, and what it tells of its version.

    arguments: "name"; "module" (a Python module with ``main``) and its "distribution", or null for a program;
    "variable": the environment variable with a program's path, else it is looked up in PATH; "ask": arguments with
    which the program says its version, or null; "fix".
    Answers {"command", "version", "output": what it said to "ask", "chosen": named by the variable}.
    Raises UnavailableError where it is not.
    """
    if arguments["module"] is not None:
        return _find_module(arguments)
    name, variable = arguments["name"], arguments["variable"]
    given = os.environ.get(variable)
    path = shutil.which(given or name)
    if path is None:
        where = "%s=%s is no program" % (variable, given) if given else "%s is not in PATH" % name
        raise UnavailableError(where, arguments["fix"])
    output = None
    if arguments["ask"] is not None:
        try:
            done = subprocess.run(
                [path, *arguments["ask"]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError("%s does not start: %s" % (path, error), arguments["fix"]) from error
        output = done.stdout.decode(errors="replace")[:_KEPT]
    return {"command": [os.path.abspath(path)], "version": None, "output": output, "chosen": bool(given)}


def _find_module(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    name, module, distribution = (arguments[key] for key in ("name", "module", "distribution"))
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:  # a package above it is missing
        found = False
    if not found:
        text = "%s is not installed: %s has no module %s" % (name, sys.executable, module)
        raise UnavailableError(text, arguments["fix"])
    try:
        told: Optional[str] = version(distribution)
    except PackageNotFoundError:
        told = None
    # Keeps a user's folder of the same name off sys.path, as for every worker.
    isolated = "-P" if sys.version_info >= (3, 11) else "-I"
    command = [sys.executable, isolated, "-c", _MODULE.format(name=name, module=module)]
    return {"command": command, "version": told, "output": None, "chosen": False}


def run_tool(arguments: Mapping[str, Any], progress: Progress) -> Dict[str, Any]:
    """Run a program in "directory"; it dies with this process.

    Answers {"status", "output": the end of stdout and stderr together, "report": the text of the file "report" of that
    folder, null where there is none}. Raises UnavailableError where it does not start.
    """
    directory = arguments["directory"]
    log = os.path.join(directory, "output.log")
    report = None if arguments["report"] is None else os.path.join(directory, arguments["report"])
    if report is not None and os.path.exists(report):  # of the run before
        os.remove(report)
    with open(log, "wb") as stream:
        try:
            status = subprocess.run(
                arguments["command"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        except OSError as error:
            raise UnavailableError(
                "%s does not start: %s" % (arguments["command"][0], error.strerror),
                "Check that it is a program for this machine",
            ) from error
    with open(log, errors="replace", encoding="utf-8") as text:
        output = text.read()[-_KEPT:]
    told = None
    if report is not None and os.path.exists(report):
        with open(report, errors="replace", encoding="utf-8") as text:
            told = text.read()
    return {"status": status, "output": output, "report": told}


def write_array(path: str, name: str, array: np.ndarray) -> None:
    """Write *array* as the file that a tool reads: ``.npy``, ``.pb`` (an ONNX TensorProto) or raw values."""
    if path.endswith(".npy"):
        np.save(path, array)
        return
    with open(path, "wb") as stream:
        stream.write(tensor_proto(name, array) if path.endswith(".pb") else array.tobytes())


_ONNX_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
    "float64": 11, "uint32": 12, "uint64": 13,
}  # fmt: skip
"""TensorProto.DataType of onnx.proto."""


def tensor_proto(name: str, array: np.ndarray) -> bytes:
    """Return *array* as a serialized ONNX TensorProto called *name*; the device may have no onnx package.

    Fields of onnx.proto: dims 1, data_type 2, name 8, raw_data 9 (little endian). A test reads it with onnx.
    """
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    text = name.encode()
    parts: List[Tuple[int, bytes]] = [(8, text), (9, little.tobytes())]
    out = b"".join(b"\x08" + _varint(int(d)) for d in array.shape)
    out += b"\x10" + _varint(_ONNX_TYPES[array.dtype.name])
    return out + b"".join(
        struct.pack("B", field << 3 | 2) + _varint(len(data)) + data for field, data in parts
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
