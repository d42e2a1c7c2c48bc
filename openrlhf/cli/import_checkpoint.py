"""Convert a checkpoint of the public format (adapters.pth) to ours.

    python -m openrlhf.cli.import_checkpoint --source DIR --target DIR [--decoder_model_name BASE]

The prompts are read from the source's own modeling_clara.py, which is parsed and never run.
"""

import argparse
import logging
import sys
from pathlib import Path

from openrlhf.models.checkpoint import CONFIG_FILE
from openrlhf.models.modeling_clara import CLaRa

logger = logging.getLogger("openrlhf")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--source", required=True, help="directory or Hub repository of the public checkpoint")
    parser.add_argument("--subfolder", default="", help="folder inside the source, e.g. compression-16")
    parser.add_argument("--target", required=True, type=Path, help="new directory")
    parser.add_argument("--decoder_model_name", help="base model, where the source's config names one that is not here")
    args = parser.parse_args(argv)
    if (args.target / CONFIG_FILE).exists():
        parser.exit(2, f"import_checkpoint: {args.target} already holds a checkpoint; choose another --target\n")
    overrides = {"decoder_model_name": args.decoder_model_name} if args.decoder_model_name else {}
    try:
        model = CLaRa.from_pretrained(args.source, subfolder=args.subfolder, **overrides)
        model.save_pretrained(args.target)
    except (ValueError, OSError) as error:
        print(f"import_checkpoint: {error}", file=sys.stderr)
        sys.exit(1)
    if model.config.prompts is None:
        logger.warning(
            "%s has no modeling_clara.py to read prompts from: the result compresses, but generating needs prompts={…}",
            args.source,
        )
    logger.info("wrote %s (%s, rate %d)", args.target, ", ".join(model.decoder.peft_config), model.config.compr_rate)
    logger.info("next: AutoModel.from_pretrained(%r, trust_remote_code=True)", str(args.target))


if __name__ == "__main__":
    main()
