"""A server that takes requests as vLLM's POST /v1/completions does, and really answers them with plain transformers.

Nothing of ours generates here: the prompt is whatever tensor arrives, the models are those of an export, loaded as any
other program would load them. Fields, their types, replies and error bodies are those of vLLM 0.32 and 0.33; what vLLM
would ignore, an unknown field, is an error here.
"""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PORT = 0
"""Where stubs listen; 0 for any free port."""
_NUMBER = (int, float)
FIELDS = {
    **{"model": str, "prompt_embeds": str, "max_tokens": int, "temperature": _NUMBER, "seed": int, "stream": bool},
    **{"stop_token_ids": list, "skip_special_tokens": bool, "top_p": _NUMBER, "top_k": int, "min_p": _NUMBER},
    **{"repetition_penalty": _NUMBER, "presence_penalty": _NUMBER, "frequency_penalty": _NUMBER},
}


class Refusal(Exception):
    """What vLLM answers with an error body."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class VllmStub:
    """Runs in a thread, at `url`, until `close`.

    Attributes:
        fault: name of what goes wrong from now on, "" for nothing.
        requests: (body without its tensor, tensor) of each request that was let in.
        cancelled: set when a client went away before its answer was whole.
    """

    def __init__(self, folder: Path, models: dict[str, tuple], prompt_embeds: bool = True, key: str | None = None):
        self.models, self.prompt_embeds, self.key = models, prompt_embeds, key
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.fault, self.requests, self.refused = "", [], 0
        self.cancelled, self.go_on = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", PORT), type("Handler", (_Handler,), {"stub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @classmethod
    def of_merged(cls, export: Path, **options) -> "VllmStub":
        """As `vllm serve merged --served-model-name clara`."""
        return cls(export / "merged", {"clara": (_load(export / "merged"), None)}, **options)

    @classmethod
    def of_lora(cls, export: Path, **options) -> "VllmStub":
        """As `vllm serve base --served-model-name clara-base --lora-modules clara=decoder_adapter`."""
        tuned = PeftModel.from_pretrained(_load(export / "base"), export / "decoder_adapter").eval()
        models = {"clara-base": (_load(export / "base"), None), "clara": (tuned, "clara-base")}
        return cls(export / "base", models, **options)

    def close(self) -> None:
        """Stops listening."""
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    def admit(self, body: dict) -> tuple:
        """(model, tensor) of a request, or `Refusal` as vLLM words it."""
        if body.get("model") not in self.models:
            raise Refusal(404, "NotFoundError", f"The model `{body.get('model')}` does not exist.", "model")
        for name, value in body.items():
            kind = FIELDS.get(name)
            if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise Refusal(400, "Bad Request", f"1 validation error: body.{name}", name)
        missing = set(FIELDS) - set(body)
        if missing or not all(isinstance(i, int) for i in body["stop_token_ids"]) or body["max_tokens"] < 1:
            raise Refusal(400, "Bad Request", f"1 validation error: {sorted(missing)}")
        if not self.prompt_embeds:
            message = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            raise Refusal(400, "BadRequestError", message, "prompt_embeds")
        model = self.models[body["model"]][0]
        raw = base64.b64decode(body.pop("prompt_embeds"), validate=True)
        embeds_TD = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        if embeds_TD.layout is not torch.strided or embeds_TD.dim() != 2 or not embeds_TD.is_floating_point():
            raise Refusal(400, "BadRequestError", "`prompt_embeds` must be a 2D tensor", "prompt_embeds")
        hidden, limit = model.config.hidden_size, model.config.max_position_embeddings
        if embeds_TD.shape[1] != hidden:
            message = (
                f"`prompt_embeds` hidden_size {embeds_TD.shape[1]} does not match the model's hidden_size {hidden}."
            )
            raise Refusal(400, "BadRequestError", message, "prompt_embeds")
        if len(embeds_TD) + body["max_tokens"] > limit:
            raise Refusal(400, "BadRequestError", f"This model's maximum context length is {limit} tokens.")
        self.requests.append((body, embeds_TD))
        return model, embeds_TD.to(model.dtype)

    def generate(self, model, embeds_TD: torch.Tensor, body: dict, step=lambda ids: None) -> list[int]:
        """New token ids; `step` is called with all so far, as each comes."""
        eos = model.generation_config.eos_token_id
        stops = {*body["stop_token_ids"], *(eos if isinstance(eos, list) else [eos])} - {None}
        streamer = _Steps(step)
        torch.manual_seed(body["seed"])
        sampled = {"do_sample": True, "temperature": body["temperature"], "top_k": 0, "top_p": 1.0}
        model.generate(
            inputs_embeds=embeds_TD[None],
            attention_mask=torch.ones(1, len(embeds_TD), dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            eos_token_id=sorted(stops),
            pad_token_id=min(stops),
            streamer=streamer,
            **(sampled if body["temperature"] > 0 else {"do_sample": False}),
        )
        return [token for token in streamer.ids if token not in stops]

    def spell(self, ids: list[int]) -> str:
        """Text of ids, without a character that is not whole yet."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


