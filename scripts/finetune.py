"""Swap a model's positions, fine-tune it, save it.

Usage: python scripts/finetune.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

from pe_swap.runs.config import FinetuneConfig, parse, run
from pe_swap.runs.records import flush_denormals
from pe_swap.training.trainer import finetune


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    finetune(parse(FinetuneConfig, arguments, description="Swap a model's positions, fine-tune it, save it."))


if __name__ == "__main__":
    flush_denormals()
    raise SystemExit(run(main))
