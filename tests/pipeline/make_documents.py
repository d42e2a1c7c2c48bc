"""Makes a folder of real documents of each kind, and broken ones.

    python -m tests.pipeline.make_documents FOLDER

The texts were written for this project; what they say is true, so that questions about them have answers. The same call
gives the same content (not always the same bytes: Office files and encrypted PDFs carry times and random keys).
"""

import argparse
import io
import os
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.pipeline.texts import (
    CHINESE,
    COMET,
    LATIN,
    LIGHTHOUSES,
    PENGUINS,
    PLANETS,
    RHINE,
    RIVERS,
    SLIDES,
    VIOLIN,
)

GOOD = (
    "lighthouses.pdf",
    "scanned/penguins.pdf",
    "rhine.docx",
    "coffee.pptx",
    "web/comet.html",
    "notes/violin.md",
    "planets.xlsx",
    "great_wall.txt",
    "amazon_latin1.txt",
)
IMAGES = ("notes/violin.png", "poster.png", "sign.jpg")
# What must be skipped, and a word of the reason.
BROKEN = {
    "broken/password.pdf": "password",
    "broken/password.docx": "password",
    "broken/corrupt.pdf": "PDF",
    "broken/corrupt.docx": "damaged",
    "broken/empty.pdf": "empty",
    "broken/empty.txt": "empty",
    "broken/no_pages.pdf": "PDF",
    "broken/no_text.txt": "no text",
    "broken/really_a_pdf.docx": "PDF",
    "broken/bomb.docx": "unpacked",
    "broken/data.bin": "kind",
}
# Images that the vision step must skip, and a word of the reason.
BAD_IMAGES = {
    "broken/truncated.jpg": "truncated",
    "broken/not_an_image.png": "not",
    "broken/tiny.png": "32",
    "broken/one_colour.png": "colour",
}


def picture(words: list[str], size: tuple[int, int] = (640, 360), mode: str = "RGB") -> Image.Image:
    """An image with large, plain lines of text."""
    image = Image.new(mode, size, (255, 255, 255, 255)[: len(mode)])
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(words):
        ink = (20, 40, 90, 255)[: len(mode)]
        draw.text((30, 30 + number * 60), line, fill=ink, font=ImageFont.load_default(38))
    draw.rectangle((4, 4, size[0] - 5, size[1] - 5), outline=(200, 60, 20, 255)[: len(mode)], width=4)
    return image


def _bytes(image: Image.Image, kind: str = "PNG") -> io.BytesIO:
    held = io.BytesIO()
    image.save(held, kind)
    held.seek(0)
    return held


def pdf(path: Path) -> None:
    """Born digital: title, headings, two columns, a table with rules, a picture with its caption, page numbers."""
    import reportlab.platypus
    from reportlab.lib import colors
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.lib.units import cm
    from reportlab.platypus import (
        BaseDocTemplate,
        Frame,
        ListFlowable,
        NextPageTemplate,
        PageBreak,
        PageTemplate,
        Paragraph,
        Spacer,
        Table,
        TableStyle,
    )

    styles = getSampleStyleSheet()
    width, height = A4
    one = Frame(2 * cm, 2 * cm, width - 4 * cm, height - 4 * cm, id="one")
    half = (width - 5 * cm) / 2
    columns = [Frame(2 * cm + n * (half + cm), 2 * cm, half, height - 4 * cm, id=f"column{n}") for n in (0, 1)]

    def number(canvas, document):
        canvas.setFont("Helvetica", 8)
        canvas.drawCentredString(width / 2, cm, f"Page {document.page}")

    document = BaseDocTemplate(str(path), pagesize=A4, title="Lighthouses", invariant=1)
    document.addPageTemplates(
        [
            PageTemplate(id="single", frames=[one], onPage=number),
            PageTemplate(id="double", frames=columns, onPage=number),
        ]
    )
    story = [Paragraph(LIGHTHOUSES["title"], styles["Title"]), Paragraph(LIGHTHOUSES["lead"], styles["BodyText"])]
    story += [Spacer(1, 12), Paragraph("Four towers compared", styles["Heading2"])]
    table = Table(LIGHTHOUSES["table"], hAlign="LEFT")
    table.setStyle(TableStyle([("GRID", (0, 0), (-1, -1), 0.5, colors.grey)]))
    story += [table, Spacer(1, 18), reportlab.platypus.Image(_bytes(picture(LIGHTHOUSES["figure"])), 11 * cm, 6.2 * cm)]
    story += [Paragraph(LIGHTHOUSES["caption"], styles["Italic"]), NextPageTemplate("double"), PageBreak()]
    for heading, paragraphs in LIGHTHOUSES["sections"]:
        story.append(Paragraph(heading, styles["Heading2"]))
        for text in paragraphs:
            story += [Paragraph(text, styles["BodyText"]), Spacer(1, 4)]
    story += [NextPageTemplate("single"), PageBreak(), Paragraph("What keepers did each night", styles["Heading2"])]
    story.append(
        ListFlowable([Paragraph(text, styles["BodyText"]) for text in LIGHTHOUSES["list"]], bulletType="bullet")
    )
    document.build(story)


