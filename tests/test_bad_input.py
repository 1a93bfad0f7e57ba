"""What users get wrong: each command line ends with its exit code, a message, a fix, and nothing written.

``{lab}`` in a command line is a folder of spoilt files, ``{out}`` a folder that must not come into being.
Long because it is one table of faults, and the folder that holds them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.artifact import identity

Run = Any  # the fixture of conftest.py
Manifest = dict[str, Any]

SHORT = {"TO": "--to onnxruntime:fp32 -o {out}", "INT8": "--to onnxruntime:int8 -o {out}"}


@pytest.fixture(scope="module")
def lab(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of good and spoilt models, data and artifacts; ``art`` is good."""
    lab = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTCALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        shutil.copy(tiny_onnx, lab / "tiny.onnx")
        _models(lab)
        _data(lab)
        _folders(lab)
        _artifacts(lab)
        _table_of_another_model(lab)
        yield lab


def _models(lab: Path) -> None:
    import onnx

    model = (lab / "tiny.onnx").read_bytes()
    (lab / "text.onnx").write_text("this is a text file\n" * 10)
    (lab / "empty.onnx").write_bytes(b"")
    (lab / "cut.onnx").write_bytes(model[: len(model) // 2])
    (lab / "garbage.pt2").write_bytes(np.random.default_rng(0).bytes(500))
    (lab / "model.tflite").write_bytes(b"x" * 100)
    (lab / "model.bin").write_bytes(b"x" * 100)
    (lab / "folder.onnx").mkdir()

    def external(name: str, location: str = "w.bin") -> Path:
        folder = lab / name
        folder.mkdir()
        onnx.save_model(
            onnx.load(lab / "tiny.onnx"),
            folder / "m.onnx",
            save_as_external_data=True,
            location="w.bin",
            size_threshold=0,
        )
        spoilt = onnx.load(folder / "m.onnx", load_external_data=False)
        for tensor in spoilt.graph.initializer:
            next(e for e in tensor.external_data if e.key == "location").value = location
        (folder / "m.onnx").write_bytes(spoilt.SerializeToString())
        return folder

    (external("ext-missing") / "w.bin").unlink()
    external("ext-absolute", "/etc/passwd")
    shutil.copy(external("ext-parent", "../w.bin") / "w.bin", lab / "w.bin")
    short = external("ext-short") / "w.bin"
    short.write_bytes(short.read_bytes()[:100])
    linked = external("ext-link") / "w.bin"
    linked.unlink()
    linked.symlink_to(lab / "w.bin")

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["ids"], ["y"], "cast", to=onnx.TensorProto.FLOAT)],
        "integers",
        [value("ids", onnx.TensorProto.INT64, ["batch", "length"])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", "length"])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), lab / "integers.onnx")


def _data(lab: Path) -> None:
    x = np.random.default_rng(1).standard_normal((12, 3, 16, 16)).astype(np.float32)

    def save(name: str, **arrays: Any) -> Path:
        np.savez(lab / name, **arrays)
        return lab / name

    good = save("data.npz", x=x)
    save("name.npz", image=x)
    save("shape.npz", x=x[:, :, :8])
    save("dtype.npz", x=(x * 10).astype(np.int32))
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        spoilt = x.copy()
        spoilt[3, 0, 1, 1] = value
        save(f"{name}.npz", x=spoilt)
    save("zero.npz", x=x[:0])
    save("pickle.npz", x=np.array([{}], dtype=object))
    save("labels.npz", x=x, labels=np.arange(3))
    save("ids.npz", ids=np.zeros((3, 7), np.int64))
    (lab / "cut.npz").write_bytes(good.read_bytes()[:20000])
    (lab / "text.npz").write_text("this is a text file")
    (lab / "text.pctable").write_text("this is a text file")
    (lab / "images").mkdir()
    (lab / "images" / "a.png").write_bytes(b"no image")


def _folders(lab: Path) -> None:
    (lab / "empty").mkdir()
    (lab / "full").mkdir()
    (lab / "full" / "notes.txt").write_text("mine")
    (lab / "file").write_text("mine")
    (lab / "photos" / "raw").mkdir(parents=True)
    (lab / "photos" / "raw" / "000-me.npz").write_text("mine")


def _table_of_another_model(lab: Path) -> None:
    import onnx

    model = onnx.load(lab / "tiny.onnx")
    weights = model.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * 2, weights.name))
    onnx.save(model, lab / "twice.onnx")
    command = [sys.executable, "-m", "portcall", "calibrate", str(lab / "twice.onnx")]
    subprocess.run([*command, "--data", str(lab / "data.npz"), "-o", str(lab / "twice.pctable")], check=True)


