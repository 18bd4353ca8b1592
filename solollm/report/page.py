"""The style and the script of `report.html`; text without a number in it."""

STYLE = """
:root { color-scheme: light dark;
  --back: #fbfaf8; --card: #ffffff; --ink: #1d2129; --soft: #667080; --line: #e4e2dd;
  --train: #2f6fde; --eval: #d1661a; --mark: #8a5cd0; --code: #f3f1ec; }
@media (prefers-color-scheme: dark) { :root {
  --back: #14161a; --card: #1c1f25; --ink: #e8e6e1; --soft: #949cab; --line: #2d323b;
  --train: #6ea3ff; --eval: #f2a35e; --mark: #b79cf0; --code: #23272f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 56px; max-width: 1080px; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 36px 0 12px; }
.state { font-size: 13px; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--line);
  color: var(--soft); }
.soft { color: var(--soft); }
.tiles { display: grid; gap: 10px; margin-top: 18px;
  grid-template-columns: 1fr 1fr; }
.tile, figure, .sample, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { font-size: 12.5px; color: var(--soft); }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
@media (min-width: 760px) { .charts { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: repeat(4, 1fr); } }
figure { margin: 0; padding: 10px 10px 6px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; font-weight: 600; font-size: 14px;
  padding: 0 4px; align-items: baseline; }
.key { font-weight: 400; font-size: 12.5px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 5px; vertical-align: 3px; background: currentColor; }
.key.train::before { background: var(--train); } .key.eval::before { background: var(--eval); }
output { margin-left: auto; font-weight: 400; font-size: 12.5px; color: var(--soft);
  font-variant-numeric: tabular-nums; }
figure > svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke: var(--train); }
svg path.faint { stroke-width: 1; opacity: .28; } svg path.eval { stroke: var(--eval); }
svg circle.eval { fill: var(--eval); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--mark); stroke-dasharray: 3 4; }
svg .pointer { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td:first-child { white-space: nowrap; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
.sample { padding: 10px 14px; margin-bottom: 10px; }
.sample header { font-size: 12.5px; color: var(--soft); }
.sample p, pre { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.sample mark { background: none; color: var(--soft); }
details { padding: 8px 14px; margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { background: var(--code); border-radius: 6px; padding: 10px; overflow-x: auto; }
footer { margin-top: 36px; font-size: 12.5px; color: var(--soft); }
@media print { body { max-width: none; } figure, .sample { break-inside: avoid; } }
"""

# The read-out: the point of each curve nearest to the pointer. Without it the page only lacks that.
SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-series]")) {
  const series = JSON.parse(svg.dataset.series);
  const [low, high, left, right] = JSON.parse(svg.dataset.frame);
  const pointer = svg.querySelector(".pointer");
  const output = svg.parentElement.querySelector("output");
  const text = (value) => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-2)
    ? value.toExponential(2) : String(value);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const step = low + (place - left) / (right - left) * (high - low);
    let shown = null;
    const values = series.map(([name, x, y]) => {
      let best = 0;
      for (let i = 1; i < x.length; i++)
        if (y[i] !== null && Math.abs(x[i] - step) < Math.abs(x[best] - step)) best = i;
      shown = shown === null ? x[best] : shown;
      return y[best] === null ? "" : text(y[best]);
    });
    output.textContent = "step " + shown + ": " + values.filter(Boolean).join(" / ");
    const drawn = left + (shown - low) / ((high - low) || 1) * (right - left);
    pointer.setAttribute("x1", drawn);
    pointer.setAttribute("x2", drawn);
    pointer.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => {
    output.textContent = "";
    pointer.style.visibility = "hidden";
  });
}
"""
