"""The search for a sampler, in parts."""
