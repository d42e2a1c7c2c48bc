"""Training files of the small model's plan, made from the data in the layout of docs/REPRODUCTION_GUIDE.md.

Contract: `prepare` writes each file once, whole, and the same from the same data. Trains nothing; reproduce_small.py
says which run reads which file.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reproduction_parts import Further, Part

from openrlhf.utils.logging import write_whole

TRAIN_FILES = ("train/stage1_train.jsonl", "train/instruction_train.jsonl", "train/e2e_train.jsonl")
HELD_OUT = "train/stage1_val.jsonl"
POOL, CORPUS = "extra/e2e_all_ids.jsonl", "extra/train_corpus.jsonl"
SHORTEST_OPENING, LONGEST_OPENING, HELD_OUT_OPENINGS = 16, 128, 100
LONGEST_WORDS = 64
FULL_LENGTHS = 48, 124  # tokens of texts that fill a document
ASKED = 6  # questions of a set about words that follow
CANDIDATES = 20


def rows(path: Path) -> Iterator[dict]:
    """The records of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_rows(path: Path, records: list[dict]) -> None:
    """A JSONL file, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def body(passage: str) -> str:
    """A passage without its title."""
    return passage.split("\n", 1)[-1]


def openings(passages: list[str], tokenizer: Any, full: bool = False) -> list[str]:
    """The first tokens of each passage's body, in an order drawn with a fixed seed."""
    rng = random.Random(0)
    passages = list(passages)
    rng.shuffle(passages)
    bodies = list(map(body, passages))
    return cut(bodies, [length(rng, LONGEST_OPENING, full) for _ in bodies], tokenizer)


def words(passages: list[str], tokenizer: Any, full: bool = False) -> list[dict]:
    """Words of each passage's body in no order, cut as openings are, to be said again. Of a text one can guess most
    words from those before them; these one has to read."""
    rng = random.Random(1)
    texts, lengths = [], []
    for passage in passages:
        drawn = body(passage).split()
        rng.shuffle(drawn)
        texts.append(" ".join(drawn))
        lengths.append(length(rng, LONGEST_WORDS, full))
    return list(map(again, cut(texts, lengths, tokenizer)))


def length(rng: random.Random, longest: int, full: bool) -> int:
    """Tokens of a text to be said again: many short ones and few long ones (the logarithm is uniform), or `full`."""
    if full:
        return rng.randint(*FULL_LENGTHS)
    return round(SHORTEST_OPENING * (longest / SHORTEST_OPENING) ** rng.random())


def cut(texts: list[str], lengths: list[int], tokenizer: Any) -> list[str]:
    """The first tokens of each text that has any."""
    if not texts:  # the tokenizer cannot
        return []
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return [str(tokenizer.decode(row[:n])).strip() for row, n in zip(ids, lengths, strict=True) if row]


def again(text: str) -> dict:
    """A record of stage 1 that says its document again, word by word."""
    return {"data_type": "paraphrase", "question": "", "answers": [text], "docs": [text]}


def each(record: dict) -> list[dict]:
    """The questions of a QA set one by one, over its document alone: records of stage 1_2."""
    return [
        {
            "question": question,
            "docs": record["docs"],
            "golden_answers": [answer],
            "answer": answer,
            "pos_index": [0],
        }
        for question, answer in zip(record["question"], record["answers"], strict=True)
    ]


def single(record: dict) -> list[dict]:
    """One question of a QA set, drawn by its text."""
    return [random.Random(record["docs"][0]).choice(each(record))]


