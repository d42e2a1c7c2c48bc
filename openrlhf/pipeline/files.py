"""Output files: a file is replaced whole, and only where its content is another. Knows nothing about what they hold."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def same(one: Path, other: Path) -> bool:
    """Whether both files are there and hold the same bytes."""
    if not one.is_file() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as a, open(other, "rb") as b:
        while block := a.read(1 << 20):
            if block != b.read(1 << 20):
                return False
    return True


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A draft to write; it takes the place of `path` at the end unless that holds the same bytes. Nothing is left of it
    where an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    try:
        yield draft
        if not same(draft, path):
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """See `drafted`."""
    with drafted(path) as draft:
        draft.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Readable JSON; see `drafted`."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSON lines, written as they come; see `drafted`."""
    with drafted(path) as draft, open(draft, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.close()


def read_lines(path: Path) -> Iterator[dict]:
    """The records of a JSON-lines file.

    Raises:
        ValueError: a line is no JSON object, with its number.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is no JSON object: make the file anew by the step before")
            yield record
