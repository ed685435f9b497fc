"""The page says what report.md says, needs no network, and names nothing unescaped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pe_swap.evaluation.comparison import with_ratios
from pe_swap.evaluation.html_report import body, html_report, table
from pe_swap.evaluation.report import write_report
from tests.evaluation.records import COMPARISON, ROWS, compared, probe, row

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, in order, with what they link to; refuses what is closed in the wrong order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.said: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_page_has_every_table_and_needs_no_network(tmp_path: Path) -> None:
    grid = [probe("passkey", model, length, 0.5, depth=depth) for model in "ab" for length in (64, 128) for depth in (0.0, 1.0)]
    note = {"title": "Find it.", "quantities": {"accuracy": "Share"}, "columns": "length", "averaged": [], "options": {}}
    parts = {"a": {"perplexity": None, "training": {"log": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]}}}
    record: dict[str, Any] = {
        "results": with_ratios(compared(), control=None, unit="perplexity", samples=50, seed=0),
        "probes": grid, "measures": {"passkey": note}, "parts": parts, "config": {"seeds": [0]},
        "versions": {"torch": "2.99"},
    }  # fmt: skip
    write_report(tmp_path, record)
    markdown, content = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    page = Page(content)
    assert page.open == []
    assert page.tags.count("table") == len(re.findall(r"^\|---", markdown, flags=re.MULTILINE))
    assert page.tags.count("tr") == len(re.findall(r"^\|(?!---)", markdown, flags=re.MULTILINE))
    # Perplexity and ratio, a grid per model, the losses of training.
    assert page.tags.count("img") == 2 + 2 + 1
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "url(" not in content
    assert 'name="viewport"' in content
    assert any("torch: '2.99'" in text for text in page.said)
    assert len([cell for cell in page.said if cell.endswith("]*")]) == markdown.count("\\*") > 0


FRAME = """<!doctype html><iframe id="page" src="PAGE" style="width: WIDTHpx; height: 4000px; border: 0"></iframe><pre id="said"></pre>
<script>page.onload = () => { const inside = page.contentDocument; said.textContent = JSON.stringify({
width: page.contentWindow.innerWidth, needed: inside.scrollingElement.scrollWidth,
loaded: [...inside.images].map(image => image.naturalWidth > 0),
fetched: page.contentWindow.performance.getEntriesByType("resource").map(one => one.name).filter(name => !name.startsWith("data:")),
clipped: [...inside.querySelectorAll("body *")].filter(one => !one.closest(".wide, pre")
    && one.getBoundingClientRect().right > page.contentWindow.innerWidth + 1).map(one => one.outerHTML) }) }</script>
"""
"""A page that opens the report as wide as a phone or a desktop, and writes down what its browser made of it."""

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="there is no browser: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_on_a_phone_and_on_a_desktop(width: int, tmp_path: Path) -> None:
    rows = [row("a-model-with-a-label-of-some-length", length, 20.0 + length) for length in (64, 128, 256, 512, 1024, 2048)]
    write_report(tmp_path, {"results": [*compared(), *rows], "config": {"out": "x" * 300}, "versions": {"torch": "2.99"}})
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("PAGE", (tmp_path / "report.html").as_uri()).replace("WIDTH", str(width)))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom"]
    run = subprocess.run([str(BROWSER), *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r'<pre id="said">(.+?)</pre>', run.stdout)
    assert said is not None, run.stderr
    found = json.loads(unescape(said[1]))
    assert (found["width"], found["needed"]) == (width, width), "the page scrolls sideways"
    assert found["loaded"] == [True] * (tmp_path / "report.html").read_text().count("<img ") != []
    assert found["fetched"] == found["clipped"] == []


def test_names_are_text_and_never_tags() -> None:
    rows = [{**ROWS[0], "model": "<script>x</script>"}]
    page = html_report("# A & B\n\n* <b>at</b> 1: **no**\n", {"results": rows, "config": {"a": "</pre><i>"}})
    assert "<h1>A &amp; B</h1>" in page
    assert "<li>&lt;b&gt;at&lt;/b&gt; 1: <b>no</b></li>" in page
    assert "&lt;/pre&gt;&lt;i&gt;" in page
    assert table(["| model | 1 |", "|---|---:|", "| <i> | `a` 2\\* |"])[2] == (
        '<tr><td>&lt;i&gt;</td><td class="number"><code>a</code> 2*</td></tr>'
    )


def test_a_long_table_is_folded_and_an_interval_is_one_word() -> None:
    lines = ["| model | 1 |", "|---|---:|", *["| a | 0.9 [0.8, 1.0]\\* |"] * 17]
    assert table(lines)[0] == "<details><summary>Table of 17 rows</summary>"
    assert table(lines[:-1])[2] == '<tr><td>a</td><td class="number">0.9 [0.8,&nbsp;1.0]*</td></tr>'


def test_a_line_is_what_its_first_characters_say() -> None:
    assert body(["## T", "", "text", "* a", "* b", "![p](none.png)"], {}) == [
        "<h2>T</h2>", "<p>text</p>", "<ul>", "<li>a</li>", "<li>b</li>", "</ul>", '<div class="pictures"></div>',
    ]  # fmt: skip
    assert COMPARISON["parts"], "the comparison above has no training log: its page has no such section"
    assert "While training" not in html_report("", {"results": [], **COMPARISON})
