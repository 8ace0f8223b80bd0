"""`freqgate-dit doctor`: what it calls bad and what not, by made-up versions and machines, and its report here."""

import json
import os
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from tiny_runs import ROOT

from freqgate_dit import cli, devices, doctor
from freqgate_dit.hub import explain
from freqgate_dit.training.config import LatentConfig


MACHINE = {
    "cores": 8,
    "threads": 8,
    "instructions": "AVX512",
    "cuda_build": None,
    "fast_bf16": ["cpu"],
    "accelerators": {},
}
GPU = {
    "cuda_build": "13.0",
    "fast_bf16": ["cpu", "cuda:0"],
    "accelerators": {"cuda:0": "NVIDIA H200, 140 GiB, compute capability 9.0"},
}


def install(folder, name, version, *requires, python=">=3.11"):
    """Leave what pip leaves of an installed distribution."""
    folder = folder / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires), ""]))


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"clean-fid": "0.1.35", "scipy": "1.18.0"}, ["removed `scipy.linalg.sqrtm(disp=)`"]),
        ({"clean-fid": "0.1.35", "scipy": "1.18.0rc1"}, []),
        ({"clean-fid": "0.1.35", "scipy": "1.17.1"}, []),
        ({"clean-fid": "0.1.35", "scipy": "1.13"}, []),
        ({"clean-fid": "0.1.35", "scipy": "1.12.0"}, ["large imaginary parts"]),
        ({"clean-fid": "0.1.35", "scipy": "1.11.1"}, []),
        ({"clean-fid": "0.1.35"}, []),
        ({"scipy": "1.18.0"}, []),
        ({}, []),
    ],
)
def test_known_combinations(versions, words):
    found = doctor.known(versions.get)
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence and "`pip install '" in sentence


def lowest(requirement):
    """The oldest version that a requirement allows."""
    (bound,) = [one.version for one in requirement.specifier if one.operator == ">="]
    return bound


def test_the_bounds_of_the_package():
    needed = doctor.always_needed(doctor.own_requirements())
    versions = {requirement.name: lowest(requirement) for requirement in needed}
    assert {"python", "torch", "diffusers", "transformers", "huggingface_hub"} <= versions.keys()
    assert doctor.unmet("freqgate-dit", needed, versions.get) == []
    for name in versions:
        (sentence,) = doctor.unmet("freqgate-dit", needed, {**versions, name: "0.0.1"}.get)
        assert f" {name}" in sentence and f">={versions[name]}, but 0.0.1 is installed: " in sentence
        (sentence,) = doctor.unmet("freqgate-dit", needed, {**versions, name: None}.get)
        assert f" {name}" in sentence and f">={versions[name]}, which is not installed: `pip install '" in sentence
    (sentence,) = doctor.unmet("freqgate-dit", needed, {**versions, "diffusers": "0.43.0"}.get)
    assert sentence.endswith("but 0.43.0 is installed: `pip install 'diffusers<0.43,>=0.42.1'`.")
    # A build is as good as its release.
    assert doctor.unmet("freqgate-dit", needed, {**versions, "torch": f"{versions['torch']}.0+cpu"}.get) == []


def test_what_extras_need_may_be_missing_but_not_old():
    own = [one for one in doctor.own_requirements() if one not in doctor.always_needed(doctor.own_requirements())]
    testing = Requirement("any; extra == 'test'").marker
    optional = [one for one in own if one.name in doctor.OPTIONAL]
    # What is for users is in the table.
    assert {one.name for one in own if one.marker != testing} <= {one.name for one in optional} != set()
    missing = {one.name: None for one in optional}
    problems = [doctor.version_problems({**missing, one.name: "0.0.1"}.get) for one in optional]
    for requirement, sentences in zip(optional, problems, strict=True):
        assert any(f"{requirement.name}>={lowest(requirement)}, but 0.0.1 is" in one for one in sentences), requirement
    assert not any(name in sentence for name in missing for sentence in doctor.version_problems(missing.get))


