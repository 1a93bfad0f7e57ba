"""What the command line accepts: every command, option and help text. Long: all commands are in one place."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from portcall import __version__
from portcall.runner_options import add_runner_options

MODEL_HELP = "model.onnx, model.pt2, or package.module:factory (a .pt2 or a factory runs code, in a worker)"
METHOD_HELP = (
    "minmax (default), percentile[:99.99], entropy, mse, or auto: chosen per tensor on held-back samples"
)
DATA_HELP = "x.npz keyed by input name, a folder of .npy or of images (--preprocess), package.module:callable"
FORMATS = (
    "html", "json", "google-benchmark", "optimum-benchmark", "bencher", "github-action-benchmark", "csv", "parquet",
    "plot-ecdf", "plot-series", "plot-tradeoff",
)  # fmt: skip
"""Names of ``portcall.bench.formats.FORMATS``, which this module may not import: help must load no numpy."""


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

exit codes: 0 all done; 1 an artifact failed verification or a budget, or compare found a regression; 2 bad input,
nothing run; 3 undecided (compare, or too few samples for --max-drop); 4 a cell failed or is unavailable;
130 interrupted""",
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
    _report(commands)
    _compare(commands)
    _profile(commands)
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
        "--processes",
        type=_count,
        metavar="N",
        help="fresh processes each (default 5; --mode sustained: 1)",
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
    add_runner_options(parser)
    parser.add_argument(
        "--witness",
        action="store_true",
        help="also run the runtime's own benchmark tool on the same file, in pairs with our processes",
    )
    parser.add_argument(
        "--witness-pairs", type=_count, default=10, metavar="N", help="pairs of --witness (default 10)"
    )
    parser.add_argument(
        "--find-memory-limit",
        action="store_true",
        help="also find the smallest memory limit in which it still runs (Linux; needs root or a delegated cgroup)",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for bench.json and the raw samples")
    parser.add_argument(
        "--write",
        type=_write,
        action="append",
        default=[],
        metavar="FORMAT=FILE",
        help="also write the results as portcall report does, e.g. html=bench.html (repeatable)",
    )
    parser.add_argument(
        "--allow-unavailable", action="store_true", help="exit 0 although a backend is not installed here"
    )
    _mode_options(parser)
    _placement_options(parser)
    _model_options(parser)


def _report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        "write what bench -o saved as HTML, plots, raw samples or another tool's format",
        "portcall report bench --to google-benchmark -o bench/google.json",
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="DIR|FILE",
        help="folders that portcall bench -o wrote, or files of what portcall bench --json printed",
    )
    parser.add_argument("--to", default="html", metavar="FORMAT", help=f"{', '.join(FORMATS)} (default html)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="what to write: a plot ends in .svg or .png; optimum-benchmark writes a new folder",
    )


def _write(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not FORMAT=FILE, such as html=bench.html")
    return name, path


def _mode_options(parser: argparse.ArgumentParser) -> None:
    """Add --mode and the options of single modes; those are None where not given."""
    parser.add_argument(
        "--mode",
        choices=["latency", "throughput", "cold", "sustained", "arrival"],
        default="latency",
        help="what to measure (default: latency)",
    )
    parser.add_argument(
        "--batches", type=_counts, metavar="N,N", help="throughput: batch sizes (default 1,2,4,8)"
    )
    parser.add_argument(
        "--streams",
        type=_counts,
        metavar="N,N",
        help="throughput: requests in flight at a time, --threads each (default 1,2,4,... to the CPUs)",
    )
    parser.add_argument(
        "--page-cache",
        type=_words,
        metavar="STATE,STATE",
        help="cold: warm, artifact (its files dropped), runtime (its libraries too), system (everything, as root); "
        "default warm,artifact",
    )
    parser.add_argument(
        "--duration",
        type=_seconds,
        metavar="S",
        help="per process; sustained: default 120 s, arrival: default 10 s",
    )
    parser.add_argument("--window", type=_seconds, metavar="S", help="sustained: default 5 s")
    parser.add_argument("--rate", type=_rate, metavar="R", help="arrival: requests per second")
    parser.add_argument("--seed", type=_seed, metavar="N", help="arrival: of the arrival times (default 0)")


def _compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "tell whether CANDIDATE is slower than BASE: fresh processes in pairs until the verdict is clear",
        "portcall compare out/onnxruntime-int8 new/onnxruntime-int8 --max-time 20",
    )
    sides = (
        "an artifact folder or a bare file (@ENV behind it: run by that environment of portcall.toml), "
        "or what bench -o saved"
    )
    parser.add_argument("base", metavar="BASE", help=sides)
    parser.add_argument("candidate", metavar="CANDIDATE", help="the same; the ratio is candidate / base")
    parser.add_argument("--on", default="local", metavar="TARGET", help="default: local")
    parser.add_argument(
        "--metric",
        default="p50",
        choices=["p50", "p95", "p99", "cpu", "memory"],
        help="whose verdict is the top one (default: p50 of wall time)",
    )
    parser.add_argument(
        "--margin", type=_share, default=0.03, metavar="3%", help="what counts as no change (default 3%%)"
    )
    parser.add_argument(
        "--max-time", type=_seconds, default=60.0, metavar="S", help="end undecided after this (default 60 s)"
    )
    parser.add_argument("--data", help=f"inputs: {DATA_HELP}")
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="of the runtime (default 1)")
    parser.add_argument(
        "--batch", type=_count, default=1, metavar="N", help="samples per inference (default 1)"
    )
    _model_options(parser)


def _share(text: str) -> float:
    """Return "3%" or "0.03" as a fraction."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 3%")
    return value


def _placement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-placement",
        type=_placement,
        action="append",
        default=[],
        metavar="SHARE",
        help="95%% or operators=95%%: fail (exit 1) what runs fewer of its operators on the intended unit; "
        "time=95%%: less of its time (repeatable)",
    )
    parser.add_argument(
        "--no-placement", action="store_true", help="leave out the profiled process that tells the placement"
    )


def _profile(commands: Any) -> None:
    parser = _command(
        commands,
        "profile",
        "show what each operator takes, which kernel and unit runs it, and the source's layers",
        "portcall profile out/tflite-int8 --top 10 -o profile",
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT|FILE", help="an artifact folder, or a bare .onnx, .tflite, .xml file"
    )
    parser.add_argument("--on", default="local", metavar="TARGET", help="default: local")
    parser.add_argument("--data", help=f"inputs: {DATA_HELP}")
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="of the runtime (default 1)")
    parser.add_argument(
        "--batch", type=_count, default=1, metavar="N", help="samples per inference (default 1)"
    )
    parser.add_argument(
        "--min-time", type=_seconds, default=1.0, metavar="S", help="timed and profiled, each (default 1 s)"
    )
    parser.add_argument("--top", type=_count, default=20, metavar="N", help="operators shown (default 20)")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder for profile.json, profile.svg and profile.png"
    )
    _model_options(parser)


def _placement(text: str) -> tuple[str, float]:
    word, _, share = text.rpartition("=")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", share)
    if word not in ("", "operators", "time") or found is None or float(found[1]) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not 95%, operators=95% or time=95%")
    return word or "operators", float(found[1]) / 100


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


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part.strip()) for part in text.split(",")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of requests per second")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


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
