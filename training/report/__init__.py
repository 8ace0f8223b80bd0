"""The sections of a report of a pipeline: each measures one thing and reads it in plain language."""

from freqgate_dit.training.report.decisions import decision_section
from freqgate_dit.training.report.gates import gate_section
from freqgate_dit.training.report.information import information_section
from freqgate_dit.training.report.interventions import intervention_section
from freqgate_dit.training.report.order import trace_section
from freqgate_dit.training.report.subject import Subject


SECTIONS = {
    "order": trace_section,
    "gates": gate_section,
    "interventions": intervention_section,
    "information": information_section,
    "decisions": decision_section,
}
# What each depends on, of the fields of `Subject` that people choose.
OPTIONS = {
    "order": ("num_images", "steps", "seed", "batch_size", "prompts"),
    "gates": (),
    "interventions": ("num_images", "steps", "seed", "batch_size", "prompts"),
    "information": (),
    "decisions": ("num_pairs", "num_levels", "steps", "seed", "batch_size"),
}

__all__ = [
    "OPTIONS",
    "SECTIONS",
    "Subject",
    "decision_section",
    "gate_section",
    "information_section",
    "intervention_section",
    "trace_section",
]
