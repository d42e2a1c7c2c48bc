"""Write what a vLLM server needs of a checkpoint: base model, generator as a LoRA, and both merged.

    python -m openrlhf.cli.export_vllm --checkpoint DIR --output DIR2 [--dtype bfloat16] [--no_base]

The commands that serve it are in the README.md of the output, and in docs/LLM_HOSTING_GUIDE.md.
"""

import argparse
import sys
from pathlib import Path

from openrlhf.serving.export_vllm import DTYPES, plan, write
from openrlhf.utils.logging import set_up_logging


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("export_vllm", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="directory or Hub repository of the checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="new directory, or an earlier export to replace")
    parser.add_argument("--decoder_model_name", help="base model, where the checkpoint names one that is not here")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the merged model (default: bfloat16)")
    parser.add_argument("--no_base", action="store_true", help="leave the base model where it is; only name it")
    args = parser.parse_args(argv)
    set_up_logging(0)
    try:
        export = plan(args.checkpoint, args.output, args.decoder_model_name, args.dtype, not args.no_base)
    except (ValueError, OSError) as error:
        parser.exit(2, f"export_vllm: {error}\n")
    try:
        write(export)
    except OSError as error:
        print(f"export_vllm: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{args.output}: README.md there has the commands that serve it")


if __name__ == "__main__":
    main()
