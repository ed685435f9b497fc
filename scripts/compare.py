"""Several schemes from one base, trained equally, in one report.

Usage: python scripts/compare.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

import torch

from pe_swap.compare import compare
from pe_swap.config import CompareConfig, parse, run


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    compare(parse(CompareConfig, arguments, description="Several schemes from one base, trained equally, in one report."))


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # alibi's far keys get denormal probabilities; some processors spend a hundred cycles on each
    raise SystemExit(run(main))
