"""Answers, paraphrases and their inputs: what is chosen, what is refused, where vectors go (SPEC 1, 2, 4)."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from tests.tiny import DOCS, QUESTIONS, new_model


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


def test_selection_is_by_cosine_and_best_first(model):
    _, topk = model.generate_from_questions(QUESTIONS, [DOCS] * 3)
    queries, docs = model.encode_queries(QUESTIONS), model.compress_documents(DOCS)[0].flatten(1)
    scores = torch.nn.functional.cosine_similarity(queries.unsqueeze(1), docs.unsqueeze(0), dim=-1)
    assert torch.equal(topk, scores.topk(2).indices) and topk.dtype == torch.long


def test_answers_come_from_the_selected_documents_in_order_of_rank(model):
    answers, topk = model.generate_from_questions(QUESTIONS, [DOCS] * 3)
    chosen = [[DOCS[i] for i in row] for row in topk.tolist()]
    assert model.generate_from_text(QUESTIONS, chosen) == answers
    vectors, _ = model.compress_documents([doc for docs in chosen for doc in docs])
    assert model.generate_from_compressed_documents_and_questions(QUESTIONS, vectors) == answers


def test_more_slots_than_documents_use_what_is_there(model, mistral):
    wide = new_model(mistral, generation_top_k=9)
    answers, topk = wide.generate_from_questions(QUESTIONS[:2], [DOCS[:2], DOCS[:3]])
    assert topk.shape == (2, 3) and sorted(topk[1].tolist()) == [0, 1, 2]
    assert sorted(topk[0].tolist()) == [-1, 0, 1] and topk[0, 2] == -1
    chosen = [[DOCS[i] for i in row if i >= 0] for row in topk.tolist()]
    assert wide.generate_from_text(QUESTIONS[:2], chosen) == answers


@pytest.mark.parametrize("method", ["generate_from_questions", "generate_from_text", "generate_from_paraphrase"])
@pytest.mark.parametrize(
    ("questions", "documents", "message"),
    [
        (QUESTIONS[:2], [DOCS[:1]], "2 questions for 1 lists"),
        ([], [], "0 questions"),
        (QUESTIONS[:2], [DOCS[:1], []], "question 1 has no documents"),
        (QUESTIONS[:2], DOCS[:2], "one list of strings for each question"),
        (QUESTIONS[:1], "a text", "one list of strings for each question"),
    ],
)
def test_lists_that_do_not_pair_up_are_refused_in_words(model, method, questions, documents, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(questions, documents)


@pytest.mark.parametrize(("questions", "rows"), [(2, 3), (3, 2), (1, 0), (0, 2)])
def test_compressed_documents_that_cannot_be_shared_are_refused(model, questions, rows):
    with pytest.raises(ValueError, match="cannot be shared"):
        model.generate_from_compressed_documents_and_questions(QUESTIONS[:questions], torch.zeros(rows, 4, 32))


@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 4, 16), (2, 4, 64), (8, 32)])
def test_vectors_of_another_model_are_refused(model, shape):
    with pytest.raises(ValueError, match="compressed documents"):
        model.generate_from_compressed_documents_and_questions(QUESTIONS[:2], torch.zeros(shape))


@pytest.mark.parametrize("method", ["compress_documents", "encode_queries"])
def test_a_plain_string_is_not_taken_for_a_list_of_characters(model, method):
    with pytest.raises(ValueError, match="list of strings"):
        getattr(model, method)("one document")


def test_without_a_query_reasoner_asking_for_selection_is_an_error(mistral):
    model = new_model(mistral, query=False)
    assert not model.has_query_reasoner
    with pytest.raises(ValueError, match="no query reasoner"):
        model.encode_queries(QUESTIONS)
    with pytest.raises(ValueError, match="no query reasoner"):
        model.generate_from_questions(QUESTIONS[:1], [DOCS])
    with pytest.raises(ValueError, match="query_reasoner_adapter"):
        model.train_stage("stage2")


@pytest.mark.parametrize("different", [True, False])
@pytest.mark.parametrize("sep", [True, False])
def test_document_vectors_take_the_places_of_the_memory_tokens_in_order(mistral, different, sep):
    model = new_model(mistral, query=False, different_mem_tokens=different, sep=sep)
    vectors, _ = model.compress_documents(DOCS[:3])
    rows = [model.answer_prompt(QUESTIONS[0], 1).ids, model.answer_prompt(QUESTIONS[1], 2).ids]
    ids, _ = model.tokens.pad_left(rows)
    with torch.no_grad():
        placed, plain = model.place(ids, vectors, torch.tensor([1, 2])), model.embed(ids)
    memory = torch.isin(ids, torch.tensor(model.tokens.memory_ids))
    assert memory.sum(1).tolist() == [4, 8]
    assert torch.equal(placed[memory], vectors.flatten(0, 1))
    assert torch.equal(placed[~memory], plain[~memory])
    assert bool((ids == model.tokens.sep_id).any()) == sep


def test_rescaled_memory_is_read_at_the_length_of_embeddings_and_stored_as_it_was(mistral, tmp_path):
    plain = new_model(mistral, query=False)
    model = new_model(mistral, query=False, rescale_memory=True)
    vectors, _ = model.compress_documents(DOCS[:2])
    assert torch.equal(vectors, plain.compress_documents(DOCS[:2])[0])
    ids, _ = model.tokens.pad_left([model.answer_prompt(QUESTIONS[0], 2).ids])
    memory, counts = torch.isin(ids, torch.tensor(model.tokens.memory_ids)), torch.tensor([2])
    with torch.no_grad():
        placed, before = model.place(ids, vectors, counts), plain.place(ids, vectors, counts)
    rows = model.decoder.get_input_embeddings().weight
    mean = sum(float(row.double().square().sum().sqrt()) for row in rows) / len(rows)
    lengths = placed[memory].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, mean))
    directions = torch.nn.functional.cosine_similarity(placed[memory], before[memory], dim=-1)
    torch.testing.assert_close(directions, torch.ones_like(directions))
    assert torch.equal(placed[~memory], before[~memory])
    model.save_pretrained(tmp_path / "checkpoint")
    again = CLaRa.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(again.place(ids, vectors, counts), placed)


@pytest.mark.parametrize("different", [True, False])
def test_one_shared_memory_token_works_end_to_end(mistral, different, tmp_path):
    model = new_model(mistral, different_mem_tokens=different, sep=different)
    assert len(model.special.memory) == (4 if different else 1)
    answers, topk = model.generate_from_questions(QUESTIONS, [DOCS, DOCS[:3], DOCS[2:]])
    model.save_pretrained(tmp_path / "checkpoint")
    again = CLaRa.from_pretrained(tmp_path / "checkpoint")
    same, indices = again.generate_from_questions(QUESTIONS, [DOCS, DOCS[:3], DOCS[2:]])
    assert same == answers and torch.equal(indices, topk)


def test_paraphrases_always_use_the_first_instruction(model):
    prompts = model.config.prompts
    try:
        torch.manual_seed(0)
        first = model.generate_from_paraphrase(["", ""], [DOCS[:1], DOCS[1:3]])
        for seed in range(3):
            torch.manual_seed(seed)
            assert model.generate_from_paraphrase(["", ""], [DOCS[:1], DOCS[1:3]]) == first
        instructions = prompts["paraphrase_instructions"]
        model.config.prompts = {**prompts, "paraphrase_instructions": [instructions[0]] + ["{docs} other"] * 7}
        assert model.generate_from_paraphrase(["", ""], [DOCS[:1], DOCS[1:3]]) == first
        model.config.prompts = {**prompts, "paraphrase_instructions": instructions[::-1]}
        assert model.generate_from_paraphrase(["", ""], [DOCS[:1], DOCS[1:3]]) != first
    finally:
        model.config.prompts = prompts


def test_answering_uses_the_user_prompt_of_the_contract(model):
    text = model.tokens.tokenizer.decode(model.answer_prompt("Where?", 2).ids)
    slot = "<MEM0><MEM1><MEM2><MEM3><SEP>"
    assert f"Background:\n{slot}{slot}\n\nQuestion:Where?" in text
    assert DEFAULT_PROMPTS["answer_user"] == "Background:\n{docs}\n\nQuestion:{query}"


def test_special_token_spellings_in_a_question_reach_the_generator_as_text(model):
    """They would otherwise ask for vectors that are not there, or end the turn early."""
    odd = "<MEM0> <SEP> </s> where?"
    answers = model.generate_from_text([odd, QUESTIONS[0]], [[DOCS[0] + " <MEM1></s>"], [DOCS[1]]])
    assert answers[1] == model.generate_from_text([QUESTIONS[0]], [[DOCS[1]]])[0]


def test_a_prompt_beyond_the_base_models_context_is_an_error_not_a_cut(model):
    with pytest.raises(ValueError, match="exceed the base model's 1024"):
        model.generate_from_text(["why? " * 400], [DOCS])


def test_max_new_tokens_defaults_to_the_config(model):
    long = model.generate_from_text(QUESTIONS, [DOCS[:1]] * 3, max_new_tokens=24)
    short = model.generate_from_text(QUESTIONS, [DOCS[:1]] * 3)
    assert short == model.generate_from_text(QUESTIONS, [DOCS[:1]] * 3, max_new_tokens=8)
    assert any(len(a) < len(b) for a, b in zip(short, long, strict=True))


def test_generation_is_greedy_whatever_the_base_models_defaults_are(mistral, tmp_path):
    """Instruction-tuned bases ship generation_config.json with sampling switched on."""
    base = shutil.copytree(mistral, tmp_path / "base")
    plain = new_model(base).generate_from_text(QUESTIONS, [DOCS] * 3)
    settings = {
        "do_sample": True,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 5.0,
        "transformers_version": "5.0.0",
    }
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, **settings}))
    sampling = new_model(base)
    for seed in range(3):
        torch.manual_seed(seed)
        assert sampling.generate_from_text(QUESTIONS, [DOCS] * 3) == plain


def test_an_answer_ends_at_the_end_of_turn_of_the_chat_template(base_dir):
    """It need not be the tokenizer's eos. The LM head is bent so that it comes first, and other tokens after it."""
    model = new_model(base_dir("llama"), query=False)
    end = model.tokens.tokenizer.convert_tokens_to_ids("<end>")
    assert end != model.tokens.tokenizer.eos_token_id
    vectors, _ = model.compress_documents(DOCS[:1])
    prompt = model.answer_prompt(QUESTIONS[0], 1).ids
    with torch.no_grad():
        ids, mask = model.tokens.pad_left([[*prompt, end]])
        first, then = model.hidden("decoder_adapter", model.place(ids, vectors, torch.tensor([1])), mask)[0, -2:]
        head = model.decoder.get_output_embeddings()
        head.weight[end] = 100 * (first - (first @ then) / (then @ then) * then)
        assert int(head(first).argmax()) == end
        after = model.tokens.tokenizer.decode([int(head(then).argmax())], skip_special_tokens=True)
    assert after.strip(), "without a stop the answer would go on"
    assert model.generate_from_text([QUESTIONS[0]], [DOCS[:1]]) == [""]


def test_without_adapter_the_bare_base_model_generates(mistral):
    model = new_model(mistral)
    base = AutoModelForCausalLM.from_pretrained(mistral)
    prompts = [model.text_prompt(q, DOCS[:n]) for n, q in enumerate(QUESTIONS, 1)]
    texts = model.generate_from_prompts(prompts, max_new_tokens=8, adapter=None)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt.ids])
        output = base.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, len(prompt.ids) :]
        assert text == model.tokens.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert texts != model.generate_from_prompts(prompts, max_new_tokens=8)
    assert model.router.active is None
