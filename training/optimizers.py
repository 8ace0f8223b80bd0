"""The optimisers of the trainer: AdamW, or Muon on the matrices of the blocks beside it."""

import torch

from freqgate_dit.training.config import TrainConfig


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """One optimiser over all parameters of `model`, whose updates [`UpdateGuard`] can skip."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adamw = {**options, "betas": (0.9, config.adam_beta2), "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **adamw)
    matrices = block_matrices(model)
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    # Updates of the size that AdamW's have, so that one learning rate fits both.
    muon = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
    return MuonBesideAdamW(muon, torch.optim.AdamW(others, **adamw))


def block_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights of attention and MLP. Embeddings, projections at both ends and modulation, whose rows are no hidden
    features of tokens, are left to AdamW."""
    return [
        parameter
        for block in model.transformer_blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and name.split(".")[0] in ("attn", "cross_attn", "ff")
    ]


class MuonBesideAdamW(torch.optim.Optimizer):
    """Two optimisers that step as one, each over its own group of parameters.

    A gradient that is not finite (`found_inf`, which [`UpdateGuard`] sets and AdamW's fused kernel reads) leaves the
    weights and moments of both as they were. Muon has to wait for the device to know.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("`closure` is not supported: compute the gradient before `step`.")
        found_inf = getattr(self, "found_inf", None)
        for part, group in zip(self.parts, self.param_groups, strict=True):
            # What they know of groups and state is this optimiser's, also after it was loaded.
            part.param_groups, part.state = [group], self.state
            if isinstance(part, torch.optim.AdamW):
                part.found_inf = found_inf
                part.step()
            elif found_inf is None or not found_inf.item():
                part.step()
