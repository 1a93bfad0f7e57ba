"""The command line. It parses, calls ``portcall.api``, prints a table or one JSON object, and exits with a code.

Long because every command has its function here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from portcall.arguments import Usage, build_parser

OK, FAILED_VERIFICATION, BAD_INPUT, INCONCLUSIVE, CELL_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
PORTCALL_SCHEMA = 1
VERDICTS = {
    "unchanged": OK,
    "improved": OK,
    "regressed": FAILED_VERIFICATION,
    "inconclusive": INCONCLUSIVE,
    "incomparable": INCONCLUSIVE,
}
"""The exit code of each verdict of ``compare``."""
INTERRUPTED_TEXT = "interrupted; nothing half-written was left behind"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _run_doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import doctor_table

    answer = api.doctor(timeout_s=options.timeout)
    return answer, doctor_table(answer, options.options), OK


def _run_calibrate(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.calibration.report import calibration_lines
    from portcall.progress import Reporter

    if options.data is None:
        if options.show is None:
            raise Usage("the following arguments are required: --data. See: portcall calibrate --help")
        return _shown(options.model, options.show)
    answer = api.calibrate(
        options.model,
        options.data,
        options.output,
        auto=options.auto,
        kinds=options.kinds,
        memory_bytes=options.memory << 20,
        shard=options.shard,
        subsample=options.subsample,
        equalize=options.equalize,
        preprocess=options.preprocess,
        shapes=dict(options.shape),
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    text = "\n".join([f"wrote {answer['table']}", *calibration_lines(answer["sections"])])
    if options.show is not None:
        answer["show"], plot, _ = _shown(options.output, options.show)
        text += "\n\n" + plot
    return answer, text, OK


def _shown(table: str, tensor: str) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.calibration.report import histogram_plot

    answer = api.show(table, tensor)
    return answer, histogram_plot(answer, os.get_terminal_size().columns if sys.stdout.isatty() else 100), OK


def _run_merge(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api

    answer = api.merge(options.parts, options.output)
    lines = [f"{s['kind']}: {s['tensors']} tensors, n={s['n']}" for s in answer["sections"]]
    return answer, "\n".join([f"wrote {answer['table']}", *lines]), OK


def _run_ranges(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.calibration.report import ranges_table

    answer = api.ranges(
        options.table,
        method=options.method,
        kind=options.kind,
        symmetric=options.symmetric,
        write=options.write,
        output=options.output,
    )
    text = ranges_table(answer["ranges"]) if options.output is None else f"wrote {options.output}"
    return answer, text, OK


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
        keep_float=options.keep_float,
        weights=options.weights,
        symmetric_weights=not options.asymmetric_weights,
        bias_correction=options.bias_correction,
        equalize=options.equalize,
        parity_report=options.parity_report,
        options=dict(options.options),
        preprocess=options.preprocess,
        shapes=dict(options.shape),
        metric=options.metric,
        max_drop=options.max_drop,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    text, code = export_table(answer["results"]), _code(answer["results"], options.allow_unavailable)
    if options.parity_report:
        from portcall.ladder_report import report_code, report_lines

        text += "\n\n" + "\n".join(report_lines(answer["results"]))
        code = report_code(answer["results"], code)
    return answer, text, code


def _run_verify(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.report import export_table
    from portcall.progress import Reporter

    answer = api.verify(
        options.artifact,
        evaluation=options.evaluation,
        preprocess=options.preprocess,
        metric=options.metric,
        max_drop=options.max_drop,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    return answer, export_table(answer["results"]), _code(answer["results"], allow_unavailable=False)


def _run_inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.inspection import inspect_table
    from portcall.progress import Reporter

    answer = api.inspect(
        options.model, shapes=dict(options.shape), timeout_s=options.timeout, reporter=Reporter(True)
    )
    return answer, inspect_table(answer), OK


def _run_debug(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.ladder_report import exit_code, ladder_table
    from portcall.progress import Reporter

    answer = api.debug(options.artifact, timeout_s=options.timeout, reporter=Reporter(True))
    return answer, ladder_table(answer, options.all), exit_code(answer)


def _run_bench(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.cost_report import cost_lines
    from portcall.bench.modes_report import mode_table
    from portcall.bench.report import bench_table
    from portcall.core import Workload
    from portcall.progress import Reporter
    from portcall.runner_options import runner_fields

    mode = _mode(options)
    workload = Workload(
        batch=options.batch,
        threads=options.threads,
        processes=options.processes or (5 if mode == "latency" else mode.processes),
        min_time_s=options.min_time,
        max_time_s=options.max_time,
        shapes=dict(options.shape),
        **runner_fields(options),
    )
    answer = api.benchmark(
        options.artifacts,
        target=options.on,
        workload=workload,
        mode=mode,
        witness_pairs=options.witness_pairs if options.witness else None,
        data=options.data,
        preprocess=options.preprocess,
        output=options.output,
        write=options.write,
        placement=not options.no_placement,
        find_memory_limit=options.find_memory_limit,
        min_placement=dict(options.min_placement),
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    code = _code(answer["results"], options.allow_unavailable)
    results = answer["results"]
    text = bench_table(results) + cost_lines(results) if mode == "latency" else mode_table(results)
    if options.witness:
        from portcall.bench.witness.report import witness_text

        text += "\n\n" + witness_text(answer["results"])
    if answer.get("written"):
        text += "\n\n" + _written(answer["written"])
    if "error" in answer:
        code = CELL_FAILED
        print(f"portcall: {answer['error']['message']}\n  {answer['error']['fix']}", file=sys.stderr)
    return answer, text, code


def _run_report(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api

    for number in SIGNALS:  # there is no worker to end, but a half-written file to remove
        signal.signal(number, _raise_interrupt)
    answer = api.report(options.results, options.output, to=options.to)
    return answer, _written(answer["written"]), OK


def _written(files: Sequence[dict[str, Any]]) -> str:
    """Return one line per file, and one per cell that its format has no place for."""
    lines = []
    for file in files:
        lines.append(f"wrote {file['path']} ({file['format']}, {file['results']} results)")
        lines += [
            f"  not in it: {cell['artifact']}, {cell['outcome']}: {cell['reason']}"
            for cell in file["left_out"]
        ]
    return "\n".join(lines)


def _mode(options: argparse.Namespace) -> Any:
    """Return the mode with its settings, or "latency". Raises Usage for an option of another mode."""
    from portcall.bench.modes import Arrival, Cold, Sustained, Throughput

    kinds = {"throughput": Throughput, "cold": Cold, "sustained": Sustained, "arrival": Arrival}
    taken = {  # option -> its modes, and its name there
        "batches": (("throughput",), "batches"),
        "streams": (("throughput",), "streams"),
        "page_cache": (("cold",), "caches"),
        "duration": (("sustained", "arrival"), "duration_s"),
        "window": (("sustained",), "window_s"),
        "rate": (("arrival",), "rate_per_s"),
        "seed": (("arrival",), "seed"),
    }
    settings = {}
    for option, (modes, name) in taken.items():
        value = getattr(options, option)
        if value is None:
            continue
        if options.mode not in modes:
            flag = "--" + option.replace("_", "-")
            raise Usage(f"{flag} belongs to --mode {' and '.join(modes)}. See: portcall bench --help")
        settings[name] = value
    if options.mode == "latency":
        return "latency"
    if options.mode == "arrival" and "rate_per_s" not in settings:
        raise Usage("--mode arrival needs --rate, in requests per second. See: portcall bench --help")
    return kinds[options.mode](**settings)


def _run_compare(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.compare import CompareOptions
    from portcall.bench.compare_report import compare_table
    from portcall.core import Workload
    from portcall.progress import Reporter

    answer = api.compare(
        options.base,
        options.candidate,
        target=options.on,
        options=CompareOptions(
            metric=options.metric,
            margin=options.margin,
            budget_s=options.max_time,
            workload=Workload(
                batch=options.batch, threads=options.threads, warmup_s=0.15, shapes=dict(options.shape)
            ),
        ),
        data=options.data,
        preprocess=options.preprocess,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    return answer, compare_table(answer), VERDICTS[answer["verdict"]]


def _run_profile(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    from portcall import api
    from portcall.bench.profile import profile_table
    from portcall.core import Workload
    from portcall.progress import Reporter

    workload = Workload(
        batch=options.batch,
        threads=options.threads,
        min_time_s=options.min_time,
        shapes=dict(options.shape),
    )
    answer = api.profile(
        options.artifact,
        target=options.on,
        workload=workload,
        data=options.data,
        preprocess=options.preprocess,
        output=options.output,
        timeout_s=options.timeout,
        reporter=Reporter(True),
    )
    return answer, profile_table(answer, options.top), OK


COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str, int]]] = {
    "doctor": _run_doctor,
    "calibrate": _run_calibrate,
    "merge": _run_merge,
    "ranges": _run_ranges,
    "export": _run_export,
    "verify": _run_verify,
    "inspect": _run_inspect,
    "debug": _run_debug,
    "bench": _run_bench,
    "report": _run_report,
    "compare": _run_compare,
    "profile": _run_profile,
}
"""Per command: a function to (what --json prints, the table, the exit code)."""


def _code(results: Sequence[dict[str, Any]], allow_unavailable: bool) -> int:
    """Return the exit code of a matrix: 0 if every cell ended in an artifact or a measurement. Precedence 1, 4, 3."""
    if any(r["error_kind"] in ("verification", "budget") for r in results):
        return FAILED_VERIFICATION
    good = {"artifact", "measurement"} | ({"unavailable"} if allow_unavailable else set())
    if not all(r["outcome"] in good for r in results):
        return CELL_FAILED
    # A measurement carries its artifact's accuracy along; that was judged by the export.
    undecided = any(
        r["outcome"] == "artifact" and (r.get("eval") or {}).get("verdict") == "inconclusive" for r in results
    )
    return INCONCLUSIVE if undecided else OK


def _print(text: str) -> None:
    """Print to stdout; a reader that has gone (``portcall doctor | head -1``) changes no exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error(kind: str, message: str, fix: str) -> dict[str, Any]:
    return {"schema": PORTCALL_SCHEMA, "error": {"kind": kind, "message": message, "fix": fix or None}}


