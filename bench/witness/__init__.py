"""Runtimes' own benchmark tools, run on the same file beside our measurement: do both say the same?

One file per tool, ending in ``TOOL = Tool(...)``: how it is found, its command line, and how its output is read. What
runs them in pairs with our processes is ``pairs.py``.
"""

from __future__ import annotations

import importlib
from functools import cache

from portcall.bench.witness.tool import Tool

_MODULES = ("openvino", "litert", "tflite", "onnxruntime", "tensorrt", "tensorrt_rtx")


@cache
def tools_for(backend: str) -> tuple[Tool, ...]:
    """Return the tools that witness *backend*, the preferred one first; empty where there is none."""
    tools = (importlib.import_module(f"{__name__}.{name}").TOOL for name in _MODULES)
    return tuple(tool for tool in tools if tool.backend == backend)
