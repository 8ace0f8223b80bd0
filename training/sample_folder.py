"""Images of one protocol in a folder, kept batch by batch, each batch whole or not there.

What the images were made by stands beside them, in `protocol.json`; images of another protocol are never mixed in.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from freqgate_dit import __version__
from freqgate_dit.files import delete_written, left_behind, read_json, replace_file, write_text


PROTOCOL = "protocol.json"
# First image, and the one after the last.
NAME = re.compile(r"images_(\d{7})_(\d{7})\.safetensors")


class SampleFolder:
    """The images of one protocol in a folder: `samples/images_FIRST_END.safetensors`, each whole or not there.

    An instance is a set of images as `freqgate_dit.features` takes them, once all are there.

    Args:
        folder: holds `protocol.json` and `samples`.
        protocol: what decides about the images, as JSON can hold it.
        count: number of images.
        resolution: side of every image in pixels.
        device: type of the device that makes them.
    """

    def __init__(self, folder: Path, protocol: dict, count: int, resolution: int, device: str):
        self.folder, self.protocol, self.count, self.resolution = folder, protocol, count, resolution
        self.fingerprint = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
        self.made_with = {"device": device, "freqgate_dit": __version__}
        self.made_with |= {name: version(name) for name in ("torch", "diffusers", "transformers")}

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    def __len__(self) -> int:
        return self.count

    # -- making -------------------------------------------------------------------------------------------------------

    def check(self):
        """Raise unless what is there was made by the same protocol; images that are missing, with the same versions.

        Raises:
            ValueError: names what differs.
        """
        check_folder(self.folder, self.protocol)
        path = self.folder / PROTOCOL
        made_with = read_json(path)["made_with"] if self.files() and path.is_file() else self.made_with
        if made_with == self.made_with:
            return
        if self.missing(self.count):
            raise ValueError(
                f"`out` ({self.folder}) holds a part of the images, made elsewhere "
                f"({differences(self.made_with, made_with)}): go on as before, or delete the folder."
            )
        self.made_with = made_with

    def open(self):
        """Make the folder, and clear it of what an interruption has left unfinished."""
        self.samples.mkdir(parents=True, exist_ok=True)
        for path in [*left_behind(self.samples, NAME.pattern), *self._damaged()]:
            path.unlink()
        write_protocol(self.folder, self.protocol, self.made_with)

    def delete(self):
        """Delete the images and their features; whatever else lies there stays."""
        for features in self.samples.glob("references/*"):
            delete_written(features, r"(features_\d+|spectrum)\.safetensors|manifest\.json")
        delete_written(self.samples / "references", "")
        delete_written(self.samples, NAME.pattern)

    def files(self) -> list[tuple[int, int, Path]]:
        """First image, the one after the last, and path, in order."""
        matches = [(NAME.fullmatch(path.name), path) for path in self.samples.glob("images_*")]
        return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)

    def missing(self, batch_size: int) -> list[range]:
        """Numbers of the images that are not there, in batches."""
        batches, start = [], 0
        for first, end, _ in [*self.files(), (self.count, self.count, None)]:
            batches += [range(i, min(i + batch_size, first)) for i in range(start, first, batch_size)]
            start = end
        return batches

    def write(self, indices: range, images: torch.Tensor, clipped: int):
        """Keep images `indices`, uint8 `(B, 3, H, W)`."""
        path = self.samples / f"images_{indices.start:07d}_{indices.stop:07d}.safetensors"
        metadata = {"clipped": str(clipped)}
        replace_file(path, lambda temporary: save_file({"images": images}, temporary, metadata=metadata))

    def _damaged(self) -> list[Path]:
        damaged = []
        for first, end, path in self.files():
            try:
                with safe_open(path, "pt") as file:  # refuses a file that is shorter than its header says
                    whole = file.get_slice("images").get_shape()[0] == end - first
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                damaged.append(path)
        return damaged

    # -- reading ------------------------------------------------------------------------------------------------------

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Images `indices`, in that order: uint8 `(B, 3, resolution, resolution)`."""
        files = self.files()
        starts = [first for first, _, _ in files]
        batches, rows = {}, []
        for index in indices:
            place = bisect_right(starts, index) - 1
            if place not in batches:
                batches[place] = load_file(files[place][2])["images"]
            rows.append(batches[place][index - starts[place]])
        return torch.stack(rows)

    def clipped(self) -> int:
        """Number of pixels of all images that were clipped."""
        total = 0
        for _, _, path in self.files():
            with safe_open(path, "pt") as file:
                total += int(file.metadata()["clipped"])
        return total


def check_folder(folder: Path, protocol: dict):
    """Raise if the folder holds images or an evaluation of another protocol.

    Raises:
        ValueError: names what differs.
    """
    if not (folder / "evaluation.json").is_file() and not any((folder / "samples").glob("images_*.safetensors")):
        return
    path = folder / PROTOCOL
    other = differences(protocol, read_json(path)["protocol"]) if path.is_file() else f"without a {PROTOCOL}"
    if other:
        raise ValueError(
            f"`out` ({folder}) holds another evaluation ({other}): choose another folder, or delete that one."
        )


def write_protocol(folder: Path, protocol: dict, made_with: dict | None = None):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"protocol": protocol, "made_with": made_with}
    write_text(folder / PROTOCOL, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def differences(ours: dict, theirs: dict) -> str:
    """What differs, in words: "steps 20, here 50"; of long values the name only."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    values = {name: (theirs.get(name), ours.get(name)) for name in names}
    short = {name: f" {there}, here {here}" for name, (there, here) in values.items() if len(f"{there}{here}") < 80}
    return "; ".join(f"{name}{short.get(name, '')}" for name in names)
