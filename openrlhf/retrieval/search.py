"""Exact and two-step search over a store of compressed documents.

Contract: a score is the cosine of the flattened query and the flattened document (`openrlhf.models.selection`), in
float64 over the stored bfloat16 numbers and rounded to float32; the k best come best first, equal scores by the smaller
row. So the result depends on nothing but the query and the live rows: not on blocks, device, threads or what other
queries are asked with it. Memory is that of a block, whatever the store's size.

How: float32 products of a block with all queries tell, to TOLERANCE, what can be among the best; only that is computed
in float64. The two-step search finds candidates in an index first and gives them these scores. Knows nothing about
texts, models or how rows came into the store.

Shape suffixes: B queries, N rows of a block, K best, P pairs of query and row, L memory tokens, D hidden size, E = L·D.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from openrlhf.retrieval.binding import read_index, write_index
from openrlhf.retrieval.store import Store

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
# Converted to float32 a piece at a time, each small enough to stay in a CPU's cache until it was read for both product
# and norm: about twice as fast as larger ones.
TILE_BYTES = 4 * 2**20
# Float32 cosines of 65,536 numbers with a large common part were seen to be off by 7e-6.
TOLERANCE = 1e-4

# Of the two-step index: numbers of a projected vector, documents they are found from, and what FAISS learns from.
DIMENSIONS, COMPONENTS_FROM, TRAINED_ON = 256, 1024, 10_240
# Of an index in lists: every PROBED-th is looked into, and at least MIN_PROBES.
PROBED, MIN_PROBES = 8, 8
MIN_CANDIDATES = 100
_EPS = 1e-8  # of F.cosine_similarity: a vector of zeros scores 0
_NO_ROW = torch.iinfo(torch.int64).max


def exact_search(
    store: Store,
    query_BE: torch.Tensor,
    k: int,
    device: str | torch.device | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows nearest to each query, in one pass over the store for all queries together.

    Args:
        query_BE: flattened queries `[B, E]`, any float type, not necessarily normalised.
        k: at least 1.
        device: where blocks are scored; the CPU by default.
        block_bytes: bfloat16 bytes of documents read at a time; three times as much memory is used on another device.

    Returns:
        scores `[B, K]` float32, best first, and their rows `[B, K]` int64, on the CPU. K is k, or the number of live
        rows where the store has fewer: `[B, 0]` for an empty store.

    Raises:
        ValueError: a query of another size or not finite, k or block_bytes not positive, a stored vector not finite.
        RuntimeError: products on this device are too coarse.
    """
    check_queries(store, query_BE, k)
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    best = TopK(query_BE, max(1, min(k, store.n_rows())), device)
    for rows_N, docs_NLD in store.blocks(rows_of(store, block_bytes)):
        best.add(rows_N, docs_NLD.flatten(1))
    return best.result()


