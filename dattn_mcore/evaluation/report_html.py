"""The report's HTML: one page, styles and images inside, no script, no network."""

from __future__ import annotations

import html
from typing import Any

from dattn_mcore.evaluation.report_sections import Sample, Section

COLOURS = ("#2563eb", "#d97706")  # first and second run
STYLE = """
:root { color-scheme: light; font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; color: #1f2937; background: #f8fafc; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { margin: 2.2rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1rem 0 .5rem; font-size: .95rem; color: #475569; }
table { border-collapse: collapse; width: 100%; background: #fff; }
a { color: #2563eb; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e2e8f0;
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.failed { color: #b91c1c; } .quiet { color: #64748b; font-size: .85rem; }
.bars { display: grid; grid-template-columns: minmax(9rem, 16rem) 1fr 8rem; gap: .2rem .8rem;
  align-items: center; background: #fff; padding: .7rem; }
.track { background: #e2e8f0; height: .7rem; margin: .1rem 0; }
.bar { height: 100%; } .bars .n { text-align: right; font-variant-numeric: tabular-nums; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr));
  gap: .9rem; }
.sample { background: #fff; border: 1px solid #e2e8f0; padding: .7rem; overflow-wrap: anywhere; }
.sample img { max-width: 100%; max-height: 220px; display: block; margin-bottom: .5rem;
  background: #e2e8f0; }
.sample p { margin: .25rem 0; white-space: pre-wrap; }
.key { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; }
.right { border-left: 4px solid #16a34a; } .wrong { border-left: 4px solid #dc2626; }
.part { border-left: 4px solid #ca8a04; } .none { border-left: 4px solid #94a3b8; }
.answer { padding-left: .5rem; } nav a { margin-right: .8rem; }
pre { white-space: pre-wrap; background: #fff; padding: .7rem; font-size: .8rem; }
"""


