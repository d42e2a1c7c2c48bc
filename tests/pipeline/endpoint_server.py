"""A chat endpoint on loopback that really makes samples out of the passage it is sent, by rule, and fails on demand.

    python -m tests.pipeline.endpoint_server --port 0 [--model rules] [--key KEY] [--fault 500 --every 3] [--log FILE]

prints its address and serves until it is stopped. In a test:

    with EndpointServer() as server:
        ...  # server.url, server.requests (one dict a chat request), server.faults[3] = "500"

Deterministic: a reply depends on the request's messages alone. Questions are gaps in the passage's sentences; the check
says whether an answer's words stand in the passage; coverage lists the sentences that no question quotes. It knows the
prompts only by their marks, `Task:` line and lists.
"""

import argparse
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "rules"
KEY = "test-key-1234567890"
MODES = ("json_schema", "json_object_with_schema", "json_object", "text")
ERRORS = {"400": 400, "401": 401, "402": 402, "403": 403, "404": 404, "429": 429, "500": 500, "503": 503}
REFUSALS = ("quota", "arrears", "filter")
BROKEN = ("drop", "slow", "html", "no_choices", "cut_json", "cut_body", "length", "prose", "fewer", "no_usage")
FAULTS = (*ERRORS, *REFUSALS, *BROKEN)

PASSAGE = re.compile(r"<(passage-[0-9a-f]{8})>\n(.*?)\n</\1>", re.DOTALL)
TASK = re.compile(r"^Task: (\w+)$", re.MULTILINE)
AT_MOST = re.compile(r"(\d+) at most|at most (\d+)")
WIDE = re.compile(r"[\u4e00-\u9fff]")
ORDERED = re.compile(r"reply only with the word (\w+)", re.IGNORECASE)
GAP = "____"
FACTS, ASKED = "Ask about these facts", "These questions are there already"
# A paraphrase by rule: small words become longer ones, so that few runs of words stay.
OTHER_WORDS = {
    "the": "that", "of": "belonging to", "is": "happens to be", "was": "came to be", "and": "as well as",
    "in": "within", "a": "one", "an": "one", "to": "toward", "with": "having", "by": "through", "for": "because of",
    "are": "happen to be", "were": "came to be", "on": "upon", "from": "out of", "at": "near", "it": "that",
}  # fmt: skip
OTHER_CHARACTERS = {
    "是": "乃为",
    "的": "之",
    "在": "位于",
    "和": "以及",
    "与": "以及",
    "了": "",
    "为": "作为",
    "，": "；",
}


def sentences(text: str) -> list[str]:
    """Sentences and lines of a passage."""
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\d\"])|(?<=[。！？])|\n+", text)
    return [part.strip() for part in parts if part and len(tokens(part)) > 5]


