"""Runs train_sft for the tests, each run in a process (or one a rank) of its own.

The processes are forked from a server that has the slow imports behind it, and then do what
`python -m openrlhf.cli.train_sft FLAGS` does: a run takes about a second instead of ten. They can be killed.
`command` is the real command line, for the few tests that are about it. CUDA is hidden from all of them.
"""

import atexit
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from openrlhf.trainer.config import TrainingConfig
from tests.trainer.facts import records, write_jsonl

ROOT = Path(__file__).parents[2]
BASE_MODEL = ROOT / "tests" / "data" / "vectors" / "decoders" / "sys"
TIMING = ("seconds", "tokens_per_s", "memory_gb")
LIMIT_SECONDS = 300
_CACHE = tempfile.TemporaryDirectory(prefix="clara-tests-")
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": _CACHE.name,
    "PYTHONPATH": str(ROOT),
}
_PRELOADED = [
    "tests.trainer.launch",
    "openrlhf.cli.train_sft",
    "openrlhf.trainer.sft_trainer",
    "openrlhf.trainer.build",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "transformers.models.mistral.modeling_mistral",
]


def processes():
    """The multiprocessing context of the server, started on first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    try:
        os.environ.update(ENVIRONMENT)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def flags(folder: Path, stage: str = "stage1", data: Path | None = None, **options) -> list[str]:
    """The command line of a small run of a stage into `folder`; `options` are flags by name, None leaves one out."""
    if data is None:
        data = folder.parent / f"{stage}.jsonl"
        if not data.exists():
            write_jsonl(data, records(stage))
    chosen = {
        "pretrain": BASE_MODEL,
        "dataset": data,
        "stage": stage,
        "doc_max_length": 32,
        "compress_rate": 8,
        "lora_r": 4,
        "generation_top_k": 1 if stage == "stage1" else 2,
        "max_len": 256,
        "train_batch_size": 8,
        "micro_train_batch_size": 3,
        "learning_rate": 1e-3,
        "max_epochs": 1,
        "save_path": folder,
        "ckpt_path": folder / "checkpoints",
        **options,
    }
    line = []
    for name, value in chosen.items():
        if value is None or value is False:
            continue
        line += (
            [f"--{name}"] if value is True else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        )
    return line


_STARTED: list["Run"] = []


@atexit.register  # before multiprocessing waits for its processes: a rank that a failed test left takes an hour to end
def _end_what_was_left() -> None:
    for run in _STARTED:
        run.kill()


@dataclass
class Run:
    """A run of train_sft that was started."""

    folder: Path
    ranks: list = field(default_factory=list)
    code: int | None = None

    @property
    def output(self) -> str:
        """Standard output of rank 0."""
        return self._said("out")

    @property
    def errors(self) -> str:
        """Standard error of rank 0."""
        return self._said("err")

    def _said(self, which: str) -> str:
        return (self.folder.parent / f"{self.folder.name}.0.{which}").read_text(encoding="utf-8")

    def wait(self) -> "Run":
        """Waits for all ranks; `code` is the worst exit code."""
        until = time.monotonic() + LIMIT_SECONDS
        for process in self.ranks:
            process.join(max(0.1, until - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise TimeoutError(f"the run in {self.folder} did not end:\n{self.errors[-2000:]}")
        self.code = max((process.exitcode for process in self.ranks), key=abs)
        return self

    def kill(self) -> None:
        """SIGKILL to all ranks."""
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def kill_when(self, condition: Callable[[], bool]) -> "Run":
        """Kills all ranks as soon as `condition` holds."""
        until = time.monotonic() + LIMIT_SECONDS
        try:
            while not condition():
                alive = all(process.is_alive() for process in self.ranks)
                assert alive, f"the run ended by itself:\n{self.errors[-2000:]}"
                assert time.monotonic() < until, "the condition never came true"
                time.sleep(0.002)
        finally:
            self.kill()
        return self.wait()

    def ok(self) -> "Run":
        """Waits, and fails the test with what the run said unless it succeeded."""
        self.wait()
        assert self.code == 0, f"exit code {self.code}\n{self.output[-1500:]}\n{self.errors[-4000:]}"
        return self

    def lines(self, split: str | None = None) -> list[dict]:
        """Lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if split in (None, line["split"])]

    def curve(self, name: str = "loss", split: str = "train") -> list[float]:
        """One figure of a split, line by line."""
        return [line[name] for line in self.lines(split)]

    def figures(self) -> list[dict]:
        """Lines of metrics.jsonl without what depends on the clock and the machine."""
        return [{key: value for key, value in line.items() if key not in TIMING} for line in self.lines()]

    def saved(self) -> dict[str, bytes]:
        """The weight files of the final checkpoint, byte for byte."""
        return weight_files(self.folder)


