"""The way of an image through the models, with models whose answers can be foretold."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    DetectorParameters,
    SamParameters,
    VitClassifierParameters,
    sam_image_encoder_contract,
    sam_mask_decoder_contract,
    vit_classifier_contract,
)
from weaksam_rt.errors import ContractError
from weaksam_rt.masks import decode_rle
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline
from weaksam_rt.preprocessing import sum_over_flip
from weaksam_rt.prompt_clustering import prompt_clustering_model
from weaksam_rt.proposals import ProposalConfig
from weaksam_rt.types import PromptSource

_SAM = SamParameters(image_size=64, embedding_size=8, embedding_dim=3)
_VIT = VitClassifierParameters(
    image_size=32, map_size=8, num_cross_maps=2, class_names=("red", "green", "blue")
)
_DETECTOR = DetectorParameters(image_size=64, num_candidates=4, class_names=("red", "green"))
_MODELS = PipelineModels(detector=_DETECTOR, vit_classifier=_VIT, sam=_SAM)
_CONFIG = PipelineConfig(proposals=ProposalConfig(points_per_side=2, min_side_px=1.0))


def _classify(inputs, outputs):
    """A class is where the image shows its colour; the logit is its share minus 0.6."""
    vit_classifier_contract(_VIT).check_inputs(inputs)
    cells = inputs["image"].reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)) / 255
    maps = cells.transpose(0, 3, 1, 2).astype(np.float32)
    logits = (maps.max(axis=(2, 3)) - 0.6).astype(np.float32) * 10
    fine, lower = np.roll(maps, 1, axis=3), np.roll(maps, 2, axis=2)
    cross = np.stack([lower, lower], axis=1)
    return {"logits": logits, "coarse_maps": maps, "fine_maps": fine, "cross_maps": cross}


def _encode(inputs, outputs):
    sam_image_encoder_contract(_SAM).check_inputs(inputs)
    return {"image_embeddings": np.ones((1, 3, 8, 8), np.float32)}


def _decode(inputs, outputs):
    """Squares around the mean of the object's points: sides 4, 8, 16 and 32 in the model frame."""
    sam_mask_decoder_contract(_SAM).check_inputs(inputs)
    counts = (inputs["point_labels"] != -1)[..., None]
    centres = (inputs["point_coords"] * counts).sum(axis=1) / counts.sum(axis=1)
    ys, xs = np.mgrid[:32, :32] * 2 + 1
    distance = np.maximum(
        np.abs(xs - centres[:, 0, None, None]), np.abs(ys - centres[:, 1, None, None])
    )
    sides = np.array([2, 4, 8, 16])[None, :, None, None]
    scores = np.broadcast_to(np.float32([0.5, 0.6, 0.7, 0.8]), (len(centres), 4))
    return {
        "low_res_logits": (sides - distance[:, None]).astype(np.float32),
        "iou_predictions": scores.copy(),
    }


def _detect(inputs, outputs):
    boxes = np.array([[[8, 8, 32, 32], [9, 8, 33, 32], [0, 0, 64, 64], [5, 5, 5, 9]]], np.float32)
    return {
        "boxes": boxes,
        "scores": np.array([[0.9, 0.8, 0.6, 0.95]], np.float32),
        "labels": np.array([[0, 0, 1, 1]], np.int32),
    }


@pytest.fixture
def pipeline():
    return _pipeline()


def _pipeline(models=_MODELS, config=_CONFIG):
    functions = {
        "detector": _detect,
        "vit_classifier": _classify,
        "prompt_clustering": prompt_clustering_model,
        "sam_image_encoder": _encode,
        "sam_mask_decoder": _decode,
    }
    return WeakSamPipeline(LocalBackend(functions), models, config)


def _picture(color=None, where=(slice(10, 30), slice(60, 90))):
    image = np.zeros((64, 128, 3), np.uint8)
    if color is not None:
        image[where[0], where[1], color] = 255
    return image


