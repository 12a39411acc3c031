"""How the page looks: on screens from 400 pixels on, light or dark, and on paper."""

STYLE = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #59636e; --line: #d9dee3; --tint: #f4f6f8; --mark: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #9aa5b0; --line: #333b43; --tint: #1d2329; --mark: #5ec9a4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
header p { color: var(--soft); margin: 0; max-width: none; }
h1 { font-size: clamp(1.5rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 52rem; overflow-wrap: anywhere; }
a { color: var(--mark); }
.verdict { margin: 1.25rem 0; padding: .6rem 1.1rem 1rem; background: var(--tint); border-left: 4px solid var(--mark);
  border-radius: 4px; }
.verdict > p { font-size: 1.06rem; max-width: none; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .75rem; margin: .9rem 0 0; }
dl > div { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .82rem; line-height: 1.35; }
dd { margin: .25rem 0 0; }
dd strong { display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd span { color: var(--soft); font-size: .82rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0; font-size: .92rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.1rem .38rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 17rem; }
td { overflow-wrap: anywhere; min-width: 6rem; }
.r { text-align: right; white-space: nowrap; overflow-wrap: normal; min-width: 0; }
thead .r { white-space: normal; }
td:last-child:not(.r):nth-child(n + 3) { min-width: 16rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; margin: 1rem 0;
  align-items: start; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; overflow-x: auto; }
.card svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide .card svg { min-width: 46rem; }
details { font-size: .9rem; margin-top: .3rem; }
summary { color: var(--soft); cursor: pointer; width: fit-content; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .4rem 0 .9rem;
  overflow-x: auto; font: .88rem/1.5 ui-monospace, "Cascadia Mono", "Liberation Mono", "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  .r { white-space: normal; }
  tbody th { min-width: 7rem; }
  td:last-child:not(.r):nth-child(n + 3) { min-width: 13rem; }
  th, td { padding-right: .8rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f4f4f4; --mark: #0b6e4f; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, details:not([open]) { display: none; }
  .scroll, .card { overflow: visible; }
  .wide .card svg { min-width: 0; }
  figure, tr, dl > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
