"""What is left out before records are made, and which document is on which side."""

import itertools
import random
from pathlib import Path

import pytest

from openrlhf.pipeline.near_duplicates import near_duplicates, shingles, tokens, versions
from openrlhf.pipeline.samples import Sample, collect, fault, language_of, read_chunks, split
from tests.pipeline.collection import chunk, library, passages, synthesized, write

LIGHTHOUSE = (
    "Pharos\nThe lighthouse of Alexandria stood on the island of Pharos. It was built under Ptolemy II and stood about "
    "one hundred metres high. Earthquakes between 956 and 1323 brought it down, and its stones went into a fort."
)
HARBOUR = (
    "Harbour\nThe harbour of Rotterdam is the largest in Europe. The Nieuwe Waterweg, dug between 1866 and 1872, joins "
    "it to the sea, and the Maasvlakte, won from the sea, has terminals for the largest container ships."
)


def collected(tmp_path: Path, chunks: list[dict], samples: list[dict], seed: int = 42, share: float = 0.1):
    folder = write(tmp_path / "in", chunks, samples)
    return collect(read_chunks(folder / "raw_knowledge.jsonl"), folder / "synthesized.jsonl", seed, share)


def test_tokens_are_words_and_single_chinese_characters():
    assert tokens("The Pharos, 100 m high: 灯塔很高") == ["the", "pharos", "100", "m", "high", "灯", "塔", "很", "高"]


def brute_force(texts: list[str], threshold: float) -> list[int]:
    kept_as: list[int] = []
    sets = [set(shingles(text, 3).tolist()) for text in texts]
    for i, own in enumerate(sets):
        near = (j for j in range(i) if kept_as[j] == j and own and len(own & sets[j]) >= threshold * len(own | sets[j]))
        kept_as.append(next(near, i))
    return kept_as


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_the_definition(threshold):
    draw = random.Random(1)
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    texts = [" ".join(draw.choice(words[: draw.randint(1, 7)]) for _ in range(draw.randint(0, 12))) for _ in range(400)]
    assert near_duplicates(texts, threshold) == brute_force(texts, threshold)
    assert len(set(near_duplicates(texts, threshold))) < 400


def test_versions_share_most_of_the_smaller_document():
    texts = [f"{p['title']}\n{p['text']}" for p in passages()[:12]]
    whole = "\n".join(texts[:3])
    edited = whole.replace("the", "a", 5)
    part = texts[1]
    assert versions([whole, texts[4], edited, part, texts[5]], 0.6) == [0, 1, 0, 0, 4]
    assert versions(["", "", "?!"], 0.6) == [0, 1, 2]


def test_boilerplate_in_very_many_documents_joins_nothing():
    footer = "this page may be printed for private use only and must not be sold to anyone else at all"
    texts = [f"{footer} number{i} item{i}" for i in range(1200)]
    assert len(set(versions(texts, 0.6))) == 1200
    assert len(set(versions(texts[:50], 0.6))) == 1


def test_a_near_duplicate_chunk_and_its_samples_go(tmp_path):
    chunks = [
        chunk("a.txt", 0, LIGHTHOUSE),
        chunk("b.txt", 0, HARBOUR),
        chunk("c.txt", 0, LIGHTHOUSE.replace("into a fort.", "to a fort.")),
    ]
    samples = [
        synthesized(chunks[0], [("Where did the lighthouse stand?", "On the island of Pharos")]),
        synthesized(chunks[2], [("What became of its stones?", "They went into a fort")]),
    ]
    found = collected(tmp_path, chunks, samples)
    assert list(found.chunks) == ["a.txt#0", "b.txt#0"]
    assert [sample.answer for sample in found.samples] == ["On the island of Pharos"]
    assert found.dropped.counts == {"near-duplicate chunk": 1, "its chunk is a near-duplicate": 1}
    assert found.groups == {"a.txt": "a.txt", "b.txt": "b.txt", "c.txt": "a.txt"}


def test_of_near_duplicate_chunks_the_one_with_samples_stays(tmp_path):
    chunks = [chunk("a.txt", 0, LIGHTHOUSE), chunk("b.txt", 0, LIGHTHOUSE)]
    samples = [synthesized(chunks[0], accepted=False), synthesized(chunks[1], [("Where did it stand?", "On Pharos")])]
    found = collected(tmp_path, chunks, samples)
    assert list(found.chunks) == ["b.txt#0"] and len(found.samples) == 1


