"""The judges of the built-in data: trained once, then kept."""

import pytest
import torch

from freqgate_dit.training import information, judges
from freqgate_dit.training.judges import factor_judge, noise_judge


@pytest.fixture
def trained(monkeypatch):
    """What was trained, of one batch each."""
    names = []
    for name in ("train_factor_classifier", "train_noise_classifier"):

        def train(world, image_size, name=name, function=getattr(judges, name)):
            names.append(name)
            return function(world, image_size, num_images=128)

        monkeypatch.setattr(judges, name, train)
    return names


def test_a_judge_is_trained_once_for_each_world_and_image_size(tmp_path, trained):
    images = torch.randn(4, 3, 32, 32)
    judge, accuracy = factor_judge("add", 32, tmp_path)
    kept, kept_accuracy = factor_judge("add", 32, tmp_path)
    assert trained == ["train_factor_classifier"] and not kept.training
    assert judge.world == kept.world == "add"
    assert accuracy.keys() == {"structure", "texture"} and kept_accuracy == accuracy
    assert all(torch.equal(one, other) for one, other in zip(judge(images), kept(images), strict=True))
    of_noise = noise_judge("add", 32, tmp_path)
    assert torch.equal(of_noise(images), noise_judge("add", 32, tmp_path)(images)) and len(trained) == 2
    factor_judge("mod", 32, tmp_path)
    factor_judge("add", 48, tmp_path)
    assert len(trained) == 4
    assert len(list((tmp_path / "judges").iterdir())) == 4


def test_a_judge_of_other_code_or_a_damaged_file_is_trained_again(tmp_path, trained, monkeypatch):
    noise_judge("add", 32, tmp_path)
    [path] = (tmp_path / "judges").iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        noise_judge("add", 32, tmp_path)
        assert len(path.read_bytes()) == len(whole)
    assert len(trained) == 3
    monkeypatch.setattr(judges, "information", information.plots)  # another source
    noise_judge("add", 32, tmp_path)
    assert len(trained) == 4 and len(list((tmp_path / "judges").iterdir())) == 2


def test_a_place_that_cannot_be_written_to_is_refused_before_the_training(tmp_path, trained):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        noise_judge("add", 32, tmp_path / "file")
    assert not trained
