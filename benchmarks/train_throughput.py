"""Training speed: this package's trainer against loops as they are usually written, in one process.

    python benchmarks/train_throughput.py --out results/train_throughput.json

Compared are

    trainer         `Trainer.update` as `training/train.py` runs it: cached latents, autocast, the trainer's attention,
                    gradient clip, fused AdamW, all weight averages, batches as functions of (seed, step)
    live_vae        the same, but every batch is encoded in its step, by an AutoencoderKL (SDXL's architecture with
                    random weights, or --vae) under the same autocast
    live_tiny_vae   the same with an AutoencoderTiny
    diffusers       a plain float32 loop around diffusers' DiTTransformer2DModel of the same width, depth and patch:
                    ready latents, torch.randn_like, DDPMScheduler.add_noise, F.mse_loss, torch.optim.AdamW as it
                    comes. No clip and no average, which the trainer has to pay for.
    compiled        with --compile: `trainer` with its blocks compiled (needs a C++ compiler)

Rounds go through all of them in turn, so that a busy machine slows all; a ratio is the median over rounds of the
ratio within a round.

The ceiling is what a product of two square matrices reaches, the best size of `SQUARES`, measured in every round. Two
shares of it are given for the trainer. "step": floating-point operations of all matrix products of a step, per second
of the whole step. "products": the same operations per second spent in the products alone. Both numbers come from a
profiled step in every round: the operators of `PRODUCTS` in forward and backward pass, operations from their shapes,
time inclusive of what oneDNN does below them (packing, transposing, bias). The casts of autocast are operators of
their own and do not count as products; the convolutions that cut patches are left out.

Peak memory is the most that a process held (VmHWM of Linux) that did nothing but build one of the loops and
take two steps. Python, torch and the data are in it, and the process that only imports is given beside it.

On Linux, `nice` has no effect between sessions when the kernel groups tasks by session
(/proc/sys/kernel/sched_autogroup_enabled is 1): `echo -10 > /proc/self/autogroup` in the shell gives priority.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel, DDPMScheduler, DiTTransformer2DModel
from output import write_result
from torch.profiler import ProfilerActivity, profile

from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_to_latent_moments
from freqgate_dit.training.config import parse_config
from freqgate_dit.training.train import Trainer


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
SQUARES = (1024, 2048, 4096)
NUM_IMAGES, NUM_CLASSES = 320, 64
LOOPS = ("trainer", "live_vae", "live_tiny_vae", "diffusers", "compiled")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n", 2)[2], formatter_class=HelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that all loops are run in turn")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each loop in a round")
    parser.add_argument("--variant", default="adaln_zero", help="of the trainer's model")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--num_attention_heads", type=int, default=8, help="of 64 channels each; 8 give width 512")
    parser.add_argument("--patch_size", type=int, default=2)
    parser.add_argument("--activation_fn", default="gelu-approximate")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=128, help="pixels; latents have an eighth of it")
    parser.add_argument("--vae", help="folder of an AutoencoderKL for live_vae; random weights of SDXL's if unset")
    parser.add_argument("--compile", action="store_true", help="measure the compiled trainer, too")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--peak_memory_of", choices=("imports", *LOOPS), help=argparse.SUPPRESS)
    return parser.parse_args()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# The loops: each is built by a function and called with the number of the step


def make_trainer(arguments: argparse.Namespace, folder: Path, compiled: bool = False) -> Trainer:
    """A run on latents of built-in images. The autoencoder that makes the cache is a tiny one: it costs no step."""
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    options = {
        "dataset": "shapes_textures",
        "num_images": NUM_IMAGES,
        "resolution": arguments.resolution,
        "vae": folder / "vae",
        "cache_dir": folder / "cache",
        "output_dir": folder / f"run_{compiled}",
        "variant": arguments.variant,
        "num_layers": arguments.num_layers,
        "num_attention_heads": arguments.num_attention_heads,
        "patch_size": arguments.patch_size,
        "activation_fn": arguments.activation_fn,
        "per_device_batch_size": arguments.batch_size,
        "max_steps": 10**6,
        "report_to": "none",
        "compile": compiled,
    }
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(parse_config([f"--{name}={value}" for name, value in options.items()]))
    trainer.prepared_model.train()
    return trainer


def cached_loop(trainer: Trainer):
    def step(index: int):
        trainer.step = index
        trainer.update(trainer.batches.draw(index))

    return step


def live_loop(trainer: Trainer, vae, resolution: int):
    """As `cached_loop`, with latents encoded in the step, from pixels that lie ready in memory."""
    vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, resolution, resolution), dtype=torch.uint8)

    def step(index: int):
        trainer.step = index
        batch = trainer.batches.draw(index)
        images = pixels[torch.randint(NUM_IMAGES, (len(batch),))].float() / 127.5 - 1
        with torch.no_grad(), trainer.accelerator.autocast():
            mean, std = encode_to_latent_moments(vae, images)
        latents = mean if std is None else mean + std * torch.randn_like(mean)
        trainer.update(dataclasses.replace(batch, latents=latents))

    return step


def diffusers_loop(arguments: argparse.Namespace):
    side = arguments.resolution // 8
    model = DiTTransformer2DModel(
        num_attention_heads=arguments.num_attention_heads,
        attention_head_dim=64,
        in_channels=4,
        num_layers=arguments.num_layers,
        sample_size=side,
        patch_size=arguments.patch_size,
        activation_fn=arguments.activation_fn,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = DDPMScheduler()
    data, labels = torch.randn(NUM_IMAGES, 4, side, side), torch.randint(0, NUM_CLASSES, (NUM_IMAGES,))

    def step(index: int):
        chosen = torch.randint(NUM_IMAGES, (arguments.batch_size,))
        latents, timesteps = data[chosen], torch.randint(0, 1000, (arguments.batch_size,))
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = model(noisy, timestep=timesteps, class_labels=labels[chosen]).sample
        F.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def large_vae(folder: str | None) -> AutoencoderKL:
    """SDXL's autoencoder: its architecture with random weights, or the one in `folder`."""
    if folder is not None:
        return AutoModel.from_pretrained(folder, dtype=torch.float32)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
    )


