"""The engine: an answer is the same in any company, rows come and go at any time, nothing is lost or mixed up."""

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from openrlhf.models import generation
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import Prepared, RAGMaster
from openrlhf.serving import engine as engine_module
from openrlhf.serving.engine import LocalEngine
from openrlhf.serving.engines import EngineError
from tests.serving.served import until
from tests.tiny import DOCS, QUESTIONS, new_model

OPEN = {"guardrails": {"allow_out_of_context": True, "require_citations": False}}


def config(temperature: float = 0.0, seed: int = 0, tokens: int = 12, min_score: float = -1.0, **more) -> RAGConfig:
    generation = {"temperature": temperature, "seed": seed, "max_new_tokens": tokens}
    return RAGConfig.from_dict({"reranking": {"min_score": min_score, "top_k": 2}, "generation": generation, **more})


@pytest.fixture
def engine(model):
    made = LocalEngine(model, max_batch=8)
    yield made
    made.close()


def prepared(model, question: str = QUESTIONS[0], docs: list[str] = DOCS, **options) -> Prepared:
    with RAGMaster(model, config=config(**options)) as master:
        return master.prepare([question], docs)[0]


def alone(model, asked: Prepared, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    docs = None if asked.docs_KLD is None else [asked.docs_KLD]
    return model.generate_from_prompts([asked.prompt], docs, tokens, asked.adapter, temperature, seed)[0]


def test_200_answers_at_once_are_each_what_they_are_alone(model, engine):
    """Mixed prompts, lengths, temperatures, seeds and adapters; many more than fit into the batch."""
    rng, asked, ready, expected = random.Random(0), [], [], []
    masters = [RAGMaster(model, config=config()), RAGMaster(model, config=config(min_score=1.0, **OPEN))]
    for i in range(200):
        own = masters[i % 10 == 0].config.generation
        own.temperature, own.seed = rng.choice([0.0, 0.7, 1.3]), rng.randrange(1000)
        own.max_new_tokens = rng.choice([1, 5, 12, 30])
        question = f"{QUESTIONS[i % 3]} {'again ' * rng.randrange(9)}{i}"
        asked.append((own.max_new_tokens, own.temperature, own.seed))
        ready += masters[i % 10 == 0].prepare([question], DOCS)
        expected.append(masters[i % 10 == 0].query(question, DOCS)[0])
    assert {one.adapter for one in ready} == {None, "decoder_adapter"}
    most = 0

    def ask(i: int) -> str:
        nonlocal most
        pieces = engine.submit(ready[i], *asked[i])
        text = "".join(pieces)
        most = max(most, engine.running)
        assert pieces.finish_reason == "stop" or pieces.finish_reason == "length" and pieces.n_tokens == asked[i][0]
        return text

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(ask, range(200))) == expected
    assert len(set(expected)) > 100 and 1 < most <= 8
    until(lambda: engine.running == engine.waiting == 0)
    for master in masters:
        master.close()


def test_a_short_answer_does_not_wait_for_a_long_one_that_came_before(model, engine):
    long = engine.submit(prepared(model), 300, 0.0, 0)
    next(long)
    short = engine.submit(prepared(model, QUESTIONS[1]), 3, 0.0, 0)
    assert "".join(short) == alone(model, prepared(model, QUESTIONS[1]), 3)
    assert not long.finish_reason and engine.running == 1
    long.close()


def test_a_cancelled_answer_leaves_at_once_and_the_others_go_on(model, engine):
    first, second = (engine.submit(prepared(model, q), n, 0.0, 0) for q, n in zip(QUESTIONS, (800, 60), strict=False))
    text = next(second)
    next(first)
    row = next(row for row in engine._rows() if row.answer is first)
    first.close()
    first.close()
    until(lambda: row not in engine._rows())
    assert list(first) == [] and row.written < 400
    assert text + "".join(second) == alone(model, prepared(model, QUESTIONS[1]), 60)
    until(lambda: engine.running == 0)


def test_closing_wakes_who_waits_for_a_piece(model, engine, monkeypatch):
    free = threading.Event()
    step = engine_module.Batch.step
    monkeypatch.setattr(engine_module.Batch, "step", lambda self: free.wait(60) and step(self))
    pieces, got = engine.submit(prepared(model), 30, 0.0, 0), []
    waiting = threading.Thread(target=lambda: got.extend(pieces), daemon=True)
    waiting.start()
    until(lambda: engine.running == 1)
    pieces.close()
    waiting.join(60)
    assert not waiting.is_alive()
    free.set()
    until(lambda: engine.running == 0)


