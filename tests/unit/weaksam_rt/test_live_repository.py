"""A repository on disk while versions come and go; no server."""

from dataclasses import replace

import pytest

from tests.unit.weaksam_rt.repositories import PARAMETERS, build, write_artifacts
from weaksam_rt.artifacts import write_manifest
from weaksam_rt.contracts import (
    DETECTOR,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
)
from weaksam_rt.errors import ArtifactError, ReleaseError
from weaksam_rt.live_repository import (
    append_history,
    engine_config,
    history,
    live_version,
    live_versions,
    next_version,
    pipeline_config,
    pipeline_file,
    pipelines_of,
    plan_version,
    prune,
    read_config,
    remove_unfinished,
    remove_version,
    version_folders,
    versions_in_config,
    write_config,
    write_engine_versions,
    write_pipeline_versions,
)
from weaksam_rt.model_config import with_parameter, with_versions
from weaksam_rt.model_repository import HISTORY_NAME
from weaksam_rt.releases import _engines_of, _switches_back
from weaksam_rt.repository_check import check_model_repository, read_model_config

DETECT = "weaksam_detect"


@pytest.fixture
def repository(tmp_path):
    build(write_artifacts(tmp_path / "artifacts"), tmp_path / "r")
    return tmp_path / "r"


def detector(folder, content=b"another engine", **changes):
    folder.mkdir()
    (folder / "model.onnx").write_bytes(content)
    return write_manifest(
        folder / "model.onnx",
        model=DETECTOR,
        engine="onnxruntime",
        parameters=replace(PARAMETERS[DETECTOR], **changes),
        provenance={"precision": "fp32"},
    )


def release(repository, *artifacts):
    """The disk's side of a release."""
    plan = plan_version(repository, artifacts)
    write_engine_versions(repository, plan)
    write_pipeline_versions(repository, plan)
    for model, engine in plan.engines.items():
        both = (engine.live_version, plan.version)
        write_config(repository, model, engine_config(repository, model, both, plan.version))
    assert check_model_repository(repository) == []  # the old version is still the live one
    for pipeline in plan.pipelines:
        write_config(repository, pipeline, pipeline_config(repository, pipeline, plan.version))
    assert check_model_repository(repository) == []
    for model in plan.engines:
        text = engine_config(repository, model, (plan.version,), plan.version)
        write_config(repository, model, text)
    entry = {"version": plan.version, "action": "release", "models": list(plan.engines)}
    append_history(repository, {**entry, "replaced": dict(plan.pipelines)})
    return plan.version


