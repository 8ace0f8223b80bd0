"""Comparisons of recipes: tiny real runs, and what a comparison file may not say."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import MODEL, ROOT, is_drawn, photos, reset_accelerate, train

from freqgate_dit.statistics import paired_difference
from freqgate_dit.training.compare import (
    Comparison,
    Job,
    code_digest,
    evaluation_job,
    gpu_names,
    main,
    part_of_cores,
    run_all,
    training_job,
)
from freqgate_dit.training.config import parse_config, preset_for
from freqgate_dit.training.evaluation import main as evaluate
from freqgate_dit.training.matching import nearest


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


@pytest.fixture
def in_this_process(monkeypatch, unrendered):
    """Runs without a process for each, which takes longer to start than these runs themselves."""

    class Process:
        returncode = 0

        def __init__(self, command, stdout, **options):
            script = {"train.py": train, "evaluation.py": evaluate}[Path(command[1]).name]
            with contextlib.redirect_stdout(stdout):
                reset_accelerate()
                script(command[2:])

        def poll(self):
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)


FEATURES = """
import torch
def net(images):  # uint8 (N, 3, H, W) -> (N, 12)
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
"""


def test_a_comparison_end_to_end(tmp_path, capsys, in_this_process, monkeypatch):
    (tmp_path / "net.py").write_text(FEATURES)
    reference = {"reference": "shapes_textures", "features": f"{tmp_path / 'net.py'}:net", "num_images": 36}
    evaluation = {**reference, "steps": 2, "bootstrap": 0, "force": True, "cpu_threads": 1}
    words = write(tmp_path / "c.yaml", evaluation=evaluation)
    main(words)
    monkeypatch.undo()
    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    assert result["steps"] == [0, 2, 4] and set(result["arms"]) == {"adaln", "band_gate"}
    # The numbers are the runs', paired by seed.
    loss, cleanest = {}, {}
    for arm in ("adaln", "band_gate"):
        for seed in (0, 1):
            lines = (out / "runs" / f"{arm}_seed{seed}" / "validation.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])["ema"]
            loss[arm, seed], cleanest[arm, seed] = last["loss"], last["loss_by_timestep"][0]
    a, b = (np.array([loss[arm, seed] for seed in (0, 1)]) for arm in ("band_gate", "adaln"))
    expected = paired_difference(100 * a / b.mean(), 100 * b / b.mean())
    difference = result["arms"]["band_gate"]["difference_percent"]
    assert difference["mean"] == pytest.approx(expected.mean) and difference["p_two_sided"] == expected.p_two_sided
    # Both arms predict 0 before the first step, on the same noisy images, and differ after it.
    assert result["arms"]["band_gate"]["difference_percent_by_step"][0]["mean"] == pytest.approx(0, abs=1e-9)
    assert difference["mean"] != 0
    # The images too: the same noise for all, and an evaluation's numbers.
    name = "fd_net_36_forced_vs_heldout"
    for arm in ("adaln", "band_gate"):
        files = [out / "runs" / f"{arm}_seed{seed}" / "evaluation" / "evaluation.json" for seed in (0, 1)]
        values = [{m["name"]: m["value"] for m in json.loads(file.read_text())["metrics"]}[name] for file in files]
        assert result["arms"][arm]["metrics"][name] == values and values[0] != values[1]
    [contrast] = result["contrasts"]
    assert contrast["difference_percent"] == difference and contrast["metrics_difference"][name]["num_pairs"] == 2
    printed = capsys.readouterr().out
    assert "| band_gate | " in printed and "baseline" in (out / "comparison.md").read_text()
    row = [line.split("|") for line in printed.splitlines() if line.startswith("| band_gate |")][-1]
    assert float(row[7]) == pytest.approx(expected.p_two_sided, abs=1e-3)
    assert result["timesteps"][0] == 50 and len(contrast["difference_percent_by_timestep"]) == 10
    a, b = (np.array([cleanest[arm, seed] for seed in (0, 1)]) for arm in ("band_gate", "adaln"))
    expected = 100 * (a - b).mean() / b.mean()
    assert contrast["difference_percent_by_timestep"][0]["mean"] == pytest.approx(expected) and expected != 0
    cells = np.array([[cell["mean"] for cell in row] for row in contrast["difference_percent_by_cell"]])
    assert cells.shape == (10, len(result["bands"])) and np.isfinite(cells).all()
    assert result["code"] == [code_digest()]
    # A second call trains nothing.
    log = out / "runs" / "adaln_seed0.log"
    before = log.read_text()
    (out / "runs" / "adaln_seed0.code").write_text("0123456789ab")
    main(words)
    assert json.loads((out / "comparison.json").read_text())["code"] == sorted(["0123456789ab", code_digest()])
    printed = capsys.readouterr().out
    assert log.read_text() == before and "4 of 4 runs were finished before" in printed
    assert "these runs are of 2 versions of the code" in printed
    # A report of what is there is the same; with a third seed missing it leaves that out.
    for seeds in ([0, 1], [0, 1, 2]):
        main([*write(tmp_path / "c.yaml", evaluation=evaluation, seeds=seeds), "--report_only"])
        report = json.loads((out / "comparison.json").read_text())
        assert report["seeds"] == [0, 1] and report["contrasts"] == result["contrasts"]
    for name in ("errors.png", "curves.png", "timesteps.png", "forest.png", "cells.png"):
        assert (out / name).stat().st_size > 1000 and is_drawn(out / name)
    with pytest.raises(SystemExit, match="1 seeds have all arms finished"):
        main([*write(tmp_path / "c.yaml", evaluation=evaluation, seeds=[1, 2]), "--report_only"])
    capsys.readouterr()
    # An evaluation with other options is made anew, and none is reported that was not asked for.
    other = {**evaluation, "seed": 7}
    with pytest.raises(SystemExit, match="0 seeds have all arms finished"):
        main([*write(tmp_path / "c.yaml", evaluation=other), "--report_only"])
    main([*write(tmp_path / "c.yaml"), "--report_only"])
    assert json.loads((out / "comparison.json").read_text())["arms"]["adaln"]["metrics"] == {}
    capsys.readouterr()
    # Nor does a report on some arms take the place of one on all.
    with pytest.raises(
        SystemExit, match=r"`--out` .* has a report on band_gate too, which .*: move comparison.json aw"
    ):
        main([*write(tmp_path / "c.yaml", arms={"adaln": {}, "other": {"variant": "adaln_zero"}}), "--report_only"])
    main([*write(tmp_path / "c.yaml"), "--report_only", "--arms", "band_gate"])
    assert json.loads((out / "some_arms/comparison.json").read_text())["contrasts"][0]["arm"] == "band_gate"
    # Nor is anything trained beside runs that lack what is to be compared.
    validation = out / "runs" / "adaln_seed0" / "validation.jsonl"
    kept = validation.read_text()
    validation.write_text(kept.replace("epsilon_loss", "other"))
    with pytest.raises(SystemExit, match=r"`measure` \(epsilon\): .*adaln_seed0 was validated by an older version"):
        main(write(tmp_path / "c.yaml", measure="epsilon", seeds=[0, 1, 2]))
    assert not (out / "runs" / "adaln_seed2").exists()
    validation.write_text(kept)
    # A run on other images is told before anything is trained or reported.
    state = out / "runs" / "band_gate_seed1" / "checkpoints" / "step_00000004" / "state.json"
    known = state.read_text()
    fingerprint = json.loads(known)["fingerprints"]["dataset"]
    state.write_text(known.replace(fingerprint, fingerprint[::-1]))
    for more, seeds, than in ((["--report_only"], [0, 1], "adaln with seed 0"), ([], [0, 1, 2], "what is there now")):
        message = f"band_gate with seed 1 .* another content of `dataset` than {than}"
        with pytest.raises(SystemExit, match=message):
            main([*write(tmp_path / "c.yaml", seeds=seeds), *more])
    assert not (out / "runs" / "adaln_seed2").exists()
    state.write_text(known)
    # A run that was trained with other options is not passed off as one with these.
    arms = {"adaln": {"variant": "adaln_zero", "learning_rate": 2e-2}, "band_gate": {"variant": "adaln_zero"}}
    with pytest.raises(
        SystemExit, match=r"adaln with seed 0 with `learning_rate` 0\.01, .* says 0\.02: .* delete .*adaln"
    ):
        main([*write(tmp_path / "c.yaml", arms=arms), "--report_only"])
    # A run that lost its end goes on, and the numbers are the same; so are those of an evaluation made again.
    shutil.rmtree(out / "runs" / "adaln_seed0" / "checkpoints" / "step_00000004")
    for name in ("pipeline", "evaluation"):
        shutil.rmtree(out / "runs" / "adaln_seed0" / name)
    main(write(tmp_path / "c.yaml", evaluation=evaluation))
    assert "resuming from step_00000002" in log.read_text().removeprefix(before)
    again = json.loads((out / "comparison.json").read_text())
    for arm, numbers in result["arms"].items():
        assert again["arms"][arm]["loss"] == numbers["loss"]
        assert again["arms"][arm]["metrics"] == numbers["metrics"]


def test_arms_that_predict_different_things_are_compared_by_their_error_of_the_noise(tmp_path, in_this_process):
    arms = {"adaln": {"variant": "adaln_zero"}, "epsilon": {"variant": "adaln_zero", "prediction_type": "epsilon"}}
    main(write(tmp_path / "c.yaml", arms=arms, measure="epsilon"))
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for arm in arms:
        for seed in (0, 1):
            lines = (tmp_path / "out/runs" / f"{arm}_seed{seed}" / "validation.jsonl").read_text().splitlines()
            for step, line in enumerate(lines):
                values = json.loads(line).get("ema") or json.loads(line)["raw"]
                assert result["arms"][arm]["loss"][seed][step] == values["epsilon_loss"]
    assert (values["epsilon_loss"] == values["loss"]) and "error of the noise" in (
        tmp_path / "out/comparison.md"
    ).read_text()


def test_dry_run_prints_the_commands(tmp_path, capsys):
    main([*write(tmp_path / "c.yaml"), "--dry_run"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    assert all("--max_steps 4" in line and "--seed" in line for line in lines)
    assert "--modulation_rank 4 --variant band_gate" in lines[1]


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("training/configs/compare_*.yaml"), *ROOT.glob("benchmarks/compare_*.yaml")]),
    ids=lambda path: path.stem,
)
def test_the_shipped_comparisons_are_valid(path, tmp_path, capsys):
    if path.stem == "compare_animals64":  # its data are not here: the same arms on others
        content = yaml.safe_load(path.read_text())
        content["common"] |= {"dataset": "shapes_textures", "vae": None, "heldout_per_class": None}
        path = tmp_path / "compare_animals64.yaml"
        path.write_text(yaml.safe_dump(content))
    main(["--config", str(path), "--out", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert f"| {yaml.safe_load(path.read_text())['baseline']} | " in printed
    assert printed.count("python training/train.py") >= 4


def test_an_arm_is_what_its_file_says_and_no_preset():
    common = {"dataset": "photos", "max_steps": 1}
    arms = {"adaln": {"variant": "adaln_zero"}, "freq": {"variant": "freq_gate"}}
    comparison = Comparison("adaln", [0, 1], common, arms)
    for arm in arms:
        words = comparison.arguments(arm, 0, Path("run"))
        assert parse_config(words, preset=preset_for) == comparison.config(arm)


def test_some_arms_are_compared_with_the_baseline(tmp_path, capsys):
    arms = {
        "adaln": {"variant": "adaln_zero"},
        "freq": {"variant": "freq_gate"},
        "cross": {"variant": "cross_attention"},
    }
    words = [*write(tmp_path / "c.yaml", arms=arms, contrasts=[["freq", "adaln"], ["cross", "freq"]]), "--dry_run"]
    main([*words, "--arms", "freq"])
    out = capsys.readouterr().out
    assert "adaln_seed1" in out and "freq_seed1" in out and "cross_seed" not in out
    with pytest.raises(SystemExit, match="`--arms` has 'frq': choose some of adaln, cross, freq"):
        main([*words, "--arms", "frq"])
    with pytest.raises(SystemExit, match=r"`--arms` \(cross\) leaves none of the contrasts"):
        main([*words, "--arms", "cross"])
    arms["freq"] |= {"match": "num_layers", "match_to": "cross"}
    write(tmp_path / "c.yaml", arms=arms)
    with pytest.raises(SystemExit, match="`--arms` has 'freq', which is matched to 'cross': name that one too"):
        main([*words, "--arms", "freq"])


@pytest.mark.parametrize("to", ["adaln", "freq"])
@pytest.mark.parametrize("match, by", [("num_layers", "flops"), ("modulation_rank", "parameters")])
def test_an_arm_is_matched_to_another(match, by, to, tmp_path, capsys):
    large, small = ({"variant": name, "num_layers": layers} for name, layers in (("adaln_zero", 5), ("freq_gate", 3)))
    arms = {"adaln": large, "freq": small} if to == "adaln" else {"freq": large, "adaln": small}
    config, arm = tmp_path / "c.yaml", {"variant": "band_gate", "match": match}
    arms["band_gate"] = arm if to == "adaln" else {**arm, "match_to": "freq"}
    main([*write(config, arms=arms, match_by=by), "--dry_run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "--variant band_gate" in line]
    chosen = int(lines[0][lines[0].index(f"--{match}") + 1])
    column = {"parameters": 2, "flops": 3}[by]

    def share(value):
        arms["band_gate"] = {"variant": "band_gate", match: value}
        main([*write(config, arms=arms, baseline=to), "--dry_run"])
        [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| band_gate")]
        return abs(float(row.split("|")[column].split("(")[1].split(")")[0]) - 1)

    assert share(chosen) <= min(share(chosen + 1), share(max(1, chosen - 1)))


def test_nearest_of_known_counts():
    asked = []

    def count(n):
        asked.append(n)
        return 10 * n

    for target, found in ((1, 1), (14, 1), (16, 2), (70, 7), (1004, 100), (1006, 101)):
        asked.clear()
        assert nearest(count, target) == found and len(set(asked)) == len(asked)
    with pytest.raises(ValueError, match="even 4096 gives 4,096, less than 5,000"):
        nearest(lambda n: n, 5000)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [3]}, r"`seeds` \(\[3\]\) must be at least 2"),
        ({"seeds": [3, 3]}, "different numbers"),
        ({"baseline": "other"}, r"`baseline` \('other'\) must be one of"),
        ({"weights": "best"}, r"`weights` \('best'\) must be ema or raw"),
        ({"arms": {"adaln": {}, "b": {"max_steps": 9}}}, "`arms` has `max_steps` in 'b'.*use `common`"),
        ({"arms": {"adaln": {}, "b": {"data_seed": 9}}}, "`arms` has `data_seed` in 'b'.*use `common`"),
        ({"arms": {"adaln": {}, "b": {"learning_rat": 9}}}, "learning_rat"),
        ({"arms": {"adaln": {}, "../b": {}}}, r"`arms` has '\.\./b'"),
        ({"common": {"seed": 1}}, "`common` has `seed`"),
        ({"common": {"num_epochs": 1}}, "`common` needs `max_steps`"),
        ({"contrasts": [["adaln", "other"]]}, r"`contrasts` has \['adaln', 'other'\]"),
        ({"measure": "v"}, r"`measure` \('v'\) must be own or epsilon"),
        (
            {"arms": {"adaln": {}, "b": {"prediction_type": "epsilon"}}},
            r"`arms` predict different things \(epsilon, v_prediction\).*set `measure` to epsilon",
        ),
        ({"match_by": "size"}, r"`match_by` \('size'\) must be parameters or flops"),
        ({"arms": {"adaln": {}, "b": {"match": "width"}}}, r"`match` \('width'\) in 'b'"),
        ({"arms": {"adaln": {"match": "num_layers"}, "b": {}}}, r"`match_to` \('adaln'\) in 'adaln' must be another"),
        ({"arms": {"adaln": {}, "b": {"match": "num_layers", "match_to": "c"}}}, r"`match_to` \('c'\) in 'b' must be"),
        ({"arms": {"adaln": {}, "b": {"match_to": "adaln"}}}, r"`match_to` \('adaln'\) in 'b' needs `match`"),
        ({"evaluation": {"reference": "shapes_textures", "num_images": 0}}, r"`num_images` \(0\) must be at least 1"),
        ({"evaluation": {"reference": "shapes_textures", "out": "x"}}, r"`evaluation` has `out`"),
        ({"colour": 1}, "must hold baseline, seeds, common, arms"),
    ],
)
def test_comparisons_that_make_no_sense(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(write(tmp_path / "c.yaml", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(tmp_path, capsys):
    folder = tmp_path / "adaln_seed0"
    folder.mkdir()
    words = ["--max_steps", "1", "--dataset", str(tmp_path / "none"), "--output_dir", str(folder)]
    for _ in range(2):  # a refusal makes nothing its own
        with pytest.raises(FileExistsError, match="adaln_seed0 was not made by this comparison"):
            training_job("adaln with seed 0", words, folder)
    assert folder.exists()
    (folder / "evaluation").mkdir()
    for steps in (2, 3):
        with pytest.raises(FileExistsError, match="evaluation was not made by this comparison"):
            evaluation_job("adaln with seed 0", {"steps": steps}, folder)
    (folder / "evaluation").rmdir()
    Path(f"{folder}.code").write_text("one")
    job = training_job("adaln with seed 0", words, folder)  # cut off before its first checkpoint
    assert folder.exists() and job.command[-2:] == ["--resume", "auto"]
    with pytest.raises(RuntimeError, match=r"adaln with seed 0 ended with status 1.*was not found.*adaln_seed0\.log"):
        run_all([job], 1, "training")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_the_runs_too_and_waits_for_them(name, tmp_path):
    """A run gets one signal, whoever else in the group of processes gets it, and all the time that it needs."""
    code = """
