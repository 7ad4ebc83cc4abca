"""Chat templates have Transformers' functions, and stay within bounds of time and size."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from amusd.protocol.errors import InvalidInputError
from orchestrator import chat_template, template_sandbox
from orchestrator.chat_template import ChatTemplates
from orchestrator.template_sandbox import TemplateBoundError, TemplateSandbox

MESSAGES = [{"role": "user", "content": "Hi é"}]


def rendered(source: str, **arguments: object) -> str:
    return ChatTemplates({"default": source}, {}).render(MESSAGES, arguments)


FUNCTIONS = {
    "tojson": ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi é"}]'),
    "tojson, ascii": ("{{ messages[0].content | tojson(ensure_ascii=True) }}", '"Hi \\u00e9"'),
    "tojson, HTML": ("{{ '<&>' | tojson }}", '"<&>"'),
    "tojson, sorted": ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
    "tojson, separators": ("{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}", '{"b":[1,2]}'),
    "tojson, indent": ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
    "tojson, positions": ("{{ {'é': 1} | tojson(true) }}", '{"\\u00e9": 1}'),
    "strftime_now": ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
    "dict": ("{{ dict(a=1).a ~ dict.fromkeys(['b'], 2).b }}", "12"),
    "namespace": ("{% set ns = namespace(self=1) %}{% set ns.x = 2 %}{{ ns.self + ns.x }}", "3"),
    "operators": ("{{ 2 ** 3 * 2 + 1 }}{{ '%s%%' % 5 }}{{ 'a' ~ 1 ~ none }}", "175%a1None"),
    "texts": ("{{ 'a-b'.split('-') | join('+') }}{{ '{:>3}'.format('x') }}", "a+b  x"),
    "undefined": ("{{ nothing }}{{ messages[0].nothing }}|", "|"),
    "loops": (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "01",
    ),
    "a loop that recurs": (
        "{% for i in [[1, []]] recursive %}{{ i[0] }}{{ loop(i[1]) }}{% endfor %}",
        "1",
    ),
    "macros": ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m('b') }}", "<1><b>"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_is_that_of_transformers(case: str) -> None:
    source, expected = FUNCTIONS[case]
    assert rendered(source) == expected


ERRORS = {
    "raise_exception": ("{{ raise_exception('only users,\n please') }}", "only users, please"),
    "undefined to JSON": ("{{ nothing | tojson }}", "Undefined is not JSON serializable"),
    "a type error": ("{{ 1 + 'a' }}", "unsupported operand"),
    "a zero division": ("{{ 1 // 0 }}", "by zero"),
    "a field of undefined": ("{{ nothing.x.y }}", "'nothing' is undefined"),
    "an index error": ("{{ [].pop() }}", "unsafe|empty list"),
    "a private attribute": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a private name in a namespace": (
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "namespace may not hold|__x",
    ),
    "an unknown JSON argument": ("{{ 1 | tojson(default=1) }}", "unexpected keyword"),
    "a wrong date format": ("{{ strftime_now(3) }}", "str"),
    "a value error": ("{{ 'a'.index('b') }}", "substring not found"),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "half of a surrogate pair": ("{{ '\\ud800' }}", "surrogates not allowed"),
    "an unknown encoding": ("{{ 'a'.encode('nope') }}", "unknown encoding"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_any_error_of_a_template_is_an_invalid_input_with_its_words(case: str) -> None:
    source, words = ERRORS[case]
    with pytest.raises(InvalidInputError, match=f"chat template refuses.*({words})") as caught:
        rendered(source)
    assert "\n" not in str(caught.value)


SLOW = {
    "loops without output": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "loops that count": (
        "{% set ns = namespace(n=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}"
    ),
    "macros that call twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a loop that recurs twice": (
        "{% for i in [60] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("case", SLOW)
def test_a_template_ends_in_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(InvalidInputError, match="it takes too long"):
        rendered(SLOW[case])
    assert time.monotonic() - started < 5


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}"
LARGE = {
    "a product": "{{ 'x' * 10000000000 }}",
    "a product of a list": "{{ ([1] * 1000000000) | length }}",
    "a sum": DOUBLING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a concatenation": DOUBLING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a join": DOUBLING + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "a join of a text": DOUBLING + "{% set ns.x = ns.x.join(['a', 'b', 'c']) %}{% endfor %}",
    "a replacement": DOUBLING + "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "a replacement by a filter": DOUBLING
    + "{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "a nested list": DOUBLING + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a nested list as JSON": DOUBLING
    + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "a nested list as text": DOUBLING
    + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a filter": "{{ messages[0].role | center(10000000000) }}",
    "a method": "{{ 'a'.ljust(10000000000) }}",
    "a format": "{{ '{:>9999999999}'.format('x') }}",
    "a format with an argument": "{{ '{:>{n}}'.format('x', n=9999999999) }}",
    "a format with percents": "{{ '%9999999999s' % 'x' }}",
    "a filter that formats": "{{ '%9999999999s' | format('x') }}",
    "JSON with an indent": "{{ [[1]] | tojson(indent=9999999999) }}",
    "an output": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("case", LARGE)
def test_a_template_makes_no_large_text(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1 << 18)
    with pytest.raises(InvalidInputError, match=r"more than|a million|power above"):
        rendered(LARGE[case])


def test_a_constant_that_is_too_large_is_refused_without_being_made() -> None:
    with pytest.raises(InvalidInputError, match="more than"):
        rendered("{{ 'a' | center(10000000000) }}")


def test_the_deadline_of_one_thread_is_not_that_of_another() -> None:
    sandbox = TemplateSandbox()
    with ThreadPoolExecutor(1) as other, sandbox.deadline(-1.0):
        other.submit(sandbox.tick).result(10)
        with pytest.raises(TemplateBoundError, match="too long"):
            sandbox.tick()
    sandbox.tick()
