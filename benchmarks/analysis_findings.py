"""What reports of several seeds of one recipe say together: training noise, which no report of one model shows.

    python training/analyze.py --pipeline runs/compare/runs/freq_gate_seed0/pipeline --out runs/reports/freq_gate_seed0
    ... (the other seeds)
    python benchmarks/analysis_findings.py --reports runs/reports/freq_gate_seed* --out results/analysis_freq_gate.json

Printed: the direction of each gate by seed, the double dissociation index and the decision levels by seed, with
t-intervals of the mean over seeds. `--figure` draws the gates of each seed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from output import print_table, write_result

from freqgate_dit.files import read_json
from freqgate_dit.plots import seed_curves
from freqgate_dit.statistics import paired_difference


TABLES = (
    "gates/gates",
    "gates/gains",
    "gates/spectral_gate",
    "interventions/dissociation",
    "interventions/interventions",
    "information/ceiling",
    "information/half",
    "decisions/levels",
    "order/arrival",
    "order/arrival_of_pixels",
)


# Shares of images that show a factor of their label, or of the one that it was exchanged with.
RIGHT = ("structure_right", "texture_right", "structure_of_other", "texture_of_other")


FACTS = ("variant", "world", "checkpoint", "training", "code", "seconds")  # that this script cannot do without


def read_table(report: Path, name: str) -> list[dict]:
    """Rows of a table, none where the last call for this report did not make its section, or the section has none."""
    path = report / "sections" / f"{name}.json"
    made = name.split("/")[0] in read_facts(report)["seconds"]
    return json.loads(path.read_text(encoding="utf-8")) if made and path.is_file() else []


def read_facts(report: Path) -> dict:
    """What a report is of.

    Raises:
        SystemExit: if the folder is no report, or one of an earlier version.
    """
    path = report / "report.json"
    facts = read_json(path) if path.is_file() else {}
    missing = [name for name in FACTS if name not in facts]
    if missing:
        what = f"says nothing of {missing[0]}" if facts else "is missing"
        raise SystemExit(f"`reports` has {report.name}, whose report.json {what}: make it with training/analyze.py.")
    return facts


def common_facts(facts: list[dict]) -> dict:
    """What reports of several seeds have in common, and their seeds.

    Raises:
        SystemExit: if they are of other models, trained or measured otherwise, or one is there twice.
    """
    own = ("checkpoint", "seconds")
    common = {name: value for name, value in facts[0].items() if name not in own}
    common["training"] = {**common["training"], "seed": [fact["training"].get("seed") for fact in facts]}
    for fact in facts:
        training = {**fact["training"], "seed": common["training"]["seed"]}
        other = {name: value for name, value in {**fact, "training": training}.items() if name not in own}
        if other != common:
            raise SystemExit(
                f"`reports` must be seeds of one recipe, measured alike; they differ in {differences(common, other)}."
            )
    checkpoints = [fact["checkpoint"] for fact in facts]
    known = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    if len(set(known)) < len(known):
        raise SystemExit("`reports` has reports of the same weights twice: name each model once.")
    return {**common, "checkpoints": [checkpoint and checkpoint[:12] for checkpoint in checkpoints]}


def differences(one: dict, other: dict, of: str = "") -> str:
    """ "config.rank: 4, 8", ..."""
    told = []
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            told.append(differences(a, b, f"{of}{name}."))
        elif a != b:
            told.append(f"{of}{name}: {a!r}, {b!r}")
    return ", ".join(told)


def over_seeds(values: list[float]) -> dict:
    """Mean and 95 % t-interval over seeds; needs two."""
    found = paired_difference(values, [0.0] * len(values))
    return {"by_seed": values, "mean": found.mean, "low": found.low, "high": found.high}


def mean_of(values: list[float | None]) -> float:
    """Of those that are known."""
    return float(np.mean([value for value in values if value is not None]))


def by_name(tables: list[list[dict]], key: str) -> dict[str, list[dict]]:
    """By the value of `key` the row of each report, of those rows that all have: a report leaves out what it cannot
    tell."""
    rows = [{row[key]: row for row in table} for table in tables]
    return {name: [found[name] for found in rows] for name in rows[0] if all(name in found for found in rows)}


def draw_gates(reports: list[Path]):
    """The gate curves of all reports; of Freq-Gate each block's mean gate, of Band-Gate low over high of each branch.

    Raises:
        SystemExit: if a report has none, or not those of the others.
    """
    kinds = {
        "gate_means": ("mean_gate", "gate g (1: Low, 0: High)"),
        "gain_curves": ("low_over_high_dB", "gain of low over high band (dB)"),
    }
    for table, (value, ylabel) in kinds.items():
        curves = [read_table(report, f"gates/{table}") for report in reports]
        if not all(curves):
            continue
        keys = [[(row["log_snr"], row["block"], row.get("branch", "")) for row in rows] for rows in curves]
        if any(other != keys[0] for other in keys):
            raise SystemExit("`reports` are of models with other blocks, branches or noise: name those of one recipe.")
        levels = list(dict.fromkeys(key[0] for key in keys[0]))
        parts = list(dict.fromkeys(key[1:] for key in keys[0]))
        values = np.array([[row[value] for row in rows] for rows in curves]).reshape(len(reports), -1, len(parts))
        names = [f"block {block} {branch}" for block, branch in parts]
        return seed_curves(levels, values, [report.name for report in reports], names, ylabel)
    raise SystemExit("`reports` have no gates in common to draw: make the section `gates` of each.")


def collect(reports: list[Path]) -> dict:
    """What the reports have in common: each measure by report, in their order, most with a t-interval over them.

    Raises:
        SystemExit: if they are not seeds of one recipe that were measured alike.
    """
    facts = [read_facts(report) for report in reports]
    result = {"reports": [report.name for report in reports], "protocol": common_facts(facts)}
    tables = {name: [read_table(report, name) for report in reports] for name in TABLES}
    gates = tables["gates/gates"]
    if all(gates):
        result["gates"] = {name: [[row[name] for row in table] for table in gates] for name in gates[0][0]}
    means = [read_table(report, "gates/gate_means") for report in reports]
    if all(means):
        by_block = [
            [[row["mean_gate"] for row in table if row["block"] == block] for block in range(len(gates[0]))]
            for table in means
        ]
        result["range_of_mean_gate"] = [[max(values) - min(values) for values in blocks] for blocks in by_block]
    gains = tables["gates/gains"]
    if all(gains):
        result["gains"] = {name: [[row[name] for row in table] for table in gains] for name in gains[0][0]}
    spectral = tables["gates/spectral_gate"]
    if all(spectral):
        rings = sorted({row["ring"] for row in spectral[0]})
        result["spectral_gate_by_ring"] = {
            name: [
                over_seeds([mean_of([row[name] for row in table if row["ring"] == ring]) for table in spectral])
                for ring in rings
            ]
            for name in ("half_open_shift", "slope")
        }
    indices = by_name(tables["interventions/dissociation"], "by")
    if indices:
        result["dissociation"] = {
            name: over_seeds([row["index"] for row in rows])
            | {"intervals": [[row["low"], row["high"]] for row in rows]}
            for name, rows in indices.items()
        }
    ceilings = tables["information/ceiling"]
    if all(ceilings):
        uses = [{row.get("of"): row for row in table} for table in ceilings]
        for report, found in zip(reports, uses):
            if found.keys() != uses[0].keys() or None in found:
                raise SystemExit(
                    f"`reports` has {report.name}, whose section `information` is of another version, or of a model "
                    "with another condition: make that section of all again."
                )
        result["information_over_entropy"] = {
            of: over_seeds([found[of]["nats"] / found[of]["entropy"] for found in uses]) for of in uses[0]
        }
        for key, name in (
            ("half_of_the_use_at", "half_at_log_snr"),
            ("half_is_used_at", "half_of_entropy_at_log_snr"),
        ):
            halves = {of: [found[of][name] for found in uses] for of in uses[0]}
            result[key] = {of: over_seeds(found) for of, found in halves.items() if None not in found}
    of_data = tables["information/half"]
    if all(of_data):
        result["half_is_in_the_data_at"] = {
            name: mean_of([rows[0][name] for rows in of_data]) for name in of_data[0][0] if name != "difference"
        }
    levels = by_name(tables["decisions/levels"], "kind")
    if levels:
        result["levels"] = {
            kind: {name: over_seeds([row[name] for row in rows]) for name in ("structure", "texture", "difference")}
            for kind, rows in levels.items()
        }
    losses = [{row["intervention"]: row for row in table} for table in tables["interventions/interventions"]]
    if all(losses) and "held_out_loss" in losses[0]["none"]:
        result["loss_change_percent"] = {
            name: over_seeds(
                [100 * (rows[name]["held_out_loss"] / rows["none"]["held_out_loss"] - 1) for rows in losses]
            )
            for name in losses[0]
            if name != "none"
        }
    if all(losses):
        result["right"] = {
            name: {key: over_seeds([rows[name][key] for rows in losses]) for key in RIGHT if key in losses[0]["none"]}
            for name in losses[0]
        }
        result["effects"] = {
            name: {band: [rows[name][band] for rows in losses] for band in losses[0][name] if band[:7] == "change_"}
            for name in losses[0]
            if name != "none"
        }
    for name in ("arrival", "arrival_of_pixels"):
        if all(tables[f"order/{name}"]):
            result[name] = [[row for row in table if row["class"] == "all"] for table in tables[f"order/{name}"]]
    return result


def text(values: dict, digits: int = 2) -> list[str]:
    by_seed = ", ".join(f"{value:+.{digits}f}" for value in values["by_seed"])
    return [by_seed, f"{values['mean']:+.{digits}f} [{values['low']:+.{digits}f}, {values['high']:+.{digits}f}]"]


def print_findings(result: dict):
    if "gates" in result:
        by_report = zip(result["reports"], result["gates"]["correlation"])
        rows = {name: [", ".join(f"{value:+.2f}" for value in blocks)] for name, blocks in by_report}
        print_table("Correlation of each block's mean gate with log-SNR", ["blocks"], rows, "report")
    if "spectral_gate_by_ring" in result:
        of_rings = result["spectral_gate_by_ring"]
        pairs = zip(of_rings["half_open_shift"], of_rings["slope"])
        rows = {str(ring): [text(shift)[1], text(slope)[1]] for ring, (shift, slope) in enumerate(pairs)}
        print_table(
            "Learned spectral gate: half open later than Wiener's by, and its slope (Wiener's: 1)",
            ["log-SNR", "slope"],
            rows,
            "ring, from the lowest frequency",
        )
    rows = {}
    for name, values in result.get("dissociation", {}).items():
        rows[f"double dissociation index, {name}"] = text(values, 3)
    for name, values in result.get("information_over_entropy", {}).items():
        rows[f"information used of {name}, over its entropy"] = text(values)
    for name, values in result.get("half_of_the_use_at", {}).items():
        rows[f"half of the use of {name} over at log-SNR"] = text(values)
    for name, values in result.get("half_is_used_at", {}).items():
        rows[f"half of what there is of {name} used at log-SNR"] = text(values)
    for kind, levels in result.get("levels", {}).items():
        rows |= {f"{kind}: {name}": text(values) for name, values in levels.items()}
    for name, values in result.get("loss_change_percent", {}).items():
        rows[f"held-out loss, {name} (%)"] = text(values)
    if rows:
        print_table("Over seeds", ["by seed", "mean [95 %]"], rows, "measure")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, nargs="+", required=True, help="folders of training/analyze.py")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--figure", type=Path, help="PNG file for the gates by seed")
    arguments = parser.parse_args()
    if len(arguments.reports) < 2:
        raise SystemExit(f"`reports` ({len(arguments.reports)}): training noise shows from two seeds on.")
    result = collect(arguments.reports)
    print_findings(result)
    write_result(result, arguments.out)
    if arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        draw_gates(arguments.reports).savefig(arguments.figure)


if __name__ == "__main__":
    main()
