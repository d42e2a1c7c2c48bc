"""A model and a corpus become a store: what is missing is compressed, in portions, each one commit.

Contract: one process reads the corpus and writes the store, others only compress (`in_processes`). Started again after
an interruption, a run compresses what is missing and nothing else. Knows nothing about flags.
"""

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm import tqdm

from openrlhf.models.document_cache import document_keys
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.tokens import ClaraTokens
from openrlhf.retrieval.corpus import Corpus
from openrlhf.retrieval.layout import HEADER_FILE
from openrlhf.retrieval.store import Document, Store

logger = logging.getLogger(__name__)

Rows = list[list[int]]
Compressed = tuple[torch.Tensor, torch.Tensor]
# Batches of one process in a portion: what a crash may cost, and room to put like lengths together. A CPU takes minutes
# for what a GPU does in seconds.
BATCHES, CPU_BATCHES = 8, 1


def open_store(path: str | Path, model: CLaRa, base_model: str = "") -> Store:
    """The store for this model's vectors, open for writing; a new one where there is none.

    Args:
        base_model: noted in a new store's header, beside the dtype; neither is compared.

    Raises:
        ValueError, OSError: see `Store.open` and `Store.create`; another model made the store.
    """
    made_by = fingerprint(model)
    if (Path(path) / HEADER_FILE).is_file():
        return Store.open(path, made_by, write=True)
    dtype = str(model.dtype).removeprefix("torch.")
    name = base_model or model.config.decoder_model_name
    return Store.create(path, {**made_by, "base_model": name, "dtype": dtype})


def portion_size(model: CLaRa, processes: int = 1) -> int:
    """Documents that are compressed between two commits."""
    return model.inference_batch * (CPU_BATCHES if model.device.type == "cpu" else BATCHES) * processes


def vectors_of(model: CLaRa, texts: Sequence[str], store: Store) -> torch.Tensor:
    """Memory vectors `[N, L, D]` of texts in the model's dtype, read from the store where it holds them."""
    rows = model.tokens.encoder_rows(list(texts))
    keys = _keys(model.tokens, rows)
    known = store.known(keys)
    found = iter(store.by_key([key for key, held in zip(keys, known, strict=True) if held]).to(model.dtype))
    new, _ = model.compress_rows([row for row, held in zip(rows, known, strict=True) if not held])
    fresh = iter(new.cpu())
    return torch.stack([next(found if held else fresh) for held in known])


def compressed_text(document: Document) -> str:
    """What the compressor reads of a document: `title`, a line break and the text, as in the training data; without a
    title the text alone."""
    return f"{document.title}\n{document.text}" if document.title else document.text


@dataclass
class Counts:
    """What became of a corpus's documents."""

    documents: int = 0
    new: int = 0
    replaced: int = 0
    unchanged: int = 0
    cut: int = 0
    compressed: int = 0


@dataclass
class Portion:
    """Documents of one commit: their keys, and the token ids of each key that is not in the store."""

    documents: list[Document]
    keys: list[bytes]
    missing: dict[bytes, list[int]]
    position: int
    """Lines or files of the corpus read up to here."""


def portions(
    store: Store,
    tokens: ClaraTokens,
    corpus: Corpus,
    size: int,
    counts: Counts,
    seen: Callable[[Document], None] = lambda document: None,
) -> Iterator[Portion]:
    """The documents that the store does not hold as they are, at most `size` at a time.

    What a document is (new, replaced, unchanged) is counted in `counts`; each that the corpus holds is told to `seen`.
    """
    stream = corpus.documents(tokens.config.doc_max_length, lambda text: len(tokens.plain_ids([text])[0]))
    while chunk := list(itertools.islice(stream, size)):
        for document in chunk:
            seen(document)
        portion = _portion(store, tokens, chunk, corpus.position, counts)
        if portion.documents:
            yield portion


def _portion(store: Store, tokens: ClaraTokens, chunk: list[Document], position: int, counts: Counts) -> Portion:
    counts.documents += len(chunk)
    latest = {document.id: document for document in chunk}  # an id given twice: the later one counts
    before = store.find(list(latest))
    changed = [document for document, old in zip(latest.values(), before, strict=True) if document != old]
    counts.unchanged += len(latest) - len(changed)
    counts.new += before.count(None)
    counts.replaced += len(chunk) - len(latest) + len(changed) - before.count(None)
    rows = tokens.encoder_rows([compressed_text(document) for document in changed])
    full = tokens.config.doc_max_length + 3
    counts.cut += sum(len(row) == full and row[-1] != tokens.tokenizer.eos_token_id for row in rows)
    keys = _keys(tokens, rows)
    missing = {key: row for key, row, known in zip(keys, rows, store.known(keys), strict=True) if not known}
    return Portion(changed, keys, missing, position)


