"""Corpora are read as they stand: nothing is lost, nothing is changed, and what is wrong is named."""

import json
import random
import re

import pytest

from openrlhf.datasets.records import RecordError
from openrlhf.retrieval.corpus import Corpus, passages
from openrlhf.retrieval.store import Document


def words(text: str) -> int:
    return len(text.split())


def read(path, limit=5, **options) -> list[Document]:
    return list(Corpus(path, **options).documents(limit, words))


def jsonl(path, *lines) -> object:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_become_documents_with_all_that_they_hold(tmp_path):
    path = jsonl(
        tmp_path / "c.jsonl",
        {"id": 7, "text": "one " * 20, "title": "T", "page": 3, "source": "x", "tags": [1, {"a": None}]},
        "",
        {"id": "b", "contents": "two\x00\ud83d\ude00"},
        {"id": "c", "content": "three", "title": None, "page": None},
    )
    assert read(path) == [
        Document("7", "one " * 20, "T", 3, {"source": "x", "tags": [1, {"a": None}]}),  # never cut here
        Document("b", "two\x00😀"),
        Document("c", "three"),
    ]


def test_lines_are_cut_where_passages_of_a_length_are_asked_for(tmp_path):
    text = "One two three. Four five six. Seven."
    path = jsonl(
        tmp_path / "c.jsonl", {"id": "a", "text": text, "title": "T", "page": 2, "n": 1}, {"id": "b", "text": "x"}
    )
    found = read(path, limit=50, passage_tokens=5)
    assert " ".join(part.text for part in found[:-1]) == text and found[-1] == Document("b", "x")
    assert [part.id for part in found[:-1]] == ["a#1", "a#2"]
    assert all(words(f"{part.title} {part.text}") <= 5 and (part.title, part.page) == ("T", 2) for part in found[:-1])
    assert found[0].metadata == {"n": 1, "passage_of": "a"}


def test_without_an_id_the_content_is_the_id(tmp_path):
    path = jsonl(tmp_path / "c.jsonl", {"text": "a"}, {"text": "a", "n": 1}, {"text": "a", "title": "t"}, {"text": "b"})
    ids = [document.id for document in read(path)]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert [document.id for document in read(path)] == ids


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_line(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1, "text": "a"}\r\n{"id": 2, "text": "b"}\r\n')
    assert read(tmp_path / "c.jsonl") == [Document("1", "a"), Document("2", "b")]


BAD = {
    '{"text": "a"': "not JSON",
    "[1]": "a line must be a JSON object",
    '{"title": "a"}': "text is missing",
    '{"text": " "}': "text must be a text",
    '{"text": 4}': "text must be a text",
    '{"text": "a", "title": 4}': "title must be a text",
    '{"text": "a", "page": "4"}': "page must be a whole number",
    '{"text": "a", "page": true}': "page must be a whole number",
    '{"text": "a", "id": ""}': "id must be",
    '{"text": "a", "id": [1]}': "id must be",
    '{"text": "a\\ud800"}': "half a surrogate pair",
    '{"text": "a", "x": "\\ud800"}': "half a surrogate pair",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=list(BAD.values()))
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, line):
    path = jsonl(tmp_path / "c.jsonl", {"id": 1, "text": "a"}, line, {"id": 2, "text": "b"})
    with pytest.raises(RecordError, match=re.escape(f"{path}:2: ") + ".*" + BAD[line]):
        Corpus(path).check()
    corpus = Corpus(path, skip_bad=True)
    assert corpus.check() == 3 and corpus.skipped == 1
    for _ in range(2):
        assert list(corpus.documents(5, words)) == [Document("1", "a"), Document("2", "b")]
        assert corpus.skipped == 1 and corpus.position == 3
    assert corpus.first_skipped.startswith(f"{path}:2: ")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(RecordError, match="c.jsonl:2: not UTF-8 at byte 10 of the line"):
        Corpus(tmp_path / "c.jsonl").check()


def test_a_corpus_without_documents_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give a JSONL file, or a folder"):
        Corpus(tmp_path / "nothing.jsonl")
    with pytest.raises(RecordError, match="holds no usable line"):
        Corpus(jsonl(tmp_path / "c.jsonl", "", "")).check()
    with pytest.raises(RecordError, match="the first of 1 bad ones: .*c.jsonl:1: not JSON"):
        Corpus(jsonl(tmp_path / "c.jsonl", "{"), skip_bad=True).check()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").touch()
    with pytest.raises(RecordError, match="no .txt or .md file"):
        Corpus(tmp_path / "folder").check()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "b" / "deep").mkdir(parents=True)
    (root / "a").mkdir()
    (root / "z.txt").write_text("last of all")
    (root / "b" / "deep" / "one.MD").write_text("# One\n\nshort text\n")
    (root / "a" / "long.txt").write_text("One two three. Four five.\n\nSix seven eight nine ten eleven. Twelve.")
    (root / "a" / "picture.png").write_bytes(b"\x89PNG")
    return root


