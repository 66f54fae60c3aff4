"""Finds the strategy that --sm-cluster-strategy-class names."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import cast

from tidings.cluster.strategy import GROUP, Factory
from tidings.kit.options import OptionError


def strategy_factory(name: str) -> Factory:
    """The class of an entry point in `tidings.strategies`, or of a dotted path. Raises OptionError."""
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in installed:
        try:
            return cast(Factory, installed[name].load())
        except Exception as error:
            raise OptionError([f"--sm-cluster-strategy-class={name}: it can't be loaded: {error}"]) from error
    module, dot, class_name = name.rpartition(".")
    known = ", ".join(sorted(installed))
    if not dot:
        raise OptionError(
            [f"--sm-cluster-strategy-class={name}: there is none; there are {known}, or write package.module.Class"]
        )
    try:
        return cast(Factory, getattr(importlib.import_module(module), class_name))
    except (ImportError, AttributeError) as error:
        raise OptionError(
            [f"--sm-cluster-strategy-class={name}: {error}; there are {known}, or write package.module.Class"]
        ) from None
