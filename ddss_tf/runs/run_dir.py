"""The run directory: what one run leaves on disk, listed in `FILES`."""

import contextlib
import json
import os
from typing import Iterator, NamedTuple

from absl import logging
import filelock
import gin

from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.errors import UserError

SAMPLER = "sampler.json"
METRICS = "metrics.json"
TABLE = "table"  # With .csv and .md.
REPORT = "report.html"
STARTS = "starts.json"
CONFIG = "config.gin"
SAMPLES_PNG = "samples.png"
SAMPLES_NPZ = "samples.npz"
GENERATED = "generated"  # With .npz and .png.
COEFFICIENTS = "coefficients.png"
PATH = "path.png"
BEFORE_AFTER = "before_after.png"
FID_BY_STEPS = "fid_by_steps.png"
QUALITY_BY_TIME = "quality_by_time.png"
SAMPLES_OVER_K = "samples_over_k.png"
EXPORT = "export"
# Where other forms of the sampler go in a run directory.
ALSO = {"diffusers": "diffusers_scheduler", "onnx": "sampler.onnx",
        "tflite": "sampler.tflite"}
# In the first of these, of a sampler with guidance.
GUIDANCE = "guidance.py"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
CACHE = "cache"
# What a search leaves to look at.
PICTURES = (COEFFICIENTS, PATH, BEFORE_AFTER)
PICTURE_EVENTS = os.path.join(TENSORBOARD, "pictures")


class File(NamedTuple):
  """A file or folder of a run.

  Attributes:
    name: in the run directory.
    note: what it holds, for the list that a command ends with; "" leaves it out
      of that list.
    caption: the caption of a picture, in the report.
  """
  name: str
  note: str = ""
  caption: str = ""


# In the order in which a command lists what it has left.
FILES = (
    File(REPORT, "everything on one page, for a browser"),
    File(f"{TABLE}.csv", "the comparison"),
    File(f"{TABLE}.md"),
    File(SAMPLES_PNG, "best baseline beside the searched sampler, same noise",
         "The best baseline beside the searched sampler, on the same noise."),
    File(COEFFICIENTS, "the searched sampler, drawn",
         "The sampler's coefficients. Filled markers were found; open ones are "
         "the start."),
    File(SAMPLER, "the searched sampler, portable"),
    File(METRICS, "all figures"),
    File(EXPORT, "SavedModel"),
    File(ALSO["diffusers"], "the sampler as a scheduler of diffusers"),
    File(ALSO["onnx"], "sampler and network for ONNX Runtime"),
    File(ALSO["tflite"], "sampler and network for TensorFlow Lite"),
    File(TENSORBOARD, "tensorboard --logdir={path}"),
    File(FID_BY_STEPS, caption="Distance to the data set of each sampler; lower "
         "is better."),
    File(QUALITY_BY_TIME,
         caption="The same against the time that an image takes."),
    File(SAMPLES_OVER_K, caption="The best row of each group at every K, on the "
         "same noise."),
    File(f"{GENERATED}.png", caption="Samples of the searched sampler."),
    File(f"{GENERATED}.npz"),
    File(PATH, caption="One image on its way: the states, clipped to [-1, 1], "
         "and the image predicted from each."),
    File(BEFORE_AFTER, caption="Samples of the start and of the found sampler, "
         "on the same noise."),
    File(SAMPLES_NPZ),
    File(STARTS),
    File(CONFIG),
    File(CHECKPOINTS),
    File(CACHE),
)
_LOCK = ".lock"


