"""Extraction of a folder: every kind of document, broken files, what is done again and what is not."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("docling")

from openrlhf.pipeline import extract as module
from openrlhf.pipeline.convert import KINDS, Passing, Skip, convert, decode
from openrlhf.pipeline.extract import ASSETS, IMAGES, base_of, choose_layout, extract, language_of, summary
from openrlhf.pipeline.state import State
from openrlhf.pipeline.worker import Died, Workers
from tests.pipeline.conftest import LIMIT
from tests.pipeline.make_documents import BROKEN, GOOD, picture
from tests.pipeline.texts import CHINESE, COMET, LATIN, LIGHTHOUSES, PENGUINS, RHINE, SLIDES, VIOLIN

ROOT = Path(__file__).parents[2]


class InThisProcess:
    """Workers without processes: fast, for what is not about processes."""

    asked: list[str] = []

    def __init__(self, tokenizer: str, *_: object, **__: object):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def run(self, path: Path, sha256: str, kind: str, options: dict, pictures: dict, seconds: float) -> dict:
        self.asked.append(path.name)
        return convert(path.read_bytes(), kind, options, self.tokenizer, pictures)

    def close(self) -> None:
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, options):
    """run() extracts tmp_path/raw to tmp_path/out; returns the report; `run.asked` is what was converted."""
    monkeypatch.setattr(module, "Workers", InThisProcess)
    monkeypatch.setattr(InThisProcess, "asked", [])
    (tmp_path / "raw").mkdir()

    def call(**changed) -> dict:
        InThisProcess.asked.clear()
        with State(tmp_path / "out/state.sqlite") as state:
            changed_options = dataclasses.replace(options, **changed)
            return extract(tmp_path / "raw", tmp_path / "out/raw_knowledge.jsonl", changed_options, state)

    call.asked = InThisProcess.asked
    call.raw, call.out = tmp_path / "raw", tmp_path / "out"
    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "raw_knowledge.jsonl").read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def of(report: dict, source: str) -> dict:
    return next(file for file in report["files"] if file["source"] == source)


# What is in the documents


def test_every_good_document_is_extracted_and_every_broken_one_skipped_with_its_reason(extracted):
    status = {file["source"]: file for file in extracted.report["files"]}
    assert set(status) == {*GOOD, *BROKEN}
    assert {source for source, file in status.items() if file["status"] == "done"} == set(GOOD)
    for source, word in BROKEN.items():
        assert status[source]["status"] == "skipped" and word in status[source]["reason"], status[source]
    assert json.loads((extracted.output.parent / "extraction_report.json").read_text()) == extracted.report
    table = summary(extracted.report)
    assert f"{len(GOOD)} extracted" in table and all(source in table for source in BROKEN)


def test_records_have_what_the_next_steps_read(extracted, count):
    entries = extracted.records
    assert entries == sorted(entries, key=lambda entry: (entry["source"], entry["number"]))
    for source in GOOD:
        own = extracted.of(source)
        assert [entry["number"] for entry in own] == list(range(len(own))) and own
        digest = hashlib.sha256((extracted.root / source).read_bytes()).hexdigest()
        assert {entry["document_sha256"] for entry in own} == {digest}
    for entry in entries:
        assert entry["id"] == f"{entry['source']}#{entry['number']}"
        assert entry["sha256"] == hashlib.sha256(entry["text"].encode()).hexdigest()
        assert 0 < count(entry["text"]) <= LIMIT
        assert not re.search("[\U000f0000-\U000ffffd]", entry["text"])
    assert len({entry["id"] for entry in entries}) == len(entries)
    layouts = {entry["source"]: entry["layout"] for entry in entries}
    assert layouts["lighthouses.pdf"] == "rules" and layouts["rhine.docx"] == "docling"
    assert layouts["great_wall.txt"] == "plain"
    languages = {entry["source"]: entry["language"] for entry in entries}
    assert (languages["great_wall.txt"], languages["amazon_latin1.txt"]) == ("zh", "other")
    assert languages["lighthouses.pdf"] == languages["web/comet.html"] == "en"


def test_a_pdf_keeps_order_headings_pages_and_every_sentence(extracted):
    own = extracted.of("lighthouses.pdf")
    text = plain(" ".join(entry["text"].removeprefix("\n".join(entry["headings"])) for entry in own))
    paragraphs = [paragraph for _, texts in LIGHTHOUSES["sections"] for paragraph in texts]
    places = [text.index(sentence) for paragraph in paragraphs for sentence in re.findall(r"[^.]+\.", paragraph)]
    assert places == sorted(places)
    assert own[0]["title"] == LIGHTHOUSES["title"] and plain(LIGHTHOUSES["lead"]) in text
    for heading, texts in LIGHTHOUSES["sections"]:
        entry = next(entry for entry in own if texts[0][:30] in plain(entry["text"]))
        assert entry["headings"] == [LIGHTHOUSES["title"], heading] and entry["page"] == 2
        assert entry["text"].startswith(f"{LIGHTHOUSES['title']}\n{heading}\n")
    assert all(f"- {text}" in own[-1]["text"] for text in LIGHTHOUSES["list"]) and own[-1]["page"] == 3
    assert "Page 1" not in text


def test_tables_become_rows_of_markdown(extracted):
    for source, rows in (
        ("lighthouses.pdf", LIGHTHOUSES["table"]),
        ("rhine.docx", RHINE["table"]),
        ("coffee.pptx", SLIDES["table"]),
        ("web/comet.html", COMET["table"]),
        ("notes/violin.md", VIOLIN["table"]),
    ):
        text = "\n".join(entry["text"] for entry in extracted.of(source))
        for row in rows:
            assert "| " + " | ".join(row) + " |" in text, (source, row)
    sheets = extracted.of("planets.xlsx")
    assert {entry["headings"][0] for entry in sheets} == {"Planets", "Rivers"}
    assert any("| Saturn | 120536 | 146 | 10747 |" in entry["text"] for entry in sheets)


def test_a_scanned_page_is_read_and_laid_out(extracted):
    own = extracted.of("scanned/penguins.pdf")
    text = plain(" ".join(entry["text"] for entry in own))
    assert own[0]["headings"] == [PENGUINS[0][0]] and own[-1]["page"] == 2
    assert PENGUINS[1][0] in own[-1]["headings"]
    assert "the only penguin that breeds during the Antarctic winter" in text
    assert "deeper than 500 metres" in text


def test_speakers_notes_belong_to_their_slide(extracted):
    own = extracted.of("coffee.pptx")
    for number, (title, bullets, notes) in enumerate(SLIDES["slides"], 1):
        slide = [entry for entry in own if entry["page"] == number]
        text = " ".join(entry["text"] for entry in slide)
        assert slide[0]["headings"] == [title] and notes in text and all(bullet in text for bullet in bullets)


def test_paragraphs_with_emphasis_stay_whole(extracted):
    text = "\n".join(entry["text"] for entry in extracted.of("notes/violin.md"))
    for paragraph in (VIOLIN["lead"], *VIOLIN["sections"][0][1]):
        for sentence in re.findall(r"[^.]+\.", paragraph.replace("*", "")):
            assert sentence.strip() in text


def test_text_files_are_decoded_and_their_headings_seen(extracted):
    chinese = extracted.of("great_wall.txt")
    assert chinese[0]["title"] == "长城" and any("烽火台" in entry["headings"] for entry in chinese)
    text = "".join(entry["text"] for entry in chinese)
    assert all(part in text for part in re.findall(r"[^。\n]+。", CHINESE))
    text = plain(" ".join(entry["text"] for entry in extracted.of("amazon_latin1.txt")))
    assert plain(LATIN.split("\n\n")[2]).strip() in text


@pytest.mark.parametrize("name", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_chinese_is_decoded_from(name):
    assert decode(CHINESE.encode(name)) == CHINESE


def test_html_is_decoded_as_it_says_of_itself(run):
    head = "<html><head><meta charset='gb2312'></head>"
    page = f"{head}<body><h1>长城</h1><p>长城是中国古代修建的防御工程。</p></body></html>"
    (run.raw / "page.html").write_bytes(page.encode("gb2312"))
    (run.raw / "about.txt").write_text("A file that begins with %PDF-1.7 is a PDF file, and this one is none.")
    run()
    texts = {entry["source"]: entry["text"] for entry in records(run.out)}
    assert texts["page.html"] == "长城\n长城是中国古代修建的防御工程。" and "this one is none" in texts["about.txt"]


@pytest.mark.parametrize("name", ["latin-1", "cp1252", "utf-8"])
def test_spanish_is_decoded_from(name):
    assert decode(LATIN.encode(name)) == LATIN


def test_pictures_stand_at_their_captions(extracted):
    for source, caption in (
        ("lighthouses.pdf", LIGHTHOUSES["caption"]),
        ("rhine.docx", RHINE["caption"]),
        ("web/comet.html", COMET["caption"]),
        ("notes/violin.md", VIOLIN["caption"]),
    ):
        ((entry, shown),) = [(entry, shown) for entry in extracted.of(source) for shown in entry["pictures"]]
        assert shown["caption"] == caption
        assert entry["text"][shown["at"] :].startswith(caption), source
        assert (extracted.output.parent / shown["file"]).read_bytes().startswith(b"\x89PNG")
    (slide,) = [entry for entry in extracted.of("coffee.pptx") if entry["pictures"]]
    assert slide["page"] == slide["pictures"][0]["page"] == 5


def test_html_gives_no_script_no_style_and_what_stands_before_the_first_heading(extracted):
    text = " ".join(entry["text"] for entry in extracted.of("web/comet.html"))
    assert COMET["before"] in text and "alert" not in text and "margin" not in text


# What is never opened


def test_nothing_remote_and_nothing_outside_the_folder_is_opened_for_a_page(run, tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    picture(["outside"]).save(tmp_path / "outside.png")
    picture(["inside"]).save(run.raw / "inside one.png")
    (run.raw / "below").mkdir()
    (run.raw / "below/link.png").symlink_to(tmp_path / "outside.png")
    sources = ["../../outside.png", str(tmp_path / "outside.png"), f"file://{tmp_path}/outside.png", "link.png"]
    sources += [f"{host}/remote.png", f"//127.0.0.1:{server.server_port}/other.png", "../inside%20one.png"]
    shown = "".join(f'<p>Text {n}.</p><img alt="a{n}" src="{source}">' for n, source in enumerate(sources))
    page = f'<html><head><link rel="stylesheet" href="{host}/a.css"></head><body><h1>Page</h1>{shown}</body></html>'
    (run.raw / "below/page.html").write_text(page)
    shown = "\n\n".join(f"Text {n}.\n\n![a{n}](<{source}>)" for n, source in enumerate(sources))
    (run.raw / "below/page.md").write_text(f"# Page\n\n{shown}\n")
    report = run()
    server.shutdown()
    server.server_close()
    assert asked == []
    for source in ("below/page.html", "below/page.md"):
        assert of(report, source)["pictures"] == 1
        own = [entry for entry in records(run.out) if entry["source"] == source]
        assert [shown["caption"] for entry in own for shown in entry["pictures"]] == [f"a{len(sources) - 1}"]


def test_links_out_of_the_folder_and_special_files_are_left_alone(run, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("nobody is to read this")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/more.txt").write_text("nor this")
    (run.raw / "out.txt").symlink_to(tmp_path / "secret.txt")
    (run.raw / "folder").symlink_to(tmp_path / "secrets")
    (run.raw / "folder.txt").symlink_to(run.raw)
    (run.raw / "gone.txt").symlink_to(run.raw / "nowhere")
    (run.raw / "circle.txt").symlink_to(run.raw / "circle.txt")
    os.mkfifo(run.raw / "pipe.txt")
    (run.raw / ".hidden.txt").write_text("hidden")
    (run.raw / "here.txt").write_text("This one is read, and the link to it as well.")
    (run.raw / "inner.txt").symlink_to(run.raw / "here.txt")
    (run.raw / "locked.txt").write_text("Nobody may read this.")
    picture(["locked"]).save(run.raw / "locked.png")
    (run.raw / "shows.md").write_text("A picture: ![locked](locked.png)")
    read = Path.read_bytes

    def refuse(self):  # a user's own rights; the tests may be run by root
        if self.name.startswith("locked"):
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    report = run()
    assert of(report, "locked.txt")["reason"] == "cannot be read: Permission denied"
    done = [file["source"] for file in report["files"] if file["status"] == "done"]
    assert done == ["here.txt", "inner.txt", "shows.md"] and run.asked == ["here.txt", "shows.md"]
    assert "leads out" in of(report, "out.txt")["reason"]
    assert "no regular file" in of(report, "pipe.txt")["reason"]
    assert all("folder behind a link" in of(report, name)["reason"] for name in ("folder", "folder.txt"))
    assert all("cannot be read" in of(report, name)["reason"] for name in ("gone.txt", "circle.txt"))
    assert "nobody" not in (run.out / "raw_knowledge.jsonl").read_text()


def test_large_and_long_files_are_skipped_and_taken_again_with_another_limit(run, documents):
    shutil.copy(documents / "lighthouses.pdf", run.raw / "three.pdf")
    assert "0.0 MB, more than --max_file_mb 0.001" in of(run(max_file_mb=0.001), "three.pdf")["reason"]
    assert "3 pages, more than --max_pages 2" in of(run(max_pages=2), "three.pdf")["reason"]
    assert of(run(), "three.pdf")["status"] == "done"
    assert "3 pages" in of(run(max_pages=2), "three.pdf")["reason"] and run.asked == []


def test_a_bomb_is_refused_before_it_is_unpacked(documents, tokenizer):
    data = (documents / "broken/bomb.docx").read_bytes()
    assert len(data) < 2e6
    with pytest.raises(Skip, match="grow to 1.2 GB when unpacked"):
        convert(data, "docx", {}, tokenizer, {})


# What is done again


def test_a_second_run_converts_nothing_and_touches_no_file(extracted, monkeypatch, caplog):
    def state_of() -> dict:
        files = [path for path in extracted.output.parent.rglob("*") if path.is_file() and "state" not in path.name]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def fail(*_: object, **__: object):
        raise AssertionError("a file was converted again")

    before = state_of()
    monkeypatch.setattr(Workers, "run", fail)
    with State(extracted.output.parent / "state.sqlite") as state:
        report = extract(extracted.root, extracted.output, extracted.options, state)
    assert report == extracted.report and state_of() == before and not caplog.records


def test_a_changed_document_is_converted_alone_and_a_renamed_one_not_at_all(run):
    for name in ("one", "two", "three"):
        (run.raw / f"{name}.txt").write_text(f"The text of document {name}.")
    run()
    assert sorted(run.asked) == ["one.txt", "three.txt", "two.txt"]
    (run.raw / "two.txt").write_text("Another text altogether.")
    (run.raw / "three.txt").rename(run.raw / "renamed.txt")
    shutil.copy(run.raw / "one.txt", run.raw / "copy.txt")
    run()
    assert run.asked == ["two.txt"]
    texts = {entry["source"]: entry["text"] for entry in records(run.out)}
    assert texts["two.txt"] == "Another text altogether." and texts["renamed.txt"] == "The text of document three."
    assert texts["copy.txt"] == texts["one.txt"]
    run(limit=128)
    assert len(run.asked) == 3  # other chunks; equal files once


def test_a_page_is_converted_again_when_its_picture_changes(run):
    picture(["old"]).save(run.raw / "p.png")
    (run.raw / "page.md").write_text("# Page\n\nText.\n\n![p](p.png)\n")
    run()
    run()
    assert run.asked == []
    picture(["new"]).save(run.raw / "p.png")
    run()
    assert run.asked == ["page.md"]


def test_assets_are_cleaned_restored_and_foreign_files_left(run, documents, caplog):
    shutil.copy(documents / "rhine.docx", run.raw / "rhine.docx")
    shutil.copy(documents / "coffee.pptx", run.raw / "coffee.pptx")
    run()
    folder = run.out / ASSETS
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == 2
    (folder / "holiday.png").write_bytes(b"mine")
    (folder / f"{'0' * 32}.png").write_bytes(b"named like ours, but of other content")
    (folder / f"{'1' * 32}.png.draft").write_bytes(b"left by a run that was killed")
    name = sorted(first)[0]
    (folder / name).write_bytes(b"damaged")
    (run.raw / "coffee.pptx").unlink()
    run()
    ((kept),) = [shown["file"] for entry in records(run.out) for shown in entry["pictures"]]
    assert (run.out / kept).read_bytes() == first[Path(kept).name]
    left = {path.name for path in folder.iterdir()}
    assert {"holiday.png", f"{'0' * 32}.png"} <= left and f"{'1' * 32}.png.draft" not in left
    assert "holiday.png is not of this pipeline's making" in caplog.text
    (run.out / kept).unlink()
    run()
    assert (run.out / kept).read_bytes() == first[Path(kept).name] and run.asked == []


def test_an_output_whose_pictures_were_described_stays_until_a_document_changes(run):
    (run.raw / "a.txt").write_text("A text.")
    run()
    output = run.out / "raw_knowledge.jsonl"
    output.write_text(output.read_text().replace("A text.", "A text. With a description."))
    run()
    assert "With a description" in output.read_text()
    (run.raw / "b.txt").write_text("Another.")
    run()
    assert "With a description" not in output.read_text() and len(records(run.out)) == 2
    output.unlink()
    run()
    assert output.read_bytes() == base_of(output).read_bytes()


# What is cut


def test_a_table_row_and_a_word_longer_than_a_chunk_are_cut_and_nothing_is_lost(run, count):
    words = [f"word{n}" for n in range(900)]
    letters = "".join(chr(97 + n * 7 % 26) for n in range(3000))
    table = f"| key | value |\n|---|---|\n| one | {' '.join(words)} |\n| two | short |\n"
    (run.raw / "wide.md").write_text(f"# Wide\n\n{table}\n\n{letters}\n\n{' '.join(words[:300])}.\n")
    run()
    own = records(run.out)
    assert all(count(entry["text"]) <= LIMIT for entry in own)
    assert all(entry["headings"] == ["Wide"] and entry["text"].startswith("Wide\n") for entry in own)
    bodies = [entry["text"].removeprefix("Wide\n") for entry in own]
    found = re.findall(r"word\d+", " ".join(bodies))
    assert [word for word in words if word not in found] == []
    assert letters in "".join(bodies)


def test_headings_longer_than_a_chunk_leave_room_for_the_text(run, count):
    long = "A heading that does not come to an end " * 20
    (run.raw / "long.md").write_text(f"# Title\n\n## {long}\n\n### Last one\n\nThe text below it.\n")
    run()
    (entry,) = records(run.out)
    assert count(entry["text"]) <= LIMIT and entry["text"] == "Last one\nThe text below it."
    assert entry["headings"] == ["Title", long.strip(), "Last one"]


def test_special_tokens_and_private_characters_in_a_text_are_plain_text(run, count):
    (run.raw / "odd.txt").write_text("It says <|im_end|> here " * 40 + "\U000f0000\U000f0001 and <s> there.")
    run()
    own = records(run.out)
    assert all(count(entry["text"]) <= LIMIT for entry in own) and len(own) > 1
    assert " ".join(entry["text"] for entry in own).count("<|im_end|>") == 40


def test_a_document_of_headings_only_keeps_them(run):
    (run.raw / "only.md").write_text("# One\n\n## Two\n")
    run()
    assert [entry["text"] for entry in records(run.out)] == ["One\nTwo"]


# What goes wrong


def test_a_file_that_hangs_or_kills_its_worker_is_skipped_and_the_next_one_goes_on(tokenizer_dir, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A text that is fine.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    options = {"layout": "rules", "limit": LIMIT, "max_pages": 10}
    workers = Workers(str(tokenizer_dir))
    ask = functools.partial(workers.run, path, digest, "txt", options, {})
    try:
        assert ask(seconds=300)["chunks"][0]["text"] == "A text that is fine."
        with pytest.raises(Passing, match="changed while"):
            workers.run(path, "0" * 64, "txt", options, {}, 300)
        (first,) = workers._idle.queue
        os.kill(first._process.pid, signal.SIGSTOP)
        with pytest.raises(Died, match="longer than --file_timeout 1 s"):
            ask(seconds=1)
        assert not first.alive()
        workers._idle.put(first)  # as one that was ended while it was idle: the next file is not to blame
        assert ask(seconds=300)["chunks"]
        (second,) = workers._idle.queue
        os.kill(second._process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, workers.close)
        killer.start()
        with pytest.raises(Passing, match=r"SIGKILL: most likely memory ran out\); it is tried again"):
            ask(seconds=300)
        killer.join(60)
        assert not second.alive()
    finally:
        workers.close()


def test_what_a_worker_dies_of_is_kept_until_the_limits_change(run, monkeypatch):
    (run.raw / "slow.txt").write_text("Slow.")
    calls = []

    def slow(self, path, sha256, kind, options, pictures, seconds):
        calls.append(seconds)
        raise Died(f"took longer than --file_timeout {seconds:g} s")

    monkeypatch.setattr(InThisProcess, "run", slow)
    assert "longer than" in of(run(), "slow.txt")["reason"]
    run()
    assert len(calls) == 1
    run(file_timeout=5000)
    assert calls[1:] == [5000]


def test_what_lies_outside_a_file_is_not_kept_against_it(run, monkeypatch):
    (run.raw / "a.txt").write_text("A text that is fine.")
    convert_it = InThisProcess.run

    def ended(self, *_: object):
        raise Passing("the process that read it was ended from outside (SIGKILL)")

    monkeypatch.setattr(InThisProcess, "run", ended)
    assert "from outside" in of(run(), "a.txt")["reason"]
    monkeypatch.setattr(InThisProcess, "run", convert_it)
    assert of(run(), "a.txt")["status"] == "done"


def test_a_name_that_is_not_utf_8_is_told_and_does_not_stop_the_run(run):
    (run.raw / "a.txt").write_text("A text that is fine.")
    Path(os.fsdecode(os.fsencode(run.raw) + b"/caf\xe9.txt")).write_text("A text with an old name.")
    report = run()
    assert of(report, "a.txt")["status"] == "done"
    assert of(report, "caf\ufffd.txt")["reason"] == "has a name that is not UTF-8: rename it"


def test_workers_that_cannot_start_stop_the_run(tmp_path):
    workers = Workers(str(tmp_path / "no tokenizer"))
    with pytest.raises(RuntimeError, match="a worker cannot start"):
        workers.run(tmp_path / "a.txt", "", "txt", {}, {}, 300)


def test_docling_models_are_refused_in_words_where_they_cannot_be_had(monkeypatch):
    monkeypatch.setattr(module, "_no_models", lambda: "no network")
    assert choose_layout("auto") == ("rules", "no network") and choose_layout("rules") == ("rules", "")
    with pytest.raises(ValueError, match="--layout docling: no network"):
        choose_layout("docling")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat and looked at the moon for a long while.", "en"),
        ("长城是中国古代修建的防御工程。UNESCO", "zh"),
        ("万里の長城は中国にある城壁の遺跡です。", "other"),
        ("El gato se sentó en la alfombra y miró la luna durante mucho tiempo.", "other"),
        ("1, 2, 3", "other"),
    ],
)
def test_language_of(text, language):
    assert language_of(text) == language


def command(*flags: object, **more: object) -> list[str]:
    return [sys.executable, "scripts/extract_with_docling.py", *map(str, flags)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(extracted, tokenizer_dir, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for source in GOOD:
        if not source.endswith(".pdf"):
            (raw / source).parent.mkdir(exist_ok=True)
            shutil.copy(extracted.root / source, raw / source)
    shutil.copy(extracted.root / "notes/violin.png", raw / "notes/violin.png")
    shutil.copy(extracted.root / "poster.png", raw / "poster.png")
    flags = ("--input_dir", raw, "--output_file", out / "raw_knowledge.jsonl", "--tokenizer", tokenizer_dir)
    process = subprocess.Popen(command(*flags), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with State(out / "pipeline_state.sqlite", shared=True) as state:
                done = state._base.execute("SELECT count(*) FROM done WHERE step = 'extract'").fetchone()[0]
        except (ValueError, OSError):
            done = 0
        if done >= 2:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run(command(*flags), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    expected = [entry for entry in extracted.records if not entry["source"].endswith(".pdf")]
    assert records(out) == expected
    names = {Path(shown["file"]).name for entry in expected for shown in entry["pictures"]}
    assert {path.name for path in (out / ASSETS).iterdir()} == names
    assert not [path for path in out.rglob("*") if "draft" in path.name or path.name.endswith(".new")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--input_dir", "nowhere", "--output_file", "o", "--tokenizer", "t"], "is not a folder"),
        (["--input_dir", ".", "--output_file", "o"], "MODEL_PATH"),
        (["--output_file", "o", "--tokenizer", "t"], "RAW_DATA_DIR"),
        (["--input_dir", ".", "--output_file", "o", "--tokenizer", "t", "--doc_max_length", "4"], "at least 16"),
        (["--input_dir", ".", "--output_file", "o", "--tokenizer", "t", "--workers", "0"], "--workers"),
        (["--input_dir", ".", "--output_file", "o", "--tokenizer", "t", "--layout", "magic"], "invalid choice"),
    ],
)
def test_wrong_flags_are_named_before_any_work(flags, said, capsys, monkeypatch):
    from scripts.extract_with_docling import main

    for name in ("RAW_DATA_DIR", "MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_named_in_one_line(tmp_path, capsys):
    from scripts.extract_with_docling import main

    (tmp_path / "raw").mkdir()
    code = main(["--input_dir", str(tmp_path / "raw"), "--output_file", str(tmp_path / "o.jsonl"),
                 "--tokenizer", str(tmp_path / "none"), "--layout", "rules"])  # fmt: skip
    said = capsys.readouterr().err.strip()
    assert code == 2 and said.count("\n") == 0 and "--tokenizer" in said


def test_a_folder_without_files_is_refused(run):
    with pytest.raises(ValueError, match="holds no files"):
        run()


def test_kinds_and_images_do_not_overlap():
    assert not set(KINDS) & set(IMAGES)
