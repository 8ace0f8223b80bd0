"""Encoded once, used by every run: the training data as latents (or pixels) on the device, cached on disk.

A cache folder is named by a fingerprint of the images, their transform, the flips and the autoencoder's weights, so a
stale one cannot be taken for a fresh one. Its manifest is written last: a folder without it is incomplete and redone.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_to_latent_moments
from freqgate_dit.training.config import LatentConfig
from freqgate_dit.training.data import LabelledImages


FORMAT = 1


class CachedLatents:
    """Data of a run on one device.

    Args:
        mean: `(N, views, C, H, W)`; float32 latents or uint8 pixels. Two views are the image and its mirror image.
        std: posterior standard deviation of the latents, of the same shape, or `None` where there is none.
        labels: `(N,)` int64, or `None` for unlabelled data.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor | None = None, labels: torch.Tensor | None = None):
        self.mean = mean
        self.std = std
        self.labels = labels

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> torch.Size:
        """`(C, H, W)` of a sample."""
        return self.mean.shape[2:]

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def to(self, device) -> "CachedLatents":
        return CachedLatents(*(None if x is None else x.to(device) for x in (self.mean, self.std, self.labels)))

    def draw(
        self, indices: torch.Tensor, flip: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Samples `(B, C, H, W)` float32 and labels `(B,)` of `indices (B,)`.

        `flip (B,)`, uniform on [0, 1), chooses the view; `generator` draws from the posterior, anew each time (its
        mean is taken with `None`).
        """
        indices = indices.to(self.device, non_blocking=True)
        view = (flip * self.mean.shape[1]).long()
        sample = self.mean[indices, view]
        sample = sample.float() / 127.5 - 1 if sample.dtype == torch.uint8 else sample.clone()
        if self.std is not None and generator is not None:
            noise = torch.randn(sample.shape, generator=generator, device=self.device)
            sample += self.std[indices, view] * noise
        return sample, None if self.labels is None else self.labels[indices]


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


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hex digest of a model's configuration and weights: the same wherever they were loaded from."""
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps({key: str(model.config.get(key)) for key in ("scaling_factor", "shift_factor")}).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode(images: LabelledImages, vae, flip: bool, device, batch_size: int = 64) -> CachedLatents:
    """Encode all images, and their mirror images with `flip`. Without `vae` pixels are kept as uint8."""
    means, stds = [], []
    for start in tqdm(range(0, len(images), batch_size), desc="encoding images", unit="batch"):
        pixels = images.images(range(start, min(start + batch_size, len(images))))  # (B, 3, H, W) uint8
        views = [pixels, pixels.flip(-1)] if flip else [pixels]
        if vae is None:
            means.append(torch.stack(views, dim=1))
            continue
        moments = [encode_to_latent_moments(vae, view.to(device).float() / 127.5 - 1) for view in views]
        means.append(torch.stack([mean for mean, _ in moments], dim=1).cpu())
        if moments[0][1] is not None:
            stds.append(torch.stack([std for _, std in moments], dim=1).cpu())
    return CachedLatents(torch.cat(means), torch.cat(stds) if stds else None, images.labels)


def load_or_encode(images: LabelledImages, vae, flip: bool, cache_dir: str | Path, device) -> CachedLatents:
    """The encoded images, from the cache if it holds them, on `device`."""
    identity = {
        "format": FORMAT,
        "images": images.fingerprint,
        "vae": None if vae is None else weights_fingerprint(vae),
        "flip": flip,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache_dir).expanduser() / key
    tensors_file, manifest_file = folder / "latents.safetensors", folder / "manifest.json"

    if manifest_file.is_file() and tensors_file.is_file():
        manifest = json.loads(manifest_file.read_text())
        if manifest["identity"] == identity and tensors_file.stat().st_size == manifest["bytes"]:
            return CachedLatents(**{"std": None, "labels": None, **load_file(tensors_file)}).to(device)
        print(f"the latent cache {folder.name} is damaged or stale: encoding again")

    if vae is not None:
        vae.to(device)
    latents = encode(images, vae, flip, device)
    tensors = {"mean": latents.mean, "std": latents.std, "labels": latents.labels}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    folder.mkdir(parents=True, exist_ok=True)
    # The process number keeps two runs that encode the same data apart; the last rename wins with equal content.
    for path, write in (
        (tensors_file, lambda file: save_file(tensors, file)),
        (
            manifest_file,
            lambda file: file.write_text(
                json.dumps(
                    {"identity": identity, "bytes": tensors_file.stat().st_size, "images": len(images)}, indent=2
                )
            ),
        ),
    ):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        write(temporary)
        os.replace(temporary, path)
    return latents.to(device)
