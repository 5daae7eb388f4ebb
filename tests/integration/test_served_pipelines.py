"""Right requests to a real server: the answers are those of the pipeline in this process."""

import asyncio
import time
import urllib.request

import numpy as np
import pytest

from tests.integration.pictures import (
    BOXES,
    JPEG,
    PNG,
    SIZE,
    encoded,
    rotated_by_exif,
    scene,
    sixteen_bit,
)
from tests.integration.tiny_engines import SCORES
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client import AsyncWeakSamClient
from weaksam_rt.masks import decode_rle
from weaksam_rt.model_repository import pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.prompt_clustering import prompt_clustering_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pipeline(artifacts, config):
    models = {a.model: OnnxRuntimeModel(a, num_threads=1) for a in artifacts}
    backend = LocalBackend(models | {"prompt_clustering": prompt_clustering_model})
    return WeakSamPipeline(backend, pipeline_models({a.model: a for a in artifacts}), config)


def assert_shows_the_scene(result, tolerance=2.0):
    assert result.label_names == tuple(BOXES)
    np.testing.assert_allclose(result.detections.boxes, list(BOXES.values()), atol=tolerance)
    np.testing.assert_allclose(result.detections.scores, [SCORES[name] for name in BOXES])
    assert result.detections.image_size == SIZE


def test_every_model_is_served(client):
    assert client.is_ready()
    models = client.models()
    assert len(models) == 8
    assert all(model.is_ready for model in models)


def test_detection_answers_as_the_pipeline_in_this_process(client, pipeline):
    result = client.detect(PNG, with_masks=True)
    expected = asyncio.run(pipeline.detect(scene(), with_masks=True))
    assert_shows_the_scene(result, tolerance=1e-4)
    np.testing.assert_array_equal(result.detections.boxes, expected.boxes)
    np.testing.assert_array_equal(result.detections.labels, expected.labels)
    assert result.detections.masks == expected.masks


def test_masks_cover_the_detected_things(client):
    detections = client.detect(PNG, with_masks=True).detections
    masks = decode_rle(detections.masks.rle_counts, SIZE)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.values(), strict=True):
        inside = np.zeros(SIZE, bool)
        inside[y1:y2, x1:x2] = True
        assert (mask & inside).sum() / (mask | inside).sum() > 0.9


@pytest.mark.parametrize(
    "image",
    [
        JPEG,
        encoded(scene(), "WEBP", lossless=True),
        encoded(scene(), "JPEG", "CMYK", quality=95, subsampling=0),
        encoded(scene(), "PNG", "RGBA"),
        encoded(scene(), "PNG", "P"),
        rotated_by_exif(),
    ],
    ids=["jpeg", "webp", "cmyk", "rgba", "palette", "exif-rotated"],
)
def test_every_kind_of_picture_shows_the_same_scene(client, image):
    assert_shows_the_scene(client.detect(image))


def test_a_sixteen_bit_picture_is_read(client):
    result = client.detect(sixteen_bit())
    assert result.detections.image_size == SIZE
    assert len(result) == 0  # it is grey


def test_an_image_without_anything_gives_empty_arrays(client):
    result = client.detect(encoded(scene({})), with_masks=True)
    assert len(result) == 0
    assert result.detections.boxes.shape == (0, 4)
    assert result.label_names == ()
    assert len(result.detections.masks) == 0


def test_a_request_chooses_threshold_and_number(client):
    assert client.detect(PNG, score_thresh=0.85).label_names == ("red",)
    assert client.detect(PNG, max_detections=1).label_names == ("red",)


def test_proposals_answer_as_the_pipeline_in_this_process(client, pipeline):
    result = client.propose(PNG, ["blue"])
    expected = asyncio.run(pipeline.propose(scene(), ["blue"])).proposals
    assert result.used_tags == ("blue",)
    assert len(result.proposals) > 0
    np.testing.assert_array_equal(result.proposals.boxes, expected.boxes)
    np.testing.assert_array_equal(result.proposals.scores, expected.scores)
    np.testing.assert_array_equal(result.proposals.sources, expected.sources)


def test_without_tags_the_classifier_decides(client):
    assert client.propose(PNG).used_tags == ("red", "blue")


def test_an_image_of_no_class_has_grid_proposals_only(client):
    result = client.propose(encoded(scene({})))
    assert result.used_tags == ()
    assert set(result.proposals.sources.tolist()) <= {0}


@pytest.mark.parametrize("multimask", [False, True])
def test_points_are_segmented_as_by_the_pipeline_in_this_process(client, pipeline, multimask):
    prompts = {
        "point_coords": np.array([[[60, 80]], [[250, 150]]], np.float32),
        "point_labels": np.ones((2, 1), np.int32),
    }
    result = client.segment(PNG, **prompts, multimask=multimask)
    expected = asyncio.run(pipeline.segment(scene(), **prompts, multimask=multimask))
    assert result.mask_counts == expected.mask_counts
    assert result.boxes.shape == (2, 3 if multimask else 1, 4)
    np.testing.assert_array_equal(result.boxes, expected.boxes)
    np.testing.assert_array_equal(result.stability_scores, expected.stability_scores)


def test_boxes_are_segmented(client):
    result = client.segment(PNG, boxes=np.array([BOXES["red"]], np.float32))
    np.testing.assert_allclose(result.boxes[0, 0], BOXES["red"], atol=2)


def test_many_images_come_back_in_order_and_an_error_stops_none(client):
    widths = range(24, 60, 3)
    images = [encoded(scene({"red": (8, 8, 8 + w, 40)})) for w in widths]
    images[5] = b"no image"
    outcomes = list(client.detect_many(iter(images), max_in_flight=4))
    assert [outcome.error is not None for outcome in outcomes] == [i == 5 for i in range(12)]
    found = [o.unwrap().detections.boxes[0, 2] - 8 for o in outcomes if o.error is None]
    np.testing.assert_allclose(found, [w for i, w in enumerate(widths) if i != 5], atol=1e-3)


def test_the_asyncio_client_gives_the_same_answers(server, client):
    async def ask():
        async with AsyncWeakSamClient(server.grpc_address) as connected:
            assert await connected.is_ready()
            outcomes = [o async for o in connected.detect_many([PNG, b"x", JPEG], max_in_flight=2)]
            return (
                outcomes,
                await connected.propose(PNG),
                await connected.segment(PNG, boxes=np.array([BOXES["red"]], np.float32)),
                await connected.models(),
            )

    outcomes, proposed, segmented, models = asyncio.run(ask())
    assert_shows_the_scene(outcomes[0].unwrap())
    assert outcomes[1].error is not None
    assert_shows_the_scene(outcomes[2].unwrap())
    assert proposed.used_tags == client.propose(PNG).used_tags
    boxes = np.array([BOXES["red"]], np.float32)
    assert segmented.mask_counts == client.segment(PNG, boxes=boxes).mask_counts
    assert models == client.models()


def test_metrics_count_the_requests(server, client):
    client.detect(PNG)
    with urllib.request.urlopen(server.metrics_url, timeout=5) as response:
        text = response.read().decode()
    counts = [line for line in text.splitlines() if line.startswith("nv_inference_request_success")]
    count = next(float(line.split()[-1]) for line in counts if 'model="weaksam_detect"' in line)
    assert count >= 1


def test_a_lone_client_never_waits_for_the_batcher(client):
    """With one instance behind a bounded queue, one in ten of these took half a second."""
    times = []
    for _ in range(60):
        start = time.perf_counter()
        client.detect(PNG)
        times.append(time.perf_counter() - start)
    assert sum(seconds > 0.45 for seconds in times) <= 1
