"""Training and evaluation records (SPEC 7): read, validate, blend. Knows nothing about tokens or models.

A record, whatever its source, becomes one row with these columns:
    data_type   "qa" or "paraphrase" (stage 1), "answer" (the other stages)
    question    list of questions; one for "answer", none for "paraphrase"
    answers     list of target texts, as many as questions; one for "paraphrase" and "answer"
    docs        list of documents
    golden      list of accepted answers, for metrics
    pos_index   positions in docs of the documents that hold the answer; may be empty
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets

logger = logging.getLogger(__name__)

Row = dict[str, object]

FEATURES = datasets.Features(
    {
        "data_type": datasets.Value("string"),
        "question": datasets.List(datasets.Value("string")),
        "answers": datasets.List(datasets.Value("string")),
        "docs": datasets.List(datasets.Value("string")),
        "golden": datasets.List(datasets.Value("string")),
        "pos_index": datasets.List(datasets.Value("int64")),
    }
)
# Stands for stage2 where the documents come from a retrieval service: those of the records are not looked at.
RETRIEVED = "stage2_mips"
STAGE_FILES = {
    "stage1": ("pretrain_data.jsonl",),
    "stage1_2": ("instruction_data.jsonl", "instruction_tuning_data.jsonl"),
    RETRIEVED: ("end_to_end_data.jsonl",),
    "stage2": ("end_to_end_data.jsonl",),
    "stage2_pretrain_retrieval": ("end_to_end_data.jsonl",),
    "text_rag": ("instruction_data.jsonl", "instruction_tuning_data.jsonl", "end_to_end_data.jsonl"),
}


class RecordError(ValueError):
    """A record that cannot be used; the message says where it is and what is wrong with it."""


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{field} must be a non-empty text, got {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError(f"{field} contains half a surrogate pair, which is no text: {_shown(value)}") from None
    return value


def _texts(value: object, field: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise RecordError(f"{field} must be a non-empty list of texts, got {_shown(value)}")
    return [_text(item, f"{field}[{i}]") for i, item in enumerate(values)]


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def record_docs(record: dict) -> list[str]:
    """The documents of a record, under whichever name they stand. Raises RecordError when there are none."""
    for field in ("docs", "context", "content"):
        if record.get(field) is not None:
            return _texts(record[field], field)
    raise RecordError("docs is missing (context and content are accepted too)")


def _stage1_rows(record: dict) -> Iterator[Row]:
    kind = record.get("data_type")
    if kind not in ("qa", "paraphrase"):
        hint = "; this looks like instruction or end-to-end data" if kind is None and "question" in record else ""
        raise RecordError(f'data_type must be "qa" or "paraphrase" in stage 1, got {_shown(kind)}{hint}')
    docs = record_docs(record)
    answers = [record["answers"]] if isinstance(record.get("answers"), str) else record.get("answers")
    if not isinstance(answers, list) or not answers:
        raise RecordError(f"answers must be a non-empty list, got {_shown(record.get('answers'))}")
    if kind == "paraphrase":
        if len(docs) not in (1, len(answers)):
            raise RecordError(f"{len(docs)} docs and {len(answers)} paraphrases do not pair up")
        for i, text in enumerate(_texts(answers, "answers")):
            yield _row(kind, [], [text], [docs[i if len(docs) > 1 else 0]])
        return
    questions = record.get("question")
    questions = [questions] if isinstance(questions, str) else questions
    if not isinstance(questions, list) or len(questions) != len(answers):
        count = len(questions) if isinstance(questions, list) else 0
        raise RecordError(f"{count} questions for {len(answers)} answers: each question needs its answer")
    if len(docs) == 1:
        yield _row(kind, _texts(questions, "question"), _texts(answers, "answers"), docs)
        return
    if len(docs) != len(questions):
        raise RecordError(f"{len(docs)} docs for {len(questions)} questions do not pair up: give one document a record")
    for i, doc in enumerate(docs):
        asked, said = _texts(questions[i], f"question[{i}]"), _texts(answers[i], f"answers[{i}]")
        if len(asked) != len(said):
            raise RecordError(f"docs[{i}] has {len(asked)} questions for {len(said)} answers")
        yield _row(kind, asked, said, [doc])


def _answer_row(record: dict, stage: str) -> Row:
    question = record.get("question")
    if isinstance(question, list) or record.get("data_type") in ("qa", "paraphrase"):
        raise RecordError(f"question must be one text, got {_shown(question)}; this looks like stage-1 data")
    question = _text(question, "question")
    docs = [] if stage == RETRIEVED else record_docs(record)
    golden: list[str] = []
    for field in ("golden_answers", "gold_answer", "answers", "answer"):
        if not golden and record.get(field):
            golden = _texts(record[field], field)
    answer = record.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        answer = record.get("gold_answer")
        if not isinstance(answer, str) or not answer.strip():
            answer = golden[0] if golden else None
    if answer is None:
        raise RecordError("there is no answer: give answer, gold_answer, golden_answers or answers")
    positives = None if stage == RETRIEVED else record.get("pos_index")
    if stage == "stage2_pretrain_retrieval" and positives is None:
        raise RecordError("pos_index is missing; supervised retrieval needs it")
    positives = [positives] if isinstance(positives, int) else (positives or [])
    for position in positives if isinstance(positives, list) else [positives]:
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < len(docs):
            raise RecordError(f"pos_index {_shown(positives)} must hold positions 0 to {len(docs) - 1} of docs")
    return _row("answer", [question], [_text(answer, "answer")], docs, golden, sorted(set(positives)))


def _row(data_type, question, answers, docs, golden=None, pos_index=None) -> Row:
    return {
        "data_type": data_type,
        "question": question,
        "answers": answers,
        "docs": docs,
        "golden": golden if golden is not None else list(answers),
        "pos_index": pos_index or [],
    }


def record_rows(record: object, stage: str) -> list[Row]:
    """The rows of one record as it stands in a file.

    Raises:
        RecordError: the record cannot be used in this stage.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record must be a JSON object, got {_shown(record)}")
    if stage == "stage1":
        return list(_stage1_rows(record))
    return [_answer_row(record, stage)]


