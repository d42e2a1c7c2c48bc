"""evaluation/report.py: the page holds every figure, loads nothing, and no text of the data becomes HTML."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from evaluation import report
from evaluation.report import GENERATOR, main, run_labels, safe_json
from evaluation.report_data import read_results
from evaluation.scoring import figures

NASTY = '</script ></script><img src=x onerror="document.title=1"> \' & \u2028\u2029 <!-- \ud800 ]]>'


def line(number: int, dataset: str = "nq", setting: str = "oracle", prediction: str = "Goths", **more) -> dict:
    answer = {"prediction": prediction, "prompt_tokens": 230, "latency_s": 0.05}
    return {
        "dataset": dataset, "setting": setting, "id": f"{dataset}-{number}",
        "question": f"question {number} of {dataset}", "golden": ["Goths"],
        "pos_index": [1], "relevant": 1, "candidates": 3,
        "documents": {"0": "Rome\nA city.", "1": "Goths\nA people."}, **answer,
        "selected": [{"index": 1, "score": 0.9}, {"index": 0, "score": 0.1}], "ranking": [1, 0, 2],
        "baselines": {"bm25": {"ranking": [0, 1, 2]}, "text_rag": {**answer, "prediction": "Huns", "selected": []}},
        **more,
    }  # fmt: skip


def results(lines: list[dict], rate: int = 16) -> dict:
    groups = list(dict.fromkeys((item["dataset"], item["setting"]) for item in lines))
    config = {"checkpoint": "ck", "base_model": "org/Base-7B", "compr_rate": rate}
    data = {"file": "data.jsonl", "sha256": "0" * 64, "questions": 2}
    return {
        "format": 1, "suite": "end_to_end", "config": config,
        "versions": {"python": "3.11"}, "git": {"commit": "abc123", "dirty": True}, "command": "python -m x --flag",
        "started": "2026-01-01T00:00:00", "seconds": 12.0, "device": "cpu", "processes": 1,
        "data": [{"dataset": dataset, "setting": setting, **data} for dataset, setting in groups],
        "systems": {"clara": "reads vectors", "bm25": "words", "text_rag": "reads text"},
        "figures": figures(lines), "notes": ["a note"],
    }  # fmt: skip


def write(folder, lines, predictions=True, **more):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**results(lines), **more}), encoding="utf-8")
    if predictions:
        text = "".join(json.dumps(item) + "\n" for item in lines)
        (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    return folder


LINES = [line(n, dataset, setting) for dataset in ("nq", "2wiki") for setting in ("normal", "oracle") for n in range(3)]


class Page(HTMLParser):
    """The elements of a page, and the text of its JSON elements."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.json: dict[str, str] = {}
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.inside:
            self.json[self.inside] = self.json.get(self.inside, "") + data

    def handle_endtag(self, tag):
        self.inside = None

    def data(self, element: str):
        return json.loads(self.json[element])


def make(*arguments) -> tuple[str, Page]:
    target = next(arguments[i + 1] for i, a in enumerate(arguments) if a == "--output")
    main([str(argument) for argument in arguments])
    text = target.read_text(encoding="utf-8")
    return text, Page(text)


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("evaluation.report: ")
    return message


def test_the_page_holds_every_figure_fact_and_question(tmp_path):
    folder = write(tmp_path / "run", LINES)
    _, page = make(folder, "--output", tmp_path / "page.html")
    (run,), browser = page.data("data")["runs"], page.data("questions")
    assert run["figures"] == read_results(folder)["figures"]
    facts = dict(map(tuple, run["facts"]))
    assert facts["commit"] == "abc123, with uncommitted changes"
    assert (facts["checkpoint"], facts["time"], facts["device"]) == ("ck", "12 s", "cpu")
    assert run["notes"] == ["a note"]
    assert [q["question"] for q in browser["questions"]] == [item["question"] for item in LINES]
    question = browser["questions"][0]
    assert [browser["texts"][question["documents"][index]] for index in "01"] == ["Rome\nA city.", "Goths\nA people."]
    assert question["systems"]["clara"]["scores"] == {
        "cover_em": 1, "em": 1, "f1": 1, "recall_1": 1, "recall_3": 1, "recall_5": 1
    }  # fmt: skip
    assert question["systems"]["text_rag"]["scores"]["cover_em"] == 0
    assert question["systems"]["bm25"]["scores"]["recall_1"] == 0
    assert question["systems"]["clara"]["selected"] == [[1, 0.9], [0, 0.1]]
    assert len(browser["texts"]) == 2


