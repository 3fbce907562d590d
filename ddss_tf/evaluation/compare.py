"""One table of many samplers: every solver, every family, for several K.

  for each K    baselines measured as they are
                solvers   every stride on few images -> the best one, measured
                families  searched from the best start they hold -> measured
  -> metrics.json, table.csv, table.md, samples.npz, pictures

All results are kept. Called again, `compare` goes on where it stopped.
"""

import functools
import os
from typing import Any, Mapping, Sequence

from absl import logging
import gin

from ddss_tf import bindings
from ddss_tf import storage
from ddss_tf import zoo
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.evaluation import baselines as baselines_lib
from ddss_tf.evaluation import evaluator as evaluator_lib
from ddss_tf.evaluation import heldout as heldout_lib
from ddss_tf.evaluation import lineage
from ddss_tf.features import network as network_lib
from ddss_tf.objectives import objective as objective_lib
from ddss_tf.reporting import comparison
from ddss_tf.runs import progress
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.samplers import families as families_lib
from ddss_tf.samplers import labels
from ddss_tf.samplers import parameterisations
from ddss_tf.samplers import sampler as sampler_lib
from ddss_tf.samplers import solvers as solvers_lib
from ddss_tf.samplers import strides
from ddss_tf.searching import search as search_lib
from ddss_tf.datasets.dataset import ImageDataset
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import MAX_SEED, UserError, check_whole
from ddss_tf.evaluation.baselines import Baseline
from ddss_tf.features.clip import Clip
from ddss_tf.reporting.published import Published

_SHOWN = 8  # Images of each row.


def check_compare(arguments: Mapping[str, Any]) -> None:
  """Checks the options of a comparison before anything is loaded.

  Args:
    arguments: the arguments of `compare`, by name. The denoiser, the data set
      and the feature networks are not looked at.

  Raises:
    UserError: a name is unknown or a number is out of range.
  """
  arguments = {**arguments, "full_chain": _variances(arguments["full_chain"])}
  for what, known in (("solvers", solvers_lib.ALL_SOLVERS),
                      ("strides", (*strides.STRIDES, *strides.FLOW_STRIDES)),
                      ("families", families_lib.family_names()),
                      ("full_chain", solvers_lib.VARIANCES)):
    for name in _listed(what, arguments, "list of names"):
      if name not in known:
        raise UserError(f"compare.{what} must be out of {', '.join(known)}. "
                        f"Received: {name!r}")
  if arguments["solvers"] and not arguments["strides"]:
    raise UserError("compare.strides must be some, for the solvers. Received: "
                    f"{arguments['strides']!r}")
  baselines_lib.check("compare", arguments["baselines"])
  heldout_lib.check("compare", arguments["heldout_measures"])
  for what, known in (("starts", ("best", "default")),
                      ("parameterisation", tuple(parameterisations.FORMS))):
    if arguments[what] not in known:
      raise UserError(f"compare.{what} must be {' or '.join(map(repr, known))}."
                      f" Received: {arguments[what]!r}")
  objectives = arguments["objectives"]
  if objectives is not None and not isinstance(objectives, Mapping):
    raise UserError("compare.objectives must be objectives by label. "
                    f"Received: {objectives!r}")
  for label, objective in (objectives or {}).items():
    if (not isinstance(label, str) or os.path.basename(label) != label
        or label.startswith(".") or not label):  # Its search has a folder.
      raise UserError("compare.objectives must be labelled by what can name a "
                      f"folder. Received: {label!r}")
    try:
      objective_lib.weights_of_terms(objective)
    except (TypeError, ValueError) as error:
      raise UserError(f"compare.objectives[{label!r}]: {error}") from error
  # Strides are first tried on a quarter of `stride_samples`: 4, the least.
  for name, least in (
      ("stride_samples", 16), ("num_samples", 4), ("batch_size", 1)):
    check_whole(f"compare.{name}", arguments[name], least)
  check_whole("compare.full_chain_steps", arguments["full_chain_steps"], 1,
              optional=True)
  seeds = [arguments["seed"], *_listed("more_seeds", arguments)]
  for seed in seeds:
    check_whole("compare.seed and more_seeds", seed, 0, most=MAX_SEED - 1)
  if len(set(seeds)) < len(seeds):
    raise UserError("compare.more_seeds must differ from each other and from "
                    f"compare.seed. Received: {seeds}")
  for path in _listed("cards", arguments):
    zoo.find(path)
  for steps in _listed("num_steps", arguments):
    check_whole("compare.num_steps", steps, 1)
  if not (arguments["cards"] or arguments["full_chain"]
          or arguments["num_steps"]
          and (arguments["solvers"] or arguments["baselines"]
               or arguments["families"])):
    raise UserError(
        "compare needs solvers, baselines or families and their num_steps, or "
        "cards. Received: none of them")


