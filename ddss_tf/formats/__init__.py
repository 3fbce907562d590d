"""Readers of the formats in which diffusion models are published."""
