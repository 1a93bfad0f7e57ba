"""The calibration table as a file: round trip, equal bytes, and what is refused in which words."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portcall.calibration.histogram import Accumulator, Histogram
from portcall.calibration.table import MEAN_UNIT, CalibrationTable, Choice, DataRecord, Section, table_sha256
from portcall.targets.agent.contract import Range
from portcall.targets.agent.errors import BadInput, CellFailed

RECORD = DataRecord("calib.npz", None, 0, 90, "d" * 64, 90, {"x": [1, 3]})
NAMES = ("x", "a tensor;with/odd names é", "zero")


def histogram(*values: float) -> Histogram:
    accumulator = Accumulator()
    accumulator.add(np.array(values, np.float32))
    return accumulator.histogram()


def section(graph: str = "a", kind: str = "onnx", **changes: Any) -> Section:
    made = Section(
        kind=kind,
        graph_sha256=graph * 64,
        source_sha256="5" * 64,
        data=RECORD,
        planned=(0, 90),
        observed=((0, 90),),
        histograms={
            NAMES[0]: histogram(-1.5, 0.25, 1 / 3),
            NAMES[1]: histogram(*np.linspace(0.1, 2.0, 500)),
            NAMES[2]: histogram(0.0),
        },
        means={NAMES[1]: np.array([90 << 28, -(45 << 28)])},
        choices={"asymmetric": Choice(dict.fromkeys(NAMES, "mse"), 9, {"auto": 30.5})},
    )
    return replace(made, **changes)


def table(*sections: Section) -> CalibrationTable:
    made = CalibrationTable({})
    for one in sections:
        made = made.with_section(one)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pctable"
    table(section(), section("b", "tflite")).save(path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, **changes: bytes) -> None:
    """Write the table's members again; keys have "0_minimum" for "0/minimum.npy" and "table" for "table.json"."""
    held = members(path)
    for key, value in changes.items():
        held["table.json" if key == "table" else key.replace("_", "/") + ".npy"] = value
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in held.items():
            archive.writestr(name, value)


def array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def refused(path: Path, match: str) -> BadInput:
    with pytest.raises(BadInput, match=match) as caught:
        CalibrationTable.load(path)
    assert str(path) in caught.value.message and caught.value.fix
    return caught.value


def same(left: CalibrationTable, right: CalibrationTable) -> bool:
    def plain(one: CalibrationTable) -> Any:
        return {
            k: (
                {f: getattr(s, f) for f in s.__slots__ if f != "means"},
                {n: m.tolist() for n, m in s.means.items()},
            )
            for k, s in one.sections.items()
        }

    return bool(plain(left) == plain(right))


def test_round_trip_keeps_every_bit(saved: Path) -> None:
    loaded = CalibrationTable.load(saved)
    assert list(loaded.sections) == ["a" * 64, "b" * 64]
    assert same(loaded, table(section(), section("b", "tflite")))
    assert loaded.sections["a" * 64].histograms["x"].counts.dtype == np.int64
    assert loaded.sections["b" * 64].data == RECORD


def test_an_empty_table_and_an_empty_section_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "t.pctable"
    table().save(path)
    assert CalibrationTable.load(path).sections == {}
    nothing = section(histograms={}, means={}, choices={})
    table(nothing).save(path)
    assert CalibrationTable.load(path).sections["a" * 64].ranges("minmax") == {}


def test_equal_tables_are_equal_files(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one.pctable", "two.pctable", "three.pctable"))
    table(section(), section("b")).save(one)
    table(section("b"), section()).save(two)
    CalibrationTable.load(one).save(three)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    assert table_sha256(one) == table_sha256(two)
    table(section(), section("b", data=replace(RECORD, n=91))).save(two)
    assert table_sha256(one) != table_sha256(two)


def test_a_section_of_the_same_graph_replaces_the_old_one() -> None:
    made = table(section(), section(data=replace(RECORD, n=7)))
    assert [s.data.n for s in made.sections.values()] == [7]


def test_ranges_hold_zero_and_channel_means() -> None:
    found = section().ranges("minmax")
    assert found["x"] == Range(-1.5, float(np.float32(1 / 3))) and list(found) == list(NAMES)
    assert found[NAMES[1]] == Range(0.0, 2.0, channel_mean=(1.0, -0.5)) and MEAN_UNIT == 2.0**-28
    assert section().ranges("minmax", symmetric=True)["x"] == Range(-1.5, 1.5, True)


def test_auto_reads_what_was_stored_and_says_how_where_nothing_was() -> None:
    assert section().ranges("auto") == section().ranges("mse")
    with pytest.raises(BadInput, match="holds no choice of methods for symmetric ranges") as caught:
        section().ranges("auto", symmetric=True)
    assert "--auto" in caught.value.fix
    with pytest.raises(BadInput, match="no calibration method 'minmaks'"):
        section().ranges("minmaks")


def shard(start: int, stop: int, *values: float) -> Section:
    means = {"x": np.array([start * 7 + 1])}
    return section(observed=((start, stop),), histograms={"x": histogram(*values)}, means=means, choices={})


def test_shards_add_up_in_any_order() -> None:
    parts = [shard(0, 30, -1.0, 0.5), shard(30, 60, 7.0), shard(60, 90, 0.25, 3e5)]
    whole = parts[2].merged(parts[0]).merged(parts[1])
    assert whole.is_complete and whole.n == 90 and not parts[0].is_complete
    assert whole.histograms["x"] == histogram(-1.0, 0.5, 7.0, 0.25, 3e5)
    assert whole.means["x"].tolist() == [1 + 211 + 421]
    gap = parts[0].merged(parts[2])
    assert not gap.is_complete and gap.observed == ((0, 30), (60, 90)) and gap.n == 60


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"graph_sha256": "b" * 64}, "differ in graph_sha256"),
        ({"data": replace(RECORD, sha256="e" * 64)}, "differ in data"),
        ({"step": 2}, "differ in step"),
        ({"planned": (0, 80)}, "differ in planned"),
        ({"observed": ((29, 60),)}, "overlap: both hold sample 29"),
        ({"histograms": {"y": histogram(1.0)}}, "hold other tensors"),
    ],
)
def test_shards_of_something_else_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        shard(0, 30, 1.0).merged(replace(shard(30, 60, 1.0), **change))
    assert caught.value.fix


