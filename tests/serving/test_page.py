"""The page in a real browser, before the real server with a tiny model."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from openrlhf.serving.guard import POLICY
from tests.serving.page_helpers import (
    CONTRAST,
    FOCUSED,
    NAMELESS,
    TOO_WIDE,
    api,
    ask,
    chromium,
    opened,
    rows,
    text_file,
    upload,
)
from tests.serving.served import save_checkpoint, serving
from tests.tiny import save_base

ROOT = Path(__file__).parents[2]
KEY = "s3cret-0815"
# Tokens of an answer that nobody waits for.
ENDLESS = "20000"
LAMP = "The harbour lamp was lit in 1874."
BREAD = "Bread is made from rye."
QUESTION = "Who lit the harbour lamp?"
# What a server refuses, and that there is none, a browser writes to the console itself.
REFUSED = ("Failed to load resource",)
EVIL = "<img src=x onerror=alert(1)>"
CODES = {400: "context_length_exceeded"}


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Takes passages of more than a few words, and writes answers that last for minutes where it may."""
    folder = tmp_path_factory.mktemp("page")
    base = save_base("mistral", folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2 * int(ENDLESS)}))
    return save_checkpoint(base, folder / "checkpoint", doc_max_length=64, compr_rate=16)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with serving(checkpoint, tmp_path_factory.mktemp("page"), "--max_body_mb", 1) as running:
        yield running


@pytest.fixture
def url(server) -> str:
    """The server's address; it holds two documents and nothing else."""
    for item in api(server.url, "/v1/documents?limit=1000")["data"]:
        api(server.url, f"/v1/documents/{urllib.request.quote(item['id'], safe='')}", method="DELETE")
    api(server.url, "/v1/documents", {"documents": [{"id": "lamp.txt", "text": LAMP, "page": 3},
                                                    {"id": "b7", "title": "On bread", "text": BREAD}]})  # fmt: skip
    return server.url


def test_dropped_documents_are_asked_and_the_answer_comes_with_its_passages_and_scores(browser, url):
    with opened(browser, url) as page:
        assert sorted(rows(page)) == ["On bread", "lamp.txt"]
        turn = ask(page, QUESTION)
        model = api(url, "/v1/models")["data"][0]["id"]
        told = api(url, "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": QUESTION}]})
        assert turn.locator(".answer").text_content() == told["choices"][0]["message"]["content"] != ""
        cards = turn.locator(".source")
        assert cards.count() == len(told["citations"]) == 2
        for number, cited in enumerate(told["citations"]):
            card = cards.nth(number)
            assert card.locator(".marker").inner_text() == str(number + 1)
            title = {"lamp.txt": "lamp.txt page 3", "b7": "On bread b7"}[cited["id"]]
            assert " ".join(card.locator(".title").inner_text().split()) == title
            assert f"{cited['score']:.3f}" in card.locator(".score").inner_text()
            share = card.locator(".bar").evaluate("bar => bar.firstChild.offsetWidth / bar.clientWidth")
            assert share == pytest.approx(max(0.0, cited["score"]), abs=0.02)
            assert not card.locator(".passage").is_visible()
            card.locator("summary").click()
            assert card.locator(".passage").inner_text() == cited["passage"]
        assert page.inner_text("#announce").startswith(told["choices"][0]["message"]["content"].strip()[:10])


def test_files_are_added_one_by_one_and_those_that_cannot_be_are_named_with_the_reason(browser, url):
    with opened(browser, url, REFUSED) as page:
        lines = b"\n".join(
            json.dumps({"title": "On wells", "text": t, "page": 9}).encode() for t in ("A well.", "A spring.")
        )
        said = upload(page, text_file("tower.md", "The tower has 318 steps."), text_file("scan.pdf", "%PDF"),
                      text_file("latin.txt", b"caf\xe9"), text_file("empty.txt", ""), text_file("wells.jsonl", lines),
                      text_file("bad.jsonl", "{"), text_file("large.txt", "word " * 400_000))  # fmt: skip
        assert "3 passages added. Not added:" in said
        failures = dict(line.split(": ", 1) for line in page.locator("#failures li").all_inner_texts())
        assert set(failures) == {"scan.pdf", "latin.txt", "empty.txt", "bad.jsonl", "large.txt"}
        assert "only .txt, .md, .jsonl" in failures["scan.pdf"] and "UTF-8" in failures["latin.txt"]
        assert "no text" in failures["empty.txt"] and "JSON" in failures["bad.jsonl"]
        assert (
            "than this server takes" in failures["large.txt"] or "more than the server takes" in failures["large.txt"]
        )
        assert (
            rows(page).count("On wells") == 2
            and "tower.md" in rows(page)
            and page.inner_text("#documents .count") == "(5)"
        )
        page.click("#upload-dismiss")
        assert "1 here already." in upload(page, text_file("tower.md", "The tower has 318 steps."))


