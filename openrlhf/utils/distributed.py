"""Processes and the DeepSpeed engine: one place that knows how many ranks there are and how ZeRO is set up.

Knows nothing about the model's parts, stages or data.
"""

import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

PARTIAL = "partial-"


class WriteError(OSError):
    """A checkpoint could not be written; may be one rank's alone."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns what a full disk makes Python, torch or safetensors raise into a `WriteError` in words."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(p for p in target.absolute().parents if p.exists())).free
        raise WriteError(
            f"{target} could not be written, {free / 1e9:.1f} GB are free there ({error}). Checkpoints written before "
            "are whole: make room, then go on with --load_checkpoint"
        ) from error


def start_processes(local_rank: int = -1, timeout_minutes: int = 60) -> torch.device:
    """Joins the process group that torchrun or deepspeed described, or makes one of a single process.

    Returns:
        this rank's device: its CUDA device where there is one, else the CPU.
    """
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    os.environ.setdefault("LOCAL_RANK", str(max(local_rank, 0)))
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # The shared-memory all-reduce would be compiled here; gloo does without, and no compiler is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    if alone:  # a store in memory needs no port, which another run that starts now could take
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return device


def rank() -> int:
    """This process's number, 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums each value over all ranks, in float64; every rank must give the same keys."""
    keys = sorted(values)
    total = torch.tensor([float(values[key]) for key in keys], dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(keys, total.tolist(), strict=True))


def min_over_ranks(value: int, device: torch.device) -> int:
    """The smallest of the ranks' values."""
    smallest = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def gather_objects(value: object) -> list:
    """Every rank's (picklable) value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def seed_everything(*parts: object) -> None:
    """Seeds torch (and so LoRA dropout) by a function of `parts`, on every device."""
    torch.manual_seed(random.Random("/".join(map(str, parts))).getrandbits(63))


def engine_config(args: Any) -> dict:
    """The DeepSpeed configuration of a run."""
    return {
        "train_micro_batch_size_per_gpu": args.micro_train_batch_size,
        "gradient_accumulation_steps": max(1, args.train_batch_size // (args.micro_train_batch_size * world_size())),
        "bf16": {"enabled": args.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": args.max_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": args.zero_stage, "overlap_comm": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A DeepSpeed engine over one model.

    Args:
        model: its `requires_grad` flags must be final: only those parameters are ever updated.
        optimizer: over the trainable parameters.
        scheduler: of the learning rate, stepped once an optimiser step.
        args: see `engine_config`.
    """

    def __init__(self, model: torch.nn.Module, optimizer, scheduler, args: Any):
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trainable,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=engine_config(args),
            dist_init_required=False,
        )
        self.model: Any = model
        self.zero_stage = args.zero_stage

    def __call__(self, *args, **kwargs):
        """Forward pass through the engine."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch; `last` marks the end of the global batch.

        The engine averages over ranks: give `loss` already multiplied by their number.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips, updates, steps the schedule; returns the gradient norm before clipping."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def gathered(self, parameters):
        """Context in which partitioned parameters (ZeRO-3) are whole."""
        return deepspeed.zero.GatheredParameters(list(parameters), enabled=self.zero_stage == 3)

    def save(self, folder: Path, name: str, position: dict) -> bool:
        """Writes a checkpoint to resume from; under its own name only once every rank has written its part.

        Nodes that do not share `folder` each keep there what their own ranks resume from.

        Returns:
            True on the one rank of each disk that looks after the folder.
        """
        partial = folder / f"{PARTIAL}{name}"
        keeper = _make_on_each_disk(partial)
        if self.zero_stage < 3:  # what all ranks have in common DeepSpeed writes on rank 0's disk alone
            self.engine.save_non_zero_checkpoint = keeper
        options = {"client_state": position, "save_latest": False, "exclude_frozen_parameters": True}
        try:
            with writing(folder / name):
                self.engine.save_checkpoint(str(folder), tag=partial.name, **options)
        except WriteError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        barrier()
        if keeper:
            _sync_files(partial)
            shutil.rmtree(folder / name, ignore_errors=True)  # there where a crash left this node ahead of the others
            os.replace(partial, folder / name)
        barrier()
        return keeper

    def load(self, folder: Path, name: str) -> dict:
        """Restores weights, optimiser and schedule; returns what `save` was given as `position`."""
        path, position = self.engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"the checkpoint {folder / name} could not be read by this number of ranks")
        return position


def _make_on_each_disk(folder: Path) -> bool:
    """Makes an empty directory wherever the nodes see different disks; True on the one rank of each disk that made it.

    Whether a disk is shared shows in who could make it: on network file systems `exists` may answer from a cache.

    Raises:
        FileExistsError: what an earlier run left there could not be removed.
    """
    made = False
    first_here = int(os.environ["LOCAL_RANK"]) == 0
    if first_here:
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run; nodes may remove it at the same time
    barrier()
    if first_here:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            made = True
    if not any(gather_objects(made)):
        raise FileExistsError(f"{folder} is in the way and could not be removed")
    return made


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
