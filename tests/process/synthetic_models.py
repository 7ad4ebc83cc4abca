"""The output of a synthetic verify model, computed in the test."""

from amusd.engine.synthetic import SyntheticModel


def expected_output(model: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Return the ``num_tokens`` tokens that ``model`` writes after ``prompt``."""
    verify = SyntheticModel.parse(model)
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(verify.next_token(tokens))
    return tokens[len(prompt) :]
