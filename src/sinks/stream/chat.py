"""The model's own chat template, one turn at a time: the text of a dialogue is never written as a whole.

A template writes a list of messages, and a list that grows with the dialogue is what an endless one cannot have. So
each new message is put behind a stand-in dialogue of one question and one answer, and what the template writes behind
that answer is the new turn: the end of the answer, the message, the beginning of the next answer. Whether this gives
what the template would write for the whole dialogue is checked once, on dialogues of two and three turns; a template
that numbers its turns, or writes earlier ones anew, is refused.

What a model wrote stays as it wrote it: a stream cannot unread. Where a template takes reasoning out of earlier answers
(`strips_reasoning`), or trims them, the stream is the dialogue with the answers as they were written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sinks.errors import InvalidInput, UnsupportedOption
from sinks.reading.tokens import check_text

QUESTION = "What stands here in the place of a question?"
ANSWER = "These words stand in the place of an answer."
NEXT = "Which words stand in the place of the next message?"
_THOUGHT = "Words in the place of a thought."
_REASONED = f"<think>\n{_THOUGHT}\n</think>\n\n{ANSWER}"
_ATTEMPTS = 3
"""A template may write the time of day: two renderings may fall into different seconds, three pairs do not."""

Message = dict[str, str]


class Dialogue:
    """Turns of one dialogue as token ids, by the chat template of `tokenizer`; constant size, changed by nothing.

    end: the token with which the template ends an answer.
    strips_reasoning: whether the template would leave out, of earlier answers, what stands in `<think>`.

    Raises UnsupportedOption where the tokenizer has no template, or one whose turns cannot be written one by one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, model: str = "this model"
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedOption(
                f"{model} has no chat template, as models that were not trained on dialogues have none: use feed() and "
                "generate(), or open a chat model"
            )
        self.tokenizer = tokenizer
        self.model = model
        if system is not None:
            check_system(system)
        self._head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token: str(each) for token, each in added.items()}
        special = {token for token, each in added.items() if each.special} | set(tokenizer.all_special_ids)
        # Some vocabularies do not call the marks of their own template special; line breaks are no marks.
        written = self._ids(self._opening_text(NEXT, "user")) + self._ids(self._turn_text(NEXT, "user"))
        self._marks = special | {token for token in written if token in self._added and self._added[token].strip()}
        self.end = self._end_of_answer()
        for attempt in range(_ATTEMPTS):
            why = self._unsteady()
            if why is None:
                break
            if attempt == _ATTEMPTS - 1:
                self._refuse(why)
        self.strips_reasoning = self._strips_reasoning()

    def opening(self, message: str, role: str = "user") -> list[int]:
        """The first turn: the template's beginning, system prompt included, the message, and the answer's beginning.

        Raises UnsupportedOption where the template refuses the role or the message, and InvalidInput where the message
        cannot be kept from being read as marks of the template.
        """
        check_message(message, role)
        return self._guarded(self._opening_text(message, role), self._opening_text(NEXT, role))

    def following(self, message: str, newest: int | None, role: str = "user") -> list[int]:
        """A later turn, behind an answer whose last token is `newest`: its end, unless that was written, and so on.

        Raises what `opening` raises.
        """
        check_message(message, role)
        ids = self._guarded(self._turn_text(message, role), self._turn_text(NEXT, role))
        first = next(at for at, token in enumerate(ids) if token in self._marks)
        return ids[first + 1 :] if ids[first] == newest else ids

    @cached_property
    def pinned(self) -> int:
        """How many tokens the beginning has that does not depend on the dialogue: system prompt, and marks around it.

        Where the template puts the system prompt into the first message, the mark that begins this message is included.
        Raises InvalidInput where there is no system prompt, neither given nor the template's own.
        """
        whole = self._opening_text(QUESTION, "user")
        start = whole.partition(QUESTION)[0]
        closing = self._render([*self._head, *_talk(QUESTION, ANSWER)], prompt=False).partition(ANSWER)[2]
        turn = self._turn_text(NEXT, "user").partition(NEXT)[0]
        if turn.startswith(closing):
            start = start.removesuffix(turn[len(closing) :])
        ids = _common(self._ids(start), self._ids(whole))
        if all(token in self._marks or not self._text(token).strip() for token in ids):
            raise InvalidInput(
                f'pin="system": there is no system prompt to pin, and the template of {self.model} writes none of its '
                "own; give one as system="
            )
        return len(ids)

    # The template

    def _opening_text(self, message: str, role: str) -> str:
        return self._render([*self._head, {"role": role, "content": message}])

    def _turn_text(self, message: str, role: str) -> str:
        """What the template writes behind an answer once `message` follows it."""
        text = self._render([*self._head, *_talk(QUESTION, ANSWER), {"role": role, "content": message}])
        _, found, behind = text.partition(ANSWER)
        if not found:
            self._refuse("it does not write an answer as it is")
        return behind

    def _render(self, messages: Sequence[Message], prompt: bool = True) -> str:
        try:
            written: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UnsupportedOption(
                f"the chat template of {self.model} refuses these roles, or what they say ({roles}): {error}"
            ) from error
        return written

    def _unsteady(self) -> str | None:
        """Why turns cannot be written one by one, if they cannot."""
        start = self._opening_text(QUESTION, "user")
        if self._head and self._head[0]["content"].strip() not in start:
            return "it does not write the system prompt"
        if ANSWER in start or QUESTION not in start:
            return "it does not write a message as it is, or the system prompt holds our stand-in for an answer"
        before, _, behind = self._render([*self._head, *_talk(QUESTION, ANSWER, NEXT)]).partition(ANSWER)
        if NEXT not in behind:
            return "it leaves out the newest message, or does not write it as it is"
        if not start.startswith(before):  # what it has more can only be the beginning of reasoning
            return "it writes earlier turns anew once later ones follow"
        middle = self._turn_text(QUESTION, "user")
        middle = middle[: len(middle) - len(start) + len(before)]
        longer = self._render([*self._head, *_talk(QUESTION, ANSWER, QUESTION, ANSWER, NEXT)])
        if longer != before + ANSWER + middle + ANSWER + behind:
            return "it writes a turn differently the later it comes"
        beginning, answered = self._ids(before), self._ids(before + ANSWER)
        pieces = [*answered, *self._inner(middle), *answered[len(beginning) :], *self._inner(behind)]
        if answered[: len(beginning)] != beginning or pieces != self._ids(longer):
            return "tokens depend on what follows them, since no special token stands between an answer and the rest"
        return None

    def _strips_reasoning(self) -> bool:
        before = self._render([*self._head, *_talk(QUESTION, ANSWER, NEXT)]).partition(ANSWER)[0]
        reasoned = self._render([*self._head, *_talk(QUESTION, _REASONED, NEXT)])
        return _THOUGHT not in reasoned or len(before) < len(self._opening_text(QUESTION, "user"))

    def _end_of_answer(self) -> int:
        """The mark behind an answer; spaces may stand before it."""
        behind = self._turn_text(NEXT, "user")
        found = [token for token in self._ids(behind) if token in self._marks]
        if not found or not behind.lstrip().startswith(self._added.get(found[0], NEXT)):
            self._refuse("it ends an answer with no token of its own, so nothing would tell where one ends")
        return found[0]

    def _refuse(self, why: str) -> None:
        raise UnsupportedOption(
            f"the chat template of {self.model} cannot be written turn by turn: {why}; use feed() and generate()"
        )

    # Its tokens

    def _guarded(self, text: str, plain: str) -> list[int]:
        """Tokens of a turn, with no more marks than `plain` has, the same turn with NEXT as its message.

        Marks written by whoever wrote the message are cut in two, so that they are read as the letters they are.
        """
        wanted = self._marks_of(self._inner(plain))
        ids = self._inner(text)
        if self._marks_of(ids) == wanted:
            return ids
        before, _, behind = plain.partition(NEXT)
        end = len(text) - len(behind)
        if text.startswith(before) and text.endswith(behind) and len(before) <= end:
            cuts = [match.start() + 1 for match in self._pattern.finditer(text, len(before), end)]
            bounds = [0, *cuts, len(text)]
            parts = [text[begin:stop] for begin, stop in zip(bounds, bounds[1:], strict=False)]
            ids = self._inner(parts[0]) + [token for part in parts[1:] for token in self._behind_end(part)]
            if self._marks_of(ids) == wanted:
                return ids
        raise InvalidInput(
            "this message would be read as a turn of its own: something in it becomes a special token of "
            f"{self.model}; leave it out"
        )

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Any mark, written as text."""
        marks = sorted((self._added[token] for token in self._marks if token in self._added), key=len, reverse=True)
        return re.compile("|".join(re.escape(mark) for mark in marks if len(mark) > 1))

    def _marks_of(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._marks]

    def _inner(self, text: str) -> list[int]:
        """Tokens of a text that begins with a mark, or at the beginning of a dialogue, or with spaces before a mark."""
        return self._behind_end(text) if text[:1].isspace() else self._ids(text)

    def _behind_end(self, text: str) -> list[int]:
        """Tokens of a text that stands inside a longer one: some tokenizers begin every text with a space."""
        return self._ids(self._added[self.end] + text)[1:]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def check_system(system: str) -> None:
    """Raises InvalidInput unless a system prompt is text that can be written."""
    if not isinstance(system, str):
        raise InvalidInput("a system prompt is text: give it as str")
    try:
        check_text(system)
    except InvalidInput as error:
        raise InvalidInput(f"the system prompt: {error}") from error


def check_message(message: str, role: str) -> None:
    """Raises InvalidInput unless both are text, and the role is one that speaks to the model."""
    if not isinstance(message, str) or not isinstance(role, str):
        raise InvalidInput("a message and its role are texts: give them as str")
    check_text(message)
    if role == "assistant":
        raise InvalidInput('role="assistant" is the model\'s own, which say() lets it write: give another role')


def _talk(*contents: str) -> list[Message]:
    """These contents as messages of user and assistant, in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def _common(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
