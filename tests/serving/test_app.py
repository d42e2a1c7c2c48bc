"""The API as others meet it: the real `openai` client and plain HTTP against uvicorn."""

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import RAGMaster
from tests.serving.served import GIVEN, TOKENS, in_thread, settings
from tests.tiny import DOCS, QUESTIONS


@pytest.fixture(scope="module")
def running(model, tmp_path_factory):
    with in_thread(model, tmp_path_factory.mktemp("app") / "store") as made:
        assert httpx.post(f"{made.url}/v1/documents", json={"documents": GIVEN}, timeout=60).status_code == 200
        yield made


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def expected(running, model):
    """What RAGMaster itself answers: (text, citations), by question and options."""

    def query(question: str, history=(), instructions: str = "", **options):
        with RAGMaster(model, config=RAGConfig.from_dict(settings(**options))) as master:
            (ready,) = master.prepare([question], running.asker.library.store, [history], instructions)
            own = master.config.generation
            sizes = (own.max_new_tokens, ready.adapter, own.temperature, own.seed)
            return model.generate_from_prompts([ready.prompt], [ready.docs_KLD], *sizes)[0], ready.citations

    return query


def ask(text: str, **more) -> dict:
    return {"model": "clara", "messages": [{"role": "user", "content": text}], **more}


def cited(citations) -> list[dict]:
    return [{name: getattr(c, name) for name in ("id", "title", "page", "passage", "score")} for c in citations]


def test_an_answer_through_the_openai_client_is_ragmasters_own(client, expected):
    for question in QUESTIONS:
        text, citations = expected(question)
        answer = client.chat.completions.create(**ask(question))
        assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
        assert answer.model_extra["citations"] == cited(citations) and len(citations) == 2
        assert answer.choices[0].finish_reason in ("stop", "length") and answer.model == "clara"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert 0 < answer.usage.completion_tokens <= TOKENS


def test_a_stream_carries_the_same_text_and_its_citations_once(client, expected):
    text, citations = expected(QUESTIONS[0])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**ask(QUESTIONS[0]), **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 1
    assert chunks[0].model_extra["citations"] == cited(citations) and chunks[0].choices[0].delta.role == "assistant"
    assert not any("citations" in chunk.model_extra for chunk in chunks[1:])
    assert [c.choices[0].finish_reason for c in chunks[:-1]][:-1] == [None] * (len(chunks) - 2)
    whole = client.chat.completions.create(**ask(QUESTIONS[0]))
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_server_sent_events(running):
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=ask("Why?", stream=True), timeout=60) as got:
        assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in got.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_the_async_client_gets_answers_side_by_side(running, expected):
    async def ask_all():
        options = {"api_key": "none", "timeout": 120, "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", **options) as client:

            async def streamed(question):
                stream = await client.chat.completions.create(**ask(question, stream=True))
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole(question):
                return (await client.chat.completions.create(**ask(question))).choices[0].message.content

            return await asyncio.gather(*(way(q) for q in QUESTIONS for way in (streamed, whole)))

    assert asyncio.run(ask_all()) == [expected(q)[0] for q in QUESTIONS for _ in range(2)]


def test_200_clients_at_once_get_each_their_own_answer(running, expected):
    questions = [f"{QUESTIONS[i % 3]} {i}" for i in range(40)]
    texts = [expected(question)[0] for question in questions]
    assert len(set(texts)) > 20

    def one(i: int) -> tuple[str, list[str]]:
        with httpx.Client(timeout=300) as http:
            body = ask(questions[i % 40], stream=i % 2 == 0)
            if i % 2:
                got = http.post(f"{running.url}/v1/chat/completions", json=body)
                assert got.status_code == 200, got.text
                return got.json()["choices"][0]["message"]["content"]
            with http.stream("POST", f"{running.url}/v1/chat/completions", json=body) as got:
                chunks = [json.loads(line[6:]) for line in got.iter_lines() if line.startswith("data: {")]
            return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    with ThreadPoolExecutor(200) as pool:
        assert list(pool.map(one, range(200))) == [texts[i % 40] for i in range(200)]


def test_options_of_the_request_are_those_of_the_answer(client, expected):
    drawn = client.chat.completions.create(**ask(QUESTIONS[0], temperature=0.9, seed=3, max_tokens=20))
    assert drawn.choices[0].message.content == expected(QUESTIONS[0], temperature=0.9, seed=3, tokens=20)[0]
    other = client.chat.completions.create(**ask(QUESTIONS[0], temperature=0.9, seed=4, max_completion_tokens=20))
    assert other.choices[0].message.content != drawn.choices[0].message.content
    short = client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=2))
    assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"


