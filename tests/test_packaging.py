"""The package as users get it: a wheel in a fresh environment, an editable install, a bare checkout."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import ROOT, copy_source, fresh_environment


MODULES = [
    "freqgate_dit",
    "freqgate_dit.pipelines",
    "freqgate_dit.pipelines.pipeline_freqgate_dit",
    "freqgate_dit.training.train",
]
# Prints where each module was imported from, and which presets lie beside the trainer.
LOOK = f"""
import importlib, json, pathlib
files = {{name: importlib.import_module(name).__file__ for name in {MODULES!r}}}
from freqgate_dit import FreqGateDiTPipeline, FreqGateDiTTransformer2DModel
from freqgate_dit.training.config import parse_config
presets = sorted(pathlib.Path(files["freqgate_dit.training.train"]).parent.glob("configs/*.yaml"))
variants = [parse_config(["--config", str(preset)]).model.variant for preset in presets
            if not preset.name.startswith("compare_")]
print(json.dumps([files, [preset.name for preset in presets]]))
"""


def run(*words, cwd, **variables):
    done = tiny_runs.run(*words, cwd=cwd, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INDEX="1", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(python, cwd, **variables):
    files, presets = json.loads(run(python, "-c", LOOK, cwd=cwd, **variables).splitlines()[-1])
    assert presets == sorted(path.name for path in (ROOT / "training" / "configs").glob("*.yaml"))
    return {name: Path(file).resolve() for name, file in files.items()}


@pytest.fixture
def repository(tmp_path):
    """A copy of its own, because building leaves files in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    return copy_source(folder)


def pip_install(python, cwd, *what):
    options = ("install", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, *options, *what, cwd=cwd)


def test_wheel_in_a_fresh_environment(tmp_path, repository):
    pip_wheel = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", tmp_path / "dist", cwd=repository)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    # Only the package lands at the top level, and every source file of the three folders is in it.
    (metadata,) = {name.split("/")[0] for name in names} - {"freqgate_dit"}
    assert metadata.endswith(".dist-info")
    expected = set()
    for folder, inside in (("freqgate_dit", ""), ("pipelines", "pipelines/"), ("training", "training/")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md"):
                expected.add(f"freqgate_dit/{inside}{path.relative_to(ROOT / folder).as_posix()}")
    assert {name for name in names if name.startswith("freqgate_dit/")} == expected

    python, packages = fresh_environment(tmp_path / "environment")
    before = {path.name for path in packages.iterdir()}
    pip_install(python, tmp_path, wheel)
    assert {path.name for path in packages.iterdir()} - before == {"freqgate_dit", metadata}
    for name, file in imported(python, tmp_path).items():
        assert file.is_relative_to(packages.resolve() / "freqgate_dit"), name
    assert "usage: freqgate-dit" in run(python.parent / "freqgate-dit", "--help", cwd=tmp_path)


def test_bare_checkout(tmp_path, checkout):
    python, _ = fresh_environment(tmp_path / "environment")
    files = imported(python, tmp_path, PYTHONPATH=str(checkout))
    folders = {name: file.parent.relative_to(checkout.resolve()).as_posix() for name, file in files.items()}
    assert folders == {
        "freqgate_dit": "freqgate_dit",
        "freqgate_dit.pipelines": "pipelines",
        "freqgate_dit.pipelines.pipeline_freqgate_dit": "pipelines",
        "freqgate_dit.training.train": "training",
    }


def test_editable_install(tmp_path, repository):
    python, packages = fresh_environment(tmp_path / "environment")
    pip_install(python, tmp_path, "--editable", repository)
    assert not (packages / "freqgate_dit").exists()
    for name, file in imported(python, tmp_path).items():
        assert file.is_relative_to(repository.resolve()), name
