"""Reference data for an evaluation: real images through the preprocessing of training, and what they look like.

[`load_reference`] finds the part of a data set that generated images are compared with; [`band_powers`] and
[`reference_spectrum`] measure how much power it has at which spatial frequency.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from freqgate_dit.features import Images
from freqgate_dit.files import replace_file
from freqgate_dit.metrics import band_power
from freqgate_dit.pipelines.pipeline_freqgate_dit import (
    broken_images,
    decode_from_latents,
    encode_to_latent_moments,
)
from freqgate_dit.summary import PipelineSummary
from freqgate_dit.training.config import is_local, load_yaml
from freqgate_dit.training.data import BUILT_IN, DataConfig, LabelledImages, load_images
from freqgate_dit.training.generation import to_uint8


SPLITS = ("heldout", "train", "all")
BATCH_SIZE = 64


# -- which images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Real images that others are compared with.

    Args:
        name: of the data set: last name of a path, or Hub id.
        hub_id: the same if it is one, otherwise `None`.
        split: "heldout", "train" or "all".
        label: what stands for name and split in the name of a metric.
        images: the reference.
        train: the training part, where `images` is the held-out one; otherwise `None`.
    """

    name: str
    hub_id: str | None
    split: str
    label: str
    images: LabelledImages
    train: LabelledImages | None

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each of `images.class_names`."""
        if not self.images.class_names:
            return ()
        return tuple(torch.bincount(self.images.labels, minlength=len(self.images.class_names)).tolist())


def load_reference(
    reference: str,
    split: str | None,
    resolution: int,
    summary: PipelineSummary | None = None,
    cache_dir: str | Path | None = None,
) -> Reference:
    """The part `split` of a data set, at `resolution` px.

    Args:
        reference: what `dataset` of the trainer takes; or the YAML file of a run, whose data is taken.
        split: "heldout", "train" or "all". Which images are held out is known of the data that the pipeline was
            trained on (by content, wherever they lie now), of the data of a YAML file, and of the built-in data: there
            it is "heldout" by default, elsewhere "all".
        summary: of the pipeline, if there is one.
        cache_dir: where the index of the images is kept.

    Raises:
        ValueError: if the data cannot be had, is not what the pipeline was trained on, or has no such part.
    """
    try:
        config, has_parts, is_own = _data_config(reference, resolution, summary, cache_dir)
        train, heldout = load_images(config, cache_dir)
    except ValueError as error:
        raise ValueError(f"`reference` ({reference}) cannot be used: {error}") from error
    split = split or ("heldout" if has_parts else "all")
    if split != "all" and not has_parts:
        raise ValueError(
            f"`split` ({split}) is not known of `reference` ({reference}): name the data that the pipeline was "
            "trained on, or the YAML file of a run with it, or take all."
        )
    images = {"heldout": heldout, "train": train, "all": _joined(train, heldout)}[split]
    if not len(images):
        raise ValueError(f"`split` ({split}) of `reference` ({reference}) holds no image: choose another.")
    name = short_name(config.dataset)
    label = split if is_own else "_".join([_slug(name), split] if split != "all" else [_slug(name)])
    hub_id = None if config.dataset == BUILT_IN or _is_path(config.dataset) else name
    return Reference(name, hub_id, split, label, images, train if split == "heldout" else None)


def _data_config(
    reference: str, resolution: int, summary: PipelineSummary | None, cache_dir: str | Path | None
) -> tuple[DataConfig, bool, bool]:
    """How to read the data, whether it is known which images are held out, and whether it is the pipeline's own."""
    if reference.endswith((".yaml", ".yml")):
        config = _from_values(load_yaml(Path(reference).expanduser()), resolution)
        return config, True, _is_trained_on(config, summary, cache_dir)
    if summary is not None and summary.training_config is not None:
        own = replace(_from_values(summary.training_config, resolution), dataset=reference)
        if _is_trained_on(own, summary, cache_dir):
            return own, True, True
    if reference == BUILT_IN:
        return DataConfig(resolution=resolution), True, False
    return DataConfig(dataset=reference, resolution=resolution, heldout_fraction=0.0), False, False


def _from_values(values: dict, resolution: int) -> DataConfig:
    """The data of a run, without what only its training needs."""
    given = {knob.name: values[knob.name] for knob in fields(DataConfig) if knob.name in values}
    return DataConfig(**{**given, "resolution": resolution, "horizontal_flip": False})


def _is_trained_on(config: DataConfig, summary: PipelineSummary | None, cache_dir: str | Path | None) -> bool:
    """Whether data and their split are those that a pipeline was trained on: by content, or, where an earlier version
    has not recorded that, by the name (a path's last, or the Hub id) and the numbers of images.

    Raises:
        ValueError: if the data have the name, and are not.
    """
    if summary is None or summary.training_config is None:
        return False
    has_name = short_name(config.dataset) == short_name(summary.training_config["dataset"])
    known = summary.training and summary.training["data"]
    if not known or not (has_name or "fingerprints" in known):
        return has_name
    try:
        parts = load_images(replace(config, resolution=known["resolution"]), cache_dir)
    except ValueError:  # such as an option of the training that other data have not
        if has_name:
            raise
        return False
    train, heldout = map(len, parts)
    if "fingerprints" in known:
        is_own = [part.fingerprint for part in parts] == known["fingerprints"]
    else:  # that version also held out copies of training images
        is_own = train == known["train_images"] and heldout <= known["heldout_images"]
    if has_name and not is_own:
        raise ValueError(
            f"it has the name of the data that the pipeline was trained on, but other images ({train} training and "
            f"{heldout} held-out ones, then {known['train_images']} and {known['heldout_images']}): name that data, "
            "or give this one another name."
        )
    return is_own


