#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

It verifies the checksum of each API call, finds the server that runs the meeting, signs the call
again with that server's secret and relays the answer. A meeting that exists nowhere is created on
the next server of servers.json, or on the one with the least load.

The way of a call:

    Balancer.process_request   gets an accepted connection, which a thread of a pool serves
    Handler.serve              begins with TLS, and closes it at the end
    Handler.handle             reads one request, writes one answer
    Handler.read_head          reads its head; parse_head refuses what is no plain HTTP
    Handler.read_call          verifies the checksum, then reads the body
    ROUTES[call].handle        chooses the server, or asks all of them (Part II)
    Server.call                has the call signed with that server's secret, and sent
    Handler.respond            writes a line in the log, and the answer

Kept in memory, in one Directory, behind its lock: where each meeting was last seen, and which
creates are on their way. The servers are asked every ten seconds, so a restart loses nothing but
what a silent server alone knows.

To audit, read Part I, and the tables ROUTES and PAGES. Begin with verify, then parse_head, Handler
and Connections. Outside of Part I secrets are read by read_settings and what it calls; print_url
signs; apply, check, Directory.use and examine hand entries on; join hands out a URL that was
signed. No secret is ever an argument of the command line. XML that servers send is parsed by parse
alone, with the patterns above it; Answer.returncode, judge, is_denial, items_of,
relay_recording and destroy_hook search its bytes for a word.
Three more things outside of Part I touch every connection: listen and read_tls make the listener,
connection_limit says how many connections there may be, and count_call counts calls.

Every server is trusted with every meeting: the one that says it has a meeting gets its calls.
"""

from __future__ import annotations

import argparse
import base64
import collections
import email.utils
import errno
import hashlib
import hmac
import html
import http.client
import http.server
import io
import json
import logging.handlers
import os
import queue
import re
import resource
import select
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import (
    Any,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    cast,
)
from urllib.parse import quote_plus, unquote_plus

__version__ = "2.0"
log = logging.getLogger("tinyscale")

# ==== Part I: secrets and strangers ===============================================================

# ---- limits: seconds, bytes, or how many ---------------------------------------------------------

# To reach an address of a server, and again for its TLS handshake. DNS has no limit.
CONNECT_TIMEOUT = 3
# After a deadline for an answer we read on for so long: if our machine was paused, the answer may
# have come, and nobody has read it.
LATE = 0.5
# For a client's TLS handshake, the head of its request and a form together; and, after a refusal,
# to read on what it still sends.
HEAD_TIMEOUT = 10
# After that a client may be slow, but not silent for longer. A proxy before us gives up first:
# nginx waits 60.
SILENCE_TIMEOUT = 75
# Connections that are kept to a server, and how old they may be: BBB's nginx closes idle ones after
# 75 s, and its address may change.
MAX_KEPT = 32
KEPT_FOR = 30
# The head of a request, or a form.
MAX_HEAD = 64 * 1024
# What is read at a time. An eighth of it is written at a time: for each such piece a slow client
# has SILENCE_TIMEOUT anew.
CHUNK = 64 * 1024
# A body, slides for example; and all bodies at one time. read_body holds each twice for a moment.
MAX_BODY = 100 * 1024 * 1024
MAX_BODIES = 256 * 1024 * 1024
# A server's answer.
MAX_ANSWER = 32 * 1024 * 1024
# Parameters of a call, many more than any has: each costs time before its checksum is verified.
MAX_PARAMETERS = 1000
# A form up to this length is sent on as the query of a URL, which every version of BBB takes; but
# nginx and Tomcat refuse URLs of 8 KiB. A longer one is sent on as a form.
MAX_QUERY = 7000

# ---- settings ------------------------------------------------------------------------------------

# By their length in hex, as BBB tells them apart: the caller chooses, and no setting forbids one.
# Old front ends have only SHA-1. It is weak where somebody can make two texts with one digest: a
# pupil who chooses a name, which a front end signs in a join, could try to make that checksum fit
# another call, too. But both texts would have to be URL-encoded, and to begin with what the front
# end writes before the name: no such texts are known.
ALGORITHMS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}


# Without a repr: it could show the secret.
@dataclass(frozen=True, repr=False)
class Entry:
    """An entry of servers.json, its values checked by ENTRY_RULES."""

    # its URL without /bigbluebutton, see base_url: ASCII, no "?", "#" or "@"
    host: str
    secret: str
    weight: int = 1
    cordoned: bool = False
    # the digest for its checksums
    checksum: str = "sha256"


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings, of the environment and of the files that it names, checked by read_settings."""

    entries: tuple[Entry, ...]
    # of the front ends
    secrets: tuple[str, ...]
    # "" for all addresses
    bind: str
    port: int
    # one of PLACEMENTS
    placement: str
    tls: ssl.SSLContext | None
    # "": /status and /metrics are not there
    status_password: str
    # where systemd wants to be told that we are ready
    notify_socket: str
    # the listener comes from a socket unit
    is_socket_unit: bool
    # stderr is systemd's journal
    is_journal: bool
    # what is not right, but no reason to refuse
    warnings: Sequence[str]
    # the stamp of each file when it was read last: it changes when the file does
    stamps: dict[str, str]


# ---- checksums -----------------------------------------------------------------------------------


def checksum(name: str, query: str, secret: str, algorithm: str) -> str:
    """The hex checksum of a call: over its name, its raw query without a checksum, and a secret.

    The rule is that of BBB's API documentation. Nothing stands between the name and the query, so a
    checksum fits other pairs of them, too: see CALL_PATH for what that means.
    """
    return hashlib.new(algorithm, (name + query + secret).encode()).hexdigest()


def sign(name: str, query: str, secret: str, algorithm: str = "sha256") -> str:
    """The raw query with its checksum."""
    signature = f"checksum={checksum(name, query, secret, algorithm)}"
    return f"{query}&{signature}" if query else signature


def without(query: str, *names: str) -> str:
    """The raw query less the parameters of these decoded names.

    The rest stays byte for byte, empty parts too.
    """
    return "&".join(
        part for part in query.split("&") if unquote_plus(part.partition("=")[0]) not in names
    )


def verify(
    call_name: str, query: str, secrets: Sequence[str], is_form: bool = False
) -> tuple[str, dict[str, str]]:
    """Verify the checksum in a raw query. Return the query without it, and the decoded parameters.

    A form is what is sent instead of a query, see Handler.read_call. It is verified over its raw
    text or, as BBB does since 2.6.18, over the empty query. This is a weakness of BBB, which we
    must have, too: who knows the checksum of a call over the empty query can send any form to that
    same call, to create for example. Such a checksum is known to front ends that send forms in that
    way, and to who can read queries in the log of a proxy. It is not known to a guest, whose join
    has parameters, and is never a form.

    Raises ApiError if the checksum is missing, wrong or repeated.
    """
    refused = ApiError("checksumError", "Checksums do not match")
    params: dict[str, str] = {}
    parts = query.split("&")
    if len(parts) > MAX_PARAMETERS:
        raise refused
    # not by parse_qsl: some versions of it take a semicolon for a separator
    for part in parts:
        raw_name, _, raw_value = part.partition("=")
        name = unquote_plus(raw_name)
        # of a repeated checksum, meetingID or recordID some of BBB's calls take the first, and some
        # the last. A guest could slip in a second one, by the name "Ann&meetingID=x", if a front
        # end forgets to encode it; then we could choose another meeting than BBB. So it is refused
        if name in params and name in ("checksum", "meetingID", "recordID"):
            raise refused
        # of all others the first counts, as in BBB. (We act on redirect, parentMeetingID, the
        # passwords, and what says which recordings or hook are meant)
        params.setdefault(name, unquote_plus(raw_value))

    given = params.get("checksum", "")
    algorithm = ALGORITHMS.get(len(given))
    # as BBB, we do not take it for a checksum if its name or value is written with %
    if algorithm is None or f"checksum={given}" not in parts:
        raise refused
    unsigned = without(query, "checksum")
    signed_texts = [unsigned, ""] if is_form else [unsigned]
    for text in signed_texts:
        for secret in secrets:
            right = checksum(call_name, text, secret, algorithm)
            # in hex of either case, as to BBB; a blank secret never verifies anything
            if secret.strip() and hmac.compare_digest(right.encode(), given.lower().encode()):
                return unsigned, params
    raise refused


# ---- calls ---------------------------------------------------------------------------------------

FORM = "application/x-www-form-urlencoded"
# With this field a browser runs no script, under our name, that a hostile server has put into its
# answer. It is in all of these, and in our own XML; our pages have another one.
SANDBOX = ("Content-Security-Policy", "sandbox")
# What every answer of BBB begins with. `parse` in Part II cuts off what stands before <response>:
# no DTD gets to the parser, which could declare entities, with which a small text grows to
# gigabytes.
RETURNCODE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml [^>]*>\s*)?"
    rb"<response>\s*<returncode>(SUCCESS|FAILED)</returncode>"
)


class Answer(NamedTuple):
    """An answer, a server's or our own."""

    status: int
    body: bytes = b""
    # without the charset some clients would read Latin-1
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "text/xml;charset=utf-8"), SANDBOX)

    @property
    def returncode(self) -> str:
        """SUCCESS or FAILED, which is the first element of BBB's answers; "" if it is none."""
        match = RETURNCODE.match(self.body)
        return match[1].decode() if match else ""


# Exceptions must have a hash: dataclass takes it away with its own comparison.
@dataclass(eq=False)
class ApiError(Exception):
    """A call that is refused, with BBB's messageKey and message, and an HTTP status.

    BBB refuses with 200.
    """

    key: str
    message: str
    status: int = 200
    # for the log: which server it is about, and why that one
    note: str = ""
    # what the caller gets instead of `answer`: a page for a browser (join), or the refusal that all
    # servers answered (ask_all)
    page: Answer | None = None

    def answer(self) -> Answer:
        """In BBB's shape. The words are our own: there is nothing to escape."""
        text = (
            "<response><returncode>FAILED</returncode>"
            f"<messageKey>{self.key}</messageKey><message>{self.message}</message></response>"
        )
        return Answer(self.status, text.encode())


class Unavailable(ApiError):
    """A call failed, and no other server may get it.

    For the server MAY have carried it out; or the call is for a meeting that is held for a server.
    NotCarriedOut, a kind of it, is the other case.
    """

    def __init__(self, note: str = "no server is up") -> None:
        super().__init__(
            "serverUnavailable",
            "The server cannot be reached now. Please try again in a minute.",
            note=note,
        )


class NotCarriedOut(Unavailable):
    """A call failed, and the server has NOT carried it out: another one may get it."""


@dataclass
class ApiCall:
    """A call, a client's that was verified or one of our own."""

    # what follows /bigbluebutton/api/
    name: str
    # raw, without its checksum: it goes on byte for byte
    query: str = ""
    # decoded, with the checksum: so those of a call that was verified are never empty, and is_busy
    # relies on that. Empty until then, and for a call of our own
    params: dict[str, str] = field(default_factory=dict)
    # slides or a file, which the checksum does not cover; makes the call a POST
    body: bytes = b""
    # of the body. But FORM means that the query came as a form, and there is no body: sign_again
    # may send the query as a form again
    content_type: str = ""
    # a person in a browser waits for the answer
    wants_html: bool = False
    # for the log: which server, and why that one
    note: str = ""

    @property
    def route(self) -> Route:
        """Its properties: see Route."""
        return ROUTES.get(self.name, OTHER_CALL)

    @property
    def meeting_id(self) -> str:
        return self.params.get("meetingID", "")


# ---- one BBB server ------------------------------------------------------------------------------

# The system's authorities, or those of SSL_CERT_FILE or SSL_CERT_DIR. TLS 1.2 is the default only
# since Python 3.10.
TRUST = ssl.create_default_context()
TRUST.minimum_version = ssl.TLSVersion.TLSv1_2
# As before Python 3.13, which refuses the authorities that many schools made for themselves, for a
# matter of form. The chain, the name and the dates are verified all the same.
TRUST.verify_flags &= ~ssl.VERIFY_X509_STRICT

# The fields of an answer that are passed on, of whatever call. A join with redirect=false needs the
# cookie that BBB sets. So a server can set cookies for our name, and for the domain above it: that
# is accepted.
PASSED_ON = ("content-type", "location", "set-cookie")


class SignedRequest(urllib.request.Request):
    """A signed call on its way to a server."""

    # set by sign_again: it does no harm if a server sees it twice
    may_repeat = False
    # set by do_open: a kept connection turned out closed, so the server may have seen it twice
    was_repeated = False
    # set by exchange: when the answer must be there; a repeat does not get a new deadline
    deadline = 0.0


class Drops(socket.SocketIO):
    """What a server sends, in however many drops, until a deadline. Raises socket.timeout."""

    is_late = False

    def __init__(self, sock: socket.socket, deadline: float, file: object) -> None:
        super().__init__(sock, "r")
        self.sock = sock
        self.deadline = deadline
        # http.client's own file, in whose place Drops is read. It keeps the socket open: if the
        # server wants the connection to end, http.client closes it before the body has been read,
        # and the socket closes with its own last file, of which Drops is none. Python closes a file
        # that nobody keeps
        self.file = file

    def readinto(self, buffer: Any) -> Any:
        now = time.monotonic()
        if now > self.deadline:
            if self.is_late:
                raise socket.timeout("timed out")
            # the read before this one ended in time, for settimeout, below, ends one that does not.
            # But our machine may have been paused since: so reading goes on for LATE, but only once
            self.is_late = True
            self.deadline = now + LATE
        # 0 would mean: do not wait at all
        self.sock.settimeout(max(0.001, self.deadline - now))
        return super().readinto(buffer)


class Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's handler for one BBB server, whose connections stay open for the next call.

    It is the base of Server in Part II, and the one place where a server's secret is used. urllib
    makes a request of the URL, and the connection that its scheme needs.

    A server may close a kept connection just as we write to it, and nobody knows then whether it
    saw the request. So only what may be sent twice rides on one.
    """

    def __init__(self, entry: Entry) -> None:
        # this is HTTPSHandler's, as HTTPHandler has no __init__ of its own
        super().__init__(context=TRUST)
        # replaced as a whole, by Directory.use, when servers.json changes; always one with the same
        # host. A kept connection has no secret: each call is signed anew
        self.entry = entry
        # the end of its certificate, as time.time; 0 if that is not known
        self.certificate_end = 0.0
        # connections for the next calls; to append and to pop is one step in Python, so many
        # threads may
        self.kept: list[Any] = []
        # an opener that has this handler alone, and is self.parent from now on. So its open calls
        # our do_open, and returns what that returns. The usual one would follow redirects, use the
        # proxies of the environment, and raise for a status from 400 on
        urllib.request.OpenerDirector().add_handler(self)

    def __str__(self) -> str:
        return self.entry.host

    def url_for(self, call: str, query: str) -> str:
        """The URL of a call, signed with this server's secret."""
        # read once: servers.json may change meanwhile
        entry = self.entry
        signed = sign(call, query, entry.secret, entry.checksum)
        return f"{entry.host}/bigbluebutton/api/{call}?{signed}"

    def sign_again(self, call: ApiCall) -> SignedRequest:
        """The call as a request to this server.

        A form that is too long for a URL stays a form. BBB takes that since 2.6.18, see verify; an
        older one refuses it.
        """
        body = call.body
        url = self.url_for(call.name, call.query)
        if call.content_type == FORM and len(call.query) > MAX_QUERY:
            # its checksum is over the empty query, see verify
            url, _, signature = self.url_for(call.name, "").partition("?")
            body = f"{call.query}&{signature}".encode()
        request = SignedRequest(url, body or None, {"User-Agent": f"tinyscale/{__version__}"})
        if body:
            request.add_header("Content-Type", call.content_type)
            return request
        # a create that names both passwords is answered duplicateWarning, a SUCCESS, the second
        # time; if BBB had made up one itself, the repeat would be refused
        has_passwords = call.params.get("attendeePW") and call.params.get("moderatorPW")
        request.may_repeat = call.route.is_read or (call.name == "create" and bool(has_passwords))
        return request

    def send(self, request: SignedRequest, timeout: float) -> Answer:
        """Send a request and return the whole answer.

        Raises URLError if there is no connection. Else, if the server may have seen the request,
        socket.timeout for its silence, or another OSError, HTTPException or ValueError.
        """
        # what do_open returns
        return cast(Answer, self.parent.open(request, timeout=timeout))

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        """What urllib calls to send a request, and returns: the answer.

        As its own, but a kept connection comes first.
        """
        kept = self.take() if req.may_repeat else None
        if kept is not None:
            with suppress(ConnectionError, ssl.SSLEOFError):
                return self.exchange(kept, req)
            req.was_repeated = True
        fresh = http_class(req.host, timeout=CONNECT_TIMEOUT, **options)
        try:
            fresh.connect()
        except OSError as error:
            fresh.close()
            if req.was_repeated:
                # it may have been carried out the first time, so this is no URLError
                raise
            raise urllib.error.URLError(error) from error
        fresh.opened = time.monotonic()
        if req.type == "https":
            self.certificate_end = ssl.cert_time_to_seconds(fresh.sock.getpeercert()["notAfter"])
        return self.exchange(fresh, req)

    def take(self) -> Any:
        """A kept connection that is still good: nothing can be read from it, not even its end.

        None if there is none. The one that rested longest comes first: an old one is closed only
        here, so each must have its turn.
        """
        with suppress(IndexError):
            while True:
                connection = self.kept.pop(0)
                is_young = time.monotonic() - connection.opened < KEPT_FOR
                if is_young and not is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def exchange(self, connection: Any, request: SignedRequest) -> Answer:
        """Send the request and read the whole answer; then keep the connection, or close it."""
        request.deadline = request.deadline or time.monotonic() + (request.timeout or 0)

        def timed_response(sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
            response = http.client.HTTPResponse(sock, **options)
            response.fp = io.BufferedReader(Drops(sock, request.deadline, response.fp))
            return response

        connection.response_class = timed_response
        connection.sock.settimeout(request.timeout)
        try:
            # a server may refuse a body half way: its answer is there all the same. If there is
            # none, getresponse raises ConnectionError
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                connection.request(
                    request.get_method(),
                    request.selector,
                    request.data,
                    dict(request.header_items()),
                )
            with connection.getresponse() as response:
                answer = read_answer(response)
        except BaseException:
            connection.close()
            raise
        if (
            # the server has asked for its end
            connection.sock is None
            # after a status of 1xx another answer comes
            or answer.status < 200
            # timed_response holds the request, and so this body would stay in memory
            or request.data
            or len(self.kept) >= MAX_KEPT
        ):
            connection.close()
        else:
            self.kept.append(connection)
        return answer


def is_readable(sock: socket.socket) -> bool:
    """Whether there is something to read now, or the end."""
    # not select, which fails for file numbers above 1023
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    # of TLS some may have been read already
    return bool(poll.poll(0)) or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)


def read_answer(response: http.client.HTTPResponse) -> Answer:
    """The whole answer. Raises OSError or HTTPException."""
    fields = tuple(
        # a line break would begin another field
        (name, re.sub(r"[\x00-\x1f\x7f]+\s*", " ", value))
        for name, value in response.getheaders()
        if value and name.lower() in PASSED_ON
    )
    # None if the end of the body, or of its chunks, tells it. http.client counts it down
    length = response.length
    body = bytearray()
    while len(body) != length and len(body) <= MAX_ANSWER and not response.isclosed():
        body += response.read1(CHUNK)
    # too large, or cut short
    if len(body) > MAX_ANSWER or length not in (None, len(body)):
        raise http.client.IncompleteRead(b"")
    return Answer(response.status, bytes(body), (*fields, SANDBOX))


# ---- HTTP: what strangers send -------------------------------------------------------------------

