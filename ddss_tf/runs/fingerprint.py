"""What results, caches and cards are identified by: hashes of contents, and definitions."""

import hashlib
from typing import Iterable

import numpy as np


def arrays_sha256(arrays: Iterable[np.ndarray]) -> str:
  """SHA-256 over dtype, shape and little-endian bytes of arrays, in order.

  The file format that the arrays came in has no influence.
  """
  digest = hashlib.sha256()
  for array in arrays:
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest.update(f"{array.dtype.name}{array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def coefficients_sha256(coefficients) -> str:
  """`arrays_sha256` of the arrays of `Coefficients`."""
  return arrays_sha256(coefficients.arrays().values())


def definition(code) -> tuple[str, str]:
  """Module and name of a class or function.

  A module that is imported again defines its classes and functions anew; their
  definitions are equal.
  """
  return code.__module__, code.__qualname__


def text_sha256(text: str) -> str:
  """SHA-256 of a text in UTF-8."""
  return hashlib.sha256(text.encode()).hexdigest()