def file_rows(path: str | Path, stage: str, skipped: list[str] | None = None) -> Iterator[Row]:
    """Rows of one JSONL file.

    Args:
        skipped: where given, bad lines are described here and passed over; otherwise the first one raises.

    Raises:
        RecordError: `file:line: reason`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                rows = record_rows(json.loads(text.rstrip("\r\n")), stage) if text.strip() else []
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start} of the line"
            except json.JSONDecodeError as error:
                reason = f"not JSON: {error.msg} at column {error.colno}"
            except RecordError as error:
                reason = str(error)
            except (RecursionError, ValueError) as error:  # thousands of brackets or digits
                reason = f"not JSON that can be read: {error}"
            else:
                yield from rows
                continue
            if skipped is None:
                raise RecordError(f"{path}:{number}: {reason}")
            skipped.append(f"{path}:{number}: {reason}")


def find_files(name: str, stage: str, split: str) -> list[Path]:
    """Local files behind one name of --dataset: a file, or what a directory holds for the stage; [] for a Hub name.

    Raises:
        FileNotFoundError: the name is clearly a path and there is nothing.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        named = [path / file for file in (*STAGE_FILES[stage], f"{split}.jsonl") if (path / file).is_file()]
        files = named[:1] or sorted(path.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{path} holds no .jsonl file; {stage} looks for {', '.join(STAGE_FILES[stage])}")
        return files
    if path.suffix in (".jsonl", ".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} does not exist; --dataset takes a JSONL file, a directory or a Hub data set")
    return []


def _generate(files: tuple[str, ...], stage: str, skip_bad: bool, stamp: tuple) -> Iterator[Row]:
    skipped: list[str] | None = [] if skip_bad else None
    for file in files:
        yield from file_rows(file, stage, skipped)
    yield _last_row(skipped)


def _hub_rows(name: str, split: str, stage: str, skip_bad: bool) -> Iterator[Row]:
    skipped = []
    for number, record in enumerate(datasets.load_dataset(name, split=split)):
        try:
            yield from record_rows(record, stage)
        except RecordError as error:
            reason = f"{name}[{split}] record {number}: {error}"
            if not skip_bad:
                raise RecordError(reason) from None
            skipped.append(reason)
    yield _last_row(skipped)


def _last_row(skipped: list[str] | None) -> Row:
    """Ends every cached set and tells what was skipped, whichever rank or earlier run wrote the cache."""
    return _row("skipped", [], skipped or [], [])


def _load_one(name: str, stage: str, split: str, skip_bad: bool) -> datasets.Dataset:
    files = find_files(name, stage, split)
    try:
        if files:
            # Size and time are part of the cache key: a file that changed is read again. Lists would be sharded.
            stamp = tuple((os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files)
            options = {
                "files": tuple(str(file.resolve()) for file in files),
                "stage": stage,
                "skip_bad": skip_bad,
                "stamp": stamp,
            }
            data = datasets.Dataset.from_generator(_generate, features=FEATURES, gen_kwargs=options)
        else:
            options = {"name": name, "split": split, "stage": stage, "skip_bad": skip_bad}
            data = datasets.Dataset.from_generator(_hub_rows, features=FEATURES, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, RecordError):
            raise RecordError(f"{cause}\n--skip_bad_records skips and counts such records") from None
        if files:
            raise cause from None
        raise FileNotFoundError(f"{name} is no local file, and could not be loaded from the Hub: {cause}") from error
    skipped = data[-1]["answers"]
    if skipped:
        logger.warning("skipped %d bad records; the first: %s", len(skipped), skipped[0])
    return data.select(range(len(data) - 1))


def fingerprint(data: datasets.Dataset) -> str:
    """Of the number of records and some 64 of them: another one means that the data is not the same."""
    some = [data[i] for i in range(0, len(data), max(1, len(data) // 64))]
    return hashlib.sha256(json.dumps([len(data), some]).encode()).hexdigest()[:16]


def load_records(
    names: str,
    stage: str,
    split: str = "train",
    probs: list[float] | None = None,
    seed: int = 42,
    max_samples: int | None = None,
    skip_bad: bool = False,
    paraphrases_only: bool = False,
) -> datasets.Dataset:
    """All records of one or several sets.

    Args:
        names: comma-separated JSONL files, directories or Hub names.
        split: which split of a Hub name, or `{split}.jsonl` of a directory without the stage's own file.
        probs: share of each set in the blend (until the first is used up); None puts them one after another.
        max_samples: keep the first so many.
        paraphrases_only: stage 1 without QA sets.

    Raises:
        RecordError: a bad record (unless skipped), or none left.
        FileNotFoundError: a set that is not there.
    """
    sets = [name.strip() for name in names.split(",") if name.strip()]
    parts = [_load_one(name, stage, split, skip_bad) for name in sets]
    if paraphrases_only:
        kinds = [part["data_type"] for part in parts]
        kept = [[i for i, kind in enumerate(column) if kind == "paraphrase"] for column in kinds]
        parts = [part.select(rows) for part, rows in zip(parts, kept, strict=True)]
    for name, part in zip(sets, parts, strict=True):
        if not len(part):
            raise RecordError(f"{name} holds no usable record for {stage}" + (" (paraphrases only)" * paraphrases_only))
    if probs is not None:
        whole = datasets.interleave_datasets(parts, probabilities=probs, seed=seed, stopping_strategy="first_exhausted")
    else:
        whole = datasets.concatenate_datasets(parts)
    return whole.select(range(min(max_samples or len(whole), len(whole))))
