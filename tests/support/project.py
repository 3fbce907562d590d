"""Folders of the project, for tests."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
TESTDATA = os.path.join(ROOT, "tests", "testdata")
SUPPORT = os.path.join(ROOT, "tests", "support")
