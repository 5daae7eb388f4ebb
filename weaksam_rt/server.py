"""A real Triton server as a child process: the one inside the ``nvidia-pytriton`` wheel.

Knows how to prepare the environment that the server's Python backend needs, to start it, to tell
why it did not start, and to stop it. Knows nothing about models: it serves a model repository.
"""

import contextlib
import ctypes.util
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType

import weaksam_rt
from weaksam_rt.errors import ServerUnavailableError
from weaksam_rt.live_repository import compile_model_files

_LOGGER = logging.getLogger(__name__)
_POLL_S = 0.05
_LOG_LINES_SHOWN = 25
_END_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
"""A program that becomes the server and asks the kernel for a SIGTERM when its parent dies, however
it dies (1 is PR_SET_PDEATHSIG). Linux only, as the server is.
"""
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
"""glibc keeps the memory of a decoded image for the next one. By default it gives such blocks back
to the kernel and takes a page fault for each 4 KiB of the next image: measured, 4 of the 7 ms that
a 640x480 request cost beside decoding and the engine. The caller's own environment wins.
"""
_INSTALL = "install the server extra: pip install 'weaksam-rt[server]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """Files (PEM) for TLS on the gRPC port."""

    certificate: Path
    """The server's certificate chain."""
    key: Path
    """Its private key."""
    client_root: Path | None = None
    """If given, clients must present a certificate signed by one of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Where the server listens and how long it may take."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens all ports to the network, HTTP and metrics included."""
    grpc_port: int = 0
    """Inference; 0 takes a free port."""
    http_port: int = 0
    """Health and the HTTP protocol; 0 takes a free port."""
    metrics_port: int = 0
    """Prometheus metrics; 0 takes a free port."""
    tls: ServerTls | None = None
    """Encrypts the gRPC port; None leaves it plain."""
    load_models: tuple[str, ...] | None = None
    """None loads every model and fixes them. Otherwise models can be loaded and unloaded while the
    server runs, by everyone who reaches its ports, and these are loaded at the start; ``"*"`` is
    all of them.
    """
    log_verbosity: int = 0
    """Triton's ``--log-verbose``, at least 0."""
    log_file: Path | None = None
    """Receives the log; None keeps it in a temporary file until the server stops."""
    start_timeout_s: float = 120.0
    """Longest time until every model is ready."""
    stop_timeout_s: float = 10.0
    """Time for requests in flight after the server is told to stop; then it is killed."""

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 65535")
        if self.start_timeout_s <= 0 or self.stop_timeout_s <= 0:
            raise ValueError("start_timeout_s and stop_timeout_s must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Installation:
    """What is needed from this Python environment to run the server."""

    binary: Path
    backend: Path
    stub: Path
    library_path: tuple[Path, ...]


class EmbeddedServer:
    """A running server; use it as a context manager.

    Entering returns when every model is ready, and raises ``ServerUnavailableError`` with the end
    of the log otherwise. Leaving stops the server and everything that it started.
    """

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        """Prepare to serve ``repository``; nothing is started yet."""
        self._repository = repository
        self._options = options or ServerOptions()
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file = Path()
        self._ports = (0, 0, 0)

    @property
    def grpc_address(self) -> str:
        """``host:port`` for clients on this machine."""
        return f"{_reachable(self._options.host)}:{self._ports[0]}"

    @property
    def http_url(self) -> str:
        """Base address of health and HTTP."""
        return f"http://{_reachable(self._options.host)}:{self._ports[1]}"

    @property
    def metrics_url(self) -> str:
        """Prometheus metrics."""
        return f"http://{_reachable(self._options.host)}:{self._ports[2]}/metrics"

    @property
    def is_alive(self) -> bool:
        """The process runs; it may still be loading models."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id; raises ``RuntimeError`` when it does not run."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def __enter__(self) -> "EmbeddedServer":
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def log_tail(self, num_lines: int = _LOG_LINES_SHOWN) -> str:
        """The last lines of the log; empty before the start and after the stop."""
        if not self._log_file.is_file():
            return ""
        lines = self._log_file.read_text(errors="replace").splitlines()
        said = [line for line in lines if not line.startswith(("|", "+-"))]  # no tables
        return "\n".join(said[-num_lines:])

    def wait(self, on_poll: Callable[[], None] = lambda: None) -> None:
        """Block until SIGTERM or SIGINT arrives, then stop; call it from the main thread.

        Args:
            on_poll: Called several times a second; it should return soon.

        Raises:
            ServerUnavailableError: The server ended by itself.
        """
        with _stop_signals() as received:
            while not received and self.is_alive:
                time.sleep(4 * _POLL_S)
                on_poll()
            if received:
                _LOGGER.info("%s: stopping the server", signal.Signals(received[0]).name)
            else:
                raise self._ended("ended unexpectedly")
            self.stop()

    def stop(self) -> None:
        """Stop the server and its model processes; does nothing if there is none."""
        process, self._process = self._process, None
        if process is not None:
            _terminate(process, self._options.stop_timeout_s)
        self._cleanup.close()

    def _start(self) -> None:
        if self._process is not None:
            raise RuntimeError("this server is already running; make another EmbeddedServer")
        installation = _find_installation()
        if not self._repository.is_dir():
            raise ServerUnavailableError(
                f"there is no model repository at {self._repository}; build one first"
            )
        scratch = Path(
            self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="weaksam-server-"))
        )
        compile_model_files(self._repository)
        self._ports = _choose_ports(self._options)
        self._log_file = self._options.log_file or scratch / "server.log"
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        command = _command(
            installation.binary,
            repository=self._repository.resolve(),
            backends=_prepare_backends(installation, scratch),
            ports=self._ports,
            options=self._options,
        )
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*_watchdog(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(installation),
                cwd=_prepare_working_folder(scratch),
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._options.start_timeout_s
        while not _answers(f"{self.http_url}/v2/health/ready"):
            if not self.is_alive:
                raise self._ended("did not start")
            if time.monotonic() > deadline:
                raise self._ended(f"was not ready after {self._options.start_timeout_s:g} s")
            time.sleep(_POLL_S)

    def _ended(self, what: str) -> ServerUnavailableError:
        status = None if self._process is None else self._process.poll()
        code = "" if status is None else f" (exit status {status})"
        reasons = _failures(self.log_tail(400))
        return ServerUnavailableError(
            f"the server {what}{code}: {reasons or 'see its log'}\n"
            f"The end of its log:\n{self.log_tail()}"
        )


# ---------------------------------------------------------------------------------------------
# Finding and preparing what the server needs
# ---------------------------------------------------------------------------------------------


def check_installation() -> list[str]:
    """What keeps this environment from starting a server, with what to do; empty: nothing."""
    try:
        _find_installation()
    except ServerUnavailableError as error:
        return [str(error)]
    return []


def _find_installation() -> _Installation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerUnavailableError(f"nvidia-pytriton is not installed here; {_INSTALL}")
    _check_numpy()
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        there = sorted(p.name for p in (root / "python_backend_stubs").glob("3.*"))
        raise ServerUnavailableError(
            f"the server has no stub for Python {python}; it has {', '.join(there)}: "
            "use one of these"
        )
    return _Installation(
        binary=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=stub,
        library_path=(package.parent / "nvidia_pytriton.libs", *_libpython_folder(python)),
    )


def _check_numpy() -> None:
    """The stub reads arrays by NumPy 1's memory layout: under NumPy 2 all values are wrong."""
    try:
        numpy_version = version("numpy")
    except PackageNotFoundError:
        raise ServerUnavailableError(f"NumPy is not installed here; {_INSTALL}") from None
    if int(numpy_version.split(".")[0]) >= 2:
        raise ServerUnavailableError(
            f"NumPy {numpy_version} is installed, and the server would read wrong values from its "
            "arrays: its Python stub was built against NumPy 1; "
            "pip install 'numpy>=1.26,<2' (the server extra asks for it)"
        )


def _libpython_folder(python: str) -> tuple[Path, ...]:
    """The folder that must be searched for libpython; none if the system finds it by itself."""
    name = f"libpython{python}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    for folder in folders:
        if folder and (Path(folder) / name).exists():
            return (Path(folder),)
    if ctypes.util.find_library(f"python{python}") is not None:
        return ()
    raise ServerUnavailableError(
        f"{name} was not found, and the server's Python models need it. Debian and Ubuntu: "
        f"apt install libpython{python}; pyenv: build with --enable-shared; or use the "
        "interpreters that uv installs, which bring it"
    )


def _prepare_backends(installation: _Installation, scratch: Path) -> Path:
    """A backend folder with the stub of this Python."""
    folder = scratch / "backends" / "python"
    folder.mkdir(parents=True)
    for file in installation.backend.iterdir():
        if file.name not in ("__pycache__", installation.stub.name):
            (folder / file.name).symlink_to(file)
    (folder / installation.stub.name).symlink_to(installation.stub)
    return folder.parent


def _prepare_working_folder(scratch: Path) -> Path:
    """A working folder with nothing in it but this very package.

    The stub ignores PYTHONPATH and searches its working folder before everything else. So the
    served models run the code that started the server, from a source checkout as well.
    """
    folder = scratch / "work"
    folder.mkdir()
    package = Path(weaksam_rt.__file__).resolve().parent
    (folder / package.name).symlink_to(package)
    return folder


def _environment(installation: _Installation) -> dict[str, str]:
    """The stub takes the packages of the first interpreter on PATH: make it this one."""
    libraries = [*map(str, installation.library_path), os.environ.get("LD_LIBRARY_PATH", "")]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        **_MALLOC,
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "PATH": os.pathsep.join(filter(None, path)),
    }


