"""The fixed parts of the HTML report: its style sheet, and what its figures mean."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f4; --bad: #8a1f11; --note: #7a4b00; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #262626; --bad: #ff9d8f; --note: #ffcf7a; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
th[scope=row] { font-weight: 600; overflow-wrap: anywhere; min-width: 11rem; }
td { overflow-wrap: anywhere; }
td table, details table { font-size: .9rem; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; } .wide td.absent { white-space: normal; }
.absent strong, .absent { color: var(--bad); } .warnings { color: var(--note); }
figure { margin: 1rem 0; background: #fff; color: #000; border: 1px solid var(--line); padding: .5rem; }
figure img { max-width: 100%; height: auto; display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; background: var(--soft); padding: .3rem .5rem; }
@media print { details > * { display: block; } }
"""

METHODS = """<ul>
<li>n: inferences, over fresh processes of each artifact, taken in turns (A B C A B C ...). Latency: wall clock around
one inference, inputs and outputs bound, after the warm-up.</li>
<li>P50, P90, ...: percentiles of all inferences together. A percentile q is given only where q<sup>n</sup> is at most
0.05; else it is absent, and a warning says which n it needs.</li>
<li>[low, high]: 95 % interval over processes (Student's t on the logarithms of per-process values): where a typical
process lies. It tells what another run of the same file on the same machine would vary by.</li>
<li>Memory is measured in a process of its own, by the method named beside it. MB are 10<sup>6</sup> bytes.</li>
<li>Parity: outputs against the source model in float32. Agreement: same largest output. Accuracy: on the samples of
<code>--eval</code>, the change with its 95 % interval.</li>
<li>A figure that is absent is shown as -. It is never 0.</li>
</ul>"""
