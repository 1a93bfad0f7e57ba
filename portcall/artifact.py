"""An artifact on disk: a folder that is written whole or not at all, and checked before it is loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from portcall.targets.agent.contract import Artifact
from portcall.targets.agent.errors import BadInput, VerificationFailed

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npz"
EXAMPLE = "example.py"
MAX_SAMPLES = 8
MAX_SAMPLES_BYTES = 1 << 20

VOLATILE = ("created", "seconds", "identity")
"""Manifest keys that do not belong to an artifact's identity."""

_FORM: Mapping[str, type] = {
    "identity": str,
    "backend": str,
    "precision": str,
    "entry": str,
    "files": dict,
    "inputs": list,
    "outputs": list,
    "source.spec": str,
    "source.sha256": str,
    "samples.n": int,
    "samples.sqnr_db": list,
    "parity.samples": str,
    "parity.n": int,
    "arithmetic": dict,
}
"""What a manifest must hold to be read: keys (dotted where nested) and their types."""


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def identity(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical manifest without times and paths."""
    kept = {k: v for k, v in manifest.items() if k not in VOLATILE}
    kept["source"] = {k: v for k, v in manifest["source"].items() if k != "spec"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the artifact in *folder*, checked for form.

    Raises BadInput where it is missing, not JSON, of another schema, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            f"{folder} is not an artifact: it has no {MANIFEST}", "Give a folder written by portcall export"
        ) from error
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror}", "Check the folder's permissions"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}", "Export the artifact again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise BadInput(
            f"{path} has schema {found!r}, this portcall reads {SCHEMA}",
            "Export again, or use the portcall that wrote it",
        )
    for key, kind in _FORM.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise BadInput(f"{path} lacks {key!r}, or it is no {kind.__name__}", "Export the artifact again")
    for name in (manifest["entry"], manifest["backend"], manifest["precision"], *manifest["files"]):
        if not _is_inside(name):
            raise BadInput(
                f"{path} names {name!r}, which is outside the artifact", "Do not use this artifact"
            )
    try:
        from_manifest(folder, manifest)
        hashes = {name: (str(e["sha256"]), int(e["size_bytes"])) for name, e in manifest["files"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is malformed: {error!r}", "Export the artifact again") from error
    inside = {str(parent) for name in hashes for parent in PurePosixPath(name).parents}
    for name in (manifest["entry"], *([SAMPLES] if manifest["samples"]["n"] else [])):
        if name not in hashes and (name == SAMPLES or name not in inside):  # an entry may be a folder
            raise BadInput(f"{path} has no sha256 of {name}", "Export the artifact again")
    return manifest


def _is_inside(name: str) -> bool:
    """Tell whether a name in a manifest is a plain relative path: parts with "/" between them, none of them ".."."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))


def check_output_folder(output: Path) -> None:
    """Raise BadInput unless *output* is a folder or can be made one."""
    if output.exists() and not output.is_dir():
        raise BadInput(f"-o {output} is a file", "Name a folder that is new or empty")
    nearest = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"-o {output} cannot be written: {nearest} is no writable folder", "Choose another -o")


def from_manifest(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    """Return the artifact; its folder is where it was found, whatever the manifest says."""
    options = manifest.get("recipe", {}).get("options", {})
    return Artifact.from_json({**manifest, "directory": str(folder), "options": options})


def open_artifact(folder: Path) -> tuple[Artifact, dict[str, Any]]:
    """Return the artifact in *folder* and its manifest, every file checked against its sha256.

    Raises BadInput where the manifest is unusable, VerificationFailed where a file is missing or changed.
    """
    manifest = read_manifest(folder)
    if manifest["identity"] != identity(manifest):
        raise VerificationFailed(
            f"{folder / MANIFEST} was changed after the export", "Copy or export the artifact again"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.resolve() != folder.resolve() / name:  # a link, or in a linked folder
            raise VerificationFailed(f"{folder} lacks its file {name}", "Copy the artifact again, whole")
        if sha256_file(path) != entry["sha256"]:
            raise VerificationFailed(
                f"{path} is not the file that was exported (sha256 differs)", "Copy or export it again"
            )
    return from_manifest(folder, manifest), manifest


def pack_samples(samples: list[dict[str, np.ndarray[Any, Any]]], path: Path) -> int:
    """Write as many of *samples* as fit in 8 and 1 MB, stacked by key; return how many (0: no file).

    Samples of another shape than the first are left out, since one array holds them all.
    """
    import numpy as np

    shapes = {k: v.shape for k, v in samples[0].items()}
    alike = [s for s in samples if {k: v.shape for k, v in s.items()} == shapes][:MAX_SAMPLES]
    while alike:
        buffer = io.BytesIO()
        stacked: dict[str, Any] = {k: np.stack([s[k] for s in alike]) for k in shapes}
        np.savez_compressed(buffer, **stacked)
        if buffer.tell() <= MAX_SAMPLES_BYTES:
            path.write_bytes(buffer.getvalue())
            return len(alike)
        alike = alike[: len(alike) // 2]
    return 0


def finish(staging: Path, target: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Hash the files in *staging*, write the manifest and move the folder to *target*; return the manifest.

    An artifact that already is at *target* is replaced only once the new one is complete.
    """
    files = sorted(p for p in staging.rglob("*") if p.is_file() and p != staging / MANIFEST)
    manifest["files"] = {
        p.relative_to(staging).as_posix(): {"sha256": sha256_file(p), "size_bytes": p.stat().st_size}
        for p in files
    }
    manifest["identity"] = identity(manifest)
    write_json(staging / MANIFEST, manifest)
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)  # it was made private, as temporary folders are
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left by a command that was killed at this point
        target.replace(replaced)
    try:
        staging.replace(target)
    except OSError:
        if replaced.exists():
            replaced.replace(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Write *value* to *path* whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def model_bytes(manifest: Mapping[str, Any]) -> int:
    """Return the size of what the runtime loads: the entry's, with the files of weights beside it."""
    entry = manifest["entry"]
    loaded = (entry, entry + ".data", Path(entry).with_suffix(".bin").name)
    return sum(
        e["size_bytes"] for n, e in manifest["files"].items() if n in loaded or n.startswith(entry + "/")
    )