def _listed(name, arguments, what="list"):
  """The argument of a name, which must be a list."""
  if not isinstance(arguments[name], (list, tuple)):
    raise UserError(f"compare.{name} must be a {what}. "
                    f"Received: {arguments[name]!r}")
  return arguments[name]


def _variances(full_chain):
  """The variances of DDPM's rows; True stands for that of the posterior."""
  if not isinstance(full_chain, bool):
    return full_chain
  return ("posterior",) if full_chain else ()


@bindings.configurable(denylist=["run_dir"])
def compare(
    run_dir: str,
    denoiser: Denoiser = gin.REQUIRED,
    dataset: ImageDataset = gin.REQUIRED,
    features: network_lib.FeatureNetwork = gin.REQUIRED,
    heldout_features: (network_lib.FeatureNetwork
                       | list[network_lib.FeatureNetwork] | None) = None,
    num_steps: Sequence[int] = gin.REQUIRED,
    solvers: Sequence[str] = solvers_lib.SOLVERS,
    strides: Sequence[str] = strides.STRIDES,
    baselines: Sequence[Baseline] = (),
    families: Sequence[str] = families_lib.COMPARED,
    starts: str = "best",
    parameterisation: str = "real",
    objectives: Mapping[str, str | Mapping[str, float]] | None = None,
    cards: Sequence[str] = (),
    full_chain: bool | Sequence[str] = False,
    full_chain_steps: int | None = None,
    published: Published | None = None,
    num_samples: int = gin.REQUIRED,
    stride_samples: int = 1000,
    seed: int = 1234,
    more_seeds: Sequence[int] = (),
    batch_size: int = 250,
    jit_compile: bool = True,
    rounding: bool = True,
    clip: Clip | None = None,
    heldout_measures: Sequence[str] = heldout_lib.DEFAULT,
) -> list[dict]:
  """Measures solvers and searched families side by side, on the same noise.

  It writes a table, the first samples of every row, and pictures of both.

  A solver's row is measured on its best stride. All strides are tried on a
  quarter of `stride_samples` images, the best two on all of them; the lowest
  FID wins. Their noise has the seed after the largest seed of the table.

  A family's row is a sampler found by a search with the bindings of `search`.
  The search starts at the best, by its own objective and noise, of the samplers
  that the family contains: its default, DDPM and DDIM on their best strides,
  and the searched samplers of smaller families. So a larger family never starts
  worse. The first family that contains multistep solvers is searched from the
  best solver, and again from the best one at other times. Its row is the better
  of the two, chosen as strides are, and larger families may start at either.
  Two starts are tried because equally good ones can end far apart: on the
  digits at K = 5, searches end lower from t = 800 than from t = 999, whose
  first prediction says little.

  Args:
    run_dir: folder of the comparison; each search has its own below it.
    denoiser: the frozen model.
    dataset: its training set, and the reference of the measures.
    features: the network of the searches' loss, and of FID, KID and IS.
    heldout_features: an unrelated network for `fid_heldout`, or a list of them;
      see `evaluate.evaluate`.
    num_steps: the values of K, a list.
    solvers: names out of `solvers.ALL_SOLVERS`.
    strides: names out of `strides.STRIDES` and, on a flow,
      `strides.FLOW_STRIDES`.
    baselines: samplers that are measured as they are, at every K: names such as
      "ddim quadratic", or functions from a noise schedule to a sampler.
    families: names of learned families, smaller ones first.
    starts: "best", as above, or "default": each family is searched once, from
      its own default start (`learned.LearnedSampler.default_start`).
    parameterisation: "real" or "paper", the form of all families
      (`parameterisations.FORMS`). In the paper's form a search starts at DDPM or
      DDIM only, so "best" does not start it at a smaller family.
    objectives: what searches minimise, a dict of labels to what
      `search.objective` takes. Each family has a row for each. All searches
      then start at DDPM, because the ELBO of a start without noise is infinite.
      None: a family has one row, with the binding of `search`.
    cards: samplers that were found before, measured as they are: paths of
      their cards, or names in the zoo; see `zoo.load_searched`.
    full_chain: also measure DDPM at many steps, with the first seed only: True,
      or variances of its noise out of `solvers.VARIANCES`, a row for each. It
      takes hundreds of calls an image: a reference for small models, or for few
      samples.
    full_chain_steps: its K; None for every training step.
    published: published figures that stand beside the measured ones, see
      `published.load_published`.
    num_samples: generated images of each row.
    stride_samples: generated images by which strides are chosen.
    seed: the seed of the rows' noise.
    more_seeds: seeds with which every row but the full chain is measured again.
      Each gives a record; the table has their mean, the pictures a band.
    batch_size: images per call.
    jit_compile: compile the network with XLA.
    rounding: see `Evaluator`.
    clip: the network of the rows' CLIP score; see `evaluate.evaluate`. Strides
      are chosen without it.
    heldout_measures: further figures of the rows, see `evaluate.evaluate`.

  Returns:
    The records in the order of the table, those of several seeds one after
    another. With `published` each also has the `published` figures, None where
    there are none. With `objectives` each also has the `objective` of its
    search, the `search_rate` and `search_seconds`, the time of the search's
    steps.

  Raises:
    UserError: a name is unknown, samples are too few, a search fails, or there
      is a clip and the denoiser has no prompts.
  """
  check_compare(locals())
  denoiser = denoiser.for_dataset(dataset)  # Once: it compiles its network once.
  with run_dir_lib.RunDir(run_dir).locked() as run:
    make_evaluator = functools.partial(
        evaluator_lib.Evaluator, denoiser=denoiser, dataset=dataset,
        features=features, heldout_features=heldout_features,
        batch_size=batch_size, jit_compile=jit_compile, rounding=rounding)
    evaluator = make_evaluator(
        run, seed=seed, clip=clip, heldout_measures=heldout_measures)
    run.keep_config()
    fixed = {steps: _baselines(baselines, denoiser.schedule, steps)
             for steps in num_steps}
    chains = _full_chains(denoiser, _variances(full_chain), full_chain_steps)
    rows = (len(num_steps) * (len(baselines) + len(solvers)
                              + len(families) * len(objectives or [0]))
            + len(cards) + len(chains))
    with progress.bar(rows, "table", "row") as bar:
      table = _Table(run, evaluator, bar, num_samples, more_seeds,
                     searched=bool(objectives), published=published)
      race = _Race(
          table, denoiser, dataset, features,
          lineage.Ranking(
              make_evaluator(run_dir_lib.RunDir(run.path("strides"), run.cache),
                             seed=max([seed, *more_seeds]) + 1,
                             heldout_measures=()),
              stride_samples, strides),
          default_starts=starts == "default", jit_compile=jit_compile,
          parameterisation=parameterisation)
      for steps in num_steps:
        for sampler in fixed[steps]:
          table.add(sampler, row=_row_of(sampler))
        race.run(steps, solvers, families, objectives)
      for path in cards:
        table.add_card(path, denoiser)
      for chain in chains:
        table.add(chain, more_seeds=(), row=("full_chain", chain.variance))
    table.keep_real_images()
    comparison.draw(run.root, table.records)
    return table.records


