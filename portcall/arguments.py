"""What the command line accepts: every command, option and help text. Long: all commands are in one place."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from portcall import __version__

MODEL_HELP = "model.onnx, model.pt2, or package.module:factory (a .pt2 or a factory runs code, in a worker)"
METHOD_HELP = (
    "minmax (default), percentile[:99.99], entropy, mse, or auto: chosen per tensor on held-back samples"
)
DATA_HELP = "x.npz keyed by input name, a folder of .npy or of images (--preprocess), package.module:callable"


class Usage(Exception):
    """The command line itself cannot be read."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # "--js" must not pass for --json

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message}. See: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="portcall",
        description="Export one model to every device format, prove that it computes the same, measure its cost.",
        epilog="""examples:
  portcall doctor
  portcall export model.onnx --to onnxruntime:fp32,int8,openvino:int8 --data calibration.npz -o out
  portcall bench out/onnxruntime-fp32 out/onnxruntime-int8

exit codes: 0 all done; 1 an artifact failed verification; 2 bad input, nothing run; 3 too few samples for
--max-drop; 4 a cell failed or is unavailable; 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"portcall {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    _doctor(commands)
    _calibrate(commands)
    _merge(commands)
    _ranges(commands)
    _export(commands)
    _verify(commands)
    _inspect(commands)
    _debug(commands)
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
    parser.add_argument(
        "--options",
        action="store_true",
        help="list the options of each backend too (portcall export --option)",
    )


def _calibrate(commands: Any) -> None:
    parser = _command(
        commands,
        "calibrate",
        "run calibration data through the model once and write a calibration table",
        "portcall calibrate model.onnx --data photos --preprocess imagenet --auto -o model.pctable",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL_HELP}; with --show a finished .pctable will do"
    )
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument(
        "--auto",
        action="store_true",
        help="also choose a method per tensor, by the output error on samples held back (every tenth)",
    )
    parser.add_argument(
        "--for",
        dest="kinds",
        action="append",
        default=[],
        metavar="BACKEND",
        help="also tap the graph of this backend (tflite), or torch: the exported program",
    )
    parser.add_argument("--show", metavar="TENSOR", help="plot its histogram with the ranges of all methods")
    parser.add_argument(
        "--memory",
        type=_count,
        default=256,
        metavar="MB",
        help="for watched tensors; more of them take several passes (default 256)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="observe this part of the samples only; add up the parts with portcall merge",
    )
    parser.add_argument(
        "--subsample",
        type=_count,
        default=1,
        metavar="K",
        help="count every K-th value only (extremes stay exact)",
    )
    _equalize_option(parser)
    parser.add_argument(
        "-o", "--output", default="table.pctable", metavar="FILE", help="default: table.pctable"
    )
    _model_options(parser)


def _equalize_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--equalize",
        action="store_true",
        help="cross-layer equalization of the weights first (depthwise networks)",
    )


def _merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "add up the shards of one calibration table",
        "portcall merge part1.pctable part2.pctable -o model.pctable",
    )
    parser.add_argument("parts", nargs="+", metavar="TABLE", help="written by portcall calibrate --shard I/N")
    parser.add_argument(
        "-o", "--output", default="table.pctable", metavar="FILE", help="default: table.pctable"
    )


def _ranges(commands: Any) -> None:
    parser = _command(
        commands,
        "ranges",
        "derive ranges from a calibration table, for people or for other tools",
        "portcall ranges model.pctable --method mse --symmetric --write tensorrt-cache -o calibration.cache",
    )
    parser.add_argument("table", metavar="TABLE", help="written by portcall calibrate")
    parser.add_argument("--method", default="minmax", help=METHOD_HELP)
    parser.add_argument("--kind", default="onnx", help="of the graph: onnx (default), tflite or torch")
    parser.add_argument("--symmetric", action="store_true", help="ranges with minimum == -maximum")
    parser.add_argument(
        "--write",
        choices=["qnn", "tensorrt-cache"],
        help="QNN's quantization overrides (JSON), or the calibration cache of TensorRT 8 to 10",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="of --write")


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
    parser.add_argument("--method", default="minmax", help=METHOD_HELP)
    _recipe_options(parser)
    parser.add_argument(
        "--eval",
        dest="evaluation",
        metavar="DATA",
        help="data that parity is measured on; with labels, top-1 too",
    )
    _accuracy_options(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="new or empty folder for the artifacts"
    )
    parser.add_argument(
        "--allow-unavailable", action="store_true", help="exit 0 although a backend is not installed here"
    )
    _model_options(parser)


def _accuracy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric",
        metavar="MODULE:CALLABLE",
        help="your function of (outputs, label) instead of top-1: one number per sample, higher is better; "
        "runs code, in a worker",
    )
    parser.add_argument(
        "--max-drop",
        type=_drop,
        metavar="POINTS",
        help="fail what provably loses more against the source, in percentage points of top-1 or units of --metric; "
        "exit 3 where the samples cannot tell",
    )


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers in float: a node's name, a glob over names, or type:OPERATOR (repeatable)",
    )
    parser.add_argument(
        "--weights",
        choices=["channel", "tensor", "group32", "group64", "group128"],
        help="what shares a scale (default: channel; int4-weights: group32)",
    )
    parser.add_argument(
        "--asymmetric-weights", action="store_true", help="weights with a zero point of their own"
    )
    parser.add_argument(
        "--parity-report",
        action="store_true",
        help="compare every artifact with its source tensor by tensor, into DIR/logs/parity.json (as portcall debug)",
    )
    parser.add_argument(
        "--bias-correction",
        action="store_true",
        help="let biases make up for the mean error of rounded weights; measure whether it helps your network",
    )
    parser.add_argument(
        "--option",
        dest="options",
        type=_option,
        action="append",
        default=[],
        metavar="BACKEND.NAME=VALUE",
        help="an option of one backend, e.g. tflite.io=int8 (repeatable; portcall doctor --options lists them)",
    )
    _equalize_option(parser)


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
    _accuracy_options(parser)
    parser.add_argument("--preprocess", metavar="NAME", help="named preprocessing for a folder of images")


def _inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "show what a model or an artifact holds: layers, zeros, sparsity patterns, scales, size",
        "portcall inspect out/onnxruntime-int8",
    )
    parser.add_argument(
        "model",
        metavar="MODEL|ARTIFACT",
        help=f"an artifact folder, a bare .onnx, .tflite, .xml or .mlpackage, or {MODEL_HELP}",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="NAME=1x128",
        help="shape of an input with dynamic dimensions, for multiply-accumulates (repeatable)",
    )


def _debug(commands: Any) -> None:
    parser = _command(
        commands,
        "debug",
        "show where an artifact leaves its source: tensor by tensor, the first divergence on top",
        "portcall debug out/onnxruntime-int8",
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help="a folder written by portcall export; its source model is run"
    )
    parser.add_argument(
        "--all", action="store_true", help="list every tensor, not only the worst of each layer"
    )


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
    parser.add_argument(
        "--find-memory-limit",
        action="store_true",
        help="also find the smallest memory limit in which it still runs (Linux; needs root or a delegated cgroup)",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for bench.json and the raw samples")
    parser.add_argument(
        "--allow-unavailable", action="store_true", help="exit 0 although a backend is not installed here"
    )
    _model_options(parser)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _drop(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up, such as 0.5")
    return value


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(found[1]), int(found[2])


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+\.\w+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not BACKEND.NAME=VALUE")
    return name, value


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = text.rpartition("=")
    if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=1x128")
    return name, tuple(int(d) for d in dims.split("x"))
