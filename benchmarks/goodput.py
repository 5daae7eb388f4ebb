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

    def is_met(self, load: Load) -> bool:
        """A request that failed was not answered within any limit."""
        return load.quantile_with_errors(self.quantile) <= self.limit_ms

    def __str__(self) -> str:
        return f"p{100 * self.quantile:g} within {self.limit_ms:g} ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One offered load and what came of it."""

    rate: float
    """Requests a second."""
    load: Load
    is_met: bool


async def search_rate(
    slo: Slo, offer: Callable[[float], Awaitable[Load]], *, highest: float, steps: int
) -> list[Probe]:
    """Offer loads by bisection; the answer is the highest rate of a probe that met the promise.

    Args:
        slo: The promise.
        offer: Offers a rate for a while.
        highest: Rate that is certainly too much, above 0; it is offered too, to know.
        steps: Probes in all, at least 1; the answer's error is ``highest`` / 2 ** (steps - 1).

    Returns:
        Every probe in the order of its rate; possibly none that met the promise.
    """
    low, high = 0.0, highest
    probes = []
    rate = highest
    for _ in range(steps):
        load = await offer(rate)
        met = slo.is_met(load)
        probes.append(Probe(rate=rate, load=load, is_met=met))
        if met and rate == highest:
            break
        low, high = (rate, high) if met else (low, rate)
        rate = (low + high) / 2
    return sorted(probes, key=lambda probe: probe.rate)


def best_probe(probes: Sequence[Probe]) -> Probe | None:
    """The highest rate that met the promise; None if none did."""
    return max((p for p in probes if p.is_met), key=lambda probe: probe.rate, default=None)
