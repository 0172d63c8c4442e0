"""Prompts and answers as tokens: what a long prompt loses, where special tokens stand, and where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..streams.conversations import Conversation
from ..streams.passage import unmark

# what an answer is tokenised behind: the first after which its first token begins with it
_BEFORE = (":", "\n", "a", ")", "")


class Prompt(NamedTuple):
    """tokens: at most as many as there is room for; blank: whether the text ends with a blank; lost: how many tokens of
    its passage were cut out; spoken: of each token, whether it is the assistant's (see `conversations`)."""

    tokens: list[int]
    blank: bool
    lost: int = 0
    spoken: tuple[bool, ...] = ()


class PromptTokenizer:
    """The tokens of prompts and of answers, for a decoder or for an encoder and a decoder.

    A prompt that is too long loses tokens from the middle of its passage, so that what stands before and after it
    survives, and a question at either end of the passage, too. Without a marked passage all of a prompt is its passage;
    of a conversation, the longest message is. Answers are never cut. They end with the end-of-sequence token, and in a
    conversation with the token that the chat template writes after the assistant's turn, where it writes one.

    Args:
        tokenizer: of transformers, a fast one.
        decoder: whether the answer follows the prompt in one sequence. The prompt then ends without special tokens, and
            the answer is tokenised as it stands behind it.
        prefix: what stands between prompt and answer; None: a blank, unless the prompt ends with one.
        picture: the token that stands for an image in a prompt, and is never cut; None: prompts have no images.

    Raises:
        ModelError: a tokenizer without offsets or without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, *, decoder: bool, picture: int | None = None, prefix: str | None = None) -> None:
        self.tokenizer, self.decoder, self.picture, self.prefix = tokenizer, decoder, picture, prefix
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise ModelError(f"{kind} tells no offsets, which say where a passage is: use a fast tokenizer")
        ends = tokenizer.eos_token_id
        ends = tokenizer.sep_token_id if ends is None else ends
        if ends is None:
            raise ModelError("the tokenizer has no end-of-sequence token, with which an answer ends: set eos_token")
        self.end = int(ends)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.turn_lead, self.turn_end = self._turn()
        self._answers: dict[tuple[str, bool, bool], tuple[int, ...]] = {}

    def _turn(self) -> tuple[str, int]:
        """(blanks that the chat template writes before the assistant's words, the first special token that it writes
        behind them: `<|im_end|>`)."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return "", self.end
        said = "perpetune"
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        try:
            written = self.tokenizer.apply_chat_template(talk, tokenize=False)
            opened = self.tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
        except Exception:  # templates are programs of others, and one that refuses this may write the stream's own
            return "", self.end
        before, _, after = written.rpartition(said)
        lead = before.removeprefix(opened) if before.startswith(opened) else ""
        special = {*self.tokenizer.all_special_ids, *(i for i, t in self._added.items() if t.special)}
        tokens = self.tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        return "" if lead.strip() else lead, next((token for token in tokens if token in special), self.end)

    @property
    def _added(self) -> dict[int, Any]:
        return getattr(self.tokenizer, "added_tokens_decoder", {})

    def prompts(
        self,
        texts: Sequence[str],
        room: int,
        special: bool = True,
        turns: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> list[Prompt]:
        """The tokens of each prompt, at most `room`.

        Args:
            special: whether special tokens are added; False where a chat template has written them.
            turns: of each prompt, from where to where the assistant speaks, in characters.

        Raises:
            ModelError: more than `room` tokens stand outside of a passage.
        """
        if not texts:
            return []
        turns = [()] * len(texts) if turns is None else turns
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
        for (text, first, last), own, *row in zip(bare, turns, *columns, strict=True):
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
            kept = [token for i, token in enumerate(tokens) if i not in lost]
            spoken = tuple(any(a <= f < t <= b for a, b in own) for _, (f, t), _ in kept) if own else ()
            out.append(Prompt([t for t, _, _ in kept] or [self._nothing], text[-1:].isspace(), len(lost), spoken))
        return out

    def conversations(self, conversations: Sequence[Any], room: int, *, all_turns: bool = False) -> list[Prompt]:
        """The same for conversations (see `streams.conversations`), written by the tokenizer's chat template.

        Args:
            all_turns: find out which tokens are the assistant's, each turn with the token that ends it.

        Raises:
            ModelError: there is no template, or the template refuses a conversation; with `all_turns`, it writes a turn
                otherwise once others follow.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ModelError("the tokenizer has no chat template for `messages`: use a chat model, or `prompt` instead")
        read = [Conversation.read(c or []) for c in conversations]
        turns = [list(self._turns(talk)) for talk in read] if all_turns else None
        return self.prompts([self._written(talk.marked(), True) for talk in read], room, special=False, turns=turns)

    def _written(self, talk: Conversation, open_turn: bool) -> str:
        if not talk.messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                talk.messages, tokenize=False, add_generation_prompt=open_turn, **talk.settings
            )
        except Exception as error:  # templates are programs of others, and raise what they like
            raise ModelError(f"the tokenizer's chat template refuses a conversation: {error}") from error

    def _turns(self, talk: Conversation) -> Iterator[tuple[int, int]]:
        """From where to where the assistant speaks in the prompt, in characters, with the token that ends a turn."""
        whole, end = self._written(talk, True), self.tokenizer.decode([self.turn_end])
        for i, message in enumerate(talk.messages):
            if message["role"] != "assistant":
                continue
            before, after = self._written(talk.first(i), True), self._written(talk.first(i + 1), False)
            if not whole.startswith(before) or not after.startswith(before) or not whole.startswith(after.rstrip()):
                raise ModelError(
                    "the tokenizer's chat template writes a turn of the assistant otherwise once others follow, so "
                    "that it cannot be learned there: leave assistant_only_loss out, and the last turn is learned"
                )
            last = after.rfind(end, len(before))
            yield len(before), len(after.rstrip()) if last < 0 else last + len(end)

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
        key = text, after_blank or not self.decoder, turn
        if key not in self._answers:
            self._answers[key] = self._blank_before(*key) if self.prefix is None else self._as_it_is(*key)
        return (*self._answers[key], self.turn_end if turn else self.end)

    def _blank_before(self, text: str, after_blank: bool, turn: bool) -> tuple[int, ...]:
        # as the tokenizer cuts it behind a prompt: some write a blank into the token that follows, some do not
        before = "" if not self.decoder else "\n" if after_blank else ":"
        return self._behind(before, ("" if after_blank else " ") + text)[0]

    def _as_it_is(self, text: str, after_blank: bool, turn: bool) -> tuple[int, ...]:
        """Nothing is added but the prefix, and nothing taken away."""
        if not self.decoder:
            return self._behind("", text)[0]
        order = ("\n", *_BEFORE) if after_blank else _BEFORE
        tried = (self._behind(before, (self.turn_lead if turn else self.prefix or "") + text) for before in order)
        return next(tokens for tokens, clean in tried if clean)

    def reply(self, conversation: Any) -> tuple[int, ...] | None:
        """The tokens of an answer that is more than a text, as the template writes it behind its conversation; None
        where it is a text."""
        talk = Conversation.read(conversation)
        if talk.answer is None:
            return None
        opened, whole = self._written(talk, True), self._written(talk.answered(), False)
        if not whole.startswith(opened):
            raise ModelError("the tokenizer's chat template writes an answer with tool calls not behind its prompt")
        return self._reply(whole[len(opened) :])

    def _reply(self, text: str) -> tuple[int, ...]:
        end = self.tokenizer.decode([self.turn_end])
        said = text.rpartition(end)[0] if end in text else text.rstrip()
        return (
            *next(tokens for tokens, clean in (self._behind(b, said) for b in ("\n", *_BEFORE)) if clean),
            self.turn_end,
        )

    def _behind(self, before: str, text: str) -> tuple[tuple[int, ...], bool]:
        """(the tokens of a text behind another one, whether none of them holds a part of that)."""
        encoded = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        clean = not any(start < len(before) < to for _, (start, to) in pairs)
        return tuple(token for token, (_, to) in pairs if to > len(before)), clean

    def alone(self, text: str, room: int) -> tuple[Prompt, tuple[int, ...]]:
        """A text that answers nothing: its first token as the prompt, and up to `room` - 1 others and the end of the
        sequence as the answer, as TRL tokenises texts."""
        tokens = self.tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        added, ids = tokens["special_tokens_mask"], list(tokens["input_ids"])
        while len(ids) > 1 and added[len(ids) - 1]:
            ids.pop()
        ids = ids or [self._nothing]
        end = () if ids[-1] == self.end else (self.end,)
        return Prompt(ids[:1], False, max(0, len(ids) - room)), (*ids[1:room], *end)

    def halves(self, texts: Sequence[str], room: int, longest: int) -> list[dict[str, Any]]:
        """Of each text the first half of its words as the prompt, and up to `longest` tokens of the rest as the answer,
        without an end."""
        words = [text.split(" ") for text in texts]
        prompts = self.prompts([" ".join(w[: len(w) // 2]) for w in words], room)
        rest = [self.answer(" ".join(w[len(w) // 2 :]))[:-1] for w in words]
        return [
            {"input_ids": prompt, "answer": tokens[:longest], "label": 0}
            for (prompt, *_), tokens in zip(prompts, rest, strict=True)
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
