"""Private characters that hold the places of pictures in a text while it is cut. Knows nothing about documents."""

import re
from collections.abc import Callable

from openrlhf.utils.passages import passages

_FIRST, _LAST = 0xF0000, 0xFFFFD  # a plane of Unicode for private use: one character is never cut in two
MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


def mark(number: int) -> str:
    """The character that stands for a picture."""
    return chr(_FIRST + number % (_LAST - _FIRST))


def lift(prefix: str, body: str) -> tuple[str, list[dict]]:
    """Text without marks, `prefix` first, and the pictures: [{"number", "at": the mark's place in the text}]."""
    text, pictures = prefix, []
    for piece in re.split(f"({MARKS.pattern})", body):
        if MARKS.fullmatch(piece):
            pictures.append({"number": ord(piece) - _FIRST, "at": len(text)})
        else:
            text += piece.lstrip("\n") if not text or text.endswith("\n") else piece
    bare = text.strip()
    shift = len(text) - len(text.lstrip())
    return bare, [{**picture, "at": min(max(picture["at"] - shift, 0), len(bare))} for picture in pictures]


def prefix_of(headings: list[str], limit: int, count: Callable[[str], int]) -> str:
    """Headings as lines before a text: all, or the last ones that take at most half of `limit` tokens."""
    for start in range(len(headings) + 1):
        prefix = "".join(f"{heading}\n" for heading in headings[start:])
        if count(prefix) <= limit // 2:
            return prefix
    return ""


def fitted(headings: list[str], body: str, limit: int, count: Callable[[str], int]) -> list[tuple[str, list[dict]]]:
    """The text of a chunk with its headings first, in as few parts as fit; of headings that would take more than half
    of the room, the last ones.

    Args:
        body: with marks where pictures are.

    Returns:
        (text, [{"number", "at"}]) of each part.
    """
    prefix = prefix_of(headings, limit, count)
    whole = lift(prefix, body)
    if count(whole[0]) <= limit:
        return [whole]
    parts = passages(body, limit, lambda part: count(lift(prefix, part)[0]))
    return [lift(prefix, part) for part in parts]
