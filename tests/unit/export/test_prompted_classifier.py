"""Classifier and prompts in one engine: the graph, its runtime and its repository; TensorRT itself
where there is a GPU.
"""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.engines.base import EngineConfig
from export.engines.prompted_classifier import (
    build_prompted_classifier,
    compare_prompts,
    prompted_graph,
)
from export.exportable import example_inputs
from export.portable_graph import portable_model
from export.verify import ParityError
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.backends.prompted_classifier import (
    engine_prompt_config,
    prompted_classifier_model,
    prompted_parameters,
)
from weaksam_rt.class_activation_map import PeakConfig
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    PROMPTED_CLASSIFIER,
    parameters_from_json,
    parameters_to_json,
)
from weaksam_rt.errors import ArtifactError, BackendUnavailableError, ContractError
from weaksam_rt.model_repository import build_model_repository, plan_model_repository
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline
from weaksam_rt.prompt_clustering import ClusteringConfig, prompt_clustering_model
from weaksam_rt.repository_check import check_model_repository

_MODELS = Path(__file__).parents[3] / "assets" / "demo_models"
_RULES = ClusteringConfig(
    cam_peaks=PeakConfig(kernel_size=33, value_thresh=0.7, distance="l2"), points_per_cluster=3
)


@pytest.fixture(scope="module")
def classifier():
    return load_artifact(_MODELS / "vit_classifier")


@pytest.fixture(scope="module")
def parameters(classifier):
    return prompted_parameters(classifier.parameters, 1024, _RULES)


@pytest.fixture(scope="module")
def definition(classifier, parameters):
    return prompted_classifier_model(OnnxRuntimeModel(classifier), parameters)


@pytest.fixture
def engine(classifier, parameters, tmp_path, monkeypatch, stand_in):
    """An artifact of the stand-in library, whose plan is the graph as TensorRT gets it."""
    trt = pytest.importorskip("tests.unit.export.stand_in_plugin_tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    graph = portable_model(prompted_graph(onnx.load(classifier.path), parameters))
    (tmp_path / "model.plan").write_bytes(graph.SerializeToString())
    return write_manifest(
        tmp_path / "model.plan",
        model=PROMPTED_CLASSIFIER,
        engine="tensorrt",
        parameters=parameters,
        provenance={
            "versions": {"tensorrt": trt.__version__},
            "compute_capabilities": ["9.0"],
            "precision": "fp32",
        },
    )


def _image(parameters, *, passes=2, tags=(3, 1)):
    inputs = example_inputs(PROMPTED_CLASSIFIER, parameters)[2 - passes]
    return {**inputs, "tag_ids": np.array(tags, np.int32)}


def test_the_rules_travel_with_the_manifest(parameters):
    written = json.loads(json.dumps(parameters_to_json(parameters)))
    again = parameters_from_json(PROMPTED_CLASSIFIER, written)
    assert again == parameters
    config = engine_prompt_config(again)
    assert (config.clustering, config.model_size) == (_RULES, 1024)
    assert config.num_classes == len(parameters.class_names)
    assert "cam_kernel_size" in written
    assert "cross_kernel_size" not in written, "defaults are left out"
    with pytest.raises(ContractError, match="parameter cam_value_thresh is"):
        parameters_from_json(PROMPTED_CLASSIFIER, {**written, "cam_value_thresh": "0.7"})
    with pytest.raises(ArtifactError, match="kernel_size must be odd"):
        engine_prompt_config(replace(parameters, cross_kernel_size=4))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("tags", [(3, 1), (0,), (4, 2, 0)])
def test_the_engines_prompts_are_those_of_the_two_models(
    engine, parameters, definition, passes, tags
):
    model = open_engine(engine)
    inputs = _image(parameters, passes=passes, tags=tags)
    expected, got = definition(inputs, None), model(inputs, None)
    assert list(got) == [spec.name for spec in engine.contract.outputs]
    assert len(expected["points"]) > 3
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    engine.contract.check_outputs(got)
    assert list(model(inputs, ["points"])) == ["points"]


def test_the_definition_is_what_the_pipeline_does(classifier, parameters, definition):
    """By its own way through two models, for the tags of an image."""
    seen = {}

    class Backend:
        async def infer(self, model, inputs, outputs=None):
            if model == "vit_classifier":
                seen["image"] = inputs["image"]
                return OnnxRuntimeModel(classifier)(inputs, outputs)
            seen["prompts"] = prompt_clustering_model(inputs, config=_RULES)
            return seen["prompts"]

    pipeline = WeakSamPipeline(
        Backend(), PipelineModels(vit_classifier=classifier.parameters), PipelineConfig()
    )
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    asyncio.run(pipeline._peak_prompts(picture, [2, 0]))
    inputs = {
        "image": seen["image"],
        "tag_ids": np.array([2, 0], np.int32),
        "image_size": np.array([90, 120], np.int32),
    }
    answer = definition(inputs, list(seen["prompts"]))
    for name, array in seen["prompts"].items():
        np.testing.assert_array_equal(answer[name], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag_ids": [1, 1]}, r"tag_ids: expected different classes below .* got \[1, 1\]"),
        ({"tag_ids": [99]}, r"got \[99\]"),
        ({"tag_ids": []}, r"at least one, got \[\]"),
        ({"image_size": [0, 5]}, r"image_size: expected sides in \[1, 32767\], got \[0, 5\]"),
    ],
)
def test_images_that_make_no_sense_are_refused_with_the_reason(
    engine, parameters, definition, change, message
):
    inputs = _image(parameters) | {n: np.array(v, np.int32) for n, v in change.items()}
    for model in (open_engine(engine), definition):
        with pytest.raises(ContractError, match=message):
            model(inputs, None)
    inputs = _image(parameters)
    inputs["image"] = np.concatenate([inputs["image"]] * 2)
    with pytest.raises(ContractError, match="perhaps its mirror image, got 4"):
        definition(inputs, None)


