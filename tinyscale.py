#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

    TINYSCALE_SECRET=... python3 tinyscale.py            serve port 3005, in front of ./servers.json

Moodle, Nextcloud, Greenlight and friends get tinyscale's URL and secret in place of a server's. tinyscale verifies
the checksum of each API call, finds the server that runs the meeting, signs the call again with that server's secret
and relays the answer. A meeting that exists nowhere is created on the next server of the list, in turn.

The way of a call, from top to bottom and never back up:

    accept()             LoadBalancer       a thread for each connection
      parse_request()    Handler            refuses what is not plain HTTP
      read_call()        Handler, verify    the checksum first, only then the body
        CALLS[call]      create, relay ...  which server, or all of them
          find, in_turn  Cluster            who has the meeting, who gets it
            call()       Server             signed again; a failure marks the server down
      respond()          Handler            the answer, and a line in the log

Nothing is kept on disk. In memory is where each meeting was last seen, and which servers are down: hints, renewed by
asking the servers every ten seconds. Kill tinyscale at any moment: nothing is lost.

It holds the secrets of your servers, so read it before you run it: first verify, Handler.body, Server.call, load_servers.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import logging
import os
import re
import resource
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
import uuid
import weakref
import xml.etree.ElementTree as ET
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote_plus, unquote_plus, urlsplit
from xml.sax.saxutils import escape

__version__ = "1.0"
log = logging.getLogger("tinyscale")

# ---- limits ----------------------------------------------------------------------------------------------------------

CONNECT_TIMEOUT = 3         # seconds to reach a server, its TLS handshake included
ANSWER_TIMEOUT = 10         # seconds a server may be silent; front ends give up after 10 to 30
WORK_TIMEOUT = 60           # the same for a create and for calls with a body, which make the server work
PATIENCE = 3                # seconds for which a question to several servers waits for the slowest
SURVEY_INTERVAL = 10        # seconds between two surveys of all servers
FRESH = 30                  # seconds for which memory is believed: two surveys may fail
HOLD = 30                   # seconds for which the meetings of a server that is down stay its own
RETRY_AFTER = 5             # seconds until a browser tries again to join a meeting whose server is down
DRAIN_TIMEOUT = 10          # seconds a stop waits for the calls in progress; service managers kill after more
IDLE_TIMEOUT = 75           # seconds of silence from a client; nginx gives its side up after 60
LINGER = 2                  # seconds to take in what a client still sends after it was refused
MAX_CONNECTIONS = 1000      # clients at once, a thread each
MAX_POOL = 32               # connections kept open to one server
MAX_IDLE = 30               # seconds a connection to a server is kept for the next call; nginx closes it after 75
WORKERS = 16                # threads for the probes and surveys of one server
MAX_QUERY = 64 * 1024       # bytes of a query sent as a form: http.server's own limit for one in the URL
MAX_BODY = 100 * 2**20      # bytes of slides in one call
MAX_ANSWER = 64 * 2**20     # bytes of a server's answer: some 20,000 recordings

# ---- checksums -------------------------------------------------------------------------------------------------------

DIGESTS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}       # by the length in hex, as BBB tells them apart


def checksum(call: str, query: str, secret: str, digest: str) -> str:
    """The hex checksum of a call: over its name, its raw query without the checksum, and the secret (BBB's API docs)."""
    return hashlib.new(digest, (call + query + secret).encode()).hexdigest()


def sign(call: str, query: str, secret: str, digest: str = "sha256") -> str:
    """The query with its checksum."""
    return f"{query}{query and '&'}checksum={checksum(call, query, secret, digest)}"


def parameters(query: str) -> list[tuple[str, str]]:
    """The decoded names and values of a raw query. (parse_qsl splits at ";" too before Python 3.8.8; BBB does not.)"""
    pairs = (part.partition("=") for part in query.split("&") if part)
    return [(unquote_plus(name), unquote_plus(value)) for name, _, value in pairs]


def without(query: str, *names: str) -> str:
    """The raw query less the parameters of these names; the rest stays byte for byte, empty parts too."""
    return "&".join(part for part in query.split("&") if part.partition("=")[0] not in names)


def verify(call: str, query: str, secrets: Iterable[str], form: bool = False) -> tuple[str, dict[str, str]]:
    """Check the checksum in a raw query; return the query without it, and its decoded parameters.

    The query of a form may also be signed as BBB does since 2.6.18: as if it were empty.
    Raises ApiError if the checksum is missing, repeated or wrong, and if the meetingID or recordID is repeated:
    which one counts differs between BBB's calls, and a server must not read a call differently from us.
    """
    pairs = parameters(query)
    names = collections.Counter(name for name, _ in pairs)
    given = [part[len("checksum="):].lower() for part in query.split("&") if part.startswith("checksum=")]
    if len(given) == names["checksum"] == 1 and names["meetingID"] < 2 and names["recordID"] < 2:
        digest, unsigned = DIGESTS.get(len(given[0])), without(query, "checksum")
        for secret in filter(str.strip, secrets if digest else ()):         # a blank secret never verifies anything
            for text in [unsigned, ""] if form else [unsigned]:
                if hmac.compare_digest(checksum(call, text, secret, digest or "").encode(), given[0].encode()):
                    return unsigned, dict(reversed(pairs))      # of other repeated ones the first counts, as in BBB
    raise ApiError("checksumError", "Checksums do not match")


# ---- answers ---------------------------------------------------------------------------------------------------------

XML = "text/xml;charset=utf-8"          # without the charset Python clients read it as Latin-1
NOTHING = ET.Element("nothing")         # in place of an answer that is no XML of BBB
READS = {"getMeetings", "getMeetingInfo", "isMeetingRunning", "getRecordings"}      # change nothing: may be repeated
JSON_CALLS = {"getRecordingTextTracks", "putRecordingTextTrack"}


@dataclass
class Request:
    """A call whose checksum was right."""
    call: str                           # what follows /bigbluebutton/api/
    query: str                          # raw, without its checksum
    params: dict[str, str]              # the same, decoded
    method: str = "GET"
    body: bytes = b""                   # slides or a file, which the checksum does not cover
    content_type: str = ""
    browser: bool = False               # a person waits for the answer, not a program
    chosen: str = ""                    # for the log: which server, and why

    @property
    def meeting_id(self) -> str:
        return self.params.get("meetingID", "")

    @property
    def record_ids(self) -> list[str]:
        """BBB decodes recordID once more before it splits it, and passes over empty ones (RecordingController)."""
        return [text.strip() for text in unquote_plus(self.params.get("recordID", "")).split(",") if text.strip()]