def engine(folder, model, source="of one checkpoint", **changes):
    """Another engine of a model."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(source.encode())
    return write_manifest(
        folder / "model.onnx",
        model=model,
        engine="onnxruntime",
        parameters=replace(PARAMETERS[model], **changes),
        provenance={"source": {"sha256": source}},
    )


def test_a_new_version_is_written_beside_the_live_one_and_changes_nothing(repository, tmp_path):
    before = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    plan = plan_version(repository, [detector(tmp_path / "new")])
    assert (plan.version, plan.engines[DETECTOR].live_version, plan.pipelines) == (
        2,
        1,
        {DETECT: 1},
    )
    write_engine_versions(repository, plan)
    write_pipeline_versions(repository, plan)
    assert check_model_repository(repository) == []
    assert all(path.read_bytes() == content for path, content in before.items())
    assert pipeline_file(repository, DETECT, 2).members[DETECTOR] == 2
    assert pipeline_file(repository, DETECT).members[DETECTOR] == 1
    assert pipeline_file(repository, DETECT, 2).members[SAM_IMAGE_ENCODER] == 1


def test_the_config_decides_and_says_what_changed(repository, tmp_path):
    assert release(repository, detector(tmp_path / "new", class_names=("cat", "otter"))) == 2
    assert live_version(repository, DETECT) == 2
    assert live_versions(repository, DETECTOR) == (2,)
    config = read_model_config(repository / DETECT / "config.pbtxt")
    passports = config.parameters["passports"].string_value
    assert '"class otter added"' in passports
    assert '"version": 2' in passports
    assert pipelines_of(repository, DETECTOR) == (DETECT,)


def test_labels_follow_the_class_names_and_the_config_stays_where_they_do_not_change(
    repository, tmp_path
):
    same = release(repository, detector(tmp_path / "a", b"a"))
    assert 'label_filename: "labels.txt"' in read_config(repository, DETECTOR)
    other = release(repository, detector(tmp_path / "b", b"b", class_names=("lion", "wolf")))
    assert f'label_filename: "labels.{other}.txt"' in read_config(repository, DETECTOR)
    assert (repository / DETECTOR / f"labels.{other}.txt").read_text() == "lion\nwolf\n"
    back = engine_config(repository, DETECTOR, (same,), same)
    assert 'label_filename: "labels.txt"' in back
    again = release(repository, detector(tmp_path / "c", b"c", class_names=("lion", "wolf")))
    assert not (repository / DETECTOR / f"labels.{again}.txt").exists()


def test_an_engine_of_other_shapes_is_refused(repository, tmp_path):
    with pytest.raises(ArtifactError, match=r"num_candidates=9.*serve it beside this one"):
        plan_version(repository, [detector(tmp_path / "new", num_candidates=9)])
    assert version_folders(repository, DETECTOR) == [1]


def test_sams_halves_are_released_together_and_of_one_checkpoint(repository, tmp_path):
    encoder = engine(tmp_path / "e", SAM_IMAGE_ENCODER)
    for given in ([encoder], [engine(tmp_path / "d", SAM_MASK_DECODER), detector(tmp_path / "x")]):
        with pytest.raises(ArtifactError, match="is half a SAM: release sam_image_encoder and"):
            plan_version(repository, given)
    stranger = engine(tmp_path / "stranger", SAM_MASK_DECODER, "of another")
    with pytest.raises(ArtifactError, match=r"different checkpoints \(of another, of one check"):
        plan_version(repository, [encoder, stranger])
    larger = engine(tmp_path / "larger", SAM_MASK_DECODER, image_size=512)
    with pytest.raises(ArtifactError, match=r"image_size=512.*export both from one checkpoint"):
        plan_version(repository, [encoder, larger])
    with pytest.raises(ArtifactError, match="one engine for each model, got"):
        plan_version(repository, [detector(tmp_path / "y"), detector(tmp_path / "z")])
    halves = [encoder, engine(tmp_path / "decoder", SAM_MASK_DECODER)]
    assert release(repository, *halves) == 2
    for pipeline in ("weaksam_detect", "weaksam_propose", "weaksam_segment"):
        members = pipeline_file(repository, pipeline).members
        assert members[SAM_IMAGE_ENCODER] == members[SAM_MASK_DECODER] == 2


def test_a_way_back_takes_along_what_belongs_together(repository, tmp_path):
    release(repository, engine(tmp_path / "classifier", VIT_CLASSIFIER))
    release(repository, *(engine(tmp_path / m, m) for m in (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)))
    sam = _switches_back(repository, SAM_MASK_DECODER, None)
    assert sam == {"weaksam_detect": (3, 1), "weaksam_propose": (3, 2), "weaksam_segment": (3, 1)}
    assert _engines_of(repository, sam) == {SAM_IMAGE_ENCODER: (3, 1), SAM_MASK_DECODER: (3, 1)}
    everything = _switches_back(repository, VIT_CLASSIFIER, 1)
    assert everything == {"weaksam_propose": (3, 1)}
    with pytest.raises(ReleaseError, match=r"weaksam_\w+ would call its version 3: roll back the"):
        _engines_of(repository, everything)
    assert _switches_back(repository, SAM_IMAGE_ENCODER, 2) == {  # each as it was at version 2
        "weaksam_detect": (3, 1), "weaksam_propose": (3, 2), "weaksam_segment": (3, 1)
    }  # fmt: skip
    with pytest.raises(ReleaseError, match="weaksam_detect cannot be rolled back to version 9"):
        _switches_back(repository, SAM_IMAGE_ENCODER, 9)
    with pytest.raises(ReleaseError, match="are at version 3 already"):
        _switches_back(repository, SAM_IMAGE_ENCODER, 3)
    with pytest.raises(ReleaseError, match="no release of detector is on record"):
        _switches_back(repository, DETECTOR, None)


def test_a_history_that_names_one_model_is_read(repository, tmp_path):
    release(repository, detector(tmp_path / "a", b"a"))
    (repository / HISTORY_NAME).unlink()
    old = {"version": 2, "action": "release", "model": DETECTOR, "replaced": {DETECT: 1}}
    append_history(repository, old)
    assert _switches_back(repository, DETECTOR, None) == {DETECT: (2, 1)}


def test_a_damaged_live_engine_is_noticed_before_anything_is_built_on_it(repository, tmp_path):
    (repository / DETECTOR / "1" / "model.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="truncated"):
        plan_version(repository, [detector(tmp_path / "new")])


def test_version_numbers_are_never_used_again(repository, tmp_path):
    release(repository, detector(tmp_path / "a", b"a"))
    assert next_version(repository) == 3
    append_history(repository, {"version": 7, "action": "release"})
    assert next_version(repository) == 8
    assert [entry["version"] for entry in history(repository)] == [2, 7]


def test_old_versions_go_and_what_kept_ones_call_stays(repository, tmp_path):
    for name in "abc":
        release(repository, detector(tmp_path / name, name.encode()))
    assert prune(repository, [DETECTOR], 2) == [1, 2]
    assert version_folders(repository, DETECT) == [3, 4]
    assert version_folders(repository, DETECTOR) == [3, 4]
    assert version_folders(repository, VIT_CLASSIFIER) == [1]
    assert check_model_repository(repository) == []
    with pytest.raises(ValueError, match="keep is 1"):
        prune(repository, [DETECTOR], 1)


def test_a_live_version_cannot_be_removed(repository):
    with pytest.raises(ValueError, match="is live and was not removed"):
        remove_version(repository, DETECTOR, 1)
    remove_version(repository, DETECTOR, 5)  # never there


def test_a_repository_with_releases_is_not_built_over(repository, tmp_path):
    append_history(repository, {"version": 2, "action": "release"})
    with pytest.raises(ValueError, match="has had releases and may be being served"):
        build(write_artifacts(tmp_path / "again"), repository)
    assert history(repository)


def test_half_written_folders_are_swept_and_others_are_not(repository):
    for name in (".2.staging", ".git"):
        (repository / DETECTOR / name).mkdir()
    remove_unfinished(repository)
    assert not (repository / DETECTOR / ".2.staging").exists()
    assert (repository / DETECTOR / ".git").exists()


def test_what_has_no_engine_cannot_be_released(repository, tmp_path):
    artifact = replace(detector(tmp_path / "new"), model=PROMPT_CLUSTERING)
    with pytest.raises(ArtifactError, match="has no engine that a pipeline calls"):
        plan_version(repository, [artifact])
    with pytest.raises(ArtifactError, match="is no model repository"):
        live_versions(tmp_path, DETECTOR)


def test_a_config_from_before_versions_were_named_is_refused(repository):
    text = read_config(repository, DETECTOR)
    old = text.replace("specific { versions: [ 1 ] }", "latest { num_versions: 1 }")
    with pytest.raises(ArtifactError, match="build the model repository again"):
        versions_in_config(old)
    with pytest.raises(ValueError, match="build the model repository again"):
        with_versions(old, [1, 2])
    assert versions_in_config(with_versions(text, [1, 2])) == (1, 2)


@pytest.mark.parametrize("value", ['{"a": "b\\n"}', "back\\slash", 'quote"', "plain", "\\1 {}"])
def test_a_parameter_is_read_back_as_it_was_written(repository, value):
    text = with_parameter(read_config(repository, DETECT), "passports", value)
    write_config(repository, DETECT, text)
    config = read_model_config(repository / DETECT / "config.pbtxt")
    assert config.parameters["passports"].string_value == value
    with pytest.raises(ValueError, match="found 0 lines"):
        with_parameter(text, "absent", value)