def test_an_answer_ends_before_a_stop(client, expected):
    text, _ = expected(QUESTIONS[0])
    stop = text[len(text) // 2 :][:3]
    whole = client.chat.completions.create(**ask(QUESTIONS[0], stop=[stop, "never there"]))
    assert whole.choices[0].message.content == text[: text.find(stop)] and whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask(QUESTIONS[0], stop=stop, stream=True)))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.find(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    unmet = client.chat.completions.create(**ask(QUESTIONS[0], stop=text[-1] + "never there"))
    assert unmet.choices[0].message.content == text


def test_earlier_messages_are_the_history_and_system_messages_are_read_as_text(client, expected):
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Who was"}, {"type": "text", "text": "she?"}]},
        {"role": "assistant", "content": "A scientist."},
        {"role": "user", "content": "And"},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    answer = client.chat.completions.create(model="clara", messages=messages)
    history = [("Who was\nshe?", "A scientist.")]
    text, citations = expected(f"And\n{QUESTIONS[0]}", history, "Answer in one word.")
    assert answer.choices[0].message.content == text != expected(QUESTIONS[0])[0]
    assert answer.model_extra["citations"] == cited(citations)


def test_the_models_are_listed(client, running):
    assert [one.id for one in client.models.list()] == ["clara"] == [client.models.retrieve("clara").id]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_embeddings_are_the_query_reasoners_or_the_compressors(client, model, running):
    queries = model.encode_queries(QUESTIONS)
    own = client.embeddings.create(model="clara", input=QUESTIONS)  # the client asks for base64 and decodes it
    torch.testing.assert_close(torch.tensor([one.embedding for one in own.data]), queries)
    assert [one.index for one in own.data] == [0, 1, 2] and own.usage.prompt_tokens == own.usage.total_tokens > 0
    floats = client.embeddings.create(model="clara", input=QUESTIONS[0], encoding_format="float")
    torch.testing.assert_close(torch.tensor([floats.data[0].embedding]), queries[:1])
    docs = client.embeddings.create(model="clara", input=DOCS[:2], extra_body={"input_type": "document"})
    torch.testing.assert_close(
        torch.tensor([one.embedding for one in docs.data]), model.compress_documents(DOCS[:2])[0].flatten(1)
    )
    body = {"model": "clara", "input": DOCS[0], "encoding_format": "base64"}
    found = httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=60).json()["data"][0]["embedding"]
    assert len(base64.b64decode(found)) == 4 * queries.shape[1]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_rerank_orders_documents_by_cosine(running, model, path):
    docs = model.compress_documents(DOCS)[0].flatten(1).to(torch.bfloat16).double()
    scores = torch.nn.functional.cosine_similarity(model.encode_queries(QUESTIONS[:1]).double(), docs)
    body = {"query": QUESTIONS[0], "documents": [DOCS[0], *({"text": text} for text in DOCS[1:])]}
    found = httpx.post(running.url + path, json=body, timeout=60).json()["results"]
    assert [one["index"] for one in found] == scores.argsort(descending=True).tolist()
    assert [one["relevance_score"] for one in found] == pytest.approx(
        scores.sort(descending=True)[0].tolist(), abs=1e-5
    )
    assert not any("document" in one for one in found)
    more = {"top_n": 2, "return_documents": True}
    two = httpx.post(running.url + path, json={**body, **more}, timeout=60).json()["results"]
    assert [one["index"] for one in two] == [one["index"] for one in found[:2]]
    assert [one["document"] for one in two] == [{"text": DOCS[one["index"]]} for one in two]
    many = httpx.post(running.url + path, json={**body, "top_n": 99}, timeout=60).json()["results"]
    assert len(many) == len(DOCS)