def weight_files(folder: Path) -> dict[str, bytes]:
    """Every safetensors file of a checkpoint by its path inside it."""
    parts = [*folder.glob("*.safetensors"), *folder.glob("*_adapter/*.safetensors")]
    assert parts, f"no weights in {folder}"
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def adapter(folder: Path, name: str) -> dict:
    """Tensors of one adapter of a checkpoint."""
    return load_file(folder / f"{name}_adapter" / "adapter_model.safetensors")


def start(
    folder: Path, arguments: Sequence[str], ranks: int = 1, env: dict | None = None, before: Callable | None = None
) -> Run:
    """Starts train_sft with these arguments; `before` is called in each process first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    _STARTED.append(run)
    port = free_port()
    for rank in range(ranks):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env_of_rank = {**(env or {}), **({key: str(v) for key, v in place.items()} if ranks > 1 else {})}
        said = str(folder.parent / f"{folder.name}.{rank}")
        process = processes().Process(target=_main, args=(list(arguments), said, env_of_rank, before))
        process.start()
        run.ranks.append(process)
    return run


def _main(arguments: list[str], said: str, env: dict, before: Callable | None) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(env)
    from openrlhf.cli import train_sft

    sys.argv = ["train_sft", *arguments]
    if before is not None:
        before()
    train_sft.main()


def train(folder: Path, stage: str = "stage1", data: Path | None = None, **options) -> Run:
    """A small run of a stage that must succeed, see `flags`."""
    return start(folder, flags(folder, stage, data, **options)).ok()


def train_many(runs: dict[str, tuple[Path, list[str]]]) -> dict[str, Run]:
    """Several runs, two at a time; all must succeed."""
    done: dict[str, Run] = {}
    names = list(runs)
    for i in range(0, len(names), 2):
        pair = {name: start(*runs[name]) for name in names[i : i + 2]}
        done.update({name: run.ok() for name, run in pair.items()})
    return done


def call(function: Callable, *args):
    """The result of `function(*args)` in a fresh process, where DeepSpeed may be set up."""
    with processes().Pool(1) as pool:  # leaving it ends the process, whatever that does
        return pool.apply_async(function, args).get(timeout=LIMIT_SECONDS)


def config(arguments: list[str]) -> TrainingConfig:
    """The checked configuration of a command line."""
    from openrlhf.cli.train_sft import parse

    return parse(arguments)


def command(*line: object, env: dict | None = None) -> subprocess.CompletedProcess:
    """Runs a real command, with the tests' environment."""
    known = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [str(word) for word in line],
        env={**known, **ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def free_port() -> int:
    """A port that is free, below those that the system gives to connections: none takes it before the run does."""
    while True:
        port = random.SystemRandom().randrange(10_000, 29_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def exact_trainer(arguments: list[str]):
    """The trainer that train_sft would make of these arguments, in float64 and without dropout; for use in `call`."""
    from openrlhf.trainer import build
    from openrlhf.trainer.sft_trainer import SFTTrainer
    from openrlhf.utils import distributed

    settings = config([*arguments, "--lora_dropout", "0"])
    device = distributed.start_processes()
    root = build.resolve_paths(settings)
    data, eval_data = build.load_data(settings)
    model = build.build_model(settings, build.model_config(settings, root), root, device)
    model.double()
    n_steps = -(-len(data) // settings.train_batch_size) * settings.max_epochs
    engine = build.build_engine(settings, model, n_steps)
    return SFTTrainer(engine, settings, data, build.build_collator(settings, model.tokens), device, None, eval_data)
