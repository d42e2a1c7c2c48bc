"""From chunks and accepted samples to the files that training and evaluation read (SPEC 7).

Contract: the files are a function of the inputs and the options; they are checked with the reader that training uses
before they are put in place, and files of others are kept aside first. Run again on the same input, nothing is done.
Knows nothing about how chunks and samples were made.

What is written: `pretrain_data.jsonl` (QA of each training chunk, its paraphrase), `instruction_data.jsonl`,
`end_to_end_data.jsonl` (every question, with 5 and 20 documents), `clara_training_data.jsonl` (every sample with its
provenance, summaries too), the same under `eval/` for held-out documents, and the held-out questions once more under
`evaluation_data/`, as the evaluation commands want them. A summary is no paraphrase record: stage 1 asks for everything
that a document says, and a summary leaves things out.
"""

import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import openrlhf.datasets.records as records_module
from openrlhf.datasets.records import file_rows
from openrlhf.pipeline import near_duplicates as near_duplicates_module
from openrlhf.pipeline import negatives as negatives_module
from openrlhf.pipeline import placing as placing_module
from openrlhf.pipeline import report as report_module
from openrlhf.pipeline import samples as samples_module
from openrlhf.pipeline.near_duplicates import common, shingles, tokens
from openrlhf.pipeline.negatives import DEPTH, Bm25Ranker, EmbeddingRanker, Ranker, best_places, model_identity
from openrlhf.pipeline.placing import drafts_folder, file_sha256, is_made, place
from openrlhf.pipeline.report import Figures, write_report
from openrlhf.pipeline.samples import QUESTIONS, Chunk, Collection, Sample, collect, read_chunks
from openrlhf.pipeline.state import State, content_key

logger = logging.getLogger(__name__)

