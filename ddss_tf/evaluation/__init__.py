"""Measuring samplers, one or many."""