class Response(NamedTuple):
    """An answer, a server's or our own."""
    status: int
    body: bytes
    content_type: str = XML
    headers: Sequence[tuple[str, str]] = ()
    xml: ET.Element = NOTHING           # the <response> of a server's answer, if it is one

    @property
    def success(self) -> bool:
        return self.xml.findtext("returncode") == "SUCCESS"


class ApiError(Exception):
    """A call that is refused, with BBB's messageKey and message, and an HTTP status, which in BBB is always 200."""

    def __init__(self, key: str, message: str, status: int = 200) -> None:
        super().__init__(key)
        self.key, self.message, self.status = key, message, status

    def response(self, call: str) -> Response:
        """The answer, in the format of the call."""
        fields = {"returncode": "FAILED", "messageKey": self.key, "message": self.message}
        if call in JSON_CALLS:
            return Response(self.status, json.dumps({"response": fields}).encode(), "application/json;charset=utf-8")
        inner = "".join(f"<{name}>{xml_text(text)}</{name}>" for name, text in fields.items())
        return Response(self.status, f"<response>{inner}</response>".encode())


class Unavailable(ApiError):
    """No usable answer from this server, or from any. `acted`: it may have carried out the call all the same."""

    def __init__(self, server: Server | None = None, acted: bool = False) -> None:
        super().__init__("serverUnavailable", "The server cannot be reached now. Please try again in a minute.")
        self.server, self.acted = server, acted


def xml_text(text: str) -> str:
    """Text that may stand in an XML element: escaped, and without the characters that XML 1.0 forbids."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def parse(body: bytes) -> ET.Element:
    """The <response> that a body consists of; NOTHING if it is anything else."""
    try:
        root = ET.fromstring(body)
    except (ET.ParseError, LookupError, ValueError):        # not well-formed; an encoding that Python does not know
        return NOTHING
    return root if root.tag == "response" else NOTHING


def number(text: str | None) -> int:
    """A number in BBB's XML or parameters; -1 if the text is none."""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else -1


VERSION = Response(200, b"<response><returncode>SUCCESS</returncode><version>2.0</version>"
                        b"<apiVersion>2.0</apiVersion><bbbVersion/></response>")

RETRY_PAGE = Response(503, f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{RETRY_AFTER}">
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><title>One moment</title>
</head><body style="font: 1.2em/1.5 sans-serif; max-width: 30em; margin: 15vh auto; padding: 0 1em">
<h1>One moment, please</h1><p>The server of this room cannot be reached right now.
This page tries again by itself every {RETRY_AFTER} seconds: just leave it open.</p></body></html>
""".encode(), "text/html;charset=utf-8", [("Retry-After", str(RETRY_AFTER)), ("Cache-Control", "no-store")])

LISTS = {   # the calls that answer with a list: the path of its items, what identifies an item, what tells the newest
    "getMeetings": ("meetings/meeting", "meetingID", "createTime"),
    "getSessions": ("sessions/meeting", "", "none"),
    "getRecordings": ("recordings/recording", "recordID", "startTime"),
    "hooks/list": ("hooks/hook", "callbackURL", "none"),
}
EMPTY = {   # and to the letter, with BBB's typo, what stands in place of an empty list
    "getMeetings": "<meetings/><messageKey>noMeetings</messageKey><message>no meetings were found on this server</message>",
    "getSessions": "<sessions/><messageKey>noSessions</messageKey><message>no sessions were found on this serverr</message>",
    "getRecordings": "<recordings></recordings><messageKey>noRecordings</messageKey>"
                     "<message>There are no recordings for the meeting(s).</message>",
    "hooks/list": "<hooks></hooks>",
}


def merge(call: str, answers: Iterable[ET.Element]) -> list[ET.Element]:
    """The items of several answers to a call of LISTS, the newest first; of those with one identity only the newest."""
    path, identity, newest = LISTS[call]
    merged: dict[Any, ET.Element] = {}
    items = (item for answer in answers for item in answer.iterfind(path))
    for item in sorted(items, key=lambda item: number(item.findtext(newest)), reverse=True):
        merged.setdefault(item.findtext(identity) if identity else item, item)
    return list(merged.values())


def listing(call: str, items: Sequence[ET.Element], pagination: str = "") -> Response:
    """BBB's answer to a call of LISTS that has these items."""
    name, inner = LISTS[call][0].split("/")[0], "".join(ET.tostring(item, encoding="unicode") for item in items)
    inner = f"<{name}>{inner}</{name}>" if items else EMPTY[call]
    return Response(200, f"<response><returncode>SUCCESS</returncode>{inner}{pagination}</response>".encode())


# ---- settings --------------------------------------------------------------------------------------------------------

class SettingsError(Exception):
    """A mistake in the settings: one line that says where it is and how to mend it."""


class Entry(NamedTuple):
    """An entry of servers.json."""
    host: str                           # the origin alone
    secret: str
    weight: int = 1                     # its share of the new meetings
    cordoned: bool = False              # it keeps its meetings and gets no new ones
    checksum: str = "sha256"            # how to sign calls to it


def origin(url: Any) -> str:
    """The origin in any form of a server's URL that bbb-conf prints; "" if it is no such URL."""
    match = re.fullmatch(r"(https?://[\w.:\[\]-]+)(/bigbluebutton(/api)?)?/?", str(url), re.ASCII | re.IGNORECASE)
    text = re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", match[1].lower()) if match else ""
    with contextlib.suppress(ValueError):                   # a port or an IPv6 address that is none
        return text if urlsplit(text).hostname and urlsplit(text).port != 0 else ""
    return ""


FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "host": (origin, 'must look like "https://bbb1.example.org"'),
    "secret": (lambda value: isinstance(value, str) and value.strip(), "must be what 'bbb-conf --secret' prints there"),
    "weight": (lambda value: type(value) is int and 1 <= value <= 100, "must be a whole number from 1 to 100"),
    "cordoned": (lambda value: isinstance(value, bool), "must be true or false"),
    "checksum": (lambda value: value in list(DIGESTS.values()), 'must be "sha1", "sha256", "sha384" or "sha512"'),
}


