"""How labels reach the model: as class ids, as rows of a table of text embeddings, or not at all."""

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, CLIPTextModel

from freqgate_dit.pipelines.pipeline_freqgate_dit import encode_pooled_text
from freqgate_dit.training.config import ConditionConfig
from freqgate_dit.training.latents import weights_fingerprint


@dataclass
class Condition:
    """What a model is conditioned on.

    Args:
        class_names: of labels 0, 1, ...; label `len(class_names)` is the null condition.
        table: `(len(class_names) + 1, P)` text embedding of each label, the null condition last, or `None`.
        text_encoder, tokenizer: what made the table; they go into the pipeline.
    """

    class_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    table: torch.Tensor | None = None
    text_encoder: CLIPTextModel | None = None
    tokenizer: object | None = None

    @property
    def null_label(self) -> int:
        return len(self.class_names)

    @property
    def is_none(self) -> bool:
        return not self.class_names

    def fingerprint(self) -> str | None:
        """Digest of what makes the table, or `None` without a table. (The table itself differs between processors.)"""
        if self.table is None:
            return None
        digest = hashlib.sha256(json.dumps([self.prompts, self.tokenizer(list(self.prompts))["input_ids"]]).encode())
        digest.update(weights_fingerprint(self.text_encoder).encode())
        return digest.hexdigest()

    def model_arguments(self) -> dict:
        """Arguments of the model's constructor."""
        if self.is_none:
            return {}
        if self.table is not None:
            return {"pooled_projection_dim": self.table.shape[1]}
        return {"num_classes": len(self.class_names)}

    def forward_arguments(self, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward pass for `labels (B,)`."""
        if self.is_none:
            return {}
        if self.table is not None:
            return {"pooled_projections": self.table[labels]}
        return {"class_labels": labels}

    def pipeline_arguments(self, labels: list[int]) -> dict:
        """Arguments of a pipeline call that samples `labels`."""
        if self.is_none:
            return {"num_images_per_label": len(labels)}
        if self.table is not None:
            return {"prompt": [self.prompts[label] for label in labels]}
        return {"class_labels": labels}


def load_condition(config: ConditionConfig, class_names: tuple[str, ...], device) -> Condition:
    """The condition that the configuration asks for, given the classes of the data.

    Raises:
        ValueError: if a condition is asked for that the data or the text encoder cannot give.
    """
    kind = config.condition
    if kind == "auto":
        kind = "class" if class_names else "none"
    if kind == "none":
        return Condition()
    if not class_names:
        raise ValueError(f"`condition` is {kind!r}, but the data has no classes: use `condition: none`.")
    if kind == "class":
        return Condition(class_names)

    try:
        text_encoder = CLIPTextModel.from_pretrained(config.text_encoder).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.text_encoder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`text_encoder` ({config.text_encoder!r}) or `tokenizer` ({config.tokenizer!r}) cannot be loaded: "
            f"{error} Give a folder that holds a CLIP text model or tokenizer, or a Hub id such as "
            "openai/clip-vit-base-patch32."
        ) from error
    prompts = tuple(config.prompt_template.replace("{label}", name) for name in class_names)
    table = encode_pooled_text(tokenizer, text_encoder, [*prompts, ""]).float().to(device)
    if not table.isfinite().all():
        raise ValueError(
            f"`text_encoder` ({config.text_encoder!r}) makes NaN or infinity of the prompts of the classes: its "
            "weights are damaged, or too large for their number type. Name another one."
        )
    return Condition(class_names, prompts, table, text_encoder, tokenizer)
