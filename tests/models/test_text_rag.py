"""The baseline without compression: its loss, what it learns, its checkpoint, and what it refuses."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf.models.adapters import set_dropout
from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import ANSWERS, DOCS, QUESTIONS, gradients, make_batch, new_model, text_rag_model

LISTS = [DOCS[:2], DOCS[2:3], DOCS[3:6]]


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return text_rag_model(mistral)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("text_rag") / "checkpoint"
    model.save_pretrained(target)
    return target


def plain_rows(base, model: CLaRa) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer with its end of turn) as ids, by the base's own tokenizer and chat template."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(base), model.config.prompts
    limit, rows = model.tokens.text_limit, []
    for question, documents, answer in zip(QUESTIONS, LISTS, ANSWERS, strict=True):
        cut = [tokenizer(text, add_special_tokens=False).input_ids[:limit] for text in documents]
        texts = "\n\n".join(tokenizer.decode(ids).rstrip("\ufffd") for ids in cut)
        turns = [
            {"role": "system", "content": prompts["answer_system"]},
            {"role": "user", "content": f"Background:\n{texts}\n\nQuestion:{question}"},
        ]
        said = [*turns, {"role": "assistant", "content": answer}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(said, add_generation_prompt=False, return_dict=False)
        assert whole[: len(start)] == start
        end = model.tokens.end_of_turn_ids(prompts["answer_system"], prompts["answer_user"])[0]
        rows.append((start, whole[len(start) : len(whole) - whole[::-1].index(end)]))
    return rows


@pytest.mark.parametrize("base", ["mistral", "qwen2", "smollm2"])
def test_loss_and_gradients_are_those_of_fine_tuning_the_base_with_peft(base_dir, base, tmp_path):
    """In float64, one sequence at a time, without padding, with the base's own LM head and no token of ours."""
    base = base_dir(base)
    model = text_rag_model(base, dtype=torch.float64)
    model.save_pretrained(tmp_path / "checkpoint")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64),
        tmp_path / "checkpoint" / "decoder_adapter",
        is_trainable=True,
    )
    for decoder in (model.decoder, plain):
        set_dropout(decoder, 0.0)
    model.train()
    plain.train()
    model.train_stage("text_rag")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, answer in plain_rows(base, model):
        logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total - torch.log_softmax(logits, -1)[range(len(answer)), answer].sum()
        count += len(answer)
    (total / count).backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default.", ".decoder_adapter."): p.grad
        for name, p in plain.named_parameters()
        if p.grad is not None
    }
    batch = make_batch(model, "text_rag", LISTS, QUESTIONS, ANSWERS)
    for compute_logits in (True, False):
        model.zero_grad()
        loss, out = model(batch=batch, compute_logits=compute_logits)
        loss.backward()
        # The loss is taken in float32, as in the other stages.
        assert float(loss) == pytest.approx(float(total / count), rel=1e-6)
        assert float(out["mse_loss"]) == 0 and out["topk_idx"] is None
        found = {name.removeprefix("decoder."): grad for name, grad in gradients(model).items()}
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert out["logits"] is None
    with torch.no_grad():
        logits = model(batch=batch)[1]["logits"]
        kept = batch["dec_attention_mask"][0].bool()
        theirs = plain(input_ids=batch["dec_input_ids"][:1, kept]).logits
    torch.testing.assert_close(logits[:1, kept], theirs, rtol=1e-9, atol=1e-9)


