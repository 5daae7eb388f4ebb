"""The released file itself is not at hand: its layout is, and a network of that layout is written
out here from the published formulas.
"""

import json

import pytest
import torch
from torch.nn import functional

from training.convert_classifier import ConvertClassifierConfig, convert_classifier
from training.models.released_weaktr import released_names, weaktr_from_released
from training.models.vit_adapter import load_classifier
from weaksam_rt.errors import ArtifactError

_DEPTH, _HEADS, _DIM, _PATCH, _SIDE = 3, 2, 8, 4, 4


def _released(num_classes=2, depth=_DEPTH, heads=_HEADS, dim=_DIM, patch=_PATCH, side=_SIDE):
    """A synthetic state dict with the names and shapes of the release."""
    maps, hidden = depth * heads, depth * heads // 2
    shapes = {
        "cls_token": (1, num_classes, dim),
        "pos_embed": (1, num_classes + side**2, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (num_classes, dim, 3, 3),
        "head.bias": (num_classes,),
        "adaptive_attention_fusion.fc.0.weight": (hidden, maps),
        "adaptive_attention_fusion.fc.2.weight": (maps, hidden),
    }
    for i in range(depth):
        for layer, outputs, inputs in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes |= {f"blocks.{i}.{layer}.weight": (outputs, inputs)}
            shapes |= {f"blocks.{i}.{layer}.bias": (outputs,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (dim,), f"blocks.{i}.{norm}.bias": (dim,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _attention_and_tokens(state, image, num_classes):
    patches = functional.conv2d(
        image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=_PATCH
    )
    tokens = torch.cat([state["cls_token"][0], patches[0].flatten(1).T]) + state["pos_embed"][0]
    by_layer = []

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return functional.layer_norm(
            x, (_DIM,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
        )

    for i in range(_DEPTH):
        qkv = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        width = _DIM // _HEADS
        contexts, of_heads = [], []
        for head in range(_HEADS):
            query, key, value = (
                qkv[:, part * _DIM + head * width : part * _DIM + (head + 1) * width]
                for part in range(3)
            )
            attention = (query @ key.T * width**-0.5).softmax(dim=1)
            of_heads.append(attention)
            contexts.append(attention @ value)
        by_layer.append(of_heads)
        tokens = tokens + linear(torch.cat(contexts, dim=1), f"blocks.{i}.attn.proj")
        hidden = functional.gelu(linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"blocks.{i}.mlp.fc2")
    return tokens, by_layer


def test_the_converted_network_computes_the_published_formulas():
    """No final norm, and the fusion counts maps by head, then by layer."""
    state, num_classes = _released(), 2
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens, by_layer = _attention_and_tokens(state, image, num_classes)
    maps = torch.stack([by_layer[k][h] for h in range(_HEADS) for k in range(_DEPTH)])
    gate = torch.sigmoid(
        state["adaptive_attention_fusion.fc.2.weight"]
        @ torch.relu(state["adaptive_attention_fusion.fc.0.weight"] @ maps.mean(dim=(1, 2)))
    )
    fused = (gate[:, None, None] * maps).mean(dim=0)
    patch_tokens = tokens[num_classes:].T.reshape(1, _DIM, 4, 4)
    coarse = functional.conv2d(patch_tokens, state["head.weight"], state["head.bias"], padding=1)
    weighed = fused[:num_classes, num_classes:] * coarse[0].relu().flatten(1)
    fine = (fused[num_classes:, num_classes:] @ weighed.T).T

    with torch.inference_mode():
        output = weaktr_from_released(state)(image)
    torch.testing.assert_close(output.class_logits[0], tokens[:num_classes].mean(dim=1))
    torch.testing.assert_close(output.coarse_logits, coarse.mean(dim=(2, 3)))
    torch.testing.assert_close(output.coarse_maps, coarse.relu())
    torch.testing.assert_close(output.fine_maps[0].flatten(1), fine, atol=1e-5, rtol=1e-4)
    cross = torch.stack([torch.stack(heads) for heads in by_layer])[:, :, :2, 2:]
    torch.testing.assert_close(output.cross_maps[0].flatten(3), cross)


def test_the_sizes_of_the_release_are_read_from_its_tensors():
    model = weaktr_from_released(
        _released(num_classes=20, depth=12, heads=6, dim=384, patch=16, side=14)
    )
    vit = model.config.vit
    assert (vit.image_size, vit.patch_size, vit.dim, vit.depth) == (224, 16, 384, 12)
    assert (vit.num_heads, vit.mlp_ratio, model.num_classes) == (6, 4, 20)
    assert model.config.gate_reduction == 2
    assert set(released_names(12)) == set(_released(depth=12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"missing \['head.bias'\]"),
        ({"blocks.1.attn.qkv.bias": None}, "missing .*blocks.1.attn.qkv.bias"),
        ({"head_dist.weight": torch.zeros(2)}, r"unknown \['head_dist.weight'\]"),
        ({"head.weight": torch.zeros(2, 8, 1, 1)}, "head.weight is .2, 8, 1, 1., expected"),
        (
            {"adaptive_attention_fusion.fc.0.weight": torch.zeros(3, 7)},
            "fuses 7 maps, which 3 blocks",
        ),
    ],
)
def test_another_layout_is_refused_and_its_tensors_are_named(change, message):
    state = {name: t for name, t in (_released() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        weaktr_from_released(state)


def _folder(path, categories):
    (path / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": categories}
    (path / "instances.json").write_text(json.dumps(content))
    return path


def test_a_released_file_becomes_a_classifier_with_the_names_of_a_data_set(tmp_path):
    torch.save({"model": _released(num_classes=3), "epoch": 1}, tmp_path / "weaktr.pth")
    by_id = _folder(tmp_path / "coco", [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}])
    output = tmp_path / "c.safetensors"
    convert_classifier(
        ConvertClassifierConfig(checkpoint=tmp_path / "weaktr.pth", data=by_id, output=output)
    )
    loaded = load_classifier(output)
    assert loaded.class_names == ("person", "car")
    assert loaded.class_tokens == (0, 2), "the token of the raw id 2 stands for no class"
    names = [{"id": i + 5, "name": name} for i, name in enumerate("abc")]
    voc = _folder(tmp_path / "voc", names)
    convert_classifier(
        ConvertClassifierConfig(checkpoint=tmp_path / "weaktr.pth", data=voc, output=output)
    )
    assert load_classifier(output).class_names == ("a", "b", "c")


def test_a_checkpoint_of_other_classes_or_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": _released(num_classes=2)}, tmp_path / "weaktr.pth")
    many = _folder(tmp_path / "many", [{"id": i, "name": str(i)} for i in range(1, 4)])
    config = ConvertClassifierConfig(
        checkpoint=tmp_path / "weaktr.pth", data=many, output=tmp_path / "c.safetensors"
    )
    with pytest.raises(ArtifactError, match=r"2 class tokens, but .* has 3 classes"):
        convert_classifier(config)
    torch.save({"model": _released(), "args": print}, tmp_path / "weaktr.pth")
    with pytest.raises(ArtifactError, match="cannot read weights"):
        convert_classifier(config)
