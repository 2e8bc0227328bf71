"""Trains and measures the paper's ablations at embedded scale, and writes docs/ablations.md.

    python -m tools.ablations        at most 8 hours on 2 idle cores: `make ablations`
    python -m tools.ablations --form=short --docs=DIR        minutes: the machinery alone

What is trained and compared is in `experiments/ablations.py`. Killed at any point, it goes on: runs
are workdirs that continue, and the numbers of a run that is finished are kept. After every run
WORKDIR/FORM has the page with what there is, which says what is missing. When all runs are there,
the page is written to DOCS, too.

The rule of every verdict: of each seed one difference between the two models that a claim compares;
of these the mean, its standard error, and by Student's t the interval that has the true mean with a
confidence of 95%. `reproduced` is a claim that holds in all of the interval, `not reproduced` one
that holds in none of it, and all others are `not resolved at this scale`.
"""

import argparse
import dataclasses
import io
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from absl import logging
from etils import epath
from matplotlib.figure import Figure
from scipy import stats

from experiments.ablations import ABLATIONS, FORMS, Ablation, Claim, Run, get_config, runs
from univg_jax import assembly
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import Metric
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK
from univg_jax.evaluation.run import evaluate
from univg_jax.files import read_json, read_sealed, write_sealed, write_whole
from univg_jax.pipeline import Pipeline
from univg_jax.runtime import configure_jax
from univg_jax.settings import Config

CONFIDENCE = 0.95
SECONDS = Metric("Seconds a step", better="lower")
# What a finished run has: its numbers by metric, such as ie/l1_changed.
Numbers = Mapping[str, float]
Values = Mapping[str, Mapping[int, Numbers]]  # by point and seed


# --- runs ---


def finish(run: Run, workdir: epath.Path) -> Numbers:
    """The numbers of a run, which is trained and measured as far as it is not yet.

    Raises UserError if the run in the workdir is of another config.
    """
    parent = run.parent
    config = Config.of(
        get_config(
            arm=run.arm,
            stage=run.stage,
            form=run.form,
            seed=run.seed,
            init_from=str(workdir / parent.name) if parent else "",
        )
    )
    folder, examples = workdir / run.name, FORMS[run.form].examples
    asked = dict(config=config.to_dict(), tasks=run.measured, examples=examples)
    asked = json.loads(json.dumps(asked))  # as the file has it
    file = folder.parent / f"{folder.name}.json"
    try:
        if (found := read_sealed(file)).pop("asked", None) == asked:
            return found["numbers"]
    except NotFoundError:
        pass
    if not assembly.is_finished(config, folder):
        assembly.make_run(config, folder).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
    numbers = dict(
        # Nearly the fastest: what else the machine does only slows a step.
        seconds=1 / float(np.quantile(speeds, 0.9)),
        parameters=read_json(folder / "summary.json")["parameters"],
    )
    if run.measured:
        results = evaluate(
            Pipeline.load(folder),
            BENCHMARK,
            out=folder.parent / f"{folder.name}_evaluation",
            tasks=run.measured,
            num_examples=examples,
        )
        for name, task in results.tasks.items():
            for system in ("model", "trivial"):
                prefix = "" if system == "model" else "trivial/"
                for metric, entry in task["systems"][system].items():
                    if entry["value"] is not None:
                        numbers[f"{prefix}{name}/{metric}"] = entry["value"]
    write_sealed(file, dict(asked=asked, numbers=numbers))
    jax.clear_caches()  # of dozens of runs in one process
    return numbers


# --- verdicts ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean over seeds and its standard error, NaN for fewer than two."""

    value: float
    stderr: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        n = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return cls(value=float(np.mean(values)) if n else math.nan, stderr=error, count=n)

    @property
    def half(self) -> float:
        """Half the interval that has the true mean with `CONFIDENCE`."""
        if self.count < 2:
            return math.nan
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1)) * self.stderr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """`difference`: of `better` to `other`, by seed; `word`: what the rule says of the claim."""

    difference: Mean
    word: str


