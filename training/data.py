"""Labelled image sets for training: the built-in set, an image folder, parquet files, or a Hub data set.

[`load_images`] turns a [`DataConfig`] into a training part and a held-out part, both [`LabelledImages`]: lazily
decoded lists of square RGB images. Every image takes the same way (`decoding.decode_image`). Which image is held out
depends on classes and names alone, never on the order in which they were found; but what is byte for byte a training
image is not held out, whatever its name.
"""

import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from freqgate_dit.shapes_textures import MIN_IMAGE_SIZE, ShapesTextures
from freqgate_dit.training.decoding import TRANSFORM, check_image, decode_image
from freqgate_dit.training.image_sources import (
    Index,
    Item,
    Reader,
    is_snapshot,
    open_hub,
    open_parquet,
    scan_folder,
    scan_table,
    some,
)


BUILT_IN = "shapes_textures"
# Such as "train", "training_set", "val2017" and "test-images".
SPLIT_NAMES = re.compile(
    r"(train(ing)?|test(ing)?|val(id(ation)?)?|eval(uation)?)([\W_]*(set|split|data|images?|\d{4}))?", re.IGNORECASE
)
MAX_UNREADABLE = 0.01


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on and which to hold out; every field is a command-line flag.

    Raises:
        ValueError: if a number is out of range.
    """

    _argument_group_name = "data"

    dataset: str = field(
        default=BUILT_IN,
        metadata={
            "help": "'shapes_textures' (built in), an image folder (one class per subfolder, or labels in "
            "metadata.csv, metadata.jsonl or EDM's dataset.json; otherwise unconditional), parquet files (path or "
            "glob ending in .parquet), or a Hub data set ('user/name', or its downloaded folder)."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    image_column: str | None = field(
        default=None, metadata={"help": "Image column of parquet files or a Hub data set; found by its type if unset."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Label column of parquet files, a Hub data set or a folder's metadata.csv; found by type, then by "
            "name, if unset."
        },
    )
    resolution: int = field(
        default=32, metadata={"help": "Image side in pixels: shorter side resized (Lanczos), then centre crop."}
    )
    horizontal_flip: bool = field(
        default=False, metadata={"help": "Train on mirrored images too. Refused for the built-in set."}
    )
    heldout_per_class: int | None = field(
        default=None,
        metadata={"help": "Hold out the last N images of each class, sorted by name. Replaces heldout_fraction."},
    )
    heldout_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Hold out this share of each class (the last, sorted by name), at least one of two or more."
        },
    )
    balance_classes: bool = field(
        default=False, metadata={"help": "Cut the training part of each class to the smallest one's size."}
    )
    world: str = field(default="mod", metadata={"help": "World of the built-in set."})
    num_images: int = field(default=20000, metadata={"help": "Number of training images of the built-in set."})
    data_seed: int = field(default=0, metadata={"help": "Seed of the built-in set."})

    def __post_init__(self):
        for name, least in (("resolution", 1), ("num_images", 1), ("heldout_per_class", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r} must be at least {least}.")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(
                f"heldout_fraction={self.heldout_fraction!r} must be at least 0 and less than 1, such as 0.1."
            )


# Options that only some kinds of data set read: refused elsewhere, because ignoring them would mislead.
_APPLIES_TO = (
    (("hub",), ("dataset_config", "dataset_split", "dataset_revision")),
    (("parquet", "hub"), ("image_column",)),
    (("folder", "parquet", "hub"), ("label_column", "heldout_per_class", "heldout_fraction", "balance_classes")),
    (("built-in",), ("world", "num_images", "data_seed")),
)


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """A lazily decoded list of square RGB images, with labels unless the set is unconditional.

    Args:
        class_names: name of each label; `()` means unconditional.
        labels: int64 tensor `(N,)` with values in `[0, len(class_names))`, or `None` when unconditional.
        names: file name of each image relative to the data set, or its row id.
        fingerprint: hex digest of content, names, classes and transform; equal for equal images wherever they lie.
        resolution: side of every image in pixels.
        load: maps a list of indices in `[0, N)` to a uint8 tensor `(B, 3, resolution, resolution)`.
    """

    class_names: tuple[str, ...]
    labels: torch.LongTensor | None
    names: list[str]
    fingerprint: str
    resolution: int
    load: Callable[[list[int]], torch.Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 `(3, resolution, resolution)`; `IndexError` when out of range, so iteration ends."""
        return self.images([index])[0]

    def images(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Images `indices`, in that order, decoded in threads: uint8 `(B, 3, resolution, resolution)`.

        Raises:
            IndexError: if an index is not in `[-N, N)`.
            ValueError: if an image cannot be decoded.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64).tolist()
        for index in wanted:
            if not -len(self) <= index < len(self):
                raise IndexError(f"index={index} is out of range for {len(self)} images.")
        if not wanted:
            return torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return self.load([index % len(self) for index in wanted])


