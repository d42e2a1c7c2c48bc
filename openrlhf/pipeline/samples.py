"""Chunks and samples as the earlier steps left them: read, cleaned, freed of near-duplicates, split by document.

Contract: what comes out depends on the two files and the options alone, not on the order of lines; everything that is
left out is counted under a reason, with the first few examples. Knows nothing about candidates and records.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf.pipeline.files import read_lines
from openrlhf.pipeline.near_duplicates import near_duplicates, tokens, versions

KINDS = ("simple_qa", "complex_qa", "multi_hop", "paraphrase", "summary")
QUESTIONS = KINDS[:3]
EXAMPLES = 20
# Jaccard similarity of runs of three words, from which two chunks are near-duplicates; of single words for questions;
# and the share of the smaller document's runs that another holds too, from which they are versions of one another.
CHUNKS_ALIKE, QUESTIONS_ALIKE, DOCUMENTS_ALIKE = 0.8, 0.85, 0.6

# A question that needs the passage beside it: nobody who searches asks so.
_POINTING = re.compile(
    r"\b(?:this|the (?:given|above|following|provided)) (?:passage|excerpt|paragraph|text|document|article|section)\b"
    r"|\bthe (?:passage|excerpt)\b(?! (?:of|to|through|across|between|along|from)\b)"
    r"|\bthe text\b(?! (?:editor|file|field|box|message|mode|format|layer|segment|string|area|colou?r|size)s?\b)"
    r"|\b(?:according to|mentioned in|described in|stated in|in) the (?:document|paragraph|article|section)\b"
    r"|\bthe (?:author|passage|text|paragraph)'s\b"
    r"|(?<!日)本文(?![化字学件艺])|[本这该此](?:段(?:文|话|内容|材料|描述)|篇|文章|文本)|上文(?![化字学件艺])"
    r"|(?:根据|依据|按照)(?:文章|文本|原文|短文|段落|材料|上述)"
    r"|(?:^|[,，。？、\s在从])(?:文|文章|短文|段落|材料)中",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Chunk:
    """A line of raw_knowledge.jsonl, as far as this step needs it."""

    id: str
    source: str
    number: int
    document_sha256: str
    page: int | None
    title: str
    headings: tuple[str, ...]
    text: str
    sha256: str
    layout: str
    language: str


@dataclass
class Sample:
    """One accepted sample. `chunks` are the ids of those it is made from, the first one's document being its own.

    also: ids of further chunks that answer the same question, which therefore are no negatives.
    """

    id: str
    kind: str
    question: str
    answer: str
    language: str
    chunks: tuple[str, ...]
    source: str
    model: str
    rounds: int
    also: set[str] = field(default_factory=set)


@dataclass
class Dropped:
    """What was left out: how many by reason, and the first examples as (reason, where, text)."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, reason: str, where: str, text: str) -> None:
        """Counts one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= EXAMPLES:
            self.examples.append((reason, where, text[:300]))


@dataclass
class Collection:
    """Everything the records are made of.

    chunks: kept ones by id, in order. samples: clean ones, in order of their chunks. side: "train" or "eval" by source.
    groups: of each source the first source in its group of versions.
    """

    chunks: dict[str, Chunk]
    samples: list[Sample]
    side: dict[str, str]
    groups: dict[str, str]
    dropped: Dropped
    facts: dict[str, int]


def read_chunks(path: Path) -> list[Chunk]:
    """The chunks of raw_knowledge.jsonl by (source, number).

    Raises:
        ValueError: `file:line: reason`, for a line that extraction would not have written.
    """
    chunks = []
    for number, record in enumerate(read_lines(path), 1):
        try:
            chunks.append(
                Chunk(
                    **{name: str(record[name]) for name in ("id", "source", "document_sha256", "text", "sha256")},
                    number=int(record["number"]),
                    page=record.get("page"),
                    title=str(record.get("title") or ""),
                    headings=tuple(map(str, record.get("headings") or ())),
                    layout=str(record.get("layout") or ""),
                    language=str(record.get("language") or "") or language_of(str(record["text"])),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: no chunk of the extraction ({error!r})") from None
    chunks.sort(key=lambda chunk: (chunk.source, chunk.number))
    repeated = [name for name, count in Counter(chunk.id for chunk in chunks).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: the id {repeated[0]!r} stands there twice; extract again")
    return chunks


def language_of(text: str) -> str:
    """ "zh" where at least a third of the words are Chinese characters, "en" for the rest."""
    found = tokens(text)
    return "zh" if 3 * sum("\u4e00" <= token <= "\u9fff" for token in found) >= max(1, len(found)) else "en"


def is_text(text: str) -> bool:
    """Whether it has a word and can be written in UTF-8 (no half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(tokens(text))


def collect(chunks: list[Chunk], synthesized: Path, seed: int, eval_share: float) -> Collection:
    """Reads the samples of synthesized.jsonl, cleans both, and splits them.

    Args:
        eval_share: share of the documents to hold out, see `split`.

    Raises:
        ValueError: a line of the file is not what synthesis writes.
    """
    dropped = Dropped()
    usable = [chunk for chunk in chunks if is_text(chunk.text)]
    for chunk in chunks:
        if not is_text(chunk.text):
            dropped.add("chunk without a word", chunk.id, "")
    by_id = {chunk.id: chunk for chunk in usable}
    lines = list(read_lines(synthesized))
    accepted = {record.get("id") for record in lines if record.get("accepted")}
    kept_as = _alike_chunks(usable, accepted, dropped)
    samples: list[Sample] = []
    for record in lines:
        own = by_id.get(str(record.get("id")))
        if own is None or own.sha256 != record.get("sha256"):
            dropped.add("chunk changed since synthesis", str(record.get("id")), "")
        elif kept_as[own.id] != own.id:
            for sample in _samples(record, own):
                dropped.add("its chunk is a near-duplicate", own.id, sample.question or sample.answer)
        else:
            samples += _clean(_samples(record, own), by_id, kept_as, dropped)
    place = {chunk.id: i for i, chunk in enumerate(usable)}
    samples.sort(key=lambda sample: (place[sample.chunks[0]], KINDS.index(sample.kind), sample.id))
    samples = _alike_questions(samples, dropped)
    groups = document_groups(usable)
    side = split(groups, samples, seed, eval_share)
    kept = {chunk.id: chunk for chunk in usable if kept_as[chunk.id] == chunk.id}
    facts = {
        "documents": len(groups),
        "groups of versions": len(set(groups.values())),
        "chunks": len(chunks),
        "chunks kept": len(kept),
        "chunks with accepted samples": len(accepted & set(by_id)),
        "chunks of which no sample was accepted": sum(not record.get("accepted") for record in lines),
        "chunks not synthesized": len(set(by_id) - {str(record.get("id")) for record in lines}),
    }
    return Collection(kept, samples, side, groups, dropped, facts)


def _alike_chunks(chunks: list[Chunk], accepted: set, dropped: Dropped) -> dict[str, str]:
    """{id: id of the kept chunk it nearly repeats}. One with samples is kept rather than one without."""
    order = sorted(range(len(chunks)), key=lambda i: (chunks[i].id not in accepted, i))
    kept = near_duplicates([chunks[i].text for i in order], CHUNKS_ALIKE)
    kept_as = {chunks[order[i]].id: chunks[order[first]].id for i, first in enumerate(kept)}
    for chunk in chunks:
        if kept_as[chunk.id] != chunk.id:
            dropped.add("near-duplicate chunk", f"{chunk.id} repeats {kept_as[chunk.id]}", chunk.text)
    return kept_as


def _samples(record: dict[str, Any], chunk: Chunk) -> list[Sample]:
    """All samples of one line of synthesized.jsonl, as they stand there.

    Raises:
        ValueError: it is not what synthesis writes.
    """
    try:
        return _samples_as_written(record, chunk)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the line of {chunk.id} in synthesized.jsonl is not what synthesis writes ({error})"
        ) from None


