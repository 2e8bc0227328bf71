"""The complete configuration with every default, which stages and runs start from."""

import dataclasses
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from univg_jax import settings
from univg_jax.errors import check_name

# What each task reads: the embedded dataset's families, or the builds of the paper's datasets
# (docs/datasets.md), where `captions` stands for its internal pairs of pictures and captions. The
# sources of a task share its weight by their number of records, so that every record comes equally
# often; the paper's shares within a task are not published.
SOURCES = dict(
    embedded=dict(
        t2i=("scenes",),
        ie=("edits",),
        ip=("scenes",),
        lg=("scenes",),
        depth=("scenes",),
        pose=("puppets",),
        seg=("scenes",),
        id=("persons",),
    ),
    recipe=dict(
        t2i=("captions", "journeydb", "dalle3"),
        ie=("instructpix2pix", "ultraedit", "seed_data_edit"),
        ip=("places365", "osv5m"),
        lg=("flickr30k_entities", "grounded_sbu"),
        depth=("kitti", "hypersim"),
        pose=("coco_pose",),
        seg=("refcoco", "phrasecut"),
        id=("identity",),
    ),
)


def task(weight: float, *sources: str | Mapping[str, float], **dropout: float) -> ConfigDict:
    """A task's weight and the dataset families it reads, or one {family: weight}; dropout as in
    `settings.Task`.
    """
    is_weighted = len(sources) == 1 and isinstance(sources[0], Mapping)
    chosen = settings.Task(weight=weight, sources=sources[0] if is_weighted else sources, **dropout)
    return ConfigDict(dataclasses.asdict(chosen), allow_dotted_keys=True)


def get_config() -> ConfigDict:
    """`settings.Config` as a `ConfigDict`, which keeps the types of its values."""
    return ConfigDict(settings.Config().to_dict())


def text_to_image(data: str = "embedded") -> dict[str, ConfigDict]:
    """Stage I's task, with the sources of `data`, a name in SOURCES."""
    return dict(t2i=task(1.0, *_sources(data)["t2i"]))


def multitask(scale: float = 1.0, data: str = "embedded") -> dict[str, ConfigDict]:
    """Stage II's tasks in the paper's shares. It publishes one for the three auxiliary tasks; their
    equal split is our choice.

    Depth, pose and segmentation are sampled without guidance, so they need no dropout.
    """
    sources = _sources(data)
    always = dict(drop_text=0.0, drop_image=0.0, drop_both=0.0)
    return dict(
        t2i=task(0.28 * scale, *sources["t2i"]),
        ie=task(0.47 * scale, *sources["ie"]),
        ip=task(0.20 * scale, *sources["ip"]),
        lg=task(0.02 * scale, *sources["lg"]),
        depth=task(0.01 * scale, *sources["depth"], **always),
        pose=task(0.01 * scale, *sources["pose"], **always),
        seg=task(0.01 * scale, *sources["seg"], **always),
    )


def with_identity(data: str = "embedded") -> dict[str, ConfigDict]:
    """Stage III's tasks: identity beside all of Stage II, one to one."""
    return dict(**multitask(0.5, data), id=task(0.5, *_sources(data)["id"]))


def use_folder(config: ConfigDict, folder: str) -> None:
    """Trains on a folder of one's own, in place: pictures, each with its caption.

    It is whatever `univg data build --dataset=captions` takes, and is built on demand. Of the tasks
    those remain that such pictures serve, text-to-image and in/outpainting. One of fifty records is
    held out for validation.
    """
    name = folder.strip("~/.").replace("/", "_") or "here"
    config.data.dataset = "captions"
    config.data.dir = f"runs/data/{name}"
    config.data.build = dict(source=folder, hold_out=0.02)
    served = ("t2i", "ip")
    config.tasks = {
        kind: task(config.tasks[kind].weight, "captions") for kind in served if kind in config.tasks
    }
    config.conditioning.fit_on = {}


def _sources(data: str) -> dict[str, tuple[str, ...]]:
    return SOURCES[check_name(data, SOURCES, what="data=")]


def by_rows(
    stages: Sequence[Mapping[str, ConfigDict]], *, steps: Sequence[float]
) -> dict[str, dict[str, float]]:
    """task -> source -> weight for `conditioning.fit_on`: the rows of all stages together."""
    total: dict[str, dict[str, float]] = {}
    for mixture, count in zip(stages, steps, strict=True):
        for name, one in mixture.items():
            weights = total.setdefault(name, {})
            for source in one.sources:
                rows = count * one.weight / len(one.sources)
                weights[source] = weights.get(source, 0.0) + rows
    return total
