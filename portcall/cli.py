"""The command line. It parses, calls ``portcall.api``, prints a table or one JSON object, and exits with a code."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from portcall import __version__

OK, FAILED_VERIFICATION, BAD_INPUT, CELL_FAILED, INTERRUPTED = 0, 1, 2, 4, 130
PORTCALL_SCHEMA = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MODEL_HELP = "model.onnx, model.pt2, or package.module:factory (a .pt2 or a factory runs code, in a worker)"
DATA_HELP = "x.npz keyed by input name, a folder of .npy, a folder of images (with --preprocess), package.module:callable"


class _Usage(Exception):
    """The command line itself cannot be read."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # "--js" must not pass for --json

    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{message}. See: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="portcall",
        description="Export one model to every device format, prove that it computes the same, measure its cost.",
        epilog="""examples:
  portcall doctor
  portcall export model.onnx --to onnxruntime:fp32,int8,openvino:int8 --data calibration.npz -o out
  portcall bench out/onnxruntime-fp32 out/onnxruntime-int8

exit codes: 0 all done; 1 an artifact failed verification; 2 bad input, nothing run; 4 a cell failed or is
unavailable; 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"portcall {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _doctor(commands)
    _calibrate(commands)
    _export(commands)
    _verify(commands)
    _bench(commands)
    completion = _command(
        commands,
        "completion",
        "print a shell completion script",
        "portcall completion bash > ~/.local/share/bash-completion/completions/portcall",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _command(commands: Any, name: str, help_text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name != "completion":
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        parser.add_argument(
            "--timeout", type=_seconds, default=1800.0, metavar="S", help="for each worker (default 1800 s)"
        )
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preprocess", metavar="NAME", help="named preprocessing for a folder of images")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="NAME=1x128",
        help="shape of an input with dynamic dimensions (repeatable)",
    )


def _doctor(commands: Any) -> None:
    parser = _command(
        commands, "doctor", "show what can be exported and run here, with reason and fix", "portcall doctor"
    )
    parser.set_defaults(run=_run_doctor)


def _calibrate(commands: Any) -> None:
    parser = _command(
        commands,
        "calibrate",
        "run calibration data through the model and write a calibration table",
        "portcall calibrate model.onnx --data photos --preprocess imagenet -o model.pctable",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument(
        "--for",
        dest="kinds",
        action="append",
        default=[],
        metavar="BACKEND",
        help="also tap the graph of this backend (tflite)",
    )
    parser.add_argument(
        "-o", "--output", default="table.pctable", metavar="FILE", help="default: table.pctable"
    )
    _model_options(parser)
    parser.set_defaults(run=_run_calibrate)


def _export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "export to backends and precisions, and verify each against the source",
        "portcall export package.module:factory --to onnxruntime:fp32,int8,tflite:int8 --data calib.npz -o out",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--to",
        action="append",
        required=True,
        metavar="BACKEND:PRECISION[,...]",
        help="repeatable; BACKEND:all means all its precisions",
    )
    parser.add_argument("--data", help=f"calibration data: {DATA_HELP}")
    parser.add_argument("--table", metavar="FILE", help="ranges from this table instead of --data")
    parser.add_argument("--method", default="minmax", help="how ranges are derived (default minmax)")
    parser.add_argument(
        "--eval",
        dest="evaluation",
        metavar="DATA",
        help="data that parity is measured on; with labels, top-1 too",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="new or empty folder for the artifacts"
    )
    parser.add_argument(
        "--allow-unavailable", action="store_true", help="exit 0 although a backend is not installed here"
    )
    _model_options(parser)
    parser.set_defaults(run=_run_export)


def _verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "check an artifact's files, and its outputs against the source's",
        "portcall verify out/onnxruntime-int8 --eval test.npz",
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help="a folder written by portcall export; nothing in it is executed"
    )
    parser.add_argument(
        "--eval", dest="evaluation", metavar="DATA", help="run the source model too, on this data"
    )
    parser.add_argument("--preprocess", metavar="NAME", help="named preprocessing for a folder of images")
    parser.set_defaults(run=_run_verify)


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "measure latency and memory, a fresh process per run",
        "portcall bench out/onnxruntime-int8 model.tflite --processes 10",
    )
    parser.add_argument(
        "artifacts",
        nargs="+",
        metavar="ARTIFACT|FILE",
        help="artifact folders, or bare .onnx, .tflite, .xml files",
    )
    parser.add_argument("--on", default="local", metavar="TARGET", help="default: local")
    parser.add_argument("--data", help=f"inputs: {DATA_HELP}")
    parser.add_argument(
        "--processes", type=_count, default=5, metavar="N", help="fresh processes each (default 5)"
    )
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="of the runtime (default 1)")
    parser.add_argument(
        "--batch", type=_count, default=1, metavar="N", help="samples per inference (default 1)"
    )
    parser.add_argument(
        "--min-time", type=_seconds, default=1.0, metavar="S", help="timed per process (default 1 s)"
    )
    parser.add_argument(
        "--max-time",
        type=_seconds,
        metavar="S",
        help="cap per artifact over all processes, start-up included",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for bench.json and the raw samples")
    parser.add_argument(
        "--allow-unavailable", action="store_true", help="exit 0 although a backend is not installed here"
    )
    _model_options(parser)
    parser.set_defaults(run=_run_bench)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = text.rpartition("=")
    if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=1x128")
    return name, tuple(int(d) for d in dims.split("x"))


def _run_doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import doctor_table

    answer = api.doctor(timeout_s=options.timeout)
    return answer, doctor_table(answer["backends"], answer["targets"]), OK


def _run_calibrate(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.progress import Reporter

    answer = api.calibrate(
        options.model,
        options.data,
        options.output,
        kinds=options.kinds,
        preprocess=options.preprocess,
        shapes=dict(options.shape),
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    lines = [f"{s['kind']}: {s['tensors']} tensors, n={s['n']}" for s in answer["sections"]]
    return answer, "\n".join([f"wrote {answer['table']}", *lines]), OK


def _run_export(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import export_table
    from portcall.progress import Reporter

    answer = api.export(
        options.model,
        options.to,
        options.output,
        data=options.data,
        evaluation=options.evaluation,
        table=options.table,
        method=options.method,
        preprocess=options.preprocess,
        shapes=dict(options.shape),
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    return answer, export_table(answer["results"]), _code(answer["results"], options.allow_unavailable)


def _run_verify(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import export_table
    from portcall.progress import Reporter

    answer = api.verify(
        options.artifact,
        evaluation=options.evaluation,
        preprocess=options.preprocess,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    outcome = answer["results"][0]["outcome"]
    code = {"artifact": OK, "failed": FAILED_VERIFICATION}.get(outcome, CELL_FAILED)
    return answer, export_table(answer["results"]), code


def _run_bench(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import bench_table
    from portcall.core import Workload
    from portcall.progress import Reporter

    workload = Workload(
        batch=options.batch,
        threads=options.threads,
        processes=options.processes,
        min_time_s=options.min_time,
        max_time_s=options.max_time,
        shapes=dict(options.shape),
    )
    answer = api.benchmark(
        options.artifacts,
        target=options.on,
        workload=workload,
        data=options.data,
        preprocess=options.preprocess,
        output=options.output,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    return answer, bench_table(answer["results"]), _code(answer["results"], options.allow_unavailable)


def _code(results: Sequence[dict[str, Any]], allow_unavailable: bool) -> int:
    """Return the exit code of a matrix: 0 if every cell ended in an artifact or a measurement."""
    if any(r["error_kind"] == "verification" for r in results):
        return FAILED_VERIFICATION
    good = {"artifact", "measurement"} | ({"unavailable"} if allow_unavailable else set())
    return OK if all(r["outcome"] in good for r in results) else CELL_FAILED


def _print(text: str) -> None:
    """Print to stdout; a reader that has gone (``portcall doctor | head -1``) changes no exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(kind: str, message: str, fix: str, as_json: bool) -> None:
    if as_json:
        error = {"kind": kind, "message": message, "fix": fix or None}
        _print(json.dumps({"schema": PORTCALL_SCHEMA, "error": error}, indent=2))
    else:
        print(f"portcall: {message}" + (f"\n  {fix}" if fix else ""), file=sys.stderr)


