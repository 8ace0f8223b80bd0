"""What a pipeline folder says about itself, read from its small files: nothing is computed and no weights are loaded.

A folder that `FreqGateDiTPipeline.save_pretrained` wrote is enough. What a run of the trainer and measurements add is
read where it is there: `training_config.yaml`, `training_summary.json`, `evaluation/NAME.json` and `analysis.json`.
"""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from freqgate_dit.cost import flops_per_forward
from freqgate_dit.evaluations import Evaluation
from freqgate_dit.files import read_json
from freqgate_dit.findings import FILE as FINDINGS
from freqgate_dit.findings import Findings
from freqgate_dit.ladder import Ladder
from freqgate_dit.pipeline_folder import (
    INDEX,
    PICTURES,
    missing_part,
    refuse_misfit,
    refuse_other_pipeline,
    refuse_without_index,
    variants_of,
)
from freqgate_dit.samplers import describe_sampler
from freqgate_dit.transformer_freqgate_dit import VARIANTS


# More than any memory holds.
MOST_BLOCKS = 10_000
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What `training_summary.json` must hold; "heldout" is null where nothing was validated.
TRAINING_KEYS = {
    "": "step total_steps global_batch_size images_seen weights mixed_precision processes device license data heldout "
    "versions",
    "data": "name hub_id built_in license train_images heldout_images classes resolution",
    "heldout": "prediction_type images loss_at_start loss loss_null",
}


