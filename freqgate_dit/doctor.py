"""What is installed, what the machine can do, and what of it is known not to work, with what to do.

The report must come out where torch or diffusers are broken. So this process imports neither: a process of its own
(`probe`) looks at the machine and imports the package, and what stops it is part of the report.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


NAME = "freqgate-dit"
CHECKOUT = Path(__file__).resolve().parents[1]
# What adds something to the package: distribution -> what it is for.
OPTIONAL = {
    "datasets": "training",
    "psutil": "training",
    "matplotlib": "figures",
    "tensorboard": "curves of a training",
    "peft": "LoRA",
    "clean-fid": "FID",
    "scipy": "clean-fid",
    "torchvision": "clean-fid",
}
# Distributions whose own requirements are checked too: they are often upgraded one without the other.
CHECKED = ("diffusers", "transformers", "accelerate", "huggingface_hub", "datasets", "peft", "torchvision")
SYMPTOMS = {"torchvision": " (importing it fails with `operator torchvision::nms does not exist`)"}
# Default of the trainer's `cache_dir`.
DATA_CACHE = "~/.cache/freqgate_dit"

VersionOf = Callable[[str], str | None]


# -- versions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Installed versions that are worth a word.

    Args:
        packages: distribution -> versions as in a requirement, "" for any; it applies where all of them are installed.
        sentence: what goes wrong, and what to do.
    """

    packages: dict[str, str]
    sentence: str

    def applies(self, version_of: VersionOf) -> bool:
        versions = {name: version_of(name) for name in self.packages}
        return all(
            versions[name] is not None and SpecifierSet(wanted).contains(versions[name], prereleases=True)
            for name, wanted in self.packages.items()
        )


# Beside the requirements of installed packages. Nothing here stops this package, which has a Frechet distance of its
# own.
KNOWN = (
    Known(
        {"clean-fid": "", "scipy": ">=1.18"},
        "clean-fid's own Frechet distance fails with SciPy 1.18, which removed `scipy.linalg.sqrtm(disp=)`; if you "
        "call it: `pip install 'scipy<1.18'`.",
    ),
    Known(
        {"clean-fid": "", "scipy": ">=1.11.2,<1.13"},
        "clean-fid's own Frechet distance can be wrong with SciPy 1.11.2 to 1.12, whose `sqrtm` gave large imaginary "
        "parts; if you call it: `pip install 'scipy>=1.13,<1.18'`.",
    ),
)


def installed_version(name: str) -> str | None:
    """Of a distribution, or of "python"; `None` if it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> list[Requirement]:
    """What an installed distribution requires, Python included."""
    python = metadata.metadata(name)["Requires-Python"]
    return [Requirement(word) for word in (f"python{python or ''}", *(metadata.requires(name) or ()))]


def checkout_requirements() -> list[Requirement]:
    """What this package requires, as the checkout's pyproject.toml says."""
    project = _pyproject()
    words = [f"python{project['requires-python']}", *project["dependencies"]]
    for extra, dependencies in project["optional-dependencies"].items():
        words += [f"{dependency} ; extra == '{extra}'" for dependency in dependencies]
    return [Requirement(word) for word in words]


def _pyproject() -> dict:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def own_requirements() -> list[Requirement]:
    """As installed, so that nothing is written twice; a checkout need not be installed."""
    return checkout_requirements() if installed_version(NAME) is None else requirements(NAME)


def always_needed(needed: list[Requirement]) -> list[Requirement]:
    """Without those of extras and those for other platforms."""
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def unmet(owner: str, needed: list[Requirement], version_of: VersionOf) -> list[str]:
    """A sentence for each of `owner`'s requirements that the installed versions do not meet, with what to do."""
    sentences = []
    for requirement in needed:
        wanted = f"{requirement.name}{requirement.specifier}"
        version = version_of(requirement.name)
        if version is None:
            sentences.append(f"{owner} needs {wanted}, which is not installed: `pip install '{wanted}'`.")
        elif not requirement.specifier.contains(version, prereleases=True):
            sentences.append(f"{owner} needs {wanted}, but {version} is installed{_remedy(owner, requirement)}.")
    return sentences


