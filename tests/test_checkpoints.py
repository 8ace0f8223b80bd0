"""Checkpoints: complete or not counted."""

import shutil

import pytest
import torch
from components import assert_same_tensors, tiny_transformer

from freqgate_dit.training.checkpoints import (
    MANIFEST,
    Checkpoint,
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
    shutil.copytree(path, tmp_path / "step_00000002.tmp")
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


def test_flipped_bit_is_found_by_its_checksum(tmp_path):
    (path,) = save(tmp_path, 1)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert why_incomplete(path) is None
    with pytest.raises(ValueError, match="step_00000001/model.safetensors is damaged"):
        load_checkpoint(path, "cpu")


def test_nothing_to_resume_from(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="no complete checkpoint: start without `--resume`"):
            find_checkpoint("latest", folder)
    with pytest.raises(ValueError, match="`resume` .*nowhere.* is not a folder"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder)]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    save(tmp_path, 9, 10, 100, 1000, keep=3)
    assert steps_in(tmp_path) == [10, 100, 1000]
    assert find_checkpoint("latest", tmp_path).name == "step_00001000"


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