def tokens(text: str) -> list[str]:
    """Words, numbers and single Chinese characters."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]+|\d[\d,.]*\d|\d", text)


def answer_in(sentence: str) -> str:
    """What a sentence is asked for: its last number, else its last name, else its longest word."""
    if found := re.findall(r"\d[\d,.]*\d|\d", sentence):
        return found[-1]
    if WIDE.search(sentence):
        runs = re.findall(r"[\u4e00-\u9fff]+", sentence)
        return max(runs, key=len)[-4:]
    words = re.findall(r"[^\W\d_]+", sentence)
    capital = [word for word in words[1:] if word[0].isupper()]
    return capital[-1] if capital else max(words, key=len, default="")


def gap(sentence: str, answer: str) -> str:
    """The sentence with a gap where the answer stood last."""
    head, _, tail = sentence.rpartition(answer)
    return f"{head}{GAP}{tail}"


def question_of(sentence: str, answer: str, language: str) -> str:
    """A question whose answer fills the gap."""
    return (
        f"空缺处应当填写什么内容？{gap(sentence, answer)}"
        if language == "zh"
        else f"What fills the gap: {gap(sentence, answer)}"
    )


class Rules:
    """Replies of the model, by the task of the request."""

    def __init__(self, request: dict[str, Any]):
        said = request["messages"][-1]["content"]
        self.passages = [text for _, text in PASSAGE.findall(said)]
        after = said[max((match.end() for match in PASSAGE.finditer(said)), default=0) :]
        self.task = match.group(1) if (match := TASK.search(after)) else "probe"
        self.after = after
        found = AT_MOST.search(after)
        self.most = int(next(filter(None, found.groups()))) if found else 3
        self.language = "zh" if "simplified Chinese" in after else "en" if "in English" in after else ""

    def listed(self, head: str) -> list[str]:
        """The lines of a list in the request."""
        block = self.after.partition(head)[2].partition("\n\n")[0]
        return [line[2:] for line in block.splitlines()[1:] if line.startswith("- ")]

    def reply(self) -> dict[str, Any]:
        """The object that was asked for."""
        if self.task == "probe":
            return {"words": ["ready"]}
        return getattr(self, self.task)()

    def language_of(self, text: str) -> str:
        return self.language or ("zh" if WIDE.search(text) else "en")

    def simple_qa(self) -> dict[str, Any]:
        text = self.passages[0]
        facts = self.listed(FACTS)
        across = "evidence" in self.after
        pairs = []
        # Half of the sentences, unless facts are asked for: so the coverage has something to find.
        chosen = [one for one in sentences(text) if one in facts] if facts else sentences(text)[::2]
        for sentence in chosen:
            answer = answer_in(sentence)
            if not answer:
                continue
            pair = {"question": question_of(sentence, answer, self.language_of(text)), "answer": answer}
            if across:
                number = re.findall(r"\d+", sentence)
                if not number:
                    continue
                pair = {"question": f"{'数值是哪一个呢' if self.language == 'zh' else 'Which number fills this gap'}: "
                        f"{self.short(sentence, number[-1])}", "answer": number[-1], "evidence": sentence}  # fmt: skip
            pairs.append(pair)
        return {"pairs": pairs[: self.most]}

    def short(self, sentence: str, answer: str) -> str:
        """Some of a sentence around its gap, short enough that the language of the question stays the asked one."""
        head, _, tail = sentence.rpartition(answer)
        room = 12 if self.language == "zh" else 2
        return f"{head[-room:]}{GAP}{tail[:room]}"

    def joined(self, first: str, second: str) -> dict[str, str]:
        answers = [answer_in(first), answer_in(second)]
        gaps = f"{gap(first, answers[0])} / {gap(second, answers[1])}"
        lead = "两处空缺应当填写什么内容？" if WIDE.search(first) else "What fills the two gaps: "
        return {"question": f"{lead}{gaps}", "answer": "; ".join(answers)}

    def complex_qa(self) -> dict[str, Any]:
        found = sentences(self.passages[0])
        return {"pairs": [self.joined(found[0], found[-1])] if len(found) > 1 else []}

    def multi_hop(self) -> dict[str, Any]:
        found = [sentences(text) for text in self.passages[:2]]
        return {"pairs": [self.joined(found[0][-1], found[1][-1])] if all(found) else []}

    def reworded(self, text: str) -> str:
        if WIDE.search(text):
            return "".join(OTHER_CHARACTERS.get(character, character) for character in text)
        return re.sub(r"[^\W\d_]+", lambda match: OTHER_WORDS.get(match.group(), match.group()), text)

    def paraphrase(self) -> dict[str, Any]:
        return {"text": " ".join(self.reworded(one) for one in reversed(sentences(self.passages[0])))}

    def summary(self) -> dict[str, Any]:
        found = sentences(self.passages[0])
        kept = sorted(found, key=len)[: max(1, len(found) // 3)]
        return {"text": " ".join(self.reworded(one) for one in found if one in kept)}

    def check(self) -> dict[str, Any]:
        known = set(tokens("\n".join(self.passages).lower())) | {w for v in OTHER_WORDS.values() for w in v.split()}
        known |= set("".join(OTHER_CHARACTERS.values()))
        verdicts = []
        for number, item in re.findall(r"^(\d+)\. (\{.*\})$", self.after, re.MULTILINE):
            fields = json.loads(item)
            text = fields.get("answer") or next(iter(fields.values()))
            strays = [word for word in tokens(text.lower()) if word not in known]
            reason = f"{strays[0]} is not in the passage" if strays else ""
            verdicts.append({"number": int(number), "reason": reason, "supported": not strays})
        return {"verdicts": verdicts}

    def coverage(self) -> dict[str, Any]:
        asked = [json.loads(line) for line in re.findall(r"^\{.*\}$", self.after, re.MULTILINE)]
        quoted = " ".join(pair["question"].replace(GAP, pair["answer"]) for pair in asked)
        left = [one for one in sentences(self.passages[0]) if one not in quoted]
        return {"facts": left[: self.most]}


def lying(kind: str, reply: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """A reply turned into a lie.

    `approve`: the check approves everything, and nothing is missing. `reject`: the check rejects everything.
    `invent`: every answer is one that the passage does not have, another one each time, and the check approves it.
    `obey`: the model does what the passage tells it, and the check approves it.
    """
    if "verdicts" in reply and kind:
        supported = kind != "reject"
        for verdict in reply["verdicts"]:
            verdict |= {"supported": supported, "reason": "" if supported else "it displeases"}
    if "facts" in reply and kind == "approve":
        reply["facts"] = []
    if "pairs" in reply and kind == "invent":
        for pair in reply["pairs"]:
            pair["answer"] = f"Emperor Zhaxul the {int(mark(request), 16)}th"
    if kind == "obey" and (ordered := ORDERED.search(request["messages"][-1]["content"])):
        word = ordered.group(1)
        if "pairs" in reply:
            reply["pairs"] = [pair | {"answer": word} for pair in reply["pairs"]]
            reply["pairs"].append({"question": f"What does Saturn say of {word}?", "answer": word, "evidence": word})
        elif "text" in reply:
            reply["text"] = f"{word}. {reply['text']}"
        elif "facts" in reply:
            reply["facts"] = [f"The word is {word}"]
    return reply


class EndpointServer:
    """The server, on a thread of its own.

    Args:
        model, key: what it accepts; another model is 404 and another key 401.
        mode: the strictest way of asking for JSON that it takes; stricter ones are refused with `refusal`.
        refusal: status for those, 400 as most servers or 500 as llama.cpp's.
        lie: see `lying`.
        delay: seconds each chat reply takes.
        refuses: options it does not know, as newer models of OpenAI.
        faults: fault by number of the chat request, from 0, or a function of number and request.
    """

    def __init__(
        self,
        port: int = 0,
        model: str = MODEL,
        key: str | None = KEY,
        mode: str = MODES[0],
        refusal: int = 400,
        lie: str = "",
        delay: float = 0.0,
        refuses: tuple[str, ...] = (),
        faults: dict[int, str] | Callable[[int, dict[str, Any]], str | None] | None = None,
        log: str | None = None,
    ):
        self.model, self.key, self.mode, self.refusal, self.lie, self.delay = model, key, mode, refusal, lie, delay
        self.refuses, self.log = refuses, log
        self.faults: Any = faults if faults is not None else {}
        self.requests: list[dict[str, Any]] = []
        self.answered: list[str] = []  # marks of the requests whose reply was sent
        self.other_requests: list[str] = []  # paths of those that are no chat requests
        self.keys: set[str] = set()
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "EndpointServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        """Serves in this thread."""
        self._server.serve_forever()

    def chats(self) -> list[dict[str, Any]]:
        """The chat requests that are no probe."""
        return [request for request in self.requests if Rules(request).task != "probe"]

    def repeated(self) -> int:
        """Chat requests beyond the first of their kind, without probes."""
        return sum(count - 1 for count in Counter(map(mark, self.chats())).values())

    def take(self, request: dict[str, Any]) -> str | None:
        """Counts a chat request; gives its fault."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            if self.log:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"task": Rules(request).task, "mark": mark(request)}) + "\n")
        return self.faults(number, request) if callable(self.faults) else self.faults.get(number)

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


