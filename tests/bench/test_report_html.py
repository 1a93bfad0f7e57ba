"""The HTML report: whole, self-contained, escaped, and with every cell in it."""

from __future__ import annotations

import base64
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from portcall.bench.report_html import html_report, write_html
from portcall.bench.saved import SavedResult, load_results
from tests.saved_benches import measured, samples, save, unavailable

HOSTILE = 'out/"><script>alert(1)</script><img src=x onerror=alert(2)>\x07\u202e'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements, attributes and texts of a page; fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def results(tmp_path: Path) -> list[SavedResult]:
    one, two = samples(), samples(1, n=40, base_ns=4_000_000, seed=1)
    new: dict[str, Any] = {
        "witness": {"tool": "benchmark_app", "p50_ratio": 1.01, "differences": ["copies its inputs"]},
        "per_process": [{"n": 400, "p50_ns": 1e6}, {"n": 400, "p50_ns": 1.1e6, "steady": True}],
        "energy": {"available": False, "reason": "no RAPL here", "fix": None},
        "placement": {"unit": "XNNPACK", "operators": 10, "share": 0.9, "time_share": None, "rest": []},
    }
    scored = {
        "metric": "top1", "n": 500, "reference": 0.978, "value": 0.975, "difference": -0.003, "ci95": [-0.009, 0.002],
    }  # fmt: skip
    hostile = measured(two, artifact=HOSTILE, precision="as is", parity=None, emulated=True)
    cells = [(measured(one, eval=scored, **new), one), (unavailable(), []), (hostile, two)]
    return load_results(save(tmp_path / "b", cells))


@pytest.fixture
def page(results: list[SavedResult], tmp_path: Path) -> Page:
    write_html(results, tmp_path / "r.html")
    return Page((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_nothing_is_loaded_and_nothing_runs(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    }
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:image/svg+xml;base64,").startswith(
                "data:image/svg+xml;base64,"
            )
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy
    assert "url(" not in page.text and "@import" not in page.text


def test_names_are_texts(page: Page) -> None:
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text
    assert "\x07" not in page.text and "\u202e" not in page.text


def test_every_cell_is_there_measured_or_not(page: Page) -> None:
    text = page.text
    assert "2 of 3 cells measured" in text
    assert text.count("ai-edge-litert is not installed") >= 2, "in both tables"
    assert "To do: Run: pip install 'portcall[tflite]'" in text
    assert "1200 in 3 processes" in text and "40 in 1 process" in text
    assert "n=40: no p99 (needs 299)" in text, "the warning"


def test_a_figure_comes_with_its_interval_method_and_environment(
    page: Page, results: list[SavedResult]
) -> None:
    latency = results[0].latency
    low, high = (f"{end / 1e6:.4g}" for end in latency["ci"]["p50_ns"])
    assert f"{latency['p50_ns'] / 1e6:.4g} [{low}, {high}]" in page.text
    assert "60.00 (VmHWM)" in page.text
    assert "top1 97.8 -> 97.5 (-0.3 [-0.9, +0.2]) (n=500)" in page.text
    assert "Some CPU" in page.text and "onnxruntime 1.31.1" in page.text
    assert "38.4 dB, 98.0 % agree (n=64, eval)" in page.text


def test_what_is_new_in_a_result_is_shown(page: Page) -> None:
    for part in (
        "90.0 % of operators on XNNPACK",
        "benchmark_app",
        "copies its inputs",
        "no RAPL here",
        "1.1e+06",
    ):
        assert part in page.text


def test_what_is_emulated_says_so(page: Page) -> None:
    assert "(emulated)" in page.text


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    pictures = page.all("img")
    if not pictures:
        pytest.skip("matplotlib is not installed: pip install 'portcall[plot]'")
    assert len(pictures) == 3
    assert "onnxruntime:int8: p50" in (pictures[0]["alt"] or "")
    for picture in pictures:
        source = picture["src"] or ""
        root = ET.fromstring(base64.b64decode(source.partition(",")[2]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_without_matplotlib_the_tables_stay(
    results: list[SavedResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    page = Page(html_report(results))
    assert not page.all("img")
    assert "pip install 'portcall[plot]'" in page.text and "1200 in 3 processes" in page.text


def test_figures_without_samples_still_make_a_report(results: list[SavedResult]) -> None:
    bare = [SavedResult(r.result, r.origin, None) for r in results]
    page = Page(html_report(bare))
    assert "raw samples are not beside the results" in page.text and "1200 in 3 processes" in page.text


def test_nothing_measured_is_a_report_too(tmp_path: Path) -> None:
    page = Page(html_report(load_results(save(tmp_path / "b", [(unavailable(), [])]))))
    assert "0 of 1 cells measured" in page.text and "not installed" in page.text


def test_two_machines_are_told_apart(tmp_path: Path) -> None:
    wall = samples()
    other: dict[str, Any] = {"machine": {"cpu_model": "Another CPU"}, "stack": None}
    cells = [(measured(wall), wall), (measured(wall, precision="fp32", environment=other), wall)]
    page = Page(html_report(load_results(save(tmp_path / "b", cells))))
    assert "2 machines: their figures do not compare" in page.text
    assert "machine of onnxruntime:int8" in page.text and "machine of onnxruntime:fp32" in page.text
