"""Several schemes from one base, trained equally, in one report.

Usage: python scripts/compare.py --config configs/... [--key value ...]; --help lists the keys.
"""

from collections.abc import Sequence

from pe_swap.commands.compare import compare
from pe_swap.runs.command_line import parse, run
from pe_swap.runs.config import CompareConfig
from pe_swap.runs.records import flush_denormals


def main(arguments: Sequence[str]) -> None:
    """Read the configuration and run."""
    compare(parse(CompareConfig, arguments, description="Several schemes from one base, trained equally, in one report."))


if __name__ == "__main__":
    flush_denormals()
    raise SystemExit(run(main))
