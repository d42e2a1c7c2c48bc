"""Seconds of a search over a store of compressed documents, exact and in two steps, and what the two steps miss.

    python benchmarks/search.py [--sizes 1000 10000 100000] [--memory_tokens 16] [--width 576] [--factory IVF512,SQ8]

Vectors are drawn, not compressed: neither way's seconds depend on what they say. What the two steps miss does, so it is
measured on two kinds. `random`: independent numbers, all documents equally far from each other and from the query, the
worst case for any index, and for nothing that a model makes. `clustered`: documents of 100 groups around a common part,
queries drawn as they are; cosines lie as close together as those of compressed documents do. Stores are written to a
temporary folder (2 bytes a number; 18 GB for 10^6 documents of 16 × 576) and are in the file cache when they are read.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from common import finish, in_turn, parser, timed
from scaling import exponent
from tqdm import tqdm

from openrlhf.retrieval.search import TwoStepIndex, exact_search, measure_recall
from openrlhf.retrieval.store import Document, Store

QUERIES, TOP, RECALLS = (1, 32), 20, (5, 20)
KINDS = ("random", "clustered")


def drawn(kind: str, number: int, shape: tuple[int, int], seed: int) -> Iterator[torch.Tensor]:
    """Vectors `[n, L, D]` float32, a thousand at a time."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(0)
    common, centres = 4 * torch.randn(1, *shape, generator=fixed), torch.randn(100, *shape, generator=fixed)
    for start in range(0, number, 1000):
        n = min(1000, number - start)
        docs_NLD = torch.randn(n, *shape, generator=generator)
        if kind == "clustered":
            docs_NLD = common + centres[torch.randint(100, (n,), generator=generator)] + 0.7 * docs_NLD
        yield docs_NLD


def written(kind: str, number: int, shape: tuple[int, int], folder: Path) -> Store:
    """A store of so many documents."""
    store = Store.create(folder, {"n_memory": shape[0], "width": shape[1]})
    numbers = count()
    with tqdm(total=number, desc=f"{number} {kind}", unit=" documents", disable=None) as bar:
        for docs_NLD in drawn(kind, number, shape, seed=1):
            names = [str(next(numbers)) for _ in docs_NLD]
            keys = [name.encode() for name in names]
            documents = [Document(name, name) for name in names]
            store.add(documents, keys, dict(zip(keys, docs_NLD.bfloat16(), strict=True)))
            bar.update(len(docs_NLD))
    return store


def bandwidth() -> float:
    """Bytes a second at which this machine reads memory: the sum of 1 GB of whole numbers, median of 9."""
    numbers = torch.ones(2**30 // 8, dtype=torch.int64)
    return numbers.nbytes / statistics.median(in_turn({"sum": lambda: numbers.sum()}, 9, "cpu")["sum"])


def ways(store: Store, index: TwoStepIndex, query_BE: torch.Tensor, args) -> dict[str, Callable]:
    """What is timed, after a check that both ways give the same scores to the same rows."""
    scores, rows = index.search(query_BE, TOP)
    exact = exact_search(store, query_BE, len(rows[0]), args.device)
    for b in range(len(rows)):
        same = torch.isin(exact[1][b], rows[b])
        if not torch.equal(exact[0][b][same], scores[b][torch.isin(rows[b], exact[1][b])]):
            raise SystemExit("the two ways score differently: nothing was timed")
    found: dict[str, Callable] = {}
    for n in QUERIES:
        found[f"exact, {n}"] = lambda n=n: exact_search(store, query_BE[:n], TOP, args.device)
        found[f"two steps, {n}"] = lambda n=n: index.search(query_BE[:n], TOP)
    return found


def measured(kind: str, number: int, args) -> dict:
    """Seconds and recall of one store."""
    shape = (args.memory_tokens, args.width)
    query_BE = torch.cat(list(drawn(kind, max(QUERIES), shape, seed=2))).flatten(1)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        written(kind, number, shape, Path(folder, "s")) as store,
    ):
        place = Path(folder, "index")
        build = timed(lambda: TwoStepIndex.build(store, place, args.factory, args.device), args.device)
        index = TwoStepIndex.open(store, place)
        found: dict = {"kind": kind, "documents": len(store), "factory": index.factory, "build": build}
        found["seconds"] = in_turn(ways(store, index, query_BE, args), args.rounds, args.device)
        found["recall"] = {k: measure_recall(store, index, query_BE, k) for k in RECALLS}
    return found


def main() -> None:
    """Entry point."""
    flags = parser(__doc__, "search")
    flags.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5], help="documents of a store")
    flags.add_argument("--memory_tokens", type=int, default=16, help="memory vectors of a document")
    flags.add_argument("--width", type=int, default=576, help="numbers of a memory vector")
    flags.add_argument("--factory", help="FAISS's description of the index (default: by the number of documents)")
    flags.add_argument("--folder", type=Path, help="where to put the stores (default: the temporary folder)")
    args = flags.parse_args()
    rate, row_bytes = bandwidth(), 2 * args.memory_tokens * args.width
    cases = [measured(kind, number, args) for kind in KINDS for number in args.sizes]
    head = ["vectors", "documents", *(f"exact, {n}, s" for n in QUERIES), "exact, 1, GB/s", "of memory's"]
    rows = [[*head, *(f"two steps, {n}, s" for n in QUERIES), "index", *(f"recall@{k}" for k in RECALLS), "build, s"]]
    for case in cases:
        best = {name: min(seconds) for name, seconds in case["seconds"].items()}
        read = case["documents"] * row_bytes / best["exact, 1"]
        row = [case["kind"], f"{case['documents']:,}", *(f"{best[f'exact, {n}']:.4f}" for n in QUERIES)]
        row += [f"{read / 1e9:.1f}", f"{read / rate:.0%}", *(f"{best[f'two steps, {n}']:.4f}" for n in QUERIES)]
        rows.append([*row, case["factory"], *(f"{case['recall'][k]:.3f}" for k in RECALLS), f"{case['build']:.1f}"])
    fitted = {}
    for kind, name in [(kind, name) for kind in KINDS for name in cases[0]["seconds"]]:
        seconds = [min(case["seconds"][name]) for case in cases if case["kind"] == kind]
        if len(seconds) > 1:
            fitted[f"{kind}, {name}"] = exponent(args.sizes, seconds)
    shown = {name: f"{p:.2f}" for name, p in fitted.items()}
    for kind in KINDS if fitted else ():
        exact, steps = [[shown[f"{kind}, {way}, {n}"] for n in QUERIES] for way in ("exact", "two steps")]
        rows.append([kind, "exponent", *exact, "", "", *steps, "", *("" for _ in RECALLS), ""])
    finish(args, rows, {"memory_bytes_a_second": rate, "cases": cases, "exponents": fitted})


if __name__ == "__main__":
    main()
