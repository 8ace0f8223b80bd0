"""Weight averages of any width after training (post-hoc EMA), each as a pipeline folder.

    python training/posthoc_ema.py --run runs/mine --sigma_rel 0.08 0.15

How long to average is best chosen by looking at samples, and without training again. A run whose `--ema` names
power-function profiles, two of them best (power:0.05 and power:0.1), and whose `--ema_snapshots` is set keeps both
averages at several moments in RUN/ema_snapshots. This script fits their weighted sum to the average of the width asked
for, and writes RUN/pipeline_ema_0.08 with it: RUN/pipeline, the transformer's weights replaced.

sigma_rel is the spread of the averaged moments as a share of the training time: 0.05 looks at the last part of the
run, 0.2 far back. The error that is printed compares the two ways of weighing the past; 0 % means the same. It falls
with the square of the number of snapshots, and is larger outside the range of the stored widths.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm


# An uninstalled checkout: `python training/posthoc_ema.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.files import left_behind, replace_file, replace_folder, user_path
from freqgate_dit.pipelines.pipeline_freqgate_dit import forget_origin
from freqgate_dit.training.ema import EMAProfile, WeightAverages, sigma_rel_to_gamma
from freqgate_dit.training.publishing import describe_other_weights


SNAPSHOTS = "ema_snapshots"
ABOUT = "posthoc_ema.json"
NAME = re.compile(r"step_(\d{8})\.safetensors")


# -- snapshots -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A file with the averages of some power-function profiles after `updates` updates, at training step `step`."""

    path: Path
    step: int
    updates: int
    profiles: tuple[str, ...]


def snapshot_paths(folder: Path) -> list[Path]:
    """Files named like snapshots, oldest step first; a file that is still being written has another name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def save_snapshot(folder: Path, averages: WeightAverages, step: int) -> Path:
    """Write the averages of all power-function profiles to `folder/step_00001000.safetensors`, whole or not at all.

    Tensors are float32, named "power:0.1/PARAMETER". Snapshots of later steps are deleted: they were left behind when
    the run was resumed from an earlier one.

    Raises:
        ValueError: if there is no power-function profile.
    """
    profiles = [name for name, profile in averages.profiles.items() if profile.is_power]
    if not profiles:
        raise ValueError(
            f"`ema` ({', '.join(averages.profiles)}) has no power-function profile, and only those can be combined "
            "later: add power:0.05 and power:0.1, or set `ema_snapshots` to 0."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # What a full disk or a killed run has left unfinished.
    for path in left_behind(folder, NAME.pattern):
        path.unlink()
    target = folder / f"step_{step:08d}.safetensors"
    tensors = {
        f"{profile}/{name}": tensor.cpu().contiguous()
        for profile in profiles
        for name, tensor in averages.tensors(profile).items()
    }
    about = {"step": step, "updates": averages.updates, "profiles": profiles}
    metadata = {"snapshot": json.dumps(about)}
    replace_file(target, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    for path in snapshot_paths(folder):
        if path.name > target.name:
            path.unlink()
    return target


def read_snapshots(folder: Path, up_to_updates: int | None = None) -> list[Snapshot]:
    """The snapshots in `folder`, oldest first, without their tensors; those after `up_to_updates` are left out.

    Raises:
        ValueError: if a file is damaged; names it.
    """
    snapshots = [_read_snapshot(path) for path in snapshot_paths(folder)]
    return [snapshot for snapshot in snapshots if up_to_updates is None or snapshot.updates <= up_to_updates]


def _read_snapshot(path: Path) -> Snapshot:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["snapshot"])
        return Snapshot(path, about["step"], about["updates"], tuple(about["profiles"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the snapshot {path.name} is damaged ({error}): delete it; the others can be used without it."
        ) from error


# -- the sum of snapshots that comes nearest to an average ----------------------------------------------------------


def profile_inner_product(t1, gamma1, t2, gamma2) -> np.ndarray:
    """Integral of p(tau; t1, gamma1) p(tau; t2, gamma2) over tau, for arrays that broadcast.

    p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t] is the weight of moment tau in an average that
    ends at t (arXiv 2312.02696, section 3.1). Its integral over [i - 1, i] is exactly what `WeightAverages` gives to
    the i-th update.
    """
    earlier, later = np.minimum(t1, t2), np.maximum(t1, t2)
    gamma_of_later = np.where(t1 < t2, gamma2, gamma1)
    scale = (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1)
    # tau ends at the earlier t, and all powers fold into one ratio: nothing overflows at any t or gamma.
    return scale * (earlier / later) ** gamma_of_later / later


def _products(stored, target) -> tuple[np.ndarray, np.ndarray, float]:
    """Inner products among K stored profiles `(K, K)`, of them with the target `(K,)`, of the target with itself."""
    # Time in units of the target's end, which leaves the solution as it is.
    t, gamma = np.array(stored, dtype=np.float64).T / np.array([[target[0]], [1.0]])
    among = profile_inner_product(t[:, None], gamma[:, None], t, gamma)
    return (
        among,
        profile_inner_product(t, gamma, 1.0, target[1]),
        float(profile_inner_product(1.0, target[1], 1, target[1])),
    )


def posthoc_coefficients(stored: Sequence[tuple[int, float]], target: tuple[int, float]) -> np.ndarray:
    """Coefficients `(K,)` float64 of the sum of K stored averages that comes nearest to the target average.

    Least squares between profiles (arXiv 2312.02696, section 3.2 and appendix C) with one difference: the coefficients
    add up to 1. Without this they miss it by up to some percent where snapshots are few, and all weights would be
    scaled by as much; it raises the least-squares error hardly at all.

    Args:
        stored: (updates, gamma) of each stored average.
        target: (updates, gamma) of the average that is wanted.
    """
    among, with_target, _ = _products(stored, target)
    # The minimum under the constraint, by a Lagrange multiplier.
    ones = np.ones((len(stored), 1))
    system = np.block([[among, ones], [ones.T, np.zeros((1, 1))]])
    return np.linalg.solve(system, np.append(with_target, 1.0))[:-1]


def reconstruction_error(stored, coefficients: np.ndarray, target) -> float:
    """L2 distance of the summed profile from the target profile, as a share of the target profile's L2 norm."""
    among, with_target, norm = _products(stored, target)
    # Rounding can bring a distance of 0 below 0.
    square = coefficients @ among @ coefficients - 2 * coefficients @ with_target + norm
    return float(np.sqrt(max(square, 0.0) / norm))


