"""What schemes are, as text and as pictures: `python -m pe_swap schemes` and `python -m pe_swap show`."""

from __future__ import annotations

import dataclasses
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.families.native import PatchLayout
from pe_swap.schemes import SCHEMES, Geometry, Native, Scheme, build_options
from pe_swap.schemes.base import on_a_grid
from pe_swap.schemes.per_axis import built, resolved
from pe_swap.schemes.positions import Positions, slots_from

HEAD_DIM = 64
"""Width of a head in pictures, as in GPT-2 and BERT."""

COLUMNS = 4
"""Panels side by side in a picture of several schemes."""

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def describe(name: str) -> str:
    """Return a scheme as lines of text: what it is, its options with types and defaults, its hooks, what it claims.

    Raises:
        UnknownNameError: no scheme has that name.
    """
    scheme = SCHEMES[name]
    lines = [f"{name}: {scheme.summary}"]
    for field in dataclasses.fields(scheme.Options):
        own = f" (the model's own, else {field.metadata['native_or']!r})" if "native_or" in field.metadata else ""
        lines.append(f"    {field.name}: {field.type} = {field.default!r}{own}")
    built = build(name, {}, heads=12, length=32, is_causal=True)
    return "\n".join([*lines, f"    [with its defaults: {'; '.join(claims(built))}]"])


def markdown_table() -> str:
    """Return every scheme as a row of a Markdown table: the README's."""
    lines = ["| scheme | what it is | options, with their defaults |", "|---|---|---|"]
    for name in SCHEMES.names():
        scheme = SCHEMES[name]
        own = [
            field for field in dataclasses.fields(scheme.Options) if not field.kw_only
        ]  # what every scheme takes is keyword-only
        options = ", ".join(f"`{field.name}={field.metadata.get('native_or', field.default)!r}`" for field in own)
        lines.append(f"| `{name}` | {scheme.summary}{' (decoders only)' if scheme.causal_only else ''} | {options} |")
    return "\n".join(lines)


def claims(scheme: Scheme) -> list[str]:
    """Return what a scheme says of itself, in words."""
    found = [
        f"acts through {', '.join(sorted(scheme.hooks)) or 'nothing'}",
        "decoders only" if scheme.causal_only else "decoders and encoders",
        "any length" if scheme.max_length is None else "as long as its table",
        "a cached pass equals an uncached one" if scheme.cached_equals_uncached else "a cached pass differs from an uncached one",
        "trained" if next(scheme.parameters(), None) is not None else "nothing to train",
    ]
    if scheme.shift_invariant:
        found.append("only differences of positions matter")
    if scheme.starts_from_table:
        found.append("starts from the model's own table")
    return found


