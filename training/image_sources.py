"""Where images come from: folders, parquet files and Hub data sets, each as names, labels and a reader of bytes."""

import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from freqgate_dit.files import cache_folder, make_cache_folder, replace_file
from freqgate_dit.image_folder import as_text, by_suffix, is_image_name, walk


if TYPE_CHECKING:
    from freqgate_dit.training.data import DataConfig


# Files with the labels of a folder: of EDM, and of the `imagefolder` of `datasets`.
EDM_LABELS, METADATA = "dataset.json", ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LABEL_COLUMNS = ("label", "labels", "class")


class Item(NamedTuple):
    name: str  # sort key of the held-out rule, shown to the user
    label: int  # -1: unconditional
    key: str | int  # what the reader takes: relative path or row number
    digest: str = ""  # of the encoded bytes


# Readers are dataclasses, not closures, so that a LabelledImages can be sent to a spawned worker process.
@dataclass(frozen=True)
class FolderReader:
    """Encoded bytes of the files below `root`, by relative path."""

    root: Path

    def __call__(self, key: str) -> bytes:
        path = self.root / key
        if path.exists() and not path.is_file():  # a pipe would be waited for, and a device has no end
            raise OSError("not a regular file")
        return path.read_bytes()

    @property
    def identity(self) -> str:
        return f"folder {os.path.realpath(self.root)}"

    def stamp(self, key: str) -> list[int] | None:
        """What changes when the file does: size in bytes, modification time in ns; `None` if there is no such file."""
        try:
            status = os.stat(os.path.join(self.root, key))  # a Path for each would take longer than the call
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class TableReader:
    """Encoded bytes of the rows of `images`, by row number."""

    images: Any  # datasets.Dataset, undecoded
    column: str
    names_files: bool  # some rows hold the path of a file instead of its bytes

    def __call__(self, key: int) -> bytes:
        image = self.images[key][self.column]
        if image is None:
            raise ValueError("the image is null")
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]

    @property
    def identity(self) -> str:
        # Of the files' names and modification times, by which `datasets` itself keeps what it has read.
        return f"table {self.images._fingerprint}"

    def stamp(self, key: int) -> list[int] | None:
        """Nothing beyond the identity, for rows that hold their bytes; else `None`: files may change at any time."""
        return None if self.names_files else []


Reader = FolderReader | TableReader


class Index:
    """SHA-256 of images that could be read at an earlier start, as JSON in `cache_dir/index`; empty with `None`.

    An entry counts while the reader's identity and the image's stamp are the same. The file holds keys (relative names
    or row numbers), stamps and digests; its name is a hash of the identity. A warning tells if it cannot be kept.
    """

    FORMAT = 3  # raise it whenever other images would count as readable

    def __init__(self, read: Reader, cache_dir: str | Path | None):
        self.path, self.entries = None, {}
        if cache_dir is None:
            return
        name = hashlib.sha256(read.identity.encode("utf-8", "surrogateescape")).hexdigest()[:20]
        self.path = cache_folder(cache_dir, "index", f"{name}.json")
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):  # none yet, or damaged: everything is read again
            return
        if stored.get("format") == self.FORMAT:
            self.entries = stored["entries"]

    def find(self, key: str | int, stamp: list[int] | None) -> str | None:
        *known, digest = self.entries.get(str(key), (None, None))
        return digest if known == stamp else None

    def replace(self, entries: dict[str, list]) -> None:
        """Keep `{str(key): [*stamp, digest]}` from now on, and nothing else."""
        if self.path is None or entries == self.entries:
            return
        self.entries = entries
        content = json.dumps({"format": self.FORMAT, "entries": entries})
        try:
            make_cache_folder(self.path.parent)
            replace_file(self.path, lambda temporary: temporary.write_text(content))
        except OSError as error:
            warnings.warn(f"images are checked again at every start: {error}")


def is_snapshot(path: Path) -> bool:
    """Whether a folder is a downloaded Hub data set: parquet files where the Hub keeps them, and no image file."""
    return any([*path.glob("*.parquet"), *path.glob("data/*.parquet")]) and not any(map(is_image_name, _files(path)))


# -- folders ----------------------------------------------------------------------------------------------------------