def _samples_as_written(record: dict[str, Any], chunk: Chunk) -> list[Sample]:
    if not record.get("accepted"):
        return []
    found = [(kind, item) for kind in QUESTIONS for item in record.get(kind) or ()]
    found += [(kind, {"answer": record.get(kind)}) for kind in KINDS[3:] if record.get(kind) is not None]
    samples = []
    for kind, item in found:
        question, answer = (str(item.get(name) or "").strip() for name in ("question", "answer"))
        chunks = tuple(map(str, item.get("chunks") or (chunk.id,))) if kind == "multi_hop" else (chunk.id,)
        sample_id = hashlib.sha256(json.dumps([kind, question, answer, chunks]).encode()).hexdigest()[:16]
        language = str(item.get("language") or "") or language_of(question or answer)
        facts = (chunk.source, str(record.get("model") or ""), int(record.get("rounds") or 0))
        samples.append(Sample(sample_id, kind, question, answer, language, chunks, *facts))
    return samples


def _clean(
    samples: list[Sample], by_id: dict[str, Chunk], kept_as: dict[str, str], dropped: Dropped
) -> Iterator[Sample]:
    """Those that can be trained on, each once; chunks that were removed stand for those that were kept."""
    seen = set()
    for sample in samples:
        there = all(chunk in by_id for chunk in sample.chunks)
        sample.chunks = tuple(dict.fromkeys(kept_as.get(chunk, chunk) for chunk in sample.chunks))
        reason = "chunk changed since synthesis" if not there else fault(sample, by_id)
        if reason is None and sample.id in seen:
            reason = "repeated question"
        if reason is not None:
            dropped.add(reason, sample.chunks[0], sample.question or sample.answer)
            continue
        seen.add(sample.id)
        yield sample


