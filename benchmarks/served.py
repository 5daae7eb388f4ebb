"""A server under measurement: started on exported models, asked over gRPC, its own statistics."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.load import Send
from weaksam_rt.client.messages import Call
from weaksam_rt.errors import InferenceError
from weaksam_rt.model_config import ServingOptions
from weaksam_rt.model_repository import ExportedModels, build_model_repository
from weaksam_rt.server import EmbeddedServer, ServerOptions

LOAD_GENERATOR, TRITON = "load generator", "Triton, gRPC"
_TIMEOUT_S = 60.0
_CHANNEL = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatistics:
    """Triton's own account of one model over a while."""

    requests: int
    executions: int
    """Calls of the model; each takes a batch."""
    inferences: int
    """Rows of all batches."""
    milliseconds: Mapping[str, float]
    """Mean of each phase over the requests: queue, compute_input, compute_infer, compute_output."""

    @property
    def mean_batch(self) -> float:
        """Rows of one call; 0 where there was none."""
        return self.inferences / self.executions if self.executions else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WireBytes:
    """Sizes of one request and its answer as protocol messages."""

    request: int
    response: int


@contextmanager
def serve(
    exported: ExportedModels,
    *,
    options: ServingOptions | None = None,
    server_options: ServerOptions | None = None,
) -> Iterator[EmbeddedServer]:
    """A server on these models for as long as it is used."""
    with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as scratch:
        repository = Path(scratch) / "models"
        build_model_repository(
            exported.artifacts,
            repository,
            profile="embedded",
            config=exported.config,
            options=options,
        )
        with EmbeddedServer(repository, server_options) as server:
            yield server


@asynccontextmanager
async def sender(address: str, calls: Sequence[Call[Any]]) -> AsyncIterator[Send]:
    """Sends the calls in turn over one channel and reads their answers.

    Nothing is tried twice: a refusal is a result. Use it inside the event loop that it was made in.
    """
    async with grpc.aio.insecure_channel(address, _CHANNEL) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def send(number: int) -> object:
            call = calls[number % len(calls)]
            try:
                response = await stub.ModelInfer(call.request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise InferenceError(f"{error.code().name}: {error.details()}") from error
            return call.parse(response)

        yield send


def cpu_seconds(server_pid: int) -> dict[str, float]:
    """CPU time so far of each part of a served load: every model, Triton itself, this process.

    A model's instances count together.
    """
    seconds: dict[str, float] = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        part = _part(process, server_pid)
        if part is not None:
            used = process.cpu_times()
            seconds[part] = seconds.get(part, 0.0) + used.user + used.system
    return seconds


def _part(process: psutil.Process, server_pid: int) -> str | None:
    if process.pid == psutil.Process().pid:
        return LOAD_GENERATOR
    if process.pid == server_pid:
        return TRITON
    command = process.cmdline()
    is_stub = len(command) > 1 and command[0].endswith("triton_python_backend_stub")
    return Path(command[1]).parents[1].name if is_stub else None


def wire_bytes(address: str, call: Call[Any]) -> WireBytes:
    """Send once and count."""
    response = _ask(address, lambda stub: stub.ModelInfer(call.request, timeout=_TIMEOUT_S))
    return WireBytes(request=call.request.ByteSize(), response=response.ByteSize())


def read_statistics(address: str) -> dict[str, ModelStatistics]:
    """Of every model, since it was loaded."""
    request = service_pb2.ModelStatisticsRequest()
    answer = _ask(address, lambda stub: stub.ModelStatistics(request, timeout=_TIMEOUT_S))
    return {model.name: _statistics(model) for model in answer.model_stats}


def since(
    before: Mapping[str, ModelStatistics], after: Mapping[str, ModelStatistics]
) -> dict[str, ModelStatistics]:
    """What happened between two readings; models without a request are left out."""
    found = {}
    for name, now in after.items():
        then = before[name]
        requests = now.requests - then.requests
        if requests == 0:
            continue
        found[name] = ModelStatistics(
            requests=requests,
            executions=now.executions - then.executions,
            inferences=now.inferences - then.inferences,
            milliseconds={
                phase: (
                    now.milliseconds[phase] * now.requests
                    - then.milliseconds[phase] * then.requests
                )
                / requests
                for phase in _PHASES
            },
        )
    return found


def together(parts: Sequence[Mapping[str, ModelStatistics]]) -> dict[str, ModelStatistics]:
    """Several whiles as one, by model; a model counts where it was asked."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _sum([part[name] for part in parts if name in part]) for name in names}


def _sum(parts: Sequence[ModelStatistics]) -> ModelStatistics:
    requests = sum(part.requests for part in parts)
    return ModelStatistics(
        requests=requests,
        executions=sum(part.executions for part in parts),
        inferences=sum(part.inferences for part in parts),
        milliseconds={
            phase: sum(part.milliseconds[phase] * part.requests for part in parts) / requests
            for phase in _PHASES
        },
    )


def _statistics(model: Any) -> ModelStatistics:
    requests = model.inference_stats.success.count
    phases = {phase: getattr(model.inference_stats, phase) for phase in _PHASES}
    return ModelStatistics(
        requests=requests,
        executions=model.execution_count,
        inferences=model.inference_count,
        milliseconds={
            phase: stat.ns / 1e6 / requests if requests else 0.0 for phase, stat in phases.items()
        },
    )


def _ask(address: str, question: Callable[[Any], Any]) -> Any:
    with grpc.insecure_channel(address, _CHANNEL) as channel:
        return question(service_pb2_grpc.GRPCInferenceServiceStub(channel))
