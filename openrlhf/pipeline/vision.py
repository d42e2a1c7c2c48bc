"""Images → text: descriptions of standalone images and of the pictures in documents, put into raw_knowledge.jsonl.

Contract: the file is a function of what extraction wrote (`extract.base_of`), of the images and of the model. Each
description is kept in the state under the image's content and the model, and is asked for once. An image that is
damaged, tiny or of one colour is left out with its reason. Knows nothing about what is done with the text.
"""

import base64
import hashlib
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from openrlhf.pipeline.convert import Skip
from openrlhf.pipeline.endpoint import Endpoint, EndpointError, OneAtATime, RequestFailed
from openrlhf.pipeline.extract import IMAGES, base_of, listing, read, record, shown
from openrlhf.pipeline.files import drafted, read_lines, write_json, write_lines
from openrlhf.pipeline.images import BadImage, jpeg_of
from openrlhf.pipeline.marks import MARKS, fitted, mark, prefix_of
from openrlhf.pipeline.replies import without_thoughts
from openrlhf.pipeline.state import State, content_key
from openrlhf.pipeline.work import each

REPORT = "vision_report.json"
OFFLINE = "rapidocr"
_VERSION = 1
# Further parts of a chunk that a description made too long are numbered PART, 2·PART … above it: no other number moves.
PART = 1_000_000
_MOST_TOKENS = 1024  # of a description
_FAILURES = 3  # requests in a row that end the run
PROMPT = (
    "Describe this picture for a reader who cannot see it. Write down all text, numbers, units and labels in it, and "
    "of a chart or table the values. Say only what is there: no opinion, no guess, no introduction. Plain text, no "
    "Markdown."
)

logger = logging.getLogger(__name__)


