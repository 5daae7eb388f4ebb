import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.data.prompt_samples import AugmentConfig, PromptConfig, load_masked_images
from training.models.sam import (
    CompactEncoderConfig,
    SamConfig,
    VitEncoderConfig,
    build_sam,
    load_sam,
    save_sam,
)
from training.train_sam import (
    SamBatch,
    SamRecipe,
    TrainSamConfig,
    add_correcting_click,
    batch_loss,
    draw_batch,
    learning_rate,
    main,
    make_batch,
    make_optimizer,
    start_training,
    train_step,
)

SIZES = {"image_size": 64, "embed_dim": 32, "num_heads": 2, "mlp_dim": 48}
TOY = SamConfig(encoder=CompactEncoderConfig(width=16), **SIZES)
RECIPE = SamRecipe(
    model=TOY,
    steps=4,
    batch_size=2,
    prompts_per_image=2,
    warmup_steps=2,
    cached_side=64,
    mixed_precision=False,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images, each with two bright rectangles on a dark ground."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(2):
        pixels = np.full((48, 64, 3), 30, dtype=np.uint8)
        for j, (x, y, w, h) in enumerate([(6, 8, 18, 26), (36, 14, 20, 22 - 6 * i)]):
            pixels[y : y + h, x : x + w] = (200, 60 + 120 * j, 220 - 150 * i)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "segmentation": [corners],
                }
            )
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root


def state_of(path: Path) -> dict[str, Tensor]:
    return load_sam(path / "sam.safetensors").state_dict()


def test_two_images_are_learned_by_heart(data: Path) -> None:
    encoder = VitEncoderConfig(
        depth=1, width=32, num_heads=2, global_blocks=(0,), window_size=0, patch_size=8
    )
    recipe = dataclasses.replace(
        RECIPE,
        model=dataclasses.replace(TOY, encoder=encoder),
        steps=160,
        warmup_steps=5,
        learning_rate=3e-3,
        max_gradient_norm=10.0,
        refine_probability=0.0,
        augment=AugmentConfig(whole_probability=1.0, shrink_probability=0.0, jitter=0.0),
        prompts=PromptConfig(box_probability=0.5, centre_probability=0.5, box_jitter=0.0),
    )
    training = start_training(TrainSamConfig(output=data, data=(data,), recipe=recipe))
    folders = [load_masked_images(data, 64)]
    readings = [
        train_step(training, make_batch(draw_batch(folders, recipe, step)), recipe, step)
        for step in range(recipe.steps)
    ]

    assert np.mean([r["best_iou"] for r in readings[-5:]]) > 0.9
    assert readings[-1]["loss_masks"] < 0.2 * readings[0]["loss_masks"]


def test_gradient_reaches_every_parameter_that_matters(data: Path) -> None:
    training = start_training(TrainSamConfig(output=data, data=(data,), recipe=RECIPE))
    prompts = PromptConfig(box_probability=0.5)
    recipe = dataclasses.replace(RECIPE, batch_size=8, prompts=prompts)
    batch = make_batch(draw_batch([load_masked_images(data, 64)], recipe, 0))

    total, _ = batch_loss(training, batch, recipe, refine=True)
    total.backward()

    without = {n for n, p in training.sam.named_parameters() if p.grad is None}
    ignored_by_softmax = {  # it adds the same to the scores of all cells
        n for n, _ in training.sam.named_parameters() if n.endswith("token_to_image.k_proj.bias")
    }
    assert without == ignored_by_softmax


