"""What a pipeline folder or repository must be for this package to load it, said in one sentence where it is not."""

import importlib
import inspect
import os
import re
from collections.abc import Container, Iterable
from pathlib import Path

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open

from freqgate_dit.files import read_json
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline, __version__


INDEX = "model_index.json"
CARD = "README.md"
# File of a repository, without .py -> where its classes are in this package.
PACKAGE_MODULES = {
    "scheduling_spectral_euler": "freqgate_dit.scheduling_spectral_euler",
    "transformer_freqgate_dit": "freqgate_dit.transformer_freqgate_dit",
}
# From which diffusers loads components.
LIBRARIES = ("diffusers", "transformers")
# What a folder of weights is loaded with, besides the weights. Code is not among it.
SMALL_FILES = (".json", ".txt", ".model")
WEIGHTS = (".safetensors", ".bin")
# What diffusers itself writes into the config of a model. (`auto_map` names code, for its `AutoModel` alone.)
DIFFUSERS_OPTIONS = ("quantization_config", "auto_map")
# As the headers of safetensors call them.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


# What else a pipeline folder has: what it is, how it was trained, what was measured, and its pictures.
OWN_FILES = (
    INDEX,
    CARD,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "analysis.json",
    "posthoc_ema.json",
    "training_config.yaml",
    "training_summary.json",
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
OWN_FOLDERS = {"evaluation": (".json",), "figures": PICTURES}


class DamagedPipelineError(OSError):
    """Files of a pipeline are missing or cut short."""


def files_to_load(
    files: Iterable[str],
    components: Iterable[str],
    variant: str | None = None,
    code: bool = False,
    pickled: bool = False,
) -> list[str]:
    """Of a repository's files those that a pipeline is loaded from.

    Args:
        files: paths in the repository.
        components: folders that are loaded.
        variant: of the weights, such as "fp16"; a folder that has none of it is loaded in full precision.
        code: also the Python files.
        pickled: pickled weights (`use_safetensors=False`), which otherwise are only where there are no others.
    """
    kept = [INDEX]
    for folder in components:
        names = [name for name in files if name.startswith(f"{folder}/")]
        weights = [name for name in names if name.endswith(WEIGHTS)]
        weights = [name for name in weights if name.endswith(".bin" if pickled else ".safetensors")] or weights
        of_variant = [name for name in weights if variant and weights_variant(name) == variant]
        kept += of_variant or [name for name in weights if weights_variant(name) is None]
        kept += [name for name in names if name.endswith(SMALL_FILES)]
    if code:
        kept += [name for name in files if name.endswith(".py")]
    return kept


def split_strange(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a pipeline folder, as paths in it: those that a pipeline has, and all others."""
    index = read_json(folder / INDEX)
    components = component_classes(index)
    code = {f"{name}/{library}.py" for name, (library, _) in components.items()}
    if isinstance(index["_class_name"], list):
        code.add(f"{index['_class_name'][0]}.py")
    known, strange = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        place, _, file = name.rpartition("/")
        is_known = (
            (not place and file in OWN_FILES)
            or name in code
            or (place in components and file.endswith((*SMALL_FILES, *WEIGHTS)) and not file.startswith("."))
            or any(place == own and file.endswith(suffixes) for own, suffixes in OWN_FOLDERS.items())
        )
        (known if is_known else strange).append(name)
    return known, strange


def refuse_links(folder: Path):
    """Raise if what a pipeline has in `folder` is a link that leaves it."""
    names = (*component_classes(read_json(folder / INDEX)), *OWN_FOLDERS, *split_strange(folder)[0])
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{name} in {str(folder)!r} is a link to a place outside of it: put a copy there (`cp -rL` makes a "
                "folder without links)."
            )


def weights_variant(name: str) -> str | None:
    """The fp16 of `diffusion_pytorch_model.fp16.safetensors`, whole, in pieces or their index; `None` without one."""
    name = name.split("/")[-1]
    index = re.fullmatch(r".+\.index(?:\.(.+))?\.json", name)
    if index:
        return index[1]
    match = re.fullmatch(r"[^.]+\.([^.]+?)(-\d{5}-of-\d{5})?\.\w+", name)
    return match[1] if match else None


def variants_of(component: Path) -> list[str | None]:
    """Of which variants a component's folder has weights."""
    return sorted({weights_variant(path.name) for path in component.iterdir() if is_weights(path.name)}, key=str)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or is the index of the pieces that do."""
    return name.endswith(WEIGHTS) or ".index." in name


def component_classes(index: dict) -> dict[str, list[str]]:
    """Component -> [library, class] of an index, without components that are not there."""
    return {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and [type(part) for part in value] == [str, str] and not name.startswith("_")
    }


def use_package_classes(index: dict):
    """Put this package's classes in place of a repository's own."""
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][1]
    for name, (library, class_name) in component_classes(index).items():
        index[name] = [PACKAGE_MODULES.get(library, library), class_name]


def check_folder(
    folder: str | os.PathLike,
    variant: str | None = None,
    without: Container[str] = (),
    class_name: str = FreqGateDiTPipeline.__name__,
):
    """Raise unless `folder` is a pipeline folder that this version of the package can load.

    Args:
        variant: of the weights.
        without: components that are not loaded from the folder.
        class_name: of the pipeline, for subclasses.

    Raises:
        ValueError: if it is something else, or was made by a newer version.
        DamagedPipelineError: if files are missing or damaged.
    """
    folder = Path(folder)
    refuse_without_index([path.name for path in folder.iterdir()], folder)
    index = read_json(folder / INDEX)
    refuse_other_pipeline(index, folder, class_name)
    for name, (library, class_name) in component_classes(index).items():
        if name not in without:
            refuse_incomplete(folder, name, variant)
        # The config of a scheduler keeps options of others that it was made from; that of a model has its own only.
        config_file = folder / name / "config.json"
        if library in PACKAGE_MODULES and config_file.is_file():
            _refuse_unknown_options(index, folder, package_class(library, class_name), read_json(config_file))
            if name not in without:
                refuse_misfit(folder, name, package_class(library, class_name), variant)


def refuse_incomplete(folder: Path, component: str, variant: str | None = None, any_variant: bool = False):
    """Raise if files of a component are missing or cut short: its weights of `variant`, or all that are there."""
    names = [f"{component}/{path.name}" for path in (folder / component).glob("*")]
    lacking = missing_part(names, component, variant, any_variant)
    if lacking:
        raise DamagedPipelineError(
            f"the pipeline {str(folder)!r} lacks {lacking}: copy it anew (of a repository: load it once while online)."
        )
    for name in names if any_variant else files_to_load(names, [component], variant):
        if name.endswith(".safetensors"):
            refuse_damaged(folder / name)


def refuse_incomplete_repository(
    names: Iterable[str], repo_id: str, components: Iterable[str], variant: str | None = None, weights: bool = True
):
    """Raise if `names`, the files of a repository, do not have all that a pipeline is loaded from."""
    for component in components:
        here = [name for name in names if name.startswith(f"{component}/")]
        lacking = missing_part(here, component, variant, weights=weights)
        if lacking:
            raise DamagedPipelineError(
                f"the repository {repo_id!r} lacks {lacking}: name an older `revision`, or ask its author to push it "
                "again."
            )


def missing_part(
    names: list[str], component: str, variant: str | None, any_variant: bool = False, weights: bool = True
) -> str | None:
    """What `names`, the files of a component, lack for it to be loaded, in words; `None` if they lack nothing.

    Args:
        variant: of the weights, or whichever are there with `any_variant`; without `weights` they are not looked for.
    """
    if not any(name.endswith("config.json") for name in names):
        return f"the configuration of its {component}"
    if not weights or f"{component}/config.json" not in names:  # a scheduler or a tokenizer has none
        return None
    found = [name for name in names if name.endswith(WEIGHTS)]
    needed = found if any_variant else [name for name in files_to_load(names, [component], variant) if name in found]
    if not needed:
        variants = sorted({weights_variant(name) for name in found} - {None})
        there = f"only those of {' and '.join(map(repr, variants))} are there" if variants else "none at all"
        return f"the weights of its {component} (`variant` {variant!r}; {there})"
    for name in needed:
        piece = re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.\w+)", name)
        pieces = [f"{piece[1]}{number:05d}{piece[2]}" for number in range(1, int(piece[3]) + 1)] if piece else []
        for other in pieces:
            if other not in names:
                return f"a piece of the weights of its {component}, {other}"
    return None


def refuse_damaged(file: Path):
    """Raise if a file of weights is cut short or otherwise unreadable."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise DamagedPipelineError(
            f"the weights {file.parent.name}/{file.name} are damaged or cut short ({error}): download them again with "
            "`force_download=True`, or copy them anew."
        ) from error


def refuse_misfit(folder: Path, component: str, cls: type, variant: str | None = None):
    """Raise unless the weights of a model of this package, by names, shapes and types, are those of its config.

    Asked of the headers of the files, before anything is built: a missing matrix would be made up, and a config may
    claim more blocks than any memory holds. (Pickled weights have no header, quantised ones other shapes.)
    """
    config = read_json(folder / component / "config.json")
    names = files_to_load(
        [f"{component}/{path.name}" for path in (folder / component).glob("*")], [component], variant
    )
    files = [folder / name for name in names if name.endswith(".safetensors")]
    if not files or "quantization_config" in config:
        return
    found = {}
    for file in files:
        refuse_damaged(file)
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}
            found |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    blocks = {name.split(".")[1] for name in found if name.startswith("transformer_blocks.")}
    if config.get("num_layers", len(blocks)) != len(blocks):
        problem = f"{len(blocks)} blocks, where `num_layers` is {config['num_layers']}"
    else:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in cls.from_config(config).state_dict().items()}
        problem = _difference(expected, found)
    if problem:
        adapted = any(".base_layer." in name for name in found)
        remedy = "save the model after `fuse_lora` and `unload_lora`" if adapted else "copy both anew"
        raise DamagedPipelineError(
            f"the weights of the {component} in {str(folder)!r} do not fit its config.json: they have {problem}. "
            f"Remedy: {remedy}."
        )


