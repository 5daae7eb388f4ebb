"""Rows of a batch on threads of their own: the same answers as all threads on the whole batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.integration.tiny_engines import write_tiny_artifacts
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.onnx_runtime import CPU, CUDA, OnnxRuntimeModel
from weaksam_rt.errors import BackendUnavailableError, ContractError

DETECTOR = Path(__file__).parents[3] / "assets" / "demo_models" / "detector"


@pytest.fixture(scope="module")
def detectors():
    """The demo's detector, plain and with two threads that each take rows."""
    artifact = load_artifact(DETECTOR)
    return [
        OnnxRuntimeModel(artifact, num_threads=2, rows_side_by_side=side_by_side)
        for side_by_side in (False, True)
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_rows_side_by_side_answer_as_a_batch_does(detectors, num_rows):
    plain, side_by_side = detectors
    images = np.random.default_rng(num_rows).integers(0, 255, (num_rows, 320, 320, 3), np.uint8)
    expected, found = (model({"image": images}) for model in (plain, side_by_side))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-3, err_msg=name)


def test_side_by_side_computes_only_what_is_asked_for(detectors):
    images = np.zeros((2, 320, 320, 3), np.uint8)
    assert list(detectors[1]({"image": images}, ["scores"])) == ["scores"]


def test_side_by_side_refuses_what_breaks_the_contract(detectors):
    with pytest.raises(ContractError, match="image"):
        detectors[1]({"image": np.zeros((2, 320, 320), np.uint8)})


def test_a_model_without_batch_axis_is_run_as_it_is(tmp_path):
    decoder = next(
        artifact
        for artifact in write_tiny_artifacts(tmp_path / "tiny")
        if not artifact.contract.is_batched
    )
    plain, side_by_side = (
        OnnxRuntimeModel(decoder, num_threads=2, rows_side_by_side=flag) for flag in (False, True)
    )
    inputs = {
        "image_embeddings": np.random.default_rng(0).random((2, 3, 16, 16), np.float32),
        "image_index": np.array([0, 1, 1], np.int32),
        "point_coords": np.full((3, 1, 2), 40, np.float32),
        "point_labels": np.ones((3, 1), np.int32),
    }
    expected, found = plain(inputs), side_by_side(inputs)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture
def for_a_gpu():
    """The demo's detector as if it had been built with ``--engine onnxruntime-cuda``."""
    artifact = load_artifact(DETECTOR)
    passport = replace(artifact.passport, exporter={"name": "onnxruntime-cuda"})
    return replace(artifact, passport=passport)


@pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_an_engine_for_cuda_is_not_opened_on_the_cpu(for_a_gpu):
    with pytest.raises(
        BackendUnavailableError, match=r"not CUDAExecutionProvider; install onnxruntime-gpu"
    ):
        open_engine(for_a_gpu)


def test_a_session_that_fell_back_to_the_cpu_is_refused(for_a_gpu, monkeypatch):
    opened = onnxruntime.InferenceSession
    asked = []

    def fall_back(path, options, providers):
        asked.extend(providers)
        return opened(path, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    with pytest.raises(
        BackendUnavailableError, match=r"CUDA\w+ did not start and CPU\w+ took its place; check"
    ):
        open_engine(for_a_gpu, device=1)
    assert asked == [(CUDA, {"device_id": 1}), CPU]
