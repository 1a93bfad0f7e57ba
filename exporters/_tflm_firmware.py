"""Writes the firmware folder of an artifact: the model as C, its operators, the arena, a measuring program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import List, Mapping, Sequence, Tuple

from portcall.targets.agent.contract import BoundTensor

FOLDER = "firmware"

CORES: Mapping[str, str] = {
    "cortex-m0": "-mcpu=cortex-m0 -mfloat-abi=soft",
    "cortex-m0plus": "-mcpu=cortex-m0plus -mfloat-abi=soft",
    "cortex-m3": "-mcpu=cortex-m3 -mfloat-abi=soft",
    "cortex-m4": "-mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard",
    "cortex-m7": "-mcpu=cortex-m7 -mfpu=fpv5-d16 -mfloat-abi=hard",
    "cortex-m33": "-mcpu=cortex-m33 -mfpu=fpv5-sp-d16 -mfloat-abi=hard",
    "cortex-m55": "-mcpu=cortex-m55 -mfloat-abi=hard",
}
"""Core -> the compiler's flags for it (M7: with a double-precision unit; its smaller ones need fpv5-sp-d16)."""


@dataclass(frozen=True)
class Firmware:
    """What the firmware is generated from. arena_bytes: with its margin. input_bytes: of all inputs together."""

    model: bytes
    methods: Sequence[str]
    core: str
    arena_bytes: int
    arena_comment: Sequence[str]
    input_bytes: int
    inputs: Sequence[BoundTensor]
    outputs: Sequence[BoundTensor]


def write(firmware: Firmware, directory: Path) -> Tuple[str, ...]:
    """Write ``firmware/`` into *directory*; return the files' names relative to *directory*."""
    from portcall.exporters import _tflm_sources as sources

    texts = {
        "CMakeLists.txt": _for_core(sources.CMAKE, firmware.core, "set(FLAGS_%s %s)"),
        "Makefile": _for_core(sources.MAKEFILE, firmware.core, "FLAGS_%s := %s"),
        "main.cc": sources.MAIN_CC,
        "model_data.cc": _model_source(firmware.model),
        "model_data.h": _MODEL_H,
        "op_resolver.h": _resolver(firmware.methods),
        "port.cc": sources.PORT_CC,
        "port.h": sources.PORT_H,
        "portcall_config.h": _config(firmware),
        "protocol.cc": sources.PROTOCOL_CC,
        "protocol.h": sources.PROTOCOL_H,
    }
    (directory / FOLDER).mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / FOLDER / name).write_text(text)
    return tuple(f"{FOLDER}/{name}" for name in texts)


_MODEL_H = """#ifndef PORTCALL_MODEL_DATA_H_
#define PORTCALL_MODEL_DATA_H_

#include <cstddef>

extern const unsigned char portcall_model[];
extern const size_t portcall_model_bytes;

#endif  // PORTCALL_MODEL_DATA_H_
"""


def _model_source(model: bytes) -> str:
    lines: List[str] = [
        "// The flatbuffer model.tflite. Aligned to 16: TensorFlow Lite Micro reads weights in place.",
        '#include "model_data.h"',
        "",
        "alignas(16) const unsigned char portcall_model[] = {",
    ]
    for start in range(0, len(model), 20):
        lines.append("    " + ",".join(str(byte) for byte in model[start : start + 20]) + ",")
    return "\n".join([*lines, "};", f"const size_t portcall_model_bytes = {len(model)};", ""])


def _resolver(methods: Sequence[str]) -> str:
    calls = "\n         ".join(f"&& static_cast<int>(resolver.{name}()) == 0" for name in methods)
    return f"""// Registers the operators of model.tflite and no others: the linker drops the kernels of the rest.
#ifndef PORTCALL_OP_RESOLVER_H_
#define PORTCALL_OP_RESOLVER_H_

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

namespace tflite {{
namespace micro {{}}
}}  // namespace tflite

namespace portcall_names {{  // TFLM has been moving its own names from tflite into tflite::micro
using namespace tflite;
using namespace tflite::micro;
using Resolver = MicroMutableOpResolver<{len(methods)}>;
}}  // namespace portcall_names

using PortcallOpResolver = portcall_names::Resolver;

inline bool portcall_register_ops(PortcallOpResolver& resolver) {{
  return true
         {calls};
}}

#endif  // PORTCALL_OP_RESOLVER_H_
"""


def _config(firmware: Firmware) -> str:
    comment = "\n".join(f"// {line}" for line in firmware.arena_comment)
    tensors = "\n".join(
        f"//   {end} {index}: {_described(tensor)}"
        for end, found in (("input", firmware.inputs), ("output", firmware.outputs))
        for index, tensor in enumerate(found)
    )
    return f"""#ifndef PORTCALL_CONFIG_H_
#define PORTCALL_CONFIG_H_

{comment}
#ifndef PORTCALL_ARENA_BYTES
#define PORTCALL_ARENA_BYTES {firmware.arena_bytes}
#endif

// The inputs together: the measuring program keeps a copy, since an inference may overwrite them.
#define PORTCALL_INPUT_BYTES {firmware.input_bytes}

{tensors}

#endif  // PORTCALL_CONFIG_H_
"""


def _described(tensor: BoundTensor) -> str:
    shape = "x".join(str(d) for d in tensor.shape)
    scaled = f", scale {tensor.scale!r}, zero point {tensor.zero_point}" if tensor.scale is not None else ""
    name = tensor.source.encode("unicode_escape").decode().rstrip("\\")  # no line ends, no continued comment
    return f"{name} {tensor.dtype}[{shape}]{scaled}"


def _for_core(text: str, core: str, line: str) -> str:
    flags = "\n".join(line % entry for entry in CORES.items())
    return text.replace("@FLAGS@", flags).replace("@CORES@", ", ".join(CORES)).replace("@CORE@", core)
