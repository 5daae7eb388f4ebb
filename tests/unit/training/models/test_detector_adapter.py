import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from export.__main__ import export_model
from export.exportable import RANKED, Exportable
from training.models.detector_adapter import CandidateConfig, DetectorAdapter, decode_boxes
from training.retraining.faster_rcnn import BOX_WEIGHTS, FasterRcnn, FasterRcnnConfig
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.contracts import DetectorParameters

_TOY = FasterRcnnConfig(
    image_size=64,
    neck_channels=16,
    roi_channels=16,
    head_width=32,
    anchor_sizes=((12,), (24,), (44,)),
)
_CANDIDATES = CandidateConfig(num_rois=12, num_candidates=10)


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    model = FasterRcnn(_TOY, num_classes=3)
    for parameter in model.rpn.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for layer in (model.box_head.classes, model.box_head.offsets):
        torch.nn.init.normal_(layer.weight, std=0.5)
    return DetectorAdapter(model, _CANDIDATES).eval()


def _images(num):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (num, 64, 64, 3), dtype=torch.uint8, generator=generator)


def test_answers_have_the_shapes_of_the_contract(adapter):
    with torch.inference_mode():
        boxes, scores, labels = adapter(_images(2))
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 10, 4), (2, 10), (2, 10))
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int32)
    assert bool((boxes >= 0).all() & (boxes <= 64).all())
    assert bool((scores[:, 1:] <= scores[:, :-1]).all() & (scores <= 1).all())
    assert set(labels.unique().tolist()) <= {0, 1, 2}


def test_images_of_a_batch_do_not_see_each_other(adapter):
    images = _images(3)
    with torch.inference_mode():
        together = adapter(images)
        alone = adapter(images[1:2])
    torch.testing.assert_close(together[0][1:2], alone[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(together[1][1:2], alone[1], atol=1e-4, rtol=1e-3)


def test_decoding_equals_torchvisions_box_coder():
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(20, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 1 + torch.rand(20, 2, generator=generator) * 30], dim=1)
    offsets = torch.randn(20, 4, generator=generator) * 5
    theirs = BoxCoder(BOX_WEIGHTS).decode(offsets, [boxes])[:, 0]
    torch.testing.assert_close(decode_boxes(boxes, offsets, BOX_WEIGHTS), theirs)


def test_proposals_are_the_best_local_maxima_of_the_rpn(adapter):
    model = adapter.model
    with torch.inference_mode():
        features = model.features(_images(1).permute(0, 3, 1, 2).float())
        logits, offsets = model.rpn.head(features.levels)
        proposed = adapter._propose(features.levels)[0]
    anchors = model.anchors()
    expected = []
    for level, (logit, offset) in enumerate(zip(logits, offsets, strict=True)):
        num_shapes, height, width = logit.shape[1:]
        padded = np.pad(logit[0].numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        for shape in range(num_shapes):
            for row in range(height):
                for column in range(width):
                    value = logit[0, shape, row, column].item()
                    if value < padded[shape, row : row + 3, column : column + 3].max():
                        continue
                    anchor = anchors[level][(row * width + column) * num_shapes + shape]
                    code = offset[0, 4 * shape : 4 * shape + 4, row, column]
                    box = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(code[None], [anchor[None]])[0, 0]
                    expected.append((value, box.clamp(0, 64)))
    expected.sort(key=lambda pair: -pair[0])
    assert len(expected) >= 12
    best = torch.stack([box for _, box in expected[:12]])
    torch.testing.assert_close(proposed, best, atol=1e-3, rtol=1e-4)


def test_a_window_of_one_cell_suppresses_nothing(adapter):
    everything = DetectorAdapter(
        adapter.model, CandidateConfig(num_rois=12, num_candidates=10, peak_window=1)
    )
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(everything._peaks(logits), logits)
    assert (adapter._peaks(logits) < -100).sum() > 64


def test_the_exported_graph_agrees_at_other_batch_sizes(adapter, tmp_path):
    path = tmp_path / "detector.onnx"
    torch.onnx.export(
        adapter,
        (_images(2),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        input_names=["image"],
        output_names=["boxes", "scores", "labels"],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num in (1, 3):
        boxes, scores, labels = session.run(None, {"image": _images(num).numpy()})
        with torch.inference_mode():
            reference = adapter(_images(num))
        np.testing.assert_allclose(scores, reference[1].numpy(), atol=1e-4)
        np.testing.assert_array_equal(labels, reference[2].numpy())
        np.testing.assert_allclose(boxes, reference[0].numpy(), atol=1e-2)


@pytest.fixture(scope="module")
def masking(adapter):
    """The same detector with a mask head."""
    torch.manual_seed(0)
    model = FasterRcnn(dataclasses.replace(_TOY, mask_channels=8), num_classes=3)
    model.load_state_dict(adapter.model.state_dict(), strict=False)
    torch.nn.init.normal_(model.mask_head.classes.weight, std=0.5)
    return DetectorAdapter(model, _CANDIDATES).eval()


def test_a_mask_head_adds_masks_and_changes_no_box(adapter, masking):
    assert (adapter.mask_size, masking.mask_size) == (0, 28)
    with torch.inference_mode():
        boxes, scores, labels, masks = masking(_images(2))
        without = adapter(_images(2))
    assert masks.shape == (2, 10, 28, 28)
    assert masks.dtype == torch.float32
    for ours, theirs in zip((boxes, scores, labels), without, strict=True):
        assert torch.equal(ours, theirs)


def test_each_mask_is_that_of_the_boxs_own_class_inside_the_box(masking):
    with torch.inference_mode():
        boxes, _, labels, masks = masking(_images(1))
        features = masking.model.features(_images(1).permute(0, 3, 1, 2).float())
        pooled = roi_align(
            features.roi_map, [boxes[0]], 14, spatial_scale=1 / 8, sampling_ratio=1, aligned=True
        )
        logits = masking.model.mask_head(pooled)
    own = torch.stack([of_box[label] for of_box, label in zip(logits, labels[0], strict=True)])
    torch.testing.assert_close(masks[0], own, atol=1e-3, rtol=1e-3)


def test_the_exported_graph_with_masks_agrees_and_computes_what_is_wanted(masking, tmp_path):
    parameters = DetectorParameters(
        image_size=64, num_candidates=10, class_names=("a", "b", "c"), mask_size=28
    )
    exportable = Exportable(
        model="detector",
        module=masking,
        parameters=parameters,
        inputs=tuple({"image": _images(num).numpy()} for num in (2, 1, 3)),
        tolerance=RANKED,
        source={},
    )
    artifact = export_model(exportable, tmp_path)
    assert artifact.parameters == parameters
    model = OnnxRuntimeModel(artifact)
    everything = model({"image": _images(2).numpy()})
    boxes_only = model({"image": _images(2).numpy()}, ["boxes", "scores", "labels"])
    assert everything["mask_logits"].shape == (2, 10, 28, 28)
    assert set(boxes_only) == {"boxes", "scores", "labels"}
    for name, values in boxes_only.items():
        np.testing.assert_array_equal(values, everything[name])
