"""The way of an image through the models; no I/O, no server, the same code in training and
serving.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from weaksam_rt.backends.base import InferenceBackend
from weaksam_rt.boxes import batched_nms, clip_boxes
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    DETECTOR,
    NUM_MASK_TOKENS,
    PROMPT_CLUSTERING,
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    DetectorParameters,
    SamParameters,
    VitClassifierParameters,
    parameters_from_json,
    parameters_to_json,
)
from weaksam_rt.crops import Crop, image_crops
from weaksam_rt.errors import ContractError
from weaksam_rt.masks import (
    compress_runs,
    full_resolution_boxes,
    full_resolution_stability,
    masks_in_boxes,
    rle_boxes,
)
from weaksam_rt.preprocessing import (
    ModelFrame,
    maps_of_classes,
    resize_for_detector,
    resize_longest_side,
    resize_to_square,
)
from weaksam_rt.prompt_clustering import encode_masks, summarize_masks
from weaksam_rt.prompt_clustering.config import BackendName
from weaksam_rt.prompts import (
    SamPrompt,
    box_prompt,
    class_prompts,
    grid_prompts,
    pack_prompts,
    point_prompt,
    sam_prompts,
)
from weaksam_rt.proposals import (
    SOURCE_NAMES,
    PromptedBoxes,
    passes_scores,
    select_proposals,
)
from weaksam_rt.types import (
    Detections,
    ImageSize,
    InstanceMasks,
    PointPrompts,
    PromptSource,
    Proposals,
    SegmentResult,
)

_T = TypeVar("_T")
_SINGLE_MASK = slice(0, 1)
_MULTIMASK = slice(1, NUM_MASK_TOKENS)
_STABILITY_DOUBT = 0.1
"""More than the stability score of a mask changes with the mask's resolution: by 0.076 at most in
1,030 masks, 0.017 in 99 of 100."""
_MASK_PIXELS_AT_A_TIME = 2**26
"""Of masks at the image's resolution, which take an eighth of a byte each at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineModels:
    """Sizes and class names of the models at hand; None: not served."""

    detector: DetectorParameters | None = None
    vit_classifier: VitClassifierParameters | None = None
    sam: SamParameters | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        models = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: None if parameters is None else parameters_to_json(parameters)
            for name, parameters in models.items()
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "PipelineModels":
        """Read back what ``to_json`` wrote; raises ``ContractError`` for anything else."""
        models = {"detector": DETECTOR, "vit_classifier": VIT_CLASSIFIER, "sam": SAM_IMAGE_ENCODER}
        if unknown := set(content) - set(models):
            raise ContractError(f"unknown models {sorted(unknown)}; known: {sorted(models)}")
        parsed: dict[str, Any] = {
            key: parameters_from_json(models[key], value)
            for key, value in content.items()
            if value is not None
        }
        return PipelineModels(**parsed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalResult:
    """Proposals of one image and the tags that steered them."""

    proposals: Proposals
    used_tags: tuple[str, ...]
    prompts: PointPrompts
    """All points that SAM was prompted with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Embedded:
    """An image that SAM has encoded."""

    embedding: NDArray[np.float32]
    """[1, d, h, w]."""
    frame: ModelFrame


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """One decoder call's answer for some prompts of one image."""

    positions: NDArray[np.int64]
    """[p], which prompts."""
    logits: NDArray[np.float32]
    """[p, 4, m, m]."""
    iou_predictions: NDArray[np.float32]
    """[p, 4]."""


class WeakSamPipeline:
    """Detection, proposals and segmentation of one image, over any backend."""

    def __init__(
        self, backend: InferenceBackend, models: PipelineModels, config: PipelineConfig
    ) -> None:
        """Wire the parts; nothing is loaded here."""
        self._backend = backend
        self._models = models
        self._config = config

    async def detect(
        self,
        image: NDArray[np.uint8],
        *,
        image_size: ImageSize | None = None,
        score_thresh: float | None = None,
        max_detections: int | None = None,
        with_masks: bool = False,
    ) -> Detections:
        """Boxes and, if asked for, masks of one image.

        Args:
            image: RGB uint8 [h, w, 3].
            image_size: (height, width) of the original, which boxes and masks refer to, if
                ``image`` is a smaller version of it; ``longest_side_seen`` says how small it may
                be.
            score_thresh: Lowest score to return, in [0, 1]; None: the configured one.
            max_detections: Most detections to return; None: the configured number.
            with_masks: The detector's own masks where it has a mask head, else SAM's, prompted
                with every box.

        Raises:
            ValueError: An argument is out of its range.
            ContractError: The models needed are not at hand.
        """
        config = self._config.detection
        thresh = config.score_thresh if score_thresh is None else score_thresh
        limit = config.max_detections if max_detections is None else max_detections
        if not 0 <= thresh <= 1:
            raise ValueError(f"score_thresh must be in [0, 1], got {thresh}")
        if limit < 1:
            raise ValueError(f"max_detections must be at least 1, got {limit}")
        detector = self._detector()
        asks_sam = with_masks and detector.mask_size == 0
        if asks_sam:
            self._sam()
        pixels, frame = resize_for_detector(image, detector.image_size, image_size=image_size)
        wanted = ["boxes", "scores", "labels"]
        if with_masks and detector.mask_size:
            wanted.append("mask_logits")
        answer = await self._backend.infer(DETECTOR, {"image": pixels[None]}, wanted)
        detections = select_detections(
            answer["boxes"][0], answer["scores"][0], answer["labels"][0], frame,
            mask_logits=answer["mask_logits"][0] if "mask_logits" in wanted else None,
            score_thresh=thresh, nms_thresh=config.nms_thresh, max_detections=limit,
        )  # fmt: skip
        return await self._with_masks(image, detections) if asks_sam else detections

    def longest_side_seen(self, *, with_masks: bool) -> int:
        """The most pixels of an image's longest side that ``detect`` makes use of."""
        detector = self._detector()
        if with_masks and detector.mask_size == 0:
            return max(detector.image_size, self._sam().image_size)
        return detector.image_size

    async def propose(
        self, image: NDArray[np.uint8], tags: Sequence[str] | None = None
    ) -> ProposalResult:
        """Class-agnostic proposals of one image.

        Args:
            image: RGB uint8 [h, w, 3].
            tags: Names of the classes in the image; None: those that the classifier sees. A
                classifier that sees none leaves the grid prompts alone.

        Raises:
            ValueError: ``tags`` is empty or names an unknown class.
        """
        classifier = self._classifier()
        image_size = (image.shape[0], image.shape[1])
        class_ids = None if tags is None else _class_ids(tags, classifier.class_names)
        embedded, (used_ids, peaks) = await asyncio.gather(
            self._embed(image), self._peak_prompts(image, class_ids)
        )
        prompts, prompted = await self._boxes_of_image(image, embedded, peaks)
        return ProposalResult(
            proposals=select_proposals(prompted, image_size, self._config.proposals),
            used_tags=tuple(classifier.class_names[c] for c in used_ids),
            prompts=prompts,
        )

    async def prompted_boxes(
        self,
        image: NDArray[np.uint8],
        *,
        peaks: PointPrompts | None = None,
        tags: Sequence[str] | None = None,
    ) -> tuple[PointPrompts, PromptedBoxes]:
        """The prompts of one image and the boxes of the masks that they give, before any filter.

        Args:
            image: RGB uint8 [h, w, 3].
            peaks: Peaks of its maps, from whatever made them; None: from the classifier. The grid
                is added here.
            tags: For the classifier's peaks, as in ``propose``.

        Raises:
            ValueError: ``tags`` is empty or names an unknown class.
        """
        if peaks is None:
            names = self._classifier().class_names
            class_ids = None if tags is None else _class_ids(tags, names)
            _, peaks = await self._peak_prompts(image, class_ids)
        return await self._boxes_of_image(image, await self._embed(image), peaks)

    async def segment(
        self,
        image: NDArray[np.uint8],
        *,
        point_coords: NDArray[np.float32] | None = None,
        point_labels: NDArray[np.int32] | None = None,
        boxes: NDArray[np.float32] | None = None,
        multimask: bool = False,
    ) -> SegmentResult:
        """Masks for p prompts: points, a box, or both.

        Args:
            image: RGB uint8 [h, w, 3].
            point_coords: [p, k, 2], (x, y) in pixels of the image.
            point_labels: [p, k], 1 object, 0 background, -1 to leave a point out.
            boxes: [p, 4], XYXY in pixels of the image.
            multimask: Three masks for each prompt instead of one.

        Raises:
            ValueError: No prompt, or the arrays do not belong together.
        """
        prompts = _segment_prompts(point_coords, point_labels, boxes)
        embedded = await self._embed(image)
        chosen = _MULTIMASK if multimask else _SINGLE_MASK
        return await self._full_masks(embedded, prompts, chosen)

    # -- detector ------------------------------------------------------------------------------

    async def _with_masks(self, image: NDArray[np.uint8], detections: Detections) -> Detections:
        prompts = [box_prompt(box) for box in detections.boxes]
        embedded = await self._embed(image, detections.image_size) if prompts else None
        counts: tuple[bytes, ...] = ()
        if embedded is not None:
            result = await self._full_masks(embedded, prompts, _SINGLE_MASK)
            counts = tuple(prompt_counts[0] for prompt_counts in result.mask_counts)
        masks = InstanceMasks(rle_counts=counts, image_size=detections.image_size)
        return replace(detections, masks=masks)

    # -- prompts -------------------------------------------------------------------------------

    def _used_prompts(self, image_size: ImageSize, peaks: PointPrompts) -> PointPrompts:
        config = self._config.proposals
        parts = [grid_prompts(config.points_per_side, image_size), peaks]
        used = [SOURCE_NAMES.index(name) for name in config.sources]
        prompts = PointPrompts.concatenate(parts)
        return prompts.subset(np.flatnonzero(np.isin(prompts.sources, used)))

    async def _peak_prompts(
        self, image: NDArray[np.uint8], class_ids: Sequence[int] | None
    ) -> tuple[Sequence[int], PointPrompts]:
        pixels = resize_to_square(image, self._classifier().image_size)[None]
        if self._config.flip:
            pixels = np.concatenate([pixels, pixels[:, :, ::-1]])
        answer = await self._backend.infer(VIT_CLASSIFIER, {"image": pixels})
        if class_ids is None:
            is_present = answer["logits"][0] > self._config.present_logit_thresh
            class_ids = [int(c) for c in np.flatnonzero(is_present)]
        if not class_ids:
            return class_ids, PointPrompts.concatenate([])
        clustered = await self._backend.infer(
            PROMPT_CLUSTERING,
            {
                **maps_of_classes(answer, class_ids),
                "class_ids": np.array(class_ids, np.int32),
                "image_size": np.array(image.shape[:2], np.int32),
            },
        )
        return class_ids, PointPrompts(
            points=clustered["points"],
            scores=clustered["scores"],
            class_ids=clustered["class_ids"],
            sources=clustered["sources"],
        )

    # -- SAM -----------------------------------------------------------------------------------

    async def _embed(
        self, image: NDArray[np.uint8], image_size: ImageSize | None = None
    ) -> _Embedded:
        pixels, frame = resize_longest_side(image, self._sam().image_size, image_size=image_size)
        answer = await self._backend.infer(
            SAM_IMAGE_ENCODER,
            {"image": pixels[None], "valid_size": np.array([frame.valid_size], np.int32)},
        )
        return _Embedded(embedding=answer["image_embeddings"], frame=frame)

    async def _decode(self, embedded: _Embedded, prompts: Sequence[SamPrompt]) -> list[_Decoded]:
        limit = self._config.proposals.max_prompts_per_call
        packs = list(pack_prompts([prompts], [embedded.frame], max_prompts=limit))
        answers = []
        for pack in packs:  # one at a time: each call already fills the machine
            answer = await self._backend.infer(
                SAM_MASK_DECODER,
                {
                    "image_embeddings": embedded.embedding,
                    "image_index": pack.image_index,
                    "point_coords": pack.point_coords,
                    "point_labels": pack.point_labels,
                },
            )
            answers.append(
                _Decoded(
                    positions=pack.positions,
                    logits=answer["low_res_logits"],
                    iou_predictions=answer["iou_predictions"],
                )
            )
        return answers

    async def _boxes_of_image(
        self, image: NDArray[np.uint8], embedded: _Embedded, peaks: PointPrompts
    ) -> tuple[PointPrompts, PromptedBoxes]:
        """All prompts of an image and their boxes: in the whole of it, then in its crops."""
        prompts = self._used_prompts(embedded.frame.image_size, peaks)
        found = [(prompts, await self._prompted_boxes(embedded, prompts))]
        for crop in self._crops(embedded.frame.image_size):  # one at a time, as decoder calls
            found.append(await self._boxes_of_crop(image, crop))
        return (
            PointPrompts.concatenate([prompts for prompts, _ in found]),
            PromptedBoxes.concatenate([boxes for _, boxes in found]),
        )

    def _crops(self, image_size: ImageSize) -> list[Crop]:
        config = self._config.proposals
        has_grid = "grid" in config.sources and config.points_per_side > 0
        counts = config.crops_per_side if has_grid else ()
        return [crop for per_side in counts for crop in image_crops(image_size, per_side)]

    async def _boxes_of_crop(
        self, image: NDArray[np.uint8], crop: Crop
    ) -> tuple[PointPrompts, PromptedBoxes]:
        points_per_side = max(1, self._config.proposals.points_per_side // 2)
        prompts = grid_prompts(points_per_side, crop.size)
        prompted = await self._prompted_boxes(await self._embed(crop.of(image)), prompts)
        whole = prompted.subset(~crop.is_cut(prompted.boxes))
        return (
            replace(prompts, points=prompts.points + crop.offset),
            replace(whole, boxes=crop.boxes_in_image(whole.boxes)),
        )

    async def _prompted_boxes(self, embedded: _Embedded, prompts: PointPrompts) -> PromptedBoxes:
        """Boxes of all masks that count as proposals: by default three a grid point, two a peak."""
        singles = sam_prompts(prompts)
        sources = [int(s) for s in prompts.sources]
        config = self._config.proposals
        for source in (PromptSource.COARSE, PromptSource.FINE) if config.class_prompts else ():
            members = np.flatnonzero(prompts.sources == source)
            together = class_prompts(prompts.subset(members))
            singles += together
            sources += [int(source)] * len(together)
        parts = [
            _boxes_of_call(decoded, np.array(sources, np.int32), embedded.frame, self._config)
            for decoded in await self._decode(embedded, singles)
        ]
        return _in_prompt_order(parts)

    async def _full_masks(
        self, embedded: _Embedded, prompts: Sequence[SamPrompt], chosen: slice
    ) -> SegmentResult:
        num_masks = len(range(*chosen.indices(NUM_MASK_TOKENS)))
        shape = (len(prompts), num_masks)
        boxes, scores = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
        stability = np.zeros(shape, np.float32)
        counts: list[tuple[bytes, ...]] = [()] * len(prompts)
        runs_on = _runs_on(self._config)
        for decoded in await self._decode(embedded, prompts):
            logits = decoded.logits[:, chosen].reshape(-1, *decoded.logits.shape[2:])
            masks = masks_of_image(logits, embedded.frame, **runs_on)
            summary = summarize_masks(logits, *_all_of(logits, embedded.frame), **runs_on)
            of_prompt = len(decoded.positions), num_masks
            boxes[decoded.positions] = rle_boxes(masks).reshape(*of_prompt, 4)
            stability[decoded.positions] = summary.stability.reshape(of_prompt)
            scores[decoded.positions] = decoded.iou_predictions[:, chosen]
            for i, position in enumerate(decoded.positions):
                counts[position] = masks.rle_counts[i * num_masks : (i + 1) * num_masks]
        return SegmentResult(
            mask_counts=tuple(counts),
            boxes=boxes,
            scores=scores,
            stability_scores=stability,
            image_size=embedded.frame.image_size,
        )

    # -- models at hand ------------------------------------------------------------------------

    def _detector(self) -> DetectorParameters:
        return _require(self._models.detector, "a detector")

    def _classifier(self) -> VitClassifierParameters:
        return _require(self._models.vit_classifier, "a vit_classifier")

    def _sam(self) -> SamParameters:
        return _require(self._models.sam, "SAM (sam_image_encoder and sam_mask_decoder)")


def select_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int32],
    frame: ModelFrame,
    *,
    mask_logits: NDArray[np.float32] | None = None,
    score_thresh: float,
    nms_thresh: float,
    max_detections: int,
) -> Detections:
    """Candidates of one image to detections: threshold, suppression per class, image frame.

    Args:
        boxes: [d, 4], XYXY in the model frame.
        scores: [d].
        labels: [d], 0-based.
        frame: Where the image lies in the model frame.
        mask_logits: [d, m, m], a mask on a grid over each box, if the detections shall have masks.
        score_thresh: Lowest score to keep.
        nms_thresh: IoU above which the lesser of two boxes of a class goes.
        max_detections: Most detections to return.
    """
    unclipped = frame.to_image(boxes)
    in_image = clip_boxes(unclipped, frame.image_size)
    has_area = (in_image[:, 2:] > in_image[:, :2]).all(axis=1)
    candidates = np.flatnonzero((scores >= score_thresh) & has_area)
    kept = batched_nms(in_image[candidates], scores[candidates], labels[candidates], nms_thresh)
    chosen = candidates[kept[:max_detections]]
    masks = None
    if mask_logits is not None:
        masks = masks_in_boxes(mask_logits[chosen], unclipped[chosen], frame.image_size)
    return Detections(
        boxes=in_image[chosen],
        scores=scores[chosen],
        labels=labels[chosen].astype(np.int64),
        image_size=frame.image_size,
        masks=masks,
    )


