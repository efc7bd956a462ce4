"""The commands for models by name: from their arguments to what they print.

Reports go to standard output, all else to standard error; errors are left to cli.py. Rooms that
take long to import are imported by the command that needs them.
"""

import errno
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpuinfer.console import BadOutput, note, open_model, print_json
from cpuinfer.gguf_errors import ModelFormatError, escape
from cpuinfer.hub import names
from cpuinfer.progress import Progress

if TYPE_CHECKING:
    from cpuinfer.gguf import GGUFFile
    from cpuinfer.hub.store import LocalModel


def pull(arguments: Namespace) -> None:
    """Fetch a model from the hub."""
    from cpuinfer.hub import store

    name = names.parse(arguments.name)
    try:
        store.directory()
    except OSError as error:
        reason = f"models cannot be kept here ({error.strerror}); XDG_DATA_HOME names another place"
        raise BadOutput(f"{error.filename}: {reason}") from None
    try:
        _pull(name, arguments)
    except OSError as error:
        if error.filename != names.endpoint():
            raise
        reason = f"{error.strerror}; {_without_network(name)}"  # it cannot be reached
        raise OSError(error.errno, reason, error.filename) from None


def _without_network(name: names.Name) -> str:
    """What can be had all the same."""
    from cpuinfer.hub import store

    if any(model.complete for model in store.models_named(name)):
        return f"{name} is on this computer and runs without it"
    local = ", ".join(model.name for model in store.models() if model.complete)
    return f"on this computer there is {local or 'no model that was pulled'}"


def _pull(name: names.Name, arguments: Namespace) -> None:
    from cpuinfer.hub import pull, remote

    model = remote.find(name)
    if name.qtype is None and name.file is None and len(model.types) > 1:
        chosen = model.build.qtype or model.build.files[0]
        others = ", ".join(qtype for qtype in model.types if qtype != chosen)
        note(f"{chosen} is taken; there are also {others}")
    if not arguments.force:
        pull.check_type(model)
    warning = pull.check_memory(model.nbytes, arguments.force)
    if warning is not None:
        note(f"warning: {warning}")
    try:
        with Progress(sys.stderr) as progress:
            pulled = pull.pull(model, progress, note)
    except KeyboardInterrupt:
        note("what has come is kept: the next pull goes on from there")
        raise
    if not pulled.verified:
        note("warning: the hub tells no SHA-256 of this file; its size alone is verified")
    report = {
        "name": _typed(name, model.build),
        "files": [str(path) for path in pulled.paths],
        "type": model.build.qtype,
        "bytes": pulled.nbytes,
        "fetched": pulled.fetched,
        "verified": pulled.verified,
    }
    if arguments.json:
        print_json(report)
    else:
        how = "was here already" if pulled.fetched == 0 else "is here"
        print(f"{report['name']} {how}: {_size(pulled.nbytes)}, {escape(str(pulled.paths[0]))}")


def _typed(name: names.Name, build: names.Build) -> str:
    """What finds this build in the store, as short as it was asked for."""
    name = replace(name, revision="main")  # the store keeps one of them
    if name.qtype is not None or name.file is not None or build.qtype is None:
        return escape(str(name))
    return f"{name}:{build.qtype}"


def list_models(arguments: Namespace) -> None:
    """Show the models that were pulled."""
    from cpuinfer.hub import store

    models = store.models()
    if arguments.json:
        print_json([_entry(model) for model in models])
        return
    if not models:
        note(f"no model was pulled to {store.directory()}; `cpuinfer pull mistral` fetches one")
        return
    width = max(len(escape(model.name)) for model in models)
    for model in models:
        when = f"{model.modified:%Y-%m-%d %H:%M}"
        rest = "" if model.complete else "  incomplete: pull it again to go on"
        qtype, size = model.build.qtype or "", _size(model.nbytes)
        print(f"{escape(model.name):<{width}}  {qtype:<8}  {size:>9}  {when}{rest}")


def _entry(model: "LocalModel") -> dict[str, Any]:
    return {
        "name": model.name,
        "type": model.build.qtype,
        "bytes": model.nbytes,
        "modified": model.modified.isoformat(timespec="seconds"),
        "complete": model.complete,
        "files": [str(path) for path in model.paths],
    }


