"""Writes training prompts for the embedded draft, and packs its trained weights as an asset.

No evaluation set is read here.

    python scripts/embedded_draft.py prompts PROMPTS.jsonl
    amusd distill --verify smollm2 --prompts PROMPTS.jsonl --output FOLDER ...
    python scripts/embedded_draft.py asset FOLDER

The prompts are questions about many topics, arithmetic problems and programming tasks, all made
from the lists below. Others are beginnings of programs, and function heads with docstrings from
Python's standard library.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.numpy import load_file

from amusd.cli import reporting_errors
from amusd.pair.checkpoint import HEAD_IDS_NAME
from amusd.pair.draft_model import ASSET_PATH, save_asset
from amusd.protocol.errors import InvalidInputError

app = typer.Typer(add_completion=False, no_args_is_help=True)

_FIXED = ("model.embed_tokens.weight", "lm_head.weight")  # the verify model's weights
_TOPICS = """
photosynthesis; the French Revolution; black holes; inflation; the water cycle; machine learning;
climate change; the Roman Empire; vaccines; supply and demand; the immune system; plate
tectonics; quantum computers; renewable energy; the Cold War; DNA replication; gravity; the
printing press; artificial intelligence; the stock market; antibiotics; electric cars; the human
heart; volcanoes; the Silk Road; probability; the Renaissance; solar panels; coral reefs; sleep;
meditation; the Internet; cybersecurity; democracy; the Great Depression; evolution; nuclear
power; recycling; urban planning; remote work; time management; public speaking; healthy eating;
strength training; home gardening; coffee; chess; jazz music; oil painting; photography; travel
in Japan; learning Spanish; raising a puppy; personal budgets; job interviews; team conflicts;
customer complaints; a small bakery; a bookshop; a lost cat; a lighthouse keeper; a time
traveller; a robot that learns to cook; a haunted library; two old friends; a long train ride;
the first day at school; a rainy afternoon; an ancient map; a broken clock; a mountain village; a
space station; the deep sea; winter; autumn leaves; the ocean; friendship; courage; loneliness;
hope; the history of bread; the invention of the telephone; World War II; the Industrial
Revolution; the theory of relativity; ecosystems; genetics; the periodic table; acids and bases;
magnetism; thermodynamics; the speed of light; statistics; calculus; geometry; ethics; stoicism;
Shakespeare; modern art; film noir; classical music; the Olympic Games; football; marathon
running; yoga; stress; anxiety; headaches; diabetes; blood pressure; pollution; deforestation;
bees; elephants; whales; dinosaurs; the Moon; Mars; telescopes; satellites; weather forecasts;
earthquakes; rivers; deserts; the Amazon rainforest; Antarctica; New York City; Paris; Tokyo;
Hawaii; Italian food; sushi; chocolate; wine; tea; bicycles; airplanes; bridges; skyscrapers;
databases; operating systems; Python; JavaScript; web design; mobile apps; blockchain; cloud
computing; online privacy; social media; video games; marketing; startups; leadership;
negotiation; taxes; insurance; mortgages; retirement; contracts; copyright; human rights;
migration; education; kindergarten; universities; homework; libraries; museums
"""
_QUESTIONS = """
What is {t}?
Explain {t} to a ten year old.
Explain {t} in simple terms.
What are the main causes of {t}?
Write a short story about {t}.
Write a poem about {t}.
Give me five tips about {t}.
Write a blog post about {t}.
What are the advantages and disadvantages of {t}?
Summarize what is known about {t} in one paragraph.
How does {t} affect our daily lives?
Compare {t} and {u}.
What is the relationship between {t} and {u}?
Write an email to my manager about {t}.
Write a formal letter to a customer about {t}.
Describe {t} in vivid detail.
Write a dialogue between two people about {t}.
Make a list of ten facts about {t}.
Pretend you are an expert on {t}. What would you tell a beginner?
You are a journalist. Ask three questions about {t}.
Imagine you are a character in a novel about {t}. Introduce yourself.
Write an introduction for an essay about {t}.
Write a persuasive speech about {t}.
How can I learn more about {t}?
What are some common misconceptions about {t}?
Create an outline for a presentation about {t}.
Write a product review that mentions {t}.
Describe the history of {t}.
Who are the most important people in the history of {t}?
What might {t} look like in fifty years?
Write three headlines about {t}.
Give an example of {t} and explain it step by step.
Suggest a plan for a week about {t}.
Why is {t} important?
Draft a social media post about {t}.
What would happen without {t}?
Write a limerick about {t}.
Explain the difference between {t} and {u}.
Write a movie plot that involves {t} and {u}.
Act as a teacher and give me a quiz about {t}.
Evaluate these opinions about {t} and rate them from 1 to 5.
Extract the main ideas: {t} has changed a lot. Many people now think about {u}, too.
Translate to French: I like {t}.
Rewrite more clearly: {t} is a thing which many people, and so do I, find interesting.
Is {t} good or bad? Give your reasons.
What questions should I ask about {t}?
Write a paragraph about {t} and {u}, without using the word "very".
"""
_SUMS = """
A shop sells {a} apples at {b} dollars each. How much money does it make?
If a train travels {a} miles in {b} hours, what is its average speed?
What is {a} plus {b}?
Solve for x: {b}x + {c} = {a}
Tom has {a} marbles and gives {b} to each of his {c} friends. How many are left?
A rectangle is {a} cm long and {b} cm wide. What is its area?
What is {b} percent of {a}?
The sum of two numbers is {a} and their difference is {b}. Find the numbers.
A tank holds {a} liters and loses {b} liters an hour. When is it empty?
Anna is {b} years older than Ben. In {c} years the sum of their ages is {a}. How old is Ben?
How many ways are there to choose {c} books out of {b}?
A die is rolled {c} times. What is the probability of at least one six?
Write the number {a} in binary.
A worker earns {b} dollars an hour and works {c} hours a day. What does he earn in {d} days?
If {c} machines make {a} parts in {b} minutes, how long do {d} machines take?
Find the next number in the sequence: {b}, {c}, {d}, {a}.
Which is larger, {a} or {b} times {c}? Explain.
"""
_TASKS = r"""
Write a Python function that {verb} {thing}.
Write a function in Python that {verb} {thing} and explain how it works.
Complete this Python function, which {verb} {thing}:\n\ndef solve(data):\n
Write a Python class that {verb} {thing}.
Implement a JavaScript function that {verb} {thing}.
Here is my code. It {verb} {thing}, but it is slow. How can I make it faster?
Show me a unit test for a Python function that {verb} {thing}.
Explain step by step an algorithm that {verb} {thing}.
"""
_VERBS = """
counts; returns; removes; replaces; sorts; groups; merges; reverses; sums; prints; finds the
largest of; finds the smallest of; filters; splits; averages; compares; validates; parses;
formats; shuffles; caches; searches; encodes; decodes; rotates; deduplicates; normalizes; checks;
joins; converts; ranks
"""
_THINGS = """
the words in a sentence; the even numbers in a list; the digits of an integer; two sorted lists;
the keys of a dictionary; the lines of a text file; a matrix; a linked list; a binary tree; a
stack of plates; the rows of a CSV file; dates; email addresses; bank transactions; prime
numbers; Roman numerals; temperatures; user names; a nested list; a queue of customers; a grid of
cells; file names; a deck of cards; hexadecimal strings; student grades; the vowels of a string;
intervals on a line; points on a plane; a list of tuples; a polynomial; log lines; shopping
carts; phone numbers; JSON records; a graph's edges; Fibonacci numbers; a chess board; passwords;
URLs; time zones; the columns of a table; a set of ids
"""
_PROGRAM_STARTS = (
    "def ",
    "from typing import List\n\n\ndef ",
    "import math\n\n\ndef ",
    "class ",
    "from typing import List, Tuple\n\n\ndef ",
    "\n\ndef ",
    "import re\n\n\ndef ",
    "import ",
    "from typing import Optional\n\n\ndef ",
    "from typing import Dict, List\n\n\ndef ",
    '"""',
    "# ",
    "from collections import Counter\n\n\ndef ",
    "def is_",
    "def get_",
    "def find_",
    "def count_",
    "def remove_",
    "def sum_",
    "def sort_",
    "def max_",
    "def check_",
    "def make_",
)


