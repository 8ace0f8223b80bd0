"""Decision levels: fits of known curves, and denoisers of which it is known when they decide."""

import numpy as np
import pytest
import torch
from components import euler, make_pipeline, tiny_transformer
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from freqgate_dit.shapes_textures import STRUCTURES, TEXTURES
from freqgate_dit.traces import log_snr
from freqgate_dit.training.decisions import LabelSwaps, factors, label_pairs, logistic_level, swap_labels
from freqgate_dit.training.factor_classifier import FactorClassifier


X = np.linspace(-8, 6, 15)


def test_the_level_of_a_logistic_curve():
    for level in (-3.0, 0.5, 2.0):
        share = 1 / (1 + np.exp(-1.3 * (X - level)))
        assert logistic_level(X, 1e5 * share, 1e5 * (1 - share)) == pytest.approx(level, abs=1e-3)
    # Counts that change from none to all lie between their neighbours.
    first = np.where(X > 1.2, 50, 0)
    assert X[X < 1.2][-1] < logistic_level(X, first, 50 - first) < X[X > 1.2][0]
    # What never changes has its level at the end.
    assert logistic_level(X, 0 * X, 50 + 0 * X) == X[-1] and logistic_level(X, 50 + 0 * X, 0 * X) == X[0]
    with pytest.raises(ValueError, match="are all 0"):
        logistic_level(X, 0 * X, 0 * X)


def test_the_difference_has_the_noise_of_the_pairs():
    generator = np.random.default_rng(0)

    def table(level):
        return generator.random((64, 15)) < 1 / (1 + np.exp(-2 * (X - level)))

    structure, texture = table(-2.0), table(1.0)
    swaps = LabelSwaps(
        X,
        {"structure": structure, "texture": texture},
        {"structure": ~structure, "texture": ~texture},
    )
    difference = swaps.difference(100)
    assert difference.low < 3.0 < difference.high and 0.02 < difference.standard_error < 0.3
    np.testing.assert_array_equal(swaps.share("texture"), texture.mean(0))
    assert swaps.change("texture") > 0.95
    same = {"structure": structure, "texture": texture[:, :1].repeat(15, axis=1)}
    never = LabelSwaps(X, same, {name: ~table for name, table in same.items()})
    assert never.change("texture") == 0  # whatever the level at which labels are exchanged


def test_pairs_differ_in_both_factors():
    first, second = label_pairs(200)
    for one, other in zip(factors(first), factors(second)):
        assert (one != other).all() and set(one) == set(range(8)) == set(other)


ROWS = {"structure": -2.0, "texture": 1.0}  # log-SNR at which this network decides


def deciding_pipeline():
    """Each factor of the label is drawn as a stripe at its place, as strong as asked for at one noise level."""
    classes = len(STRUCTURES) * len(TEXTURES)
    transformer = tiny_transformer(num_classes=classes, in_channels=3, sample_size=16)
    pipe = make_pipeline(transformer, euler("trailing"), id2label={i: str(i) for i in range(classes)})
    decided = {}

    def denoise(hidden_states, timestep, class_labels):
        sample = hidden_states
        level = log_snr(pipe.scheduler.alphas_cumprod, torch.as_tensor(float(timestep.flatten()[0])))
        alpha = level.sigmoid()
        if len(decided.get("structure", [])) != len(class_labels) or level < -8:
            decided.clear()
        for factor, name in enumerate(ROWS):
            value = (class_labels // 8, class_labels % 8)[factor]
            value = torch.where(class_labels == classes, 0, value)
            if level < ROWS[name] or name not in decided:
                decided[name] = value
        picture = torch.full_like(sample, -1.0)
        for factor, name in enumerate(ROWS):
            picture[torch.arange(len(sample)), factor, decided[name]] = 1.0
        return Transformer2DModelOutput(sample=((sample - alpha.sqrt() * picture) / (1 - alpha).sqrt()).float())

    transformer.forward = denoise
    return pipe


def read(images):
    return tuple(images[:, factor, :8].mean(-1) for factor in (0, 1))


@pytest.mark.parametrize("kind", ["swap", "insertion", "withdrawal"])
def test_a_network_that_decides_at_known_levels(kind):
    swaps = swap_labels(deciding_pipeline(), read, num_pairs=24, num_levels=20, num_inference_steps=40, kind=kind)
    assert swaps.log_snr.shape == (20,) and (np.diff(swaps.log_snr) > 0).all()
    step = np.diff(swaps.log_snr).max()
    for name, level in ROWS.items():
        assert abs(swaps.level(name) - level) < step
        if kind == "swap":
            assert swaps.share(name)[0] == 0 and swaps.share(name)[-1] == 1
    assert swaps.difference(50).low > 1


def test_what_cannot_be_swapped():
    with pytest.raises(ValueError, match="the pipeline has 3 classes"):
        swap_labels(make_pipeline(), read)
    judge = FactorClassifier()
    judge.world = "add"
    with pytest.raises(
        ValueError, match="`classifier` was trained on images of the world 'add', the pipeline on 'mod'"
    ):
        swap_labels(deciding_pipeline(), judge, world="mod")
    for options, message in (({"kind": "exchange"}, "`kind`"), ({"num_levels": 31}, r"`num_levels` \(31\)")):
        with pytest.raises(ValueError, match=message):
            swap_labels(deciding_pipeline(), read, **options)
