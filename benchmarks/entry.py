"""One way from a command line into a benchmark, however it was called.

``python -m benchmarks WHAT`` and ``python -m benchmarks.WHAT`` take the same arguments.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro


def status_of(
    main: Callable[..., Any], *, prog: str, arguments: Sequence[str] | None = None
) -> int:
    """Run a benchmark's ``main`` and tell its exit status, 0 where it returns none.

    Args:
        main: Its signature is the command line.
        prog: The command's name in its help.
        arguments: None: those of this process.

    Raises:
        SystemExit: The arguments ask for help, or are not understood.
    """
    status = tyro.cli(main, prog=prog, args=arguments)
    return status if isinstance(status, int) else 0


def enter(main: Callable[..., Any]) -> NoReturn:
    """Run the module that this process was started for, and end with its status."""
    sys.exit(status_of(main, prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}"))
