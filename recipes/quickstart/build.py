"""Builds the quickstart's files from one seed: a tiny base model and an instruction data set.

The base model is pretrained on declarative English about words, places and numbers. It knows these facts but has never
seen an instruction. The instruction rows ask for the same facts, and for simple tasks on lists, in Stanford Alpaca's
schema. The facts of the test rows occur in the pretraining text, but no training row of the same kind asks for them,
and the lists of the test rows are new: an adapter has to teach the model to answer, not the facts.

Two builds write the same rows and the same tokenizer, byte for byte. The weights repeat on one machine with one
number of threads; elsewhere they may differ in the last bits.

    python recipes/quickstart/build.py
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 42
TRAIN_ROWS, TEST_ROWS = 170, 14  # per kind of task, at most
VOCABULARY = 2048
CONTEXT = 512  # the model's context length; pretraining windows are shorter, which is faster
WINDOW = 128
BATCH = 16
STEPS = 1600
LEARNING_RATE = 3e-3
EOS, PAD = "<|endoftext|>", "<|pad|>"

# Text of the Alpaca prompts. The tokenizer is trained on it too, so that a prompt takes few tokens.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n\n### Input:\n\n### Response:\n"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

OPPOSITES = """
    hot cold, big small, fast slow, up down, in out, on off, open closed, full empty, happy sad, day night,
    early late, easy difficult, wet dry, clean dirty, rich poor, strong weak, wide narrow, deep shallow, high low,
    loud quiet, near far, true false, good bad, front back, top bottom, inside outside, above below, before after,
    always never, many few, push pull, win lose, buy sell, love hate, laugh cry, remember forget, rise fall,
    accept refuse, build destroy, float sink, friend enemy, war peace, life death, success failure, victory defeat,
    profit loss, entrance exit, north south, east west, summer winter, sunrise sunset, morning evening, rough smooth,
    sharp blunt, tight loose, safe dangerous, brave cowardly, polite rude, kind cruel, cheap expensive,
    simple complex, ancient modern, public private, guilty innocent, alive dead, asleep awake, possible impossible,
    visible invisible, legal illegal, patient impatient, lucky unlucky, usual unusual, maximum minimum,
    positive negative, major minor, inner outer, upper lower, male female, forward backward, everything nothing,
    increase decrease, expand contract, include exclude, import export, lend borrow, lock unlock, pack unpack,
    appear disappear, agree disagree, freeze melt, odd even, horizontal vertical, humble proud, straight crooked,
    permanent temporary, internal external
"""
PLURALS = """
    mouse mice, goose geese, foot feet, tooth teeth, man men, woman women, child children, ox oxen, person people,
    leaf leaves, wolf wolves, knife knives, wife wives, life lives, half halves, shelf shelves, loaf loaves,
    thief thieves, calf calves, sheep sheep, baby babies, city cities, story stories, berry berries, party parties,
    lady ladies, family families, country countries, fly flies, cherry cherries, box boxes, fox foxes, bus buses,
    glass glasses, dress dresses, church churches, watch watches, beach beaches, brush brushes, dish dishes,
    potato potatoes, tomato tomatoes, hero heroes, peach peaches, bench benches, key keys, boy boys, toy toys,
    monkey monkeys, day days, piano pianos, photo photos, roof roofs, book books, house houses, tree trees,
    river rivers, table tables, chair chairs, window windows, door doors, garden gardens, flower flowers, bird birds,
    dog dogs, cat cats, horse horses, farm farms, road roads, ship ships, boat boats, train trains, bridge bridges,
    school schools, teacher teachers, doctor doctors, friend friends, letter letters, song songs, picture pictures,
    mountain mountains, island islands, cloud clouds, star stars, bottle bottles, pencil pencils, shoe shoes, hat hats
"""
PAST_TENSES = """
    go went, come came, see saw, eat ate, drink drank, run ran, swim swam, sing sang, begin began, ring rang,
    give gave, take took, make made, write wrote, ride rode, drive drove, rise rose, speak spoke, break broke,
    choose chose, steal stole, wake woke, fly flew, grow grew, know knew, throw threw, blow blew, draw drew,
    fall fell, feel felt, keep kept, sleep slept, sweep swept, leave left, lose lost, meet met, feed fed, hold held,
    find found, bring brought, buy bought, think thought, teach taught, catch caught, fight fought, sell sold,
    tell told, say said, pay paid, hear heard, stand stood, understand understood, sit sat, win won, dig dug,
    shoot shot, forget forgot, wear wore, tear tore, send sent, spend spent, build built, lend lent, bite bit,
    hide hid, cut cut, put put, have had, do did, become became, shake shook, freeze froze, walk walked, talk talked,
    play played, look looked, open opened, help helped, jump jumped, wash washed, cook cooked, paint painted,
    listen listened, watch watched, clean cleaned, ask asked, answer answered, wait waited, start started,
    visit visited, laugh laughed, smile smiled, live lived, love loved, dance danced, use used, close closed,
    stop stopped, plan planned, drop dropped, try tried, cry cried, carry carried, study studied, hurry hurried
