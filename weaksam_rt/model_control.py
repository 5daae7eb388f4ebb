"""Loading and unloading versions of models on a running Triton server, through its own protocol.

Two ways of Triton 2.51, both tried against it, decide how this is used:

- A load without a config reads ``config.pbtxt`` again, starts the versions that are new and keeps
  those whose files did not change. It does nothing if the folder did not change.
- A load with a config replaces whatever was there before. The versions it names are started and
  take the requests as soon as they are ready; the others finish what they have and leave. If a
  version cannot be started, nothing changes.
"""

import json
import time
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from weaksam_rt.backends.base import Arrays
from weaksam_rt.client._calls import (
    Deadline,
    error_from_rpc,
    open_channel,
)
from weaksam_rt.client.config import ClientConfig
from weaksam_rt.client.messages import arrays_from_response, infer_request
from weaksam_rt.contracts import ModelContract
from weaksam_rt.errors import InferenceTimeoutError, ServerUnavailableError, WeakSamError

_POLL_S = 0.1
_PRESENT = ("READY", "LOADING", "UNLOADING")


class ModelControl:
    """A connection to a server whose models may be changed; use it as a context manager.

    Every call raises ``ServerUnavailableError`` where no server answers, ``InferenceTimeoutError``
    where one takes too long (it may do what was asked later), and ``WeakSamError`` with the
    server's own words where it refuses.
    """

    def __init__(
        self, address: str, config: ClientConfig | None = None, *, load_timeout_s: float = 120.0
    ) -> None:
        """Prepare a connection to ``host:port``."""
        self.address = address
        self.config = config or ClientConfig()
        self._load_timeout_s = load_timeout_s
        self._channel = open_channel(address, self.config)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> "ModelControl":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def load(self, model: str, config_text: str | None = None) -> None:
        """Load ``model`` by its ``config.pbtxt`` on disk, or by ``config_text`` instead of it.

        Returns when the versions named there are ready.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        if config_text is not None:
            message = text_format.Parse(config_text, model_config_pb2.ModelConfig())
            content = json_format.MessageToDict(message, preserving_proto_field_name=True)
            request.parameters["config"].string_param = json.dumps(content)
        self._call(self._stub.RepositoryModelLoad, request, self._load_timeout_s, f"load {model}")

    def states(self, model: str) -> dict[int, str]:
        """The state of every version of ``model`` that the server remembers, by version."""
        index = self._call(
            self._stub.RepositoryIndex,
            service_pb2.RepositoryIndexRequest(),
            self.config.timeout_s,
            "list its models",
        )
        return {
            int(entry.version): entry.state
            for entry in index.models
            if entry.name == model and entry.version
        }

    def ready_versions(self, model: str) -> set[int]:
        """The versions of ``model`` that answer requests."""
        return {version for version, state in self.states(model).items() if state == "READY"}

    def wanted_versions(self, model: str) -> set[int]:
        """The versions of ``model`` that answer requests, or will when they are loaded."""
        states = self.states(model)
        return {version for version, state in states.items() if state in ("READY", "LOADING")}

    def wait_until_gone(self, model: str, version: int, timeout_s: float = 60.0) -> None:
        """Wait until no request runs on ``version`` any more.

        Raises:
            ServerUnavailableError: It is still there after ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while self.states(model).get(version) in _PRESENT:
            if time.monotonic() > deadline:
                raise ServerUnavailableError(
                    f"{model} version {version} is still loaded after {timeout_s:g} s"
                )
            time.sleep(_POLL_S)

    def infer(self, contract: ModelContract, version: int, image: Arrays) -> Arrays:
        """Ask one version of an engine model; arrays without batch axis."""
        request = infer_request(contract, image)
        request.model_version = str(version)
        response = self._call(
            self._stub.ModelInfer, request, self.config.timeout_s, f"answer for {contract.name}"
        )
        return arrays_from_response(contract, response)

    def _call(self, method: Any, request: Any, timeout_s: float, what: str) -> Any:
        deadline = Deadline.after(timeout_s)
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            # Behind "At:" stands the call stack of a Python model; the server's log has it too.
            details = (error.details() or "").split("\n\nAt:")[0]
            if "explicit model load / unload is not allowed" in details:
                raise WeakSamError(
                    f"the server at {self.address} does not let its models be changed; start it "
                    "with `weaksam serve REPOSITORY --allow-releases`"
                ) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise InferenceTimeoutError(
                    f"the server at {self.address} did not {what} within {timeout_s:g} s; it may "
                    "do it yet"
                ) from error
            raise error_from_rpc(
                error.code(), details, address=self.address, deadline=deadline
            ) from error
