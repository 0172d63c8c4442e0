"""Prompts and answers as tokens: what a long prompt loses, where special tokens stand, and where they do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..streams.passage import BEGIN, mark, unmark


class PromptTokenizer:
    """The tokens of prompts and of answers, for a decoder or for an encoder and a decoder.

    A prompt that is too long loses tokens from the middle of its passage, so that what stands before and after it
    survives, and a question at either end of the passage, too. Without a marked passage all of a prompt is its passage;
    of a conversation, the longest message is. Answers are never cut. They end with the end-of-sequence token, and in a
    conversation with the token that the chat template writes after the assistant's turn, where it writes one.

    Args:
        tokenizer: of transformers, a fast one.
        decoder: whether the answer follows the prompt in one sequence. The prompt then ends without special tokens, and
            the answer is tokenised as it stands behind it: after a blank, unless the prompt ends with one.
        picture: the token that stands for an image in a prompt, and is never cut; None: prompts have no images.

    Raises:
        ModelError: a tokenizer without offsets or without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, *, decoder: bool, picture: int | None = None) -> None:
        self.tokenizer, self.decoder, self.picture = tokenizer, decoder, picture
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise ModelError(f"{kind} tells no offsets, which say where a passage is: use a fast tokenizer")
        ends = tokenizer.eos_token_id
        ends = tokenizer.sep_token_id if ends is None else ends
        if ends is None:
            raise ModelError("the tokenizer has no end-of-sequence token, with which an answer ends: set eos_token")
        self.end = int(ends)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.turn_end = self._end_of_turn()
        self._answers: dict[tuple[str, bool], tuple[int, ...]] = {}

    def _end_of_turn(self) -> int:
        """The first special token that the chat template writes behind the assistant's words (`<|im_end|>`)."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self.end
        said = "perpetune"
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        try:
            written = self.tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:  # templates are programs of others, and one that refuses this may write the stream's own
            return self.end
        after = written.rpartition(said)[2]
        special = {*self.tokenizer.all_special_ids, *(i for i, t in self._added.items() if t.special)}
        tokens = self.tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        return next((token for token in tokens if token in special), self.end)

    @property
    def _added(self) -> dict[int, Any]:
        return getattr(self.tokenizer, "added_tokens_decoder", {})

    def prompts(self, texts: Sequence[str], room: int, special: bool = True) -> list[tuple[list[int], bool]]:
        """The tokens of each prompt, at most `room`, and whether it ends with a blank.

        Args:
            special: whether special tokens are added; False where a chat template has written them.

        Raises:
            ModelError: more than `room` tokens stand outside of a passage.
        """
        if not texts:
            return []
        bare = [unmark(text) for text in texts]
        encoded = self.tokenizer(
            [text for text, _, _ in bare],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,  # that a text is longer than the model's limit is no news: it is cut below
        )
        columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        out = []
        for (text, first, last), *row in zip(bare, *columns, strict=True):
            tokens = list(zip(*row, strict=True))  # (id, (from, to), whether it was added)
            while self.decoder and len(tokens) > 1 and tokens[-1][2]:
                tokens.pop()
            if len(tokens) > 1 and tokens[0][0] == tokens[1][0] == self.tokenizer.bos_token_id:
                tokens.pop(0)  # the text brings its own
            inside = [first <= a < b <= last and not added and t != self.picture for t, (a, b), added in tokens]
            passage = [i for i, cuttable in enumerate(inside) if cuttable]
            lost = _middle(passage, len(tokens) - room)
            if lost is None:
                raise ModelError(
                    f"a prompt has {len(tokens) - len(passage)} tokens outside of its passage, and there is room for "
                    f"{room}: set max_length higher, or shorten the instruction (`{text[:40]}…`)"
                )
            kept = [token for i, (token, _, _) in enumerate(tokens) if i not in lost]
            out.append((kept or [self._nothing], text[-1:].isspace()))
        return out

    def conversations(self, conversations: Sequence[Any], room: int) -> list[tuple[list[int], bool]]:
        """The same for lists of {role, content} (or their JSON), written by the tokenizer's chat template.

        Raises:
            ModelError: there is no template, or the template refuses a conversation.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ModelError("the tokenizer has no chat template for `messages`: use a chat model, or `prompt` instead")
        return self.prompts([self._written(c) for c in conversations], room, special=False)

    def _written(self, conversation: Any) -> str:
        messages = [dict(m) for m in (json.loads(conversation) if isinstance(conversation, str) else conversation)]
        if not any(BEGIN in m["content"] for m in messages):
            longest = max(messages, key=lambda m: len(m["content"]))
            longest["content"] = mark(longest["content"])
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of others, and raise what they like
            raise ModelError(f"the tokenizer's chat template refuses a conversation: {error}") from error

    @property
    def _nothing(self) -> int:
        """Stands for an empty prompt, of which a model could say nothing: the beginning of a text."""
        return self.end if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    def answer(self, text: str, after_blank: bool = False, turn: bool = False) -> tuple[int, ...]:
        """The tokens of an answer with its end.

        Args:
            after_blank: whether the prompt ends with a blank; of no matter where the answer has a sequence of its own.
            turn: whether it answers a conversation.
        """
        key = text, after_blank or not self.decoder
        if key not in self._answers:
            # as the tokenizer cuts it behind a prompt: some write a blank into the token that follows, some do not
            before = "" if not self.decoder else "\n" if after_blank else ":"
            whole = before + ("" if key[1] else " ") + text
            encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            self._answers[key] = tuple(token for token, (_, to) in pairs if to > len(before))
        return (*self._answers[key], self.turn_end if turn else self.end)

    def halves(self, texts: Sequence[str], room: int, longest: int) -> list[dict[str, Any]]:
        """Of each text the first half of its words as the prompt, and up to `longest` tokens of the rest as the answer,
        without an end."""
        words = [text.split(" ") for text in texts]
        prompts = self.prompts([" ".join(w[: len(w) // 2]) for w in words], room)
        rest = [self.answer(" ".join(w[len(w) // 2 :]))[:-1] for w in words]
        return [
            {"input_ids": prompt, "answer": tokens[:longest], "label": 0}
            for (prompt, _), tokens in zip(prompts, rest, strict=True)
        ]


def _middle(passage: list[int], count: int) -> set[int] | None:
    """`count` positions from the middle of the passage; None if it has not so many."""
    if count <= 0:
        return set()
    if count > len(passage):
        return None
    first = (len(passage) - count) // 2
    return set(passage[first : first + count])


def pad_rows(sequences: list[list[int]], value: int, left: bool) -> Tensor:
    """Sequences of any lengths as rows (N x longest)."""
    longest = max(map(len, sequences))
    blanks = [[value] * (longest - len(s)) for s in sequences]
    return torch.tensor([[*b, *s] if left else [*s, *b] for s, b in zip(sequences, blanks, strict=True)])
