"""What a model's answers are worth on its task, whatever engine gave them."""

from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from export.graph_model import GraphModel
from export.mixed_precision import KeepFp32, emulated, expand_normalizations, lower_precision
from export.precision_doctor import Diagnosis
from training.data.coco import CocoFolder, ImageRecord
from training.data.prompt_samples import most_interior_point
from training.evaluation.sam_quality import mask_iou
from training.evaluation.tag_ap import tag_average_precision
from training.evaluation.voc_ap import voc_ap
from weaksam_rt.artifacts import ModelArtifact, load_artifact
from weaksam_rt.backends.base import Arrays
from weaksam_rt.backends.local import ModelFunction
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.config import DetectionConfig
from weaksam_rt.contracts import (
    SAM_IMAGE_ENCODER,
    SAM_MASK_DECODER,
    VIT_CLASSIFIER,
    DetectorParameters,
    Parameters,
    SamParameters,
    VitClassifierParameters,
)
from weaksam_rt.images import decode_reduced
from weaksam_rt.masks import image_logits, mask_to_box
from weaksam_rt.pipeline import select_detections
from weaksam_rt.preprocessing import (
    resize_for_detector,
    resize_longest_side,
    resize_to_square,
)

_LOW_SCORE = 0.01
"""Average precision looks at detections down to here."""
_DETECTION = DetectionConfig()
_MAX_OBJECTS = 4
"""Masks of an image that are prompted for."""


def image_inputs(model: str, parameters: Parameters, record: ImageRecord) -> Arrays:
    """The inputs of an image model for one photograph, a batch of 1."""
    match parameters:
        case DetectorParameters(image_size=side):
            return {"image": resize_for_detector(record.image(), side)[0][None]}
        case VitClassifierParameters(image_size=side):
            return {"image": resize_to_square(record.image(), side)[None]}
        case SamParameters(image_size=side) if model == SAM_IMAGE_ENCODER:
            pixels, frame = resize_longest_side(record.image(), side)
            return {"image": pixels[None], "valid_size": np.array([frame.valid_size], np.int32)}
    raise ValueError(f"{model} does not read images")


def detector_ap50(
    run: ModelFunction,
    parameters: DetectorParameters,
    folder: CocoFolder,
    config: DetectionConfig = _DETECTION,
) -> dict[str, float]:
    """AP50 (Pascal VOC, area form), in [0, 1], with serving's decoding, resizing and suppression.

    Classes are matched by name: what the detector does not know counts as not found.

    Args:
        run: The detector.
        parameters: Of it.
        folder: Images and true boxes.
        config: Its score threshold is not used: AP looks at weak detections too.
    """
    known = {name: label for label, name in enumerate(folder.class_names)}
    labels = np.array([known.get(name, -1) for name in parameters.class_names])
    found = {}
    for record in folder.records:
        image = decode_reduced(record.path.read_bytes(), parameters.image_size)
        pixels, frame = resize_for_detector(
            image.pixels, parameters.image_size, image_size=image.image_size
        )
        answer = run({"image": pixels[None]}, ["boxes", "scores", "labels"])
        detections = select_detections(
            answer["boxes"][0], answer["scores"][0], answer["labels"][0], frame,
            score_thresh=_LOW_SCORE, nms_thresh=config.nms_thresh,
            max_detections=config.max_detections,
        )  # fmt: skip
        in_folder = detections.take(labels[detections.labels] >= 0)
        found[record.image_id] = replace(in_folder, labels=labels[in_folder.labels])
    return {"AP50": voc_ap(folder, found).mean_all_point}


def classifier_tag_ap(
    run: ModelFunction, parameters: VitClassifierParameters, folder: CocoFolder
) -> dict[str, float]:
    """Mean average precision of the tags, in [0, 1], on the classes that classifier and folder
    share; a class of the folder that the classifier does not know counts as 0.

    Raises:
        ValueError: No image has a tag.
    """
    known = {name: i for i, name in enumerate(parameters.class_names)}
    columns = [known.get(name) for name in folder.class_names]
    logits = np.stack(
        [
            run(image_inputs(VIT_CLASSIFIER, parameters, record), ["logits"])["logits"][0]
            for record in folder.records
        ]
    )
    tags = np.zeros((len(folder.records), len(columns)), bool)
    for row, record in enumerate(folder.records):
        tags[row, list(record.tags)] = True
    if not tags.any():
        raise ValueError(f"no image of {folder.root} has a tag; choose a data set with tags")
    found = [
        0.0 if column is None else tag_average_precision(logits[:, [column]], tags[:, [label]])[0]
        for label, column in enumerate(columns)
        if tags[:, label].any()
    ]
    return {"tag AP": float(np.mean(found))}


