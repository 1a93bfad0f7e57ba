"""A pair of measurements: two fresh processes alive together on one CPU, which take short turns.

What makes two fresh processes of one file differ by 4 to 6 % is the machine's drift over seconds, not the process: in
turns of a few milliseconds the drift hits both alike, and the ratio of their medians varies by about 1 %.
Source: L. Bulej et al., "Duet benchmarking" (ICPE 2020), whose two sides run at the same time on two cores; here they
alternate on the same one, so that neither slows the other.
"""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Mapping, NoReturn, Optional, Tuple

import numpy as np

from portcall.targets.agent import fingerprint, jobs, opening, settings
from portcall.targets.agent.contract import Artifact, Workload
from portcall.targets.agent.errors import CellFailed, error_from_kind

SIDES = ("base", "candidate")

TURN_NS = 12_000_000
"""A turn is about this long: far below the seconds in which machines drift, far above the switch's cost."""

_COLD_NS = 10_000_000
"""Below this, an inference notices the caches that the other side left: the first of each turn is not timed."""

MOST_TURNS = 400
MOST_INFERENCES = 500
"""Turns of one pair, and inferences of a turn, at most: what the arrays of samples are allocated for."""

_WORD = struct.Struct("<q")

_IDLE_S = 0.05
"""How long CPUs are watched before the pair is put on the idlest."""


