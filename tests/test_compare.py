"""Comparisons of recipes: tiny real runs, and what a comparison file may not say."""

import json
import shutil

import numpy as np
import pytest
import yaml
from tiny_runs import MODEL, ROOT

from freqgate_dit.statistics import paired_difference
from freqgate_dit.training.compare import main, run_all


def write(path, **changes):
    content = {
        "baseline": "adaln",
        "seeds": [0, 1],
        "common": {
            **MODEL,
            "cache_dir": str(path.parent / "cache"),
            "prediction_type": "v_prediction",
            "max_steps": 4,
            "validate_every": 2,
            "preview_every": 100,
            "save_every": 2,
            "log_every": 2,
            "learning_rate": 1e-2,
            "cpu_threads": 1,
        },
        "arms": {"adaln": {"variant": "adaln_zero"}, "band_gate": {"variant": "band_gate", "modulation_rank": 4}},
    }
    path.write_text(yaml.safe_dump({**content, **changes}))
    return ["--config", str(path), "--out", str(path.parent / "out")]


def test_a_comparison_end_to_end(tmp_path, capsys):
    words = write(tmp_path / "c.yaml")
    main(words)
    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    assert result["steps"] == [0, 2, 4] and set(result["arms"]) == {"adaln", "band_gate"}
    # The numbers are the runs', paired by seed.
    loss = {}
    for arm in ("adaln", "band_gate"):
        for seed in (0, 1):
            lines = (out / "runs" / f"{arm}_seed{seed}" / "validation.jsonl").read_text().splitlines()
            loss[arm, seed] = json.loads(lines[-1])["ema"]["loss"]
    a, b = (np.array([loss[arm, seed] for seed in (0, 1)]) for arm in ("band_gate", "adaln"))
    expected = paired_difference(100 * a / b.mean(), 100 * b / b.mean())
    difference = result["arms"]["band_gate"]["difference_percent"]
    assert difference["mean"] == pytest.approx(expected.mean) and difference["p_two_sided"] == expected.p_two_sided
    # Both arms predict 0 before the first step, on the same noisy images, and differ after it.
    assert result["arms"]["band_gate"]["difference_percent_by_step"][0]["mean"] == pytest.approx(0, abs=1e-9)
    assert difference["mean"] != 0
    printed = capsys.readouterr().out
    assert "| band_gate | " in printed and "baseline" in (out / "comparison.md").read_text()
    for name in ("curves.png", "forest.png"):
        assert (out / name).stat().st_size > 1000

    # A second call trains nothing.
    log = out / "runs" / "adaln_seed0.log"
    before = log.read_text()
    main(words)
    assert log.read_text() == before and "4 of 4 runs were finished before" in capsys.readouterr().out
    # A run that lost its end goes on, one without a checkpoint starts again, and the numbers are the same.
    shutil.rmtree(out / "runs" / "adaln_seed0" / "checkpoints" / "step_00000004")
    for folder in ("adaln_seed0", "band_gate_seed1"):
        shutil.rmtree(out / "runs" / folder / "pipeline")
    shutil.rmtree(out / "runs" / "band_gate_seed1" / "checkpoints")
    main([*words, "--parallel", "2"])
    assert "resuming from step_00000002" in log.read_text().removeprefix(before)
    again = json.loads((out / "comparison.json").read_text())
    for arm, numbers in result["arms"].items():
        assert again["arms"][arm]["loss"] == numbers["loss"]


def test_dry_run_prints_the_commands(tmp_path, capsys):
    main([*write(tmp_path / "c.yaml"), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    assert all("--max_steps 4" in line and "--seed" in line for line in lines)
    assert "--modulation_rank 4 --variant band_gate" in lines[1]


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("compare_*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_comparisons_are_valid(path, tmp_path, capsys):
    main(["--config", str(path), "--out", str(tmp_path), "--dry_run"])
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [3]}, r"`seeds` \(\[3\]\) must be at least 2"),
        ({"seeds": [3, 3]}, "different numbers"),
        ({"baseline": "other"}, r"`baseline` \('other'\) must be one of"),
        ({"weights": "best"}, r"`weights` \('best'\) must be ema or raw"),
        ({"arms": {"adaln": {}, "b": {"max_steps": 9}}}, "`arms` has `max_steps` in 'b'.*use `common`"),
        ({"arms": {"adaln": {}, "b": {"learning_rat": 9}}}, "learning_rat"),
        ({"arms": {"adaln": {}, "../b": {}}}, r"`arms` has '\.\./b'"),
        ({"common": {"seed": 1}}, "`common` has `seed`"),
        ({"common": {"num_epochs": 1}}, "`common` needs `max_steps`"),
        ({"colour": 1}, "must hold baseline, seeds, common, arms"),
    ],
)
def test_comparisons_that_make_no_sense(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(write(tmp_path / "c.yaml", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(tmp_path):
    folder = tmp_path / "adaln_seed0"
    words = ["--max_steps", "1", "--dataset", str(tmp_path / "none"), "--output_dir", str(folder)]
    with pytest.raises(RuntimeError, match=r"adaln with seed 0 ended with status 1.*was not found.*adaln_seed0\.log"):
        run_all({("adaln", 0): (words, folder)}, 1)
