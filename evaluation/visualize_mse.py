"""Do memory vectors lie where their text's own states lie? Plots and measures what the MSE loss pulls together.

    python -m evaluation.visualize_mse --checkpoint DIR --documents FILE.jsonl
    python -m evaluation.visualize_mse --checkpoint WITH_MSE --compare_to WITHOUT_MSE --documents FILE.jsonl

For each document, the mean over its memory states and the mean over its text states, both from the compressor's last
layer: the two means of the MSE loss (paper, eq. of §2.1). Writes memory_vs_text.png, a panel for each checkpoint, and
memory_vs_text.json, the distances. FILE.jsonl has documents in docs, context or content, as training and evaluation
files do; a .txt file has one on each line. A panel has its own t-SNE: only what is near what can be compared between
panels, distances are in the figures.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.cli import OneLineParser, check_checkpoint, load, prepare_output, save_figure
from openrlhf.datasets.records import RecordError, record_docs
from openrlhf.models.adapters import ENCODER
from openrlhf.models.modeling_clara import INFERENCE_BATCH, CLaRa
from openrlhf.utils.logging import set_up_logging, write_whole

logger = logging.getLogger("openrlhf")

MIN_DOCUMENTS = 3
"""Fewer have no neighbourhoods, and their mismatched pairs say nothing."""

CHUNK = 1024
"""Rows of the N × N distances held at a time."""

STATISTICS = {
    "mse": "squared distance of a document's two means, per dimension (the MSE loss)",
    "distance_matched": "distance of a document's two means",
    "distance_mismatched": "distance of a memory mean and another document's text mean",
    "cosine_matched": "cosine of a document's two means",
    "cosine_mismatched": "cosine of a memory mean and another document's text mean",
    "centroid_distance": "distance of the two clouds' centroids",
    "spread": "root mean squared distance of a mean from the centroid of its cloud",
    "centroid_over_spread": "distance of the centroids in spreads",
    "nearest_is_own": "share of memory means whose nearest text mean (cosine) is their own",
}


def read_documents(path: Path, most: int) -> list[str]:
    """The first `most` different documents of a file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a line cannot be read (`file:line: reason`), or there are fewer than `MIN_DOCUMENTS`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give --documents a JSONL or .txt file")
    documents: dict[str, None] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                documents |= dict.fromkeys(_line_documents(text, plain=path.suffix == ".txt") if text else [])
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{path}:{number}: {error}") from None
            if len(documents) >= most:
                break
    if len(documents) < MIN_DOCUMENTS:
        raise RecordError(f"{path} has {len(documents)} different documents: at least {MIN_DOCUMENTS} are needed")
    return list(documents)[:most]


def _line_documents(text: str, plain: bool) -> list[str]:
    if plain:
        return [text]
    record = json.loads(text)
    if not isinstance(record, dict):
        raise RecordError("a record must be a JSON object")
    return record_docs(record)


@torch.no_grad()
def means(model: CLaRa, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory means and text means of N documents, each `[N, D]` float32 on the CPU (see `CLaRa.compress`).

    Raises:
        ValueError: a state is not a finite number.
    """
    rows, n_memory = model.tokens.encoder_rows(documents), model.config.n_memory_tokens
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    memory_ND = torch.empty(len(rows), model.decoder.config.hidden_size)
    text_ND = torch.empty_like(memory_ND)
    with model.frozen(), tqdm(total=len(rows), desc="compressing", unit="document", disable=None) as bar:
        for start in range(0, len(order), INFERENCE_BATCH):
            chosen = order[start : start + INFERENCE_BATCH]
            ids_MT, mask_MT = (x.to(model.device) for x in model.tokens.encoder_batch([rows[i] for i in chosen]))
            hidden_MTD = model.hidden(ENCODER, model.embed(ids_MT), mask_MT).float()
            text_MT1 = mask_MT[:, :-n_memory].unsqueeze(-1)
            memory_ND[chosen] = hidden_MTD[:, -n_memory:].mean(1).cpu()
            text_ND[chosen] = ((hidden_MTD[:, :-n_memory] * text_MT1).sum(1) / text_MT1.sum(1)).cpu()
            bar.update(len(chosen))
    if not (memory_ND.isfinite().all() and text_ND.isfinite().all()):
        raise ValueError(f"hidden states overflow in {model.dtype}: give --dtype float32")
    return memory_ND, text_ND


def statistics(memory_ND: torch.Tensor, text_ND: torch.Tensor) -> dict[str, float]:
    """The figures of `STATISTICS`, in float64. Mismatched: the mean over all pairs of two different documents."""
    memory_ND, text_ND = memory_ND.double(), text_ND.double()
    n = len(memory_ND)
    units = torch.nn.functional.normalize(memory_ND, dim=-1), torch.nn.functional.normalize(text_ND, dim=-1)
    distance_all = cosine_all = own = 0.0
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        distance_all += torch.cdist(memory_ND[part], text_ND).sum().item()
        cosine_CN = units[0][part] @ units[1].T
        cosine_all += cosine_CN.sum().item()
        own += (cosine_CN.argmax(-1) == torch.arange(start, start + len(cosine_CN))).sum().item()
    distance_N, cosine_N = (memory_ND - text_ND).norm(dim=-1), (units[0] * units[1]).sum(-1)
    centroids = memory_ND.mean(0), text_ND.mean(0)
    centroid_distance = (centroids[0] - centroids[1]).norm().item()
    centred_2ND = torch.stack([memory_ND - centroids[0], text_ND - centroids[1]])
    spread = centred_2ND.square().sum(-1).mean().sqrt().item()
    return {
        "mse": (memory_ND - text_ND).square().mean().item(),
        "distance_matched": distance_N.mean().item(),
        "distance_mismatched": (distance_all - distance_N.sum().item()) / (n * (n - 1)),
        "cosine_matched": cosine_N.mean().item(),
        "cosine_mismatched": (cosine_all - cosine_N.sum().item()) / (n * (n - 1)),
        "centroid_distance": centroid_distance,
        "spread": spread,
        "centroid_over_spread": centroid_distance / spread,
        "nearest_is_own": own / n,
    }


def project(memory_ND: torch.Tensor, text_ND: torch.Tensor, method: str, seed: int) -> Any:
    """Both clouds in one plane: a numpy array `[2N, 2]`, the memory means first."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = torch.cat([memory_ND, text_ND]).numpy()
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(points)
    # t-SNE wants some three times as many points as the perplexity, 30 being the usual one.
    return TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=seed).fit_transform(points)


