"""The chat format of a Hugging Face folder: its own chat template, rendered by `transformers`.

What the template can do is found by rendering it: whether it shows a system message, whether it opens <think> for the model, and which
token ends a turn. <think>...</think> in a reply is thinking.
"""

import datetime
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from discover_jax.exceptions import ConfigError, TokenizerError
from discover_jax.text.chat import DATE, Rendered, Reply
from discover_jax.text.folder_tokenizer import FolderTokenizer, read_stop_ids, unused_mark

THINK, END_THINK = "<think>", "</think>"

# Texts that no template contains. They begin and end with a letter, so that trimming keeps them.
_SYSTEM, _REPLY = "A probe of the system message", "A probe of the reply"
_USER = "A probe of\n\n the user's message:\n\tx  = 1 \r\n\u00e9\U0001f680 end"


class Template:
    """A folder's chat template as a `ChatFormat`."""

    def __init__(self, folder: str | os.PathLike[str], date: str = DATE):
        """Reads the folder's tokenizer, chat template and generation_config.json.

        Args:
          folder: a Hugging Face folder.
          date: "current date" for templates that ask for it, such as "2025-08-05"; fixed, so that equal runs have equal prompts.

        Raises:
          TokenizerError: there is no tokenizer, chat template or stop token, or one is damaged.
        """
        self.tokenizer = FolderTokenizer(folder)
        self._date = date
        self._template = _with_date(_default_template(self.tokenizer), datetime.date.fromisoformat(date), self.tokenizer.folder)
        self._takes_system = self._shows_system_message()
        # What the template writes after the request: the header of the reply, which may open the thinking, or open and close it.
        header = self._applied([_message("user", _USER)], reply_follows=True).rpartition(_USER)[2]
        self._opens_thinking = header.rfind(THINK) > header.rfind(END_THINK)
        self._closes_thinking = header.rfind(END_THINK) > header.rfind(THINK)
        added = self.tokenizer.added
        self._think_ids = (added[THINK], added[END_THINK]) if {THINK, END_THINK} <= added.keys() else None
        self.stop_ids = self._find_stop_ids()
        self._check_rendering()

    def __reduce__(self):
        return Template, (self.tokenizer.folder, self._date)

    @property
    def names(self) -> Collection[str]:
        return self.tokenizer.added.keys()

    def describe(self) -> str:
        names = {index: name for name, index in self.tokenizer.added.items()}
        stops = ", ".join(names.get(index, str(index)) for index in self.stop_ids)
        system = "" if self._takes_system else " without a system message"
        return f"chat template{system}, stop tokens {stops}"

    def render(self, request: str, instructions: str = "") -> Rendered:
        """Instructions precede the request in the user's message if the template does not show a system message."""
        mark = unused_mark(request + instructions + self._template)
        protected = self.tokenizer.protect(request, mark), self.tokenizer.protect(instructions, mark)
        text = self._applied(self._messages(*protected), reply_follows=True)
        return Rendered(tuple(self.tokenizer.encode_markup(text, mark)), text.replace(mark, ""))

    def parse(self, ids: Sequence[int]) -> Reply:
        """<think> and </think> count as tokens; their names in a text do not. If the tokenizer does not have these tokens, they count as
        text, but only where thinking begins the reply. Line breaks around both parts are removed, as Qwen3's template does."""
        end = next((place for place, index in enumerate(ids) if index in self.stop_ids), None)
        segments = self._segments(ids[:end])
        segments = [part for part in segments[:-1] if part.thinking or part.text.strip()] + segments[-1:]
        answers = [part.text for part in segments if not part.thinking]
        thinking = "\n\n".join(text for part in segments if part.thinking and (text := part.text.strip("\n")))
        if not answers:
            return Reply(thinking, None, truncated=end is None)
        *earlier, final = (answer.lstrip("\n") for answer in answers)
        return Reply(thinking, final, truncated=end is None and not segments[-1].thinking, earlier=tuple(reversed(earlier)))

    def answer_opening(self) -> tuple[int, ...]:
        """</think>. The line breaks after it are left to the model: a tokenizer may join them with what follows."""
        file = self.tokenizer.folder / "tokenizer.json"
        if self._think_ids is None:
            reason = f"{file} has no tokens {THINK} and {END_THINK}, so the model has no thinking that could be ended"
        elif self._closes_thinking:
            reason = f"the chat template of {self.tokenizer.folder} switches thinking off"
        else:
            return (self._think_ids[1],)
        raise ConfigError(f"config.sampling.thinking_tokens must be 0 for this model: {reason}.")

    def answer_forced(self, closing: str) -> tuple[int, ...]:
        """The closing text on its own line, and </think>, as Qwen3 ends its thinking."""
        opening = self.answer_opening()
        return *self.tokenizer.encode(f"{closing}\n"), *opening

    def _messages(self, request: str, instructions: str) -> list[dict[str, str]]:
        if not instructions:
            return [_message("user", request)]
        if self._takes_system:
            return [_message("system", instructions), _message("user", request)]
        return [_message("user", f"{instructions}\n\n{request}")]

    def _applied(self, messages: Sequence[dict[str, str]], *, reply_follows: bool) -> str:
        try:
            return self.tokenizer.apply_template(self._template, messages, reply_follows=reply_follows)
        except Exception as error:  # templates are programs: an undefined name, a wrong type, or their own raise_exception
            raise TokenizerError(
                f"The chat template of {self.tokenizer.folder} cannot render messages of {', '.join(m['role'] for m in messages)}: {error}."
                " Copy tokenizer_config.json and chat_template.jinja again from where the weights were published."
            ) from error

    def _shows_system_message(self) -> bool:
        try:
            text = self._applied([_message("system", _SYSTEM), _message("user", _USER)], reply_follows=True)
        except TokenizerError:  # it refuses the role; if it refuses the user's message too, the next rendering raises
            return False
        return _SYSTEM in text and _USER in text

    def _find_stop_ids(self) -> tuple[int, ...]:
        """The end-of-text ids of generation_config.json, that of the tokenizer, and the token that ends a turn of the template."""
        found = set(read_stop_ids(self.tokenizer.folder))
        if self.tokenizer.eos_id is not None:
            found.add(self.tokenizer.eos_id)
        found |= self._turn_end()
        if not found:
            raise TokenizerError(
                f"{self.tokenizer.folder} names no token that ends a reply. Copy generation_config.json and tokenizer_config.json there"
                " from where the weights were published."
            )
        return tuple(sorted(found))

    def _turn_end(self) -> set[int]:
        """The added token that follows a reply, if there is one."""
        text = self._applied([_message("user", _USER), _message("assistant", _REPLY)], reply_follows=False)
        _, shown, after = text.rpartition(_REPLY)
        first = self.tokenizer.encode_markup(after.lstrip())[:1] if shown else []
        return set(first) & set(self.tokenizer.added.values())

    def _check_rendering(self) -> None:
        """Checks that `render` equals the template for text without names of added tokens, and that it shows the user's message."""
        messages = self._messages(_USER, _SYSTEM)
        expected = self._applied(messages, reply_follows=True)
        rendered = self.render(_USER, _SYSTEM)
        if _USER not in expected:
            raise TokenizerError(f"The chat template of {self.tokenizer.folder} does not show the user's message. Use the published one.")
        if list(rendered.ids) != self.tokenizer.template_ids(expected):
            raise TokenizerError(
                f"{self.tokenizer.folder / 'tokenizer.json'} splits text differently beside special tokens, which is not supported. Use a"
                " byte-level tokenizer, as Qwen and Llama 3 have."
            )

    def _segments(self, ids: Sequence[int]) -> list["_Segment"]:
        """The parts of a reply, at least one."""
        if self._think_ids is None:
            return _segments_of_text(self.tokenizer.decode(ids), self._opens_thinking)
        parts: list[tuple[bool, list[int]]] = [(self._opens_thinking, [])]
        for index in map(int, ids):
            if index == self._think_ids[0]:
                parts.append((True, []))
            elif index == self._think_ids[1]:
                parts[-1] = (True, parts[-1][1])  # also if nothing opened it
                parts.append((False, []))
            else:
                parts[-1][1].append(index)
        return [_Segment(thinking, self.tokenizer.decode(part)) for thinking, part in parts]


