import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from weaksam_rt.bytes_tensors import bytes_array, bytes_from_raw, raw_from_bytes
from weaksam_rt.client.messages import (
    arrays_from_response,
    detect_call,
    infer_request,
    propose_call,
    read_image_bytes,
    segment_call,
    served_models,
)
from weaksam_rt.contracts import WEAKSAM_DETECT, WEAKSAM_PROPOSE, WEAKSAM_SEGMENT
from weaksam_rt.errors import ContractError, ImageError

IMAGE = b"\xff\xd8 a picture \x00"


def sent(request):
    """The request's inputs as the server reads them: name to (datatype, shape, raw)."""
    return {
        tensor.name: (tensor.datatype, list(tensor.shape), raw)
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def response(contract, arrays):
    """What a server with this contract answers."""
    message = service_pb2.ModelInferResponse(model_name=contract.name)
    for name, array in arrays.items():
        tensor = message.outputs.add(name=name, datatype=contract.output(name).dtype)
        tensor.shape.extend([1, *array.shape])
        is_bytes = array.dtype == np.object_
        message.raw_output_contents.append(raw_from_bytes(array) if is_bytes else array.tobytes())
    return message


def detect_arrays(n, num_masks=0):
    return {
        "boxes": np.arange(4 * n, dtype=np.float32).reshape(n, 4),
        "scores": np.full(n, 0.5, np.float32),
        "labels": np.ones(n, np.int32),
        "label_names": bytes_array(["grüner Hund".encode()] * n),
        "mask_counts": bytes_array([b"counts"] * num_masks),
        "image_size": np.array([480, 640], np.int32),
    }


def test_only_what_is_given_is_sent():
    assert list(sent(detect_call(IMAGE).request)) == ["image"]
    inputs = sent(detect_call(IMAGE, score_thresh=0.5, max_detections=3, with_masks=True).request)
    assert inputs["score_thresh"] == ("FP32", [1, 1], np.float32(0.5).tobytes())
    assert inputs["max_detections"] == ("INT32", [1, 1], np.int32(3).tobytes())
    assert inputs["with_masks"] == ("BOOL", [1, 1], b"\x01")


def test_the_image_travels_as_its_own_bytes():
    datatype, shape, raw = sent(detect_call(IMAGE).request)["image"]
    assert (datatype, shape) == ("BYTES", [1, 1])
    assert list(bytes_from_raw(raw)) == [IMAGE]


def test_no_tags_and_an_empty_list_of_tags_differ():
    assert "tags" not in sent(propose_call(IMAGE).request)
    assert sent(propose_call(IMAGE, []).request)["tags"] == ("BYTES", [1, 0], b"")
    raw = sent(propose_call(IMAGE, ["grüner Hund"]).request)["tags"][2]
    assert bytes_from_raw(raw)[0].decode() == "grüner Hund"


def test_prompts_of_any_number_type_are_sent_as_the_contract_says():
    call = segment_call(
        IMAGE, point_coords=np.array([[[1, 2]]]), point_labels=np.array([[1]], np.int64)
    )
    inputs = sent(call.request)
    assert inputs["point_coords"][:2] == ("FP32", [1, 1, 1, 2])
    assert inputs["point_labels"][:2] == ("INT32", [1, 1, 1])


def test_prompts_of_a_wrong_shape_are_refused_before_they_are_sent():
    with pytest.raises(ContractError, match=r"weaksam_segment\.boxes: expected FP32"):
        segment_call(IMAGE, boxes=np.zeros(4))


def test_an_unknown_input_is_refused():
    with pytest.raises(ContractError, match="no input 'picture'"):
        infer_request(WEAKSAM_DETECT, {"picture": bytes_array([IMAGE])})


def test_an_answer_becomes_detections_with_names():
    result = detect_call(IMAGE).parse(response(WEAKSAM_DETECT, detect_arrays(2)))
    assert len(result) == 2
    assert result.label_names == ("grüner Hund", "grüner Hund")
    assert result.detections.image_size == (480, 640)
    assert result.detections.labels.dtype == np.int64
    assert result.detections.masks is None


def test_masks_are_there_when_asked_for_even_if_there_are_none():
    call = detect_call(IMAGE, with_masks=True)
    assert len(call.parse(response(WEAKSAM_DETECT, detect_arrays(2, 2))).detections.masks) == 2
    assert len(call.parse(response(WEAKSAM_DETECT, detect_arrays(0))).detections.masks) == 0


def test_proposals_and_segments_are_read():
    arrays = {
        "boxes": np.zeros((3, 4), np.float32),
        "scores": np.ones(3, np.float32),
        "sources": np.array([0, 1, 3], np.int32),
        "used_tags": bytes_array([b"cat"]),
        "image_size": np.array([9, 8], np.int32),
    }
    proposed = propose_call(IMAGE).parse(response(WEAKSAM_PROPOSE, arrays))
    assert proposed.used_tags == ("cat",)
    assert proposed.proposals.image_size == (9, 8)
    arrays = {
        "mask_counts": bytes_array([b"a", b"b"]).reshape(2, 1),
        "boxes": np.zeros((2, 1, 4), np.float32),
        "scores": np.ones((2, 1), np.float32),
        "stability_scores": np.ones((2, 1), np.float32),
        "image_size": np.array([9, 8], np.int32),
    }
    boxes = np.zeros((2, 4), np.float32)
    segmented = segment_call(IMAGE, boxes=boxes).parse(response(WEAKSAM_SEGMENT, arrays))
    assert segmented.mask_counts == ((b"a",), (b"b",))


def test_an_answer_of_another_version_is_refused():
    arrays = detect_arrays(1)
    del arrays["label_names"]
    with pytest.raises(ContractError, match=r"without \['label_names'\].*same version"):
        arrays_from_response(WEAKSAM_DETECT, response(WEAKSAM_DETECT, arrays))
    message = response(WEAKSAM_DETECT, detect_arrays(1))
    message.outputs[0].datatype = "FP64"
    with pytest.raises(ContractError, match="FP64"):
        arrays_from_response(WEAKSAM_DETECT, message)


def test_files_that_no_server_takes_are_not_sent(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGE)
    assert read_image_bytes(path, 100) == IMAGE
    assert read_image_bytes(IMAGE, 100) == IMAGE
    with pytest.raises(ImageError, match=r"image\.jpg has 14 bytes, at most 10"):
        read_image_bytes(path, 10)
    with pytest.raises(ImageError, match="has 14 bytes, at most 10"):
        read_image_bytes(IMAGE, 10)
    with pytest.raises(ImageError, match="empty"):
        read_image_bytes(b"", 10)
    with pytest.raises(ImageError, match=r"cannot read .*absent\.jpg: No such file"):
        read_image_bytes(tmp_path / "absent.jpg", 10)


def test_models_are_listed_by_name():
    index = service_pb2.RepositoryIndexResponse()
    index.models.add(name="b", version="1", state="UNAVAILABLE", reason="broken engine")
    index.models.add(name="a", version="2", state="READY")
    models = served_models(index)
    assert [(m.name, m.is_ready, m.reason) for m in models] == [
        ("a", True, ""),
        ("b", False, "broken engine"),
    ]


def test_the_client_needs_neither_torch_nor_an_image_library():
    program = (
        "import sys, weaksam_rt.client\n"
        "print(sorted({'torch', 'PIL', 'onnxruntime', 'pytriton', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    assert run.stdout.strip() == "[]"
