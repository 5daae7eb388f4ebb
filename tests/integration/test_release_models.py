"""Classifier and SAM released into a served repository, through all checks, while clients ask."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from export.engines.base import EngineConfig
from export.engines.build import build_engine
from export.exportable import Exportable
from export.release import ReleaseRules, release
from export.verify import FP32
from tests.integration.pictures import BOXES, PNG, labelled_scenes
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.client import WeakSamClient
from weaksam_rt.contracts import DETECTOR, SAM_IMAGE_ENCODER, SAM_MASK_DECODER, VIT_CLASSIFIER
from weaksam_rt.errors import ArtifactError, ReleaseError, WeakSamError
from weaksam_rt.live_repository import (
    engine_versions_needed,
    live_version,
    live_versions,
    version_folders,
)
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import JOURNAL_NAME, build_model_repository
from weaksam_rt.releases import publish, recover, roll_back
from weaksam_rt.repository_check import check_model_repository
from weaksam_rt.server import EmbeddedServer, ServerOptions

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SAM = (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)
PIPELINES = ("weaksam_detect", "weaksam_propose", "weaksam_segment")
RULES = ReleaseRules(watch_s=0.5, num_probes=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes with boxes, tags and masks."""
    return labelled_scenes(tmp_path_factory.mktemp("coco"), tuple(BOXES))


@pytest.fixture(scope="module")
def live(artifacts, config, tmp_path_factory):
    repository = tmp_path_factory.mktemp("live") / "models"
    build_model_repository(artifacts, repository, profile="embedded", config=config)
    with (
        EmbeddedServer(repository, ServerOptions(load_models=("*",))) as server,
        ModelControl(server.grpc_address) as control,
    ):
        yield repository, server, control


@pytest.fixture(scope="module")
def tiny(artifacts):
    return {artifact.model: artifact for artifact in artifacts}


def exportables(tiny, models):
    return [
        Exportable(
            model=model,
            module=nn.Identity(),
            parameters=tiny[model].parameters,
            inputs=(),
            tolerance=FP32,
            source={"sha256": "of one checkpoint"},
        )
        for model in models
    ]


def copied(tiny):
    """An export that gives the engine which is served already, under another commit."""

    def export(exportable, folder, half):
        del half
        folder.mkdir(parents=True)
        original = tiny[exportable.model]
        (folder / "model.onnx").write_bytes(original.path.read_bytes())
        return write_manifest(
            folder / "model.onnx",
            model=original.model,
            engine=original.engine,
            parameters=original.parameters,
            provenance={"source": exportable.source, "commit": "another"},
        )

    return export


class Load:
    """A client that asks every pipeline without pause."""

    def __init__(self, address):
        self.num_answers, self.errors = 0, []
        self._client, self._stop = WeakSamClient(address), threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        calls = (
            lambda: self._client.detect(PNG, with_masks=True),
            lambda: self._client.propose(PNG),
            lambda: self._client.segment(PNG, boxes=np.array([[10, 10, 60, 60]], np.float32)),
        )
        while not self._stop.is_set():
            for call in calls:
                try:
                    call()
                    self.num_answers += 1
                except WeakSamError as error:
                    self.errors.append(error)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self._client.close()


def test_a_classifier_and_a_sam_are_released_and_go_back_without_a_failed_request(
    live, tiny, folder
):
    repository, server, control = live
    with Load(server.grpc_address) as load:
        tags = release(
            repository, exportables(tiny, [VIT_CLASSIFIER]), folder, control,
            export=copied(tiny), method="export", rules=RULES,
        )  # fmt: skip
        assert tags.metrics == {"tag_ap": 1.0}
        assert set(tags.report.release.pipelines) == {"weaksam_propose"}
        masks = release(
            repository, exportables(tiny, SAM), folder, control,
            export=copied(tiny), method="export", rules=RULES,
        )  # fmt: skip
        version = masks.report.release.version
        assert set(masks.metrics) == {"mask_iou_point", "mask_iou_box"}
        assert masks.metrics["mask_iou_box"] > 0.8
        assert set(masks.report.release.pipelines) == set(PIPELINES)
        assert {p: live_version(repository, p) for p in PIPELINES} == dict.fromkeys(
            PIPELINES, version
        )
        for model in SAM:
            assert live_versions(repository, model) == (version,)
            assert control.ready_versions(model) == {version}
        with pytest.raises(ReleaseError, match=r"roll back the later release of sam_"):
            roll_back(repository, VIT_CLASSIFIER, control)
        roll_back(repository, SAM_MASK_DECODER, control)
        back = {"weaksam_detect": 1, "weaksam_propose": version - 1, "weaksam_segment": 1}
        assert {p: live_version(repository, p) for p in PIPELINES} == back
        for model in SAM:
            assert engine_versions_needed(repository, model) == live_versions(repository, model)
            assert control.ready_versions(model) == {1}
        roll_back(repository, VIT_CLASSIFIER, control)
        assert live_version(repository, "weaksam_propose") == 1
    assert load.errors == []
    assert load.num_answers > 10
    assert check_model_repository(repository) == []


