"""The card (README.md) of a pipeline folder, made from what the folder's files say: no number comes from elsewhere.

The text is in `model_card_template.md`, for Jinja2 (which torch installs); this file fills it in. Metadata follow the
Hub's specification, https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from freqgate_dit.files import write_text
from freqgate_dit.pipeline_folder import CARD, weights_variant
from freqgate_dit.pipelines.pipeline_freqgate_dit import SOURCE_GUIDANCE_SCALE
from freqgate_dit.scheduling_spectral_euler import SpectralEulerDiscreteScheduler
from freqgate_dit.summary import PipelineSummary, metric_text, plain, precision_text, read_summary


# Around the digest of all that comes before it: a card that somebody has edited has another.
MARK, MARK_END = "<!-- made by freqgate_dit, digest ", " -->"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
CODE = ("pipeline_freqgate_dit.py", "transformer/transformer_freqgate_dit.py")
SCHEDULER_CODE = "scheduler/scheduling_spectral_euler.py"

# Variant -> what its way of conditioning is called.
MECHANISMS = {
    "in_context": "in-context",
    "cross_attention": "cross-attention",
    "adaln_zero": "adaLN-Zero",
    "freq_gate": "Freq-Gate-adaLN",
    "band_gate": "Band-Gate",
}
AT_START = ", at the start of training"
# Names of the pictures that the trainer and the demo write into `figures/`, as the card shows them.
KNOWN_FIGURES = ("samples", "denoising", "loss", "validation", "gate", "band_gains")

# Identifiers that the Hub accepts as `license`; it refuses a card with another one.
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0
    gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl unknown other
""".split()


def write_card(folder: str | Path, repo_id: str | None = None, name: str | None = None) -> bool:
    """Write `README.md` into a pipeline folder, whole or not at all. Arguments and errors are `render_card`'s.

    Returns:
        Whether it was written: a card that somebody has edited stays as it is.
    """
    path = Path(folder) / CARD
    if is_edited(path):
        return False
    write_text(path, str(render_card(folder, repo_id, name)))
    return True


def card_in_words(folder: Path) -> str:
    """`write_card`, and what came of it."""
    is_new = write_card(folder)
    return f"the model card, {folder / CARD}, " + ("is made anew" if is_new else "was edited by hand, and stays")


def is_edited(path: Path) -> bool:
    """Whether there is a card in a file that is not as `render_card` made it."""
    return path.exists() and not is_generated(path.read_text(encoding="utf-8"))


def is_generated(card: str) -> bool:
    """Whether the text of a card is as `render_card` made it, so that nothing is lost if it is made anew."""
    text, mark, digest = card.rstrip().rpartition(MARK)
    return bool(mark) and digest == _digest(text) + MARK_END


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def render_card(
    folder: str | Path, repo_id: str | None = None, name: str | None = None, beside: str = ""
) -> ModelCard:
    """The card of a pipeline folder.

    Args:
        folder: what `save_pretrained` or the trainer wrote.
        repo_id: the repository that the card's code loads, as "user/name"; by default it loads the folder.
        name: of the folder, where it is about to get another one.
        beside: relative path from the card to the folder, ending in "/", where it will not lie in it.

    Raises:
        ValueError: if it is no folder of this package's pipeline, or a file of it is damaged; says which.
    """
    summary = read_summary(folder)
    card = _Card(summary, repo_id, repo_id or name or Path(folder).resolve().name)
    context = {**card.context(), "beside": beside, "url": lambda path: quote(beside + path), "shell": shlex.quote}
    text = str(ModelCard.from_template(card.metadata(), template_path=str(TEMPLATE), **context)).rstrip()
    return ModelCard(f"{text}\n\n{MARK}{_digest(text)}{MARK_END}\n")


