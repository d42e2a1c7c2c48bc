"""What learns in each stage, and gradients through two adapters of one decoder, checkpointed or not (SPEC 3)."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from openrlhf.models.adapters import set_dropout
from openrlhf.models.lora import keep_mask
from openrlhf.models.modeling_clara import STAGE_TRAINS, CLaRa
from openrlhf.models.selection import select_documents
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model, text_rag_model

LISTS = [DOCS[:3], DOCS[2:4], DOCS[1:6]]
STAGES = ("stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval")
EVERY = (*STAGES, "text_rag")
ADAPTERS = ("encoder_adapter", "decoder_adapter", "query_reasoner_adapter")


def backward(model: CLaRa, batch: dict, seed: int = 7) -> dict[str, torch.Tensor]:
    """Gradients of loss + 0.1·MSE from one seed; of the loss alone where the documents are frozen."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss, out = model(batch=batch)
    (loss + 0.1 * out["mse_loss"]).backward()
    return {name: grad.clone() for name, grad in gradients(model).items()}


def owners(names) -> set[str]:
    return {next((a for a in ADAPTERS if f".{a}." in name), name) for name in names}


def model_of(stage: str, base, **options) -> CLaRa:
    return text_rag_model(base, **options) if stage == "text_rag" else new_model(base, **options)


@pytest.mark.parametrize("stage", EVERY)
def test_exactly_what_the_stage_names_learns(mistral, stage):
    model = model_of(stage, mistral)
    model.train_stage(stage)
    adapters, memory = STAGE_TRAINS[stage]
    expected = {*adapters, "special.memory"} if memory else set(adapters)
    assert owners(name for name, p in model.named_parameters() if p.requires_grad) == expected
    grads = backward(model, make_batch(model, stage, LISTS, QUESTIONS, ANSWERS))
    assert owners(grads) == expected
    assert all(bool(torch.isfinite(grad).all()) and float(grad.norm()) > 0 for grad in grads.values())
    assert model.config.training_stage == stage


def test_stage_after_stage_freezes_what_the_former_one_trained(mistral):
    model = new_model(mistral)
    for stage in STAGES:
        model.train_stage(stage)
    assert owners(n for n, p in model.named_parameters() if p.requires_grad) == {"query_reasoner_adapter"}


@pytest.mark.parametrize("stage", ["stage1", "stage1_2"])
def test_memory_embeddings_learn_only_when_the_config_says_so(mistral, stage):
    model = new_model(mistral, optimize_mem_tokens=False)
    model.train_stage(stage)
    assert not model.special.memory.requires_grad
    assert owners(backward(model, make_batch(model, stage, LISTS, QUESTIONS, ANSWERS))) == set(ADAPTERS[:2])


def test_a_frozen_query_reasoner_gets_no_gradient(mistral):
    model = new_model(mistral)
    model.train_stage("stage2", freeze_query_reasoner=True)
    assert owners(backward(model, make_batch(model, "stage2", LISTS, QUESTIONS, ANSWERS))) == {"decoder_adapter"}


@pytest.mark.parametrize("stage", ["stage1", "stage1_2"])
def test_a_frozen_compressor_gives_the_generator_the_same_gradients_and_gets_none(mistral, stage):
    model = new_model(mistral)
    model.train_stage(stage)
    batch = make_batch(model, stage, LISTS, QUESTIONS, ANSWERS)
    whole = backward(model, batch)
    model.train_stage(stage, freeze_compressor=True)
    found = backward(model, batch)
    assert owners(found) == {"decoder_adapter"} and not model.special.memory.requires_grad
    assert all(torch.equal(grad, whole[name]) for name, grad in found.items())
    set_dropout(model.decoder, 0.5)
    mse = {float(model.train()(batch=batch)[1]["mse_loss"]) for _ in range(3)}
    assert mse == {float(model.eval()(batch=batch)[1]["mse_loss"])}, "dropout touched it"
    model.train_stage(stage)
    assert owners(backward(model, batch)) == {*ADAPTERS[:2], "special.memory"}


def test_the_base_model_and_the_fixed_tokens_never_learn(mistral):
    model = new_model(mistral)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train_stage("stage1")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    backward(model, make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS))
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert owners(changed) == {"encoder_adapter", "decoder_adapter", "special.memory"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stage", EVERY)
def test_checkpointing_changes_no_gradient(mistral, stage, dropout):
    """Exactly equal: a recomputed segment runs under the adapter, and the dropout masks, of its forward pass."""
    model = model_of(stage, mistral, dtype=torch.float64)
    set_dropout(model.decoder, dropout)
    model.train_stage(stage)
    model.train()
    batch = make_batch(model, stage, LISTS, QUESTIONS, ANSWERS)
    plain = backward(model, batch)
    model.checkpoint_layers()
    checkpointed = backward(model, batch)
    assert checkpointed.keys() == plain.keys()
    for name, grad in plain.items():
        assert torch.equal(checkpointed[name], grad), name
    if dropout:
        other = backward(model, batch, seed=8)
        assert not all(torch.equal(other[name], grad) for name, grad in plain.items()), "dropout must be on"


def test_layers_are_really_recomputed(mistral):
    model = new_model(mistral)
    model.train_stage("stage1")
    model.train()
    batch, runs = make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS), []
    model.decoder.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(model.router.active))
    backward(model, batch)
    assert runs == ["encoder_adapter", "decoder_adapter"]
    runs.clear()
    model.checkpoint_layers()
    backward(model, batch)
    assert runs == ["encoder_adapter", "decoder_adapter", "decoder_adapter", "encoder_adapter"]


