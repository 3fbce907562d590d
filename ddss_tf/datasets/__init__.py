"""Where images come from; TFDS builders that come with the package."""