def _lines(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


def _items(text: str) -> list[str]:
    return [item.strip() for item in " ".join(text.split()).split(";")]


def questions(rng: random.Random) -> Iterator[str]:
    """Yield endless user turns: questions about many topics, and arithmetic problems."""
    topics, templates, sums = _items(_TOPICS), _lines(_QUESTIONS), _lines(_SUMS)
    while True:
        if rng.random() < 0.15:
            a, b = rng.randint(20, 900), rng.randint(2, 60)
            c, d = rng.randint(2, 12), rng.randint(3, 30)
            yield rng.choice(sums).format(a=a, b=b, c=c, d=d)
        else:
            topic, other = rng.sample(topics, 2)
            yield rng.choice(templates).format(t=topic, u=other)


def tasks(rng: random.Random) -> Iterator[str]:
    """Yield endless user turns that ask for programs."""
    templates, verbs, things = _lines(_TASKS), _items(_VERBS), _items(_THINGS)
    while True:
        yield rng.choice(templates).format(verb=rng.choice(verbs), thing=rng.choice(things))


def library_heads(rng: random.Random) -> Iterator[str]:
    """Yield endless function heads with docstrings from the standard library."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    while True:
        module = rng.choice(modules)
        heads = list(_function_heads(module.read_text(encoding="utf-8", errors="ignore")))
        yield from rng.sample(heads, min(len(heads), 4))


def _function_heads(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            text = "\n".join("    " + line if line else "" for line in doc[:400].splitlines())
            yield f'def {node.name}({ast.unparse(node.args)}):\n    """{text.strip()}\n    """\n'


def program_heads(rng: random.Random) -> Iterator[str]:
    """Yield endless beginnings of programs."""
    verbs = ["is", "get", "find", "count", "remove", "sum", "sort", "max", "check", "make"]
    while True:
        start = rng.choice(_PROGRAM_STARTS)
        yield f"{start}{rng.choice(verbs)}_" if start.endswith("def ") else start


@app.command()
def prompts(output: Path, number: int = 20_000, seed: int = 0) -> None:
    """Write NUMBER prompts: half are questions, the others are about programs."""
    rng = random.Random(seed)
    sources: list[tuple[Iterator[str], bool, int]] = [
        (questions(rng), True, number // 2),
        (tasks(rng), True, number // 5),
        (program_heads(rng), False, number // 5),
        (library_heads(rng), False, number // 10),
    ]
    records: list[dict[str, Any]] = [
        {"turns": [text]} if is_chat else {"prompt": text}
        for source, is_chat, count in sources
        for text in islice(source, count)
    ]
    rng.shuffle(records)
    output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@app.command()
def asset(
    folder: Path, output: Annotated[Path, typer.Option(help="Asset to write.")] = ASSET_PATH
) -> None:
    """Write the trained weights of the draft in FOLDER as a float16 asset."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InvalidInputError(f"{folder} has no model.safetensors: give amusd distill's output")
    tensors = load_file(weights)
    head_ids = tensors.pop(HEAD_IDS_NAME)
    save_asset(output, {k: v for k, v in tensors.items() if k not in _FIXED}, head_ids)


if __name__ == "__main__":
    reporting_errors(app)
