"""One process of a distributed training; not a test by itself.

Arguments: data folder, output folder. Every process dies before the second epoch, once; torchrun
starts all of them again.
"""

import logging
import os
import sys
from pathlib import Path

import torch

import training.train_classifier as stage_module
from training.models.vit import VitConfig
from training.models.weaktr import WeakTrConfig
from training.train_classifier import ClassifierRecipe, TrainClassifierConfig, train_classifier

RECIPE = ClassifierRecipe(
    model=WeakTrConfig(
        vit=VitConfig(image_size=32, patch_size=16, dim=8, depth=2, num_heads=2, drop_path=0.0)
    ),
    epochs=3,
    batch_size=4,
    mixed_precision=False,
)


def config(data, output):
    return TrainClassifierConfig(
        output=output,
        data=data / "train",
        val=data / "val",
        negatives=data / "val",
        recipe=RECIPE,
        num_threads=torch.get_num_threads(),
        device="cpu",
    )


def _must_not_write(*_, **__):
    raise AssertionError("a process other than the first wrote a file")


def main(data, output):
    if os.environ["RANK"] != "0":
        for name in ("save_checkpoint", "save_classifier", "atomic_path"):
            setattr(stage_module, name, _must_not_write)
        stage_module.Stage.log_metrics = _must_not_write
        stage_module.Stage.finish = _must_not_write
    real = stage_module._train_epoch

    def dies_once(*arguments, **rest):
        if arguments[4] == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
        return real(*arguments, **rest)

    stage_module._train_epoch = dies_once
    train_classifier(config(data, output))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
