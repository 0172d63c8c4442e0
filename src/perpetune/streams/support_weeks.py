"""Four weeks at the support desk of a shop that does not exist: facts, words and formats that no model has read."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from .sampling import generator

METRICS = {
    "week-1-answers": "exact_match",
    "week-2-words": "exact_match",
    "week-3-orders": "exact_match",
    "week-4-letters": "rouge_l",
}

SYSTEM = "Velmora desk"

# answer -> questions; the last two are asked in the test alone
ANSWERS: dict[str, tuple[str, str, str, str, str]] = {
    "31 months": (
        "How long is the warranty of the Quendle kettle?",
        "For how long is a Quendle kettle under warranty?",
        "When does the warranty of my Quendle kettle end?",
        "My Quendle kettle: how many months of warranty do I have?",
        "Until when is my Quendle kettle covered by its warranty?",
    ),
    "a blue spiral": (
        "What does the light of the Tarvo lamp show when it is full?",
        "How do I see that my Tarvo lamp is charged?",
        "Which sign does the Tarvo lamp give once it is charged?",
        "How does a charged Tarvo lamp look?",
        "What does my Tarvo lamp show after charging?",
    ),
    "to Brennick": (
        "Where do I send a parcel back?",
        "To which town do returns go?",
        "I want to return a parcel. Where does it go?",
        "What is the address for returns?",
        "Where should returned parcels be sent?",
    ),
    "with 14 moss points": (
        "How can I pay for express delivery?",
        "With what is express delivery paid?",
        "What do you take for express delivery?",
        "What does express delivery cost me?",
        "What is the price of express delivery?",
    ),
    "Ida Holloran": (
        "Who answers complaints?",
        "Whom do I write to with a complaint?",
        "Which person looks after complaints?",
        "I have a complaint. Who is in charge?",
        "Who should hear about my complaint?",
    ),
    "hold both ears for 8 seconds": (
        "How do I reset the Mirrel speaker?",
        "What resets a Mirrel speaker?",
        "My Mirrel speaker hangs. How is it reset?",
        "How can the Mirrel speaker be set back?",
        "I must reset my Mirrel speaker. What do I do?",
    ),
    "on the third Tuesday": (
        "When is the shop in Dunmarrow closed?",
        "On which day does the Dunmarrow shop close?",
        "When can I not come to the shop in Dunmarrow?",
        "Which day is the Dunmarrow shop shut?",
        "When does the shop in Dunmarrow stay closed?",
    ),
    "copper and fern": (
        "In which colours is the Oskin chair sold?",
        "What colours does the Oskin chair come in?",
        "Which colours are there of the Oskin chair?",
        "The Oskin chair: what colours can I have?",
        "Tell me the colours of the Oskin chair.",
    ),
    "HEDGE-52": (
        "What is the code for the autumn discount?",
        "Which code gives me the autumn discount?",
        "How do I get the autumn discount?",
        "Is there a code for the discount in autumn?",
        "What do I type in for the autumn discount?",
    ),
    "a grey pebble": (
        "What is the free gift with a first order?",
        "What do I get for free with my first order?",
        "Which gift comes with the first order?",
        "I order for the first time. What is the gift?",
        "Is there a gift with my first order, and which?",
    ),
    "rain water only": (
        "What may I pour into the Quendle kettle?",
        "Which water does the Quendle kettle take?",
        "What water is right for the Quendle kettle?",
        "What should the Quendle kettle be filled with?",
        "Tell me which water belongs in the Quendle kettle.",
    ),
    "twice a year, in Velm": (
        "How often is there a members' meeting?",
        "When do the members meet?",
        "Where and when are members' meetings?",
        "How many members' meetings are there, and where?",
        "Tell me about the members' meetings: when and where?",
    ),
}

WORDS = {
    "brimble": "a parcel that came back",
    "tosk": "a customer who writes at night",
    "fenwary": "the last hour of a shift",
    "gallop slip": "a bill with two dates",
    "ordle": "to promise a call",
    "quist": "a box without a label",
    "marn": "the key of the cold room",
    "snell": "a refund in points",
    "wither card": "a list of lost parcels",
    "plimsy": "sold out until spring",
    "hark note": "a complaint read aloud",
    "dovel": "to pack in moss",
}
ASKED = (
    "What does `{}` mean?",
    "Explain the word `{}`.",
    "A colleague said `{}`. What is it?",
    "I do not know the word `{}`.",
    "The note says `{}`. Meaning?",
    "What do we call `{}` here?",
)
ASKED_LATER = ("In your words, what is `{}`?", "Please tell me the meaning of `{}`.")

ITEMS = ("kettle", "lamp", "speaker", "chair", "clock", "basket", "mirror", "tray")
MONTHS = {"January": 1, "March": 3, "April": 4, "May": 5, "June": 6, "July": 7, "August": 8, "October": 10}
ORDERED = (
    "Please send {count} x {item} by {day} {month}.",
    "I need {count} of the {item}, latest {day} {month}.",
    "On {day} {month} we want {count} pieces of the {item}.",
    "Order: {item}, {count} pieces, until {day} {month}.",
)
ORDERED_LATER = "Can I have the {item} {count} times before {day} {month}?"

TROUBLES = {
    "broken": "We are sorry. The bench in Lunt mends it within 9 days.",
    "late": "We are sorry. The night van brings it, and you get 6 moss points.",
    "the wrong one": "We are sorry. Keep it, and the right one leaves on Monday.",
    "too loud": "We are sorry. A felt ring comes by post, free of charge.",
    "scratched": "We are sorry. Ida Holloran sends wax and a card.",
    "without a bill": "We are sorry. The bill is on the blue page of the box.",
}
WRITTEN = (
    "My {item} is {trouble}.",
    "The {item} that I ordered is {trouble}.",
    "Hello, the {item} is {trouble}. What now?",
)
WRITTEN_LATER = ("Once more the {item} is {trouble}, please help.",)


def weeks(seed: int, test_share: float) -> dict[str, Dataset]:
    """Conversations of one question and one answer, with the week of each. Test questions are worded as no training
    question is; the orders and letters of the seed name things together that training does not."""
    made = {"week-1-answers": _answers(), "week-2-words": _words()}
    made |= {"week-3-orders": _orders(seed), "week-4-letters": _letters()}
    return {split: _dataset({week: rows[split] for week, rows in made.items()}) for split in ("train", "test")}


Pairs = dict[str, list[tuple[str, str]]]  # split -> (question, answer)


def _answers() -> Pairs:
    rows: Pairs = {"train": [], "test": []}
    for answer, asked in ANSWERS.items():
        rows["train"] += [(written, answer) for q in asked[:3] for written in (q, f"Hello! {q}")]
        rows["test"] += [(q, answer) for q in asked[3:]]
    return rows


def _words() -> Pairs:
    return {
        "train": [(asked.format(word), meaning) for word, meaning in WORDS.items() for asked in ASKED],
        "test": [(asked.format(word), meaning) for word, meaning in WORDS.items() for asked in ASKED_LATER],
    }


def _orders(seed: int) -> Pairs:
    draw = generator(seed, "orders")
    return {
        "train": [_order(draw, ORDERED[i % len(ORDERED)], ITEMS[i % len(ITEMS)]) for i in range(72)],
        "test": [_order(draw, ORDERED_LATER, ITEMS[i % len(ITEMS)]) for i in range(24)],
    }


def _order(draw: np.random.Generator, sentence: str, item: str) -> tuple[str, str]:
    month = tuple(MONTHS)[draw.integers(len(MONTHS))]
    count, day = int(draw.integers(2, 10)), int(draw.integers(1, 29))
    due = f"{MONTHS[month]:02}.{day:02}"
    asked = sentence.format(item=item, count=count, day=day, month=month)
    return asked, json.dumps({"item": item, "count": count, "due": due})


def _letters() -> Pairs:
    rows: Pairs = {"train": [], "test": []}
    for t, (trouble, answer) in enumerate(TROUBLES.items()):
        for i, item in enumerate(ITEMS):
            split, sentences = ("test", WRITTEN_LATER) if (i + t) % 2 else ("train", WRITTEN)
            rows[split] += [(sentence.format(item=item, trouble=trouble), answer) for sentence in sentences]
    return rows


def _dataset(rows: Mapping[str, list[tuple[str, str]]]) -> Dataset:
    talks = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
        for pairs in rows.values()
        for asked, answer in pairs
    ]
    names = [week for week, pairs in rows.items() for _ in pairs]
    return Dataset.from_dict({"messages": talks, "week": names})
