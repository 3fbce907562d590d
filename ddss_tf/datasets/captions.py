"""Captions of a folder's images: a text file beside each, or one file for all."""

import json
import os
import pathlib
from typing import Sequence

from ddss_tf import errors
from ddss_tf import storage
from ddss_tf.errors import UserError

SUFFIX = ".txt"
# Files with a line for each image. The second is that of Hugging Face's
# imagefolder, which may tell other things of the images than a caption.
LISTS = ("captions.jsonl", "metadata.jsonl")
# The keys of a line, in our files and in those of Hugging Face.
_FILE, _CAPTION = ("file", "file_name"), ("caption", "text")

Parts = tuple[str, ...]  # The names of a path below the folder.


def read(folder: pathlib.Path, images: Sequence[Parts],
         texts: Sequence[Parts]) -> tuple[str, ...] | None:
  """The captions of a folder's images.

  They lie in `captions.jsonl` or `metadata.jsonl`, a JSON object a line with a
  file below the folder ("file" or "file_name", with "/" between names) and its
  caption ("caption" or "text"); or in a text file beside each image that has
  its name but for the suffix, `.txt`. All are UTF-8. White space at both ends
  of a caption does not count.

  A folder in which no text file has an image's name has no captions; nor does
  a `metadata.jsonl` without any "caption" or "text".

  Args:
    folder: the folder.
    images: its images, in order.
    texts: its text files.

  Returns:
    A caption for each image, in order; None if there are none.

  Raises:
    UserError: in one line, a file or a line that is damaged; an image without a
      caption or with two; a caption that is empty, or of no image; or captions
      of both kinds.
  """
  found = {}
  for name in LISTS:
    path = str(folder / name)
    if storage.isfile(path):
      listed = _listed(path, name, set(images))
      if listed is not None:
        found[name] = listed
  stems = {_stem(parts) for parts in images}
  if any(_stem(parts) in stems for parts in texts):
    found[f"*{SUFFIX}"] = None  # They need not be read to be refused.
  if len(found) > 1:
    raise UserError(f"folder {str(folder)!r} must have its captions in one kind of "
                    f"file. Received: {' and '.join(found)}")
  if not found:
    return None
  ((kind, captions),) = found.items()
  if captions is None:
    captions = _beside(folder, images, texts)
  missing = [parts for parts in images if parts not in captions]
  if missing:
    raise UserError(
        f"folder {str(folder)!r} must have a caption for each of {len(images)} "
        f"images. Received: {len(images) - len(missing)} in {kind}, none of them of "
        f"{os.path.join(*missing[0])!r}")
  return tuple(captions[parts] for parts in images)


def _stem(parts: Parts) -> Parts:
  return *parts[:-1], os.path.splitext(parts[-1])[0]


def _beside(folder, images, texts) -> dict[Parts, str]:
  """The captions in text files, by image."""
  of_stem = {_stem(parts): folder.joinpath(*parts) for parts in texts}
  extra = set(of_stem) - {_stem(parts) for parts in images}
  if extra:
    raise UserError(
        f"a {SUFFIX} file of captioned images must have the name of one of them. "
        f"Received: {str(of_stem[min(extra)])!r}, and no image of that name")
  return {parts: _checked(_text(str(of_stem[_stem(parts)])), of_stem[_stem(parts)])
          for parts in images if _stem(parts) in of_stem}


def _listed(path: str, name: str, images: set[Parts]) -> dict[Parts, str] | None:
  """The captions in a file of lines, by image; None if it is of other things."""
  lines = []
  for number, text in enumerate(_text(path).split("\n"), start=1):
    if not text.strip():
      continue
    place = f"line {number} of {path}"
    try:
      line = json.loads(text)
      if not isinstance(line, dict):
        raise ValueError(f"a {type(line).__name__}")
    except (ValueError, RecursionError) as error:
      raise UserError(f"{place} must be a JSON object. Received: {text[:80]!r} "
                      f"({errors.one_line(error)})") from error
    lines.append((place, line))
  if name != LISTS[0] and not any(key in line for _, line in lines
                                  for key in _CAPTION):
    return None
  captions = {}
  for place, line in lines:
    file, caption = (_value(place, line, keys) for keys in (_FILE, _CAPTION))
    parts = pathlib.PurePosixPath(file).parts
    if parts not in images:
      raise UserError(f"{place} must be of an image in its folder. "
                      f"Received: {file!r}, which is not among {len(images)}")
    if parts in captions:
      raise UserError(f"{path} must have one caption for each image. Received: "
                      f"another of {file!r} in {place}")
    captions[parts] = _checked(caption, place)
  return captions


def _value(place, line, keys) -> str:
  """The text that a line has under one of these keys."""
  values = [line[key] for key in keys if key in line]
  if len(values) != 1 or not isinstance(values[0], str):
    raise UserError(f"{place} must have a text as {' or '.join(map(repr, keys))}. "
                    f"Received: {json.dumps(line)[:80]}")
  return values[0]


def _checked(caption: str, place) -> str:
  """A caption without white space at its ends."""
  caption = caption.strip()
  try:
    caption.encode()  # JSON can hold what is no text: half a character.
  except UnicodeEncodeError as error:
    raise UserError(f"the caption in {place} must be text. Received: {caption!r}"
                    ) from error
  if not caption:
    raise UserError(f"the caption in {place} must not be empty. Received: nothing")
  return caption


def _text(path: str) -> str:
  """The content of a file in UTF-8, with a byte order mark or without."""
  try:
    with storage.open(path, encoding="utf-8-sig") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"captions in {path} must be readable, in UTF-8. Received: "
                    f"{errors.one_line(error)}") from error
