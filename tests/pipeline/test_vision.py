"""Images become text: what is refused, what is asked and when, and where the description goes."""

import base64
import hashlib
import http.server
import io
import json
import os
import shutil
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("PIL")

from PIL import Image

from openrlhf.pipeline.endpoint import EndpointError
from openrlhf.pipeline.extract import base_of, record
from openrlhf.pipeline.files import write_lines
from openrlhf.pipeline.images import MAX_SIDE, BadImage, jpeg_of
from openrlhf.pipeline.state import State
from openrlhf.pipeline.vision import PART, described, see, standalone, summary, unseen
from tests.pipeline.conftest import LIMIT
from tests.pipeline.make_documents import BAD_IMAGES, IMAGES, picture

KEY = "sk-not-to-be-seen"


def saved(image, kind: str = "PNG", **options) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def opened(data: bytes):
    return Image.open(io.BytesIO(jpeg_of(data)[0]))


# Images


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"this is text", "not an image"),
        (b"", "not an image"),
        (saved(picture(["x"], (500, 31))), "smaller than 32"),
        (saved(Image.new("RGB", (100, 100), "navy")), "one colour"),
        (saved(Image.new("RGBA", (100, 100), (200, 10, 10, 0))), "one colour"),
        (saved(picture(["x"]), "JPEG")[:-400], "damaged"),
        (saved(picture(["x"]))[:-400], "damaged"),
    ],
)
def test_images_of_no_use_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        jpeg_of(data)


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_bomb_is_refused_by_its_header(side):
    data = bytearray(saved(picture(["x"])))
    data[16:24] = side.to_bytes(4, "big") * 2  # width and height in the header of a PNG
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(BadImage, match="than can be unpacked safely"):
        jpeg_of(bytes(data))


