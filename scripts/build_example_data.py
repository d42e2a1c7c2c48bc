"""Build the training and evaluation files under `example/` from `example/source/`.

    python scripts/build_example_data.py [--tokenizer .models/SmolLM2-135M-Instruct]

Reads passages and questions, chooses candidate documents and writes the JSONL files of SPEC section 7, then prints a
summary. Everything is drawn from SEED, so the same sources give the same bytes. Nothing is written when a check fails.

Contract of the candidates: training files hold train passages only. A pool never holds a document twice, and no
unmarked document of a training or `with_pos` pool supports the question: passages that hold one of its gold answers,
or tell the same facts in another language, are left out. `no_pos` pools are what BM25 finds, in its order.

Knows the standard library only; the token limit is checked where the tokenizer's directory exists.
"""

import argparse
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SEED = 42
REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "example"
DEFAULT_TOKENIZER = REPOSITORY / ".models/SmolLM2-135M-Instruct"

DOC_MAX_TOKENS = 256
ENGLISH_WORDS = range(80, 181)
MIN_TRAIN_PASSAGES = 120
MIN_TRAIN_CHINESE = 10
MIN_TRAIN_QUESTIONS = 200
BM25_K1, BM25_B = 1.2, 0.75


@dataclass(frozen=True)
class PoolShape:
    """How many candidates a question gets, and how many of them are hard negatives; the rest are random."""

    size: int
    lexical: int
    same_subject: int


POOLS = {
    "instruction": PoolShape(size=5, lexical=2, same_subject=0),
    "end_to_end": PoolShape(size=20, lexical=8, same_subject=3),
}
TRAINING_FILES = {"instruction": "instruction_data.jsonl", "end_to_end": "end_to_end_data.jsonl"}
EVALUATION_FOLDERS = {
    "pretraining": "evaluation_data/pretraining_evaluation/example",
    "instruction": "evaluation_data/instruction_tuning_evaluation/example",
    "end_to_end": "evaluation_data/end_to_end_evaluation/example",
}


class DataError(Exception):
    """The sources break a rule; the message names the record."""


@dataclass(frozen=True, eq=False)
class Passage:
    """A line of passages.jsonl. `same_facts_as`: passages that tell the same in another language."""

    id: str
    lang: str
    subject: str
    split: str
    title: str
    text: str
    paraphrase: str
    qa: list[dict[str, str]]
    same_facts_as: list[str] = field(default_factory=list)

    @cached_property
    def document(self) -> str:
        return f"{self.title}\n{self.text}"

    @cached_property
    def terms(self) -> list[str]:
        return search_terms(self.document)

    @cached_property
    def words(self) -> str:
        return plain_words(self.document)


@dataclass(frozen=True)
class Question:
    """A line of questions.jsonl. `support`: ids of the passages that, together, answer it."""

    id: str
    lang: str
    use: str
    split: str
    question: str
    gold_answer: str
    golden_answers: list[str]
    answer: str
    support: list[str]


