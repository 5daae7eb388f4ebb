"""Releases beside a server that is too slow or gone: what is undone, and what waits."""

import pytest

from tests.unit.weaksam_rt.repositories import PARAMETERS, build, write_artifacts
from weaksam_rt.artifacts import write_manifest
from weaksam_rt.contracts import SAM_IMAGE_ENCODER, SAM_MASK_DECODER
from weaksam_rt.errors import InferenceTimeoutError, ReleaseError, ServerUnavailableError
from weaksam_rt.live_repository import (
    live_version,
    live_versions,
    read_config,
    version_folders,
    versions_in_config,
)
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import JOURNAL_NAME
from weaksam_rt.releases import publish, recover
from weaksam_rt.repository_check import check_model_repository

SAM = (SAM_IMAGE_ENCODER, SAM_MASK_DECODER)
PIPELINES = ("weaksam_detect", "weaksam_propose", "weaksam_segment")


class Server(ModelControl):
    """Serves what it is told, but for loads that take too long: these it does later or never."""

    def __init__(self, repository):
        self.address = "here:8001"
        self._repository = repository
        self.ready = {m: set(live_versions(repository, m)) for m in (*SAM, *PIPELINES)}
        self.too_slow = lambda model, versions: False

    def load(self, model, config_text=None):
        versions = versions_in_config(config_text or read_config(self._repository, model))
        if self.too_slow(model, versions):
            raise InferenceTimeoutError(f"did not load {model} within 120 s")
        self.ready[model] = set(versions)

    def ready_versions(self, model):
        return self.ready[model]

    def wanted_versions(self, model):
        return self.ready[model]

    def wait_until_gone(self, model, version, timeout_s=60.0):
        if version in self.ready[model]:
            raise ServerUnavailableError(f"{model} version {version} is still loaded")


@pytest.fixture
def repository(tmp_path):
    build(write_artifacts(tmp_path / "artifacts"), tmp_path / "r")
    return tmp_path / "r"


@pytest.fixture
def sam(tmp_path):
    """Both halves of another SAM."""
    made = []
    for model in SAM:
        path = tmp_path / "new" / model / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"another " + model.encode())
        made.append(
            write_manifest(
                path, model=model, engine="onnxruntime", parameters=PARAMETERS[model],
                provenance={},
            )
        )  # fmt: skip
    return made


def nothing(version):
    del version


def failing(version):
    raise InferenceTimeoutError("a watched request took too long")


def is_as_before(repository, server):
    return (
        set(map(frozenset, server.ready.values())) == {frozenset({1})}
        and not (repository / JOURNAL_NAME).exists()
        and all(version_folders(repository, model) == [1] for model in server.ready)
        and check_model_repository(repository) == []
    )


def test_a_failed_watch_is_undone(repository, sam):
    server = Server(repository)
    with pytest.raises(ReleaseError, match="took too long; version 1 is served as before"):
        publish(repository, sam, server, check_engine=nothing, watch=failing)
    assert is_as_before(repository, server)


def test_a_pipeline_that_is_not_back_in_time_does_not_keep_the_others(repository, sam):
    server = Server(repository)
    server.too_slow = lambda model, versions: (model, versions) == ("weaksam_detect", (1,))
    with pytest.raises(ReleaseError) as failed:
        publish(repository, sam, server, check_engine=nothing, watch=failing)
    text = str(failed.value)
    assert "version 2 was not released: a watched request took too long; the server could" in text
    assert "back to version 1 yet (did not load weaksam_detect within 120 s): `weaksam s" in text
    assert {pipeline: server.ready[pipeline] for pipeline in PIPELINES} == {
        "weaksam_detect": {2}, "weaksam_propose": {1}, "weaksam_segment": {1},
    }  # fmt: skip
    assert server.ready[SAM_MASK_DECODER] == {1, 2}  # weaksam_detect still calls the new one
    assert all(live_versions(repository, model) == (1,) for model in server.ready)
    assert version_folders(repository, SAM_IMAGE_ENCODER) == [1, 2]
    with pytest.raises(ReleaseError, match=r"could not be undone yet: did not load weaksam_detect"):
        publish(repository, sam, server, check_engine=nothing, watch=nothing)
    server.too_slow = lambda model, versions: False
    assert "undid the interrupted release of version 2" in recover(repository, server)
    assert is_as_before(repository, server)


def test_an_engine_that_is_too_slow_to_settle_keeps_the_journal(repository, sam):
    server = Server(repository)
    calls = []
    server.too_slow = lambda model, versions: (
        model in SAM
        and calls.append(model) is None
        and (
            versions == (1,) and len(calls) > 2  # not the first load of each, which changes nothing
        )
    )
    with pytest.raises(ReleaseError, match=r"brought back to version 1 yet \(did not load sam_"):
        publish(repository, sam, server, check_engine=failing, watch=nothing)
    assert (repository / JOURNAL_NAME).exists()
    assert recover(repository, None).startswith("undid")  # no server runs any more
    assert not (repository / JOURNAL_NAME).exists()
    assert version_folders(repository, SAM_IMAGE_ENCODER) == [1]


def test_after_the_commit_a_slow_server_does_not_undo(repository, sam):
    server = Server(repository)
    server.too_slow = lambda model, versions: versions == (2,) and model in SAM
    with pytest.raises(ReleaseError, match=r"version 2 is live, and .* yet: did not load sam_"):
        publish(repository, sam, server, check_engine=nothing, watch=nothing)
    assert (repository / JOURNAL_NAME).exists()
    server.too_slow = lambda model, versions: False
    assert "finished the interrupted release of version 2" in recover(repository, server)
    assert set(map(frozenset, server.ready.values())) == {frozenset({2})}
    assert live_version(repository, "weaksam_segment") == 2
    assert not (repository / JOURNAL_NAME).exists()
