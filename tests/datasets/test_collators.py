"""Records to batches: labels, documents, draws, padding, cuts, and what is counted."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from openrlhf.datasets.collators import COLLATORS, IGNORE, Collator, RetrievedCollator
from openrlhf.datasets.records import RETRIEVED, record_rows
from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import DEFAULT_PROMPTS
from openrlhf.models.tokens import ClaraTokens
from tests.trainer.facts import DOCS, FACTS, candidates, paraphrase, qa, records

BASE_MODEL = Path(__file__).parents[1] / "data" / "vectors" / "decoders" / "sys"
LONG = " ".join(DOCS)
L = 4


@pytest.fixture(scope="module")
def tokens():
    config = CLaRaConfig(doc_max_length=32, compr_rate=8, prompts=DEFAULT_PROMPTS)
    return ClaraTokens(AutoTokenizer.from_pretrained(BASE_MODEL), config)


def collator(tokens: ClaraTokens, stage: str, k: int = 2, max_len: int = 512, seed: int = 7) -> Collator:
    """The collator of a stage."""
    return COLLATORS[stage](tokens, stage, max_len, 1 if stage == "stage1" else k, seed)


def rows(stage: str, lines: list[dict]) -> list[dict]:
    """Records as the trainer hands them on: read, with their index."""
    read = [row for line in lines for row in record_rows(line, stage)]
    return [{**row, "index": index} for index, row in enumerate(read)]


def text(tokens: ClaraTokens, ids: torch.Tensor) -> str:
    """What the ids say."""
    return tokens.tokenizer.decode(ids)


def answers(tokens: ClaraTokens, batch: dict) -> list[str]:
    """What each row is taught to say."""
    return [text(tokens, labels[labels != IGNORE]) for labels in batch["labels"]]


def prompts(tokens: ClaraTokens, batch: dict) -> list[str]:
    """What each row is taught from."""
    seen = batch["dec_attention_mask"].bool() & (batch["labels"] == IGNORE)
    return [text(tokens, ids[keep]) for ids, keep in zip(batch["dec_input_ids"], seen, strict=True)]


def documents(tokens: ClaraTokens, batch: dict) -> list[str]:
    """Text of each compressor input, without its special tokens."""
    kept = [
        ids[mask.bool()][:-L] for ids, mask in zip(batch["enc_input_ids"], batch["enc_attention_mask"], strict=True)
    ]
    return [tokens.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in kept]


def slots(tokens: ClaraTokens, batch: dict) -> list[int]:
    """Documents each generator input has room for."""
    return [int((ids == tokens.sep_id).sum()) for ids in batch["dec_input_ids"]]


def ends(tokens: ClaraTokens) -> str:
    """The end-of-turn token."""
    return tokens.tokenizer.eos_token


def test_labels_are_the_answer_and_its_end_of_turn_token_and_nothing_else(tokens):
    batch = collator(tokens, "stage2")(rows("stage2", [candidates(0), candidates(1)]), epoch=0)
    said = answers(tokens, batch)
    assert [answer.strip() for answer in said] == ["In Warsaw" + ends(tokens), "Ten" + ends(tokens)]
    learnt = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][learnt], batch["dec_input_ids"][learnt])
    assert bool((batch["dec_attention_mask"][learnt] == 1).all())
    assert "Where was Marie Curie born?" in prompts(tokens, batch)[0] and "Warsaw" not in prompts(tokens, batch)[0]


def test_a_qa_set_is_taught_as_question_and_answer_lines(tokens):
    record = {**qa(0), "question": ["Where?", "When?"], "answers": ["In Warsaw", "In 1867"]}
    batch = collator(tokens, "stage1")(rows("stage1", [record]), epoch=0)
    said = "Question: Where?\nAnswer: In Warsaw\nQuestion: When?\nAnswer: In 1867" + ends(tokens)
    assert answers(tokens, batch)[0].strip() == said
    assert slots(tokens, batch) == [1]


def test_qa_sets_and_paraphrases_share_a_batch(tokens):
    batch = collator(tokens, "stage1")(rows("stage1", [qa(0), paraphrase(1)]), epoch=0)
    said = answers(tokens, batch)
    assert said[0].strip() == f"Question: {FACTS[0][1]}\nAnswer: {FACTS[0][2]}{ends(tokens)}"
    assert said[1].strip() == FACTS[1][3] + ends(tokens)
    assert documents(tokens, batch) == DOCS[:2]
    assert batch["stage"] == "stage1" and batch["docs_per_question"].tolist() == [1, 1]


def test_stage1_2_takes_the_first_k_documents_and_counts_the_rest(tokens):
    batch = collator(tokens, "stage1_2", k=3)(rows("stage1_2", [candidates(1, 5), candidates(0, 4)]), epoch=0)
    assert documents(tokens, batch) == candidates(1, 5)["docs"][:3] + candidates(0, 4)["docs"][:3]
    assert (slots(tokens, batch), batch["docs_per_question"].tolist()) == ([3, 3], [3, 3])
    assert batch["counts"]["docs_left_out"] == 2 + 1
    assert batch["pos_index"] == [[1], [0]]


def text_ids(tokens: ClaraTokens, record: dict, docs: list[str]) -> tuple[list[int], list[int]]:
    """(prompt, answer and its end of turn) of a record read as text, by the tokenizer's own chat template."""
    prompts, tokenizer = tokens.config.prompts, tokens.tokenizer
    user = "Background:\n" + "\n\n".join(docs) + f"\n\nQuestion:{record['question']}"
    turns = [{"role": "system", "content": prompts["answer_system"]}, {"role": "user", "content": user}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    turns.append({"role": "assistant", "content": record["gold_answer"]})
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    return start, whole[len(start) : len(whole) - whole[::-1].index(tokenizer.eos_token_id)]


def test_text_rag_is_the_text_prompt_and_the_answer(tokens):
    records = [candidates(0, 3), candidates(1, 2), {**candidates(2, 2), "docs": [DOCS[2], LONG]}]
    batch = collator(tokens, "text_rag", k=3)(rows("text_rag", records), epoch=0)
    assert not any(key.startswith(("enc", "query")) for key in batch) and batch["stage"] == "text_rag"
    width, cut = batch["dec_input_ids"].shape[1], tokens.seen_text(LONG)
    assert cut != LONG and LONG.startswith(cut) and len(tokens.plain_ids([cut])[0]) == tokens.text_limit
    for row, record in enumerate(records):
        docs = [DOCS[2], cut] if row == 2 else record["docs"]
        start, answer = text_ids(tokens, record, docs)
        assert start == tokens.text_prompt(record["question"], docs).ids
        padding = width - len(start) - len(answer)
        assert batch["dec_input_ids"][row].tolist() == [tokens.pad_id] * padding + start + answer
        assert batch["dec_attention_mask"][row].tolist() == [0] * padding + [1] * (width - padding)
        assert batch["labels"][row].tolist() == [IGNORE] * (width - len(answer)) + answer
    assert batch["counts"]["docs_cut"] == 1
    assert batch["n_tokens"] == int(batch["dec_attention_mask"].sum())
    assert batch["loss_count"] == int((batch["labels"] != IGNORE).sum())
    assert batch["docs_per_question"].tolist() == [3, 2, 2]


@pytest.mark.parametrize(
    ("positives", "kept"),
    [
        ([], [0, 1, 2]),
        (None, [0, 1, 2]),
        ([4], [0, 1, 4]),
        ([1, 4], [0, 1, 4]),
        ([2, 3, 4], [2, 3, 4]),
        ([0, 2, 3, 4], [0, 2, 3]),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_text_rag_reads_the_positives_and_the_first_others_in_their_order(tokens, positives, kept, train):
    record = {**candidates(0, 5), "pos_index": positives}
    batch = collator(tokens, "text_rag", k=3)(rows("text_rag", [record]), epoch=3, train=train)
    expected = text_ids(tokens, record, [record["docs"][i] for i in kept])[0]
    mask = batch["dec_attention_mask"][0].bool() & (batch["labels"][0] == IGNORE)
    assert batch["dec_input_ids"][0][mask].tolist() == expected
    assert batch["pos_index"] == [[kept.index(i) for i in positives or [] if i in kept]]
    assert batch["counts"]["docs_left_out"] == 2


def test_text_rag_cuts_answers_and_counts_them_and_lost_samples_teach_nothing(tokens):
    record = {**candidates(0, 2), "gold_answer": "In Warsaw, the town on the Vistula"}
    start, answer = text_ids(tokens, record, record["docs"])
    for max_len, cut, lost in (
        (len(start) + len(answer), 0, 0),
        (len(start) + 3, 1, 0),
        (len(start), 0, 1),
        (30, 0, 1),
    ):
        batch = collator(tokens, "text_rag", max_len=max_len)(rows("text_rag", [record]), epoch=0)
        assert (batch["counts"]["answers_cut"], batch["counts"]["answers_lost"]) == (cut, lost)
        assert batch["dec_input_ids"].tolist() == [(start + answer)[:max_len]]
        assert batch["loss_count"] == max(0, max_len - len(start))


def test_positions_beyond_the_first_k_documents_are_dropped(tokens):
    batch = collator(tokens, "stage1_2", k=2)(rows("stage1_2", [{**candidates(3), "pos_index": [1, 3]}]), epoch=0)
    assert batch["pos_index"] == [[1]]


@pytest.mark.parametrize("stage", ["stage1_2", "stage2"])
def test_fewer_documents_than_k_use_fewer_slots(tokens, stage):
    batch = collator(tokens, stage, k=3)(rows(stage, [candidates(0, 1), candidates(1, 2), candidates(2, 3)]), epoch=0)
    assert slots(tokens, batch) == [1, 2, 3] == batch["docs_per_question"].tolist()
    assert batch["counts"]["docs_left_out"] == 0


def test_stage2_reads_all_candidates_but_has_k_slots(tokens):
    batch = collator(tokens, "stage2", k=2)(rows("stage2", [candidates(0, 5), candidates(1, 3)]), epoch=0)
    assert slots(tokens, batch) == [2, 2]
    assert batch["docs_per_question"].tolist() == [5, 3] and len(batch["enc_input_ids"]) == 8


STAGE2 = rows("stage2", [{**candidates(i, 8), "pos_index": [i % 8, (i + 3) % 8]} for i in range(6)])


def order(tokens: ClaraTokens, epoch: int, train: bool = True, seed: int = 7, row: slice = slice(None)) -> list[str]:
    """Documents in the order in which the batch has them."""
    return documents(tokens, collator(tokens, "stage2", seed=seed)(STAGE2[row], epoch, train))


def test_candidates_are_shuffled_in_training_and_positions_follow_them(tokens):
    batch = collator(tokens, "stage2")(STAGE2, epoch=0)
    shown = documents(tokens, batch)
    assert shown != [doc for row in STAGE2 for doc in row["docs"]]
    for number, row in enumerate(STAGE2):
        mine = shown[8 * number : 8 * number + 8]
        assert sorted(mine) == sorted(row["docs"])
        positives = {mine[i] for i in batch["pos_index"][number]}
        assert positives == {row["docs"][i] for i in row["pos_index"]}
        assert batch["pos_index"][number] == sorted(batch["pos_index"][number])


def test_the_shuffle_is_a_function_of_seed_epoch_and_record(tokens):
    assert order(tokens, 0) == order(tokens, 0)
    assert order(tokens, 0) != order(tokens, 1)
    assert order(tokens, 0) != order(tokens, 0, seed=8)
    assert order(tokens, 0, row=slice(3, 4)) == order(tokens, 0)[24:32]  # whatever else is in the batch


def test_nothing_is_shuffled_in_evaluation(tokens):
    batch = collator(tokens, "stage2")(STAGE2, epoch=0, train=False)
    assert documents(tokens, batch) == [doc for row in STAGE2 for doc in row["docs"]]
    assert batch["pos_index"] == [row["pos_index"] for row in STAGE2]


PARAPHRASES = rows("stage1", [paraphrase(i) for i in range(20)])


def instructions(tokens: ClaraTokens, epoch: int, train: bool, seed: int = 7) -> list[str]:
    """The prompts of the paraphrases, without their documents."""
    batch = collator(tokens, "stage1", seed=seed)(PARAPHRASES, epoch, train)
    return prompts(tokens, batch)


def test_paraphrase_instructions_are_drawn_by_the_seed_in_training(tokens):
    drawn = instructions(tokens, 0, train=True)
    assert len(set(drawn)) > 3
    assert drawn == instructions(tokens, 0, train=True)
    assert drawn != instructions(tokens, 1, train=True)
    assert drawn != instructions(tokens, 0, train=True, seed=8)


def test_evaluation_always_uses_the_first_paraphrase_instruction(tokens):
    (used,) = set(instructions(tokens, 0, train=False)) | set(instructions(tokens, 1, train=False))
    before, after = DEFAULT_PROMPTS["paraphrase_instructions"][0].split("{docs}")
    assert before.strip() in used and after.strip() in used


@pytest.mark.parametrize("max_len", [1, 20, 60, 70])
@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2"])
def test_max_len_never_cuts_inside_the_documents(tokens, stage, max_len):
    lines = records(stage, 6)
    batch = collator(tokens, stage, max_len=max_len)(rows(stage, lines), epoch=0)
    whole = collator(tokens, stage)(rows(stage, lines), epoch=0)
    memory = set(tokens.memory_ids)
    for ids, full in zip(batch["dec_input_ids"].tolist(), whole["dec_input_ids"].tolist(), strict=True):
        assert [i for i in ids if i in memory] == [i for i in full if i in memory]
    after_memory = max(max(i for i, t in enumerate(ids) if t in memory) for ids in batch["dec_input_ids"].tolist()) + 1
    assert batch["dec_input_ids"].shape[1] <= max(max_len, after_memory)


@pytest.mark.parametrize(
    ("missing", "counted"), [("none", (0, 0)), ("last", (1, 0)), ("but one", (1, 0)), ("all", (0, 1))]
)
def test_cut_and_lost_answers_are_counted_and_the_lost_ones_teach_nothing(tokens, missing, counted):
    lines = rows("stage1_2", [candidates(5, 2)])
    whole = collator(tokens, "stage1_2")(lines, epoch=0)
    length, taught = whole["dec_input_ids"].shape[1], whole["loss_count"]
    less = {"none": 0, "last": 1, "but one": taught - 1, "all": taught}[missing]
    batch = collator(tokens, "stage1_2", max_len=length - less)(lines, epoch=0)
    assert (batch["counts"]["answers_cut"], batch["counts"]["answers_lost"]) == counted
    assert batch["loss_count"] == taught - less == int((batch["labels"] != IGNORE).sum())
    assert torch.equal(batch["dec_input_ids"], whole["dec_input_ids"][:, : length - less])


def test_cut_documents_are_counted_but_not_those_that_just_fit(tokens):
    words = tokens.plain_ids([LONG])[0]
    just = next(LONG[:n] for n in range(len(LONG)) if len(tokens.plain_ids([LONG[:n]])[0]) == 32)
    assert len(words) > 40
    batch = collator(tokens, "stage1")(rows("stage1", [{**qa(0), "docs": [d]} for d in (just, LONG, DOCS[2])]), 0)
    assert batch["counts"]["docs_cut"] == 1
    assert batch["enc_input_ids"].shape[1] == 32 + 3 + L


@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2"])
def test_documents_are_padded_to_the_longest_of_the_batch_only(tokens, stage):
    docs = DOCS[2:3] if stage == "stage1" else [DOCS[2], DOCS[9]]
    batch = collator(tokens, stage)(rows(stage, [{**records(stage)[0], "docs": docs}]), epoch=0)
    longest = max(len(ids) for ids in tokens.encoder_rows(docs))
    assert batch["enc_input_ids"].shape[1] == longest + L < 32 + 3 + L
    assert int(batch["enc_attention_mask"].sum(1).max()) == longest + L
    assert int(batch["dec_attention_mask"].sum(1).max()) == batch["dec_input_ids"].shape[1]


def test_queries_are_padded_to_the_longest_query(tokens):
    lines = rows("stage2", [candidates(2), candidates(5)])
    batch = collator(tokens, "stage2")(lines, epoch=0)
    lengths = [len(ids) + L for ids in tokens.encoder_rows([FACTS[2][1], FACTS[5][1]])]
    assert batch["query_attention_mask"].sum(1).tolist() == lengths
    assert batch["query_input_ids"].shape[1] == max(lengths)
    assert batch["query_input_ids"][:, -L:].tolist() == [tokens.memory_ids] * 2


def test_padding_carries_no_label_and_no_attention(tokens):
    batch = collator(tokens, "stage1")(rows("stage1", [qa(2), qa(5)]), epoch=0)
    pads = batch["dec_attention_mask"] == 0
    assert bool(pads.any()) and bool((batch["labels"][pads] == IGNORE).all())
    assert bool((batch["dec_input_ids"][pads] == tokens.pad_id).all())


def test_attended_tokens_of_all_inputs_are_counted(tokens):
    batch = collator(tokens, "stage2")(rows("stage2", [candidates(0), candidates(5)]), epoch=0)
    masks = [batch[f"{name}_attention_mask"] for name in ("enc", "dec", "query")]
    assert batch["n_tokens"] == sum(int(mask.sum()) for mask in masks)


def test_retrieval_batches_count_questions_with_positives(tokens):
    lines = [candidates(0), {**candidates(1), "pos_index": []}, candidates(2)]
    batch = collator(tokens, "stage2_pretrain_retrieval")(rows("stage2_pretrain_retrieval", lines), epoch=0)
    assert batch["loss_count"] == 2


@pytest.fixture(scope="module")
def model():
    options = {"doc_max_length": 32, "compr_rate": 8, "lora_r": 4, "generation_top_k": 2, "training_stage": "stage2"}
    made = CLaRa.from_base(CLaRaConfig(decoder_model_name=str(BASE_MODEL), **options))
    made.add_query_reasoner()
    return made


@pytest.mark.parametrize("max_len", [512, 64])
@pytest.mark.parametrize("stage", ["stage1", "stage1_2", "stage2"])
def test_loss_count_is_what_the_forward_averages_over(model, stage, max_len):
    """Unequal answers; at 64 tokens some of them are cut away entirely."""
    lines = rows(stage, [candidates(i) if stage != "stage1" else paraphrase(i) for i in (0, 2, 5)])
    batch = collator(model.tokens, stage, max_len=max_len)(lines, epoch=0)
    with torch.no_grad():
        loss, out = model(batch=batch)
    targets = batch["labels"][:, 1:]
    whole = torch.nn.functional.cross_entropy(
        out["logits"][:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert float(loss) * batch["loss_count"] == pytest.approx(float(whole), rel=1e-5, abs=1e-6)


def test_loss_count_of_retrieval_is_what_the_forward_averages_over(model):
    lines = [candidates(0), {**candidates(1), "pos_index": []}, {**candidates(2), "pos_index": [1, 2]}]
    batch = collator(model.tokens, "stage2_pretrain_retrieval")(rows("stage2_pretrain_retrieval", lines), epoch=0)
    with torch.no_grad():
        loss, out = model(batch=batch)
    p = torch.softmax(out["scores"] / 0.02, dim=-1)
    whole = sum(-torch.log(p[i, found].sum()) for i, found in enumerate(batch["pos_index"]) if found)
    assert float(loss) * batch["loss_count"] == pytest.approx(float(whole), rel=1e-4)


def test_special_tokens_spelt_in_a_record_stay_text(tokens):
    trick = {**candidates(0, 2), "question": "What is <MEM0><SEP></s>?", "gold_answer": "<MEM1> is </s> text"}
    batch = collator(tokens, "stage2")(rows("stage2", [trick]), epoch=0)
    assert slots(tokens, batch) == [2]
    assert int((batch["dec_input_ids"] == tokens.memory_ids[0]).sum()) == 2
    assert answers(tokens, batch)[0].strip() == "<MEM1> is </s> text" + ends(tokens)


def test_without_documents_a_batch_is_the_same_but_for_them(tokens):
    """K documents to read, N to be fetched; prompts, labels and questions as with documents in the batch."""
    lines = records("stage2", 5)
    collate = RetrievedCollator(tokens, "stage2", 512, 2, 7, candidates=4)
    batch = collate(rows(RETRIEVED, lines), epoch=0)
    expected = collator(tokens, "stage2", k=2)(rows("stage2", lines), epoch=0)
    documents = {"enc_input_ids", "enc_attention_mask"}
    assert set(expected) - set(batch) == documents and not set(batch) - set(expected)
    for name in set(batch) - {"pos_index", "n_tokens", "counts"}:
        same = torch.equal if isinstance(batch[name], torch.Tensor) else lambda one, other: one == other
        assert same(batch[name], expected[name]), name
    assert batch["docs_per_question"].tolist() == [4] * 5 and slots(tokens, batch) == [2] * 5
    assert batch["n_tokens"] == expected["n_tokens"] - int(expected["enc_attention_mask"].sum())
    assert not any(batch["pos_index"]) and not batch["counts"]["docs_cut"]
    assert all(torch.equal(batch[name], collate(rows(RETRIEVED, lines), 1, train=False)[name]) for name in ("labels",))
