"""The reference of an evaluation: which images it is, and what is measured of it."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from components import make_pipeline, tiny_transformer, tiny_vae_kl, tiny_vae_tiny
from tiny_runs import photos

from freqgate_dit.metrics import band_power
from freqgate_dit.pipelines.pipeline_freqgate_dit import decode_from_latents, encode_to_latent_moments
from freqgate_dit.summary import read_summary
from freqgate_dit.training import references
from freqgate_dit.training.data import DataConfig, load_images
from freqgate_dit.training.generation import to_uint8
from freqgate_dit.training.references import (
    Reconstructed,
    band_powers,
    halves,
    load_reference,
    reference_spectrum,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of 3 classes, 6 each."""
    return photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def summary(folder, tmp_path):
    """Of a pipeline that was trained on the photos, with the last 2 of each class held out."""

    def build(train_images=12, heldout_images=6, recorded=None, **config):
        pipe = tmp_path / "pipe"
        make_pipeline(tiny_transformer(in_channels=3, sample_size=16)).save_pretrained(pipe)
        config = {"dataset": "photos", "resolution": 16, "heldout_per_class": 2, "horizontal_flip": True, **config}
        (pipe / "training_config.yaml").write_text(yaml.safe_dump({**asdict(DataConfig()), **config}))
        data = {"name": "photos", "hub_id": None, "built_in": False, "license": None, "classes": 3, "resolution": 16}
        data |= {"train_images": train_images, "heldout_images": heldout_images}
        if recorded is not None:
            data["fingerprints"] = [part.fingerprint for part in recorded]
        names = "total_steps global_batch_size images_seen processes".split()
        texts = {"weights": "0.9", "mixed_precision": "no", "device": "cpu", "license": None, "heldout": None}
        training = {"step": 1, **dict.fromkeys(names, 1), **texts, "data": data, "versions": {}}
        (pipe / "training_summary.json").write_text(json.dumps(training))
        return read_summary(pipe)

    return build


def parts(folder, **options):
    return load_images(DataConfig(dataset=str(folder), resolution=16, **options))


# -- which images -----------------------------------------------------------------------------------------------------


def test_data_of_the_pipeline_is_split_as_in_its_training(folder, summary):
    train, heldout = parts(folder, heldout_per_class=2)
    reference = load_reference(str(folder), None, 16, summary())
    assert reference.images.fingerprint == heldout.fingerprint and reference.train.fingerprint == train.fingerprint
    assert (reference.name, reference.hub_id, reference.split, reference.label) == (
        "photos",
        None,
        "heldout",
        "heldout",
    )
    assert reference.class_counts == (2, 2, 2)
    reference = load_reference(str(folder), "train", 16, summary())
    assert reference.images.fingerprint == train.fingerprint and reference.train is None
    assert reference.label == "train" and reference.class_counts == (4, 4, 4)
    # At the resolution of the pipeline, through the same preprocessing.
    assert load_reference(str(folder), None, 8, summary()).images.images([0]).shape == (1, 3, 8, 8)


def test_all_images_are_both_parts_one_after_the_other(folder, summary):
    train, heldout = parts(folder, heldout_per_class=2)
    everything = load_reference(str(folder), "all", 16, summary())
    images = everything.images
    assert len(images) == 18 and everything.class_counts == (6, 6, 6) and everything.label == "all"
    assert torch.equal(images.images(range(18)), torch.cat([train.images(range(12)), heldout.images(range(6))]))
    mixed = [17, 0, 12, 11, 5]
    assert torch.equal(images.images(mixed), images.images(range(18))[mixed])
    assert images.names == train.names + heldout.names
    assert images.labels.tolist() == train.labels.tolist() + heldout.labels.tolist()
    assert images.fingerprint not in (train.fingerprint, heldout.fingerprint)


def test_other_data_of_the_same_name_is_refused(folder, summary):
    with pytest.raises(ValueError, match="12 training and 6 held-out ones, then 13 and 6"):
        load_reference(str(folder), None, 16, summary(train_images=13))
    with pytest.raises(ValueError, match=r"9 training and 9 held-out"):
        load_reference(str(folder), None, 16, summary(heldout_per_class=3))


@pytest.mark.parametrize("resolution", [16, 8])
def test_data_of_the_pipeline_is_known_by_its_content(folder, summary, tmp_path, resolution):
    recorded = summary(recorded=parts(folder, heldout_per_class=2))
    renamed = shutil.copytree(folder, tmp_path / "downloads")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dataset": str(renamed), "heldout_per_class": 2}))
    train, heldout = load_images(DataConfig(dataset=str(folder), resolution=resolution, heldout_per_class=2))
    for given in (renamed, config, folder):
        reference = load_reference(str(given), None, resolution, recorded)
        assert (reference.split, reference.label) == ("heldout", "heldout")
        assert reference.images.fingerprint == heldout.fingerprint
        assert reference.train.fingerprint == train.fingerprint


def test_other_images_are_other_data_and_refused_under_the_same_name(folder, summary, tmp_path):
    recorded = summary(recorded=parts(folder, heldout_per_class=2))
    for name in ("photos", "downloads"):
        other = shutil.copytree(folder, tmp_path / "new" / name)
        shutil.copy(folder / "cat" / "0.png", other / "cat" / "5.png.png")
        (other / "cat" / "5.png").unlink()
    with pytest.raises(ValueError, match=r"`reference` .*photos.* name of the data .* other images"):
        load_reference(str(tmp_path / "new" / "photos"), None, 16, recorded)
    reference = load_reference(str(tmp_path / "new" / "downloads"), None, 16, recorded)
    assert (reference.split, reference.label, len(reference.images)) == ("all", "downloads", 18)


