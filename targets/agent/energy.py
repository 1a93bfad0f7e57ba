"""Energy counters of this machine, each read as joules since an arbitrary start: RAPL and NVML.

One more kind (a battery's charge counter over adb, an INA219 on a board) is one more function in ``FINDERS``: it
returns counters, or Absent with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

from portcall.targets.agent import nvml
from portcall.targets.agent.cgroups import read
from portcall.targets.agent.nvml import Absent

_ROOT = Path("/")
_POWERCAP = "sys/class/powercap"


@dataclass(frozen=True)
class Counter:
    """A counter of energy.

    read_j(): joules, growing; raises OSError. range_j: where it wraps around to 0, None if it does not.
    update_s: how often the hardware updates it, at least: a window should be much longer.
    """

    name: str
    method: str
    read_j: Callable[[], float]
    range_j: Optional[float]
    update_s: float


def rapl(root: Path = _ROOT) -> Union[List[Counter], Absent]:
    """Return the counters of RAPL: every package, and its memory where that is counted apart.

    Zones inside a package (core, uncore) and psys are part of others and left out. The counter is in microjoules and
    wraps at max_energy_range_uj. Source: the kernel's Documentation/power/powercap/powercap.rst.
    """
    found = []
    for zone in sorted((root / _POWERCAP).glob("intel-rapl:*")):
        name = read(zone, "name")
        if name is None or not (name.startswith("package") or name == "dram"):
            continue
        size = read(zone, "max_energy_range_uj")
        counter = Counter(
            "%s %s" % (zone.name, name),
            "RAPL",
            _microjoules(zone / "energy_uj"),
            int(size) / 1e6 if size and size.isdigit() else None,
            0.001,
        )
        try:
            counter.read_j()
        except PermissionError:
            return Absent(
                "RAPL is here, but only root may read it (since Linux 5.10)",
                "Run as root, or: sudo chmod a+r %s/*/energy_uj" % (root / _POWERCAP),
            )
        except (OSError, ValueError):
            continue
        found.append(counter)
    if not found:
        return Absent("no RAPL counter in /sys/class/powercap (not this CPU, or a virtual machine)")
    return found


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def gpus(root: Path = _ROOT) -> Union[List[Counter], Absent]:
    """Return the counters of NVIDIA GPUs (Volta and later): of the whole board."""
    if not (root / "proc/driver/nvidia").exists():
        return Absent("no NVIDIA driver in /proc")
    library = nvml.open_library()
    if isinstance(library, Absent):
        return library

    def reader(handle: Any) -> Callable[[], float]:
        def joules() -> float:
            try:
                return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
            except library.NVMLError as error:
                raise OSError(str(error)) from error

        return joules

    found = [Counter("gpu%d" % i, "NVML", reader(h), None, 0.1) for i, h in nvml.handles(library)]
    try:
        for counter in found:
            counter.read_j()
    except OSError as error:
        return Absent("this GPU counts no energy: %s" % error)
    return found or Absent("NVML shows no GPU")


FINDERS: Mapping[str, Callable[[Path], Union[List[Counter], Absent]]] = {"RAPL": rapl, "NVML": gpus}

ON_GPU = ("tensorrt", "tensorrt_rtx")
"""Backends that compute on the GPU; of the others its energy is none of theirs."""


def kinds_of(backend: str) -> Tuple[str, ...]:
    """Return the kinds of counters that concern a backend."""
    return ("RAPL", "NVML") if backend in ON_GPU else ("RAPL",)


def find(root: Path = _ROOT, kinds: Sequence[str] = ("RAPL", "NVML")) -> Union[List[Counter], Absent]:
    """Return every counter of these kinds, or Absent with the reasons of all."""
    counters: List[Counter] = []
    absent: List[Absent] = []
    for kind in kinds:
        found = FINDERS[kind](root)
        if isinstance(found, Absent):
            absent.append(found)
        else:
            counters += found
    if counters:
        return counters
    fix = next((a.fix for a in absent if a.fix.startswith("Run as root")), "")
    return Absent(
        "; ".join(a.reason for a in absent),
        fix
        or "Measure on a machine with a counter (bare metal with RAPL, an NVIDIA GPU), or with a power meter",
    )


def used_j(before: float, after: float, range_j: Optional[float]) -> float:
    """Return the joules between two readings; a counter that went back has wrapped around once.

    Raises OSError where it went back and has no range: it was reset.
    """
    if after >= before:
        return after - before
    if range_j is None:
        raise OSError("the counter went back from %g to %g J: it was reset" % (before, after))
    return after - before + range_j


@dataclass
class Meter:
    """Adds up counters over one window; ``poll`` at least once per wrap (minutes at any real power)."""

    counters: List[Counter]
    joules: Mapping[str, float] = field(default_factory=dict)

    def start(self) -> None:
        self._last = {c.name: c.read_j() for c in self.counters}
        self.joules = {c.name: 0.0 for c in self.counters}

    def poll(self) -> float:
        """Return the joules of all counters since ``start``. Raises OSError."""
        now = {c.name: c.read_j() for c in self.counters}
        self.joules = {
            c.name: self.joules[c.name] + used_j(self._last[c.name], now[c.name], c.range_j)
            for c in self.counters
        }
        self._last = now
        return sum(self.joules.values())
