"""The judge of the built-in data: trained once, then kept."""

import pytest
import torch

from freqgate_dit.training import factor_classifier, judges
from freqgate_dit.training.judges import factor_judge


@pytest.fixture
def trained(monkeypatch):
    """The worlds of which a judge was trained, of one batch each."""
    monkeypatch.setattr(factor_classifier, "TEST_IMAGES", 128)
    worlds = []
    train = judges.train_factor_classifier

    def train_quickly(world, image_size):
        worlds.append(world)
        return train(world, image_size, num_images=128)

    monkeypatch.setattr(judges, "train_factor_classifier", train_quickly)
    return worlds


def test_a_judge_is_trained_once_for_each_world_and_image_size(tmp_path, trained):
    images = torch.randn(4, 3, 32, 32)
    judge, accuracy = factor_judge("add", 32, tmp_path)
    kept, kept_accuracy = factor_judge("add", 32, tmp_path)
    assert trained == ["add"] and not judge.training and not kept.training
    assert judge.world == kept.world == "add"
    assert accuracy.keys() == {"structure", "texture"} and kept_accuracy == accuracy
    assert all(torch.equal(one, other) for one, other in zip(judge(images), kept(images), strict=True))
    factor_judge("mod", 32, tmp_path)
    factor_judge("add", 48, tmp_path)
    assert trained == ["add", "mod", "add"] and len(list((tmp_path / "judges").iterdir())) == 3


def test_a_judge_of_other_code_or_a_damaged_file_is_trained_again(tmp_path, trained, monkeypatch):
    factor_judge("add", 32, tmp_path)
    [path] = (tmp_path / "judges").iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        factor_judge("add", 32, tmp_path)
        assert len(path.read_bytes()) == len(whole)
    assert len(trained) == 3
    monkeypatch.setattr(judges, "factor_classifier", judges)  # another source
    factor_judge("add", 32, tmp_path)
    assert len(trained) == 4 and len(list((tmp_path / "judges").iterdir())) == 2


def test_a_place_that_cannot_be_written_to_is_refused_before_the_training(tmp_path, trained):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        factor_judge("add", 32, tmp_path / "file")
    assert not trained
