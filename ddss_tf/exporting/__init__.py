"""Writing of samplers and samples: SavedModels, other formats, image files."""
