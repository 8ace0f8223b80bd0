"""The `freqgate-dit` command. What a subcommand needs is imported when it runs, so that help comes at once."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


DESCRIPTION = """\
Diffusion Transformers of the package freqgate_dit: look at them, sample them,
share them, and convert others into them.

REPO_OR_FOLDER is a repository on the Hugging Face Hub (user/name), or a folder
with a pipeline, such as the folder `pipeline` of a run of the trainer. Private
repositories need the token that `hf auth login` stores, or HF_TOKEN."""

EXAMPLES = """\
  freqgate-dit info user/my-dit
  freqgate-dit sample user/my-dit --label cat --out cat.png
  freqgate-dit push runs/mine/pipeline user/my-dit
  freqgate-dit doctor
`freqgate-dit COMMAND --help` tells more."""

# Of each subcommand: what it does in a line, in some lines, and examples.
INFO = (
    "what a pipeline is: model, training, measurements, files",
    """\
Print what a pipeline is: its model, how it was trained, what was measured, and
its files. No weights are downloaded.""",
    """\
  freqgate-dit info runs/mine/pipeline
  freqgate-dit info user/my-dit --revision v1""",
)
SAMPLE = (
    "write images of a pipeline",
    """\
Write an image of a pipeline, or several as a grid: with --count a row for each
label or prompt, otherwise as square as possible. Image i has the seed SEED + i,
and looks the same whatever else is sampled with it. In a grid, images of less
than 64 px are enlarged without smoothing. A file that is there is replaced.""",
    """\
  freqgate-dit sample runs/mine/pipeline --out samples.png
  freqgate-dit sample user/my-dit --label cat --out cat.png
  freqgate-dit sample user/my-dit --label cat "wild dog" --count 4 --out pets.png
  freqgate-dit sample user/my-text-dit --prompt "A photo of a cat" --out cat.png
  freqgate-dit sample user/my-dit --revision v1 --variant fp16 --out v1.png""",
)
PUSH = (
    "upload a pipeline folder to the Hub",
    """\
Upload a pipeline folder to a repository on the Hugging Face Hub, which is made
if it is not there, and print its address. This needs a token with write access
(`hf auth login`).""",
    """\
  freqgate-dit push runs/mine/pipeline user/my-dit
  freqgate-dit push runs/mine/pipeline user/my-dit --private --tag v1""",
)
CONVERT = (
    "make a pipeline of diffusers' DiT or of the official code's",
    """\
Write a pipeline folder that computes what another DiT computes. SOURCE is a
`DiTPipeline` of diffusers (a Hub id or a folder), or a weights file of the
official code (.pt or .safetensors), which comes without its autoencoder: name
that by --vae. A freq_gate model computes the same too, until it is trained.""",
    """\
  freqgate-dit convert facebook/DiT-XL-2-256 dit-xl-2
  freqgate-dit convert facebook/DiT-XL-2-256 gated --variant freq_gate
  freqgate-dit convert DiT-XL-2-256x256.pt dit-xl-2 --vae stabilityai/sd-vae-ft-ema""",
)
DOCTOR = (
    "versions, devices, caches, and what of it is known not to work",
    """\
