"""Entries of a pool, and the addresses they resolve to."""

import asyncio
from pathlib import Path

import pytest

from amusd.fleet.endpoint import Endpoint
from amusd.protocol.errors import InvalidInputError, UnavailableError
from orchestrator.addresses import (
    AddressFile,
    Entry,
    SystemResolver,
    parse_entries,
    resolve,
)


async def resolver(host: str) -> tuple[str, ...]:
    """Resolve one name only."""
    if host == "drafts":
        return ("10.0.0.1", "10.0.0.2")
    raise OSError("no such name")


async def addresses(entry: Entry) -> list[str]:
    return [str(endpoint) for endpoint in await resolve(entry, resolver)]


def test_duplicate_entries_count_once() -> None:
    assert parse_entries("a:1, b.c:22 ,a:1,[::1]:3,file:///etc/pool,") == (
        Endpoint("a", 1),
        Endpoint("b.c", 22),
        Endpoint("::1", 3),
        AddressFile("/etc/pool"),
    )
    assert parse_entries("") == ()


@pytest.mark.parametrize(
    "text",
    ["a", ":1", "a:", "a:b", "a:0", "a:65536", "a:-1", "::1:3", "http://a:1", "file://pool", "a:²"],
)
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="write"):
        parse_entries(f"b:1,{text}")


async def test_a_name_resolves_to_all_its_addresses() -> None:
    assert await addresses(Endpoint("drafts", 7)) == ["10.0.0.1:7", "10.0.0.2:7"]


async def test_an_ip_address_is_not_resolved() -> None:
    assert await addresses(Endpoint("10.0.0.9", 7)) == ["10.0.0.9:7"]
    assert await addresses(Endpoint("::1", 7)) == ["[::1]:7"]


async def test_an_unknown_name_is_reported() -> None:
    with pytest.raises(UnavailableError, match=r"'nowhere'.*no such name.*check its spelling"):
        await addresses(Endpoint("nowhere", 7))


async def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_text("# replicas\n\n10.0.0.9:7  # the first\ndrafts:8\n")
    found = await addresses(AddressFile(str(path)))
    assert found == ["10.0.0.9:7", "10.0.0.1:8", "10.0.0.2:8"]


@pytest.mark.parametrize("content", [None, "", "# nothing", "no address", "\udc80"])
async def test_a_file_without_valid_addresses_is_reported(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "pool"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UnavailableError, match=f"{path}.*write"):
        await addresses(AddressFile(str(path)))


async def test_the_system_resolves_localhost() -> None:
    system = SystemResolver()
    first, second = await asyncio.gather(system("localhost"), system("localhost"))
    assert first == second
    assert set(first) in ({"127.0.0.1"}, {"::1"})


async def test_an_unknown_name_is_an_os_error() -> None:
    with pytest.raises(OSError):  # noqa: PT011  # the message is the system's
        await SystemResolver()("nothing.invalid")
