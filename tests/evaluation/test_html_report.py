"""The page says what report.md says, needs no network, and names nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pe_swap.evaluation.comparison import with_ratios
from pe_swap.evaluation.html_report import body, html_report, table
from pe_swap.evaluation.report import write_report
from tests.evaluation.records import COMPARISON, ROWS, compared, probe

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


def test_names_are_text_and_never_tags() -> None:
    rows = [{**ROWS[0], "model": "<script>x</script>"}]
    page = html_report("# A & B\n\n* <b>at</b> 1: **no**\n", {"results": rows, "config": {"a": "</pre><i>"}})
    assert "<h1>A &amp; B</h1>" in page
    assert "<li>&lt;b&gt;at&lt;/b&gt; 1: <b>no</b></li>" in page
    assert "&lt;/pre&gt;&lt;i&gt;" in page
    assert table(["| model | 1 |", "|---|---:|", "| <i> | `a` 2\\* |"])[2] == (
        '<tr><td>&lt;i&gt;</td><td class="number"><code>a</code> 2*</td></tr>'
    )


def test_a_line_is_what_its_first_characters_say() -> None:
    assert body(["## T", "", "text", "* a", "* b", "![p](none.png)"], {}) == [
        "<h2>T</h2>", "<p>text</p>", "<ul>", "<li>a</li>", "<li>b</li>", "</ul>", '<div class="pictures"></div>',
    ]  # fmt: skip
    assert COMPARISON["parts"], "the comparison above has no training log: its page has no such section"
    assert "While training" not in html_report("", {"results": [], **COMPARISON})
