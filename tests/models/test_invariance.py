"""Nothing depends on what else is in the batch, and inference leaves the model as it was (SPEC 1, 2, 4)."""

import pytest
import torch

from openrlhf.models.modeling_clara import INFERENCE_BATCH, CLaRa
from tests.tiny import ANSWERS, DOCS, QUESTIONS, make_batch, new_model

TEXTS = ["", "x", *DOCS, "  \n\t ", "violin " * 40]
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


def test_a_document_has_the_same_vectors_alone_in_any_batch_and_in_any_order(model):
    together, _ = model.compress_documents(TEXTS)
    backwards, _ = model.compress_documents(TEXTS[::-1])
    torch.testing.assert_close(backwards.flip(0), together, **CLOSE)
    for text, vectors in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(model.compress_documents([text])[0][0], vectors, **CLOSE)


def test_more_padding_does_not_change_a_document(model):
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows([DOCS[0]]))
    with torch.no_grad():
        plain, mse = model.compress(ids, mask)
        pad = torch.full((1, 50), model.tokens.pad_id)
        padded, padded_mse = model.compress(torch.cat([pad, ids], 1), torch.cat([pad * 0, mask], 1))
    torch.testing.assert_close(padded, plain, **CLOSE)
    torch.testing.assert_close(padded_mse, mse)


def test_what_stands_under_the_padding_does_not_matter(model):
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(DOCS[:2]))
    garbage = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    with torch.no_grad():
        assert torch.equal(model.compress(garbage, mask)[0], model.compress(ids, mask)[0])


def test_more_documents_than_one_batch_come_back_in_order(model):
    texts = [f"number {i} " + "and on " * (i % 5) for i in range(2 * INFERENCE_BATCH + 3)]
    vectors, mse = model.compress_documents(texts)
    singles = [model.compress_documents([text]) for text in texts]
    torch.testing.assert_close(vectors, torch.cat([v for v, _ in singles]), **CLOSE)
    torch.testing.assert_close(mse, torch.stack([m for _, m in singles]).mean(), rtol=1e-5, atol=0)


def test_equal_texts_are_compressed_once_and_count_as_often_as_they_come(model, monkeypatch):
    alone, mse = zip(*(model.compress_documents([text]) for text in DOCS[:2]), strict=True)
    passed, rows = [], model.compress_rows
    monkeypatch.setattr(model, "compress_rows", lambda given, *more: passed.append(len(given)) or rows(given, *more))
    vectors, over_all = model.compress_documents([DOCS[0], DOCS[1], DOCS[0], DOCS[0]])
    assert passed == [2]
    torch.testing.assert_close(vectors, torch.cat([alone[0], alone[1], alone[0], alone[0]]), **CLOSE)
    torch.testing.assert_close(over_all, (3 * mse[0] + mse[1]) / 4, rtol=1e-5, atol=0)


def test_compressing_twice_gives_the_same_bits_even_from_training_mode(model):
    model.train()
    first, second = model.compress_documents(TEXTS), model.compress_documents(TEXTS)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    model.eval()
    assert torch.equal(model.compress_documents(TEXTS)[0], first[0])


def test_compression_builds_no_autograd_graph(model):
    model.train_stage("stage1")
    vectors, mse = model.compress_documents(DOCS)
    queries = model.encode_queries(QUESTIONS)
    assert not any(t.requires_grad or t.grad_fn for t in (vectors, mse, queries))


def test_queries_have_the_shape_and_the_values_of_flattened_vectors(model):
    queries = model.encode_queries(QUESTIONS)
    assert queries.shape == (3, 4 * model.decoder.config.hidden_size)
    for question, query in zip(QUESTIONS, queries, strict=True):
        torch.testing.assert_close(model.encode_queries([question])[0], query, **CLOSE)
    documents = model.compress_documents(QUESTIONS)[0].flatten(1)
    assert float((documents - queries).abs().max()) > 0.1, "the two adapters must not be confused"


def test_nothing_to_compress_gives_empty_tensors(model):
    vectors, mse = model.compress_documents([])
    assert vectors.shape == (0, 4, model.decoder.config.hidden_size) and float(mse) == 0.0
    assert model.encode_queries([]).shape == (0, 4 * model.decoder.config.hidden_size)


