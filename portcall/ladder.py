"""The parity ladder: source, exported graph, fake-quantized graph and artifact side by side (``portcall debug``).

This is the parent's side: it opens the source again, lowers it, and starts the workers; ``ladder_job`` compares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.core import Artifact, BadInput, CellFailed, Graph, PortcallError, Source, VerificationFailed
from portcall.exporters import get_backend
from portcall.verification import _own_samples
from portcall.workspace import Workspace, lower, open_source

SCHEMA = 1
"""Of what ``debug --json`` prints and of parity.json. 1: artifact, outcome, stages, first_divergence, tensors."""


def run_debug(work: Workspace, folder: Path) -> dict[str, Any]:
    """Return the ladder of the artifact in *folder*, on its own samples.

    Files that no longer are what was exported are compared nevertheless, and said so in "notes": finding out what
    changed is what this is for. Raises BadInput where the manifest is unusable, or the source is missing or has another
    hash. A source that cannot be run here gives "outcome": "unavailable" and "parity": null.
    """
    folder = folder.resolve()
    manifest = artifacts.read_manifest(folder)
    backend = get_backend(manifest["backend"])
    notes = []
    try:
        artifact, _ = artifacts.open_artifact(folder)
    except VerificationFailed as error:
        notes.append(f"not the artifact that was exported: {error.message}")
        artifact = artifacts.from_manifest(folder, manifest)
        if not artifact.path.exists():
            raise BadInput(
                f"{folder} lacks its file {artifact.entry}", "Copy the artifact again, whole"
            ) from error
    samples = _own_samples(work, artifact, manifest)
    try:
        source = _open(work, folder, manifest)
        work.need(backend.name, "export")
        graph = lower(work, source, backend)
        if graph.sha256 != manifest["graph_sha256"]:
            equalized = lower(work, source, backend, equalize=True)
            if equalized.sha256 == manifest["graph_sha256"]:
                graph = equalized
            else:
                notes.append(
                    "lowered again, the source gives another graph than the artifact's: other versions?"
                )
    except BadInput:
        raise
    except PortcallError as error:
        return _nothing(folder, manifest, error, notes)
    return climb(work, artifact, manifest, graph, samples, manifest["samples"]["n"], notes)


def _open(work: Workspace, folder: Path, manifest: Mapping[str, Any]) -> Source:
    spec = manifest["source"]["spec"]
    with np.load(folder / artifacts.SAMPLES) as stored:
        shapes = {t["source"]: stored[t["source"]].shape[1:] for t in manifest["inputs"]}
    try:
        source = open_source(work, spec, shapes)
    except BadInput as error:
        raise BadInput(
            f"debug compares with the source model {spec!r}, which cannot be opened: {error.message}",
            "Put it back there",
        ) from error
    if source.sha256 != manifest["source"]["sha256"]:
        raise BadInput(
            f"the source model {spec!r} has changed since this artifact was exported", "Export it again"
        )
    return source


def climb(
    work: Workspace,
    artifact: Artifact,
    manifest: Mapping[str, Any],
    graph: Graph,
    samples: Path,
    n: int,
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """Return the ladder of *artifact* over the first *n* samples in a folder of ``000000.npz``."""
    notes = list(notes or [])
    place = Path(tempfile.mkdtemp(prefix="ladder-", dir=work.folder))
    backend = get_backend(artifact.backend)
    try:
        try:
            interpret = work.must_interpret(backend)
        except PortcallError:
            if backend.trace is None:
                raise
            interpret = backend.interpret is not None
        job: dict[str, Any] = {
            "artifact": artifact.to_json(),
            "samples": str(samples),
            "directory": str(place),
            "n": n,
            "threads": work.threads,
            "interpret": interpret,
        }
        label = f"{artifact.backend}:{artifact.precision}"
        traced = work.call("portcall.targets.agent.tracing:trace", job, f"trace {label}", artifact.backend)
        calibration = manifest["calibration"] or {}
        job.update(
            graph=graph.to_json(),
            ranges=calibration.get("ranges"),
            recipe=manifest["recipe"],
            traced=traced,
            expected_sqnr_db=manifest["samples"]["sqnr_db"],
        )
        found: dict[str, Any] = work.call("portcall.ladder_job:compare", job, f"compare {label}")
    except BadInput:
        raise
    except PortcallError as error:
        return _nothing(artifact.directory, manifest, error, notes)
    found["notes"] = [*notes, *found["notes"]]
    return {"schema": SCHEMA, **_head(artifact.directory, manifest), "outcome": "compared", **found}


def _head(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"artifact": str(folder), "backend": manifest["backend"], "precision": manifest["precision"]}


def _nothing(
    folder: Path, manifest: Mapping[str, Any], error: PortcallError, notes: list[str]
) -> dict[str, Any]:
    """Return the answer where nothing could be compared: never a pass."""
    outcome = "failed" if isinstance(error, CellFailed | VerificationFailed) else "unavailable"
    return {
        "schema": SCHEMA,
        **_head(folder, manifest),
        "outcome": outcome,
        "reason": error.message,
        "fix": error.fix or None,
        "parity": None,
        "stages": [],
        "first_divergence": None,
        "tensors": [],
        "notes": notes,
    }


def write_parity(output: Path, results: list[dict[str, Any]]) -> None:
    """Write the ladders of an export to ``logs/parity.json`` in its output folder: artifacts stay as they are."""
    reports = [r["parity_report"] for r in results if r.get("parity_report")]
    (output / "logs").mkdir(exist_ok=True)
    artifacts.write_json(output / "logs" / "parity.json", {"schema": SCHEMA, "reports": reports})
