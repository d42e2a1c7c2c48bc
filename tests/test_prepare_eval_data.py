"""scripts/prepare_eval_data.py: from the data sets' own files to evaluation records, on small files made by hand."""

import csv
import gzip
import importlib.util
import io
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from evaluation.questions import NORMAL, ORACLE, SUITES, dataset_files, load_questions
from openrlhf.datasets.records import record_rows

pytest.importorskip("bm25s")
from bm25s.stopwords import STOPWORDS_EN

REPOSITORY = Path(__file__).resolve().parents[1]
SUITE_FOLDERS = {"instruction_tuning_evaluation": 2, "end_to_end_evaluation": 4}
FILES = {"oracle": "eval_processed_with_pos.jsonl", "normal": "eval_processed_no_pos.jsonl"}

PASSAGES = {
    "Lise Meitner": ["Lise Meitner was an Austrian physicist.", "She was born in Vienna."],
    "Vienna": ["Vienna is the capital of Austria.", "It lies on the Danube."],
    "Otto Hahn": ["Otto Hahn was a German chemist.", "He worked with Meitner in Berlin."],
    "Berlin": ["Berlin is the capital of Germany.", "It lies on the Spree."],
    "Danube": ["The Danube is a river that ends in the Black Sea."],
    "Spree": ["The Spree is a river of Saxony."],
    "Heron": ["A heron is a wading bird.", "Herons nest in colonies."],
    "Ardea": ["Ardea cinerea has grey feathers and eats frogs."],
    "Basalt": ["Basalt is a dark volcanic rock."],
    "Iceland": ["Iceland is an island of volcanic rock."],
    "Reykjavik": ["Reykjavik is the capital of Iceland."],
    "Sake": ["Sake is brewed from rice."],
}
# question, answers, titles of the gold passages, titles of the question's own passages
QUESTIONS = [
    ("Which river flows through the birthplace of Lise Meitner?", ["Danube", "the Donau"], ["Lise Meitner", "Vienna"]),
    ("On which river lies the city where Otto Hahn worked?", ["Spree"], ["Otto Hahn", "Berlin"]),
    ("What does the wading heron eat?", ["frogs"], ["Heron", "Ardea"]),
    ("Which rock makes up the island with the capital Reykjavik?", ["volcanic rock"], ["Reykjavik", "Iceland"]),
    ("Is basalt dark?", ["yes"], ["Basalt"]),
    ("What is brewed from rice?", ["Sake"], ["Sake"]),
]


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_eval_data", REPOSITORY / "scripts/prepare_eval_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def own_titles(number):
    """The question's golds among distractors; together the questions cover all passages."""
    titles = list(PASSAGES)
    golds = QUESTIONS[number][2]
    return [*titles[2 * number : 2 * number + 2], *golds, titles[(5 * number + 3) % 12]]


def contexts(number):
    return list(dict.fromkeys(own_titles(number)))


def hotpotqa():
    return [
        {
            "_id": f"hp{n}",
            "question": question,
            "answer": answers[0],
            # A sentence number beyond the passage's end does not matter.
            "supporting_facts": [[title, 7 * (n == 0)] for title in golds],
            "context": [[t, [PASSAGES[t][0], *(f" {s}" for s in PASSAGES[t][1:])]] for t in contexts(n)],
            "type": "bridge",
            "level": "hard",
        }
        for n, (question, answers, golds) in enumerate(QUESTIONS)
    ]


def twowiki():
    items = []
    for n, item in enumerate(hotpotqa()):
        del item["level"]
        item["context"] = [[t, list(PASSAGES[t])] for t in contexts(n)]
        items.append({**item, "evidences": [["a", "b", "c"]]})
    return items


def musique():
    return [
        {
            "id": f"2hop__{n}",
            "paragraphs": [
                {"idx": i, "title": t, "paragraph_text": " ".join(PASSAGES[t]), "is_supporting": t in golds}
                for i, t in enumerate(contexts(n))
            ],
            "question": question,
            "question_decomposition": [],
            "answer": answers[0],
            "answer_aliases": answers[1:],
            "answerable": True,
        }
        for n, (question, answers, golds) in enumerate(QUESTIONS)
    ]


def passage(title, **more):
    return {"title": title, "text": " ".join(PASSAGES[title]), **more}


