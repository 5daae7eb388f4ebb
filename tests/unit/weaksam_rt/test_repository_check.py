import pytest
from google.protobuf import text_format

from tests.unit.weaksam_rt.repositories import PARAMETERS, build, write_artifacts
from weaksam_rt.artifacts import write_manifest
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.repository_check import check_model_repository, read_model_config


@pytest.fixture
def repository(tmp_path):
    build(write_artifacts(tmp_path / "artifacts"), tmp_path / "r")
    return tmp_path / "r"


def detector_plan(folder):
    """A TensorRT engine of two profiles that nothing opens here."""
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"plan")
    return write_manifest(
        folder / "model.plan", model=DETECTOR, engine="tensorrt", parameters=PARAMETERS[DETECTOR],
        provenance={"profiles": ({"name": "batch 1"}, {"name": "wide"})},
    )  # fmt: skip


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


_BATCHING = "dynamic_batching {\n  max_queue_delay_microseconds: 0\n}\n"


@pytest.mark.parametrize(
    ("model", "old", "new", "problem"),
    [
        ("detector", _BATCHING, "", "its config has no dynamic_batching, the builder writes one"),
        ("detector", "kind: KIND_CPU", "", "are KIND_AUTO, the builder writes KIND_CPU"),
        ("detector", "instance_group [ { count: 1 kind: KIND_CPU } ]", "", "are not named, the"),
        ("detector", '"intra_op_num_threads"', '"threads"', "no parameter 'intra_op_num_threads'"),
        (
            "weaksam_detect",
            "timeout_action: REJECT",
            "timeout_action: DELAY",
            "policy that rejects",
        ),
        ("weaksam_detect", "max_queue_size: 64", "", "no queue policy that rejects"),
        ("weaksam_segment", "default_timeout_microseconds: 30000000", "", "policy that rejects"),
        ("prompt_clustering", "kind: KIND_CPU", "kind: KIND_GPU", "are KIND_GPU, the builder"),
    ],
)
def test_what_a_config_lost_of_how_its_model_is_run_is_found(repository, model, old, new, problem):
    edit(repository / model / "config.pbtxt", old, new)
    (found,) = check_model_repository(repository)
    assert found.startswith(f"{model}: its ")
    assert problem in found


def test_a_lost_warm_up_is_found(repository):
    path = repository / "sam_mask_decoder/config.pbtxt"
    text = path.read_text()
    edit(path, text[text.index("model_warmup") : text.index("parameters {")], "")
    assert check_model_repository(repository) == [
        "sam_mask_decoder: its config has no model_warmup, the builder writes one; build the "
        "repository again"
    ]


def test_what_an_operator_may_choose_is_no_problem(repository):
    detector, detect = (repository / m / "config.pbtxt" for m in ("detector", "weaksam_detect"))
    edit(detector, "count: 1", "count: 3")
    edit(detector, "max_queue_delay_microseconds: 0", "max_queue_delay_microseconds: 500")
    edit(detector, 'string_value: "0"', 'string_value: "2"')
    edit(detect, "max_queue_size: 64", "max_queue_size: 8")
    edit(detect, "default_timeout_microseconds: 30000000", "default_timeout_microseconds: 1000")
    assert check_model_repository(repository) == []


def test_a_plan_that_lost_its_profiles_is_found(tmp_path):
    made = detector_plan(tmp_path / "made")
    build({"detector": made}, tmp_path / "r", "container")
    assert check_model_repository(tmp_path / "r") == []
    edit(tmp_path / "r/detector/config.pbtxt", ' profile: [ "0", "1" ]', "")
    assert check_model_repository(tmp_path / "r") == [
        "detector: its instances are KIND_GPU, the builder writes KIND_GPU with profiles 0, 1"
    ]


def test_the_clustering_of_the_container_may_run_on_a_gpu(tmp_path):
    build(write_artifacts(tmp_path / "artifacts"), tmp_path / "r", "container")
    assert check_model_repository(tmp_path / "r") == []
    edit(tmp_path / "r/prompt_clustering/config.pbtxt", "FORCE_CPU_ONLY_INPUT_TENSORS", "other")
    (found,) = check_model_repository(tmp_path / "r")
    assert "no parameter 'FORCE_CPU_ONLY_INPUT_TENSORS'" in found


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
