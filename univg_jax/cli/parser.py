"""The command line's parser: wrong usage is one line that names the nearest right name."""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from univg_jax.errors import suggestion


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser`, with examples, and errors of one line."""

    def __init__(self, *, description: str, **options: Any) -> None:
        super().__init__(
            # It leaves the lines of examples as they are, and those of a description too.
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=textwrap.fill(description, 79),
            **options,
        )

    def add_example(self, arguments: str) -> None:
        """Shows a command line, by its arguments, at the end of the help."""
        example = f"example:\n  {self.prog} {arguments}"
        self.epilog = f"{self.epilog}\n\n{example}" if self.epilog else example

    def add_commands(self, *, dest: str) -> argparse._SubParsersAction:
        """What makes a parser for each command or action, whose name becomes `dest`."""
        # Not `required`: without a name, the help is shown.
        self.set_defaults(run=lambda _: self.print_help())
        return self.add_subparsers(dest=dest, metavar=dest.upper(), parser_class=Parser)

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line, and 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, after a look for unknown flags, which it would name last or never."""
        own = list(args or ())
        if self._subparsers is not None:  # what follows a command's name is the command's
            own = list(itertools.takewhile(lambda a: a.startswith("-"), own))
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for flag in (a.partition("=")[0] for a in own if a.startswith("--")):
            if not any(name.startswith(flag) for name in known):  # they may be cut short
                self.error(f"unknown flag {flag}{suggestion(flag, known)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown {action.dest} {value!r}{suggestion(value, action.choices)}")
        super()._check_value(action, value)
