"""Denoisers: a frozen network, its schedule, and what its output means."""
