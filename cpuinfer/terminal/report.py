"""What the chat says of itself, in lines: the model, the last reply, all replies, the context."""

from collections.abc import Iterator
from dataclasses import dataclass

from cpuinfer import machine
from cpuinfer.completion import Completion
from cpuinfer.conversation import Conversation
from cpuinfer.llm import LLM
from cpuinfer.plan import memory_plan
from cpuinfer.terminal.settings import shown

_SHORT = 300  # characters


def setup(llm: LLM) -> str:
    """The model, how much it sees, and the memory that takes."""
    plan = memory_plan(llm.file, llm.config, llm.kv_type, llm.context_length)
    cache = f"cache {machine.format_bytes(plan.cache)} ({llm.kv_type})"
    return f"{llm.path.name}: {_span(llm)}, {cache}"


def template(llm: LLM) -> str:
    """The chat template, and why it is this one."""
    found = llm.template
    return found.reason if str(llm.path) in found.name else f"{found.name} ({found.reason})"


def reply(conversation: Conversation) -> str:
    """The reply that has just ended: tokens, speed, context, and why it ended if that was early."""
    done = conversation.completion
    assert done is not None
    parts = [f"{done.completion_tokens:,} tokens"]
    if done.completion_tokens > 1:  # the first one comes out of the prompt
        rate = _rate(done.completion_tokens - 1, done.timings.generation_seconds)
        parts.append(f"{rate} tok/s")
    parts.append(context(conversation))
    if done.finish_reason == "length" and _room(conversation) != 0:
        parts.append(f"stopped after {done.completion_tokens:,} tokens: /set max_tokens")
    return ", ".join(parts)


def context(conversation: Conversation) -> str:
    """How much of the context is used."""
    used, limit = conversation.used(), conversation.context_length
    if limit is None:
        return f"context {used:,}, window of {conversation.llm.config.sliding_window:,}"
    return f"context {used:,} of {limit:,}"


def settings(conversation: Conversation, name: str | None) -> Iterator[str]:
    """What is set, and the model; of a session its name."""
    llm = conversation.llm
    yield f"model     {llm.path}"
    yield f"template  {template(llm)}"
    yield f"context   {_span(llm)}; {context(conversation)}"
    plan = memory_plan(llm.file, llm.config, llm.kv_type, llm.context_length)
    yield f"cache     {machine.format_bytes(plan.cache)} ({llm.kv_type}), {llm.threads} threads"
    yield f"session   {name or 'not saved yet'}, {len(conversation.messages)} messages"
    yield f"system    {conversation.system or 'none'}"
    yield f"on_full   {conversation.on_full}"
    values = shown(conversation.params)
    changed = ", ".join(f"{key} {values[key]}" for key in conversation.params) or "as usual"
    yield f"settings  {changed} (/set shows all)"


def tokens(conversation: Conversation, waiting: list[str]) -> Iterator[str]:
    """What the conversation takes of the context, and what is left."""
    yield f"conversation   {conversation.used():,} tokens"
    yield f"system prompt  {count(conversation.llm, conversation.system or ''):,} tokens"
    for text in waiting:
        yield f"file           {count(conversation.llm, text):,} tokens, before your next message"
    room = _room(conversation)
    yield "room left      " + (
        f"without end, of which the last {conversation.llm.config.sliding_window:,} are seen"
        if room is None
        else f"{room:,} tokens"
    )


def count(llm: LLM, text: str) -> int:
    """Tokens of a text."""
    return len(llm.tokenizer.encode(text, add_bos=False))


def recap(conversation: Conversation) -> Iterator[str]:
    """The last message and its reply, not more of them than shows where one was."""
    for mark, message in zip("> ", conversation.messages[-2:], strict=False):
        yield f"{mark} {short(str(message['content']))}"


def short(text: str) -> str:
    """As much of a text as shows which it is, on one line."""
    text = " ".join(text[: 4 * _SHORT].split())
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


@dataclass
class Totals:
    """Sums over the replies of this run that ended."""

    replies: int = 0
    read: int = 0
    cached: int = 0
    written: int = 0
    reading: float = 0.0  # seconds
    writing: float = 0.0

    def add(self, done: Completion) -> None:
        self.replies += 1
        self.read += done.prompt_tokens - done.cached_tokens
        self.cached += done.cached_tokens
        self.written += done.completion_tokens
        self.reading += done.timings.prompt_seconds
        self.writing += done.timings.generation_seconds

    def lines(self) -> Iterator[str]:
        """The sums, and the memory in use."""
        yield f"replies  {self.replies:,}"
        yield (
            f"read     {self.read:,} tokens, {_rate(self.read, self.reading)} tok/s "
            f"({self.cached:,} more were known already)"
        )
        rate = _rate(self.written - self.replies, self.writing)
        yield f"written  {self.written:,} tokens, {rate} tok/s"
        yield f"memory   {machine.format_bytes(machine.resident_memory())}"


def _span(llm: LLM) -> str:
    window = llm.config.sliding_window
    if llm.endless:
        return f"endless, with a window of {window:,} tokens"
    seen = "no window" if window is None else f"a window of {window:,}"
    return f"context {llm.context_length:,} tokens, {seen}"


def _room(conversation: Conversation) -> int | None:
    limit = conversation.context_length
    return None if limit is None else max(0, limit - conversation.used())


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.1f}" if seconds > 0 else "-"
