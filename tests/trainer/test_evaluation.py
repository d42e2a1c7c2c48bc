"""Evaluation: when it runs, that it counts every record, and that its figures are those of the checkpoint."""

import pytest
import torch

from evaluation.metrics import best_over_golds, cover_exact_match_score, exact_match_score, f1_score
from openrlhf.datasets.records import record_rows
from tests.tiny import make_batch
from tests.trainer.facts import candidates, write_jsonl
from tests.trainer.launch import BASE_MODEL, Run, call, config, flags, train, train_many

TRAINING = [candidates(i) for i in range(8)]
HELD_OUT = [candidates(i, 4 + i % 2) for i in range(8, 13)]  # micro-batches of 3 and 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chain) -> dict[str, Run]:
    """Two epochs of two steps: stage 2 and 1_2 evaluated each epoch with answers, stage 2 every 3 steps and never."""
    folder = tmp_path_factory.mktemp("evaluation")
    data, held_out = write_jsonl(folder / "data.jsonl", TRAINING), write_jsonl(folder / "eval.jsonl", HELD_OUT)
    common = {"train_batch_size": 4, "max_epochs": 2, "pretrain_checkpoint": chain["stage1"].folder}
    answers = {"eval_dataset": held_out, "do_eval_gen": True}
    lines = {
        "stage2": flags(folder / "stage2", "stage2", data, **common, **answers),
        "stage1_2": flags(folder / "stage1_2", "stage1_2", data, **common, **answers),
        "text_rag": flags(folder / "text_rag", "text_rag", data, **{**common, "pretrain_checkpoint": None}, **answers),
        "every3": flags(folder / "every3", "stage2", data, **common, eval_dataset=held_out, eval_steps=3),
        "never": flags(folder / "never", "stage2", data, **common),
    }
    return train_many({name: (folder / name, line) for name, line in lines.items()})


def test_evaluation_runs_at_the_start_and_after_each_epoch(runs):
    assert runs["stage2"].curve("step", "eval") == [0, 2, 4]


def test_evaluation_runs_every_so_many_steps_and_at_the_end(runs):
    assert runs["every3"].curve("step", "eval") == [0, 3, 4]


def test_without_evaluation_data_nothing_is_evaluated(runs):
    assert runs["never"].lines("eval") == []


def test_the_last_partial_batch_is_counted(runs):
    assert runs["stage2"].curve("records", "eval") == [5, 5, 5]


@pytest.mark.parametrize("name", ["stage2", "every3"])
def test_evaluation_does_not_change_training(runs, name):
    trained = [line for line in runs[name].figures() if line["split"] == "train"]
    assert trained == runs["never"].figures()
    assert runs[name].saved() == runs["never"].saved()


def test_generation_is_scored_only_where_asked_for(runs):
    assert {"em", "f1", "cover_em"} <= set(runs["stage2"].lines("eval")[0])
    assert not {"em", "f1", "cover_em"} & set(runs["every3"].lines("eval")[0])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_retrieval_figures_are_there_in_stage_2_and_not_before(runs, split):
    names = {"recall_1", "recall_3", "recall_5"}
    assert all(names <= set(line) for line in runs["stage2"].lines(split))
    assert not any(names & set(line) for line in runs["stage1_2"].lines(split))


def read_in(stage: str, record: dict) -> list[str]:
    """The documents a record puts into a batch: K = 2 outside stage 2, in text_rag the positive among them."""
    docs, (positive,) = record["docs"], record["pos_index"]
    if stage == "stage2":
        return docs
    return docs[:2] if stage == "stage1_2" or positive < 2 else [docs[0], docs[positive]]


def figures(folder, stage: str) -> dict[str, float]:
    """The figures of a checkpoint on the held-out records, one record at a time."""
    from openrlhf.models.modeling_clara import CLaRa

    model = CLaRa.from_pretrained(folder, decoder_model_name=str(BASE_MODEL))
    loss = tokens = 0.0
    sums = dict.fromkeys(("recall_1", "recall_3", "recall_5", "em", "f1", "cover_em"), 0.0)
    for record in HELD_OUT:
        question, docs, gold = record["question"], record["docs"], record["gold_answer"]
        if stage == "stage2":
            vectors = model.compress_documents(docs)[0]
            order = torch.cosine_similarity(model.encode_queries([question]), vectors.flatten(1)).argsort(
                descending=True
            )
            for k in (1, 3, 5):
                sums[f"recall_{k}"] += record["pos_index"][0] in order[:k].tolist()
            answer = model.generate_from_questions([question], [docs], 64)[0][0]
        else:
            answer = model.generate_from_text([question], [read_in(stage, record)], 64)[0]
        for name, score in (("em", exact_match_score), ("f1", f1_score), ("cover_em", cover_exact_match_score)):
            sums[name] += float(best_over_golds(score, answer, [gold]))
        shown = [read_in(stage, record)]
        with torch.no_grad():
            batch = make_batch(model, stage, shown, [question], [gold], [record["pos_index"]])
            count = int((batch["labels"] != -100).sum())
            loss += float(model(batch=batch)[0]) * count
        tokens += count
    mean = {name: value / len(HELD_OUT) for name, value in sums.items() if stage == "stage2" or "recall" not in name}
    return {"loss": loss / tokens, "answer_tokens": tokens, **mean}


