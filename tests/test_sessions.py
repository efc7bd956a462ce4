"""Conversations on disk: what comes back is what was left, and what is damaged is left out."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpuinfer.conversation import Conversation
from cpuinfer.llm import LLM
from cpuinfer.prefixes import PrefixStore
from cpuinfer.sessions import SessionError, Sessions

DEMO = Path(__file__).parents[1] / "cpuinfer/data/demo.gguf"


def conversation(key: str = "k1") -> Conversation:
    llm = SimpleNamespace(path=Path("models/some.gguf"), key=key)
    return Conversation(cast(LLM, llm))


def told() -> Conversation:
    made = conversation()
    made.system, made.on_full = "Be brief.", "shift"
    made.params = {"temperature": 0.5, "logit_bias": {7: -1.5}, "stop": ["x"]}
    made.messages = [
        {"role": "user", "content": "Hello,\n wörld \u2028!"},
        {"role": "assistant", "content": "Good day."},
    ] * 2
    made.unread, made.summary, made.ids, made.tries = 2, "greetings", [1, 5, 9], 3
    return made


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "sessions")


def test_what_comes_back_is_what_was_left(sessions: Sessions) -> None:
    sessions.save("trip", told())
    back = conversation()
    sessions.load("trip", back)
    assert vars(back) | {"llm": 0, "notice": 0} == vars(told()) | {"llm": 0, "notice": 0}
    assert sessions.read("trip").model == str(Path("models/some.gguf").resolve())


def test_tokens_of_another_model_are_not_taken(sessions: Sessions) -> None:
    sessions.save("trip", told())
    back = conversation("k2")
    sessions.load("trip", back)
    assert back.ids == []
    assert back.messages == told().messages


def test_a_list_has_the_newest_first(sessions: Sessions) -> None:
    for name in ("one", "two"):
        sessions.save(name, told())
    path = sessions.directory / "one.json"
    path.write_text(path.read_text().replace('"updated": "20', '"updated": "30'))
    entries = sessions.entries()
    assert [entry.name for entry in entries] == ["one", "two"]
    assert (entries[0].model, entries[0].messages) == ("some.gguf", 4)
    assert entries[0].title == "Hello, wörld !"


def test_a_new_name_is_free(sessions: Sessions) -> None:
    names = set()
    for _ in range(3):
        names.add(name := sessions.new_name())
        sessions.save(name, told())
    assert len(names) == 3


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a" * 49, "a\n", "a b"])
def test_names_that_cannot_be(sessions: Sessions, name: str) -> None:
    with pytest.raises(SessionError, match="cannot name a session"):
        sessions.save(name, told())
    with pytest.raises(SessionError, match="cannot name a session"):
        sessions.read(name)


TWO = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def changed(**fields: Any) -> bytes:
    """A sound session's file, with other fields."""
    sound = {
        "format": "cpuinfer session 1",
        "model": "m.gguf",
        "key": "k1",
        "updated": "2026-01-02T03:04:05+00:00",
        "system": None,
        "params": {},
        "on_full": "stop",
        "messages": TWO,
        "unread": 0,
        "summary": None,
        "ids": [1],
        "tries": 0,
    }
    return json.dumps(sound | fields).encode()


