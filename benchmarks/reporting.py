"""What every benchmark does with its result: show it, and write it where it was told to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.markdown import markdown
from benchmarks.page import page
from benchmarks.results import BenchmarkResult, write_result
from weaksam_rt.files import atomic_path


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsAndOutput:
    """What every benchmark of exported models is told on the command line."""

    models: tyro.conf.Positional[Path]
    """Folder of exported models."""
    output: Path | None = None
    """Path without suffix; result.json, .md and .html are written there."""


Where = Annotated[ModelsAndOutput, tyro.conf.arg(name="")]


def report(result: BenchmarkResult, output: Path | None) -> None:
    """Print the result; with ``output``, also write ``output.json``, ``.md`` and ``.html``."""
    text = markdown(result)
    Console().print(Markdown(text))
    if output is not None:
        write_result(result, output.with_suffix(".json"))
        write_text(output.with_suffix(".md"), text)
        write_text(output.with_suffix(".html"), page(result))


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)
