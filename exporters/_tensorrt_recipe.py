"""What an artifact tells a device that builds its engine: ``build.json`` for portcall, ``trtexec.txt`` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple

from portcall.targets.agent.errors import BadInput, CellFailed, UnsupportedError

if TYPE_CHECKING:
    from portcall.exporters._tensorrt import Profile

BUILD = "build.json"
TRTEXEC = "trtexec.txt"
CACHE = "calibration.cache"
SCHEMA = 1
"""Of build.json. 1: onnx, precision, typed, profile."""

TYPED_SINCE = "10.0"
"""The first TensorRT whose networks take their types from the graph."""
OLDEST = "8.6"
OPSET_OF_8_6 = 17
"""Source: docs/operators.md of onnx-tensorrt 8.6."""
DEFAULT_VERSION = "10.3.0"
"""Whose calibration cache is written without an option "trt_version"."""


def version_of(text: str) -> Tuple[int, ...]:
    """Return a version's numbers. Raises BadInput for other text."""
    parts = text.split(".")
    if not 2 <= len(parts) <= 4 or not all(p.isdigit() for p in parts):
        raise BadInput(f"{text!r} is no version of TensorRT", "Write it as 8.6.1 or 10.3.0")
    return tuple(int(p) for p in parts)


def oldest_runtime(precision: str, options: Mapping[str, Any]) -> str:
    """Return the oldest TensorRT that builds this recipe.

    Raises UnsupportedError where the options "trt_version" or "min_runtime" ask for an older one.
    """
    typed = precision in ("fp16", "bf16") or options.get("float") == "fp16"
    oldest = TYPED_SINCE if typed else OLDEST
    for name in ("min_runtime", "trt_version"):
        if name in options and version_of(str(options[name])) < version_of(oldest):
            if typed:
                reason, fix = (
                    "its networks take no types from the graph",
                    "Export fp32, and give trtexec --fp16",
                )
            else:
                reason, fix = "portcall runs engines of TensorRT 8.6 and newer", f"Use {OLDEST} or newer"
            raise UnsupportedError(f"{name} {options[name]} cannot build this {precision}: {reason}", fix)
    return oldest


def cache_version(options: Mapping[str, Any]) -> Optional[str]:
    """Return the TensorRT whose calibration cache is written; None for TensorRT 11 and newer, which reads none."""
    version = str(options.get("trt_version", options.get("min_runtime", DEFAULT_VERSION)))
    return None if version_of(version) >= (11,) else version


def opset_notes(path: Path, options: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return a note where a TensorRT 8 is asked for and the ONNX file's operator set is newer than its parser's."""
    import onnx

    version = str(options.get("trt_version", options.get("min_runtime", DEFAULT_VERSION)))
    model = onnx.load(str(path), load_external_data=False)
    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version_of(version) >= (10,) or opset <= OPSET_OF_8_6:
        return ()
    return (
        f"operator set {opset}: the parser of TensorRT 8.6 is documented up to {OPSET_OF_8_6}; "
        "where it refuses the file, export the source with that operator set",
    )


def write(
    directory: Path, precision: str, profile: Profile, options: Mapping[str, Any], cache: bool
) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """Write build.json and trtexec.txt; return their names, and the note for the manifest.

    cache: whether a calibration cache lies beside them.
    """
    typed = precision in ("fp16", "bf16") or options.get("float") == "fp16"
    write_build(directory, precision, typed, profile)
    old = "trt_version" in options and version_of(str(options["trt_version"])) < version_of(TYPED_SINCE)
    lines = trtexec_lines(precision, profile, cache, typed)
    (directory / TRTEXEC).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = next(
        line for line in lines if line.startswith("trtexec") and ("--stronglyTyped" in line) != old
    )
    return (BUILD, TRTEXEC), (f"to build the engine by hand: {command}",)


def write_build(directory: Path, precision: str, typed: bool, profile: Profile) -> None:
    """Write build.json. typed: whether the graph's types have to be kept, as fp16 and bf16 need."""
    from portcall.exporters._tensorrt import profile_json

    data = {
        "schema": SCHEMA,
        "onnx": "model.onnx",
        "precision": precision,
        "typed": typed,
        "profile": profile_json(profile),
    }
    (directory / BUILD).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(directory: Path) -> Dict[str, Any]:
    """Return build.json, its "profile" as a Profile. Raises CellFailed where it is missing or of another schema."""
    from portcall.exporters._tensorrt import profile_from_json

    path = directory / BUILD
    try:
        data: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}, this portcall reads {SCHEMA}")
        return {**data, "profile": profile_from_json(data["profile"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellFailed(f"{path} cannot be used: {error}", "Export the artifact again") from error


def trtexec_lines(precision: str, profile: Profile, cache: bool, typed: bool) -> List[str]:
    """Return the lines of trtexec.txt: how each generation builds the engine, and how it is timed.

    Source: trtexec's help in TensorRT 8.6 and 10; none of the lines was run here.
    """
    shapes = _shapes(profile)
    common = [
        "--noTF32",
        *shapes,
        "--saveEngine=model.engine",
        "--timingCacheFile=timing.cache",
        "--skipInference",
    ]

    def build(*flags: str, onnx: str = "model.onnx") -> str:
        return " ".join(["trtexec", f"--onnx={onnx}", *flags, *common])

    lines = [
        "# TensorRT 10 and newer: types and Q/DQ of the graph are what is computed.",
        build("--stronglyTyped"),
    ]
    if not typed:
        flags = ["--int8"] if precision == "int8" else []
        lines += ["# TensorRT 8.6, and 10 without typed networks.", build(*flags)]
    if cache:
        lines += [
            "# TensorRT 8.6 to 10 without Q/DQ, with the model.onnx of the fp32 artifact and the cache of this one.",
            build("--int8", f"--calib={CACHE}", onnx="FP32_ARTIFACT/model.onnx"),
        ]
    best = ",".join(f"{name}:{_text(limits.opt)}" for name, limits in profile.items())
    timing = ["trtexec", "--loadEngine=model.engine", *([f"--shapes={best}"] if best else [])]
    lines += ["# Device times without copies.", " ".join([*timing, "--noDataTransfers", "--useSpinWait"])]
    return lines


def _shapes(profile: Profile) -> List[str]:
    if not profile:
        return []
    return [
        f"--{word}Shapes=" + ",".join(f"{n}:{_text(getattr(limits, word))}" for n, limits in profile.items())
        for word in ("min", "opt", "max")
    ]


def _text(shape: Tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
