"""Proposals by several processes: of this machine, or of a Ray cluster.

It knows how images are shared and results come back; it knows nothing about proposals.
"""

import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from training.data.coco import ImageRecord
from training.data.proposal_shards import ShardWriter, encode_line
from training.proposer import ImageProposer, ProposerConfig
from weaksam_rt.errors import WeakSamError

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Every ``count``-th image of a data set from the ``index``-th on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self.index}/{self.count}: the first number counts from 0 and must be "
                f"below the second"
            )

    @staticmethod
    def parse(text: str) -> "Shard":
        """Read ``i/n``; raises ``ValueError`` for anything else."""
        first, separator, second = text.partition("/")
        if not (separator and first.isdecimal() and second.isdecimal()):
            raise ValueError(f"a shard is i/n, for example 0/4; got {text!r}")
        return Shard(index=int(first), count=int(second))

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.index}-of-{self.count}"

    def records(self, all_records: Sequence[ImageRecord], todo: Sequence[int]) -> list[ImageRecord]:
        """Its own by their place among all, those of them whose ids are in ``todo``."""
        wanted = set(todo)
        return [r for r in all_records[self.index :: self.count] if r.image_id in wanted]


class WorkerError(WeakSamError):
    """A process of the stage failed; its own message follows."""


def propose_in_processes(
    config: ProposerConfig, directory: Path, todo: Sequence[int], num_workers: int
) -> Iterator[None]:
    """Share images among processes of this machine; yields several times a second until all end.

    Args:
        config: Of each process. ``cuda`` gives them the GPUs in turn.
        directory: Of the shards.
        todo: Image ids.
        num_workers: Processes.

    Raises:
        WorkerError: One failed; the others are ended, what they finished stays.
    """
    context = multiprocessing.get_context("spawn")
    processes, receivers = [], []
    for worker in range(num_workers):
        receiver, sender = context.Pipe(duplex=False)
        own = replace(config, device=_device_of(config.device, worker))
        process = context.Process(
            target=_run_worker,
            args=(own, directory, list(todo[worker::num_workers]), worker, sender),
            daemon=True,
        )
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        while any(process.is_alive() for process in processes):
            _raise_failure(processes, receivers)
            yield
            time.sleep(_POLL_S)
        _raise_failure(processes, receivers)
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run_worker(
    config: ProposerConfig, directory: Path, todo: list[int], worker: int, sender: Connection
) -> None:
    try:
        proposer = ImageProposer(config)
        record_of = {record.image_id: record for record in proposer.folder.records}
        with ShardWriter(directory, f"worker-{worker}") as writer:
            for image_id in todo:
                writer.write(encode_line(image_id, proposer.propose(record_of[image_id])))
    except ValueError as error:
        sender.send(str(error))
        raise SystemExit(1) from None
    except Exception:
        sender.send(traceback.format_exc())
        raise SystemExit(1) from None


def _raise_failure(processes: Sequence[Any], receivers: Sequence[Connection]) -> None:
    for worker, (process, receiver) in enumerate(zip(processes, receivers, strict=True)):
        if process.exitcode in (None, 0):
            continue
        try:
            reason = receiver.recv() if receiver.poll() else "it was killed"
        except EOFError:
            reason = "it was killed"
        raise WorkerError(
            f"process {worker + 1} of {len(processes)} ended with code {process.exitcode}: "
            f"{reason}. Finished images stay; run again to go on"
        )


def _device_of(device: str, worker: int) -> str:
    if device != "cuda":
        return device
    return f"cuda:{worker % max(1, torch.cuda.device_count())}"


class _RayProposer:
    """An actor: models once, then batches of image ids to lines."""

    def __init__(self, config: ProposerConfig) -> None:
        self._proposer = ImageProposer(config)
        self._record_of = {record.image_id: record for record in self._proposer.folder.records}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids = [int(image_id) for image_id in batch["item"]]
        return {"line": [encode_line(i, self._proposer.propose(self._record_of[i])) for i in ids]}


def propose_on_ray(
    config: ProposerConfig, todo: Sequence[int], address: str, num_workers: int
) -> Iterator[str]:
    """Share images among processes of a Ray cluster; yields their lines as they come.

    Ray Data keeps what is under way bounded, restarts processes that die and makes their images
    again. Every machine needs this project and sees the same paths.

    Args:
        config: Of each process; ``cuda`` asks for one GPU each.
        todo: Image ids.
        address: Of the cluster, ``auto`` for the one this machine belongs to, ``local`` for a new
            one on this machine.
        num_workers: Processes.

    Raises:
        ValueError: Ray is not installed.
        WorkerError: An image could not be used, or a process failed for good.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ValueError("--ray needs Ray: install the dependency group `cluster`") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    on_gpu = config.device == "cuda"
    items = ray.data.from_items(list(todo), override_num_blocks=min(len(todo), 4 * num_workers))
    lines = items.map_batches(
        _RayProposer,
        fn_constructor_args=(config,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else 1,
    )
    try:
        for row in lines.iter_rows():
            yield str(row["line"])
    except RayError as error:
        cause = getattr(error, "cause", None)
        raise WorkerError(f"{cause or error}. Finished images stay; run again to go on") from error
