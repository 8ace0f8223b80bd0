"""What if: a trained model with another label from some noise level on, with another label in one path of its gate, or
with another gate. A curve says what a part does beside something; these say what depends on it.

Each is a context manager, leaves the model as it was, and works in any call of model or pipeline (eager: a compiled
model runs no hooks). Labels are exchanged in the conditional pass of guidance alone, a gate in both.

    with labels_from(pipe.transformer, other_labels, log_snr=0.0, alphas_cumprod=pipe.scheduler.alphas_cumprod):
        images = pipe(labels, guidance_scale=1).images
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from freqgate_dit.analysis import gate_table
from freqgate_dit.traces import log_snr as log_snr_of
from freqgate_dit.transformer_freqgate_dit import (
    BandGateDiTTransformer2DModel,
    ConditionedDiTTransformer2DModel,
    FreqGateDiTTransformer2DModel,
    SpectralPreconditioner,
)


PATHS = ("low", "high", "output")
GATES = ("zero", "half", "one", "mean", "reversed", "shuffled", "random")
BAND_GATES = ("zero", "half", "mean", "reversed", "shuffled", "random")
OVER_TIME = ("mean", "reversed")
MEAN_OVER = 64  # timesteps, for Band-Gate, whose gates differ by label too


@contextmanager
def hooked(handles: list):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked_labels(transformer: ConditionedDiTTransformer2DModel, labels) -> torch.Tensor | Callable:
    """`labels` as int64; a function that will give them, as it is.

    Raises:
        ValueError: for a model without classes, or labels that are none of its.
    """
    classes = transformer.config.num_classes
    if classes is None:
        raise ValueError("`transformer` is not conditioned on classes: there is no label to exchange.")
    if callable(labels):
        return labels
    wanted = f"give integers from 0 to {classes}, where {classes} is the null condition"
    try:
        checked = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`labels` ({labels!r}) are no numbers: {wanted}.") from error
    if checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise ValueError(f"`labels` ({labels!r}) are no integers: {wanted}.")
    if checked.numel() and not (0 <= checked.min() and checked.max() <= classes):
        wrong = checked.min() if checked.min() < 0 else checked.max()
        raise ValueError(f"`labels` has {wrong.item()}: {wanted}.")
    return checked.long()


def _inputs(args: tuple, kwargs: dict) -> dict:
    """Arguments of the model's forward pass by name."""
    return {**dict(zip(("hidden_states", "timestep", "class_labels"), args)), **kwargs}


