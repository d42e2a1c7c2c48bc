"""Extract the text and pictures of a folder of documents, in chunks that fit the model.

    python scripts/extract_with_docling.py --input_dir documents --output_file data/raw_knowledge.jsonl

reads PDF, DOCX, PPTX, XLSX, HTML, Markdown and text, and writes OUTPUT_FILE, extracted_assets/ and
extraction_report.json beside it. What cannot be used is named with its reason and left out. Run again, it does only
what is new or has changed. Needs `pip install 'clara-rag[pipeline]'`.
"""

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser(
        "extract_with_docling", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--input_dir", type=Path, default=os.environ.get("RAW_DATA_DIR") or None,
                        help="folder of documents (default: RAW_DATA_DIR)")  # fmt: skip
    parser.add_argument("--output_file", type=Path, required=True, help="JSONL file of chunks")
    parser.add_argument("--tokenizer", default=os.environ.get("MODEL_PATH"),
                        help="model whose tokenizer counts (default: MODEL_PATH)")  # fmt: skip
    parser.add_argument("--doc_max_length", type=int, default=256, help="tokens a chunk may have (default 256)")
    parser.add_argument("--state", type=Path, help="default: pipeline_state.sqlite beside the output")
    parser.add_argument("--workers", type=int,
                        help="files at a time (default: half of the cores, with --ray of the cluster's)")  # fmt: skip
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster (RAY_ADDRESS, or this machine)")
    parser.add_argument("--layout", choices=["auto", "docling", "rules"], default="auto",
                        help="of PDF pages: Docling's models, rules of ours, or what is here")  # fmt: skip
    parser.add_argument("--max_file_mb", type=float, default=200, help="skip larger files (default 200)")
    parser.add_argument("--max_pages", type=int, default=2000, help="skip longer documents (default 2000)")
    parser.add_argument("--file_timeout", type=float, default=900, help="seconds for one file (default 900)")
    args = parser.parse_args(argv)
    if args.input_dir is None:
        parser.error("--input_dir must be given, or RAW_DATA_DIR be set")
    if not args.tokenizer:
        parser.error("--tokenizer must be given, or MODEL_PATH be set: chunks are counted in the model's tokens")
    if args.doc_max_length < 16:
        parser.error(f"--doc_max_length must be at least 16, got {args.doc_max_length}")
    for name in ("workers", "max_file_mb", "max_pages", "file_timeout"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} must be greater than 0, got {getattr(args, name)}")
    if args.ray and importlib.util.find_spec("ray") is None:
        parser.error("--ray needs Ray, which is not installed: pip install 'clara-rag[ray]'")
    if importlib.util.find_spec("docling") is None:
        parser.error("Docling is not installed: pip install 'clara-rag[pipeline]'")
    if not args.input_dir.is_dir():
        parser.error(f"--input_dir {args.input_dir} is not a folder")
    args.input_dir = args.input_dir.absolute()  # workers of a cluster stand elsewhere
    if Path(args.tokenizer).is_dir():
        args.tokenizer = str(Path(args.tokenizer).absolute())
    args.state = args.state or args.output_file.parent / "pipeline_state.sqlite"
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    args = parse(argv)
    from transformers import AutoTokenizer

    from openrlhf.pipeline.extract import Options, choose_layout, extract, summary, tokenizer_hash
    from openrlhf.pipeline.state import State
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(rank=0)
    try:
        layout, reason = choose_layout(args.layout)
        if reason:
            logging.warning("%s: PDF pages are laid out by rules of our own, records are marked so", reason)
        try:
            digest = tokenizer_hash(AutoTokenizer.from_pretrained(args.tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer {args.tokenizer} cannot be loaded: {str(error).splitlines()[0]}") from None
        options = Options(args.tokenizer, digest, args.doc_max_length, layout, args.max_file_mb, args.max_pages,
                          args.file_timeout)  # fmt: skip
        with State(args.state) as state:
            report = extract(args.input_dir, args.output_file, options, state, args.workers, args.ray)
    except (ValueError, OSError) as error:
        print(f"extract_with_docling: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"extract_with_docling: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nextract_with_docling: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(summary(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