def load_servers(path: str) -> list[Entry]:
    """Read servers.json. Raises SettingsError: nothing half valid comes out."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            items = json.load(file)
            if os.fstat(file.fileno()).st_mode & 0o004:
                log.warning("%s holds secrets, but everyone may read it. Mend it with: chmod o-r %s", path, path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}. Copy servers.json.example there and fill it in.") from None
    except (ValueError, RecursionError) as error:           # neither JSON nor UTF-8
        raise SettingsError(f"{path}: not valid JSON: {error}. Compare it with servers.json.example.") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f'{path}: must be a list of servers: [{{"host": "...", "secret": "..."}}, ...]')
    entries: dict[str, Entry] = {}
    for count, item in enumerate(items, 1):
        host = origin(item.get("host"))
        where = f"{path}: entry {count}{host and f' ({host})'}"
        for name in dict.fromkeys(["host", "secret", *item]):
            if name not in FIELDS:
                raise SettingsError(f'{where}: unknown key {json.dumps(name)}. Known are {", ".join(FIELDS)}.')
            if not FIELDS[name][0](item.get(name)):
                raise SettingsError(f'{where}: "{name}" {"" if name in item else "is missing, it "}{FIELDS[name][1]}.')
        if host in entries:
            raise SettingsError(f"{where}: an earlier entry has the same host. Take one of them out.")
        entries[host] = Entry(**{**item, "host": host, "secret": item["secret"].strip()})
    return list(entries.values())


def load_secrets(text: str, path: str) -> list[str]:
    """Our own secrets, with commas between them or one a line of a file. Raises SettingsError."""
    secrets = text.split(",") if text else []
    try:
        if path:
            with open(path, encoding="utf-8") as file:
                secrets += filter(str.strip, file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"TINYSCALE_SECRET_FILE: cannot read {path}: {error}") from None
    if not secrets or not all(map(str.strip, secrets)):
        raise SettingsError(f"TINYSCALE_SECRET: {'a secret is blank' if secrets else 'there is none'}. Set it to what the "
                            "front ends shall use, for example to the output of: openssl rand -hex 32")
    return [secret.strip() for secret in secrets]


def load_tls(cert: str, key: str) -> ssl.SSLContext | None:
    """The TLS of the listener from PEM files, None for plain HTTP. Raises SettingsError."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2            # the default only since Python 3.10
    try:
        if cert or key:
            tls.load_cert_chain(cert, key or None, lambda: "")      # a pass phrase is never asked for
    except OSError as error:
        raise SettingsError(f"TINYSCALE_CERT, TINYSCALE_KEY: cannot use {cert!r} and {key!r}: {error}") from None
    return tls if cert else None


# ---- one BBB server --------------------------------------------------------------------------------------------------

class KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib.request closes each connection after the answer; this keeps those to one server for the next request.

    A server may close a kept connection just as we write to it, and then nobody knows whether it saw the request. So
    only what may be sent twice rides on them; a request with the header "Connection: close" gets one of its own.
    """
    trust = ssl.create_default_context()    # the system's authorities, or SSL_CERT_FILE

    def __init__(self) -> None:
        super().__init__(context=self.trust)
        self.idle: collections.deque[tuple[float, http.client.HTTPConnection]] = collections.deque()

    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        """Return the Response. Raises URLError if there is no connection, else OSError or HTTPException."""
        kept = None if req.has_header("Connection") else self.take()
        if kept:
            with contextlib.suppress(ConnectionError, ssl.SSLEOFError):     # closed meanwhile: again, on a new one
                return self.exchange(kept, req)
        connection = http_class(req.host, timeout=CONNECT_TIMEOUT, **http_conn_args)
        try:
            connection.connect()
        except (OSError, ValueError) as error:              # ValueError: no possible name of a host
            connection.close()
            raise urllib.error.URLError(str(error)) from error
        return self.exchange(connection, req)

    def exchange(self, connection: http.client.HTTPConnection, req: urllib.request.Request) -> Response:
        """Send the request and read the whole answer; keep the connection if both sides want that."""
        try:
            connection.sock.settimeout(req.timeout)
            connection.request(req.get_method(), req.selector, req.data, {**req.headers, **req.unredirected_hdrs})
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER + 1)
            if answer.length or len(body) > MAX_ANSWER:     # read(amount) does not tell when the rest is missing
                raise http.client.IncompleteRead(b"")
        except BaseException:
            connection.close()                              # never kept half read
            raise
        if connection.sock and not req.has_header("Connection") and len(self.idle) < MAX_POOL:
            self.idle.append((time.monotonic(), connection))
        else:                                               # without a sock: the server said that it closes
            connection.close()
        headers = [(name, value) for name in ("Location", "Set-Cookie") for value in answer.headers.get_all(name, [])]
        return Response(answer.status, body, answer.headers.get("Content-Type", ""), headers, parse(body))

    def take(self) -> http.client.HTTPConnection | None:
        """The kept connection that was used last, if there is one; those that have waited too long are closed."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self.idle[0][0] > MAX_IDLE:
                self.idle.popleft()[1].close()
            return self.idle.pop()[1]
        return None

    def close(self) -> None:
        """Close the kept connections."""
        while self.idle:
            self.idle.pop()[1].close()


def trouble(call: str, response: Response) -> str:
    """Why an answer says more of the server than of the call, so that no caller may see it; "" if it is fine."""
    status = response.status
    if response.xml.findtext("messageKey") == "checksumError":
        return "it refuses our checksum: compare the secret in servers.json with 'bbb-conf --secret'"
    if status < 200 or 300 <= status < 400 and call != "join":
        return f"HTTP {status}: a redirect? The host in servers.json must be where it leads"
    if status in (502, 503, 504):       # nginx is there, BBB behind it is not
        return f"HTTP {status}"
    if call in READS and (status >= 500 or response.xml is NOTHING):
        return f"HTTP {status}, {len(response.body)} bytes that are no answer of BigBlueButton"
    return ""


