"""Where the benchmarks leave their results."""

import json
from pathlib import Path


def write_result(result: dict, out: Path | None):
    """Write `result` as a JSON file, if one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
