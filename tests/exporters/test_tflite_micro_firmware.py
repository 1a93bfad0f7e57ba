"""The generated firmware: it compiles for Cortex-M, and its line protocol works around a stand-in of the model.

It is compiled against declarations written from TFLM's public API (tests/exporters/tflm_api), so that linking with the
real library is unproven. The stand-in is no network; the emulated board proves the protocol, never a time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from portcall.exporters import _tflm_firmware, _tflm_model, tflite_micro
from tests.exporters.contract import Exports

BACKENDS = ("tflite_micro",)
API = Path(__file__).parent / "tflm_api"
STANDIN = API / "standin"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
FREESTANDING = ("protocol.cc", "port.cc", "model_data.cc")
"""What needs nothing of TFLM."""

ARM = "arm-none-eabi-g++"


def need(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed; fix: apt-get install {package}")


@pytest.fixture(scope="module")
def artifact(exports: Exports) -> Path:
    return exports.artifact("image", "tflite_micro", "int8")


@pytest.fixture
def firmware(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact / "firmware", tmp_path / "firmware")


def run(*command: object, cwd: Path | None = None, text: str = "") -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def need_arm() -> None:
    need(ARM, "gcc-arm-none-eabi libnewlib-arm-none-eabi libstdc++-arm-none-eabi-newlib")


# what is written


def test_the_resolver_registers_exactly_the_operators_of_the_model(artifact: Path) -> None:
    operators = json.loads((artifact / "memory.json").read_text())["operators"]
    text = (artifact / "firmware" / "op_resolver.h").read_text()
    called = re.findall(r"resolver\.(Add\w+)\(\)", text)
    assert called == [_tflm_model.METHODS[name] for name in operators]
    assert f"MicroMutableOpResolver<{len(operators)}>" in text


def test_the_model_as_c_is_the_flatbuffer_byte_for_byte(artifact: Path) -> None:
    text = (artifact / "firmware" / "model_data.cc").read_text()
    body = text.partition("= {")[2].partition("};")[0]
    model = (artifact / "model.tflite").read_bytes()
    assert bytes(int(n) for n in body.replace("\n", "").split(",") if n.strip()) == model
    assert "alignas(16) const" in text and f"portcall_model_bytes = {len(model)};" in text


def test_the_same_export_writes_the_same_firmware(exports: Exports, tmp_path: Path) -> None:
    fp32 = exports.artifact("image", "tflite_micro", "fp32") / "firmware"
    int8 = exports.artifact("image", "tflite_micro", "int8") / "firmware"
    for name in ("protocol.cc", "protocol.h", "port.cc", "port.h", "main.cc", "Makefile", "CMakeLists.txt"):
        assert (fp32 / name).read_bytes() == (int8 / name).read_bytes()


def test_cores_of_the_option_are_those_of_the_build_files() -> None:
    assert tflite_micro.OPTIONS["core"].choices == tuple(_tflm_firmware.CORES)
    assert tflite_micro.CORE in _tflm_firmware.CORES


# compiling (declarations only: linking with TFLM is unproven)


ARCHITECTURES = {
    "cortex-m0": "v6S-M",
    "cortex-m0plus": "v6S-M",
    "cortex-m3": "v7",
    "cortex-m4": "v7E-M",
    "cortex-m7": "v7E-M",
    "cortex-m33": "v8-M.mainline",
    "cortex-m55": "v8.1-M.mainline",
}


@pytest.mark.parametrize("core", _tflm_firmware.CORES)
def test_make_compiles_without_a_warning(firmware: Path, core: str) -> None:
    need_arm()
    need("make", "make")
    run("make", "objects", f"CORE={core}", f"TFLM_ROOT={API}", "CXXFLAGS=-Werror", cwd=firmware)
    objects = sorted(p.name for p in (firmware / "build").iterdir())
    assert objects == ["main.o", "model_data.o", "port.o", "protocol.o"]
    attributes = run("arm-none-eabi-readelf", "-A", firmware / "build" / "main.o")
    assert f"Tag_CPU_arch: {ARCHITECTURES[core]}\n" in attributes
    undefined = run("arm-none-eabi-nm", "-uC", firmware / "build" / "main.o")
    assert "tflite::MicroInterpreter::Invoke" in undefined
    for name in ("model_data.o", "port.o", "protocol.o"):
        assert "tflite" not in run("arm-none-eabi-nm", "-C", firmware / "build" / name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("CORE=cortex-a7", "TFLM_ROOT=x"), "CORE is cortex-a7; it takes: cortex-m0"),
        ((), "TFLM_ROOT is not set"),
    ],
)
def test_make_says_what_is_missing(firmware: Path, arguments: tuple[str, ...], reason: str) -> None:
    need("make", "make")
    done = subprocess.run(
        ["make", "objects", *arguments], cwd=firmware, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and reason in done.stderr


def test_cmake_compiles_without_a_warning(firmware: Path) -> None:
    need_arm()
    need("cmake", "cmake")
    run(
        *("cmake", "-S", ".", "-B", "out", "-DCMAKE_SYSTEM_NAME=Generic", f"-DCMAKE_CXX_COMPILER={ARM}"),
        *("-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY", "-DCMAKE_CXX_FLAGS=-Werror"),
        *(f"-DTFLM_ROOT={API}", "-DCORE=cortex-m55"),
        cwd=firmware,
    )
    run("cmake", "--build", "out", cwd=firmware)
    assert len(list((firmware / "out").rglob("*.obj"))) == 4


def test_names_in_either_namespace_compile(firmware: Path, tmp_path: Path) -> None:
    """TFLM moves its names from tflite into tflite::micro: the same sources take both."""
    need_arm()
    moved = shutil.copytree(API, tmp_path / "api")
    for name in ("micro_op_resolver.h", "micro_mutable_op_resolver.h"):
        header = moved / "tensorflow" / "lite" / "micro" / name
        text = header.read_text().replace(
            "namespace tflite {\n", "namespace tflite {\nnamespace micro {\n", 1
        )
        header.write_text(text.replace("}  // namespace tflite\n", "}\n}  // namespace tflite\n"))
    interpreter = moved / "tensorflow" / "lite" / "micro" / "micro_interpreter.h"
    first = "class MicroResourceVariables"
    text = interpreter.read_text().replace(first, "namespace micro {\n" + first)
    interpreter.write_text(text.replace("}  // namespace tflite\n", "}\n}  // namespace tflite\n"))
    run("make", "objects", f"TFLM_ROOT={moved}", "CXXFLAGS=-Werror", cwd=firmware)
    assert "tflite::micro::MicroInterpreter::Invoke" in run(
        "arm-none-eabi-nm", "-uC", firmware / "build" / "main.o"
    )


# the protocol around a stand-in


@pytest.fixture
def native(firmware: Path) -> Path:
    """The protocol, the timer and the model's bytes around the stand-in, for this machine, with sanitizers."""
    need("g++", "g++")
    program = firmware / "native"
    sources = [*FREESTANDING, STANDIN / "main.cc"]
    run(
        "g++",
        "-std=c++17",
        *WARNINGS,
        "-fsanitize=address,undefined",
        "-I.",
        *sources,
        "-o",
        program,
        cwd=firmware,
    )
    return program