def scan_folder(root: Path, config: "DataConfig") -> tuple[tuple[str, ...], list[Item], Reader]:
    """Class names, images and their reader. Classes are the subfolders, and nothing deeper carries meaning; or what a
    file of labels says."""
    _, folders, loose = next(walk(root))
    files = {"": loose, **{folder: _files(root, folder) for folder in folders}}
    images = {folder: [name for name in names if is_image_name(name)] for folder, names in files.items()}
    used = [folder for folder in folders if images[folder]]
    others = [name for folder, names in files.items() for name in sorted({*names}.difference(images[folder]))]
    if not any(images.values()):
        found = by_suffix(others) or "nothing"
        raise ValueError(f"dataset={str(root)!r} holds no image that Pillow reads, but {found}.")
    labelled = _read_labels(root, config, has_classes=len(used) > 1)
    left_out = by_suffix([name for name in others if labelled is None or name != labelled[0]])
    if left_out:
        warnings.warn(f"dataset={str(root)!r}: files that are no images are left out: {left_out}.")
    if labelled is not None:
        return *_labelled_items([name for names in images.values() for name in names], *labelled), FolderReader(root)
    loose = images.pop("")
    if loose and used:
        raise ValueError(
            f"dataset={str(root)!r} mixes {len(loose)} loose images (such as {loose[0]!r}) with {len(used)} "
            f"subfolders of images (such as {used[0]!r}). Move the loose images into a class folder, or "
            "elsewhere; for an unconditional set put all images directly into one folder."
        )
    if loose:
        return (), [Item(as_text(name), -1, name) for name in loose], FolderReader(root)
    _tell_unused_folders(root, [images[folder] for folder in used])
    numbers = _class_numbers(used)
    empty = sorted({as_text(folder) for folder in folders} - numbers.keys())
    items = [Item(as_text(name), numbers[as_text(folder)], name) for folder in used for name in images[folder]]
    return (*numbers, *empty), items, FolderReader(root)


def _files(root: Path, folder: str = "") -> list[str]:
    """Files below `root / folder` at any depth, relative to `root`."""
    found = []
    for directory, _, names in walk(root / folder):
        relative = Path(directory).relative_to(root).as_posix()
        found += names if relative == "." else [f"{relative}/{name}" for name in names]
    return found


def _tell_unused_folders(root: Path, classes: list[list[str]]) -> None:
    """Warn of classes whose images all lie in folders of their own, which may be the classes that were meant."""
    unused = {}
    for names in classes:
        parents = [PurePosixPath(parent) for parent in {os.path.dirname(name) for name in names}]
        folder = PurePosixPath(os.path.commonpath(parents))
        below = sorted({parent.relative_to(folder).parts[:1] for parent in parents})
        if () not in below:
            unused[folder.as_posix()] = [as_text(name) for (name,) in below]
    if unused:
        folder, below = next(iter(unused.items()))
        warnings.warn(
            f"dataset={str(root)!r}: {len(unused)} of {len(classes)} classes have all images in folders below, whose "
            f"names are not used (in {folder!r}: {some(below, 5)}). If those are the classes, pass "
            f"{str(root / folder)!r}."
        )


def _read_labels(root: Path, config: "DataConfig", has_classes: bool) -> tuple[str, dict[str, Any] | None] | None:
    """A file with the labels of a folder, and label by relative name; `None` if no image has one. Without such a file,
    `None`.

    It is `dataset.json`, as EDM (Karras et al. 2022, arXiv:2206.00364) writes it, or the metadata that `imagefolder`
    of `datasets` reads; the latter counts where folders are no classes, or the user names its column.
    """
    if (root / EDM_LABELS).is_file():
        content = _parsed(root / EDM_LABELS, _read_json)
        pairs = content.get("labels", ()) if isinstance(content, dict) else ()
        if pairs is None:
            return EDM_LABELS, None
        if pairs and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            return EDM_LABELS, {as_text(name): label for name, label in pairs}
    for path in (root / name for name in METADATA):
        if path.is_file() and (config.label_column or not has_classes):
            _import_datasets(config.dataset)  # which brings pandas
            table = _parsed(path, _read_table)
            columns = [name for name in table if name != "file_name"]
            if "file_name" not in table:
                warnings.warn(f"{path} is not read, as none of its columns {columns} is called file_name.")
                continue
            column = _label_column(columns, config, [name for name in LABEL_COLUMNS if name in columns])
            if column is not None:
                names = map(as_text, table["file_name"].astype(str))
                return path.name, dict(zip(names, table[column].tolist()))
            return None
    if config.label_column is not None:
        raise ValueError(
            f"label_column={config.label_column!r} has no effect on dataset={config.dataset!r}, which has no "
            f"{' or '.join(METADATA)} with file names: leave it out."
        )
    return None


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _read_table(path: Path):
    import pandas

    if path.suffix == ".csv":
        return pandas.read_csv(path, keep_default_na=False)
    return pandas.read_json(path, lines=True, dtype=False) if path.suffix == ".jsonl" else pandas.read_parquet(path)


