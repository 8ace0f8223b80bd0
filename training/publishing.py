"""The pipeline folder that is loaded and shared: whole or not there, and silent about the machine it comes from."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline

from freqgate_dit.training.config import TrainingRun
from freqgate_dit.training.files import replace_folder


def write_pipeline(pipeline: DiffusionPipeline, folder: Path, config: TrainingRun):
    """Save `pipeline` with the configuration that trained it as `folder`, in place of one that is there already.

    Raises:
        OSError, SafetensorError: if it cannot be written; what was there before is still there.
    """

    def write(temporary: Path):
        pipeline.save_pretrained(temporary)
        for path in temporary.glob("*/*config.json"):
            forget_origin(path)
        config.shareable().save(temporary / "training_config.yaml")

    replace_folder(folder, write)


def forget_origin(config_file: Path):
    """Take out of a component's configuration where it was loaded from, which diffusers writes into it."""
    config = json.loads(config_file.read_text())
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}
    if kept != config:
        config_file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
