"""How often the steady-state detector is wrong: ``python -m benchmarks.steady``.

The measuring loop itself (``portcall.targets.agent.measure.run_loop``: 0.25 to 3 s of warm-up, 1 s timed) is run on
replayed series: each inference advances a clock by the next latency of a series, so that the loop decides as it would
have decided then. Two kinds of series, all of real latencies (``benchmarks.steady_recordings``):

* spliced, at least 300 from one seed: contiguous stretches of a flat recording, one after the other, 10 s in all, with
  a known transition laid over their beginning as a factor: none; a slow first inference or ten; a step within 1.1 s (a
  late delegate; one after the 1.25 s that a process lasts at least can be seen by nobody); a ramp (clock frequency); an
  exponential decay (caches); and for the whole length: a periodic disturbance, and a drift that never ends (which is
  never steady).
* recorded, the 20 of ``steady_labels.json``, as they are.

A series is judged wrong where
* early: the timed samples were called steady, but more than a tenth of them came before the true point (from which on
  the transition stays within 2 %), with a median more than 5 % off that of the rest; for recordings: two labelled
  levels that differ by more than 5 % hold more than a tenth of the timed samples each;
* late: more than 1 s of what was steady was thrown away before the first timed sample (spliced only);
* missed: not called steady, although it was from 1 s before the end of the warm-up's budget on at the latest; for
  recordings: although one labelled level lasts for at least 1.75 s within the 4 s that were looked at;
* never: a drift of more than 5 % over the timed samples was called steady.
What the transition adds is at least 8 % at its largest; the detector's constants were set on seeds 0 to 2.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.steady_labels import LABELLED, LABELS, SAME, levels
from benchmarks.steady_recordings import load_packed
from portcall.bench.report import align
from portcall.targets.agent import measure
from portcall.targets.agent.steady import FEWEST

WARMUP_S, MAX_WARMUP_S, MIN_TIME_S = 0.25, 3.0, 1.0
LENGTH_S = 10.0
SHARE = 0.1
OFF = 0.05
LATE_S = 1.0
FLAT = 0.02
CLOCKS = ("perf_counter_ns", "process_time_ns")
FASTEST_NS = 40_000  # below, replaying takes longer than the thing itself
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the loop did: the timed samples are first..last of the series; *reached*: called steady."""

    first: int
    last: int
    reached: bool


def replay(series: Array) -> Decision:
    """Run the measuring loop on *series* (latencies in ns) instead of on a runtime."""
    times: list[int] = [int(t) for t in series]
    now = place = 0

    def infer() -> None:
        nonlocal now, place
        now += times[place]
        place += 1

    real = {name: getattr(measure, name) for name in CLOCKS}
    try:
        for name in CLOCKS:
            setattr(measure, name, lambda: now)
        samples = measure.run_loop(infer, WARMUP_S, MIN_TIME_S, max_warmup_s=MAX_WARMUP_S)
    finally:
        for name, clock in real.items():
            setattr(measure, name, clock)
    assert samples.steady is not None
    return Decision(samples.warmup, samples.warmup + samples.wall_ns.size, samples.steady.reached)


@dataclass(frozen=True, slots=True)
class Case:
    """A spliced series. true: seconds after which it is steady, None for never; factor: what was laid over it."""

    kind: str
    source: str
    series: Array
    factor: Array
    true_s: float | None


def _never(seconds: Array, rng: np.random.Generator) -> Array:
    rate = rng.uniform(0.08, 0.25) * rng.choice([-1, 1])
    return np.asarray(np.exp(np.clip(rate * seconds, -1.5, 1.5)))


def _step(seconds: Array, rng: np.random.Generator) -> Array:
    size, end = rng.uniform(0.08, 1.5), rng.uniform(0.02, 1.1)
    return np.where(seconds < end, 1 + size, 1.0)


def _ramp(seconds: Array, rng: np.random.Generator) -> Array:
    size, end = rng.uniform(0.1, 0.8), rng.uniform(0.1, 1.8)
    return 1 + size * np.clip(1 - seconds / end, 0, None)


def _decay(seconds: Array, rng: np.random.Generator) -> Array:
    size, constant = rng.uniform(0.2, 3.0), math.exp(rng.uniform(math.log(0.005), math.log(0.4)))
    return 1 + size * np.exp(-seconds / constant)


