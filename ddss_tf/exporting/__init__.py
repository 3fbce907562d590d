"""Samplers on their way out: SavedModels, images, other formats."""
