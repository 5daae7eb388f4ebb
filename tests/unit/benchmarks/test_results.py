import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import benchmarks as benchmarks_folder
from benchmarks.__main__ import benchmarks, run
from benchmarks.compare import (
    NOT_COMPARABLE,
    NOTHING_WORSE,
    SOMETHING_WORSE,
    compare_results,
    hindrances,
)
from benchmarks.compare import main as compare_files
from benchmarks.machine import Clocks, Peaks
from benchmarks.markdown import markdown, number
from benchmarks.page import page
from benchmarks.results import (
    ArtifactRecord,
    Metric,
    Point,
    Recorder,
    Series,
    Stage,
    Table,
    Waterfall,
    command_line,
    read_result,
    write_result,
)
from weaksam_rt.errors import ArtifactError


def result(level=10.0, accuracy=0.5, sha256="ab" * 32):
    metric = Metric(
        name="latency <1>",
        unit="ms",
        repeats=tuple(tuple(level + 0.1 * i + 0.01 * k for k in range(30)) for i in range(5)),
        floor=4.0,
        floor_reason="the engine",
    )
    artifact = ArtifactRecord(
        model="detector", engine="onnxruntime", sha256=sha256, accuracy={"val.voc_ap50": accuracy}
    )
    recorder = Recorder(what="serving", title="A & B", config={"slo": "p99"}, artifacts=(artifact,))
    return recorder.result(
        [metric],
        series=[
            Series(
                plot="Throughput",
                name="closed",
                x_label="in flight",
                y_label="images/s",
                points=(Point(x=1, y=20, low=19, high=21), Point(x=2, y=30, low=28, high=33)),
            )
        ],
        waterfalls=[Waterfall(title="Stages", stages=(Stage(name="a", milliseconds=3.0),))],
        tables=[Table(title="T", header=("x", "y"), rows=(("1", "a|b"),))],
        notes=["All is well."],
    )


@pytest.fixture
def write(tmp_path):
    def to_file(name, **changes):
        path = tmp_path / name
        write_result(dataclasses.replace(result(), **changes) if changes else result(), path)
        return path

    return to_file


def test_a_result_is_read_as_it_was_written(tmp_path):
    write_result(result(), tmp_path / "a.json")
    once = read_result(tmp_path / "a.json")
    write_result(once, tmp_path / "b.json")
    assert read_result(tmp_path / "b.json") == once
    samples = np.array(result().metrics[0].repeats)
    np.testing.assert_allclose(once.metrics[0].repeats, samples, rtol=1e-4)  # 5 digits


def test_a_kept_result_is_shown_with_its_table_and_page(write, tmp_path):
    assert run(["show", str(write("a.json")), "--output", str(tmp_path / "again")]) == 0
    once = read_result(tmp_path / "a.json")
    assert read_result(tmp_path / "again.json") == once
    assert (tmp_path / "again.md").read_text() == markdown(once)
    assert (tmp_path / "again.html").read_text().count("<svg") == page(once).count("<svg") > 0