def test_a_folder_that_is_dropped_on_the_page_is_added_with_what_lies_below(browser, url, tmp_path):
    (tmp_path / "papers" / "old").mkdir(parents=True)
    (tmp_path / "papers" / "old" / "lighthouse.txt").write_text("The lighthouse was built on rock.")
    (tmp_path / "papers" / "picture.png").write_bytes(b"\x89PNG")
    with opened(browser, url) as page:
        devtools = page.context.new_cdp_session(page)
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": [], "files": [str(tmp_path / "papers")], "dragOperationsMask": 1}
            devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 700, "y": 300, "data": data})
            if kind == "dragOver":
                page.wait_for_selector("body.dragging")
        page.wait_for_selector("#upload-dismiss:visible")
        assert page.inner_text("#upload-status") == "1 passage added."
        assert "papers/old/lighthouse.txt" in rows(page) and not page.locator("body.dragging").count()


def test_a_text_is_pasted_with_the_keyboard_alone(browser, url):
    with opened(browser, url) as page:
        page.focus("#paste")
        page.keyboard.press("Enter")
        page.keyboard.type("Windmills")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "paste-add"
        page.keyboard.press("Enter")
        assert page.inner_text("#paste-problem") == "The text is empty."
        page.keyboard.type("A windmill has four sails.")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#upload-dismiss:visible")
        assert "Windmills" in rows(page)


def test_a_document_is_deleted_only_when_that_is_confirmed(browser, url):
    with opened(browser, url) as page:
        page.get_by_role("button", name="Delete On bread").click()
        assert page.inner_text("#confirm-text") == "On bread"
        page.keyboard.press("Escape")
        assert "On bread" in rows(page)
        page.get_by_role("button", name="Delete On bread").click()
        page.get_by_role("button", name="Keep it").click()
        assert "On bread" in rows(page)
        page.get_by_role("button", name="Delete On bread").focus()
        for key in ("Enter", "Tab", "Enter"):
            page.keyboard.press(key)
        page.wait_for_function("() => document.querySelector('#documents .count').textContent === '(1)'")
        assert rows(page) == ["lamp.txt"]
        assert page.evaluate("document.activeElement.id") == "documents-title"
    assert [item["id"] for item in api(url, "/v1/documents")["data"]] == ["lamp.txt"]


def test_a_long_file_can_be_deleted_with_all_its_passages(browser, url):
    with opened(browser, url) as page:
        upload(
            page,
            text_file("saga.txt", "\n\n".join(f"Chapter {i} is about the sea, the wind and a ship." for i in range(9))),
        )
        cut = [name for name in rows(page) if name.startswith("saga.txt#")]
        assert len(cut) > 2
        page.get_by_role("button", name=f"Delete {cut[1]}", exact=True).click()
        page.get_by_role("button", name="Delete this passage").click()
        page.get_by_role("button", name=f"Delete {cut[1]}", exact=True).wait_for(state="detached")
        assert set(cut) - set(rows(page)) == {cut[1]}
        page.get_by_role("button", name=f"Delete {cut[0]}", exact=True).click()
        page.get_by_role("button", name="Delete all of saga.txt").click()
        page.get_by_role("button", name=f"Delete {cut[0]}", exact=True).wait_for(state="detached")
        assert sorted(rows(page)) == ["On bread", "lamp.txt"]


def test_many_documents_are_listed_page_by_page(browser, url):
    api(
        url, "/v1/documents", {"documents": [{"id": f"n{i:02}", "text": f"Number {i} is a number."} for i in range(40)]}
    )
    with opened(browser, url) as page:
        first = rows(page)
        assert len(first) == 25 and page.inner_text("#range") == "1 to 25" and page.is_disabled("#previous")
        page.click("#next")
        page.wait_for_function("() => document.querySelector('#range').textContent === '26 to 42'")
        assert len({*first, *rows(page)}) == 42 and page.is_disabled("#next")
        page.click("#previous")
        page.wait_for_function("() => document.querySelector('#range').textContent === '1 to 25'")
        assert rows(page) == first


def test_a_reload_finds_the_documents_again(browser, url):
    with opened(browser, url) as page:
        upload(page, text_file("tower.md", "The tower has 318 steps."))
        before = rows(page)
        page.reload()
        page.wait_for_selector("#list li")
        assert rows(page) == before and "tower.md" in before