class _Card:
    """What fills the template, from the summary alone."""

    def __init__(self, summary: PipelineSummary, repo_id: str | None, location: str):
        self.summary = summary
        self.repo_id = repo_id
        self.location = location
        self.training = summary.training
        self.config = summary.training_config or {}

    def context(self) -> dict:
        training, summary = self.training, self.summary
        call = self.call()
        figures = {path.removeprefix("figures/").removesuffix(".png"): path for path in summary.pictures}
        return {
            "summary": summary,
            "arguments": summary.config,
            "title": self.title(),
            "mechanism": MECHANISMS[summary.variant],
            "preview": figures.pop("preview", None),
            "preview_settings": self.preview_settings(),
            "figures": sorted(figures.items(), key=lambda figure: figure_order(figure[0])),
            "repo_id": self.repo_id,
            "location": self.location,
            "source": self.source(),
            "call": call,
            "needs_torch": "torch." in call,
            "guidance_scale": self.guidance_scale(),
            "default_guidance_scale": SOURCE_GUIDANCE_SCALE,
            "code_files": self.code_files(),
            "model_rows": self.model_rows(),
            "class_list": self.class_list(),
            "training": training,
            "training_rows": self.training_rows() if training else [],
            "config": summary.training_config,
            "local_options": self.local_options(),
            "data": training and training["data"],
            "configured_data": self.configured_data(),
            "heldout": training["heldout"] if self.heldout_losses() else None,
            "validated_on": self.validated_on,
            "measured_rows": self.measured_rows(),
            "findings_rows": self.findings_rows(),
            "has_distance": self.has_distance(),
            "parts": self.parts(),
            "stated_license": training and training["license"],
            "block": block,
            "escape": escape,
            "code": code,
            "literal": literal,
            "plain": plain,
            "protocol": protocol,
            "table": table,
        }

    def source(self) -> str:
        """What the card's code loads: the place, and the variant of the weights where there are no others."""
        names = [path.split("/")[1] for path in self.summary.files if path.startswith("transformer/")]
        variants = {weights_variant(name) for name in names if name.endswith(".safetensors")}
        place = literal(self.location)
        return place if None in variants or not variants else f"{place}, variant={literal(min(variants))}"

    # -- what it is ---------------------------------------------------------------------------------------------------

    def title(self) -> str:
        data = f", {self.training['data']['name']}" if self.training else ""
        return f"DiT with {MECHANISMS[self.summary.variant]} conditioning{data}, {self.summary.size}"

    def metadata(self) -> ModelCardData:
        training, summary = self.training, self.summary
        kind = "text-conditional" if summary.is_text_conditional else "class-conditional"
        hub_id = training and training["data"]["hub_id"]
        license = (training and training["license"]) or None
        known = license is None or license.lower() in LICENSES
        start = self.config.get("init_from")
        return ModelCardData(
            library_name="diffusers",
            pipeline_tag=self.task(),
            license=license and license.lower() if known else "other",
            license_name=None if known else slug(license).lower(),
            base_model=start if start and is_repo_id(start) else None,
            datasets=[hub_id] if hub_id else None,
            tags=[
                "diffusion-transformer",
                kind if summary.is_conditional else "unconditional",
                summary.variant,
                "freqgate_dit",
            ],
            model_name=self.repo_id.split("/")[-1] if self.repo_id else self.title(),
            eval_results=self.eval_results() or None,
        )

    def task(self) -> str:
        return "text-to-image" if self.summary.is_text_conditional else "unconditional-image-generation"

    # -- use ----------------------------------------------------------------------------------------------------------

    def guidance_scale(self) -> float | None:
        """Guidance for examples, or `None` where the model never learned the null condition, as far as is known."""
        if not self.summary.is_conditional or not self.summary.class_dropout_prob:
            return None
        return self.config.get("guidance_scale", SOURCE_GUIDANCE_SCALE)

    def call(self) -> str:
        """Python that samples with `pipe` and writes a picture."""
        summary, lines, arguments = self.summary, [], []
        guidance = self.guidance_scale()
        names = list(summary.id2label.values())
        if summary.is_text_conditional and not summary.text_encoder:
            dim = summary.config["pooled_projection_dim"]
            lines.append(f"embeddings = torch.randn(1, {dim})  # in place of the pooled embedding of a prompt")
            arguments.append("pooled_prompt_embeds=embeddings")
            guidance = 1.0
        elif summary.is_text_conditional:
            template = self.config.get("prompt_template", "{label}")
            arguments.append(f"prompt={literal(template.replace('{label}', names[0]) if names else 'your prompt')}")
        elif summary.is_conditional:
            arguments.append(f"[{', '.join(map(literal, names[:2] or range(min(2, summary.config['num_classes']))))}]")
        else:
            arguments.append("num_images_per_label=2")
        if guidance is not None:
            arguments.append(f"guidance_scale={guidance}")
        lines.append(f"images = pipe({', '.join([*arguments, 'seed=0'])}).images")
        return "\n".join([*lines, 'images[0].save("image.png")'])

    def preview_settings(self) -> str:
        """How the trainer made the preview, if it did."""
        if not self.training or not self.config:
            return ""
        guided = self.guidance_scale()
        guidance = f", guidance {guided:g}" if guided is not None and guided != 1 else ""
        return f" from fixed seeds, {self.config['num_inference_steps']} steps{guidance}"

    def code_files(self) -> str:
        """The files that run where the package is not installed, in words; empty if they are not all there."""
        is_spectral = self.summary.scheduler["_class_name"] == SpectralEulerDiscreteScheduler.__name__
        names = [*CODE, *([SCHEDULER_CODE] if is_spectral else [])]
        if not all(name in self.summary.files for name in names):
            return ""
        *first, last = map(code, names)
        return f"{', '.join(first)} and {last}"

    # -- tables -------------------------------------------------------------------------------------------------------

    def model_rows(self) -> list[tuple[str, str]]:
        summary, config = self.summary, self.summary.config
        sampler, _, how = summary.sampler.partition(", ")
        dropped = summary.class_dropout_prob
        dropout = f", dropped in {100 * dropped:g} % of training" if dropped and summary.is_conditional else ""
        rows = [
            ("Class", f"{code(summary.class_name)} (`{summary.variant}`)"),
            ("Parameters", f"{summary.parameters / 1e6:.2f} M"),
            ("Compute", summary.compute),
            ("Size", f"{config['num_layers']} blocks, width {summary.width}, {config['num_attention_heads']} heads"),
            ("Tokens", f"{summary.tokens}, patches of {config['patch_size']} x {config['patch_size']}"),
            ("Grids", summary.ladder.describe_briefly() if summary.ladder else ""),
            ("Other options", ", ".join(f"`{name}` {value}" for name, value in summary.options.items())),
            ("Images", summary.samples),
            ("Condition", summary.condition + dropout),
            ("Text encoder", code(summary.text_encoder) if summary.text_encoder else ""),
            ("Prediction", f"`{summary.prediction_type}`; {summary.noise_schedule}"),
            ("Sampler", f"{code(sampler)}, {escape(how)}" if how else code(sampler)),
            ("Weights", " and ".join(summary.dtypes)),
            ("Saved by", f"freqgate_dit {summary.version}" if summary.version else ""),
        ]
        return [(name, value) for name, value in rows if value]

    def class_list(self) -> str:
        """Names of the classes, folded up where they are many."""
        summary = self.summary
        if summary.is_text_conditional or not summary.id2label:
            return ""
        names = ", ".join(f"{index} {escape(name)}" for index, name in summary.id2label.items())
        if len(summary.id2label) <= 10:
            return f"Classes: {names}."
        return f"<details>\n<summary>Names of {len(summary.id2label)} classes</summary>\n\n{names}.\n\n</details>"

    def training_rows(self) -> list[tuple[str, str]]:
        training, config = self.training, self.config
        data, processes = training["data"], training["processes"]
        classes = f", {plain(data['classes'])} classes" if data["classes"] else ""
        rows = [
            ("Steps", f"{plain(training['step'])} of {plain(training['total_steps'])}"),
            ("Images per step", f"{plain(training['global_batch_size'])}"),
            ("Images seen", plain(training["images_seen"])),
            (
                "Data",
                f"{escape(data['name'])}: {plain(data['train_images'])} training and {plain(data['heldout_images'])} "
                f"held-out images{classes}, {data['resolution']} px",
            ),
            ("Prompts", f"{code(config['prompt_template'])}" if config.get("condition") == "text" else ""),
            ("Started from", code(config["init_from"]) if config.get("init_from") else ""),
            ("Published weights", published_weights(training["weights"])),
            ("Precision", precision_text(training)),
            ("Device", f"{training['device']}, {processes} process{'es' if processes > 1 else ''}"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in training["versions"].items())),
        ]
        if config:
            optimiser = f"AdamW, learning rate {config['learning_rate']:g}, {config['lr_schedule']} schedule"
            rows.insert(3, ("Optimiser", f"{optimiser}; seed {config['seed']}"))
        return [(name, value) for name, value in rows if value]

    def local_options(self) -> str:
        """Options of the training configuration that name something on the author's machine."""
        names = ["vae", "text_encoder", "tokenizer", "init_from"]
        if not self.training or not (self.training["data"]["built_in"] or self.training["data"]["hub_id"]):
            names.insert(0, "dataset")
        local = [name for name in names if self.config.get(name) and not is_repo_id(self.config[name])]
        return ", ".join(f"`--{name}`" for name in local if self.config[name] != "shapes_textures")

    def configured_data(self) -> str:
        """What the training configuration calls the data, without the folders of the author's machine."""
        dataset = str(self.config.get("dataset", ""))
        return dataset if is_repo_id(dataset) else dataset.split("/")[-1]

    def heldout_losses(self) -> list[tuple[str, float]]:
        """Name and value of what the trainer measured."""
        heldout = self.training and self.training["heldout"]
        if not heldout:
            return []
        parts = {"loss": "", "loss_null": ", without the condition", "loss_at_start": AT_START}
        known = {part: heldout[key] for key, part in parts.items() if heldout[key] is not None}
        name = "loss on training images" if self.validated_on == "training" else "held-out loss"
        return [(f"{name}, {heldout['prediction_type']}{part}", loss) for part, loss in known.items()]

    @property
    def validated_on(self) -> str:
        """Of which images the trainer's validation was: of the training images where none are held out."""
        return "held-out" if not self.training or self.training["data"]["heldout_images"] else "training"

    def measured_rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, loss in self.heldout_losses():
            rows.append((name, plain(loss), escape(self.training["data"]["name"]), self.validated_on))
        for evaluation in self.summary.evaluations.values():
            data = escape(evaluation.dataset["name"]), escape(evaluation.dataset["split"])
            rows += [(escape(metric["name"]), metric_text(metric), *data) for metric in evaluation.metrics]
        return rows

    def findings_rows(self) -> list[tuple[str, str, str]]:
        claims = self.summary.findings.claims if self.summary.findings else []
        return [tuple(escape(claim[name]) for name in ("claim", "verdict", "evidence")) for claim in claims]

    def eval_results(self) -> list[EvalResult]:
        """The same for the metadata, values as the files have them. The loss before training is not this model's."""
        results = []
        for name, loss in self.heldout_losses():
            if not name.endswith(AT_START):
                dataset = {**self.training["data"], "split": self.validated_on}
                results.append(self.eval_result(dataset, {"name": name, "type": "mse", "value": loss}))
        for evaluation in self.summary.evaluations.values():
            results += [self.eval_result(evaluation.dataset, metric) for metric in evaluation.metrics]
        return results

    def eval_result(self, dataset: dict, metric: dict) -> EvalResult:
        return EvalResult(
            task_type=self.task(),
            dataset_type=dataset["hub_id"] or slug(dataset["name"]),
            dataset_name=dataset["name"],
            dataset_split=dataset["split"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
        )

    # -- what else there is to know -----------------------------------------------------------------------------------

    def parts(self) -> str:
        """What of the pipeline was not trained by the run, in words."""
        parts = ["the autoencoder"] * bool(self.summary.vae) + ["the text encoder"] * bool(self.summary.text_encoder)
        parts += ["the model that training started from"] * bool(self.config.get("init_from"))
        return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))

    def has_distance(self) -> bool:
        """Whether a distance between samples and data, such as FID, was measured."""
        metrics = [metric for evaluation in self.summary.evaluations.values() for metric in evaluation.metrics]
        named = [f"{metric['type']} {metric['name']}" for metric in metrics]
        return any(re.search(r"(?<![a-z])(fid|kid|fd|cmmd|fr[eé]chet)|distance", name.lower()) for name in named)