def scanned_pdf(path: Path) -> None:
    """Two pages that are images only."""
    pages = []
    for title, paragraphs in PENGUINS:
        page = Image.new("RGB", (1240, 1754), "white")
        draw = ImageDraw.Draw(page)
        draw.text((120, 120), title, fill="black", font=ImageFont.load_default(60))
        top = 260
        for text in paragraphs:
            for line in _wrapped(text, 58):
                draw.text((120, top), line, fill="black", font=ImageFont.load_default(32))
                top += 46
            top += 40
        pages.append(page)
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=210)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def docx(path: Path) -> None:
    """Heading styles, paragraphs, a list, a table, a picture with a caption."""
    import docx as library
    from docx.shared import Cm

    document = library.Document()
    document.core_properties.title = RHINE["title"]
    document.add_heading(RHINE["title"], 0)
    for heading, level, paragraphs in RHINE["sections"]:
        document.add_heading(heading, level)
        for text in paragraphs:
            document.add_paragraph(text)
    document.add_heading("Places along the river", 1)
    for text in RHINE["list"]:
        document.add_paragraph(text, style="List Bullet")
    table = document.add_table(rows=0, cols=len(RHINE["table"][0]))
    for row in RHINE["table"]:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    document.add_picture(_bytes(picture(RHINE["figure"])), width=Cm(11))
    document.add_paragraph(RHINE["caption"], style="Caption")
    document.add_paragraph(RHINE["end"])
    document.save(path)


def pptx(path: Path) -> None:
    """Slides with titles, bullets, speaker's notes, a table and a picture."""
    from pptx import Presentation
    from pptx.util import Cm

    show = Presentation()
    for title, bullets, notes in SLIDES["slides"]:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = "\n".join(bullets)
        slide.notes_slide.notes_text_frame.text = notes
    slide = show.slides.add_slide(show.slide_layouts[5])
    slide.shapes.title.text = SLIDES["table_title"]
    rows = SLIDES["table"]
    table = slide.shapes.add_table(len(rows), len(rows[0]), Cm(2), Cm(5), Cm(20), Cm(6)).table
    for r, row in enumerate(rows):
        for c, text in enumerate(row):
            table.cell(r, c).text = text
    slide = show.slides.add_slide(show.slide_layouts[5])
    slide.shapes.title.text = SLIDES["figure_title"]
    slide.shapes.add_picture(_bytes(picture(SLIDES["figure"])), Cm(3), Cm(5), Cm(16))
    show.save(path)


def html(path: Path) -> None:
    """Headings, paragraphs, a list, a table, a local picture, one outside the folder and a remote one."""
    rows = "".join(
        "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", COMET["table"][0]), *(("td", row) for row in COMET["table"][1:])]
    )
    sections = "".join(
        f"<h2>{heading}</h2>" + "".join(f"<p>{text}</p>" for text in paragraphs)
        for heading, paragraphs in COMET["sections"]
    )
    path.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{COMET['title']}</title>"
        "<style>body { margin: 2em }</style><script>alert('never text')</script></head><body>"
        f"<p>{COMET['before']}</p><h1>{COMET['title']}</h1>{sections}"
        f"<figure><img src='../poster.png' alt='poster'><figcaption>{COMET['caption']}</figcaption></figure>"
        "<img src='../../../../etc/hostname.png' alt='outside'><img src='http://198.51.100.7/remote.png' alt='remote'>"
        f"<h2>Returns that were seen</h2><table>{rows}</table></body></html>",
        encoding="utf-8",
    )


