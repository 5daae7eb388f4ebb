"""The classifier as it is served: pixels in, logits and raw maps out; and its file.

It knows the contract ``vit_classifier``; it knows no export format.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from training.data.augment import normalize_images
from training.engine.checkpoint import load_metadata, load_weights, save_weights
from training.models.vit import ActivationRanges, VitConfig
from training.models.weaktr import WeakTr, WeakTrConfig, attention_layers
from weaksam_rt.contracts import VitClassifierParameters
from weaksam_rt.errors import ArtifactError

_METADATA_KEY = "weaktr"


class VitClassifierAdapter(nn.Module):
    """``WeakTr`` behind the contract ``vit_classifier``; traceable, with any batch size.

    Args:
        model: A trained classifier.
        layers: Layers whose class attention gives the cross maps; None: ``attention_layers``.
    """

    def __init__(self, model: WeakTr, layers: tuple[int, ...] | None = None) -> None:
        super().__init__()
        depth = model.config.vit.depth
        self.model = model
        self.layers = attention_layers(depth) if layers is None else layers
        if not self.layers or not all(0 <= layer < depth for layer in self.layers):
            raise ValueError(f"layers {self.layers} of a model with layers 0 to {depth - 1}")

    def forward(
        self, image: UInt8[Tensor, "b s s 3"]
    ) -> tuple[
        Float[Tensor, "b c"],
        Float[Tensor, "b c h w"],
        Float[Tensor, "b c h w"],
        Float[Tensor, "b m c h w"],
    ]:
        """Class-token logits, coarse, fine and cross maps in the contract's order, float32.

        The m cross maps are those of the first chosen layer's heads, then the next layer's.
        """
        output = self.model(normalize_images(image))
        cross = torch.cat([output.cross_maps[:, layer] for layer in self.layers], dim=1)
        return output.class_logits, output.coarse_maps, output.fine_maps, cross

    def parameters_of_contract(self, class_names: tuple[str, ...]) -> VitClassifierParameters:
        """The sizes that the contract depends on."""
        vit = self.model.config.vit
        return VitClassifierParameters(
            image_size=vit.image_size,
            map_size=vit.map_size,
            num_cross_maps=vit.num_heads * len(self.layers),
            class_names=class_names,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier:
    """A classifier from its file, in evaluation mode."""

    model: WeakTr
    class_names: tuple[str, ...]


def save_classifier(
    path: Path,
    model: WeakTr,
    class_names: tuple[str, ...],
    *,
    dtype: torch.dtype = torch.float32,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write one ``.safetensors`` file that ``load_classifier`` reads without being told sizes.

    Args:
        path: Replaced atomically.
        model: Its config is stored beside the tensors.
        class_names: In the order of the logits.
        dtype: Of the stored tensors; float16 halves the file.
        provenance: JSON values to keep with the weights (data, recipe, metrics).
    """
    if len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for {model.num_classes} classes")
    metadata = {
        _METADATA_KEY: dataclasses.asdict(model.config),
        "class_names": list(class_names),
        "provenance": dict(provenance or {}),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_weights(path, tensors, metadata)


def load_classifier(path: Path) -> LoadedClassifier:
    """The classifier that ``save_classifier`` wrote, float32, in evaluation mode.

    Raises:
        ArtifactError: The file is damaged or not a classifier's.
    """
    metadata = load_metadata(path)
    try:
        config = _config_from_json(metadata[_METADATA_KEY])
        class_names = tuple(metadata["class_names"])
        model = WeakTr(config, len(class_names))
        model.load_state_dict(load_weights(path))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} is not a classifier of training.train_classifier: {error}"
        ) from error
    return LoadedClassifier(model=model.eval(), class_names=class_names)


def _config_from_json(content: Mapping[str, Any]) -> WeakTrConfig:
    vit = dict(content["vit"])
    if vit["activation_ranges"] is not None:
        vit["activation_ranges"] = tuple(
            ActivationRanges(**{name: tuple(bounds) for name, bounds in ranges.items()})
            for ranges in vit["activation_ranges"]
        )
    return WeakTrConfig(**{**content, "vit": VitConfig(**vit)})
