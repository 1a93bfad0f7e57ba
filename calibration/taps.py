"""Taps: run a graph over the calibration samples once and stream its tensors into histograms, in constant memory.

A tap is one function per kind of graph: plan -> passes, each with runners that take a sample and show its tensors.
Editing an ONNX graph and running it happen in two processes: importing onnx costs 120 MB. The functions here are
called in workers.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portcall.calibration.data import Data, Sample, open_data
from portcall.calibration.histogram import Accumulator, Histogram, NonFinite
from portcall.calibration.table import MEAN_UNIT, CalibrationTable, DataRecord, Ints, Section, is_held
from portcall.targets.agent.contract import Graph
from portcall.targets.agent.errors import BadInput, CellFailed
from portcall.targets.agent.memory import peak_rss_bytes

Array = np.ndarray[Any, Any]
Runner = Callable[[Mapping[str, Array]], Iterator[tuple[str, Array]]]
"""Runs one sample and shows its tensors in the order of the graph; an array is valid until the next is asked for."""

BLOCK = 64
"""Samples between two moments at which the state may be saved."""
SAVE_EVERY_S = 10.0
MEAN_LIMIT = 2.0**14
"""Means beyond are cut off: tensors with values above 10,000 stay in float and need none."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One run over all samples; *open_runners* gives as many runners as samples run at once."""

    tensors: Sequence[str]
    open_runners: Callable[[], Sequence[Runner]]


def observe(arguments: Mapping[str, Any], progress: Callable[[int, int | None], None]) -> dict[str, Any]:
    """Run calibration samples through a graph and write what its tensors held to *output*, a table of one section.

    arguments: graph; plan (of ``plan_onnx``, else None); data (a DataRecord); planned [start, stop); shard: the part
    of it to run; step; held_every; threads; checkpoint and output (paths). Saves its state to *checkpoint* now and
    then, and goes on from there where one is found. Raises BadInput without samples or where DATA ends early,
    CellFailed where the network itself makes NaN or infinity (names tensor, node and sample).
    """
    graph, record = Graph.from_json(arguments["graph"]), DataRecord(**arguments["data"])
    first, last = arguments["shard"]
    data = open_data(record.spec, graph.source.inputs, preprocess=record.preprocess)
    tap = _open_tap(graph, arguments["plan"], arguments["threads"])
    passes = tap.passes
    state = _State(tap.axes, arguments["step"])
    checkpoint = Path(arguments["checkpoint"]) if arguments["checkpoint"] else None
    at_pass, position = state.resume(checkpoint, passes, first)
    resumed = at_pass * (last - first) + position - first

    def section(done: int) -> Section:
        return Section(
            kind=graph.kind,
            graph_sha256=graph.sha256,
            source_sha256=graph.source.sha256,
            data=record,
            planned=tuple(arguments["planned"]),
            observed=((first, done),),
            histograms=state.histograms(),
            means=state.means(),
            step=arguments["step"],
            held_every=arguments["held_every"],
        )

    saved, total = time.monotonic(), (last - first) * len(passes)
    for number, one in enumerate(passes[at_pass:], at_pass):
        samples = _Samples(data.with_slice(record.start + position, record.start + last), position, arguments)
        with _Team(one, state, tap.first_bad) as team:
            while team.run(samples, partial(_report, progress, number * (last - first) - first, total)):
                position = samples.position
                if checkpoint is not None and time.monotonic() - saved > SAVE_EVERY_S:
                    CalibrationTable({}).with_section(section(position)).save(checkpoint)
                    saved = time.monotonic()
        if samples.position != last:
            raise BadInput(
                f"DATA ended early: {samples.position - first} of {last - first} samples came",
                "Give data that does not change while it is read",
            )
        position = first
    CalibrationTable({}).with_section(section(last)).save(Path(arguments["output"]))
    return {"peak_rss_bytes": peak_rss_bytes(), "resumed_from": resumed, "passes": len(passes)}


@dataclass(frozen=True, slots=True)
class Tap:
    """How a graph is observed.

    axes: the channel axis of each tensor whose channel means are wanted. first_bad: for a sample that makes a tensor
    NaN or infinite, the first such tensor in the order of the graph, and the node that made it, in words.
    """

    passes: Sequence[Pass]
    axes: Mapping[str, int]
    first_bad: Callable[[Mapping[str, Array], str], str]


def _report(progress: Callable[[int, int | None], None], before: int, total: int, position: int) -> None:
    progress(before + position, total)


class _Samples:
    """The samples of a pass in blocks, less those held back. position: of the next one, counted from DATA's start."""

    def __init__(self, data: Data, position: int, arguments: Mapping[str, Any]) -> None:
        self._all, self._every = iter(data), arguments["held_every"]
        self.position = position

    def block(self) -> Iterator[Sample]:
        for sample in itertools.islice(self._all, BLOCK):
            self.position += 1
            if not is_held(self.position - 1, self._every):
                yield sample


