"""Entry point: subcommands, logging, and errors as one line instead of a traceback."""

import logging
import sys
from collections.abc import Callable

import tyro
from rich.console import Console
from rich.logging import RichHandler

from weaksam_rt.cli._infer import detect, propose, segment
from weaksam_rt.cli._inspect import check, models
from weaksam_rt.cli._serve import serve
from weaksam_rt.errors import WeakSamError

_DESCRIPTION = """Weakly-supervised detection, served on Triton.

Start with `weaksam serve MODELS` (a folder of exported models or a Triton model repository), then
`weaksam detect PHOTO.jpg --output out`. Every command explains itself with --help.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 1 after an error, with 2 for a wrong call."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    commands: dict[str, Callable[..., int]] = {
        "serve": serve,
        "detect": detect,
        "propose": propose,
        "segment": segment,
        "models": models,
        "check": check,
    }
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            commands, prog="weaksam", description=_DESCRIPTION, args=arguments
        )
    except (WeakSamError, ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code)
