import numpy as np

from weaksam_rt.contracts import WEAKSAM_DETECT, WEAKSAM_PROPOSE, WEAKSAM_SEGMENT
from weaksam_rt.pipeline import ProposalResult
from weaksam_rt.serving.encoding import (
    outputs_of_detections,
    outputs_of_proposals,
    outputs_of_segments,
)
from weaksam_rt.types import Detections, InstanceMasks, PointPrompts, Proposals, SegmentResult

SIZE = (480, 640)


def assert_fulfils(contract, outputs):
    assert set(outputs) == {spec.name for spec in contract.outputs}
    contract.check_outputs({name: array[None] for name, array in outputs.items()})


def detections(n, masks=None):
    return Detections(
        boxes=np.arange(4 * n, dtype=np.float32).reshape(n, 4),
        scores=np.linspace(0.9, 0.5, n, dtype=np.float32),
        labels=np.arange(n, dtype=np.int64) % 2,
        image_size=SIZE,
        masks=masks,
    )


def test_detections_fulfil_their_contract():
    masks = InstanceMasks(rle_counts=(b"a", b"b", b"c"), image_size=SIZE)
    outputs = outputs_of_detections(detections(3, masks), ("cat", "grüner Hund"))
    assert_fulfils(WEAKSAM_DETECT, outputs)
    assert list(outputs["label_names"]) == [b"cat", "grüner Hund".encode(), b"cat"]
    assert list(outputs["mask_counts"]) == [b"a", b"b", b"c"]
    assert tuple(outputs["image_size"]) == SIZE


def test_no_detections_and_no_masks_are_empty_arrays():
    outputs = outputs_of_detections(detections(0), ("cat",))
    assert_fulfils(WEAKSAM_DETECT, outputs)
    assert all(len(outputs[name]) == 0 for name in outputs if name != "image_size")
    assert len(outputs_of_detections(detections(2), ("cat", "dog"))["mask_counts"]) == 0


def test_proposals_fulfil_their_contract():
    proposals = Proposals(
        boxes=np.zeros((2, 4), np.float32),
        scores=np.ones(2, np.float32),
        sources=np.array([0, 3], np.int32),
        image_size=SIZE,
    )
    result = ProposalResult(
        proposals=proposals, used_tags=("cat",), prompts=PointPrompts.concatenate([])
    )
    outputs = outputs_of_proposals(result)
    assert_fulfils(WEAKSAM_PROPOSE, outputs)
    assert list(outputs["used_tags"]) == [b"cat"]


def test_segments_fulfil_their_contract():
    result = SegmentResult(
        mask_counts=((b"1", b"2", b"3"), (b"4", b"5", b"6")),
        boxes=np.zeros((2, 3, 4), np.float32),
        scores=np.zeros((2, 3), np.float32),
        stability_scores=np.zeros((2, 3), np.float32),
        image_size=SIZE,
    )
    outputs = outputs_of_segments(result)
    assert_fulfils(WEAKSAM_SEGMENT, outputs)
    assert outputs["mask_counts"][1, 0] == b"4"