CHUNKS_FILE, SAMPLES_FILE = "raw_knowledge.jsonl", "synthesized.jsonl"
REPORTS = ("extraction_report.json", "vision_report.json", "synthesis_report.json")
INSTRUCTION_DOCS, END_TO_END_DOCS = 5, 20
TRAIN, EVAL = "train", "eval"
WITH_POSITIVES = "stage2_pretrain_retrieval"  # checked as stage2, and that pos_index is there
# The share of its runs of three words that a chunk may have in common with a gold one and still be a negative.
GOLD_ALIKE = 0.5
# An answer shorter than this, in letters (a Chinese character is worth two), stands in too many chunks to say that they
# answer the question; and how an answer begins says nothing.
_TELLING_LETTERS = 4
_BEGINNINGS = frozenset(("a", "an", "the", "in", "on", "at", "of", "by", "to", "about", "around"))
_SHORT = "questions with fewer than {} documents"
_SOURCES = (records_module, near_duplicates_module, negatives_module, placing_module, report_module, samples_module)


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Raises:
        ValueError: a share that is none.
    """

    seed: int = 42
    eval_share: float = 0.1
    embedding_model: str | None = None
    name: str = "data"
    tokenizer: str | None = None

    def __post_init__(self):
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval_share must be at least 0 and less than 1, got {self.eval_share}")


@dataclass
class Outcome:
    """What a run did. files: records by path; aside: files of others, where they are now."""

    done_before: bool
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)


def assemble(input_dir: Path, output_dir: Path, options: Options, state: State) -> Outcome:
    """Makes the training and evaluation files and the quality report.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an input is not what the step before writes, or holds nothing to train on.
    """
    key = made_from(input_dir, options)
    if is_made(output_dir, key):
        return Outcome(done_before=True)
    collection = collect(
        read_chunks(input_dir / CHUNKS_FILE), input_dir / SAMPLES_FILE, options.seed, options.eval_share
    )
    if not any(collection.side[sample.source] == TRAIN for sample in collection.samples):
        told = ", ".join(f"{reason}: {count}" for reason, count in collection.dropped.counts.items())
        raise ValueError(
            f"{input_dir / SAMPLES_FILE} has no sample to train on"
            + (f" (left out: {told})" if told else "")
            + "; synthesis_report.json beside it says what was rejected"
        )
    drafts = drafts_folder(output_dir)
    pools = Pools(collection, options, state)
    files = {name: count for name, count in _write_files(drafts, collection, pools, options) if count}
    figures = Figures(collection, files, pools.facts, pools.notes(), asdict(options), input_dir)
    write_report(drafts, figures)
    aside = place(output_dir, [*files, "quality_report.md", "quality_report.html"], key)
    return Outcome(False, files, pools.notes(), aside)


def made_from(input_dir: Path, options: Options) -> str:
    """Key of everything the files depend on: inputs, options, the embedding model, this code.

    Raises:
        FileNotFoundError: an input is missing.
    """
    for name, step in ((CHUNKS_FILE, "extract_with_docling.py"), (SAMPLES_FILE, "synthesize_data.py")):
        if not (input_dir / name).is_file():
            raise FileNotFoundError(f"{input_dir / name} is missing: run scripts/{step} first")
    inputs = [input_dir / name for name in (CHUNKS_FILE, SAMPLES_FILE, *REPORTS)]
    code = [Path(module.__file__) for module in _SOURCES] + [Path(__file__), report_module.STYLE]  # type: ignore[arg-type]
    model = model_identity(options.embedding_model) if options.embedding_model else None
    return content_key(
        {**asdict(options), "embedding_model": model},
        [file_sha256(path) if path.is_file() else None for path in (*inputs, *code)],
    )


class Pools:
    """Candidates of each question: its gold chunks and hard negatives.

    Negatives of a training question are training chunks; of an evaluation question, all chunks. They are taken in turn
    from the rankings by BM25 and by embedding; where these end, from those that resemble the gold chunk, then at
    random. Left out are the gold chunks, those nearly like one, those of the same question asked elsewhere, and those
    that hold the answer word for word.

    Attributes:
        facts: how many negatives came from where, and how many pools are smaller than asked for.
    """

    def __init__(self, collection: Collection, options: Options, state: State):
        self.seed = options.seed
        self.chunks = list(collection.chunks.values())
        self.place = {chunk.id: i for i, chunk in enumerate(self.chunks)}
        texts = [chunk.text for chunk in self.chunks]
        asked = [sample for sample in collection.samples if sample.kind in QUESTIONS]
        self.number = {sample.id: i for i, sample in enumerate(asked)}
        questions = [sample.question for sample in asked]
        self.bm25 = Bm25Ranker(texts, questions)
        self.rankers: list[Ranker] = [self.bm25]
        if options.embedding_model:
            sources = [chunk.source for chunk in self.chunks]
            asked_of = [sample.source for sample in asked]
            model = options.embedding_model
            self.rankers.append(EmbeddingRanker(texts, sources, questions, asked_of, model, state))
        everywhere = np.ones(len(self.chunks), dtype=bool)
        in_training = np.array([collection.side[chunk.source] == TRAIN for chunk in self.chunks], dtype=bool)
        self.allowed = {TRAIN: in_training, EVAL: everywhere}
        self.plain = [" ".join(tokens(text)) for text in texts]
        self.facts: Counter[str] = Counter()
        self._runs: dict[int, np.ndarray] = {}

    def ranked(self, sample: Sample, side: str) -> list[int]:
        """Chunks to take negatives from, best first."""
        golds = [self.place[chunk] for chunk in sample.chunks]
        barred = {*golds, *(self.place[chunk] for chunk in sample.also if chunk in self.place)}
        unlike = self._unlike(golds, sample.answer)
        wanted = END_TO_END_DOCS - len(golds)
        chosen: dict[int, str] = {}
        for ranker, i in self._candidates(sample, side):
            if len(chosen) == wanted:
                break
            if i not in barred and i not in chosen and unlike(i):
                chosen[i] = ranker
        self.facts.update(f"negatives {how}" for how in chosen.values())
        for size in (INSTRUCTION_DOCS, END_TO_END_DOCS):
            self.facts[_SHORT.format(size)] += len(golds) + len(chosen) < size
        return list(chosen)

    def _candidates(self, sample: Sample, side: str) -> Iterator[tuple[str, int]]:
        allowed_N = self.allowed[side]
        rankings = [ranker.best(self.number[sample.id], allowed_N) for ranker in self.rankers]
        for row in range(max(map(len, rankings))):
            for ranker, ranking in zip(self.rankers, rankings, strict=True):
                if row < len(ranking):
                    yield f"by {ranker.name}", ranking[row]
        gold = np.where(allowed_N, self.bm25.text_scores_N(self.chunks[self.place[sample.chunks[0]]].text), -np.inf)
        for i in best_places(gold, self.bm25.keys_N, DEPTH, above=0.0):
            yield "like the gold chunk", i
        rest = np.flatnonzero(allowed_N).tolist()
        random.Random(f"{self.seed}:{sample.id}:rest").shuffle(rest)
        for i in rest:
            yield "at random", i

    def _unlike(self, golds: list[int], answer: str) -> Callable[[int], bool]:
        gold_runs = [self._runs_of(i) for i in golds]
        said = list(itertools.dropwhile(_BEGINNINGS.__contains__, tokens(answer)))
        words = " ".join(said)
        telling = sum(2 if "\u4e00" <= word <= "\u9fff" else len(word) for word in said) >= _TELLING_LETTERS

        def unlike(i: int) -> bool:
            if telling and f" {words} " in f" {self.plain[i]} ":
                return False
            own = self._runs_of(i)
            return all(common(own, gold) < GOLD_ALIKE * min(len(own), len(gold)) for gold in gold_runs)

        return unlike

    def _runs_of(self, i: int) -> np.ndarray:
        if i not in self._runs:
            self._runs[i] = shingles(self.chunks[i].text, 3)
        return self._runs[i]

    def draw(self, sample: Sample, ranked: list[int], size: int) -> tuple[list[str], list[int]]:
        """(documents, positions of the gold ones): gold chunks and the best negatives, at places drawn by the seed."""
        golds = [self.place[chunk] for chunk in sample.chunks]
        pool = golds + ranked[: max(0, size - len(golds))]
        random.Random(f"{self.seed}:{sample.id}:{size}").shuffle(pool)
        return [self.chunks[i].text for i in pool], [place for place, i in enumerate(pool) if i in golds]

    def found(self, sample: Sample, size: int) -> tuple[list[str], list[int]]:
        """What BM25 finds among all chunks, best first, and the positions of the gold ones among it."""
        scores_N = self.bm25.scores_N(self.number[sample.id])
        pool = best_places(scores_N, self.bm25.keys_N, size)
        golds = {self.place[chunk] for chunk in sample.chunks}
        return [self.chunks[i].text for i in pool], [place for place, i in enumerate(pool) if i in golds]

    def notes(self) -> list[str]:
        """What a user should know, once."""
        notes = []
        if len(self.rankers) == 1:
            notes.append("hard negatives by BM25 only: no embedding model is installed or chosen (--embedding_model)")
        for size in (INSTRUCTION_DOCS, END_TO_END_DOCS):
            short = self.facts[_SHORT.format(size)]
            if short:
                notes.append(f"{short} questions have fewer than {size} documents: there are no more that fit")
        return notes


def _write_files(drafts: Path, collection: Collection, pools: Pools, options: Options) -> Iterator[tuple[str, int]]:
    """Writes and checks every file; yields (path, records)."""
    # In the order of a hash, so that the first n records of a file are a sample of it.
    by_hash = sorted(collection.samples, key=lambda s: hashlib.sha256(f"{options.seed}:{s.id}".encode()).digest())
    for side in (TRAIN, EVAL):
        samples = [sample for sample in by_hash if collection.side[sample.source] == side]
        asked = [sample for sample in samples if sample.kind in QUESTIONS]
        bar = tqdm(asked, desc=f"candidates ({side})", unit=" questions", disable=None)
        ranked = {sample.id: pools.ranked(sample, side) for sample in bar}
        within = "eval/" if side == EVAL else ""
        stage1 = list(stage1_records(samples, collection.chunks))
        plan: list[tuple[str, str | None, Iterable[dict]]] = [
            ("pretrain_data.jsonl", "stage1", stage1),
            ("instruction_data.jsonl", "stage1_2", instruction_records(asked, ranked, pools)),
            ("end_to_end_data.jsonl", WITH_POSITIVES, end_to_end_records(asked, ranked, pools)),
            ("clara_training_data.jsonl", None, provenance(samples, collection.chunks, side)),
        ]
        plan = [(within + name, stage, records) for name, stage, records in plan]
        if side == EVAL:
            folder = f"evaluation_data/{{}}_evaluation/{options.name}/eval_processed"
            plan += [(folder.format("pretraining") + ".jsonl", "stage1", stage1)]
            for suite, size in (("instruction_tuning", INSTRUCTION_DOCS), ("end_to_end", END_TO_END_DOCS)):
                oracle = ({"id": s.id, **answered(s, *pools.draw(s, ranked[s.id], size))} for s in asked)
                normal = ({"id": s.id, **answered(s, *pools.found(s, size))} for s in asked)
                plan += [(folder.format(suite) + "_with_pos.jsonl", WITH_POSITIVES, list(oracle))]
                plan += [(folder.format(suite) + "_no_pos.jsonl", "stage2", list(normal))]
        for name, stage, records in plan:
            yield name, write_records(drafts / name, stage, records)


def write_records(path: Path, stage: str | None, records: Iterable[dict]) -> int:
    """Writes records and reads them back as training would; the number of records. No file where there are none.

    Raises:
        RecordError: the reader refuses one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    if not count:
        path.unlink()
    elif stage is not None:
        for _ in file_rows(path, stage):
            pass
    return count


