"""Content hashes, by which results, caches and cards are identified."""

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


def text_sha256(text: str) -> str:
  """SHA-256 of a text in UTF-8."""
  return hashlib.sha256(text.encode()).hexdigest()
