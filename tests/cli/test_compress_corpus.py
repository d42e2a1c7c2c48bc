"""compress_corpus, through its command line: a store holds what `compress_documents` gives, however a run went."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState

from openrlhf.cli import compress_corpus
from openrlhf.cli.compress_corpus import main
from openrlhf.models.adapters import DECODER, ENCODER, adapter_state
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import Portion, in_processes, in_ray
from openrlhf.retrieval.corpus import PASSAGE_OF
from openrlhf.retrieval.store import Document, Store
from tests.tiny import DOCS, QUESTIONS, new_model, shake
from tests.trainer.launch import ENVIRONMENT, command, free_port, processes

FORK = multiprocessing.get_context("fork")
# The stored numbers are bfloat16, and a batch of another composition rounds otherwise in float32.
STORED = {"rtol": 2**-8, "atol": 2e-5}


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(target)
    return target


def lines(n: int) -> list[dict]:
    """n passages of different lengths; every tenth says what an earlier one says."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices((" ".join(DOCS)).split(), k=rng.randint(1, 14))) + f" {i}" for i in range(n)]
    return [
        {"id": f"p{i}", "text": texts[i if i % 10 else 0], "title": f"T {i}" if i % 3 else "", "n": i} for i in range(n)
    ]


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def flags(checkpoint: Path, corpus: Path, store: Path, **options) -> list[str]:
    given = {"model": checkpoint, "input": corpus, "output": store, "batch_size": 2, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run(*words) -> int:
    """The exit code of the command."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_store(path: Path, model: CLaRa, records: list[dict]) -> None:
    """The store holds these records, with the vectors and errors that the model gives for them now, each once."""
    with Store.open(path, fingerprint(model)) as store:
        found = {document.id: (document, row) for document, row in store.texts()}
        assert set(found) == {record["id"] for record in records} and len(store) == len(records)
        texts = [f"{r['title']}\n{r['text']}" if r.get("title") else r["text"] for r in records]
        for record in records:
            rest = {key: value for key, value in record.items() if key not in ("id", "text", "title")}
            expected = Document(record["id"], record["text"], record.get("title", ""), None, rest)
            assert found[record["id"]][0] == expected
        vectors = store.vectors([found[record["id"]][1] for record in records])
        fresh, _ = model.compress_documents(texts)
        torch.testing.assert_close(vectors.float(), fresh.float(), **STORED)
        rows = model.tokens.encoder_rows(texts)
        assert len(store.rows()) == len({tuple(row) for row in rows})
        assert store.verify() == []


def vector_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "vectors").iterdir())


def test_the_real_command_fills_a_store_and_says_what_it_did(model, checkpoint, tmp_path):
    records = lines(60)
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), tmp_path / "store")
    done = command(sys.executable, "-m", "openrlhf.cli.compress_corpus", *arguments)
    assert done.returncode == 0, done.stderr
    check_store(tmp_path / "store", model, records)
    assert "60 in" in done.stdout and "60 new, 0 replaced" in done.stdout
    assert "docs/s" in done.stdout and "MB on disk" in done.stdout and "next " in done.stdout
    assert "compressing" not in done.stderr, "a progress bar where there is no terminal"


def test_what_is_there_is_not_compressed_again_and_a_new_text_replaces_the_old(
    model, checkpoint, tmp_path, capsys, monkeypatch
):
    records, store = lines(30), tmp_path / "store"
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), store)
    assert run(*arguments) == 0
    size = vector_bytes(store)
    compressed = []
    real = CLaRa.compress
    monkeypatch.setattr(
        CLaRa, "compress", lambda self, ids, *rest: compressed.append(len(ids)) or real(self, ids, *rest)
    )
    capsys.readouterr()
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "0 new, 0 replaced" in said and "30 were there already" in said and compressed == []
    assert vector_bytes(store) == size

    records[4]["text"] = "Something else entirely."
    records[5]["n"] = "the same text, other metadata"
    records.append({"id": "p99", "text": records[0]["text"], "title": ""})
    jsonl(tmp_path / "c.jsonl", records)
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    assert "1 new, 2 replaced" in said and "28 were there already" in said
    assert sum(compressed) == 1
    check_store(store, model, records)


def test_special_tokens_in_texts_are_plain_text(model, checkpoint, tmp_path):
    texts = ["<MEM0><ENC> </s><s>", "a [INST] b <SEP></s>", "<MEM3>", "\ue0f0clara\ue0f1 x", "</s>"]
    records = [{"id": str(i), "text": text, "title": "<MEM0>" * (i % 2)} for i, text in enumerate(texts)]
    assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), tmp_path / "store")) == 0
    check_store(tmp_path / "store", model, records)
    special = set(model.tokens.memory_ids) | {model.tokens.enc_id, model.tokens.sep_id}
    for row in model.tokens.encoder_rows(texts):
        assert not special & set(row[1:])


def test_long_texts_are_counted_and_files_are_cut_into_passages(model, checkpoint, tmp_path, capsys):
    long = "A violin has four strings. Penguins cannot fly. " * 4
    records = [{"id": "long", "text": long}, {"id": "short", "text": "A violin."}]
    assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), tmp_path / "store")) == 0
    assert "1 are longer than 16 tokens" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(long)
    (tmp_path / "folder" / "b.md").write_text("A violin.")
    assert run(*flags(checkpoint, tmp_path / "folder", tmp_path / "other")) == 0
    assert "longer than" not in capsys.readouterr().out
    with Store.open(tmp_path / "other") as store:
        found = [document for document, _ in store.texts()]
    assert [d.id for d in found[:2]] == ["a.txt#1", "a.txt#2"] and found[-1] == Document("b.md", "A violin.")
    assert " ".join(d.text for d in found[:-1]) == long.strip()
    assert max(len(row) for row in model.tokens.encoder_rows([d.text for d in found])) <= 16 + 3
    cut = [{"id": d.id, "text": d.text, PASSAGE_OF: "a.txt"} for d in found[:-1]]
    check_store(tmp_path / "other", model, [*cut, {"id": "b.md", "text": "A violin."}])


def child(arguments: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    main(arguments)


def test_killed_at_any_moment_it_goes_on_and_compresses_nothing_twice(model, checkpoint, tmp_path):
    records, store = lines(400), tmp_path / "store"
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), store)
    rng, lengths = random.Random(6), [0]
    for _ in range(12):
        process = FORK.Process(target=child, args=(arguments,), daemon=True)
        process.start()
        until = time.monotonic() + 60
        while lengths[-1] == length(store) and process.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        lengths.append(length(store))
        with Store.open(store) as opened:
            assert opened.verify() == []
        if process.exitcode != -signal.SIGKILL:
            break
    assert sum(0 < n < 400 for n in lengths) >= 3, f"it was never killed halfway: {lengths}"
    assert run(*arguments) == 0
    check_store(store, model, records)
    with Store.open(store) as opened:
        assert opened.rows().tolist() == list(range(len(opened.rows()))), "a row was written and given up"
    assert vector_bytes(store) == len(opened_rows(store)) * 2 * 4 * 32


def test_on_a_cpu_a_crash_costs_one_batch(checkpoint, tmp_path, monkeypatch):
    portions = []
    add = Store.add

    def counted(store, documents, *rest, **named):
        portions.append(len(documents))
        return add(store, documents, *rest, **named)

    monkeypatch.setattr(Store, "add", counted)
    assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", lines(11)), tmp_path / "store", batch_size=4)) == 0
    assert portions == [4, 4, 3]


def opened_rows(path: Path) -> list[int]:
    with Store.open(path) as store:
        return store.rows().tolist()


def length(path: Path) -> int:
    if not (path / "store.json").exists():
        return 0
    with Store.open(path) as store:
        return len(store)


def test_two_processes_make_the_same_store(model, checkpoint, tmp_path):
    records = lines(101)
    corpus = jsonl(tmp_path / "c.jsonl", records)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = command(*torchrun, "-m", "openrlhf.cli.compress_corpus", *flags(checkpoint, corpus, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents ") == 1
    check_store(tmp_path / "two", model, records)
    assert run(*flags(checkpoint, corpus, tmp_path / "one")) == 0
    with Store.open(tmp_path / "one") as one, Store.open(tmp_path / "two") as two:
        assert one.header == two.header
        a, b = (list(store.texts()) for store in (one, two))
        assert [d for d, _ in a] == [d for d, _ in b]
        ours, theirs = (s.vectors([row for _, row in part]).float() for s, part in ((one, a), (two, b)))
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2e-5)


def test_killing_one_of_two_processes_loses_nothing_that_was_committed(model, checkpoint, tmp_path):
    records, store = lines(600), tmp_path / "store"
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), store, batch_size=1)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    line = [*torchrun, "-m", "openrlhf.cli.compress_corpus", *arguments]
    started = subprocess.Popen(line, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while length(store) < 50:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        second = next(p for p in psutil.Process(started.pid).children() if p.environ()["RANK"] == "1")
        os.kill(second.pid, signal.SIGKILL)
        assert started.wait(timeout=120) != 0
    finally:
        started.terminate()  # and with it its processes
        started.wait(timeout=60)
    kept = length(store)
    assert 50 <= kept < 600
    with Store.open(store) as opened:
        assert opened.verify() == []
    assert run(*arguments) == 0
    check_store(store, model, records)


def test_a_ray_cluster_makes_the_same_store(model, checkpoint, tmp_path):
    pytest.importorskip("ray")
    records = lines(60)
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), tmp_path / "store")
    module = (sys.executable, "-m", "openrlhf.cli.compress_corpus")
    workers = min(2, len(os.sched_getaffinity(0)))
    done = command(*module, *arguments, "--ray", "--ray_workers", workers, env={"RAY_USAGE_STATS_ENABLED": "0"})
    assert done.returncode == 0, done.stderr
    check_store(tmp_path / "store", model, records)


def test_more_ray_workers_than_there_is_room_for_are_refused_and_not_waited_for(monkeypatch):
    ended = []
    cluster = types.SimpleNamespace(
        init=lambda **_: None, cluster_resources=lambda: {"CPU": 2.0}, shutdown=lambda: ended.append(True)
    )
    monkeypatch.setitem(sys.modules, "ray", cluster)
    with pytest.raises(ValueError, match="--ray_workers 3: the cluster has 2 CPUs"):
        next(in_ray(lambda: None, iter(()), 3))
    assert ended


def fail_in_the_first_process(rank: int, port: int, checkpoint: Path) -> None:
    """The first process cannot compress its part: it ends with that error, and waits for nobody."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(ENVIRONMENT, **{key: str(value) for key, value in place.items()})
    state = PartialState(cpu=True)
    model = CLaRa.from_pretrained(checkpoint)
    rows = model.tokens.encoder_rows(DOCS[:4])
    work = iter([Portion([], [], {bytes([i]): row for i, row in enumerate(rows)}, 4)]) if rank == 0 else None
    if rank == 0:
        model.compress_rows = lambda _: (_ for _ in ()).throw(RuntimeError("out of memory"))
    try:
        list(in_processes(model, state, work))
    except RuntimeError as error:
        os._exit(7 if "out of memory" in str(error) else 8)


def test_a_first_process_that_fails_ends_and_waits_for_nobody(checkpoint):
    port = free_port()
    both = [
        processes().Process(target=fail_in_the_first_process, args=(rank, port, checkpoint), daemon=True)
        for rank in range(2)
    ]
    for process in both:
        process.start()
    both[0].join(120)
    both[1].kill()  # as torchrun does
    assert both[0].exitcode == 7


def test_ray_is_asked_for_in_words_where_it_is_missing(checkpoint, tmp_path, capsys, no_loading, monkeypatch):
    monkeypatch.setattr(compress_corpus.importlib.util, "find_spec", lambda name: None)
    corpus = jsonl(tmp_path / "c.jsonl", lines(3))
    assert run(*flags(checkpoint, corpus, tmp_path / "store"), "--ray") == 2
    assert "pip install 'clara-rag[ray]'" in capsys.readouterr().err
    assert run("--output", tmp_path, "--verify", "--ray") == 2
    assert run(*flags(checkpoint, corpus, tmp_path / "store", ray_workers=2)) == 2


def test_a_full_corpus_is_deleted_compacted_verified_and_repaired(model, checkpoint, tmp_path, capsys):
    records, store = lines(40), tmp_path / "store"
    assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), store)) == 0
    (tmp_path / "ids.txt").write_text("p3\np7\n\nnobody\n")
    assert run("--output", store, "--delete", tmp_path / "ids.txt") == 0
    assert "deleted 2 of 3 listed ids; 38 documents left" in capsys.readouterr().out
    kept = [record for record in records if record["id"] not in ("p3", "p7")]
    check_store(store, model, kept)
    assert run("--output", store, "--compact") == 0
    assert "freed" in capsys.readouterr().out
    check_store(store, model, kept)
    assert run("--output", store, "--verify") == 0
    assert "every vector is there" in capsys.readouterr().out

    (shard,) = (store / "vectors").iterdir()
    os.truncate(shard, shard.stat().st_size - 3 * 2 * 4 * 32)
    assert run("--output", store, "--compact") == 2
    assert f"{shard} has" in capsys.readouterr().err
    assert run("--output", store, "--verify") == 1
    said = capsys.readouterr().out
    assert "3 vectors are damaged or lost, of the documents" in said and "--repair" in said
    assert run("--output", store, "--repair", "--model", checkpoint) == 0
    assert "compressed 3 vectors again" in capsys.readouterr().out
    check_store(store, model, kept)