class _Table:
  """The rows of a comparison: records, first samples, files.

  Args:
    run: its run directory.
    evaluator: measures the rows.
    bar: moves by one for each row.
    num_samples: the number of images of each row.
    more_seeds: further seeds with which each row is measured.
    searched: whether records say how their sampler was searched.
    published: published figures for the records, or None.

  Attributes:
    run: the run directory.
    records: the records of all rows, in order.
  """

  def __init__(self, run, evaluator, bar, num_samples, more_seeds, searched,
               published=None):
    self.run, self.records = run, []
    self._published = published
    self._evaluator, self._bar = evaluator, bar
    self._num_samples, self._more_seeds = num_samples, more_seeds
    self._searched = searched
    self._images = comparison.read_samples(run.path(run_dir_lib.SAMPLES_NPZ))

  def add(self, sampler, x0_bound=None, search=None, more_seeds=None,
          row=None) -> None:
    """Measures a row, and writes the table anew.

    Args:
      sampler: the sampler of the row.
      x0_bound: see `chain.bound_x0`.
      search: how it was searched, from its card; None: it was not.
      more_seeds: further seeds of this row; None: those of all rows.
      row: its row and stride as published tables name them, see
        `Published.of`; None: it is in none of them.
    """
    more_seeds = self._more_seeds if more_seeds is None else more_seeds
    record = self._evaluator.timed_record(sampler, self._num_samples, x0_bound)
    self._keep_images(records_lib.sample_key(record), sampler, x0_bound)
    of_row = [record, *(
        self._evaluator.record(sampler, self._num_samples, x0_bound, other)
        for other in more_seeds)]
    for record in of_row:
      if self._searched:
        record = {**record, "objective": search and search["objective"],
                  "search_rate": search and search["rate"],
                  "search_seconds": search and search["seconds"]}
      if self._published:
        record = {**record, "published": row and self._published.of(
            *row, record["num_steps"])}
      self.records.append(record)
      logging.info("%s", record)
    records_lib.write_table(self.run.path(run_dir_lib.TABLE), self.records)
    self._bar.update()

  def _keep_images(self, key, sampler, x0_bound):
    """Makes and stores the first images of a row, unless they are there."""
    if key not in self._images:
      self._store(key, self._evaluator.images(sampler, _SHOWN, x0_bound))

  def keep_real_images(self) -> None:
    """Stores the data set's first images, for the pictures."""
    self._store(labels.REAL_IMAGES, self._evaluator.real_images(_SHOWN))

  def _store(self, key, images):
    self._images[key] = dataset_lib.to_uint8(images)
    storage.save_arrays(
        self.run.path(run_dir_lib.SAMPLES_NPZ), self._images, compressed=True)

  def add_card(self, path: str, denoiser: Denoiser) -> None:
    """Measures a sampler that was found before."""
    sampler, bound = zoo.load_searched(self.run, denoiser, path)
    if any((row["sampler"], row["num_steps"])
           == (sampler.label, sampler.num_steps) for row in self.records):
      sampler.label += f" ({zoo.short_name(path)})"
    self.add(sampler, bound)


