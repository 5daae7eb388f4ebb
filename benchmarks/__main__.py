"""``python -m benchmarks WHAT``: every benchmark behind one name.

A benchmark is a module of this folder with a function ``main``; its arguments are the command's,
and the first paragraph of the module's docstring is what the overview says. Only the chosen one
is imported. ``python -m benchmarks.WHAT`` is the same.
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.entry import status_of


def benchmarks() -> dict[str, str]:
    """The first paragraph of every benchmark's docstring, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        is_benchmark = any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
        if is_benchmark and not path.stem.startswith("_"):
            paragraph = (ast.get_docstring(tree) or "").split("\n\n", 1)[0]
            found[path.stem] = " ".join(paragraph.split())
    return found


def run(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; 2 for a name that there is not."""
    known = benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_overview(known)
        return 0
    what, *rest = arguments
    if what not in known:
        Console(stderr=True).print(f"no benchmark {what!r}; there are {', '.join(known)}")
        return 2
    module = importlib.import_module(f"benchmarks.{what}")
    return status_of(module.main, prog=f"python -m benchmarks {what}", arguments=rest)


def _print_overview(known: dict[str, str]) -> None:
    table = Table("what", "measures", box=None, title="python -m benchmarks WHAT [--help]")
    for name, summary in known.items():
        table.add_row(name, summary)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
