"""Checkpoints: complete or not counted."""

import os
import shutil

import pytest
import torch
from components import assert_same_tensors, tiny_transformer

from freqgate_dit.training.checkpoints import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    why_incomplete,
)


def checkpoint(step, value=0.0):
    return Checkpoint({"model": {"w": torch.full((3, 2), value)}, "ema": {"w": torch.ones(2)}}, {"step": step})


def save(folder, *steps, keep=10):
    return [checkpoint(step).save(folder, keep) for step in steps]


def test_checkpoint_round_trip(tmp_path):
    tensors = {"model": {"a.b": torch.randn(3, 4), "c": torch.arange(3)}, "ema": {"a.b": torch.randn(4, 3).T}}
    path = Checkpoint(tensors, {"step": 12, "config": {"vae": None, "lr": 1e-4}}).save(tmp_path, keep=1)
    assert path == tmp_path / "step_00000012" and why_incomplete(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]
    loaded = load_checkpoint(path, "cpu")
    assert loaded.state == {"step": 12, "config": {"vae": None, "lr": 1e-4}}
    assert loaded.tensors.keys() == tensors.keys()
    for name, group in tensors.items():
        assert_same_tensors(loaded.tensors[name], group)


def test_folder_that_is_being_written_is_never_taken(tmp_path):
    (path,) = save(tmp_path, 1)
    # All of its files are there already, but it has not got its name yet.
    shutil.copytree(path, tmp_path / "step_00000002.0a1b2c3d.tmp")
    assert checkpoint_folders(tmp_path) == complete_checkpoints(tmp_path) == [path]
    assert find_checkpoint("latest", tmp_path) == path
    # A later run of the same step replaces it.
    save(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def damage_checkpoint(path, how):
    if how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "half a manifest":
        (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])
    elif how == "no file":
        (path / "ema.safetensors").unlink()
    elif how == "short file":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


