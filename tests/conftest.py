"""What several rooms' tests share."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# A shell that runs the tests in the background has them ignore Ctrl-C, and nohup SIGHUP: so would every command that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A generation that is given no seed has 0 here, but in the tests of that.
os.environ["DGEMMA_SEED"] = "0"

# No test fails because a machine is slow. All else is as hypothesis has it, which differs where CI is set.
settings.register_profile("untimed", settings(deadline=None))
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def bundled():
    """The bundled Sudoku model."""
    import dgemma

    with dgemma.Model() as model:
        yield model


@pytest.fixture(scope="session")
def tidy():
    """The bundled model of small text tasks, which chats, thinks, calls tools and fills holes."""
    import dgemma
    from dgemma.model import bundled

    with dgemma.Model(bundled("tidy"), threads=1) as model:
        yield model


# As Gemma's: no thought in what was said before, an empty one where none is wanted.
CHAT_TEMPLATE = """{{ bos_token }}{% if enable_thinking or tools or messages[0].role == 'system' %}<|turn>system
{% if enable_thinking %}<|think|>{% endif %}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{% for tool in tools or [] %}<|tool>declaration:{{ tool.function | tojson }}<tool|>{% endfor %}<turn|>
{% endif %}{% for m in messages if m.role != 'system' %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}{% for c in m.tool_calls or [] -%}
<|tool_call>call:{{ c.function | tojson }}<tool_call|>{% endfor %}<turn|>
{% endfor %}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}"""


@pytest.fixture(scope="session")
def chatting(tmp_path_factory):
    """The path of a model of random weights that knows the marks of turns, thoughts and calls."""
    from support.checkpoints import write_checkpoint

    from dgemma.convert import convert

    folder = tmp_path_factory.mktemp("chatting")
    write_checkpoint(folder, layers=2, dtype="f32", context=512, chat_template=CHAT_TEMPLATE, eos=[1, 6])
    convert(folder, folder / "chatting.gguf", type="f32")
    return str(folder / "chatting.gguf")
