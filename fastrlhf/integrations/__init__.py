"""Our ops under other people's trainers: `trl`, `verl`, `openrlhf`.

A module here imports its trainer only when it is asked to patch or to register. It replaces named
symbols and puts the very same objects back. It refuses versions outside the series that its tests
were written for: these symbols are private, and a trainer that moved them would train on with its
own op, unsaid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

__all__ = ["Package", "Patch", "Replacement"]


@dataclass(frozen=True)
class Package:
    """A trainer and the versions that its adapter is written for."""

    name: str
    """as pip knows it"""
    series: str
    """"1.16" stands for every 1.16.x"""
    tried: tuple[str, ...]
    """versions that the tests ran with"""

    def require(self) -> str:
        """The installed version. Raises ImportError where there is none, or one of another series.

        Reads the package's metadata and imports nothing.
        """
        wanted = f"{self.name} {self.series}.x (tried with {', '.join(self.tried)})"
        install = f"pip install '{self.name}=={self.tried[-1]}'"
        try:
            found = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            raise ImportError(
                f"{self.name} is not installed; needed: {wanted}: {install}"
            ) from None
        if not f"{found}.".startswith(f"{self.series}."):
            raise ImportError(
                f"found {self.name} {found}, whose private symbols may differ; "
                f"needed: {wanted}: {install}"
            )
        return found

    def expect(self, where: str, function: Callable[..., object], names: Sequence[str]) -> None:
        """Raise RuntimeError unless the parameters of `function` are `names`."""
        found = tuple(inspect.signature(function).parameters)
        if found != tuple(names):
            raise RuntimeError(
                f"{where} takes {found}, expected {tuple(names)}: other code has replaced it, or "
                f"this {self.name} differs from what was tried ({', '.join(self.tried)})"
            )


@dataclass(frozen=True)
class Replacement:
    """One symbol: wherever one of `owners()` holds `original` as `name`, it is to hold `ours`."""

    owners: Callable[[], Iterable[object]]
    name: str
    original: object
    ours: object

    def held(self, value: object) -> list[object]:
        """The owners that hold `value`."""
        return [x for x in self.owners() if getattr(x, self.name, None) is value]

    def swap(self, old: object, new: object) -> bool:
        """Put `new` wherever `old` is; whether it was anywhere."""
        holders = self.held(old)
        for owner in holders:
            setattr(owner, self.name, new)
        return bool(holders)


class Patch:
    """Replacements that are made once, and undone by `undo` or by leaving `with patch.apply():`."""

    def __init__(self, find: Callable[[], Sequence[Replacement]]) -> None:
        self._find = find
        self._made: Sequence[Replacement] = ()

    def apply(self) -> Applied:
        """Make the replacements; where they are made already, change nothing.

        Raises RuntimeError where another library has replaced a symbol since.
        """
        lost = [x.name for x in self._made if not x.held(x.ours)]
        if lost:
            raise RuntimeError(f"{_taken(lost)}, so it is not patched any more; undo that first")
        if self._made:
            return Applied(None)
        self._made = self._find()
        for replacement in self._made:
            replacement.swap(replacement.original, replacement.ours)
        return Applied(self)

    def original(self, name: str) -> Any:
        """What was there as `name` before."""
        return next(x.original for x in self._made if x.name == name)

    def undo(self) -> None:
        """Put the original objects back; without `apply`, change nothing.

        Raises RuntimeError where another library has replaced a symbol since: putting the original
        back would undo that library's patch too.
        """
        self._made = [x for x in self._made if not x.swap(x.ours, x.original)]
        if self._made:
            raise RuntimeError(
                f"{_taken([x.name for x in self._made])}, so the original cannot be put back; "
                "undo that first, then unpatch() again"
            )


def _taken(names: Sequence[str]) -> str:
    return f"{', '.join(names)} was replaced by other code after patch()"


class Applied:
    """What `patch()` returns: `with patch(): ...` undoes on leaving what this call has done."""

    def __init__(self, patch: Patch | None) -> None:
        self._patch = patch

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._patch is not None:
            self._patch.undo()