def test_options_that_fit_only_the_data_of_the_pipeline_are_no_hindrance(folder, summary):
    recorded = summary(recorded=parts(folder, heldout_per_class=2))
    assert load_reference("shapes_textures", None, 32, recorded).label == "shapes_textures_heldout"


def test_copies_that_were_held_out_once_do_not_make_the_data_others(folder, summary, tmp_path):
    """A pipeline of an earlier version, which recorded numbers only."""
    data = shutil.copytree(folder, tmp_path / "photos")
    shutil.copy(data / "cat" / "0.png", data / "cat" / "5.png")
    reference = load_reference(str(data), None, 16, summary())
    assert (reference.label, reference.class_counts) == ("heldout", (1, 2, 2))


def test_other_data_is_taken_whole(folder, summary, tmp_path):
    other = photos(tmp_path / "other photos", ("cat", "fox"), count=3)
    for known in (None, summary()):
        reference = load_reference(str(other), None, 16, known)
        assert (reference.split, reference.label, reference.train) == ("all", "other_photos", None)
        assert len(reference.images) == 6 and reference.images.class_names == ("cat", "fox")
        for split in ("heldout", "train"):
            with pytest.raises(ValueError, match=rf"`split` \({split}\) is not known of `reference`"):
                load_reference(str(other), split, 16, known)
    # Without a pipeline nothing is known of its data either.
    assert load_reference(str(folder), None, 16).label == "photos"


def test_a_run_says_which_images_are_held_out(folder, summary, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dataset": str(folder), "heldout_per_class": 1, "horizontal_flip": True}))
    reference = load_reference(str(config), None, 16)
    assert reference.split == "heldout" and reference.class_counts == (1, 1, 1)
    assert (reference.name, reference.label) == ("photos", "photos_heldout")
    assert load_reference(str(config), "train", 16).label == "photos_train"
    # With a pipeline that was trained on the same data the label is as short as there.
    config.write_text(yaml.safe_dump({"dataset": str(folder), "heldout_per_class": 2}))
    assert load_reference(str(config), None, 16, summary()).label == "heldout"


def test_the_built_in_data_has_parts_of_its_own():
    reference = load_reference("shapes_textures", None, 32)
    train, heldout = load_images(DataConfig(resolution=32))
    assert reference.images.fingerprint == heldout.fingerprint and reference.label == "shapes_textures_heldout"
    assert len(reference.train) == len(train) and reference.hub_id is None


def test_what_cannot_be_used_is_refused_by_the_name_of_the_argument(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`reference` \(nowhere\) cannot be used: .*not found"):
        load_reference("nowhere", None, 16)
    broken = photos(tmp_path / "broken", ("cat",), count=3)
    (broken / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"`reference` .*1 of 3 images cannot be read.*cat/1.png"):
        load_reference(str(broken), None, 16)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"dataset": str(folder), "heldout_fraction": 0.0}))
    with pytest.raises(ValueError, match=r"`split` \(heldout\) of `reference` .* holds no image"):
        load_reference(str(config), None, 16)


def test_halves_are_apart_and_have_the_same_classes(folder):
    train, _ = parts(folder, heldout_fraction=0.0)
    first, second = halves(train)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(18))
    assert train.labels[first].bincount().tolist() == train.labels[second].bincount().tolist() == [3, 3, 3]
    again, other = halves(train), halves(train, seed=1)
    assert torch.equal(again[0], first) and not torch.equal(other[0], first)
    without = halves(replace(train, labels=None, class_names=()))
    assert sorted(torch.cat(without).tolist()) == list(range(18))


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", [tiny_vae_kl(), tiny_vae_tiny()], ids=["kl", "tiny"])
def test_reconstructions_are_those_of_the_autoencoder(vae, folder):
    train, _ = parts(folder, heldout_fraction=0.0)
    made = Reconstructed(train, vae, "digest")
    assert (len(made), made.resolution) == (18, 16)
    with torch.no_grad():
        latents, _ = encode_to_latent_moments(vae, train.images([4, 2]).float() / 127.5 - 1)
        expected, _ = to_uint8(decode_from_latents(vae, latents))
    assert torch.equal(made.images([4, 2]), expected)
    fingerprints = {train.fingerprint, made.fingerprint, Reconstructed(train, vae, "other").fingerprint}
    assert len(fingerprints) == 3 and Reconstructed(train, vae, "digest").fingerprint == made.fingerprint


def test_reconstructions_with_nan_are_refused(folder):
    """Rounded to uint8 they would be black."""
    vae = tiny_vae_kl()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="autoencoder of `pipeline` makes NaN or infinity of image 4 of `reference`"):
        Reconstructed(parts(folder, heldout_fraction=0.0)[0], vae, "digest").images([4, 2])


def test_the_spectrum_of_a_reference_is_measured_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "BATCH_SIZE", 5)
    train, _ = parts(folder, heldout_fraction=0.0)
    mean, powers = reference_spectrum(train, tmp_path, "train")
    pixels = train.images(range(18)).float() / 127.5 - 1
    torch.testing.assert_close(mean, pixels.mean(dim=0))
    torch.testing.assert_close(powers, band_power(pixels, mean))
    assert powers.shape == (18, 3, 4)
    torch.testing.assert_close(band_powers(train, mean, [3, 1]), powers[[3, 1]])

    def load(indices):
        raise AssertionError("read again")

    kept = reference_spectrum(replace(train, load=load), tmp_path, "train")
    assert torch.equal(kept[0], mean) and torch.equal(kept[1], powers)