def _require(parameters: _T | None, what: str) -> _T:
    if parameters is None:
        raise ContractError(f"this needs {what}, which is not served here; export it and serve it")
    return parameters


def _class_ids(tags: Sequence[str], class_names: Sequence[str]) -> list[int]:
    if len(tags) == 0:
        raise ValueError(
            f"tags is empty; leave it out to let the classifier decide, or name at least one of "
            f"{list(class_names)}"
        )
    if unknown := [tag for tag in tags if tag not in class_names]:
        raise ValueError(f"unknown tag {unknown[0]!r}; the classifier knows {list(class_names)}")
    return sorted({class_names.index(tag) for tag in tags})


def _all_of(
    logits: NDArray[np.float32], frame: ModelFrame
) -> tuple[NDArray[np.int32], tuple[ModelFrame]]:
    """That all masks are of one image, as the mask epilogue is told so."""
    return np.zeros(len(logits), np.int32), (frame,)


class _RunsOn(TypedDict):
    """Keyword arguments of the mask epilogue."""

    backend: BackendName
    device: int


def _runs_on(settings: PipelineConfig) -> _RunsOn:
    return {"backend": settings.clustering.backend, "device": settings.clustering.device}


def masks_of_image(
    logits: NDArray[np.float32], frame: ModelFrame, *, backend: BackendName, device: int = 0
) -> InstanceMasks:
    """Masks at the image's resolution from SAM's logits, some at a time.

    Args:
        logits: [n, m, m] over the model frame.
        frame: Where the image lies in it.
        backend: What runs it.
        device: Number of the GPU, for the backend ``cuda``.
    """
    height, width = frame.image_size
    at_a_time = max(1, _MASK_PIXELS_AT_A_TIME // (height * width))
    counts: list[bytes] = []
    for begin in range(0, len(logits), at_a_time):
        part = logits[begin : begin + at_a_time]
        encoded = encode_masks(
            part, *_all_of(part, frame), backend=backend, device=device, with_bits=False
        )
        runs = np.split(encoded.runs, encoded.run_offsets[1:-1])
        counts += [compress_runs(of_mask, frame.image_size) for of_mask in runs]
    return InstanceMasks(rle_counts=tuple(counts), image_size=frame.image_size)


def _boxes_of_call(
    decoded: _Decoded, sources: NDArray[np.int32], frame: ModelFrame, settings: PipelineConfig
) -> tuple[NDArray[np.int64], PromptedBoxes]:
    """Prompt positions and boxes of one decoder call's masks that pass the score filters."""
    config = settings.proposals
    call_sources = sources[decoded.positions]
    chosen = np.zeros(decoded.iou_predictions.shape, dtype=bool)
    is_grid = call_sources == PromptSource.GRID
    for is_member, masks in ((is_grid, config.grid_masks), (~is_grid, config.peak_masks)):
        for mask in masks:
            chosen[is_member, _MULTIMASK.start + mask] = True
    prompt = np.nonzero(chosen)[0]
    logits, scores = decoded.logits[chosen], decoded.iou_predictions[chosen]
    summary = summarize_masks(logits, *_all_of(logits, frame), **_runs_on(settings))
    stability = summary.stability.copy()
    if config.full_resolution_boxes:
        is_near = np.abs(stability - config.grid_stability_thresh) < _STABILITY_DOUBT
        # Only the grid's masks are judged by it.
        in_doubt = is_near & is_grid[prompt] & (scores >= config.grid_iou_thresh)
        stability[in_doubt] = full_resolution_stability(logits[in_doubt], frame)
    passed = passes_scores(call_sources[prompt], scores, stability, config)
    boxes = summary.boxes[passed]
    if config.full_resolution_boxes:
        boxes = full_resolution_boxes(logits[passed], frame)
    return decoded.positions[prompt[passed]], PromptedBoxes(
        boxes=boxes,
        iou_predictions=scores[passed],
        stability=stability[passed],
        sources=call_sources[prompt[passed]],
    )


def _in_prompt_order(
    parts: Sequence[tuple[NDArray[np.int64], PromptedBoxes]],
) -> PromptedBoxes:
    together = PromptedBoxes.concatenate([boxes for _, boxes in parts])
    no_positions = np.zeros(0, np.int64)
    positions = np.concatenate([no_positions, *(positions for positions, _ in parts)])
    return together.subset(np.argsort(positions, kind="stable"))


def _segment_prompts(
    point_coords: NDArray[np.float32] | None,
    point_labels: NDArray[np.int32] | None,
    boxes: NDArray[np.float32] | None,
) -> list[SamPrompt]:
    if point_coords is None and boxes is None:
        raise ValueError("nothing to segment: give point_coords with point_labels, boxes, or both")
    if boxes is not None and not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError("a box is empty or not a number; boxes are x1, y1, x2, y2 with x1 < x2")
    if point_coords is not None and not np.isfinite(point_coords).all():
        raise ValueError("point_coords contain infinity or not-a-number; give pixels of the image")
    if (point_coords is None) != (point_labels is None):
        raise ValueError("point_coords and point_labels belong together; got only one of them")
    if point_coords is None or point_labels is None:
        assert boxes is not None
        return [box_prompt(box) for box in boxes]
    if point_coords.shape[:2] != point_labels.shape:
        raise ValueError(
            f"point_coords {list(point_coords.shape)} and point_labels {list(point_labels.shape)} "
            "differ in prompts or points"
        )
    if boxes is not None and len(boxes) != len(point_coords):
        raise ValueError(f"got {len(boxes)} boxes for {len(point_coords)} prompts; give one each")
    return [
        _segment_prompt(points, labels, None if boxes is None else boxes[i])
        for i, (points, labels) in enumerate(zip(point_coords, point_labels, strict=True))
    ]


def _segment_prompt(
    points: NDArray[np.float32], labels: NDArray[np.int32], box: NDArray[np.float32] | None
) -> SamPrompt:
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(f"point_labels are 1, 0 or -1, got {sorted(set(labels.tolist()))}")
    is_given = labels >= 0
    if box is not None:
        return box_prompt(box, points[is_given], labels[is_given])
    if not is_given.any():
        raise ValueError("a prompt without points and without a box; give it at least one point")
    return point_prompt(points[is_given], labels[is_given])
