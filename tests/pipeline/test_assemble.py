"""The assembled files: what the records hold, that training and evaluation take them, and what happens to old files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.questions import SUITES, dataset_files, load_questions
from openrlhf.datasets.records import find_files, load_records
from openrlhf.pipeline import assemble as module
from openrlhf.pipeline import placing
from openrlhf.pipeline.assemble import Options, assemble
from openrlhf.pipeline.near_duplicates import common, shingles, tokens
from openrlhf.pipeline.negatives import best_places, search_words
from openrlhf.pipeline.state import State
from tests.pipeline.collection import ROOT, chunk, library, passages, synthesized, write
from tests.trainer.launch import flags, start

ARGUMENTS = Options(embedding_model=None, name="shelf")


def run(folder: Path, options: Options = ARGUMENTS, output: Path | None = None) -> module.Outcome:
    output = output or folder
    with State(output / "pipeline_state.sqlite") as state:
        return assemble(folder, output, options, state)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(folder: Path) -> dict[str, bytes]:
    """Every file of a directory but the state."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "pipeline_state" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Twenty documents, assembled; do not write there."""
    folder = write(tmp_path_factory.mktemp("shelf"), *library())
    run(folder)
    return folder


@pytest.fixture(scope="module")
def chunks(shelf) -> dict[str, dict]:
    return {record["id"]: record for record in read(shelf / "raw_knowledge.jsonl")}


@pytest.fixture(scope="module")
def everything(shelf) -> dict[str, dict]:
    """Provenance by question, of both sides."""
    both = read(shelf / "clara_training_data.jsonl") + read(shelf / "eval" / "clara_training_data.jsonl")
    return {record["question"]: record for record in both if record["question"]}


@pytest.mark.parametrize("within", ["", "eval"])
@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval", "text_rag"])
def test_every_stage_reads_its_file_of_the_folder(shelf, stage, within):
    files = find_files(str(shelf / within), stage, "train")
    assert [file.name for file in files] == [
        {
            "stage1": "pretrain_data.jsonl",
            "stage1_2": "instruction_data.jsonl",
            "text_rag": "instruction_data.jsonl",
        }.get(stage, "end_to_end_data.jsonl")
    ]
    assert len(load_records(str(shelf / within), stage)) == len(read(files[0]))


def test_candidates_are_twenty_with_the_gold_ones_marked(shelf, chunks, everything):
    places = []
    for record in read(shelf / "end_to_end_data.jsonl"):
        golds = [chunks[name]["text"] for name in everything[record["question"]]["chunks"]]
        assert len(record["docs"]) == len(set(record["docs"])) == 20
        assert sorted(golds) == sorted(record["docs"][i] for i in record["pos_index"])
        assert record["gold_answer"] == record["answer"] == everything[record["question"]]["answer"]
        places += record["pos_index"]
    assert len(set(places)) == 20  # no place tells anything


def test_instruction_records_have_five_documents_with_the_gold_ones_at_a_drawn_place(shelf, chunks, everything):
    places = set()
    for record in read(shelf / "instruction_data.jsonl"):
        golds = {chunks[name]["text"] for name in everything[record["question"]]["chunks"]}
        assert set(record) == {"question", "docs", "gold_answer", "answer"}
        assert len(set(record["docs"])) == 5 and golds <= set(record["docs"])
        places |= {i for i, text in enumerate(record["docs"]) if text in golds}
    assert places == {0, 1, 2, 3, 4}


def test_a_question_over_two_chunks_has_both_as_gold_in_every_pool(shelf, everything):
    hops = {question for question, record in everything.items() if record["kind"] == "multi_hop"}
    for name, size in (("end_to_end_data.jsonl", 20), ("eval/end_to_end_data.jsonl", 20)):
        records = [record for record in read(shelf / name) if record["question"] in hops]
        assert records and all(len(record["pos_index"]) == 2 and len(record["docs"]) == size for record in records)
    assert not hops & {q for record in read(shelf / "pretrain_data.jsonl") for q in record["question"]}