def fold(text: str) -> str:
    """Lower case without diacritics; thousands separators dropped."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return re.sub(r"(?<=\d),(?=\d)", "", "".join(c for c in decomposed if not unicodedata.combining(c)))


def search_terms(text: str) -> list[str]:
    """Words of alphabetic scripts and pairs of neighbouring Chinese characters."""
    terms = []
    for run in re.findall(r"[\u4e00-\u9fff]+|[^\W\u4e00-\u9fff]+", fold(text)):
        if "\u4e00" <= run[0] <= "\u9fff":
            terms.extend(run[i : i + 2] for i in range(max(1, len(run) - 1)))
        else:
            terms.append(run)
    return terms


def plain_words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", fold(text)))


def holds_answer(passage: Passage, question: Question) -> bool:
    """True when the passage contains a gold answer word for word; yes and no are found nowhere."""
    if question.gold_answer.lower() in ("yes", "no"):
        return False
    words = f" {passage.words} "
    for alias in question.golden_answers:
        sought = plain_words(alias)
        chinese = re.search(r"[\u4e00-\u9fff]", sought)
        if (sought in words) if chinese else (f" {sought} " in words):
            return True
    return False


class Bm25:
    """Okapi BM25 over a list of passages."""

    def __init__(self, passages: list[Passage]):
        self.passages = passages
        self.counts = [Counter(passage.terms) for passage in passages]
        self.mean_length = sum(len(p.terms) for p in passages) / len(passages)
        self.document_frequency = Counter(term for count in self.counts for term in count)

    def rank(self, query: str) -> list[tuple[float, Passage]]:
        """All passages with their scores, best first; ties, such as the zeros, in an order drawn from the query."""
        terms = set(search_terms(query))
        scored = []
        for passage, count in zip(self.passages, self.counts, strict=True):
            length_norm = BM25_K1 * (1 - BM25_B + BM25_B * len(passage.terms) / self.mean_length)
            score = math.fsum(
                self.inverse_frequency(term) * count[term] * (BM25_K1 + 1) / (count[term] + length_norm)
                for term in terms
                if term in count
            )
            scored.append((round(score, 9), passage))
        random.Random(f"{SEED}:{query}").shuffle(scored)
        return sorted(scored, key=lambda pair: -pair[0])

    def inverse_frequency(self, term: str) -> float:
        found = self.document_frequency[term]
        return math.log(1 + (len(self.passages) - found + 0.5) / (found + 0.5))


def read_lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(f"{path} is missing.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
    return records


def load_sources(source: Path) -> tuple[list[Passage], list[Question]]:
    """Reads and checks passages.jsonl and questions.jsonl. Raises DataError."""
    try:
        passages = [Passage(**record) for record in read_lines(source / "passages.jsonl")]
        questions = [Question(**record) for record in read_lines(source / "questions.jsonl")]
    except TypeError as error:
        raise DataError(f"{source}: a record has a wrong set of fields: {error}") from error
    check_sources(passages, questions)
    return passages, questions


def check_sources(passages: list[Passage], questions: list[Question]) -> None:
    by_id = {passage.id: passage for passage in passages}
    for name, values in (
        ("passage id", [p.id for p in passages]),
        ("document", [p.document for p in passages]),
        ("question id", [q.id for q in questions]),
        ("question", [q.question for q in questions]),
    ):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise DataError(f"{name} occurs twice: {repeated[0]!r}")
    for passage in passages:
        words = len(passage.text.split())
        if passage.lang == "en" and words not in ENGLISH_WORDS:
            raise DataError(f"{passage.id}: {words} words, want {ENGLISH_WORDS.start} to {ENGLISH_WORDS.stop - 1}.")
        if not passage.qa or not all(pair["q"] and pair["a"] for pair in passage.qa) or not passage.paraphrase:
            raise DataError(f"{passage.id}: question-answer pairs and a paraphrase are needed.")
        for other in passage.same_facts_as:
            if other not in by_id or by_id[other].split != passage.split:
                raise DataError(f"{passage.id}: {other}, with the same facts, must exist and be in the same split.")
    for question in questions:
        if not question.support or not all(i in by_id and by_id[i].split == question.split for i in question.support):
            raise DataError(f"{question.id}: its support must be passages of its own split.")
        if question.gold_answer != question.golden_answers[0] or question.use not in POOLS:
            raise DataError(f"{question.id}: golden_answers starts with gold_answer; use is one of {list(POOLS)}.")
        if fold(question.gold_answer) not in fold(question.answer):
            raise DataError(f"{question.id}: the answer sentence lacks the gold answer.")


def check_counts(passages: list[Passage], questions: list[Question]) -> None:
    train = [p for p in passages if p.split == "train"]
    counts = {
        "train passages": (len(train), MIN_TRAIN_PASSAGES),
        "Chinese train passages": (sum(p.lang == "zh" for p in train), MIN_TRAIN_CHINESE),
    }
    for use in POOLS:
        number = sum(q.split == "train" and q.use == use for q in questions)
        counts[f"{use} training questions"] = (number, MIN_TRAIN_QUESTIONS)
    for name, (found, wanted) in counts.items():
        if found < wanted:
            raise DataError(f"{found} {name}, at least {wanted} wanted.")


def longest_document(passages: list[Passage], tokenizer_directory: Path) -> int:
    """Tokens of the longest document. Raises DataError above DOC_MAX_TOKENS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    lengths = {p.id: len(tokenizer.encode(p.document, add_special_tokens=False).ids) for p in passages}
    worst = max(lengths, key=lengths.__getitem__)
    if lengths[worst] > DOC_MAX_TOKENS:
        raise DataError(f"{worst}: {lengths[worst]} tokens, at most {DOC_MAX_TOKENS} allowed.")
    return lengths[worst]