class _Steps:
    """What transformers' `generate` calls with each new token."""

    def __init__(self, step):
        self.ids, self.step = [], step

    def put(self, value: torch.Tensor) -> None:
        new = value.flatten().tolist()
        self.ids += new
        if new:
            self.step(self.ids)

    def end(self) -> None:
        pass


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class _Handler(BaseHTTPRequestHandler):
    stub: VllmStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Silent."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(503 if self.stub.fault == "unhealthy" else 200, b"")
        elif self._is_let_in():
            cards = [
                {"id": name, "object": "model", "parent": parent} for name, (_, parent) in self.stub.models.items()
            ]
            self._json(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        fault = self.stub.fault
        if fault == "500":
            return self._json(
                500, {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
            )
        if fault == "html":
            return self._reply(502, b"<html>Bad Gateway</html>")
        if fault == "not json":
            return self._reply(200, b"data: <html>\n\n", "text/event-stream")
        if fault == "silent":
            self.stub.go_on.wait(60)
            return None
        try:
            model, embeds_TD = self.stub.admit(body)
        except Refusal as refusal:
            self.stub.refused += 1
            return self._json(refusal.status, refusal.body)
        return self._stream(model, embeds_TD, body) if body["stream"] else self._whole(model, embeds_TD, body)

    def _whole(self, model, embeds_TD: torch.Tensor, body: dict) -> None:
        text = self.stub.spell(self.stub.generate(model, embeds_TD, body))
        self._json(200, {**self._head(body), "choices": [_choice(text, "stop")], "usage": {"prompt_tokens": 1}})

    def _stream(self, model, embeds_TD: torch.Tensor, body: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = ""

        def step(ids: list[int]) -> None:
            nonlocal sent
            text = self.stub.spell(ids)
            if len(text) > len(sent):
                self._event({**self._head(body), "choices": [_choice(text[len(sent) :], None)]})
                sent = text
                self._go_wrong()

        self.close_connection = True
        try:
            text = self.stub.spell(self.stub.generate(model, embeds_TD, body, step))
            rest = text[len(sent) :] if text.startswith(sent) else ""
            self._event({**self._head(body), "choices": [_choice(rest, "stop")]})
            self._chunk(b": keep-alive\n\ndata: [DONE]\n\n")
            self._chunk(b"")
        except ConnectionError:
            self.stub.cancelled.set()

    def _go_wrong(self) -> None:
        """After a piece was sent."""
        fault = self.stub.fault
        if fault == "drop":
            raise ConnectionResetError
        if fault == "slow":
            time.sleep(0.05)
        if fault == "error event":
            self._event({"error": {"message": "out of blocks", "type": "InternalServerError", "code": 500}})
        if fault == "abort":
            self._event({"id": "cmpl-1", "choices": [_choice("", "abort")]})
        if fault == "stuck":
            self.stub.go_on.wait(60)

    def _is_let_in(self) -> bool:
        if self.stub.key is None or self.headers.get("Authorization") == f"Bearer {self.stub.key}":
            return True
        self._json(401, {"error": "Unauthorized"})
        return False

    def _head(self, body: dict) -> dict:
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}

    def _event(self, value: dict) -> None:
        self._chunk(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict) -> None:
        self._reply(status, json.dumps(value).encode(), "application/json")

    def _reply(self, status: int, data: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _choice(text: str, reason: str | None) -> dict:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
