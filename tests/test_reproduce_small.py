"""scripts/reproduce_small.py: its data, its commands, slices, and the page written from results."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evaluation import evaluate
from openrlhf.cli import compress_corpus, train_sft
from openrlhf.datasets.records import load_records
from tests.tiny import new_model

ROOT = Path(__file__).parents[1]


def module(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


parts, prepared = module("reproduction_parts"), module("reproduction_data")  # in the order they need one another
reproduce, report = module("reproduce_small"), module("reproduction_report")


@pytest.fixture
def data(tmp_path) -> Path:
    """The documented layout, from the example's records."""
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    for source, name in (
        ("pretrain_data", "stage1_train"),
        ("pretrain_data", "stage1_val"),
        ("instruction_data", "instruction_train"),
        ("end_to_end_data", "e2e_train"),
    ):
        lines = (ROOT / "example" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:30]
        (folder / "train" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "eval").mkdir()
    return folder


def flags(data: Path, base: Path, tmp_path: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--base", str(base), "--work", str(tmp_path / "work"), *more]


def plan(data: Path, base: Path, tmp_path: Path, part: str):
    return reproduce.Plan(reproduce.parse(flags(data, base, tmp_path, "--part", part)))


@pytest.mark.parametrize("part", ["full", "cpu"])
def test_every_command_of_the_plan_has_flags_that_its_program_takes(data, base_dir, tmp_path, part):
    base = base_dir("mistral")
    steps = plan(data, base, tmp_path, part).steps
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) and len({step.done for step in steps}) == len(steps)
    trained, stores = [], []
    for step in steps:
        program, given = step.command[2], step.command[3:]
        if program == "openrlhf.cli.train_sft":
            config = train_sft.parse(given)
            assert config.bf16 == reproduce.has_bfloat16()
            assert config.load_checkpoint and config.save_path == str(step.done.parent)
            start = config.pretrain_checkpoint
            assert start is None or Path(start).relative_to(tmp_path / "work" / "checkpoints").as_posix() in trained
            trained.append(step.name)
        elif program == "evaluation.evaluate":
            config = evaluate.parse(given)
            assert Path(config.checkpoint).relative_to(tmp_path / "work" / "checkpoints").as_posix() in trained
            assert Path(config.output_dir) == step.done.parent
        elif program == "evaluation.plot_results":
            folders = given[: given.index("--output_dir")]
            assert {Path(folder) / "results.json" for folder in folders} <= {other.done for other in steps}
        elif program == "openrlhf.cli.compress_corpus":
            assert step.marked and step.name.removeprefix("compress ") in trained
            given = compress_corpus.parse(given)
            stores.append(str(given.output))
        else:
            assert step.name.startswith(("fresh questions", "held-out questions"))
        stored = getattr(config, "document_store", None) if program != "openrlhf.cli.compress_corpus" else None
        assert stored is None or stored in stores
    assert "text_rag" in trained and "stage2_rate4" in trained and bool(stores) == (part == "cpu")
    assert ("ablation/without_mse/stage2" in trained) == (part == "full")


