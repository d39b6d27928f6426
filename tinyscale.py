#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

It verifies the checksum of each API call, finds the server that runs the meeting, signs the call
again with that server's secret and relays the answer. A meeting that exists nowhere is created on
the next server of servers.json.

The way of a call:

    Balancer.process_request   accepts a connection, which a thread of a pool serves
    Handler.handle             reads one request, writes one answer, and closes
    Handler.read_head          refuses what is no plain HTTP
    Handler.read_call          verifies the checksum, then reads the body
    ROUTES[call].handle        chooses the server, or asks all of them (Part II)
    Server.call                has the call signed with that server's secret, and sent
    Handler.respond            writes a line in the log, and the answer

Kept in memory, in one Directory, behind its lock: where each meeting was last seen, and which
creates are on their way. The servers are asked every ten seconds, so a restart loses nothing but
what a silent server alone knows.

To audit, read Part I, and the tables ROUTES and PAGES. Begin with verify, then parse_head, Handler
and Connections. Outside of Part I secrets are read by read_settings and what it calls, and used by
print_url; join hands out a URL that was signed; what servers send is read by parse.
"""

from __future__ import annotations

import argparse
import base64
import calendar
import collections
import contextlib
import email.utils
import errno
import functools
import hashlib
import hmac
import html
import http.client
import http.server
import io
import json
import logging
import logging.handlers
import os
import queue
import re
import resource
import select
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, NamedTuple, Sequence
from urllib.parse import quote_plus, unquote_plus, urlsplit

__version__ = "2.0"
log = logging.getLogger("tinyscale")

# ==== Part I: secrets and strangers ===============================================================

# ---- limits: seconds, bytes, or how many ---------------------------------------------------------

# To reach an address of a server, and again for its TLS handshake. DNS has no limit.
CONNECT_TIMEOUT = 3
# For the answer to a call.
ANSWER_TIMEOUT = 10
# For a create, a call with a body, or getRecordings: BBB's own nginx waits as long.
LONG_TIMEOUT = 60
# At least so long an answer is waited for, even if its time is over: our machine may have been
# paused, and the answer lies ready.
LATE = 0.5
# So often, some 8 MB: more does not lie ready.
MAX_LATE_READS = 1000
# For a client's TLS handshake and the head of its request together.
HEAD_TIMEOUT = 10
# After that a client may be slow, but not silent for longer: nginx waits 60.
SILENCE_TIMEOUT = 75
# A refused client that is still sending is listened to for so long, or it would not see why.
LINGER = 2
# Clients, each with a thread; and those that wait to be accepted when school begins.
MAX_CONNECTIONS = 1000
BACKLOG = 1024
# Calls that wait for one server.
MAX_WAITING = 200
# Connections that are kept to a server, and for how long: BBB's nginx closes them after 75 s.
MAX_KEPT = 32
KEPT_FOR = 30
# The head of a request, or a form.
MAX_HEAD = 64 * 1024
# What is read, or written, at a time.
CHUNK = 64 * 1024
# A body, slides for example; and all bodies at one time, each for a moment held twice.
MAX_BODY = 100 * 1024 * 1024
MAX_BODIES = 256 * 1024 * 1024
# A server's answer.
MAX_ANSWER = 32 * 1024 * 1024
# The longest URL that a form becomes: nginx and Tomcat refuse 8 KiB. A longer form stays a form.
MAX_URL = 7500

# ---- settings ------------------------------------------------------------------------------------

# By their length in hex, as BBB tells them apart: the caller chooses.
ALGORITHMS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}


@dataclass(frozen=True)
class Entry:
    """An entry of servers.json, its values checked by read_entry."""

    host: str
    secret: str = field(repr=False)
    weight: int = 1
    cordoned: bool = False
    checksum: str = "sha256"


class Systemd(NamedTuple):
    """What systemd wants of us."""

    # where to say that we are ready
    notify_socket: str = ""
    # the listener comes from a socket unit
    is_socket_unit: bool = False
    # stderr is its journal
    is_journal: bool = False


@dataclass(frozen=True)
class Settings:
    """All settings, of the environment and of the files that it names, checked by read_settings."""

    entries: tuple[Entry, ...]
    secrets: tuple[str, ...] = field(repr=False)
    # "" for all addresses
    bind: str
    port: int
    # one of PLACEMENTS
    placement: str
    tls: ssl.SSLContext | None
    # "": /status and /metrics are not there
    status_password: str = field(repr=False)
    systemd: Systemd
    # what is not right, but no reason to refuse
    warnings: Sequence[str]
    # the stamp of each file that was read: it changes when the file does
    stamps: dict[str, str]

    def may_see_pages(self, authorization: str) -> bool:
        """Whether this is HTTP Basic's of user admin and the password; never if there is none."""
        if not self.status_password:
            return False
        login = base64.b64encode(f"admin:{self.status_password}".encode())
        return hmac.compare_digest(authorization.encode(), b"Basic " + login)


# ---- checksums -----------------------------------------------------------------------------------


def checksum(name: str, query: str, secret: str, algorithm: str) -> str:
    """The hex checksum of a call: over its name, its raw query without a checksum, and a secret.

    The rule is that of BBB's API documentation.
    """
    return hashlib.new(algorithm, (name + query + secret).encode()).hexdigest()


def sign(name: str, query: str, secret: str, algorithm: str = "sha256") -> str:
    """The raw query with its checksum."""
    signature = "checksum=" + checksum(name, query, secret, algorithm)
    return f"{query}&{signature}" if query else signature


def without(query: str, *names: str) -> str:
    """The raw query less the parameters of these decoded names.

    The rest stays byte for byte, empty parts too.
    """
    return "&".join(
        part for part in query.split("&") if unquote_plus(part.partition("=")[0]) not in names
    )


def decode(query: str) -> list[tuple[str, str]]:
    """The parameters of a raw query.

    Not by parse_qsl: some versions of it take a semicolon for a separator.
    """
    pairs = []
    for part in query.split("&"):
        name, _, value = part.partition("=")
        pairs.append((unquote_plus(name), unquote_plus(value)))
    return pairs


def is_right(given: str, name: str, texts: Iterable[str], secrets: Iterable[str]) -> bool:
    """Whether a checksum is that of the call over one of these texts, with one of these secrets."""
    algorithm = ALGORITHMS.get(len(given))
    if algorithm is None:
        return False
    for text in texts:
        for secret in secrets:
            expected = checksum(name, text, secret, algorithm)
            # a blank secret never verifies anything
            if secret.strip() and hmac.compare_digest(expected.encode(), given.encode()):
                return True
    return False


def verify(
    call_name: str, query: str, secrets: Iterable[str], is_form: bool = False
) -> tuple[str, dict[str, str]]:
    """Verify the checksum in a raw query. Return the query without it, and the decoded parameters.

    A form is verified over its raw text or, as BBB does since 2.6.18, over the empty query. So who
    knows a checksum of a call without parameters may send any form with it.
    Raises ApiError if the checksum is missing, wrong or repeated.
    """
    refused = ApiError("checksumError", "Checksums do not match")
    given = [part for part in query.split("&") if part.startswith("checksum=")]
    if len(given) != 1:
        raise refused
    unsigned = without(query, "checksum")
    signed_texts = [unsigned, ""] if is_form else [unsigned]
    if not is_right(given[0].partition("=")[2].lower(), call_name, signed_texts, secrets):
        raise refused

    pairs = decode(query)
    names = [name for name, _ in pairs]
    for name in ("checksum", "meetingID", "recordID"):
        # BBB's calls differ in which one of two they take: a server might take the other one
        if names.count(name) > 1:
            raise refused
    params: dict[str, str] = {}
    for name, value in pairs:
        # of other repeated ones the first counts, as in BBB
        params.setdefault(name, value)
    return unsigned, params


# ---- calls ---------------------------------------------------------------------------------------

FORM = "application/x-www-form-urlencoded"
XML_TYPES = ("application/xml", "text/xml")
# Without the charset some clients would read Latin-1.
XML_HEADERS = (("Content-Type", "text/xml;charset=utf-8"),)
# What every answer of BBB begins with. Nothing before <response> could declare entities.
RETURNCODE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml [^>]*>\s*)?"
    rb"<response>\s*<returncode>(SUCCESS|FAILED)</returncode>"
)


@dataclass(frozen=True)
class Answer:
    """An answer, a server's or our own."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = XML_HEADERS

    @property
    def returncode(self) -> str:
        """SUCCESS or FAILED, which is the first element of BBB's answers; "" if it is none."""
        match = RETURNCODE.match(self.body)
        return match[1].decode() if match else ""


class ApiError(Exception):
    """A call that is refused, with BBB's messageKey and message, and an HTTP status.

    BBB refuses with 200.
    """

    # for the log: which server it is about, and why that one
    note = ""
    # what a person in a browser gets
    page: Answer | None = None

    def __init__(self, key: str, message: str, status: int = 200) -> None:
        super().__init__(key)
        self.key = key
        self.message = message
        self.status = status

    def answer(self) -> Answer:
        """In BBB's shape. The words are our own: there is nothing to escape."""
        text = f"<messageKey>{self.key}</messageKey><message>{self.message}</message>"
        return Answer(
            self.status, f"<response><returncode>FAILED</returncode>{text}</response>".encode()
        )


class Unavailable(ApiError):
    """A call failed, and the server MAY have carried it out: do not send it to another."""

    def __init__(self, note: str = "no server is up") -> None:
        super().__init__(
            "serverUnavailable", "The server cannot be reached now. Please try again in a minute."
        )
        self.note = note


class Unreachable(Unavailable):
    """A call failed, and the server has NOT carried it out: another one may get it."""


@dataclass
class ApiCall:
    """A call, a client's that was verified or one of our own."""

    # what follows /bigbluebutton/api/
    name: str
    # raw, without its checksum: it goes on byte for byte
    query: str = ""
    # the same, decoded
    params: dict[str, str] = field(default_factory=dict)
    # slides or a file, which the checksum does not cover; makes the call a POST
    body: bytes = b""
    content_type: str = ""
    is_form: bool = False
    # a person in a browser waits for the answer
    wants_html: bool = False
    # for the log: which server, and why that one
    note: str = ""

    @property
    def route(self) -> Route:
        return ROUTES.get(self.name, OTHER_CALL)

    @property
    def meeting_id(self) -> str:
        return self.params.get("meetingID", "")

    @property
    def may_repeat(self) -> bool:
        """Whether a server that saw the call twice would have done no more than once.

        A create without a body is repeated by BBB's rule: with the same two passwords it is
        answered duplicateWarning. If BBB had made up a password itself, the repeat would be
        refused.
        """
        has_passwords = "attendeePW" in self.params and "moderatorPW" in self.params
        return self.route.is_read or (self.name == "create" and has_passwords and not self.body)


# ---- one BBB server ------------------------------------------------------------------------------

# The system's authorities, or those of SSL_CERT_FILE. TLS 1.2 is the default only since Python
# 3.10.
TRUST = ssl.create_default_context()
TRUST.minimum_version = ssl.TLSVersion.TLSv1_2
# As before Python 3.13, which refuses the authorities that many schools made for themselves.
TRUST.verify_flags &= ~ssl.VERIFY_X509_STRICT

# All else of a server's head is dropped.
PASSED_ON = ("Content-Type", "Location", "Set-Cookie")


class SignedRequest(urllib.request.Request):
    """A signed call on its way to a server."""

    # it may be sent twice
    may_repeat = False
    # a kept connection turned out closed, so the server may have seen it twice
    was_repeated = False
    # a placeholder, which is never connected
    connection = http.client.HTTPConnection("")


