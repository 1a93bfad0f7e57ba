"""Verifies an artifact that is on disk: hashes, then outputs against the source's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from portcall import artifact as artifacts
from portcall.accuracy import Accuracy, Scored, check_budget
from portcall.calibration.input_statistics import InputStatistics, compare
from portcall.core import Artifact, BadInput, Outcome, PortcallError, VerificationFailed, outcome_of
from portcall.exporters import get_backend
from portcall.targets.agent.opening import deviation
from portcall.workspace import DataArgument, Workspace, open_source, read_data, run_reference


def run_verify(
    work: Workspace, folder: Path, evaluation: DataArgument | None, accuracy: Accuracy
) -> dict[str, Any]:
    """Return the result of ``verify``; its outcome is "failed" where the artifact is not what was exported.

    Without --eval the artifact's own samples and the stored outputs of the source are used. With --eval the source
    model named in the manifest is opened again; it must still have the same hash.
    """
    start = time.perf_counter()
    accuracy.check()
    if evaluation is None:
        accuracy.check_labels("example", labels=False)
    folder = folder.resolve()
    manifest = artifacts.read_manifest(folder)
    get_backend(manifest["backend"])
    result: dict[str, Any] = {
        "backend": manifest["backend"],
        "precision": manifest["precision"],
        "outcome": Outcome.ARTIFACT.value,
        "error_kind": None,
        "reason": None,
        "fix": None,
        "path": str(folder),
        "size_bytes": artifacts.model_bytes(manifest),
        "seconds": None,
        "parity": None,
        "eval": None,
        "arithmetic": manifest["arithmetic"],
    }
    try:
        artifact, _ = artifacts.open_artifact(folder)
        interpret = work.must_interpret(get_backend(artifact.backend))
        scored: Scored | None = None
        if evaluation is None:
            samples = _own_samples(work, artifact, manifest)
        else:
            samples, scored = _evaluation_samples(work, artifact, manifest, evaluation, accuracy)
        outputs = None if scored is None else scored.place()
        expected = manifest["samples"]["sqnr_db"] if evaluation is None else []
        job = {
            "artifact": artifact.to_json(),
            "samples": str(samples),
            "outputs": outputs,
            "head": len(expected),
            "threads": work.threads,
            "interpret": interpret,
        }
        label = f"verify {artifact.backend}:{artifact.precision}"
        found = work.call("portcall.targets.agent.jobs:verify", job, label, artifact.backend)
        result["parity"] = found["parity"]
        if scored is not None:
            result["eval"] = scored.evaluate(outputs)
            for sentence in (result["eval"] or {}).get("warnings", ()):
                work.reporter.warn(sentence)
            check_budget(result["eval"], result["parity"])
        problem = deviation(expected, found["head_sqnr_db"])
        if problem is not None:
            raise VerificationFailed(
                problem, "Compare this runtime's version with the manifest's: it computes something else"
            )
    except BadInput:
        raise
    except PortcallError as error:
        result.update(
            outcome=outcome_of(error).value,
            error_kind=error.kind,
            reason=error.message,
            fix=error.fix or None,
        )
    result["seconds"] = round(time.perf_counter() - start, 3)
    return result


def _own_samples(work: Workspace, artifact: Artifact, manifest: dict[str, Any]) -> Path:
    """Unpack samples.npz into one file per sample, as the verify job reads them."""
    n = manifest["samples"]["n"]
    if not n:
        raise BadInput("this artifact carries no samples (one is above 1 MB)", "Give --eval DATA")
    folder = work.folder / "own-samples"
    folder.mkdir()
    with np.load(artifact.directory / artifacts.SAMPLES) as stored:
        arrays = {k: stored[k] for k in stored.files}
    for number in range(n):
        sample: dict[str, Any] = {k: v[number] for k, v in arrays.items()}
        np.savez(folder / f"{number:06d}.npz", **sample)
    index = {"n": n, "labelled": False, "samples": manifest["parity"]["samples"]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _evaluation_samples(
    work: Workspace,
    artifact: Artifact,
    manifest: dict[str, Any],
    evaluation: DataArgument,
    accuracy: Accuracy,
) -> tuple[Path, Scored]:
    """Run the source model on --eval and score it; warn where that DATA is unlike the artifact's own samples."""
    spec = manifest["source"]["spec"]
    try:
        source = open_source(work, spec, {})
    except BadInput as error:
        raise BadInput(
            f"--eval compares with the source model {spec!r}, which cannot be opened: {error.message}",
            "Put it back there, or verify without --eval",
        ) from error
    if source.sha256 != manifest["source"]["sha256"]:
        raise BadInput(
            f"the source model {spec!r} has changed since this artifact was exported", "Export it again"
        )
    record, found = read_data(work, source, evaluation, "--eval", classes=accuracy.metric is None)
    warnings = compare(
        _own_statistics(artifact, manifest), found["statistics"], ("the artifact's samples", "--eval")
    )
    sentence = accuracy.check_labels("eval", found["labels"])
    folder = run_reference(work, source, "eval", record.n, record)
    scored = Scored(work, source, accuracy, folder)
    for warning in (*warnings, *([] if sentence is None else [sentence]), *scored.warnings):
        work.reporter.warn(warning)
    return folder, scored


def _own_statistics(artifact: Artifact, manifest: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Return the statistics of the artifact's own samples; empty where it has none that were given."""
    if not manifest["samples"]["n"] or manifest["parity"]["samples"] not in ("eval", "held-out"):
        return {}
    found = {}
    with np.load(artifact.directory / artifacts.SAMPLES) as stored:
        for tensor in artifact.inputs:
            statistics = InputStatistics()
            for array in stored[tensor.source]:
                statistics.add(array)
            found[tensor.source] = statistics.summary()
    return found
