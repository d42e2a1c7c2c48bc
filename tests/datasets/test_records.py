"""Reading, checking and blending records: what SPEC 7 allows is read, everything else is refused in words."""

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from openrlhf.datasets.records import RETRIEVED, RecordError, file_rows, find_files, load_records, record_rows
from tests.trainer.facts import DOCS, FACTS, candidates, paraphrase, qa, write_jsonl

END_TO_END = {"question": "Where was Marie Curie born?", "docs": DOCS[:3]}


def refused(record: object, stage: str) -> str:
    """Why a record is refused."""
    with pytest.raises(RecordError) as caught:
        record_rows(record, stage)
    return str(caught.value)


def bad_line(path: Path, content: bytes, stage: str = "stage1") -> str:
    """What is said about the file's bad line."""
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        list(file_rows(path, stage))
    return str(caught.value)


def test_a_qa_set_keeps_all_its_pairs_over_its_document():
    record = {
        "data_type": "qa",
        "question": ["How high?", "Where?"],
        "answers": ["8,849 m", "Nepal"],
        "docs": [DOCS[6]],
    }
    assert record_rows(record, "stage1") == [
        {
            "data_type": "qa",
            "question": ["How high?", "Where?"],
            "answers": ["8,849 m", "Nepal"],
            "docs": [DOCS[6]],
            "golden": ["8,849 m", "Nepal"],
            "pos_index": [],
        }
    ]


def test_plain_strings_stand_for_lists_of_one():
    lists = record_rows(qa(0), "stage1")
    assert record_rows({**qa(0), "question": FACTS[0][1], "answers": FACTS[0][2], "docs": DOCS[0]}, "stage1") == lists


def test_several_documents_are_one_record_each_where_the_lists_pair_up():
    record = {"data_type": "qa", "question": ["Where?", "How many?"], "answers": ["Warsaw", "Ten"], "docs": DOCS[:2]}
    rows = record_rows(record, "stage1")
    assert [(row["question"], row["answers"], row["docs"]) for row in rows] == [
        (["Where?"], ["Warsaw"], [DOCS[0]]),
        (["How many?"], ["Ten"], [DOCS[1]]),
    ]


def test_several_documents_may_each_have_a_list_of_questions():
    record = {
        "data_type": "qa",
        "question": [["Where?", "When?"], ["How many?"]],
        "answers": [["Warsaw", "1867"], ["Ten"]],
        "docs": DOCS[:2],
    }
    rows = record_rows(record, "stage1")
    assert [(row["question"], row["answers"]) for row in rows] == [
        (["Where?", "When?"], ["Warsaw", "1867"]),
        (["How many?"], ["Ten"]),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"docs": DOCS[:3]}, "3 docs for 2 questions do not pair up"),
        ({"answers": ["Warsaw"]}, "2 questions for 1 answers: each question needs its answer"),
        ({"answers": ["Warsaw", "Ten", "Four"]}, "2 questions for 3 answers"),
        (
            {"question": [["a?", "b?"], ["c?"]], "answers": [["A"], ["C"]], "docs": DOCS[:2]},
            "docs[0] has 2 questions for 1 answers",
        ),
    ],
)
def test_qa_lists_that_do_not_pair_up_are_refused_and_nothing_is_dropped(change, reason):
    record = {"data_type": "qa", "question": ["Where?", "How many?"], "answers": ["Warsaw", "Ten"], "docs": DOCS[:1]}
    assert reason in refused({**record, **change}, "stage1")


def test_a_list_of_paraphrases_is_one_record_each():
    record = {"data_type": "paraphrase", "question": "", "answers": ["Said so.", "Said otherwise."], "docs": [DOCS[0]]}
    rows = record_rows(record, "stage1")
    assert [(row["question"], row["answers"], row["docs"]) for row in rows] == [
        ([], ["Said so."], [DOCS[0]]),
        ([], ["Said otherwise."], [DOCS[0]]),
    ]


