"""The ablation of Freq-Grid, planned in results/EXPERIMENTS.md (9): arms at equal computation and at equal images.
And what the recipe for real images is chosen from (10), with `--arms` recipe_base, ... and `--budget 30e12`.

    python benchmarks/freq_grid.py --data cats64 --data_dir ../shared/data --out runs/freq_grid
    python benchmarks/freq_grid_report.py --runs runs/freq_grid/cats64 --out results/freq_grid_cats64

Every run is one of training/train.py's `Trainer`, on one thread, in bf16. An arm's steps are the budget over its FLOPs
per step: of "equal computation" all have BUDGET, of "equal images" (arms with `_images`) as many steps as the full
grid. Controls are the models of freq_grid_models.py; the peer is diffusers' `DiTTransformer2DModel` in a plain loop,
with the same images, order, noise, timesteps and validation (freq_grid_peer.py). Processes started with the same
`--out` share the runs out among themselves; a run that was cut off is taken up by the next that is started with
`--resume_all`. Timings are of the steps alone, without validation.
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from freq_grid_models import CONTROLS
from freq_grid_peer import DiffusersLoop

import freqgate_dit
import freqgate_dit.training
from freqgate_dit import __version__
from freqgate_dit.cost import flops_per_forward
from freqgate_dit.files import digest_of_sources, read_json_lines, write_text
from freqgate_dit.training.conditions import load_condition
from freqgate_dit.training.config import TrainingRun, parse_config
from freqgate_dit.training.data import load_images
from freqgate_dit.training.latents import LatentCache
from freqgate_dit.training.train import Trainer
from freqgate_dit.training.validation import Validation
from freqgate_dit.transformer_freqgate_dit import VARIANTS


VARIANTS.update(CONTROLS)

BUDGET = 90e12  # FLOPs of matrix products, forward times 3
POINTS = 10  # held-out error is measured at so many tenths of a run
DATA = {
    "cats64": {
        "dataset": "afhq_cat128_*.parquet",
        "heldout_per_class": 1700,
        "condition": "none",
        "resolution": 64,
        "patch_size": 4,
        "price": 1.19,
    },
    "clothing64": {
        "dataset": "clothing128_*.parquet",
        "heldout_fraction": 0.1,
        "resolution": 64,
        "patch_size": 4,
        "price": 0.743,
    },
    "cats128": {
        "dataset": "afhq_cat128_*.parquet",
        "heldout_per_class": 1700,
        "condition": "none",
        "resolution": 128,
        "patch_size": 8,
        "price": 6.39,
    },
}
COMMON = {
    "variant": "adaln_zero",
    "num_layers": 6,
    "num_attention_heads": 3,
    "horizontal_flip": "true",
    "prediction_type": "v_prediction",
    "timestep_sampling": "logit_normal",
    "per_device_batch_size": 32,
    "learning_rate": 6e-4,
    "lr_schedule": "cosine",
    "warmup_steps": 50,
    "adam_beta2": 0.99,
    "ema_snapshots": 0,
    "mixed_precision": "bf16",
    "cpu_threads": 1,
    "log_every": 20,
    "num_validation_images": 512,
    "report_to": "none",
}
WIENER = {"preconditioning": "wiener"}
GRID = {**WIENER, "grid_views": 3}
ARMS = {
    "full_grid": WIENER,
    "freq_grid": GRID,
    "freq_grid_02": {**GRID, "grid_tolerance": 0.02},
    "freq_grid_10": {**GRID, "grid_tolerance": 0.1},
    "freq_grid_priced": {**GRID, "grid_price": "price"},
    "large_patches": {**GRID, "variant": "large_patches"},
    "whole_patch_head": {**GRID, "variant": "whole_patch_head"},
    "scalar_complement": {**GRID, "variant": "scalar_complement"},
    "shared_projections": {**GRID, "variant": "shared_projections"},
    "permuted": {**GRID, "variant": "permuted"},
    "random_block": {**GRID, "variant": "random_block"},
    "constant_large_patch": {**WIENER, "patch_size": "x2"},
    "full_grid_plain": {},
    "diffusers": {},
}
# What the recipe for real images is chosen from (10 in results/EXPERIMENTS.md): one change each, and several together.
CHANGES = {
    "base": {},
    "logit_mean_low": {"logit_mean": -0.7},
    "logit_mean_high": {"logit_mean": 0.7},
    "rope": {"use_rope": "true", "qk_norm": "true"},
    "swiglu": {"activation_fn": "swiglu", "mlp_ratio": 8 / 3},
    "rate_low": {"learning_rate": 3e-4},
    "rate_high": {"learning_rate": 1.2e-3},
    "rate_higher": {"learning_rate": 2.4e-3},
    "muon": {"optimizer": "muon"},
    "muon_high": {"optimizer": "muon", "learning_rate": 1.2e-3},
    "muon_higher": {"optimizer": "muon", "learning_rate": 2.4e-3},
    "muon_highest": {"optimizer": "muon", "learning_rate": 4.8e-3},
    "batch_64": {"per_device_batch_size": 64},
    "tolerance_10": {"grid_tolerance": 0.1},
    "freq_gate": {"variant": "freq_gate"},
    "low_rank": {"modulation_rank": 48},
    "band_gate": {"variant": "band_gate", "modulation_rank": 48},
}
# What enters, tried together, and less boldly.
CHANGES["together"] = {**CHANGES["muon_higher"], **CHANGES["swiglu"], **CHANGES["tolerance_10"]}
CHANGES["together_03"] = {**CHANGES["together"], "grid_tolerance": 0.03}
CHANGES["together_slow"] = {**CHANGES["together"], "learning_rate": 1.2e-3}
# At equal seconds, by a `--budget` of each: Muon's own products are no forward pass.
CHANGES["together_adamw"] = {**CHANGES["together"], "optimizer": "adamw"}
CHANGES["together_adamw_slow"] = {**CHANGES["together_adamw"], "learning_rate": 1.2e-3}
CHANGES["together_64"] = {**CHANGES["together"], "per_device_batch_size": 64}
ARMS |= {f"recipe_{name}": {**GRID, **change} for name, change in CHANGES.items()}
# At equal images, for as many steps as the full grid has.
IMAGES = ["freq_grid", "freq_grid_02", "freq_grid_10", "freq_grid_priced", "large_patches", "whole_patch_head"]
ARMS |= {f"{name}_images": ARMS[name] for name in IMAGES}


def words(name: str, arm: str, seed: int, options: argparse.Namespace, folder: Path, **more) -> list[str]:
    data = dict(DATA[name])
    price = data.pop("price")
    values = {**COMMON, **data, **ARMS[arm], "seed": seed, "output_dir": folder, **more}
    values["dataset"] = options.data_dir / data["dataset"]
    values["cache_dir"] = options.out / "cache"
    values["patch_size"] = data["patch_size"] * (2 if values["patch_size"] == "x2" else 1)
    if values.get("grid_price"):
        values["grid_price"] = price
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run(Trainer):
    """A trainer whose length is a budget of FLOPs: its steps are counted when its views are known."""

    def __init__(self, config: TrainingRun, budget: float):
        self.budget = budget
        super().__init__(config)

    def _make_shares(self):
        super()._make_shares()
        forward = flops_of_step(self) / 3
        if self.checkpoint is None and self.config.train.max_steps == 1:
            self.total_steps = max(POINTS, round(self.budget / flops_of_step(self)))
            every = math.ceil(self.total_steps / POINTS)
            train = replace(
                self.config.train,
                max_steps=self.total_steps,
                validate_every=every,
                preview_every=self.total_steps,
                save_every=every,
            )
            self.config = replace(self.config, train=train)
        self.print(f"{forward / 1e9:.1f} GFLOP forward of a batch, {self.total_steps} steps")


def flops_of_step(trainer: Trainer) -> float:
    """FLOPs of matrix products in an optimiser step: three times those of a forward pass."""
    model, size = trainer.model, trainer.global_batch_size
    counts = [size] if trainer.shares is None else trainer.shares.counts
    return 3 * sum(count * flops_per_forward(model, view) for view, count in enumerate(counts))


def train_arm(name: str, arm: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    reset()
    resume = ["--resume", "auto"] if (folder / "config.yaml").exists() else []
    more = {"max_steps": 1} if not resume else {}
    steps = steps_of_full_grid(name, options) if arm.endswith("_images") else None
    if steps:
        every = math.ceil(steps / POINTS)
        more = {"max_steps": steps, "validate_every": every, "preview_every": steps, "save_every": every}
    given = words(name, arm, seed, options, folder, **more)
    trainer = Run(
        parse_config(["--config", str(folder / "config.yaml"), *resume] if resume else given), options.budget
    )
    trainer.train()
    if trainer.step < trainer.total_steps:
        raise SystemExit("stopped: start again with `--resume_all`")
    validations = read_json_lines(folder / "validation.jsonl")
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if "images_per_second" in line]
    speeds = sorted(line["images_per_second"] for line in lines)
    per_step = flops_of_step(trainer)
    with trainer.averages.swapped_into(trainer.model):
        final = held_out(trainer, lambda x, t, y: trainer.denoise(trainer.model, x, t, y))
    return {
        "steps": trainer.total_steps,
        "images": trainer.total_steps * trainer.global_batch_size,
        "flops": trainer.total_steps * per_step,
        "flops_per_step": per_step,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "images_per_second": speeds[len(speeds) // 2],
        "ladder": trainer.ladder.to_json() if trainer.ladder else None,
        "counts": trainer.shares.counts if trainer.shares else None,
        "curve": [{"step": line["step"], **errors(line["ema"])} for line in validations],
        "final": final,
    }


def errors(values: dict) -> dict:
    """Of the held-out prediction v, on the images of a run's own validations."""
    return {"loss": values["loss"], "by_timestep": values["loss_by_timestep"]}


