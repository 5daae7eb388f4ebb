import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from training.models.sam import CompactEncoderConfig, SamConfig, VitEncoderConfig, build_sam
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from weaksam_rt.contracts import (
    SamParameters,
    sam_image_encoder_contract,
    sam_mask_decoder_contract,
)
from weaksam_rt.masks import image_logits
from weaksam_rt.preprocessing import resize_longest_side

SIZES = {"image_size": 64, "embed_dim": 32, "num_heads": 2, "mlp_dim": 48}
TOYS = {
    "compact": SamConfig(encoder=CompactEncoderConfig(width=16), **SIZES),
    "vit": SamConfig(
        encoder=VitEncoderConfig(depth=2, width=32, num_heads=2, global_blocks=(1,), window_size=3),
        **SIZES,
    ),
}


def toy(name: str) -> Sam:
    torch.manual_seed(0)
    return build_sam(TOYS[name])


def encoded(sam: Sam, image: np.ndarray) -> torch.Tensor:
    padded, frame = resize_longest_side(image, 64)
    valid_size = torch.tensor([frame.valid_size], dtype=torch.int32)
    with torch.no_grad():
        return SamImageEncoderAdapter(sam)(torch.from_numpy(padded)[None], valid_size)


@pytest.mark.parametrize("name", TOYS)
def test_the_encoder_prepares_images_exactly_as_sam_does(name: str) -> None:
    sam = toy(name)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    sizes = [(64, 40), (33, 64)]

    with torch.no_grad():
        found = SamImageEncoderAdapter(sam)(pixels, torch.tensor(sizes, dtype=torch.int32))
        crops = [p.permute(2, 0, 1)[:, :h, :w] for p, (h, w) in zip(pixels, sizes, strict=True)]
        expected = sam.image_encoder(torch.stack([sam.preprocess(c.float()) for c in crops]))

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", TOYS)
def test_point_and_box_masks_equal_those_of_the_package_predictor(name: str) -> None:
    sam = toy(name)
    image = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    point, box = np.array([[30.0, 20.0]]), np.array([10.0, 5.0, 70.0, 40.0])
    _, frame = resize_longest_side(image, 64)

    with torch.no_grad():
        logits, scores = SamMaskDecoderAdapter(sam)(
            encoded(sam, image),
            torch.zeros(2, dtype=torch.int32),
            torch.from_numpy(
                np.stack(
                    [
                        np.concatenate([frame.to_model(point), np.zeros((1, 2), np.float32)]),
                        frame.to_model(box).reshape(2, 2),
                    ]
                )
            ),
            torch.tensor([[1, -1], [2, 3]], dtype=torch.int32),
        )
    masks, point_scores, low_res = predictor.predict(point, np.array([1]), multimask_output=True)
    _, box_scores, box_low_res = predictor.predict(box=box, multimask_output=False)

    np.testing.assert_allclose(logits[0, 1:], low_res, atol=1e-5)
    np.testing.assert_allclose(scores[0, 1:], point_scores, atol=1e-5)
    np.testing.assert_allclose(logits[1, :1], box_low_res, atol=1e-5)
    np.testing.assert_allclose(scores[1, :1], box_scores, atol=1e-5)
    agreement = ((image_logits(logits[0, 1:].numpy(), frame) > 0) == masks).mean()
    assert agreement > 0.999  # a pixel at logit 0 may fall to either side


def test_prompts_find_their_image_by_index() -> None:
    decoder = SamMaskDecoderAdapter(toy("compact"))
    embeddings = torch.randn(3, 32, 8, 8)
    coords = torch.rand(4, 2, 2) * 64
    labels = torch.tensor([[1, -1]] * 4, dtype=torch.int32)
    index = torch.tensor([2, 0, 2, 1], dtype=torch.int32)

    with torch.no_grad():
        together = decoder(embeddings, index, coords, labels)
        alone = [
            decoder(
                embeddings[i : i + 1],
                torch.zeros(1, dtype=torch.int32),
                coords[p : p + 1],
                labels[p : p + 1],
            )
            for p, i in enumerate(index)
        ]

    torch.testing.assert_close(
        together.low_res_logits, torch.cat([one.low_res_logits for one in alone])
    )


def test_outputs_fit_the_served_contracts() -> None:
    sam = toy("compact")
    parameters = SamParameters(image_size=64, embedding_size=8, embedding_dim=32)
    encoder, decoder = SamImageEncoderAdapter(sam), SamMaskDecoderAdapter(sam)
    image = {
        "image": torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
        "valid_size": torch.full((2, 2), 64, dtype=torch.int32),
    }
    with torch.no_grad():
        embeddings = encoder(**image)
        prompts = {
            "image_embeddings": embeddings,
            "image_index": torch.tensor([0, 1, 1], dtype=torch.int32),
            "point_coords": torch.zeros(3, 2, 2),
            "point_labels": torch.tensor([[1, -1]] * 3, dtype=torch.int32),
        }
        masks = decoder(**prompts)._asdict()

    first, second = sam_image_encoder_contract(parameters), sam_mask_decoder_contract(parameters)
    first.check_inputs({k: v.numpy() for k, v in image.items()})
    first.check_outputs({"image_embeddings": embeddings.numpy()})
    second.check_inputs({k: v.numpy() for k, v in prompts.items()})
    second.check_outputs({k: v.numpy() for k, v in masks.items()})
