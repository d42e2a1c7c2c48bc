"""Publish a checkpoint on the Hugging Face Hub.

python -m openrlhf.cli.push --checkpoint checkpoints/my_stage2 --repo_id me/clara --license apache-2.0 --dry_run
python -m openrlhf.cli.push --checkpoint checkpoints/my_stage2 --repo_id me/clara --subfolder compression-16 --private

The token is that of `hf auth login`, or HF_TOKEN. --dry_run checks and lists everything, and sends nothing.
"""

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; argparse exits with 2 where one is not known, or missing."""
    parser = argparse.ArgumentParser("push", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, type=Path, help="directory of a CLaRa checkpoint")
    parser.add_argument("--repo_id", required=True, help="owner/name; made where it is not there")
    parser.add_argument("--subfolder", default="", help="where in the repository, such as compression-16 (its root)")
    parser.add_argument("--base_model", help="Hub id of the base model, where the checkpoint names a directory")
    parser.add_argument("--license", help="of the model card, where it names none, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="nobody else may see a repository that is made")
    parser.add_argument("--commit_message", help="default: stage and rate")
    parser.add_argument("--dry_run", action="store_true", help="check, list files and sizes, send nothing")
    return parser.parse_args(argv)


def listing(args: argparse.Namespace) -> str:
    """What would be uploaded, and what would not."""
    from openrlhf.models.publish import left_out, plan, size, size_of

    files = plan(args.checkpoint, args.repo_id, args.subfolder, args.base_model, args.license)
    lines = [f"{size_of(content):>15,}  {name}" for name, content in files.items()]
    stays = left_out(args.checkpoint, files, args.subfolder)
    lines += [f"{size(files):>15,}  bytes in {len(files)} files to {args.repo_id}; nothing was sent"]
    return "\n".join([*lines, *(["not uploaded: " + ", ".join(stays)] if stays else [])])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    try:
        if not args.checkpoint.is_dir():
            raise FileNotFoundError(f"--checkpoint {args.checkpoint} is no directory")
        if args.dry_run:
            print(listing(args))
            return
        from openrlhf.models.publish import push
        from openrlhf.utils.logging import set_up_logging

        set_up_logging(0)
        print(push(args.checkpoint, args.repo_id, args.subfolder, args.base_model, args.license,
                   args.private or None, commit_message=args.commit_message))  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"push: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
