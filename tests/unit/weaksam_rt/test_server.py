"""What the launcher decides without a server; the rest is in tests/integration."""

import socket
from pathlib import Path

import pytest

import weaksam_rt.server
from weaksam_rt.errors import ServerUnavailableError
from weaksam_rt.server import EmbeddedServer, ServerOptions, ServerTls


def test_numpy_two_is_refused_because_values_would_be_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(weaksam_rt.server, "version", lambda package: "2.1.0")
    with (
        pytest.raises(ServerUnavailableError, match=r"NumPy 2\.1\.0 .*numpy>=1\.26,<2"),
        EmbeddedServer(tmp_path),
    ):
        pass


def test_a_missing_installation_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(weaksam_rt.server.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ServerUnavailableError, match=r"pip install 'weaksam-rt\[server\]'"),
        EmbeddedServer(tmp_path),
    ):
        pass


def test_a_missing_repository_is_named(tmp_path):
    pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed")
    with (
        pytest.raises(ServerUnavailableError, match=r"no model repository at .*absent"),
        EmbeddedServer(tmp_path / "absent"),
    ):
        pass


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ServerOptions(grpc_port=port)
        with pytest.raises(ServerUnavailableError, match=rf"127\.0\.0\.1:{port}.*another port"):
            weaksam_rt.server._choose_ports(options)


def test_free_ports_differ():
    ports = weaksam_rt.server._choose_ports(ServerOptions())
    assert len(set(ports)) == 3
    assert all(port > 0 for port in ports)


def test_options_become_arguments(tmp_path):
    options = ServerOptions(
        host="0.0.0.0",
        load_models=("detector",),
        tls=ServerTls(certificate=tmp_path / "c", key=tmp_path / "k", client_root=tmp_path / "r"),
    )
    command = weaksam_rt.server._command(
        Path("/bin/triton"),
        repository=tmp_path,
        backends=tmp_path,
        ports=(1, 2, 3),
        options=options,
    )
    for argument in (
        "--grpc-address=0.0.0.0",
        "--grpc-port=1",
        "--http-port=2",
        "--metrics-port=3",
        "--model-control-mode=explicit",
        "--load-model=detector",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-root-cert={tmp_path / 'r'}",
    ):
        assert argument in command


def test_memory_of_images_is_kept_unless_the_caller_says_otherwise(monkeypatch):
    pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed")
    installation = weaksam_rt.server._find_installation()
    environment = weaksam_rt.server._environment(installation)
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) >= 640 * 480 * 3
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert weaksam_rt.server._environment(installation)["MALLOC_TRIM_THRESHOLD_"] == "1"


def test_the_reason_of_a_failed_start_is_found_in_the_log():
    log = (
        'I1122 14:44:09.9 1 model.cc:1] "loading"\n'
        'E1122 14:44:09.9 1 x.cc:2] "ERROR: Failed to create instance"\n'
        "E1122 14:44:09.9 1 y.cc:3] \"failed to load 'detector' version 1: Internal: "
        'ArtifactError: it is damaged\\n\\nAt:\\n  model.py(3)"\n'
    )
    assert weaksam_rt.server._failures(log) == (
        "failed to load 'detector' version 1: Internal: ArtifactError: it is damaged"
    )
    assert weaksam_rt.server._failures("I1122 fine\n") == ""


@pytest.mark.parametrize("options", [{"grpc_port": 70_000}, {"stop_timeout_s": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"grpc_port|stop_timeout_s"):
        ServerOptions(**options)


def test_a_server_that_was_not_started_is_not_alive(tmp_path):
    server = EmbeddedServer(tmp_path)
    assert not server.is_alive
    assert server.log_tail() == ""
    server.stop()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid
