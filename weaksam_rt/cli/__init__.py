"""The ``weaksam`` command: one file for each group of subcommands, ``main`` puts them together."""

from weaksam_rt.cli._main import main

__all__ = ["main"]