# The head of a request: the method; the target, which is printable ASCII but "#" (some proxies put
# a scheme and a host before it, which do not count); and a hundred fields at most, each a token, a
# colon, and no NUL, CR or LF.
REQUEST = re.compile(
    r"(?a)([A-Z]+) (?:https?://[\w.:\[\]-]+)?(/[!-\"$-~]*) HTTP/1[.][01]\r\n"
    r"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r\n){0,100})\r\n"
)
# A bare LF ends the reading, too, or we would wait for CR LF in vain: parse_head refuses it.
END_OF_HEAD = re.compile(rb"\r\n\r\n|(?<!\r)\n")
# A slash too many is forgiven: Greenlight 3.0.1 sends /api//create, bigbluepy join/.
#
# No call but join may begin with a j. A guest could move the "?" in a join link: a checksum covers
# a name and a query with nothing between, so it is right for joi?nmeetingID=... and
# joinm?eetingID=..., too. Such calls do not exist. But they could have a body, which may come
# slowly as the checksum is right (Handler.read_call), and so guests could fill all connections. Of
# a real join no body is read. (We trust that a guest gets no other signed URL. Who has one can do
# that.)
CALL_PATH = re.compile(r"/bigbluebutton/api/{1,2}(join|(?!j)[A-Za-z0-9]+(?:/[A-Za-z0-9]+)*)/?")
# A moment that never comes.
NEVER = float("inf")


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
    # neither Host nor Content-Length may be there twice
    if not match or re.search(r"(?ims)^(host|content-length):.*^\1:", match[3]):
        raise ApiError("badRequest", "This is no request of HTTP/1.1", 400)
    method, target, lines = match.groups()
    path, _, query = target.partition("?")
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
        log.info(f"{where} broke off: {reason}")
    else:
        way = [f"{at.name}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)]
        log.error(f"{where} failed with {type(error).__name__}. Please report this: {way}")


class Handler:
    """One connection of a client: one request, one answer.

    Nothing that follows a request is ever read as another one.
    """

    def __init__(self, balancer: Balancer, sock: socket.socket, address: str) -> None:
        self.balancer = balancer
        self.sock = sock
        self.address = address
        self.started = time.monotonic()
        # since when the client keeps us waiting:
        # - first for its head, and a form
        # - NEVER from read_call on: its checksum was right, be it that of a guest's join. We read
        #   its slides, and work for it; close_slowest spares it
        # - from respond on, to take its answer, and anew with each piece
        # - last, while linger drops what it still sends
        self.waiting_since = self.started
        self.call = ApiCall("-")
        self.head = Head("GET", "", "", {}, 0)
        # what of the head, or behind it, has been received; read_body leaves it as it is
        self.buffer = b""
        # read_body took the body: it has been read, or is being read. A body that was not taken,
        # because it was refused or belongs to a join, may still be on its way, see respond
        self.took_body = False
        # the whole answer was handed to the system
        self.is_answered = False

    def serve(self) -> None:
        """The connection from its begin to its end."""
        try:
            tls = self.balancer.settings.tls
            if tls:
                # two steps, so that close_slowest can end the handshake
                self.sock = tls.wrap_socket(
                    self.sock, server_side=True, do_handshake_on_connect=False
                )
                self.sock.settimeout(HEAD_TIMEOUT)
                self.sock.do_handshake()
            self.handle()
        except OSError as error:
            # who hangs up without having sent a thing, as a monitor that only tries the port, is no
            # news
            has_sent = self.buffer or self.head.path
            if has_sent or not isinstance(error, (ConnectionError, ssl.SSLEOFError)):
                log_error(self.address, error)
        except Exception as error:
            # whatever it is, the caller gets an answer; if that fails, too, nobody can be told
            log_error(self.call.name, error)
            bug = ApiError("internalError", "A mistake of tinyscale; see its log", 500)
            self.respond(bug.answer(), "bug")
        finally:
            self.balancer.handlers.discard(self)
            self.balancer.shutdown_request(self.sock)

    def handle(self) -> None:
        """Read one request, and answer it. Raises OSError if the client goes away before that."""
        outcome = "success"
        try:
            self.head = parse_head(self.read_head())
            answer = self.answer()
            if answer.status >= 400 or answer.returncode == "FAILED":
                outcome = "failed"
        except ApiError as error:
            answer = error.page or error.answer()
            outcome = error.key
            self.call.note = error.note or self.call.note
        self.respond(answer, outcome)

    def receive(self) -> bytes:
        """The one place that reads from a client.

        Raises OSError at the end, and socket.timeout.
        """
        seconds = self.waiting_since + HEAD_TIMEOUT - time.monotonic()
        # after the deadline: if something is in the buffer, it ends now. If not, one read of 1 ms
        # decides: if our machine was paused, the head may have come meanwhile. (The buffer is empty
        # also while a form comes whose head came alone. So who sends a byte of it each millisecond
        # has a minute for its 64 KiB, instead of 10 s: that is accepted.)
        if seconds <= 0 and self.buffer:
            raise socket.timeout("timed out")
        self.sock.settimeout(max(0.001, min(SILENCE_TIMEOUT, seconds)))
        data = self.sock.recv(CHUNK)
        if not data:
            raise ConnectionError(errno.ECONNRESET, "it hung up half way")
        return data

    def read_head(self) -> bytes:
        """The head of the request. Raises ApiError if it is too large."""
        searched = 0
        while not END_OF_HEAD.search(self.buffer, searched) and len(self.buffer) <= MAX_HEAD:
            # TLS can bring it byte by byte: no byte is searched again and again, but the last four,
            # in which an end may have begun
            searched = max(0, len(self.buffer) - 4)
            self.buffer += self.receive()
            # the first byte of a TLS handshake
            if self.buffer.startswith(b"\x16"):
                raise ConnectionError(errno.EPROTO, "it speaks HTTPS to a port of plain HTTP")
        # without that end it is all of the buffer, and parse_head refuses it
        head, end, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            raise ApiError("badRequest", "The head of the request is too large", 431)
        return head + end

    def answer(self) -> Answer:
        """The answer to the request. Raises ApiError if it is refused."""
        path = self.head.path
        page = PAGES.get(path)
        password = self.balancer.settings.status_password
        if page and (password or page in PUBLIC_PAGES):
            return self.answer_page(page, password)
        match = CALL_PATH.fullmatch(path)
        if not match:
            # cut at the first odd character, lest a query whose "?" was forgotten get into the log
            self.call.note = repr(re.sub("[^A-Za-z0-9/._-].*", "...", path)[:99])
            raise ApiError("notFound", "There is nothing at this address", 404)
        self.call.name = match[1]
        self.read_call(self.call)
        return self.call.route.handle(self.balancer.directory, self.call)

    def answer_page(self, page: Callable[[Balancer], Answer], password: str) -> Answer:
        """A page of our own. If it is not public, user admin and the password are needed."""
        self.call.name = self.head.path
        # some front ends ask for the version by POST. Of other pages GET stands there twice
        self.allow("GET", "HEAD", "POST" if page is version_page else "GET")
        given = self.head.fields.get("authorization", "").encode()
        login = b"Basic " + base64.b64encode(f"admin:{password}".encode())
        if page not in PUBLIC_PAGES and not hmac.compare_digest(given, login):
            return Answer(
                401, b"", (("WWW-Authenticate", 'Basic realm="tinyscale", charset="UTF-8"'),)
            )
        return page(self.balancer)

    def allow(self, *methods: str) -> None:
        if self.head.method not in methods:
            raise ApiError("unsupportedRequest", "This method is not allowed here", 405)

    def read_call(self, call: ApiCall) -> None:
        """Verify the checksum, then read the body; only a form, which is the query, before that.

        Raises ApiError.
        """
        query = self.head.query
        # a join is a link, and mail programs try links by HEAD: they get our redirect. (With
        # redirect=false it is carried out, as by GET.) Of other calls a HEAD is refused: it would
        # be carried out
        self.allow("GET", "HEAD" if call.name == "join" else "POST")
        media_type = self.head.fields.get("content-type", "").partition(";")[0].strip().lower()
        # of a join no body is read: else a guest, whose checksum is right, could send 100 MiB
        # slowly
        has_body = self.head.length > 0 and call.name != "join"
        # if the query of the URL is empty, or has the checksum alone, then a form is the query.
        # Another body of that type can only be XML, see read_slides
        is_form = has_body and media_type == FORM and bool(re.fullmatch("(checksum=[^&]*)?", query))
        if is_form:
            call.content_type = FORM
            form = self.read_body(MAX_HEAD).decode("latin-1")
            if not re.fullmatch('[!-"$-~]*', form):
                raise ApiError("badRequest", "The form is not URL-encoded", 400)
            query = "&".join(filter(None, [form, query]))
        call.query, call.params = verify(call.name, query, self.balancer.settings.secrets, is_form)
        call.wants_html = "text/html" in self.head.fields.get("accept", "")
        # who knows a secret, or a URL that was signed with it, may be slow
        self.waiting_since = NEVER
        if has_body and not is_form:
            self.read_slides(call, media_type)

    def read_slides(self, call: ApiCall, media_type: str) -> None:
        """Read the body of a call whose checksum was right: XML or a file, which goes on as it is.

        Raises ApiError.
        """
        # what is in a body is not signed. So a call that has a query in its URL may not have a
        # form, too; but some clients label their XML as one. (The fields of multipart are not
        # signed, either. What BBB makes of them is its own matter: who has a right query can send
        # any)
        if media_type not in (FORM, "application/xml", "text/xml", "multipart/form-data"):
            raise ApiError(
                "unsupportedContentType", "POST request Content-Type is missing or unsupported"
            )
        call.body = self.read_body(MAX_BODY)
        if media_type == FORM and not re.match(rb"(\xef\xbb\xbf)?\s*<", call.body):
            raise ApiError(
                "checksumError", "Parameters must be in the URL or in the body, not in both"
            )
        # the bare type, as BBB wants it. XML that was labelled as a form gets it, too, lest a
        # server read parameters in it
        call.content_type = "application/xml"
        if media_type == "multipart/form-data":
            call.content_type = self.head.fields["content-type"]

    def read_body(self, limit: int) -> bytes:
        """The whole body of the request.

        Raises ApiError if it is too large, or all of them together are.
        """
        size = self.head.length
        if size > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        # noted before it is counted: so of two that come at the same moment neither is overlooked
        self.took_body = True
        # forms are small: they do not count, nor are they refused
        counted = [
            each
            for each in list(self.balancer.handlers)
            if each.took_body and each.call.content_type != FORM
        ]
        if self in counted and sum(each.head.length for each in counted) > MAX_BODIES:
            self.took_body = False
            raise ApiError("serverBusy", "Too many large bodies at one time. Please try again", 503)
        if self.head.fields.get("expect"):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray(self.buffer[:size])
        while len(body) < size:
            body += self.receive()[: size - len(body)]
        return bytes(body)

    def respond(self, answer: Answer, outcome: str) -> None:
        """Write a line in the log, even for a client that is gone; then the answer.

        The line has the call, meetingID, server (else the path that was not found, or the caller's
        address), outcome, status and time: no query, and no name of a person or a room. The name of
        a call that was not verified may be any letters.
        """
        seconds = time.monotonic() - self.started
        count_call(self.balancer, self.call, outcome, seconds)
        if self.head.path not in PAGES or answer.status >= 400:
            log.info(
                f"{self.call.name:.99} {self.call.meeting_id!r:.300} "
                f"{self.call.note or self.address} "
                f"{outcome} {answer.status} {1000 * seconds:.0f} ms"
            )
        fields = "".join(f"{name}: {value}\r\n" for name, value in answer.headers)
        head = (
            f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}\r\n"
            f"{fields}Date: {email.utils.formatdate(usegmt=True)}\r\n"
            f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
        )
        body = b"" if self.head.method == "HEAD" else answer.body
        # now we wait for the client again, to take the answer
        self.waiting_since = time.monotonic()
        self.send(head.encode("latin-1") + body)
        self.is_answered = True
        # the path is "" if the head itself was refused
        if not self.head.path or (self.head.length > 0 and not self.took_body):
            self.linger()

    def send(self, data: bytes) -> None:
        """The one place that writes to a client, which may be slow, but not silent.

        Raises OSError.
        """
        self.sock.settimeout(SILENCE_TIMEOUT)
        # in pieces, each with its own time
        for start in range(0, len(data), CHUNK // 8):
            if start:
                # it takes its answer
                self.waiting_since = time.monotonic()
            self.sock.sendall(data[start : start + CHUNK // 8])

    def linger(self) -> None:
        """Read what a client still sends, and drop it: else it sees a reset, not the answer."""
        with suppress(OSError):
            # not SSLSocket's, which forgets its TLS and would read on in clear text
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
            while time.monotonic() < self.waiting_since + HEAD_TIMEOUT:
                self.receive()


class Balancer(http.server.ThreadingHTTPServer):
    """The listener, and a thread of a pool for each connection.

    Of its base it uses serve_forever, which accepts, handle_request, shutdown and server_close.
    """

    def __init__(
        self, settings: Settings, directory: Directory, listener: socket.socket, limit: int
    ) -> None:
        # neither its socket nor its kind of handler is used
        super().__init__(listener.getsockname()[:2], http.server.BaseHTTPRequestHandler, False)
        self.socket.close()
        self.socket = listener
        self.settings = settings
        self.directory = directory
        self.started = time.monotonic()
        # what is wrong with the settings on disk
        self.mistake = ""
        # one for each connection, and how many there may be. To add, to discard and to copy is one
        # step in Python each
        self.handlers: set[Handler] = set()
        self.limit = limit
        self.threads = futures.ThreadPoolExecutor(limit)
        # for /metrics, see count_call
        self.totals: dict[str, float] = collections.defaultdict(float)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of the pool.

        If there are too many, one must go: see close_slowest.
        """
        while len(self.handlers) >= self.limit:
            self.close_slowest()
        handler = Handler(self, request, client_address[0])
        self.handlers.add(handler)
        # submit puts it into the pool's queue, and then begins a thread. If the system allows no
        # more threads (RuntimeError), one of those that run will take it from there. (That a pool
        # is at its end would be a RuntimeError, too; this one never is)
        with suppress(RuntimeError):
            self.threads.submit(handler.serve)

    def close_slowest(self) -> None:
        """Close the connection of who has kept us waiting longest, a second at least.

        While we work for a verified call its connection is not closed. (If it is verified at this
        very moment, the call is carried out, and the caller sees its connection break off.) That of
        a client that takes its answer slowly may be closed.

        So nobody else gets in if all connections are such calls: if a thousand calls, be they all
        the same join of one guest, wait for servers at once; or if somebody who got hold of a
        signed URL sends a thousand slow bodies. (Three whose lengths add up to MAX_BODIES leave no
        room for others.) nginx before us, which passes on a body only when it is whole, prevents
        the second.

        In any case, wait a moment for a thread to end.
        """
        slowest = min(list(self.handlers), key=lambda handler: handler.waiting_since, default=None)
        if slowest and slowest.waiting_since + 1 < time.monotonic():
            # not SSLSocket's, see Handler.linger
            with suppress(OSError):
                socket.socket.shutdown(slowest.sock, socket.SHUT_RDWR)
        time.sleep(0.001)


# ---- HTML ----------------------------------------------------------------------------------------


class Markup(str):
    """HTML that is not escaped again: written by fill, joined of such, or a constant of ours."""


def fill(template: str, **values: object) -> Markup:
    """HTML with these values in the places of their names, each escaped but for Markup.

    A name in an attribute must stand between quotes.
    """
    safe = {
        name: value if isinstance(value, Markup) else html.escape(str(value))
        for name, value in values.items()
    }
    return Markup(template.format_map(safe))


# ==== Part II: where meetings are, where calls go =================================================

# Seconds, or how many.
# For the answer to a call.
ANSWER_TIMEOUT = 10
# For a create, a call with a body, or getRecordings: BBB's own nginx waits as long.
LONG_TIMEOUT = 60
# Calls that wait for one server.
MAX_WAITING = 200
# For the answer to a question that is put to several servers at once.
PROBE_TIMEOUT = 3
# Between two surveys of a server.
SURVEY_INTERVAL = 10
# The same when it has just gone down, and as long as it is not up: if it comes back within 20 s,
# that must be seen before HOLD is over.
FIRST_RETRY = 1
RETRY_INTERVAL = 5
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
# Threads that ask several servers at once: MAX_WAITING for each of ten servers that hang.
MAX_ASKING = 2000

# A moment before all others.
LONG_AGO = -NEVER


class Route(NamedTuple):
    """All properties of a call of BBB's API. ROUTES, at the end of Part II, has them."""

    handle: Callable[[Directory, ApiCall], Answer]
    # it changes nothing, so it may be sent twice
    is_read: bool = False
    # its failure may mean that the server is down, and its answer that it is not. Others say
    # nothing of that: webhooks are another program, recordings are slow, old servers lack some
    # calls, and a join is mostly not sent by us
    tells_health: bool = False
    # only BBB's XML is an answer to it: an error page of a proxy never reaches the caller
    is_xml: bool = True
    # it may take LONG_TIMEOUT
    is_long: bool = False


# ---- a server's state ----------------------------------------------------------------------------

# What our own machine lacks is no outage of a server. EBUSY is what glibc's getaddrinfo leaves in
# errno if it can open no more files.
OUR_TROUBLE = (
    errno.EBUSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.EADDRNOTAVAIL,
)
# What a proxy answers if no BBB works behind it. Another server may get the call then; but not
# after 504, as BBB may have carried it out. (It may have, too, if it breaks off in the middle of a
# create, which is a 502. That is accepted: mostly it is being restarted, and loses its meetings; if
# not, there is a twin, which is warned of. A 404 is passed on for calls that an old BBB may not
# know, which are not is_xml in ROUTES.)
GONE = (404, 502, 503, 504)


class MeetingInfo(NamedTuple):
    """What a server told of a meeting."""

    meeting_id: str
    internal_id: str = ""
    name: str = ""
    # BBB's createTime: milliseconds since 1970
    created: int = -1
    participants: int = 0
    is_breakout: bool = False


class Server(Connections):
    """One BBB server, and in which state it is. Times are those of time.monotonic, in seconds.

    The state is noted without a lock. If two calls note it at the same moment, one note may be
    lost: the next call or survey tells it again.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.slots = threading.BoundedSemaphore(MAX_WAITING)
        # recordings take a minute, and so have slots of their own: no other call shall wait for
        # them
        self.recording_slots = threading.BoundedSemaphore(MAX_WAITING)
        # unknown until it has answered or failed once; then up or down, since when, and why
        self.state = "unknown"
        self.since = time.monotonic()
        self.reason = "no answer yet"
        # of each call that failed last, but was no outage: why
        self.warned: dict[str, str] = {}
        # set when it goes down: it is surveyed again soon
        self.wake = threading.Event()
        # when the newest call was SENT that got a usable answer. Only calls count that tell its
        # health, see Route
        self.answered = 0.0
        # the same, of any answer, be it an error page
        self.reacted = 0.0
        # how many seconds its last answer took
        self.took = 0.0
        self.version = ""
        # how many good surveys it needs, after a create failed there, until it gets new meetings as
        # the others do
        self.doubts = 0
        # there is a thread that surveys it
        self.is_watched = False
        # its first survey has ended, be it in vain: until then it may have meetings that we do not
        # know
        self.first_survey_ended = False
        # its last good survey: when it was asked, and the meetings that it found
        self.surveyed = 0.0
        self.listed: dict[str, MeetingInfo] = {}

    @property
    def is_up(self) -> bool:
        return self.state == "up"

    @property
    def is_down(self) -> bool:
        return self.state == "down"

    @property
    def is_able(self) -> bool:
        """Whether it may get new meetings; see Directory.choose for which of these is the best."""
        return self.is_up and not self.entry.cordoned

    def call(self, call: ApiCall, why: str, timeout: float = 0) -> Answer:
        """Sign a call, send it and return the server's answer, if that is usable.

        An outage marks the server down.

        Raises NotCarriedOut if the server cannot have carried out the call, and Unavailable if it
        may have.
        """
        call.note = f"{self} ({why})"
        slots = self.slots
        if call.route.is_read and call.route.is_long:
            slots = self.recording_slots
        if not slots.acquire(blocking=False):
            raise NotCarriedOut(f"{self} (too many calls wait for it)")
        try:
            return self.call_unlimited(call, timeout)
        finally:
            slots.release()

    def call_unlimited(self, call: ApiCall, timeout: float = 0) -> Answer:
        """As `call`, but without its limit, so that a survey is always sent."""
        asked = time.monotonic()
        seconds = timeout or ANSWER_TIMEOUT
        if not timeout and (call.body or call.route.is_long):
            seconds = LONG_TIMEOUT
        request = self.sign_again(call)
        try:
            answer = self.send(request, seconds)
        except urllib.error.URLError as error:
            reason = f"no connection: {error.reason}"
            is_theirs = is_of_server(error.reason)
            raise self.failed(call, asked, reason, NotCarriedOut, is_theirs) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # only its type: its text may quote the answer
            reason = f"broken answer: {type(error).__name__}"
            if isinstance(error, socket.timeout):
                reason = f"no answer in {seconds:.0f} s"
            self.close_kept()
            raise self.failed(call, asked, reason, Unavailable, is_of_server(error)) from error
        if request.was_repeated and answer.returncode != "SUCCESS" and not call.route.is_read:
            # a create, see sign_again: the first time it may have been carried out, by a server
            # that is well. That the connection closed is no outage, and no reason for doubt. This
            # must come before `judge`, which may let another server have the create
            raise Unavailable(f"{self} (it refused a repeat)")
        self.judge(call, asked, answer)
        self.note_answer(call, asked)
        return answer

    def note_answer(self, call: ApiCall, asked: float) -> None:
        """Note that a call, which was sent at the time `asked`, got a usable answer.

        That alone does not mark the server up: only a survey does, as it also tells which meetings
        the server has.
        """
        self.warned.pop(call.name, None)
        if not call.route.tells_health:
            return
        self.answered = max(self.answered, asked)
        if call.route.is_read:
            self.took = time.monotonic() - asked

    def close_kept(self) -> None:
        """Close the kept connections: if one broke or was silent, the others may be dead, too."""
        with suppress(IndexError):
            while True:
                self.kept.pop().close()

    def judge(self, call: ApiCall, asked: float, answer: Answer) -> None:
        """Raise Unavailable, or NotCarriedOut, if this is no usable answer to the call.

        An answer is usable if it is BBB's, or if nobody could tell.
        """
        if call.route.tells_health:
            self.reacted = max(self.reacted, asked)
        status = answer.status
        refusal = b"<messageKey>checksumError</messageKey>"
        if answer.returncode == "FAILED" and refusal in answer.body:
            # our checksum is right for any query, so it is our secret that is wrong. BBB also says
            # so of parameters in a body; `failed` takes no call with a body for an outage
            reason = "it refuses our checksum: compare the secret with 'bbb-conf --secret' there"
            raise self.failed(call, asked, reason, NotCarriedOut)
        is_redirect = 300 <= status < 400
        if is_redirect and call.name == "join":
            return
        # some calls are not answered in BBB's XML: nobody can tell such an answer from an error
        # page, so that is passed on, too
        may_be_no_xml = status >= 200 and not call.route.is_xml
        if (answer.returncode or may_be_no_xml) and not is_redirect:
            return
        is_gone = is_redirect or status in GONE
        # a 500 is no outage: it may be about one bad meeting
        is_outage = is_gone or status < 200
        if call.name == "getMeetings":
            # of our own, which has no query, any error page is an outage, be it a 500. Of a
            # client's with a query none is, be it a 502, as the query may be what is wrong
            is_outage = not call.query
        error = NotCarriedOut if is_gone and status != 504 else Unavailable
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
        # a call that is too long for a URL, or has a body, may be refused by a server that is well
        is_odd = bool(call.body) or len(call.query) > MAX_QUERY
        # a create that fails makes us doubt the server, until two surveys were good. (But not if it
        # was NotCarriedOut and no outage, as when our own machine could not connect)
        if call.name == "create" and not is_odd and (is_outage or error is Unavailable):
            self.doubts = 2
        if is_outage and call.route.tells_health and not is_odd:
            self.note_down(reason, asked)
        elif self.warned.get(call.name) != reason:
            # once, until it answers such a call: those that fail are in the log anyway
            log.warning(f"{self} failed at {call.name}: {reason}")
            self.warned[call.name] = reason
        return error(f"{self} ({reason})")

    def note_down(self, reason: str, asked: float) -> None:
        """Mark the server down, unless it has answered what was asked later."""
        if self.answered > asked or (self.is_down and self.reason == reason):
            return
        log.warning(f"{self} is down: {reason}")
        self.reason = reason
        if not self.is_down:
            # in this order: who sees it down must not see an old time
            self.since = time.monotonic()
            self.state = "down"
            self.wake.set()

    def note_up(self, asked: float) -> None:
        """Mark the server up, which answered what was asked at that time.

        Not if it went down since.
        """
        if self.is_down and self.since > asked:
            return
        self.doubts = max(0, self.doubts - 1)
        if not self.is_up:
            log.info(f"{self} is up")
            self.since = time.monotonic()
            self.state = "up"
            self.reason = ""


def attempt(what: str, job: Callable[..., Any], *arguments: object) -> Any:
    """What a job returns; None if it fails, for a thread that must go on whatever happens."""
    try:
        return job(*arguments)
    except Unavailable:
        # Server.failed has logged it, if it is news; or too many calls wait for the server
        return None
    except Exception as error:
        # the other servers' answers, the next survey and the next look at the settings count on us
        log_error(what, error)
        return None


def is_of_server(error: object) -> bool:
    """Whether an error may be the server's: it is not if our own machine lacks something."""
    return getattr(error, "errno", None) not in OUR_TROUBLE


# ---- the directory: what is remembered of meetings -----------------------------------------------

Servers = Collection[Server]


class Meeting(NamedTuple):
    """A meeting, and the server that told that it has it."""

    info: MeetingInfo
    server: Server
    # when we first heard of it
    first_heard: float
    # when the newest question was asked whose answer told us so
    asked: float
    # for the log: why a call goes to this server
    why: str = "remembered"


@dataclass
class Claim:
    """A server's claim on a meetingID: it may have the meeting without having told.

    That is because a create of ours is on its way to it, or we gave up waiting for the answer to
    one.
    """

    server: Server
    # creates that are on their way: while there are any, the claim is not ended or replaced
    sending: int = 0
    # when we last gave up waiting for one: the server may have carried it out
    gave_up: float = LONG_AGO
    why: str = "may have it"

    @property
    def asked(self) -> float:
        """As a Meeting's: how new our knowledge is.

        While a create is on its way it is newer than any: no server need be asked for the meeting.
        Otherwise it is older than any: they must be asked. So what Directory.home gives, a Meeting
        or a Claim, is asked for its age alike.
        """
        return NEVER if self.sending else LONG_AGO


class Directory:
    """All servers, and where each meeting is.

    What is known is behind one lock, which is never held while a server is asked. Without the lock
    we only read single entries, and write single entries of `absent` and `probes`: each of these
    is one step in Python.

    Evidence has an age: what a server says counts from the moment when it was asked. The clock is
    an argument, so that a test can play on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.servers: list[Server] = []
        self.placement = "turn"
        self.turn = 0
        # when a server last came up while none was up, see is_lost
        self.recovered = LONG_AGO
        # who were given the last two new meetings
        self.last_two: list[Server] = []
        # by meetingID and by internalMeetingID, as BBB accepts both
        self.meetings: dict[str, Meeting] = {}
        # by meetingID
        self.claims: dict[str, Claim] = {}
        # when a server was asked for a meeting that it does not have
        self.denials: dict[tuple[Server, str], float] = {}
        # when all servers were asked for a meeting that none of them has
        self.absent: dict[str, float] = {}
        # meetings on two servers, and when they were last seen there
        self.twins: dict[str, float] = {}
        # the probes that run, by meetingID; their result is when the servers were asked
        self.probes: dict[str, futures.Future[float]] = {}
        self.threads = futures.ThreadPoolExecutor(MAX_ASKING)
        # lists for clients are parsed and merged one at a time, of each kind: to parse a long one
        # holds Python's lock for long, and a hundred at once would let no join through
        self.merging = {name: threading.Lock() for name in LISTS}

    def use(self, entries: Iterable[Entry], placement: str) -> None:
        """Take these servers from now on. One that stays keeps its state and its meetings."""
        with self.lock:
            self.placement = placement
            known = {str(server): server for server in self.servers}
            servers = {}
            for entry in entries:
                server = known.get(entry.host) or Server(entry)
                server.entry = entry
                servers[entry.host] = server
            # in one assignment: who reads it does not hold the lock
            self.servers = list(servers.values())
            for claim in self.claims.values():
                # it outlives a server that is taken out, and put back
                claim.server = servers.get(str(claim.server), claim.server)
            for key, meeting in list(self.meetings.items()):
                if meeting.server not in self.servers:
                    del self.meetings[key]

    # -- what servers say

    def remember(self, server: Server, info: MeetingInfo, asked: float) -> None:
        """Note that the server, asked at that time, has the meeting.

        What is older than what we know is no news. Of another server's home it is no news either if
        that is a claim, or a meeting that was created later. What is left takes the place of what
        we know.
        """
        with self.lock:
            # what was told last, be it of a server that is lost by now; `home`, below, is what ties
            # the meeting to a server now, and that may be a claim
            known = self.meetings.get(info.meeting_id)
            denied = self.denials.get((server, info.meeting_id), LONG_AGO)
            is_old = denied > asked or (known is not None and known.asked > asked)
            if is_old or server not in self.servers:
                return
            home = self.home(info.meeting_id)
            first_heard = self.clock()
            if home and home.server is not server:
                # a claim stays; of two meetings the one that was created later counts. If that is
                # `info`, it takes the other's place, as first heard of now
                if isinstance(home, Claim) or home.info.created > info.created:
                    return
            elif known and known.info.created == info.created:
                first_heard = known.first_heard
            meeting = Meeting(info, server, first_heard, asked)
            self.meetings[info.meeting_id] = meeting
            # it is found by its internal ID, too, unless that is the meetingID of another meeting
            other = self.meetings.get(info.internal_id)
            is_taken = other and other.info.meeting_id == info.internal_id
            if info.internal_id and not is_taken:
                self.meetings[info.internal_id] = meeting
            self.end_claim(server, info.meeting_id, asked)

    def forget(self, server: Server, meeting_id: str, asked: float) -> None:
        """Note that the server, asked at that time, does not have the meeting."""
        with self.lock:
            known = self.meetings.get(meeting_id)
            if known and known.server is server:
                if known.asked >= asked:
                    return
                del self.meetings[meeting_id]
            before = self.denials.get((server, meeting_id), asked)
            self.denials[server, meeting_id] = max(asked, before)
            self.end_claim(server, meeting_id, asked)

    def end_claim(self, server: Server, meeting_id: str, asked: float) -> None:
        """Note that the server, asked at that time, told whether it has the meeting.

        That says nothing of a create that is on its way, or that we gave up only later. (If the
        server carries out a create even after it said no, there is a twin, which is warned of.) The
        lock is held.
        """
        claim = self.claims.get(meeting_id)
        if claim and claim.server is server and not claim.sending and claim.gave_up < asked:
            del self.claims[meeting_id]

    def learn(
        self, server: Server, infos: Sequence[MeetingInfo], asked: float, is_whole: bool
    ) -> None:
        """Note what the server, asked at that time, lists.

        If the list is whole, it has no other meeting. If not, it confirms what we know, and tells
        what to ask for.
        """
        listed = {info.meeting_id: info for info in infos}
        with self.lock:
            if is_whole:
                for info in infos:
                    self.remember(server, info, asked)
                told = {*listed, *(info.internal_id for info in infos)}
                ties: Iterable[tuple[str, Meeting | Claim]]
                ties = [*self.meetings.items(), *self.claims.items()]
                for key, tie in ties:
                    if tie.server is server and key not in told:
                        self.forget(server, key, asked)
            else:
                # a name that somebody typed can put what looks like a meeting into such a list, see
                # `mend`
                for meeting_id in listed:
                    home = self.home(meeting_id)
                    if home is None:
                        # a hint, so old that the servers are asked
                        self.remember(server, MeetingInfo(meeting_id), LONG_AGO)
                    elif (
                        isinstance(home, Meeting)
                        and home.server is server
                        and home.asked > LONG_AGO
                    ):
                        # what we know better is confirmed
                        self.remember(server, home.info, asked)
            self.note_twins(server, listed.keys(), asked)
            server.listed = listed
            self.drop_old(asked - MEETING_TTL)
            server.surveyed = asked
            # still under the lock: else a create could see this server as it was, down for long,
            # and go elsewhere
            self.note_shown_up(server, asked)

    def drop_old(self, old: float) -> None:
        """Drop what would grow for ever, and counts no more, from before this time.

        The lock is held.
        """
        # it is believed for a second: what goes too early is asked again
        self.absent.clear()
        # it guards against a yes that was asked for earlier and comes later. Only slow DNS could
        # make a question take so long; then a wrong yes counts until the next survey
        self.denials = {key: when for key, when in self.denials.items() if when > old}
        # twins that no survey has found since
        self.twins = {key: when for key, when in self.twins.items() if when > old}
        for key, claim in list(self.claims.items()):
            # of a server that was taken out of the list, and not put back
            is_over = not claim.sending and claim.gave_up < old
            if is_over and claim.server not in self.servers:
                del self.claims[key]

    def note_shown_up(self, server: Server, asked: float) -> None:
        """Note that a survey, asked at that time, shows that the server is up."""
        with self.lock:
            # the server itself counts: if it was up already, nobody has come back
            was_any_up = any(each.is_up for each in self.servers)
            server.note_up(asked)
            if server.is_up and not was_any_up:
                self.recovered = self.clock()

    def note_twins(self, server: Server, listed: Collection[str], asked: float) -> None:
        """Warn of meetings that run on another server, too, for two surveys. We end neither."""
        up = [other for other in self.servers if other.is_up]
        # server.listed is still that of the survey before
        for meeting_id in server.listed.keys() & listed:
            on = [str(other) for other in up if meeting_id in other.listed]
            if len(on) < 2:
                continue
            if meeting_id not in self.twins:
                both = " and ".join(on)
                log.warning(f"meeting {meeting_id!r:.300} runs on {both}: the newer one counts")
            self.twins[meeting_id] = asked

    # -- which server a create must go to

    def is_lost(self, server: Server) -> bool:
        """Whether the server's meetings may begin anew elsewhere.

        It was taken out of the list, or has been down for HOLD. If all servers were down, our own
        network may have failed: then HOLD counts from the moment when the first one came back.
        (What was lost long before is held once more, too, which is accepted: for example if one of
        two servers has been down for an hour when the other one fails and returns.)
        """
        if server not in self.servers:
            return True
        if not server.is_down:
            return False
        # `since` is read after the state, because note_down writes it before the state. self.clock
        # is time.monotonic, as in Server; only a test has another one
        since = max(server.since, self.recovered)
        return self.clock() - since >= HOLD

    def home(self, meeting_id: str) -> Meeting | Claim | None:
        """What ties a meeting to a server, so that a create must go there; None if nothing does."""
        with self.lock:
            claim = self.claims.get(meeting_id)
            if claim and (claim.sending or not self.is_lost(claim.server)):
                return claim
            known = self.meetings.get(meeting_id)
            if known and not self.is_lost(known.server):
                return known
            return None

    def lost_server(self, meeting_id: str) -> Server | None:
        """The server that had a meeting, but has been down for so long that it may begin anew."""
        last = self.claims.get(meeting_id) or self.meetings.get(meeting_id)
        if last is None:
            return None
        if last.server not in self.servers:
            return None
        return last.server if self.is_lost(last.server) else None

    def assign_known(self, meeting_id: str, tried: Servers) -> tuple[Server, str] | None:
        """As `assign`, for a meeting whose home is known well enough.

        None if the servers must be asked for it first.
        """
        with self.lock:
            home = self.home(meeting_id)
            oldest = self.clock() - MEETING_TTL
            # a cordoned server is always asked: what has ended there must begin elsewhere
            if home is None or home.server.entry.cordoned or home.asked < oldest:
                return None
            return self.add_claim(meeting_id, home.server, home.why, tried)

    def assign(
        self, meeting_id: str, tried: Servers, asked: float, parent: Server | None
    ) -> tuple[Server, str]:
        """The server for a create, and why: it has a claim from now on.

        It is the one that has the meeting, or may have it; else one for a new meeting, see
        `choose`. The servers were asked for the meeting at the time `asked`.

        Raises Unavailable if that server is down, or was tried in vain; or if it is cordoned, and
        has not said that it has the meeting.
        """
        with self.lock:
            home = self.home(meeting_id)
            if home is None:
                server, why = self.choose(tried, asked, parent)
                return self.add_claim(meeting_id, server, why, tried)
            if home.server.entry.cordoned and home.asked < asked:
                # it did not answer: a yes would have made `home` newer, a no would have ended it. A
                # server that is not cordoned would get the create all the same. This one must not,
                # as it would begin anew what may have ended
                raise Unavailable(f"{home.server} (cordoned, and silent)")
            return self.add_claim(meeting_id, home.server, home.why, tried)

    def add_claim(
        self, meeting_id: str, server: Server, why: str, tried: Servers
    ) -> tuple[Server, str]:
        """Give this server, to which a create will be sent, a claim. The lock is held.

        Raises Unavailable if it is down, or was tried in vain.
        """
        if server.is_down:
            raise Unavailable(f"{server} (held)")
        if server in tried:
            raise Unavailable(f"{server} (tried in vain)")
        claim = self.claims.get(meeting_id)
        # the claim of a server that is lost, or `home` would have returned it, is replaced
        if not claim or claim.server is not server:
            claim = Claim(server)
        claim.sending += 1
        self.claims[meeting_id] = claim
        return server, why

    def release(self, meeting_id: str, may_have: bool, info: MeetingInfo | None = None) -> None:
        """Note that a create has come to its end.

        `info` is what a successful create told. It counts as asked now: who was asked while it was
        on its way may have said no.

        `may_have`: the server may have carried out the create without telling. Then the claim stays
        until the server says that it has no such meeting, or is lost. Otherwise the claim ends,
        unless another create is on its way, or an earlier one may have been carried out.
        """
        with self.lock:
            claim = self.claims[meeting_id]
            claim.sending -= 1
            if info:
                self.remember(claim.server, info, self.clock())
            if may_have:
                claim.gave_up = self.clock()
            elif not claim.sending and claim.gave_up == LONG_AGO:
                # `remember` may have ended it already
                self.claims.pop(meeting_id, None)

    # -- where a new meeting goes

    def any_up(self) -> Server:
        """A server for a join of a meeting that is nowhere. Raises Unavailable if none is up."""
        for server in self.servers:
            if server.is_up:
                return server
        raise Unavailable()

    def choose(self, tried: Servers, asked: float, parent: Server | None) -> tuple[Server, str]:
        """A server for a new meeting, and why it. The lock is held.

        A breakout room's is its parent's. Else it is one of those that answered a question of the
        time `asked` or later, and were not tried in vain. An error page will do: some servers give
        one for any meeting that they do not have. Raises Unavailable if there is none.
        """
        if parent is not None:
            return parent, "parent's"
        answering = [server for server in self.servers if server.reacted >= asked]
        able = [server for server in answering if server.is_able and server not in tried]
        # one in doubt, or a slow one, is better than none: one bad room must not stop all new ones
        best = [server for server in able if not server.doubts and server.took < SLOW]
        able = best or able
        if self.placement == "load":
            able = self.least_loaded(able)
        circle = [server for server in self.servers for _ in range(server.entry.weight)]
        for _ in circle:
            server = circle[self.turn % len(circle)]
            self.turn += 1
            if server in able:
                self.last_two = [*self.last_two[-1:], server]
                return server, PLACEMENTS[self.placement]
        raise Unavailable("no server can take a new meeting")

    def least_loaded(self, able: Servers) -> list[Server]:
        """Those of these servers with the least load."""
        # never three in a row: else one that comes back empty would get all that begins
        others = [server for server in able if self.last_two != [server, server]]
        loads = {server: self.load(server) for server in others or able}
        least = min(loads.values(), default=0)
        return [server for server in loads if loads[server] == least]

    def load(self, server: Server) -> float:
        """A server's people, and room for those that still come, divided by its weight.

        Breakout rooms do not count, as their people are in the room, too. The lock is held.
        """
        # for each meeting that is being created there, or may have been
        people = EXPECTED * sum(claim.server is server for claim in self.claims.values())
        for key, meeting in self.meetings.items():
            # a create tells nothing of people, but the last survey did
            info = server.listed.get(key, meeting.info)
            # each meeting is here by two IDs
            is_ours = meeting.server is server and key == info.meeting_id
            # whether it was in the server's last list, or we heard of it later. (A list that had to
            # be mended makes us forget nothing, see `learn`, but what it lacks does not count here)
            is_current = key in server.listed or meeting.asked >= server.surveyed
            if is_ours and is_current and not info.is_breakout:
                is_young = self.clock() - meeting.first_heard < YOUNG
                people += max(info.participants, EXPECTED if is_young else 0)
        return people / server.entry.weight

    # -- asking

    def ask(self, servers: Servers, call: ApiCall) -> Iterator[tuple[Server, Answer]]:
        """Ask these servers at once; yield each with its answer, as they come.

        Who gives no usable answer, or takes too long, is left out.
        """
        return self.send_all([(server, call) for server in servers])

    def send_all(self, calls: Sequence[tuple[Server, ApiCall]]) -> Iterator[tuple[Server, Answer]]:
        """As `ask`, but with a call for each server, all of one name."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        seconds = CONNECT_TIMEOUT + LONG_TIMEOUT
        if all(call.route.is_read and not call.route.is_long for _, call in calls):
            # rather an answer that lacks a slow server than one that comes late
            seconds = PROBE_TIMEOUT
        deadline = time.monotonic() + seconds

        def ask_one(server: Server, call: ApiCall) -> None:
            answer = None
            # what waited too long for a thread is not sent any more. But what is sent has its own
            # time: who answers too late for us still shows that it is up
            if time.monotonic() < deadline:
                # a copy, for the server's own note
                answer = attempt(call.name, server.call, replace(call), "asked")
            answers.put((server, answer))

        for server, call in calls:
            # as in Balancer.process_request: it is in the queue even if no thread can begin
            with suppress(RuntimeError):
                self.threads.submit(ask_one, server, call)
        for _ in calls:
            try:
                # after a pause of our machine what came meanwhile counts: all have LATE together
                timeout = max(LATE / len(calls), deadline - time.monotonic())
                server, answer = answers.get(timeout=timeout)
            except queue.Empty:
                return
            if answer:
                yield server, answer

    def ask_for(self, meeting_id: str, servers: Servers) -> None:
        """Ask these servers for a meeting, until one says that it has it. Note what they say."""
        asked = self.clock()
        call = ApiCall("getMeetingInfo", f"meetingID={quote_plus(meeting_id)}")
        have_it: dict[Server, MeetingInfo] = {}
        for server, answer in self.ask(servers, call):
            info = info_by(answer)
            if info is None and answer.returncode == "SUCCESS":
                # it cannot be read, but is a yes
                info = MeetingInfo(meeting_id)
            if info and meeting_id in (info.meeting_id, info.internal_id):
                have_it[server] = info
            elif answer.returncode == "FAILED":
                # that can only mean that it has no such meeting: a checksumError is not usable
                self.forget(server, meeting_id, asked)
            # else it is another meeting: BBB takes the beginning of an internal ID, too, and looks
            # for that first. So it is neither a yes nor a no

            # again after each answer: the yes of A does not count while B has a claim, or a newer
            # meeting; but it does as soon as B says no
            for each, its_info in have_it.items():
                self.remember(each, its_info, asked)
            home = self.home(meeting_id)
            if home and home.server in have_it:
                return

    def probe(self, meeting_id: str) -> float:
        """Ask all servers that are not down for a meeting. Return the time when they were asked.

        What they say is noted. Who asks for the same meeting meanwhile shares that.
        """
        mine: futures.Future[float] = futures.Future()
        # one step in Python
        running = self.probes.setdefault(meeting_id, mine)
        if running is not mine:
            return running.result()
        asked = self.clock()
        try:
            self.ask_for(meeting_id, [server for server in self.servers if not server.is_down])
            if self.home(meeting_id) is None:
                # a server that had not answered yet may have it: its first survey tells
                self.wait_until_known()
        finally:
            # whatever happens, nobody waits for ever
            del self.probes[meeting_id]
            mine.set_result(asked)
        return asked

    def wait_until_known(self) -> None:
        """Wait until the first survey of each server has ended, or it is down; 13 s at most."""
        deadline = time.monotonic() + CONNECT_TIMEOUT + ANSWER_TIMEOUT
        while time.monotonic() < deadline:
            # `surveyed` is set a moment earlier: a survey may still ask for the version
            if all(
                server.surveyed or server.first_survey_ended or server.is_down
                for server in self.servers
            ):
                return
            time.sleep(0.02)

    def find(self, meeting_id: str) -> tuple[Server | None, str]:
        """The meeting's server, and how we know; None if no server says that it has it.

        Raises Unavailable if its server went down not long ago, or if nobody answers.
        """
        now = self.clock()
        home = self.home(meeting_id)
        if home is None:
            is_sure = self.absent.get(meeting_id, LONG_AGO) >= now - ABSENCE_TTL
        else:
            is_sure = home.server.is_down or home.asked >= now - MEETING_TTL
        if not is_sure:
            asked = self.probe(meeting_id)
            home = self.home(meeting_id)
            if home is None:
                # one answer is enough: if we knew the meeting on a silent server, that would be its
                # home; and `probe` has waited until each has told once what it has
                if not any(server.answered >= asked for server in self.servers):
                    raise Unavailable("no server gives a usable answer")
                # not believed for long if servers are slow, as it counts from the question
                self.absent[meeting_id] = asked
        if home is None:
            return None, "nowhere"
        if home.server.is_down:
            raise Unavailable(f"{home.server} (held)")
        return home.server, home.why


def survey(directory: Directory, server: Server) -> None:
    """Ask a server which meetings it runs: that shows whether it is up, and where meetings are.

    Raises Unavailable.
    """
    was_up = server.is_up
    asked = directory.clock()
    answer = server.call_unlimited(ApiCall("getMeetings"))
    root, is_whole = parse(answer)
    if answer.returncode != "SUCCESS":
        key = root.findtext("messageKey", "")
        # not `asked`, which is a moment older than Server.answered is now: note_down would take it
        # for old news
        server.note_down(f"it answers getMeetings with {key!r:.80}", directory.clock())
        return
    if root.find("meetings") is None:
        # it is up, but what it told is cut short, or too much: that says nothing of its meetings
        directory.note_shown_up(server, asked)
        return
    told = map(info_in, root.iterfind("meetings/meeting"))
    infos = [info for info in told if info.meeting_id]
    directory.learn(server, infos, asked, is_whole)
    if not was_up or not server.version:
        # it may have been upgraded. The call without a name tells the version, to anybody: BBB does
        # not look at its checksum
        root, _ = parse(server.call_unlimited(ApiCall("")))
        server.version = re.sub("[^!-~]", "", root.findtext("bbbVersion", ""))


def watch(directory: Directory, server: Server) -> None:
    """Survey a server again and again, until it is taken out of the list.

    Each has a thread of its own for that: a slow one delays no other.
    """
    while server in directory.servers:
        server.wake.clear()
        attempt("a survey", survey, directory, server)
        server.first_survey_ended = True
        seconds = SURVEY_INTERVAL if server.is_up else RETRY_INTERVAL
        if server.wake.wait(seconds):
            # it went down just now
            time.sleep(FIRST_RETRY)


# ---- lists: parsed, merged, written again --------------------------------------------------------

# XML 1.0 has none of these characters; but a name that somebody typed may have them.
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A CDATA section that BBB wrote, such as <fullName><![CDATA[Ann]]></fullName>. A user can type
# "<![CDATA[" as the name of custom data, too: BBB then writes <<![CDATA[>x</<![CDATA[>, and such a
# false section runs on to the end of the next true one. So a section is taken only if there is no
# end of one of these elements in it, and no begin of another section. It is bounded, as each
# character costs some memory while its end is looked for.
CDATA = re.compile(
    r"<!\[CDATA\[((?:(?!</(?:customdata|metadata|attendees?|meetings?|recordings?|response)>"
    r"|<!\[CDATA\[).){0,100000}?)\]\]>",
    re.DOTALL,
)
# The elements whose children have the names that people typed.
CUSTOM = ("customdata", "metadata")
# What a list has in it.
ITEM_OF = {"meetings": "meeting", "recordings": "recording"}
# Nothing of BBB is nested so deep; and a thousand deep is more than ElementTree can write.
MAX_DEPTH = 30
# What no answer of BBB has, but a typed name can make: an element so deep; or one within custom
# data that has children.
ODD_PATHS = ("/".join("*" * MAX_DEPTH), ".//customdata/*/*", ".//metadata/*/*")
# No real list has so many tags. An answer of 32 MiB of tiny elements would need gigabytes when it
# is parsed.
MAX_TAGS = 2_000_000


def parse(answer: Answer) -> tuple[ET.Element, bool]:
    """The <response> of an answer of BBB, an empty one if there is none; and whether it is whole.

    It is not if something in it had to be mended.
    """
    if not answer.returncode or answer.body.count(b"<") > MAX_TAGS:
        return ET.Element("response"), False
    text = FORBIDDEN.sub(" ", answer.body.decode("utf-8", "replace"))
    text = text[text.index("<response>") :]
    text = CDATA.sub(lambda section: html.escape(section[1]), text)
    # BBB makes names of elements of typed names, and writes no comment or instruction. So what
    # still looks like the begin of a section, a comment or an instruction is a piece of a typed
    # name. A parser could take all that follows for a part of it, ends of elements too: the text
    # must be mended
    if "<!" not in text and "<?" not in text:
        with suppress(ET.ParseError):
            root = ET.fromstring(text)
            if all(root.find(path) is None for path in ODD_PATHS):
                return root, True
    if not text.rstrip().endswith("</response>"):
        # it was cut short
        return ET.Element("response"), False
    return mend(text), False


def mend(text: str) -> ET.Element:
    """What can be read of XML that is not well-formed.

    BBB makes names of elements of what people typed: userdata-NAME of a join, meta_NAME of a
    create. So a tag that no parser takes is left out; so is an end without a begin. An element that
    is still open ends with the one around it.
    """
    root = ET.Element("response")
    opened = [root]
    # a typed name could hold the end of the list: that ends with the text
    text = re.sub("</(meeting|recording)s>", "", text)
    pieces = re.split("(<[^<>]*>)", text)
    # they are: text, the root's tag, text, a tag, text, and so on
    for tag, behind in zip(pieces[3::2], pieces[4::2]):
        parent = opened[-1]
        is_custom = parent.tag in CUSTOM
        if tag.startswith("</"):
            name = tag[2:-1]
            # in custom data two ends count: its own; and that of the meeting or recording, lest a
            # typed name hide the next one. All others are of typed names, and so is this one if it
            # is that of the last child
            is_childs = len(parent) > 0 and parent[-1].tag == name
            is_typed = is_custom and (is_childs or name not in ITEM_OF.values())
            ending = [parent] if is_typed else opened[1:]
            if name in [element.tag for element in ending]:
                while opened.pop().tag != name:
                    pass
        elif len(opened) < MAX_DEPTH:
            # ValueError: the text has a reference with thousands of digits
            with suppress(ET.ParseError, ValueError):
                element = ET.fromstring(tag.rstrip("/>") + "/>")
                element.text = FORBIDDEN.sub(" ", html.unescape(behind))
                parent.append(element)
                # nothing is nested in custom data; nor, in a list, in what is no item of it
                is_stray = parent.tag in ITEM_OF and ITEM_OF[parent.tag] != element.tag
                if not is_custom and not is_stray and not tag.endswith("/>"):
                    opened.append(element)
    return root


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
    if answer.returncode != "SUCCESS":
        return None
    root, _ = parse(answer)
    info = info_in(root)
    return info if info.meeting_id else None


class ListShape(NamedTuple):
    """How BBB writes a list."""

    tag: str
    item: str
    # the element whose text tells one item from another; "" if there is none, and each is one of
    # its own
    identity: str
    # the element with a number that is the greater the newer the item is; or ""
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


def items_of(shape: ListShape, answer: Answer) -> list[ET.Element] | None:
    """The items of a server's list; None if the answer has no such list."""
    if answer.status == 404:
        # only a 404 to hooks/list gets here, as that is not is_xml in ROUTES: a BBB without
        # webhooks
        return []
    root, is_whole = parse(answer)
    found = root.find(shape.tag)
    if found is None:
        return None
    items = found.findall(shape.item)
    # a list that had to be mended may have lost items. Of meetings the others count all the same.
    # But a recording that is lost would be taken for deleted; and nobody types names into a list of
    # hooks, so one that must be mended is broken
    has_all = shape.item == "recording" and answer.body.count(b"<recordID>") == len(items)
    is_usable = is_whole or has_all or shape.item == "meeting"
    return items if is_usable else None


def merge(shape: ListShape, lists: Iterable[list[ET.Element]]) -> list[ET.Element]:
    """The items of several servers, the newest first; of one identity only the newest."""

    def age(item: ET.Element) -> int:
        return -number(item.findtext(shape.newest))

    every = [item for items in lists for item in items]
    merged: dict[object, ET.Element] = {}
    for item in sorted(every, key=age):
        # findtext finds no element named ""
        merged.setdefault(item.findtext(shape.identity) or item, item)
    return list(merged.values())


def write_list(shape: ListShape, items: Sequence[ET.Element], more: str = "") -> Answer:
    """BBB's answer that has these items."""
    element = ET.Element(shape.tag)
    element.extend(items)
    # in ASCII, its default, ElementTree would write the name of an element as &#228;
    text = ET.tostring(element, "unicode") if items else shape.empty
    return success(text + more)


def success(inner: str) -> Answer:
    return Answer(200, f"<response><returncode>SUCCESS</returncode>{inner}</response>".encode())


# ---- routes: create ------------------------------------------------------------------------------


def create(directory: Directory, call: ApiCall) -> Answer:
    """To the server that has the meeting, or may have it; a new meeting is placed.

    If the chosen server cannot be reached, it goes to the next one; but while another create of
    that meeting is still on its way to the chosen server, it fails.

    Raises Unavailable if a server may have carried it out without telling: then it is not tried
    elsewhere.
    """
    deadline = directory.clock() + LONG_TIMEOUT
    tried: set[Server] = set()
    while True:
        server, why = place(directory, call, tried)
        info = None
        may_have = True
        try:
            answer = server.call(call, why, max(1, deadline - directory.clock()))
            info = info_by(answer)
            if answer.returncode == "SUCCESS" and info is None:
                server.doubts = 2
                raise Unavailable(f"{server} (its answer is cut short)")
            may_have = False
            return answer
        except NotCarriedOut:
            may_have = False
            # in the second half another server would have too little time
            if directory.clock() > deadline - LONG_TIMEOUT / 2:
                raise
            tried.add(server)
        finally:
            # its claim ends, or stays if it may have carried out the create
            directory.release(call.meeting_id, may_have, info)


def place(directory: Directory, call: ApiCall, tried: Servers) -> tuple[Server, str]:
    """The server for a create that was tried on these in vain, and why that one. It has a claim.

    All servers are asked first, unless the meeting's is known. Raises as Directory.assign does.
    """
    placed = directory.assign_known(call.meeting_id, tried)
    if placed:
        return placed
    parent = None
    parent_id = call.params.get("parentMeetingID", "")
    if parent_id:
        parent, _ = directory.find(parent_id)
    asked = directory.probe(call.meeting_id)
    return directory.assign(call.meeting_id, tried, asked, parent)


# ---- routes: a call about one meeting ------------------------------------------------------------


def join(directory: Directory, call: ApiCall) -> Answer:
    """A browser is sent to the meeting's server itself, for its cookie.

    Nobody asks that server first: if it died a moment ago, the browser sees that for itself. A
    program may want the answer.
    """
    # to BBB every word but "true" is false
    if call.params.get("redirect", "").lower() not in ("", "true"):
        return relay(directory, call)
    try:
        server, why = directory.find(call.meeting_id)
        if server is None:
            lost = directory.lost_server(call.meeting_id)
            if lost and call.wants_html:
                # the pupil waits on the retry page, until the room begins elsewhere, or the server
                # comes back. A program gets BBB's "no such meeting", so that it can create the room
                raise Unavailable(f"{lost} (down for long)")
            server = directory.any_up()
    except Unavailable as error:
        if call.wants_html:
            error.page = RETRY_PAGE
        raise
    call.note = f"{server} ({why})"
    location = server.url_for("join", call.query)
    return Answer(302, b"", (("Location", location),))


def relay(directory: Directory, call: ApiCall) -> Answer:
    """To the meeting's server.

    If that denies it, it is asked whether it has the meeting; and if it has not, so are the others,
    before the denial is passed on.
    """
    if not call.meeting_id:
        return relay_anywhere(directory, call)
    server, why = directory.find(call.meeting_id)
    if server is None:
        return relay_anywhere(directory, call, why)
    answer = server.call(call, why)
    if not is_denial(call, answer):
        return answer
    # the refusal may have another reason, so the server is asked whether it has the meeting. Only
    # if it says no is that forgotten, and find asks the others
    directory.ask_for(call.meeting_id, [server])
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
    """A call about no meeting that we know: to the first server that is up, for BBB's own answer.

    If that cannot be reached, to the next one; but no more once CONNECT_TIMEOUT is over, so that no
    caller waits for two silent servers.
    """
    deadline = directory.clock() + CONNECT_TIMEOUT
    note = "no server is up"
    # unknown ones last: they may be silent
    servers = sorted(directory.servers, key=lambda server: not server.is_up)
    for server in servers:
        if not server.is_down and directory.clock() <= deadline:
            try:
                return server.call(call, why)
            except NotCarriedOut as error:
                # not the error itself: it would hold this frame, and this frame the error; and both
                # the body of the call, until Python looks for such circles
                note = error.note
    raise Unavailable(note)


# ---- routes: a call to all servers ---------------------------------------------------------------


def ask_all(directory: Directory, call: ApiCall) -> dict[Server, Answer]:
    """The usable answers of the servers that do not refuse the call, in the order of the list.

    Raises Unavailable if there is none. If all servers refuse, raises ApiError with a page: the
    caller gets BBB's own words.
    """
    # a reload puts another list in its place
    every = directory.servers
    servers = [server for server in every if not server.is_down]
    heard = dict(directory.ask(servers, call))
    answers = {}
    for server in servers:
        if server in heard and heard[server].returncode != "FAILED":
            answers[server] = heard[server]
    call.note = f"{len(answers)} of {len(every)} servers"
    # all servers answered, and refuse. There is a first one: read_servers takes no empty list
    if not answers and len(heard) == len(every):
        raise ApiError("failed", "", note=call.note, page=heard[servers[0]])
    missing = [str(server) for server in every if server not in answers]
    if missing:
        call.note += f", not {', '.join(missing)}"
    if not answers:
        raise Unavailable(call.note)
    return answers


def lists_in(call: ApiCall, answers: Mapping[Server, Answer]) -> dict[Server, list[ET.Element]]:
    """The lists in these answers to the call. Raises Unavailable if there is none."""
    lists = {}
    for server, answer in answers.items():
        items = items_of(LISTS[call.name], answer)
        if items is None:
            log.warning(f"{server} is left out of {call.name}: its list cannot be read")
        else:
            lists[server] = items
    if not lists:
        raise Unavailable(call.note)
    return lists


def relay_list(directory: Directory, call: ApiCall) -> Answer:
    """One list of what all servers have. A server that gives none is left out."""
    shape = LISTS[call.name]
    answers = ask_all(directory, call)
    with directory.merging[call.name]:
        items = merge(shape, lists_in(call, answers).values())
        for item in items:
            # in a list of hooks; nothing else has a hookID
            put_our_id(item, item.findtext("callbackURL", ""))
        return write_list(shape, items)


# ---- routes: recordings --------------------------------------------------------------------------

# What BBB writes behind a page of a list. Clients look for the total in either place.
PAGINATION = (
    "<totalElements>{total}</totalElements><pagination><pageable><offset>{offset}</offset>"
    "<limit>{limit}</limit><paged>true</paged><unpaged>false</unpaged></pageable>"
    "<totalElements>{total}</totalElements><empty>{empty}</empty></pagination>"
)


def record_ids(call: ApiCall) -> set[str]:
    """The recordings that a call means. BBB decodes them a second time; no ID has a % or +."""
    texts = unquote_plus(call.params.get("recordID", "")).split(",")
    return {text.strip() for text in texts} - {""}


def ids_in(items: Iterable[ET.Element]) -> set[str]:
    """The recordIDs in a list."""
    return {item.findtext("recordID", "") for item in items}


def is_complete(
    directory: Directory, call: ApiCall, lists: Mapping[Server, list[ET.Element]]
) -> bool:
    """Whether nothing is missing in these lists of the recordings that a call means.

    Nothing is if every server gave its list, or if every recordID asked for is in the lists that
    came. A front end takes what a SUCCESS lacks for deleted.
    """
    ids = record_ids(call)
    found = set().union(*map(ids_in, lists.values()))
    has_all = bool(ids) and ids <= found
    return has_all or set(directory.servers) <= lists.keys()


def get_recordings(directory: Directory, call: ApiCall) -> Answer:
    """One list of all servers' recordings, and of that the page that is asked for.

    The limits of a page are BBB's.
    """
    # the servers are asked for all pages
    call.query = without(call.query, "offset", "limit")
    answers = ask_all(directory, call)
    shape = LISTS[call.name]
    with directory.merging[call.name]:
        lists = lists_in(call, answers)
        if not is_complete(directory, call, lists):
            raise Unavailable(call.note)
        items = merge(shape, lists.values())
        wanted = call.params.get("limit", "")
        if not re.fullmatch("[+-]?[0-9]{1,9}", wanted):
            return write_list(shape, items)
        offset = max(0, number(call.params.get("offset")))
        limit = min(max(1, number(wanted)), 100)
        shown = items[offset : offset + limit]
        empty = str(not shown).lower()
        more = PAGINATION.format(total=len(items), offset=offset, limit=limit, empty=empty)
        return write_list(shape, shown, more)


def relay_recording(directory: Directory, call: ApiCall) -> Answer:
    """A call about recordings: to each server that has some of them.

    One SUCCESS, in XML or JSON, is a SUCCESS: BBB, too, says so if it has only some of the
    recordings. Raises Unavailable if a server that has some of them, or may have some, does not
    answer.
    """
    ids = record_ids(call)
    if not ids:
        return relay_anywhere(directory, call)
    query = f"recordID={quote_plus(','.join(ids))}&state=any"
    # a long form stays a form
    question = ApiCall("getRecordings", query, content_type=call.content_type)
    answers_of = ask_all(directory, question)
    with directory.merging[question.name]:
        lists = lists_in(question, answers_of)
    owners = [server for server, items in lists.items() if ids & ids_in(items)]
    call.note = question.note
    if owners:
        call.note = f"{' and '.join(map(str, owners))} (owner)"
    # what can be done is done first: a repeat finishes it
    answers = [answer for _, answer in directory.ask(owners, call)]
    if not is_complete(directory, call, lists) or len(answers) < len(owners):
        raise Unavailable(call.note)
    if not owners:
        return relay_anywhere(directory, call, "nowhere")
    return max(answers, key=lambda answer: b"SUCCESS" in answer.body)


# ---- routes: webhooks ----------------------------------------------------------------------------


def hook_id(url: str) -> str:
    """Our ID of a hook, made from its callback URL alone.

    It is a decimal number below 2**31, as old front ends expect.
    """
    digest = hashlib.sha256(url.encode()).digest()
    value = int.from_bytes(digest[:4], "big")
    return str(value % (2**31 - 1) + 1)


def put_our_id(element: ET.Element, url: str) -> None:
    """Put our ID in the place of a server's, which could be another hook's on another server."""
    for child in element.findall("hookID"):
        child.text = hook_id(url)


def create_hook(directory: Directory, call: ApiCall) -> Answer:
    """On all servers.

    A SUCCESS if one of them took it; a warning names the rest, and a repeat completes it.
    """
    answers = ask_all(directory, call)
    for server in directory.servers:
        if server not in answers:
            log.warning(f"hooks/create: not on {server}. The same call again completes it")
    root, _ = parse(next(iter(answers.values())))
    if not len(root):
        raise Unavailable(call.note)
    put_our_id(root, call.params.get("callbackURL", ""))
    # not in ASCII, see write_list
    return Answer(200, ET.tostring(root, "unicode").encode())


def destroy_hook(directory: Directory, call: ApiCall) -> Answer:
    """Remove a hook from all servers that have it. "Not found" is said only when all said so."""
    wanted = call.params.get("hookID", "")
    if not wanted:
        raise ApiError("missingParamHookID", "You must specify a hookID in the parameters.")
    question = ApiCall("hooks/list")
    lists = lists_in(question, ask_all(directory, question))
    calls = []
    for server, hooks in lists.items():
        for hook in hooks:
            if hook_id(hook.findtext("callbackURL", "")) == wanted:
                own_id = hook.findtext("hookID", "")
                calls.append((server, ApiCall(call.name, f"hookID={quote_plus(own_id)}")))
    answers = [answer for _, answer in directory.send_all(calls)]
    removed = sum(answer.returncode == "SUCCESS" for answer in answers)
    # said of a hook that is not there, and of a permanent one, which is never removed
    missing = sum(b">destroyMissingHook<" in answer.body for answer in answers)
    call.note = f"removed from {removed} of {len(directory.servers)} servers"
    if removed + missing < len(calls) or not set(directory.servers) <= lists.keys():
        raise Unavailable(call.note)
    if not removed:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    return success("<removed>true</removed>")


# ---- routes: the table ---------------------------------------------------------------------------


# What is not is_xml may be answered in JSON, or by a 404 that is passed on: by an old BBB that does
# not know the call, or by one without webhooks.
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
    "getRecordingTextTracks": Route(relay_recording, is_read=True, is_xml=False, is_long=True),
    "putRecordingTextTrack": Route(relay_recording, is_xml=False),
    "hooks/create": Route(create_hook),
    "hooks/list": Route(relay_list, is_read=True, is_xml=False),
    "hooks/destroy": Route(destroy_hook),
}
# Calls that are not in the table, such as those that do not exist yet.
OTHER_CALL = Route(relay, is_xml=False)

# ==== Part III: for the admin =====================================================================

# Seconds. Until a browser that waits for a server asks again; for the calls in progress when we
# stop.
RETRY_AFTER = 5
DRAIN_TIMEOUT = 10
# Clients, each with a thread; and those that wait to be accepted when school begins.
MAX_CONNECTIONS = 1000
BACKLOG = 1024
# Lines of the log that wait for a slow reader.
MAX_LOG = 10000

# ---- pages ---------------------------------------------------------------------------------------


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
td[title=State] { white-space: normal }
tbody th { font-weight: bold; min-width: 18rem }
thead th { overflow-wrap: normal }
thead th, small { color: var(--low); font-weight: normal }
.down, .broken { color: var(--bad); font-weight: bold }
.down::before { content: "✖ " }
.cordoned { color: var(--low) }
meter { display: block; width: 6rem }
@media (max-width: 45rem) {
  thead { display: none }
  tr { display: block; padding: .5rem 0; border-top: 1px solid #8886 }
  tbody th { min-width: 0 }
  th, td { display: inline-block; border: 0; padding: 0 .72rem 0 0 }
  td:not([title=State])::before { content: attr(title) " "; color: var(--low) }
}
"""


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>{body}</body>
</html>
"""


def html_answer(status: int, seconds: int, title: str, body: Markup) -> Answer:
    """A page that is loaded again after so many seconds, and loads nothing else."""
    page = fill(PAGE, title=title, style=Markup(STYLE), body=body)
    style_hash = hashlib.sha256(STYLE.encode()).digest()
    digest = base64.b64encode(style_hash).decode()
    headers = (
        ("Content-Type", "text/html;charset=utf-8"),
        ("Refresh", str(seconds)),
        ("Retry-After", str(seconds)),
        ("Cache-Control", "no-store"),
        ("Content-Security-Policy", f"default-src 'none'; style-src 'sha256-{digest}'"),
    )
    return Answer(status, page.encode(), headers)


RETRY_TEXT = Markup("""
<main>
<h1>One moment, please</h1>
<p>The server of this room cannot be reached right now. This page tries again by itself.</p>
<div lang="de">
<h1>Einen Moment bitte</h1>
<p>Der Server dieses Raums ist gerade nicht erreichbar.
Diese Seite versucht es von selbst weiter.</p>
</div>
</main>
""")


# For who waits in a browser for a server that is down.
RETRY_PAGE = html_answer(503, RETRY_AFTER, "One moment, please", RETRY_TEXT)


def version_page(balancer: Balancer) -> Answer:
    # of BBB's API, not ours
    return success("<version>2.0</version><apiVersion>2.0</apiVersion>")


# What /health says with each status.
HEALTH = {200: b"ok", 503: b"no server for new meetings"}


def health(balancer: Balancer) -> Answer:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    is_able = any(server.is_able for server in balancer.directory.servers)
    status = 200 if is_able else 503
    return Answer(status, HEALTH[status], (("Content-Type", "text/plain"),))


def people_on(server: Server) -> int:
    # those in a breakout room are in its parent, too
    return sum(info.participants for info in server.listed.values() if not info.is_breakout)


# What /metrics tells of each server: what it is, and its value.
FIGURES: dict[str, tuple[str, Callable[[Server], float]]] = {
    "server_up": ("Whether the server answers.", lambda server: server.is_up),
    "server_cordoned": ("Whether it gets no new meetings.", lambda server: server.entry.cordoned),
    "server_meetings": ("Meetings on the server.", lambda server: len(server.listed)),
    "server_participants": ("People in these meetings.", people_on),
    "server_certificate_end_seconds": (
        "When its certificate ends, 0 if that is not known.",
        lambda server: server.certificate_end,
    ),
}
# Of a server that is down these are not known.
LIVE_FIGURES = ("server_meetings", "server_participants")
# What else /metrics tells. The counts of calls follow.
METRICS = """\
# HELP tinyscale_info The version.
# TYPE tinyscale_info gauge
tinyscale_info{{version="{version}"}} 1
# HELP tinyscale_start_time_seconds When it was started.
# TYPE tinyscale_start_time_seconds gauge
tinyscale_start_time_seconds {started:.0f}
# HELP tinyscale_settings_ok Whether the settings on disk are good.
# TYPE tinyscale_settings_ok gauge
tinyscale_settings_ok {is_ok:d}
# HELP tinyscale_twin_meetings Meetings on two servers.
# TYPE tinyscale_twin_meetings gauge
tinyscale_twin_meetings {twins}
# HELP tinyscale_call_seconds Calls, and the time they took.
# TYPE tinyscale_call_seconds summary
"""


def count_call(balancer: Balancer, call: ApiCall, outcome: str, seconds: float) -> None:
    """Note for /metrics that there was a call, and how long it took."""
    if call.name in PAGES:
        return
    # who has no secret could make up thousands of names
    name = call.name if call.name in ROUTES else "other"
    labels = f'{{call="{name}",outcome="{outcome}"}}'
    # += is not one step, so it needs a lock: there is one
    with balancer.directory.lock:
        balancer.totals["call_seconds_count" + labels] += 1
        balancer.totals["call_seconds_sum" + labels] += seconds


def metrics(balancer: Balancer) -> Answer:
    """Figures for Prometheus, in its text format."""
    text = ""
    for name, (meaning, value_of) in FIGURES.items():
        text += f"# HELP tinyscale_{name} {meaning}\n# TYPE tinyscale_{name} gauge\n"
        for server in balancer.directory.servers:
            if server.is_up or name not in LIVE_FIGURES:
                text += f'tinyscale_{name}{{server="{server}"}} {value_of(server):.12g}\n'
    started = time.time() - time.monotonic() + balancer.started
    is_ok = not balancer.mistake
    twins = len(balancer.directory.twins)
    text += METRICS.format(version=__version__, started=started, is_ok=is_ok, twins=twins)
    # a copy, which is made in one step
    for name, total in list(balancer.totals.items()):
        text += f"tinyscale_{name} {total:.12g}\n"
    return Answer(200, text.encode(), (("Content-Type", "text/plain; version=0.0.4"),))


def ago(since: float) -> str:
    """How long ago a moment of time.monotonic was."""
    seconds = time.monotonic() - since
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def state_of(server: Server) -> str:
    if server.is_up and server.entry.cordoned:
        return "cordoned"
    return server.state


def days_left(server: Server) -> str:
    """The days until its certificate ends."""
    if not server.certificate_end:
        return "-"
    return f"{(server.certificate_end - time.time()) / 86400:.0f} d"


STATUS = """
<h1>{title}</h1>
<p>{facts}</p>
<p class="{verdict}">The settings on disk are {verdict}. {mistake}</p>
<table>
<thead><tr>
<th>Server</th>
<th>State</th>
<th>Rooms</th>
<th>People</th>
<th>Answers in</th>
<th>BBB</th>
<th>Certificate</th>
</tr></thead>
{rows}
</table>
{rooms}
"""
# A narrow screen has no room for heads: there each cell shows its title.
UP_ROW = """
<tr>
<th>{server}</th>
<td title="State"><span class="{state}">{state}</span> <small>for {since}</small></td>
<td title="Rooms">{rooms}</td>
<td title="People">{people}<meter value="{people}" max="{everyone}"></meter></td>
<td title="Answers in">{took} ms</td>
<td title="BBB">{version}</td>
<td title="Certificate">{days}</td>
</tr>
"""
# Of a server that is down, or has never answered, less is known.
SILENT_ROW = """
<tr>
<th>{server}</th>
<td title="State"><span class="{state}">{state}</span> <small>for {since}: {reason}</small></td>
<td title="Rooms">-</td>
<td title="People">-</td>
<td title="Answers in">-</td>
<td title="BBB">{version}</td>
<td title="Certificate">{days}</td>
</tr>
"""
ROOMS = """
<h2>{server}: {count} rooms, {people} people</h2>
<table>{rows}</table>
"""
ROOM_ROW = """
<tr><th>{name} <small>{meeting_id}</small></th><td title="People">{participants}</td></tr>
"""


def server_row(server: Server, everyone: int) -> Markup:
    """How a server is, and its share of all people."""
    cells: dict[str, object] = {"server": server, "everyone": everyone}
    cells["state"] = state_of(server)
    cells["since"] = ago(server.since)
    cells["reason"] = server.reason
    cells["rooms"] = len(server.listed)
    cells["people"] = people_on(server)
    cells["took"] = round(1000 * server.took)
    cells["version"] = server.version or "-"
    cells["days"] = days_left(server)
    row = UP_ROW if server.is_up else SILENT_ROW
    return fill(row, **cells)


def rooms_on(server: Server) -> Markup:
    """The rooms of a server, the fullest first, named as people know them."""
    rooms = sorted(server.listed.values(), key=lambda info: (-info.participants, info.name))
    rows = Markup("".join(fill(ROOM_ROW, **info._asdict()) for info in rooms))
    return fill(ROOMS, server=server, count=len(rooms), people=people_on(server), rows=rows)


def status(balancer: Balancer) -> Answer:
    """A page for an admin to leave open: how the servers are, and which room runs where."""
    servers = list(balancer.directory.servers)
    # what is down first
    servers.sort(key=lambda server: (server.is_up, server.entry.cordoned))
    up = [server for server in servers if server.is_up]
    everyone = sum(map(people_on, up))
    count = sum(len(server.listed) for server in up)
    title = f"{len(up)} of {len(servers)} servers up · {everyone} people in {count} rooms"
    surveyed = max((server.surveyed for server in servers), default=0)
    facts = f"tinyscale {__version__}, running for {ago(balancer.started)}"
    facts += f" · surveyed {ago(surveyed)} ago" if surveyed else " · not surveyed yet"
    verdict = "broken" if balancer.mistake else "good"
    rows = Markup("".join(server_row(server, max(1, everyone)) for server in servers))
    rooms = Markup("".join(rooms_on(server) for server in up if server.listed))
    body = fill(
        STATUS,
        title=title,
        facts=facts,
        verdict=verdict,
        mistake=balancer.mistake,
        rows=rows,
        rooms=rooms,
    )
    return html_answer(200, SURVEY_INTERVAL, title, body)


PAGES = {
    "/bigbluebutton/": version_page,
    "/bigbluebutton/api": version_page,
    "/bigbluebutton/api/": version_page,
    "/health": health,
    "/status": status,
    "/metrics": metrics,
}
# All others are behind TINYSCALE_STATUS_PASSWORD.
PUBLIC_PAGES = (version_page, health)

# ---- loading: the files and the environment ------------------------------------------------------

# The variables of the environment, some replaced by the command line.
Environment = Mapping[str, str]
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


# A secret of the front ends with fewer characters is warned of; and what has as many could be a
# secret in the wrong place, so it is not shown.
MIN_SECRET = 20


class SettingsError(Exception):
    """A mistake in the settings: one line that says where, what was found, and the mend."""


def shown(value: str) -> str:
    """The value of a setting, if it is short, or looks like a path, a name or an address.

    Otherwise it could be a secret, or a whole file, in the wrong place: it is hidden.
    """
    is_plain = re.fullmatch(r"/[\w./~@ ,()-]*|[\w./:~-]*[.:][\w./:~-]*", value)
    return value if len(value) < MIN_SECRET or is_plain else "..."


def require(is_right: object, mistake: str) -> None:
    """Raise SettingsError, with these words, unless something is right."""
    if not is_right:
        raise SettingsError(mistake)


def read_text(name: str, path: str) -> str:
    """The text of the file that a variable of this name names; "" if it names none.

    Raises SettingsError.
    """
    if not path:
        return ""
    try:
        # what is no UTF-8 becomes characters that cannot be printed, which no setting may have
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        where = shown(path)
        if where == path:
            where = os.path.abspath(path)
        raise SettingsError(
            f"{name} {where}: {error.strerror}. "
            "Check its name, and that the user of tinyscale may read it."
        ) from None


def base_url(host: object) -> str:
    """A server's URL without /bigbluebutton and what follows; "" if it is no such URL.

    bbb-conf prints it in several forms. So "https://bbb1", "https://bbb1/bigbluebutton/" and
    "https://bbb1/bigbluebutton/api" are the same; "HTTP://[::1]:80/a/b/bigbluebutton" becomes
    "http://[::1]:80/a/b".
    """
    match = re.fullmatch(
        r"(?ai)(https?://(?:[\w-]{1,63}(?:\.[\w-]{1,63})*\.?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?)"
        r"((?:/(?!bigbluebutton/)[\w.~-]+)*?)(/bigbluebutton(/api)?)?/?",
        str(host),
    )
    if not match or not 0 < int(match[2] or 1) <= 65535:
        return ""
    return match[1].lower() + match[3]


def is_secret(value: object) -> bool:
    """Whether it may be a secret: printable, not blank, no quote or TINYSCALE_... before it."""
    text = str(value).strip()
    is_bare = text.isprintable() and not re.match("$|[\"']|TINYSCALE_", text)
    return isinstance(value, str) and is_bare


# A regular expression, see ENTRY_RULES.
SHORT_VALUE = "[^@{[]{,20}"
# A key of an entry of servers.json: what tests its value; what the value must be; and a regular
# expression for the wrong values, as JSON, that a message may show. An admin may put a secret under
# a wrong key, and that must not be shown. The secrets of BBB are long, and have only letters and
# digits. So of most keys a short value may be shown, but no list or object, and nothing with an
# "@". A host is shown only if it has no blank, no "@" and no query.
ENTRY_RULES: dict[str, tuple[Callable[..., object], str, str]] = {
    "host": (
        base_url,
        'must look like "https://bbb1.example.org"',
        '"[^@#?&=\\s]*[.:][^@#?&=\\s]*"',
    ),
    "secret": (is_secret, 'must be the secret that "bbb-conf --secret" prints on that server', ""),
    "weight": (
        lambda value: type(value) is int and 1 <= value <= 100,
        "must be a whole number from 1 to 100",
        SHORT_VALUE,
    ),
    "cordoned": (lambda value: isinstance(value, bool), "must be true or false", SHORT_VALUE),
    "checksum": (
        lambda value: value in ALGORITHMS.values(),
        f"must be one of {', '.join(ALGORITHMS.values())}",
        SHORT_VALUE,
    ),
}


def read_servers(path: str) -> tuple[Entry, ...]:
    """Read servers.json. Raises SettingsError: nothing half valid comes out."""
    text = read_text("TINYSCALE_SERVERS", path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        mend = "It must be JSON in UTF-8, like servers.json.example."
        # the commas within strings are no matter
        if re.search(r",\s*[\]}]", re.sub(r'"(\\.|[^"\\])*"', "", text)):
            mend = 'A comma stands before a "]" or "}": take it out.'
        raise SettingsError(
            f"{path}: line {getattr(error, 'lineno', 1)}: this is no JSON. {mend}"
        ) from None
    require(
        isinstance(items, list) and items,
        f'{path}: it must be a list of servers: [{{"host": "...", "secret": "..."}}, ...]',
    )
    entries: dict[str, Entry] = {}
    for count, item in enumerate(items, 1):
        where = f"{path}: entry {count}"
        entry = read_entry(where, item)
        require(
            entry.host not in entries,
            f"{where} ({entry.host}): an earlier one has this host. Take one out.",
        )
        entries[entry.host] = entry
    return tuple(entries.values())


def read_entry(where: str, item: Any) -> Entry:
    """An entry of servers.json, checked. Raises SettingsError."""
    require(
        isinstance(item, dict), f'{where}: it must look like {{"host": "...", "secret": "..."}}.'
    )
    host = base_url(item.get("host"))
    if host:
        where = f"{where} ({host})"
    # each name once, and first those that must be there
    for name in dict.fromkeys(["host", "secret", *item]):
        # what is long could be a secret in the wrong place
        key = f"{where}: {json.dumps(name if len(name) < MIN_SECRET else '...')}"
        require(name in ENTRY_RULES, f"{key} is no key. Known are {', '.join(ENTRY_RULES)}.")
        is_right, rule, may_show = ENTRY_RULES[name]
        require(name in item, f"{key} is missing. It {rule}.")
        # a secret may stand behind a host
        found = re.sub("[A-Za-z0-9]{20,}", "...", json.dumps(item[name]))
        if re.fullmatch(may_show, found):
            rule += f", not {found:.99}"
        require(is_right(item[name]), f"{key} {rule}.")
    checked = {**item, "host": host, "secret": item["secret"].strip()}
    return Entry(**checked)


def read_secrets(text: str, path: str) -> tuple[str, ...]:
    """Our own secrets: those with commas between, and those in a file. Raises SettingsError."""
    secrets = text.split(",") if text else []
    lines = read_text("TINYSCALE_SECRET_FILE", path).splitlines()
    secrets += filter(str.strip, lines)
    where = f"TINYSCALE_SECRET {path}".strip()
    mend = "Set it to what the front ends shall use, such as the output of: openssl rand -hex 32"
    require(secrets, f"{where}: there is none. {mend}")
    for count, secret in enumerate(secrets, 1):
        require(
            is_secret(secret),
            f"{where}: secret {count} is blank, cannot be printed, "
            f"or has quotes or NAME= before it. {mend}",
        )
    return tuple(map(str.strip, secrets))


def read_tls(certificate: str, key: str) -> ssl.SSLContext | None:
    """The TLS of the listener; None for plain HTTP. Raises SettingsError."""
    if not certificate and not key:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # a pass phrase is never asked for
        tls.load_cert_chain(certificate, key or None, lambda: "")
    except OSError as error:
        raise SettingsError(
            f"TINYSCALE_CERT {shown(certificate or 'not set')}, "
            f"TINYSCALE_KEY {shown(key or 'in it')}: "
            f"{error.strerror}. They must be PEM files that belong together."
        ) from None
    return tls


def has_expired(pem: str) -> bool:
    """Whether the first certificate in a text has expired; False if there is none."""
    body = pem.partition("-----BEGIN CERTIFICATE-----")[2].partition("-")[0]
    # Python's ssl decodes only the certificate of a peer. X.509 has two times in a row, from and
    # until: type 17 (hex), YYMMDDHHMMSSZ, before 2050, type 18, YYYYMMDDHHMMSSZ, after that
    until = re.search(rb"Z[\x17\x18].(\d+)Z", base64.b64decode(body), re.DOTALL)
    if not until:
        return False
    now = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    # YYMMDD... gets a 20 before it; from YYYYMMDD... the last 14 digits cut that off again
    end = (b"20" + until[1])[-14:]
    return end < now.encode()


def read_warnings(
    given: dict[str, str],
    secrets: Iterable[str],
    secret_files: Iterable[str],
    is_socket_unit: bool,
) -> Iterator[str]:
    """What is not right, but no reason to refuse. In `given` what is not set is empty."""
    for name in given:
        if name.startswith("TINYSCALE_") and name not in VARIABLES:
            yield f"{name} is no setting of tinyscale. Known are {', '.join(VARIABLES)}."
    if min(map(len, secrets)) < MIN_SECRET:
        yield (
            "TINYSCALE_SECRET: a short secret can be guessed by who has a join link. "
            "Take one like this: openssl rand -hex 32"
        )
    for path in secret_files:
        if os.path.isfile(path) and os.stat(path).st_mode & 0o006:
            yield f"{path} holds secrets, but is open to everyone. Mend it with: chmod o-rw {path}"
    if has_expired(read_text("TINYSCALE_CERT", given["TINYSCALE_CERT"])):
        yield f"TINYSCALE_CERT {given['TINYSCALE_CERT']} has expired. No front end will accept it."
    if is_socket_unit and (given["PORT"] or given["TINYSCALE_BIND"]):
        yield "PORT and TINYSCALE_BIND do not count: ListenStream= of the socket does."


def stamp(file: str | int) -> str:
    """What changes when a file, its name or its mode is changed; "" if there is none.

    It begins with device:inode and a blank.
    """
    try:
        stat = os.stat(file)
    except OSError:
        return ""
    return f"{stat.st_dev}:{stat.st_ino} {stat.st_ctime_ns} {stat.st_size}"


def is_journal(stream: str) -> bool:
    """Whether stderr, file 2, goes to systemd's journal.

    JOURNAL_STREAM is its device:inode, but a program inherits that with another stderr, too.
    """
    return stamp(2).startswith(f"{stream} ")


def read_settings(environment: Environment, needs_servers: bool = True) -> Settings:
    """All settings: the only place that looks at the environment, with two exceptions.

    OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR. main reads JOURNAL_STREAM, to print a mistake in
    the form that the journal wants. (Python has a debugging aid, SSLKEYLOGFILE, which writes TLS
    keys to a file: leave it unset.)

    Raises SettingsError.
    """
    # what is not set is as if it were empty
    given = collections.defaultdict(str, environment)
    servers_file = given["TINYSCALE_SERVERS"] or "servers.json"
    key_file = given["TINYSCALE_KEY"] or given["TINYSCALE_CERT"]
    secret_files = [servers_file, given["TINYSCALE_SECRET_FILE"], key_file]
    # before they are read: then no change is missed
    files = [*secret_files, given["TINYSCALE_CERT"]]
    stamps = {path: stamp(path) for path in files if path}
    port = given["PORT"] or "3005"
    require(
        port in map(str, range(65536)),
        f"PORT: {shown(port)!r} is no port. It must be a number up to 65535.",
    )
    placement = given["TINYSCALE_PLACEMENT"] or "turn"
    require(
        placement in PLACEMENTS,
        f"TINYSCALE_PLACEMENT: {shown(placement)!r} is none. Known are {', '.join(PLACEMENTS)}.",
    )
    password = given["TINYSCALE_STATUS_PASSWORD"].strip()
    require(
        password.isprintable(),
        "TINYSCALE_STATUS_PASSWORD: it cannot be printed. Write it in UTF-8.",
    )
    # OpenSSL reads it by itself, and says nothing if it cannot
    read_text("SSL_CERT_FILE", given["SSL_CERT_FILE"])

    # else LISTEN_FDS is inherited, and means another process
    is_socket_unit = given["LISTEN_PID"] == str(os.getpid())
    require(
        given["LISTEN_FDS"] == "1" or not is_socket_unit,
        "LISTEN_FDS: there must be one socket. Leave one ListenStream= in the socket unit.",
    )
    entries = read_servers(servers_file) if needs_servers else ()
    secrets = read_secrets(given["TINYSCALE_SECRET"], given["TINYSCALE_SECRET_FILE"])
    tls = read_tls(given["TINYSCALE_CERT"], given["TINYSCALE_KEY"])
    has_journal = is_journal(given["JOURNAL_STREAM"])
    # last: only now it is sure that the files can be read
    warnings = list(read_warnings(given, secrets, secret_files, is_socket_unit))
    # in the order of its fields
    return Settings(
        entries,
        secrets,
        given["TINYSCALE_BIND"],
        int(port),
        placement,
        tls,
        password,
        given["NOTIFY_SOCKET"],
        is_socket_unit,
        has_journal,
        warnings,
        stamps,
    )


# ---- systemd, the log ----------------------------------------------------------------------------


def notify(settings: Settings, state: str) -> None:
    """Tell systemd a state of ours, if it asked for that."""
    if not settings.notify_socket:
        return
    # a name that begins with @ is an abstract one
    address = re.sub("^@", "\0", settings.notify_socket)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning(f"systemd cannot be told {state}: {error.strerror}. Allow AF_UNIX in the unit")


def listen(settings: Settings) -> socket.socket:
    """The listener: systemd's, which is file 3, or our own. Raises OSError, or SettingsError."""
    if settings.is_socket_unit:
        with suppress(OSError):
            listener = socket.socket(fileno=3)
            if listener.proto == socket.IPPROTO_TCP:
                return listener
        raise SettingsError(
            "LISTEN_FDS: file 3 is no socket of TCP. Start it by a socket unit with a port."
        )
    is_dual = not settings.bind and socket.has_dualstack_ipv6()
    host = settings.bind or ("::" if is_dual else "0.0.0.0")
    where = f"PORT {settings.port}, TINYSCALE_BIND {shown(settings.bind) or 'all addresses'!r:.99}"
    try:
        addresses = socket.getaddrinfo(host, settings.port, 0, socket.SOCK_STREAM)
        family, _, _, _, address = addresses[0]
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except (socket.gaierror, UnicodeError) as error:
        # EAI_AGAIN: the network is not there yet, which is no mistake
        require(error.args[0] == socket.EAI_AGAIN, f"{where}: it is no address of this host.")
        raise
    except OSError as error:
        # it may pass by itself, so it is no mistake
        words = os.strerror(error.errno or 0)
        raise OSError(f"{where}: {words}. Choose another, or stop who has it.") from None


class LogHandler(logging.handlers.QueueHandler):
    """Hands lines to a thread that writes them, and counts those for which there is no room.

    Who reads them slowly, or not at all, stops no call.
    """

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost += 1


# As systemd's journal wants a level to be written.
JOURNAL_LEVELS = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}


def begin_log(settings: Settings) -> LogHandler:
    """Write the log to stderr."""
    # a writer that fails says nothing of it
    logging.raiseExceptions = False
    handler = LogHandler(queue.Queue(MAX_LOG))
    layout = "%(asctime)s %(levelname)s %(message)s"
    if settings.is_journal:
        # the journal has the time
        layout = "%(levelname)s%(message)s"
        for level, mark in JOURNAL_LEVELS.items():
            logging.addLevelName(level, mark)
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=layout)
    logging.handlers.QueueListener(handler.queue, logging.StreamHandler()).start()
    return handler


def end_log(handler: LogHandler) -> None:
    """Wait a second at most until the log is written: its reader may be gone."""
    # told only now: while the queue was full, this line would have been lost, too
    if handler.lost:
        log.warning(f"{handler.lost} lines of the log were lost: nobody read them")
    begin(handler.queue.join).join(1)  # type: ignore[attr-defined]


# ---- commands ------------------------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)


def connection_limit() -> int:
    """How many clients there may be.

    They get a third of the files that may be open: each needs one more for its server, and the
    rest is for what asks all servers.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # a sandbox may forbid it
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files = most
    return max(10, min(MAX_CONNECTIONS, files // 3))


def begin(job: Callable[..., None], *arguments: object) -> threading.Thread:
    """Do something in a thread of its own, for which the end of the program does not wait."""
    thread = threading.Thread(target=job, args=arguments, daemon=True)
    thread.start()
    return thread


def apply(balancer: Balancer, settings: Settings) -> None:
    """Use these settings from now on."""
    for warning in settings.warnings:
        log.warning(warning)
    balancer.directory.use(settings.entries, settings.placement)
    for server in balancer.directory.servers:
        if not server.is_watched:
            begin(watch, balancer.directory, server)
            server.is_watched = True
    # last: if no thread could begin, the stamps of the files are still the old ones, and the next
    # `reload` tries it again. (At the start the program ends instead)
    balancer.settings = settings
    balancer.mistake = ""


def reload(balancer: Balancer, environment: Environment, is_forced: bool) -> None:
    """Read the settings again if a file has changed.

    All of them count, or, if there is a mistake, none.
    """
    stamps = {path: stamp(path) for path in balancer.settings.stamps}
    is_new = is_forced or stamps != balancer.settings.stamps
    # what could not be read may pass by itself
    if not is_new and not balancer.mistake:
        return
    try:
        settings = read_settings(environment)
    except SettingsError as error:
        balancer.settings = replace(balancer.settings, stamps=stamps)
        if is_new or str(error) != balancer.mistake:
            log.error(f"{error} The settings stay as they were; a restart would fail.")
        balancer.mistake = str(error)
        return
    apply(balancer, settings)
    files = ", ".join(settings.stamps)
    counts = f"{len(settings.entries)} servers, {len(settings.secrets)} secrets"
    log.info(f"read again: {files}: {counts}")


def watch_files(balancer: Balancer, environment: Environment, wake: threading.Event) -> None:
    """Look for changed files again and again, and at once if somebody sets `wake`.

    In a thread of its own: a file system that hangs must not hold up a stop.
    """
    while True:
        wake.wait(SURVEY_INTERVAL)
        is_forced = wake.is_set()
        wake.clear()
        attempt("reading the settings", reload, balancer, environment, is_forced)


def is_busy(balancer: Balancer) -> bool:
    """Whether somebody's call was verified and is not at its end, or has only just begun."""
    now = time.monotonic()
    for handler in list(balancer.handlers):
        # only a call that was verified has parameters. If it has been answered, what its client
        # still sends is only dropped
        if handler.call.params and not handler.is_answered:
            return True
        # who has not been verified after a second is a stranger
        if now - handler.started < 1:
            return True
    return False


def drain(balancer: Balancer) -> None:
    """Take no more connections, and wait for the calls in progress."""
    # no limit from now on: who still comes waits in the pool's queue, and process_request does not
    # stay in its loop, for which shutdown would wait
    balancer.limit = sys.maxsize
    balancer.shutdown()
    deadline = time.monotonic() + 1
    is_ours = not balancer.settings.is_socket_unit
    # what waits to be accepted would be reset; but a socket unit hands it to the next process
    while is_ours and is_readable(balancer.socket) and time.monotonic() < deadline:
        balancer.handle_request()
    balancer.server_close()
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while is_busy(balancer) and time.monotonic() < deadline:
        time.sleep(0.01)
    log.info("stopped with calls in progress" if is_busy(balancer) else "stopped")


def serve(environment: Environment) -> int:
    """Serve until SIGTERM or SIGINT. Raises SettingsError, or OSError, if it cannot begin."""
    # before any thread begins: each inherits it, and only sigwait receives them
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = read_settings(environment)
    balancer = Balancer(settings, Directory(), listen(settings), connection_limit())
    handler = begin_log(settings)
    apply(balancer, settings)
    wake = threading.Event()
    begin(watch_files, balancer, environment, wake)
    begin(balancer.serve_forever, 0.05)
    port = balancer.server_address[1]
    count = len(settings.entries)
    log.info(f"tinyscale {__version__} listens on port {port}, with {count} servers")
    notify(settings, "READY=1")
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        wake.set()
    log.info("stopping")
    notify(balancer.settings, "STOPPING=1")
    # a second signal ends at once. It needs a handler: in a container we may be process 1, for
    # which the system ignores signals without one
    for last in STOP_SIGNALS:
        signal.signal(last, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    drain(balancer)
    end_log(handler)
    return 0


# What a failure looks like, and what mends it.
MENDS = {
    "WRONG_VERSION_NUMBER|wrong version|record layer": "It speaks plain HTTP there: write http://",
    "HTTP 400|RemoteDisconnected|BadStatusLine": "It may want HTTPS: write https://",
    "HTTP 3": "It redirects: write the address that it redirects to, mostly https://",
    "HTTP 40[13]": "A proxy before it refuses us: let it pass the address of this host",
    "HTTP 404": "There is no BBB at this address: compare it with 'bbb-conf --secret' there",
    "HTTP 50[234]": "The proxy there runs, but not BBB behind it: try 'bbb-conf --status' there",
    "CERTIFICATE_VERIFY_FAILED": "Renew its certificate, or name its authority in SSL_CERT_FILE",
    "Name or service|not known|resolution": (
        "Its name is not known here: check the spelling, and DNS"
    ),
    "refused|timed out|no answer|unreachable": (
        "Check that it runs, and that its firewall lets this host in"
    ),
}


def examine(directory: Directory, server: Server) -> str:
    """What check says of a server: a line, which ends in the mend if it is unusable."""
    with suppress(Unavailable):
        survey(directory, server)
    digests = []
    # the digests are tried only if it answers: it is up, or Server.judge gave a reason with this
    # word
    if server.is_up or "checksum" in server.reason:
        for digest in ALGORITHMS.values():
            other = Server(replace(server.entry, checksum=digest))
            with suppress(Unavailable):
                other.call_unlimited(ApiCall("getMeetings"))
                digests.append(digest)
    if server.is_up:
        return (
            f"{server!s:40} {state_of(server):8} {1000 * server.took:5.0f} ms, "
            f"BBB {server.version or '?':8.8} {' '.join(digests):27} "
            f"certificate {days_left(server)}, "
            f"{len(server.listed)} meetings, {people_on(server)} people"
        )
    # a failure that is no outage, for example if our own machine can open no more files, does not
    # mark the server down: its text is in `warned`
    reason = server.reason
    if not server.is_down:
        reason = ". ".join(server.warned.values())
    trouble = [reason]
    if digests:
        trouble = [f'the secret is right, but not the digest: set "checksum": "{digests[0]}"']
    for symptom, mend in MENDS.items():
        if re.search(symptom, reason):
            trouble.append(mend)
    return f"{server!s:40} UNUSABLE: {'. '.join(trouble)}"


def is_served(settings: Settings) -> bool:
    """Whether a tinyscale answers at our port."""
    place = (settings.bind or "localhost", settings.port)
    # UnicodeError: TINYSCALE_BIND cannot be a name; listen tells that
    with suppress(OSError, UnicodeError):
        sock = socket.create_connection(place, CONNECT_TIMEOUT)
        if settings.tls:
            # only to see whether it is there: our certificate has another name than localhost
            anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            anyone.check_hostname = False
            anyone.verify_mode = ssl.CERT_NONE
            sock = anyone.wrap_socket(sock)
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        answer = sock.makefile("rb").read(MAX_HEAD)
        return answer.endswith(tuple(HEALTH.values()))
    return False


def check(environment: Environment) -> int:
    """Try every server and our own settings, and print what came of it.

    Return 1 if a server must be mended, or our port cannot be had.
    """
    settings = read_settings(environment)
    # the lines that are printed say it all
    logging.disable()
    directory = Directory()
    directory.use(settings.entries, settings.placement)
    servers = directory.servers
    for line in directory.threads.map(examine, [directory] * len(servers), servers):
        print(line, flush=True)
    trouble = [f"tinyscale itself: {warning}" for warning in settings.warnings]
    unusable: list[object] = [server for server in servers if not server.is_up]
    if unusable:
        mend = f"Mend {len(unusable)} of {len(servers)} servers, or take them out of the list."
        trouble.append(mend)
    try:
        if not is_served(settings):
            listen(settings).close()
    except OSError as error:
        unusable.append(error)
        trouble.append(f"tinyscale itself: {error}")
    print("\n".join(trouble) or "All is well.", flush=True)
    return 1 if unusable else 0


def print_url(environment: Environment) -> int:
    """Print the signed URL of a call."""
    settings = read_settings(environment, needs_servers=False)
    # from the command line, see main
    text = environment["call"] or "getMeetings"
    require(
        re.fullmatch('[A-Za-z0-9]+(/[A-Za-z0-9]+)*([?][!-"$-~]*)?', text),
        f"url: {text!r:.99} is no call. Write it like 'getMeetingInfo?meetingID=room+7'.",
    )
    call, _, query = text.partition("?")
    host = settings.bind or "localhost"
    if ":" in host:
        host = f"[{host}]"
    scheme = "https" if settings.tls else "http"
    signed = sign(call, query, settings.secrets[0])
    print(f"{scheme}://{host}:{settings.port}/bigbluebutton/api/{call}?{signed}", flush=True)
    return 0


COMMANDS = {"serve": serve, "check": check, "url": print_url}
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
        description="Makes several BigBlueButton servers look like one. README.md tells more.",
        epilog=f"environment:\n{described}\n{HELP_END}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # what is not given does not replace a variable of the environment
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="serve",
        choices=COMMANDS,
        help="(default: serve)",
    )
    parser.add_argument(
        "call", nargs="?", default="", help="for url, such as 'getMeetingInfo?meetingID=x'"
    )
    for flag, name in (
        ("--port", "PORT"),
        ("--bind", "TINYSCALE_BIND"),
        ("--servers", "TINYSCALE_SERVERS"),
    ):
        parser.add_argument(flag, dest=name, help=f"instead of {name}")
    parser.add_argument("--version", action="version", version=f"tinyscale {__version__}")
    options = parser.parse_intermixed_args(arguments)
    if options.call and options.command != "url":
        parser.error(f"{options.command} takes no {options.call!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # its command and call are no names of settings
    environment = {**os.environ, **vars(options)}
    try:
        return COMMANDS[options.command](environment)
    except (SettingsError, OSError) as error:
        level = "<3>" if is_journal(environment.get("JOURNAL_STREAM", "")) else ""
        # who reads it may be gone
        with suppress(OSError):
            print(f"{level}tinyscale: {error}", file=sys.stderr, flush=True)
        # what is no mistake may pass by itself
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # not sys.exit: Python would wait for threads that may wait for a hung server
    os._exit(main())