def stage1_records(samples: Sequence[Sample], chunks: dict[str, Chunk]) -> Iterator[dict]:
    """Of each chunk its questions in one record, and each paraphrase in one; in the order of the first sample.

    Questions over two chunks are left out: a record of stage 1 has one document.
    """
    questions: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.kind in QUESTIONS and len(sample.chunks) == 1:
            questions.setdefault(sample.chunks[0], []).append(sample)
    told = set()
    for sample in samples:
        chunk = sample.chunks[0]
        docs = [chunks[chunk].text]
        if sample.kind == "paraphrase":
            yield {"data_type": "paraphrase", "question": "", "answers": [sample.answer], "docs": docs}
        elif chunk in questions and chunk not in told:
            told.add(chunk)
            asked = questions[chunk]
            both = {"question": [one.question for one in asked], "answers": [one.answer for one in asked]}
            yield {"data_type": "qa", **both, "docs": docs}


def instruction_records(asked: Sequence[Sample], ranked: dict[str, list[int]], pools: Pools) -> Iterator[dict]:
    """Records of stage 1_2."""
    for sample in asked:
        docs, _ = pools.draw(sample, ranked[sample.id], INSTRUCTION_DOCS)
        yield {"question": sample.question, "docs": docs, "gold_answer": sample.answer, "answer": sample.answer}


