"""scripts/draw_sample.py: the picture shows a line of predictions as it is, and mistakes are told in one line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("draw_sample", SCRIPTS / "draw_sample.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def line(number: int, prediction: str = "wrong", **more) -> dict:
    text_rag = {"prediction": "It is Goths", "selected": [], "prompt_tokens": 1000, "latency_s": 0.1}
    return {
        "dataset": "nq", "setting": "oracle", "id": f"nq-{number}",
        "question": f"Who costs $5 and $6, number {number}?",
        "golden": ["Goths"], "pos_index": [1], "relevant": 1, "candidates": 20, "prediction": prediction,
        "documents": {"0": "Rome\nA city on the Tiber.", "1": "Goths\nA people."},
        "selected": [{"index": 0, "score": 0.912}], "ranking": [0, 2, 1], "prompt_tokens": 230, "latency_s": 0.05,
        "baselines": {"text_rag": text_rag, "bm25": {"ranking": [1, 0, 2]}}, **more,
    }  # fmt: skip


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    config = {"base_model": "org/Base-7B", "compr_rate": 16, "doc_max_length": 256, "n_memory_tokens": 16}
    results = {"format": 1, "suite": "end_to_end", "config": config, "data": [], "systems": {}, "figures": []}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines), encoding="utf-8")
    return folder


def texts_drawn(script, monkeypatch) -> list[str]:
    found = []
    plain = script.say
    monkeypatch.setattr(
        script, "say", lambda axes, x, y, text, *rest, **s: (found.append(text), plain(axes, x, y, text, *rest, **s))
    )
    return found


def test_the_picture_has_the_numbers_of_the_line_and_of_the_config(script, tmp_path, monkeypatch):
    found = texts_drawn(script, monkeypatch)
    script.main(["--results", str(write(tmp_path / "run", [line(1)])), "--output", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    for text in (
        "A question of NQ, oracle setting: Base-7B at rate 16", "selected from 20 candidates", "document, ≤ 256 tokens",
        "16 vectors", "1 × 16", "reads 16 vectors, prompt: 230 tokens", "reads the text, prompt: 1,000 tokens",
        "0.912", "Rome", "A city on the Tiber.", "gold", "rank 3", "and 18 more candidates", "Goths",
        "It is Goths", "wrong",
    ):  # fmt: skip
        assert text in found, text
    assert (found.count("✓"), found.count("✗")) == (1, 1)


def test_dollar_signs_are_drawn_as_they_are(script):
    assert script.wrapped("costs $5 and $6", 40, 1) == r"costs \$5 and \$6"
    assert script.wrapped("one two three four", 9, 2) == "one two\nthree …"


def test_rows_are_what_was_read_then_gold_that_was_not(script):
    assert script.rows_to_draw(line(1)) == [(0, 0.912, True), (1, None, False)]
    assert script.rows_to_draw(line(1, pos_index=[0])) == [(0, 0.912, True)]


def test_the_default_is_a_right_answer_from_gold_documents(script):
    good = line(3, "Goths", pos_index=[0])
    assert script.choose_question([line(1), line(2, "Goths"), good], None, None) is good
    assert script.choose_question([line(1), line(2)], None, None)["id"] == "nq-1"
    assert script.choose_question([line(1), line(2)], "nq-2", "oracle")["id"] == "nq-2"


@pytest.mark.parametrize("more", [{"baselines": {}}, {"ranking": None}, {"selected": [{"index": 0, "score": None}]},
                                  {"golden": ["a", "b"], "question": "word " * 80}])  # fmt: skip
def test_lines_without_baselines_ranking_or_scores_are_drawn(script, tmp_path, more):
    folder = write(tmp_path / "run", [line(1, **more)])
    script.main(["--results", str(folder), "--output", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").is_file()


def test_mistakes_are_refused_in_one_line(script, tmp_path, capsys):
    folder = write(tmp_path / "run", [line(1)])
    empty = write(tmp_path / "empty", [])
    for arguments, words in (
        (["--results", str(tmp_path / "nowhere")], "holds no results.json"),
        (["--results", str(empty)], "nothing to draw"),
        (["--results", str(folder), "--question", "nq-9"], "no question nq-9"),
        (["--results", str(folder), "--setting", "normal"], "setting normal"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.main([*arguments, "--output", str(tmp_path / "out.png")])
        assert stop.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("draw_sample: ") and words in message
    assert not (tmp_path / "out.png").exists()
