"""One self-contained page about a run, and the same numbers as JSON.

The page needs no network, reads on a phone, and follows the reader's light or dark mode. It says
first what was reached and what was not: a task counts as learnt only if it beats both the untrained
model and the trivial baseline, and each that does not is named with the reasons that the numbers
give.
"""

import base64
import dataclasses
import functools
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.figure import Figure

# One color a task throughout the page, readable on white and on black; a task not named here takes
# a spare one.
COLORS = {
    "t2i": "#3b82f6",
    "ie": "#e8720c",
    "ip": "#12a594",
    "lg": "#9a6bff",
    "depth": "#c9a100",
    "pose": "#e5484d",
    "seg": "#46a758",
    "id": "#d6409f",
}
SPARE_COLORS = ("#0ea5b7", "#8d8d8d", "#a06a42", "#6e56cf")
# Stand-ins that matplotlib draws and the page's style replaces, so that plots follow the mode too.
INK, FAINT = "#010203", "#030201"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one training run left in its workdir: `summary.json` and the rows of `metrics.jsonl`."""

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, int | float]]

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "Stage":
        """Raises FileNotFoundError naming the file if the stage has not finished."""
        workdir = epath.Path(workdir)
        summary = _read(workdir / "summary.json", "the training of this stage writes it at its end")
        lines = _read(
            workdir / "metrics.jsonl", "the training of this stage writes it"
        ).splitlines()
        return cls(
            summary=json.loads(summary), rows=[json.loads(line) for line in lines if line.strip()]
        )

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, where it was logged and finite."""
        points = [(r["step"], r[name]) for r in self.rows if name in r and math.isfinite(r[name])]
        steps, values = zip(*points) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def median(self, name: str) -> float:
        values = self.series(name)[1]
        return float(np.median(values)) if len(values) else math.nan

    def total(self, prefix: str) -> dict[str, int | float]:
        """The sums of all metrics `prefix/<name>`, by name."""
        sums: dict[str, float] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith(prefix + "/"):
                    sums[key[len(prefix) + 1 :]] = sums.get(key[len(prefix) + 1 :], 0.0) + value
        return sums

    @property
    def images(self) -> dict[str, int | float]:
        """Training images of every task, as counted, or else as the realized share of all rows."""
        if counted := self.total("count"):
            return counted
        batch = self.summary.get("config", {}).get("data", {}).get("batch_size", 0)
        return {
            task: share * batch * self.summary["steps"]
            for task, share in self.summary["shares"].items()
        }


def write_report(
    run_dir: epath.PathLike,
    out_html: epath.PathLike,
    out_json: epath.PathLike,
    *,
    stages: Sequence[epath.PathLike],
    evaluation: epath.PathLike,
) -> None:
    """Writes the page and the JSON of the run `run_dir`, from its `stages` (workdirs) and its
    `evaluation` folder.

    Raises FileNotFoundError naming what has not been written yet.
    """
    runs = [Stage.read(workdir) for workdir in stages]
    evaluation = epath.Path(evaluation)
    results = json.loads(_read(evaluation / "results.json", "`univg evaluate` writes it"))
    seen: dict[str, float] = {}
    for run in runs:
        for task, n in run.images.items():
            seen[task] = seen.get(task, 0.0) + n
    page = _environment().get_template("report.html.jinja")
    text = page.render(
        name=epath.Path(run_dir).name,
        headline=_headline(results["tasks"]),
        tasks=[_task_view(name, task, seen, evaluation) for name, task in results["tasks"].items()],
        stages=[_stage_view(run) for run in runs],
        totals=_totals(runs),
        settings=results["settings"],
    )
    for path, content in (
        (out_html, text),
        (out_json, json.dumps(_as_json(runs, results), indent=1) + "\n"),
    ):
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def _read(path: epath.Path, origin: str) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {origin}")
    return path.read_text()


