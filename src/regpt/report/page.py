"""The report as one HTML page that loads nothing: every word that comes from a run is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from regpt.durations import duration
from regpt.report.charts import (
    COLOURS,
    GIB,
    Chart,
    chart_data,
    charts,
    exponent,
    headline,
    last_step,
    marker,
    said,
    svg,
)
from regpt.report.history import History, finite
from regpt.report.numbers import (
    NUMBERS,
    cautions,
    differing,
    flat_figures,
    flat_settings,
    groups,
    report_values,
    summary,
)

MARK = "<!-- written by regpt report -->"
"""In the second line of every page of ours, so that no other file is overwritten."""
ALONE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
SERVED = f"{ALONE}; connect-src 'self'"
SAMPLES = 24  # shown at most, evenly over the run
SAMPLE_CHARS = 2000
NOTES = 60
DASH = "–"


def page(histories: Sequence[History], *, price: float | None = None, live: bool = False) -> str:
    """The whole page.

    Args:
        price: money an hour of the machine costs.
        live: served while training: it fetches what is new from where it came.
    """
    drawn = charts(histories)
    data = chart_data(histories, drawn)
    parts = sections(histories, drawn, data, price)
    title = histories[0].label if len(histories) == 1 else f"{len(histories)} runs"
    main = "".join(
        [
            _controls(live),
            f'<div id="charts">{parts["charts"]}</div>',
            *(f'<div id="{name}">{parts[name]}</div>' for name in ("samples", "tables")),
        ]
    )
    script = _asset("page.js")
    text = "\n".join(
        [
            "<!doctype html>",
            MARK,
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{SERVED if live else ALONE}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)} · regpt</title>",
            f"<style>{_asset('page.css')}</style></head>",
            f'<body><main><div id="headline">{parts["headline"]}</div>{main}',
            "<footer>Written by regpt report. The file holds everything that it shows.</footer></main>",
            f'<script type="application/json" id="data">{_embedded(data)}</script>',
            f"<script>{script}</script></body></html>",
            "",
        ]
    )
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair can stand in JSON, not in a file


def update(histories: Sequence[History], *, price: float | None = None) -> str:
    """What a page that is live fetches: {"data": for the charts, "sections": {its id: HTML}} as JSON."""
    drawn = charts(histories)
    data = chart_data(histories, drawn)
    return json.dumps({"data": data, "sections": sections(histories, drawn, data, price)}, allow_nan=False)


def sections(
    histories: Sequence[History], drawn: Sequence[Chart], data: dict[str, Any], price: float | None
) -> dict[str, str]:
    """The parts of the page that grow with the run, as HTML by their id."""
    one = len(histories) == 1
    warned = "".join(f'<p class="caution">{_text(c)}</p>' for c in cautions(histories))
    head = _headline(histories[0], price) if one else _compared(histories, price)
    return {
        "headline": head + warned,
        "charts": _charts(histories, drawn, data),
        "samples": _samples(histories),
        "tables": _facts(histories[0], price) if one else _settings_compared(histories),
    }


def _text(value: object) -> str:
    """Any text as it stands, never as markup."""
    return html.escape(str(value))


def _embedded(data: object) -> str:
    """JSON inside a script element, which ends at the first </script whatever it is in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("regpt") / "report" / name).read_text(encoding="utf-8")


# --- the head ----------------------------------------------------------------------------------------------------------


