"""A finished result again: its tables in the terminal, its page and table as files.

``python -m benchmarks show benchmarks/results/engines.json --output out/engines`` makes the HTML
page with the plots, which is not kept beside the JSON that it is made from.
"""

from pathlib import Path

import tyro

from benchmarks.entry import enter
from benchmarks.reporting import report
from benchmarks.results import read_result


def main(result: tyro.conf.Positional[Path], *, output: Path | None = None) -> None:
    """Show and write it.

    Args:
        result: The JSON of a benchmark.
        output: Path without suffix; .json, .md and .html are written there.
    """
    report(read_result(result), output)


if __name__ == "__main__":
    enter(main)
