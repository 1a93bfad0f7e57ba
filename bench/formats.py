"""What a bench can be written as: our JSON, other tools' formats, raw samples, plots and the HTML report."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from portcall.bench.formats_google import google_benchmark
from portcall.bench.formats_optimum import CONFIG, REPORT, optimum_config, optimum_report
from portcall.bench.formats_samples import write_csv, write_parquet
from portcall.bench.formats_tracking import bencher_metrics, github_action
from portcall.bench.plots import write_ecdf, write_series, write_tradeoff
from portcall.bench.plotting import IMAGES
from portcall.bench.report_html import write_html
from portcall.bench.saved import SCHEMA, SavedResult, names
from portcall.core import BadInput, CellFailed, UnavailableError

Writer = Callable[[Sequence[SavedResult], Path], None]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write results. write: (results, path) -> None; the path is new, and renamed when it is complete.

    needs: (module, extra of portcall that brings it) or None. suffixes: what the file's name may end in, where that
    chooses the kind of file. folder: it writes a folder. complete: cells without a measurement are shown too.
    """

    meaning: str
    write: Writer
    needs: tuple[str, str] | None = None
    suffixes: tuple[str, ...] = ()
    folder: bool = False
    complete: bool = True


def _dump(build: Callable[[Sequence[SavedResult]], Any], results: Sequence[SavedResult], path: Path) -> None:
    path.write_text(json.dumps(build(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _ours(results: Sequence[SavedResult]) -> dict[str, Any]:
    # The samples stay where they are: what is written elsewhere does not name them.
    return {"schema": SCHEMA, "results": [{k: v for k, v in r.result.items() if k != "raw"} for r in results]}


def _write_optimum(results: Sequence[SavedResult], path: Path) -> None:
    path.mkdir()
    for number, (name, result) in enumerate(zip(names(results), results, strict=True)):
        if not result.measured:
            continue
        folder = path / f"{number:03d}-{_file_name(name)}"
        folder.mkdir()
        for file, value in ((REPORT, optimum_report(result)), (CONFIG, optimum_config(result, name))):
            _dump(lambda _, value=value: value, results, folder / file)  # type: ignore[misc]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in name)[:100]


_PLOT = ("matplotlib", "plot")

FORMATS: dict[str, Format] = {
    "html": Format("a self-contained report: tables, plots, environment, methods", write_html),
    "json": Format("portcall's own JSON; several results become one file", partial(_dump, _ours)),
    "google-benchmark": Format(
        "google-benchmark's JSON, for its tools/compare.py", partial(_dump, google_benchmark)
    ),
    "optimum-benchmark": Format(
        "a folder with benchmark_report.json per artifact", _write_optimum, folder=True, complete=False
    ),
    "bencher": Format("Bencher Metric Format", partial(_dump, bencher_metrics), complete=False),
    "github-action-benchmark": Format(
        "its customSmallerIsBetter list", partial(_dump, github_action), complete=False
    ),
    "csv": Format("raw samples, one row per inference", write_csv),
    "parquet": Format("raw samples, one row per inference", write_parquet, ("pyarrow", "parquet")),
    "plot-ecdf": Format("latency distribution, percentiles marked", write_ecdf, _PLOT, IMAGES),
    "plot-series": Format("latency over time, each process in its shade", write_series, _PLOT, IMAGES),
    "plot-tradeoff": Format(
        "size, latency and accuracy, with the Pareto front", write_tradeoff, _PLOT, IMAGES
    ),
}


def find_format(name: str) -> Format:
    """Return the format called *name*; raise BadInput, with the nearest name, where there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, 1, 0.4)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise BadInput(f"no format {name!r}", f"There are: {', '.join(FORMATS)}{hint}")


def check_write(name: str, path: Path) -> None:
    """Raise unless results can be written to *path* as *name* here: called before anything is measured.

    Raises BadInput for an unknown format or an unusable path, UnavailableError where a package is missing.
    """
    wanted = find_format(name)
    if wanted.suffixes and path.suffix not in wanted.suffixes:
        raise BadInput(
            f"{name} writes no {path.suffix or 'file without a suffix'}",
            f"Name a file of {', '.join(wanted.suffixes)}",
        )
    if wanted.folder and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"{path} exists, {name} writes a folder", "Name a folder that is new or empty")
    if not wanted.folder and path.is_dir():
        raise BadInput(
            f"{path} is a folder, {name} writes a file", f"Name a file, such as {path / 'results'}"
        )
    nearest = next(p for p in path.absolute().parents if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"{path} cannot be written: {nearest} is no writable folder", "Choose another place")
    if wanted.needs is not None:
        module, extra = wanted.needs
        if importlib.util.find_spec(module) is None:
            raise UnavailableError(
                f"{name} needs {module}, which is not installed", f"Run: pip install 'portcall[{extra}]'"
            )


def write_results(results: Sequence[SavedResult], name: str, path: Path) -> dict[str, Any]:
    """Write *results* to *path* as the format called *name*, whole or not at all; return what was written.

    Returns {"format", "path", "results": how many are in it, "left_out": [{"artifact", "backend", "precision",
    "outcome", "reason", "fix"}]}: the cells that the format has no place for. Raises what ``check_write`` does,
    BadInput where nothing of it was measured, and CellFailed where the disk does not take it.
    """
    check_write(name, path)
    wanted = FORMATS[name]
    if not wanted.complete and not any(r.measured for r in results):
        raise BadInput(
            f"nothing was measured, and {name} has no place to say why", "Write html or json instead"
        )
    part = path.with_name(f".part-{path.name}")  # the suffix stays: it chooses the kind of picture
    try:
        _remove(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted.write(results, part)
        if wanted.folder and path.exists():
            path.rmdir()
        part.replace(path)
    except OSError as error:
        raise CellFailed(
            f"cannot write {path}: {error.strerror or error}", "Free space there or choose another place"
        ) from error
    finally:
        _remove(part)
    keys = ("artifact", "backend", "precision", "outcome", "reason", "fix")
    left_out = [{k: r.get(k) for k in keys} for r in results if not (wanted.complete or r.measured)]
    return {"format": name, "path": str(path), "results": len(results) - len(left_out), "left_out": left_out}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