def test_a_question_over_two_chunks_follows_the_kept_one(tmp_path):
    chunks = [chunk("a.txt", 0, LIGHTHOUSE), chunk("b.txt", 0, LIGHTHOUSE), chunk("b.txt", 1, HARBOUR)]
    hop = {"question": "Which is older, Pharos or Rotterdam?", "answer": "Pharos", "chunks": ["b.txt#0", "b.txt#1"]}
    samples = [synthesized(chunks[0], [("Where was it?", "On Pharos")]), synthesized(chunks[2], multi_hop=[hop])]
    found = collected(tmp_path, chunks, samples)
    assert {sample.chunks for sample in found.samples if sample.kind == "multi_hop"} == set()
    assert found.dropped.counts["chunks of several documents"] == 1


def test_questions_that_ask_the_same_are_asked_once(tmp_path):
    chunks = [chunk("a.txt", 0, LIGHTHOUSE), chunk("b.txt", 0, HARBOUR)]
    samples = [
        synthesized(
            chunks[0],
            [
                ("On which island did the lighthouse of Alexandria stand?", "Pharos"),
                ("On which island did the lighthouse of Alexandria then stand?", "The island of Pharos"),
                (
                    "Between which years did earthquakes bring down the old lighthouse of Alexandria, 956 or 957?",
                    "956 and 1323",
                ),
                (
                    "Between which years did earthquakes bring down the old lighthouse of Alexandria, 956 or 958?",
                    "956 and 1323",
                ),
                ("How high was it?", "About one hundred metres"),
            ],
        ),
        synthesized(
            chunks[1],
            [("How high was it?", "Not told"), ("On which island did the lighthouse of Alexandria stand?", "Pharos")],
        ),
    ]
    found = collected(tmp_path, chunks, samples)
    assert found.dropped.counts == {"near-duplicate question": 2, "question asked before, with another answer": 1}
    kept = {sample.question: sample for sample in found.samples}
    assert len(kept) == 4 and sum("earthquakes" in question for question in kept) == 2
    assert kept["How high was it?"].also == {"b.txt#0"}
    assert any(sample.also == {"a.txt#0", "b.txt#0"} for sample in found.samples)


@pytest.mark.parametrize(
    ("kind", "question", "answer", "reason"),
    [
        ("simple_qa", "", "Pharos", "empty question"),
        ("simple_qa", "??", "Pharos", "empty question"),
        ("simple_qa", "Where was it?", "…", "empty answer"),
        ("simple_qa", "Where was it?", "\ud800", "empty answer"),
        ("simple_qa", "Where was it?", "x " * 200, "answer longer than its passage"),
        ("simple_qa", "What does this passage say about Pharos?", "It", "question that names its passage"),
        ("simple_qa", "According to the text, where was it?", "On Pharos", "question that names its passage"),
        ("simple_qa", "What is the text about?", "Pharos", "question that names its passage"),
        ("complex_qa", "Who built it, as described in the document?", "Ptolemy", "question that names its passage"),
        ("simple_qa", "What is the author's view?", "None", "question that names its passage"),
        ("simple_qa", "根据上文，灯塔在哪里？", "法罗斯岛", "question that names its passage"),
        ("simple_qa", "本文主要讲了什么？", "灯塔", "question that names its passage"),
        ("simple_qa", "这段文字说了什么？", "灯塔", "question that names its passage"),
        ("simple_qa", "日本文化何时传入？", "七世纪", None),
        ("simple_qa", "晚上文艺演出在哪里？", "法罗斯岛", None),
        ("simple_qa", "文中提到的岛叫什么？", "法罗斯岛", "question that names its passage"),
        ("paraphrase", "", LIGHTHOUSE.upper(), "paraphrase that copies its passage"),
        ("summary", "", " ", "empty summary"),
        ("simple_qa", "Which text editor came first?", "ed", None),
        ("simple_qa", "Who signed the document of surrender in 1945?", "Keitel", None),
        ("simple_qa", "When was the passage of the bill?", "1832", None),
        ("simple_qa", "How did the passage to India become shorter?", "By a canal", None),
        ("simple_qa", "Is it translated in 英文中的灯塔?", "Yes", None),
        ("simple_qa", "灯塔在哪个岛上？", "法罗斯岛", None),
        ("paraphrase", "", "The tower was on an island.", None),
    ],
)
def test_samples_nobody_can_learn_from_are_named(kind, question, answer, reason, tmp_path):
    of = read_chunks(write(tmp_path, [chunk("a.txt", 0, LIGHTHOUSE)], []) / "raw_knowledge.jsonl")[0]
    sample = Sample("1", kind, question, answer, "en", (of.id,), of.source, "m", 1)
    assert fault(sample, {of.id: of}) == reason


def test_a_chunk_that_changed_since_synthesis_gives_no_sample(tmp_path):
    old, new = chunk("a.txt", 0, LIGHTHOUSE), chunk("a.txt", 0, LIGHTHOUSE + " More.")
    gone = chunk("gone.txt", 0, HARBOUR)
    pairs = [("Where was it?", "On Pharos")]
    hop = [{"question": "Which is older?", "answer": "Pharos", "chunks": ["b.txt#0", "gone.txt#0"]}]
    other = chunk("b.txt", 0, HARBOUR)
    samples = [synthesized(old, pairs), synthesized(gone, pairs), synthesized(other, multi_hop=hop)]
    found = collected(tmp_path, [new, other], samples)
    assert not found.samples and found.dropped.counts == {"chunk changed since synthesis": 3}


