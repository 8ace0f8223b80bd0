"""Measurements of a pipeline, kept beside it: `evaluation/NAME.json` of a pipeline folder."""

import inspect
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from freqgate_dit.files import read_json, write_text


@dataclass(frozen=True)
class Evaluation:
    """A measurement of a pipeline, as `evaluation/NAME.json` holds it under the same names.

    Args:
        title: what was measured, in a few words.
        dataset: `{"name": str, "hub_id": str or None, "split": str}` of what it was measured on or against.
        metrics: `[{"name": str, "type": str, "value": float, "format": "percent" or "number"}, ...]`. `type` is the
            kind of metric, such as "accuracy" or "fid"; a percentage is given as its share of 1.
        protocol: all that must be the same for another number to be comparable: name -> str, number or bool.
        command: what measures it again.
        notes: a sentence for the reader.

    Raises:
        ValueError: if something is missing or of another kind, or a number is not finite; names it.
    """

    title: str
    dataset: dict
    metrics: list[dict]
    protocol: dict
    command: str
    notes: str | None = None

    def __post_init__(self):
        kinds = {"title": str, "dataset": dict, "metrics": list, "protocol": dict, "command": str}
        check_kinds("the evaluation", vars(self), kinds)
        check_kinds("`dataset`", self.dataset, {"name": str, "split": str, "hub_id": (str, type(None))})
        if not self.metrics:
            raise ValueError("`metrics` is empty: give at least one.")
        for index, metric in enumerate(self.metrics):
            where = f"`metrics[{index}]`"
            check_kinds(where, metric, {"name": str, "type": str, "value": (int, float), "format": str})
            if isinstance(metric["value"], bool) or not math.isfinite(metric["value"]):
                raise ValueError(f"{where} has the value {metric['value']}, which is no finite number: give one.")
            if metric["format"] not in ("percent", "number"):
                raise ValueError(f"{where} has the format {metric['format']!r}: choose 'percent' or 'number'.")
        check_protocol(self.protocol)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read a file; what this version does not know is left out.

        Raises:
            ValueError: if it is no evaluation; names the file and what is wrong.
        """
        values = read_json(path)
        fields = inspect.signature(cls).parameters
        missing = [name for name in fields if name not in values and name != "notes"]
        if missing:
            raise ValueError(f"{path.name} lacks {missing[0]!r}: an evaluation has {', '.join(fields)}.")
        try:
            return cls(**{name: values[name] for name in fields if name in values})
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def save(self, path: Path):
        """Write the file, whole or not at all, and its folder if need be.

        Raises:
            ValueError: if a text has an absolute path in it, which says nothing on other machines.
        """
        refuse_absolute_paths("the evaluation", self.command, self.notes, *self.protocol.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def add_evaluation(folder: str | Path, name: str, evaluation: Evaluation) -> Path:
    """Save `evaluation` as `evaluation/NAME.json` of a pipeline folder, in place of one of that name.

    The card does not know of it until it is written anew (`freqgate_dit.model_card.write_card`).

    Raises:
        ValueError: if `folder` is no pipeline folder or `name` cannot be a file's.
    """
    refuse_other_folder(folder)
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise ValueError(f"`name` ({name!r}) becomes a file's name: use letters, digits, '-', '_' and '.' only.")
    path = Path(folder) / "evaluation" / f"{name}.json"
    evaluation.save(path)
    return path


def refuse_other_folder(folder: str | Path):
    """Raise if it is no pipeline folder."""
    if not (Path(folder) / "model_index.json").is_file():
        raise ValueError(f"`folder` ({folder}) is no pipeline folder, for it has no model_index.json: name another.")


def check_protocol(protocol: dict):
    """Raise unless all is text or finite numbers."""
    check_kinds("`protocol`", protocol, dict.fromkeys(protocol, (str, int, float, type(None))))
    for name, value in protocol.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`protocol` has {name!r} {value}, which is no finite number: give one.")


def refuse_absolute_paths(where: str, *texts):
    """Raise if a text names a place on this machine."""
    for text in texts:
        found = re.search(r"(?:^|[\s\"'=(])((?:~|/[\w.-]+|[A-Za-z]:)[/\\][\w.-]\S*)", str(text))
        if found:
            raise ValueError(f"{where} has the absolute path {found[1]} in it: give a relative one.")


def check_kinds(where: str, values: dict, kinds: dict):
    """Raise unless `values` has every key of `kinds`, of that kind."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} ({values!r}) must be a dictionary with {', '.join(kinds)}.")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{where} lacks {name!r}: it has {', '.join(kinds)}.")
        if not isinstance(values[name], kind):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where} has {name!r} {values[name]!r}: expected {wanted}.")
