import importlib.util

import pytest

from tests.integration.tiny_engines import write_tiny_artifacts
from weaksam_rt.client import WeakSamClient
from weaksam_rt.config import PipelineConfig
from weaksam_rt.model_repository import build_model_repository
from weaksam_rt.proposals import ProposalConfig
from weaksam_rt.server import EmbeddedServer

CONFIG = PipelineConfig(proposals=ProposalConfig(points_per_side=4))


@pytest.fixture(scope="session", autouse=True)
def _needs_a_server():
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("nvidia-pytriton is not installed: no Triton server here")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    return write_tiny_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def server(artifacts, config, tmp_path_factory):
    repository = tmp_path_factory.mktemp("served") / "models"
    build_model_repository(artifacts, repository, profile="embedded", config=config)
    with EmbeddedServer(repository) as running:
        yield running


@pytest.fixture
def client(server):
    with WeakSamClient(server.grpc_address) as connected:
        yield connected
