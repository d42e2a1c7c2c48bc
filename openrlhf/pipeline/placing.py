"""Puts finished files into a directory that may hold others' files of the same names.

Contract: a manifest knows which bytes this pipeline wrote there. Any other file in the way is kept aside first, as
`NAME.before-HASH`; a file of ours that is no longer made is removed. Killed anywhere, the next run ends with the same
directory. Knows nothing about what the files hold.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from openrlhf.pipeline.files import write_json

MANIFEST = "assembly_manifest.json"
DRAFTS = ".assembly_drafts"

logger = logging.getLogger(__name__)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict:
    """{"made_from": key, "files": {path: [hashes of ours]}}; an empty one where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"made_from": manifest["made_from"], "files": {str(k): list(v) for k, v in manifest["files"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"made_from": None, "files": {}}


def is_made(folder: Path, made_from: str) -> bool:
    """Whether all files of this key are there as they were written."""
    manifest = read_manifest(folder)
    if manifest["made_from"] != made_from:
        return False
    paths = {name: folder / name for name in manifest["files"]}
    return all(path.is_file() and [file_sha256(path)] == manifest["files"][name] for name, path in paths.items())


def drafts_folder(folder: Path) -> Path:
    """An empty directory on the same disk, for files that are not yet finished."""
    drafts = folder / DRAFTS
    if drafts.exists():
        shutil.rmtree(drafts)
    drafts.mkdir(parents=True)
    return drafts


def place(folder: Path, names: list[str], made_from: str) -> list[Path]:
    """Moves `names` from the drafts to their places.

    Args:
        made_from: key of everything they were made from, for `is_made`.

    Returns:
        files of others that were in the way, where they are now.
    """
    drafts, before = folder / DRAFTS, read_manifest(folder)["files"]
    made = {name: file_sha256(drafts / name) for name in names}
    # While files are moved, both the old and the new ones are ours: a killed run must not keep its own files aside.
    known = {name: sorted({*before.get(name, ()), *filter(None, [made.get(name)])}) for name in {*before, *made}}
    _write_manifest(folder, None, known)
    aside = [kept for name in sorted(known) if (kept := _keep_aside(folder / name, known[name])) is not None]
    for name, own in made.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or file_sha256(target) != own:
            os.replace(drafts / name, target)
    for name in set(known) - set(made):
        (folder / name).unlink(missing_ok=True)
    _write_manifest(folder, made_from, {name: [own] for name, own in made.items()})
    shutil.rmtree(drafts)
    return aside


def _keep_aside(path: Path, ours: list[str]) -> Path | None:
    """Renames a file that is not ours; nothing where there is none."""
    if not path.is_file():
        return None
    found = file_sha256(path)
    if found in ours:
        return None
    for length in (8, 64):
        kept = path.with_name(f"{path.name}.before-{found[:length]}")
        if not kept.exists() or file_sha256(kept) == found:
            break
    os.replace(path, kept)
    logger.warning("%s was not written by this pipeline: it is kept as %s", path, kept.name)
    return kept


def _write_manifest(folder: Path, made_from: str | None, files: dict[str, list[str]]) -> None:
    write_json(folder / MANIFEST, {"made_from": made_from, "files": dict(sorted(files.items()))})
