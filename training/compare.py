"""Compare recipes fairly: every arm with every seed, on the same data, noise and number of steps.

    python training/compare.py --config training/configs/compare_variants.yaml --out runs/compare_variants

The file names the arms (options of training/train.py that differ), what they share, the seeds, the baseline, and the
contrasts that the comparison is made for. An arm may say `match: num_layers` or `match: modulation_rank`, which is
then chosen to bring it to the number of parameters (`match_by: flops`: of FLOPs) of the baseline, or of the arm that
it names in `match_to`. Runs go into `--out`/runs; what is finished is kept, what was cut off resumes. A seed fixes the
first weights (where arms have the same ones), the order of the data, noise, timesteps and dropped labels of all arms
alike, and all are validated on the same noisy images: differences are paired. With `evaluation` (options of
training/evaluation.py) each trained model is sampled from the same noise and its images are measured too. `--parallel`
runs go at a time, each with its part of the cores, spread over the GPUs: a small model leaves most of a GPU idle, so
several may share one. Written: `comparison.json` (all numbers), `comparison.md` (the tables), `errors.png` (by
training step), `curves.png` (differences by step), `timesteps.png` (by noise level), `forest.png` (by frequency),
`cells.png` (by both).

Every run is a process of train.py, so its numbers are those of that command. Processes that share a GPU take turns on
it unless NVIDIA's Multi-Process Service runs (`nvidia-cuda-mps-control -d`), which lets them compute at once.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from tqdm import tqdm


# An uninstalled checkout: `python training/compare.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import freqgate_dit
from freqgate_dit.devices import accelerators, available_cores
from freqgate_dit.files import digest, digest_of_sources, read_json, read_json_lines, user_path, write_text
from freqgate_dit.model_card import table
from freqgate_dit.training.checkpoints import checkpoint_folders, complete_checkpoints
from freqgate_dit.training.config import ASIDE, TrainingRun, parse_config
from freqgate_dit.training.evaluation import check_arguments, make_parser
from freqgate_dit.training.generation import weights_digest
from freqgate_dit.training.matching import COUNTS, MATCHED, ModelSizes, nearest, size_cells
from freqgate_dit.training.paired import read_run, summarise, write_report
from freqgate_dit.training.resume import CONTENT
from freqgate_dit.training.validation import NUM_BINS


# With others, held-out errors are not of the same thing.
SHARED = (
    "dataset dataset_config dataset_split dataset_revision image_column label_column world data_seed resolution "
    "num_images heldout_per_class heldout_fraction vae vae_subfolder vae_revision condition prompt_template "
    "text_encoder tokenizer num_train_timesteps beta_schedule beta_start beta_end num_validation_images max_steps "
    "num_epochs per_device_batch_size gradient_accumulation_steps validate_every seed output_dir"
).split()


@dataclass(frozen=True)
class Comparison:
    """What a comparison's YAML file says.

    Args:
        baseline: name of the arm that the others are compared with.
        seeds: of training, at least 2.
        common: options of the trainer that all arms share.
        arms: name -> options of the trainer that only this arm has; `match` names the option to choose for it, and
            `match_to` the arm that it is matched to, by default the baseline.
        contrasts: pairs of arms, the first compared with the second, that were chosen before looking; p-values are
            adjusted for their number. By default each arm with the baseline.
        match_by: what matched arms have as many of as what they are matched to: "parameters" or "flops".
        weights: which held-out errors count: "ema", of the averaged weights, or "raw".
        measure: of what: "own", what the models predict, or "epsilon", the noise that their predictions imply, which
            compares arms of different prediction types.
        evaluation: options of `training/evaluation.py` for the images of each trained model; by default they are not
            sampled.

    Raises:
        ValueError: if something cannot be meant.
    """

    baseline: str
    seeds: list[int]
    common: dict
    arms: dict[str, dict]
    contrasts: list[tuple[str, str]] = field(default_factory=list)
    match_by: str = "parameters"
    weights: str = "ema"
    measure: str = "own"
    evaluation: dict = field(default_factory=dict)

    def __post_init__(self):
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"`seeds` ({self.seeds}) must be at least 2 different numbers.")
        if len(self.arms) < 2 or self.baseline not in self.arms:
            raise ValueError(f"`baseline` ({self.baseline!r}) must be one of at least 2 `arms` ({list(self.arms)}).")
        for name, choices in (
            ("weights", ("ema", "raw")),
            ("measure", ("own", "epsilon")),
            ("match_by", tuple(COUNTS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` ({getattr(self, name)!r}) must be {' or '.join(choices)}.")
        for arm, options in self.arms.items():
            if not arm.replace("_", "").isalnum():
                raise ValueError(f"`arms` has {arm!r}: use letters, digits and underscores, it becomes a folder.")
            for name in SHARED:
                if name in options:
                    raise ValueError(f"`arms` has `{name}` in {arm!r}; that must be the same for all: use `common`.")
            if options.get("match", MATCHED[0]) not in MATCHED:
                raise ValueError(
                    f"`match` ({options['match']!r}) in {arm!r}: an arm can match by {' or '.join(MATCHED)}."
                )
            target = options.get("match_to", self.baseline)
            if "match_to" in options and "match" not in options:
                raise ValueError(f"`match_to` ({target!r}) in {arm!r} needs `match`, {' or '.join(MATCHED)}.")
            if "match" in options and (target == arm or "match" in self.arms.get(target, {"match": None})):
                raise ValueError(
                    f"`match_to` ({target!r}) in {arm!r} must be another of the arms ({', '.join(self.arms)}), one "
                    "without a `match` of its own."
                )
        for name in ("seed", "output_dir"):
            if name in self.common:
                raise ValueError(f"`common` has `{name}`, which the comparison sets itself.")
        for name in ("pipeline", "images", "out"):
            if name in self.evaluation:
                raise ValueError(f"`evaluation` has `{name}`, which the comparison sets itself.")
        for pair in self.contrasts:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(self.arms):
                raise ValueError(f"`contrasts` has {pair}: give pairs of two different `arms` ({list(self.arms)}).")
        if not self.contrasts:
            others = [(arm, self.baseline) for arm in self.arms if arm != self.baseline]
            object.__setattr__(self, "contrasts", others)

    def arguments(self, arm: str, seed: int, folder: Path) -> list[str]:
        """The trainer's command line for one run in `folder`."""
        options = {name: value for name, value in self.arms[arm].items() if name not in ("match", "match_to")}
        return words_of({"config": None, **self.common, **options, "seed": seed, "output_dir": folder})

    def config(self, arm: str, **options) -> TrainingRun:
        """What the trainer would make of the arm, with further `options`."""
        arms = {**self.arms, arm: {**self.arms[arm], **options}}
        return parse_config(replace(self, arms=arms).arguments(arm, self.seeds[0], Path("run")))


