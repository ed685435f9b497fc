"""The pictures and the list: every scheme can be drawn, and what is drawn is the scheme's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pe_swap.__main__ import main
from pe_swap.commands.gallery import HEAD_DIM, describe, drawable, show, show_on_a_grid, show_several
from pe_swap.errors import OptionError
from pe_swap.runs.command_line import run
from pe_swap.schemes import SCHEMES
from pe_swap.schemes.alibi import Alibi


@pytest.mark.parametrize("name", SCHEMES.names())
def test_every_scheme_can_be_drawn(name: str, tmp_path: Path) -> None:
    assert run(main, ["show", name, "--heads", "2", "--length", "24", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    if not SCHEMES[name].causal_only:
        assert run(main, ["show", name, "--heads", "2", "--length", "24", "--encoder", "--out", str(tmp_path / "y.png")]) == 0
        assert (tmp_path / "y.png").exists()


def test_a_grid_s_picture_is_the_attention_that_positions_give_one_patch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, ["show", "all", "--axes", "2", "--length", "36", "--heads", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    figure = show_on_a_grid(["alibi"], {"slopes": "geometric"}, heads=2, side=6)
    rows, columns = torch.arange(6)[:, None], torch.arange(6)[None, :]
    distance = ((rows - 2).abs() + (columns - 3).abs()).float()
    for panel, slope in zip(figure.axes[:2], (2.0**-4, 2.0**-8), strict=True):
        expected = (-slope * distance).flatten().softmax(0).view(6, 6)
        torch.testing.assert_close(torch.as_tensor(panel.images[0].get_array().data), expected)
    assert run(main, ["show", "xpos", "--axes", "2", "--out", str(tmp_path / "y.png")]) != 0
    assert "xpos is defined along one axis" in capsys.readouterr().err


def test_an_encoder_s_form_that_does_not_exist_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = r"xpos is defined for decoders only, so it has no two-sided form to draw\. Leave --encoder out\."
    with pytest.raises(OptionError, match=rule):
        show("xpos", {}, is_causal=False)
    with pytest.raises(OptionError, match=rule):
        show_several(["rope", "xpos"], is_causal=False)
    assert run(main, ["show", "xpos", "--encoder", "--out", str(tmp_path / "x.png")]) != 0
    assert "xpos is defined for decoders only" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_lines_are_the_scheme_s_bias() -> None:
    axes = show("alibi", {"slopes": "geometric"}, heads=4, length=16).axes[0]
    for head, line in enumerate(axes.lines):
        expected = -(2.0 ** (-8 * (head + 1) / 4)) * torch.arange(15, -1, -1)
        torch.testing.assert_close(torch.tensor(line.get_ydata()).float(), expected)
    assert len(axes.lines) == 4


def pictures() -> list[Figure]:
    one = [show(name, {}, heads=2, length=8) for name in SCHEMES.names()]
    grids = [show_on_a_grid(names, {}, heads=2, side=4) for names in (["rope"], ["t5"], ["rope", "t5", "shaw", "fire", "none"])]
    two = [show("alibi", {"slopes": "geometric", "logit_scale": "log_n"}, heads=2, length=8, is_causal=False)]
    return [*one, *two, *grids, *(show_several(drawable()[:panels], heads=2, length=8) for panels in (1, 2, 3, 5))]


def test_titles_stay_within_their_pictures() -> None:
    for figure in pictures():
        figure.canvas.draw()
        title = figure._suptitle
        box = title.get_window_extent()
        assert box.x0 >= 0, title.get_text()
        assert box.x1 <= figure.bbox.width, title.get_text()


@pytest.mark.parametrize(("name", "options", "lines"), [("t5", {}, 1), ("kerple", {}, 1), ("kerple", {"start": "random"}, 3)])
def test_heads_that_are_alike_are_one_line_that_says_so(name: str, options: dict[str, str], lines: int) -> None:
    axes = show(name, options, heads=3, length=16).axes[0]
    assert len(axes.lines) == lines
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == (["each of 3 heads"] if lines == 1 else ["head 0", "head 1", "head 2"])


def test_a_decoder_s_picture_shows_no_future() -> None:
    shown = torch.as_tensor(show("shaw", {}, heads=2, length=12).axes[0].images[0].get_array().filled(float("nan")))
    assert shown.isnan().equal(torch.ones(12, 12).triu(1).bool())


@pytest.mark.parametrize("name", ["rope", "rerope"])
def test_a_rotation_s_picture_is_the_score_with_all_that_the_scheme_adds(name: str) -> None:
    drawn = torch.tensor(show(name, {}, heads=1, length=24).axes[0].lines[0].get_ydata()).double()
    distance = torch.arange(24, dtype=torch.float64).clamp(max=12 if name == "rerope" else 23)  # half the trained length
    frequencies = 10_000 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    torch.testing.assert_close(drawn, (distance[:, None] * frequencies).cos().mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("alibi", {"logit_scale": "log_n"}, lambda n: (n.log() / math.log(24)).clamp(min=1)),
        ("none", {"temperature": "log"}, lambda n: 1 + 0.1 * (n / 24).clamp(min=1).log()),
    ],
)
def test_a_factor_on_queries_has_a_panel(name: str, options: dict[str, str], formula: Callable[[Tensor], Tensor]) -> None:
    panels = show(name, options, heads=2, length=24).axes
    assert len(panels) == (2 if name == "alibi" else 1)
    drawn = torch.tensor(panels[-1].lines[0].get_ydata()).double()
    torch.testing.assert_close(drawn, formula(torch.arange(1, 8 * 24 + 1, dtype=torch.float64)), atol=1e-6, rtol=0)


def test_several_schemes_have_a_panel_each_in_the_order_given() -> None:
    figure = show_several(["t5", "none", "rerope", "sinusoidal"], heads=2, length=12)
    named = [axes for axes in figure.axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in named] == ["t5", "rerope", "sinusoidal"]  # a curve with its bias: one panel
    assert [len(axes.lines) for axes in named] == [1, 2, 0]  # heads that start alike; a curve and its zero
    with pytest.raises(OptionError, match="None of none, none has anything to draw"):
        show_several(["none", "none"])


def test_all_are_those_that_act_on_something_alike_ones_together(tmp_path: Path) -> None:
    assert set(SCHEMES.names()) - set(drawable()) == {"none"}
    assert set(drawable(is_causal=False)) == {name for name in drawable() if not SCHEMES[name].causal_only}
    assert run(main, ["show", "all", "--heads", "1", "--length", "8", "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    hooks = [
        sorted(SCHEMES[name].hooks_for(SCHEMES[name].Options()) - {"extra_key_channels", "score_bias"}) for name in drawable()
    ]
    groups = [group for previous, group in zip([None, *hooks], hooks, strict=False) if group != previous]
    assert groups == [["encode"], ["embed"], ["transform_query_key"], ["relative_bias"], []]


def test_several_pictures_go_to_one_file_and_take_no_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(main, ["show", "alibi", "rope", "--heads", "1", "--length", "8"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gallery.png"]
    with pytest.raises(SystemExit):
        main(["show", "alibi", "rope", "--slopes", "press"])
    assert "several schemes are drawn with their defaults; draw one to set its options" in capsys.readouterr().err


def test_the_list_names_every_scheme_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["schemes"]) == 0
    text = capsys.readouterr().out
    for name in SCHEMES.names():
        assert f"{name}: {SCHEMES[name].summary}" in text
        for field in dataclasses.fields(SCHEMES[name].Options):
            assert f"    {field.name}: {field.type} = {field.default!r}" in describe(name)
    assert (
        "any length; a cached pass equals an uncached one; nothing to train; only differences of positions matter]"
        in describe("alibi")
    )
    learned = "as long as its table; a cached pass equals an uncached one; trained; starts from the model's own table]"
    assert learned in describe("learned")
    assert Alibi.summary in text


def test_bad_input_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["show", "alibbi"]) == 2
    assert "Did you mean 'alibi'?" in capsys.readouterr().err
    assert run(main, ["show", "alibi", "--slope", "press"]) == 2
    assert "unknown option 'slope'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["show", "alibi", "--heads", "0"])
    assert "--heads is 0; it must be from 1 to 4,096" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing/alibi.png", "alibi.word"])
def test_a_picture_that_cannot_be_written_is_a_wrong_argument(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["show", "alibi", "--length", "8", "--out", str(tmp_path / name)])
    assert "--out is" in capsys.readouterr().err
