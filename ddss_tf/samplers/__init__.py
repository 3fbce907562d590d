"""Samplers: coefficients, chain, training-free solvers and learned families."""