def same_facts(question: Question, passages: Iterable[Passage]) -> set[str]:
    """Ids of the passages that tell the same facts as a support of the question, in another language."""
    related = set()
    for passage in passages:
        if passage.id in question.support:
            related.update(passage.same_facts_as)
        elif set(passage.same_facts_as) & set(question.support):
            related.add(passage.id)
    return related - set(question.support)


def draw_pool(question: Question, index: Bm25, shape: PoolShape) -> tuple[list[Passage], list[int]]:
    """Supports, hard negatives and random passages, shuffled; and the supports' positions, ascending."""
    draw = random.Random(f"{SEED}:{question.id}")
    supports = [p for p in index.passages if p.id in question.support]
    related = same_facts(question, index.passages)
    free = [
        (score, p)
        for score, p in index.rank(question.question)
        if p not in supports and p.id not in related and not holds_answer(p, question)
    ]
    chosen = [p for score, p in free if score > 0][: shape.lexical]
    subjects = {p.subject for p in supports}
    kin = [p for _, p in free if p.subject in subjects and p not in chosen]
    chosen += draw.sample(kin, min(shape.same_subject, len(kin)))
    rest = [p for _, p in free if p not in chosen]
    pool = supports + chosen + draw.sample(rest, shape.size - len(supports) - len(chosen))
    draw.shuffle(pool)
    return pool, [i for i, p in enumerate(pool) if p in supports]


def retrieve_pool(question: Question, index: Bm25, shape: PoolShape) -> tuple[list[Passage], list[int]]:
    """What BM25 finds, best first, and the positions of the supports among it (possibly none)."""
    related = same_facts(question, index.passages)
    pool = [p for _, p in index.rank(question.question) if p.id not in related][: shape.size]
    return pool, [i for i, p in enumerate(pool) if p.id in question.support]


def stage1_records(passage: Passage) -> list[dict]:
    docs = [passage.document]
    questions, answers = [pair["q"] for pair in passage.qa], [pair["a"] for pair in passage.qa]
    return [
        {"data_type": "qa", "question": questions, "answers": answers, "docs": docs},
        {"data_type": "paraphrase", "question": "", "answers": [passage.paraphrase], "docs": docs},
    ]


def instruction_record(question: Question, pool: list[Passage]) -> dict:
    return {
        "question": question.question,
        "docs": [p.document for p in pool],
        "gold_answer": question.gold_answer,
        "answer": question.answer,
    }


def end_to_end_record(question: Question, pool: list[Passage], pos_index: list[int]) -> dict:
    return {
        "question": question.question,
        "docs": [p.document for p in pool],
        "gold_answer": question.gold_answer,
        "golden_answers": question.golden_answers,
        "answer": question.gold_answer,
        "pos_index": pos_index,
    }


def evaluation_record(question: Question, pool: list[Passage], pos_index: list[int]) -> dict:
    record = {"id": question.id, **end_to_end_record(question, pool, pos_index)}
    if question.use == "instruction":
        record["answer"] = question.answer
    return record


