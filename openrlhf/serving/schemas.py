"""What the server takes: bodies in OpenAI's format, checked, and what is wrong with one in words.

Contract: a field that would change the answer in a way that the server does not know is refused; one that would not is
passed over. Knows nothing about models or answers.
"""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

# Of one message or text; a prompt that is too long for the model is refused by its tokens.
MAX_CHARACTERS = 100_000
MAX_MESSAGES, MAX_INPUTS, MAX_RERANKED, MAX_STOPS, PAGE = 1000, 256, 1000, 4, 1000
# Fields that would change an answer, each with the values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "n": (1,), "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "top_k": (-1, 0),
    "min_p": (0,), "repetition_penalty": (1,), "guided_json": (), "guided_regex": (),
}  # fmt: skip


class BadRequest(ValueError):
    """A body that cannot be used: the status it gets, and the field that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    @model_validator(mode="after")
    def _refuse_what_is_not_known(self) -> Any:
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                said = "{name} is not supported here"
                if NEUTRAL[name]:
                    said += ": leave it out, or give {neutral}"
                raise PydanticCustomError(
                    "unsupported", said, {"name": name, "neutral": json.dumps(NEUTRAL[name][0]), "param": name}
                )
        return self


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES)]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None


class Chat(_Body):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None

    def turns(self) -> tuple[str, list[tuple[str, str]], str]:
        """The question, what was asked and answered before it, and the system messages as one text.

        Messages of one side that follow each other are one; what the assistant says before any question is passed
        over.

        Raises:
            BadRequest: the last message is not a question.
        """
        instructions = "\n".join(m.text for m in self.messages if m.role in ("system", "developer") and m.text.strip())
        spoken = [message for message in self.messages if message.role in ("user", "assistant")]
        if not spoken or spoken[-1].role != "user":
            raise BadRequest("the last message must be the user's: there is no question to answer", "messages")
        turns: list[tuple[list[str], list[str]]] = []
        for message in spoken:
            if message.role == "user":
                if not turns or turns[-1][1]:
                    turns.append(([], []))
                turns[-1][0].append(message.text)
            elif turns:
                turns[-1][1].append(message.text)
        question = "\n".join(turns.pop()[0])
        if not question.strip():
            raise BadRequest("the last message is empty: there is no question to answer", "messages")
        return question, [("\n".join(asked), "\n".join(answered)) for asked, answered in turns], instructions

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class Embed(_Body):
    """The body of POST /v1/embeddings; `input_type` says which of the model's two sides encodes."""

    model: str
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    input_type: Literal["query", "document"] = "query"
    dimensions: int | None = None


class Listed(BaseModel):
    """A document to rerank, as an object."""

    text: Text


class Rerank(_Body):
    """The body of POST /rerank."""

    model: str | None = None
    query: Text
    documents: list[Text | Listed] = Field(min_length=1, max_length=MAX_RERANKED)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Upload(BaseModel):
    """The body of POST /v1/documents; what a document must be is checked where corpora are read."""

    documents: list[dict] = Field(min_length=1)


# Of an error's place, what is a field and not the name of a type among alternatives.
_FIELD = re.compile("(?!str$)[a-z][a-z_]*")
Kind = TypeVar("Kind", bound=BaseModel)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A body as an object of this kind.

    Raises:
        BadRequest: what is wrong with it, in one sentence.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise BadRequest(f"the body is not JSON: {found[0]['ctx']['error']}") from None
        # Of a field's alternatives, each of which complains, the one that was meant: not another type, or the deepest.
        own = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
        meant = max(own, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
        if meant["type"] == "unsupported":
            raise BadRequest(meant["msg"], meant["ctx"]["param"], code="unsupported_parameter") from None
        place = ".".join(str(part) for part in meant["loc"] if isinstance(part, int) or _FIELD.fullmatch(part))
        raise BadRequest(f"{place or 'the body'}: {meant['msg']}", place or None) from None
