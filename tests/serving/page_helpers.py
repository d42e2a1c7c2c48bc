"""A browser for the tests of the page, and an eye on what the page does behind it."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT_MS = 120_000
# These addresses never leave the page; all others must be the server's.
_WITHIN = ("blob:", "data:")
# The page knows what the server has to say: its documents, that there are none, that it needs a key, or is away.
_READY = """() => document.querySelector("#documents-message").textContent
  || ["#key-form", "#down"].some((name) => !document.querySelector(name).hidden)"""
# Visible text whose colour stands out from what is behind it less than WCAG's 4.5 to 1.
CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  const light = (color) => [.2126, .7152, .0722].reduce((sum, weight, i) => sum + weight * linear(color[i] / 255), 0);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ opacityProperty: true }) || node.closest(":disabled")) continue;
    let behind = node, ground;
    do {
      ground = numbers(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    } while (ground[3] === 0 && behind);
    const [more, less] = [light(numbers(getComputedStyle(node).color)), light(ground)].sort((a, b) => b - a);
    const ratio = (more + .05) / (less + .05);
    if (ratio < 4.5) found.push(`${node.className || node.tagName} ${ratio.toFixed(1)}`);
  }
  return found;
}"""
# Controls and regions without a name that assistive software could say.
NAMELESS = """() => {
  const kinds = "button:not([hidden]), input, textarea, select, summary, dialog, section, progress";
  return [...document.querySelectorAll(kinds)].filter((node) => {
    const ids = (node.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean);
    const names = [
      node.getAttribute("aria-label"),
      ...ids.map((id) => document.getElementById(id)?.textContent),
      ...[...(node.labels || [])].map((label) => label.textContent),
      /BUTTON|SUMMARY/.test(node.tagName) ? node.textContent : "",
    ];
    return !names.some((name) => name && name.trim());
  }).map((node) => node.outerHTML);
}"""
# What reaches beyond the right edge of the screen, though it is not hidden on purpose.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter((node) => {
  const { position, overflow } = getComputedStyle(node), meant = position === "absolute" || overflow === "hidden";
  return node.checkVisibility() && !meant && node.getBoundingClientRect().right > innerWidth + 1;
}).map((node) => node.className || node.id || node.tagName)"""
# What has the focus, and whether that is seen.
FOCUSED = """() => {
  const node = document.activeElement;
  return [node.tagName, node.id || node.textContent.trim().slice(0, 8), getComputedStyle(node).outlineStyle];
}"""


@contextmanager
def chromium() -> Iterator:
    """A headless Chromium: playwright's own, else the system's; skips the test in words where there is none."""
    with playwright_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip("no Chromium: run `playwright install chromium`, or install the system's")
        browser = playwright.chromium.launch(executable_path=path, timeout=LIMIT_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, url: str, expect: tuple[str, ...] = (), **options) -> Iterator:
    """The page of a server in a fresh profile.

    On leaving, nothing may have gone wrong behind the page: no script failed, no message was written to the console but
    those with a text of `expect`, no request went to another place, and no script opened a dialog.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    wrong: list[str] = []

    def told(message) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in expect):
            wrong.append(f"console: {message.text}")

    def asked(request) -> None:
        if not request.url.startswith((f"{url}/", *_WITHIN)):
            wrong.append(f"request to {request.url}")

    def popped(dialog) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", told)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", asked)
    page.on("dialog", popped)
    try:
        page.goto(url)
        page.wait_for_function(_READY)
        yield page
    finally:
        context.close()
    assert not wrong, wrong


def text_file(name: str, text: str | bytes) -> dict:
    """A file for an input of files."""
    data = text if isinstance(text, bytes) else text.encode()
    return {"name": name, "mimeType": "text/plain", "buffer": data}


def upload(page, *files: dict) -> str:
    """Adds files and waits until all is done; what the page says then."""
    page.set_input_files("#files", list(files))
    page.wait_for_selector("#upload-dismiss:visible")
    return page.inner_text("#upload")


def ask(page, question: str):
    """Asks with the keyboard and waits until the answer has ended; the turn on the page."""
    before = page.locator(".turn").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    turn = page.locator(".turn").nth(before)
    turn.wait_for()
    page.wait_for_selector("#send:visible")
    return turn


def api(url: str, path: str, body: dict | None = None, method: str | None = None) -> dict:
    """What the server answers to a program."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read() or b"{}")


def rows(page) -> list[str]:
    """The documents that are listed."""
    return page.locator("#list .name").all_inner_texts()
