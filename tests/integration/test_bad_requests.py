"""Every bad request gets an error that says what was wrong; the server and its other requests go
on.
"""

import asyncio
import socket
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.integration.pictures import (
    JPEG,
    PNG,
    animated,
    bomb_png,
    encoded,
    huge_jpeg_header,
    scene,
)
from weaksam_rt.bytes_tensors import bytes_array, raw_from_bytes
from weaksam_rt.client import AsyncWeakSamClient, ClientConfig, WeakSamClient
from weaksam_rt.errors import (
    ImageError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
    WeakSamError,
)

pytestmark = pytest.mark.integration

BAD_IMAGES = {
    "not an image": (b"this is a letter, not a picture", "not an image"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "damaged or incomplete"),
    "truncated png": (PNG[: len(PNG) // 2], "damaged or incomplete"),
    "header only": (JPEG[:4], "not an image|damaged"),
    "one pixel": (encoded(scene()[:1, :1]), "1x1 pixels; both sides must be at least"),
    "20000 x 20000 jpeg": (huge_jpeg_header(), "400,000,000|too large"),
    "20000 x 20000 png": (bomb_png(), "400,000,000|too large"),
    "decompression bomb": (bomb_png(30_000), "900,000,000|too large"),
    "animated": (animated(), "animated"),
}


@pytest.fixture(autouse=True)
def _server_still_answers(server):
    yield
    assert server.is_alive
    with WeakSamClient(server.grpc_address) as client:
        assert client.detect(PNG).label_names == ("red", "blue")


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_with_its_reason(client, name):
    image, reason = BAD_IMAGES[name]
    with pytest.raises(ImageError, match=reason):
        client.detect(image)


@pytest.mark.parametrize("call", ["propose", "segment"])
def test_every_pipeline_refuses_a_bad_image(client, call):
    prompts = {"boxes": np.array([[8, 8, 90, 90]], np.float32)} if call == "segment" else {}
    with pytest.raises(ImageError, match="not an image"):
        getattr(client, call)(b"this is a letter, not a picture", **prompts)


def test_huge_images_cost_no_memory(server, client):
    before = peak_memory_mb(server.pid)
    for name in ("20000 x 20000 jpeg", "20000 x 20000 png", "decompression bomb"):
        with pytest.raises(ImageError):
            client.detect(BAD_IMAGES[name][0])
    assert peak_memory_mb(server.pid) - before < 50


def test_good_requests_succeed_beside_bad_ones(server):
    bad = [image for image, _ in BAD_IMAGES.values()]
    images = [image for other in bad for image in (PNG, other, JPEG, other)] * 2

    async def ask():
        async with AsyncWeakSamClient(server.grpc_address) as client:
            return await asyncio.gather(*map(client.detect, images), return_exceptions=True)

    answers = asyncio.run(ask())
    assert len(answers) == 8 * len(bad)
    for image, answer in zip(images, answers, strict=True):
        if image in bad:
            assert isinstance(answer, ImageError)
        else:
            assert answer.label_names == ("red", "blue")


def test_an_empty_tag_list_is_refused(client):
    with pytest.raises(InferenceError, match=r"tags is empty.*red.*green.*blue"):
        client.propose(PNG, [])


def test_an_unknown_tag_is_refused_with_the_known_ones(client):
    with pytest.raises(InferenceError, match=r"unknown tag 'Katze'.*red.*green.*blue"):
        client.propose(PNG, ["red", "Katze"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"score_thresh": 1.5}, r"score_thresh must be in \[0, 1\], got 1.5"),
        ({"score_thresh": float("nan")}, "score_thresh must be in"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(client, options, reason):
    with pytest.raises(InferenceError, match=reason):
        client.detect(PNG, **options)


def test_segmentation_without_a_prompt_is_refused(client):
    with pytest.raises(InferenceError, match=r"point_coords|prompt"):
        client.segment(PNG)


# ---------------------------------------------------------------------------------------------
# Below the client: what any other gRPC client could send
# ---------------------------------------------------------------------------------------------


def raw_call(server, model, tensors):
    """Send tensors as they are: (name, datatype, shape, content)."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, shape, content in tensors:
        request.inputs.add(name=name, datatype=datatype).shape.extend(shape)
        request.raw_input_contents.append(content)
    with grpc.insecure_channel(server.grpc_address) as channel:
        return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)


IMAGE = ("image", "BYTES", [1, 1], raw_from_bytes(bytes_array([PNG])))
TWO_IMAGES = ("image", "BYTES", [2, 1], raw_from_bytes(bytes_array([PNG, PNG])))
MALFORMED = {
    "wrong dtype": ("weaksam_detect", [("image", "FP32", [1, 4], bytes(16))], "data-type"),
    "wrong rank": ("weaksam_detect", [("image", "BYTES", [1], IMAGE[3])], "shape"),
    "wrong shape": ("weaksam_detect", [("image", "BYTES", [1, 2], TWO_IMAGES[3])], "shape"),
    "no image": ("weaksam_detect", [], "expected"),
    "unknown input": ("weaksam_detect", [IMAGE, ("x", "FP32", [1, 1], bytes(4))], "unexpected"),
    "two images": ("weaksam_detect", [TWO_IMAGES], "got 2 images in one request, expected 1"),
    "bytes cut": ("weaksam_detect", [("image", "BYTES", [1, 1], IMAGE[3][:-5])], "image"),
    "engine dtype": (
        "detector",
        [("image", "FP32", [1, 320, 320, 3], bytes(4 * 320 * 320 * 3))],
        "data-type",
    ),
    "engine shape": ("detector", [("image", "UINT8", [1, 8, 8, 3], bytes(192))], "shape"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_an_invalid_argument(server, name):
    model, tensors, reason = MALFORMED[name]
    with pytest.raises(grpc.RpcError, match=f"(?s)INVALID_ARGUMENT.*{reason}"):
        raw_call(server, model, tensors)


def test_an_unknown_model_is_not_found(server):
    with pytest.raises(grpc.RpcError, match=r"unknown model.*weaksam_guess"):
        raw_call(server, "weaksam_guess", [IMAGE])


def test_only_the_outputs_asked_for_are_sent(server):
    request = service_pb2.ModelInferRequest(model_name="detector")
    request.inputs.add(name="image", datatype="UINT8").shape.extend([1, 320, 320, 3])
    request.raw_input_contents.append(bytes(320 * 320 * 3))
    request.outputs.add(name="scores")
    with grpc.insecure_channel(server.grpc_address) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert [output.name for output in response.outputs] == ["scores"]


# ---------------------------------------------------------------------------------------------
# Time and absence
# ---------------------------------------------------------------------------------------------


def test_a_passed_deadline_is_a_timeout(client):
    large = encoded(np.zeros((3000, 3000, 3), np.uint8))
    start = time.monotonic()
    with pytest.raises(InferenceTimeoutError, match=r"0\.002 s|deadline"):
        client.detect(large, timeout_s=0.002)
    assert time.monotonic() - start < 1


def test_a_server_that_is_not_there_is_named_quickly():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        with (
            WeakSamClient(address, ClientConfig(max_attempts=3, backoff_s=0.05)) as client,
            pytest.raises(ServerUnavailableError, match=f"{address}.*weaksam serve"),
        ):
            client.detect(PNG)
        assert time.monotonic() - start < 3


def test_errors_are_all_ours(client):
    for image, _ in BAD_IMAGES.values():
        with pytest.raises(WeakSamError):
            client.detect(image)


def peak_memory_mb(pid):
    """The sum of the highest resident sizes of the server and the processes that it started."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
        except OSError:
            continue
        if int(fields["PPid"]) == pid or int(fields["Pid"]) == pid:
            total += int(fields.get("VmHWM", "0 kB").split()[0]) / 1024
    return total