def test_a_killed_training_goes_on_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    config = TrainSamConfig(
        output=tmp_path / "whole", data=(data,), recipe=RECIPE, checkpoint_every=2, num_threads=1
    )
    main(config)
    killed = dataclasses.replace(config, output=tmp_path / "killed")
    steps_before_death = []

    def die_after_three_steps(*args: object) -> dict[str, float]:
        if len(steps_before_death) == 3:
            raise KeyboardInterrupt
        steps_before_death.append(args[-1])
        return train_step(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.train_sam.train_step", die_after_three_steps)
        main(killed)
    main(killed)

    whole, resumed = state_of(config.output), state_of(killed.output)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_training_is_not_repeated(data: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=1)
    config = TrainSamConfig(output=tmp_path / "run", data=(data,), recipe=recipe, num_threads=1)
    main(config)
    written = (config.output / "sam.safetensors").stat().st_mtime_ns

    main(config)

    assert (config.output / "sam.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "teacher_config",
    [
        dataclasses.replace(TOY, mlp_dim=64),
        SamConfig(
            encoder=VitEncoderConfig(
                depth=1, width=32, num_heads=2, global_blocks=(0,), window_size=0
            ),
            **{**SIZES, "image_size": 96},
        ),
    ],
    ids=["same embedding", "larger frame"],
)
def test_a_student_comes_closer_to_its_teacher(
    teacher_config: SamConfig, data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    path = tmp_path / "teacher.safetensors"
    save_sam(path, build_sam(teacher_config), teacher_config)
    recipe = dataclasses.replace(RECIPE, warmup_steps=1, refine_probability=0.0)
    taught = TrainSamConfig(output=data, data=(data,), teacher=path, recipe=recipe)
    training = start_training(taught)
    batch = make_batch(draw_batch([load_masked_images(data, 64)], recipe, 0))

    def distance() -> float:
        with torch.no_grad():
            total, own = batch_loss(training, batch, recipe, refine=False)
        return (total - own.total).item()

    before = distance()
    for _ in range(4):
        train_step(training, batch, recipe, 1)

    assert training.teacher is not None
    assert all(p.grad is None for p in training.teacher.parameters())
    assert distance() < before


def test_training_starts_from_given_weights(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = build_sam(TOY)
    save_sam(tmp_path / "other.safetensors", other, TOY)

    training = start_training(
        TrainSamConfig(
            output=data, data=(data,), init=tmp_path / "other.safetensors", recipe=RECIPE
        )
    )

    for found, expected in zip(training.sam.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_frozen_layers_stay_and_the_trunk_is_slower() -> None:
    recipe = dataclasses.replace(RECIPE, frozen=("image_encoder.trunk.conv1.",))
    training = start_training(TrainSamConfig(output=Path(), data=(), recipe=recipe))
    encoder = training.sam.image_encoder
    factors = {
        id(p): g["rate_factor"] for g in training.optimizer.param_groups for p in g["params"]
    }

    assert not encoder.trunk.conv1.weight.requires_grad
    assert id(encoder.trunk.conv1.weight) not in factors
    assert factors[id(encoder.trunk.fire2.squeeze.weight)] == recipe.trunk_rate_factor
    assert factors[id(encoder.lateral8.weight)] == 1


def test_embeddings_and_biases_do_not_decay() -> None:
    sam = build_sam(TOY)
    decays = {
        id(p): g["weight_decay"]
        for g in make_optimizer(sam, RECIPE).param_groups
        for p in g["params"]
    }

    assert decays[id(sam.mask_decoder.mask_tokens.weight)] == 0
    assert decays[id(sam.image_encoder.lateral8.bias)] == 0
    assert decays[id(sam.image_encoder.lateral8.weight)] == RECIPE.weight_decay


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = dataclasses.replace(RECIPE, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, recipe) for step in range(101)]

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_a_correcting_click_goes_where_the_mask_is_wrong() -> None:
    coverage = torch.zeros(2, 8, 8)
    coverage[:, 2:4, 2:4] = 1
    logits = torch.where(coverage > 0, 5.0, -5.0)
    logits[0, 3, 2] = -5  # missed: the click says object
    logits[1, 6, 7] = 5  # too much: the click says background
    batch = SamBatch(
        images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        valid_size=torch.full((1, 2), 16, dtype=torch.int32),
        coverage=coverage,
        point_coords=torch.tensor([[[4.0, 4.0], [0.0, 0.0]], [[4.0, 4.0], [8.0, 8.0]]]),
        point_labels=torch.tensor([[1, -1], [2, 3]], dtype=torch.int32),
        is_box=torch.tensor([False, True]),
    )

    coords, labels = add_correcting_click(batch, logits)

    assert labels.tolist() == [[1, 1, -1], [0, 2, 3]]
    assert coords[0].tolist() == [[4, 4], [4.5, 6.5], [0, 0]]
    assert coords[1].tolist() == [[14.5, 12.5], [4, 4], [8, 8]]


def test_weights_must_fit_the_number_of_folders(data: Path) -> None:
    recipe = dataclasses.replace(RECIPE, folder_weights=(1.0, 2.0))

    with pytest.raises(ValueError, match="2 folder_weights for 1"):
        draw_batch([load_masked_images(data, 64)], recipe, 0)