class Drops(io.RawIOBase):
    """What a server sends, in however many drops, until a deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self.sock = sock
        self.raw = sock.makefile("rb", 0)
        self.deadline = deadline
        self.late_reads = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        now = time.monotonic()
        if now > self.deadline:
            self.late_reads += 1
            if self.late_reads == 1:
                # our machine may have been paused: what lies ready is read all the same
                self.deadline = now + LATE
            if self.late_reads > MAX_LATE_READS:
                raise socket.timeout("timed out")
        self.sock.settimeout(max(0.001, self.deadline - now))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """An answer that must be whole, head and body, at a deadline."""

    def __init__(self, deadline: float, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(Drops(sock, deadline))


class Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's handler for one BBB server, whose connections stay open for the next call.

    A server may close a kept connection just as we write to it, and nobody knows then whether it
    saw the request. So only what may be sent twice rides on one.
    """

    def __init__(self, entry: Entry) -> None:
        # HTTPHandler has no __init__: this is HTTPSHandler's
        super().__init__(context=TRUST)
        # replaced as a whole when servers.json changes
        self.entry = entry
        # the end of its certificate, as time.time; 0 if that is not known
        self.certificate_end = 0.0
        self.kept: collections.deque[tuple[float, http.client.HTTPConnection]] = collections.deque()
        # not build_opener's: that one follows redirects and uses the proxies of the environment
        self.opener = urllib.request.OpenerDirector()
        self.opener.addheaders = [("User-Agent", f"tinyscale/{__version__}")]
        self.opener.add_handler(self)

    def __str__(self) -> str:
        return self.entry.host

    def url_for(self, call: str, query: str) -> str:
        """The URL of a call, signed with this server's secret."""
        entry = self.entry
        signed = sign(call, query, entry.secret, entry.checksum)
        return f"{entry.host}/bigbluebutton/api/{call}?{signed}"

    def sign_again(self, call: ApiCall) -> SignedRequest:
        """The call as a request to this server.

        A form that would make too long a URL stays a form, as BBB 2.6.18 has it.
        """
        body = call.body
        content_type = call.content_type
        url = self.url_for(call.name, call.query)
        if call.is_form and len(url) > MAX_URL:
            url, _, signature = self.url_for(call.name, "").partition("?")
            body = f"{call.query}&{signature}".encode()
            content_type = FORM
        if body:
            return SignedRequest(url, body, {"Content-Type": content_type})
        request = SignedRequest(url)
        request.may_repeat = call.may_repeat
        return request

    def send(self, request: SignedRequest, timeout: float) -> Answer:
        """Send a request and return the whole answer.

        Raises URLError if there is no connection. Else, if the server may have seen the request,
        socket.timeout for its silence, or another OSError, HTTPException or ValueError.
        """
        try:
            response = self.opener.open(request, timeout=timeout)
            with contextlib.closing(response):
                body = read_answer(response)
        except BaseException:
            request.connection.close()
            raise
        connection = request.connection
        if connection.sock is not None and response.status >= 200 and len(self.kept) < MAX_KEPT:
            self.kept.append((time.monotonic(), connection))
            self.close_old()
        else:
            connection.close()
        # a line break in a field would begin another one
        fields = tuple(
            (name, re.sub(r"[\x00-\x1f\x7f]+\s*", " ", value))
            for name in PASSED_ON
            for value in response.headers.get_all(name, [])
            if value
        )
        return Answer(response.status, body, fields)

    def do_open(self, http_class: Any, req: Any, **options: Any) -> http.client.HTTPResponse:
        """What urllib calls to send a request.

        As its own, but it begins with a kept connection, if that is allowed.
        """
        kept = self.take() if req.may_repeat else None
        if kept is not None:
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
                return self.exchange(kept, req)
            kept.close()
            req.was_repeated = True
        fresh = http_class(req.host, timeout=CONNECT_TIMEOUT, **options)
        req.connection = fresh
        try:
            fresh.connect()
        except OSError as error:
            if req.was_repeated:
                raise
            raise urllib.error.URLError(error) from error
        if isinstance(fresh.sock, ssl.SSLSocket):
            certificate: Any = fresh.sock.getpeercert()
            self.certificate_end = float(ssl.cert_time_to_seconds(certificate["notAfter"]))
        return self.exchange(fresh, req)

    def take(self) -> http.client.HTTPConnection | None:
        """A kept connection that is still good: nothing can be read from it, not even its end."""
        while True:
            try:
                since, connection = self.kept.pop()
            except IndexError:
                return None
            is_young = time.monotonic() - since < KEPT_FOR
            if is_young and not is_readable(connection.sock):
                return connection
            connection.close()

    def close_old(self) -> None:
        """Close the kept connections that nobody took for long: the newest are taken first."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self.kept[0][0] > KEPT_FOR:
                self.kept.popleft()[1].close()

    def exchange(
        self, connection: http.client.HTTPConnection, request: SignedRequest
    ) -> http.client.HTTPResponse:
        """Send the request and read the head of the answer."""
        request.connection = connection
        connection.sock.settimeout(request.timeout)
        deadline = time.monotonic() + (request.timeout or 0)
        headers = {**request.headers, **request.unredirected_hdrs}
        # a server may refuse a body half way: its answer is there all the same
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            connection.request(request.get_method(), request.selector, request.data, headers)
        answers: Any = functools.partial(TimedResponse, deadline)
        connection.response_class = answers
        return connection.getresponse()


def is_readable(sock: socket.socket) -> bool:
    """Whether there is something to read now, or the end."""
    # not select, which fails for file numbers above 1023
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def read_answer(response: http.client.HTTPResponse) -> bytes:
    """The whole body of an answer. Raises OSError or HTTPException, also if it is late."""
    length = response.length
    body = bytearray()
    while len(body) != length and not response.isclosed():
        body += response.read1(CHUNK)
        was_cut = response.isclosed() and length not in (None, len(body))
        if was_cut or len(body) > MAX_ANSWER:
            raise http.client.IncompleteRead(b"")
    return bytes(body)


# ---- HTTP: what strangers send -------------------------------------------------------------------

# The head of a request: the method, the target, which is ASCII without a fragment, and the fields,
# each a token, a colon, and no NUL, CR or LF.
REQUEST = re.compile(
    r"(?a)([A-Z]+) (?:https?://[\w.:\[\]-]+)?(/[!-\"$-~]*) HTTP/1[.][01]\r\n"
    r"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r\n)*)\r\n"
)
# A slash too many is forgiven: Greenlight 3.0.1 sends /api//create, bigbluepy join/.
# A checksum covers a name and a query with nothing between. So that of a guest's join link is right
# for joi?nmeetingID=... and joinm?eetingID=..., too: no other call may begin with a j.
CALL_PATH = re.compile(r"/bigbluebutton/api/{1,2}(join|(?!j)[A-Za-z0-9]+(?:/[A-Za-z0-9]+)*)/?")
BARE_LF = re.compile(rb"(?<!\r)\n")
# A moment that never comes.
NEVER = float("inf")
# The first byte of a TLS handshake.
TLS_HELLO = b"\x16"


class Head(NamedTuple):
    """The head of a request."""

    method: str
    path: str
    # raw
    query: str
    # by their names in lower case; of a repeated one the last
    fields: dict[str, str]
    # of the body, in bytes
    length: int


def parse_head(head: bytes) -> Head:
    """The parts of a request's head.

    Raises ApiError for what is no plain HTTP/1.1, or could be read differently by a proxy before
    us: http.server's own parser, made for e-mail, takes a bare CR for the end of a line.
    """
    match = REQUEST.fullmatch(head.decode("latin-1"))
    if not match:
        raise ApiError("badRequest", "This is no request of HTTP/1.1", 400)
    method, target, lines = match.groups()
    path, _, query = target.partition("?")
    if re.search(r"(?ims)^(host|content-length):.*^\1:", lines):
        raise ApiError("badRequest", "A field of the head is repeated", 400)
    fields = {
        name.lower(): value.strip(" \t") for name, value in re.findall("(.*?):(.*)\r\n", lines)
    }
    length = fields.get("content-length", "0")
    if "transfer-encoding" in fields or not re.fullmatch("[0-9]{1,15}", length):
        raise ApiError(
            "badRequest", "A body must have a Content-Length, and no Transfer-Encoding", 411
        )
    return Head(method, path, query, fields, int(length))


def log_error(where: str, error: BaseException) -> None:
    """Log a connection that broke off; or a mistake of ours, without its text.

    That might quote a query.
    """
    if isinstance(error, OSError):
        # of TLS it is the reason that tells
        reason = getattr(error, "reason", "") or error.strerror or type(error).__name__
        log.info("%s broke off: %s", where, reason)
        return
    lines = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed with %s. Please report this:\n%s", where, type(error).__name__, lines)


class Handler(socketserver.BaseRequestHandler):
    """One connection of a client: one request, one answer.

    Nothing that follows a request is ever read as another one.
    """

    server: Balancer
    request: socket.socket

    def setup(self) -> None:
        self.started = time.monotonic()
        # since when the client keeps us waiting; NEVER: it does not, and may stay
        self.waiting_since = self.started
        self.deadline = self.started + HEAD_TIMEOUT
        self.call = ApiCall("-")
        self.head = Head("GET", "", "", {}, 0)
        # what has been read, and is not used yet
        self.buffer = b""
        self.unread = 0
        self.reserved = 0
        self.server.handlers.add(self)

    def finish(self) -> None:
        self.server.reserve(-self.reserved)
        self.server.handlers.discard(self)

    def handle(self) -> None:
        """Answer the request. Raises OSError if the client goes away before that."""
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(HEAD_TIMEOUT)
            self.request.do_handshake()
        outcome = "success"
        try:
            head = self.read_head()
            if not head:
                return
            self.head = parse_head(head)
            self.unread = self.head.length
            answer = self.answer()
            if answer.status >= 400 or answer.returncode == "FAILED":
                outcome = "failed"
        except ApiError as error:
            answer = error.page or error.answer()
            outcome = error.key
            self.call.note = error.note or self.call.note
        except OSError:
            raise
        except Exception as error:
            # whatever it is, the caller gets an answer
            log_error(self.call.name, error)
            answer = ApiError("internalError", "A mistake of tinyscale; see its log", 500).answer()
            outcome = "bug"
        self.respond(answer, outcome)

    def receive(self) -> bytes:
        """The one place that reads from a client; b"" at the end.

        Raises OSError, socket.timeout for one.
        """
        # what lies ready is read even when it is late
        seconds = max(0.001, min(SILENCE_TIMEOUT, self.deadline - time.monotonic()))
        self.request.settimeout(seconds)
        return self.request.recv(CHUNK)

    def read_head(self) -> bytes:
        """The head of the request; b"" from who says nothing.

        Raises ApiError for what cannot become a head.
        """
        head, end, buffer = b"", b"", b""
        while not end:
            data = self.receive()
            buffer += data
            if not buffer:
                return b""
            if not data:
                raise ConnectionError(errno.ECONNRESET, "half a request")
            if buffer.startswith(TLS_HELLO):
                raise ConnectionError(errno.EPROTO, "it speaks HTTPS to a port of plain HTTP")
            head, end, self.buffer = buffer.partition(b"\r\n\r\n")
            # without CR LF the end would never come; only what is new is searched
            if BARE_LF.search(head, len(buffer) - len(data)):
                raise ApiError("badRequest", "Lines of a request must end in CR LF", 400)
            if len(head) > MAX_HEAD:
                raise ApiError("badRequest", "The head of the request is too large", 431)
        return head + end

    def answer(self) -> Answer:
        """The answer to the request. Raises ApiError if it is refused."""
        path = self.head.path
        page = PAGES.get(path)
        has_password = bool(self.server.settings.status_password)
        if page and (has_password or not page.needs_password):
            return self.answer_page(page)
        match = CALL_PATH.fullmatch(path)
        if not match:
            # no further than a query would begin whose "?" was forgotten
            shown = re.sub("[^A-Za-z0-9/._-].*", "...", path)
            self.call.note = repr(shown[:99])
            raise ApiError("notFound", "There is nothing at this address", 404)
        # for the log, if it is refused
        self.call.name = match[1]
        call = self.read_call(match[1])
        self.waiting_since = NEVER
        return call.route.handle(self.server.directory, call)

    def answer_page(self, page: Page) -> Answer:
        """A page of our own; the secret ones want the password."""
        self.call.name = self.head.path
        self.allow("GET", "HEAD", *page.methods)
        authorization = self.head.fields.get("authorization", "")
        if page.needs_password and not self.server.settings.may_see_pages(authorization):
            challenge = 'Basic realm="tinyscale", charset="UTF-8"'
            return Answer(401, b"", (("WWW-Authenticate", challenge),))
        return page.write(self.server)

    def allow(self, *methods: str) -> None:
        if self.head.method not in methods:
            raise ApiError("unsupportedRequest", "This method is not allowed here", 405)

    def read_call(self, name: str) -> ApiCall:
        """Verify the checksum, then read the body; only a form, which is the query, before that.

        Raises ApiError.
        """
        head = self.head
        # a HEAD must not create; and every guest knows a checksum of a join, which must not make us
        # read a body
        self.allow("GET", "HEAD" if name == "join" else "POST")
        media_type = head.fields.get("content-type", "").partition(";")[0].strip().lower()
        query = head.query
        is_form = media_type == FORM and head.length > 0 and not without(query, "checksum")
        if is_form:
            query = "&".join(filter(None, [self.read_form(), query]))
        query, params = verify(name, query, self.server.settings.secrets, is_form)
        call = ApiCall(name, query, params, is_form=is_form)
        call.wants_html = "text/html" in head.fields.get("accept", "")
        # for the log, if its body is refused
        self.call = call
        if self.unread and name != "join":
            self.read_slides(call, media_type)
        return call

    def read_form(self) -> str:
        """The text of a form. Raises ApiError if it is none."""
        text = self.read_body(MAX_HEAD).decode("latin-1")
        if not re.fullmatch('[!-"$-~]*', text):
            raise ApiError("badRequest", "The form is not URL-encoded", 400)
        return text

    def read_slides(self, call: ApiCall, media_type: str) -> None:
        """Read the body of a call whose checksum was right: XML or a file, which goes on as it is.

        Raises ApiError.
        """
        if media_type not in (FORM, *XML_TYPES, "multipart/form-data"):
            raise ApiError(
                "unsupportedContentType", "POST request Content-Type is missing or unsupported"
            )
        # who knows a secret, or a URL that was signed with it, may be slow
        self.waiting_since = NEVER
        self.deadline = NEVER
        call.body = self.read_body(MAX_BODY)
        is_xml = media_type != "multipart/form-data"
        if media_type == FORM and not re.match(rb"(\xef\xbb\xbf)?\s*<", call.body):
            raise ApiError(
                "checksumError", "Parameters must be in the URL or in the body, not in both"
            )
        # BBB wants the bare type, and some clients label their XML as a form
        call.content_type = "application/xml" if is_xml else self.head.fields["content-type"]

    def read_body(self, limit: int) -> bytes:
        """The whole body of the request.

        Raises ApiError if it is too large, ConnectionError if it is cut short.
        """
        if self.unread > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        self.reserved = self.server.reserve(self.unread)
        if self.head.fields.get("expect"):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray(self.buffer[: self.unread])
        while len(body) < self.unread:
            data = self.receive()
            if not data:
                raise ConnectionError(errno.ECONNRESET, "half a body")
            body += data[: self.unread - len(body)]
        self.unread = 0
        return bytes(body)

    def respond(self, answer: Answer, outcome: str) -> None:
        """Write a line in the log, even for a client that is gone; then the answer.

        The line has the call, meetingID, server, outcome, status and time: no query, no name.
        """
        seconds = time.monotonic() - self.started
        call = self.call
        is_page = self.head.path in PAGES
        if not is_page:
            self.server.totals.add(call, outcome, seconds)
        if not is_page or answer.status >= 400:
            note = call.note or self.client_address[0]
            line = "%.99s %.300r %s %s %d %.0f ms"
            status = answer.status
            log.info(line, call.name, call.meeting_id, note, outcome, status, 1000 * seconds)
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines.append(f"Date: {email.utils.formatdate(usegmt=True)}")
        for name, value in answer.headers:
            lines.append(f"{name}: {value}")
        lines.append(f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n")
        body = b"" if self.head.method == "HEAD" else answer.body
        # now we wait for the client again, to take the answer
        self.waiting_since = time.monotonic()
        self.send("\r\n".join(lines).encode("latin-1") + body)
        # "": the head itself was refused
        if self.unread or not self.head.path:
            self.listen_on()

    def send(self, data: bytes) -> None:
        """The one place that writes to a client, which may be slow, but not silent.

        Raises OSError.
        """
        self.request.settimeout(SILENCE_TIMEOUT)
        rest = memoryview(data)
        while rest:
            # in pieces: TLS must send all that it is given within one timeout
            sent = self.request.send(rest[:CHUNK])
            rest = rest[sent:]
            if self.waiting_since < NEVER:
                # it takes its answer
                self.waiting_since = time.monotonic()

    def listen_on(self) -> None:
        """Let a client that is still sending end, or it would see a reset, not the answer."""
        self.deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            # not SSLSocket's, which forgets its TLS and would read on in clear text
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            while time.monotonic() < self.deadline:
                if not self.receive():
                    return


class Balancer(http.server.ThreadingHTTPServer):
    """The listener, and a thread of a pool for each connection."""

    def __init__(
        self, settings: Settings, directory: Directory, listener: socket.socket, limit: int
    ) -> None:
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.settings = settings
        self.directory = directory
        self.started = time.monotonic()
        self.is_stopping = False
        # what is wrong with the settings on disk; and their files when we last read them
        self.mistake = ""
        self.seen_stamps = settings.stamps
        self.handlers: set[Handler] = set()
        self.threads = futures.ThreadPoolExecutor(limit)
        self.slots = threading.BoundedSemaphore(limit)
        # guards open, which counts connections, and bytes_reserved
        self.lock = threading.Lock()
        self.open = 0
        self.bytes_reserved = 0
        self.totals = Totals()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of the pool.

        If there are too many, one must go: see close_slowest.
        """
        while not self.slots.acquire(blocking=False):
            if self.is_stopping:
                self.shutdown_request(request)
                return
            self.close_slowest()
        with self.lock:
            self.open += 1
        # it is in the queue before one more thread fails to begin: those that run will serve it
        with contextlib.suppress(RuntimeError):
            self.threads.submit(self.serve, request, client_address)

    def close_slowest(self) -> None:
        """Close the connection of who has kept us waiting longest, a second at least.

        Who waits for us may stay. Then wait a moment for its thread to end.
        """
        slowest = min(list(self.handlers), key=lambda handler: handler.waiting_since, default=None)
        if slowest and slowest.waiting_since + 1 < time.monotonic():
            # not SSLSocket's, see listen_on
            with contextlib.suppress(OSError):
                socket.socket.shutdown(slowest.request, socket.SHUT_RDWR)
        time.sleep(0.001)

    def serve(self, request: Any, client_address: Any) -> None:
        """One connection from its begin to its end."""
        tls = self.settings.tls
        try:
            if tls:
                # the handshake comes later, in Handler.handle, which gives it a time
                request = tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            self.process_request_thread(request, client_address)
        except OSError:
            # it was gone before we came to it
            self.shutdown_request(request)
        finally:
            with self.lock:
                self.open -= 1
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error: Any = sys.exc_info()[1]
        log_error(client_address[0], error)

    def is_busy(self) -> bool:
        """Whether somebody waits for an answer, or has only just begun to ask."""
        now = time.monotonic()
        mute = [h for h in list(self.handlers) if not h.head.path and now - h.started > 1]
        return self.open > len(mute)

    def reserve(self, size: int) -> int:
        """Count so many bytes of a body that we shall hold, less if negative.

        Raises ApiError if there are too many.
        """
        with self.lock:
            if size > 0 and self.bytes_reserved + size > MAX_BODIES:
                raise ApiError(
                    "serverBusy", "Too many large bodies at one time. Please try again", 503
                )
            self.bytes_reserved += size
        return size