def test_a_sound_file_is_read(sessions: Sessions) -> None:
    sessions.directory.mkdir()
    (sessions.directory / "x.json").write_bytes(changed())
    assert sessions.read("x").ids == [1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        changed()[:-20],
        changed(format="cpuinfer session 2"),
        changed(more=1),
        changed(messages=[{"role": "user", "content": "a"}]),
        changed(messages=[{"role": "user"}, {"role": "assistant", "content": "b"}]),
        changed(messages=[{"role": "assistant", "content": "a"}] * 2),
        changed(messages="ab"),
        changed(unread=1),
        changed(unread=4),
        changed(unread="0"),
        changed(unread=2.0),
        changed(tries=None),
        changed(updated="2026-01-02T03:04:05"),
        changed(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]),
        changed(messages=[{"role": "user", "content": "\ud800"}] + TWO[1:]),
        changed(messages=[TWO[0], TWO[1] | {"tool_calls": []}]),
        changed(ids=[-5]),
        changed(ids=[10**20]),
        changed(ids=["1"]),
        changed(ids=[1.5]),
        changed(ids=None),
        changed(params={"temperature": -1}),
        changed(params={"logit_bias": {"a": 1}}),
        changed(params={"unknown": 1}),
        changed(params=None),
        changed(on_full="burn"),
        changed(system=["x"]),
        changed(updated="yesterday"),
        changed(updated=None),
    ],
)
def test_a_damaged_or_foreign_file_is_left_out_with_one_line(tmp_path: Path, data: bytes) -> None:
    notices: list[str] = []
    sessions = Sessions(tmp_path, notices.append)
    sessions.save("good", told())
    (tmp_path / "bad.json").write_bytes(data)
    assert [entry.name for entry in sessions.entries()] == ["good"]
    (notice,) = notices
    assert "bad.json is left out" in notice
    assert "\n" not in notice
    back = told()
    with pytest.raises(SessionError, match="bad.json"):
        sessions.load("bad", back)
    assert vars(back) | {"llm": 0, "notice": 0} == vars(told()) | {"llm": 0, "notice": 0}


def test_the_longest_name_can_be_written(sessions: Sessions) -> None:
    name = "\U00020000" * 48  # letters of four bytes
    sessions.save(name, told())
    assert sessions.names() == [name]


def test_an_unknown_name_says_what_there_is(sessions: Sessions) -> None:
    with pytest.raises(SessionError, match="no session trip; none has been saved"):
        sessions.read("trip")
    sessions.save("other", told())
    with pytest.raises(SessionError, match="no session trip; there are other"):
        sessions.read("trip")


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
def test_files_are_for_the_user_alone_and_whole(sessions: Sessions) -> None:
    sessions.save("trip", told())
    (path,) = sessions.directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert sessions.directory.stat().st_mode & 0o777 == 0o700


def test_a_failed_write_leaves_the_old_file(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions.save("trip", told())
    before = (sessions.directory / "trip.json").read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    longer = told()
    longer.messages *= 2
    with pytest.raises(OSError, match="Input/output"):
        sessions.save("trip", longer)
    assert [path.name for path in sessions.directory.iterdir()] == ["trip.json"]
    assert (sessions.directory / "trip.json").read_bytes() == before


@pytest.fixture(params=["auto", "off"])
def window(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_a_resumed_conversation_goes_on_as_if_it_had_never_been_left(
    tmp_path: Path, window: str
) -> None:
    """With the window the bundled model's ring of 383 positions wraps several times."""
    messages = ["Tell me of a dog.", "And then what did the girl do?", "Why?", "What came next?"]
    params = {"seed": 5, "max_tokens": 200, "ignore_eos": True}

    def talk(conversation: Conversation, some: list[str]) -> None:
        for message in some:
            list(conversation.say(message))

    sessions = Sessions(tmp_path / "sessions")
    with LLM(DEMO, sliding_window=window, prefixes=PrefixStore(tmp_path / "k")) as llm:  # type: ignore[arg-type]
        stayed = Conversation(llm, params=params)
        talk(stayed, messages[:3])
        sessions.save("x", stayed)
        llm.remember()
        talk(stayed, messages[3:])
    with LLM(DEMO, sliding_window=window, prefixes=PrefixStore(tmp_path / "k")) as llm:  # type: ignore[arg-type]
        resumed = Conversation(llm)
        sessions.load("x", resumed)
        talk(resumed, messages[3:])
        assert resumed.completion is not None
        read = resumed.completion.prompt_tokens - resumed.completion.cached_tokens
    assert resumed.ids == stayed.ids
    assert resumed.messages == stayed.messages
    assert len(resumed.ids) > 800
    assert read < 20  # the last message, not what was said before
