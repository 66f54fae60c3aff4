"""What an option is, and how its text becomes a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

_BOOLS = {
    "true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+)\s*([kKmMgG]?)(?:i?[bB])?")
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h)?")
_TIMES = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class OptionType(Enum):
    """The kinds of values, each with what it becomes in Python."""

    TEXT = auto()  # str
    SECRET = auto()  # str, never shown
    BOOL = auto()
    COUNT = auto()  # int, not negative
    PORT = auto()  # int, 0 to 65535
    BYTES = auto()  # int; "256k", "1M"
    SECONDS = auto()  # float; "5", "5s", "500ms", "2m"
    PATH = auto()  # Path, or None for ''
    LIST = auto()  # list[str], by commas
    PORTS = auto()  # list[int]
    HOSTS = auto()  # list[str], domains as RFC 7622 prepares them
    CHOICE = auto()  # str, one of `choices`
    STRATEGY = auto()  # str
    COMPONENT = auto()  # str


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name without dashes, its type, its default as it would be written, and its meaning."""

    name: str
    type: OptionType
    default: str
    meaning: str
    # --name[example.org]=value sets it for one virtual host.
    per_host: bool = False
    # --name[NAME]=value is the only way to set it.
    named: bool = False
    # The name ends in -N, which stands for a number.
    pattern: bool = False
    choices: tuple[str, ...] = ()
    at_least: float = 0
    example: str = ""

    @property
    def secret(self) -> bool:
        return self.type is OptionType.SECRET

    def value(self, text: str) -> Any:
        """The value that a text stands for. Raises ValueError with what would be right."""
        kind = self.type
        text = text.strip()
        if kind in (OptionType.TEXT, OptionType.SECRET):
            return text
        if kind is OptionType.BOOL:
            if text.lower() not in _BOOLS:
                raise ValueError("say true or false")
            return _BOOLS[text.lower()]
        if kind in (OptionType.COUNT, OptionType.PORT):
            return self._bounded(_port(text) if kind is OptionType.PORT else _count(text))
        if kind is OptionType.BYTES:
            size = _SIZE.fullmatch(text)
            if size is None:
                raise ValueError("say a number of bytes, such as 262144, 256k or 1M")
            return self._bounded(int(size[1]) * _SIZES[size[2].lower()])
        if kind is OptionType.SECONDS:
            time = _TIME.fullmatch(text)
            if time is None:
                raise ValueError("say a time, such as 5s, 500ms or 2m")
            return self._bounded(float(time[1]) * _TIMES[time[2] or ""])
        if kind is OptionType.PATH:
            return Path(text).expanduser() if text else None
        if kind is OptionType.LIST:
            return _list(text)
        if kind is OptionType.PORTS:
            return [_port(port) for port in _list(text)]
        if kind is OptionType.HOSTS:
            return _hosts(text)
        if kind is OptionType.CHOICE:
            if text not in self.choices:
                raise ValueError(f"say one of {', '.join(self.choices)}")
            return text
        from tidings.kit.option_table import COMPONENT_CLASSES, STRATEGIES

        return (STRATEGIES if kind is OptionType.STRATEGY else COMPONENT_CLASSES).get(text, text)

    def _bounded(self, value: Any) -> Any:
        if value and value < self.at_least:
            raise ValueError(f"the least is {self.at_least:g}")
        return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("say a number that is not negative")
    return int(text)


def _port(text: str) -> int:
    number = _count(text)
    if number > 65535:
        raise ValueError("ports are 1 to 65535")
    return number


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _hosts(text: str) -> list[str]:
    from tidings.xmpp.jid import JidError, prepare_domain

    hosts: list[str] = []
    for name in _list(text):
        try:
            hosts.append(prepare_domain(name.lower()))
        except JidError:
            raise ValueError(f"{name!r} is no domain name") from None
    if not hosts:
        raise ValueError("name at least one host")
    return list(dict.fromkeys(hosts))