Print versions, devices, caches and settings, and what of it is known not to
work, with what to do; then the exit code is 1. No token is printed, and nothing
is sent anywhere, so the report can be pasted into an issue.""",
    "  freqgate-dit doctor",
)

# The library's errors name its arguments, which the command line calls otherwise.
OPTIONS = {
    "`class_labels`": "`--label`",
    "`prompt`": "`--prompt`",
    "`guidance_scale`": "`--guidance_scale`",
    "`guidance_scale=1`": "`--guidance_scale 1`",
    "`num_inference_steps`": "`--steps`",
    "`device`": "`--device`",
    "`force_download=True`": "`--force_download`",
    "`out`": "`--out`",
    "`revision`": "`--revision`",
    "`variant`": "`--variant`",
    "`num_attention_heads`": "`--num_attention_heads`",
    "`pipe.id2label`": "`id2label` in its model_index.json",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ImportError as error:
        return _fail(f"the package cannot be imported ({error}): `freqgate-dit doctor` says what is wrong.")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130


def say(text: str, **options):
    """Print text in which no character but the end of a line controls the terminal."""
    print("".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text), **options)


def _fail(message: str) -> int:
    for argument, option in OPTIONS.items():
        message = message.replace(argument, option)
    say(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


# -- the command line -------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with their defaults if they have any, descriptions line by line as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "freqgate-dit",
        description=DESCRIPTION,
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _add(commands, "info", info, INFO)
    _add_source(command)

    command = _add(commands, "sample", sample, SAMPLE)
    _add_source(command)
    condition = command.add_mutually_exclusive_group()
    condition.add_argument(
        "--label", nargs="+", help="Names of classes, or their ids; by default one image of each of up to 16 classes."
    )
    condition.add_argument("--prompt", action="append", help="For a model conditioned on text; may be repeated.")
    command.add_argument("--out", required=True, type=Path, help="Image file; its suffix says the format.")
    command.add_argument("--count", type=positive, default=1, help="Images of each label or prompt.")
    command.add_argument("--seed", type=int, default=0, help="Of the first image.")
    command.add_argument("--steps", type=positive, default=20, help="Steps of the sampler.")
    command.add_argument("--sampler", help="By name, such as dpm (a wrong name lists all); by default its own.")
    command.add_argument(
        "--guidance_scale",
        type=float,
        help="1 is the conditional model; by default 2.5, or 1 where the model has no null condition.",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto: a GPU if there is one.")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="Precision; auto: bfloat16 where that is fast, or else float32.",
    )
    command.add_argument("--variant", help="Of the weights, such as fp16: files with this in their names.")

    command = _add(commands, "push", push, PUSH)
    command.add_argument("folder", metavar="FOLDER", type=Path, help="A pipeline folder.")
    command.add_argument("repo", metavar="REPO", help="user/name; of an organisation: organisation/name.")
    command.add_argument("--private", action="store_true", help="If it is made now, only you can see it.")
    command.add_argument("--message", help="Of the commit.")
    command.add_argument("--tag", help="Name for this state of the repository, which `--revision` takes.")
    command.add_argument("--branch", help="Commit to this branch, made if it is not there, and leave `main` alone.")

    command = _add(commands, "convert", convert, CONVERT)
    command.add_argument("source", metavar="SOURCE", help="Hub id, folder, .pt or .safetensors file.")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="Pipeline folder to write; must be new or empty.")
    command.add_argument(
        "--variant", default="adaln_zero", choices=("adaln_zero", "freq_gate"), help="Conditioning mechanism."
    )
    command.add_argument(
        "--num_attention_heads", type=positive, help="Of a file whose width is none of the official models'."
    )
    command.add_argument("--vae", help="Autoencoder of a file, folder or Hub id, such as stabilityai/sd-vae-ft-ema.")

    _add(commands, "doctor", doctor, DOCTOR)
    return parser


def _add(commands, name: str, run: Callable, texts: tuple[str, str, str]) -> argparse.ArgumentParser:
    line, description, examples = texts
    command = commands.add_parser(
        name,
        help=line,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _add_source(command: argparse.ArgumentParser):
    command.add_argument("source", metavar="REPO_OR_FOLDER", help="user/name on the Hub, or a pipeline folder.")
    command.add_argument("--revision", help="Branch, tag or commit of the repository.")
    cache = command.add_mutually_exclusive_group()
    cache.add_argument("--offline", action="store_true", help="Take what was downloaded before; ask nobody.")
    cache.add_argument(
        "--force_download", action="store_true", help="Download again what was downloaded before, if it is damaged."
    )


def _how_to_download(options: argparse.Namespace) -> dict:
    """What `_add_source` has read, as arguments of `hub.download`."""
    return {
        "revision": options.revision,
        "local_files_only": options.offline,
        "force_download": options.force_download,
    }


def hide_loading_bars():
    """Of components, which are there in a moment; downloading and sampling still show theirs."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


# -- looking ----------------------------------------------------------------------------------------------------------


def info(options: argparse.Namespace):
    from freqgate_dit import hub
    from freqgate_dit.summary import read_summary

    folder = hub.fetch_pipeline(options.source, **_how_to_download(options), weights=False)
    say(read_summary(folder, files=_files_on_hub(options)).describe())


def _files_on_hub(options: argparse.Namespace) -> dict[str, int] | None:
    """Path -> bytes of a repository; `None` of a folder, or if there is only what was downloaded before."""
    from freqgate_dit import hub

    if options.offline or Path(options.source).expanduser().is_dir():
        return None
    try:
        return hub.list_files(options.source, options.revision)
    except hub.CLIENT_ERRORS:
        return None


def doctor(options: argparse.Namespace) -> int:
    from freqgate_dit.doctor import diagnose

    diagnosis = diagnose()
    say(diagnosis.describe())
    return 1 if diagnosis.problems else 0


# -- sampling ---------------------------------------------------------------------------------------------------------


def sample(options: argparse.Namespace):
    from freqgate_dit import sampling
    from freqgate_dit.devices import choose_device, choose_dtype, is_out_of_memory
    from freqgate_dit.files import replace_file
    from freqgate_dit.hub import fetch_pipeline
    from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
    from freqgate_dit.samplers import make_sampler

    sampling.check_image_file(options.out)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    folder = fetch_pipeline(options.source, **_how_to_download(options), variant=options.variant)
    hide_loading_bars()
    pipe = FreqGateDiTPipeline.from_pretrained(folder, variant=options.variant, dtype=dtype).to(device)
    sampling.check_makes_images(pipe)
    if options.sampler:
        pipe.scheduler = make_sampler(options.sampler, pipe.scheduler.config)
    scale = pipe.default_guidance_scale if options.guidance_scale is None else options.guidance_scale

    argument, values = sampling.choose_conditions(pipe, options.label, options.prompt)
    how_many = {"count": options.count, "seed": options.seed}
    start = time.perf_counter()
    try:
        images = sampling.sample_images(
            pipe, argument, values, **how_many, num_inference_steps=options.steps, guidance_scale=scale
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory ({str(error).splitlines()[0]}): use a smaller `--dtype`, or another `--device`."
        ) from error
    seconds = time.perf_counter() - start
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture, form = sampling.make_picture(images, options.count), sampling.image_format(options.out)
    replace_file(options.out, lambda temporary: picture.save(temporary, form))

    count = "an image" if len(images) == 1 else f"{len(images)} images"
    say(f"wrote {options.out}: {count} of {images[0].width} x {images[0].height} px")
    say(sampling.describe_seeds(pipe, argument, values, **how_many))
    say(
        f"{options.steps} steps of {type(pipe.scheduler).__name__}, guidance {scale:g}, "
        f"{str(dtype).removeprefix('torch.')} on {device}: {seconds:.1f} s"
    )