def build(name: str, options: dict[str, Any], *, heads: int, length: int, is_causal: bool, sides: tuple[int, ...] = ()) -> Scheme:
    """Return a scheme for pictures: of one layer, and with random parameters where they would start at zero.

    Args:
        name: the scheme.
        options: its options.
        heads: attention heads.
        length: trained length, in positions.
        is_causal: a decoder's form, or an encoder's.
        sides: rows and columns of a grid; empty for a row of positions.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, or breaks its rule; or an encoder's form, or a grid's, of a scheme that has none.
    """
    if sides and SCHEMES[name].on_a_grid is None:
        raise OptionError(f"{name} is defined along one axis, so it has no grid to draw. Choose one of {', '.join(on_a_grid())}.")
    if SCHEMES[name].causal_only and not is_causal:
        raise OptionError(f"{name} is defined for decoders only, so it has no two-sided form to draw. Leave --encoder out.")
    torch.manual_seed(0)
    geometry = Geometry(heads * HEAD_DIM, heads, HEAD_DIM, 1, is_causal, length, sides=sides)
    table = torch.randn(length, geometry.hidden_size).cumsum(0) * 0.02  # stands for a trained table: near positions are alike
    if sides:
        rows, columns = (table[:side] for side in sides)
        table = (rows[:, None] + columns.flip(-1)[None, :]).flatten(0, 1)
    given = build_options(SCHEMES[name].Options, options)
    scheme = built(SCHEMES[name], resolved(given, SCHEMES[name].on_a_grid, geometry, Native(table=table)), geometry, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheme.start_from(Native(table=table))
    with torch.no_grad():
        for parameter in scheme.parameters():
            if not parameter.any():
                # of the size of a projection that keeps sizes, or sums over a whole hidden state would drown the rest
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return scheme.eval()


@torch.no_grad()
def show(name: str, options: dict[str, Any], *, heads: int = 12, length: int = 256, is_causal: bool = True) -> Figure:
    """Return a picture of what a scheme does: a panel for each hook it uses.

    Args:
        name: the scheme.
        options: its options.
        heads: attention heads.
        length: positions drawn.
        is_causal: a decoder's form, or an encoder's.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, or breaks its rule.
    """
    scheme = build(name, options, heads=heads, length=length, is_causal=is_causal)
    panels = panels_of(scheme)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.8), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for panel, hook in zip(axes, panels, strict=False):
            PANELS[hook](panel, figure, scheme, length)
            if panel.get_legend_handles_labels()[1]:
                panel.legend(fontsize=6, frameon=False, ncols=2)
        if not panels:
            axes[0].text(0.5, 0.5, "nothing to draw", ha="center", va="center")
            axes[0].set_axis_off()
        chosen = ", ".join(f"{option}={value}" for option, value in options.items())
        title = f"{name}{f' ({chosen})' if chosen else ''}: {scheme.summary}"
        figure.suptitle(textwrap.fill(title, 64 * max(1, len(panels))), fontsize=9)  # fewer characters than a panel is wide
    return figure