def test_stop_ends_an_answer_and_the_next_question_is_answered(browser, url):
    with opened(browser, url) as page:
        page.click("#settings summary")
        page.fill("#max-tokens", ENDLESS)
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 20")
        page.click("#stop")
        turn = page.locator(".turn").first
        turn.get_by_text("Stopped: the answer ends here.").wait_for()
        stopped = turn.locator(".answer").text_content()
        page.fill("#max-tokens", "5")
        assert ask(page, "And who baked?").locator(".answer").text_content()
        assert turn.locator(".answer").text_content() == stopped
        assert page.evaluate("document.activeElement.id") == "question"


def test_an_answer_that_was_cut_at_its_length_says_so(browser, url):
    with opened(browser, url) as page:
        page.click("#settings summary")
        page.fill("#max-tokens", "0")
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        assert not page.locator(".turn").count() and page.evaluate(
            "!document.querySelector('#max-tokens').validity.valid"
        )
        page.fill("#max-tokens", "2")
        assert "cut at its longest length" in ask(page, QUESTION).inner_text()


def test_follow_up_questions_take_the_turns_before_them_along_and_a_new_conversation_none(browser, url):
    with opened(browser, url) as page:
        asked = []
        page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("/completions") else None)
        answers = [ask(page, question).locator(".answer").text_content() for question in (QUESTION, "When?")]
        page.click("#new")
        assert not page.locator(".turn").count() and page.is_visible("#empty")
        ask(page, "And now?")
        page.click("#settings summary")
        page.uncheck("#follow-up")
        ask(page, "Alone?")
        said = [[message["content"] for message in body["messages"]] for body in asked]
        assert said == [[QUESTION], [QUESTION, answers[0], "When?"], ["And now?"], ["Alone?"]]
        assert all(body["stream"] is True and "temperature" not in body and "max_tokens" not in body for body in asked)


def test_enter_asks_but_not_within_an_input_method_nor_with_shift(browser, url):
    with opened(browser, url) as page:
        page.fill("#question", "東京")
        page.eval_on_selector("#question", "box => box.dispatchEvent(new KeyboardEvent('keydown', "
                              "{ key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))")  # fmt: skip
        page.press("#question", "Shift+Enter")
        page.keyboard.type("?")
        assert page.input_value("#question") == "東京\n?" and not page.locator(".turn").count()
        page.press("#question", "Enter")
        page.wait_for_selector("#send:visible")
        assert page.locator(".turn .question").all_inner_texts() == ["東京\n?"]


def test_what_people_and_documents_say_is_shown_as_text(browser, url):
    with opened(browser, url) as page:
        page.click("#paste")
        page.fill("#paste-name", EVIL)
        page.fill("#paste-text", "<script>x</script> &lt;")
        page.click("#paste-add")
        page.wait_for_selector("#upload-dismiss:visible")
        upload(page, text_file(f"{EVIL}.md".replace("/", ""), "A file."), text_file(f"{EVIL}.pdf", "x"))
        assert EVIL in rows(page) and f"{EVIL}.md" in rows(page) and f"{EVIL}.pdf: only" in page.inner_text("#failures")
        for name in ("lamp.txt", "On bread", f"{EVIL}.md"):
            page.get_by_role("button", name=f"Delete {name}", exact=True).click()
            page.click("#confirm-one")
            page.wait_for_function(
                "name => ![...document.querySelectorAll('#list .name')].some(n => n.textContent === name)", arg=name
            )
        turn = ask(page, f"{EVIL}<b>?")
        turn.locator("summary").click()
        assert turn.locator(".question").inner_text() == f"{EVIL}<b>?" and turn.locator(
            ".title"
        ).inner_text().startswith(EVIL)
        assert turn.locator(".passage").inner_text() == "<script>x</script> &lt;"
        assert page.evaluate("document.querySelectorAll('img, b, main script').length") == 0


def test_without_documents_the_page_says_what_to_do_and_shows_the_refusal_as_one(browser, url):
    for name in ("lamp.txt", "b7"):
        api(url, f"/v1/documents/{name}", method="DELETE")
    with opened(browser, url) as page:
        assert "First add documents" in page.inner_text("#empty") and "None yet" in page.inner_text("#documents")
        turn = ask(page, QUESTION)
        assert "The documents do not answer this question" in turn.locator(".answer").inner_text()
        assert "refused" in turn.get_attribute("class") and "add some, then ask again" in turn.inner_text()
        assert not turn.locator(".source").count() and not turn.get_by_role("button", name="Copy").count()
        asked = []
        page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("/completions") else None)
        upload(page, text_file("lamp.txt", LAMP))
        assert ask(page, "And now?").locator(".source").count() == 1
        assert [message["content"] for message in asked[0]["messages"]] == ["And now?"]


