"""Packaging of ddss_tf."""

import re

import setuptools

with open("ddss_tf/version.py") as f:
  VERSION = re.search(r'^__version__ = "(.+)"', f.read(), re.M).group(1)
with open("README.md") as f:
  README = f.read()

setuptools.setup(
    name="ddss_tf",
    version=VERSION,
    description="Differentiable diffusion sampler search in TensorFlow",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*setuptools.find_packages(include=["ddss_tf", "ddss_tf.*"]),
              "ddss_tf.gin_configs"],
    # Installed, gin_configs/demo.gin is found in the package.
    package_dir={"ddss_tf.gin_configs": "gin_configs"},
    package_data={
        "ddss_tf": ["assets/*/*", "py.typed", "*.pyi"],
        "ddss_tf.features": ["assets/*", "assets/*/*"],
        "ddss_tf.formats": ["assets/*", "assets/*/*"],
        "ddss_tf.reporting": ["assets/*", "assets/*/*"],
        "ddss_tf.exporting": ["assets/*", "assets/*/*"],
        "ddss_tf.datasets.ddss_digits": ["*.npz", "*.md"],
        # The emoji themselves are in worlds/, which is in no wheel.
        "ddss_tf.datasets.ddss_emoji": ["*.md"],
        "ddss_tf.gin_configs": [
            "*.gin", "*/*.gin", "*/*/*.gin", "*/*/*.csv", "*/*/*.md"],
    },
    python_requires=">=3.11,<3.12",
    install_requires=[
        "absl-py>=2.1",
        "filelock>=4",
        "gin-config>=0.5",
        # tensorflow-datasets imports it without asking for it.
        "importlib_resources>=6",
        "jinja2>=3.1",
        # Older ones cannot read the embedded networks, which 3.15 has saved.
        "keras>=3.15,<4",
        "lazy_loader>=0.4",
        "matplotlib>=3.9",
        "numpy>=2",
        "pillow>=11",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tabulate>=0.9",
        "tensorboard>=2.18",
        # 2.18 is the first with NumPy 2: `make test-lowest`.
        "tensorflow>=2.18.1,<2.22",
        "tensorflow-datasets>=4.9.10",
        "tensorflow-gan==2.1.0",
        # TF-GAN's metrics import it.
        "tensorflow-probability>=0.25",
        "tqdm>=4.66",
    ],
    extras_require={
        # Only to read .pt files.
        "torch": ["torch>=2.4"],
        # Only for Stable Diffusion 3 and the CLIP score. The former imports
        # modules of KerasHub that are not public, hence the bound.
        "kerashub": ["keras-hub>=0.32,<0.33"],
        # Only to export to this format, and to check what was written.
        "onnx": ["tf2onnx>=1.17", "onnxruntime>=1.20"],
        # Only to test the report in the Chromium that is installed.
        "browser": ["playwright>=1.48"],
        "test": ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6"],
    },
    entry_points={"console_scripts": ["ddss_tf = ddss_tf.main:cli"]},
)
