"""All access to files: the one module that opens, lists and removes them.

Files and folders that are written appear whole or not at all (`replacing`,
`replacing_folder`). The other functions do what those of the same name in `os`,
`os.path`, `shutil` and `glob` do. Paths that are not local can come here, and
nowhere else. Readers of libraries (h5py, Pillow, Keras, TensorFlow) get paths.
"""

import builtins
import contextlib
import glob as glob_lib
import json
import os
import shutil
import tempfile
from typing import IO, Iterator, Mapping

import numpy as np

from ddss_tf.errors import UserError


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Gives a temporary path beside `path` that takes its place on success.

  On any exception, a full disk among them, the temporary file goes and what
  was at `path` stays. Of several worker processes the chief alone writes; what
  the others write goes nowhere.

  Args:
    path: the final path; its folder is made if need be.

  Yields:
    A path with the same ending, in the same folder.
  """
  # Imported late: it needs TensorFlow, which takes seconds to import.
  from ddss_tf import distribution  # pylint: disable=g-import-not-at-top
  folder, name = os.path.split(os.path.abspath(path))
  if not distribution.is_chief():
    with tempfile.TemporaryDirectory() as nowhere:
      yield os.path.join(nowhere, name)
    return
  os.makedirs(folder, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=name)
  os.close(handle)
  try:
    yield temporary
    # mkstemp makes files that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  except OSError as error:  # A failed write does not say of what.
    raise OSError(
        error.errno, error.strerror or str(error), path) from error
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)


@contextlib.contextmanager
def replacing_folder(path: str) -> Iterator[str]:
  """Gives a temporary folder beside `path` that takes its place on success.

  Args:
    path: the final path; what is there goes only then.

  Yields:
    Path of an empty folder, beside it.
  """
  parent, name = os.path.split(os.path.abspath(path))
  os.makedirs(parent, exist_ok=True)
  temporary = tempfile.mkdtemp(dir=parent, prefix=f".{name}-")
  try:
    yield temporary
    os.chmod(temporary, 0o755)
    if os.path.exists(path):
      shutil.rmtree(path)
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str, text: str) -> None:
  """Writes a text file atomically: UTF-8 with "\\n", whatever the locale."""
  with replacing(path) as temporary:
    # Python has halves of characters where a file name is not valid text.
    with builtins.open(temporary, "w", encoding="utf-8", newline="\n",
              errors="backslashreplace") as f:
      f.write(text)


def plain(value):
  """A NumPy number or array as JSON has it; `json.dumps`' default."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is no JSON")


def write_json(path: str, value) -> None:
  """Writes JSON atomically, readable; NaN is an error, not invalid JSON."""
  write_text(path, json.dumps(
      value, indent=1, allow_nan=False, default=plain) + "\n")


def read_json(path: str):
  """Reads JSON as the editors of any system save it.

  In UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

  Raises:
    OSError: it cannot be read.
    ValueError: it is not JSON.
  """
  with builtins.open(path, "rb") as f:
    try:
      return json.loads(f.read())
    except RecursionError as error:
      raise ValueError("it is nested too deeply") from error


def expanded(path):
  """A path with the home folder that `~` or `~user` at its start stands for.

  Shells do that for some words only: not after the "=" of a flag, nor inside
  of a binding.

  Args:
    path: as it was given. A value that is not a path is given back, and others
      refuse it.

  Returns:
    The path, as text.

  Raises:
    UserError: nobody knows that home folder, and there is no such file either.
  """
  if isinstance(path, os.PathLike):
    path = os.fspath(path)
  if not isinstance(path, str) or not path.startswith("~"):
    return path
  found = os.path.expanduser(path)
  if found.startswith("~") and not os.path.exists(path):
    raise UserError(f"the home folder of {path.split(os.sep)[0]} must be known "
                    f"(HOME, or the user's entry). Received: {path!r}")
  return found


def read_text(path: str) -> str:
  """The content of a text file in UTF-8."""
  with builtins.open(path, encoding="utf-8") as f:
    return f.read()


def open(path: str, mode: str = "r", **options) -> IO:  # pylint: disable=redefined-builtin
  """Opens a file."""
  return builtins.open(path, mode, **options)


def load_arrays(path: str):
  """Opens an npy or npz file of NumPy that holds no Python objects."""
  return np.load(path, allow_pickle=False)


def save_arrays(path: str, arrays: Mapping[str, object],
                compressed: bool = False) -> None:
  """Writes an npz file that takes the place of what was at `path`.

  Args:
    path: the file.
    arrays: what it holds, by name.
    compressed: smaller, but slower to write and to read.
  """
  save = np.savez_compressed if compressed else np.savez
  with replacing(path) as temporary:
    with open(temporary, "wb") as file:
      save(file, **arrays)


def exists(path: str) -> bool:
  """Whether there is a file or a folder."""
  return os.path.exists(path)


def lexists(path: str) -> bool:
  """Whether there is a file, a folder or a link, one that leads nowhere too."""
  return os.path.lexists(path)


def isfile(path: str) -> bool:
  """Whether there is a file."""
  return os.path.isfile(path)


def isdir(path: str) -> bool:
  """Whether there is a folder."""
  return os.path.isdir(path)


def size(path: str) -> int:
  """Bytes of a file."""
  return os.path.getsize(path)


def listdir(path: str) -> list[str]:
  """Names in a folder, in no order."""
  return os.listdir(path)


def scandir(path: str):
  """Entries of a folder, see `os.scandir`."""
  return os.scandir(path)


def walk(path: str, **options) -> Iterator[tuple[str, list[str], list[str]]]:
  """Folders below a folder, see `os.walk`."""
  return os.walk(path, **options)


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern."""
  return glob_lib.glob(pattern)


def makedirs(path: str, exist_ok: bool = False) -> None:
  """Makes a folder and those above it."""
  os.makedirs(path, exist_ok=exist_ok)


def rename(path: str, new: str) -> None:
  """Moves a file or a folder, in the place of what is there."""
  os.replace(path, new)


def copy(path: str, new: str) -> None:
  """Copies a file."""
  shutil.copy(path, new)


def remove(path: str) -> None:
  """Removes a file."""
  os.remove(path)


def rmdir(path: str) -> None:
  """Removes a folder that is empty."""
  os.rmdir(path)


def remove_tree(path: str, ignore_errors: bool = False) -> None:
  """Removes a folder and all in it."""
  shutil.rmtree(path, ignore_errors=ignore_errors)


def truncate(path: str, length: int) -> None:
  """Cuts a file off."""
  os.truncate(path, length)
