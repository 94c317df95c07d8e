"""Chat templates (Jinja) that write the text whose ids `dattn_mcore.data.templates` builds.

A message's content is a string, in which `<image>` stands where an image is, or a list of
`{"type": "image"}` and `{"type": "text", "text": ...}`; in a list, an image is followed by a
newline if anything follows it, as in LLaVA's data.
"""

from __future__ import annotations

from dattn_mcore.data.templates import check_template

_CONTENT = """\
{%- macro content(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- set text = namespace(value='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set text.value = text.value + '<image>' + ('' if loop.last else '\\n') -%}
{%- else -%}
{%- set text.value = text.value + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{{ text.value | trim }}
{%- endif -%}
{%- endmacro -%}
"""

_TURNS = """\
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('conversation roles must alternate user, assistant, user, ...') }}
{%- endif -%}
"""

_MISTRAL = (
    _CONTENT
    + "{{ bos_token }}"
    + _TURNS
    + """\
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + content(message) + '[/INST]' }}
{%- else -%}
{{ ' ' + content(message) + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

_GEMMA = (
    _CONTENT
    + "{{ bos_token }}"
    + _TURNS
    + """\
{%- if message['role'] == 'user' -%}
{{ '<start_of_turn>user\\n' + content(message) + '<end_of_turn>\\n<start_of_turn>model\\n' }}
{%- else -%}
{{ content(message) + '<end_of_turn>\\n' }}
{%- endif -%}
{%- endfor -%}
"""
)

# Images, then <bos>, then the caption; the user's text is dropped.
_PLAIN = (
    _CONTENT
    + _TURNS
    + """\
{%- if loop.index0 > 1 -%}
{{ raise_exception('the plain template holds one image caption pair') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ '<image>' * (content(message).split('<image>') | length - 1) + bos_token }}
{%- else -%}
{%- set caption = content(message) -%}
{{ (SPACE if caption else '') + caption + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)


def chat_template(template: str, prefix_space: bool) -> str:
    """Returns the Jinja text of a template.

    Args:
        template: `plain`, `mistral` or `gemma`.
        prefix_space: whether the tokenizer normally puts a space in front of a text; a caption
            in `plain` then starts with one.
    """
    check_template(template)
    plain = _PLAIN.replace("SPACE", "' '" if prefix_space else "''")
    return {"plain": plain, "mistral": _MISTRAL, "gemma": _GEMMA}[template]