def judge(claim: Claim, values: Values) -> Verdict:
    """The verdict about a claim, from the seeds that have its metric at both of its points."""
    found = [
        {seed: n[claim.metric] for seed, n in values[point].items() if claim.metric in n}
        for point in (claim.better, claim.other)
    ]
    seeds = sorted(found[0].keys() & found[1].keys())
    better, other = (np.array([numbers[seed] for seed in seeds]) for numbers in found)
    sign = 1.0 if metric_of(claim.metric).better == "higher" else -1.0
    gain = Mean.of(sign * (better - other) + claim.tolerance * np.abs(other))
    word = "not resolved at this scale"
    if gain.value - gain.half > 0:
        word = "reproduced"
    elif gain.value + gain.half < 0:
        word = "not reproduced"
    return Verdict(difference=Mean.of(better - other), word=word)


def metric_of(name: str) -> Metric:
    """How a number of a run is shown."""
    task, _, metric = name.rpartition("/")
    return BENCHMARK.tasks[task].metrics[metric] if task else SECONDS


# --- the page ---


def write_page(folder: epath.Path, values: Values, *, form: str) -> None:
    """ablations.md, and in the folder `ablations` the numbers and the plots."""
    verdicts = {
        name: [judge(claim, values) for claim in one.claims] for name, one in ABLATIONS.items()
    }
    missing = [run for run in runs(form) if run.seed not in values[run.point]]
    for name, one in ABLATIONS.items():
        write_whole(folder / "ablations" / f"{name}.svg", plot(one, values))
    content = dict(
        form=dataclasses.asdict(FORMS[form]),
        missing=[run.name for run in missing],
        numbers=values,
        verdicts={name: [dataclasses.asdict(v) for v in found] for name, found in verdicts.items()},
    )
    text = json.dumps(_without_nan(content), indent=1) + "\n"
    write_whole(folder / "ablations" / "numbers.json", text)
    write_whole(folder / "ablations.md", page(values, verdicts, missing, form=form))


