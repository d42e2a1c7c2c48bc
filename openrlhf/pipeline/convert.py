"""One file → its chunks and pictures, by Docling. Runs in a worker process of its own (`worker.py`).

Contract: `convert` gives {"title", "layout", "pages", "chunks", "pictures"} of a file, or raises `Skip` with the reason
why nothing can be had of it. Reads that one file, and pictures beside it that the caller has found to lie inside the
folder; never the network. Knows nothing about other files, ids, or what has been done before.
"""

import base64
import io
import logging
import re
import warnings
import zipfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from openrlhf.pipeline.marks import MARKS

KINDS = {
    ".pdf": "pdf",
    ".docx": "docx",
    ".pptx": "pptx",
    ".xlsx": "xlsx",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".md": "md",
    ".markdown": "md",
    ".txt": "txt",
    ".text": "txt",
}
_OFFICE = {"docx": "word/document.xml", "pptx": "ppt/presentation.xml", "xlsx": "xl/workbook.xml"}
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_UNPACKED = 1 << 30  # bytes that an Office file may unpack to
_PICTURE_SIDE = 2048  # pixels of the longer side of a picture that is kept
# How a caption begins, where nothing else says that a line is one.
CAPTION = re.compile(r"(fig(ure|\.)?|table|plate|chart|map|abb(ildung|\.)?|图|圖|表)\s*\d+", re.IGNORECASE)
_LINK = re.compile(r"(<img\b[^>]*?\bsrc\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s>]+)", re.IGNORECASE)
_MD_LINK = re.compile(r"(!\[([^\]]*)\]\(\s*)(<[^>]*>|[^)\s]+)")


class Skip(Exception):
    """The file holds nothing that can be used; the message is the reason."""


class Passing(Skip):
    """The fault lies outside the file: another time it may go better."""


def sniff(data: bytes) -> str | None:
    """What the bytes are: pdf, docx, pptx, xlsx, zip, ole, image, or None for what looks like none of these."""
    if b"%PDF-" in data[:1024]:
        return "pdf"
    if data.startswith(_OLE):
        return "ole"
    if data.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")):
        return "image"
    if not data.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = set(archive.namelist())
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError):
        return "zip"
    if size > _UNPACKED:
        raise Skip(f"would grow to {size / 1e9:.1f} GB when unpacked")
    return next((kind for kind, name in _OFFICE.items() if name in names), "zip")


def check(data: bytes, kind: str) -> None:
    """Raises Skip where the bytes are not what the file's name says, or are locked or damaged."""
    if not data:
        raise Skip("is empty")
    found = sniff(data)
    if found == kind:
        return
    if kind in _OFFICE and found == "ole":
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise Skip("needs a password")
        raise Skip(f"is of Office's old format, not {kind}: save it anew as .{kind}")
    if kind in _OFFICE and found in ("zip", None):
        raise Skip(f"is damaged, or no {kind} file: it cannot be unpacked")
    text = found is None or (found == "pdf" and not data.startswith(b"%PDF-"))  # a text may speak of PDF files
    if kind not in _OFFICE and kind != "pdf" and text:
        if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise Skip("is no text: it holds zero bytes")
        return
    what = {None: "no PDF: it has no PDF header", "ole": "an old Office file", "image": "an image"}
    raise Skip(f"is named .{kind} but is {what.get(found, f'a {str(found).upper()} file')}: name it by what it holds")


