"""Class- or text-conditioned Diffusion Transformers that ask whether conditioning should follow frequency."""

from pathlib import Path


# An uninstalled checkout keeps `pipelines/` and `training/` beside this folder; an installed package has them inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

from freqgate_dit.losses import DiffusionObjective  # noqa: E402
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline  # noqa: E402
from freqgate_dit.shapes_textures import ShapesTextures  # noqa: E402
from freqgate_dit.transformer_freqgate_dit import (  # noqa: E402
    VARIANTS,
    AdaLNZeroDiTTransformer2DModel,
    CrossAttentionDiTTransformer2DModel,
    FreqGateDiTTransformer2DModel,
    InContextDiTTransformer2DModel,
)


__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AdaLNZeroDiTTransformer2DModel",
    "CrossAttentionDiTTransformer2DModel",
    "DiffusionObjective",
    "FreqGateDiTPipeline",
    "FreqGateDiTTransformer2DModel",
    "InContextDiTTransformer2DModel",
    "ShapesTextures",
]
