"""Show what a model does with frequency: one command, one page.

    python training/analyze.py --pipeline runs/mine/pipeline --out report

Writes `report.html`, with all figures inside, `report.json`, which says what it is of, and under `--out`/sections the
figures as PNG and the tables as JSON and parquet. Sections: the order in which octaves are made; the gates over time;
interventions (a label in one path alone, another gate), from the same noise; and, for models of the built-in data,
what the label can say at which noise level, and at which structure and texture are decided. What has not changed since
the last call is not measured again.
The page begins with the claims that were tested and what came of each; `--update_card` puts these into the model card.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm


# An uninstalled checkout: `python training/analyze.py` puts this folder, not the root, on the path.
if (Path(__file__).resolve().parents[1] / "setup.py").is_file():
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import freqgate_dit
from freqgate_dit import __version__, pipelines, training
from freqgate_dit.devices import choose_device
from freqgate_dit.features import CACHE_DIR
from freqgate_dit.files import digest, digest_of_sources, user_path, write_text
from freqgate_dit.findings import Findings
from freqgate_dit.model_card import card_in_words
from freqgate_dit.shapes_textures import NUM_CLASSES, WORLDS
from freqgate_dit.training import report
from freqgate_dit.training.config import ASIDE
from freqgate_dit.training.data import BUILT_IN
from freqgate_dit.training.generation import Model, check_card_folder, load_model, scheduler_arguments
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.training.report import OPTIONS, SECTIONS, Subject
from freqgate_dit.training.report.page import Section, delete_section, keep_section, render_page


LEAST = {"images": 2, "steps": 3, "pairs": 2, "levels": 3, "batch_size": 1, "seed": 0}
OF_THIS_MACHINE = ("pipeline", "out", "cache_dir", "cpu_threads", "update_card")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub id")
    parser.add_argument(
        "--out", type=user_path, default=Path("report"), help="folder for the report (default: report)"
    )
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--images", type=int, default=128, help="images per measurement (default 128)")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps (default 30)")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of labels that are exchanged (default 64)")
    parser.add_argument("--levels", type=int, default=12, help="noise levels at which they are (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (default 0)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument(
        "--world",
        choices=WORLDS,
        help="of the built-in data, for a pipeline whose training_config.yaml, which says it, is lost",
    )
    parser.add_argument("--prompts", nargs="+", default=[], help="of a text-conditional pipeline, used in turn")
    parser.add_argument("--sampler", help="as for training/evaluation.py (default: the pipeline's own)")
    parser.add_argument(
        "--cache_dir", default=CACHE_DIR, help="where the judge of the built-in data is kept (default %(default)s)"
    )
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--update_card", action="store_true", help="put the claims into the pipeline's model card")
    return parser


def world_of(model: Model, given: str | None) -> str | None:
    """World of the built-in data that the model was trained on, by the configuration beside it, or as `given`.

    Raises:
        ValueError: if the configuration says otherwise, or the model does not have the classes of the built-in data.
    """
    config = model.summary.training_config
    if config is not None:
        recorded = config.get("world") if config.get("dataset") == BUILT_IN else None
        if given not in (None, recorded):
            data = config.get("dataset") if recorded is None else recorded
            raise ValueError(f"`world` ({given!r}): this pipeline was trained on {data!r}; leave `world` out.")
        return recorded
    has = model.pipe.num_classes
    if given is not None and has not in (None, NUM_CLASSES):
        raise ValueError(
            f"`world` ({given!r}): the built-in data has {NUM_CLASSES} classes, this pipeline {has}, so it was "
            "trained on other data; leave `world` out."
        )
    return given


def name_of(model: Model) -> str:
    """As people call it: the run's name, where the pipeline's folder is just "pipeline"."""
    folder = Path(model.folder).resolve()
    return folder.parent.name if model.name == folder.name == "pipeline" else model.name


def main(arguments: list[str] | None = None):
    given = make_parser().parse_args(arguments)
    try:
        run(given)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def command_of(given: argparse.Namespace) -> str:
    """What makes the report again, with the pipeline in FOLDER."""
    words, parser = ["python training/analyze.py --pipeline FOLDER --out report"], make_parser()
    for name, value in vars(given).items():
        if name not in OF_THIS_MACHINE and value != parser.get_default(name):
            values = map(str, value) if isinstance(value, list) else [str(value)]
            words.append(f"--{name} {shlex.join(values)}")
    return " ".join(words)


def update_card(given: argparse.Namespace, sections: list[Section], sampler: str, model: Model):
    """Put the claims into the pipeline's folder, and write its card anew.

    Raises:
        ValueError: if no section has tested one.
    """
    claims = [claim for section in sections for claim in section.claims]
    if not claims:
        raise ValueError("`update_card`: no section has tested a claim on this model, so there is none for its card.")
    folder = Path(given.pipeline).expanduser()
    protocol = {name: getattr(given, name) for name in ("images", "steps", "pairs", "levels", "seed", "batch_size")}
    protocol |= {"sampler": sampler, "guidance": "none", "dtype": str(model.dtype), "freqgate_dit": __version__}
    protocol["checkpoint"] = (model.weights["checkpoint"] or "not known")[:12]
    path = Findings(claims, protocol, command_of(given)).save(folder)
    print(f"\nwrote the claims into {path}; {card_in_words(folder)}")


def facts_of(
    given: argparse.Namespace, model: Model, subject: Subject, code: str, scheduler: dict, sections: list[Section]
) -> dict:
    """What was measured and how: `report.json`, and in short the head of the page."""
    training_config = model.summary.training_config or {}
    return {
        "variant": model.summary.variant,
        "parameters": model.summary.parameters,
        "prediction_type": model.summary.prediction_type,
        "world": subject.world,
        "checkpoint": model.weights["checkpoint"],
        "config": {name: value for name, value in model.summary.config.items() if name[0] != "_"},
        "training": {name: value for name, value in training_config.items() if name not in ASIDE},
        "scheduler": scheduler,
        **{name: getattr(given, name) for name in (*LEAST, "prompts")},
        "dtype": model.dtype,
        "code": code,
        "torch": torch.__version__.split("+")[0],
        "freqgate_dit": __version__,
        "seconds": {name: section.seconds for name, section in zip(given.sections, sections, strict=True)},
    }


def in_words(facts: dict) -> str:
    of_world = f", world '{facts['world']}'" if facts["world"] else ""
    return (
        f"Variant {facts['variant']}, {facts['parameters'] / 1e6:.2f} M parameters, {facts['prediction_type']}"
        f"{of_world}; {facts['scheduler']['class']}, {facts['steps']} steps, without guidance; {facts['images']} "
        f"images from seed {facts['seed']}; {facts['dtype']}, torch {facts['torch']}, freqgate_dit "
        f"{facts['freqgate_dit']}. Measured in {sum(facts['seconds'].values()):.0f} s."
    )


def run(given: argparse.Namespace):
    for name, least in LEAST.items():
        if getattr(given, name) < least:
            raise ValueError(f"`{name}` ({getattr(given, name)}) must be at least {least}.")
    if given.levels > given.steps:
        raise ValueError(f"`levels` ({given.levels}) must be at most `steps` ({given.steps}).")
    if given.update_card:
        check_card_folder(given.pipeline)
        if given.sections != list(SECTIONS):
            raise ValueError("`update_card` replaces the claims of all sections: leave `sections` out.")
    use_all_cores(given.cpu_threads)
    model = load_model(given.pipeline, given.sampler, "auto", choose_device())
    sizes = given.images, given.steps, given.pairs, given.levels, given.seed, given.batch_size
    subject = Subject(model.pipe, world_of(model, given.world), *sizes, given.prompts, given.cache_dir)
    scheduler = {"class": type(model.pipe.scheduler).__name__, **scheduler_arguments(model.pipe.scheduler)}
    # The classes' names, and whether the null condition was trained, are no part of the weights.
    config = [model.summary.config, model.pipe.id2label, model.pipe.config.class_dropout_prob]
    # Not the version: between two of them the code changes too.
    code = digest_of_sources(*(Path(module.__file__).parent for module in (freqgate_dit, pipelines, training, report)))
    sections = []
    with tqdm(given.sections, desc="report", unit="section") as progress:
        for name in progress:
            progress.set_postfix_str(name)
            if model.weights["checkpoint"] is None:  # weights that have no digest are never the same
                delete_section(given.out / "sections" / name)
            options = [getattr(subject, option) for option in OPTIONS[name]]
            key = digest(name, code, model.weights, config, scheduler, options, subject.world, model.dtype)
            section, is_new = keep_section(given.out / "sections" / name, key, lambda: SECTIONS[name](subject))
            progress.write(f"{name}: {f'measured in {section.seconds:.0f} s' if is_new else 'unchanged, kept'}")
            sections.append(section)
    facts = facts_of(given, model, subject, code, scheduler, sections)
    write_text(given.out / "report.json", json.dumps(facts, indent=1) + "\n")
    write_text(
        given.out / "report.html",
        render_page(f"What {name_of(model)} does with frequency", [in_words(facts)], sections),
    )
    for section in sections:
        paragraphs = (*section.reading, *section.captions.values())
        print(f"\n{section.title}\n" + "\n".join(f"  {paragraph}" for paragraph in paragraphs))
    if given.update_card:
        update_card(given, sections, scheduler["class"], model)
    print(f"\nwrote {given.out / 'report.html'}, figures and tables in {given.out / 'sections'}")


if __name__ == "__main__":
    main()