def test_installed_and_not_installed_say_the_same(tmp_path, monkeypatch):
    expected = doctor.checkout_requirements()
    python, *others = expected
    # As setuptools writes it.
    words = [str(one).replace("'", '"') for one in others]
    install(tmp_path, "freqgate_dit", "9.8.7", *words, python=str(python.specifier))
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.own_requirements() == expected
    assert doctor.package_rows()["freqgate-dit"].startswith("9.8.7, installed, in ")


def test_torchvision_for_another_torch(tmp_path, monkeypatch):
    torch_version = Version(torch.__version__).base_version
    before = doctor.version_problems()
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "torchvision", "0.99.0", f"torch=={torch_version}", "numpy")
    assert doctor.version_problems() == before
    install(
        tmp_path / "other", "torchvision", "0.98.0", "torch==2.12.9", "no-such-package", "gdown ; extra == 'gdown'"
    )
    monkeypatch.syspath_prepend(tmp_path / "other")
    added = [sentence for sentence in doctor.version_problems() if sentence not in before]
    assert added == [
        f"torchvision needs torch==2.12.9, but {torch.__version__} is installed (importing it fails with `operator "
        "torchvision::nms does not exist`): install releases of torchvision and torch that belong together.",
        "torchvision needs no-such-package, which is not installed: `pip install 'no-such-package'`.",
    ]


# -- the machine ------------------------------------------------------------------------------------------------------


def test_rows_of_machines():
    rows = doctor.machine_rows(MACHINE)
    assert rows["GPU"] == "none that torch finds; it was built without CUDA"
    assert rows["bfloat16"] == "fast on cpu"
    assert doctor.machine_rows({**MACHINE, "fast_bf16": []})["bfloat16"] == "slow here, so that float32 is chosen"
    rows = doctor.machine_rows({**MACHINE, **GPU})
    assert "GPU" not in rows and rows["cuda:0"] == "NVIDIA H200, 140 GiB, compute capability 9.0"
    assert rows["bfloat16"] == "fast on cpu, cuda:0"
    assert "built for CUDA 13.0" in doctor.machine_rows({**MACHINE, "cuda_build": "13.0"})["GPU"]


@pytest.mark.parametrize(
    ("machine", "environment", "driver", "words"),
    [
        ({}, {}, False, []),
        ({}, {"OMP_NUM_THREADS": "4"}, False, []),
        ({}, {"OMP_NUM_THREADS": "1"}, False, ["OMP_NUM_THREADS is 1, so that sampling uses 1 of 8 cores"]),
        ({"cores": 1}, {"OMP_NUM_THREADS": "1"}, False, []),
        ({"fast_bf16": []}, {}, False, ["has no bfloat16 units"]),
        ({}, {}, True, ["this torch was built without CUDA"]),
        ({"cuda_build": "13.0"}, {}, True, ["new enough for CUDA 13.0"]),
        ({"cuda_build": "13.0"}, {}, False, []),
        (GPU, {"OMP_NUM_THREADS": "1"}, True, []),
    ],
)
def test_notes_on_machines(machine, environment, driver, words, tmp_path, monkeypatch):
    program = tmp_path / ("nvidia-smi" if driver else "other")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    notes = doctor.machine_notes({**MACHINE, **machine}, environment)
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert word in note


