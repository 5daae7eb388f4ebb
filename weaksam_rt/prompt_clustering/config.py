"""How maps become prompts."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from weaksam_rt.class_activation_map import CAM_PEAKS, CROSS_PEAKS, PeakConfig

BackendName = Literal["reference", "cuda", "auto"]
"""``reference``: NumPy. ``cuda``: the kernels of ``csrc``, an error where they cannot run.
``auto``: ``cuda`` where it can run, else ``reference``; says which, once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusteringConfig:
    """How maps become prompts."""

    cam_peaks: PeakConfig = CAM_PEAKS
    """Peaks of coarse and fine maps."""
    cross_peaks: PeakConfig = CROSS_PEAKS
    """Peaks of cross-attention maps."""
    points_per_cluster: int = 5
    """Cross-attention peaks per cluster: n peaks give max(1, n // points_per_cluster) clusters."""
    backend: BackendName = "reference"
    """What runs it, and what turns SAM's logits into boxes and masks; all give the same prompts and
    masks."""
    device: int = 0
    """Number of the GPU, for ``cuda`` and ``auto``; arrays on another GPU are worked on there."""

    def __post_init__(self) -> None:
        if self.points_per_cluster < 1:
            raise ValueError(f"points_per_cluster must be positive, got {self.points_per_cluster}")
        if self.device < 0:
            raise ValueError(f"device must be the number of a GPU, got {self.device}")
        if self.backend not in get_args(BackendName):
            raise ValueError(
                f"backend must be one of {', '.join(get_args(BackendName))}, got {self.backend!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePromptConfig:
    """How an engine makes prompts."""

    num_classes: int
    """That the classifier knows; tags are below."""
    model_size: int
    """Side of SAM's input in pixels."""
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    """Windows, thresholds, cluster size; the backend is always the kernels."""
