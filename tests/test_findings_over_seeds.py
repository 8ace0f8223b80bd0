"""What `benchmarks/analysis_findings.py` and `benchmarks/decision_findings.py` make of several reports."""

import importlib
import json
from pathlib import Path

import pytest

from freqgate_dit.statistics import paired_difference


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FACTS = {"variant": "freq_gate", "world": "mod", "config": {"rank": 4}, "code": "1.0"}
FACTORS = ("structure", "texture")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def write(tmp_path):
    """Write a report with these tables."""

    def write(name, facts=FACTS, **tables):
        folder, number = tmp_path / name, len(list(tmp_path.iterdir()))
        folder.mkdir()
        own = {
            "training": {"seed": number, "max_steps": 10},
            "checkpoint": f"sha{number}",
            "seconds": {table.split("__")[0]: number for table in tables},
        }
        for table, rows in tables.items():
            path = folder / "sections" / f"{table.replace('__', '/')}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
        (folder / "report.json").write_text(json.dumps({**own, **facts}))
        return folder

    return write


def level(structure, texture, kind="swap", of_data=1.5):
    difference = texture - structure
    values = {"structure": structure, "texture": texture, "difference": difference}
    return {"world": "mod", "kind": kind, **values, "low": difference - 1, "high": difference + 1, "of_data": of_data}


def use(structure, texture):
    rows = [{"of": "label", "nats": 8.0, "entropy": 4.0, "half_at_log_snr": None, "half_of_entropy_at_log_snr": None}]
    for factor, at in zip(FACTORS, (structure, texture)):
        rows.append({"of": f"{factor}, the other factor known", "nats": 3.0, "entropy": 2.0, "half_at_log_snr": at})
        rows[-1]["half_of_entropy_at_log_snr"] = None if at is None else at - 0.5
    return rows


class TestOneRecipe:
    def test_measures_are_taken_over_seeds(self, script, write):
        losses = [(2.0, 3.0), (4.0, 5.0), (5.0, 5.0)]
        reports = [
            write(
                f"seed{seed}",
                gates__gates=[{"correlation": seed, "agreement": 0.5}, {"correlation": -seed, "agreement": 1.0}],
                gates__gate_means=[{"block": b, "mean_gate": g} for b in (0, 1) for g in (0.5, 0.5 + b * seed)],
                information__ceiling=use(-3.0 + seed, -2.0),
                information__half=[{"structure": -3.0 + seed, "texture": -2.0, "difference": 1.0 - seed}],
                decisions__levels=[level(-1.0, 1.0 + seed), level(-2.0, -2.0, "insertion")],
                interventions__interventions=[
                    {"intervention": "none", "held_out_loss": before, "change_0-1": 0.0, "structure_right": 1.0},
                    {
                        "intervention": "gate mean",
                        "held_out_loss": after,
                        "change_0-1": 0.1 * seed,
                        "structure_right": 0.5,
                    },
                ],
                interventions__dissociation=[{"by": "other condition", "index": 0.1 * seed, "low": -1.0, "high": 1.0}],
            )
            for seed, (before, after) in enumerate(losses)
        ]
        found = script("analysis_findings").collect(reports)
        assert found["reports"] == ["seed0", "seed1", "seed2"]
        assert found["gates"]["correlation"] == [[0, 0], [1, -1], [2, -2]]
        assert found["range_of_mean_gate"] == [[0, 0], [0, 1], [0, 2]]
        assert found["information_over_entropy"]["label"]["by_seed"] == [2.0] * 3
        assert found["half_of_the_use_at"].keys() == {f"{factor}, the other factor known" for factor in FACTORS}
        assert found["half_of_the_use_at"]["structure, the other factor known"]["by_seed"] == [-3, -2, -1]
        assert found["half_is_in_the_data_at"] == {"structure": -2.0, "texture": -2.0}
        assert found["half_is_used_at"]["structure, the other factor known"]["by_seed"] == [-3.5, -2.5, -1.5]
        assert found["levels"]["swap"]["difference"]["by_seed"] == [2, 3, 4]
        assert found["levels"]["insertion"]["difference"]["mean"] == 0
        assert found["loss_change_percent"]["gate mean"]["by_seed"] == pytest.approx([50, 25, 0])
        assert found["effects"] == {"gate mean": {"change_0-1": [0.0, 0.1, 0.2]}}
        assert found["right"]["gate mean"]["structure_right"]["mean"] == 0.5
        expected = paired_difference([0.0, 0.1, 0.2], [0.0] * 3)
        index = found["dissociation"]["other condition"]
        assert index["mean"] == pytest.approx(0.1) and index["low"] == expected.low and len(index["intervals"]) == 3
        assert found["protocol"]["training"] == {"seed": [0, 1, 2], "max_steps": 10}
        assert found["protocol"]["checkpoints"] == ["sha0", "sha1", "sha2"] and "seconds" not in found["protocol"]
        assert "gains" not in found and "arrival" not in found

    def test_what_one_report_lacks_is_left_out(self, script, write):
        whole = write(
            "whole",
            decisions__levels=[level(-1.0, 1.0), level(10.0, 1.0, "insertion"), level(0.0, 3.0, "withdrawal")],
            interventions__dissociation=[{"by": "other condition", "index": 0.1, "low": 0.0, "high": 1.0}],
        )
        # A kind of exchange that tells no level has no row: those that are there are joined by name.
        other = write("without", decisions__levels=[level(0.0, 1.0), level(2.0, 5.0, "withdrawal")])
        found = script("analysis_findings").collect([whole, other])
        assert found.keys() == {"reports", "protocol", "levels"}
        assert found["levels"].keys() == {"swap", "withdrawal"}
        assert found["levels"]["withdrawal"]["structure"]["by_seed"] == [0, 2]

    @pytest.mark.parametrize(
        "name, other",
        [
            ("variant", "band_gate"),
            ("world", "add"),
            ("config", {"rank": 8}),
            ("training", {"seed": 1, "max_steps": 20}),
            ("code", "0.9"),
        ],
    )
    def test_reports_of_several_recipes_are_refused(self, script, write, name, other):
        with pytest.raises(SystemExit, match=f"they differ in {name}[:.]"):
            script("analysis_findings").collect([write("one"), write("two", {**FACTS, name: other})])

    def test_one_model_is_not_two_seeds(self, script, write):
        with pytest.raises(SystemExit, match="the same weights twice"):
            script("analysis_findings").collect([write("one"), write("two", {**FACTS, "checkpoint": "sha0"})])

    def test_a_folder_that_is_no_report_is_refused(self, script, tmp_path):
        with pytest.raises(SystemExit, match="no_report, whose report.json is missing"):
            script("analysis_findings").collect([tmp_path / "no_report"])

    def test_curves_are_drawn_by_seed_and_part(self, script, write, monkeypatch):
        def gains(report):
            return [
                {"log_snr": l, "block": 0, "branch": branch, "low_over_high_dB": 10 * report + place + l}
                for l in (-1.0, 1.0)
                for place, branch in enumerate(("attention", "mlp"))
            ]

        reports = [write(f"seed{seed}", gates__gain_curves=gains(seed)) for seed in (0, 1)]
        analysis_findings, drawn = script("analysis_findings"), []
        monkeypatch.setattr(analysis_findings, "seed_curves", lambda *given: drawn.extend(given))
        analysis_findings.draw_gates(reports)
        levels, values, names, parts, _ = drawn
        assert levels == [-1.0, 1.0] and names == ["seed0", "seed1"]
        assert parts == ["block 0 attention", "block 0 mlp"]
        assert values.tolist() == [[[-1, 0], [1, 2]], [[9, 10], [11, 12]]]
        with pytest.raises(SystemExit, match="have no gates in common"):
            analysis_findings.draw_gates([write("none"), write("none2")])


