"""Answers written by a vLLM server: prompts go there as embeddings, text comes back.

Contract: `submit` as in `engines.Engine`. The prompt's embeddings, memory vectors in place, are made here by
`CLaRa.place`; the server has the base model with the generator (`python -m openrlhf.cli.export_vllm`) and needs neither
memory tokens nor documents. Every setting that an answer depends on is sent, so that no default of the server counts.
Knows nothing about what runs the requests that come to us.
"""

import base64
import io
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.tokens import Prompt
from openrlhf.rag.master import Prepared
from openrlhf.serving.engines import EngineError, Pieces

logger = logging.getLogger(__name__)

WHOLE_BYTES, ERROR_BYTES = 16 * 2**20, 64 * 2**10
"""Read at most of an answer that comes in one reply, and of an error."""
KEY_VARIABLE = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before each further try to reach the server."""
# What vLLM would otherwise take from the base model's generation_config.json.
_PLAIN_SAMPLING = {
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}


class VllmEngine:
    """Sends prepared prompts to a vLLM server.

    Args:
        clara: makes the embeddings; the checkpoint that the server's model was exported from.
        url: of the server, such as http://127.0.0.1:8000.
        model: name under which the server has the generator: the LoRA's, or the merged model's.
        timeout: seconds that the server may say nothing, in the queue or between two tokens.

    The API key is taken from the environment's VLLM_API_KEY. The server is asked whether it can do what is needed, with
    an answer of one token, before this object exists.

    Raises:
        ValueError: `url` is not one of a server.
        EngineError: the server is not there, has no such model, or does not take prompt embeddings of this model.
    """

    def __init__(self, clara: CLaRa, url: str, model: str, timeout: float = 120.0):
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host or address.userinfo or address.query:
            raise ValueError(
                "the address of the vLLM server must be like http://127.0.0.1:8000; a key goes into the environment "
                f"variable {KEY_VARIABLE}"
            )
        self.clara, self.url, self.model = clara, url.rstrip("/").removesuffix("/v1"), model
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):  # httpx would name it in its error
            raise ValueError(f"{KEY_VARIABLE} holds characters that no key has: set it again")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            # A connection each: closing it is what cancels, and none is found closed by the server.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self._base_model: str | None = None
        try:
            self._check_server()
        except EngineError:
            self.close()
            raise

    def close(self) -> None:
        """Gives up all connections."""
        self._client.close()

    def submit(self, prepared: Prepared, max_new_tokens: int, temperature: float, seed: int) -> Pieces:
        """See `engines.Engine`. The request leaves with the first piece asked for.

        Draws are the server's: above temperature 0 an answer is another than `RAGMaster`'s with the same seed.
        """
        return _Answer(self, self._request(prepared, max_new_tokens, temperature, seed))

    def answer(self, prepared: Prepared, max_new_tokens: int, temperature: float, seed: int) -> str:
        """The whole answer in one reply, for batch work: nothing is sent while it is written.

        Raises:
            EngineError: as in `submit`.
        """
        body = self._request(prepared, max_new_tokens, temperature, seed)
        with self._post({**body, "stream": False}, threading.Event()) as response:
            return _text(self._json(_start_of(response, WHOLE_BYTES))).strip()

    def _check_server(self) -> None:
        self._get("/health")
        models = self._json(self._get("/v1/models"))
        try:
            parents = {card["id"]: card.get("parent") for card in models["data"]}
        except (KeyError, TypeError, AttributeError):
            raise EngineError(f"{self.url}/v1/models does not answer as vLLM does: is it a vLLM server?") from None
        if self.model not in parents:
            raise EngineError(
                f"the vLLM server has no model {self.model!r}, only {', '.join(map(repr, parents))}: name one of them, "
                "or start vLLM with --lora-modules NAME=…/decoder_adapter, or with --served-model-name"
            )
        self._base_model = parents[self.model]
        stop = self.clara.stop_ids()[:1]
        self.answer(Prepared(prompt=Prompt(stop * 2, 2)), 1, 0.0, 0)

    def _request(self, prepared: Prepared, max_new_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        """The body of POST /v1/completions."""
        assert prepared.prompt is not None, "a refusal is not to be generated"
        model = self.model
        if prepared.adapter is None and self._base_model is not None:
            model = self._base_model
        elif prepared.adapter is None:
            raise EngineError(
                f"this answer is to be the base model's own, and the vLLM server has {self.model!r} alone: start it "
                "with the base model and the generator as a LoRA over it"
            )
        return {
            "model": model,
            "prompt_embeds": encode(self.embeddings(prepared)),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop_token_ids": self.clara.stop_ids(),
            "skip_special_tokens": True,
            **_PLAIN_SAMPLING,
        }

    def embeddings(self, prepared: Prepared) -> torch.Tensor:
        """What the generator reads, `[T, D]` in the model's dtype: embeddings of the prompt's tokens, memory vectors in
        place.

        Raises:
            ValueError: the documents are not those that the prompt has memory tokens for.
        """
        clara = self.clara
        docs_KLD = prepared.docs_KLD
        if docs_KLD is None:
            docs_KLD = torch.empty(0, clara.config.n_memory_tokens, clara.decoder.config.hidden_size)
        ids_1T = torch.tensor([prepared.prompt.ids], device=clara.device)  # type: ignore[union-attr]
        with torch.no_grad():
            return clara.place(ids_1T, docs_KLD.to(clara.device), torch.tensor([len(docs_KLD)]))[0]

    def _stream(
        self, body: dict[str, Any], closed: threading.Event, opened: Callable[[httpx.Response], None]
    ) -> Generator[str, None, None]:
        """The text of one request, without the white space around it, as it comes."""
        held, started = "", False
        with self._post({**body, "stream": True}, closed) as response:
            opened(response)
            if closed.is_set():
                return
            for data in _events(response):
                if data == b"[DONE]":
                    return
                text = held + _text(self._json(data))
                text = text if started else text.lstrip()
                ready = text.rstrip()  # white space may be the end of it all
                held = text[len(ready) :]
                if ready:
                    started = True
                    yield ready
        raise EngineError("the vLLM server broke the answer off")

    @contextmanager
    def _post(self, body: dict[str, Any], closed: threading.Event) -> Iterator[httpx.Response]:
        """The open reply to POST /v1/completions; what goes wrong until it is closed becomes an EngineError."""
        request = self._client.build_request("POST", f"{self.url}/v1/completions", json=body)
        with self._in_words():
            response = self._reach(request, closed)
            try:
                self._check_status(response)
                yield response
            finally:
                response.close()

    def _get(self, path: str) -> bytes:
        with self._in_words():
            response = self._reach(self._client.build_request("GET", f"{self.url}{path}"), threading.Event())
            try:
                self._check_status(response)
                return _start_of(response, WHOLE_BYTES)
            finally:
                response.close()

    def _reach(self, request: httpx.Request, closed: threading.Event) -> httpx.Response:
        """Sends a request, again where no connection comes about: nothing has reached the server then."""
        for pause in PAUSES:
            try:
                return self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                logger.warning("the vLLM server at %s cannot be reached (%s); trying again", self.url, error)
                if closed.wait(pause):
                    break
        return self._client.send(request, stream=True)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise EngineError(f"the vLLM server at {self.url} cannot be reached ({error}): is it running?") from error
        except httpx.TimeoutException as error:
            seconds = self._client.timeout.read
            raise EngineError(f"the vLLM server at {self.url} said nothing for {seconds:g} seconds") from error
        except httpx.TransportError as error:
            raise EngineError(f"the connection to the vLLM server at {self.url} broke ({error})") from error

    def _check_status(self, response: httpx.Response) -> None:
        """Raises EngineError, with what to do where that is known, unless the reply is 200."""
        code = response.status_code
        if code == 200:
            return
        said = _message(_start_of(response, ERROR_BYTES))
        if code in (401, 403):
            what = f"does not accept the key: set {KEY_VARIABLE} to the one that it was started with"
        elif "enable-prompt-embeds" in said:
            what = "was started without --enable-prompt-embeds: start it again with it"
        elif code == 404:
            what = f"has no such model or address ({said}): compare its /v1/models"
        elif code == 400:
            what = f"refuses the request: {said}"
        else:
            what = f"failed with status {code}: {said}"
        raise EngineError(f"the vLLM server at {self.url} {what}")

    def _json(self, data: bytes) -> dict[str, Any]:
        """Raises EngineError where `data` is not a JSON object, or is one that tells of an error."""
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EngineError(f"{self.url} does not answer as a vLLM server: {data[:80]!r}")
        if value.get("error") is not None:
            raise EngineError(f"the vLLM server gave up: {_message(data)}")
        return value


class _Answer:
    """`Pieces` of one request to the server."""

    def __init__(self, engine: VllmEngine, body: dict[str, Any]):
        self._closed = threading.Event()
        self._opened: list[httpx.Response] = []
        self._reading = threading.Lock()
        self._pieces = engine._stream(body, self._closed, self._opened.append)

    def __iter__(self) -> "_Answer":
        return self

    def __next__(self) -> str:
        with self._reading:
            if self._closed.is_set():
                self._pieces.close()
            try:
                return next(self._pieces)
            except EngineError:
                if self._closed.is_set():  # that is what broke the connection
                    raise StopIteration from None
                raise

    def close(self) -> None:
        """See `engines.Pieces.close`: closing the connection is what cancels a request."""
        self._closed.set()
        if self._reading.acquire(blocking=False):
            try:
                self._pieces.close()
            finally:
                self._reading.release()
        for response in self._opened:  # another thread may wait for the next piece: wake it
            with suppress(OSError, KeyError):
                response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def encode(embeds_TD: torch.Tensor) -> str:
    """A dense tensor `[T, D]` as the field `prompt_embeds` has it: base64 of what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(embeds_TD.detach().cpu().clone(), buffer)  # a view would be written with all that it is a view of
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _events(response: httpx.Response) -> Iterator[bytes]:
    """The data of each server-sent event.

    Lines end at line feeds only: httpx's own line iterator also cuts at characters such as U+2028, which JSON texts may
    hold.
    """
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _start_of(response: httpx.Response, limit: int) -> bytes:
    """The body, at most `limit` bytes of it."""
    data = b""
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= limit:
            break
    return data[:limit]


def _text(reply: dict[str, Any]) -> str:
    """The text of a completion or of a part of one; a part may have none.

    Raises:
        EngineError: it has another shape, or the server gave the request up.
    """
    try:
        choices = reply["choices"]
        text = "".join(choice["text"] or "" for choice in choices)
        ended = {choice.get("finish_reason") for choice in choices}
    except (KeyError, TypeError, AttributeError):
        raise EngineError(f"the vLLM server's reply has no text: {str(reply)[:80]}") from None
    if ended & {"abort", "error"}:
        raise EngineError("the vLLM server gave the request up")
    return text


def _message(data: bytes) -> str:
    """What an error's body says, in its several shapes."""
    try:
        said = json.loads(data)
        said = said.get("error", said)
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        said = data.decode("utf-8", errors="replace")
    return " ".join(str(said).split())[:300] or "no reason given"
