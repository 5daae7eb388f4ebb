"""One interface to the prompt chain, and the one place where its implementation is chosen."""

import logging
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.errors import BackendUnavailableError
from weaksam_rt.preprocessing import ModelFrame
from weaksam_rt.prompt_clustering import _plan, _reference
from weaksam_rt.prompt_clustering._low_res_masks import inside_down_columns
from weaksam_rt.prompt_clustering._low_res_peaks import low_res_peaks
from weaksam_rt.prompt_clustering.batch import EncodedMasks, MapBatch, MaskSummary, PromptBatch
from weaksam_rt.prompt_clustering.config import BackendName, ClusteringConfig
from weaksam_rt.prompt_clustering.device_arrays import AnyArray, host_array
from weaksam_rt.types import PointPrompts

if TYPE_CHECKING:
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

_GUESSED_RUNS_OF_COLUMN = 4
"""Enough for a column that crosses a mask twice."""
_LOGGER = logging.getLogger(__name__)
_MAKING = threading.Lock()


@runtime_checkable
class PromptBackend(Protocol):
    """Runs the prompt chain. Arguments are checked by the caller."""

    def prompt_batch(self, batch: MapBatch, config: ClusteringConfig) -> PromptBatch:
        """Maps of a batch to packed prompts."""
        ...

    def point_prompts(self, batch: MapBatch, config: ClusteringConfig) -> PointPrompts:
        """The point prompts of ``prompt_batch`` alone."""
        ...

    def summarize_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
    ) -> MaskSummary:
        """Box, stability score and area of each mask."""
        ...

    def encode_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
        *,
        with_bits: bool = True,
    ) -> EncodedMasks:
        """Run lengths and, if wanted, bits of each mask."""
        ...

    def class_nms(
        self,
        boxes: AnyArray,
        scores: AnyArray,
        labels: AnyArray,
        iou_thresh: float,
    ) -> NDArray[np.int64]:
        """Indices of the boxes that stay, best first."""
        ...


class ReferenceBackend:
    """NumPy: the definition, with peaks and masks found on a part of the pixels."""

    def prompt_batch(self, batch: MapBatch, config: ClusteringConfig) -> PromptBatch:
        """Peaks of all maps together, then image by image."""
        return _reference.pack_batch(self._images(batch, config), batch.frames)

    def point_prompts(self, batch: MapBatch, config: ClusteringConfig) -> PointPrompts:
        """The same without SAM's prompts."""
        return PointPrompts.concatenate(self._images(batch, config))

    def _images(self, batch: MapBatch, config: ClusteringConfig) -> list[PointPrompts]:
        peaks = _reference.batch_peaks(
            batch,
            cam_peaks=config.cam_peaks,
            cross_peaks=config.cross_peaks,
            find_peaks=low_res_peaks,
        )
        return [
            _reference.image_prompts(batch, image, peaks, config.points_per_cluster)
            for image in range(batch.num_images)
        ]

    def summarize_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
    ) -> MaskSummary:
        """Image by image."""
        return _reference.summarize_masks(host_array("logits", logits), mask_images, frames)

    def encode_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
        *,
        with_bits: bool = True,
    ) -> EncodedMasks:
        """Mask by mask."""
        return _reference.encode_masks(
            host_array("logits", logits),
            mask_images,
            frames,
            with_bits=with_bits,
            upsample=inside_down_columns,
        )

    def class_nms(
        self,
        boxes: AnyArray,
        scores: AnyArray,
        labels: AnyArray,
        iou_thresh: float,
    ) -> NDArray[np.int64]:
        """Block by block."""
        return _reference.class_nms(
            host_array("boxes", boxes),
            host_array("scores", scores),
            host_array("labels", labels),
            iou_thresh,
        )


