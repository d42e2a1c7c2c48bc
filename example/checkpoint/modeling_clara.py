"""CLaRa: one causal decoder with three LoRA adapters (compressor, query reasoner, generator).

Contract: tensors of token ids in, losses, vectors and text out. Knows nothing about files of records, optimisers or
ranks. This file and those it imports are copied into every checkpoint, so they use torch, transformers, peft and
safetensors only.

Shape suffixes: B questions, N candidate documents of a question, M all documents of a batch, K selected documents,
L memory tokens, T text tokens, D hidden size, E = L·D, V vocabulary, S added tokens.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel

from .adapters import (
    DECODER,
    ENCODER,
    QUERY,
    AdapterRouter,
    SpecialEmbeddings,
    adapter_state,
    add_adapter,
    load_adapter_state,
)
from .answering import Answering, inference
from .checkpoint import load_decoder, load_pretrained, save_pretrained
from .configuration_clara import STAGES, TEXT_RAG, CLaRaConfig
from .document_cache import DocumentCache, LookUp
from .lora import LoraLinear, fixed_linear
from .prompts import DEFAULT_PROMPTS
from .publish import push
from .selection import retrieval_loss, select_documents
from .spans import span_loss, spans, spread_positions
from .tokens import ClaraTokens

logger = logging.getLogger(__name__)

# What each stage trains; the memory embeddings only where their flag is set (SPEC 3).
STAGE_TRAINS: dict[str, tuple[tuple[str, ...], bool]] = {
    "stage1": ((ENCODER, DECODER), True),
    "stage1_2": ((ENCODER, DECODER), True),
    "stage2": ((QUERY, DECODER), False),
    "stage2_pretrain_retrieval": ((QUERY,), False),
    TEXT_RAG: ((DECODER,), False),
}
INFERENCE_BATCH = 32
# Beyond this a CPU gains nothing from larger batches, and loses its caches.
CPU_TOKENS = 1024


class CLaRa(Answering, PreTrainedModel):
    """The model. Made by `CLaRa.from_pretrained(checkpoint)`, or `CLaRa.from_base(config)` to start training.

    Args:
        config: see `CLaRaConfig`; checked here.
        decoder: a Hugging Face causal LM; loaded from `config.decoder_model_name` when not given.
        tokenizer: the matching tokenizer; loaded likewise.
        adapters: names of the adapters to create; by default what the config's stage starts with.
        base_path: local directory of the base model, None when it came from the Hub.
    """

    config_class = CLaRaConfig
    config: CLaRaConfig
    decoder: Any
    special: SpecialEmbeddings
    inference_batch: int = INFERENCE_BATCH
    """Texts that go through the decoder together at inference; for you to set on an instance."""
    retriever: Callable[[torch.Tensor, int], torch.Tensor] | None
    """From queries `[B, E]` and n to their n nearest documents `[B, n, E]`, best first; for you to set on an instance
    that is handed stage-2 batches without documents."""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(
        self,
        config: CLaRaConfig,
        decoder: Any = None,
        tokenizer=None,
        adapters: Sequence[str] | None = None,
        base_path: Path | None = None,
    ):
        config.check()
        super().__init__(config)
        if decoder is None:
            decoder, tokenizer, base_path = load_decoder(config, Path.cwd())
        self.tokens = ClaraTokens(tokenizer, config)
        # Taken here, since ZeRO-3 spreads the weights over ranks later.
        self.embedding_length = mean_length(decoder.get_input_embeddings().weight) if config.rescale_memory else None
        self.base_path = base_path
        self.special = self._new_special_embeddings(decoder)
        for name in adapters or ((DECODER,) if config.training_stage == TEXT_RAG else (ENCODER, DECODER)):
            add_adapter(decoder, name, config.lora_r, config.decoder_model_name)
        # Answers are greedy whatever the base model's own sampling defaults are; only its end tokens are kept.
        own = decoder.generation_config
        decoder.generation_config = GenerationConfig(eos_token_id=getattr(own, "eos_token_id", None))
        self.decoder = decoder
        self.router = AdapterRouter(decoder)
        self.document_cache: DocumentCache | None = None
        self.retriever = None
        self.fixed_head: Callable | None = None
        for parameter in self.decoder.parameters():
            parameter.requires_grad_(False)
        self.special.memory.requires_grad_(False)
        self.eval()

    @classmethod
    def from_base(cls, config: CLaRaConfig, **load_options) -> "CLaRa":
        """A new model over `config.decoder_model_name`, with our prompts where the config has none."""
        config.prompts = config.prompts or DEFAULT_PROMPTS
        config.check()
        decoder, tokenizer, base_path = load_decoder(config, Path.cwd(), **load_options)
        return cls(config, decoder, tokenizer, base_path=base_path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs) -> "CLaRa":
        """Loads a checkpoint of ours or of the public format; see `checkpoint.load_pretrained`."""
        return load_pretrained(cls, pretrained_model_name_or_path, config, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory, state: dict | None = None, card: str | None = None, **_
    ) -> None:
        """Writes a checkpoint, atomically; see `checkpoint.save_pretrained`."""
        save_pretrained(self, Path(save_directory), state=state, card=card)

    def push_to_hub(self, repo_id: str, *, card: str | None = None, **options) -> str:  # type: ignore[override]
        """Publishes the model on the Hugging Face Hub, in one commit; where it is. Keywords: see `publish.push`.

        Raises:
            ValueError, OSError: the check before it refuses, or the Hub does.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card)
            return push(Path(folder), repo_id, **options)

    def _new_special_embeddings(self, decoder: Any) -> SpecialEmbeddings:
        """Fresh rows drawn from the mean and spread of the base rows; a neutral (mean) row in an untied LM head."""
        base_VD = decoder.get_input_embeddings().weight.detach()
        if self.tokens.first_special_id > len(base_VD):
            raise ValueError(
                f"the base model's tokenizer has {self.tokens.first_special_id} tokens, its embedding only "
                f"{len(base_VD)} rows: resize the base model's embedding to its tokenizer first"
            )
        head_VD = decoder.get_output_embeddings().weight.detach()
        mean_D, std_D = base_VD.float().mean(0), base_VD.float().std(0)
        noise_SD = torch.randn(self.tokens.n_special, base_VD.shape[1]).to(mean_D.device)
        rows_SD = (mean_D + std_D * noise_SD).to(base_VD.dtype)
        tied = decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
        head_SD = None if tied else head_VD.float().mean(0, keepdim=True).expand_as(rows_SD).to(base_VD.dtype)
        return SpecialEmbeddings(rows_SD, len(self.config.memory_tokens), head_SD)

    @property
    def device(self) -> torch.device:
        """Where the decoder's embedding lies, and so where inputs go."""
        return self.special.memory.device

    @property
    def has_compressor(self) -> bool:
        """Whether the checkpoint holds a compressor; a text_rag checkpoint does not."""
        return ENCODER in self.decoder.peft_config

    @property
    def compressor_trains(self) -> bool:
        """Whether a loss changes how documents are compressed; all of the adapter's weights learn, or none."""
        return self.special.memory.requires_grad or self.router.layers[0].lora_A[ENCODER].weight.requires_grad

    @property
    def has_query_reasoner(self) -> bool:
        """Whether the checkpoint holds a query reasoner."""
        return QUERY in self.decoder.peft_config

    def add_query_reasoner(self, fresh: bool = False) -> None:
        """Adds the query reasoner, as a copy of the compressor unless `fresh` (SPEC 3)."""
        state = {key: p.detach() for key, p in adapter_state(self.decoder, ENCODER).items()}
        self.attach_adapter(QUERY, None if fresh else state, ENCODER)

    def remove_query_reasoner(self) -> None:
        """Takes the query reasoner away: it searches among the vectors of the compressor that it was trained beside."""
        with self.router.route(DECODER):  # PEFT complains where the adapter is the active one
            for layer in self.router.layers:
                layer.delete_adapter(QUERY)
        del self.decoder.peft_config[QUERY]

    def attach_adapter(self, name: str, state: dict[str, torch.Tensor] | None, source: str) -> None:
        """Adds a further adapter to generate or compress with, frozen; its weights as `checkpoint.read_adapter` gives
        them, or fresh.

        Raises:
            ValueError: the weights are not those of an adapter of this model; `source` is named.
        """
        add_adapter(self.decoder, name, self.config.lora_r, self.config.decoder_model_name)
        if state is not None:
            load_adapter_state(self.decoder, name, state, source)
        self.router = AdapterRouter(self.decoder)
        for parameter in adapter_state(self.decoder, name).values():
            parameter.requires_grad_(False)

    def reset_adapter(self, name: str) -> None:
        """Starts an adapter afresh (B zero: a no-op until trained)."""
        self.unmerge_adapters()
        for layer in self.router.layers:
            layer.reset_lora_parameters(name, init_lora_weights=True)

    @torch.no_grad()
    def merge_adapter(self, name: str) -> None:
        """Adds an adapter to a copy of the base's weights, which its passes without gradients then use: for answering
        or compressing much with weights that stay as they are. Merge where the model shall stay: copies do not move.

        Takes the memory of the linear layers and of the LM head once more. In float32 results change by rounding; in
        bfloat16 the sum is rounded to the base's precision, and a small update is partly lost: compare before you
        rely on it.

        Raises:
            ValueError: there is no such adapter, or the base model is quantised.
        """
        self.router.check(name)
        if not all(isinstance(layer, LoraLinear) for layer in self.router.layers):
            raise ValueError("a quantised base model cannot take an adapter in: load it without quantization")
        for layer in self.router.layers:
            layer.merge_weights(name)
        head = self.decoder.get_output_embeddings()
        self.fixed_head = fixed_linear(head.weight, head.bias)

    def unmerge_adapters(self) -> None:
        """Drops what `merge_adapter` made."""
        self.fixed_head = None
        for layer in self.router.layers:
            if isinstance(layer, LoraLinear):
                layer.merged_products = {}

    def train_stage(self, stage: str, freeze_query_reasoner: bool = False, freeze_compressor: bool = False) -> None:
        """Sets `requires_grad` for a stage; `config.optimize_mem_tokens` decides on the memory embeddings, which are
        frozen with the compressor."""
        adapters, memory = STAGE_TRAINS[stage]
        still = {QUERY: freeze_query_reasoner, ENCODER: freeze_compressor}
        if stage == TEXT_RAG and self.has_compressor:
            raise ValueError(
                "text_rag is a baseline that starts from the base model; this one has a compressor: make another with "
                "CLaRa.from_base(CLaRaConfig(training_stage='text_rag', …))"
            )
        self.document_cache = None
        self.unmerge_adapters()
        for name in adapters:
            self.router.check(name)
        learning = [name for name in adapters if not still.get(name)]
        for name in self.decoder.peft_config:
            for parameter in adapter_state(self.decoder, name).values():
                parameter.requires_grad_(name in learning)
        self.special.memory.requires_grad_(memory and self.config.optimize_mem_tokens and not freeze_compressor)
        self.config.training_stage = stage

    def cache_frozen_documents(self, look_up: LookUp | None = None) -> None:
        """Compresses each document of a stage-2 run once; for as long as the compressor's weights stay as they are.

        `look_up` as in `DocumentCache`.
        """
        self.document_cache = DocumentCache(self.compress, look_up=look_up)

    def checkpoint_layers(self) -> None:
        """Gradient checkpointing: recompute each layer in backward, under the adapter active in its forward pass."""
        options = {"use_reentrant": False, "context_fn": lambda: self.router.checkpoint_contexts()}
        self.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def gradient_checkpointing_enable(self, *_, **__) -> None:
        """The same as `checkpoint_layers`: the stock way would recompute under whichever adapter is active by then."""
        self.checkpoint_layers()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Eval mode inside, the former mode after: dropout must not touch what does not train."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, D]`: the decoder's own rows, and ours for the added tokens."""
        rows_SD, _ = self.special()
        slot_BT = ids_BT - self.tokens.first_special_id
        added_BT = (slot_BT >= 0) & (slot_BT < len(rows_SD))
        embeds_BTD = self.decoder.get_input_embeddings()(ids_BT.masked_fill(added_BT, 0))
        added_BTD = F.embedding(slot_BT.clamp(0, len(rows_SD) - 1), rows_SD).to(embeds_BTD.dtype)
        return torch.where(added_BT.unsqueeze(-1), added_BTD, embeds_BTD)

    def hidden(
        self, adapter: str, embeds_BTD: torch.Tensor, mask_BT: torch.Tensor, spread: bool = False
    ) -> torch.Tensor:
        """Final hidden states `[B, T, D]` after the norm, through one adapter and without the LM head; of compressor
        inputs with their memory tokens among the text where `spread`."""
        position_BT = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        if spread:
            position_BT = spread_positions(
                position_BT, self.config.n_memory_tokens, self.config.compr_rate, self.config.even_spans
            )
        with self.router.route(adapter):
            return self.decoder.base_model(
                inputs_embeds=embeds_BTD, attention_mask=mask_BT.long(), position_ids=position_BT, use_cache=False
            ).last_hidden_state

    def base_logits(self, hidden_D: torch.Tensor) -> torch.Tensor:
        """The LM head's own output `[…, V]` for hidden states `[…, D]`, without the added tokens: for generating."""
        return (self.fixed_head or self.decoder.get_output_embeddings())(hidden_D)

    def head(self, hidden_D: torch.Tensor, added: bool = True) -> torch.Tensor:
        """Logits `[…, V]` from hidden states `[…, D]`: over the base vocabulary and, unless not `added`, our tokens."""
        config, first = self.decoder.config, self.tokens.first_special_id
        logits_V = self.decoder.get_output_embeddings()(hidden_D)
        if added:
            _, head_SD = self.special()
            added_S = F.linear(hidden_D, head_SD.to(hidden_D.dtype))
            logits_V = torch.cat([logits_V[..., :first], added_S, logits_V[..., first + len(head_SD) :]], dim=-1)
        logits_V = (
            logits_V * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        )
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits_V / cap) * cap if cap else logits_V

    def compress(
        self, ids_MT: torch.Tensor, mask_MT: torch.Tensor, adapter: str = ENCODER
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory vectors `[M, L, D]` of documents (or questions, through the query reasoner), and their MSE `[M]`.

        The inputs end with the L memory tokens. MSE (paper, eq. of §2.1): squared distance between the mean of the
        attended text states and the mean of the memory states, averaged over the hidden size, float32. Its mean over
        the batch is the loss.
        """
        n_memory = self.config.n_memory_tokens
        hidden_MTD = self.hidden(adapter, self.embed(ids_MT), mask_MT, self.config.spread_memory)
        docs_MLD = hidden_MTD[:, -n_memory:]
        text_MT1 = mask_MT[:, :-n_memory].float().unsqueeze(-1)
        text_MD = (hidden_MTD[:, :-n_memory].float() * text_MT1).sum(1) / text_MT1.sum(1)
        return docs_MLD, (docs_MLD.float().mean(1) - text_MD).square().mean(-1)

    def place(self, ids_BT: torch.Tensor, docs_KLD: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
        """Embeds generator inputs, each memory token replaced by the next document vector, in reading order.

        With `config.rescale_memory` each vector is brought to the mean length of the base model's input embeddings
        here, and here only: what is stored and compared stays as the compressor gave it.

        Raises:
            ValueError: a row b does not hold the memory tokens of exactly `counts_B[b]` documents.
        """
        embeds_BTD = self.embed(ids_BT)
        first, last = self.tokens.memory_ids[0], self.tokens.memory_ids[-1]
        memory_BT = (ids_BT >= first) & (ids_BT <= last)
        slots_B, needed_B = memory_BT.sum(1), counts_B.to(ids_BT.device) * docs_KLD.shape[1]
        if not torch.equal(slots_B, needed_B):
            raise ValueError(
                f"the prompts hold {slots_B.tolist()} memory tokens, their documents {needed_B.tolist()} vectors: "
                "a prompt was cut inside its documents (raise --max_len) or written for another number of them"
            )
        if self.embedding_length is not None:
            docs_KLD = F.normalize(docs_KLD.float(), dim=-1) * self.embedding_length
        return embeds_BTD.masked_scatter(memory_BT.unsqueeze(-1), docs_KLD.to(embeds_BTD.dtype))

    def forward(
        self, batch: dict, compute_logits: bool = True, compute_span_loss: bool = False, span_decay: float = 1.0
    ) -> tuple[torch.Tensor, dict]:
        """The loss of one batch (SPEC 3, 4).

        Args:
            batch: `stage`, `enc_input_ids` / `enc_attention_mask` `[M, T]` (not in text_rag), `dec_input_ids` /
                `dec_attention_mask` / `labels` `[B, T]`; stage2 adds `query_input_ids` / `query_attention_mask`
                `[B, T]`; optionally `docs_per_question` `[B]` and `pos_index` (lists of positions). A stage2 batch
                without `enc_input_ids` gets `docs_per_question` documents from `retriever`.
            compute_logits: False saves the LM head on every position that has no label.
            compute_span_loss: also give `span_loss`, in stages that train the compressor.
            span_decay: see `span_loss`.

        Returns:
            loss: cross-entropy, the mean over the batch's answer tokens (0 when none is left); for
                stage2_pretrain_retrieval the mean of −log Σ_positives p over questions that have positives.
            outputs: `logits` `[B, T, V]` or None, `mse_loss` (0 in text_rag), `topk_idx` `[B, K]` or None, `scores`
                `[B, N]` or None, `span_loss` (mean over the documents) or None. In text_rag V is the base vocabulary
                alone, as fine-tuning the base model has it.

        Raises:
            ValueError: an unknown stage, or counts that do not fit together.
        """
        stage = batch.get("stage")
        if stage not in STAGES:
            raise ValueError(f"batch['stage'] must be one of {STAGES}, got {stage!r}")
        out: dict = {"logits": None, "topk_idx": None, "scores": None, "span_loss": None}
        if stage == TEXT_RAG:
            embeds_BTD = self.embed(batch["dec_input_ids"])
            loss, out["logits"] = self._answer_loss(batch, embeds_BTD, compute_logits, added=False)
            return loss, {**out, "mse_loss": torch.zeros_like(loss)}
        counts_B = self._document_counts(batch, len(batch["labels"]))
        if stage in ("stage1", "stage1_2"):
            compressed = self.compress if self.compressor_trains else self._frozen_documents
            docs_MLD, mse_M = compressed(batch["enc_input_ids"], batch["enc_attention_mask"])
            if compute_span_loss:
                n_memory, rate = self.config.n_memory_tokens, self.config.compr_rate
                n_words, even = self.tokens.first_special_id, self.config.even_spans
                stands_for = spans(batch["enc_input_ids"], batch["enc_attention_mask"], n_memory, rate, n_words, even)
                span_M = span_loss(docs_MLD, *stands_for, lambda x_UD: self.head(x_UD, added=False), span_decay)
                out["span_loss"] = span_M.mean()
        else:
            query_BLD, _ = self.compress(batch["query_input_ids"], batch["query_attention_mask"], QUERY)
            docs_MLD, mse_M = self._candidates(batch, query_BLD.detach(), counts_B)
            docs_MLD, out["topk_idx"], out["scores"] = select_documents(
                query_BLD.flatten(1), docs_MLD, counts_B, self.config.generation_top_k, self.config.topk_temperature
            )
        out["mse_loss"] = mse_M.mean()
        if stage == "stage2_pretrain_retrieval":
            temperature = self.config.topk_temperature
            return retrieval_loss(out["scores"], batch["pos_index"], counts_B, temperature), out
        used_B = counts_B if out["topk_idx"] is None else counts_B.clamp(max=self.config.generation_top_k)
        embeds_BTD = self.place(batch["dec_input_ids"], docs_MLD, used_B)
        loss, out["logits"] = self._answer_loss(batch, embeds_BTD, compute_logits)
        return loss, out

    def _answer_loss(
        self, batch: dict, embeds_BTD: torch.Tensor, compute_logits: bool, added: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross-entropy of the generator, and its logits where asked for; `added` as in `head`."""
        hidden_BTD = self.hidden(DECODER, embeds_BTD, batch["dec_attention_mask"])
        target_BT = batch["labels"][:, 1:]
        answer_BT = target_BT != -100
        logits_BTV = self.head(hidden_BTD, added) if compute_logits else None
        if logits_BTV is None:
            answer_logits_V = self.head(hidden_BTD[:, :-1][answer_BT], added)
        else:
            answer_logits_V = logits_BTV[:, :-1][answer_BT]
        loss = F.cross_entropy(answer_logits_V.float(), target_BT[answer_BT], reduction="sum")
        return loss / answer_BT.sum().clamp(min=1), logits_BTV

    @torch.no_grad()
    def _candidates(
        self, batch: dict, query_BLD: torch.Tensor, counts_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stage 2 selects from, `[M, L, D]`, and its MSE: the batch's documents, or what `retriever` finds."""
        if "enc_input_ids" in batch:
            return self._frozen_documents(batch["enc_input_ids"], batch["enc_attention_mask"])
        assert self.retriever is not None  # _document_counts sees to it
        n = int(counts_B.max())
        docs_BNLD = self.retriever(query_BLD.flatten(1), n).to(query_BLD).unflatten(-1, query_BLD.shape[1:])
        return docs_BNLD[torch.arange(n) < counts_B.unsqueeze(1)], query_BLD.new_zeros(1)

    @torch.no_grad()
    def _frozen_documents(self, ids_MT: torch.Tensor, mask_MT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `compress`, of a compressor that does not train."""
        with self.frozen():
            return (self.document_cache or self.compress)(ids_MT, mask_MT)

    def _document_counts(self, batch: dict, n_questions: int) -> torch.Tensor:
        if "enc_input_ids" not in batch and (self.retriever is None or batch.get("docs_per_question") is None):
            raise ValueError(
                "the batch holds no documents: give enc_input_ids, or docs_per_question and set model.retriever"
            )
        n_docs = len(batch["enc_input_ids"]) if "enc_input_ids" in batch else int(sum(batch["docs_per_question"]))
        if batch.get("docs_per_question") is not None:
            counts_B = torch.as_tensor(batch["docs_per_question"], dtype=torch.long).cpu()
        elif n_docs % n_questions:
            raise ValueError(f"{n_docs} documents for {n_questions} questions: give batch['docs_per_question']")
        else:
            counts_B = torch.full((n_questions,), n_docs // n_questions)
        if len(counts_B) != n_questions or int(counts_B.sum()) != n_docs or int(counts_B.min()) < 1:
            raise ValueError(f"docs_per_question {counts_B.tolist()} must be ≥ 1 and add up to {n_docs} documents")
        return counts_B

    def _check_compressor(self) -> None:
        if not self.has_compressor:
            raise ValueError(
                "this is a text_rag checkpoint, the baseline that reads documents as text: it has no compressor, and "
                "there are no vectors it could make or read. generate_from_text answers with it; for vectors load a "
                "checkpoint of stage1, stage1_2 or stage2"
            )

    def _in_batches(self, adapter: str, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compresses texts, equal ones once: `[N, L, D]` in the given order, and the MSE over all."""
        if isinstance(texts, str):
            raise ValueError("give a list of strings, not one string")
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors_ULD, mse_U = self.compress_rows(self.tokens.encoder_rows(list(place)), adapter)
        if len(place) < len(texts):
            of_N = torch.tensor([place[text] for text in texts], device=vectors_ULD.device)
            vectors_ULD, mse_U = vectors_ULD[of_N], mse_U[of_N]
        return vectors_ULD, mse_U.sum() / max(len(mse_U), 1)

    @inference
    def compress_rows(self, rows: list[list[int]], adapter: str = ENCODER) -> tuple[torch.Tensor, torch.Tensor]:
        """Compresses rows of `tokens.encoder_rows` in batches of like length: `[N, L, D]` and the MSE of each, `[N]`
        float32, in the given order."""
        self._check_compressor()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        width = self.decoder.config.hidden_size
        vectors_NLD = torch.empty(len(rows), self.config.n_memory_tokens, width, dtype=self.dtype, device=self.device)
        mse_N = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        for chosen in self._batches(order, [len(row) + self.config.n_memory_tokens for row in rows]):
            ids, mask = self.tokens.encoder_batch([rows[i] for i in chosen])
            vectors_NLD[chosen], mse_N[chosen] = self.compress(ids.to(self.device), mask.to(self.device), adapter)
        return vectors_NLD, mse_N

    def _batches(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Cuts `order`, from short to long, into batches of `inference_batch`, on a CPU of fewer (`CPU_TOKENS`)."""
        tokens = CPU_TOKENS if self.device.type == "cpu" else math.inf
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) == self.inference_batch or (len(batch) + 1) * lengths[i] > tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @inference
    def compress_documents(self, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory vectors `[N, L, D]` of any number of documents, and their MSE loss."""
        return self._in_batches(ENCODER, documents)

    @inference
    def encode_queries(self, queries: list[str]) -> torch.Tensor:
        """Questions in the documents' space, flattened: `[B, L·D]`.

        Raises:
            ValueError: the checkpoint has no query reasoner.
        """
        self._check_compressor()
        if not self.has_query_reasoner:
            raise ValueError(
                "this checkpoint has no query reasoner (its stage is before stage2): load it with "
                "training_stage='stage2' to start one as a copy of the compressor, or train stage2"
            )
        return self._in_batches(QUERY, queries)[0].flatten(1)


@torch.no_grad()
def mean_length(rows_VD: torch.Tensor) -> float:
    """Mean Euclidean length of the rows, float32."""
    return float(torch.linalg.vector_norm(rows_VD, dim=-1, dtype=torch.float32).mean())