def build_training(passages: list[Passage], questions: list[Question]) -> dict[str, list[dict]]:
    train = [p for p in passages if p.split == "train"]
    index = Bm25(train)
    files: dict[str, list[dict]] = {"pretrain_data.jsonl": [r for p in train for r in stage1_records(p)]}
    for use, shape in POOLS.items():
        records = files[TRAINING_FILES[use]] = []
        for question in (q for q in questions if q.split == "train" and q.use == use):
            pool, pos_index = draw_pool(question, index, shape)
            if use == "instruction":
                records.append(instruction_record(question, pool))
            else:
                records.append(end_to_end_record(question, pool, pos_index))
    for name, records in files.items():
        random.Random(f"{SEED}:{name}").shuffle(records)
    return files


def build_evaluation(passages: list[Passage], questions: list[Question]) -> dict[str, list[dict]]:
    index = Bm25(passages)
    held_out = [p for p in passages if p.split == "eval"]
    files: dict[str, list[dict]] = {
        f"{EVALUATION_FOLDERS['pretraining']}/eval_processed.jsonl": [
            {"id": f"{p.id}-{record['data_type']}", **record} for p in held_out for record in stage1_records(p)
        ]
    }
    for use, shape in POOLS.items():
        chosen = [q for q in questions if q.split == "eval" and q.use == use]
        for name, make_pool in (("with_pos", draw_pool), ("no_pos", retrieve_pool)):
            files[f"{EVALUATION_FOLDERS[use]}/eval_processed_{name}.jsonl"] = [
                evaluation_record(q, *make_pool(q, index, shape)) for q in chosen
            ]
    return files


def build_records(passages: list[Passage], questions: list[Question]) -> dict[str, list[dict]]:
    """Every file's records, by path relative to `example/`."""
    return {**build_training(passages, questions), **build_evaluation(passages, questions)}


def encode(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def summarise(passages: list[Passage], questions: list[Question], files: dict[str, list[dict]]) -> str:
    """The counts that README.md shows."""
    lines = []
    for split in ("train", "eval"):
        languages = Counter(p.lang for p in passages if p.split == split)
        lines.append(f"passages {split}: {languages['en']} English, {languages['zh']} Chinese")
        for use in POOLS:
            chosen = [q for q in questions if q.split == split and q.use == use]
            two_hop = sum(len(q.support) > 1 for q in chosen)
            chinese = sum(q.lang == "zh" for q in chosen)
            lines.append(f"questions {split} {use}: {len(chosen)} ({two_hop} two-hop, {chinese} Chinese)")
    for name, records in files.items():
        line = f"{name}: {len(records)} records"
        if name.endswith("no_pos.jsonl"):
            gold = sum(len(r["pos_index"]) for r in files[name.replace("no_pos", "with_pos")])
            line += f", BM25 found {sum(len(r['pos_index']) for r in records)} of {gold} gold passages"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, help="directory with tokenizer.json")
    tokenizer = parser.parse_args().tokenizer
    if tokenizer != DEFAULT_TOKENIZER and not (tokenizer / "tokenizer.json").is_file():
        parser.error(f"{tokenizer} holds no tokenizer.json")
    try:
        passages, questions = load_sources(EXAMPLE / "source")
        check_counts(passages, questions)
        if (tokenizer / "tokenizer.json").is_file():
            tokens = f"longest document: {longest_document(passages, tokenizer)} of {DOC_MAX_TOKENS} tokens"
        else:
            tokens = "token limit not checked: run scripts/get_base_model.py first"
    except DataError as error:
        sys.exit(f"error: {error}")
    files = build_records(passages, questions)
    for name, records in files.items():
        path = EXAMPLE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(records))
    print(f"seed: {SEED}\n{tokens}\n{summarise(passages, questions, files)}")


if __name__ == "__main__":
    main()
