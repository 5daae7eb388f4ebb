import pytest

from weaksam_rt.config import PipelineConfig, load_toml
from weaksam_rt.proposals import ProposalConfig


def test_settings_survive_json_and_toml(tmp_path):
    config = PipelineConfig(flip=False, proposals=ProposalConfig(points_per_side=7))
    assert PipelineConfig.from_json(config.to_json()) == config
    path = tmp_path / "pipeline.toml"
    path.write_text("flip = false\n[proposals]\npoints_per_side = 7\n")
    assert load_toml(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop = true", "unknown setting flop"),
        ("[proposals]\npoints = 3", r"unknown setting proposals\.points"),
        ("flip = 1", "setting flip: expected bool, got 1"),
        ("[detection]\nscore_thresh = 2.0", r"score_thresh must be in \[0, 1\]"),
        ("flip =", "not valid TOML"),
        ("detection = 3", "setting detection: expected a table, got 3"),
        ("[proposals]\ncrops_per_side = 2", r"proposals\.crops_per_side: expected a list, got 2"),
        ("[proposals]\ncrops_per_side = [2.5]", r"crops_per_side\[0\]: expected int, got 2\.5"),
        ("[proposals]\ncrops_per_side = [1]", "must be numbers from 2"),
        ("[proposals]\nsources = [['grid']]", r"sources\[0\]: expected one of"),
        ("[proposals]\nsources = ['girds']", r"expected one of \('grid', .*got 'girds'"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "pipeline.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_toml(path)


def test_whole_numbers_are_taken_for_real_ones(tmp_path):
    path = tmp_path / "pipeline.toml"
    path.write_text("present_logit_thresh = -1\n")
    assert load_toml(path).present_logit_thresh == -1.0
