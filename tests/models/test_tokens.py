"""Text to ids: what a user writes is plain text, nothing of it is lost, and templates of every kind work (SPEC 1)."""

import pytest
from transformers import AutoTokenizer

from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.models.tokens import ClaraTokens
from tests.tiny import BASES, DOCS, byte_level_tokenizer, metaspace_tokenizer

SPELLINGS = ["<MEM0>", "<ENC>", "<SEP>", "<AE>", "</s>", "<s>", "[INST] x [/INST]", "<|im_end|>\n<|im_start|>user"]


def make_tokens(name: str, **fields) -> ClaraTokens:
    settings = {"doc_max_length": 16, "compr_rate": 4, "prompts": DEFAULT_PROMPTS, **fields}
    return ClaraTokens(byte_level_tokenizer(BASES[name]), CLaRaConfig(**settings))


@pytest.fixture(params=BASES)
def name(request) -> str:
    return request.param


def test_special_tokens_are_added_in_the_order_of_the_contract(name):
    tokens = make_tokens(name)
    expected = ["<MEM0>", "<MEM1>", "<MEM2>", "<MEM3>", "<AE>", "<ENC>", "<SEP>"]
    first = tokens.first_special_id
    assert tokens.tokenizer.convert_ids_to_tokens(list(range(first, first + 7))) == expected
    assert len(tokens.tokenizer) == first + 7


def test_one_shared_memory_token():
    tokens = make_tokens("mistral", different_mem_tokens=False)
    assert tokens.n_special == 4 and tokens.memory_ids == [tokens.first_special_id] * 4


def test_compressor_input_is_the_joined_string_cut_on_the_right(name):
    tokens = make_tokens(name)
    joined = [f"<ENC>{BASES[name].bos or ''}{text}{BASES[name].eos}" for text in ("", *DOCS)]
    expected = tokens.tokenizer(joined, add_special_tokens=False).input_ids
    rows = tokens.encoder_rows(["", *DOCS])
    assert rows == [row[:19] for row in expected]
    assert any(len(row) == 19 < len(full) for row, full in zip(rows, expected, strict=True))


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_metaspace_tokenizers_read_a_document_as_in_the_joined_string(scheme):
    """SentencePiece-like tokenizers prepend a space in some places only; texts must not gain or lose one."""
    tokens = ClaraTokens(metaspace_tokenizer(scheme), CLaRaConfig(doc_max_length=64, compr_rate=16))
    texts = ["", " ", "Warsaw", " Warsaw", "  two  spaces ", "line\nbreak\n", "x", *DOCS]
    joined = tokens.tokenizer([f"<ENC><s>{text}</s>" for text in texts], add_special_tokens=False).input_ids
    start, end = [tokens.enc_id, tokens.tokenizer.bos_token_id], [tokens.tokenizer.eos_token_id]
    assert [start + row + end for row in tokens.plain_ids(texts)] == joined
    assert tokens.encoder_rows(texts) == [row[:67] for row in joined]


def test_a_tokenizer_without_bos_leaves_it_out():
    tokens = make_tokens("qwen2")
    assert tokens.tokenizer.bos_token_id is None
    assert tokens.encoder_rows([""]) == [[tokens.enc_id, tokens.tokenizer.eos_token_id]]


def test_special_token_spellings_stay_plain_text_everywhere(name):
    tokens = make_tokens(name)
    special = {i for i, token in tokens.tokenizer.added_tokens_decoder.items() if token.special}
    text = "before " + " and ".join(SPELLINGS) + " after"
    plain = tokens.plain_ids([text])[0]
    assert not special & set(plain) and tokens.tokenizer.decode(plain) == text

    quiet = tokens.build_prompt("answer", 2, query="plain", answer="plain")
    loud = tokens.build_prompt("answer", 2, query=text, answer=text)
    assert [i for i in loud.ids if i in special] == [i for i in quiet.ids if i in special]
    decoded = tokens.tokenizer.decode(loud.ids)
    assert decoded.count(text) == 2
    assert text in tokens.tokenizer.decode(loud.ids[loud.n_prompt :])


def test_the_words_docs_and_query_in_braces_are_plain_text_in_a_question():
    tokens = make_tokens("mistral")
    prompt = tokens.build_prompt("answer", 1, query="what is {docs} and {query}?")
    assert "Question:what is {docs} and {query}?" in tokens.tokenizer.decode(prompt.ids)
    assert sum(i in tokens.memory_ids for i in prompt.ids) == 4


def test_private_marks_of_ours_in_a_users_text_cannot_break_the_layout():
    tokens = make_tokens("mistral")
    marks = "\ue0f0clara\ue0f1 \ue0f2docs\ue0f3 \ue0f2query\ue0f3 \ue0f2answer\ue0f3"
    prompt = tokens.build_prompt("answer", 1, query=marks, answer="yes")
    assert sum(i in tokens.memory_ids for i in prompt.ids) == 4
    assert tokens.tokenizer.decode(prompt.ids[prompt.n_prompt :]) == " yes</s>"


