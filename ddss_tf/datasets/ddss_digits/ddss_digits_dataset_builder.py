"""MNIST digits as a TFDS data set that needs no download."""

import io
import os

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from ddss_tf import storage

_CITATION = """\
@article{lecun1998gradient,
  title={Gradient-based learning applied to document recognition},
  author={LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and
          Haffner, Patrick},
  journal={Proceedings of the IEEE},
  volume={86},
  number={11},
  pages={2278--2324},
  year={1998}
}
"""
_HERE = os.path.dirname(__file__)


class Builder(tfds.core.GeneratorBasedBuilder):
  """`ddss_digits`: 10 000 MNIST digits, in the order of `mnist10k.npz`.

  Features: `image`, uint8 [28, 28, 1] in [0, 255], background 0; `label`, int64
  in [0, 9]. Origin and licence: `README.md` beside this file.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}

  def _info(self) -> tfds.core.DatasetInfo:
    with storage.open(os.path.join(_HERE, "README.md"), encoding="utf-8") as f:
      description = f.read()
    return tfds.core.DatasetInfo(
        builder=self,
        description=description,
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }),
        supervised_keys=("image", "label"),
        homepage="http://yann.lecun.com/exdb/mnist/",
        citation=_CITATION,
        # Otherwise TFDS orders the examples by a hash of their keys.
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # The digits are in the package.
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    with np.load(os.path.join(_HERE, "mnist10k.npz")) as digits:
      images, labels = digits["image"], digits["label"]
    for i, (image, label) in enumerate(zip(images, labels)):
      # TFDS would encode each of them by a call of TensorFlow.
      png = io.BytesIO()
      Image.fromarray(image).save(png, "PNG")
      png.seek(0)
      yield i, {"image": png, "label": int(label)}