def test_a_plain_string_paraphrase_is_learnt_whole_not_its_first_character():
    (row,) = record_rows({"data_type": "paraphrase", "answers": FACTS[0][3], "docs": DOCS[0]}, "stage1")
    assert row["answers"] == [FACTS[0][3]] and row["docs"] == [DOCS[0]]


def test_paraphrases_of_several_documents_pair_up_or_are_refused():
    record = {"data_type": "paraphrase", "answers": ["First.", "Second."], "docs": DOCS[:2]}
    assert [(row["answers"], row["docs"]) for row in record_rows(record, "stage1")] == [
        (["First."], [DOCS[0]]),
        (["Second."], [DOCS[1]]),
    ]
    assert "3 docs and 2 paraphrases do not pair up" in refused({**record, "docs": DOCS[:3]}, "stage1")


@pytest.mark.parametrize("field", ["context", "content"])
@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2"])
def test_context_and_content_are_accepted_for_docs(field, stage):
    record = dict(qa(0) if stage == "stage1" else candidates(0))
    renamed = {(field if key == "docs" else key): value for key, value in record.items()}
    assert record_rows(renamed, stage) == record_rows(record, stage)


@pytest.mark.parametrize("docs", [None, [], "one", ["a", ""], 7])
@pytest.mark.parametrize("pos_index", [None, [9], "x"])
def test_documents_that_are_to_be_retrieved_are_not_read_from_the_record(docs, pos_index):
    record = {"question": "Who?", "answer": "She.", "docs": docs, "pos_index": pos_index}
    (row,) = record_rows({key: value for key, value in record.items() if value is not None}, RETRIEVED)
    assert (row["question"], row["answers"], row["docs"], row["pos_index"]) == (["Who?"], ["She."], [], [])
    assert "there is no answer" in refused({"question": "Who?"}, RETRIEVED)
    assert "question must be" in refused({"answer": "She."}, RETRIEVED)


@pytest.mark.parametrize(
    ("answers", "target", "golden"),
    [
        ({"gold_answer": "Warsaw"}, "Warsaw", ["Warsaw"]),
        ({"gold_answer": "Warsaw", "answer": "In Warsaw, in 1867."}, "In Warsaw, in 1867.", ["Warsaw"]),
        ({"gold_answer": "Warsaw", "answer": ""}, "Warsaw", ["Warsaw"]),
        ({"gold_answer": "Warsaw", "answer": "  "}, "Warsaw", ["Warsaw"]),
        ({"gold_answer": "Warsaw", "answer": None}, "Warsaw", ["Warsaw"]),
        ({"golden_answers": ["Warsaw", "Warszawa"]}, "Warsaw", ["Warsaw", "Warszawa"]),
        ({"golden_answers": ["Warszawa", "Warsaw"], "gold_answer": "Warsaw"}, "Warsaw", ["Warszawa", "Warsaw"]),
        ({"answers": ["Warsaw", "Warszawa"]}, "Warsaw", ["Warsaw", "Warszawa"]),
        ({"answer": ["Warsaw", "Warszawa"]}, "Warsaw", ["Warsaw", "Warszawa"]),
        ({"gold_answer": ["Warsaw", "Warszawa"]}, "Warsaw", ["Warsaw", "Warszawa"]),
        ({"answer": "In Warsaw"}, "In Warsaw", ["In Warsaw"]),
    ],
)
@pytest.mark.parametrize("stage", ["stage1_2", "stage2"])
def test_the_target_is_answer_else_gold_answer_else_the_first_golden_one(answers, target, golden, stage):
    (row,) = record_rows({**END_TO_END, **answers}, stage)
    assert (row["answers"], row["golden"]) == ([target], golden)


@pytest.mark.parametrize(
    ("given", "kept"), [(2, [2]), ([2, 0], [0, 2]), ([1, 1, 1], [1]), ([], []), (None, []), (0, [0])]
)
def test_positions_may_be_a_number_a_list_or_absent(given, kept):
    assert record_rows({**END_TO_END, "answer": "Warsaw", "pos_index": given}, "stage2")[0]["pos_index"] == kept