def test_the_order_of_lines_changes_nothing(tmp_path):
    chunks, samples = library(8)
    one = collected(tmp_path / "one", chunks, samples)
    other = collected(tmp_path / "other", chunks[::-1], samples[::-1])
    assert one.samples == other.samples and one.side == other.side and list(one.chunks) == list(other.chunks)


def weighted(sources: list[str], each: int = 10) -> list[Sample]:
    names = itertools.count()
    return [
        Sample(str(next(names)), "simple_qa", "q", "a", "en", (s,), s, "m", 1) for s in sources for _ in range(each)
    ]


def test_a_documents_side_stays_when_others_come(tmp_path):
    sources = [f"{i}.pdf" for i in range(300)]
    groups = {source: source for source in sources}
    few, many = ({s: groups[s] for s in sources[:n]} for n in (200, 300))
    before, after = split(few, weighted(sources[:200]), 42, 0.1), split(many, weighted(sources), 42, 0.1)
    assert before == {source: after[source] for source in before}
    assert 10 < list(after.values()).count("eval") < 50
    assert split(many, weighted(sources), 43, 0.1) != after


def test_versions_of_a_document_are_on_one_side():
    groups = {f"{i}.{kind}": f"{i}.docx" for i in range(100) for kind in ("docx", "pdf")}
    side = split(groups, weighted(list(groups)), 42, 0.2)
    assert all(side[f"{i}.docx"] == side[f"{i}.pdf"] for i in range(100)) and "eval" in side.values()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("documents", [2, 3, 5])
def test_few_documents_still_give_both_sides(documents, seed):
    groups = {f"{i}.txt": f"{i}.txt" for i in range(documents)}
    side = split(groups, weighted(list(groups)), seed, 0.1)
    assert set(side.values()) == {"train", "eval"}
    held = sum(value == "eval" for value in side.values())
    assert 2 * held <= documents


def test_the_whole_is_never_held_out():
    assert split({"a": "a"}, weighted(["a"]), 1, 0.9) == {"a": "train"}
    groups = {name: name for name in "abcd"}
    assert set(split(groups, weighted(["a", "b", "c", "d"]), 1, 0.99).values()) == {"train", "eval"}
    assert set(split(groups, weighted(["a", "b", "c", "d"]), 1, 0.0).values()) == {"train"}
    big = weighted(["a"], 90) + weighted(["b"], 10)
    assert split({"a": "a", "b": "b"}, big, 5, 0.1)["a"] == "train"
    assert split({"a": "a", "b": "b"}, weighted(["a"]), 5, 0.1) == {"a": "train", "b": "train"}


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", " is no JSON object"), ("[1]", " is no JSON object"), ('{"id": "a"}', ": no chunk of the extraction")],
)
def test_a_line_that_is_no_chunk_is_named(line, told, tmp_path):
    path = tmp_path / "raw_knowledge.jsonl"
    good = write(tmp_path / "good", [chunk("a.txt", 0, LIGHTHOUSE)], []) / "raw_knowledge.jsonl"
    path.write_text(good.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"raw_knowledge.jsonl:2{told}"):
        read_chunks(path)


@pytest.mark.parametrize("wrong", [{"simple_qa": ["text"]}, {"simple_qa": 3}, {"rounds": "many"}])
def test_a_line_that_synthesis_would_not_write_is_named(wrong, tmp_path):
    of = chunk("a.txt", 0, LIGHTHOUSE)
    with pytest.raises(ValueError, match="the line of a.txt#0 in synthesized.jsonl is not what synthesis writes"):
        collected(tmp_path, [of], [{**synthesized(of, [("Where was it?", "On Pharos")]), **wrong}])


def test_two_chunks_with_one_id_are_refused(tmp_path):
    folder = write(tmp_path, [chunk("a.txt", 0, LIGHTHOUSE), chunk("a.txt", 0, HARBOUR)], [])
    with pytest.raises(ValueError, match="'a.txt#0' stands there twice"):
        read_chunks(folder / "raw_knowledge.jsonl")


def test_language_of_tells_chinese_from_the_rest():
    assert [language_of(text) for text in ("灯塔很高", "A lighthouse", "GPU 是一种处理器", "", "Leuchtturm")] == [
        "zh", "en", "zh", "en", "en"
    ]  # fmt: skip


def test_hashes_are_the_same_in_every_process():
    assert shingles("one two three", 3).tolist() == [3979988357744751972]
