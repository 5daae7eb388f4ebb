import pytest

from tests.unit.weaksam_rt.repositories import (
    CONFIG,
    PARAMETERS,
    SAM,
    artifact,
    build,
    write_artifacts,
)
from weaksam_rt.contracts import (
    DETECTOR,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    SamParameters,
)
from weaksam_rt.errors import ArtifactError
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import (
    load_exported_models,
    plan_model_repository,
    read_pipeline_file,
    write_repository_snapshot,
)
from weaksam_rt.repository_check import check_model_repository, read_model_config


@pytest.fixture
def artifacts(tmp_path):
    return write_artifacts(tmp_path / "artifacts")


def models_in(repository):
    return {folder.name for folder in repository.iterdir()}


@pytest.mark.parametrize("profile", ["embedded", "container"])
def test_a_complete_set_of_artifacts_serves_every_pipeline(artifacts, tmp_path, profile):
    build(artifacts, tmp_path / "repository", profile)
    assert models_in(tmp_path / "repository") == {
        *PARAMETERS,
        "prompt_clustering",
        "weaksam_detect",
        "weaksam_propose",
        "weaksam_segment",
    }
    assert check_model_repository(tmp_path / "repository") == []


def test_detection_is_served_without_sam(artifacts, tmp_path):
    build({DETECTOR: artifacts[DETECTOR]}, tmp_path / "repository")
    assert models_in(tmp_path / "repository") == {DETECTOR, "weaksam_detect"}
    assert check_model_repository(tmp_path / "repository") == []
    file = read_pipeline_file(tmp_path / "repository/weaksam_detect/1/pipeline.json")
    assert file.models.sam is None
    assert file.members == {DETECTOR: 1}


def test_a_pipeline_whose_members_are_not_all_there_is_left_out(artifacts, tmp_path):
    del artifacts[VIT_CLASSIFIER]
    build(artifacts, tmp_path / "repository")
    assert "weaksam_propose" not in models_in(tmp_path / "repository")
    assert "weaksam_segment" in models_in(tmp_path / "repository")