def test_no_negative_resembles_the_gold_or_holds_the_answer(shelf):
    for name in ("end_to_end_data.jsonl", "eval/end_to_end_data.jsonl"):
        for record in read(shelf / name):
            golds = [shingles(record["docs"][i], 3) for i in record["pos_index"]]
            answer = " ".join(tokens(record["answer"]))
            for i, text in enumerate(record["docs"]):
                if i not in record["pos_index"]:
                    assert all(common(shingles(text, 3), gold) < 0.5 * len(gold) for gold in golds)
                    assert len(answer) < 4 or f" {answer} " not in f" {' '.join(tokens(text))} "


def test_negatives_are_hard(shelf):
    """They share words with the question far oftener than chunks do that are drawn at random."""
    everything = [record["text"] for record in read(shelf / "raw_knowledge.jsonl")]
    shared = random_shared = 0
    for record in read(shelf / "end_to_end_data.jsonl"):
        asked = set(search_words(record["question"])) - {"the", "of", "in", "which", "what", "was", "did", "is", "and"}
        negatives = [text for i, text in enumerate(record["docs"][:5]) if i not in record["pos_index"]]
        shared += sum(bool(asked & set(search_words(text))) for text in negatives) / len(negatives)
        random_shared += sum(bool(asked & set(search_words(text))) for text in everything) / len(everything)
    assert shared > 1.5 * random_shared


def test_a_near_duplicate_of_the_gold_chunk_is_no_candidate(tmp_path):
    texts = [f"{p['title']}\n{p['text']}" for p in passages()[:10]]
    # More than half of the first chunk, yet too different to be removed as its near-duplicate.
    words = texts[0].split()
    part = " ".join(words[: int(len(words) * 0.7)])
    chunks = [chunk(f"{i}.txt", 0, text) for i, text in enumerate([*texts, part])]
    question = "What does the beginning say about it, " + " ".join(words[:12]) + "?"
    folder = write(tmp_path, chunks, [synthesized(chunks[0], [(question, "qqqq")])])
    run(folder, Options(eval_share=0))
    (record,) = read(folder / "end_to_end_data.jsonl")
    assert texts[0] in record["docs"] and part not in record["docs"] and len(record["docs"]) == 10


@pytest.mark.parametrize(
    ("answer", "holder", "left_out"),
    [
        ("The River Danube", "Boats go down the long river Danube.", True),
        ("In 1895", "The year 1895 was a good one.", True),
        ("惠更斯", "天文学家惠更斯很有名。", True),
        ("Danubian", "Boats go down the long river Danube.", False),
        ("12", "The 12 apostles.", False),
        ("in the", "Boats in the river.", False),
    ],
)
def test_an_unmarked_chunk_that_holds_the_answer_is_no_candidate(tmp_path, answer, holder, left_out):
    chunks = [chunk("gold.txt", 0, f"Gold\nAnother text altogether. {answer}. Here the sentence ends as it began.")]
    chunks += [chunk("holder.txt", 0, f"Holder\n{holder}"), chunk("other.txt", 0, "Other\nNothing of this at all.")]
    folder = write(tmp_path, chunks, [synthesized(chunks[0], [("Which is it?", answer)])])
    run(folder, Options(eval_share=0))
    (record,) = read(folder / "end_to_end_data.jsonl")
    assert (chunks[1]["text"] not in record["docs"]) == left_out and len(record["docs"]) == 3 - left_out


def test_a_chunk_that_answers_the_same_question_elsewhere_is_no_candidate(tmp_path):
    texts = ["One\nIron melts at 1,538 degrees.", "Two\nAbove 1,500 degrees iron flows.", "Three\nGlass is no metal."]
    chunks = [chunk(f"{i}.txt", 0, text) for i, text in enumerate(texts)]
    pairs = [
        ("At what heat does iron melt?", "At 1,538 degrees"),
        ("At what heat does iron melt?", "Above 1,500 degrees"),
    ]
    folder = write(tmp_path, chunks, [synthesized(chunks[i], [pair]) for i, pair in enumerate(pairs)])
    run(folder, Options(eval_share=0))
    (record,) = read(folder / "end_to_end_data.jsonl")
    assert sorted(record["docs"]) == sorted([texts[0], texts[2]])


