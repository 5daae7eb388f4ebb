"""Load on a service: a closed loop of patient clients, an open loop that does not wait.

A closed loop sends a request when the one before is answered, so a stall of the service stops the
clock of everyone who would have come meanwhile (coordinated omission). It says what a service can
do at most. The open loop draws the arrivals beforehand and measures from the moment at which a
request *should* have been sent, so whatever keeps it from being sent counts. It says what users
get.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.statistics import end_of_warm_up
from weaksam_rt.errors import WeakSamError

Send = Callable[[int], Awaitable[object]]
"""Sends request number i and returns when its answer is there; a failure is a ``WeakSamError``."""
_MAX_REASON = 200
"""Characters of an error that are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When to stop sending: whatever comes first."""

    seconds: float
    requests: int

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.requests < 1:
            raise ValueError(f"limits must be above 0, got {self.seconds} s, {self.requests}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One request; times in seconds since the start of the load."""

    intended: float
    """When it should have been sent; in a closed loop, when it was."""
    sent: float
    done: float
    error: str | None

    @property
    def latency_ms(self) -> float:
        """From the intended sending to the answer."""
        return 1e3 * (self.done - self.intended)

    @property
    def latency_from_sending_ms(self) -> float:
        """What a client sees that does not know that it was late."""
        return 1e3 * (self.done - self.sent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What came of a load."""

    samples: tuple[Sample, ...]
    """By intended time."""
    seconds: float
    """From the first sending until the last answer."""

    @property
    def latencies_ms(self) -> tuple[float, ...]:
        """Of the requests that were answered without an error."""
        return tuple(s.latency_ms for s in self.samples if s.error is None)

    @property
    def num_errors(self) -> int:
        """Requests that failed."""
        return sum(s.error is not None for s in self.samples)

    @property
    def failures(self) -> tuple[str, ...]:
        """How many requests failed for which reason, and between which seconds; numbers in a
        reason are left out, so that equal reasons count together.
        """
        times: dict[str, list[float]] = {}
        for sample in self.samples:
            if sample.error is not None:
                reason = re.sub(r"[0-9.]*[0-9]", "N", sample.error)[:_MAX_REASON]
                times.setdefault(reason, []).append(sample.intended)
        return tuple(
            f"{len(when)} failed between {min(when):.0f} and {max(when):.0f} s: {reason}"
            for reason, when in times.items()
        )

    @property
    def throughput(self) -> float:
        """Good answers a second."""
        return len(self.latencies_ms) / self.seconds

    def share_within(self, limit_ms: float) -> float:
        """Share of all requests, in [0, 1], that got a good answer within ``limit_ms``."""
        return sum(latency <= limit_ms for latency in self.latencies_ms) / len(self.samples)

    def quantile_with_errors(self, q: float) -> float:
        """Latency quantile in ms in which a request that failed took forever."""
        latencies = [s.latency_ms if s.error is None else float("inf") for s in self.samples]
        return float(np.quantile(latencies, q, method="higher"))


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """What was sent before anything was measured."""

    requests: int
    settled: bool
    """False: the limits came first."""


async def closed_loop(send: Send, *, concurrency: int, limits: Limits) -> Load:
    """``concurrency`` clients, each of which sends again when it is answered.

    Args:
        send: One request.
        concurrency: At least 1.
        limits: No request is begun beyond them; those in flight are awaited.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}, expected at least 1")
    samples: list[Sample] = []
    numbers = iter(range(limits.requests))
    start = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            sent = time.perf_counter() - start
            if sent > limits.seconds:
                return
            samples.append(await _answered(send, number, intended=sent, start=start))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return _load(samples)


def poisson_arrivals(rate: float, *, limits: Limits, seed: int) -> list[float]:
    """Arrival times in seconds of a Poisson process of ``rate`` a second, ascending, within
    ``limits``; at least one.

    Their number is the expected one and only the times are drawn, which is a Poisson process given
    its number: with the number drawn too, short loads of one name would offer very different loads.
    """
    if rate <= 0:
        raise ValueError(f"rate is {rate}, expected above 0")
    number = max(1, min(round(rate * limits.seconds), limits.requests))
    times = np.random.default_rng(seed).uniform(0, min(number / rate, limits.seconds), number)
    return [float(t) for t in np.sort(times)]


async def open_loop(send: Send, arrivals: Sequence[float], *, max_in_flight: int = 1000) -> Load:
    """Requests at their arrival times, whether or not earlier ones have been answered.

    Args:
        send: One request.
        arrivals: Seconds from now, ascending.
        max_in_flight: Bounds the memory; a request beyond it waits to be sent, and its wait counts,
            for its latency starts at its arrival.
    """
    free = asyncio.Semaphore(max_in_flight)
    start = time.perf_counter()

    async def one(number: int, arrival: float) -> Sample:
        async with free:
            return await _answered(send, number, intended=arrival, start=start)

    tasks = []
    for number, arrival in enumerate(arrivals):
        wait = arrival - (time.perf_counter() - start)
        # Also where it is late already: the event loop must get to what is in flight.
        await asyncio.sleep(max(0.0, wait))
        tasks.append(asyncio.create_task(one(number, arrival)))
    return _load(await asyncio.gather(*tasks))


async def warm_up(send: Send, *, concurrency: int, limits: Limits, block: int = 20) -> WarmUp:
    """Send until the latencies have settled, or to the limits.

    Source:
        ``statistics.end_of_warm_up`` on all latencies so far, in blocks of ``block`` requests.
    """
    latencies: list[float] = []
    ends_at = time.perf_counter() + limits.seconds
    while len(latencies) < limits.requests and (left := ends_at - time.perf_counter()) > 0:
        load = await closed_loop(
            send, concurrency=concurrency, limits=Limits(seconds=left, requests=block)
        )
        latencies += [sample.latency_ms for sample in load.samples]
        if end_of_warm_up(latencies) is not None:
            return WarmUp(requests=len(latencies), settled=True)
    return WarmUp(requests=len(latencies), settled=False)


async def _answered(send: Send, number: int, *, intended: float, start: float) -> Sample:
    sent, error = time.perf_counter() - start, None
    try:
        await send(number)
    except WeakSamError as failure:
        error = f"{type(failure).__name__}: {failure}"
    done = time.perf_counter() - start
    return Sample(intended=intended, sent=sent, done=done, error=error)


def _load(samples: Sequence[Sample]) -> Load:
    ordered = sorted(samples, key=lambda sample: sample.intended)
    seconds = max(s.done for s in ordered) - min(s.intended for s in ordered)
    return Load(samples=tuple(ordered), seconds=seconds)