EXPECTED = bytes([(1 ^ 0x5A) + 4, (2 ^ 0x5A) + 5, (3 ^ 0x5A) + 6, *[0x5A] * 97])
SESSION = (
    "info\ninput 0 0 01\ninput 0 1 0203\ninput 1 0 040506\nrun 3\noutput 0\noutput 0 98 2\ncrc 0\nquit\n"
)


def check_session(printed: str, artifact: Path) -> list[int]:
    """Check what the stand-in answers to SESSION; return the ticks."""
    model = (artifact / "model.tflite").read_bytes()
    lines = printed.splitlines()
    assert (
        f"model_bytes={len(model)} model_crc32={zlib.crc32(model):08x} arena=5000 arena_used=4321" in lines[0]
    )
    assert lines[1:5] == ["input 0 bytes=100", "input 1 bytes=3", "output 0 bytes=100", "ok"]
    ticks = [int(line.split()[1]) for line in lines if line.startswith("ticks ")]
    assert len(ticks) == 3
    found = {
        int(at): bytes.fromhex(data) for at, data in re.findall(r"^output 0 (\d+) (\w+)$", printed, re.M)
    }
    assert found[0] + found[64] == EXPECTED and found[98] == EXPECTED[98:]
    assert f"crc 0 {zlib.crc32(EXPECTED):08x}" in lines
    assert lines.count("ok") == 9 and lines[-1] == "ok" and "error" not in printed
    return ticks


