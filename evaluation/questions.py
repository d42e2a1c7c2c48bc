"""Evaluation files: find them, read and check them. Knows nothing about models.

Layout (SPEC 7): EVAL_DATA/SUITE_FOLDER/DATASET/FILE, or EVAL_DATA/DATASET/FILE, with the folders and files of
`SUITES`. Any directory name is a data set. For the pretraining suite EVAL_DATA may also be one JSONL file.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from evaluation.paper import PAPER_DATASETS
from evaluation.scoring import PARAPHRASE
from openrlhf.datasets.records import RecordError, file_rows

NORMAL, ORACLE = "normal", "oracle"
END_TO_END, INSTRUCTION, PRETRAINING = "end_to_end", "instruction_tuning", "pretraining"


@dataclass(frozen=True)
class Suite:
    """What one of the three scripts measures: where its files are and which settings it has."""

    folders: tuple[str, ...]
    files: dict[str, str]
    records: str


_ANSWERED = {NORMAL: "eval_processed_no_pos.jsonl", ORACLE: "eval_processed_with_pos.jsonl"}
SUITES = {
    END_TO_END: Suite(("end_to_end_evaluation", "e2e"), _ANSWERED, "stage2"),
    INSTRUCTION: Suite(("instruction_tuning_evaluation", "instruction"), _ANSWERED, "stage2"),
    PRETRAINING: Suite(("pretraining_evaluation", "pretraining"), {PARAPHRASE: "eval_processed.jsonl"}, "stage1"),
}


@dataclass(frozen=True)
class Question:
    """One question of a file. For paraphrases `question` is empty and `golden` the given paraphrase, if any.

    positives: positions in `docs` of the gold passages. relevant: how many gold passages the question has; in Normal,
    where the retriever may have missed some, that of the Oracle file (SPEC 8), None where there is no such file.
    oracle_docs: the gold passages themselves, from the Oracle file; empty where there is none.
    """

    dataset: str
    setting: str
    id: str
    question: str
    golden: tuple[str, ...]
    docs: tuple[str, ...]
    positives: tuple[int, ...]
    relevant: int | None
    oracle_docs: tuple[str, ...]


def dataset_files(eval_data: str, suite: str, datasets: list[str], settings: list[str]) -> dict[str, dict[str, Path]]:
    """The file of every data set and setting asked for: {dataset: {setting: path}}.

    Args:
        datasets: names, or none for all that are there, in the order of the paper's tables.

    Raises:
        FileNotFoundError: EVAL_DATA, or a file of a data set, is missing.
        ValueError: a data set's name is unknown.
    """
    spec, root = SUITES[suite], Path(eval_data).expanduser()
    if root.is_file() and suite == PRETRAINING:
        return {root.stem: {PARAPHRASE: root}}
    if not root.is_dir():
        raise FileNotFoundError(f"EVAL_DATA: {eval_data} is no directory; give the one that holds {spec.folders[0]}")
    places = [root / folder for folder in spec.folders if (root / folder).is_dir()] or [root]
    base = places[0]
    there = sorted(p.name for p in base.iterdir() if any((p / file).is_file() for file in spec.files.values()))
    there.sort(key=lambda name: PAPER_DATASETS.index(name) if name in PAPER_DATASETS else len(PAPER_DATASETS))
    if not there:
        layout = f"{spec.folders[0]}/DATASET/{next(iter(spec.files.values()))}"
        raise FileNotFoundError(f"EVAL_DATA: {root} holds no data set of this suite; it should have {layout}")
    unknown = [name for name in datasets if name not in there]
    if unknown:
        raise ValueError(f"DATASETS: unknown data set {', '.join(unknown)}; {base} has {', '.join(there)}")
    found = {name: {setting: base / name / spec.files[setting] for setting in settings} for name in datasets or there}
    for files in found.values():
        for setting, path in files.items():
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; the {setting} setting needs it")
    return found


def file_facts(path: Path) -> dict:
    """What identifies a file in results: its name, and the hash of its bytes."""
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def load_questions(files: dict[str, Path], dataset: str, suite: str, max_questions: int | None) -> list[Question]:
    """The first `max_questions` questions of each setting of one data set, in file order.

    Raises:
        RecordError: `file:line: reason`, for the first line that cannot be used, or a file without any record.
    """
    if suite == PRETRAINING:
        return _load_documents(files[PARAPHRASE], dataset, max_questions)
    rows = {setting: _rows(path, suite) for setting, path in files.items()}
    oracle = next(iter(files.values())).with_name(_ANSWERED[ORACLE])
    full = rows[ORACLE] if ORACLE in rows else _rows(oracle, suite) if oracle.is_file() else []
    golds = [[row["docs"][i] for i in row["pos_index"]] for row in full]
    by_text = {row["question"][0]: gold for row, gold in zip(full, golds, strict=True)}
    questions = []
    for setting, read in rows.items():
        for number, row in enumerate(read[:max_questions]):
            text, positives = row["question"][0], row["pos_index"]
            # The same line of the Oracle file where it asks the same, since a question may be asked twice.
            same_line = number < len(full) and full[number]["question"][0] == text
            annotated = golds[number] if same_line else by_text.get(text)
            relevant = len(positives) if setting == ORACLE else None if annotated is None else len(annotated)
            if relevant is not None and relevant < len(positives):
                raise RecordError(
                    f"{files[setting]}: question {text!r} has {len(positives)} gold passages, but only {relevant} in "
                    f"{oracle.name}: the two files do not belong together"
                )
            questions.append(
                Question(
                    *(dataset, setting, str(number), text, tuple(row["golden"]), tuple(row["docs"]), tuple(positives)),
                    relevant,
                    tuple(annotated or ()),
                )
            )
    return questions


def _rows(path: Path, suite: str) -> list[dict]:
    rows: list[dict] = list(file_rows(path, SUITES[suite].records))
    if not rows:
        raise RecordError(f"{path} holds no record")
    return rows


def _load_documents(path: Path, dataset: str, max_questions: int | None) -> list[Question]:
    """Each distinct document once, with its first paraphrase where the file has one."""
    paraphrases: dict[str, list[str]] = {}
    for row in _rows(path, PRETRAINING):
        given = paraphrases.setdefault(row["docs"][0], [])
        if row["data_type"] == "paraphrase":
            given += row["answers"]
    return [
        Question(dataset, PARAPHRASE, str(number), "", tuple(given[:1]), (doc,), (0,), None, (doc,))
        for number, (doc, given) in enumerate(list(paraphrases.items())[:max_questions])
    ]
