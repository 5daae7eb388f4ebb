import pytest
import torch
from segment_anything.modeling import Sam, TwoWayTransformer

from training.models.sam import CompactEncoderConfig, SamConfig, build_sam
from training.models.sam_decoder import attend_both_ways, decode_masks, encode_masks, encode_points

TOY_COMPACT = SamConfig(
    encoder=CompactEncoderConfig(width=16), image_size=64, embed_dim=32, num_heads=2, mlp_dim=48
)


def scattered(module: torch.nn.Module) -> None:
    """Norms and biases too: as built they are 1 and 0 and would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def scattered_sam() -> Sam:
    sam = build_sam(TOY_COMPACT)
    scattered(sam)
    return sam


def test_points_are_encoded_as_the_package_does() -> None:
    torch.manual_seed(0)
    encoder = build_sam(TOY_COMPACT).prompt_encoder
    points = torch.rand(5, 3, 2) * 64
    labels = torch.tensor([[1, 0, 1]] * 5)
    with_padding = torch.cat([points, torch.zeros(5, 1, 2)], dim=1)
    padded_labels = torch.cat([labels, torch.full((5, 1), -1)], dim=1).int()

    expected, _ = encoder(points=(points, labels), boxes=None, masks=None)

    torch.testing.assert_close(encode_points(encoder, with_padding, padded_labels), expected)


def test_boxes_are_encoded_as_the_package_does() -> None:
    torch.manual_seed(0)
    encoder = build_sam(TOY_COMPACT).prompt_encoder
    boxes = torch.rand(5, 4) * 64
    labels = torch.tensor([[2, 3]] * 5, dtype=torch.int32)

    expected, _ = encoder(points=None, boxes=boxes, masks=None)

    torch.testing.assert_close(encode_points(encoder, boxes.reshape(5, 2, 2), labels), expected)


@pytest.mark.parametrize("with_masks", [False, True])
def test_many_images_decode_as_the_package_decodes_one_after_the_other(with_masks: bool) -> None:
    torch.manual_seed(0)
    sam = scattered_sam()
    images = torch.randn(3, 32, 8, 8)
    boxes = torch.rand(3, 2, 4) * 64
    masks = torch.randn(3, 2, 1, 32, 32) if with_masks else None
    labels = torch.tensor([[2, 3]] * 6, dtype=torch.int32)

    with torch.no_grad():
        dense_prompt = encode_masks(
            sam.prompt_encoder, None if masks is None else masks.flatten(0, 1)
        )
        logits, scores = decode_masks(
            sam.mask_decoder,
            images.repeat_interleave(2, dim=0) + dense_prompt,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse=encode_points(sam.prompt_encoder, boxes.reshape(6, 2, 2), labels),
        )
        for i in range(3):
            sparse, dense = sam.prompt_encoder(
                points=None, boxes=boxes[i], masks=None if masks is None else masks[i]
            )
            expected, expected_scores = sam.mask_decoder.predict_masks(
                images[i : i + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            torch.testing.assert_close(logits[2 * i : 2 * i + 2], expected)
            torch.testing.assert_close(scores[2 * i : 2 * i + 2], expected_scores)


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("num_points", [1, 9])
def test_tokens_and_cells_attend_as_in_the_package(num_heads: int, num_points: int) -> None:
    torch.manual_seed(0)
    package = TwoWayTransformer(depth=3, embedding_dim=32, mlp_dim=48, num_heads=num_heads)
    scattered(package)
    cells, position, prompt = (
        torch.randn(2, 32, 3, 5),
        torch.randn(1, 32, 3, 5),
        torch.randn(2, num_points, 32),
    )

    with torch.no_grad():
        expected_tokens, expected_cells = package(cells, position, prompt)
        tokens, got = attend_both_ways(
            package, cells.flatten(2), cell_position=position.flatten(2), prompt=prompt
        )

    torch.testing.assert_close(tokens, expected_tokens)
    torch.testing.assert_close(got.transpose(1, 2), expected_cells)


def test_the_weights_learn_as_in_the_package() -> None:
    torch.manual_seed(0)
    sam = scattered_sam()
    image, boxes = torch.randn(1, 32, 8, 8), torch.rand(1, 4) * 64
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    position = sam.prompt_encoder.get_dense_pe()
    weights = dict(sam.mask_decoder.named_parameters())

    logits, scores = decode_masks(sam.mask_decoder, image + dense, image_pe=position, sparse=sparse)
    ours = torch.autograd.grad(
        logits.square().mean() + scores.sum(), list(weights.values()), materialize_grads=True
    )  # what all cells share has no gradient, rounding apart
    logits, scores = sam.mask_decoder.predict_masks(image, position, sparse, dense)
    package = torch.autograd.grad(logits.square().mean() + scores.sum(), list(weights.values()))

    for name, got, expected in zip(weights, ours, package, strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")
