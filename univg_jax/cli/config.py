"""`univg config`: a config with all its settings, or what every setting is."""

import argparse
import dataclasses
import json
from collections.abc import Collection, Iterable

from univg_jax import fields
from univg_jax.cli import flags
from univg_jax.cli.parser import Parser
from univg_jax.settings import Config

PAGE = """# Settings

`univg config` prints this page. Any key can be set in a config file, or on the command line:
`--config.optim.lr=1e-4`. `univg config --config=FILE` prints all of a config, overrides included,
as JSON; `--config=FILE.json` reads it back, and a run's `config.json` too. A whole number may be
written as `1e4`. Paths may begin with `~`. A star stands for the name of a task. The unit is that
of a number: a share counts relative to the others, a factor multiplies, time runs from 0 (data) to
1 (noise).
"""


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_config(parser, required=False)
    parser.add_example("--config=experiments/emoji.py:stage=1 --config.optim.lr=1e-3")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a config as JSON; without one, what every setting means and may be."""
    from univg_jax import configs

    if args.config is None:
        print(settings_page(), end="")
    else:
        config = configs.load(args.config, args.overrides)
        print(json.dumps(config.to_dict(), indent=1))


def settings_page() -> str:
    """Every setting with its default, what it may be and what it means, as Markdown."""
    sections: dict[str, list[tuple[str, dataclasses.Field]]] = {}
    for name, field in fields.leaves(Config):
        sections.setdefault(name.partition(".")[0] if "." in name else "", []).append((name, field))
    parts = [PAGE]
    for section, found in sections.items():
        parts.append(f"## {section}\n" if section else "## the run\n")
        parts.append(_table(found))
    for title, (options, hidden) in _options().items():
        own = [f for f in fields.settings_of(options) if f.name not in hidden]
        parts += [f"## {title}\n", _table((field.name, field) for field in own)]
    return "\n".join(parts)


def _options() -> dict[str, tuple[type, Collection[str]]]:
    """What a config passes on: classes of settings, and those of them that it must not set."""
    from data_pipelines.datasets import DATASETS
    from data_pipelines.native import Options
    from univg_jax.encoders.kinds import KINDS  # loads JAX
    from univg_jax.models.mmdit import FROM_ENCODERS, MMDiT

    general = [field.name for field in fields.settings_of(Options)]
    found: dict[str, tuple[type, Collection[str]]]
    found = {"`data.build` of every dataset of native files": (Options, ())}
    for name, dataset in DATASETS.items():
        if any(f.name not in general for f in fields.settings_of(dataset.options)):
            found[f"`data.build` of {name}, beside these"] = (dataset.options, general)
    kinds: dict[type, list[str]] = {}
    for role, of_role in KINDS.items():
        for name, kind in of_role.items():
            kinds.setdefault(kind.options, []).append(f"{role} {name}")
    found |= {f"`conditioning`: {', '.join(names)}": (cls, ()) for cls, names in kinds.items()}
    return found | {"`model.overrides`": (MMDiT, FROM_ENCODERS)}


def _table(rows: Iterable[tuple[str, dataclasses.Field]]) -> str:
    lines = ["| key | default | may be | unit | meaning |", "|---|---|---|---|---|"]
    for name, field in rows:
        rule = fields.rule_of(field)
        default = fields.default_of(field)
        shown = "-" if default is dataclasses.MISSING else f"`{_plain(default)}`"
        cells = (f"`{name}`", shown, fields.describe(field.type, rule), rule.unit, rule.help)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _plain(default: object) -> str:
    return getattr(default, "__name__", None) or repr(default)
