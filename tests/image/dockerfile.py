"""Parser of the Dockerfile: its stages and their commands."""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Stage:
    """One stage: its base and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        """Return the arguments of each instruction with ``keyword``."""
        return [rest for found, rest in self.instructions if found == keyword]

    def commands(self) -> list[str]:
        """Return the shell commands of the stage, without the mounts."""
        return [re.sub(r"--mount=\S+\s+", "", command) for command in self.all("RUN")]


def read_stages() -> dict[str, Stage]:
    """Return the stages of the Dockerfile by name, in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for keyword, _, rest in (line.partition(" ") for line in lines if line):
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name, base)
        elif stage is not None:
            stage.instructions.append((keyword, rest))
    return stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return a stage and the stages that it is based on, itself last."""
    if name not in stages:
        return []
    return [*lineage(stages, stages[name].base), stages[name]]


def copy_context(target: Path) -> None:
    """Copy the build context: .dockerignore excludes everything but the paths that it names."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    ignored = shutil.ignore_patterns(
        *(line.removeprefix("**/") for line in lines if line.startswith("**/"))
    )
    for line in lines:
        source = ROOT / line[1:]
        if not line.startswith("!"):
            continue
        if source.is_dir():
            shutil.copytree(source, target / line[1:], ignore=ignored)
        else:
            shutil.copy(source, target / line[1:])