def test_detections_are_suppressed_per_class_and_in_image_pixels(pipeline):
    found = asyncio.run(pipeline.detect(_picture()))
    assert found.boxes.tolist() == [[16, 16, 64, 64], [0, 0, 128, 64]]
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.scores, [0.9, 0.6])
    assert found.masks is None


def test_a_request_may_ask_for_fewer_and_surer_detections(pipeline):
    assert len(asyncio.run(pipeline.detect(_picture(), max_detections=1))) == 1
    assert len(asyncio.run(pipeline.detect(_picture(), score_thresh=0.7))) == 1
    assert len(asyncio.run(pipeline.detect(_picture(), score_thresh=1.0))) == 0
    with pytest.raises(ValueError, match="score_thresh must be in"):
        asyncio.run(pipeline.detect(_picture(), score_thresh=1.5))
    with pytest.raises(ValueError, match="at least 1"):
        asyncio.run(pipeline.detect(_picture(), max_detections=0))


def test_each_detection_gets_the_mask_of_its_box(pipeline):
    found = asyncio.run(pipeline.detect(_picture(), with_masks=True))
    masks = decode_rle(found.masks.rle_counts, found.image_size)
    assert masks.shape == (2, 64, 128)
    assert masks[0, 40, 40]
    assert not masks[0, 40, 100]
    nothing = asyncio.run(pipeline.detect(_picture(), score_thresh=1.0, with_masks=True))
    assert len(nothing.masks) == 0


def test_a_smaller_version_of_the_image_gives_boxes_and_masks_of_the_original(pipeline):
    whole = asyncio.run(pipeline.detect(_picture(), with_masks=True))
    half = asyncio.run(pipeline.detect(_picture()[::2, ::2], image_size=(64, 128), with_masks=True))
    assert half.image_size == (64, 128)
    assert half.boxes.tolist() == whole.boxes.tolist()
    assert half.masks.rle_counts == whole.masks.rle_counts


def test_the_longest_side_seen_is_that_of_the_largest_model(pipeline):
    sizes = _MODELS.detector.image_size, _MODELS.sam.image_size
    assert pipeline.longest_side_seen(with_masks=False) == sizes[0]
    assert pipeline.longest_side_seen(with_masks=True) == max(sizes)


def _detect_masks(inputs, outputs):
    """The left half of every box."""
    answer = _detect(inputs, outputs)
    logits = np.where(np.arange(8) < 4, 1, -1) * np.ones((1, 4, 8, 1), np.float32)
    answer["mask_logits"] = logits.astype(np.float32)
    return {name: answer[name] for name in outputs}


def _masking_pipeline(models):
    functions = {"detector": _detect_masks}
    return WeakSamPipeline(LocalBackend(functions), models, _CONFIG)


def test_a_detector_with_masks_needs_no_sam():
    pipeline = _masking_pipeline(PipelineModels(detector=replace(_DETECTOR, mask_size=8)))
    found = asyncio.run(pipeline.detect(_picture(), with_masks=True))
    assert found.boxes.tolist() == [[16, 16, 64, 64], [0, 0, 128, 64]]
    masks = decode_rle(found.masks.rle_counts, found.image_size)
    expected = np.zeros((2, 64, 128), bool)
    expected[0, 16:, 16:40] = expected[1, :, :64] = True
    np.testing.assert_array_equal(masks, expected)
    assert pipeline.longest_side_seen(with_masks=True) == _DETECTOR.image_size
    assert asyncio.run(pipeline.detect(_picture())).masks is None


def test_masks_of_a_smaller_version_are_those_of_the_original():
    pipeline = _masking_pipeline(PipelineModels(detector=replace(_DETECTOR, mask_size=8)))
    half = asyncio.run(pipeline.detect(_picture()[::2, ::2], image_size=(64, 128), with_masks=True))
    whole = asyncio.run(pipeline.detect(_picture(), with_masks=True))
    assert half.masks == whole.masks