def test_artifacts_that_serve_nothing_are_refused(artifacts, tmp_path):
    with pytest.raises(ArtifactError, match="weaksam_segment needs sam_image_encoder"):
        build({VIT_CLASSIFIER: artifacts[VIT_CLASSIFIER]}, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_two_artifacts_of_one_model_are_refused(artifacts, tmp_path):
    twice = [artifacts[DETECTOR], artifact(tmp_path / "other", DETECTOR)]
    with pytest.raises(ArtifactError, match="two artifacts for detector"):
        plan_model_repository(twice, profile="embedded", config=CONFIG)


def test_halves_of_different_sams_are_refused(artifacts, tmp_path):
    other = SamParameters(image_size=512, embedding_size=32, embedding_dim=32)
    artifacts[SAM_MASK_DECODER] = artifact(tmp_path / "other", SAM_MASK_DECODER, other)
    with pytest.raises(ArtifactError, match="export both from one checkpoint"):
        build(artifacts, tmp_path / "repository")


def test_the_embedded_profile_holds_engines_in_python_models(artifacts, tmp_path):
    build(artifacts, tmp_path / "r", options=ServingOptions(engine_threads=2))
    config = read_model_config(tmp_path / "r/detector/config.pbtxt")
    assert config.backend == "python"
    assert config.parameters["intra_op_num_threads"].string_value == "2"
    text = (tmp_path / "r/detector/1/model.py").read_text()
    assert "weaksam_rt.serving.engine_model import EngineModel as TritonPythonModel" in text
    assert (tmp_path / "r/detector/1/model.onnx").read_bytes() == b"engine of detector"


def test_the_container_profile_leaves_engines_to_the_server(artifacts, tmp_path):
    build(artifacts, tmp_path / "r", "container")
    config = read_model_config(tmp_path / "r/detector/config.pbtxt")
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert config.default_model_filename == "model.onnx"
    assert not (tmp_path / "r/detector/1/model.py").exists()


def test_the_queues_of_pipelines_are_bounded_and_reject_instead_of_delaying(artifacts, tmp_path):
    options = ServingOptions(max_queue_size=7, queue_timeout_ms=1500)
    build(artifacts, tmp_path / "r", options=options)
    for name in ("weaksam_detect", "weaksam_propose", "weaksam_segment"):
        config = read_model_config(tmp_path / "r" / name / "config.pbtxt")
        policy = config.dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 7
        assert policy.default_timeout_microseconds == 1_500_000
        assert policy.timeout_action == policy.REJECT
        assert policy.allow_timeout_override


@pytest.mark.parametrize("profile", ["embedded", "container"])
def test_a_bounded_queue_never_has_a_single_instance(artifacts, tmp_path, profile):
    """Or a lone client waits for half a second now and then: see ``pipeline_instances``."""
    build(artifacts, tmp_path / "r", profile)
    for path in (tmp_path / "r").rglob("config.pbtxt"):
        config = read_model_config(path)
        if config.dynamic_batching.HasField("default_queue_policy"):
            assert config.instance_group[0].count >= 2
    with pytest.raises(ValueError, match="pipeline_instances is 1, expected at least 2"):
        ServingOptions(pipeline_instances=1)


def test_engines_form_batches_and_may_wait_for_them(artifacts, tmp_path):
    build(artifacts, tmp_path / "r", options=ServingOptions(max_queue_delay_us=200))
    detector = read_model_config(tmp_path / "r/detector/config.pbtxt")
    assert detector.dynamic_batching.max_queue_delay_microseconds == 200
    assert not detector.dynamic_batching.HasField("default_queue_policy")


def test_models_without_a_batch_axis_are_not_batched_by_the_server(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    config = read_model_config(tmp_path / "r/sam_mask_decoder/config.pbtxt")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")


def test_engines_are_warmed_up_with_the_shapes_of_their_contract(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    warmup = read_model_config(tmp_path / "r/detector/config.pbtxt").model_warmup[0]
    assert list(warmup.inputs["image"].dims) == [320, 320, 3]
    assert warmup.batch_size == 1
    warmup = read_model_config(tmp_path / "r/sam_mask_decoder/config.pbtxt").model_warmup[0]
    assert list(warmup.inputs["image_embeddings"].dims) == [2, 32, 16, 16]


def test_class_names_are_published_as_labels(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    assert (tmp_path / "r/detector/labels.txt").read_text() == "cat\ndog\n"


def test_settings_and_sizes_travel_with_the_pipelines(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    file = read_pipeline_file(tmp_path / "r/weaksam_propose/1/pipeline.json")
    assert file.config == CONFIG
    assert file.models.detector == PARAMETERS[DETECTOR]
    assert file.models.sam == SAM


def test_a_version_gets_its_own_folder(artifacts, tmp_path):
    build(artifacts, tmp_path / "r", version=3)
    assert (tmp_path / "r/detector/3/model.onnx").is_file()
    assert check_model_repository(tmp_path / "r") == []
    with pytest.raises(ValueError, match="at least 1"):
        build(artifacts, tmp_path / "r", version=0)


def test_an_old_repository_is_replaced_whole(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    build({DETECTOR: artifacts[DETECTOR]}, tmp_path / "r")
    assert models_in(tmp_path / "r") == {DETECTOR, "weaksam_detect"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifacts", "r"]


def test_a_folder_with_something_else_in_it_is_left_alone(artifacts, tmp_path):
    (tmp_path / "r" / "holiday").mkdir(parents=True)
    with pytest.raises(ValueError, match="holiday"):
        build(artifacts, tmp_path / "r")
    assert models_in(tmp_path / "r") == {"holiday"}


def test_a_failed_build_leaves_the_old_repository(artifacts, tmp_path):
    build(artifacts, tmp_path / "r")
    before = models_in(tmp_path / "r")
    artifacts[DETECTOR].path.unlink()
    with pytest.raises(FileNotFoundError):
        build(artifacts, tmp_path / "r")
    assert models_in(tmp_path / "r") == before
    assert (tmp_path / "r/detector/1/model.onnx").is_file()


def test_a_snapshot_has_all_configs_and_no_engine(artifacts, tmp_path):
    for profile in ("embedded", "container"):
        output = tmp_path / profile
        write_repository_snapshot(list(artifacts.values()), output, profile=profile, config=CONFIG)
        assert not list(output.rglob("*.onnx"))
        assert not list(output.rglob("manifest.json"))
        assert len(list(output.rglob("config.pbtxt"))) == 8
        assert check_model_repository(output, with_engines=False) == []


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_queue_size is 0, expected at least 1"):
        ServingOptions(max_queue_size=0)


def test_a_damaged_pipeline_file_is_named(tmp_path):
    path = tmp_path / "pipeline.json"
    path.write_text('{"models": {"tail": {}}}')
    with pytest.raises(ArtifactError, match=r"pipeline\.json.*build the model repository again"):
        read_pipeline_file(path)


def test_exported_models_are_read_with_the_settings_beside_them(artifacts, tmp_path):
    (tmp_path / "artifacts/pipeline.toml").write_text("[detection]\nscore_thresh = 0.125\n")
    exported = load_exported_models(tmp_path / "artifacts")
    assert {a.model for a in exported.artifacts} == set(artifacts)
    assert exported.config.detection.score_thresh == 0.125
    (tmp_path / "other.toml").write_text("[detection]\nscore_thresh = 0.5\n")
    other = load_exported_models(tmp_path / "artifacts", tmp_path / "other.toml")
    assert other.config.detection.score_thresh == 0.5


def test_a_folder_without_exported_models_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no exported models"):
        load_exported_models(tmp_path)