def words_of(options: dict) -> list[str]:
    """Options as the words of a command: a list is several values, `true` a flag."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *("none" if value is None else str(value) for value in values if value is not True)]
    return words


def load_comparison(path: Path) -> Comparison:
    try:
        return Comparison(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`--config` ({path}) must hold baseline, seeds, common, arms, and perhaps contrasts, match_by, weights, "
            f"measure, evaluation: {error}."
        ) from error


def only(comparison: Comparison, arms: Sequence[str]) -> Comparison:
    """The comparison of some of its arms and the baseline, with the contrasts between them.

    Raises:
        ValueError: if there is no such arm, or no contrast left.
    """
    for arm in arms:
        if arm not in comparison.arms:
            raise ValueError(f"`--arms` has {arm!r}: choose some of {', '.join(comparison.arms)}.")
    kept = {name: options for name, options in comparison.arms.items() if name in (*arms, comparison.baseline)}
    for arm, options in kept.items():
        if options.get("match_to", arm) not in kept:
            raise ValueError(f"`--arms` has {arm!r}, which is matched to {options['match_to']!r}: name that one too.")
    contrasts = [pair for pair in comparison.contrasts if set(pair) <= set(kept)]
    if not contrasts:
        raise ValueError(f"`--arms` ({', '.join(arms)}) leaves none of the contrasts {comparison.contrasts}.")
    return replace(comparison, arms=kept, contrasts=contrasts)


def matched(comparison: Comparison, sizes: ModelSizes) -> Comparison:
    """The comparison with a number in place of every `match`."""
    arms = dict(comparison.arms)
    for arm, options in comparison.arms.items():
        if "match" in options:
            name = options["match"]
            by = comparison.match_by
            target = sizes(comparison.config(options.get("match_to", comparison.baseline)), [by])[by]

            def count(value: int) -> int:
                return sizes(comparison.config(arm, **{name: value}), [by])[by]

            kept = {key: value for key, value in options.items() if key not in ("match", "match_to")}
            arms[arm] = {**kept, name: nearest(count, target)}
    return replace(comparison, arms=arms)


def sizes_table(comparison: Comparison, sizes: ModelSizes) -> str:
    counts = {arm: sizes(comparison.config(arm)) for arm in comparison.arms}
    rows = [(arm, *size_cells(count, counts[comparison.baseline])) for arm, count in counts.items()]
    return table(rows, ("arm", "parameters", "GFLOPs"))


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command in a process of its own; what it prints goes to the end of the file `log`."""

    name: str
    command: list[str]
    log: Path


