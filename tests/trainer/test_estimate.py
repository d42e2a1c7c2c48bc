"""estimate and skeleton: what is predicted is what the real model does, on tiny models."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from openrlhf.trainer import devices, estimate
from openrlhf.trainer.estimate import COUNTED, activations, counted, largest_micro_batch, memory, report, seconds
from openrlhf.trainer.skeleton import Ledger, Plan, Skeleton, count, letting_go, timed
from tests import tiny

HIDDEN, INNER, HEADS, KEYS, VOCABULARY, RANK = 32, 48, 4, 2, 500, 4


def base(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )


def plan(stage: str = "stage1", layers: int = 1, **changes) -> Plan:
    settings = {
        "doc_max_length": 32,
        "compress_rate": 8,
        "doc_tokens": 21,
        "prompt_tokens": 20,
        "answer_tokens": 10,
        "question_tokens": 9,
        "lora_r": RANK,
        "train_batch_size": 8,
        "micro_train_batch_size": 2,
        **({"candidates": 6, "generation_top_k": 2} if stage.startswith("stage2") else {}),
    }
    return Plan(base(layers), stage, **{**settings, **changes})


def test_the_flops_of_a_document_are_those_counted_by_hand():
    layers, tokens, head = 2, 21 + 3 + 4, HIDDEN // HEADS
    narrow = head * KEYS
    shapes = [(HIDDEN, HIDDEN), (HIDDEN, narrow), (HIDDEN, narrow), (HIDDEN, HIDDEN), *[(HIDDEN, INNER)] * 3]
    linear = sum(2 * tokens * (a * b + RANK * (a + b)) for a, b in shapes)
    attention = 2 * 2 * HEADS * tokens * tokens * head
    assert count(plan(), layers, "cpu")["flops/document"] == layers * (linear + attention)


def test_the_parameters_are_those_of_the_model(mistral):
    model = tiny.new_model(mistral, query=False)
    model.train_stage("stage1")
    same = Plan(model.decoder.config, doc_max_length=16, compress_rate=4, lora_r=4)
    found = counted(same, "cpu")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def real_peak(model, batch: dict, span_loss: bool = False) -> int:
    """The peak of live bytes of a real forward and backward pass."""
    model.train()
    ledger = Ledger([*model.parameters(), *model.buffers(), *(v for v in batch.values() if torch.is_tensor(v))])
    with letting_go(list(model.parameters())), ledger:
        ledger.mark("all")
        loss, out = model(batch=batch, compute_logits=False, compute_span_loss=span_loss)
        (loss + out["span_loss"] if span_loss else loss).backward()
    return ledger.peaks["all"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["stage1", "stage1, span loss", "stage1_2", "stage1_2, frozen", "stage2", "text_rag"])
def test_the_activations_are_those_of_a_real_pass(mistral, stage, checkpointing):
    stage, _, more = stage.partition(", ")
    span_loss, frozen = more == "span loss", more == "frozen"
    n_docs, k = {"stage1": (1, 1), "stage1_2": (2, 2), "stage2": (3, 2), "text_rag": (2, 2)}[stage]
    text = stage == "text_rag"
    model = (tiny.text_rag_model if text else tiny.new_model)(mistral, generation_top_k=k)
    documents = [[tiny.DOCS[0]] * n_docs] * 4
    batch = tiny.make_batch(model, stage, documents, [tiny.QUESTIONS[0]] * 4, [" ".join(tiny.DOCS[:3])] * 4)
    for name in {"enc_attention_mask", "dec_attention_mask"} & set(batch):
        batch[name][0, 0] = 0
    if stage == "stage2":
        batch["query_attention_mask"][0, 0] = 0
    model.train_stage(stage, freeze_compressor=frozen)
    if checkpointing:
        model.checkpoint_layers()
    answers = int((batch["labels"][0, 1:] != -100).sum())
    same = Plan(
        model.decoder.config,
        stage,
        doc_max_length=16,
        compress_rate=4,
        generation_top_k=k,
        candidates=n_docs,
        doc_tokens=9 if text else batch["enc_input_ids"].shape[1] - 3 - 4,
        prompt_tokens=batch["dec_input_ids"].shape[1] - k * (9 if text else 5) - answers,
        answer_tokens=answers,
        question_tokens=batch["query_input_ids"].shape[1] - 3 - 4 if stage == "stage2" else 0,
        lora_r=4,
        micro_train_batch_size=4,
        zero_stage=3,  # compresses all documents at once, as `forward` does without a cache
        gradient_checkpointing=checkpointing,
        span_loss_weight=1.0 if span_loss else 0.0,
        freeze_compressor=frozen,
    )
    found = counted(same, "cpu")
    assert activations(found) == pytest.approx(real_peak(model, batch, span_loss), rel=0.05)


def test_a_straight_line_over_layers_is_what_all_layers_give():
    deep = plan("stage2", layers=4, gradient_checkpointing=True)
    line, all_layers = counted(deep, "cuda"), count(deep, 4, "cuda")
    assert COUNTED[1] < 4
    for key in ("parameters", "trained", "flops/step", "flops/document"):
        assert line[key] == all_layers[key]
    assert activations(line) == pytest.approx(activations(all_layers), rel=0.01)


def test_text_rag_counts_one_generator_pass_over_all_documents_and_no_compressor(mistral):
    text = {"candidates": 3, "generation_top_k": 3}
    short, long = (count(plan("text_rag", **{**text, "doc_tokens": n}), 1, "cpu") for n in (10, 40))
    model = tiny.text_rag_model(mistral)
    model.train_stage("text_rag")
    assert plan("text_rag", **text).width == plan("text_rag", **text).tokens == 20 + 3 * 21 + 10
    assert short["flops/document"] == long["flops/document"] == 0
    assert not [key for key in short if "compressor" in key] and short["flops/step"] < long["flops/step"]
    found = counted(Plan(model.decoder.config, "text_rag", doc_max_length=16, compress_rate=4, lora_r=4), "cpu")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_checkpointing_trades_memory_for_one_more_forward_pass():
    usual, again = (count(plan(gradient_checkpointing=on), 3, "cpu") for on in (False, True))
    assert activations(again) < 0.7 * activations(usual)
    assert 1.15 < again["flops/step"] / usual["flops/step"] < 1.4


def test_fake_tensors_and_real_ones_count_the_same():
    found, model = count(plan("stage2"), 1, "cpu"), Skeleton(plan("stage2"), 1, "cpu")
    ledger = Ledger(model.parameters())
    docs = torch.randn(12, 4, HIDDEN)
    with letting_go(model.parameters()), ledger:
        model.loss(docs).backward()
    assert ledger.flops == found["flops/step"]


def test_zero_shares_the_optimizer_and_stage_3_the_weights():
    found = counted(plan(), "cpu")
    alone, shared = (memory(plan(processes=n), found, "cpu", 0) for n in (1, 4))
    assert shared["optimizer"] == alone["optimizer"] / 4 == 3 * found["trained"]
    assert shared["weights"] == alone["weights"] == 4 * found["parameters"]
    assert memory(plan(processes=4, zero_stage=3), found, "cpu", 0)["weights"] == found["parameters"]
    assert memory(plan(bf16=True), found, "cpu", 0)["weights"] == 2 * found["parameters"]
    assert sum(alone.values()) == pytest.approx(2 * alone["sum"])


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    asked = plan(micro_train_batch_size=3)
    found = counted(asked, "cuda")
    limit = memory(asked, found, "cuda", 0)["sum"] + 3e6
    largest = largest_micro_batch(asked, found, "cuda", 0, limit)
    sums = []
    for rows in (largest, largest + 1):
        other = dataclasses.replace(asked, micro_train_batch_size=rows)
        sums.append(memory(other, counted(other, "cuda"), "cuda", 0)["sum"])
    assert largest > 3 and sums[0] <= limit < sums[1]
    assert largest_micro_batch(asked, found, "cuda", 0, 1e6) == 0


def test_stage2_on_a_cpu_compresses_one_document_at_a_time_and_all_on_cuda():
    one, together = (counted(plan("stage2"), device)["peak/documents"] for device in ("cpu", "cuda"))
    assert together > 5 * one


def test_a_device_that_is_here_is_timed(monkeypatch):
    monkeypatch.setattr(estimate, "timed_afresh", lambda plan, layers: timed(plan, layers, "cpu"))
    found = seconds(plan(), counted(plan(), "cpu"), devices.this_cpu())
    assert 0 < found.document < found.step < 1 and "measured here" in found.how


def test_more_questions_than_can_be_timed_are_timed_with_fewer(monkeypatch):
    asked = plan(micro_train_batch_size=6)
    monkeypatch.setattr(estimate, "TIMED", (1, 1))
    monkeypatch.setattr(estimate, "TIMED_FLOPS", count(asked, 1, "cpu")["flops/step"] * 0.34)
    rows: list[int] = []

    def fake(part: Plan, layers: int) -> dict[str, float]:
        rows.append(part.micro_train_batch_size)
        return {"seconds/step": 1.0 * rows[-1], "seconds/document": 0.1, "resident": 5.0 * rows[-1]}

    monkeypatch.setattr(estimate, "timed_afresh", fake)
    found = seconds(asked, counted(asked, "cpu"), devices.this_cpu())
    assert rows == [2] and (found.step, found.resident) == (6, 30) and "with 2 of 6 questions" in found.how


def test_stage2_says_what_new_documents_cost():
    said = report(plan("stage2"), devices.DEVICES["h100"], 0, records=16, epochs=3)
    new, known = said["seconds_per_step_new_documents"], said["seconds_per_step"]
    assert new - known == pytest.approx(said["micro_batch"]["documents"] * 4 / said["documents_per_s"])
    assert said["hours"] * 3600 == pytest.approx(2 * new + 4 * known)
    assert "not measured" in said["how"] and 0 < said["mfu"] < 1
    without_cache = report(plan("stage2", zero_stage=3), devices.DEVICES["h100"], 0)
    assert without_cache["seconds_per_step"] == without_cache["seconds_per_step_new_documents"]


def test_a_card_is_known_by_its_name_and_memory(monkeypatch):
    def card(name: str, gigabytes: float):
        found = type("Properties", (), {"name": name, "total_memory": gigabytes * 1e9})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        return devices.find_device("here")

    assert card("NVIDIA H200", 150).name == "h200"
    assert card("NVIDIA H100 PCIe", 85).name == "h100-pcie"
    assert card("NVIDIA H100 80GB HBM3", 85).name == "h100"
    assert card("NVIDIA A100-SXM4-40GB", 42).name == "a100-40"
    assert devices.find_device("a100-40").here and not devices.find_device("h100").here
    unknown = card("Some Other Card", 10)
    assert unknown.here and unknown.bf16_flops == 0 and unknown.memory == 10e9
