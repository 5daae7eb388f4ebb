"""``weaksam serve``: a folder of models to a running server."""

import logging
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console

from weaksam_rt.artifacts import MANIFEST_NAME
from weaksam_rt.client import ClientConfig, ClientTls
from weaksam_rt.errors import ArtifactError, WeakSamError
from weaksam_rt.model_control import ModelControl
from weaksam_rt.model_repository import CONFIG_NAME, build_model_repository, load_exported_models
from weaksam_rt.releases import recover
from weaksam_rt.server import EmbeddedServer, ServerOptions, ServerTls

_LOGGER = logging.getLogger(__name__)


@contextmanager
def repository_of(models: Path, config: Path | None = None) -> Iterator[Path]:
    """A Triton model repository for ``models``: itself, or one built for as long as it is used.

    Args:
        models: A model repository, or a folder with one subfolder for each exported model.
        config: TOML file of the pipeline, for exported models. None: ``pipeline.toml`` among them,
            or the defaults.

    Raises:
        ArtifactError: The folder is neither, or a model in it is damaged.
        ValueError: ``config`` was given for a finished repository, or is not valid.
    """
    if any(models.glob(f"*/{CONFIG_NAME}")):
        if config is not None:
            raise ValueError(f"{models} is a finished repository with its own pipeline settings")
        yield models
        return
    if not any(models.glob(f"*/{MANIFEST_NAME}")):
        raise ArtifactError(
            f"{models} holds neither a model repository (*/{CONFIG_NAME}) nor exported models "
            f"(*/{MANIFEST_NAME})"
        )
    exported = load_exported_models(models, config)
    with tempfile.TemporaryDirectory(prefix="weaksam-repository-") as scratch:
        repository = Path(scratch) / "models"
        build_model_repository(
            exported.artifacts, repository, profile="embedded", config=exported.config
        )
        yield repository


def serve(
    models: Annotated[Path, tyro.conf.Positional],
    *,
    config: Path | None = None,
    host: str = "127.0.0.1",
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    tls_client_root: Path | None = None,
    log_file: Path | None = None,
    allow_releases: bool = False,
) -> int:
    """Serve models on a real Triton server until interrupted.

    Example: `weaksam serve assets/demo_models`, then in another terminal
    `weaksam detect photo.jpg`. Ctrl-C or SIGTERM stops it after the requests in flight.

    Args:
        models: Folder of exported models (one subfolder each), or a Triton model repository.
        config: TOML file with pipeline settings (thresholds, prompts), for exported models.
        host: Address to listen on; 0.0.0.0 opens it to the network.
        grpc_port: Inference; 0 takes a free port.
        http_port: Health checks (/v2/health/ready) and the HTTP protocol; 0 takes a free port.
        metrics_port: Prometheus metrics (/metrics); 0 takes a free port.
        tls_certificate: PEM file; encrypts the gRPC port, with tls_key.
        tls_key: PEM file of the certificate's private key.
        tls_client_root: PEM file; only clients with a certificate signed by it are let in.
        log_file: Keep Triton's log there.
        allow_releases: Let `python -m export release` replace engines while the server runs; needs
            a model repository. Whoever reaches the ports can then load and unload models.
    """
    if (tls_certificate is None) != (tls_key is None):
        raise ValueError("tls_certificate and tls_key belong together; give both or neither")
    tls = None
    if tls_certificate is not None and tls_key is not None:
        tls = ServerTls(certificate=tls_certificate, key=tls_key, client_root=tls_client_root)
    if allow_releases and not any(models.glob(f"*/{CONFIG_NAME}")):
        raise ValueError(
            f"{models} is no model repository, and releases need one that stays; build it with "
            "`python -m export repository`"
        )
    options = ServerOptions(
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        tls=tls,
        log_file=log_file,
        load_models=("*",) if allow_releases else None,
    )
    console = Console()
    # Without it a SIGTERM before the server is up would end this process and leave Triton behind.
    signal.signal(signal.SIGTERM, _leave)
    with ExitStack() as stack:
        with console.status("starting Triton ..."):
            repository = stack.enter_context(repository_of(models, config))
            recover(repository, None)
            server = stack.enter_context(EmbeddedServer(repository, options))
        console.print(f"ready: gRPC {server.grpc_address}, {server.http_url}")
        console.print(f"metrics: {server.metrics_url}   stop: Ctrl-C")
        if allow_releases:
            control = stack.enter_context(ModelControl(server.grpc_address, _own_config(tls)))
            server.wait(partial(_clean_up, repository, control))
        else:
            server.wait()
    return 0


def _clean_up(repository: Path, control: ModelControl) -> None:
    """Undo or finish a release whose process died; what fails is tried again by the next call."""
    try:
        recover(repository, control)
    except WeakSamError as error:
        _LOGGER.warning("an interrupted release could not be cleaned up yet: %s", error)


def _own_config(tls: ServerTls | None) -> ClientConfig:
    """How this process reaches its own server."""
    if tls is None:
        return ClientConfig()
    trusted = ClientTls(root_certificates=tls.certificate)
    return ClientConfig(tls=trusted)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
