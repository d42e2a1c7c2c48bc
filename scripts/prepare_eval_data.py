"""Build the evaluation files from the files that the data sets publish.

    python scripts/prepare_eval_data.py --hotpotqa hotpot_dev_distractor_v1.json --2wiki dev.json \\
        --musique musique_ans_v1.0_dev.jsonl --nq nq-open-oracle.jsonl [--corpus psgs_w100.tsv.gz ...]

writes OUTPUT/{instruction_tuning,end_to_end}_evaluation/DATASET/eval_processed_{with_pos,no_pos}.jsonl (SPEC 7).
Normal (no_pos) is exactly what BM25 finds, in its order. Oracle (with_pos) is every annotated gold passage plus the
best-ranked others, shuffled by seed and question id, so that a position tells nothing. Both suites hold the same
questions, in an order drawn from the seed: the first N lines are a sample, and --max_questions N keeps these.

A gold passage is what the data set annotates as such, never one that merely contains an answer. Passages are searched
in the source file's own passages and those of --corpus; docs/EVALUATION_DATA.md says what that means for the figures.
Any file may be gzipped. Knows nothing about models; needs bm25s.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.questions import END_TO_END, INSTRUCTION, NORMAL, ORACLE, SUITES
from evaluation.sources import (
    OFFICIAL,
    READERS,
    DataError,
    Question,
    Source,
    dropped_line,
    load_source,
    text_key,
    unique_documents,
)
from openrlhf.datasets.records import RecordError, record_rows

DEFAULT_OUTPUT = "evaluation/evaluation_data"
BM25 = {"method": "lucene", "k1": 1.5, "b": 0.75}
STOP_WORDS = "english"


class Bm25:
    """BM25 over documents, title included. Holds token counts and a key for each document, not their texts.

    Args:
        documents: (key, document); equal scores are ordered by key, so that the order of the corpus tells nothing.
    """

    def __init__(self, documents: Iterable[tuple[int, str]]) -> None:
        import bm25s

        keys = array("Q")
        self.tokenizer = bm25s.tokenization.Tokenizer(stopwords=STOP_WORDS)

        def texts() -> Iterator[str]:
            for key, document in documents:
                keys.append(key)
                yield document

        ids = list(self.tokenizer.streaming_tokenize(texts(), update_vocab=True, allow_empty=False))
        self.keys = np.frombuffer(keys, dtype=np.uint64)
        self.index = bm25s.BM25(**BM25)
        if self.tokenizer.word_to_id:
            self.index.index((ids, self.tokenizer.word_to_id), create_empty_token=False, show_progress=False)

    def best(self, question: str, k: int) -> list[int]:
        """Positions of the min(k, number of documents) best documents, best first."""
        words = next(self.tokenizer.streaming_tokenize([question], update_vocab=False, allow_empty=False))
        scores = self.index.get_scores(words) if words else np.zeros(len(self.keys), dtype=np.float32)
        k = min(k, len(scores))
        candidates = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        return candidates[np.lexsort((self.keys[candidates], -scores[candidates]))][:k].tolist()


def drawn_order(questions: list[Question], seed: int) -> list[Question]:
    """The questions in an order that depends on the seed and their ids only; any first N of them are a sample."""
    return sorted(questions, key=lambda question: text_key(f"{seed}:{question.id}"))


def oracle_pool(ranked: list[int], golds: list[int], size: int, seed: str) -> list[int]:
    """All golds and the best-ranked others up to `size`, shuffled by the seed."""
    pool = sorted(golds) + [i for i in ranked if i not in golds][: size - len(golds)]
    random.Random(seed).shuffle(pool)
    return pool


def build(
    source: Source, corpora: list[Path], sizes: dict[str, int], limit: int | None, seed: int
) -> tuple[dict[Path, list[dict]], dict[str, str]]:
    """The records of one data set.

    Args:
        sizes: candidates by suite.
        limit: keep the first so many questions of `drawn_order`.

    Returns:
        {path below the output directory: records}, and the data set's figures by name for the table.

    Raises:
        DataError: the corpus is too small, or a corpus file cannot be used.
    """
    questions = drawn_order(source.questions, seed)[:limit]
    quiet, most = not sys.stderr.isatty(), max(sizes.values())
    read = unique_documents(source.documents, corpora, source.dropped)
    retriever = Bm25(tqdm(read, desc=f"{source.name}: index", unit=" passages", disable=quiet))
    if len(retriever.keys) < most:
        raise DataError(
            f"{source.path}: {most} candidates are wanted, and there are {len(retriever.keys)} passages in "
            "all; add passages with --corpus or lower --top"
        )
    wanted = {text_key(gold) for question in questions for gold in question.golds}
    place_of = {key: i for i, key in enumerate(retriever.keys.tolist()) if key in wanted}
    golds = [[place_of[text_key(gold)] for gold in question.golds] for question in questions]
    ranked = [
        retriever.best(question.text, most) for question in tqdm(questions, desc=f"{source.name}: rank", disable=quiet)
    ]
    needed = {i for positions in (*ranked, *golds) for i in positions}
    again = unique_documents(source.documents, corpora, Counter())
    again = tqdm(again, desc=f"{source.name}: collect", unit=" passages", total=len(retriever.keys), disable=quiet)
    texts = {i: document for i, (_, document) in enumerate(again) if i in needed}
    files = {}
    for suite, size in sizes.items():
        pools = {NORMAL: [row[:size] for row in ranked]}
        if source.annotated:
            pools[ORACLE] = [
                oracle_pool(row, gold, size, f"{seed}:{size}:{question.id}")
                for row, gold, question in zip(ranked, golds, questions, strict=True)
            ]
        for setting, rows in pools.items():
            files[target(suite, source.name, setting)] = [
                record_of(*entry, texts) for entry in zip(questions, rows, golds, strict=True)
            ]
    return files, figures_of(source, len(retriever.keys), ranked, golds, sorted(set(sizes.values())), len(files))


def record_of(question: Question, pool: list[int], golds: list[int], texts: dict[int, str]) -> dict:
    """One evaluation record (SPEC 7). Raises DataError where the project's own reader would refuse it."""
    record = {
        "question": question.text,
        "docs": [texts[i] for i in pool],
        "golden_answers": question.answers,
        "answer": question.answers[0],
        "pos_index": [place for place, i in enumerate(pool) if i in golds],
        "id": question.id,
    }
    try:
        record_rows(record, "stage2")
    except RecordError as error:
        raise DataError(f"{question.place}: {error}") from None
    return record