DAMAGE = {
    "no manifest": ("no manifest.json",),
    "half a manifest": ("damaged manifest.json",),
    "no file": ("lacks ema.safetensors",),
    "short file": ("model.safetensors", "bytes instead of"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_incomplete_checkpoints_are_named_and_skipped(tmp_path, capsys, how):
    good, bad = save(tmp_path, 1, 2)
    damage_checkpoint(bad, how)
    assert complete_checkpoints(tmp_path) == [good]
    assert find_checkpoint("latest", tmp_path) == good
    printed = capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        find_checkpoint(str(bad), tmp_path)
    for word in DAMAGE[how]:
        assert word in why_incomplete(bad) and word in printed and word in str(error.value)
    assert bad.name in printed and str(bad) in str(error.value) and good.name in str(error.value)
    assert "`resume`" in str(error.value) and "--resume latest" in str(error.value)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_falls_back_by_name_to_the_checkpoint_before(tmp_path, name):
    good, bad = save(tmp_path, 1, 2)
    flip_a_bit(bad / name)
    told = []
    assert find_checkpoint("latest", tmp_path, told.append) == good
    assert len(told) == 1 and bad.name in told[0] and name in told[0]
    with pytest.raises(ValueError, match=rf"`resume` \(.*{bad.name}\) has a damaged {name}.*{good.name}"):
        find_checkpoint(str(bad), tmp_path)
    flip_a_bit(good / name)
    with pytest.raises(ValueError, match=rf"no complete checkpoint; the oldest, {good.name}, has a damaged {name}"):
        find_checkpoint("auto", tmp_path, told.append)


@pytest.mark.parametrize("manifest", ["[1]", "{}", '{"a": 1}', '{"a": {"bytes": 0}}'])
def test_another_programs_folders_are_neither_taken_nor_deleted(tmp_path, manifest):
    others = [tmp_path / f"step_{step:08d}" for step in (1, 9)]
    for folder in others:
        folder.mkdir()
        (folder / "a").touch()
        (folder / "manifest.json").write_text(manifest)
    save(tmp_path, 2, 3, 4, keep=1)
    assert steps_in(tmp_path) == [4] and all((folder / "a").exists() for folder in others)


def test_nothing_to_resume_from(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="has no checkpoint yet: `--resume auto` starts at step 0"):
            find_checkpoint("latest", folder)
        assert find_checkpoint("auto", folder) is None
    with pytest.raises(ValueError, match="`resume` .*nowhere.* is not a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder)]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    save(tmp_path, 9, 10, 100, 1000, keep=3)
    assert steps_in(tmp_path) == [10, 100, 1000]
    assert find_checkpoint("latest", tmp_path).name == "step_00001000"


def test_rotation_keeps_every_multiple(tmp_path):
    for step in range(1, 11):
        checkpoint(step).save(tmp_path, keep=2, keep_every=4)
    assert steps_in(tmp_path) == [4, 8, 9, 10]
    # Beyond the step that a run was resumed at, multiples go as well.
    checkpoint(7).save(tmp_path, keep=1, keep_every=4)
    assert steps_in(tmp_path) == [4, 7]


def test_rotation_takes_the_name_before_it_deletes(tmp_path, monkeypatch):
    """A run killed while it deletes an old checkpoint leaves nothing that looks like one."""
    save(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
    save(tmp_path, 3, keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000002", "step_00000003"]
    monkeypatch.undo()
    save(tmp_path, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_rotation_does_not_count_incomplete_checkpoints(tmp_path):
    first, second = save(tmp_path, 1, 2)
    damage_checkpoint(second, "no manifest")
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == [1, 3]


def test_rotation_after_resuming_from_an_earlier_checkpoint(tmp_path):
    save(tmp_path, 1000, 2000, 3000)
    # Resumed at 1000: what lies beyond is another course of the run, and not what "latest" should mean.
    save(tmp_path, 1500, keep=2)
    assert steps_in(tmp_path) == [1000, 1500]


def test_same_step_is_replaced(tmp_path):
    checkpoint(5, value=1.0).save(tmp_path, keep=2)
    path = checkpoint(5, value=2.0).save(tmp_path, keep=2)
    assert torch.equal(load_checkpoint(path, "cpu").tensors["model"]["w"], torch.full((3, 2), 2.0))


# -- what a killed or failing save leaves ---------------------------------------------------------------------------


def value_in(path):
    return load_checkpoint(path, "cpu").tensors["model"]["w"][0, 0].item()


def test_leftovers_of_killed_saves_are_cleared(tmp_path):
    (path,) = save(tmp_path, 1)
    for name in ("step_00000002.0a1b2c3d.tmp", "step_00000003.0a1b2c3d.tmp", "step_00000001.0a1b2c3d.replaced"):
        shutil.copytree(path, tmp_path / name)
    for name in ("step_00000002.tmp", "step_by_step.tmp"):  # not ours
        (tmp_path / name).mkdir()
    save(tmp_path, 4)
    names = ["step_00000001", "step_00000002.tmp", "step_00000004", "step_by_step.tmp"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize("then", [lambda folder: find_checkpoint("latest", folder), lambda folder: save(folder, 6)])
def test_a_replacement_killed_between_its_renames_is_undone(tmp_path, then):
    path = checkpoint(5, value=1.0).save(tmp_path, keep=2)
    replaced = path.rename(tmp_path / "step_00000005.0a1b2c3d.replaced")
    shutil.copytree(replaced, tmp_path / "step_00000005.0a1b2c3d.tmp")
    then(tmp_path)
    assert value_in(path) == 1.0 and not replaced.exists()


def unwritable(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["fsync", "second rename"])
@pytest.mark.parametrize("step", [2, 3])
def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch, fails, step):
    first, second = save(tmp_path, 1, 2)
    rename = os.replace
    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", unwritable)
    else:
        to_name = f"step_{step:08d}"
        monkeypatch.setattr(
            os,
            "replace",
            lambda one, other: unwritable() if one.suffix == ".tmp" and other.name == to_name else rename(one, other),
        )
    with pytest.raises(CheckpointError) as error:
        checkpoint(step, value=9.0).save(tmp_path, keep=1)
    message = str(error.value)
    assert f"step_{step:08d} could not be written" in message and "No space left" in message
    assert "untouched: ['step_00000001', 'step_00000002']" in message and str(tmp_path) not in message
    assert sorted(tmp_path.iterdir()) == [first, second] and value_in(first) == value_in(second) == 0.0
    monkeypatch.undo()
    assert value_in(checkpoint(step, value=9.0).save(tmp_path, keep=1)) == 9.0
    assert steps_in(tmp_path) == [step]


def test_only_folders_with_a_step_for_a_name_are_checkpoints(tmp_path):
    (path,) = save(tmp_path, 7)
    for name in ("step_7", "step_00000008_backup", "old_step_00000009", "step_0000000x"):
        shutil.copytree(path, tmp_path / name)
    assert checkpoint_folders(tmp_path) == [path]
    # One that was copied to a name of its own can be asked for.
    assert find_checkpoint(str(tmp_path / "step_7"), tmp_path) == tmp_path / "step_7"
    (tmp_path / "step_00000010").write_text("a file")
    assert find_checkpoint("latest", tmp_path) == path


def test_a_cpu_with_a_number_is_a_cpu(tmp_path):
    """Among several CPU processes the device of each is "cpu:0", which safetensors does not know."""
    (path,) = save(tmp_path, 1)
    assert load_checkpoint(path, torch.device("cpu:0")).tensors["model"]["w"].device.type == "cpu"


def descend(model, optimizer, seed):
    torch.manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8)
    model(sample, torch.tensor([3.0, 500.0]), class_labels=torch.tensor([0, 2])).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def test_optimizer_state_round_trip_is_exact(tmp_path):
    model = tiny_transformer("freq_gate")
    optimizer = adamw(model)
    for seed in range(3):
        descend(model, optimizer, seed)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
    loaded = load_checkpoint(Checkpoint(tensors, {"step": 3}).save(tmp_path, keep=1), "cpu")
    other = tiny_transformer("freq_gate", seed=1)
    other.load_state_dict(loaded.tensors["model"])
    other_optimizer = adamw(other)
    load_optimizer_tensors(other_optimizer, other, loaded.tensors["optimizer"])
    for seed in range(3, 6):
        descend(model, optimizer, seed)
        descend(other, other_optimizer, seed)
    assert_same_tensors(model.state_dict(), other.state_dict())
    assert_same_tensors(optimizer_tensors(optimizer, model), optimizer_tensors(other_optimizer, other))
