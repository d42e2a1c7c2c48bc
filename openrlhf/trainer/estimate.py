"""Memory and time of a stage before it is run, from the base model's config alone: no weights, no tokenizer.

FLOPs and bytes are counted, and on a device that is here seconds are timed, on copies of the model with two numbers of
layers (see skeleton.py); they are carried on in a straight line, since all layers of a decoder are alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from transformers import PretrainedConfig

from openrlhf.trainer.config import STAGE2, TrainingConfig
from openrlhf.trainer.devices import CUDA_CONTEXT, Device
from openrlhf.trainer.skeleton import Figures, Plan, count, resident, timed, timed_afresh

# What a micro-batch of 8 of the example data is padded to, with SmolLM2's tokenizer; `train_sft --dry_run` prints the
# same figures of other data as `padded_to`. (text_rag reads instruction and end-to-end data, five documents of each.)
TOKENS: dict[str, dict[str, int]] = {
    "stage1": {"doc_tokens": 229, "prompt_tokens": 73, "answer_tokens": 168, "question_tokens": 0},
    "stage1_2": {"doc_tokens": 241, "prompt_tokens": 75, "answer_tokens": 18, "question_tokens": 0},
    "stage2": {"doc_tokens": 247, "prompt_tokens": 73, "answer_tokens": 5, "question_tokens": 28},
    "text_rag": {"doc_tokens": 221, "prompt_tokens": 75, "answer_tokens": 12, "question_tokens": 0},
    "stage2_pretrain_retrieval": {"doc_tokens": 247, "prompt_tokens": 0, "answer_tokens": 0, "question_tokens": 28},
}
# Layers of the copies. One alone has its peak elsewhere; timing is noisy, and two far apart carry the noise less far.
COUNTED, TIMED = (2, 3), (1, 3)
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default, reserved whole on CUDA at each backward pass
# Bytes of the tokenizer, its copy, DeepSpeed, and library code that is read from disk only when something trains.
UNTOUCHED = 0.2e9
# Of the activations' bytes, what a CPU's allocator holds besides where that was not measured. glibc's heap keeps holes
# between tensors of many sizes: 0.3 to 0.6 of them as a rule, far more with checkpointing, where little is live.
HOLES = 0.45
TIMED_FLOPS = 1e12  # of a copy's micro-batch on a CPU; a larger one is timed with fewer rows
# Share of the datasheet's rates that training of adapters reaches; a guess, used only for devices that are not here.
EFFICIENCY = 0.6


# Flags of train_sft that change memory or time.
SHARED = tuple(f.name for f in fields(TrainingConfig) if f.name in {own.name for own in fields(Plan)})


def plan_of(config: TrainingConfig, base: PretrainedConfig, candidates: int, tokens: dict, processes: int) -> Plan:
    """The plan of a training run; `tokens` has the keys of TOKENS' entries."""
    shared = {name: getattr(config, name) for name in SHARED}
    return Plan(base=base, candidates=candidates, processes=processes, **shared, **tokens)


def carried_on(first: Figures, second: Figures, share: float) -> Figures:
    """The straight line through two measurements, at `share` of the way from the first to the second."""
    return {key: value + share * (second[key] - value) for key, value in first.items()}


def whole(plan: Plan, measure: Callable[[int], Figures], layers: tuple[int, int]) -> Figures:
    """What `measure` gives for two numbers of layers, for all layers of the model."""
    total, (few, more) = plan.base.get_text_config().num_hidden_layers, layers
    if total <= more:
        return measure(total)
    return carried_on(measure(few), measure(more), (total - few) / (more - few))


def counted(plan: Plan, device: str) -> Figures:
    """`skeleton.count` for all layers of the model; `device` is cpu or cuda."""
    return whole(plan, lambda layers: count(plan, layers, device), COUNTED)


def activations(figures: Figures) -> float:
    """Bytes of the highest peak."""
    return max(value for key, value in figures.items() if key.startswith("peak/"))


def process_bytes(device: str) -> float:
    """Bytes a training process holds on its device without the model: on a CPU, measured on this process."""
    if device == "cuda":
        return CUDA_CONTEXT
    return resident() + UNTOUCHED


def memory(plan: Plan, figures: Figures, device: str, process: float, holes: float = HOLES) -> dict[str, float]:
    """Bytes a process needs on its device, by part; see `engine_config` for what ZeRO shares out.

    Args:
        figures: of `count`.
        process: bytes held before there is a model.
        holes: what the allocator of a CPU holds besides the activations, as a share of them.
    """
    trained, shared = figures["trained"], plan.processes
    bucket = 4 if plan.zero_stage == 1 else plan.size
    held = max(activations(figures), 12 * trained / shared)  # the second is what AdamW makes when they are gone
    parts = {
        "weights": figures["parameters"] * plan.size / (shared if plan.zero_stage == 3 else 1),
        # The bucket that gradients are gathered in is reserved on CUDA; on a CPU only what is written takes memory.
        "gradients": (REDUCE_BUCKET if device == "cuda" else trained) * bucket + 4 * trained / shared,
        "optimizer": 12 * trained / shared,  # master weights and two moments in float32
        "activations": held,
        "allocator": holes * held if device == "cpu" else 0.0,
        "process": process,
    }
    return {**parts, "sum": sum(parts.values())}


