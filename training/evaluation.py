"""Measure how good the images of a pipeline are: samples against real images, the whole protocol beside the numbers.

    accelerate launch training/evaluation.py --pipeline runs/mine/pipeline --reference path/to/images --floors
    python training/evaluation.py --images some/folder --reference path/to/images
    python training/evaluation.py --pipeline runs/mine/pipeline --reference path/to/images \\
        --sweep guidance_scale=1,1.5,2,2.5

Samples exactly `--num_images` images, each a function of the seed and of its number, and compares them with the
reference, which goes through the preprocessing of training: Frechet and kernel distance, precision, recall, density
and coverage in the features of clean-fid's Inception or of any other network, the power spectrum, and copies of
training images. Writes into `--out`

    evaluation.json   all numbers, and all that must be the same for another number to be comparable
    evaluation.md     the same as a table
    samples.png       the first images

Each number is named in full, such as fid_inception_clean_5100_vs_heldout. A number alone says little: `--floors` puts
beside it what real images, and the autoencoder's reconstructions, get by the same command. What was sampled is kept
when the command is interrupted (Ctrl-C): started again, it goes on.

Several processes (`accelerate launch --multi_gpu --num_processes 4`; on a CPU with ACCELERATE_USE_CPU=true) share the
work and give the same images and numbers.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


# An uninstalled checkout: `accelerate launch training/evaluation.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from freqgate_dit.devices import DTYPES
from freqgate_dit.features import CACHE_DIR
from freqgate_dit.files import refuse_to_replace, user_path
from freqgate_dit.samplers import SAMPLERS
from freqgate_dit.training.comparison import SWEPT, Comparison
from freqgate_dit.training.generation import check_card_folder
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.training.launching import PATIENCE
from freqgate_dit.training.references import SPLITS
from freqgate_dit.training.reporting import write_results
from freqgate_dit.training.sample_folder import PROTOCOL


# Where the pipeline is not told otherwise.
DEFAULTS = {"num_images": 5100, "class_mix": "reference", "seed": 0, "steps": 20, "dtype": "auto"}
# Options that say how to sample.
OF_PIPELINE = (
    *DEFAULTS,
    "guidance_scale",
    "sampler",
    "prompt_template",
    "sweep",
    "update_card",
    "keep_images",
)


# -- arguments --------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    compared = parser.add_argument_group("what is compared")
    generated = compared.add_mutually_exclusive_group(required=True)
    generated.add_argument("--pipeline", metavar="PIPELINE", help="pipeline folder, or Hub id, to sample from")
    generated.add_argument("--images", metavar="FOLDER", help="evaluate the images of this folder instead")
    compared.add_argument(
        "--reference",
        required=True,
        metavar="DATA",
        help="real images, as the trainer's --dataset takes them: an image folder, parquet files, a Hub data set, "
        "shapes_textures; or the YAML file of a run, whose data is taken",
    )
    compared.add_argument(
        "--split",
        choices=SPLITS,
        help="part of the reference; by default heldout where it is known which images are held out (the data that "
        "the pipeline was trained on, by its content; data of a YAML file; the built-in data), elsewhere all",
    )
    compared.add_argument(
        "--train_reference",
        nargs="?",
        const="",
        metavar="DATA",
        help="look for copies of training images: of this data set, or without a value of the training part of the "
        "reference",
    )
    compared.add_argument(
        "--resolution", type=int, help="side in pixels that the images must have; by default what they have"
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num_images", type=int, help="how many (default 5100; 50000 for a published number)")
    sampling.add_argument(
        "--class_mix",
        choices=("reference", "uniform"),
        help="shares of the classes: as in the reference (default), or equal",
    )
    sampling.add_argument("--seed", type=int, help="image i has the seed SEED + i (default 0)")
    sampling.add_argument("--steps", type=int, help="steps of the scheduler (default 20)")
    sampling.add_argument(
        "--guidance_scale", type=float, help="1 for none (default: the pipeline's, 2.5 where guidance was trained)"
    )
    sampling.add_argument(
        "--sampler",
        help=f"one of {', '.join(SAMPLERS)}, or a scheduler class such as DDIMScheduler (default: the pipeline's own)",
    )
    sampling.add_argument(
        "--prompt_template",
        help="prompt of a class, with {label} in it, for a pipeline that takes prompts (default: as in training)",
    )
    sampling.add_argument(
        "--dtype", choices=("auto", *DTYPES), help="of the transformer (default auto: bfloat16 where it is fast)"
    )
    sampling.add_argument(
        "--batch_size", type=int, default=64, help="images at once in a process; the images do not depend on it"
    )
    sampling.add_argument(
        "--sweep",
        metavar=f"{SWEPT}=A,B,...",
        help="try several values on one half of the reference, and report the best one on the other half",
    )

    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--features",
        default="inception",
        metavar="NETWORK",
        help="inception (clean-fid's, with its clean resize), or module:function, or file.py:function: uint8 images "
        "(N, 3, H, W) -> features (N, D)",
    )
    measuring.add_argument(
        "--features_dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the network: auto is float32 for inception, otherwise bfloat16 where it is fast",
    )
    measuring.add_argument(
        "--inception_path", help="file or folder of Inception's weights, where it is not downloaded"
    )
    measuring.add_argument(
        "--floors",
        action="store_true",
        help="measure real images in place of samples, too (training images, or one half of the reference against the "
        "other), and the autoencoder's reconstructions of the reference",
    )
    measuring.add_argument(
        "--bootstrap",
        type=int,
        default=20,
        metavar="N",
        help="resamples for the sampling noise; a Frechet distance is computed for each; 0 for none",
    )
    measuring.add_argument(
        "--force", action="store_true", help="also with fewer than 2,048 images, and with JPEG images in a folder"
    )

    output = parser.add_argument_group("files and machine")
    output.add_argument("--out", type=user_path, default=Path("evaluation"), help="folder for the results")
    output.add_argument(
        "--keep_images",
        action="store_true",
        help="keep the samples for further evaluations, and write each as PNG into OUT/images",
    )
    output.add_argument("--update_card", action="store_true", help="put the numbers into the pipeline's model card")
    output.add_argument("--cache_dir", default=CACHE_DIR, help="where features of references are kept")
    output.add_argument("--cpu_threads", type=int, help="CPU threads per process; by default all cores, shared")
    return parser


def check_arguments(given: argparse.Namespace):
    """Set defaults of sampling; raise `ValueError` for what cannot be meant."""
    if given.images is not None:
        for name in OF_PIPELINE:
            if getattr(given, name) not in (None, False):
                raise ValueError(f"`{name}` says how to sample a pipeline, and `images` are there already: drop it.")
    for name, value in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for name, least in (("num_images", 1), ("steps", 1), ("batch_size", 1), ("seed", 0), ("bootstrap", 0)):
        if getattr(given, name) < least:
            raise ValueError(f"`{name}` ({getattr(given, name)}) must be at least {least}.")
    if given.bootstrap == 1:
        raise ValueError("`bootstrap` (1) must be 0, for none, or at least 2.")
    if given.features == "inception" and given.features_dtype == "bfloat16":
        raise ValueError("`features_dtype` bfloat16 would make numbers that are no FID: leave it out for inception.")
    if given.update_card:
        check_card_folder(given.pipeline)
    if given.keep_images:
        refuse_to_replace(given.out / "images", PROTOCOL)
    given.sweep = parse_sweep(given) if given.sweep else None


def parse_sweep(given: argparse.Namespace) -> list[float]:
    """The values of `--sweep`."""
    name, _, values = given.sweep.partition("=")
    parts = [part.strip() for part in values.split(",")]
    is_number = all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) for part in parts)
    if name != SWEPT or not is_number or len(set(map(float, parts))) < max(2, len(parts)):
        raise ValueError(f"`sweep` ({given.sweep}) must be {SWEPT}=A,B,... with two different numbers or more.")
    if given.guidance_scale is not None:
        raise ValueError(f"`sweep` and `guidance_scale` ({given.guidance_scale}) were both given: give only one.")
    return [float(part) for part in parts]


# -- the script -------------------------------------------------------------------------------------------------------


def start(cpu_threads: int | None) -> Accelerator:
    """The `Accelerator` of this process.

    Raises:
        ValueError: if processes were started that do not find each other.
    """
    kwargs = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[kwargs])
    use_all_cores(cpu_threads)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but without a GPU each of them would sample alone: set "
            "ACCELERATE_USE_CPU=true in the environment for processes on the CPU, or `--num_processes 1`."
        )
    return accelerator


def main(arguments: list[str] | None = None):
    given = make_parser().parse_args(arguments)
    try:
        check_arguments(given)
        comparison = Comparison(given, start(given.cpu_threads))
        comparison.prepare()
        if comparison.accelerator.is_main_process:
            write_results(comparison.measure(), comparison)
        comparison.accelerator.wait_for_everyone()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {given.out} keeps what was sampled: the same command goes on with it") from None


if __name__ == "__main__":
    main()
