"""Tests of image files: Pillow's pixels, links, names, and damaged files."""

import io
import os
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import decoding
from ddss_tf.datasets import load as data
from ddss_tf.datasets import sources
from ddss_tf.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 8, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
ALPHA = RNG.integers(0, 256, (12, 8, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 8), dtype=np.uint16)


def of(array, mode=None):
  image = Image.fromarray(array)
  return image.convert(mode) if mode else image


def encoded(image, suffix, **options):
  buffer = io.BytesIO()
  image.save(buffer, Image.registered_extensions()[suffix], **options)
  return buffer.getvalue()


def palette(**options):
  return encoded(of(COLOUR).quantize(16), ".png", **options)


def film(suffix, mode="RGB", **options):
  frames = [of(RNG.integers(0, 256, (12, 8, 3), dtype=np.uint8), mode)
            for _ in range(3)]
  return encoded(frames[0], suffix, save_all=True, append_images=frames[1:],
                 **options)


# Bytes of a file by its name; the mode that Pillow is asked for.
FILES = {
    "grey.png": (encoded(of(GREY), ".png"), "L"),
    "colour.png": (encoded(of(COLOUR), ".png"), "RGB"),
    "alpha.png": (encoded(of(ALPHA), ".png"), "RGBA"),
    "grey-alpha.png": (encoded(of(ALPHA, "LA"), ".png"), "LA"),
    "bits.png": (encoded(of(GREY, "1"), ".png"), "L"),
    "palette.png": (palette(), "RGB"),
    "transparent-palette.png": (palette(transparency=3), "RGBA"),
    "film.png": (film(".png"), "RGB"),
    "colour.bmp": (encoded(of(COLOUR), ".bmp"), "RGB"),
    "palette.bmp": (encoded(of(COLOUR).quantize(16), ".bmp"), "RGB"),
    "grey.jpg": (encoded(of(GREY), ".jpg", quality=90), "L"),
    "colour.jpeg": (encoded(of(COLOUR), ".jpg", quality=90), "RGB"),
    "progressive.JPG": (
        encoded(of(COLOUR), ".jpg", progressive=True, subsampling=0), "RGB"),
    "cmyk.jpg": (encoded(of(COLOUR, "CMYK"), ".jpg"), "RGB"),
    "colour.webp": (encoded(of(COLOUR), ".webp", lossless=True), "RGB"),
    "film.webp": (film(".webp", lossless=True), "RGB"),
    "alpha-film.webp": (film(".webp", "RGBA", lossless=True), None),
    "still.gif": (encoded(of(COLOUR).quantize(16), ".gif"), "RGB"),
    "film.gif": (film(".gif"), "RGB"),
}


