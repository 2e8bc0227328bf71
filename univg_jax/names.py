"""Unknown names: one line with the nearest known one; standard library only, so that any room may
ask.
"""

import difflib
from collections.abc import Collection

MAX_LISTED = 24  # longer lists, such as all keys of a config, are left out


def known(name: object, names: Collection[str], *, what: str) -> str:
    """`name` if it is one of `names`; otherwise ValueError `unknown {what} {name!r}` and the hint."""
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}{hint(name, names)}")
    return name


def hint(name: object, names: Collection[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'b'? (known: a, b)`."""
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.3)
    listed = f" (known: {', '.join(names) or 'none'})" if len(names) <= MAX_LISTED else ""
    return (f"; did you mean {near[0]!r}?" if near else "") + listed
