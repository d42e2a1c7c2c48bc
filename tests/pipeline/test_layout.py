"""The layout of PDF pages by rules: headings, order, paragraphs, lists, tables, captions, running lines, pictures."""

import io
import textwrap
from collections.abc import Callable

import pytest

pytest.importorskip("docling")
pytest.importorskip("reportlab")

from openrlhf.pipeline.convert import convert, document_of, pdf_pages, tidy
from tests.pipeline.make_documents import picture

WIDTH, HEIGHT = 595, 842
OPTIONS = {"layout": "rules", "limit": 4096, "max_pages": 50}


def pdf(*pages: Callable, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A PDF with a page for each function that draws on a canvas."""
    from reportlab.pdfgen.canvas import Canvas

    held = io.BytesIO()
    canvas = Canvas(held, pagesize=size, invariant=1)
    for draw in pages:
        draw(canvas)
        canvas.showPage()
    canvas.save()
    return held.getvalue()


def write(canvas, x: float, y: float, text: str, width: int = 90, font: str = "Times-Roman", size: int = 10, indent=0):
    """Lines of at most `width` letters from `y` downwards; the y below them."""
    canvas.setFont(font, size)
    for number, line in enumerate(textwrap.wrap(text, width)):
        canvas.drawString(x + (0 if number else indent), y, line)
        y -= size * 1.2
    return y


def items(data: bytes) -> list[tuple[str, str]]:
    """(label, text) in reading order."""
    document, *_ = document_of(data, "pdf", "rules", 50, {})
    tidy(document)
    return [(item.label.value, getattr(item, "text", "")) for item, _ in document.iterate_items()]


LEFT = [f"Left {n}. Roman builders set cut stones without mortar, and some of their arches still stand." for n in "abc"]
RIGHT = [f"Right {n}. The keystone locks the ring, and the abutments on both banks take up the thrust." for n in "abc"]


def two_columns(canvas) -> None:
    canvas.setFont("Helvetica-Bold", 20)
    canvas.drawCentredString(WIDTH / 2, 770, "Bridges of Stone")
    y = write(canvas, 60, 740, "An abstract that runs over the whole width of the page stands above both columns. " * 2)
    left = write(canvas, 60, y - 16, "1. Arches", font="Times-Bold")
    right = y - 16
    for text in LEFT:
        left = write(canvas, 60, left, text, 50, indent=10)
    for text in RIGHT:
        right = write(canvas, 310, right, text, 50, indent=10)


def test_two_columns_are_read_one_after_the_other_and_indents_begin_paragraphs():
    found = items(pdf(two_columns))
    assert found[0] == ("section_header", "Bridges of Stone")
    assert found[2] == ("section_header", "1. Arches")
    assert [text for label, text in found[3:]] == [*LEFT, *RIGHT]


def test_a_large_first_heading_is_above_the_others(tokenizer):
    found = convert(pdf(two_columns), "pdf", OPTIONS, tokenizer, {})
    assert found["title"] == "Bridges of Stone"
    assert found["chunks"][-1]["headings"] == ["Bridges of Stone", "1. Arches"]


ROWS = [("Bridge", "Year", "Span (m)"), ("Alcantara", "106", "28"), ("Mostar", "1566", "29"), ("Avignon", "1185", "33")]


def test_a_table_without_rules_is_found_by_its_columns():
    def draw(canvas):
        y = write(canvas, 60, 780, "Stone bridges have stood for a long time, as the table below shows. " * 4) - 20
        for row in ROWS:
            for x, text in zip((60, 220, 320), row, strict=True):
                canvas.drawString(x, y, text)
            y -= 14
        write(canvas, 60, y - 20, "The text goes on after the table with a sentence of its own.")

    document, *_ = document_of(pdf(draw), "pdf", "rules", 50, {})
    assert len(document.tables) == 1
    grid = [[cell.text for cell in row] for row in document.tables[0].data.grid]
    assert grid == [list(row) for row in ROWS]
    assert [item.label.value for item, _ in document.iterate_items()] == ["text", "table", "text"]


def test_a_ruled_table_keeps_merged_cells_and_text_of_several_lines():
    def draw(canvas):
        canvas.setFont("Times-Roman", 10)
        for y in (700, 680, 640, 620):
            canvas.line(60, y, 360, y)
        for x, top in ((60, 700), (160, 700), (260, 680), (360, 700)):  # the first row's last two cells are one
            canvas.line(x, top, x, 620)
        for x, y, text in (
            (65, 686, "Name"),
            (165, 686, "Sizes in metres, all of them"),
            (65, 666, "Long"),
            (65, 652, "bridge"),
            (165, 666, "12"),
            (265, 666, "30"),
            (65, 626, "Short one"),
            (165, 626, "3"),
            (265, 626, "9"),
        ):
            canvas.drawString(x, y, text)

    document, *_ = document_of(pdf(draw), "pdf", "rules", 50, {})
    (table,) = document.tables
    assert [[cell.text for cell in row] for row in table.data.grid] == [
        ["Name", "Sizes in metres, all of them", "Sizes in metres, all of them"],
        ["Long bridge", "12", "30"],
        ["Short one", "3", "9"],
    ]


def test_lines_of_two_columns_of_text_are_no_table():
    def draw(canvas):
        write(canvas, 60, 700, " ".join(LEFT) * 3, 45)
        write(canvas, 310, 700, " ".join(RIGHT) * 3, 45)

    assert [label for label, _ in items(pdf(draw))] == ["text", "text"]


def test_lists_captions_and_page_numbers_are_told_from_text():
    def draw(canvas):
        y = write(canvas, 60, 780, "What to do before building a bridge, in the order in which it is to be done. " * 3)
        y = write(canvas, 60, y - 10, "1. Survey the river bed and both banks over a whole year of floods.", 40)
        y = write(canvas, 60, y, "2. Order the timber.", 40)
        for text in ("limestone", "granite"):
            canvas.drawString(60, y, "•")
            canvas.drawString(74, y, text)
            y -= 12
        canvas.drawInlineImage(picture(["STONE"]), 60, y - 130, 200, 112)
        write(canvas, 60, y - 150, "Figure 2: Stones that bridges are made of.")
        canvas.drawCentredString(WIDTH / 2, 30, "- 7 -")

    found = items(pdf(draw))
    assert [text for label, text in found if label == "list_item"] == [
        "Survey the river bed and both banks over a whole year of floods.",
        "Order the timber.",
        "limestone",
        "granite",
    ]
    assert ("caption", "Figure 2: Stones that bridges are made of.") in found
    assert [label for label, _ in found].count("picture") == 1
    assert "- 7 -" not in [text for _, text in found]


def test_a_number_or_initial_that_begins_a_line_by_chance_begins_no_list():
    def draw(canvas):
        canvas.setFont("Times-Roman", 10)
        lines = ("The theory of relativity was written down by", "A. Einstein, who in the year 1905 was aged only")
        for number, text in enumerate(
            (*lines, "26. He was a clerk at the office for patents in Bern,", "in Switzerland.")
        ):
            canvas.drawString(60, 700 - 12 * number, text)

    assert [label for label, _ in items(pdf(draw))] == ["text"]


def test_lines_that_stand_at_the_edge_of_every_page_are_left_out():
    def page(number: int) -> Callable:
        def draw(canvas):
            write(canvas, 60, 810, f"Annual Review of Bridges, volume 3, page {number}", size=8)
            write(canvas, 60, 760, f"Page {number} speaks of its own matter, which no other page has spoken of. " * 3)

        return draw

    found = items(pdf(*map(page, range(1, 5))))
    assert not [text for _, text in found if text.startswith("Annual Review")]
    assert len([text for _, text in found if "speaks of its own matter" in text]) == 4


def test_every_word_of_a_page_is_kept_whatever_lies_over_it():
    def draw(canvas):
        canvas.drawInlineImage(picture(["below"]), 60, 500, 300, 200)
        write(canvas, 80, 600, "Words over a picture stay words.", 40)
        canvas.rect(60, 300, 300, 100)
        write(canvas, 70, 380, "Words in a box are no table, and none of them is lost on the way.", 40)

    text = " ".join(text for _, text in items(pdf(draw)))
    assert "Words over a picture stay words." in text
    assert "Words in a box are no table, and none of them is lost on the way." in text


def test_a_page_that_breaks_the_rules_keeps_its_text(monkeypatch):
    from openrlhf.pipeline import pdf as stage

    rules = stage.lay_out

    def fail(page):
        if page.page_no == 2:
            raise IndexError("no rule for this")
        return rules(page)

    monkeypatch.setattr(stage, "lay_out", fail)
    found = items(pdf(two_columns, two_columns))
    assert [text for _, text in found[3:9]] == [*LEFT, *RIGHT]
    assert len(found) == 10 and all(text[:30] in found[9][1] for text in (*LEFT, *RIGHT))


def test_only_pages_without_a_text_layer_are_read_by_ocr(monkeypatch, tokenizer):
    from reportlab.lib.utils import ImageReader

    from openrlhf.pipeline.pdf import ScannedPages

    scan = picture(["A scanned page", "about old bridges"], (640, 480))

    def scanned(canvas):
        canvas.drawImage(ImageReader(scan), 0, 0, 320, 240)

    def stamped(canvas):
        scanned(canvas)
        canvas.drawString(300, 8, "12")

    def typed(canvas):
        canvas.drawImage(ImageReader(picture(["PICTURE WORDS"])), 10, 10, 200, 110)
        write(canvas, 10, 200, "This page was typed, and the words in its picture are not read here.", 40)

    data = pdf(typed, scanned, stamped, size=(320, 240))
    assert pdf_pages(data) == [False, True, True]
    read = []
    rects = ScannedPages.get_ocr_rects
    monkeypatch.setattr(
        ScannedPages,
        "get_ocr_rects",
        lambda self, page: [read.append((page.page_no, r)) or r for r in rects(self, page)],
    )
    found = convert(data, "pdf", OPTIONS, tokenizer, {})
    assert sorted(page for page, _ in read) == [2, 3]
    text = "\n".join(chunk["text"] for chunk in found["chunks"])
    assert text.count("about old bridges") == 2 and "PICTURE WORDS" not in text
    assert len(found["pictures"]) == 1  # the scans themselves are no pictures
