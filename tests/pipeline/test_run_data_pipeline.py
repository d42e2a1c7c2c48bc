"""The one command, from real documents of each kind to files that all three stages train on."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.trainer.launch import BASE_MODEL, ROOT, flags, start

SCRIPT = "scripts/run_data_pipeline.sh"
LIMIT_SECONDS = 900
KEY = "test-key-0815-4711"
# Empty is set: what a .env says about these must not reach the tests.
NOTHING = dict.fromkeys(
    ["RAW_DATA_DIR", "OUTPUT_DIR", "DATA_PATH", "MODEL", "MODEL_PATH", "OPENAI_API_KEY", "BASE_URL", "VISION_MODEL",
     "LANGUAGES", "MAX_CHUNKS", "ROUNDS", "CONCURRENCY", "DOC_MAX_LENGTH", "EMBEDDING_MODEL", "PIPELINE_PYTHON", "RAY",
     "RAY_ADDRESS", "EXTRA_BODY", "PRICE_PER_M_INPUT", "PRICE_PER_M_OUTPUT"], ""
)  # fmt: skip


def environment(**variables: object) -> dict[str, str]:
    own = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **NOTHING, **own, **{name: str(value) for name, value in variables.items()}}


def command(*line: str, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *line],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def listed(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("- ")]


def test_everything_that_is_missing_is_told_at_once_and_nothing_is_done(tmp_path):
    done = command(MODEL_PATH=tmp_path, OUTPUT_DIR=tmp_path / "out")
    assert done.returncode == 2 and "nothing was done, because" in done.stderr
    told = " ".join(listed(done))
    for name in ("RAW_DATA_DIR is not set", f"MODEL_PATH: {tmp_path} holds no tokenizer", "MODEL is not set"):
        assert name in told
    assert "OPENAI_API_KEY is not set" in told and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RAW_DATA_DIR": "HERE/none"}, "RAW_DATA_DIR: HERE/none is no folder"),
        ({"RAW_DATA_DIR": "HERE/empty"}, "RAW_DATA_DIR: HERE/empty has no document (pdf docx"),
        ({"OUTPUT_DIR": "HERE/docs/out"}, "OUTPUT_DIR: HERE/docs/out lies in RAW_DATA_DIR"),
        ({"OUTPUT_DIR": "HERE/docs"}, "OUTPUT_DIR: HERE/docs lies in RAW_DATA_DIR"),
        ({"OUTPUT_DIR": "HERE/docs/a.txt"}, "OUTPUT_DIR: HERE/docs/a.txt"),
        ({"MODEL_PATH": "no such/place/at/all"}, "neither a model's directory nor a Hub id"),
        ({"PIPELINE_PYTHON": "HERE/python"}, "set PIPELINE_PYTHON to the Python of your environment"),
        ({"PIPELINE_PYTHON": "HERE/bare"}, "lacks docling transformers datasets openai bm25s filelock ray"),
        ({"BASE_URL": ""}, "OPENAI_API_KEY is not set"),
    ],
)
def test_what_is_wrong_is_told_with_its_name(variables, told, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("text")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "deeper" / "program.exe").write_text("")
    bare = tmp_path / "bare"  # a Python without any package
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    good = {"RAW_DATA_DIR": tmp_path / "docs", "OUTPUT_DIR": tmp_path / "out", "MODEL_PATH": BASE_MODEL, "RAY": "1"}
    good |= {"MODEL": "m", "BASE_URL": "http://localhost:1/v1"}
    here = {name: str(value).replace("HERE", str(tmp_path)) for name, value in {**good, **variables}.items()}
    done = command("--dry_run", **here)
    assert done.returncode == 2
    assert any(told.replace("HERE", str(tmp_path)) in line for line in listed(done)), done.stderr


def test_a_word_that_is_no_flag_is_refused():
    done = command("--max_chunks", "3")
    assert done.returncode == 2 and "--max_chunks is not known; there are --dry_run and --ray" in done.stderr


def test_the_output_goes_where_training_reads(tmp_path):
    assert "results     ./data\n" in command("--dry_run").stdout
    assert f"results     {tmp_path}\n" in command("--dry_run", DATA_PATH=tmp_path).stdout
    assert "results     ./example\n" in command("--dry_run", DATA_PATH=tmp_path, OUTPUT_DIR="./example/").stdout


def test_variables_are_read_from_env_as_people_write_them(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "common.sh", tmp_path / "scripts")
    lines = ["\ufeffT_FIRST=1\r", "  export T_TWO = two words  # a comment", "T_KEY=sk-0815=",
             'T_JSON={"a": "b = c"}',
             "T_QUOTED='{\"a\": 1}' # said", 'T_DOUBLE="x # y"', "T_HASH=a#b", "T_NOTHING= # yet", "#T_NOT=1",
             "T_NO-NAME=1",
             "T_GIVEN=file", "T_LAST=last"]  # fmt: skip
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")  # no line break at the end
    line = f"source scripts/common.sh; exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, "T_GIVEN": "exported"},
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    read = {name[2:]: value for name, value in json.loads(done.stdout).items() if name.startswith("T_")}
    assert read == {"FIRST": "1", "TWO": "two words", "KEY": "sk-0815=", "JSON": '{"a": "b = c"}', "QUOTED": '{"a": 1}',
                    "DOUBLE": "x # y", "HASH": "a#b", "NOTHING": "", "GIVEN": "exported", "LAST": "last"}  # fmt: skip


def test_documents_behind_links_count_and_what_cannot_be_listed_does_not_end_the_run(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.markdown").write_text("text")
    (tmp_path / "docs" / "link.markdown").symlink_to(tmp_path / "a.markdown")
    tools = tmp_path / "tools"  # a find that meets a closed folder, which the superuser never does
    tools.mkdir()
    (tools / "find").write_text(f'#!/bin/sh\n{shutil.which("find")} "$@"\necho "Permission denied" >&2\nexit 1\n')
    (tools / "find").chmod(0o755)
    done = command("--dry_run", RAW_DATA_DIR=tmp_path / "docs", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 2 and "MODEL is not set" in done.stderr
    assert f"{tmp_path / 'docs'}: 1 markdown\n" in done.stdout


def test_the_key_and_what_stands_in_an_address_are_not_shown():
    done = command("--dry_run", OPENAI_API_KEY=KEY, BASE_URL=f"http://me:{KEY}@example.org/v1", MODEL="m")
    assert "at http://example.org/v1" in done.stdout and KEY not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("docling")
    for package in ("openai", "bm25s", "rapidocr", "reportlab", "docx", "pptx", "openpyxl", "pypdf"):
        pytest.importorskip(package)
    from tests.pipeline.endpoint_server import EndpointServer

    with EndpointServer(key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def documents(server, tmp_path_factory) -> Path:
    """One real document of each kind, and broken ones."""
    from tests.pipeline.make_documents import make

    folder = tmp_path_factory.mktemp("documents")
    make(folder)
    return folder


def variables(documents: Path, output: Path, server, **more: object) -> dict[str, object]:
    fixed = {"MODEL_PATH": BASE_MODEL, "MODEL": server.model, "OPENAI_API_KEY": KEY, "BASE_URL": server.url}
    return {**fixed, "RAW_DATA_DIR": documents, "OUTPUT_DIR": output, "VISION_MODEL": "rapidocr", "ROUNDS": 2, **more}


def made(folder: Path) -> dict[str, bytes]:
    """Every file of a directory but the state."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("pipeline_state")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def steps_done(output: Path) -> Counter:
    """Rows of the state by step; empty where there is none yet."""
    state = output / "pipeline_state.sqlite"
    if not state.is_file():
        return Counter()
    with closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=30)) as base:
        try:
            return Counter(dict(base.execute("SELECT step, COUNT(*) FROM done GROUP BY step").fetchall()))
        except sqlite3.OperationalError:
            return Counter()