# -- sharing and converting -------------------------------------------------------------------------------------------


def push(options: argparse.Namespace):
    from freqgate_dit.hub import push_folder

    if not options.folder.is_dir():
        raise ValueError(f"FOLDER ({options.folder}) is not a folder here: name the pipeline folder to upload.")
    address = push_folder(
        options.folder,
        options.repo,
        private=options.private or None,
        commit_message=options.message,
        tag=options.tag,
        branch=options.branch,
        tell=lambda sentence: say(sentence, file=sys.stderr),
    )
    say(address)


def convert(options: argparse.Namespace):
    folder = options.folder.absolute()  # "." has no name to give to what replaces it
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"FOLDER ({options.folder}) is there already: name a new or an empty folder.")
    from freqgate_dit.convert import freq_gate_from_adaln_zero
    from freqgate_dit.files import replace_folder
    from freqgate_dit.pipeline_folder import INDEX

    hide_loading_bars()
    is_file = options.source.endswith((".pt", ".pth", ".safetensors"))
    pipe = read_official(options) if is_file else read_dit_pipeline(options)
    if options.variant == "freq_gate":
        pipe.register_modules(transformer=freq_gate_from_adaln_zero(pipe.transformer))
    replace_folder(folder, pipe.save_pretrained, INDEX)
    millions = pipe.transformer.num_parameters() / 1e6
    say(f"wrote {options.folder}: {type(pipe.transformer).__name__}, {millions:.1f} M parameters")
    if pipe.vae is None:
        say("It has no autoencoder, so it makes latents and no images: for images, name one by --vae.")


def read_official(options: argparse.Namespace):
    """Pipeline of a weights file of the official code, with the noise schedule that DiT is trained with."""
    from diffusers import EulerDiscreteScheduler

    from freqgate_dit.convert import load_official
    from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline

    file = Path(options.source).expanduser()
    if not file.is_file():
        raise ValueError(f"SOURCE ({options.source}) is not a file here: check the spelling.")
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )
    transformer = load_official(file, num_attention_heads=options.num_attention_heads)
    return FreqGateDiTPipeline(transformer, scheduler, load_vae(options.vae), class_dropout_prob=0.1)


def load_vae(source: str | None):
    from diffusers import AutoencoderKL

    if source is None:
        return None
    try:
        return AutoencoderKL.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`--vae` ({source}) cannot be loaded as an autoencoder ({error}): give a folder with its config.json and "
            "weights, or a Hub id such as stabilityai/sd-vae-ft-ema."
        ) from error


def read_dit_pipeline(options: argparse.Namespace):
    """The converted `DiTPipeline` of a folder or repository."""
    from huggingface_hub import hf_hub_download

    from freqgate_dit import hub
    from freqgate_dit.convert import from_dit_pipeline
    from freqgate_dit.pipeline_folder import INDEX, refuse_without_index

    for name in ("num_attention_heads", "vae"):
        if getattr(options, name) is not None:
            raise ValueError(f"`--{name}` is for weights files of the official code: a DiTPipeline has that itself.")
    folder = Path(options.source).expanduser()
    if folder.is_dir():
        return from_dit_pipeline(load_dit(folder, folder / INDEX))
    try:
        files = hub.list_files(options.source)
        refuse_without_index(files, options.source)
        return from_dit_pipeline(load_dit(options.source, Path(hf_hub_download(options.source, INDEX))))
    except hub.CLIENT_ERRORS as error:
        raise hub.explain(error, options.source) from error


def load_dit(source: str | Path, index: Path):
    """The `DiTPipeline` of a folder or repository whose index is the file `index`."""
    from diffusers import DiTPipeline

    from freqgate_dit.files import read_json
    from freqgate_dit.pipeline_folder import refuse_without_index

    if not index.is_file():
        refuse_without_index([path.name for path in index.parent.iterdir()], source)
    class_name = read_json(index).get("_class_name")
    if class_name != "DiTPipeline":
        name = class_name[-1] if isinstance(class_name, list) else class_name
        raise ValueError(f"SOURCE ({source}) holds a {name}, and no DiTPipeline of diffusers: name one.")
    return DiTPipeline.from_pretrained(source)


if __name__ == "__main__":
    sys.exit(main())