def test_prepared_files_are_records_of_their_stages_and_are_made_once(data, mistral, tmp_path):
    pool = [json.loads(line) for line in (data / "train" / "e2e_train.jsonl").read_text().splitlines()[:2]]
    (data / "extra").mkdir()
    passages = [doc for row in pool for doc in row["docs"]]
    (data / "extra" / "train_corpus.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(passages))
    )
    first = len(pool[0]["docs"])
    ids = [list(range(first)), list(range(first, len(passages)))]
    pool = [*pool, {**pool[0], "question": "Another one?"}]
    splits = zip(pool, (*ids, ids[0]), ("train", "dev", "train"), strict=True)
    more = [{**row, "doc_ids": i, "split": split} for row, i, split in splits]
    (data / "extra" / "e2e_all_ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    target = tmp_path / "prepared"
    tokenizer = AutoTokenizer.from_pretrained(mistral)
    lengths = sorted(
        len(tokenizer(json.loads(line)["docs"][0], add_special_tokens=False).input_ids)
        for line in (data / "train" / "stage1_train.jsonl").read_text().splitlines()
    )
    longest, short = lengths[2 * len(lengths) // 3], lengths[len(lengths) // 2]
    cpu = parts.PARTS["cpu"]
    even = dataclasses.replace(cpu.further["even"], passages=1, openings=2, made=3)
    further = {**cpu.further, "even": even}
    again = dataclasses.replace(cpu.again, stage1=dataclasses.replace(cpu.again.stage1, passages=1), single=2)
    part = dataclasses.replace(
        cpu, doc_max_length=longest, short=short, single=2, further=further, again=again, corpus=0
    )
    prepared.prepare(data, target, str(mistral), part)
    assert len(load_records(str(target / "e2e.jsonl"), "stage2")) == 31, (
        "30 of the file and one of the pool that is new and for training"
    )
    assert len(load_records(str(target / "stage1.jsonl"), "stage1")) == sum(n <= longest for n in lengths) < 30
    shorter = list(load_records(str(target / "stage1_more.jsonl"), "stage1"))
    assert len(shorter) == sum(n <= short for n in lengths) < sum(n <= longest for n in lengths)
    asked = [row for row in shorter if row["data_type"] == "qa"]
    mixed = list(load_records(str(target / "instruction.jsonl"), "stage1_2"))
    assert len(asked) // 2 == len(mixed) // 3 > 0
    pairs = {(q, a, row["docs"][0]) for row in asked for q, a in zip(row["question"], row["answers"], strict=True)}
    single = [(row["question"][0], row["answers"][0], row["docs"][0]) for row in mixed if len(row["docs"]) == 1]
    assert len(single) == len(asked) // 2 * 2 and set(single) <= pairs
    openings = [json.loads(line) for line in (target / "warm_up.jsonl").read_text().splitlines()]
    assert openings and all(row["docs"] == row["answers"] for row in openings)
    more = [json.loads(line) for line in (target / "openings_more.jsonl").read_text().splitlines()]
    assert more == openings[::-1]
    left = {name: list(prepared.rows(target / name)) for name in even.files("even").values()}
    assert left["openings_even.jsonl"] == more[2:]
    for kind in ("words", "follow"):
        assert left[f"{kind}_even.jsonl"] == list(prepared.rows(target / f"{kind}.jsonl"))[3:] != []
    longer = [
        row for row in prepared.rows(target / "stage1.jsonl") if row["docs"][0] not in {r["docs"][0] for r in shorter}
    ]
    assert left["stage1_even.jsonl"] == longer[::-1][1:] != []
    full = {kind: list(prepared.rows(target / f"{kind}_{parts.FULL}.jsonl")) for kind in parts.KINDS}
    assert full.pop("stage1") == longer[::-1][1:]
    everything = load_records(str(data / "train" / "stage1_train.jsonl"), "stage1")
    fitting = {row["docs"][0] for row in load_records(str(target / "stage1.jsonl"), "stage1")}
    bodies = [row["docs"][0].split("\n", 1)[-1] for row in everything if row["docs"][0] not in fitting]
    shortest, most = prepared.FULL_LENGTHS
    for kind, rows in full.items():
        sizes = [len(tokenizer(row["docs"][0], add_special_tokens=False).input_ids) for row in rows]
        assert len(rows) == len(bodies) and shortest - 3 <= min(sizes) < max(sizes) <= most + 3, kind
        for row in rows:
            drawn = Counter(row["docs"][0].split()[:-1])
            assert any(not drawn - Counter(body.split()) for body in bodies), kind
    over_all = list(load_records(str(target / "instruction_full.jsonl"), "stage1_2"))
    single = [(row["question"][0], row["answers"][0], row["docs"][0]) for row in over_all if len(row["docs"]) == 1]
    pairs = {
        (question, answer, row["docs"][0])
        for row in load_records(str(target / "stage1_qa.jsonl"), "stage1")
        for question, answer in zip(row["question"], row["answers"], strict=True)
    }
    assert set(single) <= pairs and {row["docs"][0] for row in longer} & {doc for _, _, doc in single}
    assert len(single) == 2 * sum(len(row["docs"]) > 1 for row in over_all)
    assert max(Counter(doc for _, _, doc in single).values()) > 1, "several questions of a set"
    sets = list(load_records(str(target / "follow.jsonl"), "stage1"))
    assert len(sets) > sum(n <= longest for n in lengths) // 3 and any(
        len(row["question"]) == prepared.ASKED for row in sets
    )
    for row in sets:
        for question, answer in zip(row["question"], row["answers"], strict=True):
            named = question.removeprefix('Which words follow "').removesuffix('"?')
            assert len(named.split()) == 4 and f"{named} {answer}" in " ".join(row["docs"][0].split())
            assert 2 <= len(answer.split()) <= 6
    unordered = [json.loads(line) for line in (target / "words.jsonl").read_text().splitlines()]
    assert unordered and all(row["docs"] == row["answers"] for row in unordered)
    passages = [row["docs"][0].split("\n", 1)[-1] for row in load_records(str(target / "stage1.jsonl"), "stage1")]
    for row, passage in zip(unordered, passages, strict=True):
        drawn = row["docs"][0].split()
        assert len(tokenizer(row["docs"][0]).input_ids) <= prepared.LONGEST_WORDS + 3
        assert not Counter(drawn[:-1]) - Counter(passage.split()), "the last word may be cut"
        assert len(drawn) < 8 or row["docs"][0] not in " ".join(passage.split())
    records = load_records(str(data / "train" / "stage1_train.jsonl"), "stage1")
    originals = [row["docs"][0].split("\n", 1)[-1] for row in records]
    assert all(any(text.startswith(row["docs"][0][:20]) for text in originals) for row in openings)
    assert all(len(tokenizer(row["docs"][0]).input_ids) <= prepared.LONGEST_OPENING + 3 for row in openings)
    assert {row["data_type"] for row in load_records(str(target / "stage1_qa.jsonl"), "stage1")} == {"qa"}
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    prepared.prepare(data, target, str(mistral), part)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_questions_over_one_corpus_have_its_passages_alone_and_know_their_gold_ones(data, mistral, tmp_path):
    file = data / "eval" / "e2e" / "nq" / "eval_processed_no_pos.jsonl"
    file.parent.mkdir(parents=True)
    asked = [{"question": "q", "docs": [f"evaluated {i}", "twice"], "golden_answers": ["a"]} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    part = dataclasses.replace(parts.PARTS["cpu"], doc_max_length=10**6, short=10**6, further={}, corpus=6, questions=2)
    prepared.prepare(data, tmp_path / "prepared", str(mistral), part)
    corpus = list(prepared.rows(tmp_path / "prepared" / "corpus.jsonl"))
    texts = [row["text"] for row in corpus]
    assert len(set(texts)) == len({row["id"] for row in corpus}) == len(texts)
    assert texts[-3:] == ["evaluated 0", "twice", "evaluated 1"]
    whole = {row["question"]: row for row in prepared.rows(data / "train" / "e2e_train.jsonl")}
    found = list(load_records(str(tmp_path / "prepared" / "e2e.jsonl"), "stage2"))
    assert 6 <= len(found) == sum({row["docs"][i] for i in row["pos_index"]} <= set(texts) for row in whole.values())
    for row in found:
        (question,) = row["question"]
        before = whole[question]
        assert len(row["docs"]) == len(set(row["docs"])) == min(prepared.CANDIDATES, len(texts) - 3)
        assert set(before["docs"]) & set(texts) <= set(row["docs"]) <= set(texts[:-3])
        gold = {before["docs"][i] for i in before["pos_index"]}
        assert {row["docs"][i] for i in row["pos_index"]} == gold and len(row["pos_index"]) == len(gold)


def test_a_step_whose_program_leaves_nothing_is_marked_when_it_is_done(tmp_path):
    silent = dataclasses.replace(step(tmp_path, "silent", "pass"), marked=True)
    assert reproduce.run([silent], tmp_path, 0) is True and silent.done.is_file()
    broken = dataclasses.replace(step(tmp_path, "broken", "raise SystemExit(3)"), marked=True)
    with pytest.raises(SystemExit, match="broken failed"):
        reproduce.run([broken], tmp_path, 0)
    assert not broken.done.exists()


def step(folder: Path, name: str, code: str) -> "reproduce.Step":
    return reproduce.Step(name, [sys.executable, "-c", code], folder / name)


def test_a_slice_ends_a_step_and_the_next_goes_on_with_it(tmp_path):
    tries = tmp_path / "tries"
    first = step(tmp_path, "quick", f"open({str(tmp_path / 'quick')!r}, 'w')")
    code = (
        "import pathlib, time\n"
        f"tries = pathlib.Path({str(tries)!r})\n"
        "seen = tries.exists()\n"
        "tries.write_text('once')\n"
        f"time.sleep(0 if seen else 120)\npathlib.Path({str(tmp_path / 'long')!r}).touch()"
    )
    second = step(tmp_path, "long", code)
    assert reproduce.run([first, second], tmp_path, 6) is False
    assert first.done.is_file() and not second.done.is_file()
    stamp = first.done.stat().st_mtime_ns
    assert reproduce.run([first, second], tmp_path, 60) is True
    assert second.done.is_file() and first.done.stat().st_mtime_ns == stamp
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert set(seconds) == {"quick", "long"} and seconds["long"] > 0


def test_a_step_that_fails_or_leaves_no_result_ends_the_run(tmp_path):
    for code in ("raise SystemExit(3)", "pass"):
        with pytest.raises(SystemExit, match="broken failed"):
            reproduce.run([step(tmp_path, "broken", code)], tmp_path, 0)


def test_missing_data_are_named_before_anything_runs(tmp_path, mistral, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse(flags(tmp_path, mistral, tmp_path))
    assert "stage1_train.jsonl" in capsys.readouterr().err


def figures(values: dict[tuple, float]) -> list[dict]:
    keys = ("dataset", "setting", "system", "metric")
    return [
        {**dict(zip(keys, key, strict=True)), "value": value, "low": value - 0.1, "high": value + 0.1, "n": 5}
        for key, value in values.items()
    ]


def results(work: Path, name: str, suite: str, values: dict[tuple, float]) -> None:
    folder = work / "results" / name
    folder.mkdir(parents=True)
    written = {
        "format": 1, "suite": suite, "config": {}, "data": [{"questions": 5}], "systems": {}, "device": "cpu",
        "versions": {"torch": "2", "transformers": "5"}, "started": "2026-01-01T00:00:00", "command": "python -m x",
        "git": {"commit": "0123456789ab"}, "figures": figures(values),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(written))


def test_the_page_says_which_aims_were_met_and_what_was_not_run(tmp_path):
    work = tmp_path / "work"
    (work / "checkpoints").mkdir(parents=True)
    (work / "seconds.json").write_text("{}")
    tuned = ("average", "normal", "text_rag_tuned", "cover_em")
    ours = ("average", "normal", "clara", "cover_em")
    results(work, "stage1_2_rate16_read", "instruction_tuning", {ours: 0.38, tuned: 0.40})
    recall = {(d, "oracle", "clara", "recall_5"): v for d, v in (("nq", 0.8), ("hotpotqa", 0.7), ("musique", 0.5))}
    recall |= {("2wiki", "oracle", "clara", "recall_5"): 0.6, ("average", "oracle", "clara", "recall_5"): 0.65}
    bm25 = {(d, "oracle", "bm25", "recall_5"): 0.55 for d in ("nq", "hotpotqa", "musique", "2wiki")}
    results(work, "stage2_rate16_select", "end_to_end", recall | bm25)
    results(work, "stage1_2_rate16_select", "end_to_end", {("average", "oracle", "clara", "recall_5"): 0.55})
    out = tmp_path / "page.md"
    left = tmp_path / "left.json"
    left.write_text('{"part": ["measure stage2_rate4 (end_to_end)"], "plan": ["stage2_rate4"]}')
    command = [
        sys.executable,
        "scripts/reproduction_report.py",
        "--work",
        str(work),
        "--out",
        str(out),
        "--part",
        "full",
    ]
    subprocess.run([*command, "--not_run", str(left)], cwd=ROOT, check=True)
    lines = out.read_text(encoding="utf-8").splitlines()
    aims = {
        line.split(" | ")[0].strip("| "): line for line in lines if line.endswith(("met |", "missed |", "measured |"))
    }
    assert "38.0 [28.0, 48.0]" in aims["answers at rate 16: Cover-EM, Normal, against fine-tuned full text"]
    assert aims["answers at rate 16: Cover-EM, Normal, against fine-tuned full text"].endswith("| met |")
    assert aims["answers at rate 4: Cover-EM, Normal, against fine-tuned full text"].endswith("| not measured |")
    assert aims["Recall@5 at rate 16, Oracle, above BM25"].endswith("| on 3 of 4 sets (on 3) | met |")
    assert aims["the same on HotpotQA at rate 16"].endswith("| missed |")
    assert aims["the same, against before stage 2 at rate 16"].endswith("| missed |")
    text = out.read_text(encoding="utf-8")
    assert "`stage2_rate4`" in text and "not a measurement of the method" not in text
    command[-1] = "cpu"
    subprocess.run([*command, "--not_run", str(left)], cwd=ROOT, check=True)
    text = out.read_text(encoding="utf-8")
    assert "not a measurement of the method" in text and "| met |" not in text and "39.86" not in text
    assert "Of this part: `measure stage2_rate4 (end_to_end)`." in text and "measured on them: `stage2_rate4`." in text


def test_a_part_run_on_two_machines_is_one_page(data, mistral, tmp_path):
    out = tmp_path / "docs" / "page.md"
    plan_of = {}
    for machine, name, minutes in (("a", "warm_up_rate4", 33), ("b", "stage1_rate4", 41)):
        work = tmp_path / machine
        run = work / "checkpoints" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        settings = {"stage": "stage1", "bf16": False, "train_batch_size": 4, "learning_rate": 1e-3}
        (run / "training_config.json").write_text(
            json.dumps({**settings, "dataset": f"{tmp_path}/secret/warm_up.jsonl"})
        )
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "train", "loss": 2.0 + minutes}) + "\n")
        begun = work / "checkpoints" / f"{name}_begun"
        begun.mkdir()
        (begun / "metrics.jsonl").write_text("")
        (work / "seconds.json").write_text(json.dumps({name: 60 * minutes, f"{name}_begun": 5}))
        results(work, f"{name}_say_again", "pretraining", {("average", "oracle", "clara", "rouge_1"): minutes / 100})
        args = reproduce.parse([*flags(data, mistral, tmp_path, "--part", "cpu"), "--report", str(out)])
        args.work = work
        left = work / "left.json"
        left.write_text(json.dumps(reproduce.not_run(args, reproduce.Plan(args))))
        plan_of[machine] = json.loads(left.read_text())["part"]
        command = [sys.executable, "scripts/reproduction_report.py", "--work", str(work), "--out", str(out)]
        subprocess.run([*command, "--part", "cpu", "--not_run", str(left)], cwd=ROOT, check=True)
    text = out.read_text(encoding="utf-8")
    assert "| `warm_up_rate4` | stage1 | float32 | 1 × 4 | 0.001 | 35.00 → 35.00 | – | 33 |" in text
    assert text.index("| `warm_up_rate4` |") < text.index("| `stage1_rate4` |") and "_begun" not in text
    assert "33.0 [" in text and "41.0 [" in text
    assert "warm_up_rate4" not in plan_of["a"] and "warm_up_rate4" not in plan_of["b"] and "text_rag" in plan_of["b"]
    kept = "".join(path.read_text(encoding="utf-8") for path in (out.parent / "reproduction").rglob("*.json"))
    assert "…/warm_up.jsonl" in kept and str(tmp_path) not in kept


