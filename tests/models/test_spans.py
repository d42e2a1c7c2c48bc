"""Spans against plain versions: which tokens a memory vector stands for, how well it names them, and its place."""

import math

import pytest
import torch

from openrlhf.models.adapters import ENCODER
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.spans import span_loss, spans, spread_positions
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model

LISTS = [[doc] for doc in DOCS[:3]]


@pytest.fixture
def model(mistral) -> CLaRa:
    return new_model(mistral)


def words(model: CLaRa, text: str) -> list[int]:
    """The tokens of a document that its spans can hold: all that the compressor reads but the added ones."""
    (row,) = model.tokens.encoder_rows([text])
    kept = [token for token in row if token < model.tokens.first_special_id]
    return kept[-model.config.doc_max_length :]


def loss_of(model: CLaRa, text: str, vectors_LD: torch.Tensor, decay: float = 1.0) -> float:
    """Token by token, counted from the end: the last R under the last vector, those before it under the one before."""
    tokens, rate = words(model, text), model.config.compr_rate
    total = 0.0
    for end in range(len(tokens), 0, -rate):
        span = tokens[max(0, end - rate) : end]
        logits = model.head(vectors_LD[-1 - (len(tokens) - end) // rate], added=False).tolist()
        top = max(logits)
        normaliser = top + math.log(sum(math.exp(x - top) for x in logits))
        weights = [decay**i for i in range(len(span))]
        for weight, token in zip(weights, span, strict=True):
            total += weight / sum(weights) * len(span) * (normaliser - logits[token])
    return total / len(tokens)


def test_each_vector_stands_for_the_same_place_before_the_end_in_every_document(model):
    texts = ["", *DOCS, " ".join(DOCS)]
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(texts))
    n_memory, rate = model.config.n_memory_tokens, model.config.compr_rate
    ids_MLR, words_MLR = spans(ids, mask, n_memory, rate, model.tokens.first_special_id)
    assert ids_MLR.shape == words_MLR.shape == (len(texts), n_memory, rate)
    for text, row, there in zip(texts, ids_MLR.flatten(1), words_MLR.flatten(1), strict=True):
        tokens = words(model, text)
        assert row[-len(tokens) :].tolist() == tokens and not row[: -len(tokens)].any()
        assert there.tolist() == [False] * (n_memory * rate - len(tokens)) + [True] * len(tokens)
    assert words_MLR.flatten(1).sum(1).max() == model.config.doc_max_length, "the longest text must be one that is cut"


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_span_loss_is_that_of_a_plain_loop_over_documents_and_tokens(model, decay):
    batch = make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS)
    with torch.no_grad():
        _, out = model(batch=batch, compute_span_loss=True, span_decay=decay)
        vectors, _ = model.compress(batch["enc_input_ids"], batch["enc_attention_mask"])
        known = [loss_of(model, docs[0], vectors[i], decay) for i, docs in enumerate(LISTS)]
    assert float(out["span_loss"]) == pytest.approx(sum(known) / len(known), rel=1e-5)