class _Race:
  """Adds the rows of solvers on their best strides, and of searched families.

  Args:
    table: takes the rows.
    denoiser: the frozen model.
    dataset: its training set.
    features: the network of the searches' loss.
    ranking: ranks samplers, on images of its own.
    default_starts: whether each family is searched from its default start only.
    jit_compile: compile the network with XLA.
    parameterisation: the form of the families.
  """

  def __init__(self, table: _Table, denoiser, dataset, features,
               ranking: lineage.Ranking, default_starts: bool,
               jit_compile: bool, parameterisation: str):
    self._table, self._ranking = table, ranking
    self._denoiser, self._dataset = denoiser, dataset
    self._features = features
    self._default_starts = default_starts
    self._jit_compile = jit_compile
    self._parameterisation = parameterisation

  def run(self, steps: int, solvers, families, objectives) -> None:
    """Adds all rows of a number of steps."""
    make = functools.partial(
        families_lib.make_sampler, self._denoiser.schedule, num_steps=steps)
    ranked = [self._ranking.best_strides(functools.partial(make, family=solver))
              for solver in solvers]
    for sampler, *_ in ranked:
      self._table.add(sampler, row=_row_of(sampler))
    if objectives:
      for family in families:
        self._search_by_objective(steps, family, objectives)
      return
    starts = lineage.Starts(self._ranking, ranked, self._default_starts)
    for family in families:
      self._search_from(steps, family, starts)

  def _search_by_objective(self, steps, family, objectives):
    """Adds a row for each objective; all searches start at DDPM."""
    for label, objective in objectives.items():
      path = self._table.run.path(f"k{steps}", family, label)
      sampler, bound = self._searched(
          path, family, steps, [{"init": "ddpm"}], objective=objective)
      sampler.label = f"{sampler.label}, {label}"
      self._table.add(sampler, bound, _search_of(path))

  def _search_from(self, steps, family, starts):
    """Adds the row of a family: the best of its searches."""
    folder = self._table.run.path(f"k{steps}", family)
    found = {path: self._searched(path, family, steps, candidates)
             for path, candidates in starts.rounds(family, folder).items()}
    starts.ended(family, list(found))
    path = folder if len(found) == 1 else min(
        found, key=lambda path: self._ranking.rank(*found[path]))
    self._table.add(*found[path], _search_of(path), row=(family, ""))

  def _searched(self, folder, family, steps, candidates, **changes):
    """Searches in a folder; gives the found sampler and its bound on x0_hat."""
    search_lib.search(
        run_dir=folder, denoiser=self._denoiser, dataset=self._dataset,
        features=self._features, sampler=functools.partial(
            families_lib.make_sampler, family=family, num_steps=steps,
            init="auto", parameterisation=self._parameterisation),
        start_candidates=candidates, cache_dir=self._table.run.cache,
        jit_compile=self._jit_compile, **changes)
    return zoo.load_searched(run_dir_lib.RunDir(folder), self._denoiser)


