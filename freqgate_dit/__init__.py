"""Class- or text-conditioned Diffusion Transformers that ask whether conditioning should follow frequency."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


# An uninstalled checkout keeps `pipelines/` and `training/` beside this folder; an installed package has them inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

# Imported when they are first asked for: `freqgate-dit --help` is there at once, and `freqgate-dit doctor` where torch
# or diffusers are broken.
_MODULES = {
    "VARIANTS": "transformer_freqgate_dit",
    "AdaLNZeroDiTTransformer2DModel": "transformer_freqgate_dit",
    "BandGateDiTTransformer2DModel": "transformer_freqgate_dit",
    "CrossAttentionDiTTransformer2DModel": "transformer_freqgate_dit",
    "DiffusionObjective": "losses",
    "FreqGateDiTPipeline": "pipelines.pipeline_freqgate_dit",
    "FreqGateDiTTransformer2DModel": "transformer_freqgate_dit",
    "InContextDiTTransformer2DModel": "transformer_freqgate_dit",
    "SAMPLERS": "samplers",
    "ShapesTextures": "shapes_textures",
    "SpectralEulerDiscreteScheduler": "scheduling_spectral_euler",
    "__version__": "pipelines.pipeline_freqgate_dit",
    "make_sampler": "samplers",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _of_transformer_file(name: str):
    if name.startswith("__"):  # what looks through all modules asks for `__file__`, for one
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.transformer_freqgate_dit"), name)


# diffusers' `AutoModel` resolves the module that a repository names among the modules that are already imported.
_alias = ModuleType("transformer_freqgate_dit")
_alias.__getattr__ = _of_transformer_file
sys.modules.setdefault("transformer_freqgate_dit", _alias)
