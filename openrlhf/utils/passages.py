"""Cuts a text into passages that fit, at the best borders. Knows nothing about models: who asks says what fits."""

import itertools
import re
from collections.abc import Callable

# Where a long text may be cut, from the best place to the last resort; the last cuts between any two characters.
_BORDERS = (r"\n\s*\n", r"\n", r"(?<=[.!?…])[\"'”’)]*\s+|(?<=[。！？])", r"\s+", "")

_OF_LINES = _BORDERS[:2]


def passages(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Cuts a text into passages of at most `limit` tokens, each as long as it can be up to the end of a paragraph;
    inside a paragraph that is too long itself at lines, sentences, words and, at last, characters. Lines
    shorter than a quarter of a passage, as a heading is, go with the beginning of what follows. Nothing is lost but the
    space around the cuts."""

    def fits(part: str) -> bool:
        return count(part.strip()) <= limit

    def is_short(part: str) -> bool:
        return 4 * count(part.strip()) < limit

    parts = _cut(text, fits, is_short, _BORDERS)
    return [part.strip() for part in parts if part.strip()]


def _cut(
    text: str, fits: Callable[[str], bool], is_short: Callable[[str], bool], borders: tuple[str, ...]
) -> list[str]:
    """Parts that fit and together are the text."""
    if fits(text) or len(text) == 1:
        return [text]
    ends = [match.end() for match in re.finditer(borders[0], text)]
    bounds = [0, *(end for end in ends if 0 < end < len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    parts, start = [], 0
    while start < len(pieces):
        n = _longest(pieces, start, fits)
        if n:
            whole = "".join(pieces[start : start + n])
            start += n
            if start < len(pieces) and borders[0] in _OF_LINES and is_short(whole):
                pieces[start] = whole + pieces[start]  # fits no more, and is cut at the next border
            else:
                parts.append(whole)
            continue
        *full, rest = _cut(pieces[start], fits, is_short, borders[1:])
        parts += full
        # What is left of a long piece goes on with the next one.
        pieces[start] = rest
        if not full:  # a single character that does not fit
            parts.append(rest)
            start += 1
    return parts


def _longest(pieces: list[str], start: int, fits: Callable[[str], bool]) -> int:
    """How many pieces from `start` on fit together: doubling, then halving, so that long texts take few counts."""
    low, step = 0, 1
    while start + low + step <= len(pieces) and fits("".join(pieces[start : start + low + step])):
        low += step
        step *= 2
    while step > 1:
        step //= 2
        if start + low + step <= len(pieces) and fits("".join(pieces[start : start + low + step])):
            low += step
    return low
