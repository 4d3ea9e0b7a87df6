"""Pictures for reports: arrays in, one self-contained inline SVG out."""

from tempo.reporting.figures.attention import attention_heatmap, key_similarity, layer_head_map
from tempo.reporting.figures.curves import bars, distributions, lines_by
from tempo.reporting.figures.drawing import Picture, save, to_html
from tempo.reporting.figures.factorial import cell_table, dots
from tempo.reporting.figures.forest import forest
from tempo.reporting.figures.positions import position_map, set_lattice
from tempo.text import number, slug

__all__ = [
    "Picture",
    "attention_heatmap",
    "bars",
    "cell_table",
    "distributions",
    "dots",
    "forest",
    "key_similarity",
    "layer_head_map",
    "lines_by",
    "number",
    "position_map",
    "save",
    "set_lattice",
    "slug",
    "to_html",
]