class _Segment(NamedTuple):
    """A part of a reply: thinking or answer."""

    thinking: bool
    text: str


def _segments_of_text(text: str, opened: bool) -> list[_Segment]:
    opening = re.match(rf"\s*{THINK}", text)
    if not opened and not opening:
        return [_Segment(False, text)]
    thinking, ended, answer = text[opening.end() if opening else 0 :].partition(END_THINK)
    return [_Segment(True, thinking), *([_Segment(False, answer)] if ended else [])]


def _default_template(tokenizer: FolderTokenizer) -> str:
    templates, folder = tokenizer.chat_templates, tokenizer.folder
    if not templates:
        raise TokenizerError(
            f"There is no chat template in {folder}: tokenizer_config.json has no chat_template, and chat_template.jinja is missing."
            " Use the instruct variant of the model, or copy its chat template there."
        )
    if "default" not in templates:
        raise TokenizerError(
            f"None of the chat templates in {folder} is called 'default'; found: {', '.join(templates)}. Rename one in"
            " tokenizer_config.json."
        )
    return templates["default"]


def _with_date(template: str, date: datetime.date, folder: Path) -> str:
    """The template with a fixed date where it prints today's, as those of Llama 3.2 do; prompts must not change from day to day."""
    fixed = re.sub(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(date.strftime(call[2])), template)
    if re.search(r"\bstrftime_now\s*\(", fixed):
        raise TokenizerError(
            f"The chat template of {folder} prints the current date in a way that is not supported: strftime_now must have a quoted format,"
            " such as strftime_now('%d %b %Y'). Edit chat_template.jinja or chat_template in tokenizer_config.json."
        )
    return fixed


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