# ---- HTML ----------------------------------------------------------------------------------------


class Markup(str):
    """HTML that is not escaped again: made by element, or the style of html_answer."""


def element(tag: str, *children: object, **attributes: str) -> Markup:
    """An element of HTML.

    All text in it is escaped, in children and attributes. A Markup child stays as it is.
    """
    parts = [tag]
    for name, value in attributes.items():
        parts.append(f'{name.rstrip("_")}="{html.escape(value)}"')
    inner = [child if isinstance(child, Markup) else html.escape(str(child)) for child in children]
    end = "" if tag == "meta" else f"</{tag}>"
    return Markup(f"<{' '.join(parts)}>{''.join(inner)}{end}")


# ==== Part II: where meetings are, where calls go =================================================

# Seconds, or how many. For the answer to a question that is put to several servers at once.
PROBE_TIMEOUT = 3
# Between two surveys of a server; while it is down; and before the first one after it went down.
SURVEY_INTERVAL = 10
RETRY_INTERVAL = 5
FIRST_RETRY = 1
# How long a meeting is believed to be where it was last seen: two surveys may fail.
MEETING_TTL = 30
# How long "no server has this meeting" is believed: people poll for meetings to begin.
ABSENCE_TTL = 1
# How long a server that is down keeps its meetings.
HOLD = 30
# By TINYSCALE_PLACEMENT=load a meeting that we first heard of so recently counts for at least
# EXPECTED people.
YOUNG = 15 * 60
EXPECTED = 10
# The values of TINYSCALE_PLACEMENT, and what the log says of each.
PLACEMENTS = {"turn": "in turn", "load": "least load"}
# A server that takes longer for an answer gets a new meeting only if no other one can.
SLOW = 2
# Threads that ask several servers at once.
MAX_ASKING = 1000

# ---- a server's state ----------------------------------------------------------------------------

# What our own machine lacks is no outage of a server.
# EBUSY is what getaddrinfo says if it can open no file.
OUR_TROUBLE = (
    errno.EBUSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EADDRNOTAVAIL,
)
# A proxy says so if there is no BBB behind it; only with 504 BBB may have carried out the call.
GONE = (404, 502, 503, 504)


class MeetingInfo(NamedTuple):
    """What a server told of a meeting."""

    meeting_id: str
    internal_id: str
    name: str
    # BBB's createTime: milliseconds since 1970
    created: int
    participants: int
    is_breakout: bool


class Server(Connections):
    """One BBB server, and in which state it is. Times are those of time.monotonic, in seconds."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.slots = threading.BoundedSemaphore(MAX_WAITING)
        # recordings take a minute: no other call shall lack a slot for them
        self.recording_slots = threading.BoundedSemaphore(MAX_WAITING)
        # unknown until it has answered or failed once; then up or down, since when, and why
        self.state = "unknown"
        self.since = time.monotonic()
        self.reason = "no answer yet"
        self.is_known = threading.Event()
        # set when it goes down: it is surveyed again soon
        self.wake = threading.Event()
        # when the newest question was asked that it answered, and how long the last answer took
        self.answered = 0.0
        self.took = 0.0
        self.version = ""
        # good surveys that it needs before it gets new meetings
        self.doubts = 0
        # when its last survey was asked
        self.surveyed = 0.0
        # the meetings that this survey found
        self.listed: dict[str, MeetingInfo] = {}
        # those of them that another server lists, too
        self.doubles: set[str] = set()
        # those that were doubles at the survey before, too
        self.twins: set[str] = set()

    @property
    def is_up(self) -> bool:
        return self.state == "up"

    @property
    def is_down(self) -> bool:
        return self.state == "down"

    @property
    def is_able(self) -> bool:
        """Whether it may get new meetings."""
        return self.is_up and not self.entry.cordoned

    def call(self, call: ApiCall, why: str, timeout: float = 0) -> Answer:
        """Sign a call, send it and return the server's answer, if that is usable.

        An outage marks the server down.

        Raises Unreachable if the server cannot have carried out the call, and Unavailable if it may
        have.
        """
        call.note = f"{self} ({why})"
        slots = self.recording_slots if call.name == "getRecordings" else self.slots
        if not slots.acquire(blocking=False):
            raise Unreachable(f"{self} (too many calls wait for it)")
        try:
            return self.ask(call, timeout)
        finally:
            slots.release()

    def ask(self, call: ApiCall, timeout: float = 0) -> Answer:
        """As `call`, but without its limit, so that a survey is always sent."""
        asked = time.monotonic()
        is_long = bool(call.body) or call.route.is_long
        seconds = timeout or (LONG_TIMEOUT if is_long else ANSWER_TIMEOUT)
        request = self.sign_again(call)
        try:
            answer = self.send(request, seconds)
        except urllib.error.URLError as error:
            is_outage = getattr(error.reason, "errno", None) not in OUR_TROUBLE
            raise self.failed(
                call, asked, f"no connection: {error.reason}", Unreachable, is_outage
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # only its type: its text may quote the answer
            is_silent = isinstance(error, socket.timeout)
            reason = (
                f"no answer in {seconds:.0f} s"
                if is_silent
                else f"broken answer: {type(error).__name__}"
            )
            is_outage = getattr(error, "errno", None) not in OUR_TROUBLE
            raise self.failed(call, asked, reason, Unavailable, is_outage) from error
        if request.was_repeated and answer.returncode == "FAILED" and not call.route.is_read:
            raise Unavailable(f"{self} (it refused a repeat)")
        self.judge(call, asked, answer)
        self.answered = max(self.answered, asked)
        if call.route.is_read and call.route.tells_health:
            # not a list of recordings, for example, which takes its time
            self.took = time.monotonic() - asked
        if self.state == "unknown":
            self.note_up(asked)
        return answer

    def judge(self, call: ApiCall, asked: float, answer: Answer) -> None:
        """Raise Unavailable, or Unreachable, if this is no usable answer to the call."""
        status = answer.status
        is_redirect = 300 <= status < 400
        if (
            answer.returncode == "FAILED"
            and b"<messageKey>checksumError</messageKey>" in answer.body
        ):
            # BBB says so of parameters in a body, too: for `failed`, a body is no outage
            reason = "it refuses our checksum: compare the secret with 'bbb-conf --secret' there"
            raise self.failed(call, asked, reason, Unreachable)
        if answer.returncode and not is_redirect:
            return
        if is_redirect and call.name == "join":
            return
        if status >= 200 and not is_redirect and not call.route.is_xml:
            return
        # one bad meeting is no outage
        is_outage = status < 200 or is_redirect or status in GONE
        if call.name == "getMeetings":
            # our survey must be answered; but a client's own query may be what is wrong
            is_outage = not call.query
        may_have = status == 504 or not (is_redirect or status in GONE)
        error = Unavailable if may_have else Unreachable
        reason = f"HTTP {status} without an answer of BigBlueButton"
        raise self.failed(call, asked, reason, error, is_outage)

    def failed(
        self,
        call: ApiCall,
        asked: float,
        reason: str,
        error: type[Unavailable],
        is_outage: bool = True,
    ) -> Unavailable:
        """Note that a call failed, which was sent at the time `asked`.

        Return the error to raise.
        """
        # what is too long for a URL, or has a body, says nothing of the server
        is_odd = bool(call.body) or len(call.query) > MAX_URL
        is_outage = is_outage and call.route.tells_health and not is_odd
        if is_outage:
            self.note_down(reason, asked)
        elif self.reason != reason:
            # told once: each call that fails so has its own line
            log.warning("%s failed at %s: %s", self, call.name, reason)
            self.reason = reason
        return error(f"{self} ({reason})")

    def note_down(self, reason: str, asked: float) -> None:
        """Mark the server down, unless it has answered what was asked later."""
        if self.answered > asked:
            return
        if not self.is_down or self.reason != reason:
            log.warning("%s is down: %s", self, reason)
        self.reason = reason
        if not self.is_down:
            self.change("down")
            self.wake.set()

    def note_up(self, asked: float) -> None:
        """Mark the server up, which answered what was asked at that time.

        Not if it went down since.
        """
        if self.is_down and self.since > asked:
            return
        self.doubts = max(0, self.doubts - 1)
        if self.is_up:
            return
        self.change("up")
        self.reason = ""
        log.info("%s is up", self)

    def change(self, state: str) -> None:
        self.state = state
        self.since = time.monotonic()
        self.is_known.set()


# ---- the directory: what is remembered of meetings -----------------------------------------------


@dataclass(frozen=True)
class Meeting:
    """A meeting as we last heard of it."""

    info: MeetingInfo
    server: Server
    # when the question was asked whose answer told us so, and when we first heard of it
    asked: float
    first_heard: float


@dataclass
class Claim:
    """A server's claim on a meetingID: it may be creating that meeting, so nobody else shall."""

    server: Server
    # creates that are on their way to it
    sending: int = 0
    # when we last gave up waiting for one: it may have carried it out
    gave_up: float | None = None


class Probe(NamedTuple):
    """What came of asking servers for a meeting, at the time `asked`."""

    asked: float
    # who has it
    found: Server | None
    # who answered in time, but did not say that it has it
    others: Collection[Server]
    # whether all of them said that they have not
    is_absent: bool
    # who of them said so
    denied: Collection[Server] = ()


