"""Scores of whole chains, from tags to a detector, beside the same detector on true boxes.

``python -m benchmarks.weak_chain --runs RUN ... --name NAME`` reads the ``summary.json`` of
``training.run``, one run for each seed (with ``--supervised`` at least one), and writes
``benchmarks/results/weak_chain_NAME.md`` and ``.json``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.entry import enter
from training.engine.stage import git_commit
from weaksam_rt.files import atomic_path, write_json

_RESULTS = Path("benchmarks/results")
_SCORES = ("voc_ap50", "corloc", "coco_ap")


def main(runs: tuple[Path, ...], name: str, command: str) -> None:
    """Collect and write.

    Args:
        runs: Output folders of ``training.run``, all of one recipe.
        name: Names the result files.
        command: How the runs were made, for the report; the seed as SEED.
    """
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    if len({summary["recipe"] for summary in summaries}) != 1:
        raise ValueError(f"the runs have different recipes: {[s['recipe'] for s in summaries]}")
    lines = [
        f"# From tags to a detector: {name}",
        "",
        f"`{command}`, seeds {', '.join(str(s['seed']) for s in summaries)}; collected at commit "
        f"{git_commit()[:12]}. Percent, on the held-out split; the mean over the seeds and their "
        "standard deviation.",
        "",
        "| detector trained on | AP50 | CorLoc | COCO AP |",
        "| --- | ---: | ---: | ---: |",
        *(_row(label, scores) for label, scores in _detectors(summaries)),
        "",
        "| on the way (training split) | |",
        "| --- | ---: |",
        *(f"| {label} | {_spread(values)} |" for label, values in _stages(summaries)),
    ]
    ratios = [summary["ap50_of_supervised"] for summary in _with_bound(summaries)]
    lines += ["", f"AP50 from tags over AP50 from true boxes: {_spread(ratios)} %."]
    with atomic_path(_RESULTS / f"weak_chain_{name}.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    write_json(_RESULTS / f"weak_chain_{name}.json", {"command": command, "summaries": summaries})


def _detectors(summaries: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, float]]]]:
    num_rounds = min(len(summary["detectors"]) for summary in summaries)
    rounds = [
        (f"pseudo boxes, round {number + 1}", [s["detectors"][number] for s in summaries])
        for number in range(num_rounds)
    ]
    bounds = _with_bound(summaries)
    seeds = ", ".join(str(summary["seed"]) for summary in bounds)
    label = "true boxes" if len(bounds) == len(summaries) else f"true boxes, seed {seeds}"
    return [*rounds, (label, [summary["supervised"] for summary in bounds])]


def _with_bound(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [summary for summary in summaries if "supervised" in summary]


def _stages(summaries: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    labels = [summary["pseudo_labels"][-1]["evaluation_only"] for summary in summaries]
    return [
        ("proposals: recall at IoU 0.5", [s["proposals_train"]["recall_0.5"] for s in summaries]),
        ("multiple-instance detector: CorLoc", [s["wsod_train"]["corloc"] for s in summaries]),
        ("multiple-instance detector: AP50", [s["wsod_train"]["voc_ap50"] for s in summaries]),
        ("last pseudo boxes: precision at IoU 0.5", [e["precision_iou50"] for e in labels]),
        ("last pseudo boxes: recall at IoU 0.5", [e["recall_iou50"] for e in labels]),
    ]


def _row(label: str, scores: list[dict[str, float]]) -> str:
    cells = " | ".join(_spread([score[key] for score in scores]) for key in _SCORES)
    return f"| {label} | {cells} |"


def _spread(shares: list[float]) -> str:
    mean, deviation = 100 * np.mean(shares), 100 * np.std(shares)
    return f"{mean:.1f}" if len(shares) == 1 else f"{mean:.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    enter(main)
