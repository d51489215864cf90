"""What a run has to tell, as one page: curves, mixture, scores before and after, sample answers, settings.

Everything is read from the run directory, so a page can be made while the run goes on, and again when it is done. What
is not there yet (no evaluation so far, no manifest) is said, not guessed.
"""

import json
import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.table import Table

from itjax.base import tree
from itjax.base.files import write_whole
from itjax.data.tasks import FAMILIES
from itjax.evaluation import chart, history, page
from itjax.evaluation.chart import Curve, percent
from itjax.evaluation.history import LOSS, History, Key
from itjax.evaluation.page import escape

if TYPE_CHECKING:
    from itjax.evaluation.instructions import Answer  # imports jax, which a report does not need

SAMPLES_PER_TASK = 6
FEW = 12  # sources whose losses are all listed in the terminal; of more, those that fell most and least
PHRASINGS = {"seen": "seen", "heldout": "held-out", None: ""}
STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; margin-top: 18px; }
.tile b { display: block; font-size: 21px; white-space: nowrap; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile > span { color: var(--soft); font-size: 13px; }
.share { display: inline-block; width: 36px; height: 8px; border-radius: 4px; background: var(--chip); margin-left: 8px;
  overflow: hidden; } .share i { display: block; height: 100%; background: var(--c0); }
.sample { margin-bottom: 14px; } .answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr));
  gap: 12px; margin-top: 10px; } .answers > div { background: var(--chip); border-radius: 8px; padding: 8px 12px; }
