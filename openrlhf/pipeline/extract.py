"""A folder of documents → raw_knowledge.jsonl, extracted_assets/ and extraction_report.json.

Contract: the three are a function of the folder's content and the options. What a file gives is kept in the state under
the hash of its content, so that a file is converted once, whatever it is called; a file that cannot be used is left out
with its reason. Knows nothing about models but their tokenizer.
"""

import base64
import hashlib
import logging
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from openrlhf.pipeline.convert import KINDS, Passing, Skip, picture_links
from openrlhf.pipeline.files import drafted, same, write_bytes, write_json, write_lines
from openrlhf.pipeline.state import State, content_key
from openrlhf.pipeline.work import each, half
from openrlhf.pipeline.worker import Workers

ASSETS = "extracted_assets"
REPORT = "extraction_report.json"
IMAGES = (".jpg", ".jpeg", ".png")  # the vision step's
_VERSION = 1  # of what this code makes of a file: another one converts everything anew
_MODELS = {"docling-project/docling-layout-heron": "main", "docling-project/docling-models": "v2.3.0"}  # of Docling
_OWN = re.compile(r"[0-9a-f]{32}\.png(\.draft)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How files are converted.

    Args:
        tokenizer: name or directory of the model's tokenizer.
        tokenizer_hash: of what it does.
        limit: tokens that the text of a chunk may have.
        layout: of PDF files, "docling" or "rules".
        max_file_mb, max_pages, file_timeout: what exceeds these (megabytes, pages, seconds) is left out.
    """

    tokenizer: str
    tokenizer_hash: str
    limit: int = 256
    layout: str = "rules"
    max_file_mb: float = 200
    max_pages: int = 2000
    file_timeout: float = 900

    def content(self, kind: str) -> dict:
        """What the chunks of a file of this kind depend on."""
        return {
            "version": _VERSION,
            "docling": metadata.version("docling-slim"),
            "tokenizer": self.tokenizer_hash,
            "limit": self.limit,
            "layout": self.layout if kind == "pdf" else None,
        }


def tokenizer_hash(tokenizer: Any) -> str:
    """Equal for tokenizers that cut texts alike, wherever they lie."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return content_key(inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items()))


def choose_layout(wanted: str) -> tuple[str, str]:
    """ "docling" or "rules", and why the latter (empty for the former, and where it was asked for).

    Raises:
        ValueError: Docling's models were asked for and cannot be had.
    """
    if wanted == "rules":
        return "rules", ""
    reason = _no_models()
    if reason and wanted == "docling":
        raise ValueError(f"--layout docling: {reason}; --layout auto goes on with our own layout rules")
    return ("rules", reason) if reason else ("docling", "")


def _no_models() -> str:
    """Why Docling's layout and table models cannot be used; empty where they can."""
    from importlib.util import find_spec

    if find_spec("torchvision") is None or find_spec("docling_ibm_models") is None:
        return "Docling's layout models need torchvision and docling-ibm-models, which are not installed"
    import huggingface_hub

    for name, revision in _MODELS.items():
        for local in (True, False):
            try:
                huggingface_hub.snapshot_download(name, revision=revision, local_files_only=local, etag_timeout=5)
                break
            except Exception as error:  # not in the cache; then: no network, a proxy, a closed Hub
                reason = f"{name} is not in the local cache, and the Hub cannot be reached ({type(error).__name__})"
        else:
            return reason
    return ""


def listing(root: Path) -> list[str]:
    """Everything in the folder that is not hidden, as sorted paths below it; links to folders, and folders that cannot
    be listed, are named but not followed."""
    found: list[str] = []

    def closed(error: OSError) -> None:
        found.append(Path(error.filename).relative_to(root).as_posix())

    for folder, below, names in os.walk(root, onerror=closed):
        linked = [name for name in below if Path(folder, name).is_symlink()]
        below[:] = [name for name in below if not name.startswith(".") and name not in linked]
        found += [Path(folder, name).relative_to(root).as_posix() for name in (*names, *linked) if name[0] != "."]
    return sorted(found)


def read(root: Path, source: str, max_mb: float) -> bytes:
    """A file's bytes.

    Raises:
        Skip: it is no file, leads out of the folder, or is too large, empty or not to be read.
    """
    path = root / source
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise Skip("is a link that leads out of the folder")
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Skip("is no regular file")
        if about.st_size > max_mb * 1e6:
            raise Skip(f"has {about.st_size / 1e6:,.1f} MB, more than --max_file_mb {max_mb:g}")
        data = path.read_bytes()
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise Skip(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise Skip("is empty")
    return data


def shown(name: str) -> str:
    """A file's name as it can be written down, with a mark for each byte that is not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


class Extractor:
    """Converts one file, or takes what it gave before from the state; a function for `work.each`.

    Args:
        root: the folder of documents, at this path on every machine that takes part.
        options: see `Options`.
        threads: for the computations of one file.
    """

    def __init__(self, root: Path, options: Options, threads: int = 1):
        self.root, self.options, self.threads = root, options, threads
        self._workers = Workers(options.tokenizer, threads, offline=options.layout == "rules")

    def __reduce__(self) -> tuple:
        return Extractor, (self.root, self.options, self.threads)  # each machine starts workers of its own

    def __call__(self, source: str, state: State) -> dict:
        """{"source", "sha256", "status", "reason", "result": what `convert` gave, pictures as {"file", …}}"""
        about: dict = {"source": shown(source), "sha256": None, "status": "skipped", "reason": None, "result": None}
        try:
            if about["source"] != source:
                raise Skip("has a name that is not UTF-8: rename it")
            if os.path.isdir(self.root / source):
                raise Skip("is a folder behind a link, or one that cannot be listed")
            kind = KINDS.get(Path(source).suffix.lower())
            if kind is None:
                raise Skip(f"is of a kind that is not read ({Path(source).suffix or 'no extension'})")
            data = read(self.root, source, self.options.max_file_mb)
            about["sha256"] = hashlib.sha256(data).hexdigest()
            about["result"] = self._result(source, data, about["sha256"], kind, state)
            about["status"], about["reason"] = "done", about["result"]["note"]
        except Skip as error:
            about["reason"] = str(error)
        return about

    def _result(self, source: str, data: bytes, sha256: str, kind: str, state: State) -> dict:
        pictures = self._local_pictures(source, data, kind)
        hashes = {address: digest for address, (_, digest) in pictures.items()}
        key = content_key(sha256, kind, self.options.content(kind), hashes)
        limits = {"max_pages": self.options.max_pages, "file_timeout": self.options.file_timeout}
        kept = state.get("extract", key)
        if kept is not None and "skip" in kept and kept["limits"] == limits:
            raise Skip(kept["skip"])
        if kept is None or "skip" in kept:
            paths = {address: str(path) for address, (path, _) in pictures.items()}
            kept = self._converted(source, sha256, kind, paths, key, limits, state)
        if kept["pages"] > self.options.max_pages:
            raise Skip(f"has {kept['pages']:,} pages, more than --max_pages {self.options.max_pages:,}")
        return kept

    def _converted(
        self, source: str, sha256: str, kind: str, pictures: dict[str, str], key: str, limits: dict, state: State
    ) -> dict:
        options = {"layout": self.options.layout, "limit": self.options.limit, "max_pages": self.options.max_pages}
        try:
            result = self._workers.run(self.root / source, sha256, kind, options, pictures, self.options.file_timeout)
        except Passing:
            raise
        except Skip as error:
            state.put("extract", key, {"skip": str(error), "limits": limits})
            raise
        for picture in result["pictures"].values():
            png = base64.b64decode(picture["png"])
            name = f"{hashlib.sha256(png).hexdigest()[:32]}.png"
            state.put("asset", name, picture.pop("png"))
            picture["file"] = f"{ASSETS}/{name}"
        state.put("extract", key, result)  # after its pictures: where it is, they are
        return result

    def _local_pictures(self, source: str, data: bytes, kind: str) -> dict[str, tuple[Path, str]]:
        """The pictures that an HTML or Markdown file shows and that lie inside the folder, by their address in it: path
        and sha256."""
        found = {}
        for address in picture_links(data, kind):
            if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#", address):
                continue
            path = (self.root / source).parent / unquote(address.split("?")[0].split("#")[0])
            try:
                inside = path.resolve(strict=True).is_relative_to(self.root.resolve()) and path.is_file()
                if inside and path.stat().st_size <= 20e6:
                    found[address] = path, hashlib.sha256(path.read_bytes()).hexdigest()
            except (OSError, RuntimeError, ValueError):
                continue
        return found

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()


def records_of(about: dict) -> Iterator[dict]:
    """The records of a file, as `raw_knowledge.jsonl` has them."""
    result = about["result"]
    title = result["title"] or Path(about["source"]).stem
    for number, chunk in enumerate(result["chunks"]):
        text = chunk["text"] or title
        pictures = []
        for place in chunk["pictures"]:
            picture = result["pictures"][str(place["number"])]
            pictures.append(
                {
                    "file": picture["file"],
                    "page": picture["page"],
                    "caption": picture["caption"],
                    "at": place["at"] if chunk["text"] else len(text),
                }
            )
        yield record(about, number, text, result["layout"], title, chunk["page"], chunk["headings"], pictures)


def record(
    about: dict,
    number: int,
    text: str,
    layout: str,
    title: str,
    page: int | None,
    headings: list[str],
    pictures: list[dict],
) -> dict:
    """One line of `raw_knowledge.jsonl`; `about` gives source and sha256 of the file."""
    return {
        "id": f"{about['source']}#{number}",
        "source": about["source"],
        "document_sha256": about["sha256"],
        "number": number,
        "page": page,
        "title": title,
        "headings": headings,
        "text": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "layout": layout,
        "language": language_of(text),
        "pictures": pictures,
    }


_ENGLISH = re.compile(r"(the|of|and|to|in|is|was|for|that|with|as|on|by|it|are|from|at|which|be|or|an|this)")


def language_of(text: str) -> str:
    """ "zh", "en" or "other": by its Han characters, and by the small words that only English has."""
    letters = [letter for letter in text if letter.isalpha()]
    han = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    kana = sum("\u3040" <= letter <= "\u30ff" or "\uac00" <= letter <= "\ud7a3" for letter in letters)
    if han and han > 0.3 * len(letters):
        return "other" if kana > 0.1 * len(letters) else "zh"
    words = re.findall(r"[a-z']+", text.lower())
    ascii_letters = sum(letter.isascii() for letter in letters)
    english = sum(_ENGLISH.fullmatch(word) is not None for word in words)
    if letters and ascii_letters > 0.95 * len(letters) and (english >= 0.08 * len(words) or len(words) < 12):
        return "en"
    return "other"


def clean_assets(folder: Path, wanted: set[str]) -> list[str]:
    """Removes the pictures that this pipeline made and that are not wanted any more; the names of what is not its own.

    A picture is its own where its name is the hash of its content.
    """
    foreign = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name in wanted:
            continue
        own = path.is_file() and not path.is_symlink() and _OWN.fullmatch(path.name)
        if own and (path.suffix == ".draft" or hashlib.sha256(path.read_bytes()).hexdigest()[:32] == path.stem):
            path.unlink()
        else:
            foreign.append(path.name)
    return foreign


def extract(
    root: Path, output: Path, options: Options, state: State, workers: int | None = 1, ray: bool = False
) -> dict:
    """Extracts a folder; writes `output`, and beside it the pictures and the report, which is returned.

    Raises:
        ValueError: the folder holds no files at all.
        RuntimeError: workers cannot be started.
    """
    found = listing(root)
    if not found:
        raise ValueError(f"{root} holds no files: put documents into it")
    sources = [source for source in found if Path(source).suffix.lower() not in IMAGES]
    cores = os.cpu_count() or 1
    extractor = Extractor(root, options, threads=max(1, cores // (workers or half(cores))))
    files: list[dict] = []
    assets: set[str] = set()

    def records() -> Iterator[dict]:
        for about in each(extractor, sources, state, workers, title="extracting", ray=ray):
            line = {name: about[name] for name in ("source", "sha256", "status", "reason")}
            result = about["result"] or {"chunks": [], "pictures": {}, "layout": None}
            line |= {"chunks": len(result["chunks"]), "pictures": len(result["pictures"]), "layout": result["layout"]}
            files.append(line)
            if about["result"] is None:
                continue
            for picture in result["pictures"].values():
                name = Path(picture["file"]).name
                if name not in assets:
                    png = state.get("asset", name)
                    assert png is not None, "a picture is kept before its document"
                    write_bytes(output.parent / ASSETS / name, base64.b64decode(png))
                    assets.add(name)
            yield from records_of(about)

    try:
        publish(output, records())
    finally:
        extractor.close()
    for name in clean_assets(output.parent / ASSETS, assets):
        logger.warning("%s/%s is not of this pipeline's making: left as it is", ASSETS, name)
    about_options = {"tokenizer": options.tokenizer, "doc_max_length": options.limit, "layout": options.layout}
    report = {"options": about_options, "files": files}
    write_json(output.parent / REPORT, report)
    return report


def base_of(output: Path) -> Path:
    """Where the records are kept as extraction made them; the vision step starts from these."""
    return output.with_name(f"{output.stem}.extracted{output.suffix}")


def publish(output: Path, records: Iterator[dict]) -> None:
    """Writes the records to `output` and `base_of(output)`; where they are what they were, an `output` that already has
    its pictures described stays."""
    base = base_of(output)
    fresh = base.with_name(f"{base.name}.new")
    try:
        write_lines(fresh, records)
        if output.is_file() and same(fresh, base):
            return
        with drafted(output) as draft:
            shutil.copyfile(fresh, draft)
        os.replace(fresh, base)  # after `output`: killed between the two, the next run does both
    finally:
        fresh.unlink(missing_ok=True)


def summary(report: dict) -> str:
    """The report as a table for people."""
    done = [file for file in report["files"] if file["status"] == "done"]
    skipped = [file for file in report["files"] if file["status"] != "done"]
    layouts = Counter(file["layout"] for file in done)
    lines = [
        f"files    {len(done):,} extracted ({', '.join(f'{n:,} {name}' for name, n in sorted(layouts.items()))}), "
        f"{len(skipped):,} skipped",
        f"chunks   {sum(file['chunks'] for file in done):,}, of at most {report['options']['doc_max_length']} tokens",
        f"pictures {sum(file['pictures'] for file in done):,}",
    ]
    for name, some in (("skipped", skipped), ("not whole", [file for file in done if file["reason"]])):
        wide = min(60, max((len(file["source"]) for file in some), default=0))
        lines += [f"{name}:"] * bool(some) + [f"  {file['source']:<{wide}}  {file['reason']}" for file in some]
    return "\n".join(lines)