def fit_snapshots(snapshots: Sequence[Snapshot], sigma_rel: float) -> tuple[np.ndarray, float]:
    """Coefficients, snapshot by snapshot and profile by profile, for an average that ends at the last; their error."""
    stored = [(one.updates, EMAProfile.parse(name).gamma) for one in snapshots for name in one.profiles]
    target = (snapshots[-1].updates, sigma_rel_to_gamma(sigma_rel))
    coefficients = posthoc_coefficients(stored, target)
    return coefficients, reconstruction_error(stored, coefficients, target)


def posthoc_average(folder: Path, sigma_rel: float, updates: int | None = None) -> dict[str, torch.Tensor]:
    """The average of relative width `sigma_rel` from the snapshots in `folder`, float32 by parameter name.

    It ends after `updates` updates, where there must be a snapshot; by default at the newest. Memory: the result and
    one tensor.

    Raises:
        ValueError: if there is no such snapshot, one is damaged, or `sigma_rel` is out of range.
    """
    snapshots = read_snapshots(folder, updates)
    if not snapshots or updates not in (None, snapshots[-1].updates):
        at = [snapshot.updates for snapshot in read_snapshots(folder)]
        raise ValueError(
            f"`updates` ({updates}) must be that of a snapshot in {folder}; there are "
            f"{at or 'none: the trainer writes them with `--ema_snapshots`'}."
        )
    coefficients, _ = fit_snapshots(snapshots, sigma_rel)
    stored = [(snapshot.path, f"{profile}/") for snapshot in snapshots for profile in snapshot.profiles]
    average = {}
    progress = tqdm(stored, desc=f"sigma_rel {sigma_rel}", unit="average")
    for (path, prefix), coefficient in zip(progress, coefficients, strict=True):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                if key.startswith(prefix):
                    name, part = key.removeprefix(prefix), file.get_tensor(key).mul_(coefficient)
                    average[name] = average[name].add_(part) if name in average else part
    return average