"""
CATEGORIES = """
    bird: robin eagle sparrow owl crow swan pigeon parrot penguin ostrich stork falcon
    fish: salmon trout tuna cod herring carp shark sardine
    fruit: apple pear banana plum cherry grape mango strawberry lemon melon
    vegetable: carrot onion cabbage potato leek turnip spinach cauliflower radish
    tree: oak pine birch maple willow beech elm
    flower: rose tulip daisy lily daffodil orchid violet poppy
    insect: ant bee wasp beetle butterfly moth mosquito cricket
    tool: hammer saw screwdriver chisel wrench spade axe
    musical instrument: piano violin guitar flute trumpet drum cello harp
    metal: iron copper gold silver tin lead zinc aluminium
    sport: football tennis hockey golf rugby volleyball basketball
    vehicle: car bus lorry van tractor tram taxi bicycle
    piece of furniture: table chair sofa bed desk wardrobe bookcase
    planet: Mercury Venus Mars Jupiter Saturn Uranus Neptune
    language: French Spanish German Italian Greek Polish Swedish Turkish
    piece of clothing: shirt coat skirt jacket scarf sock jumper
"""
# Nouns of CATEGORIES that take no article.
MASS = [
    "spinach",
    "iron",
    "copper",
    "gold",
    "silver",
    "tin",
    "lead",
    "zinc",
    "aluminium",
    "football",
    "tennis",
    "hockey",
    "golf",
    "rugby",
    "volleyball",
    "basketball",
]
CAPITALS = """
    Europe: France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Belgium Brussels,
    Poland Warsaw, Hungary Budapest, Greece Athens, Sweden Stockholm, Norway Oslo, Denmark Copenhagen,
    Finland Helsinki, Iceland Reykjavik, Ireland Dublin, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade,
    Croatia Zagreb, Ukraine Kyiv, Estonia Tallinn, Latvia Riga, Lithuania Vilnius, Slovakia Bratislava,
    Slovenia Ljubljana, Albania Tirana, Malta Valletta
    Asia: Japan Tokyo, China Beijing, India New Delhi, Nepal Kathmandu, Thailand Bangkok, Vietnam Hanoi,
    Mongolia Ulaanbaatar, Iran Tehran, Iraq Baghdad, Syria Damascus, Lebanon Beirut, Jordan Amman, Qatar Doha,
    Oman Muscat, Pakistan Islamabad, Bangladesh Dhaka, Afghanistan Kabul, Cambodia Phnom Penh, Laos Vientiane,
    Bhutan Thimphu
    Africa: Kenya Nairobi, Ghana Accra, Nigeria Abuja, Ethiopia Addis Ababa, Uganda Kampala, Senegal Dakar,
    Morocco Rabat, Tunisia Tunis, Algeria Algiers, Libya Tripoli, Sudan Khartoum, Angola Luanda, Zambia Lusaka,
    Zimbabwe Harare, Namibia Windhoek, Mali Bamako, Rwanda Kigali, Somalia Mogadishu, Mozambique Maputo
    North America: Canada Ottawa, Mexico Mexico City, Cuba Havana, Jamaica Kingston
    South America: Brazil Brasilia, Argentina Buenos Aires, Chile Santiago, Peru Lima, Colombia Bogota, Ecuador Quito,
    Uruguay Montevideo, Venezuela Caracas
"""
YOUNG = """
    cat kitten, dog puppy, cow calf, horse foal, sheep lamb, pig piglet, goat kid, hen chick, duck duckling,
    goose gosling, lion cub, bear cub, deer fawn, kangaroo joey, swan cygnet, frog tadpole, owl owlet, eagle eaglet,
    fox cub, wolf cub, tiger cub, seal pup, elephant calf, whale calf, giraffe calf, zebra foal, donkey foal,
    leopard cub
