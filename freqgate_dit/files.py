"""Files and folders that are there whole or not at all, whenever the process dies."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path


def user_path(text: str) -> Path:
    """A path as a person writes it, for an option: `~` is home, also where no shell has seen it (`--out=~/x`)."""
    return Path(text).expanduser()


def digest(*parts) -> str:
    """SHA-256 in hexadecimal of what JSON can hold; of other values, of their text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_sources(*folders: Path) -> str:
    """`digest` of the Python files in these folders, shortened to twelve digits."""
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return digest([(file.name, file.read_text(encoding="utf-8")) for file in files])[:12]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, also after a crash; of several writers the last one wins."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(cache_dir: str | Path, *names: str) -> Path:
    """`cache_dir/names`, with `~` for one's home; it need not be there.

    Raises:
        ValueError: if there is no such home.
    """
    try:
        return Path(cache_dir).expanduser().joinpath(*names)
    except RuntimeError as error:
        raise ValueError(f"`cache_dir` ({cache_dir}): {error} Name a folder by `--cache_dir`.") from error


def make_cache_folder(folder: Path) -> None:
    """Make a folder of the cache, if it is not there.

    Raises:
        PermissionError: if it cannot be made or written to; says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"`cache_dir`: {folder} cannot be written to ({error.strerror}): name another folder by `--cache_dir`."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, the same bytes on every system."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def read_json(path: Path) -> dict:
    """Content of a JSON file that holds a dictionary.

    Raises:
        ValueError: if it is damaged or holds something else; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no valid JSON ({error}): copy it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold a dictionary, but holds a {type(values).__name__}.")
    return values


def read_json_lines(path: Path) -> list[dict]:
    """What each line of a file holds; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def replace_folder(
    folder: Path, write: Callable[[Path], object], mark: str, keep: Callable[[Path, Path], list[str]] | None = None
) -> None:
    """Fill a new folder with `write`, then give it the name `folder`. What has that name stays if anything fails.

    It is moved to `FOLDER.<8 digits>.replaced` for the moment between two renames, and deleted after: a process that
    dies there leaves it under that name.

    Args:
        mark: a file that every folder has which `write` has filled. Another one is not replaced.
        keep: of the old folder and the new one, what is moved from the one into the other. Where that fails, the old
            folder stays under its other name, with a warning.

    Raises:
        FileExistsError: if there is a folder without the mark that is not empty.
    """
    refuse_to_replace(folder, mark)
    name = f"{folder.name}.{uuid.uuid4().hex[:8]}"
    temporary, replaced = (folder.with_name(f"{name}.{suffix}") for suffix in ("tmp", "replaced"))
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():
                sync(path)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise
    if not replaced.exists():
        return
    try:
        for name in keep(replaced, folder) if keep and (replaced / mark).is_file() else ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(replaced / name, folder / name)
    except Exception as error:  # whatever it is, the new folder is there, and the old one too
        warnings.warn(f"not all of what others have put into {folder} is there now ({error}): see {replaced}.")
    else:
        shutil.rmtree(replaced, ignore_errors=True)


def refuse_to_replace(folder: Path, mark: str) -> None:
    """Raise `FileExistsError` for a folder that is there, and neither empty nor marked."""
    if folder.exists() and not (folder / mark).is_file() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} would be replaced, but was not written by this package (it has no {mark}): move it away, or "
            "name another place."
        )


def left_behind(folder: Path, names: str) -> list[Path]:
    """What writers that died have left in `folder`: of files and folders whose name matches the pattern `names`."""
    pattern = re.compile(rf"(?:{names})\.[0-9a-f]{{8}}\.(?:tmp|replaced)")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def delete_written(folder: Path, names: str) -> None:
    """Delete the files in `folder` whose names match the pattern `names`, and the folder if it is empty then."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(names, path.name) and not path.is_dir():
            path.unlink()
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def sync(path: Path):
    """Have the disk hold what was written to a file, or which files a folder has."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
