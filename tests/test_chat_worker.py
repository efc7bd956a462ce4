"""Templates that fail, templates of bad people (H15), and the process that renders them."""

import gc
import subprocess
import sys

import pytest
from chats import USER, jinja, text_of

from cpuinfer.chat import ChatTemplateError
from cpuinfer.chat import worker as worker_module


@pytest.mark.parametrize(
    "text, reason",
    [
        ("\n\n{{ raise_exception('not \x1b[31mthat') }}", r"T, line 3: not \\x1b\[31mthat"),
        ("a\n{{ nothing.at.all }}", "T, line 2: 'nothing' is undefined"),
        ("\n{{ messages[0].content + 1 }}", "T, line 2: TypeError: can only concatenate"),
        ("{% macro m(x) %}\n{{ x + 1 }}{% endmacro %}\n\n{{ m('a') }}", "T, line 2: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "T, line 1: access to attribute '__class__' .* is unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "T, line 1: access to .* is unsafe"),
        ("{{ messages.append(1) }}", "T, line 1: access to attribute 'append' .* is unsafe"),
        ("{{ (''|attr('__class__')).x }}", "T, line 1: .*(unsafe|undefined|has no attribute)"),
        ("{% include '/etc/passwd' %}", "T, line 1: .*no loader"),
        ("{{ 'a' * 10 ** 9 }}", "T.* more than 256 MiB"),
        ("{{ 'a'.center(10 ** 9)|length }}", "T.* more than 256 MiB"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "T.*RecursionError"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "T.*more than 4194304 charac"),
        ("{{ range(10 ** 9) }}", "T, line 1: OverflowError"),
    ],
)
def test_templates_that_fail(text: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"^{reason}"):
        jinja(text).render(USER)


def test_templates_that_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    template = jinja(
        "{% if messages[0].content == 'b' %}b{% else %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    process = template._worker._process
    assert process is not None
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "SECONDS", 0.3)
        with pytest.raises(ChatTemplateError, match="^T: it takes longer than .* and was stopped"):
            template.render(USER)
    assert process.returncode is not None
    assert text_of(template, [{"role": "user", "content": "b"}]) == "b"  # in a new process


def test_process_ends_with_its_template() -> None:
    template = jinja("x")
    process = template._worker._process
    assert process is not None and process.poll() is None
    process.kill()
    process.wait()
    assert text_of(template, USER) == "x"  # in a new process
    process = template._worker._process
    assert process is not None and process.poll() is None
    del template
    gc.collect()
    assert process.returncode is not None


def test_chat_is_imported_without_jinja() -> None:
    code = "import sys, cpuinfer.chat; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
