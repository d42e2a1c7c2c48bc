"""What is done stays done: the state under kill -9 and two processes; the order and the errors of `each`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from openrlhf.pipeline.state import State, content_key
from openrlhf.pipeline.work import each, half

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from openrlhf.pipeline.state import State
state = State(sys.argv[1])
number = 0
while True:
    state.put("step", f"key {number}", {"number": number, "filling": "x" * 5000})
    print(number, flush=True)
    number += 1
"""


def writer(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )


def test_what_was_put_is_there_after_kill_9(tmp_path):
    path = tmp_path / "state.sqlite"
    for _ in range(3):
        process = writer(path)
        while True:  # the first line says that it is up
            if int(process.stdout.readline()) >= 30:
                break
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        with State(path) as state:
            for number in range(max(said, default=30) + 1):
                assert state.get("step", f"key {number}")["number"] == number


def test_a_second_process_is_told_to_wait_and_the_end_of_the_first_lets_it_in(tmp_path):
    path = tmp_path / "state.sqlite"
    process = writer(path)
    process.stdout.readline()
    with pytest.raises(BlockingIOError, match="in use by another run"):
        State(path)
    process.kill()
    process.wait()
    process.stdout.close()
    State(path).close()


def test_a_lent_state_writes_beside_its_owner(tmp_path):
    with State(tmp_path / "s") as owner:
        lent = State(tmp_path / "s", shared=True)
        lent.put("step", "a", [1, "é"])
        owner.put("step", "b", 2)
        assert owner.get("step", "a") == [1, "é"] and lent.get("step", "b") == 2
        lent.close()
        with pytest.raises(BlockingIOError):
            State(tmp_path / "s")


def test_steps_and_keys_are_apart_and_a_result_can_be_replaced(tmp_path):
    with State(tmp_path / "s") as state:
        state.put("one", "key", 1)
        state.put("two", "key", 2)
        state.put("one", "key", 3)
        assert (state.get("one", "key"), state.get("two", "key"), state.get("one", "other")) == (3, 2, None)


def test_a_file_that_is_no_state_is_refused_and_left_unlocked(tmp_path):
    path = tmp_path / "s"
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(ValueError, match="move it aside"):
        State(path)
    path.unlink()
    State(path).close()


def test_a_full_disk_and_a_closed_folder_are_told_and_no_reason_to_move_the_state(tmp_path):
    with State(tmp_path / "s") as state:
        state.put("step", "key", 1)
        state._base.execute("PRAGMA max_page_count = 4")
        with pytest.raises(OSError, match="disk is full.*the same command again; what it holds is kept"):
            state.put("step", "large", "x" * 100_000)
        assert state.get("step", "key") == 1 and state.get("step", "large") is None
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be used .unable to open"):
        State(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    State(tmp_path / "folder").close()


def test_content_keys_differ_where_content_does():
    keys = [content_key("a", "b"), content_key("ab"), content_key("a", {"b": 1}), content_key(b"a", "b"), content_key()]
    assert len(set(keys)) == len(keys)
    assert content_key({"x": 1, "y": [2]}) == content_key({"y": [2], "x": 1})


def test_results_come_in_the_order_of_the_rows(tmp_path):
    def slow(row: int, state: State) -> int:
        time.sleep(0.05 * (5 - row))
        return row * row

    with State(tmp_path / "s") as state:
        assert list(each(slow, range(5), state, workers=5)) == [0, 1, 4, 9, 16]


def test_no_more_rows_than_workers_run_at_once(tmp_path):
    lock, running, most, three = threading.Lock(), 0, 0, threading.Barrier(3)

    def count(row: int, state: State) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        three.wait(60)  # fewer than three at once would break it
        with lock:
            running -= 1

    with State(tmp_path / "s") as state:
        list(each(count, range(12), state, workers=3))
    assert most == 3


def test_without_a_number_half_of_the_cores_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    three = threading.Barrier(3)
    with State(tmp_path / "s") as state:
        list(each(lambda row, state: three.wait(60), range(3), state, workers=None))
    assert (half(1), half(None), half(96.0)) == (1, 1, 48)


def test_an_error_comes_in_its_turn_and_rows_that_have_not_begun_are_left_out(tmp_path):
    begun = []

    def fail(row: int, state: State) -> int:
        begun.append(row)
        if row == 1:
            raise RuntimeError("row 1")
        time.sleep(0.1 * (row == 2))
        state.put("done", str(row), row)
        return row

    with State(tmp_path / "s") as state:
        results = each(fail, range(5000), state, workers=2)
        assert next(results) == 0
        with pytest.raises(RuntimeError, match="row 1"):
            for _ in range(5000):
                next(results)
        assert len(begun) < 5000
        assert all(state.get("done", str(row)) == row for row in begun if row != 1)  # what was under way has ended


def test_an_interrupt_does_not_wait_for_what_is_under_way(tmp_path):
    begun, held, ended = threading.Event(), threading.Event(), threading.Event()

    def interrupted(row: int, state: State) -> None:
        if row:
            begun.set()
            held.wait(60)
            ended.set()
        else:
            begun.wait(60)
            raise KeyboardInterrupt

    with State(tmp_path / "s") as state:
        with pytest.raises(KeyboardInterrupt):
            list(each(interrupted, range(3), state, workers=2))
        assert not ended.is_set()
    held.set()


def _square(row: dict, state) -> dict:
    kept = state.get("square", str(row["n"]))
    if kept is None:
        if row["n"] == row.get("bad"):
            raise ValueError(f"row {row['n']} of process {os.getpid()}")
        kept = {"square": row["n"] ** 2, "process": os.getpid()}
        state.put("square", str(row["n"]), kept)
    return kept


def test_ray_gives_the_same_results_in_order_and_keeps_them_in_this_machines_state(tmp_path):
    pytest.importorskip("ray")
    import ray

    rows = [{"n": n} for n in range(12)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with State(tmp_path / "s") as state:
            first = list(each(_square, rows, state, workers=2, ray=True))
            assert [result["square"] for result in first] == [n * n for n in range(12)]
            assert os.getpid() not in {result["process"] for result in first}
            assert [state.get("square", str(n)) for n in range(12)] == first
            assert list(each(_square, rows, state, workers=None, ray=True)) == first  # nothing is done again
            bad = [{"n": n, "bad": 103} for n in range(100, 108)]
            results = each(_square, bad, state, workers=2, ray=True)
            assert [next(results)["square"] for _ in range(3)] == [10000, 10201, 10404]
            with pytest.raises(ValueError, match="row 103"):
                next(results)
    finally:
        ray.shutdown()


def test_ray_is_asked_for_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with State(tmp_path / "s") as state, pytest.raises(ValueError, match=r"pip install 'clara-rag\[ray\]'"):
        list(each(_square, [{"n": 1}], state, ray=True))


def test_the_state_holds_plain_json(tmp_path):
    import sqlite3

    with State(tmp_path / "s") as state:
        state.put("step", "key", {"text": "Größe 大"})
    base = sqlite3.connect(tmp_path / "s")
    assert json.loads(base.execute("SELECT result FROM done").fetchone()[0]) == {"text": "Größe 大"}
    base.close()
