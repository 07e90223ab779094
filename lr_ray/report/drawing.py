"""What all pictures share: colours, and how they become PNGs."""

import io

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, PALE = "#1a1a2e", "#8d99ae", "#e8a5ad"
COLOURS = {"recycle": "#d1495b", "oracle": "#2a9d8f"}
"""Of the methods that stand out; others are muted."""


def to_png(figure: Figure) -> bytes:
    """The picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
