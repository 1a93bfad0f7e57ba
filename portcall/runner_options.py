"""The options of ``bench`` that say how its runner works: affinity, priority, spinning, warm-up, count, interval."""

from __future__ import annotations

import argparse
import re
from typing import Any

from portcall.targets.agent.errors import BadInput

MOST_CPUS = 4096


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of ``bench``; ``runner_fields`` reads them back."""
    parser.add_argument(
        "--min-count",
        type=_number,
        default=5,
        metavar="N",
        help="timed inferences per process at least (default 5)",
    )
    parser.add_argument(
        "--max-warmup",
        type=_not_negative,
        default=3.0,
        metavar="S",
        help="longest wait per process for a steady series (default 3 s); then it is measured and flagged",
    )
    parser.add_argument(
        "--ci-width",
        type=_width,
        metavar="1%",
        help="add processes until the 95 %% interval of P50 (upper minus lower end) is that narrow, or --max-time ends "
        "(default then 600 s)",
    )
    parser.add_argument(
        "--affinity", type=_cpus, metavar="0-3", help="CPUs to run on: 0, 0,1 or 0-3 (default: any)"
    )
    parser.add_argument(
        "--priority",
        type=_priority,
        metavar="nice:N|fifo:N",
        help="nice value or real-time priority (default: as is)",
    )
    parser.add_argument(
        "--spinning",
        choices=["on", "off"],
        help="whether waiting threads of the runtime spin (onnxruntime; default: the runtime's own)",
    )


def runner_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``Workload`` that these options set."""
    return {
        "min_count": options.min_count,
        "max_warmup_s": options.max_warmup,
        "ci_width": options.ci_width,
        "affinity": options.affinity,
        "priority": options.priority,
        "spinning": None if options.spinning is None else options.spinning == "on",
    }


def _number(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 up")
    return value


def _width(text: str) -> float:
    """Return 0.01 for "1%" or "0.01"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width between 0 and 100 %, such as 1%")
    return value


def _cpus(text: str) -> tuple[int, ...]:
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not low <= high < MOST_CPUS:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of CPUs such as 0, 0,1 or 0-3")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def _priority(text: str) -> str:
    from portcall.targets.agent.settings import parse_priority

    try:
        parse_priority(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(f"{error.message}. {error.fix}") from error
    return text
