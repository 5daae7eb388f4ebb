"""The runtime segments as ``segment_anything.SamPredictor`` does: masks, scores, boxes."""

import asyncio

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

from training.models.sam import CompactEncoderConfig, SamConfig, VitEncoderConfig, build_sam
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from training.torch_backend import TorchModel
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    SamParameters,
    sam_image_encoder_contract,
    sam_mask_decoder_contract,
)
from weaksam_rt.masks import decode_rle
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline

_SIZES = {
    "compact": SamConfig(
        encoder=CompactEncoderConfig(width=16), image_size=64, embed_dim=32, num_heads=2, mlp_dim=32
    ),
    "official layout": SamConfig(
        encoder=VitEncoderConfig(depth=2, width=32, num_heads=2, global_blocks=(1,), window_size=3),
        image_size=64,
        embed_dim=32,
        num_heads=2,
        mlp_dim=32,
    ),
}


@pytest.fixture(scope="module", params=_SIZES)
def world(request):
    torch.manual_seed(0)
    config = _SIZES[request.param]
    sam = build_sam(config).eval()
    with torch.no_grad():  # random weights give masks near zero everywhere: spread them out
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(40)
    parameters = SamParameters(
        image_size=64, embedding_size=config.embedding_size, embedding_dim=32
    )
    backend = LocalBackend(
        {
            "sam_image_encoder": TorchModel(
                SamImageEncoderAdapter(sam), sam_image_encoder_contract(parameters)
            ),
            "sam_mask_decoder": TorchModel(
                SamMaskDecoderAdapter(sam), sam_mask_decoder_contract(parameters)
            ),
        }
    )
    pipeline = WeakSamPipeline(backend, PipelineModels(sam=parameters), PipelineConfig())
    return SamPredictor(sam), pipeline


def _image(size):
    return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)


_POINTS = np.array([[[30.0, 20.0], [70.0, 50.0]], [[5.0, 60.0], [90.0, 10.0]]], np.float32)
_LABELS = np.array([[1, 0], [1, 1]], np.int32)
_BOXES = np.array([[10.0, 5.0, 60.0, 55.0], [40.0, 20.0, 95.0, 70.0]], np.float32)
_PROMPTS = {
    "points": {"point_coords": _POINTS, "point_labels": _LABELS},
    "boxes": {"boxes": _BOXES},
    "points in boxes": {"point_coords": _POINTS, "point_labels": _LABELS, "boxes": _BOXES},
}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompts", _PROMPTS)
@pytest.mark.parametrize("size", [(80, 100), (100, 80), (64, 64)])
def test_masks_scores_and_boxes_agree(world, size, prompts, multimask):
    predictor, pipeline = world
    arrays, image = _PROMPTS[prompts], _image(size)
    result = asyncio.run(pipeline.segment(image, **arrays, multimask=multimask))
    predictor.set_image(image)
    for i in range(2):
        logits, scores, low_res = predictor.predict(
            point_coords=arrays["point_coords"][i] if "point_coords" in arrays else None,
            point_labels=arrays["point_labels"][i] if "point_labels" in arrays else None,
            box=arrays["boxes"][i] if "boxes" in arrays else None,
            multimask_output=multimask,
            return_logits=True,
        )
        ours = decode_rle(result.mask_counts[i], size)
        is_clear = np.abs(logits) > 1e-3 * np.abs(logits).max()
        assert is_clear.mean() > 0.95
        np.testing.assert_array_equal(ours[is_clear], (logits > 0)[is_clear])
        np.testing.assert_allclose(result.scores[i], scores, atol=1e-4)
        theirs = batched_mask_to_box(torch.from_numpy(logits > 0)).numpy().astype(np.float32)
        theirs[(logits > 0).any(axis=(1, 2)), 2:] += 1  # theirs end on the last pixel
        np.testing.assert_allclose(result.boxes[i], theirs, atol=1)
        stride = 64 // low_res.shape[-1]
        height, width = (-(-side // stride) for side in predictor.input_size)  # no padding
        cropped = torch.from_numpy(low_res[:, :height, :width])
        stability = calculate_stability_score(cropped, 0.0, 1.0).numpy()
        np.testing.assert_allclose(result.stability_scores[i], np.nan_to_num(stability), atol=5e-3)