def test_the_batch_needs_no_compressor_input_and_padding_changes_nothing(model):
    batch = make_batch(model, "text_rag", LISTS, QUESTIONS, ANSWERS)
    assert not any(key.startswith("enc") for key in batch)
    counts = [int((row != -100).sum()) for row in batch["labels"]]
    with torch.no_grad():
        alone = [
            float(model(batch=make_batch(model, "text_rag", [d], [q], [a]))[0])
            for d, q, a in zip(LISTS, QUESTIONS, ANSWERS, strict=True)
        ]
        mean = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
        assert float(model(batch=batch)[0]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("compute_logits", [True, False])
def test_no_answer_left_gives_zero_and_zero_gradients(mistral, compute_logits):
    model = text_rag_model(mistral)
    model.train_stage("text_rag")
    batch = make_batch(model, "text_rag", LISTS, QUESTIONS, ANSWERS)
    batch["labels"][:] = -100
    loss, _ = model(batch=batch, compute_logits=compute_logits)
    loss.backward()
    assert float(loss) == 0 and all(not grad.any() for grad in gradients(model).values())


def test_answers_are_those_of_the_base_with_the_adapter(model, checkpoint, mistral):
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mistral), checkpoint / "decoder_adapter")
    tokenizer, answers = AutoTokenizer.from_pretrained(mistral), []
    for prompt, _ in plain_rows(mistral, model):
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    assert any(answers)
    assert model.generate_from_text(QUESTIONS, LISTS, 8) == answers


def test_the_checkpoint_holds_the_generator_adapter_alone_and_says_what_it_is(checkpoint):
    assert sorted(path.name for path in checkpoint.glob("*_adapter")) == ["decoder_adapter"]
    assert json.loads((checkpoint / "config.json").read_text())["training_stage"] == "text_rag"
    assert "reads documents as text" in (checkpoint / "README.md").read_text()


def test_a_loaded_checkpoint_answers_as_the_saved_model(model, checkpoint):
    again = CLaRa.from_pretrained(checkpoint)
    assert not again.has_compressor and list(again.decoder.peft_config) == ["decoder_adapter"]
    assert again.generate_from_text(QUESTIONS, LISTS) == model.generate_from_text(QUESTIONS, LISTS)


def test_an_adapter_that_lies_beside_it_is_not_taken_for_a_compressor(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.copytree(copy / "decoder_adapter", copy / "encoder_adapter")
    base = str((checkpoint / json.loads((copy / "config.json").read_text())["decoder_model_name"]).resolve())
    assert not CLaRa.from_pretrained(copy, decoder_model_name=base).has_compressor


def test_a_checkpoint_without_its_adapter_is_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "decoder_adapter")
    with pytest.raises(FileNotFoundError, match="decoder_adapter"):
        CLaRa.from_pretrained(copy)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.compress_documents(DOCS),
        lambda m: m.encode_queries(QUESTIONS),
        lambda m: m.generate_from_questions(QUESTIONS, LISTS),
        lambda m: m.generate_from_paraphrase(QUESTIONS, LISTS),
        lambda m: m.generate_from_compressed_documents_and_questions(QUESTIONS, torch.zeros(3, 4, 32)),
    ],
)
def test_whatever_needs_vectors_says_that_there_is_no_compressor(model, call):
    with pytest.raises(ValueError, match="this is a text_rag checkpoint.*no compressor"):
        call(model)


def test_it_cannot_be_taken_for_another_stage_nor_another_for_it(checkpoint, mistral, tmp_path):
    with pytest.raises(ValueError, match="is a text_rag checkpoint and cannot be taken for one of stage2"):
        CLaRa.from_pretrained(checkpoint, training_stage="stage2")
    new_model(mistral, query=False).save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="is a stage1 checkpoint and cannot be taken for one of text_rag"):
        CLaRa.from_pretrained(tmp_path / "stage1", training_stage="text_rag")


def test_other_stages_cannot_train_it_nor_can_it_train_a_model_with_a_compressor(model, mistral):
    with pytest.raises(ValueError, match="no encoder_adapter"):
        model.train_stage("stage1_2")
    with pytest.raises(ValueError, match="this one has a compressor"):
        new_model(mistral).train_stage("text_rag")


def test_text_prompt_with_an_answer_is_the_prompt_and_the_answer(model):
    without, whole = (model.tokens.text_prompt(QUESTIONS[0], LISTS[0], answer) for answer in (None, ANSWERS[0]))
    assert whole.ids[: whole.n_prompt] == without.ids[: whole.n_prompt] and whole.n_prompt == len(without.ids)
    assert model.tokens.tokenizer.decode(whole.ids[whole.n_prompt :]).strip() == ANSWERS[0] + "</s>"
