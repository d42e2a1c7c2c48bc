"""The data sets' own files: read them, check them, and say which of their passages are gold.

Reads HotpotQA's, 2WikiMultiHopQA's and MuSiQue's development files, three shapes of Natural Questions, and corpora of
further passages; any of them may be gzipped. Knows nothing about retrieval, candidates or models.

A gold passage is what the data set annotates as such, never one that merely contains an answer.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, TypeVar

T = TypeVar("T")
LOST_GOLD, LOST_GOLD_LIMIT = "questions without a gold passage", 0.05
OFFICIAL = {
    "hotpotqa": "hotpot_dev_distractor_v1.json",
    "2wiki": "dev.json of 2WikiMultiHopQA",
    "musique": "musique_ans_v1.0_dev.jsonl",
    "nq": "biencoder-nq-dev.json of DPR, nq-open-oracle.jsonl of Lost in the Middle",
}
NQ_SHAPES = (
    "DPR's retriever file (positive_ctxs, negative_ctxs, hard_negative_ctxs), Lost in the Middle's (ctxs with isgold, "
    "nq_annotated_gold) and NQ-open (question, answer); the full release with whole pages is not read"
)


class DataError(ValueError):
    """A file that cannot be used; the message says where it is wrong and, where that is known, what to do."""


@dataclass
class Item:
    """One item of a source file.

    passages: (title, text, is_gold); none where `annotated` is false. lost: an annotated passage is not among them.
    """

    id: str
    question: str
    answers: list[str]
    passages: list[tuple[str, str, bool]]
    lost: bool = False
    annotated: bool = True
    answerable: bool = True


@dataclass
class Question:
    """A question that is kept; golds are documents, as they stand in a record."""

    place: str
    id: str
    text: str
    answers: list[str]
    golds: list[str]


@dataclass
class Source:
    """What one file gives: its questions, its own documents, and counts of what was dropped."""

    name: str
    path: Path
    questions: list[Question] = field(default_factory=list)
    documents: dict[str, None] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)
    annotated: bool = True


def _get(item: object, key: str, kind: type[T]) -> T:
    if not isinstance(item, dict):
        raise DataError(f"an item must be a JSON object, got {ascii(item)[:60]}")
    value = item.get(key)
    if not isinstance(value, kind):
        wanted = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise DataError(f"{key} must be {wanted}, got {ascii(value)[:60] if key in item else 'nothing'}")
    return value


def _texts(values: list, key: str) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{key} must hold texts, got {ascii(value)[:60]}")
    return values


def _title_and_text(passage: object) -> tuple[str, str]:
    return _get(passage, "title", str), _get(passage, "text", str)


def squeezed(text: str) -> str:
    """Runs of white space become one blank. Raises DataError on half a surrogate pair, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"half a surrogate pair is no text: {ascii(text)[:60]}") from None
    return " ".join(text.split())


def document_of(title: str, text: str) -> str | None:
    """`Title\\ntext`, only the text without a title, None without a text."""
    title, text = squeezed(title), squeezed(text)
    if not text:
        return None
    return f"{title}\n{text}" if title else text


