"""Writes what comes from the program's own tables: the options in manual pages and README, the
commands in a manual page.

    python docs/generate.py            # writes
    python docs/generate.py --check    # ends with 1, and names the files, where something is not up to date

In each file it is the part between two markers, ``NAME`` and ``/NAME`` in a comment; all else is written by hand.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from refclock import cli, options  # noqa: E402 - the tree's own, not an installed one
from refclock.options import Option  # noqa: E402


def allowed(option: Option) -> str:
    """What the option's parser says that it takes."""
    try:
        option.parse([])
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{option.name} takes anything")


def in_toml(option: Option) -> str:
    """The option's type in the configuration file."""
    kind = "number" if allowed(option).startswith("seconds") else "string"
    return f"list of {kind}s" if option.repeatable else kind


def sentence(text: str) -> str:
    """With a capital at the beginning, except of a program's name, and a full stop at the end."""
    capital = text[:1] if text.startswith("chronyd") else text[:1].upper()
    return capital + text[1:].rstrip(".") + "."


# ---- Manual pages: man(7) ------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Text as troff input: hyphens that are typed as such, nothing taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def paragraph(text: str) -> Iterator[str]:
    """Running text, in short lines."""
    yield from (roff(line) for line in wrap(text, 72, break_on_hyphens=False, break_long_words=False))


def tagged(tag: str, *paragraphs: str) -> Iterator[str]:
    """A paragraph with a tag, for which see `flag`."""
    yield ".TP"
    yield tag
    for number, text in enumerate(paragraphs):
        if number:
            yield ".IP"
        yield from paragraph(text)


def flag(name: str, metavar: str | None = None) -> str:
    """An option in bold, what it takes in italics."""
    return f'.BI "{roff(name)}" " {roff(metavar)}"' if metavar else f'.B "{roff(name)}"'


def options_of_run() -> Iterator[str]:
    for option in options.OPTIONS:
        meaning = sentence(option.help)
        if option.default is not None:
            meaning += f" Default: {option.default}."
        if option.repeatable:
            meaning += " May be given several times."
        yield from tagged(flag(f"--{option.name}", option.metavar), meaning)


def keys() -> Iterator[str]:
    for option in options.OPTIONS:
        default = "none" if option.default is None else option.default
        facts = f"{sentence(in_toml(option))} Allowed: {allowed(option)}. Default: {default}."
        yield from tagged(flag(option.name), sentence(option.help), facts)


def commands() -> Iterator[str]:
    parser = cli._parser()
    (actions,) = (action for action in parser._actions if isinstance(action, _SubParsersAction))
    for choice in actions._choices_actions:
        yield from command(actions.choices[choice.dest], choice.dest, choice.help or "")


def command(parser: ArgumentParser, name: str, help: str) -> Iterator[str]:
    arguments = [action for action in parser._actions if action.dest != "help" and action.help != SUPPRESS]
    positional = " ".join(str(action.metavar) for action in arguments if not action.option_strings)
    yield f".SS {roff(name)}{' ' if positional else ''}{roff(positional)}"
    yield from paragraph(sentence(help))
    if name == "run":
        yield "Its options are in"
        yield ".BR vmclock\\-refclock (8)."
        return
    for action in arguments:
        if action.option_strings:
            metavar = "|".join(action.choices) if action.choices else action.metavar if action.nargs != 0 else None
            names = ", ".join(action.option_strings)
            yield from tagged(flag(names, str(metavar) if metavar else None), sentence(action.help or "the format"))
    if parser.epilog:
        yield ".PP"
        yield from paragraph(parser.epilog)


# ---- README --------------------------------------------------------------------------------------


def table() -> Iterator[str]:
    yield "| option | default | allowed | meaning |"
    yield "|---|---|---|---|"
    for option in options.OPTIONS:
        name = f"`--{option.name} {option.metavar}`" + (" …" if option.repeatable else "")
        default = "" if option.default is None else option.default
        yield " | ".join(["| " + name.replace("|", "\\|"), default, allowed(option), option.help + " |"])


# ---- Files ---------------------------------------------------------------------------------------------------

PARTS: tuple[tuple[str, str, str, Callable[[], Iterator[str]]], ...] = (
    ("docs/man/vmclock-refclock.1", '.\\" commands', '.\\" /commands', commands),
    ("docs/man/vmclock-refclock.8", '.\\" options', '.\\" /options', options_of_run),
    ("docs/man/vmclock-refclock.toml.5", '.\\" options', '.\\" /options', keys),
    ("README.md", "<!-- options -->", "<!-- /options -->", table),
)


def generated(text: str, begin: str, end: str, lines: Iterator[str]) -> str:
    """The text with what lies between the markers made anew; unchanged where it has no markers."""
    before, found, rest = text.partition(begin + "\n")
    _, closed, after = rest.partition(end + "\n")
    if not (found and closed):
        return text
    return "".join([before, found, *(line + "\n" for line in lines), closed, after])


def main(arguments: list[str]) -> int:
    """Writes the files that are not up to date, or with --check names them; 1 where --check finds one."""
    stale = []
    for name, begin, end, make in PARTS:
        file = ROOT / name
        text = file.read_text() if file.exists() else ""
        wanted = generated(text, begin, end, make())
        if wanted != text:
            stale.append(name)
            if arguments != ["--check"]:
                file.write_text(wanted)
    for name in stale:
        print(f"{name}: {'not up to date' if arguments == ['--check'] else 'written'}")
    return int(bool(stale) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