def test_a_missing_table_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pctable", tmp_path):
        assert "portcall calibrate" in refused(path, "no calibration table").fix


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04", b"\0" * 4096])
def test_other_files_are_no_tables(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.pctable"
    path.write_bytes(content)
    refused(path, "is not a calibration table")


def test_other_zips_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.pctable"
    with path.open("wb") as stream:
        np.savez(stream, x=np.zeros(3))
    refused(path, "is not a calibration table")


@pytest.mark.parametrize("schema", [0, 1, 3, "2", None])
def test_another_schema_is_refused_by_its_number(saved: Path, schema: Any) -> None:
    listing = json.loads(members(saved)["table.json"])
    rewrite(saved, table=json.dumps({**listing, "schema": schema}).encode())
    refused(saved, f"has schema {schema!r}, this portcall reads 2")


@pytest.mark.parametrize(
    "listing",
    [
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"schema": 2}',
        b'{"schema": 2, "sections": 3}',
        b'{"schema": 2, "sections": [{}]}',
        b'{"schema": 2, "sections": [[]]}',
        b'{"schema": 2, "sections": [{"kind": "onnx", "tensors": 3}]}',
    ],
)
def test_a_malformed_listing_is_no_table(saved: Path, listing: bytes) -> None:
    rewrite(saved, table=listing)
    refused(saved, "is not a calibration table")


@pytest.mark.parametrize(
    "values",
    [
        array([0.0, 0.0]),
        array([[0.0, 0.0, 0.0]]),
        array(np.zeros(3, np.float32)),
        array([np.nan, 0.0, 0.0]),
        array([-np.inf, 0.0, 0.0]),
        array([5.0, 0.0, 0.0]),
        b"not an array",
        b"",
    ],
    ids=["too few", "2-D", "float32", "NaN", "infinite", "above the maximum", "no array", "empty"],
)
def test_ranges_that_are_none_are_refused_on_loading(saved: Path, values: bytes) -> None:
    rewrite(saved, **{"1_minimum": values})
    refused(saved, "is not a calibration table")


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("bins", [1, 2, 0]),
        ("bins", [1, 2, 9000]),
        ("bins", [1, 1, 1]),
        ("exponent", [1, 2, 3000]),
        ("first", [0]),
        ("counts", [-1, 2, 3]),
        ("counts", [0.5, 1.0]),
        ("channels", [3]),
        ("channels", [0]),
        ("means", [1, 2, 3]),
    ],
)
def test_histograms_that_are_none_are_refused_on_loading(saved: Path, member: str, values: Any) -> None:
    rewrite(saved, **{f"0_{member}": array(values)})
    refused(saved, "is not a calibration table")


def test_pickled_arrays_are_never_loaded(saved: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([1, "x", None], dtype=object), allow_pickle=True)
    rewrite(saved, **{"0_maximum": buffer.getvalue()})
    refused(saved, "is not a calibration table")


def test_a_truncated_table_is_refused_wherever_it_was_cut(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in range(0, len(whole), 7):
        saved.write_bytes(whole[:size])
        refused(saved, "is not a calibration table")


def test_a_damaged_byte_is_refused_or_harmless(saved: Path) -> None:
    whole, wanted = saved.read_bytes(), CalibrationTable.load(saved)
    refusals = 0
    for position in range(len(whole)):
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            assert same(CalibrationTable.load(saved), wanted), position
        except BadInput:
            refusals += 1
    assert refusals > len(whole) / 2


def test_a_save_that_fails_leaves_the_old_table(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    original = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        original(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CellFailed, match="No space left on device") as caught:
        table(section("c")).save(saved)
    assert str(saved) in caught.value.message and caught.value.fix
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_table_cannot_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "t.pctable").mkdir()
    with pytest.raises(CellFailed, match="cannot write"):
        table(section()).save(tmp_path / "t.pctable")
    assert [p.name for p in tmp_path.iterdir()] == ["t.pctable"]
