"""Runs to walk through: one offline page of them, which is also what a notebook shows.

- `page.py` makes the HTML, with `view.css` and `view.js`.
- `data.py` says what of the traces the page holds.
- `objects.py` shows steps and findings in a notebook.
- `frames.py` and `exports.py` hand runs to pandas, matplotlib, CircuitsVis and BertViz.
"""

from tempo.viewing.exports import bertviz_arguments, circuitsvis_arguments
from tempo.viewing.page import View, view

__all__ = ["View", "bertviz_arguments", "circuitsvis_arguments", "view"]
