"""Corpora: passages from a JSONL file, or from a folder of text files that are cut where they are long.

Contract: a stream of `Document`s, the same at every reading; a bad line or file is named with its reason. Holds one
document, or one file, in memory. Knows nothing about models: who asks gives the function that counts tokens.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from openrlhf.datasets.records import RecordError
from openrlhf.retrieval.store import Document
from openrlhf.utils.passages import passages

TEXT_FIELDS = ("text", "contents", "content")
SUFFIXES = (".txt", ".md")
PASSAGE_OF = "passage_of"
"""Of a passage's metadata: the id of the document that it was cut from."""


class Corpus:
    """The documents of a corpus, in order; may be read several times.

    Args:
        path: a JSONL file (`{"id"?, "text" | "contents" | "content", "title"?, "page"?, …}`, all else is metadata), or
            a folder with .txt and .md files at any depth.
        skip_bad: pass over bad lines and files, and count them; otherwise the first one raises.
        passage_tokens: cut files, and lines too, into passages of at most so many tokens, where that is less than the
            limit asked for; None leaves lines whole.

    Attributes:
        position: lines or files read so far in this reading.
        skipped: bad lines or files passed over in this reading; `first_skipped` tells the first.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """

    def __init__(self, path: str | Path, skip_bad: bool = False, passage_tokens: int | None = None):
        self.path, self.skip_bad, self.passage_tokens = Path(path), skip_bad, passage_tokens
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a JSONL file, or a folder of .txt and .md files")
        self._restart()

    def _restart(self) -> None:
        self.position = self.skipped = 0
        self.first_skipped = ""

    def check(self) -> int:
        """Reads everything once, without cutting: the number of lines or files.

        Raises:
            RecordError: `file:line: reason` of the first bad one (unless they are skipped), or none is usable.
        """
        usable = sum(1 for _ in self._documents())
        if not usable:
            what = "no .txt or .md file with text" if self.path.is_dir() else "no usable line"
            told = f"; the first of {self.skipped} bad ones: {self.first_skipped}" if self.skipped else ""
            raise RecordError(f"{self.path} holds {what}{told}")
        return self.position

    def documents(self, limit: int, count: Callable[[str], int]) -> Iterator[Document]:
        """Every document; a file of more than `limit` tokens as passages `path#1`, `path#2` …, and a line of more than
        `passage_tokens` likewise, where these are given.

        Args:
            count: number of tokens of a text.

        Raises:
            RecordError: see `check`.
        """
        limit = min(limit, self.passage_tokens or limit)
        is_cut = self.path.is_dir() or self.passage_tokens is not None
        for document in self._documents():
            yield from cut(document, limit, count) if is_cut else [document]

    def _documents(self) -> Iterator[Document]:
        self._restart()
        for place, read in self._files() if self.path.is_dir() else self._lines():
            self.position += 1
            try:
                document = read()
            except RecordError as error:
                if not self.skip_bad:
                    raise RecordError(f"{place}: {error}") from None
                self.skipped += 1
                self.first_skipped = self.first_skipped or f"{place}: {error}"
                continue
            if document is not None:
                yield document

    def _lines(self) -> Iterator[tuple[str, Callable[[], Document | None]]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield f"{self.path}:{number}", lambda line=line, encoding=encoding: parse_line(line, encoding)  # type: ignore[misc]

    def _files(self) -> Iterator[tuple[str, Callable[[], Document]]]:
        for folder, below, names in os.walk(self.path):
            below.sort()
            for path in (Path(folder, name) for name in sorted(names)):
                if path.suffix.lower() in SUFFIXES:
                    yield str(path), lambda path=path: self._file(path)  # type: ignore[misc]

    def _file(self, path: Path) -> Document:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 at byte {error.start}") from None
        except OSError as error:
            raise RecordError(f"cannot be read: {error.strerror}") from None
        if not text.strip():
            raise RecordError("holds no text")
        return Document(path.relative_to(self.path).as_posix(), text.strip())


def parse_line(line: bytes, encoding: str = "utf-8") -> Document | None:
    """The document of one JSONL line, None for a blank one.

    Raises:
        RecordError: with the reason why it cannot be used.
    """
    try:
        text = line.decode(encoding)
        record = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # thousands of brackets or digits
        raise RecordError(f"not JSON that can be read: {error}") from None
    return None if not text.strip() else parse_record(record)


def parse_record(record: object) -> Document:
    """The document of a JSON object as in a JSONL corpus; one without an id is named after its content.

    Raises:
        RecordError: with the reason why it cannot be used.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a line must be a JSON object, got {_shown(record)}")
    rest = dict(record)
    field = next((name for name in TEXT_FIELDS if rest.get(name) is not None), None)
    if field is None:
        raise RecordError("text is missing (contents and content are accepted too)")
    text, title, page, name = rest.pop(field), rest.pop("title", None), rest.pop("page", None), rest.pop("id", None)
    title = "" if title is None else title
    for what, value in ((field, text), ("title", title)):
        if not isinstance(value, str) or (what == field and not value.strip()):
            raise RecordError(f"{what} must be a text, got {_shown(value)}")
    if isinstance(page, bool) or not isinstance(page, int | None):
        raise RecordError(f"page must be a whole number, got {_shown(page)}")
    if name is None:
        name = hashlib.sha256(f"{title}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise RecordError(f"id must be a text or a whole number, got {_shown(name)}")
    try:
        f"{name}{title}{text}{json.dumps(rest, ensure_ascii=False)}".encode()
    except UnicodeEncodeError:
        raise RecordError("contains half a surrogate pair, which is no text") from None
    return Document(str(name), text, title, page, rest)


def cut(document: Document, limit: int, count: Callable[[str], int]) -> list[Document]:
    """A document as it is or, where it has more than `limit` tokens with its title, as passages `id#1`, `id#2` …, each
    with the title; their metadata says which document they are of."""
    title = min(count(f"{document.title}\n"), limit // 2) if document.title else 0
    parts = passages(document.text, limit - title, count)
    if len(parts) == 1:
        return [document]
    metadata = {**document.metadata, PASSAGE_OF: document.id}
    return [
        Document(f"{document.id}#{n}", part, document.title, document.page, metadata) for n, part in enumerate(parts, 1)
    ]


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
