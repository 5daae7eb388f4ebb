"""Proposals of a grid of points beside segment_anything's own generator, on the same SAM weights.

``python -m benchmarks proposals --sam assets/weights/sam_compact.safetensors`` runs
``SamAutomaticMaskGenerator``, ``SamPredictor`` prompt by prompt, and the pipeline of this package
(on the torch modules and, with ``--models``, on exported engines of the same SAM) on the same
images with the same filters, and matches the boxes. ``--sam vit_b`` or ``vit_h`` times random
weights of that size.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track
from scipy.optimize import linear_sum_assignment
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.entry import enter
from benchmarks.machine import Peaks, measure_peaks
from benchmarks.pictures import pictures
from benchmarks.reporting import report
from benchmarks.results import (
    ArtifactRecord,
    BenchmarkResult,
    Metric,
    Recorder,
    Table,
    artifact_record,
    file_record,
)
from training.models.sam import SAM_CONFIGS, build_sam, load_sam, sam_config
from training.models.sam_adapters import SamImageEncoderAdapter, SamMaskDecoderAdapter
from training.torch_backend import TorchModel
from weaksam_rt.artifacts import load_artifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.engines import open_engine
from weaksam_rt.backends.local import LocalBackend, ModelFunction
from weaksam_rt.boxes import box_iou
from weaksam_rt.config import PipelineConfig
from weaksam_rt.contracts import (
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    SamParameters,
    VitClassifierParameters,
    sam_image_encoder_contract,
    sam_mask_decoder_contract,
)
from weaksam_rt.images import decode_image
from weaksam_rt.pipeline import PipelineModels, WeakSamPipeline
from weaksam_rt.proposals import ProposalConfig

IOU_THRESH = 0.9
"""Boxes that overlap by so much count as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposalsConfig:
    """Images, grid, filters and packing."""

    points_per_side: int = 32
    """Grid points along each side."""
    iou_thresh: float = 0.3
    """Masks with a predicted IoU below this go."""
    stability_thresh: float = 0.3
    """Masks with a stability score below this go."""
    nms_thresh: float = 0.7
    """Boxes that overlap a better one by more than this IoU go."""
    prompts_per_call: int = 8
    """Of one decoder call of ours; the best of 8, 16 and 64 on two cores."""
    full_resolution_boxes: bool = True
    """Boxes as the generator gives them; without, from low-resolution logits."""
    peer_prompts_per_call: tuple[int, ...] = (64, 8)
    """Of one decoder call of the generator: its default, and ours."""
    predictor_prompts: int = 16
    """Points given to ``SamPredictor`` one by one; 0 leaves it out."""
    torch_modules: bool = True
    """Also run our pipeline on the torch modules."""
    images: int = 3
    """Most pictures."""
    repeats: int = 3
    """Passes over the pictures; ways take turns on each picture."""
    device: str = "cpu"
    """A torch device for the torch modules."""
    mixed_precision: bool = False
    """bfloat16 for our torch modules; segment_anything runs in float32, as it comes."""

    def filters(self) -> ProposalConfig:
        """The same for our pipeline; nothing else is filtered."""
        return ProposalConfig(
            points_per_side=self.points_per_side,
            grid_iou_thresh=self.iou_thresh,
            grid_stability_thresh=self.stability_thresh,
            grid_nms_thresh=self.nms_thresh,
            min_side_px=0.0,
            max_prompts_per_call=self.prompts_per_call,
            full_resolution_boxes=self.full_resolution_boxes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """How the boxes of two ways agree."""

    num_peer: int
    num_ours: int
    num_matched: int
    """Pairs of one box each with an IoU of at least ``IOU_THRESH``."""

    @property
    def share(self) -> float:
        """Of the peer's boxes; 1 where it has none."""
        return self.num_matched / self.num_peer if self.num_peer else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamWork:
    """Floating-point operations of the products that an image takes."""

    encoder: float
    """Of one image."""
    prompt: float
    """Of the decoder, for one prompt."""
    num_prompts: int
    """Of one image."""

    @property
    def of_an_image(self) -> float:
        """Encoder and all prompts."""
        return self.encoder + self.num_prompts * self.prompt


Way = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""An RGB image to proposal boxes, XYXY in its pixels."""


def main(
    config: Annotated[ProposalsConfig, tyro.conf.arg(name="")] = ProposalsConfig(),
    *,
    sam: str = "assets/weights/sam_compact.safetensors",
    models: Path | None = None,
    pictures_from: Path | None = None,
    output: Path | None = None,
) -> None:
    """Time, match and report.

    Args:
        config: Images, grid, filters.
        sam: Weights (.safetensors or an official .pth), or the name of a size for random weights.
        models: Folder of exported models with the same SAM; None: torch modules only.
        pictures_from: A picture, or a folder of them; None: a photograph of 640x480.
        output: Path without suffix; result.json, .md and .html are written there.
    """
    if not config.torch_modules and models is None:
        raise ValueError("nothing of ours to run: leave torch_modules on, or give --models")
    loaded = _load(sam)
    record = (
        ArtifactRecord(model=sam, engine="random weights", sha256="", accuracy={})
        if sam in SAM_CONFIGS
        else file_record("sam", Path(sam))
    )
    images = [decode_image(data) for data in pictures(pictures_from, config.images)]
    report(measure(loaded.to(config.device), record, images, config, models), output)


def measure(
    sam: Sam,
    record: ArtifactRecord,
    images: Sequence[NDArray[np.uint8]],
    config: ProposalsConfig,
    models: Path | None,
) -> BenchmarkResult:
    """All ways on all images, taking turns."""
    engines = () if models is None else _engine_artifacts(models)
    recorder = Recorder(
        what="proposals",
        title=f"Proposals of a {config.points_per_side}x{config.points_per_side} grid beside "
        "segment_anything",
        config={**asdict(config), "pictures": [list(image.shape[:2]) for image in images]},
        artifacts=(record, *map(artifact_record, engines)),
    )
    work, peaks = count_work(sam, config), _highest_peaks(config)
    ways = _ways(sam, config, models)
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    boxes: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ways}
    for repeat in track(range(config.repeats), "measuring", transient=True):
        for times in seconds.values():
            times.append([])
        for image in images:
            for name, way in ways.items():
                start = time.perf_counter()
                found = way(image)
                seconds[name][-1].append(time.perf_counter() - start)
                if repeat == 0:
                    boxes[name].append(found)
    metrics = [
        Metric(
            name=name,
            unit="s an image",
            repeats=tuple(map(tuple, times)),
            floor=work.of_an_image / peaks.flops,
            floor_reason=_FLOOR_REASON,
        )
        for name, times in seconds.items()
    ]
    metrics += _predictor_metric(sam, images, config, 1e3 * work.prompt / peaks.flops)
    metrics += _ratios(metrics, config)
    matches = _matches(boxes, config)
    unsuppressed = dataclasses.replace(config, nms_thresh=1.0, repeats=1)
    before = {name: [way(images[0])] for name, way in _ways(sam, unsuppressed, models).items()}
    return recorder.result(
        metrics,
        tables=(
            _match_table("Boxes matched after suppression", matches),
            _match_table(
                "Boxes matched before suppression, first picture", _matches(before, config)
            ),
        ),
        notes=_notes(work, peaks, metrics, matches),
    )


# ---------------------------------------------------------------------------------------------
# The ways
# ---------------------------------------------------------------------------------------------


def peer_way(sam: Sam, config: ProposalsConfig, prompts_per_call: int) -> Way:
    """``SamAutomaticMaskGenerator`` with these filters; its boxes end on the last pixel, ours
    after it, so theirs are made one pixel wider and higher.
    """
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=config.points_per_side,
        points_per_batch=prompts_per_call,
        pred_iou_thresh=config.iou_thresh,
        stability_score_thresh=config.stability_thresh,
        box_nms_thresh=config.nms_thresh,
        output_mode="uncompressed_rle",  # its cheapest
    )

    def way(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        boxes_xywh = [mask["bbox"] for mask in generator.generate(image)]
        boxes = np.array(boxes_xywh, np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2] + 1
        return boxes

    return way


def our_way(
    models: dict[str, ModelFunction], parameters: SamParameters, config: ProposalsConfig
) -> Way:
    """The served pipeline on these two models, with grid prompts alone: the generator has no
    classifier, so ours sees nothing.
    """
    pipeline = WeakSamPipeline(
        LocalBackend({**models, VIT_CLASSIFIER: _see_nothing}),
        PipelineModels(sam=parameters, vit_classifier=_NO_CLASSIFIER),
        PipelineConfig(proposals=config.filters(), flip=False),
    )

    def way(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        return asyncio.run(pipeline.propose(image)).proposals.boxes

    return way


_NO_CLASSIFIER = VitClassifierParameters(
    image_size=16, map_size=1, num_cross_maps=1, class_names=("nothing",)
)


def _see_nothing(inputs: Arrays, outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
    del inputs, outputs
    return {"logits": np.full((1, 1), -10.0, np.float32)}


def torch_models(
    sam: Sam, config: ProposalsConfig
) -> tuple[dict[str, ModelFunction], SamParameters]:
    """Encoder and decoder as torch modules, and the sizes of their contracts."""
    parameters = SamParameters(
        image_size=sam.image_encoder.img_size,
        embedding_size=sam.prompt_encoder.image_embedding_size[0],
        embedding_dim=sam.prompt_encoder.embed_dim,
    )
    where: dict[str, Any] = {
        "device": config.device, "mixed_precision": config.mixed_precision
    }  # fmt: skip
    models: dict[str, ModelFunction] = {
        SAM_IMAGE_ENCODER: TorchModel(
            SamImageEncoderAdapter(sam), sam_image_encoder_contract(parameters), **where
        ),
        SAM_MASK_DECODER: TorchModel(
            SamMaskDecoderAdapter(sam), sam_mask_decoder_contract(parameters), **where
        ),
    }
    return models, parameters


def _ways(sam: Sam, config: ProposalsConfig, models: Path | None) -> dict[str, Way]:
    ways = {
        _peer_name(number): peer_way(sam, config, number) for number in config.peer_prompts_per_call
    }
    if config.torch_modules:
        ways[_TORCH] = our_way(*torch_models(sam, config), config)
    if models is not None:
        artifacts = _engine_artifacts(models)
        engines: dict[str, ModelFunction] = {a.model: open_engine(a) for a in artifacts}
        parameters = artifacts[0].parameters
        assert isinstance(parameters, SamParameters)
        ways[_ENGINES] = our_way(engines, parameters, config)
    return ways


_FLOOR_REASON = "encoder and decoder operations at the measured peak of a matrix product"
_TORCH = "ours, torch modules"
_ENGINES = "ours, ONNX Runtime engines"


def _peer_name(prompts_per_call: int) -> str:
    return f"SamAutomaticMaskGenerator, {prompts_per_call} points a call"


def _engine_artifacts(models: Path) -> tuple[Any, ...]:
    return tuple(load_artifact(models / name) for name in (SAM_IMAGE_ENCODER, SAM_MASK_DECODER))


def _load(sam: str) -> Sam:
    if sam in SAM_CONFIGS:
        torch.manual_seed(0)
        return build_sam(sam_config(sam))
    return load_sam(Path(sam))


# ---------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------


def match(peer: NDArray[np.float32], ours: NDArray[np.float32]) -> Match:
    """The most pairs of one box each that overlap enough."""
    overlaps = box_iou(peer, ours) >= IOU_THRESH
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return Match(
        num_peer=len(peer), num_ours=len(ours), num_matched=int(overlaps[rows, columns].sum())
    )


def _matches(
    boxes: dict[str, list[NDArray[np.float32]]], config: ProposalsConfig
) -> dict[str, Match]:
    peers = boxes[_peer_name(config.peer_prompts_per_call[0])]
    found = {}
    for name in (_TORCH, _ENGINES):
        if name in boxes:
            each = [match(p, o) for p, o in zip(peers, boxes[name], strict=True)]
            found[name] = Match(
                num_peer=sum(m.num_peer for m in each),
                num_ours=sum(m.num_ours for m in each),
                num_matched=sum(m.num_matched for m in each),
            )
    return found


def _predictor_metric(
    sam: Sam, images: Sequence[NDArray[np.uint8]], config: ProposalsConfig, floor_ms: float
) -> list[Metric]:
    """``SamPredictor`` one prompt at a time, in ms a prompt, its encoder left out."""
    if config.predictor_prompts == 0:
        return []
    predictor = SamPredictor(sam)
    repeats = []
    for _ in range(config.repeats):
        image = images[0]
        predictor.set_image(image)
        points = build_point_grid(config.points_per_side) * image.shape[1::-1]
        chosen = points[:: max(1, len(points) // config.predictor_prompts)]
        times = []
        for point in chosen:
            start = time.perf_counter()
            predictor.predict(point[None], np.ones(1, np.int32), multimask_output=True)
            times.append(1e3 * (time.perf_counter() - start))
        repeats.append(tuple(times))
    name = "SamPredictor, one point a call"
    return [
        Metric(
            name=name,
            unit="ms a prompt",
            repeats=tuple(repeats),
            floor=floor_ms,
            floor_reason=_FLOOR_REASON,
        )
    ]


def _ratios(metrics: Sequence[Metric], config: ProposalsConfig) -> list[Metric]:
    """How many times faster ours are, picture by picture within one pass."""
    by_name = {metric.name: metric for metric in metrics}
    found = []
    for number in config.peer_prompts_per_call:
        peer = by_name[_peer_name(number)]
        for name in (_TORCH, _ENGINES):
            if name in by_name:
                pairs = zip(peer.repeats, by_name[name].repeats, strict=True)
                ratios = tuple(tuple(np.array(p) / np.array(o)) for p, o in pairs)
                found.append(
                    Metric(
                        name=f"{name}: times faster than the generator at {number} points a call",
                        unit="x",
                        better="higher",
                        repeats=ratios,
                    )
                )
    return found


def _match_table(title: str, matches: dict[str, Match]) -> Table:
    return Table(
        title=title,
        header=("ours", "generator's boxes", "ours", f"matched at IoU {IOU_THRESH}", "share"),
        rows=tuple(
            (name, str(m.num_peer), str(m.num_ours), str(m.num_matched), f"{100 * m.share:.1f} %")
            for name, m in matches.items()
        ),
    )


def _notes(
    work: SamWork, peaks: Peaks, metrics: Sequence[Metric], matches: dict[str, Match]
) -> list[str]:
    """Work, peak and agreement."""
    return [
        f"An image is {work.of_an_image / 1e9:.0f} GFLOP of encoder and decoder as ours do them; "
        f"the measured peak of a matrix product is {peaks.flops / 1e9:.0f} GFLOP/s.",
        *(
            f"{metric.name}: {metric.percent_of_floor:.0f} % of that peak."
            for metric in metrics
            if metric.unit == "s an image"
        ),
        *(
            f"{name}: {100 * found.share:.1f} % of the generator's boxes matched."
            for name, found in matches.items()
        ),
    ]


def _highest_peaks(config: ProposalsConfig) -> Peaks:
    """The higher matrix peak of the precisions that take part: a floor must hold for all."""
    precisions = {False, config.mixed_precision}
    measured = [measure_peaks(config.device, mixed_precision=mixed) for mixed in precisions]
    return max(measured, key=lambda peaks: peaks.flops)


def count_work(sam: Sam, config: ProposalsConfig) -> SamWork:
    """Counted by torch on one encoder call and one prompt of ours."""
    models, parameters = torch_models(sam, config)
    side, cells = parameters.image_size, parameters.embedding_size
    with FlopCounterMode(display=False) as encoder:
        models[SAM_IMAGE_ENCODER](
            {
                "image": np.zeros((1, side, side, 3), np.uint8),
                "valid_size": np.full((1, 2), side, np.int32),
            },
            None,
        )
    with FlopCounterMode(display=False) as decoder:
        models[SAM_MASK_DECODER](
            {
                "image_embeddings": np.zeros(
                    (1, parameters.embedding_dim, cells, cells), np.float32
                ),
                "image_index": np.zeros(1, np.int32),
                "point_coords": np.zeros((1, 2, 2), np.float32),
                "point_labels": np.array([[1, -1]], np.int32),
            },
            None,
        )
    return SamWork(
        encoder=float(encoder.get_total_flops()),
        prompt=float(decoder.get_total_flops()),
        num_prompts=config.points_per_side**2,
    )


if __name__ == "__main__":
    enter(main)
