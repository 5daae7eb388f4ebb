"""Small models in the shape of served contracts, exported once for the tests of engines."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from export.exportable import example_inputs, example_tensors
from export.onnx_from_module import onnx_from_module
from weaksam_rt.artifacts import ModelArtifact, write_manifest
from weaksam_rt.contracts import DETECTOR, DetectorParameters, engine_contract

TOY_DETECTOR = DetectorParameters(image_size=16, num_candidates=4, class_names=("a", "b"))
TOY_MASK_DETECTOR = replace(TOY_DETECTOR, mask_size=4)


class ToyDetector(nn.Module):
    """Convolution, normalisation and a sort: boxes whose numbers depend on the pixels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.GELU()
        )
        self.head = nn.Linear(8, 16 * 6)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = image.permute(0, 3, 1, 2).float() / 255
        values = self.head(self.features(pixels).mean(dim=(2, 3))).unflatten(1, (16, 6))
        scores, index = values[..., 4].sigmoid().topk(4, dim=1)
        chosen = values.gather(1, index[:, :, None].expand(-1, -1, 6))
        corners = chosen[..., :4].sigmoid() * 8
        boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 1], dim=-1)
        return boxes, scores, (chosen[..., 5] > 0).to(torch.int32)


class ToyMaskDetector(nn.Module):
    """``ToyDetector`` whose candidates all have one mask, drawn larger for a better score."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.detector = ToyDetector(seed)
        self.mask = nn.Parameter(torch.randn(4, 4))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes, scores, labels = self.detector(image)
        return boxes, scores, labels, scores[:, :, None, None] + self.mask


def export_toy_detector(directory: Path, seed: int = 0, *, masks: bool = False) -> ModelArtifact:
    """``ToyDetector`` or ``ToyMaskDetector`` as an ONNX artifact."""
    parameters = TOY_MASK_DETECTOR if masks else TOY_DETECTOR
    module = ToyMaskDetector(seed) if masks else ToyDetector(seed)
    contract = engine_contract(DETECTOR, parameters)
    example = example_tensors(example_inputs(DETECTOR, parameters)[0])
    onnx_from_module(module, contract, example, directory / "model.onnx")
    return write_manifest(
        directory / "model.onnx",
        model=DETECTOR,
        engine="onnxruntime",
        parameters=parameters,
        provenance={"source": {"file": "toy"}},
    )
