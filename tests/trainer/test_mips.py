"""Stage 2 with candidates from the retrieval service: the same training as with the candidates in the batch."""

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.retrieval.store import Store
from tests.retrieval.served import make_store, serving
from tests.trainer.facts import DOCS, FACTS, write_jsonl
from tests.trainer.launch import BASE_MODEL, Run, call, command, exact_trainer, flags, start, weight_files
from tests.trainer.test_numbers import CHECKPOINT

N = 4
STAGE2 = {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "topk_temperature": 0.2, "learning_rate": 1e-2}
MIPS = {**STAGE2, "stage2_mips": True, "stage2_retrieval_top_n": N}


def questions(n: int = 6) -> list[dict]:
    """Questions whose candidates are the first N facts, in changing order."""
    found = []
    for i in range(n):
        order = [(i + j) % N for j in range(N)]
        docs = [DOCS[j] for j in order]
        found.append({"question": FACTS[i][1], "docs": docs, "answer": FACTS[i][2], "pos_index": [order.index(i % N)]})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mips")
    write_jsonl(root / "with.jsonl", questions())
    write_jsonl(root / "without.jsonl", [{"question": q["question"], "answer": q["answer"]} for q in questions()])
    return root


@pytest.fixture(scope="module")
def store(folder) -> Path:
    return make_store(folder / "store", DOCS[:N])


@pytest.fixture(scope="module")
def service(store):
    with serving(store) as running:
        yield running


def from_store(store: Path, dtype: torch.dtype = torch.float32) -> None:
    """Lets documents that come with the batch have the vectors that the store has of them."""
    from openrlhf.models import document_cache

    def look_up(self, ids_MT, mask_MT):
        with Store.open(store) as opened:
            docs_MLD = opened.by_key(document_cache.document_keys(ids_MT, mask_MT)).to(dtype)
        return docs_MLD, torch.zeros(len(docs_MLD))

    document_cache.DocumentCache.__call__ = look_up


def trained(arguments: list[str], store: Path, steps: int) -> dict:
    """Losses, gradient norms, chosen vectors, and the gradients of the first step, in float64."""
    from deepspeed.utils import safe_get_full_grad

    from openrlhf.models import modeling_clara

    from_store(store, torch.float64)
    trainer = exact_trainer(arguments)
    chosen, gradients, select = [], [], modeling_clara.select_documents

    def remember(*what):
        found = select(*what)
        chosen.append(found[0].detach())
        return found

    modeling_clara.select_documents = remember
    learning = {name: p for name, p in trainer.engine.model.named_parameters() if p.requires_grad}
    update = trainer.engine.step

    def step() -> float:
        gradients.append({name: safe_get_full_grad(p).clone() for name, p in learning.items()})
        return update()

    trainer.engine.step = step
    lines = [trainer.train_step(number, lambda n=number: trainer.batches(n)) for number in range(steps)]
    return {"lines": lines, "chosen": chosen, "gradients": gradients}


