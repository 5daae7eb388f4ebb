"""Ways to do the same work, timed in turns, so that a busy machine is busy for all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from rich.progress import track

from benchmarks.results import Metric

Work = Callable[[], object]
Clock = Callable[[], float]
"""Seconds from some start."""


def in_turns(
    ways: Mapping[str, Work],
    *,
    repeats: int,
    samples: int,
    kind: str = "",
    calls: int = 1,
    clock: Clock = time.perf_counter,
) -> list[Metric]:
    """Milliseconds of one call of each way.

    Args:
        ways: Each is called once before, which prepares what later calls reuse.
        repeats: Blocks of each way. The order of the ways turns round from one to the next.
        samples: Of each block.
        kind: Put before the ways' names.
        calls: Of one sample; its time is their mean.
        clock: ``time.process_time`` leaves out what other processes did meanwhile.
    """
    for work in ways.values():
        work()
    blocks: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for turn in track(range(repeats), kind or "measuring", transient=True):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            block = tuple(milliseconds(ways[way], calls=calls, clock=clock) for _ in range(samples))
            blocks[way].append(block)
    return [
        Metric(name=f"{kind}: {way}" if kind else way, unit="ms", repeats=tuple(blocks[way]))
        for way in ways
    ]


def per_item(metric: Metric, number: int, *, name: str = "") -> Metric:
    """The metric of one of ``number`` things that a sample did together."""
    repeats = tuple(tuple(value / number for value in block) for block in metric.repeats)
    return replace(metric, name=name or metric.name, repeats=repeats)


def milliseconds(work: Work, *, calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Of one call, the mean of ``calls``."""
    start = clock()
    for _ in range(calls):
        work()
    return 1e3 * (clock() - start) / calls
