"""How the benchmarks show and leave their results."""

import json
from pathlib import Path


def write_result(result: dict, out: Path | None):
    """Write `result` as a JSON file, if one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


def print_table(title: str, columns: list[str], rows: dict[str, list[str]], kind: str = "sampler"):
    """A Markdown table under a title: `rows` by what they are called, which is a `kind`."""
    print(f"\n{title}\n\n| {kind} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