def _parsed(path: Path, parse: Callable[[Path], Any]):
    try:
        return parse(path)
    except ValueError as error:
        raise ValueError(f"{path} has the labels, and cannot be read ({error}): mend it, or move it away.") from error


def _labelled_items(keys: list[str], file: str, labels: dict[str, Any] | None) -> tuple[tuple[str, ...], list[Item]]:
    names = [as_text(key) for key in keys]
    if labels is None:
        return (), [Item(name, -1, key) for name, key in zip(names, keys)]
    # NaN, which is not itself, is what pandas makes of nothing.
    missing = [name for name in names if labels.get(name) in (None, "") or labels[name] != labels[name]]
    if missing:
        raise ValueError(
            f"{file} has no label for {len(missing)} of {len(names)} images: {some(missing, 5)}. Add them to it, move "
            f"them elsewhere, or {file} itself, to train without."
        )
    class_names, numbers = _numbered([labels[name] for name in names], file, names)
    return class_names, [Item(*item) for item in zip(names, numbers, keys)]


# -- tables -----------------------------------------------------------------------------------------------------------


def _import_datasets(dataset: str):
    # Imported on use: it takes a second, and image folders do without it.
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"dataset={dataset!r} needs `datasets`: pip install 'freqgate_dit[train]'.") from error
    return datasets


def open_parquet(config: "DataConfig"):
    path = Path(config.dataset).expanduser().absolute()
    there = str(next(folder for folder in (path, *path.parents) if folder.exists()))
    pattern = glob.escape(there) + str(path)[len(there) :]  # what is there is no pattern, brackets and all
    files = sorted(glob.glob(pattern, recursive=True))
    files = [name for name in files if name.endswith(".parquet") and os.path.isfile(name)]
    if not files:
        raise ValueError(f"dataset={config.dataset!r} matches no .parquet file (current directory: {os.getcwd()}).")
    datasets = _import_datasets(config.dataset)
    try:
        return datasets.load_dataset("parquet", data_files=[glob.escape(name) for name in files], split="train")
    except Exception as error:  # pyarrow, fsspec and datasets each have their own
        raise ValueError(
            f"dataset={config.dataset!r} cannot be read as parquet: {error}{_cache_advice(datasets, error)}"
        ) from error


def open_hub(config: "DataConfig"):
    datasets = _import_datasets(config.dataset)
    name = os.path.expanduser(config.dataset)
    if os.path.isdir(name) and glob.has_magic(name):
        raise ValueError(
            f"dataset={config.dataset!r} has a character of patterns ([, ? or *) in its path, which `datasets` cannot "
            f"load: rename the folder, or pass its files ({os.path.join(config.dataset, 'data', '*.parquet')!r})."
        )
    try:
        return datasets.load_dataset(
            name, config.dataset_config, split=config.dataset_split, revision=config.dataset_revision
        )
    except Exception as error:  # network, missing, gated, unknown split: many libraries' own errors
        raise ValueError(
            f"dataset={config.dataset!r} is neither a folder of images nor .parquet files, and it could not be loaded "
            f"as a Hub data set (dataset_config={config.dataset_config!r}, dataset_split={config.dataset_split!r}, "
            f"dataset_revision={config.dataset_revision!r}): "
            f"{type(error).__name__}: {error}. Check the spelling, the connection and, for a private or gated set, "
            f"`hf auth login`.{_cache_advice(datasets, error)}"
        ) from error


def _cache_advice(datasets, error: Exception) -> str:
    """What to do if `datasets` has a cache of its own that it cannot write to."""
    cache, place = str(datasets.config.HF_DATASETS_CACHE), str(getattr(error, "filename", None) or "?")
    if not isinstance(error, OSError) or not (place.startswith(cache) or cache.startswith(place)):
        return ""
    return f" `datasets` keeps what it has read in {cache}: set HF_HOME to a folder that can be written to."


def scan_table(rows, config: "DataConfig") -> tuple[tuple[str, ...], list[Item], Reader]:
    """Class names, images and their reader, of the rows of parquet files or of a Hub data set."""
    image_column = _image_column(rows, config)
    label_column = _table_labels(rows, image_column, config)
    images = _encoded(rows, image_column)
    names, names_files = _row_names(images, image_column)
    if not names:
        raise ValueError(f"the data set has no rows: {rows}.")
    class_names, labels = ((), [-1] * len(names)) if label_column is None else _row_labels(rows, label_column)
    items = [Item(name, label, row) for row, (name, label) in enumerate(zip(names, labels))]
    return class_names, items, TableReader(images, image_column, names_files)


