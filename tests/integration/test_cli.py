"""The ``weaksam`` command as a user calls it, against a real server."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.integration.pictures import BOXES, JPEG, PNG, SIZE, rotated_by_exif
from weaksam_rt.cli import main

pytestmark = pytest.mark.integration


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.jpg").write_bytes(JPEG)
    (folder / "notes.txt").write_text("not taken from a folder")
    return folder


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def _image_size(path):
    with Image.open(path) as image:
        return image.height, image.width


def test_detect_prints_a_table_and_writes_pictures_and_coco(server, photos, tmp_path, capsys):
    output = tmp_path / "out"
    code, out, _ = _run(
        capsys, "detect", photos, "--output", output, "--masks", "--url", server.grpc_address
    )
    assert code == 0
    for name in BOXES:
        assert name in out
    assert sorted(p.name for p in output.iterdir()) == ["a.jpg", "b.jpg", "detections.json"]
    assert _image_size(output / "a.jpg") == SIZE
    coco = COCO(str(output / "detections.json"))
    capsys.readouterr()
    assert len(coco.getImgIds()) == 2
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == 2 * len(BOXES)
    assert all(coco.annToMask(a).sum() > 0 for a in annotations)


def test_one_bad_file_fails_alone_and_is_told_in_the_exit_code(server, photos, capsys):
    (photos / "c.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    code, out, _ = _run(capsys, "detect", photos, "--json", "--url", server.grpc_address)
    assert code == 1
    assert len(json.loads(out)["images"]) == 2


def test_segment_marks_what_a_box_holds(server, photos, tmp_path, capsys):
    box = [str(v) for v in next(iter(BOXES.values()))]
    code, out, _ = _run(
        capsys, "segment", photos / "a.png", "--points", "30", "30", "--boxes", *box,
        "--json", "--output", tmp_path / "out", "--url", server.grpc_address,
    )  # fmt: skip
    assert code == 0
    assert [c["name"] for c in json.loads(out)["categories"]] == ["points", "box 1"]
    assert (tmp_path / "out" / "a.jpg").is_file()


def test_propose_names_sources_and_tags(server, photos, tmp_path, capsys):
    tag = next(iter(BOXES))
    code, out, _ = _run(
        capsys, "propose", photos / "a.png", "--tags", tag, "--json",
        "--output", tmp_path, "--url", server.grpc_address,
    )  # fmt: skip
    assert code == 0
    sources = {c["name"] for c in json.loads(out)["categories"]}
    assert sources <= {"grid", "coarse", "fine", "cross"}
    assert "grid" in sources
    assert (tmp_path / "proposals.json").is_file()


def test_an_unknown_tag_lists_the_known_ones(server, photos, capsys):
    code, out, _ = _run(
        capsys, "propose", photos / "a.png", "--tags", "unicorn", "--url", server.grpc_address
    )
    assert code == 1
    assert "unicorn" in " ".join(out.split())


def test_models_lists_what_is_served(server, capsys):
    code, out, _ = _run(capsys, "models", "--json", "--url", server.grpc_address)
    assert code == 0
    served = {model["name"]: model["is_ready"] for model in json.loads(out)}
    assert served["weaksam_detect"]
    assert len(served) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect", "absent.jpg"], "absent.jpg does not exist"),
        (["models", "--url", "127.0.0.1:9", "--timeout-s", "1"], "ServerUnavailableError"),
        (["serve", "docs"], "ArtifactError"),
        (["check", "docs"], None),
    ],
)
def test_errors_are_one_readable_line(arguments, message, capsys):
    code, out, err = _run(capsys, *arguments)
    assert code == 1
    assert "Traceback" not in out + err
    if message is not None:
        assert message in " ".join(err.split())


def test_serve_builds_starts_answers_and_stops_on_sigterm(artifacts, tmp_path):
    models = tmp_path / "models"
    for artifact in artifacts:
        (models / artifact.model).mkdir(parents=True)
        for path in artifact.path.parent.iterdir():
            (models / artifact.model / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "weaksam_rt.cli", "serve", str(models)]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *ports], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = process.stdout.readline()
        assert "ready: gRPC 127.0.0.1:" in line
        url = line.split(", ")[1].strip()
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_pictures_are_drawn_upright(server, tmp_path, capsys):
    (tmp_path / "turned.jpg").write_bytes(rotated_by_exif())
    code, _, _ = _run(
        capsys, "detect", tmp_path / "turned.jpg", "--output", tmp_path / "out",
        "--url", server.grpc_address,
    )  # fmt: skip
    assert code == 0
    assert _image_size(tmp_path / "out" / "turned.jpg") == SIZE