def test_the_protocol_answers_and_restores_inputs_that_an_inference_destroys(
    native: Path, artifact: Path
) -> None:
    check_session(run(native, text=SESSION), artifact)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "unknown command"),
        ("input 0 99 0000", "outside the input"),
        ("input 0 4294967296 00", "outside the input"),
        ("input 2 0 00", "no such input"),
        ("input 4294967296 0 00", "no such input"),
        ("input 0 0 0g", "not hexadecimal"),
        ("input 0 0 000", "half a byte"),
        ("input 0", "write: input I OFFSET HEX"),
        ("input 0 0", "write: input I OFFSET HEX"),
        ("run", "write: run N"),
        ("run 0", "write: run N"),
        ("run -1", "write: run N"),
        ("output 1", "no such output"),
        ("output 0 99 2", "outside the output"),
        ("output 0 101 0", "outside the output"),
        ("crc", "write: crc I"),
        ("crc 7", "no such output"),
    ],
)
def test_a_wrong_line_is_an_error_and_the_next_one_still_works(native: Path, line: str, reason: str) -> None:
    answers = run(native, text=f"{line}\n\nrun 1\n").splitlines()
    assert answers[0].startswith("error ") and reason in answers[0]
    assert answers[1].startswith("ticks ") and answers[2] == "ok"


def test_an_inference_that_fails_is_said(native: Path) -> None:
    answers = run(native, text="input 0 99 ee\nrun 2\nquit\n").splitlines()
    assert answers == ["ok", "error the inference failed", "ok"]


def test_a_long_line_breaks_nothing(native: Path) -> None:
    answers = run(native, text=f"input 0 0 {'00' * 1000}\nrun 1\n").splitlines()
    assert answers[0].startswith("error outside the input")
    assert answers[-2].startswith("ticks ") and answers[-1] == "ok"


TIMER = """
#include "port.h"
uint32_t portcall_ticks() { static uint32_t now = 0xfffffff0u; return now += 13; }
uint32_t portcall_ticks_per_second() { return 13; }
"""


def test_a_boards_own_timer_replaces_the_default_and_may_wrap(firmware: Path, artifact: Path) -> None:
    need("g++", "g++")
    (firmware / "timer.cc").write_text(TIMER)
    sources = [*FREESTANDING, "timer.cc", STANDIN / "main.cc"]
    run("g++", "-std=c++17", *WARNINGS, "-I.", *sources, "-o", "timed", cwd=firmware)
    printed = run(firmware / "timed", text=SESSION)
    assert check_session(printed, artifact) == [13, 13, 13] and "ticks_per_second=13\n" in printed


def test_the_protocol_runs_on_an_emulated_cortex_m3(firmware: Path, artifact: Path) -> None:
    """Linked with newlib and semihosting, around the stand-in: an emulation, which measures nothing."""
    need_arm()
    need("qemu-system-arm", "qemu-system-arm")
    flags = ("-mcpu=cortex-m3", "-mthumb", "-Os", *WARNINGS)
    run("arm-none-eabi-gcc", "-c", *flags, STANDIN / "startup.c", "-o", "startup.o", cwd=firmware)
    linked = ("startup.o", "--specs=rdimon.specs", "-T", STANDIN / "board.ld", "-o", "board.elf")
    compiled = ("-std=c++17", "-fno-exceptions", "-fno-rtti", "-I.", *FREESTANDING, STANDIN / "main.cc")
    run(ARM, *flags, *compiled, *linked, cwd=firmware)
    board = ("-M", "mps2-an385", "-nographic", "-monitor", "none", "-serial", "none")
    semihosting = ("-semihosting-config", "enable=on,target=native")
    printed = run("qemu-system-arm", *board, *semihosting, "-kernel", firmware / "board.elf", text=SESSION)
    check_session(printed, artifact)
