"""The documents that are answered from: uploads become passages in the store, each upload in one commit.

Contract: one upload or deletion at a time changes the store; questions and lists read it meanwhile and see what is
committed. An upload is there whole or not at all, whenever the process dies or the client goes. A document that comes
again takes its own passages' place, however many it had. Knows nothing about HTTP.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from openrlhf.datasets.records import RecordError
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import Counts, add_corpus, add_documents, open_store
from openrlhf.retrieval.corpus import PASSAGE_OF, SUFFIXES, Corpus, cut, parse_line
from openrlhf.retrieval.store import Document, Store
from openrlhf.serving.turns import DOCUMENTS, PURPOSE
from openrlhf.utils.logging import write_whole

logger = logging.getLogger(__name__)

# Vectors of an upload wait in memory for their commit.
UPLOAD_BYTES = 2**30
JSONL = ".jsonl"
FILLED_FILE = "filled.json"
"""In a store: by folder or file, the documents that the last fill from there found, and a digest of each."""


class ReadOnly(RuntimeError):
    """The documents are served and not changed."""


class Library:
    """A store that is read and written while it is served.

    Args:
        path: a store; a new one is made where there is none.
        model: compresses; its fingerprint must fit the store.
        read_only: leave the writing to another process.
        passage_tokens: cut what is added into passages of at most so many tokens, None: of `doc_max_length`.

    Raises:
        ValueError: another model made the store, or another process writes it.
        OSError: it cannot be opened or made.
    """

    def __init__(self, path: str | Path, model: CLaRa, read_only: bool = False, passage_tokens: int | None = None):
        self.path, self.model = Path(path), model
        longest = model.config.doc_max_length
        self.passage_tokens = min(longest, passage_tokens or longest)
        self._writer = None if read_only else open_store(path, model)
        self.store = Store.open(path, fingerprint(model) if read_only else None)
        self.max_passages = max(1, UPLOAD_BYTES // (2 * self.store.n_memory * self.store.width))
        self._changing = threading.Lock()

    def close(self) -> None:
        """Closes the store; waits for a commit."""
        with self._changing:
            self.store.close()
            if self._writer is not None:
                self._writer.close()

    def __len__(self) -> int:
        return len(self.store)

    def listed(self, limit: int, after: int) -> list[tuple[int, Document]]:
        """See `Store.listed`."""
        return self.store.listed(limit, after)

    def fill(self, corpus: Corpus) -> Counts:
        """Adds a corpus, with a progress bar; before the store is served.

        What the last fill from the same place added and is not there any more is deleted, unless something else has
        taken its place since.
        """
        writer, now = self._writable(), dict[str, str]()
        counts = add_corpus(writer, self.model, corpus, lambda document: now.update({document.id: _digest(document)}))
        record, place = self.path / FILLED_FILE, str(corpus.path.resolve())
        filled = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        left = [name for name in filled.get(place, {}) if name not in now]
        held = zip(left, writer.find(left), strict=True)
        stale = [name for name, document in held if document and _digest(document) == filled[place][name]]
        if writer.delete(stale):
            logger.info("deleted what %s does not hold any more: %d of the store's documents", corpus.path, len(stale))
        write_whole(record, json.dumps({**filled, place: now}))
        return counts

    def add(self, documents: Sequence[Document], go_on: Callable[[], None] = lambda: None) -> tuple[Counts, list[str]]:
        """Adds documents, cut where they are long: what became of the passages, and their ids.

        Args:
            go_on: called now and then; may raise to give up.

        Raises:
            ReadOnly: the store is only read.
            ValueError: they are too many passages for one upload.
            OSError: the disk is full.
        """
        writer = self._writable()
        tokens = self.model.tokens
        given = {document.id: document for document in documents}  # an id given twice: the later one counts
        passages: dict[str, Document] = {}
        for document in given.values():
            parts = cut(document, self.passage_tokens, lambda text: len(tokens.plain_ids([text])[0]))
            passages.update((part.id, part) for part in parts)
            go_on()
            if len(passages) > self.max_passages:
                raise ValueError(
                    f"these are more than {self.max_passages:,} passages, too many for one upload: send fewer at once, "
                    "or stop the server and add them with compress_corpus"
                )
        PURPOSE.set(DOCUMENTS)
        with self._changing:
            before = [part.id for name in given for part in self._parts(name) if part.id not in passages]
            counts = add_documents(writer, self.model, list(passages.values()), before, go_on)
        return counts, list(passages)

    def delete(self, name: str) -> int:
        """Removes a document with all its passages, or one passage; how many there were.

        Raises:
            ReadOnly: the store is only read.
        """
        writer = self._writable()
        with self._changing:
            return writer.delete([part.id for part in self._parts(name)])

    def _parts(self, name: str) -> list[Document]:
        """The document of this name and the passages that were cut from it, no others whose ids look alike."""
        return [part for part in self._writable().named(name) if name in (part.id, part.metadata.get(PASSAGE_OF))]

    def _writable(self) -> Store:
        if self._writer is None:
            raise ReadOnly("this server only reads its documents (--read_only): add or delete them elsewhere")
        return self._writer


def _digest(document: Document) -> str:
    return hashlib.sha256(json.dumps(asdict(document), sort_keys=True).encode()).hexdigest()[:16]


def read_file(name: str, content: bytes) -> list[Document]:
    """The documents of an uploaded .txt, .md or .jsonl file.

    Raises:
        RecordError: it holds none, or is no such file; where and why.
    """
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        try:
            text = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise RecordError(f"{name}: not UTF-8 at byte {error.start}") from None
        if not text:
            raise RecordError(f"{name}: holds no text")
        return [Document(name, text)]
    if suffix != JSONL:
        raise RecordError(f"{name}: only {', '.join(SUFFIXES)} and {JSONL} files are taken")
    found = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            document = parse_line(line, "utf-8-sig" if number == 1 else "utf-8")
        except RecordError as error:
            raise RecordError(f"{name}:{number}: {error}") from None
        found += [document] if document is not None else []
    if not found:
        raise RecordError(f"{name}: holds no usable line")
    return found
