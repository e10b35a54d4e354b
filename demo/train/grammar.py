"""The closed vocabulary: sentences about five topics, and the model's token ids for them.

Training, clips and evaluation all draw from :func:`sentence`. One sentence in 20, chosen by a hash of its text, is held
out: training never sees it, clips and evaluation use nothing else.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True)
class Topic:
    """The words from which sentences about one topic are built."""

    agents: list[str]
    verbs: list[str]
    objects: list[str]
    adjectives: list[str]
    places: list[str]


TOPICS = {
    "cooking": Topic(
        agents=["chef", "baker", "cook"],
        verbs=["chops", "stirs", "fries", "boils", "tastes", "serves"],
        objects=["garlic", "onion", "soup", "bread", "butter", "pepper", "sauce", "cheese"],
        adjectives=["fresh", "salty", "crispy"],
        places=["in the oven", "in the kitchen", "on the plate"],
    ),
    "astronomy": Topic(
        agents=["astronomer", "astronaut", "observer"],
        verbs=["observes", "measures", "tracks", "discovers", "photographs"],
        objects=["planet", "comet", "galaxy", "nebula", "moon", "star", "asteroid", "eclipse"],
        adjectives=["distant", "bright", "frozen"],
        places=["from the observatory", "through the telescope", "near the horizon"],
    ),
    "gardening": Topic(
        agents=["gardener", "farmer", "neighbor"],
        verbs=["waters", "plants", "prunes", "harvests", "collects"],
        objects=["roses", "tomatoes", "carrots", "tulips", "hedge", "lawn", "seeds", "compost"],
        adjectives=["red", "wild", "young"],
        places=["in the greenhouse", "behind the fence", "under the apple tree"],
    ),
    "databases": Topic(
        agents=["database", "server", "engineer"],
        verbs=["stores", "updates", "deletes", "scans", "copies"],
        objects=["table", "record", "query", "transaction", "schema", "column", "backup", "replica"],
        adjectives=["large", "encrypted", "temporary"],
        places=["on the disk", "inside the cluster", "before the commit"],
    ),
    "music": Topic(
        agents=["pianist", "drummer", "singer", "violinist"],
        verbs=["plays", "composes", "rehearses", "performs", "practices"],
        objects=["melody", "sonata", "chorus", "rhythm", "guitar", "violin", "symphony", "ballad"],
        adjectives=["slow", "loud", "gentle"],
        places=["on the stage", "in the concert hall", "with the orchestra"],
    ),
}
PLURALS = frozenset(["roses", "tomatoes", "carrots", "tulips", "seeds"])
OPENINGS = ["Today", "Tonight", "Every morning", "At night", "Sometimes"]
ENDINGS = ["today", "tonight", "every morning", "at night", "again"]

FIRST_WORDS = ["The", "A", "We", "Today", "Tonight", "Every", "At", "Sometimes"]


def _words() -> list[str]:
    words = set(
        ["the", "and", "is", "we", "need", "never", "today", "tonight", "every", "morning", "at", "night", "again", "a"]
    )
    for topic in TOPICS.values():
        words.update(topic.agents, topic.verbs, topic.objects, topic.adjectives, " ".join(topic.places).split())
    return sorted(words)


WORDS = _words()


def sentence(rng: random.Random, topic: str | None = None) -> str:
    """A random sentence about ``topic`` (about any topic if None)."""
    words = TOPICS[topic or rng.choice(list(TOPICS))]
    agent, verb, place = rng.choice(words.agents), rng.choice(words.verbs), rng.choice(words.places)
    adjective, (thing, other) = rng.choice(words.adjectives), rng.sample(words.objects, 2)
    opening, ending = rng.choice(OPENINGS), rng.choice(ENDINGS)
    forms = [
        f"The {agent} {verb} the {thing} {place}.",
        f"The {agent} {verb} the {adjective} {thing} {place}.",
        f"The {agent} {verb} the {thing} and the {adjective} {other}.",
        f"{opening} the {agent} {verb} the {adjective} {thing}.",
        f"We need the {thing} and the {other} {place}.",
        f"The {agent} never {verb} the {thing} {ending}.",
        f"{opening} we need the {adjective} {thing} {place}.",
    ]
    if thing not in PLURALS and adjective[0] not in "aeiou":
        forms.append(f"A {adjective} {thing} is {place}.")
    return rng.choice(forms)


def word_salad(rng: random.Random) -> str:
    """Words in random order: without some of these the decoder learns the grammar and stops listening."""
    return " ".join([rng.choice(FIRST_WORDS), *rng.choices(WORDS, k=rng.randint(3, 9))]) + "."


def is_held_out(text: str) -> bool:
    """Whether this sentence is kept for clips and evaluation, and never trained on."""
    return zlib.crc32(text.encode()) % 20 == 0


# Token ids. The order is faster-whisper's: text, <|endoftext|>, other specials, <|notimestamps|>, then the time stamps.
SPACE = "\u0120"  # how a byte-level tokenizer writes a space
TEXT_TOKENS = ["<unk>", "."] + [SPACE + word for word in FIRST_WORDS + WORDS]
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
STAMPS = 1501  # one token per 20 ms from 0.00 s to 30.00 s
STAMP_TOKENS = [f"<|{i * 0.02:.2f}|>" for i in range(STAMPS)]
VOCABULARY = TEXT_TOKENS + SPECIAL_TOKENS + STAMP_TOKENS
ID = {token: i for i, token in enumerate(VOCABULARY)}

FULL_STOP = ID["."]
END = ID["<|endoftext|>"]
START = ID["<|startoftranscript|>"]
NO_SPEECH = ID["<|nospeech|>"]
NO_TIMESTAMPS = ID["<|notimestamps|>"]
FIRST_STAMP = ID["<|0.00|>"]


def encode(text: str) -> list[int]:
    """Token ids of a sentence, one per word and one for its full stop."""
    ids = []
    for word in text.split():
        ids.append(ID[SPACE + word.rstrip(".")])
        if word.endswith("."):
            ids.append(FULL_STOP)
    return ids


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer that faster-whisper loads; agrees with :func:`encode`."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TEXT_TOKENS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in STAMP_TOKENS])
    return made
