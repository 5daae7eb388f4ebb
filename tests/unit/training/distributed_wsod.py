"""One process of a distributed training of the multiple-instance detector; not a test by itself.

Arguments: data folder, output folder, the step before which every process dies (-1: none).
"""

import os
import sys
from pathlib import Path

import training.train_wsod as stage_module
from training.models.wsod_detector import WsodDetectorConfig
from training.train_wsod import TrainWsodConfig, WsodRecipe
from training.wsod.drop_block import DropBlockConfig

RECIPE = WsodRecipe(
    model=WsodDetectorConfig(
        trunk="resnet18",
        image_size=64,
        head_width=16,
        num_refinements=2,
        box_regression=True,
        drop_block=DropBlockConfig(enabled=True, width=4),
    ),
    method="mist",
    epochs=3,
    images_per_step=3,
    warmup_steps=1,
    min_side_px=8.0,
)


def config(data, output):
    return TrainWsodConfig(
        data=data / "train",
        proposals=data / "proposals.json",
        output=output,
        trunk_weights=data / "resnet18.pth",
        recipe=RECIPE,
    )


def _must_not_write(*_, **__):
    raise AssertionError("a process other than the first wrote a file")


def main(data, output, last):
    if os.environ["RANK"] != "0":
        for name in ("save_checkpoint", "save_weights", "write_detections", "_describe"):
            setattr(stage_module, name, _must_not_write)
        stage_module.Stage.log_metrics = _must_not_write
        stage_module.Stage.finish = _must_not_write
    real = stage_module.train_step

    def dies_before(*arguments, step, **rest):
        if step == last:
            os._exit(9)
        return real(*arguments, step=step, **rest)

    stage_module.train_step = dies_before
    stage_module.main(config(data, output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
