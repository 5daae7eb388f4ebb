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
from training.models.weaktr import WeakTr, attention_layers, config_from_json
from weaksam_rt.contracts import VitClassifierParameters
from weaksam_rt.errors import ArtifactError

_METADATA_KEY = "weaktr"


class VitClassifierAdapter(nn.Module):
    """``WeakTr`` behind the contract ``vit_classifier``; traceable, with any batch size.

    Args:
        model: A trained classifier.
        layers: Layers whose class attention gives the cross maps; None: ``attention_layers``.
        class_tokens: Positions of the model's classes that are served, ascending; None: all. A
            class token that stands for no class is still attended to, so it stays in the model.
    """

    def __init__(
        self,
        model: WeakTr,
        layers: tuple[int, ...] | None = None,
        class_tokens: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.class_tokens = None if class_tokens is None else list(class_tokens)
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
        return self.forward_normalized(normalize_images(image))

    def forward_normalized(
        self, image: Float[Tensor, "b 3 y x"]
    ) -> tuple[
        Float[Tensor, "b c"],
        Float[Tensor, "b c h w"],
        Float[Tensor, "b c h w"],
        Float[Tensor, "b m c h w"],
    ]:
        """The same for normalised RGB of any shape."""
        output = self.model(image)
        cross = torch.cat([output.cross_maps[:, layer] for layer in self.layers], dim=1)
        if self.class_tokens is None:
            return output.class_logits, output.coarse_maps, output.fine_maps, cross
        served = self.class_tokens
        return (
            output.class_logits[:, served],
            output.coarse_maps[:, served],
            output.fine_maps[:, served],
            cross[:, :, served],
        )

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
    class_tokens: tuple[int, ...] | None = None
    """Positions of ``class_names`` among the model's class tokens; None: it has no others."""

    def served(self) -> VitClassifierAdapter:
        """The model behind its contract, with the named classes only."""
        return VitClassifierAdapter(self.model, class_tokens=self.class_tokens)


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
        class_names: In the order of the logits; empty for a class token that stands for no class.
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
        config = config_from_json(metadata[_METADATA_KEY])
        class_names = tuple(metadata["class_names"])
        model = WeakTr(config, len(class_names))
        model.load_state_dict(load_weights(path))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} is not a classifier of training.train_classifier: {error}"
        ) from error
    named = tuple(position for position, name in enumerate(class_names) if name)
    return LoadedClassifier(
        model=model.eval(),
        class_names=tuple(class_names[position] for position in named),
        class_tokens=None if len(named) == len(class_names) else named,
    )