def add_documents(
    store: Store,
    model: CLaRa,
    documents: Sequence[Document],
    without: Sequence[str] = (),
    go_on: Callable[[], None] = lambda: None,
) -> Counts:
    """Compresses those of some documents that the store does not hold as they are, and adds them in one commit.

    Args:
        without: ids of documents that go in the same commit.
        go_on: called between batches; may raise, and then nothing is added.
    """
    counts = Counts()
    portion = _portion(store, model.tokens, list(documents), 0, counts)
    rows = sorted(portion.missing.items(), key=lambda item: len(item[1]))
    done: list[Compressed] = []
    for start in range(0, len(rows), model.inference_batch):
        go_on()
        done.append(_cpu(model.compress_rows([row for _, row in rows[start : start + model.inference_batch]])))
    go_on()
    if portion.documents or without:
        portion.missing = dict(rows)
        together = tuple(torch.cat(column) for column in zip(*done, strict=True)) if done else (torch.empty(0),) * 2
        _commit(store, portion, together, counts, without)  # type: ignore[arg-type]
    return counts


def _commit(
    store: Store, portion: Portion, compressed: Compressed, counts: Counts, without: Sequence[str] = ()
) -> None:
    docs_NLD, mse_N = compressed
    vectors = dict(zip(portion.missing, docs_NLD, strict=True))
    mse = dict(zip(portion.missing, mse_N.tolist(), strict=True))
    store.add(portion.documents, portion.keys, vectors, mse, without)
    counts.compressed += len(vectors)


def add_corpus(
    store: Store, model: CLaRa, corpus: Corpus, seen: Callable[[Document], None] = lambda document: None
) -> Counts:
    """Makes a store hold what a corpus holds, beside what it holds already; in portions, each one commit, with a
    progress bar.

    Args:
        seen: called with each document of the corpus.

    Raises:
        OSError: the disk is full; RecordError: see `Corpus.documents`.
    """
    counts, state = Counts(), PartialState(cpu=not torch.cuda.is_available())
    total = corpus.check()
    work = portions(store, model.tokens, corpus, portion_size(model), counts, seen)
    fill(store, in_processes(model, state, work), counts, total, corpus)
    return counts


def update_store(path: str | Path, model: CLaRa, corpus: Corpus) -> Counts:
    """Makes a store hold what a corpus holds: compresses what is new, and deletes what is not in it any more.

    Raises:
        ValueError, OSError: see `open_store`; RecordError: see `Corpus.documents`.
    """
    with open_store(path, model) as store:
        there: set[str] = set()
        counts = add_corpus(store, model, corpus, lambda document: there.add(document.id))
        store.delete([document.id for document, _ in store.texts() if document.id not in there])
    return counts


def _keys(tokens: ClaraTokens, rows: Rows) -> list[bytes]:
    return [document_keys(*tokens.encoder_batch([row]))[0] for row in rows]


def fill(store: Store, work: Iterable[tuple[Portion, Compressed]], counts: Counts, total: int, corpus: Corpus) -> None:
    """Commits portions as they come, with a progress bar over the corpus's lines or files.

    Args:
        work: from `in_processes` or `in_ray`.
        total: lines or files of the corpus.
    """
    with tqdm(total=total, desc="compressing", unit="doc" if corpus.path.is_file() else "file", disable=None) as bar:
        for portion, compressed in work:
            _commit(store, portion, compressed, counts)
            bar.update(portion.position - bar.n)
        bar.update(total - bar.n)


def repair(store: Store, model: CLaRa, damaged: Sequence[int], size: int) -> int:
    """Compresses the documents of damaged rows again, from the texts that the store holds, and writes them to new rows.

    Returns:
        how many vectors were written.
    """
    store.start_shard()
    written = 0
    for start in tqdm(range(0, len(damaged), size), desc="repairing", disable=None):
        found = store.documents_at(damaged[start : start + size])
        rows = model.tokens.encoder_rows([compressed_text(documents[0]) for documents in found])
        docs_NLD, _ = model.compress_rows(rows)
        store.rewrite(dict(zip(_keys(model.tokens, rows), docs_NLD.cpu(), strict=True)))
        written += len(rows)
    return written


