"""How a command ends: exit codes, one line for the user's errors, a traceback for ours."""

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import univg_jax
from univg_jax import checkpoint, configs, errors, version
from univg_jax.cli.main import COMMANDS, main, parse
from univg_jax.cli.parser import Parser

KINDS = [
    v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.UserError)
]
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


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")]
)
def test_a_signal_is_one_line_and_its_exit_code(monkeypatch, capsys, number, line):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(checkpoint, "verify", lambda path: os.kill(os.getpid(), number))
    assert main(COMMAND) == 128 + number
    assert capsys.readouterr().err == f"univg checkpoint: {line}\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_that_an_extension_turns_into_another_error(monkeypatch, capsys):
    """As numpy does where it comes while it is imported."""

    def verify(path):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("error while initializing the extension") from None

    monkeypatch.setattr(checkpoint, "verify", verify)
    assert main(COMMAND) == 143
    assert capsys.readouterr().err == "univg checkpoint: ended by SIGTERM\n"


@pytest.mark.filterwarnings("error")
def test_a_signal_in_a_callback_which_drops_errors_is_not_lost(monkeypatch, capsys):
    class Closing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def verify(path):
        closing = Closing()
        del closing
        time.sleep(60)

    monkeypatch.setattr(checkpoint, "verify", verify)
    assert main(COMMAND) == 143
    assert capsys.readouterr().err == "univg checkpoint: ended by SIGTERM\n"


# Is in one call of C for minutes, as a compilation is, and has started another process.
BUSY = """
import hashlib, multiprocessing, sys, time
from univg_jax import checkpoint
from univg_jax.cli import main
multiprocessing.Process(target=time.sleep, args=[60], daemon=True).start()

def verify(path):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha1", b"", b"", 2**30)
checkpoint.verify = verify
sys.exit(main.main(["checkpoint", "verify", "x"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_does_not_listen(number):
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"busy\n"
        time.sleep(0.5)  # until it is in the call
        process.send_signal(number)
        _, printed = process.communicate(timeout=30)  # until all that could print have ended
        assert process.returncode == 128 + number
        (line,) = printed.splitlines()
        assert line.startswith(b"univg")


USES_JAX = """
import sys, jax
from univg_jax import checkpoint
from univg_jax.cli import main
from univg_jax.errors import UserError

def verify(path):
    jax.devices()
    raise UserError("the only line")
checkpoint.verify = verify
sys.exit(main.main(["checkpoint", "verify", "x"]))
"""


def test_no_alarm_about_a_tpu_where_there_is_none():
    environment = {k: v for k, v in os.environ.items() if "TPU" not in k and k != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", USES_JAX], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (1, b"univg checkpoint: error: the only line\n")


@pytest.mark.parametrize("arguments", [[], ["checkpoint"], ["data"]])
def test_a_command_without_what_it_needs_shows_its_help(capsys, arguments):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(" ".join(["usage: univg", *arguments]))
    assert captured.err == ""


def test_the_version_names_the_revision(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"univg {version.describe()}\n"
    assert univg_jax.__version__ in version.describe()


HELP = """
import contextlib, io, sys
from univg_jax.cli.main import COMMANDS, main
actions = {"data": ["build", "inspect", "cache"], "checkpoint": ["list", "verify", "copy"]}
lines = [[name, *more] for name in COMMANDS for more in [[], *([a] for a in actions.get(name, []))]]
for line in [[], *lines]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main([*line, "--help"])
    assert text.getvalue().startswith(" ".join(["usage: univg", *line])), line
print(*(m for m in ("jax", "tensorflow_datasets", "orbax", "matplotlib") if m in sys.modules))
"""


def test_help_needs_nothing_slow():
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["chekpoint", "list"], "unknown command 'chekpoint'; did you mean 'checkpoint'?"),
        (["--versoin"], "unknown flag --versoin; did you mean '--version'?"),
        (["--hlp", "sample"], "unknown flag --hlp; did you mean '--help'?"),
        (["checkpoint", "lst"], "unknown action 'lst'; did you mean 'list'?"),
        (["checkpoint", "list"], "the following arguments are required: DIR"),
        # also before what is required, which the misspelled flag may be
        (["sample", "--promt=a pig"], "unknown flag --promt; did you mean '--prompt'?"),
        (["sample", "--promt", "a pig"], "unknown flag --promt; did you mean '--prompt'?"),
        (["evaluate", "--checkpiont=x"], "unknown flag --checkpiont; did you mean '--checkpoint'?"),
        (["data", "build", "--reslution=3"], "did you mean '--resolution'?"),
        (["checkpoint", "copy", "--stepp=3", "a"], "did you mean '--step'?"),
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


def leaves(parser):
    """The parsers below one that take flags."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    below = [leaf for a in nested for child in a.choices.values() for leaf in leaves(child)]
    return below or [parser]


def command_parsers():
    for name in COMMANDS:
        parser = Parser(prog=f"univg {name}", description=name)
        importlib.import_module(f"univg_jax.cli.{name}").add_arguments(parser)
        yield from leaves(parser)


@pytest.mark.parametrize("parser", list(command_parsers()), ids=lambda parser: parser.prog)
def test_help_explains_every_flag_and_its_example_parses(parser):
    assert not [action.dest for action in parser._actions if not action.help]
    _, *examples = parser.epilog.split("example:\n")
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        args = parse(arguments)
        assert program == "univg"
        if hasattr(args, "config"):
            configs.load(args.config, args.overrides)
