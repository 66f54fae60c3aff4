"""docs/traffic.md and docs/strategies.svg, from what tests/bench/traffic.py has counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from machine import written_by
from traffic_node import (
    ACKS,
    AGAIN,
    CAUSED,
    COMPONENTS,
    CONNECTORS,
    MEMBERSHIP,
    NOTES,
    SESSIONS,
    STANZAS,
    STREAMS,
)

DOCS = Path(__file__).parents[2] / "docs"
MESSAGES, ITEMS, BYTES = range(3)
BETWEEN_ROUTERS = (STANZAS, AGAIN, NOTES, ACKS)
COLOURS = {"broadcast": "#c1272d", "online-users": "#0072b2", "home": "#008a5e"}

HEAD = """# What strategies cost

{written}

How much goes between nodes for a stanza, for each strategy and number of nodes. The nodes run all services, and share
one MariaDB. {users} users are logged in, spread evenly over the nodes; in pairs, each on another node than its partner,
they write chat messages of 100 characters to each other, {rate:.0f} a second in all. Every gRPC message that goes from node
to node is counted where its link is dialled; bytes are those of the messages, without HTTP/2 and TLS. Nothing is
counted within a node.

![Copies and bytes for each stanza against the number of nodes](strategies.svg)

`home` and `online-users` stay flat: a stanza costs one copy between routers, however many nodes there are (under `home`
less, for with N nodes one pair in N has the same home). `broadcast` costs N-1 copies. Under `home` the router of a
session is seldom on the node that its client is connected to; the copies between that node's connector and the router
come on top, at most two a stanza (the dashed line): also flat, for no stanza takes more than three hops.
"""

STANZA_HEAD = """
## A stanza

Per stanza. *Copies*: between routers. *Again*: copies that had been sent before, because they were refused, or because
their receiver went. *Answers*: messages and bytes that carry no stanza, that is acknowledgements, answers, numbers of
batches. *Connectors*: copies between a connector and a router on another node, with the bytes of what is around them.

| strategy | nodes | copies | bytes of copies | again | answers | bytes of answers | connectors | bytes | all messages | all bytes |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""

SESSION_HEAD = """
## A log-in and a log-out

Per session: notes between routers, and all that goes between nodes for its log-in (stream, authentication, bind,
presence) and its log-out.

| strategy | nodes | log-in: notes | messages | bytes | log-out: notes | messages | bytes |
|---|--:|--:|--:|--:|--:|--:|--:|
"""

MEMBERSHIP_HEAD = """
## Membership

Per second, of all nodes together, idle and while users write. Nodes with a registry of their own beat and read the table
`cluster_nodes` through the database, so no membership traffic goes between them as long as nobody joins, leaves or fails.
*Statements* and *bytes* are those of the database; stanzas for users who are online cost it nothing. Its bytes grow
faster than the number of nodes, for each reads the rows of all.

| strategy | nodes | idle: messages between nodes | statements | bytes | writing: messages between nodes | statements | bytes |
|---|--:|--:|--:|--:|--:|--:|--:|
"""

CHANGES_HEAD = """
## A minute after a join and after a crash

Three nodes; a fourth one is started, and a minute later one of the first three is killed (`kill -9`), while users go
on writing. Whose node is gone logs in at the one that had joined; who is not logged in writes nothing. Per stanza, as
above:

| strategy | | stanzas | copies | again | answers | bytes between routers | connectors | bytes |
|---|---|--:|--:|--:|--:|--:|--:|--:|
"""

