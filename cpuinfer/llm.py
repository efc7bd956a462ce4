"""LLM: the class people import.  It joins file, tokenizer, model, sampling and text."""

import os
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cpuinfer import chat, generate, machine, ops
from cpuinfer.cache import DTYPES, KVCache
from cpuinfer.caches import Caches
from cpuinfer.completion import Chunk, Completion, Stream, Timings, TokenLogprob
from cpuinfer.config import ModelConfig, SlidingWindow
from cpuinfer.generate import Generation
from cpuinfer.gguf import ModelFormatError, escape, open_gguf
from cpuinfer.loading import (
    Lora,
    Progress,
    file_warnings,
    matrix_types,
    open_adapters,
    prepare_kernels,
)
from cpuinfer.models import ARCHITECTURES
from cpuinfer.models.llama import CHUNK, Llama, capacity
from cpuinfer.plan import fitting_context, memory_plan
from cpuinfer.prefixes import PrefixStore, model_key
from cpuinfer.sampling import Sampled, Sampler, SamplingParams
from cpuinfer.speculate import Costs
from cpuinfer.team import most_threads
from cpuinfer.tokenizer import StopStrings, StreamDecoder, Tokenizer, load_tokenizer
from quant.ggml_types import GGMLType

KVType = Literal["f32", "f16", "q8_0"]
Message = Mapping[str, Any]


