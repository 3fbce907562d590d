"""Publishes the sampler of a run, with its figures, as a card of a zoo.

  python tools/make_sampler_card.py RUN_DIR [--folder=ddss_tf/assets/samplers]

RUN_DIR holds `sampler.json` and `metrics.json`, as `--mode=run` leaves them. A
comparison keeps all its figures in one file: name it with --metrics. A sampler
that was not measured is refused.
"""

from absl import app
from absl import flags

from ddss_tf import errors
from ddss_tf import zoo

_FOLDER = flags.DEFINE_string(
    "folder", zoo.FOLDER, "The zoo; the one of the package by default.")
_NAME = flags.DEFINE_string(
    "name", None, "Of the card; <denoiser>-k<K>-<family> by default.")
_METRICS = flags.DEFINE_string(
    "metrics", None, "File with its records; RUN_DIR/metrics.json by default.")
_NOTE = flags.DEFINE_string("note", "", "What a reader should know.")


def main(argv):
  if len(argv) != 2:
    raise app.UsageError("expected RUN_DIR")
  try:
    print(zoo.add(argv[1], _FOLDER.value, _NAME.value, _METRICS.value,
                  _NOTE.value))
  except errors.UserError as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  app.run(main)
