"""What the calls of a client return."""

from dataclasses import dataclass
from pathlib import Path

from weaksam_rt.errors import WeakSamError
from weaksam_rt.types import Detections, Proposals

EncodedImage = bytes | Path
"""A JPEG, PNG or WebP file: its bytes, or where it lies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectResult:
    """What was found in one image."""

    detections: Detections
    label_names: tuple[str, ...]
    """The class name of each detection."""
    version: int
    """The version of ``weaksam_detect`` that answered; it stands for one set of engines."""

    def __len__(self) -> int:
        return len(self.detections)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectOutcome:
    """One image of many: its result or its error."""

    image: EncodedImage
    """What was given."""
    result: DetectResult | None
    error: WeakSamError | None
    latency_ms: float
    """From reading the image to the parsed answer, or to the error."""

    def unwrap(self) -> DetectResult:
        """The result; raises the error if there is none."""
        if self.result is None:
            raise self.error or AssertionError("neither result nor error")
        return self.result


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposeResult:
    """Proposals of one image and the tags that steered them."""

    proposals: Proposals
    used_tags: tuple[str, ...]
    """The tags given, or those that the classifier saw."""
    version: int
    """The version of ``weaksam_propose`` that answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSummary:
    """What an engine's passport says, as far as a server passes it on."""

    engine: str
    """What runs it, as in ``onnxruntime``."""
    precision: str
    """Of its arithmetic, as in ``fp32``; empty: not recorded."""
    parity: float | None
    """Largest difference from PyTorch of any output, relative; None: not recorded."""
    ap50: float | None
    """In [0, 1], on the data of its release; None: not recorded."""
    created_at: str
    """UTC, ISO 8601; empty: not recorded."""
    changes: tuple[str, ...]
    """What differs from the version before; empty for a first version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One model version that the server knows."""

    name: str
    version: str
    is_ready: bool
    reason: str
    """Why it is not ready; empty if it is."""
    summary: EngineSummary | None = None
    """Of an engine that a served pipeline calls in this version."""
