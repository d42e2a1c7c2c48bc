"""evaluation/compare.py: the joined figures by hand, its refusals, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.compare import compare, main, markdown, read_side
from evaluation.intervals import average_interval, paired_difference
from tests.evaluation.test_scoring import make_line


def write_results(folder: Path, lines: list[dict], **config) -> Path:
    """A results directory with these predictions."""
    folder.mkdir()
    results = {"format": 1, "suite": "end_to_end", "config": config, "data": [], "systems": {}, "figures": []}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def answered(right: list[int], dataset="nq", **fields) -> list[dict]:
    """One line a question, its prediction right (1) or wrong (0); clara uses 100 tokens a prompt."""
    predictions = ["Warsaw" if r else "Paris" for r in right]
    return [
        make_line(dataset, **{"id": str(i), "prediction": p, "prompt_tokens": 100, "latency_s": None, **fields})
        for i, p in enumerate(predictions)
    ]


A, B = [1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1, 1]


def rows_by_place(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["dataset"], row["setting"], row["metric"]): row for row in rows}


def test_the_difference_is_b_minus_a_over_the_shared_questions(tmp_path):
    a = read_side(write_results(tmp_path / "a", answered([*A, 1, 1])), "clara")
    b = read_side(write_results(tmp_path / "b", answered(B)[::-1]), "clara")
    row = rows_by_place(compare(a, b, seed=4))["nq", "normal", "em"]
    figure = paired_difference(A, B, seed=4)
    assert (row["a"], row["b"], row["difference"], row["n"]) == (0.25, 0.875, 0.625, 8)
    assert (row["low"], row["high"]) == pytest.approx((figure.low, figure.high))
    assert "8 questions compared; left out: 2 only in A, 0 only in B." in markdown(a, b, [row])


def test_the_average_is_over_data_sets_and_settings_stay_apart(tmp_path):
    def lines(nq, musique):
        return answered(nq) + answered(musique, "musique") + answered(nq[:3], setting="oracle")

    a = read_side(write_results(tmp_path / "a", lines(A, [0, 0])), "clara")
    b = read_side(write_results(tmp_path / "b", lines(B, [1, 0])), "clara")
    rows = compare(a, b, ["em"])
    assert [(row["dataset"], row["setting"]) for row in rows] == [
        *(("nq", "normal"), ("musique", "normal"), ("average", "normal"), ("nq", "oracle")),
    ]
    gains = [[y - x for x, y in zip(*pair, strict=True)] for pair in ((A, B), ([0, 0], [1, 0]))]
    figure, row = average_interval(gains), rows[2]
    assert (row["a"], row["b"], row["n"]) == (0.125, 0.6875, 10)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((figure.value, figure.low, figure.high))
    assert rows[3]["n"] == 3


def test_no_average_where_a_data_set_lacks_the_metric(tmp_path):
    lines = answered([1, 0]) + answered([1, 0], "musique", golden=["the"])
    a, b = (read_side(write_results(tmp_path / name, lines), "clara") for name in "ab")
    rows = rows_by_place(compare(a, b))
    assert ("average", "normal", "em") in rows and ("nq", "normal", "cover_em") in rows
    assert ("average", "normal", "cover_em") not in rows and ("musique", "normal", "cover_em") not in rows


def test_two_systems_of_one_directory(tmp_path, capsys):
    folder = str(write_results(tmp_path / "a", answered([1] * 8)))
    main([folder, folder, "--system_b", "closed_book", "--metrics", "em", "prompt_tokens", "answer_words"])
    out = capsys.readouterr().out
    assert f"A: clara in {folder}" in out and f"B: closed_book in {folder}" in out
    assert "| normal | nq | EM | 100.0 | 0.0 | -100.0 [-100.0, -100.0] | 8 | A better |" in out
    assert "| normal | nq | Tokens in the prompt | 100 | 12 | -88 [-88, -88] | 8 | B better |" in out
    assert "| normal | nq | Words in the answer | 1.0 | 1.0 | +0.0 [+0.0, +0.0] | 8 |  |" in out


def test_only_metrics_that_both_have_are_compared(tmp_path):
    folder = write_results(tmp_path / "a", answered(A))
    metrics = {row["metric"] for row in compare(read_side(folder, "clara"), read_side(folder, "bm25"))}
    assert metrics == {*(f"{name}_{k}" for name in ("recall", "precision") for k in (1, 3, 5)), "mrr"}
    with pytest.raises(ValueError, match="share no metric of: em, f1"):
        compare(read_side(folder, "clara"), read_side(folder, "bm25"), ["em", "f1"])


def test_first_answer_only_is_taken_from_the_results_and_must_agree(tmp_path):
    lines = answered([0], prediction="Warszawa")
    first, every = (
        read_side(write_results(tmp_path / str(flag), lines, first_answer_only=flag), "clara") for flag in (True, False)
    )
    assert [next(iter(side.scores.values()))["em"] for side in (first, every)] == [0.0, 1.0]
    with pytest.raises(ValueError, match="first_answer_only"):
        compare(first, every)


def refused(capsys, *arguments) -> str:
    """What the command line says of a user's mistake: one line."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("compare: ")
    return captured.err


