"""The chat as a person has it: the real program with the bundled model, in a pseudo-terminal."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from command import environment, warm

from tools.terminal_picture import Terminal

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
FOREVER = ("-n", "100000", "--ignore-eos")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment whose conversations are nobody's, with the kernels that there are."""
    warm()
    from cpuinfer.kernels import jit

    assert jit.CACHE is not None
    directory = tmp_path_factory.mktemp("home")
    cache = directory / "cache" / "cpuinfer"
    cache.mkdir(mode=0o700, parents=True)
    (cache / "kernels").symlink_to(jit.CACHE.parent)
    yield {"XDG_CACHE_HOME": str(cache.parent), "XDG_DATA_HOME": str(directory / "data")}


def chat(home: dict[str, str], *options: str, columns: int = 80, **more: str) -> Terminal:
    argv = [sys.executable, "-m", "cpuinfer", "chat", *options]
    variables = environment(TERM="xterm-256color", **home) | more
    return Terminal(argv, columns=columns, environment=variables)


def say(terminal: Terminal, text: str, until: str = "tok/s") -> None:
    """Type a message; the reply has ended when its statistics are shown once more."""
    seen = terminal.text.count(until)
    terminal.type(text + ENTER)
    terminal.wait_for(until, seen + 1)


def wait_for_prompt(terminal: Terminal) -> None:
    """The last line is empty but for the sign that a message can be typed."""
    terminal.wait_until(lambda: terminal.text.splitlines()[-1:] == [">"])


def test_a_conversation(home: dict[str, str]) -> None:
    with chat(home, "-n", "30", "--no-save") as terminal:
        terminal.wait_for("/help for commands")
        assert "endless, with a window of 128" in terminal.text
        wait_for_prompt(terminal)
        say(terminal, "Once upon a time")
        assert re.search(r"30 tokens, [\d,.]+ tok/s, context \d+, window of 128", terminal.text)
        wait_for_prompt(terminal)
        terminal.type("/show" + ENTER)
        terminal.wait_for("2 messages")
        terminal.type("/tempo" + ENTER)
        terminal.wait_for("there is no command /tempo")
        terminal.type("/set temprature 1" + ENTER)
        terminal.wait_for("temperature")
        wait_for_prompt(terminal)
        terminal.type("/ex\t")
        terminal.wait_for("> /exit")  # Tab completes
        terminal.type(ENTER)
        assert terminal.wait_for_end() == 0


def test_a_paste_of_several_lines_is_one_message(home: dict[str, str]) -> None:
    with chat(home, "-n", "20", "--no-save") as terminal:
        wait_for_prompt(terminal)
        terminal.type("\x1b[200~One line,\nanother line,\n\na last one\x1b[201~")
        terminal.wait_for("a last one")
        assert "tok/s" not in terminal.text  # it is not sent by itself
        say(terminal, "!")
        wait_for_prompt(terminal)
        terminal.type("/show" + ENTER)
        terminal.wait_for("2 messages")


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(home: dict[str, str]) -> None:
    with chat(home, *FOREVER, "--no-save") as terminal:
        wait_for_prompt(terminal)
        terminal.type("Once upon a time" + ENTER)
        terminal.wait_until(lambda: len(terminal.text) > 700)
        terminal.type(CTRL_C)
        wait_for_prompt(terminal)
        terminal.type("/show" + ENTER)
        terminal.wait_for("2 messages")
        wait_for_prompt(terminal)
        terminal.type("half a message" + CTRL_C)  # clears the line, and does not leave
        wait_for_prompt(terminal)
        terminal.type(CTRL_C)
        assert terminal.wait_for_end() == 130


