"""Optimisation profiles: the sizes of varying axes that an engine is tuned for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weaksam_rt.backends.base import Arrays
from weaksam_rt.contracts import PROMPTED_CLASSIFIER, SAM_MASK_DECODER, ModelContract

HOT_BATCHES = (1, 4, 8)
"""Batch sizes with a profile of their own."""
_AXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    SAM_MASK_DECODER: {
        "image_embeddings": ("images",),
        "image_index": ("prompts",),
        "point_coords": ("prompts", "points"),
        "point_labels": ("prompts", "points"),
    },
    PROMPTED_CLASSIFIER: {"image": ("passes",), "tag_ids": ("tags",), "image_size": ()},
}
"""What the leading axes of a model's inputs count, where they are no batch."""
_DECODER_HOT = {"images": 1, "prompts": 64, "points": 2}
"""One image with as many prompts as a call takes by default; a point with its padding, or a box."""
_DECODER_WIDE = {"images": (1, 1, 8), "prompts": (1, 64, 256), "points": (1, 2, 32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeRange:
    """The shapes of one input that a profile accepts, batch axis included."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    """What the engine is tuned for."""
    largest: tuple[int, ...]

    def __post_init__(self) -> None:
        triples = zip(self.smallest, self.usual, self.largest, strict=True)
        if not all(1 <= low <= mid <= high for low, mid, high in triples):
            raise ValueError(f"expected 1 <= smallest <= usual <= largest on every axis: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A range of shapes for every input."""

    name: str
    inputs: Mapping[str, ShapeRange]

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Profile":
        """Read back what ``dataclasses.asdict`` gave for a passport."""
        inputs = {
            name: ShapeRange(**{end: tuple(shape) for end, shape in ranges.items()})
            for name, ranges in content["inputs"].items()
        }
        return Profile(name=content["name"], inputs=inputs)

    def takes(self, arrays: Arrays) -> bool:
        """All shapes of the inputs are within its ranges."""
        return all(
            low <= size <= high
            for name, ranges in self.inputs.items()
            for low, size, high in zip(
                ranges.smallest, arrays[name].shape, ranges.largest, strict=True
            )
        )

    def check(self, contract: ModelContract) -> None:
        """Raise ``ValueError`` where a range does not fit the contract."""
        expected = {spec.name: _shape(contract, spec.name) for spec in contract.inputs}
        if set(self.inputs) != set(expected):
            raise ValueError(
                f"profile {self.name!r} is for inputs {sorted(self.inputs)}, {contract.name} has "
                f"{sorted(expected)}"
            )
        for name, shape in expected.items():
            ranges = self.inputs[name]
            for sizes in (ranges.smallest, ranges.largest):
                fits = len(sizes) == len(shape) and all(
                    want in (-1, got) for want, got in zip(shape, sizes, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"profile {self.name!r}: {contract.name}.{name} is {list(shape)}, got "
                        f"{list(sizes)}"
                    )


def default_profiles(
    contract: ModelContract, *, hot_batches: Sequence[int] = HOT_BATCHES
) -> tuple[Profile, ...]:
    """A narrow profile for each size that matters and, last, one for everything.

    Args:
        contract: Of an engine model.
        hot_batches: Of models with a batch axis; those beyond its limit are left out.
    """
    if contract.name == SAM_MASK_DECODER:
        return (
            _profile(contract, "hot", {k: (v, v, v) for k, v in _DECODER_HOT.items()}),
            _profile(contract, "wide", _DECODER_WIDE),
        )
    if contract.name == PROMPTED_CLASSIFIER:
        num_classes = contract.output("logits").shape[-1]
        tags = (1, min(2, num_classes), num_classes)
        return (_profile(contract, "wide", {"passes": (1, 2, 2), "tags": tags}),)
    most = contract.max_batch_size
    if not most:
        raise ValueError(f"{contract.name} has no batch axis; give its profiles explicitly")
    narrow = [b for b in hot_batches if b <= most]
    return (
        *(_profile(contract, f"batch {b}", {"batch": (b, b, b)}) for b in narrow),
        _profile(contract, "wide", {"batch": (1, max(1, most // 2), most)}),
    )


def _profile(
    contract: ModelContract, name: str, sizes: Mapping[str, tuple[int, int, int]]
) -> Profile:
    inputs = {}
    for spec in contract.inputs:
        shape = _shape(contract, spec.name)
        axes = ("batch",) if contract.is_batched else _AXES[contract.name][spec.name]
        smallest, usual, largest = (
            tuple(sizes[a][i] for a in axes) + shape[len(axes) :] for i in range(3)
        )
        inputs[spec.name] = ShapeRange(smallest=smallest, usual=usual, largest=largest)
    return Profile(name=name, inputs=inputs)


def _shape(contract: ModelContract, name: str) -> tuple[int, ...]:
    return ((-1,) if contract.is_batched else ()) + contract.input(name).shape
