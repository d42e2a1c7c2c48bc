"""One micro-batch of a stage on a copy of the model with few layers and no weights: counted without data, or timed.

Contract: a `Plan` in, figures out. Knows nothing about the other layers, devices or files.
"""

import copy
import math
import multiprocessing
import resource
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from openrlhf.models.adapters import DECODER, ENCODER, QUERY, AdapterRouter, SpecialEmbeddings, add_adapter, set_dropout
from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.models.modeling_clara import CPU_TOKENS, INFERENCE_BATCH, STAGE_TRAINS, CLaRa
from openrlhf.models.selection import cosine_scores, differentiable_topk
from openrlhf.trainer.config import STAGE2

ROW_TOKENS = 3  # `<ENC>`, bos and eos around a text that is compressed
TIMED_SECONDS, TIMED_RUNS = 10.0, 6

Figures = dict[str, float]
_ATEN: Any = torch.ops.aten
_FLOPS = {
    **flop_registry,
    # The fused attention of CPUs is missing in torch's table; its arguments are in the order of the other kernels'.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_efficient_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_efficient_attention_backward
    ],
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
}


@dataclass(frozen=True)
class Plan:
    """What is to be estimated; names as in TrainingConfig.

    `candidates` are the documents of a question that are compressed, or read as text (K outside stage 2). Token counts
    are what a row takes in its batch, padding included; `prompt_tokens` counts neither documents nor memory tokens nor
    `<SEP>`.
    """

    base: PretrainedConfig
    stage: str = "stage1"
    doc_max_length: int = 256
    compress_rate: int = 32
    generation_top_k: int = 1
    candidates: int = 1
    doc_tokens: float = 0
    prompt_tokens: float = 0
    answer_tokens: float = 0
    question_tokens: float = 0
    lora_r: int = 16
    lora_dropout: float = 0.1
    mse_loss: bool = False
    span_loss_weight: float = 0.0
    freeze_query_reasoner: bool = False
    freeze_compressor: bool = False
    freeze_memory_embeddings: bool = False
    train_batch_size: int = 128
    micro_train_batch_size: int = 8
    zero_stage: int = 2
    bf16: bool = False
    gradient_checkpointing: bool = False
    processes: int = 1

    @property
    def n_memory_tokens(self) -> int:
        """L."""
        return self.doc_max_length // self.compress_rate

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def documents(self) -> int:
        """M: documents of a micro-batch."""
        return self.micro_train_batch_size * self.candidates

    @property
    def selected(self) -> int:
        """Documents an answer is given from."""
        return min(self.generation_top_k, self.candidates)

    @property
    def doc_width(self) -> int:
        """Compressor input, memory tokens included."""
        return round(self.doc_tokens) + ROW_TOKENS + self.n_memory_tokens

    @property
    def query_width(self) -> int:
        """Query reasoner input, memory tokens included."""
        return round(self.question_tokens) + ROW_TOKENS + self.n_memory_tokens

    @property
    def width(self) -> int:
        """Generator input, 0 where the stage has no generator."""
        if self.stage == "stage2_pretrain_retrieval":
            return 0
        if self.stage == TEXT_RAG:
            return round(self.prompt_tokens + self.selected * self.doc_tokens) + self.answers
        return round(self.prompt_tokens) + self.selected * (self.n_memory_tokens + 1) + self.answers

    @property
    def answers(self) -> int:
        """Answer tokens of a question that the loss counts."""
        return max(1, round(self.answer_tokens))

    @property
    def tokens(self) -> int:
        """Tokens a question puts into the model, padding included."""
        if self.stage == TEXT_RAG:
            return self.width
        query = self.query_width if self.stage in STAGE2 else 0
        return self.candidates * self.doc_width + query + self.width

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one process in an optimiser step."""
        return -(-self.train_batch_size // (self.micro_train_batch_size * self.processes))

    @property
    def vector_bytes(self) -> int:
        """Bytes of one compressed document."""
        return self.n_memory_tokens * self.base.get_text_config().hidden_size * self.size

    def together(self, device: str) -> int:
        """Documents that go through the compressor at once without gradients; see DocumentCache for stage 2."""
        if self.stage not in STAGE2:
            return max(1, min(INFERENCE_BATCH, CPU_TOKENS // self.doc_width)) if device == "cpu" else INFERENCE_BATCH
        return 1 if device == "cpu" and self.zero_stage < 3 else self.documents


class Skeleton:
    """The model with fewer layers and without a tokenizer, its weights on `device`: random, or fake in a fake mode.

    It borrows the model's own passes, so that what is measured is what trains. `CLaRa.forward` itself cannot be used:
    it picks answer positions and checks prompts by their values, and fake tensors have none.
    """

    embed: Any = CLaRa.embed
    hidden: Any = CLaRa.hidden
    head: Any = CLaRa.head
    compress: Any = CLaRa.compress
    checkpoint_layers: Any = CLaRa.checkpoint_layers

    def __init__(self, plan: Plan, layers: int, device: str, fake: FakeTensorMode | None = None):
        config = shortened(plan.base, layers)
        self.plan, self.device = plan, device
        # Where memory tokens stand changes no size.
        self.config = SimpleNamespace(n_memory_tokens=plan.n_memory_tokens, spread_memory=False)
        with torch.device("meta" if fake else device):
            self.decoder: Any = AutoModelForCausalLM.from_config(config, dtype=plan.dtype)
            names = (ENCODER, DECODER, *((QUERY,) if plan.stage in STAGE2 else ()))
            for name in (DECODER,) if plan.stage == TEXT_RAG else names:
                add_adapter(self.decoder, name, plan.lora_r, "")
            set_dropout(self.decoder, plan.lora_dropout)
            weight = self.decoder.get_input_embeddings().weight
            self.tokens = SimpleNamespace(first_special_id=len(weight) - plan.n_memory_tokens - 3)
            rows_SD = torch.randn(plan.n_memory_tokens + 3, weight.shape[1], dtype=weight.dtype)
            tied = self.decoder.get_output_embeddings().weight is weight
            self.special = SpecialEmbeddings(rows_SD, plan.n_memory_tokens, None if tied else rows_SD)
        self.decoder.to(plan.dtype)  # as DeepSpeed does, adapters too
        adapters, memory = STAGE_TRAINS[plan.stage]
        still = {QUERY: plan.freeze_query_reasoner, ENCODER: plan.freeze_compressor}
        for key, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(any(f".{name}." in key for name in adapters if not still.get(name)))
        self.special.memory.requires_grad_(memory and not (plan.freeze_memory_embeddings or plan.freeze_compressor))
        if fake:
            with fake:
                for part in (self.decoder, self.special):
                    _give_fake_weights(part, device)
        self.router = AdapterRouter(self.decoder)
        if plan.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # once is enough, and training says it
                self.checkpoint_layers()
        self.decoder.train()

    def parameters(self) -> list[torch.nn.Parameter]:
        """All, each once."""
        return [*self.decoder.parameters(), *self.special.parameters()]

    def ids(self, rows: int, width: int, memory: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids that end in `memory` memory tokens, and a mask with some padding: `[rows, width]` both."""
        first = self.tokens.first_special_id
        ids_BT = torch.randint(0, first, (rows, width), device=self.device)
        ids_BT[:, width - memory :] = first
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[:1, :1] = 0  # real batches are padded, and attention without any padding takes another path
        return ids_BT, mask_BT

    def documents(self, rows: int) -> torch.Tensor:
        """Compresses documents as stage 2 and `compress_documents` do, and stage 1 with a frozen compressor:
        `[rows, L, D]`, without gradients."""
        self.decoder.eval()
        with torch.no_grad():
            docs_MLD, _ = self.compress(*self.ids(rows, self.plan.doc_width, self.plan.n_memory_tokens))
        self.decoder.train()
        return docs_MLD.clone()

    def loss(self, docs_MLD: torch.Tensor | None, mark: Callable[[str], None] = lambda phase: None) -> torch.Tensor:
        """What one micro-batch is trained on; `docs_MLD` are stage 2's documents. `mark` hears where the run is."""
        plan, rows, n_memory = self.plan, self.plan.micro_train_batch_size, self.plan.n_memory_tokens
        if plan.stage == TEXT_RAG:
            mark("generator")
            ids_BT, mask_BT = self.ids(rows, plan.width, 0)
            return self.answer_loss(self.embed(ids_BT), mask_BT, mark)
        mark("compressor")
        mse = None
        if docs_MLD is None and plan.freeze_compressor:
            docs_MLD = self.documents(plan.documents)
        elif docs_MLD is None:
            docs_MLD, mse = self.compress(*self.ids(plan.documents, plan.doc_width, n_memory))
        else:
            query_BLD, _ = self.compress(*self.ids(rows, plan.query_width, n_memory), QUERY)
            docs_BNLD = docs_MLD.unflatten(0, (rows, -1))
            scores_BN = cosine_scores(query_BLD.flatten(1), docs_BNLD.flatten(2))
            z_BKN, _ = differentiable_topk(scores_BN, plan.selected, 0.02)
            docs_MLD = torch.einsum("bkn,bnld->bkld", z_BKN, docs_BNLD.float()).flatten(0, 1).to(docs_MLD.dtype)
            if not plan.width:
                return -torch.log_softmax(scores_BN / 0.02, dim=-1)[:, 0].mean()
        mark("generator")
        ids_BT, mask_BT = self.ids(rows, plan.width, plan.selected * n_memory)
        memory_BT = ids_BT >= self.tokens.first_special_id
        embeds_BTD = self.embed(ids_BT).masked_scatter(memory_BT.unsqueeze(-1), docs_MLD)
        _on_gradient(embeds_BTD, lambda: mark("compressor, backward"))
        loss = self.answer_loss(embeds_BTD, mask_BT, mark)
        if plan.span_loss_weight and mse is not None:
            mark("LM head, memory vectors")
            loss = loss + plan.span_loss_weight * self.span_loss(docs_MLD)
        return loss + 0.1 * mse.mean() if plan.mse_loss and mse is not None else loss

    def span_loss(self, docs_MLD: torch.Tensor) -> torch.Tensor:
        """`spans.span_loss` of documents that are all of one length."""
        used = min(
            docs_MLD.shape[1], math.ceil((round(self.plan.doc_tokens) + ROW_TOKENS - 1) / self.plan.compress_rate)
        )
        log_p_UV = self.head(docs_MLD[:, -used:].flatten(0, 1), added=False).float().log_softmax(-1)
        ids_UR = torch.zeros(len(log_p_UV), self.plan.compress_rate, dtype=torch.long, device=self.device)
        return -log_p_UV.gather(1, ids_UR).mean()

    def answer_loss(self, embeds_BTD: torch.Tensor, mask_BT: torch.Tensor, mark: Callable[[str], None]) -> torch.Tensor:
        """The generator's cross-entropy."""
        hidden_BTD = self.hidden(DECODER, embeds_BTD, mask_BT)
        _on_gradient(hidden_BTD, lambda: mark("generator, backward"))
        mark("LM head")
        answers_D = hidden_BTD[:, -self.plan.answers - 1 : -1].flatten(0, 1)
        logits_V = self.head(answers_D, added=self.plan.stage != TEXT_RAG)
        target = torch.zeros(logits_V.shape[:1], dtype=torch.long, device=self.device)
        return F.cross_entropy(logits_V.float(), target, reduction="sum")