def test_an_engine_with_other_prompts_is_not_accepted(parameters, definition):
    inputs = example_inputs(PROMPTED_CLASSIFIER, parameters)
    assert compare_prompts(definition, definition, inputs, 0.01).distance == 0

    def shifted(arrays, outputs):
        answer = definition(arrays, outputs)
        return {**answer, "points": answer["points"] + 40}

    with pytest.raises(ParityError, match="0% of the prompts in common with the two models"):
        compare_prompts(shifted, definition, inputs, 0.01)

    def louder(arrays, outputs):
        answer = definition(arrays, outputs)
        return {**answer, "logits": 2 * answer["logits"]}

    with pytest.raises(ParityError, match="logits at a distance of 1 "):
        compare_prompts(louder, definition, inputs, 0.01)


def test_where_tensorrt_or_the_gpu_is_missing_nothing_is_built(classifier, tmp_path):
    rules = {"sam_image_size": 1024, "clustering": _RULES}
    with pytest.raises(BackendUnavailableError, match="by TensorRT alone, on the GPU that serves"):
        build_prompted_classifier(classifier, tmp_path, **rules, config=EngineConfig())
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not refittable, got int8, refittable"):
        build_prompted_classifier(
            classifier, tmp_path, **rules, config=EngineConfig(precision="int8", refittable=True)
        )
    detector = load_artifact(_MODELS / "detector")
    with pytest.raises(ArtifactError, match="is a detector, expected a vit_classifier"):
        build_prompted_classifier(detector, tmp_path, **rules, config=EngineConfig())


def test_the_embedded_profile_serves_it_beside_the_pipelines(engine, classifier, tmp_path):
    others = [load_artifact(path.parent) for path in sorted(_MODELS.glob("*/manifest.json"))]
    repository = tmp_path / "repository"
    build_model_repository(
        [*others, engine], repository, profile="embedded", config=PipelineConfig()
    )
    assert check_model_repository(repository) == []
    text = (repository / PROMPTED_CLASSIFIER / "config.pbtxt").read_text()
    # Zeros are no tags.
    assert "model_warmup" not in text
    assert "max_batch_size: 0" in text
    with pytest.raises(ArtifactError, match="holds a plugin in Python, which the image's"):
        plan_model_repository([*others, engine], profile="container", config=PipelineConfig())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_and_runs_it(classifier, definition, parameters, tmp_path, precision):
    pytest.importorskip("tensorrt")
    built = build_prompted_classifier(
        classifier,
        tmp_path / "engine",
        sam_image_size=1024,
        clustering=_RULES,
        config=EngineConfig(precision=precision),
    )
    assert built.passport.parity
    model = open_engine(built)
    for tags in ((0,), (3, 1), (4, 2, 0)):
        inputs = _image(parameters, tags=tags)
        compare_prompts(model, definition, [inputs], 0.05)
