"""Where the training prompts of the embedded draft come from; no evaluation set is read here.

Four kinds, all of them either written by the verify model, put together from the lists below, or
taken from the source of Python's standard library:

    chat     the verify model writes a user turn, then answers it
    task     "Write a Python function that ...", put together from lists
    program  the verify model writes the head of a program, then goes on with it
    library  head and docstring of a function of the standard library
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

KINDS = ("chat", "program", "chat", "task", "chat", "library", "chat", "program", "task", "chat")

# A user turn starts with one of these; the verify model writes the rest of it.
TURN_STARTS = (
    *[""] * 6,
    *("What", "How", "Why", "Explain", "Write", "Describe", "Can you", "Give me", "Who", "Compare"),
    *(
        "Imagine you",
        "Summarize",
        "Translate",
        "Solve",
        "List",
        "I need",
        "Tell me",
        "If a",
        "Is it",
    ),
    *("A train", "Compose", "Edit", "Create", "Suggest", "Rewrite", "Identify", "Draft", "Where"),
    *("Write an email", "Write a Python function", "Calculate the", "Provide", "Help me", "Which"),
    *("Given the following text,", "What is the difference between", "Discuss", "Analyze"),
)

PROGRAM_STARTS = (
    *("def ", "from typing import List\n\n\ndef ", "import math\n\n\ndef ", "class "),
    *("from typing import List, Tuple\n\n\ndef ", "\n\ndef ", "import re\n\n\ndef ", "import "),
    *("from typing import Optional\n\n\ndef ", "from typing import Dict, List\n\n\ndef "),
    *('"""', "# ", "from collections import Counter\n\n\ndef ", "def is_", "def get_", "def find_"),
    *("def count_", "def remove_", "def sum_", "def sort_", "def max_", "def check_", "def make_"),
)

VERBS = (
    *("counts", "returns", "removes", "replaces", "sorts", "groups", "merges", "reverses", "sums"),
    *("prints", "finds the largest of", "finds the smallest of", "filters", "splits", "averages"),
    *("compares", "validates", "parses", "formats", "shuffles", "caches", "searches", "encodes"),
    *("decodes", "rotates", "deduplicates", "normalizes", "checks", "joins", "converts", "ranks"),
)

THINGS = (
    *("the words in a sentence", "the even numbers in a list", "the digits of an integer"),
    *("two sorted lists", "the keys of a dictionary", "the lines of a text file", "a matrix"),
    *("a linked list", "a binary tree", "a stack of plates", "the rows of a CSV file", "dates"),
    *("email addresses", "bank transactions", "prime numbers", "Roman numerals", "temperatures"),
    *("user names", "a nested list", "a queue of customers", "a grid of cells", "file names"),
    *("a deck of cards", "hexadecimal strings", "student grades", "the vowels of a string"),
    *("intervals on a line", "points on a plane", "a list of tuples", "a polynomial", "log lines"),
    *("shopping carts", "phone numbers", "JSON records", "a graph's edges", "Fibonacci numbers"),
    *("a chess board", "passwords", "URLs", "time zones", "the columns of a table", "a set of ids"),
)

TASKS = (
    "Write a Python function that {verb} {thing}.",
    "Write a function in Python that {verb} {thing} and explain how it works.",
    "Complete this Python function, which {verb} {thing}:\n\ndef solve(data):\n",
    "Write a Python class that {verb} {thing}.",
    "Implement a JavaScript function that {verb} {thing}.",
    "Here is my code. It {verb} {thing}, but it is slow. How can I make it faster?",
    "Show me a unit test for a Python function that {verb} {thing}.",
    "Explain step by step an algorithm that {verb} {thing}.",
)


def task_prompts(rng: random.Random) -> Iterator[str]:
    """Endless user turns that ask for programs."""
    while True:
        yield rng.choice(TASKS).format(verb=rng.choice(VERBS), thing=rng.choice(THINGS))


def library_prompts(rng: random.Random) -> Iterator[str]:
    """Endless function heads with docstrings from the standard library, to be completed."""
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