def test_another_model_is_refused_by_what_differs(mistral, checkpoint, tmp_path, capsys):
    corpus, store = jsonl(tmp_path / "c.jsonl", lines(3)), tmp_path / "store"
    assert run(*flags(checkpoint, corpus, store)) == 0
    other = new_model(mistral)
    shake(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    assert run(*flags(tmp_path / "other", corpus, store)) == 1
    said = capsys.readouterr().err
    assert "compressor is" in said and "base is" not in said and "another store" in said
    assert run("--output", store, "--repair", "--model", tmp_path / "other") == 0  # nothing to repair, nothing changed
    rate = new_model(mistral, compr_rate=8)
    rate.save_pretrained(tmp_path / "rate")
    assert run(*flags(tmp_path / "rate", corpus, store)) == 2, "told before the model loads"
    assert "compr_rate is 4 there, 8 here" in capsys.readouterr().err


def test_the_fingerprint_is_of_what_makes_the_vectors(mistral, base_dir, checkpoint, model):
    own = fingerprint(model)
    assert fingerprint(CLaRa.from_pretrained(checkpoint)) == own
    assert fingerprint(CLaRa.from_pretrained(checkpoint, dtype=torch.bfloat16)) == own, "of how it was loaded"

    def differing(change) -> set[str]:
        loaded = CLaRa.from_pretrained(checkpoint)
        with torch.no_grad():
            change(loaded)
        now = fingerprint(loaded)
        return {name for name in own if own[name] != now[name]}

    def one_more(tensor):
        tensor.view(-1)[-1] += 1

    some = {name: next(iter(adapter_state(model.decoder, name))) for name in (ENCODER, DECODER)}
    assert differing(lambda m: one_more(adapter_state(m.decoder, ENCODER)[some[ENCODER]])) == {"compressor"}
    assert differing(lambda m: one_more(adapter_state(m.decoder, DECODER)[some[DECODER]])) == set()
    assert differing(lambda m: one_more(m.special.memory)) == {"memory_embeddings"}
    assert differing(lambda m: one_more(m.decoder.get_input_embeddings().weight[0])) == {"base"}
    inner = "model.layers.1.mlp.up_proj.base_layer.weight"
    assert differing(lambda m: one_more(m.decoder.get_parameter(inner)[0, :5])) == {"base"}
    assert differing(lambda m: setattr(m.decoder.config, "rms_norm_eps", 0.1)) == {"base"}
    assert differing(lambda m: setattr(m.config, "doc_max_length", 20)) >= {"doc_max_length", "input_layout"}
    elsewhere = fingerprint(new_model(base_dir("llama")))
    assert {"base", "tokenizer"} <= {name for name in own if own[name] != elsewhere[name]}


@pytest.fixture
def no_loading(monkeypatch):
    def fail(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(compress_corpus, "load", fail)


def test_what_is_wrong_is_said_before_the_model_loads(checkpoint, tmp_path, capsys, no_loading):
    good = jsonl(tmp_path / "good.jsonl", lines(3))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    store, no = tmp_path / "store", tmp_path / "no"
    wrong = {
        "no does not exist: give a JSONL file": flags(checkpoint, no, store),
        "holds no usable line": flags(checkpoint, tmp_path / "empty.jsonl", store),
        "bad.jsonl:2: text is missing": flags(checkpoint, bad, store),
        "not a store and not empty": flags(checkpoint, good, tmp_path / "full"),
        "good.jsonl is a file: give a directory": flags(checkpoint, good, good),
        "no checkpoint at": flags(no, good, store),
        "holds no complete CLaRa checkpoint": flags(tmp_path / "full", good, store),
        "the base model './gone' was not found": flags(checkpoint, good, store, model_path="./gone"),
        "no is not a store": ["--output", no, "--verify"],
        "--input must be given": ["--output", store, "--model", checkpoint],
        "--model must be given": ["--output", store, "--repair"],
        "--input has no use with --compact": ["--output", store, "--compact", "--input", good],
        "--batch_size must be at least 1": flags(checkpoint, good, store, batch_size=0),
        "--passage_tokens must be at least 1": flags(checkpoint, good, store, passage_tokens=0),
    }
    for reason, words in wrong.items():
        assert run(*words) == 2, reason
        said = capsys.readouterr().err
        assert reason in said and "Traceback" not in said
    assert not store.exists()
    Store.create(store, {"n_memory": 4, "width": 32}).close()
    assert run("--output", store, "--delete", no) == 2 and "with an id on each line" in capsys.readouterr().err


def test_a_store_that_is_being_written_is_refused_before_the_model_loads(checkpoint, tmp_path, capsys, no_loading):
    with Store.create(tmp_path / "store", {"n_memory": 4, "width": 32}):
        assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", lines(3)), tmp_path / "store")) == 2
    assert "is being written by another process" in capsys.readouterr().err


def test_memory_that_runs_out_is_told_in_words_and_the_run_goes_on_later(
    model, checkpoint, tmp_path, capsys, monkeypatch
):
    records, store = lines(60), tmp_path / "store"
    arguments = flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), store)
    real, calls = CLaRa.compress, []

    def full(self, *inputs):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *inputs)

    monkeypatch.setattr(CLaRa, "compress", full)
    assert run(*arguments) == 1
    assert "memory runs out with --batch_size 2: give" in capsys.readouterr().err
    assert 0 < length(store) < 60
    monkeypatch.undo()
    assert run(*arguments) == 0
    check_store(store, model, records)