.answers h4, .sample h3 { margin: 0 0 4px; font-size: 13px; color: var(--soft); font-weight: 600; }
.sample h3 { font-size: 14px; color: var(--text); } .note { margin: 10px 0 0; }
"""


# --- samples ----------------------------------------------------------------------------------------------------------


def save_samples(run_dir: str | Path, step: int, answers: Sequence["Answer"]) -> None:
    """Keeps a few answers of each task in samples.jsonl, the same prompts at every step. A step repeated replaces its own."""
    path = Path(run_dir) / "samples.jsonl"
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    new = [{"step": step, **vars(answer)} for group in by_task.values() for answer in _spread(group)]
    kept = [line for line in history.lines_of(path) if line["step"] != step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept + new))


def _spread(answers: Sequence["Answer"]) -> list["Answer"]:
    """A few, evenly over all: of two phrasing groups, one after the other, as many of each."""
    count = min(SAMPLES_PER_TASK, len(answers))
    return [answers[number * len(answers) // count] for number in range(count)]


# --- tables for the terminal ------------------------------------------------------------------------------------------


def task_table(run_dir: str | Path) -> Table:
    """Each family before and after: its primary metric and valid JSON, on phrasings trained on and on others."""
    run = history.read(run_dir)
    before, after = _first_and_last([values for key, values in run.scores.items() if key.metric != LOSS])
    table = Table(title=f"answers to held-out questions: step {before} -> step {after}", title_justify="left")
    table.add_column("family")
    table.add_column("metric")
    for title in ("seen phrasings", "held-out phrasings"):
        table.add_column(title, justify="right")
    for task in run.tasks():
        for metric in (run.primary(task), "valid_json"):
            cells = [_change(run.scores.get(Key(task, split, metric)), before) for split in ("seen", "heldout")]
            if any(cells):
                table.add_row(markup.escape(task), metric.replace("_", " "), *(cell or "-" for cell in cells))
    table.add_section()
    for words, chosen in (("primary metric", None), ("valid json", "valid_json")):
        cells = [_change(history.average(run, split, chosen), before) for split in ("seen", "heldout")]
        if any(cells):
            table.add_row("average", words, *(cell or "-" for cell in cells), style="bold")
    return table


def loss_table(run_dir: str | Path) -> Table:
    """Held-out loss of each source, first and last; of very many sources, those whose loss fell most and least."""
    run = history.read(run_dir)
    losses = run.losses()
    before, after = _first_and_last(list(losses.values()))
    table = Table(title=f"held-out loss: step {before} -> step {after}", title_justify="left")
    table.add_column("source")
    for title in ("first", "last", "change"):
        table.add_column(title, justify="right")
    ends = sorted(
        ((_label(key), *history.ends(values)) for key, values in losses.items()), key=lambda row: row[2] - row[1]
    )
    listed = ends if len(ends) <= FEW else [*ends[: FEW // 3], *ends[-FEW // 3 :]]
    for number, (name, first, last) in enumerate(listed):
        if len(listed) < len(ends) and number == FEW // 3:
            table.add_row(f"... {len(ends) - len(listed)} between", "", "", "", style="dim")
        table.add_row(markup.escape(name), *_loss_cells(first, last))
    if ends:
        means = [statistics.fmean(column) for column in zip(*(row[1:] for row in ends), strict=True)]
        table.add_section()
        table.add_row(f"mean of {len(ends)}", *_loss_cells(*means), style="bold")
    return table


def next_commands(run_dir: str | Path, *, config: str) -> str:
    """What to try next, as commands one can paste."""
    return (
        "See what the model was trained on, token by token:\n"
        f"  python -m itjax.show --config={config} --html={shlex.quote(str(Path(run_dir) / 'rows.html'))}\n"
        "Prove on this machine that packing, micro-batches and meshes change nothing:\n"
        f"  python -m itjax.verify --config={config}\n"
        "Train on your own files:\n"
        "  python -m itjax.main --config=configs/sft_files.py --config.files='my/*.jsonl' --config.run_dir=runs/mine"
    )


def _first_and_last(found: Sequence[Mapping[int, float]]) -> tuple[int | str, int | str]:
    steps = [step for values in found for step in values]
    return (min(steps), max(steps)) if steps else ("-", "-")


def _change(values: Mapping[int, float] | None, before: int | str) -> str:
    """`0% -> 97%`; of a metric that was not measured at the first evaluation, the last value alone."""
    if not values:
        return ""
    first, last = history.ends(values)
    return f"{percent(first)} -> {percent(last)}" if before in values and len(values) > 1 else percent(last)


def _loss_cells(first: float, last: float) -> tuple[str, str, str]:
    return f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}"


def _label(key: Key) -> str:
    return f"{key.task} ({PHRASINGS.get(key.template_split, key.template_split)})" if key.template_split else key.task


# --- the page of one run ----------------------------------------------------------------------------------------------


def write(run_dir: str | Path) -> Path:
    """Makes run_dir/report.html and returns its path."""
    run = history.read(run_dir)
    parts = (_header, _curves, _evaluations, _losses, _mixture, _samples, _settings)
    body = "\n".join(part(run) for part in parts)
    return _save(run.path / "report.html", f"{run.path.name}: training report", body)


def _save(path: Path, title: str, body: str) -> Path:
    text = page.document(title, body, style=chart.STYLE + STYLE, script=chart.SCRIPT)
    write_whole(path, text)
    return path


def _header(run: History) -> str:
    last = run.train[-1] if run.train else None
    step, whole = (last["step"] if last else 0), run.num_steps
    state = f"step {step:,} of {whole:,}" if whole else f"step {step:,}"
    state += "" if whole and step >= whole else ", not finished"
    words = [f"model {run.config['model']}"] if run.config else []
    words += [f"seed {run.config['seed']}"] if run.config else []
    tiles = "".join(f'<div class="card tile"><b>{value}</b><span>{name}</span></div>' for name, value in _headline(run))
    return (
        f'<h1>{escape(run.path.resolve().name)}</h1><p class="soft">{escape(" · ".join([state, *words]))}</p>'
        f'<div class="tiles">{tiles}</div>'
    )


def _headline(run: History) -> Iterator[tuple[str, str]]:
    """The few numbers that one asks for first."""
    losses = [line["loss"] for line in run.train if line["loss"] is not None]
    if losses:
        yield f"training loss, mean of last {len(losses[-20:])}", f"{statistics.fmean(losses[-20:]):.3f}"
    held = history.mean(list(run.losses().values()))
    if held:
        first, last = history.ends(held)
        yield "held-out loss, mean of sources", _arrow(f"{first:.3f}", f"{last:.3f}", len(held))
    for split, words in (("heldout", "held-out phrasings"), ("seen", "seen phrasings")):
        if scores := history.average(run, split, None):
            first, last = history.ends(scores)
            yield f"right answers, {words}", _arrow(percent(first), percent(last), len(scores))
    if run.train:
        logged = [line["tokens_per_second"] for line in run.train]
        yield "tokens per second, median", chart.number(statistics.median(logged))
        yield "fill of rows", percent(statistics.fmean(line["fill"] for line in run.train))
        yield "epochs", f"{run.train[-1]['epoch']:.2f}"
        if skipped := sum(bool(line["skipped"]) for line in run.train):
            yield "steps skipped, not finite", f'<span class="bad">{skipped}</span>'


def _arrow(first: str, last: str, count: int) -> str:
    return f"{first} → {last}" if count > 1 else last


def _curves(run: History) -> str:
    def of_step(name: str) -> list[Curve]:
        return [Curve(name, [(line["step"], line.get(name)) for line in run.train])]

    charts = [
        chart.plot("Training loss", of_step("loss")),
        _loss_chart(run),
        _score_chart(run),
        chart.plot("Gradient norm", of_step("grad_norm"), from_zero=True),
        chart.plot("Learning rate", of_step("learning_rate"), from_zero=True),
        chart.plot("Tokens per second", of_step("tokens_per_second"), from_zero=True),
        chart.plot("Model FLOPs utilisation", of_step("mfu"), from_zero=True, shown=percent),
        chart.plot("Fill of rows", of_step("fill"), shown=percent, from_zero=True, to_one=True),
    ]
    found = "".join(charts)
    return _section(
        "Curves", f'<div class="charts">{found}</div>' if found else _nothing("No step has been logged yet.")
    )


def _loss_chart(run: History) -> str:
    losses = run.losses()
    tasks = list(dict.fromkeys(key.task for key in losses))
    curves = [
        Curve(_label(key), list(values.items()), color=tasks.index(key.task), dashed=key.template_split == "heldout")
        for key, values in losses.items()
    ]
    if len(curves) > chart.MANY:
        mean = Curve("mean of sources", list(history.mean(list(losses.values())).items()), main=True)
        curves = [*curves, mean]
    return chart.plot("Held-out loss", curves)


def _score_chart(run: History) -> str:
    curves = []
    for color, task in enumerate(run.tasks()):
        for split in ("seen", "heldout", None):
            values = run.scores.get(Key(task, split, run.primary(task)))
            if values:
                label = _label(Key(task, split, ""))
                curves.append(Curve(label, list(values.items()), color=color, dashed=split == "heldout"))
    return chart.plot("Right answers, by phrasings", curves, shown=percent, from_zero=True, to_one=True)


def _evaluations(run: History) -> str:
    if not run.tasks():
        return ""
    before, after = _first_and_last([values for key, values in run.scores.items() if key.metric != LOSS])
    rows: list[list[str]] = []
    strong = []
    for task in run.tasks():
        metrics = dict.fromkeys(key.metric for key in run.scores if key.task == task and key.metric != LOSS)
        for metric in sorted(metrics, key=lambda name: name != run.primary(task)):
            if metric == run.primary(task):
                strong.append(len(rows))
            cells = [cell for split in ("seen", "heldout") for cell in _before_after(run, Key(task, split, metric))]
            rows.append([escape(task), escape(metric.replace("_", " ")), *cells])
    strong.append(len(rows))
    means = [_cells(history.average(run, split, None)) for split in ("seen", "heldout")]
    rows.append(["average", "bold lines above", *means[0], "", *means[1], ""])
    head = ["family", "metric", "seen, before", "after", "answers", "held-out, before", "after", "answers"]
    words = (
        f"Questions that were never trained on, at step {before} and step {after}. Seen: in phrasings that training used; "
        "held-out: in phrasings that it did not."
    )
    return _section("Answers before and after", page.table(head, rows, left=2, strong=strong), words)


def _before_after(run: History, key: Key) -> list[str]:
    return [*_cells(run.scores.get(key, {})), f"{run.counts[key]:,}" if key in run.counts else ""]


def _cells(values: Mapping[int, float]) -> list[str]:
    """First and last; one evaluation alone is the last."""
    if not values:
        return ["–", "–"]
    first, last = history.ends(values)
    return [percent(first) if len(values) > 1 else "–", percent(last)]


def _losses(run: History) -> str:
    losses = run.losses()
    if not losses:
        return _section("Held-out loss", _nothing("No evaluation has been logged yet."))
    rows = []
    for key, values in losses.items():
        first, last = history.ends(values)
        rows.append([escape(_label(key)), *_page_loss(first, last), f"{run.counts[key]:,}"])
    means = [
        statistics.fmean(column) for column in zip(*(history.ends(values) for values in losses.values()), strict=True)
    ]
    rows.append([f"mean of {len(losses)}", *_page_loss(*means), f"{sum(run.counts[key] for key in losses):,}"])
    head = ["source", "first", "last", "change", "tokens"]
    before, after = _first_and_last(list(losses.values()))
    words = f"Mean loss of held-out tokens in nats, at step {before} and step {after}."
    return _section("Held-out loss", page.table(head, rows, strong=[len(rows) - 1]), words)


def _page_loss(first: float, last: float) -> list[str]:
    kind = "good" if last < first else "bad" if last > first else "soft"
    return [f"{first:.3f}", f"{last:.3f}", f'<span class="{kind}">{last - first:+.3f}</span>']


def _mixture(run: History) -> str:
    sources = run.manifest.get("sources")
    if not sources:
        return _section("Mixture", _nothing("There is no data_manifest.json."))
    head = ["source", "rows", "kept", "truncated", "dropped", "epochs"]
    head += ["examples: planned", "realised", "tokens: planned", "realised", "trained: planned", "realised"]
    rows = [_mixture_row(name, source) for name, source in sources.items()]
    plan = run.manifest["plan"]
    words = (
        f"{plan['examples']:,} examples, {plan['tokens']:,} tokens ({percent(plan['trained_share'])} of them trained) in "
        f"{plan['num_rows']:,} rows; fill {percent(plan['fill'])}, {plan['epochs']:.2f} epochs."
    )
    return _section("Mixture", page.table(head, rows), words)


def _mixture_row(name: str, source: Mapping[str, Any]) -> list[str]:
    dropped = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in source["dropped"].items() if count)
    rows = source["kept"] + sum(source["dropped"].values())  # each phrasing of a row is one
    counts = [f"{count:,}" for count in (rows, source["kept"], source["truncated"])]
    shares = []
    for unit in ("examples", "tokens", "trained_tokens"):
        realised = source["realised_share"][unit]
        bar = f'<span class="share"><i style="width:{realised:.1%}"></i></span>'
        shares += [percent(source["planned_share"][unit]), percent(realised) + bar]
    return [escape(name), *counts, dropped or "–", f"{source['epochs']:.2f}", *shares]


def _samples(run: History) -> str:
    steps = sorted({line["step"] for line in run.samples})
    if not steps:
        return ""
    by_prompt: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for line in run.samples:
        by_prompt.setdefault((line["task"], line["template"], line["prompt"]), {})[line["step"]] = line
    shown = [found for found in by_prompt.values() if steps[-1] in found]
    body = "".join(_sample(run, found, steps[0], steps[-1]) for found in shown)
    return _section("Sample answers", body, f"The same questions at step {steps[0]} and step {steps[-1]}.")


def _sample(run: History, found: Mapping[int, Mapping[str, Any]], first: int, last: int) -> str:
    line = found[last]
    family = run.family(line["task"])
    heldout = {template.name for template in FAMILIES[family].templates if template.heldout} if family else set()
    kind = "held-out phrasing" if line["template"] in heldout else "phrasing"
    answers = f"<div><h4>reference</h4><pre>{escape(line['reference'])}</pre></div>"
    for step in dict.fromkeys([first, last]):
        if step in found:
            answers += f"<div><h4>step {step}: {_verdict(found[step])}</h4><pre>{escape(found[step]['completion'])}</pre></div>"
    return (
        f'<details class="card sample"{" open" if line["template"] in heldout else ""}><summary>{escape(line["task"])} '
        f'<span class="soft">· {kind} {escape(line["template"])}</span> {_verdict(line)}</summary>'
        f'<pre class="note">{escape(line["prompt"])}</pre><div class="answers">{answers}</div></details>'
    )


def _verdict(line: Mapping[str, Any]) -> str:
    return " ".join(
        f'<span class="{"good" if value >= 1 else "bad"}">{"✓" if value >= 1 else "✗"} {escape(name.replace("_", " "))}</span>'
        for name, value in line["scores"].items()
    )


def _settings(run: History) -> str:
    flat = {path.replace(tree.SEPARATOR, "."): value for path, value in tree.flatten(run.config).items()}
    rows = [[escape(name), f"{escape(json.dumps(value))}"] for name, value in flat.items()]
    rows += [["plan hash", escape(run.manifest["plan"]["hash"])]] if run.manifest else []
    table = page.table(["setting", "value"], rows, left=2)
    return _section("Settings", f"<details><summary>{len(flat)} settings</summary>{table}</details>")


def _section(title: str, body: str, words: str = "") -> str:
    return f"<h2>{escape(title)}</h2>" + (f'<p class="soft">{escape(words)}</p>' if words else "") + body


def _nothing(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


# --- the page of several runs -----------------------------------------------------------------------------------------


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Several runs beside each other, as one page at `out`: their curves, scores, and the settings that differ."""
    runs = [history.read(run_dir) for run_dir in run_dirs]
    names = _names(runs)
    sections = (_overview, _common_curves, _last_scores, _differing)
    body = f"<h1>{len(runs)} runs</h1>" + "\n".join(section(runs, names) for section in sections)
    return _save(Path(out), f"{len(runs)} runs compared", body)


