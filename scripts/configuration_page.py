"""Prints docs/configuration.md, made from the declared settings of the commands."""

from collections.abc import Iterator, Sequence

from amusd.cli.service_settings import SETTINGS
from amusd.cli.up_command import UP
from amusd.settings import Setting, settings_in

_INTRODUCTION = """\
# Configuration

Made by `scripts/generate-docs` from the declarations in the sources. Do not edit it by hand.

Each setting of a service is a flag and an environment variable. A flag wins over a variable, and
an empty variable counts as unset. A wrong value ends the command with exit code 2 and one line
that names the flag and the variable.
"""

_TITLES = {
    "orchestrator": "Orchestrator",
    "draft": "Draft service",
    "verify": "Verify service",
    "gateway": "Gateway",
}

_SERVICES = {
    "orchestrator": "`amusd serve orchestrator` runs the service that clients call.",
    "draft": "`amusd serve draft` runs a small model that proposes tokens.",
    "verify": "`amusd serve verify` runs the model that decides the output.",
    "gateway": "`amusd serve gateway` runs the OpenAI-compatible HTTP API of an orchestrator.",
}

_UP = """\
`amusd up` runs all services on this machine until Ctrl-C. It passes these settings on to
them. Each service takes the others from its own environment variables."""


def page() -> str:
    """Return the page."""
    sections = [_INTRODUCTION]
    for service, settings in SETTINGS.items():
        sections.append(_section(_TITLES[service], _SERVICES[service], settings))
    sections.append(_section("All services at once", _UP, settings_in(UP)))
    return "\n".join(sections)


def _section(title: str, text: str, settings: Sequence[Setting]) -> str:
    head = ("| flag | variable | default | meaning |", "|---|---|---|---|")
    rows = [f"| {' | '.join(_cells(one))} |" for one in settings]
    return "\n".join((f"## {title}", "", text, "", *head, *rows, ""))


def _cells(setting: Setting) -> Iterator[str]:
    yield ", ".join(f"`{flag}`" for flag in (setting.flag, setting.off_flag) if flag)
    yield f"`{setting.variable}`" if setting.variable else "–"
    yield _default(setting)
    meaning = setting.declaration.help
    if setting.choices and setting.kind is not bool:
        meaning += f" One of {', '.join(f'`{one}`' for one in setting.choices)}."
    if setting.declaration.value_range:
        meaning += f" Range: {setting.declaration.value_range}."
    yield meaning.replace("|", "\\|")


def _default(setting: Setting) -> str:
    text = setting.default_text
    if setting.kind is bool or not text:
        return text or "empty"
    is_counted = setting.kind in (int, float) and setting.default
    return f"`{text}` {setting.unit}".rstrip() if is_counted else f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
