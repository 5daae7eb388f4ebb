from benchmarks.proposal_recall import Row, report, seconds_of_stage
from training.evaluation.recall import IOU_THRESHOLDS, ProposalRecall

MANIFEST = {"duration_s": 300.0, "commit": "0123456789abcdef", "metrics": {}}


def test_our_seconds_stand_beside_selective_searchs():
    recall = ProposalRecall(
        recall=dict.fromkeys(IOU_THRESHOLDS, 0.5),
        num_truth=7,
        num_images=4,
        mean_proposals=55.0,
        median_proposals=55.0,
    )
    ours = seconds_of_stage(MANIFEST, 4)
    assert ours == 75
    rows = [Row(label="ours", recall=recall, seconds=ours)]
    text = report("scenes", "python -m ...", rows, MANIFEST)
    assert "| ours | 55 | 75.00 | 0.500" in text
    assert "commit 0123456789ab " in text
