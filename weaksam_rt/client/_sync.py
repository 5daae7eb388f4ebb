"""The blocking client."""

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from weaksam_rt.client._calls import (
    Deadline,
    backoffs,
    error_from_rpc,
    may_retry,
    open_channel,
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


class WeakSamClient:
    """Calls a served pipeline and waits for its answers; safe to share between threads.

    Keep one client for many calls: it holds one connection.

        with WeakSamClient("localhost:8001") as client:
            result = client.detect(Path("street.jpg"))

    Every call raises ``ImageError`` (the image cannot be used), ``ContractError`` or
    ``InferenceError`` (the server refused or failed the request), ``InferenceTimeoutError`` (the
    deadline passed) or ``ServerUnavailableError`` (no server, or it does not serve the model).
    """

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Prepare a connection to ``host:port``; it is made by the first call."""
        self._address = address
        self._config = config or ClientConfig()
        self._generator = random.Random()
        self._channel = open_channel(address, self._config)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> "WeakSamClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back; calls in flight are cancelled."""
        self._channel.close()

    def detect(
        self,
        image: EncodedImage,
        *,
        score_thresh: float | None = None,
        max_detections: int | None = None,
        with_masks: bool = False,
        timeout_s: float | None = None,
    ) -> DetectResult:
        """Boxes, labels, scores and, if asked for, masks of one image.

        Args:
            image: A JPEG, PNG or WebP file.
            score_thresh: Lowest score to return, in [0, 1]; None: the server's.
            max_detections: Most detections to return, at least 1; None: the server's.
            with_masks: Also masks: the detector's own if it has some, else of SAM, prompted with
                every box.
            timeout_s: Deadline; None: the configured one.
        """
        call = detect_call(
            self._read(image),
            score_thresh=score_thresh,
            max_detections=max_detections,
            with_masks=with_masks,
        )
        return self._infer(call, timeout_s)

    def propose(
        self,
        image: EncodedImage,
        tags: Sequence[str] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> ProposeResult:
        """Class-agnostic proposals of one image, steered by its tags.

        Args:
            image: A JPEG, PNG or WebP file.
            tags: Classes in the image, at least one; None: those that the classifier sees.
            timeout_s: Deadline; None: the configured one.
        """
        return self._infer(propose_call(self._read(image), tags), timeout_s)

    def segment(
        self,
        image: EncodedImage,
        *,
        point_coords: NDArray[Any] | None = None,
        point_labels: NDArray[Any] | None = None,
        boxes: NDArray[Any] | None = None,
        multimask: bool = False,
        timeout_s: float | None = None,
    ) -> SegmentResult:
        """Masks of one image for points, boxes, or both.

        Args:
            image: A JPEG, PNG or WebP file.
            point_coords: [p, k, 2], (x, y) in pixels of the upright image.
            point_labels: [p, k], 1 object, 0 background, -1 to leave a point out.
            boxes: [p, 4], XYXY in pixels.
            multimask: Three masks for each prompt instead of one.
            timeout_s: Deadline; None: the configured one.
        """
        call = segment_call(
            self._read(image),
            point_coords=point_coords,
            point_labels=point_labels,
            boxes=boxes,
            multimask=multimask,
        )
        return self._infer(call, timeout_s)

    def detect_many(
        self,
        images: Iterable[EncodedImage],
        *,
        max_in_flight: int = 8,
        score_thresh: float | None = None,
        max_detections: int | None = None,
        with_masks: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[DetectOutcome]:
        """``detect`` for many images, several at a time, answers in the images' order.

        An image that fails gives an outcome with its error; the others go on. Images are read as
        they are needed, so ``images`` may be endless.

        Args:
            images: JPEG, PNG or WebP files.
            max_in_flight: Requests sent at a time, at least 1.
            score_thresh: As in ``detect``.
            max_detections: As in ``detect``.
            with_masks: As in ``detect``.
            timeout_s: Deadline of each image.
        """
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}, expected at least 1")

        def outcome(image: EncodedImage) -> DetectOutcome:
            start = time.perf_counter()
            result, failure = None, None
            try:
                result = self.detect(
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

        return _in_order(outcome, images, max_in_flight)

    def is_ready(self, *, timeout_s: float = 2.0) -> bool:
        """The server answers and all its models are ready."""
        try:
            answer = self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    def models(self, *, timeout_s: float | None = None) -> list[ServedModel]:
        """Every model that the server knows, by name and version, with what the pipelines say about
        their engines.
        """
        deadline = Deadline.after(timeout_s or self._config.timeout_s)
        request = service_pb2.RepositoryIndexRequest()
        index = self._call(self._stub.RepositoryIndex, request, deadline)
        summaries: dict[tuple[str, str], EngineSummary] = {}
        for name, version in ready_pipelines(index):
            asked = service_pb2.ModelConfigRequest(name=name, version=version)
            with contextlib.suppress(ServerUnavailableError):  # it left in the meantime
                summaries |= engine_summaries(self._call(self._stub.ModelConfig, asked, deadline))
        return served_models(index, summaries)

    def _read(self, image: EncodedImage) -> bytes:
        return read_image_bytes(image, self._config.max_image_bytes)

    def _infer(self, call: Call[_T], timeout_s: float | None) -> _T:
        deadline = Deadline.after(self._config.timeout_s if timeout_s is None else timeout_s)
        pauses = backoffs(self._config, deadline, self._generator)
        while True:
            request = with_deadline(call.request, deadline)
            try:
                return call.parse(self._call(self._stub.ModelInfer, request, deadline))
            except WeakSamError as error:
                pause = next(pauses, None) if may_retry(error) else None
                if pause is None:
                    raise
            time.sleep(pause)

    def _call(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        try:
            return method(request, timeout=deadline.remaining_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            raise error_from_rpc(code, details, address=self._address, deadline=deadline) from error


def _in_order(
    function: Callable[[EncodedImage], DetectOutcome],
    images: Iterable[EncodedImage],
    max_in_flight: int,
) -> Iterator[DetectOutcome]:
    waiting: deque[Future[DetectOutcome]] = deque()
    with ThreadPoolExecutor(max_in_flight, thread_name_prefix="weaksam-client") as pool:
        try:
            for image in images:
                if len(waiting) == max_in_flight:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, image))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
