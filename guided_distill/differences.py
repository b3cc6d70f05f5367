"""In what two configs differ that leads to other weights, and what may change under a workdir."""

import dataclasses
import typing
from collections.abc import Mapping

from guided_distill import diffusion
from guided_distill.experiment import Experiment
from guided_distill.models import BACKBONES

_FREE_KEYS = (
    *(f"config.{group}.accumulate" for group in ("teacher", "to_v", "stage1", "stage2")),
    "config.mesh",
    "config.model.remat",
    "config.model.remat_policy",
    "config.evaluate",
    "config.log",
    "config.checkpoint",
    "config.data.data_dir",
    "config.data.test_split",
    "config.rounds.gate_most_left",
)


def differing_keys(ours, theirs):
    """Keys that change trained weights and differ between two configs, as "key: theirs -> ours", sorted.

    What a config lacks, as one of an earlier version may, counts as that key's default.
    """
    return _differing(_filled(ours), _filled(theirs), "config")


def _filled(config):
    groups = typing.get_type_hints(Experiment) | _named_groups(config)
    filled = {field.name: field.default for field in dataclasses.fields(Experiment)} | dict(config)
    for name, value in filled.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(groups.get(name)):
            filled[name] = {field.name: field.default for field in dataclasses.fields(groups[name])} | dict(value)
        elif dataclasses.is_dataclass(value):
            filled[name] = dataclasses.asdict(value)
    return filled


def _named_groups(config):
    """{group: class} of those whose class goes by their name."""
    choices = {"model": {name: group for name, (_, group) in BACKBONES.items()}, "schedule": diffusion.SCHEDULES}
    return {key: classes.get(config.get(key, {}).get("name")) for key, classes in choices.items()}


def _differing(ours, theirs, path):
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = (key for key in sorted(ours.keys() | theirs.keys()) if f"{path}.{key}" not in _FREE_KEYS)
        lines = (_differing(ours.get(key), theirs.get(key), f"{path}.{key}") for key in keys)
        return [line for group in lines for line in group]
    # A config that went through JSON has lists for tuples.
    same = (
        list(ours) == list(theirs)
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple)
        else ours == theirs
    )
    return [] if same else [f"{path}: {theirs!r} -> {ours!r}"]
