"""Processes that train together: one by default, several under ``torchrun``.

It knows who is who and how numbers are averaged; it knows no training.

    torchrun --nproc-per-node 8 -m training.train_classifier ...
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

_LOGGER = logging.getLogger(__name__)

DeviceName = Literal["auto", "cpu", "cuda"]
"""``auto``: CUDA where it is there, else the CPU."""
_PATIENCE = timedelta(days=2)
"""The others wait so long for the main process, which reads images, describes proposals and
evaluates; one that dies ends the others at once, through torchrun or the broken connection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One of the processes that train one model."""

    rank: int = 0
    num_processes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """It alone writes files."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """Its share of ``total`` rows of a batch.

        Raises:
            ValueError: The rows cannot be shared equally, and a mean of means would be wrong.
        """
        if total % self.num_processes:
            raise ValueError(
                f"{total} images a step cannot be shared equally by {self.num_processes} "
                "processes; choose a multiple"
            )
        share = total // self.num_processes
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over all processes, on all of them."""
        return {name: value / self.num_processes for name, value in self.total(values).items()}

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum of each value over all processes, on all of them."""
        if self.num_processes == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def add_gradients_(self, parameters: Iterator[nn.Parameter]) -> None:
        """Make each gradient the sum over all processes; a process without one adds zero."""
        if self.num_processes == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(wanted, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def in_step(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over all processes; itself where it is alone."""
        if self.num_processes == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.num_processes > 1:
            total = torch.zeros(1, device=self.device)
            distributed.all_reduce(total)
            _synchronise(total)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others: what it wrote is there for them."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def choose_device(device: DeviceName) -> Literal["cpu", "cuda"]:
    """What ``auto`` means on this machine, logged; anything else is itself.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device cuda: torch sees no GPU here; choose cpu or auto")
    if device != "auto":
        return device
    chosen: Literal["cpu", "cuda"] = "cuda" if has_gpu else "cpu"
    _LOGGER.info("device %s: torch sees %s", chosen, "a GPU" if has_gpu else "no GPU")
    return chosen


@contextmanager
def training_process(device: DeviceName = "auto") -> Iterator[Process]:
    """Who this process is: alone, or one of those that ``torchrun`` started.

    Args:
        device: Under ``torchrun`` with CUDA, each local process takes the GPU of its number.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    on_gpu = choose_device(device) == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if "RANK" not in os.environ:
        yield Process(device=own)
        return
    if on_gpu:
        torch.cuda.set_device(own)
    store, rank, num_processes = next(rendezvous("env://", timeout=_PATIENCE))
    # After a restart by torchrun the store still has the addresses of the processes that died.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=_PATIENCE,
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=num_processes,
    )
    try:
        yield Process(
            rank=distributed.get_rank(),
            num_processes=distributed.get_world_size(),
            device=own,
        )
    finally:
        distributed.destroy_process_group()


def _synchronise(tensor: Tensor) -> None:
    """NCCL only queues; reading a value waits."""
    tensor.item()