def test_no_password_of_an_address_is_shown(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://ana:secret@hub.example:8080/path")
    doctor.look()
    printed = capsys.readouterr().out
    assert "https://hub.example:8080/path" in printed and "secret" not in printed and "ana" not in printed
    error = explain(ConnectionError(), "ana/dit")
    assert "https://hub.example:8080/path" in str(error) and "secret" not in str(error)


def test_tokens_and_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub = {"endpoint": "https://hub", "offline": False, "cache": str(tmp_path / "hub"), "token_stored": False}
    rows = doctor.hub_rows(hub, {})
    assert rows["endpoint"] == "https://hub" and rows["offline mode"] == "off"
    assert rows["token"].startswith("none: only public repositories")
    assert rows["model cache"].startswith("~/hub, ")
    assert rows["data cache"].startswith("~/.cache/freqgate_dit, ")
    assert "HF_HUB_OFFLINE" in doctor.hub_rows({**hub, "offline": True}, {})["offline mode"]
    assert "stored by `hf auth login`" in doctor.hub_rows({**hub, "token_stored": True}, {})["token"]
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        rows = doctor.hub_rows({**hub, "token_stored": True}, {name: "hf_secret"})
        assert f"from {name};" in rows["token"] and "hf_secret" not in str(rows)


def test_the_cache_is_the_trainers():
    assert doctor.DATA_CACHE == LatentConfig().cache_dir


# -- the report -------------------------------------------------------------------------------------------------------


def doctor_here(capsys):
    code = cli.main(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    sections = {}
    for line in out.splitlines():
        if line and not line.startswith(" "):
            title = line
        elif line:
            name, _, value = line.strip().partition(" ")
            sections.setdefault(title, {})[name] = value.strip()
    return code, sections, out


def test_the_report_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, sections, out = doctor_here(capsys)
    assert list(sections)[:3] == ["Packages", "Machine", "Hugging Face Hub, caches"]
    assert sections["Packages"]["torch"] == torch.__version__
    assert sections["Packages"].keys() >= doctor.OPTIONAL.keys()
    assert sections["Hugging Face Hub, caches"]["token"].startswith("from HF_TOKEN;")
    assert f"fast on {', '.join(devices.describe_machine()['fast_bf16'])}" in out or "slow here" in out
    assert "hf_secret" not in out and f"{Path.home()}/" not in out.replace(str(ROOT), "")
    assert code == ("Problems" in sections)
    assert ("No problems found." in out) == (code == 0)


def test_a_broken_torch_is_reported(capsys, monkeypatch, tmp_path):
    """The report comes without what is broken, and without importing it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.99: no such file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, sections, out = doctor_here(capsys)
    assert code == 1
    reason = "OSError: libcudart.so.99: no such file"
    assert f"- the package cannot be imported ({reason}): reinstall what is named there." in " ".join(out.split())
    assert sections["Packages"]["torch"] == torch.__version__ and "system" in sections["Machine"]
    assert "bfloat16" not in sections["Machine"]
    assert "Hugging Face Hub, caches" in sections and "hf_secret" not in out


# -- devices ----------------------------------------------------------------------------------------------------------


def test_devices():
    there = [str(device) for device in devices.accelerators()]
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert str(devices.choose_device("auto")) == (there[0] if there else "cpu")
    assert str(devices.choose_device()) == str(devices.choose_device("auto"))
    for name in ("tpu", "cuda:99", "", "meta"):
        with pytest.raises(ValueError, match=rf"`device` \({name}\) is not there: torch .* finds cpu"):
            devices.choose_device(name)
    for name in there:
        assert str(devices.choose_device(name)) == name


def test_precision():
    cpu = torch.device("cpu")
    assert devices.choose_dtype("float16", cpu) == torch.float16
    assert devices.choose_dtype("float32", cpu) == torch.float32
    assert devices.choose_dtype("auto", cpu) == (torch.bfloat16 if devices.bf16_is_fast(cpu) else torch.float32)
    assert devices.choose_dtype("auto", torch.device("mps")) == torch.float32


def test_the_machine_as_json():
    machine = devices.describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine.keys() == MACHINE.keys() and 1 <= machine["cores"]
    assert set(machine["fast_bf16"]) <= {"cpu", *machine["accelerators"]}
    assert ("cpu" in machine["fast_bf16"]) == devices.bf16_is_fast(torch.device("cpu"))