def _joined(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    """The images of both, one set after the other."""

    def load(indices: list[int]) -> torch.Tensor:
        batch = torch.empty(len(indices), 3, first.resolution, first.resolution, dtype=torch.uint8)
        for part, offset in ((first, 0), (second, len(first))):
            places = [place for place, index in enumerate(indices) if 0 <= index - offset < len(part)]
            batch[places] = part.images([indices[place] - offset for place in places])
        return batch

    return replace(
        first,
        labels=torch.cat([first.labels, second.labels]) if first.class_names else None,
        names=first.names + second.names,
        fingerprint=_digest(["joined", first.fingerprint, second.fingerprint]),
        load=load,
    )


def short_name(dataset: str) -> str:
    """What is said of a data set elsewhere: the last name of a path; a Hub id, and the built-in set, as they are."""
    return Path(dataset).name if _is_path(dataset) else dataset


def _is_path(dataset: str) -> bool:
    return dataset != BUILT_IN and (is_local(dataset) or dataset.endswith(".parquet"))


def _slug(name: str) -> str:
    """Letters, digits, and underscores in place of all else: "afhq_cat128_heldout.parquet" loses its suffix too."""
    return re.sub(r"\W+", "_", re.sub(r"\.(parquet|ya?ml)$", "", name)).strip("_")


def _digest(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def halves(images: LabelledImages, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the images in each of two random halves, with the same classes up to one image; int64, ascending."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    if images.labels is not None:
        order = order[images.labels[order].sort(stable=True).indices]
    return order[0::2].sort().values, order[1::2].sort().values


class Reconstructed:
    """A set of images after an autoencoder: the best that a model on its latents can make of them.

    Args:
        images: the set.
        vae: the autoencoder.
        weights: digest of its weights.
    """

    def __init__(self, images: Images, vae, weights: str):
        self.source, self.vae, self.resolution = images, vae, images.resolution
        self.fingerprint = _digest(["reconstructed", images.fingerprint, weights])

    def __len__(self) -> int:
        return len(self.source)

    @torch.no_grad()
    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Images `indices`, in that order: uint8 `(B, 3, resolution, resolution)`.

        Raises:
            ValueError: if one has NaN or infinity in it.
        """
        pixels = self.source.images(indices).to(self.vae.device).float() / 127.5 - 1
        mean, _ = encode_to_latent_moments(self.vae, pixels)
        made = decode_from_latents(self.vae, mean)
        broken = broken_images(made)
        if broken:
            raise ValueError(
                f"the autoencoder of `pipeline` makes NaN or infinity of image {indices[broken[0]]} of `reference`: "
                "its weights are damaged, or too large for their number type."
            )
        return to_uint8(made)[0]


# -- power spectra ----------------------------------------------------------------------------------------------------


def band_powers(images: Images, mean: torch.Tensor, indices: Sequence[int] | None = None, label: str = "images"):
    """Power of each image per channel and octave of frequency, `(N, 3, bands)` float64 (`metrics.band_power`).

    Args:
        images: the set; of it those with numbers `indices`, by default all.
        mean: `(3, H, W)` image to subtract, in [-1, 1].
    """
    return torch.cat([band_power(batch, mean) for batch in _batches(images, indices, f"spectrum of {label}")])


def reference_spectrum(images: Images, folder: Path, label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean image `(3, H, W)` float32 in [-1, 1] of a reference set, and its `band_powers` around that.

    They are kept in `folder`, that of the features of the same images (`ReferenceCache.folder`).
    """
    path = folder / "spectrum.safetensors"
    if path.is_file():
        tensors = load_file(path)
    else:
        total = sum(batch.double().sum(dim=0) for batch in _batches(images, None, f"mean image of {label}"))
        mean = (total / len(images)).float()
        tensors = {"mean": mean, "powers": band_powers(images, mean, label=label)}
        with contextlib.suppress(OSError):  # a cache that may only be read
            replace_file(path, lambda temporary: save_file(tensors, temporary))
    return tensors["mean"], tensors["powers"]


def _batches(images: Images, indices: Sequence[int] | None, label: str):
    """The images as float32 `(B, 3, H, W)` in [-1, 1]."""
    indices = range(len(images)) if indices is None else indices
    with tqdm(total=len(indices), desc=label, unit="image") as progress:
        for start in range(0, len(indices), BATCH_SIZE):
            yield images.images(indices[start : start + BATCH_SIZE]).float() / 127.5 - 1
            progress.update(min(BATCH_SIZE, len(indices) - start))
