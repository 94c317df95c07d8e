"""Chat templates (Jinja) that write the text whose ids `dattn_mcore.data.templates` builds.

A message's content is a string, in which `<image>` stands where an image is, or a list of
`{"type": "image"}` and `{"type": "text", "text": ...}`; in a list, an image is followed by a
newline if anything follows it, as in LLaVA's data. A system message may come first: its text is put
in front of the first user's, as in training.
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
{%- elif part['type'] == 'text' -%}
{%- set text.value = text.value + part['text'] -%}
{%- else -%}
{{ raise_exception('a message holds text and image parts, no ' + part['type'] | string) }}
{%- endif -%}
{%- endfor -%}
{{ text.value | trim }}
{%- endif -%}
{%- endmacro -%}
"""

# A system message, which may come first, becomes `prefix`; the others are `turns`.
_SYSTEM = """\
{%- set prefix = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set system = content(messages[0]) -%}
{%- if '<image>' in system -%}
{{ raise_exception('<image> stands in the system message; only user messages may show images') }}
{%- endif -%}
{%- set prefix = system + '\\n\\n' if system else '' -%}
{%- endif -%}
"""

_TURNS = """\
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('conversation roles must alternate user, assistant, user, ...; one system \
message may come first') }}
{%- endif -%}
{%- set said = ((prefix if loop.first else '') + content(message)) | trim -%}
"""

_MISTRAL = (
    _CONTENT
    + _SYSTEM
    + "{{ bos_token }}"
    + _TURNS
    + """\
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + said + '[/INST]' }}
{%- else -%}
{{ ' ' + said + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

_GEMMA = (
    _CONTENT
    + _SYSTEM
    + "{{ bos_token }}"
    + _TURNS
    + """\
{%- if message['role'] == 'user' -%}
{{ '<start_of_turn>user\\n' + said + '<end_of_turn>\\n<start_of_turn>model\\n' }}
{%- else -%}
{{ said + '<end_of_turn>\\n' }}
{%- endif -%}
{%- endfor -%}
"""
)

# Images, then <bos>, then the caption; the user's text is dropped.
_PLAIN = (
    _CONTENT
    + _SYSTEM
    + _TURNS
    + """\
{%- if loop.index0 > 1 -%}
{{ raise_exception('the plain template holds one image caption pair') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ '<image>' * (said.split('<image>') | length - 1) + bos_token }}
{%- else -%}
{{ (SPACE if said else '') + said + eos_token }}
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
