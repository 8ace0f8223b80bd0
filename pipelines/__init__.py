"""Pipelines of freqgate_dit."""