def dpr():
    """As in DPR's file, the positives beyond the annotated one merely contain an answer."""
    items = []
    for n, (question, answers, golds) in enumerate(QUESTIONS):
        others = [t for t in contexts(n) if t not in golds[:1]]
        items.append(
            {
                "dataset": "nq_dev_psgs_w100",
                "question": question,
                "answers": answers,
                "positive_ctxs": [
                    passage(golds[0], score=1000, title_score=1, passage_id="1"),
                    *(passage(t, score=13.2, title_score=0, passage_id="2") for t in golds[1:]),
                ],
                "negative_ctxs": [passage(t, score=0, title_score=0, passage_id="3") for t in others[:1]],
                "hard_negative_ctxs": [passage(t, score=9.1, title_score=0, passage_id="4") for t in others[1:]],
            }
        )
    return items


def lost_in_the_middle():
    return [
        {
            "question": question,
            "answers": answers,
            "ctxs": [passage(t, hasanswer=True, isgold=t == golds[0]) for t in contexts(n)],
            "nq_annotated_gold": {"title": golds[0], "long_answer": "", "short_answers": answers},
        }
        for n, (question, answers, golds) in enumerate(QUESTIONS)
    ]


def nq_open():
    return [{"question": question, "answer": answers} for question, answers, _ in QUESTIONS]


SHAPES = {
    "hotpotqa": ("hotpotqa", hotpotqa, "list"),
    "2wiki": ("2wiki", twowiki, "list"),
    "musique": ("musique", musique, "lines"),
    "dpr": ("nq", dpr, "list"),
    "lost_in_the_middle": ("nq", lost_in_the_middle, "lines"),
}


def save(path, items, form):
    text = json.dumps(items) if form == "list" else "".join(json.dumps(item) + "\n" for item in items)
    path.write_text(text, encoding="utf-8")
    return path


def convert(tmp_path, name, source, *more, output="out"):
    """Runs the command and gives {(suite folder, setting): records}."""
    out = tmp_path / output
    script.main([f"--{name}", str(source), "--output", str(out), "--top", "2", "4", *map(str, more)])
    return {
        (suite, setting): [json.loads(line) for line in (out / suite / name / file).read_text("utf-8").splitlines()]
        for suite in SUITE_FOLDERS
        for setting, file in FILES.items()
        if (out / suite / name / file).exists()
    }


@pytest.fixture(params=SHAPES)
def converted(request, tmp_path):
    name, make, form = SHAPES[request.param]
    return request.param, convert(tmp_path, name, save(tmp_path / "source", make(), form))


def document(title):
    return f"{title}\n{' '.join(PASSAGES[title])}"


def annotated(shape, question):
    golds = next(golds for asked, _, golds in QUESTIONS if asked == question)
    return {document(title) for title in (golds[:1] if SHAPES[shape][0] == "nq" else golds)}


def plain_bm25(question, documents, k1=1.5, b=0.75):
    """Score of every document, straight from the formula (Lucene's idf), in float64."""
    words = {
        d: [w for w in re.findall(r"\b\w\w+\b", d.lower()) if w not in STOPWORDS_EN] for d in [*documents, question]
    }
    counts = {d: Counter(words[d]) for d in documents}
    mean = sum(len(words[d]) for d in documents) / len(documents)
    scores = dict.fromkeys(documents, 0.0)
    for word in words[question]:
        containing = [d for d in documents if counts[d][word]]
        idf = math.log(1 + (len(documents) - len(containing) + 0.5) / (len(containing) + 0.5))
        for d in containing:
            norm = k1 * (1 - b + b * len(words[d]) / mean)
            scores[d] += idf * counts[d][word] / (counts[d][word] + norm)
    return scores


def test_records_have_the_fields_of_the_layout_and_pass_the_reader(converted, tmp_path):
    shape, files = converted
    assert len(files) == 4
    for (suite, _), records in files.items():
        assert len(records) == len(QUESTIONS)
        for record in records:
            assert set(record) == {"question", "docs", "golden_answers", "answer", "pos_index", "id"}
            assert len(record["docs"]) == len(set(record["docs"])) == SUITE_FOLDERS[suite]
            assert record["answer"] == record["golden_answers"][0] and record["id"]
            assert record_rows(record, "stage2")
    name = SHAPES[shape][0]
    for suite in ("end_to_end", "instruction_tuning"):
        found = dataset_files(str(tmp_path / "out"), suite, [name], [NORMAL, ORACLE])
        questions = load_questions(found[name], name, suite, None)
        assert len(questions) == 2 * len(QUESTIONS)
        assert all(question.relevant == len(annotated(shape, question.question)) for question in questions)
        assert SUITES[suite].files[NORMAL] == FILES["normal"]


def test_normal_is_the_ranking_of_a_plain_bm25(converted):
    shape, files = converted
    documents = [document(title) for title in PASSAGES]
    for suite, size in SUITE_FOLDERS.items():
        for record in files[suite, "normal"]:
            scores = plain_bm25(record["question"], documents)
            got = [scores[d] for d in record["docs"]]
            assert got == pytest.approx(sorted(scores.values(), reverse=True)[:size], abs=1e-5)
            golds = annotated(shape, record["question"])
            assert record["pos_index"] == [i for i, d in enumerate(record["docs"]) if d in golds]


def test_scores_are_those_of_the_formula():
    documents = [document(title) for title in PASSAGES]
    retriever = script.Bm25((script.text_key(text), text) for text in documents)
    for question, _, _ in QUESTIONS:
        words = next(retriever.tokenizer.streaming_tokenize([question], update_vocab=False, allow_empty=False))
        scores = retriever.index.get_scores(words).tolist()
        assert scores == pytest.approx(list(plain_bm25(question, documents).values()), rel=1e-5)


def test_oracle_is_all_golds_and_the_best_ranked_others(converted):
    shape, files = converted
    documents = [document(title) for title in PASSAGES]
    for suite, size in SUITE_FOLDERS.items():
        for record in files[suite, "oracle"]:
            golds = annotated(shape, record["question"])
            assert {record["docs"][i] for i in record["pos_index"]} == golds
            scores = plain_bm25(record["question"], documents)
            others = sorted((scores[d] for d in documents if d not in golds), reverse=True)[: size - len(golds)]
            assert sorted((scores[d] for d in set(record["docs"]) - golds), reverse=True) == pytest.approx(others)


def test_a_question_whose_places_were_worked_out_by_hand(tmp_path):
    files = convert(tmp_path, "hotpotqa", save(tmp_path / "source", hotpotqa(), "list"))
    # Stop words aside, Otto Hahn has "otto", "hahn" and "worked". One word each, in 2 passages: "lies" in Berlin and
    # Vienna (6 words), "river" in Danube (6 words) and Spree (4 words), so Spree is next.
    record = {r["id"]: r for r in files["instruction_tuning_evaluation", "normal"]}["hp1"]
    assert record["docs"] == [
        "Otto Hahn\nOtto Hahn was a German chemist. He worked with Meitner in Berlin.",
        "Spree\nThe Spree is a river of Saxony.",
    ]
    assert record["pos_index"] == [0] and record["golden_answers"] == ["Spree"]
    oracle = {r["id"]: r for r in files["instruction_tuning_evaluation", "oracle"]}["hp1"]
    assert {text.split("\n")[0] for text in oracle["docs"]} == {"Otto Hahn", "Berlin"}
    assert oracle["pos_index"] == [0, 1]


def test_both_suites_hold_the_same_questions_and_the_small_normal_pool_begins_the_large(converted):
    _, files = converted
    small, large = (files[suite, "normal"] for suite in SUITE_FOLDERS)
    assert len({tuple(r["id"] for r in records) for records in files.values()}) == 1
    assert all(a["docs"] == b["docs"][:2] for a, b in zip(small, large, strict=True))


def test_every_alias_of_musique_is_an_accepted_answer(tmp_path):
    files = convert(tmp_path, "musique", save(tmp_path / "source", musique(), "lines"))
    answers = {r["id"]: r["golden_answers"] for r in files["end_to_end_evaluation", "normal"]}
    assert answers["2hop__0"] == ["Danube", "the Donau"] and answers["2hop__1"] == ["Spree"]


