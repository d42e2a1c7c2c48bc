"""The published method's numbers (tests/data/vectors/README.md), within the tolerances given there."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from openrlhf.models.adapters import set_dropout
from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.selection import cosine_scores, differentiable_topk, pad_candidates
from openrlhf.models.tokens import ClaraTokens
from tests.tiny import gradients

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
TRAIN = json.loads((VECTORS / "train.json").read_text())
ENCODER_INPUTS = json.loads((VECTORS / "encoder_inputs.json").read_text())
TRAJECTORY = json.loads((VECTORS / "trajectory.json").read_text())["runs"]
TOPK = json.loads((VECTORS / "topk.json").read_text())["cases"]
CASES = [name for name, case in TRAIN.items() if not math.isnan(case["loss"])]
GRADIENTS = [(name, kind) for name in CASES for kind in TRAIN[name]["grad"]]
L = 4


@pytest.fixture(scope="module")
def tensors():
    return {name: load_file(VECTORS / f"{name}.safetensors") for name in ("train", "grads", "encoder_inputs", "topk")}


def load(case: dict, trainable: bool = True) -> CLaRa:
    """The case's checkpoint over the case's decoder, in the training mode of its stage, without dropout."""
    model = CLaRa.from_pretrained(
        VECTORS / "checkpoints" / case["checkpoint"],
        decoder_model_name=str(VECTORS / case["decoder"]),
        generation_top_k=case["generation_top_k"],
        optimize_mem_tokens=trainable,
    )
    set_dropout(model.decoder, 0.0)
    model.train_stage(case["stage"])
    return model.train()


def case_batch(name: str, tensors: dict) -> dict:
    batch = {key.split("/")[1]: value for key, value in tensors["train"].items() if key.startswith(f"{name}/")}
    return {**batch, "stage": TRAIN[name]["stage"]}


def attended(tensors: dict, prefix: str) -> list[list[int]]:
    ids, mask = tensors[f"{prefix}input_ids"], tensors[f"{prefix}attention_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.fixture(scope="module")
def stage2_model():
    return CLaRa.from_pretrained(
        VECTORS / "checkpoints" / "c8_stage2", decoder_model_name=str(VECTORS / "decoders" / "sys")
    )


def test_compressor_ids_are_those_of_the_published_method(stage2_model, tensors):
    tokens, texts = stage2_model.tokens, ENCODER_INPUTS["c8"]["texts"]
    expected = dict(zip(texts, attended(tensors["encoder_inputs"], "c8/"), strict=True))
    for name, row in zip(texts, tokens.encoder_rows(list(texts.values())), strict=True):
        if not name.startswith("literal_"):
            assert row + tokens.memory_ids == expected[name], name
    known = ENCODER_INPUTS["c8"]
    assert (tokens.memory_ids, tokens.enc_id, tokens.sep_id) == (
        known["mem_token_ids"],
        known["enc_id"],
        known["sep_id"],
    )


def test_question_ids_are_those_of_the_published_method(stage2_model, tensors):
    rows = stage2_model.tokens.encoder_rows(ENCODER_INPUTS["c8"]["questions"])
    expected = attended(tensors["encoder_inputs"], "c8/questions48/")
    assert [row + stage2_model.tokens.memory_ids for row in rows] == expected


def test_one_shared_memory_token_is_repeated(tensors):
    known = ENCODER_INPUTS["same_mem"]
    config = CLaRaConfig(doc_max_length=32, compr_rate=8, different_mem_tokens=False)
    tokens = ClaraTokens(AutoTokenizer.from_pretrained(VECTORS / "decoders" / "sys"), config)
    rows = [row + tokens.memory_ids for row in tokens.encoder_rows(known["texts"])]
    assert rows == attended(tensors["encoder_inputs"], "same_mem/")
    assert (tokens.memory_ids, config.special_tokens) == (known["mem_token_ids"], known["additional_special_tokens"])


def test_document_vectors_are_those_of_the_published_method(stage2_model, tensors):
    known = ENCODER_INPUTS["c8"]
    names = [name for name in known["compressed_row_order"] if not name.startswith("literal_")]
    vectors, mse = stage2_model.compress_documents([known["texts"][name] for name in names])
    for name, vector in zip(names, vectors, strict=True):
        expected = tensors["encoder_inputs"]["c8/compressed"][known["compressed_row_order"].index(name)]
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=0)
        single = stage2_model.compress_documents([known["texts"][name]])[1]
        assert float(single) == pytest.approx(known["mse_loss_single"][name], rel=1e-5), name
    mean = sum(known["mse_loss_single"][name] for name in names) / len(names)
    assert float(mse) == pytest.approx(mean, rel=1e-5)


def test_query_vectors_are_those_of_the_published_method(stage2_model, tensors):
    queries = stage2_model.encode_queries(ENCODER_INPUTS["c8"]["questions"])
    torch.testing.assert_close(queries, tensors["encoder_inputs"]["c8/query_reps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRAIN)
def test_collated_documents_have_the_published_ids(name, tensors):
    tokens = ClaraTokens(
        AutoTokenizer.from_pretrained(VECTORS / TRAIN[name]["decoder"]), CLaRaConfig(doc_max_length=32, compr_rate=8)
    )
    rows = tokens.encoder_rows([doc for record in TRAIN[name]["batch"] for doc in record[0]])
    assert [row + tokens.memory_ids for row in rows] == attended(tensors["train"], f"{name}/enc_")


@pytest.mark.parametrize("name", CASES)
def test_forward_of_every_stage(name, tensors):
    case, batch = TRAIN[name], case_batch(name, tensors)
    model = load(case)
    with torch.no_grad():
        loss, out = model(batch=batch)
        short, none = model(batch=batch, compute_logits=False)
    assert float(loss) == pytest.approx(case["loss"], rel=1e-5)
    assert float(out["mse_loss"]) == pytest.approx(case["mse_loss"], rel=1e-5)
    torch.testing.assert_close(out["logits"][:, -8:], batch["logits_last8"], atol=1e-4, rtol=0)
    assert none["logits"] is None and float(short) == pytest.approx(float(loss), rel=1e-6)
    if case["stage"] == "stage2":
        assert out["topk_idx"].tolist() == case["topk_idx"]
        torch.testing.assert_close(out["scores"], torch.tensor(case["scores"]), atol=1e-4, rtol=0)
        z, _ = differentiable_topk(out["scores"], case["generation_top_k"], case["topk_temperature"])
        assert torch.equal(z, batch["z"])


def test_an_answer_that_is_cut_away_gives_no_loss_where_the_published_code_gave_nan(tensors):
    """Deliberate difference (SPEC 3): the recorded loss is NaN, ours is 0 with zero gradients; all else agrees."""
    name = "c8_stage1_2_trunc_all"
    assert math.isnan(TRAIN[name]["loss"])
    batch, model = case_batch(name, tensors), load(TRAIN[name])
    loss, out = model(batch=batch)
    loss.backward()
    assert float(loss) == 0.0
    assert float(out["mse_loss"]) == pytest.approx(TRAIN[name]["mse_loss"], rel=1e-5)
    torch.testing.assert_close(out["logits"][:, -8:], batch["logits_last8"], atol=1e-4, rtol=0)
    assert all(bool((grad == 0).all()) for grad in gradients(model).values())


@pytest.mark.parametrize(("name", "kind"), GRADIENTS)
def test_gradients_of_every_stage(name, kind, tensors):
    case, known = TRAIN[name], TRAIN[name]["grad"][kind]
    model = load(case, trainable="embed_trainable" in kind)
    loss, out = model(batch=case_batch(name, tensors))
    (loss + 0.1 * out["mse_loss"] if kind.endswith("0.1mse") else loss).backward()
    ours = {key.removeprefix("decoder."): grad for key, grad in gradients(model).items()}
    memory = ours.pop("special.memory", None)

    assert {key: float(grad.norm()) for key, grad in ours.items()} == pytest.approx(known["per_param_norm"], rel=1e-4)
    for adapter, norm in known["adapter_grad_norm"].items():
        parts = [grad.norm() for key, grad in ours.items() if f".{adapter}." in key]
        assert float(torch.stack(parts).norm()) == pytest.approx(norm, rel=1e-4)
    full = {key.removeprefix(f"{name}/{kind}/"): value for key, value in tensors["grads"].items()}
    for key in set(full) & set(ours):
        torch.testing.assert_close(ours[key], full[key], rtol=1e-4, atol=1e-4 * float(full[key].abs().max()))

    if case["stage"] == "stage2" or "embed_frozen" in kind:
        # Deliberate difference (SPEC 3): in stage 2 the memory embeddings are frozen, recorded gradients or not.
        assert memory is None
        return
    rows = full["mem_rows_grad"]
    torch.testing.assert_close(memory, rows, rtol=1e-4, atol=1e-4 * float(rows.abs().max()))
    assert memory.norm(dim=1).tolist() == pytest.approx(known["mem_row_norms"], rel=1e-4)
    assert known["non_mem_rows_norm"] == 0.0


def test_full_gradients_are_recorded_for_every_stage(tensors):
    """So that the comparison above is not empty: 56 LoRA matrices of each stage, and the memory rows."""
    for stage in ("stage1", "stage1_2", "stage2"):
        for kind in TRAIN[f"c8_{stage}_sys"]["grad"]:
            if "embed_trainable" in kind and (stage == "stage2" or kind.endswith("mse")):
                keys = [key for key in tensors["grads"] if key.startswith(f"c8_{stage}_sys/{kind}/")]
                assert len(keys) == 57 and sum("lora_" in key for key in keys) == 56


def test_stage1_2_continues_the_trained_decoder(tensors):
    """Deliberate difference (SPEC 3): the public code starts a fresh decoder adapter, ours only when asked to."""
    case, batch = TRAIN["c8_stage1_2_sys"], case_batch("c8_stage1_2_sys", tensors)
    model = load(case)
    with torch.no_grad():
        kept = model(batch=batch)[0]
        model.reset_adapter("decoder_adapter")
        fresh = model(batch=batch)[0]
    assert float(kept) == pytest.approx(case["loss"], rel=1e-5)
    assert abs(float(fresh) - case["loss"]) > 1e-3


@pytest.mark.parametrize("run", TRAJECTORY)
def test_six_optimiser_steps_follow_the_recorded_trajectory(run, tensors):
    """Stage 2 is compared with its frozen-embedding run: there ours never trains the memory embeddings (SPEC 3)."""
    known, case = TRAJECTORY[run], TRAIN[TRAJECTORY[run]["case"]]
    if run == "stage2_embed_trainable":
        run, known = "stage2_embed_frozen", TRAJECTORY["stage2_embed_frozen"]
    model = load(case, trainable="embed_trainable" in run or case["stage"] == "stage2")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    batch = case_batch(known["case"], tensors)
    for step in known["steps"]:
        loss, out = model(batch=batch)
        optimizer.zero_grad()
        (loss + known["mse_weight"] * out["mse_loss"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-3)
        assert out["mse_loss"].item() == pytest.approx(step["mse_loss"], rel=1e-3)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=1e-3)
        assert (None if out["topk_idx"] is None else out["topk_idx"].tolist()) == step["topk_idx"]


@pytest.mark.parametrize("case", TOPK, ids=lambda case: case["key"])
def test_differentiable_topk(case, tensors):
    known = {name: tensors["topk"][f"{case['key']}/{name}"] for name in ("R", "W", "grad", "idx")}
    logits = tensors["topk"][case["key"].split("/")[0] + "/logits"].clone().requires_grad_()
    z, indices = differentiable_topk(logits, case["k"], case["temperature"])
    (z * known["R"]).sum().backward()
    assert bool(torch.isfinite(logits.grad).all()) == case["finite"]
    if case["has_ties"]:  # the order among equal values is free
        assert torch.equal(z.sum(-1), torch.ones_like(z.sum(-1))) and bool((z.sum(1) <= 1).all())
        return
    assert torch.equal(indices, known["idx"])
    assert torch.equal(z, known["W"])
    torch.testing.assert_close(logits.grad, known["grad"], rtol=1e-4, atol=1e-5)


def test_recorded_scores_are_cosines_of_flattened_vectors(stage2_model):
    """The stage-2 scores from vectors computed outside the forward pass, so that a store can be searched by cosine."""
    case = TRAIN["c8_stage2_sys"]
    docs, _ = stage2_model.compress_documents([doc for record in case["batch"] for doc in record[0]])
    queries = stage2_model.encode_queries([record[1] for record in case["batch"]])
    padded, _ = pad_candidates(docs, torch.tensor([5, 5]))
    scores = cosine_scores(queries, padded.flatten(2))
    torch.testing.assert_close(scores, torch.tensor(case["scores"]), atol=1e-4, rtol=0)