def in_processes(
    model: CLaRa, state: PartialState, work: Iterator[Portion] | None
) -> Generator[tuple[Portion, Compressed], None, None]:
    """Compresses portions in all processes of `state`; each portion's rows are shared out by length.

    Args:
        work: on the main process; the others have none, and yield nothing.
    """
    if state.num_processes == 1:
        for portion in work or ():
            yield portion, _cpu(model.compress_rows(list(portion.missing.values())))
        return
    if work is None:
        while (rows := _scatter(None)) is not None:
            dist.gather_object(_cpu(model.compress_rows(rows)), None)
        return
    they_wait = True
    try:
        for portion in work:
            shares = share(list(portion.missing.values()), state.num_processes)
            they_wait = False
            mine = _scatter([[row for _, row in part] for part in shares])
            gathered: list = [None] * state.num_processes
            dist.gather_object(_cpu(model.compress_rows(mine)), gathered)
            they_wait = True
            yield portion, together(shares, gathered)
    finally:
        if they_wait:  # for the next rows, and not for what this process could not compress
            _scatter([None] * state.num_processes)  # the others may go


class RayWorker:
    """Holds a model on one of a cluster's devices."""

    def __init__(self, load: Callable[[], CLaRa]):
        self.model = load()

    def compress(self, rows: Rows) -> Compressed:
        """Compresses encoder rows, see `CLaRa.compress_rows`."""
        return _cpu(self.model.compress_rows(rows))


def in_ray(
    load: Callable[[], CLaRa], work: Iterator[Portion], n_workers: int | None = None
) -> Generator[tuple[Portion, Compressed], None, None]:
    """Compresses portions on a Ray cluster, each in one of its workers, and yields them as they are done.

    Joins the cluster that RAY_ADDRESS names, or makes one of this machine.

    Args:
        load: loads the model, in every worker: checkpoint and base model must be found under the same paths there.
        n_workers: default: as many as the cluster has GPUs, or 1 where it has none.

    Raises:
        ValueError: the cluster has no room for so many.
    """
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    places, kind = (gpus, "GPUs") if gpus else (int(ray.cluster_resources().get("CPU", 0)), "CPUs")
    wanted = n_workers or max(1, gpus)
    if wanted > places:
        ray.shutdown()
        raise ValueError(
            f"--ray_workers {wanted}: the cluster has {places} {kind}, one for each, and further workers would never "
            "start: ask for fewer"
        )
    remote = ray.remote(num_gpus=1)(RayWorker) if gpus else ray.remote(num_cpus=1)(RayWorker)
    workers = [remote.remote(load) for _ in range(wanted)]
    # One portion more than there are workers for each, so that none waits for the commit of another's.
    idle, running = [*workers, *workers], {}
    try:
        while True:
            while idle and (portion := next(work, None)) is not None:
                worker = idle.pop(0)
                running[worker.compress.remote(list(portion.missing.values()))] = (portion, worker)
            if not running:
                return
            (done,), _ = ray.wait(list(running))
            portion, worker = running.pop(done)
            idle.append(worker)
            yield portion, ray.get(done)
    finally:
        ray.shutdown()


def share(rows: Rows, n: int) -> list[list[tuple[int, list[int]]]]:
    """Rows with their positions, dealt out to n by length, so that all have about as much to do."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [[(i, rows[i]) for i in order[part::n]] for part in range(n)]


def together(shares: list[list[tuple[int, list[int]]]], results: Sequence[Compressed]) -> Compressed:
    """The results of shares, in the order of the rows."""
    places = torch.tensor([i for part in shares for i, _ in part], dtype=torch.int64)
    back = places.argsort()
    docs_NLD, mse_N = (torch.cat(column)[back] for column in zip(*results, strict=True))
    return docs_NLD, mse_N


def _scatter(parts: list | None) -> Any:
    mine: list = [None]
    dist.scatter_object_list(mine, parts)
    return mine[0]


def _cpu(compressed: Compressed) -> Compressed:
    docs_NLD, mse_N = compressed
    return docs_NLD.to("cpu", torch.bfloat16), mse_N.cpu()
