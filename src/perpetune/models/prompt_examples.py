"""Rows of prompts and responses as tokens: the same prompt in training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets

from .prompt_tokens import Prompt, PromptTokenizer


def examples(
    tokens: PromptTokenizer,
    prompts: Sequence[Prompt],
    rows: datasets.Dataset,
    responses: Sequence[str],
    room: int,
    turn: bool = False,
) -> Iterator[dict[str, Any]]:
    """Of each row `input_ids` of its prompt and `answer`, the tokens of its response with their end.

    Also `blank`, whether the prompt ends with one; `turn`, whether it is a conversation; `cut`, how many tokens the
    prompt, or a text that answers nothing, has lost; and `spoken`, see `Prompt`, where that was asked for.

    Args:
        prompts: of the rows; responses: of the rows; room: tokens of a text that answers nothing.
    """
    column = rows["messages" if turn else "prompt"][:]
    labels, ids = rows["label"][:], rows["id"][:]
    for prompt, told, text, y, i in zip(prompts, column, responses, labels, ids, strict=True):
        if told:
            answer = tokens.reply(told) if turn else None
            answer = tokens.answer(text, prompt.blank, turn) if answer is None else answer
        else:
            prompt, answer = tokens.alone(text, room)
        spoken = {"spoken": prompt.spoken} if prompt.spoken else {}
        facts = {"blank": prompt.blank, "turn": turn, "cut": prompt.lost, "label": y, "id": i}
        yield {"input_ids": prompt.tokens, "answer": answer, **facts, **spoken}


def cut_line(task: str, found: Sequence[dict[str, Any]], room: int, share: float = 0.01) -> str | None:
    """What to say of a task of which more than this share of the examples is cut; None where it is less."""
    cut = [e["cut"] for e in found if e.get("cut")]
    if len(cut) <= share * len(found):
        return None
    return (
        f"task `{task}`: {len(cut)} of {len(found)} training examples ({len(cut) / len(found):.1%}) are longer than "
        f"{room} tokens and lose {sum(cut) / len(cut):.0f} of them on average, prompts in the middle of their passage, "
        "texts at their end: set max_length (--max-length) higher to keep them whole"
    )
