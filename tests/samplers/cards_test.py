"""Sampler cards whose fields do not fit: one line, with the file and the field.

Every value of a sound card is replaced by others of every kind.
"""

import copy
import json

import conditional_parts
import numpy as np
import pytest

import ddss_tf
from ddss_tf import zoo
from ddss_tf.runs import run_dir as run_dir_lib
from ddss_tf.samplers import card
from ddss_tf.errors import UserError

STEPS = 3
COEFFICIENTS = ("times", "x0_from_state", "x0_from_eps", "x0_weights",
                "noise_scales")


@pytest.fixture(scope="module")
def denoiser():
  return ddss_tf.gaussian_denoiser((4, 4, 1))


@pytest.fixture(scope="module")
def sound(denoiser, tmp_path_factory):
  """A card with figures, as JSON has it."""
  path = str(tmp_path_factory.mktemp("card") / "sampler.json")
  found = card.SamplerCard(
      "DDIM", ddss_tf.solver_coefficients(
          denoiser.schedule, "ddim", STEPS, "linear").numpy(),
      denoiser.identity, {"config": {"family": "ggdm"}, "steps": 7})
  found = card.SamplerCard(
      found.label, found.coefficients, found.denoiser, found.search,
      "clip", ({
          "coefficients_sha256": found.coefficients_sha256, "fid": 1.5,
          "kid": 0.1, "kid_std": None, "inception_score": 2.0,
          "num_samples": 10, "fid_heldout": [0.5, None],
          "features_heldout": [{"name": "a"}, {"name": "b"}]},),
      {"note": "tested"})
  card.write(path, found)
  with open(path, encoding="utf-8") as f:
    return json.load(f)


def refusal(path) -> str:
  """The one line of a card that is refused."""
  with pytest.raises(UserError) as refused:
    card.read(str(path))
  line = str(refused.value)
  assert "\n" not in line and len(line) < 400, line
  assert line.startswith(f"{path} is damaged: "), line
  return line


def places(value, path=()):
  """Paths to all values inside of a value."""
  if path:
    yield path
  inner = (value.items() if isinstance(value, dict) else
           enumerate(value) if isinstance(value, list) else ())
  for key, each in inner:
    yield from places(each, (*path, key))


def changed(values, path, value):
  """A copy with another value at a path."""
  result = copy.deepcopy(values)
  place = result
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return result


OTHERS = [None, True, -1, 0.5, 10**400, float("nan"), float("inf"), "x", "1.0",
          [], [1.0], [[1.0]], {}, {"x": 1}]


def test_every_value_replaced_by_every_kind(sound, tmp_path):
  refused = read = 0
  for path in places(sound):
    for value in OTHERS:
      file = tmp_path / "sampler.json"
      file.write_text(json.dumps(changed(sound, path, value)))
      try:
        found = card.read(str(file))
      except UserError as error:
        assert "\n" not in str(error) and "sampler.json is damaged" in str(
            error), (path, value)
        refused += 1
        continue
      except Exception as error:
        raise AssertionError((path, value)) from error
      # What is read can be used: its coefficients are numbers that fit.
      found.coefficients.validate()
      assert zoo.table(str(tmp_path)) and found.family is not None
      card.write(str(file), found)
      written = file.read_text()
      card.write(str(file), card.read(str(file)))
      assert file.read_text() == written, (path, value)
      read += 1
  assert refused > 100 and read > 10


@pytest.mark.parametrize("name", [*COEFFICIENTS, "guidance_scales"])
@pytest.mark.parametrize("value", [
    [1.0] * (STEPS - 1), [1.0] * (STEPS + 1), [], 1.0, "1 2 3", ["1", "2", "3"],
    [True, False, False], [None] * STEPS, [[1.0]] * STEPS, {"0": 1.0},
    [float("nan")] * STEPS, [1e39, 0.0, 0.0], [-10**400, 0, 0]])
def test_a_coefficient_of_another_kind_is_named(sound, tmp_path, name, value):
  path = tmp_path / "sampler.json"
  path.write_text(json.dumps(changed(sound, ("coefficients", name), value)))
  # Of other times all the others have the wrong length, too.
  line = refusal(path)
  assert name in line or name == "times" and "must have shape" in line or (
      name == "times" and "must have 2 entries" in line
      or "must have 4 entries" in line or "at least one step" in line)


@pytest.mark.parametrize("field,value,words", [
    ("format", "other", "format must be ddss_tf.sampler version 1"),
    ("version", 2, "version 1.*version 2"),
    ("version", True, "version 1.*version True"),
    ("version", "1", "version 1"),
    ("label", 3, "label must be a word. Received: 3"),
    ("label", "a\nb", "label must be one line"),
    ("num_steps", STEPS + 1, "num_steps must be 3.*Received: 4"),
    ("num_steps", "3", "num_steps must be 3.*'3'"),
    ("x0_bound", "hard", "x0_bound must be null, clip or dynamic.*'hard'"),
    ("x0_bound", True, "x0_bound"), ("x0_bound", [], "x0_bound"),
    ("denoiser", "digits", "denoiser must be an object"),
    ("denoiser", {"name": 3}, "denoiser.name must be a word"),
    ("search", None, "search must be an object"),
    ("search", {"rate": float("inf")}, "search.rate must be finite"),
    ("search", {"config": []}, "search.config must be an object"),
    ("metrics", {}, "metrics must be a list"),
    ("metrics", ["x"], "metrics.0 must be an object"),
    ("metrics", [{"fid": "good"}], "metrics.0.fid must be a number or null"),
    ("metrics", [{"fid": 1.0}], "'coefficients_sha256' is missing"),
    ("provenance", "me", "provenance must be an object"),
    ("coefficients", [], "coefficients must be an object"),
    ("coefficients", {}, "coefficients must be"),
])
def test_a_field_of_another_kind_is_named(
    sound, tmp_path, field, value, words):
  path = tmp_path / "sampler.json"
  path.write_text(json.dumps(changed(sound, (field,), value)))
  with pytest.raises(UserError, match=words):
    card.read(str(path))
  refusal(path)


