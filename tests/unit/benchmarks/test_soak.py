"""What a soak takes for memory that a server holds."""

import subprocess
import sys

import psutil

from benchmarks.soak import held_mib

_CHILD = """
import mmap, sys
grown = bytearray(b"x") * (64 << 20)
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
    sum(pages[:: mmap.PAGESIZE])
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_memory_held_is_a_heap_of_any_child_and_no_page_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"y" * (256 << 20))
    me = psutil.Process()
    before = held_mib(me)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == b"ready\n"
        assert 60 < held_mib(me) - before < 110
    finally:
        child.communicate()
    assert held_mib(me) - before < 30