def is_trained(folder: Path, steps: int) -> bool:
    validated = [record["step"] for record in read_json_lines(folder / "validation.jsonl")]
    return validated[-1:] == [steps] and (folder / "pipeline" / "model_index.json").is_file()


def refuse_to_overwrite(out: Path, arms: Sequence[str]):
    """Raise if `out` has a report on an arm that is not one of `arms`."""
    file = out / "comparison.json"
    missing = [arm for arm in read_json(file)["arms"] if arm not in arms] if file.is_file() else []
    if missing:
        raise ValueError(
            f"`--out` ({out}) has a report on {', '.join(missing)} too, which this one would replace: move "
            f"{file.name} away."
        )


def refuse_other_options(name: str, folder: Path, wanted: TrainingRun):
    """Raise if the run in `folder` was started with options that are not those of the comparison now."""
    if not (folder / "config.yaml").is_file():
        return
    found = parse_config(["--config", str(folder / "config.yaml")]).to_dict()
    for option, value in wanted.to_dict().items():
        if option not in ASIDE and found[option] != value:
            raise ValueError(
                f"`--out` has {name} with `{option}` {found[option]!r}, and the comparison says {value!r}: choose "
                f"another folder, or delete {folder}."
            )


def refuse_few_images(sizes: ModelSizes, config: TrainingRun):
    """Raise if runs on this data would have noise levels that no held-out image is measured at."""
    for count, what, remedy in (
        (len(sizes.heldout), "images are held out", "raise `heldout_fraction` or `heldout_per_class`"),
        (config.train.num_validation_images, "of them are used", "raise `num_validation_images`"),
    ):
        if count < NUM_BINS:
            raise ValueError(
                f"`common`: {count} {what}, but a comparison is made by {NUM_BINS} noise levels, with an image or "
                f"more at each: {remedy}."
            )


def refuse_other_content(folders: dict[str, Path], wanted: dict[str, str | None] | None):
    """Raise if runs have read other images, another autoencoder or text encoder than the others, or than `wanted`.

    Args:
        folders: name -> folder of runs; of one without a checkpoint it is not known.
        wanted: fingerprints of what runs still to be trained will read; `None` if there are none.
    """
    other = "what is there now"
    for name, folder in folders.items():
        for checkpoint in complete_checkpoints(folder / "checkpoints")[-1:]:
            found = read_json(checkpoint / "state.json")["fingerprints"]
            wanted, other = (found, name) if wanted is None else (wanted, other)
            for option, fingerprint in found.items():
                if wanted.get(option) != fingerprint:
                    raise ValueError(
                        f"`--out`: {name} was trained with another content of `{option}` than {other}, which does not "
                        f"compare: {CONTENT[option]} Restore it, delete {folder}, or choose another folder."
                    )


def evaluation_key(folder: Path, options: dict) -> str:
    """What an evaluation of the run is of: the options and the weights."""
    return digest(options, weights_digest(folder / "pipeline" / "transformer"))