def test_dpr_positives_without_scores_count_by_place(tmp_path):
    items = dpr()
    for item in items:
        for context in item["positive_ctxs"]:
            del context["score"]
    files = convert(tmp_path, "nq", save(tmp_path / "source", items, "list"))
    for record in files["end_to_end_evaluation", "oracle"]:
        assert {record["docs"][i] for i in record["pos_index"]} == annotated("dpr", record["question"])


def corpus(path, kind):
    rows = [(title, " ".join(sentences)) for title, sentences in PASSAGES.items()]
    if kind == "tsv":
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t")
        writer.writerows([("id", "text", "title"), *((i, body, title) for i, (title, body) in enumerate(rows, 1))])
        data = text.getvalue()
    elif kind == "contents":
        data = "".join(json.dumps({"id": "1", "contents": f'"{t}"\n{body}'}) + "\n" for t, body in rows)
    else:
        data = "".join(json.dumps({"title": t, "text": f"  {body}\n"}) + "\n" for t, body in rows)
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


@pytest.mark.parametrize("file", ["c.jsonl", "contents.jsonl", "c.tsv", "c.tsv.gz", "c.jsonl.gz"])
def test_a_corpus_of_any_shape_is_searched_and_its_known_passages_count_once(tmp_path, capsys, file):
    kind = "contents" if "contents" in file else "tsv" if "tsv" in file else "jsonl"
    path = corpus(tmp_path / file, kind)
    alone = convert(tmp_path, "nq", save(tmp_path / "a", lost_in_the_middle(), "lines"), output="alone")
    both = convert(tmp_path, "nq", tmp_path / "a", "--corpus", path, output="both")
    assert both == alone
    few = lost_in_the_middle()
    for item in few:
        item["ctxs"] = [c for c in item["ctxs"] if c["isgold"]]
    capsys.readouterr()
    assert convert(tmp_path, "nq", save(tmp_path / "b", few, "lines"), "--corpus", path, output="few") == alone
    assert re.search(r"\| nq +\| 6 +\| 12 ", capsys.readouterr().out)


def test_nq_open_gives_normal_only_and_says_so(tmp_path, capsys):
    annotated_first = convert(tmp_path, "nq", save(tmp_path / "a", dpr(), "list"))
    source, passages = save(tmp_path / "b", nq_open(), "lines"), corpus(tmp_path / "c.jsonl", "jsonl")
    files = convert(tmp_path, "nq", source, "--corpus", passages, "--overwrite")
    out = capsys.readouterr().out
    assert {setting for _, setting in files} == {"normal"}, "an Oracle file of other questions would be left behind"
    assert "Oracle cannot be built" in out and "removed" in out
    assert all(record["pos_index"] == [] for records in files.values() for record in records)
    assert [r["docs"] for r in files["end_to_end_evaluation", "normal"]] == [
        r["docs"] for r in annotated_first["end_to_end_evaluation", "normal"]
    ]


def test_the_seed_alone_decides_and_a_sample_is_the_beginning(tmp_path):
    source = save(tmp_path / "source", hotpotqa(), "list")
    first = convert(tmp_path, "hotpotqa", source, output="a")
    assert convert(tmp_path, "hotpotqa", source, output="b") == first
    other = convert(tmp_path, "hotpotqa", source, "--seed", 7, output="c")
    order = {
        seed: [r["id"] for r in files["end_to_end_evaluation", "normal"]] for seed, files in ((42, first), (7, other))
    }
    assert order[42] != order[7] and sorted(order[42]) == sorted(order[7])
    by_id = {r["id"]: r for r in other["end_to_end_evaluation", "oracle"]}
    assert any(by_id[r["id"]]["docs"] != r["docs"] for r in first["end_to_end_evaluation", "oracle"])
    sample = convert(tmp_path, "hotpotqa", source, "--max_questions", 3, output="d")
    assert sample == {key: records[:3] for key, records in first.items()}


def test_oracle_positions_tell_nothing():
    places = Counter(script.oracle_pool([7, 1, 2, 3, 4], [7], 5, f"42:5:{n}").index(7) for n in range(2000))
    assert set(places) == set(range(5)) and max(places.values()) < 480, "400 are expected in each of 5 places"


def test_equal_scores_do_not_follow_the_order_of_the_file():
    texts = [f"title {n}\nnothing in common" for n in range(40)]
    pairs = [(script.text_key(text), text) for text in texts]
    first = script.Bm25(pairs).best("zebra", 10)
    again = script.Bm25(pairs[::-1]).best("zebra", 10)
    assert [texts[i] for i in first] == [texts[::-1][i] for i in again]
    assert first != list(range(10))