def fault(sample: Sample, by_id: dict[str, Chunk]) -> str | None:
    """Why a sample cannot be used; None where it can."""
    passages = [by_id[chunk].text for chunk in sample.chunks]
    if sample.kind in QUESTIONS and not is_text(sample.question):
        return "empty question"
    if not is_text(sample.answer):
        return "empty answer" if sample.kind in QUESTIONS else f"empty {sample.kind}"
    if sample.kind in QUESTIONS:
        if len(sample.answer) > sum(map(len, passages)):
            return "answer longer than its passage"
        if _POINTING.search(sample.question):
            return "question that names its passage"
    elif tokens(sample.answer) == tokens(passages[0]):
        return f"{sample.kind} that copies its passage"
    if sample.kind == "multi_hop" and len({by_id[chunk].source for chunk in sample.chunks}) > 1:
        return "chunks of several documents"
    return None


def _alike_questions(samples: list[Sample], dropped: Dropped) -> list[Sample]:
    """Without questions that ask what an earlier one asks; that one learns which chunks answer it too."""
    asked = [sample for sample in samples if sample.kind in QUESTIONS]
    words = [tokens(sample.question) for sample in asked]
    answers = [" ".join(tokens(sample.answer)) for sample in asked]
    numbers = [{word for word in row if any(map(str.isdigit, word))} for row in words]

    def agree(i: int, j: int) -> bool:
        same = answers[i] in answers[j] or answers[j] in answers[i]
        return words[i] == words[j] or (same and numbers[i] == numbers[j])

    removed = set()
    kept_as = near_duplicates([sample.question for sample in asked], QUESTIONS_ALIKE, size=1, agree=agree)
    for i, first in enumerate(kept_as):
        if first != i:
            asked[first].also |= set(asked[i].chunks)
            same = words[i] != words[first] or answers[i] == answers[first]
            reason = "near-duplicate question" if same else "question asked before, with another answer"
            dropped.add(reason, asked[i].chunks[0], asked[i].question)
            removed.add(id(asked[i]))
    return [sample for sample in samples if id(sample) not in removed]


def document_groups(chunks: list[Chunk]) -> dict[str, str]:
    """Of each source the first source in its group of versions (copies, other formats, drafts of one document)."""
    texts: dict[str, list[str]] = defaultdict(list)
    for chunk in chunks:
        texts[chunk.source].append(chunk.text)
    sources = list(texts)
    firsts = versions(["\n".join(texts[source]) for source in sources], DOCUMENTS_ALIKE)
    return {source: sources[first] for source, first in zip(sources, firsts, strict=True)}


def split(groups: dict[str, str], samples: list[Sample], seed: int, eval_share: float) -> dict[str, str]:
    """{source: "train" or "eval"}: a document's side is drawn from the seed and its path, all versions on one side.

    A document keeps its side while others come and go. Where so few documents have samples that the draw leaves one
    side empty, or more than half of the samples on the evaluation's, the drawn order decides; a single group with
    samples is for training.
    """
    drawn = {
        group: int(hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()[:15], 16) / 16**15
        for group in set(groups.values())
    }
    weight: dict[str, int] = defaultdict(int)
    for sample in samples:
        weight[groups[sample.source]] += 1
    order = sorted(weight, key=lambda group: (drawn[group], group))
    held = [group for group in order if drawn[group] < eval_share]
    if not held and eval_share > 0:
        held = [group for group in order if 2 * weight[group] <= len(samples)][:1] if len(order) > 1 else []
    while held and 2 * sum(weight[group] for group in held) > len(samples):
        held.pop()
    chosen = set(held)
    return {source: "eval" if group in chosen else "train" for source, group in groups.items()}