def write(folder, files):
  for name, content in files.items():
    path = os.path.join(str(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
      f.write(content)


def load(folder, **options):
  return data.load_dataset(f"folder:{folder}", **options)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name, tmp_path):
  content, mode = FILES[name]
  write(tmp_path, {name: content})
  image = Image.open(io.BytesIO(content))
  expected = np.asarray(image.convert(mode) if mode else image)
  expected = expected.reshape(12, 8, -1)
  np.testing.assert_array_equal(
      load(tmp_path).images[0], dataset_lib.to_float(expected))


@pytest.mark.parametrize("name", ["film.png", "film.webp", "alpha-film.webp",
                                  "film.gif", "cmyk.jpg", "palette.png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_are_asked_for(name, channels, tmp_path):
  write(tmp_path, {name: FILES[name][0]})
  assert load(tmp_path, channels=channels).images.shape == (1, 12, 8, channels)


def test_sixteen_bits_become_the_nearest_of_eight(tmp_path):
  write(tmp_path, {"deep.png": encoded(of(DEEP), ".png")})
  expected = np.round(DEEP / 257.0).astype(np.uint8)
  np.testing.assert_array_equal(
      load(tmp_path).images[0, ..., 0], dataset_lib.to_float(expected))
  ends = np.array([[0, 65535, 128, 129, 257, 32768]], np.uint16)
  np.testing.assert_array_equal(
      decoding.of_bytes(encoded(of(ends), ".png"))[..., 0],
      [[0, 255, 0, 1, 1, 128]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_rotations_of_exif_are_applied(orientation, suffix, tmp_path):
  image = of(COLOUR)
  exif = Image.Exif()
  exif[274] = orientation
  options = {".jpg": dict(quality=95, subsampling=0),
             ".webp": dict(lossless=True)}.get(suffix, {})
  write(tmp_path, {f"a{suffix}": encoded(image, suffix, exif=exif, **options)})
  a = dataset_lib.to_float(decoding.of_bytes(encoded(image, suffix, **options)))
  # How an upright image follows from what the file has; EXIF 2.3, table 6.
  upright = {
      1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1],
      5: a.transpose(1, 0, 2), 6: np.rot90(a, -1),
      7: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(a)}[orientation]
  np.testing.assert_array_equal(load(tmp_path).images[0], upright)


@pytest.mark.parametrize("linked", [("dogs",), ("cats", "dogs"), ("files",)])
def test_links_are_followed(linked, tmp_path):
  png = FILES["grey.png"][0]
  write(tmp_path, {f"store/{kind}/{i}.png": png
                   for kind, n in (("cats", 5), ("dogs", 3)) for i in range(n)})
  for kind in ("cats", "dogs"):
    source, target = tmp_path / "store" / kind, tmp_path / "set" / kind
    os.makedirs(target.parent, exist_ok=True)
    if kind in linked:
      os.symlink(source, target)
    else:
      os.makedirs(target)
      for file in os.listdir(source):
        if "files" in linked:
          os.symlink(source / file, target / file)
        else:
          os.link(source / file, target / file)
  # A way back does not lead round for ever, and a pipe is not waited for.
  os.symlink(tmp_path / "set", tmp_path / "set" / "cats" / "loop")
  os.mkfifo(tmp_path / "set" / "cats" / "pipe.png")
  found = load(tmp_path / "set")
  assert found.labels.tolist() == [0] * 5 + [1] * 3
  os.symlink(tmp_path / "nothing", tmp_path / "set" / "dogs" / "x.png")
  with pytest.raises(UserError, match="x.png.*link to nothing"):
    load(tmp_path / "set")


@pytest.mark.parametrize("name", [
    "a b.png", "ü漢.png", "[1]*?.png", "line\nbreak.PNG", "%41.png",
    "{0}.png", "a" * 200 + ".png", os.fsdecode(b"latin\xe9.png"),
    "-rf.png", "'quoted\".jpg.png", "$HOME.png", "~.png"])
def test_any_name(name, tmp_path):
  write(tmp_path, {name: FILES["grey.png"][0], ".hidden.png": b"no image"})
  np.testing.assert_array_equal(
      load(tmp_path).images[0, ..., 0], dataset_lib.to_float(GREY))


@pytest.mark.parametrize("content", [
    b"", b"\x89PNG", FILES["grey.png"][0][:-30], FILES["colour.jpeg"][0][:200],
    b"GIF89a", b"BM" + bytes(40), b"not an image at all",
    encoded(of(COLOUR), ".tiff"), b"%PDF-1.4"])
def test_a_bad_file_is_named(content, tmp_path):
  write(tmp_path, {f"{i}.png": FILES["grey.png"][0] for i in range(9)})
  write(tmp_path, {"5 is bad.png": content})
  with pytest.raises(UserError, match="5 is bad.png cannot be read: ") as error:
    load(tmp_path)
  assert "\n" not in str(error.value) and "soon after" not in str(error.value)


def test_a_suffix_need_not_be_right(tmp_path):
  write(tmp_path, {"a.png": FILES["colour.jpeg"][0]})
  expected = np.asarray(Image.open(io.BytesIO(FILES["colour.jpeg"][0])))
  np.testing.assert_array_equal(
      load(tmp_path).images[0], dataset_lib.to_float(expected))


def test_a_bomb_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
  write(tmp_path, {"bomb.png": FILES["grey.png"][0]})  # 96 pixels: a warning.
  with pytest.raises(UserError, match="bomb.png.*DecompressionBomb"):
    load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("home", [
    "/proc/nobody", pytest.param(None, marks=pytest.mark.slow)])
def test_embedded_digits_need_no_home(home, tmp_path):
  """A home that cannot be made, or none: a temporary folder serves."""
  environment = {**os.environ, "TMPDIR": str(tmp_path)}
  environment.pop("HOME", None)
  environment.pop("TFDS_DATA_DIR", None)
  if home:
    environment["HOME"] = home
  else:
    environment["HOME"] = str(tmp_path / "a file")
    (tmp_path / "a file").write_text("")
  run = subprocess.run(
      [sys.executable, "-c", "from ddss_tf.datasets import load as data; print(data.load_dataset"
       "('ddss_digits', pad=2, downsample=2).sha256)"],
      env=environment, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-2000:]
  assert run.stdout.strip().endswith(
      "0fd9b9710e157f7d894a7d2ad2bc361d68e3508e40d8762323f006247b7a1ccc")


def mutated(content, rng):
  """A damaged copy: bits, bytes, lengths, cuts, insertions, swaps."""
  content = bytearray(content)
  kind = rng.integers(6)
  at = int(rng.integers(len(content)))
  if kind == 0:
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
      content[place] ^= 1 << rng.integers(8)
  elif kind == 1:
    del content[at:]
  elif kind == 2:  # A length, perhaps, that is enormous.
    content[at:at + 4] = rng.choice([0, 1, 127, 255], 4).astype("u1").tobytes()
  elif kind == 3:
    content[at:at] = rng.integers(0, 256, 20, dtype=np.uint8).tobytes()
  elif kind == 4:
    other = int(rng.integers(len(content)))
    content[at:at + 16], content[other:other + 16] = (
        content[other:other + 16], content[at:at + 16])
  else:
    del content[at:at + int(rng.integers(1, 50))]
  return bytes(content)


FUZZED = ("grey.png", "palette.png", "film.png", "colour.bmp", "colour.jpeg",
          "progressive.JPG", "cmyk.jpg", "colour.webp", "film.webp", "film.gif")


@pytest.mark.slow
def test_fuzzed_files_are_read_or_refused_by_name(tmp_path):
  """500 damaged files of ten formats, in a process that must survive."""
  rng = np.random.default_rng(7)
  for i in range(500):
    name = FUZZED[i % len(FUZZED)]
    write(tmp_path, {f"{i:03}/{i:03}-{name}": mutated(FILES[name][0], rng)})
  script = """
import os, sys
from ddss_tf.datasets import load as data
from ddss_tf.errors import UserError
root, read, refused = sys.argv[1], 0, 0
for folder in sorted(os.listdir(root)):
  (name,) = os.listdir(os.path.join(root, folder))
  try:
    images = data.load_dataset(f"folder:{root}/{folder}").images
    assert images.ndim == 4 and images.min() >= -1 and images.max() <= 1
    read += 1
  except UserError as error:
    assert name in str(error) and len(str(error).splitlines()) == 1, error
    refused += 1
print("counts", read, refused)
"""
  run = subprocess.run([sys.executable, "-c", script, str(tmp_path)],
                       capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  _, read, refused = run.stdout.split()[-3:]
  assert int(read) + int(refused) == 500
  assert int(read) > 50 and int(refused) > 150


def test_formats_that_are_reached():
  """No other decoder of Pillow is asked, whatever a file holds."""
  known = {Image.registered_extensions()[suffix]
           for suffix in sources.IMAGE_SUFFIXES}
  assert known == set(decoding.FORMATS)