# -- Markdown ---------------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is, in a line of text or a cell of a table."""
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*\[\]<>|~&$])", r"\\\1", text)
    # Within a word an underscore means nothing, and "shapes_textures" reads better than with a backslash.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def code(text: str) -> str:
    """`text` as code, in a line of text; what would end it or a cell of a table is written as it is."""
    text = " ".join(str(text).split())
    return escape(text) if set(text) & set("`|") else f"`{text}`"


def block(command: str) -> str:
    """A command as a block of code, in a fence that is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return f"{fence}bash\n{command}\n{fence}"


def table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def literal(value: str | int) -> str:
    """`value` as Python writes it, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def figure_order(name: str) -> tuple[int, str]:
    known = KNOWN_FIGURES.index(name) if name in KNOWN_FIGURES else len(KNOWN_FIGURES)
    return known, name


def protocol(evaluation) -> str:
    """ "samples 512, scheduler EulerDiscreteScheduler": all that the evaluation says about how it was done."""
    return ", ".join(escape(f"{name.replace('_', ' ')} {value}") for name, value in evaluation.protocol.items())


def published_weights(average: str) -> str:
    """Which weights those of the pipeline are."""
    if average.startswith("power:"):
        edm2 = "([EDM2](https://arxiv.org/abs/2312.02696))"
        return f"power-function average of relative width {average.removeprefix('power:')} {edm2}"
    return f"exponential average, decay {average}" if re.fullmatch(r"[\d.]+", average) else escape(average)


def slug(name: str) -> str:
    """A name that the Hub takes as an identifier."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "unnamed"


def is_repo_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII))
