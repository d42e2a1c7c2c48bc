"""Draw one question of an evaluation as a picture: candidates with scores, what was read, and the answers.

    python scripts/draw_sample.py --results DIR [--question ID] [--setting oracle] [--output figs/sample_main.png]

DIR is what evaluation.evaluate wrote, results.json and predictions.jsonl. Without --question it is the first one that
CLaRa answers from the gold documents it selected. Needs matplotlib only.
"""

import argparse
import sys
import textwrap
from pathlib import Path

from draw_figures import (
    BASE,
    COMPRESSOR,
    DPI,
    FIGS,
    FRAME,
    GENERATOR,
    LINE,
    MUTED,
    PAPER,
    REASONER,
    arrow,
    box,
    canvas,
    plt,
    say,
    vectors,
)

from evaluation.report_data import (
    DATASET_LABELS,
    PREDICTIONS_FILE,
    SYSTEM_LABELS,
    own_name,
    read_predictions,
    read_results,
)
from evaluation.scoring import line_scores

GOLD, GOLD_PAGE, READ_PAGE = "#8a5a00", "#fff1cc", "#e3eefa"
ROWS, ROW = 8, 0.66
BASELINES = ("text_rag", "oracle_text", "llmlingua2", "closed_book")
COLUMNS = {"question": 0.25, "candidates": 2.95, "answers": 9.55}
WIDTH = 13.1


def choose_question(lines: list[dict], wanted: str | None, setting: str | None) -> dict:
    """The line to draw. Raises ValueError when there is none such."""
    fitting = [line for line in lines if setting in (None, line["setting"]) and line.get("selected")]
    if wanted is not None:
        fitting = [line for line in fitting if str(line.get("id")) == wanted]
    if not fitting:
        raise ValueError(f"no question {wanted or ''} that selected documents, setting {setting or 'any'}.")

    def unlike_a_good_example(line: dict) -> tuple[bool, bool]:
        read = {entry["index"] for entry in line["selected"]}
        wrong = line_scores(line).get("clara", {}).get("cover_em") != 1
        return wrong, not line["pos_index"] or not set(line["pos_index"]) <= read

    return min(fitting, key=unlike_a_good_example)


def wrapped(text: str, width: int, lines: int) -> str:
    """At most `lines` lines of `width` characters; dollar signs are no formulas."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), width, max_lines=lines, placeholder=" …")).replace(
        "$", r"\$"
    )


def title_and_start(text: str, width: int) -> tuple[str, str]:
    """A document's title, if its first line is one, and its first words."""
    first, _, rest = text.partition("\n")
    title, start = (first, rest) if rest and len(first) < 100 else ("", text)
    return wrapped(title, width - 12, 1), wrapped(start, width, 1 if title else 2)


def rows_to_draw(line: dict) -> list[tuple[int, float | None, bool]]:
    """(candidate, its score, whether it was read): what was read, best first, then gold documents that were not."""
    rows = [(entry["index"], entry.get("score"), True) for entry in line["selected"]]
    read = {index for index, _, _ in rows}
    rows += [(index, None, False) for index in dict.fromkeys(line["pos_index"]) if index not in read]
    return rows[:ROWS]