class Server:
    """One BBB server: how to call it, and whether it is up. Times are time.monotonic's seconds."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry                                  # replaced as a whole when servers.json changes
        self.connections = KeepAliveHandler()
        self.opener = urllib.request.OpenerDirector()       # build_opener's follows redirects and uses proxies
        self.opener.addheaders = [("User-Agent", f"tinyscale/{__version__}")]
        self.opener.add_handler(self.connections)
        self.pool = futures.ThreadPoolExecutor(WORKERS)     # for what is asked of several servers at once
        self.lock = threading.Lock()                        # for what follows
        self.down_since: float | None = time.monotonic()    # None: it is up, which it first has to show
        self.reason = "no answer yet"                       # why it is down
        self.answered = 0.0                                 # when it last gave a usable answer
        self.silent = False                                 # it has not answered since it exhausted our PATIENCE

    def __str__(self) -> str:
        return self.entry.host

    @property
    def usable(self) -> bool:
        """Whether to ask it what any server may answer, and to place new meetings there."""
        return self.down_since is None and not self.silent

    def url_for(self, call: str, query: str) -> str:
        """The URL of a call to this server, signed with its secret."""
        return f"{self}/bigbluebutton/api/{call}?{sign(call, query, self.entry.secret, self.entry.checksum)}"

    def call(self, call: str, query: str, method: str = "GET", body: bytes = b"", content_type: str = "") -> Response:
        """Sign a call and return the answer, whatever its status. Raises Unavailable, and marks the server down."""
        headers = {"Content-Type": content_type} if body else {}
        if body or call not in READS:
            headers["Connection"] = "close"
        timeout = WORK_TIMEOUT if body or call == "create" else ANSWER_TIMEOUT
        data = body if body or method == "POST" else None
        request = urllib.request.Request(self.url_for(call, query), data, headers, method=method)
        asked = time.monotonic()
        try:
            response: Response = self.opener.open(request, timeout=timeout)
        except urllib.error.URLError as error:
            raise self.failed(f"no connection: {error.reason}") from error
        except socket.timeout as error:                     # no outage if other calls were answered meanwhile
            raise self.failed(f"no answer in {timeout} s", acted=True, outage=self.answered < asked) from error
        except OSError as error:
            raise self.failed(f"connection lost: {error}", acted=True) from error
        except http.client.HTTPException as error:          # its text may quote what the server sent
            raise self.failed(f"broken answer: {type(error).__name__}", acted=True) from error
        reason = trouble(call, response)
        if reason:                                          # hooks/... is another program on the same host
            raise self.failed(reason, acted=response.status == 500, outage=not call.startswith("hooks/"))
        self.answered, self.silent = time.monotonic(), False
        return response

    def failed(self, reason: str, acted: bool = False, outage: bool = True) -> Unavailable:
        """The error to raise; an outage marks the server down."""
        with self.lock:
            news = outage and (self.down_since is None or self.reason != reason)
            if outage:
                self.down_since, self.reason = self.down_since or time.monotonic(), reason
        if news:
            log.warning("%s is down: %s", self, reason)
        return Unavailable(self, acted)

    def surveyed(self, asked: float) -> None:
        """It answered a survey: it is up, unless it went down after it was asked."""
        with self.lock:
            returned = self.down_since is not None and self.down_since <= asked
            if returned:
                self.down_since = None
        if returned:
            log.info("%s is up", self)


# ---- all servers -----------------------------------------------------------------------------------------------------

class Meeting(NamedTuple):
    """A meeting as we last heard of it."""
    meeting_id: str
    server: Server
    created: int                        # BBB's createTime: milliseconds since 1970
    participants: int
    heard: float                        # when, as time.monotonic


def interleaved(servers: Iterable[Server]) -> list[Server]:
    """Each server as often as its weight, evenly spread; with equal weights in the order of the list."""
    turns = [((turn + 0.5) / server.entry.weight, server) for server in servers for turn in range(server.entry.weight)]
    return [server for _, server in sorted(turns, key=lambda turn: turn[0])]


class Cluster:
    """All servers: which one has a meeting, and which one gets a new one."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError if servers.json is not usable."""
        self.path = path
        self.modified = 0.0                         # st_mtime of servers.json
        self.wake = threading.Event()               # set: read servers.json and survey now
        self.lock = threading.Lock()                # for what follows; never held while a server is asked
        self.servers: list[Server] = []
        self.turns: Iterator[Server] = iter(())     # who gets the next new meeting, and so on for ever
        self.meetings: dict[str, Meeting] = {}      # by meetingID and by internalMeetingID: BBB accepts both
        self.creating: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self.probes: dict[str, futures.Future[Server | None]] = {}      # those going on, by meetingID
        self.twins: set[str] = set()                # IDs that the last survey found on more than one server
        self.load()

    def load(self) -> None:
        """Read servers.json. A server that stays keeps its state and its meetings. Raises SettingsError."""
        with contextlib.suppress(OSError):
            self.modified = os.stat(self.path).st_mtime
        entries = load_servers(self.path)
        with self.lock:
            known = {str(server): server for server in self.servers}
            self.servers = [known.pop(entry.host) if entry.host in known else Server(entry) for entry in entries]
            for server, entry in zip(self.servers, entries):
                server.entry = entry
            self.turns = itertools.cycle(interleaved(self.servers))
            self.meetings = {key: meeting for key, meeting in self.meetings.items() if meeting.server in self.servers}
        for server in known.values():
            server.connections.close()

    def usable(self) -> list[Server]:
        """The servers to ask what any server may answer; a silent one only if there is no other."""
        up = [server for server in self.servers if server.down_since is None]
        return [server for server in up if server.usable] or up

    def ask(self, servers: Iterable[Server], call: str, query: str, patience: float) -> Iterator[tuple[Server, Response]]:
        """Ask servers at once and yield each with its answer as it comes. Who fails or takes longer is left out."""
        asked = {server.pool.submit(server.call, call, query): server for server in servers}
        try:
            for future in futures.as_completed(asked, patience):
                with contextlib.suppress(Unavailable):      # logged where the server was marked down
                    yield asked[future], future.result()
        except futures.TimeoutError:
            for future, server in asked.items():
                if not future.done():
                    server.silent = True
                    log.warning("%s left %s without an answer for %d s", server, call, patience)
        finally:
            for future in asked:
                future.cancel()                     # if it still waits for a thread

    def find(self, meeting_id: str) -> tuple[Server | None, str]:
        """The server that has the meeting, and how that is known; None if no server that is up has it.

        Raises Unavailable while its server is down and may come back with it.
        """
        known, now = self.meetings.get(meeting_id), time.monotonic()
        down_since = known.server.down_since if known else None
        if known and down_since is None and now - known.heard < FRESH:
            return known.server, "remembered"
        if known and down_since is not None and now - down_since < HOLD:
            raise Unavailable(known.server)
        with self.lock:                             # who asks for the same meeting meanwhile shares the answer
            mine: futures.Future[Server | None] = futures.Future()
            probe = self.probes.setdefault(meeting_id, mine)
        if probe is mine:
            try:
                probe.set_result(self.probe(meeting_id, self.usable()))
            except Exception as error:              # noqa: BLE001  whatever it is, all who wait must hear of it
                probe.set_exception(error)
            finally:
                del self.probes[meeting_id]
        return probe.result(), "probed" if probe.result() else "nowhere"

    def probe(self, meeting_id: str, servers: Iterable[Server]) -> Server | None:
        """The first of these servers to answer that it has the meeting, which is then remembered."""
        for server, response in self.ask(servers, "getMeetingInfo", f"meetingID={quote_plus(meeting_id)}", PATIENCE):
            ids = {response.xml.findtext("meetingID"), response.xml.findtext("internalMeetingID")}
            if response.success and meeting_id in ids:      # BBB also takes the beginning of an internal ID for it
                self.remember(server, meeting_id, response.xml)
                return server
        return None

    def remember(self, server: Server, meeting_id: str, told: ET.Element, heard: float | None = None) -> None:
        """Note that the server has the meeting, as it told; without any IDs in that it may have it."""
        ids = {told.findtext("meetingID", meeting_id), told.findtext("internalMeetingID", meeting_id), meeting_id}
        meeting = Meeting(told.findtext("meetingID", meeting_id), server, number(told.findtext("createTime")),
                          number(told.findtext("participantCount")), heard or time.monotonic())
        with self.lock:
            self.meetings.update(dict.fromkeys(ids, meeting))

    def forget(self, meeting_id: str, server: Server, asked: float) -> None:
        """Note that the server, asked then, did not have the meeting."""
        with self.lock:
            known = self.meetings.get(meeting_id)
            if known and known.server is server and known.heard < asked:
                del self.meetings[meeting_id]

    def in_turn(self) -> Iterator[Server]:
        """The servers for a new meeting: the one whose turn it is, then those to try if it cannot be reached."""
        tried: set[Server] = set()
        while True:
            with self.lock:
                cycle = itertools.islice(self.turns, sum(server.entry.weight for server in self.servers))
                server = next((server for server in cycle if server.usable and not server.entry.cordoned
                               and server not in tried), None)
            if server is None:
                return
            tried.add(server)
            yield server

    def survey(self, patience: float) -> None:
        """Ask every server which meetings it runs: that shows which are up, and where each meeting is."""
        asked = time.monotonic()
        listed: dict[str, list[Server]] = {}
        for server, response in self.ask(self.servers, "getMeetings", "", patience):
            if not response.success:
                server.failed(f"getMeetings failed: {response.xml.findtext('messageKey')}")
                continue
            items = merge("getMeetings", [response.xml])
            ids = {item.findtext(name, "") for item in items for name in ("meetingID", "internalMeetingID")}
            for key in self.meetings.keys() - ids:
                self.forget(key, server, asked)     # but not what was placed since: that cannot have been listed
            for item in items:
                listed.setdefault(item.findtext("meetingID", ""), []).append(server)
                known = self.meetings.get(item.findtext("meetingID", ""))
                if (known is None or known.server is server or known.server.down_since is not None
                        or known.created < number(item.findtext("createTime"))):
                    self.remember(server, item.findtext("meetingID", ""), item, asked)
            server.surveyed(asked)
        twins = {meeting_id for meeting_id, servers in listed.items() if len(servers) > 1}
        for meeting_id in twins - self.twins:
            log.warning("meeting %r runs on %s: the newer one counts", meeting_id, " and ".join(map(str, listed[meeting_id])))
        self.twins = twins

    def watch(self) -> None:
        """Survey the servers, and read servers.json when it has changed, for ever."""
        while True:
            forced = self.wake.wait(SURVEY_INTERVAL)
            self.wake.clear()
            try:
                if forced or os.path.exists(self.path) and os.stat(self.path).st_mtime != self.modified:
                    self.load()
                    log.info("%s was read again: %d servers", self.path, len(self.servers))
            except SettingsError as error:
                log.error("%s The servers stay as they were.", error)
            try:
                self.survey(SURVEY_INTERVAL)
            except Exception as error:              # noqa: BLE001  whatever it is, there must be a next survey
                log_bug("a survey", error)