def test_the_stock_way_to_switch_checkpointing_on_is_the_safe_one(mistral):
    """`gradient_checkpointing_enable` of transformers would recompute under whichever adapter is active then."""
    model = new_model(mistral, dtype=torch.float64)
    model.train_stage("stage1")
    model.train()
    batch = make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS)
    plain = backward(model, batch)
    model.gradient_checkpointing_enable()
    checkpointed = backward(model, batch)
    assert all(torch.equal(checkpointed[name], grad) for name, grad in plain.items())


class PlainDropout(torch.nn.Module):
    """Dropout as PEFT's own layers apply it, with the masks that ours draw."""

    def __init__(self, p: float):
        super().__init__()
        self.p = round(p * 2**16) / 2**16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * keep_mask(x, self.p) / (1 - self.p) if self.p and self.training else x


def use_plain_dropout(model: torch.nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleDict) and isinstance(
            next(iter(module.values()), None), (torch.nn.Dropout, torch.nn.Identity)
        ):
            module["default"] = PlainDropout(p)


def peft_alone(base, directory) -> PeftModel:
    """One saved adapter on its own copy of the base model, trainable, nothing of ours in it."""
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(decoder, directory, is_trainable=True).train()


def states(model: PeftModel, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model.base_model.model.model(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions
    ).last_hidden_state


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stage", ["stage1_2", "stage2"])
def test_gradients_equal_those_of_separate_models(mistral, tmp_path, stage, dropout, checkpointing):
    """One loss through two adapters of one decoder against as many separate PEFT models, in float64."""
    model = new_model(mistral, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    alone = {name: peft_alone(mistral, tmp_path / name) for name in ADAPTERS}
    set_dropout(model.decoder, dropout)
    for separate in alone.values():
        use_plain_dropout(separate, dropout)
    model.train_stage(stage)
    model.train()
    if checkpointing:
        model.checkpoint_layers()
    batch = make_batch(model, stage, LISTS, QUESTIONS, ANSWERS)
    grads = backward(model, batch)

    model.zero_grad()
    torch.manual_seed(7)
    embed = model.embed
    encoder, decoder, reasoner = (alone[name] for name in ADAPTERS)
    if stage == "stage1_2":
        hidden = states(encoder, embed(batch["enc_input_ids"]), batch["enc_attention_mask"])
        text = batch["enc_attention_mask"][:, :-4].unsqueeze(-1)
        docs = hidden[:, -4:]
        mean = (hidden[:, :-4] * text).sum(1) / text.sum(1)
        extra, counts = ((docs.mean(1) - mean) ** 2).mean(), [3, 2, 5]
    else:
        with torch.no_grad():
            docs = states(encoder.eval(), embed(batch["enc_input_ids"]), batch["enc_attention_mask"])[:, -4:]
        query = states(reasoner, embed(batch["query_input_ids"]), batch["query_attention_mask"])[:, -4:]
        docs, _, _ = select_documents(query.flatten(1), docs, batch["docs_per_question"], 2, 0.02)
        extra, counts = 0.0, [2, 2, 2]
    embeds = model.place(batch["dec_input_ids"], docs, torch.tensor(counts))
    logits = model.head(states(decoder, embeds, batch["dec_attention_mask"]))[:, :-1]
    labels = batch["labels"][:, 1:]
    (torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]) + 0.1 * extra).backward()

    expected = {}
    for name, separate in alone.items():
        for key, grad in gradients(separate).items():
            expected[key.removeprefix("base_model.model.").replace(".default.", f".{name}.")] = grad
    ours = {key.removeprefix("decoder."): grad for key, grad in grads.items() if "lora_" in key}
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=key)
    if stage == "stage1_2":
        torch.testing.assert_close(grads["special.memory"], model.special.memory.grad, rtol=1e-5, atol=1e-7)


def test_the_router_leaves_requires_grad_alone(mistral):
    model = new_model(mistral)
    model.train_stage("stage1")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ADAPTERS:
        with model.router.route(name), model.router.route("encoder_adapter"):
            assert model.router.active == "encoder_adapter"
            assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.router.active is None


def test_an_unknown_adapter_is_refused_and_not_run_as_the_bare_base_model(mistral):
    model = new_model(mistral, query=False)
    with pytest.raises(ValueError, match="no query_reasoner_adapter"), model.router.route("query_reasoner_adapter"):
        pass


def test_the_query_reasoner_starts_as_a_copy_of_the_compressor(mistral):
    model = new_model(mistral, query=False)
    model.add_query_reasoner()
    vectors, _ = model.compress_documents(QUESTIONS)
    assert torch.equal(model.encode_queries(QUESTIONS), vectors.flatten(1))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_started_afresh_is_a_no_op_and_leaves_the_others(mistral, name):
    model = new_model(mistral)
    before = {key: p.clone() for key, p in model.named_parameters() if "lora_" in key}
    model.reset_adapter(name)
    for key, p in model.named_parameters():
        if f"lora_B.{name}." in key:
            assert not p.any()
        elif "lora_" in key and f".{name}." not in key:
            assert torch.equal(p, before[key])


def test_two_runs_from_one_seed_agree_bit_for_bit(mistral):
    runs = []
    for _ in range(2):
        model = new_model(mistral)
        model.train_stage("stage1")
        model.train()
        runs.append(backward(model, make_batch(model, "stage1", LISTS, QUESTIONS, ANSWERS)))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