@pytest.mark.parametrize("given", [3, -1, [0, 3], [True], True, False, ["1"], "1", [1.0], [[1]], {"0": 1}])
def test_positions_outside_the_documents_are_refused(given):
    reason = refused({**END_TO_END, "answer": "Warsaw", "pos_index": given}, "stage2")
    assert "must hold positions 0 to 2 of docs" in reason


def test_supervised_retrieval_needs_positions_but_they_may_be_none_of_the_candidates():
    record = {**END_TO_END, "answer": "Warsaw"}
    assert "pos_index is missing" in refused(record, "stage2_pretrain_retrieval")
    assert record_rows({**record, "pos_index": []}, "stage2_pretrain_retrieval")[0]["pos_index"] == []


@pytest.mark.parametrize("record", [qa(0), paraphrase(0), {**qa(0), "data_type": None}])
@pytest.mark.parametrize("stage", ["stage1_2", "stage2", "stage2_pretrain_retrieval"])
def test_stage_1_data_in_a_later_stage_is_said_in_words(record, stage):
    assert "this looks like stage-1 data" in refused(record, stage)


def test_later_data_in_stage_1_is_said_in_words():
    assert "this looks like instruction or end-to-end data" in refused(candidates(0), "stage1")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize(
    ("docs", "reason"),
    [
        ([], "docs must be a non-empty list of texts, got []"),
        ([""], "docs[0] must be a non-empty text, got ''"),
        (["", "x"], "docs[0] must be a non-empty text"),
        ([" \n\t"], "docs[0] must be a non-empty text"),
        ("", "docs[0] must be a non-empty text"),
        ([None], "docs[0] must be a non-empty text, got None"),
        ([{"text": "A violin."}], "docs[0] must be a non-empty text, got {'text'"),
        (7, "docs must be a non-empty list of texts, got 7"),
        (None, "docs is missing (context and content are accepted too)"),
    ],
)
def test_empty_documents_are_refused(docs, reason, stage):
    record = qa(0) if stage == "stage1" else candidates(0, 1)
    assert reason in refused({**record, "docs": docs}, stage)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**qa(0), "data_type": "quiz"}, 'data_type must be "qa" or "paraphrase" in stage 1, got \'quiz\''),
        (
            {key: value for key, value in qa(0).items() if key != "answers"},
            "answers must be a non-empty list, got None",
        ),
        ({key: value for key, value in qa(0).items() if key != "question"}, "0 questions for 1 answers"),
        ({**qa(0), "answers": []}, "answers must be a non-empty list, got []"),
        ({**qa(0), "answers": [""]}, "answers[0] must be a non-empty text"),
        ({**qa(0), "answers": [1867]}, "answers[0] must be a non-empty text, got 1867"),
        ({**qa(0), "question": [""]}, "question[0] must be a non-empty text"),
        ({**paraphrase(0), "answers": []}, "answers must be a non-empty list, got []"),
        ({**paraphrase(0), "answers": ["Good.", " "]}, "answers[1] must be a non-empty text"),
        ([qa(0)], "a record must be a JSON object, got [{"),
        ("Where?", "a record must be a JSON object, got 'Where?'"),
        (None, "a record must be a JSON object, got None"),
    ],
)
def test_unusable_stage_1_records_are_refused(record, reason):
    assert reason in refused(record, "stage1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gold_answer": None}, "there is no answer: give answer, gold_answer, golden_answers or answers"),
        ({"gold_answer": "", "answer": ""}, "there is no answer"),
        ({"gold_answer": 1867}, "gold_answer must be a non-empty list of texts, got 1867"),
        ({"golden_answers": ["Warsaw", ""]}, "golden_answers[1] must be a non-empty text"),
        ({"question": ""}, "question must be a non-empty text, got ''"),
        ({"question": None}, "question must be a non-empty text, got None"),
        ({"question": 12}, "question must be a non-empty text, got 12"),
    ],
)
@pytest.mark.parametrize("stage", ["stage1_2", "stage2"])
def test_unusable_answering_records_are_refused(change, reason, stage):
    assert reason in refused({**candidates(0), **change}, stage)


