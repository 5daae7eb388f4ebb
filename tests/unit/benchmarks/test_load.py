import asyncio
import dataclasses

import numpy as np
import pytest

from benchmarks.goodput import Slo, best_probe, confirm, goodput, search_rate
from benchmarks.load import Limits, Load, Sample, closed_loop, open_loop, poisson_arrivals, warm_up
from benchmarks.served import ModelStatistics, together
from weaksam_rt.errors import InferenceError


class OneAtATime:
    """A service with one worker that takes ``service_s`` a request and stalls once."""

    def __init__(self, service_s, *, stall_at=-1, stall_s=0.0):
        self._service_s, self._stall_at, self._stall_s = service_s, stall_at, stall_s
        self._lock = asyncio.Lock()
        self.num_seen = 0

    async def __call__(self, number):
        async with self._lock:
            self.num_seen += 1
            stalls = self.num_seen == self._stall_at
            await asyncio.sleep(self._stall_s if stalls else self._service_s)


def test_the_open_loop_reports_a_stall_that_a_closed_loop_hides():
    async def both():
        limits = Limits(seconds=5, requests=100)
        patient = OneAtATime(0.001, stall_at=30, stall_s=0.5)
        closed = await closed_loop(patient, concurrency=1, limits=limits)
        waiting = OneAtATime(0.001, stall_at=30, stall_s=0.5)
        arrivals = poisson_arrivals(100, limits=limits, seed=0)
        return closed, await open_loop(waiting, arrivals)

    closed, opened = asyncio.run(both())
    assert sum(x > 100 for x in closed.latencies_ms) == 1
    # Those that were due while the service stood still waited too: 100 a second for 0.4 s.
    assert sum(x > 100 for x in opened.latencies_ms) > 25


def test_a_client_that_is_late_does_not_forgive_itself():
    async def offer():
        service = OneAtATime(0.001, stall_at=10, stall_s=0.3)
        return await open_loop(service, list(np.arange(40) / 100), max_in_flight=1)

    load = asyncio.run(offer())
    naive = [sample.latency_from_sending_ms for sample in load.samples]
    assert sum(x > 100 for x in naive) == 1  # as if the others had not been due
    assert sum(x > 100 for x in load.latencies_ms) > 10


def test_poisson_arrivals_are_random_reproducible_and_bounded():
    limits = Limits(seconds=1000, requests=20_000)
    arrivals = poisson_arrivals(10, limits=limits, seed=1)
    gaps = np.diff(arrivals)
    assert np.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.1, rel=0.05)  # a Poisson process, not a metronome
    assert arrivals == poisson_arrivals(10, limits=limits, seed=1)
    assert arrivals != poisson_arrivals(10, limits=limits, seed=2)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] <= 1000
    assert len(arrivals) == 10_000  # what is offered is what the load is called
    assert len(poisson_arrivals(10, limits=Limits(seconds=1000, requests=7), seed=1)) == 7


def test_a_closed_loop_keeps_its_number_in_flight_and_its_limits():
    flying, most = 0, 0

    async def send(number):
        nonlocal flying, most
        flying, most = flying + 1, max(most, flying + 1)
        await asyncio.sleep(0.002)
        flying -= 1

    load = asyncio.run(closed_loop(send, concurrency=3, limits=Limits(seconds=60, requests=30)))
    assert most == 3
    assert len(load.samples) == 30
    timed = asyncio.run(
        closed_loop(send, concurrency=2, limits=Limits(seconds=0.1, requests=10**6))
    )
    assert timed.seconds < 5


def test_a_failure_is_counted_and_never_counts_as_fast():
    async def send(number):
        if number % 2:
            raise InferenceError(f"no: {0.25 * number} ms")

    load = asyncio.run(closed_loop(send, concurrency=1, limits=Limits(seconds=9, requests=20)))
    assert load.num_errors == 10
    assert load.failures == ("10 failed between 0 and 0 s: InferenceError: no: N ms",)
    assert len(load.latencies_ms) == 10
    assert load.quantile_with_errors(0.9) == float("inf")
    assert load.share_within(1e6) == 0.5


