"""Runs one step of the pipeline over many rows: in threads of this process, or over a Ray cluster.

Contract: results come in the order of the rows whatever finishes first; a function sees one row and the state, through
which it asks what has been done and keeps what it did. Knows nothing about the steps.
"""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from openrlhf.pipeline.state import State

Row = TypeVar("Row")
Result = TypeVar("Result")
# Variables of this process that the workers of a cluster need too; given to them directly, never through Ray's logs.
_VARIABLES = ("OPENAI_", "BASE_URL", "MODEL", "VISION_MODEL", "PRICE_", "HF_", "TOKENIZERS_", "OMP_NUM_THREADS")


def each(
    function: Callable[[Row, State], Result],
    rows: Sequence[Row],
    state: State,
    workers: int | None = 1,
    title: str = "",
    ray: bool = False,
) -> Iterator[Result]:
    """function(row, state) for every row, at most `workers` at once; results in the rows' order.

    An exception of one row is raised when its turn comes, after the rows that are under way have ended; rows that have
    not begun are left out then. An interrupt from the keyboard does not wait for them.

    Args:
        workers: None is half of the cores, with `ray` of the cluster's.
        function: with `ray`, something that can be pickled. Each worker has a copy of its own, and the state it sees is
            reached over the network: `get` and `put` only. Where it has a method `close`, that is called at the end.
        ray: work on the cluster at RAY_ADDRESS, or on one of this machine alone. The state stays on this machine.
    """
    run = _in_ray if ray else _in_threads
    with (
        tqdm(total=len(rows), desc=title, disable=None) as bar,
        contextlib.closing(run(function, rows, state, workers)) as results,
    ):
        for result in results:
            bar.update()
            yield result


def half(cores: float | None) -> int:
    """Of the cores, at least one: the libraries behind a worker have threads of their own."""
    return max(1, int(cores or 1) // 2)


def _in_threads(
    function: Callable[[Row, State], Result], rows: Sequence[Row], state: State, workers: int | None
) -> Generator[Result, None, None]:
    pool, wait = ThreadPoolExecutor(max_workers=workers or half(os.cpu_count())), True
    try:
        waiting = deque(pool.submit(function, row, state) for row in rows)
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


def _in_ray(
    function: Callable[[Row, State], Result], rows: Sequence[Row], state: State, workers: int | None
) -> Generator[Result, None, None]:
    if not rows:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--ray needs Ray, which is not installed: pip install 'clara-rag[ray]'") from None
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote(str(state.path.absolute()))
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    items = [{"number": number, "row": cloudpickle.dumps(row)} for number, row in enumerate(rows)]
    there = ray.cluster_resources().get("CPU", 1)
    workers = workers or half(there)
    # Workers may outnumber the cores: what they wait for is often an endpoint.
    cores = min(1.0, 0.9 * there / workers)
    try:
        ray.get(keeper.get.remote("", ""))  # says at once what is wrong with the state
        results = ray.data.from_items(items, override_num_blocks=min(len(items), 64 * workers)).map(
            _Task,
            fn_constructor_args=(cloudpickle.dumps(function), keeper, variables),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=cores,
        )
        early: dict[int, bytes] = {}
        turn = 0
        for item in results.iter_rows():
            early[item["number"]] = item["outcome"]
            while turn in early:
                kind, value = cloudpickle.loads(early.pop(turn))
                if kind == "error":
                    raise value
                yield value
                turn += 1
    finally:
        if own:
            ray.shutdown()
        else:
            ray.kill(keeper)


class _Keeper:
    """The state as an actor beside the driver, which holds it locked against other runs."""

    def __init__(self, path: str):
        self._state = State(path, shared=True)

    def get(self, step: str, key: str) -> Any:
        return self._state.get(step, key)

    def put(self, step: str, key: str, result: Any) -> None:
        self._state.put(step, key, result)


class _Reached:
    """The state as a function on a worker sees it: `get` and `put` of `State`."""

    def __init__(self, keeper: Any):
        self._keeper = keeper

    def get(self, step: str, key: str) -> Any:
        import ray

        return ray.get(self._keeper.get.remote(step, key))

    def put(self, step: str, key: str, result: Any) -> None:
        import ray

        ray.get(self._keeper.put.remote(step, key, result))


class _Task:
    """One worker of the cluster."""

    def __init__(self, function: bytes, keeper: Any, variables: dict[str, str]):
        from ray import cloudpickle

        os.environ.update(variables)
        self._function, self._state = cloudpickle.loads(function), _Reached(keeper)

    def __call__(self, item: dict) -> dict:
        from ray import cloudpickle

        try:
            outcome = ("value", self._function(cloudpickle.loads(item["row"]), self._state))
        except Exception as error:  # one that left this function would end the whole dataset
            outcome = ("error", error)
        return {"number": item["number"], "outcome": cloudpickle.dumps(outcome)}

    def __del__(self) -> None:
        close = getattr(self._function, "close", None)
        if close is not None:
            close()