class Directory:
    """All servers, and where each meeting is.

    What is known is behind one lock, which is never held while a server is asked.

    Evidence has an age: what a server says counts from the moment when it was asked. The clock is
    an argument, so that a test can play on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.servers: list[Server] = []
        self.placement = "turn"
        self.turn = 0
        # who was given the last new meeting, and how many in a row
        self.last: Server | None = None
        self.in_a_row = 0
        # by meetingID and by internalMeetingID, as BBB accepts both
        self.meetings: dict[str, Meeting] = {}
        self.claims: dict[str, Claim] = {}
        # probes that run, and when all servers were asked in vain
        self.probes: dict[str, futures.Future[Probe]] = {}
        self.absent: dict[str, float] = {}
        self.threads = futures.ThreadPoolExecutor(MAX_ASKING)
        # recordings take a minute: no probe shall wait for them
        self.long_threads = futures.ThreadPoolExecutor(MAX_ASKING)

    def use(self, entries: Iterable[Entry], placement: str) -> list[Server]:
        """Take these servers from now on.

        One that stays keeps its state and its meetings. Return those that are new.
        """
        with self.lock:
            self.placement = placement
            known = {str(server): server for server in self.servers}
            servers = []
            for entry in entries:
                server = known.get(entry.host) or Server(entry)
                server.entry = entry
                servers.append(server)
            # in one assignment: who reads it does not hold the lock
            self.servers = servers
            for key, meeting in list(self.meetings.items()):
                if meeting.server not in self.servers:
                    del self.meetings[key]
            by_host = {str(server): server for server in servers}
            for key, claim in list(self.claims.items()):
                # it may have been taken out, and put back
                claim.server = by_host.get(str(claim.server), claim.server)
                if claim.server not in self.servers and not claim.sending:
                    del self.claims[key]
            return [server for server in servers if str(server) not in known]

    # -- what servers say

    def remember(self, server: Server, info: MeetingInfo, asked: float) -> None:
        """Note that the server, asked at that time, has the meeting.

        What is older than what we know is no news.
        """
        with self.lock:
            known = self.meetings.get(info.meeting_id)
            if server not in self.servers or (known and known.asked > asked):
                return
            is_other = known is not None and known.server is not server
            is_newer = known is not None and known.info.created > info.created
            if known and is_other and is_newer and not self.is_lost(known.server):
                # two meetings of one ID: the newer one counts
                return
            first_heard = (
                known.first_heard if known and known.info.created == info.created else self.clock()
            )
            meeting = Meeting(info, server, asked, first_heard)
            self.meetings[info.meeting_id] = meeting
            if info.internal_id:
                self.meetings[info.internal_id] = meeting

    def forget(self, server: Server, meeting_id: str, asked: float) -> None:
        """Note that the server, asked at that time, does not have the meeting."""
        with self.lock:
            claim = self.claims.get(meeting_id)
            if claim and claim.server is server:
                if claim.sending:
                    return
                if claim.gave_up is not None and claim.gave_up < asked:
                    del self.claims[meeting_id]
            known = self.meetings.get(meeting_id)
            if known and known.server is server and known.asked < asked:
                del self.meetings[meeting_id]

    def learn(
        self, server: Server, infos: Sequence[MeetingInfo], asked: float, is_whole: bool
    ) -> None:
        """Note what the server, asked at that time, lists.

        If the list is whole, it has no other meeting.
        """
        listed = {}
        for info in infos:
            listed[info.meeting_id] = info
            self.remember(server, info, asked)
        if is_whole:
            internal = {info.internal_id for info in infos}
            for key in self.keys_of(server) - listed.keys() - internal:
                self.forget(server, key, asked)
        server.listed = listed
        server.surveyed = asked
        with self.lock:
            # what is no longer believed
            old = [key for key, since in self.absent.items() if asked - since >= ABSENCE_TTL]
            for key in old:
                del self.absent[key]
        server.note_up(asked)
        self.note_twins(server)

    def keys_of(self, server: Server) -> set[str]:
        """The IDs of meetings that the server is said to have, or may have."""
        with self.lock:
            keys = {key for key, meeting in self.meetings.items() if meeting.server is server}
            return keys.union(key for key, claim in self.claims.items() if claim.server is server)

    def note_twins(self, server: Server) -> None:
        """Warn of meetings that two surveys in a row found on another server, too.

        We end neither.
        """
        with self.lock:
            doubles: set[str] = set()
            for other in self.servers:
                if other is not server and other.is_up:
                    doubles |= server.listed.keys() & other.listed.keys()
            twins = doubles & server.doubles
            for meeting_id in twins - self.twins():
                on = [str(other) for other in self.servers if meeting_id in other.listed]
                both = " and ".join(on)
                log.warning("meeting %.300r runs on %s: the newer one counts", meeting_id, both)
            server.doubles = doubles
            server.twins = twins

    def twins(self) -> set[str]:
        """The meetings that run on two servers."""
        return {meeting_id for server in self.servers for meeting_id in server.twins}

    # -- which creates are on their way

    def home(self, meeting_id: str) -> tuple[Server | None, str]:
        """The server to which a create must go, and why; None if it may go to any.

        The lock is held.
        """
        claim = self.claims.get(meeting_id)
        if claim and not claim.sending and self.is_lost(claim.server):
            del self.claims[meeting_id]
            claim = None
        if claim:
            return claim.server, "may have it"
        known = self.meetings.get(meeting_id)
        if known and not self.is_lost(known.server):
            return known.server, "remembered"
        return None, "nowhere"

    def is_fresh(self, meeting_id: str) -> bool:
        """Whether a survey, or another answer, told not long ago where the meeting is."""
        known = self.meetings.get(meeting_id)
        return known is not None and self.clock() - known.asked < MEETING_TTL

    def home_after(self, meeting_id: str, probe: Probe) -> tuple[Server | None, str]:
        """As `home`, after a probe. The lock is held.

        Raises Unavailable if that is a cordoned server which did not say that it has the meeting.
        """
        server, why = self.home(meeting_id)
        known = self.meetings.get(meeting_id)
        was_seen_since = known is not None and known.asked >= probe.asked
        if server is None or was_seen_since:
            return server, why
        if server in probe.denied:
            # an answer that is older than this no came in behind it
            self.forget(server, meeting_id, probe.asked)
            server, why = self.home(meeting_id)
        if server is not None and server.entry.cordoned:
            # what ended on a cordoned server begins elsewhere; but its silence is no denial
            raise Unavailable(f"{server} (cordoned, and silent)")
        return server, why

    def claim(
        self,
        meeting_id: str,
        probe: Probe | None = None,
        able: Collection[Server] = (),
        parent: Server | None = None,
    ) -> tuple[Server, str] | None:
        """Choose the server for a create, and give it a claim. Return it, and why.

        That is the server that has the meeting, or may have it; else, after a probe, that of a
        breakout room's parent, or one of those that are able. None if the servers must be asked
        first. Raises Unavailable if the server that must get the create is down, or none is able.
        """
        with self.lock:
            server, why = self.home(meeting_id)
            if server is not None and server.is_down:
                raise Unavailable(f"{server} (held)")
            claim = self.claims.get(meeting_id)
            is_creating = claim is not None and claim.sending > 0
            if not is_creating and probe is None:
                is_sure = server is not None and self.is_fresh(meeting_id)
                if not is_sure or (server and server.entry.cordoned):
                    return None
            if not is_creating and probe is not None:
                server, why = self.home_after(meeting_id, probe)
            if server is None and parent is not None:
                server, why = parent, "parent's"
            elif server is None:
                server, why = self.choose(able)
            self.claims.setdefault(meeting_id, Claim(server)).sending += 1
            return server, why

    def any_up(self) -> Server:
        """A server for a call about nothing that we know. Raises Unavailable if none is up."""
        for server in self.servers:
            if server.is_up:
                return server
        raise Unavailable()

    def is_lost(self, server: Server) -> bool:
        """Whether the server has been down so long that its meetings may begin anew elsewhere."""
        return server.is_down and self.clock() - server.since >= HOLD

    def release(self, meeting_id: str, may_have: bool, info: MeetingInfo | None = None) -> None:
        """Note that a create has come to its end.

        What it told is there if it had success, which counts from the answer. If it had none, the
        server may have carried it out all the same: then the claim stays until the server says no,
        or has been down for HOLD.
        """
        with self.lock:
            claim = self.claims[meeting_id]
            claim.sending -= 1
            if info:
                known = self.meetings.get(info.meeting_id)
                if known and known.server is not claim.server:
                    # it was lost or denied there, or the create would not have gone elsewhere
                    del self.meetings[info.meeting_id]
                elif known and known.info.created == info.created:
                    # a create tells nothing of the people in the meeting
                    info = known.info
                self.remember(claim.server, info, self.clock())
                claim.gave_up = None
            elif may_have:
                claim.gave_up = self.clock()
            is_settled = claim.gave_up is None or claim.server not in self.servers
            if not claim.sending and is_settled:
                del self.claims[meeting_id]

    # -- where a new meeting goes

    def choose(self, able: Collection[Server]) -> tuple[Server, str]:
        """One of these servers for a new meeting, and why it. The lock is held.

        Raises Unavailable if there is none.
        """
        if self.placement == "load":
            able = self.least_loaded(able)
        circle = [server for server in self.servers for _ in range(server.entry.weight)]
        for _ in circle:
            server = circle[self.turn % len(circle)]
            self.turn += 1
            if server in able:
                self.in_a_row = self.in_a_row + 1 if server is self.last else 1
                self.last = server
                return server, PLACEMENTS[self.placement]
        raise Unavailable("no server can take a new meeting")

    def least_loaded(self, able: Collection[Server]) -> list[Server]:
        """Those of these servers with the least load: people, and room for those that still come.

        Breakout rooms do not count, as their people are in the room, too. The lock is held.
        """
        if len(able) > 1 and self.in_a_row >= 2:
            # one that comes back empty must not get all that begins until its next survey
            able = [server for server in able if server is not self.last]
        people = dict.fromkeys(able, 0)
        for key, meeting in self.meetings.items():
            info = meeting.info
            is_other = key != info.meeting_id or meeting.server not in people
            if is_other or info.is_breakout:
                continue
            is_young = self.clock() - meeting.first_heard < YOUNG
            people[meeting.server] += max(info.participants, EXPECTED if is_young else 0)
        for claim in self.claims.values():
            if claim.server in people:
                people[claim.server] += EXPECTED
        loads = {server: count / server.entry.weight for server, count in people.items()}
        least = min(loads.values(), default=0)
        return [server for server in able if loads[server] == least]

    # -- asking

    def ask(
        self, servers: Collection[Server], call: ApiCall, seconds: float
    ) -> Iterator[tuple[Server, Answer | None]]:
        """Ask these servers at once; yield each with its answer, as they come.

        The answer is None if it is not usable. Who takes longer is left out.
        """
        answers: queue.SimpleQueue[tuple[Server, Answer | None]] = queue.SimpleQueue()
        deadline = time.monotonic() + seconds

        def ask_one(server: Server) -> None:
            answer = None
            # logged where it was found out
            with contextlib.suppress(Unavailable):
                answer = server.call(replace(call), "asked")
            answers.put((server, answer))

        threads = self.long_threads if call.route.is_long else self.threads
        for server in servers:
            # it is in the queue before one more thread fails to begin: those that run will do it
            with contextlib.suppress(RuntimeError):
                threads.submit(ask_one, server)
        for _ in servers:
            try:
                # what lies ready counts, also after a pause of our machine
                server, answer = answers.get(timeout=max(LATE, deadline - time.monotonic()))
            except queue.Empty:
                return
            yield server, answer

    def probe(self, meeting_id: str) -> Probe:
        """Ask all servers for a meeting. Who asks for the same one meanwhile shares the answer."""
        mine: futures.Future[Probe] = futures.Future()
        with self.lock:
            running = self.probes.setdefault(meeting_id, mine)
        if running is not mine:
            return running.result()
        try:
            servers = [server for server in self.servers if not server.is_down]
            probe = self.ask_for(meeting_id, servers)
            if probe.is_absent:
                with self.lock:
                    self.absent[meeting_id] = probe.asked
            mine.set_result(probe)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self.lock:
                del self.probes[meeting_id]
        return mine.result()

    def ask_for(self, meeting_id: str, servers: Collection[Server]) -> Probe:
        """Ask these servers for a meeting, until one says that it has it."""
        asked = self.clock()
        call = ApiCall("getMeetingInfo", f"meetingID={quote_plus(meeting_id)}")
        others = []
        denied = []
        for server, answer in self.ask(servers, call, PROBE_TIMEOUT):
            others.append(server)
            if answer is None:
                continue
            info = info_by(answer)
            # BBB takes the beginning of an internal ID, too, so it may be another meeting
            if info and meeting_id in (info.meeting_id, info.internal_id):
                self.remember(server, info, asked)
                return Probe(asked, server, others, False)
            if info or answer.returncode == "FAILED":
                self.forget(server, meeting_id, asked)
                denied.append(server)
        is_absent = bool(servers) and len(denied) == len(servers)
        return Probe(asked, None, others, is_absent, denied)

    def wait_until_known(self) -> bool:
        """Wait until each server has answered or failed once. Return whether that took waiting."""
        deadline = time.monotonic() + CONNECT_TIMEOUT + ANSWER_TIMEOUT
        unknown = [server for server in self.servers if not server.is_known.is_set()]
        for server in unknown:
            server.is_known.wait(max(0, deadline - time.monotonic()))
        return bool(unknown)

    def find(self, meeting_id: str) -> tuple[Server | None, str]:
        """The meeting's server, and how we know; None if no server has it.

        Raises Unavailable if its server went down not long ago, or if nobody answers.
        """
        with self.lock:
            server, why = self.home(meeting_id)
            is_sure = server is not None and (server.is_down or self.is_fresh(meeting_id))
            is_absent = self.clock() - self.absent.get(meeting_id, -NEVER) < ABSENCE_TTL
        if server is None and is_absent:
            return None, "nowhere"
        if not is_sure:
            server, why = self.look_for(meeting_id)
        if server is not None and server.is_down:
            raise Unavailable(f"{server} (held)")
        return server, why

    def look_for(self, meeting_id: str) -> tuple[Server | None, str]:
        """As `find`, by asking the servers."""
        for is_last in (False, True):
            probe = self.probe(meeting_id)
            if probe.found:
                return probe.found, "probed"
            with self.lock:
                # told meanwhile by another one; or its server is silent, which is no denial
                server, why = self.home(meeting_id)
            if server is not None or is_last or not self.wait_until_known():
                break
            # a server that had not answered yet may have it: once more
        if server is None and not probe.others:
            raise Unavailable()
        return server, why


def survey(directory: Directory, server: Server) -> None:
    """Ask a server which meetings it runs: that shows whether it is up, and where meetings are.

    Raises Unavailable.
    """
    asked = directory.clock()
    answer = server.ask(ApiCall("getMeetings"))
    root, is_whole = parse(answer)
    if answer.returncode != "SUCCESS":
        key = "" if root is None else root.findtext("messageKey")
        # it did answer what we asked, so it counts from now
        server.note_down(f"it answers getMeetings with {key!r:.80}", directory.clock())
        return
    items = [] if root is None else root.findall("meetings/meeting")
    was_up = server.is_up and server.surveyed > 0
    directory.learn(server, [info_in(item) for item in items], asked, is_whole)
    if not was_up:
        # it may have been upgraded
        root, _ = parse(server.ask(ApiCall("")))
        server.version = "" if root is None else root.findtext("bbbVersion", "")


def watch(directory: Directory, server: Server) -> None:
    """Survey a server until it is taken out of the list.

    Each has a thread of its own for that: a slow one delays no other.
    """
    while server in directory.servers:
        server.wake.clear()
        try:
            survey(directory, server)
        except Unavailable:
            # it is in the log
            pass
        except Exception as error:
            # whatever it is, there must be a next survey
            log_error("a survey", error)
        if server.wake.wait(RETRY_INTERVAL if server.is_down else SURVEY_INTERVAL):
            # it went down just now
            time.sleep(FIRST_RETRY)


# ---- lists: parsed, merged, written again --------------------------------------------------------

# In XML 1.0 there are none of these characters; but a name that somebody typed may have them.
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A CDATA section that a name begins goes on behind the end of its element.
TAG = re.compile(r"(<!\[CDATA\[(?:(?!</|<!\[CDATA\[).)*?\]\]>|<[^<>]*>)", re.DOTALL)
NAME = re.compile(r"(?a)[A-Za-z_]")
# What would hide the end of an element was begun by such a name: a CDATA section, an instruction.
HIDING = re.compile(r"<(?:!\[CDATA\[|\?)(?:(?!\]\]>|\?>|<!\[CDATA\[|<\?).)*</", re.DOTALL)
# The elements whose children have the names that people typed.
CUSTOM = {"customdata", "metadata"}
LOOSE_AND = re.compile("&(?!(?:amp|lt|gt|quot|apos|#3[2-9]|#[4-9][0-9]|#[1-9][0-9]{2,3});)")


def parse(answer: Answer) -> tuple[ET.Element | None, bool]:
    """The <response> of an answer of BBB, None if there is none; and whether it is whole.

    It is not if something in it had to be mended.
    """
    begin = RETURNCODE.match(answer.body)
    if not begin:
        return None, False
    text = FORBIDDEN.sub(" ", answer.body.decode("utf-8", "replace"))
    text = text[text.index("<response>") :]
    if not HIDING.search(text):
        with contextlib.suppress(ET.ParseError):
            return ET.fromstring(text), True
    if not text.rstrip().endswith("</response>"):
        # it was cut short
        return None, False
    with contextlib.suppress(ET.ParseError):
        return ET.fromstring(mend(text)), False
    return None, False


def mend(text: str) -> str:
    """Well-formed XML of what is none, because BBB makes names of elements of what people typed.

    They come from userdata-NAME of a join and meta_NAME of a create. A tag that no parser takes is
    left out, with the text behind it; so is an end without its begin; what is open at the end of
    what is around it is closed there.
    """
    head, *rest = TAG.split(text)
    parts = [escape(head)]
    opened: list[str] = []
    for tag, behind in zip(rest[::2], rest[1::2]):
        if tag.startswith("</"):
            readable = close_tag(opened, tag[2:-1])
        elif tag.startswith("<![CDATA["):
            readable = tag if tag.endswith("]]>") else ""
        else:
            readable = open_tag(opened, tag)
        if readable:
            parts += [readable, escape(behind)]
    return "".join(parts + [f"</{name}>" for name in reversed(opened)])


def open_tag(opened: list[str], tag: str) -> str:
    """The begin of an element, if a parser takes it; "" if not. Note that it is open."""
    text = tag.rstrip("/>")
    name = text[1:].split()[0] if NAME.match(text, 1) else ""
    # nothing of BBB is nested so deep
    is_nested = len(opened) > 99 or (name in CUSTOM and not CUSTOM.isdisjoint(opened))
    with contextlib.suppress(ET.ParseError):
        if name and not is_nested and ET.fromstring(f"{text}/>") is not None:
            if tag.endswith("/>"):
                return f"{text}/>"
            opened.append(name)
            return f"{text}>"
    return ""


def close_tag(opened: list[str], name: str) -> str:
    """The end of an element and of what is open in it; "" if it is not open.

    In custom data only what was opened there can end.
    """
    custom = [place for place, tag in enumerate(opened) if tag in CUSTOM]
    if name not in opened[max(custom, default=0) :]:
        return ""
    ends = ""
    while not ends.endswith(f"</{name}>"):
        ends += f"</{opened.pop()}>"
    return ends


def escape(text: str) -> str:
    """Text of XML in which nothing is left of markup; references stay."""
    return LOOSE_AND.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def number(text: str | None) -> int:
    """A number in BBB's XML or parameters; -1 if the text is no such number."""
    return int(text) if text and re.fullmatch("[+]?[0-9]{1,18}", text) else -1


