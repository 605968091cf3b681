"""Who may use the service."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runtime import Sampler
from runtime.errors import RequestError
from serve import Settings, auth
from serve.__main__ import _parser, is_loopback, settings_of

from .services import client_of, gate_of, until

ALICE = "alice-" + "a" * 20
BOB = "bob-" + "b" * 20
PRIVATE = ("/v1/info", "/v1/samples", "/metrics", "/openapi.json", "/v1/models", "/v2", "/nothing")


@pytest.fixture
def guarded(small: Sampler):
    with client_of([small], Settings(tokens={ALICE: "alice", BOB: "bob"})) as client:
        yield client


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer \xe9"]
)
def test_a_stranger_gets_401(guarded: TestClient, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    got = guarded.get(path, headers=headers)
    assert got.status_code == 401
    assert got.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("token", [ALICE, BOB])
def test_a_token_opens(guarded: TestClient, token: str) -> None:
    headers = {"authorization": f"bearer {token}"}
    assert guarded.get("/v1/info", headers=headers).status_code == 200
    got = guarded.get("/v1/samples", headers=headers)
    assert got.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_need_no_token(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_tokens_are_compared_in_constant_time(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    guarded.get("/v1/info", headers={"authorization": f"Bearer {ALICE}"})
    assert compared == [ALICE.encode(), BOB.encode()]


def test_a_user_is_a_flow(guarded: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    headers = {"authorization": f"Bearer {ALICE}", "prefer": "respond-async"}
    assert guarded.post("/v1/samples", json={}, headers=headers).status_code == 202
    service = guarded.app.state.service  # type: ignore[attr-defined]
    until(lambda: service.runs.live)
    (run,) = service.runs._live
    assert run.ticket.flow == "alice"
    gate_of(small).open()


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "[::2]", "127.0.0.2"])
def test_another_host_is_refused(small: Sampler, host: str) -> None:
    with client_of([small], Settings(hosts=("localhost", "127.0.0.1", "[::1]"))) as client:
        for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
            assert client.get("/v1/info", headers={"host": name}).status_code == 200
        for path in ("/", "/v1/info", "/livez", "/metrics"):
            assert client.get(path, headers={"host": host}).status_code == 421


def test_the_names_of_hosts_are_read_as_the_header_is(small: Sampler) -> None:
    hosts = ("Example.ORG", "2001:DB8::1", "::1")
    with client_of([small], Settings(hosts=hosts)) as client:
        for name in ("example.org:80", "[2001:db8::1]:8000", "[::1]"):
            assert client.get("/livez", headers={"host": name}).status_code == 200
        for name in ("", "2001", "example.com"):
            assert client.get("/livez", headers={"host": name}).status_code == 421
    given = _parser().parse_args(["b", "--host-name", "2001:DB8::1"])
    assert "[2001:db8::1]" in settings_of(given).hosts


@pytest.mark.parametrize("token", ["\u00fc" * 20, "two words of a token"])
def test_a_token_that_no_client_can_send_is_refused(token: str) -> None:
    with pytest.raises(RequestError, match="ASCII characters"):
        Settings(tokens={token: "me"})


def test_a_health_check_needs_no_name(small: Sampler) -> None:
    """A container's health check calls 127.0.0.1, independent of --host-name."""
    with client_of([small], Settings(hosts=("localhost",))) as client:
        headers = {"host": "127.0.0.1:8000"}
        assert client.get("/readyz", headers=headers).text == "ready\n"
        for path in ("/livez", "/metrics", "/v1/info", "/readyz/"):
            assert client.get(path, headers=headers).status_code == 421


def test_another_origin_is_refused(small: Sampler, client: TestClient) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:81", "http://[", ""):
        got = client.post("/v1/samples", json={}, headers={"origin": origin})
        assert got.status_code == 403
    same = {"origin": "http://localhost"}
    assert client.post("/v1/samples", json={}, headers=same).status_code == 200
    with client_of([small], Settings(cors=True)) as other:
        headers = {"origin": "https://friend.example"}
        got = other.post("/v1/samples", json={}, headers=headers)
        assert got.status_code == 200
        assert got.headers["access-control-allow-origin"] == "*"
        headers["access-control-request-method"] = "POST"
        headers["access-control-request-headers"] = "authorization, x-stainless-lang"
        got = other.options("/v1/samples", headers=headers)
        assert got.status_code == 204
        assert {"authorization", "*"} <= {
            name.strip() for name in got.headers["access-control-allow-headers"].split(",")
        }


def test_every_response_has_the_headers_of_security(client: TestClient) -> None:
    for path in ("/livez", "/v1/samples", "/nothing", "/v1/jobs/x"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_request_ids(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "a.B-9_"}).headers["x-request-id"] == (
        "a.B-9_"
    )
    for bad in ("a b", "x" * 129, "a\u00e9", "<script>"):
        raw = [(b"x-request-id", bad.encode("latin-1"))]
        assert client.get("/livez", headers=raw).headers["x-request-id"] != bad


def test_a_token_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# users\nalice {ALICE}\n\n{BOB}  # of a machine\n")
    assert auth.read_tokens(file) == {ALICE: "alice", BOB: "token 4"}
    # Editors of Windows put a byte order mark first.
    file.write_text(f"alice {ALICE}", encoding="utf-8-sig")
    assert auth.read_tokens(file) == {ALICE: "alice"}
    for text in ("", "# none", "a b c"):
        file.write_text(text)
        with pytest.raises(RequestError):
            auth.read_tokens(file)
    with pytest.raises(RequestError, match="cannot be read"):
        auth.read_tokens(tmp_path / "none")
    with pytest.raises(RequestError, match="at least 16 characters"):
        Settings(tokens={"short": "me"})


def test_other_machines_need_a_token_or_open(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(ALICE)
    parse = _parser().parse_args
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(RequestError, match="--token-file"):
            settings_of(parse(["b", "--host", host]))
        assert settings_of(parse(["b", "--host", host, "--open"])).hosts == ()
        assert settings_of(parse(["b", "--host", host, "--token-file", str(file)])).tokens
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert is_loopback(host)
        assert "localhost" in settings_of(parse(["b", "--host", host])).hosts
    assert ALICE not in repr(settings_of(parse(["b", "--token-file", str(file)])))