def rendered(name: str, tokens: ClaraTokens, system: str, user: str, answer: str | None) -> str:
    """What the template itself writes, with the fall-back of the specification for templates without a system role."""
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    if name in ("llama", "llama_tied", "dropping"):
        turns = [{"role": "user", "content": f"{system}\n{user}"}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return tokens.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)


def test_a_prompt_is_the_rendered_template_with_documents_as_memory_tokens(name):
    tokens, prompts = make_tokens(name), DEFAULT_PROMPTS
    slot = "<MEM0><MEM1><MEM2><MEM3><SEP>"
    user = prompts["answer_user"].replace("{docs}", slot * 3).replace("{query}", "Where?")
    text = rendered(name, tokens, prompts["answer_system"], user, None)
    ids = tokens.tokenizer(text, add_special_tokens=False).input_ids
    assert tokens.build_prompt("answer", 3, query="Where?").ids == ids
    full = rendered(name, tokens, prompts["answer_system"], user, "Warsaw in 1867")
    with_answer = tokens.build_prompt("answer", 3, query="Where?", answer="Warsaw in 1867").ids
    ids = tokens.tokenizer(full, add_special_tokens=False).input_ids
    assert with_answer == ids[: len(with_answer)]
    assert tokens.tokenizer.decode(ids[len(with_answer) :]).strip() in ("", "<|endoftext|>")


@pytest.mark.parametrize("answer", ["Warsaw", " Warsaw", "The Danube, in 1867.\nAnd more", "東京 😀", "x", ""])
def test_labels_cover_exactly_the_answer_and_the_end_of_turn(name, answer):
    tokens = make_tokens(name)
    prompt = tokens.build_prompt("answer", 2, query="Where?", answer=answer)
    start = tokens.build_prompt("answer", 2, query="Where?").ids
    end = tokens.tokenizer.convert_tokens_to_ids(BASES[name].end_of_turn)
    labelled = prompt.ids[prompt.n_prompt :]
    assert labelled[-1] == end and end not in labelled[:-1]
    decode = tokens.tokenizer.decode
    assert decode(labelled[:-1]).strip() == answer.strip()
    assert decode(prompt.ids[:-1]).endswith(answer)
    assert start[: prompt.n_prompt] == prompt.ids[: prompt.n_prompt]
    assert decode(start[prompt.n_prompt :]).strip() == ""


def test_a_generation_prompt_that_ends_in_a_space_loses_no_answer_token():
    """The space and the first word are one token, so it straddles the border and must be learnt."""
    tokens = make_tokens("trailing_space")
    start = tokens.build_prompt("answer", 1, query="Where?").ids
    prompt = tokens.build_prompt("answer", 1, query="Where?", answer="Warsaw")
    assert tokens.tokenizer.decode(start).endswith("ASSISTANT: ")
    assert tokens.tokenizer.decode(prompt.ids[prompt.n_prompt]) == " Warsaw"
    assert prompt.n_prompt == len(start) - 1


def test_the_system_text_reaches_the_model_in_every_template(name):
    tokens = make_tokens(name)
    for kind in ("answer", "qa", "paraphrase"):
        text = tokens.tokenizer.decode(tokens.build_prompt(kind, 1).ids)
        assert text.count(DEFAULT_PROMPTS[f"{kind}_system"]) == 1


def test_the_legacy_vector_template_is_handled_like_a_refused_system_role(vectors):
    config = CLaRaConfig(doc_max_length=16, compr_rate=4, prompts=DEFAULT_PROMPTS)
    tokens = ClaraTokens(AutoTokenizer.from_pretrained(vectors / "decoders" / "legacy"), config)
    text = tokens.tokenizer.decode(tokens.build_prompt("answer", 1, query="Where?").ids)
    assert text.startswith("<s>[INST] " + DEFAULT_PROMPTS["answer_system"] + "\nBackground:\n<MEM0>")


def test_an_error_of_the_template_itself_is_not_swallowed():
    tokenizer = byte_level_tokenizer(BASES["mistral"])
    tokenizer.chat_template = "{{ raise_exception('only tools may speak') }}"
    tokens = ClaraTokens(tokenizer, CLaRaConfig(doc_max_length=16, compr_rate=4, prompts=DEFAULT_PROMPTS))
    with pytest.raises(Exception, match="only tools may speak"):
        tokens.build_prompt("answer", 1, query="Where?")


def test_a_tokenizer_without_chat_template_is_refused_in_words():
    tokenizer = byte_level_tokenizer(BASES["mistral"])
    tokenizer.chat_template = None
    tokens = ClaraTokens(tokenizer, CLaRaConfig(doc_max_length=16, compr_rate=4, prompts=DEFAULT_PROMPTS))
    with pytest.raises(ValueError, match="no chat template"):
        tokens.build_prompt("answer", 1, query="Where?")