def _first(seconds: Array, rng: np.random.Generator) -> Array:
    factor = np.ones_like(seconds)
    first = max(1, min(int(rng.choice([1, 10])), int(np.searchsorted(seconds, 0.1))))
    factor[:first] = rng.uniform(2, min(50, max(4, 1 / max(seconds[1], 1e-6))))  # 1 s at most for one
    return factor


def _periodic(seconds: Array, rng: np.random.Generator) -> Array:
    period = math.exp(rng.uniform(math.log(0.005), math.log(0.2)))
    return 1 + rng.uniform(0.05, 0.3) * (np.sin(2 * np.pi * seconds / period) > 0.5)


def _flat(seconds: Array, rng: np.random.Generator) -> Array:
    return np.ones_like(seconds)


KINDS: Mapping[str, Callable[[Array, np.random.Generator], Array]] = {
    "flat": _flat,
    "slow first": _first,
    "step": _step,
    "ramp": _ramp,
    "decay": _decay,
    "periodic": _periodic,
    "drift": _never,
}


def flat_recordings() -> dict[str, Array]:
    """Return the stretches of recordings, beside the labelled ones, that hold one level for 1.5 s or more.

    The median of each sixth of a stretch is within 2 % of that of the whole: what is spliced from it is flat.
    """
    found = {}
    for name, series in load_packed().items():
        if name in LABELLED or np.median(series) < FASTEST_NS:
            continue
        ends = np.cumsum(series) / 1e9
        cuts = [start for start, _ in levels(series)] + [float(ends[-1])]
        longest = max(range(len(cuts) - 1), key=lambda i: cuts[i + 1] - cuts[i])
        low, high = cuts[longest] + 0.1, cuts[longest + 1]  # without what leads in from the level before
        part = series[np.searchsorted(ends, low) + 1 : np.searchsorted(ends, high)]
        sixths = [float(np.median(p)) for p in np.array_split(part, 6)] if part.size >= 12 else [1.0, 2.0]
        if part.sum() > 1.5e9 and max(abs(s / np.median(part) - 1) for s in sixths) < FLAT:
            found[name] = part
    return found