def test_with_a_decay_the_best_vector_names_its_tokens_in_their_order():
    ids_MLR, words_MLR = torch.tensor([[[5, 9, 2, 7]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    vector = torch.zeros(1, 1, 12, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss = span_loss(vector, ids_MLR, words_MLR, lambda x_UD: x_UD, 0.5).sum()
        loss.backward()
        optimizer.step()
    weights = torch.tensor([8, 4, 2, 1]) / 15
    assert vector[0, 0].topk(4).indices.tolist() == [5, 9, 2, 7]
    assert float(loss) == pytest.approx(float(-(weights * weights.log()).sum()), abs=0.01)


def test_a_decay_is_finite_where_a_long_span_holds_but_its_last_token():
    ids_MLR, words_MLR = torch.full((1, 1, 256), 3), torch.zeros(1, 1, 256, dtype=torch.bool)
    words_MLR[..., -1] = True
    loss = span_loss(torch.zeros(1, 1, 8), ids_MLR, words_MLR, lambda x_UD: x_UD, 0.5)
    assert loss.tolist() == pytest.approx([math.log(8)])


def test_the_span_loss_reaches_the_compressor_and_the_memory_embeddings_alone(model):
    model.train_stage("stage1")
    _, out = model(batch=make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS), compute_span_loss=True)
    out["span_loss"].backward()
    moved = {name for name, grad in gradients(model).items() if bool(grad.any())}
    assert moved and all("encoder_adapter" in name or name == "special.memory" for name in moved)
    assert "special.memory" in moved


def test_nothing_is_computed_unless_asked_for(model):
    with torch.no_grad():
        _, out = model(batch=make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS))
    assert out["span_loss"] is None


@pytest.fixture
def spread(mistral) -> CLaRa:
    return new_model(mistral, spread_memory=True)


def plain_positions(model: CLaRa, n_text: int) -> list[int]:
    """Of a compressor input: the text's as they are, a memory token's that of the last token of its span."""
    n_memory, rate = model.config.n_memory_tokens, model.config.compr_rate
    positions = list(range(n_text))
    for j in range(n_memory):
        later_spans = n_memory - 1 - j
        last = n_text - 1 - later_spans * rate
        positions.append(last if last > 0 else 0)
    return positions


def test_a_spread_memory_token_has_the_position_of_the_last_token_of_its_span(spread):
    ids, mask = spread.tokens.encoder_batch(spread.tokens.encoder_rows(["", *DOCS, " ".join(DOCS)]))
    n_memory, rate = spread.config.n_memory_tokens, spread.config.compr_rate
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    found = spread_positions(position, n_memory, rate)
    ids_MLR, words_MLR = spans(ids, mask, n_memory, rate, spread.tokens.first_special_id)
    assert words_MLR.any(-1).all(-1).any(), "one document must fill all its vectors"
    for row, own, kept, span, there in zip(ids, found, mask.bool(), ids_MLR, words_MLR, strict=True):
        at = {int(p): int(token) for p, token in zip(own[:-n_memory], row, strict=False) if p > 0}
        for position_of_memory, tokens, is_word in zip(own[-n_memory:], span, there, strict=True):
            if is_word.all():
                assert at[int(position_of_memory)] == int(tokens[-1])
        assert own[kept].tolist() == plain_positions(spread, int(kept.sum()) - n_memory)


def test_spread_vectors_are_those_of_the_decoder_at_these_positions(spread):
    vectors, _ = spread.compress_documents(DOCS)  # of unequal lengths, so padded
    for row, found in zip(spread.tokens.encoder_rows(DOCS), vectors, strict=True):
        ids = torch.tensor([[*row, *spread.tokens.memory_ids]])
        positions = torch.tensor([plain_positions(spread, len(row))])
        given = {"inputs_embeds": spread.embed(ids), "attention_mask": torch.ones_like(ids), "position_ids": positions}
        with torch.no_grad(), spread.router.route(ENCODER):
            hidden = spread.decoder.base_model(**given, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, hidden[0, -len(found) :], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_spread_memory_and_the_published_one_has_none(mistral, spread, tmp_path):
    plain = new_model(mistral)
    assert not plain.config.spread_memory
    vectors, queries = spread.compress_documents(DOCS)[0], spread.encode_queries(QUESTIONS)
    assert not torch.allclose(vectors, plain.compress_documents(DOCS)[0], atol=1e-2)
    spread.save_pretrained(tmp_path / "checkpoint")
    again = CLaRa.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again.compress_documents(DOCS)[0], vectors)
    assert torch.equal(again.encode_queries(QUESTIONS), queries)


@pytest.fixture
def even(mistral) -> CLaRa:
    return new_model(mistral, spread_memory=True, even_spans=True)


def plain_even_spans(n: int, n_memory: int, rate: int) -> list[list[int]]:
    """Dealt out one after the other: token i of the last L · R goes to the first vector that is not past its share."""
    first = max(0, n - n_memory * rate)
    dealt: list[list[int]] = [[] for _ in range(n_memory)]
    for i in range(n - first):
        j = next(j for j in range(n_memory) if i < (n - first) * (j + 1) // n_memory)
        dealt[j].append(first + i)
    return dealt


def test_even_spans_share_a_document_among_all_its_vectors(even):
    texts = ["", *DOCS, " ".join(DOCS)]
    ids, mask = even.tokens.encoder_batch(even.tokens.encoder_rows(texts))
    n_memory, rate, n_words = even.config.n_memory_tokens, even.config.compr_rate, even.tokens.first_special_id
    ids_MLR, words_MLR = spans(ids, mask, n_memory, rate, n_words, even=True)
    position = spread_positions((mask.cumsum(-1) - 1).clamp(min=0), n_memory, rate, even=True)
    lengths = set()
    for row, kept, span, there, own in zip(ids, mask.bool(), ids_MLR, words_MLR, position, strict=True):
        text = row[kept][:-n_memory].tolist()
        dealt = plain_even_spans(len(text), n_memory, rate)
        lengths.update(map(len, dealt))
        for j, places in enumerate(dealt):
            assert span[j][there[j]].tolist() == [text[i] for i in places if text[i] < n_words]
            assert not span[j][~there[j]].any()
            if places:
                assert int(own[-n_memory + j]) == places[-1]
        ends = own[-n_memory:].tolist()
        assert ends == sorted(ends) and ends[-1] == len(text) - 1
    assert min(lengths) < rate == max(lengths), "one document must be short, and one fill all its vectors"


def test_a_full_document_has_the_same_vectors_with_even_spans(spread, even):
    even.load_state_dict(spread.state_dict())
    full, short = " ".join(DOCS), DOCS[0]
    torch.testing.assert_close(even.compress_documents([full])[0], spread.compress_documents([full])[0])
    assert not torch.allclose(even.compress_documents([short])[0], spread.compress_documents([short])[0], atol=1e-2)
    assert fingerprint(even) != fingerprint(spread), "their vectors do not go into one store"


def test_even_spans_may_be_turned_on_over_a_checkpoint_which_keeps_them(spread, tmp_path):
    spread.save_pretrained(tmp_path / "checkpoint")
    turned = CLaRa.from_pretrained(tmp_path / "checkpoint", even_spans=True)
    vectors = turned.compress_documents(DOCS)[0]
    turned.save_pretrained(tmp_path / "turned")
    again = CLaRa.from_pretrained(tmp_path / "turned")
    assert again.config.even_spans and torch.equal(again.compress_documents(DOCS)[0], vectors)