def _watchdog() -> list[str]:
    """What to start the server through. The kernel watches the thread that starts it, so a thread
    that may end before the server must do without.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT]


def _command(
    binary: Path,
    *,
    repository: Path,
    backends: Path,
    ports: tuple[int, int, int],
    options: ServerOptions,
) -> list[str]:
    grpc, http, metrics = ports
    command = [
        str(binary),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--grpc-address={options.host}",
        f"--grpc-port={grpc}",
        f"--http-address={options.host}",
        f"--http-port={http}",
        f"--metrics-address={options.host}",
        f"--metrics-port={metrics}",
        "--metrics-config=summary_latencies=true",
        f"--log-verbose={options.log_verbosity}",
        f"--exit-timeout-secs={max(1, int(options.stop_timeout_s) - 1)}",
        "--pinned-memory-pool-byte-size=0",
        "--allow-gpu-metrics=false",
        "--disable-auto-complete-config",
    ]
    if options.load_models is not None:
        command.append("--model-control-mode=explicit")
        command += [f"--load-model={name}" for name in options.load_models]
    if options.tls is not None:
        command += _tls_arguments(options.tls)
    return command


def _tls_arguments(tls: ServerTls) -> list[str]:
    arguments = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tls.certificate.resolve()}",
        f"--grpc-server-key={tls.key.resolve()}",
    ]
    if tls.client_root is not None:
        arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={tls.client_root.resolve()}"]
    return arguments


def _choose_ports(options: ServerOptions) -> tuple[int, int, int]:
    """The ports asked for, each checked to be free, and free ones for zeros."""
    ports = []
    with contextlib.ExitStack() as stack:
        for wanted in (options.grpc_port, options.http_port, options.metrics_port):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((options.host, wanted))
            except OSError as error:
                raise ServerUnavailableError(
                    f"cannot listen on {options.host}:{wanted} ({error.strerror}); "
                    "choose another port, or 0 for a free one"
                ) from error
            ports.append(listener.getsockname()[1])
    return ports[0], ports[1], ports[2]


# ---------------------------------------------------------------------------------------------
# Watching and stopping the process
# ---------------------------------------------------------------------------------------------


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _failures(log: str) -> str:
    """Why models failed to load, else the first errors; Triton marks error lines with an E."""
    errors = [line.split("] ", 1)[-1] for line in log.splitlines() if line.startswith("E")]
    causes = [line for line in errors if "failed to load" in line] or errors
    # A Python model's message has its call stack behind "At:"; the log keeps it.
    short = [line.split("\\n\\nAt:")[0].strip('"') for line in causes]
    return " | ".join(dict.fromkeys(short[:3]))


def _terminate(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End the process, politely at first, then everything in its session."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        _LOGGER.warning("the server did not stop within %g s: killing it", timeout_s)
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying from them."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)

    old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