def _baselines(baselines, schedule, num_steps):
  """The baselines at K steps, made before anything is measured.

  Raises:
    UserError: one is a function and its sampler has another K.
  """
  samplers = [baselines_lib.make_baseline(baseline, schedule, num_steps)
              for baseline in baselines]
  for sampler in samplers:
    if sampler.num_steps != num_steps:
      raise UserError(
          f"compare.baselines must take K = {num_steps}, out of "
          "compare.num_steps: name a solver and a stride instead of a function. "
          f"Received: {sampler.label!r}, which takes {sampler.num_steps}")
  return samplers


def _full_chains(denoiser, variances, num_steps):
  """DDPM at many steps with each variance, made before anything is measured.

  Raises:
    UserError: K is out of range, or the network predicts no variance.
  """
  if "learned" in variances:
    denoiser.check_variance()
  try:
    return [sampler_lib.full_chain(denoiser.schedule, variance, num_steps)
            for variance in variances]
  except ValueError as error:
    raise UserError(f"compare.full_chain_steps: {error}") from error


def _row_of(sampler):
  """The row and the stride of a solver, as published tables name them."""
  if not isinstance(sampler, sampler_lib.SolverSampler):
    return None
  return sampler.solver, str(sampler.stride)


def _search_of(folder):
  """How the sampler of a folder was searched, from its card."""
  return card.read(os.path.join(folder, run_dir_lib.SAMPLER)).search
