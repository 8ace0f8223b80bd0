"""Fine-tuning: start from the weights of another model as far as they fit, and say what did not."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from freqgate_dit.convert import from_diffusers, load_official, unique_names
from freqgate_dit.image_folder import as_text
from freqgate_dit.training.checkpoints import average_group, complete_checkpoints, why_incomplete


CLASS_TABLE = "class_embed.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = "diffusion_pytorch_model.bin"
# What is downloaded of a pipeline's or a model's repository. As * reaches into subfolders, each pattern starts with a
# whole name: autoencoder, text encoder and half-precision copies stay where they are.
HUB_FILES = ["model_index.json", "scheduler/scheduler_config.json"] + [
    folder + name
    for folder in ("", "transformer/")
    for name in ("config.json", WEIGHTS, INDEX, "diffusion_pytorch_model-*-of-*.safetensors")
]
# And where there are none of these weights, which is so in old repositories of diffusers' DiT.
PICKLED_FILES = [PICKLED, f"transformer/{PICKLED}"]


@dataclass
class Source:
    """Weights to start from.

    Args:
        place: what they were read from, for messages.
        tensors: by parameter name.
        config: arguments that the model was built with, as far as they are known.
        class_rows: class name -> row of the class table; empty if the names are not known.
        prediction_type: what the model was trained to predict, or `None` if it is not known.
    """

    place: str
    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    class_rows: dict[str, int] = field(default_factory=dict)
    prediction_type: str | None = None


# -- reading ----------------------------------------------------------------------------------------------------------


def read_source(init_from: str, revision: str | None = None) -> Source:
    """Weights of a pipeline folder, a model folder, a checkpoint or a run of this trainer, or a Hub repository.

    Of a run its newest complete checkpoint is taken, or its pipeline if there is none; of a checkpoint the first
    weight average, which is what the pipeline publishes. Pipeline and model may also be diffusers' `DiTPipeline` and
    `DiTTransformer2DModel`; a file is a checkpoint of the official DiT. Both are converted (`freqgate_dit.convert`),
    without predicted variance.

    Raises:
        ValueError: if there is nothing of the kind, or it is damaged or incomplete; says what was looked for.
    """
    folder = Path(init_from).expanduser()
    if folder.is_file():
        return _from_official(init_from, folder)
    if not folder.is_dir():
        folder = _download(init_from, revision)
    elif (folder / "config.yaml").is_file():
        folder = _result_of_run(init_from, folder)
    for name, read in (
        ("model_index.json", _from_pipeline),
        ("config.json", _from_model),
        ("state.json", _from_checkpoint),
    ):
        if (folder / name).is_file():
            return read(init_from, folder)
    raise ValueError(
        f"`init_from` ({init_from}) holds no model: looked for model_index.json (a pipeline), config.json (a model), "
        "state.json (a checkpoint) and config.yaml (a run of this trainer)."
    )


def _download(name: str, revision: str | None) -> Path:
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        if not any((folder / part / file).is_file() for part in ("", "transformer") for file in (WEIGHTS, INDEX)):
            snapshot_download(name, revision=revision, allow_patterns=PICKLED_FILES)
        return folder
    except (OSError, HFValidationError) as error:  # the Hub's other errors are OSErrors
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`init_from` ({name}) is not a folder, and cannot be read from the Hub as a repository either "
            f"({type(error).__name__}: {reason}). Check the spelling; for a private one, `hf auth login`."
        ) from error


def _result_of_run(place: str, folder: Path) -> Path:
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if checkpoints:
        return checkpoints[-1]
    if (folder / "pipeline").is_dir():
        return folder / "pipeline"
    raise ValueError(f"`init_from` ({place}) is a run without a complete checkpoint or a pipeline: name another.")


def _from_checkpoint(place: str, folder: Path) -> Source:
    problem = why_incomplete(folder)
    if problem:
        raise ValueError(f"`init_from` ({place}): the checkpoint {folder.name} {problem}. Name a complete one.")
    state = json.loads((folder / "state.json").read_text())
    average = state["ema"][0]
    return Source(
        f"{place} (step {state['step']}, average {average})",
        _load(place, folder / f"{average_group(average)}.safetensors"),
        state["config"],
        {as_text(name): row for row, name in enumerate(state["class_names"])},
        state["config"]["prediction_type"],
    )


def _from_pipeline(place: str, folder: Path) -> Source:
    index = json.loads((folder / "model_index.json").read_text())
    source = _from_model(place, folder / "transformer")
    source.class_rows = {as_text(name): row for row, name in unique_names(index.get("id2label") or {}).items()}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    source.prediction_type = index.get("prediction_type")
    if source.prediction_type is None and scheduler.is_file():
        source.prediction_type = json.loads(scheduler.read_text()).get("prediction_type")
    return source


def _from_model(place: str, folder: Path) -> Source:
    config = folder / "config.json"
    if config.is_file() and _is_diffusers_dit(json.loads(config.read_text())):
        return _from_diffusers(place, folder)
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    tensors = {name: tensor for file in files for name, tensor in _load(place, folder / file).items()}
    return Source(place, tensors, json.loads(config.read_text()) if config.is_file() else {})


def _is_diffusers_dit(config: dict) -> bool:
    """Whether it is a `DiTTransformer2DModel`'s; diffusers once called that, and others, `Transformer2DModel`."""
    old = config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    return old or config.get("_class_name") == DiTTransformer2DModel.__name__


