"""Swap a model's positions, fine-tune it, save it.

Usage: python scripts/finetune.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

from pe_swap.commands.finetune import finetune
from pe_swap.runs.command_line import parse, run
from pe_swap.runs.config import FinetuneConfig
from pe_swap.runs.records import flush_denormals


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    finetune(parse(FinetuneConfig, arguments, description="Swap a model's positions, fine-tune it, save it."))


if __name__ == "__main__":
    flush_denormals()
    raise SystemExit(run(main))