def load_images(config: DataConfig, cache_dir: str | Path | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Find, check and split the images that `config` names.

    Every file or row is read and decoded once, to fingerprint the content and to find unreadable images: up to 1% are
    left out with a warning, more are an error. Classes without an image, and held-out images that are copies of
    training images, are left out with a warning. The parts are sorted by class, then by name.

    With `cache_dir`, what was readable is remembered there, and files of unchanged size and modification time are not
    read again (a file rewritten with the same size and the same time is not noticed, as with make and git). Rows of
    parquet files and Hub data sets are not read again while `datasets` considers the files unchanged.

    Returns:
        The training part and the held-out part, with the same `class_names`; the latter may be empty.

    Raises:
        ValueError: if the data set is missing, empty, mixed, unreadable or too small for the held-out rule, if its
            classes are named like splits, or if an option does not apply to this kind of data set.
        ImportError: if `datasets` is needed and not installed.
    """
    kind = _kind(config.dataset)
    _refuse_unused_options(config, kind)
    if kind == "built-in":
        return _built_in(config)
    if kind == "folder":
        class_names, items, read = scan_folder(Path(config.dataset).expanduser(), config)
    else:
        rows = open_parquet(config) if kind == "parquet" else open_hub(config)
        class_names, items, read = scan_table(rows, config)
    _refuse_split_names(class_names, config.dataset)
    items = _readable(items, read, config.dataset, Index(read, cache_dir))
    class_names, items = _drop_empty_classes(class_names, items)
    train, heldout = _split(class_names, items, config)
    heldout = _without_copies(train, heldout, config.dataset)
    return tuple(_part(class_names, part, read, config.resolution) for part in (train, heldout))


def describe(train: LabelledImages, heldout: LabelledImages) -> str:
    """What the user should see before training: size, classes, images per class and part, three sample names."""
    size = f"{train.resolution}x{train.resolution} RGB"
    lines = [f"{len(train)} training and {len(heldout)} held-out images, {size}, fingerprint {train.fingerprint[:12]}"]
    if train.class_names:
        counts = [torch.bincount(part.labels, minlength=len(train.class_names)).tolist() for part in (train, heldout)]
        lines.append(f"{len(train.class_names)} classes (training + held-out images):")
        # A thousand classes would push everything else off the screen.
        shown = len(train.class_names) if len(train.class_names) <= 20 else 10
        lines += [f"  {name}: {n} + {m}" for name, n, m in list(zip(train.class_names, *counts))[:shown]]
        if shown < len(train.class_names):
            (low, high), (low_heldout, high_heldout) = [(min(count), max(count)) for count in counts]
            lines.append(
                f"  ... and {len(train.class_names) - shown} more; "
                f"over all classes {low} to {high} + {low_heldout} to {high_heldout}"
            )
    else:
        lines.append("no classes: unconditional")
    samples = sorted({0, len(train) // 2, len(train) - 1})
    lines.append("samples: " + ", ".join(_sample(train, index) for index in samples))
    if len(train) < 2000:
        lines.append(
            "note: with fewer than 2000 training images a model tends to copy them; compare samples with them"
        )
    return "\n".join(lines)


def _decode_items(
    names: list[str], keys: list[str | int], read: Reader, resolution: int, indices: list[int]
) -> torch.Tensor:
    # Filled through NumPy: torch's own threads, started inside ours, would contend for the cores.
    batch = np.empty((len(indices), 3, resolution, resolution), dtype=np.uint8)

    def decode(position: int) -> None:
        index = indices[position]
        try:
            batch[position] = decode_image(read(keys[index]), resolution).numpy()
        except Exception as error:  # Pillow's codecs raise almost anything on broken data
            raise ValueError(
                f"image {names[index]!r} cannot be decoded ({error}); remove or replace it, then start again."
            ) from error

    if len(indices) == 1:  # a pool costs more than one image
        decode(0)
    else:
        list(_in_threads(decode, range(len(indices))))
    return torch.from_numpy(batch)


def _kind(dataset: str) -> str:
    """One of "built-in", "folder", "parquet", "hub"."""
    if dataset == BUILT_IN:
        return "built-in"
    if re.search(r"[\udc80-\udcff]", dataset):  # could be neither printed nor written into the configuration
        raise ValueError(f"dataset={dataset!r} has a byte in its path that is no UTF-8: rename that folder.")
    path = Path(dataset).expanduser()
    if path.is_dir():
        return "hub" if is_snapshot(path) else "folder"
    if path.exists() and path.suffix != ".parquet":
        raise ValueError(f"dataset={dataset!r} is a file but not .parquet: unpack archives and pass the image folder.")
    if dataset.endswith(".parquet") or glob.has_magic(dataset):
        return "parquet"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset):
        return "hub"
    raise ValueError(
        f"dataset={dataset!r} was not found: there is no such folder (current directory: {os.getcwd()}), it does not "
        f"end in .parquet, and it is not a Hub id like 'user/name'. The built-in set is {BUILT_IN!r}."
    )


def _refuse_unused_options(config: DataConfig, kind: str) -> None:
    if kind == "built-in" and config.horizontal_flip:
        raise ValueError(
            f"horizontal_flip=True cannot be used with dataset={BUILT_IN!r}: mirroring a texture changes its class."
        )
    defaults = DataConfig()
    for name in (name for kinds, names in _APPLIES_TO if kind not in kinds for name in names):
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no effect on dataset={config.dataset!r} ({kind}): leave "
                "it out. (Another split of a folder or of parquet files is another path.)"
            )


def _built_in(config: DataConfig) -> tuple[LabelledImages, LabelledImages]:
    if config.resolution < MIN_IMAGE_SIZE:
        raise ValueError(
            f"resolution={config.resolution!r} is too small for dataset={BUILT_IN!r}: use {MIN_IMAGE_SIZE} or more."
        )
    parts = []
    for split, count in (("train", config.num_images), ("validation", max(512, config.num_images // 20))):
        source = ShapesTextures(
            count, image_size=config.resolution, world=config.world, split=split, seed=config.data_seed
        )
        labels = torch.as_tensor(source.labels(range(count)), dtype=torch.int64)
        # A few rendered images stand for the generator's code: a cache must not outlive a change of it.
        probe = hashlib.sha256(source.images(range(min(4, count))).numpy().tobytes() + labels.numpy().tobytes())
        identity = [BUILT_IN, config.world, split, count, config.data_seed, config.resolution, probe.hexdigest()]
        names = [f"{split}-{index:07d}" for index in range(count)]
        class_names = tuple(source.class_names)
        parts.append(LabelledImages(class_names, labels, names, _digest(identity), config.resolution, source.images))
    return tuple(parts)


def _refuse_split_names(class_names: tuple[str, ...], dataset: str) -> None:
    splits = [name for name in class_names if SPLIT_NAMES.fullmatch(name)]
    if splits:
        raise ValueError(
            f"dataset={dataset!r} has classes named like splits: {splits}. Pass the folder (or files) of one split, "
            f"such as {os.path.join(dataset, splits[0])!r}; rename the class if it really is one."
        )


def _readable(items: list[Item], read: Reader, dataset: str, index: Index) -> list[Item]:
    """Fill in the digests and leave out, with a warning, what cannot be read; read what is not in `index`."""

    def inspect(item: Item) -> tuple[Item, list[int] | None, str | None]:
        stamp = read.stamp(item.key)  # before reading, so that a change on the way is found next time
        try:
            digest = index.find(item.key, stamp) or _checked_digest(read(item.key))
        except UnidentifiedImageError:  # its message is the address of a buffer
            return item, None, f"{item.name} (not an image that Pillow knows)"
        except Exception as error:  # noqa: BLE001 - Pillow's codecs raise almost anything on broken data
            return item, None, f"{item.name} ({type(error).__name__}: {error})"
        return item._replace(digest=digest), stamp, None

    good, bad, entries = [], [], {}
    quiet = {"disable": True} if len(items) <= 2000 else {}  # not False, which would overrule TQDM_DISABLE
    checked = tqdm(_in_threads(inspect, items), "checking images", len(items), **quiet)
    for item, stamp, problem in checked:
        good.append(item) if problem is None else bad.append(problem)
        if stamp is not None:
            entries[str(item.key)] = [*stamp, item.digest]
    index.replace(entries)
    if len(bad) > MAX_UNREADABLE * len(items):
        raise ValueError(
            f"dataset={dataset!r}: {len(bad)} of {len(items)} images cannot be read, more than {MAX_UNREADABLE:.0%}. "
            f"Remove or replace them: {some(bad, 5)}"
        )
    if bad:
        warnings.warn(
            f"dataset={dataset!r}: {len(bad)} of {len(items)} images cannot be read and are left out: {some(bad, 20)}"
        )
    return good


def _checked_digest(data: bytes) -> str:
    check_image(data)
    return hashlib.sha256(data).hexdigest()


def _drop_empty_classes(class_names: tuple[str, ...], items: list[Item]) -> tuple[tuple[str, ...], list[Item]]:
    used = sorted({item.label for item in items})
    if not class_names or len(used) == len(class_names):
        return class_names, items
    empty = [name for label, name in enumerate(class_names) if label not in set(used)]
    warnings.warn(f"{len(empty)} classes have no image and are left out: {some(empty, 20)}")
    new = {label: index for index, label in enumerate(used)}
    return tuple(class_names[label] for label in used), [item._replace(label=new[item.label]) for item in items]


def _split(class_names: tuple[str, ...], items: list[Item], config: DataConfig) -> tuple[list[Item], list[Item]]:
    """The source's rule: per class, sorted by name, the last ones are held out."""
    items = sorted(items, key=lambda item: (item.label, item.name, item.key))
    train, heldout = [], []
    for label, group in groupby(items, key=lambda item: item.label):
        group = list(group)
        count = config.heldout_per_class
        if count is None:
            count = round(len(group) * config.heldout_fraction)
            if config.heldout_fraction > 0:
                count = min(max(count, 1), len(group) - 1)
        if count >= len(group):
            who = f"class {class_names[label]!r}" if class_names else "the data set"
            raise ValueError(
                f"heldout_per_class={count} leaves {who} ({len(group)} images) no training image: pass less than "
                f"{len(group)}, or leave it out to hold out heldout_fraction={config.heldout_fraction}."
            )
        train.append(group[: len(group) - count])
        heldout.append(group[len(group) - count :])
    if config.balance_classes:
        smallest = min(len(group) for group in train)
        train = [group[:smallest] for group in train]
    return [item for group in train for item in group], [item for group in heldout for item in group]


def _without_copies(train: list[Item], heldout: list[Item], dataset: str) -> list[Item]:
    """The held-out images whose bytes are not those of a training image; tells of the others, and of all that are in
    two classes. What is trained on does not depend on it."""
    classes: dict[str, set[int]] = {}
    for item in [*train, *heldout]:
        classes.setdefault(item.digest, set()).add(item.label)
    twice = [item.name for item in [*train, *heldout] if len(classes[item.digest]) > 1]
    if twice:
        warnings.warn(
            f"dataset={dataset!r}: {len(twice)} images are, byte for byte, in two classes or more; keep each in one: "
            f"{some(twice, 5)}"
        )
    trained = {item.digest for item in train}
    copies = [item.name for item in heldout if item.digest in trained]
    if copies:
        warnings.warn(
            f"dataset={dataset!r}: {len(copies)} of {len(heldout)} held-out images are, byte for byte, training ones "
            f"and left out: {some(copies, 5)}"
        )
    return [item for item in heldout if item.digest not in trained]


def _part(class_names: tuple[str, ...], items: list[Item], read: Reader, resolution: int) -> LabelledImages:
    names, labels, keys, digests = ([getattr(item, name) for item in items] for name in Item._fields)
    fingerprint = _digest([TRANSFORM, resolution, class_names, names, labels, digests])
    labels = torch.tensor(labels, dtype=torch.int64) if class_names else None
    # Without the items, whose digests would stay in memory.
    load = partial(_decode_items, names, keys, read, resolution)
    return LabelledImages(class_names, labels, names, fingerprint, resolution, load)


def _digest(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _in_threads(function: Callable, values: Sequence) -> Iterator:
    """`map` in order over threads (file reads, hashes and codecs release the GIL)."""
    # A task of a pool costs as much as reading a small file: long lists go in groups.
    size = 64 if len(values) > 4096 else 1
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        # In blocks, because `pool.map` queues everything at once.
        for start in range(0, len(values), 4096):
            block = values[start : start + 4096]
            groups = [block[first : first + size] for first in range(0, len(block), size)]
            for results in pool.map(lambda group: [function(value) for value in group], groups):
                yield from results


def _sample(part: LabelledImages, index: int) -> str:
    return part.names[index] + (f" ({part.class_names[part.labels[index]]})" if part.class_names else "")
