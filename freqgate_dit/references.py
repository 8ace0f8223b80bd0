"""Features of a reference set, computed once.

A folder of the cache holds them in shards, and `manifest.json`, which says of what they are. Its name is a fingerprint
of the images, their resolution and split, and of the network, so a stale one cannot be taken for a fresh one. A shard
is there whole or not at all, so interrupted work goes on where it stopped; the manifest is written when all are there.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from freqgate_dit.features import CACHE_DIR, Extractor, Images, extract_features
from freqgate_dit.files import cache_folder, make_cache_folder, read_json, replace_file, write_text
from freqgate_dit.metrics import FeatureStatistics


FORMAT = 1
# What interrupted work loses at most.
SHARD_IMAGES = 1024
# Relative to their norm. Devices and batch sizes differ by far less, networks as a rule by far more.
SAME_FEATURES = 0.03


@dataclass(frozen=True)
class ReferenceStatistics:
    """Features of a reference set.

    Args:
        manifest: what they are of: "count", "resolution", "split", "data" (fingerprint of the images), "extractor"
            (`Extractor.describe`), "fingerprint" (of the extractor), "versions".
        shards: the features, each `(n, D)` float32, mapped into memory.
    """

    manifest: dict
    shards: list[torch.Tensor]

    @property
    def count(self) -> int:
        return self.manifest["count"]

    @property
    def features(self) -> torch.Tensor:
        """All features `(count, D)` float32, a copy in memory."""
        return torch.cat(self.shards)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance, from one shard after the other."""
        statistics = FeatureStatistics()
        for shard in self.shards:
            statistics.add(shard)
        return statistics


