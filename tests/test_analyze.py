"""The report of a pipeline: what is in it, what is kept, and what it says where something cannot be measured."""

import json
import re
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
import torch
from components import build_pipeline, make_pipeline, tiny_transformer, tiny_vae_tiny
from diffusers import DDPMScheduler
from test_decisions import ROWS, deciding_pipeline, read

from freqgate_dit.analysis import band_gain_table, gate_statistics, spectral_gate_table, wiener_gain
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline
from freqgate_dit.plots import decibel
from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES, ShapesTextures
from freqgate_dit.spectral import dct2
from freqgate_dit.statistics import Bootstrap
from freqgate_dit.training import factor_classifier, information, judges
from freqgate_dit.training.analyze import main
from freqgate_dit.training.decisions import LabelSwaps
from freqgate_dit.training.factor_posterior import FactorPosterior
from freqgate_dit.training.report import (
    OPTIONS,
    SECTIONS,
    Subject,
    decision_section,
    decisions,
    gate_section,
    intervention_section,
    trace_section,
)
from freqgate_dit.training.report.interventions import difference, dissociation, division
from freqgate_dit.training.report.order import order_of
from freqgate_dit.training.report.page import Section, keep_section, render_page
from freqgate_dit.training.report.subject import Spectrum


SURE = {"structure": 1.0, "texture": 1.0}
SMALL = ["--images", "4", "--steps", "4", "--pairs", "3", "--levels", "3", "--cpu_threads", "1"]


def built_in_pipeline(folder, variant="freq_gate", **options):
    classes = len(STRUCTURES) * len(TEXTURES)
    transformer = tiny_transformer(
        variant, num_classes=classes, in_channels=3, sample_size=32, patch_size=8, **options
    )
    labels = {i: f"{STRUCTURES[i // 8]} {TEXTURES[i % 8]}" for i in range(classes)}
    make_pipeline(transformer, id2label=labels).save_pretrained(folder)
    (folder / "training_config.yaml").write_text("dataset: shapes_textures\nworld: mod\n")
    return folder


SUBJECT = "freqgate_dit.training.report.subject"


@pytest.fixture
def quick_judge(monkeypatch, tmp_path):
    """The real judge, of one batch, and all else from few images; the words that keep the judge to the test."""
    monkeypatch.setattr(factor_classifier, "TEST_IMAGES", 128)
    monkeypatch.setattr(information, "TEST_IMAGES", 32)
    monkeypatch.setattr(f"{SUBJECT}.NUM_WITHOUT_FACTOR", 256)
    monkeypatch.setattr(f"{SUBJECT}.NUM_AROUND_CLASSES", 512)
    few_draws = partial(FactorPosterior, num_draws=64)
    monkeypatch.setattr(f"{SUBJECT}.FactorPosterior", few_draws)
    train = judges.train_factor_classifier
    monkeypatch.setattr(judges, "train_factor_classifier", lambda **kw: train(num_images=128, **kw))
    return ["--cache_dir", str(tmp_path / "judge_cache")]


