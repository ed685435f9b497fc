"""The pictures and the list: every scheme can be drawn, and what is drawn is the scheme's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pe_swap.__main__ import main
from pe_swap.config import run
from pe_swap.gallery import describe, show
from pe_swap.schemes import SCHEMES
from pe_swap.schemes.alibi import Alibi


@pytest.mark.parametrize("name", SCHEMES.names())
def test_every_scheme_can_be_drawn(name: str, tmp_path: Path) -> None:
    assert run(main, ["show", name, "--heads", "2", "--length", "24", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    if not SCHEMES[name].causal_only:
        assert run(main, ["show", name, "--heads", "2", "--length", "24", "--encoder", "--out", str(tmp_path / "y.png")]) == 0
        assert (tmp_path / "y.png").exists()


def test_lines_are_the_scheme_s_bias() -> None:
    axes = show("alibi", {"slopes": "geometric"}, heads=4, length=16).axes[0]
    for head, line in enumerate(axes.lines):
        expected = -(2.0 ** (-8 * (head + 1) / 4)) * torch.arange(15, -1, -1)
        torch.testing.assert_close(torch.tensor(line.get_ydata()).float(), expected)
    assert len(axes.lines) == 4


def test_a_decoder_s_picture_shows_no_future() -> None:
    shown = torch.as_tensor(show("shaw", {}, heads=2, length=12).axes[0].images[0].get_array().filled(float("nan")))
    assert shown.isnan().equal(torch.ones(12, 12).triu(1).bool())


def test_the_list_names_every_scheme_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["schemes"]) == 0
    text = capsys.readouterr().out
    for name in SCHEMES.names():
        assert f"{name}: {SCHEMES[name].summary}" in text
        for field in dataclasses.fields(SCHEMES[name].Options):
            assert f"    {field.name}: {field.type} = {field.default!r}" in describe(name)
    assert "only differences of positions matter" in describe("alibi")
    assert Alibi.summary in text


def test_bad_input_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["show", "alibbi"]) == 2
    assert "Did you mean 'alibi'?" in capsys.readouterr().err
    assert run(main, ["show", "alibi", "--slope", "press"]) == 2
    assert "unknown option 'slope'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["show", "alibi", "--heads", "0"])
    assert "--heads is 0; it must be from 1 to 4,096" in capsys.readouterr().err