"""
COLOURS = """
    yellow: a lemon, a ripe banana, a sunflower, a canary, an egg yolk, a daffodil, butter
    red: blood, a ripe tomato, a ripe strawberry, a fire engine, a ladybird, a ruby
    green: fresh grass, a cucumber, spinach, an emerald, a pea, a lime, broccoli
    white: snow, milk, salt, cotton, chalk, a polar bear, a swan, flour
    black: coal, a raven, tar, soot, a panther, ebony, a crow
    orange: a carrot, a pumpkin, a tangerine
    brown: chocolate, coffee, soil, a chestnut, cinnamon, a grizzly bear
    pink: a flamingo, a piglet
    grey: an elephant, a storm cloud, ash, a dolphin, a rhinoceros
    blue: a clear sky, a sapphire, a cornflower
    purple: an aubergine, lavender
"""
LIST_WORDS = """
    apple bird boat book bread car cat chair cloud coat cow cup dog door duck egg fish flower garden glass goat hat
    horse house key lamp lion milk moon mouse plate rain ring river road ship shoe snow song star stone table train
    tree
"""
UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = [*UNITS, *(f"{ten}-{unit}" for ten in TENS for unit in UNITS[:10]), "one hundred"]
NUMBERS = [number.removesuffix("-zero") for number in NUMBERS]
LETTERS = [f"the letter {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

Fact = tuple[str, str]  # a subject x and the answer y

# Frames for a topic t, such as "the capital of France", and its answer y. A capital letter marks a capitalised value.
SENTENCES = (
    "{T} is {y}.",
    "We all know that {t} is {y}.",
    "Asked about {t}, the teacher said {y}.",
    "The question was {t}, and the answer was {y}.",
    "Ask about {t}, and the answer will be {y}.",
)
NOTES = ("{T}:\n{y}", "{Label}\n{x}\n{y}", "{Label} for {x}:\n{y}")


@dataclass(frozen=True)
class Kind:
    """One kind of fact, with the texts that state it and the instructions that ask for it.

    Attributes:
        label: Name of the kind, also the heading of its notes.
        facts: All facts of the kind, or a function that draws one.
        weight: Share of the pretraining text.
        topics: Noun phrases with a place for x whose answer is y, used in `SENTENCES` and `NOTES`.
        sentences: Sentences with places for x and y that fit this kind only.
        questions: Instructions with a place for x, which need no input.
        tasks: Instructions whose input is x.
    """

    label: str
    facts: list[Fact] | Callable[[random.Random], Fact]
    weight: float
    topics: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    tasks: tuple[str, ...] = ()

    def draw(self, rng: random.Random) -> Fact:
        """Draws one fact."""
        return self.facts(rng) if callable(self.facts) else rng.choice(self.facts)


def split_pairs(text: str) -> list[Fact]:
    """Reads "x y, x y, ..."; everything after the first word of a pair is its y."""
    pairs = " ".join(text.split()).split(", ")
    return [(x, y) for x, y in (pair.split(maxsplit=1) for pair in pairs)]


def split_groups(text: str, separator: str) -> list[Fact]:
    """Reads lines "y: x, x, ..." into pairs (x, y); a line without a name continues the group above."""
    facts: list[Fact] = []
    name = ""
    for line in text.strip().splitlines():
        *head, items = line.split(": ")
        name = head[0].strip() if head else name
        facts += [(item.strip(), name) for item in items.split(separator) if item.strip()]
    return facts


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun, unless it is a name or takes none."""
    if noun[0].isupper() or noun in MASS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def successors() -> list[Fact]:
    """Pairs each number, letter, day and month with the one that follows; the days and months go round."""
    return [
        *pairwise(NUMBERS),
        *pairwise(LETTERS),
        *pairwise([*DAYS, DAYS[0]]),
        *pairwise([*MONTHS, MONTHS[0]]),
    ]


def list_task(answer: Callable[[list[str]], str]) -> Callable[[random.Random], Fact]:
    """Makes a function that draws a list of two to six words and applies `answer` to it."""

    def draw(rng: random.Random) -> Fact:
        words = rng.sample(LIST_WORDS.split(), rng.randint(2, 6))
        return ", ".join(words), answer(words)

    return draw