def draw_candidate(axes: plt.Axes, y: float, line: dict, row: tuple[int, float | None, bool], best: float) -> None:
    """One document: title, first words, mark of gold, and its cosine score as a bar."""
    index, score, read = row
    left, right = COLUMNS["candidates"], 8.55
    gold = index in line["pos_index"]
    box(axes, left, y, right - left, ROW - 0.1, READ_PAGE if read else PAPER, COMPRESSOR if read else FRAME)
    title, start = title_and_start(line["documents"].get(str(index), ""), 46)
    if title:
        say(axes, left + 0.15, y + 0.4, title, 11.5, ha="left", weight="bold")
    say(axes, left + 0.15, y + (0.17 if title else 0.28), start, 10, ha="left", color=MUTED)
    if gold:
        box(axes, left + 3.66, y + 0.29, 0.5, 0.22, GOLD_PAGE, GOLD)
        say(axes, left + 3.91, y + 0.395, "gold", 9.5, color=GOLD, weight="bold")
    if score is not None:
        width = 1.2 * max(0.0, score) / best
        axes.add_patch(plt.Rectangle((left + 4.25, y + 0.09), width, 0.15, fc=COMPRESSOR, ec="none"))
        say(axes, left + 4.25, y + 0.39, f"{score:.3f}", 11, ha="left")
    elif not read:
        ranking = line.get("ranking") or []
        place = f"rank {ranking.index(index) + 1}" if index in ranking else "not read"
        say(axes, left + 4.25, y + 0.28, f"{place}", 10.5, ha="left", color=MUTED)


def draw_answer(
    axes: plt.Axes, y: float, title: str, reads: str, prediction: str, right: bool | None, color: str
) -> None:
    """A system's box, 1.45 inches high: who, what it reads, what it says, and whether the gold answer is in it."""
    left, width = COLUMNS["answers"], WIDTH - COLUMNS["answers"] - 0.25
    box(axes, left, y, width, 1.45, PAPER, color)
    box(axes, left, y + 1.08, width, 0.37, color, color)
    say(axes, left + 0.15, y + 1.255, title, 12.5, ha="left", va="center_baseline", weight="bold", color=PAPER)
    say(axes, left + 0.15, y + 0.9, reads, 10.5, ha="left", color=MUTED)
    say(axes, left + 0.15, y + 0.73, wrapped(prediction or "(empty)", 34, 3), 12, ha="left", va="top")
    if right is not None:
        mark, shade = ("✓", GENERATOR) if right else ("✗", "#a33b3b")
        say(axes, left + width - 0.22, y + 1.255, mark, 14, va="center_baseline", color=PAPER, weight="bold",
            bbox={"boxstyle": "circle,pad=0.12", "fc": shade, "ec": PAPER})  # fmt: skip


def draw_question(axes: plt.Axes, top: float, line: dict, config: dict) -> None:
    """The left column: the question, its vectors, and how far a document is compressed."""
    left = COLUMNS["question"]
    box(axes, left, top - 2.0, 2.2, 1.65, PAPER, REASONER)
    long = len(line["question"]) > 110
    say(
        axes,
        left + 1.1,
        top - 1.18,
        wrapped(line["question"], 26 if long else 21, 8 if long else 6),
        10 if long else 12,
    )
    say(axes, left + 1.1, top - 0.17, "question", 12.5, color=REASONER, weight="bold")
    arrow(axes, (left + 1.1, top - 2.03), (left + 1.1, top - 2.36))
    vectors(axes, left + 0.62, top - 2.62, 1, REASONER)
    memory = config.get("n_memory_tokens")
    say(axes, left + 1.1, top - 2.86, f"{memory} vectors", 11, color=REASONER)
    arrow(axes, (left + 1.64, top - 2.53), (COLUMNS["candidates"] - 0.06, top - 2.53), color=REASONER)
    box(axes, left, top - 4.75, 2.2, 1.5, BASE, FRAME)
    say(axes, left + 1.1, top - 3.48, f"compression, rate {config.get('compr_rate')}", 11, weight="bold")
    say(axes, left + 1.1, top - 3.8, f"document, ≤ {config.get('doc_max_length')} tokens", 11)
    arrow(axes, (left + 1.1, top - 3.95), (left + 1.1, top - 4.15))
    vectors(axes, left + 0.62, top - 4.38, 1, COMPRESSOR)
    say(axes, left + 1.1, top - 4.58, f"{memory} vectors", 11, color=COMPRESSOR)


