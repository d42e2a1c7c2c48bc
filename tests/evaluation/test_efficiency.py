"""evaluation/efficiency.py: what is timed is what the model does, and the table says what was measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import efficiency
from evaluation.efficiency import ALL, SELECTED, TEXT, Sample, read_cases, summarize
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from tests.tiny import DOCS, QUESTIONS, new_model

NEW = 6


def write(path: Path, *pools: list[str]) -> Path:
    """A file of evaluation records, one question for each list of documents."""
    records = [{"question": q, "docs": docs, "answer": "x"} for q, docs in zip(QUESTIONS, pools, strict=False)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def checkpoints(mistral, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint with and one without a query reasoner."""
    root = tmp_path_factory.mktemp("checkpoints")
    new_model(mistral, training_stage="stage2").save_pretrained(root / "stage2")
    new_model(mistral, query=False, training_stage="stage1_2").save_pretrained(root / "stage1_2")
    return {name: root / name for name in ("stage2", "stage1_2")}


@pytest.fixture(scope="module")
def model(checkpoints) -> CLaRa:
    return CLaRa.from_pretrained(checkpoints["stage2"])


def command(checkpoint: Path, documents: Path, output: Path, *flags) -> list[str]:
    """A short measurement: 1, then 4 documents, two questions."""
    given = ["--checkpoint", checkpoint, "--documents", documents, "--output_dir", output, "--counts", 4, 1]
    return [str(f) for f in [*given, "--questions", 2, "--rounds", 2, "--new_tokens", NEW, *flags]]


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory) -> SimpleNamespace:
    """One run of the command: what it wrote and printed."""
    folder = tmp_path_factory.mktemp("run")
    documents = write(folder / "data.jsonl", DOCS[:3], DOCS[2:])
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, file=None: printed.append(text))
        efficiency.main(command(checkpoints["stage2"], documents, folder / "new" / "out"))
    result = json.loads((folder / "new" / "out" / "efficiency.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder / "new" / "out", documents=documents, result=result, printed=printed)


def ids_of(measured, system: str, n: int) -> list[list[int]]:
    """New token ids of the two questions in the first counted round."""
    samples = measured.result["samples"]
    return [s["new_ids"] for s in samples if (s["system"], s["documents"], s["round"]) == (system, n, 1)]


def plain_greedy(base: Path, ids: list[int]) -> list[int]:
    """Tokens of the base model, each by a whole forward pass, without a cache."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for _ in range(NEW):
        with torch.no_grad():
            ids = [*ids, int(plain(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-NEW:]


def until_stop(model: CLaRa, ids: list[int]) -> str:
    """The text before the first token that ends an answer."""
    stops = model.stop_ids()
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return model.tokens.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def test_full_text_is_written_by_the_base_model_without_adapters(measured, model, mistral):
    cases = read_cases(measured.documents, 4, 2)
    prompts = [model.text_prompt(case.question, case.docs).ids for case in cases]
    assert ids_of(measured, TEXT, 4) == [plain_greedy(mistral, ids) for ids in prompts]
    with_adapter = model.generate_from_prompts([model.text_prompt(cases[0].question, cases[0].docs)], None, NEW)
    assert with_adapter != [until_stop(model, ids_of(measured, TEXT, 4)[0])], "the adapters must make a difference"


@pytest.mark.parametrize("n", [1, 4])
def test_claras_tokens_are_those_of_its_own_generation(measured, model, n):
    cases = read_cases(measured.documents, n, 2)
    questions, docs = [case.question for case in cases], [case.docs for case in cases]
    selected, _ = model.generate_from_questions(questions, docs, NEW)
    assert [until_stop(model, ids) for ids in ids_of(measured, SELECTED, n)] == selected
    every = model.generate_from_text(questions, docs, NEW)
    assert [until_stop(model, ids) for ids in ids_of(measured, ALL, n)] == every
    assert any(selected) and (n == 1 or selected != every)


def test_prompt_tokens_and_store_equal_a_count_by_hand(measured, model, mistral):
    """L = 4 memory tokens and one separator a document, D = 32, float32; the text through the plain tokenizer."""
    cases, tokenizer = read_cases(measured.documents, 4, 2), AutoTokenizer.from_pretrained(mistral)
    for sample in measured.result["samples"]:
        case, n = cases[sample["question"]], sample["documents"]
        if sample["system"] == TEXT:
            texts = "\n\n".join(model.tokens.seen_text(doc) for doc in case.docs[:n])
            user = DEFAULT_PROMPTS["answer_user"].replace("{docs}", texts).replace("{query}", case.question)
            turns = [{"role": "system", "content": DEFAULT_PROMPTS["answer_system"]}, {"role": "user", "content": user}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            expected = len(tokenizer(text, add_special_tokens=False).input_ids)
        else:
            read = min(2, n) if sample["system"] == SELECTED else n
            expected = len(model.answer_prompt(case.question, 0).ids) + 5 * read
        assert sample["prompt_tokens"] == expected, sample
    assert measured.result["store_bytes_per_document"] == 4 * 32 * 4


def test_every_system_takes_its_turn_in_each_round_and_the_first_round_is_not_counted(measured):
    seen = [(s["round"], s["question"], s["documents"], s["system"]) for s in measured.result["samples"]]
    assert seen == [(r, q, n, s) for r in (1, 2) for q in (0, 1) for n in (1, 4) for s in (SELECTED, ALL, TEXT)]
    assert all(len(s["new_ids"]) == NEW for s in measured.result["samples"])


def test_phases_sum_to_the_totals(measured):
    answering = {SELECTED: {"query", "select", "first_token", "decode"}}
    for sample in measured.result["samples"]:
        seconds = sample["seconds"]
        phases = answering.get(sample["system"], {"first_token", "decode"})
        assert set(seconds) == phases | ({"compress"} if sample["system"] != TEXT else set())
        assert all(value > 0 for value in seconds.values())
        assert sample["answer_seconds"] == pytest.approx(sum(seconds[phase] for phase in phases), abs=1e-9)
        assert sample["total_seconds"] == pytest.approx(sum(seconds.values()), abs=1e-9)


def test_rows_and_ratios_follow_from_the_phases(model, tmp_path, monkeypatch):
    """With a clock on which each phase takes one second."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    cases = read_cases(write(tmp_path / "data.jsonl", DOCS), 4, 1)
    prompts, _ = efficiency.build_prompts(model, cases, [4], NEW, text=True)
    rows, ratios = summarize(efficiency.measure(model, cases, prompts, 1, NEW)[0])
    totals = {
        r["system"]: (r["answer_compressed_before"]["median"], r["answer_with_compression"]["median"]) for r in rows
    }
    assert totals == {SELECTED: (4, 5), ALL: (2, 3), TEXT: (2, 2)}
    assert all(row["decode_per_token"]["median"] == pytest.approx(1 / (NEW - 1)) for row in rows)
    assert [r["answer_compressed_before"]["median"] for r in ratios] == [2 / 4, 2 / 2]
    assert [r["answer_with_compression"]["median"] for r in ratios] == [2 / 5, 2 / 3]


def test_ratios_are_taken_within_a_question_and_round():
    """The ratios 30/1, 400/10 and 2/100 have the median 30; the ratio of the medians would be 30/10."""
    samples = []
    for question, (clara, text) in enumerate([(1.0, 30.0), (10.0, 400.0), (100.0, 2.0)]):
        for system, seconds in ((ALL, clara), (TEXT, text)):
            phases = {"first_token": seconds, "decode": seconds}
            samples.append(Sample(5, system, question, 1, 10, phases, new_ids=[1, 2]))
    rows, ratios = summarize(samples)
    assert ratios[0]["first_token"] == {"median": 30.0, "low": 0.02, "high": 40.0}
    assert [row["first_token"] for row in rows] == [
        {"median": 10.0, "low": 1.0, "high": 100.0},
        {"median": 30.0, "low": 2.0, "high": 400.0},
    ]


def test_a_question_is_topped_up_with_other_documents_and_never_twice_with_one(tmp_path, measured):
    path = write(tmp_path / "data.jsonl", [DOCS[0], DOCS[0], DOCS[1]], [DOCS[1], DOCS[2]])
    first, second = read_cases(path, 3, 2)
    assert (first.docs, first.own) == ([DOCS[0], DOCS[1], DOCS[2]], 2)
    assert (second.docs, second.own) == ([DOCS[1], DOCS[2], DOCS[0]], 2)
    assert "4 documents: topped up with other questions' documents, [1, 0] of 4 a question" in measured.result["notes"]
    with pytest.raises(ValueError, match="3 different documents: lower --counts 4"):
        read_cases(path, 4, 2)


def test_the_file_says_everything_that_a_figure_needs(measured):
    result = measured.result
    assert result["command"].startswith("python -m evaluation.efficiency --checkpoint ")
    assert set(result["versions"]) >= {"python", "torch", "transformers", "peft"}
    assert result["threads"] == torch.get_num_threads() and result["device"].startswith("CPU")
    expected = {"dtype": "float32", "compr_rate": 4, "generation_top_k": 2, "n_memory_tokens": 4, "counts": [1, 4]}
    assert expected.items() <= result["config"].items()
    assert [row["samples"] for row in result["rows"]] == [4] * 6
    for row in result["rows"]:
        values = [s["seconds"]["decode"] for s in result["samples"] if s["documents"] == row["documents"]
                  and s["system"] == row["system"]]  # fmt: skip
        assert (row["seconds"]["decode"]["low"], row["seconds"]["decode"]["high"]) == (min(values), max(values))
    assert (measured.folder / "efficiency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in measured.folder.iterdir()) == ["efficiency.json", "efficiency.png"]


def test_the_table_has_a_row_for_each_system_and_number_of_documents(measured):
    table, closing = measured.printed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows[:8]}) == 1
    names = ["CLaRa, best 1 of 1", "CLaRa, all 1", "full text, all 1"]
    names += ["CLaRa, best 2 of 4", "CLaRa, all 4", "full text, all 4"]
    assert [row[0] for row in rows[2:8]] == names
    assert [row[0] for row in rows[10:]] == [name for name in names if "CLaRa" in name]
    assert rows[7][2:5] == ["–"] * 3, "full text neither compresses nor selects"
    assert "efficiency.json" in closing


def test_without_a_query_reasoner_all_documents_are_read_and_the_notes_say_so(checkpoints, tmp_path, capsys):
    documents = write(tmp_path / "data.jsonl", DOCS, DOCS)
    efficiency.main(command(checkpoints["stage1_2"], documents, tmp_path / "out", "--baseline_text", "no"))
    result = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert [row["system"] for row in result["rows"]] == [ALL, ALL] and result["ratios"] == []
    assert "no query reasoner" in capsys.readouterr().out


def test_a_prompt_beyond_the_base_models_positions_is_a_row_that_says_so(checkpoints, tmp_path, capsys):
    """The tiny base has 1024 positions: 70 texts do not fit, 70 times 4 vectors do."""
    many = [f"Document {i} is about the number {i} and nothing else." for i in range(70)]
    documents = write(tmp_path / "data.jsonl", many)
    flags = ("--counts", "70", "--questions", "1", "--rounds", "1")
    efficiency.main(command(checkpoints["stage2"], documents, tmp_path / "out", *flags))
    result = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert [row["system"] for row in result["rows"]] == [SELECTED, ALL] and result["ratios"] == []
    (skipped,) = result["skipped"]
    assert skipped["system"] == TEXT and "the base model has 1024" in skipped["skipped"]
    assert f"| full text, all 70 | skipped: {skipped['skipped']} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents", "missing.jsonl"], "missing.jsonl"),
        (["--documents", "bad.jsonl"], "bad.jsonl:1: not JSON"),
        (["--questions", "3"], "holds 2 questions: lower --questions 3"),
        (["--counts", "4", "9"], "holds 6 different documents: lower --counts 9"),
        (["--counts", "0"], "--counts must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--questions", "0"], "--questions must be at least 1"),
        (["--new_tokens", "1"], "--new_tokens must be at least 2"),
        (["--counts", "many"], "--counts: invalid int value: 'many'"),
        (["--round", "2"], "unrecognized arguments: --round 2"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--checkpoint", "."], "holds no complete CLaRa checkpoint"),
        (["--model_path", "./nowhere"], "the base model './nowhere' was not found"),
        (["--output_dir", "done"], "done already holds efficiency.json"),
    ],
)
def test_a_users_mistake_is_one_line_before_any_model_loads(flags, message, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLaRa, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    write(tmp_path / "data.jsonl", DOCS, DOCS)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "efficiency.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        efficiency.main(command(checkpoints["stage2"], tmp_path / "data.jsonl", tmp_path / "out", *flags))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("efficiency: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
