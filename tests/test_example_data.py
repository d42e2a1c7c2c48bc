"""The files under example/ are what scripts/build_example_data.py makes of example/source, and keep its promises."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "example"
TRAINING = ("pretrain_data.jsonl", "instruction_data.jsonl", "end_to_end_data.jsonl")
ANSWER_EVALUATIONS = [
    f"evaluation_data/{stage}_evaluation/example/eval_processed_{kind}.jsonl"
    for stage in ("instruction_tuning", "end_to_end")
    for kind in ("with_pos", "no_pos")
]
STAGE1_EVALUATION = "evaluation_data/pretraining_evaluation/example/eval_processed.jsonl"
POOL_SIZES = {"instruction": 5, "end_to_end": 20}


def load_builder():
    spec = importlib.util.spec_from_file_location("build_example_data", REPOSITORY / "scripts/build_example_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def read(name):
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sources():
    return builder.load_sources(EXAMPLE / "source")


@pytest.fixture(scope="module")
def built(sources):
    return builder.build_records(*sources)


@pytest.fixture(scope="module")
def passages(sources):
    return {passage.document: passage for passage in sources[0]}


@pytest.fixture(scope="module")
def questions(sources):
    return {question.question: question for question in sources[1]}


def test_files_on_disk_are_what_the_script_builds(built):
    on_disk = {p.relative_to(EXAMPLE).as_posix() for p in EXAMPLE.rglob("*.jsonl") if p.parent.name != "source"}
    assert on_disk == set(built)
    for name, records in built.items():
        assert (EXAMPLE / name).read_bytes() == builder.encode(records), f"{name}: run scripts/build_example_data.py"


def test_counts_hold_and_the_readme_states_them(sources, built):
    builder.check_counts(*sources)
    assert builder.summarise(*sources, built) in (EXAMPLE / "README.md").read_text(encoding="utf-8")


def test_too_small_sources_are_refused(sources):
    passages, questions = sources
    with pytest.raises(builder.DataError, match="train passages"):
        builder.check_counts(passages[:100], questions)
    with pytest.raises(builder.DataError, match="occurs twice"):
        builder.check_sources([*passages, passages[0]], questions)


def test_stage1_records_pair_questions_with_answers(passages):
    for name in ("pretrain_data.jsonl", STAGE1_EVALUATION):
        for record in read(name):
            (document,) = record["docs"]
            assert record["data_type"] in ("qa", "paraphrase")
            assert all(isinstance(answer, str) and answer for answer in record["answers"])
            if record["data_type"] == "qa":
                assert len(record["question"]) == len(record["answers"]) > 0
            else:
                assert record["question"] == ""
                assert record["answers"] == [passages[document].paraphrase]


def test_every_train_passage_has_one_qa_and_one_paraphrase_record(passages):
    kinds = sorted((record["docs"][0], record["data_type"]) for record in read("pretrain_data.jsonl"))
    train = [document for document, passage in passages.items() if passage.split == "train"]
    assert kinds == sorted((document, kind) for document in train for kind in ("qa", "paraphrase"))


def test_instruction_records_have_five_documents_with_the_support_among_them(passages, questions):
    for record in read("instruction_data.jsonl"):
        question = questions[record["question"]]
        assert set(record) == {"question", "docs", "gold_answer", "answer"}
        assert len(record["docs"]) == len(set(record["docs"])) == POOL_SIZES["instruction"]
        assert set(question.support) <= {passages[document].id for document in record["docs"]}
        assert record["gold_answer"] in record["answer"] or question.gold_answer.lower() in record["answer"].lower()


@pytest.mark.parametrize("name", ["end_to_end_data.jsonl", *ANSWER_EVALUATIONS])
def test_pos_index_points_at_the_supports_and_at_nothing_else(name, passages, questions):
    for record in read(name):
        question = questions[record["question"]]
        pool = [passages[document] for document in record["docs"]]
        assert len(pool) == len({p.id for p in pool}) == POOL_SIZES[question.use]
        assert record["pos_index"] == [i for i, p in enumerate(pool) if p.id in question.support]
        assert record["gold_answer"] == question.gold_answer == record["golden_answers"][0]
        assert record["answer"] == (question.answer if question.use == "instruction" else question.gold_answer)
        if not name.endswith("no_pos.jsonl"):
            assert {pool[i].id for i in record["pos_index"]} == set(question.support)
            assert not any(builder.holds_answer(p, question) for p in pool if p.id not in question.support)
        assert not builder.same_facts(question, passages.values()) & {p.id for p in pool}


@pytest.mark.parametrize("name", TRAINING)
def test_no_eval_passage_and_no_eval_question_is_trained_on(name, passages, questions):
    for record in read(name):
        assert {passages[document].split for document in record["docs"]} == {"train"}
        if record.get("data_type") is None:
            assert questions[record["question"]].split == "train"


@pytest.mark.parametrize("name", [STAGE1_EVALUATION, *ANSWER_EVALUATIONS])
def test_evaluation_lines_have_unique_ids_and_held_out_subjects(name, passages, questions):
    records = read(name)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        if "pos_index" in record:
            assert questions[record["question"]].split == "eval"
        else:
            assert passages[record["docs"][0]].split == "eval"


def test_chinese_questions_get_candidates_in_both_languages(passages, questions):
    chinese = [r for r in read("end_to_end_data.jsonl") if questions[r["question"]].lang == "zh"]
    assert len(chinese) >= 10
    for record in chinese:
        assert {passages[document].lang for document in record["docs"]} == {"en", "zh"}


def test_positions_of_the_supports_give_nothing_away():
    records = read("end_to_end_data.jsonl")
    positions = [i for record in records for i in record["pos_index"]]
    counts = [positions.count(i) for i in range(POOL_SIZES["end_to_end"])]
    assert max(counts) < 2 * len(positions) / len(counts)


def test_chinese_text_uses_chinese_punctuation(sources):
    for passage in sources[0]:
        if passage.lang == "zh":
            assert not re.search(r"[\u4e00-\u9fff][,;:?!()]", passage.text + passage.paraphrase)


def test_documents_fit_the_base_models_window(sources):
    tokenizer = builder.DEFAULT_TOKENIZER
    if not (tokenizer / "tokenizer.json").is_file():
        pytest.skip("scripts/get_base_model.py has not been run")
    assert builder.longest_document(sources[0], tokenizer) <= builder.DOC_MAX_TOKENS