def test_a_result_says_what_it_depends_on(tmp_path):
    write_result(result(), tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["machine"]["cores"] >= 1
    assert {"python", "numpy", "onnxruntime"} <= set(content["versions"])
    assert len(content["clocks"]) == 2
    assert content["artifacts"][0]["accuracy"] == {"val.voc_ap50": 0.5}


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', "[1]"])
def test_anything_else_is_no_result(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_result(tmp_path / "r.json")


def test_markdown_has_every_part():
    text = markdown(result())
    assert "10.3" in text  # the median of all
    assert "39 % of 4.00" in text
    assert "All is well." in text
    assert "a\\|b" in text
    assert "val.voc_ap50 0.5" in text


def test_the_page_is_whole_and_escaped_and_needs_nothing():
    text = page(result())
    assert "A &amp; B" in text
    assert "latency &lt;1&gt;" in text
    assert text.count("<svg") == 3  # distribution, curve, waterfall
    assert "<script" not in text
    assert "http://www.w3.org" in text  # the only addresses are names of formats
    assert 'src="http' not in text


def test_a_quantile_without_samples_beyond_it_is_not_shown():
    few = Metric(name="m", unit="ms", repeats=((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)))
    assert few.quantile(0.5) is not None
    assert few.quantile(0.99) is None


def test_a_single_sample_has_a_median_and_no_tail():
    one = Metric(name="m", unit="ms", repeats=((3.0,),))
    assert one.quantile(0.5).value == 3.0
    assert one.quantile(0.9) is one.quantile(0.999) is None


RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def of_the_form(path):
    content = json.loads(path.read_text())
    return isinstance(content, dict) and "format" in content


@pytest.mark.parametrize(
    "path", [p for p in sorted(RESULTS.glob("*.json")) if of_the_form(p)], ids=lambda p: p.stem
)
def test_every_result_that_is_kept_can_be_shown_and_compared(path):
    kept = read_result(path)
    assert kept.title in markdown(kept)
    assert "worse" not in {
        v.comparison.verdict for v in compare_results(kept, kept, least_change=0)
    }


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("load", "is_said"), [(0.1, False), (1000.0, True)])
def test_a_result_from_a_busy_machine_says_so(load, is_said):
    clocks = Clocks(megahertz=None, load_average=load, celsius=None)
    recorder = Recorder(what="x", title="X", config={}, artifacts=(), clocks=clocks)
    notes = recorder.result([]).notes
    assert any("machine was busy" in note for note in notes) == is_said


@pytest.mark.parametrize(
    ("better", "value", "percent"),
    [("lower", 10.0, 50), ("lower", 4.0, 125), ("higher", 4.0, 80), ("higher", 10.0, 200)],
)
def test_what_beats_its_floor_shows_that_the_floor_was_measured_wrongly(better, value, percent):
    metric = Metric(name="it", unit="ms", repeats=((value,),), better=better, floor=5.0)
    assert metric.percent_of_floor == percent
    clocks = Clocks(megahertz=None, load_average=0.1, celsius=None)
    recorder = Recorder(what="x", title="X", config={}, artifacts=(), clocks=clocks)
    notes = recorder.result([metric]).notes
    assert any("it: better than the floor" in note for note in notes) == (percent > 100)


def test_the_higher_of_two_measured_limits_counts():
    busy, quiet = Peaks(flops=1.0, bytes=4.0), Peaks(flops=2.0, bytes=3.0)
    assert busy.or_higher(quiet) == Peaks(flops=2.0, bytes=4.0)


def test_a_command_names_no_folders_of_a_machine():
    shown = command_line("serving", ["serving", "/home/a/b/models", "--repeats", "3"])
    assert shown == "python -m benchmarks serving b/models --repeats 3"


def test_equal_results_compare_as_the_same_and_a_slower_one_as_worse(write, capsys):
    first, same = write("a.json"), write("b.json")
    slower = write("c.json", metrics=result(level=13.0).metrics)
    assert compare_files(first, same) == NOTHING_WORSE
    assert compare_files(first, slower) == SOMETHING_WORSE
    assert compare_files(slower, first) == NOTHING_WORSE
    assert "better" in capsys.readouterr().out


def metric(name="latency", *, tail=0.0, num_repeats=5, size=30, better="lower"):
    """Repeats whose best nine tenths are alike; ``tail`` is added to the last one of each."""
    repeats = tuple(
        tuple(10 + 0.01 * i + 0.001 * k + tail * (k >= 0.9 * size) for k in range(size))
        for i in range(num_repeats)
    )
    return Metric(name=name, unit="ms", repeats=repeats, better=better)


def test_a_worse_tail_is_found_where_the_median_stays(write, capsys):
    first = write("a.json", metrics=(metric(),))
    assert compare_files(first, write("b.json", metrics=(metric(tail=9.0),))) == SOMETHING_WORSE
    out = capsys.readouterr().out
    assert "p90" in out
    assert "Of 2 comparisons: 1 worse, 1 same." in out
    few = write("c.json", metrics=(metric(size=5),))
    assert compare_files(few, few) == NOTHING_WORSE
    assert "Of 1 comparisons" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("better", "size", "quantiles"),
    [("lower", 100, [0.5, 0.99]), ("lower", 99, [0.5, 0.9]), ("higher", 20, [0.5, 0.1])],
)
def test_the_highest_tail_with_samples_beyond_it_is_compared(better, size, quantiles):
    one = dataclasses.replace(result(), metrics=(metric(size=size, better=better),))
    found = compare_results(one, one, least_change=0.05)
    assert [v.quantile for v in found] == pytest.approx(quantiles)


