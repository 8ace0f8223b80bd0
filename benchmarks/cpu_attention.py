"""Training step on a CPU: attention by PyTorch's fused kernel against three plain matrix products, in one process.

    python benchmarks/cpu_attention.py --out results/cpu_attention_64.json

Rounds alternate between the two, so that a busy machine slows both; the median ratio of a round is what counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers.training_utils import set_seed
from output import write_result

from freqgate_dit import FreqGateDiTTransformer2DModel
from freqgate_dit.devices import bf16_is_fast
from freqgate_dit.training.hardware import use_all_cores
from freqgate_dit.transformer_freqgate_dit import DiTAttnProcessor, DiTMatmulAttnProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--patch_size", type=int, default=4, help="4 gives 64 tokens, 2 gives 256, 1 gives 1024")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores()
    set_seed(0)

    model = FreqGateDiTTransformer2DModel(
        num_layers=4,
        num_attention_heads=4,
        in_channels=3,
        sample_size=32,
        patch_size=arguments.patch_size,
        num_classes=64,
        activation_fn="linear-silu",
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(arguments.batch_size, 3, 32, 32)
    timesteps, labels = torch.rand(len(images)) * 999, torch.randint(0, 64, (len(images),))
    bf16 = bf16_is_fast(torch.device("cpu"))

    def seconds_per_step(processor) -> float:
        model.set_attn_processor(processor)
        start = time.perf_counter()
        for _ in range(arguments.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                prediction = model(images, timesteps, labels).sample
            prediction.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / arguments.steps

    fused, plain = DiTAttnProcessor(), DiTMatmulAttnProcessor()
    seconds_per_step(fused), seconds_per_step(plain)
    rounds = [(seconds_per_step(fused), seconds_per_step(plain)) for _ in range(arguments.rounds)]
    result = {
        "fused_ms": 1e3 * statistics.median(fused for fused, _ in rounds),
        "matmul_ms": 1e3 * statistics.median(plain for _, plain in rounds),
        "speedup": statistics.median(fused / plain for fused, plain in rounds),
        "tokens": (32 // arguments.patch_size) ** 2,
        "batch_size": arguments.batch_size,
        "bf16": bf16,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
