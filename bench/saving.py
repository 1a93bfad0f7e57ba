"""Saves a bench: ``bench.json`` and the raw samples of each result beside it (``saved.py`` reads them)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.core import BadInput, CellFailed


def check_output(output: Path) -> None:
    """Raise BadInput where *output* holds what is not an earlier bench's."""
    artifacts.check_output_folder(output)
    if (output / "raw").exists() and not (output / "bench.json").exists():  # it would be replaced
        raise BadInput(f"-o {output} has other content: raw", "Name a folder that is new or empty")


def save(
    output: Path, raw_arrays: Sequence[tuple[str, Mapping[str, Any]]], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write ``bench.json`` and, per result (its label), its raw arrays; return the results, which name them in "raw".

    Those of an earlier bench stay until the new ones are complete. Raises CellFailed where the disk does not take them.
    """
    raw, part = output / "raw", output / ".raw.part"
    names = [f"{i:03d}-{label.replace(':', '-')}.npz" for i, (label, _) in enumerate(raw_arrays)]
    saved = [{**result, "raw": f"raw/{name}"} for result, name in zip(results, names, strict=True)]
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, (_, arrays) in zip(names, raw_arrays, strict=True):
            np.savez_compressed(part / name, **arrays)
        raw.mkdir(exist_ok=True)
        for old in raw.glob("[0-9][0-9][0-9]-*.npz"):  # of an earlier bench; anything else is the user's
            old.unlink()
        for new in part.iterdir():
            new.replace(raw / new.name)
        artifacts.write_json(output / "bench.json", {"schema": 1, "results": saved})
    except OSError as error:
        raise CellFailed(
            f"cannot write {output}: {error.strerror}", "Free space there or choose another -o"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return saved
