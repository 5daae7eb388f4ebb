"""Releases into a repository that a real server serves: what clients see, what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.integration.pictures import PNG
from tests.integration.tiny_engines import SCORES
from weaksam_rt.artifacts import load_artifact, write_manifest
from weaksam_rt.cli import main
from weaksam_rt.client import WeakSamClient
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.errors import ReleaseError, ServerUnavailableError, WeakSamError
from weaksam_rt.live_repository import (
    live_version,
    live_versions,
    pipeline_file,
    version_folders,
)
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import JOURNAL_NAME, build_model_repository
from weaksam_rt.releases import publish, recover, roll_back
from weaksam_rt.repository_check import check_model_repository
from weaksam_rt.server import EmbeddedServer, ServerOptions

pytestmark = pytest.mark.integration

DETECT = "weaksam_detect"
OLD, NEW = ("red", "green", "blue"), ("ruby", "emerald", "sapphire")
"""Class names of two detectors."""
TOP = {OLD: 0.9, NEW: 0.6}
"""What each gives to the red thing: an answer shows its engine as well as its names."""


def nothing(version):
    del version


@pytest.fixture(scope="module")
def old(artifacts):
    return next(a for a in artifacts if a.model == DETECTOR)


@pytest.fixture(scope="module")
def new(old, tmp_path_factory):
    """The tiny detector with other class names and other scores."""
    path = tmp_path_factory.mktemp("new") / old.path.name
    model = onnx.load(old.path)
    scores = np.array([list(SCORES.values())], np.float32)
    (constant,) = [
        tensor
        for tensor in model.graph.initializer
        if np.array_equal(numpy_helper.to_array(tensor), scores)
    ]
    other = scores * np.float32(TOP[NEW] / TOP[OLD])
    constant.CopyFrom(numpy_helper.from_array(other, constant.name))
    onnx.save(model, path)
    return write_manifest(
        path,
        model=old.model,
        engine=old.engine,
        parameters=replace(old.parameters, class_names=NEW),
        provenance={"source": {"sha256": "new"}},
    )


@pytest.fixture(scope="module")
def live(old, config, tmp_path_factory):
    """A server with its repository; the tests of this module release into it one after another."""
    repository = tmp_path_factory.mktemp("live") / "models"
    build_model_repository([old], repository, profile="embedded", config=config)
    options = ServerOptions(load_models=("*",))
    with (
        EmbeddedServer(repository, options) as server,
        ModelControl(server.grpc_address) as control,
    ):
        yield repository, server, control


class Load:
    """Clients that ask without pause and remember every answer."""

    def __init__(self, address, num_clients=2):
        self.answers, self.errors = [], []
        self._stop = threading.Event()
        self._client = WeakSamClient(address)
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self):
        while not self._stop.is_set():
            try:
                result = self._client.detect(PNG)
                score = round(float(result.detections.scores[0]), 4)
                self.answers.append((result.version, result.label_names, score))
            except WeakSamError as error:
                self.errors.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


def answer_of(class_names, version):
    names = class_names[version]
    return version, (names[0], names[2]), TOP[names]  # the picture has no green


def test_under_load_no_request_fails_and_every_answer_is_of_one_version(live, old, new):
    """Three releases that change engine and class names, and one way back that a check forces."""
    repository, server, control = live
    first = live_version(repository, DETECT)
    names = {first: OLD}

    def no_good(version):
        raise ReleaseError("the new version does not please")

    with Load(server.grpc_address) as load:
        for artifact, class_names in ((new, NEW), (old, OLD), (new, NEW)):
            report = publish(repository, [artifact], control, check_engine=nothing, watch=nothing)
            names[report.release.version] = class_names
        last = report.release.version
        with pytest.raises(ReleaseError, match=rf"does not please; version {last} is served"):
            publish(repository, [old], control, check_engine=nothing, watch=no_good)
        names[last + 1] = OLD
        time.sleep(0.5)
    assert load.errors == []
    seen = Counter(version for version, *_ in load.answers)
    assert set(seen) >= {first, first + 1, first + 2, last}
    assert all(answer == answer_of(names, answer[0]) for answer in load.answers)
    assert load.answers[-1][0] == last
    assert check_model_repository(repository) == []
    assert live_versions(repository, DETECTOR) == (last,)
    assert control.ready_versions(DETECTOR) == {last}
    assert last + 1 not in version_folders(repository, DETECT)


def test_a_rollback_serves_the_version_before_and_another_leads_on(live, old, new):
    repository, server, control = live
    before = live_version(repository, DETECT)
    released = publish(repository, [old], control, check_engine=nothing, watch=nothing)
    roll_back(repository, DETECTOR, control)
    with WeakSamClient(server.grpc_address) as client:
        result = client.detect(PNG)
    assert (result.version, result.label_names) == (before, (NEW[0], NEW[2]))
    assert live_version(repository, DETECT) == before
    assert (repository / DETECTOR / "config.pbtxt").read_text().count("labels.") == 1
    roll_back(repository, DETECTOR, control, to=released.release.version)
    with WeakSamClient(server.grpc_address) as client:
        assert client.detect(PNG).label_names == (OLD[0], OLD[2])
    with pytest.raises(ReleaseError, match="cannot be rolled back to version 77"):
        roll_back(repository, DETECTOR, control, to=77)
    assert check_model_repository(repository) == []


def test_an_engine_that_does_not_load_changes_nothing(live, old, tmp_path):
    repository, server, control = live
    before = live_version(repository, DETECT)
    (tmp_path / "model.onnx").write_bytes(b"no engine, and its manifest says so")
    broken = write_manifest(
        tmp_path / "model.onnx",
        model=DETECTOR,
        engine="onnxruntime",
        parameters=old.parameters,
        provenance={},
    )
    with pytest.raises(ReleaseError, match=rf"ONNX Runtime cannot open.*version {before} is"):
        publish(repository, [broken], control, check_engine=nothing, watch=nothing)
    with WeakSamClient(server.grpc_address) as client:
        assert client.detect(PNG).version == before
    assert check_model_repository(repository) == []
    assert not (repository / JOURNAL_NAME).exists()


def test_the_list_of_models_says_what_changed(live, old, new, capsys):
    repository, server, control = live
    report = publish(repository, [old], control, check_engine=nothing, watch=nothing)
    report = publish(repository, [new], control, check_engine=nothing, watch=nothing)
    version = report.release.version
    with WeakSamClient(server.grpc_address) as client:
        served = {(m.name, int(m.version)): m for m in client.models() if m.is_ready}
    assert set(served) == {(DETECTOR, version), (DETECT, version)}
    summary = served[DETECTOR, version].summary
    assert {"class ruby added", "class red dropped"} <= set(summary.changes)
    assert summary.engine == "onnxruntime"
    listed = json.loads(run_cli(capsys, "models", "--json", "--url", server.grpc_address))
    assert {m["version"] for m in listed if m["is_ready"]} == {str(version)}
    table = run_cli(capsys, "models", repository)
    assert "live" in table
    assert "kept" in table
    on_disk = json.loads(run_cli(capsys, "models", repository, "--json"))
    assert [m["version"] for m in on_disk if m["is_live"]] == [version]
    assert "class ruby added" in on_disk[-1]["changes"]


def run_cli(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def observed(live, new):
    """One release with the same class names as the live version, and what was seen on its way."""
    repository, server, control = live
    if pipeline_file(repository, DETECT).models.detector.class_names != NEW:
        publish(repository, [new], control, check_engine=nothing, watch=nothing)
    seen = {"steps": [], "before": engines_started(server)}

    def try_another(version):
        del version
        with pytest.raises(ReleaseError) as refused:
            publish(repository, [new], control, check_engine=nothing, watch=nothing)
        seen["second"] = str(refused.value)
        seen["recovered"] = recover(repository, control)

    publish(repository, [new], control, check_engine=try_another, watch=nothing, keep=2,
        on_step=seen["steps"].append,
    )  # fmt: skip
    return {**seen, "after": engines_started(server), "repository": repository}


def engines_started(server):
    return server.log_tail(100_000).count("ModelInstanceInitialize: detector_")


def test_a_release_starts_the_new_engine_and_keeps_the_live_one(observed):
    assert observed["after"] == observed["before"] + 1


def test_two_releases_at_a_time_are_refused_and_a_running_one_is_not_undone(observed):
    assert "is under way" in observed["second"]
    assert observed["recovered"] is None


def test_only_as_many_versions_stay_as_asked_for(observed):
    for model in (DETECT, DETECTOR):
        assert len(version_folders(observed["repository"], model)) == 2


def test_the_list_of_steps_is_complete(observed):
    assert tuple(observed["steps"]) == (*STEPS, *STEPS_AFTER_COMMIT)


STEPS = (
    "journal", "write engine", "write pipelines", "allow engine", "load engine", "check engine",
    "switch", "watch",
)  # fmt: skip
STEPS_AFTER_COMMIT = ("commit", "history", "unload engine", "prune")

_KILLED = """
import os, sys
from pathlib import Path
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.model_control import ModelControl
from weaksam_rt.releases import publish
repository, artifact, address, last = sys.argv[1:]

