"""Finds the strategy that --sm-cluster-strategy-class names, and shows what it decides."""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import entry_points
from typing import cast

from tidings.cluster.strategy import GROUP, Context, Factory, Plan, Strategy
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.options import OptionError

log = get_logger("cluster")


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


class Shown:
    """A strategy whose decisions stand in the log, a line each: what --debug=cluster asks for."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._view = ClusterView()
        self.session_opened = strategy.session_opened
        self.session_closed = strategy.session_closed
        self.keeper = strategy.keeper

    def view_changed(self, view: ClusterView) -> None:
        self._view = view
        self._strategy.view_changed(view)
        log.debug(
            "strategy_has_view", view=view.version, routers=[node.hostname for node in view.with_router_sessions()]
        )

    def noted(self, node: str, note: bytes) -> None:
        log.debug("strategy_noted", by=self._name(node), note=note[:100].decode(errors="replace"))
        self._strategy.noted(node, note)

    def locate(self, account: str, resource: str) -> Plan:
        plan = self._strategy.locate(account, resource)
        log.debug(
            "strategy_decided",
            account=account, resource=resource, decides=self._name(plan.decides) or "here",
            copies_to=[self._name(node) for node in plan.nodes], certain=plan.certain,
        )  # fmt: skip
        return plan

    def _name(self, incarnation: str) -> str:
        node = self._view.by_incarnation(incarnation)
        return node.hostname if node is not None else incarnation


def made(factory: Factory, own: str, context: Context) -> Strategy:
    """A router's strategy. Its decisions are shown where somebody has asked for it: it is called for each stanza."""
    strategy = factory(own, context)
    return Shown(strategy) if log.isEnabledFor(logging.DEBUG) else strategy
