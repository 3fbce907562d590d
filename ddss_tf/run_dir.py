"""The run directory: what one run leaves on disk.

  config.gin          the bindings of the last command
  checkpoints/        of the search
  tensorboard/        events
  cache/              features of the real images
  sampler.json        the found coefficients, portable
  samples.png         of the evaluation
  coefficients.png, path.png, before_after.png
                      the found sampler
  metrics.json        a list of records, one for each sampler
  report.html         all of it on one page
  export/             SavedModel
"""

import fcntl
import json
import os
import shutil

from ddss_tf import card
from ddss_tf import storage
from ddss_tf.errors import UserError


class RunDir:
  """A usable run directory.

  Args:
    root: its path; made if need be.
    cache: folder of what can be computed again, which runs may share;
      `root`/cache if None.

  Raises:
    UserError: it cannot be made or written to.
  """

  def __init__(self, root: str, cache: str | None = None):
    self.root = root
    self.cache = cache or self.path("cache")
    try:
      os.makedirs(root, exist_ok=True)
      # Tried, not asked: os.access says yes to root on read-only systems.
      with storage.replacing(self.path(".writable")):
        pass
      os.remove(self.path(".writable"))
    except OSError as error:
      raise UserError(f"run_dir must be a folder that can be written to. "
                      f"Received: {root!r} ({error.strerror})") from error
    self._lock = None

  def path(self, *parts: str) -> str:
    """A path inside."""
    return os.path.join(self.root, *parts)

  def lock(self) -> None:
    """Keeps other processes out until this one ends, however it ends.

    Raises:
      UserError: another process is at work here.
    """
    self._lock = open(self.path(".lock"), "w")  # Held open on purpose.
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
          f"run_dir {self.root!r} is in use by another process") from error

  def claim(self, stage: str, identity: dict, restart: bool = False) -> None:
    """Ties the directory to one configuration of a stage.

    Args:
      stage: its name.
      identity: all that decides its result; JSON.
      restart: delete what another configuration left instead of refusing.

    Raises:
      UserError: the directory belongs to another; names the differences.
    """
    path = self.path("checkpoints", f"{stage}.json")
    identity = json.loads(json.dumps(identity))
    if os.path.exists(path):
      try:
        with open(path) as f:
          before = dict(json.load(f))
      except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Use another run_dir, or "
                        "delete this one") from error
      differences = [
          f"another {key}: {before.get(key)}. Received: {identity.get(key)}"
          for key in sorted(set(before) | set(identity))
          if before.get(key) != identity.get(key)]
      if differences and not restart:
        raise UserError(
            f"run_dir {self.root!r} holds a {stage} with "
            f"{'; '.join(differences)}. Use another run_dir, delete this one, "
            f"or bind {stage}.restart = True")
      if differences:
        shutil.rmtree(self.path("checkpoints"))
        if os.path.exists(self.path(card.FILE)):
          os.remove(self.path(card.FILE))
    storage.write_json(path, identity)