def markdown(path: Path) -> None:
    """Headings, emphasis, a list, a table, a local picture."""
    table = "\n".join("| " + " | ".join(row) + " |" for row in VIOLIN["table"][:1])
    table += "\n|" + "---|" * len(VIOLIN["table"][0]) + "\n"
    table += "\n".join("| " + " | ".join(row) + " |" for row in VIOLIN["table"][1:])
    sections = "\n\n".join(f"## {heading}\n\n" + "\n\n".join(texts) for heading, texts in VIOLIN["sections"])
    bullets = "\n".join(f"- {text}" for text in VIOLIN["list"])
    path.write_text(
        f"# {VIOLIN['title']}\n\n{VIOLIN['lead']}\n\n![{VIOLIN['caption']}](violin.png)\n\n{sections}\n\n"
        f"## The four strings\n\n{table}\n\n## Care\n\n{bullets}\n",
        encoding="utf-8",
    )


def xlsx(path: Path) -> None:
    """Two sheets, numbers among them."""
    import openpyxl

    book = openpyxl.Workbook()
    for number, (title, rows) in enumerate((("Planets", PLANETS), ("Rivers", RIVERS))):
        sheet = book.active if number == 0 else book.create_sheet()
        sheet.title = title
        for row in rows:
            sheet.append(row)
    book.save(path)


def locked_pdf(path: Path, source: Path) -> None:
    """Needs a password to be opened."""
    from pypdf import PdfWriter

    writer = PdfWriter(clone_from=source)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(path)


def locked_docx(path: Path) -> None:
    """What an Office file with a password looks like from outside: an OLE container with an encrypted package."""
    path.write_bytes(
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1016) + "EncryptedPackage".encode("utf-16-le") + bytes(988)
    )


def bomb(path: Path) -> None:
    """A few kilobytes that unpack to over a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        with archive.open("word/document.xml", "w", force_zip64=True) as entry:
            for _ in range(1100):
                entry.write(bytes(1 << 20))


def no_pages(path: Path) -> None:
    """A PDF that is well formed and has no page."""
    from pypdf import PdfWriter

    PdfWriter().write(path)


def make(folder: Path, broken: bool = True) -> None:
    """Writes GOOD and IMAGES, and with `broken` also BROKEN and BAD_IMAGES, below `folder`."""
    for below in ("scanned", "web", "notes", "broken"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    pdf(folder / "lighthouses.pdf")
    scanned_pdf(folder / "scanned/penguins.pdf")
    docx(folder / "rhine.docx")
    pptx(folder / "coffee.pptx")
    picture(["Strings of the violin", "G  D  A  E"], mode="RGBA").save(folder / "notes/violin.png")
    markdown(folder / "notes/violin.md")
    picture(["Halley's Comet", "last seen in 1986", "next return in 2061"]).save(folder / "poster.png")
    html(folder / "web/comet.html")
    picture(["HARBOUR OFFICE", "open 8 am to 5 pm"], (800, 300)).save(folder / "sign.jpg", quality=92)
    xlsx(folder / "planets.xlsx")
    (folder / "great_wall.txt").write_text(CHINESE, encoding="utf-8")
    (folder / "amazon_latin1.txt").write_text(LATIN, encoding="latin-1")
    if broken:
        _broken(folder)
    else:
        (folder / "broken").rmdir()


def _broken(folder: Path) -> None:
    at = folder / "broken"
    locked_pdf(at / "password.pdf", folder / "lighthouses.pdf")
    locked_docx(at / "password.docx")
    (at / "corrupt.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 20)
    whole = (folder / "rhine.docx").read_bytes()
    (at / "corrupt.docx").write_bytes(whole[: len(whole) // 2])
    (at / "empty.pdf").write_bytes(b"")
    (at / "empty.txt").write_bytes(b"")
    no_pages(at / "no_pages.pdf")
    (at / "no_text.txt").write_text(" \n\n \t\n")
    (at / "really_a_pdf.docx").write_bytes((folder / "lighthouses.pdf").read_bytes())
    bomb(at / "bomb.docx")
    (at / "data.bin").write_bytes(os.urandom(64))
    whole = (folder / "sign.jpg").read_bytes()
    (at / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (at / "not_an_image.png").write_text("this is text")
    picture(["x"], (20, 20)).save(at / "tiny.png")
    Image.new("RGB", (200, 200), "navy").save(at / "one_colour.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
