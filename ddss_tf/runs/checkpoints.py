"""Checkpoints of long work, and the TensorBoard events that go with them.

A run that was killed is resumed from its last checkpoint as if nothing had
happened. Its state and the seconds it took are restored. Events after the
checkpoint are taken back, because the run writes them again.
"""

import contextlib
import glob
import os
import re

from absl import logging
import tensorflow as tf

from ddss_tf import distribution
from ddss_tf import storage
from ddss_tf.errors import UserError

_EVENTS = ".search"  # The ending of event files that belong to checkpoints.
_KEPT = 3


class Checkpoints:
  """The checkpoints of a run, and the events up to each.

  Args:
    checkpoint: the state.
    folder: the folder of the checkpoints.
    events: folder of the TensorBoard events.

  Attributes:
    seconds: seconds that the work took up to the restored checkpoint.
    latest: path of the newest good checkpoint; None before the first.
  """

  def __init__(self, checkpoint: tf.train.Checkpoint, folder: str,
               events: str):
    self._checkpoint = checkpoint
    # TensorFlow makes the counter at its first use, which needs all workers.
    self._counter = checkpoint.save_counter
    self._folder = folder
    self._events = events
    self._manager = None
    self.seconds = 0.0
    self.latest = None

  def restore(self) -> None:
    """Restores the state of the newest checkpoint that can be read.

    Damaged ones are renamed, with a warning. Without a checkpoint the state
    stays as it is.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    found = self._restore() if distribution.is_chief() else None
    step = int(distribution.everyones(-1 if found is None else found)[0])
    if step >= 0:
      self.latest = self._path(step)
    if step >= 0 and not distribution.is_chief():
      self._checkpoint.restore(self.latest).assert_consumed()

  def _restore(self):
    """Does what `restore` says; gives the step, None without a checkpoint."""
    damaged, found = {}, None  # What is wrong, by the path of a checkpoint.
    for step in sorted(self._steps(), reverse=True):
      path = self._path(step)
      try:
        self._checkpoint.restore(path).assert_consumed()
      except Exception as error:  # TensorFlow raises many kinds.
        damaged[path] = " ".join(str(error).split())[:200]
        continue
      found = step
      break
    # TensorFlow writes this list last. Without it the first checkpoint was not
    # finished.
    begun = storage.exists(os.path.join(self._folder, "checkpoint"))
    if damaged and found is None and begun:
      raise UserError("checkpoints must be readable; delete the run_dir to "
                      f"begin anew. Received: {', '.join(damaged)} "
                      f"({next(iter(damaged.values()))})")
    for path, reason in damaged.items():
      logging.warning("checkpoint %s is damaged (%s): going on from the one "
                      "before", path, reason)
    for path in self._begun():
      storage.remove_tree(path, ignore_errors=True)
    for path in damaged:
      storage.rename(f"{path}.index", f"{path}.index.damaged")
    notes = {}
    if found is not None:
      with contextlib.suppress(OSError, ValueError):
        notes = storage.read_json(f"{self._path(found)}.json")
      self.seconds = notes.get("seconds", 0.0)
    if found is None or notes:
      self._take_back_events(notes.get("events", {}))
    return found

  def writer(self):
    """A TensorBoard writer whose events are taken back by `restore`."""
    if not distribution.is_chief():
      return tf.summary.create_noop_writer()
    return tf.summary.create_file_writer(self._events, filename_suffix=_EVENTS)

  def save(self, step: int, seconds: float) -> None:
    """Saves the state, and which events came before it.

    Args:
      step: the number of the checkpoint.
      seconds: seconds that the work took so far.

    Raises:
      UserError: the disk is full or cannot be written to. Earlier checkpoints
        are as they were.
    """
    if not distribution.is_chief():
      self.latest = self._path(step)
      return
    try:
      self._save(step, seconds)
    except (OSError, tf.errors.OpError) as error:
      # An unfinished checkpoint must not stay, or it fills the disk for good.
      for path in self._begun():
        storage.remove_tree(path, ignore_errors=True)
      raise UserError(
          f"checkpoint {self._path(step)} cannot be written: "
          f"{' '.join(str(error).split())[:200]}; the last good one is "
          f"{self.latest}") from error

  def _save(self, step, seconds):
    tf.summary.flush()
    # Written before the checkpoint, so that no checkpoint is without it.
    storage.write_json(f"{self._path(step)}.json", {
        "seconds": seconds,
        "events": {os.path.basename(path): storage.size(path)
                   for path in self._event_files()}})
    if self._manager is None:
      self._manager = tf.train.CheckpointManager(
          self._checkpoint, self._folder, max_to_keep=_KEPT)
    self.latest = self._manager.save(checkpoint_number=step)
    kept = self._steps()
    for path in storage.glob(os.path.join(glob.escape(self._folder),
                                       "ckpt-*.json")):
      if int(re.search(r"-(\d+)\.json$", path)[1]) not in kept:
        storage.remove(path)

  def _begun(self):
    """Folders of checkpoints that were not finished."""
    return storage.glob(os.path.join(glob.escape(self._folder), "ckpt-*_temp*"))

  def _path(self, step):
    return os.path.join(self._folder, f"ckpt-{step}")

  def _steps(self):
    """Steps of the checkpoints on disk.

    The files are looked at, because TensorFlow's own list may be damaged.
    """
    found = (re.fullmatch(r"ckpt-(\d+)\.index", name)
             for name in (storage.listdir(self._folder)
                          if storage.isdir(self._folder) else ()))
    return [int(match[1]) for match in found if match]

  def _event_files(self):
    return storage.glob(os.path.join(glob.escape(self._events), f"*{_EVENTS}"))

  def _take_back_events(self, sizes):
    """Cuts the event files to the sizes they had at a checkpoint.

    A file that did not exist then is removed.
    """
    for path in self._event_files():
      size = sizes.get(os.path.basename(path), 0)
      if size:
        storage.truncate(path, size)
      else:
        storage.remove(path)