def test_images_are_upright_flat_and_small():
    turned = Image.Exif()
    turned[0x0112] = 6
    assert opened(saved(picture(["x"], (640, 360)), "JPEG", exif=turned)).size == (360, 640)
    clear = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 50, 100))
    flat = opened(saved(clear))
    assert flat.mode == "RGB" and min(flat.getpixel((90, 50))) > 250 and flat.getpixel((20, 50))[2] > 240
    assert max(opened(saved(picture(["x"], (6000, 90)))).size) == MAX_SIDE
    for mode in ("1", "L", "LA", "P", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert opened(saved(picture(["mode"]).convert(mode), kind)).mode == "RGB"


def test_sixteen_bits_keep_their_shades():
    ramp = np.tile(np.linspace(1000, 5000, 256).astype(np.uint16), (64, 1))
    shades = np.asarray(opened(saved(Image.fromarray(ramp))))[32, :, 0].astype(int)
    assert shades[0] < 10 and shades[-1] > 245 and abs(shades[128] - 128) < 10


# Text


def words(text: str) -> Counter:
    return Counter(text.split())


def entry_of(text: str, *pictures: dict, headings=("Title", "Part")) -> dict:
    about = {"source": "a.pdf", "sha256": "0" * 64}
    return record(about, 3, text, "rules", "Title", 2, list(headings), list(pictures))


def shown(name: str, at: int) -> dict:
    return {"file": name, "page": 2, "caption": "", "at": at}


TEXT = "Title\nPart\nThe first paragraph.\nFigure 1: A bridge.\nThe last paragraph."


def test_a_description_stands_at_the_pictures_place(count):
    entry = entry_of(TEXT, shown("a.png", TEXT.index("Figure")), shown("b.png", len(TEXT)), shown("c.png", 0))
    (found,) = described(entry, {"a.png": "Two arches.", "b.png": "A river."}, LIMIT, count)
    assert found["text"] == (
        "Title\nPart\nThe first paragraph.\nTwo arches.\nFigure 1: A bridge.\nThe last paragraph.\nA river."
    )
    by_file = {picture["file"]: picture for picture in found["pictures"]}
    for name, text in (("a.png", "Two arches."), ("b.png", "A river.")):
        assert by_file[name]["description"] == text and found["text"][by_file[name]["at"] :].startswith(text)
    assert by_file["c.png"]["description"] is None and by_file["c.png"]["at"] <= len("Title\nPart\n")
    assert found["id"] == "a.pdf#3" and found["sha256"] == hashlib.sha256(found["text"].encode()).hexdigest()


def test_without_a_description_a_record_is_as_it_was(count):
    entry = entry_of(TEXT, shown("a.png", 5))
    assert described(entry, {"other.png": "Words."}, LIMIT, count) == [entry]


@pytest.mark.parametrize("headings", [("Title", "Part"), (), ("A heading of many words " * 40,)])
def test_a_chunk_that_becomes_too_long_is_cut_and_nothing_is_lost(count, headings):
    long = " ".join(f"The value of bar number {n} is {n * 7}." for n in range(60))
    prefix = "Title\nPart\n" if headings == ("Title", "Part") else ""
    text = f"{prefix}The first paragraph.\nFigure 1: A bridge.\nThe last paragraph."
    entry = entry_of(text, shown("a.png", text.index("Figure")), shown("b.png", len(text)), headings=headings)
    parts = described(entry, {"a.png": long, "b.png": "A river."}, LIMIT, count)
    assert len(parts) > 1 and all(count(part["text"]) <= LIMIT for part in parts)
    assert [part["number"] for part in parts] == [3 + PART * n for n in range(len(parts))]
    bodies = " ".join(part["text"].removeprefix(prefix) for part in parts)
    assert words(bodies) == words(text.removeprefix(prefix)) + words(long) + words("A river.")
    assert bodies.index("first paragraph") < bodies.index("bar number 0 ") < bodies.index("Figure 1")
    assert [picture["file"] for part in parts for picture in part["pictures"]] == ["a.png", "b.png"]
    assert all(part["text"].startswith(prefix) for part in parts)


def test_a_standalone_image_is_a_document_of_its_own(count):
    about = {"file": "maps/harbour.png", "sha256": "1" * 64, "description": "A harbour. " * 100}
    parts = standalone(about, LIMIT, count)
    assert parts[0]["id"] == "maps/harbour.png#0" and parts[1]["number"] == PART
    assert all(part["text"].startswith("harbour\nA harbour.") and count(part["text"]) <= LIMIT for part in parts)
    assert words(" ".join(part["text"] for part in parts))["A"] == 100


# The offline model


def test_rapidocr_reads_images_and_assets_of_the_folder(extracted, count):
    pytest.importorskip("docling")
    kept = base_of(extracted.output).read_bytes()
    with State(extracted.output.parent / "state.sqlite") as state:
        report = see(extracted.root, extracted.output, "rapidocr", state, LIMIT, count)
        first = extracted.output.read_bytes(), extracted.output.stat().st_mtime_ns
        see(extracted.root, extracted.output, "rapidocr", state, LIMIT, count)
        assert (extracted.output.read_bytes(), extracted.output.stat().st_mtime_ns) == first
    status = {about["file"]: about for about in report["images"]}
    assert set(status) == {*IMAGES, *BAD_IMAGES}
    for name, word in BAD_IMAGES.items():
        assert status[name]["status"] == "skipped" and word in status[name]["reason"], status[name]
    texts = {entry["source"]: entry["text"] for entry in extracted.records}
    assert "HARBOUR OFFICE" in texts["sign.jpg"] and "next return in 2061" in texts["poster.png"]
    (slide,) = [entry for entry in extracted.of("coffee.pptx") if entry["pictures"]]
    assert slide["text"].startswith("A strong espresso\n") and "9 bar pressure" in slide["text"]
    assert slide["pictures"][0]["description"] in slide["text"]
    assert all(count(entry["text"]) <= LIMIT for entry in extracted.records)
    assert extracted.records == sorted(extracted.records, key=lambda entry: (entry["source"], entry["number"]))
    table = summary(report)
    assert "3 described" in table and "broken/tiny.png" in table
    unseen(extracted.output)
    assert extracted.output.read_bytes() == kept == base_of(extracted.output).read_bytes()


# An endpoint


class Server(http.server.ThreadingHTTPServer):
    """Describes a picture by its size, as it is in the JPEG it was sent; `faults` come first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[tuple[int, bytes]] = []
        self.delay = 0.0
        self.refuses: tuple[str, ...] = ()
        self.asked: list[dict] = []
        self.keys: set[str] = set()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.answer(200, json.dumps({"object": "list", "data": []}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.add(self.headers["authorization"])
        time.sleep(self.server.delay)
        if self.server.faults:
            return self.answer(*self.server.faults.pop(0))
        for name in self.server.refuses:
            if name in body:
                said = f"Unsupported: '{name}'. Use 'max_completion_tokens' instead of 'max_tokens'."
                return self.answer(400, json.dumps({"error": {"message": said}}).encode())
        told, shown = body["messages"][0]["content"]
        assert told["type"] == "text" and "Describe this picture" in told["text"]
        kind, data = shown["image_url"]["url"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
        return self.answer(200, reply(f"A picture of {width} by {height} pixels."))

    def answer(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("content-type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def place(tmp_path, monkeypatch, count):
    """A folder with an image and a document's picture; `place.see()` describes them at `place.server`."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    (out / "extracted_assets").mkdir(parents=True)
    raw.mkdir()
    picture(["one"], (320, 200)).save(raw / "one.jpg")
    picture(["two"], (400, 240)).save(out / "extracted_assets/two.png")
    picture(["one"], (320, 200)).save(out / "extracted_assets/three.png")
    names = ("extracted_assets/two.png", "extracted_assets/three.png")
    entry = entry_of(TEXT, *(shown(name, TEXT.index("Figure")) for name in names))
    write_lines(out / "raw_knowledge.jsonl", [entry])
    with serving() as server:
        monkeypatch.setenv("BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001, raising=False)
        monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.002, raising=False)

        class Place:
            folder, output = out, out / "raw_knowledge.jsonl"

            def see(self, model: str = "seer", workers: int = 1) -> dict:
                with State(out / "state.sqlite") as state:
                    return see(raw, self.output, model, state, LIMIT, count, workers)

            def texts(self) -> list[str]:
                return [json.loads(line)["text"] for line in self.output.read_text().splitlines()]

        place = Place()
        place.server = server
        yield place


def test_an_endpoint_is_asked_once_for_each_picture(place):
    place.see()
    assert len(place.server.asked) == 3 and place.server.keys == {f"Bearer {KEY}"}
    assert {body["model"] for body in place.server.asked} == {"seer"}
    document, image = place.texts()
    assert "\nA picture of 400 by 240 pixels.\nA picture of 320 by 200 pixels.\nFigure 1" in document
    assert image == "one\nA picture of 320 by 200 pixels."
    before = place.output.read_bytes(), place.output.stat().st_mtime_ns
    place.see()
    assert len(place.server.asked) == 3
    assert (place.output.read_bytes(), place.output.stat().st_mtime_ns) == before
    place.see("another")
    assert len(place.server.asked) == 6
    for path in place.folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def reply(text: str) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "seer", "choices": [choice]}
    return json.dumps(whole).encode()


