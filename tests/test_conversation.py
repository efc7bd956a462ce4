"""What a conversation remembers, what of it the model reads, and what happens when it is full."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpuinfer.completion import Chunk, Completion, Stream, Timings
from cpuinfer.conversation import ContextFull, Conversation, OnFull
from cpuinfer.llm import LLM, Message


class Scripted:
    """Answers with given pieces, None being Ctrl-C; a token is a character.

    An exchange takes a token more than its texts, a `|`, and the prompt ends with `>`.
    """

    config = SimpleNamespace(context_length=100_000, sliding_window=None)
    tokenizer = SimpleNamespace(encode=lambda text, add_bos: list(map(ord, text)))

    def __init__(self, *replies: Sequence[str | None], room: int | None = None) -> None:
        self._replies = iter(replies)
        self.endless = room is None
        self.context_length = room or 0
        self.asked: list[str] = []
        self.params: list[dict[str, Any]] = []

    def prompt_ids(
        self, messages: Sequence[Message], previous_ids: Sequence[int] = ()
    ) -> list[int]:
        return [ord(c) for c in "|".join(str(m["content"]) for m in messages) + ">"]

    def stream_reply(self, prompt: Sequence[int], **params: Any) -> Stream:
        self.asked.append("".join(map(chr, prompt)))
        self.params.append(params)
        return Stream(self._chunks(len(prompt), params["max_tokens"]))

    def _chunks(self, before: int, most: int) -> Iterator[Chunk]:
        written, reason = 0, "stop"
        for piece in next(self._replies):
            if piece is None:
                raise KeyboardInterrupt
            for character in piece:
                written += 1
                yield Chunk(character, (ord(character),))
                if written == most or before + written == self.context_length:
                    reason = "length"
                    break
            if reason == "length":
                break
        return Completion("", (), reason, before, written, 0, 0, 0, Timings(0, 0), 0)  # type: ignore


def conversation(
    llm: Scripted,
    system: str | None = None,
    on_full: OnFull = "stop",
    params: Mapping[str, Any] | None = None,
    notices: list[str] | None = None,
) -> Conversation:
    notice: Callable[[str], None] = _unexpected if notices is None else notices.append
    return Conversation(cast(LLM, llm), system, params, on_full, notice)


def _unexpected(notice: str) -> None:
    raise AssertionError(notice)


def said(told: Conversation) -> list[str]:
    assert [m["role"] for m in told.messages] == ["user", "assistant"] * (len(told.messages) // 2)
    return [str(message["content"]) for message in told.messages]


def test_replies_are_remembered() -> None:
    llm = Scripted(["Good ", "day."], ["Yes."])
    told = conversation(llm, "Be brief.")
    assert "".join(told.say("Hello")) == "Good day."
    assert "".join(told.say("And?")) == "Yes."
    assert llm.asked == ["Be brief.|Hello>", "Be brief.|Hello|Good day.|And?>"]
    assert said(told) == ["Hello", "Good day.", "And?", "Yes."]
    assert told.used() == len("Be brief.|Hello|Good day.|And?>" + "Yes.")


def test_an_interrupted_reply_is_kept_as_far_as_it_went() -> None:
    told = conversation(Scripted(["Good ", None], [None], ["more", "!"]))
    with pytest.raises(KeyboardInterrupt):
        list(told.say("Hello"))
    assert said(told) == ["Hello", "Good "]
    with pytest.raises(KeyboardInterrupt):
        list(told.say("And?"))
    assert said(told) == ["Hello", "Good "]
    with closing(told.say("Go on")) as pieces:
        assert next(pieces) == "m"
    assert said(told) == ["Hello", "Good ", "Go on", "m"]


def test_a_message_without_a_reply_is_not_kept_and_said_so() -> None:
    notices: list[str] = []
    told = conversation(Scripted([""], ["Yes."]), notices=notices)
    assert list(told.say("Hello")) == []
    assert said(told) == []
    assert "nothing to say" in notices[0]


def test_retry_and_undo() -> None:
    llm = Scripted(["One."], ["Two."], [None], ["Three."], ["Four."])
    told = conversation(llm, params={"seed": 7})
    for nothing in (lambda: list(told.retry()), told.undo):
        with pytest.raises(ValueError, match="there is no"):
            nothing()
    list(told.say("Hello"))
    assert "".join(told.retry()) == "Two."
    with pytest.raises(KeyboardInterrupt):
        list(told.retry())
    assert said(told) == ["Hello", "Two."]  # what was there stays where nothing takes its place
    list(told.say("And?"))
    assert told.undo() == "And?"
    assert said(told) == ["Hello", "Two."]
    list(told.say("Then?"))
    assert llm.asked[-1] == "Hello|Two.|Then?>"
    assert [params["seed"] for params in llm.params] == [7, 8, 9, 7, 7]


def test_clear_keeps_instructions_and_settings() -> None:
    llm = Scripted(["One."], ["Two."])
    told = conversation(llm, "Be brief.", params={"top_k": 3})
    list(told.say("Hello"))
    told.clear()
    assert (told.used(), told.completion) == (0, None)
    list(told.say("Again"))
    assert llm.asked[-1] == "Be brief.|Again>"
    assert llm.params[-1]["top_k"] == 3


def test_a_reply_has_all_the_room_unless_it_is_limited() -> None:
    llm = Scripted(["One."], ["Two."], room=200)
    list(conversation(llm).say("Hello"))
    list(conversation(llm, params={"max_tokens": 9}).say("Hello"))
    endless = Scripted(["One."])
    list(conversation(endless).say("Hello"))
    assert [p["max_tokens"] for p in llm.params + endless.params] == [194, 9, 100_000]


def test_stop_says_that_the_context_is_nearly_full_and_refuses_what_has_no_room() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 60], ["2" * 20], ["3" * 30], room=160)
    told = conversation(llm, "S", notices=notices)
    list(told.say("a" * 30))
    assert notices == []
    list(told.say("b" * 30))
    assert re.match(r"14\d of 160 tokens of the context are used; .*summarize", notices.pop())
    with pytest.raises(ContextFull, match=r"with this message 17\d of 160 tokens .*summarize"):
        list(told.say("c" * 30))
    assert said(told)[-1] == "2" * 20  # nothing is lost
    list(told.say("d"))
    assert said(told)[-1] == "3" * 12
    assert notices == ["the reply ends here, the context of 160 tokens is full"]


def test_shift_leaves_the_oldest_out_and_says_so() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 30], ["2" * 30], ["3" * 30], room=160)
    told = conversation(llm, "S", "shift", notices=notices)
    for letter in "abc":
        list(told.say(letter * 20))
    assert llm.asked[-1] == f"S|{'b' * 20}|{'2' * 30}|{'c' * 20}>"
    assert notices == ["the context is full: 2 earlier messages are not read by the model any more"]
    assert len(said(told)) == 6  # they are still there
    assert told.unread == 2


def shifted(*replies: Sequence[str | None], notices: list[str]) -> tuple[Scripted, Conversation]:
    """Two exchanges, after which the next message leaves both out."""
    llm = Scripted(["1" * 30], ["2" * 30], *replies, room=160)
    told = conversation(llm, None, "shift", notices=notices)
    list(told.say("a" * 20))
    list(told.say("b" * 20))
    return llm, told


def test_an_interrupted_message_leaves_nothing_out() -> None:
    llm, told = shifted([None], ["3"], notices=[])
    with pytest.raises(KeyboardInterrupt):
        list(told.say("c" * 70))
    assert told.unread == 0
    list(told.say("d"))
    assert llm.asked[-1].startswith("a" * 20)


def test_retry_reads_what_the_reply_before_it_read() -> None:
    notices: list[str] = []
    llm, told = shifted(["3"], ["4"], [None], ["5"], notices=notices)
    list(told.say("c" * 70))
    assert (told.unread, notices) == (4, [notices[0]])
    list(told.retry())
    assert (told.unread, said(told)[-2:]) == (4, ["c" * 70, "4"])
    assert llm.asked[-1] == llm.asked[-2] == "c" * 70 + ">"
    with pytest.raises(KeyboardInterrupt):
        list(told.retry())
    assert (told.unread, said(told)[-1]) == (4, "4")
    list(told.say("d"))
    assert llm.asked[-1] == "c" * 70 + "|4|d>"


def test_undo_of_what_left_the_rest_out_brings_it_back() -> None:
    llm, told = shifted(["3"], ["4"], notices=[])
    list(told.say("c" * 70))
    assert told.undo() == "c" * 70
    list(told.say("d"))
    assert llm.asked[-1] == "a" * 20 + "|" + "1" * 30 + "|" + "b" * 20 + "|" + "2" * 30 + "|d>"
    for _ in range(3):
        told.undo()
    assert (told.unread, told.messages) == (0, [])


def test_a_seed_may_be_none() -> None:
    llm = Scripted(["One."], ["Two."])
    told = conversation(llm, params={"seed": None})
    list(told.say("Hello"))
    list(told.retry())
    assert [params["seed"] for params in llm.params] == [None, None]


def test_a_message_too_long_for_any_shift_is_refused() -> None:
    for on_full in ("stop", "shift", "summarize"):
        told = conversation(Scripted(["1"], room=160), None, cast(OnFull, on_full), notices=[])
        list(told.say("short"))
        with pytest.raises(ContextFull, match=r"of 160 tokens"):
            list(told.say("x" * 155))
        assert (said(told), told.unread, told.summary) == (["short", "1"], 0, None)


def test_a_long_reply_that_fills_the_context_alone_ends_there() -> None:
    notices: list[str] = []
    told = conversation(Scripted(["1" * 500], room=160), None, "shift", notices=notices)
    assert "".join(told.say("a" * 20)) == "1" * (160 - 21)
    assert notices == ["the reply ends here, the context of 160 tokens is full"]


def test_summarize_puts_a_summary_in_front() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 60], ["2" * 60], [" All about\na and b. "], ["3" * 9], room=600)
    told = conversation(llm, "S", "summarize", notices=notices)
    list(told.say("a" * 100))
    list(told.say("b" * 100))
    list(told.say("c" * 130))
    summarizing = llm.asked[2]
    assert summarizing.startswith(f"S|{'a' * 100}|{'1' * 60}|{'b' * 100}|{'2' * 60}|Summarize our")
    assert llm.params[2] == {"temperature": 0, "max_tokens": 75}
    assert llm.asked[3] == (
        "S\n\nSummary of our conversation so far: All about a and b.|" + "c" * 130 + ">"
    )
    assert notices == [
        "the context is full: 4 earlier messages are being summarized",
        "instead of 4 earlier messages the model reads: All about a and b.",
    ]
    assert (told.unread, len(said(told))) == (4, 6)


def test_what_has_no_room_in_a_summary_is_told() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 60], ["2" * 260], ["About b."], ["3" * 9], room=600)
    told = conversation(llm, "S", "summarize", notices=notices)
    list(told.say("a" * 100))
    list(told.say("b" * 100))
    list(told.say("c" * 20))
    assert llm.asked[2].startswith(f"S|{'b' * 100}|{'2' * 260}|Summarize our")
    assert notices[1] == "the first 2 of them have no room in the summary"


def test_an_interrupted_summary_changes_nothing() -> None:
    llm = Scripted(["1" * 40], ["2" * 40], [None], room=400)
    told = conversation(llm, "S", "summarize", notices=[])
    list(told.say("a" * 100))
    list(told.say("b" * 100))
    with pytest.raises(KeyboardInterrupt):
        list(told.say("c" * 20))
    assert (told.unread, told.summary, len(said(told))) == (0, None, 4)


def test_a_summary_of_nothing_is_not_asked_for() -> None:
    """The only exchange there is does not fit behind the question for a summary."""
    notices: list[str] = []
    llm = Scripted(["1" * 420], ["2"], room=600)
    told = conversation(llm, None, "summarize", notices=notices)
    list(told.say("a" * 100))
    list(told.say("b"))
    assert llm.asked[-1] == "b>"
    assert notices[-1] == (
        "the context is full: 2 earlier messages are not read by the model any more"
    )


def test_an_empty_summary_leaves_the_one_there_is() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 400], [" "], ["2" * 9], room=600)
    told = conversation(llm, None, "summarize", notices=notices)
    told.summary = "Old times."
    list(told.say("a" * 10))
    list(told.say("b" * 100))
    assert llm.asked[-1] == "Summary of our conversation so far: Old times.|" + "b" * 100 + ">"
    assert notices[-1] == "instead of 2 earlier messages the model reads: Old times."


def test_what_has_no_room_beside_a_summary_is_read_without_one() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 100], ["2" * 9], room=600)
    told = conversation(llm, None, "summarize", notices=notices)
    list(told.say("a" * 10))
    list(told.say("b" * 540))
    assert llm.asked[-1] == "b" * 540 + ">"
    assert "not read by the model" in notices[-1]


def test_undoing_everything_forgets_the_summary() -> None:
    notices: list[str] = []
    llm = Scripted(["1" * 60], ["2" * 60], ["Sum."], ["3"], ["4"], room=600)
    told = conversation(llm, None, "summarize", notices=notices)
    for text in ("a" * 100, "b" * 100, "c" * 160):
        list(told.say(text))
    assert told.summary == "Sum."
    for _ in range(3):
        told.undo()
    list(told.say("Again"))
    assert llm.asked[-1] == "Again>"