def log_bug(where: str, error: Exception) -> None:
    """Log an error that is ours, without its text, which might quote a query."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed with %s. Please report this:\n%s", where, type(error).__name__, trace)


# ---- calls -----------------------------------------------------------------------------------------------------------

def pass_on(server: Server, request: Request, why: str) -> Response:
    """The server's own answer to the call. Raises Unavailable."""
    request.chosen = f"{server} ({why})"
    return server.call(request.call, request.query, request.method, request.body, request.content_type)


def first_to_answer(servers: Iterable[Server], request: Request, why: str) -> tuple[Server, Response]:
    """Try servers one after the other, but none after one that may have carried out the call. Raises Unavailable."""
    for server in servers:
        try:
            return server, pass_on(server, request, why)
        except Unavailable as error:
            if error.acted and request.call not in READS:
                raise
    raise Unavailable()


def relay_anywhere(cluster: Cluster, request: Request, why: str = "any") -> Response:
    """A call about nothing that a server has: to any server, so that the answer is BBB's own."""
    return first_to_answer(cluster.usable(), request, why)[1]


def relay(cluster: Cluster, request: Request) -> Response:
    """A call about a meeting: to its server. A denial is passed on only when no other server has the meeting."""
    if not request.meeting_id:
        return relay_recording(cluster, request)
    server, why = cluster.find(request.meeting_id)
    if server is None:
        return relay_anywhere(cluster, request, why)
    asked = time.monotonic()
    response = pass_on(server, request, why)
    denied = response.xml.findtext("returncode") == "FAILED" or (
        request.call == "isMeetingRunning" and response.xml.findtext("running") == "false")
    if denied and not cluster.probe(request.meeting_id, [server]):      # else it has the meeting: its answer is right
        cluster.forget(request.meeting_id, server, asked)
        other, _ = cluster.find(request.meeting_id)
        if other:
            return pass_on(other, request, "moved")
    return response


def join(cluster: Cluster, request: Request) -> Response:
    """A browser is sent to the meeting's server itself, whose cookie it needs; a program may want the answer instead."""
    if request.method != "GET":
        raise ApiError("unsupportedRequest", "join is called with GET only", 405)
    try:
        if request.params.get("redirect", "").lower() not in ("", "true"):      # BBB's parseBoolean, unless it is empty
            return relay(cluster, request)
        server, why = cluster.find(request.meeting_id) if request.meeting_id else (None, "any")
        server = server or next(iter(cluster.usable()), None)
        if server is None:
            raise Unavailable()
    except Unavailable:
        if request.browser:
            return RETRY_PAGE
        raise
    request.chosen = f"{server} ({why})"
    return Response(302, b"", "", [("Location", server.url_for("join", request.query))])


def create(cluster: Cluster, request: Request) -> Response:
    """To the server that has the meeting; a new one is placed. Once it has its server, creates run side by side."""
    if not request.meeting_id:
        return relay_anywhere(cluster, request)
    with cluster.lock:
        placing = cluster.creating.setdefault(request.meeting_id, threading.Lock())     # gone when nobody holds it
    with placing:
        server, why = cluster.find(request.meeting_id)
        asked = time.monotonic()
        if server and server.entry.cordoned and not cluster.probe(request.meeting_id, [server]):
            cluster.forget(request.meeting_id, server, asked)           # it ended, and must not begin there again
            server = None
        if server is None:
            return place(cluster, request)
    response = pass_on(server, request, why)
    if response.success:
        cluster.remember(server, request.meeting_id, response.xml)
    return response