def test_the_warm_up_goes_on_until_it_settles():
    seen = 0

    async def send(number):
        nonlocal seen
        seen += 1
        await asyncio.sleep(0.03 if seen <= 15 else 0.002)

    warmed = asyncio.run(warm_up(send, concurrency=1, limits=Limits(seconds=30, requests=500)))
    assert warmed.settled
    assert 40 <= warmed.requests <= 200
    hasty = asyncio.run(warm_up(send, concurrency=1, limits=Limits(seconds=30, requests=20)))
    assert not hasty.settled


@pytest.mark.parametrize(
    ("text", "quantile", "limit_ms"), [("p99=50ms", 0.99, 50), ("p99.9=1.5s", 0.999, 1500)]
)
def test_a_promise_is_read(text, quantile, limit_ms):
    slo = Slo.parse(text)
    assert slo.quantile == pytest.approx(quantile)
    assert slo.limit_ms == limit_ms


@pytest.mark.parametrize("text", ["", "99=50ms", "p99=50", "p100=1ms", "p0=1ms", "p99<50ms"])
def test_a_promise_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="expected a form like p99=50ms"):
        Slo.parse(text)


def load_of(rate, latencies_s):
    samples = tuple(
        Sample(intended=i / rate, sent=i / rate, done=i / rate + latency, error=None)
        for i, latency in enumerate(latencies_s)
    )
    return Load(samples=samples, seconds=max(sample.done for sample in samples))


class Queue:
    """A service whose latency grows as the rate comes near 80 a second."""

    def __init__(self):
        self.offered = []

    async def __call__(self, rate):
        self.offered.append(rate)
        return load_of(rate, [0.01 / max(1e-3, 1 - rate / 80)] * 50)


def test_the_search_finds_the_load_at_which_a_queue_breaks_the_promise():
    slo = Slo.parse("p99=50ms")
    probes = asyncio.run(search_rate(slo, Queue(), highest=100.0, steps=9))
    best = best_probe(probes)
    assert best.rate == pytest.approx(64, abs=100 / 2**8)
    assert [p.rate for p in probes] == sorted(p.rate for p in probes)
    hasty = asyncio.run(search_rate(Slo.parse("p99=5ms"), Queue(), highest=9, steps=3))
    assert best_probe(hasty) is None


def test_what_was_found_by_luck_is_not_confirmed():
    slo, offer = Slo.parse("p99=50ms"), Queue()
    probes = asyncio.run(search_rate(slo, offer, highest=100.0, steps=5))
    found = best_probe(probes).rate
    lucky = dataclasses.replace(probes[-1], is_met=True)  # 100 a second, kept once
    offer.offered.clear()
    confirmed = asyncio.run(confirm(slo, offer, [*probes, lucky], repeats=3))
    assert offer.offered == [100.0] * 3 + [found] * 3
    assert [(p.rate, p.is_met, len(p.loads)) for p in confirmed] == [
        (found, True, 3),
        (100.0, False, 3),
    ]


def test_a_promise_is_kept_by_all_requests_together():
    slo = Slo.parse("p99=50ms")
    good, bad = load_of(10, [0.01] * 100), load_of(10, [0.01] * 98 + [1.0] * 2)
    assert not slo.is_met([bad])
    assert slo.is_met([bad, *[good] * 4])


def test_goodput_is_what_came_in_time_and_never_more_than_was_offered():
    slo = Slo.parse("p99=50ms")
    assert goodput(10, load_of(10, [0.01] * 20), slo) == 10
    assert goodput(10, load_of(10, [0.01] * 15 + [1.0] * 5), slo) == pytest.approx(7.5)


def test_statistics_of_several_whiles_are_one():
    def part(requests, queue):
        phases = {"compute_input": 0.0, "compute_infer": 1.0, "compute_output": 0.0}
        return ModelStatistics(
            requests=requests, executions=requests // 2, inferences=requests,
            milliseconds={"queue": queue, **phases},
        )  # fmt: skip

    whole = together([{"a": part(10, 1.0)}, {"a": part(30, 5.0), "b": part(2, 7.0)}])
    assert whole["a"] == part(40, 4.0)
    assert whole["b"] == part(2, 7.0)
