import html.parser

import numpy as np
import pytest

from training.data.coco import CocoFolder, ImageRecord
from training.data.proposal_shards import ImagePart
from training.evaluation.proposal_report import (
    ImageEvidence,
    ImageMaps,
    coverage,
    html_page,
    most_masks,
    write_page,
)
from weaksam_rt.types import PointPrompts, PromptSource, Proposals

_SIZE = (40, 60)
_TRUTH = np.array([[10, 10, 30, 30], [40, 5, 55, 35]], np.float32)


def _prompts(num, classes=(0,), source=PromptSource.FINE):
    return PointPrompts(
        points=np.tile(np.array([[20, 15]], np.float32), (num, 1)),
        scores=np.ones(num, np.float32),
        class_ids=np.resize(np.array(classes, np.int32), num),
        sources=np.full(num, source, np.int32),
    )


def _evidence(tmp_path, prompts=None, name="a<b>.jpg"):
    prompts = _prompts(2) if prompts is None else prompts
    record = ImageRecord(
        image_id=1,
        path=tmp_path / name,
        image_size=_SIZE,
        boxes=_TRUTH,
        labels=np.zeros(2, np.int64),
        is_crowd=np.zeros(2, bool),
        segmentations=(),
    )
    proposals = Proposals(
        boxes=np.array([[10, 10, 30, 30], [40, 5, 55, 26]], np.float32),
        scores=np.ones(2, np.float32),
        sources=np.array([PromptSource.FINE, PromptSource.GRID], np.int32),
        image_size=_SIZE,
    )
    blank = np.linspace(0, 1, 2400, dtype=np.float32).reshape(_SIZE)
    return ImageEvidence(
        record=record,
        image=np.full((*_SIZE, 3), 128, np.uint8),
        part=ImagePart(proposals=proposals, prompts=prompts, used_tags=("x&y",)),
        maps=ImageMaps(coarse=blank, fine=blank, cross=blank),
        masks=np.ones((len(most_masks(prompts)), *_SIZE), bool),
    )


def _folder(tmp_path):
    return CocoFolder(root=tmp_path, class_names=("x&y",), category_ids=(1,), records=())


class _Tags(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_holds_its_pictures_and_asks_for_nothing_else(tmp_path):
    write_page(tmp_path / "report.html", _folder(tmp_path), [_evidence(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    tags = _Tags(page).found
    pictures = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(pictures) == 7
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert not [tag for tag, _ in tags if tag in ("script", "link", "b")]
    assert "http" not in page.replace("http-equiv", "")


def test_names_are_escaped(tmp_path):
    page = html_page(_folder(tmp_path), [_evidence(tmp_path)])
    assert "a&lt;b&gt;.jpg" in page
    assert "x&amp;y" in page


def test_each_source_counts_as_if_it_were_alone(tmp_path):
    sample = [_evidence(tmp_path)]
    assert coverage(sample, PromptSource.FINE) == {0.5: 0.5, 0.75: 0.5}
    assert coverage(sample, PromptSource.GRID) == {0.5: 0.5, 0.75: 0.0}
    assert coverage(sample, PromptSource.CROSS) == {0.5: 0.0, 0.75: 0.0}
    assert coverage(sample, None) == {0.5: 1.0, 0.75: 0.5}
    assert np.isnan(coverage([], None)[0.5])


@pytest.mark.parametrize("num", [0, 1, 40])
def test_no_prompts_and_many_prompts_can_be_shown(tmp_path, num):
    page = html_page(_folder(tmp_path), [_evidence(tmp_path, _prompts(num))])
    assert f"masks of {min(num, 16)} prompts" in page


def test_every_class_and_source_has_a_mask_before_one_has_many():
    many = _prompts(30)
    shown = most_masks(
        PointPrompts.concatenate([many, _prompts(2, classes=(1,)), _prompts(1, source=3)])
    )
    assert len(shown) == 16
    assert np.count_nonzero(shown.class_ids == 1) == 2
    assert np.count_nonzero(shown.sources == 3) == 1


def test_a_page_without_images_is_a_page(tmp_path):
    assert "0 images" in html_page(_folder(tmp_path), [])
