"""Worker processes that convert files: a file that hangs or kills its worker costs that file, never the run.

Contract: `Workers.run` gives what `convert.convert` gives for a file, or raises `Skip` with the reason, within its
time. A worker is a Python process of its own that reads one JSON line for each file and answers with one. Started as
`python -m openrlhf.pipeline.worker` by `Workers` only. Knows nothing about state or output.
"""

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from openrlhf.pipeline.convert import Passing, Skip, convert

_START = 600  # seconds for the imports of a worker, on a very busy machine
_ENDING = 60  # seconds for the end of a worker that has closed its output
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")  # no file does this to its reader


class Died(Skip):
    """The worker did not come back from this file: it took too long, or the file brought it down."""


class Workers:
    """Workers for several threads, started as they are needed and used again.

    Args:
        tokenizer: name or directory of the model's tokenizer.
        threads: for the computations of one worker.
        offline: nothing is to be fetched from the Hub.
    """

    def __init__(self, tokenizer: str, threads: int = 1, offline: bool = True):
        self._tokenizer = tokenizer
        self._variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if offline:
            self._variables |= {"HF_HUB_OFFLINE": "1"}
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._closed = False

    def run(self, path: Path, sha256: str, kind: str, options: dict, pictures: dict[str, str], seconds: float) -> dict:
        """See `convert.convert`.

        Raises:
            Skip: the file cannot be used. Died: it took longer than `seconds`, or ended its worker. Passing: another
                time it may go better.
            RuntimeError: workers cannot be started.
        """
        worker = self._waiting() or _Worker(self._tokenizer, self._variables)
        self._all.add(worker)
        if self._closed:
            self._end(worker)
            raise Passing("was not read: the run was interrupted")
        request = {"path": str(path), "sha256": sha256, "kind": kind, "options": options, "pictures": pictures}
        try:
            answer = worker.ask(request, seconds)
        except BaseException:
            self._end(worker)
            raise
        self._idle.put(worker)
        if "skip" in answer:
            raise (Passing if answer["passing"] else Skip)(answer["skip"])
        return answer["result"]

    def _waiting(self) -> "_Worker | None":
        """A worker that is idle and alive."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return None
            if worker.alive():
                return worker
            self._end(worker)

    def _end(self, worker: "_Worker") -> None:
        self._all.discard(worker)
        worker.end()

    def close(self) -> None:
        """Ends all workers, also those that an interrupt left in the middle of a file."""
        self._closed = True
        for worker in list(self._all):
            worker.kill()
        while not self._idle.empty():
            self._end(self._idle.get_nowait())


class _Worker:
    """One process."""

    def __init__(self, tokenizer: str, variables: dict[str, str]):
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, tokenizer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **variables, "PYTHONPATH": path},
            start_new_session=True,  # ended as a group; an interrupt from the keyboard is the driver's
        )
        try:
            self._read(_START)
        except (Died, Passing) as error:
            self._errors.seek(max(0, self._errors.tell() - 2000))
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            self.end()
            raise RuntimeError(f"a worker cannot start ({error}): {said[-1] if said else 'it says nothing'}") from None

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict, seconds: float) -> dict:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # what it died of is told below
        return self._read(seconds)

    def _read(self, seconds: float) -> dict:
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        finally:
            timer.cancel()
        if late.is_set():  # even with an answer: the worker is gone
            raise Died(f"took longer than --file_timeout {seconds:g} s")
        if line.endswith(b"\n"):
            return json.loads(line)
        try:
            code = self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        if name in _FROM_OUTSIDE:
            more = ": most likely memory ran out" if name == "SIGKILL" else ""
            raise Passing(f"its process was ended from outside ({name}{more}); it is tried again next time")
        raise Died(f"ended the process that read it ({name})")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _serve(tokenizer_name: str) -> None:
    """Answers until the other side is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    with contextlib.suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("900")
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    import docling.datamodel.document  # noqa: F401 - a broken installation shows here, not with a file

    tokenizer.model_max_length = sys.maxsize  # no warning where a text is longer: it is going to be cut

    def answer(value: dict) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin.buffer:
        answer(_answer(json.loads(line), tokenizer))


def _answer(request: dict, tokenizer: Any) -> dict:
    try:
        data = _read(Path(request["path"]), request["sha256"])
        return {"result": convert(data, request["kind"], request["options"], tokenizer, request["pictures"])}
    except Skip as error:
        return {"skip": str(error), "passing": isinstance(error, Passing)}
    except MemoryError:
        return {"skip": "needs more memory than there is; it is tried again next time", "passing": True}
    except Exception as error:  # whatever a damaged file makes of a parser
        said = f"cannot be converted: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {"skip": said, "passing": False}


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Passing(f"cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Passing("changed while it was being read")
    return data


if __name__ == "__main__":
    _serve(sys.argv[1])
