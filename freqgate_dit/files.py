"""Files and folders that are there whole or not at all, whenever the process dies."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


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


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Fill `FOLDER.tmp` with `write`, then give it its name. What has that name already stays if anything fails.

    It is moved to `FOLDER.replaced` for the moment between two renames, and deleted after: a process that dies there
    leaves it under that name.
    """
    temporary, replaced = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("tmp", "replaced"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path):
    """Have the disk hold what was written to a file, or which files a folder has."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
