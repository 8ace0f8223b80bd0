"""What is known before step 1: launchers that are refused, bytes on disk, and steps spread over a run."""

import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from components import tiny_text_encoder, tiny_transformer, tiny_vae_kl
from tiny_runs import refusal

from freqgate_dit.training.config import parse_config
from freqgate_dit.training.preflight import check_disk, gib, refuse_launchers, run_bytes
from freqgate_dit.training.schedules import is_spread
from freqgate_dit.training.train import Trainer


pytestmark = pytest.mark.usefixtures("unrendered")


@pytest.fixture
def options(options, tmp_path):
    return partial(options, cache_dir=tmp_path / "cache")


# -- launchers --------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


@pytest.mark.parametrize("variable", STRATEGIES)
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_a_strategy_that_splits_the_model_is_refused_before_anything_is_done(
    variable, value, options, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, value)
    message = refusal(options())
    assert f"set to {STRATEGIES[variable]}," in message and "--multi_gpu" in message and "\n" not in message
    # Accelerate was not even started: some strategies need packages that are not here, and it would say only that.
    assert not AcceleratorState._shared_state and not list(tmp_path.iterdir())


def test_plain_launchers_are_not_refused(monkeypatch):
    for variable in STRATEGIES:
        monkeypatch.delenv(variable, raising=False)
    refuse_launchers()
    for variable in STRATEGIES:
        monkeypatch.setenv(variable, "false")
    refuse_launchers()


# -- bytes ------------------------------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": ["0.9", "power:0.1", "power:0.05"], "ema_snapshots": 3, "save_every": 2, "keep_checkpoints": 1},
        {"ema": ["power:0.1"], "ema_snapshots": 20, "save_every": 1, "keep_every": 1},
        {"save_every": 1, "keep_every": 4, "keep_checkpoints": 3},
    ],
    ids=["one_save", "averages", "every_checkpoint", "some_checkpoints"],
)
def test_a_run_writes_at_most_what_was_said_and_at_least_half(changes, options, tmp_path):
    trainer = Trainer(parse_config(options(attention_head_dim=32, report_to="none", **changes)))
    said = run_bytes(trainer.model, trainer.total_steps, trainer.config.train)
    sizes, save = [], trainer.save

    def measured_save(stopping):
        save(stopping)
        sizes.append(bytes_in(tmp_path / "run"))

    trainer.save = measured_save
    trainer.train()
    sizes.append(bytes_in(tmp_path / "run"))
    assert max(sizes) < said < 2 * max(sizes)


def test_autoencoder_and_text_encoder_count_as_parts_of_the_pipeline(options):
    config = parse_config(options()).train
    model, vae, text_encoder = tiny_transformer(), tiny_vae_kl(), tiny_text_encoder().half()
    alone = run_bytes(model, 8, config)
    assert run_bytes(model, 8, config, None, None) == alone
    parts = 4 * sum(p.numel() for p in vae.parameters()) + 2 * sum(p.numel() for p in text_encoder.parameters())
    assert run_bytes(model, 8, config, vae, text_encoder) - alone == pytest.approx(1.1 * parts, rel=0.01)


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch):
    """Set how many bytes are free. Stands for the disk; it must be asked about a folder that is there."""

    def fill(free: int):
        def usage(path):
            assert Path(path).is_absolute() and Path(path).exists()
            return Usage(10 * 2**40, 0, free)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return fill


def test_a_full_disk_is_refused_with_both_numbers(disk, tmp_path):
    needed = 5 * 2**30
    disk(needed)
    check_disk(tmp_path / "not" / "yet" / "there", needed)
    disk(needed - 1)
    with pytest.raises(ValueError) as refused:
        check_disk(tmp_path / "run", needed)
    message = str(refused.value)
    assert f"`output_dir` ({tmp_path / 'run'}) needs up to 5.00 GiB more" in message
    assert "its disk has 5.00 GiB free" in message
    for option in ("`keep_checkpoints`", "`ema_snapshots`", "`ema`", "`keep_every`"):
        assert option in message


def test_what_the_run_has_written_is_paid_and_nothing_else(disk, tmp_path):
    disk(500)
    for number, name in enumerate(("checkpoints/step_00000001", "pipeline/transformer", "ema_snapshots")):
        with pytest.raises(ValueError):
            check_disk(tmp_path, 500 + 100 * (number + 1))
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(100))
        check_disk(tmp_path, 500 + 100 * (number + 1))
    # What somebody else keeps in the folder gives no room to the run.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "file").write_bytes(bytes(1000))
    (tmp_path / "backup.tar").write_bytes(bytes(1000))
    with pytest.raises(ValueError):
        check_disk(tmp_path, 801)


def test_a_run_that_does_not_fit_leaves_nothing_behind(disk, options, tmp_path, capsys):
    disk(1000)
    message = refusal(options())
    assert "its disk has 0.00 GiB free" in message and not (tmp_path / "run").exists()
    # A dry run says what would be needed, on any disk.
    refused = capsys.readouterr().out
    Trainer(parse_config([*options(), "--dry_run"]))
    output = next(line for line in refused.splitlines() if line.startswith("output "))
    assert output in capsys.readouterr().out and "at most" in output


def test_gib():
    assert gib(2**30) == "1.00 GiB" and gib(3 * 2**29) == "1.50 GiB" and gib(0) == "0.00 GiB"


# -- steps spread over a run ------------------------------------------------------------------------------------------


def test_spread_steps_are_as_many_as_asked_for_with_the_last_among_them():
    for total in (*range(1, 40), 997, 1000):
        for count in (0, 1, 2, 3, 5, 7, 8, 16, total - 1, total, total + 5):
            steps = [step for step in range(1, total + 1) if is_spread(step, count, total)]
            assert len(steps) == min(count, total)
            assert steps[-1:] == ([total] if count else [])
            gaps = [after - before for before, after in zip([0, *steps], steps, strict=False)]
            assert not gaps or max(gaps) - min(gaps) <= 1
