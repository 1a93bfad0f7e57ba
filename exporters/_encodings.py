"""Quantized tensors as other tools write them: TensorRT's calibration cache, AIMET's encodings for Qualcomm's
converters. Their scales are those of the Q/DQ files (``_qdq``, ``_qdq_symmetric``), bit for bit.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from portcall.targets.agent.contract import Range, Ranges
from portcall.targets.agent.errors import BadInput, UnsupportedError

QNN_VERSIONS = ("0.6.1", "1.0.0")

Encoding = Tuple[int, bool, List[float], int]
"""Bits, symmetric, the scale of the tensor or of each channel, and the offset: minus the zero point of an unsigned."""


def symmetric_scale(found: Range) -> float:
    """Return the scale of an int8 tensor with zero point 0: T / 127 as a float32, T the largest magnitude.

    Source: ``compute_scale_zp`` of ONNX Runtime, whose scale of a tensor that holds only zeros is 1.
    """
    return _float32_scale(max(-found.minimum, found.maximum, 0.0), 0.0, 127)


def asymmetric_scale(found: Range) -> Tuple[float, int]:
    """Return the scale, (maximum - minimum) / 255 as a float32, and the zero point of a uint8 tensor.

    Source: ``compute_scale_zp`` of ONNX Runtime: zero is part of the range, the zero point is rint(-minimum / scale)
    with the scale before it was rounded, and a tensor that holds only zeros has scale 1 and zero point 0.
    """
    import numpy as np

    low, high = (float(np.float32(v)) for v in (min(found.minimum, 0.0), max(found.maximum, 0.0)))
    exact = (high - low) / 255
    if exact < np.finfo(np.float32).tiny:
        return 1.0, 0
    return _float32_scale(high, low, 255), int(np.rint(-low / exact))


def _float32_scale(high: float, low: float, steps: int) -> float:
    import numpy as np

    exact = (float(np.float32(high)) - float(np.float32(low))) / steps
    return 1.0 if exact < np.finfo(np.float32).tiny else float(np.float32(exact))


def tensorrt_cache(ranges: Ranges, version: str = "10.3.0") -> str:
    """Return the text that ``IInt8EntropyCalibrator2.read_calibration_cache`` hands to TensorRT (up to version 10).

    version: of that TensorRT, which takes a cache only with its own first line (see ``cache_header``). Then a line per
    tensor: its name, a colon, a space, and the bits of its float32 scale in hexadecimal digits without leading zeros,
    as TensorRT prints them. Tensors with sentinel values get no line: TensorRT leaves what has no scale in floating
    point. Raises UnsupportedError for a name with a line break. Source: caches that TensorRT wrote, and their readers
    in NVIDIA's Model Optimizer (``import_scales_from_calib_cache``) and ONNX Runtime (``ReadDynamicRange``).
    """
    lines = [cache_header(version)]
    for name, found in ranges.items():
        if found.is_beyond_int8():
            continue
        if "\n" in name or "\r" in name:
            raise UnsupportedError(
                f"a calibration cache has a line per tensor, and the name {name!r} breaks its line",
                "Rename that tensor in the model",
            )
        (bits,) = struct.unpack(">I", struct.pack(">f", symmetric_scale(found)))
        lines.append(f"{name}: {bits:x}")
    return "\n".join(lines) + "\n"


def cache_header(version: str) -> str:
    """Return the first line of a calibration cache of TensorRT *version*: TRT-8601-EntropyCalibration2 for 8.6.1.

    Given another one TensorRT ignores the cache and calibrates again, or fails for want of data.
    The number is ``NV_TENSORRT_VERSION`` of NvInferVersion.h: major * 10000 + minor * 100 + patch, so 100300 is 10.3.0;
    up to TensorRT 9 major * 1000 + minor * 100 + patch. Raises BadInput for what is no version, UnsupportedError for
    TensorRT 11, which reads no cache.
    """
    parts = version.split(".")
    if not 2 <= len(parts) <= 4 or not all(p.isdigit() for p in parts):
        raise BadInput(f"{version!r} is no version of TensorRT", "Write it as 8.6.1 or 10.3.0")
    major, minor, patch = (int(p) for p in (*parts, "0")[:3])
    if major > 10:
        raise UnsupportedError(
            f"TensorRT {version} reads no calibration cache: it has no calibrators any more",
            "Give it the Q/DQ model",
        )
    return f"TRT-{major * (10000 if major >= 10 else 1000) + minor * 100 + patch}-EntropyCalibration2"


def read_tensorrt_cache(text: str) -> Dict[str, float]:
    """Return tensor name -> scale of a calibration cache. A name may hold colons: the last ": " ends it.

    Raises BadInput where the first line does not begin with TRT-, or a line is not a name and hexadecimal digits.
    """
    header, *lines = text.split("\n")
    if not header.startswith("TRT-"):
        raise BadInput(
            f"not a TensorRT calibration cache: it begins with {header[:40]!r}",
            "Give the file that a TensorRT calibrator wrote; its first line is like TRT-8601-EntropyCalibration2",
        )
    scales = {}
    for line in filter(None, lines):
        name, separator, bits = line.rpartition(": ")
        try:
            (scales[name],) = struct.unpack(">f", struct.pack(">I", int(bits, 16)))
        except (ValueError, struct.error) as error:
            raise BadInput(
                f"not a line of a TensorRT calibration cache: {line!r}", "Calibrate again"
            ) from error
        if not separator:
            raise BadInput(f"not a line of a TensorRT calibration cache: {line!r}", "Calibrate again")
    return scales


def qnn_encodings(
    ranges: Ranges,
    weights: Optional[Mapping[str, Tuple[Iterable[float], int]]] = None,
    version: str = "0.6.1",
) -> Dict[str, Any]:
    """Return the JSON for ``--quantization_overrides`` of Qualcomm's converters, in AIMET's format *version*.

    ranges: the activations by ONNX name; symmetric ones are int8, the others uint8. Tensors with sentinel values are
    left out. weights: name -> (the scale of every channel, the channels' axis), int8 and symmetric; neither version
    writes the axis: the converter takes the operator's output channels. A value is scale * (integer + offset) with
    integers from 0 to 255, so that offset is -zero point, -128 for int8, and min is scale * offset.
    Raises BadInput for other versions. Source: AIMET's "Encoding Format Specification", versions 0.6.1 and 1.0.0, and
    ``AffineEncoding`` in aimet_onnx, which writes both; "quantizer_args", AIMET's own settings, is left out.
    """
    activations: Dict[str, Encoding] = {}
    for name, found in ranges.items():
        if found.is_beyond_int8():
            continue
        if found.symmetric:
            activations[name] = (8, True, [symmetric_scale(found)], -128)
        else:
            scale, zero_point = asymmetric_scale(found)
            activations[name] = (8, False, [scale], -zero_point)
    parameters = {
        name: (8, True, [float(s) for s in scales], -128) for name, (scales, _) in (weights or {}).items()
    }
    return write_encodings(activations, parameters, version)


def write_encodings(
    activations: Mapping[str, Encoding], parameters: Mapping[str, Encoding], version: str = "0.6.1"
) -> Dict[str, Any]:
    """Return the JSON of ``qnn_encodings`` for tensors whose scales are known. Raises BadInput for other versions."""
    if version not in QNN_VERSIONS:
        raise BadInput(
            f"no encodings version {version!r}; there are: {', '.join(QNN_VERSIONS)}",
            "0.6.1 is what every converter since 2022 reads",
        )
    write = _encodings_1_0_0 if version == "1.0.0" else _encodings_0_6_1
    return {
        "version": version,
        "activation_encodings": write(activations, False),
        "param_encodings": write(parameters, True),
    }


def _encodings_0_6_1(tensors: Mapping[str, Encoding], per_channel: bool) -> Any:
    return {
        name: [
            {
                "bitwidth": bits,
                "dtype": "int",
                "is_symmetric": str(symmetric),
                "min": scale * offset,
                "max": scale * (2**bits - 1 + offset),
                "scale": scale,
                "offset": offset,
            }
            for scale in scales
        ]
        for name, (bits, symmetric, scales, offset) in tensors.items()
    }


def _encodings_1_0_0(tensors: Mapping[str, Encoding], per_channel: bool) -> Any:
    return [
        {
            "name": name,
            "enc_type": "PER_CHANNEL" if per_channel else "PER_TENSOR",
            "dtype": "INT",
            "bw": bits,
            "is_sym": symmetric,
            "scale": scales,
            "offset": [offset] * len(scales),
        }
        for name, (bits, symmetric, scales, offset) in tensors.items()
    ]