def info_in(item: ET.Element) -> MeetingInfo:
    """What getMeetings, getMeetingInfo or create says of a meeting."""
    created = number(item.findtext("createTime"))
    participants = max(0, number(item.findtext("participantCount")))
    is_breakout = item.findtext("isBreakout") == "true"
    name = item.findtext("meetingName", "")
    internal_id = item.findtext("internalMeetingID", "")
    meeting_id = item.findtext("meetingID", "")
    return MeetingInfo(meeting_id, internal_id, name, created, participants, is_breakout)


def info_by(answer: Answer) -> MeetingInfo | None:
    """What a SUCCESS says of one meeting; None if it is none, or names none."""
    root, _ = parse(answer)
    if root is None or answer.returncode != "SUCCESS":
        return None
    info = info_in(root)
    return info if info.meeting_id else None


class ListShape(NamedTuple):
    """How BBB writes a list."""

    tag: str
    item: str
    # what tells one item from another, and what is the greater the newer it is; "": nothing does
    identity: str
    newest: str
    # what stands in the answer if there is nothing, to the letter, typing errors too
    empty: str


LISTS = {
    "getMeetings": ListShape(
        "meetings",
        "meeting",
        "meetingID",
        "createTime",
        "<meetings/><messageKey>noMeetings</messageKey>"
        "<message>no meetings were found on this server</message>",
    ),
    "getSessions": ListShape(
        "sessions",
        "meeting",
        "",
        "",
        "<sessions/><messageKey>noSessions</messageKey>"
        "<message>no sessions were found on this serverr</message>",
    ),
    "getRecordings": ListShape(
        "recordings",
        "recording",
        "recordID",
        "startTime",
        "<recordings></recordings><messageKey>noRecordings</messageKey>"
        "<message>There are no recordings for the meeting(s).</message>",
    ),
    "hooks/list": ListShape("hooks", "hook", "callbackURL", "", "<hooks></hooks>"),
}


class Item(NamedTuple):
    """An item of a list, written."""

    identity: str
    newest: int
    text: str


def items_of(shape: ListShape, answer: Answer) -> list[Item] | None:
    """The items of a server's list, written again; None if the answer is no list that could be."""
    root, is_whole = parse(answer)
    if root is None or answer.returncode != "SUCCESS":
        return None
    if not is_whole and root.find(shape.tag) is None:
        # it may be what had to be mended
        return None
    items = []
    for element in root.iterfind(f"{shape.tag}/{shape.item}"):
        # "?" is no name of an element, so it finds nothing
        identity = element.findtext(shape.identity or "?", "")
        if shape.item == "hook":
            put_our_id(element, identity)
        text = write(element)
        if not text:
            return None
        items.append(Item(identity, number(element.findtext(shape.newest or "?")), text))
    return items


def write(element: ET.Element) -> str:
    """The XML of an element; "" if it is nested a thousand deep, as nothing of BBB is."""
    try:
        # in ASCII, its default, ElementTree would write the name of an element as &#228;
        return ET.tostring(element, "unicode")
    except RecursionError:
        return ""


def merge(lists: Iterable[list[Item]]) -> list[Item]:
    """The items of several servers, the newest first; of one identity only the newest."""
    every = [item for items in lists for item in items]
    every.sort(key=lambda item: item.newest, reverse=True)
    merged: dict[str, Item] = {}
    for item in every:
        # without an identity each is one of its own
        merged.setdefault(item.identity or f" {len(merged)}", item)
    return list(merged.values())


def write_list(shape: ListShape, items: Sequence[Item], more: str = "") -> Answer:
    """BBB's answer that has these items."""
    text = "".join(item.text for item in items)
    text = f"<{shape.tag}>{text}</{shape.tag}>" if items else shape.empty
    return success(text + more)


def success(inner: str) -> Answer:
    return Answer(200, f"<response><returncode>SUCCESS</returncode>{inner}</response>".encode())


# ---- routes: create ------------------------------------------------------------------------------


def create(directory: Directory, call: ApiCall) -> Answer:
    """To the server that has the meeting, or may have it; a new meeting is placed.

    If the chosen server cannot be reached, it goes to the next one.

    Raises Unavailable if a server may have carried it out without telling: then it is not tried
    elsewhere.
    """
    deadline = directory.clock() + LONG_TIMEOUT
    tried: set[Server] = set()
    while True:
        server, why = place(directory, call, tried)
        try:
            seconds = max(1, deadline - directory.clock())
            return create_on(directory, call, server, why, seconds)
        except Unreachable:
            tried.add(server)
            with directory.lock:
                # it is known there, or other creates of it are on their way there
                is_bound = directory.home(call.meeting_id)[0] is server
            if is_bound or directory.clock() > deadline:
                raise


def create_on(
    directory: Directory, call: ApiCall, server: Server, why: str, seconds: float
) -> Answer:
    """Send a create to the server that has the claim, and note what came of it.

    Raises as Server.call does.
    """
    info = None
    may_have = True
    try:
        answer = server.call(call, why, seconds)
        info = info_by(answer)
        if answer.returncode == "SUCCESS" and info is None:
            raise Unavailable(f"{server} (its answer is cut short)")
        may_have = False
        return answer
    except Unavailable as error:
        may_have = not isinstance(error, Unreachable)
        # a refusal may be about this call alone: its slides, its long form
        is_plain = not call.body and not call.is_form
        if is_plain and (may_have or server.is_down):
            server.doubts = 2
        raise
    finally:
        directory.release(call.meeting_id, may_have, info)


def place(directory: Directory, call: ApiCall, tried: Collection[Server]) -> tuple[Server, str]:
    """The server for a create that was tried on these in vain, and why that one. It has a claim.

    A new place is one of the servers that just answered that they lack the meeting; a breakout
    room's is its parent's. Raises Unavailable if there is none.
    """
    meeting_id = call.meeting_id
    placed = directory.claim(meeting_id)
    if placed:
        return placed
    parent_id = call.params.get("parentMeetingID", "")
    parent = directory.find(parent_id)[0] if parent_id else None
    if parent in tried:
        raise Unavailable(f"{parent} (parent's)")
    directory.wait_until_known()
    probe = directory.probe(meeting_id)
    able = [server for server in probe.others if server.is_able and server not in tried]
    # one in doubt, or a slow one, is better than none: one bad room must not stop all new ones
    able = [server for server in able if not server.doubts and server.took < SLOW] or able
    placed = directory.claim(meeting_id, probe, able, parent)
    if placed is None:
        raise Unavailable()
    return placed


# ---- routes: a call about one meeting ------------------------------------------------------------


def join(directory: Directory, call: ApiCall) -> Answer:
    """A browser is sent to the meeting's server itself, for its cookie.

    A program may want the answer.
    """
    # to BBB every word but "true" is false
    if call.params.get("redirect", "").lower() not in ("", "true"):
        return relay(directory, call)
    try:
        server, why = directory.find(call.meeting_id)
        if server is None:
            # the page as long as its server is down and nothing newer is known: the pupil must not
            # be lost
            lost = directory.meetings.get(call.meeting_id)
            if lost and call.wants_html:
                raise Unavailable(f"{lost.server} (down for long)")
            server = directory.any_up()
    except Unavailable as error:
        if call.wants_html:
            error.page = retry_page()
        raise
    call.note = f"{server} ({why})"
    return Answer(302, b"", (("Location", server.url_for("join", call.query)),))


def relay(directory: Directory, call: ApiCall) -> Answer:
    """To the meeting's server. A denial is passed on only when the others were asked, too."""
    if not call.meeting_id:
        return relay_anywhere(directory, call)
    server, why = directory.find(call.meeting_id)
    if server is None:
        return relay_anywhere(directory, call, why)
    answer = server.call(call, why)
    if not is_denial(call, answer):
        return answer
    probe = directory.ask_for(call.meeting_id, [server])
    if probe.found or (answer.returncode != "FAILED" and not probe.is_absent):
        # it has the meeting: it refuses something else, or nobody has joined yet
        return answer
    other, _ = directory.find(call.meeting_id)
    if other is None or other is server:
        return answer
    return other.call(call, "moved")


def is_denial(call: ApiCall, answer: Answer) -> bool:
    """Whether the answer could mean that the meeting is not there.

    The redirect is that of a join that BBB refuses.
    """
    if call.name == "isMeetingRunning":
        return b"<running>false" in answer.body
    return answer.returncode == "FAILED" or answer.status == 302


def relay_anywhere(directory: Directory, call: ApiCall, why: str = "any") -> Answer:
    """A call about no meeting that we know: to the first server that can be reached.

    So the answer is BBB's own.
    """
    deadline = directory.clock() + CONNECT_TIMEOUT
    failure = Unavailable()
    for server in directory.servers:
        if server.is_up and directory.clock() <= deadline:
            try:
                return server.call(call, why)
            except Unreachable as error:
                failure = error
    raise failure


# ---- routes: a call to all servers ---------------------------------------------------------------


def ask_all(directory: Directory, call: ApiCall, seconds: float = 0) -> dict[Server, Answer]:
    """The usable answers of the servers, in the order of the list.

    Raises Unavailable if there is none.
    """
    servers = [server for server in directory.servers if not server.is_down]
    seconds = seconds or CONNECT_TIMEOUT + (LONG_TIMEOUT if call.route.is_long else ANSWER_TIMEOUT)
    asking = directory.ask(servers, call, seconds)
    answers = {server: answer for server, answer in asking if answer}
    call.note = f"{len(answers)} of {len(directory.servers)} servers"
    if not answers:
        raise Unavailable(call.note)
    return {server: answers[server] for server in servers if server in answers}


def first(answers: Collection[Answer], returncode: str = "SUCCESS") -> Answer:
    """The first answer with this returncode, else the first of all."""
    for answer in answers:
        if answer.returncode == returncode:
            return answer
    return next(iter(answers))


def relay_list(directory: Directory, call: ApiCall) -> Answer:
    """One list of what all servers have. A server that gives none is left out."""
    shape = LISTS[call.name]
    answers = ask_all(directory, call, PROBE_TIMEOUT)
    lists = []
    for server, answer in answers.items():
        items = items_of(shape, answer)
        if items is not None:
            lists.append(items)
        elif answer.returncode == "SUCCESS":
            log.warning("%s is left out of %s: its list cannot be read", server, call.name)
    if not lists:
        answer = first(answers.values(), "FAILED")
        if answer.returncode != "FAILED":
            raise Unavailable(call.note)
        return answer
    return write_list(shape, merge(lists))


# ---- routes: recordings --------------------------------------------------------------------------


def record_ids(call: ApiCall) -> set[str]:
    """The recordings that a call means. BBB decodes them a second time."""
    texts = unquote_plus(call.params.get("recordID", "")).split(",")
    return set(filter(None, map(str.strip, texts)))


