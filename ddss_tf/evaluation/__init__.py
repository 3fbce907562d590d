"""Measurement of samplers: FID, KID and Inception Score."""
