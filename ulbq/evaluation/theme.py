"""The look of the report: one style sheet, light and dark, no files beside it."""

from collections.abc import Iterable

from markupsafe import Markup

from ulbq.evaluation.markup import element

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #171b22; --soft: #5c6675; --faint: #e4e7ec; --accent: #2f6bd8;
  --s0: #2f6bd8; --s1: #d9730d; --s2: #12907d; --s3: #b1458f; --s4: #7b5bd6; --s5: #a3851c; --parent: #8a93a1;
  --codes: #2f6bd8; --scales: #e0922f; --zeros: #12907d; --router: #7a5cd6; --adapter: #b1458f;
  --rest: #8a93a1; --on-part: #ffffff;
  --heat: #c2410c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1217; --card: #171b22; --ink: #e8ebf0; --soft: #97a1b0; --faint: #2a303a; --accent: #7aa7ff;
    --s0: #6f9ff5; --s1: #f0a04b; --s2: #3cc0a8; --s3: #dd7fbe; --s4: #a78bfa; --s5: #d4b545; --parent: #7d8796;
    --codes: #6f9ff5; --scales: #f0a04b; --zeros: #3cc0a8; --router: #a78bfa; --adapter: #dd7fbe;
    --rest: #7d8796; --on-part: #0f1217;
    --heat: #fb923c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 40px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 864px; margin: 0 auto; }
header { margin-bottom: 24px; }
h1 { margin: 0 0 4px; font-size: 26px; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 17px; }
h3 { margin: 18px 0 4px; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0; }
.sub, figcaption, .notes { color: var(--soft); font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin-bottom: 14px; }
.tile, section { background: var(--card); border: 1px solid var(--faint); border-radius: 12px; }
.tile { padding: 14px 18px 16px; }
.tile .value {
  font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
}
.tile .label { color: var(--soft); font-size: 13px; }
section { padding: 20px 22px 22px; margin-bottom: 14px; }
figure { margin: 0; }
figcaption { margin-bottom: 12px; }
svg { display: block; width: 100%; min-width: 560px; height: auto; font-size: 12px; }
svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .muted { fill: var(--soft); }
svg .strong { font-weight: 600; }
svg .on-part { fill: var(--on-part); font-weight: 600; }
.grid { stroke: var(--faint); stroke-width: 1; }
.whisker { stroke-width: 2; opacity: 0.6; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 4 4; opacity: 0.6; }
.heat { fill: var(--heat); }
.part.codes { fill: var(--codes); } .part.scales { fill: var(--scales); } .part.zeros { fill: var(--zeros); }
.part.router { fill: var(--router); } .part.adapter { fill: var(--adapter); } .part { fill: var(--rest); }
.scroll { overflow-x: auto; }
figure table { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--faint); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; overflow-wrap: anywhere; min-width: 104px; }
tbody th { font-weight: 400; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; }
tr.group th { padding-top: 14px; color: var(--soft); font-size: 12.5px; font-weight: 600; }
tr.total > * { font-weight: 650; }
td.best { font-weight: 700; color: var(--accent); }
.words .caption { color: var(--soft); font-size: 13.5px; }
.words .prompt { color: var(--soft); white-space: pre-wrap; }
.words dl { margin: 0; }
.words dt { margin-top: 10px; font-size: 13.5px; font-weight: 600; overflow-wrap: anywhere; }
.words dt span { display: inline-block; color: var(--soft); font-weight: 400; }
.words dd {
  margin: 2px 0 0; padding: 6px 0 6px 12px; border-left: 3px solid var(--faint);
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
}
.words .nothing { color: var(--soft); font-style: italic; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.notes { margin: 12px 0 0; padding: 0; list-style: none; }
footer { color: var(--soft); font-size: 13px; margin-top: 20px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.92em; }
@media print { body { background: #fff; padding: 0; } section, .tile { break-inside: avoid; } }
"""

SERIES = "".join(
    f".{name}.fill{{fill:var(--{name})}}"
    f".{name}.whisker,.{name}.curve{{stroke:var(--{name})}}"
    f".legend .{name}{{background:var(--{name})}}"
    for name in ("parent", "s0", "s1", "s2", "s3", "s4", "s5")
)
"""Colours of the models, one class each."""

PARTS = "".join(
    f".legend .{name}{{background:var(--{name})}}" for name in ("codes", "scales", "zeros", "router", "adapter")
)
"""Colours of the parts that a model's bits are spent on."""


def tiles(values: Iterable[tuple[str, str]]) -> Markup:
    """A row of large values, each with its label below, as HTML."""
    drawn = (
        element("div", element("div", value, class_="value"), element("div", label, class_="label"), class_="tile")
        for value, label in values
    )
    return element("div", *drawn, class_="tiles")


def section(title: str, caption: str, drawn: str, legend: str = "") -> Markup:
    """A figure under a title and a caption, as HTML."""
    scroll = element("div", drawn, class_="scroll")
    figure = element("figure", element("h2", title), element("figcaption", caption), legend, scroll)
    return element("section", figure)