class Recordings(NamedTuple):
    """What the servers say of recordings."""

    lists: dict[Server, list[Item]]
    # what they all say, if they all refuse
    refusal: Answer | None
    # Nothing is missing: each server gave its list, or each recordID asked for is in those of the
    # others. A front end takes what a SUCCESS lacks for deleted.
    is_complete: bool


def ask_recordings(directory: Directory, call: ApiCall, query: str) -> Recordings:
    """Ask all servers for the recordings of a call. Raises Unavailable if none answers."""
    answers = ask_all(directory, ApiCall("getRecordings", query, is_form=call.is_form))
    lists = {}
    for server, answer in answers.items():
        items = items_of(LISTS["getRecordings"], answer)
        # without the element allowFetchAllRecordings is false there
        if items is not None and ("limit" not in call.params or b"<recordings" in answer.body):
            lists[server] = items
    every = len(directory.servers)
    call.note = f"{len(lists)} of {every} servers"
    refusals = [answer for answer in answers.values() if answer.returncode == "FAILED"]
    refusal = refusals[0] if len(refusals) == every else None
    found = {item.identity for items in lists.values() for item in items}
    has_all = bool(record_ids(call)) and record_ids(call) <= found
    return Recordings(lists, refusal, has_all or len(lists) == every)


def get_recordings(directory: Directory, call: ApiCall) -> Answer:
    """One list of all servers' recordings, and of that the page that is asked for.

    The limits of a page are BBB's.
    """
    said = ask_recordings(directory, call, without(call.query, "offset", "limit"))
    if said.refusal:
        return said.refusal
    if not said.is_complete:
        raise Unavailable(call.note)
    items = merge(said.lists.values())
    shape = LISTS["getRecordings"]
    if not re.fullmatch("[+-]?[0-9]{1,9}", call.params.get("limit", "")):
        return write_list(shape, items)
    offset = max(0, number(call.params.get("offset")))
    limit = min(max(1, number(call.params["limit"])), 100)
    shown = items[offset : offset + limit]
    total = f"<totalElements>{len(items)}</totalElements>"
    page = f"<offset>{offset}</offset><limit>{limit}</limit>"
    page += "<paged>true</paged><unpaged>false</unpaged>"
    empty = "false" if shown else "true"
    # clients look for the total in either place
    more = (
        f"{total}<pagination><pageable>{page}</pageable>{total}<empty>{empty}</empty></pagination>"
    )
    return write_list(shape, shown, more)


def relay_recording(directory: Directory, call: ApiCall) -> Answer:
    """A call about recordings: to each server that has some of them.

    Raises Unavailable if one does not answer.
    """
    ids = record_ids(call)
    if not ids:
        return relay_anywhere(directory, call)
    query = f"recordID={quote_plus(','.join(sorted(ids)))}&state=any"
    said = ask_recordings(directory, call, query)
    if said.refusal:
        return said.refusal
    answers = []
    is_done = said.is_complete
    for server, items in said.lists.items():
        if ids.isdisjoint(item.identity for item in items):
            continue
        # what can be done is done first: a repeat finishes it
        try:
            answers.append(server.call(call, "owner"))
        except Unavailable:
            is_done = False
    if not is_done:
        raise Unavailable(call.note)
    if not answers:
        return relay_anywhere(directory, call, "nowhere")
    return first(answers)


# ---- routes: webhooks ----------------------------------------------------------------------------


def hook_id(url: str) -> str:
    """Our ID of a hook, made from its callback URL alone.

    It is a decimal number below 2**31, as old front ends expect.
    """
    digest = hashlib.sha256(url.encode()).digest()
    return str(int.from_bytes(digest[:4], "big") % (2**31 - 1) + 1)


def hooks_of(answer: Answer) -> list[ET.Element] | None:
    """A server's hooks; None if it does not say. One that has no webhooks answers 404."""
    if answer.status == 404:
        return []
    root, is_whole = parse(answer)
    if root is None or not is_whole or answer.returncode != "SUCCESS":
        return None
    return root.findall("hooks/hook")


def put_our_id(element: ET.Element, url: str) -> None:
    """Put our ID in the place of a server's, which could be another hook's on another server."""
    for child in element.findall("hookID"):
        child.text = hook_id(url)


def create_hook(directory: Directory, call: ApiCall) -> Answer:
    """On all servers.

    A SUCCESS if one of them took it; a warning names the rest, and a repeat completes it.
    """
    answers = ask_all(directory, call)
    took = [server for server, answer in answers.items() if answer.returncode == "SUCCESS"]
    answer = first(answers.values())
    root, _ = parse(answer)
    if not took:
        return answer
    lacking = [str(server) for server in directory.servers if server not in took]
    if lacking:
        names = ", ".join(lacking)
        log.warning("hooks/create: not on %s. The same call again completes it", names)
    text = ""
    if root is not None:
        put_our_id(root, call.params.get("callbackURL", ""))
        text = write(root)
    if not text:
        raise Unavailable(f"{took[0]} (its answer cannot be read)")
    return Answer(200, text.encode())


def destroy_hook(directory: Directory, call: ApiCall) -> Answer:
    """Remove a hook from all servers that have it. "Not found" is said only when all said so."""
    wanted = call.params.get("hookID", "")
    if not wanted:
        raise ApiError("missingParamHookID", "You must specify a hookID in the parameters.")
    answers = ask_all(directory, ApiCall("hooks/list"))
    is_complete = len(answers) == len(directory.servers)
    removed = 0
    for server, answer in answers.items():
        hooks = hooks_of(answer)
        if hooks is None:
            is_complete = False
            continue
        for element in hooks:
            if hook_id(element.findtext("callbackURL", "")) == wanted:
                is_removed = destroy_on(server, element.findtext("hookID", ""))
                is_complete = is_complete and is_removed is not None
                removed += bool(is_removed)
    call.note = f"removed from {removed} of {len(directory.servers)} servers"
    if not is_complete:
        raise Unavailable(call.note)
    if not removed:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    return success("<removed>true</removed>")


def destroy_on(server: Server, own_id: str) -> bool | None:
    """Whether a server removed a hook that it knows by this ID; None if that failed."""
    call = ApiCall("hooks/destroy", f"hookID={quote_plus(own_id)}")
    try:
        answer = server.call(call, "has it")
    except Unavailable:
        return None
    if answer.returncode == "SUCCESS":
        return True
    # it says so of a permanent hook, which it does not remove
    return False if b">destroyMissingHook<" in answer.body else None


# ---- routes: the table ---------------------------------------------------------------------------


class Route(NamedTuple):
    """All properties of a call of BBB's API."""

    handle: Callable[[Directory, ApiCall], Answer]
    # it changes nothing, so it may be sent twice
    is_read: bool = False
    # its failure may mean that the server is down
    tells_health: bool = False
    # only BBB's XML is an answer to it: an error page of a proxy never reaches the caller
    is_xml: bool = True
    # it may take LONG_TIMEOUT
    is_long: bool = False


ROUTES = {
    "create": Route(create, tells_health=True, is_long=True),
    "join": Route(join),
    "isMeetingRunning": Route(relay, is_read=True, tells_health=True),
    "getMeetingInfo": Route(relay, is_read=True, tells_health=True),
    "end": Route(relay, tells_health=True),
    "insertDocument": Route(relay, is_xml=False),
    "sendChatMessage": Route(relay, is_xml=False),
    "getMeetings": Route(relay_list, is_read=True, tells_health=True),
    "getSessions": Route(relay_list, is_read=True),
    "getRecordings": Route(get_recordings, is_read=True, is_long=True),
    "publishRecordings": Route(relay_recording),
    "deleteRecordings": Route(relay_recording),
    "updateRecordings": Route(relay_recording),
    "getRecordingTextTracks": Route(relay_recording, is_xml=False),
    "putRecordingTextTrack": Route(relay_recording, is_xml=False),
    "hooks/create": Route(create_hook),
    "hooks/list": Route(relay_list, is_xml=False),
    "hooks/destroy": Route(destroy_hook),
}
# Calls that do not exist yet.
OTHER_CALL = Route(relay, is_xml=False)
# ==== Part III: for the admin =====================================================================

# Seconds. Until a browser that waits for a server asks again; for the calls in progress when we
# stop.
RETRY_AFTER = 5
DRAIN_TIMEOUT = 10
# Lines of the log that wait for a slow reader.
MAX_LOG = 10000

# ---- pages ---------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A page of our own."""

    write: Callable[[Balancer], Answer]
    # behind TINYSCALE_STATUS_PASSWORD
    needs_password: bool = True
    # beside GET and HEAD
    methods: Sequence[str] = ()


