"""Concrete DropBlock: a small network hides the cells of an RoI that the detector leans on most, so
that it has to look at the rest of the object too.

Knows the pooled cells of RoIs; the detector makes its descriptions from the cells that are kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_MARGIN = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DropBlockConfig:
    """What is hidden while training, and how the hiding is learnt."""

    enabled: bool = False
    """Keeps the cells of every RoI in memory: about 100 kB a proposal instead of 12."""
    max_share: float = 0.3
    """About the share of an RoI's cells that is hidden where the network hides most, in (0, 1)."""
    block_cells: int = 3
    """Side of a hidden block in cells, odd."""
    temperature: float = 0.01
    """Of the relaxed Bernoulli draw that gradients flow through, above 0."""
    learning_rate: float = 1e-4
    """Peak rate of the hiding network."""
    reversal: float = 0.01
    """Strength of its turned-round gradient, above 0."""
    width: int = 64
    """Channels inside the network."""

    def __post_init__(self) -> None:
        if not 0 < self.max_share < 1 or self.block_cells < 1 or self.block_cells % 2 == 0:
            raise ValueError(
                f"max_share must be in (0, 1) and block_cells odd, got {self.max_share} and "
                f"{self.block_cells}"
            )
        if min(self.temperature, self.learning_rate, self.reversal, self.width) <= 0:
            raise ValueError(f"rates, temperature and width must be positive, got {self}")


class ConcreteDropBlock(nn.Module):
    """Chooses the cells that are kept.

    The network works against the detector: it shares the detector's backward pass through a
    reversed gradient.

    Source:
        MIST (arXiv:2004.04725), section 3.3. Differs in what the frozen trunk asks for: the cells
        are those of the cached pooled map (5 x 5 inside the box), the network is a narrow residual
        block on them, and its adversarial step is taken together with the detector's (MIST takes a
        second forward pass). Its rate of 1e-4 is MIST's, falling like the detector's; WeakSAM's
        release has 1e-5, times 3 at each step of its schedule.
    """

    def __init__(self, in_features: int, config: DropBlockConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(in_features)
        self.enter = nn.Linear(in_features, config.width)
        self.block = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.leave = nn.Conv2d(config.width, 1, 1)

    def forward(self, cells: Float[Tensor, "n h w d"]) -> Float[Tensor, "n h w"]:
        """1 where a cell is kept, 0 where it is hidden; at random, and never all of an RoI."""
        hidden = functional.relu(self.enter(self.norm(cells))).movedim(3, 1)
        hidden = functional.relu(self.block(hidden) + hidden)
        seed_share = self.config.max_share / self.config.block_cells**2
        probability = self.leave(hidden)[:, 0].sigmoid() * seed_share
        noise = torch.rand_like(probability)
        dropped = relaxed_bernoulli(probability, noise, temperature=self.config.temperature)
        keep = keep_outside_blocks(dropped, block_cells=self.config.block_cells)
        return reverse_gradient(keep, self.config.reversal)


def relaxed_bernoulli(
    probability: Float[Tensor, "*s"], noise: Float[Tensor, "*s"], *, temperature: float
) -> Float[Tensor, "*s"]:
    """Draws of 0 or 1; gradients flow as if each were the relaxed (concrete) draw.

    Args:
        probability: Of a 1, in [0, 1].
        noise: Uniform in [0, 1]: a draw is 1 where the noise is above 1 - ``probability``.
        temperature: Above 0; the lower, the closer the relaxed draw is to the hard one.

    Source:
        Concrete distribution (arXiv:1611.00712), section 3; straight-through.
    """
    logit = torch.logit(probability, eps=_MARGIN) + torch.logit(noise, eps=_MARGIN)
    soft = (logit / temperature).sigmoid()
    hard = (logit > 0).to(soft.dtype)
    return hard + (soft - soft.detach())


def keep_outside_blocks(
    dropped: Float[Tensor, "n h w"], *, block_cells: int
) -> Float[Tensor, "n h w"]:
    """1 minus the dropped cells grown to blocks; all 1 for an RoI of which nothing would be left.

    Args:
        dropped: 1 at the centre of each block, else 0.
        block_cells: Side of a block, odd.

    Source:
        DropBlock (arXiv:1810.12890), algorithm 1.
    """
    blocks = functional.max_pool2d(
        dropped[:, None], block_cells, stride=1, padding=block_cells // 2
    )[:, 0]
    keep = 1 - blocks
    is_empty = keep.detach().sum(dim=(1, 2), keepdim=True) < 0.5
    return torch.where(is_empty, torch.ones_like(keep), keep)


def reverse_gradient(x: Float[Tensor, "*s"], strength: float) -> Float[Tensor, "*s"]:
    """``x`` itself; its gradient comes back times ``-strength``.

    Source:
        Domain-adversarial training (arXiv:1505.07818), section 3.1.
    """
    return x.detach() - strength * (x - x.detach())