def largest_micro_batch(
    plan: Plan, figures: Figures, device: str, process: float, limit: float, holes: float = HOLES
) -> int:
    """Questions of the largest micro-batch whose memory is at most `limit` bytes; 0 when not even one fits."""
    rows = plan.micro_train_batch_size
    twice = replace(plan, micro_train_batch_size=2 * rows)
    double = counted(twice, device)

    def fits(n: int) -> bool:
        return memory(plan, carried_on(figures, double, n / rows - 1), device, process, holes)["sum"] <= limit

    few, many = 0, 1
    while fits(many) and many < 1 << 20:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few


@dataclass
class Seconds:
    """Seconds of one micro-batch and of one new document; how they were found; bytes that came to be resident."""

    step: float
    document: float
    how: str
    resident: float | None = None


def seconds(plan: Plan, figures: Figures, device: Device) -> Seconds:
    """Of one micro-batch: measured where the device is here, else from its datasheet."""
    if not device.here:
        peak = (device.bf16_flops if plan.bf16 else device.fp32_flops) * EFFICIENCY
        band = device.bandwidth * EFFICIENCY
        step, document = (figures[f"flops/{k}"] / peak + figures[f"moved/{k}"] / band for k in ("step", "document"))
        return Seconds(step, document, f"from the datasheet at {EFFICIENCY:.0%} of its rates, not measured")
    rows = plan.micro_train_batch_size
    if device.kind == "cpu":
        flops = count(plan, TIMED[1], "cpu")["flops/step"]
        rows = max(1, min(rows, int(rows * TIMED_FLOPS / flops)))
    probe = replace(plan, micro_train_batch_size=rows)
    run = timed_afresh if device.kind == "cpu" else lambda plan, layers: timed(plan, layers, device.kind)
    found = whole(probe, lambda layers: run(probe, layers), TIMED)
    how = f"measured here on copies of {TIMED[0]} and {TIMED[1]} layers"
    if rows < plan.micro_train_batch_size:
        how += f" with {rows} of {plan.micro_train_batch_size} questions"
    more = plan.micro_train_batch_size / rows
    held = found["resident"] * more if device.kind == "cpu" else None
    return Seconds(found["seconds/step"] * more, found["seconds/document"], how, held)


def report(
    plan: Plan, device: Device, process: float, limit: float | None = None, records: int = 0, epochs: int = 1
) -> dict:
    """All figures, in bytes, seconds and FLOPs.

    Args:
        plan: what is trained.
        device: what it is trained on.
        process: bytes a process holds there before there is a model.
        limit: bytes there are, where not the device's own.
        records: of the data set, 0 where not known.
        epochs: passes over them.
    """
    limit = device.memory if limit is None else limit
    figures = counted(plan, device.kind)
    time = seconds(plan, figures, device)
    holes = HOLES if time.resident is None else max(0.0, time.resident / activations(figures) - 1)
    parts = memory(plan, figures, device.kind, process, holes)
    known = time.step * plan.micro_batches
    new = known + time.document * plan.documents * plan.micro_batches if plan.stage in STAGE2 else known
    always_new = plan.stage in STAGE2 and plan.zero_stage == 3  # which has no document cache
    peak = device.bf16_flops if plan.bf16 else device.fp32_flops
    steps = -(-records // plan.train_batch_size)
    found = {
        "device": device.name,
        "parameters": round(figures["parameters"]),
        "trained": round(figures["trained"]),
        "micro_batch": {
            "questions": plan.micro_train_batch_size,
            "documents": plan.documents,
            "tokens": plan.tokens * plan.micro_train_batch_size,
            "flops": figures["flops/step"],
            "bytes_moved": figures["moved/step"],
            "seconds": time.step,
        },
        "memory": parts,
        "memory_there": limit,
        "largest_micro_train_batch_size": largest_micro_batch(plan, figures, device.kind, process, limit, holes),
        "seconds_per_step": new if always_new else known,
        "seconds_per_step_new_documents": new if plan.stage in STAGE2 else None,
        "tokens_per_s": plan.tokens * plan.train_batch_size / known,
        "mfu": figures["flops/step"] / time.step / peak if peak else None,
        "documents_per_s": 1 / time.document if time.document else None,
        "documents_together": plan.together(device.kind),
        "bytes_per_document": plan.vector_bytes,
        "how": time.how,
    }
    if records:
        later = new if always_new else known
        found["hours"] = steps * (new + (epochs - 1) * later) / 3600
    return found