def test_training_never_sees_a_held_out_document(shelf, chunks):
    held = {record["source"] for record in read(shelf / "eval" / "clara_training_data.jsonl")}
    training = {record["source"] for record in read(shelf / "clara_training_data.jsonl")}
    assert held and training and not held & training and len(held | training) == 20
    texts = {record["text"] for record in chunks.values() if record["source"] in held}
    for name in ("pretrain_data.jsonl", "instruction_data.jsonl", "end_to_end_data.jsonl"):
        assert not any(text in texts for record in read(shelf / name) for text in record["docs"])


def test_stage_1_has_each_chunks_questions_and_paraphrase_but_no_summary(shelf, everything):
    records = read(shelf / "pretrain_data.jsonl")
    asked = {q: a for r in records if r["data_type"] == "qa" for q, a in zip(r["question"], r["answers"], strict=True)}
    held = {record["question"] for record in read(shelf / "eval" / "clara_training_data.jsonl")}
    single = {q: r["answer"] for q, r in everything.items() if len(r["chunks"]) == 1 and q not in held}
    assert asked == single
    told = [record["answers"] for record in records if record["data_type"] == "paraphrase"]
    samples = read(shelf / "clara_training_data.jsonl")
    assert sorted(told) == sorted([r["answer"]] for r in samples if r["kind"] == "paraphrase")
    assert any(record["kind"] == "summary" for record in samples)


def test_every_sample_is_there_with_its_provenance(shelf, chunks):
    for side in ("train", "eval"):
        folder = shelf if side == "train" else shelf / "eval"
        for record in read(folder / "clara_training_data.jsonl"):
            of = [chunks[name] for name in record["chunks"]]
            assert record["docs"] == [one["text"] for one in of] and record["pages"] == [one["page"] for one in of]
            assert (record["split"], record["model"], record["rounds"]) == (side, "tiny-writer", 2)
            assert record["document_sha256"] == of[0]["document_sha256"] and record["source"] == of[0]["source"]
    kinds = {record["kind"] for record in read(shelf / "clara_training_data.jsonl")}
    assert kinds == {"simple_qa", "complex_qa", "multi_hop", "paraphrase", "summary"}


@pytest.mark.parametrize("suite", ["pretraining", "instruction_tuning", "end_to_end"])
def test_the_evaluation_takes_the_held_out_questions(shelf, suite):
    settings = list(SUITES[suite].files)
    (name, files), *more = dataset_files(str(shelf / "evaluation_data"), suite, [], settings).items()
    assert name == "shelf" and not more
    questions = load_questions(files, name, suite, None)
    assert questions
    if suite == "pretraining":
        return
    n = 5 if suite == "instruction_tuning" else 20
    assert all(len(question.docs) == n and question.relevant for question in questions)
    oracle = [question for question in questions if question.setting == "oracle"]
    assert all(len(question.positives) == question.relevant for question in oracle)
    normal = [question for question in questions if question.setting == "normal"]
    assert len(normal) == len(oracle) and any(question.positives for question in normal)


def test_the_normal_setting_is_what_bm25_finds_in_its_order(shelf):
    records = read(shelf / "evaluation_data" / "end_to_end_evaluation" / "shelf" / "eval_processed_no_pos.jsonl")
    first = sum(record["pos_index"][:1] == [0] for record in records)
    assert first > 0.8 * len(records)
    with_pos = read(shelf / "evaluation_data" / "end_to_end_evaluation" / "shelf" / "eval_processed_with_pos.jsonl")
    assert [record["question"] for record in records] == [record["question"] for record in with_pos]


def test_the_three_stages_train_on_the_files(shelf, tmp_path):
    common_flags = {"train_batch_size": 4, "micro_train_batch_size": 2, "max_samples": 4, "max_len": 4096}
    before = None
    for stage, k in (("stage1", 1), ("stage1_2", 5), ("stage2", 5)):
        options = {**common_flags, "generation_top_k": k, "eval_dataset": shelf / "eval", "pretrain_checkpoint": before}
        before = tmp_path / stage
        done = start(before, flags(before, stage, shelf, **options)).ok()
        assert len(done.curve()) == 1 and all(loss > 0 for loss in [*done.curve(), *done.curve(split="eval")])