NEUTRAL = {
    "n": 1, "top_p": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "tools": [],
    "response_format": {"type": "text"}, "logprobs": False,
    "user": "somebody", "metadata": {"a": 1}, "store": False, "anything": [1, 2], "stop": None,
    "logit_bias": None, "tool_choice": "none", "seed": None, "service_tier": "auto",
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_passed_over(running, expected):
    got = httpx.post(f"{running.url}/v1/chat/completions", json=ask(QUESTIONS[0], **NEUTRAL), timeout=60)
    assert got.status_code == 200 and got.json()["choices"][0]["message"]["content"] == expected(QUESTIONS[0])[0]


USER = {"role": "user", "content": "Why?"}
REFUSED = [
    ({"n": 2}, "n", "n is not supported here: leave it out, or give 1"),
    ({"top_p": 0.5}, "top_p", "top_p is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
    ({"logprobs": True}, "logprobs", "logprobs is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
    ({"frequency_penalty": 0.2}, "frequency_penalty", "frequency_penalty is not supported"),
    ({"temperature": -1}, "temperature", "temperature: Input should be greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens: Input should be a valid integer"),
    ({"seed": 2**70}, "seed", "seed: "),
    ({"stream": "yes"}, "stream", "stream: Input should be a valid boolean"),
    ({"stop": ["a"] * 5}, "stop", "stop"),
    ({"messages": []}, "messages", "messages: List should have at least 1 item"),
    ({"messages": "Why?"}, "messages", "messages: Input should be a valid"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content: Field required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "messages.0.role: Input should be"),
    ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages", "the last message must be the user's"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "the last message must be the user's"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "messages", "the last message is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
        "messages.0.content.0.type: Input should be 'text'",
    ),
    ({"messages": [{"role": "user", "content": "x" * 100_001}]}, "messages.0.content", "at most 100000 characters"),
    ({"messages": [{"role": "user", "content": "why " * 1200}]}, "messages", "exceed the base model's 1024"),
    ({"max_tokens": 5000}, "messages", "exceed the base model's 1024"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("given", "param", "message"), REFUSED, ids=[f"{p}-{m[:30]}" for _, p, m in REFUSED])
def test_what_would_change_the_answer_or_is_wrong_is_refused_in_openais_format(running, given, param, message, stream):
    body = {**ask("Why?", stream=stream), **given}
    got = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    error = got.json()["error"]
    assert got.status_code == 400 and set(error) >= {"message", "type", "param", "code"}
    assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


OTHERS = [
    ("/v1/chat/completions", {**ask("Why?"), "model": "gpt-4"}, 404, "there is no model 'gpt-4' here, only 'clara'"),
    ("/v1/embeddings", {"model": "clara", "input": []}, 400, "input"),
    ("/v1/embeddings", {"model": "clara", "input": [[1, 2]]}, 400, "input"),
    ("/v1/embeddings", {"model": "clara", "input": ["a", " "]}, 400, "an input is empty"),
    ("/v1/embeddings", {"model": "clara", "input": "a", "dimensions": 5}, 400, "leave dimensions out"),
    ("/v1/embeddings", {"model": "clara", "input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ("/v1/embeddings", {"model": "clara", "input": ["a"] * 257}, 400, "at most 256 items"),
    ("/rerank", {"query": "a", "documents": []}, 400, "documents"),
    ("/rerank", {"query": " ", "documents": ["a"]}, 400, "the query is empty"),
    ("/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, 400, "top_n"),
    ("/rerank", {"query": "a", "documents": [1]}, 400, "documents"),
    ("/v1/documents", {"documents": []}, 400, "documents: List should have at least 1 item"),
    ("/v1/documents", {"documents": [{"title": "no text"}]}, 400, "document 0: text is missing"),
    ("/v1/documents", {"documents": [GIVEN[0], {"text": 5}]}, 400, "document 1: text must be a text, got 5"),
    ("/v1/documents", {"documents": [{"text": "a", "page": "x"}]}, 400, "document 0: page must be a whole number"),
    ("/v1/documents", {"text": "a"}, 400, "documents: Field required"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), OTHERS, ids=[f"{o[0]}-{o[3][:25]}" for o in OTHERS])
def test_other_bodies_are_refused_in_words_too(running, path, body, status, message):
    got = httpx.post(running.url + path, json=body, timeout=60)
    assert got.status_code == status and message in got.json()["error"]["message"]


def test_below_the_bar_the_answer_is_a_refusal_without_citations(model, tmp_path):
    with in_thread(model, tmp_path / "store", min_score=1.0) as strict:
        url = strict.url
        httpx.post(f"{url}/v1/documents", json={"documents": GIVEN}, timeout=60)
        got = httpx.post(f"{url}/v1/chat/completions", json=ask(QUESTIONS[0]), timeout=60).json()
        assert got["choices"][0]["message"]["content"].startswith("The documents do not answer this question: ")
        assert got["citations"] == [] and got["choices"][0]["finish_reason"] == "stop"
        assert got["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        assert "clara_refusals_total 1" in httpx.get(f"{url}/metrics").text


def test_other_paths_and_methods_are_refused_as_errors(running):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/health", 405),
    ):
        got = httpx.request(method, running.url + path)
        assert got.status_code == status and got.json()["error"]["message"]


def test_health_and_metrics_tell_how_it_goes(running):
    assert httpx.get(f"{running.url}/health").json() == {"status": "ready", "documents": 7, "key": False}
    text = httpx.get(f"{running.url}/metrics").text
    assert 'clara_requests_total{path="/health",status="200"}' in text and "clara_documents 7" in text
    assert "clara_asked 0" in text and "# TYPE clara_request_seconds histogram" in text


def test_the_page_and_its_files_are_served_with_a_strict_policy(running):
    page = httpx.get(running.url)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    script = httpx.get(f"{running.url}/page/page.js")
    assert script.status_code == 200 and "javascript" in script.headers["content-type"]
    for outside in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/"):
        assert httpx.get(running.url + outside).status_code == 404