def spliced(seed: int, count: int) -> Iterator[Case]:
    """Yield *count* series of seed *seed*, the kinds and sources in turn."""
    sources = flat_recordings()
    names = sorted(sources)
    rng = np.random.default_rng(seed)
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        name = names[int(rng.integers(len(names)))]
        source, parts, took = sources[name], [], 0.0
        while took < LENGTH_S * 1e9:
            length = int(rng.integers(max(2, source.size // 8), source.size + 1))
            begin = int(rng.integers(source.size - length + 1))
            parts.append(source[begin : begin + length])
            took += float(parts[-1].sum())
        base = np.concatenate(parts)
        # The factor stretches time too: what counts is when an inference starts.
        factor = np.ones_like(base)
        shape_rng = rng.spawn(1)[0]
        state = shape_rng.bit_generator.state
        for _ in range(4):
            shape_rng.bit_generator.state = state
            factor = KINDS[kind](np.concatenate([[0.0], np.cumsum(base * factor)[:-1]]) / 1e9, shape_rng)
        starts = np.concatenate([[0.0], np.cumsum(base * factor)[:-1]]) / 1e9
        true_s: float | None = None
        if kind in ("flat", "periodic"):
            true_s = 0.0
        elif kind != "drift":
            off = np.flatnonzero(np.abs(factor - 1) > 0.02)
            true_s = float(starts[off[-1]] + base[off[-1]] * factor[off[-1]] / 1e9) if off.size else 0.0
        yield Case(kind, name, base * factor, factor, true_s)


def verdict(case: Case, decision: Decision) -> str | None:
    """Return what is wrong with a decision ("early", "late", "missed", "never"), None where it is right."""
    ends = np.cumsum(case.series) / 1e9
    timed = case.series[decision.first : decision.last]
    if case.true_s is None:
        factor = case.factor[decision.first : decision.last]
        return "never" if decision.reached and abs(math.log(factor[-1] / factor[0])) > OFF else None
    true = int(np.searchsorted(ends, case.true_s - 1e-9)) + 1 if case.true_s > 0 else 0
    if not decision.reached:
        return "missed" if case.true_s <= MAX_WARMUP_S - 1.0 else None
    before, after = timed[: max(0, true - decision.first)], timed[max(0, true - decision.first) :]
    if before.size > SHARE * timed.size:
        if after.size == 0 or abs(math.log(np.median(before) / np.median(after))) > OFF:
            return "early"
        return None
    begin = float(ends[decision.first - 1]) if decision.first else 0.0
    least = max(WARMUP_S, 2 * FEWEST * float(np.median(case.series)) / 1e9)
    return "late" if begin - max(case.true_s, least) > LATE_S else None


def recorded_verdict(series: Array, label: Sequence[Sequence[float]], decision: Decision) -> str | None:
    """The same for a labelled recording: "early" where its timed samples mix levels, "missed" where one lasted."""
    ends = np.cumsum(series) / 1e9
    edges = [start for start, _ in label] + [float(ends[-1])]
    if not decision.reached:
        looked = MAX_WARMUP_S + MIN_TIME_S
        lasts = [min(b, looked) - a for a, b in pairwise(edges)]
        return "missed" if max(lasts) >= MIN_TIME_S + 0.75 else None
    level = np.searchsorted(edges, ends[decision.first : decision.last], side="right") - 1
    shares = Counter(int(i) for i in level)
    held = [label[min(i, len(label) - 1)][1] for i, n in shares.items() if n > SHARE * level.size]
    return "early" if len(held) > 1 and max(held) / min(held) > 1 + SAME else None


def run(seeds: Sequence[int], count: int, labelled: bool) -> dict[str, Any]:
    """Replay everything; return wrong decisions per kind, and each wrong one."""
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    wrong = []
    for seed in seeds:
        for number, case in enumerate(spliced(seed, count)):
            decision = replay(case.series)
            found = verdict(case, decision)
            rows[case.kind][found or "right"] += 1
            if found is not None:
                ends = np.cumsum(case.series) / 1e9
                begin, end = ends[decision.first - 1], ends[decision.last - 1]
                wrong.append(
                    f"seed {seed} number {number}: {case.kind} on {case.source}: {found}; "
                    f"true from {case.true_s} s, timed "
                    f"{begin:.2f} to {end:.2f} s (n={decision.last - decision.first}), reached {decision.reached}"
                )
    recorded: Counter[str] = Counter()
    if labelled:
        recordings = load_packed()
        for name, label in json.loads(LABELS.read_text())["series"].items():
            decision = replay(_long_enough(recordings[name]))
            found = recorded_verdict(recordings[name], label, decision)
            recorded[found or "right"] += 1
            if found is not None:
                wrong.append(
                    f"{name}: {found}; samples {decision.first} to {decision.last}, reached {decision.reached}, {label}"
                )
    return {
        "seeds": list(seeds),
        "spliced": {k: dict(v) for k, v in rows.items()},
        "recorded": dict(recorded),
        "wrong": wrong,
    }


def _long_enough(series: Array) -> Array:
    """Return the series with its end repeated, for a loop that goes on beyond a recording of 4 s."""
    return np.concatenate([series, series[-max(5, series.size // 4) :], series[-max(5, series.size // 4) :]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[3], help="default 3: one that nothing was set on"
    )
    parser.add_argument("--count", type=int, default=300, help="spliced series per seed (default 300)")
    parser.add_argument("--no-recorded", action="store_true", help="spliced series only (to set constants)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    answer = run(options.seeds, options.count, not options.no_recorded)
    if options.json:
        json.dump(answer, sys.stdout, indent=2)
        print()
        return
    words = ["right", "early", "late", "missed", "never"]
    counts: list[tuple[str, Mapping[str, int]]] = [
        *answer["spliced"].items(),
        ("recorded", answer["recorded"]),
    ]
    print(align(["series", *words], [[k, *(str(c.get(w, 0)) for w in words)] for k, c in counts], left=1))
    for line in answer["wrong"]:
        print(line)
    for name, groups in (("spliced", list(answer["spliced"].values())), ("recorded", [answer["recorded"]])):
        n, right = sum(sum(g.values()) for g in groups), sum(g.get("right", 0) for g in groups)
        if n:
            print(f"{name}: {n - right} of {n} wrong ({(n - right) / n:.1%})")
    if options.no_recorded:
        return
    n = sum(sum(c.values()) for _, c in counts)
    right = sum(c.get("right", 0) for _, c in counts)
    print(f"all: {n - right} of {n} wrong ({(n - right) / n:.1%})")


if __name__ == "__main__":
    main()
