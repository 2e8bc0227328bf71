"""`univg data build|list|verify`: which datasets there are, and their records."""

import argparse
import dataclasses
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any, get_origin

from data_pipelines.datasets import DATASETS
from data_pipelines.native import Dataset, Options
from univg_jax import fields
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.errors import UserError, check_name

PAGE = """# Datasets

`univg data build --dataset=NAME --source=DIR --out=DATA` makes records of a dataset's files as they
were published, in `DATA/NAME`. With `--config.data.dir=DATA` a config reads them: `data=recipe` of
the three stages names those of the paper. Sizes and licenses are those that publishers state; read
the license before you train. Each command needs the files of its dataset; tests build all datasets
from small ones. This page is made by `univg data list --markdown`.
"""
_GENERAL = {field.name for field in dataclasses.fields(Options)}


def add_build(actions: Any) -> None:
    """The flags of `univg data build`: a dataset's are the fields of its options."""
    parser = actions.add_parser(
        "build",
        help="write the records of a dataset",
        description="Makes records of a dataset's native files. What is complete stays as it is, "
        "and a build that was killed goes on. Entries that cannot be used are left out, and listed "
        "in skipped.jsonl beside the records.",
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="one of `univg data list`")
    parser.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="a config's data.dir",
    )
    parser.add_argument(
        "--processes", action=flags.Number, least=1, metavar="N", help="default: one a core"
    )
    group = parser.add_argument_group("many machines", "by Apache Beam (BUILD.md)")
    group.add_argument(
        "--beam_runner",
        metavar="NAME",
        help="DirectRunner, DataflowRunner, SparkRunner, FlinkRunner (default: this machine alone)",
    )
    group.add_argument(
        "--beam_options", metavar="FLAGS", help='flags of the runner: "--region=R --project=P"'
    )
    group = parser.add_argument_group("datasets of native files")
    added = set()
    for field in dataclasses.fields(Options):
        _add_setting(group, field)
        added.add(field.name)
    for dataset in DATASETS.values():
        own = [f for f in dataclasses.fields(dataset.options) if f.name not in _GENERAL]
        group = parser.add_argument_group(dataset.name, dataset.summary) if own else None
        for field in own:
            if field.name not in added:
                _add_setting(group, field)
                added.add(field.name)
    parser.add_example("--dataset=emoji_scenes --resolution=64 --out=data/emoji_64px")
    parser.add_example("--dataset=captions --source=~/pictures --hold_out=0.02 --out=data")
    parser.set_defaults(run=build)