@pytest.mark.parametrize("stage", ["stage2", "stage1_2", "text_rag"])
def test_evaluation_figures_are_those_of_the_saved_checkpoint(runs, stage):
    """The loss is a mean over all answer tokens, scores and recall are means over all questions."""
    line = runs[stage].lines("eval")[-1]
    expected = call(figures, runs[stage].folder, stage)
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def answered_from(arguments: list[str], rows: list[dict]) -> list[list[str]]:
    """The documents that --do_eval_gen answers each record from."""
    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.trainer import build

    seen: list[list[str]] = []

    class Recorder(CLaRa):
        def __init__(self): ...

        def generate_from_text(self, questions, documents, max_new_tokens=None):
            seen.extend(documents)
            return [""] * len(questions)

    build.answerer(Recorder(), config(arguments))(rows)
    return seen


@pytest.mark.parametrize("stage", ["stage1_2", "text_rag"])
def test_answers_are_given_from_the_documents_that_training_reads(tmp_path, stage):
    rows = [record_rows(record, stage)[0] for record in HELD_OUT]
    line = flags(tmp_path / "run", stage, write_jsonl(tmp_path / "data.jsonl", HELD_OUT))
    assert call(answered_from, line, rows) == [read_in(stage, record) for record in HELD_OUT]


def test_answers_of_an_overfitted_model_score(tmp_path, chain):
    """So that the scores above are not all zero."""
    data = write_jsonl(tmp_path / "data.jsonl", [candidates(i) for i in range(4)])
    options = {"pretrain_checkpoint": chain["stage1_2"].folder, "learning_rate": 1e-9, "eval_dataset": data}
    line = train(tmp_path / "run", "stage1_2", data, do_eval_gen=True, **options).lines("eval")[-1]
    assert line["em"] > 0 and line["f1"] > 0 and line["cover_em"] >= line["em"], line


@pytest.mark.parametrize("n", [1, 3])
def test_a_data_set_smaller_than_one_batch_trains(tmp_path, n):
    data = write_jsonl(tmp_path / "data.jsonl", [candidates(i) for i in range(n)])
    run = train(tmp_path / "run", "stage1_2", data, eval_dataset=data, max_epochs=2)
    assert len(run.lines("train")) == 2 and run.curve("records", "eval") == [n, n, n]


def test_figures_are_written_every_so_many_steps_and_at_the_end(tmp_path):
    run = train(tmp_path / "run", max_epochs=2, logging_steps=4)
    assert run.curve("step") == [4, 6]


def test_answers_that_max_len_cuts_away_teach_nothing_and_are_reported(tmp_path):
    lines = [candidates(0), {**candidates(1), "question": " ".join(["Which river is it?"] * 30)}]
    data = write_jsonl(tmp_path / "data.jsonl", lines)
    run = train(tmp_path / "run", "stage1_2", data, max_len=120)
    assert "1 answers cut away entirely; these samples teach nothing (counted once a sample and epoch)" in run.errors
    alone = train(tmp_path / "alone", "stage1_2", write_jsonl(tmp_path / "one.jsonl", lines[:1]), max_len=120)
    assert run.curve("answer_tokens") == alone.curve("answer_tokens")
    assert run.curve()[0] == pytest.approx(alone.curve()[0], rel=0.1)  # dropout differs


def test_when_every_answer_is_cut_away_the_loss_is_zero_and_nothing_breaks(tmp_path):
    lines = [{**candidates(1), "question": " ".join(["Which river is it?"] * 30)}]
    run = train(tmp_path / "run", "stage1_2", write_jsonl(tmp_path / "data.jsonl", lines), max_len=120, mse_loss=True)
    assert run.curve() == [0.0] and run.curve("grad_norm")[0] > 0
