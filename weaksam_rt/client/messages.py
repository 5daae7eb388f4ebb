"""Requests and responses of the served pipelines as protocol messages; pure functions.

Both clients are built on these, so they cannot differ in what they send or understand.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from weaksam_rt.bytes_tensors import bytes_array, bytes_from_raw, raw_from_bytes
from weaksam_rt.client.results import (
    DetectResult,
    EncodedImage,
    EngineSummary,
    ProposeResult,
    ServedModel,
)
from weaksam_rt.contracts import (
    PIPELINE_CONTRACTS,
    WEAKSAM_DETECT,
    WEAKSAM_PROPOSE,
    WEAKSAM_SEGMENT,
    ModelContract,
)
from weaksam_rt.errors import ContractError, ImageError
from weaksam_rt.model_config import PASSPORTS_PARAMETER
from weaksam_rt.types import Detections, ImageSize, InstanceMasks, Proposals, SegmentResult

_T = TypeVar("_T")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[_T]):
    """A request and how to read its answer."""

    request: Any
    """``ModelInferRequest``."""
    parse: Callable[[Any], _T]
    """From ``ModelInferResponse``; raises ``ContractError`` if the answer is not understood."""


# ---------------------------------------------------------------------------------------------
# The three pipelines
# ---------------------------------------------------------------------------------------------


def detect_call(
    image: bytes,
    *,
    score_thresh: float | None = None,
    max_detections: int | None = None,
    with_masks: bool = False,
) -> Call[DetectResult]:
    """Ask ``weaksam_detect``; None leaves a value to the server."""
    inputs = {
        "image": bytes_array([image]),
        "score_thresh": _scalar(score_thresh, np.float32),
        "max_detections": _scalar(max_detections, np.int32),
        "with_masks": _scalar(with_masks or None, np.bool_),
    }
    return Call(
        request=infer_request(WEAKSAM_DETECT, _given(inputs)),
        parse=lambda response: _detect_result(response, with_masks=with_masks),
    )


def propose_call(image: bytes, tags: Sequence[str] | None = None) -> Call[ProposeResult]:
    """Ask ``weaksam_propose``; None lets the classifier choose the tags."""
    encoded = None if tags is None else bytes_array([tag.encode() for tag in tags])
    inputs = {"image": bytes_array([image]), "tags": encoded}
    return Call(request=infer_request(WEAKSAM_PROPOSE, _given(inputs)), parse=_propose_result)


def segment_call(
    image: bytes,
    *,
    point_coords: NDArray[Any] | None = None,
    point_labels: NDArray[Any] | None = None,
    boxes: NDArray[Any] | None = None,
    multimask: bool = False,
) -> Call[SegmentResult]:
    """Ask ``weaksam_segment``; see ``WeakSamPipeline.segment``."""
    inputs = {
        "image": bytes_array([image]),
        "point_coords": _array(point_coords, np.float32),
        "point_labels": _array(point_labels, np.int32),
        "boxes": _array(boxes, np.float32),
        "multimask": _scalar(multimask or None, np.bool_),
    }
    return Call(request=infer_request(WEAKSAM_SEGMENT, _given(inputs)), parse=_segment_result)


def _detect_result(response: Any, *, with_masks: bool) -> DetectResult:
    arrays = arrays_from_response(WEAKSAM_DETECT, response)
    image_size = _image_size(arrays)
    masks = None
    if with_masks:
        masks = InstanceMasks(rle_counts=tuple(arrays["mask_counts"]), image_size=image_size)
    return DetectResult(
        detections=Detections(
            boxes=arrays["boxes"],
            scores=arrays["scores"],
            labels=arrays["labels"].astype(np.int64),
            image_size=image_size,
            masks=masks,
        ),
        label_names=_texts(arrays["label_names"]),
        version=_version(response),
    )


def _propose_result(response: Any) -> ProposeResult:
    arrays = arrays_from_response(WEAKSAM_PROPOSE, response)
    proposals = Proposals(
        boxes=arrays["boxes"],
        scores=arrays["scores"],
        sources=arrays["sources"],
        image_size=_image_size(arrays),
    )
    return ProposeResult(
        proposals=proposals,
        used_tags=_texts(arrays["used_tags"]),
        version=_version(response),
    )


def _segment_result(response: Any) -> SegmentResult:
    arrays = arrays_from_response(WEAKSAM_SEGMENT, response)
    return SegmentResult(
        mask_counts=tuple(tuple(row) for row in arrays["mask_counts"]),
        boxes=arrays["boxes"],
        scores=arrays["scores"],
        stability_scores=arrays["stability_scores"],
        image_size=_image_size(arrays),
    )


# ---------------------------------------------------------------------------------------------
# Images and arrays
# ---------------------------------------------------------------------------------------------


def read_image_bytes(image: EncodedImage, max_bytes: int) -> bytes:
    """The file's bytes, refused here if no server would take them.

    Raises:
        ImageError: The file cannot be read, is empty, or is larger than ``max_bytes``.
    """
    if isinstance(image, Path):
        name = str(image)
        try:
            _check_size(name, image.stat().st_size, max_bytes)
            image = image.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read {name}: {error.strerror}") from error
        return image
    _check_size("the image", len(image), max_bytes)
    return image


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size == 0:
        raise ImageError(f"{name} is empty (0 bytes); send a JPEG, PNG or WebP file")
    if size > max_bytes:
        raise ImageError(
            f"{name} has {size:,} bytes, at most {max_bytes:,} are accepted; "
            "send it smaller or compressed more"
        )


def _scalar(value: float | int | bool | None, dtype: type[np.generic]) -> NDArray[Any] | None:
    return None if value is None else np.array([value], dtype)


def _array(value: NDArray[Any] | None, dtype: type[np.generic]) -> NDArray[Any] | None:
    return None if value is None else np.asarray(value, dtype)


def _given(inputs: Mapping[str, NDArray[Any] | None]) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in inputs.items() if array is not None}


def _texts(items: NDArray[np.object_]) -> tuple[str, ...]:
    return tuple(item.decode() for item in items)


def _version(response: Any) -> int:
    """The version of the model that answered; 0 where the server does not say."""
    return int(response.model_version or 0)


def _image_size(arrays: Arrays) -> ImageSize:
    height, width = (int(side) for side in arrays["image_size"])
    return height, width


# ---------------------------------------------------------------------------------------------
# The protocol
# ---------------------------------------------------------------------------------------------


def infer_request(contract: ModelContract, inputs: Arrays) -> Any:
    """A ``ModelInferRequest`` for one image.

    Args:
        contract: The model's; its batch axis, where it has one, is added here.
        inputs: Arrays without batch axis.

    Raises:
        ContractError: An array does not fit the contract.
    """
    batch = {n: array[None] if contract.is_batched else array for n, array in inputs.items()}
    contract.check_inputs(batch)
    request = service_pb2.ModelInferRequest(model_name=contract.name)
    for name, array in batch.items():
        tensor = request.inputs.add(name=name, datatype=contract.input(name).dtype)
        tensor.shape.extend(array.shape)
        request.raw_input_contents.append(_raw_from_array(array))
    return request


def arrays_from_response(contract: ModelContract, response: Any) -> dict[str, NDArray[Any]]:
    """The outputs of a ``ModelInferResponse`` by name, without batch axis.

    Raises:
        ContractError: The server's answer differs from the contract: client and server are of
            different versions.
    """
    arrays = {
        tensor.name: _array_from_raw(raw, tensor.datatype, tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    missing = {spec.name for spec in contract.outputs} - set(arrays)
    if missing:
        raise ContractError(
            f"{contract.name} answered without {sorted(missing)}: its version differs from this "
            "client's; install the same version of weaksam-rt on both sides"
        )
    contract.check_outputs(arrays)
    return {name: array[0] if contract.is_batched else array for name, array in arrays.items()}


def served_models(
    index: Any, summaries: Mapping[tuple[str, str], EngineSummary] | None = None
) -> list[ServedModel]:
    """What a ``RepositoryIndexResponse`` lists, by name and version.

    Args:
        index: The response.
        summaries: Of engines, by model and version.
    """
    models = [
        ServedModel(
            name=model.name,
            version=model.version,
            is_ready=model.state == "READY",
            reason=model.reason,
            summary=(summaries or {}).get((model.name, model.version)),
        )
        for model in index.models
    ]
    return sorted(models, key=lambda model: (model.name, int(model.version or 0)))


def ready_pipelines(index: Any) -> list[tuple[str, str]]:
    """Name and version of every pipeline that answers requests."""
    return [
        (model.name, model.version)
        for model in index.models
        if model.name in PIPELINE_CONTRACTS and model.state == "READY"
    ]


def engine_summaries(response: Any) -> dict[tuple[str, str], EngineSummary]:
    """What a pipeline's ``ModelConfigResponse`` says about the engines that it calls, by model and
    version; empty if it says nothing.

    Raises:
        ContractError: It says something that this client does not understand.
    """
    text = response.config.parameters[PASSPORTS_PARAMETER].string_value
    if not text:
        return {}
    try:
        return {
            (model, str(content["version"])): EngineSummary(
                engine=content["engine"],
                precision=content["precision"],
                parity=content["parity"],
                ap50=content["ap50"],
                created_at=content["created_at"],
                changes=tuple(content["changes"]),
            )
            for model, content in json.loads(text).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(
            f"{response.config.name} describes its engines in a way that this client does not "
            f"know ({error}); install the same version of weaksam-rt on both sides"
        ) from error


def _raw_from_array(array: NDArray[Any]) -> bytes:
    if array.dtype == np.object_:
        return raw_from_bytes(array)
    return array.tobytes()


def _array_from_raw(raw: bytes, datatype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if datatype == "BYTES":
        return bytes_from_raw(raw).reshape(shape)
    dtype = _NUMPY_DTYPES.get(datatype)
    if dtype is None:
        raise ContractError(f"the server answered with {datatype}, which no contract has")
    return np.frombuffer(raw, dtype).reshape(shape)


_NUMPY_DTYPES: dict[str, type[np.generic]] = {
    spec.dtype: spec.numpy_dtype.type
    for contract in (WEAKSAM_DETECT, WEAKSAM_PROPOSE, WEAKSAM_SEGMENT)
    for spec in contract.outputs
}