def _difference(expected: dict[str, tuple], found: dict[str, tuple]) -> str | None:
    """The first thing that weights, name -> (shape, type), lack or have too much, in words."""
    for name, shape in expected.items():
        if name not in found:
            return f"no {name}"
        if found[name][0] != shape:
            return f"{name} of shape {found[name][0]} in place of {shape}"
        if found[name][1] not in FLOATS:
            return f"{name} of type {found[name][1]} in place of floating-point numbers"
    return next((f"{name} besides" for name in found if name not in expected), None)


def refuse_without_index(names: Iterable[str], place: str | os.PathLike):
    """Raise unless `names`, the files of a folder or repository, have the index of a pipeline among them."""
    names = set(names)
    if INDEX in names:
        return
    start = f"{str(place)!r} is not a pipeline, for it has no {INDEX}"
    if {"state.json", "manifest.json"} <= names:
        raise ValueError(
            f"{start}: it is a checkpoint, which training resumes from; the run's pipeline is in its folder "
            "`pipeline`, and `--init_from` starts a new run from a checkpoint."
        )
    if {"config.yaml", "pipeline"} <= names:
        raise ValueError(f"{start}: it is a run, whose pipeline is {str(Path(place) / 'pipeline')!r}.")
    if "config.json" in names:
        raise ValueError(
            f"{start}: it is a model alone; load that by `from_pretrained` of its class or of `AutoModel`."
        )
    raise ValueError(f"{start}: name the folder or repository that `save_pretrained` or the trainer wrote.")