def decode(data: bytes, kind: str = "txt") -> str:
    """Text of unknown encoding: a byte-order mark, what HTML says of itself, UTF-8, then GB 18030 where it fits, else
    Windows-1252."""
    for start, name in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(start):
            return data.decode(name, errors="replace")
    said = re.search(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", data[:4096]) if kind == "html" else None
    for name in ([said[1].decode()] if said else []) + ["utf-8"]:
        try:
            return data.decode(name)
        except (UnicodeDecodeError, LookupError):
            pass
    # In GB 18030 the bytes of Chinese come in pairs; in Western text a high byte stands alone among letters.
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    if sum(run for run in runs if run > 2) > 0.6 * sum(runs):
        try:
            return data.decode("gb18030")
        except UnicodeDecodeError:
            pass
    return data.decode("cp1252", errors="replace")


def picture_links(data: bytes, kind: str) -> list[str]:
    """Addresses of the pictures in an HTML or Markdown file."""
    if kind not in ("html", "md"):
        return []
    text = decode(data, kind)
    found = [match[match.re.groups].strip("\"'<>") for pattern in (_LINK, _MD_LINK) for match in pattern.finditer(text)]
    return list(dict.fromkeys(found))


def _embedded(text: str, pictures: dict[str, str]) -> str:
    """The text with its local pictures inside, and no address of any other: nothing is left to be fetched."""

    def put(match: re.Match) -> str:
        address = match[match.re.groups].strip("\"'<>")
        if address.startswith("data:"):
            return match.group(0)
        path = pictures.get(address)
        source = "data:," if path is None else _data_uri(Path(path))
        return f'{match.group(1)}"{source}"' if match.re is _LINK else f"{match.group(1)}{source}"

    return _MD_LINK.sub(put, _LINK.sub(put, text))


def _data_uri(path: Path) -> str:
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return "data:,"


def pdf_pages(data: bytes) -> list[bool]:
    """Whether each page of a PDF must be read by OCR: it has no text, or a few letters on a large image."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        raise Skip("needs a password" if locked else f"is a damaged PDF ({error})") from None
    try:
        return [_needs_ocr(document, number) for number in range(len(document))]
    finally:
        document.close()


def _needs_ocr(document: Any, number: int) -> bool:
    import pypdfium2

    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return False  # Docling will say what is wrong with it
    letters = len(re.sub(r"\s", "", page.get_textpage().get_text_bounded()))
    if letters >= 32 or not letters:
        return not letters
    width, height = page.get_size()
    boxes = [item.get_bounds() for item in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE])]
    return any((box[2] - box[0]) * (box[3] - box[1]) > 0.5 * width * height for box in boxes)


@lru_cache(maxsize=4)
def _converter(kind: str, layout: str, ocr: bool) -> Any:
    """Docling's converter of a kind; made once."""
    from docling.datamodel.backend_options import HTMLBackendOptions, MarkdownBackendOptions
    from docling.datamodel.base_models import InputFormat
    from docling.document_converter import (
        DocumentConverter,
        ExcelFormatOption,
        HTMLFormatOption,
        MarkdownFormatOption,
        PowerpointFormatOption,
        WordFormatOption,
    )

    if kind == "pdf":
        from openrlhf.pipeline.pdf import format_option

        return DocumentConverter([InputFormat.PDF], {InputFormat.PDF: format_option(layout, ocr)})
    no_fetch: dict[str, Any] = {"fetch_images": True, "enable_local_fetch": False, "enable_remote_fetch": False}
    options: dict[str, tuple[InputFormat, Any]] = {
        "docx": (InputFormat.DOCX, WordFormatOption()),
        "pptx": (InputFormat.PPTX, PowerpointFormatOption()),
        "xlsx": (InputFormat.XLSX, ExcelFormatOption()),
        "html": (
            InputFormat.HTML,
            HTMLFormatOption(backend_options=HTMLBackendOptions(infer_furniture=False, add_title=False, **no_fetch)),
        ),
        "md": (InputFormat.MD, MarkdownFormatOption(backend_options=MarkdownBackendOptions(**no_fetch))),
    }
    which, option = options[kind]
    return DocumentConverter([which], {which: option})


def document_of(
    data: bytes, kind: str, layout: str, max_pages: int, pictures: dict[str, str]
) -> tuple[Any, str, int, str | None]:
    """Docling's document of the bytes, how its layout was found, its pages, and what could not be read of it."""
    from docling.datamodel.base_models import ConversionStatus
    from docling.exceptions import ConversionError
    from docling_core.types.io import DocumentStream

    pages, ocr = 0, False
    if kind == "pdf":
        scanned = pdf_pages(data)
        pages, ocr = len(scanned), any(scanned)
        if not pages:
            raise Skip("has no pages")
        if pages > max_pages:
            raise Skip(f"has {pages:,} pages, more than --max_pages {max_pages:,}")
    if kind == "txt":
        return _plain(decode(data)), "plain", 0, None
    if kind in ("html", "md"):
        data = _embedded(decode(data, kind), pictures).encode()
    logging.getLogger("docling").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _converter(kind, layout, ocr).convert(DocumentStream(name=f"file.{kind}", stream=io.BytesIO(data)))
    except ConversionError as error:
        raise Skip(f"is damaged, Docling cannot read it: {_first_line(error)}") from None
    if result.status not in (ConversionStatus.SUCCESS, ConversionStatus.PARTIAL_SUCCESS):
        raise Skip(f"is damaged, Docling cannot read it: {result.errors[0].error_message if result.errors else ''}")
    pages = pages or len(result.document.pages)
    if pages > max_pages:
        raise Skip(f"has {pages:,} pages, more than --max_pages {max_pages:,}")
    lost = sorted(set(range(1, pages + 1)) - {page.page_no for page in result.pages}) if kind == "pdf" else []
    note = f"of {pages:,} pages {len(lost):,} cannot be read, the first is page {lost[0]}" if lost else None
    return result.document, layout if kind == "pdf" else "docling", pages, note


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _plain(text: str) -> Any:
    """A document of paragraphs, as blank lines part them; short lines above them are headings."""
    from docling_core.types.doc import DoclingDocument
    from docling_core.types.doc.labels import DocItemLabel

    document = DoclingDocument(name="text")
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", "\n".join(text.splitlines())) if part.strip()]
    for number, paragraph in enumerate(paragraphs):
        following = paragraphs[number + 1] if number + 1 < len(paragraphs) else ""
        if not _is_heading(paragraph, following):
            document.add_text(DocItemLabel.TEXT, paragraph)
        elif number:
            document.add_heading(paragraph, level=1)
        else:
            document.add_title(paragraph)
    return document


def _is_heading(paragraph: str, following: str) -> bool:
    """A short line above a longer paragraph, without the end of a sentence."""
    line = paragraph.strip()
    brief = len(line) <= 80 and len(line.split()) <= 12 and "\n" not in line
    return brief and len(following) > len(line) and not re.search(r"[.!?:;,。！？：；，][\"'”’)]*$", line)


def tidy(document: Any) -> None:
    """Makes one text of each paragraph, text of speaker's notes, headings of the names of sheets; takes out lines that
    stand at the edge of most pages, and private characters."""
    from docling_core.types.doc import ContentLayer, GroupLabel

    for item in document.texts:
        item.text = MARKS.sub("", item.text)
        if item.content_layer == ContentLayer.NOTES:
            item.content_layer = ContentLayer.BODY
    for table in document.tables:
        for cell in table.data.table_cells:
            cell.text = MARKS.sub("", cell.text)
    for item in _running_lines(document):
        item.content_layer = ContentLayer.FURNITURE
    for group in [group for group in document.groups if group.label == GroupLabel.SHEET and group.children]:
        document.insert_heading(group.children[0].resolve(document), group.name, level=1, after=False)
    _join_inline(document)
    _raise_title(document)


def _raise_title(document: Any) -> None:
    """A first heading in the largest letters is the title; the others stand below it."""
    from docling_core.types.doc import SectionHeaderItem

    headings: list[Any] = [item for item in document.texts if isinstance(item, SectionHeaderItem) and item.prov]
    first: Any = next((item for item, _ in document.iterate_items()), None)
    if len(headings) < 2 or headings[0] is not first:
        return
    tall = [abs(item.prov[0].bbox.t - item.prov[0].bbox.b) for item in headings]
    if tall[0] > 1.1 * max(tall[1:]) and min(item.level for item in headings[1:]) <= headings[0].level:
        for item in headings[1:]:
            item.level += 1


def _running_lines(document: Any) -> list[Any]:
    """Texts at the top or bottom of most pages that are equal but for numbers."""
    from docling_core.types.doc import SectionHeaderItem, TitleItem

    alike: dict[str, list[Any]] = defaultdict(list)
    for item in document.texts:
        if isinstance(item, TitleItem | SectionHeaderItem) or not item.prov:
            continue
        page = document.pages.get(item.prov[0].page_no)
        if page is not None and page.size.height:
            box = item.prov[0].bbox.to_top_left_origin(page.size.height)
            if box.b < 0.1 * page.size.height or box.t > 0.9 * page.size.height:
                alike[re.sub(r"\d+", "#", item.text.strip())].append(item)
    on = {text: {item.prov[0].page_no for item in items} for text, items in alike.items()}
    most = [text for text in alike if len(on[text]) >= 3 and len(on[text]) > len(document.pages) / 2]
    return [item for text in most for item in alike[text]]


def _join_inline(document: Any) -> None:
    """Docling parts a paragraph at each change of type, *so*: here it becomes one text again."""
    from docling_core.types.doc import CodeItem, InlineGroup, TextItem

    gone = []
    for group in document.groups:
        parts = [child.resolve(document) for child in group.children] if isinstance(group, InlineGroup) else []
        if not parts or not all(isinstance(part, TextItem) for part in parts):
            continue
        text = re.sub(r" ([,.;:!?)\]}，。；：！？）])", r"\1", " ".join(part.text for part in parts))
        above = group.parent.resolve(document)
        holder = next((part for part in parts if not isinstance(part, CodeItem)), None)
        if isinstance(above, TextItem) and not above.text:
            above.text = text
            gone.append(group)
        elif holder is not None:
            holder.text = text
            gone += [part for part in parts if part is not holder]
    if gone:
        document.delete_items(node_items=gone)


def captions(document: Any, names: set[str]) -> dict[int, str]:
    """Captions of pictures by number: what Docling says, or else a text beside the picture that is one of `names` (the
    alternative texts of Markdown) or begins like a caption."""
    from docling_core.types.doc import PictureItem, TextItem

    found = {}
    items = [item for item, _ in document.iterate_items()]
    for before, item, after in zip([None, *items], items, [*items[1:], None], strict=False):
        if isinstance(item, PictureItem):
            beside = [other.text for other in (after, before) if isinstance(other, TextItem)]
            text = next((text for text in beside if text in names or CAPTION.match(text)), "")
            number = int(item.self_ref.rsplit("/", 1)[1])
            found[number] = " ".join((item.caption_text(document) or text).split())
    return found


def title_of(document: Any) -> str | None:
    """What the document calls itself: its title, or a first heading that stands before all text."""
    from docling_core.types.doc import SectionHeaderItem, TitleItem

    first = next((item for item, _ in document.iterate_items()), None)
    titles = [item.text for item in document.texts if isinstance(item, TitleItem)]
    if titles:
        return re.sub(r"\s+", " ", titles[0]).strip() or None
    return re.sub(r"\s+", " ", first.text).strip() or None if isinstance(first, SectionHeaderItem) else None


def png_of(picture: Any, document: Any) -> bytes | None:
    """A picture as PNG, at most _PICTURE_SIDE pixels a side; None where the file holds none that can be read."""
    from PIL import Image

    try:
        image = picture.get_image(document)
        if image is None:
            return None
        image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
        image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
        held = io.BytesIO()
        image.save(held, "PNG")
        return held.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def convert(data: bytes, kind: str, options: dict, tokenizer: Any, pictures: dict[str, str]) -> dict:
    """Everything of one file.

    Args:
        data: the file.
        kind: see KINDS.
        options: layout ("docling" or "rules"), limit (tokens a chunk), max_pages.
        tokenizer: of transformers.
        pictures: address in the file → path, of the local pictures of HTML and Markdown.

    Returns:
        title or None; layout; pages; note, what could not be read, or None; chunks as `chunks.chunks` gives them;
        pictures, {number: {"caption", "page", "png": base64}} of those that the file holds in a form that can be read.

    Raises:
        Skip: with the reason.
    """
    from openrlhf.pipeline.chunks import chunks

    check(data, kind)
    document, layout, pages, note = document_of(data, kind, options["layout"], options["max_pages"], pictures)
    tidy(document)
    found = chunks(document, tokenizer, options["limit"], counter(tokenizer))
    names = {match[2].strip() for match in _MD_LINK.finditer(decode(data))} if kind == "md" else set()
    captioned = captions(document, names)
    images: dict[str, dict] = {}
    for number in sorted({picture["number"] for chunk in found for picture in chunk["pictures"]}):
        item = document.pictures[number]
        png = png_of(item, document)
        if png is not None:
            page = item.prov[0].page_no if item.prov else None
            png_text = base64.b64encode(png).decode()
            images[str(number)] = {"caption": captioned.get(number, ""), "page": page, "png": png_text}
    for chunk in found:
        chunk["pictures"] = [picture for picture in chunk["pictures"] if str(picture["number"]) in images]
    found = [chunk for chunk in found if chunk["text"] or chunk["pictures"]]
    if not found:
        raise Skip("holds no text" + (" that OCR can read" if kind == "pdf" else ""))
    about = {"title": title_of(document), "layout": layout, "pages": pages, "note": note}
    return {**about, "chunks": found, "pictures": images}


def counter(tokenizer: Any) -> Any:
    """Counts tokens as the model will: a text that spells a special token is plain text."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    return count
