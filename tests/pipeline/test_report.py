"""The quality report: its figures are those of the files, and nothing of a user's text becomes markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from openrlhf.pipeline.assemble import Options, assemble
from openrlhf.pipeline.report import Section, as_html, as_markdown
from openrlhf.pipeline.state import State
from tests.pipeline.collection import chunk, library, synthesized, write
from tests.pipeline.test_assemble import ROOT, read

EVIL = '</td><script>alert("1")</script> <img src=x onerror=alert(1)> | [a](javascript:b) `c` *d*\nsecond line'
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Collects tags, texts and attributes, and checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A collection in which everything occurs, with hostile texts and names."""
    folder = tmp_path_factory.mktemp("reported")
    chunks, samples = library(6)
    chunks.append(
        chunk(f"{EVIL}.pdf", 0, "A short chunk that nobody else has, about lanterns in the harbour of Rostock.")
    )
    samples.append(
        synthesized(
            chunks[-1],
            [(f"Which lanterns are there? {EVIL}", "Those of Rostock"), (f"What does this passage say? {EVIL}", "x")],
            rejected=[{"kind": "simple_qa", "round": 1, "question": EVIL, "reason": EVIL}],
        )
    )
    chunks.append(chunk("zcopy.txt", 0, chunks[0]["text"]))
    write(folder, chunks, samples)
    skipped = {"source": f"{EVIL}.docx", "status": "skipped", "reason": EVIL}
    extraction = {"options": {}, "files": [skipped, {"source": "a.pdf", "status": "done"}]}
    (folder / "extraction_report.json").write_text(json.dumps(extraction))
    (folder / "vision_report.json").write_text(json.dumps({"pictures": [{**skipped, "file": "tiny.png"}]}))
    failed = [{"id": "a#1", "reason": EVIL}]
    synthesis = {"cost": 1.25, "failed": failed, "reasons": {"a number is not in the passage": 7}}
    (folder / "synthesis_report.json").write_text(json.dumps(synthesis))
    with State(folder / "state.sqlite") as state:
        assemble(folder, folder, Options(tokenizer=str(ROOT / "tests/data/vectors/decoders/sys")), state)
    return folder


@pytest.fixture(scope="module")
def markdown(reported) -> str:
    return (reported / "quality_report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(reported) -> str:
    return (reported / "quality_report.html").read_text(encoding="utf-8")


def table(markdown: str, title: str) -> list[list[str]]:
    part = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_figures_are_those_of_the_files(reported, markdown):
    files = {name.replace("\\", ""): int(count.replace(",", "")) for name, count in table(markdown, "Files")}
    assert files == {name: len(read(reported / name)) for name in files} and len(files) == 13
    samples = read(reported / "clara_training_data.jsonl")
    for kind, count, _ in table(markdown, "Samples"):
        assert int(count) == sum(record["kind"] == kind.replace(" ", "_") for record in samples)
    chunks = read(reported / "raw_knowledge.jsonl")
    summary = dict(table(markdown, "Summary"))
    assert summary["chunks"] == str(len(chunks)) and summary["chunks kept"] == str(len(chunks) - 1)
    assert summary["cost of the language model"] == "1.2500"
    assert "zcopy.txt" not in summary["documents held out for evaluation"]


def test_acceptance_by_round_is_summed_over_chunks(markdown, reported):
    n = len(read(reported / "synthesized.jsonl"))
    assert table(markdown, "Acceptance by round") == [
        ["1", str(4 * n), str(3 * n), str(n), "75.0 %"],
        ["2", str(n), str(n), "0", "100.0 %"],
    ]


def test_lengths_are_in_characters_and_tokens(markdown, reported):
    rows = {(row[0], row[1]): row[2:] for row in table(markdown, "Lengths")}
    lengths = sorted(len(record["text"]) for record in read(reported / "raw_knowledge.jsonl"))
    assert rows["chunk", "characters"][0] == str(lengths[0]) and rows["chunk", "characters"][3] == f"{lengths[-1]:,}"
    assert ("question", "tokens") in rows and ("summary", "tokens") in rows


def test_what_was_left_out_is_told_with_its_reasons(markdown):
    assert dict(table(markdown, "Left out in assembly")) == {
        "near-duplicate chunk": "1",
        "question that names its passage": "1",
    }
    examples = table(markdown, "Left out in assembly: examples")
    assert any("zcopy.txt" in where for _, where, _ in examples)
    assert "1 of 2 were skipped" in markdown.split("## Files that were skipped")[1]
    assert len(table(markdown, "Pictures that were skipped")) == 1
    assert table(markdown, "Rejected samples by reason") == [["a number is not in the passage", "7"]]
    assert table(markdown, "Rejected samples by kind") == [["simple\\_qa", "1"]]
    assert len(table(markdown, "Chunks without a usable reply")) == 1


def test_users_texts_are_texts_in_the_page(page):
    parsed = Page(page)
    assert not {"script", "img", "iframe", "link"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count('<script>alert("1")</script>') >= 5
    links = [value for name, value in parsed.attributes if name in ("href", "src")]
    assert links and all(value.startswith("#s") for value in links)
    anchors = {value for name, value in parsed.attributes if name == "id"}
    assert {value.removeprefix("#") for value in links} == anchors
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page


def test_users_texts_are_texts_in_the_markdown(markdown):
    assert "<script" not in markdown and "<img" not in markdown
    assert not re.search(r"(?<!\\)\[a\]", markdown) and "\\`c\\`" in markdown
    for title in re.findall(r"^## (.+)$", markdown, re.MULTILINE):
        rows = table(markdown, title)
        assert len({len(row) for row in rows}) <= 1, title  # a bar in a text adds no cell


def test_both_reports_have_the_same_sections(page, markdown):
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", page)
    assert titles == re.findall(r"^## (.+)$", markdown, re.MULTILINE)


def test_the_page_suits_light_and_dark_and_narrow_screens(page):
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    parsed = Page(page)
    assert parsed.tags.count("table") == sum(value == "wide" for _, value in parsed.attributes)


def test_a_share_is_a_bar_and_half_a_surrogate_pair_is_written(tmp_path):
    section = Section("T", ("a", "b"), [("\ud800", 0.5)], ["1 < 2"])
    assert "--share: 50.0%" in as_html([section]) and "50.0 %" in as_markdown([section])
    for text in (as_html([section]), as_markdown([section])):
        (tmp_path / "file").write_text(text, encoding="utf-8")
        assert "1 &lt; 2" in text


def test_reports_that_are_missing_or_broken_are_passed_over(tmp_path):
    folder = write(tmp_path, *library(3))
    (folder / "extraction_report.json").write_text("{")
    (folder / "synthesis_report.json").write_text("[]")
    with State(folder / "state.sqlite") as state:
        assemble(folder, folder, Options(), state)
    assert "Files that were skipped" not in (folder / "quality_report.md").read_text()