def _names(runs: Sequence[History]) -> list[str]:
    """The last part of each path, or the whole path where that is not enough to tell them apart."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def _overview(runs: Sequence[History], names: Sequence[str]) -> str:
    found = [dict(_headline(run)) for run in runs]
    head = list(dict.fromkeys(title for headline in found for title in headline))
    rows = [
        [
            escape(name),
            f"{run.train[-1]['step']:,}" if run.train else "0",
            *(headline.get(title, "–") for title in head),
        ]
        for name, run, headline in zip(names, runs, found, strict=True)
    ]
    return _section("At a glance", page.table(["run", "steps", *map(escape, head)], rows))


def _common_curves(runs: Sequence[History], names: Sequence[str]) -> str:
    def each(points: Callable[[History], Sequence[tuple[int, float | None]]]) -> list[Curve]:
        return [
            Curve(name, points(run), color=number, main=True)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    def of_step(name: str) -> list[Curve]:
        return each(lambda run: [(line["step"], line.get(name)) for line in run.train])

    charts = [
        chart.plot("Training loss", of_step("loss")),
        chart.plot(
            "Held-out loss, mean of sources", each(lambda run: list(history.mean(list(run.losses().values())).items()))
        ),
        *(
            chart.plot(
                f"Right answers, {words} phrasings",
                each(lambda run, split=split: list(history.average(run, split, None).items())),  # type: ignore[misc]
                shown=percent,
                from_zero=True,
                to_one=True,
            )
            for split, words in (("seen", "seen"), ("heldout", "held-out"))
        ),
        chart.plot("Gradient norm", of_step("grad_norm"), from_zero=True),
        chart.plot("Learning rate", of_step("learning_rate"), from_zero=True),
        chart.plot("Tokens per second", of_step("tokens_per_second"), from_zero=True),
    ]
    return _section("Curves", f'<div class="charts">{"".join(charts)}</div>')


def _last_scores(runs: Sequence[History], names: Sequence[str]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    if not keys:
        return ""
    rows = [
        [
            escape(key.task),
            escape(PHRASINGS.get(key.template_split, str(key.template_split))),
            escape(key.metric.replace("_", " ")),
        ]
        + [_last(run.scores.get(key), key.metric) for run in runs]
        for key in keys
    ]
    return _section("Last evaluation", page.table(["task", "phrasings", "metric", *map(escape, names)], rows, left=3))


def _last(values: Mapping[int, float] | None, metric: str) -> str:
    if not values:
        return "–"
    return f"{history.ends(values)[1]:.3f}" if metric == LOSS else percent(history.ends(values)[1])


def _differing(runs: Sequence[History], names: Sequence[str]) -> str:
    flat = [tree.flatten(run.config) for run in runs]
    paths = [path for path in dict.fromkeys(path for one in flat for path in one) if path != "run_dir"]
    rows = [
        [escape(path.replace(tree.SEPARATOR, ".")), *(escape(json.dumps(one.get(path))) for one in flat)]
        for path in paths
        if any(one.get(path) != flat[0].get(path) for one in flat)
    ]
    if not rows:
        return _section("Settings that differ", _nothing("None."))
    return _section("Settings that differ", page.table(["setting", *map(escape, names)], rows))


def default_comparison(first: str | Path) -> Path:
    """Where a comparison goes: beside the first run's folder."""
    return Path(os.path.abspath(first)).parent / "comparison.html"