def _artifacts(lab: Path) -> None:
    command = [sys.executable, "-m", "portcall", "export", str(lab / "tiny.onnx"), "--to", "onnxruntime:int8"]
    done = subprocess.run(
        [*command, "--data", str(lab / "data.npz"), "-o", str(lab / "good")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()

    def artifact(name: str) -> Path:
        shutil.copytree(lab / "good" / "onnxruntime-int8", lab / name)
        return lab / name

    def manifest(name: str, change: Callable[[Manifest], object]) -> None:
        path = artifact(name) / "manifest.json"
        read: Manifest = json.loads(path.read_text())
        change(read)
        with contextlib.suppress(
            KeyError, AttributeError, TypeError
        ):  # malformed: refused before its identity is
            read["identity"] = identity(read)
        path.write_text(json.dumps(read))

    artifact("art")
    with (artifact("art-changed") / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    (artifact("art-lacking") / "model.onnx").unlink()
    linked = artifact("art-linked") / "model.onnx"
    linked.unlink()
    linked.symlink_to(lab / "tiny.onnx")
    (artifact("art-json") / "manifest.json").write_text("{oops")
    (artifact("art-list") / "manifest.json").write_text("[1]")
    manifest("art-schema", lambda m: m.update(schema=99))
    manifest("art-entry", lambda m: m.update(entry="../../etc/passwd"))
    manifest("art-file", lambda m: m["files"].update({"../../etc/passwd": {"sha256": "0", "size_bytes": 1}}))
    manifest("art-precision", lambda m: m.update(precision="../../../tmp/x"))
    manifest("art-directory", lambda m: m.update(directory=str(lab / "art-changed")))
    manifest("art-backend", lambda m: m.update(backend="onnxruntme"))
    manifest("art-unhashed", lambda m: m["files"].pop("model.onnx"))
    manifest("art-unhashed-samples", lambda m: m["files"].pop("samples.npz"))
    manifest("art-mistyped", lambda m: m.update(files={"model.onnx": 3}))
    manifest("art-without-samples", lambda m: m.pop("samples"))
    manifest("art-without-parity", lambda m: m.pop("parity"))
    manifest("art-without-source", lambda m: m.pop("source"))
    manifest("art-sourceless", lambda m: m["source"].update(spec=str(lab / "gone.onnx")))
    manifest("art-other-source", lambda m: m["source"].update(sha256="0" * 64))
    (lab / "other").mkdir()
    shutil.copytree(lab / "art-other-source", lab / "other" / "onnxruntime-int8")


# What is wrong | the command line, then its exit code | parts of the message, then parts of the fix.
TABLE = """
model missing | export nothing.onnx TO
    2 | no model file 'nothing.onnx'
    fix | .pt2; module:factory
model is text | export {lab}/text.onnx TO
    2 | text.onnx' is not an ONNX model
    fix | Export it again
model empty | export {lab}/empty.onnx TO
    2 | empty.onnx' is not an ONNX model
    fix | Export it again
model cut short | export {lab}/cut.onnx TO
    2 | cut.onnx' is not an ONNX model
    fix | Export it again
model is a folder | export {lab}/empty TO
    2 | cannot open; as a model
    fix | model.onnx; module:factory
model.onnx is a folder | export {lab}/folder.onnx TO
    2 | folder.onnx' is not a file
    fix | model.onnx
model is a tflite | export {lab}/model.tflite TO
    2 | model.tflite' as a model
    fix | portcall bench; model.tflite
model of unknown suffix | export {lab}/model.bin TO
    2 | model.bin' as a model
    fix | model.onnx; .pt2
model garbage pt2 | export {lab}/garbage.pt2 TO
    2 | garbage.pt2' is not a readable .pt2
    fix | torch.export.save
external data missing | export {lab}/ext-missing/m.onnx TO
    2 | external data file 'w.bin' is missing
    fix | beside m.onnx
external data absolute | export {lab}/ext-absolute/m.onnx TO
    2 | outside the model's folder; /etc/passwd
    fix | beside it
external data in parent | export {lab}/ext-parent/m.onnx TO
    2 | outside the model's folder; ../w.bin
    fix | beside it
external data linked out | export {lab}/ext-link/m.onnx TO
    2 | outside the model's folder; w.bin
    fix | beside it
external data short | export {lab}/ext-short/m.onnx TO
    2 | 'w.bin' has 100 bytes; needs
    fix | Copy the data file again
factory without module | export no_such_module:factory TO
    2 | cannot import 'no_such_module'
    fix | install it
factory not in module | export tests.models:nothing TO
    2 | 'tests.models' has no 'nothing'
    fix | Define
factory raises | export tests.models:raises TO
    2 | ValueError: the user's own mistake
    fix | Fix that code
factory gives nonsense | export tests.models:returns_nonsense TO
    2 | returned int, not (module,
    fix | model.eval()
factory in training mode | export tests.models:training_mode TO
    2 | in training mode
    fix | Return model.eval()
factory that draws weights anew | export tests.models:new_weights TO
    2 | new_weights() returns other weights each time
    fix | torch.manual_seed
backend unknown | export {lab}/tiny.onnx --to onnxruntme:fp32 -o {out}
    2 | no backend 'onnxruntme'; openvino; tflite
    fix | Did you mean 'onnxruntime'
precision unknown | export {lab}/tiny.onnx --to onnxruntime:int9 -o {out}
    2 | no precision 'int9'
    fix | fp32, fp16, int8-dynamic, int8; Did you mean 'int8'
precision without backend | export {lab}/tiny.onnx --to fp32 -o {out}
    2 | cannot read 'fp32' as BACKEND:PRECISION
    fix | --to onnxruntime:fp32
method unknown | export {lab}/tiny.onnx INT8 --data {lab}/data.npz --method minmx
    2 | no calibration method 'minmx'
    fix | There are: ; minmax; Did you mean 'minmax'
method unknown, unused | export {lab}/tiny.onnx TO --method minmx
    2 | no calibration method 'minmx'
    fix | Did you mean 'minmax'
target unknown | bench {lab}/art --on locl
    2 | no target 'locl'; local
    fix | Did you mean 'local'
preprocess unknown | export {lab}/tiny.onnx INT8 --data {lab}/images --preprocess imagnet
    2 | imagnet; imagenet
    fix | Did you mean 'imagenet'
preprocess not given | export {lab}/tiny.onnx INT8 --data {lab}/images
    2 | images
    fix | preprocess
preprocess for arrays | export {lab}/tiny.onnx INT8 --data {lab}/data.npz --preprocess imagenet
    2 | 'imagenet' is for folders of images
    fix | Leave the preprocessing out
image unreadable | export {lab}/tiny.onnx INT8 --data {lab}/images --preprocess imagenet
    2 | a.png
    fix |
data not given | export {lab}/tiny.onnx INT8
    2 | onnxruntime:int8 needs calibration data
    fix | Run: portcall export; --data
data missing | export {lab}/tiny.onnx INT8 --data {lab}/no.npz
    2 | there is no file or folder; no.npz
    fix | .npz
data of no kind | export {lab}/tiny.onnx INT8 --data whatever
    2 | 'whatever' is no kind of data
    fix | module:callable
data of another name | export {lab}/tiny.onnx INT8 --data {lab}/name.npz
    2 | no data for input 'x'; image
    fix | Rename 'image' to 'x'
data of another shape | export {lab}/tiny.onnx INT8 --data {lab}/shape.npz
    2 | 'x' has shape [3, 8, 16]; float32[batch, 3, 16, 16]
    fix | [3, 16, 16]
data of another dtype | export {lab}/tiny.onnx INT8 --data {lab}/dtype.npz
    2 | 'x' is int32; float32
    fix | Convert it to float32
data with NaN | export {lab}/tiny.onnx INT8 --data {lab}/nan.npz
    2 | sample 3 of input 'x'; NaN; [0, 1, 1]
    fix | Repair
data with infinity | export {lab}/tiny.onnx INT8 --data {lab}/inf.npz
    2 | sample 3 of input 'x'; infinity
    fix | Repair
data without samples | export {lab}/tiny.onnx INT8 --data {lab}/zero.npz
    2 | holds no samples
    fix | at least one
data cut short | export {lab}/tiny.onnx INT8 --data {lab}/cut.npz
    2 | cut.npz is not an .npz file, or was cut off
    fix | numpy.savez
data is text | export {lab}/tiny.onnx INT8 --data {lab}/text.npz
    2 | text.npz is not an .npz file
    fix | numpy.savez
data is a pickle | export {lab}/tiny.onnx INT8 --data {lab}/pickle.npz
    2 | object array (a pickle), which is never loaded
    fix | Store numbers
data without module | export {lab}/tiny.onnx INT8 --data no_such_module:data
    2 | cannot import 'no_such_module'
    fix | install it
eval missing | export {lab}/tiny.onnx TO --eval {lab}/no.npz
    2 | there is no file or folder
    fix | .npz
eval of another name | export {lab}/tiny.onnx TO --eval {lab}/name.npz
    2 | no data for input 'x'
    fix | Rename 'image' to 'x'
eval of another shape | export {lab}/tiny.onnx TO --eval {lab}/shape.npz
    2 | has shape [3, 8, 16]
    fix | [3, 16, 16]
eval with NaN | export {lab}/tiny.onnx TO --eval {lab}/nan.npz
    2 | sample 3 of input 'x'; NaN
    fix | Repair
eval without samples | export {lab}/tiny.onnx TO --eval {lab}/zero.npz
    2 | holds no samples
    fix | at least one
eval cut short | export {lab}/tiny.onnx TO --eval {lab}/cut.npz
    2 | was cut off
    fix | numpy.savez
eval with few labels | export {lab}/tiny.onnx TO --eval {lab}/labels.npz
    2 | labels; shape [3]; 12 samples
    fix | one class index per sample
table missing | export {lab}/tiny.onnx INT8 --table {lab}/no.pctable
    2 | no calibration table; no.pctable
    fix | Run: portcall calibrate
table is text | export {lab}/tiny.onnx INT8 --table {lab}/text.pctable
    2 | text.pctable is not a calibration table
    fix | Calibrate again
table is an npz | export {lab}/tiny.onnx INT8 --table {lab}/data.npz
    2 | data.npz is not a calibration table
    fix | Calibrate again
table of another model | export {lab}/tiny.onnx INT8 --table {lab}/twice.pctable
    2 | twice.pctable was made from another model
    fix | Run: portcall calibrate; tiny.onnx
output has other content | export {lab}/tiny.onnx --to onnxruntime:fp32 -o {lab}/full
    2 | full has other content: notes.txt
    fix | new or empty
output is a file | export {lab}/tiny.onnx --to onnxruntime:fp32 -o {lab}/file
    2 | file is a file
    fix | new or empty
output below a file | export {lab}/tiny.onnx --to onnxruntime:fp32 -o {lab}/file/x
    2 | file/x cannot be written
    fix | another -o
output of another model | export {lab}/tiny.onnx --to onnxruntime:fp32 -o {lab}/other
    2 | holds artifacts of another model: onnxruntime-int8
    fix | new or empty
shape malformed | export {lab}/tiny.onnx TO --shape x=1y3
    2 | 'x=1y3' is not NAME=1x128
    fix |
shape of unknown input | export {lab}/tiny.onnx TO --shape z=1x3x16x16
    2 | names no input 'z'
    fix | x: float32[batch, 3, 16, 16]
shape does not fit | export {lab}/tiny.onnx TO --shape x=1x3x8x8
    2 | x=1x3x8x8 does not fit
    fix | x: float32[batch, 3, 16, 16]
shape of another rank | export {lab}/tiny.onnx TO --shape x=1x3
    2 | x=1x3 does not fit
    fix | x: float32[batch, 3, 16, 16]
dynamic shape unresolved | export {lab}/integers.onnx TO
    2 | the shape of input 'ids' is dynamic
    fix | --shape ids=1x128
bench nothing | bench {lab}/nothing
    2 | no artifact or model file
    fix | portcall export
bench an empty folder | bench {lab}/empty
    2 | empty holds no artifact
    fix | portcall export
bench an unknown suffix | bench {lab}/model.bin
    2 | no backend measures 'model.bin'
    fix | .onnx
bench bad JSON | bench {lab}/art-json
    2 | manifest.json is not valid JSON
    fix | Export the artifact again
bench no manifest | bench {lab}/art-list
    2 | manifest.json has schema None
    fix | Export again
bench another schema | bench {lab}/art-schema
    2 | has schema 99, this portcall reads 1
    fix | portcall that wrote it
bench entry outside | bench {lab}/art-entry
    2 | '../../etc/passwd', which is outside the artifact
    fix | Do not use
bench file outside | bench {lab}/art-file
    2 | '../../etc/passwd', which is outside the artifact
    fix | Do not use
bench precision outside | bench {lab}/art-precision
    2 | '../../../tmp/x', which is outside the artifact
    fix | Do not use
bench unknown backend | bench {lab}/art-backend
    2 | no backend 'onnxruntme'
    fix | Did you mean 'onnxruntime'
bench an unhashed entry | bench {lab}/art-unhashed
    2 | no sha256 of model.onnx
    fix | Export the artifact again
bench unhashed samples | bench {lab}/art-unhashed-samples
    2 | no sha256 of samples.npz
    fix | Export the artifact again
bench a mistyped entry | bench {lab}/art-mistyped
    2 | manifest.json is malformed
    fix | Export the artifact again
bench without samples | bench {lab}/art-without-samples
    2 | manifest.json lacks 'samples.n'
    fix | Export the artifact again
bench without parity | bench {lab}/art-without-parity
    2 | manifest.json lacks 'parity.samples'
    fix | Export the artifact again
bench data of other name | bench {lab}/art --data {lab}/name.npz
    2 | no data for input 'x'
    fix | Rename
bench shape unknown | bench {lab}/tiny.onnx --shape z=1x2
    2 | names no input 'z'
    fix | x: float32[batch, 3, 16, 16]
bench shape misfit | bench {lab}/tiny.onnx --shape x=1x3
    2 | x=1x3 does not fit; x: float32[batch, 3, 16, 16]
    fix |
bench dynamic shape | bench {lab}/integers.onnx
    2 | ids: int64[batch, length]; dynamic
    fix | --shape ids=1x128
bench integers, no data | bench {lab}/integers.onnx --shape ids=1x7
    2 | integer input ids
    fix | --data
bench output is a file | bench {lab}/art -o {lab}/file
    2 | file is a file
    fix |
bench output has other content | bench {lab}/art -o {lab}/photos
    2 | photos has other content: raw
    fix | new or empty
verify nothing | verify {lab}/nothing
    2 | is not an artifact: it has no manifest.json
    fix | portcall export
verify a model | verify {lab}/tiny.onnx
    2 | is not an artifact
    fix | portcall export
verify bad JSON | verify {lab}/art-json
    2 | is not valid JSON
    fix | Export the artifact again
verify another schema | verify {lab}/art-schema
    2 | has schema 99
    fix | portcall that wrote it
verify entry outside | verify {lab}/art-entry
    2 | outside the artifact
    fix | Do not use
verify unknown backend | verify {lab}/art-backend
    2 | no backend 'onnxruntme'
    fix | Did you mean
verify without samples | verify {lab}/art-without-samples
    2 | lacks 'samples.n'
    fix | Export the artifact again
verify without source | verify {lab}/art-without-source
    2 | lacks 'source.spec'
    fix | Export the artifact again
verify eval, source gone | verify {lab}/art-sourceless --eval {lab}/data.npz
    2 | cannot be opened; gone.onnx
    fix | verify without --eval
verify eval, other source | verify {lab}/art-other-source --eval {lab}/data.npz
    2 | has changed since
    fix | Export it again
verify eval missing | verify {lab}/art --eval {lab}/no.npz
    2 | there is no file or folder
    fix | .npz
verify eval with NaN | verify {lab}/art --eval {lab}/nan.npz
    2 | sample 3 of input 'x'
    fix | Repair
calibrate nowhere | calibrate {lab}/tiny.onnx --data {lab}/data.npz -o {out}/t.pctable
    2 | no folder; out
    fix | Create it
calibrate onto a folder | calibrate {lab}/tiny.onnx --data {lab}/data.npz -o {lab}/empty
    2 | is a folder
    fix | table.pctable
calibrate without data | calibrate {lab}/tiny.onnx --data {lab}/no.npz -o {lab}/t.pctable
    2 | there is no file or folder
    fix | .npz
calibrate for nobody | calibrate {lab}/tiny.onnx --data {lab}/data.npz --for tflit -o {lab}/t.pctable
    2 | no backend 'tflit'
    fix | Did you mean 'tflite'
"""


def _cases() -> list[Any]:
    """Return the cases of TABLE as (command line, exit code, parts of the message, parts of the fix)."""
    cases = []
    for case in re.split(r"\n(?=\S)", TABLE.strip()):
        (name, command), (code, message), (_, fix) = [
            [part.strip() for part in line.split("|")] for line in case.splitlines()
        ]
        for word, meaning in SHORT.items():
            command = re.sub(rf"\b{word}\b", meaning, command)
        parts = [[p for p in text.split("; ") if p] for text in (message, fix)]
        cases.append(pytest.param(command, int(code), *parts, id=name))
    return cases


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    return {(str(p.relative_to(folder)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize(("command", "code", "message", "fix"), _cases())
def test_bad_input(
    portcall: Run,
    lab: Path,
    tmp_path: Path,
    command: str,
    code: int,
    message: list[str],
    fix: list[str],
) -> None:
    out = tmp_path / "out"
    before = _listing(lab)
    done = portcall(*(word.format(lab=lab, out=out) for word in command.split()))
    said = done.stderr
    assert done.returncode == code, said
    assert done.stdout == ""
    assert "Traceback" not in said and "internal error" not in said
    problem = next(line for line in said.splitlines() if line.startswith("portcall: "))
    for part in message:
        assert part in problem
    remedy = said.partition(problem)[2]
    for part in fix:
        assert part in remedy
    assert remedy.strip() or not fix
    assert not out.exists()
    assert _listing(lab) == before, "bad input must leave everything as it was"


# ------------------------------------------------------------------------------- not bad input, but a failed cell


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("art-changed", "model.onnx is not the file that was exported (sha256 differs)"),
        ("art-lacking", "lacks its file model.onnx"),
        ("art-linked", "lacks its file model.onnx"),
    ],
)
def test_an_artifact_that_is_not_what_was_exported(portcall: Run, lab: Path, name: str, reason: str) -> None:
    for command in ("bench", "verify"):
        done = portcall(command, lab / name, "--json")
        assert done.returncode == 1
        [result] = json.loads(done.stdout)["results"]
        assert result["outcome"] == "failed" and reason in result["reason"] and "opy" in result["fix"]


def test_a_failed_cell_leaves_the_others_alone(portcall: Run, lab: Path) -> None:
    done = portcall(
        "bench", lab / "art-changed", lab / "art", "--processes", "1", "--min-time", "0.01", "--json"
    )
    assert done.returncode == 1
    outcomes = [r["outcome"] for r in json.loads(done.stdout)["results"]]
    assert outcomes == ["failed", "measurement"]


def test_a_manifest_cannot_send_the_loader_elsewhere(portcall: Run, lab: Path) -> None:
    """Its ``directory`` is not believed: the file that was hashed is the file that is loaded."""
    done = portcall("bench", lab / "art-directory", "--processes", "1", "--min-time", "0.01", "--json")
    assert done.returncode == 0, done.stdout
    from portcall import artifact

    opened, _ = artifact.open_artifact(lab / "art-directory")
    assert opened.directory == lab / "art-directory"


@pytest.mark.parametrize("name", ["text.onnx", "empty.onnx", "model.tflite"])
def test_a_bare_file_that_is_no_model_is_a_failed_cell(portcall: Run, lab: Path, name: str) -> None:
    done = portcall("bench", lab / name, "--json")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["outcome"] == "failed" and result["reason"] and result["latency"] is None


def test_integer_inputs_can_be_measured_with_data(portcall: Run, lab: Path) -> None:
    options = ["--data", lab / "ids.npz", "--processes", "1", "--min-time", "0.01", "--json"]
    done = portcall("bench", lab / "integers.onnx", *options)
    assert done.returncode == 0, done.stdout
    [result] = json.loads(done.stdout)["results"]
    assert result["outcome"] == "measurement"
    assert not any("random" in w for w in result["warnings"])


# ----------------------------------------------------------------------------------- settings, paths of all kinds


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("oops =", "is not valid TOML"),
        ("backends = 3", "something else than [backends.NAME]"),
        ("[backend.onnxruntime]\npython = 'x'", "something else than [backends.NAME]"),
        ("[backends.onxruntime]\npython = 'x'", "no backend 'onxruntime'"),
        ("[backends]\nonnxruntime = 'x'", "[backends.onnxruntime] is not python = PATH"),
        ("[backends.onnxruntime]\npython = 3", "[backends.onnxruntime] is not python = PATH"),
        ("[backends.onnxruntime]\npyton = 'x'", "[backends.onnxruntime] is not python = PATH"),
    ],
)
def test_settings_that_cannot_be_read(portcall: Run, tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "portcall.toml").write_text(text)
    done = portcall("doctor", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("python", ["/no/such/python", "/tmp"])
def test_an_interpreter_that_is_none_is_an_unavailable_cell(portcall: Run, lab: Path, python: str) -> None:
    environment = {**os.environ, "PORTCALL_PYTHON_ONNXRUNTIME": python}
    done = portcall("bench", lab / "art", "--json", env=environment)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["outcome"] == "unavailable"
    assert f"cannot start the interpreter {python}" in result["reason"]
    assert "portcall.toml" in result["fix"] and "PORTCALL_PYTHON" in result["fix"]


def test_an_interpreter_without_numpy_is_an_unavailable_cell(
    portcall: Run, lab: Path, tmp_path: Path
) -> None:
    import venv

    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    done = portcall("bench", lab / "art", "--json", env={**os.environ, "PORTCALL_PYTHON_ONNXRUNTIME": python})
    assert done.returncode == 4
    [result] = json.loads(done.stdout)["results"]
    assert (result["outcome"], result["reason"]) == ("unavailable", f"the interpreter {python} has no numpy")
    assert result["fix"] == f"{python} -m pip install numpy"


def test_paths_with_spaces_and_other_letters_work(portcall: Run, lab: Path, tmp_path: Path) -> None:
    place = tmp_path / "Ünï cödé 模型 'q'"
    place.mkdir()
    shutil.copy(lab / "tiny.onnx", place / "mo dèl.onnx")
    shutil.copy(lab / "data.npz", place / "dä ta.npz")
    out, data = place / "aus gabe", place / "dä ta.npz"
    cells = "onnxruntime:fp32,int8,openvino:int8"
    commands: list[list[str | Path]] = [
        ["calibrate", place / "mo dèl.onnx", "--data", data, "-o", place / "tä ble"],
        ["export", place / "mo dèl.onnx", "--to", cells, "--data", data, "-o", out],
        [
            "export",
            place / "mo dèl.onnx",
            "--to",
            "openvino:int8",
            "--table",
            place / "tä ble",
            "-o",
            place / "ö",
        ],
        ["verify", out / "openvino-int8", "--eval", data],
        [
            "bench",
            out,
            place / "mo dèl.onnx",
            "--processes",
            "1",
            "--min-time",
            "0.01",
            "-o",
            place / "be nch",
        ],
    ]
    for command in commands:
        done = portcall(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((place / "be nch" / "bench.json").read_text())
    assert [r["outcome"] for r in saved["results"]] == ["measurement"] * 4
    example = [sys.executable, str(out / "onnxruntime-int8" / "example.py")]
    ran = subprocess.run(example, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "largest difference" in ran.stdout, ran.stderr
