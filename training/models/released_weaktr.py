"""The state dict of the released WeakTr checkpoints, as this project's classifier.

It knows the released names, shapes and order of attention maps; it knows no class names.

Source:
    WeakTr's and WeakSAM's public model definitions (github.com/hustvl), read for names and order.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from training.models.vit import VitConfig
from training.models.weaktr import WeakTr, published_config

_BLOCK_PARAMETERS = tuple(
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)
_VIT_PARAMETERS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
_UNUSED = ("norm.weight", "norm.bias")
"""The released network owns a final norm and never applies it."""
_SQUEEZE = "adaptive_attention_fusion.fc.0.weight"
_EXCITE = "adaptive_attention_fusion.fc.2.weight"


def weaktr_from_released(found: Mapping[str, Tensor]) -> WeakTr:
    """The classifier of a released checkpoint, sizes included, in evaluation mode.

    Args:
        found: The state dict, as ``load_weights`` reads it.

    Raises:
        ValueError: A tensor is missing, left over or of another shape (all are named), or the
            attention fusion does not fit the blocks.
    """
    _check_names(found)
    depth = _depth(found)
    num_maps, hidden = found[_SQUEEZE].shape[1], found[_SQUEEZE].shape[0]
    num_classes, dim = found["cls_token"].shape[1:]
    if num_maps % depth or dim % (num_maps // depth):
        raise ValueError(
            f"{_SQUEEZE} fuses {num_maps} maps, which {depth} blocks of {dim} channels cannot give"
        )
    patch = found["patch_embed.proj.weight"].shape[2]
    side = round((found["pos_embed"].shape[1] - num_classes) ** 0.5)
    vit = VitConfig(
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        depth=depth,
        num_heads=num_maps // depth,
        mlp_ratio=found["blocks.0.mlp.fc1.weight"].shape[0] // dim,
    )
    config = replace(published_config(vit), gate_reduction=max(1, num_maps // hidden))
    model = WeakTr(config, num_classes).eval()
    state = _own_names(found, num_heads=vit.num_heads, depth=depth)
    own = model.state_dict()
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in own.items()
        if state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"tensors of the checkpoint do not fit each other: {'; '.join(wrong)}")
    model.load_state_dict(state)
    return model


def released_names(depth: int) -> tuple[str, ...]:
    """All names of a released state dict with ``depth`` blocks."""
    blocks = tuple(f"blocks.{i}.{name}" for i in range(depth) for name in _BLOCK_PARAMETERS)
    return (*_VIT_PARAMETERS, *blocks, *_UNUSED, "head.weight", "head.bias", _SQUEEZE, _EXCITE)


def _depth(found: Mapping[str, Tensor]) -> int:
    numbers = [int(m[1]) for name in found if (m := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _check_names(found: Mapping[str, Tensor]) -> None:
    expected = set(released_names(max(1, _depth(found))))
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or unknown:
        raise ValueError(
            f"not a released WeakTr: missing {_shortened(missing)}, unknown {_shortened(unknown)}"
        )


def _shortened(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"


def _own_names(found: Mapping[str, Tensor], *, num_heads: int, depth: int) -> dict[str, Tensor]:
    state = {f"vit.{name}": found[name].float() for name in _VIT_PARAMETERS}
    state |= {f"vit.{name}": found[name].float() for name in found if name.startswith("blocks.")}
    state |= {name: found[name].float() for name in ("head.weight", "head.bias")}
    # Theirs counts attention maps by head, then by layer; ours by layer, then by head.
    order = torch.arange(num_heads * depth).unflatten(0, (num_heads, depth)).T.flatten()
    state["gate.squeeze.weight"] = found[_SQUEEZE].float()[:, order]
    state["gate.excite.weight"] = found[_EXCITE].float()[order]
    return state
