"""Training scripts of freqgate_dit and what only they need."""