def is_evaluated(folder: Path, options: dict) -> bool:
    key = folder / "evaluation.key"
    is_same = key.is_file() and key.read_text(encoding="utf-8") == evaluation_key(folder, options)
    return is_same and (folder / "evaluation" / "evaluation.json").is_file()


def part_of_cores(parallel: int) -> list[str]:
    """The option that keeps runs at the same time from taking each other's cores; the file's own comes after it."""
    return ["--cpu_threads", str(max(1, available_cores() // parallel))] if parallel > 1 else []


def gpu_names() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may name, one by one: of what it names now, those that torch finds."""
    found = [str(device.index) for device in accelerators() if device.type == "cuda"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else [name.strip() for name in visible.split(",")][: len(found)]


def code_digest() -> str:
    """Of the sources that runs are made by."""
    return digest_of_sources(Path(freqgate_dit.__file__).parent, Path(__file__).parent)


def codes_of(folders: Iterable[Path]) -> list[str]:
    """Digests of all versions of the code that had a part in runs; of older runs none is known."""
    files = [Path(f"{folder}.code") for folder in folders]
    return sorted({code for file in files if file.is_file() for code in file.read_text(encoding="utf-8").split()})


def training_job(name: str, words: list[str], folder: Path) -> Job:
    """Start the run in `folder`, or go on with it."""
    code = Path(f"{folder}.code")
    codes = codes_of([folder]) if folder.exists() else []
    if folder.exists() and not codes and not checkpoint_folders(folder / "checkpoints"):
        raise FileExistsError(f"{folder} was not made by this comparison: move it away, or name another `--out`.")
    code.parent.mkdir(parents=True, exist_ok=True)
    write_text(code, "\n".join(dict.fromkeys([*codes, code_digest()])))
    return script_job(name, "train.py", [*words, "--resume", "auto"], folder)


def evaluation_job(name: str, options: dict, folder: Path, cores: Sequence[str] = ()) -> Job:
    """Start or go on with the evaluation of a trained run; one of other weights or options is deleted."""
    file, key = folder / "evaluation.key", evaluation_key(folder, options)
    if not file.is_file() or file.read_text(encoding="utf-8") != key:
        if (folder / "evaluation").exists() and not file.is_file():
            raise FileExistsError(
                f"{folder / 'evaluation'} was not made by this comparison: move it away, or name another `--out`."
            )
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
        write_text(file, key)
    words = words_of({"pipeline": folder / "pipeline", **options, "out": folder / "evaluation"})
    return script_job(name, "evaluation.py", [*cores, *words], folder)


def script_job(name: str, script: str, words: list[str], folder: Path) -> Job:
    return Job(name, [sys.executable, str(Path(__file__).with_name(script)), *words], Path(f"{folder}.log"))


def run_all(jobs: list[Job], parallel: int, what: str, gpus: Sequence[str] = ()):
    """Run all jobs, `parallel` at a time, each on one of `gpus` where there are several: on the one with fewest.

    Each has a session of its own, so that a signal for this process and its group reaches a job once, from here.

    Raises:
        RuntimeError: if one fails; the others that run are stopped.
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, when the jobs that run have saved and ended.
    """
    waiting, running = list(jobs), {}
    progress = tqdm(total=len(jobs), desc=what, unit="run")
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    signals = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # by `nohup`
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                taken = [gpu for *_, gpu in running.values()]
                gpu = min(gpus, key=taken.count) if len(gpus) > 1 else None
                environment = None if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                with open(job.log, "a", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                    )
                running[job.name] = job, process, gpu
            for job, process, _ in list(running.values()):
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode:
                    said = job.log.read_text(encoding="utf-8").splitlines()[-1:]
                    raise RuntimeError(
                        f"{job.name} ended with status {process.returncode}: {''.join(said)} (more in {job.log}). The "
                        "same command goes on where it stopped."
                    )
                progress.update()
            time.sleep(0.2)
    finally:
        progress.close()
        stop([process for _, process, _ in running.values()])
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop(processes: Sequence[subprocess.Popen]):
    """Ask runs, once, to save and leave, and wait for them. A signal while it waits ends them at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


# -- the script -------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, required=True, help="YAML file of the comparison")
    parser.add_argument("--out", type=user_path, required=True, help="folder for runs and results")
    parser.add_argument(
        "--arms", nargs="+", help="some of the file's arms and the baseline, reported in OUT/some_arms (default: all)"
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print sizes and commands of the runs, train nothing")
    parser.add_argument(
        "--report_only", action="store_true", help="report on the seeds that all arms have finished, train nothing"
    )
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on where its runs have stopped") from None


def run(options: argparse.Namespace):
    if options.parallel < 1:
        raise ValueError(f"`--parallel` ({options.parallel}) must be at least 1.")
    comparison = load_comparison(options.config)
    if options.arms:
        comparison = only(comparison, options.arms)
    configs = [comparison.config(arm) for arm in comparison.arms]
    steps = configs[0].train.max_steps
    if steps is None:
        raise ValueError("`common` needs `max_steps`, the budget of every run.")
    types = sorted({config.objective.prediction_type for config in configs})
    if comparison.measure == "own" and len(types) > 1:
        raise ValueError(
            f"`arms` predict different things ({', '.join(types)}), whose errors do not compare: set `measure` to "
            "epsilon."
        )
    evaluation = comparison.evaluation
    if evaluation:
        words = words_of({"pipeline": "pipeline", **evaluation})
        check_arguments(make_parser().parse_args(words))
    sizes = ModelSizes(comparison.config(comparison.baseline))
    comparison = matched(comparison, sizes)
    print(sizes_table(comparison, sizes))
    refuse_few_images(sizes, configs[0])

    # All arms of a seed first: what is cut off is still paired.
    keys = [(arm, seed) for seed in comparison.seeds for arm in comparison.arms]
    folders = {(arm, seed): options.out / "runs" / f"{arm}_seed{seed}" for arm, seed in keys}
    training = {key: comparison.arguments(*key, folder) for key, folder in folders.items()}
    if options.dry_run:
        for words in training.values():
            print(f"python training/train.py {' '.join(words)}")
        return

    report = options.out / "some_arms" if options.arms else options.out
    refuse_to_overwrite(report, list(comparison.arms))
    names = {(arm, seed): f"{arm} with seed {seed}" for arm, seed in keys}
    for key, folder in folders.items():
        refuse_other_options(names[key], folder, parse_config(training[key]))

    def trained(key) -> bool:
        return is_trained(folders[key], steps)

    def finished(key) -> bool:
        return trained(key) and (not evaluation or is_evaluated(folders[key], evaluation))

    for key in filter(trained, keys):  # what cannot be compared is told before anything is trained
        read_run(folders[key], comparison.weights, evaluated=False, measure=comparison.measure)
    is_complete = options.report_only or all(map(trained, keys))
    refuse_other_content({names[key]: folders[key] for key in keys}, None if is_complete else sizes.fingerprints)
    if options.report_only:
        seeds = [seed for seed in comparison.seeds if all(finished((arm, seed)) for arm in comparison.arms)]
        if len(seeds) < 2:
            raise ValueError(f"`--report_only`: {len(seeds)} seeds have all arms finished; it takes 2 or more.")
        folders = {(arm, seed): folder for (arm, seed), folder in folders.items() if seed in seeds}
    else:
        done = sum(map(finished, keys))
        if done:
            print(f"{done} of {len(keys)} runs were finished before")
        cores, gpus = part_of_cores(options.parallel), gpu_names()
        jobs = [training_job(names[key], [*cores, *training[key]], folders[key]) for key in keys if not trained(key)]
        run_all(jobs, options.parallel, "training", gpus)
        if evaluation:
            jobs = [evaluation_job(names[key], evaluation, folders[key], cores) for key in keys if not finished(key)]
            run_all(jobs, options.parallel, "evaluating", gpus)
    report.mkdir(exist_ok=True)
    result = summarise(comparison, folders)
    result["code"] = codes_of(folders.values())
    if len(result["code"]) > 1:
        print(
            f"note: these runs are of {len(result['code'])} versions of the code, and may differ in more than their "
            "arms"
        )
    write_report(result, report)


if __name__ == "__main__":
    main()