def rm(arguments: Namespace) -> None:
    """Remove a model that was pulled."""
    from cpuinfer.hub import store

    path = Path(arguments.name)
    if path.is_file():
        found = [
            model for model in store.models() if path.resolve() in map(Path.resolve, model.paths)
        ]
        if not found:
            raise ValueError(
                f"{escape(str(path))} is not in {store.directory()}, and is left there"
            )
    else:
        try:
            found = store.models_named(names.parse(arguments.name))
        except ValueError:
            found = []
        if not found:
            near = store.near_pulled(arguments.name)
            meant = f"; near: {', '.join(near)}" if near else ""
            reason = f"no such model was pulled{meant}; `cpuinfer list` shows those that were"
            raise FileNotFoundError(errno.ENOENT, reason, arguments.name)
    if len(found) > 1:
        several = ", ".join(escape(model.name) for model in found)
        raise ValueError(f"{escape(arguments.name)} is several models, name one of them: {several}")
    freed = store.removed(found[0])
    if arguments.json:
        print_json({"name": found[0].name, "freed": freed})
    else:
        print(f"{escape(found[0].name)} was removed, {_size(freed)} are free again")


def show(arguments: Namespace) -> None:
    """Show what a model is."""
    from cpuinfer import describe
    from cpuinfer.hub import store

    file = open_model(arguments.name)
    told = describe.describe(file, kv_type="f16")
    config = told["config"] or {}
    report = {
        "name": told["name"],
        "architecture": told["architecture"],
        "parameters": told["parameters"],
        "context_length": config.get("context_length"),
        "sliding_window": config.get("sliding_window"),
        "embedding_length": config.get("dim"),
        "quantization": _quantization(file, told),
        "template": _template(file),
        "license": told["metadata"].get("general.license"),
        "runs": told["runs"],
        "reason": told["reason"],
        "files": [str(path) for path in sorted(file.paths)],
        "bytes": told["bytes"],
        "sha256": [store.verified_sha256(path) for path in sorted(file.paths)],
    }
    if arguments.json:
        print_json(report)
    else:
        for fact, value in _facts(report):
            print(f"{fact:<18}{escape(value)}")


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for fact in ("name", "architecture"):
        yield fact, str(report[fact] or "not told")
    yield "parameters", f"{report['parameters']:,}"
    for fact in ("context_length", "sliding_window", "embedding_length"):
        none = "none" if fact == "sliding_window" else "not told"
        yield fact.replace("_", " "), str(report[fact] or none)
    yield "quantization", report["quantization"] or "not told"
    yield "template", report["template"] or "none"
    yield "license", str(report["license"] or "not told")
    yield "runs here", "yes" if report["runs"] else f"no: {report['reason']}"
    yield "size", f"{_size(report['bytes'])} ({report['bytes']:,} bytes)"
    for file, sha256 in zip(report["files"], report["sha256"], strict=True):
        yield "file", file
        yield "sha256", sha256 or "not known, since it was not pulled"


def _quantization(file: "GGUFFile", told: dict[str, Any]) -> str | None:
    """The mix that the file names, or the type of most of its bytes."""
    from quant.mixes import MIXES

    number = file.metadata.get("general.file_type")
    for name, mix in MIXES.items():
        if mix.file_type == number:
            return name
    sizes: dict[str, int] = {}
    for kind in told["kinds"]:
        sizes[kind["type"]] = sizes.get(kind["type"], 0) + kind["bytes"]
    return max(sizes, key=lambda qtype: sizes[qtype], default=None)


def _template(file: "GGUFFile") -> str | None:
    """What turns messages into a prompt, None where a chat would be refused."""
    from cpuinfer import chat
    from cpuinfer.tokenizer import load_tokenizer

    try:
        name = chat.load_template(file, load_tokenizer(file), None).name
    except (chat.ChatTemplateError, ModelFormatError):
        return None
    return name if name in chat.BUILT_IN else "the file's own"


def _size(count: int) -> str:
    from cpuinfer.machine import format_bytes

    return format_bytes(count)