def _headline(history: History, price: float | None) -> str:
    s, plan = summary(history, price), history.part("plan")
    source = flat_settings(history).get("data.source")
    preset = f"preset {s['preset']}, " if s["preset"] else ""
    total = s["total_steps"]
    done = "finished" if s["finished"] else "not finished"
    about = f"{preset}{_count(s['parameters'])} parameters on {source}: {done}, step {s['step']:,}" + (
        f" of {total:,}" if isinstance(total, int) else ""
    )
    epochs, planned = finite(plan.get("epochs")), finite(plan.get("steps"))
    passes = ""
    if epochs is not None and planned and s["step"]:
        passes = f", {epochs * (s['step'] / planned):.3g} passes over the text"
    tiles = [
        ("validation loss", _figure(s["val_loss"]), _best(s)),
        ("bits per byte", _figure(s["val_bits_per_byte"]), "validation, any tokenizer"),
        ("training loss", _figure(s["train_loss"]), "of the last logged step"),
        ("tokens", _count(s["tokens"]), f"{s['tokens']:,}{passes}"),
        ("FLOPs", exponent(s["flops"]) if s["flops"] else DASH, "as the model counts them"),
        ("tokens a second", _count(s["tokens_per_second"]), "median of the logged steps"),
        ("MFU", f"{s['mfu']:.1%}", "median") if s["mfu"] is not None else None,
        ("training time", _time(s["time_s"]), f"{_time(s['elapsed_s'])} with evaluations and saves"),
        ("peak memory", f"{s['memory_bytes'] / GIB:.2f} GiB", "") if s["memory_bytes"] else None,
        ("cost", f"{s['cost']:,.2f}", f"at {price:g} an hour") if s["cost"] is not None else None,
    ]
    for task, scores in s["tasks"].items():
        if (figure := headline(task, scores)) is not None:
            error, rows = scores.get(f"{figure}_stderr"), history.rows.get(task)
            parts = [f"± {error:.4f}" if error is not None else "", f"{rows:,} rows" if rows else ""]
            tiles.append((task, _figure(scores[figure]), " ".join([figure, ", ".join(filter(None, parts))])))
    made = [
        f'<div class="tile{" first" if i == 0 else ""}"><span>{_text(t[0])}</span><b>{_text(t[1])}</b>'
        f"<span>{_text(t[2])}</span></div>"
        for i, t in enumerate(t for t in tiles if t and t[1] != DASH)
    ]
    return f'<h1>{_text(history.label)}</h1><p class="soft">{_text(about)}</p><div class="tiles">{"".join(made)}</div>'


def _best(s: dict[str, Any]) -> str:
    if s["best_val_loss"] is None:
        return "whole split"
    return (
        "its best"
        if s["best_step"] == s["step"]
        else f"best {s['best_val_loss']:.4f} at step {s['best_step']:,}"
    )


