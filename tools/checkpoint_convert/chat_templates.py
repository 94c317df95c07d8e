"""Chat templates (Jinja) that write the text whose ids `dattn_mcore.data.templates` builds.

A message's content is a string, in which `<image>` stands where an image is, or a list of
`{"type": "image"}` and `{"type": "text", "text": ...}`; in a list, an image is followed by a
newline if anything follows it, as in LLaVA's data. A system message may come first.
"""

from __future__ import annotations

from collections.abc import Sequence

from dattn_mcore.architectures.chat import BOS, EOS, Images, Segment, Token
from dattn_mcore.data.templates import find_template
from dattn_mcore.types import IMAGE_MARK

_CONTENT = """\
{%- macro content(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- set text = namespace(value='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set text.value = text.value + 'IMAGE_MARK' + ('' if loop.last else '\\n') -%}
{%- elif part['type'] == 'text' -%}
{%- set text.value = text.value + part['text'] -%}
{%- else -%}
{{ raise_exception('a message holds text and image parts, no ' + part['type'] | string) }}
{%- endif -%}
{%- endfor -%}
{{ text.value | trim }}
{%- endif -%}
{%- endmacro -%}
""".replace("IMAGE_MARK", IMAGE_MARK)

# A system message, which may come first, becomes `system`; the others are `turns`.
_SYSTEM = """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- set system = content(messages[0]) -%}
{%- if 'IMAGE_MARK' in system -%}
{{ raise_exception('IMAGE_MARK stands in the system message; only user messages may show images') }}
{%- endif -%}
{%- endif -%}
""".replace("IMAGE_MARK", IMAGE_MARK)

_TURNS = """\
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('conversation roles must alternate user, assistant, user, ...; one system \
message may come first') }}
{%- endif -%}
{%- set said = content(message) | trim -%}
"""


# Where the system message has no place of its own.
IN_FRONT = """\
{%- if loop.first and system -%}
{%- set said = (system + '\\n\\n' + content(message)) | trim -%}
{%- endif -%}
"""


def chat_template(template: str, prefix_space: bool) -> str:
    """Returns the Jinja text of a template, written from its segments.

    Args:
        template: name of a conversation template.
        prefix_space: whether the tokenizer normally puts a space in front of a text; a segment
            that opens with it then does.
    """
    chat = find_template(template)
    one_pair = f"""\
{{%- if loop.index0 > 1 -%}}
{{{{ raise_exception('the {chat.name} template holds one image caption pair') }}}}
{{%- endif -%}}
"""
    default = f"{{%- set system = system or {_quoted(chat.default_system or '')} -%}}\n"
    own_place, in_front = "", IN_FRONT
    if chat.system is not None:
        written = _written(chat.system, prefix_space, said="system")
        own_place, in_front = f"{{%- if system -%}}\n{written}{{%- endif -%}}\n", ""
    last = _written(chat.before_last_answer, prefix_space)
    if last:
        last = f"{{%- if loop.index0 >= turns | length - 2 -%}}\n{last}{{%- endif -%}}\n"
    return (
        _CONTENT
        + _SYSTEM
        + (default if chat.default_system else "")
        + _written(chat.begin, prefix_space)
        + own_place
        + _TURNS
        + in_front
        + (one_pair if chat.one_pair else "")
        + "{%- if message['role'] == 'user' -%}\n"
        + _written(chat.user, prefix_space)
        + last
        + "{%- else -%}\n"
        + _written(chat.answer, prefix_space)
        + "{%- endif -%}\n{%- endfor -%}\n"
    )


def _written(segments: Sequence[Segment], prefix_space: bool, said: str = "said") -> str:
    """A line of Jinja that writes segments; empty for none.

    Args:
        segments: of a template.
        prefix_space: see `chat_template`.
        said: the variable that holds what is said.
    """
    terms: list[str] = []
    for segment in segments:
        if isinstance(segment, Token):
            names = {BOS: "(bos_token or eos_token)", EOS: "eos_token"}
            terms.append(names.get(segment.name, _quoted(segment.name)))
        elif isinstance(segment, Images):
            terms.append(f"'{IMAGE_MARK}' * ({said}.split('{IMAGE_MARK}') | length - 1)")
        else:
            if segment.opens and prefix_space:
                terms.append(f"(' ' if {said} else '')")
            terms += [_quoted(segment.before)] if segment.before else []
            terms += [said] if segment.holds == "said" else []
            terms += [_quoted(segment.after)] if segment.after else []
    return f"{{{{ {' + '.join(terms)} }}}}\n" if terms else ""


def _quoted(text: str) -> str:
    """A text as Jinja's string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