def test_bad_lines_are_skipped_and_counted_when_asked(model, checkpoint, tmp_path, capsys):
    records = lines(5)
    corpus = jsonl(tmp_path / "c.jsonl", records)
    corpus.write_text("{\n" + corpus.read_text())
    assert run(*flags(checkpoint, corpus, tmp_path / "store"), "--skip_bad_records") == 0
    said = capsys.readouterr().out
    assert "1 bad lines or files; the first: " in said and "c.jsonl:1: not JSON" in said
    check_store(tmp_path / "store", model, records)


def test_questions_find_their_document_in_a_store(model, checkpoint, tmp_path):
    records = [{"id": str(i), "text": text} for i, text in enumerate([*DOCS, QUESTIONS[0]])]
    assert run(*flags(checkpoint, jsonl(tmp_path / "c.jsonl", records), tmp_path / "store")) == 0
    with Store.open(tmp_path / "store") as store:
        ((rows_N, docs_NLD),) = store.blocks(100)
        fresh, _ = model.compress_documents([QUESTIONS[0]])
        scores = torch.nn.functional.cosine_similarity(fresh.flatten(1), docs_NLD.flatten(1).float())
        (best,) = store.documents_at(rows_N[scores.argmax()][None])
    assert best[0].id == str(len(DOCS))
