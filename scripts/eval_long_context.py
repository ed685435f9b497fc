"""Perplexity of models at lengths they were never trained on.

Usage: python scripts/eval_long_context.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

import torch

from pe_swap.config import EvalConfig, parse, run
from pe_swap.evaluation.suite import evaluate


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    evaluate(parse(EvalConfig, arguments, description="Perplexity of models at lengths they were never trained on."))


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # alibi's far keys get denormal probabilities; some processors spend a hundred cycles on each
    raise SystemExit(run(main))