def sam_mask_iou(
    encoder: ModelFunction, decoder: ModelFunction, parameters: SamParameters, folder: CocoFolder
) -> dict[str, float]:
    """Mean IoU of the single-mask answer with true masks, prompted by a point and by a box."""
    rows = [_image_iou(encoder, decoder, parameters, record) for record in folder.records]
    points, boxes = zip(*(row for row in rows if row is not None), strict=True)
    return {
        "mask IoU (point)": float(np.concatenate(points).mean()),
        "mask IoU (box)": float(np.concatenate(boxes).mean()),
    }


def task_metric(
    artifact: ModelArtifact, run: ModelFunction, folder: CocoFolder
) -> dict[str, float]:
    """The task metric of ``artifact``'s model when ``run`` answers for it.

    A SAM's other half is taken from the folder beside the artifact's; empty where it is missing,
    and for models without a metric here.
    """
    parameters = artifact.parameters
    if isinstance(parameters, DetectorParameters):
        return detector_ap50(run, parameters, folder)
    if isinstance(parameters, VitClassifierParameters):
        return classifier_tag_ap(run, parameters, folder)
    if isinstance(parameters, SamParameters):
        is_encoder = artifact.model == SAM_IMAGE_ENCODER
        other = artifact.path.parent.parent / (
            SAM_MASK_DECODER if is_encoder else SAM_IMAGE_ENCODER
        )
        if not other.is_dir():
            return {}
        half = OnnxRuntimeModel(load_artifact(other))
        encoder, decoder = (run, half) if is_encoder else (half, run)
        return sam_mask_iou(encoder, decoder, parameters, folder)
    return {}


def metrics_by_treatment(
    artifact: ModelArtifact, graph: onnx.ModelProto, diagnosis: Diagnosis, folder: CocoFolder
) -> dict[str, dict[str, float]]:
    """The task metric in float32, all lowered, and with what the doctor keeps in float32."""
    precision, expanded = diagnosis.precision, expand_normalizations(graph)
    graphs: dict[str, onnx.ModelProto] = {
        "fp32": lower_precision(graph, "fp32"),
        precision: emulated(lower_precision(expanded, precision)),
    }
    if diagnosis.keep:
        keep = KeepFp32(nodes=frozenset(diagnosis.keep))
        graphs[f"{precision}, treated"] = emulated(lower_precision(expanded, precision, keep))
    found = {name: task_metric(artifact, GraphModel(g), folder) for name, g in graphs.items()}
    return {name: metric for name, metric in found.items() if metric}


def spread(folder: CocoFolder, max_images: int) -> CocoFolder:
    """``folder`` with at most ``max_images`` images, evenly spaced."""
    if len(folder.records) <= max_images:
        return folder
    chosen = np.linspace(0, len(folder.records) - 1, max_images).round().astype(int)
    return replace(folder, records=tuple(folder.records[i] for i in chosen))


def _image_iou(
    encoder: ModelFunction, decoder: ModelFunction, parameters: SamParameters, record: ImageRecord
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    masks = record.masks()[~record.is_crowd][:_MAX_OBJECTS]
    masks = masks[masks.any(axis=(1, 2))]
    if len(masks) == 0:
        return None
    _, frame = resize_longest_side(record.image(), parameters.image_size)
    embeddings = encoder(image_inputs(SAM_IMAGE_ENCODER, parameters, record), None)
    points = frame.to_model(np.stack([most_interior_point(mask) for mask in masks]))
    corners = frame.to_model(mask_to_box(masks)).reshape(-1, 2, 2)
    coords = np.concatenate([np.stack([points, np.zeros_like(points)], axis=1), corners])
    answer = decoder(
        {
            "image_embeddings": embeddings["image_embeddings"],
            "image_index": np.zeros(len(coords), np.int32),
            "point_coords": coords.astype(np.float32),
            "point_labels": np.repeat(np.array([[1, -1], [2, 3]], np.int32), len(masks), axis=0),
        },
        None,
    )
    found = [image_logits(logits, frame) > 0 for logits in answer["low_res_logits"][:, :1]]
    iou = np.array([mask_iou(m[0], t) for m, t in zip(found, [*masks, *masks], strict=True)])
    return iou[: len(masks)], iou[len(masks) :]
