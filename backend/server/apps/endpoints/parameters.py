"""The names of what a caller tells."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# A body may have very many names, and looking for what they look like is slow.
_LONGEST, _MOST = 60, 20


def unknown(told: Iterable[str], known: Collection[str], offered: Collection[str] | None = None) -> dict[str, str]:
    """What is wrong with each name that is not known, as far as that is told.

    A misspelt name that is passed over gets another answer than was asked for, without a word. offered: those that say
    anything; by default all.
    """
    offered = known if offered is None else offered
    wrong = [name for name in told if name not in known][:_MOST]
    return {name[:_LONGEST]: f"There is nothing of this name here; {_remedy(name, offered)}" for name in wrong}


def _remedy(name: str, offered: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name[:_LONGEST].lower(), offered, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"use {', '.join(offered)}." if offered else "leave it out."
