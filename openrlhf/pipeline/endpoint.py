"""One client for every server that speaks OpenAI's chat protocol: OpenAI, DashScope, DeepSeek, vLLM, Ollama, llama.cpp.

Contract: `Endpoint.ask` gives an object of the shape it was asked for, or raises. Every reply is kept in the state at
once, as it came, under a key of all that it depends on (model, messages, shape, options; not the server's address), so
that no reply is ever paid twice. `Endpoint.probe` finds out, with one tiny request where all is well, whether key and
model are accepted and in which way this server takes a JSON schema. The key comes from the environment and goes into
the Authorization header, nowhere else. Knows nothing about passages and questions.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, Field

from openrlhf.pipeline.replies import Message, Meter, Shape, parse, read, schema_of
from openrlhf.pipeline.state import State, content_key

logger = logging.getLogger(__name__)

STEP = "chat"
OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"  # what a local server without a key is sent
# Ways of asking for JSON, the strictest first: OpenAI's and vLLM's, llama.cpp's, any JSON object, words alone.
MODES = ("json_schema", "json_object_with_schema", "json_object", "text")
OPTIONS = ("temperature", "seed", "max_tokens")
NO_CREDIT = ("insufficient_quota", "Arrearage")  # codes of errors: OpenAI's, DashScope's
FILTERED = ("content_filter", "data_inspection_failed", "DataInspectionFailed")
SHOWN = 300  # characters of a server's message that are shown
SHOWN_MODELS = 12
PROBE = [{"role": "user", "content": 'Reply with the JSON object {"words": ["ready"]} and nothing else.'}]
BODY_PAUSE = 1.0  # seconds, and longer each time
BODY_TRIES = 3  # for a 200 whose body is no reply; the client itself retries only by status


class EndpointError(ValueError):
    """Nothing more can be asked of this server; the message says why and what to do."""


class RequestFailed(Exception):
    """One request failed for good.

    Args:
        refused: the server read it and will refuse it again; otherwise another time may go better.
        status: of HTTP, None where there was no answer.
        filtered: it was the provider's filter, which says something of the text and nothing of the server.
    """

    def __init__(self, reason: str, refused: bool = False, status: int | None = None, filtered: bool = False):
        super().__init__(reason)
        self.refused, self.status, self.filtered = refused, status, filtered


class BadReply(Exception):
    """The model replied, but never in the shape that was asked for."""


class Probe(BaseModel):
    """What `Endpoint.probe` asks for."""

    words: list[str] = Field(min_length=1, max_length=3)  # limits as the real requests have them


def key_from_environment() -> str:
    """OPENAI_API_KEY, without white space around it.

    Raises:
        EndpointError: it is not set although BASE_URL is not either, or holds what no header can.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not os.environ.get("BASE_URL", "").strip():
        raise EndpointError(
            "OPENAI_API_KEY is not set: export it (scripts/run_data_pipeline.sh reads it from .env too). For a local "
            "server set BASE_URL instead, for example http://localhost:8000/v1"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise EndpointError("OPENAI_API_KEY holds a space, a line break or a letter that no key has: copy it again")
    return key or NO_KEY


def url_from_environment() -> str:
    """BASE_URL, or OpenAI's own.

    Raises:
        EndpointError: it is no http(s) address.
    """
    url = os.environ.get("BASE_URL", "").strip() or OPENAI_URL
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise EndpointError("BASE_URL must be an address such as https://api.openai.com/v1 or http://localhost:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


class OneAtATime:
    """`with one(key):` is for one thread at a time for each key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, list] = {}

    @contextmanager
    def __call__(self, key: str) -> Iterator[None]:
        with self._lock:
            entry = self._under_way.setdefault(key, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self._lock:
                entry[1] -= 1
                if not entry[1]:
                    del self._under_way[key]


@dataclass
class Endpoint:
    """A model behind a server. Can be pickled: the connection and the key stay behind and are taken up anew.

    Args:
        model: name the server knows it by.
        temperature, seed: passed on; a server that refuses one goes without, which is said.
        max_tokens: limit of a reply; one that is cut off is asked for again with twice as much.
        timeout: seconds that the server may be silent, before its reply and within it.
        retries: of 408, 409, 429, 5xx, time-outs and broken connections, with growing pauses or as Retry-After says.
        tries: times that a reply in the wrong shape is asked for.
        give_up_after: requests in a row that fail for good, after which nothing more is asked.
        extra: more fields for each request, such as {"enable_thinking": false}.
    """

    model: str
    temperature: float = 0.0
    seed: int = 42
    max_tokens: int = 2048
    timeout: float = 120.0
    retries: int = 6
    tries: int = 3
    give_up_after: int = 10
    extra: dict[str, Any] = field(default_factory=dict)
    mode: str = MODES[0]
    options: dict[str, str] = field(default_factory=lambda: {name: name for name in OPTIONS})

    def __post_init__(self) -> None:
        self.url = url_from_environment()
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._connection: Any = None
        self._alone = OneAtATime()
        self._failed_in_a_row = 0
        self._stopped: EndpointError | None = None

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()

    @property
    def place(self) -> str:
        """The address as it may be shown: without user, password and query."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))

    def client(self) -> Any:
        with self._lock:
            if self._connection is None:
                try:
                    import openai
                except ImportError:
                    raise EndpointError("the package openai is missing: pip install 'clara-rag[pipeline]'") from None
                self._connection = openai.OpenAI(
                    api_key=key_from_environment(), base_url=self.url, timeout=self.timeout, max_retries=self.retries
                )
            return self._connection

    def key(self, messages: list[Message], shape: type[BaseModel], max_tokens: int) -> str:
        """What a reply depends on; the server's address and the way of asking for JSON are not part of it."""
        options: dict[str, Any] = {"temperature": self.temperature, "seed": self.seed, "max_tokens": max_tokens}
        options |= {"extra": self.extra} if self.extra else {}
        return content_key("chat 1", self.model, messages, schema_of(shape), options)

    def ask(
        self,
        state: State,
        messages: list[Message],
        shape: type[Shape],
        meter: Meter,
        check: Callable[[Shape], str | None] = lambda _: None,
    ) -> Shape:
        """One object of the given shape; a reply in another shape is asked for again, with what was wrong.

        Args:
            check: what is wrong with an object although it has the shape; None where nothing is.

        Raises:
            BadReply: every reply was in another shape.
            RequestFailed: the request failed for good.
            EndpointError: nothing more can be asked of this server.
        """
        limit, asked, reason = self.max_tokens, messages, ""
        for _ in range(self.tries):
            reply = self._reply(state, asked, shape, limit, meter)
            if reply["finish"] == "content_filter":
                raise BadReply("the provider's filter held it back")
            try:
                if reply["finish"] == "length":
                    raise ValueError(f"it was cut off after {limit} tokens; be brief")
                made = parse(reply["text"], shape)
                if (wrong := check(made)) is None:
                    return made
                raise ValueError(wrong)
            except ValueError as error:
                reason = str(error)
            limit = 2 * limit if reply["finish"] == "length" else limit
            again = f"\n\nYour previous reply could not be used: {reason}. Reply again, with one JSON object alone."
            asked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + again}]
        raise BadReply(reason)

    def _reply(
        self, state: State, messages: list[Message], shape: type[BaseModel], limit: int, meter: Meter
    ) -> dict[str, Any]:
        """The raw reply, from the state or else from the server, whichever thread asks first."""
        key = self.key(messages, shape, limit)
        with self._alone(key):  # two chunks with the same text ask the same: the second waits for the first one's reply
            reply = state.get(STEP, key)
            if reply is None:
                reply = self._send_counted(messages, shape, limit)
                meter.new.add(reply)
                state.put(STEP, key, reply)
        meter.count(key, reply)
        return reply

    def _send_counted(self, messages: list[Message], shape: type[BaseModel], limit: int) -> dict:
        """Sends, and counts failures in a row; raises EndpointError for good when there are too many."""
        if self._stopped is not None:
            raise self._stopped
        try:
            reply = self._send(messages, shape, limit)
        except EndpointError as error:
            self._stopped = error
            raise
        except RequestFailed as error:
            if error.filtered:
                raise
            with self._lock:
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= self.give_up_after:  # others may be under way: the first one's words stay
                    self._stopped = self._stopped or EndpointError(
                        f"{self._failed_in_a_row} requests in a row failed at {self.place}, the last one because "
                        f"{error}. What was done is kept: see to the server, then give the same command again"
                    )
                    raise self._stopped from None
            raise
        with self._lock:
            self._failed_in_a_row = 0
        return reply

    def _send(self, messages: list[Message], shape: type[BaseModel], limit: int, retries: int | None = None) -> dict:
        client = self.client()
        import openai  # after the client, which says what to do where it is missing

        client = client if retries is None else client.with_options(max_retries=retries)
        reason = ""
        for number in range(BODY_TRIES):
            if number:
                time.sleep(number * BODY_PAUSE)
            try:
                return read(client.chat.completions.create(**self._request(messages, shape, limit)), messages)
            except openai.APIError as error:
                raise self.failure(error) from None
            except ValueError as error:
                reason = str(error)
        raise RequestFailed(f"the server's reply is not one of a chat endpoint: {reason}")

    def _request(self, messages: list[Message], shape: type[BaseModel], limit: int) -> dict[str, Any]:
        schema = schema_of(shape)
        if self.mode in ("json_object", "text"):
            told = f"\n\nThe JSON object follows this JSON schema:\n{json.dumps(schema)}"
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + told}]
        request: dict[str, Any] = {"model": self.model, "messages": messages, **self.options_taken(limit)}
        if self.mode == "json_schema":
            named = {"name": shape.__name__.lower(), "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif self.mode != "text":
            form = {"type": "json_object"}
            request["response_format"] = form | ({"schema": schema} if self.mode.endswith("schema") else {})
        return request

    def options_taken(self, limit: int) -> dict[str, Any]:
        """The options of a request, as far as this server is known to take them."""
        values = {"temperature": self.temperature, "seed": self.seed, "max_tokens": limit}
        taken = {name: values[option] for option, name in dict(self.options).items()}
        return taken | ({"extra_body": self.extra} if self.extra else {})

    def failure(self, error: Any) -> EndpointError | RequestFailed:
        """What an error of the client means."""
        import openai

        status, code = getattr(error, "status_code", None), getattr(error, "code", None)
        said = self._clean(getattr(error, "message", ""))
        if status == 401:
            return EndpointError(f"{self.place} does not accept the key in OPENAI_API_KEY (HTTP 401): see that it is "
                                 "a key of this provider and still valid")  # fmt: skip
        if status == 402 or code in NO_CREDIT:
            return EndpointError(f"the account at {self.place} has no credit left (HTTP {status}): top it up, then "
                                 "give the same command again")  # fmt: skip
        if status == 404:
            return EndpointError(self._unknown_model())
        if status in (400, 403, 413, 422):
            reason = f"the server refuses the request (HTTP {status}): {said}"
            return RequestFailed(reason, refused=True, status=status, filtered=code in FILTERED)
        if isinstance(error, openai.APITimeoutError):
            return RequestFailed(f"there was no reply within {self.timeout:g} s, {self.retries + 1} times")
        if status is None:
            return RequestFailed(f"the connection fails ({self._clean(str(error.__cause__ or error))})")
        wait = error.response.headers.get("retry-after") if status in (429, 503) else None
        asked = f"; it asks to wait {self._clean(wait)} s" if wait else ""
        return RequestFailed(f"the server answers HTTP {status} {self.retries + 1} times{asked}: {said}", status=status)

    def _clean(self, text: str) -> str:
        """A server's words on one line, shortened, without the key should they repeat it."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        text = " ".join(str(text).split())
        text = text.replace(key, "***") if len(key) > 3 else text
        return text if len(text) <= SHOWN else text[:SHOWN] + "…"

    def _unknown_model(self) -> str:
        """Why there is nothing under this address and model name."""
        import openai

        try:
            listed = self.client().with_options(max_retries=0, timeout=15).models.list()
            offered = sorted(str(model.id) for model in listed.data)
        except (openai.APIError, ValueError, AttributeError, TypeError):
            return (
                f"{self.place} knows no chat endpoint or no model {self.model} (HTTP 404): BASE_URL usually ends in "
                "/v1; see the provider's page for both"
            )
        if self.model in offered:
            return f"{self.place} lists the model {self.model} but does not give it to this key (HTTP 404)"
        shown = ", ".join(offered[:SHOWN_MODELS]) + (f" and {len(offered) - SHOWN_MODELS} more" if
                                                     len(offered) > SHOWN_MODELS else "")  # fmt: skip
        return f"the model {self.model} is not known at {self.place}, which offers: {shown or 'none'}"

    def probe(self) -> None:
        """Makes sure that key and model are accepted and finds the strictest way of asking for JSON that works.

        Raises:
            EndpointError: in one sentence that says what to do.
        """
        failure: RequestFailed | None = None
        for self.mode in MODES:
            try:
                text = self._probe_once()["text"]
            except RequestFailed as error:
                failure = error
                if error.refused or error.status in (500, 501):
                    continue
                break
            failure = None
            with suppress(ValueError):
                parse(text, Probe)
                logger.info("%s at %s answers; JSON is asked for by %s", self.model, self.place, self.mode)
                return
        if failure is None:
            logger.warning("%s does not give JSON even for a trifle: expect few usable replies", self.model)
        elif failure.status == 403:
            raise EndpointError(f"{self.place} does not let this key use the model {self.model}: {failure}")
        elif failure.refused and "not known at" in (known := self._unknown_model()):
            raise EndpointError(known)
        else:
            raise EndpointError(f"{self.place} cannot be used: {failure}")

    def _probe_once(self) -> dict[str, Any]:
        """The reply to a trifle, with the options that the server takes."""
        retries = self.retries if self.mode == MODES[-1] else 0
        for _ in range(2 * len(OPTIONS)):
            try:
                return self._send(PROBE, Probe, self.max_tokens, retries)
            except RequestFailed as error:
                if error.refused and self.adjust(str(error)):
                    continue
                if retries or error.refused or error.status in (500, 501):
                    raise
                retries = self.retries
        raise RequestFailed("the server refuses the options of the request", refused=True)

    def adjust(self, said: str) -> bool:
        """Renames or leaves out the option that a refusal names; False where it names none that is sent."""
        with self._lock:
            if "max_completion_tokens" in said and self.options["max_tokens"] == "max_tokens":
                self.options["max_tokens"] = "max_completion_tokens"
                return True
            for name in ("temperature", "seed"):
                if name in self.options and name in said:
                    del self.options[name]
                    logger.warning("%s refuses the option %s: it goes without", self.model, name)
                    return True
        return False