def test_copy_takes_the_answer_and_its_sources(browser, url):
    with opened(browser, url) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        turn = ask(page, QUESTION)
        turn.get_by_role("button", name="Copy").click()
        turn.get_by_role("button", name="Copied").wait_for()
        taken = page.evaluate("navigator.clipboard.readText()")
        assert (
            taken.startswith(turn.locator(".answer").text_content())
            and "[1] " in taken
            and "lamp.txt, page 3 (" in taken
        )


def test_a_server_with_a_key_is_given_it_by_the_page_which_keeps_it_in_the_tab_only(browser, checkpoint, tmp_path):
    with (
        serving(checkpoint, tmp_path, env={"CLARA_API_KEY": KEY}) as server,
        opened(browser, server.url, REFUSED) as page,
    ):
        page.wait_for_selector("#key-form:visible")
        assert page.evaluate("document.activeElement.id") == "key" and page.get_attribute("#key", "type") == "password"
        page.keyboard.type("no key")
        page.keyboard.press("Enter")
        assert "without spaces" in page.inner_text("#key-message")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => document.querySelector('#key-message').textContent.includes('does not take this key')"
        )
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('#documents .count').textContent === '(0)'")
        assert not page.is_visible("#key-form")
        upload(page, text_file("lamp.txt", LAMP))
        assert ask(page, QUESTION).locator(".source").count() == 1
        kept = page.evaluate(
            "[Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]"
        )
        assert kept == [[KEY], [], "", server.url + "/"]
        page.reload()
        page.wait_for_selector("#list li")
        assert not page.is_visible("#key-form")
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#key-form:visible")


def test_a_server_that_dies_is_said_to_be_away_and_asked_again_once_it_is_back(browser, checkpoint, tmp_path):
    with serving(checkpoint, tmp_path) as server, opened(browser, server.url, REFUSED) as page:
        upload(page, text_file("lamp.txt", LAMP))
        page.click("#settings summary")
        page.fill("#max-tokens", ENDLESS)
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 20")
        server.signal(signal.SIGKILL)
        turn = page.locator(".turn").first
        turn.get_by_text("The connection broke before the answer was complete.").wait_for()
        page.wait_for_selector("#down:visible")
        page.fill("#max-tokens", "5")
        assert "The server does not answer." in ask(page, "Still there?").inner_text()
        assert "Nothing was added" in upload(page, text_file("a.txt", "A."), text_file("b.txt", "B."))
        assert "The server does not answer. Not sent: 1 more." in page.inner_text("#failures")
        with serving(checkpoint, tmp_path, "--port", urlsplit(server.url).port):
            page.wait_for_selector("#down", state="hidden")
            assert rows(page) == ["lamp.txt"]
            page.locator(".turn").nth(1).get_by_role("button", name="Ask again").click()
            page.wait_for_selector("#send:visible")
            assert page.locator(".turn").nth(1).locator(".source").count() == 1
            assert page.locator(".turn").count() == 2 and page.locator(".turn").nth(1).locator(".answer").text_content()


@pytest.mark.parametrize(
    ("status", "headers", "error", "words"),
    [
        (429, {"Retry-After": "7"}, "9 questions wait", "busy with other questions. Try again in 7 seconds."),
        (503, {"Retry-After": "1"}, "The server is stopping.", "The server is stopping. Try again in 1 second."),
        (504, {}, "too slow", "took longer than the server allows"),
        (400, {}, "the prompt is long", "the prompt is long. A new conversation begins without the earlier turns."),
        (413, {}, "the body has more than 9 bytes", "More than this server takes at once."),
        (500, {}, None, "answered with status 500"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_is_told_in_words_and_can_be_asked_again(browser, url, status, headers, error, words):
    with opened(browser, url, REFUSED) as page:
        body = "Bad Gateway" if error is None else json.dumps({"error": {"message": error, "code": CODES.get(status)}})
        page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, body=body), times=1
        )
        turn = ask(page, QUESTION)
        assert words in turn.locator(".problem").inner_text() and not turn.locator(".source").count()
        turn.get_by_role("button", name="Ask again").click()
        page.wait_for_selector(".turn.done")
        assert page.locator(".turn").count() == 1 and page.locator(".source").count() == 2


def test_an_error_within_a_stream_is_told_and_what_was_written_stays(browser, url):
    chunks = [
        {"choices": [{"delta": {"content": "The lamp"}}], "citations": []},
        {"error": {"message": "m", "status": 504}},
    ]
    body = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks)
    with opened(browser, url) as page:
        stream = {"content_type": "text/event-stream", "body": ": comment\r\n\r\n" + body}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream), times=1)
        turn = ask(page, QUESTION)
        assert turn.locator(".answer").inner_text() == "The lamp"
        assert "took longer than the server allows" in turn.locator(".problem").inner_text()


