"""The endpoint: what it answers, whom it refuses, and that requests do not meet."""

import concurrent.futures
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.serving import server as serving_module
from fairseq_sparsemixer.serving.server import Server

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the red house is not here"
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def ask(server, method="POST", path="/translate", body=None, headers=JSON):
    """(status, headers, content) of a request."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def translated(server, content):
    status, _, body = ask(server, body=json.dumps(content))
    return status, json.loads(body)


def raw(server, *parts, pause=0.0):
    """What comes back for bytes that are sent one after the other."""
    with socket.create_connection(server.server_address, timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def test_page_and_model(serving):
    status, headers, page = ask(serving, "GET", "/", headers={})
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert b"Experts at work" in page and b".glance" in page and b"requestSubmit" in page
    status, _, content = ask(serving, "GET", "/model", headers={})
    about = json.loads(content)
    assert (status, about["router"]) == (200, "sparsemixer")
    assert about["layers"] == {"encoder.0": 4, "decoder.0": 4}


def test_answers_are_the_inspectors(serving, inspector):
    swaps = [{"layer": "encoder.0", "position": 2, "experts": [3]}]
    for content in ({"text": TEXT}, {"text": TEXT, "swaps": swaps}):
        assert translated(serving, content) == (200, inspector.translate(content))


def test_what_is_at_once_is_as_one_after_the_other(serving):
    texts = [TEXT, "a new car"]
    contents = [
        {"text": text, "swaps": [{"layer": layer, "position": 1, "experts": [expert]}]}
        for text in texts
        for layer in ("encoder.0", "decoder.0")
        for expert in range(2)
    ]
    one_by_one = [translated(serving, content) for content in contents]
    with concurrent.futures.ThreadPoolExecutor(len(contents)) as clients:
        at_once = list(clients.map(lambda content: translated(serving, content), contents))
    assert at_once == one_by_one
    assert len({str(answer) for answer in one_by_one}) > len(contents) // 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/../../../../etc/passwd", 404),
        ("GET", "/page.js", 404),
        ("GET", "/translate", 404),
        ("GET", "http://127.0.0.1/", 404),
        ("POST", "/", 404),
        ("POST", "/translate?x", 404),
        ("PUT", "/translate", 501),
        ("OPTIONS", "/translate", 501),
        ("DELETE", "/model", 501),
    ],
)
def test_there_is_nothing_else(serving, method, path, status):
    found, headers, content = ask(serving, method, path, body="{}")
    assert found == status
    assert headers.get_content_type() == "application/json"
    assert json.loads(content)["error"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "localhost.evil.example", "", "[", "127.0.0.1.nip.io"],
)
def test_another_host_is_refused(serving, host):
    for method, path in (("GET", "/"), ("GET", "/model"), ("POST", "/translate")):
        status, _, content = ask(serving, method, path, "{}", {**JSON, "Host": host})
        assert status == 403
        assert f"http://127.0.0.1:{serving.server_address[1]}/" in json.loads(content)["error"]
    assert b" 403 " in raw(serving, b"GET / HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8642"])
def test_names_of_this_machine_are_taken(serving, host):
    assert ask(serving, "GET", "/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
        "",
    ],
)
def test_other_sites_can_post_nothing(serving, kind):
    """A browser sends these kinds without asking first; and no answer tells it that it may ask."""
    body = json.dumps({"text": TEXT})
    status, headers, _ = ask(serving, body=body, headers={"Content-Type": kind})
    assert status == 415
    assert ask(serving, body=body, headers={**JSON, "Origin": "http://evil.example"})[0] == 200
    for method in ("GET", "POST", "OPTIONS"):
        _, headers, _ = ask(serving, method, "/translate", body)
        assert not [name for name in headers if name.lower().startswith("access-control")]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("length", "status"),
    [
        ("70000", 413),
        ("9" * 5000, 413),
        ("-1", 411),
        ("+5", 411),
        ("1e3", 411),
        ("", 411),
        ("²", 411),
    ],
)
def test_lengths_that_are_refused(serving, length, status):
    tail = f"Content-Length: {length}\r\n\r\n".encode("latin-1")
    assert f" {status} ".encode() in raw(serving, HEAD + tail).splitlines()[0]


def test_a_body_without_length_or_in_chunks_is_refused(serving):
    for tail in (b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"):
        assert b" 411 " in raw(serving, HEAD + tail).splitlines()[0]


def test_the_limit_of_bytes(serving):
    """One more is refused, and the sentence that says so arrives however much was sent."""
    body = json.dumps({"text": "a " * 30_000}).ljust(serving_module.MOST_BYTES)
    assert ask(serving, body=body)[0] == 400  # of too many pieces
    for more in (1, 3_000_000):
        status, _, content = ask(serving, body=body + " " * more)
        assert (status, json.loads(content)) == (413, {"error": "send at most 65536 bytes of JSON"})


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nul", b"\xff\xfe{\x00}\x00", b'{"text": "\xff"}', b"[" * 60000, b"9" * 60000],
)
def test_what_is_no_json_is_refused(serving, body):
    status, _, content = ask(serving, body=body)
    assert status == 400
    assert json.loads(content)["error"].startswith("it is no JSON in UTF-8")


def test_a_wrong_request_is_one_sentence(serving):
    status, answer = translated(serving, {"text": TEXT, "swaps": [{"layer": "x" * 100}]})
    assert status == 400
    assert answer["error"].startswith("there is no position")


def test_a_failure_of_the_model_is_told(serving, inspector, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(inspector, "translate", fail)
    assert translated(serving, {"text": TEXT})[0] == 500
    assert "out of memory" in caplog.text
    monkeypatch.undo()
    assert translated(serving, {"text": TEXT})[0] == 200


def test_slow_requests_end(serving, monkeypatch):
    monkeypatch.setattr(serving_module, "SECONDS", 0.3)
    started = time.monotonic()
    assert b" 408 " in raw(serving, HEAD, b"Content-Length: 99\r\n\r\n{").splitlines()[0]
    assert b" 411 " in raw(serving, HEAD).splitlines()[0]
    assert time.monotonic() - started < 5


def test_clients_that_go_away_leave_nothing(serving, capfd, caplog):
    body = json.dumps({"text": TEXT}).encode()
    head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
    for sent in (b"", head[:20], head, head + body):
        with socket.create_connection(serving.server_address) as connection:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )  # closing resets it
            connection.sendall(sent)
    assert translated(serving, {"text": TEXT})[0] == 200
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_an_address_that_cannot_be_had_is_one_line(run_dir, serving, capsys, monkeypatch):
    def refused(*arguments):
        assert cli.main(["serve", str(run_dir), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    port = serving.server_address[1]
    assert f"port {port} is in use already; give another with --port" in refused("--port", port)
    assert "--port 65536 is none; give 0 to 65535" in refused("--port", 65536)
    for host in ("nowhere.invalid", "a..b", "192.0.2.1"):
        assert f"cannot listen at {host} (" in refused("--host", host)

    def deny(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Server, "server_bind", deny)
    assert "port 80 is for the administrator alone" in refused("--port", 80)


def test_the_command(run_dir, corpus, tmp_path):
    """Prints the address when it answers, warns of another host, and ends at Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fairseq_sparsemixer.cli", "serve", run_dir, "--data", corpus,
         "--host", "0.0.0.0", "--port", "0", "--beam", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"http://[^/]+:(\d+)/ \(Ctrl-C ends it\)\n", line)[1])
        body = json.dumps({"text": TEXT})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/translate", body, {**JSON, "Host": socket.gethostname()})
        assert json.loads(connection.getresponse().read())["translation"]
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored below some shells
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "warning: with --host 0.0.0.0 everybody who can reach this machine" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