def _interrupt(signum: int, frame: object) -> None:
    """End the running worker; its caller then raises, where it can tidy up. Raise at once where there is none."""
    worker = sys.modules.get("portcall.worker")
    if (
        worker is None or not getattr(worker, "interrupt_all", bool)()
    ):  # bool: the module is only half imported
        raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        for number in SIGNALS:
            signal.signal(number, _interrupt)
        return _dispatch(given, as_json)
    except KeyboardInterrupt:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # CPython ends with -2, not 130, if the interrupt fell into an exec of text (a dataclass being made, say),
        # caught or not; the next exec clears that note (_Py_UnhandledKeyboardInterrupt in pythonrun.c).
        exec("")
        _print_error("interrupted", "interrupted; nothing half-written was left behind", "", as_json)
        return INTERRUPTED
    except OSError as error:  # a full or read-only disk, where no cell can be blamed
        place = f" {error.filename}" if error.filename else ""
        message = f"cannot read or write{place}: {error.strerror or error}"
        fix = "Free space there, or choose another place (-o, TMPDIR, PORTCALL_CACHE)"
        _print_error("failed", message, fix, as_json)
        return CELL_FAILED
    except Exception as error:  # a bug of ours: exit code 1 would say that an artifact failed verification
        traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {error}"
        _print_error("internal", message, "Report it with the traceback above", as_json)
        return CELL_FAILED


def _dispatch(given: list[str], as_json: bool) -> int:
    from portcall.targets.agent.errors import BadInput, PortcallError

    parser = build_parser()
    try:
        options = parser.parse_args(given)
    except _Usage as error:
        _print_error("usage", str(error), "", as_json)
        return BAD_INPUT
    if options.command is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    if options.command == "completion":
        import shtab

        _print(shtab.complete(parser, shell=options.shell))
        return OK
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str, int]] = options.run
    try:
        answer, text, code = run(options)
    except BadInput as error:
        _print_error(error.kind, error.message, error.fix, as_json)
        return BAD_INPUT
    except PortcallError as error:
        _print_error(error.kind, error.message, error.fix, as_json)
        return CELL_FAILED
    _print(json.dumps(answer, indent=2) if as_json else text)
    return code