def test_a_report_of_a_gated_model(tmp_path, capsys, quick_judge):
    folder, out = built_in_pipeline(tmp_path / "pipeline"), tmp_path / "report"
    words = ["--pipeline", str(folder), "--out", str(out), *SMALL, *quick_judge]
    main(words)
    page = (out / "report.html").read_text()
    printed = capsys.readouterr()
    for title in (
        "The order of denoising",
        "The gates",
        "Interventions",
        "What the condition can say, and when",
        "When structure and texture are decided",
    ):
        assert f"<h2>{title}</h2>" in page and title in printed.out
    # Self-contained: figures inside, nothing fetched, no path of this machine.
    assert page.count('src="data:image/png;base64,') == len(list(out.glob("sections/*/*.png"))) == 7
    assert not re.search(r"(src|href)=\"(?!data:)", page) and str(tmp_path) not in page
    # Tables, both ways the same.
    for name in ("order/trace", "gates/gates", "interventions/interventions"):
        rows = json.loads((out / "sections" / f"{name}.json").read_text())
        assert pyarrow.parquet.read_table(out / "sections" / f"{name}.parquet").to_pylist() == rows
    rows = {
        row["intervention"]: row for row in json.loads((out / "sections/interventions/interventions.json").read_text())
    }
    assert {"none", "no condition", "no condition in low", "gate reversed"} <= rows.keys()
    assert rows["none"]["change_0-1"] == 0 < rows["no condition"]["change_0-1"]
    assert rows["none"]["held_out_loss"] != rows["gate one"]["held_out_loss"]

    # The judge has seen one batch, and the weights are random: no image shows a label's factors. The report says so.
    assert "Left out: the classifier that reads the images is right in" in printed.out
    assert "it says little, as the unchanged model is right in" in printed.out
    assert (
        "<h2>In short</h2>" in page
        and "<td>One of Low and High serves structure more, the other texture.</td>" in page
    )

    # Nothing changed: nothing is measured. Another seed: all of it. A section alone: the others stay as files.
    sections = {path.parent.name: json.loads(path.read_text()) for path in out.glob("sections/*/section.json")}
    facts = json.loads((out / "report.json").read_text())
    assert facts["seconds"] == {name: sections[name]["seconds"] for name in facts["seconds"]} and len(sections) == 5
    assert min(facts["seconds"].values()) > 0 and f"Measured in {sum(facts['seconds'].values()):.0f} s." in page
    assert facts["variant"] == "freq_gate" and facts["world"] == "mod" and facts["images"] == facts["steps"] == 4
    before = (out / "sections/order/section.json").stat().st_mtime_ns
    main(words)
    assert capsys.readouterr().out.count("unchanged, kept") == 5
    assert (out / "sections/order/section.json").stat().st_mtime_ns == before
    # Another number of pairs: the one section that reads it.
    main([*words, "--pairs", "4"])
    printed = capsys.readouterr().out
    assert printed.count("unchanged, kept") == 4 and "decisions: measured" in printed
    main([*words, "--sections", "order", "--seed", "1"])
    assert "order: measured" in capsys.readouterr().out
    assert (out / "report.html").read_text().count("<h2>") == 2 and (out / "sections/gates/gates.json").exists()


