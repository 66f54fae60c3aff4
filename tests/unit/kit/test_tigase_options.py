"""Lines of a Tigase file (DESIGN 5): which are taken, under which name here, and why others are refused."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tidings.kit.database_url import DatabaseUrl, database_url
from tidings.kit.option_table import OPTIONS
from tidings.kit.options import OptionError, Options, load
from tidings.kit.strategies import strategy_factory
from tidings.kit.tigase_options import ALIASES, ALWAYS, REFUSED

# The properties that its guide lists.
GUIDE = """
admins auth-db auth-db-uri auth-domain-repo-pool auth-repo-pool auth-repo-pool-size bind-ext-hostnames
bosh-close-connection bosh-extra-headers-file cl-conn-repo-class client-access-policy-file cluster-connect-all
cluster-mode cluster-nodes cm-ht-traffic-throttling cm-see-other-host cm-traffic-throttling comp-class-1 comp-name-1
cross-domain-policy-file data-repo-pool-size debug debug-packages domain-filter-policy elements-number-limit ext-comp
extcomp-repo-class external hardened-mode max-queue-size monitoring net-buff-high-throughput net-buff-standard
new-connections-throttling nonpriority-queue queue-implementation roster-implementation
s2s-ejabberd-bug-workaround-active s2s-secret s2s-skip-tls-hostnames script-dir sm-cluster-strategy-class sm-plugins
sm-threads-pool ssl-certs-location ssl-container-class ssl-def-cert-domain stats-archiv stats-history
stringprep-processor test tigase-config-repo-class tigase-config-repo-uri tls-jdk-nss-bug-workaround-active trusted
user-db user-db-uri user-domain-repo-pool user-repo-pool user-repo-pool-size vhost-anonymous-enabled vhost-max-users
vhost-message-forward-jid vhost-presence-forward-jid vhost-register-enabled vhost-tls-required virt-hosts
watchdog_delay watchdog_ping_type watchdog_timeout config-type
""".split()  # noqa: SIM905 - one name a line would be five screens


def read(folder: Path, *lines: str) -> Options:
    """The options of a file with these lines."""
    path = folder / "init.properties"
    path.write_text("\n".join(lines))
    return load([f"--config={path}"], {})


def problems(folder: Path, *lines: str) -> list[str]:
    """What is said against a file with these lines, without where they stand."""
    with pytest.raises(OptionError) as error:
        read(folder, *lines)
    return [problem.partition(": ")[2] for problem in error.value.problems]


# --- DESIGN 5 ---


@pytest.mark.parametrize("equals", ["=", " = ", " =", "= "])
def test_every_line_of_the_block_works_as_written_and_with_spaces(tmp_path: Path, equals: str) -> None:
    block = {
        "config-type": "--gen-config-def",
        "--cluster-mode": "true",
        "--user-db": "mysql",
        "--user-db-uri": "jdbc:mysql://db.example.com:3306/tidings?user=root&password=secret",
        "--sm-cluster-strategy-class": "tigase.cluster.strategy.OnlineUsersCachingStrategy",
        "--comp-name-2": "pubsub",
        "--comp-class-2": "tigase.pubsub.cluster.PubSubComponentClustered",
        "--debug": "cluster,server",
        "--virt-hosts": "example.com,example.org",
        "--admins": "admin@example.com",
    }
    options = read(tmp_path, *(f"{name}{equals}{value}" for name, value in block.items()))
    assert options["cluster-mode"] is True
    assert options["user-db"] == "mysql"
    assert database_url(options) == DatabaseUrl(
        "mysql", (("db.example.com", 3306),), "tidings", user="root", password="secret"
    )
    assert options["sm-cluster-strategy-class"] == "online-users"
    assert (options.numbered("comp-name"), options.numbered("comp-class")) == ({2: "pubsub"}, {2: "pubsub"})
    assert options["debug"] == ["cluster", "server"]
    assert options["virt-hosts"] == ["example.com", "example.org"]
    assert options["admins"] == ["admin@example.com"]


def test_a_database_of_several_hosts_is_tried_in_their_order(tmp_path: Path) -> None:
    url = database_url(read(tmp_path, "--user-db-uri=jdbc:mysql://h1:3306,h2:6033/db?user=a&password=b"))
    assert (url.hosts, url.database, url.user, url.password) == ((("h1", 3306), ("h2", 6033)), "db", "a", "b")


def test_parameters_that_only_java_knows_are_ignored(tmp_path: Path) -> None:
    url = database_url(
        read(
            tmp_path,
            "--user-db-uri=jdbc:mysql://host/db?user=u&password=p&useUnicode=true&characterEncoding=UTF-8"
            "&autoCreateUser=true",
        )
    )
    assert url == DatabaseUrl("mysql", (("host", 3306),), "db", user="u", password="p")


@pytest.mark.parametrize("package", ["tigase.cluster.strategy", "tigase.server.cluster.strategy"])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("OnlineUsersCachingStrategy", "online-users"),
        ("DefaultClusteringStrategy", "broadcast"),
        ("SMNonCachingAllNodes", "broadcast"),
    ],
)
def test_the_classes_of_strategies_are_known(tmp_path: Path, package: str, name: str, ours: str) -> None:
    chosen = read(tmp_path, f"--sm-cluster-strategy-class={package}.{name}")["sm-cluster-strategy-class"]
    assert chosen == ours
    assert strategy_factory(chosen)


def test_a_strategy_of_ones_own_is_named_by_its_dotted_path(tmp_path: Path) -> None:
    path = "tidings.cluster.strategies.home.Home"
    chosen = read(tmp_path, f"--sm-cluster-strategy-class={path}")["sm-cluster-strategy-class"]
    assert strategy_factory(chosen).__name__ == "Home"  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["--gen-config-def", "--gen-config-default", "--gen-config-all"])
def test_the_first_line_means_what_is_so_without_it(tmp_path: Path, kind: str) -> None:
    assert read(tmp_path, f"config-type={kind}").arguments() == [f"--config={tmp_path / 'init.properties'}"]


@pytest.mark.parametrize(("kind", "service"), [("sm", "router"), ("cs", "connector"), ("comp", "pubsub")])
def test_a_first_line_that_asks_for_less_says_what_to_run(tmp_path: Path, kind: str, service: str) -> None:
    (problem,) = problems(tmp_path, f"config-type=--gen-config-{kind}")
    assert "tidings run" in problem
    assert service in problem


# --- other names ---


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--vhost-register-enabled=true", "registration", True),
        ("--vhost-register-enabled = false", "registration", False),
        ("--vhost-tls-required=true", "c2s-allow-plaintext", False),
        ("--vhost-tls-required=false", "c2s-allow-plaintext", True),
        ("--ssl-certs-location=/etc/certs", "certs-dir", Path("/etc/certs")),
        ("--c2s-ports=5222,5224", "c2s-ports", [5222, 5224]),
        ("--bosh-ports=5280", "http-ports", [5280]),
        ("--cl-comp-ports=5277", "cluster-port", 5277),
    ],
)
def test_what_has_another_name_here_is_taken_under_its_own(
    tmp_path: Path, line: str, name: str, value: object
) -> None:
    options = read(tmp_path, "", line)
    assert options[name] == value
    assert options.source(name) == f"{tmp_path / 'init.properties'}:2"


def test_the_command_line_and_the_environment_take_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "tigase.properties").write_text("--virt-hosts=example.org\n")
    options = load(
        [f"--property-file={tmp_path / 'tigase.properties'}", "--vhost-register-enabled=true"],
        {"TIDINGS_VHOST_TLS_REQUIRED": "false", "TIDINGS_HARDENED_MODE": "strict"},
    )
    assert options["virt-hosts"] == ["example.org"]
    assert options["registration"] is True
    assert options["c2s-allow-plaintext"] is True
    with pytest.raises(OptionError, match=r"TIDINGS_CLUSTER_NODES: .*table cluster_nodes"):
        load([], {"TIDINGS_CLUSTER_NODES": "a,b"})


def test_another_name_holds_for_one_host_where_ours_does(tmp_path: Path) -> None:
    options = read(tmp_path, "--virt-hosts=a.example,b.example", "--vhost-register-enabled[b.example]=true")
    assert options.for_host("b.example", "registration") is True
    assert options.for_host("a.example", "registration") is False
    assert "whole server" in problems(tmp_path, "--vhost-tls-required[localhost]=false")[0]


def test_a_wrong_value_is_refused_under_the_name_that_was_written(tmp_path: Path) -> None:
    assert problems(tmp_path, "--vhost-tls-required=perhaps") == ["--vhost-tls-required: say true or false"]


# --- what is so anyway, and what means nothing ---


@pytest.mark.parametrize("name", ALWAYS)
def test_what_is_so_anyway_may_be_said_and_nothing_else(tmp_path: Path, name: str) -> None:
    values, reason = ALWAYS[name]
    for value in values:
        assert read(tmp_path, f"--{name}={value}").arguments() == [f"--config={tmp_path / 'init.properties'}"]
    assert problems(tmp_path, f"--{name}=7") == [f"--{name}: {reason}"]


def test_every_property_of_the_guide_is_taken_or_refused_with_its_reason(tmp_path: Path) -> None:
    """None is unknown; and what is refused is named, by its name there or here."""
    for name in GUIDE:
        ours, _ = ALIASES.get(name, (name, None))
        try:
            read(tmp_path, f"--{name}=nonsense")
        except OptionError as error:
            (problem,) = error.problems
            assert "there is no option" not in problem, name
            assert f"--{name}" in problem or f"--{ours}" in problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--cluster-nodes=a:secret:5277,b", "the table cluster_nodes"),
        ("--auth-db=mysql", "--user-db-uri"),
        ("--user-repo-pool-size=20", "one pool of connections"),
        ("--sm-plugins=+jabber:iq:auth,-pep", "docs/extending.md"),
        ("--external=muc.example.org:secret:listen:5270", "--component-allow"),
        ("--s2s-secret=hunter2", "federation"),
        ("--bosh-close-connection=true", "BOSH"),
        ("--cm-traffic-throttling=xmpp:2500:0:disc,bin:20m:0:disc", "--max-stanzas-per-second"),
        ("--watchdog_timeout=60000", "TCP keep-alive"),
        ("--monitoring=jmx:9050,http:9080", "/metrics"),
        ("--user-db=derby", "sqlite"),
        ("--user-db=pgsql", "mysql"),
        ("--user-db-uri[example.org]=jdbc:mysql://h/d?user=u&password=hunter2", "whole server"),
        ("--virt-hosts=a.example:-register:max-users=10,b.example", "--NAME[HOST]=value"),
        ("--comp-class-1=tigase.muc.MUCComponent", "--comp-name-N"),
        ("c2s/ports[i]=5222,5223", "single components"),
        ("message-router/components/msg-receivers/s2s.active[B]=false", "single components"),
    ],
)
def test_what_means_nothing_is_refused_by_name_with_the_reason(tmp_path: Path, line: str, reason: str) -> None:
    (problem,) = problems(tmp_path, line)
    assert line.partition("=")[0].removeprefix("--").partition("[")[0] in problem
    assert reason in problem
    assert "hunter2" not in problem
    assert "secret" not in problem.replace("--s2s-secret", "")


def test_no_option_of_ours_is_hidden_by_a_name_of_tigase() -> None:
    """A name that is refused may come to mean something later; then it leaves the table."""
    patterns = [pattern for names, _ in REFUSED for pattern in names.split()]
    for option in OPTIONS:
        assert option.name not in ALIASES
        assert option.name not in ALWAYS
        assert not any(fnmatchcase(option.name, pattern) for pattern in patterns), option.name


def test_every_alias_leads_to_an_option() -> None:
    assert {ours for ours, _ in ALIASES.values()} <= {option.name for option in OPTIONS}


# --- credentials ---


@pytest.mark.parametrize(
    "line",
    [
        "--user-db-uri=jdbc:postgresql://h/d?user=hunter&password=hunter2",
        "--user-db-uri=jdbc:mysql://h?user=hunter&password=hunter2",
        "--user-db-uri=mysql://hunter:hunter2@h:port/d",
        "--user-db-uri[h]=mysql://hunter:hunter2@h/d",
        "--user-db-uri:mysql://hunter:hunter2@h/d?x=1",
        "--user-db-uri mysql://hunter:hunter2@h/d",
        "--user-db-url=mysql://hunter:hunter2@h/d",
        "--auth-db-uri=mysql://hunter:hunter2@h/d",
        "--tigase-config-repo-uri=jdbc:mysql://h/d?user=hunter&password=hunter2",
        "jdbc:mysql://hunter:hunter2@h/d",
        "=hunter2",
    ],
)
def test_credentials_of_a_database_are_never_in_an_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(OptionError) as error:
        database_url(read(tmp_path, line))
    assert "hunter" not in str(error.value)


def test_credentials_of_a_database_are_never_listed(tmp_path: Path) -> None:
    options = read(tmp_path, "--user-db=mysql", "--user-db-uri=jdbc:mysql://h/d?user=hunter&password=hunter2")
    assert "hunter" not in str([(option.name, *rest) for option, *rest in options.rows()])
    assert "hunter2" not in repr(database_url(options))
