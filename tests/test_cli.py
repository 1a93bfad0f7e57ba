"""The command line itself: help, versions, completion, usage errors and how every command ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from portcall import __version__
from portcall.arguments import build_parser
from portcall.cli import main

Run = Any  # the fixture of conftest.py; its type is not importable under importlib mode

HEAVY = (
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch",
    "ai_edge_litert",
    "litert_torch",
    "tqdm",
    "shtab",
)


def _commands() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    found = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


COMMANDS = _commands()


def error_of(text: str) -> dict[str, Any]:
    """Return the error of a JSON answer, after checking that it is one object of the documented form."""
    answer = json.loads(text)
    assert set(answer) == {"schema", "error"}
    assert isinstance(answer["schema"], int)
    assert set(answer["error"]) == {"kind", "message", "fix"}
    assert isinstance(answer["error"]["kind"], str) and answer["error"]["message"]
    assert answer["error"]["fix"] is None or answer["error"]["fix"]
    return dict(answer["error"])


# ------------------------------------------------------------------------------------------ help and versions


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command_has_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    example = next(line for line in shown.splitlines() if line.startswith(f"  portcall {command}"))
    words = example.split()[1:]
    if ">" in words:
        words = words[: words.index(">")]
    assert build_parser().parse_args(words).command == command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_help(command: str) -> None:
    for action in COMMANDS[command]._actions:
        if command == "completion" and action.dest == "shell":
            continue
        assert action.help, f"{command} {action.dest} has no help"


def test_the_main_help_names_every_command_and_exit_code(portcall: Run) -> None:
    shown = portcall("--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", shown.stdout, re.MULTILINE)
    for code in ("0 ", "1 ", "2 ", "4 ", "130 "):
        assert code in shown.stdout.partition("exit codes:")[2]


def test_help_loads_no_runtime_and_no_numpy() -> None:
    code = (
        "import sys; import portcall.cli; portcall.cli.build_parser().format_help(); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(portcall: Run) -> None:
    done = portcall("--version")
    assert (done.returncode, done.stdout) == (0, f"portcall {__version__}\n")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["export", "--help"], ["export"], ["nope"]])
def test_the_module_equals_the_console_script(portcall: Run, arguments: list[str]) -> None:
    script = Path(sys.executable).with_name("portcall")
    assert script.exists(), "install the project: pip install -e ."
    by_script = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    by_module = portcall(*arguments)
    assert (by_script.returncode, by_script.stdout, by_script.stderr) == (
        by_module.returncode,
        by_module.stdout,
        by_module.stderr,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_prints_a_script(portcall: Run, tmp_path: Path, shell: str) -> None:
    done = portcall("completion", shell)
    assert done.returncode == 0
    assert "portcall" in done.stdout and "export" in done.stdout and done.stderr == ""
    if shell == "bash":
        script = tmp_path / "completion"
        script.write_text(done.stdout)
        subprocess.run(["bash", "-n", str(script)], check=True)


# ------------------------------------------------------------------------------------------------ usage errors

USAGE = [
    pytest.param(["frobnicate"], "frobnicate", id="unknown command"),
    pytest.param(["doctor", "--nope"], "--nope", id="unknown option"),
    pytest.param(["doctor", "extra"], "extra", id="argument too many"),
    pytest.param(["export", "m.onnx", "-o", "out"], "--to", id="required option"),
    pytest.param(["bench"], "ARTIFACT", id="required argument"),
    pytest.param(
        ["bench", "a", "--processes", "0"], "'0' is not a positive whole number", id="zero processes"
    ),
    pytest.param(
        ["bench", "a", "--processes", "two"], "'two' is not a positive whole number", id="no integer"
    ),
    pytest.param(["bench", "a", "--threads", "-1"], "--threads", id="negative threads"),
    pytest.param(["bench", "a", "--min-time", "nan"], "'nan' is not a positive number of seconds", id="NaN"),
    pytest.param(
        ["bench", "a", "--min-time", "soon"], "'soon' is not a positive number of seconds", id="no number"
    ),
    pytest.param(
        ["bench", "a", "--max-time", "inf"], "'inf' is not a positive number of seconds", id="infinity"
    ),
    pytest.param(["completion", "fish"], "fish", id="unknown shell"),
]


@pytest.mark.parametrize(("arguments", "part"), USAGE)
def test_a_usage_error_is_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and shown.err.startswith("portcall: ")
    assert part in shown.err and "--help" in shown.err
    assert "_seconds" not in shown.err and "_count" not in shown.err


@pytest.mark.parametrize(("arguments", "part"), USAGE)
def test_a_usage_error_with_json_is_one_object(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    error = error_of(shown.out)
    assert error["kind"] == "usage" and part in error["message"]


def test_no_command_shows_the_help_and_is_an_error(portcall: Run) -> None:
    done = portcall()
    assert (done.returncode, done.stdout) == (2, "")
    assert "portcall doctor" in done.stderr and "Traceback" not in done.stderr


def test_options_are_not_guessed_from_a_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    """--js would otherwise ask for JSON in one place and not in another."""
    assert main(["doctor", "--js"]) == 2
    assert "--js" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- JSON on every kind of exit


def test_bad_input_with_json_is_one_object(portcall: Run) -> None:
    done = portcall("verify", "no-such-artifact", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    error = error_of(done.stdout)
    assert error["kind"] == "bad_input" and "no-such-artifact" in error["message"] and error["fix"]


def test_something_missing_with_json_is_one_object(portcall: Run, tiny_onnx: Path, tiny_data: Path) -> None:
    environment = {**os.environ, "PORTCALL_PYTHON_ONNXRUNTIME": "/no/such/python"}
    done = portcall(
        "calibrate", tiny_onnx, "--data", tiny_data, "-o", tiny_data.parent / "t", "--json", env=environment
    )
    assert done.returncode == 4
    error = error_of(done.stdout)
    assert error["kind"] == "unavailable" and "/no/such/python" in error["message"]
    assert "PORTCALL_PYTHON" in error["fix"]


def test_a_bug_of_ours_is_no_failed_verification(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An uncaught exception would exit with 1, which scripts read as a failed verification."""

    def broken(**_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("portcall.api.doctor", broken)
    assert main(["doctor", "--json"]) == 4
    shown = capsys.readouterr()
    error = error_of(shown.out)
    assert error["kind"] == "internal" and "ZeroDivisionError: oops" in error["message"]
    assert "Traceback" in shown.err


SLEEPY = """
import pathlib, time

def factory():
    pathlib.Path("started").touch()
    time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_with_json_is_one_object(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    command = [sys.executable, "-m", "portcall", "export", "sleepy:factory", "--to", "onnxruntime:fp32"]
    with subprocess.Popen(
        [*command, "-o", "out", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert error_of(out)["kind"] == "interrupted"
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_early_causes_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "portcall", "completion", "bash"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