def test_losses_choices_and_gradients_are_those_of_candidates_in_the_batch(folder, store, service):
    common = {"train_batch_size": 6, "micro_train_batch_size": 2}
    in_batch = flags(folder / "exact", "stage2", folder / "with.jsonl", **STAGE2, **common)
    mips = flags(folder / "exact", "stage2", folder / "with.jsonl", **MIPS, **common, retrieval_url=service.url)
    one, other = call(trained, in_batch, store, 3), call(trained, mips, store, 3)
    assert [line["loss"] for line in other["lines"]] == pytest.approx([line["loss"] for line in one["lines"]], rel=1e-9)
    assert len(one["chosen"]) == len(other["chosen"]) == 9
    for expected, found in zip(one["chosen"], other["chosen"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for expected, found in zip(one["gradients"], other["gradients"], strict=True):
        largest = max(value.abs().max() for name, value in expected.items() if "query" in name)
        assert largest > 1e-4  # the query reasoner learns
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * float(largest), msg=name)


def kill_at(pid: int, calls: int) -> None:
    """Kills the service when it is asked for the so-manieth time, and lets nobody wait for its return."""
    from openrlhf.retrieval import client

    client.PAUSES_SECONDS = (0.01, 0.01)
    asked, whole = [], client.RetrievalClient.__call__

    def ask(self, query_BE, n):
        asked.append(1)
        if len(asked) == calls:
            os.kill(pid, signal.SIGKILL)
        return whole(self, query_BE, n)

    client.RetrievalClient.__call__ = ask


def options(service_url: str | None, **more) -> dict:
    """Three epochs of two steps with an evaluation after each, with candidates from the service if there is one."""
    retrieval = {**MIPS, "retrieval_url": service_url} if service_url else STAGE2
    return {**retrieval, "train_batch_size": 3, "micro_train_batch_size": 3, "max_epochs": 3, **more}


@pytest.fixture(scope="module")
def in_batch(folder, store) -> Run:
    """A run with the candidates in the batch."""
    line = flags(folder / "in_batch", "stage2", folder / "with.jsonl", **options(None))
    line += ["--eval_dataset", str(folder / "with.jsonl"), "--do_eval_gen"]
    return start(folder / "in_batch", line, before=functools.partial(from_store, store)).ok()


@pytest.fixture(scope="module")
def mips(folder, service):
    """The real command with the real service, on records that have no documents: (run, finished process)."""
    line = flags(folder / "mips", "stage2", folder / "without.jsonl", **options(service.url))
    line += ["--eval_dataset", str(folder / "without.jsonl"), "--do_eval_gen"]
    done = command(sys.executable, "-m", "openrlhf.cli.train_sft", *line)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder / "mips"), done


def test_the_command_trains_as_with_candidates_in_the_batch(in_batch, mips):
    run, _ = mips
    for split in ("train", "eval"):
        for name in ("loss", "grad_norm") if split == "train" else ("loss",):
            assert run.curve(name, split) == pytest.approx(in_batch.curve(name, split), rel=1e-5), name
    assert run.curve("loss", "eval")[-1] < run.curve("loss", "eval")[0]
    assert set(weight_files(run.folder)) == set(weight_files(in_batch.folder))
    for name in ("query_reasoner", "decoder"):
        path = f"{name}_adapter/adapter_model.safetensors"
        found, expected = load_file(run.folder / path), load_file(in_batch.folder / path)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5, msg=key)


def test_what_the_figures_have_and_what_they_cannot_have(in_batch, mips):
    run, done = mips
    assert "recall_1" in in_batch.lines("train")[0] and "mse_loss" in in_batch.lines("train")[0]
    for line in run.lines():
        assert not [name for name in line if name.startswith("recall")] and "mse_loss" not in line
    assert all({"em", "f1", "cover_em", "loss"} <= set(line) for line in run.lines("eval"))
    # Documents are not read again, so a run puts fewer tokens through the model.
    assert 0 < run.curve("tokens")[0] < in_batch.curve("tokens")[0]
    assert run.curve("answer_tokens") == in_batch.curve("answer_tokens")
    said = f"candidates: the {N} nearest of {N} documents at http://127.0.0.1:"
    assert said in done.stderr and "docs and pos_index of the records are not read" in done.stderr


def test_evaluation_answers_from_the_nearest_documents():
    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.trainer.build import answerer

    model = CLaRa.from_pretrained(CHECKPOINT, decoder_model_name=str(BASE_MODEL), prompts=DEFAULT_PROMPTS)
    docs_NLD, _ = model.compress_documents(DOCS[:N])
    nearest = torch.tensor([[2, 0], [1, 3]])
    asked = []

    def fetch(query_BE: torch.Tensor, n: int) -> torch.Tensor:
        asked.append((query_BE, n))
        return docs_NLD[nearest].flatten(2)

    model.retriever = fetch
    rows = [{"question": [FACTS[i][1]], "docs": []} for i in range(2)]
    said = answerer(model, SimpleNamespace(stage="stage2", generation_top_k=2))(rows)
    ((query_BE, n),) = asked
    assert n == 2 and torch.equal(query_BE, model.encode_queries([FACTS[0][1], FACTS[1][1]]))
    read = docs_NLD[nearest.flatten()]
    questions = [FACTS[i][1] for i in range(2)]
    assert said == model.generate_from_compressed_documents_and_questions(questions, read, 64)
    other = model.generate_from_compressed_documents_and_questions(questions, read.flip(0), 64)
    assert said != other  # the random model says something else of other documents


