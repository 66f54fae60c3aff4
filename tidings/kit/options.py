"""Options: `--name=value` on the command line, in the environment, and in files.

The command line beats the environment, which beats files, which beat defaults. What is wrong is collected
and said at once, each problem with what to do about it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidings.kit.option_table import OPTIONS
from tidings.kit.option_types import Option, OptionType
from tidings.kit.tigase_options import check_value, translated

__all__ = ["Option", "OptionError", "OptionType", "Options", "load", "split_arguments"]

DEFAULT_FILES = (Path("/etc/tidings/init.properties"), Path("init.properties"))
ENVIRONMENT = "TIDINGS_"

# Names of ours have letters and dashes; those of Tigase also have what else is here.
_LINE = re.compile(r"(?:--)?([A-Za-z][A-Za-z0-9_./-]*)(?:\[([^\]]*)\])?\s*=\s*(.*)", re.S)
_NO_NAME = re.compile(r"[^A-Za-z0-9_./-]")
_NUMBERED = re.compile(r"(.+)-[0-9]+")

MASK = "********"


class OptionError(Exception):
    """Options that can't be used. `problems` are sentences, each with what to do."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True, slots=True)
class _Setting:
    text: str
    source: str


class Options:
    """The options of one process. Immutable."""

    def __init__(
        self,
        options: Mapping[str, Option],
        values: Mapping[tuple[str, str], Any],
        settings: Mapping[tuple[str, str], _Setting],
    ) -> None:
        self._options = options
        self._values = values
        self._settings = settings

    def __getitem__(self, name: str) -> Any:
        return self._values[name, ""]

    def for_host(self, host: str, name: str) -> Any:
        """The value for one virtual host: its own, else the general one."""
        return self._values.get((name, host), self._values[name, ""])

    def for_name(self, name: str, key: str) -> Any:
        """The value of an option that is set by name (`--component-allow[weather]`)."""
        return self._values.get((name, key), self._values[name, ""])

    def source(self, name: str, key: str = "") -> str:
        """Where a value came from: "command line", "environment", a file and line, or "default"."""
        setting = self._settings.get((name, key))
        return setting.source if setting else "default"

    def numbered(self, name: str) -> dict[int, Any]:
        """The values of `name-N`, by number."""
        prefix = f"{name}-"
        return {
            int(key.removeprefix(prefix)): value
            for (key, _), value in self._values.items()
            if key.startswith(prefix) and key.removeprefix(prefix).isdigit()
        }

    def rows(self) -> list[tuple[Option, str, str, str]]:
        """All options: each with the key it is set for, its value as text (secrets masked), and its source."""
        rows: list[tuple[Option, str, str, str]] = []
        for name, option in self._options.items():
            keys = sorted(key for set_name, key in self._settings if set_name == name and key)
            numbered = sorted(n for n, _ in self._settings if option.pattern and n.startswith(name[:-1]))
            if not option.pattern and not option.named:
                rows.append((option, "", self._shown(option, name, ""), self.source(name)))
            rows.extend((option, key, self._shown(option, name, key), self.source(name, key)) for key in keys)
            rows.extend((option, n, self._shown(option, n, ""), self.source(n)) for n in numbered)
        return rows

    def _shown(self, option: Option, name: str, key: str) -> str:
        setting = self._settings.get((name, key))
        text = setting.text if setting else option.default
        return MASK if option.secret and text else text

    def replace(self, **changes: str) -> Options:
        """These options with others set, as if on the command line; underscores stand for dashes."""
        settings = {**self._settings}
        for name, text in changes.items():
            settings[name.replace("_", "-"), ""] = _Setting(text, "command line")
        return _checked(self._options, settings, [])

    def arguments(self) -> list[str]:
        """The options that are set, as a command line, which everybody on a machine can read: without secrets."""
        return [
            f"--{name}{f'[{key}]' if key else ''}={setting.text}"
            for (name, key), setting in sorted(self._settings.items())
            if not self._secret(name)
        ]

    def secrets(self) -> dict[str, str]:
        """The secrets that are set, as environment variables; none is set by host or name."""
        return {
            ENVIRONMENT + name.upper().replace("-", "_"): setting.text
            for (name, _), setting in self._settings.items()
            if self._secret(name)
        }

    def _secret(self, name: str) -> bool:
        option = _find(self._options, name)
        return option is not None and option.secret


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Command-line words: the options (`--name = value` joined), and the rest in order."""
    words = list(arguments)
    options: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--") or len(word) < 3:
            rest.append(word)
            continue
        if "=" not in word and index < len(words) and words[index].startswith("="):
            word += words[index]
            index += 1
        if word.endswith("=") and index < len(words) and words[index - 1] == "=":
            word += words[index]
            index += 1
        options.append(word)
    return options, rest


def load(
    arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, extra: Iterable[Option] = ()
) -> Options:
    """Reads all sources. `extra`: options that services and modules declare. Raises OptionError."""
    environment = os.environ if environment is None else environment
    options = {option.name: option for option in (*OPTIONS, *extra)}
    problems: list[str] = []
    from_arguments = _from_lines(options, ((word, "command line") for word in arguments), problems)
    from_environment = _from_environment(options, environment, problems)
    named = from_arguments.get(("config", "")) or from_environment.get(("config", ""))
    if named is not None:
        files = [Path(part.strip()) for part in named.text.split(",") if part.strip()]
    else:
        files = [path for path in DEFAULT_FILES if path.is_file()]
    settings: dict[tuple[str, str], _Setting] = {}
    for path in files:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"the option file {path} can't be read: {error}")
            continue
        lines = (
            (line.strip(), f"{path}:{number}")
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#")
        )
        settings.update(_from_lines(options, lines, problems))
    settings.update(from_environment)
    settings.update(from_arguments)
    return _checked(options, settings, problems)


def _checked(
    options: Mapping[str, Option], settings: Mapping[tuple[str, str], _Setting], problems: list[str]
) -> Options:
    values: dict[tuple[str, str], Any] = {
        (name, ""): option.value(option.default) for name, option in options.items()
    }
    for (name, key), setting in settings.items():
        option = _find(options, name)
        assert option is not None
        try:
            values[name, key] = option.value(setting.text)
        except ValueError as error:
            shown = MASK if option.secret else setting.text
            problems.append(f"--{name}={shown} ({setting.source}): {error}")
    if not problems:
        _together(values, problems)
    if problems:
        raise OptionError(problems)
    return Options(options, values, settings)


def _together(values: Mapping[tuple[str, str], Any], problems: list[str]) -> None:
    """What must fit together."""
    uri = values["user-db-uri", ""]
    sqlite = uri.startswith("sqlite") if uri else values["user-db", ""] == "sqlite"
    if values["cluster-mode", ""] and sqlite:
        problems.append(
            "--cluster-mode=true needs a database that all nodes share; set --user-db=mysql and "
            "--user-db-uri=jdbc:mysql://HOST:3306/DATABASE?user=USER&password=PASSWORD"
        )
    if values["user-db", ""] == "mysql" and not uri:
        problems.append(
            "--user-db=mysql needs --user-db-uri=jdbc:mysql://HOST:3306/DATABASE?user=USER&password=PASSWORD"
        )
    hosts = values["virt-hosts", ""]
    for (name, key), _ in values.items():
        if key and name != "component-allow" and key not in hosts:
            problems.append(f"--{name}[{key}]: {key} is none of the virtual hosts ({', '.join(hosts)})")


def _find(options: Mapping[str, Option], name: str) -> Option | None:
    option = options.get(name)
    if option is not None:
        return None if option.pattern else option
    numbered = _NUMBERED.fullmatch(name)
    if numbered and (pattern := options.get(f"{numbered[1]}-N")) is not None:
        return pattern
    return None


def _ours(options: Mapping[str, Option], name: str, text: str) -> tuple[str, str] | None:
    """Name and value of an option that Tigase's users know; None for one that says what is so anyway. Raises
    ValueError: why it is refused."""
    if _find(options, name) is None:
        return translated(name, text)
    check_value(name, text)
    return name, text


def _from_lines(
    options: Mapping[str, Option], lines: Iterable[tuple[str, str]], problems: list[str]
) -> dict[tuple[str, str], _Setting]:
    settings: dict[tuple[str, str], _Setting] = {}
    for line, source in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            word = line.split("=")[0].strip().removeprefix("--")
            option = _find(options, word)
            if option is not None and option.type is OptionType.BOOL:
                settings[word, ""] = _Setting("true", source)
                continue
            shown = _NO_NAME.split(word)[0]  # nothing of a value: it may be a secret
            problems.append(f"{source}: {shown!r} is no option; options are written --name=value")
            continue
        name, key, text = match[1], match[2] or "", match[3].strip()
        try:
            ours = _ours(options, name, text)
        except ValueError as error:
            problems.append(f"{source}: --{name}: {error}")
            continue
        if ours is None:
            continue
        name, text = ours
        option = _find(options, name)
        if option is None:
            problems.append(f"{source}: there is no option --{name}{_nearest(options, name)}")
            continue
        if key and not (option.per_host or option.named):
            problems.append(f"{source}: --{name} holds for the whole server; write it without [{key}]")
            continue
        if option.named and not key:
            problems.append(f"{source}: --{name} is set by name: --{name}[NAME]={option.example or 'value'}")
            continue
        if name == "config" and (name, key) in settings:
            text = f"{settings[name, key].text},{text}"
        settings[name, key.lower() if option.per_host else key] = _Setting(text, source)
    return settings


def _from_environment(
    options: Mapping[str, Option], environment: Mapping[str, str], problems: list[str]
) -> dict[tuple[str, str], _Setting]:
    settings: dict[tuple[str, str], _Setting] = {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT):
            continue
        name = variable.removeprefix(ENVIRONMENT).lower().replace("_", "-")
        from_file = name.removesuffix("-file")
        option = _find(options, name)
        if option is None and name.endswith("-file") and (secret := options.get(from_file)) and secret.secret:
            try:
                settings[from_file, ""] = _Setting(Path(text).read_text().strip(), f"file of {variable}")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{variable}: the file can't be read: {error}")
        else:
            try:
                ours = _ours(options, name, text.strip())
            except ValueError as error:
                problems.append(f"environment: {variable}: {error}")
                continue
            if ours is not None and _find(options, ours[0]) is None:
                problems.append(f"environment: {variable} is no option{_nearest(options, name)}")
            elif ours is not None:
                settings[ours[0], ""] = _Setting(ours[1], "environment")
    return settings


def _nearest(options: Mapping[str, Option], name: str) -> str:
    near = difflib.get_close_matches(name, options, 1, 0.6)
    return f"; did you mean --{near[0]}?" if near else "; `tidings options` lists all"
