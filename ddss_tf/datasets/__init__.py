"""Loading of real images, and the TFDS builders that come with the package."""