def _remedy(owner: str, requirement: Requirement) -> str:
    if requirement.name == "python":
        return ": make a new environment with that"
    if owner == NAME:
        return f": `pip install '{requirement.name}{requirement.specifier}'`"
    return f"{SYMPTOMS.get(owner, '')}: install releases of {owner} and {requirement.name} that belong together"


def version_problems(version_of: VersionOf = installed_version) -> list[str]:
    """What this package, or what it builds on, requires of installed versions and does not get."""
    own = own_requirements()
    needed = always_needed(own)
    # Optional packages may be missing, but not be too old.
    needed += [one for one in own if one not in needed and one.name in OPTIONAL and version_of(one.name) is not None]
    sentences = unmet(NAME, needed, version_of)
    for owner in CHECKED:
        if version_of(owner) is not None:
            sentences += unmet(owner, always_needed(requirements(owner)), version_of)
    return sentences


def known(version_of: VersionOf = installed_version) -> list[str]:
    """What `KNOWN` says about the installed versions."""
    return [entry.sentence for entry in KNOWN if entry.applies(version_of)]


# -- the machine ------------------------------------------------------------------------------------------------------


def without_user(address: str) -> str:
    """An address, or a text with addresses, without the users and passwords that they may have before their hosts."""
    return re.sub(r"(?<=://)[^/\s@]+@", "", address)


def look():
    """Print a line of JSON for whatever can be found out, then import the package. Runs in a process of its own."""
    from huggingface_hub import constants

    found = {
        "endpoint": without_user(constants.ENDPOINT),
        "offline": constants.HF_HUB_OFFLINE,
        "cache": constants.HF_HUB_CACHE,
    }
    found["token_stored"] = Path(constants.HF_TOKEN_PATH).is_file()
    print(json.dumps({"hub": found}), flush=True)

    from freqgate_dit.devices import describe_machine

    print(json.dumps({"machine": describe_machine()}), flush=True)

    import freqgate_dit.pipelines.pipeline_freqgate_dit  # noqa: F401


