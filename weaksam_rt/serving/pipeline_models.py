"""The pipelines as Triton models: image bytes in, detections, proposals or masks out.

Each calls its member models through the server, so that images of different requests meet in the
members' queues.
"""

import asyncio
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.triton_bls import BlsBackend
from weaksam_rt.contracts import (
    WEAKSAM_DETECT,
    WEAKSAM_PROPOSE,
    WEAKSAM_SEGMENT,
    ModelContract,
)
from weaksam_rt.errors import ContractError, ImageError, InferenceTimeoutError
from weaksam_rt.images import decode_image, decode_reduced
from weaksam_rt.model_repository import PIPELINE_NAME, member_contracts, read_pipeline_file
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline
from weaksam_rt.serving.encoding import (
    outputs_of_detections,
    outputs_of_proposals,
    outputs_of_segments,
)
from weaksam_rt.serving.requests import arrays_of, error_response_of, response_of


class _PipelineModel(ABC):
    """Triton's interface to one call of ``WeakSamPipeline``."""

    contract: ModelContract
    calls_side_by_side: bool = False
    """Whether one image has several calls of member models in flight."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read what lies beside ``model.py`` and wake the image decoder."""
        folder = Path(args["model_repository"]) / args["model_version"]
        file = read_pipeline_file(folder / PIPELINE_NAME)
        self._models = file.models
        contracts = member_contracts(self._models)
        self._waiting, self._overlapping = (
            WeakSamPipeline(
                BlsBackend(contracts, file.members, is_blocking=is_blocking),
                self._models,
                file.config,
            )
            for is_blocking in (True, False)
        )
        self._loop = asyncio.new_event_loop()
        decode_image(_small_jpeg())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: with its outputs, or with its own error."""
        is_alone = len(requests) == 1 and not self.calls_side_by_side
        pipeline = self._waiting if is_alone else self._overlapping
        return self._loop.run_until_complete(self._respond_all(pipeline, requests))

    def finalize(self) -> None:
        """Triton takes the model down."""
        self._loop.close()

    async def _respond_all(self, pipeline: WeakSamPipeline, requests: Sequence[Any]) -> list[Any]:
        return list(await asyncio.gather(*(self._respond(pipeline, r) for r in requests)))

    async def _respond(self, pipeline: WeakSamPipeline, request: Any) -> Any:
        try:
            if request.is_cancelled():  # nobody waits any more: leave the cores to the others
                raise InferenceTimeoutError("the client gave up before the work began")
            arrays = _without_batch_axis(arrays_of(request, self.contract), self.contract)
            data = _encoded_image(arrays)
            outputs = await self._answer(pipeline, self._models, data, arrays)
            wanted = request.requested_output_names() or outputs
            return response_of({name: outputs[name][None] for name in wanted})
        except Exception as error:
            return error_response_of(error, self.contract.name)

    @staticmethod
    @abstractmethod
    async def _answer(
        pipeline: WeakSamPipeline,
        models: PipelineModels,
        data: bytes,
        arrays: Arrays,
    ) -> dict[str, NDArray[Any]]:
        """Outputs without batch axis, from the image's bytes and the other inputs."""


class DetectModel(_PipelineModel):
    """``weaksam_detect``."""

    contract = WEAKSAM_DETECT

    @staticmethod
    async def _answer(
        pipeline: WeakSamPipeline,
        models: PipelineModels,
        data: bytes,
        arrays: Arrays,
    ) -> dict[str, NDArray[Any]]:
        with_masks = bool(_scalar(arrays, "with_masks"))
        image = decode_reduced(data, pipeline.longest_side_seen(with_masks=with_masks))
        detections = await pipeline.detect(
            image.pixels,
            image_size=image.image_size,
            score_thresh=_scalar(arrays, "score_thresh"),
            max_detections=_scalar(arrays, "max_detections"),
            with_masks=with_masks,
        )
        assert models.detector is not None
        return outputs_of_detections(detections, models.detector.class_names)


class ProposeModel(_PipelineModel):
    """``weaksam_propose``."""

    contract = WEAKSAM_PROPOSE
    calls_side_by_side = True  # SAM's encoder and the classifier

    @staticmethod
    async def _answer(
        pipeline: WeakSamPipeline,
        models: PipelineModels,
        data: bytes,
        arrays: Arrays,
    ) -> dict[str, NDArray[Any]]:
        del models
        tags = None if "tags" not in arrays else [_text(tag) for tag in arrays["tags"]]
        return outputs_of_proposals(await pipeline.propose(decode_image(data), tags))


class SegmentModel(_PipelineModel):
    """``weaksam_segment``."""

    contract = WEAKSAM_SEGMENT

    @staticmethod
    async def _answer(
        pipeline: WeakSamPipeline,
        models: PipelineModels,
        data: bytes,
        arrays: Arrays,
    ) -> dict[str, NDArray[Any]]:
        del models
        result = await pipeline.segment(
            decode_image(data),
            point_coords=arrays.get("point_coords"),
            point_labels=arrays.get("point_labels"),
            boxes=arrays.get("boxes"),
            multimask=bool(_scalar(arrays, "multimask")),
        )
        return outputs_of_segments(result)


def _without_batch_axis(arrays: Arrays, contract: ModelContract) -> dict[str, NDArray[Any]]:
    size = len(arrays["image"])
    if size != 1:
        raise ContractError(
            f"{contract.name}: got {size} images in one request, expected 1; send one request for "
            "each image, the server batches them"
        )
    return {name: array[0] for name, array in arrays.items()}


def _encoded_image(arrays: Arrays) -> bytes:
    data = arrays["image"][0]
    if not isinstance(data, bytes):
        raise ImageError(f"expected the image's bytes, got {type(data).__name__}")
    return data


def _scalar(arrays: Arrays, name: str) -> Any:
    return arrays[name][0].item() if name in arrays else None


def _text(item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise ContractError(f"a tag is not UTF-8: {item!r}") from error


def _small_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()
