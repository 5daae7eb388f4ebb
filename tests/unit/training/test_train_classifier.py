import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch

import training.train_classifier as stage_module
from training.data.augment import (
    AugmentConfig,
    augment_images,
    normalize_images,
    published_augment,
)
from training.data.coco import load_coco_folder
from training.data.scenes import SceneConfig
from training.engine.checkpoint import DivergedError, load_weights
from training.engine.stage import read_manifest
from training.evaluation.tag_ap import tag_average_precision
from training.generate_scenes import GenerateScenesConfig, generate_scenes
from training.models.vit import VitConfig
from training.models.vit_adapter import load_classifier
from training.models.weaktr import WeakTrConfig, published_config
from training.train_classifier import (
    ClassifierRecipe,
    TrainClassifierConfig,
    learning_rate,
    load_tagged_images,
    make_classifier,
    train_classifier,
)

_RECIPE = ClassifierRecipe(
    model=WeakTrConfig(vit=VitConfig(image_size=32, patch_size=16, dim=8, depth=2, num_heads=2)),
    epochs=3,
    batch_size=4,
    mixed_precision=False,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scene = SceneConfig(min_side=48, max_side=64)
    generate_scenes(root, GenerateScenesConfig(num_train=9, num_val=3, scene=scene))
    return root


def _config(scenes, output, **changes):
    return TrainClassifierConfig(
        output=output,
        data=scenes / "train",
        val=scenes / "val",
        recipe=dataclasses.replace(_RECIPE, **changes),
        num_threads=torch.get_num_threads(),
    )


def test_a_run_writes_a_loadable_classifier_and_its_metrics(scenes, tmp_path):
    train_classifier(_config(scenes, tmp_path))
    loaded = load_classifier(tmp_path / stage_module.WEIGHTS_NAME)
    assert len(loaded.class_names) == 8
    metrics = read_manifest(tmp_path)["metrics"]
    assert 0 < metrics["val_map"] <= 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("augment", [AugmentConfig(), published_augment()])
def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_run(
    scenes, tmp_path, monkeypatch, augment
):
    train_classifier(_config(scenes, tmp_path / "whole", augment=augment))
    real = stage_module._train_epoch

    def dies_in_the_second_epoch(model, optimizer, recipe, train, epoch, **rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(model, optimizer, recipe, train, epoch, **rest)

    monkeypatch.setattr(stage_module, "_train_epoch", dies_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(_config(scenes, tmp_path / "killed", augment=augment))
    monkeypatch.setattr(stage_module, "_train_epoch", real)
    torch.manual_seed(77)
    train_classifier(_config(scenes, tmp_path / "killed", augment=augment))
    whole, killed = (
        load_weights(tmp_path / name / stage_module.WEIGHTS_NAME) for name in ("whole", "killed")
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name


def test_a_loss_that_is_no_number_stops_at_its_step_and_names_its_images(
    scenes, tmp_path, monkeypatch
):
    real_loss, steps = stage_module.weaktr_loss, []

    def _nan_in_step_3(output, tags, **options):
        loss, parts = real_loss(output, tags, **options)
        steps.append(tags)
        return loss, parts | {"class": math.nan} if len(steps) == 4 else parts

    monkeypatch.setattr(stage_module, "weaktr_loss", _nan_in_step_3)
    with pytest.raises(DivergedError, match=r"step 3: .*, after 1 epochs") as raised:
        train_classifier(_config(scenes, tmp_path, batch_size=3, epochs=2))
    folder = load_coco_folder(scenes / "train")
    named = [record for record in folder.records if record.path.name in str(raised.value)]
    tags = torch.zeros(3, 8)
    for row, record in enumerate(named):
        tags[row, list(record.tags)] = 1
    assert sorted(tags.tolist()) == sorted(steps[3].tolist())


def test_negatives_come_last_and_have_no_tag(scenes):
    folder = load_coco_folder(scenes / "train")
    tagged = load_tagged_images(folder, 32)
    joined = load_tagged_images(folder, 32, negatives=load_coco_folder(scenes / "val", ()))
    assert joined.images.shape == (12, 32, 32, 3)
    assert torch.equal(joined.images[:9], tagged.images)
    assert torch.equal(joined.tags[:9], tagged.tags)
    assert (joined.tags[9:] == 0).all()


def test_images_kept_in_a_file_are_those_kept_in_memory(scenes, tmp_path, monkeypatch):
    folder = load_coco_folder(scenes / "train")
    expected = load_tagged_images(folder, 32)
    store = tmp_path / "images.npy"
    assert torch.equal(load_tagged_images(folder, 32, store=store).images, expected.images)
    monkeypatch.setattr(stage_module, "_fill", None)  # a whole file is not made again
    assert torch.equal(load_tagged_images(folder, 32, store=store).images, expected.images)


def test_negatives_are_learnt_from(scenes, tmp_path):
    config = _config(scenes, tmp_path / "plain", epochs=1)
    train_classifier(config)
    with_background = dataclasses.replace(
        config, output=tmp_path / "more", negatives=scenes / "val"
    )
    train_classifier(with_background)
    plain, more = (
        load_weights(tmp_path / name / stage_module.WEIGHTS_NAME) for name in ("plain", "more")
    )
    assert any(not torch.equal(tensor, more[name]) for name, tensor in plain.items())


def test_too_few_images_for_a_batch_is_an_error_that_says_so(scenes, tmp_path):
    with pytest.raises(ValueError, match="9 images, fewer than one batch of 16"):
        train_classifier(_config(scenes, tmp_path, batch_size=16))


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 20, _RECIPE) / _RECIPE.learning_rate for step in range(21)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[20] == pytest.approx(0)


def test_the_published_schedule_starts_and_ends_above_zero():
    recipe = dataclasses.replace(
        _RECIPE, learning_rate=1e-3, warmup_share=0.5, first_rate=1e-6, last_rate=1e-5
    )
    assert learning_rate(0, 20, recipe) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 10)
    assert learning_rate(9, 20, recipe) == pytest.approx(1e-3)
    assert learning_rate(20, 20, recipe) == pytest.approx(1e-5)


def test_rows_of_a_batch_come_out_as_in_the_whole_batch():
    images = torch.randint(0, 256, (6, 20, 20, 3), dtype=torch.uint8)
    config = AugmentConfig(erase=0.5)
    whole = augment_images(images, 16, config, torch.Generator().manual_seed(4))
    for rows in (slice(0, 3), slice(3, 6)):
        part = augment_images(
            images[rows], 16, config, torch.Generator().manual_seed(4), rows=rows, batch_size=6
        )
        assert torch.equal(part, whole[rows])


def test_processes_share_a_batch_of_files_as_one_would_vary_it(scenes):
    records = load_coco_folder(scenes / "train").records
    train = stage_module.TaggedFiles(images=records, tags=torch.zeros(len(records), 8))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(1))
    recipe = dataclasses.replace(_RECIPE, augment=published_augment())

    def batches(rows):
        return list(stage_module._from_files(train, order, recipe, 0, 32, rows, num_workers=0))

    whole, first, second = (batches(rows) for rows in (slice(0, 4), slice(0, 2), slice(2, 4)))
    assert [len(batch) for batch in whole] == [4, 4]
    for batch, parts in zip(whole, zip(first, second, strict=True), strict=True):
        assert torch.equal(batch, torch.cat(parts))


def test_a_timm_backbone_starts_from_a_file(tmp_path):
    """Nothing is downloaded; the file has one class token, in timm's names."""
    torch.manual_seed(0)
    timm_model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    torch.save({"model": timm_model.state_dict()}, tmp_path / "deit.pth")
    model = make_classifier(
        published_config(), 3, tmp_path / "deit.pth", backbone="deit_tiny_patch16_224"
    )
    assert (model.config.vit.dim, model.config.vit.num_heads) == (192, 3)
    assert not model.config.vit.final_norm
    torch.testing.assert_close(
        model.vit.state_dict()["blocks.11.mlp.fc2.weight"],
        timm_model.state_dict()["blocks.11.mlp.fc2.weight"],
    )


def test_augmentation_changes_images_as_far_as_it_is_told_to():
    images = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8)
    nothing = AugmentConfig(min_crop=1.0, flip=0.0, colour=0.0, erase=0.0)
    same = augment_images(images, 20, nothing, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, normalize_images(images), atol=1e-4, rtol=1e-4)
    mirror = dataclasses.replace(nothing, flip=1.0)
    flipped = augment_images(images, 20, mirror, torch.Generator().manual_seed(0))
    torch.testing.assert_close(flipped, same.flip(3), atol=1e-4, rtol=1e-4)
    once, again = (
        augment_images(images, 16, AugmentConfig(), torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert once.shape == (3, 3, 16, 16)
    assert torch.equal(once, again)


def test_average_precision_of_tags():
    scores = np.array([[0.9, 0.1], [0.8, 0.9], [0.7, 0.5]])
    tags = np.array([[True, False], [False, False], [True, False]])
    precision = tag_average_precision(scores, tags)
    assert precision[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(precision[1]), "a class without images has no precision"
