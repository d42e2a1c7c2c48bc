"""Training over two nodes with the project's own script: two network namespaces of this machine, joined by a cable.

Each node has its own address and loopback and reaches nothing but the other one, so this fails when processes meet
at an address that is good on one machine only. Needs root and `ip`; skipped where namespaces cannot be made.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.trainer.facts import records, write_jsonl
from tests.trainer.launch import BASE_MODEL, ENVIRONMENT, ROOT, Run

ADDRESSES = ("10.77.1.1", "10.77.1.2")
STEPS = 6
LIMIT_SECONDS = 180
FLAGS = (
    *("--bf16", "False", "--flash_attn", "False", "--doc_max_length", "32", "--compress_rate", "8", "--lora_r", "4"),
    *("--max_len", "256", "--train_batch_size", "8", "--micro_train_batch_size", "3", "--learning_rate", "1e-3"),
    *("--max_epochs", "2", "--save_steps", "1"),
)
# What DeepSpeed writes of a checkpoint: for all ranks, and for each.
SHARED, OWN = "mp_rank_00_model_states.pt", [f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2)]
# What a caller's shell may hold and would change the runs: the script's variables and what sets interfaces.
LEFT_OUT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "NUM_NODES", "NODE_RANK", "MASTER", "MASTER_PORT"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
)


def ip(*words: str) -> str:
    """Runs `ip`; what it printed."""
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True, timeout=20).stdout


@dataclass
class Node:
    """A machine, as far as the network is concerned."""

    namespace: str

    def kill(self) -> None:
        """SIGKILL to every process on the node, until there is none."""
        until = time.monotonic() + 20
        while (found := ip("netns", "pids", self.namespace).split()) and time.monotonic() < until:
            for number in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
            time.sleep(0.02)

    def remove(self) -> None:
        """Ends what runs there and takes the node away; nothing happens where there is none."""
        if self.namespace in ip("netns", "list").split():
            self.kill()
            ip("netns", "delete", self.namespace)


def connect(nodes: Sequence[Node]) -> None:
    """Makes the nodes' namespaces and a cable between the first two."""
    for node in nodes:
        ip("netns", "add", node.namespace)
        ip("-n", node.namespace, "link", "set", "lo", "up")
        ip("netns", "exec", node.namespace, "true")
    one, two = (node.namespace for node in nodes[:2])
    ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", two)
    for name, address in zip((one, two), ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Node]]:
    """Two nodes with a cable between them, and one alone."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes need the command ip (iproute2) for their network namespaces")
    nodes = [Node(f"clara-{os.getpid()}-{i}") for i in range(3)]
    try:
        try:
            connect(nodes)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            pytest.skip(f"network namespaces cannot be made here (root is needed): {said}")
        yield nodes
    finally:
        for node in nodes:
            node.remove()


@dataclass
class Launch:
    """One node's call of the script."""

    process: subprocess.Popen
    root: Path
    log: Path

    @property
    def folder(self) -> Path:
        """The run's --save_path on this node."""
        return self.root / "tiny"

    def said(self) -> str:
        """Output and errors so far."""
        return self.log.read_text(encoding="utf-8")


