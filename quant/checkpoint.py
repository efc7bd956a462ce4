"""A directory of published weights -> its settings and tensors.

Two forms are read: Hugging Face's (config.json, model.safetensors in one or many files) and
Mistral's own (params.json, consolidated.safetensors). Nothing in it is run: no pickles, no code.
What settings and names mean is known in hf.py and mistral.py.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

from quant.safetensors_file import StoredTensor, read_safetensors
from quant.settings import CheckpointError, Settings

_HUGGING_FACE, _MISTRAL = "model.safetensors", "consolidated.safetensors"


class Checkpoint:
    """`config` of the form `is_mistral` tells, `tensors` by name; other files through `settings`
    and `file`."""

    def __init__(self, directory: Path) -> None:
        """CheckpointError for what is missing or wrong, OSError for what cannot be read."""
        self.directory = directory
        self.is_mistral = self.has_file("params.json") and not (
            self.has_file("config.json") and self._has_weights(_HUGGING_FACE)
        )
        name = "params.json" if self.is_mistral else "config.json"
        self.config = Settings.read(self.file(name))
        tensors = self._read_tensors(_MISTRAL if self.is_mistral else _HUGGING_FACE)
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self._states = {tensor.path: _state(tensor.path) for tensor in self.tensors.values()}

    def file(self, name: str) -> Path:
        """A file of the directory by its plain name.

        A link may lead to the `blobs` of a Hugging Face cache, and nowhere else: names of files
        come from the checkpoint too.
        """
        path = self.directory / name
        if Path(name).name != name:
            raise CheckpointError(self.directory, name, "not the plain name of a file")
        if not path.is_file():
            raise CheckpointError(self.directory, name, "no such file")
        home = self.directory.resolve()
        if path.resolve().parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(self.directory, name, "a link that leads out of the directory")
        return path

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.directory / name).is_file()

    def settings(self, name: str) -> Settings:
        """An optional JSON file of the directory; empty when it is missing."""
        if self.has_file(name):
            return Settings.read(self.file(name))
        return Settings(self.directory / name, {})

    def check_unchanged(self) -> None:
        """OSError where a file of weights is another one than at the start."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise OSError(errno.EIO, "it was changed while it was read", str(path))

    def _has_weights(self, name: str) -> bool:
        return self.has_file(name) or self.has_file(f"{name}.index.json")

    def _read_tensors(self, name: str) -> Iterator[StoredTensor]:
        """The tensors of every shard, each exactly where the index says."""
        if not self.has_file(f"{name}.index.json"):
            if not self.has_file(name):
                raise CheckpointError(
                    self.directory,
                    name,
                    "no such file (weights are read from safetensors only: *.bin, *.pt and *.pth "
                    "can run code when they are opened)",
                )
            yield from read_safetensors(self.file(name))
            return
        index = Settings.read(self.file(f"{name}.index.json"))
        places = index.section("weight_map").values
        if not places or not all(isinstance(shard, str) for shard in places.values()):
            raise index.wrong("weight_map", "wanted a file name for each tensor")
        found = set()
        for shard in sorted(set(places.values())):
            for tensor in read_safetensors(self.file(shard)):
                if places.get(tensor.name) == shard:
                    found.add(tensor.name)
                    yield tensor
        for missing in places.keys() - found:
            raise CheckpointError(self.directory / places[missing], missing, "no such tensor")


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
