"""What comes back from a chat endpoint: the object in a model's words, tokens, and their price.

Contract: pure functions of what is given, but for the two prices, which come from the environment. Knows nothing about
connections.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

MOST_STARTS = 64  # brackets of a reply at which an object is looked for
Message = dict[str, str]
Shape = TypeVar("Shape", bound=BaseModel)


@dataclass
class Tally:
    """Requests and tokens; `estimated` where a server told no token counts."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    estimated: bool = False

    def add(self, reply: Mapping[str, Any]) -> None:
        """Counts one reply, or another tally as a dictionary."""
        self.requests += reply.get("requests", 1)
        self.prompt += reply["prompt"]
        self.completion += reply["completion"]
        self.estimated = self.estimated or reply["estimated"]

    def cost(self) -> float | None:
        """Price by PRICE_PER_M_INPUT and PRICE_PER_M_OUTPUT, in their currency; None where they are not set."""
        prices = price()
        return None if prices is None else (self.prompt * prices[0] + self.completion * prices[1]) / 1e6


@dataclass
class Meter:
    """`all`: what the work took, whenever it was paid, each reply once. `new`: what was really sent in this run."""

    all: Tally = field(default_factory=Tally)
    new: Tally = field(default_factory=Tally)
    counted: set[str] = field(default_factory=set)

    def count(self, key: str, reply: Mapping[str, Any]) -> None:
        """Counts a reply that the work read, however often it read it."""
        if key not in self.counted:
            self.counted.add(key)
            self.all.add(reply)


def price() -> tuple[float, float] | None:
    """Prices of a million input and output tokens, from the environment; None where neither is set.

    Raises:
        ValueError: one is no number.
    """
    names = ("PRICE_PER_M_INPUT", "PRICE_PER_M_OUTPUT")
    given = [os.environ.get(name, "").strip() for name in names]
    if not any(given):
        return None
    try:
        values = [float(text or 0) for text in given]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"{' and '.join(names)} must be prices of a million tokens, such as 0.15")
    return values[0], values[1]


def estimate_tokens(text: str) -> int:
    """Tokens of a text, roughly: one for four characters, and two for three of Chinese."""
    wide = sum("\u2e80" <= character <= "\uffef" for character in text)
    return (len(text) - wide) // 4 + wide * 2 // 3 + 1


def schema_of(shape: type[BaseModel]) -> dict[str, Any]:
    """JSON schema as strict servers want it: every field required, no other allowed, no references."""
    whole = shape.model_json_schema()
    definitions = whole.pop("$defs", {})

    def strict(node: Any) -> Any:
        if isinstance(node, list):
            return [strict(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return strict(definitions[node["$ref"].rsplit("/", 1)[1]])
        node = {key: strict(value) for key, value in node.items() if key not in ("title", "description", "default")}
        if node.get("type") == "object":
            node |= {"additionalProperties": False, "required": list(node["properties"])}
        return node

    return strict(whole)


def without_thoughts(text: str) -> str:
    """A reply without what a model thought before it."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)


def parse(text: str, shape: type[Shape]) -> Shape:
    """The object in a model's reply: bare, in a code fence, among words, after thoughts, with trailing commas.

    Raises:
        ValueError: in words that a model can act on.
    """
    text = without_thoughts(text)
    reason = "it holds no JSON object"
    for candidate in (text, _without_trailing_commas(text)):
        for value in _objects(candidate):
            if isinstance(value, list) and len(shape.model_fields) == 1:
                value = {next(iter(shape.model_fields)): value}
            try:
                made = shape.model_validate(value)
                made.model_dump_json()  # half a surrogate pair is no text, and could not be stored
                return made
            except ValidationError as error:
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc'])) or 'the object'}: {first['msg']}"
            except ValueError:
                reason = "it holds a character that is none"
    raise ValueError(reason)


def _objects(text: str) -> Iterator[Any]:
    """JSON objects and lists in a text, the first ones first; what lies inside one that was found is passed over."""
    decoder, at = json.JSONDecoder(strict=False), 0
    for _ in range(MOST_STARTS):
        if (start := re.compile(r"[\[{]").search(text, at)) is None:
            return
        try:
            value, at = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
            continue
        yield value


def _without_trailing_commas(text: str) -> str:
    return re.sub(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', lambda match: match.group(1) or "", text, flags=re.DOTALL)


def read(completion: Any, messages: list[Message]) -> dict[str, Any]:
    """What is kept of a reply. Raises ValueError when it is none, whatever its status said."""
    if isinstance(completion, str):
        page = "<html" in completion[:1000].lower() or "<!doctype" in completion[:1000].lower()
        raise ValueError("it is a web page; BASE_URL usually ends in /v1" if page else "it is no JSON")
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("it holds no choices")
    text = (choices[0].message.content or "").encode("utf-8", "replace").decode("utf-8")
    usage = getattr(completion, "usage", None)
    prompt, completed = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    told = isinstance(prompt, int) and isinstance(completed, int)
    asked = "\n".join(message["content"] for message in messages)
    return {
        "text": text,
        "finish": choices[0].finish_reason,
        "prompt": prompt if told else estimate_tokens(asked),
        "completion": completed if told else estimate_tokens(text),
        "estimated": not told,
    }