def test_questions_that_do_not_match_are_refused(tmp_path, capsys):
    a = write_results(tmp_path / "a", answered(A))
    other = write_results(tmp_path / "other", answered(A, question="Another one?"))
    assert "share no question" in refused(capsys, a, other)
    golds = write_results(tmp_path / "golds", answered(A, golden=["Kraków"]))
    assert "'0' of nq, normal, has the gold answers ['Warsaw', 'Warszawa']" in refused(capsys, a, golds)
    assert "is there twice" in refused(capsys, a, write_results(tmp_path / "twice", answered(A) + answered(B)))


def test_missing_files_and_systems_are_refused(tmp_path, capsys):
    a, b = (write_results(tmp_path / name, answered(A)) for name in "ab")
    assert "same system of the same directory" in refused(capsys, a, tmp_path / "b" / ".." / "a")
    assert "bm25, clara, closed_book" in refused(capsys, a, b, "--system_b", "text_rag")
    assert "--seed" in refused(capsys, a, b, "--seed", "-1")
    assert "--output" in refused(capsys, a, b, "--output", a / "results.json")
    assert "--output" in refused(capsys, a, b, "--output", tmp_path / "absent" / "x.json")
    assert str(tmp_path / "absent") in refused(capsys, a, tmp_path / "absent")
    (b / "predictions.jsonl").unlink()
    assert f"{b} holds no predictions.jsonl" in refused(capsys, a, b)
    (b / "results.json").unlink()
    assert f"{b} holds no results.json" in refused(capsys, a, b)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"pos_index"', '"positives"'),
        lambda text: text.replace('"id"', '"number"'),
        lambda text: text.replace('["Warsaw", "Warszawa"]', "[1, 2]"),
        lambda text: text.replace('"relevant": 2', '"relevant": -1'),
        lambda text: "[]",
    ],
)
def test_a_damaged_line_is_named(tmp_path, capsys, damage):
    a, b = (write_results(tmp_path / name, answered(A)) for name in "ab")
    lines = (b / "predictions.jsonl").read_text().splitlines()
    (b / "predictions.jsonl").write_text("\n".join([*lines[:2], damage(lines[2]), *lines[3:]]) + "\n")
    assert f"{b / 'predictions.jsonl'}:3" in refused(capsys, a, b)


def test_the_figures_can_be_kept(tmp_path, capsys):
    a, b = (write_results(tmp_path / name, answered(right)) for name, right in (("a", A), ("b", B)))
    main([str(a), str(b), "--metrics", "em", "--output", str(tmp_path / "out.json")])
    assert f"The figures are in {tmp_path / 'out.json'}." in capsys.readouterr().out
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["rows"] == compare(read_side(a, "clara"), read_side(b, "clara"), ["em"])
    assert kept["b"] == {"folder": str(b), "system": "clara"}


def test_the_command_runs(tmp_path):
    a, b = (write_results(tmp_path / name, answered(right)) for name, right in (("a", A), ("b", B)))
    command = [sys.executable, "-m", "evaluation.compare", str(a), str(b), "--metrics", "em"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr == ""
    assert "| normal | nq | EM | 25.0 | 87.5 | +62.5 [+25.0, +87.5] | 8 | B better |" in done.stdout