def test_a_report_of_a_latent_model_without_gates(tmp_path, capsys):
    make_pipeline(tiny_transformer("adaln_zero"), vae=tiny_vae_tiny()).save_pretrained(tmp_path / "pipeline")
    main(["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "report"), *SMALL])
    printed = capsys.readouterr().out
    assert "AdaLNZeroDiTTransformer2DModel has no gates" in printed
    assert "Left out: this needs labels whose factors are known" in printed
    assert "The pipeline holds no spectrum" in printed
    names = {path.name for path in (tmp_path / "report/sections/order").glob("*.png")}
    assert names == {"trace_of_latents.png", "trace_of_pixels.png", "predictions.png"}
    arrival = json.loads((tmp_path / "report/sections/order/arrival.json").read_text())
    assert [row["class"] for row in arrival[::2]] == ["all", "cat", "dog", "wild"]
    assert [row["share"] for row in arrival] == [0.5, 0.9] * 4
    effects = json.loads((tmp_path / "report/sections/interventions/interventions.json").read_text())
    assert [row["intervention"] for row in effects] == ["none", "no condition"]


def test_decoded_images_of_the_built_in_data_are_compared_with_its_own(tmp_path):
    transformer = tiny_transformer("adaln_zero", num_classes=64, sample_size=16)
    subject = Subject(make_pipeline(transformer, vae=tiny_vae_tiny()), "mod", num_images=4, steps=4)
    known = subject.pixel_spectrum
    images = ShapesTextures(1024, 32, "mod", split="train").images(range(1024)).float() / 127.5 - 1
    assert torch.allclose(known.mean.float(), images.mean(0), atol=1e-4)
    assert known.octaves.shape == (5,) and known.source == "1,024 images of the training data"
    captions = trace_section(subject).captions
    for space, what in (("latents", "latent"), ("pixels", "image")):
        assert f"At the end the octaves of the {what} have" in captions[f"trace_of_{space}"]


def test_a_report_of_an_unconditional_model(tmp_path, capsys):
    make_pipeline(tiny_transformer(num_classes=None, in_channels=3)).save_pretrained(tmp_path / "pipeline")
    main(["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "report"), *SMALL])
    assert "no part of it can be taken away" in capsys.readouterr().out


def test_a_report_of_a_text_model(tmp_path, capsys):
    build_pipeline("freq_gate", "text", tmp_path).save_pretrained(tmp_path / "pipeline")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "report"), *SMALL]
    with pytest.raises(SystemExit, match="`prompts` is empty"):
        main(words)
    main([*words, "--prompts", "A photo of cat", "A photo of dog"])
    effects = json.loads((tmp_path / "report/sections/interventions/interventions.json").read_text())
    assert [row["intervention"] for row in effects][:2] == ["none", "gate zero"]


def test_a_model_that_knows_its_data_has_the_spectrum_of_noised_data():
    """The exact denoiser of Gaussian data, by the spectral sampler: a factor of 1 but for the number of images."""
    size, power = 16, 4 / (1 + torch.arange(16.0))[:, None].expand(16, 16) ** 2
    transformer = tiny_transformer(
        "adaln_zero", in_channels=1, sample_size=size, preconditioning="wiener", prediction_type="epsilon"
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    pipe = make_pipeline(transformer)
    mean = torch.zeros(1, size, size)
    mean[0, 0, 0] = 8.0
    transformer.set_spectrum(mean, power[None], pipe.scheduler.alphas_cumprod)
    section = trace_section(Subject(pipe, None, num_images=128, steps=40))
    rows = section.tables["forward_process"]
    assert {row["band"] for row in rows} == {"0-1", "1-2", "2-4", "4-8"}
    for row in rows:
        assert row["sampled_power"] == pytest.approx(row["power"], rel=0.25)
    assert max(row["power"] for row in rows) > 10 and "forward_process" in section.figures


def test_a_band_gate_is_read():
    pipe = make_pipeline(tiny_transformer("band_gate", in_channels=3, sample_size=32, patch_size=4))
    subject = Subject(pipe, None, num_images=3, steps=3)
    section = intervention_section(subject)
    names = [row["intervention"] for row in section.tables["interventions"]]
    paths = [f"{what} condition in {path}" for what in ("no", "other") for path in ("low", "high")]
    changes = ("zero", "half", "mean", "reversed", "shuffled", "random")
    assert names == ["none", "no condition", *paths, *(f"gate {change}" for change in changes)]
    tables = gate_section(subject).tables
    gains, curves = tables["gains"], tables["gain_curves"]
    assert {row["branch"] for row in gains} == {"attention", "mlp"}
    assert curves[0]["low_over_high_dB"] == gains[0]["low_over_high_dB_clean"]
    assert curves[-1]["low_over_high_dB"] == gains[-1]["low_over_high_dB_in_noise"]
    assert {row["class"] for row in tables["gains_by_class"]} == {"cat", "dog", "wild"}
    assert len(tables["gains_by_class"]) == 3 * 5 * len(gains) and all(row["class_std_dB"] > 0 for row in gains)


def test_band_gate_without_band_gates_has_none_to_read():
    options = {"in_channels": 3, "sample_size": 32, "patch_size": 4, "band_branches": "none"}
    subject = Subject(make_pipeline(tiny_transformer("band_gate", **options)), None, num_images=3, steps=3)
    section = intervention_section(subject)
    names = [row["intervention"] for row in section.tables["interventions"]]
    assert names == ["none", "no condition", "no condition in high"]
    assert "has no gates over time or frequency" in gate_section(subject).reading[0]


def test_decisions_of_a_network_that_decides_at_known_levels():
    subject = Subject(deciding_pipeline(), "mod", num_pairs=16, num_levels=20, steps=40)
    subject.classifier = (read, SURE)
    subject.data_information = ([], {}, {"structure": -1.0, "texture": -1.0 + ROWS["texture"] - ROWS["structure"]})
    section = decision_section(subject)
    assert set(section.figures) == {"label_swap", "label_insertion", "label_withdrawal"} == set(section.captions)
    assert len(section.reading) == 4 and "right in 100.0% of structures" in section.reading[0]
    for row in section.tables["levels"]:
        assert row["world"] == "mod" and row["of_data"] == pytest.approx(ROWS["texture"] - ROWS["structure"])
        assert row["structure"] == pytest.approx(ROWS["structure"], abs=0.8)
        assert row["texture"] == pytest.approx(ROWS["texture"], abs=0.8) and 1 < row["low"] <= row["high"]
        caption = section.captions[f"label_{row['kind']}"]
        assert f"Structure turns at a log-SNR of {row['structure']:+.2f}, texture at {row['texture']:+.2f}" in caption
        assert f"later than structure: {row['difference']:+.2f} (95 % {row['low']:+.2f}" in caption
    assert "Found: texture after structure. That is as predicted for the world 'mod'" in section.reading[2]
    assert "the exchange finds the same" in section.reading[3]
    assert [claim["verdict"] for claim in section.claims] == ["supported"]
    subject.world = "reversed"
    assert "That is other than predicted for the world 'reversed'" in decision_section(subject).reading[2]
    subject.classifier = (read, {**SURE, "texture": 0.96})
    section = decision_section(subject)
    assert "right in 100.0% of structures and 96.0% of textures" in section.reading[0] and not section.tables


def test_the_dissociation_index_of_known_tables():
    right, wrong = np.ones(40, dtype=bool), np.zeros(40, dtype=bool)

    def tables(low, high):
        names = ("structure", "texture")
        whole = dict.fromkeys(names, right)
        return {path: difference(whole, dict(zip(names, shown))) for path, shown in (("low", low), ("high", high))}

    assert dissociation(tables((wrong, right), (right, wrong)), 10).estimate == 1
    assert dissociation(tables((right, wrong), (wrong, right)), 10).estimate == -1
    assert dissociation(tables((wrong, wrong), (wrong, wrong)), 10).estimate == 0
    half = dissociation(tables((wrong, right), (right, right)), 10)
    assert half.estimate == half.low == half.high == 0.5
    rng = np.random.default_rng(0)
    mixed = tables((rng.random(40) < 0.5, right), (right, rng.random(40) < 0.5))
    index = dissociation(mixed)
    contrast = [mixed[path]["structure"] - mixed[path]["texture"] for path in ("low", "high")]
    expected = (contrast[0].mean() - contrast[1].mean()) / 2
    assert index.estimate == pytest.approx(expected) and index.low < expected < index.high


@pytest.mark.parametrize(
    "low, high, verdict", [(0.2, 0.5, 1), (-0.5, -0.2, -1), (-0.05, 0.05, 0), (-0.2, 0.05, None), (0.05, 0.2, None)]
)
def test_a_division_is_found_only_where_the_interval_says_so(low, high, verdict):
    assert division(Bootstrap((low + high) / 2, 0.1, low, high, 0.0, 0.95, 10)) is verdict


def test_gate_statistics_do_not_know_which_path_is_low():
    log_snr = np.linspace(-8, 8, 50)
    rising = 1 / (1 + np.exp(-log_snr))
    gates = np.stack([rising, rising, rising, 1 - rising], axis=-1)[:, None]  # (T, 1, 4)
    [row] = gate_statistics(gates, log_snr)
    [mirrored] = gate_statistics(1 - gates, log_snr)
    assert row["rising"] == 0.75 and mirrored["rising"] == 0.25 and row["correlation"] > 0.9
    for name in ("agreement", "range"):
        assert row[name] == pytest.approx(mirrored[name])
    assert row["correlation"] == pytest.approx(-mirrored["correlation"])


def test_a_gate_that_is_the_wiener_gain():
    log_snr, power = np.linspace(-8, 8, 50), np.array([30.0, 3.0, 0.2])
    gain = wiener_gain(power, log_snr)
    expected = [np.mean([np.exp(level) * s / (np.exp(level) * s + 1) for s in power]) for level in log_snr]
    assert gain == pytest.approx(expected)
    follows, reversed_paths = (
        gate_statistics(np.stack([gate] * 2, axis=-1)[:, None], log_snr, gain)[0] for gate in (gain, 1 - gain)
    )
    assert follows["wiener_correlation"] == pytest.approx(1) and follows["wiener_slope"] == pytest.approx(1)
    assert reversed_paths["wiener_correlation"] == pytest.approx(-1)
    assert reversed_paths["wiener_slope"] == pytest.approx(-1)


def test_a_learned_spectral_gate_is_read():
    transformer = tiny_transformer(
        "adaln_zero", preconditioning="learned", prediction_type="epsilon", in_channels=3, sample_size=32
    )
    power = torch.full((3, 32, 32), 4.0)
    transformer.set_spectrum(torch.zeros(3, 32, 32), power, DDPMScheduler().alphas_cumprod)
    with torch.no_grad():
        transformer.preconditioner.slope.zero_()
        transformer.preconditioner.offset.zero_()
    levels, learned, wiener, rows = spectral_gate_table(transformer)
    assert np.array_equal(learned, wiener) and all(row["half_open_shift"] == 0 for row in rows)
    assert wiener == pytest.approx(np.repeat(1 / (1 + np.exp(-levels) / 4)[:, None], 8, axis=1), abs=1e-6)

    with torch.no_grad():
        transformer.preconditioner.slope[:, 2] = 0.5
        transformer.preconditioner.offset[:, 2] = -3.0
    levels, learned, _, rows = spectral_gate_table(transformer)
    moved = [row for row in rows if row["half_open_shift"] != 0]
    assert {row["ring"] for row in moved} == {2} and len(moved) == 3
    half = np.interp(0.5, learned[:, 2], levels)
    assert moved[0]["half_open_shift"] == pytest.approx(half + np.log(4), abs=0.02) and moved[0]["slope"] == 1.5

    section = gate_section(Subject(make_pipeline(transformer), None))
    assert "have no gates over time" in section.reading[0]
    caption = section.captions["spectral_gate"]
    assert "The learned spectral gate is half open later than the Wiener gate by" in caption
    assert f"+0.00, +0.00, {moved[0]['half_open_shift']:+.2f}, +0.00" in caption  # by ring
    assert "spectral_gate" in section.figures
    with pytest.raises(ValueError, match="preconditioning None; only 'learned'"):
        spectral_gate_table(tiny_transformer("adaln_zero"))


def test_each_section_is_made_anew_for_the_options_that_it_reads_alone(tmp_path, quick_judge, monkeypatch):
    """What is declared in `OPTIONS` is what a section reads."""
    read, chosen = set(), {name for names in OPTIONS.values() for name in names}
    get = Subject.__getattribute__

    def recorded(self, name):
        if name in chosen:
            read.add(name)
        return get(self, name)

    pipe = FreqGateDiTPipeline.from_pretrained(
        built_in_pipeline(tmp_path / "pipeline", "band_gate", preconditioning="learned", prediction_type="epsilon")
    )
    subject = Subject(pipe, "mod", 4, 4, 3, 3, batch_size=4, cache_dir=quick_judge[1])
    subject.classifier = (subject.classifier[0], SURE)
    monkeypatch.setattr(Subject, "__getattribute__", recorded)
    for name, make in SECTIONS.items():
        read.clear()
        section = make(subject)
        assert set(section.captions) == set(section.figures)
        assert read - {"prompts"} == set(OPTIONS[name]) - {"prompts"}


def test_numbers_that_are_not_finite_are_dashes(tmp_path):
    rows = [{"x": float("nan"), "y": 1.0}, {"x": 2.0, "y": float("inf")}]
    section, _ = keep_section(tmp_path / "s", "key", lambda: Section("T", [], tables={"t": rows}, shown=("t",)))
    assert section.tables["t"] == [{"x": None, "y": 1.0}, {"x": 2.0, "y": None}]
    assert json.loads((tmp_path / "s/t.json").read_text()) == section.tables["t"]
    assert pyarrow.parquet.read_table(tmp_path / "s/t.parquet").to_pylist() == section.tables["t"]
    assert "<td>-</td>" in render_page("T", [], [section]) and "nan" not in render_page("T", [], [section])


def test_a_model_without_a_null_condition_is_read_over_its_classes():
    options = {"in_channels": 3, "sample_size": 32, "patch_size": 4}
    pipe = make_pipeline(tiny_transformer("band_gate", **options), class_dropout_prob=0.0)
    subject = Subject(pipe, None, num_images=3, steps=3)
    section = intervention_section(subject)
    names = [row["intervention"] for row in section.tables["interventions"]]
    assert names[1:3] == ["other condition in low", "other condition in high"]
    assert not any("no condition" in name for name in names) and "hybrids" in section.figures
    assert "left out: the model was trained without a null condition" in section.reading[0]

    # One of the built-in data: what the paths share out is read from exchanged labels alone.
    transformer = tiny_transformer("freq_gate", num_classes=64, in_channels=3, sample_size=32, patch_size=8)
    judged = Subject(make_pipeline(transformer, class_dropout_prob=0.0), "mod", num_images=3, steps=3)
    judged.classifier = (read, SURE)
    found = intervention_section(judged)
    assert [row["by"] for row in found.tables["dissociation"]] == ["other condition"]
    assert "second" not in found.reading[-1] and "null condition" not in found.reading[-1]

    section = gate_section(subject)
    assert section.claims[0]["claim"].startswith("On average over classes the low band gives way")
    _, low, high = zip(*(band_gain_table(pipe.transformer, label=label) for label in range(3)))
    expected = decibel(np.mean(low, axis=0), np.mean(high, axis=0))
    assert section.tables["gains"][0]["low_over_high_dB_clean"] == pytest.approx(expected[0, 0, 0])


def test_the_order_is_of_what_the_label_does_not_tell():
    """A model that draws the mean image of the class from the start, and nothing else, makes no octave."""
    pipe = deciding_pipeline()
    subject = Subject(pipe, "mod", num_images=64, steps=4)
    subject.spectrum_around_classes = None
    subject.data_spectrum = Spectrum(torch.zeros(3, 16, 16), torch.ones(3, 16, 16), "nothing")
    whole = trace_section(subject).tables["trace"]
    subject = Subject(pipe, "mod", num_images=64, steps=4)
    images = pipe(list(range(64)), seed=list(range(64)), **subject.options(output_type="latent")).images
    subject.spectrum_around_classes = Spectrum(images, torch.ones(3, 16, 16), "these images")
    section = trace_section(subject)
    assert "difference from the mean image of the class" in section.reading[0]
    assert max(row["predicted_power"] for row in whole[-4:]) > 0.01
    assert all(row["predicted_power"] < 1e-6 for row in section.tables["trace"][-4:])
    linear = [row for row in section.tables["arrival"] if row["class"] == "linear denoiser"]
    assert [row["0-1 cycles"] for row in linear] == pytest.approx([0, np.log(9)], abs=1e-3)
    groups = [row["class"] for row in section.tables["arrival"][:-2:2]]
    assert groups == ["all", *STRUCTURES, *TEXTURES]


def test_the_spectrum_around_classes_is_without_their_means():
    transformer = tiny_transformer(num_classes=64, in_channels=3, sample_size=32, patch_size=8)
    subject = Subject(make_pipeline(transformer), "mod")
    around = subject.spectrum_around_classes
    images, labels = subject.real_images(64 * 32, "validation")
    fresh = dct2(images - around.mean[labels]).square().mean(0)
    assert around.mean.shape == (64, 3, 32, 32) and around.octaves.shape == (5,)
    np.testing.assert_allclose(around.power.mean((1, 2)), fresh.mean((1, 2)), rtol=0.05)
    assert (around.octaves < subject.data_spectrum.octaves).all()


def test_a_linear_denoiser_has_an_octave_when_its_coefficients_stand_out():
    power = torch.ones(3, 16, 16, dtype=torch.float64)
    power[:, 0, 1], power[:, 4, 4] = 100.0, 0.0
    known = Spectrum(torch.zeros(3, 16, 16), power, "made up")
    for share in (0.5, 0.9):
        levels = known.linear_arrival(share)
        assert levels[1:] == pytest.approx([np.log(share / (1 - share))] * 3, abs=0.01)  # no power, no weight
    # The mean, and half a cycle over one axis or both: of S of 1, 100, 1, 1, mostly by the strong one.
    gains = 1 / (1 + np.exp(-levels[0]) / np.array([1, 100, 1, 1]))
    assert gains @ np.array([1, 100, 1, 1]) / 103 == pytest.approx(0.9, abs=1e-3)


def test_a_section_is_made_anew_for_another_key(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return Section("Title <1>", ["a & b"], tables={"t": [{"x": 1, "y": 0.5}]}, shown=("t",))

    for key in ("a", "a", "b"):
        section, _ = keep_section(tmp_path / "s", key, make)
    assert len(calls) == 2
    # What is lost or damaged is made again too.
    folder = tmp_path / "s"
    for damage in (
        lambda: (folder / "t.json").unlink(),
        lambda: (folder / "t.parquet").unlink(),
        lambda: (folder / "section.json").write_text("{}"),
        lambda: (folder / "section.json").write_text((folder / "section.json").read_text()[:40]),
        lambda: (folder / "section.json").unlink(),
    ):
        damage()
        section, is_new = keep_section(folder, "b", make)
        assert is_new and section.tables == {"t": [{"x": 1, "y": 0.5}]} and (folder / "t.parquet").is_file()
    (folder / "mine.png").write_bytes(b"mine")
    keep_section(folder, "c", lambda: Section("Other", [], tables={"u": [{"x": 1}]}))
    assert sorted(path.name for path in folder.iterdir()) == ["mine.png", "section.json", "u.json", "u.parquet"]
    section.tables["t"].append({"x": 2, "y": None})
    page = render_page("T", ["fact"], [section])
    assert "<td>-</td>" in page
    assert "Title &lt;1&gt;" in page and "a &amp; b" in page and "<td>0.5</td>" in page


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "2"], r"`steps` \(2\) must be at least 3"),
        (["--levels", "40"], r"`levels` \(40\) must be at most `steps`"),
        (["--pairs", "1"], r"`pairs` \(1\)"),
    ],
)
def test_options_that_make_no_sense(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--pipeline", str(tmp_path / "none"), *words])
    with pytest.raises(SystemExit, match="error"):
        main(["--pipeline", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert not (tmp_path / "sections").exists()


def test_built_in_data_without_its_labels(tmp_path, capsys):
    make_pipeline(tiny_transformer(num_classes=None, in_channels=3, sample_size=32, patch_size=8)).save_pretrained(
        tmp_path / "pipeline"
    )
    (tmp_path / "pipeline/training_config.yaml").write_text("dataset: shapes_textures\nworld: mod\n")
    main(["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "report"), *SMALL])
    printed = capsys.readouterr().out
    assert "Left out: this needs labels whose factors are known" in printed
    assert printed.count("this pipeline was trained on that data without its labels") == 2
    assert "as known from 1,024 images of the training data" in printed  # spectra are still compared
    assert json.loads((tmp_path / "report/report.json").read_text())["world"] == "mod"


def test_the_world_of_a_pipeline_whose_configuration_is_lost(tmp_path, capsys):
    folder = built_in_pipeline(tmp_path / "pipeline")
    words = ["--pipeline", str(folder), "--out", str(tmp_path / "report"), *SMALL, "--sections", "order"]
    with pytest.raises(SystemExit, match="`world` .'add'.: this pipeline was trained on 'mod'"):
        main([*words, "--world", "add"])
    (folder / "training_config.yaml").write_text("dataset: my/photos\n")
    with pytest.raises(SystemExit, match="trained on 'my/photos'"):
        main([*words, "--world", "add"])
    (folder / "training_config.yaml").unlink()
    main(words)
    assert "images of the training data" not in capsys.readouterr().out
    main([*words, "--world", "add"])
    assert "8,192 images of the training data" in capsys.readouterr().out

    make_pipeline(tiny_transformer(num_classes=3, in_channels=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(SystemExit, match="built-in data has 64 classes, this pipeline 3"):
        main(["--pipeline", str(tmp_path / "three"), *SMALL, "--world", "add"])


def test_a_sampler_that_tells_no_prediction_leaves_the_order_out(tmp_path, capsys):
    make_pipeline(tiny_transformer(in_channels=3)).save_pretrained(tmp_path / "pipeline")
    words = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "report"), *SMALL, "--sampler", "dpm"]
    main(words)
    assert "Left out: DPMSolverMultistepScheduler tells no predicted clean image" in capsys.readouterr().out
    main(words)
    assert capsys.readouterr().out.count("unchanged, kept") == 5


@pytest.mark.parametrize(
    "arrival, said",
    [
        ([0.0, 0.0, 0.1], "all at about the same level"),
        ([-2.0, -2.1, 1.0, 3.0], "from coarse to fine"),
        ([3.0, 1.0, -2.0], "from fine to coarse"),
        ([3.0, 1.0, 2.0], "not in the order"),
        ([0.4, 0.25, 0.1, 5.0], "not in the order"),  # three small steps back
        ([-6.0, float("nan"), 0.0], "not to be told"),
    ],
)
def test_the_order_is_read_from_the_levels(arrival, said):
    assert said in order_of(arrival)


@pytest.mark.parametrize(
    "low, high, said, verdict, compared",
    [
        (0.6, 2.0, "texture after structure. That is as predicted for the world 'add'", "supported", "undecided"),
        (0.9, 1.6, "texture after structure. That is as predicted", "supported", ": the exchange finds the same."),
        (1.8, 2.4, "texture after structure. That is as predicted", "supported", "later still"),
        (1.5, 2.4, "texture after structure. That is as predicted", "supported", "is undecided"),  # by 0.25 to 1.15
        (0.1, 0.4, "texture after structure. That is as predicted", "supported", "earlier than"),
        (-2.0, -0.6, "texture before structure. That is other than predicted", "not supported", "earlier than"),
        (-0.2, 0.3, "both at about the same level. That is other than predicted", "not supported", "earlier than"),
        (-1.0, 2.0, "Undecided", "undecided", "undecided"),
    ],
)
def test_what_an_exchange_of_labels_shows(low, high, said, verdict, compared):
    subject, section = Subject(deciding_pipeline(), "add"), Section("Decisions", [])
    subject.data_information = ([], {}, {"structure": -1.0, "texture": 0.25})
    difference = Bootstrap((low + high) / 2, 0.1, low, high, 0.0, 0.95, 10)
    decisions._read_swap(section, subject, ROWS, difference)
    assert said in section.reading[1] and [claim["verdict"] for claim in section.claims] == [verdict]
    assert "tell the two apart by +1.25" in section.reading[2] and compared in section.reading[2]


@pytest.mark.parametrize(
    "low, high, verdict", [(-0.3, 0.3, "supported"), (0.6, 0.9, "not supported"), (0.1, 0.9, "undecided")]
)
def test_where_no_factor_has_the_lower_frequency_none_is_claimed_to_be_first(low, high, verdict):
    subject, section = Subject(deciding_pipeline(), "same"), Section("Decisions", [])
    subject.data_information = ([], {}, {"structure": -1.0, "texture": -0.5})
    decisions._read_swap(section, subject, ROWS, Bootstrap((low + high) / 2, 0.1, low, high, 0.0, 0.95, 10))
    assert section.claims[0]["claim"].startswith("Neither factor is decided first")
    assert section.claims[0]["verdict"] == verdict


def test_levels_that_the_data_do_not_tell_are_not_compared():
    subject, section = Subject(deciding_pipeline(), "add"), Section("Decisions", [])
    subject.data_information = ([], {}, {"structure": -1.0, "texture": float("nan")})
    decisions._read_swap(section, subject, ROWS, Bootstrap(1.0, 0.1, 0.6, 2.0, 0.0, 0.95, 10))
    assert len(section.reading) == 2 and len(section.claims) == 1


@pytest.mark.parametrize("answer, said", [(0, "no level can be given"), (None, "No level can be given: only")])
def test_where_the_level_of_the_exchange_changes_nothing_no_level_is_given(answer, said, monkeypatch):
    """All images show the first label, or neither."""

    def unmoved(pipe, classifier, pairs, num_levels, *others):
        table = np.full((pairs, num_levels), answer == 0)
        shown = dict.fromkeys(ROWS, table), dict.fromkeys(ROWS, np.zeros_like(table))
        return LabelSwaps(np.linspace(-5.0, 5.0, num_levels), *shown)

    monkeypatch.setattr(decisions, "swap_labels", unmoved)
    subject = Subject(deciding_pipeline(), "mod")
    subject.classifier = (read, SURE)
    section = decision_section(subject)
    assert said in section.reading[1] and not section.claims and section.tables.keys() == {"shown"}
    assert section.tables["shown"][0] == {"kind": "swap", **dict.fromkeys(ROWS, float(answer == 0))}
    assert section.reading[1] in render_page("T", [], [section])


def test_claims_reach_the_card(tmp_path, capsys):
    folder = built_in_pipeline(tmp_path / "pipeline", "band_gate")
    (folder / "training_config.yaml").unlink()  # as if trained on other data: fewer claims, and quicker
    words = ["--pipeline", str(folder), "--out", str(tmp_path / "report"), *SMALL, "--sampler", "euler"]
    main(words)
    assert not (folder / "analysis.json").exists()
    main([*words, "--update_card"])
    kept = json.loads((folder / "analysis.json").read_text())
    claim = kept["claims"][-1]
    assert claim["claim"].startswith("Under the null condition the low band gives way to the high one in every branch")
    assert kept["command"] == (
        "python training/analyze.py --pipeline FOLDER --out report --images 4 --steps 4 --pairs 3 --levels 3 "
        "--sampler euler"
    )
    assert len(kept["protocol"]["checkpoint"]) == 12 and kept["protocol"]["batch_size"] == 128
    card = (folder / "README.md").read_text()
    assert f"| {claim['claim']} | {claim['verdict']} |" in card and kept["command"] in card
    with pytest.raises(SystemExit, match="`update_card` replaces the claims of all sections: leave `sections` out"):
        main([*words, "--update_card", "--sections", "gates"])
    with pytest.raises(
        SystemExit, match=r"`update_card` needs a pipeline folder, and `pipeline` \(user/model\) is none"
    ):
        main(["--pipeline", "user/model", "--update_card"])


def test_the_control_of_band_gate_is_not_read_as_frequencies():
    options = {"band_basis": "random", "band_branches": "attention"}
    pipe = make_pipeline(tiny_transformer("band_gate", in_channels=3, sample_size=32, patch_size=4, **options))
    section = gate_section(Subject(pipe, None))
    caption = section.captions["band_gains"]
    assert "random directions" in caption and "by construction" not in caption
    assert {row["branch"] for row in section.tables["gains"]} == {"attention"}
