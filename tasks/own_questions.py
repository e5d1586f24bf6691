"""Questions of our own making, so that a first try needs no download: about 500 with choices, of several
kinds, made by the tables and templates below and the same every time.

    python eval.py MODEL --multiple-choice own      # answered without a file
    python -m tasks.own_questions own.jsonl         # written as JSON lines, for other tools

They ask what a small model knows: which number is larger, which verb agrees, opposites, kinds of things,
places, uses, orders, facts, what comes next. They are no benchmark; compare models that answered
the same ones.

No answer can be told without its question. The right choice stands equally often at each place. Where
answers are words, the wrong choices of a question are the right ones of others of its kind; numbers
and verbs are near one another. So neither length nor frequency gives an answer away
(tests/tasks/test_own_questions.py measures guessers by length and alphabet).
"""
import json
import random
from dataclasses import dataclass

from common import parse, run, write_atomic

CHOICES = 4

OPPOSITES = """hot cold, big small, fast slow, up down, left right, day night, happy sad, rich poor, young old,
    hard soft, wet dry, open closed, full empty, light dark, good bad, high low, strong weak, early late,
    thick thin, loud quiet, clean dirty, true false, first last, long short, near far, wide narrow,
    push pull, buy sell, win lose, begin end, love hate, give take, laugh cry, war peace, north south""".split(",")

CATEGORIES = {
    "fish": "salmon trout tuna shark herring",
    "bird": "sparrow eagle owl parrot crow",
    "tree": "oak pine maple willow birch",
    "flower": "rose tulip daisy lily orchid",
    "fruit": "apple banana pear cherry mango",
    "vegetable": "carrot onion cabbage spinach broccoli",
    "metal": "iron copper gold silver lead",
    "insect": "ant bee beetle mosquito butterfly",
    "tool": "hammer saw screwdriver drill wrench",
    "vehicle": "car truck bus train bicycle",
    "color": "red blue yellow green purple",
    "country": "France Japan Brazil Egypt Canada",
    "fabric": "cotton silk wool linen velvet",
    "musical instrument": "violin piano flute trumpet guitar",
    "shape": "circle square triangle rectangle hexagon",
    "part of the body": "arm leg elbow knee shoulder"}

PLACES = {
    "whale": "ocean", "camel": "desert", "monkey": "jungle", "cow": "farm", "polar bear": "Arctic",
    "book": "library", "airplane": "airport", "patient": "hospital", "oven": "kitchen", "bathtub": "bathroom",
    "student": "classroom", "car": "garage", "painting": "museum", "lion": "savanna", "goldfish": "aquarium",
    "prisoner": "jail", "priest": "church", "judge": "courtroom", "soldier": "army", "king": "palace",
    "film": "cinema", "actor": "theater", "chemist": "laboratory", "bee": "hive", "spider": "web",
    "coin": "wallet", "letter": "envelope", "pillow": "bed", "sailor": "ship", "astronaut": "spaceship"}

USES = {
    "hammer": "hit nails", "knife": "cut food", "pen": "write letters", "broom": "sweep the floor",
    "oven": "bake bread", "umbrella": "stay dry in the rain", "key": "open a lock", "clock": "tell the time",
    "lamp": "light a room", "needle": "sew clothes", "phone": "call someone", "camera": "take pictures",
    "towel": "dry your hands", "map": "find the way", "ladder": "climb to the roof", "shovel": "dig a hole",
    "ruler": "measure a length", "bar of soap": "wash your hands", "bed": "sleep at night", "bus": "carry passengers",
    "thermometer": "measure the temperature", "glass": "drink water", "comb": "tidy your hair",
    "refrigerator": "keep food cold", "scale": "weigh an object", "telescope": "look at the stars",
    "fishing rod": "catch fish", "lawn mower": "cut the grass", "helmet": "protect your head",
    "calculator": "add numbers"}

ORDERS = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "number": "one two three four five six seven eight nine ten",
    "letter": "A B C D E F G H I J"}

CAPITALS = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Japan": "Tokyo", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Cuba": "Havana", "Norway": "Oslo", "Poland": "Warsaw",
    "China": "Beijing", "India": "New Delhi", "Sweden": "Stockholm", "Hungary": "Budapest", "Kenya": "Nairobi",
    "Turkey": "Ankara", "Canada": "Ottawa", "Australia": "Canberra", "Iran": "Tehran"}