class KernelBackend:
    """The kernels of ``csrc``, wherever the executor runs them."""

    def __init__(
        self,
        executor: _plan.Executor,
        *,
        capacity: _plan.PromptCapacity | None = None,
        fallback: PromptBackend | None = None,
    ) -> None:
        """Take the executor.

        Args:
            executor: Runs the kernels.
            capacity: Bounds the results of a batch; None: room for all that can be.
            fallback: Takes batches on the host that the kernels do not take; None: an error.
        """
        self._executor = executor
        self._capacity = capacity
        self._fallback = fallback
        self._has_fallen_back = False

    def prompt_batch(self, batch: MapBatch, config: ClusteringConfig) -> PromptBatch:
        """All images at once."""
        if len(batch.map_images) == 0:
            empty = [PointPrompts.concatenate([])] * batch.num_images
            return _reference.pack_batch(empty, batch.frames)
        try:
            plan, capacity = self._prompt_plan(batch, config, with_sam=True)
        except _plan.KernelLimitError as error:
            return self._instead(batch, error).prompt_batch(batch, config)
        return _plan.read_prompts(self._executor.run(plan), capacity)

    def point_prompts(self, batch: MapBatch, config: ClusteringConfig) -> PointPrompts:
        """The same without reading SAM's prompts back."""
        if len(batch.map_images) == 0:
            return PointPrompts.concatenate([])
        try:
            plan, capacity = self._prompt_plan(batch, config, with_sam=False)
        except _plan.KernelLimitError as error:
            return self._instead(batch, error).point_prompts(batch, config)
        return _plan.read_points(self._executor.run(plan), capacity)

    def _prompt_plan(
        self, batch: MapBatch, config: ClusteringConfig, *, with_sam: bool
    ) -> tuple[_plan.Plan, _plan.PromptCapacity]:
        capacity = self._capacity or _plan.full_capacity(batch, config)
        plan = _plan.plan_prompts(batch, config, capacity=capacity, with_sam=with_sam)
        return plan, capacity

    def _instead(self, batch: MapBatch, error: _plan.KernelLimitError) -> PromptBackend:
        """What takes the batch instead; says so, once."""
        if self._fallback is None or not isinstance(batch.maps, np.ndarray):
            raise error
        if not self._has_fallen_back:
            _LOGGER.info("prompt clustering: backend reference for such batches, since %s", error)
            self._has_fallen_back = True
        return self._fallback

    def summarize_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
    ) -> MaskSummary:
        """One block a mask."""
        if len(logits) == 0:
            return _reference.summarize_masks(_no_logits(logits), mask_images, frames)
        plan = _plan.plan_mask_summary(logits, mask_images, frames)
        return _plan.read_mask_summary(self._executor.run(plan))

    def encode_masks(
        self,
        logits: AnyArray,
        mask_images: NDArray[np.int32],
        frames: Sequence[ModelFrame],
        *,
        with_bits: bool = True,
    ) -> EncodedMasks:
        """All masks at once; a second time where they have more runs than was guessed."""
        if len(logits) == 0:
            return _reference.encode_masks(
                _no_logits(logits), mask_images, frames, with_bits=with_bits
            )
        widths = np.array([frame.image_size[1] for frame in frames], np.int64)
        capacity = int((_GUESSED_RUNS_OF_COLUMN * widths + 1)[mask_images].sum())
        while True:
            plan = _plan.plan_mask_encoding(
                logits, mask_images, frames, run_capacity=capacity, with_bits=with_bits
            )
            outputs = self._executor.run(plan)
            needed = int(outputs["run_offsets"][-1])
            if needed <= capacity:
                return _plan.read_mask_encoding(plan, outputs)
            capacity = needed

    def class_nms(
        self,
        boxes: AnyArray,
        scores: AnyArray,
        labels: AnyArray,
        iou_thresh: float,
    ) -> NDArray[np.int64]:
        """By bit masks."""
        if len(boxes) == 0:
            return np.zeros(0, np.int64)
        return _plan.read_nms(self._executor.run(_plan.plan_nms(boxes, scores, labels, iou_thresh)))


_REFERENCE = ReferenceBackend()


def _no_logits(logits: AnyArray) -> NDArray[np.float32]:
    return np.zeros(logits.shape, np.float32)


def prompt_backend(name: BackendName, device: int = 0) -> PromptBackend:
    """The backend of this name; made once for each GPU.

    Args:
        name: ``reference``, ``cuda`` or ``auto``.
        device: Number of the GPU, for ``cuda`` and ``auto``.

    Raises:
        BackendUnavailableError: ``cuda`` cannot run here; the message says what is missing.
    """
    # One at a time: threads that ask together must not take a GPU twice.
    with _MAKING:
        if name == "reference":
            return _REFERENCE
        return _cuda_backend(device) if name == "cuda" else _auto_backend(device)


@cache
def kernel_executor(device: int) -> "CudaExecutor":
    """What runs kernels on this GPU; made once.

    Raises:
        BackendUnavailableError: They cannot run there.
    """
    # Imported late: it looks for a driver.
    from weaksam_rt.prompt_clustering._cuda import CudaExecutor

    executor = CudaExecutor(device)
    _LOGGER.info("prompt clustering: backend cuda on GPU %d", device)
    return executor


@cache
def _cuda_backend(device: int) -> PromptBackend:
    return KernelBackend(kernel_executor(device))


@cache
def _auto_backend(device: int) -> PromptBackend:
    try:
        return KernelBackend(kernel_executor(device), fallback=_REFERENCE)
    except BackendUnavailableError as error:
        _LOGGER.info("prompt clustering: backend reference, since %s", error)
        return _REFERENCE
