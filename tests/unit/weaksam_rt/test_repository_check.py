import pytest
from google.protobuf import text_format

from tests.unit.weaksam_rt.repositories import build, write_artifacts
from weaksam_rt.repository_check import check_model_repository, read_model_config


@pytest.fixture
def repository(tmp_path):
    build(write_artifacts(tmp_path / "artifacts"), tmp_path / "r")
    return tmp_path / "r"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_config_edited_by_hand_is_found(repository):
    edit(repository / "detector/config.pbtxt", "TYPE_UINT8", "TYPE_FP32")
    problems = check_model_repository(repository)
    assert any(
        "detector: input image is TYPE_FP32 [320, 320, 3], the contract says TYPE_UINT8" in p
        for p in problems
    )


def test_a_dropped_optional_mark_is_found(repository):
    edit(repository / "weaksam_detect/config.pbtxt", "    optional: true\n", "")
    problems = check_model_repository(repository)
    assert len(problems) == 3
    assert all("the contract says" in p and "optional" in p for p in problems)


def test_a_field_that_triton_does_not_know_is_found(repository):
    edit(repository / "detector/config.pbtxt", "max_batch_size:", "max_batch: ")
    problems = check_model_repository(repository)
    assert any("detector: config.pbtxt cannot be read" in p for p in problems)
    with pytest.raises(text_format.ParseError):
        read_model_config(repository / "detector/config.pbtxt")


def test_a_damaged_engine_is_found(repository):
    path = repository / "detector/1/model.onnx"
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    assert any("damaged or foreign" in p for p in check_model_repository(repository))
    path.write_bytes(b"x" * (size - 1))
    assert any("is truncated" in p for p in check_model_repository(repository))


def test_a_config_that_serves_a_version_without_a_folder_is_found(repository):
    edit(repository / "detector/config.pbtxt", "versions: [ 1 ]", "versions: [ 1, 2 ]")
    assert check_model_repository(repository) == [
        "detector: its config serves version 2, the folders are [1]"
    ]


def test_a_config_that_leaves_the_choice_of_version_to_the_folders_is_found(repository):
    edit(
        repository / "detector/config.pbtxt",
        "specific { versions: [ 1 ] }",
        "latest { num_versions: 1 }",
    )
    problems = check_model_repository(repository)
    assert any("detector: its config does not name the versions" in p for p in problems)


def test_a_pipeline_that_calls_a_version_that_is_not_served_is_found(repository):
    edit(repository / "weaksam_detect/1/pipeline.json", '"detector": 1', '"detector": 2')
    assert check_model_repository(repository) == [
        "weaksam_detect: it calls version 2 of detector, which serves [1]"
    ]


def test_a_pipeline_with_other_class_names_than_its_engine_is_found(repository):
    edit(repository / "weaksam_detect/1/pipeline.json", '"cat"', '"lion"')
    problems = [p for p in check_model_repository(repository) if "detector" in p]
    assert any("weaksam_detect: its pipeline.json takes detector version 1" in p for p in problems)


def test_a_missing_member_is_found(repository):
    (repository / "vit_classifier").rename(repository.parent / "elsewhere")
    assert check_model_repository(repository) == [
        "weaksam_propose: its member vit_classifier is not in the repository"
    ]


def test_a_member_of_other_sizes_is_found(repository):
    edit(
        repository / "weaksam_detect/1/pipeline.json", '"num_candidates": 50', '"num_candidates": 9'
    )
    problems = check_model_repository(repository)
    assert any(p.startswith("weaksam_detect: its pipeline.json and detector") for p in problems)


def test_missing_files_are_found(repository):
    (repository / "detector/labels.txt").unlink()
    (repository / "weaksam_detect/1/model.py").unlink()
    (repository / "weaksam_segment/1/pipeline.json").unlink()
    problems = "\n".join(check_model_repository(repository))
    assert "labels.txt of its output labels is missing" in problems
    assert "weaksam_detect: version 1 has no model.py" in problems
    assert "weaksam_segment: " in problems


def test_a_folder_that_is_no_repository_is_said_to_be_none(tmp_path):
    assert "not a folder" in check_model_repository(tmp_path / "absent")[0]
    assert "holds no models" in check_model_repository(tmp_path)[0]