@pytest.mark.parametrize("width", [360, 820, 1600])
def test_nothing_is_wider_than_the_screen_however_long_the_words(browser, url, width):
    word = "Donaudampfschifffahrt" * 20
    api(
        url,
        "/v1/documents",
        {"documents": [{"id": word, "title": word, "text": word}, {"id": "שלום", "text": "שלום עולם"}]},
    )
    with opened(browser, url, viewport={"width": width, "height": 740}) as page:
        for name in ("lamp.txt", "b7"):
            api(url, f"/v1/documents/{name}", method="DELETE")
        turn = ask(page, word)
        for card in turn.locator("summary").all():
            card.click()
        if width <= 820:
            assert not page.is_visible("#list")
            page.click("#documents-toggle")
        assert page.is_visible("#list")
        page.locator("#list button").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground_in_light_and_dark(browser, url, scheme):
    with opened(browser, url, REFUSED, color_scheme=scheme) as page:
        upload(page, text_file("scan.pdf", "%PDF"))
        ask(page, QUESTION).locator("summary").first.click()
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body=""), times=1)
        ask(page, QUESTION)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
        assert page.evaluate(CONTRAST) == []


def test_all_controls_have_names_and_what_happens_is_said(browser, url):
    with opened(browser, url, reduced_motion="reduce") as page:
        ask(page, QUESTION)
        assert page.evaluate(NAMELESS) == []
        assert page.get_attribute("html", "lang") == "en" and page.locator("h1").count() == 1
        assert page.get_attribute("#announce", "aria-live") == "polite" and "2 sources" in page.inner_text("#announce")
        assert page.get_attribute(".answer", "aria-busy") == "false"
        page.route("**/v1/chat/completions", lambda route: None)
        page.fill("#question", "Silence?")
        page.press("#question", "Enter")
        page.wait_for_selector(".waiting")
        assert page.evaluate("getComputedStyle(document.querySelector('.waiting'), '::after').animationName") == "none"
        assert page.inner_text("#announce") == "Looking in the documents."
        page.click("#stop")
        page.wait_for_function("() => document.querySelector('#announce').textContent === 'Stopped.'")
        page.unroute_all(behavior="ignoreErrors")


def test_all_is_reached_with_the_tab_key_and_seen_where_it_is(browser, url):
    with opened(browser, url) as page:
        ask(page, QUESTION)
        reached = set()
        for _ in range(30):
            page.keyboard.press("Tab")
            tag, name, outline = page.evaluate(FOCUSED)
            assert tag == "BODY" or outline != "none", f"{name} does not show that it has the focus"
            reached.add(name)
        assert {"choose", "paste", "Delete", "Copy", "question", "send", "new", "Settings"} <= reached


def test_the_page_is_all_that_is_loaded_and_runs_under_a_strict_policy(browser, url):
    with opened(browser, url) as page:
        loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => new URL(entry.name).pathname)")
        assert {"/page/page.js", "/page/page.css"} <= set(loaded)
        assert all(path.startswith(("/page/", "/v1/")) for path in loaded)
        assert "unsafe" not in POLICY and page.evaluate("document.querySelectorAll('[style], [onclick]').length") == 0
        with urllib.request.urlopen(url, timeout=60) as response:
            assert response.headers["Content-Security-Policy"] == POLICY
            html = response.read().decode()
        assert "<style" not in html and html.count("<script") == 1


def test_the_picture_of_the_page_is_drawn_from_a_running_server(browser, url, tmp_path):
    line = [sys.executable, ROOT / "scripts" / "draw_page.py", "--output", tmp_path / "page.png", QUESTION, "--url"]
    options: dict = {"capture_output": True, "text": True, "timeout": 300}
    assert "page.png" in subprocess.run([*line, url], check=True, **options).stdout
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([*line, "http://127.0.0.1:1"], **options)
    assert refused.returncode == 2 and refused.stderr.startswith("draw_page: ") and "Traceback" not in refused.stderr