@pytest.mark.parametrize("field", ["question", "docs", "gold_answer"])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(field):
    broken = "Curie \ud83d"
    value = [DOCS[0], broken] if field == "docs" else broken
    reason = refused({**END_TO_END, "gold_answer": "Warsaw", field: value}, "stage2")
    assert field in reason and "half a surrogate pair" in reason
    reason.encode("utf-8")


def test_a_long_value_is_shortened_in_the_message():
    assert len(refused({**qa(0), "data_type": "x" * 5000}, "stage1")) < 200


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"data_type": "qa"', "not JSON: Expecting ',' delimiter at column 19"),
        (b"Where was Marie Curie born?", "not JSON: Expecting value at column 1"),
        (b'{"question": "caf\xe9"}', "not UTF-8 at byte 17 of the line"),
        (b'{"data_type": "qa"} {"data_type": "qa"}', "not JSON: Extra data at column 21"),
        (b'{"data_type": "qa", "docs": ["A violin."]}', "answers must be a non-empty list, got None"),
        (b"[" * 100_000, "not JSON"),
        (b'{"pos_index": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=["cut", "text", "latin1", "two", "fields", "deep", "huge"],
)
def test_a_bad_line_is_reported_with_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "mixed.jsonl"
    content = json.dumps(qa(0)).encode() + b"\n\n" + line + b"\n"
    assert bad_line(path, content).startswith(f"{path}:3: {reason}")


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_errors(tmp_path):
    path = tmp_path / "windows.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in (qa(0), paraphrase(1))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n\r\n".join(lines).encode() + b"\r\n")
    assert [row["docs"] for row in file_rows(path, "stage1")] == [[DOCS[0]], [DOCS[1]]]


def test_a_byte_order_mark_in_the_middle_is_reported(tmp_path):
    line = json.dumps(qa(0)).encode()
    assert "bom.jsonl:2: not JSON" in bad_line(tmp_path / "bom.jsonl", line + b"\n\xef\xbb\xbf" + line)


def test_the_last_line_needs_no_newline_and_any_script_survives(tmp_path):
    path = tmp_path / "script.jsonl"
    text = "東京は日本の首都です。\u2028 Köln 😀"
    path.write_text(json.dumps({**paraphrase(0), "answers": [text]}, ensure_ascii=False), encoding="utf-8")
    assert load_records(str(path), "stage1")[0]["answers"] == [text]


def test_qa_and_paraphrases_may_share_a_file(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", [qa(0), paraphrase(1), qa(2)])
    data = load_records(str(path), "stage1")
    assert data["data_type"] == ["qa", "paraphrase", "qa"]
    assert data["answers"] == [[FACTS[0][2]], [FACTS[1][3]], [FACTS[2][2]]]


def test_paraphrases_only_leaves_the_qa_sets_out(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", [qa(0), paraphrase(1), qa(2), paraphrase(3)])
    data = load_records(str(path), "stage1", paraphrases_only=True)
    assert data["docs"] == [[DOCS[1]], [DOCS[3]]]
    only_qa = write_jsonl(tmp_path / "qa.jsonl", [qa(0)])
    with pytest.raises(RecordError, match=r"qa\.jsonl holds no usable record for stage1 \(paraphrases only\)"):
        load_records(str(only_qa), "stage1", paraphrases_only=True)


def test_a_bad_record_stops_the_run_and_the_message_names_the_way_around(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0), {**qa(1), "answers": []}, qa(2)])
    with pytest.raises(RecordError) as caught:
        load_records(str(path), "stage1")
    assert str(caught.value).splitlines() == [
        f"{path}:2: answers must be a non-empty list, got []",
        "--skip_bad_records skips and counts such records",
    ]


