"""HTTP around an :class:`.Inspector`, for a browser on the same machine.

A page of another site can make a browser send requests here. It gets no answer that it may read (no
CORS header is ever sent); what it posts is refused, since only forms and scripts of this page can
say that they send JSON; and a name of its own that leads here (DNS rebinding) is refused by the
``Host`` of its requests. No path of a request ever names a file.
"""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import ipaddress
import json
import logging
import socket
import socketserver
import sys
import threading
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import ModelChoice

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 16
"""Of the body of a request."""
SECONDS = 10.0
"""In which a request must have come, and in which its answer must have been taken."""


def serve(model: ModelChoice, beam: int, lenpen: float, host: str, port: int) -> None:
    """Serve until interrupted; prints the address once it answers.

    Raises:
        UserError: the address cannot be had, or see :func:`.load_translator` and
            :class:`.Inspector`.
    """
    server = Server(host, port)
    try:
        # Loads torch and fairseq: what is wrong with the address is said before.
        from fairseq_sparsemixer.evaluation.translator import load_translator
        from fairseq_sparsemixer.serving.inspector import Inspector

        server.begin(Inspector(load_translator(model, "fp32"), beam, lenpen))
        if not server.is_loopback:
            print(
                f"warning: with --host {host} everybody who can reach this machine can use the "
                "model, unencrypted and without a password; without --host only this machine can",
                file=sys.stderr,
            )
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    finally:
        server.server_close()


class Refused(Exception):
    """A request that gets no answer but its status and a sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(socketserver.ThreadingTCPServer):
    """Holds the address from the beginning, and answers after :meth:`begin`.

    Args:
        host: a name or an address of this machine.
        port: 0 for any that is free.

    Raises:
        UserError: that address cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        # One thread runs the model: requests wait for each other, in their order.
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self.page, self.policy = _page()
        with _address_errors(host, port):
            found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family, *_, address = found
            super().__init__(address, Handler, bind_and_activate=False)
            try:
                self.server_bind()
            except OSError:
                self.server_close()
                raise

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self._address.is_loopback

    @property
    def _address(self) -> Any:
        return ipaddress.ip_address(str(self.server_address[0]))

    @property
    def url(self) -> str:
        """Where the page is."""
        address = self._address
        name = f"[{address}]" if address.version == 6 else str(address)
        if address.is_unspecified:
            name = socket.gethostname()
        return f"http://{name}:{self.server_address[1]}/"

    def begin(self, inspector: Any) -> None:
        """Answer requests with this :class:`.Inspector`."""
        self.inspector = inspector
        with _address_errors(self._host, self._port):
            self.server_activate()

    def translate(self, request: Any) -> Any:
        """What the inspector answers, when it is this request's turn."""
        return self._worker.submit(self.inspector.translate, request).result()

    def knows(self, name: Optional[str]) -> bool:
        """Whether it is called that; other sites cannot make a browser say numbers, or our name."""
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name or "")
            return True
        names = {"localhost", self._host.lower()}
        return name in (names if self.is_loopback else {*names, socket.gethostname().lower()})

    def server_close(self) -> None:
        """Stop listening, and wait for the translation that is going on."""
        super().server_close()
        self._worker.shutdown(cancel_futures=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away whenever they like."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("a request failed")


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    """What the user may do where an address cannot be had.

    Raises:
        UserError: in place of what the system says.
    """
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"port {port} is for the administrator alone; give another with --port, above 1023"
        ) from error
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use already; give another with --port, or 0 for any"
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} ({reason}); check --host") from error


def _page() -> Tuple[bytes, str]:
    """The page with its style and script inside, and the policy that allows these alone."""
    folder = Path(__file__).parent
    style = (folder.parent / "report" / "page.css").read_text(encoding="utf-8")
    style += (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    page = (folder / "page.html").read_text(encoding="utf-8")
    page = page.replace("<style></style>", f"<style>{style}</style>")
    page = page.replace("<script></script>", f"<script>{script}</script>")
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    policy = (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy.format(*hashes)


class Handler(http.server.BaseHTTPRequestHandler):
    """``GET /``: the page. ``GET /model``, ``POST /translate``: JSON; errors are JSON, too."""

    server: Server
    timeout = SECONDS

    def setup(self) -> None:
        """Give the request its time, however slowly it comes."""
        super().setup()
        self._deadline = threading.Timer(SECONDS, self._end_of_input)
        self._deadline.daemon = True
        self._deadline.start()

    def _end_of_input(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        """Take what is still sent: closed before, the client might not see the answer."""
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(MOST_BYTES):
                pass
        self._deadline.cancel()

    def parse_request(self) -> bool:
        """Refuse a request whose host is another."""
        if not super().parse_request():
            return False
        with contextlib.suppress(ValueError):
            host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if self.server.knows(host):
                return True
        self.send_error(HTTPStatus.FORBIDDEN, f"this is {self.server.url}: ask for it by that name")
        return False

    def do_GET(self) -> None:
        """The page, or what the model is."""
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, "text/html", self.server.page)
        elif path == "/model":
            self._send_json(HTTPStatus.OK, self.server.inspector.describe())
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there is / and /model to get")

    def do_POST(self) -> None:
        """A translation."""
        try:
            answer = self.server.translate(self._content())
        except Refused as error:
            self.send_error(error.status, str(error))
        except UserError as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        except concurrent.futures.CancelledError:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "it was stopped")
        except Exception:
            logger.exception("a translation failed")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "it failed: the terminal says why")
        else:
            self._send_json(HTTPStatus.OK, answer)

    def _content(self) -> Any:
        """The JSON of a request.

        Raises:
            Refused: there is none, or too much.
        """
        if self.path != "/translate":
            raise Refused(HTTPStatus.NOT_FOUND, "there is /translate to post to")
        if self.headers.get_content_type() != "application/json":
            raise Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send it with Content-Type: application/json"
            )
        given = self.headers.get("Content-Length", "")
        if not (given.isascii() and given.isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "send it with its Content-Length in bytes")
        # Longer numbers take long to read.
        if len(given) > 9 or int(given) > MOST_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {MOST_BYTES} bytes of JSON"
            )
        body = b""
        with contextlib.suppress(OSError):
            body = self.rfile.read(int(given))
        if len(body) < int(given):
            raise Refused(
                HTTPStatus.REQUEST_TIMEOUT, f"it had not come whole within {SECONDS:g} seconds"
            )
        try:
            return json.loads(body.decode())
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"it is no JSON in UTF-8 ({error})") from error

    def send_error(
        self, code: int, message: Optional[str] = None, explain: Optional[str] = None
    ) -> None:
        """Also called by the base class, for what is no HTTP."""
        self._send_json(code, {"error": message or HTTPStatus(code).phrase})

    def _send_json(self, code: int, value: Any) -> None:
        self._send(code, "application/json", json.dumps(value).encode())

    def _send(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """Nothing that helps to choose an attack."""
        return "fairseq-sparsemixer"

    def log_message(self, *_: Any) -> None:
        """What is typed is nobody else's business."""