def draw(panels: list[tuple[str, Any, dict]], method: str, target: Path) -> None:
    """The planes side by side, as PNG. panels: name of the checkpoint, points `[2N, 2]`, its figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 5.6), dpi=140, facecolor="white", layout="constrained")
    for axes, (name, points, figures) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        n = len(points) // 2
        size = max(8.0, min(40.0, 8000 / n))
        # Blue and vermilion of Okabe and Ito, and two shapes: told apart without colour too.
        axes.scatter(*points[n:].T, s=size, c="#0072B2", marker="o", alpha=0.65, lw=0, label="text: mean of its states")
        axes.scatter(
            *points[:n].T, s=size, c="#D55E00", marker="^", alpha=0.65, lw=0, label="memory: mean of its vectors"
        )
        shares = f"MSE {figures['mse']:.4g}, own text nearest {figures['nearest_is_own']:.0%}"
        axes.set_title(f"{name}\n{shares}", fontsize=11, parse_math=False)
        axes.set(xlabel=f"{method} 1", ylabel=f"{method} 2", xticks=[], yticks=[])
    handles, labels = axes.get_legend_handles_labels()
    legend: Any = figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    save_figure(figure, target)


def names(roots: list[Path]) -> list[str]:
    """The ends of the directories' paths, as long as is needed to tell them apart."""
    parts = [root.resolve().parts for root in roots]
    length = next((n for n in range(1, 9) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-length:]) for p in parts]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = OneLineParser(prog="visualize_mse", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="directory of a checkpoint")
    parser.add_argument("--compare_to", help="a second checkpoint, e.g. one trained without the MSE loss")
    parser.add_argument("--documents", type=Path, required=True, help="JSONL (docs, context or content) or .txt")
    parser.add_argument("--max_documents", type=int, default=4000, help="use only the first so many different ones")
    parser.add_argument("--method", choices=("tsne", "pca"), default="tsne")
    parser.add_argument("--output_dir", type=Path, default=Path("results/memory_vs_text"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="of t-SNE; default: %(default)s")
    parser.add_argument("--model_path", help="base model, where it is not where the checkpoint says")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the model loads")
    args = parser.parse_args(argv)
    set_up_logging(0)
    if args.max_documents < MIN_DOCUMENTS:
        parser.error(f"--max_documents must be at least {MIN_DOCUMENTS}")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
    given = [args.checkpoint] + ([args.compare_to] if args.compare_to else [])
    measured, panels = [], []
    try:
        documents = read_documents(args.documents, args.max_documents)
        roots = [check_checkpoint(name, args.model_path) for name in given]
        prepare_output(args.output_dir, ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"))
        for root, name in zip(roots, names(roots), strict=True):
            model = load(root, args.model_path, args.dtype)
            config = model.config
            clouds = means(model, documents)
            del model  # before the next one loads
            figures = statistics(*clouds)
            facts = {"training_stage": config.training_stage, "compr_rate": config.compr_rate}
            measured.append({"checkpoint": str(root), "base_model": config.decoder_model_name, **facts, **figures})
            logger.info("placing %d points in the plane (t-SNE of thousands takes minutes)", 2 * len(documents))
            panels.append((name, project(*clouds, args.method, args.seed), figures))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    draw(panels, {"tsne": "t-SNE", "pca": "PCA"}[args.method], args.output_dir / "memory_vs_text.png")
    config_facts = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {"format": 1, "config": config_facts, "documents": len(documents), "checkpoints": measured}
    write_whole(args.output_dir / "memory_vs_text.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(documents)} documents" + "".join(f"\n  column {i}: {p[0]}" for i, p in enumerate(panels, 1)))
    for key, meaning in STATISTICS.items():
        print("".join(f"{panel[2][key]:>11.4f}" for panel in panels) + f"  {meaning}")
    print(f"written     {args.output_dir}/memory_vs_text.png  .json")
    print("next        look at the picture" + ("" if args.compare_to else "; --compare_to adds another checkpoint"))


if __name__ == "__main__":
    main()
