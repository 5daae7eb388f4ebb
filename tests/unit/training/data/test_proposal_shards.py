import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.coco import CocoFolder, ImageRecord
from training.data.proposal_shards import (
    ImagePart,
    ShardWatch,
    ShardWriter,
    Skipped,
    decode_line,
    encode_line,
    index_shards,
)
from training.generate_proposals import merge_shards
from weaksam_rt.errors import ArtifactError
from weaksam_rt.types import PointPrompts, Proposals

_SIZE = (480, 640)


def _part(num_boxes=2, num_points=3, seed=0):
    generator = np.random.default_rng(seed)
    corners = generator.random((num_boxes, 2, 2)).cumsum(axis=1) * 200
    return ImagePart(
        proposals=Proposals(
            boxes=corners.reshape(-1, 4).astype(np.float32),
            scores=generator.random(num_boxes).astype(np.float32),
            sources=generator.integers(0, 4, num_boxes).astype(np.int32),
            image_size=_SIZE,
        ),
        prompts=PointPrompts(
            points=(generator.random((num_points, 2)) * 400).astype(np.float32),
            scores=generator.random(num_points).astype(np.float32),
            class_ids=generator.integers(-1, 3, num_points).astype(np.int32),
            sources=generator.integers(1, 4, num_points).astype(np.int32),
        ),
        used_tags=("é, \n", "b"),
    )


def _assert_equal(found, expected):
    assert found.used_tags == expected.used_tags
    for name in ("boxes", "scores", "sources"):
        got, want = getattr(found.proposals, name), getattr(expected.proposals, name)
        np.testing.assert_allclose(got, want, atol=1e-4)
    for name in ("points", "scores", "class_ids", "sources"):
        got, want = getattr(found.prompts, name), getattr(expected.prompts, name)
        np.testing.assert_allclose(got, want, atol=1e-4)


@given(num_boxes=st.integers(0, 3), num_points=st.integers(0, 3), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_a_line_reads_back_as_it_was_and_writes_the_same_line_again(num_boxes, num_points, seed):
    part = _part(num_boxes, num_points, seed)
    line = encode_line(7, part)
    assert "\n" not in line
    back = decode_line(line, _SIZE)
    _assert_equal(back, part)
    assert encode_line(7, back) == line


def test_an_image_is_found_in_whatever_file_it_is(tmp_path):
    for name, image_ids in (("a", (3, 1)), ("b", (2,))):
        with ShardWriter(tmp_path, name) as writer:
            for image_id in image_ids:
                writer.write(encode_line(image_id, _part(seed=image_id)))
    index = index_shards(tmp_path)
    assert set(index.places) == {1, 2, 3}
    for image_id in (1, 2, 3):
        _assert_equal(index.read(image_id, _SIZE), _part(seed=image_id))
    assert index.read(4, _SIZE) is None
    assert index_shards(tmp_path / "nowhere").places == {}


def test_an_image_that_was_left_out_counts_until_it_is_done(tmp_path):
    with ShardWriter(tmp_path, "a") as writer:
        writer.write(encode_line(1, Skipped(file_name="x.jpg", reason="torn")))
    assert index_shards(tmp_path).read(1, _SIZE) == Skipped(file_name="x.jpg", reason="torn")
    with ShardWriter(tmp_path, "a") as writer:
        writer.write(encode_line(1, _part()))
    index = index_shards(tmp_path)
    assert index.skipped == {}
    _assert_equal(index.read(1, _SIZE), _part())


@pytest.mark.parametrize("torn", [b"{", b"x" * 200_000])
def test_a_torn_last_line_does_not_count_and_is_cut_off(tmp_path, torn):
    with ShardWriter(tmp_path, "a") as writer:
        writer.write(encode_line(1, _part()))
    path = tmp_path / "a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert set(index_shards(tmp_path).places) == {1}
    with ShardWriter(tmp_path, "a") as writer:
        assert path.read_bytes() == whole
        writer.write(encode_line(2, _part()))
    assert set(index_shards(tmp_path).places) == {1, 2}


def test_a_damaged_line_is_an_error_that_names_it(tmp_path):
    with ShardWriter(tmp_path, "a") as writer:
        writer.write(encode_line(1, _part()))
        writer.write('{"image_id":')
    with pytest.raises(ArtifactError, match=r"line 2 of .*a\.jsonl is damaged"):
        index_shards(tmp_path)


def test_a_file_has_one_writer(tmp_path):
    with (
        ShardWriter(tmp_path, "a"),
        pytest.raises(ArtifactError, match="another process writes"),
        ShardWriter(tmp_path, "a"),
    ):
        pass


def test_the_watch_counts_whole_lines_of_all_files(tmp_path):
    watch = ShardWatch(tmp_path)
    assert watch.count() == 0
    for number, name in enumerate(("a", "b", "a"), start=1):
        with ShardWriter(tmp_path, name) as writer:
            writer.write("{}")
        assert watch.count() == number
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(b"{")
    assert watch.count() == 3


def _peak_of_merging(directory, num_images):
    """Bytes at most held while results of ``num_images`` images are put together."""
    with ShardWriter(directory, "a") as writer:
        for image_id in range(num_images):
            writer.write(encode_line(image_id, _part(num_boxes=100, num_points=40, seed=image_id)))
    records = tuple(
        ImageRecord(
            image_id=image_id,
            path=directory / f"{image_id}.jpg",
            image_size=_SIZE,
            boxes=np.array([[0, 0, 50, 50]], np.float32),
            labels=np.zeros(1, np.int64),
            is_crowd=np.zeros(1, bool),
            segmentations=(),
        )
        for image_id in range(num_images)
    )
    folder = CocoFolder(root=directory, class_names=("a",), category_ids=(1,), records=records)
    tracemalloc.start()
    try:
        merge_shards(directory / "proposals.json", folder, index_shards(directory))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_results(tmp_path):
    """What grows are ids and offsets: some hundred bytes an image, of the 10 kB that it has."""
    _peak_of_merging(tmp_path / "warm", 5)
    few, many = (_peak_of_merging(tmp_path / str(n), n) for n in (30, 150))
    per_image = (tmp_path / "150" / "a.jsonl").stat().st_size / 150
    assert (many - few) / 120 < 0.05 * per_image
