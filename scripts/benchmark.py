"""Measure what every scheme costs in time and memory.

Usage: python scripts/benchmark.py [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

import torch

from pe_swap.benchmark import benchmark
from pe_swap.config import BenchmarkConfig, parse, run


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    benchmark(parse(BenchmarkConfig, arguments, description="Measure what every scheme costs in time and memory."))


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # alibi's far keys get denormal probabilities; some processors spend a hundred cycles on each
    raise SystemExit(run(main))
