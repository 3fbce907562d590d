"""What tests look at in the folder of a run."""

import fcntl


def is_locked(path) -> bool:
  """Whether another process would find the lock file at `path` locked."""
  with open(path, "w", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False