@pytest.fixture(scope="module")
def straight(documents, server, tmp_path_factory):
    """(output, what the command said, chat requests) of a run that nothing interrupts; do not write there."""
    output = tmp_path_factory.mktemp("straight") / "data"
    done = command(**variables(documents, output, server))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output, done, list(server.chats())


def test_every_document_is_used_or_its_reason_given(straight, documents):
    output, done, _ = straight
    used = {json.loads(line)["source"] for line in (output / "raw_knowledge.jsonl").read_text().splitlines()}
    reasons = {}
    for name in ("extraction_report.json", "vision_report.json"):
        for listed_files in json.loads((output / name).read_text()).values():
            for entry in listed_files if isinstance(listed_files, list) else ():
                if entry.get("status") == "skipped":
                    reasons[entry.get("source") or entry["file"]] = entry["reason"]
    files = {str(path.relative_to(documents)) for path in documents.rglob("*") if path.is_file()}
    assert {path.rsplit(".", 1)[-1] for path in used} >= {
        "pdf",
        "docx",
        "pptx",
        "html",
        "md",
        "xlsx",
        "txt",
        "png",
        "jpg",
    }
    assert files == used | set(reasons) and all(reasons.values())
    report = (output / "quality_report.md").read_text()
    assert "password" in report and "Files that were skipped" in report