def _print_error(kind: str, message: str, fix: str, as_json: bool) -> None:
    if as_json:
        _print(json.dumps(_error(kind, message, fix), indent=2))
    else:
        print(f"portcall: {message}" + (f"\n  {fix}" if fix else ""), file=sys.stderr)


def _interrupt(as_json: bool, signum: int, frame: object) -> None:
    """End the running worker; its caller then raises, where it can tidy up.

    Before the first worker there is nothing to tidy up, and an exception would be lost where it falls into a callback
    of the import system: end at once.
    """
    worker = sys.modules.get("portcall.worker")
    if not getattr(worker, "was_opened", bool)():  # bool() is False: the module may be half imported
        text = (
            json.dumps(_error("interrupted", INTERRUPTED_TEXT, ""))
            if as_json
            else f"portcall: {INTERRUPTED_TEXT}"
        )
        os.write(1 if as_json else 2, f"{text}\n".encode())
        os._exit(INTERRUPTED)
    assert worker is not None
    if not worker.interrupt_all():
        raise KeyboardInterrupt


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        for number in SIGNALS:
            signal.signal(number, partial(_interrupt, as_json))
        return _dispatch(given, as_json)
    except KeyboardInterrupt:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # CPython ends with -2, not 130, if the interrupt fell into an exec of text (a dataclass being made, say),
        # caught or not; the next exec clears that note (_Py_UnhandledKeyboardInterrupt in pythonrun.c).
        exec("")
        _print_error("interrupted", INTERRUPTED_TEXT, "", as_json)
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
    except Usage as error:
        _print_error("usage", str(error), "", as_json)
        return BAD_INPUT
    if options.command is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    if options.command == "completion":
        import shtab

        _print(shtab.complete(parser, shell=options.shell))
        return OK
    try:
        answer, text, code = COMMANDS[options.command](options)
    except Usage as error:  # of options that belong together
        _print_error("usage", str(error), "", as_json)
        return BAD_INPUT
    except BadInput as error:
        _print_error(error.kind, error.message, error.fix, as_json)
        return BAD_INPUT
    except PortcallError as error:
        _print_error(error.kind, error.message, error.fix, as_json)
        return CELL_FAILED
    _print(json.dumps(answer, indent=2) if as_json else text)
    return code