def add_list(actions: Any) -> None:
    """The flags of `univg data list`."""
    parser = actions.add_parser(
        "list",
        help="show which datasets can be built",
        description="Lists the datasets that can be built, or tells all of one.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="tell all of this one")
    parser.add_argument("--markdown", action="store_true", help="as docs/datasets.md")
    parser.add_example("refcoco")
    parser.set_defaults(run=list_datasets)


def add_verify(actions: Any) -> None:
    """The flags of `univg data verify`."""
    parser = actions.add_parser(
        "verify",
        help="check the files of built records",
        description="Compares every file of a built dataset with its checksum.",
    )
    parser.add_argument("folder", type=flags.path, metavar="DIR", help="such as data/journeydb")
    parser.add_example("data/journeydb")
    parser.set_defaults(run=verify)


def build(args: argparse.Namespace) -> None:
    """Writes a dataset's records."""
    from data_pipelines import build as builds  # imports TFDS

    configure(args)
    dataset = DATASETS[check_name(args.dataset, DATASETS, what="dataset")]
    options = _options(args, dataset)
    if args.beam_runner:
        from data_pipelines import beam

        if args.processes:
            raise UserError("--processes: Beam's runners have flags of their own (--beam_options)")
        flags = beam.read_flags(args.beam_options or "")
        beam.build(dataset, args.out, options, runner=args.beam_runner, pipeline_options=flags)
    elif args.beam_options is not None:
        raise UserError("--beam_options needs --beam_runner, such as DataflowRunner")
    else:
        builds.build(dataset, args.out, options, processes=args.processes)
    given = {
        f.name: value
        for f in dataclasses.fields(options)
        if (value := getattr(options, f.name)) != fields.default_of(f)
    }
    wanted = dict(dir=args.out, dataset=args.dataset)
    wanted |= {f"build.{name}": value for name, value in given.items()}
    config = shlex.join(f"--config.data.{name}={value}" for name, value in wanted.items())
    print(f"{args.dataset} is in {args.out}. To train on it: {config}")


def list_datasets(args: argparse.Namespace) -> None:
    """Prints the datasets, or all of one."""
    if args.markdown:
        print(datasets_page(), end="")
    elif args.name:
        print("\n".join(_about(DATASETS[check_name(args.name, DATASETS, what="dataset")])))
    else:
        width = max(map(len, DATASETS))
        for dataset in DATASETS.values():
            print(f"{dataset.name:{width}}  {', '.join(dataset.tasks):12}  {dataset.summary}")
        print("\nunivg data list NAME tells all of one.")


def verify(args: argparse.Namespace) -> None:
    """Compares files with their checksums."""
    from data_pipelines import dataset_files

    wrong = [f"{name} {what}" for name, what in dataset_files.verify(args.folder)]
    if wrong:
        raise UserError(f"{args.folder}: {'; '.join(wrong)}; build it again")
    print(f"{args.folder}: every file is as it was built")


def datasets_page() -> str:
    """docs/datasets.md: a row a dataset, then all of each, as Markdown."""
    lines = [PAGE, "| dataset | tasks | what | size | license |", "|---|---|---|---|---|"]
    for d in DATASETS.values():
        cells = (f"[{d.name}](#{d.name})", ", ".join(d.tasks), d.summary, d.size, d.license)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    for dataset in DATASETS.values():
        lines += ["", f"## {dataset.name}", "", *_markdown(dataset)]
    return "\n".join(lines) + "\n"


def _markdown(dataset: Dataset) -> Iterator[str]:
    yield f"{dataset.summary[0].upper()}{dataset.summary[1:]}."
    yield ""
    for title, text in _facts(dataset):
        yield f"* {title}: {text}"
    if dataset.quirks:
        yield "* Taken care of:"
        yield from (f"  * {quirk}" for quirk in dataset.quirks)
    yield ""
    yield f"```\n{_command(dataset)}\n```"


def _about(dataset: Dataset) -> Iterator[str]:
    yield f"{dataset.name}: {dataset.summary}"
    for title, text in _facts(dataset):
        yield from _wrapped(f"{title}: {text}")
    for quirk in dataset.quirks:
        yield from _wrapped(f"taken care of: {quirk}")
    yield f"  {_command(dataset)}"


def _facts(dataset: Dataset) -> Iterator[tuple[str, str]]:
    facts = dict(
        tasks=", ".join(dataset.tasks),
        size=dataset.size,
        license=dataset.license,
        source=dataset.where,
        files=dataset.layout,
    )
    yield from ((title, text) for title, text in facts.items() if text)


def _command(dataset: Dataset) -> str:
    out = "" if "--out" in dataset.example else " --out=data"
    return f"univg data build --dataset={dataset.name} {dataset.example}{out}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="      ")


def _add_setting(group: Any, field: dataclasses.Field) -> None:
    default = fields.default_of(field)
    shown = "" if default in ("", (), None) else f" (default: {default})"
    rule = fields.rule_of(field)
    kind: dict[str, Any] = dict(metavar="TEXT")
    if field.type in (int, int | None):
        kind = dict(metavar="N", action=flags.Number, rule=rule)
    elif field.type is float:
        kind = dict(metavar="X")
    elif rule.is_path:
        kind = dict(metavar="PATH", type=flags.path)
    help = (rule.help + shown).replace("%", "%%")
    group.add_argument(f"--{field.name}", help=help, **kind)


def _options(args: argparse.Namespace, dataset: Dataset) -> Any:
    """The options that flags give. Raises UserError for one that the dataset does not have."""
    own = {field.name: field for field in dataclasses.fields(dataset.options)}
    every = {f.name for d in DATASETS.values() for f in dataclasses.fields(d.options)} | _GENERAL
    given = {}
    for name in sorted(every):
        if (text := getattr(args, name)) is None:
            continue
        if name not in own:
            names = [f"--{other}" for other in own]
            check_name(f"--{name}", names, what=f"option of dataset {dataset.name}:")
        kind, rule = own[name].type, fields.rule_of(own[name])
        given[name] = fields.read(kind, _value(kind, text), f"--{name}", rule)
    return dataset.make_options(given, where=f"dataset {dataset.name}")


def _value(kind: Any, text: str | int) -> Any:
    """What a flag's text says, as `fields.read` takes it."""
    if kind is str or not isinstance(text, str):
        return text
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if get_origin(kind) is not None and "Mapping" in str(kind):
        return dict(part.partition("=")[::2] for part in text.split(","))
    return fields.parse_literal(text)