def probe() -> tuple[dict, list[str]]:
    """What `look` printed, by name; and a sentence on what stopped it, if it was stopped."""
    command = [sys.executable, "-c", "from freqgate_dit import doctor; doctor.look()"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if done.returncode == 0:
        return found, []
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return found, [f"the package cannot be imported ({last}): reinstall what is named there."]


def system_rows() -> dict[str, str]:
    """What can be said of the machine without torch."""
    rows = {"system": f"{platform.system()} {platform.release()} {platform.machine()}", "CPU": _cpu_name()}
    if hasattr(os, "sysconf"):
        rows["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    return rows


def machine_rows(machine: dict) -> dict[str, str]:
    """What torch finds on the machine (`describe_machine`)."""
    build = f"built for CUDA {machine['cuda_build']}" if machine["cuda_build"] else "built without CUDA"
    fast = ", ".join(machine["fast_bf16"])
    return {
        "cores": f"{machine['cores']} for this process",
        "torch on CPU": f"threads: {machine['threads']}, instructions: {machine['instructions']}",
        **(machine["accelerators"] or {"GPU": f"none that torch finds; it was {build}"}),
        "bfloat16": f"fast on {fast}" if fast else "slow here, so that float32 is chosen",
    }


def _cpu_name() -> str:
    """As Linux has it; elsewhere Python knows as much."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine_notes(machine: dict, environment: Mapping[str, str]) -> list[str]:
    """What makes this machine slower than it could be, with what to do."""
    if machine["accelerators"]:
        return []
    notes = []
    if environment.get("OMP_NUM_THREADS") == "1" and machine["cores"] > 1:
        notes.append(
            f"OMP_NUM_THREADS is 1, so that sampling uses 1 of {machine['cores']} cores: unset it. (The trainer uses "
            "them all the same, because `accelerate launch` sets this to 1 by itself.)"
        )
    if "cpu" not in machine["fast_bf16"]:
        notes.append(
            "this CPU has no bfloat16 units (AVX512-BF16, AMX), with which the models run several times faster: think "
            "of a GPU or another CPU before a long training."
        )
    if shutil.which("nvidia-smi") and machine["cuda_build"]:
        notes.append(
            "there is an NVIDIA driver, but torch finds no GPU: see by `nvidia-smi` whether there is one, and whether "
            f"the driver is new enough for CUDA {machine['cuda_build']}, which this torch was built for."
        )
    elif shutil.which("nvidia-smi"):
        notes.append(
            "there is an NVIDIA driver, but this torch was built without CUDA: install one with CUDA, as "
            "https://pytorch.org/get-started/locally says."
        )
    return notes


def hub_rows(hub: dict, environment: Mapping[str, str]) -> dict[str, str]:
    """The Hub and the caches (`look`). Whether there is a token, never which."""
    token = "none: only public repositories can be read (`hf auth login`)"
    if hub["token_stored"]:
        token = "stored by `hf auth login`; not shown or checked here"
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        if environment.get(name):
            token = f"from {name}; not shown or checked here"
    return {
        "endpoint": hub["endpoint"],
        "token": token,
        "offline mode": "on (HF_HUB_OFFLINE): nothing is downloaded or uploaded" if hub["offline"] else "off",
        "model cache": _place(hub["cache"]),
        "data cache": f"{_place(DATA_CACHE)} (the trainer's --cache_dir)",
    }


def _place(folder: str) -> str:
    """A folder without the name of the user, and the room on its disk."""
    path = Path(folder).expanduser()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"{_shown(path)}, {shutil.disk_usage(existing).free / 2**30:.0f} GiB free"


def _shown(path: Path) -> str:
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


# -- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """What was found: rows of name and value by section, what does not work, and what is only worth knowing."""

    sections: dict[str, dict[str, str]]
    problems: list[str]
    notes: list[str]

    def describe(self) -> str:
        """The report, as lines of text."""
        lines = []
        for title, rows in self.sections.items():
            lines += [title, *(f"  {name:<16} {value}" for name, value in rows.items()), ""]
        for title, sentences in (("Problems", self.problems), ("Worth knowing", self.notes)):
            if sentences:
                lines += [title, *map(_item, sentences), ""]
        if not self.problems:
            lines.append("No problems found.")
        return "\n".join(lines).strip()


def _item(sentence: str) -> str:
    return textwrap.fill(
        sentence, 100, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def diagnose() -> Diagnosis:
    """Look at everything. It takes some seconds, because a process of its own imports the package."""
    found, problems = probe()
    sections = {"Packages": package_rows(), "Machine": system_rows()}
    problems += version_problems()
    notes = known()
    if "machine" in found:
        sections["Machine"] |= machine_rows(found["machine"])
        notes += machine_notes(found["machine"], os.environ)
    if "hub" in found:
        sections["Hugging Face Hub, caches"] = hub_rows(found["hub"], os.environ)
    return Diagnosis(sections, problems, notes)


def package_rows() -> dict[str, str]:
    """Names and versions: this package, what it requires, and what is optional."""
    version = installed_version(NAME)
    own = f"{version}, installed" if version else f"{_pyproject()['version']}, a checkout that is not installed"
    names = [one.name for one in always_needed(own_requirements())]
    return {
        NAME: f"{own}, in {_shown(Path(__file__).parent)}",
        **{name: installed_version(name) or "not installed" for name in names},
        **{name: installed_version(name) or f"not installed ({use})" for name, use in OPTIONAL.items()},
    }