def test_a_detector_without_masks_and_without_sam_gives_none():
    pipeline = _pipeline(models=PipelineModels(detector=_DETECTOR))
    with pytest.raises(ContractError, match="SAM"):
        asyncio.run(pipeline.detect(_picture(), with_masks=True))


def test_models_without_masks_are_described_as_ever():
    content = _MODELS.to_json()
    assert content["detector"] == {
        "image_size": 64, "num_candidates": 4, "class_names": ("red", "green"),
    }  # fmt: skip
    masking = PipelineModels(detector=replace(_DETECTOR, mask_size=28))
    for models in (_MODELS, masking):
        written = json.loads(json.dumps(models.to_json()))
        assert PipelineModels.from_json(written) == models


def test_tags_steer_the_prompts_to_their_class(pipeline):
    image = _picture(0)
    image[40:60, 5:20, 2] = 255
    red = asyncio.run(pipeline.propose(image, ["red"]))
    both = asyncio.run(pipeline.propose(image, ["blue", "red", "red"]))
    assert red.used_tags == ("red",)
    assert both.used_tags == ("red", "blue")
    peaks = red.prompts.points[red.prompts.sources != PromptSource.GRID]
    assert len(peaks) > 0
    assert (peaks[:, 0] > 50).all()
    assert set(both.prompts.class_ids.tolist()) == {-1, 0, 2}


def test_without_tags_the_classifier_decides(pipeline):
    assert asyncio.run(pipeline.propose(_picture(1))).used_tags == ("green",)


def test_an_image_of_nothing_gets_grid_proposals_only(pipeline):
    result = asyncio.run(pipeline.propose(_picture()))
    assert result.used_tags == ()
    assert set(result.proposals.sources.tolist()) == {PromptSource.GRID}


def test_proposals_come_in_the_order_of_their_sources(pipeline):
    proposals = asyncio.run(pipeline.propose(_picture(0))).proposals
    assert (np.diff(proposals.sources) >= 0).all()
    assert set(proposals.sources.tolist()) == set(map(int, PromptSource))
    assert (proposals.boxes[:, 2:] > proposals.boxes[:, :2]).all()
    assert (proposals.boxes >= 0).all()
    assert (proposals.boxes <= [128, 64, 128, 64]).all()


def test_peak_prompts_drop_the_smallest_of_the_three_masks(pipeline):
    proposals = asyncio.run(pipeline.propose(_picture(0))).proposals
    scores = proposals.scores[proposals.sources == PromptSource.FINE]
    np.testing.assert_allclose(np.unique(scores), [0.7, 0.8])


@pytest.mark.parametrize(
    ("tags", "message"), [([], "tags is empty"), (["unicorn"], "unknown tag 'unicorn'")]
)
def test_bad_tags_are_refused_with_the_known_classes(pipeline, tags, message):
    with pytest.raises(ValueError, match=message) as raised:
        asyncio.run(pipeline.propose(_picture(), tags))
    assert "'green'" in str(raised.value)