# -- the summary ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PipelineSummary:
    """A pipeline folder in facts.

    Args:
        config: arguments of the transformer, with its class as `_class_name`.
        parameters, flops: of the transformer; flops (2 per multiply-add) of a forward pass of one image, on the full
            grid of a model with views.
        resolution: height and width in pixels of an image that the model was made for.
        vae, text_encoder: class names, or `None`.
        scheduler: arguments of the scheduler, with its class as `_class_name`.
        prediction_type: what the transformer predicts.
        id2label: class id -> name; empty if classes have no names.
        class_dropout_prob: how often training dropped the condition; `None` if that is not recorded.
        training: `training_summary.json`, or `None`.
        training_config: `training_config.yaml`, or `None`.
        evaluations: name -> content of `evaluation/NAME.json`, by name.
        findings: content of `analysis.json`, or `None`.
        files: path in the folder -> bytes, by path.
        dtypes: of the transformer's weights, as far as they are in the folder.
        version: of the package that saved the folder, or `None` if it is not recorded.
    """

    config: dict
    parameters: int
    flops: int
    resolution: int
    vae: str | None
    text_encoder: str | None
    scheduler: dict
    prediction_type: str | None
    id2label: dict[int, str]
    class_dropout_prob: float | None
    training: dict | None
    training_config: dict | None
    evaluations: dict[str, Evaluation]
    findings: Findings | None
    files: dict[str, int]
    dtypes: tuple[str, ...]
    version: str | None

    @property
    def class_name(self) -> str:
        return self.config["_class_name"]

    @property
    def variant(self) -> str:
        """Short name of the transformer's class, as in `VARIANTS`."""
        return next(name for name, variant in VARIANTS.items() if variant.__name__ == self.class_name)

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def tokens(self) -> int:
        return (self.config["sample_size"] // self.config["patch_size"]) ** 2

    @property
    def ladder(self) -> Ladder | None:
        """Of a model with views, as its trainer has recorded it."""
        values = (self.training or {}).get("ladder")
        return Ladder.from_json(values) if values else None

    @property
    def mean_flops(self) -> float:
        """Of a forward pass of one image, on average over the noise levels of its training."""
        return self.ladder.mean_flops if self.ladder else self.flops

    @property
    def compute(self) -> str:
        """What a forward pass of one image takes."""
        full, ladder = f"{self.flops / 1e9:.3g} GFLOPs per forward pass of one image", self.ladder
        if self.config.get("grid_views", 1) == 1:
            return full
        if ladder is None:
            return f"{full} on the full grid (where its coarser grids are used is not recorded)"
        sampling = f", {ladder.sampling_flops / 1e9:.3g} in sampling" if ladder.sampling_flops else ""
        return f"{full} on the full grid; on average {ladder.mean_flops / 1e9:.3g} in training{sampling}"

    @property
    def is_text_conditional(self) -> bool:
        return self.config["pooled_projection_dim"] is not None

    @property
    def is_conditional(self) -> bool:
        return self.config["num_classes"] is not None or self.is_text_conditional

    @property
    def condition(self) -> str:
        """Of what kind the condition is: "64 classes", "text, 256-d" or "none"."""
        if self.is_text_conditional:
            return f"text, {self.config['pooled_projection_dim']}-d"
        return f"{self.config['num_classes']} classes" if self.is_conditional else "none"

    @property
    def options(self) -> dict:
        """Arguments of the transformer that are not its class's defaults and are no sizes, such as `qk_norm`."""
        sizes = (
            "num_attention_heads attention_head_dim in_channels num_layers sample_size patch_size num_classes "
            "pooled_projection_dim"
        ).split()
        arguments = inspect.signature(VARIANTS[self.variant].__init__).parameters.items()
        return {
            name: self.config[name]
            for name, argument in arguments
            if name in self.config and name not in sizes and self.config[name] != argument.default
        }

    @property
    def samples(self) -> str:
        """What the model makes, and by which way."""
        channels, size = self.config["in_channels"], self.config["sample_size"]
        return f"{self.size}, by latents of {channels} x {size} x {size} and {self.vae}" if self.vae else self.size

    @property
    def size(self) -> str:
        """Of what the model was made for, in pixels if it makes them."""
        channels, size = self.config["in_channels"], self.config["sample_size"]
        if self.makes_pixels:
            return f"{self.resolution} x {self.resolution} pixels"
        return f"latents of {channels} x {size} x {size}"

    @property
    def makes_pixels(self) -> bool:
        """Without an autoencoder, what has not the three channels of RGB counts as latents."""
        return self.vae is not None or self.config["in_channels"] == 3

    @property
    def noise_schedule(self) -> str:
        scheduler = self.scheduler
        text = f"{scheduler['num_train_timesteps']:,} timesteps"
        if scheduler.get("trained_betas") is not None:
            return f"{text}, betas of its own"
        return (
            f"{text}, {scheduler['beta_schedule']} betas from {scheduler['beta_start']:g} to {scheduler['beta_end']:g}"
        )

    @property
    def sampler(self) -> str:
        """The scheduler in words."""
        return describe_sampler(self.scheduler["_class_name"], self.scheduler)

    @property
    def pictures(self) -> list[str]:
        """Paths of the pictures in `figures/`."""
        return [path for path in self.files if path.startswith("figures/") and path.lower().endswith(PICTURES)]

    def describe(self) -> str:
        """The summary as lines of text."""
        config = self.config
        names = [" ".join(str(name).split()) for name in self.id2label.values()]
        listed = f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
        rows = [
            (
                "transformer",
                f"{self.class_name} ({self.variant}), {self.parameters / 1e6:.2f} M parameters"
                + (f", {' and '.join(self.dtypes)}" if self.dtypes else ""),
            ),
            (
                "size",
                f"{config['num_layers']} blocks, width {self.width}, {config['num_attention_heads']} heads, patch "
                f"{config['patch_size']} ({self.tokens} tokens), {self.compute}",
            ),
            *([("grids", self.ladder.describe_briefly())] if self.ladder else []),
            *(
                [("options", ", ".join(f"{name} {value}" for name, value in self.options.items()))]
                * bool(self.options)
            ),
            ("images", self.samples),
            ("condition", f"{self.condition}{listed}"),
            *([("", self._dropout())] if self.is_conditional else []),
            *([("text encoder", self.text_encoder)] if self.text_encoder else []),
            ("sampler", self.sampler),
            ("", f"{self.prediction_type}, {self.noise_schedule}"),
            *self._describe_training(),
            *self._describe_evaluations(),
            ("made by", f"freqgate_dit {self.version or '(version not recorded)'}"),
            ("files", f"{len(self.files)}, {bytes_text(sum(self.files.values()))}"),
        ]
        lines = [f"{name:16}{text}" for name, text in rows]
        return "\n".join([*lines, *(f"  {bytes_text(size):>12}  {path}" for path, size in self.files.items())])

    def _dropout(self) -> str:
        if self.class_dropout_prob is None:
            return "how often training dropped it is not recorded"
        if not self.class_dropout_prob:
            return "never dropped in training, so there is no guidance"
        return f"dropped in {100 * self.class_dropout_prob:g} % of training, so guidance works"

    def _describe_training(self) -> list[tuple[str, str]]:
        training = self.training
        if not training:
            known = "settings in training_config.yaml, results" if self.training_config else ""
            return [("training", f"{known} not recorded".strip())]
        data, heldout = training["data"], training["heldout"]
        rows = [
            (
                "training",
                f"{training['step']:,} of {training['total_steps']:,} steps, {training['global_batch_size']:,} images "
                f"each, {precision_text(training)}; weights {training['weights']}",
            ),
            (
                "data",
                f"{data['name']}, {data['train_images']:,} training and {data['heldout_images']:,} held-out images",
            ),
            ("licence", f"{training['license'] or 'not stated'}; of the data: {data['license'] or 'not recorded'}"),
        ]
        if heldout is None:
            return rows
        losses = {"": "loss", " at the start": "loss_at_start", " without the condition": "loss_null"}
        known = [f"{plain(heldout[key])}{name}" for name, key in losses.items() if heldout[key] is not None]
        name = "held-out loss" if data["heldout_images"] else "loss on training images"
        return rows + [(name, f"{', '.join(known)} ({heldout['prediction_type']})")] * bool(known)

    def _describe_evaluations(self) -> list[tuple[str, str]]:
        rows = []
        for evaluation in self.evaluations.values():
            rows.append(("measured" if not rows else "", f"{evaluation.title}:"))
            rows += [("", f"  {metric['name']}: {metric_text(metric)}") for metric in evaluation.metrics]
        return rows


def plain(value: float) -> str:
    """A number to four significant digits; whole ones in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def metric_text(metric: dict) -> str:
    """Value of a metric of an evaluation, as a reader should see it."""
    return f"{100 * metric['value']:.1f} %" if metric["format"] == "percent" else plain(metric["value"])


def precision_text(training: dict) -> str:
    """What a training computed in; Accelerate's "no" is about mixing."""
    known = {"no": "float32", "bf16": "bf16 autocast over float32 weights"}
    return known.get(training["mixed_precision"], training["mixed_precision"])


def bytes_text(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    power = min(3, int(math.log(size, 1024)))
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_summary(folder: str | Path, files: dict[str, int] | None = None) -> PipelineSummary:
    """The summary of a pipeline folder; weights need not be in it.

    Args:
        folder: what `save_pretrained` or the trainer wrote, or its small files.
        files: path -> bytes of all files, where `folder` does not hold all.

    Raises:
        ValueError: if it is no folder of this package's pipeline, or a file of it is missing, damaged or incomplete;
            says which.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    refuse_without_index(names, folder)
    index = read_json(folder / INDEX)
    refuse_other_pipeline(index, folder)
    classes = {name: value[-1] for name, value in index.items() if isinstance(value, list) and name[0] != "_"}
    config = {**_read_config(folder, "transformer/config.json"), "_class_name": classes["transformer"]}
    model = _build_on_meta(folder, config)
    factor = 1
    if classes["vae"]:
        factor = 2 ** (len(_read_config(folder, "vae/config.json")["block_out_channels"]) - 1)
    scheduler = {**_read_config(folder, "scheduler/scheduler_config.json"), "_class_name": classes["scheduler"]}
    labels = {int(key): label for key, label in (index.get("id2label") or {}).items()}
    training_config = folder / "training_config.yaml"
    return PipelineSummary(
        config=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=flops_per_forward(model),
        resolution=config["sample_size"] * factor,
        vae=classes["vae"],
        text_encoder=classes["text_encoder"],
        scheduler=scheduler,
        prediction_type=index.get("prediction_type") or scheduler.get("prediction_type"),
        id2label=dict(sorted(labels.items())),
        class_dropout_prob=index.get("class_dropout_prob"),
        training=_read_training(folder / "training_summary.json"),
        training_config=_read_yaml(training_config) if training_config.is_file() else None,
        evaluations={path.stem: Evaluation.load(path) for path in sorted(folder.glob("evaluation/*.json"))},
        findings=Findings.load(folder / FINDINGS) if (folder / FINDINGS).is_file() else None,
        files=dict(sorted((_list_files(folder) if files is None else files).items())),
        dtypes=_weight_dtypes(folder / "transformer"),
        version=index.get("_freqgate_dit_version"),
    )


def _read_config(folder: Path, name: str) -> dict:
    if not (folder / name).is_file():
        raise ValueError(f"`folder` ({folder}) lacks {name}, which its model_index.json asks for: copy it again.")
    return read_json(folder / name)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no valid YAML ({' '.join(str(error).split())}): copy it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold `name: value` lines, but holds a {type(values).__name__}.")
    return values


def _read_training(path: Path) -> dict | None:
    if not path.is_file():
        return None
    training = read_json(path)
    for part, names in TRAINING_KEYS.items():
        values = training[part] if part else training
        if part == "heldout" and values is None:
            continue
        for name in names.split():
            if name not in values:
                raise ValueError(f"{path.name} lacks {f'{part}.{name}'.lstrip('.')!r}: train again, or delete it.")
            if isinstance(values[name], float) and not math.isfinite(values[name]):
                raise ValueError(f"{path.name} has {name!r} {values[name]}, which is no finite number: write null.")
    return training


def _list_files(folder: Path) -> dict[str, int]:
    """Path -> bytes, without the hidden ones in which downloads keep their books."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path.stat().st_size
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _weight_dtypes(folder: Path) -> tuple[str, ...]:
    """What the headers of the weights say."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            dtypes |= {weights.get_slice(name).get_dtype() for name in weights.keys()}
    return tuple(sorted(DTYPES.get(name, name) for name in dtypes))


def _build_on_meta(folder: Path, config: dict) -> torch.nn.Module:
    """The transformer of `config` without storage for its weights."""
    variants = {variant.__name__: variant for variant in VARIANTS.values()}
    name = config["_class_name"]
    if name not in variants:
        raise ValueError(f"`folder` ({folder}) has a transformer {name}, which this version does not know: update it.")
    files = [f"transformer/{path.name}" for path in (folder / "transformer").iterdir()]
    for variant in variants_of(folder / "transformer"):
        if missing_part(files, "transformer", variant) is None:  # of a repository a part may have been downloaded
            refuse_misfit(folder, "transformer", variants[name], variant)
    if config.get("num_layers", 0) > MOST_BLOCKS:  # of a repository, whose weights are not here to tell
        raise ValueError(f"`folder` ({folder}) claims {config['num_layers']} blocks (`num_layers`): it is damaged.")
    with torch.device("meta"):
        return variants[name].from_config(config)