def test_a_waiting_answer_that_is_cancelled_is_never_begun(model, monkeypatch):
    engine = LocalEngine(model, max_batch=1)
    try:
        first = engine.submit(prepared(model), 400, 0.0, 0)
        next(first)
        second = engine.submit(prepared(model, QUESTIONS[1]), 5, 0.0, 0)
        second.close()
        begun = []
        started = engine._started
        monkeypatch.setattr(engine, "_started", lambda row: begun.append(row) or started(row))
        first.close()
        assert "".join(engine.submit(prepared(model), 5, 0.0, 0)) == alone(model, prepared(model), 5)
        assert len(begun) == 1
    finally:
        engine.close()


def test_what_fails_for_one_prompt_fails_for_that_one_alone(model, engine):
    good = engine.submit(prepared(model), 30, 0.0, 0)
    next(good)
    broken = prepared(model)
    broken.docs_KLD = broken.docs_KLD[:1]  # fewer vectors than the prompt has places
    with pytest.raises(EngineError, match="could not be written"):
        "".join(engine.submit(broken, 30, 0.0, 0))
    assert len("".join(good)) > 0 and good.finish_reason


def test_after_a_failed_step_the_engine_goes_on(model, engine, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module.Batch, "step", fail)
        pieces = [engine.submit(prepared(model, q), 30, 0.0, 0) for q in QUESTIONS]
        for one in pieces:
            with pytest.raises(EngineError, match="could not be written"):
                list(one)
    assert "".join(engine.submit(prepared(model), 8, 0.0, 0)) == alone(model, prepared(model), 8)


def test_rows_that_cannot_be_put_together_fail_and_the_engine_goes_on(model, engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    first = engine.submit(prepared(model), 800, 0.0, 0)
    next(first)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "merge_rows", fail)
        second = engine.submit(prepared(model, QUESTIONS[1]), 800, 0.0, 0)
        for one in (first, second):
            with pytest.raises(EngineError, match="could not be written"):
                list(one)
    assert "".join(engine.submit(prepared(model), 8, 0.0, 0)) == alone(model, prepared(model), 8)


def test_a_closed_engine_ends_what_is_written_in_words(model):
    engine = LocalEngine(model)
    pieces = engine.submit(prepared(model), 500, 0.0, 0)
    next(pieces)
    engine.close()
    with pytest.raises(EngineError, match="stopping"):
        list(pieces)
    with pytest.raises(EngineError, match="stopping"):
        engine.submit(prepared(model), 5, 0.0, 0)


def test_a_prompt_that_is_too_long_is_refused_when_it_comes(model, engine):
    with pytest.raises(ValueError, match="exceed the base model's 1024"):
        engine.submit(prepared(model), 1000, 0.0, 0)


@pytest.mark.parametrize("kind", ["sliding", "separate"])
def test_other_caches_give_the_same_answers(kind, mistral, tmp_path, monkeypatch):
    """Sliding windows shorter than prompts join and leave too; caches of unknown layers are written one by one."""
    base = shutil.copytree(mistral, tmp_path / "base")
    if kind == "sliding":
        given = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**given, "sliding_window": 9}))
    else:
        monkeypatch.setattr(engine_module, "mergeable", lambda cache: False)
    model = new_model(base)
    asked = [prepared(model, f"{QUESTIONS[i % 3]} {'so ' * (3 * i % 7)}", DOCS[: 1 + i % 3]) for i in range(12)]
    lengths = [3 + 5 * i % 23 for i in range(12)]
    expected = [alone(model, one, n) for one, n in zip(asked, lengths, strict=True)]
    engine, batches = LocalEngine(model, max_batch=4), []
    step = engine_module.Batch.step
    monkeypatch.setattr(engine_module.Batch, "step", lambda self: batches.append(len(self.rows)) or step(self))
    try:
        pieces = [engine.submit(one, n, 0.0, 0) for one, n in zip(asked, lengths, strict=True)]
        assert ["".join(one) for one in pieces] == expected
    finally:
        engine.close()
    assert max(batches) == (4 if kind == "sliding" else 1)


def test_merged_rows_keep_their_own_keys_whatever_columns_they_stand_in(model):
    caches = []
    for number, length in ((2, 5), (1, 3)):
        cache = generation.new_cache(model.decoder.config)
        for layer in range(2):
            states = torch.randn(number, 2, length, 8)
            cache.update(states, -states, layer)
        caches.append(cache)
    merged = generation.merge_rows([(caches[0], [1]), (caches[1], [0])], [4, 3])
    for layer, (one, other) in zip(merged.layers, zip(*(c.layers for c in caches), strict=True), strict=True):
        assert layer.keys.shape == (2, 2, 4, 8)
        assert torch.equal(layer.keys[0], one.keys[1, :, -4:]) and torch.equal(layer.values[0], one.values[1, :, -4:])
        assert torch.equal(layer.keys[1, :, 1:], other.keys[0]) and not layer.keys[1, :, 0].any()
    before = [layer.keys.clone() for layer in caches[0].layers]
    merged.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8), 0)
    assert merged.get_seq_length() == 5
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, caches[0].layers, strict=True))