LISTS = [DOCS[:3], DOCS[1:], DOCS[4:5]]


@pytest.mark.parametrize("method", ["generate_from_questions", "generate_from_text", "generate_from_paraphrase"])
def test_an_answer_does_not_depend_on_the_other_questions(model, method):
    generate = getattr(model, method)
    together = generate(QUESTIONS, LISTS)
    backwards = generate(QUESTIONS[::-1], LISTS[::-1])
    alone = [generate([question], [docs]) for question, docs in zip(QUESTIONS, LISTS, strict=True)]
    if method == "generate_from_questions":
        (together, topk), (backwards, flipped) = together, backwards
        assert topk.shape == (3, 2) and topk[2].tolist() == [0, -1]
        assert torch.equal(flipped.flip(0), topk)
        for row, (_, one) in zip(topk, alone, strict=True):
            assert row[row >= 0].tolist() == one[0].tolist()
        alone = [answers for answers, _ in alone]
    assert together == backwards[::-1] == [answers[0] for answers in alone]
    assert len(set(together)) > 1


def test_more_questions_than_one_batch_come_back_in_order(model):
    questions = [f"{QUESTIONS[i % 3]} {'really ' * (i % 7)}" for i in range(INFERENCE_BATCH + 5)]
    docs = [[DOCS[i % 6]] for i in range(len(questions))]
    together = model.generate_from_text(questions, docs, max_new_tokens=3)
    some = [0, 1, 20, len(questions) - 1]
    assert [together[i] for i in some] == [
        model.generate_from_text([questions[i]], [docs[i]], max_new_tokens=3)[0] for i in some
    ]


@pytest.mark.parametrize("training", [True, False])
def test_inference_restores_the_mode_and_leaves_the_config_alone(model, training):
    model.train(training)
    before = model.config.to_dict()
    vectors, _ = model.compress_documents(DOCS[:4])
    model.encode_queries(QUESTIONS)
    model.generate_from_questions(QUESTIONS, LISTS)
    model.generate_from_text(QUESTIONS, LISTS)
    model.generate_from_paraphrase(QUESTIONS, LISTS)
    model.generate_from_compressed_documents_and_questions(QUESTIONS[:2], vectors)
    assert all(module.training == training for module in model.modules())
    assert model.config.to_dict() == before and model.config.generation_top_k == 2
    assert model.router.active is None
    model.eval()


def test_the_mode_is_restored_after_an_error(model):
    model.train()
    with pytest.raises(ValueError):
        model.generate_from_text(QUESTIONS, [])
    assert model.training
    model.eval()


def test_stage2_rows_do_not_depend_on_each_other(model):
    """Loss terms, scores and choices of unequal candidate lists are those of each question alone."""
    model.train_stage("stage2")
    with torch.no_grad():
        batch = make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS)
        loss, out = model(batch=batch)
        total = 0.0
        for b, (docs, question, answer) in enumerate(zip(LISTS, QUESTIONS, ANSWERS, strict=True)):
            one = make_batch(model, "stage2", [docs], [question], [answer])
            single, alone = model(batch=one)
            total += float(single) * int((one["labels"] != -100).sum())
            index = out["topk_idx"][b]
            assert index[index >= 0].tolist() == alone["topk_idx"][0].tolist()
            torch.testing.assert_close(out["scores"][b, : len(docs)], alone["scores"][0], **CLOSE)
            width = alone["logits"].shape[1]
            torch.testing.assert_close(out["logits"][b, -width:], alone["logits"][0], rtol=0, atol=1e-4)
    assert float(loss) == pytest.approx(total / int((batch["labels"] != -100).sum()), rel=1e-5)


def test_prompts_that_share_the_documents_otherwise_than_the_lists_are_refused(model):
    """3 + 5 documents must never be regrouped as 4 + 4 in silence, although the total is right."""
    batch = make_batch(model, "stage1_2", [DOCS[:3], DOCS[:5]], QUESTIONS[:2], ANSWERS[:2])
    batch["docs_per_question"] = torch.tensor([4, 4])
    with pytest.raises(ValueError, match="memory tokens"):
        model(batch=batch)
