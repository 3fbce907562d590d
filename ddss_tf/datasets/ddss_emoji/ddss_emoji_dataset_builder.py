"""Emoji as a TFDS data set, made of a file of the repository's worlds."""

import os

import tensorflow_datasets as tfds

from ddss_tf import storage

_HERE = os.path.dirname(__file__)
FILE = "worlds:emoji32/emoji32.npz"
CLASSES = ("smileys_and_emotion", "people_and_body", "animals_and_nature",
           "food_and_drink", "travel_and_places", "activities", "objects",
           "symbols", "flags")
_VENDORS = ("noto", "twemoji", "fluent")


class Builder(tfds.core.GeneratorBasedBuilder):
  """`ddss_emoji`: 8 400 emoji, in the order of `emoji32.npz`.

  Features: `image`, uint8 [32, 32, 3] in [0, 255], background 255; `label`, int64 in
  [0, 8]; `vendor`, int64 in [0, 2]; `concept` and `tone`, texts. Origin and licences:
  `README.md` beside this file.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=storage.read_text(os.path.join(_HERE, "README.md")),
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "vendor": tfds.features.ClassLabel(names=_VENDORS),
            "concept": tfds.features.Text(),
            "tone": tfds.features.Text(),
        }),
        supervised_keys=("image", "label"),
        homepage="https://github.com/iamcal/emoji-data",
        # Otherwise TFDS orders the examples by a hash of their keys.
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # The file lies in the repository.
    # What is missing is told before TFDS makes folders.
    return {"train": self._generate_examples(storage.expanded(FILE))}

  def _generate_examples(self, path):
    arrays = storage.read_arrays(path)
    rows = zip(*(arrays[name] for name in (
        "image", "label", "vendor", "concept", "tone")))
    for i, (image, label, vendor, concept, tone) in enumerate(rows):
      yield i, {"image": image, "label": int(label), "vendor": int(vendor),
                "concept": str(concept), "tone": str(tone)}
