"""When models decide structure and texture, world by world, beside what the noisy data tell and what was predicted.

    python training/train.py --config training/configs/demo.yaml --world reversed --seed 0 \\
        --output_dir runs/worlds/reversed_freq_gate_seed0
    python training/analyze.py --pipeline runs/worlds/reversed_freq_gate_seed0/pipeline \\
        --sections information decisions --out runs/reports/world_reversed_freq_gate_seed0
    ... (worlds, variants and seeds)
    python benchmarks/decision_findings.py --reports runs/reports/world_* --out results/decision_levels.json \\
        --figure results/figures/decision_levels.png

Levels of exchanged labels have an interval over their pairs of labels. "use" are levels at which half of a model's use
of a factor is over, of the section `information`. Over the seeds of a world, from two on, the interval is of training.
"shown" is the share of the images of exchanged labels that show the factor of either label: a model that shows too few
gives no levels, and counts with its use alone.
"""

import argparse
from pathlib import Path

from analysis_findings import common_facts, over_seeds, read_facts, read_table, text
from output import print_table, write_result

from freqgate_dit.report_plots import decided_worlds
from freqgate_dit.training.decisions import FACTORS, KINDS, PREDICTED
from freqgate_dit.training.information import with_other


def collect(reports: list[Path]) -> dict[str, dict]:
    """By world: the sign that was predicted, the data's own difference, and by variant and kind of measurement each
    report's levels.

    Raises:
        SystemExit: if a report neither gives decision levels nor says why not, or reports of a world and a variant are
            not of one recipe.
    """
    worlds, all_facts = {}, {}
    for report in reports:
        facts, levels = read_facts(report), read_table(report, "decisions/levels")
        shown = [row for row in read_table(report, "decisions/shown") if row["kind"] == KINDS[0]]
        if not levels and not shown:
            raise SystemExit(f"`reports` has {report.name}, which gives no decision levels: see its report.html.")
        world = facts["world"]
        found = worlds.setdefault(
            world,
            {
                "predicted_sign": PREDICTED[world],
                "of_data": None,
                "models": {},
                "used_over_entropy": {},
                "shown": {},
            },
        )
        if levels:
            found["of_data"] = levels[0]["of_data"]
        for row in shown:
            shares = {factor: row[factor] for factor in FACTORS}
            found["shown"].setdefault(facts["variant"], []).append({"report": report.name, **shares})
        uses = {row["of"]: row for row in read_table(report, "information/ceiling")}
        uses = {factor: uses[with_other(factor)] for factor in FACTORS if with_other(factor) in uses}
        found["used_over_entropy"].setdefault(facts["variant"], []).append(over_entropy(uses))
        all_facts.setdefault((world, facts["variant"]), []).append(facts)
        kinds = found["models"].setdefault(facts["variant"], {})
        for row in levels:
            values = {name: row[name] for name in ("structure", "texture", "difference", "low", "high")}
            kinds.setdefault(row["kind"], []).append({"report": report.name, **values})
        half = {factor: use["half_at_log_snr"] for factor, use in uses.items()}
        if half and None not in half.values():
            difference = half["texture"] - half["structure"]
            values = {**half, "difference": difference, "low": None, "high": None}
            kinds.setdefault("use", []).append({"report": report.name, **values})
    for world, found in worlds.items():
        found["protocol"] = {variant: common_facts(all_facts[world, variant]) for variant in found["models"]}
        found["over_seeds"] = {
            variant: {
                kind: over_seeds([row["difference"] for row in rows]) for kind, rows in kinds.items() if len(rows) > 1
            }
            for variant, kinds in found["models"].items()
        }
    return {world: worlds[world] for world in PREDICTED if world in worlds}


def over_entropy(uses: dict[str, dict]) -> dict[str, float]:
    """How much of each factor is used, over what there is to know of it: at most 1 of an ideal denoiser, less where a
    model makes little of its label."""
    return {factor: use["nats"] / use["entropy"] for factor, use in uses.items()}


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def with_interval(row: dict) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    return f"{row['difference']:+.2f}{interval}"


def print_findings(worlds: dict[str, dict]):
    rows = {}
    for world, found in worlds.items():
        for variant, kinds in found["models"].items():
            for kind, reports in kinds.items():
                over = found["over_seeds"][variant].get(kind)
                rows[f"{world}, {variant}, {kind}"] = [
                    "-0+"[found["predicted_sign"] + 1],
                    signed(found["of_data"]),
                    ", ".join(f"{row['structure']:+.2f} / {row['texture']:+.2f}" for row in reports),
                    ", ".join(with_interval(row) for row in reports),
                    text(over)[1] if over else "-",
                ]
    for title, name in (("Use of a factor over its entropy", "used_over_entropy"), ("Images that show it", "shown")):
        print_table(
            f"{title}, each model",
            list(FACTORS),
            {
                f"{world}, {variant}": [", ".join(f"{one[factor]:.2f}" for one in models if one) for factor in FACTORS]
                for world, found in worlds.items()
                for variant, models in found[name].items()
            },
            "world, variant",
        )
    columns = ["predicted", "of the data", "structure / texture", "texture - structure, each model", "over seeds"]
    print_table("Decision levels (log-SNR)", columns, rows, "world, variant, measurement")


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
