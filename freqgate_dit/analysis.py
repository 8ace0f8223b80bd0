"""What a trained model does, as tables: for now the gate of Freq-Gate over time."""

import numpy as np
import torch

from freqgate_dit.transformer_freqgate_dit import FreqGateDiTTransformer2DModel


@torch.no_grad()
def gate_table(
    transformer: FreqGateDiTTransformer2DModel, num_train_timesteps: int, num_timesteps: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Every gate of the model over time; a gate depends on the timestep alone.

    Exchanging a block's two paths while negating its gate gives the same function, so a curve alone proves nothing.

    Returns:
        timesteps `(T,)` from 0 to `num_train_timesteps - 1`, gates `(T, blocks, channels)` in (0, 1).
    """
    timesteps = torch.linspace(0, num_train_timesteps - 1, num_timesteps)
    temb = transformer.embed_timestep(timesteps, num_timesteps, transformer.device, transformer.dtype)
    gates = torch.stack([block.gate(temb) for block in transformer.transformer_blocks], dim=1)
    return timesteps.numpy(), gates.float().cpu().numpy()
