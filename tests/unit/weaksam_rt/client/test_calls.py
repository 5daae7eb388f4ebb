import random

import grpc
import pytest
from tritonclient.grpc import service_pb2

from weaksam_rt.client import ClientConfig, ClientTls
from weaksam_rt.client._calls import (
    Deadline,
    backoffs,
    channel_options,
    error_from_rpc,
    may_retry,
    with_deadline,
)
from weaksam_rt.errors import (
    ContractError,
    ImageError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
)


def error(code, details):
    deadline = Deadline.after(5.0)
    return error_from_rpc(code, details, address="host:8001", deadline=deadline)


@pytest.mark.parametrize(
    ("code", "details", "kind", "words"),
    [
        ("UNAVAILABLE", "failed to connect", ServerUnavailableError, "host:8001.*weaksam serve"),
        ("NOT_FOUND", "unknown model", ServerUnavailableError, "weaksam models"),
        ("DEADLINE_EXCEEDED", "", InferenceTimeoutError, "within 5 s"),
        ("INVALID_ARGUMENT", "unexpected shape", ContractError, "unexpected shape"),
        ("INVALID_ARGUMENT", "[ImageError] truncated", ImageError, "^truncated$"),
        ("INTERNAL", "[InferenceError] engine broke", InferenceError, "^engine broke$"),
        ("UNAVAILABLE", "Request timeout expired", InferenceTimeoutError, "queue"),
        ("UNAVAILABLE", "Exceeds maximum queue size", ServerUnavailableError, "queue is full"),
        ("INTERNAL", "out of memory", InferenceError, "INTERNAL.*out of memory"),
    ],
)
def test_every_failure_has_its_kind_and_says_what_to_do(code, details, kind, words):
    failure = error(grpc.StatusCode[code], details)
    assert isinstance(failure, kind)
    with pytest.raises(kind, match=words):
        raise failure


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        ("UNAVAILABLE", "failed to connect", True),
        ("UNAVAILABLE", "Exceeds maximum queue size", True),
        ("UNAVAILABLE", "Request timeout expired", False),
        ("NOT_FOUND", "unknown model", False),
        ("DEADLINE_EXCEEDED", "", False),
        ("INTERNAL", "[InferenceError] engine broke", False),
    ],
)
def test_only_what_was_not_begun_and_can_change_is_sent_again(code, details, expected):
    assert may_retry(error(grpc.StatusCode[code], details)) is expected


def test_pauses_double_with_jitter_and_end_with_the_attempts():
    config = ClientConfig(max_attempts=5, backoff_s=0.1)
    pauses = list(backoffs(config, Deadline.after(1000.0), random.Random(0)))
    assert len(pauses) == 4
    for pause, longest in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert longest / 2 <= pause <= longest


def test_pauses_are_bounded_and_stay_within_the_deadline():
    config = ClientConfig(max_attempts=20, backoff_s=1.0)
    assert max(backoffs(config, Deadline.after(1000.0), random.Random(0))) <= 2
    assert list(backoffs(config, Deadline.after(0.4), random.Random(0))) == []


def test_one_attempt_means_no_pause():
    assert list(backoffs(ClientConfig(max_attempts=1), Deadline.after(9.0), random.Random(0))) == []


def test_the_server_is_told_how_much_time_is_left():
    request = with_deadline(service_pb2.ModelInferRequest(), Deadline.after(2.0))
    assert 1_900_000 < request.parameters["timeout"].int64_param <= 2_000_000


def test_a_passed_deadline_leaves_a_moment_for_grpc_to_say_so():
    assert Deadline(timeout_s=1.0, ends_at=0.0).remaining_s == 1e-3
    with pytest.raises(ValueError, match=r"timeout_s is 0\.0, expected above 0"):
        Deadline.after(0.0)


def test_messages_have_no_size_limit_and_grpc_does_not_retry_by_itself():
    options = dict(channel_options(ClientConfig(keepalive_s=20.0)))
    assert options["grpc.max_receive_message_length"] == -1
    assert options["grpc.enable_retries"] == 0
    assert options["grpc.keepalive_time_ms"] == 20_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"timeout_s": 0.0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"max_attempts": 0}, "max_attempts is 0, expected at least 1"),
        ({"keepalive_s": 1.0}, "keepalive_s is 1.0, expected at least 10"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ClientConfig(**setting)


def test_a_certificate_without_its_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="belong together"):
        ClientTls(certificate=tmp_path / "cert.pem")