def place(cluster: Cluster, request: Request) -> Response:
    """Create a new meeting: a breakout room on its parent's server, any other on the server whose turn it is."""
    parent = request.params.get("parentMeetingID")
    server = cluster.find(parent)[0] if parent else None
    servers, why = ([server], "parent's") if server else (cluster.in_turn(), "in turn")
    try:
        server, response = first_to_answer(servers, request, why)
    except Unavailable as error:
        if error.server:                                    # it may have the meeting now: the next create asks there
            cluster.remember(error.server, request.meeting_id, NOTHING)
        raise
    if response.success or response.status >= 500:
        cluster.remember(server, request.meeting_id, response.xml)
    return response


def ask_all(cluster: Cluster, call: str, query: str, patience: float) -> dict[Server, Response]:
    """The answers of all servers that give one, in the order of the list. Raises Unavailable if there is none."""
    answers = dict(cluster.ask(cluster.usable(), call, query, patience))
    if not answers:
        raise Unavailable()
    return {server: answers[server] for server in cluster.servers if server in answers}


def best(answers: Iterable[Response]) -> Response:
    """The first answer that says SUCCESS, else the first in BBB's XML, else the first."""
    return max(answers, key=lambda response: (response.success, response.xml is not NOTHING))


def merge_lists(cluster: Cluster, request: Request) -> Response:
    """One list of what all servers have. A server without a usable answer is left out."""
    answers = ask_all(cluster, request.call, request.query, PATIENCE)
    lists = [response.xml for response in answers.values() if response.success]
    request.chosen = f"{len(lists)} of {len(cluster.servers)} servers"
    return listing(request.call, merge(request.call, lists)) if lists else best(answers.values())