def on_step(step):
    if step == last:
        os.kill(os.getpid(), 9)

with ModelControl(address) as control:
    publish(Path(repository), [load_artifact(Path(artifact))], control, check_engine=lambda v: None,
            watch=lambda v: None, on_step=on_step)
"""


def release_killed_after(step, repository, artifact, address):
    command = [sys.executable, "-c", _KILLED, repository, artifact.path.parent, address, step]
    run = subprocess.run(
        [str(part) for part in command], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr


_QUICK = {"write engine", "load engine", "watch", "unload engine"}
"""One of each kind of step; the others take the same ways and as long, most of it waiting."""


@pytest.mark.parametrize(
    "step",
    [
        step if step in _QUICK else pytest.param(step, marks=pytest.mark.slow)
        for step in (*STEPS, *STEPS_AFTER_COMMIT)
    ],
)
def test_a_release_killed_at_any_step_is_undone_or_done(live, new, step):
    """Until the commit the disk says the old version, so that a restarted server serves it; the
    running one is told back by whoever finds the journal.
    """
    repository, server, control = live
    before = live_version(repository, DETECT)
    release_killed_after(step, repository, new, server.grpc_address)
    is_done = step in STEPS_AFTER_COMMIT
    expected = before + 1 if is_done else before
    assert check_model_repository(repository) == []
    assert live_version(repository, DETECT) == expected
    with WeakSamClient(server.grpc_address) as client:
        assert client.detect(PNG).version in ({before, before + 1} if step == "switch" or
                                              step == "watch" else {expected})  # fmt: skip
        done = recover(repository, control)
        assert ("finished" if is_done else "undid") in done
        assert client.detect(PNG).version == expected
    assert control.ready_versions(DETECT) == {expected}
    assert control.ready_versions(DETECTOR) == set(live_versions(repository, DETECTOR))
    assert check_model_repository(repository) == []
    assert recover(repository, control) is None
    assert not list(repository.glob("*/.*"))
    if not is_done:
        assert version_folders(repository, DETECTOR)[-1] == before
    else:  # leave one version number for the next case
        assert version_folders(repository, DETECTOR)[-1] == before + 1


def test_a_server_of_another_repository_is_refused(server, live, new):
    repository = live[0]
    with (
        ModelControl(server.grpc_address) as control,
        pytest.raises(ReleaseError, match=r"serves weaksam_detect in versions \[1\]"),
    ):
        publish(repository, [new], control, check_engine=nothing, watch=nothing)
    assert not (repository / JOURNAL_NAME).exists()


def test_serve_undoes_a_release_that_was_killed_before_its_start_and_under_its_eyes(
    live, new, tmp_path
):
    """The old version is served again after a restart, and without one."""
    before = live_version(live[0], DETECT)
    release_killed_after("watch", live[0], new, live[1].grpc_address)
    repository = tmp_path / "models"
    shutil.copytree(live[0], repository)  # as the disk was when all processes died
    recover(live[0], live[2])
    assert live_version(repository, DETECT) == before
    command = [sys.executable, "-m", "weaksam_rt.cli", "serve", repository, "--allow-releases"]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [*map(str, command), *ports], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        address = process.stdout.readline().split("gRPC ")[1].split(",")[0]
        assert not (repository / JOURNAL_NAME).exists()
        with WeakSamClient(address) as client:
            assert client.detect(PNG).version == before
            release_killed_after("watch", repository, new, address)
            deadline = time.monotonic() + 20
            while (repository / JOURNAL_NAME).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert client.detect(PNG).version == before
        assert before + 1 not in version_folders(repository, DETECT)
        assert check_model_repository(repository) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_server_that_fixes_its_models_says_how_to_allow_releases(
    server, artifacts, config, tmp_path
):
    repository = tmp_path / "models"
    build_model_repository(artifacts, repository, profile="embedded", config=config)
    artifact = load_artifact(repository / DETECTOR / "1")
    with (
        ModelControl(server.grpc_address) as control,
        pytest.raises(WeakSamError, match="--allow-releases"),
    ):
        publish(repository, [artifact], control, check_engine=nothing, watch=nothing)
    with (
        ModelControl("127.0.0.1:9") as nobody,
        pytest.raises(ServerUnavailableError, match="no server answers"),
    ):
        publish(repository, [artifact], nobody, check_engine=nothing, watch=nothing)
    assert version_folders(repository, DETECTOR) == [1]