def shortened(base: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of a base model's config with `layers` layers."""
    config = copy.deepcopy(base)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _give_fake_weights(module: torch.nn.Module, device: str) -> None:
    made: dict[int, Any] = {}  # tied weights stay one
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if store is part._parameters else new
                store[name] = None if old is None else made[id(old)]


def _on_gradient(tensor: torch.Tensor, then: Callable[[], None]) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: then())


class Ledger(TorchDispatchMode):
    """Counts FLOPs, bytes moved, and the peak of live bytes in each phase; storages made before it began are free."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.flops = self.moved = self.live = 0
        self.phase, self.peaks = "", {"": 0}
        self._alive: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def mark(self, phase: str) -> None:
        """Begins a phase."""
        self.phase = phase
        self.peaks[phase] = max(self.live, self.peaks.get(phase, 0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs one operation and writes down what it made."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, (torch.Tensor, tuple, list)):
            return out  # a question about a tensor, of which there are more than operations
        formula = _FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not func.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *made))
        for tensor in made:
            self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peaks[self.phase] = max(self.live, self.peaks[self.phase])


@contextmanager
def letting_go(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Drops gradients as soon as they are whole inside: DeepSpeed moves them to its own buffer."""

    def let_go(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(let_go) for p in parameters if p.requires_grad]
    yield
    for hook in hooks:
        hook.remove()