def _as_json(runs: Sequence[Stage], results: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: int | float | None) -> int | float | None:
        return None if value is None or not math.isfinite(value) else value  # JSON has no NaN

    stages = {
        run.summary["stage"]: {
            **{key: run.summary[key] for key in ("steps", "seconds", "first_loss", "last_loss")},
            "mixture": run.summary["shares"],
        }
        for run in runs
    }
    tasks = {}
    for name, task in results["tasks"].items():
        values = {system: number(_value(task, system)) for system in task["systems"]}
        tasks[name] = {
            "metric": task["metric"],
            "better": task["metrics"][task["metric"]]["better"],
            "value": values["model"],
            "untrained": values.get("untrained"),
            "trivial": values["trivial"],
            "trivial_name": task["trivial"]["chosen"],
            "ceiling": values.get("codec"),
            "real": values.get("real"),
            "beats_both": _beats_both(task),
            "references": {
                ref: number(entry.get(task["metric"], {}).get("value"))
                for ref, entry in task["references"].items()
            },
            "secondary": {
                key: {system: number(_value(task, system, key)) for system in task["systems"]}
                for key in task["metrics"]
                if key != task["metric"]
            },
            "examples": task["examples"],
        }
    return {"stages": stages, "tasks": tasks, "settings": results["settings"]}


# --- words ---


def _value(task: Mapping[str, Any], system: str, metric: str | None = None) -> int | float:
    entry = task["systems"].get(system, {}).get(metric or task["metric"], {})
    value = entry.get("value")
    return math.nan if value is None else value


def _beats_both(task: Mapping[str, Any]) -> bool:
    """An opponent that was not measured is not beaten."""
    return bool(task["beats"].get("untrained")) and bool(task["beats"].get("trivial"))


def _headline(tasks: Mapping[str, Any]) -> dict[str, Any]:
    failed = [task["title"].lower() for task in tasks.values() if not _beats_both(task)]
    n, count = len(tasks), len(tasks) - len(failed)
    if not n:
        return {"good": False, "count": 0, "of": 0, "text": "No task was evaluated.", "failed": []}
    text = "Every task beats" if not failed else f"{count} of {n} tasks beat"
    return {
        "good": not failed,
        "count": count,
        "of": n,
        "text": f"{text} both the untrained model and the trivial baseline",
        "failed": failed,
    }