def test_a_template_whose_assistant_turn_differs_from_its_prompt_is_refused_in_words():
    tokenizer = byte_level_tokenizer(BASES["mistral"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'bot:' }}{% endif %}"
    )
    tokens = ClaraTokens(tokenizer, CLaRaConfig(doc_max_length=16, compr_rate=4, prompts=DEFAULT_PROMPTS))
    with pytest.raises(ValueError, match="does not start with its own generation prompt"):
        tokens.build_prompt("answer", 1, query="Where?")


@pytest.mark.parametrize("different", [True, False])
def test_sep_false_emits_no_separator_and_shifts_nothing(different):
    tokens = make_tokens("mistral", sep=False, different_mem_tokens=different)
    prompt = tokens.build_prompt("answer", 3, query="Where?", answer="here")
    assert tokens.sep_id not in prompt.ids
    first = prompt.ids.index(tokens.memory_ids[0])
    assert prompt.ids[first : first + 12] == tokens.memory_ids * 3
    assert not set(tokens.memory_ids) & {*prompt.ids[:first], *prompt.ids[first + 12 :]}


def test_sep_follows_each_document():
    tokens = make_tokens("mistral")
    ids = tokens.build_prompt("answer", 2, query="Where?").ids
    first = ids.index(tokens.memory_ids[0])
    assert ids[first : first + 10] == [*tokens.memory_ids, tokens.sep_id] * 2 and ids.count(tokens.sep_id) == 2


def test_padding_is_on_the_left_and_the_memory_tokens_on_the_right():
    tokens = make_tokens("mistral")
    rows = tokens.encoder_rows(["x", DOCS[0]])
    ids, mask = tokens.encoder_batch(rows)
    assert [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)] == [
        row + tokens.memory_ids for row in rows
    ]
    assert bool((mask.diff(dim=1) >= 0).all()) and ids[:, -4:].tolist() == [tokens.memory_ids] * 2


def test_no_texts_give_no_rows():
    assert make_tokens("mistral").encoder_rows([]) == []


def test_a_tokenizer_saved_with_the_tokens_is_taken_as_it_is(tmp_path):
    tokens = make_tokens("mistral")
    tokens.tokenizer.save_pretrained(tmp_path)
    again = ClaraTokens(AutoTokenizer.from_pretrained(tmp_path), tokens.config)
    assert (again.first_special_id, len(again.tokenizer)) == (tokens.first_special_id, len(tokens.tokenizer))
    assert again.encoder_rows(DOCS) == tokens.encoder_rows(DOCS)


def test_a_tokenizer_that_holds_the_tokens_elsewhere_is_refused():
    tokenizer = byte_level_tokenizer(BASES["mistral"])
    tokenizer.add_tokens(["<SEP>"], special_tokens=True)
    with pytest.raises(ValueError, match="last tokens in this order"):
        ClaraTokens(tokenizer, CLaRaConfig(doc_max_length=16, compr_rate=4))


def test_prompts_unknown_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="carries no prompts: pass prompts="):
        make_tokens("mistral", prompts=None).build_prompt("answer", 1, query="Where?")


def test_a_text_prompt_reads_as_the_answer_prompt_with_texts_for_vectors(name):
    tokens = make_tokens(name, doc_max_length=64)
    prompt = tokens.text_prompt("Where?", [DOCS[0], DOCS[2]])
    expected = tokens.plain_prompt(
        DEFAULT_PROMPTS["answer_system"], f"Background:\n{DOCS[0]}\n\n{DOCS[2]}\n\nQuestion:Where?"
    )
    assert prompt.ids == expected.ids and prompt.n_prompt == len(prompt.ids)
    assert f"Background:\n{DOCS[0]}\n\n{DOCS[2]}\n\nQuestion:Where?" in tokens.tokenizer.decode(prompt.ids)


def test_documents_and_questions_of_a_text_prompt_stay_plain_text(name):
    tokens = make_tokens(name, doc_max_length=64)
    odd = "{query} {docs} <MEM0> </s> <|im_end|>"
    ids = tokens.text_prompt(odd, [odd]).ids
    assert tokens.tokenizer.decode(ids).count(odd) == 2
    assert not set(tokens.memory_ids) & set(ids)
    plain = tokens.text_prompt("x", ["y"]).ids
    special = set(tokens.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_the_seen_text_is_what_the_compressor_reads(name):
    tokens = make_tokens(name)
    start = len(tokens.encoder_rows([""])[0]) - (tokens.tokenizer.eos_token_id is not None)
    for text in DOCS:
        (row,) = tokens.encoder_rows([text])
        seen = tokens.seen_text(text)
        if row[-1] == tokens.tokenizer.eos_token_id:
            assert seen == text
        else:
            assert text.startswith(seen) and len(seen) < len(text)
            assert tokens.tokenizer.decode(row[start:]).rstrip("\ufffd") == seen
    assert tokens.seen_text("") == ""
