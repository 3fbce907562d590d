"""Samplers: their coefficients, the chain, training-free solvers and learned families."""
