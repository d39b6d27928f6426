#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

It verifies the checksum of each API call, finds the server that runs the meeting, signs the call
again with that server's secret and relays the answer. A meeting that exists nowhere is created on
the next server of servers.json, or on the one with the least load.

The way of a call:

    Balancer.process_request   gets an accepted connection, which a thread of a pool serves
    Handler.serve              begins with TLS if we serve HTTPS; closes the connection
    Handler.handle             reads one request, writes one answer
    Handler.read_head          reads its head; parse_head refuses what is no plain HTTP
    Handler.read_call          verifies the checksum, then reads the body
    ROUTES[call].handle        chooses the server, or asks all of them (Part II)
    Server.call                has the call signed with that server's secret, and sent
    Handler.respond            writes a line in the log, and the answer

Kept in memory, in one Directory, behind its lock: where each meeting was last seen, and which
creates are on their way. Every server is asked for its meetings again and again (a survey), so a
restart loses nothing but what a silent server alone knows.

To audit, read Part I, and the tables ROUTES and PAGES. Begin with verify, then parse_head, Handler
and Connections. What else to look at:

- Secrets outside of Part I: read_settings and what it calls read them; print_url signs a URL; join
  hands out one that was signed; apply, check, Directory.use and examine pass entries on. No secret
  is ever an argument of the command line.
- XML from servers is parsed by `parse`, and by `mend`, which that calls. Answer.returncode, judge,
  is_denial, items_of, relay_recording and destroy_hook only search its bytes for a word.
- Connections outside of Part I: listen and read_tls make the listener, connection_limit says how
  many there may be, count_call counts the calls. is_served connects to our own port, notify to
  systemd.

Every server is trusted with every meeting: the one that says it has a meeting gets its calls. It is
not trusted to run a script under our name, or to send its answer drop by drop.
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

# To connect to an address of a server, and once more for the TLS handshake. DNS has no limit.
CONNECT_TIMEOUT = 3
# How long we go on reading after the deadline for an answer: if our machine was paused, the answer
# may have arrived in time without having been read.
LATE = 0.5
# How long a client may take for its TLS handshake, its head and its form, all together; and how
# long we listen to a client that has its answer but still sends.
HEAD_TIMEOUT = 10
# How long a client may be silent after that. A proxy in front of us gives up earlier: nginx after
# 60 s.
SILENCE_TIMEOUT = 75
# Connections that are kept to a server, and how old they may be: BBB's nginx closes idle ones after
# 75 s, and its address may change.
MAX_KEPT = 32
KEPT_FOR = 30
# The head of a request, or a form.
MAX_HEAD = 64 * 1024
# What is read at a time. An eighth of it is written at a time, so that even a very slow client
# takes each piece within SILENCE_TIMEOUT.
CHUNK = 64 * 1024
# One body, for example slides; and all bodies at one time. read_body holds each twice for a moment.
MAX_BODY = 100 * 1024 * 1024
MAX_BODIES = 256 * 1024 * 1024
# A server's answer. All answers at one time have no limit of their own: servers are trusted.
MAX_ANSWER = 32 * 1024 * 1024
# Parameters of a call. No call has nearly as many; each costs time before the checksum is verified.
MAX_PARAMETERS = 1000
# A form up to this length is sent on as the query of a URL, which every version of BBB takes; but
# nginx and Tomcat refuse URLs of 8 KiB. A longer one is sent on as a form.
MAX_QUERY = 7000

# ---- settings ------------------------------------------------------------------------------------

# By the length of the digest in hex, as BBB tells them apart: the caller chooses, and no setting
# forbids one. Old front ends have only SHA-1, which is accepted, as no attack is known that works
# here. It would be this: somebody makes two texts with the same SHA-1, a join and another call. He
# chooses the name of a person in the join so that it is the one text; a front end signs it, and its
# checksum fits the other text, too. But such pairs of texts can only be made of arbitrary bytes,
# while these may have only the characters of an encoded query.
ALGORITHMS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}


# Without a repr: it could show the secret.
@dataclass(frozen=True, repr=False)
class Entry:
    """An entry of servers.json, its values checked by ENTRY_RULES."""

    # its URL without /bigbluebutton, see base_url: ASCII, no "?", "#" or "@". It may be http://:
    # then whoever can read what is sent there reads every call
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
    # of the front ends; each of them is good for every call
    secrets: tuple[str, ...]
    # "" for all addresses
    bind: str
    port: int
    # one of PLACEMENTS
    placement: str
    # None for plain HTTP, for example behind nginx
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
    # for each file a text that changes when the file does, see stamp in Part III
    stamps: dict[str, str]


# ---- checksums -----------------------------------------------------------------------------------


def checksum(name: str, query: str, secret: str, algorithm: str) -> str:
    """The hex checksum of a call: over its name, its raw query without a checksum, and a secret.

    The rule is that of BBB's API documentation. Nothing separates the name from the query. So who
    has a signed URL can move letters from one to the other, and the checksum stays right: that of
    join?meetingID=x also fits joi?nmeetingID=x and joinm?eetingID=x. That never makes another call
    of BBB: one of the two names would have to begin with the other one, and no two in ROUTES do.
    What a guest could do with a name that BBB does not have is said, and prevented, at CALL_PATH.
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

    A form is a query that is sent in the body; if its checksum is in the URL, read_call has put
    both together. Front ends make the checksum over the form's raw text or, as BBB wants it since
    2.6.18, over the empty query. The latter is a weakness of BBB that we must share: whoever knows
    the checksum of a call over the empty query can send any form to that call. Front ends that
    sign forms in that way know such checksums, and so does whoever reads queries in a proxy's log.
    A guest does not. By moving letters, see `checksum`, the one of join?meetingID=x would be over
    the empty query for a call with the name joinmeetingID=x; but CALL_PATH takes no "=" in a name.

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
        # if one of these is repeated, some of BBB's calls take the first value, and some the last:
        # we and BBB could mean different meetings. A guest called "Ann&meetingID=x" could slip in a
        # second one, through a front end that forgets to encode names. So it is refused
        if name in params and name in ("checksum", "meetingID", "recordID"):
            raise refused
        # of any other parameter BBB takes the first value, and so do we
        params.setdefault(name, unquote_plus(raw_value))

    given = params.get("checksum", "")
    algorithm = ALGORITHMS.get(len(given))
    # like BBB, we take it for no checksum if its name or value is written with %
    if algorithm is None or f"checksum={given}" not in parts:
        raise refused
    unsigned = without(query, "checksum")
    signed_texts = [unsigned, ""] if is_form else [unsigned]
    for text in signed_texts:
        for secret in secrets:
            right = checksum(call_name, text, secret, algorithm)
            # hex of either case will do, as for BBB; a blank secret never verifies anything
            if secret.strip() and hmac.compare_digest(right.encode(), given.lower().encode()):
                return unsigned, params
    raise refused


# ---- calls ---------------------------------------------------------------------------------------

FORM = "application/x-www-form-urlencoded"
# If a hostile server puts a script into its answer, this field keeps a browser from running it
# under our name. Relayed answers and our own XML have it; our HTML pages have a stricter one.
SANDBOX = ("Content-Security-Policy", "sandbox")
# How BBB's XML begins. What does not match is never parsed. (No DTD may get to the parser, as that
# can declare entities with which a small text grows to gigabytes. So `parse` in Part II takes every
# answer for UTF-8, drops all before <response>, replaces BBB's CDATA sections by their text, and
# has no parser read what still has a "<!" in it.)
RETURNCODE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml [^>]*>\s*)?"
    rb"<response>\s*<returncode>(SUCCESS|FAILED)</returncode>"
)


class Answer(NamedTuple):
    """An answer of a server, or our own."""

    status: int
    body: bytes = b""
    # without the charset some clients would take it for Latin-1
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "text/xml;charset=utf-8"), SANDBOX)

    @property
    def returncode(self) -> str:
        """SUCCESS or FAILED, the first element of each answer of BBB; "" if this is no such one."""
        match = RETURNCODE.match(self.body)
        return match[1].decode() if match else ""


# Not eq: a dataclass that compares its fields has no hash, and exceptions need one.
@dataclass(eq=False)
class ApiError(Exception):
    """Why a call is refused: BBB's messageKey and message, and an HTTP status.

    BBB refuses with status 200.
    """

    key: str
    message: str
    status: int = 200
    # for the log: which server it is about, and why that one
    note: str = ""
    # if set, the caller gets this instead of `answer`: a page for a browser, see join; or a
    # server's own refusal, if all servers refused, see ask_all
    page: Answer | None = None

    def answer(self) -> Answer:
        """In BBB's shape. The words are our own: there is nothing to escape."""
        text = (
            "<response><returncode>FAILED</returncode>"
            f"<messageKey>{self.key}</messageKey><message>{self.message}</message></response>"
        )
        return Answer(self.status, text.encode())


class Unavailable(ApiError):
    """A call failed. Unless this is a NotCarriedOut, below, no other server may get the call.

    The most important reason is that the server MAY have carried it out. Part II has others: the
    meeting is held for a server that is down, no server is left, or an answer would not be whole.
    """

    def __init__(self, note: str = "no server is up") -> None:
        super().__init__(
            "serverUnavailable",
            "The server cannot be reached now. Please try again in a minute.",
            note=note,
        )


class NotCarriedOut(Unavailable):
    """A call failed, and the server has NOT carried it out: another server may get it.

    (After a 502 that is not quite sure, but taken for it: see GONE in Part II.)
    """


@dataclass
class ApiCall:
    """A call: of a client, whose checksum was verified, or one that we make ourselves."""

    # what follows /bigbluebutton/api/
    name: str
    # raw, without its checksum: it goes on byte for byte. Printable ASCII without "#", see REQUEST
    # and read_call; what we write ourselves is made by quote_plus
    query: str = ""
    # the decoded parameters, the checksum among them. Of a client's call they are empty until it
    # was verified, and never after that: is_busy in Part III relies on it
    params: dict[str, str] = field(default_factory=dict)
    # slides or a file, which the checksum does not cover; with a body the call is a POST
    body: bytes = b""
    # of the body. FORM is special: it says that the query came as a form, and there is no body;
    # sign_again may then send the query as a form, too
    content_type: str = ""
    # a person in a browser waits for the answer
    wants_html: bool = False
    # for the log: which server, and why that one
    note: str = ""

    @property
    def route(self) -> Route:
        """Its properties: see Route. A call that we do not know is relayed, see OTHER_CALL."""
        return ROUTES.get(self.name, OTHER_CALL)

    @property
    def meeting_id(self) -> str:
        return self.params.get("meetingID", "")


# ---- one BBB server ------------------------------------------------------------------------------

# Whose certificates we accept: the system's authorities, or those of SSL_CERT_FILE or SSL_CERT_DIR.
# TLS 1.2 is the default only since Python 3.10.
TRUST = ssl.create_default_context()
TRUST.minimum_version = ssl.TLSVersion.TLSv1_2
# Since Python 3.13 the default is strict about the form of certificates, and refuses authorities
# that many schools have made for themselves. Chain, name and dates are verified all the same.
TRUST.verify_flags &= ~ssl.VERIFY_X509_STRICT

# The fields of a server's answer that are passed on. A location is that of a join that BBB refuses;
# other redirects are no usable answers, see Server.judge. A join with redirect=false needs the
# cookie that BBB sets. So a server can set cookies for our name, and for the domain above it: that
# is accepted.
PASSED_ON = ("content-type", "location", "set-cookie")


class SignedRequest(urllib.request.Request):
    """A signed call on its way to a server."""

    # set by sign_again: it does no harm if the server gets it twice
    may_repeat = False
    # set by do_open: a kept connection turned out to be closed, so the server may get it twice
    was_repeated = False
    # set by exchange: when the answer must be there. A repeat has the same deadline. (urllib sets
    # `timeout`, the seconds for an answer)
    deadline = 0.0


class Drops(io.RawIOBase):
    """What comes from a server, up to a deadline for the whole answer. Raises socket.timeout.

    The timeout of a socket alone would not do: it begins again with each drop that arrives.

    If the server says "Connection: close", http.client closes the socket before it reads the body.
    But Python really closes a socket only when all files made from it are closed, such as `file`:
    until then it can be read, and given a timeout. `file` is closed by Python when nothing refers
    to it any more: it goes with this object, at the end of the answer.
    """

    is_late = False

    def __init__(self, sock: socket.socket, deadline: float, file: io.BufferedReader) -> None:
        self.sock = sock
        self.deadline = deadline
        # http.client's file on that socket
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        """Read what has come, or wait for it. Return how many bytes, 0 at the end."""
        now = time.monotonic()
        if now > self.deadline:
            if self.is_late:
                raise socket.timeout("timed out")
            # a read that waits too long ends below, by settimeout. So the deadline has passed
            # between two reads, as data keep coming or our machine was paused. In case of a pause
            # the answer may be there already: reading goes on, but only once and for LATE
            self.is_late = True
            self.deadline = now + LATE
        # 0 would mean: do not wait at all
        self.sock.settimeout(max(0.001, self.deadline - now))
        return self.file.readinto1(buffer)


class Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """The connections to one BBB server; they stay open for the next call.

    It is the base of Server in Part II, and the one place where a server's secret is used. As a
    handler of urllib, it is called by urllib's opener: `send` calls self.parent.open, that calls
    http_open or https_open of the base classes, and these call our `do_open`.

    A server may close a kept connection just as we write to it. Then nobody knows whether it got
    the request, so only a request that may be sent twice uses a kept connection.
    """

    def __init__(self, entry: Entry) -> None:
        # the __init__ of HTTPSHandler: HTTPHandler has none of its own. Connections to https:// are
        # made with this context
        super().__init__(context=TRUST)
        # when servers.json changes, Directory.use puts another entry with the same host here. Kept
        # connections may stay: they hold no secret, each call is signed anew
        self.entry = entry
        # when the server's certificate ends, as time.time; 0 if that is not known
        self.certificate_end = 0.0
        # connections for the next calls. No lock: to append and to pop is one step in Python each
        self.kept: list[Any] = []
        # an opener with this handler alone; add_handler sets self.parent to it. urllib's default
        # opener would follow redirects, use the proxies of the environment, and raise an error for
        # a status of 400 or more
        urllib.request.OpenerDirector().add_handler(self)

    def __str__(self) -> str:
        return self.entry.host

    def url_for(self, call: str, query: str) -> str:
        """The URL of a call, signed with this server's secret."""
        # looked up once: it may be replaced at any moment
        entry = self.entry
        signed = sign(call, query, entry.secret, entry.checksum)
        return f"{entry.host}/bigbluebutton/api/{call}?{signed}"

    def sign_again(self, call: ApiCall) -> SignedRequest:
        """The call as a request to this server.

        A form that is too long for a URL is sent as a form. Its checksum is over the empty query:
        BBB makes it over nothing else since 2.6.18, see verify. (Before, it made it over the
        parameters, sorted and encoded anew. We do not try that, so an older BBB refuses long
        forms.) Such a checksum is worth more than others, but nobody should see it but that server,
        which knows its own secret.
        """
        body = call.body
        url = self.url_for(call.name, call.query)
        if call.content_type == FORM and len(call.query) > MAX_QUERY:
            # the checksum is in the form, not in the URL, and so in no log of a proxy
            url, _, signature = self.url_for(call.name, "").partition("?")
            body = f"{call.query}&{signature}".encode()
        request = SignedRequest(url, body or None, {"User-Agent": f"tinyscale/{__version__}"})
        if body:
            request.add_header("Content-Type", call.content_type)
            return request
        # to the repeat of a create with both passwords BBB answers SUCCESS, with duplicateWarning;
        # but if BBB has made up a password itself, it refuses the repeat
        has_passwords = call.params.get("attendeePW") and call.params.get("moderatorPW")
        request.may_repeat = call.route.is_read or (call.name == "create" and bool(has_passwords))
        return request

    def send(self, request: SignedRequest, timeout: float) -> Answer:
        """Send a request and return the whole answer.

        Raises URLError if there is no connection: then the server has not seen the request. If it
        may have, raises socket.timeout for its silence, or another OSError, HTTPException or
        ValueError.
        """
        # open returns what do_open returns
        return cast(Answer, self.parent.open(request, timeout=timeout))

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        """Send a request, on a kept connection if it may use one; return the whole answer.

        It takes the place of urllib's own do_open. `http_class` is http.client's HTTPConnection or
        HTTPSConnection; for the latter, `options` has the context that verifies the server, TRUST.
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
                # no URLError: the server may have carried out the first one, if it was a create. (A
                # read is not tried elsewhere then, which is accepted)
                raise
            raise urllib.error.URLError(error) from error
        fresh.usable_until = time.monotonic() + KEPT_FOR
        if req.type == "https":
            self.certificate_end = ssl.cert_time_to_seconds(fresh.sock.getpeercert()["notAfter"])
        return self.exchange(fresh, req)

    def take(self) -> Any:
        """A kept connection that is still good: nothing can be read from it, not even its end.

        None if there is none. They are taken in turn, as old ones are only found and closed here.
        """
        with suppress(IndexError):
            while True:
                connection = self.kept.pop(0)
                if time.monotonic() < connection.usable_until and not is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def exchange(self, connection: Any, request: SignedRequest) -> Answer:
        """Send the request and read the whole answer; then keep the connection, or close it."""
        request.deadline = request.deadline or time.monotonic() + (request.timeout or 0)

        # getresponse, below, calls this to make its response, which is read from its file fp
        def timed_response(sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
            response = http.client.HTTPResponse(sock, **options)
            response.fp = io.BufferedReader(Drops(sock, request.deadline, response.fp))
            return response

        connection.response_class = timed_response
        # the head must be sent within that time, and then the body, also over TLS. (The deadline
        # for the answer runs meanwhile: after an upload that took all of it, only LATE is left)
        connection.sock.settimeout(request.timeout)
        # (urllib has put Host and Content-Length into the fields)
        try:
            # a server may refuse a body half way, and close; its answer can be read all the same.
            # If there is no answer, getresponse raises ConnectionError
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
            # after a status of 1xx, which has no body, another answer comes
            or answer.status < 200
            # timed_response holds the request: its body would stay in memory with the connection
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
    # TLS may have read something already
    return bool(poll.poll(0)) or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)


def read_answer(response: http.client.HTTPResponse) -> Answer:
    """The whole answer. Raises OSError or HTTPException."""
    fields = tuple(
        # a line break in a value would begin another field
        (name, re.sub(r"[\x00-\x1f\x7f]+\s*", " ", value))
        for name, value in response.getheaders()
        if value and name.lower() in PASSED_ON
    )
    # None if the server does not tell it, but closes at the end or sends chunks. Read now, as
    # http.client counts it down
    length = response.length
    body = bytearray()
    # read1 returns what has come. It closes the response at the end, also if that comes too early
    while len(body) != length and len(body) <= MAX_ANSWER and not response.isclosed():
        body += response.read1(CHUNK)
    # too large, or cut short
    if len(body) > MAX_ANSWER or length not in (None, len(body)):
        raise http.client.IncompleteRead(b"")
    return Answer(response.status, bytes(body), (*fields, SANDBOX))


# ---- HTTP: what strangers send -------------------------------------------------------------------

# The head of a request: a method; a target, which is a path and a query of printable ASCII without
# "#" (some proxies write a scheme and a host before the path: they are ignored); and at most a
# hundred fields: a name, a colon, and a value without NUL, CR or LF.
REQUEST = re.compile(
    r"(?a)([A-Z]+) (?:https?://[\w.:\[\]-]+)?(/[!-\"$-~]*) HTTP/1[.][01]\r\n"
    r"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r\n){0,100})\r\n"
)
# A bare LF, too, ends the reading of a head, or we would wait for CR LF in vain; parse_head refuses
# such a head.
END_OF_HEAD = re.compile(rb"\r\n\r\n|(?<!\r)\n")
# A slash too many is forgiven: Greenlight 3.0.1 sends /api//create, bigbluepy sends join/.
#
# No name but join may begin with a j. Otherwise the checksum of a guest's join link would be right
# for names such as "joi" or "joinm", too, see `checksum`. BBB has no such calls. But for a call
# that we do not know Handler.read_call waits patiently for a body of 100 MiB; so a guest could
# occupy all connections for as long as he likes. The body of a join is not read. (Whoever gets hold
# of another signed URL can do that. What a guest can do with joins alone: see close_slowest.)
CALL_PATH = re.compile(r"/bigbluebutton/api/{1,2}(join|(?!j)[A-Za-z0-9]+(?:/[A-Za-z0-9]+)*)/?")
# A moment that never comes: later, or newer, than all others.
NEVER = float("inf")


class Head(NamedTuple):
    """The head of a request."""

    method: str
    path: str
    # raw
    query: str
    # by name in lower case; of a repeated field the last value
    fields: dict[str, str]
    # of the body, in bytes
    length: int


def parse_head(head: bytes) -> Head:
    """The parts of a request's head.

    Raises ApiError for what is no plain HTTP/1.1, or what a proxy in front of us could read in
    another way. (Therefore not http.server's own parser, which is made for e-mail: it takes a bare
    CR for the end of a line.)
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
    """Log a connection that broke off, or a bug of ours.

    Of a bug the text is left out: it may quote a query.
    """
    if isinstance(error, OSError):
        # errors of TLS have a reason, which says more
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
        # since when we have been waiting for the client. If there are too many connections,
        # Balancer.close_slowest closes the one with the earliest such time. In order:
        # - the start of the connection: we wait for the head, or for a form
        # - NEVER, set by read_call: the checksum was right, be it that of a guest's join. We read
        #   the body, and then the client waits for us
        # - the moment when `respond` begins to send the answer, and anew with each piece of it: we
        #   wait for the client to take that piece, and at last, in `linger`, to stop sending
        self.waiting_since = self.started
        self.call = ApiCall("-")
        self.head = Head("GET", "", "", {}, 0)
        # while the head is being read, what has been received of it; then what came behind it, the
        # begin of the body. read_body copies that, and collects the rest elsewhere
        self.buffer = b""
        # read_body took the body: it has been read, or is being read. A body that was not taken,
        # because it was refused, or is that of a join or of a page, may still be on its way, see
        # respond
        self.took_body = False
        # the whole answer has been handed to the system: is_busy in Part III does not wait for it
        self.is_answered = False

    def serve(self) -> None:
        """The connection from beginning to end."""
        try:
            tls = self.balancer.settings.tls
            if tls:
                # the handshake is a step of its own. wrap_socket takes the connection away from the
                # plain socket; so self.sock must be the TLS socket before a slow client can make
                # the handshake wait, or close_slowest could not end it
                self.sock = tls.wrap_socket(
                    self.sock, server_side=True, do_handshake_on_connect=False
                )
                # for all of the handshake, not for each read in it
                self.sock.settimeout(HEAD_TIMEOUT)
                self.sock.do_handshake()
            self.handle()
        except OSError as error:
            # a client that sends nothing and hangs up, such as a monitor that tries the port, is no
            # news
            has_sent = self.buffer or self.head.path
            if has_sent or not isinstance(error, (ConnectionError, ssl.SSLEOFError)):
                log_error(self.address, error)
        except Exception as error:
            # whatever the bug is, the caller gets an answer; if even that fails, nobody can be told
            log_error(self.call.name, error)
            bug = ApiError("internalError", "A mistake of tinyscale; see its log", 500)
            self.respond(bug.answer(), "bug")
        finally:
            self.balancer.handlers.discard(self)
            # this calls the shutdown of SSLSocket, which ends TLS: what follows would be in clear
            # text. But nothing follows but the close. (Before the end, `linger` and close_slowest
            # call the shutdown of the plain socket instead)
            self.balancer.shutdown_request(self.sock)

    def handle(self) -> None:
        """Read one request and answer it. Raises OSError if the client goes away before that."""
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
        """The next bytes of a client: the one place that reads from it.

        Raises ConnectionError at the end of what it sends, another OSError if the connection
        breaks, and socket.timeout if it is too late.
        """
        # for the head and a form together, or for all that `linger` reads. For the body of a call
        # that was verified it is infinite, and only SILENCE_TIMEOUT counts
        seconds = self.waiting_since + HEAD_TIMEOUT - time.monotonic()
        # too late. But if nothing has been read yet, neither a part of the head (in the buffer) nor
        # all of it (which sets the path), there is a last try of 1 ms: if our machine was paused,
        # it may have arrived meanwhile
        if seconds <= 0 and (self.buffer or self.head.path):
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
            # the next search begins where this one ended, less the three bytes in which an end may
            # have begun (a CR before these is seen by the lookbehind). Else a head that comes byte
            # by byte would be searched 65,536 times
            searched = max(0, len(self.buffer) - 3)
            self.buffer += self.receive()
            # the first byte of a TLS handshake
            if self.buffer.startswith(b"\x16"):
                raise ConnectionError(errno.EPROTO, "it speaks HTTPS to a port of plain HTTP")
        # if there is a bare LF instead, `head` is the whole buffer, and parse_head refuses it
        head, end, self.buffer = self.buffer.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            raise ApiError("badRequest", "The head of the request is too large", 431)
        return head + end

    def answer(self) -> Answer:
        """The answer to the request whose head has been read. Raises ApiError if it is refused."""
        path = self.head.path
        page = PAGES.get(path)
        password = self.balancer.settings.status_password
        if page and (password or page in PUBLIC_PAGES):
            return self.answer_page(page, password)
        match = CALL_PATH.fullmatch(path)
        if not match:
            # cut at the first odd character: if somebody forgot the "?", the query is in the path,
            # and no query may get into the log
            self.call.note = repr(re.sub("[^A-Za-z0-9/._-].*", "...", path)[:99])
            raise ApiError("notFound", "There is nothing at this address", 404)
        self.call.name = match[1]
        self.read_call(self.call)
        return self.call.route.handle(self.balancer.directory, self.call)

    def answer_page(self, page: Callable[[Balancer], Answer], password: str) -> Answer:
        """A page of our own. Unless it is public, it needs the password of user admin.

        Public are the version of BBB's API, and /health, which tells whether a new meeting could be
        placed. /status shows the rooms with their names, and how many people are in them; /metrics
        shows the servers, and numbers. None of them changes anything. How often somebody guesses
        the password is not limited: it should be a long one.
        """
        self.call.name = self.head.path
        # some front ends ask for the version by POST. (For other pages GET is there twice)
        self.allow("GET", "HEAD", "POST" if page is version_page else "GET")
        given = self.head.fields.get("authorization", "").encode()
        # (it is not blank, unless the page is public: else `answer` would not have come here)
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
        """Fill in the call: verify its checksum, then read its body.

        Only a form is read before it is verified, because it is the query. Raises ApiError.
        """
        query = self.head.query
        # a join is a link, and mail programs try links by HEAD: they get our redirect, as by GET.
        # (A join with redirect=false is carried out, as by GET.) Of other calls HEAD is refused, as
        # it would carry them out
        self.allow("GET", "HEAD" if call.name == "join" else "POST")
        media_type = self.head.fields.get("content-type", "").partition(";")[0].strip().lower()
        # a GET, too, can have a body. That of a join is not read: a guest has a right checksum, and
        # could send 100 MiB slowly
        has_body = self.head.length > 0 and call.name != "join"
        # a form is the query, if the query of the URL is empty or has nothing but the checksum. If
        # there is more in it, a body that is called a form can only be XML, see read_slides
        is_form = has_body and media_type == FORM and bool(re.fullmatch("(checksum=[^&]*)?", query))
        if is_form:
            call.content_type = FORM
            form = self.read_body(MAX_HEAD).decode("latin-1")
            if not re.fullmatch('[!-"$-~]*', form):
                raise ApiError("badRequest", "The form is not URL-encoded", 400)
            query = "&".join(filter(None, [form, query]))
        call.query, call.params = verify(call.name, query, self.balancer.settings.secrets, is_form)
        call.wants_html = "text/html" in self.head.fields.get("accept", "")
        # a client that knows a secret, or has a signed URL, may be slow from now on
        self.waiting_since = NEVER
        if has_body and not is_form:
            self.read_slides(call, media_type)

    def read_slides(self, call: ApiCall, media_type: str) -> None:
        """Read the body of a call whose checksum was right: XML or a file, which goes on as it is.

        Raises ApiError.
        """
        # the checksum does not cover a body. So the parameters of a call must not be in a form if
        # the URL has some already; but some clients label XML as a form.
        # Accepted: BBB may take the fields of a multipart body for parameters, and they are not
        # signed. It needs such bodies for putRecordingTextTrack, but takes them for any call, and
        # so do we. So whoever has a signed URL (a guest has only that of a join) can send it with
        # other parameters, perhaps even another meetingID, to the server that we choose; as he
        # could if there were one BBB server in our place
        if media_type not in (FORM, "application/xml", "text/xml", "multipart/form-data"):
            raise ApiError(
                "unsupportedContentType", "POST request Content-Type is missing or unsupported"
            )
        call.body = self.read_body(MAX_BODY)
        if media_type == FORM and not re.match(rb"(\xef\xbb\xbf)?\s*<", call.body):
            raise ApiError(
                "checksumError", "Parameters must be in the URL or in the body, not in both"
            )
        # the bare type, as BBB wants it; also for XML that was labelled as a form, in which BBB
        # would look for parameters
        call.content_type = "application/xml"
        if media_type == "multipart/form-data":
            call.content_type = self.head.fields["content-type"]

    def read_body(self, limit: int) -> bytes:
        """The whole body of the request.

        Raises ApiError if it is too large, or if all bodies together are.
        """
        size = self.head.length
        if size > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        # noted before the sum is made: so of two at the same moment neither overlooks the other
        self.took_body = True
        # forms, for which read_call has set this type, are small: they do not count, and are never
        # refused for that. (XML that is labelled as a form counts, as its type is not set yet)
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

        The line has the call, the meetingID, the server (or the path that was not found, or the
        caller's address), the outcome, status and time. It has no query, and no name of a person or
        a room. (`note` has only our own words, hosts, and reasons of the system or of OpenSSL.) The
        name of a call that was not verified may be any letters.
        """
        seconds = time.monotonic() - self.started
        count_call(self.balancer, self.call, outcome, seconds)
        if self.call.name not in PAGES or answer.status >= 400:
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
        # from now on we wait for the client to take the answer
        self.waiting_since = time.monotonic()
        self.send(head.encode("latin-1") + body)
        self.is_answered = True
        # the path is "" if the head itself was refused
        if not self.head.path or (self.head.length > 0 and not self.took_body):
            self.linger()

    def send(self, data: bytes) -> None:
        """Write to the client: the one place that does. It may be slow, but not silent.

        Raises OSError.
        """
        self.sock.settimeout(SILENCE_TIMEOUT)
        # in pieces, each of which may take SILENCE_TIMEOUT
        for start in range(0, len(data), CHUNK // 8):
            if start:
                # it has taken the piece before
                self.waiting_since = time.monotonic()
            self.sock.sendall(data[start : start + CHUNK // 8])

    def linger(self) -> None:
        """Read what the client still sends, and drop it.

        If we closed the connection at once, the system would reset it, and the client might never
        see our answer.
        """
        with suppress(OSError):
            # not the shutdown of SSLSocket, which forgets its TLS and would go on in clear text
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
            while time.monotonic() < self.waiting_since + HEAD_TIMEOUT:
                self.receive()


class Balancer(http.server.ThreadingHTTPServer):
    """The listener, and a pool of threads that serve the connections.

    What it uses of its base classes:

    - serve_forever accepts connections, and calls process_request for each
    - shutdown ends serve_forever; handle_request accepts one more; server_close closes the listener
    - shutdown_request closes one connection
    """

    def __init__(
        self, settings: Settings, directory: Directory, listener: socket.socket, limit: int
    ) -> None:
        # the base class makes a socket and wants a class of handlers: we use neither. It keeps the
        # address as server_address, whose port the command "serve" writes in the log
        super().__init__(listener.getsockname()[:2], http.server.BaseHTTPRequestHandler, False)
        self.socket.close()
        self.socket = listener
        self.settings = settings
        self.directory = directory
        self.started = time.monotonic()
        # what is wrong with the settings on disk; "" if they are good
        self.mistake = ""
        # one for each connection, and how many there may be. No lock: to add, to discard and to
        # copy is one step in Python each
        self.handlers: set[Handler] = set()
        self.limit = limit
        self.threads = futures.ThreadPoolExecutor(limit)
        # for /metrics, see count_call
        self.totals: dict[str, float] = collections.defaultdict(float)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread of the pool serve a connection.

        If there are too many connections, one must go first: see close_slowest.
        """
        # (when we stop, `drain` raises the limit, so that this loop ends. What still comes waits in
        # the pool's queue, until a thread is free or we end)
        while len(self.handlers) >= self.limit:
            self.close_slowest()
        handler = Handler(self, request, client_address[0])
        self.handlers.add(handler)
        # submit puts it into the pool's queue, and then starts a thread if none is idle. If the
        # system allows no more threads (RuntimeError), a thread that is there will take it from the
        # queue. (A pool that was shut down also raises RuntimeError; this one never is)
        with suppress(RuntimeError):
            self.threads.submit(handler.serve)

    def close_slowest(self) -> None:
        """Close the connection for whose client we have waited longest, if that is over a second.

        That makes its thread fail, which then takes it out of `handlers`. In any case, wait a
        moment: for that, or for another one to end by itself.

        A verified call is spared until we answer it; after that its client may be too slow to take
        the answer. (If a call is verified at this very moment, it is carried out, and its client
        sees the connection break off.) Strangers can keep others out only by making as many new
        connections as `limit` each second.

        So if all connections are verified calls, nobody else gets in. That takes as many calls at
        once as `limit` (1,000, see connection_limit). They can be slow bodies, of somebody who got
        hold of a signed URL; nginx in front of us prevents that, as it passes on a body only when
        it is whole. (Already three bodies whose lengths add up to MAX_BODIES leave no room for
        others.) Or a guest sends one join 1,000 times at once, and all of them wait for servers:
        for seconds, if nobody knows its meeting and servers are slow.
        """
        slowest = min(list(self.handlers), key=lambda handler: handler.waiting_since, default=None)
        if slowest and slowest.waiting_since + 1 < time.monotonic():
            # not the shutdown of SSLSocket, see Handler.linger
            with suppress(OSError):
                socket.socket.shutdown(slowest.sock, socket.SHUT_RDWR)
        time.sleep(0.001)


# ---- HTML ----------------------------------------------------------------------------------------


class Markup(str):
    """HTML that must not be escaped: made by fill, joined of such pieces, or a constant of ours."""


def fill(template: str, **values: object) -> Markup:
    """The template with these values in the places of their names. All but Markup are escaped.

    In an attribute a name must stand between quotes.
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
# The same for a create, a call with a body, or a list of recordings (see is_long in ROUTES): BBB's
# own nginx waits as long.
LONG_TIMEOUT = 60
# How many calls may wait for one server at the same time.
MAX_WAITING = 200
# For the answer to a question that is put to several servers at once.
PROBE_TIMEOUT = 3
# Between two surveys of a server that is up.
SURVEY_INTERVAL = 10
# How long the meetings of a server that is down are held: they may not begin anew elsewhere.
HOLD = 30
# A server that has gone down is surveyed again FIRST_RETRY later, and then RETRY_INTERVAL after
# each survey that failed; an unknown server, too. If it comes back, that should be seen within
# HOLD. The worst case: it was marked down at 0 s, a survey is sent to it at 14 s, in vain, and just
# then it comes back. That survey fails at 24 s (ANSWER_TIMEOUT), the next one finds it at 29 s.
FIRST_RETRY = 1
RETRY_INTERVAL = 5
# How long a meeting is believed to be where it was last seen: two surveys may fail. After that it
# is not forgotten, but the servers are asked.
MEETING_TTL = 30
# How long "no server has this meeting" is believed: people poll for meetings to begin.
ABSENCE_TTL = 1
# With TINYSCALE_PLACEMENT=load a meeting counts for at least EXPECTED people until we have known it
# for so long.
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
    """All properties of a call of BBB's API. ROUTES, at the end of Part II, has a row for each."""

    handle: Callable[[Directory, ApiCall], Answer]
    # it changes nothing, so it may be sent twice
    is_read: bool = False
    # its failure may mean that the server is down, and its answer that it is not. Other calls say
    # nothing about that: webhooks are another program, recordings are slow, old servers lack some
    # calls, and a join is mostly sent by the browser
    tells_health: bool = False
    # only BBB's XML is an answer to it: an error page of a proxy never reaches the caller
    is_xml: bool = True
    # it may take LONG_TIMEOUT
    is_long: bool = False


# ---- a server's state ----------------------------------------------------------------------------

# Errors that mean that our own machine lacks something: no outage of a server. EBUSY is what
# glibc's getaddrinfo leaves in errno if it can open no more files.
OUR_TROUBLE = (
    errno.EBUSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.EADDRNOTAVAIL,
)
# What a proxy answers if no BBB works behind it: an outage. After all of these but 504 another
# server may get the call; after a 504 BBB may have carried it out, see Server.judge. (A 404 only
# counts for the calls that are is_xml in ROUTES: a BBB knows these.)
#
# BBB may have carried out a create that ended in a 502, too, if it broke off in the middle. That is
# accepted. Mostly it is being restarted then, and loses its meetings. If not, the meeting may run
# on two servers, a twin, see Directory.note_twins.
#
# A redirect is taken for one of these: BBB redirects only joins, so a proxy wrote it.
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
    """One BBB server, and its state. Times are those of time.monotonic, in seconds.

    The state is noted without a lock. If two calls note it at the same moment, one note may be
    lost: the next call or survey tells it again.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.slots = threading.BoundedSemaphore(MAX_WAITING)
        # recordings take up to a minute, so they have slots of their own: no other call has to wait
        # for them
        self.recording_slots = threading.BoundedSemaphore(MAX_WAITING)
        # "unknown" until a survey finds it "up", or a failure shows that it is "down"; since when,
        # and why
        self.state = "unknown"
        self.since = time.monotonic()
        self.reason = "no survey yet"
        # for each call that failed last time, but was no outage: why. So that is logged once
        self.warned: dict[str, str] = {}
        # set when it goes down: it is surveyed again soon
        self.wake = threading.Event()
        # of the calls that tell its health (see Route) and got a usable answer, when the newest one
        # was SENT: no failure of an older one marks it down, see note_down
        self.answered = 0.0
        # the same of calls that got any answer, even an error page. That is what `choose` asks for,
        # as some servers answer getMeetingInfo with a status of 500 if they lack the meeting, which
        # is no outage
        self.reacted = 0.0
        # how many seconds its last answer took, to a read that tells its health
        self.took = 0.0
        self.version = ""
        # after a create failed there: how many more good surveys it needs before it gets new
        # meetings like the others
        self.doubts = 0
        # a thread surveys it
        self.is_watched = False
        # its last good survey: when it was sent, and the meetings that it found
        self.surveyed = 0.0
        self.listed: dict[str, MeetingInfo] = {}

    @property
    def is_up(self) -> bool:
        return self.state == "up"

    @property
    def is_down(self) -> bool:
        return self.state == "down"

    @property
    def is_new(self) -> bool:
        """Whether it may have meetings unknown to us, as its first survey may be on its way.

        That is so for 13 s. (With slow DNS, a second address or a slow TLS handshake a survey may
        take longer: nobody waits for that.)
        """
        age = time.monotonic() - self.since
        return self.state == "unknown" and age < CONNECT_TIMEOUT + ANSWER_TIMEOUT

    @property
    def is_able(self) -> bool:
        """Whether it may get new meetings; Directory.choose says which of those is preferred."""
        return self.is_up and not self.entry.cordoned

    def call(self, call: ApiCall, why: str, timeout: float = 0) -> Answer:
        """Sign a call, send it, and return the server's answer if it is usable.

        Marks the server down if this shows an outage. Raises NotCarriedOut if the server cannot
        have carried out the call, and Unavailable if it may have.
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
        """Like `call`, but never refused for want of a slot: for surveys."""
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
            # the error's type, as its text may quote the answer
            reason = f"broken answer: {type(error).__name__}"
            if isinstance(error, socket.timeout):
                reason = f"no answer in {seconds:.0f} s"
            self.close_kept()
            raise self.failed(call, asked, reason, Unavailable, is_of_server(error)) from error
        if request.was_repeated and answer.returncode != "SUCCESS" and not call.route.is_read:
            # it can only be a create that was sent twice, see sign_again. The server may have
            # carried out the first one, whatever it says to the second. That a kept connection has
            # closed is no outage, and no reason for doubts. (Before `judge`, which might let
            # another server have the create)
            raise Unavailable(f"{self} (it refused a repeat)")
        self.judge(call, asked, answer)
        self.note_answer(call, asked)
        return answer

    def note_answer(self, call: ApiCall, asked: float) -> None:
        """Note that a call, which was sent at the time `asked`, got a usable answer.

        That does not mark the server up: `survey` or `watch` does, as its meetings should be known
        first, if they can be.
        """
        self.warned.pop(call.name, None)
        if not call.route.tells_health:
            return
        self.answered = max(self.answered, asked)
        if call.route.is_read:
            self.took = time.monotonic() - asked

    def close_kept(self) -> None:
        """Close the kept connections: if one broke or is silent, the others may be dead, too."""
        with suppress(IndexError):
            while True:
                self.kept.pop().close()

    def judge(self, call: ApiCall, asked: float, answer: Answer) -> None:
        """Raise Unavailable, or NotCarriedOut, if this is no usable answer to the call.

        An answer is usable if it comes from BBB, or may come from BBB for all that we can tell.
        """
        if call.route.tells_health:
            self.reacted = max(self.reacted, asked)
        status = answer.status
        refusal = b"<messageKey>checksumError</messageKey>"
        if answer.returncode == "FAILED" and refusal in answer.body:
            # this marks the server down, as the secret must be wrong. No caller can bring it about:
            # what we send has one checksum at its end, as verify lets no other one through. (BBB
            # also says this of parameters in a body, and an old one of a long form. `failed` does
            # not mark the server down for such calls)
            reason = "it refuses our checksum: compare the secret with 'bbb-conf --secret' there"
            raise self.failed(call, asked, reason, NotCarriedOut)
        is_redirect = 300 <= status < 400
        if is_redirect and call.name == "join":
            return
        # some calls are not answered in BBB's XML: their answers cannot be told from error pages.
        # So whatever comes is passed on, but for redirects
        may_be_no_xml = status >= 200 and not call.route.is_xml
        if (answer.returncode or may_be_no_xml) and not is_redirect:
            return
        is_gone = is_redirect or status in GONE
        # a 500 is no outage: it may be about one bad meeting
        is_outage = is_gone or status < 200
        if call.name == "getMeetings":
            # without a query, as in our surveys, any error page is an outage, even a 500. With a
            # query, which only a client sends, no error page is, not even a 502: that may come from
            # the query. The next survey will tell
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
        # a server that is well may refuse a call that has a body, or is too long for a URL. So such
        # a call never marks it down, even if it is silent: the next survey does
        is_odd = bool(call.body) or len(call.query) > MAX_QUERY
        # a create failed by an outage, or may have been carried out: the server is in doubt until
        # two surveys were good. (What is left is trouble of our own machine)
        if call.name == "create" and not is_odd and (is_outage or error is Unavailable):
            self.doubts = 2
        if is_outage and call.route.tells_health and not is_odd:
            self.note_down(reason, asked)
        elif self.warned.get(call.name) != reason:
            # only the first time: each call that fails has its own line in the log
            log.warning(f"{self} failed at {call.name}: {reason}")
            self.warned[call.name] = reason
        return error(f"{self} ({reason})")

    def note_down(self, reason: str, asked: float) -> None:
        """Mark the server down, unless it has answered a call that was sent after `asked`."""
        if self.answered > asked or (self.is_down and self.reason == reason):
            return
        log.warning(f"{self} is down: {reason}")
        self.reason = reason
        if not self.is_down:
            # in this order: a thread that sees "down" must not see the time of the state before
            self.since = time.monotonic()
            self.state = "down"
            self.wake.set()

    def note_up(self, asked: float) -> None:
        """Mark the server up, which answered a survey that was sent at the time `asked`.

        Not if it went down after that.
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
    """Do a job in a thread that must go on whatever happens: return None if the job fails."""
    try:
        return job(*arguments)
    except Unavailable:
        # Server.failed has logged that, if it is news; or too many calls wait for the server
        return None
    except Exception as error:
        # a bug. The answers of other servers, the next survey and the next look at the settings
        # depend on this thread
        log_error(what, error)
        return None


def is_of_server(error: object) -> bool:
    """Whether an error may be the server's. If our own machine lacks something, it is not."""
    return getattr(error, "errno", None) not in OUR_TROUBLE


# ---- the directory: what is remembered of meetings -----------------------------------------------

Servers = Collection[Server]


class Meeting(NamedTuple):
    """A meeting, and the server that has said that it has it."""

    info: MeetingInfo
    server: Server
    # when we first heard of it
    first_heard: float
    # when the server was asked that. LONG_AGO is a hint: it was found in a list that was not
    # well-formed, see `learn`
    asked: float
    # for the log: why a call goes to this server
    why: str = "remembered"


@dataclass
class Claim:
    """A server's claim on a meetingID: a create may be changing what it has.

    Either the create is on its way to it, or we gave up waiting for the answer: then it may have
    the meeting, but has not said so.
    """

    server: Server
    # how many creates are on their way: while there are any, the claim is not ended or replaced
    sending: int = 0
    # when we last gave up waiting for one: the server may have carried it out
    gave_up: float = LONG_AGO
    # for the log, as in Meeting
    why: str = "may have it"

    @property
    def asked(self) -> float:
        """Like `asked` of a Meeting, but this is no real time.

        `find` and `place` ask the servers for a meeting if what we know was asked too long ago.
        With NEVER they do not: a create is on its way. With LONG_AGO they always do.
        """
        return NEVER if self.sending else LONG_AGO


class Directory:
    """All servers, and where each meeting is.

    What is known is behind one lock, which is never held while a server is asked. Without the lock
    we only read single entries, and write single entries of `absent` and `probes`: each of these
    is one step in Python.

    Evidence has an age: what a server says counts from the moment when it was ASKED. Answers come
    in any order, and an older one must not undo a newer one. The clock is an argument, so that a
    test can play with it.

    What is tied to a server, and for how long:

    - the home of a meeting is the server to which a create of it must go. What ties the meeting to
      it is a Meeting or a Claim, see `tie`
    - a meeting is HELD while its home is down: calls for it fail, and it may not begin elsewhere
    - after HOLD seconds it is LOST: the next create begins it anew on another server. (If all
      servers were down, it can be HELD again after that, see is_lost)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # who holds it may take it again: methods that hold it call one another
        self.lock = threading.RLock()
        self.servers: list[Server] = []
        self.placement = "turn"
        self.turn = 0
        # when a server last came up while no other was up, see is_lost
        self.recovered = LONG_AGO
        # the servers that got the last two new meetings
        self.last_two: list[Server] = []
        # by meetingID and by internalMeetingID, as BBB accepts both
        self.meetings: dict[str, Meeting] = {}
        # by meetingID
        self.claims: dict[str, Claim] = {}
        # when a server was asked that said it does not have a meeting
        self.denials: dict[tuple[Server, str], float] = {}
        # when all servers were asked for a meeting that none of them has
        self.absent: dict[str, float] = {}
        # the meetings that run on two servers, and when that was last seen
        self.twins: dict[str, float] = {}
        # the probes that are running, by meetingID. Their result is when the servers were asked
        self.probes: dict[str, futures.Future[float]] = {}
        self.threads = futures.ThreadPoolExecutor(MAX_ASKING)
        # of each kind of list only one at a time is merged for a client. Python runs one thread at
        # a time, and to parse a long list takes long: a hundred at once would let no join through
        self.merging = {name: threading.Lock() for name in LISTS}

    def use(self, entries: Iterable[Entry], placement: str) -> None:
        """Use these servers from now on. A server that stays keeps its state and its meetings."""
        with self.lock:
            self.placement = placement
            known = {str(server): server for server in self.servers}
            servers = {}
            for entry in entries:
                server = known.get(entry.host) or Server(entry)
                server.entry = entry
                servers[entry.host] = server
            # in one assignment, as it is read without the lock
            self.servers = list(servers.values())
            for claim in self.claims.values():
                # a claim stays if its server is taken out and put back
                claim.server = servers.get(str(claim.server), claim.server)
            for key, meeting in list(self.meetings.items()):
                if meeting.server not in self.servers:
                    del self.meetings[key]

    # -- which server a meeting is tied to

    def is_lost(self, server: Server) -> bool:
        """Whether the server's meetings may begin anew elsewhere.

        They may if it was taken out of the list, or has been down for HOLD. If all servers were
        down, our own network may have failed; then HOLD counts from the moment when the first one
        came back, `recovered`, for all servers. (Even for one that had been down for an hour. That
        is accepted. And while all have been down for longer than HOLD, all their meetings are lost;
        but there is no server to begin them on.)
        """
        if server not in self.servers:
            return True
        if not server.is_down:
            return False
        # `since` is read after the state: note_down writes them in the other order. (A server's
        # times are those of time.monotonic, and outside of tests so is self.clock)
        since = max(server.since, self.recovered)
        return self.clock() - since >= HOLD

    def tie(self, meeting_id: str) -> Meeting | Claim | None:
        """The Claim or the Meeting that ties a meeting to a server: a create of it must go there.

        A claim comes first, then what we heard of it. None if it is tied to no server, or to one
        that is lost.
        """
        with self.lock:
            claim = self.claims.get(meeting_id)
            if claim and (claim.sending or not self.is_lost(claim.server)):
                return claim
            known = self.meetings.get(meeting_id)
            if known and not self.is_lost(known.server):
                return known
            return None

    def lost_server(self, meeting_id: str) -> Server | None:
        """For `join`, of a meeting without a home: the server that had it, if it is still down.

        None if there is none, or if it was taken out of the list: it is no use to wait for that.
        """
        last = self.claims.get(meeting_id) or self.meetings.get(meeting_id)
        if last is None:
            return None
        if last.server not in self.servers:
            return None
        return last.server if last.server.is_down else None

    # -- what servers say

    def remember(self, server: Server, info: MeetingInfo, asked: float) -> None:
        """Note that the server, asked at that time, has the meeting.

        That is ignored

        - if the server was taken out of the list
        - if we have heard something newer
        - if another server, which is not lost, has a claim on the meeting
        - if it is on another server that is not lost, and was created there later than here

        Otherwise it takes the place of what we knew.
        """
        with self.lock:
            # what we heard last, perhaps of a server that is lost by now: then it is no tie
            known = self.meetings.get(info.meeting_id)
            # when this server was asked that said no
            denied = self.denials.get((server, info.meeting_id), LONG_AGO)
            is_old = denied > asked or (known is not None and known.asked > asked)
            if is_old or server not in self.servers:
                return
            tie = self.tie(info.meeting_id)
            if tie and tie.server is not server:
                # of two meetings of one ID the one that was created later counts; if both were at
                # the same time, the one heard of now. Not known is -1, older than all
                is_newer = isinstance(tie, Meeting) and tie.info.created <= info.created
                if not is_newer:
                    return
            first_heard = self.clock()
            # what we heard last may have been this very meeting
            if known and known.info.created == info.created:
                first_heard = known.first_heard
            meeting = Meeting(info, server, first_heard, asked)
            self.meetings[info.meeting_id] = meeting
            # by its internal ID, too, unless that is the meetingID of another meeting
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
                # of a yes and a no of the same moment the yes counts
                if known.asked >= asked:
                    return
                # only by this ID. By its other one it is found until the next survey, or until the
                # server denies that, too
                del self.meetings[meeting_id]
            before = self.denials.get((server, meeting_id), asked)
            self.denials[server, meeting_id] = max(asked, before)
            self.end_claim(server, meeting_id, asked)

    def end_claim(self, server: Server, meeting_id: str, asked: float) -> None:
        """End the server's claim: asked at that time, it has said whether it has the meeting.

        Not if a create is still on its way, or if we gave up waiting for one after that time. (A
        server that says no, and carries out the create after all, makes a twin, see note_twins.)
        The lock is held.
        """
        claim = self.claims.get(meeting_id)
        if claim and claim.server is server and not claim.sending and claim.gave_up < asked:
            del self.claims[meeting_id]

    def learn(
        self, server: Server, infos: Sequence[MeetingInfo], asked: float, is_whole: bool
    ) -> None:
        """Note which meetings the server, asked at that time, has listed.

        If the list is whole, it has no other meeting. A list that had to be mended may lack some,
        and have some that do not exist: a name that somebody typed can look like a meeting. So it
        confirms what we know of this server. What we do not know, it can only hint at.
        """
        listed = {info.meeting_id: info for info in infos}
        with self.lock:
            if is_whole:
                for info in infos:
                    self.remember(server, info, asked)
                told = {*listed, *(info.internal_id for info in infos)}
                ties: Iterable[tuple[str, Meeting | Claim]]
                ties = [*self.meetings.items(), *self.claims.items()]
                # (also of claims with a create on its way. That does not end them, see end_claim;
                # and the yes of that create will be newer than this no, see `release`)
                for key, tie in ties:
                    if tie.server is server and key not in told:
                        self.forget(server, key, asked)
            else:
                for meeting_id in listed:
                    known = self.tie(meeting_id)
                    if known is None:
                        # a hint. As it is older than everything, the next call for this meeting
                        # asks the servers first, and any answer counts more. (So `remember` ignores
                        # it if this server has denied the meeting, or if there is still a Meeting
                        # of a server that is lost by now)
                        self.remember(server, MeetingInfo(meeting_id), LONG_AGO)
                    elif (
                        isinstance(known, Meeting)
                        and known.server is server
                        and known.asked > LONG_AGO
                    ):
                        # a server has said so, so this is no mere hint: it is confirmed
                        self.remember(server, known.info, asked)
            self.note_twins(server, listed.keys(), asked)
            server.listed = listed
            self.drop_old(asked - MEETING_TTL)
            server.surveyed = asked
            # while the lock is still held. If a create came between the noting of the meetings and
            # this, it could find their server still lost, and begin one of them elsewhere
            self.note_shown_up(server, asked)

    def drop_old(self, old: float) -> None:
        """Drop what is older than this time and counts no more, as it would grow for ever.

        The lock is held.
        """
        # an absence is believed for a second only. If one goes too early, it is asked for again
        self.absent.clear()
        # a denial is needed as long as a yes may come that was asked for before it. A question is
        # answered after some 16 s at most (CONNECT_TIMEOUT twice and ANSWER_TIMEOUT). Slow DNS, or
        # many addresses, can make it longer; then a wrong yes counts until the next survey. (The
        # yes to a create counts as asked when it comes, see `release`)
        self.denials = {key: when for key, when in self.denials.items() if when > old}
        # twins that no survey has found since
        self.twins = {key: when for key, when in self.twins.items() if when > old}
        for key, claim in list(self.claims.items()):
            # claims of servers that were taken out of the list and not put back
            is_over = not claim.sending and claim.gave_up < old
            if is_over and claim.server not in self.servers:
                del self.claims[key]

    def note_shown_up(self, server: Server, asked: float) -> None:
        """Note that a survey, asked at that time, shows that the server is up."""
        with self.lock:
            # any server, also this one: if it was up already, it does not come back now
            was_any_up = any(each.is_up for each in self.servers)
            server.note_up(asked)
            if server.is_up and not was_any_up:
                self.recovered = self.clock()

    def note_twins(self, server: Server, listed: Collection[str], asked: float) -> None:
        """Warn of twins: meetings that run on two servers, as two surveys in a row have found.

        The newer one counts. We end neither. The lock is held.
        """
        up = [other for other in self.servers if other.is_up]
        # server.listed is still the list of the survey before this one
        for meeting_id in server.listed.keys() & listed:
            on = [str(other) for other in up if meeting_id in other.listed]
            if len(on) < 2:
                continue
            if meeting_id not in self.twins:
                both = " and ".join(on)
                log.warning(f"meeting {meeting_id!r:.300} runs on {both}: the newer one counts")
            self.twins[meeting_id] = asked

    # -- which server a create must go to

    def assign_known(self, meeting_id: str, tried: Servers) -> tuple[Server, str] | None:
        """Give the home of the meeting a claim, as `assign` does, if it is known well enough.

        Return the server, and why it is this one; or None, if the servers must be asked first.
        Raises Unavailable if the server is down, or among those that were tried in vain.
        """
        with self.lock:
            tie = self.tie(meeting_id)
            oldest = self.clock() - MEETING_TTL
            # a cordoned server is always asked: a meeting that has ended there must begin elsewhere
            if tie is None or tie.server.entry.cordoned or tie.asked < oldest:
                return None
            return self.add_claim(meeting_id, tie.server, tie.why, tried)

    def assign(
        self, meeting_id: str, tried: Servers, asked: float, parent: Server | None
    ) -> tuple[Server, str]:
        """Choose the server for a create, and give it a claim. Return it, and why it is this one.

        All servers that were not down were asked for the meeting at the time `asked`. The home of
        the meeting gets the create, or, if there is none, a server that `choose` chooses.

        Raises Unavailable if that server is down, or was tried in vain; or if it is cordoned, and
        has not said that it has the meeting. (If another create of it is on its way there, it need
        not say so.)
        """
        with self.lock:
            tie = self.tie(meeting_id)
            if tie is None:
                server, why = self.choose(tried, asked, parent)
                return self.add_claim(meeting_id, server, why, tried)
            # after a no of the home there would be no tie. After a yes tie.asked would be `asked`,
            # or later. While a create is on its way there, it is NEVER. So what is left is silence
            is_silent = tie.asked < asked
            if is_silent and tie.server.entry.cordoned:
                # if it were not cordoned, it would get the create all the same. But the meeting may
                # have ended, and must not begin anew on a cordoned server
                raise Unavailable(f"{tie.server} (cordoned, and silent)")
            return self.add_claim(meeting_id, tie.server, tie.why, tried)

    def add_claim(
        self, meeting_id: str, server: Server, why: str, tried: Servers
    ) -> tuple[Server, str]:
        """Give the server a claim, as a create will be sent to it.

        It is the home of the meeting, or there is no home, as the caller has seen under the lock,
        which is still held. Returns the server, and why it is this one. Raises Unavailable if it is
        down, or was tried in vain.
        """
        if server.is_down:
            raise Unavailable(f"{server} (held)")
        if server in tried:
            raise Unavailable(f"{server} (tried in vain)")
        claim = self.claims.get(meeting_id)
        # a claim of another server is replaced: `tie` has passed over it, which it does only if
        # that server is lost and no create is on its way to it
        if not claim or claim.server is not server:
            claim = Claim(server)
        claim.sending += 1
        self.claims[meeting_id] = claim
        return server, why

    def release(self, meeting_id: str, may_have: bool, info: MeetingInfo | None = None) -> None:
        """Note that a create, for which `add_claim` was called, has come to its end.

        `info` is what the server said of the meeting, if the create was a success. It counts as
        asked now, because a question that was asked while the create was on its way may have got a
        no.

        `may_have`: the server may have carried out the create, but has not said so. Then the claim
        stays until the server says whether it has the meeting, or is lost. Otherwise the claim
        ends, unless another create is on its way, or an earlier one may have been carried out.
        """
        with self.lock:
            # it is there: no claim is ended or replaced while a create is on its way
            claim = self.claims[meeting_id]
            # before `remember`, which may end the claim if this was the last create
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
        """The first server that is up. Raises Unavailable if none is."""
        for server in self.servers:
            if server.is_up:
                return server
        raise Unavailable()

    def choose(self, tried: Servers, asked: float, parent: Server | None) -> tuple[Server, str]:
        """Choose the server for a new meeting. Return it, and why it is this one.

        A breakout room goes to its parent's server. Any other meeting goes to a server that has
        reacted to a question of the time `asked` or later, and was not tried in vain. An error page
        is enough of a reaction: some servers answer with one if they do not have a meeting.

        Raises Unavailable if there is none. The lock is held.
        """
        # even if it is cordoned: BBB must have both on one server
        if parent is not None:
            return parent, "parent's"
        answering = [server for server in self.servers if server.reacted >= asked]
        able = [server for server in answering if server.is_able and server not in tried]
        # if all are in doubt, or slow, one of them gets it: one bad room must not stop all others
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
        """Those of these servers that have the least load."""
        # no server gets three in a row: one that comes back empty would get all that begin
        others = [server for server in able if self.last_two != [server, server]]
        loads = {server: self.load(server) for server in others or able}
        least = min(loads.values(), default=0)
        return [server for server in loads if loads[server] == least]

    def load(self, server: Server) -> float:
        """The people on a server, and those that are expected, divided by its weight.

        Breakout rooms do not count: their people are in the main room, too. The lock is held.
        """
        # expected: in each meeting that is being created there, or may have been. (That includes
        # one that runs, while a create of it waits for its answer)
        people = EXPECTED * sum(claim.server is server for claim in self.claims.values())
        for key, meeting in self.meetings.items():
            # the last survey counts, if it knew the meeting: a create tells nothing of people
            info = server.listed.get(key, meeting.info)
            # each meeting is in self.meetings by two IDs: it counts once
            is_ours = meeting.server is server and key == info.meeting_id
            # it is in the server's last list, or was created after that. (self.meetings can have
            # more: what a list that had to be mended lacks is not forgotten, see `learn`)
            is_current = key in server.listed or meeting.asked >= server.surveyed
            if is_ours and is_current and not info.is_breakout:
                is_young = self.clock() - meeting.first_heard < YOUNG
                people += max(info.participants, EXPECTED if is_young else 0)
        return people / server.entry.weight

    # -- asking

    def ask(self, servers: Servers, call: ApiCall) -> Iterator[tuple[Server, Answer]]:
        """Ask all these servers at the same time. Yield each with its answer, as they come.

        A server that gives no usable answer, or takes too long, is left out.
        """
        return self.send_all([(server, call) for server in servers])

    def send_all(self, calls: Sequence[tuple[Server, ApiCall]]) -> Iterator[tuple[Server, Answer]]:
        """Like `ask`, but each server gets a call of its own. All calls have the same name."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        seconds = CONNECT_TIMEOUT + LONG_TIMEOUT
        if all(call.route.is_read and not call.route.is_long for _, call in calls):
            # a quick answer that lacks a slow server is better than a late one
            seconds = PROBE_TIMEOUT
        deadline = time.monotonic() + seconds

        def ask_one(server: Server, call: ApiCall) -> None:
            answer = None
            # not if it waited too long for a thread. Once it is sent, it has the usual time for an
            # answer: one that is too late for us still shows that the server is no outage
            if time.monotonic() < deadline:
                # a copy, as each server writes its own note into it
                answer = attempt(call.name, server.call, replace(call), "asked")
            answers.put((server, answer))

        for server, call in calls:
            # as in Balancer.process_request: it is in the queue even if no thread can begin
            with suppress(RuntimeError):
                self.threads.submit(ask_one, server, call)
        for _ in calls:
            try:
                # after a pause of our machine, too, we look at what has come: for LATE at most, all
                # of them together
                timeout = max(LATE / len(calls), deadline - time.monotonic())
                server, answer = answers.get(timeout=timeout)
            except queue.Empty:
                return
            if answer:
                yield server, answer

    def ask_for(self, meeting_id: str, servers: Servers) -> None:
        """Ask these servers for the meeting, and note what they say.

        Returns as soon as one of them has said that it has the meeting, and is its home then.
        """
        asked = self.clock()
        call = ApiCall("getMeetingInfo", f"meetingID={quote_plus(meeting_id)}")
        ignored = []
        for server, answer in self.ask(servers, call):
            info = info_by(answer)
            if info is None and answer.returncode == "SUCCESS":
                # this cannot be read, but it is a yes
                info = MeetingInfo(meeting_id)
            if info and meeting_id in (info.meeting_id, info.internal_id):
                self.remember(server, info, asked)
                tie = self.tie(meeting_id)
                if tie and tie.server is server:
                    return
                ignored.append((server, info))
            elif answer.returncode == "FAILED":
                # it has no such meeting: a checksumError is not usable, and a validationError says
                # that none can have this ID
                self.forget(server, meeting_id, asked)
            # (else it told of another meeting: BBB first looks for a meeting whose internal ID
            # begins like this ID. That is neither a yes nor a no)

        # `remember` ignored these, as the meeting was tied to another server, by a claim or by a
        # newer Meeting. While the other answers came in, that tie may have ended, by a no or a
        # create that failed. So each yes is noted once more
        for server, info in ignored:
            self.remember(server, info, asked)

    def probe(self, meeting_id: str) -> float:
        """Ask all servers that are not down for the meeting. Return when they were asked.

        What they say is noted. Callers that ask for the same meeting at the same time share one
        probe. So it may have begun before a call came; but what has changed since is in `meetings`
        and `claims`, which every caller looks at after the probe.
        """
        mine: futures.Future[float] = futures.Future()
        # one step in Python
        running = self.probes.setdefault(meeting_id, mine)
        if running is not mine:
            return running.result()
        asked = self.clock()
        try:
            self.ask_for(meeting_id, [server for server in self.servers if not server.is_down])
            # a new server may have it, and not have answered: its first survey tells. (We wait for
            # that even if it has said no, as mostly it has come by then)
            while self.tie(meeting_id) is None and any(each.is_new for each in self.servers):
                time.sleep(0.02)
        finally:
            # whatever happens, those that share it must not wait for ever
            del self.probes[meeting_id]
            mine.set_result(asked)
        return asked

    def find(self, meeting_id: str) -> tuple[Server | None, str]:
        """The meeting's server, and how we know; None if no server says that it has the meeting.

        Raises Unavailable if the meeting is held for a server that is down, or if no server
        answers.
        """
        now = self.clock()
        tie = self.tie(meeting_id)
        if tie is None:
            is_sure = self.absent.get(meeting_id, LONG_AGO) >= now - ABSENCE_TTL
        else:
            is_sure = tie.server.is_down or tie.asked >= now - MEETING_TTL
        if not is_sure:
            asked = self.probe(meeting_id)
            tie = self.tie(meeting_id)
            if tie is None:
                # "nowhere" takes one usable answer since that time. (Error pages, which are enough
                # for `choose`, tell nothing of the meeting.) Servers that are silent are no reason
                # for doubt: what was in their last list, or was created there since, is tied to
                # them. (Only what a server has that never gave us a list may begin twice)
                if not any(server.answered >= asked for server in self.servers):
                    raise Unavailable("no server gives a usable answer")
                # this counts from the question, too. So if servers are slow, it is soon over, and
                # the next call asks again
                self.absent[meeting_id] = asked
        if tie is None:
            return None, "nowhere"
        if tie.server.is_down:
            raise Unavailable(f"{tie.server} (held)")
        return tie.server, tie.why


def survey(directory: Directory, server: Server) -> None:
    """Ask a server which meetings it runs. That shows whether it is up, and where meetings are.

    Raises Unavailable if it gives no usable answer.
    """
    was_up = server.is_up
    asked = directory.clock()
    answer = server.call_unlimited(ApiCall("getMeetings"))
    root, is_whole = parse(answer)
    if answer.returncode != "SUCCESS":
        key = root.findtext("messageKey", "")
        # now, not `asked`: this very answer has set Server.answered to a moment after `asked`, and
        # note_down would ignore what is older
        server.note_down(f"it answers getMeetings with {key!r:.80}", directory.clock())
        return
    if root.find("meetings") is None:
        # the answer is cut short or much too large. It says SUCCESS, so the server is up, but tells
        # nothing about its meetings
        directory.note_shown_up(server, asked)
        return
    told = map(info_in, root.iterfind("meetings/meeting"))
    infos = [info for info in told if info.meeting_id]
    directory.learn(server, infos, asked, is_whole)
    if not was_up or not server.version:
        # it may be a new version. The call without a name tells it to anybody; an error page leaves
        # it empty, see OTHER_CALL. (It is signed only as all calls are. Its checksum, the digest of
        # the secret alone, fits no other call, and tells no more of the secret than others)
        root, _ = parse(server.call_unlimited(ApiCall("")))
        server.version = re.sub("[^!-~]", "", root.findtext("bbbVersion", ""))


def watch(directory: Directory, server: Server) -> None:
    """Survey a server again and again, until it is taken out of the list.

    Each server has a thread for that: so a slow server delays no other.
    """
    while server in directory.servers:
        server.wake.clear()
        asked = directory.clock()
        attempt("a survey", survey, directory, server)
        # the survey failed, but has not marked it down, as note_down knows that it has answered
        # another call since: so it is up, though its meetings are not known. Else it would be
        # unknown for as long as its list does not come. (If it was down, its meetings may have
        # begun elsewhere: then only a good survey brings it back)
        if server.state == "unknown" and server.answered >= asked:
            directory.note_shown_up(server, asked)
        seconds = SURVEY_INTERVAL if server.is_up else RETRY_INTERVAL
        if server.wake.wait(seconds):
            # it has just gone down
            time.sleep(FIRST_RETRY)


# ---- lists: parsed, merged, written again --------------------------------------------------------

# BBB's XML is not always well-formed: it makes elements of what people type in the names of
# parameters, userdata-NAME of a join and meta_NAME of a create. For userdata-a+b=x it writes
# <customdata><a b>x</a b></customdata>.

# XML 1.0 has none of these characters; but a name that somebody typed may have them.
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# A CDATA section that BBB wrote, such as Bob's name in the last line. But the beginning of one can
# be typed: this comes of a parameter called userdata-a><![CDATA[ with the value x
#
#     <customdata><a><![CDATA[>x</a><![CDATA[></customdata></attendee>
#     <attendee><fullName><![CDATA[Bob]]></fullName>
#
# To a parser all from the first "<![CDATA[" to the "]]>" would be one text. So a section is matched
# only if, before its "]]>",
# - no </customdata>, </meeting> and so on comes, and no other section begins: else it was typed
# - no more than 100,000 characters come: each costs memory while the end is looked for
# What is not matched makes `parse` mend the text.
#
# We rely on BBB to escape the values that people type, such as Bob's name: with a "]]>" and markup
# in it that could write whole meetings, which could not be told from true ones.
CDATA = re.compile(
    r"""(?xs)
    <!\[CDATA\[
    (
        (?:
            (?! </(?:customdata|metadata|attendees?|meetings?|recordings?|response)> )
            (?! <!\[CDATA\[ )
            .
        ){0,100000}?
    )
    \]\]>
    """
)
# The elements of custom data: their children have names that people typed.
CUSTOM = ("customdata", "metadata")
# The lists in which people's names for elements can be, and what their items are called. (Sessions
# and hooks have none.)
ITEM_OF = {"meetings": "meeting", "recordings": "recording"}
# Nothing of BBB is nested so deep; and ElementTree cannot write what is nested a thousand deep.
MAX_DEPTH = 30
# What only typed names can make: an element so deep; one in custom data that has children; or one
# that is called like the custom data around it. By that it can be ended, in a text that is
# well-formed: BBB writes each typed name twice, as <NAME>x</NAME>. If the name is
# customdata></customdata><b>1</b><customdata, BBB writes, from the true <customdata> on,
#     <customdata>
#       <customdata></customdata><b>1</b><customdata>x</customdata>
#     </customdata>
#     <b>1</b><customdata></customdata>
# No other name can end it: the same end tag, </customdata>, is in both copies of the name, and if
# it ends the true one in the second, it ends a child in the first, which must have that name.
ODD_PATHS = (
    "/".join("*" * MAX_DEPTH),
    ".//customdata/*/*",
    ".//metadata/*/*",
    ".//customdata/customdata",
    ".//metadata/metadata",
)
# No real list has so many tags. To parse 32 MiB of tiny elements would take gigabytes.
MAX_TAGS = 2_000_000


def parse(answer: Answer) -> tuple[ET.Element, bool]:
    """The <response> of BBB's answer, an empty one if there is none; and whether it is whole.

    It is not whole if it had to be mended, was cut short, or is no answer of BBB.
    """
    if not answer.returncode or answer.body.count(b"<") > MAX_TAGS:
        return ET.Element("response"), False
    text = FORBIDDEN.sub(" ", answer.body.decode("utf-8", "replace"))
    text = text[text.index("<response>") :]
    text = CDATA.sub(lambda section: html.escape(section[1]), text)
    # BBB writes no comments, no instructions and no DTD. So if anything still looks like the begin
    # of one, or of a section, it was typed. A parser could skip what follows, and lose meetings:
    # the text must be mended. (Other names can do harm in a well-formed text only in the ways that
    # ODD_PATHS finds)
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

    Each tag is parsed by itself. One that no parser takes is left out, such as "<a b>", or what
    begins with "<!"; and so is an end without a begin. An element that is still open ends together
    with the one around it.
    """
    root = ET.Element("response")
    # the elements whose end has not come yet, and which may have children; the innermost last
    opened = [root]
    # the end of a list could be a typed name. It is not needed: the list ends with the text
    text = re.sub("</(meeting|recording)s>", "", text)
    pieces = re.split("(<[^<>]*>)", text)
    # these are: text, the tag of the root, text, a tag, text, and so on
    for tag, behind in zip(pieces[3::2], pieces[4::2]):
        parent = opened[-1]
        if tag.startswith("</"):
            end_element(opened, tag[2:-1])
        elif len(opened) < MAX_DEPTH:
            # ValueError: the text has a reference with thousands of digits
            with suppress(ET.ParseError, ValueError):
                element = ET.fromstring(tag.rstrip("/>") + "/>")
                element.text = FORBIDDEN.sub(" ", html.unescape(behind))
                parent.append(element)
                # these have no children: what is in custom data; and what is in <meetings> or
                # <recordings>, but is no <meeting> or <recording>
                is_stray = parent.tag in ITEM_OF and ITEM_OF[parent.tag] != element.tag
                if parent.tag not in CUSTOM and not is_stray and not tag.endswith("/>"):
                    opened.append(element)
    return root


def end_element(opened: list[ET.Element], name: str) -> None:
    """End the innermost open element of this name, and all that is open in it, at an end tag.

    If there is none, the tag is ignored. Children of custom data are never open, so most ends in it
    are those of children. There </meeting> or </recording> ends the item around it, unless the last
    child has that name; any other end can only end the custom data:

    - <meeting><metadata><a>1</a>: </a> is ignored
    - <meeting><metadata><a>1</a></metadata>: </metadata> ends the metadata
    - <meeting><metadata><meeting>2</meeting>: </meeting> is ignored
    - <meeting><metadata><a>1</a></meeting>: </meeting> ends the meeting. (Typed names can open a
      metadata that does not end. The next meeting should not become a part of this one)
    """
    parent = opened[-1]
    # the root ends with the text
    may_end = opened[1:]
    if parent.tag in CUSTOM:
        last = parent[-1].tag if len(parent) else ""
        ends_item = name in ITEM_OF.values() and name != last
        if not ends_item:
            may_end = [parent]
    if name in [element.tag for element in may_end]:
        while opened.pop().tag != name:
            pass


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
    """What a SUCCESS says of one meeting; None if it is no SUCCESS, or names no meeting."""
    if answer.returncode != "SUCCESS":
        return None
    root, _ = parse(answer)
    info = info_in(root)
    return info if info.meeting_id else None


class ListShape(NamedTuple):
    """How BBB writes a list."""

    tag: str
    item: str
    # items that have the same text in this element are the same; "" if no two items ever are
    identity: str
    # the element with the time of the item, by which they are sorted; "" if there is none
    newest: str
    # what the answer has if there is no item: BBB's own words, with its typing errors
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
        # a BBB without webhooks. (This can only be hooks/list: of the other lists, which are is_xml
        # in ROUTES, a 404 is no usable answer)
        return []
    root, is_whole = parse(answer)
    found = root.find(shape.tag)
    if found is None:
        return None
    items = found.findall(shape.item)
    # a list that had to be mended may have lost items. Of meetings the others are still useful. But
    # a front end would take a lost recording for a deleted one. And a list of hooks has no names
    # that people typed: if it must be mended, it is broken. (Each recording has one <recordID>.
    # What front ends write into metadata could make the count right by chance: that is accepted)
    has_all = shape.item == "recording" and answer.body.count(b"<recordID>") == len(items)
    is_usable = is_whole or has_all or shape.item == "meeting"
    return items if is_usable else None


def merge(shape: ListShape, lists: Iterable[list[ET.Element]]) -> list[ET.Element]:
    """The items of several servers, the newest first. Of items that are the same, the newest."""
    every = [item for items in lists for item in items]
    every.sort(key=lambda item: -number(item.findtext(shape.newest)))
    merged: dict[object, ET.Element] = {}
    for item in every:
        # without an identity the item itself is the key: findtext("") finds nothing
        merged.setdefault(item.findtext(shape.identity) or item, item)
    return list(merged.values())


def write_list(shape: ListShape, items: Sequence[ET.Element], more: str = "") -> Answer:
    """BBB's answer that has these items."""
    element = ET.Element(shape.tag)
    element.extend(items)
    # not in ASCII, its default: ElementTree would write an "ä" in the name of an element as &#228;
    text = ET.tostring(element, "unicode") if items else shape.empty
    return success(text + more)


def success(inner: str) -> Answer:
    return Answer(200, f"<response><returncode>SUCCESS</returncode>{inner}</response>".encode())


# ---- routes: create ------------------------------------------------------------------------------


def create(directory: Directory, call: ApiCall) -> Answer:
    """To the server that has the meeting, or may have it; a new meeting is placed.

    If the server for a new meeting cannot be reached, the next one gets the create. But if a server
    may have carried it out, and has not said so, Unavailable is raised: it is not tried elsewhere.
    (A create without a meetingID goes the same way, and BBB refuses it.)
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
            # if half of the time is over, the rest is too short for another server
            if directory.clock() > deadline - LONG_TIMEOUT / 2:
                raise
            # if another create of this meeting is on its way to that server, the claim stays. Then
            # `place` comes to this server again, and add_claim raises Unavailable: the other create
            # may yet succeed there
            tried.add(server)
        finally:
            # the claim ends, or stays if the server may have carried out the create
            directory.release(call.meeting_id, may_have, info)


def place(directory: Directory, call: ApiCall, tried: Servers) -> tuple[Server, str]:
    """Choose the server for a create, and give it a claim. Those in `tried` were tried in vain.

    All servers are asked for the meeting first, unless its home is known. Returns the server, and
    why it is this one. Raises Unavailable like Directory.assign.
    """
    placed = directory.assign_known(call.meeting_id, tried)
    if placed:
        return placed
    # of a breakout room. If it is nowhere, the room is placed like any other, and BBB refuses it
    parent = None
    parent_id = call.params.get("parentMeetingID", "")
    if parent_id:
        parent, _ = directory.find(parent_id)
    asked = directory.probe(call.meeting_id)
    return directory.assign(call.meeting_id, tried, asked, parent)


# ---- routes: a call about one meeting ------------------------------------------------------------


def join(directory: Directory, call: ApiCall) -> Answer:
    """A browser is sent to the meeting's server, which it must reach itself, for its cookie.

    We do not ask that server first: if it died a moment ago, the browser will see that.
    """
    # a program may want BBB's answer instead. To BBB every word but "true" means false
    if call.params.get("redirect", "").lower() not in ("", "true"):
        return relay(directory, call)
    try:
        server, why = directory.find(call.meeting_id)
        if server is None:
            lost = directory.lost_server(call.meeting_id)
            if lost and call.wants_html:
                # the pupil waits on the retry page until the room begins elsewhere, or the server
                # comes back. (A program gets BBB's "no such meeting", and can create the room)
                raise Unavailable(f"{lost} (down for long)")
            # it is nowhere: any server that is up, for BBB's own error page
            server = directory.any_up()
    except Unavailable as error:
        if call.wants_html:
            error.page = RETRY_PAGE
        raise
    call.note = f"{server} ({why})"
    # the guest gets a checksum of that server, over just what a front end has signed for him
    location = server.url_for("join", call.query)
    return Answer(302, b"", (("Location", location),))


def relay(directory: Directory, call: ApiCall) -> Answer:
    """To the meeting's server.

    If its answer could mean that it does not have the meeting, that is made sure of before the
    answer is passed on; and if it does not have it, the others are asked.
    """
    if not call.meeting_id:
        return relay_anywhere(directory, call)
    server, why = directory.find(call.meeting_id)
    if server is None:
        return relay_anywhere(directory, call, why)
    answer = server.call(call, why)
    if not is_denial(call, answer):
        return answer
    # it may have another reason. So the server is asked whether it has the meeting; only if it says
    # no, that is forgotten, and `find` asks the others
    directory.ask_for(call.meeting_id, [server])
    other, _ = directory.find(call.meeting_id)
    if other is None or other is server:
        return answer
    return other.call(call, "moved")


def is_denial(call: ApiCall, answer: Answer) -> bool:
    """Whether the answer could mean that the meeting is not there.

    A join that BBB refuses can be a redirect.
    """
    if call.name == "isMeetingRunning":
        return b"<running>false" in answer.body
    return answer.returncode == "FAILED" or answer.status == 302


def relay_anywhere(directory: Directory, call: ApiCall, why: str = "any") -> Answer:
    """A call that needs no certain server: to the first one that is up, for BBB's own answer.

    If that cannot be reached, to the next one; but not after CONNECT_TIMEOUT, so that no caller
    waits for two silent servers.
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
                # the error itself is not kept. It refers to this function's variables: as one of
                # them, it would keep the call's body in memory until the garbage collector runs
                note = error.note
    raise Unavailable(note)


# ---- routes: a call to all servers ---------------------------------------------------------------


def ask_all(directory: Directory, call: ApiCall) -> dict[Server, Answer]:
    """Ask all servers. Return the usable answers that are no refusals, in the order of the list.

    Raises Unavailable if there is none. If all servers refuse, raises ApiError with one of their
    refusals as its page: so the caller gets BBB's own words.
    """
    # looked up once: Directory.use may put another list there at any moment
    every = directory.servers
    servers = [server for server in every if not server.is_down]
    heard = dict(directory.ask(servers, call))
    answers = {}
    for server in servers:
        if server in heard and heard[server].returncode != "FAILED":
            answers[server] = heard[server]
    call.note = f"{len(answers)} of {len(every)} servers"
    # all servers have answered, and refuse. (There is a first one: no list of servers is empty)
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
            # in a list of hooks; items of other lists have no hookID
            put_our_id(item, item.findtext("callbackURL", ""))
        return write_list(shape, items)


# ---- routes: recordings --------------------------------------------------------------------------

# What BBB writes after a page of a list. Clients look for the total in either place.
PAGINATION = (
    "<totalElements>{total}</totalElements><pagination><pageable><offset>{offset}</offset>"
    "<limit>{limit}</limit><paged>true</paged><unpaged>false</unpaged></pageable>"
    "<totalElements>{total}</totalElements><empty>{empty}</empty></pagination>"
)


def record_ids(call: ApiCall) -> set[str]:
    """The recordIDs in a call. BBB decodes them a second time, and so do we.

    (An ID is a hex digest, a "-" and a number.)
    """
    texts = unquote_plus(call.params.get("recordID", "")).split(",")
    return {text.strip() for text in texts} - {""}


def ids_in(items: Iterable[ET.Element]) -> set[str]:
    """The recordIDs in a list."""
    return {item.findtext("recordID", "") for item in items}


def is_complete(
    directory: Directory, call: ApiCall, lists: Mapping[Server, list[ET.Element]]
) -> bool:
    """Whether these lists have all the recordings that a call is about.

    They do if every server gave its list, or if every recordID that was asked for is in those that
    came. It matters because a front end takes what a SUCCESS lacks for deleted.
    """
    ids = record_ids(call)
    found = set().union(*map(ids_in, lists.values()))
    has_all = bool(ids) and ids <= found
    return has_all or set(directory.servers) <= lists.keys()


def get_recordings(directory: Directory, call: ApiCall) -> Answer:
    """One list of all servers' recordings, and of that list the page that is asked for.

    A page has 1 to 100 recordings, as with BBB.
    """
    # each server is asked for its whole list
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
    """A call about recordings: to each server that has some of them, its owners.

    The caller gets a SUCCESS, in XML or JSON, if there is one: BBB, too, says SUCCESS if it has
    only some of the recordings. Raises Unavailable if a server that has some of them, or may have
    some, does not answer.
    """
    ids = record_ids(call)
    if not ids:
        return relay_anywhere(directory, call)
    query = f"recordID={quote_plus(','.join(ids))}&state=any"
    # with the type FORM a long query is sent as a form, see sign_again. (Any other type is ignored,
    # as the question has no body)
    question = ApiCall("getRecordings", query, content_type=call.content_type)
    answers_of = ask_all(directory, question)
    with directory.merging[question.name]:
        lists = lists_in(question, answers_of)
    owners = [server for server, items in lists.items() if ids & ids_in(items)]
    call.note = question.note
    if owners:
        call.note = f"{' and '.join(map(str, owners))} (owner)"
    # first what can be done is done, so that a repeat of the call finishes it
    answers = [answer for _, answer in directory.ask(owners, call)]
    if not is_complete(directory, call, lists) or len(answers) < len(owners):
        raise Unavailable(call.note)
    if not owners:
        return relay_anywhere(directory, call, "nowhere")
    return max(answers, key=lambda answer: b"SUCCESS" in answer.body)


# ---- routes: webhooks ----------------------------------------------------------------------------


def hook_id(url: str) -> str:
    """Our ID of a hook, made from its callback URL alone: the same whichever servers are up.

    It is a decimal number below 2**31, as front ends expect.
    """
    value = int.from_bytes(hashlib.sha256(url.encode()).digest()[:4], "big")
    return str(value % (2**31 - 1) + 1)


def put_our_id(element: ET.Element, url: str) -> None:
    """Put our ID in the place of a server's, a number that another server may use, too."""
    for child in element.findall("hookID"):
        child.text = hook_id(url)


def create_hook(directory: Directory, call: ApiCall) -> Answer:
    """To all servers.

    It is a SUCCESS if one of them took it. A warning names the others; a repeat completes it.
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
    """Remove a hook from all servers that have it. It is "not found" only if all servers say so."""
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
    # what a server says of a hook that it does not have, or that is permanent and never removed
    missing = sum(b">destroyMissingHook<" in answer.body for answer in answers)
    call.note = f"removed from {removed} of {len(directory.servers)} servers"
    if removed + missing < len(calls) or not set(directory.servers) <= lists.keys():
        raise Unavailable(call.note)
    if not removed:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    return success("<removed>true</removed>")


# ---- routes: the table ---------------------------------------------------------------------------


# Calls that are not is_xml may be answered in JSON, or with a 404 by a BBB that does not know them.
# So every answer to them is passed on, even a proxy's 502, but no redirect. hooks/list is one, as
# by a 404 a server says that it has no webhooks, see items_of; after a 404 hooks/create has failed.
# Of the calls about recordings only those that ask for a list are slow.
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
# For all calls that are not in the table, such as those that do not exist yet.
OTHER_CALL = Route(relay, is_xml=False)

# ==== Part III: for the admin =====================================================================

# Seconds until the page of a browser that waits for a server is loaded again.
RETRY_AFTER = 5
# Seconds that the calls in progress may take when we stop.
DRAIN_TIMEOUT = 10
# Connections of clients, each with a thread.
MAX_CONNECTIONS = 1000
# Connections that wait to be accepted, for example when school begins.
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
    """A page that is loaded again after so many seconds, and may load nothing else."""
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


# What a browser's join gets while the server of the meeting is down.
RETRY_PAGE = html_answer(503, RETRY_AFTER, "One moment, please", RETRY_TEXT)


def version_page(balancer: Balancer) -> Answer:
    # the version of BBB's API, not ours
    return success("<version>2.0</version><apiVersion>2.0</apiVersion>")


# What /health says with each status.
HEALTH = {200: b"ok", 503: b"no server for new meetings"}


def health(balancer: Balancer) -> Answer:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    is_able = any(server.is_able for server in balancer.directory.servers)
    status = 200 if is_able else 503
    return Answer(status, HEALTH[status], (("Content-Type", "text/plain"),))


def people_on(server: Server) -> int:
    # people in a breakout room are in its main room, too
    return sum(info.participants for info in server.listed.values() if not info.is_breakout)


# What /metrics tells of each server: the meaning, and the value.
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
# These are known only of a server that is up.
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
    # one name for all others: else a stranger could make thousands of lines
    name = call.name if call.name in ROUTES else "other"
    labels = f'{{call="{name}",outcome="{outcome}"}}'
    # += is not one step in Python, so it needs a lock
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
# A narrow screen has no room for the head of the table: there each cell shows its title.
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
# Of a server that is down, or unknown, less is known.
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

# The variables of the environment. Three of them, none a secret, can be given on the command line
# instead, see parse_arguments.
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


# A secret of the front ends that has fewer characters is warned of. And any setting that has so
# many could be a secret in the wrong place, see `shown`.
MIN_SECRET = 20


class SettingsError(Exception):
    """A mistake in the settings: one line that says where, what was found, and the mend."""


def shown(value: str) -> str:
    """The value of a setting as a message may show it.

    It is hidden unless it is short, or looks like a path, a name or an address: it could be a
    secret, or a whole file, in the wrong place. (So a secret can be shown if it is shorter than
    MIN_SECRET, begins with "/", or has a "." or ":" in it.)
    """
    is_plain = re.fullmatch(r"/[\w./~@ ,()-]*|[\w./:~-]*[.:][\w./:~-]*", value)
    return value if len(value) < MIN_SECRET or is_plain else "..."


def require(is_right: object, mistake: str) -> None:
    """Raise SettingsError with these words, unless it is right."""
    if not is_right:
        raise SettingsError(mistake)


def read_text(name: str, path: str) -> str:
    """The text of the file at this path, which the variable of this name has; "" if it is not set.

    Raises SettingsError.
    """
    if not path:
        return ""
    try:
        # bytes that are no UTF-8 become characters that cannot be printed, and such characters are
        # refused in every setting
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
    "https://bbb1/bigbluebutton/api" all become "https://bbb1"; "HTTP://[::1]:80/a/b/bigbluebutton"
    becomes "http://[::1]:80/a/b". "https://bbb1/bigbluebutton/a" is none.
    """
    # scheme, host and port; then a path, as short as possible, in which no part is bigbluebutton;
    # then /bigbluebutton or /bigbluebutton/api, if it is there; then a slash
    match = re.fullmatch(
        r"(?ai)(https?://(?:[\w-]{1,63}(?:\.[\w-]{1,63})*\.?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?)"
        r"((?:/(?!bigbluebutton/)[\w.~-]+)*?)(/bigbluebutton(/api)?)?/?",
        str(host),
    )
    if not match or not 0 < int(match[2] or 1) <= 65535:
        return ""
    return match[1].lower() + match[3]


def is_secret(value: object) -> bool:
    """Whether it may be a secret: printable, not blank, and not pasted with a quote or its name."""
    text = str(value).strip()
    is_bare = text.isprintable() and not re.match("$|[\"']|TINYSCALE_", text)
    return isinstance(value, str) and is_bare


# Which wrong values a message may show, as regular expressions for the value as JSON. An admin may
# put a secret under a wrong key, and that must not be shown. BBB's secrets are long. So what is
# shown is short, no list or object, and has no "@", before which a password may stand; or it looks
# like a host, with no blank, no "@" and no query.
SHORT_VALUE = "[^@{[]{,20}"
HOST_VALUE = '"[^@#?&=\\s]*[.:][^@#?&=\\s]*"'
# No JSON is empty, so this matches none.
NO_VALUE = ""
# The keys of an entry of servers.json: what tests the value, what the value must be, and which
# wrong values a message may show.
ENTRY_RULES: dict[str, tuple[Callable[..., object], str, str]] = {
    "host": (base_url, 'must look like "https://bbb1.example.org"', HOST_VALUE),
    "secret": (
        is_secret,
        'must be the secret that "bbb-conf --secret" prints on that server',
        NO_VALUE,
    ),
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
    """Read servers.json, all of it or nothing. Raises SettingsError."""
    text = read_text("TINYSCALE_SERVERS", path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        mend = "It must be JSON in UTF-8, like servers.json.example."
        # without its strings, in which such a comma is no mistake
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
    # every key once, and first those that must be there
    for name in dict.fromkeys(["host", "secret", *item]):
        # a long key could be a secret in the wrong place
        key = f"{where}: {json.dumps(name if len(name) < MIN_SECRET else '...')}"
        require(name in ENTRY_RULES, f"{key} is no key. Known are {', '.join(ENTRY_RULES)}.")
        is_right, rule, may_show = ENTRY_RULES[name]
        require(name in item, f"{key} is missing. It {rule}.")
        found = json.dumps(item[name])
        if re.fullmatch(may_show, found):
            # even then there can be a secret in it: "bbb1.example.org/SECRET"
            rule += ", not " + re.sub("[A-Za-z0-9]{20,}", "...", found)[:99]
        require(is_right(item[name]), f"{key} {rule}.")
    checked = {**item, "host": host, "secret": item["secret"].strip()}
    return Entry(**checked)


def read_secrets(text: str, path: str) -> tuple[str, ...]:
    """The secrets of the front ends: those in a text, and those in a file. Raises SettingsError.

    In the text there are commas between them; in the file each has a line.
    """
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
        # with no pass phrase: else OpenSSL would ask for one at the terminal, and wait
        tls.load_cert_chain(certificate, key or None, lambda: "")
    except OSError as error:
        raise SettingsError(
            f"TINYSCALE_CERT {shown(certificate or 'not set')}, "
            f"TINYSCALE_KEY {shown(key or 'in it')}: "
            f"{error.strerror}. They must be PEM files that belong together."
        ) from None
    return tls


def has_expired(pem: str) -> bool:
    """Whether the first certificate in a text has expired; False if there is none.

    The text is that of TINYSCALE_CERT, which read_tls has loaded already.
    """
    body = pem.partition("-----BEGIN CERTIFICATE-----")[2].partition("-")[0]
    # Python's ssl decodes the certificate of a peer, but not our own. In a certificate two times
    # stand one behind the other, its begin and its end. Each is a byte for its type, a byte for its
    # length, and digits that end in a Z. Type 17 (hex) has YYMMDDHHMMSS, for years before 2050,
    # type 18 has YYYYMMDDHHMMSS. This finds the Z of the first, and then the second
    until = re.search(rb"Z[\x17\x18].(\d+)Z", base64.b64decode(body), re.DOTALL)
    if not until:
        return False
    now = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    # a 20 is put before it, which makes YYYY of YY; and if it was YYYY already, the last 14 digits
    # are without that 20. (If something else in it looks like that, the warning may be wrong: no
    # more)
    end = (b"20" + until[1])[-14:]
    return end < now.encode()


def read_warnings(
    given: dict[str, str],
    secrets: Iterable[str],
    secret_files: Iterable[str],
    is_socket_unit: bool,
) -> Iterator[str]:
    """What is not right, but no reason to refuse to serve: each in one line.

    `given` is the environment, in which what is not set is empty.
    """
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
    """A text that changes when the file does, or its name or mode; "" if there is no such file.

    It begins with the file's device:inode and a blank.
    """
    try:
        stat = os.stat(file)
    except OSError:
        return ""
    return f"{stat.st_dev}:{stat.st_ino} {stat.st_ctime_ns} {stat.st_size}"


def is_journal(stream: str) -> bool:
    """Whether stderr, file 2, goes to systemd's journal.

    It does if `stream`, the variable JOURNAL_STREAM, is its device:inode. A program that was
    started with another stderr may have inherited the variable.
    """
    return stamp(2).startswith(f"{stream} ")


def read_settings(environment: Environment, needs_servers: bool = True) -> Settings:
    """All settings: the only place that looks at the environment, with two exceptions.

    OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR. main reads JOURNAL_STREAM, to print a mistake in
    the form that the journal wants. (Python has a debugging aid, SSLKEYLOGFILE, which writes TLS
    keys to a file: leave it unset.)

    Raises SettingsError.
    """
    # what is not set counts as empty
    given = collections.defaultdict(str, environment)
    servers_file = given["TINYSCALE_SERVERS"] or "servers.json"
    key_file = given["TINYSCALE_KEY"] or given["TINYSCALE_CERT"]
    secret_files = [servers_file, given["TINYSCALE_SECRET_FILE"], key_file]
    # stamped before they are read: so a change in between is noticed
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
    # only to see whether it can be read: OpenSSL reads it by itself, and says nothing if it cannot
    read_text("SSL_CERT_FILE", given["SSL_CERT_FILE"])

    # otherwise LISTEN_FDS was inherited, and is meant for another process
    is_socket_unit = given["LISTEN_PID"] == str(os.getpid())
    require(
        given["LISTEN_FDS"] == "1" or not is_socket_unit,
        "LISTEN_FDS: there must be one socket. Leave one ListenStream= in the socket unit.",
    )
    entries = read_servers(servers_file) if needs_servers else ()
    secrets = read_secrets(given["TINYSCALE_SECRET"], given["TINYSCALE_SECRET_FILE"])
    tls = read_tls(given["TINYSCALE_CERT"], given["TINYSCALE_KEY"])
    has_journal = is_journal(given["JOURNAL_STREAM"])
    # last, as it reads files again: by now it is sure that they can be read
    warnings = list(read_warnings(given, secrets, secret_files, is_socket_unit))
    # in the order of the fields of Settings
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


# ---- systemd, the listener, the log --------------------------------------------------------------


def notify(settings: Settings, state: str) -> None:
    """Tell systemd our state, if it wants to be told."""
    if not settings.notify_socket:
        return
    # for a name that begins with "@" the system wants a zero byte: it is no file
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
        # no mistake if it is EAI_AGAIN: the network is not there yet
        require(error.args[0] == socket.EAI_AGAIN, f"{where}: it is no address of this host.")
        raise
    except OSError as error:
        # no mistake: the trouble may end by itself
        words = os.strerror(error.errno or 0)
        raise OSError(f"{where}: {words}. Choose another, or stop who has it.") from None


def begin(job: Callable[..., None], *arguments: object) -> threading.Thread:
    """Do something in a thread of its own, for which the end of the program does not wait."""
    thread = threading.Thread(target=job, args=arguments, daemon=True)
    thread.start()
    return thread


class LogHandler(logging.handlers.QueueHandler):
    """Hands lines to a thread that writes them. If too many wait, it drops and counts them.

    So a reader of the log that is slow, or gone, stops no call.
    """

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        # QueueHandler calls this if the queue is full
        self.lost += 1


# As systemd's journal wants a level to be written.
JOURNAL_LEVELS = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}


def begin_log(settings: Settings) -> LogHandler:
    """Write the log to stderr."""
    # if stderr cannot be written, logging must not try to say so there
    logging.raiseExceptions = False
    # it also makes the text of each line; so StreamHandler, below, needs no layout
    handler = LogHandler(queue.Queue(MAX_LOG))
    layout = "%(asctime)s %(levelname)s %(message)s"
    if settings.is_journal:
        # the journal notes the time by itself
        layout = "%(levelname)s%(message)s"
        for level, mark in JOURNAL_LEVELS.items():
            logging.addLevelName(level, mark)
    logging.basicConfig(level=logging.INFO, handlers=[handler], format=layout)
    logging.handlers.QueueListener(handler.queue, logging.StreamHandler()).start()
    return handler


def end_log(handler: LogHandler) -> None:
    """Wait until the log is written, but only a second: its reader may be gone."""
    # only now: while the queue was full, this line would have been lost, too
    if handler.lost:
        log.warning(f"{handler.lost} lines of the log were lost: nobody read them")
    # a thread waits for the queue, and we wait a second for that thread: Queue.join has no timeout
    begin(handler.queue.join).join(1)  # type: ignore[attr-defined]


# ---- commands ------------------------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)


def connection_limit() -> int:
    """How many connections of clients there may be.

    They get a third of the files that we may open: each needs another one for its server, and the
    last third is for what asks all servers.
    """
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # a sandbox may forbid that
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files = most
    return max(10, min(MAX_CONNECTIONS, files // 3))


def apply(balancer: Balancer, settings: Settings) -> None:
    """Use these settings from now on."""
    for warning in settings.warnings:
        log.warning(warning)
    balancer.directory.use(settings.entries, settings.placement)
    for server in balancer.directory.servers:
        if not server.is_watched:
            begin(watch, balancer.directory, server)
            server.is_watched = True
    # last: if a thread could not be started, the stamps of the files are still the old ones, and
    # the next `reload` tries again. (When we start, the program ends instead)
    balancer.settings = settings
    balancer.mistake = ""


def reload(balancer: Balancer, environment: Environment, is_forced: bool) -> None:
    """Read the settings again if a file has changed.

    If there is a mistake, all of them stay as they were.
    """
    stamps = {path: stamp(path) for path in balancer.settings.stamps}
    is_new = is_forced or stamps != balancer.settings.stamps
    # while there is a mistake we look each time: its cause may go away without a file changing, for
    # example if a file could not be read
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
    """Look for changed files again and again, and read them at once if somebody sets `wake`.

    In a thread of its own: a file system that hangs must not hold up a stop.
    """
    while True:
        is_forced = wake.wait(SURVEY_INTERVAL)
        if is_forced:
            wake.clear()
        attempt("reading the settings", reload, balancer, environment, is_forced)


def is_busy(balancer: Balancer) -> bool:
    """Whether a stop must wait: for a verified call that is not answered, or for a new client."""
    now = time.monotonic()
    for handler in list(balancer.handlers):
        # only a call that was verified has parameters. If it has been answered, what its client
        # still sends is only dropped
        if handler.call.params and not handler.is_answered:
            return True
        # after a second without a right checksum it is a stranger
        if now - handler.started < 1:
            return True
    return False


def drain(balancer: Balancer) -> None:
    """Take no more connections, and wait for the calls in progress."""
    # no limit from now on: at the limit the accepting thread stays in the loop of process_request,
    # and shutdown waits for that thread. (A connection that still comes waits in the pool's queue)
    balancer.limit = sys.maxsize
    balancer.shutdown()
    deadline = time.monotonic() + 1
    is_ours = not balancer.settings.is_socket_unit
    # connections that wait to be accepted would be reset when the listener closes. (With a socket
    # unit they are not: the next process gets them)
    while is_ours and is_readable(balancer.socket) and time.monotonic() < deadline:
        balancer.handle_request()
    balancer.server_close()
    deadline = time.monotonic() + DRAIN_TIMEOUT
    while is_busy(balancer) and time.monotonic() < deadline:
        time.sleep(0.01)
    log.info("stopped with calls in progress" if is_busy(balancer) else "stopped")


def serve(environment: Environment) -> int:
    """Serve until SIGTERM or SIGINT. Raises SettingsError, or OSError, if it cannot begin."""
    # before any thread is started, as threads inherit this: so only sigwait receives these signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = read_settings(environment)
    balancer = Balancer(settings, Directory(), listen(settings), connection_limit())
    handler = begin_log(settings)
    apply(balancer, settings)
    wake = threading.Event()
    begin(watch_files, balancer, environment, wake)
    # it looks every 0.05 s whether it shall end
    begin(balancer.serve_forever, 0.05)
    port = balancer.server_address[1]
    count = len(settings.entries)
    log.info(f"tinyscale {__version__} listens on port {port}, with {count} servers")
    notify(settings, "READY=1")
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        wake.set()
    log.info("stopping")
    notify(balancer.settings, "STOPPING=1")
    # a second signal ends us at once. It needs a handler: in a container we may be process 1, and
    # that gets no signals for which it has no handler
    for last in STOP_SIGNALS:
        signal.signal(last, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    drain(balancer)
    end_log(handler)
    return 0


# What the reason of a failure looks like, and what mends it. All that match are told.
MENDS = {
    "WRONG_VERSION_NUMBER|wrong version|record layer": "It speaks plain HTTP there: write http://",
    "HTTP 400|RemoteDisconnected|BadStatusLine": "It may want HTTPS: write https://",
    "HTTP 3": "It redirects: write the address that it redirects to, mostly https://",
    "HTTP 40[13]": "A proxy before it refuses us: let it pass the address of this host",
    "HTTP 404": "There is no BBB at this address: compare it with 'bbb-conf --secret' there",
    "HTTP 50[234]": "The proxy there runs, but not BBB behind it: try 'bbb-conf --status' there",
    "CERTIFICATE_VERIFY_FAILED": "Renew its certificate, or name its authority in SSL_CERT_FILE",
    "Name or service|not known|resolution": "Its name is not known here: check spelling and DNS",
    "refused|timed out|no answer|unreachable": "Check that it runs, and its firewall lets us in",
}


def examine(directory: Directory, server: Server) -> str:
    """What `check` says of a server, in one line. If it is unusable, that ends in the mend."""
    with suppress(Unavailable):
        survey(directory, server)
    digests = []
    # the digests are tried only if it answers: it is up, or Server.judge gave the reason that "it
    # refuses our checksum"
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
    # if it is not down, what failed was no outage, for example if we can open no more files. The
    # reason of that is in `warned`
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
    # UnicodeError: TINYSCALE_BIND can be no name of a host. `listen` tells that
    with suppress(OSError, UnicodeError):
        sock = socket.create_connection(place, CONNECT_TIMEOUT)
        if settings.tls:
            # it is not verified: our certificate is not for the name "localhost", and this is only
            # to see whether somebody is there
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

    Return 1 if a server is unusable, or our port cannot be had, else 0.
    """
    settings = read_settings(environment)
    # what is printed says it all
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
        # an option that is not given must not take the place of a variable
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
    # (among the options are "command" and "call", which are the names of no settings)
    environment = {**os.environ, **vars(options)}
    try:
        return COMMANDS[options.command](environment)
    except (SettingsError, OSError) as error:
        level = "<3>" if is_journal(environment.get("JOURNAL_STREAM", "")) else ""
        # its reader may be gone
        with suppress(OSError):
            print(f"{level}tinyscale: {error}", file=sys.stderr, flush=True)
        # 1: the trouble may end by itself, so systemd may try again
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # not sys.exit, which waits for all threads: one of them may wait for a hung server
    os._exit(main())
