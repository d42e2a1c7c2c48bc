"""All measured tables as one Markdown page, from the JSON files in benchmarks/results.

python benchmarks/summary.py > benchmarks/RESULTS.md
"""

import json
from pathlib import Path

from common import RESULTS, table

ORDER = ("compress", "stage1_step", "stage2_step", "memory", "first_token", "decode", "scaling", "search", "serve")


def section(name: str, results: list[dict]) -> str:
    """One benchmark: its tables, and a line where no GPU was there to run it."""
    parts = [f"## {name}"]
    for result in results:
        where = f"{result['name']}, {result['threads']} threads" if result["device"] == "cpu" else result["name"]
        versions = ", ".join(f"{key} {result[key]}" for key in ("torch", "transformers", "peft"))
        driver = f", driver {result['driver']}" if "driver" in result else ""
        parts.append(
            f"{where}{driver}; {result['flags']['dtype']}; {result['date']}; {versions}:\n`{result['command']}`"
        )
        parts.append(table(result["table"]))
    if not any(result["device"].startswith("cuda") for result in results):
        parts.append("On a GPU: not measured.")
    return "\n\n".join(parts)


def page(folder: Path) -> str:
    """The whole page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    head = "# Measured\n\nMade by `python benchmarks/summary.py`. [README.md](README.md) says what the columns mean."
    return "\n\n".join([head, *(section(name, [r for r in found if r["benchmark"] == name]) for name in ORDER)])


if __name__ == "__main__":
    print(page(RESULTS))
