"""Is there room on the disk? Asked before a large file is begun, not found out by a crash: a mapped
file that outgrows the disk ends the process without a message.
"""

import shutil
from pathlib import Path

_SPARE = 1.05
"""Disk that must be free, relative to what is written."""


def check_room(directory: Path, num_bytes: int, *, what: str, advice: str) -> None:
    """Raise ``OSError`` where the file system of ``directory`` cannot hold ``num_bytes`` more.

    Args:
        directory: Exists.
        num_bytes: Of the file to write.
        what: Is to be written, plural, for the message.
        advice: What else the user could choose than more room.
    """
    free = shutil.disk_usage(directory).free
    if num_bytes * _SPARE > free:
        raise OSError(
            f"{what} need {num_bytes / 1e9:.1f} GB in {directory}, which has {free / 1e9:.1f} GB "
            f"free; choose an output folder with more room{advice}"
        )
