"""The pages of the documentation."""

import os
import re


from project import ROOT


def text(page):
  with open(os.path.join(ROOT, page), encoding="utf-8") as f:
    return f.read()


def blocks(page):
  return re.findall(r"^```python\n(.*?)^```", text(page), re.M | re.S)
