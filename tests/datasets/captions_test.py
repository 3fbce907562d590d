"""Tests of captions of folders, and of counts of captions and labels."""

import json

import gin
import numpy as np
from PIL import Image
import pytest

import ddss_tf
from ddss_tf.datasets import dataset as dataset_lib
from ddss_tf.datasets import load as data
from ddss_tf.errors import UserError
import conditional_parts

CAPTIONS = {"a.png": "a cat", "b.jpg": "zwei Bären, groß", "c.png": "a cat",
            "d.png": 'a "dog"'}


def refusal(folder, *words) -> str:
  with pytest.raises(UserError) as error:
    data.load_dataset(f"folder:{folder}")
  text = str(error.value)
  assert text and "\n" not in text and len(text) < 600
  for word in words:
    assert word in text, text
  return text


@pytest.fixture
def folder(tmp_path):
  """Four images, each of one grey, without captions."""
  for i, name in enumerate(CAPTIONS):
    Image.new("L", (4, 4), 50 * i).save(tmp_path / name)
  return tmp_path


def beside(folder, captions=None):
  for name, caption in (captions or CAPTIONS).items():
    (folder / name).with_suffix(".txt").write_bytes(f" {caption}\r\n".encode())


def listed(folder, lines, name="captions.jsonl"):
  (folder / name).write_text("\n".join(
      line if isinstance(line, str) else json.dumps(line) for line in lines),
                             "utf-8")


def load(folder, **options):
  return data.load_dataset(f"folder:{folder}", **options)


def test_text_files_beside_images(folder):
  plain = load(folder)
  assert plain.captions is None
  beside(folder)
  dataset = load(folder)
  assert dataset.captions == tuple(CAPTIONS.values())
  # What identifies a data set is its images.
  assert dataset.sha256 == plain.sha256
  np.testing.assert_array_equal(dataset.images, plain.images)


@pytest.mark.parametrize("name,file,caption", [
    ("captions.jsonl", "file", "caption"),
    ("captions.jsonl", "file_name", "text"),
    ("metadata.jsonl", "file_name", "text")])
def test_a_file_of_lines_in_any_order(folder, name, file, caption):
  lines = [{file: key, caption: value, "width": 4}
           for key, value in reversed(CAPTIONS.items())]
  listed(folder, ["\ufeff" + json.dumps(lines[0]), "", *lines[1:], ""], name)
  assert load(folder).captions == tuple(CAPTIONS.values())


def test_captions_in_class_folders(tmp_path):
  for i, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png"]):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("L", (4, 4), 50 * i).save(tmp_path / name)
  listed(tmp_path, [{"file": "dog/1.png", "caption": "3"},
                    {"file": "./cat/2.png", "caption": "2"},
                    {"file": "cat/1.png", "caption": "1"}])
  dataset = load(tmp_path)
  assert dataset.captions == ("1", "2", "3")
  np.testing.assert_array_equal(dataset.labels, [0, 0, 1])
  (tmp_path / "captions.jsonl").unlink()
  # Files of one name in two folders have captions of their own.
  beside(tmp_path, {"cat/1.png": "one", "cat/2.png": "two", "dog/1.png": "three"})
  assert load(tmp_path).captions == ("one", "two", "three")


def test_captions_follow_their_images(folder):
  beside(folder)
  some = load(folder, max_images=3, subset_seed=1, flip=True)
  greys = dataset_lib.to_uint8(some.images)[:, 0, 0, 0]
  assert len(greys) == 6 and len(set(some.captions)) > 1
  names = list(CAPTIONS)
  for grey, caption in zip(greys, some.captions, strict=True):
    assert CAPTIONS[names[round(float(grey) / 50)]] == caption
  assert load(folder, max_images=2, subset_seed=None).captions == (
      "a cat", "zwei Bären, groß")


def test_files_of_other_things_are_left_alone(folder):
  plain = load(folder)
  (folder / "README.txt").write_text("about these images")
  listed(folder, [{"file_name": "a.png", "label": 3}], "metadata.jsonl")
  dataset = load(folder)
  assert dataset.captions is None and dataset.sha256 == plain.sha256


