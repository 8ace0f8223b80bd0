"""Sections of a report: kept as files, redone only where something changed, and shown as one HTML page.

A page has its figures inside and asks for nothing from a network.
"""

import base64
import html
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from freqgate_dit.files import delete_written, write_text


@dataclass
class Section:
    """A part of a report.

    Args:
        title: of the section.
        reading: paragraphs of plain language, made from the numbers.
        figures: file name without ending -> matplotlib figure; after loading, path of the PNG.
        captions: file name -> what the figure shows, in plain language, made from the numbers.
        tables: name -> rows, dictionaries with the same keys.
        shown: names of the tables that are on the page; the others are files alone.
        claims: what was tested about the model, "claim", "verdict" and "evidence" each (`freqgate_dit.findings`).
        seconds: that it took to measure.
    """

    title: str
    reading: list[str]
    figures: dict = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    claims: list[dict] = field(default_factory=list)
    seconds: float = 0.0

    def show(self, name: str, figure, caption: str):
        """Add a figure, and what it shows."""
        self.figures[name], self.captions[name] = figure, caption

    def claim(self, claim: str, is_so: bool | None, evidence: str):
        """Add a claim: supported, not supported, or, for `None`, undecided."""
        verdict = "undecided" if is_so is None else "supported" if is_so else "not supported"
        self.claims.append({"claim": claim, "verdict": verdict, "evidence": evidence})


def keep_section(folder: Path, key: str, make: Callable[[], Section]) -> tuple[Section, bool]:
    """The section in `folder` if it was made under the same `key`; otherwise `make` it and write it there.

    Tables are written as JSON and as parquet.

    Returns: the section, with paths for figures, and whether it was made anew.
    """
    file = folder / "section.json"
    kept = load_section(file, key)
    if kept is not None:
        return kept, False
    start = time.perf_counter()
    section = make()
    section.seconds = time.perf_counter() - start
    delete_section(folder)
    folder.mkdir(parents=True, exist_ok=True)
    section.tables = {
        name: [{key: known(value) for key, value in row.items()} for row in rows]
        for name, rows in section.tables.items()
    }
    paths = {name: folder / f"{name}.png" for name in section.figures}
    for name, figure in section.figures.items():
        figure.savefig(paths[name])
    section.figures = paths
    for name, rows in section.tables.items():
        write_table(rows, folder / name)
    values = {**asdict(section), "figures": list(paths), "key": key}
    write_text(file, json.dumps(values, indent=1, allow_nan=False) + "\n")
    return section, True


def delete_section(folder: Path):
    """Delete the files of the section in `folder`, as far as it says which they are."""
    try:
        kept = json.loads((folder / "section.json").read_text(encoding="utf-8"))
        names = [f"{name}.png" for name in kept["figures"]]
        names += [f"{name}{ending}" for name in kept["tables"] for ending in (".json", ".parquet")]
    except (OSError, ValueError, KeyError, TypeError):
        return
    delete_written(folder, "|".join(map(re.escape, [*names, "section.json"])))


def known(value):
    """`None` for a number that is not finite, which JSON has not; others as they are."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_section(file: Path, key: str) -> Section | None:
    """What was kept under `key`; `None` where it was another, or a part of it is lost or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept.pop("key") != key:
            return None
        figures = {name: file.with_name(f"{name}.png") for name in kept["figures"]}
        section = Section(**{**kept, "figures": figures, "shown": tuple(kept["shown"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    tables = [file.with_name(f"{name}{ending}") for name in section.tables for ending in (".json", ".parquet")]
    return section if all(path.is_file() for path in [*figures.values(), *tables]) else None


def write_table(rows: list[dict], path: Path):
    """`path`.json and `path`.parquet."""
    import pyarrow
    import pyarrow.parquet

    write_text(path.with_suffix(".json"), json.dumps(rows, indent=1, allow_nan=False) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


# -- the page ---------------------------------------------------------------------------------------------------------


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 0 1rem 3rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
figure { margin: 1.5rem 0; } figcaption { color: #444; font-size: .9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { white-space: normal; text-align: left; vertical-align: top; }
.facts { color: #555; font-size: .9rem; }
"""


def render_page(title: str, facts: list[str], sections: list[Section]) -> str:
    """The report as HTML, readable on a phone."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="facts">{html.escape(fact)}</p>' for fact in facts),
    ]
    claims = [claim for section in sections for claim in section.claims]
    if claims:
        parts += ["<h2>In short</h2>", _table(claims, "text")]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.reading]
        parts += [_figure(name, path, section.captions[name]) for name, path in section.figures.items()]
        parts += [_table(section.tables[name]) for name in section.shown]
    return "\n".join([*parts, "</body></html>", ""])


def _figure(name: str, path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(name.replace("_", " "))}" src="data:image/png;base64,{content}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _table(rows: list[dict], style: str = "numbers") -> str:
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row[name]))}</td>" for name in names) + "</tr>" for row in rows
    )
    return f'<div class="table"><table class="{style}"><tr>{head}</tr>{body}</table></div>'


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