class LLM:
    """A model file ready to generate.  Several threads may use it; their passes take turns."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        context_length: int | None = None,
        threads: int | None = None,
        prefill_threads: int | None = None,
        sliding_window: SlidingWindow = "auto",
        kv_type: KVType = "f16",
        template: str | None = None,
        *,
        lora: Sequence[Lora] = (),
        speculation: bool = True,
        force: bool = False,
        prefixes: PrefixStore | None = None,
        for_chat: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        """Open, check and load a GGUF file.

        `context_length` None takes what the model was trained for, or less if memory asks for it;
        `threads` None what machine.threads() and machine.decode_threads() say;
        `prefill_threads` those that read prompts, None as many as `threads`; never more of either
        than the CPUs of this process;
        `sliding_window` see ModelConfig.from_gguf;
        `kv_type` "f16", "f32" or "q8_0"; `template` a built-in chat template or a Jinja file;
        `lora` adapters in GGUF files, each alone or in a tuple with its scale;
        `speculation` drafts tokens from the text where that is faster: same tokens, fewer passes;
        `force` loads what does not fit into free memory as well, which may swap;
        `prefixes` where prompts find the keys and values of texts that begin alike, and where
        `remember` puts those of the last one.
        `for_chat` refuses a file without a chat template before anything that takes long.
        Under a sliding window texts are endless unless `context_length` says otherwise.
        Raises OSError, ModelFormatError, machine.NotEnoughMemory, ValueError for an argument.
        """
        _check_arguments(threads, prefill_threads, kv_type)
        self.path = Path(model)
        self.file = open_gguf(self.path)
        if not self.file.tensors:
            raise ModelFormatError(self.path, "tensors", None, "there are none, only metadata")
        self.config = ModelConfig.from_gguf(self.file, sliding_window)
        self.tokenizer: Tokenizer = load_tokenizer(self.file)
        self.adapters = open_adapters(lora, self.file, self.config)
        self.kv_type = kv_type
        added = sum(adapter.nbytes for adapter in self.adapters)
        self.context_length = fitting_context(
            self.file, self.config, kv_type, context_length, added, force=force
        )
        self._force = force
        plan = memory_plan(self.file, self.config, kv_type, self.context_length, added)
        self._excess = plan.total - machine.memory_available() if force else 0
        self._cut_context = context_length is None and (
            self.context_length < self.config.context_length
        )
        window = self.config.sliding_window
        self.endless = (
            context_length is None
            and window is not None
            and (capacity(self.config, CHUNK, self.context_length) == window + CHUNK - 1)
        )
        self._template: chat.Template | None = None
        if template is not None or for_chat:
            self._template = chat.load_template(self.file, self.tokenizer, template)
        cores, _ = machine.threads()
        self.threads = min(threads or machine.decode_threads(cores)[0], most_threads())
        self.prefill_threads = min(prefill_threads or threads or cores, most_threads())
        self._on_progress = on_progress or (lambda stage, done, total: None)
        qtypes = matrix_types(self.file) | ({GGMLType.F32} if self.adapters else set())
        prepare_kernels(ops.kernels_for(qtypes, kv_type), self._on_progress)
        self._loaded: Llama | None = ARCHITECTURES[self.file.text("general.architecture")](
            self.file,
            self.config,
            kv_type=kv_type,
            threads=self.threads,
            prefill_threads=self.prefill_threads,
            context_length=self.context_length,
            progress=lambda done, total: self._on_progress("load", done, total),
            adapters=self.adapters,
            endless=self.endless,
        )
        self._costs = Costs() if speculation else None
        self._caches = Caches(
            self._new_cache,
            self.config.sliding_window,
            prefixes,
            "" if prefixes is None else self.key,
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back weights and caches; what is asked of the model afterwards is a ValueError."""
        self._loaded = None
        self._caches.close()

    @property
    def model(self) -> Llama:
        """The model below sampling and text; ValueError once closed."""
        if self._loaded is None:
            raise ValueError(f"the model {escape(str(self.path))} has been closed")
        return self._loaded

    @cached_property
    def key(self) -> str:
        """A hash of model, adapters and cache type: equal keys mean equal keys and values."""
        return model_key(self.file, self.config, self.adapters, self.kv_type)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever runs the model should know, one line each."""
        found = file_warnings(self.file, self.config)
        found += [warning for adapter in self.adapters for warning in adapter.file.warnings]
        trained = self.config.context_length
        if self._cut_context and not self.endless:
            found.append(
                f"the context is {self.context_length} positions instead of the {trained} the "
                "model was trained for: there is no memory for more"
            )
        if self._excess > 0:
            more = machine.format_bytes(self._excess)
            found.append(f"the model takes {more} more memory than is free: it may swap")
        return tuple(found)

    @property
    def template(self) -> chat.Template:
        """The chat template; the errors of chat.load_template where the file has none of use."""
        if self._template is None:
            self._template = chat.load_template(self.file, self.tokenizer, None)
        return self._template

    # --- text ---

    def generate(self, prompt: str | Sequence[int], **params: Any) -> Completion:
        """Continue `prompt`, a text or token ids; `params` are those of SamplingParams.

        Raises ValueError (ContextLengthExceeded too) and sampling.NumericsError.
        """
        return _whole(self.stream(prompt, **params))

    def stream(self, prompt: str | Sequence[int], **params: Any) -> Stream:
        """`generate` piece by piece: text as soon as it is certain."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._stream(ids, StreamDecoder(self.tokenizer, ids), params)

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **params: Any
    ) -> Completion:
        """The model's reply to a conversation; the errors of chat.prompt_ids too."""
        return _whole(self.stream_chat(messages, tools, **params))

    def stream_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **params: Any
    ) -> Stream:
        """`chat` piece by piece."""
        return self.stream_reply(self.prompt_ids(messages, tools), **params)

    def stream_reply(self, prompt: Sequence[int], **params: Any) -> Stream:
        """The reply to a prompt of `prompt_ids`, piece by piece."""
        return self._stream(list(prompt), StreamDecoder(self.tokenizer), params)

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        previous_ids: Sequence[int] = (),
    ) -> list[int]:
        """The ids `chat` sends to the model, BOS included.  `previous_ids` of an earlier prompt and
        its reply stay where the text is the same: then nothing of them is read again."""
        return chat.prompt_ids(self.template, self.tokenizer, messages, tools, previous_ids)

    def prepare(self, ids: Sequence[int] = ()) -> None:
        """Have a cache ready for a prompt that begins with `ids`, as far as they are known: its
        memory, and reading it from disk, is then not what the first reply waits for."""
        with self._caches.lend(Generation([*ids, 0], [])):
            pass

    def remember(self) -> None:
        """Put keys and values of the last request into `prefixes`; OSError where it cannot be."""
        self._caches.remember()

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """(T, vocab_size) float32: the logits after each of T ids, from an empty cache."""
        if not 0 < len(ids) <= self.context_length:
            raise generate.ContextLengthExceeded(len(ids), self.context_length)
        StreamDecoder(self.tokenizer, ids)  # refuses ids that are no tokens
        shape = (len(ids), self.config.vocab_size)
        machine.check(machine.MemoryPlan(0, 0, 4 * shape[0] * shape[1]), machine.memory_available())
        logits, done = np.empty(shape, np.float32), 0
        with self._caches.lend(Generation(ids, [])) as cache:
            cache.reset()
            for some in generate.prefill(self.model, ids, cache, n_logits=len(ids)):
                logits[done : (done := done + len(some))] = some
        return logits

    # --- inside ---

    def _stream(self, ids: list[int], decoder: StreamDecoder, params: dict[str, Any]) -> Stream:
        sampling = SamplingParams(**params)
        sampler = Sampler(
            sampling,
            self.config.vocab_size,
            n_tokens=self.tokenizer.vocab_size,
            eog_ids=self.tokenizer.eog_ids,
        )
        cancel = threading.Event()
        return Stream(self._chunks(ids, decoder, sampler, cancel), cancel)

    def _chunks(
        self, ids: list[int], decoder: StreamDecoder, sampler: Sampler, cancel: threading.Event
    ) -> Generator[Chunk, None, Completion]:
        start = time.perf_counter()
        first: float | None = None
        generation = Generation(ids, [])
        stops = StopStrings(tuple(sampler.params.stop))
        pieces: list[str] = []
        logprobs: list[TokenLogprob] = []
        with self._caches.lend(generation) as cache:
            cached = cache.offset
            self._on_progress("prompt", 0, len(ids) - cached)
            for sampled in generate.generate(
                self.model,
                generation,
                sampler,
                self.tokenizer.eog_ids,
                cache,
                cancel,
                progress=lambda done, total: self._on_progress("prompt", done, total),
                costs=self._costs,
            ):
                first = first or time.perf_counter()
                text = stops.add(decoder.add(sampled.token))
                reported = self._logprob(sampled)
                logprobs += reported
                pieces.append(text)
                yield Chunk(text, (sampled.token,), reported)
                if stops.found:
                    generation.finish_reason = "stop"
                    break
        rest = "" if stops.found else stops.add(decoder.finish())
        rest += "" if stops.found else stops.finish()
        end = time.perf_counter()
        assert generation.finish_reason is not None
        yield Chunk(rest, finish_reason=generation.finish_reason)
        return Completion(
            text="".join(pieces) + rest,
            token_ids=tuple(generation.tokens),
            finish_reason=generation.finish_reason,
            prompt_tokens=len(ids),
            completion_tokens=len(generation.tokens),
            cached_tokens=cached,
            drafted_tokens=generation.drafted,
            accepted_tokens=generation.accepted,
            timings=Timings((first or end) - start, end - (first or end)),
            seed=sampler.seed,
            logprobs=None if sampler.params.logprobs is None else tuple(logprobs),
        )

    def _logprob(self, sampled: Sampled) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        top = tuple((self._shown(token), logprob) for token, logprob in sampled.top_logprobs)
        return (TokenLogprob(sampled.token, self._shown(sampled.token), sampled.logprob, top),)

    def _shown(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _new_cache(self) -> KVCache:
        """NotEnoughMemory where requests at the same time ask for more caches than fit."""
        plan = memory_plan(self.file, self.config, self.kv_type, self.context_length)
        if not self._force:
            machine.check(machine.MemoryPlan(0, plan.cache, 0), machine.memory_available())
        return self.model.make_cache()


def _whole(stream: Stream) -> Completion:
    for _ in stream:
        pass
    assert stream.completion is not None
    return stream.completion


def _check_arguments(threads: int | None, prefill_threads: int | None, kv_type: str) -> None:
    for name, count in (("threads", threads), ("prefill_threads", prefill_threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if kv_type not in DTYPES:
        raise ValueError(f"kv_type must be one of {', '.join(DTYPES)}, got {kv_type!r}")