TOTALS_HEAD = """
In all, messages and bytes. *Notes*: of strategies and modules. *Moves*: sessions that were handed over, or ended because
of another one. *Streams*: what connectors and routers on different nodes told each other about log-ins and moved streams.
*Membership*: between registries, for reports and probes. *Components*: links of `pubsub` to routers of other nodes.

| strategy | | notes | bytes | moves | bytes | streams | bytes | membership | bytes | components | bytes | statements/s |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def write_page(
    stable: dict[tuple[str, int], Any], changing: dict[str, Any], users: int, rate: float, first: float, minute: float
) -> None:
    """`stable`: by strategy and nodes, what log-in, stanzas and log-out cost. `changing`: by strategy, the phases."""
    times = {
        "before": "before",
        "join, first": f"join, first {first:.0f} s",
        "join, then": f"join, then to {minute:.0f} s",
        "crash, first": f"crash, first {first:.0f} s",
        "crash, then": f"crash, then to {minute:.0f} s",
    }
    phases = [(strategy, times[name], one) for strategy, found in changing.items() for name, one in found.items()]
    page = [
        HEAD.format(written=written_by("bench-traffic"), users=users, rate=rate),
        STANZA_HEAD,
        *(stanza_row(*key, found["stanzas"]) for key, found in stable.items()),
        SESSION_HEAD,
        *(session_row(*key, found["log-in"], found["log-out"]) for key, found in stable.items()),
        MEMBERSHIP_HEAD,
        *(membership_row(*key, found["idle"], found["stanzas"]) for key, found in stable.items()),
        CHANGES_HEAD,
        *(change_row(*phase) for phase in phases),
        TOTALS_HEAD,
        *(totals_row(*phase) for phase in phases),
    ]
    (DOCS / "traffic.md").write_text("".join(page))
    plot(stable)


def row(*cells: str | float) -> str:
    """Whole numbers with commas, others with two digits."""
    texts = (one if isinstance(one, str) else f"{one:,}" if isinstance(one, int) else f"{one:.2f}" for one in cells)
    return f"| {' | '.join(texts)} |\n"


def total(counted: Any, kinds: tuple[str, ...], index: int) -> int:
    return sum(counted.traffic[kind][index] for kind in kinds)


def stanza_row(strategy: str, nodes: int, counted: Any) -> str:
    def each(index: int, *kinds: str) -> float:
        return total(counted, kinds, index) / counted.stanzas

    return row(
        strategy, nodes,
        each(ITEMS, STANZAS), round(each(BYTES, STANZAS)), each(ITEMS, AGAIN),
        each(MESSAGES, ACKS), round(each(BYTES, ACKS)),
        each(ITEMS, CONNECTORS), round(each(BYTES, CONNECTORS, STREAMS)),
        each(MESSAGES, *CAUSED), round(each(BYTES, *CAUSED)),
    )  # fmt: skip


def session_row(strategy: str, nodes: int, *parts: Any) -> str:
    cells: list[float] = []
    for counted in parts:
        log_ins = parts[0].log_ins
        cells += [
            total(counted, (NOTES,), ITEMS) / log_ins,
            total(counted, CAUSED, MESSAGES) / log_ins,
            round(total(counted, CAUSED, BYTES) / log_ins),
        ]
    return row(strategy, nodes, *cells)


def membership_row(strategy: str, nodes: int, *parts: Any) -> str:
    cells: list[float] = []
    for counted in parts:
        cells += [
            total(counted, (MEMBERSHIP, COMPONENTS), MESSAGES) / counted.seconds,
            round(counted.statements / counted.seconds),
            round(counted.database_bytes / counted.seconds),
        ]
    return row(strategy, nodes, *cells)


def change_row(strategy: str, phase: str, counted: Any) -> str:
    def each(index: int, *kinds: str) -> float:
        return total(counted, kinds, index) / counted.stanzas

    return row(
        strategy, phase, counted.stanzas,
        each(ITEMS, STANZAS), each(ITEMS, AGAIN), each(MESSAGES, ACKS), round(each(BYTES, STANZAS, AGAIN, ACKS)),
        each(ITEMS, CONNECTORS), round(each(BYTES, CONNECTORS)),
    )  # fmt: skip


def totals_row(strategy: str, phase: str, counted: Any) -> str:
    traffic = counted.traffic
    return row(
        strategy, phase,
        traffic[NOTES][ITEMS], traffic[NOTES][BYTES], traffic[SESSIONS][MESSAGES], traffic[SESSIONS][BYTES],
        traffic[STREAMS][MESSAGES], traffic[STREAMS][BYTES], traffic[MEMBERSHIP][MESSAGES], traffic[MEMBERSHIP][BYTES],
        traffic[COMPONENTS][MESSAGES], traffic[COMPONENTS][BYTES], round(counted.statements / counted.seconds),
    )  # fmt: skip


# --- the plot ---


def plot(stable: dict[tuple[str, int], Any]) -> None:
    """Copies and bytes for each stanza against the number of nodes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, and the file changes only when the figures do.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tidings", "font.size": 10})
    figure, (copies, bytes_) = pyplot.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained", facecolor="white")
    strategies = list(dict.fromkeys(strategy for strategy, _ in stable))
    for axes, index, routers, all_ in (
        (copies, ITEMS, (STANZAS, AGAIN), (STANZAS, AGAIN, CONNECTORS)),
        (bytes_, BYTES, BETWEEN_ROUTERS, (*BETWEEN_ROUTERS, CONNECTORS, STREAMS)),
    ):
        for strategy in strategies:
            measured = {nodes: found["stanzas"] for (name, nodes), found in stable.items() if name == strategy}
            lines = [("-", routers, strategy)]
            if strategy == "home":
                lines.append(("--", all_, "home, with the links to connectors"))
            for style, kinds, label in lines:
                values = [total(one, kinds, index) / one.stanzas for one in measured.values()]
                colour = COLOURS.get(strategy, "#555555")
                axes.plot(list(measured), values, style, marker="o", markersize=4, color=colour, label=label)
        axes.set(xlabel="nodes", xticks=sorted({nodes for _, nodes in stable}), ylim=(0, None))
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    copies.set_title("copies of a stanza between nodes")
    bytes_.set_title("bytes between nodes for each stanza")
    copies.legend(frameon=False)
    figure.savefig(DOCS / "strategies.svg", metadata={"Date": None})
    pyplot.close(figure)