@pytest.mark.parametrize("path,value,words", [
    (("noise_scales", 0), -0.1, "noise_scales must be non-negative"),
    (("noise_scales", STEPS - 1), 0.1, "noise_scales must .* end in 0"),
    (("times", 0), -1.0, "times must not be negative"),
    (("state_weights", 0, STEPS - 1), 1.0, "state_weights must be lower"),
    (("state_weights", 1), [1.0], "state_weights.1 must have 3 entries"),
    (("state_weights", 1, 1), "x", "state_weights.1.1 must be a finite number"),
    (("weights",), [1.0] * STEPS, "coefficients must be.*'weights'"),
])
def test_coefficients_that_are_no_sampler(sound, tmp_path, path, value, words):
  file = tmp_path / "sampler.json"
  file.write_text(json.dumps(changed(sound, ("coefficients", *path), value)))
  with pytest.raises(UserError, match=words):
    card.read(str(file))
  refusal(file)


@pytest.mark.parametrize("text,words", [
    ("", ""), ("[", ""), ("[1]", "must be a JSON object. Received: list"),
    ("null", "must be a JSON object"), ('"x"', "must be a JSON object"),
    ("[" * 100_000, ""), ("\udc80".encode("utf-8", "surrogateescape"), "")])
def test_what_is_no_card_at_all(tmp_path, text, words):
  path = tmp_path / "sampler.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  assert words in refusal(path)


def test_a_key_given_twice(sound, tmp_path):
  path = tmp_path / "sampler.json"
  text = json.dumps(sound)
  path.write_text(text.replace('"times":', '"times": [1.0], "times":'))
  assert "times must be given once" in refusal(path)


def test_fields_of_later_versions_and_a_byte_order_mark(sound, tmp_path):
  path = tmp_path / "sampler.json"
  path.write_text(json.dumps({**sound, "later": [1]}), encoding="utf-8-sig")
  assert card.read(str(path)).label == "DDIM"


def write(tmp_path, sound, **coefficients):
  path = str(tmp_path / "sampler.json")
  values = {**sound, "coefficients": {**sound["coefficients"], **coefficients}}
  values.pop("metrics")  # They are of the coefficients.
  with open(path, "w") as f:
    json.dump(values, f)
  return path


def test_cards_that_do_not_fit_the_model(denoiser, sound, tmp_path):
  run = run_dir_lib.RunDir(str(tmp_path / "run"))

  def check(words, **coefficients):
    path = write(tmp_path, sound, **coefficients)
    with pytest.raises(UserError, match=words) as refused:
      zoo.load_searched(run, denoiser, path)
    assert path in str(refused.value) and "\n" not in str(refused.value)

  check("times must not exceed 1000.*1001", times=[1001.0, 10.0, 0.0])
  check("null_label", guidance_scales=[1.0] * STEPS)
  # With a model that they fit they are fine.
  path = write(tmp_path, sound, guidance_scales=[1.0] * STEPS)
  guided = conditional_parts.make(null_label=conditional_parts.NULL)
  found, _ = zoo.load_searched(run, guided, path, force=True)
  assert found.num_steps == STEPS


def test_a_start_that_does_not_fit(denoiser, sound, tmp_path):
  def refused(words, steps=STEPS, **coefficients):
    path = write(tmp_path, sound, **coefficients)
    with pytest.raises(UserError, match=words) as error:
      ddss_tf.make_sampler(
          denoiser.schedule, "ggdm+pred", num_steps=steps, init=path)
    assert path in str(error.value)

  refused("num_steps=4. Received: one of 3", steps=4)
  refused("times of at most 1000.*1001", times=[1001.0, 10.0, 0.0])
  refused("times must not be negative", times=[10.0, 5.0, -1.0])
  sampler = ddss_tf.make_sampler(
      denoiser.schedule, "ggdm+pred", num_steps=STEPS,
      init=write(tmp_path, sound))
  np.testing.assert_allclose(
      sampler.coefficients().times, sound["coefficients"]["times"])


def test_a_zoo_with_a_damaged_card(sound, tmp_path):
  (tmp_path / "good.json").write_text(json.dumps(sound))
  (tmp_path / "bad.json").write_text(json.dumps({**sound, "search": 3}))
  with pytest.raises(UserError, match="bad.json is damaged: search must be"):
    zoo.table(str(tmp_path))
