"""How a command ends: exit codes, one line for the user's errors, a traceback for ours."""

import pytest

from univg_jax import checkpoint, errors
from univg_jax.cli.main import main

KINDS = [errors.UserError, *errors.UserError.__subclasses__()]
COMMAND = ["checkpoint", "verify", "DIR"]


@pytest.fixture
def fails_with(monkeypatch):
    """Makes the library function behind `COMMAND` raise an exception."""

    def change(error):
        def verify(path):
            raise error

        monkeypatch.setattr(checkpoint, "verify", verify)

    return change


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_users_error_is_one_line_and_its_exit_code(fails_with, capsys, kind):
    fails_with(kind("DIR is empty"))
    code = main(COMMAND)
    word = "" if kind is errors.Preempted else "error: "
    assert capsys.readouterr().err == f"univg checkpoint: {word}DIR is empty\n"
    assert code == (143 if kind is errors.Preempted else 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_verbose_shows_a_users_error_with_its_traceback(fails_with, capsys, kind):
    fails_with(kind("DIR is empty"))
    code = main(["--verbose", *COMMAND])
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "in verify" in printed
    assert printed.endswith(f"{kind.__name__}: DIR is empty\n")
    assert code == kind.exit_code


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, RuntimeError, ConnectionError])
def test_a_bug_keeps_its_traceback(fails_with, capsys, kind):
    """Also where a kind of UserError has the same base class."""
    fails_with(kind("shapes (2,) and (3,)"))
    assert main(COMMAND) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "in verify" in printed
    assert printed.endswith(f"{kind.__name__}: shapes (2,) and (3,)\n")


def test_an_interrupt_is_one_line(fails_with, capsys):
    fails_with(KeyboardInterrupt())
    assert main(COMMAND) == 130
    assert capsys.readouterr().err == "univg checkpoint: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["checkpoint", "list"], "the following arguments are required: DIR"),
        ([*COMMAND, "--config.optim.lr=1"], "--config.optim.lr=1: checkpoint takes no config"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "--help" in line