def text_key(text: str) -> int:
    """64 bits that stand for a text, the same in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def paragraphs_item(item: object, own: str, other: str, joint: str) -> Item:
    """An item of HotpotQA or 2WikiMultiHopQA: gold are the passages whose title a supporting fact names.

    The sentence numbers of the facts are not used; they may lie beyond the passage's end.

    Args:
        own, other: a field that only this data set has, and one that only its sister has.
        joint: what joins sentences; those of HotpotQA bring their leading blank along.
    """
    if isinstance(item, dict) and own not in item:
        hint = f", but {other} is there: are --hotpotqa and --2wiki exchanged?" if other in item else ""
        raise DataError(f"{own} is missing{hint}")
    facts = _get(item, "supporting_facts", list)
    for fact in facts:
        if not (isinstance(fact, list) and [type(part) for part in fact] == [str, int]):
            raise DataError(f"supporting_facts must hold [title, sentence number], got {ascii(fact)[:60]}")
    support, passages = {title for title, _ in facts}, []
    for entry in _get(item, "context", list):
        if not (isinstance(entry, list) and [type(part) for part in entry] == [str, list]):
            raise DataError(f"context must hold [title, [sentences]], got {ascii(entry)[:60]}")
        passages.append((entry[0], joint.join(_texts(entry[1], "context")), entry[0] in support))
    lost = bool(support - {title for title, _, _ in passages})
    return Item(_get(item, "_id", str), _get(item, "question", str), [_get(item, "answer", str)], passages, lost)


def musique_item(item: object) -> Item:
    """A line of musique_{ans,full}_v1.0_dev.jsonl."""
    passages = [
        (_get(p, "title", str), _get(p, "paragraph_text", str), _get(p, "is_supporting", bool))
        for p in _get(item, "paragraphs", list)
    ]
    answers = [_get(item, "answer", str), *_texts(_get(item, "answer_aliases", list), "answer_aliases")]
    answerable = _get(item, "answerable", bool)
    return Item(_get(item, "id", str), _get(item, "question", str), answers, passages, answerable=answerable)


def nq_item(item: object) -> Item:
    """An item of one of NQ_SHAPES, which carry no ids: the id is made from the question."""
    if not isinstance(item, dict) or not item.keys() & {"positive_ctxs", "nq_annotated_gold", "answer"}:
        raise DataError(f"this is none of the Natural Questions files that are read: {NQ_SHAPES}")
    question = _get(item, "question", str)
    identity = f"nq-{text_key(squeezed(question).casefold()):016x}"
    if "positive_ctxs" not in item and "nq_annotated_gold" not in item:
        return Item(identity, question, _texts(_get(item, "answer", list), "answer"), [], annotated=False)
    passages = []
    if "nq_annotated_gold" in item:
        passages += [(*_title_and_text(c), _get(c, "isgold", bool)) for c in _get(item, "ctxs", list)]
    else:
        # Only the annotated paragraph has score 1000; the other positives merely contain an answer (BM25 scores).
        scored = any(isinstance(c, dict) and "score" in c for c in _get(item, "positive_ctxs", list))
        for i, c in enumerate(item["positive_ctxs"]):
            passages.append((*_title_and_text(c), c.get("score") in (1000, "1000") if scored else i == 0))
        for key in ("negative_ctxs", "hard_negative_ctxs"):
            passages += [(*_title_and_text(c), False) for c in _get(item, key, list)]
    return Item(identity, question, _texts(_get(item, "answers", list), "answers"), passages)


READERS: dict[str, Callable[[object], Item]] = {
    "nq": nq_item,
    "hotpotqa": lambda item: paragraphs_item(item, own="level", other="evidences", joint=""),
    "musique": musique_item,
    "2wiki": lambda item: paragraphs_item(item, own="evidences", other="level", joint=" "),
}


def _open(path: Path) -> IO[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_items(path: Path) -> Iterator[tuple[int, object]]:
    """The items of a JSON list, or the lines of a JSONL file, counted from 1.

    Raises:
        DataError: the file is missing, empty, cut short, or neither.
    """
    number = 0
    try:
        with _open(path) as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            if start == "[":
                file.seek(0)
                yield from enumerate(json.load(file), 1)
                return
            for number, line in enumerate(chain([start + file.readline()], file), 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        place = f"{path}:{number}" if number else f"{path}:{error.lineno}"
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def load_source(name: str, path: Path, most_golds: int) -> Source:
    """Reads and checks one source file.

    Args:
        most_golds: questions with more gold passages cannot all be in the smallest pool; they are dropped.

    Raises:
        DataError: `file:item: reason`, or too many questions without their gold passages, or none left.
    """
    source, number = Source(name, path), 0
    ids: dict[str, int] = {}
    asked: set[str] = set()
    lost: list[int] = []
    annotated: set[bool] = set()
    for number, raw in read_items(path):
        place = f"{path}:{number}"
        try:
            item = READERS[name](raw)
            documents = [(document_of(title, text), gold) for title, text, gold in item.passages]
            text = squeezed(item.question)
            answers = list(dict.fromkeys(filter(None, map(squeezed, item.answers))))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        annotated.add(item.annotated)
        if len(annotated) > 1:
            raise DataError(f"{place}: this item has another shape than those before it; give one kind of file")
        source.annotated = item.annotated
        source.documents.update((document, None) for document, _ in documents if document)
        source.dropped["empty passages"] += sum(document is None for document, _ in documents)
        golds = list(dict.fromkeys(document for document, gold in documents if gold and document))
        item.lost |= any(gold and document is None for document, gold in documents)
        if reason := _reason_to_drop(item, text, answers, golds, asked, most_golds):
            source.dropped[reason] += 1
            lost += [number] * (reason == LOST_GOLD)
            continue
        if item.id in ids:
            raise DataError(f"{place}: id {item.id} is that of item {ids[item.id]}, which asks something else")
        ids[item.id] = number
        asked.add(text.casefold())
        source.questions.append(Question(place, item.id, text, answers, golds))
    if len(lost) > LOST_GOLD_LIMIT * number:
        raise DataError(
            f"{path}:{lost[0]}: a gold passage of this question, and of {len(lost)} of {number} in all, is not among "
            f"the passages; use a file that holds them: {OFFICIAL[name]}"
        )
    if not source.questions:
        raise DataError(f"{path}: no question is left of {number}: {dropped_line(source) or 'the file is empty'}")
    return source


def _reason_to_drop(item: Item, text: str, answers: list, golds: list, asked: set, most_golds: int) -> str | None:
    if not item.answerable:
        return "unanswerable questions"
    if not text or not answers:
        return "questions without text or answer"
    if text.casefold() in asked:
        return "duplicate questions"
    if item.annotated and (item.lost or not golds):
        return LOST_GOLD
    if len(golds) > most_golds:
        return f"questions with more than {most_golds} gold passages"
    return None


def corpus_documents(path: Path, dropped: Counter) -> Iterator[str]:
    """Streams the documents of a corpus file: JSONL with title and text, or contents; or DPR's id, text, title TSV.

    Raises:
        DataError: `file:line: reason`.
    """
    for number, item in _tsv_items(path) if ".tsv" in path.suffixes else read_items(path):
        try:
            document = document_of(*_corpus_pair(item))
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if document is None:
            dropped["empty passages"] += 1
        else:
            yield document


def _tsv_items(path: Path) -> Iterator[tuple[int, object]]:
    try:
        with _open(path) as file:
            rows = csv.reader(file, delimiter="\t")
            if next(rows, None) != ["id", "text", "title"]:
                raise DataError(f"{path}:1: the first line must be id, text, title, as in psgs_w100.tsv")
            for row in rows:
                if len(row) != 3:
                    raise DataError(f"{path}:{rows.line_num}: expected the 3 fields id, text, title, got {len(row)}")
                yield rows.line_num, {"text": row[1], "title": row[2]}
    except (csv.Error, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _corpus_pair(item: object) -> tuple[str, str]:
    if isinstance(item, dict) and "contents" in item:
        title, newline, text = _get(item, "contents", str).partition("\n")
        return (title.strip().strip('"'), text) if newline else ("", title)
    return _title_and_text(item)


def dropped_line(source: Source) -> str:
    """What was dropped, in words; empty where nothing was."""
    return ", ".join(f"{count} {what}" for what, count in sorted(source.dropped.items()) if count)


def unique_documents(own: Iterable[str], corpora: list[Path], dropped: Counter) -> Iterator[tuple[int, str]]:
    """(key, document) of every distinct document, the source's own first; the same at every call."""
    seen = set()
    for document in chain(own, *(corpus_documents(path, dropped) for path in corpora)):
        if (key := text_key(document)) not in seen:
            seen.add(key)
            yield key, document
