import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from training.data.augment import normalize_images
from training.map_extraction import MapPasses, peak_prompts, summed_maps
from training.models.vit import VitConfig
from training.models.vit_adapter import LoadedClassifier
from training.models.weaktr import WeakTr, published_config
from weaksam_rt.prompt_clustering import ClusteringConfig, prompts_from_maps
from weaksam_rt.types import PromptSource

_VIT = VitConfig(image_size=32, patch_size=8, dim=16, depth=3, num_heads=2)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = WeakTr(published_config(_VIT), 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sharper maps than an untrained network has
            parameter.mul_(3.0)
    return LoadedClassifier(model=model, class_names=("a", "b", "c"))


def _image(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _prompts(classifier, image, class_ids=(0, 2), passes=None, thresh=-0.5):
    return peak_prompts(
        classifier,
        image,
        class_ids,
        passes=MapPasses() if passes is None else passes,
        clustering=ClusteringConfig(),
        present_logit_thresh=thresh,
    )


def test_maps_are_summed_over_passes_at_the_images_size_and_then_normalised(classifier):
    """Written out pass by pass, as in the paper."""
    image, total = _image(40, 56), 0.0
    for scale in (1.0, 0.8, 1.2):
        size = (round(56 * scale), round(40 * scale))
        seen = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        for mirrored in (False, True):
            pixels = np.ascontiguousarray(seen[:, ::-1]) if mirrored else seen
            with torch.inference_mode():
                output = classifier.model(normalize_images(torch.from_numpy(pixels)[None]))
            large = functional.interpolate(
                output.coarse_maps, size=(40, 56), mode="bilinear", align_corners=False
            )[0, 1]
            total = total + (large.flip(1) if mirrored else large)
    expected = (total - total.min()) / (total.max() - total.min() + 1e-8)
    found = summed_maps(classifier, image, [1], passes=MapPasses()).coarse
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_one_square_pass_gives_the_prompts_of_the_runtime(classifier):
    image = _image(32, 32)
    with torch.inference_mode():
        _, coarse, fine, cross = (
            part.numpy() for part in classifier.served()(torch.from_numpy(image)[None])
        )
    expected = prompts_from_maps(
        coarse_maps=coarse[0, [0, 2]],
        fine_maps=fine[0, [0, 2]],
        cross_maps=cross[0][:, [0, 2]],
        class_ids=np.array([0, 2], np.int32),
        image_size=(32, 32),
        config=ClusteringConfig(),
    )
    found, used = _prompts(classifier, image, passes=MapPasses(scales=(1.0,), flip=False))
    assert used == (0, 2)
    for field in dataclasses.fields(found):
        np.testing.assert_allclose(
            getattr(found, field.name), getattr(expected, field.name), atol=1e-4
        )


def test_a_mirrored_image_has_mirrored_maps(classifier):
    image = _image(40, 56)
    there = summed_maps(classifier, image, [0, 1], passes=MapPasses(scales=(1.0,)))
    back = summed_maps(
        classifier, np.ascontiguousarray(image[:, ::-1]), [0, 1], passes=MapPasses(scales=(1.0,))
    )
    for name in ("coarse", "fine", "cross"):
        np.testing.assert_allclose(
            getattr(back, name), getattr(there, name)[:, ::-1], atol=1e-3, err_msg=name
        )


def test_without_tags_the_first_pass_decides(classifier):
    image = _image(40, 56)
    with torch.inference_mode():
        logits = classifier.model(normalize_images(torch.from_numpy(image)[None])).class_logits[0]
    thresh = float(logits.sort().values[:2].mean())
    prompts, used = _prompts(classifier, image, class_ids=None, thresh=thresh)
    assert used == tuple(torch.nonzero(logits > thresh).flatten().tolist())
    cams = prompts.sources != PromptSource.CROSS
    assert set(prompts.class_ids[cams].tolist()) == set(used)
    nothing, used = _prompts(classifier, image, class_ids=None, thresh=1e6)
    assert (len(nothing), used) == (0, ())


def test_points_lie_in_the_original_image_also_where_it_is_seen_smaller(classifier):
    image = _image(120, 200)
    small, _ = _prompts(classifier, image, passes=MapPasses(longest_side=50))
    assert small.points[:, 0].max() > 50, "pixels of the image, not of what was seen"
    assert (small.points >= 0).all()
    assert (small.points < [200, 120]).all()


def test_an_image_smaller_than_a_patch_is_seen_as_one(classifier):
    prompts, _ = _prompts(classifier, _image(5, 6))
    assert (prompts.points < [6, 5]).all()


@pytest.mark.parametrize("wrong", [{"scales": ()}, {"scales": (1.0, 0.0)}, {"longest_side": 0}])
def test_impossible_passes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MapPasses(**wrong)