def test_the_number_of_decoder_calls_does_not_change_the_answer():
    few = replace(_CONFIG, proposals=replace(_CONFIG.proposals, max_prompts_per_call=2))
    expected = asyncio.run(_pipeline().propose(_picture(0), ["red"])).proposals
    got = asyncio.run(_pipeline(config=few).propose(_picture(0), ["red"])).proposals
    np.testing.assert_array_equal(got.boxes, expected.boxes)
    np.testing.assert_array_equal(got.sources, expected.sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to segment"),
        ({"point_coords": np.zeros((1, 1, 2), np.float32)}, "belong together"),
        ({"boxes": np.array([[9, 9, 3, 12]], np.float32)}, "a box is empty"),
        (
            {
                "point_coords": np.full((1, 1, 2), np.nan, np.float32),
                "point_labels": np.ones((1, 1), np.int32),
            },
            "not-a-number",
        ),
        (
            {
                "point_coords": np.zeros((1, 1, 2), np.float32),
                "point_labels": np.full((1, 1), 7, np.int32),
            },
            r"1, 0 or -1, got \[7\]",
        ),
        (
            {
                "point_coords": np.zeros((2, 1, 2), np.float32),
                "point_labels": np.ones((2, 1), np.int32),
                "boxes": np.array([[0, 0, 5, 5]], np.float32),
            },
            "got 1 boxes for 2 prompts",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(pipeline.segment(_picture(), **arguments))


def test_a_model_that_is_not_served_is_named():
    alone = _pipeline(models=PipelineModels(detector=_DETECTOR))
    with pytest.raises(ContractError, match="needs SAM"):
        asyncio.run(alone.detect(_picture(), with_masks=True))
    with pytest.raises(ContractError, match="needs a vit_classifier"):
        asyncio.run(alone.propose(_picture()))


def test_maps_are_summed_over_the_mirror_image():
    maps = np.arange(12, dtype=np.float32).reshape(2, 1, 2, 3)
    np.testing.assert_array_equal(sum_over_flip(maps), maps[0] + maps[1][..., ::-1])
    np.testing.assert_array_equal(sum_over_flip(maps[:1]), maps[0])


def _proposals_with(**settings):
    config = replace(_CONFIG, proposals=replace(_CONFIG.proposals, **settings))
    picture = _picture(0)
    prompts, prompted = asyncio.run(_pipeline(config=config).prompted_boxes(picture, tags=["red"]))
    return prompts, prompted, asyncio.run(_pipeline(config=config).propose(picture, ["red"]))


def test_the_config_says_which_prompts_are_used():
    everything, _, _ = _proposals_with()
    assert set(everything.sources.tolist()) == set(PromptSource)
    some, prompted, result = _proposals_with(sources=("coarse", "cross"))
    wanted = {PromptSource.COARSE, PromptSource.CROSS}
    assert set(some.sources.tolist()) == set(prompted.sources.tolist()) == wanted
    assert set(result.prompts.sources.tolist()) == wanted
    kept = everything.subset(np.flatnonzero(np.isin(everything.sources, list(wanted))))
    np.testing.assert_array_equal(some.points, kept.points)


@pytest.mark.parametrize(("masks", "sides"), [((1, 2), {16, 32}), ((0,), {8}), ((2,), {32})])
def test_the_config_says_which_of_the_three_masks_count(masks, sides):
    """The decoder's squares have sides 8, 16 and 32 in its frame, twice that in the image."""
    _, prompted, _ = _proposals_with(sources=("cross",), peak_masks=masks)
    widths = np.round(prompted.boxes[:, 2] - prompted.boxes[:, 0])
    assert {int(w) for w in widths} <= {2 * side for side in sides}
    prompts, _, _ = _proposals_with(sources=("cross",))
    assert len(prompted.boxes) == len(masks) * len(prompts)
    _, of_grid, _ = _proposals_with(
        sources=("grid",), grid_masks=masks, grid_iou_thresh=0.0, grid_stability_thresh=0.0
    )
    assert len(of_grid.boxes) == len(masks) * 4


def test_class_prompts_can_be_left_out():
    spots = _picture(0, where=(slice(0, 16), slice(0, 32)))
    spots[40:64, 80:128, 0] = 255
    counts = []
    for class_prompts in (True, False):
        settings = replace(_CONFIG.proposals, sources=("coarse",), class_prompts=class_prompts)
        pipeline = _pipeline(config=replace(_CONFIG, proposals=settings))
        prompts, prompted = asyncio.run(pipeline.prompted_boxes(spots, tags=["red"]))
        assert len(prompts) > 1
        counts.append(len(prompted.boxes) - 2 * len(prompts))
    assert counts == [2, 0], "two masks of all points of the class together"


def _boxes_of_grid(**settings):
    return _proposals_with(
        sources=("grid",), grid_iou_thresh=0.0, grid_stability_thresh=0.0, **settings
    )


def test_a_grid_in_crops_adds_boxes_of_half_the_size():
    """The decoder's squares have fixed sides in its frame: in a crop they are smaller things."""
    alone, boxes_alone, _ = _boxes_of_grid(points_per_side=4)
    prompts, prompted, result = _boxes_of_grid(points_per_side=4, crops_per_side=(2,))
    np.testing.assert_array_equal(prompts.points[:16], alone.points)
    np.testing.assert_array_equal(prompted.boxes[: len(boxes_alone.boxes)], boxes_alone.boxes)
    assert len(prompts) == 16 + 4 * 4, "half as many points along a crop's side"
    of_crops = prompted.boxes[len(boxes_alone.boxes) :]
    # A crop is 74 of 128 pixels wide, so a pixel of the frame is 74 / 64 instead of 2 pixels.
    widths = np.unique(np.round(of_crops[:, 2] - of_crops[:, 0]))
    assert {round(74 / 64 * side) for side in (8, 16)} <= set(widths.tolist())
    assert (of_crops >= 0).all()
    assert (of_crops <= [128, 64, 128, 64]).all()
    assert len(result.prompts) == len(prompts)
    assert result.proposals.boxes[:, 0].max() > 80, "boxes are in the image's frame"


@pytest.mark.parametrize(("mask", "added"), [(0, 4), (2, 0)])
def test_what_a_crop_cuts_is_no_proposal(mask, added):
    """In a crop of 74 x 37 pixels the squares have sides of about 9 and 37: all of its height."""
    _, alone, _ = _boxes_of_grid(grid_masks=(mask,))
    _, prompted, _ = _boxes_of_grid(grid_masks=(mask,), crops_per_side=(2,))
    assert len(prompted.boxes) - len(alone.boxes) == added


def test_without_a_grid_there_is_none_in_crops():
    prompts, prompted, _ = _boxes_of_grid(points_per_side=0, crops_per_side=(2,))
    assert len(prompts) == len(prompted.boxes) == 0


def test_crops_are_of_the_grid_and_of_nothing_else():
    alone, expected, _ = _proposals_with(sources=("coarse", "cross"))
    prompts, prompted, _ = _proposals_with(sources=("coarse", "cross"), crops_per_side=(2, 3))
    np.testing.assert_array_equal(prompts.points, alone.points)
    np.testing.assert_array_equal(prompted.boxes, expected.boxes)


def test_peaks_from_elsewhere_can_be_prompted():
    own, expected, _ = _proposals_with()
    peaks = own.subset(np.flatnonzero(own.sources != PromptSource.GRID))
    prompts, prompted = asyncio.run(_pipeline().prompted_boxes(_picture(0), peaks=peaks))
    np.testing.assert_array_equal(prompts.points, own.points)
    np.testing.assert_array_equal(prompted.boxes, expected.boxes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ()}, "sources must be some of"),
        ({"peak_masks": ()}, "peak_masks must be some of 0, 1, 2"),
        ({"grid_masks": (2, 1)}, "ascending"),
        ({"grid_masks": (3,)}, "grid_masks must be some of 0, 1, 2"),
        ({"min_side_px": -1.0}, "min_side_px must be at least 0"),
        ({"crops_per_side": (1, 2)}, "crops_per_side must be numbers from 2"),
        ({"crops_per_side": (3, 2)}, "ascending"),
    ],
)
def test_impossible_settings_of_proposals_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ProposalConfig(**wrong)


def test_settings_with_lists_come_back_from_json():
    settings = replace(_CONFIG.proposals, sources=("grid", "fine"), peak_masks=(2,))
    config = replace(_CONFIG, proposals=settings)
    assert PipelineConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
