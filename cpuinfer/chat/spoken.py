"""What a model has said keeps the tokens that it said it with.

A reply's text, put into the next prompt and encoded anew, often gives other tokens than those that
were sampled.  The model would then have to read its own words again, under a sliding window all
that was ever said, for the ring cannot go back.
"""

from collections.abc import Sequence

from cpuinfer.tokenizer import Tokenizer


def keep_tokens(tokenizer: Tokenizer, ids: Sequence[int], previous_ids: Sequence[int]) -> list[int]:
    """The text of `ids`, control tokens included; as far as `previous_ids` are the same text, in
    their tokens."""
    kept = replaced = 0  # tokens of either up to the last place where tokens of both end
    old = new = ""  # the text of each from there on
    old_end = new_end = 0
    while old.startswith(new) or new.startswith(old):
        if old == new:
            kept, replaced, old, new = old_end, new_end, "", ""
        if len(old) <= len(new):
            if old_end == len(previous_ids):
                break
            old += _symbols(tokenizer, previous_ids[old_end])
            old_end += 1
        else:
            if new_end == len(ids):
                break
            new += _symbols(tokenizer, ids[new_end])
            new_end += 1
    return [*previous_ids[:kept], *ids[replaced:]]


def _symbols(tokenizer: Tokenizer, token: int) -> str:
    """A character for each byte of a token, or one of its own for a token without text."""
    return tokenizer.token_bytes(token).decode("latin-1") or chr(0x100 + token)
