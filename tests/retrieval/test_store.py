"""A store holds exactly what was committed, whatever happens to the process, the disk or a file."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from openrlhf.retrieval.store import Document, Store

L, D = 2, 8
HEADER = {"n_memory": L, "width": D, "rows_per_shard": 7, "compressor": "abc"}
FORK = multiprocessing.get_context("fork")
END_SECONDS = 60


def vector(number: int) -> torch.Tensor:
    return torch.randn(L, D, generator=torch.Generator().manual_seed(number)).bfloat16()


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def document(number: int) -> Document:
    return Document(f"d{number}", f"text {number}", f"title {number}", number % 5 or None, {"n": number})


def add(store: Store, numbers) -> None:
    numbers = list(numbers)
    keys = [key(n) for n in numbers]
    store.add(
        [document(n) for n in numbers],
        keys,
        {key(n): vector(n) for n in numbers},
        {key(n): n / 10 for n in numbers},
    )


def holds(store: Store, numbers) -> None:
    """The store has these documents and no others, each with its own vector, by every way of asking."""
    numbers = sorted(numbers)
    found = list(store.texts())
    assert sorted((d for d, _ in found), key=lambda d: d.metadata["n"]) == [document(n) for n in numbers]
    assert len(store) == len(numbers)
    assert sorted(row for _, row in found) == store.rows().tolist()
    by_row = {row: d.metadata["n"] for d, row in found}
    for rows_N, docs_NLD in store.blocks(3):
        assert len(rows_N) <= 3
        assert torch.equal(docs_NLD, torch.stack([vector(by_row.pop(int(row))) for row in rows_N]))
    assert not by_row
    if numbers:
        expected = torch.stack([vector(n) for n in numbers])
        assert torch.equal(store.by_key([key(n) for n in numbers]), expected)
    assert store.get([f"d{n}" for n in numbers]) == [document(n) for n in numbers]
    assert store.verify() == []


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("rows_per_shard", [1, 7, 1000])
def test_what_was_added_comes_back_by_every_way_of_asking(path, rows_per_shard):
    with Store.create(path, {**HEADER, "rows_per_shard": rows_per_shard}) as store:
        for start in range(0, 30, 4):
            add(store, range(start, min(start + 4, 30)))
        holds(store, range(30))
    with Store.open(path) as store:
        holds(store, range(30))
        assert store.header["compressor"] == "abc"
        rows = [17, 3, 17]
        assert torch.equal(store.vectors(rows), torch.stack([vector(n) for n in rows]))
        assert store.documents_at(torch.tensor([4, 0])) == [[document(4)], [document(0)]]
        assert store.known([key(3), key(99), key(4)]) == [True, False, True]
        assert store.find(["d1", "nobody"]) == [document(1), None]


def test_an_empty_store_answers_everything(path):
    Store.create(path, HEADER).close()
    with Store.open(path) as store:
        assert len(store) == 0 and store.rows().shape == (0,) and store.rows().dtype == torch.int64
        assert list(store.blocks(5)) == [] and list(store.texts()) == [] and store.verify() == []
        assert store.vectors([]).shape == (0, L, D) and store.by_key([]).dtype == torch.bfloat16


def test_shards_have_a_bounded_size(path):
    with Store.create(path, HEADER) as store:
        add(store, range(20))
    sizes = [file.stat().st_size for file in sorted((path / "vectors").iterdir())]
    assert sizes == [7 * L * D * 2, 7 * L * D * 2, 6 * L * D * 2]


def test_documents_of_one_key_share_a_vector_until_the_last_of_them_goes(path):
    with Store.create(path, HEADER) as store:
        twins = [Document("a", "same"), Document("b", "same", metadata={"other": [1, "é"]})]
        store.add(twins, [key(1), key(1)], {key(1): vector(1)})
        store.add([Document("c", "same")], [key(1)], {})
        assert len(store) == 3 and len(store.rows()) == 1
        assert [d.id for d in store.documents_at([0])[0]] == ["a", "b", "c"]
        assert store.delete(["a", "c"]) == 2 and len(store.rows()) == 1
        assert store.delete(["b"]) == 1 and len(store.rows()) == 0 and store.known([key(1)]) == [False]


def test_a_document_takes_the_place_of_the_one_with_its_id(path):
    with Store.create(path, HEADER) as store:
        add(store, range(3))
        store.add([Document("d1", "new text")], [key(50)], {key(50): vector(50)})
        assert store.get(["d1"]) == [Document("d1", "new text")]
        assert len(store) == 3 and store.known([key(1), key(50)]) == [False, True]
        assert [d.id for d, _ in store.texts()] == ["d0", "d1", "d2"]


def test_two_documents_may_exchange_their_texts_in_one_commit(path):
    with Store.create(path, HEADER) as store:
        add(store, range(3))
        store.add([Document("d0", "text 1"), Document("d1", "text 0")], [key(1), key(0)], {})
        assert [d.text for d in store.get(["d0", "d1"])] == ["text 1", "text 0"]
        assert store.documents_at([0, 1]) == [[Document("d1", "text 0")], [Document("d0", "text 1")]]
        store.add([Document("d2", "x"), Document("d2", "text 2")], [key(7), key(2)], {key(7): vector(7)})
        assert store.known([key(7), key(2)]) == [False, True] and store.verify() == []


def test_deleted_documents_are_gone_and_rows_keep_their_numbers(path):
    with Store.create(path, HEADER) as store:
        add(store, range(20))
        assert store.delete(["d0", "d8", "d9", "d19", "nobody"]) == 4
        left = [n for n in range(20) if n not in (0, 8, 9, 19)]
        assert store.rows().tolist() == left
        holds(store, left)
        with pytest.raises(ValueError, match="no row 8"):
            store.vectors([7, 8])
        with pytest.raises(KeyError, match="no document 'd8', nor 1 others"):
            store.get(["d7", "d8", "d9"])
        assert store.documents_at([8]) == [[]]
        add(store, [30])  # never where an earlier row was, which someone may have found and not read yet
        assert store.rows().tolist() == [*left, 20]


def test_compact_frees_the_holes_and_changes_nothing_else(path):
    with Store.create(path, HEADER) as store:
        add(store, range(40))
        gone = [*range(0, 14), 20, 39]
        store.delete([f"d{n}" for n in gone])
        left = [n for n in range(40) if n not in gone]
        assert store.compact() > 0
        holds(store, left)
        size = sum(file.stat().st_size for file in (path / "vectors").iterdir())
        assert size == len(left) * L * D * 2
        before = sorted((path / "vectors").iterdir())
        store.compact()
        assert sorted((path / "vectors").iterdir()) == before
        add(store, range(100, 110))
        holds(store, [*left, *range(100, 110)])
        store.delete([d.id for d, _ in store.texts()])
        store.compact()
        assert list((path / "vectors").iterdir()) == [] and len(store) == 0
        add(store, [5])
        holds(store, [5])


def killed(target, *arguments, after: float) -> None:
    """Runs `target` in a process of its own and kills it with SIGKILL, so long after it said that it is at work."""
    at_work = FORK.Event()
    process = FORK.Process(target=target, args=(*arguments, at_work), daemon=True)
    process.start()
    assert at_work.wait(END_SECONDS)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.join(END_SECONDS)
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def keep_adding(path: Path, said: Path, at_work) -> None:
    with Store.open(path, write=True) as store:
        number = 10 * len(store)  # keys that no killed append used
        while True:
            numbers = range(number, number + random.Random(number).randint(1, 20))
            add(store, numbers)
            with open(said, "a") as file:
                file.write("".join(f"{n}\n" for n in numbers))
            number = numbers[-1] + 1
            at_work.set()


def test_killed_while_adding_at_any_moment_a_store_holds_what_was_committed(path, tmp_path):
    Store.create(path, HEADER).close()
    said, rng = tmp_path / "said", random.Random(3)
    said.touch()
    for _ in range(25):
        killed(keep_adding, path, said, after=rng.uniform(0.005, 0.09))
        with Store.open(path) as store:
            there = {d.metadata["n"] for d, _ in store.texts()}
            holds(store, there)
        committed = {int(line) for line in said.read_text().splitlines()}
        assert committed <= there, "a commit was lost"
        beyond = there - committed
        assert len(beyond) <= 20  # one commit that was done and not said
        with open(said, "a") as file:
            file.write("".join(f"{n}\n" for n in beyond))
    assert len(there) > 100


def keep_compacting(path: Path, at_work) -> None:
    with Store.open(path, write=True) as store:
        round_ = 0
        at_work.set()
        while True:
            # 0..59 stay, and what comes and goes leaves holes between them.
            add(store, range(1000, 1030))
            add(store, [59])
            store.delete([f"d{n}" for n in range(1000, 1030)])
            store.delete([f"d{n}" for n in range(round_ % 5, 50, 5)])
            add(store, range(round_ % 5, 50, 5))
            store.compact()
            round_ += 1


def test_killed_while_compacting_at_any_moment_a_store_loses_nothing(path):
    rng = random.Random(4)
    with Store.create(path, HEADER) as store:
        add(store, range(60))
    for _ in range(15):
        killed(keep_compacting, path, after=rng.uniform(0.005, 0.12))
        with Store.open(path, write=True) as store:
            there = {d.metadata["n"] for d, _ in store.texts()}
            holds(store, there)
            assert set(range(50, 60)) <= there
            store.delete([f"d{n}" for n in range(1000, 1030)])
            add(store, [n for n in range(60) if n not in there])
            store.compact()
            holds(store, range(60))
            size = sum(file.stat().st_size for file in (path / "vectors").iterdir())
            assert size <= (60 + 40) * L * D * 2  # at most an append that was not committed lies beyond


def test_bytes_that_no_commit_names_are_overwritten(path):
    with Store.create(path, HEADER) as store:
        add(store, range(3))
    with open(path / "vectors" / "00000.bin", "ab") as file:
        file.write(b"\x7f" * 50)  # more than a row, and not a whole number of them
    with Store.open(path, write=True) as store:
        holds(store, range(3))
        add(store, range(3, 12))
        holds(store, range(12))
    shards = b"".join(file.read_bytes() for file in sorted((path / "vectors").iterdir()))
    assert b"\x7f" * 8 not in shards and len(shards) == 12 * L * D * 2


@pytest.mark.parametrize("lost", ["cut", "removed"])
def test_a_shard_cut_short_is_refused_by_name_and_what_is_lost_can_be_written_again(path, lost):
    with Store.create(path, HEADER) as store:
        add(store, range(20))
    shard = path / "vectors" / "00001.bin"
    if lost == "cut":
        os.truncate(shard, 3 * L * D * 2 + 5)
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.bin has .* cut short or lost.*--verify.*--repair"):
        Store.open(path)
    with Store.open(path, write=True, damaged=True) as store:
        damaged = store.verify()
        assert damaged == list(range(10 if lost == "cut" else 7, 14))
        store.start_shard()
        found = [documents[0].metadata["n"] for documents in store.documents_at(damaged)]
        store.rewrite({key(n): vector(n) for n in found[:2]})
        store.rewrite({key(n): vector(n) for n in found[2:]})
    with Store.open(path) as store:
        holds(store, range(20))


def test_a_repair_that_was_killed_leaves_what_is_still_lost_to_be_refused(path):
    with Store.create(path, HEADER) as store:
        add(store, range(12))
    os.truncate(path / "vectors" / "00001.bin", L * D * 2)
    with Store.open(path, write=True, damaged=True) as store:
        assert store.verify() == [8, 9, 10, 11]
        store.start_shard()
        store.rewrite({key(n): vector(n) for n in (10, 11)})
    with pytest.raises(ValueError, match=r"00001\.bin has 32 bytes, the index needs 96"):
        Store.open(path)
    with Store.open(path, write=True, damaged=True) as store:
        assert store.verify() == [8, 9]
        store.start_shard()
        store.rewrite({key(n): vector(n) for n in (8, 9)})
        holds(store, range(12))


def test_a_changed_byte_is_found_and_never_served(path):
    with Store.create(path, HEADER) as store:
        add(store, range(9))
    with open(path / "vectors" / "00001.bin", "r+b") as file:
        file.seek(L * D * 2 + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with Store.open(path) as store:
        assert store.verify() == [8]
        with pytest.raises(ValueError, match="row 8 is damaged.*--repair"):
            store.vectors([2, 8])
        with pytest.raises(ValueError, match="row 8 is damaged"):
            store.by_key([key(8)])


def test_a_damaged_index_is_told_in_words(path):
    with Store.create(path, HEADER) as store:
        add(store, range(9))
    (path / "index.sqlite").write_bytes(b"not a data base" * 100)
    with pytest.raises(ValueError, match=r"index\.sqlite is damaged"):
        Store.open(path)
    (path / "index.sqlite").unlink()
    with pytest.raises(OSError, match=r"index\.sqlite cannot be opened"):
        Store.open(path, write=True)
    with pytest.raises(OSError, match=r"index\.sqlite cannot be opened"):  # and the lock was given back
        Store.open(path, write=True)


def fill_up(path: Path, limit: int, texts: int, result) -> None:
    """Adds until no file may grow any more, as on a full disk."""
    with Store.open(path, write=True) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            for n in range(100, 400, 10):
                numbers = range(n, n + 10)
                documents = [Document(f"d{i}", f"text {i}" + "x" * texts, metadata={"n": i}) for i in numbers]
                store.add(documents, [key(i) for i in numbers], {key(i): vector(i) for i in numbers})
        except OSError as error:
            result.put((str(error), len(store), len(store.rows())))


@pytest.mark.parametrize(
    ("rows_per_shard", "limit", "texts"), [(1000, 4000, 0), (1, 200_000, 2000)], ids=["vectors", "index"]
)
def test_a_full_disk_is_told_in_words_and_leaves_no_half_commit(path, rows_per_shard, limit, texts):
    with Store.create(path, {**HEADER, "rows_per_shard": rows_per_shard}) as store:
        add(store, range(5))
    results = FORK.Queue()
    process = FORK.Process(target=fill_up, args=(path, limit, texts, results), daemon=True)
    process.start()
    said, n_documents, n_rows = results.get(timeout=END_SECONDS)
    process.join(END_SECONDS)
    assert "could not be written" in said and "are free there" in said and "make room" in said
    assert n_documents == n_rows and n_documents % 10 == 5
    with Store.open(path, write=True) as store:
        assert len(store) == n_documents and store.verify() == []
        add(store, range(500, 520))
        assert torch.equal(
            store.by_key([key(n) for n in range(500, 520)]), torch.stack([vector(n) for n in range(500, 520)])
        )
        assert store.verify() == []


def hold(path: Path, ready) -> None:
    store = Store.open(path, write=True)
    ready.set()
    time.sleep(60)
    store.close()


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_went(path):
    with Store.create(path, HEADER) as store:
        add(store, range(5))
    ready = FORK.Event()
    first = FORK.Process(target=hold, args=(path, ready), daemon=True)
    first.start()
    assert ready.wait(END_SECONDS)
    with pytest.raises(ValueError, match=f"being written by another process \\({first.pid}\\): wait"):
        Store.open(path, write=True)
    with Store.open(path) as reader:
        holds(reader, range(5))
        with pytest.raises(ValueError, match="for reading only"):
            add(reader, [7])
    os.kill(first.pid, signal.SIGKILL)
    first.join(END_SECONDS)
    with Store.open(path, write=True) as store:
        add(store, [5])
        holds(store, range(6))


def test_readers_wait_for_nobody_and_see_what_is_committed(path):
    with Store.create(path, HEADER) as writer:
        add(writer, range(5))
        with Store.open(path) as reader:
            holds(reader, range(5))
            writer._sql.execute("BEGIN EXCLUSIVE")
            writer._sql.execute("DELETE FROM documents")
            start = time.monotonic()
            holds(reader, range(5))
            assert time.monotonic() - start < 30  # SQLite would wait for 60 s
            writer._sql.execute("ROLLBACK")
            add(writer, range(5, 20))
            holds(reader, range(20))
            blocks = reader.blocks(2)
            next(blocks)
            writer.delete(["d0", "d1", "d2", "d3"])
            rest = torch.cat([rows_N for rows_N, _ in blocks])
            assert rest.tolist() == list(range(4, 20))
            writer.compact()
            holds(reader, range(4, 20))
    with Store.open(path) as reader:
        holds(reader, range(4, 20))


def test_threads_that_share_a_store_each_get_their_own_rows(path):
    """From Python 3.12 on, a statement that the connection kept could be given to two threads at once."""
    with Store.create(path, HEADER) as store:
        add(store, range(100))

    def read(thread: int) -> list[int]:
        drawn = [random.Random(thread).randrange(100) for _ in range(500)]
        return [
            n for n in drawn if store.find([f"d{n}"]) != [document(n)] or store.documents_at([n])[0][0].id != f"d{n}"
        ]

    with Store.open(path) as store, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [[]] * 4


def test_a_closed_store_can_be_read_where_nothing_can_be_written(path):
    with Store.create(path, HEADER) as store:
        add(store, range(9))
    assert sorted(file.name for file in path.iterdir()) == ["index.sqlite", "store.json", "store.lock", "vectors"]


def test_another_header_is_refused_field_by_field(path):
    Store.create(path, HEADER).close()
    with pytest.raises(ValueError) as caught:
        Store.open(path, {"compressor": "xyz", "n_memory": L, "rate": 4}, write=True)
    said = str(caught.value)
    assert "compressor is 'abc' there, 'xyz' here" in said and "rate is None there, 4 here" in said
    assert "n_memory" not in said and "another store" in said
    Store.open(path, {"compressor": "abc"}, write=True).close()  # and the lock was given back


def test_what_is_no_store_is_refused_in_words(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a store"):
        Store.open(path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="not a store and not empty .thesis.txt"):
        Store.create(tmp_path / "mine", HEADER)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        Store.create(tmp_path / "file", HEADER)
    with pytest.raises(ValueError, match="n_memory and width"):
        Store.create(path, {"n_memory": 4})
    Store.create(path, HEADER).close()
    with pytest.raises(FileExistsError, match="already holds a store"):
        Store.create(path, HEADER)
    (path / "store.json").write_text(json.dumps({**HEADER, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Store.open(path)
    (path / "store.json").write_text("{")
    with pytest.raises(ValueError, match="not a store's header"):
        Store.open(path)


def test_a_create_that_was_killed_can_be_given_again(path):
    with Store.create(path, HEADER) as store:
        add(store, range(3))
    (path / "store.json").unlink()
    with Store.create(path, HEADER) as store:
        holds(store, [])
        add(store, [1])
        holds(store, [1])
    with Store.open(path) as store:
        assert [document.id for document, _ in store.texts()] == ["d1"], "and stays what it became"


def test_wrong_additions_are_refused_and_change_nothing(path):
    with Store.create(path, HEADER) as store:
        add(store, range(3))
        with pytest.raises(ValueError, match=r"must be \(2, 8\) in this store, got \(8, 2\)"):
            store.add([document(5)], [key(5)], {key(5): vector(5).T})
        with pytest.raises(ValueError, match="no vectors were given for 1 new keys"):
            store.add([document(2), document(5)], [key(2), key(5)], {})
        with pytest.raises(ValueError, match="1 keys for 2 documents"):
            store.add([document(5), document(6)], [key(5)], {key(5): vector(5)})
        with pytest.raises(KeyError, match="no vector of key"):
            store.by_key([key(5)])
        with pytest.raises(KeyError, match="no vector of key"):
            store.rewrite({key(5): vector(5)})
        holds(store, range(3))


def peak(path: Path, n_documents: int) -> int:
    """Bytes of Python objects at the highest point of filling and reading a store."""
    text = "word " * 40
    tracemalloc.start()
    with Store.create(path, {**HEADER, "rows_per_shard": 500}) as store:
        for start in range(0, n_documents, 100):
            numbers = range(start, start + 100)
            documents = [Document(f"d{n}", f"{n} {text}") for n in numbers]
            keys = [key(n) for n in numbers]
            assert not any(store.known(keys)) and store.find([d.id for d in documents]) == [None] * 100
            store.add(documents, keys, {k: torch.zeros(L, D) for k in keys})
        assert sum(len(rows_N) for rows_N, _ in store.blocks(100)) == n_documents
        assert sum(1 for _ in store.texts()) == n_documents
        assert store.verify() == []
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    small, large = peak(tmp_path / "small", 1000), peak(tmp_path / "large", 10_000)
    assert large < 1.3 * small + 100_000


def test_the_store_is_a_leaf():
    code = "import sys, openrlhf.retrieval.store; print(*sorted(m for m in sys.modules if m.startswith('openrlhf')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    said = done.stdout.split()
    assert set(said) == {
        "openrlhf",
        "openrlhf.retrieval",
        *(f"openrlhf.retrieval.{name}" for name in ("store", "shards", "layout")),
        "openrlhf.utils",
        "openrlhf.utils.logging",
    }
