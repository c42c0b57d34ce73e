"""Conversations: the template that makes one text of their messages, and which of its tokens are to
be learned.

The template is that of Zephyr and of TinyLlama-Chat. Only <s> and </s> are control tokens:

    <s><|system|>
    Answer in one sentence.</s>
    <|user|>
    What does `os.getcwd` do?</s>
    <|assistant|>
    Return a unicode string representing the current working directory.</s>

Learned are the assistant's words and the </s> after them: what a model that answers has to predict.
All else is only read. The letters </s> within a message stay text, so that no message can end
itself and begin another.
"""
import json
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from os.path import commonprefix
from typing import NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment

from documents import RowFilter, Skip, check_text
from files import InputError

# Jinja, which transformers, vLLM and llama.cpp render. It takes what training takes, and no more.
TEMPLATE = """\
{{- bos_token -}}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages -%}
{%- set turn = ['user', 'assistant'][(loop.index0 - first) % 2] -%}
{%- if loop.index0 >= first and message['role'] != turn -%}
{{- raise_exception('user and assistant take turns, after at most one system message') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{{- message['content'] + eos_token -}}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}


class Conversation(NamedTuple):
    messages: tuple       # of (role, text)
    key: str              # conversations with the same are both for training, or for validation


@dataclass(frozen=True)
class ConversationFilter(RowFilter):
    """Takes conversations from rows: a list of {"role", "content"} under the key `messages`, as
    OpenAI's, or of {"from", "value"} under `conversations`, as ShareGPT's, or without a key."""
    text_key: str = "messages"

    def columns(self):
        return [*super().columns(), "conversations"]

    def from_row(self, row):
        if isinstance(row, list):
            row = {self.text_key: row}
        if isinstance(row, dict) and row.get("messages") is None and "conversations" in row \
                and self.text_key == "messages":
            row = row | {"messages": row["conversations"]}
        return super().from_row(row)

    def accept(self, rows):
        """The Conversation of a row's list of messages, if it is one and in the fraction."""
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Skip("no conversation", f"is no list of messages but {rows!r:.80}")
        messages = [(row.get("role", row.get("from")), row.get("content", row.get("value")))
                    for row in rows]
        for role, _ in messages:
            if role not in [*ROLES]:                        # it may be a list, which has no hash
                raise Skip("unknown role", f"has a message of {role!r:.80}: only {', '.join(ROLES)}"
                           " are known")
        try:
            messages = tuple((ROLES[role], check_text(text)) for role, text in messages)
        except Skip as skip:
            raise Skip(skip.reason, f"has a message that {skip.message}") from None
        roles = [role for role, _ in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if any(role != ("user", "assistant")[k % 2] for k, role in enumerate(turns)):
            raise Skip("roles out of turn", f"has messages of {', '.join(roles)[:80]}: user and "
                       "assistant must take turns, after at most one system message")
        if "assistant" not in roles:
            raise Skip("no assistant", "has no message of an assistant")
        if any(role == "assistant" and not text.strip() for role, text in messages):
            raise Skip("empty answer", "has an empty answer")
        key = "\n".join(f"{role}: {text}" for role, text in messages)
        self.check_fraction(key)
        return Conversation(messages, key)


def encode_conversation(messages, encoder):
    """The ids of (role, text) pairs, and a mask: 1 for each that is to be learned, else 0."""
    sp = encoder.sp
    ids, mask, border = [sp.bos_id()], [0], ""
    for role, text in messages:
        head = f"{border}<|{role}|>\n"
        new = [*encoder.encode_by_sentencepiece(head + text), sp.eos_id()]
        read = len(new)
        if role == "assistant":
            # with most tokenizers a newline merges with nothing, and all of the head is the same
            read = len(commonprefix([list(encoder.encode_by_sentencepiece(head)), new]))
        ids += new
        mask += [0] * read + [1] * (len(new) - read)
        border = "\n"
    end = encoder.encode_by_sentencepiece(border)
    return [*ids, *end], mask + [0] * len(end)


# --------------------------------------------------------------------------------------------------
# The template of any model

class Template:
    """A chat template, rendered as `transformers` does: in a sandbox, since it is a program."""

    def __init__(self, tokenizer):
        self.folder = tokenizer.folder
        self.template = self.call(self.compile, tokenizer)

    def compile(self, tokenizer):
        path = self.folder / "chat_template.jinja"
        source = path.read_text("utf-8") if path.exists() else tokenizer.chat_template
        if isinstance(source, list):                               # several, each with a name
            source = {item["name"]: item["template"] for item in source}.get("default")
        if not source:
            source = TEMPLATE
            print(f"note: {self.folder} has no chat template, so Zephyr's is used: the model "
                  "may not have been trained to answer", file=sys.stderr)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "tools": None, "documents": None,
                                "strftime_now": lambda form: datetime.now().strftime(form),
                                "add_generation_prompt": True, **tokenizer.named_tokens}
        # these tags mark, for training, what the assistant says
        for tag, neutral in ("generation", "if true"), ("endgeneration", "endif"):
            source = re.sub(rf"{{%([-+]?)\s*{tag}\s*([-+]?)%}}", rf"{{%\1 {neutral} \2%}}",
                            source)
        return environment.from_string(source)

    def render(self, messages):
        return self.call(lambda: self.template.render(messages=messages).encode().decode())

    def call(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:                  # whatever a program may raise
            reason = " ".join(str(error).split()) or repr(error)
            raise InputError(f"the chat template of {self.folder} does not work here: "
                             f"{reason}") from None


def refuse(reason):
    raise InputError(reason)