def test_ctrl_c_while_the_model_reads(home: dict[str, str], tmp_path: Path) -> None:
    document = tmp_path / "long.txt"
    document.write_text("The dog saw the girl and the boy in the garden. " * 30_000)
    with chat(home, "-n", "20", "--no-save") as terminal:
        wait_for_prompt(terminal)
        terminal.type(f"/file {document}" + ENTER)
        terminal.wait_for("tokens")
        wait_for_prompt(terminal)
        terminal.type("What is this?" + ENTER)
        terminal.wait_for("ETA")
        assert re.search(r"reading prompt \d+/\d+  [\d.]+ tok/s  ETA", terminal.text)
        terminal.type(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for("\n> What is this?")  # it is there to be edited
        terminal.type(CTRL_C)
        wait_for_prompt(terminal)
        terminal.type("/show" + ENTER)
        terminal.wait_for("0 messages")
        wait_for_prompt(terminal)
        terminal.type(CTRL_D)
        assert terminal.wait_for_end() == 0


def test_what_is_typed_while_a_reply_is_written_is_the_next_message(home: dict[str, str]) -> None:
    with chat(home, "-n", "400", "--ignore-eos", "--no-save") as terminal:
        wait_for_prompt(terminal)
        terminal.type("Once upon a time" + ENTER)
        terminal.wait_for("\n")
        terminal.type("/show" + ENTER)
        terminal.wait_for("2 messages")


def test_a_conversation_comes_back_after_the_program_was_killed(home: dict[str, str]) -> None:
    settings = ("--seed", "3", "-n", "150", "--ignore-eos")
    first, second = "Once upon a time there was a dog", "And then?"
    with chat(home, *settings, "--no-save") as terminal:
        wait_for_prompt(terminal)
        say(terminal, first)
        wait_for_prompt(terminal)
        say(terminal, second)
        stayed = terminal.text.split("> " + second)[1]
    with chat(home, *settings) as terminal:
        wait_for_prompt(terminal)
        say(terminal, first)
        wait_for_prompt(terminal)
        terminal.type("/set max_tokens 100000" + ENTER)
        wait_for_prompt(terminal)
        terminal.type("Why?" + ENTER)
        terminal.wait_until(lambda: terminal.screen.cursor.y > 20)
        terminal.process.send_signal(signal.SIGKILL)
    with chat(home, "--resume", *settings) as terminal:
        wait_for_prompt(terminal)
        assert "2 messages" in terminal.text
        say(terminal, second)
        resumed = terminal.text.split("> " + second)[1]
        wait_for_prompt(terminal)
        terminal.type("/stats" + ENTER)
        terminal.wait_for("more were known already")
    assert _words(resumed) == _words(stayed)
    known = re.search(r"\((\d+) more were known already\)", terminal.text)
    assert known is not None
    assert int(known[1]) > 150


def _words(reply: str) -> list[str]:
    """Those of a reply, without its statistics."""
    return re.split(r"\d+ tokens, ", reply)[0].split()


def test_a_narrow_terminal_and_another_size(home: dict[str, str]) -> None:
    with chat(home, "-n", "40", "--no-save", columns=20) as terminal:
        wait_for_prompt(terminal)
        say(terminal, "Once upon a time there was", until="tok/s,")
        wait_for_prompt(terminal)
        terminal.resize(60, 20)
        say(terminal, "And then?", until="tok/s,")
        wait_for_prompt(terminal)
        terminal.type("/exit" + ENTER)
        assert terminal.wait_for_end() == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TERM": "dumb"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["dumb", "locale C", "dumb and locale C", "latin-1"],
)
def test_poor_terminals(home: dict[str, str], variables: dict[str, str]) -> None:
    with chat(home, "-n", "20", "--no-save", **variables) as terminal:
        terminal.wait_for("/help for commands")
        wait_for_prompt(terminal)
        seen = terminal.text.count("tok/s")
        terminal.type("Once \xff upon ä time".encode("latin-1") + ENTER.encode())
        terminal.wait_for("tok/s", seen + 1)
        assert "Traceback" not in terminal.text
        wait_for_prompt(terminal)
        terminal.type("/exit" + ENTER)
        assert terminal.wait_for_end() == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_conversation(home: dict[str, str]) -> None:
    """Of 20,000 tokens the text and the ids are kept, some 100 bytes each: no keys and values."""
    with chat(home, "-n", "500", "--ignore-eos", "--plain", columns=200) as terminal:
        wait_for_prompt(terminal)
        say(terminal, "Once upon a time there was a dog")
        wait_for_prompt(terminal)
        after_500 = _resident(terminal.process.pid)
        while _context(terminal) < 20_000:
            before = _context(terminal)
            terminal.type("And then?" + ENTER)
            terminal.wait_until(lambda before=before: _context(terminal) > before)  # type: ignore
        after_20000 = _resident(terminal.process.pid)
    print(after_500 / 2**20, after_20000 / 2**20)
    assert after_20000 - after_500 < 8 << 20


def _context(terminal: Terminal) -> int:
    """The tokens of the conversation that were shown last."""
    return int(re.findall(r"context ([\d,]+), window", terminal.text)[-1].replace(",", ""))


def _resident(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10
