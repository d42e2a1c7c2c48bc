"""The quality report: what went into the training files, what did not, and why; as Markdown and as one HTML page.

Contract: the same sections in both, from the same rows; no time stamps, so that equal input gives equal bytes. Texts of
documents, samples and file names are escaped in both. The page loads nothing and runs nothing.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from openrlhf.pipeline.files import read_lines
from openrlhf.pipeline.samples import KINDS, QUESTIONS, Collection

STYLE = Path(__file__).with_name("report.css")
SHOWN = 50
Row = Sequence[Any]


@dataclass(frozen=True)
class Figures:
    """What a run of the assembly found. input_dir: where the reports of the earlier steps are."""

    collection: Collection
    files: dict[str, int]
    pool_facts: dict[str, int]
    notes: list[str]
    options: dict[str, Any]
    input_dir: Path


@dataclass
class Section:
    """A heading, sentences, and a table; numbers are ints, floats are shares. folded: hidden until asked for."""

    title: str
    header: Row = ()
    rows: Sequence[Row] = ()
    sentences: list[str] = field(default_factory=list)
    folded: bool = False


def write_report(folder: Path, figures: Figures) -> None:
    """Writes quality_report.md and quality_report.html."""
    sections = report_sections(figures)
    (folder / "quality_report.md").write_text(as_markdown(sections), encoding="utf-8")
    (folder / "quality_report.html").write_text(as_html(sections), encoding="utf-8")


def report_sections(figures: Figures) -> list[Section]:
    """All sections, in order; those without anything to say are left out."""
    found = figures.collection
    lines = list(read_lines(figures.input_dir / "synthesized.jsonl"))
    report = _read_report(figures.input_dir / "synthesis_report.json")
    sections = [
        _summary(figures, lines, report),
        Section("Files", ("file", "records"), [*figures.files.items()]),
        _samples_by_side(found),
        _languages(found),
        _lengths(found, figures.options["tokenizer"]),
        _rounds(lines),
        *_rejected(lines, report),
        _rejected_examples(lines),
        Section("Left out in assembly", ("reason", "number"), _most_first(found.dropped.counts)),
        Section("Left out in assembly: examples", ("reason", "where", "text"), [*found.dropped.examples], folded=True),
        Section("Candidates", ("what", "number"), _most_first(figures.pool_facts), figures.notes),
        _skipped("Files that were skipped", figures.input_dir / "extraction_report.json"),
        _skipped("Pictures that were skipped", figures.input_dir / "vision_report.json"),
    ]
    return [section for section in sections if section.rows or section.sentences]


def _most_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, count) for name, count in counts.items() if count), key=lambda item: (-item[1], item[0]))


def _summary(figures: Figures, lines: list[dict], report: dict) -> Section:
    found = figures.collection
    models = Counter(str(line.get("model")) for line in lines)
    held = sorted(source for source, side in found.side.items() if side == "eval")
    spent = Counter(
        {k: sum(int((line.get("tokens") or {}).get(k) or 0) for line in lines) for k in ("prompt", "completion")}
    )
    rows: list[Row] = [*found.facts.items(), ("samples kept", len(found.samples))]
    rows += [(f"tokens of the language model: {name}", count) for name, count in spent.items() if count]
    if report.get("cost") is not None:
        rows.append(("cost of the language model", f"{report['cost']:,.4f}"))
    rows += [("model", ", ".join(sorted(models))), ("seed", str(figures.options["seed"]))]
    # Of a directory its end: where it lies on this machine is nobody's business.
    model = figures.options["embedding_model"]
    rows += [("embedding model", "/".join(Path(model).parts[-2:]) if model else "none (BM25 only)")]
    rows += [("documents held out for evaluation", ", ".join(held) or "none: there are too few documents with samples")]
    joined = Counter(found.groups.values())
    versions = [
        ", ".join(s for s, group in found.groups.items() if group == first) for first, n in joined.items() if n > 1
    ]
    rows += [("versions of one document, kept on one side", text) for text in versions]
    return Section("Summary", ("what", "value"), [(name, _shown(value)) for name, value in rows])


def _samples_by_side(found: Collection) -> Section:
    counts = Counter((found.side[sample.source], sample.kind) for sample in found.samples)
    rows = [(kind.replace("_", " "), counts["train", kind], counts["eval", kind]) for kind in KINDS]
    return Section("Samples", ("kind", "training", "evaluation"), rows)


def _languages(found: Collection) -> Section:
    chunks = Counter(chunk.language for chunk in found.chunks.values())
    asked = Counter(sample.language for sample in found.samples if sample.kind in QUESTIONS)
    crossing = Counter(
        sample.language
        for sample in found.samples
        if sample.kind in QUESTIONS and found.chunks[sample.chunks[0]].language != sample.language
    )
    rows = [(name, chunks[name], asked[name], crossing[name]) for name in sorted({*chunks, *asked})]
    return Section("Languages", ("language", "chunks", "questions", "of these, over a chunk in another"), rows)


def _lengths(found: Collection, tokenizer: str | None) -> Section:
    measures: list[tuple[str, Callable[[list[str]], list[int]]]] = [("characters", lambda texts: [*map(len, texts)])]
    if tokenizer:
        measures.append(("tokens", _token_counter(tokenizer)))
    texts: dict[str, list[str]] = {"chunk": [chunk.text for chunk in found.chunks.values()]}
    texts["question"] = [sample.question for sample in found.samples if sample.kind in QUESTIONS]
    for kind in KINDS:
        name = f"answer, {kind.replace('_', ' ')}" if kind in QUESTIONS else kind
        texts[name] = [sample.answer for sample in found.samples if sample.kind == kind]
    rows = []
    for name, of_kind in texts.items():
        for unit, measure in measures if of_kind else ():
            lengths = sorted(measure(of_kind))
            p95 = lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
            rows.append((name, unit, lengths[0], int(statistics.median(lengths)), p95, lengths[-1]))
    return Section("Lengths", ("text", "in", "shortest", "median", "p95", "longest"), rows)


def _token_counter(tokenizer: str) -> Callable[[list[str]], list[int]]:
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained(tokenizer)
    return lambda texts: [len(ids) for ids in load(texts, add_special_tokens=False)["input_ids"]]


def _rounds(lines: Iterable[dict]) -> Section:
    sums: dict[int, Counter] = {}
    for line in lines:
        for number, counts in enumerate(line.get("round_counts") or (), 1):
            sums.setdefault(number, Counter()).update(
                {k: int(counts.get(k) or 0) for k in ("asked", "accepted", "rejected")}
            )
    rows: list[Row] = []
    for number, counts in sorted(sums.items()):
        checked = counts["accepted"] + counts["rejected"]
        share = counts["accepted"] / checked if checked else "nothing checked"
        rows.append((str(number), counts["asked"], counts["accepted"], counts["rejected"], share))
    return Section("Acceptance by round", ("round", "asked", "accepted", "rejected", "accepted of those checked"), rows)


def _rejected(lines: Iterable[dict], report: dict) -> list[Section]:
    items = [item for line in lines for item in line.get("rejected") or ()]
    kinds = Counter(str(item.get("kind")) for item in items)
    reasons = report.get("reasons") or Counter(str(item.get("reason"))[:200] for item in items)
    failed = [(str(item.get("id")), str(item.get("reason"))) for item in report.get("failed") or ()]
    return [
        Section("Rejected samples by kind", ("kind", "number"), _most_first(kinds)),
        Section("Rejected samples by reason", ("reason", "number"), _most_first(reasons)[:SHOWN]),
        Section("Chunks without a usable reply", ("chunk", "reason"), failed[:SHOWN], folded=True),
    ]


def _rejected_examples(lines: Iterable[dict]) -> Section:
    rows: list[Row] = []
    for line in lines:
        for item in line.get("rejected") or ():
            if len(rows) < SHOWN:
                what = (str(item.get("kind")), str(item.get("round", "")), str(item.get("question") or ""))
                rows.append((str(line.get("id")), *what, str(item.get("reason"))[:300]))
    return Section("Rejected samples: examples", ("chunk", "kind", "round", "question", "reason"), rows, folded=True)


def _read_report(path: Path) -> dict:
    """A report of an earlier step; an empty one where there is none that can be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _skipped(title: str, path: Path) -> Section:
    """What a step's report lists as skipped."""
    lists = [value for value in _read_report(path).values() if isinstance(value, list)]
    items = [item for listed in lists for item in listed if isinstance(item, dict) and item.get("status")]
    rows = [
        (str(item.get("source") or item.get("file")), str(item.get("reason")))
        for item in items
        if item["status"] == "skipped"
    ]
    return Section(title, ("file", "reason"), rows, [f"{len(rows)} of {len(items)} were skipped."] if items else [])


