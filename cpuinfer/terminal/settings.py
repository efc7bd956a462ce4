"""The settings of a conversation as a person types them: the options that choose tokens, by the
same rules as on the command line, and `on_full`."""

import argparse
import dataclasses
import difflib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cpuinfer.conversation import ON_FULL, Conversation
from cpuinfer.option_groups import ALL_ROOM, add_sampling
from cpuinfer.sampling import SamplingParams

_SWITCH = {"on": True, "off": False}


def _options() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    add_sampling(parser, ALL_ROOM)
    return {action.dest: action for action in parser._actions}


_OPTIONS = _options()
#: What can be set, and what it means.
SETTINGS = {name: option.help or "" for name, option in _OPTIONS.items()} | {
    "ignore_eos": "on: go on where the model would end the text",
    "on_full": f"what to do when the context is full: {', '.join(ON_FULL)}",
}


def change(conversation: Conversation, name: str, text: str) -> None:
    """Set what is called `name`, "default" to what it is if nobody sets it; ValueError says what
    exists, or what the value may be."""
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise ValueError(unknown("setting", name, list(SETTINGS)))
    if name == "on_full":
        found = [choice for choice in ON_FULL if choice == text]
        if not found:
            raise ValueError(f"on_full must be one of {', '.join(ON_FULL)}, got {text!r}")
        conversation.on_full = found[0]
        return
    params = {key: value for key, value in conversation.params.items() if key != name}
    if text != "default":
        params[name] = _value(name, text)
    SamplingParams(**params)
    conversation.params = params


def shown(params: Mapping[str, Any]) -> dict[str, str]:
    """Every setting but `on_full`, as `change` takes it."""
    fields = dataclasses.asdict(SamplingParams(**params))
    # Without a limit of its own a reply ends with the context.
    fields["max_tokens"] = params.get("max_tokens")
    return {name: _typed(fields[name]) for name in _OPTIONS}


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """That there is no such thing, what may have been meant, and what there is."""
    near = difflib.get_close_matches(name, names, 3, 0.5)
    meant = f", did you mean {' or '.join(near)}?" if near else ";"
    return f"there is no {kind} {name}{meant} There are {', '.join(names)}"


def _value(name: str, text: str) -> Any:
    option = _OPTIONS[name]
    try:
        if isinstance(option, argparse._StoreTrueAction):
            return _SWITCH[text.lower()]
        if not isinstance(option, argparse._AppendAction):
            return _converted(option, text)
        several = [_converted(option, word) for word in shlex.split(text)]
        return dict(several) if name == "logit_bias" else several
    except (ValueError, KeyError):
        raise ValueError(f"{name} cannot be {text!r}: {SETTINGS[name]}") from None


def _converted(option: argparse.Action, text: str) -> Any:
    return option.type(text) if callable(option.type) else text


def _typed(value: Any) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case float():
            return f"{value:g}"
        case dict():
            value = [f"{token}={bias:g}" for token, bias in value.items()]
    if isinstance(value, list | tuple):
        value = shlex.join(value) or None
    return "default" if value is None else str(value)