def format_value(value: int | float | None, metric: Mapping[str, Any]) -> str:
    """A metric's value as people read it: percent where the metric says so, three figures
    otherwise.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if metric.get("percent"):
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def explain(
    task: Mapping[str, Any], images_seen: int | float, share_seen: int | float
) -> list[str]:
    """Why a task fails, in plain sentences from its numbers; empty if it beats both opponents."""
    metric = task["metrics"][task["metric"]]
    show = functools.partial(format_value, metric=metric)
    sign = 1 if metric["better"] == "higher" else -1
    model, trivial, codec = (_value(task, s) for s in ("model", "trivial", "codec"))
    sentences = []
    for opponent, words in (
        ("untrained", "the untrained model"),
        ("trivial", f"“{task['trivial']['chosen']}”"),
    ):
        if task["beats"].get(opponent):
            continue
        other = _value(task, opponent)
        if not math.isfinite(other):
            sentences.append(f"It was not compared with {words}.")
        else:
            sentences.append(f"{show(model)} does not beat {words} at {show(other)}.")
    if not sentences:
        return []
    error = task["systems"]["model"][task["metric"]].get("stderr")
    if math.isfinite(codec) and sign * (codec - trivial) <= 0:
        sentences.append(
            f"Nor does the codec's reconstruction of the true answer ({show(codec)}): "
            "the codec is the limit here, not the model."
        )
    elif error and abs(model - trivial) < 2 * error:
        sentences.append(
            f"The difference to the trivial baseline is below two standard errors of the model's value ({show(error)}, "
            f"{task['examples']} examples)."
        )
    if not images_seen:
        sentences.append("No stage of this run trained the task.")
    else:
        sentences.append(
            f"The task saw {images_seen:,.0f} training images, {100 * share_seen:.0f} % of all that were shown."
        )
    if task.get("difficulty"):
        sentences.append(f"A likely reason, not measured: {task['difficulty']}")
    return sentences


def _caveats(task: Mapping[str, Any]) -> list[str]:
    """Lines beside the verdict: the references' values, and secondary metrics on which the model is
    no better.
    """
    lines = []
    for name, entry in task.get("references", {}).items():
        metric = task["metrics"][task["metric"]]
        value = entry[task["metric"]]["value"]
        sign = 1 if metric["better"] == "higher" else -1
        words = "" if sign * (_value(task, "model") - value) > 0 else "not better than "
        lines.append(f"{words}{name}: {format_value(value, metric)}")
    for key, metric in task["metrics"].items():
        sign = 1 if metric["better"] == "higher" else -1
        model, trivial = _value(task, "model", key), _value(task, "trivial", key)
        if key != task["metric"] and sign * (model - trivial) <= 0:
            lines.append(f"not better in {metric['label']}: {format_value(model, metric)}")
    return lines


# --- views: what the template shows ---


def _color(task: str) -> str:
    return COLORS.get(task) or SPARE_COLORS[sum(map(ord, task)) % len(SPARE_COLORS)]


def _task_view(
    name: str, task: Mapping[str, Any], seen: Mapping[str, int | float], evaluation: epath.Path
) -> dict[str, Any]:
    primary = task["metrics"][task["metric"]]
    columns = [
        s for s in ("model", "untrained", "trivial", "codec", "real") if s in task["systems"]
    ]

    def row(key: str) -> dict[str, Any]:
        metric = task["metrics"][key]
        values = {s: format_value(_value(task, s, key), metric) for s in columns}
        error = task["systems"]["model"].get(key, {}).get("stderr")
        shown = format_value(error, metric) if error and math.isfinite(error) else ""
        return {
            "label": metric["label"],
            "better": metric["better"],
            "values": values,
            "error": shown,
        }

    samples = [
        {
            "prompt": sample["prompt"],
            "images": [
                (label, _data_uri(evaluation / sample[label]))
                for label in ("input", "target", "output")
                if sample.get(label)
            ],
        }
        for sample in task["samples"]
    ]
    total = sum(seen.values())
    return {
        "name": name,
        "title": task["title"],
        "color": _color(name),
        "beats": task["beats"],
        "beats_both": _beats_both(task),
        "trivial_name": task["trivial"]["chosen"],
        "examples": task["examples"],
        "primary": row(task["metric"]),
        "secondary": [row(key) for key in task["metrics"] if key != task["metric"]],
        "scale": _scale(task, primary),
        "reasons": explain(
            task, seen.get(name, 0.0), seen.get(name, 0.0) / total if total else 0.0
        ),
        "samples": samples,
        "note": task.get("note", ""),
        "references": [
            {
                "name": name,
                "values": [
                    format_value(entry.get(k, {}).get("value"), m)
                    for k, m in task["metrics"].items()
                ],
            }
            for name, entry in task.get("references", {}).items()
        ],
        # What a verdict on the primary metric does not say stands beside it, not in a footnote.
        "caveats": _caveats(task),
    }


def _scale(task: Mapping[str, Any], metric: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where each system stands between the worst (0 %) and the best (100 %) of them."""
    values = {
        s: _value(task, s)
        for s in ("untrained", "trivial", "codec", "real", "model")
        if s in task["systems"]
    }
    values = {s: v for s, v in values.items() if math.isfinite(v)}
    if "codec" in values and "real" in values:
        values.pop("real")  # two ceilings crowd a thin line; the table has both
    low, high = min(values.values(), default=0), max(values.values(), default=1)
    span = (high - low) or 1.0
    place = {
        s: (v - low) / span if metric["better"] == "higher" else (high - v) / span
        for s, v in values.items()
    }
    return [
        {"system": s, "percent": round(100 * p, 2), "value": format_value(values[s], metric)}
        for s, p in place.items()
    ]