class ReferenceCache:
    """The features of one reference set by one network, in a folder of `cache_dir/references`.

    The processes of a machine share the work: each calls `extract`, waits until all have, then calls `load`.

    Args:
        images: the reference set, as [`extract_features`] takes it, with a `fingerprint` and a `resolution`.
        extractor: the network.
        split: which part of a data set it is, such as "train" or "heldout".
        cache_dir: folder of the package's caches.

    Raises:
        ValueError: if there is no image.
    """

    def __init__(self, images: Images, extractor: Extractor, split: str, cache_dir: str | Path = CACHE_DIR):
        if len(images) == 0:
            raise ValueError(f"`split` ({split}) holds no image: choose another, or hold out some images.")
        self.images, self.extractor, self.split = images, extractor, split
        identity = [FORMAT, images.fingerprint, images.resolution, split, extractor.fingerprint, SHARD_IMAGES]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        self.folder = cache_folder(cache_dir, "references", key)

    def extract(self, process: int = 0, num_processes: int = 1, batch_size: int = 32) -> None:
        """Compute what is missing or damaged of the shards `process`, `process + num_processes`, ...

        Raises:
            ValueError: if an image cannot be decoded, or the network's features are refused.
            PermissionError: if something is missing and the folder cannot be written to.
        """
        missing = self.missing()
        shards = [shard for shard in missing if shard % num_processes == process]
        if missing:
            make_cache_folder(self.folder)
        quiet = {"disable": True} if process > 0 or not shards else {}  # not False, which would overrule TQDM_DISABLE
        total = sum(len(self._rows(shard)) for shard in shards)
        with tqdm(total=total, desc=f"features of {self.split}", unit="image", **quiet) as progress:
            for shard in shards:
                features = extract_features(self.extractor, self.images, self._rows(shard), batch_size, progress)
                tensors = {"features": features}
                replace_file(_shard(self.folder, shard), lambda path, tensors=tensors: save_file(tensors, path))
        # Whoever is last finds all there. Two that are last at once write the same.
        if (missing or not (self.folder / "manifest.json").is_file()) and not self.missing():
            self._finish()

    def missing(self) -> list[int]:
        """Numbers of the shards that are absent or damaged, by size and header."""
        shards = range(-(-len(self.images) // SHARD_IMAGES))
        return [shard for shard in shards if _shape(_shard(self.folder, shard))[0] != len(self._rows(shard))]

    def load(self) -> ReferenceStatistics:
        """The features of all shards.

        Raises:
            ValueError: if they are of other images or by another network. The first image's features are computed
                again: weights that a function loads by itself may have changed without its file.
        """
        reference = load_reference(self.folder, self.extractor, self.images.resolution, len(self.images))
        cached, fresh = reference.shards[0][0], self.extractor(self.images.images([0]))[0]
        if (fresh - cached).norm() > SAME_FEATURES * cached.norm():
            raise ValueError(
                f"`features` ({self.extractor.name}) has changed since the reference in {self.folder} was made, but "
                "its file has not: delete that folder."
            )
        return reference

    def _rows(self, shard: int) -> range:
        return range(len(self.images))[shard * SHARD_IMAGES : (shard + 1) * SHARD_IMAGES]

    def _finish(self) -> None:
        _, width = _shape(_shard(self.folder, 0))
        manifest = {
            "format": FORMAT,
            "count": len(self.images),
            "resolution": self.images.resolution,
            "split": self.split,
            "data": self.images.fingerprint,
            "extractor": {**self.extractor.describe(), "features_width": width},
            "fingerprint": self.extractor.fingerprint,
            "versions": {name: version(name) for name in ("torch", "Pillow")},
        }
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def reference_statistics(
    images: Images, extractor: Extractor, split: str, cache_dir: str | Path = CACHE_DIR, batch_size: int = 32
) -> ReferenceStatistics:
    """The features of a reference set, from the cache as far as it holds them, in a run of one process.

    Arguments and errors are those of [`ReferenceCache`].
    """
    cache = ReferenceCache(images, extractor, split, cache_dir)
    cache.extract(batch_size=batch_size)
    return cache.load()


def load_reference(
    folder: str | Path, extractor: Extractor, resolution: int, count: int | None = None
) -> ReferenceStatistics:
    """The reference set in a folder that [`ReferenceCache`] has filled, for numbers with `extractor`.

    Args:
        folder: with `manifest.json` and shards, of the cache or a copy.
        extractor: the network that the generated images go through.
        resolution: side of the generated images in pixels.
        count: number of images that the set must have, if that is known.

    Raises:
        ValueError: if the reference is of another network, resolution or count, incomplete or damaged.
    """
    folder = Path(folder).expanduser()
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"the reference in {folder} is incomplete: it has no manifest.json. Compute it again.")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the reference in {folder} has another format than this version's: compute it again.")
    problem = _mismatch(manifest, extractor, resolution, count)
    if problem:
        raise ValueError(f"the reference in {folder} {problem}")
    shards = []
    for shard in range(-(-manifest["count"] // SHARD_IMAGES)):
        rows, width = _shape(_shard(folder, shard))
        expected = min(SHARD_IMAGES, manifest["count"] - shard * SHARD_IMAGES)
        if (rows, width) != (expected, manifest["extractor"]["features_width"]):
            raise ValueError(f"the reference in {folder} is damaged ({_shard(folder, shard).name}): compute it again.")
        shards.append(load_file(_shard(folder, shard))["features"])  # on a CPU mapped, not read
    return ReferenceStatistics(manifest, shards)


def _mismatch(manifest: dict, extractor: Extractor, resolution: int, count: int | None) -> str | None:
    """What is wrong with a reference, and what to do; `None` if nothing is."""
    if manifest["fingerprint"] != extractor.fingerprint:
        theirs, ours = (
            f"{described['features']} in {described['features_precision']}"
            for described in (manifest["extractor"], extractor.describe())
        )
        ours = "with other weights or code" if ours == theirs else ours
        return f"has features by {theirs}, not {ours}: use that network for both, or compute the reference again."
    if manifest["resolution"] != resolution:
        return (
            f"is of {manifest['resolution']} px, but the images have {resolution}: make one from the same data at "
            f"{resolution} px."
        )
    if count not in (None, manifest["count"]):
        return f"is of {manifest['count']} images, not {count}: compute it again from these images."
    return None


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"features_{shard:05d}.safetensors"


def _shape(path: Path) -> tuple[int, int]:
    """Images and width of a shard; zeros if it is absent or damaged."""
    try:
        # Refuses a file that is shorter or longer than its header says.
        with safe_open(path, "pt") as file:
            rows, width = file.get_slice("features").get_shape()
            return rows, width
    except (OSError, SafetensorError):
        return 0, 0
