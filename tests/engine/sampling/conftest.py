"""A compiler of constraints, shared because the process beside it takes a second to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from amusd.engine.sampling.constraints import ConstraintCompiler
from tests.engine.sampling.constraint_tokens import TokenizerFolder


@pytest.fixture(scope="package")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFolder:
    return TokenizerFolder.save(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="package")
def compiler(tokens: TokenizerFolder) -> Iterator[ConstraintCompiler]:
    made = ConstraintCompiler(str(tokens.folder), tokens.size, tokens.ends)
    yield made
    made.close()