def recordings(cluster: Cluster, request: Request, query: str) -> dict[Server, Response]:
    """The answers of all servers to getRecordings.

    Raises Unavailable if one of them gives no list, unless every recordID of the request is in the lists of the
    others: a front end takes a recording that is missing in a SUCCESS for deleted.
    """
    answers = ask_all(cluster, "getRecordings", query, CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    found = {item.findtext("recordID") for response in answers.values() for item in response.xml.iter("recording")}
    paged = "limit" in request.params       # without IDs BBB may have to refuse the whole list; it does so by an empty one
    lists = [response for response in answers.values()
             if response.success and not (paged and response.xml.find("recordings") is None)]
    request.chosen = f"{len(lists)} of {len(cluster.servers)} servers"
    if len(lists) < len(cluster.servers) and not (request.record_ids and found.issuperset(request.record_ids)):
        raise Unavailable()
    return answers


def get_recordings(cluster: Cluster, request: Request) -> Response:
    """One list of all servers' recordings, and of that the page that is asked for, with BBB's limits for it."""
    answers = recordings(cluster, request, without(request.query, "offset", "limit"))
    items = merge("getRecordings", [response.xml for response in answers.values()])
    if not re.fullmatch("[+-]?[0-9]{1,9}", request.params.get("limit", "")):
        return listing("getRecordings", items)
    offset, limit = max(0, number(request.params.get("offset"))), min(max(1, number(request.params["limit"])), 100)
    page = items[offset:offset + limit]
    return listing("getRecordings", page, f"<pagination><pageable><offset>{offset}</offset><limit>{limit}</limit>"
                   "<paged>true</paged><unpaged>false</unpaged></pageable>"
                   f"<totalElements>{len(items)}</totalElements><empty>{str(not page).lower()}</empty></pagination>")


def relay_recording(cluster: Cluster, request: Request) -> Response:
    """A call about recordings: to the servers that have them. SUCCESS if any of these says so."""
    if not request.record_ids:
        return relay_anywhere(cluster, request)
    query = f"recordID={quote_plus(','.join(request.record_ids))}&state=any"
    owners = [server for server, response in recordings(cluster, request, query).items()
              if any(item.findtext("recordID") in request.record_ids for item in response.xml.iter("recording"))]
    if not owners:
        return relay_anywhere(cluster, request, "nowhere")
    return best([pass_on(server, request, "owner") for server in owners])


def hook_id(callback_url: str) -> str:
    """One ID for the hooks that all servers have for this URL: BBB allows only one hook a URL (bbb-webhooks, hooks.js)."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, callback_url))


def hooks(cluster: Cluster, request: Request) -> Response:
    """A hook is made, listed and removed on all servers that have webhooks, and shown as one."""
    if request.call == "hooks/destroy":
        return destroy_hook(cluster, request)
    answers = ask_all(cluster, request.call, request.query, CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    request.chosen = f"{len(answers)} of {len(cluster.servers)} servers"
    response = best(answers.values())
    for element in (element for answer in answers.values() for element in answer.xml.iter()):
        shown = element.find("hookID")
        if shown is not None:
            shown.text = hook_id(element.findtext("callbackURL", request.params.get("callbackURL", "")))
    if not response.success:
        return response
    if request.call == "hooks/list":
        return listing(request.call, merge(request.call, [answer.xml for answer in answers.values()]))
    return response._replace(body=ET.tostring(response.xml))


def destroy_hook(cluster: Cluster, request: Request) -> Response:
    """Remove the hook of this ID from every server, each of which knows it by another."""
    if not request.params.get("hookID"):
        raise ApiError("missingParamHookID", "You must specify a hookID in the parameters.")
    answers = ask_all(cluster, "hooks/list", "", CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    found = [(server, hook.findtext("hookID", "")) for server, response in answers.items()
             for hook in response.xml.iter("hook") if hook_id(hook.findtext("callbackURL", "")) == request.params["hookID"]]
    if not found:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    request.chosen = f"{len(found)} of {len(cluster.servers)} servers"
    return best([server.call("hooks/destroy", f"hookID={quote_plus(own)}") for server, own in found])


CALLS: dict[str, Callable[[Cluster, Request], Response]] = collections.defaultdict(lambda: relay, {
    "create": create,
    "join": join,
    "getMeetings": merge_lists,
    "getSessions": merge_lists,
    "getRecordings": get_recordings,
    "publishRecordings": relay_recording,
    "deleteRecordings": relay_recording,
    "updateRecordings": relay_recording,
    "getRecordingTextTracks": relay_recording,
    "putRecordingTextTrack": relay_recording,
    "hooks/create": hooks,
    "hooks/list": hooks,
    "hooks/destroy": hooks,
})


# ---- watching --------------------------------------------------------------------------------------------------------

def health(cluster: Cluster) -> Response:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    able = any(server.usable and not server.entry.cordoned for server in cluster.servers)
    return Response(200 if able else 503, b"ok\n" if able else b"no server for a new meeting\n", "text/plain")


# ---- HTTP ------------------------------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"[A-Z]+ [!-\"$-~]+ HTTP/1\.[01]\r?\n")      # ASCII; a "#" is no part of a request's target
CALL = re.compile("/bigbluebutton/api/([A-Za-z]+(?:/[A-Za-z]+)*)")
FORM, XML_TYPES = "application/x-www-form-urlencoded", ("application/xml", "text/xml")
IDLE, READING, ANSWERING = range(3)     # what a connection does: waits for a request, receives one, is being answered


class LoadBalancer(http.server.ThreadingHTTPServer):
    """The listener: a thread for each connection, and a place for everyone's next one."""
    request_queue_size = 1024           # listen(2): at nine o'clock every class joins at once
    daemon_threads = True               # idle connections must not hold up our exit

    def __init__(self, cluster: Cluster, secrets: Sequence[str], bind: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Raises OSError if the address is not to be had."""
        self.cluster, self.secrets, self.tls = cluster, secrets, tls
        self.stopping = False
        self.change = threading.Condition()
        self.connections: dict[Any, tuple[int, float]] = {}     # socket -> what it does, and since when it is idle
        bind = bind or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        info: Any = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family, address = info[0], info[4]
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """HTTPServer's asks DNS for our own name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)      # IPv4 as well
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[Any, Any]:
        """The handshake waits for the first read, in the connection's thread: a mute client must not stop others."""
        connection, address = super().get_request()
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection. If there are too many, the one that has kept us waiting longest must go."""
        with self.change:
            while len(self.connections) >= MAX_CONNECTIONS and not self.stopping:
                waiting = [(since, id(other), other) for other, (doing, since) in self.connections.items()
                           if doing != ANSWERING and since + 1 < time.monotonic()]
                if waiting:
                    other = min(waiting)[2]
                    self.connections[other] = ANSWERING, 0.0
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(other, socket.SHUT_RDWR)     # its thread reads the end, and is done
                self.change.wait(0.1)
            self.connections[request] = IDLE, time.monotonic()
        super().process_request(request, client_address)

    def now(self, connection: Any, doing: int) -> None:
        """Note what a connection does now."""
        with self.change:
            since = time.monotonic() if doing == IDLE else self.connections[connection][1]
            self.connections[connection] = doing, since
            self.change.notify_all()

    def shutdown_request(self, request: Any) -> None:
        """A connection is over."""
        with self.change:
            self.connections.pop(request, None)
            self.change.notify_all()
        super().shutdown_request(request)

    def drain(self, timeout: float) -> bool:
        """Wait until no request is in progress; tell whether that was in time (seconds)."""
        with self.change:
            return self.change.wait_for(lambda: all(doing == IDLE for doing, _ in self.connections.values()), timeout)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line for a client that went away; more for a mistake of ours."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.info("%s went away: %s", client_address[0], error)
        elif isinstance(error, Exception):
            log_bug("serving a connection", error)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. It stays open only after a request that cannot have left bytes on it: one without a body."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True      # head and body are two writes
    timeout = IDLE_TIMEOUT              # for the TLS handshake, and for each read and write
    server: LoadBalancer
    raw_requestline: bytes

    def parse_request(self) -> bool:
        """Refuse what is not plain HTTP, and what two readers could read differently."""
        self.server.now(self.request, READING)
        self.started, self.call, self.unread = time.monotonic(), Request("-", "", {}), 0
        self.command, self.request_version, self.close_connection = "", "HTTP/1.1", True
        if not REQUEST_LINE.fullmatch(self.raw_requestline):
            self.send_error(400)
            return False
        if not super().parse_request():
            return False
        keep_open, self.close_connection = not self.close_connection and self.request_version == "HTTP/1.1", True
        lengths = self.headers.get_all("Content-Length", ["0"])
        if "Transfer-Encoding" in self.headers:
            self.send_error(411)
        elif len(lengths) > 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]) or self.headers.defects:
            self.send_error(400)
        else:
            self.unread = int(lengths[0])
            self.close_connection = not keep_open or self.unread > 0
            return True
        return False

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            response = self.answer()
        except ApiError as error:
            response = error.response(self.call.call)
        except OSError:
            raise                       # the client went away while we read its body
        except Exception as error:      # noqa: BLE001  whatever it is, the caller gets an answer
            log_bug(self.call.call, error)
            response = ApiError("internalError", "An error of tinyscale; its log tells more.", 500).response("")
        self.respond(response)

    do_HEAD = do_POST = do_GET

    def answer(self) -> Response:
        """The answer to the request. Raises ApiError if it is refused."""
        path, _, query = re.sub("^https?://[^/?]*", "", self.requestline.split(" ")[1]).partition("?")
        if path in ("/bigbluebutton/", "/bigbluebutton/api", "/bigbluebutton/api/"):
            return VERSION
        if path == "/health":
            return health(self.server.cluster)
        match = CALL.fullmatch(path)
        if not match:
            raise ApiError("notFound", "There is nothing at this address.", 404)
        self.call = Request(match[1], "", {})
        self.call = self.read_call(match[1], query)
        self.server.now(self.request, ANSWERING)
        return CALLS[self.call.call](self.server.cluster, self.call)

    def read_call(self, call: str, query: str) -> Request:
        """Verify the checksum, then read the body: nobody without the secret can send us much. Raises ApiError."""
        content_type = self.headers.get("Content-Type", "")
        media_type, body = content_type.partition(";")[0].strip().lower(), b""
        if media_type == FORM and not query and self.unread:
            query = self.body(MAX_QUERY).decode("latin-1")
            if not re.fullmatch("[!-\"$-~]*", query):
                raise ApiError("badRequest", "The form is not URL-encoded.", 400)
            query, params = verify(call, query, self.server.secrets, form=True)
        else:
            query, params = verify(call, query, self.server.secrets)
            if self.unread and media_type not in (FORM, *XML_TYPES) and media_type != "multipart/form-data":
                raise ApiError("unsupportedContentType", "POST request Content-Type is missing or unsupported")
            body = self.body(MAX_BODY)
            if media_type == FORM and body and not re.match(rb"(\xef\xbb\xbf)?\s*<", body):
                raise ApiError("checksumError", "Parameters must be in the URL or in the body, not in both")
            if media_type != "multipart/form-data":         # XML, whatever it is labelled: BBB wants the bare type
                content_type = "application/xml"
        method = "POST" if self.command == "POST" else "GET"
        return Request(call, query, params, method, body, content_type, "text/html" in self.headers.get("Accept", ""))

    def body(self, limit: int) -> bytes:
        """The body of the request, all of it. Raises ApiError if it is too large, ConnectionError if it is cut short."""
        if self.unread > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        if self.unread and self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(self.unread)
        if len(body) < self.unread:
            raise ConnectionError("the body of its request was cut short")
        self.unread = 0
        return body

    def handle_expect_100(self) -> bool:
        """Not yet: body() asks for it when everything else is right."""
        return True

    def respond(self, response: Response) -> None:
        """Write the answer, and a line in the log."""
        self.close_connection |= self.server.stopping
        self.send_response(response.status)
        for name, value in (("Content-Type", response.content_type), ("Content-Length", str(len(response.body))),
                            *response.headers, ("Connection", "close" if self.close_connection else "")):
            if value:
                self.send_header(name, re.sub(r"[\r\n]+\s*", " ", value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
        log.info("%s %r %s %d %.0f ms", self.call.call, self.call.meeting_id, self.call.chosen or self.client_address[0],
                 response.status, 1000 * (time.monotonic() - self.started))
        if self.unread:                 # or the client, still sending, might not see why it was refused
            self.linger()
        self.server.now(self.request, IDLE)

    def linger(self) -> None:
        """Take in what a refused client still sends, for a while."""
        self.connection.settimeout(LINGER)
        deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and self.connection.recv(65536):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in XML."""
        self.close_connection, self.request_version = True, "HTTP/1.1"
        self.respond(ApiError("badRequest", http.client.responses[code], code).response(""))

    def version_string(self) -> str:
        return f"tinyscale/{__version__}"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """respond() logs: the request line holds passwords."""

    def log_message(self, format: str, *args: Any) -> None:
        if self.server.connections.get(self.request, (IDLE, 0))[0] != IDLE:        # else it was merely kept long enough
            log.info("%s went silent in the middle of a request", self.client_address[0])


# ---- command line ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """argparse prints the usage too, which hides the one line that matters."""
        raise SettingsError(f"{message}. Try --help.")


def port_number(text: str) -> int:
    if not 0 <= number(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: PORT must be a number up to 65535")
    return int(text)


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings that are no secret, from the command line or else from the environment. Raises SettingsError."""
    env = os.environ.get
    parser = Parser("tinyscale.py", description="Makes several BigBlueButton servers look like one.", epilog="The secret for "
                    "the front ends comes from TINYSCALE_SECRET or TINYSCALE_SECRET_FILE; TINYSCALE_CERT and TINYSCALE_KEY "
                    "make it serve HTTPS. SIGHUP reads servers.json again. Exit status: 0 stopped, 1 failed, 2 bad settings.")
    parser.add_argument("command", nargs="?", default="serve", choices=["serve", "check", "url"],
                        help="serve the API (default), check every server, or print a signed URL")
    parser.add_argument("call", nargs="?", default="getMeetings", help="for url, such as 'getMeetingInfo?meetingID=x'")
    parser.add_argument("--port", type=port_number, default=env("PORT") or "3005", help="PORT (default 3005)")
    parser.add_argument("--bind", default=env("TINYSCALE_BIND", ""), help="TINYSCALE_BIND (default: every address)")
    parser.add_argument("--servers", default=env("TINYSCALE_SERVERS") or "servers.json",
                        help="TINYSCALE_SERVERS (default: servers.json)")
    return parser.parse_args(argv)


def secrets_and_tls() -> tuple[list[str], ssl.SSLContext | None]:
    """What the environment says of our own secrets and certificate. Raises SettingsError."""
    env = os.environ.get
    return (load_secrets(env("TINYSCALE_SECRET", ""), env("TINYSCALE_SECRET_FILE", "")),
            load_tls(env("TINYSCALE_CERT", ""), env("TINYSCALE_KEY", "")))


def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises SettingsError, or OSError without the port."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # before any thread starts; sigwait receives them
    secrets, tls = secrets_and_tls()
    cluster = Cluster(options.servers)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))        # a thousand clients, and the servers' connections
    balancer = LoadBalancer(cluster, secrets, options.bind, options.port, tls)
    cluster.survey(PATIENCE)
    for loop in (balancer.serve_forever, cluster.watch):
        threading.Thread(target=loop, daemon=True).start()
    log.info("tinyscale %s listens on port %d, with %d of %d servers up", __version__, balancer.server_address[1],
             len(cluster.usable()), len(cluster.servers))
    while signal.sigwait(signals) == signal.SIGHUP:
        cluster.wake.set()
        try:
            balancer.secrets, balancer.tls = secrets_and_tls()      # a renewed certificate
        except SettingsError as error:
            log.error("%s It stays as it was.", error)
    for number in (signal.SIGINT, signal.SIGTERM):          # a second one ends at once, as PID 1 too
        signal.signal(number, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    balancer.stopping = True
    balancer.shutdown()
    balancer.server_close()
    log.info("stopped" if balancer.drain(DRAIN_TIMEOUT) else "stopped with calls in progress")
    return 0


def check(options: argparse.Namespace) -> int:
    """Try every server and print what came of it; return 1 if one is unusable."""
    cluster = Cluster(options.servers)
    started, took = time.monotonic(), {}
    for server, response in cluster.ask(cluster.servers, "getMeetings", "", CONNECT_TIMEOUT + ANSWER_TIMEOUT):
        took[server] = f"up       {1000 * (time.monotonic() - started):6.0f} ms {len(merge('getMeetings', [response.xml])):4} meetings"
    for server in cluster.servers:
        print(f"{server!s:40} {took.get(server, f'UNUSABLE {server.reason}')}")
    return 0 if len(took) == len(cluster.servers) else 1


def url(options: argparse.Namespace) -> int:
    """Print the URL of a call, signed for tinyscale itself."""
    secrets, tls = secrets_and_tls()
    call, _, query = options.call.partition("?")
    print(f"{'https' if tls else 'http'}://{options.bind or 'localhost'}:{options.port}/bigbluebutton/api/{call}?"
          f"{sign(call, query, secrets[0])}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        options = read_options(argv)
        return {"serve": serve, "check": check, "url": url}[options.command](options)
    except (SettingsError, OSError) as error:
        print(f"tinyscale: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)        # the threads of the pools may wait for a hung server, and Python would wait for them
