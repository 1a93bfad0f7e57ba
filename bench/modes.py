"""What ``bench --mode`` can measure beside latency, as data: each mode with its settings, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from portcall.core import BadInput
from portcall.workspace import usable_cpus

CACHES = ("warm", "artifact", "runtime", "system")
"""States of the page cache before a cold start: see ``docs/modes.md``."""

_MOST_REQUESTS = 2_000_000


@dataclass(frozen=True, slots=True)
class Mode:
    """A mode and its settings. processes: how many fresh ones it takes where nobody says."""

    name: ClassVar[str]
    processes: ClassVar[int] = 5

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Throughput(Mode):
    """Samples per second over a sweep of batch sizes and of streams (requests in flight at the same time).

    Every combination is measured, each in fresh processes. streams default: 1, 2, 4, ... up to the usable CPUs.
    """

    name: ClassVar[str] = "throughput"
    batches: tuple[int, ...] = (1, 2, 4, 8)
    streams: tuple[int, ...] = field(default_factory=lambda: _powers(usable_cpus()))

    def __post_init__(self) -> None:
        for option, values in (("--batches", self.batches), ("--streams", self.streams)):
            if not values or min(values) < 1:
                raise BadInput(f"{option} {values} holds no positive whole numbers", "Give e.g. 1,2,4")
        if max(self.streams) > 1024:
            raise BadInput(f"--streams {max(self.streams)}: more than 1024", "Give fewer")


@dataclass(frozen=True, slots=True)
class Cold(Mode):
    """From process start to the first result, for each state of the page cache in *caches*."""

    name: ClassVar[str] = "cold"
    caches: tuple[str, ...] = ("warm", "artifact")

    def __post_init__(self) -> None:
        unknown = [c for c in self.caches if c not in CACHES]
        if unknown or not self.caches:
            raise BadInput(
                f"--page-cache knows no {unknown[0] if unknown else 'empty list'!r}",
                f"There are: {', '.join(CACHES)}",
            )


@dataclass(frozen=True, slots=True)
class Sustained(Mode):
    """Full load for *duration_s* per process, and how P50 moves from window to window."""

    name: ClassVar[str] = "sustained"
    processes: ClassVar[int] = 1
    duration_s: float = 120.0
    window_s: float = 5.0

    def __post_init__(self) -> None:
        _positive("--duration", self.duration_s)
        _positive("--window", self.window_s)
        if self.duration_s < 4 * self.window_s:
            raise BadInput(
                f"--duration {self.duration_s:g} holds fewer than 4 windows of {self.window_s:g} s",
                f"Give --window {self.duration_s / 20:g}, or a longer --duration",
            )


@dataclass(frozen=True, slots=True)
class Arrival(Mode):
    """Requests that arrive as a Poisson process of *rate_per_s*, whether the artifact keeps up or not.

    duration_s: of the arrivals, per process. drain_s: how long those may take that still wait then (default: as long).
    """

    name: ClassVar[str] = "arrival"
    rate_per_s: float
    duration_s: float = 10.0
    seed: int = 0
    drain_s: float | None = None

    def __post_init__(self) -> None:
        _positive("--rate", self.rate_per_s)
        _positive("--duration", self.duration_s)
        if self.seed < 0:
            raise BadInput(f"--seed {self.seed} is negative", "Give 0 or more")
        if self.drain_s is not None and not (math.isfinite(self.drain_s) and self.drain_s >= 0):
            raise BadInput(f"drain_s {self.drain_s} is no time", "Give 0 or more seconds")
        expected = self.rate_per_s * self.duration_s
        if expected > _MOST_REQUESTS:
            raise BadInput(
                f"--rate {self.rate_per_s:g} for {self.duration_s:g} s is more than {_MOST_REQUESTS} requests",
                f"Give --duration {_MOST_REQUESTS / self.rate_per_s:.3g} or less",
            )
        if expected < 5:
            raise BadInput(
                f"--rate {self.rate_per_s:g} for {self.duration_s:g} s is fewer than 5 requests",
                f"Give --duration {math.ceil(100 / self.rate_per_s)} or more",
            )


MODES = ("latency", "throughput", "cold", "sustained", "arrival")


def get_mode(mode: str | Mode) -> Mode | None:
    """Return the mode of that name with its defaults; None for latency. Raises BadInput for an unknown one."""
    if isinstance(mode, Mode):
        return mode
    plain: dict[str, type[Mode]] = {"throughput": Throughput, "cold": Cold, "sustained": Sustained}
    if mode == "latency":
        return None
    if mode == "arrival":
        raise BadInput(
            "the arrival mode needs a rate of requests per second", "Give --rate (Arrival(rate_per_s=...))"
        )
    if mode not in plain:
        raise BadInput(f"no mode {mode!r}; there are: {', '.join(MODES)}")
    return plain[mode]()


def _positive(option: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadInput(f"{option} {seconds} is not a positive number", "Give one")


def _powers(limit: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... below *limit*, and *limit*."""
    return (*(1 << k for k in range(limit.bit_length()) if 1 << k < limit), limit)
