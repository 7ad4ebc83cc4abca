"""Hosts and addresses in every spelling, and what is said of those that are none."""

import pytest

from amusd.fleet.endpoint import Endpoint, dialled, is_wildcard, parse_endpoint, parse_host
from amusd.protocol.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("localhost:50050", "localhost", 50050, "localhost:50050"),
        (" amusd-verify.amusd.svc:1 ", "amusd-verify.amusd.svc", 1, "amusd-verify.amusd.svc:1"),
        ("10.0.0.7:65535", "10.0.0.7", 65535, "10.0.0.7:65535"),
        ("[::1]:3", "::1", 3, "[::1]:3"),
        ("[0:0:0:0:0:0:0:1]:3", "::1", 3, "[::1]:3"),
        ("[::]:3", "::", 3, "[::]:3"),
        ("[::ffff:10.0.0.7]:3", "::ffff:10.0.0.7", 3, ""),
        ("[fe80::1%eth0]:3", "fe80::1%eth0", 3, "[fe80::1%eth0]:3"),
        ("[fe80::1%25eth0]:3", "fe80::1%eth0", 3, "[fe80::1%eth0]:3"),
        ("ipv6:[::1]:3", "::1", 3, "[::1]:3"),
        ("ipv6:%5B::1%5D:3", "::1", 3, "[::1]:3"),
        ("ipv6:[fe80::1%25eth0]:3", "fe80::1%eth0", 3, "[fe80::1%eth0]:3"),
        ("ipv4:10.0.0.7:3", "10.0.0.7", 3, "10.0.0.7:3"),
        ("dns:///pool:3", "pool", 3, "pool:3"),
        ("dns:pool:3", "pool", 3, "pool:3"),
        ("dns:3", "dns", 3, "dns:3"),
    ],
)
def test_an_address_is_read_in_every_spelling(
    text: str, host: str, port: int, written: str
) -> None:
    found = parse_endpoint(text)
    if written:
        assert found == Endpoint(host, port)
        assert str(found) == written
    assert parse_endpoint(str(found)) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no port"),
        ("localhost", "no port"),
        ("10.0.0.7", "no port"),
        ("[::1]", "no port"),
        ("[::1", "not an address"),
        ("::1", "without brackets"),
        ("::1:50050", "without brackets"),
        ("fe80::1%eth0", "without brackets"),
        ("ipv6:::1:50050", "without brackets"),
        ("localhost:", "no port from 1"),
        ("localhost:0", "no port from 1"),
        ("localhost:65536", "no port from 1"),
        ("localhost:-1", "no port from 1"),
        ("localhost:http", "no port from 1"),
        ("localhost:²", "no port from 1"),
        (":50050", "not an address"),
        ("[]:50050", "not an address"),
        ("[10.0.0.7]:50050", "not an address"),
        ("[pool]:50050", "not an address"),
        ("a b:50050", "not an address"),
        ("user@pool:50050", "not an address"),
        ("pool/path:50050", "not an address"),
        ("/tmp/socket", "no port"),
        ("http://localhost:50050", "without http://"),
        ("HTTPS://localhost", "without HTTPS://"),
        ("grpc://localhost:50050", "without grpc://"),
        ("dns://8.8.8.8/pool:50050", "without dns://"),
    ],
)
def test_what_is_no_address_says_what_is_expected(text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match="write host:port") as caught:
        parse_endpoint(text)
    assert words in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("::", "::"),
        ("[::]", "::"),
        ("0:0:0:0:0:0:0:0", "::"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("[fe80::1%25eth0]", "fe80::1%eth0"),
        ("ipv6:[::1]", "::1"),
    ],
)
def test_a_host_to_listen_on_is_read_with_and_without_brackets(text: str, host: str) -> None:
    assert parse_host(text) == host
    assert parse_host(parse_host(text)) == host


@pytest.mark.parametrize("text", ["", "*", "a b", "[::1", "http://localhost", "[]", "[10.0.0.7]"])
def test_what_is_no_host_says_what_is_expected(text: str) -> None:
    with pytest.raises(InvalidInputError, match="write a name or an IP address"):
        parse_host(text)


@pytest.mark.parametrize("text", ["localhost:0", "[::]:0", "0.0.0.0:50050"])
def test_a_host_with_a_port_names_the_flag_of_the_port(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--port"):
        parse_host(text)


def test_a_wildcard_is_dialled_on_this_machine() -> None:
    assert is_wildcard("::")
    assert is_wildcard("0.0.0.0")
    assert dialled(Endpoint("::", 3)) == dialled(Endpoint("0.0.0.0", 3)) == Endpoint("127.0.0.1", 3)
    assert dialled(Endpoint("::1", 3)) == Endpoint("::1", 3)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::", True),
        ("10.0.0.7", False), ("pool", False), ("fe80::1%eth0", False),
    ],
)  # fmt: skip
def test_loopback_is_known(host: str, is_loopback: bool) -> None:
    assert Endpoint(host, 3).is_loopback is is_loopback