def test_a_metric_without_partner_is_a_failure_unless_it_may_be_missing(write, capsys):
    both = write("a.json", metrics=(metric("p"), metric("q")))
    one = write("b.json", metrics=(metric("p"),))
    assert compare_files(both, one) == NOT_COMPARABLE
    assert "Missing in the second: q" in capsys.readouterr().err
    assert compare_files(both, one, allow_missing=True) == NOTHING_WORSE
    assert compare_files(one, both) == NOTHING_WORSE
    assert "Only in the second: q" in capsys.readouterr().out


def test_verdicts_that_could_not_be_reached_are_counted_with_their_reason(write, capsys):
    one, other = (metric(num_repeats=3, size=5, tail=tail) for tail in (0.0, 90.0))
    assert compare_files(write("a.json", metrics=(one,)), write("b.json", metrics=(other,))) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no verdict; 1 UNDECIDED (1 for fewer than 4 repeats: measure again with more)" in said


def test_other_machines_and_other_accuracies_are_refused_unless_forced(write, capsys):
    first = write("a.json")
    elsewhere = write("b.json", machine=dataclasses.replace(result().machine, cores=99))
    other = ArtifactRecord(
        model="detector", engine="onnxruntime", sha256="cd" * 32, accuracy={"val.voc_ap50": 0.4}
    )
    worse_model = write("c.json", artifacts=(other,))
    for second, reason in ((elsewhere, "machines differ"), (worse_model, "another accuracy")):
        assert compare_files(first, second) == NOT_COMPARABLE
        assert reason in capsys.readouterr().err.replace("\n", " ")
        assert compare_files(first, second, force=True) == NOTHING_WORSE


def test_another_build_of_equal_accuracy_may_be_compared():
    assert list(hindrances(result(), result(sha256="cd" * 32))) == []


def test_a_damaged_file_is_no_verdict(write, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert compare_files(write("a.json"), tmp_path / "x.json") == NOT_COMPARABLE
    assert "is no benchmark result" in capsys.readouterr().err.replace("\n", "")


def test_every_benchmark_explains_itself(capsys):
    known = benchmarks()
    assert {"serving", "explain", "compare", "peaks", "proposal_recall"} <= set(known)
    assert all(known.values())
    assert run([]) == 0
    assert run(["nonsense"]) == 2
    with pytest.raises(SystemExit) as ended:
        run(["compare", "--help"])
    assert ended.value.code == 0
    assert "--least-change" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_both_forms_of_a_command_take_the_same_arguments(name, capsys, monkeypatch):
    def printed(start):
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code == 0
        return capsys.readouterr().out.split()

    inside = printed(lambda: run([name, "--help"]))
    module = Path(benchmarks_folder.__file__).parent / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(module), "--help"])
    alone = printed(lambda: runpy.run_path(str(module), run_name="__main__"))
    assert f"benchmarks.{name}" in alone
    assert [w for w in alone if w.startswith("--")] == [w for w in inside if w.startswith("--")]
