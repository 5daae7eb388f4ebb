"""The official SAM layout, exported, against the ``segment_anything`` package.

Run ``python -m benchmarks.official_sam``: weights are random (no checkpoint is needed) and stored
as an official ``.pth`` first, so that the loader is part of what is compared. ViT-B takes some
minutes on two cores and 8 GB of memory.
"""

import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from segment_anything import sam_model_registry

from benchmarks.entry import enter
from export.exportable import example_tensors, sam_exportables
from export.onnx_files import EXTERNAL_DATA_BYTES
from export.onnx_from_module import onnx_from_module
from export.sam_agreement import (
    PromptedImage,
    SamAgreement,
    agreement_with_segment_anything,
    spread_out_,
)
from training.engine.stage import git_commit, package_versions
from weaksam_rt.artifacts import ModelArtifact, write_manifest
from weaksam_rt.backends.onnx_runtime import OnnxRuntimeModel
from weaksam_rt.files import atomic_path, write_json

MAX_RELATIVE_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSamResult:
    """One layout, exported and compared."""

    layout: str
    agreement: SamAgreement
    megabytes: dict[str, float]
    """Size on disk of each exported model."""
    export_s: float


def measure(
    layout: str, directory: Path, *, external_above: int = EXTERNAL_DATA_BYTES
) -> OfficialSamResult:
    """Export the random ``layout`` to ``directory`` and compare it with the package.

    Args:
        layout: ``vit_b``, ``vit_l`` or ``vit_h``.
        directory: Gets the checkpoint and the exported models.
        external_above: See ``onnx_from_module``.
    """
    torch.manual_seed(0)
    sam = sam_model_registry[layout](checkpoint=None).eval()
    spread_out_(sam, torch.Generator().manual_seed(1))
    checkpoint = directory / f"sam_{layout}_random.pth"
    torch.save(sam.state_dict(), checkpoint)
    start = time.perf_counter()
    artifacts = _export(checkpoint, directory, external_above)
    export_s = time.perf_counter() - start
    encoder, decoder = map(OnnxRuntimeModel, artifacts)
    agreement = agreement_with_segment_anything(sam, encoder, decoder, prompted_images())
    sizes = {a.model: sum(f.stat().st_size for f in a.files) / 1e6 for a in artifacts}
    return OfficialSamResult(layout=layout, agreement=agreement, megabytes=sizes, export_s=export_s)


def prompted_images() -> list[PromptedImage]:
    """Two noisy images of different shape and with different numbers of prompts."""
    rng = np.random.default_rng(0)
    wide, tall = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 80), (90, 40)))
    return [
        PromptedImage(
            pixels=wide,
            points=((20, 30), (50, 10), (5, 40)),
            boxes=((8, 6, 40, 44), (30, 2, 70, 50)),
        ),
        PromptedImage(pixels=tall, points=((30, 70),), boxes=((3, 20, 37, 80),)),
    ]


def main(layout: str = "vit_b", output: Path = Path("benchmarks/results/official_sam")) -> None:
    """Measure and write ``output``.md and .json.

    Args:
        layout: ``vit_b``, ``vit_l`` or ``vit_h``.
        output: Report without its endings.
    """
    with tempfile.TemporaryDirectory(prefix="weaksam-sam-") as folder:
        result = measure(layout, Path(folder))
    content = {
        "command": f"python -m benchmarks.official_sam --layout {layout}",
        "commit": git_commit(),
        "versions": package_versions(),
        "result": asdict(result),
    }
    write_json(output.with_suffix(".json"), content)
    with atomic_path(output.with_suffix(".md")) as temporary:
        temporary.write_text(_report(result, content))
    Console().print(_report(result, content), markup=False)
    if result.agreement.worst > MAX_RELATIVE_ERROR:
        raise SystemExit(f"relative error {result.agreement.worst:g} > {MAX_RELATIVE_ERROR:g}")


def _export(checkpoint: Path, directory: Path, external_above: int) -> list[ModelArtifact]:
    artifacts = []
    for exportable in sam_exportables(checkpoint):
        path = directory / exportable.model / "model.onnx"
        example = example_tensors(exportable.inputs[0])
        onnx_from_module(
            exportable.module, exportable.contract, example, path, external_above=external_above
        )
        artifacts.append(
            write_manifest(
                path,
                model=exportable.model,
                engine="onnxruntime",
                parameters=exportable.parameters,
                provenance={"source": exportable.source},
            )
        )
    return artifacts


def _report(result: OfficialSamResult, content: dict[str, Any]) -> str:
    agreement = result.agreement
    sizes = ", ".join(f"{name} {mb:.0f} MB" for name, mb in result.megabytes.items())
    return "\n".join(
        [
            f"# {result.layout} in the official layout, exported",
            "",
            f"- `{content['command']}`; random weights, none of them zero; commit "
            f"{content['commit']}",
            f"- ONNX Runtime {onnxruntime.__version__} against `segment_anything` on torch "
            f"{torch.__version__}, {platform.machine()}",
            f"- {sizes}; export {result.export_s:.0f} s",
            f"- {agreement.num_prompts} prompts (points and boxes) of 2 images in "
            f"{agreement.num_calls} decoder calls, each compared with `SamPredictor.predict`",
            "",
            "| output | max error / max magnitude |",
            "|---|---|",
            f"| image embeddings | {agreement.embeddings:.1e} |",
            f"| low-resolution logits | {agreement.low_res_logits:.1e} |",
            f"| predicted IoU | {agreement.iou_predictions:.1e} |",
            "",
        ]
    )


if __name__ == "__main__":
    enter(main)