def draw_answers(axes: plt.Axes, top: float, line: dict, config: dict) -> None:
    """The right column: CLaRa's answer, the best baseline there is, and the gold answer."""
    scores = line_scores(line)
    read, memory = len(line["selected"]), config.get("n_memory_tokens")

    def correct(system: str) -> bool | None:
        value = scores.get(system, {}).get("cover_em")
        return None if value is None else value == 1

    reads = f"reads {read * memory} vectors, prompt: {line['prompt_tokens']:,} tokens"
    draw_answer(axes, top - 1.8, "CLaRa", reads, line["prediction"], correct("clara"), GENERATOR)
    baselines = line.get("baselines", {})
    name = next((system for system in BASELINES if "prediction" in baselines.get(system, {})), None)
    if name is not None:
        tokens = baselines[name].get("prompt_tokens")
        reads = "no documents" if name == "closed_book" else "reads the text"
        reads += "" if tokens is None else f", prompt: {tokens:,} tokens"
        draw_answer(axes, top - 3.5, SYSTEM_LABELS[name], reads, baselines[name]["prediction"], correct(name), LINE)
    left = COLUMNS["answers"]
    box(axes, left, top - 4.75, WIDTH - left - 0.25, 0.95, GOLD_PAGE, GOLD)
    say(axes, left + 0.15, top - 4.0, "gold answer", 11.5, ha="left", weight="bold", color=GOLD)
    say(axes, left + 0.15, top - 4.2, wrapped(" / ".join(line["golden"]), 36, 2), 12, ha="left", va="top")


def draw_sample(line: dict, config: dict, target: Path) -> None:
    """Saves the picture of one line of predictions."""
    rows = rows_to_draw(line)
    height = max(5.65, 1.75 + ROW * len(rows))
    figure, axes = canvas(WIDTH, height)
    top = height - 0.5
    dataset, base = DATASET_LABELS.get(line["dataset"], line["dataset"]), own_name(config.get("base_model"))
    title = f"A question of {dataset}, {line['setting']} setting: {base} at rate {config.get('compr_rate')}"
    say(axes, 0.25, height - 0.28, title, 15, ha="left", weight="bold")
    draw_question(axes, top, line, config)
    left = COLUMNS["candidates"]
    heading = f"selected from {line['candidates']} candidates"
    say(axes, left + 0.05, top - 0.17, heading, 12.5, ha="left", color=COMPRESSOR, weight="bold")
    scores = [score for _, score, _ in rows if score is not None]
    if scores:
        say(axes, left + 4.25, top - 0.17, "cosine score", 11, ha="left", color=MUTED)
    best = max([score for score in scores if score > 0], default=1.0)
    for number, row in enumerate(rows):
        draw_candidate(axes, top - 0.35 - ROW * (number + 1) + 0.1, line, row, best)
    rest = line["candidates"] - len(rows)
    if rest > 0:
        say(axes, left + 0.15, top - 0.45 - ROW * len(rows), f"and {rest} more candidates", 11, ha="left",
            color=MUTED)  # fmt: skip
    arrow(axes, (8.62, top - 1.1), (COLUMNS["answers"] - 0.05, top - 1.1), color=COMPRESSOR)
    say(axes, 9.06, top - 0.88, f"{len(line['selected'])} × {config.get('n_memory_tokens')}", 11, color=COMPRESSOR)
    draw_answers(axes, top, line, config)
    figure.savefig(target, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="draw_sample", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, required=True, help="directory with results.json and predictions.jsonl")
    parser.add_argument("--question", help="id of the question; default: a typical one")
    parser.add_argument("--setting", help="normal or oracle; default: either")
    parser.add_argument("--output", type=Path, default=FIGS / "sample_main.png", help="the picture (%(default)s)")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
        lines = list(read_predictions(args.results))
        if not lines:
            raise ValueError(f"{args.results} holds no {PREDICTIONS_FILE}, or an empty one; there is nothing to draw.")
        line = choose_question(lines, args.question, args.setting)
        draw_sample(line, results["config"], args.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {args.output}: question {line.get('id')} of {line['dataset']}, {line['setting']}")


if __name__ == "__main__":
    main()