import os, pathlib, signal, sys, time
seen = []
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), lambda number, frame: seen.append(signal.Signals(number).name))
assert os.getsid(0) == os.getpid()
os.kill(os.getppid(), getattr(signal, sys.argv[2]))
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
pathlib.Path(sys.argv[1]).write_text(" ".join(seen))
"""
    numbers = [getattr(signal, one) for one in ("SIGINT", "SIGTERM", "SIGHUP")]
    handlers = [signal.getsignal(number) for number in numbers]
    job = Job("run", [sys.executable, "-c", code, str(tmp_path / "file"), name], tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        run_all([job], 1, "training")
    assert (tmp_path / "file").read_text() == "SIGTERM"
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_ctrl_c_ends_a_comparison_with_a_sentence(tmp_path, monkeypatch):
    def interrupted(*words, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(SystemExit, match="^stopped: the same command goes on where its runs have stopped$"):
        main(write(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "held_out, used, message",
    [(2, 32, "6 images are held out, .* raise `heldout_fraction`"), (4, 9, "9 of them are used, .* raise `num_val")],
)
def test_too_few_images_for_every_noise_level_are_told_before_a_run(held_out, used, message, tmp_path):
    common = {
        **yaml.safe_load(Path(write(tmp_path / "c.yaml")[1]).read_text())["common"],
        "dataset": str(photos(tmp_path / "photos")),
        "num_images": None,
        "resolution": 16,
        "heldout_per_class": held_out,
        "num_validation_images": used,
    }
    common.pop("num_images")
    with pytest.raises(SystemExit, match=f"`common`: {message}"):
        main(write(tmp_path / "c.yaml", common=common))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpus, seen", [(["2", "5"], ["2", "2", "5", "5"]), (["2"], ["all"] * 4), ([], ["all"] * 4)])
def test_runs_at_a_time_are_spread_over_the_gpus(gpus, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    # Each waits for the others, so that all four run at once.
    code = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / sys.argv[2]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while len(list(folder.glob("run*"))) < 4:
    time.sleep(0.01)
"""
    jobs = [
        Job(str(i), [sys.executable, "-c", code, str(tmp_path), f"run{i}"], tmp_path / f"log{i}") for i in range(4)
    ]
    run_all(jobs, 4, "training", gpus)
    assert sorted((tmp_path / f"run{i}").read_text() for i in range(4)) == seen


@pytest.mark.parametrize(
    "visible, found, names",
    [
        (None, 2, ["0", "1"]),
        ("3, GPU-8f2a", 2, ["3", "GPU-8f2a"]),
        ("0,1,2", 2, ["0", "1"]),
        ("1,-1,0", 1, ["1"]),
        ("", 0, []),
    ],
)
def test_gpus_are_those_that_torch_finds(visible, found, names, monkeypatch):
    """CUDA sees what stands before the first name that it does not know; a run given that one alone would see none."""
    devices = [torch.device("cuda", index) for index in range(found)]
    monkeypatch.setattr("freqgate_dit.training.compare.accelerators", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == names


def test_runs_at_a_time_share_the_cores(monkeypatch):
    monkeypatch.setattr("freqgate_dit.training.compare.available_cores", lambda: 7)
    assert [part_of_cores(parallel) for parallel in (1, 2, 8)] == [[], ["--cpu_threads", "3"], ["--cpu_threads", "1"]]