def _for_batch(name: str, values: torch.Tensor, size: int) -> torch.Tensor:
    """`values`, one for all or one per image, for a batch that under guidance holds every image twice."""
    if values.ndim == 0:
        return values.expand(size)
    if size not in (len(values), 2 * len(values)):
        raise ValueError(
            f"`{name}` has {len(values)} entries, which do not fit a batch of {size}: give one per image."
        )
    return values.repeat(size // len(values))


def relabelled(
    transformer, given: torch.Tensor, labels: torch.Tensor | int | Callable, from_null: bool = False
) -> torch.Tensor:
    """`labels` in place of the labels `given` of a batch; the null condition stays unless `from_null`."""
    if callable(labels):
        labels = _checked_labels(transformer, labels(given))
    labels = _for_batch("labels", torch.as_tensor(labels, device=given.device, dtype=given.dtype), len(given))
    return labels if from_null else torch.where(given == transformer.config.num_classes, given, labels)


@contextmanager
def labels_from(
    transformer: ConditionedDiTTransformer2DModel,
    labels: torch.Tensor | int | Callable,
    log_snr: torch.Tensor | float,
    alphas_cumprod: torch.Tensor,
    from_null: bool = False,
):
    """Exchange the class labels where the noise is lower than a level: an image is begun as one class and ended as
    another. With the null label, `num_classes`, it is withdrawal of the condition.

    Args:
        labels: `(B,)` classes of the end, one per image; one for all; or a function that makes them of the given ones.
        log_snr: `(B,)` or one for all: labels are exchanged at and above this log-SNR.
        alphas_cumprod: `(T,)` of the noise schedule.
        from_null: exchange the null condition too, for insertion of a condition; not under guidance.
    """
    labels = _checked_labels(transformer, labels)
    if torch.as_tensor(log_snr).isnan().any():
        raise ValueError(f"`log_snr` ({log_snr}) is no number: give a level, or -inf for all of them.")
    alphas_cumprod = alphas_cumprod.cpu()

    def exchange(module, args, kwargs):
        inputs = _inputs(args, kwargs)
        given = inputs["class_labels"]
        now = log_snr_of(alphas_cumprod, torch.as_tensor(inputs["timestep"]).cpu().float()).expand(len(given))
        level = _for_batch("log_snr", torch.as_tensor(log_snr, dtype=now.dtype).cpu(), len(given))
        late = (now >= level).to(given.device)
        inputs["class_labels"] = torch.where(late, relabelled(transformer, given, labels, from_null), given)
        return (), inputs

    with hooked([transformer.register_forward_pre_hook(exchange, with_kwargs=True)]):
        yield


@contextmanager
def labels_in_path(transformer: ConditionedDiTTransformer2DModel, path: str, labels: torch.Tensor | int | Callable):
    """Exchange the class labels in one path of the condition alone: "structure of A, texture of B".

    Args:
        path: "low" or "high", the two views of the condition that Freq-Gate mixes, or that drive Band-Gate's two
            gates; "output", the modulation of the last layer. All of them exchanged are another label (but with
            `gate_residual` the condition goes into the blocks beside the paths, too).
        labels: `(B,)` classes, one for all, or a function that makes them of the given ones; `num_classes` is the null
            condition.

    Raises:
        ValueError: for a model without the path.
    """
    labels = _checked_labels(transformer, labels)
    if path not in PATHS:
        raise ValueError(f"`path` ({path!r}) must be one of {', '.join(PATHS)}.")
    if path == "output":
        modules = [transformer.modulation_out]
    else:
        modules = [getattr(block, path, None) for block in transformer.transformer_blocks]
    if None in modules:
        raise ValueError(f"`path` ({path!r}): this {type(transformer).__name__} has no such path.")
    conditions = {}  # of this forward pass: what it was given, and what goes into the path

    def now(name: str) -> torch.Tensor:  # of the samples that are going through the blocks
        return conditions[name][transformer.rows_of_pass]

    def embed(module, args, kwargs):
        given = _inputs(args, kwargs)["class_labels"]
        dtype = transformer.dtype
        conditions["given"] = transformer.class_embed(given).to(dtype)
        conditions["other"] = transformer.class_embed(relabelled(transformer, given, labels)).to(dtype)

    def exchange(module, args):
        if path == "output":  # it sees the sum of time and condition
            return (args[0] - now("given") + now("other"),)
        views_silu = isinstance(transformer, FreqGateDiTTransformer2DModel)
        return (F.silu(now("other")) if views_silu else now("other"),)

    handles = [transformer.register_forward_pre_hook(embed, with_kwargs=True)]
    with hooked(handles + [module.register_forward_pre_hook(exchange) for module in modules]):
        yield


@contextmanager
def changed_gate(transformer: ConditionedDiTTransformer2DModel, change: str, num_train_timesteps: int = 1000):
    """Another gate in every block, or another learned spectral gate.

    Args:
        change: for Freq-Gate "zero", "half", "one": that constant; "mean": its mean over all timesteps, so that its
            values stay and their course goes; "reversed": its value at the mirrored timestep; "shuffled": those of
            other channels, in an order that is fixed per block; "random": a constant between 0 and 1 per block and
            channel. For Band-Gate "zero": no difference between bands; "mean" and "reversed", of the same label,
            unless its gates depend on the class alone; and where they are vectors "half": half of the difference;
            "shuffled", within each branch; "random": noise that is fixed per block, as large as the gates are at the
            time. For any model with a learned spectral gate "wiener": the one that training began with.
        num_train_timesteps: of the noise schedule.

    Raises:
        ValueError: for a change that the variant does not have.
    """
    changes = gate_changes(transformer)
    if change not in changes:
        raise ValueError(
            f"`change` ({change!r}): {type(transformer).__name__} has "
            f"{', '.join(changes) if changes else 'no gate to change'}."
        )
    if change == "wiener":
        with _wiener(transformer.preconditioner):
            yield
        return
    is_band_gate = isinstance(transformer, BandGateDiTTransformer2DModel)
    handles = _band_gate_handles if is_band_gate else _freq_gate_handles
    with hooked(handles(transformer, change, num_train_timesteps)):
        yield


def gate_changes(transformer: ConditionedDiTTransformer2DModel) -> tuple[str, ...]:
    """The changes that `changed_gate` knows for a model; none without gates."""
    preconditioner = transformer.preconditioner
    spectral = ("wiener",) if preconditioner is not None and preconditioner.kind == "learned" else ()
    if isinstance(transformer, FreqGateDiTTransformer2DModel):
        return GATES + spectral
    if isinstance(transformer, BandGateDiTTransformer2DModel) and "band" in transformer.inspectable:
        left_out = OVER_TIME if transformer.config.band_drive == "class" else ()
        if transformer.config.band_gates == "scalar":  # two numbers in place of channels
            left_out += ("half", "shuffled", "random")
        return tuple(name for name in BAND_GATES if name not in left_out) + spectral
    return spectral


@contextmanager
def _wiener(gate: SpectralPreconditioner):
    """Slope and offset of a learned spectral gate as they were before training."""
    learned = {name: parameter.detach().clone() for name, parameter in gate.named_parameters()}
    try:
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for name, parameter in gate.named_parameters():
                parameter.copy_(learned[name])


def _fixed(index: int) -> torch.Generator:
    """Of what is random in a block, and the same in every call."""
    return torch.Generator().manual_seed(index)


def _band_gate_handles(transformer: BandGateDiTTransformer2DModel, change: str, num_train_timesteps: int) -> list:
    if change not in OVER_TIME:

        def replacement(index: int, branches: int) -> Callable:
            def replace(module, args, output):  # (B, 1, branches * D)
                if change in ("zero", "half"):
                    return output * {"zero": 0.0, "half": 0.5}[change]
                by_branch = output.unflatten(-1, (branches, -1))
                size, generator = by_branch.shape[-1], _fixed(index)
                if change == "shuffled":
                    return by_branch[..., torch.randperm(size, generator=generator).to(output.device)].flatten(-2)
                noise = torch.randn(branches, size, generator=generator).to(output)
                return (noise * by_branch.square().mean(-1, keepdim=True).sqrt()).flatten(-2)

            return replace

        return [
            block.band_modulation.register_forward_hook(replacement(index, len(block.branches)))
            for index, block in enumerate(transformer.transformer_blocks)
        ]
    now = {}

    def keep_time(module, args, kwargs):
        inputs = _inputs(args, kwargs)
        hidden_states = inputs["hidden_states"]

        def time_part(timesteps):  # what the band gates see of time: (len(timesteps), D)
            samples = hidden_states[:1].expand(len(timesteps), -1, -1, -1)
            temb = transformer.embed_timestep(timesteps, len(timesteps), samples.device, samples.dtype)
            (clock_low, _), _ = transformer.block_inputs(samples, transformer.known_of(samples, timesteps))
            return temb + clock_low

        timestep = torch.as_tensor(inputs["timestep"], device=hidden_states.device).float().expand(len(hidden_states))
        now["given"] = time_part(timestep)
        if change == "reversed":
            now["mirrored"] = time_part(num_train_timesteps - 1 - timestep)
        else:
            steps = torch.linspace(0, num_train_timesteps - 1, MEAN_OVER, device=hidden_states.device)
            now["all"] = time_part(steps)

    def at_mirrored(module, args):
        rows = transformer.rows_of_pass
        return (args[0] - now["given"][rows] + now["mirrored"][rows],)

    def mean_over_time(module, args, output):
        drive = (args[0] - now["given"][transformer.rows_of_pass])[:, None] + now["all"]  # (B, T, D)
        gates = module.forward(drive.flatten(0, 1))  # (B * T, 1, k * D)
        return gates.unflatten(0, drive.shape[:2]).mean(1)

    handles = [transformer.register_forward_pre_hook(keep_time, with_kwargs=True)]
    for block in transformer.transformer_blocks:
        if change == "reversed":
            handles.append(block.band_modulation.register_forward_pre_hook(at_mirrored))
        else:
            handles.append(block.band_modulation.register_forward_hook(mean_over_time))
    return handles


def _freq_gate_handles(transformer: FreqGateDiTTransformer2DModel, change: str, num_train_timesteps: int) -> list:
    _, gates = gate_table(transformer, num_train_timesteps, num_train_timesteps)
    table = torch.from_numpy(gates).to(transformer.device, transformer.dtype)  # (T, blocks, D)
    orders = [torch.randperm(table.shape[-1], generator=_fixed(index)) for index in range(table.shape[1])]
    now = {}

    def keep_timestep(module, args, kwargs):
        inputs = _inputs(args, kwargs)
        timestep = torch.as_tensor(inputs["timestep"]).float().to(table.device)
        now["mirrored"] = num_train_timesteps - 1 - timestep.expand(len(inputs["hidden_states"]))

    def replacement(index: int) -> Callable:
        def replace(module, args, output):
            if change in ("zero", "half", "one"):
                return torch.full_like(output, {"zero": 0.0, "half": 0.5, "one": 1.0}[change])
            if change == "mean":
                return table[:, index].mean(0).expand_as(output).to(output)
            if change == "shuffled":
                return output[..., orders[index].to(output.device)]
            if change == "random":
                return torch.rand(output.shape[-1], generator=_fixed(index)).to(output).expand_as(output)
            return table[now["mirrored"][transformer.rows_of_pass].round().long(), index].to(output)

        return replace

    handles = [transformer.register_forward_pre_hook(keep_timestep, with_kwargs=True)]
    return handles + [
        block.gate.register_forward_hook(replacement(index))
        for index, block in enumerate(transformer.transformer_blocks)
    ]