def as_markdown(sections: Sequence[Section]) -> str:
    """The report in GitHub's Markdown."""
    parts = [f"# {TITLE}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_plain(text) for text in section.sentences]
        if section.rows:
            numbers = [isinstance(cell, (int, float)) for cell in section.rows[0]]
            table = [section.header, ["--:" if number else "---" for number in numbers]]
            head = [f"| {' | '.join(map(str, row))} |" for row in table]
            parts.append("\n".join(head + [f"| {' | '.join(map(_cell, row))} |" for row in section.rows]))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return _plain(_shown(value))


def _plain(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    text = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*_[]|~#!" else character for character in text)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.1f} %"
    # Half a surrogate pair, which a bad file may hold, cannot be written.
    return f"{value:,}" if isinstance(value, int) else str(value).encode("utf-8", "replace").decode()


TITLE = "Quality report of the training data"
HEAD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{TITLE}</title>
"""


def as_html(sections: Sequence[Section]) -> str:
    """The report as one page that needs nothing else."""
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(_html_section(i, section) for i, section in enumerate(sections))
    head = f"{HEAD}<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
    return f"{head}<body>\n<h1>{TITLE}</h1>\n<nav>{links}</nav>\n{body}</body>\n</html>\n"


def _html_section(number: int, section: Section) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in section.sentences)
    if section.rows:
        numbers = [isinstance(cell, (int, float)) for cell in section.rows[0]]
        marks = [' class="n"' if number else "" for number in numbers]
        head = "".join(f'<th scope="col"{m}>{escape(str(h))}</th>' for h, m in zip(section.header, marks, strict=True))
        rows = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>\n" for row in section.rows)
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"
        table = f'<div class="wide" tabindex="0">{table}</div>\n'
        text += (
            f"<details><summary>{len(section.rows)} rows</summary>\n{table}</details>\n" if section.folded else table
        )
    return f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{escape(section.title)}</h2>\n{text}</section>\n'


def _html_cell(value: Any) -> str:
    shown = escape(_shown(value))
    if isinstance(value, float):
        return f'<td class="bar" style="--share: {100 * value:.1f}%">{shown}</td>'
    return f'<td class="n">{shown}</td>' if isinstance(value, int) else f"<td>{shown}</td>"