def test_a_second_run_does_nothing(shelf):
    times = {path: path.stat().st_mtime_ns for path in shelf.rglob("*") if "pipeline_state" not in path.name}
    assert run(shelf).done_before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_order_of_lines_and_the_folder_change_nothing(shelf, tmp_path):
    chunks, samples = library()
    folder = write(tmp_path / "in", chunks[::-1], samples[::-1])
    run(folder, output=tmp_path / "out")
    one, other = made(shelf), made(tmp_path / "out")
    for name in ("raw_knowledge.jsonl", "synthesized.jsonl", "assembly_manifest.json"):
        one.pop(name), other.pop(name, None)
    assert one == other


@pytest.mark.parametrize("change", [{"seed": 1}, {"eval_share": 0.5}, {"name": "other"}])
def test_other_options_make_other_files(shelf, tmp_path, change):
    folder = Path(shutil.copytree(shelf, tmp_path / "shelf"))
    before = made(folder)
    assert not run(folder, Options(**{"name": "shelf", **change})).done_before
    assert made(folder) != before
    assert not list(folder.rglob("*.before-*"))
    shelves = {path.parent.name for path in folder.rglob("eval_processed*.jsonl")}
    assert shelves == {change.get("name", "shelf")}  # what is no longer made is gone


def test_what_others_put_there_is_kept_aside(tmp_path):
    folder = write(tmp_path, *library(4))
    old = {"pretrain_data.jsonl": "mine\n", "eval/end_to_end_data.jsonl": "mine too\n", "notes.txt": "notes\n"}
    for name, text in old.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    outcome = run(folder)
    aside = {path.name: path.read_text() for path in folder.rglob("*.before-*")}
    digest = placing.hashlib.sha256(b"mine\n").hexdigest()[:8]
    assert aside[f"pretrain_data.jsonl.before-{digest}"] == "mine\n"
    assert sorted(aside.values()) == ["mine\n", "mine too\n"]
    assert sorted(path.name for path in outcome.aside) == sorted(aside)
    assert (folder / "notes.txt").read_text() == "notes\n"
    assert find_files(str(folder), "stage1", "train") == [folder / "pretrain_data.jsonl"]

    with open(folder / "pretrain_data.jsonl", "a") as file:
        file.write('{"data_type": "paraphrase", "question": "", "answers": ["a"], "docs": ["b"]}\n')
    edited = (folder / "pretrain_data.jsonl").read_bytes()
    assert not run(folder).done_before
    assert edited in [path.read_bytes() for path in folder.rglob("pretrain_data.jsonl.before-*")]


def test_the_example_folder_takes_the_files_and_keeps_its_own(tmp_path):
    """OUTPUT_DIR=./example."""
    example = Path(shutil.copytree(ROOT / "example", tmp_path / "example"))
    before = made(example)
    write(example, *library(6))
    with State(example / "pipeline_state.sqlite") as state:
        assemble(example, example, Options(name="example"), state)
    kept = {path: data for path, data in made(example).items() if ".before-" in path}
    replaced = [name for name in before if name.endswith(".jsonl") and "source" not in name]
    assert {name.split(".before-")[0]: data for name, data in kept.items()} == {name: before[name] for name in replaced}
    assert len(kept) == 8 and made(example)["README.md"] == before["README.md"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Dying:
    """Lets so many calls of a function pass, shared with others, and dies at the next."""

    def __init__(self, monkeypatch, calls: int):
        self.left = calls
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, plain):
        def step(*arguments, **options):
            if not self.left:
                raise Killed
            self.left -= 1
            return plain(*arguments, **options)

        return step


def test_killed_while_files_are_put_in_place_the_next_run_ends_the_same(tmp_path, monkeypatch):
    """At every single move and removal, with files of an earlier run and of others in the way."""
    first = write(tmp_path / "first", *library(4))
    run(first, Options(name="old", seed=7))
    (first / "instruction_data.jsonl").write_text("mine\n")
    straight = Path(shutil.copytree(first, tmp_path / "straight"))
    run(straight)
    expected = made(straight)
    assert [data for name, data in expected.items() if ".before-" in name] == [b"mine\n"]
    steps, ended = 0, False
    while not ended:
        folder = Path(shutil.copytree(first, tmp_path / f"killed_{steps}"))
        with monkeypatch.context() as patch:
            Dying(patch, steps)
            try:
                run(folder)
                ended = True
            except Killed:
                steps += 1
        run(folder)
        assert made(folder) == expected, steps
    assert steps > 20


