"""Peak memory of a search step on the digits, beside that of a micro-batch.

  python -m benchmarks.search_memory

Two exact steps at K = 10 run, each in a process of its own: one of a population
of 512 in micro-batches of 64, and one of a population of 64 in one chain.
"""

from benchmarks import records

NUM_STEPS, MICRO_BATCH = 10, 64


def measure(batch_size: int) -> dict:
  """Peak memory of one step's loss and gradient."""
  # pylint: disable=g-import-not-at-top
  import ddss_tf
  from ddss_tf.datasets import load as data
  from ddss_tf.samplers import families
  from ddss_tf.features import load as features_lib
  from ddss_tf.objectives import objective as objectives
  from ddss_tf.searching import options as options_lib
  from ddss_tf.searching import search as search_lib
  denoiser = ddss_tf.load_denoiser("digits16-ddpm")
  dataset = data.load_dataset("ddss_digits", pad=2, downsample=2,
                              max_images=1000)
  features = features_lib.load_features("digits_cnn")
  search = search_lib.assemble(
      denoiser,
      families.make_sampler(denoiser.schedule, "ggdm+pred+time", NUM_STEPS),
      objectives.Objective(
          "kid_linear", [features],
          [features(dataset.images)["pool"].numpy()], denoiser.image_shape),
      options_lib.SearchOptions(
          batch_size=batch_size, micro_batch_size=MICRO_BATCH,
          num_search_steps=1))
  before = records.peak_gib()
  search.gradient(0)
  return {"gib": records.peak_gib(), "before": before}


def main():
  measured = records.of_batch_sizes(
      "benchmarks.search_memory", __doc__, measure, (512, MICRO_BATCH))
  if measured is None:
    return
  large, small = measured
  records.keep([
      records.record(
          "search_512_memory", [large["gib"]], [small["gib"]], bound=6.0,
          of="value", unit="GiB",
          note="peak of a step's process, population 512 in micro-batches of "
          "64, digits, K = 10; yardstick: population 64 in one chain")])


if __name__ == "__main__":
  main()
