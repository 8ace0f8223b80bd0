"""Features of images by a frozen network, for the distances of `freqgate_dit.metrics`.

[`load_extractor`] gives clean-fid's Inception or any other network; its name is part of the name of every number that
is made from its features. [`extract_features`] runs it over a set of images.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from huggingface_hub import constants
from tqdm.auto import tqdm

from freqgate_dit.devices import available_cores, choose_dtype
from freqgate_dit.files import cache_folder, make_cache_folder, replace_file


CACHE_DIR = "~/.cache/freqgate_dit"
INCEPTION_FILE = "inception-2015-12-05.pt"
# Where clean-fid itself takes it from.
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Images(Protocol):
    """A set of images: the trainer's `LabelledImages`, or an `ImageFolder`.

    Args:
        resolution: side of every image in pixels.
        fingerprint: hex digest, equal for equal images.
    """

    resolution: int
    fingerprint: str

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Images `indices`, in that order: uint8 `(B, 3, resolution, resolution)`."""


class Extractor:
    """Features of images by a frozen network: `extractor(images)`.

    Args:
        name: part of the name of every number that is made from the features.
        network: maps uint8 images `(N, 3, H, W)` on `device` to features `(N, D)`.
        identity: what beside the precision decides about the features: name -> str or `None`.
        device, dtype: where the network runs, and in which precision (bfloat16 and float16 by autocast).
    """

    def __init__(self, name: str, network: Callable, identity: dict, device: torch.device, dtype: torch.dtype):
        self.name, self.network, self.identity, self.device, self.dtype = name, network, identity, device, dtype
        self.width: int | None = None  # known after the first batch

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def fingerprint(self) -> str:
        """Hex digest, other for other features. Of a function that is no module it knows the file, not the weights."""
        return _digest([self.name, self.identity, self.precision])

    def describe(self) -> dict:
        """What a protocol should say of the features: name -> str, number or `None`."""
        return {
            "features": self.name,
            **{f"features_{key}": value for key, value in self.identity.items()},
            "features_precision": self.precision,
            "features_width": self.width,
        }

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(N, D)`, float32 on the CPU, of uint8 images `(N, 3, H, W)`.

        Raises:
            ValueError: if the images are of another kind, or the features are not `(N, D)`, not finite, or of another
                width than before.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            kind = f"{images.dtype} {tuple(images.shape)}".removeprefix("torch.")
            raise ValueError(f"`images` ({kind}) must be uint8 (N, 3, H, W) with values in 0..255.")
        reduced = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced):
            # The memory order that convolutions like: 3 times faster with bfloat16 on a CPU.
            features = self.network(images.to(self.device, memory_format=torch.channels_last))
        problem = self._problem(features, len(images))
        if problem:
            raise ValueError(f"`features` ({self.name}) returned {problem}")
        self.width = features.shape[1]
        return features.float().cpu()

    def _problem(self, features: torch.Tensor, count: int) -> str | None:
        """What is wrong with the features of `count` images, and what to do; `None` if nothing is."""
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != count:
            what = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            return f"{what} for {count} images: it must return one tensor ({count}, D)."
        if self.width not in (None, features.shape[1]):
            return f"{features.shape[1]} features per image, but {self.width} before: their number must stay the same."
        bad = (~features.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
        if bad:
            return (
                f"NaN or infinity for {len(bad)} of {count} images, the first is number {bad[0]} of its batch: look "
                f"at that image, or choose `dtype` float32 instead of {self.precision}."
            )
        return None


def load_extractor(
    features: str = "inception",
    inception_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    cache_dir: str | Path = CACHE_DIR,
) -> Extractor:
    """The network that `features` names.

    Args:
        features: "inception" (clean-fid's Inception-v3 and its "clean" resize, Parmar et al. 2022, arXiv:2104.11222;
            2048 features), or "module:function" or "path/to/file.py:function". The function maps uint8 images
            `(N, 3, H, W)` to features `(N, D)`, and its name is the extractor's. A function with an argument `device`
            is called with it once and returns such a function; then the module's name is the extractor's.
        inception_path: the file inception-2015-12-05.pt, or its folder; otherwise it is downloaded once to
            `cache_dir/inception`. Other weights than the published ones get a name of their own.
        device: where the network runs.
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 for Inception, as in published numbers, and
            otherwise bfloat16 where the device is fast at it.
        cache_dir: folder of the package's caches.

    Raises:
        ValueError: if `features` or `inception_path` names nothing that fits.
        ImportError: if clean-fid is needed and not installed.
        OSError: if Inception's weights are not there and cannot be downloaded.
    """
    device = torch.device(device)
    if features == "inception":
        dtype = "float32" if dtype == "auto" else dtype
        return Extractor(*_inception(inception_path, device, cache_dir), device, choose_dtype(dtype, device))
    if inception_path is not None:
        raise ValueError(f"`inception_path` ({inception_path}) is for `features` inception, not {features}: drop one.")
    return Extractor(*_function(features, device), device, choose_dtype(dtype, device))


def _inception(
    inception_path: str | Path | None, device: torch.device, cache_dir: str | Path
) -> tuple[str, Callable, dict]:
    """Name, network and identity of clean-fid's Inception."""
    try:
        # These two modules of clean-fid do without torchvision.
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise ImportError(f"`features` inception needs clean-fid ({error}): pip install clean-fid.") from error
    if inception_path is None:
        path = download_inception(cache_dir)
    else:
        path = Path(inception_path).expanduser()
        path = path / INCEPTION_FILE if path.is_dir() else path
    if path.name != INCEPTION_FILE or not path.is_file():
        raise ValueError(
            f"`inception_path` ({inception_path}) must be the file {INCEPTION_FILE}, under that name, or its folder: "
            f"download it from {INCEPTION_URL}."
        )
    try:
        model = InceptionV3W(str(path.parent), download=False).eval().to(device)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold Inception's weights: delete it, and download it again from {INCEPTION_URL}."
        ) from error
    resize = build_resizer("clean")

    def network(images: torch.Tensor) -> torch.Tensor:
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        with ThreadPoolExecutor(available_cores()) as pool:
            resized = np.stack(list(pool.map(resize, arrays)))
        return model(torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(device))

    digest = _file_digest(path)
    name = "inception_clean" if digest == INCEPTION_SHA256 else f"inception_clean_{digest[:8]}"
    return name, network, {"source": "clean-fid", "weights": digest, "code": version("clean-fid")}


def download_inception(cache_dir: str | Path = CACHE_DIR) -> Path:
    """The file of Inception's weights in `cache_dir/inception`, downloaded if it is not there yet.

    Raises:
        ConnectionError: if it cannot be downloaded, or arrives damaged; says where to put it by hand.
        PermissionError: if the folder cannot be written to.
    """
    path = cache_folder(cache_dir, "inception", INCEPTION_FILE)
    if path.is_file():
        return path
    advice = f"download {INCEPTION_URL} elsewhere and put it into {path.parent}, or name it by `inception_path`."
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{INCEPTION_FILE} is not there yet, and HF_HUB_OFFLINE forbids to fetch it: {advice}")

    def download(temporary: Path):
        try:
            with urllib.request.urlopen(INCEPTION_URL, timeout=60) as response, temporary.open("wb") as file:
                while block := response.read(2**20):
                    file.write(block)
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"{INCEPTION_FILE} could not be downloaded ({error}): {advice}") from error
        if _file_digest(temporary) != INCEPTION_SHA256:
            raise ConnectionError(f"{INCEPTION_FILE} arrived damaged (its SHA-256 is another one): {advice}")

    make_cache_folder(path.parent)
    replace_file(path, download)
    return path


def _function(features: str, device: torch.device) -> tuple[str, Callable, dict]:
    """Name, network and identity of "module:function" or "path/to/file.py:function"."""
    source, _, attribute = features.rpartition(":")
    if not source or not attribute.isidentifier():
        raise ValueError(
            f"`features` ({features}) must be inception, module:function, or path/to/file.py:function, where the "
            "function maps uint8 images (N, 3, H, W) to features (N, D)."
        )
    module = _import(source, features)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"`features` ({features}): there is no function {attribute} in {source}.")
    is_file = source.endswith(".py")
    name, network = attribute, function
    if not isinstance(function, torch.nn.Module) and "device" in inspect.signature(function).parameters:
        name = Path(source).stem if is_file else source.rpartition(".")[2]
        network = function(device=device)
    weights = None
    if isinstance(network, torch.nn.Module):
        network = network.eval().to(device)
        weights = _weights_digest(network)
    # No folder of this machine.
    shown = f"{Path(source).name if is_file else source}:{attribute}"
    code = _file_digest(Path(module.__file__))
    return name, network, {"source": shown, "weights": weights, "code": code}


def _import(source: str, features: str) -> ModuleType:
    """The module of that name, or of that file if it ends in .py."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"`features` ({features}): there is no file {path} (current directory: {Path.cwd()}).")
        spec = importlib.util.spec_from_file_location(f"_features_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise ValueError(
            f"`features` ({features}) cannot be imported: {error}. Install what is missing, or put the folder of your "
            "modules on PYTHONPATH."
        ) from error


def _digest(identity: list | dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def extract_features(
    extractor: Extractor,
    images: Images,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: tqdm | None = None,
) -> torch.Tensor:
    """Features `(n, D)`, float32 on the CPU, of `images`, or of those with numbers `indices`, in that order.

    `progress` is moved on by the number of images. Errors are those of the images and of the extractor.
    """
    indices = range(len(images)) if indices is None else indices
    parts = []
    for start in range(0, len(indices), batch_size):
        parts.append(extractor(images.images(indices[start : start + batch_size])))
        if progress is not None:
            progress.update(len(parts[-1]))
    return torch.cat(parts)