def duet(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """Measure one pair; return what each side's process told, and the CPUs that both ran on.

    arguments: "sides": for each, "command" (interpreter and flags) and "job" of ``turns`` without its pipes;
    "agent_main", "package_root", "exporters_path": of every process; "folder": for its files; "turns_s": the time that
    both take turns, at least "fewest" turns each, and on until each has timed "inferences", but not beyond "longest_s";
    "seed": of the order of turns; where it is even the base starts first; "threads".
    Raises the error of the side that failed, its name in front.
    """
    folder = Path(arguments["folder"])
    cpus = _idlest(arguments["threads"])
    # The one that starts second is faster by 0.2 %: each side is the second one in every other pair.
    places = [0, 1] if arguments["seed"] % 2 == 0 else [1, 0]
    started = {i: _Side(SIDES[i], arguments["sides"][i], arguments, folder, cpus) for i in places}
    sides = list(started.values())
    try:
        for side in sides:
            side.await_word()
        typical_ns = []
        for side in sides:  # one after the other: both share the CPUs
            side.say(0)
            typical_ns.append(side.await_word())
        # The same for both, whichever is slower.
        burst = min(MOST_INFERENCES, max(1, round(TURN_NS / max(typical_ns))))
        rng = random.Random(arguments["seed"])
        begun = time.monotonic()
        turns = 0
        while turns < MOST_TURNS:
            lasted = time.monotonic() - begun
            enough = lasted >= arguments["turns_s"] and turns >= arguments["fewest"]
            if enough and (turns * burst >= arguments["inferences"] or lasted >= arguments["longest_s"]):
                break
            for side in rng.sample(sides, len(sides)):
                side.say(burst)
                side.await_word()
            turns += 1
        answers = [started[i].end() for i in range(2)]
    finally:
        for side in sides:
            side.kill()
    return {"sides": answers, "turns": turns, "burst": burst, "cpus": cpus}


class _Side:
    """One fresh process of the pair, and the pipes on which it is told to go and tells that it is done."""

    def __init__(
        self,
        name: str,
        side: Mapping[str, Any],
        arguments: Mapping[str, Any],
        folder: Path,
        cpus: Optional[List[int]],
    ) -> None:
        self.name = name
        self.answer = folder / (name + "-answer.json")
        go_read, go_write = os.pipe()
        done_read, done_write = os.pipe()
        call = {**side["job"], "cpus": cpus, "go_fd": go_read, "done_fd": done_write}
        job = {
            "call": "portcall.targets.agent.duet:turns",
            "arguments": call,
            "package_root": arguments["package_root"],
            "exporters_path": arguments["exporters_path"],
        }
        path = folder / (name + "-job.json")
        path.write_text(json.dumps(job))
        try:
            self.process = subprocess.Popen(
                [*side["command"], arguments["agent_main"], str(path), str(self.answer)],
                stdin=subprocess.DEVNULL,
                pass_fds=(go_read, done_write),
            )
        finally:
            os.close(go_read)
            os.close(done_write)
        self._go: BinaryIO = os.fdopen(go_write, "wb", buffering=0)
        self._done: BinaryIO = os.fdopen(done_read, "rb", buffering=0)

    def say(self, count: int) -> None:
        """Have it warm up (0), or time *count* inferences."""
        try:
            self._go.write(_WORD.pack(count))
        except BrokenPipeError:
            self._fail()

    def await_word(self) -> int:
        """Wait until it is done; return the number that it tells (ns of a typical inference after the warm-up)."""
        word = self._done.read(_WORD.size)
        if len(word or b"") < _WORD.size:
            self._fail()
        return int(_WORD.unpack(word)[0])

    def end(self) -> Dict[str, Any]:
        """Close the pipe, which ends the process; return its answer."""
        self._go.close()
        self.process.wait()
        if not self.answer.exists():
            self._fail()
        answer: Dict[str, Any] = json.loads(self.answer.read_text())
        if "error" in answer:
            self._fail()
        value: Dict[str, Any] = answer["value"]
        return value

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._go.close()
        self._done.close()

    def _fail(self) -> NoReturn:
        status = self.process.wait()
        if self.answer.exists():
            error = json.loads(self.answer.read_text())["error"]
            raise error_from_kind(error["kind"], "%s: %s" % (self.name, error["message"]), error["fix"])
        how = "was killed by signal %d" % -status if status < 0 else "exited with status %d" % status
        raise CellFailed("%s: its process %s and left no answer" % (self.name, how))


def turns(arguments: Mapping[str, Any], progress: jobs.Progress) -> Dict[str, Any]:
    """One side: load, check, then warm up and take turns as told on the pipe.

    Raw samples go to the files ``wall`` and ``cpu``: int64[turns * burst], in order.
    """
    artifact, workload = Artifact.from_json(arguments["artifact"]), Workload.from_json(arguments["workload"])
    machine = fingerprint.machine()  # as it is for everybody: before this process is pinned
    before = fingerprint.state()
    applied, warnings = settings.apply(workload)
    go, done = arguments["go_fd"], arguments["done_fd"]
    with opening.open_session(artifact, workload) as (session, costs):
        names = opening.Names(artifact, session)
        inputs, _ = opening.read_inputs(arguments["inputs"])
        opening.check_outputs(names, session, arguments, limit=1)
        names.bind(session, opening.batch_of(session, names, inputs, workload.batch))
        infer = session.infer if not arguments["slowdown"] else slowed(session.infer, arguments["slowdown"])
        pinned = workload.affinity is not None or _pin(arguments["cpus"])
        wall, cpu = np.empty(0, np.int64), np.empty(0, np.int64)
        n = burst = cold = warmup = typical_ns = 0
        gc.collect()
        gc.disable()  # for good: this process only takes turns from now on
        os.write(done, _WORD.pack(0))
        while True:
            word = os.read(go, _WORD.size)
            if not word:
                break
            burst = _WORD.unpack(word)[0]
            if burst == 0:
                typical_ns, warmup = _warm_up(infer, workload.warmup_s)
                cold = int(typical_ns < _COLD_NS)
            else:
                if not wall.size:  # allocated and touched before the first timed inference
                    wall, cpu = (np.full(MOST_TURNS * burst, -1, np.int64) for _ in range(2))
                for _ in range(cold):
                    infer()
                _burst(infer, wall.data, cpu.data, n, burst)
                n += burst
            os.write(done, _WORD.pack(typical_ns))
        environment = session.environment
    np.save(arguments["wall"], wall[:n])
    np.save(arguments["cpu"], cpu[:n])
    return {
        "n": n,
        "warmup": warmup,
        "burst": burst,
        "pinned": pinned,
        "warnings": warnings,
        "load_ns": costs["load_ns"],
        "environment": {
            "machine": machine,
            "stack": {**fingerprint.stack(), **environment, **applied},
            "state": {"before": before, "after": fingerprint.state()},
        },
    }


def slowed(infer: Any, share: float) -> Any:
    """Return *infer* with real work after it: it computes on for *share* of the time that this inference took.

    What ``compare`` and the gate must find when they test themselves.
    """
    clock = time.perf_counter_ns

    def slower() -> None:
        start = clock()
        infer()
        end = clock()
        end += int((end - start) * share)
        while clock() < end:
            pass

    return slower


def _warm_up(infer: Any, seconds: float) -> Tuple[int, int]:
    """Infer for *seconds* and at least three times; return the median time of the later half in ns, and the count."""
    clock = time.perf_counter_ns
    stop = clock() + int(seconds * 1e9)
    times: List[int] = []
    while len(times) < 3 or clock() < stop:
        start = clock()
        infer()
        times.append(clock() - start)
    return max(1, int(np.median(times[len(times) // 2 :]))), len(times)


def _burst(infer: Any, wall: memoryview, cpu: memoryview, start: int, count: int) -> None:
    """Time *count* inferences into *wall* and *cpu* (int64, ns) from *start* on."""
    wall_clock, cpu_clock = time.perf_counter_ns, time.process_time_ns
    for i in range(start, start + count):
        c0 = cpu_clock()
        t0 = wall_clock()
        infer()
        t1 = wall_clock()
        c1 = cpu_clock()
        wall[i] = t1 - t0
        cpu[i] = c1 - c0


def _pin(cpus: Optional[List[int]]) -> bool:
    """Bind every thread of this process to *cpus*; False where that is not offered or not permitted."""
    if cpus is None:
        return False
    try:
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), cpus)
    except OSError:
        return False
    return True


def _idlest(count: int) -> Optional[List[int]]:
    """Return the *count* CPUs that idled most just now, of those that this process may use; None if all are needed."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    if count >= len(usable):
        return None
    before = _idle_ticks()
    time.sleep(_IDLE_S)
    after = _idle_ticks()
    return sorted(usable, key=lambda c: before.get(c, 0) - after.get(c, 0))[:count]


def _idle_ticks() -> Dict[int, int]:
    """Return the ticks that each CPU has idled since the system started; empty where /proc does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("cpu") and not line.startswith("cpu "))
    return {int(row[0][3:]): int(row[4]) + int(row[5]) for row in rows}