class TestWorlds:
    def test_levels_are_kept_apart_by_world_and_variant(self, script, write):
        band_gate = {**FACTS, "variant": "band_gate"}
        reversed_world = {**FACTS, "world": "reversed"}
        reports = [
            write(
                "r",
                reversed_world,
                decisions__levels=[level(1.0, -1.0, of_data=-1.3)],
                information__ceiling=use(None, -2.0),
            ),
            write("a", decisions__levels=[level(-1.0, 1.0)], information__ceiling=use(-3.0, -2.0)),
            write("b", decisions__levels=[level(-1.0, 2.0)], information__ceiling=use(-3.0, -1.0)),
            write("c", band_gate, decisions__levels=[level(-1.0, 5.0)]),
        ]
        worlds = script("decision_findings").collect(reports)
        assert list(worlds) == ["mod", "reversed"]
        assert worlds["mod"]["predicted_sign"] == 1 and worlds["reversed"]["predicted_sign"] == -1
        assert worlds["mod"]["of_data"] == 1.5 and worlds["reversed"]["of_data"] == -1.3
        of_mod = worlds["mod"]["models"]
        assert [row["difference"] for row in of_mod["freq_gate"]["swap"]] == [2, 3]
        assert [row["difference"] for row in of_mod["freq_gate"]["use"]] == [1, 2]
        assert [row["report"] for row in of_mod["band_gate"]["swap"]] == ["c"] and "use" not in of_mod["band_gate"]
        assert "use" not in worlds["reversed"]["models"]["freq_gate"]
        assert worlds["mod"]["used_over_entropy"]["freq_gate"] == [dict.fromkeys(FACTORS, 1.5)] * 2
        assert worlds["mod"]["used_over_entropy"]["band_gate"] == [{}]
        over = worlds["mod"]["over_seeds"]
        assert over["freq_gate"]["swap"]["mean"] == 2.5 and over["band_gate"] == {}

    def test_a_model_that_shows_too_little_counts_with_its_use_alone(self, script, write):
        """Images that show no factor have no level; what the predictions use of the label is of noisy images."""
        good, poor = ({"kind": "swap", "structure": 0.9, "texture": share} for share in (0.6, 0.4))
        reports = [
            write(
                "poor",
                decisions__shown=[poor, {**poor, "kind": "insertion", "texture": 0.3}],
                information__ceiling=use(-3.0, -2.0),
            ),
            write(
                "good",
                decisions__shown=[good],
                decisions__levels=[level(-1.0, 1.0)],
                information__ceiling=use(-3.0, -1.0),
            ),
        ]
        found = script("decision_findings").collect(reports)["mod"]
        models = found["models"]["freq_gate"]
        assert [row["report"] for row in models["swap"]] == ["good"] and found["of_data"] == 1.5
        assert [row["difference"] for row in models["use"]] == [1, 2]
        assert found["shown"]["freq_gate"] == [
            {"report": "poor", "structure": 0.9, "texture": 0.4},
            {"report": "good", "structure": 0.9, "texture": 0.6},
        ]

    def test_a_report_without_levels_is_refused(self, script, write):
        with pytest.raises(SystemExit, match="`reports` has x, which gives no decision levels"):
            script("decision_findings").collect([write("x")])