def score_rows(store: Store, query_BE: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The score of each query with each of some rows, `[B, N]` float32, as `exact_search` gives it.

    Raises:
        ValueError: as `exact_search`; a row is not live.
    """
    check_queries(store, query_BE, 1)
    docs_NE = store.vectors(rows).flatten(1)
    b_P, n_P = torch.ones(len(query_BE), len(docs_NE)).nonzero(as_tuple=True)
    return TopK(query_BE, 1).exact(docs_NE, b_P, n_P).view(len(query_BE), len(docs_NE))


def check_queries(store: Store, query_BE: torch.Tensor, k: int) -> None:
    """Raises ValueError when these queries cannot be searched in this store."""
    width = store.n_memory * store.width
    if query_BE.ndim != 2 or query_BE.shape[1] != width:
        raise ValueError(
            f"queries must be [B, {width}] ({store.n_memory} memory vectors of {store.width} numbers, flattened) in "
            f"this store, got {tuple(query_BE.shape)}: encode them with the checkpoint that the store was made with"
        )
    if not query_BE.isfinite().all():
        raise ValueError("a query holds NaN or infinity: the model that encoded it overflowed or is damaged")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def rows_of(store: Store, n_bytes: int) -> int:
    """How many bfloat16 rows fit into so many bytes, at least 1."""
    return max(1, n_bytes // (2 * store.n_memory * store.width))


class Tiles:
    """Documents converted to float32 a piece at a time, multiplied with fixed columns, divided by their norms.

    Args:
        columns_EC: `[E, C]` float32; its device is where products are computed.
    """

    def __init__(self, columns_EC: torch.Tensor):
        self.columns_EC, self.device = columns_EC.contiguous(), columns_EC.device
        self.tile_NE: torch.Tensor | None = None

    def __call__(self, docs_NE: torch.Tensor) -> torch.Tensor:
        """`[N, C]` float32: the products of bfloat16 documents `[N, E]`, normalised, with the columns."""
        out_NC = torch.empty(len(docs_NE), self.columns_EC.shape[1], device=self.device)
        step = max(1, TILE_BYTES // (4 * docs_NE.shape[1])) if self.device.type == "cpu" else len(docs_NE)
        if self.tile_NE is None or len(self.tile_NE) < min(step, len(docs_NE)):
            self.tile_NE = torch.empty(min(step, len(docs_NE)), docs_NE.shape[1], device=self.device)
        for start in range(0, len(docs_NE), step):
            part_NE = docs_NE[start : start + step]
            tile_NE = self.tile_NE[: len(part_NE)].copy_(part_NE)
            norm_N1 = torch.linalg.vector_norm(tile_NE, dim=1, keepdim=True).clamp_min_(_EPS)
            torch.mm(tile_NE, self.columns_EC, out=out_NC[start : start + step]).div_(norm_N1)
        return out_NC


class TopK:
    """The k best rows of each query among those given so far.

    Args:
        query_BE: `[B, E]`, finite.
    """

    def __init__(self, query_BE: torch.Tensor, k: int, device: str | torch.device | None = None):
        self.device = torch.device(device or "cpu")
        query_BE = query_BE.detach().to(self.device, torch.float64)
        self.unit_BE = query_BE / query_BE.norm(dim=1, keepdim=True).clamp_min(_EPS)
        self.products = Tiles(self.unit_BE.float().T)
        self.k, n_queries = k, len(query_BE)
        self.scores_BK = torch.full((n_queries, k), float("-inf"), device=self.device)
        self.rows_BK = torch.full((n_queries, k), _NO_ROW, device=self.device)

    def add(self, rows_N: torch.Tensor, docs_NE: torch.Tensor) -> None:
        """Takes in rows, each new, with their vectors `[N, E]` bfloat16; every query is compared with each.

        Raises:
            ValueError: a vector is not finite.
            RuntimeError: products on this device are too coarse.
        """
        docs_NE = docs_NE.to(self.device)
        about_BN = self.products(docs_NE).T
        bad_N = ~about_BN.isfinite().all(0)
        if bad_N.any():
            row = int(rows_N[bad_N.cpu()][0])
            raise ValueError(f"row {row} of the store holds NaN or infinity: compress its documents again")
        possible_BN = about_BN >= (self.scores_BK[:, -1:] - TOLERANCE)
        if len(rows_N) > self.k and possible_BN.sum() > possible_BN.shape[0] * self.k:
            possible_BN &= about_BN >= about_BN.topk(self.k, dim=1).values[:, -1:] - 2 * TOLERANCE
        self.add_pairs(rows_N, docs_NE, possible_BN, about_BN)

    def add_pairs(
        self,
        rows_N: torch.Tensor,
        docs_NE: torch.Tensor,
        chosen_BN: torch.Tensor,
        about_BN: torch.Tensor | None = None,
    ) -> None:
        """Takes in the rows that are chosen for each query; `about_BN` are scores to compare the exact ones with.

        Raises:
            RuntimeError: they differ by more than TOLERANCE.
        """
        b_P, n_P = chosen_BN.to(self.device).nonzero(as_tuple=True)
        if not len(b_P):
            return
        scores_P = self.exact(docs_NE.to(self.device), b_P, n_P)
        if about_BN is not None and (scores_P - about_BN[b_P, n_P]).abs().max() > TOLERANCE:
            raise RuntimeError(
                f"float32 products on {self.device} are not float32: search with "
                "torch.set_float32_matmul_precision('highest')"
            )
        counts_B = torch.bincount(b_P, minlength=len(self.unit_BE))
        first_B = counts_B.cumsum(0) - counts_B
        at_P = torch.arange(len(b_P), device=self.device) - first_B[b_P]
        shape = (len(counts_B), int(counts_B.max()))
        scores_BC = torch.full(shape, float("-inf"), device=self.device)
        rows_BC = torch.full(shape, _NO_ROW, device=self.device)
        scores_BC[b_P, at_P], rows_BC[b_P, at_P] = scores_P, rows_N.to(self.device)[n_P]
        self._merge(scores_BC, rows_BC)

    def replace(self, which_B: torch.Tensor, scores_BK: torch.Tensor, rows_BK: torch.Tensor) -> None:
        """Puts other results in the place of those of some queries."""
        self.scores_BK[which_B, : scores_BK.shape[1]] = scores_BK.to(self.device)
        self.rows_BK[which_B, : rows_BK.shape[1]] = rows_BK.to(self.device)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and rows `[B, K]` on the CPU; where a query has fewer rows than another, −inf and −1."""
        scores_BK, rows_BK = self.scores_BK.cpu(), self.rows_BK.cpu()
        there_BK = rows_BK != _NO_ROW
        used = int(there_BK.sum(1).max()) if len(there_BK) else 0
        return scores_BK[:, :used].clone(), rows_BK.masked_fill(~there_BK, -1)[:, :used].clone()

    def exact(self, docs_NE: torch.Tensor, b_P: torch.Tensor, n_P: torch.Tensor) -> torch.Tensor:
        """Float64 cosines of pairs, `[P]` float32. Each is a sum over one row, so that equal vectors score equal."""
        step = max(1, TILE_BYTES // (8 * docs_NE.shape[1]))
        scores = []
        for b, n in zip(b_P.split(step), n_P.split(step), strict=True):
            docs_PE = docs_NE[n].double()
            norms_P = docs_PE.square().sum(1).sqrt().clamp_min(_EPS)
            scores.append(((docs_PE * self.unit_BE[b]).sum(1) / norms_P).float())
        return torch.cat(scores)

    def _merge(self, scores_BC: torch.Tensor, rows_BC: torch.Tensor) -> None:
        """Keeps the k best of what was kept and these."""
        rows, by_row = torch.cat([self.rows_BK, rows_BC], dim=1).sort(dim=1, stable=True)
        scores = torch.cat([self.scores_BK, scores_BC], dim=1).gather(1, by_row)
        scores, by_score = scores.sort(dim=1, descending=True, stable=True)
        self.scores_BK = scores[:, : self.k].contiguous()
        self.rows_BK = rows.gather(1, by_score)[:, : self.k].contiguous()


class TwoStepIndex:
    """Candidates from an approximate FAISS index of projected vectors, then the exact scores of the candidates.

    The projection keeps the directions in which the normalised documents differ most: cosines of compressed documents
    lie close together, and a random projection's error is larger than what sets them apart. FAISS sees the distances of
    projections; between normalised vectors the smallest distance is the largest cosine.

    Rows added to the store since the index was built are searched exactly beside it; deleted ones never come back.

    Attributes:
        factory: FAISS's description of the index.
        rows_R: rows that the index holds, `[R]` int64, ascending.
        tail_T: live rows that it does not hold, `[T]`, as of the last `refresh`.
    """

    NAME = "two_step"

    def __init__(self, store: Store, factory: str, tensors: dict[str, torch.Tensor], index: Any):
        self.store, self.factory, self._index = store, factory, index
        self.rows_R, self._basis_EP = tensors["rows"], tensors["basis"]
        self._changes: tuple[int, int] | None = None
        self.refresh()

    @classmethod
    def build(
        cls,
        store: Store,
        folder: str | Path,
        factory: str | None = None,
        device: str | torch.device | None = None,
        dimensions: int = DIMENSIONS,
        probe: int | None = None,
    ) -> "TwoStepIndex":
        """Builds the index of a store's live rows in two passes over a sample and one over all, and writes it.

        Args:
            folder: where to write it; an index that is there is replaced once the new one is whole.
            factory: a string for `faiss.index_factory`, over vectors of `dimensions` or fewer numbers;
                `default_factory` otherwise.
            device: where vectors are projected; the CPU by default.
            dimensions: numbers of a projected vector, at most COMPONENTS_FROM; fewer where documents vary in fewer.
            probe: of an index in lists, how many a question looks into; default: every PROBED-th.

        Raises:
            ValueError: FAISS is not installed, the store is empty, FAISS refuses the factory, or a number cannot be.
            OSError: the disk is full or not writable.
        """
        faiss = _faiss()
        rows_R = store.rows()
        if not len(rows_R):
            raise ValueError(f"{store.path} holds no documents: there is nothing to build an index of")
        if not 1 <= dimensions <= COMPONENTS_FROM:
            raise ValueError(f"a projection has between 1 and {COMPONENTS_FROM} numbers, asked for {dimensions}")
        factory = factory or default_factory(len(rows_R))
        basis_EP = principal_components(store, rows_R, device, dimensions)
        project = Tiles(basis_EP)
        with _faiss_errors(factory, len(rows_R)):
            index = faiss.index_factory(basis_EP.shape[1], factory, faiss.METRIC_L2)
        lists = faiss.try_extract_index_ivf(index)
        n_lists = 0 if lists is None else lists.nlist
        if probe is not None and not 1 <= probe <= n_lists:
            raise ValueError(
                f"'{factory}' has {n_lists} lists (those with IVF have any): {probe} cannot be looked into"
            )
        if lists is not None:
            lists.nprobe = probe or max(MIN_PROBES, n_lists // PROBED)
        step = rows_of(store, BLOCK_BYTES)
        if not index.is_trained:
            sample_S = evenly(rows_R, max(TRAINED_ON, 40 * lists.nlist if lists is not None else 0))
            trained = [project(store.vectors(rows_N).flatten(1)).cpu() for rows_N in sample_S.split(step)]
            with _faiss_errors(factory, len(rows_R)):
                index.train(torch.cat(trained).numpy())
        held = []
        with tqdm(total=len(rows_R), desc="index", unit=" rows", disable=None) as bar:
            for rows_N, docs_NLD in store.blocks(step):
                index.add(project(docs_NLD.flatten(1)).cpu().numpy())
                held.append(rows_N)
                bar.update(len(rows_N))
        tensors = {"rows": torch.cat(held), "basis": basis_EP.cpu()}

        def write(parts: Path) -> None:
            save_file(tensors, parts / "projection.safetensors")
            faiss.write_index(index, str(parts / "projected.faiss"))

        write_index(folder, cls.NAME, {"factory": factory}, store, tensors["rows"], write)
        return cls(store, factory, tensors, index)

    @classmethod
    def open(cls, store: Store, folder: str | Path) -> "TwoStepIndex":
        """An index that was built from this store.

        Raises:
            FileNotFoundError: there is none.
            ValueError: FAISS is not installed, or the index is damaged or was built from another store.
        """
        faiss = _faiss()
        header, parts = read_index(folder, cls.NAME, store)
        try:
            tensors = load_file(parts / "projection.safetensors")
            index = faiss.read_index(str(parts / "projected.faiss"))
            return cls(store, header["factory"], tensors, index)
        except (RuntimeError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(f"the index in {folder} is damaged ({error}): build it again") from error

    def refresh(self) -> None:
        """Looks up what was added to the store and deleted from it since the index was built; at no cost where nothing
        was committed since the last time."""
        if (changes := self.store.changes()) == self._changes:
            return
        live = self.store.rows()
        self._live_R = torch.isin(self.rows_R, live, assume_unique=True)
        self.tail_T = live[~torch.isin(live, self.rows_R, assume_unique=True)]
        if len(self.tail_T) > len(live) // 10:
            said = "%d of %d rows are not in the index and are searched one by one: build it again"
            logger.warning(said, len(self.tail_T), len(live))
        self._changes = changes

    def search(
        self, query_BE: torch.Tensor, k: int, candidates: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of each query's candidates and of the rows that the index does not hold.

        Args:
            query_BE: `[B, E]`, as `exact_search`.
            candidates: rows taken from the index for each query, at least k; by default 10 k, at least 100.

        Returns:
            as `exact_search`, with exact scores; rows that the index missed are missing. Rows added after the last
            `refresh` are not found.

        Raises:
            ValueError: as `exact_search`, or fewer candidates than k.
        """
        check_queries(self.store, query_BE, k)
        wanted = max(MIN_CANDIDATES, 10 * k) if candidates is None else candidates
        if wanted < k:
            raise ValueError(f"{wanted} candidates cannot give the {k} best: ask for at least {k}")
        try:
            return self._search(query_BE, k, wanted)
        except ValueError:  # the store gives no vectors of rows that were deleted since the last `refresh`
            self.refresh()
            return self._search(query_BE, k, wanted)

    def _search(self, query_BE: torch.Tensor, k: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        there = max(1, len(self.rows_R) + len(self.tail_T))  # more have no use, and would take room
        k, wanted = min(k, there), min(wanted, there)
        best = TopK(query_BE, k)
        positions_BC = self._candidates(best.unit_BE.float() @ self._basis_EP, wanted)
        distinct = positions_BC.unique()
        step = rows_of(self.store, BLOCK_BYTES)
        for some_N in distinct[distinct >= 0].split(step):
            chosen_BN = torch.stack([torch.isin(some_N, positions_C) for positions_C in positions_BC])
            rows_N = self.rows_R[some_N]
            best.add_pairs(rows_N, self.store.vectors(rows_N).flatten(1), chosen_BN)
        for rows_N in self.tail_T.split(step) if len(self.tail_T) else ():
            best.add(rows_N, self.store.vectors(rows_N).flatten(1))
        # An index that looks into a part of itself may find too few where many rows were deleted.
        short_B = (positions_BC >= 0).sum(1) < min(k, int(self._live_R.sum()))
        if short_B.any():
            best.replace(short_B, *exact_search(self.store, query_BE[short_B], k))
        return best.result()

    def _candidates(self, projected_BP: torch.Tensor, wanted: int) -> torch.Tensor:
        """Positions in `rows_R` of up to `wanted` live rows for each query `[B, wanted]`, −1 where there are fewer."""
        found_BC = torch.full((len(projected_BP), wanted), -1)
        left_B, asked = torch.arange(len(projected_BP)), min(wanted, self._index.ntotal)
        while len(left_B):
            positions_BC = torch.from_numpy(self._index.search(projected_BP[left_B].numpy(), asked)[1])
            live_BC = (positions_BC >= 0) & self._live_R[positions_BC]
            number_BC = live_BC.cumsum(1)
            done_B = (number_BC[:, -1] >= wanted) | (positions_BC[:, -1] < 0) | (asked == self._index.ntotal)
            b, c = (live_BC & (number_BC <= wanted) & done_B.unsqueeze(1)).nonzero(as_tuple=True)
            found_BC[left_B[b], number_BC[b, c] - 1] = positions_BC[b, c]
            left_B, asked = left_B[~done_B], min(2 * asked, self._index.ntotal)
        return found_BC


def default_factory(n_rows: int) -> str:
    """FAISS's description of an index for so many rows.

    | rows | factory | bytes a row, of 256 projected numbers |
    |---|---|---|
    | below 20,000 | Flat | 1,024 |
    | below 5,000,000 | IVFn,SQ8 | 256 |
    | more | IVFn,PQ64 | 64 |

    n is the power of two nearest to 2 √rows.
    """
    if n_rows < 20_000:
        return "Flat"
    return f"IVF{2 ** round(math.log2(2 * math.sqrt(n_rows)))}," + ("SQ8" if n_rows < 5_000_000 else "PQ64")


def principal_components(
    store: Store, rows_R: torch.Tensor, device: str | torch.device | None = None, dimensions: int = DIMENSIONS
) -> torch.Tensor:
    """The directions in which a sample of the normalised documents varies most.

    They come from the products of the sample's documents with each other, since a covariance of E = 65,536
    numbers would have as many rows and columns. Same rows, same result.

    Returns:
        basis `[E, P]` float32, orthonormal, on the device; P ≤ dimensions.
    """
    sample_S = evenly(rows_R, COMPONENTS_FROM)
    docs_SE = store.vectors(sample_S).flatten(1).to(device or "cpu").float()
    docs_SE /= torch.linalg.vector_norm(docs_SE, dim=1, keepdim=True).clamp_min(_EPS)
    docs_SE -= docs_SE.mean(0)
    values_S, vectors_SS = torch.linalg.eigh((docs_SE @ docs_SE.T).double())
    kept = max(1, min(dimensions, int((values_S > 1e-6 * values_S[-1]).sum())))
    values_P, vectors_SP = values_S[-kept:].flip(0), vectors_SS[:, -kept:].flip(1)
    return docs_SE.T @ (vectors_SP / values_P.clamp_min(1e-12).sqrt()).float()


def evenly(rows_R: torch.Tensor, number: int) -> torch.Tensor:
    """At most so many of the rows, evenly spaced."""
    if len(rows_R) <= number:
        return rows_R
    return rows_R[torch.linspace(0, len(rows_R) - 1, number, dtype=torch.float64).long()]


def measure_recall(
    store: Store, index: TwoStepIndex, query_BE: torch.Tensor, k: int, candidates: int | None = None
) -> float:
    """Recall@k: which part of the k rows of the exact search the index finds, on average over the queries."""
    exact_BK, found_BK = exact_search(store, query_BE, k)[1], index.search(query_BE, k, candidates)[1]
    hits = [torch.isin(exact_K, found_K).float().mean() for exact_K, found_K in zip(exact_BK, found_BK, strict=True)]
    return float(torch.stack(hits).mean())


@contextmanager
def _faiss_errors(factory: str, n_rows: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise ValueError(f"FAISS cannot make '{factory}' of {n_rows} rows: {said}") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "two-step search needs a package that is not installed: pip install faiss-cpu; the exact search does not"
        ) from error
    return faiss
