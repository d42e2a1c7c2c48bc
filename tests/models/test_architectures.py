"""Llama, Mistral, Qwen2, Phi3 and SmolLM2-like bases, each with another kind of chat template, from start to end."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from openrlhf.models.modeling_clara import STAGE_TRAINS, CLaRa
from tests.tiny import ANSWERS, BASES, DOCS, QUESTIONS, gradients, make_batch, new_model, text_rag_model

LISTS = [DOCS[:2], DOCS[2:5], DOCS[5:]]


@pytest.fixture(scope="module", params=BASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name, base_dir) -> CLaRa:
    return new_model(base_dir(name))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(target)
    return target


def test_special_rows_fit_the_base_model(name, model):
    config = model.decoder.config
    assert (model.special.head is None) == config.tie_word_embeddings
    assert (model.tokens.first_special_id < config.vocab_size) == (name == "qwen2"), "only this one is padded"
    assert (model.tokens.tokenizer.bos_token_id is None) == (name == "qwen2")


def test_adapters_cover_all_linear_layers_and_not_the_head(name, model):
    adapted = {key.split(".lora_A")[0].rsplit(".", 1)[1] for key, _ in model.named_parameters() if "lora_A" in key}
    attention = {"qkv_proj"} if name == "phi3" else {"q_proj", "k_proj", "v_proj"}
    feed_forward = {"gate_up_proj"} if name == "phi3" else {"gate_proj", "up_proj"}
    assert adapted == {*attention, *feed_forward, "o_proj", "down_proj"}


@pytest.mark.parametrize("stage", STAGE_TRAINS)
def test_each_stage_gives_finite_gradients_on_exactly_its_adapters(name, base_dir, model, stage):
    model = text_rag_model(base_dir(name)) if stage == "text_rag" else model
    model.train_stage(stage)
    model.train()
    model.zero_grad()
    loss, out = model(batch=make_batch(model, stage, LISTS, QUESTIONS, ANSWERS))
    (loss + 0.1 * out["mse_loss"]).backward()
    grads = gradients(model)
    model.zero_grad()
    model.eval()
    adapters, memory = STAGE_TRAINS[stage]
    wanted = {
        key
        for key, _ in model.named_parameters()
        if any(f".{adapter}." in key for adapter in adapters) or (memory and key == "special.memory")
    }
    assert set(grads) == wanted and ("special.memory" in grads) == memory
    assert all(bool(torch.isfinite(grad).all()) and bool(grad.any()) for grad in grads.values())


def test_a_saved_model_gives_bit_identical_outputs(model, checkpoint):
    again = CLaRa.from_pretrained(checkpoint)
    assert torch.equal(again.compress_documents(DOCS)[0], model.compress_documents(DOCS)[0])
    assert torch.equal(again.encode_queries(QUESTIONS), model.encode_queries(QUESTIONS))
    answers, topk = model.generate_from_questions(QUESTIONS, LISTS)
    same, indices = again.generate_from_questions(QUESTIONS, LISTS)
    assert same == answers and torch.equal(indices, topk)
    assert again.generate_from_paraphrase(QUESTIONS, LISTS) == model.generate_from_paraphrase(QUESTIONS, LISTS)
    with torch.no_grad():
        batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
        assert all(
            torch.equal(a, b)
            for a, b in zip(again(batch=batch)[1]["logits"], model(batch=batch)[1]["logits"], strict=True)
        )


@pytest.mark.parametrize("adapter", ["encoder_adapter", "decoder_adapter", "query_reasoner_adapter"])
def test_each_saved_adapter_loads_in_peft_on_its_own(name, model, checkpoint, base_dir, adapter):
    decoder = AutoModelForCausalLM.from_pretrained(base_dir(name), dtype=torch.float32)
    peft = PeftModel.from_pretrained(decoder, checkpoint / adapter).eval()
    ids, mask = model.tokens.encoder_batch(model.tokens.encoder_rows(DOCS))
    with torch.no_grad():
        embeds = model.embed(ids)
        ours = model.hidden(adapter, embeds, mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = peft.base_model.model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    assert torch.equal(theirs.last_hidden_state, ours)
    config = json.loads((checkpoint / adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["task_type"]) == (4, 8, 0.1, "CAUSAL_LM")


def test_labels_of_a_batch_are_the_answers_and_their_ends(name, model):
    batch = make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS)
    end = model.tokens.tokenizer.convert_tokens_to_ids(BASES[name].end_of_turn)
    for row, ids, answer in zip(batch["labels"], batch["dec_input_ids"], ANSWERS, strict=True):
        kept = row != -100
        assert torch.equal(row[kept], ids[kept])
        assert model.tokens.tokenizer.decode(row[kept][:-1]).strip() == answer and int(row[-1]) == end


def test_checkpointed_layers_give_the_same_gradients(model):
    model.train_stage("stage1")
    model.train()
    batch = make_batch(model, "stage1", [[doc] for doc in DOCS[:3]], QUESTIONS, ANSWERS)
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        loss, out = model(batch=batch)
        (loss + 0.1 * out["mse_loss"]).backward()
        found.append({key: grad.clone() for key, grad in gradients(model).items()})
        model.checkpoint_layers()
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(torch.equal(found[1][key], grad) for key, grad in found[0].items())


def test_loading_in_bfloat16_works_and_keeps_the_type(model, checkpoint):
    again = CLaRa.from_pretrained(checkpoint, dtype=torch.bfloat16)
    vectors, _ = again.compress_documents(DOCS)
    assert vectors.dtype == torch.bfloat16 and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again.train_stage("stage1_2")
    loss, _ = again(batch=make_batch(again, "stage1_2", LISTS, QUESTIONS, ANSWERS))
    loss.backward()
    with torch.no_grad():
        full = model(batch=make_batch(model, "stage1_2", LISTS, QUESTIONS, ANSWERS))[0]
    assert float(loss.detach()) == pytest.approx(float(full), rel=0.1)
    assert len(again.generate_from_text(QUESTIONS, LISTS)) == 3
