"""Configuration: YAML, command line, and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from freqgate_dit.training.config import (
    HABITS,
    LOCAL,
    SECTIONS,
    LatentConfig,
    field_types,
    load_yaml,
    parse_config,
    preset_for,
)


CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"
PRESETS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("compare_*.yaml")))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def refusal(arguments):
    with pytest.raises(ValueError) as error:
        parse_config(arguments)
    return str(error.value)


# Where a value comes from


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_parse_and_say_what_they_hold(preset):
    config = parse_config(["--config", str(preset)]).to_dict()
    text = yaml.safe_load(preset.read_text())
    assert {name: config[name] for name in text} == text
    defaults = parse_config(["--max_steps", "1"]).to_dict() | {"max_steps": None}
    assert {name: value for name, value in config.items() if name not in text} == {
        name: value for name, value in defaults.items() if name not in text
    }


def test_the_committed_config_of_the_demo_still_starts_a_run():
    committed = parse_config(["--config", str(PRESETS[0].parents[2] / "results/demo_model/training_config.yaml")])
    assert committed.model.variant == "freq_gate" and committed.data.dataset == "shapes_textures"


def test_presets_train_into_folders_of_their_own():
    assert len(PRESETS) >= 2
    assert len({load_yaml(path)["output_dir"] for path in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ("--dataset photos", "photos64.yaml"),
        ("--dataset photos --resolution 96", "photos64.yaml"),
        ("--dataset photos --resolution 128", "photos128.yaml"),
        ("--dataset photos --config none --max_steps 9", None),
        ("--dataset photos --config None --max_steps 9", None),
        ("--dataset photos --vae taesd --max_steps 9", None),
        ("--dataset photos --init_from runs/other --max_steps 9", None),
        ("--max_steps 9", None),
    ],
)
def test_images_in_pixels_are_trained_by_a_preset(given, preset, capsys):
    more = [*given.split(), "--learning_rate", "0.25"]
    expected = ["--config", str(CONFIGS / preset)] if preset else []
    assert parse_config(more, preset=preset_for) == parse_config([*expected, *more])
    assert capsys.readouterr().out.count("photos") == bool(preset)  # it is said which one that is


def test_one_process_says_which_preset(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    parse_config(["--dataset", "photos"], preset=preset_for)
    assert capsys.readouterr().out == ""


def test_the_preset_is_one_recipe_at_every_size():
    small, large = (load_yaml(CONFIGS / f"photos{size}.yaml") for size in (64, 128))
    changed = {name for name in small | large if small.get(name) != large.get(name)}
    assert changed == {"resolution", "patch_size", "output_dir"}
    assert small["resolution"] / small["patch_size"] == large["resolution"] / large["patch_size"]  # as many tokens


@pytest.mark.parametrize("folder", ["runs/mine", None])
def test_a_run_goes_on_with_its_own_options_where_none_are_given(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "photos", "--resume", "auto", *(["--output_dir", folder] if folder else [])]
    first = parse_config([*words, "--qk_norm", "true"], preset=preset_for)
    Path(first.train.output_dir).mkdir(parents=True)
    first.save(Path(first.train.output_dir) / "config.yaml")
    assert parse_config(words, preset=preset_for) == first
    assert not parse_config(
        [word for word in words if word not in ("--resume", "auto")], preset=preset_for
    ).model.qk_norm


def test_a_run_in_a_named_folder_is_the_one_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = str(SECTIONS["train"].__dataclass_fields__["output_dir"].default)
    for folder, more in ((default, ["--dropout", "0.5"]), ("runs/photos64", ["--qk_norm", "true"])):
        Path(folder).mkdir(parents=True)
        first = parse_config(["--dataset", "photos", "--output_dir", folder, *more], preset=preset_for)
        first.save(Path(folder) / "config.yaml")
    for words in (["--dataset", "photos"], []):  # which data it was, the run knows
        again = parse_config([*words, "--output_dir", default, "--resume", "latest"], preset=preset_for)
        assert (again.model.dropout, again.model.qk_norm, again.data.dataset) == (0.5, False, "photos")


def test_a_preset_gives_way_to_a_config(tmp_path):
    path = write(tmp_path, "max_steps: 10\ndataset: photos\n")
    assert parse_config(["--config", path], preset=preset_for) == parse_config(["--config", path])


def test_command_line_beats_yaml_beats_default(tmp_path):
    path = write(tmp_path, "max_steps: 10\nlearning_rate: 0.5\nseed: 7\n")
    config = parse_config(["--config", path, "--learning_rate", "0.25"])
    assert (config.train.seed, config.train.learning_rate, config.train.max_steps) == (7, 0.25, 10)
    assert config.train.warmup_steps == SECTIONS["train"].__dataclass_fields__["warmup_steps"].default
    # Also where the command line repeats the default.
    assert parse_config(["--config", path, "--seed", "0"]).train.seed == 0


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ("num_epochs: 5", ["--max_steps", "3"], (3, None)),
        ("max_steps: 5", ["--num_epochs", "3"], (None, 3)),
        ("max_steps: 5", ["--max_steps", "3"], (3, None)),
    ],
)
def test_length_on_the_command_line_replaces_the_length_in_the_file(tmp_path, in_file, flags, expected):
    train = parse_config(["--config", write(tmp_path, in_file), *flags]).train
    assert (train.max_steps, train.num_epochs) == expected


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_saved_configuration_starts_the_same_run(preset, tmp_path):
    config = parse_config(["--config", str(preset), "--seed", "3", "--num_validation_images", "5"])
    config.save(tmp_path / "saved.yaml")
    assert parse_config(["--config", str(tmp_path / "saved.yaml")]) == config


def test_sections_do_not_share_names():
    names = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len(field_types())


# Types


def test_floats_in_yaml(tmp_path):
    train = parse_config(["--config", write(tmp_path, "max_steps: 1\nlearning_rate: 1e-4\nmax_grad_norm: 2")]).train
    assert train.learning_rate == 1e-4 and type(train.learning_rate) is float
    assert train.max_grad_norm == 2.0 and type(train.max_grad_norm) is float


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (False, True)),
        (["--compile"], (True, True)),
        (["--compile", "true", "--stratified", "false"], (True, False)),
        (["--compile", "false", "--no_stratified"], (False, False)),
    ],
)
def test_bools_on_the_command_line(flags, expected):
    config = parse_config(["--max_steps", "1", *flags])
    assert (config.train.compile, config.objective.stratified) == expected


def test_bools_in_yaml_can_be_turned_back(tmp_path):
    path = write(tmp_path, "max_steps: 1\ncompile: true\nstratified: false\n")
    config = parse_config(["--config", path])
    assert (config.train.compile, config.objective.stratified) == (True, False)
    config = parse_config(["--config", path, "--compile", "false", "--stratified", "true"])
    assert (config.train.compile, config.objective.stratified) == (False, True)


def test_unset_values(tmp_path):
    config = parse_config(["--config", write(tmp_path, "max_steps: 1\nvae: null\noutput_modulation: null")])
    assert config.latents.vae is None and config.model.output_modulation is None
    assert parse_config(["--max_steps", "1", "--output_modulation", "false"]).model.output_modulation is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("max_steps: many", ("`max_steps`", "'many'", "int")),
        ("max_steps: 1.5", ("`max_steps`", "1.5", "int")),
        ("max_steps: true", ("`max_steps`", "True", "int")),
        ("learning_rate: fast", ("`learning_rate`", "'fast'", "float")),
        ("compile: 1", ("`compile`", "1", "bool")),
        ("variant: null", ("`variant`", "None", "str")),
        ("mixed_precision: no", ("`mixed_precision`", "False", "str", "quotes")),
    ],
)
def test_wrong_types_in_yaml(tmp_path, line, words):
    path = write(tmp_path, line)
    message = refusal(["--config", path])
    assert all(word in message for word in (*words, path)), message


def test_wrong_type_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--max_steps", "many"])
    message = capsys.readouterr().err
    assert stopped.value.code != 0
    assert "error: argument --max_steps" in message and "'many'" in message
    assert len(message.splitlines()) == 2


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert [name for name in field_types() if f"--{name}" not in text] == []


def test_a_home_is_found_in_every_path_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [name for name in LOCAL if name != "cache_dir"]  # the cache is expanded where it is used
    (tmp_path / "run.yaml").write_text("max_steps: 1\n" + "".join(f"{name}: ~/in_file\n" for name in paths))
    for given, folder in (([], "in_file"), ([f"--{name}=~/given" for name in paths], "given")):
        values = parse_config(["--config=~/run.yaml", *given]).to_dict()
        assert {values[name] for name in paths} == {str(tmp_path / folder)}
    assert LatentConfig().cache_dir.startswith("~")  # what a run's config.yaml says is so on any machine


# Refusals


def test_the_config_of_a_copied_or_moved_run_is_not_that_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, copy = Path("run"), Path("copy")
    (run / "checkpoints").mkdir(parents=True)
    parse_config(["--max_steps", "1", "--output_dir", "run"]).save(run / "config.yaml")
    shutil.copytree(run, copy)
    for resume in ("latest", "auto"):
        assert parse_config(["--config", "run/config.yaml", "--resume", resume]).train.output_dir == "run"
        message = refusal(["--config", "copy/config.yaml", "--resume", resume])
        assert "`--config` (copy/config.yaml)" in message and "(run)" in message and "--output_dir copy" in message
    named = ["--config", "copy/config.yaml", "--resume", "latest", "--output_dir", "copy"]
    assert parse_config(named).train.output_dir == "copy"
    # To start the same run again elsewhere is another thing.
    assert parse_config(["--config", "copy/config.yaml"]).train.output_dir == "run"


def test_unknown_keys(tmp_path):
    message = refusal(["--config", write(tmp_path, "max_step: 10")])
    assert "'max_step'" in message and "max_steps" in message and "run.yaml" in message
    message = refusal(["--max_steps", "1", "--learning-rat=3"])
    assert "'learning_rat'" in message and "learning_rate" in message and "command line" in message
    message = refusal(["--max_steps", "1", "--zzzzqqqq", "3"])
    assert "'zzzzqqqq'" in message and "--help" in message
    assert "'stray'" in refusal(["--max_steps", "1", "stray"])
    retired = refusal(["--config", write(tmp_path, "timestep_spacing: trailing")])
    assert "'timestep_spacing' in" in retired and "give `sampler` in its place, euler for trailing" in retired
    assert "unknown configuration key 3" in refusal(["--config", write(tmp_path, "3: 4")])


def test_names_from_elsewhere_get_a_sentence_with_ours(tmp_path):
    assert set(HABITS.values()) <= field_types().keys() and not HABITS.keys() & field_types().keys()
    for words in (["--train_batch_size=8"], ["--train_batch_size", "8"], ["--train-batch-size", "8"]):
        message = refusal(["--max_steps", "1", *words])
        assert "'train_batch_size' in the command line is `per_device_batch_size` here: Images per process" in message
    assert "run.yaml is `resume` here: 'latest'" in refusal(["--config", write(tmp_path, "resume_from_checkpoint: a")])


def test_abbreviations_are_not_guessed():
    assert "max_steps" in refusal(["--max_step", "1"])


@pytest.mark.parametrize("text", ["- 1\n- 2", "just words", "max_steps: [1", "max_steps: 1\n\tseed: 2"])
def test_files_that_are_not_options(tmp_path, text):
    assert "run.yaml" in refusal(["--config", write(tmp_path, text)])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`--config` \(.*absent.yaml\) is not a file"):
        parse_config(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize("flags", [[], ["--max_steps", "1", "--num_epochs", "1"]])
def test_length_is_given_once(flags):
    message = refusal(flags)
    assert "exactly one" in message and "max_steps" in message and "num_epochs" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", "adaln"),
        ("activation_fn", "relu"),
        ("num_layers", 0),
        ("mlp_ratio", 0.0),
        ("beta_start", 0.5),
        ("beta_end", 2.0),
        ("logit_std", 0.0),
        ("seed", -1),
        ("condition", "label"),
        ("prompt_template", "A photo"),
        ("prediction_type", "x0"),
        ("timestep_sampling", "cosine"),
        ("beta_schedule", "sigmoid"),
        ("num_train_timesteps", 0),
        ("class_dropout_prob", 1.0),
        ("sampler", "even"),
        ("num_previews", 0),
        ("lr_schedule", "step"),
        ("mixed_precision", "fp16"),
        ("per_device_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_validation_images", 0),
        ("validate_every", 0),
        ("keep_checkpoints", 0),
        ("warmup_steps", -1),
        ("learning_rate", -1e-4),
        ("max_grad_norm", 0.0),
        ("ema", 1.0),
        ("adam_beta2", 1.5),
        ("cpu_threads", 0),
        ("resolution", 0),
        ("heldout_fraction", 1.0),
    ],
)
def test_values_out_of_range_name_option_and_value(name, value):
    message = refusal(["--max_steps", "1", f"--{name}", str(value)])
    assert name in message and str(value) in message, message


def test_text_condition_needs_a_text_encoder():
    message = refusal(["--max_steps", "1", "--condition", "text"])
    assert "`text_encoder`" in message and "`condition`" in message


def test_none_on_the_command_line_takes_back_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 1\nvae: some/vae\nheldout_per_class: 3\nmin_snr_gamma: 5\n")
    taken_back = ["--vae", "none", "--heldout_per_class", "none", "--min_snr_gamma", "None"]
    config = parse_config(["--config", str(path), *taken_back])
    assert (config.latents.vae, config.data.heldout_per_class, config.objective.min_snr_gamma) == (None, None, None)
    assert parse_config(["--config", str(path), "--heldout_per_class", "4"]).data.heldout_per_class == 4