def test_answers_over_held_out_passages_are_on_the_page(tmp_path):
    assert report.held_out(tmp_path) == "Not run.\n"
    (tmp_path / "held_out").mkdir()
    facts = {"questions": {"64": 5, "96": 4}, "right": {"given, whole": {"64": 3, "96": 1}}}
    (tmp_path / "held_out" / "retrieval_rate4.json").write_text(json.dumps(facts))
    assert "| given, whole | 3 of 5 | 1 of 4 |" in report.held_out(tmp_path)


def test_held_out_questions_are_asked_as_one_at_a_time_is_and_not_without_a_search(mistral, tmp_path):
    ask = module("ask_held_out")
    model = new_model(mistral, doc_max_length=32, compr_rate=8)
    texts = [f"Title {n}\n{text}" for n, text in enumerate(("The lamp was lit. It burns.", "Bread is made from rye."))]
    asked = [{"question": f"Who {n}?", "gold": "rye", "passage": text} for n, text in enumerate(texts)]
    assert ask.pieces(texts[0], 32, lambda text: len(text.split())) == [texts[0]]
    assert ask.pieces(texts[0], 6, lambda text: len(text.split()))[1].startswith("Title 0\n")
    right = ask.ask(model, asked, 8)
    said = [model.generate_from_text([a["question"]], [[a["passage"]]], ask.NEW_TOKENS)[0] for a in asked]
    assert right["answer from it given, whole"] == [ask.cover_exact_match_score(answer, "rye") for answer in said]
    assert len(right) == 7 and all(len(oks) == 2 for oks in right.values())
    new_model(mistral, query=False).save_pretrained(tmp_path / "early")
    refused = subprocess.run(
        [sys.executable, "scripts/ask_held_out.py", "--checkpoint", str(tmp_path / "early"), "--data", "README.md"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "query reasoner is needed" in refused.stderr


def test_no_page_is_written_from_nothing(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="holds no measurement yet"):
        report.page(tmp_path, "full", {"part": [], "plan": []})


def test_fresh_answers_are_right_when_they_hold_a_gold_answer():
    ask = module("ask_fresh")
    assert ask.is_right("It was built by Tobias Lindqvist.", ["Tobias Lindqvist"])
    assert ask.is_right("A white otter", ["otter", "fox"]) and not ask.is_right("Tobias built it", ["Tobias Lindqvist"])


def test_a_list_of_steps_runs_nothing(data, mistral, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce_small", *flags(data, mistral, tmp_path, "--part", "cpu", "--list")])
    reproduce.main()
    shown = capsys.readouterr().out
    assert "to do  stage2_rate4" in shown and not (tmp_path / "work").exists()
