"""How charts look: on a light page, which the page inverts for a dark one."""

from __future__ import annotations

from bokeh.themes import Theme

GREY = "#5b6470"
_TEXT = "system-ui, sans-serif"
THEME = Theme(
    json={
        "attrs": {
            "Plot": {
                "background_fill_color": None,
                "border_fill_color": None,
                "outline_line_color": None,
                "min_border_right": 12,
            },
            "Axis": {
                "axis_label_text_color": GREY,
                "axis_label_text_font": _TEXT,
                "axis_label_text_font_size": "12px",
                "axis_label_text_font_style": "normal",
                "axis_line_color": "#aab2bd",
                "major_label_text_color": GREY,
                "major_label_text_font": _TEXT,
                "major_label_text_font_size": "12px",
                "major_tick_line_color": "#aab2bd",
                "minor_tick_line_color": None,
            },
            "Grid": {"grid_line_color": "#dde1e6"},
            "Legend": {
                "background_fill_color": None,
                "border_line_color": None,
                "label_text_color": GREY,
                "label_text_font": _TEXT,
                "label_text_font_size": "12px",
                "title_text_color": GREY,
                "title_text_font": _TEXT,
                "title_text_font_size": "12px",
                "title_text_font_style": "normal",
                "padding": 2,
                "glyph_width": 14,
            },
        }
    }
)
