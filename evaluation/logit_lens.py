"""What a question's memory vectors say: each one through the LM head, its highest tokens as words (logit lens).

    python -m evaluation.logit_lens --checkpoint DIR --questions FILE.jsonl --max_questions 8 --output_dir DIR
    python -m evaluation.logit_lens --checkpoint DIR --question "Who wrote Emma?" "Can penguins fly?"

FILE.jsonl is an evaluation file. Prints a readable list; with --output_dir also writes logit_lens.json, .html and .png.

Protocol (SPEC 8): the query reasoner's L vectors are final hidden states, so they enter the LM head as they are. The 50
highest tokens of each vector are taken; then added tokens and tokens without a letter or digit are left out, and
the rest is gathered over the vectors. Forms that differ only in case or in the blank before them are one token there.

A gathered token occurs in a text when, without regard to case and to blanks around it, it is a word of the text
(letters, digits and underscores in a row) or one of the pieces into which the tokenizer cuts the text. So " Capital"
occurs in "the capital", the piece "berra" in "Canberra" where the tokenizer writes Can+berra, and " cap" in neither.
"""

import json
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from tqdm import tqdm

from evaluation.cli import OneLineParser, check_checkpoint, load, prepare_output, save_figure
from openrlhf.datasets.records import file_rows
from openrlhf.models.adapters import QUERY
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.public_format import ADAPTERS_FILE, read_public_adapters
from openrlhf.models.tokens import ClaraTokens
from openrlhf.utils.logging import set_up_logging, write_whole

RANDOM_DRAWS = 20
"""Draws of other passages a question, for the share that chance explains."""

GATHERED_PER_SLOT = 4
"""Gathered tokens shown for each one shown of a slot; logit_lens.json has them all."""

PICTURED = 8
"""Questions in the picture; a page of more is not legible."""

LEGEND = "+ absent from the question   * in a gold passage   after the colon: best rank, and in how many slots"


@dataclass
class Question:
    """A question and, where they are known, its gold passages and all passages of its record."""

    text: str
    gold: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)


@dataclass
class SlotToken:
    """One of a slot's highest tokens. rank: 1 for the highest logit of the slot, left-out tokens counted."""

    token: str
    rank: int
    logit: float


@dataclass
class GatheredToken:
    """A token over all slots: its best rank, and in how many slots it is. in_gold is None without a gold passage."""

    token: str
    rank: int
    slots: int
    in_question: bool
    in_gold: bool | None


@dataclass
class Reading:
    """What the lens shows of one question."""

    question: str
    gold_passages: int
    slots: list[list[SlotToken]]
    gathered: list[GatheredToken]