def follow_sets(passages: list[str], tokenizer: Any, full: bool = False) -> list[dict]:
    """Sets of questions over one text which two to six words follow four of its words, as stage 1 has sets. They need
    no labels. In every second text the words are in no order, so that the answers cannot be guessed from the words
    before them."""
    rng, texts = random.Random(3), []
    for number, passage in enumerate(passages):
        drawn = body(passage).split()
        if number % 2:
            rng.shuffle(drawn)
        texts.append(" ".join(drawn))
    found = []
    for text in cut(texts, [length(rng, LONGEST_WORDS, full) for _ in texts], tokenizer):
        drawn = text.split()[:-1]  # the last may be cut
        places = range(4, len(drawn) - 2)
        if not places:
            continue
        some = rng.sample(places, min(len(places), ASKED))
        asked = [f'Which words follow "{" ".join(drawn[i - 4 : i])}"?' for i in some]
        answers = [" ".join(drawn[i : i + rng.randint(2, 6)]) for i in some]
        found.append({"data_type": "qa", "question": asked, "answers": answers, "docs": [text]})
    return found


def over_corpus(records: list[dict], corpus: list[str]) -> list[dict]:
    """The end-to-end questions whose gold passages are in a corpus, with those of their candidates that are in it and
    others drawn from it: many questions over few passages, so that these are compressed once for all of them."""
    rng, known, found = random.Random(4), set(corpus), []
    for record in records:
        gold = {record["docs"][i] for i in record["pos_index"]}
        if not gold or not gold <= known:
            continue
        docs = list(dict.fromkeys(doc for doc in record["docs"] if doc in known))
        docs += [doc for doc in rng.sample(corpus, CANDIDATES) if doc not in docs][: max(0, CANDIDATES - len(docs))]
        rng.shuffle(docs)
        found.append({**record, "docs": docs, "pos_index": [i for i, doc in enumerate(docs) if doc in gold]})
    return found


def evaluated(data: Path, questions: int | None) -> Iterator[str]:
    """The candidates of the first so many questions of each end-to-end evaluation file."""
    for path in sorted((data / "eval" / "e2e").glob("*/*.jsonl")):
        for record in list(rows(path))[:questions]:
            yield from record["docs"]


def left_for(more: Further, kind: str, target: Path) -> list[dict]:
    """What a further run of stage 1 has of a kind of data: records that were not used before it."""
    if kind == "openings":
        return list(rows(target / "warm_up.jsonl"))[::-1][more.openings :]
    if kind != "stage1":
        return list(rows(target / f"{kind}.jsonl"))[more.made :]
    found = list(rows(target / "stage1_short.jsonl"))
    if more.long:
        used = {row["docs"][0] for row in found}
        found = [row for row in rows(target / "stage1.jsonl") if row["docs"][0] not in used][::-1]
    return found[more.passages :]