def count(plan: Plan, layers: int, device: str) -> Figures:
    """Parameters, FLOPs, bytes moved and peaks of live bytes of one micro-batch with so many layers.

    Everything is on a fake CPU. Its fused attention keeps what CUDA's memory-efficient kernel, the one for masked
    inputs, keeps: q, k, v, the mask, the output and one number a row; no T×T scores.
    """
    fake = FakeTensorMode()
    model = Skeleton(plan, layers, "cpu", fake)
    parameters = model.parameters()
    found: Figures = {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
    known = [*parameters, *model.decoder.buffers(), *model.special.buffers()]
    with fake:
        ledger, together = Ledger(known), plan.together(device)
        with ledger:
            ledger.mark("documents")
            if plan.stage != TEXT_RAG:
                model.documents(together)
        found |= {"flops/document": ledger.flops / together, "moved/document": ledger.moved / together}
        if plan.stage in STAGE2:
            found["peak/documents"] = ledger.peaks["documents"]
        ledger = Ledger(known)
        with letting_go(parameters), ledger:
            docs_MLD = None
            if plan.stage in STAGE2:
                shape = (plan.documents, plan.n_memory_tokens, model.decoder.config.hidden_size)
                docs_MLD = torch.empty(shape, dtype=plan.dtype)
            loss = model.loss(docs_MLD, ledger.mark)
            ledger.mark("LM head, backward")
            loss.backward()
    found |= {"flops/step": ledger.flops, "moved/step": ledger.moved}
    return found | {f"peak/{phase}": peak for phase, peak in ledger.peaks.items() if phase}


def fewest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some runs after a first one: what others do on the machine only ever slows one down."""
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or (len(taken) < TIMED_RUNS and time.perf_counter() - began < TIMED_SECONDS):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def timed(plan: Plan, layers: int, device: str) -> Figures:
    """Seconds of one micro-batch and of compressing one document, with so many layers, really run on this machine.

    `resident` is what the runs added to the process's peak; on a CPU it holds the allocator's holes too.
    """
    model, together = Skeleton(plan, layers, device), plan.together(device)
    docs_MLD = None
    if plan.stage in STAGE2:
        shape = (plan.documents, plan.n_memory_tokens, model.decoder.config.hidden_size)
        docs_MLD = torch.randn(shape, dtype=plan.dtype, device=device)

    def step() -> None:
        model.loss(docs_MLD).backward()
        for parameter in model.parameters():
            parameter.grad = None

    before = resident()
    found = {"seconds/step": fewest(step, device), "resident": resident() - before}
    if plan.stage == TEXT_RAG:
        return found | {"seconds/document": 0.0}
    return found | {"seconds/document": fewest(lambda: model.documents(together), device) / together}


def resident() -> float:
    """Bytes this process had in memory at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_afresh(plan: Plan, layers: int) -> Figures:
    """`timed` on the CPU in a process of its own, where what comes to be resident is the passes' alone."""
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(timed, plan, layers, "cpu").result()