def _from_diffusers(place: str, folder: Path) -> Source:
    safe = any((folder / file).is_file() for file in (WEIGHTS, INDEX))
    if not safe and not (folder / PICKLED).is_file():
        raise ValueError(f"`init_from` ({place}) lacks {WEIGHTS} or {PICKLED}, the weights of its transformer.")
    try:
        model = from_diffusers(DiTTransformer2DModel.from_pretrained(folder, use_safetensors=safe))
    except (OSError, ValueError) as error:
        raise ValueError(f"`init_from` ({place}), a {DiTTransformer2DModel.__name__}: {error}") from error
    return Source(place, model.state_dict(), dict(model.config))


def _from_official(place: str, file: Path) -> Source:
    try:
        model = load_official(file)
    except ValueError as error:
        raise ValueError(f"`init_from` ({place}), read as an official DiT checkpoint: {error}") from error
    return Source(place, model.state_dict(), dict(model.config), prediction_type="epsilon")


def _load(place: str, file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(f"`init_from` ({place}) lacks {file.name}, the weights of its transformer.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"`init_from` ({place}): {file.name} is damaged ({error}). Copy it again.") from error


# -- copying ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: torch.nn.Module, source: Source, class_names: tuple[str, ...]) -> str:
    """Copy into `model` every parameter of `source` that has the same name and shape, in the model's dtype.

    Statistics of the source's data (the buffers of preconditioning) are left out: the trainer measures this run's.

    Rows of the class table go by class name, the null condition's by its place at the end; classes that the source
    does not have keep their fresh rows.

    Returns:
        What was loaded and what was not, as lines for the user.

    Raises:
        ValueError: if no matrix of a transformer block fits; the model is as it was then.
    """
    own = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    given = {name: tensor for name, tensor in source.tensors.items() if name not in buffers}
    given, views = _with_views(own, given)
    differing = _differing(model.config, source.config)
    _refuse_other_model(own, source, differing)
    lines = [f"  {line}" for line in (differing, views) if line]
    count = 0
    for name in own.keys() & given.keys() - {CLASS_TABLE}:
        if own[name].shape == given[name].shape:
            own[name].copy_(given[name])
            count += own[name].numel()
    if CLASS_TABLE in own and CLASS_TABLE in given:
        rows, line = _copy_class_rows(own[CLASS_TABLE], given[CLASS_TABLE], source.class_rows, class_names)
        count += rows * own[CLASS_TABLE].shape[1]
        lines.append(line)
    share = count / sum(tensor.numel() for tensor in own.values())
    head = f"initialised from {source.place}: {share:.1%} of the parameters"
    return "\n".join([head, *lines, *_left_out(own, given)])


def _with_views(own: dict, given: dict) -> tuple[dict, str]:
    """The source's tensors, with those of its full grid for the views that it lacks: what a coarse view shows is an
    ordinary smaller image. And what was done in words."""
    stems = {"coarse_patch_embeds": "patch_embed", "coarse_proj_outs": "proj_out"}
    copied = {}
    for name in own.keys() - given.keys():
        stem, *_, entry = name.split(".")
        source = f"{stems.get(stem)}.{entry}"
        if source in given and given[source].shape == own[name].shape:
            copied[name] = given[source]
    return {**given, **copied}, "coarse views start from the projections of the full grid" if copied else ""


def _left_out(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> list[str]:
    """A line for each tensor that was not copied; the class table is told of elsewhere."""
    reshaped = [
        f"{name} {tuple(own[name].shape)}, there {tuple(given[name].shape)}"
        for name in own.keys() & given.keys() - {CLASS_TABLE}
        if own[name].shape != given[name].shape
    ]
    return [
        *(f"  stays fresh, of other shape: {name}" for name in _folded(reshaped)),
        *(f"  stays fresh, not in the source: {name}" for name in _folded(own.keys() - given.keys())),
        *(f"  left out, in the source only: {name}" for name in _folded(given.keys() - own.keys())),
    ]


def _differing(ours: dict, theirs: dict) -> str:
    """Arguments that the source was built with and the model was not. Some leave every shape as it is, heads say."""
    # What is predicted, of which noise, the trainer tells; models without preconditioning do not know it.
    ours = {name: value for name, value in ours.items() if name not in ("prediction_type", "num_train_timesteps")}
    names = [name for name in ours if not name.startswith("_") and theirs.get(name, ours[name]) != ours[name]]
    text = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in names)
    return f"the source was built with {text}" if text else ""


def _refuse_other_model(own: dict[str, torch.Tensor], source: Source, differing: str):
    """Raise unless a matrix of a block fits. (A vector may fit by chance: q/k norms do at any number of heads.)"""
    given = source.tensors
    matrices = [name for name in own if name.startswith("transformer_blocks.") and own[name].ndim == 2]
    common = [name for name in matrices if name in given]
    if not common:
        raise ValueError(
            f"`init_from` ({source.place}) is another architecture, for its blocks have other weights "
            f"({matrices[0]} is not among them): name a model of this package."
        )
    if not any(given[name].shape == own[name].shape for name in common):
        example = f"{common[0]} is {tuple(own[common[0]].shape)} here and {tuple(given[common[0]].shape)} there"
        raise ValueError(
            f"`init_from` ({source.place}) has no transformer block that fits this model: "
            f"{'; '.join(filter(None, (example, differing)))}. Choose `num_attention_heads` and "
            "`attention_head_dim` (their product is the width) as they are there."
        )


def _copy_class_rows(
    table: torch.Tensor, given: torch.Tensor, theirs: dict[str, int], ours: tuple[str, ...]
) -> tuple[int, str]:
    """Rows `(classes + 1, D)`, the null condition last. Returns how many were copied, and which in words."""
    if not theirs and given.shape == table.shape:
        table.copy_(given)
        return len(table), f"  class table: all {len(ours)} rows, in order (the source does not name its classes)"
    table[-1] = given[-1]
    known = [name for name in ours if name in theirs]
    for name in known:
        table[ours.index(name)] = given[theirs[name]]
    fresh = [name for name in ours if name not in theirs]
    line = f"  class table: the null row and {len(known)} classes of the same name; {len(fresh)} stay fresh"
    if not theirs:
        line += f" (the source does not name its {len(given) - 1})"
    elif fresh:
        line += f" ({', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''})"
    return len(known) + 1, line


def _folded(names: Iterable[str]) -> list[str]:
    """Sorted, and what is said of several blocks said once: `transformer_blocks.{0,1}.gate.1.weight`."""
    others, blocks = [], {}
    for name in sorted(names):
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", name)
        if match:
            blocks.setdefault(match[2], []).append(int(match[1]))
        else:
            others.append(name)
    return others + [
        f"transformer_blocks.{{{','.join(map(str, sorted(indices)))}}}.{rest}" for rest, indices in blocks.items()
    ]
