"""Options and output that several commands share."""

from __future__ import annotations

import sys

from bnport._lazy import TYPE_CHECKING
from bnport.errors import InvalidValue, first_line, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from bnport.verify import Report

# option of an adapter's read() -> help; on the command line with dashes
ADAPTER_OPTIONS = {
    "key": "the entry of a nested checkpoint that holds the weights (state_dict, model_ema, ...)",
    "stat": "what an ambiguous statistic holds: variance, std or inverse-std; stored: of ONNX in training mode",
    "blob_order": "order of a one-channel Caffe layer with five blobs: mean-first or scale-first",
    "absent": "which of gamma and beta the three-array .weights.h5 layers lack: gamma, beta, or bn1=gamma,bn2=beta,...",
    "prototxt": "the .prototxt of a .caffemodel; its epsilon and use_global_stats win",
}
ADAPTER_FLAGS = {
    "inplace_abn": "the source's layers are InPlaceABN: gamma = |weight| + epsilon",
    "allow_untrained": "take Caffe layers whose scale factor is 0 (mean = variance = 0)",
}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """--epsilon, --format and the adapters' own options, for the (first) model that a command reads."""
    group = parser.add_argument_group("how the source is read")
    group.add_argument("--epsilon", type=float, metavar="E", help="epsilon of a source that does not store it")
    group.add_argument("--format", metavar="NAME", help="read the source as this format instead of finding it out")
    for name, text in ADAPTER_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=text)
    for name, text in ADAPTER_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=text)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_source_options collected, for adapters.read; options not given are left out."""
    names = ("format", *ADAPTER_OPTIONS, *ADAPTER_FLAGS)
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def add_pairing_options(parser: argparse.ArgumentParser) -> None:
    """--map, --skip, --only-under and what is known about the target."""
    group = parser.add_argument_group("which layer belongs to which")
    group.add_argument("--map", metavar="FILE", help="a TOML file of target = source names, as 'bnport map' writes")
    group.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="leave these layers out; repeatable"
    )
    group.add_argument(
        "--only-under", metavar="PREFIX", help="pair only layers below this name, on the side that has it"
    )
    target = parser.add_argument_group("how the target is read")
    target.add_argument("--target-epsilon", type=float, metavar="E", help="epsilon of a target that does not store it")
    target.add_argument(
        "--target-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a format's own option for the target",
    )


def pairing_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_pairing_options collected, as keyword arguments of convert and verify."""
    options: dict[str, Any] = {
        "skip": args.skip,
        "only_under": args.only_under,
        "target_epsilon": args.target_epsilon,
        "target_options": dict(_named(text) for text in args.target_option),
    }
    if args.map is not None:
        from bnport.mapfile import read_map

        options["map"], skip = read_map(args.map)
        options["skip"] = [*skip, *args.skip]
    return options


def _named(text: str) -> tuple[str, str | bool]:
    name, equals, value = text.partition("=")
    if name == "epsilon":
        raise InvalidValue("--target-option epsilon: say --target-epsilon")
    given = {"true": True, "false": False}.get(value.lower(), value)
    return name.replace("-", "_"), given if equals else True


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_sha256(parser: argparse.ArgumentParser) -> None:
    """--no-sha256."""
    parser.add_argument(
        "--no-sha256",
        dest="sha256",
        action="store_false",
        help="leave the inputs' sha256 out of the report: of a file only what BatchNorm needs is read then",
    )


class Unprinted(Exception):
    """Standard output takes nothing (a full disk); says why. Commands print when all else is done."""


def say(text: object = "", end: str = "\n") -> None:
    """Print on standard output; Unprinted where that cannot be, BrokenPipeError where its reader went away."""
    try:
        print(text, end=end)
    except BrokenPipeError:
        raise
    except (OSError, UnicodeEncodeError) as error:
        raise Unprinted(getattr(error, "strerror", None) or first_line(error)) from error


def flush_output() -> None:
    """Have all that was printed written now; raises as `say` does."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unprinted(error.strerror or first_line(error)) from error


def print_json(value: object) -> None:
    """One JSON document on standard output, whole or not at all; NaN and infinity never appear in it."""
    import json

    say(json.dumps(value, indent=1, allow_nan=False))


def print_failure(error: Exception) -> None:
    """What ended a command, as a JSON document: {"ok": false, "error": {kind, message}}, and a refused pairing whole."""
    failure: dict[str, object] = {
        "ok": False,
        "error": {"kind": type(error).__name__, "message": printable(error, 4000)},
    }
    match: Any = getattr(error, "match", None)
    if match is not None:
        failure["pairing"] = match.to_dict()
    print_json(failure)


def add_html(parser: argparse.ArgumentParser) -> None:
    """--html."""
    parser.add_argument("--html", metavar="FILE", help="also write the report as one self-contained page")


def check_html(args: argparse.Namespace, *models: str | None) -> None:
    """Refuse an --html file that cannot be written or is one of the models, before anything is done."""
    if args.html is not None:
        from bnport.html import check_page

        check_page(args.html, force=args.force, models=[model for model in models if model is not None])


def finish(report: Report, args: argparse.Namespace) -> int:
    """Print a report as asked, write its page if asked, and give the exit code: 0 the same function, 1 different."""
    if getattr(args, "html", None):
        from bnport.html import write_page

        write_page(report, args.html, force=getattr(args, "force", False))
    args.written = [path for path in (report.out, getattr(args, "html", None)) if path]
    if args.json:
        print_json(report.to_dict())
    else:
        say(report)
    return 0 if report.ok else 1


class Progress:
    """A one-line display on a terminal's standard error, with an estimate of the time left; it is gone when the block ends.

    `with Progress() as progress:` gives what a progress= argument takes: a function of (done, total, what), total 0
    while unknown; None, so that nothing is counted, where there is no terminal or with `quiet`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        # when the work began, and what was done by then (of a resumed run)
        self._first: tuple[float, int] | None = None
        self._last, self._what, self._shown, self._text = 0, "", 0.0, ""

    def __enter__(self) -> Callable[[int, int, str], None] | None:
        from bnport.containers import files

        if self._quiet or not sys.stderr.isatty():
            return None
        files.watch(self._show)
        return self._show

    def __exit__(self, *_: object) -> None:
        from bnport.containers import files

        files.watch(None)
        if self._text:
            self._put("")

    def _show(self, done: int, total: int, what: str) -> None:
        import time

        now = time.monotonic()
        another = done < self._last or (what.startswith("MB") and what != self._what)  # piece of work, which begins
        if self._first is None or another:
            self._first = now, done
        self._last, self._what = done, what
        if now - self._shown < 0.1 and (done < total or not total):
            return
        self._shown = now
        elapsed, new = now - self._first[0], done - self._first[1]
        if total and done >= total:
            self._put("")
        elif total:
            left = f", {elapsed / new * (total - done):.0f} s left" if new > 0 else ""
            self._put(f"{done}/{total} {printable(what, 60)}{left}")
        else:
            self._put(f"{done} done, {printable(what, 60)}, {elapsed:.0f} s")

    def _put(self, text: str) -> None:
        self._text = text
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of --size: HEIGHTxWIDTH, HEIGHT,WIDTH, or one number for both."""
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise InvalidValue(f"--size: expected HEIGHTxWIDTH, such as 224x224, got {printable(text)!r}")
    return int(parts[0]), int(parts[-1])


def name_list(text: str) -> list[str]:
    """A comma-separated list of names, for --only."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise InvalidValue("expected a comma-separated list of names")
    return names
