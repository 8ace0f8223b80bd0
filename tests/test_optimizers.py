"""Muon beside AdamW: each is what PyTorch's own is, on its own parameters."""

import pytest
import torch
from components import assert_same_tensors, tiny_transformer
from tiny_runs import refusal, state

from freqgate_dit.training.config import TrainConfig
from freqgate_dit.training.guards import UpdateGuard
from freqgate_dit.training.optimizers import block_matrices, make_optimizer
from freqgate_dit.training.train import main


CONFIG = TrainConfig(max_steps=1, optimizer="muon", learning_rate=1e-2)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_it_steps_as_both_do(variant):
    model, other = tiny_transformer(variant), tiny_transformer(variant)
    optimizer, matrices = make_optimizer(model, CONFIG), block_matrices(other)
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    assert len(matrices) >= 12 and all(
        part in names[id(parameter)] for parameter in matrices for part in ("transformer_blocks.", "weight")
    )
    rest = [parameter for parameter in other.parameters() if not any(parameter is one for one in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    for step in range(3):
        if step == 2:  # as accelerate does
            optimizer.load_state_dict(optimizer.state_dict())
        for one in (model, other):
            gradients(one, step)
        optimizer.step()
        muon.step()
        adamw.step()
    assert_same_tensors(model.state_dict(), other.state_dict())


def test_a_step_without_a_finite_gradient_is_left_out():
    model = tiny_transformer()
    optimizer = make_optimizer(model, CONFIG)
    guard = UpdateGuard(optimizer, torch.device("cpu"), patience=3)
    gradients(model, 0)
    guard.check(torch.tensor(1.0))
    optimizer.step()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {id(p): {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    gradients(model, 1)
    model.proj_out.weight.grad[0] = torch.inf
    guard.check(torch.tensor(torch.inf))
    optimizer.step()
    assert_same_tensors(model.state_dict(), weights)
    for parameter in model.parameters():
        assert_same_tensors(dict(optimizer.state[parameter]), moments[id(parameter)])
    assert guard.counts() == (1, 1, 1)


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path, options):
    main(options(optimizer="muon", max_steps=4, output_dir=tmp_path / "straight"))
    main(options(optimizer="muon", max_steps=2))
    main(options(optimizer="muon", max_steps=4, resume="latest"))
    straight, resumed = state(tmp_path / "straight", 4), state(tmp_path / "run", 4)
    for group in straight:
        assert_same_tensors(straight[group], resumed[group])
    assert "`optimizer` is 'adamw'" in refusal(options(max_steps=6, resume="latest"))
    with pytest.raises(SystemExit, match="`optimizer`"):
        main(options(optimizer="sgd"))
