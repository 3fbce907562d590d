"""The zoo: found samplers as files with their figures, to use without a search.

A zoo is a folder of cards, `<name>.json`. A card is a `sampler.json` that also
has the records of its evaluation. It names the model (by the hash of its
weights), K and family, figures and their protocol, and the sampler's origin.
One zoo comes with the package. In every path here `~` is the home folder.
"""

import datetime
import os

from absl import logging
import tabulate

from ddss_tf import storage
from ddss_tf import version
from ddss_tf.runs import records as records_lib
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card as card_lib
from ddss_tf.denoisers.denoiser import Denoiser
from ddss_tf.errors import UserError
from ddss_tf.samplers.card import SamplerCard
from ddss_tf.samplers.sampler import FixedSampler

FOLDER, find = card_lib.FOLDER, card_lib.find
SAMPLER = run_dir_lib.SAMPLER


def list_cards(folder: str | None = None) -> dict[str, SamplerCard]:
  """All samplers of a zoo, by name.

  Args:
    folder: the folder of the cards; None: those that come with the package.

  Returns:
    The cards, in the order of their names.

  Raises:
    UserError: there is no such folder, or a card is damaged.
  """
  folder = storage.expanded(folder) or FOLDER
  if not storage.isdir(folder):
    raise UserError(f"zoo must be a folder of cards. Received: {folder!r}")
  return {name: card_lib.read(os.path.join(folder, name + card_lib.SUFFIX))
          for name in card_lib.names(folder)}


def short_name(sampler: str) -> str:
  """What tells a card from others of its family, a word for tables.

  A `sampler.json` is named by its folder, any other card by its file.

  Args:
    sampler: its path, or its name in the zoo.
  """
  folder, name = os.path.split(sampler)
  return os.path.basename(folder) if name == SAMPLER and folder else (
      name.removesuffix(card_lib.SUFFIX))


def load(sampler: str, folder: str | None = None) -> SamplerCard:
  """A sampler by its name, or by the path of its card; see `find`."""
  return card_lib.read(find(sampler, folder))


def add(run_dir: str, folder: str, name: str | None = None,
        metrics: str | None = None, note: str = "") -> str:
  """Publishes the sampler of a run, with its figures, in a zoo.

  Args:
    run_dir: folder of the run, with `sampler.json`.
    folder: the folder of the zoo; made if need be.
    name: the name of the card; None: `<denoiser>-k<K>-<family>`.
    metrics: the file with its records; None: `metrics.json` of the run.
    note: what a reader should know.

  Returns:
    Path of the card.

  Raises:
    UserError: there is no sampler or no record of its coefficients, or the name
      cannot be that of a file.
  """
  run_dir, folder, metrics = map(storage.expanded, (run_dir, folder, metrics))
  card = card_lib.read(os.path.join(run_dir, run_dir_lib.SAMPLER))
  metrics = metrics or os.path.join(run_dir, run_dir_lib.METRICS)
  if not storage.exists(metrics):
    raise UserError(f"{metrics} must exist: run --mode=evaluate first")
  records = tuple(
      record for record in records_lib.read_records(metrics)
      if records_lib.is_of(record, card.coefficients_sha256, card.x0_bound,
                           card.denoiser))
  if not records:
    raise UserError(f"{metrics} must have a record of the coefficients in "
                    f"{run_dir}, with SHA-256 {card.coefficients_sha256}: run "
                    "--mode=evaluate first")
  if name is None:
    name = "-".join([card.denoiser["name"], f"k{card.coefficients.num_steps}",
                     card.family or "sampler"])
  if os.path.basename(name) != name or name.startswith("."):
    raise UserError(f"name of a card must be a file name. Received: {name!r}")
  path = os.path.join(folder, name + card_lib.SUFFIX)
  card_lib.write(path, SamplerCard(
      label=card.label, coefficients=card.coefficients, denoiser=card.denoiser,
      search=card.search, x0_bound=card.x0_bound, metrics=records,
      provenance={"ddss_tf": version.__version__,
                  "published": datetime.date.today().isoformat(),
                  **({"note": note} if note else {})}))
  return path


def table(folder: str | None = None) -> str:
  """A zoo as text: one line a sampler, with its first record's figures."""
  head = ("name", "model", "sha256", "K", "FID", "held-out", "samples")
  rows = []
  for name, listed in list_cards(folder).items():
    record = listed.metrics[0] if listed.metrics else {}
    rows.append((
        name, str(listed.denoiser.get("name")),
        str(listed.denoiser.get("sha256"))[:8], str(listed.coefficients.num_steps),
        records_lib.text(record.get("fid")),
        " / ".join(map(records_lib.text, records_lib.heldout_fids(
            record).values())) or "-",
        str(record.get("num_samples", "-"))))
  text = tabulate.tabulate(
      rows, head, "plain", disable_numparse=True, stralign="left")
  return "\n".join(line.rstrip() for line in text.splitlines())


def drawn_as_searched(run: run_dir_lib.RunDir, denoiser: Denoiser,
                      sampler: str | None = None) -> Denoiser:
  """A denoiser whose classes are drawn as often as in a sampler's search.

  It is for commands that have no data set to tell how often (`sample`, `export`).

  Args:
    run, denoiser, sampler: see `load_searched`.

  Returns:
    This denoiser if it was told frequencies itself, has no classes, or the card
    says nothing.

  Raises:
    UserError: there is no sampler, or its frequencies are not those of the
      network's classes.
  """
  path = _path(run, sampler)
  weights = card_lib.read(path).search.get("label_weights")
  if (weights is None or denoiser.num_classes is None or denoiser.conditions
      or denoiser.told_weights is not None):
    return denoiser
  try:
    return denoiser.with_label_weights(weights)
  except ValueError as error:
    raise UserError(f"{path}: search.label_weights: {error}") from error


def _path(run, sampler):
  return run.path(run_dir_lib.SAMPLER) if sampler is None else find(sampler)


def load_searched(run: run_dir_lib.RunDir, denoiser: Denoiser,
                  sampler: str | None = None, force: bool = False
                  ) -> tuple[FixedSampler, str | None]:
  """The sampler of a run directory or of a card, and its x0_bound.

  Args:
    run: the run directory.
    denoiser: the model that it is to be used with.
    sampler: path of a card, or its name in the zoo; None: what a search left in
      the run directory.
    force: take a card that was found for other weights or another guidance.

  Returns:
    The sampler, and the bound on x0_hat it was found with.

  Raises:
    UserError: there is no sampler, it was found for another model, or its times
      are out of this model's range.
  """
  path = _path(run, sampler)
  found = card_lib.read(path)
  mine = denoiser.identity
  for name in sorted({*found.denoiser, *mine} - {"name"}):
    known, own = found.denoiser.get(name), mine.get(name)
    if known == own:
      continue
    difference = (
        f"{path} was found for the denoiser {found.denoiser.get('name')!r} "
        f"with {name} {known}. Received: {denoiser.name!r} with {own}")
    if not force:
      raise UserError(f"{difference}. Use its own, or bind force = True")
    logging.warning("%s", difference)
  try:
    denoiser.check_guidance(found.coefficients.guidance_scales)
    fixed = FixedSampler(denoiser.schedule, found.coefficients, found.label)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return fixed, found.x0_bound