def build_kinds() -> list[Kind]:
    """Lists every kind of fact and task."""
    opposites = split_pairs(OPPOSITES)
    countries = [(continent, pair) for pair, continent in split_groups(CAPITALS, ",")]
    return [
        Kind(
            "Opposite",
            opposites + [(y, x) for x, y in opposites],
            1.5,
            ("the opposite of {x}", "the word that means the opposite of {x}"),
            ("If it is not {x}, it is {y}.", "To turn {x} around, say {y}."),
            (
                "What is the opposite of {x}?",
                "Give the opposite of the word {x}.",
                "Which word means the opposite of {x}?",
            ),
            ("Write the opposite of this word.", "Which word is the opposite of this one?"),
        ),
        Kind(
            "Plural",
            split_pairs(PLURALS),
            1,
            ("the plural of {x}", "the plural form of the noun {x}"),
            ("There was one {x}, and then there were many {y}.", "One {x}, two {y}."),
            ("What is the plural of {x}?", "Give the plural form of {x}.", "How do you write {x} in the plural?"),
            ("Write the plural of this noun.", "Put this word into the plural."),
        ),
        Kind(
            "Past tense",
            split_pairs(PAST_TENSES),
            1.3,
            ("the past tense of {x}", "the past tense of the verb {x}"),
            ("Today they {x}, and yesterday they {y}.", "We {x} now as we {y} last week."),
            (
                "What is the past tense of {x}?",
                "Give the past tense of the verb {x}.",
                "Put the verb {x} into the past tense.",
            ),
            ("Write the past tense of this verb.", "Put this verb into the past tense."),
        ),
        Kind(
            "Category",
            [(with_article(x), with_article(y)) for x, y in split_groups(CATEGORIES, " ")],
            1.5,
            ("the category of {x}",),
            ("Everyone knows that {x} is {y}.", "They said what kind of thing {x} is: it is {y}."),
            ("What kind of thing is {x}?", "What is {x}?", "Say what kind of thing {x} is."),
            ("Say what kind of thing this is.", "Which kind of thing is this?"),
        ),
        Kind(
            "Capital",
            split_pairs(", ".join(pair for _, pair in countries)),
            1,
            ("the capital of {x}", "the capital city of {x}"),
            ("They went to {x} and stayed in the capital, {y}.", "In {x} the capital is {y}."),
            ("What is the capital of {x}?", "Name the capital city of {x}.", "Which city is the capital of {x}?"),
            ("Name the capital of this country.", "What is the capital city of this country?"),
        ),
        Kind(
            "Continent",
            [(pair.split()[0], continent) for continent, pair in countries],
            0.7,
            ("the continent of {x}", "the continent where {x} lies"),
            ("They went to {x}, which lies in {y}.", "On the map {x} is in {y}."),
            ("Which continent is {x} in?", "Name the continent where {x} lies.", "On which continent does {x} lie?"),
            ("Name the continent of this country.", "On which continent does this country lie?"),
        ),
        Kind(
            "Young animal",
            [(x, with_article(y)) for x, y in split_pairs(YOUNG)],
            0.5,
            ("the name for a baby {x}", "what people call a baby {x}"),
            ("A baby {x} is called {y}.", "While the {x} is still young, it is {y}."),
            ("What is a baby {x} called?", "What do people call a baby {x}?", "Give the name for a baby {x}."),
            ("What is the baby of this animal called?", "Name the young of this animal."),
        ),
        Kind(
            "Colour",
            split_groups(COLOURS, ","),
            0.7,
            ("the colour of {x}", "the usual colour of {x}"),
            ("The painter gave {x} its colour, {y}.", "They saw that {x} is {y} in colour."),
            ("What colour is {x}?", "Name the usual colour of {x}.", "What is the colour of {x}?"),
            ("What colour is this usually?", "Name the colour of this thing."),
        ),
        Kind(
            "Next",
            successors(),
            2,
            ("what comes right after {x}", "what follows {x}"),
            ("After {x} comes {y}.", "First we say {x}, next we say {y}."),
            ("What comes right after {x}?", "Say what follows {x}.", "What comes next after {x}?"),
            ("What comes right after this?", "Say what comes next."),
        ),
        Kind(
            "Previous",
            [(y, x) for x, y in successors()],
            2,
            ("what comes right before {x}", "what precedes {x}"),
            ("Before {x} comes {y}.", "Counting back from {x}, we say {y}."),
            ("What comes right before {x}?", "Say what precedes {x}.", "What comes just before {x}?"),
            ("What comes right before this?", "Say what comes just before this."),
        ),
        Kind(
            "Sum",
            [(f"{NUMBERS[a]} plus {NUMBERS[b]}", NUMBERS[a + b]) for a in range(1, 11) for b in range(1, 11)],
            1.5,
            ("the sum {x}", "what {x} makes"),
            ("They added and found that {x} is {y}.", "Anyone can see that {x} equals {y}."),
            ("What is {x}?", "How much is {x}?", "Work out {x}."),
            ("Work out this sum.", "What does this make?"),
        ),
        Kind(
            "Last word",
            list_task(lambda words: words[-1]),
            1,
            ("the last word in the list {x}", "the word that ends the list {x}"),
            ("The list {x} ends with {y}.",),
            ("What is the last word in the list {x}?", "Name the word that ends the list {x}."),
            ("Write the last word in this list.", "Which word ends this list?"),
        ),
        Kind(
            "Number of words",
            list_task(lambda words: NUMBERS[len(words)]),
            1,
            ("the number of words in the list {x}", "the count of the words in the list {x}"),
            ("They asked how many words are in the list {x} and counted {y}.",),
            ("How many words are in the list {x}?", "Count the words in the list {x}."),
            ("How many words are in this list?", "Count the words in this list."),
        ),
    ]


