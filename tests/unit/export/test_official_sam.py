"""SAM in the official layout: loaded, exported and packed, equal to the package's predictor."""

from functools import partial

import numpy as np
import onnx
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

from benchmarks.official_sam import MAX_RELATIVE_ERROR, measure, prompted_images
from export.exportable import example_tensors, sam_exportables
from export.onnx_files import save_onnx
from export.onnx_from_module import onnx_from_module
from export.sam_agreement import agreement_with_segment_anything, spread_out_
from training.models.sam import SamConfig, VitEncoderConfig, build_sam, sam_config, save_sam
from weaksam_rt.artifacts import external_data_path, load_artifact, write_manifest
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.errors import ArtifactError

_SMALL = SamConfig(
    encoder=VitEncoderConfig(depth=2, width=64, num_heads=4, global_blocks=(1,)),
    image_size=256,
    embed_dim=64,
    num_heads=4,
    mlp_dim=128,
)


def _package_sam():
    """``_SMALL`` put together as ``segment_anything.build_sam`` does, without our builder."""
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=2,
            embed_dim=64,
            img_size=256,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=4,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=14,
            out_chans=64,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=64,
            image_embedding_size=(16, 16),
            input_image_size=(256, 256),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=128, num_heads=4),
            transformer_dim=64,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).eval()


@pytest.fixture(scope="module")
def package_sam():
    torch.manual_seed(0)
    sam = _package_sam()
    spread_out_(sam, torch.Generator().manual_seed(1))
    return sam


@pytest.fixture(scope="module")
def artifacts(package_sam, tmp_path_factory):
    """The encoder in one file, the decoder with its weights beside it, as a ViT-H has them."""
    root = tmp_path_factory.mktemp("sam")
    save_sam(root / "sam.safetensors", package_sam, _SMALL)
    found = []
    exportables = sam_exportables(root / "sam.safetensors")
    for exportable, external_above in zip(exportables, (10**9, 10**3), strict=True):
        path = root / exportable.model / "model.onnx"
        onnx_from_module(
            exportable.module,
            exportable.contract,
            example_tensors(exportable.inputs[0]),
            path,
            external_above=external_above,
        )
        found.append(
            write_manifest(
                path,
                model=exportable.model,
                engine="onnxruntime",
                parameters=exportable.parameters,
                provenance={},
            )
        )
    return found


def test_packed_prompts_of_two_images_agree_with_segment_anything(package_sam, artifacts):
    encoder, decoder = map(OnnxRuntimeModel, artifacts)
    agreement = agreement_with_segment_anything(package_sam, encoder, decoder, prompted_images())
    assert agreement.num_prompts == 7
    assert agreement.num_calls == 1
    assert agreement.worst < MAX_RELATIVE_ERROR


def test_other_weights_do_not_agree(package_sam, artifacts):
    encoder, decoder = map(OnnxRuntimeModel, artifacts)
    other = _package_sam()
    other.load_state_dict(package_sam.state_dict())
    with torch.no_grad():
        other.image_encoder.blocks[1].attn.rel_pos_h.mul_(1.5)
    agreement = agreement_with_segment_anything(other, encoder, decoder, prompted_images())
    assert agreement.embeddings > MAX_RELATIVE_ERROR


def test_weights_beside_the_graph_are_part_of_the_artifact(artifacts, tmp_path):
    artifact = artifacts[1]
    assert artifact.files == (artifact.path, external_data_path(artifact.path))
    assert artifacts[0].files == (artifacts[0].path,)
    for path in (*artifact.files, artifact.path.parent / "manifest.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load_artifact(tmp_path).files == tuple(tmp_path / p.name for p in artifact.files)
    weights = tmp_path / artifact.files[-1].name
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or foreign"):
        load_artifact(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_artifact(tmp_path)


def test_one_file_replaces_a_graph_with_weights_beside_it(artifacts, tmp_path):
    model = onnx.load(artifacts[1].path)
    save_onnx(onnx.load(artifacts[1].path), tmp_path / "model.onnx", external_above=0)
    assert external_data_path(tmp_path / "model.onnx").is_file()
    save_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))


@pytest.mark.parametrize("layout", ["vit_b", "vit_l", "vit_h"])
def test_names_and_shapes_are_those_of_the_official_checkpoints(layout):
    with torch.device("meta"):
        ours = build_sam(sam_config(layout)).state_dict()
        theirs = sam_model_registry[layout](checkpoint=None).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_vit_b_agrees_with_segment_anything(tmp_path):
    result = measure("vit_b", tmp_path)
    assert result.agreement.num_prompts == 7
    assert np.isfinite(result.agreement.worst)
    assert result.agreement.worst < MAX_RELATIVE_ERROR