class RunDir:
  """A run directory that can be written to.

  Args:
    root: its path; made if need be. `~` is the home folder, in both paths.
    cache: folder of what can be computed again, which runs may share;
      `root`/cache if None.

  Raises:
    UserError: the directory cannot be made or written to.
  """

  def __init__(self, root: str, cache: str | None = None):
    self.root = root = storage.expanded(root)
    self.cache = storage.expanded(cache) or self.path(CACHE)
    # The folders that are not there yet, the innermost first.
    self._made, folder = [], os.path.abspath(root)
    self._locks = []
    self._locked_first = False  # Whether `lock` made the lock's file.
    if not distribution.is_chief():
      return
    while not storage.lexists(folder):
      self._made.append(folder)
      folder = os.path.dirname(folder)
    try:
      storage.makedirs(root, exist_ok=True)
      # A file is written as a trial, because os.access tells root that it may
      # write even where the file system is read-only.
      with storage.replacing(self.path(".writable")):
        pass
      storage.remove(self.path(".writable"))
    except OSError as error:
      self.withdraw()
      raise UserError(f"run_dir must be a folder that can be written to. "
                      f"Received: {root!r} ({error.strerror})") from error

  def path(self, *parts: str) -> str:
    """A path inside the directory."""
    return os.path.join(self.root, *parts)

  def contents(self) -> str:
    """A line for each file that exists and has a note."""
    return "\n".join(
        f"{self.path(file.name):<40} "
        f"{file.note.format(path=self.path(file.name))}" for file in FILES
        if file.note and storage.exists(self.path(file.name)))

  def lock(self) -> None:
    """Keeps other processes out until `release` or the end of the process.

    The other workers of the same job are not kept out. This process may lock
    several times, and must release as often. If the file system has no locks,
    there is a warning instead.

    Raises:
      UserError: another process is at work in this directory.
    """
    if not distribution.is_chief():
      return
    path = os.path.realpath(self.path(_LOCK))
    while True:
      is_new = not storage.exists(path)
      lock = filelock.FileLock(
          path, timeout=0, is_singleton=True, thread_local=False)
      try:
        lock.acquire()
      except filelock.Timeout as error:
        raise UserError(
            f"run_dir {self.root!r} is in use by another process") from error
      except OSError as error:
        logging.warning(
            "run_dir %r cannot be locked (%s): give it to one command at a "
            "time", self.root, error.strerror or repr(error))
        if is_new and storage.exists(path):
          storage.remove(path)
        return
      if storage.exists(path):
        break
      # Another process's `withdraw` has removed the file, so that this lock
      # keeps nobody out.
      lock.release()
    self._locks.append(lock)
    self._locked_first = self._locked_first or is_new

  def release(self) -> None:
    """Takes back one `lock`; after the last, other processes may come in."""
    if self._locks:
      self._locks.pop().release()

  @contextlib.contextmanager
  def locked(self) -> Iterator["RunDir"]:
    """Locks the directory for the length of a `with` block, and gives it."""
    self.lock()
    try:
      yield self
    finally:
      self.release()

  def withdraw(self) -> None:
    """Removes what constructor and lock made, but no folder that holds more.

    It must be called before `release`.
    """
    if self._locked_first and self._locks:
      storage.remove(self.path(_LOCK))
      self._locked_first = False
    with contextlib.suppress(OSError):  # A folder holds more, and stays.
      for folder in self._made:
        if storage.isdir(folder):
          storage.rmdir(folder)

  def remove(self, *paths: str) -> None:
    """Removes those of these files and folders inside that exist."""
    for path in map(self.path, paths if distribution.is_chief() else ()):
      if storage.isdir(path):
        storage.remove_tree(path)
      elif storage.exists(path):
        storage.remove(path)

  def keep_config(self) -> None:
    """Writes `config.gin`, once a stage has accepted its arguments."""
    text = gin.config_str()
    if text:
      storage.write_text(self.path(CONFIG), text)

  def check(self, stage: str, identity: dict, restart: bool = False,
            open_to: dict[str, list] | None = None) -> bool:
    """Checks that no other configuration of a stage has the directory.

    Args:
      stage: the stage's name.
      identity: what decides its result, as far as it is known; JSON.
      restart: accept another configuration, which `claim` will delete.
      open_to: lists of values, JSON and not empty, by their names in the
        identity. The stage has yet to choose one of each.

    Returns:
      Whether the directory belongs to another configuration.

    Raises:
      UserError: it does, and `restart` is not set. The message names the
        differences.
    """
    path = self._claim_path(stage)
    if not storage.exists(path):
      return False
    identity, open_to = (
        json.loads(json.dumps(values, default=storage.plain))
        for values in (identity, open_to or {}))
    before = self.claimed(stage)
    differences = [
        _difference(key, before.get(key), [identity[key]])
        for key in sorted(identity) if before.get(key) != identity[key]]
    differences += [
        _difference(key, before.get(key), values)
        for key, values in open_to.items() if before.get(key) not in values]
    if differences and not restart:
      sampler = self.path(SAMPLER)
      advice = (f", with init = {sampler!r} to begin at the sampler that was "
                "found" if storage.exists(sampler) else "")
      raise UserError(
          f"run_dir {self.root!r} holds a {stage} with "
          f"{'; '.join(differences)}. Use another run_dir{advice}, delete this "
          f"one, or bind {stage}.restart = True")
    return bool(differences)

  def claimed(self, stage: str) -> dict:
    """The configuration of a stage that the directory is tied to; {} if none.

    Raises:
      UserError: the file is damaged.
    """
    path = self._claim_path(stage)
    if not storage.exists(path):
      return {}
    try:
      return dict(storage.read_json(path))
    except (ValueError, TypeError) as error:
      raise UserError(f"{path} is damaged: {error}. Use another run_dir, or "
                      "delete this one") from error

  def claim(self, stage: str, identity: dict, restart: bool = False,
            results: tuple[str, ...] = (), earlier: dict | None = None) -> None:
    """Ties the directory to one configuration of a stage.

    Args:
      stage: the stage's name.
      identity: all that decides its result; JSON.
      restart: delete the checkpoints and results of another configuration,
        instead of refusing.
      results: paths, inside the directory, of what the stage leaves.
      earlier: the configuration that the directory may have instead, because
        this one goes on from it.

    Raises:
      UserError: the directory belongs to another configuration, and `restart`
        is not set. The message names the differences.
    """
    claim = self._claim_path(stage)
    if self.check(stage, earlier or identity, restart) and (
        distribution.is_chief()):
      # The other claim stays till the last. If the process is killed in
      # between, what is left must not pass for the new configuration's.
      folder, kept = os.path.split(claim)
      names = sorted(set(storage.listdir(folder)) - {kept})
      self.remove(*(os.path.join(CHECKPOINTS, name) for name in names),
                  *results)
    storage.write_json(claim, identity)

  def _claim_path(self, stage):
    return self.path(CHECKPOINTS, f"{stage}.json")


def _difference(name: str, before, values: list) -> str:
  """What two configurations have different, of dicts only what differs in them.

  Args:
    name: the name of the value.
    before: what the directory has.
    values: what was given, one or several that are possible; the one that is
      nearest is shown.
  """
  others = f", or one of {len(values) - 1} others" if values[1:] else ""
  if isinstance(before, dict) and all(isinstance(v, dict) for v in values):
    value = min(values, key=lambda value: len(_unlike(value, before)))
    names = sorted(_unlike(value, before))
    # Hashes tell people nothing where names differ as well.
    names = [key for key in names if not key.endswith("sha256")] or names
    before, value = ({key: each[key] for key in names if key in each}
                     for each in (before, value))
  else:
    value = values[0]
  return f"another {name}: {before}. Received: {value}{others}"


def _unlike(one: dict, other: dict) -> set:
  """The names whose values differ."""
  return {key for key in {*one, *other} if key not in one or key not in other
          or one[key] != other[key]}