def capitalise(text: str) -> str:
    """Makes the first letter a capital and leaves the others as they are."""
    return text[0].upper() + text[1:]


def write_documents(kinds: list[Kind]) -> Iterator[str]:
    """Yields the pretraining corpus, endlessly: documents of several facts, either as sentences or as notes."""
    rng = random.Random(SEED)
    weights = [kind.weight for kind in kinds]
    while True:
        notes = rng.random() < 0.5
        texts = []
        for kind in rng.choices(kinds, weights, k=rng.randint(3, 6)):
            x, y = kind.draw(rng)
            topic = rng.choice(kind.topics).format(x=x)
            frame = rng.choice(NOTES if notes else SENTENCES + kind.sentences)
            texts.append(frame.format(t=topic, T=capitalise(topic), x=x, y=y, Label=kind.label))
        yield ("\n\n" if notes else " ").join(texts)


def write_rows(kinds: list[Kind]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Writes the instruction rows.

    The facts of a kind are divided first, so that the test rows ask only for facts that no training row asks for. A
    fact and its converse (hot and cold, cold and hot) stay on the same side.

    Args:
        kinds: The kinds of task.

    Returns:
        The training rows and the test rows, each in random order.
    """
    rng = random.Random(SEED + 1)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for kind in kinds:
        facts = kind.facts if isinstance(kind.facts, list) else [kind.draw(rng) for _ in range(TRAIN_ROWS + TEST_ROWS)]
        facts = list(dict.fromkeys(facts))
        held_out = {frozenset(fact) for fact in rng.sample(facts, min(TEST_ROWS, len(facts) // 5))}
        rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
        for x, y in facts:
            prompts = [(question.format(x=x), "") for question in kind.questions] + [(task, x) for task in kind.tasks]
            is_test = frozenset((x, y)) in held_out
            for instruction, given in [rng.choice(prompts)] if is_test else prompts:
                rows[is_test].append({"instruction": instruction, "input": given, "output": y})
        train += rng.sample(rows[False], min(TRAIN_ROWS, len(rows[False])))
        test += rng.sample(rows[True], min(TEST_ROWS, len(rows[True])))
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose padding token is not its end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], steps: int) -> LlamaForCausalLM:
    """Pretrains the base model on a stream of documents, each ended by the end-of-text token.

    Args:
        tokenizer: The model's tokenizer.
        documents: The corpus.
        steps: Number of optimizer steps.

    Returns:
        The trained model.
    """
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    tokens: list[int] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        while len(tokens) < BATCH * WINDOW:
            tokens += tokenizer(next(documents) + EOS)["input_ids"]
        batch, tokens = torch.tensor(tokens[: BATCH * WINDOW]).view(BATCH, WINDOW), tokens[BATCH * WINDOW :]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model


def main() -> None:
    """Writes train.jsonl, test.jsonl and base/."""
    parser = argparse.ArgumentParser(description="Builds the quickstart's base model and instruction rows.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of pretraining steps")
    arguments = parser.parse_args()

    kinds = build_kinds()
    train, test = write_rows(kinds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(train)} training rows, {len(test)} test rows", flush=True)

    sample = islice(write_documents(kinds), 20_000)
    instructions = [f"{row['instruction']}\n{row['input']}" for row in train]
    tokenizer = train_tokenizer([*sample, *instructions, *[ALPACA] * 1000])
    model = pretrain(tokenizer, write_documents(kinds), arguments.steps)
    tokenizer.save_pretrained(arguments.output / "base")
    model.save_pretrained(arguments.output / "base")


if __name__ == "__main__":
    main()
