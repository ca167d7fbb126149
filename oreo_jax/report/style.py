"""Look of the report's plots, and their way into a page.

A drawing is an `<svg>` element to put inline in HTML. Colours are written as
CSS variables, so that one drawing serves light and dark pages, and text stays
text in the page's own font. The palette is that of Okabe and Ito.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What matplotlib draws with; `to_svg` writes `var(--name)` in their place.
COLOURS = {
  "ink": "#1b1f25",
  "muted": "#5f6873",
  "grid": "#e2e5ea",
  "paper": "#fefefd",
  "blue": "#0072b3",
  "orange": "#d55e01",
  "green": "#009e74",
  "purple": "#a8568f",
  "grey": "#808993",
}

# Any: matplotlib types the keys as the literals it knows, not as strings.
STYLE: Any = {
  "font.size": 9.5,
  "axes.titlesize": 10,
  "axes.labelsize": 9.5,
  "axes.labelcolor": COLOURS["muted"],
  "axes.edgecolor": COLOURS["grid"],
  "axes.linewidth": 1.0,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": COLOURS["grid"],
  "grid.linewidth": 0.8,
  "text.color": COLOURS["ink"],
  "xtick.color": COLOURS["muted"],
  "ytick.color": COLOURS["muted"],
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "xtick.minor.size": 0,
  "legend.frameon": False,
  "legend.fontsize": 9,
  "lines.linewidth": 1.8,
  "lines.markersize": 5,
  "svg.fonttype": "none",
}


def colour_of(row: Mapping[str, Any]) -> str:
  """Returns the key of the colour that a row of results asks for.

  Rows say it under `colour`; those of older runs, or of a newer version with
  more colours, are blue.
  """
  colour = row.get("colour", "")
  return colour if colour in COLOURS else "blue"


def panel(width: float, height: float) -> tuple[Figure, Axes]:
  """A figure of one panel, in inches; no pyplot, so no state left behind."""
  figure = Figure(figsize=(width, height), layout="constrained")
  figure.patch.set_visible(False)
  axes = figure.subplots()
  axes.patch.set_visible(False)
  return figure, axes


def to_svg(figure: Figure, label: str) -> str:
  """The figure as one inline element, without what a page does not need."""
  buffer = io.StringIO()
  # The salt makes identifiers differ between the drawings of one page, and the
  # same from run to run.
  with matplotlib.rc_context({"svg.hashsalt": label}):
    figure.savefig(
      buffer,
      format="svg",
      transparent=True,
      metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
  width = round(figure.get_figwidth() * 96)
  svg = re.sub(
    r'^<svg width="[^"]*" height="[^"]*"',
    f'<svg role="img" aria-label="{html.escape(label)}" '
    f'style="max-width:{width}px"',
    svg,
  )
  for name, code in COLOURS.items():
    svg = svg.replace(code, f"var(--{name})")
  return svg