def start(node: Node, root: Path, name: str, *flags: str, **variables: object) -> Launch:
    """Starts the script on a node, with the tests' small settings, its own `flags` and its `variables`."""
    root.mkdir(parents=True, exist_ok=True)
    data = root / f"{name}.jsonl"
    write_jsonl(data, records("stage1"))
    given = {"PYTHON": sys.executable, "MODEL_PATH": BASE_MODEL, "DATA_PATH": data, "CHECKPOINT_ROOT": root}
    known = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    known["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles an optimiser that is not used here: 2 seconds a process
    env = {**known, **ENVIRONMENT, **{k: str(v) for k, v in {**given, "SAVE_MODEL_NAME": "tiny", **variables}.items()}}
    line = ("ip", "netns", "exec", node.namespace, "bash", "scripts/train_pretraining.sh", *FLAGS, *flags)
    log = root / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    return Launch(process, root, log)


def start_both(nodes: Sequence[Node], roots: Sequence[Path], *flags: str) -> list[Launch]:
    """Starts two nodes of one process each, each with its CHECKPOINT_ROOT."""
    meeting = {"NUM_NODES": 2, "NUM_LOCAL_GPUS": 1, "MASTER": ADDRESSES[0], "MASTER_PORT": 29500}
    return [start(nodes[i], roots[i], f"node{i}", *flags, NODE_RANK=i, **meeting) for i in range(2)]


def wait_for(launches: Sequence[Launch], condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds; fails with what was said when a launch fails or it takes too long."""
    until = time.monotonic() + LIMIT_SECONDS
    while not condition():
        failed = any(launch.process.poll() for launch in launches)
        if failed or time.monotonic() > until:
            said = "\n".join(f"{launch.log}:\n{launch.said()[-8000:]}" for launch in launches)
            pytest.fail(f"{'a process failed' if failed else 'it took too long'}\n{said}")
        time.sleep(0.01)


def finish(launches: Sequence[Launch]) -> list[Launch]:
    """Waits for launches that must succeed."""
    wait_for(launches, lambda: all(launch.process.poll() == 0 for launch in launches))
    return list(launches)


def weights(launch: Launch) -> dict[str, torch.Tensor]:
    """All tensors of the final checkpoint."""
    files = Run(launch.folder).saved()
    return {f"{file} {name}": tensor for file, data in files.items() for name, tensor in load(data).items()}


@pytest.fixture(scope="module")
def two_nodes(machines, tmp_path_factory) -> list[Launch]:
    """An uninterrupted run over two nodes that share their disk, where an earlier run was killed while it saved."""
    root = tmp_path_factory.mktemp("shared")
    for step in range(1, STEPS + 1):
        left = root / "tiny" / "checkpoints" / f"partial-global_step{step}" / "some" / "folder"
        left.mkdir(parents=True)
        for i in range(20):
            (left / str(i)).touch()
            (left.parent / str(i)).touch()
    return finish(start_both(machines, [root, root]))


def test_two_nodes_train_as_one(two_nodes, machines, tmp_path):
    ranks = (2, 1)
    alone = finish([start(machines[2], tmp_path / str(n), "one", NUM_NODES=1, NUM_LOCAL_GPUS=n) for n in ranks])
    there, got = Run(two_nodes[0].folder), weights(two_nodes[0])
    assert there.curve("step") == list(range(1, STEPS + 1))
    for one in alone:
        here, expected = Run(one.folder), weights(one)
        for figure in ("loss", "mse_loss"):
            assert there.curve(figure) == pytest.approx(here.curve(figure), rel=0, abs=1e-5)
        for figure in ("tokens", "answer_tokens", "learning_rate"):
            assert there.curve(figure) == here.curve(figure)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_nodes_that_share_a_disk_keep_one_checkpoint(two_nodes):
    checkpoints = two_nodes[0].folder / "checkpoints"
    assert not list(checkpoints.glob("partial-*"))
    assert {path.name for path in (checkpoints / f"global_step{STEPS}").iterdir()} == {SHARED, OWN[0], OWN[1]}


def test_a_killed_node_with_a_disk_for_each(two_nodes, machines, tmp_path):
    roots = [tmp_path / "disk0", tmp_path / "disk1"]
    launches = start_both(machines, roots)
    kept = [launch.folder / "checkpoints" for launch in launches]
    wait_for(launches, lambda: all((folder / "global_step2").is_dir() for folder in kept))
    machines[1].kill()
    assert launches[1].process.wait(LIMIT_SECONDS) == -signal.SIGKILL
    assert launches[0].process.wait(LIMIT_SECONDS) != 0, "node 0 took the run for finished"
    assert not (launches[0].folder / "config.json").exists(), "the run was over before the kill"

    # As if node 1 had just renamed its part of the newest checkpoint, node 0 not yet, and node 1 was writing the next.
    newest = min(max(int(path.name[11:]) for path in folder.glob("global_step*")) for folder in kept)
    for step in range(newest, STEPS + 1):
        shutil.rmtree(kept[0] / f"global_step{step}", ignore_errors=True)
    half = kept[1] / f"partial-global_step{newest + 1}"
    half.mkdir(exist_ok=True)
    (half / "half").touch()

    again = finish(start_both(machines, roots, "--load_checkpoint"))
    assert f"resumed from step {newest - 1} of {STEPS}" in again[0].said()
    assert Run(again[0].folder).figures() == Run(two_nodes[0].folder).figures()
    assert Run(again[0].folder).saved() == Run(two_nodes[0].folder).saved()
    for folder, own in zip(kept, OWN, strict=True):
        assert not list(folder.glob("partial-*"))
        assert {path.name for path in (folder / f"global_step{STEPS}").iterdir()} == {SHARED, own}

    assert f"checkpoint  {again[0].folder}" in again[0].said()
    assert f"node 0 ({ADDRESSES[0]}) writes the trained checkpoint" in again[1].said()
    assert [path.name for path in again[1].folder.iterdir()] == ["checkpoints"]
