"""CLaRaConfig: the fields of config.json. Holds facts about a checkpoint; knows nothing about tensors."""

from transformers import PretrainedConfig

from .prompts import check_prompts

TEXT_RAG = "text_rag"
"""The baseline without compression: the generator adapter alone, which reads documents as text."""
STAGES = ("stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval", TEXT_RAG)


class CLaRaConfig(PretrainedConfig):
    """Configuration of a CLaRa checkpoint, field names as in the public `config.json`.

    Args:
        decoder_model_name: the base model: Hub id, absolute path, or path relative to the checkpoint.
        doc_max_length: longest document, in tokens of text.
        compr_rate: compression rate; must divide `doc_max_length`. L = doc_max_length // compr_rate.
        lora_r: rank of each adapter; alpha is 2·lora_r.
        training_stage: the stage that wrote the checkpoint.
        generation_top_k: documents selected for an answer (K).
        optimize_mem_tokens: whether stages 1 and 1_2 train the memory embeddings.
        different_mem_tokens: one embedding for each memory slot, or one shared by all.
        sep: put `<SEP>` after each document's memory tokens in the generator's input.
        quantization: of the base model: `no`, `int8` or `int4` (bitsandbytes, CUDA).
        attn_implementation: None lets transformers choose.
        topk_temperature: tau of the straight-through selection.
        rescale_memory: the generator reads memory vectors at the mean length of the base model's input embeddings; not
            part of the published method, where they keep the several times greater length of hidden states.
        spread_memory: in the compressor a memory token has the position of the last token that it stands for (see
            `spans.spread_positions`), not one behind the document; not part of the published method, and not with
            flash-attn.
        even_spans: a document of fewer tokens than its memory vectors can stand for is shared among all of them, not
            left to the last ones (see `spans.bounds`); without spread_memory it changes the span loss alone.
        prompts: the texts of `prompts.DEFAULT_PROMPTS`, or None for a checkpoint whose prompts are not known.

    Every other field of a public `config.json` is kept as it is and written back.

    Raises:
        ValueError: from `check`, which the model calls, so that overrides are checked too.
    """

    model_type = "CLaRa"

    def __init__(
        self,
        decoder_model_name: str = "mistralai/Mistral-7B-Instruct-v0.2",
        doc_max_length: int = 256,
        compr_rate: int = 32,
        lora: bool = True,
        lora_r: int = 16,
        lora_r_compressor: int | None = None,
        training_stage: str = "stage1",
        generation_top_k: int = 1,
        optimize_mem_tokens: bool = True,
        different_mem_tokens: bool = True,
        sep: bool = True,
        quantization: str = "no",
        attn_implementation: str | None = None,
        max_new_tokens: int = 128,
        topk_temperature: float = 0.02,
        rescale_memory: bool = False,
        spread_memory: bool = False,
        even_spans: bool = False,
        stage2_retrieval_top_n: int = 1,
        pure_inference: bool = False,
        compr_model_name: str | None = None,
        compr_n_layers: int = 5,
        compr_use_mlp: bool = False,
        training_form: str = "both_separately",
        device_map: str | dict | None = None,
        load_adapters: bool = True,
        prompts: dict | None = None,
        **kwargs,
    ):
        self.decoder_model_name = decoder_model_name
        self.doc_max_length = doc_max_length
        self.compr_rate = compr_rate
        self.lora = lora
        self.lora_r = lora_r
        self.lora_r_compressor = lora_r if lora_r_compressor is None else lora_r_compressor
        self.training_stage = training_stage
        self.generation_top_k = generation_top_k
        self.optimize_mem_tokens = optimize_mem_tokens
        self.different_mem_tokens = different_mem_tokens
        self.sep = sep
        self.quantization = quantization
        self.max_new_tokens = max_new_tokens
        self.topk_temperature = topk_temperature
        self.rescale_memory = rescale_memory
        self.spread_memory = spread_memory
        self.even_spans = even_spans
        self.stage2_retrieval_top_n = stage2_retrieval_top_n
        self.pure_inference = pure_inference
        self.compr_model_name = compr_model_name
        self.compr_n_layers = compr_n_layers
        self.compr_use_mlp = compr_use_mlp
        self.training_form = training_form
        self.device_map = device_map
        self.load_adapters = load_adapters
        self.prompts = prompts
        super().__init__(**kwargs)
        self.attn_implementation = attn_implementation

    @property
    def n_memory_tokens(self) -> int:
        """L, the number of memory vectors a document becomes."""
        return self.doc_max_length // self.compr_rate

    @property
    def memory_tokens(self) -> list[str]:
        """The distinct memory tokens added to the tokenizer."""
        return [f"<MEM{i}>" for i in range(self.n_memory_tokens)] if self.different_mem_tokens else ["<MEM>"]

    @property
    def special_tokens(self) -> list[str]:
        """All tokens added to the tokenizer, in the order of their ids."""
        return [*self.memory_tokens, "<AE>", "<ENC>", "<SEP>"]

    def check(self) -> None:
        """Raises ValueError, saying what to change, when a field has a value no CLaRa model can have."""
        sizes = {name: getattr(self, name) for name in ("doc_max_length", "compr_rate", "lora_r", "generation_top_k")}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.doc_max_length % self.compr_rate:
            divisors = [d for d in range(1, self.doc_max_length + 1) if self.doc_max_length % d == 0]
            raise ValueError(
                f"compr_rate {self.compr_rate} does not divide doc_max_length {self.doc_max_length}; "
                f"use one of {divisors}"
            )
        if self.training_stage not in STAGES:
            raise ValueError(f"training_stage must be one of {STAGES}, got {self.training_stage!r}")
        if self.quantization not in ("no", "int8", "int4"):
            raise ValueError(f"quantization must be no, int8 or int4, got {self.quantization!r}")
        if not self.lora:
            raise ValueError("lora=false is not supported: the three roles of the decoder are LoRA adapters")
        if self.compr_model_name:
            raise ValueError(
                "compr_model_name is not supported: the compressor is an adapter of the decoder; set it to null"
            )
        if self.topk_temperature <= 0:
            raise ValueError(f"topk_temperature must be positive, got {self.topk_temperature}")
        if self.spread_memory and "flash" in (self.attn_implementation or ""):
            raise ValueError(
                f"spread_memory does not go with attn_implementation {self.attn_implementation}, which takes positions "
                "that go back for the start of another text: use sdpa"
            )
        if self.prompts is not None:
            check_prompts(self.prompts)