# -- the script ----------------------------------------------------------------------------------------------------


def write_average(source: Path, target: Path, average: dict[str, torch.Tensor], about: dict):
    """Copy the pipeline folder `source` to `target`, the transformer's weights replaced; `about` says by what."""
    # Only the transformer is needed, and loads without the optional components.
    pipeline = FreqGateDiTPipeline.from_pretrained(source, vae=None, text_encoder=None, tokenizer=None)
    # Averages are of parameters; what else a model holds (the spectrum of its data) is the source's.
    pipeline.transformer.load_state_dict({**dict(pipeline.transformer.named_buffers()), **average})

    def write(temporary: Path):
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        pipeline.transformer.save_pretrained(temporary / "transformer")
        forget_origin(temporary / "transformer" / "config.json")
        (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        words = f"post-hoc EMA, sigma_rel {about['sigma_rel']}"
        describe_other_weights(temporary, pipeline, words, target.name)

    replace_folder(target, write, ABOUT)


def find_snapshots(run: Path, step: int | None) -> list[Snapshot]:
    """The run's snapshots up to `step`, or all."""
    if not run.is_dir():
        raise ValueError(f"`run` ({run}) is not a folder: name the `output_dir` of a training run.")
    if not (run / "pipeline").is_dir():
        raise ValueError(
            f"`run` ({run}) has no pipeline folder, which is written when a run ends: let it end, or go on with it by "
            "`--resume latest`."
        )
    snapshots = read_snapshots(run / SNAPSHOTS)
    if not snapshots:
        raise ValueError(
            f"`run` ({run}) has no snapshots in {SNAPSHOTS}/: the trainer writes them with `--ema_snapshots`, of the "
            "power-function profiles in `--ema`."
        )
    steps = [snapshot.step for snapshot in snapshots]
    if step is None:
        return snapshots
    if step not in steps:
        raise ValueError(f"`step` ({step}) has no snapshot in `run` ({run}): choose from {steps}.")
    return snapshots[: steps.index(step) + 1]


def run_script(run: Path, sigma_rels: Sequence[float], step: int | None, out: Path):
    """Write `out/pipeline_ema_SIGMA_REL` for each; everything that can be refused is refused before the first."""
    snapshots = find_snapshots(run, step)
    errors = {sigma_rel: fit_snapshots(snapshots, sigma_rel)[1] for sigma_rel in sigma_rels}
    targets = {sigma_rel: out / f"pipeline_ema_{sigma_rel}" for sigma_rel in errors}
    for target in targets.values():
        if target.exists():
            raise ValueError(f"the folder {target} exists: delete it, or choose another `--out`.")
    out.mkdir(parents=True, exist_ok=True)
    last, profiles = snapshots[-1], ", ".join(snapshots[-1].profiles)
    print(f"{len(snapshots)} snapshots of {profiles}, steps {snapshots[0].step} to {last.step}")
    for sigma_rel, target in targets.items():
        average = posthoc_average(run / SNAPSHOTS, sigma_rel, last.updates)
        about = {
            "sigma_rel": sigma_rel,
            "step": last.step,
            "updates": last.updates,
            "stored_profiles": last.profiles,
            "snapshot_steps": [snapshot.step for snapshot in snapshots],
            "relative_error_of_profile": errors[sigma_rel],
        }
        write_average(run / "pipeline", target, average, about)
        print(f"sigma_rel {sigma_rel}: error of the profile {errors[sigma_rel]:.2%}, wrote {target}")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=user_path, required=True, help="folder of a finished run (its `output_dir`)")
    parser.add_argument(
        "--sigma_rel", type=float, nargs="+", required=True, help="widths of the averages, 0.05 to 0.2 as a rule"
    )
    parser.add_argument("--step", type=int, help="end the averages at this step's snapshot; by default at the last")
    parser.add_argument("--out", type=user_path, help="folder in which pipeline folders are written; by default RUN")
    given = parser.parse_args(arguments)
    try:
        run_script(given.run, given.sigma_rel, given.step, given.out or given.run)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
