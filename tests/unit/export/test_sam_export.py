"""A SAM of the official layout, made tiny: exported, verified, and equal to SamPredictor."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from export.__main__ import export_model
from export.exportable import sam_exportables
from training.models.sam import (
    CompactEncoderConfig,
    SamConfig,
    VitEncoderConfig,
    build_sam,
    save_sam,
)
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.preprocessing import resize_longest_side
from weaksam_rt.prompts import box_prompt, pack_prompts, point_prompt

_SIZES = {"embed_dim": 32, "num_heads": 2, "mlp_dim": 32, "image_size": 64}
_OBJECT = np.ones(1, np.int32)
_VIT = VitEncoderConfig(depth=2, width=32, num_heads=2, global_blocks=(1,), window_size=3)


@pytest.fixture(scope="module", params=[_VIT, CompactEncoderConfig(width=16)], ids=["vit", "cnn"])
def exported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("sam")
    config = SamConfig(encoder=request.param, **_SIZES)
    torch.manual_seed(0)
    sam = build_sam(config)
    save_sam(root / "sam.safetensors", sam, config)
    artifacts = [
        export_model(exportable, root / exportable.model)
        for exportable in sam_exportables(root / "sam.safetensors")
    ]
    return sam, *map(OnnxRuntimeModel, artifacts)


def _images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (90, 40))]


def test_prompts_of_two_images_in_one_call_equal_sam_predictor_one_by_one(exported):
    sam, encoder, decoder = exported
    images = _images()
    framed = [resize_longest_side(image, 64) for image in images]
    frames = [frame for _, frame in framed]
    embeddings = encoder(
        {
            "image": np.stack([pixels for pixels, _ in framed]),
            "valid_size": np.array([frame.valid_size for frame in frames], np.int32),
        }
    )["image_embeddings"]
    points = [[(20.0, 30.0), (50.0, 10.0), (5.0, 40.0)], [(30.0, 70.0)]]
    prompts = [[point_prompt(np.array([p], np.float32), _OBJECT) for p in some] for some in points]
    (pack,) = pack_prompts(prompts, frames, max_prompts=64)
    answer = decoder(
        {
            "image_embeddings": embeddings,
            "image_index": pack.image_index,
            "point_coords": pack.point_coords,
            "point_labels": pack.point_labels,
        }
    )
    predictor = SamPredictor(sam)
    for image, some, rows in zip(images, points, (slice(0, 3), slice(3, 4)), strict=True):
        predictor.set_image(image)
        for point, logits in zip(some, answer["low_res_logits"][rows], strict=True):
            _, _, expected = predictor.predict(
                np.array([point]), np.array([1]), multimask_output=True, return_logits=True
            )
            np.testing.assert_allclose(logits[1:], expected, rtol=1e-3, atol=1e-4)


def test_a_box_equals_sam_predictor(exported):
    sam, encoder, decoder = exported
    image = _images()[0]
    pixels, frame = resize_longest_side(image, 64)
    valid = np.array([frame.valid_size], np.int32)
    embeddings = encoder({"image": pixels[None], "valid_size": valid})["image_embeddings"]
    box = np.array([8, 6, 40, 44], np.float32)
    (pack,) = pack_prompts([[box_prompt(box)]], [frame], max_prompts=64)
    answer = decoder(
        {
            "image_embeddings": embeddings,
            "image_index": pack.image_index,
            "point_coords": pack.point_coords,
            "point_labels": pack.point_labels,
        }
    )
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    _, _, expected = predictor.predict(box=box, multimask_output=False, return_logits=True)
    np.testing.assert_allclose(answer["low_res_logits"][0, :1], expected, rtol=1e-3, atol=1e-4)
