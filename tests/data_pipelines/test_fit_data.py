"""Encoders are fitted on what the run sees: its tasks, in its sizes, without damaged records."""

import collections

import numpy as np
import pytest

from data_pipelines import fit_data
from data_pipelines.sources import MemorySource
from tests.data_pipelines.toy import (
    PERSONS,
    SIZE,
    BrokenSource,
    make_collator,
    make_config,
    make_scene,
    sources,
)
from univg_jax.errors import UserError
from univg_jax.settings import Config


def make(**fit_on) -> Config:
    """A run of t2i alone, whose codec later stages use too."""
    config = make_config(t2i=1.0).to_dict()
    return Config.of(config | dict(conditioning=dict(fit_on=fit_on)))


def targets(config: Config, num: int = 200, **changes) -> list[np.ndarray]:
    collator = make_collator()
    return list(fit_data.targets(config, collator=collator, num=num, sources=sources(**changes)))


def test_targets_have_the_shares_of_the_tasks_that_are_named():
    found = targets(make(t2i=dict(scenes=2.0), seg=dict(scenes=1.0), id=dict(persons=1.0)))
    # scenes have the values below 23, masks 255, persons 100 to 106
    kinds = collections.Counter(
        "seg" if x.max() == 255 else "id" if x.max() >= 100 else "t2i" for x in found
    )
    assert kinds["t2i"] == pytest.approx(100, abs=2)
    assert kinds["seg"] == pytest.approx(50, abs=2)
    assert kinds["id"] == pytest.approx(50, abs=2)


def test_without_names_they_are_those_of_the_run():
    assert all(x.max() < 23 for x in targets(make()))


def test_the_run_s_own_sources_come_first_and_absent_data_is_left_out(caplog):
    own = MemorySource("own", [make_scene(200 + k) for k in range(9)])
    config = make_config(t2i=1.0).to_dict()
    config["tasks"]["t2i"]["sources"] = dict(own=1.0)
    fit_on = dict(t2i=dict(scenes=1.0), ie=dict(nowhere=1.0), depth=dict(scenes=1.0))
    found = targets(Config.of(config | dict(conditioning=dict(fit_on=fit_on))), own=own)
    assert all(200 <= x.max() < 209 for x in found)
    assert "without targets of the tasks ie, depth, whose data is not there" in caplog.text


def test_pictures_of_any_size_are_read_one_at_a_time_in_the_size_of_the_run():
    scenes = [make_scene(k) for k in range(20)]
    for k, scene in enumerate(scenes):
        scene["image"] = np.full((30 + k, 50 - k, 3), k, np.uint8)
    given = BrokenSource("scenes", scenes, {0, 7})
    found = iter(targets(make(), num=40, scenes=given))
    for image in found:
        assert image.shape == (SIZE, SIZE, 3)
        assert image.max() not in (0, 7)


def test_targets_are_the_same_every_time():
    config = make(t2i=dict(scenes=2.0), seg=dict(scenes=1.0))
    np.testing.assert_array_equal(targets(config), targets(config))


def test_portraits_are_of_all_sources_in_the_size_of_a_face(caplog):
    people = [
        person | dict(person=k // 2, image=np.full((10 + k, 9, 3), 100 + k, np.uint8))
        for k, person in enumerate(PERSONS)
    ]
    more = BrokenSource("more", people, {2})
    config = make_config(id=1.0).to_dict()
    config["tasks"]["id"]["sources"] = dict(persons=3.0, more=1.0)
    found = list(
        fit_data.portraits(
            Config.of(config),
            collator=make_collator(),
            sources=sources(persons=MemorySource("persons", people), more=more),
        )
    )
    assert [person for _, person in found] == [0, 0, 1, 1, 2, 2, 3, 0, 0, 1, 2, 2, 3]
    assert {image.shape for image, _ in found} == {(4, 4, 3)}
    assert "quarantined more[2] for task 'id'" in caplog.text


def test_portraits_need_persons():
    with pytest.raises(UserError, match="task 'id' cannot read persons: no field 'person'"):
        next(
            fit_data.portraits(
                Config.of(make_config(id=1.0)), collator=make_collator(), sources=sources()
            )
        )
    with pytest.raises(UserError, match="fitted on the data of task 'id': add it to tasks"):
        next(fit_data.portraits(make(), collator=make_collator(), sources=sources()))
