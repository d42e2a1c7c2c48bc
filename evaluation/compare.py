"""Compare two systems question by question: B − A with its 95 % bootstrap interval over the questions both answered.

python -m evaluation.compare results/a results/b
python -m evaluation.compare results/a results/a --system_a clara --system_b text_rag --metrics cover_em f1
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.intervals import LEVEL, average_interval, paired_difference
from evaluation.report_data import PREDICTIONS_FILE, read_predictions, read_results
from evaluation.scoring import AVERAGE, METRICS, SYSTEM, line_scores
from openrlhf.utils.logging import write_whole

Key = tuple[str, str, str, str]
"""Data set, setting, id and question text."""


@dataclass(frozen=True)
class Side:
    """One system's scores: metric → value for each question, and the gold answers they were computed from."""

    folder: Path
    system: str
    first_answer_only: bool
    scores: dict[Key, dict[str, float]]
    golds: dict[Key, list[str]]


def read_side(folder: Path, system: str) -> Side:
    """Scores `system` from the predictions in `folder`.

    Raises ValueError for a missing file, a damaged line (with its number), a question that is there twice, or a
    system that the predictions do not have.
    """
    config, path = read_results(folder)["config"], folder / PREDICTIONS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {PREDICTIONS_FILE}; a comparison needs the answers, not only the figures.")
    first_answer_only = bool(config.get("first_answer_only", False))
    side = Side(folder, system, first_answer_only, {}, {})
    systems: set[str] = set()
    lines = tqdm(read_predictions(folder), str(path), unit=" lines", disable=not sys.stderr.isatty())
    for number, line in enumerate(lines, 1):
        try:
            scores = line_scores(line, first_answer_only)
            key = (line["dataset"], line["setting"], str(line["id"]), line["question"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: it cannot be scored ({type(error).__name__}: {error}).") from error
        if key in side.golds:
            raise ValueError(f"{path}:{number}: question {key[2]!r} of {key[0]}, {key[1]}, is there twice.")
        systems.update(scores)
        side.golds[key] = line["golden"]
        if system in scores:
            side.scores[key] = scores[system]
    if not side.scores:
        raise ValueError(
            f"{path} has nothing of the system {system!r}; it has: {', '.join(sorted(systems)) or 'none'}."
        )
    return side


def compare(a: Side, b: Side, metrics: Iterable[str] = METRICS, seed: int = 0) -> list[dict]:
    """Rows with dataset, setting, metric, the means a and b, difference (b − a), its low and high, and n.

    Only questions for which both sides have the metric count. A setting with several data sets gets rows of the data
    set "average", the mean over them, for the metrics that all have. Raises ValueError when the sides share no
    question or metric, were scored by different rules, or give one question different gold answers.
    """
    if a.first_answer_only != b.first_answer_only:
        raise ValueError("One side was scored with --first_answer_only and the other without; evaluate both alike.")
    shared = [key for key in a.scores if key in b.scores]
    if not shared:
        raise ValueError("The two sides share no question (data set, setting, id and text must agree).")
    for key in shared:
        if a.golds[key] != b.golds[key]:
            raise ValueError(
                f"Question {key[2]!r} of {key[0]}, {key[1]}, has the gold answers {a.golds[key]} in {a.folder} and "
                f"{b.golds[key]} in {b.folder}; evaluate both on the same data."
            )
    datasets: dict[str, dict[str, list[Key]]] = {}  # setting → data set → questions
    for key in shared:
        datasets.setdefault(key[1], {}).setdefault(key[0], []).append(key)
    rows = [
        {"setting": setting, "metric": metric, **row}
        for setting, keys in datasets.items()
        for metric in metrics
        for row in _rows(a, b, keys, metric, seed)
    ]
    if not rows:
        raise ValueError(f"The two sides share no metric of: {', '.join(metrics)}.")
    return rows


def _rows(a: Side, b: Side, keys: dict[str, list[Key]], metric: str, seed: int) -> list[dict]:
    """One row a data set of a setting, and their average."""
    values = {}
    for dataset, of_dataset in keys.items():
        both = [key for key in of_dataset if metric in a.scores[key] and metric in b.scores[key]]
        if both:
            values[dataset] = [np.array([side.scores[key][metric] for key in both]) for side in (a, b)]
    found = {
        dataset: (float(a_Q.mean()), float(b_Q.mean()), paired_difference(a_Q, b_Q, seed))
        for dataset, (a_Q, b_Q) in values.items()
    }
    if len(values) == len(keys) > 1:
        a_mean, b_mean = (float(np.mean([row[side] for row in found.values()])) for side in (0, 1))
        found[AVERAGE] = a_mean, b_mean, average_interval([b_Q - a_Q for a_Q, b_Q in values.values()], seed)
    return [
        {"dataset": dataset, "a": a_mean, "b": b_mean, "difference": d.value, "low": d.low, "high": d.high, "n": d.n}
        for dataset, (a_mean, b_mean, d) in found.items()
    ]


def _verdict(row: dict) -> str:
    """Which side is better where the interval excludes 0, else nothing."""
    if row["low"] <= 0 <= row["high"]:
        return ""
    higher = METRICS[row["metric"]].higher_is_better
    if higher is None:
        return "differs"
    return "B better" if (row["low"] > 0) == higher else "A better"


def markdown(a: Side, b: Side, rows: Sequence[dict]) -> str:
    """The comparison as Markdown, with what it leaves out."""
    only_a, only_b = (len(x.scores.keys() - y.scores.keys()) for x, y in ((a, b), (b, a)))
    lines = [
        f"A: {a.system} in {a.folder}  ",
        f"B: {b.system} in {b.folder}  ",
        f"{len(a.scores) - only_a} questions compared; left out: {only_a} only in A, {only_b} only in B.",
        "",
        f"| setting | data set | metric | A | B | B − A [{LEVEL:.0%} interval] | n | interval excludes 0 |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        metric = METRICS[row["metric"]]
        difference, low, high = (metric.text(row[key], sign="+") for key in ("difference", "low", "high"))
        cells = [row["setting"], row["dataset"], metric.label, metric.text(row["a"]), metric.text(row["b"])]
        cells += [f"{difference} [{low}, {high}]", str(row["n"]), _verdict(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("compare", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("a", type=Path, help="results directory of A")
    parser.add_argument("b", type=Path, help="results directory of B; may be the same with another system")
    parser.add_argument("--system_a", default=SYSTEM, help="whose answers to take from A (default: %(default)s)")
    parser.add_argument("--system_b", default=SYSTEM, help="whose answers to take from B (default: %(default)s)")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), metavar="METRIC",
                        help=f"default: all that both have; of {', '.join(METRICS)}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a new JSON file for the figures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the comparison; a mistake of the user's is one line and exit status 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: give a number from 0.")
        if args.a.resolve() == args.b.resolve() and args.system_a == args.system_b:
            raise ValueError("A and B are the same system of the same directory; name another with --system_b.")
        if args.output and (args.output.exists() or not args.output.parent.is_dir()):
            raise ValueError(f"--output {args.output}: give a file that is not there yet, in a directory that is.")
        a, b = read_side(args.a, args.system_a), read_side(args.b, args.system_b)
        rows = compare(a, b, args.metrics, args.seed)
    except ValueError as error:
        parser.exit(2, f"compare: {' '.join(str(error).split())}\n")
    sys.stdout.write(markdown(a, b, rows))
    if args.output:
        sides = {name: {"folder": str(side.folder), "system": side.system} for name, side in (("a", a), ("b", b))}
        kept = {"format": 1, **sides, "first_answer_only": a.first_answer_only, "seed": args.seed, "rows": rows}
        write_whole(args.output, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        sys.stdout.write(f"\nThe figures are in {args.output}.\n")


if __name__ == "__main__":
    main()