def held_out(trainer: Trainer, denoise) -> dict:
    """Errors of v on all held-out images: mean, by noise level, by octave, and by both."""
    config = trainer.config
    cache = LatentCache(trainer.data_sets[1], None, False, config.latents.cache_dir)
    data = cache.load("cpu")
    validation = Validation(data, trainer.objective.scheduler, 1700, 64, null_label=None)
    trainer.model.eval()
    result = validation.summarise(validation(denoise))
    return {
        "images": int(result.num_images.sum()),
        "loss": result.loss,
        "by_timestep": result.loss_by_timestep.tolist(),
        "bands": result.bands,
        "table": result.table.tolist(),
    }


def steps_of_full_grid(name: str, options: argparse.Namespace) -> int:
    """Steps of the full grid within the budget, without training it."""
    config = parse_config(words(name, "full_grid", 0, options, options.out / "none", max_steps=1))
    images, _ = load_images(config.data, config.latents.cache_dir)
    condition = load_condition(config.condition, images.class_names, "cpu").model_arguments()
    with torch.device("meta"):
        model = config.model.build(3, config.data.resolution, condition, config.objective)
    return round(options.budget / (3 * config.train.per_device_batch_size * flops_per_forward(model)))


def train_diffusers(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """Train the peer for as many steps as the full grid has (the two differ in FLOPs by embedders alone)."""
    reset()
    more = {"max_steps": 1, "resume": "auto"}  # it has no checkpoints: what was cut off begins anew
    trainer = Run(parse_config(words(name, "full_grid", seed, options, folder, **more)), options.budget)
    loop = DiffusersLoop(trainer, seed)
    steps, curve, seconds = trainer.total_steps, [], 0.0
    every = math.ceil(steps / POINTS)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with loop.averaged():
                result = trainer.validation.summarise(trainer.validation(loop.denoise))
            error = {"loss": result.loss, "by_timestep": result.loss_by_timestep.tolist()}
            curve.append({"step": step, "seconds": seconds, **error})
            print(f"step {step}/{steps}: held-out {result.loss:.4f} after {seconds:.0f} s", flush=True)
        if step < steps:
            start = time.perf_counter()
            loop.step(step)
            seconds += time.perf_counter() - start
    # The last weights or their average, whatever is better: an average of diffusers' has another profile than ours.
    loop.model.eval()
    finals = [held_out(trainer, loop.denoise)]
    with loop.averaged():
        finals.append(held_out(trainer, loop.denoise))
    per_step = flops_of_step(trainer)
    return {
        "steps": steps,
        "images": steps * trainer.global_batch_size,
        "flops": steps * per_step,
        "flops_per_step": per_step,
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
        "images_per_second": steps * trainer.global_batch_size / seconds,
        "ladder": None,
        "counts": None,
        "curve": curve,
        "final": min(finals, key=lambda result: result["loss"]),
    }


def run_one(name: str, arm: str, seed: int, options: argparse.Namespace) -> bool:
    """Train an arm unless it was or is being trained; whether it was trained here."""
    folder = options.out / name / f"{arm}_seed{seed}"
    result, claim = folder.with_suffix(".json"), folder.with_suffix(".claim")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if result.exists():
        return False
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if not options.resume_all or claim.stat().st_mtime > START:
            return False
        os.utime(claim)
    print(f"== {name} {arm} seed {seed}", flush=True)
    start = time.time()
    if arm == "diffusers":
        values = train_diffusers(name, seed, options, folder)
    else:
        values = train_arm(name, arm, seed, options, folder)
    values |= {
        "data": name,
        "arm": arm,
        "seed": seed,
        "budget": options.budget,
        "seconds_in_all": time.time() - start,
        "code": CODE,
        "versions": {"freqgate_dit": __version__, "torch": torch.__version__},
        "machine": platform.machine(),
    }
    write_text(result, json.dumps(values))
    return True


START = time.time()
CODE = digest_of_sources(Path(freqgate_dit.__file__).parent, Path(freqgate_dit.training.__file__).parent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    of_ablation = [arm for arm in ARMS if not arm.startswith("recipe_")]
    parser.add_argument("--arms", nargs="+", default=of_ablation, choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=BUDGET, help="FLOPs of a run (default: %(default)g)")
    parser.add_argument("--resume_all", action="store_true", help="take up runs that were cut off")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for arm in options.arms:
            run_one(options.data, arm, seed, options)


if __name__ == "__main__":
    main()