YOUNG = {"dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "goat": "kid",
         "hen": "chick", "duck": "duckling", "frog": "tadpole", "bear": "cub", "deer": "fawn", "swan": "cygnet"}

JOBS = {
    "teaches children": "teacher", "flies airplanes": "pilot", "bakes bread": "baker", "puts out fires": "firefighter",
    "repairs teeth": "dentist", "grows crops": "farmer", "writes books": "author", "cuts hair": "barber",
    "catches thieves": "police officer", "drives a taxi": "driver", "paints pictures": "painter",
    "plays in films": "actor", "builds houses": "builder", "treats sick animals": "vet",
    "designs buildings": "architect",
    "serves food in a restaurant": "waiter", "mends pipes": "plumber", "takes photographs": "photographer",
    "sails on ships": "sailor", "defends people in court": "lawyer"}

# (noun, plural) of the subject, and of a noun in between that misleads.
SUBJECTS = """key keys, child children, letter letters, picture pictures, friend friends, bird birds,
    student students, house houses, flower flowers, story stories, man men, woman women, door doors,
    teacher teachers, boat boats""".split(",")
ATTRACTORS = """near the window windows, behind the car cars, beside the tree trees, with the hat hats,
    from the village villages""".split(",")
ENDS = "old, very small, well known, not far away, in the garden".split(", ")

# (beginning, continuation): each continuation fits its own beginning only.
STORIES = """
It was raining hard, so Anna opened her|umbrella.
The baby was crying, so its mother sang|a lullaby.
Tom was tired, so he went to|bed early.
The soup tasted bland, so the cook added|a little salt.
The room was dark, so she turned on|the lamp.
The car had no fuel, so they stopped at|a gas station.
He broke his leg, so they took him to|the hospital.
The dog wagged its tail because it was|happy.
She studied hard and passed|the exam.
The glass fell on the floor and|broke.
It was very cold, so he put on|a warm coat.
The sun came out and the snow|melted.
She was thirsty, so she drank|a glass of water.
The phone rang, so he|answered it.
The grass was too long, so he|mowed the lawn.
Her shoes were dirty, so she|cleaned them.
The bread was old and hard, so they fed it to|the ducks.
The bill was wrong, so she spoke to|the waiter.
He forgot his key, so he could not open|the door.
The story was so funny that everybody|laughed.
The film was so sad that she began to|cry.
She wanted to read, so she took a book from|the shelf.
The thief saw the police and|ran away.
His hands were dirty, so he washed them with|soap.
The bus was late, so they waited at|the bus stop.
The ice was thin, so the skater was|careful.
It was his birthday, so they baked|a cake.
The letter was finished, so she put it in|an envelope.
The tooth hurt, so she called|the dentist.
The plant was dry, so he|watered it.
They were lost in the city, so they looked at|a map.
She had a fever, so she took|some medicine.
The music was too loud, so the neighbors|complained.
He saved his money in|a bank account.
The team scored in the last minute and|won the game.
The knife was dull, so the cook|sharpened it.
""".strip().split("\n")


# -- the choices

def row(query, right, wrong, number):
    """A line of the file: {"query", "choices", "gold"}. The place of the right choice goes round with
    `number`. Each choice has its leading space."""
    gold = number % (len(wrong) + 1)
    choices = [f" {choice}" for choice in wrong]
    choices.insert(gold, f" {right}")
    return {"query": query, "choices": choices, "gold": gold}


def rows_of(pairs, random_source):
    """[(query, right answer)], no answer twice -> rows. Each answer is right once, and wrong in
    CHOICES - 1 other rows."""
    pairs = list(pairs)
    random_source.shuffle(pairs)
    answers = [answer for _, answer in pairs]
    rows = []
    for number, (query, right) in enumerate(pairs):
        wrong = [answers[(number + step) % len(answers)] for step in range(1, CHOICES)]
        rows.append(row(query, right, wrong, number))
    return rows


def article(noun):
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


# -- the kinds: each takes a source of random numbers and returns rows

def opposites(random_source):
    pairs = []
    for words in OPPOSITES:
        first, second = words.split()
        pairs.append((f"The opposite of {first} is", second))
        pairs.append((f"The opposite of {second} is", first))
    return rows_of(pairs, random_source)