def test_sentences_join_as_each_data_set_means_them(tmp_path):
    for name, sentences in (
        ("hotpotqa", ["It began (", "1990", ").", " Then it ended."]),
        ("2wiki", ["It began.", "It ended."]),
    ):
        items = hotpotqa() if name == "hotpotqa" else twowiki()
        items[5]["context"][0] = ["Odd", sentences]
        items[5]["supporting_facts"] = [["Odd", 0]]
        files = convert(tmp_path, name, save(tmp_path / name, items, "list"))
        record = next(r for r in files["end_to_end_evaluation", "oracle"] if r["id"] == "hp5")
        assert record["docs"][record["pos_index"][0]] in (
            "Odd\nIt began (1990). Then it ended.",
            "Odd\nIt began. It ended.",
        )


def test_what_is_dropped_is_counted_and_the_table_shows_the_recall(tmp_path, capsys):
    items = musique()
    extra = [
        {**items[0], "id": "again", "question": " Which river flows through the  birthplace of LISE Meitner? "},
        {**items[1], "id": "none", "question": "Unanswered?", "answer": " "},
        {**items[1], "answerable": False, "question": "Unanswerable?"},
        {
            **items[1],
            "id": "many",
            "question": "Many?",
            "paragraphs": [{**p, "is_supporting": True} for p in items[1]["paragraphs"]],
        },
        {
            **items[1],
            "id": "hollow",
            "question": "Hollow?",
            "paragraphs": [
                {**p, "paragraph_text": p["paragraph_text"] if p["title"] != "Berlin" else "\t"}
                for p in items[1]["paragraphs"]
            ],
        },
    ]
    items += [{**items[4], "id": f"x{n}", "question": f"Is basalt dark, number {n}?"} for n in range(20)]
    files = convert(tmp_path, "musique", save(tmp_path / "source", items + extra, "lines"))
    out = capsys.readouterr().out
    for said in (
        "1 duplicate questions", "1 questions without text or answer", "1 unanswerable questions",
        "1 questions with more than 2 gold passages", "1 questions without a gold passage", "1 empty passages",
    ):  # fmt: skip
        assert said in out
    row = [cell.strip() for cell in next(line for line in out.splitlines() if "| musique" in line).split("|")]
    normal = files["end_to_end_evaluation", "normal"]
    golds = [len(r["pos_index"]) for r in files["end_to_end_evaluation", "oracle"]]
    recall = sum(len(r["pos_index"]) / n for r, n in zip(normal, golds, strict=True)) / len(golds)
    whole = sum(len(r["pos_index"]) == n for r, n in zip(normal, golds, strict=True)) / len(golds)
    assert row[2:5] == ["26", "12", f"{sum(golds) / 26:.2f}"]
    assert (row[6], row[8]) == (f"{recall:.4f}", f"{whole:.4f}")
    assert recall < 1


def changed(make, number, **fields):
    items = make()
    items[number].update(fields)
    return items


REFUSED = {
    "exchanged files": ("hotpotqa", twowiki(), r"source:1: level is missing, but evidences is there: .*exchanged"),
    "exchanged the other way": ("2wiki", hotpotqa(), r"source:1: evidences is missing, but level is there"),
    "test split": ("musique", [{k: v for k, v in musique()[0].items() if k != "answer"}], r"source:1: answer must be"),
    "golds that are not there": (
        "hotpotqa",
        changed(hotpotqa, 3, supporting_facts=[["Iceland", 0], ["Elsewhere", 0]]),
        r"source:4: a gold passage of this question, and of 1 of 6 in all.*hotpot_dev_distractor_v1.json",
    ),
    "context no list": ("hotpotqa", changed(hotpotqa, 1, context={"title": []}), r"source:2: context must be a list"),
    "sentence no text": ("2wiki", changed(twowiki, 2, context=[["t", [1]]]), r"source:3: context must hold texts"),
    "half a surrogate": ("hotpotqa", changed(hotpotqa, 2, question="\ud800?"), r"source:3: half a surrogate pair"),
    "id used twice": ("musique", changed(musique, 1, id="2hop__0"), r"source:2: id 2hop__0 is that of item 1"),
    "is_supporting as a number": (
        "musique",
        changed(musique, 0, paragraphs=[{"title": "t", "paragraph_text": "x", "is_supporting": 1}]),
        r"source:1: is_supporting must be true or false",
    ),
    "no NQ file": ("nq", [{"document_text": "", "annotations": []}], r"source:1: .*DPR.*Lost in the Middle.*NQ-open"),
    "no annotated positive": (
        "nq",
        changed(dpr, 0, positive_ctxs=[passage("Sake", score=12)]),
        r"source:1: a gold pas",
    ),
    "two shapes in one": ("nq", lost_in_the_middle()[:2] + nq_open(), r"source:3: this item has another shape"),
    "no passages to search": ("nq", nq_open(), r"give some to search with --corpus"),
    "empty list": ("2wiki", [], r"no question is left of 0"),
}


