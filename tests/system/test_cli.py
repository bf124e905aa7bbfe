"""Settings given on the command line, renamed flags, parsed flags and exit codes."""

import signal
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import tyro

from utils.system.cli import CLOSED_PIPE, INPUT_SIZE, flag_parser, given_settings, replace_old_flags, run_script
from utils.system.errors import UserError
from utils.system.signals import Stopped


def parse_level(words: list[str]) -> int:
    if words[0] not in ("low", "high"):
        raise ValueError(f"level is {words[0]}, but must be low or high")
    return 1 + ["low", "high"].index(words[0])


@dataclass(frozen=True)
class Config:
    """Settings of a script."""

    level: Annotated[int, flag_parser(parse_level, "LEVEL")] = 0
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)
    identity_start: bool = True
    no_cache: bool = False
    patience: int = 0
    arguments: dict[str, int] = field(default_factory=dict)


def parse(*arguments: str) -> Config:
    return tyro.cli(Config, args=arguments)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], set()),
        (["--patience", "0"], {"patience"}),
        (["--patience=3", "--input-size", "64", "96"], {"patience", "input_size"}),
        (["--input_size", "64"], {"input_size"}),
        (["--no-identity-start"], {"identity_start"}),
        (["--no_identity_start", "--no-cache"], {"identity_start", "no_cache"}),
        (["--no-no-cache"], {"no_cache"}),
        (["--arguments", "patience", "3"], {"arguments"}),
        (["positional", "-h", "--other"], set()),
    ],
)
def test_given_settings_are_the_flags_even_if_equal_to_the_defaults(arguments, given, monkeypatch):
    assert given_settings(Config, arguments) == given
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    assert given_settings(Config) == given


@pytest.mark.parametrize(
    ("old", "new", "notice"),
    [
        (["--write", "a"], ["--save", "a"], "note: --write is now called --save\n"),
        (["--write=a"], ["--save=a"], "note: --write is now called --save\n"),
        (["--no-flip"], ["--no-tta"], "note: --flip is now called --tta\n"),
        (["--frame_step", "2"], ["--frame-stride", "2"], "note: --frame_step is now called --frame-stride\n"),
        (["--save", "write", "--writer", "-write"], ["--save", "write", "--writer", "-write"], ""),
    ],
)
def test_old_flags_are_replaced_with_a_notice(old, new, notice, capsys):
    renamed = {"write": "save", "flip": "tta", "frame-step": "frame-stride"}
    assert replace_old_flags(old, renamed) == new
    assert capsys.readouterr().err == notice


def test_flag_parser_parses_words_and_shows_defaults(capsys):
    assert parse("--level", "high").level == 2
    assert parse().level == 0
    with pytest.raises(SystemExit) as stop:
        parse("--level", "medium")
    assert stop.value.code == 2
    assert "level is medium, but must be low or high" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "--level LEVEL" in shown
    assert "416 416" in shown


def test_input_size_is_a_square_or_height_and_width():
    assert parse("--input-size", "640").input_size == (640, 640)
    assert parse("--input-size", "64", "96").input_size == (64, 96)
    for words in (["64", "96", "128"], ["big"], []):
        with pytest.raises(SystemExit):
            parse("--input-size", *words)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (UserError("a\nb is\x1b[0m missing"), 2, "error: a\\nb is\\x1b[0m missing\n"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT\n"),
        (Stopped(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM\n"),
    ],
)
def test_exit_code_and_message_name_the_cause(error, code, message, monkeypatch, capsys):
    def main(config: Config) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    found = 0
    try:
        run_script(main, Config)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert capsys.readouterr().err == message


def test_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda _: 1 / 0, Config)


def test_closed_pipe_has_its_own_exit_code(monkeypatch, capfd):
    def main(_: Config) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "argv", ["script.py"])
    duplicated = []
    monkeypatch.setattr("os.dup2", lambda *descriptors: duplicated.append(descriptors))
    with pytest.raises(SystemExit) as stop:
        run_script(main, Config)
    assert stop.value.code == CLOSED_PIPE == 141
    assert duplicated


def test_renamed_flags_reach_the_settings(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--stale", "4"])
    found = []
    run_script(found.append, Config, {"stale": "patience"})
    assert found == [Config(patience=4)]
    assert "--stale is now called --patience" in capsys.readouterr().err
