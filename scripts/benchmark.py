"""Measure what every scheme costs in time and memory.

Usage: python scripts/benchmark.py [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

from pe_swap.commands.benchmark import benchmark
from pe_swap.runs.command_line import parse, run
from pe_swap.runs.config import BenchmarkConfig
from pe_swap.runs.records import flush_denormals


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    benchmark(parse(BenchmarkConfig, arguments, description="Measure what every scheme costs in time and memory."))


if __name__ == "__main__":
    flush_denormals()
    raise SystemExit(run(main))
