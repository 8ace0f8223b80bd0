"""What a report (training/analyze.py) found in one model, kept beside it: `analysis.json` of a pipeline folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from freqgate_dit.evaluations import check_kinds, check_protocol, refuse_absolute_paths, refuse_other_folder
from freqgate_dit.files import read_json, write_text


FILE = "analysis.json"
VERDICTS = ("supported", "not supported", "undecided")


@dataclass(frozen=True)
class Findings:
    """Claims about a model, and what was measured for or against each.

    Args:
        claims: `[{"claim": str, "verdict": one of `VERDICTS`, "evidence": str}, ...]`.
        protocol: how it was measured: name -> str, number or bool.
        command: what measures it again.

    Raises:
        ValueError: if something is missing or of another kind; names it.
    """

    claims: list[dict]
    protocol: dict
    command: str

    def __post_init__(self):
        check_kinds("`Findings`", vars(self), {"claims": list, "protocol": dict, "command": str})
        if not self.claims:
            raise ValueError("`claims` is empty: give at least one.")
        for index, claim in enumerate(self.claims):
            check_kinds(f"`claims[{index}]`", claim, dict.fromkeys(("claim", "verdict", "evidence"), str))
            if claim["verdict"] not in VERDICTS:
                raise ValueError(
                    f"`claims[{index}]` has the verdict {claim['verdict']!r}: choose one of {', '.join(VERDICTS)}."
                )
        check_protocol(self.protocol)

    @classmethod
    def load(cls, path: Path) -> "Findings":
        """Read a file; what this version does not know is left out.

        Raises:
            ValueError: if it holds no findings; names the file and what is wrong.
        """
        values = read_json(path)
        names = ("claims", "protocol", "command")
        try:
            check_kinds("it", values, dict.fromkeys(names, object))
            return cls(**{name: values[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{path.name}: {error} Make the report again, or delete the file.") from error

    def save(self, folder: str | Path) -> Path:
        """Write `analysis.json` into a pipeline folder, whole or not at all.

        Raises:
            ValueError: if it is no pipeline folder, or a text has an absolute path in it.
        """
        refuse_other_folder(folder)
        evidence = [text for claim in self.claims for text in claim.values()]
        refuse_absolute_paths("the analysis", self.command, *self.protocol.values(), *evidence)
        path = Path(folder) / FILE
        write_text(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")
        return path