def test_the_papers_figures_are_marked_and_only_those_of_the_runs_places(tmp_path):
    _, page = make(write(tmp_path / "run", LINES), "--output", tmp_path / "page.html")
    about = page.data("data")
    assert about["paperLabel"].startswith("paper")
    assert {row["rate"] for row in about["paper"]} == {1, 16}
    assert {row["dataset"] for row in about["paper"]} == {"nq", "2wiki", "average"}
    assert {"dataset": "nq", "metric": "cover_em", "rate": 16, "setting": "oracle", "value": 75.48}.items() <= next(
        row for row in about["paper"] if row["metric"] == "cover_em" and row["setting"] == "oracle"
    ).items()


def test_the_page_loads_nothing_and_runs_its_own_program_only(tmp_path):
    text, page = make(write(tmp_path / "run", LINES), "--output", tmp_path / "page.html")
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "style"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"@import|url\(", text)
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp", text)


def test_no_text_of_the_data_becomes_html(tmp_path):
    harmless, _ = make(write(tmp_path / "plain", LINES[:1]), "--output", tmp_path / "plain.html")
    nasty = line(0, question=NASTY, golden=[NASTY], id=NASTY, documents={"0": NASTY, "1": NASTY}, prediction=NASTY)
    folder = write(tmp_path / "nasty", [nasty], notes=[NASTY], command=NASTY, systems={NASTY: NASTY, "clara": NASTY})
    text, page = make(folder, "--output", tmp_path / "page.html")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(harmless).tags]
    assert "\u2028" not in text
    assert page.data("questions")["questions"][0]["question"] == NASTY
    assert page.data("data")["runs"][0]["notes"] == [NASTY]


def test_safe_json_is_json_of_the_same_value():
    value = {NASTY: [NASTY, 1.5, None, True, "é"]}
    assert json.loads(safe_json(value)) == value
    assert not set("<>&\u2028\u2029") & set(safe_json(value))


def test_questions_over_the_limit_are_left_out_evenly_and_counted(tmp_path, capsys):
    _, page = make(write(tmp_path / "run", LINES), "--output", tmp_path / "page.html", "--max_questions", 5)
    (run,), questions = page.data("data")["runs"], page.data("questions")["questions"]
    assert (run["questions"], run["shown"]) == (12, 4)
    assert {(q["dataset"], q["setting"]) for q in questions} == {(q["dataset"], q["setting"]) for q in LINES}
    assert "8 left out" in capsys.readouterr().out


def test_a_directory_above_several_results_gives_one_page_with_all(tmp_path):
    for name in ("a", "b", "deeper/a"):
        write(tmp_path / "all" / name, LINES)
    _, page = make(tmp_path / "all", "--output", tmp_path / "page.html")
    assert [run["label"] for run in page.data("data")["runs"]] == ["a", "b", "deeper/a"]
    assert {q["run"] for q in page.data("questions")["questions"]} == {0, 1, 2}
    assert run_labels([tmp_path / "x/one", tmp_path / "x/two"]) == ["one", "two"]


def test_without_predictions_there_are_figures_and_no_questions(tmp_path):
    _, page = make(write(tmp_path / "run", LINES, predictions=False), "--output", tmp_path / "page.html")
    (run,) = page.data("data")["runs"]
    assert run["figures"] and run["questions"] == 0
    assert page.data("questions") == {"questions": [], "texts": []}


