"""The client for asyncio programs; the same calls as ``WeakSamClient``, awaited."""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from weaksam_rt.client._calls import (
    Deadline,
    backoffs,
    channel_credentials,
    channel_options,
    error_from_rpc,
    may_retry,
    with_deadline,
)
from weaksam_rt.client.config import ClientConfig
from weaksam_rt.client.messages import (
    Call,
    detect_call,
    engine_summaries,
    propose_call,
    read_image_bytes,
    ready_pipelines,
    segment_call,
    served_models,
)
from weaksam_rt.client.results import (
    DetectOutcome,
    DetectResult,
    EncodedImage,
    EngineSummary,
    ProposeResult,
    ServedModel,
)
from weaksam_rt.errors import ServerUnavailableError, WeakSamError
from weaksam_rt.types import SegmentResult

_T = TypeVar("_T")


class AsyncWeakSamClient:
    """``WeakSamClient`` for asyncio; use it inside one event loop.

    async with AsyncWeakSamClient("localhost:8001") as client:
        result = await client.detect(Path("street.jpg"))
    """

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Prepare a connection to ``host:port``; it is made by the first call."""
        self._address = address
        self._config = config or ClientConfig()
        self._generator = random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._stub_of_channel: Any = None

    async def __aenter__(self) -> "AsyncWeakSamClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection back; calls in flight are cancelled."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def detect(
        self,
        image: EncodedImage,
        *,
        score_thresh: float | None = None,
        max_detections: int | None = None,
        with_masks: bool = False,
        timeout_s: float | None = None,
    ) -> DetectResult:
        """See ``WeakSamClient.detect``."""
        call = detect_call(
            self._read(image),
            score_thresh=score_thresh,
            max_detections=max_detections,
            with_masks=with_masks,
        )
        return await self._infer(call, timeout_s)

    async def propose(
        self,
        image: EncodedImage,
        tags: Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> ProposeResult:
        """See ``WeakSamClient.propose``."""
        return await self._infer(propose_call(self._read(image), tags), timeout_s)

    async def segment(
        self,
        image: EncodedImage,
        *,
        point_coords: NDArray[Any] | None = None,
        point_labels: NDArray[Any] | None = None,
        boxes: NDArray[Any] | None = None,
        multimask: bool = False,
        timeout_s: float | None = None,
    ) -> SegmentResult:
        """See ``WeakSamClient.segment``."""
        call = segment_call(
            self._read(image),
            point_coords=point_coords,
            point_labels=point_labels,
            boxes=boxes,
            multimask=multimask,
        )
        return await self._infer(call, timeout_s)

    async def detect_many(
        self,
        images: Iterable[EncodedImage],
        *,
        max_in_flight: int = 8,
        score_thresh: float | None = None,
        max_detections: int | None = None,
        with_masks: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[DetectOutcome]:
        """See ``WeakSamClient.detect_many``."""
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}, expected at least 1")

        async def outcome(image: EncodedImage) -> DetectOutcome:
            start = time.perf_counter()
            result, failure = None, None
            try:
                result = await self.detect(
                    image,
                    score_thresh=score_thresh,
                    max_detections=max_detections,
                    with_masks=with_masks,
                    timeout_s=timeout_s,
                )
            except WeakSamError as error:
                failure = error
            latency_ms = (time.perf_counter() - start) * 1e3
            return DetectOutcome(image=image, result=result, error=failure, latency_ms=latency_ms)

        waiting: deque[asyncio.Task[DetectOutcome]] = deque()
        try:
            for image in images:
                if len(waiting) == max_in_flight:
                    yield await waiting.popleft()
                waiting.append(asyncio.create_task(outcome(image)))
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()

    async def is_ready(self, *, timeout_s: float = 2.0) -> bool:
        """The server answers and all its models are ready."""
        try:
            answer = await self._stub.ServerReady(
                service_pb2.ServerReadyRequest(), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def models(self, *, timeout_s: float | None = None) -> list[ServedModel]:
        """See ``WeakSamClient.models``."""
        deadline = Deadline.after(timeout_s or self._config.timeout_s)
        request = service_pb2.RepositoryIndexRequest()
        index = await self._call(self._stub.RepositoryIndex, request, deadline)
        summaries: dict[tuple[str, str], EngineSummary] = {}
        for name, version in ready_pipelines(index):
            asked = service_pb2.ModelConfigRequest(name=name, version=version)
            with contextlib.suppress(ServerUnavailableError):  # it left in the meantime
                summaries |= engine_summaries(
                    await self._call(self._stub.ModelConfig, asked, deadline)
                )
        return served_models(index, summaries)

    @property
    def _stub(self) -> Any:
        """Made by the first call, because a channel belongs to the loop that is running then."""
        if self._channel is None:
            options, tls = channel_options(self._config), self._config.tls
            self._channel = (
                grpc.aio.insecure_channel(self._address, options)
                if tls is None
                else grpc.aio.secure_channel(self._address, channel_credentials(tls), options)
            )
            self._stub_of_channel = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub_of_channel

    def _read(self, image: EncodedImage) -> bytes:
        return read_image_bytes(image, self._config.max_image_bytes)

    async def _infer(self, call: Call[_T], timeout_s: float | None) -> _T:
        deadline = Deadline.after(self._config.timeout_s if timeout_s is None else timeout_s)
        pauses = backoffs(self._config, deadline, self._generator)
        while True:
            request = with_deadline(call.request, deadline)
            try:
                return call.parse(await self._call(self._stub.ModelInfer, request, deadline))
            except WeakSamError as error:
                pause = next(pauses, None) if may_retry(error) else None
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _call(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        try:
            return await method(request, timeout=deadline.remaining_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            raise error_from_rpc(code, details, address=self._address, deadline=deadline) from error
