"""The logit lens of the query: its arithmetic, its rule for tokens and texts, what it writes and what it refuses."""

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import decoders

from evaluation.logit_lens import (
    GatheredToken,
    Question,
    Reading,
    SlotToken,
    Vocabulary,
    check_query_reasoner,
    draw,
    html_report,
    lens,
    main,
    printable,
    read,
    summarise,
    text_report,
)
from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.tokens import ClaraTokens
from tests.tiny import BASES, DOCS, QUESTIONS, byte_level_tokenizer, metaspace_tokenizer, new_model

PUBLIC = Path(__file__).parents[1] / "data/vectors/checkpoints"


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture(scope="module")
def vocabulary(model) -> Vocabulary:
    return Vocabulary(model.tokens)


@pytest.fixture(scope="module")
def checkpoint(mistral, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("stage2")
    new_model(mistral, training_stage="stage2").save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    golds = (0, 1, 3)
    records = [
        {"question": q, "docs": DOCS, "answer": "x", "golden_answers": ["x"], "pos_index": [gold]}
        for q, gold in zip(QUESTIONS, golds, strict=True)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def id_of(vocabulary: Vocabulary, token: str) -> int:
    """Id of the ordinary token that reads so inside a text."""
    return next(i for i in range(len(vocabulary.tokenizer)) if vocabulary.token(i) == token)


@pytest.mark.parametrize("name", ["mistral", "llama_tied", "qwen2"])
def test_the_highest_tokens_are_those_of_a_slow_float64_product(name, base_dir):
    model = new_model(base_dir(name))
    ids_BLT, logits_BLT = lens(model, QUESTIONS, 7)
    head_VD = model.decoder.get_output_embeddings().weight.detach().double().clone()
    added_SD = torch.cat([model.special.memory, model.special.others]).detach().double()
    if model.special.head is not None:
        assert name == "mistral"
        added_SD = model.special.head.double()
    first = model.tokens.first_special_id
    after_VD = head_VD[first + len(added_SD) :]  # where the base pads its embedding, the added rows replace padding
    head_VD = torch.cat([head_VD[:first], added_SD, after_VD])
    for b, query_E in enumerate(model.encode_queries(QUESTIONS).double()):
        for slot, vector_D in enumerate(query_E.split(head_VD.shape[1])):
            logits = [sum(x * y for x, y in zip(row, vector_D.tolist(), strict=True)) for row in head_VD.tolist()]
            expected = sorted(range(len(logits)), key=lambda i: -logits[i])[:7]
            assert ids_BLT[b, slot].tolist() == expected
            assert logits_BLT[b, slot].tolist() == pytest.approx([logits[i] for i in expected], abs=1e-4)
    assert ids_BLT.shape == logits_BLT.shape == (len(QUESTIONS), model.config.n_memory_tokens, 7)


def test_more_tokens_than_the_vocabulary_has_give_all_of_it(model):
    ids_BLT, _ = lens(model, QUESTIONS[:1], 10**6)
    width = model.decoder.config.vocab_size + model.tokens.n_special
    assert ids_BLT[0, 0].sort().values.tolist() == list(range(width))


def test_added_special_padding_and_symbol_tokens_are_left_out(base_dir):
    model = new_model(base_dir("qwen2"))
    tokenizer, vocabulary = model.tokens.tokenizer, Vocabulary(model.tokens)
    for name in ("<|im_start|>", "<|endoftext|>", "<MEM0>", "<SEP>", "<ENC>"):
        assert vocabulary.token(tokenizer.convert_tokens_to_ids(name)) is None
    assert len(tokenizer) < model.decoder.config.vocab_size
    assert vocabulary.token(model.decoder.config.vocab_size - 1) is None
    kept = [vocabulary.token(i) for i in range(len(tokenizer)) if vocabulary.token(i) is not None]
    assert {" the", "a", "7"} <= set(kept)
    for token in kept:
        assert re.search(r"\w", token) and "\ufffd" not in token
    punctuation = tokenizer.convert_tokens_to_ids("?")
    half_an_emoji = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("😀")[0])
    assert vocabulary.token(punctuation) is vocabulary.token(half_an_emoji) is None


@pytest.mark.parametrize("scheme", ["byte level", "first", "always", "normalizer"])
def test_a_token_keeps_the_blank_it_has_inside_a_text(scheme):
    if scheme == "byte level":
        tokenizer = byte_level_tokenizer(BASES["mistral"])
    else:  # with the decoder that SentencePiece models of Llama and Mistral are converted to
        tokenizer = metaspace_tokenizer(scheme)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    tokens = ClaraTokens(tokenizer, CLaRaConfig(doc_max_length=16, compr_rate=4))
    vocabulary = Vocabulary(tokens)
    text = "They swim well and the river"
    read_tokens = [vocabulary.token(i) for i in tokens.plain_ids([text])[0]]
    assert "".join(token or " " for token in read_tokens).strip() == text
    pieces = {piece: vocabulary.token(i) for piece, i in tokenizer.get_vocab().items()}
    assert all(token[0].isspace() == (piece[0] in "▁Ġ") for piece, token in pieces.items() if token)
    assert any(token[0].isspace() for token in pieces.values() if token)


def test_a_token_occurs_as_a_word_or_as_a_piece_whatever_its_case(vocabulary):
    found = vocabulary.occurring("Read the CAPITAL, Zürich: 1867")
    assert {"read", "the", "capital", "zürich", "1867"} <= found
    pieces = {vocabulary.token(i) for i in vocabulary.tokens.plain_ids(["Zürich"])[0]}
    assert "Z" in pieces and "z" in found
    assert "apit" not in found and "th" not in found
    assert not {"", " ", ",", ":"} & found


def test_a_question_that_spells_special_tokens_is_plain_text(model, vocabulary):
    text = "<MEM0> </s> <SEP> Who?"
    assert {"mem0", "sep", "0"} <= vocabulary.occurring(text)
    question = Question(text, ["<ENC>"], ["<ENC>"])
    reading = read(vocabulary, question, *(x[0] for x in lens(model, [text], 20)))
    assert reading.gathered and not any(t.token.startswith("<") for t in reading.gathered)


def test_forms_of_a_token_are_gathered_over_slots_at_the_best_raw_rank(vocabulary):
    the, upper, lower = (id_of(vocabulary, token) for token in (" the", "T", "t"))
    special = vocabulary.tokenizer.convert_tokens_to_ids("<MEM0>")
    ids_LT = torch.tensor([[special, the, upper], [lower, special, the], [special, special, special]])
    logits_LT = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    reading = read(vocabulary, Question("Is it the one?", ["x T y"]), ids_LT, logits_LT)
    assert reading.slots == [
        [SlotToken(" the", 2, 2.0), SlotToken("T", 3, 1.0)],
        [SlotToken("t", 1, 3.0), SlotToken(" the", 3, 1.0)],
        [],
    ]
    in_question = "t" in vocabulary.occurring("Is it the one?")
    assert reading.gathered == [GatheredToken("t", 1, 2, in_question, True), GatheredToken("the", 2, 2, True, False)]


def test_without_a_gold_passage_nothing_is_said_about_it(vocabulary):
    ids_LT = torch.tensor([[id_of(vocabulary, " the")]])
    (token,) = read(vocabulary, Question("Which?"), ids_LT, torch.ones(1, 1)).gathered
    assert token.in_gold is None and token.in_question is False


def test_shares_are_means_over_questions_and_chance_is_that_of_other_passages(vocabulary):
    tokens = [GatheredToken(t, 1, 1, False, None) for t in ("warsaw", "Penguins", "violin", "zzz")]
    asked = GatheredToken("born", 1, 1, True, None)
    curie, violin = DOCS[0], DOCS[2]
    questions = [Question("born?", [curie], [curie, violin]), Question("?", [], [violin]), Question("who?", [curie])]
    readings = [Reading("born?", 1, [], [asked, *tokens[:3]]), Reading("?", 0, [], tokens), Reading("who?", 1, [], [])]
    # Question 1: warsaw of three absent ones is in the gold passage, violin in the only other one.
    expected = {"questions": 3, "absent": (3 / 4 + 1) / 2, "questions_with_gold": 1}
    expected |= {"absent_in_gold": 1 / 3, "absent_in_random": 1 / 3}
    assert summarise(vocabulary, questions, readings) == pytest.approx(expected)
    readings[0].gathered.pop(1)
    without_warsaw = summarise(vocabulary, questions, readings)
    assert (without_warsaw["absent_in_gold"], without_warsaw["absent_in_random"]) == (0, pytest.approx(1 / 2))


def test_markup_and_control_characters_are_shown_not_obeyed():
    nasty = "<script>alert('&')</script>\x1b[31m\u202e"
    reading = Reading(nasty, 1, [[SlotToken(nasty, 1, 0.0)]], [GatheredToken(nasty, 1, 1, False, True)])
    summary = {"questions": 1, "absent": 1.0, "questions_with_gold": 0, "absent_in_gold": None}
    page = html_report([reading], summary, 5)
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "table" in seen and "script" not in seen
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 3
    for text in (page, text_report([reading], 5)):
        assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m\\u202e" in text
    assert printable("a\n b\t") == "a b"


def test_a_query_reasoner_is_looked_for_in_both_formats(tmp_path, checkpoint):
    check_query_reasoner(checkpoint)
    check_query_reasoner(PUBLIC / "c8_stage2")
    for root in (PUBLIC / "c8_stage1_2", tmp_path):
        with pytest.raises(ValueError, match="no query reasoner: give a checkpoint of stage2"):
            check_query_reasoner(root)


def test_the_command_prints_and_writes_the_same_tokens(checkpoint, questions_file, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    main(["--checkpoint", str(checkpoint), "--questions", str(questions_file), "--output_dir", str(out), "--top", "30"])
    printed = capsys.readouterr().out
    result = json.loads((out / "logit_lens.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in out.iterdir()) == ["logit_lens.html", "logit_lens.json", "logit_lens.png"]
    assert (out / "logit_lens.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [q["question"] for q in result["questions"]] == QUESTIONS
    model = CLaRa.from_pretrained(checkpoint)
    ids_BLT, _ = lens(model, QUESTIONS, 30)
    vocabulary = Vocabulary(model.tokens)
    for question, ids_LT in zip(result["questions"], ids_BLT, strict=True):
        expected = [[t for t in map(vocabulary.token, row) if t] for row in ids_LT.tolist()]
        assert [[t["token"] for t in slot] for slot in question["slots"]] == expected
        assert question["gold_passages"] == 1 and question["question"] in printed
    summary = result["summary"]
    assert summary["questions_with_gold"] == 3 and 0 < summary["absent"] <= 1
    assert f"{summary['absent']:.1%} of the gathered tokens are absent" in printed
    assert f"open {out}/logit_lens.html" in printed


def test_questions_may_be_given_as_texts_and_nothing_is_written_unasked(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--checkpoint", str(checkpoint), "--question", *QUESTIONS, "--max_questions", "2", "--show", "3"])
    printed = capsys.readouterr().out
    assert "question 2 of 2: " + QUESTIONS[1] in printed and QUESTIONS[2] not in printed
    slots = [line for line in printed.splitlines() if line.startswith("  slot")]
    assert len(slots) == 8 and all(line.count(" · ") <= 2 for line in slots)
    assert list(tmp_path.iterdir()) == []


def test_a_long_table_with_strange_tokens_is_drawn(tmp_path):
    tokens = [GatheredToken(t, 1, 1, i % 2 == 0, i % 3 == 0) for i, t in enumerate(["$\\x$", "東京", "word" * 9] * 30)]
    readings = [Reading("Why $1 and $2? " * 12, 1, [], tokens)] * 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of characters that its font lacks
        draw(readings, 12, tmp_path / "table.png")
    assert [p.name for p in tmp_path.iterdir()] == ["table.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question", "Who?", " "], "question 2 is empty or not UTF-8"),
        (["--question", "caf\udce9"], "question 1 is empty or not UTF-8"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl does not exist: give --questions"),
        (["--questions", "bad.jsonl"], "bad.jsonl:1: docs is missing"),
        (["--questions", "empty.jsonl"], "empty.jsonl holds no question"),
        (["--question", "Who?", "--top", "0"], "--top counts from 1"),
        (["--question", "Who?", "--questions", "bad.jsonl"], "not allowed with"),
        ([], "one of the arguments --questions --question is required"),
        (["--question", "Who?", "--checkpoint", "nowhere"], "nowhere is no directory"),
        (["--question", "Who?", "--checkpoint", "."], "config.json is missing"),
        (["--question", "Who?", "--checkpoint", "CHECKPOINT", "--model_path", "./no"], "--model_path"),
        (["--question", "Who?", "--checkpoint", "STAGE1", "--model_path", "BASE"], "no query reasoner"),
        (["--question", "Who?", "--checkpoint", "CHECKPOINT", "--output_dir", "bad.jsonl"], "another --output_dir"),
    ],
)
def test_mistakes_are_one_line_before_any_model_loads(
    flags, message, checkpoint, mistral, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLaRa, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    Path("bad.jsonl").write_text('{"question": "Who?", "answer": "I"}\n')
    Path("empty.jsonl").write_text("\n")
    places = {"CHECKPOINT": str(checkpoint), "STAGE1": str(PUBLIC / "c8_stage1"), "BASE": str(mistral)}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        main(flags if "--checkpoint" in flags else ["--checkpoint", str(checkpoint), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("logit_lens: ") and error.count("\n") == 1