def test_skip_bad_records_skips_and_counts_them_on_every_load(tmp_path, caplog):
    lines = [qa(0), {**qa(1), "answers": []}, qa(2), "no object", qa(3)]
    path = write_jsonl(tmp_path / "data.jsonl", lines)
    for load in range(2):  # the second load finds the first one's cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = load_records(str(path), "stage1", skip_bad=True)
        assert data["docs"] == [[DOCS[0]], [DOCS[2]], [DOCS[3]]], load
        assert f"skipped 2 bad records; the first: {path}:2: answers must be a non-empty list" in caplog.text, load


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{**qa(0), "docs": []}, {}])
    with pytest.raises(RecordError, match=r"bad\.jsonl holds no usable record for stage1"):
        load_records(str(path), "stage1", skip_bad=True)


def test_an_empty_file_is_an_error_that_names_the_right_file(tmp_path):
    good, empty = write_jsonl(tmp_path / "good.jsonl", [qa(0)]), tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(RecordError, match=r"empty\.jsonl holds no usable record for stage1"):
        load_records(f"{good}, ,{empty}", "stage1")


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0), qa(1)])
    assert len(load_records(str(path), "stage1")) == 2
    write_jsonl(path, [qa(3)])
    assert load_records(str(path), "stage1")["docs"] == [[DOCS[3]]]
    size, times = path.stat().st_size, path.stat()
    path.write_text(path.read_text().replace("Penguins", "Ostriches"[:8]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert path.stat().st_size == size
    assert load_records(str(path), "stage1")[0]["docs"][0].startswith("Ostriche")


def test_one_file_serves_every_stage_that_can_read_it(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{key: v for key, v in candidates(0).items() if key != "pos_index"}])
    assert len(load_records(str(path), "stage2")) == 1
    with pytest.raises(RecordError, match="pos_index is missing"):
        load_records(str(path), "stage2_pretrain_retrieval")


@pytest.mark.parametrize(
    ("present", "stage", "split", "found"),
    [
        (["pretrain_data.jsonl", "train.jsonl", "end_to_end_data.jsonl"], "stage1", "train", ["pretrain_data.jsonl"]),
        (["pretrain_data.jsonl", "end_to_end_data.jsonl"], "stage2", "train", ["end_to_end_data.jsonl"]),
        (["end_to_end_data.jsonl"], "stage2_pretrain_retrieval", "train", ["end_to_end_data.jsonl"]),
        (["instruction_data.jsonl", "end_to_end_data.jsonl"], "stage1_2", "train", ["instruction_data.jsonl"]),
        (["instruction_data.jsonl", "end_to_end_data.jsonl"], "text_rag", "train", ["instruction_data.jsonl"]),
        (["train.jsonl", "end_to_end_data.jsonl"], "text_rag", "train", ["end_to_end_data.jsonl"]),
        (["instruction_tuning_data.jsonl", "train.jsonl"], "stage1_2", "train", ["instruction_tuning_data.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "stage2", "dev", ["dev.jsonl"]),
        (["b.jsonl", "a.jsonl", "notes.txt"], "stage1", "train", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_a_directory_gives_the_stage_its_file_then_the_split_then_all(tmp_path, present, stage, split, found):
    for name in present:
        (tmp_path / name).write_text("{}")
    assert [path.name for path in find_files(str(tmp_path), stage, split)] == found


def test_several_files_of_a_directory_are_all_read(tmp_path, caplog):
    write_jsonl(tmp_path / "b.jsonl", [{}, qa(2)])
    write_jsonl(tmp_path / "a.jsonl", [qa(0), qa(1), {}])
    data = load_records(str(tmp_path), "stage1", skip_bad=True)
    assert data["docs"] == [[DOCS[0]], [DOCS[1]], [DOCS[2]]]
    assert "skipped 2 bad records" in caplog.text


def test_a_directory_without_data_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl file; stage1_2 looks for instruction_data\.jsonl"):
        load_records(str(tmp_path), "stage1_2")


@pytest.mark.parametrize("name", ["missing.jsonl", "./data", "/no/such/place", "~/no/such", "a/b/c", "org/data.jsonl"])
def test_a_missing_path_is_an_error_without_any_network(name, monkeypatch):
    def reached(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    with pytest.raises(FileNotFoundError, match="does not exist; --dataset takes a JSONL file, a directory or a Hub"):
        load_records(name, "stage1")


def test_a_file_that_cannot_be_read_is_not_mistaken_for_a_hub_name(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0)])

    def broken(*_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("openrlhf.datasets.records.file_rows", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        load_records(str(path), "stage1")
    assert "Hub" not in str(caught.value)


def hub(monkeypatch, lines: list[dict]) -> None:
    """Makes `lines` what the Hub answers with."""
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: lines)


def test_records_of_a_hub_set_are_checked_alike(monkeypatch):
    absent = {"answer": None, "golden_answers": None, "answers": None}  # columns of other rows
    hub(monkeypatch, [{**candidates(0), **absent}, {**candidates(1), **absent}])
    assert load_records("org/end-to-end", "stage2")["answers"] == [[FACTS[0][2]], [FACTS[1][2]]]


def test_a_bad_record_of_a_hub_set_is_reported_by_number_or_skipped(monkeypatch, caplog):
    hub(monkeypatch, [candidates(0), {**candidates(1), "docs": []}])
    with pytest.raises(RecordError, match=r"org/bad\[train\] record 1: docs must be a non-empty list"):
        load_records("org/bad", "stage2")
    assert len(load_records("org/bad", "stage2", skip_bad=True)) == 1
    assert "skipped 1 bad records; the first: org/bad[train] record 1" in caplog.text


def test_sets_stand_one_after_another_without_probabilities(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [qa(0), qa(1)])
    second = write_jsonl(tmp_path / "second.jsonl", [qa(5)])
    assert load_records(f"{first},{second}", "stage1")["docs"] == [[DOCS[0]], [DOCS[1]], [DOCS[5]]]


def blend(tmp_path: Path, probs: list[float], seed: int = 1) -> list[str]:
    """Kinds of records, in order, of a blend of 400 QA sets and 400 paraphrases."""
    first = write_jsonl(tmp_path / "first.jsonl", [qa(i % 20) for i in range(400)])
    second = write_jsonl(tmp_path / "second.jsonl", [paraphrase(i % 20) for i in range(400)])
    return load_records(f"{first},{second}", "stage1", probs=probs, seed=seed)["data_type"]


def test_a_blend_has_the_asked_shares_throughout(tmp_path):
    kinds = blend(tmp_path, [0.75, 0.25])
    assert len(kinds) > 450  # until the first set is used up
    assert kinds.count("qa") / len(kinds) == pytest.approx(0.75, abs=0.05)
    assert kinds[:200].count("qa") / 200 == pytest.approx(0.75, abs=0.1)


def test_a_blend_is_a_function_of_the_seed(tmp_path):
    assert blend(tmp_path, [0.5, 0.5], seed=1) == blend(tmp_path, [0.5, 0.5], seed=1)
    assert blend(tmp_path, [0.5, 0.5], seed=1) != blend(tmp_path, [0.5, 0.5], seed=2)


@pytest.mark.parametrize(("limit", "n"), [(None, 3), (2, 2), (100, 3)])
def test_max_samples_keeps_the_first(tmp_path, limit, n):
    path = write_jsonl(tmp_path / "data.jsonl", [qa(0), qa(1), qa(2)])
    assert load_records(str(path), "stage1", max_samples=limit)["docs"] == [[doc] for doc in DOCS[:n]]
