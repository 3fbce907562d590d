"""Colours and text of all figures."""

from matplotlib.figure import Figure

from ddss_tf import storage
from ddss_tf.samplers import labels as labels_lib

_DPI = 120
# Colours of Okabe and Ito's set, which colour-blind people can tell apart.
# Groups also differ in their markers, so that they survive a black-and-white
# print.
BLUE, ORANGE, VERMILION, _GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
GROUPS = {
    labels_lib.SEARCHED: (VERMILION, "o"),
    labels_lib.TRAINING_FREE: (BLUE, "s"),
    labels_lib.BASELINES: (_GREEN, "^"),
}
# Fillings of the markers of held-out networks, by the words for them.
OPEN = {"open": {"mfc": "none"}, **{
    f"{name} half": {"fillstyle": style, "markerfacecoloralt": "none"}
    for name, style in (("left", "left"), ("right", "right"),
                        ("upper", "top"), ("lower", "bottom"))}}
PALE = 0.35
TEXT = "#444444"
# Options of texts from files, in which a dollar sign does not begin a formula.
PLAIN = {"parse_math": False}


def save_figure(figure: Figure, path: str) -> None:
  with storage.replacing(path) as temporary:
    figure.savefig(temporary, dpi=_DPI, format="png", facecolor="white")
