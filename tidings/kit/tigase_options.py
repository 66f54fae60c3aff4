"""The options of Tigase's init.properties: what each means here, or why it is refused.

Those that have the same name and meaning here are in `option_table`. Here are the names of its versions 5 to 7
that differ, and the values of shared names that do.
"""

# ruff: noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from tidings.kit.option_table import COMPONENT_CLASSES

_OPPOSITE = {"true": "false", "false": "true"}


def _same(text: str) -> str:
    return text


def _opposite(text: str) -> str:
    if text.lower() not in _OPPOSITE:
        raise ValueError("say true or false")
    return _OPPOSITE[text.lower()]


# Another name for what is here: our name, and how the value is written there.
ALIASES: dict[str, tuple[str, Callable[[str], str]]] = {
    "property-file": ("config", _same),
    "vhost-register-enabled": ("registration", _same),
    "vhost-tls-required": ("c2s-allow-plaintext", _opposite),
    "ssl-certs-location": ("certs-dir", _same),
    "bosh-ports": ("http-ports", _same),
    "cl-comp-ports": ("cluster-port", _same),
}

# What is always so here: the values that say just this, and what is to be said to all others.
ALWAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "cluster-connect-all": (("true",), "every node connects to all others; remove the line"),
    "client-port-delay-listening": (("true",), "client ports open when the node has joined; remove the line"),
    "nonpriority-queue": (("true",), "what one client sends to another is never reordered; remove the line"),
    "vhost-anonymous-enabled": (("false",), "there is no anonymous log-in; remove the line, or say false"),
    "vhost-max-users": (("0",), "accounts of a host are not counted; remove the line, or say 0"),
    "vhost-disable-dns-check": (("true",), "virtual hosts are not looked up in DNS; remove the line"),
    "hardened-mode": (("secure", "strict"), "TLS 1.2 is the oldest version offered; remove the line, or say strict"),
    "stringprep-processor": (("libidn",), "addresses are always prepared in full (RFC 7622); remove the line"),
    "ws-allow-unmasked-frames": (("false",), "clients must mask their frames (RFC 6455 5.1); remove the line"),
    "tls-jdk-nss-bug-workaround-active": (("false",), "there is no Java here; remove the line"),
    "test": (("false",), "there is no test mode; remove the line"),
}