def refused(capsys, tmp_path, *args):
    with pytest.raises(SystemExit) as stopped:
        script.main([*map(str, args), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("prepare_eval_data: ")
    assert not list((tmp_path / "out").rglob("*.jsonl")) and not list(tmp_path.rglob(".draft*"))
    return error


@pytest.mark.parametrize("case", REFUSED)
def test_bad_source_files_are_refused_in_words(case, tmp_path, capsys):
    name, items, reason = REFUSED[case]
    error = refused(capsys, tmp_path, f"--{name}", save(tmp_path / "source", items, "list"), "--top", 2, 4)
    assert re.search(reason, error)


def test_other_mistakes_are_refused_in_words(tmp_path, capsys):
    source = save(tmp_path / "source", lost_in_the_middle(), "lines")
    assert "12 passages" in refused(capsys, tmp_path, "--nq", source), "20 candidates are wanted by default"
    assert "is no file" in refused(capsys, tmp_path, "--nq", tmp_path / "missing")
    assert "at least one source" in refused(capsys, tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(source.read_text().splitlines()[0] + '\n{"question": \n')
    assert "broken.jsonl:2: not JSON" in refused(capsys, tmp_path, "--nq", broken)
    (tmp_path / "half.gz").write_bytes(gzip.compress(source.read_bytes())[:-20])
    assert "half.gz: cannot be read" in refused(capsys, tmp_path, "--nq", tmp_path / "half.gz")
    (tmp_path / "bad.tsv").write_text("id\ttext\ttitle\n1\tonly two\n")
    assert "bad.tsv:2: " in refused(capsys, tmp_path, "--nq", source, "--corpus", tmp_path / "bad.tsv")
    (tmp_path / "head.tsv").write_text("1\ttext\ttitle\n")
    assert "head.tsv:1: " in refused(capsys, tmp_path, "--nq", source, "--corpus", tmp_path / "head.tsv")
    (tmp_path / "bad.jsonl").write_text('{"title": "a", "text": "b"}\n{"text": "no title"}\n')
    assert "bad.jsonl:2: title" in refused(capsys, tmp_path, "--nq", source, "--corpus", tmp_path / "bad.jsonl")


def test_files_that_are_there_are_kept_unless_told(tmp_path, capsys):
    source = save(tmp_path / "source", hotpotqa(), "list")
    first = convert(tmp_path, "hotpotqa", source)
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path, "hotpotqa", source, "--seed", 1)
    assert stopped.value.code == 2 and "--overwrite" in capsys.readouterr().err
    kept = tmp_path / "out/end_to_end_evaluation/hotpotqa" / FILES["oracle"]
    assert json.loads(kept.read_text().splitlines()[0]) == first["end_to_end_evaluation", "oracle"][0]
    assert convert(tmp_path, "hotpotqa", source, "--seed", 1, "--overwrite") != first


def test_a_failure_while_writing_leaves_no_file_of_the_data_set(tmp_path, monkeypatch):
    whole, written = json.dumps, []

    def full_disk(record, **options):
        written.append(record)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return whole(record, **options)

    source = save(tmp_path / "source", hotpotqa(), "list")
    monkeypatch.setattr(script.json, "dumps", full_disk)
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path, "hotpotqa", source)
    assert stopped.value.code == 1 and not list((tmp_path / "out").iterdir())
