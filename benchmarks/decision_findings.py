"""When models decide structure and texture, world by world, beside what the noisy data tell and what was predicted.

    python training/train.py --config training/configs/demo.yaml --world reversed --seed 0 \\
        --output_dir runs/worlds/reversed_seed0
    python training/analyze.py --pipeline runs/worlds/reversed_seed0/pipeline --sections decisions \\
        --out runs/reports/world_reversed_seed0
    ... (worlds and seeds)
    python benchmarks/decision_findings.py --reports runs/reports/world_* --out results/decision_levels.json \\
        --figure results/figures/decision_levels.png

A report's interval is over its pairs of labels. Over the seeds of a world, from two on, it is of training.
"""

import argparse
from pathlib import Path

from analysis_findings import over_seeds, read_table, text
from output import print_table, write_result

from freqgate_dit.plots import decided_worlds
from freqgate_dit.training.decisions import PREDICTED


def collect(reports: list[Path]) -> dict[str, dict]:
    """By world: the sign that was predicted, the data's own difference, and each report's levels, by kind of exchange.

    Raises:
        SystemExit: if a report gives no levels.
    """
    worlds = {}
    for report in reports:
        levels = read_table(report, "decisions/levels")
        if not levels:
            raise SystemExit(f"`reports` has {report.name}, which gives no decision levels: see its report.html.")
        world, of_data = levels[0]["world"], levels[0]["of_data"]
        found = worlds.setdefault(world, {"predicted_sign": PREDICTED[world], "of_data": of_data, "kinds": {}})
        for row in levels:
            values = {name: row[name] for name in ("structure", "texture", "difference", "low", "high")}
            found["kinds"].setdefault(row["kind"], []).append({"report": report.name, **values})
    for found in worlds.values():
        found["over_seeds"] = {
            kind: over_seeds([row["difference"] for row in rows])
            for kind, rows in found["kinds"].items()
            if len(rows) > 1
        }
    return {world: worlds[world] for world in PREDICTED if world in worlds}


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def print_findings(worlds: dict[str, dict]):
    rows = {}
    for world, found in worlds.items():
        for kind, reports in found["kinds"].items():
            over = found["over_seeds"].get(kind)
            rows[f"{world}, {kind}"] = [
                "-0+"[found["predicted_sign"] + 1],
                signed(found["of_data"]),
                ", ".join(f"{row['structure']:+.2f} / {row['texture']:+.2f}" for row in reports),
                ", ".join(f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" for row in reports),
                text(over)[1] if over else "-",
            ]
    columns = ["predicted", "of the data", "structure / texture", "texture - structure, each model", "over seeds"]
    print_table("Decision levels (log-SNR)", columns, rows, "world, exchange")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, nargs="+", required=True, help="folders of training/analyze.py")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--figure", type=Path, help="PNG file for the differences by world")
    arguments = parser.parse_args()
    worlds = collect(arguments.reports)
    print_findings(worlds)
    write_result(worlds, arguments.out)
    if arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        decided_worlds(worlds).savefig(arguments.figure)


if __name__ == "__main__":
    main()
