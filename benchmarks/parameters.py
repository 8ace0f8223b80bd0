"""Parameters and FLOPs of every variant at the source experiment's size, beside the source's own counts.

    python benchmarks/parameters.py --out results/parameters.json

Nothing is computed: models are built on the meta device.
"""

import argparse
from pathlib import Path

import torch
from output import write_result

from freqgate_dit import VARIANTS
from freqgate_dit.cost import count_parameters, flops_per_forward


# Hidden 512, 8 heads, patch 2, 4 x 16 x 16 latents, text embedding of 256: the constructor's defaults and these.
SOURCE = {
    "pooled_projection_dim": 256,
    "activation_fn": "linear-silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "output_modulation": False,
}
ROWS = (
    # variant, blocks, further arguments, million parameters printed by the source
    ("in_context", 12, {}, None),
    ("cross_attention", 12, {"num_condition_tokens": 1}, None),
    ("adaln_zero", 12, {}, None),
    ("adaln_zero", 14, {}, 68.58),
    ("freq_gate", 12, {}, 68.32),
    ("adaln_zero", 14, {"modulation_rank": 128}, None),
    ("band_gate", 14, {"modulation_rank": 128, "mlp_ratio": 3.96875}, None),
)
# The source projects the text embedding to the model's width in every block, this package once per model.
PROJECTION = 256 * 512 + 512


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()

    rows = []
    for variant, blocks, options, source in ROWS:
        with torch.device("meta"):
            model = VARIANTS[variant](num_layers=blocks, **SOURCE, **options)
            default = VARIANTS[variant](num_layers=blocks, num_classes=3, **options)
        rows.append(
            {
                "variant": variant,
                "blocks": blocks,
                "modulation_rank": options.get("modulation_rank"),
                "mlp_ratio": options.get("mlp_ratio", 4.0),
                "parameters": count_parameters(model),
                "parameters_with_projection_per_block": count_parameters(model) + blocks * PROJECTION,
                "source_parameters_million": source,
                "parameters_default_three_classes": count_parameters(default),
                "gflops_forward": flops_per_forward(model) / 1e9,
            }
        )

    print("| variant | blocks | parameters | + projection per block | source prints | GFLOPs | defaults, 3 classes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        name = row["variant"] + (f", rank {row['modulation_rank']}" if row["modulation_rank"] else "")
        source = f"{row['source_parameters_million']} M" if row["source_parameters_million"] else "-"
        print(
            f"| {name} | {row['blocks']} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['parameters_with_projection_per_block'] / 1e6:.2f} M | {source} | {row['gflops_forward']:.2f} "
            f"| {row['parameters_default_three_classes'] / 1e6:.2f} M |"
        )
    write_result({"torch": torch.__version__, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
