"""Answers through a vLLM server: the same as RAGMaster's own, many at once, cancelled when closed, and every fault is
said in words."""

import base64
import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from openrlhf.rag.master import Prepared, RAGMaster
from openrlhf.serving import vllm
from openrlhf.serving.engines import EngineError
from openrlhf.serving.vllm import VllmEngine, encode
from tests.serving.conftest import NEW, rag_config
from tests.serving.served import until
from tests.serving.vllm_stub import VllmStub
from tests.tiny import DOCS, QUESTIONS, new_model

SECRET = "sk-a-key-of-nobody"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No key from outside, short pauses."""
    monkeypatch.delenv(vllm.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(vllm, "PAUSES", (0.01, 0.05, 0.3))


@pytest.fixture
def serve():
    """Starts stubs; they end with the test."""
    stubs = []

    def start(make, folder, **options) -> VllmStub:
        stubs.append(make(folder, **options))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


@pytest.fixture
def ready(exported, answers, serve):
    """(engine, stub, prepared, own answers) over the merged tiny Mistral."""
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder)
    return VllmEngine(model, stub.url, "clara", timeout=60), stub, *answers(model)


def written(engine: VllmEngine, prepared: Prepared, new: int = NEW, temperature: float = 0.0, seed: int = 0) -> str:
    return "".join(engine.submit(prepared, new, temperature, seed))


def whole(answers: list[str]) -> list[str]:
    """Without bytes at the end that are no whole character, which vLLM keeps back; random weights write such."""
    return [answer.rstrip("\ufffd").rstrip() for answer in answers]


@pytest.mark.parametrize("make", [VllmStub.of_merged, VllmStub.of_lora])
@pytest.mark.parametrize("name", ["mistral", "llama_tied", "phi3", "smollm2"])
def test_answers_over_http_are_those_of_ragmaster(exported, answers, serve, name, make):
    model, folder = exported(name)
    engine = VllmEngine(model, serve(make, folder).url, "clara", timeout=60)
    prepared, own = answers(model)
    assert [written(engine, item) for item in prepared] == whole(own)
    assert [engine.answer(item, NEW, 0.0, 0) for item in prepared] == whole(own)
    assert any(whole(own))


def test_rescaled_memory_vectors_go_out_as_the_generator_reads_them(exported, answers, serve):
    model, folder = exported("mistral", rescale_memory=True)
    stub = serve(VllmStub.of_merged, folder)
    engine = VllmEngine(model, stub.url, "clara", timeout=60)
    prepared, own = answers(model)
    assert [written(engine, item) for item in prepared] == own


def test_what_is_sent_is_the_prompt_with_the_vectors_in_place(ready):
    engine, stub, (item, *_), _ = ready
    written(engine, item, new=3, seed=7)
    body, sent_TD = stub.requests[-1]
    model, ids = engine.clara, torch.tensor(item.prompt.ids)
    memory_T = torch.isin(ids, torch.tensor(model.tokens.memory_ids))
    assert torch.equal(sent_TD[memory_T], item.docs_KLD.flatten(0, 1)) and memory_T.sum() == 8
    ours = ids >= model.tokens.first_special_id
    assert torch.equal(sent_TD[~ours], model.decoder.get_input_embeddings().weight[ids[~ours]])
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (3, 0.0, 7, True)
    assert body["stop_token_ids"] == model.stop_ids() and body["model"] == "clara"
    # Nothing is left to the server's defaults, which are the base model's generation_config.json.
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_encoded_dense_and_without_what_it_is_a_view_of(dtype):
    whole_TD = torch.randn(4096, 8).to(dtype)
    text = encode(whole_TD[5:9])
    back = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(back, whole_TD[5:9])
    assert len(text) < 4000


def test_bfloat16_goes_out_as_bfloat16(exported, serve):
    _, folder = exported("mistral")
    model = new_model(folder / "base", dtype=torch.bfloat16)
    stub = serve(VllmStub.of_merged, folder)
    VllmEngine(model, stub.url, "clara", timeout=60)
    assert stub.requests[-1][1].dtype == torch.bfloat16


def test_the_text_comes_in_pieces_without_white_space_around_it(ready):
    engine, _, prepared, own = ready
    for item, answer in zip(prepared, own, strict=True):
        pieces = list(engine.submit(item, NEW, 0.0, 0))
        assert len(pieces) > 1 and "".join(pieces) == answer == answer.strip()


def test_line_separators_inside_a_text_do_not_cut_it(ready, monkeypatch):
    engine, stub, (item, *_), _ = ready
    monkeypatch.setattr(stub, "spell", lambda ids: " \n a\u2028b\x85c  d \n"[: 4 * len(ids)])
    assert written(engine, item) == "a\u2028b\x85c  d"


def test_two_draws_with_one_seed_are_the_same(ready):
    engine, _, (item, *_), own = ready
    drawn = [written(engine, item, temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2] and own[0] not in drawn


def test_the_base_model_is_asked_by_its_own_name(exported, serve):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_lora, folder)
    engine = VllmEngine(model, stub.url, "clara", timeout=60)
    config = rag_config(compression={"enabled": False})
    with RAGMaster(model, config=config) as master:
        (item,) = master.prepare([QUESTIONS[0]], DOCS)
        own, _ = master.query(QUESTIONS[0], DOCS)
    assert item.adapter is None and written(engine, item) == own
    assert stub.requests[-1][0]["model"] == "clara-base"


def test_the_merged_model_is_not_taken_for_the_base(ready):
    engine, stub, (item, *_), _ = ready
    before = len(stub.requests)
    with pytest.raises(EngineError, match="has 'clara' alone: start it with the base model"):
        written(engine, replace(item, adapter=None, docs_KLD=None))
    assert len(stub.requests) == before


def test_many_requests_at_once_each_get_their_own_answer(ready):
    engine, stub, prepared, own = ready
    with ThreadPoolExecutor(24) as pool:
        got = list(pool.map(lambda i: written(engine, prepared[i % 3]), range(48)))
    assert got == [own[i % 3] for i in range(48)] and len(set(own)) == 3
    assert len(stub.requests) == 49  # and the one at the start


@pytest.fixture
def endless(ready, monkeypatch):
    """(engine, stub, prepared) of a server that never comes to an end by itself."""
    engine, stub, (item, *_), _ = ready
    monkeypatch.setattr(engine.clara, "stop_ids", lambda: [0])
    return engine, stub, item


def test_closing_cancels_at_the_server(endless):
    engine, stub, item = endless
    stub.fault = "slow"
    pieces = engine.submit(item, 900, 0.0, 0)
    assert next(pieces) and not stub.cancelled.is_set()
    pieces.close()
    assert stub.cancelled.wait(60)
    assert list(pieces) == []
    pieces.close()


def test_pieces_that_are_dropped_cancel_too(endless):
    engine, stub, item = endless
    stub.fault = "slow"
    pieces = engine.submit(item, 900, 0.0, 0)
    next(pieces)
    del pieces
    assert stub.cancelled.wait(60)


def test_another_thread_can_close_while_one_waits(endless):
    engine, stub, item = endless
    stub.fault = "stuck"
    pieces = engine.submit(item, 900, 0.0, 0)
    assert next(pieces)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, pieces)
        until(pieces._reading.locked)
        pieces.close()
        assert waiting.result(60) == []
    stub.go_on.set()
    assert stub.cancelled.wait(60)


def test_what_is_closed_before_it_began_is_never_sent(ready):
    engine, stub, (item, *_), _ = ready
    before = len(stub.requests)
    pieces = engine.submit(item, NEW, 0.0, 0)
    pieces.close()
    assert list(pieces) == [] and len(stub.requests) == before


FAULTS = {
    "500": "failed with status 500: EngineCore died",
    "html": "failed with status 502: <html>Bad Gateway</html>",
    "not json": "does not answer as a vLLM server",
    "drop": "broke",
    "error event": "gave up: out of blocks",
    "abort": "gave the request up",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_in_words_and_the_next_request_works(ready, fault):
    engine, stub, (item, *_), own = ready
    stub.fault = fault
    with pytest.raises(EngineError, match=FAULTS[fault]):
        written(engine, item)
    stub.fault = ""
    assert written(engine, item) == own[0]


@pytest.mark.parametrize("fault", ["500", "html", "not json"])
def test_a_fault_of_a_whole_answer_is_said_in_words(ready, fault):
    engine, stub, (item, *_), _ = ready
    stub.fault = fault
    with pytest.raises(EngineError, match=FAULTS[fault]):
        engine.answer(item, NEW, 0.0, 0)


@pytest.mark.parametrize(("fault", "first"), [("silent", 0), ("stuck", 1)])
def test_a_server_that_says_nothing_more_is_given_up(exported, answers, serve, fault, first):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder)
    engine = VllmEngine(model, stub.url, "clara", timeout=3)
    stub.fault, got = fault, []
    with pytest.raises(EngineError, match="said nothing for 3 seconds"):
        got.extend(engine.submit(answers(model)[0][0], NEW, 0.0, 0))
    stub.go_on.set()


def test_a_slow_server_is_waited_for(ready):
    engine, stub, (item, *_), own = ready
    stub.fault = "slow"
    assert written(engine, item) == own[0]


def test_a_prompt_that_is_too_long_is_refused_by_the_server_in_its_words(ready):
    engine, _, (item, *_), _ = ready
    with pytest.raises(EngineError, match="refuses the request: This model's maximum context length is 1024"):
        written(engine, item, new=1000)


def test_a_model_that_is_gone_is_said(ready):
    engine, stub, (item, *_), _ = ready
    stub.models["other"] = stub.models.pop("clara")
    with pytest.raises(EngineError, match="has no such model or address .*`clara` does not exist"):
        written(engine, item)


def test_a_server_without_prompt_embeddings_is_found_at_the_start(exported, serve):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder, prompt_embeds=False)
    with pytest.raises(EngineError, match="was started without --enable-prompt-embeds: start it again with it"):
        VllmEngine(model, stub.url, "clara", timeout=60)


def test_a_server_of_another_base_model_is_found_at_the_start(exported, serve, vectors):
    _, folder = exported("mistral")
    other = new_model(vectors / "decoders" / "sys")
    assert other.decoder.config.hidden_size != 32
    with pytest.raises(EngineError, match="does not match the model's hidden_size 32"):
        VllmEngine(other, serve(VllmStub.of_merged, folder).url, "clara", timeout=60)


def test_an_unknown_model_is_found_at_the_start_with_those_there_are(exported, serve):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_lora, folder)
    with pytest.raises(EngineError, match="no model 'clarra', only 'clara-base', 'clara'"):
        VllmEngine(model, stub.url, "clarra", timeout=60)


def test_a_server_that_is_not_healthy_is_found_at_the_start(exported, serve):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder)
    stub.fault = "unhealthy"
    with pytest.raises(EngineError, match="failed with status 503"):
        VllmEngine(model, stub.url, "clara", timeout=60)


def test_no_server_is_said_after_several_tries(exported, caplog):
    model, _ = exported("mistral")
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="cannot be reached .* is it running"):
        VllmEngine(model, "http://127.0.0.1:9", "clara")
    assert sum("trying again" in line for line in caplog.messages) == 3


def test_a_server_that_comes_back_is_reached_again_and_nothing_is_sent_twice(ready, serve, exported):
    engine, stub, (item, *_), own = ready
    stub.close()
    port = stub.server.server_address[1]
    again = []

    def restart() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.serving.vllm_stub.PORT", port)
            again.append(serve(VllmStub.of_merged, exported("mistral")[1]))

    timer = threading.Timer(0.1, restart)
    vllm.PAUSES = (0.05, *[0.5] * 60)
    timer.start()
    assert written(engine, item) == own[0]
    timer.join(60)
    assert len(again[0].requests) == 1


def test_closing_ends_the_tries_to_reach_a_server(ready, monkeypatch):
    engine, stub, (item, *_), _ = ready
    stub.close()
    monkeypatch.setattr(vllm, "PAUSES", (600.0,))
    pieces = engine.submit(item, NEW, 0.0, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, pieces)
        until(pieces._reading.locked)
        pieces.close()
        assert waiting.result(60) == []


def test_the_key_goes_along_and_nowhere_else(exported, answers, serve, monkeypatch, caplog):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder, key=SECRET)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(EngineError, match="does not accept the key: set VLLM_API_KEY") as refused:
            VllmEngine(model, stub.url, "clara", timeout=60)
        monkeypatch.setenv(vllm.KEY_VARIABLE, f"{SECRET}\n")
        engine = VllmEngine(model, stub.url, "clara", timeout=60)
        prepared, own = answers(model)
        assert written(engine, prepared[0]) == own[0]
    assert SECRET not in caplog.text and SECRET not in repr(vars(engine)) and SECRET not in str(refused.value)
    monkeypatch.setenv(vllm.KEY_VARIABLE, f"{SECRET}\n{SECRET}")
    with pytest.raises(ValueError, match="holds characters") as odd:
        VllmEngine(model, stub.url, "clara", timeout=60)
    assert SECRET not in str(odd.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://user:word@host:1", "http://a b:x", ""])
def test_an_address_that_is_none_is_refused(exported, url):
    with pytest.raises(ValueError, match="must be like http://127.0.0.1:8000") as refused:
        VllmEngine(exported("mistral")[0], url, "clara")
    assert "word" not in str(refused.value)


def test_the_address_may_end_in_v1(exported, serve):
    model, folder = exported("mistral")
    stub = serve(VllmStub.of_merged, folder)
    assert VllmEngine(model, f"{stub.url}/v1/", "clara", timeout=60).url == stub.url