def test_an_engine_of_lower_precision_is_released_in_that_precision(tiny, folder, config, tmp_path):
    half = build_engine(
        tiny[DETECTOR], tmp_path / "half", engine="onnxruntime",
        config=EngineConfig(precision="fp16"),
    )  # fmt: skip
    repository = tmp_path / "models"
    build_model_repository([half], repository, profile="embedded", config=config)
    options = ServerOptions(load_models=("*",))
    with (
        EmbeddedServer(repository, options) as server,
        ModelControl(server.grpc_address) as control,
    ):
        summary = release(
            repository, exportables(tiny, [DETECTOR]), folder, control,
            export=copied(tiny), method="auto", rules=RULES,
        )  # fmt: skip
        with WeakSamClient(server.grpc_address) as client:
            answer = client.detect(PNG)
    served = load_artifact(repository / DETECTOR / str(summary.report.release.version))
    assert summary.methods == {DETECTOR: "build"}
    assert served.passport.precision == "fp16"
    assert served.passport.parity["all outputs"]["distance"] < 0.01
    assert len(answer.detections.boxes) == len(BOXES)


def test_a_half_a_sam_changes_nothing(live, tiny):
    repository, _, control = live
    for artifacts in ([tiny[SAM_IMAGE_ENCODER]], [tiny[SAM_MASK_DECODER], tiny[DETECTOR]]):
        with pytest.raises(ArtifactError, match=r"is half a SAM: release sam_image_encoder and"):
            publish(
                repository, artifacts, control, check_engine=lambda v: None, watch=lambda v: None
            )
    assert not (repository / JOURNAL_NAME).exists()


_KILLED = """
import os, sys
from pathlib import Path
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.model_control import ModelControl
from weaksam_rt.releases import publish
repository, address, last, *folders = sys.argv[1:]

def on_step(step):
    if step == last:
        os.kill(os.getpid(), 9)

with ModelControl(address) as control:
    publish(Path(repository), [load_artifact(Path(f)) for f in folders], control,
            check_engine=lambda v: None, watch=lambda v: None, on_step=on_step)
"""


@pytest.mark.parametrize("step", ["write engine", "load engine", "switch", "commit"])
def test_a_killed_release_of_a_pair_is_undone_or_done_for_both(live, tiny, step):
    repository, server, control = live
    before = {p: live_version(repository, p) for p in PIPELINES}
    folders = [tiny[model].path.parent for model in SAM]
    arguments = map(str, (repository, server.grpc_address, step, *folders))
    run = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        cwd=Path(__file__).parents[2], env=os.environ, check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL
    assert check_model_repository(repository) == []
    done = recover(repository, control)
    newest = max(version_folders(repository, SAM_IMAGE_ENCODER))
    expected = before if step != "commit" else dict.fromkeys(PIPELINES, newest)
    assert ("finished" if step == "commit" else "undid") in done
    assert {p: live_version(repository, p) for p in PIPELINES} == expected
    for model in SAM:
        assert control.ready_versions(model) == set(engine_versions_needed(repository, model))
        artifact = load_artifact(repository / model / str(live_versions(repository, model)[0]))
        assert artifact.sha256 == tiny[model].sha256
    with WeakSamClient(server.grpc_address) as client:
        assert client.propose(PNG).version == expected["weaksam_propose"]
    assert check_model_repository(repository) == []