def refuse_other_pipeline(index: dict, place: str | os.PathLike, expected: str = FreqGateDiTPipeline.__name__):
    """Raise if an index belongs to another pipeline class, or needs what this version of the package does not have."""
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name is None:
        raise ValueError(f"{INDEX} of {str(place)!r} names no class (`_class_name`): copy it anew.")
    if class_name == "DiTPipeline":
        raise ValueError(
            f"{str(place)!r} holds diffusers' DiTPipeline: make it one of this package with `freqgate-dit convert`."
        )
    if class_name not in (expected, FreqGateDiTPipeline.__name__):
        raise ValueError(
            f"{str(place)!r} holds a {class_name}, not a {FreqGateDiTPipeline.__name__}: load it with "
            "`DiffusionPipeline.from_pretrained`."
        )
    for library, component_class in component_classes(index).values():
        known = package_class(library, component_class) if library in PACKAGE_MODULES else library in LIBRARIES
        if not known and (library in PACKAGE_MODULES or _is_newer(index)):
            _refuse_newer(index, place, f"the class {component_class}")
    if class_name == FreqGateDiTPipeline.__name__:
        _refuse_unknown_options(index, place, FreqGateDiTPipeline, index)


def package_class(library: str, class_name: str) -> type | None:
    """The class of this package that a component of a repository is an instance of."""
    return getattr(importlib.import_module(PACKAGE_MODULES[library]), class_name, None)


def _is_newer(index: dict) -> bool:
    """Whether a newer version of the package wrote `index`: what is unknown in it may be a file of that version."""
    return Version(index.get("_freqgate_dit_version", "0")) > Version(__version__)


def _refuse_unknown_options(index: dict, place: str | os.PathLike, cls: type, config: dict):
    known = (*inspect.signature(cls.__init__).parameters, *DIFFUSERS_OPTIONS)
    for name in config:
        if not name.startswith("_") and name not in known:
            _refuse_newer(index, place, f"the option `{name}` of {cls.__name__}")


def _refuse_newer(index: dict, place: str | os.PathLike, missing: str):
    raise ValueError(
        f"{str(place)!r} needs {missing}, which freqgate_dit {__version__} does not have; it was made by version "
        f"{index.get('_freqgate_dit_version', '(unknown)')}: `pip install --upgrade freqgate-dit`."
    )