# What means nothing here (names, with * for any letters), and what to do instead.
REFUSED: tuple[tuple[str, str], ...] = (
    # --- cluster ---
    ("cluster-nodes cl-conn-repo-class", "nodes find each other through the table cluster_nodes; remove the line"),
    ("cluster-connections-per-node", "one link between two routers carries all; remove the line"),
    # --- database ---
    ("auth-db auth-db-uri", "accounts stand in the database of --user-db-uri; move them there and remove the line"),
    ("amp-repo-*", "messages stand in the database of --user-db-uri; remove the line"),
    ("*-repo-pool *-repo-pool-size", "each node has one pool of connections, of a fixed size; remove the line"),
    ("tigase-config-repo-*", "options stand in files, the environment and the command line; write them there"),
    # --- services and modules ---
    ("sm-plugins", "modules are installed packages, all of them on (docs/extending.md); remove the line"),
    ("*-threads-pool", "a process has one thread for stanzas; set --processes to use more cores"),
    ("external ext-comp extcomp-* bind-ext-hostnames ext-ports", "a component connects to the cluster port (docs/extending.md); say what it may serve with --component-allow[NAME]"),
    ("roster-implementation", "there is one kind of roster; remove the line"),
    ("script-dir scripts-dir", "commands of your own are modules (docs/extending.md); remove the line"),
    ("s2s-* allow-invalid-certs allow-self-signed-certs trusted-certs-dir", "server-to-server federation is not there yet; remove the line"),
    ("bosh-* ws2s-* client-access-policy-file cross-domain-policy-file", "WebSocket and BOSH are not there yet, their ports will be --http-ports; remove the line"),
    # --- certificates ---
    ("ssl-container-class", "certificates are files: set --certs-dir, or --tls-cert-file and --tls-key-file"),
    ("ssl-def-cert-domain", "the first of --virt-hosts is shown to clients that name none; put that host first"),
    ("pem-privatekey-password", "keys are read without a password; protect the file by its owner and mode"),
    ("tls-enabled-* sni-disable", "versions and ciphers of TLS are not chosen, 1.2 is the oldest; remove the line"),
    # --- hosts and accounts ---
    ("trusted", "only --admins have rights that others have not; add them there or remove the line"),
    ("domain-filter-policy", "who may write to whom does not depend on domains; remove the line"),
    ("vhost-message-forward-jid vhost-presence-forward-jid", "nothing is forwarded; a module can do that (docs/extending.md); remove the line"),
    ("cm-see-other-host", "clients stay where they connect until a node drains; remove the line"),
    # --- limits ---
    ("cm-traffic-throttling", "set --max-stanzas-per-second and --max-bytes-per-second, which slow clients down"),
    ("cm-ht-traffic-throttling", "nodes and components are held back by credit, not by a rate; remove the line"),
    ("new-connections-throttling", "connections have no rate; set --max-streams-per-address"),
    ("elements-number-limit", "set --max-stanza-bytes and --max-stanza-depth, which bound a stanza"),
    ("max-queue-size queue-implementation priority-queue-implementation", "every queue has a bound of its own (docs/operations.md); remove the line"),
    ("net-buff-*", "buffers of sockets are left to the system; remove the line"),
    ("watchdog?delay watchdog?timeout watchdog?ping?type", "the system finds broken connections by TCP keep-alive; remove the line"),
    # --- watching it ---
    ("debug-packages", "set --debug to categories; `tidings options` lists them"),
    ("monitoring jmx-* stats-archiv stats-history", "figures are at /metrics of --admin-port; remove the line"),
    ("installation-id shutdown-thread-dump", "there is nothing of the kind here; remove the line"),
    # --- settings of single components, such as c2s/ports ---
    ("*/*", "settings of single components are not taken; `tidings options` lists what there is"),
)  # fmt: skip

# Values of names that are shared: which ones (a regular expression) are refused, and what to do instead.
REFUSED_VALUES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("user-db", re.compile("derby"), "Derby is a database for Java; say sqlite for an embedded one, or mysql"),
    ("user-db", re.compile("pgsql|sqlserver|mongo(db)?"), "this database is not supported; say mysql, and move the data"),
    ("virt-hosts", re.compile(r"([^\[]*,)?[^\[,]*:.*"), "settings of one host are written --NAME[HOST]=value; write the hosts alone here"),
    ("config-type", re.compile("--gen-config-sm"), "run these services by name: tidings run registry router pubsub"),
    ("config-type", re.compile("--gen-config-cs"), "run these services by name: tidings run connector"),
    ("config-type", re.compile("--gen-config-comp"), "run the component by name, as in: tidings run pubsub"),
    ("comp-class-*", re.compile(rf"(?!({'|'.join(map(re.escape, COMPONENT_CLASSES))})$)tigase\..*"), "this component of Tigase is not here; remove the line and its --comp-name-N"),
)  # fmt: skip


def translated(name: str, text: str) -> tuple[str, str] | None:
    """What Tigase's `--name=text` is here: name and value; None for what is so anyway. A name that is not one of
    Tigase's comes back as it is. Raises ValueError: why it is refused, and what to do."""
    if name in ALIASES:
        ours, value = ALIASES[name]
        return ours, value(text)
    if name in ALWAYS:
        values, reason = ALWAYS[name]
        if text.lower() not in values:
            raise ValueError(reason)
        return None
    for names, reason in REFUSED:
        if any(fnmatchcase(name, pattern) for pattern in names.split()):
            raise ValueError(reason)
    check_value(name, text)
    # The usual first line of such a file; what it asks for is what runs where no service is named.
    return None if name == "config-type" else (name, text)


def check_value(name: str, text: str) -> None:
    """Raises ValueError for what only Tigase would take: why, and what to do."""
    for pattern, value, reason in REFUSED_VALUES:
        if fnmatchcase(name, pattern) and value.fullmatch(text):
            raise ValueError(reason)
