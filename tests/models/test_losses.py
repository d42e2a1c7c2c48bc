"""Losses and logits against slow, plain versions (SPEC 3)."""

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from openrlhf.models.adapters import set_dropout
from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model

LISTS = [DOCS[:2], DOCS[2:3], DOCS[3:6]]


@pytest.fixture
def model(mistral) -> CLaRa:
    return new_model(mistral)


def test_memory_mse_equals_a_plain_loop(model):
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(["", *DOCS]))
    with torch.no_grad():
        vectors, mse = model.compress(ids, mask)
        hidden = model.hidden("encoder_adapter", model.embed(ids), mask)
    total, count = 0.0, 0
    for b in range(len(ids)):
        text = [hidden[b, t] for t in range(ids.shape[1] - 4) if mask[b, t]]
        memory = [hidden[b, t] for t in range(ids.shape[1] - 4, ids.shape[1])]
        assert torch.equal(torch.stack(memory), vectors[b])
        for d in range(hidden.shape[2]):
            difference = sum(float(h[d]) for h in text) / len(text) - sum(float(h[d]) for h in memory) / 4
            total, count = total + difference**2, count + 1
    assert float(mse.mean()) == pytest.approx(total / count, rel=1e-5)


def test_loss_is_the_mean_over_answer_tokens_of_the_whole_batch(model):
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
    with torch.no_grad():
        loss, out = model(batch=batch)
    total, count = 0.0, 0
    for b, row in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(row):
            if label != -100:
                logits = out["logits"][b, t - 1].tolist()
                top = max(logits)
                total += top + math.log(sum(math.exp(x - top) for x in logits)) - logits[label]
                count += 1
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_is_cross_entropy_alone(model):
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
    with torch.no_grad():
        loss, out = model(batch=batch)
    logits, labels = out["logits"][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    assert float(out["mse_loss"]) > 0


def test_loss_without_logits_has_the_same_value_and_gradients(model):
    model.train_stage("stage1_2")
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
    loss, _ = model(batch=batch)
    loss.backward()
    full = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    short, out = model(batch=batch, compute_logits=False)
    short.backward()
    assert out["logits"] is None
    torch.testing.assert_close(short, loss)
    torch.testing.assert_close(gradients(model), full, rtol=1e-4, atol=1e-6)


def test_one_cut_answer_contributes_nothing(model):
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
    batch["labels"][1] = -100
    rest = make_batch(model, "stage1_2", [LISTS[0], LISTS[2]], QUESTIONS[::2], ANSWERS[::2])
    with torch.no_grad():
        assert float(model(batch=batch)[0]) == pytest.approx(float(model(batch=rest)[0]), rel=1e-5)


@pytest.mark.parametrize("compute_logits", [True, False])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_no_answer_left_gives_zero_and_zero_gradients_never_nan(model, stage, compute_logits):
    model.train_stage(stage)
    batch = make_batch(model, stage, LISTS, QUESTIONS, ANSWERS)
    batch["labels"][:] = -100
    loss, _ = model(batch=batch, compute_logits=compute_logits)
    loss.backward()
    assert float(loss) == 0.0
    assert all(bool((grad == 0).all()) for grad in gradients(model).values())


def test_retrieval_loss_is_the_negative_log_of_the_positives_probability(model):
    positives = [[1], [0, 2], []]
    batch = make_batch(
        model, "stage2_pretrain_retrieval", [DOCS[:2], DOCS[:5], DOCS[:1]], QUESTIONS, ANSWERS, positives
    )
    with torch.no_grad():
        loss, out = model(batch=batch)
    total = 0.0
    for scores, wanted, n in zip(out["scores"].tolist(), positives, (2, 5, 1), strict=True):
        weights = [math.exp(s / 0.02) for s in scores[:n]]
        total -= math.log(sum(weights[i] for i in wanted) / sum(weights)) if wanted else 0.0
    assert float(loss) == pytest.approx(total / 2, rel=1e-4)
    assert out["logits"] is None and out["topk_idx"].shape == (3, 2)


def test_retrieval_without_any_positive_gives_zero_not_nan(model):
    model.train_stage("stage2_pretrain_retrieval")
    batch = make_batch(model, "stage2_pretrain_retrieval", LISTS, QUESTIONS, ANSWERS, [[], [], []])
    loss, _ = model(batch=batch)
    loss.backward()
    assert float(loss) == 0.0 and all(bool((grad == 0).all()) for grad in gradients(model).values())


@pytest.mark.parametrize("index", [1, 7, -1])
def test_a_positive_outside_its_own_candidates_is_refused(model, index):
    """Index 1 exists in the batch's widest list, but not in the second question's own."""
    batch = make_batch(model, "stage2_pretrain_retrieval", LISTS, QUESTIONS, ANSWERS, [[0], [index], [0]])
    with pytest.raises(ValueError, match="pos_index"):
        model(batch=batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "stage3"}, "stage3"),
        ({"docs_per_question": torch.tensor([2, 1])}, "docs_per_question"),
        ({"docs_per_question": torch.tensor([3, 0, 3])}, "must be ≥ 1"),
        ({"docs_per_question": torch.tensor([2, 2, 3])}, "add up to 6"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused_in_words(model, change, message):
    batch = {**make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS), **change}
    with pytest.raises(ValueError, match=message):
        model(batch=batch)