@torch.no_grad()
def show_several(names: Sequence[str], *, heads: int = 12, length: int = 256, is_causal: bool = True) -> Figure:
    """Return one picture of several schemes with their default options: a panel for each hook of each, in the order given.

    Args:
        names: the schemes; one that changes nothing has no panel.
        heads: attention heads.
        length: positions drawn.
        is_causal: a decoder's form, or an encoder's.

    Raises:
        UnknownNameError: no scheme has one of the names.
        OptionError: none of the schemes has anything to draw.
    """
    schemes = [build(name, {}, heads=heads, length=length, is_causal=is_causal) for name in names]
    drawn = [(scheme, hook) for scheme in schemes for hook in panels_of(scheme)]
    if not drawn:
        raise OptionError(f"None of {', '.join(names)} has anything to draw. Name a scheme that acts on something.")
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(3.1 * columns, 2.4 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, (scheme, hook) in zip(axes, drawn, strict=False):
            PANELS[hook](panel, figure, scheme, length)
            panel.set_title(scheme.name, loc="left", fontsize=10, fontweight="bold")
        for panel in axes[len(drawn) :]:
            panel.set_axis_off()
        title = (
            f"{length:,} positions, {heads:,} heads: where a panel has many lines, the first head is dark, the last bright. Squares of "
            "keys and queries show one head, both drawn at random, as are parameters that start at zero and the table that learned and "
            "concat take over."
        )
        figure.suptitle(textwrap.fill(title, 40 * columns), fontsize=8.5)  # fewer characters than the panels are wide
    return figure


@torch.no_grad()
def show_on_a_grid(names: Sequence[str], options: dict[str, Any], *, heads: int = 12, side: int = 16) -> Figure:
    """Return a picture of the attention that positions alone give one patch of an image, over all its patches.

    Args:
        names: one scheme, of which the first, the middle and the last head are drawn; or several, of which the first is.
        options: the options of one scheme; of several, none.
        heads: attention heads.
        side: rows, and columns, of the grid.

    Raises:
        UnknownNameError: no scheme has one of the names.
        OptionError: an option that does not exist, or breaks its rule; or a scheme that is not defined on a grid.
    """
    sides, place = (side, side), (side // 3, side // 2)
    drawn: list[tuple[str, Tensor]] = []
    for name in names:
        scheme = build(name, options, heads=heads, length=side * side, is_causal=False, sides=sides)
        attention = attention_of_patch(scheme, sides, place)
        differ = not torch.equal(attention, attention[:1].expand_as(attention))
        shown = dict.fromkeys([0, heads // 2, heads - 1] if differ and len(names) == 1 else [0])
        drawn += [(name if len(names) > 1 else f"head {head}" if differ else "every head", attention[head]) for head in shown]
    columns = min(COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(3.1 * columns, 2.7 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, (title, attention) in zip(axes, drawn, strict=False):
            image = panel.imshow(attention.numpy(), cmap="viridis", interpolation="nearest", vmin=0.0)
            panel.plot(place[1], place[0], marker="x", color="#d55e00")
            panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
            panel.set_xlabel("column")
            panel.set_ylabel("row")
            figure.colorbar(image, ax=panel, shrink=0.8)
        for panel in axes[len(drawn) :]:
            panel.set_axis_off()
        chosen = ", ".join(f"{option}={value}" for option, value in options.items())
        head = f"{names[0]}{f' ({chosen})' if chosen else ''}: " if len(names) == 1 else ""
        text = (
            f"{head or 'Grid: '}the attention of one patch (the cross) to each of {side} x {side}, where queries and keys "
            f"differ in nothing but "
            "positions. Parameters that start at zero are drawn at random, as is the table that learned takes over."
        )
        figure.suptitle(textwrap.fill(text, 40 * columns), fontsize=8.5)
    return figure


def attention_of_patch(scheme: Scheme, sides: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """Return the attention of a patch to all, `[heads, rows, columns]`, where tokens differ in their positions alone.

    Queries and keys are ones. Where a scheme adds vectors to tokens, each is the whole vector in every head, of the length of ones.
    """
    heads, head_dim, scaling = scheme.geometry.num_heads, scheme.geometry.head_dim, scheme.geometry.head_dim**-0.5
    cpu = torch.device("cpu")
    ids = PatchLayout(0, (1, 1), sides).position_ids(sides, cpu)
    at, length = place[0] * sides[1] + place[1], ids.shape[1]
    query = key = torch.ones(1, heads, length, head_dim)
    if "encode" in scheme.hooks:
        vectors = scheme.encode_grid(sides, cpu).float()[:, None].expand(-1, heads, -1, -1)
        query = key = vectors * (head_dim / vectors.square().sum(-1).mean()).sqrt()
    if "transform_query_key" in scheme.hooks:
        prepared = scheme.prepare_grid(ids, sides)
        query = scheme.transform_query_key(query, prepared, role="query", layer=0)
        key = scheme.transform_query_key(key, prepared, role="key", layer=0)
    scores = scaling * query @ key.transpose(-1, -2)
    if "score_bias" in scheme.hooks:
        slots = slots_from(0, length, cpu)
        positions = Positions(slots, slots, ids, ids, sides=sides)
        scores = scores + scheme.score_bias(query, key, positions, scaling=scaling, layer=0)
    attention: Tensor = scores.softmax(-1)[0, :, at].reshape(heads, *sides)
    return attention


def drawable(*, is_causal: bool = True) -> list[str]:
    """Return the schemes whose default options have something to draw, those alike side by side: in the order of `PANELS`."""
    found = []
    for name in SCHEMES.names():
        scheme = SCHEMES[name]
        hooks = scheme.hooks_for(scheme.Options())
        kinds = [kind for kind, hook in enumerate(PANELS) if hook in hooks]
        if kinds and (is_causal or not scheme.causal_only):
            found.append((kinds[0], name))
    return [name for _, name in sorted(found)]


def panels_of(scheme: Scheme) -> list[str]:
    """Return the hooks that get a panel each; a bias that belongs to a rotation is drawn with it."""
    found = [hook for hook in PANELS if hook in scheme.hooks]
    return [hook for hook in found if hook != "score_bias" or "transform_query_key" not in found]


def _vectors(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the vectors that positions add to a token of zeros."""
    ids = torch.arange(length)[None]
    if "encode" in scheme.hooks:
        vectors = scheme.encode(ids)[0]
    else:
        vectors = scheme.embed(torch.zeros(1, length, scheme.geometry.hidden_size), ids)[0]
    _image(axes, figure, vectors.float().T, ("position", "dimension", "added to the embedding"))


def _rotation(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the score of the last query with every key, all of ones and turned, over that of the same vectors unturned.

    What the scheme adds to the score to change its rotation, such as a decay, counts in.
    """
    heads, head_dim = scheme.geometry.num_heads, scheme.geometry.head_dim
    ones = torch.ones(1, heads, length, head_dim)
    slots = slots_from(0, length, torch.device("cpu"))
    rotation = scheme.prepare_positions(slots[None])
    query = scheme.transform_query_key(ones, rotation, role="query", layer=0)[:, :, -1:]
    key = scheme.transform_query_key(ones, rotation, role="key", layer=0)
    scaling = head_dim**-0.5
    scores = scaling * query @ key.transpose(-1, -2)
    if "score_bias" in scheme.hooks:
        positions = Positions(slots[-1:], slots, slots[None, -1:], slots[None])
        scores = scores + scheme.score_bias(query, key, positions, scaling=scaling, layer=0)
    axes.plot(slots, scores[0, 0, 0].flip(0) / (scaling * head_dim), color="#0072b2")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("tokens back")
    axes.set_ylabel("score of equal vectors,\nover that without the scheme")


def _bias(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the bias of every head by distance."""
    distance = torch.arange(-length + 1, 1 if scheme.geometry.is_causal else length)
    bias = scheme.windowed_bias(distance, layer=0)
    colours = mpl.colormaps["viridis"]
    if torch.equal(bias, bias[:1].expand_as(bias)):  # as they start
        axes.plot(distance, bias[0], color=colours(0.0), linewidth=1.2, label=f"each of {len(bias)} heads")
    else:
        for head, line in enumerate(bias):
            axes.plot(distance, line, color=colours(head / max(1, len(bias) - 1)), linewidth=1.2, label=f"head {head}")
    axes.set_xlabel("key minus query, tokens")
    axes.set_ylabel("added to the score, logits")


def _scores(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw what is added to the scores of one head, for random queries and keys."""
    shape = (1, scheme.geometry.num_heads, length, scheme.geometry.head_dim)
    query, key = torch.randn(shape), torch.randn(shape)
    slots = slots_from(0, length, torch.device("cpu"))
    hidden_states = torch.randn(1, length, scheme.geometry.hidden_size)
    carried = scheme.extra_key_channels(hidden_states, layer=0) if "extra_key_channels" in scheme.hooks else None
    positions = Positions(slots, slots, slots[None], slots[None], carried)
    bias = scheme.score_bias(query, key, positions, scaling=scheme.geometry.head_dim**-0.5, layer=0)
    head = bias.expand(1, scheme.geometry.num_heads, length, length)[0, 0].float()
    if scheme.geometry.is_causal:
        head = head.masked_fill(slots[None, :] > slots[:, None], float("nan"))
    _image(axes, figure, head, ("key", "query", "added to the score, logits"))


def _query_scale(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the factor on a query by how many keys it may attend to, up to eight times the length drawn, which stands for the trained."""
    num_keys = torch.arange(1, 8 * length + 1)
    axes.plot(num_keys, scheme.query_scale(num_keys[None], layer=0)[0], color="#0072b2")
    axes.axvline(length, color="#999999", linewidth=0.8)
    axes.set_xlabel("keys that the query may attend to; the line is the trained length")
    axes.set_ylabel("factor on the query")


def _image(axes: Any, figure: Figure, values: Tensor, labels: tuple[str, str, str]) -> None:
    """Draw a matrix, zero in the middle of the colours; the labels are those of columns, rows and values."""
    largest = float(values.nan_to_num().abs().max()) or 1.0
    image = axes.imshow(values.numpy(), aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.colorbar(image, ax=axes, label=labels[2])


PANELS: dict[str, Callable[[Any, Figure, Scheme, int], None]] = {
    "encode": _vectors,
    "embed": _vectors,
    "transform_query_key": _rotation,
    "relative_bias": _bias,
    "score_bias": _scores,
    "query_scale": _query_scale,
}
"""Hook to the function that draws it."""
