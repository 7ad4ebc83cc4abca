"""Entries of a pool, and the addresses they stand for."""

import asyncio
from pathlib import Path

import pytest

from amusd.protocol.errors import InvalidInputError, UnavailableError
from orchestrator.addresses import (
    AddressFile,
    Endpoint,
    Entry,
    SystemLookup,
    parse_entries,
    resolve,
)


async def lookup(host: str) -> tuple[str, ...]:
    """Know one name."""
    if host == "drafts":
        return ("10.0.0.1", "10.0.0.2")
    raise OSError("no such name")


async def addresses(entry: Entry) -> list[str]:
    return [str(endpoint) for endpoint in await resolve(entry, lookup)]


def test_a_list_has_hosts_and_files_each_once() -> None:
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
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(InvalidInputError, match="write"):
        parse_entries(f"b:1,{text}")


async def test_a_name_stands_for_all_its_addresses() -> None:
    assert await addresses(Endpoint("drafts", 7)) == ["10.0.0.1:7", "10.0.0.2:7"]


async def test_an_address_is_not_looked_up() -> None:
    assert await addresses(Endpoint("10.0.0.9", 7)) == ["10.0.0.9:7"]
    assert await addresses(Endpoint("::1", 7)) == ["[::1]:7"]


async def test_a_name_that_nobody_knows_is_said() -> None:
    with pytest.raises(UnavailableError, match=r"'nowhere'.*no such name.*check its spelling"):
        await addresses(Endpoint("nowhere", 7))


async def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_text("# replicas\n\n10.0.0.9:7  # the first\ndrafts:8\n")
    found = await addresses(AddressFile(str(path)))
    assert found == ["10.0.0.9:7", "10.0.0.1:8", "10.0.0.2:8"]


@pytest.mark.parametrize("content", [None, "", "# nothing", "no address", "\udc80"])
async def test_a_file_without_addresses_is_said(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "pool"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UnavailableError, match=f"{path}.*write"):
        await addresses(AddressFile(str(path)))


async def test_the_system_knows_this_machine() -> None:
    asked = SystemLookup()
    first, second = await asyncio.gather(asked("localhost"), asked("localhost"))
    assert first == second
    assert set(first) in ({"127.0.0.1"}, {"::1"})


async def test_the_system_says_that_a_name_is_unknown() -> None:
    with pytest.raises(OSError):  # noqa: PT011  # its words are the system's
        await SystemLookup()("nothing.invalid")
