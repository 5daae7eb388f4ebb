"""A detector with masks of its own, served without SAM by a real server."""

import asyncio

import numpy as np
import pytest

from tests.integration.pictures import BOXES, PNG, SIZE, scene
from tests.integration.tiny_engines import write_masking_detector
from weaksam_rt.backends.local import LocalBackend
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.client import WeakSamClient
from weaksam_rt.masks import decode_rle
from weaksam_rt.model_repository import build_model_repository, pipeline_models
from weaksam_rt.pipeline import WeakSamPipeline
from weaksam_rt.server import EmbeddedServer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return write_masking_detector(tmp_path_factory.mktemp("masking") / "detector")


@pytest.fixture(scope="module")
def client(detector, config, tmp_path_factory):
    repository = tmp_path_factory.mktemp("served") / "models"
    build_model_repository([detector], repository, profile="embedded", config=config)
    with EmbeddedServer(repository) as server, WeakSamClient(server.grpc_address) as connected:
        yield connected


def test_masks_come_from_the_detector_itself(client, detector, config):
    result = client.detect(PNG, with_masks=True)
    assert result.label_names == tuple(BOXES)
    masks = decode_rle(result.detections.masks.rle_counts, SIZE)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.values(), strict=True):
        left = np.zeros(SIZE, bool)
        left[y1:y2, x1 : (x1 + x2) // 2] = True
        assert (mask & left).sum() / (mask | left).sum() > 0.95
    backend = LocalBackend({"detector": OnnxRuntimeModel(detector, num_threads=1)})
    pipeline = WeakSamPipeline(backend, pipeline_models({"detector": detector}), config)
    expected = asyncio.run(pipeline.detect(scene(), with_masks=True))
    assert result.detections.masks == expected.masks
    np.testing.assert_array_equal(result.detections.boxes, expected.boxes)


def test_boxes_alone_come_without_masks(client):
    result = client.detect(PNG)
    assert result.label_names == tuple(BOXES)
    assert result.detections.masks is None
