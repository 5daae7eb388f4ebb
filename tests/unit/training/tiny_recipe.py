"""A recipe that runs in seconds."""

import dataclasses

from training.models.vit import VitConfig


def tiny_recipe(recipe, *, batch_size=None):
    """The recipe's methods and thresholds with toy sizes and one epoch of everything; a step of the
    detector has ``batch_size`` images, by default the recipe's.
    """
    vit = VitConfig(image_size=64, patch_size=16, dim=24, depth=2, num_heads=3)
    weaktr = dataclasses.replace(recipe.classifier.model, vit=vit, gate_reduction=2)
    pipeline = recipe.proposals.pipeline
    few = dataclasses.replace(pipeline.proposals, points_per_side=4, min_side_px=4.0)
    return dataclasses.replace(
        recipe,
        classifier=dataclasses.replace(recipe.classifier, model=weaktr, epochs=1, batch_size=4),
        proposals=dataclasses.replace(
            recipe.proposals, pipeline=dataclasses.replace(pipeline, proposals=few)
        ),
        wsod=dataclasses.replace(
            recipe.wsod,
            epochs=1,
            min_side_px=4.0,
            model=dataclasses.replace(recipe.wsod.model, image_size=96),
        ),
        detector=dataclasses.replace(
            recipe.detector,
            epochs=1,
            batch_size=batch_size or recipe.detector.batch_size,
            model=dataclasses.replace(recipe.detector.model, image_size=96),
        ),
    )
