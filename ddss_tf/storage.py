"""All access to files: the one module that opens, lists and removes them.

Files and folders that are written appear whole or not at all (`replacing`,
`replacing_folder`). Most other functions do what those of the same name in
`os`, `os.path`, `shutil` and `glob` do. Support of paths that are not local
would be added here, and nowhere else. Libraries that read files themselves
(h5py, Pillow, Keras, TensorFlow) get paths.
"""

import builtins
import contextlib
import glob as glob_lib
import json
import os
import shutil
import tempfile
from typing import IO, Iterator, Mapping
import zipfile
import zlib

import numpy as np

from ddss_tf import errors
from ddss_tf.errors import UserError

WORLDS_VARIABLE = "DDSS_TF_WORLDS"
_WORLDS = "worlds:"


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Gives a temporary path beside `path` whose file takes its place on success.

  On any exception, such as a full disk, the temporary file is removed and what
  was at `path` stays. If there are several worker processes, only the chief's
  file is kept.

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
  except OSError as error:  # The error of a failed write has no path.
    raise OSError(
        error.errno, error.strerror or str(error), path) from error
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)


@contextlib.contextmanager
def replacing_folder(path: str) -> Iterator[str]:
  """Gives a temporary folder beside `path` that takes its place on success.

  Args:
    path: the final path; what is there is removed on success only.

  Yields:
    Path of an empty folder in the same folder.
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
    # File names that are not valid text hold lone surrogates in Python, which
    # UTF-8 cannot encode.
    with builtins.open(temporary, "w", encoding="utf-8", newline="\n",
              errors="backslashreplace") as f:
      f.write(text)


def plain(value):
  """A NumPy number or array as Python's; the `default` of `json.dumps`."""
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is no JSON")


def write_json(path: str, value) -> None:
  """Writes indented JSON atomically.

  Raises:
    ValueError: the value holds NaN or infinity, which JSON lacks.
  """
  write_text(path, json.dumps(
      value, indent=1, allow_nan=False, default=plain) + "\n")


def read_json(path: str):
  """Reads JSON as the editors of any system save it.

  It may be in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not JSON.
  """
  with builtins.open(path, "rb") as f:
    try:
      return json.loads(f.read())
    except RecursionError as error:
      raise ValueError("it is nested too deeply") from error


def found(path: str) -> str:
  """Path of a file of ours; in the package if the path leads nowhere.

  The package has `gin_configs` once it is installed; in a checkout they stand
  beside it.

  Args:
    path: a path, such as `gin_configs/demo.gin`.

  Returns:
    The path as `expanded` gives it, or the path of the package's own file.
  """
  path = expanded(path)
  package = os.path.dirname(os.path.abspath(__file__))
  ours = (os.path.join(folder, path)
          for folder in (package, os.path.dirname(package)))
  return path if isfile(path) else next(filter(isfile, ours), path)


def _of_world(path: str) -> str:
  """The path of what "worlds:NAME" names; see `expanded`."""
  folder = os.getenv(WORLDS_VARIABLE) or os.path.join(
      os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "worlds")
  found = os.path.join(os.path.expanduser(folder), path.removeprefix(_WORLDS))
  if not os.path.exists(found):
    raise UserError(
        f"{path} must be in the folder worlds, which a checkout of ddss_tf has and "
        f"its wheel has not: set {WORLDS_VARIABLE} to it. Received: nothing at "
        f"{found}")
  return found


def expanded(path):
  """A path in which a `~` or `~user` at the start is the home folder.

  Shells replace it in some places only, not after the "=" of a flag nor inside
  a gin binding. A path that starts with "worlds:" leads into the folder of data
  and models that stands beside the package in a checkout, or into the folder
  that the variable DDSS_TF_WORLDS names.

  Args:
    path: as it was given. A value that is not a path is given back, for the
      caller to refuse.

  Returns:
    The path, as text.

  Raises:
    UserError: the home folder is not known, and there is no file of that name;
      or nothing is at a path into the worlds.
  """
  if isinstance(path, os.PathLike):
    path = os.fspath(path)
  if isinstance(path, str) and path.startswith(_WORLDS):
    return _of_world(path)
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


def read_arrays(path: str) -> dict[str, np.ndarray]:
  """Reads all arrays of an npz file, by name and in its order.

  Raises:
    ValueError: there is no such file, it is damaged or of another kind, or it
      holds Python objects.
  """
  try:
    with load_arrays(path) as archive:
      return {name: archive[name] for name in archive.files}
  # What is no archive is one array, or raises what its first bytes suggest.
  except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError,
          NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(errors.one_line(error)) from error


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
  """Whether there is a file, a folder or a link, even a broken link."""
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
  """Names in a folder, in no particular order."""
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
  """Makes a folder, and those above it that are missing."""
  os.makedirs(path, exist_ok=exist_ok)


def rename(path: str, new: str) -> None:
  """Moves a file or a folder, and replaces a file at the new path."""
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
  """Cuts a file off after `length` bytes."""
  os.truncate(path, length)
