import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

from training.models.sam import (
    SAM_CONFIGS,
    CompactEncoderConfig,
    SamConfig,
    VitEncoderConfig,
    build_sam,
    compact,
    load_sam,
    sam_config,
    save_sam,
)
from weaksam_rt.errors import ArtifactError

TOY_SIZES = {"image_size": 64, "embed_dim": 32, "num_heads": 2, "mlp_dim": 48}
TOY_VIT = SamConfig(
    encoder=VitEncoderConfig(depth=2, width=32, num_heads=2, global_blocks=(1,), window_size=3),
    **TOY_SIZES,
)
TOY_COMPACT = SamConfig(encoder=CompactEncoderConfig(width=16), **TOY_SIZES)


def package_toy_vit() -> Sam:
    """``TOY_VIT`` put together from the package's own classes, as its builder does."""
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=2,
            embed_dim=32,
            img_size=64,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=2,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=3,
            out_chans=32,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=48, num_heads=2),
            transformer_dim=32,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    ).eval()


def shapes_of(sam: Sam) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in sam.state_dict().items()}


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_official_sizes_have_the_official_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        official, ours = sam_model_registry[name](), build_sam(sam_config(name))

    assert shapes_of(ours) == shapes_of(official)


def test_an_official_checkpoint_loads_strictly_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    official = package_toy_vit()
    path = tmp_path / "sam_toy.pth"
    torch.save(official.state_dict(), path)

    loaded = load_sam(path, TOY_VIT)

    request = {
        "image": torch.rand(3, 64, 48) * 255,
        "original_size": (32, 24),
        "point_coords": torch.tensor([[[10.0, 20.0]], [[30.0, 5.0]]]),
        "point_labels": torch.tensor([[1], [1]]),
    }
    (expected,) = official([request], multimask_output=True)
    (found,) = loaded([request], multimask_output=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_vit_b_checkpoint_is_recognised_by_its_content(tmp_path: Path) -> None:
    torch.manual_seed(0)
    official = sam_model_registry["vit_b"]()
    path = tmp_path / "any_name.pth"
    torch.save(official.state_dict(), path)

    loaded = load_sam(path)

    image = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        assert torch.equal(loaded.image_encoder(image), official.image_encoder(image))


@pytest.mark.parametrize("config", [TOY_VIT, TOY_COMPACT])
def test_a_saved_sam_says_itself_what_it_is(config: SamConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam(config)
    save_sam(tmp_path / "sam.safetensors", sam, config)

    loaded = load_sam(tmp_path / "sam.safetensors")

    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.image_encoder(image), sam.image_encoder(image))


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    sam = build_sam(TOY_COMPACT)
    save_sam(tmp_path / "sam.safetensors", sam, TOY_COMPACT, dtype=torch.float16)

    loaded = load_sam(tmp_path / "sam.safetensors")

    for found, kept in zip(loaded.parameters(), sam.parameters(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, kept, rtol=1e-3, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sam.safetensors"
    save_sam(path, build_sam(TOY_COMPACT), TOY_COMPACT)
    with pytest.raises(ArtifactError, match="does not fit"):
        load_sam(path, dataclasses.replace(TOY_COMPACT, embed_dim=16))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="official sam_vit_b"):
        load_sam(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="compact, vit_b, vit_l, vit_h"):
        sam_config("vit_x")


def test_the_compact_sam_has_the_promised_sizes() -> None:
    config = SAM_CONFIGS["compact"]()
    sam = build_sam(config)
    with torch.no_grad():
        embedding = sam.image_encoder(torch.zeros(1, 3, 256, 256))

    assert config == compact()
    assert embedding.shape == (1, 128, 32, 32)
    assert sum(p.numel() for p in sam.parameters()) * 2 <= 12e6  # bytes in float16


def test_a_frame_that_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the stride 8"):
        dataclasses.replace(TOY_COMPACT, image_size=60)
