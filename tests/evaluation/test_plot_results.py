"""evaluation/plot_results.py: points and curves come from the right figures; one point a rate and curve."""

import json

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from evaluation.plot_results import curves, draw, draw_curve, draw_paper, main, panels, paper_curves, read_runs

DATASETS = ("nq", "hotpotqa", "musique", "2wiki", "average")


def figure(system: str, value: float, dataset: str = "nq", metric: str = "recall_5", setting: str = "oracle") -> dict:
    return {"dataset": dataset, "setting": setting, "system": system, "metric": metric, "value": value,
            "low": value - 0.1, "high": value + 0.05, "n": 10}  # fmt: skip


def write(folder, rate, figures, base="org/Base-7B"):
    folder.mkdir(parents=True)
    results = {"format": 1, "suite": "end_to_end", "config": {"base_model": base, "compr_rate": rate}, "data": [],
               "systems": {}, "figures": figures}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture
def two_rates(tmp_path):
    for rate, value in ((16, 0.5), (64, 0.4)):
        write(tmp_path / "runs" / f"r{rate}", rate, [figure("clara", value), figure("bm25", 0.3)])
    return tmp_path / "runs"


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("evaluation.plot_results: ")
    return message


def test_a_curve_has_one_point_a_rate_in_percent_with_its_interval(two_rates):
    clara, bm25 = curves(read_runs([str(two_rates)]), "nq", "oracle", "recall_5")
    assert (clara.name, clara.system) == ("CLaRa, Base-7B", "clara")
    assert {rate: pytest.approx(point) for rate, point in clara.points.items()} == {16: (50, 40, 55), 64: (40, 30, 45)}
    assert list(clara.points) == [16, 64]
    assert not clara.level and bm25.level


def test_metrics_that_are_no_shares_keep_their_unit(tmp_path):
    folder = write(tmp_path / "run", 16, [figure("clara", 230.0, metric="prompt_tokens")])
    (clara,) = curves(read_runs([str(folder)]), "nq", "oracle", "prompt_tokens")
    assert clara.points[16][0] == 230


def test_two_checkpoints_of_one_rate_need_labels(two_rates, tmp_path, capsys):
    other = write(tmp_path / "other", 16, [figure("clara", 0.6), figure("bm25", 0.3)])
    message = refused(capsys, two_rates, other, "--output_dir", tmp_path / "out")
    assert "r16" in message and "other" in message and "DIR=LABEL" in message
    assert not (tmp_path / "out").exists()
    found = curves(read_runs([str(two_rates), f"{other}=from stage1"]), "nq", "oracle", "recall_5")
    assert [curve.name for curve in found] == ["CLaRa, Base-7B", "from stage1", "BM25"]
    assert found[0].color != found[1].color


def test_other_base_models_are_other_curves(two_rates, tmp_path):
    other = write(tmp_path / "other", 16, [figure("clara", 0.6), figure("bm25", 0.2)], base="org/Small")
    found = curves(read_runs([str(two_rates), str(other)]), "nq", "oracle", "recall_5")
    assert [curve.name for curve in found] == ["CLaRa, Base-7B", "CLaRa, Small", "BM25", "BM25 (CLaRa, Small)"]


def test_a_baseline_that_keeps_its_value_is_a_level_line_with_a_band(two_rates):
    _, bm25 = curves(read_runs([str(two_rates)]), "nq", "oracle", "recall_5")
    axes = Figure().subplots()
    draw_curve(axes, bm25)
    assert list(axes.lines[0].get_ydata()) == [30, 30]
    assert axes.patches[0].get_height() == pytest.approx(15)


def test_the_papers_curves_are_labelled_as_the_papers():
    axes = Figure().subplots()
    draw_paper(axes, "nq", "oracle", "recall_5")
    names = axes.get_legend_handles_labels()[1]
    assert len(names) == 4 and all(name.startswith("paper, Mistral-7B: ") for name in names)
    pretrained = next(artist for artist in axes.lines if artist.get_label().endswith("CLaRa, pretrained"))
    assert list(pretrained.get_xdata()) == [4, 16, 32, 64, 128, 256]
    assert list(pretrained.get_ydata()) == [76.38, 71.88, 73.21, 72.79, 73.30, 69.79]


def test_the_papers_average_is_the_printed_one_else_the_mean_of_its_data_sets():
    assert paper_curves("average", "oracle", "cover_em")["clara", "instruct"][4] == 66.76
    assert paper_curves("average", "normal", "cover_em")["text_rag", ""] == {1: 37.67}
    mean = (35.99 + 62.09 + 39.13 + 51.40) / 4
    assert paper_curves("average", "oracle", "recall_5")["bm25", ""][1] == pytest.approx(mean)
    assert paper_curves("example", "oracle", "recall_5") == {}


def test_panels_are_the_data_sets_of_the_results_the_average_last(tmp_path):
    figures = [figure("clara", 0.5, dataset) for dataset in ("average", "example", "nq")]
    runs = read_runs([str(write(tmp_path / "run", 16, figures))])
    assert panels(runs, "oracle", "recall_5") == ["example", "nq", "average"]
    assert panels(runs, "normal", "recall_5") == []
    assert panels([], "oracle", "recall_5") == list(DATASETS)


def test_the_papers_average_is_not_drawn_beside_one_over_other_data_sets(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("evaluation.plot_results.draw_paper", lambda axes, dataset, *rest: drawn.append(dataset))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: None)
    figures = [figure("clara", 0.5, dataset) for dataset in ("nq", "hotpotqa", "average")]
    draw(read_runs([str(write(tmp_path / "few", 16, figures))]), "oracle", "recall_5", tmp_path / "few.png")
    assert drawn == ["nq", "hotpotqa"]
    drawn.clear()
    figures = [figure("clara", 0.5, dataset) for dataset in DATASETS]
    draw(read_runs([str(write(tmp_path / "all", 16, figures))]), "oracle", "recall_5", tmp_path / "all.png")
    assert drawn == list(DATASETS)


def test_pictures_are_written_for_what_the_results_have(two_rates, tmp_path, capsys):
    main([str(two_rates), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recall_5_oracle.png"]
    assert "recall_5_oracle.png" in capsys.readouterr().out
    assert 900 < imread(tmp_path / "out" / "recall_5_oracle.png").shape[1] < 1600


def test_without_results_the_papers_curves_are_drawn_and_the_title_says_so(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **style: titles.append(text))
    main(["--figure", "main_recall", "--output_dir", str(tmp_path)])
    assert (tmp_path / "main_recall.png").is_file()
    assert titles == ["Recall@5, oracle setting: the paper's curves only (Mistral-7B), nothing measured here"]


def test_mistakes_are_refused_in_one_line(two_rates, tmp_path, capsys):
    out = ("--output_dir", tmp_path / "out")
    assert "no directory" in refused(capsys, tmp_path / "nowhere", *out)
    assert "no BERTScore F1" in refused(capsys, two_rates, "--metric", "bertscore", "--setting", "oracle", *out)
    assert "none of these" in refused(capsys, two_rates, "--metric", "bertscore", *out)
    assert "--figure" in refused(capsys, two_rates, "--figure", "main_recall", "--metric", "f1", *out)
    write(tmp_path / "odd", None, [figure("clara", 0.5)])
    assert "compression rate" in refused(capsys, tmp_path / "odd", *out)
