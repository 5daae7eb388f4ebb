import json
from dataclasses import dataclass

import pytest

from training.engine.stage import open_stage, read_manifest


@dataclass(frozen=True, kw_only=True)
class _Config:
    seed: int = 0
    rate: float = 0.1


def test_a_finished_stage_is_skipped_and_an_unfinished_one_is_resumed(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("data")
    stage = open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source})
    assert not stage.finished
    again = open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source})
    assert not again.finished
    (again.directory / "out.txt").write_text("result")
    again.finish(outputs=["out.txt"], metrics={"score": 1.0})
    assert open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source}).finished
    manifest = read_manifest(tmp_path / "run")
    assert manifest["metrics"] == {"score": 1.0}
    assert manifest["config"] == {"seed": 0, "rate": 0.1}


def test_another_config_or_input_is_refused_with_the_difference(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("data")
    open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source})
    with pytest.raises(ValueError, match=r"config\.rate: 0\.1 there, 0\.2 now"):
        open_stage("make", tmp_path / "run", config=_Config(rate=0.2), inputs={"data": source})
    source.write_text("other")
    with pytest.raises(ValueError, match=r"inputs\.data"):
        open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source})


def test_a_lost_output_makes_the_stage_unfinished(tmp_path):
    stage = open_stage("make", tmp_path / "run", config=_Config(), inputs={})
    (stage.directory / "out.txt").write_text("result")
    stage.finish(outputs=["out.txt"])
    (stage.directory / "out.txt").unlink()
    assert not open_stage("make", tmp_path / "run", config=_Config(), inputs={}).finished


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": tmp_path / "absent"})


def test_metrics_are_appended_as_json_lines(tmp_path):
    stage = open_stage("make", tmp_path / "run", config=_Config(), inputs={})
    stage.log_metrics(step=1, loss=2.0)
    stage.log_metrics(step=2, loss=1.0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [2.0, 1.0]


def test_logged_scalars_are_read_by_step_also_after_a_kill(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("data")
    stage = open_stage("make", tmp_path / "run", config=_Config(), inputs={"data": source})
    assert stage.metrics() == []
    stage.log_metrics(step=0, loss=3.0)
    stage.log_metrics(step=1, loss=2.0)
    with (stage.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo\n')  # cut by the kill
    stage.log_metrics(step=1, loss=2.5)
    stage.log_metrics(step=2, loss=1.0)
    assert [entry["loss"] for entry in stage.metrics()] == [3.0, 2.5, 1.0]


def test_an_option_that_came_later_and_is_off_changes_nothing(tmp_path):
    old = {"seed": 0, "rate": 0.1}
    open_stage("make", tmp_path / "run", config=old, inputs={})
    later = old | {"masks": None, "skips": False, "sources": []}
    open_stage("make", tmp_path / "run", config=later, inputs={})
    open_stage("make", tmp_path / "again", config=later, inputs={})
    open_stage("make", tmp_path / "again", config=old, inputs={})
    for switched_on in ({"masks": 64}, {"skips": True}, {"sources": ["a"]}, {"masks": 0}):
        with pytest.raises(ValueError, match="holds another run"):
            open_stage("make", tmp_path / "run", config=later | switched_on, inputs={})
