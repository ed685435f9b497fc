"""What schemes are, as text and as pictures: `python -m pe_swap schemes` and `python -m pe_swap show`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pe_swap.positions import Positions, slots_from
from pe_swap.schemes import SCHEMES, Geometry, Scheme, build_options

HEAD_DIM = 64
"""Width of a head in pictures, as in GPT-2 and BERT."""


def describe(name: str) -> str:
    """Return a scheme as lines of text: what it is, its options with types and defaults, its hooks, what it claims.

    Raises:
        UnknownNameError: no scheme has that name.
    """
    scheme = SCHEMES[name]
    lines = [f"{name}: {scheme.summary}"]
    lines += [f"    {field.name}: {field.type} = {field.default!r}" for field in dataclasses.fields(scheme.Options)]
    return "\n".join([*lines, f"    [{'; '.join(claims(scheme))}]"])


def markdown_table() -> str:
    """Return every scheme as a row of a Markdown table: the README's."""
    lines = ["| scheme | what it is | options, with their defaults |", "|---|---|---|"]
    for name in SCHEMES.names():
        scheme = SCHEMES[name]
        own = [
            field for field in dataclasses.fields(scheme.Options) if not field.kw_only
        ]  # what every scheme takes is keyword-only
        options = ", ".join(f"`{field.name}={field.default!r}`" for field in own)
        lines.append(f"| `{name}` | {scheme.summary}{' (decoders only)' if scheme.causal_only else ''} | {options} |")
    return "\n".join(lines)


def claims(scheme: type[Scheme]) -> list[str]:
    """Return what a scheme says of itself, in words."""
    hooks = ", ".join(sorted(scheme.hooks_for(scheme.Options()))) or "nothing"
    found = [f"acts through {hooks}", "decoders only" if scheme.causal_only else "decoders and encoders"]
    if scheme.shift_invariant:
        found.append("only differences of positions matter")
    return found


def build(name: str, options: dict[str, Any], *, heads: int, length: int, is_causal: bool) -> Scheme:
    """Return a scheme for pictures: of one layer, and with random parameters where they would start at zero.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, or breaks its rule.
    """
    torch.manual_seed(0)
    geometry = Geometry(heads * HEAD_DIM, heads, HEAD_DIM, 1, is_causal, length)
    table = torch.randn(length, geometry.hidden_size).cumsum(0) * 0.02  # stands for a trained table: near positions are alike
    resolved = build_options(SCHEMES[name].Options, options).resolve(geometry, table)
    scheme = SCHEMES[name](resolved, geometry, (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheme.start_from(table)
    with torch.no_grad():
        for parameter in scheme.parameters():
            if not parameter.any():
                parameter.normal_()
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
    panels = [hook for hook in PANELS if hook in scheme.hooks]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.8), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for panel, hook in zip(axes, panels, strict=False):
            PANELS[hook](panel, figure, scheme, length)
        if not panels:
            axes[0].text(0.5, 0.5, "nothing to draw", ha="center", va="center")
            axes[0].set_axis_off()
        chosen = ", ".join(f"{option}={value}" for option, value in options.items())
        figure.suptitle(f"{name}{f' ({chosen})' if chosen else ''}: {scheme.summary}", fontsize=9)
    return figure


def _vectors(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the vectors that positions add to a token of zeros."""
    ids = torch.arange(length)[None]
    if "encode" in scheme.hooks:
        vectors = scheme.encode(ids)[0]
    else:
        vectors = scheme.embed(torch.zeros(1, length, scheme.geometry.hidden_size), ids)[0]
    _image(axes, figure, vectors.float().T, "position", "dimension")


def _rotation(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the mean product of a turned query of ones with turned keys of ones, by distance."""
    ones = torch.ones(1, 1, length, scheme.geometry.head_dim)
    ids = torch.arange(length)[None]
    rotation = scheme.rotation(ids)
    query = scheme.rotate(ones, rotation, role="query", layer=0)[0, 0]
    key = scheme.rotate(ones, rotation, role="key", layer=0)[0, 0]
    products = (query[-1] @ key.T) / scheme.geometry.head_dim
    axes.plot(torch.arange(length), products.flip(0), color="#0072b2")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("tokens back")
    axes.set_ylabel("query . key, both of ones, over head_dim")


def _bias(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw the bias of every head by distance."""
    distance = torch.arange(-length + 1, 1 if scheme.geometry.is_causal else length)
    bias = scheme.relative_bias(distance, layer=0)
    colours = mpl.colormaps["viridis"]
    for head, line in enumerate(bias):
        axes.plot(distance, line, color=colours(head / max(1, len(bias) - 1)), linewidth=1.2, label=f"head {head}")
    axes.set_xlabel("key minus query, tokens")
    axes.set_ylabel("added to the score")
    axes.legend(fontsize=6, frameon=False, ncols=2)


def _scores(axes: Any, figure: Figure, scheme: Scheme, length: int) -> None:
    """Draw what is added to the scores of one head, for random queries and keys."""
    shape = (1, scheme.geometry.num_heads, length, scheme.geometry.head_dim)
    query, key = torch.randn(shape), torch.randn(shape)
    slots = slots_from(0, length, torch.device("cpu"))
    hidden_states = torch.randn(1, length, scheme.geometry.hidden_size)
    carried = scheme.carry(hidden_states, layer=0) if "carry" in scheme.hooks else None
    positions = Positions(slots, slots, slots[None], slots[None], carried)
    bias = scheme.score_bias(query, key, positions, scaling=scheme.geometry.head_dim**-0.5, layer=0)
    head = bias.expand(1, scheme.geometry.num_heads, length, length)[0, 0].float()
    if scheme.geometry.is_causal:
        head = head.masked_fill(slots[None, :] > slots[:, None], float("nan"))
    _image(axes, figure, head, "key", "query")


def _image(axes: Any, figure: Figure, values: Tensor, x_label: str, y_label: str) -> None:
    """Draw a matrix, zero in the middle of the colours."""
    largest = float(values.nan_to_num().abs().max()) or 1.0
    image = axes.imshow(values.numpy(), aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
    figure.colorbar(image, ax=axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


PANELS: dict[str, Callable[[Any, Figure, Scheme, int], None]] = {
    "encode": _vectors,
    "embed": _vectors,
    "rotate": _rotation,
    "relative_bias": _bias,
    "score_bias": _scores,
}
"""Hook to the function that draws it."""