def make_loop(name: str, arguments: argparse.Namespace, trainer):
    """The loop of that name; `trainer(compiled)` makes the run behind it, once."""
    if name == "diffusers":
        return diffusers_loop(arguments)
    if name == "live_vae":
        return live_loop(trainer(False), large_vae(arguments.vae), arguments.resolution)
    if name == "live_tiny_vae":
        return live_loop(trainer(False), AutoencoderTiny(), arguments.resolution)
    return cached_loop(trainer(name == "compiled"))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function, *values) -> float:
    """Mean seconds of `function(value)`."""
    start = time.perf_counter()
    for value in values:
        function(value)
    return (time.perf_counter() - start) / len(values)


def tflops_of_square(size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices, the best of three."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda _: a @ b, 0) for _ in range(3)) / 1e12


def operations(name: str, shapes: list[list[int]]) -> int:
    """Floating-point operations of a product, from the shapes of its operands."""
    first, second = shapes[1:3] if name in ("aten::addmm", "aten::baddbmm") else shapes[:2]  # (.., m, k), (.., k, n)
    return 2 * torch.Size(first).numel() * second[-1]


def profile_products(step, index: int) -> tuple[int, float]:
    """Operations in the products of one step, and seconds spent in them."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step(index)
    events = [event for event in profiler.events() if event.name in PRODUCTS]
    return sum(operations(e.name, e.input_shapes) for e in events), sum(e.cpu_time_total for e in events) / 1e6


def measure_round(loops: dict, steps: int, index: int) -> dict:
    """One turn: seconds per step of every loop, the ceilings, and the products of the trainer's step."""
    values = {"seconds": {name: seconds(step, *range(index, index + steps)) for name, step in loops.items()}}
    for dtype in (torch.bfloat16, torch.float32):
        name = f"ceiling_{str(dtype).removeprefix('torch.')}_tflops"
        values[name] = max(tflops_of_square(size, dtype) for size in SQUARES)
    count, spent = profile_products(loops["trainer"], index)
    values["gflop_per_step"] = count / 1e9
    ceiling = values["ceiling_bfloat16_tflops"] * 1e12
    values["share_of_ceiling_step"] = count / values["seconds"]["trainer"] / ceiling
    values["share_of_ceiling_products"] = count / spent / ceiling
    values["time_in_products"] = spent / values["seconds"]["trainer"]
    return values


def summarise(rounds: list[dict], arguments: argparse.Namespace) -> dict:
    """Medians over the rounds, and the range of the ratios."""

    def median(of) -> float:
        return statistics.median(of(values) for values in rounds)

    result = {name: median(lambda values, name=name: values[name]) for name in rounds[0] if name != "seconds"}
    result["loops"] = {}
    for loop in rounds[0]["seconds"]:
        ratios = sorted(values["seconds"][loop] / values["seconds"]["trainer"] for values in rounds)
        result["loops"][loop] = {
            "images_per_second": median(lambda values, loop=loop: arguments.batch_size / values["seconds"][loop]),
            "trainer_is_faster_by": statistics.median(ratios),
            "in_single_rounds": [ratios[0], ratios[-1]],
        }
    return result


def peak_memory(name: str) -> float:
    """MiB of a process of its own that builds one loop (see `main`) and takes two steps."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak_memory_of", name]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout)


def main():
    arguments = parse_arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = functools.cache(lambda compiled: make_trainer(arguments, Path(folder), compiled))
        if arguments.peak_memory_of:
            if arguments.peak_memory_of != "imports":
                seconds(make_loop(arguments.peak_memory_of, arguments, trainer), 0, 1)
            # Not getrusage's `ru_maxrss`, which a process inherits from the one that started it.
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            print(int(status["VmHWM"].split()[0]) / 1024)
            return
        names = LOOPS if arguments.compile else LOOPS[:-1]
        # The trainer comes first: it sets the number of threads, for all.
        loops = {name: make_loop(name, arguments, trainer) for name in names}
        for step in loops.values():
            seconds(step, 0)
        rounds = []
        for index in range(arguments.rounds):
            rounds.append(measure_round(loops, arguments.steps, 1 + index * arguments.steps))
            print(f"round {index + 1} of {arguments.rounds}", file=sys.stderr)
        del loops, trainer
    result = {
        "command": " ".join(["python", "benchmarks/train_throughput.py", *sys.argv[1:]]),
        **summarise(rounds, arguments),
        "peak_memory_mib": {name: round(peak_memory(name)) for name in ("imports", *names)},
        "settings": {
            name: value for name, value in vars(arguments).items() if name not in ("out", "vae", "peak_memory_of")
        },
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
