"""Drawing by hand: escaped tags, the colours of both themes, and pictures that stand alone."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup, escape

# Colours keep 4.5:1 for text and 3:1 for marks against their ground, and differ in lightness as well as in hue.
LIGHT = {
    "ground": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1e24",
    "soft": "#5a6270",
    "rule": "#d9dde3",
    "track": "#eceef2",
    "method": "#0067a5",
    "control": "#7b8494",
    "bound": "#3d4552",
    "bad": "#b3320e",
    "bad-tint": "#fdeee9",
    "lost": "#f3c58b",
    "fall": "#a05a00",
    "good": "#00705a",
    "heat": "#0b5394",
    "on-light": "#1b1e24",
    "on-middle": "#000000",
    "on-heavy": "#ffffff",
    "task-0": "#0067a5",
    "task-1": "#c24e00",
    "task-2": "#007a5e",
    "task-3": "#9a3f86",
    "task-4": "#756500",
    "task-5": "#4a4fb5",
}
DARK = {
    "ground": "#14171c",
    "panel": "#1c2027",
    "ink": "#e9ebef",
    "soft": "#a5adba",
    "rule": "#363c47",
    "track": "#272c35",
    "method": "#4fb0f0",
    "control": "#8d96a6",
    "bound": "#ccd2dc",
    "bad": "#ff8a66",
    "bad-tint": "#3a211b",
    "lost": "#7a5423",
    "fall": "#f0a94a",
    "good": "#3fcaa2",
    "heat": "#7cc4ff",
    "on-light": "#e9ebef",
    "on-middle": "#000000",
    "on-heavy": "#000000",
    "task-0": "#4fb0f0",
    "task-1": "#ff9e57",
    "task-2": "#3fcaa2",
    "task-3": "#e58bcb",
    "task-4": "#d6c64a",
    "task-5": "#a7aaff",
}

# One style for the charts, in the page and alone.
CHART_STYLE = """
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .strong { font-weight: 650; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .track { fill: var(--track); }
svg .lost { fill: var(--lost); }
svg .method { fill: var(--method); }
svg .control { fill: var(--control); }
svg .bound { fill: var(--bound); }
svg .fall { fill: var(--fall); }
svg .good { fill: var(--good); }
svg .whisker { stroke: var(--ink); stroke-width: 2; fill: none; }
svg .guess { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 2; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .dash { stroke-dasharray: 6 4; }
svg .mean { fill: none; stroke: var(--ink); stroke-width: 3.2; stroke-linejoin: round; }
svg .heat { fill: var(--heat); }
svg .just { fill: none; stroke: var(--ink); stroke-width: 1.8; }
svg .light { fill: var(--on-light); }
svg .middle { fill: var(--on-middle); }
svg .heavy { fill: var(--on-heavy); }
svg .cell { font-weight: 600; }
svg .leader { stroke: var(--control); stroke-width: 0.8; fill: none; }
svg .small { font-size: 10.5px; }
""".strip()

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element, everything in it escaped.

    `font_size=9` is written `font-size="9"`, `class_` `class`; attributes that are None are left out, floats have two
    decimals. Children that are not Markup are text.
    """
    # not with `Markup.format`, which takes ten times as long: a page of many tasks has thousands
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")


def _value(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else clean(value)


def clean(text: Any) -> str:
    """Text without the characters that XML cannot hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text))


def short(text: str, length: int) -> str:
    """Text cut to a length, with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def theme(colours: dict[str, str]) -> Markup:
    """The colours as CSS custom properties."""
    return Markup("").join(Markup("--{}:{};").format(key, value) for key, value in colours.items())


def standalone(drawing: Markup, width: int, height: int, title: str) -> str:
    """A drawing as an .svg file on a light ground; colours are written out: few viewers know custom properties."""
    style = re.sub(r"var\(--([\w-]+)\)", lambda match: LIGHT[match[1]], CHART_STYLE)
    picture = tag(
        "svg",
        tag("title", title),
        tag("style", Markup(style)),
        tag("rect", width="100%", height="100%", fill=LIGHT["ground"]),
        drawing,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
    )
    # In text a quote is escaped, so only our own attributes match.
    return re.sub(r'"var\(--([\w-]+)\)"', lambda match: f'"{LIGHT[match[1]]}"', str(picture)) + "\n"
