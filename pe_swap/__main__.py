"""`python -m pe_swap schemes` and `families` list; `python -m pe_swap show alibi --out alibi.png` draws one scheme or more."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from pe_swap.commands.families import composites_table, families_table, families_text
from pe_swap.commands.gallery import describe, drawable, markdown_table, show, show_on_a_grid, show_several
from pe_swap.runs.command_line import free_options, run
from pe_swap.schemes import SCHEMES
from pe_swap.schemes.base import on_a_grid

EVERY = "all"
"""Stands for every scheme that can be drawn."""


def main(arguments: Sequence[str]) -> None:
    """Run one of the three commands.

    Raises:
        PESwapError: an unknown scheme or option.
        SystemExit: wrong usage, with status 2.
    """
    parser = argparse.ArgumentParser(prog="python -m pe_swap", description="Positional schemes, as text and as pictures.")
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("schemes", help="list every scheme with its options and what it claims")
    listed.add_argument("--markdown", action="store_true", help="as the README's table")
    families = commands.add_parser("families", help="list every model family with the kind of its positions")
    families.add_argument("--markdown", action="store_true", help="as the README's table")
    families.add_argument("--composites", action="store_true", help="list the models that are made of several models instead")
    shown = commands.add_parser(
        "show", help="draw what a scheme does", epilog="Of one scheme, any other --option is the scheme's own."
    )
    shown.add_argument("schemes", nargs="+", metavar="scheme", help=f"one or more, or '{EVERY}' that can be drawn")
    shown.add_argument("--heads", type=int, default=12, help="attention heads (default: 12)")
    shown.add_argument("--length", type=int, default=256, help="positions drawn (default: 256)")
    shown.add_argument("--encoder", action="store_true", help="draw the two-sided form")
    shown.add_argument(
        "--axes",
        type=int,
        default=1,
        help="2: draw the attention of one patch of an image of about --length patches (default: 1)",
    )
    shown.add_argument("--out", help="file to write (default: <scheme>.png, or gallery.png for several)")
    known, unknown = parser.parse_known_args(list(arguments))
    if known.command == "schemes":
        if unknown:
            parser.error(f"unexpected {' '.join(unknown)}")
        print(markdown_table() if known.markdown else "\n\n".join(describe(name) for name in SCHEMES.names()))
        return
    if known.command == "families":
        if unknown:
            parser.error(f"unexpected {' '.join(unknown)}")
        print(composites_table() if known.composites else families_table() if known.markdown else families_text())
        return
    for name in ("heads", "length"):
        if not 1 <= getattr(known, name) <= 4096:
            parser.error(f"--{name} is {getattr(known, name)}; it must be from 1 to 4,096")
    if known.axes not in (1, 2):
        parser.error(f"--axes is {known.axes}; it must be 1 or 2")
    is_causal = not known.encoder
    names = drawable(is_causal=is_causal) if known.schemes == [EVERY] else known.schemes
    if unknown and len(names) > 1:
        parser.error(
            f"unexpected {' '.join(unknown)}: several schemes are drawn with their defaults; draw one to set its options"
        )
    if known.axes == 2:
        names = [name for name in on_a_grid() if name != "none"] if known.schemes == [EVERY] else names
        options = free_options(unknown) if len(names) == 1 else {}
        figure = show_on_a_grid(names, options, heads=known.heads, side=max(2, math.isqrt(known.length)))
    elif len(names) == 1:
        figure = show(names[0], free_options(unknown), heads=known.heads, length=known.length, is_causal=is_causal)
    else:
        figure = show_several(names, heads=known.heads, length=known.length, is_causal=is_causal)
    out = known.out or f"{names[0] if len(names) == 1 else 'gallery'}.png"
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, or an ending that stands for no kind of picture
        parser.error(f"--out is {out}, which cannot be written: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    raise SystemExit(run(main))
