"""A message in the person's own editor."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_COMMON = ("editor", "nano", "vi")


def edited(text: str) -> str:
    """`text` as it comes back from $VISUAL or $EDITOR, less one line feed at its end; unchanged if
    the editor fails.  OSError or ValueError say why there is none."""
    command = _command()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "message.md")
        path.write_text(text, "utf-8", "replace")
        if subprocess.call([*command, path]) != 0:
            return text
        return path.read_text("utf-8", "replace").removesuffix("\n")


def _command() -> list[str]:
    wanted = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        command = shlex.split(wanted) or [name for name in _COMMON if shutil.which(name)][:1]
    except ValueError as error:
        raise ValueError(f"$VISUAL or $EDITOR is no command: {wanted!r} ({error})") from None
    if not command:
        raise ValueError("there is no editor: name one in $EDITOR")
    return command
