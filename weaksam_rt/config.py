"""Settings of the pipeline: typed, checked, one JSON or TOML file."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from weaksam_rt.prompt_clustering import ClusteringConfig
from weaksam_rt.proposals import ProposalConfig

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionConfig:
    """How detection candidates become detections."""

    score_thresh: float = 0.3
    """Lowest score to return, in [0, 1]; a request may ask for another."""
    nms_thresh: float = 0.5
    """Boxes that overlap a better one of their class by more than this IoU go."""
    max_detections: int = 100
    """Most detections to return; a request may ask for fewer or more."""

    def __post_init__(self) -> None:
        for name in ("score_thresh", "nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be positive, got {self.max_detections}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """All settings of the served pipeline."""

    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Candidates to detections."""
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    """Maps to point prompts."""
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    """SAM's masks to proposals."""
    present_logit_thresh: float = -0.5
    """Without tags, a class counts as present when its logit is above this."""
    flip: bool = True
    """Sum activation maps over the image and its mirror image."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; ``from_json`` reads them back."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "PipelineConfig":
        """Settings from JSON or TOML values; what is left out keeps its default.

        Raises:
            ValueError: A key is unknown or a value is out of its range or of another type.
        """
        return _from_mapping(PipelineConfig, content, "")


def load_toml(path: Path) -> PipelineConfig:
    """Settings from a TOML file; see ``PipelineConfig.from_json``."""
    try:
        return PipelineConfig.from_json(tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _from_mapping(kind: type[_T], content: Mapping[str, Any], where: str) -> _T:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(content) - known):
        raise ValueError(f"unknown setting {where}{unknown[0]}; known: {sorted(known)}")
    values = {}
    for name, value in content.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(f"setting {where}{name}: expected a table, got {value!r}")
            values[name] = _from_mapping(hint, value, f"{where}{name}.")
        else:
            values[name] = _checked(value, hint, where + name)
    return kind(**values)


def _checked(value: Any, hint: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"setting {where}: expected a list, got {value!r}")
        item = get_args(hint)[0]
        return tuple(_checked(part, item, f"{where}[{i}]") for i, part in enumerate(value))
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"setting {where}: expected one of {get_args(hint)}, got {value!r}")
    if hint in (int, float, bool) and type(value) is not hint:
        raise ValueError(f"setting {where}: expected {hint.__name__}, got {value!r}")
    return value