def test_the_last_lines_say_where_everything_is_and_what_to_type(straight):
    output, done, _ = straight
    tail = done.stdout.split("== done")[1]
    assert (
        f"DATA_PATH={output}" in tail and "bash scripts/train_pretraining.sh" in tail and "quality_report.html" in tail
    )
    assert "no usable reply" not in tail
    for title in ("1 of 4: extraction", "2 of 4: vision", "3 of 4: synthesis", "4 of 4: assembly"):
        assert f"== {title}" in done.stdout
    assert KEY not in done.stdout + done.stderr
    assert not [name for name, data in made(output).items() if KEY.encode() in data]


def test_all_three_stages_train_on_the_files(straight, tmp_path):
    output, _, _ = straight
    before = None
    for stage, k in (("stage1", 1), ("stage1_2", 5), ("stage2", 5)):
        options = {"generation_top_k": k, "pretrain_checkpoint": before, "max_samples": 4, "max_len": 4096,
                   "train_batch_size": 4, "eval_dataset": output / "eval"}  # fmt: skip
        before = tmp_path / stage
        run = start(before, flags(before, stage, output, **options)).ok()
        assert len(run.curve()) == 1 and run.curve()[0] > 0


def test_a_second_run_does_no_work(straight, documents, server):
    output, _, _ = straight
    before, asked = made(output), len(server.requests) + len(server.other_requests)
    times = {name: (output / name).stat().st_mtime_ns for name in before}
    rows = steps_done(output)
    done = command(**variables(documents, output, server))
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(server.requests) + len(server.other_requests) == asked
    assert made(output) == before and steps_done(output) == rows
    assert {name: (output / name).stat().st_mtime_ns for name in before} == times


def test_killed_three_times_at_random_it_ends_with_the_same_files(straight, documents, server, tmp_path):
    output, _, requests = straight
    killed = tmp_path / "data"
    total = sum(steps_done(output).values())
    before = len(server.chats())
    for target in sorted(random.Random(11).sample(range(1, total), 3)):
        process = subprocess.Popen(
            ["bash", SCRIPT],
            cwd=ROOT,
            env=environment(**variables(documents, killed, server)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + LIMIT_SECONDS
        while sum(steps_done(killed).values()) < target:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = command(**variables(documents, killed, server))
    assert done.returncode == 0, done.stderr[-4000:]
    assert made(killed) == made(output)
    # Paid twice at most what was under way: four chunks at a time.
    assert len(server.chats()) - before <= len(requests) + 3 * 4


def test_a_changed_document_is_redone_alone(straight, documents, server, tmp_path):
    output, _, requests = straight
    folder = Path(shutil.copytree(documents, tmp_path / "documents"))
    copy = Path(shutil.copytree(output, tmp_path / "data"))
    text = folder / "great_wall.txt"
    text.write_text(text.read_text(encoding="utf-8").replace("。", "！", 1), encoding="utf-8")
    rows, before = steps_done(copy), len(server.chats())
    done = command(**variables(folder, copy, server))
    assert done.returncode == 0, done.stderr[-4000:]
    new = server.chats()[before:]
    assert 0 < len(new) < len(requests) / 4
    after = steps_done(copy)
    assert after["extract"] == rows["extract"] + 1 and after["vision"] == rows["vision"]
    lines = {path: (path / "raw_knowledge.jsonl").read_text().splitlines() for path in (output, copy)}
    changed = [json.loads(line) for line in set(lines[copy]) - set(lines[output])]
    assert changed and {record["source"] for record in changed} == {"great_wall.txt"}
    assert not list(copy.rglob("*.before-*"))


def test_over_ray_the_files_are_the_same(straight, documents, server, tmp_path):
    pytest.importorskip("ray")
    output, _, _ = straight
    done = command("--ray", **variables(documents, tmp_path / "data", server))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Ray at this machine" in done.stdout and made(tmp_path / "data") == made(output)


@pytest.mark.parametrize(
    ("wrong", "told"), [({"OPENAI_API_KEY": "another"}, "401"), ({"MODEL": "unheard-of"}, "unheard-of")]
)
def test_a_wrong_key_or_model_is_told_before_the_extraction(documents, server, tmp_path, wrong, told):
    done = command(**variables(documents, tmp_path / "data", server, **wrong))
    assert done.returncode == 2 and any(told in line for line in listed(done)), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "data").exists()


def test_dry_run_estimates_from_what_is_extracted_and_asks_nothing(straight, documents, server):
    output, _, _ = straight
    before, asked = made(output), len(server.requests)
    done = command("--dry_run", **variables(documents, output, server))
    assert done.returncode == 0 and "estimate of the synthesis" in done.stdout and "tokens" in done.stdout
    assert made(output) == before and len(server.requests) == asked
    fresh = command("--dry_run", **variables(documents, output.parent / "other", server))
    assert fresh.returncode == 0 and "can be told once documents are extracted" in fresh.stdout
    assert not (output.parent / "other").exists()