class Describer:
    """Describes one image, or takes its description from the state; a function for `work.each`.

    Args:
        model: "rapidocr" for the text in it, without any network; any other name is asked for at the endpoint of
            BASE_URL and OPENAI_API_KEY.
        max_mb: larger files are left out.
    """

    def __init__(self, model: str, max_mb: float = 50):
        self.model, self.max_mb = model, max_mb
        self._about = [_VERSION, model, metadata.version("rapidocr") if model == OFFLINE else PROMPT]
        self._endpoint = None if model == OFFLINE else Endpoint(model=model)
        self._start()

    def _start(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._alone = OneAtATime()
        self._failed = 0

    def __getstate__(self) -> dict:
        own = ("_local", "_lock", "_alone", "_failed")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()

    def __call__(self, row: tuple[str, str], state: State) -> dict:
        """(folder, name below it) → {"file", "sha256", "status", "reason", "width", "height", "description"}

        Raises:
            EndpointError: nothing more can be asked of the server.
        """
        folder, name = row
        about: dict = {"file": shown(name), "sha256": None, "status": "skipped", "reason": None, "width": None}
        about |= {"height": None, "description": None}
        try:
            if about["file"] != name:
                raise Skip("has a name that is not UTF-8: rename it")
            data = read(Path(folder), name, self.max_mb)
            about["sha256"] = hashlib.sha256(data).hexdigest()
            key = content_key(about["sha256"], self._about)
            with self._alone(key):  # of equal images the second waits for the first one's description
                kept = state.get("vision", key)
                if kept is None:
                    kept = self._seen(data)
                    state.put("vision", key, kept)
            about |= kept
        except Skip as error:
            about["reason"] = str(error)
        except RequestFailed as error:  # perhaps not the next time
            about |= {"status": "failed", "reason": str(error)}
        return about

    def _seen(self, data: bytes) -> dict:
        try:
            jpeg, width, height = jpeg_of(data)
        except BadImage as error:
            return {"status": "skipped", "reason": str(error)}
        about = {"status": "described", "reason": None, "width": width, "height": height}
        text = MARKS.sub("", self._read_text(jpeg) if self._endpoint is None else self._ask(jpeg)).strip()
        if not text:
            why = "holds no text that OCR can read" if self._endpoint is None else "the model has nothing to say of it"
            return {**about, "status": "skipped", "reason": why}
        return {**about, "description": text}

    def _read_text(self, jpeg: bytes) -> str:
        """Lines of text, from above."""
        if not hasattr(self._local, "ocr"):
            from rapidocr import RapidOCR

            logging.getLogger("RapidOCR").setLevel(logging.ERROR)
            self._local.ocr = RapidOCR(params={"Global.log_level": "error"})
        return "\n".join(self._local.ocr(jpeg).txts or ())

    def _ask(self, jpeg: bytes) -> str:
        import openai

        assert self._endpoint is not None
        address = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": address}}]
        try:
            text = _text_of(self._reply(self._endpoint, [{"role": "user", "content": content}]))
        except openai.APIError as error:
            failure = self._endpoint.failure(error)
            if isinstance(failure, EndpointError):
                raise failure from None
            if failure.refused:
                raise Skip(f"the server refuses it: {failure}") from None
            self._count(failure)
            raise failure from None
        except ValueError as error:
            failure = RequestFailed(str(error))
            self._count(failure)
            raise failure from None
        with self._lock:
            self._failed = 0
        return text

    def _reply(self, endpoint: Endpoint, messages: list[dict]) -> Any:
        """The server's, with the options that it takes."""
        import openai

        while True:
            options = endpoint.options_taken(_MOST_TOKENS)
            try:
                return endpoint.client().chat.completions.create(model=self.model, messages=messages, **options)
            except openai.APIError as error:
                failure = endpoint.failure(error)
                if isinstance(failure, EndpointError) or not failure.refused:
                    raise
                # Another thread may have been told the same and left the option out already.
                if not endpoint.adjust(str(failure)) and options == endpoint.options_taken(_MOST_TOKENS):
                    raise

    def _count(self, failure: RequestFailed) -> None:
        """Raises EndpointError where too many requests in a row have failed."""
        with self._lock:
            self._failed += 1
            if self._failed >= _FAILURES:
                raise EndpointError(
                    f"{self._failed} requests in a row failed, the last one because {failure}. What was done is kept: "
                    "see to the server, then give the same command again"
                )


def _text_of(reply: Any) -> str:
    """The text of a chat reply, without thoughts; raises ValueError where it is none."""
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError("the server's reply is not one of a chat endpoint: it has no choices (is BASE_URL right?)")
    return without_thoughts(choices[0].message.content or "")


def described(entry: dict, descriptions: dict[str, str], limit: int, count: Callable[[str], int]) -> list[dict]:
    """A record with the descriptions of its pictures in its text; several where it becomes longer than `limit`."""
    pictures = [{**picture, "description": descriptions.get(picture["file"])} for picture in entry["pictures"]]
    if not any(picture["description"] for picture in pictures):
        return [entry]
    prefix = prefix_of(entry["headings"], limit, count)
    headings = entry["headings"] if f"{entry['text']}\n".startswith(prefix) else []
    start = len(prefix) if headings else 0
    body, end = "", start
    for number, picture in sorted(enumerate(pictures), key=lambda pair: pair[1]["at"]):
        at = max(picture["at"], start)
        before = entry["text"][end:at].rstrip("\n")
        body += (f"{before}\n" if before else "") + mark(number) + (picture["description"] or "").strip() + "\n"
        end = max(at, end)
    body += entry["text"][end:].lstrip("\n")
    parts = []
    for part, (text, places) in enumerate(fitted(headings, body.strip(), limit, count)):
        number = entry["number"] + part * PART
        shown = [{**pictures[place["number"]], "at": place["at"]} for place in places]
        about = {"source": entry["source"], "sha256": entry["document_sha256"]}
        parts.append(
            record(about, number, text, entry["layout"], entry["title"], entry["page"], entry["headings"], shown)
        )
    return parts


def standalone(about: dict, limit: int, count: Callable[[str], int]) -> list[dict]:
    """The records of an image that is a file of its own."""
    title = Path(about["file"]).stem
    of = {"source": about["file"], "sha256": about["sha256"]}
    return [
        record(of, part * PART, text, "plain", title, None, [], [])
        for part, (text, _) in enumerate(fitted([title], about["description"], limit, count))
    ]


def see(
    root: Path,
    output: Path,
    model: str,
    state: State,
    limit: int,
    count: Callable[[str], int],
    workers: int | None = 1,
    ray: bool = False,
) -> dict:
    """Both passes: images of the folder, then pictures of the documents; writes `output` and the report, returned.

    Args:
        limit: tokens that the text of a record may have.
        count: tokens of a text as the model counts them.

    Raises:
        EndpointError: the server cannot be used; what was described is kept.
    """
    base = base_of(output)
    if not base.is_file() and output.is_file():  # written by other means than our extraction
        with drafted(base) as draft:
            shutil.copyfile(output, draft)
    if not base.is_file():
        logger.warning("%s is not there: only the images of the folder are described", base)
    entries = list(read_lines(base)) if base.is_file() else []
    describer = Describer(model)
    images = [(str(root), name) for name in listing(root) if Path(name).suffix.lower() in IMAGES]
    files = sorted({picture["file"] for entry in entries for picture in entry["pictures"]})
    assets = [(str(output.parent), name) for name in files]
    seen = list(each(describer, images, state, workers, title="images", ray=ray))
    found = list(each(describer, assets, state, workers, title="pictures of documents", ray=ray))
    descriptions = {about["file"]: about["description"] for about in found if about["description"]}

    def records() -> Iterator[dict]:
        for entry in entries:
            yield from described(entry, descriptions, limit, count)
        for about in seen:
            if about["description"]:
                yield from standalone(about, limit, count)

    write_lines(output, sorted(records(), key=lambda entry: (entry["source"], entry["number"])))
    report = {"model": model, "images": [_line(about) for about in seen], "pictures": [_line(about) for about in found]}
    write_json(output.parent / REPORT, report)
    return report


def _line(about: dict) -> dict:
    return {name: about[name] for name in ("file", "status", "reason", "width", "height", "sha256")}


def unseen(output: Path) -> None:
    """What is left without a vision model: the records as extraction made them."""
    base = base_of(output)
    if base.is_file():
        with drafted(output) as draft:
            shutil.copyfile(base, draft)
    write_json(output.parent / REPORT, {"model": None, "images": [], "pictures": []})


def summary(report: dict) -> str:
    """The report as a table for people."""
    lines = []
    for name in ("images", "pictures"):
        counts = Counter(about["status"] for about in report[name])
        lines.append(f"{name:<9}{', '.join(f'{n:,} {status}' for status, n in sorted(counts.items())) or 'none'}")
    left = [about for name in ("images", "pictures") for about in report[name] if about["reason"]]
    if left:
        wide = min(60, max(len(about["file"]) for about in left))
        lines += ["not described:"] + [f"  {about['file']:<{wide}}  {about['reason']}" for about in left]
    return "\n".join(lines)
