"""Decoding writes what `generate` of transformers writes, whatever shares a batch, a start or a cache (SPEC 4)."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from openrlhf.models import answering
from openrlhf.models.adapters import DECODER
from openrlhf.models.generation import RoomyLayer, gather, new_cache, read, repeat_cache, sampler, steps
from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import DOCS, QUESTIONS, new_model

NEW = 90  # more than a cache grows by at a time


@pytest.fixture(scope="module", params=["mistral", "llama_tied", "qwen2", "phi3"])
def model(request, base_dir) -> CLaRa:
    return new_model(base_dir(request.param))


@torch.no_grad()
def expected(model: CLaRa, embeds: torch.Tensor, mask: torch.Tensor, stop: list[int], new: int) -> list[list[int]]:
    options = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=model.tokens.pad_id, eos_token_id=stop)
    with model.router.route(DECODER):
        rows = model.decoder.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=options).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows]


@torch.no_grad()
def written(model: CLaRa, embeds: torch.Tensor, mask: torch.Tensor, stop: list[int], new: int) -> list[list[int]]:
    with model.router.route(DECODER):
        cache = new_cache(model.decoder.config)
        parts = (model.decoder, model.embed, model.base_logits)
        return gather(len(embeds), steps(*parts, embeds, mask, cache, stop, new))


def inputs(model: CLaRa, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids = [torch.randint(5, 60, (n,)).tolist() for n in lengths]
    ids_BT, mask_BT = model.tokens.pad_left(ids)
    with torch.no_grad():
        return model.embed(ids_BT), mask_BT


def test_tokens_are_those_of_generate(model):
    embeds, mask = inputs(model, [9, 4, 17])
    own = written(model, embeds, mask, [], NEW)
    assert own == expected(model, embeds, mask, [], NEW) and all(len(row) == NEW for row in own)


def test_rows_that_end_early_leave_and_change_no_other(model):
    embeds, mask = inputs(model, [9, 4, 17, 6, 3])
    whole = written(model, embeds, mask, [], 40)
    # Tokens that end some rows early, and others late or not at all.
    stop = [whole[0][2], whole[1][5], whole[2][11]]
    rows = written(model, embeds, mask, stop, 40)
    assert rows == expected(model, embeds, mask, stop, 40)
    assert rows == [row[: next((i for i, t in enumerate(row) if t in stop), 40)] for row in whole]
    assert len({len(row) for row in rows}) > 1
    sizes = []
    hook = model.decoder.get_output_embeddings().register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
    written(model, embeds, mask, stop, 40)
    hook.remove()
    assert sizes[0] == 5 and sizes == sorted(sizes, reverse=True)


def test_what_ended_is_no_longer_computed(mistral):
    model = new_model(mistral)
    embeds, mask = inputs(model, [9, 4, 17, 6])
    whole = written(model, embeds, mask, [], 12)
    sizes = []
    hook = model.decoder.get_output_embeddings().register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
    written(model, embeds, mask, sorted({row[0] for row in whole}), 12)
    hook.remove()
    assert sizes == [4], "all rows end at their first token"


@torch.no_grad()
def test_a_start_read_once_serves_every_row(model):
    embeds, mask = inputs(model, [6, 6, 6])
    start = embeds[:1, :4].expand(3, -1, -1)
    rest = torch.cat([embeds[:, 4:], embeds], 1)
    rest_mask = torch.ones(3, rest.shape[1], dtype=torch.long)
    rest_mask[1, :3] = 0  # padding after the start
    whole_mask = torch.cat([torch.ones(3, 4, dtype=torch.long), rest_mask], 1)
    with model.router.route(DECODER):
        once = new_cache(model.decoder.config)
        read(model.decoder, start[:1], torch.ones(1, 4, dtype=torch.long), once)
        results = [
            gather(
                3, steps(model.decoder, model.embed, model.base_logits, rest, whole_mask, repeat_cache(once, 3), [], 20)
            )
            for _ in range(2)
        ]
    assert results[0] == results[1], "the start must not be used up"
    for row, skip in ((0, 0), (1, 3), (2, 0)):
        whole = torch.cat([start[row : row + 1], rest[row : row + 1, skip:]], 1)
        alone = expected(model, whole, torch.ones(whole.shape[:2], dtype=torch.long), [], 20)
        assert results[0][row] == alone[0]


def test_answers_do_not_depend_on_what_shares_their_start(mistral):
    model = new_model(mistral)
    vectors, _ = model.compress_documents(DOCS)
    prompts = [model.answer_prompt(question, 2) for question in (*QUESTIONS, QUESTIONS[0] + " And why?")]
    docs = [vectors[i : i + 2] for i in range(4)]
    assert len(model._shared_start(prompts)) > 5 and model._shared_start(prompts[:1]) == []
    together = model.generate_from_prompts(prompts, docs, 24)
    alone = [model.generate_from_prompts([p], [d], 24)[0] for p, d in zip(prompts, docs, strict=True)]
    assert together == alone
    equal = model.generate_from_prompts([prompts[0], prompts[0]], [docs[0], docs[1]], 24)
    assert equal == [alone[0], model.generate_from_prompts([prompts[0]], [docs[1]], 24)[0]]


def test_a_roomy_layer_holds_what_a_growing_one_holds():
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicCache().layer_class_to_replicate()
    for step in [7, *[1] * 70]:
        keys, values = torch.randn(2, 3, 3, step, 5).unbind()
        for mine, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(mine, theirs)
        if plain.get_seq_length() == 40:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([2, 0]))
                layer.batch_repeat_interleave(2)
            roomy.batch_select_indices(torch.tensor([0, 1, 3]))
            plain.batch_select_indices(torch.tensor([0, 1, 3]))
    assert roomy.get_seq_length() == plain.get_seq_length() == 77


def test_drawn_tokens_follow_the_softmax_at_their_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0]).repeat(1, 1)
    choose = sampler(0.5, seed=3)
    drawn = torch.stack([choose(logits) for _ in range(4000)]).flatten()
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.5, -1), atol=0.03, rtol=0)
    assert shares[3] == 0


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    logits = torch.randn(5, 40)
    whole, alone = sampler(1.0, seed=7), [sampler(1.0, seed=7) for _ in range(5)]
    for _ in range(20):
        assert whole(logits).tolist() == [int(one(logits[i : i + 1])) for i, one in enumerate(alone)]
    assert sampler(0.0, seed=1)(logits).tolist() == logits.argmax(-1).tolist()
    with pytest.raises(ValueError, match="at least 0"):
        sampler(-0.1, seed=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_stream_is_the_text_that_generating_gives(model, temperature):
    documents, _ = model.compress_documents(DOCS[:2])
    prompts = [model.answer_prompt(question, 2) for question in QUESTIONS]
    options = {"temperature": temperature, "seed": 5}
    whole = model.generate_from_prompts(prompts, [documents] * len(prompts), 40, **options)
    streams = [model.stream_from_prompt(prompt, documents, 40, **options) for prompt in prompts]
    texts = [""] * len(streams)
    still = list(range(len(streams)))
    pieces = 0
    while still:  # in turn, so that each comes between two pieces of another
        for i in list(still):
            piece = next(streams[i], None)
            if piece is None:
                still.remove(i)
            else:
                assert piece
                texts[i] += piece
                pieces += 1
    assert texts == whole and (pieces > len(texts) or not any(whole))
    if temperature:
        again = model.generate_from_prompts(prompts, [documents] * len(prompts), 40, temperature=temperature, seed=6)
        assert again != whole


def test_a_streams_pieces_are_whole_characters(model, monkeypatch):
    text = "naïve 東京 and 😀 end"
    ids = model.tokens.plain_ids([text])[0]
    monkeypatch.setattr(answering, "steps", lambda *_: iter([[(0, token)] for token in ids]))
    pieces = list(model.stream_from_prompt(model.tokens.plain_prompt("Say it.", "Now."), None, 9))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