def test_equal_images_are_asked_for_once_though_at_the_same_time(place):
    raw = place.folder.parent / "raw"
    for number in range(4):
        (raw / f"copy{number}.jpg").write_bytes((raw / "one.jpg").read_bytes())
    place.server.delay = 0.3
    report = place.see(workers=4)
    assert len(place.server.asked) == 3
    assert [about["status"] for about in report["images"]] == ["described"] * 5


@pytest.mark.parametrize("workers", [1, 3])
def test_options_that_a_model_refuses_are_renamed_or_left_out(place, workers):
    place.server.delay, place.server.refuses = 0.1, ("max_tokens", "temperature")
    shutil.copy(place.folder / "extracted_assets/two.png", place.folder.parent / "raw/two.png")
    report = place.see(workers=workers)
    assert {about["status"] for about in report["images"] + report["pictures"]} == {"described"}
    last = place.server.asked[-1]
    assert last["max_completion_tokens"] == 1024 and not {"max_tokens", "temperature"} & set(last)


def test_what_a_model_thinks_is_no_description(place):
    place.server.faults = [(200, reply("<think>It may be a bridge.</think>\nA road.")), (200, reply("<think>It may"))]
    report = place.see()
    assert place.texts()[1] == "one\nA road."
    assert report["pictures"][0]["reason"] == "the model has nothing to say of it"


def test_an_image_whose_name_is_not_utf_8_is_told(place):
    os.link(place.folder.parent / "raw/one.jpg", os.fsencode(place.folder.parent / "raw") + b"/caf\xe9.jpg")
    report = place.see()
    assert [about["file"] for about in report["images"]] == ["caf\ufffd.jpg", "one.jpg"]
    assert "not UTF-8: rename it" in report["images"][0]["reason"]