def _stage_view(run: Stage) -> dict[str, Any]:
    summary = run.summary
    tasks = [
        t for t in {**summary.get("weights", {}), **summary["shares"]} if not t.startswith("_")
    ]
    total_weight = sum(summary.get("weights", {}).values()) or 1.0
    mixture = [
        {
            "task": t,
            "color": _color(t),
            "realized": 100 * summary["shares"].get(t, 0.0),
            "declared": 100 * summary.get("weights", {}).get(t, 0.0) / total_weight,
        }
        for t in tasks
    ]
    widest = max((max(m["realized"], m["declared"]) for m in mixture), default=1.0) or 1.0
    beside = {name: seconds for name, seconds in run.total("seconds").items() if name != "step"}
    spent = {"training": max(summary["seconds"] - sum(beside.values()), 0.0)} | beside
    spent = {name: seconds for name, seconds in spent.items() if seconds >= 0.05}
    return {
        "name": summary["stage"],
        "steps": f"{summary['steps']:,}",
        "duration": _duration(summary["seconds"]),
        "first_loss": f"{summary['first_loss']:.3f}",
        "last_loss": f"{summary['last_loss']:.3f}",
        "parameters": _count(summary["parameters"]),
        "steps_per_second": f"{run.median('steps_per_second'):.2f}",
        "images_per_second": f"{run.median('images_per_second'):.0f}",
        "images": f"{sum(run.images.values()):,.0f}",
        "mixture": mixture,
        "widest": widest,
        "spent": [
            (name, _duration(s), 100 * s / max(summary["seconds"], 1e-9))
            for name, s in spent.items()
            if s >= 0.05
        ],
        "loss_svg": _loss_plot(run),
        "legend": [(t, _color(t)) for t in tasks if len(run.series(f"loss/{t}")[0])],
        "config": _flat(summary.get("config", {})),
    }


def _totals(runs: Sequence[Stage]) -> dict[str, str]:
    return {
        "steps": f"{sum(r.summary['steps'] for r in runs):,}",
        "duration": _duration(sum(r.summary["seconds"] for r in runs)),
        "images": f"{sum(sum(r.images.values()) for r in runs):,.0f}",
        "parameters": _count(max((r.summary["parameters"] for r in runs), default=0)),
    }


def _duration(seconds: int | float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", json.dumps(value, default=str)))
    return rows


def _data_uri(path: epath.Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _loss_plot(run: Stage) -> str:
    """The loss of all tasks (thick) and of each (thin), with validation losses as dots, as inline
    SVG.
    """
    style = {
        "svg.fonttype": "none",
        # ids must differ between the plots of one page, not between runs
        "svg.hashsalt": run.summary["stage"],
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        axes = figure.add_subplot()
        heights: list[float] = []
        tasks = [
            key[len("loss/") :]
            for key in {k: 0 for row in run.rows for k in row}
            if key.startswith("loss/")
        ]
        for task in tasks:
            steps, values = run.series(f"loss/{task}")
            smooth = _smooth(values)
            axes.plot(steps, smooth, color=_color(task), lw=1.1, alpha=0.85, solid_capstyle="round")
            axes.plot(*run.series(f"val/loss/{task}"), "o", color=_color(task), ms=3, mec="none")
            heights += [*smooth]
        steps, values = run.series("loss")
        if len(steps):
            axes.plot(steps, _smooth(values), color=INK, lw=2.2, solid_capstyle="round")
            heights += [*_smooth(values)]
        if heights:
            low, high = np.percentile(heights, [0, 98])
            margin = 0.08 * max(high - low, 1e-6)
            axes.set_ylim(max(low - margin, 0), high + margin)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=FAINT, lw=0.6)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    # names such as patch_1 recur in every plot, and nothing refers to them
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    label = html.escape(f"Loss of stage {run.summary['stage']} over its steps", quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centered mean over a twentieth of the points."""
    half = len(values) // 40
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("univg_jax.evaluation", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
