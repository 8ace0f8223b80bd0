"""Tiny runs of the trainer: their options, how tests start them, and how they read what is left of them."""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from freqgate_dit.training.train import main


ROOT = Path(__file__).resolve().parents[1]
# A tiny model on the built-in data, for any script that takes the trainer's options.
MODEL = {
    "num_images": 96,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "patch_size": 8,
    "mlp_ratio": 2.0,
    "per_device_batch_size": 8,
    "num_validation_images": 32,
    "num_previews": 4,
    "num_inference_steps": 2,
}
# What a run of it needs; validation, previews and checkpoints come only at the end.
TINY = {
    "config": "none",
    **MODEL,
    "max_steps": 8,
    "learning_rate": 3e-3,
    "prediction_type": "v_prediction",
    "ema": "0.9",
    "ema_snapshots": 0,
    "mixed_precision": "no",
    "cpu_threads": 1,
    "log_every": 4,
    "validate_every": 1000,
    "preview_every": 1000,
    "save_every": 1000,
}


# -- in this process --------------------------------------------------------------------------------------------------


def command_line(values):
    """Options as the words of a command; a list is several values, `None` leaves an option out."""
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None and name not in lists]
    return flags + [word for name, value in lists.items() for word in (f"--{name}", *value)]


def reset_accelerate():
    """Accelerate keeps one state per process; a user's command has a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(arguments):
    """Run the trainer as a command of its own."""
    reset_accelerate()
    main(arguments)


def last_words(arguments):
    """What a user sees of a run that ends before its end."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:  # the latter would end pytest
        train(arguments)
    assert stopped.type is SystemExit
    message = stopped.value.code
    assert isinstance(message, str)
    return message


def refusal(arguments):
    """The one sentence that a user sees."""
    message = last_words(arguments)
    assert message.startswith("error: ")
    return message


# -- what is left of a run --------------------------------------------------------------------------------------------


def state(output_dir, step):
    """Tensors of a checkpoint: file (model, optimizer, ema-...), name, tensor."""
    folder = Path(output_dir) / "checkpoints" / f"step_{step:08d}"
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def metrics(output_dir):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def is_drawn(picture):
    """Whether an image file is more than one colour."""
    with Image.open(picture) as image:
        return any(low < high for low, high in image.convert("RGB").getextrema())


# -- as a command -----------------------------------------------------------------------------------------------------


def environment(**more):
    """Variables for a process that finds this package only where it is told to, and no network."""
    dropped = ("ACCELERATE_", "PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **more}


def command(program, *arguments):
    """The words of a command whose program (a name, or a path) is this environment's."""
    found = sys.executable if program == "python" else Path(sys.executable).parent / program
    return [str(word) for word in (found, *arguments)]


def run(*words, cwd=None, **more):
    """Run a command to its end, with more environment variables."""
    return subprocess.run(
        command(*words), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=400
    )


def fresh_environment(folder):
    """A virtual environment that finds this one's packages by path, after its own, and none of its editable ones."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent).check_returncode()
    python = folder / "bin" / "python"
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout
    packages = Path(place.strip())
    here = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
    (packages / "outer.pth").write_text("".join(f"{path}\n" for path in here))
    return python, packages


# -- files ------------------------------------------------------------------------------------------------------------


def copy_source(folder):
    """Copy the source tree, in which nothing was installed or built, to a new folder."""
    for name in ("freqgate_dit", "pipelines", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def photos(folder, labels=("cat", "dog", "wild"), count=6):
    """A folder per label with `count` images of noise, 16 x 16."""
    for label in labels:
        (folder / label).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([index, ord(label[0])]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder
