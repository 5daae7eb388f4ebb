"""``python -m weaksam_rt.cli``: the same as ``weaksam``."""

from weaksam_rt.cli import main

main()