def _image_column(rows, config: "DataConfig") -> str:
    # Files not written by `datasets` have its storage type, {bytes, path}, without the feature's name.
    found = [
        name
        for name, feature in rows.features.items()
        if type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    column = _choose_column(rows.column_names, config, "image_column", found)
    if column is None:
        raise ValueError(
            f"dataset={config.dataset!r} has no image column among {rows.column_names}: pass image_column."
        )
    return column


def _table_labels(rows, image_column: str, config: "DataConfig") -> str | None:
    typed = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    named = [name for name in LABEL_COLUMNS if name in rows.features]
    return _label_column([name for name in rows.column_names if name != image_column], config, typed or named)


def _label_column(columns: list[str], config: "DataConfig", found: list[str]) -> str | None:
    column = _choose_column(columns, config, "label_column", found)
    if column is None and columns:
        warnings.warn(
            f"dataset={config.dataset!r} is read without classes: none of its columns {columns} is called "
            f"{', '.join(LABEL_COLUMNS)}. If one of them holds the class, pass it as label_column."
        )
    return column


def _choose_column(columns: list[str], config: "DataConfig", option: str, found: list[str]) -> str | None:
    name = getattr(config, option)
    if name is not None and name not in columns:
        raise ValueError(f"{option}={name!r} is not a column of the data set; its columns are {columns}.")
    if name is None and len(found) > 1:
        raise ValueError(f"{option}=None, but dataset={config.dataset!r} has several: pass one of {found}.")
    return name or (found[0] if found else None)


def _encoded(rows, column: str):
    """The one image column of `rows`, as {bytes, path}: `decode_image` decodes all images, and the same way."""
    from datasets import Image as ImageFeature

    try:
        return rows.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    except Exception as error:  # pyarrow and datasets each have their own cast errors
        raise ValueError(
            f"image_column={column!r} has the type {rows.features[column]}, not encoded images; the columns are "
            f"{rows.column_names}."
        ) from error


def _row_names(images, column: str) -> tuple[list[str], bool]:
    """The file name stored with each image, else its zero-padded row number; and whether a row lacks its bytes."""
    import pyarrow.compute as pc

    names, names_files, width = [], False, len(str(len(images)))
    for batch in images.with_format("arrow").iter(1000):
        for image in pc.struct_field(batch[column], "path").to_pylist():
            # The last component only: a path on the machine that wrote the file means nothing here.
            names.append(as_text(PurePosixPath((image or "").replace("\\", "/")).name) or f"{len(names):0{width}d}")
        names_files |= pc.struct_field(batch[column], "bytes").null_count > 0
    return names, names_files


def _row_labels(rows, column: str) -> tuple[tuple[str, ...], list[int]]:
    feature = rows.features[column]
    values = list(rows.with_format(None)[column])
    class_names, labels = _numbered(values, f"label_column={column!r}", [f"row {row}" for row in range(len(values))])
    if type(feature).__name__ != "ClassLabel":
        return class_names, labels
    if min(values) < 0:
        raise ValueError(
            f"label_column={column!r} has {sum(value < 0 for value in values)} unlabelled rows (-1), the first is "
            f"row {values.index(min(values))}. Pass a labelled split or file."
        )
    return tuple(map(as_text, feature.names)), values


def _numbered(values: list, source: str, places: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """Class names, sorted, and the number of each of `values`, which `source` has for `places`."""
    wrong = [number for number, value in enumerate(values) if not isinstance(value, (int, str))]
    if wrong:
        raise ValueError(
            f"{source} must hold integers or strings, but {places[wrong[0]]} has {values[wrong[0]]!r} ({len(wrong)} "
            "such). Remove those or pass another label_column."
        )
    names = {value: as_text(str(value)) for value in set(values)}
    numbers = _class_numbers(names.values())
    return tuple(numbers), [numbers[names[value]] for value in values]


def _class_numbers(names: Iterable[str]) -> dict[str, int]:
    """Class name -> number: in the order of the names, of integers if all are ("10" after "2")."""
    distinct = {as_text(name) for name in names}
    integers = all(re.fullmatch("-?[0-9]+", name) for name in distinct)
    ordered = sorted(distinct, key=lambda name: (int(name) if integers else 0, name))
    return {name: number for number, name in enumerate(ordered)}


def some(names: Sequence[str], limit: int) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