def test_documents_of_the_records_are_not_looked_at(folder, service, mips):
    bad = [{**q, "docs": [""], "pos_index": [7]} for q in questions()]
    line = flags(folder / "ignored", "stage2", write_jsonl(folder / "bad.jsonl", bad), **options(service.url))
    line += ["--eval_dataset", str(folder / "without.jsonl"), "--do_eval_gen"]
    run = start(folder / "ignored", line).ok()
    assert run.figures() == mips[0].figures() and run.saved() == mips[0].saved()


def test_the_checkpoint_says_how_many_candidates_it_was_trained_with(mips):
    config = json.loads((mips[0].folder / "config.json").read_text())
    assert config["stage2_retrieval_top_n"] == N and config["generation_top_k"] == 2
    saved = json.loads((mips[0].folder / "training_config.json").read_text())
    assert saved["stage2_mips"] is True and saved["stage2_retrieval_top_n"] == N


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_train_as_one_does(folder, service, zero_stage):
    more = {"train_batch_size": 4, "micro_train_batch_size": 1, "max_epochs": 1, "zero_stage": zero_stage}
    # Dropout of a public checkpoint is that of a new adapter, and drawn for each micro-batch by its number.
    runs = {}
    for ranks in (1, 2):
        place = folder / f"zero{zero_stage}-{ranks}"
        line = flags(place, "stage2", folder / "without.jsonl", **options(service.url, **more))
        runs[ranks] = start(place, line, ranks=ranks).ok()
    assert runs[2].curve() == pytest.approx(runs[1].curve(), rel=1e-4)
    assert runs[2].curve("grad_norm") == pytest.approx(runs[1].curve("grad_norm"), rel=1e-3)


def test_a_dry_run_asks_the_service_and_tells_the_sizes(folder, service):
    place = folder / "dry"
    line = flags(place, "stage2", folder / "without.jsonl", **options(service.url, dry_run=True))
    run = start(place, line).ok()
    said = json.loads(run.output.split("would train ")[1])
    assert said["padded_to"]["candidates"] == N and said["padded_to"]["doc_tokens"] == 0
    assert said["steps"] == 6 and not place.exists()


def test_a_service_that_dies_ends_the_run_in_words_and_the_run_goes_on_with_another(folder, store, service):
    whole, broken = folder / "whole", folder / "broken"
    common = options(service.url, save_steps=1)
    expected = start(whole, flags(whole, "stage2", folder / "without.jsonl", **common)).ok()
    with serving(store) as dying:
        line = flags(broken, "stage2", folder / "without.jsonl", **options(dying.url, save_steps=1))
        run = start(broken, line, before=functools.partial(kill_at, dying.process.pid, 4)).wait()
    assert run.code == 1 and "Traceback" not in run.errors
    last = run.errors.strip().splitlines()[-1]
    assert last.startswith(f"train_sft: no retrieval service answers at {dying.url} (") and "start it there" in last
    assert last.endswith("put the service right, then go on with --load_checkpoint")
    assert run.errors.count("trying again in") == 2
    assert len(run.lines("train")) == 3 and not (broken / "config.json").exists()
    again = flags(broken, "stage2", folder / "without.jsonl", **common, load_checkpoint=True)
    resumed = start(broken, again).ok()
    assert "resumed from step 3 of 6" in resumed.errors
    assert resumed.figures() == expected.figures() and resumed.saved() == expected.saved()