def page(
    values: Values,
    verdicts: Mapping[str, Sequence[Verdict]],
    missing: Sequence[Run],
    *,
    form: str,
) -> str:
    """The page in Markdown."""
    f, total = FORMS[form], len(list(runs(form)))
    lines = ["# The paper's ablations at embedded scale", ""]
    if missing:
        names = ", ".join(f"{run.point} of seed {run.seed}" for run in missing)
        lines += [
            f"**Not whole: {len(missing)} of {total} runs are missing**, so the verdicts may "
            f"change. Missing: {names}.",
            "",
        ]
    lines += [
        "`make ablations` trained and measured all of this and wrote this page. What is compared "
        "is in `experiments/ablations.py`; all numbers are in "
        "[numbers.json](ablations/numbers.json).",
        "",
        f"The data, the model and the metrics are those of `make quickstart` (preset "
        f"`{f.preset}`), with latents of 8 channels and times that are not shifted; the "
        f"shares of the tasks are the paper's. The three stages have "
        f"{', '.join(map(str, f.steps))} steps of 16 rows in every arm. Seeds: {f.seeds} (of the "
        f"initialization, the order of the data, the noise). Held-out examples of a task: "
        f"{f.examples}. A seed's arms share their first stage where they do not differ in it.",
        "",
        "A difference is taken between the two models of one seed. ± is the standard error over "
        "seeds, and the interval, by Student's t, has the true mean difference with a confidence "
        f"of {CONFIDENCE:.0%}. *Reproduced*: the claim holds in all of the interval. *Not "
        "reproduced*: it holds in none of it. *Not resolved at this scale*: all else. Where the "
        "paper says that something is kept, a loss within the stated part of the value is "
        "allowed: our choice.",
        "",
        "| ablation | metric | compared | difference | interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in ABLATIONS.items():
        for claim, verdict in zip(one.claims, verdicts[name], strict=True):
            d = verdict.difference
            allowed = f", a loss of {claim.tolerance:.0%} allowed" if claim.tolerance else ""
            lines.append(
                f"| [{one.title}](#{_anchor(one.title)}) | {_label(claim.metric)}{allowed} | "
                f"{one.points[claim.better]} - {one.points[claim.other]} | {_shown(d)} | "
                f"{_interval(d)} | **{verdict.word}** |"
            )
    for name, one in ABLATIONS.items():
        lines += ["", f"## {one.title}", "", f"The paper: {one.paper}", ""]
        lines += [one.note, "", f"![{one.title}](ablations/{name}.svg)", ""]
        lines += table(one, values)
    return "\n".join(lines) + "\n"


def table(one: Ablation, values: Values) -> list[str]:
    """All that was measured at the points of an ablation, and what needs no model."""
    tasks = {claim.metric.rpartition("/")[0]: None for claim in one.claims}
    metrics = [f"{task}/{name}" for task in tasks if task for name in BENCHMARK.tasks[task].metrics]
    metrics += ["seconds", "parameters"]
    head = ["", *map(_label, metrics)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    for point, label in one.points.items():
        found = values[point].values()
        cells = [Mean.of([n[m] for n in found if m in n]) for m in metrics]
        lines.append(f"| {label} | {' | '.join(map(_shown, cells))} |")
    trivial = {k: v for point in one.points for n in values[point].values() for k, v in n.items()}
    cells = [_number(trivial.get(f"trivial/{m}", math.nan)) for m in metrics]
    lines.append(f"| the strongest answer without a model | {' | '.join(cells)} |")
    return lines


def plot(one: Ablation, values: Values) -> str:
    """A panel for each metric: every seed a dot, the mean a line with its standard error. SVG."""
    metrics = list(dict.fromkeys(claim.metric for claim in one.claims))
    style = {"svg.fonttype": "none", "svg.hashsalt": one.title, "font.size": 9}
    with mpl.rc_context(style):
        size = (3.6 * len(metrics) + 1.4, 0.5 * len(one.points) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for height, point in enumerate(one.points):
                numbers = [n[metric] for n in values[point].values() if metric in n]
                axes.plot(numbers, [height] * len(numbers), "o", color="#3b82f6", ms=4, alpha=0.5)
                mean = Mean.of(numbers)
                error = None if math.isnan(mean.stderr) else mean.stderr
                axes.errorbar(mean.value, height, xerr=error, fmt="|", color="black", capsize=3)
            axes.set_yticks(range(len(one.points)), one.points.values())
            axes.set_ylim(len(one.points) - 0.5, -0.5)
            label = f"{_label(metric)} ({metric_of(metric).better} is better)"
            axes.set_xlabel(textwrap.fill(label, 44))
            axes.locator_params(axis="x", nbins=5)
            axes.grid(axis="x", lw=0.4)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _anchor(title: str) -> str:
    """Of a heading, as GitHub and Sphinx name it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _label(metric: str) -> str:
    return "Parameters" if metric == "parameters" else metric_of(metric).label


def _shown(mean: Mean) -> str:
    if math.isnan(mean.value):
        return "-"
    if mean.value >= 1e5:  # parameters, which all seeds share
        return f"{mean.value / 1e6:.2f}M"
    return _number(mean.value) + ("" if math.isnan(mean.stderr) else f" ± {mean.stderr:.3f}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _interval(mean: Mean) -> str:
    if math.isnan(mean.half):
        return "-"
    return f"{_number(mean.value - mean.half)} to {_number(mean.value + mean.half)}"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv: Sequence[str] | None = None) -> None:
    """Finishes all runs, one after another, and writes the page after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="full")
    parser.add_argument("--workdir", type=epath.Path, default=epath.Path("runs/ablations"))
    parser.add_argument("--docs", type=epath.Path, default=epath.Path("docs"))
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    configure_jax()
    planned = list(runs(args.form))
    values: dict[str, dict[int, Numbers]] = {run.point: {} for run in planned}
    for number, run in enumerate(planned, 1):
        begin = time.monotonic()
        values[run.point][run.seed] = finish(run, args.workdir)
        if (seconds := time.monotonic() - begin) > 1 or run == planned[-1]:
            print(f"{number} of {len(planned)}: {run.name}, {seconds:.0f} s", flush=True)
            write_page(args.workdir / args.form, values, form=args.form)
    write_page(args.docs, values, form=args.form)
    print(f"wrote {args.docs / 'ablations.md'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"ablations: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit("ablations: interrupted; the same command goes on")