@torch.no_grad()
def lens(model: CLaRa, questions: Sequence[str], top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest tokens of every memory vector of the questions (B questions, L vectors, T = min(top, vocabulary)).

    Returns:
        ids `[B, L, T]` int64 and their logits `[B, L, T]` float32, highest first, on the CPU.

    Raises:
        ValueError: the model has no query reasoner.
    """
    query_BE = model.encode_queries(list(questions))
    ids, logits = [], []
    for query_E in tqdm(query_BE, desc="LM head", unit="question", disable=None):
        logits_LV = model.head(query_E.view(model.config.n_memory_tokens, -1)).float()
        best = logits_LV.topk(min(top, logits_LV.shape[-1]))
        ids.append(best.indices.cpu())
        logits.append(best.values.cpu())
    return torch.stack(ids), torch.stack(logits)


class Vocabulary:
    """How tokens read, and which of them occur in a text."""

    def __init__(self, tokens: ClaraTokens):
        self.tokens = tokens
        self.tokenizer: Any = tokens.tokenizer
        self.left_out = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        # Decoders of the SentencePiece kind drop the first blank of a text, so no token is decoded alone.
        self.before = tokens.plain_ids(["a"])[0]
        self.known: dict[int, str | None] = {}
        self.texts: dict[str, frozenset[str]] = {}

    def token(self, token_id: int) -> str | None:
        """The token with the blanks it has inside a text; None for one that the protocol leaves out."""
        if token_id not in self.known:
            self.known[token_id] = self._token(token_id)
        return self.known[token_id]

    def _token(self, token_id: int) -> str | None:
        if token_id in self.left_out:
            return None
        text = self._decode([*self.before, token_id])[len(self._decode(self.before)) :]
        half_a_character = "\ufffd" in text
        readable = any(unicodedata.category(char)[0] in "LMN" for char in text)
        return text if readable and not half_a_character else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def occurring(self, text: str) -> frozenset[str]:
        """Every token that occurs in a text, in the form `same` gives; the rule is in the module's docstring."""
        if text not in self.texts:
            pieces = (self.token(i) for i in self.tokens.plain_ids([text])[0])
            words = re.findall(r"\w+", text.casefold())
            self.texts[text] = frozenset([*words, *(same(piece) for piece in pieces if piece)])
        return self.texts[text]


def same(token: str) -> str:
    """The form in which tokens are compared: without blanks around it and without case."""
    return token.strip().casefold()


def read(vocabulary: Vocabulary, question: Question, ids_LT: torch.Tensor, logits_LT: torch.Tensor) -> Reading:
    """The readable tokens of one question's slots, and the same gathered over them, best rank first."""
    slots = []
    for ids, logits in zip(ids_LT.tolist(), logits_LT.tolist(), strict=True):
        named = [(vocabulary.token(i), rank, logit) for rank, (i, logit) in enumerate(zip(ids, logits, strict=True), 1)]
        slots.append([SlotToken(token, rank, logit) for token, rank, logit in named if token is not None])
    best: dict[str, SlotToken] = {}
    within: dict[str, set[int]] = {}
    for number, slot in enumerate(slots):
        for token in slot:
            key = same(token.token)
            within.setdefault(key, set()).add(number)
            if key not in best or token.rank < best[key].rank:
                best[key] = token
    asked = vocabulary.occurring(question.text)
    gold = frozenset().union(*map(vocabulary.occurring, question.gold))
    gathered = [
        GatheredToken(
            token.token.strip(), token.rank, len(within[key]), key in asked, key in gold if question.gold else None
        )
        for key, token in best.items()
    ]
    gathered.sort(key=lambda token: (token.rank, -token.slots))
    return Reading(question.text, len(question.gold), slots, gathered)


def summarise(vocabulary: Vocabulary, questions: Sequence[Question], readings: Sequence[Reading]) -> dict:
    """Averages over questions, shares in [0, 1]; None where no question has what the share needs.

    absent: share of the gathered tokens that do not occur in the question. absent_in_gold: share of those that occur in
    a gold passage. absent_in_random: the same with as many passages drawn from all passages of these questions but the
    question's own gold ones, the mean of 20 draws. The last two are over the same questions: those that have gold
    passages, enough other passages, and tokens that are absent from the question.
    """
    every = list(dict.fromkeys(passage for question in questions for passage in question.passages))
    absent, in_gold, in_random = [], [], []
    draw = random.Random(0)
    for question, reading in zip(questions, readings, strict=True):
        new = {same(token.token) for token in reading.gathered if not token.in_question}
        if reading.gathered:
            absent.append(len(new) / len(reading.gathered))
        gold = set(question.gold)
        others = [passage for passage in every if passage not in gold]
        if not new or not gold or len(others) < len(gold):
            continue
        in_gold.append(_share(vocabulary, new, question.gold))
        drawn = [_share(vocabulary, new, draw.sample(others, len(gold))) for _ in range(RANDOM_DRAWS)]
        in_random.append(sum(drawn) / RANDOM_DRAWS)
    return {
        "questions": len(questions),
        "absent": _mean(absent),
        "questions_with_gold": len(in_gold),
        "absent_in_gold": _mean(in_gold),
        "absent_in_random": _mean(in_random),
    }


def _share(vocabulary: Vocabulary, tokens: set[str], passages: Sequence[str]) -> float:
    return len(tokens & frozenset().union(*map(vocabulary.occurring, passages))) / len(tokens)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def summary_text(summary: dict) -> str:
    """The summary in one or two sentences."""
    if summary["absent"] is None:
        return "No token has a letter or digit."
    text = f"{summary['absent']:.1%} of the gathered tokens are absent from the question"
    text += f" (mean of {summary['questions']} questions)."
    if summary["absent_in_gold"] is not None:
        text += (
            f" Of these, {summary['absent_in_gold']:.1%} occur in the gold passages, and "
            f"{summary['absent_in_random']:.1%} in as many random other passages (means of "
            f"{summary['questions_with_gold']} questions)."
        )
    return text


def printable(text: str) -> str:
    """One line that cannot steer a terminal: blanks squeezed, control and direction characters as escapes."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def text_report(readings: Sequence[Reading], show: int) -> str:
    """The readings for a terminal."""
    lines = [LEGEND]
    for number, reading in enumerate(readings, 1):
        lines.append(f"\nquestion {number} of {len(readings)}: {printable(reading.question)}")
        for index, slot in enumerate(reading.slots):
            lines.append(f"  slot {index:>3}  " + " · ".join(printable(t.token) for t in slot[:show]))
        shown = reading.gathered[: show * GATHERED_PER_SLOT]
        lines.append(f"  gathered, {len(shown)} of {len(reading.gathered)}:")
        words = [
            f"{'+' * (not t.in_question)}{printable(t.token)}{'*' * bool(t.in_gold)}:{t.rank},{t.slots}" for t in shown
        ]
        lines.append(
            fill("  ".join(words), 116, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
        )
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: light-dark(#1f2933, #e4e7eb); background: light-dark(#ffffff, #14181d); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .15rem .5rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid light-dark(#d5dae0, #39424d); }
.token { display: inline-block; padding: 0 .35rem; margin: .1rem; border-radius: .3rem; }
.asked { color: light-dark(#697483, #98a3b0); font-style: italic; }
.gold { background: light-dark(#cfe3f5, #17456b); font-weight: 600; }
small { opacity: .75; font-weight: 400; }
"""


def html_report(readings: Sequence[Reading], summary: dict, show: int) -> str:
    """A page without scripts or outside files, for light and dark screens."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Logit lens of the query</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>Logit lens of the query's memory vectors</h1>",
        f"<p>{escape(summary_text(summary))}</p><p>Gathered over the slots: ",
        f"{_chip('absent from the question', False, False)} {_chip('in the question', True, False)} ",
        f"{_chip('in a gold passage', False, True)}; the small figures are the best rank in a slot and the number of "
        "slots. Below each list, the highest tokens of every slot.</p>",
    ]
    for number, reading in enumerate(readings, 1):
        parts.append(f"<h2>{number}. {escape(printable(reading.question))}</h2><p>")
        for t in reading.gathered[: show * GATHERED_PER_SLOT]:
            parts.append(
                _chip(printable(t.token), t.in_question, bool(t.in_gold), f" <small>{t.rank}·{t.slots}</small>")
            )
        parts.append(f'</p><div class="wide"><table><tr><th>slot</th><th colspan="{show}">highest tokens</th></tr>')
        for index, slot in enumerate(reading.slots):
            cells = "".join(f"<td>{escape(printable(t.token))}</td>" for t in slot[:show])
            parts.append(f"<tr><th>{index}</th>{cells}</tr>")
        parts.append("</table></div>")
    return "\n".join([*parts, "</body></html>\n"])


def _chip(token: str, in_question: bool, in_gold: bool, after: str = "") -> str:
    classes = "token" + " asked" * in_question + " gold" * in_gold
    return f'<span class="{classes}">{escape(token)}{after}</span>'


def draw(readings: Sequence[Reading], show: int, target: Path) -> None:
    """A table of the first questions and their gathered tokens, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    size, line, left, start, width = 11, 0.27, 0.2, 4.1, 12.0  # points, then inches
    plain, bold = FontProperties(size=size), FontProperties(size=size, weight="bold")
    glyphs = FT2Font(findfont(plain)).get_charmap()
    renderer = FigureCanvasAgg(Figure(dpi=72)).get_renderer()
    # (x, y, text, style) in inches from the top left.
    marks: list[tuple[float, float, str, dict]] = []
    rules, y = [0.75], 0.95
    for reading in readings[:PICTURED]:
        asked = fill(_drawable(printable(reading.question), glyphs), 40).split("\n")
        marks += [(left, y + i * line, text, {}) for i, text in enumerate(asked)]
        x, row = start, 0
        for t in reading.gathered[: show * GATHERED_PER_SLOT // 2]:
            text = _drawable(printable(t.token), glyphs)
            wide = renderer.get_text_width_height_descent(text, bold if t.in_gold else plain, ismath=False)[0] / 72
            if x + wide > width - left and x > start:
                x, row = start, row + 1
            marks.append((x, y + row * line, text, _token_style(t)))
            x += wide + 0.17
        y += max(len(asked), row + 1) * line + 0.2
        rules.append(y - 0.1)
    figure = Figure(figsize=(width, y + 0.05), dpi=130, facecolor="white")
    absent, asked_style, gold = (
        _token_style(GatheredToken("", 1, 1, q, g)) for q, g in ((False, False), (True, False), (False, True))
    )
    marks += [(left, 0.2, "Logit lens of the query's memory vectors", {"weight": "bold"}), (left, 0.5, "question", {})]
    marks += [(start, 0.5, "absent from the question", absent), (start + 2.2, 0.5, "in the question", asked_style)]
    marks += [(start + 3.7, 0.5, "in a gold passage", gold)]
    for x, top, text, style in marks:
        figure.text(x / width, 1 - top / (y + 0.05), text, va="top", **{"size": size, "parse_math": False, **style})
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xlim=(0, width), ylim=(y + 0.05, 0))
    axes.set_axis_off()
    axes.hlines(rules, left, width - left, colors="#9aa5b1", linewidth=0.7)
    save_figure(figure, target)


def _token_style(token: GatheredToken) -> dict:
    style: dict = {"color": "#6b7683", "style": "italic"} if token.in_question else {"color": "#1f2933"}
    if token.in_gold:
        style |= {
            "weight": "bold",
            "bbox": {"facecolor": "#cfe3f5", "edgecolor": "none", "boxstyle": "square,pad=0.15"},
        }
    return style


def _drawable(text: str, glyphs: dict) -> str:
    """The text with an escape for every character that the font of the picture lacks."""
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


def check_query_reasoner(root: Path) -> None:
    """Raises ValueError when a checkpoint's directory, of our or the public format, holds no query reasoner."""
    public = (root / ADAPTERS_FILE).is_file()
    if not (QUERY in read_public_adapters(root) if public else (root / QUERY).is_dir()):
        raise ValueError(f"{root} holds no query reasoner: give a checkpoint of stage2 or stage2_pretrain_retrieval")


def read_questions(path: Path | None, texts: Sequence[str] | None, most: int | None) -> list[Question]:
    """The questions of an evaluation file with their passages, or those given as texts.

    Raises:
        ValueError: a question is empty, a record is bad (RecordError, with file and line), or there is none.
        FileNotFoundError: there is no such file.
    """
    if path is None:
        questions = [Question(text) for text in texts or []]
        for number, question in enumerate(questions, 1):
            # Bytes of a command line that are no UTF-8 become surrogates, which no tokenizer takes.
            if not question.text.strip() or re.search("[\ud800-\udfff]", question.text):
                raise ValueError(f"question {number} is empty or not UTF-8: give --question a text")
    else:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give --questions an evaluation file (JSONL)")
        questions = []
        for row in islice(file_rows(path, "stage2"), most):
            docs: Any = row["docs"]
            gold = [docs[i] for i in row["pos_index"]]  # type: ignore[attr-defined]
            questions.append(Question(row["question"][0], gold, docs))  # type: ignore[index]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions[:most]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = OneLineParser(prog="logit_lens", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint with a query reasoner (stage2)")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", type=Path, help="evaluation file, JSONL")
    asked.add_argument("--question", nargs="+", metavar="TEXT", help="questions themselves")
    parser.add_argument("--max_questions", type=int, help="use only the first so many")
    parser.add_argument("--top", type=int, default=50, help="highest tokens taken from each memory vector")
    parser.add_argument("--show", type=int, default=12, help="tokens shown of each memory vector")
    parser.add_argument("--output_dir", type=Path, help="for logit_lens.json, .html and .png")
    parser.add_argument("--model_path", help="base model, where it is not where the checkpoint says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model loads")
    args = parser.parse_args(argv)
    set_up_logging(0)
    for name in ("max_questions", "top", "show"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} counts from 1")
    try:
        questions = read_questions(args.questions, args.question, args.max_questions)
        root = check_checkpoint(args.checkpoint, args.model_path)
        check_query_reasoner(root)
        if args.output_dir:
            prepare_output(args.output_dir, ("matplotlib", "matplotlib"))
        model = load(root, args.model_path, args.dtype)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ids_BLT, logits_BLT = lens(model, [question.text for question in questions], args.top)
    vocabulary = Vocabulary(model.tokens)
    readings = [read(vocabulary, *one) for one in zip(questions, ids_BLT, logits_BLT, strict=True)]
    summary = summarise(vocabulary, questions, readings)
    print(text_report(readings, args.show))
    print(f"\n{fill(summary_text(summary), 116)}")
    if args.output_dir:
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        result = {"format": 1, "config": config, "summary": summary, "questions": [asdict(r) for r in readings]}
        write_whole(args.output_dir / "logit_lens.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        write_whole(args.output_dir / "logit_lens.html", html_report(readings, summary, args.show))
        draw(readings, args.show, args.output_dir / "logit_lens.png")
        print(f"written     {args.output_dir}/logit_lens.json  .html  .png")
        print(f"next        open {args.output_dir}/logit_lens.html")


if __name__ == "__main__":
    main()
