import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from training.data.coco import load_coco_folder
from training.engine.checkpoint import load_weights
from training.models.squeezenet import (
    PIXEL_MEAN,
    PIXEL_STD,
    SqueezeNetFeatures,
    load_imagenet_squeezenet,
)

DATA = Path(os.environ.get("WEAKSAM_DATA", "../shared/data"))
WEIGHTS = DATA / "weights" / "squeezenet1_0_imagenet.pt"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"no pretrained weights at {WEIGHTS}; set WEAKSAM_DATA"
)
ANIMALS = {
    "bear": ("brown bear", "American black bear", "ice bear", "sloth bear"),
    "elephant": ("African elephant", "Indian elephant", "tusker"),
    "otter": ("otter",),
    "rhesus monkey": ("macaque", "baboon", "guenon", "langur", "patas"),
    "tiger": ("tiger", "tiger cat"),
    "turtle": ("loggerhead", "leatherback turtle", "mud turtle", "terrapin", "box turtle"),
}


def test_sides_that_are_multiples_of_16_halve_exactly() -> None:
    features = SqueezeNetFeatures()(torch.zeros(1, 3, 48, 80))

    assert features.stride4.shape == (1, 256, 12, 20)
    assert features.stride8.shape == (1, 512, 6, 10)
    assert features.stride16.shape == (1, 512, 3, 5)


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    trunk = SqueezeNetFeatures()

    features = trunk(torch.randn(1, 3, 32, 32))
    features.stride16.sum().backward()

    assert all(parameter.grad is not None for parameter in trunk.parameters())


def test_cells_stay_centred_on_what_they_describe() -> None:
    torch.manual_seed(0)
    trunk = SqueezeNetFeatures()
    for stride, name in ((4, "stride4"), (8, "stride8"), (16, "stride16")):
        image = torch.randn(1, 3, 256, 256, requires_grad=True)
        cell = 128 // stride
        getattr(trunk(image), name)[..., cell, cell].sum().backward()
        assert image.grad is not None
        rows = image.grad.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
        middle_of_field = (rows.min() + rows.max() + 1).item() / 2

        assert abs(middle_of_field - (cell + 0.5) * stride) <= stride / 4


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)

    with pytest.raises(ValueError, match="not SqueezeNet"):
        load_imagenet_squeezenet(path)


@needs_weights
def test_pretrained_trunk_with_its_classifier_recognises_animals() -> None:
    trunk = load_imagenet_squeezenet(WEIGHTS)
    head = load_weights(WEIGHTS)
    labels = (DATA / "weights" / "imagenet_labels.txt").read_text().splitlines()[1:]
    folder = load_coco_folder(DATA / "animals7" / "val")
    hits = []
    for record in folder.records[::8]:
        name = folder.class_names[record.tags[0]]
        if name not in ANIMALS:
            continue
        pixels = Image.fromarray(record.image()).resize((224, 224), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(pixels)).float()
        image = (image - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        with torch.no_grad():
            x = trunk(image.permute(2, 0, 1)[None]).stride16
            x = functional.conv2d(x, head["conv_final.weight"], head["conv_final.bias"], padding=1)
            best = functional.relu(x).mean(dim=(2, 3)).topk(5).indices[0].tolist()
        hits.append(any(labels[i].split(",")[0] in ANIMALS[name] for i in best))

    assert sum(hits) / len(hits) > 0.7, f"{sum(hits)} of {len(hits)} recognised in the top 5"
