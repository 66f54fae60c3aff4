"""Options (DESIGN 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.kit.database_url import database_url, parse
from tidings.kit.options import MASK, OptionError, load, split_arguments

TIGASE = """\
config-type=--gen-config-def
# the lines of DESIGN 5
--cluster-mode=true
--user-db=mysql
--user-db-uri=jdbc:mysql://db.example.com:3306/tidings?user=root&password=secret
--sm-cluster-strategy-class=tigase.cluster.strategy.OnlineUsersCachingStrategy
--comp-class-2 = tigase.pubsub.cluster.PubSubComponentClustered
--debug=cluster,server
--virt-hosts=example.com,example.org
--admins=admin@example.com
"""


def problems(*arguments: str, **environment: str) -> str:
    with pytest.raises(OptionError) as error:
        load(arguments, environment)
    return "\n".join(error.value.problems)


def test_the_lines_of_a_tigase_file_work_unchanged(tmp_path: Path) -> None:
    (tmp_path / "init.properties").write_text(TIGASE)
    options = load([f"--config={tmp_path / 'init.properties'}"], {})
    assert options["cluster-mode"] is True
    assert options["virt-hosts"] == ["example.com", "example.org"]
    assert options["sm-cluster-strategy-class"] == "online-users"
    assert options.numbered("comp-class") == {2: "pubsub"}
    assert options["debug"] == ["cluster", "server"]
    url = database_url(options)
    assert (url.hosts, url.database, url.user, url.password) == (
        (("db.example.com", 3306),),
        "tidings",
        "root",
        "secret",
    )


def test_command_line_beats_environment_beats_files_beats_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("--cluster-port=1001\n--c2s-ports = 1\nadmin-port=7\n")
    second.write_text("--c2s-ports=2,3\n")
    options = load(
        [f"--config={first}", f"--config={second}", "--cluster-port=1003"],
        {"TIDINGS_CLUSTER_PORT": "1002", "TIDINGS_ADMIN_PORT": "8"},
    )
    assert (options["cluster-port"], options["c2s-ports"], options["admin-port"]) == (1003, [2, 3], 8)
    assert options["http-ports"] == [5280]
    assert options.source("cluster-port") == "command line"
    assert options.source("admin-port") == "environment"
    assert options.source("c2s-ports") == f"{second}:1"
    assert options.source("http-ports") == "default"


def test_an_unknown_option_names_the_nearest_and_where_it_stood(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("\n--virt-host=a\n")
    text = problems(f"--config={tmp_path / 'f'}", "--clustr-mode=true", TIDINGS_ADMINZ="x")
    assert f"{tmp_path / 'f'}:2: there is no option --virt-host; did you mean --virt-hosts?" in text
    assert "command line: there is no option --clustr-mode; did you mean --cluster-mode?" in text
    assert "TIDINGS_ADMINZ" in text


def test_options_of_tigase_without_meaning_are_refused_with_the_reason() -> None:
    assert "table cluster_nodes" in problems("--cluster-nodes=a,b")


def test_all_problems_are_said_at_once() -> None:
    text = problems(
        "--cluster-mode=maybe", "--c2s-ports=99999", "--auth-timeout=soon", "--user-db=oracle", "nonsense"
    )
    assert len(text.splitlines()) == 5


def test_a_cluster_on_sqlite_is_refused_and_told_what_to_set() -> None:
    assert "--user-db-uri=jdbc:mysql://" in problems("--cluster-mode=true")


def test_an_option_holds_for_one_host_where_that_makes_sense() -> None:
    options = load(["--virt-hosts=a.example,b.example", "--registration[b.example]=true"], {})
    assert (options.for_host("a.example", "registration"), options.for_host("b.example", "registration")) == (
        False,
        True,
    )
    assert "holds for the whole server" in problems("--cluster-mode[a.example]=true")
    assert "none of the virtual hosts" in problems("--registration[c.example]=true")


def test_three_words_are_one_option_and_the_rest_stays() -> None:
    assert split_arguments(["run", "--a", "=", "b", "router", "--c=d"]) == (["--a=b", "--c=d"], ["run", "router"])


def test_secrets_come_from_files_and_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a-secret-of-more-than-20-characters\n")
    options = load([], {"TIDINGS_CLUSTER_SECRET_FILE": str(tmp_path / "secret")})
    assert options["cluster-secret"] == "a-secret-of-more-than-20-characters"
    shown = [value for option, _, value, _ in options.rows() if option.name == "cluster-secret"]
    assert shown == [MASK]
    assert "password=secret" not in repr(parse("jdbc:mysql://h/d?user=u&password=secret"))
    assert "hunter2" not in problems("--user-db-uri=hunter2", "--cluster-lease=never")


@pytest.mark.parametrize(
    ("text", "hosts", "user", "password"),
    [
        ("jdbc:mysql://h1:3306,h2:3307/d?user=u&password=p%26q", (("h1", 3306), ("h2", 3307)), "u", "p&q"),
        ("mysql://u:p%40x@h/d", (("h", 3306),), "u", "p@x"),
        ("jdbc:mysql://[::1]:3306/d?user=u", (("::1", 3306),), "u", ""),
        ("mysql+aiomysql://u@h:1/d", (("h", 1),), "u", ""),
        ("jdbc:mysql://h/d?user=u&password=p#q", (("h", 3306),), "u", "p#q"),
        ("mysql://u:p#q@h/d", (("h", 3306),), "u", "p#q"),
        ("mysql://u:p%23q@h/d", (("h", 3306),), "u", "p#q"),
    ],
)
def test_notations_of_a_database(text: str, hosts: object, user: str, password: str) -> None:
    url = parse(text)
    assert (url.hosts, url.user, url.password, url.database) == (hosts, user, password, "d")


@pytest.mark.parametrize("text", ["postgresql://h/d", "jdbc:mysql://h", "mysql:///d", "sqlite://", "nothing"])
def test_what_is_no_database_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse(text)


@given(
    st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"), max_size=30)
)
def test_a_value_is_taken_as_it_is_written(text: str) -> None:
    assert load([f"--cluster-secondary={text}"], {})["cluster-secondary"] == text.strip()
