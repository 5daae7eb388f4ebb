"""Passports: what is refused before an engine is opened, and in which words."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.weaksam_rt.repositories import PARAMETERS, artifact
from weaksam_rt.artifacts import (
    load_artifact,
    passport_changes,
    refusal_here,
    upgrade_manifest,
    write_manifest,
)
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DETECTOR, DetectorParameters
from weaksam_rt.errors import ArtifactError

PASSPORT = {
    "source": {"file": "d.safetensors", "sha256": "ab12"},
    "commit": "c0ffee",
    "versions": {"torch": "2.15.0"},
    "precision": "fp32",
    "parity": {"boxes": {"max_abs_error": 2e-6}, "scores": {"max_abs_error": 1e-6}},
    "task_metrics": {"ap50": 0.743},
    "created_at": "2026-11-22T20:00:00+00:00",
}


def write(folder, content=b"engine", engine="onnxruntime", parameters=None, **passport):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    return write_manifest(
        folder / "model.onnx",
        model=DETECTOR,
        engine=engine,
        parameters=parameters or PARAMETERS[DETECTOR],
        provenance={**PASSPORT, **passport},
    )


def change(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_passport_is_read_back_as_it_was_written(tmp_path):
    written = write(tmp_path, profiles=({"batch": 1},), compute_capabilities=("8.9",), mood="good")
    found = load_artifact(tmp_path)
    assert found == written
    assert found.passport.worst_parity == 2e-6
    assert found.passport.created.year == 2026
    assert found.passport.notes == {"mood": "good"}
    assert json.loads((tmp_path / "manifest.json").read_text())["size_bytes"] == 6


def test_a_truncated_engine_is_called_truncated(tmp_path):
    write(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"engi")
    with pytest.raises(ArtifactError, match="truncated: 4 bytes, its manifest says 6"):
        load_artifact(tmp_path)


@given(position=st.integers(0, 199), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("a")
    content = bytearray(range(200))
    write(folder, bytes(content))
    content[position] ^= 1 << bit
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or foreign"):
        load_artifact(folder)


def test_an_engine_that_grew_is_foreign(tmp_path):
    write(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"engine and more")
    with pytest.raises(ArtifactError, match="damaged or foreign"):
        load_artifact(tmp_path)


def test_a_file_that_belongs_to_the_engine_is_checked_too(tmp_path):
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    (tmp_path / "model.onnx").write_bytes(b"engine")
    arguments = {"model": DETECTOR, "engine": "onnxruntime", "provenance": {}}
    written = write_manifest(
        tmp_path / "model.onnx",
        parameters=PARAMETERS[DETECTOR],
        extra_files=[tmp_path / "model.onnx.data"],
        **arguments,
    )
    assert [path.name for path in written.extra_files] == ["model.onnx.data"]
    (tmp_path / "model.onnx.data").write_bytes(b"Weights")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is damaged or foreign"):
        load_artifact(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is missing"):
        load_artifact(tmp_path)
    with pytest.raises(ValueError, match="does not lie beside"):
        write_manifest(
            tmp_path / "model.onnx",
            parameters=PARAMETERS[DETECTOR],
            extra_files=[tmp_path / "elsewhere" / "data"],
            **arguments,
        )


@pytest.mark.parametrize(
    "values",
    [
        {"format": 3},
        {"format": "2"},
        {"model": "weather"},
        {"model": None},
        {"passport": []},
        {"passport": {"created_at": "yesterday"}},
        {"passport": {"created_at": "2026-11-22T20:00:00"}},
        {"passport": {"versions": "2.15"}},
        {"parameters": {"image_size": 320}},
        {"size_bytes": "many"},
        {"extra_files": [1]},
        {"file": 7},
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_in_one_line(tmp_path, values):
    write(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(ArtifactError, match="export the model again") as error:
        load_artifact(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x80", b"[" * 100_000, b"null", b"3"])
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path, content):
    write(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a manifest of ours") as error:
        load_artifact(tmp_path)
    assert "\n" not in str(error.value)


def test_an_enormous_manifest_is_not_read(tmp_path):
    write(tmp_path)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(5 * 2**20)
    with pytest.raises(ArtifactError, match="that is no manifest"):
        load_artifact(tmp_path)


def test_a_refused_engine_never_reaches_the_runtime(tmp_path, monkeypatch):
    """The check is what stands between a file and its deserialisation."""
    write(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"enginE")
    opened = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *a, **k: opened.append(a))
    with pytest.raises(ArtifactError, match="damaged"):
        OnnxRuntimeModel(load_artifact(tmp_path))
    assert opened == []


def old_manifest(folder):
    artifact(folder, DETECTOR)
    path = folder / DETECTOR / "manifest.json"
    content = json.loads(path.read_text())
    for key in ("size_bytes", "extra_files", "passport"):
        del content[key]
    provenance = {
        "source": {"sha256": "ab"},
        "exporter": {"name": "torch.onnx dynamo", "half_weights": True},
        "commit": "c0ffee",
        "parity": {"boxes": {"max_abs_error": 1e-5}},
    }
    path.write_text(json.dumps({**content, "format": 1, "provenance": provenance}))
    return folder / DETECTOR


def test_a_manifest_of_the_first_format_is_read_and_upgraded_in_place(tmp_path):
    folder = old_manifest(tmp_path)
    before = load_artifact(folder)
    assert before.passport.precision == "fp32/fp16 weights"
    assert before.passport.created is None
    assert upgrade_manifest(folder, created_at="2026-11-22T12:00:00+00:00")
    after = load_artifact(folder)
    assert after.sha256 == before.sha256
    assert after.passport.parity == before.passport.parity
    assert after.passport.created.hour == 12
    assert json.loads((folder / "manifest.json").read_text())["format"] == 2
    assert not upgrade_manifest(folder)
    assert load_artifact(folder) == after


def test_an_upgrade_does_not_bless_a_damaged_engine(tmp_path):
    folder = old_manifest(tmp_path)
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="damaged"):
        upgrade_manifest(folder)
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("versions", "capability", "reason"),
    [
        ({"tensorrt": "11.4.0.106"}, "8.9", None),
        ({"tensorrt": "11.4.0.200"}, "9.0", None),
        ({"tensorrt": "11.5.0"}, "8.9", "was built with tensorrt 11.4.0.106, this machine has"),
        ({}, "8.9", "needs tensorrt 11.4.0.106, which is not installed"),
        ({"tensorrt": "11.4.0"}, "7.5", "this machine has compute capability 7.5"),
        ({"tensorrt": "11.4.0"}, None, "this machine has no GPU"),
    ],
)
def test_an_engine_for_another_machine_is_refused_before_it_is_opened(
    tmp_path, versions, capability, reason
):
    built = write(
        tmp_path,
        engine="tensorrt",
        versions={"tensorrt": "11.4.0.106"},
        compute_capabilities=("8.9", "9.0"),
    )
    refusal = refusal_here(built, versions=versions, compute_capability=capability)
    assert refusal is None if reason is None else reason in refusal


def test_an_engine_that_is_not_tied_to_a_gpu_runs_anywhere(tmp_path):
    assert refusal_here(write(tmp_path), versions={}, compute_capability=None) is None


def test_changes_between_versions_are_named(tmp_path):
    old = write(tmp_path / "old", b"old")
    new = write(
        tmp_path / "new",
        b"new",
        parameters=DetectorParameters(
            image_size=320, num_candidates=50, class_names=("cat", "otter")
        ),
        source={"sha256": "cd34"},
        precision="fp16",
        task_metrics={"ap50": 0.751},
    )
    assert passport_changes(new, old) == (
        "class otter added",
        "class dog dropped",
        "weights",
        "precision fp32 -> fp16",
        "AP50 74.3 -> 75.1",
    )
    assert passport_changes(old, old) == ()
