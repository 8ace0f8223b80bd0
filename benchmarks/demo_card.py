"""Keep what describes the model that `make demo` trained, without its weights, and make model_card.md from it and from
what the analysis found over seeds.

python benchmarks/demo_card.py --pipeline demo/run/pipeline
"""

import argparse
import shutil
from pathlib import Path

from freqgate_dit.files import read_json, write_text
from freqgate_dit.model_card import render_card, table
from freqgate_dit.training.decisions import FACTORS
from freqgate_dit.training.information import with_other


ROOT = Path(__file__).resolve().parents[1]
KEPT = "results/demo_model"
LEFT_OUT = ("*.safetensors", "*.py", "README.md")
FIGURES = "\n## Figures\n"
VARIANTS = {"freq_gate": "Freq-Gate", "band_gate": "Band-Gate"}


def render_demo_card() -> str:
    """The text of model_card.md, from the files in `KEPT` and in results/."""
    card = str(render_card(ROOT / KEPT, name="demo/run/pipeline", beside=f"{KEPT}/"))
    before, after = card.split(FIGURES)
    return f"{before}\n{over_seeds()}{FIGURES}{after}"


def over_seeds() -> str:
    """Which findings hold over seeds, from results/: of each variant, with intervals over the models."""
    results = ROOT / "results"
    reports = {variant: read_json(results / f"analysis_{variant}.json") for variant in VARIANTS}
    worlds = read_json(results / "decision_levels.json")
    half = reports["freq_gate"]["half_is_in_the_data_at"]
    rows = [
        ["The gates of all blocks move the same way.", *(direction(found) for found in reports.values())],
        [
            "It depends on the course of its gates: held at their mean over time, the loss rises by more than 1 %.",
            *(beyond(found["loss_change_percent"]["gate mean"], 1.0, " %") for found in reports.values()),
        ],
        [
            "Low and High share out structure and texture (double dissociation index beyond 0.1, of at most 1).",
            *(either_side(found["dissociation"]["other condition"], 0.1) for found in reports.values()),
        ],
    ]
    for factor in FACTORS:
        name = with_other(factor)
        of_data = f"{half[name]:+.2f}"
        uses = [found["half_of_the_use_at"].get(name) for found in reports.values()]
        rows.append(
            [
                f"Half of the use of {factor} is over where half of it is in the noisy data ({of_data}), to 0.25.",
                *(near(use, half[name], 0.25) if use else "undecided: it uses more than there is" for use in uses),
            ]
        )
    for world, found in worlds.items():
        sign = found["predicted_sign"]
        what = {1: "Texture is decided after structure", -1: "Texture is decided before structure"}.get(
            sign, "Structure and texture are decided together, to 0.5"
        )
        cells = [of_world(found, variant, sign) for variant in VARIANTS]
        rows.append([f"World '{world}': {what}, by exchange of labels.", *cells])
    return (
        "### Over seeds\n\n"
        "What holds of several models each, with 95 % intervals over them (levels in log-SNR).\n\n"
        f"{table(rows, ('claim', *VARIANTS.values()))}\n\n"
        "How it was measured, and what else there is: [results/EXPERIMENTS.md](results/EXPERIMENTS.md).\n"
    )


def direction(found: dict) -> str:
    by_model = found["gates" if "gates" in found else "gains"]["correlation"]
    rising = sum(value > 0 for model in by_model for value in model)
    count = sum(map(len, by_model))
    return f"{verdict(rising in (0, count))}: {rising} of {count} rise as noise falls"


def verdict(is_so: bool | None) -> str:
    return "undecided" if is_so is None else "supported" if is_so else "not supported"


def told(values: dict, unit: str = "") -> str:
    return f"{values['mean']:+.2f}{unit} [{values['low']:+.2f}, {values['high']:+.2f}]"


def beyond(values: dict, least: float, unit: str = "") -> str:
    is_so = True if values["low"] > least else False if values["high"] < least else None
    return f"{verdict(is_so)}: {told(values, unit)}"


def either_side(values: dict, least: float) -> str:
    outside = values["low"] > least or values["high"] < -least
    inside = -least < values["low"] and values["high"] < least
    return f"{verdict(True if outside else False if inside else None)}: {told(values)}"


def near(values: dict, centre: float, most: float) -> str:
    inside = centre - most < values["low"] and values["high"] < centre + most
    outside = values["low"] > centre + most or values["high"] < centre - most
    return f"{verdict(True if inside else False if outside else None)}: {told(values)}"


def of_world(found: dict, variant: str, sign: int) -> str:
    models = found["models"].get(variant, {}).get("swap")
    if not models:
        return "-"
    values = found["over_seeds"][variant].get("swap") or {"mean": models[0]["difference"], **models[0]}
    cell = near(values, 0.0, 0.5) if sign == 0 else beyond(values, 0.0)
    if sign < 0:
        mirrored = {"mean": -values["mean"], "low": -values["high"], "high": -values["low"]}
        cell = f"{beyond(mirrored, 0.0).split(':')[0]}: {told(values)}"
    return cell + (" (one model, over pairs)" if len(models) == 1 else f" ({len(models)} models)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline",
        type=Path,
        help="what `make demo` has trained, to be kept in its place (default: what is kept stays)",
    )
    pipeline = parser.parse_args().pipeline
    if pipeline is not None:
        shutil.rmtree(ROOT / KEPT, ignore_errors=True)
        shutil.copytree(pipeline, ROOT / KEPT, ignore=shutil.ignore_patterns(*LEFT_OUT))
    write_text(ROOT / "model_card.md", render_demo_card())
    print(f"wrote model_card.md from {KEPT}/ and results/")


if __name__ == "__main__":
    main()