def figures_of(
    source: Source, corpus: int, ranked: list[list[int]], golds: list[list[int]], sizes: list[int], files: int
) -> dict[str, str]:
    """The row of the closing table: recall (mean share of a question's golds) and share of questions with all."""
    figures = {"golds/question": f"{np.mean([len(gold) for gold in golds]):.2f}"}
    for name, score in (("R", np.mean), ("all golds", np.all)):
        for size in sizes:
            found = [
                float(not gold or score(np.isin(gold, row[:size]))) for row, gold in zip(ranked, golds, strict=True)
            ]
            figures[f"{name}@{size}"] = f"{np.mean(found):.4f}"
    if not source.annotated:
        figures = dict.fromkeys(figures, "-")
    first = {"data set": source.name, "questions": str(len(ranked)), "passages": str(corpus)}
    return first | figures | {"files": str(files)}


def target(suite: str, name: str, setting: str) -> Path:
    """Where a file lies below the output directory."""
    return Path(SUITES[suite].folders[0], name, SUITES[suite].files[setting])


def write_all(output: Path, files: dict[Path, list[dict]]) -> None:
    """Writes the files of one data set beside their targets first, then moves all of them into place."""
    output.mkdir(parents=True, exist_ok=True)
    drafts = Path(tempfile.mkdtemp(prefix=".draft-", dir=output))
    try:
        for number, records in enumerate(files.values()):
            with open(drafts / str(number), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        for number, path in enumerate(files):
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(drafts / str(number), output / path)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows with the same columns."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [rows[0].keys(), ["-" * width for width in widths.values()], *(row.values() for row in rows)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths.values(), strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _at_least_1(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def parsed(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Flags, checked as far as that takes no reading; exits with 2."""
    parser = argparse.ArgumentParser(
        prog="prepare_eval_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in READERS:
        parser.add_argument(f"--{name}", dest=name, type=Path, metavar="FILE", help=OFFICIAL[name])
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="more passages to search: .jsonl with title and text (or contents), or .tsv as psgs_w100.tsv",
    )
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_OUTPUT), help=f"default: {DEFAULT_OUTPUT}")
    parser.add_argument(
        "--max_questions", type=_at_least_1, metavar="N", help="keep a sample of N questions a data set"
    )
    parser.add_argument("--seed", type=int, default=42, help="of samples, order and Oracle positions; default: 42")
    parser.add_argument(
        "--top",
        type=_at_least_1,
        nargs=2,
        default=[5, 20],
        metavar=("INSTRUCTION", "END_TO_END"),
        help="candidates of the two suites; default: 5 20",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser, parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Builds and writes every data set asked for. Raises DataError."""
    paths = {name: getattr(args, name) for name in READERS if getattr(args, name)}
    sizes = dict(zip((INSTRUCTION, END_TO_END), args.top, strict=True))
    if not paths:
        raise DataError(f"give at least one source file: {', '.join('--' + name for name in READERS)}")
    for path in (*paths.values(), *args.corpus):
        if not path.is_file():
            raise DataError(f"{path} is no file")
    for path in args.corpus:
        if not {".jsonl", ".json", ".tsv"} & set(path.suffixes):
            raise DataError(f"{path}: a corpus is .jsonl or .tsv, or one of these with .gz")
    kept = {name: [args.output / target(*(s, name, k)) for s in sizes for k in (ORACLE, NORMAL)] for name in paths}
    there = [path for targets in kept.values() for path in targets if path.exists()]
    if args.output.exists() and not args.output.is_dir():
        raise DataError(f"--output {args.output} is no directory")
    if there and not args.overwrite:
        raise DataError(f"{there[0]} is there already; --overwrite replaces it, --output DIR writes elsewhere")
    sources = [load_source(name, path, min(args.top)) for name, path in paths.items()]
    for source in sources:
        if not source.annotated and not args.corpus:
            raise DataError(f"{source.path}: this NQ-open file holds no passages; give some to search with --corpus")
    built = [build(source, args.corpus, sizes, args.max_questions, args.seed) for source in sources]
    notes = []
    for source, (files, _) in zip(sources, built, strict=True):
        write_all(args.output, files)
        notes.append(f"{source.name}: dropped {dropped_line(source) or 'nothing'}")
        if not source.annotated:
            notes.append(f"{source.name}: Oracle cannot be built, this file has no annotated passages; Normal only")
        for path in kept[source.name]:
            if path.relative_to(args.output) not in files and path.exists():
                path.unlink()
                notes.append(f"{source.name}: removed {path}, which belonged to the files that were replaced")
    print(table([row for _, row in built]), *notes, sep="\n")
    print(f"files: {args.output}/{{{','.join(SUITES[suite].folders[0] for suite in sizes)}}}/DATASET/")
    print("next: docs/EVALUATION_DATA.md says how to read these figures")


def main(argv: list[str] | None = None) -> None:
    """Entry point; a user's mistake is one line and exit 2."""
    parser, args = parsed(argv)
    try:
        import bm25s  # noqa: F401
    except ImportError:
        parser.exit(2, "prepare_eval_data: bm25s is missing: pip install bm25s\n")
    try:
        run(args)
    except DataError as error:
        parser.exit(2, f"prepare_eval_data: {error}\n")
    except OSError as error:
        parser.exit(1, f"prepare_eval_data: {error}; check the disk space and the rights under {args.output}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare_eval_data: stopped\n")


if __name__ == "__main__":
    main()
