"""The command line: arguments in, a report out, an exit code.

Every module of this package but `common` is one command: HELP, EPILOG, configure(parser), run(args) -> exit code.
Only the module of the command that was called is imported, so that start-up stays near argparse's own 0.03 s.

Exit codes: 0 done, or the same function; 1 different; 2 could not run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys

from bnport._lazy import TYPE_CHECKING
from bnport.errors import BnportError, InvalidValue, printable

if TYPE_CHECKING:
    from typing import NoReturn

_USAGE_ERROR = 2
_WRITES_NOTHING = ("formats", "show")  # and start in a moment: what the others need is not imported for them


def commands() -> list[str]:
    """The commands that exist, by listing this package's folder."""
    modules = {name.split(".")[0] for name in os.listdir(os.path.dirname(__file__)) if not name.startswith("_")}
    return sorted(modules - {"common"})


class _Help(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, found without shutil: argparse makes one of these for every argument."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() else 0
        if not width:
            try:
                width = os.get_terminal_size(1).columns
            except OSError:  # no terminal
                width = 80
        super().__init__(prog, width=max(width, 40) - 2)


class _Parser(argparse.ArgumentParser):
    as_json = False

    def error(self, message: str) -> NoReturn:
        """Also as JSON on standard output where that was asked for."""
        if _Parser.as_json:
            from bnport.cli import common

            common.print_failure(InvalidValue(message))
        super().error(message)


def parser_of(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own arguments are configured, of the others just the one-line help is known."""
    parser = _Parser(
        prog="bnport",
        description="Move BatchNorm parameters between deep-learning frameworks, and prove the result.",
        epilog="'bnport COMMAND --help' shows a command's options and examples.\n"
        "Exit codes: 0 done, or the same function; 1 different; 2 could not run.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    # prog is given because argparse would import shutil to find it out
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog="bnport")
    for name in [command] if command else commands():
        module = importlib.import_module(f"bnport.cli.{name}")
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EPILOG,
            formatter_class=_Help,
        )
        module.configure(sub)
        sub.set_defaults(execute=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a bnport error becomes one line on standard error and 2."""
    from bnport.cli import common

    args = argparse.Namespace(written=[])
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments, args)
        except BnportError as error:
            _complain(printable(error, 4000))
            if getattr(args, "json", False):
                common.print_failure(error)
        finally:  # after --help too: what fails at the interpreter's own end cannot be told any more
            common.flush_output()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop(1)
    except common.Unprinted as error:
        _complain(f"standard output cannot be written to ({error}){_written(args)}")
        _drop(1)
    except KeyboardInterrupt:
        _complain(f"interrupted; no file is half-written{_written(args)}")
    except MemoryError:
        _complain(f"not enough memory; no file is half-written{_written(args)}")
    except Exception:  # a fault of ours: not 1, which says that two models differ
        import traceback

        traceback.print_exc()
        _complain(f"this is a fault in bnport; please report it, with the lines above{_written(args)}")
    return _USAGE_ERROR


def _written(args: argparse.Namespace) -> str:
    return "".join(f"; {printable(path)} is written" for path in args.written)


class _Terminable:
    """While open, SIGTERM and SIGHUP are interruptions like Ctrl-C: temporary files are removed, a checkpoint is kept.

    The second one ends the process at once.
    """

    def __enter__(self) -> None:
        import signal

        self._taken: list[signal.Signals] = []
        for number in (signal.SIGTERM, signal.SIGHUP):
            try:
                if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
                    signal.signal(number, self._interrupt)
                    self._taken.append(number)
            except ValueError:  # not in the main thread
                return

    def __exit__(self, *_: object) -> None:
        import signal

        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)

    @staticmethod
    def _interrupt(number: int, _: object) -> None:
        import signal

        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt


def _run(arguments: list[str], args: argparse.Namespace) -> int:
    _Parser.as_json = "--json" in arguments
    called = next((word for word in arguments if not word.startswith("-")), None)
    parser = parser_of(called if called in commands() else None)
    parser.parse_args(arguments, args)
    if args.version:
        from bnport import __version__
        from bnport.cli import common

        common.say(f"bnport {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return _USAGE_ERROR
    if args.command in _WRITES_NOTHING:
        code: int = args.execute(args)
    else:
        with _Terminable():
            code = args.execute(args)
    return code


def _complain(text: str) -> None:
    try:
        print(f"bnport: {text}", file=sys.stderr)
    except OSError:  # the exit code still says it
        _drop(2)


def _drop(descriptor: int) -> None:
    """From now on what is written there goes nowhere, also what the interpreter still holds when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def entry() -> None:
    """The console script. OpenBLAS threads cost 0.09 s of CPU at every numpy import and nothing here needs them."""
    sys.setswitchinterval(1e-4)  # seconds: the thread that hashes a file waited 5 ms for each of its turns of 1 ms
    gc.set_threshold(10_000)  # a command soon ends: looking for garbage among what it keeps was a tenth of a listing
    if not any(word in ("calibrate", "stats", "trace") for word in sys.argv[1:2]):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # a framework's start-up chatter is not our output
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): else a model file would get its descriptor, in this order
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    sys.exit(main())
