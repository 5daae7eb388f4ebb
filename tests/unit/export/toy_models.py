"""Small models in the shape of served contracts, exported once for the tests of engines."""

from pathlib import Path

import torch
from torch import nn

from export.exportable import example_inputs, example_tensors
from export.onnx_from_module import onnx_from_module
from weaksam_rt.artifacts import ModelArtifact, write_manifest
from weaksam_rt.contracts import DETECTOR, DetectorParameters, engine_contract

TOY_DETECTOR = DetectorParameters(image_size=16, num_candidates=4, class_names=("a", "b"))


class ToyDetector(nn.Module):
    """Convolution, normalisation and a sort: boxes whose numbers depend on the pixels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.GELU()
        )
        self.head = nn.Linear(8, 16 * 6)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = image.permute(0, 3, 1, 2).float() / 255
        values = self.head(self.features(pixels).mean(dim=(2, 3))).unflatten(1, (16, 6))
        scores, index = values[..., 4].sigmoid().topk(4, dim=1)
        chosen = values.gather(1, index[:, :, None].expand(-1, -1, 6))
        corners = chosen[..., :4].sigmoid() * 8
        boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 1], dim=-1)
        return boxes, scores, (chosen[..., 5] > 0).to(torch.int32)


def export_toy_detector(directory: Path, seed: int = 0) -> ModelArtifact:
    """``ToyDetector`` as an ONNX artifact."""
    contract = engine_contract(DETECTOR, TOY_DETECTOR)
    example = example_tensors(example_inputs(DETECTOR, TOY_DETECTOR)[0])
    onnx_from_module(ToyDetector(seed), contract, example, directory / "model.onnx")
    return write_manifest(
        directory / "model.onnx",
        model=DETECTOR,
        engine="onnxruntime",
        parameters=TOY_DETECTOR,
        provenance={"source": {"file": "toy"}},
    )
