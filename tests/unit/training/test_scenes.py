import numpy as np
import pytest

from training.data.coco import load_coco_folder
from training.data.scenes import SCENE_CLASSES, SceneConfig, render_scene
from training.generate_scenes import GenerateScenesConfig, generate_scenes

_SMALL = SceneConfig(min_side=64, max_side=96)


def test_a_scene_depends_on_seed_and_index_only():
    first = render_scene(3, 7, _SMALL)
    render_scene(3, 8, _SMALL)
    again = render_scene(3, 7, _SMALL)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image[:64, :64], render_scene(4, 7, _SMALL).image[:64, :64])


def test_every_scene_keeps_the_promises_of_its_config():
    config = SceneConfig(min_side=64, max_side=96, max_instances=4, max_tags=2)
    for index in range(12):
        scene = render_scene(0, index, config)
        assert all(64 <= side <= 96 for side in scene.image.shape[:2])
        assert scene.masks.shape == (len(scene.labels), *scene.image.shape[:2])
        assert 1 <= len(scene.labels) <= 4
        assert len(set(scene.labels.tolist())) <= 2
        assert scene.masks.sum(axis=0).max() <= 1, "visible masks never overlap"
        assert scene.masks.sum(axis=(1, 2)).min() > 20


def test_all_classes_occur():
    labels = np.concatenate([render_scene(0, i, _SMALL).labels for i in range(40)])
    assert set(labels.tolist()) == set(range(len(SCENE_CLASSES)))


def test_a_shape_stands_out_from_what_it_covers():
    contrast = []
    for index in range(12):
        scene = render_scene(1, index, _SMALL)
        background = scene.image[~scene.masks.any(axis=0)].mean(axis=0)
        contrast += [np.abs(scene.image[m].mean(axis=0) - background).max() for m in scene.masks]
    assert np.median(contrast) > 30


@pytest.mark.parametrize(
    "wrong",
    [{"min_side": 400}, {"max_radius": 0.6}, {"max_tags": 0}, {"min_visible": 1.5}],
)
def test_an_impossible_config_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        SceneConfig(**wrong)


def test_the_written_folder_reads_back_as_coco(tmp_path):
    config = GenerateScenesConfig(num_train=3, num_val=2, scene=_SMALL)
    generate_scenes(tmp_path, config)
    train, val = (load_coco_folder(tmp_path / name) for name in ("train", "val"))
    assert (len(train.records), len(val.records)) == (3, 2)
    assert train.class_names == SCENE_CLASSES
    for index, record in enumerate(train.records):
        scene = render_scene(0, index, _SMALL)
        np.testing.assert_array_equal(record.masks(), scene.masks)
        np.testing.assert_array_equal(record.labels, scene.labels)
        assert np.abs(record.image().astype(int) - scene.image).mean() < 12
        for box, mask in zip(record.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == tight


def test_a_complete_set_is_not_drawn_again(tmp_path):
    config = GenerateScenesConfig(num_train=1, num_val=1, scene=_SMALL)
    generate_scenes(tmp_path, config)
    first = (tmp_path / "train" / "images" / "0000000.jpg").stat().st_mtime_ns
    generate_scenes(tmp_path, config)
    assert (tmp_path / "train" / "images" / "0000000.jpg").stat().st_mtime_ns == first
