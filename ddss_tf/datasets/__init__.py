"""TensorFlow Datasets builders that come with the package."""
