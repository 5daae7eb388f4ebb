"""What both clients share: the channel's options, the deadline and retry policy, the errors."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from weaksam_rt.client.config import ClientConfig, ClientTls
from weaksam_rt.errors import (
    ContractError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
    WeakSamError,
)
from weaksam_rt.wire_errors import error_from_text

_LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """A point in time that all attempts of one call share."""

    timeout_s: float
    """What the caller allowed."""
    ends_at: float
    """On ``time.monotonic``'s clock."""

    @staticmethod
    def after(timeout_s: float) -> "Deadline":
        """A deadline that starts now.

        Raises:
            ValueError: ``timeout_s`` is not above 0.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}, expected above 0")
        return Deadline(timeout_s=timeout_s, ends_at=time.monotonic() + timeout_s)

    @property
    def remaining_s(self) -> float:
        """Time left, at least a millisecond: gRPC then reports the expiry itself."""
        return max(self.ends_at - time.monotonic(), 1e-3)


def channel_options(config: ClientConfig) -> list[tuple[str, int]]:
    """GRPC's settings: no size limit of its own, quick reconnects, retries left to us."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * config.keepalive_s)),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_retries", 0),
    ]


def channel_credentials(tls: ClientTls) -> Any:
    """GRPC's form of the TLS files."""
    root, key, chain = (
        None if path is None else path.read_bytes()
        for path in (tls.root_certificates, tls.key, tls.certificate)
    )
    return grpc.ssl_channel_credentials(root, key, chain)


def open_channel(address: str, config: ClientConfig) -> Any:
    """A blocking gRPC channel to ``host:port``, encrypted where ``config`` has TLS files; the
    connection is made by the first call.
    """
    options = channel_options(config)
    if config.tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, channel_credentials(config.tls), options)


def with_deadline(request: Any, deadline: Deadline) -> Any:
    """``request`` with the server's own ``timeout`` (microseconds) set to what is left."""
    request.parameters["timeout"].int64_param = int(1e6 * deadline.remaining_s)
    return request


def backoffs(config: ClientConfig, deadline: Deadline, generator: random.Random) -> Iterator[float]:
    """Pauses before the second, third, ... attempt; ends when attempts or time run out."""
    for attempt in range(config.max_attempts - 1):
        longest = min(config.backoff_s * 2**attempt, _LONGEST_BACKOFF_S)
        pause = longest * generator.uniform(0.5, 1.0)
        if pause >= deadline.remaining_s:
            return
        yield pause


def error_from_rpc(
    code: grpc.StatusCode, details: str, *, address: str, deadline: Deadline
) -> WeakSamError:
    """The exception to raise for a failed call, with what to do about it."""
    known = error_from_text(details)
    if known is not None:
        return known
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return ServerUnavailableError(
                f"no server answers at {address} ({details}); start one with `weaksam serve`, or "
                "check address, port and TLS"
            )
        case grpc.StatusCode.NOT_FOUND:
            return _NotServedError(
                f"the server at {address} does not serve this ({details}); "
                "`weaksam models` lists what it serves"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return InferenceTimeoutError(
                f"no answer within {deadline.timeout_s:g} s from {address}; allow more time, or "
                "send fewer requests at a time"
            )
        case grpc.StatusCode.INVALID_ARGUMENT:
            return ContractError(f"the server at {address} refused the request: {details}")
    return InferenceError(f"the server at {address} failed ({code.name}): {details}")


def may_retry(error: WeakSamError) -> bool:
    """The server has not begun to work on the request, and may on the next attempt."""
    return isinstance(error, ServerUnavailableError) and not isinstance(error, _NotServedError)


class _NotServedError(ServerUnavailableError):
    """The server is there, the model is not: trying again does not bring it."""