def test_documents_are_shared_equally_when_no_counts_are_given(model):
    batch = make_batch(model, "stage1_2", [DOCS[:2], DOCS[2:4], DOCS[4:6]], QUESTIONS, ANSWERS)
    with torch.no_grad():
        expected, _ = model(batch=batch)
        del batch["docs_per_question"]
        assert torch.equal(model(batch=batch)[0], expected)
        batch["enc_input_ids"], batch["enc_attention_mask"] = (
            batch[f"enc_{key}"][:5] for key in ("input_ids", "attention_mask")
        )
        with pytest.raises(ValueError, match="5 documents for 3 questions"):
            model(batch=batch)


def test_stage2_without_a_query_reasoner_is_refused(mistral):
    model = new_model(mistral, query=False)
    with pytest.raises(ValueError, match="no query_reasoner_adapter"):
        model(batch=make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS))


@pytest.mark.parametrize("name", ["mistral", "llama_tied", "qwen2", "phi3"])
def test_logits_equal_those_of_a_base_model_with_resized_matrices(base_dir, name):
    """Our added rows beside the frozen matrices compute what `resize_token_embeddings` would."""
    model = new_model(base_dir(name), query=False)
    decoder, first, tokens = copy.deepcopy(model.decoder), model.tokens.first_special_id, model.tokens
    inputs, heads = (rows.detach() for rows in model.special())
    rows = max(decoder.config.vocab_size, first + tokens.n_special)
    decoder.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        decoder.get_input_embeddings().weight[first : first + tokens.n_special] = inputs
        decoder.get_output_embeddings().weight[first : first + tokens.n_special] = heads
        ids, mask = tokens.encoder_batch(tokens.encoder_rows(DOCS))
        for layer in decoder.modules():
            if hasattr(layer, "_active_adapter"):
                layer._active_adapter = ["decoder_adapter"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = decoder(ids, attention_mask=mask, position_ids=positions).logits
        logits = model.head(model.hidden("decoder_adapter", model.embed(ids), mask))
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_logits_of_base_models_that_scale_or_cap_them(mistral, tmp_path, kind, options):
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    decoder = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(mistral)
    model = CLaRa(CLaRaConfig(doc_max_length=16, compr_rate=4, lora_r=4), decoder, tokenizer)
    ids, mask = model.tokens.pad_left([model.tokens.plain_ids([DOCS[0]])[0]])
    with torch.no_grad():
        embeds = model.embed(ids)
        logits = model.head(model.hidden("decoder_adapter", embeds, mask))
        expected = decoder(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(logits[..., :400], expected, rtol=1e-5, atol=1e-5)


def test_dropout_never_touches_frozen_documents(model):
    """In stage 2 the documents are the stored ones: training mode changes neither scores' documents nor their MSE."""
    model.train_stage("stage2")
    batch = make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS)
    set_dropout(model.decoder, 0.5)
    mse = {float(model.train()(batch=batch)[1]["mse_loss"]) for _ in range(3)}
    assert mse == {float(model.eval()(batch=batch)[1]["mse_loss"])}


def test_stored_vectors_stay_valid_through_stage2(model):
    """Documents compressed before and after stage-2 steps are bit-identical (SPEC 3)."""
    before, _ = model.compress_documents(DOCS)
    model.train_stage("stage2")
    batch = make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    queries = model.encode_queries(QUESTIONS)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(batch=batch)[0].backward()
        optimizer.step()
    assert torch.equal(model.compress_documents(DOCS)[0], before)
    assert not torch.equal(model.encode_queries(QUESTIONS), queries)