def test_a_resumed_run_must_retrieve_as_the_first_did(folder, service):
    place = folder / "fixed"
    common = options(service.url, save_steps=1, max_epochs=1, stage2_retrieval_top_n=3)
    start(place, flags(place, "stage2", folder / "without.jsonl", **common)).ok()
    line = flags(place, "stage2", folder / "without.jsonl", **{**common, "stage2_retrieval_top_n": N})
    run = start(place, [*line, "--load_checkpoint"]).wait()
    assert run.code == 1 and "stage2_retrieval_top_n: 3 then, 4 now" in run.errors


@pytest.fixture(scope="module")
def no_weights(folder) -> Path:
    """The base model without what could be loaded."""
    return Path(shutil.copytree(BASE_MODEL, folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors")))


def refused(folder: Path, url: str, base: Path = BASE_MODEL, env: dict | None = None, **more) -> str:
    """The only line of train_sft about what is wrong."""
    place = folder / "refused"
    line = flags(place, "stage2", folder / "without.jsonl", **options(url, pretrain=base, **more))
    run = start(place, line, env=env).wait()
    found = [said for said in run.errors.splitlines() if said.startswith("train_sft: ")]
    assert run.code == 1 and len(found) == 1 and "Traceback" not in run.errors, run.errors
    assert not list(place.glob("global_step*")) and not (place / "metrics.jsonl").exists()
    shutil.rmtree(place, ignore_errors=True)
    return found[0]


def test_a_service_that_is_not_there_is_refused_before_the_model_loads(folder, no_weights):
    said = refused(folder, "http://127.0.0.1:9", no_weights)
    assert said.startswith("train_sft: --stage2_mips: no retrieval service answers at http://127.0.0.1:9 (")


def test_a_service_that_cannot_give_as_much_is_refused_before_the_model_loads(folder, store, service, no_weights):
    said = refused(folder, service.url, no_weights, stage2_retrieval_top_n=N + 1)
    assert f"{service.url} holds 4 different documents, 5 are to be found for each question" in said
    with serving(store, "--max_queries", 2, "--max_k", 3) as small:
        said = refused(folder, small.url, no_weights)
        assert "takes 2 queries at once (--max_queries), not 3" in said
        said = refused(folder, small.url, no_weights, micro_train_batch_size=2)
        assert "gives 3 documents a query (--max_k), not 4" in said


def test_a_store_of_another_model_is_refused(folder, store, no_weights):
    """Of another rate before the model loads; of another compressor before the first step."""
    for name, field, value in (("rate", "compr_rate", 16), ("other", "compressor", "0" * 32)):
        copy = Path(shutil.copytree(store, folder / f"store-{name}"))
        header = json.loads((copy / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps({**header, field: value}))
        with serving(copy) as wrong:
            said = refused(folder, wrong.url, no_weights if name == "rate" else BASE_MODEL)
        assert f"the store behind {wrong.url} was not made by --pretrain_checkpoint {CHECKPOINT}: {field} is" in said
        assert f"{value!r} there" in said and "Compress the corpus with this checkpoint" in said


def test_the_key_of_a_service_comes_from_the_environment(folder, store, no_weights):
    place = folder / "let-in"
    with serving(store, env={"CLARA_API_KEY": "s3cret-4711"}) as locked:
        assert "needs its key: set CLARA_API_KEY" in refused(folder, locked.url, no_weights)
        said = refused(folder, locked.url, no_weights, env={"CLARA_API_KEY": "guessed"})
        assert "refuses with status 401" in said and "Set CLARA_API_KEY to the key it was started with" in said
        line = flags(place, "stage2", folder / "without.jsonl", **options(locked.url, max_epochs=1))
        run = start(place, line, env={"CLARA_API_KEY": "s3cret-4711"}).ok()
        assert "s3cret-4711" not in locked.output + run.errors + run.output
    for path in place.rglob("*.json*"):
        assert "s3cret-4711" not in path.read_text(), path