class _State:
    """The histograms and channel means so far; threads add to their own and join them at the end of a block."""

    def __init__(self, axes: Mapping[str, int], step: int) -> None:
        self.axes, self.step = axes, step
        self._histograms: dict[str, Histogram] = {}
        self._means: dict[str, Ints] = {}
        self._open: list[_Observer] = []

    def observer(self) -> _Observer:
        self._open.append(_Observer(self.axes, self.step))
        return self._open[-1]

    def close_observers(self) -> None:
        self._histograms, self._means = dict(self.histograms()), dict(self.means())
        self._open = []

    def histograms(self) -> Mapping[str, Histogram]:
        found = dict(self._histograms)
        for observer in self._open:
            for name, accumulator in observer.accumulators.items():
                histogram = accumulator.histogram()
                found[name] = found[name].merged(histogram) if name in found else histogram
        return found

    def means(self) -> Mapping[str, Ints]:
        found = dict(self._means)
        for observer in self._open:
            for name, sums in observer.means.items():
                found[name] = found[name] + sums if name in found else sums
        return found

    def resume(self, checkpoint: Path | None, passes: Sequence[Pass], first: int) -> tuple[int, int]:
        """Take over what an interrupted run saved; return the pass and the sample to go on with."""
        if checkpoint is None or not checkpoint.is_file():
            return 0, first
        try:
            section = next(iter(CalibrationTable.load(checkpoint).sections.values()))
        except BadInput:  # cut off by a full disk, or of another version
            return 0, first
        self._histograms, self._means = dict(section.histograms), dict(section.means)
        begun = [number for number, one in enumerate(passes) if one.tensors[0] in self._histograms]
        return begun[-1], section.observed[0][1]


class _Observer:
    """What one thread has seen."""

    def __init__(self, axes: Mapping[str, int], step: int) -> None:
        self._axes, self._step = axes, step
        self.accumulators: dict[str, Accumulator] = {}
        self.means: dict[str, Ints] = {}

    def add(self, name: str, array: Array) -> None:
        if array.size == 0:
            return
        accumulator = self.accumulators.get(name) or Accumulator(self._step)
        accumulator.add(array)
        self.accumulators[name] = accumulator
        if name in self._axes:
            mean = np.clip(channel_mean(array, self._axes[name]), -MEAN_LIMIT, MEAN_LIMIT)
            sums = np.rint(mean / MEAN_UNIT).astype(np.int64)
            known = self.means.get(name)
            self.means[name] = sums if known is None else known + sums


def channel_mean(array: Array, axis: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean of every channel, float64[array.shape[axis]]: the same bits for the same array."""
    axis %= array.ndim
    channels = array.shape[axis]
    parts = array.reshape(-1, channels, int(np.prod(array.shape[axis + 1 :], dtype=np.int64)))
    # NumPy sums pairwise along a contiguous axis, in float32 accurately enough; else in sequence, in float64.
    inner = parts.sum(axis=2, dtype=np.float32) if parts.shape[2] > 1 else parts[:, :, 0]
    total = inner.sum(axis=0, dtype=np.float64)
    return np.asarray(total / (parts.shape[0] * parts.shape[2]))


class _Team:
    """Threads that take one sample after the other from a common iterator; each has a runner and an observer."""

    def __init__(
        self, one: Pass, state: _State, first_bad: Callable[[Mapping[str, Array], str], str]
    ) -> None:
        self._members = [(runner, state.observer()) for runner in one.open_runners()]
        self._state, self._first_bad = state, first_bad
        self._executor = ThreadPoolExecutor(len(self._members))

    def __enter__(self) -> _Team:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._state.close_observers()

    def run(self, samples: _Samples, report: Callable[[int], None]) -> bool:
        """Run the next block; tell whether there was one. The error of the earliest sample is raised."""
        lock = threading.Lock()
        errors: list[tuple[int, Exception]] = []
        before, block = samples.position, samples.block()

        def work(runner: Runner, observer: _Observer) -> None:
            while True:
                with lock:
                    try:
                        sample = None if errors else next(block, None)
                    except (
                        Exception
                    ) as error:  # DATA that cannot be read on; raised below, in the caller's thread
                        errors.append((-1, error))
                        return
                    if sample is None:
                        return
                    report(samples.position)
                try:
                    _observe(sample, runner, observer)
                except Exception as error:  # likewise
                    with lock:
                        errors.append((sample.index, error))

        for future in [self._executor.submit(work, *member) for member in self._members]:
            future.result()
        if errors:
            error = min(errors, key=lambda e: e[0])[1]
            if not isinstance(error, _Overflow):
                raise error
            where, index = self._first_bad(error.sample.inputs, error.tensor), error.sample.index
            raise CellFailed(
                f"{where} holds NaN or infinity for calibration sample {index}",
                "The float model itself overflows there: check that sample and the layer",
            ) from error
        return samples.position > before


class _Overflow(Exception):
    """A tensor is not finite for a sample."""

    def __init__(self, sample: Sample, tensor: str) -> None:
        super().__init__(tensor)
        self.sample, self.tensor = sample, tensor


def _observe(sample: Sample, runner: Runner, observer: _Observer) -> None:
    name = ""
    try:
        for name, array in runner(sample.inputs):
            observer.add(name, array)
    except NonFinite as error:
        raise _Overflow(sample, name) from error


def _open_tap(graph: Graph, plan: Mapping[str, Any] | None, threads: int) -> Tap:
    if graph.kind == "onnx":
        from portcall.calibration import _tap_onnx

        assert plan is not None
        return _tap_onnx.open_tap(graph, plan)
    if graph.kind == "tflite":
        from portcall.calibration import _tap_tflite

        return _tap_tflite.open_tap(graph, threads)
    from portcall.calibration import _tap_torch

    return _tap_torch.open_tap(graph, threads)


def plan_onnx(arguments: Mapping[str, Any], progress: object) -> dict[str, Any]:
    """Plan the tap of an ONNX graph in a process of its own: see ``_tap_onnx.plan``."""
    from portcall.calibration import _tap_onnx

    return _tap_onnx.plan(
        Graph.from_json(arguments["graph"]),
        {k: tuple(v) for k, v in arguments["shapes"].items()},
        arguments["budget_bytes"],
        arguments["threads"],
    )
