"""The programs of docs/client.md run unchanged, except for the port."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from amusd.clients.request_options import Options
from amusd.v1 import orchestrator_pb2 as pb
from tests.clients.fake_orchestrator import FakeOrchestrator, chunk, completion, serving

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Answering(FakeOrchestrator):
    """Answers by what a request asks for."""

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        if request.sampling.top_p > 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "top_p is 2: use at most 1")
        is_json = bool(request.sampling.constraint.json_schema)
        for index in range(request.num_completions or 1):
            yield chunk('{"name": "Ada", "age": 36}' if is_json else "Blue", 1, 2, index=index)
            yield completion(index, seed=request.sampling.seed + index)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Answering([])) as found:
        yield found


EXPECTED = [
    "Blue",
    "Blue\nFinishReason.STOP 0 1.5\n",
    "Blue\nBlue\n[1, 2]\n",
    "36\n0 5 Blue\n1 6 Blue\n2 7 Blue\n",
    "BlueBlue\nBlue\n",
    "error: orchestrator at {address}: top_p is 2: use at most 1\n",
]


@pytest.mark.parametrize(("number", "expected"), list(enumerate(EXPECTED)))
def test_a_program_of_the_page_works(
    number: int, expected: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = PROGRAMS[number].replace("localhost:50050", address)
    exec(compile(program, "docs/client.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == expected.format(address=address)


def test_the_page_has_every_program_and_every_option() -> None:
    assert len(PROGRAMS) == len(EXPECTED)
    missing = [name for name in Options.__dataclass_fields__ if f"`{name}`" not in PAGE]
    assert missing == []
