"""Starting, watching, encrypting and stopping the embedded server."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export.engines.base import EngineConfig
from export.engines.build import build_engine
from tests.integration.pictures import PNG
from tests.unit.export.toy_models import export_toy_detector
from weaksam_rt.artifacts import write_manifest
from weaksam_rt.client import ClientConfig, ClientTls, WeakSamClient
from weaksam_rt.contracts import DETECTOR
from weaksam_rt.errors import ContractError, ServerUnavailableError, WeakSamError
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import build_model_repository
from weaksam_rt.server import EmbeddedServer, ServerOptions, ServerTls

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def detector(artifacts):
    return next(artifact for artifact in artifacts if artifact.model == DETECTOR)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and its key, as files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=test"
    subprocess.run(
        [openssl, *command.split(), "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture(scope="module")
def secure_server(detector, config, certificate, tmp_path_factory):
    """Only detection, encrypted, with a queue of one and models that can be unloaded."""
    repository = tmp_path_factory.mktemp("secure") / "models"
    build_model_repository(
        [detector],
        repository,
        profile="embedded",
        config=config,
        options=ServingOptions(max_queue_size=1),
    )
    cert, key = certificate
    options = ServerOptions(
        tls=ServerTls(certificate=cert, key=key), load_models=("detector", "weaksam_detect")
    )
    with EmbeddedServer(repository, options) as running:
        yield running


@pytest.fixture
def secure_config(certificate):
    return ClientConfig(tls=ClientTls(root_certificates=certificate[0]), max_attempts=1)


def test_an_encrypted_connection_works_and_a_plain_one_does_not(secure_server, secure_config):
    with WeakSamClient(secure_server.grpc_address, secure_config) as client:
        assert client.detect(PNG).label_names == ("red", "blue")
    with (
        WeakSamClient(secure_server.grpc_address, ClientConfig(max_attempts=1)) as plain,
        pytest.raises(ServerUnavailableError, match="TLS"),
    ):
        plain.detect(PNG)


def test_without_sam_masks_are_refused_and_boxes_are_not(secure_server, secure_config):
    with WeakSamClient(secure_server.grpc_address, secure_config) as client:
        with pytest.raises(ContractError, match=r"needs SAM .* not served here"):
            client.detect(PNG, with_masks=True)
        assert len(client.detect(PNG)) == 2


def test_a_pipeline_that_is_not_served_is_said_to_be_missing(secure_server, secure_config):
    with WeakSamClient(secure_server.grpc_address, secure_config) as client:
        with pytest.raises(ServerUnavailableError, match=r"weaksam_propose.*weaksam models"):
            client.propose(PNG)
        assert [model.name for model in client.models()] == ["detector", "weaksam_detect"]


def test_an_overloaded_queue_refuses_at_once_and_serves_the_rest(secure_server, secure_config):
    with (
        WeakSamClient(secure_server.grpc_address, secure_config) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        outcomes = list(pool.map(lambda image: _result_or_error(client, image), [PNG] * 96))
    errors = [outcome for outcome in outcomes if isinstance(outcome, WeakSamError)]
    assert 0 < len(errors) < len(outcomes)
    assert all(isinstance(error, ServerUnavailableError) for error in errors)
    assert "queue is full" in str(errors[0])


def test_patient_clients_get_through_a_full_queue(secure_server, certificate):
    config = ClientConfig(
        tls=ClientTls(root_certificates=certificate[0]), max_attempts=20, backoff_s=0.02
    )
    with WeakSamClient(secure_server.grpc_address, config) as client:
        outcomes = list(client.detect_many([PNG] * 24, max_in_flight=4))
    assert all(len(outcome.unwrap()) == 2 for outcome in outcomes)


def test_an_engine_for_another_machine_is_refused_by_name_when_the_server_starts(
    tmp_path, toy_rtx_engine, config
):
    """On a machine without a GPU for lack of one, on others for its compute capability."""
    build_model_repository([toy_rtx_engine], tmp_path / "r", profile="embedded", config=config)
    with (
        pytest.raises(
            ServerUnavailableError,
            match=r"did not start.*model.rtx_engine was built for compute capability 12.1, this",
        ),
        EmbeddedServer(tmp_path / "r"),
    ):
        pass


@pytest.fixture(scope="module")
def toy_rtx_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtx")
    source = export_toy_detector(folder / "onnx")
    spark = EngineConfig(compute_capabilities=("12.1",))
    return build_engine(source, folder / "engine", engine="tensorrt-rtx", config=spark)


def test_a_broken_engine_is_named_when_the_server_does_not_start(tmp_path, detector, config):
    path = tmp_path / "artifact" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"not an engine")
    broken = write_manifest(
        path,
        model=DETECTOR,
        engine="onnxruntime",
        parameters=detector.parameters,
        provenance={},
    )
    build_model_repository([broken], tmp_path / "models", profile="embedded", config=config)
    with (
        pytest.raises(ServerUnavailableError, match=r"did not start.*ONNX Runtime cannot open"),
        EmbeddedServer(tmp_path / "models"),
    ):
        pass


@pytest.fixture
def serving_process(tmp_path, detector, config):
    """Another process that serves until it is told to stop; with its server's id and address."""
    build_model_repository([detector], tmp_path / "models", profile="embedded", config=config)
    program = (
        "import sys; from pathlib import Path; from weaksam_rt.server import EmbeddedServer\n"
        "with EmbeddedServer(Path(sys.argv[1])) as server:\n"
        "    print(server.pid, server.grpc_address, flush=True)\n"
        "    server.wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "models")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    pid, address = process.stdout.readline().split()
    yield process, int(pid), address
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_serving_process_stops_within_seconds_of_sigterm(serving_process):
    """As an operator's supervisor does it: nothing is left running."""
    process, pid, address = serving_process
    with WeakSamClient(address) as client:
        assert len(client.detect(PNG)) == 2
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert time.monotonic() - start < 12
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_server_does_not_outlive_a_killed_parent(serving_process):
    process, pid, _ = serving_process
    process.kill()
    for _ in range(150):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    pytest.fail("the server still runs 15 s after its parent was killed")


def test_a_server_that_dies_is_reported(tmp_path, detector, config):
    build_model_repository([detector], tmp_path / "models", profile="embedded", config=config)
    with EmbeddedServer(tmp_path / "models") as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerUnavailableError, match=r"ended unexpectedly.*-9"):
            server.wait()


def _result_or_error(client, image):
    try:
        return client.detect(image)
    except WeakSamError as error:
        return error
