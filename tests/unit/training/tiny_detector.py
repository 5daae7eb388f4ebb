"""A detector that trains in seconds; run as a module, a training that is killed at one step:
``python -m tests.unit.training.tiny_detector DATA OUTPUT STEP``.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import training.retrain_detector as stage_module
from training.data.coco import load_coco_folder
from training.engine.stage import open_stage
from training.retrain_detector import DetectorRecipe, initial_model, train
from training.retraining.faster_rcnn import FasterRcnnConfig

RECIPE = DetectorRecipe(
    model=FasterRcnnConfig(
        image_size=64,
        neck_channels=16,
        roi_channels=16,
        head_width=16,
        anchor_sizes=((12,), (24,), (44,)),
        rois_per_image=8,
        proposals_per_image=30,
    ),
    epochs=2,
    batch_size=2,
    warmup_steps=1,
)


def with_masks(recipe=RECIPE, **changes):
    model = dataclasses.replace(recipe.model, mask_channels=8)
    return dataclasses.replace(recipe, model=model, **changes)


def open_detector_stage(directory):
    return open_stage("retrain_detector", directory, config=RECIPE, inputs={})


def train_masks(data, output):
    """Three epochs with masks, or what is left of them."""
    recipe = with_masks(epochs=3)
    folder = load_coco_folder(data)
    start = initial_model(recipe, folder.class_names, None)
    return train(open_detector_stage(output), folder, recipe, start)


def _main(data, output, victim):
    real_step = stage_module.train_step

    def _killed(model, optimizer, batch, recipe, step, num_steps):
        if step == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(model, optimizer, batch, recipe, step, num_steps)

    stage_module.train_step = _killed
    train_masks(data, output)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