def _compared(histories: Sequence[History], price: float | None) -> str:
    """The head of a comparison: one row a group of runs that differ only in the seed."""
    of_groups = groups(histories, price)
    by_label = {h.label: h for h in histories}
    columns = [_column(g, by_label[g["runs"][0]], price) for g in of_groups]
    names = [n for n in NUMBERS if any(n in c for c in columns)]
    names += [n for n in dict.fromkeys(n for c in columns for n in c) if n not in NUMBERS]
    seeds = any(len(g["runs"]) > 1 for g in of_groups)
    head = "".join(f"<th>{_text(', '.join(g['runs']))}{_seeds(g)}</th>" for g in of_groups)
    rows = []
    for name in names:
        cells = "".join(f'<td class="n">{_text(_spread(name, c.get(name)))}</td>' for c in columns)
        rows.append(f"<tr><th>{_text(NUMBERS.get(name, name.replace('.', ' ')))}</th>{cells}</tr>")
    alone = any(
        len(g["runs"]) == 1 and any("." in n for n in c) for g, c in zip(of_groups, columns, strict=True)
    )
    explained = "<p class='soft'>Beside a single run's score stands its standard error.</p>" if alone else ""
    explained += (
        "<p class='soft'>Runs that differ only in the seed stand together: mean ± sample standard deviation over "
        "the n finished ones, of one seed the last.</p>"
        if seeds
        else ""
    )
    return (
        f"<h1>{len(histories)} runs compared</h1>{explained}"
        f'<div class="card scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _column(group: dict[str, Any], first: History, price: float | None) -> dict[str, dict[str, float | None]]:
    """What stands under a group: means; of a run that is alone its own, with standard errors where they are known."""
    if len(group["runs"]) > 1:
        found: dict[str, dict[str, float | None]] = group["figures"]
        return found
    own = summary(first, price)
    errors = {
        f"{task}.{name.removesuffix('_stderr')}": value
        for task, scores in own["tasks"].items()
        for name, value in scores.items()
        if name.endswith("_stderr")
    }
    return {
        name: {"mean": value, "spread": errors.get(name)}
        for name, value in flat_figures(own).items()
        if value is not None
    }


def _seeds(group: dict[str, Any]) -> str:
    if len(group["runs"]) == 1:
        return '<div class="unit">not finished: so far</div>' if group["unfinished"] else ""
    if not group["n"]:
        return f'<div class="unit">none of {len(group["runs"])} is finished, so there is no mean</div>'
    left_out = [
        f"{group[name]} {why}"
        for name, why in (("unfinished", "not finished"), ("repeated", "of a seed that is there again"))
        if group[name]
    ]
    of = f" of {len(group['runs'])}; {', '.join(left_out)}" if left_out else ""
    return f'<div class="unit">n = {group["n"]}{of}, seeds {_text(", ".join(map(str, group["seeds"])))}</div>'


def _spread(name: str, figure: dict[str, Any] | None) -> str:
    if figure is None:
        return DASH
    mean, spread = figure["mean"], figure["spread"]

    def text(value: float) -> str:
        if name == "memory_bytes":
            return f"{value / GIB:.2f} GiB"
        if name in ("time_s", "elapsed_s"):
            return _time(value)
        if name == "flops":
            return exponent(value)
        if name in ("step", "tokens", "tokens_per_second"):
            return f"{value:,.0f}" if abs(value) < 1e6 else said(value)
        if name.endswith("perplexity"):
            return said(value)
        return f"{value:.2%}" if name == "mfu" else f"{value:,.2f}" if name == "cost" else f"{value:.4f}"

    return text(mean) + (f" ± {text(spread)}" if spread is not None else "")


# --- charts ------------------------------------------------------------------------------------------------------------


def _controls(live: bool) -> str:
    axes = (("step", "steps"), ("tokens", "tokens"), ("time_s", "time"), ("flops", "FLOPs"))
    buttons = "".join(
        f'<button type="button" data-axis="{key}" aria-pressed="{"true" if key == "step" else "false"}">{name}</button>'
        for key, name in axes
    )
    return (
        '<div class="controls" id="controls" hidden>'
        f'<div class="axis" role="group" aria-label="horizontal axis">{buttons}</div>'
        '<label>smoothing <input type="range" id="smooth" min="0" max="100" value="0">'
        '<output id="smooth-said" for="smooth">off</output></label>'
        '<label><input type="checkbox" id="log"> logarithmic</label>'
        '<label><input type="checkbox" id="outliers"> outliers</label>'
        '<button type="button" class="plain-button" id="zoom-out" hidden>show all</button>'
        + ('<span id="live" role="status">live</span>' if live else "")
        + "</div>"
    )


def _charts(histories: Sequence[History], drawn: Sequence[Chart], data: dict[str, Any]) -> str:
    several = len(histories) > 1
    legend = ""
    if several:
        keys = "".join(_key(f"run:{i}", h.label, i % COLOURS, "dots", i) for i, h in enumerate(histories))
        legend = f'<div class="legend" role="group" aria-label="runs">{keys}</div>'
    figures, end = [], last_step(data)
    for chart, of_chart in zip(drawn, data["charts"], strict=True):
        own = ""
        if chart.id == "loss":
            training, validation = (7, 7) if several else (0, 1)
            own = (
                '<div class="legend" role="group" aria-label="curves">'
                + _key("line:loss:training", "training", training, "thin")
                + _key("line:loss:validation", "validation, the whole split", validation, "dots")
                + "</div>"
            )
        elif any(line.second for line in chart.lines):
            own = _figures_legend(chart)
        unit = f' <span class="unit">{_text(chart.unit)}</span>' if chart.unit else ""
        sources = "".join(f"<p>{_text(f'{b.label}: {b.source}')}</p>" for b in chart.baselines)
        note = f"<details><summary>The dashed lines</summary>{sources}</details>" if sources else ""
        figures.append(
            f'<figure class="chart{" wide" if chart.wide else ""}"><h3>{_text(chart.title)}{unit}</h3>{own}'
            f'<div class="plot" tabindex="0" data-plot="{_text(chart.id)}">{svg(chart, of_chart, end)}'
            f'<div class="tip" hidden></div></div>{note}</figure>'
        )
    hint = '<p class="soft" id="axis-name" style="font-size:12.5px;margin-top:8px"></p>'
    return f'{legend}<div class="charts">{"".join(figures)}</div>{hint}'


def _figures_legend(chart: Chart) -> str:
    """Which curve is which, in a chart of two figures of a task."""
    several = len({line.run for line in chart.lines}) > 1
    parts = {line.part: line for line in chart.lines}
    keys = "".join(
        _key(
            f"line:{chart.id}:{part}",
            part,
            7 if several else line.colour,
            "dotted" if line.second else "dots",
        )
        for part, line in parts.items()
    )
    return f'<div class="legend" role="group" aria-label="curves">{keys}</div>'


def _key(toggle: str, name: str, colour: int, style: str, run: int = 0) -> str:
    width = {"thin": 1.4, "dots": 2.2, "dotted": 2.2}[style]
    dots = f'<g style="fill:var(--c{colour})">{marker(run, 12, 5)}</g>' if style != "thin" else ""
    dotted = ' class="second"' if style == "dotted" else ""
    return (
        f'<button type="button" data-toggle="{_text(toggle)}" aria-pressed="true"><svg viewBox="0 0 24 10" aria-hidden="true">'
        f'<line{dotted} x1="1" x2="23" y1="5" y2="5" style="stroke:var(--c{colour})" stroke-width="{width}"/>{dots}</svg>'
        f"{_text(name)}</button>"
    )


# --- samples, settings, facts --------------------------------------------------------------------------------------------


def _samples(histories: Sequence[History]) -> str:
    parts = []
    for h in histories:
        if not h.samples:
            continue
        shown = _evenly(h.samples) if len(histories) == 1 else h.samples[-1:]
        rows = "".join(_sample(s, h) for s in shown)
        name = f"<h3 style='margin:14px 0 6px'>{_text(h.label)}</h3>" if len(histories) > 1 else ""
        left = ""
        if len(histories) == 1 and len(shown) < len(h.samples):
            left = f'<p class="soft">{len(shown)} of {len(h.samples)}, evenly over the run.</p>'
        parts.append(f'{name}<div class="card">{rows}</div>{left}')
    title = "What it wrote as it learned" if len(histories) == 1 else "What each wrote last"
    return f"<h2>{title}</h2>{''.join(parts)}" if parts else ""


def _evenly(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SAMPLES of them, the first and the last among them."""
    if len(samples) <= SAMPLES:
        return samples
    return [samples[round(i * (len(samples) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]


def _sample(sample: dict[str, Any], history: History) -> str:
    loss = ""
    if (val := history.series.get("val_loss")) is not None:
        at = val.value[val.step == sample["step"]]
        loss = f"<div>validation {at[0]:.3f}</div>" if len(at) else ""
    prompt, text = sample["prompt"], sample["text"]
    if len(text) > SAMPLE_CHARS:
        text = text[:SAMPLE_CHARS] + " …"
    marked = f"<mark>{_text(prompt)}</mark>" if prompt.strip() else _text(prompt)
    # A newline at the very beginning of a pre is dropped by HTML, so one stands there to be dropped.
    return f'<div class="sample"><div><b>step {sample["step"]:,}</b>{loss}</div><pre>\n{marked}{_text(text)}</pre></div>'


def _facts(history: History, price: float | None) -> str:
    settings = flat_settings(history)
    changed = history.part("preset").get("differs")
    name = history.part("preset").get("name")
    if not name:
        differs = '<p class="soft">The run does not say from which preset it was made.</p>'
    elif isinstance(changed, dict) and changed:
        rows = [
            (k, f"{_plain(v[0])} → {_plain(v[1])}")
            for k, v in changed.items()
            if isinstance(v, list) and len(v) == 2
        ]
        differs = _table(rows)
    else:
        differs = f'<p class="soft">Nothing: these are the settings of {_text(name)}.</p>'
    cards = [("What differs from the preset" + (f" {name}" if name else ""), differs)]
    cards += [(title, _table(rows)) for title, rows in _fact_rows(history, settings).items() if rows]
    grid = "".join(f'<div class="card"><h3>{_text(title)}</h3>{body}</div>' for title, body in cards)
    all_settings = _table([(k, _plain(v)) for k, v in settings.items()])
    notes = ""
    if history.notes:
        rows = [(f"step {step:,}", text) for step, text in history.notes[-NOTES:]]
        notes = f'<h2>What happened on the way</h2><div class="card">{_table(rows)}</div>'
    return (
        f'<h2>The run</h2><div class="facts">{grid}</div>{notes}'
        f'<details><summary>All {len(settings)} settings</summary><div class="card">{all_settings}</div></details>'
    )


def _fact_rows(history: History, settings: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Facts under their headings, each a name and its value; what the record lacks is left out."""
    plan, machine, versions = (history.part(k) for k in ("plan", "machine", "versions"))
    facts, sittings = history.part("facts"), history.record.get("sittings")
    of_splits = facts.get("tokens")
    splits = of_splits if isinstance(of_splits, dict) else {}
    memory = finite(machine.get("memory_bytes"))
    found: dict[str, list[tuple[str, object]]] = {
        "Model": [
            ("kind", settings.get("model.arch")),
            ("layers × width", f"{settings.get('model.n_layer')} × {settings.get('model.n_embd')}"),
            ("heads", settings.get("model.n_head")),
            ("context", settings.get("model.block_size")),
            ("parameters", _whole(plan.get("parameters"))),
            ("FLOPs a token", _whole(plan.get("flops_per_token"))),
        ],
        "Data and tokenizer": [
            ("text", settings.get("data.source")),
            ("held out", settings.get("data.val_fraction")),
            *((f"{name} tokens", _whole(n)) for name, n in splits.items()),
            ("tokenizer", settings.get("tokenizer.name")),
            ("vocabulary", _whole(plan.get("vocab_size"))),
            ("tokenizer fingerprint", str(facts.get("tokenizer_fingerprint") or "")[:16] or None),
            ("data fingerprint", facts.get("data_fingerprint")),
        ],
        "Training": [
            ("optimiser", settings.get("optim.name")),
            ("learning rate", settings.get("optim.lr")),
            ("batch", f"{_whole(settings.get('train.batch_tokens'))} tokens"),
            ("arithmetic", plan.get("dtype")),
            ("compiled", plan.get("compile")),
            ("seed", settings.get("seed")),
            ("sittings", len(sittings) if isinstance(sittings, list) else None),
            ("begun", sittings[0] if isinstance(sittings, list) and sittings else None),
        ],
        "Machine and versions": [
            ("device", machine.get("name")),
            ("ranks", plan.get("world")),
            ("memory", f"{memory / GIB:.1f} GiB" if memory is not None else None),
            ("threads", machine.get("threads")),
            *((name, versions.get(name)) for name in ("regpt", "commit", "torch", "python", "platform")),
        ],
    }
    return {title: [(k, _plain(v)) for k, v in rows if v is not None] for title, rows in found.items()}


def _settings_compared(histories: Sequence[History]) -> str:
    """Which settings are not the same in all runs."""
    differs = differing(histories)
    if not differs:
        return '<h2>Settings</h2><p class="soft">All runs have the same settings.</p>'
    head = "".join(f"<th>{_text(h.label)}</th>" for h in histories)
    rows = "".join(
        f"<tr><th>{_text(k)}</th>{''.join(f'<td>{_text(_plain(v))}</td>' for v in values)}</tr>"
        for k, values in differs.items()
    )
    return (
        '<h2>Settings that differ</h2><div class="card scroll"><table><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows)
    return f"<table><tbody>{body}</tbody></table>"


# --- words for numbers -----------------------------------------------------------------------------------------------------


def _figure(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def _count(value: object) -> str:
    number = finite(value)
    return said(float(f"{number:.3g}")) if number is not None else DASH


def _whole(value: object) -> str | None:
    number = finite(value)
    return f"{number:,.0f}" if number is not None else None


def _plain(value: object) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _time(seconds: float | None) -> str:
    return DASH if seconds is None else duration(seconds)


__all__ = ["MARK", "page", "report_values", "update"]