def test_killed_while_files_are_put_in_place_its_own_files_are_known_even_when_the_input_changes(tmp_path, monkeypatch):
    folder = write(tmp_path, *library(4))
    run(folder)
    for steps in (6, 12):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Dying(patch, steps)
            run(folder, Options(seed=steps))
    run(folder, Options(seed=99))
    assert not list(folder.rglob("*.before-*"))


def test_a_small_collection_gives_small_pools_and_says_so_once(tmp_path):
    folder = write(tmp_path, *library(2, chunks_each=2))
    outcome = run(folder)
    records = read(folder / "end_to_end_data.jsonl")
    assert {len(record["docs"]) for record in records} <= {1, 2} and all(record["pos_index"] for record in records)
    short = [note for note in outcome.notes if "fewer than 20 documents" in note]
    assert len(short) == 1


def test_one_document_is_for_training_alone(tmp_path):
    folder = write(tmp_path, *library(1))
    run(folder)
    assert not (folder / "eval").exists() and not (folder / "evaluation_data").exists()
    assert "too few documents" in (folder / "quality_report.md").read_text()


def test_nothing_to_train_on_leaves_everything_as_it_was(tmp_path):
    chunks, _ = library(1)
    folder = write(tmp_path, chunks, [synthesized(chunks[0], [("What is this passage about?", "x")])])
    (folder / "pretrain_data.jsonl").write_text("mine\n")
    before = made(folder)
    with pytest.raises(ValueError, match="no sample to train on .left out: question that names its passage: 1"):
        run(folder)
    assert made(folder) == before


def test_a_record_the_reader_refuses_is_never_put_in_place(tmp_path, monkeypatch):
    folder = write(tmp_path, *library(3))
    plain = module.answered
    monkeypatch.setattr(module, "answered", lambda *given: {**plain(*given), "pos_index": [99]})
    with pytest.raises(ValueError, match="end_to_end_data.jsonl:1: pos_index"):
        run(folder)
    assert not list(folder.glob("*_data.jsonl"))
    monkeypatch.undo()
    run(folder)
    assert (folder / "end_to_end_data.jsonl").is_file() and not (folder / placing.DRAFTS).exists()


def test_best_places_orders_by_score_then_key():
    scores = module.np.array([0.0, 2.0, 1.0, 2.0, -1.0])
    keys = module.np.array([5, 4, 3, 2, 1])
    assert best_places(scores, keys, 3) == [3, 1, 2]
    assert best_places(scores, keys, 5, above=0.0) == [3, 1, 2]
    assert best_places(scores, keys, 1) == [3]
    assert best_places(scores[:0], keys[:0], 3) == []


def command(*line: object, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/assemble_data.py", *map(str, line)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_makes_the_same_files_and_tells_them(shelf, tmp_path):
    folder = tmp_path / "shelf"
    write(folder, *library())
    done = command("--input_dir", folder, "--embedding_model", "none")
    assert done.returncode == 0, done.stderr
    assert made(folder) == made(shelf)
    assert "128  " in done.stdout and "by BM25 only" in done.stdout and "quality_report.html" in done.stdout
    assert "nothing to do" in command("--input_dir", folder, "--embedding_model", "none").stdout


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--input_dir", "EMPTY"], "raw_knowledge.jsonl is missing: run scripts/extract_with_docling.py first"),
        (["--input_dir", "NONE"], "is no directory"),
        (["--input_dir", "EMPTY", "--eval_share", "1.5"], "--eval_share must be at least 0 and less than 1"),
        (["--input_dir", "EMPTY", "--embedding_model", "EMPTY"], "has no modules.json"),
        (["--input_dir", "EMPTY", "--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_the_command_refuses_in_one_line(line, told, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    done = command(*[tmp_path / word if word.isupper() else word for word in line])
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