def test_every_image_has_one_caption(folder):
  beside(folder)
  (folder / "b.txt").unlink()
  refusal(folder, "each of 4 images", "3 in *.txt", "none of them of 'b.jpg'")
  beside(folder)
  (folder / "e.txt").write_text("of nothing")
  refusal(folder, "must have the name of one of them", "e.txt", "no image")
  (folder / "e.txt").unlink()
  (folder / "c.txt").write_text(" \n")
  refusal(folder, "c.txt", "must not be empty")
  (folder / "c.txt").write_bytes(b"\xff\xfea")
  refusal(folder, "c.txt", "UTF-8")
  beside(folder)
  listed(folder, [{"file": "a.png", "caption": "a cat"}])
  refusal(folder, "one kind of file", "captions.jsonl and *.txt")


LINES = [{"file": key, "caption": value} for key, value in CAPTIONS.items()]


@pytest.mark.parametrize("lines,words", [
    (LINES[:3], ["each of 4 images", "3 in captions.jsonl", "of 'd.png'"]),
    ([*LINES, {"file": "e.png", "caption": "e"}],
     ["line 5 of", "'e.png'", "not among 4"]),
    ([*LINES, {"file": "../a.png", "caption": "e"}], ["line 5", "'../a.png'"]),
    ([*LINES, LINES[0]], ["one caption for each", "another of 'a.png' in line 5"]),
    ([LINES[0], '{"file": "b.jp'], ["line 2 of", "JSON object", "b.jp"]),
    ([LINES[0], "[1, 2]"], ["line 2 of", "JSON object", "a list"]),
    ([LINES[0], "[" * 100_000], ["line 2 of", "JSON object"]),
    ([{"file": "a.png"}], ["line 1 of", "'caption' or 'text'", "a.png"]),
    ([{"caption": "a"}], ["line 1 of", "'file' or 'file_name'"]),
    ([{**LINES[0], "text": "b"}], ["'caption' or 'text'"]),
    ([{"file": "a.png", "caption": 3}], ["'caption' or 'text'", "3"]),
    ([{"file": "a.png", "caption": ""}], ["line 1", "not be empty"]),
    (['{"file": "a.png", "caption": "\\ud800"}'], ["line 1", "must be text"]),
], ids=range(13))
def test_lines_that_are_refused(folder, lines, words):
  listed(folder, lines)
  refusal(folder, "captions.jsonl", *words)


def test_counts_are_the_rows_of_a_table(folder):
  beside(folder)
  prompts, weights = load(folder).caption_counts()
  assert prompts == ["a cat", "zwei Bären, groß", 'a "dog"']
  assert weights == [2, 1, 1]
  table = ddss_tf.ConditionTable(
      {"context": np.zeros([3, 2, 5], np.float32)}, prompts, weights)
  np.testing.assert_allclose(table.frequencies, [0.5, 0.25, 0.25])
  (folder / "a.txt").unlink()
  for text in folder.glob("*.txt"):
    text.unlink()
  with pytest.raises(UserError, match="must have captions"):
    load(folder).caption_counts()


def test_a_data_set_has_a_caption_for_each_image():
  images = np.zeros([2, 4, 4, 1], np.float32)
  some = dataset_lib.ImageDataset("some", images, None, "0")  # As it always was.
  assert some.captions is None
  with pytest.raises(UserError, match="must be 2 texts.*Received: 1"):
    dataset_lib.ImageDataset("some", images, None, "0", ("a",))


def test_label_counts_are_weights_of_classes(bind):
  some = dataset_lib.ImageDataset(
      "some", np.zeros([5, 4, 4, 1], np.float32), np.array([3, 0, 3, 3, 2]), "0")
  assert some.label_counts(4) == [1, 0, 1, 3]
  denoiser = conditional_parts.make(
      null_label=conditional_parts.NULL, label_weights=some.label_counts(4))
  np.testing.assert_allclose(denoiser.label_weights, [0.2, 0, 0.2, 0.6])
  for count in (3, 1):
    with pytest.raises(UserError, match=f"from 0 to {count - 1}.*Received: 0 to 3"):
      some.label_counts(count)
  with pytest.raises(UserError, match="whole number"):
    some.label_counts(0)
  with pytest.raises(UserError, match="must have labels"):
    dataset_lib.as_dataset(some.images).label_counts(4)

  bind("""
      label_counts.dataset = @load_dataset()
      label_counts.num_classes = 12
      load_dataset.name = "ddss_digits"
      load_dataset.max_images = 500""")
  weights = gin.get_configurable("label_counts")()
  assert sum(weights) == 500 and weights[10:] == [0, 0] and min(weights[:10]) > 20
