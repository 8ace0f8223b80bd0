"""Encoded once, used by every run: the training data as latents (or pixels), cached on disk in shards.

A cache folder is named by a fingerprint of the images, their transform, the views and the autoencoder's weights, so a
stale one cannot be taken for a fresh one. A shard is there whole or not at all, so an interrupted encoding goes on
where it stopped; `manifest.json` is written when all are there. Shards are mapped into memory, not read: the processes
of a machine share one copy, and data larger than memory works.
"""

import contextlib
import hashlib
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from freqgate_dit.files import cache_folder, make_cache_folder, replace_file
from freqgate_dit.pipelines.pipeline_freqgate_dit import broken_images, encode_to_latent_moments, vae_scale_factor
from freqgate_dit.spectral import SpectrumStatistics
from freqgate_dit.training.config import LatentConfig
from freqgate_dit.training.data import LabelledImages


FORMAT = 2
# What an interrupted encoding loses at most, and holds in memory.
MAX_SHARD_IMAGES, MAX_SHARD_BYTES = 1024, 2**28
GIB = 2**30


class MappedRows:
    """Tensors on the host, as a rule files mapped into memory, as if they were one `(N, views, C, H, W)`.

    `rows[indices, view]`, two tensors `(B,)`, is a new tensor `(B, C, H, W)` on `device`.

    Args:
        shards: each `(n, views, C, H, W)`, all of equal length but the last, which may be shorter.
        device: where batches are wanted.
    """

    def __init__(self, shards: list[torch.Tensor], device: torch.device):
        self.shards = shards
        self.device = device
        self.shape = torch.Size([sum(map(len, shards)), *shards[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        size = len(self.shards[0])
        # Row by row: the cost does not grow with the number of shards, and the mapped files are touched nowhere else.
        rows = [self.shards[i // size][i % size, v] for i, v in zip(*(x.tolist() for x in index), strict=True)]
        batch = torch.stack(rows)
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)  # not pinned, it would block
        return batch.to(self.device)


class CachedLatents:
    """Data of a run.

    Args:
        mean: `(N, views, C, H, W)`; float32 latents or uint8 pixels: a tensor on the device, or [`MappedRows`]. Two
            views are the image and its mirror image.
        std: posterior standard deviation of the latents, of the same shape, or `None` where there is none.
        labels: `(N,)` int64 on the device, or `None` for unlabelled data.
        mirror: whether to make the second view when drawing, which is exact for pixels; one view is stored.
    """

    def __init__(
        self,
        mean: torch.Tensor | MappedRows,
        std: torch.Tensor | MappedRows | None = None,
        labels: torch.Tensor | None = None,
        mirror: bool = False,
    ):
        self.mean = mean
        self.std = std
        self.labels = labels
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> torch.Size:
        """`(C, H, W)` of a sample."""
        return self.mean.shape[2:]

    @property
    def device(self) -> torch.device:
        """Where batches are drawn."""
        return self.mean.device

    @property
    def resident(self) -> bool:
        """Whether the data lies on the device."""
        return isinstance(self.mean, torch.Tensor)

    def draw(
        self, indices: torch.Tensor, flip: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Samples `(B, C, H, W)` float32 and labels `(B,)` of `indices (B,)`.

        `flip (B,)`, uniform on [0, 1), chooses the view; `generator` draws from the posterior, anew each time (its
        mean is taken with `None`).
        """
        on_device = indices.to(self.device, non_blocking=True)
        where = (on_device if self.resident else indices, (flip * self.mean.shape[1]).long())
        sample = self.mean[where]
        if self.mirror:
            sample = torch.where(flip[:, None, None, None] >= 0.5, sample.flip(-1), sample)
        if sample.dtype == torch.uint8:
            sample = sample.float() / 127.5 - 1
        if self.std is not None and generator is not None:
            noise = torch.randn(sample.shape, generator=generator, device=self.device)
            sample += self.std[where] * noise
        return sample, None if self.labels is None else self.labels[on_device]


def load_vae(config: LatentConfig):
    """The frozen autoencoder of the configuration, in float32, or `None` for training on pixels."""
    if config.vae is None:
        return None
    try:
        vae = AutoModel.from_pretrained(
            config.vae, subfolder=config.vae_subfolder, revision=config.vae_revision, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`vae` ({config.vae!r}) cannot be loaded as an autoencoder: {error} Give a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or a Hub id such as stabilityai/sdxl-vae."
        ) from error
    # The memory order that convolutions like; the numbers stay the same to rounding.
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def sample_shape(vae, resolution: int, patch_size: int) -> tuple[int, int]:
    """Channels and side of what the model sees of images of `resolution` px.

    Raises:
        ValueError: if the autoencoder's factor and `patch_size` do not divide `resolution`.
    """
    channels, factor = (3, 1) if vae is None else (vae.config.latent_channels, vae_scale_factor(vae))
    if resolution % (factor * patch_size):
        because = f"`patch_size` ({patch_size})"
        if vae is not None:
            because = f"{factor * patch_size}: autoencoder factor {factor} x `patch_size` {patch_size}"
        raise ValueError(f"`resolution` ({resolution}) must be a multiple of {because}.")
    return channels, resolution // factor


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hex digest of a model's weights and of how its latents are scaled: the same wherever they were loaded from."""
    digest = hashlib.sha256(type(model).__name__.encode())
    scale = {key: str(getattr(model.config, key, None)) for key in ("scaling_factor", "shift_factor")}
    digest.update(json.dumps(scale).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode(
    images: LabelledImages,
    indices: Sequence[int],
    vae,
    flip: bool,
    device,
    batch_size: int = 64,
    progress: tqdm | None = None,
) -> dict[str, torch.Tensor]:
    """Encode images: "mean" and, of an autoencoder with a posterior, "std", each `(n, views, C, H, W)` on the CPU.

    With `flip` latents have two views, because an autoencoder's latents of the mirror image are not the mirrored
    latents. Pixels (`vae=None`, uint8) have one.

    Raises:
        ValueError: if an image cannot be decoded, or the autoencoder makes NaN or infinity of it.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(indices), batch_size):
        pixels = images.images(indices[start : start + batch_size])  # (B, 3, H, W) uint8
        if vae is None:
            batch = {"mean": pixels[:, None]}
        else:
            views = [pixels, pixels.flip(-1)] if flip else [pixels]
            moments = [encode_to_latent_moments(vae, view.to(device).float() / 127.5 - 1) for view in views]
            batch = {
                name: torch.stack(values, dim=1).cpu()
                for name, values in zip(("mean", "std"), zip(*moments, strict=True), strict=True)
                if values[0] is not None
            }
            broken = sorted({place for tensor in batch.values() for place in broken_images(tensor)})
            if broken:
                raise ValueError(
                    f"the autoencoder (`vae`) makes NaN or infinity of {len(broken)} of {len(pixels)} images, such as "
                    f"{images.names[indices[start + broken[0]]]!r}: its weights are damaged, or too large for their "
                    "number type. Name another one; of these images nothing was kept."
                )
        for name, tensor in batch.items():
            parts.setdefault(name, []).append(tensor)
        if progress is not None:
            progress.update(len(pixels))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def data_bytes(num_images: int, resolution: int, vae, flip: bool) -> int:
    """Bytes of the cached data of `num_images`, on disk and, where it is resident, on the device."""
    if vae is None:
        return num_images * 3 * resolution**2
    moments = 2 if isinstance(vae, AutoencoderKL) else 1
    side = resolution // vae_scale_factor(vae)
    return num_images * (2 if flip else 1) * moments * vae.config.latent_channels * side**2 * 4


class LatentCache:
    """The encoded images of one data set, in a folder of `cache_dir`.

    The processes of a machine share the work: each calls `encode`, waits until all have, then calls `load`. Runs that
    know nothing of each other may encode the same data at once: each shard is whole, whoever wrote it, and each run
    takes the missing ones in an order of its own, so that where there are many most are done once.

    Args:
        images: what to encode.
        vae: the autoencoder, or `None` for pixels.
        flip: whether mirror images belong to the data.
        cache_dir: folder of all caches.
        shard_size: images of a shard; by default as many as fit in 256 MiB, at most 1024.
    """

    def __init__(self, images: LabelledImages, vae, flip: bool, cache_dir: str | Path, shard_size: int | None = None):
        self.images, self.vae, self.flip, self.cache_dir = images, vae, flip, cache_dir
        self.bytes_per_image = data_bytes(1, images.resolution, vae, flip)
        self.shard_size = shard_size or min(MAX_SHARD_IMAGES, max(1, MAX_SHARD_BYTES // self.bytes_per_image))
        self.identity = {
            "format": FORMAT,
            "images": images.fingerprint,
            "vae": None if vae is None else weights_fingerprint(vae),
            "flip": flip and vae is not None,  # pixels are mirrored when they are drawn
            "shard_size": self.shard_size,
        }
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = cache_folder(cache_dir, key)
        self.num_shards = -(-len(images) // self.shard_size)

    def encode(self, device, process: int = 0, num_processes: int = 1) -> None:
        """Encode what is missing or damaged of the shards `process`, `process + num_processes`, ...

        Raises:
            ValueError: if the disk has no room for what is missing, or an image cannot be encoded.
            PermissionError: if something is missing and the folder cannot be written to.
        """
        missing = self.missing()
        if process == 0:
            self._announce(missing)
        if missing:
            self._require_space(missing)
            self._encode_shards([shard for shard in missing if shard % num_processes == process], device, process)
        # Whoever is last finds all there. Two that are last at once write the same.
        if (missing or not self._manifest.is_file()) and not self.missing():
            self._finish()

    def missing(self) -> list[int]:
        """Numbers of the shards that are absent or damaged, by size and header."""
        return [shard for shard in range(self.num_shards) if not _is_whole(self._path(shard), len(self._rows(shard)))]

    def load(self, device, resident: bool | None = None) -> CachedLatents:
        """The data of all shards, for batches on `device`.

        Args:
            device: where batches are wanted.
            resident: whether to hold all of it on `device`. By default on CUDA, if that takes no more than half of
                the free memory. Else the files stay mapped on the host.

        Raises:
            RuntimeError: if shards are missing.
        """
        missing = self.missing()
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {self.num_shards} shards of the cache {self.folder.name} are missing: every "
                "process must have encoded its shards before any loads them."
            )
        device = torch.device(device)
        if resident is None:
            resident = device.type == "cuda" and self.num_bytes <= torch.cuda.mem_get_info(device)[0] / 2
        shards = [load_file(self._path(shard)) for shard in range(self.num_shards)]  # on a CPU mapped, not read
        gather = _concatenated if resident else MappedRows
        data = {name: gather([shard[name] for shard in shards], device) for name in shards[0]}
        labels = None if self.images.labels is None else self.images.labels.to(device)
        return CachedLatents(**data, labels=labels, mirror=self.flip and self.vae is None)

    @property
    def num_bytes(self) -> int:
        return len(self.images) * self.bytes_per_image

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _rows(self, shard: int) -> range:
        return range(len(self.images))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def _announce(self, missing: list[int]) -> None:
        if missing and self._manifest.is_file():
            tqdm.write(f"cache {self.folder.name}: encoding {len(missing)} damaged of {self.num_shards} shards again")
        elif 0 < len(missing) < self.num_shards:
            done = self.num_shards - len(missing)
            tqdm.write(f"cache {self.folder.name}: going on after {done} of {self.num_shards} shards")

    def _require_space(self, missing: list[int]) -> None:
        make_cache_folder(self.folder)
        needed = sum(len(self._rows(shard)) for shard in missing) * self.bytes_per_image
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"`cache_dir` ({self.cache_dir}) needs {needed / GIB:.2f} GiB for the encoded images, but its disk "
                f"has {free / GIB:.2f} GiB free: make room, or choose a folder on another disk."
            )

    def _encode_shards(self, shards: list[int], device, process: int) -> None:
        if self.vae is not None:
            self.vae.to(device)
        total = sum(len(self._rows(shard)) for shard in shards)
        quiet = {"disable": True} if process > 0 else {}  # not False, which would overrule TQDM_DISABLE
        random.SystemRandom().shuffle(shards)  # other runs may be at it too; the state of `random` stays as it is
        with tqdm(total=total, desc="encoding images", unit="image", **quiet) as progress:
            for shard in shards:
                if _is_whole(self._path(shard), len(self._rows(shard))):  # by another run, meanwhile
                    progress.update(len(self._rows(shard)))
                    continue
                tensors = encode(self.images, self._rows(shard), self.vae, self.flip, device, progress=progress)
                replace_file(self._path(shard), lambda temporary, tensors=tensors: save_file(tensors, temporary))

    def _finish(self) -> None:
        manifest = {
            "identity": self.identity,
            "images": len(self.images),
            "bytes": {path.name: path.stat().st_size for path in map(self._path, range(self.num_shards))},
        }
        replace_file(self._manifest, lambda temporary: temporary.write_text(json.dumps(manifest, indent=2)))
        # What killed runs left behind. A file that another run writes right now is younger than an hour.
        for path in self.folder.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # it has just got its name
                if path.stat().st_mtime < time.time() - 3600:
                    path.unlink()


def load_or_encode(
    images: LabelledImages, vae, flip: bool, cache_dir: str | Path, device, resident: bool | None = None
) -> CachedLatents:
    """The encoded images, from the cache as far as it holds them, in a run of one process."""
    cache = LatentCache(images, vae, flip, cache_dir)
    cache.encode(device)
    return cache.load(device, resident)


def _is_whole(path: Path, rows: int) -> bool:
    try:
        # Refuses a file that is shorter or longer than its header says.
        with safe_open(path, "pt") as file:
            return file.get_slice("mean").get_shape()[0] == rows
    except (OSError, SafetensorError):
        return False


def _concatenated(shards: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    # Not torch.cat, which would need all of it twice.
    whole = torch.empty((sum(map(len, shards)), *shards[0].shape[1:]), dtype=shards[0].dtype, device=device)
    for part, shard in zip(whole.split(len(shards[0])), shards, strict=True):
        part.copy_(shard)
    return whole


def data_statistics(data: CachedLatents, num_samples: int = 4096, batch_size: int = 256) -> SpectrumStatistics:
    """Mean and power spectrum of a fixed random choice of up to `num_samples` images, as training draws them."""
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:num_samples]
    generator = torch.Generator(data.device).manual_seed(0)
    statistics = SpectrumStatistics()
    for part in indices.split(batch_size):
        flip = torch.rand(len(part), generator=generator, device=data.device)
        samples = data.draw(part, flip, generator)[0]
        statistics.update(samples)
    if not statistics.power.any():  # one image, or equal ones: their spectrum is about zero, not about their mean
        statistics.update(-samples)
    return statistics


def estimated_statistics(images: LabelledImages, vae, flip: bool, device) -> SpectrumStatistics:
    """Mean and power spectrum of images spread over the data set, encoded in memory: what can be known of the data
    before it is encoded."""
    count = min(1024 if vae is None else 128, len(images))
    indices = [index * len(images) // count for index in range(count)]
    if vae is not None:
        vae.to(device)
    encoded = encode(images, indices, vae, flip, device)
    return data_statistics(CachedLatents(encoded["mean"], encoded.get("std"), mirror=flip and vae is None))


def scale_warning(std: float) -> str | None:
    """What to tell the user about latents whose standard deviation is outside [0.5, 2]; `None` within.

    Noise schedules are made for data of unit variance, to which Rombach et al. 2022 (arXiv:2112.10752) scale latents.
    """
    if 0.5 <= std <= 2:
        return None
    advice = f"multiply it by {1 / std:.3g}" if std > 0 else "check that the images are not all of one colour"
    return (
        f"the latents have a standard deviation of {std:.3g}, but the noise schedule expects about 1: check "
        f"`scaling_factor` in the autoencoder's config.json ({advice}), then start a new run."
    )