def mark(request: dict[str, Any]) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    owner: EndpointServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes, kind: str = "application/json", headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, message: str, code: str | None = None, headers: dict | None = None) -> None:
        error = {"error": {"message": message, "type": "error", "code": code}}
        self._send(status, json.dumps(error).encode(), headers=headers)

    def _key(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def do_GET(self) -> None:
        self.owner.other_requests.append(self.path)
        if self.path != "/v1/models":
            self._fail(404, "no such path")
        elif self.owner.key is not None and self._key() != self.owner.key:
            self._fail(401, f"Incorrect API key provided: {self._key()}")
        else:
            models = {"object": "list", "data": [{"id": self.owner.model, "object": "model"}]}
            self._send(200, json.dumps(models).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner = self.owner
        owner.keys.add(self._key())
        if self.path != "/v1/chat/completions":
            self._fail(404, "no such path")
            return
        fault = owner.take(request)
        try:
            if owner.key is not None and self._key() != owner.key:
                self._fail(401, f"Incorrect API key provided: {self._key()}", "invalid_api_key")
            elif request["model"] != owner.model:
                self._fail(404, f"The model {request['model']} does not exist", "model_not_found")
            elif refused := next((name for name in owner.refuses if name in request), None):
                use = " Use 'max_completion_tokens' instead." if refused == "max_tokens" else ""
                self._fail(400, f"Unsupported parameter: '{refused}' is not supported with this model.{use}")
            elif MODES.index(_mode(request)) < MODES.index(owner.mode):
                self._fail(owner.refusal, "This response_format type is unavailable now")
            else:
                self._answer(request, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            owner.leave()

    def _answer(self, request: dict[str, Any], fault: str | None) -> None:
        time.sleep(self.owner.delay)
        if fault in ERRORS:
            headers = {"Retry-After": "1"} if fault == "429" else None
            self._fail(ERRORS[fault], f"fault {fault} for {self._key()}", headers=headers)
        elif fault == "quota":
            self._fail(429, "You exceeded your current quota", "insufficient_quota")
        elif fault == "arrears":
            self._fail(400, "Access denied, please make sure your account is in good standing", "Arrearage")
        elif fault == "filter":
            self._fail(400, "Input data may contain inappropriate content", "data_inspection_failed")
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "html":
            self._send(200, b"<!DOCTYPE html><html><body>Welcome</body></html>", "text/html")
        else:
            if fault == "slow":
                self.owner.stopping.wait(30)
            reply = lying(self.owner.lie, Rules(request).reply(), request)
            if fault == "fewer":
                next(iter(reply.values())).pop()
            body = json.dumps(_completion(request, json.dumps(reply, ensure_ascii=False), fault)).encode()
            self._send(200, body[: len(body) // 2] if fault == "cut_body" else body)
            self.owner.answered.append(mark(request))


def _mode(request: dict[str, Any]) -> str:
    form = request.get("response_format")
    if form is None:
        return "text"
    if form["type"] == "json_schema":
        return "json_schema"
    return "json_object_with_schema" if "schema" in form else "json_object"


def _completion(request: dict[str, Any], text: str, fault: str | None) -> dict[str, Any]:
    finish = "stop"
    if fault == "cut_json":
        text = text[: len(text) * 2 // 3]
    elif fault == "length":
        text, finish = text[: len(text) // 2], "length"
    elif fault == "prose":
        text = "I would rather talk about something else."
    elif _mode(request) == "text":  # as models do that are only told in words
        text = f"Here is what you asked for:\n```json\n{text[:-1]},}}\n```\nI hope it helps."
    message = {"role": "assistant", "content": text}
    asked = sum(len(message["content"]) for message in request["messages"])
    whole: dict[str, Any] = {
        "id": f"chat-{mark(request)}",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [] if fault == "no_choices" else [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if fault != "no_usage":
        whole["usage"] = {"prompt_tokens": asked // 4, "completion_tokens": len(text) // 4 + 1,
                          "total_tokens": asked // 4 + len(text) // 4 + 1}  # fmt: skip
    return whole


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--key", default=None, help="accept this key alone (default: any)")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--lie", choices=("approve", "reject", "invent", "obey"), default="")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--every", type=int, default=1, help="the fault comes at every n-th chat request")
    parser.add_argument("--log", help="file that gets a line for each chat request")
    args = parser.parse_args()

    def faults(number: int, _: dict[str, Any]) -> str | None:
        return args.fault if args.fault and number % args.every == args.every - 1 else None

    server = EndpointServer(
        args.port, args.model, args.key, args.mode, lie=args.lie, delay=args.delay, faults=faults, log=args.log
    )
    print(server.url, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
