"""The evaluation command: its figures against a slow plain way, resuming, processes, memory, refusals (SPEC 8)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import evaluate, report, runner
from evaluation.metrics import best_over_golds, cover_exact_match_score, f1_score
from evaluation.questions import dataset_files, load_questions
from openrlhf.cli import compress_corpus
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.store import Store

ROOT = Path(__file__).parents[2]
SHORT = ["--max_new_tokens", "6", "--batch_size", "3"]


def flags(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--eval_data", str(data), "--output_dir", str(output), *SHORT, *more]


def read(output: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((output / "results.json").read_text(encoding="utf-8")), lines


def without(lines: list[dict], *names: str) -> list[dict]:
    """Lines without what two runs need not share."""
    return json.loads(json.dumps(lines), object_hook=lambda o: {k: v for k, v in o.items() if k not in names})


def without_times(lines: list[dict]) -> list[dict]:
    return without(lines, "latency_s")


def figure(results: dict, **wanted) -> dict:
    (found,) = [f for f in results["figures"] if all(f[key] == value for key, value in wanted.items())]
    return found


@pytest.fixture(scope="module")
def finished(stage2, eval_data, tmp_path_factory) -> Path:
    """One whole end-to-end run, in this process."""
    output = tmp_path_factory.mktemp("finished") / "run"
    evaluate.main(flags(stage2, eval_data, output))
    return output


def test_clara_answers_as_one_question_at_a_time_does(finished, stage2, eval_data):
    _, lines = read(finished)
    model = CLaRa.from_pretrained(stage2)
    assert len(lines) == 16
    for line in lines:
        name = {"normal": "no", "oracle": "with"}[line["setting"]]
        path = eval_data / "end_to_end_evaluation" / line["dataset"] / f"eval_processed_{name}_pos.jsonl"
        record = json.loads(path.read_text(encoding="utf-8").splitlines()[int(line["id"])])
        texts, topk = model.generate_from_questions([record["question"]], [record["docs"]], max_new_tokens=6)
        assert line["prediction"] == texts[0]
        assert [s["index"] for s in line["selected"]] == topk[0].tolist()
        assert sorted(line["ranking"]) == list(range(len(record["docs"])))
        query = model.encode_queries([record["question"]])
        docs = model.compress_documents(record["docs"])[0].flatten(1)
        cosine = torch.nn.functional.cosine_similarity(query.float(), docs.float())
        assert [s["score"] for s in line["selected"]] == pytest.approx(cosine[topk[0]].tolist(), abs=1e-5)
        assert line["golden"] == record["golden_answers"] and line["pos_index"] == sorted(record["pos_index"])
        for index, text in line["documents"].items():
            assert record["docs"][int(index)] == text


def test_text_systems_answer_as_the_plain_base_model_does(finished, mistral, stage2):
    _, lines = read(finished)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(mistral), AutoTokenizer.from_pretrained(mistral)
    clara = CLaRa.from_pretrained(stage2)
    prompts = clara.config.prompts
    for line in lines[::3]:
        rag = line["baselines"]["text_rag"]
        assert [s["index"] for s in rag["selected"]] == line["baselines"]["bm25"]["ranking"][:2]
        # Documents are cut where the compressor cuts them: 19 ids less <ENC> and bos.
        texts = []
        for chosen in rag["selected"]:
            ids = tokenizer(line["documents"][str(chosen["index"])], add_special_tokens=False).input_ids
            texts.append(tokenizer.decode(ids[:17]).rstrip("\ufffd"))
        user = f"Background:\n{texts[0]}\n\n{texts[1]}\n\nQuestion:{line['question']}"
        turns = [{"role": "system", "content": prompts["answer_system"]}, {"role": "user", "content": user}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = base.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert rag["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert rag["prediction"] == expected


def test_oracle_text_reads_the_gold_passages_in_both_settings(finished):
    _, lines = read(finished)
    by_question = {}
    for line in lines:
        oracle = line["baselines"]["oracle_text"]
        by_question.setdefault((line["dataset"], line["question"]), set()).add(
            (oracle["prediction"], oracle["prompt_tokens"])
        )
    assert len(by_question) == 8 and all(len(seen) == 1 for seen in by_question.values())


def test_figures_are_the_means_over_questions(finished):
    results, lines = read(finished)
    for setting in ("normal", "oracle"):
        for dataset in ("cities", "towns"):
            own = [line for line in lines if (line["dataset"], line["setting"]) == (dataset, setting)]
            for system in ("clara", "closed_book", "text_rag", "oracle_text"):
                answers = [line if system == "clara" else line["baselines"][system] for line in own]
                for metric, score in (("cover_em", cover_exact_match_score), ("f1", f1_score)):
                    values = [
                        best_over_golds(score, a["prediction"], line["golden"])
                        for a, line in zip(answers, own, strict=True)
                    ]
                    shown = figure(results, dataset=dataset, setting=setting, system=system, metric=metric)
                    assert shown["value"] == pytest.approx(sum(values) / len(values)) and shown["n"] == len(own)
                    assert shown["low"] <= shown["value"] <= shown["high"]
    for system in ("clara", "random", "bm25"):
        figure(results, dataset="average", setting="oracle", system=system, metric="recall_1")


def test_normal_recall_counts_the_gold_passages_of_the_oracle_file(finished):
    results, lines = read(finished)
    normal = [line for line in lines if line["setting"] == "normal" and line["dataset"] == "cities"]
    oracle = [line for line in lines if line["setting"] == "oracle" and line["dataset"] == "cities"]
    assert [line["relevant"] for line in normal] == [len(line["pos_index"]) for line in oracle] == [1, 1, 1, 1, 2]
    assert any(len(line["pos_index"]) < line["relevant"] for line in normal)
    hits = [len(set(line["ranking"][:5]) & set(line["pos_index"])) / line["relevant"] for line in normal]
    shown = figure(results, dataset="cities", setting="normal", system="clara", metric="recall_5")
    assert shown["value"] == pytest.approx(sum(hits) / len(hits))


def test_results_say_where_they_come_from(finished, stage2):
    results, _ = read(finished)
    assert results["suite"] == "end_to_end" and results["config"]["compr_rate"] == 4
    assert results["config"]["dtype"] == "float32" and results["processes"] == 1
    assert {"torch", "transformers", "python"} <= set(results["versions"])
    assert results["data"][0]["questions"] == 5 and len(results["data"][0]["sha256"]) == 64
    assert set(results["systems"]) == {"clara", "closed_book", "text_rag", "oracle_text", "random", "bm25"}
    assert not (finished / "work").exists()
    assert "Cover-EM" in (finished / "table.md").read_text(encoding="utf-8")


def test_two_processes_give_what_one_gives(finished, stage2, eval_data, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "evaluation.evaluate", *flags(stage2, eval_data, tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = read(finished), read(tmp_path / "two")
    assert two[0]["processes"] == 2
    assert without_times(one[1]) == without_times(two[1])
    times = ("latency_s",)
    assert [f for f in one[0]["figures"] if f["metric"] not in times] == [
        f for f in two[0]["figures"] if f["metric"] not in times
    ]


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same(finished, stage2, eval_data, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "evaluation.evaluate", *flags(stage2, eval_data, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seen, kept = 0, {}
    for wanted in (4, 13):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and seen < wanted:
            seen = len([p for p in output.glob("work/*/*/0*") if p.suffix != ".draft"])
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (output / "results.json").exists()
        done = {p: p.stat().st_mtime_ns for p in output.glob("work/*/*/0*") if p.suffix != ".draft"}
        assert kept.items() <= done.items(), "a batch that was done has been done again"
        kept = done
    evaluate.main(flags(stage2, eval_data, output))
    assert without_times(read(output)[1]) == without_times(read(finished)[1])
    assert any("taken up again" in note for note in read(output)[0]["notes"])


def test_out_of_memory_halves_the_batch_and_loses_nothing(finished, stage2, eval_data, tmp_path, monkeypatch):
    generate, sizes = CLaRa.generate_from_prompts, []

    def small_device(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(CLaRa, "generate_from_prompts", small_device)
    evaluate.main(flags(stage2, eval_data, tmp_path / "small", "--datasets", "cities"))
    assert sizes[:3] == [3, 2, 1]
    lines = [line for line in read(finished)[1] if line["dataset"] == "cities"]
    # Other batches round cosines differently; answers and choices are the same.
    rounded = ("latency_s", "score")
    assert without(read(tmp_path / "small")[1], *rounded) == without(lines, *rounded)


def test_what_cannot_be_generated_is_never_scored(stage2, eval_data, tmp_path, monkeypatch, capsys):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(CLaRa, "generate_from_prompts", no_memory)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(flags(stage2, eval_data, tmp_path / "none", "--datasets", "cities"))
    assert stopped.value.code == 1 and "one text at a time" in capsys.readouterr().err
    assert not (tmp_path / "none" / "results.json").exists()


def test_each_document_is_compressed_once(stage2, eval_data, tmp_path, monkeypatch):
    compress, texts = CLaRa.compress_documents, []

    def counted(self, documents):
        texts.extend(documents)
        return compress(self, documents)

    monkeypatch.setattr(CLaRa, "compress_documents", counted)
    evaluate.main(flags(stage2, eval_data, tmp_path / "run", "--datasets", "cities", "--baselines", "no"))
    assert len(texts) == len(set(texts)) == 10
    results, lines = read(tmp_path / "run")
    assert set(results["systems"]) == {"clara"} and all(line["baselines"] == {} for line in lines)


def test_instruction_suite_reads_all_documents(stage1, eval_data, tmp_path):
    output = tmp_path / "run"
    evaluate.main(flags(stage1, eval_data, output, "--suite", "instruction_tuning", "--setting", "oracle"))
    results, lines = read(output)
    model = CLaRa.from_pretrained(stage1)
    path = eval_data / "instruction_tuning_evaluation" / "cities" / "eval_processed_with_pos.jsonl"
    for line, text in zip(lines, path.read_text(encoding="utf-8").splitlines(), strict=False):
        record = json.loads(text)
        assert line["prediction"] == model.generate_from_text([record["question"]], [record["docs"]], 6)[0]
        assert [s["index"] for s in line["baselines"]["text_rag"]["selected"]] == [0, 1, 2]
    assert not [f for f in results["figures"] if f["system"] == "clara" and f["metric"].startswith("recall")]
    assert figure(results, dataset="towns", system="bm25", metric="recall_1")["n"] == 3


def test_pretraining_suite_says_each_document_again_once(stage1, eval_data, tmp_path):
    output = tmp_path / "run"
    evaluate.main(flags(stage1, eval_data, output, "--suite", "pretraining"))
    results, lines = read(output)
    model = CLaRa.from_pretrained(stage1)
    assert [line["golden"] for line in lines] == [["Curie came from Warsaw."], []]
    for line in lines:
        assert line["prediction"] == model.generate_from_paraphrase([""], [[line["documents"]["0"]]], 6)[0]
    assert figure(results, system="clara", metric="rouge_l")["n"] == 2
    assert figure(results, system="oracle_text", metric="rouge_1_reference")["n"] == 1


def test_a_file_of_stage1_records_will_do(stage1, eval_data, tmp_path):
    file = eval_data / "pretraining_evaluation" / "facts" / "eval_processed.jsonl"
    evaluate.main(flags(stage1, file, tmp_path / "run", "--suite", "pretraining", "--max_questions", "1"))
    assert [line["dataset"] for line in read(tmp_path / "run")[1]] == ["eval_processed"]


def test_finished_work_is_shown_again_and_other_settings_do_not_overwrite_it(finished, stage2, eval_data, capsys):
    before = (finished / "results.json").stat().st_mtime_ns
    evaluate.main(flags(stage2, eval_data, finished))
    assert "Cover-EM" in capsys.readouterr().out and (finished / "results.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(flags(stage2, eval_data, finished, "--seed", "7"))
    assert stopped.value.code == 2 and "other settings (seed)" in capsys.readouterr().err
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_overwrite_measures_again(stage2, eval_data, tmp_path):
    output, fewer = tmp_path / "run", ("--datasets", "cities", "--setting", "oracle", "--baselines", "no")
    evaluate.main(flags(stage2, eval_data, output, *fewer))
    evaluate.main(flags(stage2, eval_data, output, *fewer, "--max_questions", "2", "--overwrite"))
    assert len(read(output)[1]) == 2


@pytest.fixture
def no_model(monkeypatch):
    """Fails when a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr(CLaRa, "from_pretrained", load)


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_corrupted_line_is_named(no_model, stage2, eval_data, tmp_path, capsys):
    data = shutil.copytree(eval_data, tmp_path / "data")
    file = data / "end_to_end_evaluation" / "towns" / "eval_processed_with_pos.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], lines[1][:40], lines[2]]), encoding="utf-8")
    assert f"{file}:2: not JSON" in refused(flags(stage2, data, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(no_model, stage2, eval_data, tmp_path, capsys):
    data = shutil.copytree(eval_data, tmp_path / "data")
    file = data / "end_to_end_evaluation" / "cities" / "eval_processed_no_pos.jsonl"
    file.unlink()
    message = refused(flags(stage2, data, tmp_path / "out"), capsys)
    assert f"{file} is missing" in message and "normal" in message
    assert "no directory" in refused(flags(stage2, tmp_path / "nowhere", tmp_path / "out"), capsys)


def test_an_unknown_data_set_is_named_with_those_that_are_there(no_model, stage2, eval_data, tmp_path, capsys):
    message = refused(flags(stage2, eval_data, tmp_path / "out", "--datasets", "cities,nqq"), capsys)
    assert "unknown data set nqq" in message and "cities, towns" in message


def test_a_checkpoint_of_the_wrong_stage_is_refused(no_model, stage1, eval_data, tmp_path, capsys):
    message = refused(flags(stage1, eval_data, tmp_path / "out"), capsys)
    assert "stage1 checkpoint without a query reasoner" in message and "stage2" in message


def test_a_stage2_checkpoint_that_lost_its_query_reasoner_is_refused(no_model, stage2, eval_data, tmp_path, capsys):
    copy = shutil.copytree(stage2, tmp_path / "copy")
    shutil.rmtree(copy / "query_reasoner_adapter")
    assert "without a query reasoner" in refused(flags(copy, eval_data, tmp_path / "out"), capsys)


def test_a_copy_of_the_compressor_selects_where_there_is_no_query_reasoner(stage1, eval_data, tmp_path):
    more = ["--copy_compressor", "--no_baselines", "--datasets", "towns", "--setting", "oracle"]
    evaluate.main(flags(stage1, eval_data, tmp_path / "out", *more))
    results, lines = read(tmp_path / "out")
    model = CLaRa.from_pretrained(stage1)
    for line in lines:
        path = eval_data / "end_to_end_evaluation" / "towns" / "eval_processed_with_pos.jsonl"
        record = json.loads(path.read_text(encoding="utf-8").splitlines()[int(line["id"])])
        vectors = model.compress_documents([line["question"], *record["docs"]])[0].flatten(1)
        cosine = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
        assert [s["score"] for s in line["selected"]] == pytest.approx(
            cosine.topk(len(line["selected"])).values.tolist(), abs=1e-5
        )
    assert lines and "copy of its compressor" in results["systems"]["clara"]


def test_without_answers_the_candidates_are_ranked_as_with_them(finished, stage2, eval_data, tmp_path, monkeypatch):
    whole, before = read(finished)
    monkeypatch.setattr(CLaRa, "generate_from_prompts", None)
    evaluate.main(flags(stage2, eval_data, tmp_path / "out", "--no_answers"))
    results, lines = read(tmp_path / "out")
    assert [line["ranking"] for line in lines] == [line["ranking"] for line in before]
    assert set(results["systems"]) == {"clara", "random", "bm25"} and lines[0]["prediction"] is None
    kept = [f for f in whole["figures"] if f["metric"].startswith(("recall", "precision", "mrr"))]
    assert [f for f in results["figures"] if f["metric"] != "latency_s"] == kept
    report.main([str(tmp_path / "out"), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()


def test_documents_are_read_from_a_store(finished, stage2, eval_data, tmp_path, monkeypatch):
    _, plain = read(finished)
    texts = {text for line in plain for text in line["documents"].values()}
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    compress_corpus.main(["--model", str(stage2), "--input", str(corpus), "--output", str(tmp_path / "store")])
    compressed = []
    rows = CLaRa.compress_rows
    monkeypatch.setattr(
        CLaRa, "compress_rows", lambda self, given, *more: compressed.extend(given) or rows(self, given, *more)
    )
    evaluate.main(flags(stage2, eval_data, tmp_path / "out", "--document_store", str(tmp_path / "store")))
    _, lines = read(tmp_path / "out")
    tokens = CLaRa.from_pretrained(stage2).tokens
    in_store = {tuple(row) for row in tokens.encoder_rows(list(texts))}
    assert not in_store & {tuple(row) for row in compressed}
    for line, before in zip(lines, plain, strict=True):
        scores = [chosen["score"] for chosen in line["selected"]]
        assert scores == pytest.approx([chosen["score"] for chosen in before["selected"]], abs=1e-2)


def test_a_store_of_another_rate_is_refused_before_the_model_loads(no_model, stage2, eval_data, tmp_path, capsys):
    Store.create(tmp_path / "store", {"n_memory": 1, "width": 32, "doc_max_length": 16, "compr_rate": 16}).close()
    given = flags(stage2, eval_data, tmp_path / "out", "--document_store", str(tmp_path / "store"))
    assert "was compressed at rate 16" in refused(given, capsys)
    given[-1] = str(tmp_path / "nowhere")
    assert "is not a store" in refused(given, capsys)


def test_a_copy_of_the_compressor_is_refused_after_stage_2(no_model, stage2, eval_data, tmp_path, capsys):
    assert "from before stage 2" in refused(flags(stage2, eval_data, tmp_path / "out", "--copy_compressor"), capsys)
    suite = ["--suite", "instruction_tuning", "--copy_compressor"]
    assert "which only --suite end_to_end does" in refused(flags(stage2, eval_data, tmp_path / "out", *suite), capsys)


def test_a_public_checkpoint_without_its_prompts_is_refused(no_model, vectors, eval_data, tmp_path, capsys):
    source = vectors / "checkpoints" / "c8_stage2"
    copy = shutil.copytree(source, tmp_path / "copy")
    base = ["--model_path", str(vectors / "decoders" / "sys")]
    assert "carries no prompts" in refused(flags(copy, eval_data, tmp_path / "out", *base), capsys)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max_questions", "0"], "--max_questions must be positive"),
        (["--setting", "orcale"], "has normal and oracle"),
        (["--dense_model", "no/such/place"], "nor a Hub id"),
        (["--model_path", "./nowhere"], "'./nowhere' was not found"),
        (["--bertscore_model", "x"], "--suite pretraining"),
        (["--suite", "pretraining", "--dense_model", "a/b"], "is a baseline"),
        (["--suite", "instruction_tuning", "--no_answers"], "which only --suite end_to_end has"),
        (["--text_rag_checkpoint", "x", "--no_answers"], "does not go with --no_answers"),
    ],
)
def test_flags_that_cannot_be_evaluated_are_refused(no_model, stage2, eval_data, tmp_path, capsys, more, said):
    assert said in refused(flags(stage2, eval_data, tmp_path / "out", *more), capsys)


def test_files_of_different_questions_are_refused(no_model, stage2, eval_data, tmp_path, capsys):
    data = shutil.copytree(eval_data, tmp_path / "data")
    file = data / "end_to_end_evaluation" / "cities" / "eval_processed_with_pos.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["pos_index"] = []
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert "do not belong together" in refused(flags(stage2, data, tmp_path / "out"), capsys)


def test_data_sets_come_in_the_order_of_the_papers_tables(tmp_path):
    for name in ("2wiki", "nq", "mine", "hotpotqa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval_processed_no_pos.jsonl").touch()
    found = dataset_files(str(tmp_path), "end_to_end", [], ["normal"])
    assert list(found) == ["nq", "hotpotqa", "2wiki", "mine"]


def test_a_question_that_is_asked_twice_keeps_its_own_gold_passages(tmp_path):
    for name, positives in (
        ("eval_processed_with_pos.jsonl", ([0, 1], [2])),
        ("eval_processed_no_pos.jsonl", ([0], [])),
    ):
        rows = [{"question": "Who?", "docs": ["a", "b", "c"], "answer": "x", "pos_index": found} for found in positives]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"normal": tmp_path / "eval_processed_no_pos.jsonl"}
    first, second = load_questions(files, "twice", "end_to_end", None)
    assert (first.relevant, first.oracle_docs) == (2, ("a", "b"))
    assert (second.relevant, second.oracle_docs) == (1, ("c",))


def test_another_results_directory_of_the_users_is_left_alone(no_model, stage2, eval_data, tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine", encoding="utf-8")
    assert "results of something else" in refused(flags(stage2, eval_data, tmp_path), capsys)
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == "mine"


def test_batches_put_the_longest_first_and_are_the_same_for_any_share(tmp_path):
    work = runner.Runner(tmp_path, 2, evaluate.PartialState())
    assert work.batches([3, 9, 3, 5, 1]) == [[1, 3], [0, 2], [4]]