class Totals:
    """How many calls there were, and how long they took, by call and outcome."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: dict[tuple[str, str], tuple[int, float]] = {}

    def add(self, call: ApiCall, outcome: str, seconds: float) -> None:
        name = call.name if call.name in ROUTES else "other"
        key = (name, outcome)
        with self.lock:
            count, time_spent = self.calls.get(key, (0, 0.0))
            self.calls[key] = count + 1, time_spent + seconds


STYLE = """
:root { font: 1rem/1.5 sans-serif; color-scheme: light dark }
:root { color: #111; background: #fff; --low: #555; --bad: #b00020 }
@media (prefers-color-scheme: dark) {
  :root { color: #eee; background: #111; --low: #aaa; --bad: #ff8a8a }
}
body { margin: 1rem auto; padding: 0 1rem; max-width: 70rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2rem }
h1, h2, p, th { overflow-wrap: anywhere }
main { max-width: 32rem; margin: 20vh auto; text-align: center }
table { border-collapse: collapse; width: 100% }
th, td { padding: .4rem 1.2rem .4rem 0; border-top: 1px solid #8886; text-align: left }
th, td { vertical-align: top; font-weight: normal }
td { white-space: nowrap }
td.wide { white-space: normal }
tbody th { font-weight: bold }
thead th { overflow-wrap: normal }
thead th, small { color: var(--low); font-weight: normal }
.down, .bad { color: var(--bad); font-weight: bold }
.down::before { content: "✖ " }
.cordoned { color: var(--low) }
meter { display: block; width: 6rem }
@media (max-width: 45rem) {
  thead { display: none }
  tr { display: block; padding: .5rem 0; border-top: 1px solid #8886 }
  th, td { display: inline-block; border: 0; padding: 0 1rem 0 0 }
  td[title]::before { content: attr(title) " "; color: var(--low) }
}
"""


def html_answer(status: int, language: str, seconds: int, title: str, *body: object) -> Answer:
    """A page that is loaded again after so many seconds, and loads nothing else."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    charset = element("meta", charset="utf-8")
    viewport = element("meta", name="viewport", content="width=device-width")
    # what is in <style> is not escaped by browsers, and is our own
    style = Markup(f"<style>{STYLE}</style>")
    head = element("head", charset, viewport, element("title", title), style)
    text = element("html", head, *body, lang=language)
    headers = (
        ("Content-Type", "text/html;charset=utf-8"),
        ("Refresh", str(seconds)),
        ("Retry-After", str(seconds)),
        ("Cache-Control", "no-store"),
        ("Content-Security-Policy", f"default-src 'none'; style-src 'sha256-{digest}'"),
    )
    return Answer(status, b"<!DOCTYPE html>" + text.encode(), headers)


def retry_page() -> Answer:
    """For who waits in a browser for a server that is down."""
    english = (
        "The server of this room cannot be reached right now. This page tries again by itself."
    )
    german = "Der Server dieses Raums ist gerade nicht erreichbar. "
    german += "Diese Seite versucht es von selbst weiter."
    head = element("h1", "One moment, please")
    german_part = element(
        "div", element("h1", "Einen Moment bitte"), element("p", german), lang="de"
    )
    body = element("main", head, element("p", english), german_part)
    return html_answer(503, "en", RETRY_AFTER, "One moment, please", element("body", body))


def version_page(balancer: Balancer) -> Answer:
    # of BBB's API, not ours
    return success("<version>2.0</version><apiVersion>2.0</apiVersion>")


HEALTHY = b"ok"
NOT_HEALTHY = b"no server for new meetings"


def health(balancer: Balancer) -> Answer:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    is_able = any(server.is_able for server in balancer.directory.servers)
    status = 200 if is_able else 503
    return Answer(status, HEALTHY if is_able else NOT_HEALTHY, (("Content-Type", "text/plain"),))


def people_on(server: Server) -> int:
    return sum(info.participants for info in server.listed.values())


def metrics(balancer: Balancer) -> Answer:
    """Figures for Prometheus, in its text format."""
    lines = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.extend([f"# HELP tinyscale_{name} {text}", f"# TYPE tinyscale_{name} {kind}"])
        lines.extend(f"tinyscale_{name}{labels} {value:.12g}" for labels, value in samples)

    family("info", "gauge", "The version.", [(f'{{version="{__version__}"}}', 1)])
    started = time.time() - time.monotonic() + balancer.started
    family("start_time_seconds", "gauge", "When it was started.", [("", started)])
    family(
        "settings_ok",
        "gauge",
        "Whether the settings on disk are good.",
        [("", not balancer.mistake)],
    )
    family(
        "twin_meetings",
        "gauge",
        "Meetings on two servers.",
        [("", len(balancer.directory.twins()))],
    )
    for name, text, value in SERVER_FIGURES:
        samples = [
            (f'{{server="{server}"}}', value(server)) for server in balancer.directory.servers
        ]
        family(f"server_{name}", "gauge", text, samples)
    calls = []
    for (call, outcome), (count, seconds) in sorted(balancer.totals.calls.items()):
        labels = f'{{call="{call}",outcome="{outcome}"}}'
        calls.extend([(f"_count{labels}", count), (f"_sum{labels}", seconds)])
    family("call_seconds", "summary", "Calls, and the time they took.", calls)
    return Answer(
        200, ("\n".join(lines) + "\n").encode(), (("Content-Type", "text/plain; version=0.0.4"),)
    )


SERVER_FIGURES: Sequence[tuple[str, str, Callable[[Server], float]]] = (
    ("up", "Whether the server answers.", lambda server: server.is_up),
    ("cordoned", "Whether it gets no new meetings.", lambda server: server.entry.cordoned),
    ("meetings", "Meetings on the server.", lambda server: len(server.listed)),
    ("participants", "People in these meetings.", people_on),
    (
        "certificate_end_seconds",
        "When its certificate ends, 0 if that is not known.",
        lambda server: server.certificate_end,
    ),
)


def ago(since: float) -> str:
    """How long ago a moment of time.monotonic was."""
    seconds = time.monotonic() - since
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def state_of(server: Server) -> str:
    return "cordoned" if server.is_up and server.entry.cordoned else server.state


def days_left(server: Server) -> str:
    """The days until its certificate ends."""
    if not server.certificate_end:
        return "-"
    return f"{(server.certificate_end - time.time()) / 86400:.0f} d"


def server_row(server: Server, everyone: int) -> Markup:
    """A row of the table of servers; "-" for what is not known."""
    state = state_of(server)
    why = f"for {ago(server.since)}" + ("" if server.is_up else f": {server.reason}")
    cells = {"Rooms": "-", "People": "-", "Answers in": "-", "BBB": server.version or "-"}
    bar: object = ""
    if server.is_up:
        people = people_on(server)
        cells.update({"Rooms": str(len(server.listed)), "People": str(people)})
        cells["Answers in"] = f"{1000 * server.took:.0f} ms"
        bar = element("meter", value=str(people), max=str(max(1, everyone)))
    cells["Certificate"] = days_left(server)
    name = element("th", str(server), scope="row")
    about = element(
        "td", element("span", state, class_=state), " ", element("small", why), class_="wide"
    )
    row = [
        element("td", text, bar if title == "People" else "", title=title)
        for title, text in cells.items()
    ]
    return element("tr", name, about, *row)


def room_rows(server: Server) -> list[Markup]:
    """The rooms of a server, the fullest first, named as people know them."""
    rooms = sorted(server.listed.values(), key=lambda info: (-info.participants, info.name))
    rows = []
    for info in rooms:
        name = element("th", info.name, " ", element("small", info.meeting_id), scope="row")
        rows.append(element("tr", name, element("td", info.participants, title="People")))
    return rows


def status(balancer: Balancer) -> Answer:
    """A page for an admin to leave open: how the servers are, and which room runs where."""
    servers = balancer.directory.servers
    up = [server for server in servers if server.is_up]
    everyone = sum(map(people_on, up))
    count = sum(len(server.listed) for server in up)
    title = f"{len(up)} of {len(servers)} servers up · {everyone} people in {count} rooms"
    surveyed = max((server.surveyed for server in servers), default=0)
    facts = f"tinyscale {__version__}, running for {ago(balancer.started)}"
    facts += f" · surveyed {ago(surveyed)} ago" if surveyed else " · not surveyed yet"
    settings = element("p", "The settings on disk are good.")
    if balancer.mistake:
        settings = element(
            "p", f"The settings on disk are broken: {balancer.mistake}", class_="bad"
        )
    heads = ("Server", "State", "Rooms", "People", "Answers in", "BBB", "Certificate")
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    order = sorted(servers, key=lambda server: (server.is_up, server.entry.cordoned))
    rows = [server_row(server, everyone) for server in order]
    body = [
        element("h1", title),
        element("p", facts),
        settings,
        element("table", head, element("tbody", *rows)),
    ]
    for server in up:
        if server.listed:
            body.append(
                element("h2", f"{server}: {len(server.listed)} rooms, {people_on(server)} people")
            )
            body.append(element("table", *room_rows(server)))
    return html_answer(200, "en", SURVEY_INTERVAL, title, element("body", *body))


VERSION_PAGE = Page(version_page, needs_password=False, methods=["POST"])
PAGES = {
    "/bigbluebutton/": VERSION_PAGE,
    "/bigbluebutton/api": VERSION_PAGE,
    "/bigbluebutton/api/": VERSION_PAGE,
    "/health": Page(health, needs_password=False),
    "/status": Page(status),
    "/metrics": Page(metrics),
}

# ---- loading: the files and the environment ------------------------------------------------------

# The variables that we know, and what --help says of them.
VARIABLES = {
    "TINYSCALE_SECRET": "for the front ends; several with commas between",
    "TINYSCALE_SECRET_FILE": "the same from a file, one a line",
    "PORT": "to listen on (3005)",
    "TINYSCALE_BIND": "address to listen on (all, IPv4 and IPv6)",
    "TINYSCALE_SERVERS": "the list of servers (servers.json)",
    "TINYSCALE_PLACEMENT": "turn or load: where a new meeting goes (turn)",
    "TINYSCALE_CERT": "PEM file, to serve HTTPS",
    "TINYSCALE_KEY": "PEM file with its key, if it is another one",
    "TINYSCALE_STATUS_PASSWORD": "of user admin, for /status and /metrics",
}


class SettingsError(Exception):
    """A mistake in the settings: one line that says where, what was found, and the mend."""


def base_url(host: object) -> str:
    """A server's URL without /bigbluebutton and what follows; "" if it is no such URL.

    bbb-conf prints it in several forms.
    """
    match = re.fullmatch(
        r"(?ai)(https?://[\w.:\[\]-]+)((?:/[\w.~-]+)*?)(/bigbluebutton(/api)?)?/?", str(host)
    )
    if not match:
        return ""
    origin = re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", match[1].lower())
    try:
        parts = urlsplit(origin)
        is_right = bool(parts.hostname) and parts.port != 0
    except ValueError:
        # a port, or an IPv6 address, that is none
        return ""
    return origin + match[2] if is_right else ""


def is_usable_secret(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and text.isprintable()


# A key of an entry of servers.json: what tests it, and what it must be.
ENTRY_RULES: dict[str, tuple[Callable[[Any], object], str]] = {
    "host": (base_url, 'must look like "https://bbb1.example.org"'),
    "secret": (
        is_usable_secret,
        'must be the secret that "bbb-conf --secret" prints on that server',
    ),
    "weight": (
        lambda value: type(value) is int and 1 <= value <= 100,
        "must be a whole number from 1 to 100",
    ),
    "cordoned": (lambda value: isinstance(value, bool), "must be true or false"),
    "checksum": (
        lambda value: value in ALGORITHMS.values(),
        f"must be one of {', '.join(ALGORITHMS.values())}",
    ),
}


def absolute(path: str) -> str:
    """The whole path, if the working directory is still there."""
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def read_text(name: str, path: str) -> str:
    """The text of a file, which a setting of that name names. Raises SettingsError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        mend = "Check its name, and that the user of tinyscale may read it."
        raise SettingsError(f"{name} {absolute(path)}: {reason}. {mend}") from None


def read_servers(path: str) -> tuple[Entry, ...]:
    """Read servers.json. Raises SettingsError: nothing half valid comes out."""
    text = read_text("TINYSCALE_SERVERS", path)
    path = absolute(path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"line {getattr(error, 'lineno', 1)}"
        mend = "It must be JSON like servers.json.example."
        place = getattr(error, "pos", 0)
        # Python 3.13 says where the comma is, older ones where the bracket is
        if re.search(r",\s*[\]}]$", text[: place + 1]) or re.match(r",\s*[\]}]", text[place:]):
            mend = 'A comma stands before a "]" or "}": take it out.'
        raise SettingsError(f"{path}: {where}: this is no JSON. {mend}") from None
    if not isinstance(items, list) or not items:
        raise SettingsError(
            f'{path}: it must be a list of servers: [{{"host": "...", "secret": "..."}}, ...]'
        )
    entries: dict[str, Entry] = {}
    for count, item in enumerate(items, 1):
        entry = read_entry(f"{path}: entry {count}", item)
        if entry.host in entries:
            raise SettingsError(
                f"{path}: entry {count} ({entry.host}): an earlier one has this host. Take one out."
            )
        entries[entry.host] = entry
    return tuple(entries.values())


def read_entry(where: str, item: object) -> Entry:
    """An entry of servers.json, checked. Raises SettingsError."""
    if not isinstance(item, dict):
        raise SettingsError(f'{where}: it must look like {{"host": "...", "secret": "..."}}.')
    host = base_url(item.get("host"))
    if host:
        where = f"{where} ({host})"
    # each name once, and first those that must be there
    for name in dict.fromkeys(["host", "secret", *item]):
        if name not in ENTRY_RULES:
            raise SettingsError(
                f"{where}: {json.dumps(name):.99} is no key. Known are {', '.join(ENTRY_RULES)}."
            )
        if name not in item:
            raise SettingsError(f'{where}: "{name}" is missing. It {ENTRY_RULES[name][1]}.')
        test, rule = ENTRY_RULES[name]
        if not test(item[name]):
            found = f", not {shown(item[name])}"
            if name == "secret" or (name == "host" and not re.search("[.:/]", found)):
                # the two may have been swapped
                found = ""
            raise SettingsError(f'{where}: "{name}" {rule}{found}.')
    return Entry(**{**item, "host": host, "secret": item["secret"].strip()})


def shown(value: object) -> str:
    """A value of servers.json for a message: short, and without the password of a URL."""
    if isinstance(value, (list, dict)):
        return "a list, or an object"
    text = re.sub('[^"/]*@', "...@", re.sub("//.*@", "//...@", json.dumps(value)))
    return text[:99]


def read_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Our own secrets, from the environment and from the file that it names.

    Raises SettingsError.
    """
    mend = "Set it to what the front ends shall use, such as the output of: openssl rand -hex 32"
    path = environment.get("TINYSCALE_SECRET_FILE", "")
    text = environment.get("TINYSCALE_SECRET", "")
    found = [("TINYSCALE_SECRET", secret.strip()) for secret in text.split(",") if text]
    if path:
        where = f"TINYSCALE_SECRET_FILE {path}"
        lines = read_text("TINYSCALE_SECRET_FILE", path).splitlines()
        found += [(where, line.strip()) for line in lines if line.strip()]
    if not found:
        raise SettingsError(f"TINYSCALE_SECRET {path}: there is none. {mend}")
    for where, secret in found:
        if not is_usable_secret(secret):
            raise SettingsError(f"{where}: a secret is blank, or cannot be printed. {mend}")
        if secret[0] in "\"'" or secret.startswith("TINYSCALE_"):
            raise SettingsError(f"{where}: a secret has quotes, or NAME= before it. Take them out.")
    return tuple(secret for _, secret in found)


def read_tls(environment: Mapping[str, str]) -> ssl.SSLContext | None:
    """The TLS of the listener; None for plain HTTP. Raises SettingsError."""
    certificate = environment.get("TINYSCALE_CERT", "")
    key = environment.get("TINYSCALE_KEY") or None
    if not certificate and not key:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # a pass phrase is never asked for
        tls.load_cert_chain(certificate, key, lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "they do not fit"
        where = f"TINYSCALE_CERT {certificate}, TINYSCALE_KEY {key or 'in it'}"
        raise SettingsError(
            f"{where}: {reason}. They must be PEM files that belong together."
        ) from None
    return tls


def certificate_end(path: str) -> float:
    """When the first certificate of a PEM file ends, as time.time; 0 if that cannot be told."""
    with contextlib.suppress(OSError, ValueError, SettingsError):
        pem = read_text("TINYSCALE_CERT", path)
        begin = pem.index("-----BEGIN CERTIFICATE")
        der = ssl.PEM_cert_to_DER_cert(
            pem[begin : pem.index("-----END CERTIFICATE-----", begin) + 25]
        )
        # Python's ssl decodes only the certificate of a peer. X.509 has two times in a row: from,
        # and until; of the year two digits (UTCTime) or four
        match = re.search(rb"[\x17\x18].\d+Z[\x17\x18].(\d+)Z", der, re.DOTALL)
        text = match[1].decode() if match else ""
        year = "%y" if len(text) == 12 else "%Y"
        return float(calendar.timegm(time.strptime(text, f"{year}%m%d%H%M%S")))
    return 0


def read_warnings(environment: Mapping[str, str], paths: Iterable[str]) -> list[str]:
    """What is not right, but no reason to refuse."""
    known = ", ".join(VARIABLES)
    names = [name for name in environment if name.startswith("TINYSCALE_")]
    strange = [name for name in sorted(names) if name not in VARIABLES]
    warnings = [f"{name} is no setting of tinyscale. Known are {known}." for name in strange]
    certificate = environment.get("TINYSCALE_CERT", "")
    for path in paths:
        if path != certificate and is_open(path):
            mend = f"chmod o-rw {path}"
            warnings.append(f"{path} holds secrets, but is open to everyone. Mend it with: {mend}")
    if certificate and 0 < certificate_end(certificate) < time.time():
        warnings.append(f"TINYSCALE_CERT {certificate} has expired. No front end will accept it.")
    has_address = bool(environment.get("PORT") or environment.get("TINYSCALE_BIND"))
    if read_systemd(environment).is_socket_unit and has_address:
        warnings.append("PORT and TINYSCALE_BIND do not count: ListenStream= of the socket does.")
    return warnings


def is_open(path: str) -> bool:
    """Whether everyone on this host may read a file, or write to it."""
    return os.path.isfile(path) and bool(os.stat(path).st_mode & 0o006)


def is_journal(stream: str) -> bool:
    """Whether stderr goes to systemd's journal.

    JOURNAL_STREAM is its device:inode, but a program inherits that with another stderr, too.
    """
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return stream == f"{stat.st_dev}:{stat.st_ino}"


def stamp(path: str) -> str:
    """What changes when a file, its name or its mode is changed; "" if there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    return f"{stat.st_ino} {stat.st_ctime_ns} {stat.st_size}"


def read_systemd(environment: Mapping[str, str]) -> Systemd:
    """What systemd wants of us. Raises SettingsError."""
    is_socket_unit = environment.get("LISTEN_PID") == str(os.getpid())
    if is_socket_unit and environment.get("LISTEN_FDS") != "1":
        raise SettingsError(
            "LISTEN_FDS: there must be one socket. Leave one ListenStream= in the socket unit."
        )
    journal = is_journal(environment.get("JOURNAL_STREAM", ""))
    return Systemd(environment.get("NOTIFY_SOCKET", ""), is_socket_unit, journal)


def read_settings(environment: Mapping[str, str], needs_servers: bool = True) -> Settings:
    """All settings: the only place that looks at the environment, but for OpenSSL's SSL_CERT_FILE.

    Raises SettingsError.
    """
    port = environment.get("PORT") or "3005"
    placement = environment.get("TINYSCALE_PLACEMENT") or "turn"
    password = environment.get("TINYSCALE_STATUS_PASSWORD", "").strip()
    servers_file = environment.get("TINYSCALE_SERVERS") or "servers.json"
    authorities = environment.get("SSL_CERT_FILE", "")
    names = ("TINYSCALE_SECRET_FILE", "TINYSCALE_CERT", "TINYSCALE_KEY")
    paths = [servers_file, *filter(None, map(environment.get, names))]
    stamps = {path: stamp(path) for path in paths}
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise SettingsError(f"PORT: {port!r:.50} is no port. It must be a number up to 65535.")
    if placement not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise SettingsError(f"TINYSCALE_PLACEMENT: {placement!r:.50} is none. Known are {known}.")
    if not password.isprintable():
        raise SettingsError("TINYSCALE_STATUS_PASSWORD: it cannot be printed. Write it in UTF-8.")
    if authorities and not os.path.isfile(authorities):
        raise SettingsError(
            f"SSL_CERT_FILE: there is no file {authorities}. Correct it, or unset it."
        )
    entries = read_servers(servers_file) if needs_servers else ()
    secrets = read_secrets(environment)
    bind = environment.get("TINYSCALE_BIND", "")
    tls = read_tls(environment)
    systemd = read_systemd(environment)
    warnings = read_warnings(environment, paths)
    return Settings(
        entries, secrets, bind, int(port), placement, tls, password, systemd, warnings, stamps
    )


# ---- systemd, the log ----------------------------------------------------------------------------


def notify(settings: Settings, state: str) -> None:
    """Tell systemd a state of ours, if it asked for that."""
    if not settings.systemd.notify_socket:
        return
    # a name that begins with @ is an abstract one
    address = re.sub("^@", "\0", settings.systemd.notify_socket)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning(
            "systemd cannot be told %s: %s. Allow AF_UNIX in the unit", state, error.strerror
        )


def listen(settings: Settings) -> socket.socket:
    """The listener: systemd's, which is file 3, or our own. Raises OSError, or SettingsError."""
    if settings.systemd.is_socket_unit:
        try:
            listener = socket.socket(fileno=3)
        except OSError:
            raise SettingsError("LISTEN_FDS: file 3 is no socket. Start it by systemd.") from None
        if listener.type != socket.SOCK_STREAM or listener.family not in (
            socket.AF_INET,
            socket.AF_INET6,
        ):
            raise SettingsError(
                "LISTEN_FDS: the socket is none of TCP. Use ListenStream= with a port."
            )
        return listener
    is_dual = not settings.bind and socket.has_dualstack_ipv6()
    host = settings.bind or ("::" if is_dual else "0.0.0.0")
    try:
        addresses = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if error.args[0] == socket.EAI_AGAIN:
            # the network is not there yet
            raise
        where = f"TINYSCALE_BIND: {settings.bind!r:.99}"
        raise SettingsError(f"{where} is no address. Use one of this host.") from None
    family, _, _, _, address = addresses[0]
    return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)


class LogHandler(logging.handlers.QueueHandler):
    """Hands lines to a thread that writes them.

    Who reads them slowly, or not at all, stops no call.
    """

    lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1

    def is_written(self) -> bool:
        return bool(self.queue.unfinished_tasks == 0)  # type: ignore[attr-defined]


JOURNAL_LEVELS = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}


class JournalFormatter(logging.Formatter):
    """Lines as systemd's journal wants them: a level before each, and no time, which it has."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = JOURNAL_LEVELS.get(record.levelno, "<5>")
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def begin_log(settings: Settings) -> LogHandler:
    """Write the log to stderr."""
    logging.raiseExceptions = False
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if settings.systemd.is_journal:
        writer.setFormatter(JournalFormatter("%(message)s"))
    handler = LogHandler(queue.Queue(MAX_LOG))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.handlers.QueueListener(handler.queue, writer).start()
    return handler


def end_log(handler: LogHandler) -> None:
    """Wait a second at most until the log is written: its reader may be gone."""
    if handler.lost:
        log.warning("%d lines of the log were lost: nobody read them", handler.lost)
    deadline = time.monotonic() + 1
    while not handler.is_written() and time.monotonic() < deadline:
        time.sleep(0.01)


# ---- commands ------------------------------------------------------------------------------------


def words(error: OSError) -> str:
    """The system's words for an error, without what Python adds."""
    return os.strerror(error.errno) if error.errno else str(error)


def connection_limit() -> int:
    """How many clients there may be.

    They get a third of the files that may be open: each may need two servers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(10, min(MAX_CONNECTIONS, soft // 3))


def apply(balancer: Balancer, settings: Settings) -> None:
    """Use these settings from now on."""
    balancer.settings = settings
    balancer.mistake = ""
    for warning in settings.warnings:
        log.warning("%s", warning)
    for server in balancer.directory.use(settings.entries, settings.placement):
        threading.Thread(target=watch, args=(balancer.directory, server), daemon=True).start()


def reload(balancer: Balancer, environment: Mapping[str, str], is_forced: bool) -> None:
    """Read the settings again if a file has changed.

    All of them count, or, if there is a mistake, none.
    """
    stamps = {path: stamp(path) for path in balancer.settings.stamps}
    if stamps == balancer.seen_stamps and not is_forced:
        return
    balancer.seen_stamps = stamps
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        balancer.mistake = str(error)
        log.error("%s The settings stay as they were; a restart would fail.", error)
        return
    apply(balancer, settings)
    files = ", ".join(settings.stamps)
    count = len(settings.entries)
    log.info("read again: %s: %d servers, %d secrets", files, count, len(settings.secrets))


def watch_files(balancer: Balancer, environment: Mapping[str, str], wake: threading.Event) -> None:
    """Look for changed files, for ever."""
    while True:
        is_forced = wake.wait(SURVEY_INTERVAL)
        wake.clear()
        try:
            reload(balancer, environment, is_forced)
        except Exception as error:
            # whatever it is, there must be a next look
            log_error("reading the settings", error)


def drain(balancer: Balancer) -> None:
    """Take no more connections, and wait for the calls in progress."""
    balancer.is_stopping = True
    balancer.shutdown()
    deadline = time.monotonic() + 1
    is_ours = not balancer.settings.systemd.is_socket_unit
    # what waits to be accepted would be reset; but a socket unit hands it to the next process
    while is_ours and is_readable(balancer.socket) and time.monotonic() < deadline:
        balancer.handle_request()
    balancer.server_close()
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while balancer.is_busy() and time.monotonic() < deadline:
        time.sleep(0.01)
    log.info("stopped with calls in progress" if balancer.is_busy() else "stopped")


SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def serve(environment: Mapping[str, str]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises SettingsError."""
    # before any thread begins: each inherits it, and only sigwait receives them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = read_settings(environment)
    handler = begin_log(settings)
    limit = connection_limit()
    try:
        balancer = Balancer(settings, Directory(), listen(settings), limit)
    except OSError as error:
        # it may pass by itself, so it is no mistake
        where = f"PORT {settings.port}, TINYSCALE_BIND {settings.bind or 'all addresses'}"
        log.error("%s: %s. Choose another, or stop who has it", where, words(error))
        end_log(handler)
        return 1
    apply(balancer, settings)
    wake = threading.Event()
    threading.Thread(target=watch_files, args=(balancer, environment, wake), daemon=True).start()
    threading.Thread(target=balancer.serve_forever, args=(0.05,), daemon=True).start()
    port = balancer.socket.getsockname()[1]
    count = len(settings.entries)
    log.info("tinyscale %s listens on port %d, with %d servers", __version__, port, count)
    notify(settings, "READY=1")
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        wake.set()
    stop(balancer)
    end_log(handler)
    return 0


def stop(balancer: Balancer) -> None:
    """Answer what is in progress, and nothing new. A second signal ends at once, as PID 1 too."""
    log.info("stopping")
    notify(balancer.settings, "STOPPING=1")
    for last in (signal.SIGINT, signal.SIGTERM):
        signal.signal(last, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS - {signal.SIGHUP})
    drain(balancer)


def accepted_algorithms(server: Server) -> list[str]:
    """The digests with which a server takes our checksum."""
    accepted = []
    for digest in ALGORITHMS.values():
        other = Server(replace(server.entry, checksum=digest))
        with contextlib.suppress(Unavailable):
            other.ask(ApiCall("getMeetings"))
            accepted.append(digest)
    return accepted


def examine(server: Server) -> str:
    """What check says of a server: a line, which ends in the mend if it is unusable."""
    directory = Directory()
    directory.servers = [server]
    with contextlib.suppress(Unavailable):
        survey(directory, server)
    digests = []
    # the word is that of Server.judge
    if server.is_up or "checksum" in server.reason:
        digests = accepted_algorithms(server)
    if server.is_up:
        version = server.version or "?"
        line = (
            f"{server!s:40} {state_of(server):8} {1000 * server.took:5.0f} ms, BBB {version:8.8} "
        )
        line += f"{' '.join(digests):27} certificate {days_left(server)}, "
        return line + f"{len(server.listed)} meetings, {people_on(server)} people"
    mend = server.reason
    for sign_of, advice in MENDS:
        if re.search(sign_of, server.reason):
            mend = f"{server.reason}. {advice}"
            break
    if digests:
        mend = f'the secret is right, but not the digest: set "checksum": "{digests[0]}"'
    return f"{server!s:40} UNUSABLE: {mend}"


# What a failure looks like, and what mends it.
MENDS = (
    (
        "WRONG_VERSION_NUMBER|wrong version|record layer",
        "It speaks plain HTTP there: write http://",
    ),
    ("HTTP 400|RemoteDisconnected|BadStatusLine", "It may want HTTPS: write https://"),
    ("HTTP 3", "It redirects: write the address that it redirects to, mostly https://"),
    ("HTTP 40[13]", "A proxy before it refuses us: let it pass the address of this host"),
    (
        "HTTP 404",
        "There is no BBB at this address: compare it with 'bbb-conf --secret' there",
    ),
    ("HTTP 50[234]", "The proxy there runs, but not BBB behind it: try 'bbb-conf --status' there"),
    ("CERTIFICATE_VERIFY_FAILED", "Renew its certificate, or name its authority in SSL_CERT_FILE"),
    (
        "Name or service|not known|resolution",
        "Its name is not known here: check the spelling, and DNS",
    ),
    (
        "refused|timed out|no answer|unreachable",
        "Check that it runs, and that its firewall lets this host in",
    ),
)


def is_served(settings: Settings) -> bool:
    """Whether a tinyscale answers at our port."""
    host = settings.bind or "localhost"
    connection = http.client.HTTPConnection(host, settings.port, timeout=CONNECT_TIMEOUT)
    if settings.tls:
        # only to see whether it is there: our certificate has another name than localhost
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname = False
        anyone.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            host, settings.port, timeout=CONNECT_TIMEOUT, context=anyone
        )
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().read(99) in (HEALTHY, NOT_HEALTHY)
    return False


def check_port(settings: Settings) -> str:
    """What is wrong with our own port; "" if a tinyscale answers there, or nobody has it."""
    if settings.systemd.is_socket_unit or is_served(settings):
        return ""
    try:
        listen(settings).close()
    except OSError as error:
        return f"port {settings.port}: {words(error)}. Choose another, or stop who has it."
    return ""


def check(environment: Mapping[str, str]) -> int:
    """Try every server and our own settings, and print what came of it.

    Return 1 if a server must be mended.
    """
    settings = read_settings(environment)
    servers = [Server(entry) for entry in settings.entries]
    # the lines that are printed say it all
    logging.disable()
    threads = futures.ThreadPoolExecutor(len(servers))
    for line in threads.map(examine, servers):
        print(line, flush=True)
    port_trouble = check_port(settings)
    trouble = [*settings.warnings, *filter(None, [port_trouble])]
    for line in trouble:
        print(f"tinyscale itself: {line}", flush=True)
    bad = [server for server in servers if not server.is_up]
    if bad:
        mend = f"Mend {len(bad)} of {len(servers)} servers, or take them out of the list."
        print(mend, flush=True)
    if not bad and not trouble:
        print("All is well.", flush=True)
    return 1 if bad or port_trouble else 0


def print_url(environment: Mapping[str, str], text: str) -> int:
    """Print the signed URL of a call."""
    settings = read_settings(environment, needs_servers=False)
    call, _, query = text.partition("?")
    if not re.fullmatch("[A-Za-z0-9]+(/[A-Za-z0-9]+)*([?][!-~]*)?", text):
        raise SettingsError(
            f"url: {text!r:.99} is no call. Write it like 'getMeetingInfo?meetingID=room+7'."
        )
    host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind or "localhost"
    scheme = "https" if settings.tls else "http"
    signed = sign(call, query, settings.secrets[0])
    print(f"{scheme}://{host}:{settings.port}/bigbluebutton/api/{call}?{signed}", flush=True)
    return 0


HELP_END = """
signals:
  SIGHUP reads the files again, SIGTERM and SIGINT end in good order

exit status:
  0 stopped, or all is well
  1 the port cannot be had; check: something must be mended
  2 a mistake in the settings

example:
  TINYSCALE_SECRET=... python3 tinyscale.py check --servers servers.json
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    described = "\n".join(f"  {name:26}{text}" for name, text in VARIABLES.items())
    parser = argparse.ArgumentParser(
        "tinyscale.py",
        description="Makes several BigBlueButton servers look like one. README.md tells more.",
        epilog=f"environment:\n{described}\n{HELP_END}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="serve",
        choices=("serve", "check", "url"),
        help="(default: serve)",
    )
    parser.add_argument("call", nargs="?", help="for url, such as 'getMeetingInfo?meetingID=x'")
    for name in ("PORT", "TINYSCALE_BIND", "TINYSCALE_SERVERS"):
        flag = "--" + name.rpartition("_")[2].lower()
        parser.add_argument(flag, dest=name, help=f"instead of {name}")
    parser.add_argument("--version", action="version", version=f"tinyscale {__version__}")
    options = parser.parse_intermixed_args(arguments)
    if options.call and options.command != "url":
        parser.error(f"{options.command} takes no {options.call!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    given = {name: value for name, value in vars(options).items() if name in VARIABLES}
    environment = dict(os.environ)
    environment.update((name, value) for name, value in given.items() if value is not None)
    try:
        if options.command == "serve":
            return serve(environment)
        if options.command == "check":
            return check(environment)
        return print_url(environment, options.call or "getMeetings")
    except SettingsError as error:
        level = "<3>" if is_journal(environment.get("JOURNAL_STREAM", "")) else ""
        print(f"{level}tinyscale: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError:
        # mostly: who reads what we print is gone
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # not sys.exit: Python would wait for threads that may wait for a hung server
    os._exit(main())