def test_paraphrases_have_a_page_too(tmp_path):
    item = line(0, "example", "paraphrase", "Rome, a city.", golden=[], documents={"0": "Rome is a city."})
    item |= {
        "relevant": None,
        "pos_index": [],
        "ranking": None,
        "selected": [{"index": 0, "score": None}],
        "baselines": {},
    }
    _, page = make(write(tmp_path / "run", [item], suite="pretraining"), "--output", tmp_path / "page.html")
    (question,) = page.data("questions")["questions"]
    assert question["systems"]["clara"]["scores"].keys() == {"rouge_l"}
    assert page.data("data")["metrics"]["rouge_1"]["section"] == "Answers"
    assert page.data("data")["paper"] == []


def test_the_default_place_is_the_first_directory_and_a_page_is_written_anew(tmp_path):
    folder = write(tmp_path / "run", LINES)
    main([str(folder)])
    first = (folder / "report.html").read_text(encoding="utf-8")
    assert GENERATOR in first
    main([str(folder), "--max_questions", "0"])
    assert len((folder / "report.html").read_text(encoding="utf-8")) < len(first)


def test_a_file_that_is_no_page_of_ours_is_kept(tmp_path, capsys):
    folder, precious = write(tmp_path / "run", LINES), tmp_path / "precious.html"
    precious.write_text("<!doctype html><p>mine</p>", encoding="utf-8")
    assert "--force" in refused(capsys, folder, "--output", precious)
    assert "mine" in precious.read_text(encoding="utf-8")
    main([str(folder), "--output", str(precious), "--force"])
    assert GENERATOR in precious.read_text(encoding="utf-8")


def test_mistakes_are_refused_in_one_line(tmp_path, capsys):
    good = write(tmp_path / "good", LINES)
    assert "no directory" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no results.json" in refused(capsys, tmp_path / "empty")
    assert "--max_questions" in refused(capsys, good, "--max_questions", -1)
    assert "directory that exists" in refused(capsys, good, "--output", tmp_path / "nowhere" / "page.html")
    other = write(tmp_path / "other", LINES, format=2)
    assert "format 2" in refused(capsys, other)
    (other / "results.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in refused(capsys, other)
    broken = write(tmp_path / "broken", LINES, figures=[{"dataset": "nq"}])
    assert "figure 0" in refused(capsys, broken)
    with open(good / "predictions.jsonl", "a", encoding="utf-8") as file:
        file.write('{"dataset": "nq"}\n')
    assert "predictions.jsonl:13" in refused(capsys, good)


def test_figures_that_could_not_be_computed_are_null(tmp_path):
    figure = {**results(LINES)["figures"][0], "value": float("nan"), "low": float("nan"), "high": float("nan")}
    _, page = make(write(tmp_path / "run", LINES, figures=[figure]), "--output", tmp_path / "page.html")
    assert page.data("data")["runs"][0]["figures"][0]["value"] is None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_shows_tables_plots_and_the_first_question(tmp_path):
    nasty = line(0, prediction=NASTY.replace("\ud800", ""), documents={"0": NASTY[:40], "1": "Goths\nA people."})
    write(tmp_path / "run", [nasty, *LINES[1:]])
    main([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = shown.stdout[: shown.stdout.index('<script type="application/json"')]
    assert "CONSOLE" not in shown.stderr
    assert "12 questions of 12" in body and "<img" not in body
    assert 'scope="row">BM25' in body and "paper, Mistral-7B: not measured here" in body
    # Cover-EM, Recall@5 and words of the answer, each for nq, 2wiki and the average.
    assert body.count("<svg") == 9
    assert 'class="document gold"' in body and "score 0.900" in body


def test_every_metric_has_a_section():
    assert {report.section_of(name) for name in report.METRICS} == {"Answers", "Retrieval", "Length and time"}
