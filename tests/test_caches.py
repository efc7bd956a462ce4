"""What requests to a model share, in memory and on disk."""

import os
import shutil
from pathlib import Path

import pytest

from cpuinfer.llm import LLM
from cpuinfer.prefixes import PrefixStore

DEMO = Path(__file__).parents[1] / "cpuinfer/data/demo.gguf"
SYSTEM = "The dog was very happy to see the girl and her mother in the garden. " * 60


@pytest.mark.parametrize("written", [50, 700])
def test_a_long_prompt_is_found_after_a_long_reply(tmp_path: Path, written: int) -> None:
    """Though the ring of 383 positions has lost it when the reply ends."""
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm:
        system = llm.tokenizer.encode(SYSTEM)
        prompt = [*system, *llm.tokenizer.encode("What did the dog do?", add_bos=False)]
        llm.generate(prompt, max_tokens=written, ignore_eos=True)
        llm.remember()
    other = [*system, *llm.tokenizer.encode("Where was the girl?", add_bos=False)]
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm, LLM(DEMO) as plain:
        for ids, known in ((prompt, len(prompt) - 1), (other, len(system))):
            assert len(ids) > 900
            done = llm.generate(ids, max_tokens=30, temperature=0, ignore_eos=True)
            wanted = plain.generate(ids, max_tokens=30, temperature=0, ignore_eos=True)
            assert done.token_ids == wanted.token_ids
            assert known <= done.cached_tokens < len(ids)


def test_what_was_prepared_is_not_read_from_disk_again(tmp_path: Path) -> None:
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm:
        ids = llm.tokenizer.encode(SYSTEM)
        llm.generate(ids, max_tokens=1)
        llm.remember()
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm, LLM(DEMO) as plain:
        llm.prepare(ids)
        shutil.rmtree(tmp_path)
        done = llm.generate([*ids, 300], max_tokens=20, temperature=0)
        assert done.cached_tokens == len(ids)
        assert done.token_ids == plain.generate([*ids, 300], max_tokens=20, temperature=0).token_ids


def test_preparing_nothing_changes_nothing() -> None:
    with LLM(DEMO) as llm, LLM(DEMO) as plain:
        llm.prepare()
        done, wanted = (
            each.generate("Once upon a time", max_tokens=20, temperature=0) for each in (llm, plain)
        )
    assert (done.token_ids, done.cached_tokens) == (wanted.token_ids, 0)


def test_a_full_disk_does_not_end_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm:
        done = llm.generate("Once upon a time", max_tokens=500, ignore_eos=True)
        assert done.completion_tokens == 500
        with pytest.raises(OSError, match="No space left"):
            llm.remember()
        assert llm.generate("Once upon a time", max_tokens=5).text


def test_nothing_is_stored_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with LLM(DEMO) as llm:
        llm.generate("Once upon a time", max_tokens=500, ignore_eos=True)
        llm.remember()
    assert not list(tmp_path.iterdir())