@pytest.mark.parametrize(("status", "said"), [(401, "OPENAI_API_KEY"), (404, "seer")])
def test_a_wrong_key_or_model_ends_the_run_at_the_first_request(place, status, said):
    place.server.faults = [(status, b'{"error": {"message": "no"}}')] * 9
    before = place.output.read_bytes()
    with pytest.raises(EndpointError, match=said) as error:
        place.see()
    assert len(place.server.asked) == 1 and KEY not in str(error.value)
    assert place.output.read_bytes() == before


def test_a_server_that_is_busy_for_a_while_is_asked_again(place):
    place.server.faults = [(429, b"{}"), (500, b"{}"), (503, b"{}")]
    assert {about["status"] for about in place.see()["images"]} == {"described"}


def test_a_picture_that_fails_is_reported_and_asked_for_at_the_next_run(place):
    place.server.faults = [(200, b"<html>a page</html>")]
    report = place.see()
    assert report["images"][0]["status"] == "failed" and len(place.texts()) == 1
    assert [about["status"] for about in report["pictures"]] == ["described", "described"]
    assert place.see()["images"][0]["status"] == "described"
    assert len(place.server.asked) == 4 and len(place.texts()) == 2


def test_a_picture_that_the_server_refuses_is_left_out(place):
    place.server.faults = [(400, b'{"error": {"message": "this picture is not allowed"}}')]
    report = place.see()
    assert report["images"][0]["status"] == "skipped" and "not allowed" in report["images"][0]["reason"]
    assert [about["status"] for about in report["pictures"]] == ["described", "described"]


def test_a_server_that_fails_again_and_again_ends_the_run_and_what_was_done_is_kept(place):
    place.see("first")  # other descriptions than those below
    place.server.asked.clear()
    place.server.faults = [(200, b"<html>a page</html>")] * 3
    with pytest.raises(EndpointError, match="3 requests in a row failed"):
        place.see()
    place.server.faults = []
    place.see()
    assert "A picture of 400 by 240 pixels." in place.texts()[0]


def test_without_a_model_the_step_is_skipped_and_says_so(place, capsys, caplog, monkeypatch):
    from scripts.extract_images import main

    place.see()
    monkeypatch.delenv("VISION_MODEL", raising=False)
    flags = ["--input_dir", str(place.folder), "--output_file", str(place.output)]
    assert main(flags) == 0
    assert place.texts() == [TEXT]
    assert json.loads((place.folder / "vision_report.json").read_text())["model"] is None
    assert capsys.readouterr().err.count("VISION_MODEL is not set") == 1


@pytest.mark.parametrize(
    ("given", "folder"), [({"OUTPUT_DIR": "out"}, "out"), ({"DATA_PATH": "set"}, "set"), ({}, "data")]
)
def test_the_command_line_finds_the_chunks_by_itself(given, folder, tmp_path, monkeypatch):
    from scripts.extract_images import parse

    for name in ("OUTPUT_DIR", "DATA_PATH", "MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    args = parse(["--input_dir", str(tmp_path), "--model", "rapidocr", "--tokenizer", "t"])
    assert args.output_file == Path(folder, "raw_knowledge.jsonl")
    assert args.state == Path(folder, "pipeline_state.sqlite")


def test_the_command_line_takes_tokenizer_and_length_from_the_extraction(place, tokenizer_dir, capsys):
    from scripts.extract_images import main, parse

    options = {"tokenizer": str(tokenizer_dir), "doc_max_length": 48, "layout": "rules"}
    (place.folder / "extraction_report.json").write_text(json.dumps({"options": options, "files": []}))
    flags = ["--input_dir", str(place.folder.parent / "raw"), "--output_file", str(place.output), "--model", "seer"]
    assert parse(flags).doc_max_length == 48
    assert main(flags) == 0
    assert len(place.texts()) > 2 and "1 described" in capsys.readouterr().out
    place.server.faults = [(401, b"{}")]
    assert main([*flags[:-1], "third"]) == 2
    said = capsys.readouterr().err
    assert "OPENAI_API_KEY" in said and KEY not in said
    assert Path(place.output).is_file()
