"""Describe the images of a folder, and the pictures found in its documents, and put the descriptions into the text.

    python scripts/extract_images.py --input_dir documents --model rapidocr

puts them into data/raw_knowledge.jsonl, or where --output_file says. The model `rapidocr` reads the text in an image,
without any network; any other name is asked for at BASE_URL with OPENAI_API_KEY. Run again, it asks only for what it
has not described yet. Runs after extract_with_docling.py.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("extract_images", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input_dir", type=Path, default=os.environ.get("RAW_DATA_DIR") or None,
                        help="folder of documents and images (default: RAW_DATA_DIR)")  # fmt: skip
    parser.add_argument("--model", default=os.environ.get("VISION_MODEL", ""),
                        help="rapidocr, or a model of the endpoint (default: VISION_MODEL, or none)")  # fmt: skip
    parser.add_argument("--output_file", type=Path,
                        help="JSONL file of chunks (default: raw_knowledge.jsonl in OUTPUT_DIR, else in DATA_PATH, "
                             "else in ./data)")  # fmt: skip
    parser.add_argument("--tokenizer", help="model whose tokenizer counts (default: extraction's, or MODEL_PATH)")
    parser.add_argument("--doc_max_length", type=int, help="tokens a chunk may have (default: extraction's, or 256)")
    parser.add_argument("--state", type=Path, help="default: pipeline_state.sqlite beside the output")
    parser.add_argument("--workers", type=int,
                        help="images at a time (default: half of the cores, with --ray of the cluster's)")  # fmt: skip
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster (RAY_ADDRESS, or this machine)")
    args = parser.parse_args(argv)
    if args.output_file is None:
        folder = os.environ.get("OUTPUT_DIR") or os.environ.get("DATA_PATH") or "data"
        args.output_file = Path(folder, "raw_knowledge.jsonl")
    if args.input_dir is None:
        parser.error("--input_dir must be given, or RAW_DATA_DIR be set")
    if not args.input_dir.is_dir():
        parser.error(f"--input_dir {args.input_dir} is not a folder")
    args.input_dir = args.input_dir.absolute()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    report = args.output_file.parent / "extraction_report.json"
    try:
        used = json.loads(report.read_text(encoding="utf-8"))["options"] if report.is_file() else {}
    except (ValueError, KeyError, TypeError):
        parser.error(f"{report} is damaged: run extract_with_docling.py again")
    args.tokenizer = args.tokenizer or used.get("tokenizer") or os.environ.get("MODEL_PATH")
    args.doc_max_length = args.doc_max_length or used.get("doc_max_length") or 256
    args.state = args.state or args.output_file.parent / "pipeline_state.sqlite"
    if args.model and not args.tokenizer:
        parser.error("--tokenizer must be given, or MODEL_PATH be set: chunks are counted in the model's tokens")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    args = parse(argv)
    from transformers import AutoTokenizer

    from openrlhf.pipeline.convert import counter
    from openrlhf.pipeline.state import State
    from openrlhf.pipeline.vision import see, summary, unseen
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(rank=0)
    try:
        if not args.model:
            logging.warning("VISION_MODEL is not set: images are not described")
            unseen(args.output_file)
            return 0
        count = counter(AutoTokenizer.from_pretrained(args.tokenizer))
        with State(args.state) as state:
            report = see(args.input_dir, args.output_file, args.model, state, args.doc_max_length, count, args.workers,
                         args.ray)  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        print(f"extract_images: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nextract_images: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(summary(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