def end_to_end_records(asked: Sequence[Sample], ranked: dict[str, list[int]], pools: Pools) -> Iterator[dict]:
    """Records of stage 2."""
    for sample in asked:
        yield answered(sample, *pools.draw(sample, ranked[sample.id], END_TO_END_DOCS))


def answered(sample: Sample, docs: list[str], positions: list[int]) -> dict:
    """A record of stage 2 and of evaluation."""
    answer = sample.answer
    both = {"gold_answer": answer, "golden_answers": [answer], "answer": answer}
    return {"question": sample.question, "docs": docs, **both, "pos_index": positions}


def provenance(samples: Sequence[Sample], chunks: dict[str, Chunk], side: str) -> Iterator[dict]:
    """Every sample with what it was made from."""
    for sample in samples:
        of = [chunks[chunk] for chunk in sample.chunks]
        yield {
            "id": sample.id,
            "kind": sample.kind,
            "split": side,
            "language": sample.language,
            "question": sample.question,
            "answer": sample.answer,
            "docs": [chunk.text for chunk in of],
            "source": sample.source,
            "document_sha256": of[0].document_sha256,
            "title": of[0].title,
            "headings": list(of[0].headings),
            "pages": [chunk.page for chunk in of],
            "chunks": list(sample.chunks),
            "chunk_languages": [chunk.language for chunk in of],
            "layout": of[0].layout,
            "model": sample.model,
            "rounds": sample.rounds,
        }
