"""The highest load that keeps a promise about latency."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.load import Load


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """A promise: this share of the requests is answered within the limit."""

    quantile: float
    """In (0, 1)."""
    limit_ms: float

    @staticmethod
    def parse(text: str) -> "Slo":
        """From ``p99=50ms`` or ``p99.9=1.5s``.

        Raises:
            ValueError: The text is not of that form.
        """
        match = re.fullmatch(r"p(\d+(?:\.\d+)?)=(\d+(?:\.\d+)?)(ms|s)", text)
        if match is None or not 0 < float(match[1]) < 100:
            raise ValueError(f"slo is {text!r}, expected a form like p99=50ms")
        scale = 1000.0 if match[3] == "s" else 1.0
        return Slo(quantile=float(match[1]) / 100, limit_ms=scale * float(match[2]))

    def is_met(self, loads: Sequence[Load]) -> bool:
        """By all requests together; one that failed was not answered within any limit."""
        samples = tuple(sample for load in loads for sample in load.samples)
        together = Load(samples=samples, seconds=sum(load.seconds for load in loads))
        return together.quantile_with_errors(self.quantile) <= self.limit_ms

    def __str__(self) -> str:
        return f"p{100 * self.quantile:g} within {self.limit_ms:g} ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One offered load and what came of it."""

    rate: float
    """Requests a second."""
    loads: tuple[Load, ...]
    """One for each time that it was offered."""
    is_met: bool


Offer = Callable[[float], Awaitable[Load]]
"""Offers so many requests a second for a while."""


def goodput(rate: float, load: Load, slo: Slo) -> float:
    """Answers a second that came within the promise's limit: their share of what was offered, so at
    most ``rate``, however long the late ones took.
    """
    return rate * load.share_within(slo.limit_ms)


async def search_rate(slo: Slo, offer: Offer, *, highest: float, steps: int) -> list[Probe]:
    """Offer loads by bisection; the answer is the highest rate of a probe that met the promise.

    Args:
        slo: The promise.
        offer: Offers a rate.
        highest: Rate that is certainly too much, above 0; it is offered too, to know.
        steps: Probes in all, at least 1; the answer's error is ``highest`` / 2 ** (steps - 1).

    Returns:
        Every probe in the order of its rate; possibly none that met the promise.
    """
    low, high = 0.0, highest
    probes = []
    rate = highest
    for _ in range(steps):
        loads = (await offer(rate),)
        met = slo.is_met(loads)
        probes.append(Probe(rate=rate, loads=loads, is_met=met))
        if met and rate == highest:
            break
        low, high = (rate, high) if met else (low, rate)
        rate = (low + high) / 2
    return sorted(probes, key=lambda probe: probe.rate)


async def confirm(slo: Slo, offer: Offer, probes: Sequence[Probe], *, repeats: int) -> list[Probe]:
    """Offer the rates that met the promise again, the highest first, until one meets it again.

    A search stops at the rate that was luckiest; only what is offered afresh says what it is worth.

    Args:
        slo: The promise.
        offer: Offers a rate.
        probes: Of a search.
        repeats: Loads of each rate, at least 1; all their requests together must meet the promise.

    Returns:
        What was offered, in the order of its rate; the lowest may have met the promise, all others
        did not.
    """
    confirmed: list[Probe] = []
    for found in sorted((p for p in probes if p.is_met), key=lambda probe: -probe.rate):
        loads = tuple([await offer(found.rate) for _ in range(repeats)])
        confirmed.append(Probe(rate=found.rate, loads=loads, is_met=slo.is_met(loads)))
        if confirmed[-1].is_met:
            break
    return confirmed[::-1]


def best_probe(probes: Sequence[Probe]) -> Probe | None:
    """The highest rate that met the promise; None if none did."""
    return max((p for p in probes if p.is_met), key=lambda probe: probe.rate, default=None)
