"""Draw figs/serve_page.png: the page of a running server, with a question, its answer and what the answer stands on.

    python scripts/draw_page.py --url http://127.0.0.1:8000 "Who explained Saturn's ring in 1659?"

The server holds documents already. Needs playwright, and a Chromium: playwright's own or the system's. The most likely
answer is drawn (temperature 0).
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

FIGURE = Path(__file__).resolve().parents[1] / "figs" / "serve_page.png"
SIZE = {"width": 1200, "height": 760}
LIMIT_MS = 300_000


def draw(url: str, question: str, output: Path, browser: str | None) -> None:
    """Asks on the page and writes a PNG.

    Raises:
        playwright.sync_api.Error: there is no browser, no server, or no answer in time.
    """
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path).exists()
        started = playwright.chromium.launch(executable_path=None if own else browser, timeout=LIMIT_MS)
        page = started.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(LIMIT_MS)
        page.goto(url)
        page.wait_for_selector("#list li")
        page.click("#settings summary")
        page.fill("#temperature", "0")
        page.click("#settings summary")
        page.fill("#question", question)
        page.press("#question", "Enter")
        page.wait_for_selector(".turn.done")
        output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=output)
        started.close()


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=FIGURE)
    args = parser.parse_args(argv)
    try:
        draw(args.url, args.question, args.output, shutil.which("chromium") or shutil.which("google-chrome"))
    except Error as error:
        print(f"draw_page: {error.message.splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