def categories(random_source):
    rows = []
    members = [words.split() for words in CATEGORIES.values()]
    # One round for each member of a category: in a round every category is right once.
    for chosen in zip(*members):
        queries = [f'The word "{member}" names a kind of' for member in chosen]
        rows += rows_of(zip(queries, CATEGORIES), random_source)
    return rows


def places(random_source):
    pairs = [(f"A good place to find {article(thing)} is the", place) for thing, place in PLACES.items()]
    return rows_of(pairs, random_source)


def uses(random_source):
    pairs = [(f"People use {article(tool)} to", f"{use}.") for tool, use in USES.items()]
    return rows_of(pairs, random_source)


def orders(random_source):
    rows = []
    for name, words in ORDERS.items():
        words = words.split()
        after = [(f"The {name} after {first} is", second) for first, second in zip(words, words[1:])]
        before = [(f"The {name} before {second} is", first) for first, second in zip(words, words[1:])]
        rows += rows_of(after, random_source)
        rows += rows_of(before, random_source)
    return rows


def capitals(random_source):
    return rows_of([(f"The capital of {land} is", city) for land, city in CAPITALS.items()], random_source)


def young(random_source):
    return rows_of([(f"A young {animal} is called a", name) for animal, name in YOUNG.items()], random_source)


def jobs(random_source):
    return rows_of([(f"The person who {task} is the", name) for task, name in JOBS.items()], random_source)


def continuations(random_source):
    return rows_of([story.split("|") for story in STORIES], random_source)


def comparisons(random_source):
    """Half of the questions ask for the smaller number."""
    rows = []
    for number in range(40):
        pair = random_source.sample(range(10, 100), 2)
        query = f"Question: Which number is {{}}, {pair[0]} or {pair[1]}?\nAnswer:"
        if number % 4 < 2:
            rows.append(row(query.format("larger"), max(pair), [min(pair)], number))
        else:
            rows.append(row(query.format("smaller"), min(pair), [max(pair)], number))
    return rows


def sums(random_source):
    """All choices have two digits and are near one another."""
    rows = []
    for number in range(40):
        first = random_source.randint(11, 40)
        second = random_source.randint(11, 40)
        right = first + second
        # The right one is neither always in the middle nor always at an end.
        offset = random_source.randint(0, CHOICES - 1)
        near = [right + 3 * (step - offset) for step in range(CHOICES)]
        near.remove(right)
        rows.append(row(f"3 + 4 = 7\n20 + 15 = 35\n{first} + {second} =", right, near, number))
    return rows


def agreement(random_source):
    """Subject and verb, with a noun of the other number between. Half of the subjects are plural."""
    rows = []
    for number in range(48):
        singular, plural = random_source.choice(SUBJECTS).split()
        place, noun, nouns = random_source.choice(ATTRACTORS).strip().rsplit(" ", 2)
        end = random_source.choice(ENDS)
        choices = [f"is {end}.", f"are {end}."]
        if number % 4 < 2:
            rows.append(row(f"The {singular} {place} {nouns}", choices[0], choices[1:], number))
        else:
            rows.append(row(f"The {plural} {place} {noun}", choices[1], choices[:1], number))
    return rows


KINDS = (opposites, categories, places, uses, orders, capitals, young, jobs, continuations, comparisons, sums,
         agreement)


def rows(seed=0):
    """All questions, mixed: [{"query", "choices", "gold", "kind"}]. The same for the same seed."""
    questions = []
    for kind in KINDS:
        for question in kind(random.Random(f"{kind.__name__} {seed}")):
            questions.append({**question, "kind": kind.__name__})
    random.Random(seed).shuffle(questions)
    return questions


# -- the command

@dataclass(frozen=True)
class OwnQuestions:
    file: str                     # the JSON lines to write


def main(config):
    lines = [json.dumps(question) + "\n" for question in rows()]
    write_atomic(config.file, lambda file: file.write("".join(lines).encode()))
    print(f"{config.file}: {len(lines)} questions; answer them by eval.py MODEL --multiple-choice {config.file}")


if __name__ == "__main__":
    run(lambda: main(parse(OwnQuestions)))