def test_a_folder_is_read_in_order_and_long_files_are_cut(folder):
    assert read(folder) == [
        Document("z.txt", "last of all"),
        Document("a/long.txt#1", "One two three. Four five.", metadata={"passage_of": "a/long.txt"}),
        Document("a/long.txt#2", "Six seven eight nine ten", metadata={"passage_of": "a/long.txt"}),
        Document("a/long.txt#3", "eleven. Twelve.", metadata={"passage_of": "a/long.txt"}),
        Document("b/deep/one.MD", "# One\n\nshort text"),
    ]
    assert Corpus(folder).check() == 3
    assert read(folder, passage_tokens=3) == read(folder, limit=3) != read(folder)
    assert read(folder, passage_tokens=9) == read(folder), "never more than is compressed"


def test_files_that_cannot_be_used_are_named(folder):
    (folder / "a" / "empty.txt").write_text(" \n")
    (folder / "b" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecordError, match=r"a/empty.txt: holds no text"):
        Corpus(folder).check()
    corpus = Corpus(folder, skip_bad=True)
    assert corpus.check() == 5 and corpus.skipped == 2
    (folder / "a" / "empty.txt").unlink()
    with pytest.raises(RecordError, match=r"b/latin.txt: not UTF-8 at byte 3"):
        Corpus(folder).check()


def test_passages_end_at_the_best_border_that_keeps_them_long():
    text = "One two. Three four five.\nSix\n\nSeven eight. Nine ten!\n\nEleven"
    assert passages(text, 6, words) == ["One two. Three four five.\nSix", "Seven eight. Nine ten!\n\nEleven"]
    assert passages(text, 5, words) == ["One two. Three four five.", "Six\n\nSeven eight. Nine ten!", "Eleven"]
    assert passages(text, 3, words)[:3] == ["One two.", "Three four five.", "Six"]
    assert passages("甲乙丙。丁戊己。庚", 5, len) == ["甲乙丙。", "丁戊己。庚"]
    assert passages("abcdefgh ij", 3, len) == ["abc", "def", "gh", "ij"]
    assert passages("short", 100, words) == ["short"] and passages(" \n", 5, words) == []


def test_a_heading_is_no_passage_of_its_own_but_begins_one():
    sentences = "One two three four five. Six seven eight nine ten."
    text = f"A heading\n\n{sentences} {sentences}"
    assert passages(text, 12, words) == [f"A heading\n\n{sentences}", sentences]
    assert passages(text.replace("\n\n", "\n"), 12, words) == [f"A heading\n{sentences}", sentences]
    assert passages(f"Three words here\n\n{sentences} {sentences}", 12, words)[0] == "Three words here", "a quarter"
    assert passages(f"A line\n{'Long ' * 11}sentence.", 12, words)[0] == "A line\n" + "Long " * 9 + "Long"
    assert passages(f"So be it. {'long ' * 14}end. No.", 16, words) == ["So be it.", f"{'long ' * 14}end. No."]


@pytest.mark.parametrize("limit", [1, 3, 7, 40])
def test_nothing_is_lost_in_cutting_and_no_passage_is_too_long(limit):
    def count(text: str) -> int:  # several tokens a word, as tokenizers have them
        return len(re.findall(r"\w{1,3}|\S", text))

    rng = random.Random(limit)
    for _ in range(300):
        pieces = [
            "".join(rng.choice("abcé東") for _ in range(rng.choice([1, 4, 9, 60])))
            + rng.choice([" ", "  ", ". ", "。", "\n", "\n \n", '." '])
            for _ in range(rng.randint(1, 40))
        ]
        text = "".join(pieces)
        parts = passages(text, limit, count)
        assert all(0 < count(part) <= limit for part in parts)
        assert "".join("".join(parts).split()) == "".join(text.split())


def test_a_long_text_is_cut_with_few_counts():
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text.split())

    text = "Some words in a sentence. " * 4000
    parts = passages(text, 256, count)
    assert len(parts) == pytest.approx(4000 * 5 / 256, rel=0.05)
    assert counted < 20 * len(text)