def page(labels: list[str], runs: list[dict[str, Any]], sections: list[Section]) -> str:
    """The whole page.

    Args:
        labels: name of each run.
        runs: `scores.json` of each run.
        sections: benchmarks to show.
    """
    title = " against ".join(labels)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_(title)}</h1>",
        *(
            _about(i, label, run["run"])
            for i, (label, run) in enumerate(zip(labels, runs, strict=True))
        ),
        _scores(labels, sections),
        "<nav>" + "".join(f'<a href="#{s.name}">{_(s.title)}</a>' for s in sections) + "</nav>",
        *(_section(labels, section) for section in sections),
        "<h2>What the scores depend on</h2>",
        *(_settings(label, run) for label, run in zip(labels, runs, strict=True)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _(text: Any) -> str:
    return html.escape(str(text))


def _key(number: int) -> str:
    return f'<span class="key" style="background:{COLOURS[number]}"></span>'


def _about(number: int, label: str, run: dict[str, Any]) -> str:
    decoding = run["decoding"]
    facts = [
        run["date"],
        f"{decoding['dtype']} on {decoding['device']}",
        f"{decoding['processes']} processes of batch {decoding['batch_size']}",
        f"dattn_mcore {run['versions']['dattn_mcore']}",
        f"transformers {run['versions']['transformers']}",
    ]
    return f'<div class="quiet">{_key(number)}{_(label)}: {_(", ".join(facts))}</div>'


def _scores(labels: list[str], sections: list[Section]) -> str:
    two = len(labels) == 2
    heads = "".join(f'<th class="n">{_key(i)}{_(x)}</th>' for i, x in enumerate(labels))
    difference = '<th class="n">difference</th>' if two else ""
    rows = []
    for section in sections:
        first = next((e for e in section.entries if "metric" in e), section.entries[0])
        cells = "".join(f'<td class="n">{_figure(entry)}</td>' for entry in section.entries)
        if two:
            values = [entry["value"] for entry in section.entries if "value" in entry]
            both = len(values) == 2
            cells += f'<td class="n">{values[1] - values[0]:+.2f}</td>' if both else "<td></td>"
        notes = "<br>".join(dict.fromkeys(filter(None, map(_note, section.entries))))
        rows.append(
            f'<tr><td><a href="#{section.name}">{_(section.title)}</a></td>'
            f"<td>{_(first.get('metric', first['status']))}</td>{cells}"
            f'<td class="n">{_guessing(first)}</td>'
            f'<td class="n">{first.get("rows") or ""}</td><td class="quiet">{notes}</td></tr>'
        )
    return (
        f"<h2>Scores</h2><table><tr><th>benchmark</th><th>metric</th>{heads}{difference}"
        f'<th class="n">guessing</th><th class="n">rows</th><th>notes</th></tr>'
        f"{''.join(rows)}</table>"
    )


def _figure(entry: dict[str, Any]) -> str:
    if "value" not in entry:
        failed = entry["status"] == "failed"
        return '<span class="failed">failed</span>' if failed else _(entry["status"])
    return f"{entry['value']:.2f}{'%' if entry['unit'] == '%' else ''}"


def _guessing(entry: dict[str, Any]) -> str:
    if "guessing" not in entry:
        return ""
    return f"{entry['guessing']:.2f}{'%' if entry['unit'] == '%' else ''}"


def _note(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f'<span class="failed">{_(entry["error"])}</span>'
    return _(entry.get("note", ""))


def _section(labels: list[str], section: Section) -> str:
    parts = [f'<h2 id="{section.name}">{_(section.title)}</h2>']
    figures = [entry.get("figures", {}) for entry in section.entries]
    names = list(dict.fromkeys(name for f in figures for name in f))
    if names:
        rows = (
            f"<tr><td>{_(name)}</td>"
            + "".join(f'<td class="n">{_plain(f.get(name))}</td>' for f in figures)
            + "</tr>"
            for name in names
        )
        heads = "".join(f'<th class="n">{_key(i)}{_(x)}</th>' for i, x in enumerate(labels))
        parts.append(f"<table><tr><th>figure</th>{heads}</tr>{''.join(rows)}</table>")
    parts.append(_bars(section))
    for heading, samples in section.samples.items():
        parts.append(f"<h3>{_(heading)}</h3>")
        cards = "".join(_sample(labels, sample) for sample in samples)
        parts.append(f'<div class="samples">{cards}</div>')
    return "\n".join(parts)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removesuffix(".00")


def _bars(section: Section) -> str:
    groups = [entry.get("categories", {}) for entry in section.entries]
    names = list(dict.fromkeys(name for group in groups for name in group))
    if not names:
        return ""
    largest = max(g[name]["value"] for g in groups for name in g)
    most = 200.0 if largest > 100 else 100.0  # MME's tasks go to 200
    cells = []
    for name in names:
        tracks, values = "", []
        for number, group in enumerate(groups):
            if name in group:
                value = group[name]["value"]
                width = 100 * max(0.0, min(value, most)) / most
                style = f"width:{width:.2f}%;background:{COLOURS[number]}"
                tracks += f'<div class="track"><div class="bar" style="{style}"></div></div>'
                values.append(f"{value:.1f}")
        rows = next(group[name]["rows"] for group in groups if name in group)
        label = f'{_(name)} <span class="quiet">{rows}</span>'
        cells.append(
            f'<div>{label}</div><div>{tracks}</div><div class="n">{" / ".join(values)}</div>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'


_KINDS = {0.0: "wrong", 1.0: "right"}  # of an answer, by its credit


def _sample(labels: list[str], sample: Sample) -> str:
    images = "".join(
        f'<img alt="image of row {sample.number}" src="data:image/jpeg;base64,{image}">'
        for image in sample.images
    )
    parts = [images, f"<p>{_(sample.question)}</p>"]
    for number, (answer, credit) in enumerate(zip(sample.answers, sample.credits, strict=True)):
        kind = "none" if credit is None else _KINDS.get(credit, "part")
        shown = _(answer) if answer.strip() else '<span class="quiet">(empty answer)</span>'
        key = _key(number) if len(labels) > 1 else ""
        credited = "" if credit is None else f' <span class="quiet">{credit:.2f}</span>'
        parts.append(f'<p class="answer {kind}">{key}{shown}{credited}</p>')
    if sample.truth:
        parts.append(f'<p class="quiet">truth: {_(sample.truth)}</p>')
    return f'<div class="sample" data-row="{sample.number}">{"".join(parts)}</div>'


def _settings(label: str, run: dict[str, Any]) -> str:
    facts = {name: value for name, value in run["run"].items() if name != "template"}
    lines = [f"{name}: {value}" for name, value in facts.items()]
    prompts = [
        f"{entry['title']} ({entry['max_new_tokens']} new tokens at most):\n{entry['prompt']}"
        for entry in run["benchmarks"].values()
        if "prompt" in entry
    ]
    return (
        f"<h3>{_(label)}</h3><pre>{_(chr(10).join(lines))}</pre>"
        f"<details><summary>Chat template</summary><pre>{_(run['run']['template'])}</pre></details>"
        "<details><summary>First prompt of each benchmark</summary>"
        f"<pre>{_((chr(10) * 2).join(prompts))}</pre></details>"
    )
