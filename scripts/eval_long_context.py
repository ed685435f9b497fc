"""Perplexity of models at lengths they were never trained on.

Usage: python scripts/eval_long_context.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

from pe_swap.commands.evaluate import DESCRIPTION, evaluate
from pe_swap.runs.command_line import parse, run
from pe_swap.runs.config import EvalConfig
from pe_swap.runs.records import flush_denormals


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    evaluate(parse(EvalConfig, arguments, description=DESCRIPTION))


if __name__ == "__main__":
    flush_denormals()
    raise SystemExit(run(main))
