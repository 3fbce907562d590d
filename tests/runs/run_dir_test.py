"""Run directories."""

import contextlib
import os

import pytest

from ddss_tf import storage
from ddss_tf.runs import run_dir
from ddss_tf.errors import UserError
from run_files import is_locked


def test_a_restart_that_is_killed_restarts(tmp_path, monkeypatch):
  """Whatever is left then is not taken for the new search's."""
  run = run_dir.RunDir(str(tmp_path))
  names = ("sampler.json", "tensorboard/pictures/events", "checkpoints/ckpt-3",
           "checkpoints/checkpoint", "checkpoints/zzz")
  remove = run_dir.RunDir.remove
  for killed_at in range(len(names) + 1):
    run.claim("search", {"seed": 0}, restart=True)
    for name in names:
      os.makedirs(os.path.dirname(run.path(name)), exist_ok=True)
      storage.write_text(run.path(name), "")
    left = [killed_at]

    def removing(self, *paths):
      for path in paths:
        if not left[0]:
          raise KeyboardInterrupt
        left[0] -= 1
        remove(self, path)

    with monkeypatch.context() as patch:
      patch.setattr(run_dir.RunDir, "remove", removing)
      results = ("sampler.json", "tensorboard/pictures")
      with contextlib.suppress(KeyboardInterrupt):
        run.claim("search", {"seed": 1}, True, results)
        assert killed_at == len(names)
    if killed_at < len(names):
      with pytest.raises(UserError, match="another seed: 0. Received: 1"):
        run.claim("search", {"seed": 1})
      run.claim("search", {"seed": 1}, True, results)
    assert not run.check("search", {"seed": 1})
    assert os.listdir(run.path("checkpoints")) == ["search.json"]
    assert sorted(os.listdir(run.root)) == ["checkpoints", "tensorboard"]
    assert not os.listdir(run.path("tensorboard"))


def test_a_process_may_lock_twice_and_releases_as_often(tmp_path):
  first, second = (run_dir.RunDir(str(tmp_path / "run")) for _ in range(2))
  path = tmp_path / "run" / ".lock"

  with first.locked() as run:
    assert run is first
    with second.locked():
      assert is_locked(path)
    assert is_locked(path)
  assert not is_locked(path)
  with pytest.raises(RuntimeError), first.locked():
    raise RuntimeError
  assert not is_locked(path)