def prepare(data: Path, target: Path, base: str, part: Part) -> None:
    """Training files from the layout of the guide, each made once.

    stage1.jsonl has the passages of at most `part.doc_max_length` tokens, stage1_qa.jsonl leaves its paraphrases out;
    stage1_short.jsonl has those of at most `part.short` tokens, turned round, so that what was not used yet comes
    first. warm_up.jsonl says the openings of passages again, word by word. For each further run of stage 1,
    stage1_RUN.jsonl and openings_RUN.jsonl (turned round, too) go on behind what was used of them, or stage1_RUN.jsonl
    has the passages that are not short; words.jsonl has words in no order, follow.jsonl sets of questions which words
    follow, and words_RUN.jsonl and follow_RUN.jsonl go on behind what was used of these. For `part.again`,
    openings_full.jsonl, words_full.jsonl and follow_full.jsonl are of the passages that stage1.jsonl leaves out, and
    fill a document; instruction_full.jsonl has all questions of all QA sets of stage1.jsonl.
    instruction.jsonl mixes the instruction file with single questions over the short passages; e2e.jsonl has the
    questions of the end-to-end file and the other training questions of the pool, with their passages written out, or,
    with `part.corpus`, those of them that can be asked over the candidates of the first so many; corpus.jsonl then has
    these passages and those of the evaluation. All are shuffled with a fixed seed.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def at_most(records: list[dict], longest: int) -> list[dict]:
        ids = tokenizer([record["docs"][0] for record in records], add_special_tokens=False).input_ids
        return [record for record, row in zip(records, ids, strict=True) if len(row) <= longest]

    def shuffled(records: list[dict]) -> list[dict]:
        random.Random(0).shuffle(records)
        return records

    first = data / TRAIN_FILES[0]
    if not (target / "stage1.jsonl").is_file():
        write_rows(target / "stage1.jsonl", at_most(shuffled(list(rows(first))), part.doc_max_length))
    if not (target / "stage1_qa.jsonl").is_file():
        found = [record for record in rows(target / "stage1.jsonl") if record["data_type"] == "qa"]
        write_rows(target / "stage1_qa.jsonl", found)
    for name, source, limit in (("warm_up", first, None), ("warm_up_held_out", data / HELD_OUT, HELD_OUT_OPENINGS)):
        if not (target / f"{name}.jsonl").is_file():
            starts = openings([record["docs"][0] for record in rows(source)], tokenizer)[:limit]
            write_rows(target / f"{name}.jsonl", list(map(again, starts)))
    if not (target / "stage1_short.jsonl").is_file():
        write_rows(target / "stage1_short.jsonl", at_most(list(rows(target / "stage1.jsonl")), part.short)[::-1])
    for name, made in (("words", words), ("follow", follow_sets)) if part.further else ():
        if not (target / f"{name}.jsonl").is_file():
            passages = [record["docs"][0] for record in rows(target / "stage1.jsonl")]
            write_rows(target / f"{name}.jsonl", made(passages, tokenizer))
    for which, more in part.further.items():
        for kind, name in more.files(which).items():
            if not (target / name).is_file():
                write_rows(target / name, left_for(more, kind, target))
    if part.again and not (target / "openings_full.jsonl").is_file():
        short = {record["docs"][0] for record in rows(target / "stage1.jsonl")}
        passages = [record["docs"][0] for record in rows(first) if record["docs"][0] not in short]
        write_rows(target / "stage1_full.jsonl", left_for(part.again.stage1, "stage1", target))
        write_rows(target / "words_full.jsonl", words(passages, tokenizer, full=True))
        write_rows(target / "follow_full.jsonl", follow_sets(passages, tokenizer, full=True))
        write_rows(target / "openings_full.jsonl", list(map(again, openings(passages, tokenizer, full=True))))
    mixes = {"instruction": ("stage1_short", single, part.single)}
    if part.again:
        mixes["instruction_full"] = ("stage1", each, part.again.single)
    for name, (source, taken, per_record) in mixes.items():
        if not (target / f"{name}.jsonl").is_file():
            records = list(rows(data / TRAIN_FILES[1]))
            sets = [row for row in rows(target / f"{source}.jsonl") if row["data_type"] == "qa"]
            questions = [question for row in sets for question in taken(row)]
            n = min(len(records), len(questions) // per_record)
            write_rows(target / f"{name}.jsonl", shuffled(shuffled(records)[:n] + questions[: n * per_record]))
    searched = ("e2e.jsonl", "corpus.jsonl") if part.corpus else ("e2e.jsonl",)
    if not all((target / name).is_file() for name in searched):
        records = list(rows(data / TRAIN_FILES[2]))
        if (data / POOL).is_file():
            asked = {record["question"] for record in records}
            passages = {row["id"]: row["text"] for row in rows(data / CORPUS)}
            for row in rows(data / POOL):
                if row["split"] == "train" and row["question"] not in asked:
                    kept = {key: row[key] for key in ("question", "golden_answers", "answer", "pos_index")}
                    records.append({**kept, "docs": [passages[i] for i in row["doc_ids"]]})
        records = shuffled(records)
        if part.corpus:
            corpus = list(dict.fromkeys(doc for record in records[: part.corpus] for doc in record["docs"]))
            records = over_corpus(records, corpus)
            read = dict.fromkeys([*corpus, *evaluated(data, part.questions)])
            write_rows(target / "corpus.jsonl", [{"id": str(i), "text": doc} for i, doc in enumerate(read)])
        write_rows(target / "e2e.jsonl", records)
