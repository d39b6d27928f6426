#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

    TINYSCALE_SECRET=... python3 tinyscale.py            serve port 3005, in front of ./servers.json

It verifies the checksum of each API call, finds the server that runs the meeting, signs the call again with that server's
secret and relays the answer. A meeting that exists nowhere is created on the next server of the list, in turn.
The way of a call, from top to bottom and never back up:

    accept()             LoadBalancer       a thread for each connection
      parse_request()    Handler            refuses what is not plain HTTP
      read_call()        Handler, verify    the checksum first, only then the body (a form is the query)
        CALLS[call]      create, relay ...  which server, or all of them
          find, in_turn  Cluster            who has the meeting, who gets it
            call()       Server             signed again; a failure marks the server down
      respond()          Handler            the answer, and a line in the log
In memory is where each meeting was last seen, and which servers are down: hints, renewed by asking the servers every ten
seconds. It holds your servers' secrets: read it before you run it, first verify, Handler.body, Server.call, load_servers.
"""
from __future__ import annotations

# isort: off
import argparse, collections, contextlib, hashlib, hmac, http.client, http.server, io, json, logging, os, re, resource, signal
import socket, socketserver, ssl, sys, threading, time, traceback, urllib.error, urllib.request, uuid, weakref
import xml.etree.ElementTree as ET
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote_plus, unquote_plus, urlsplit
__version__ = "1.0"
log = logging.getLogger("tinyscale")

# ---- limits ----------------------------------------------------------------------------------------------------------
CONNECT_TIMEOUT = 3                 # seconds to reach a server, its TLS handshake included
ANSWER_TIMEOUT, WORK_TIMEOUT = 10, 60       # seconds a server may be silent; the same for a create and calls with a body
PATIENCE = 3                        # seconds for which a question to several servers waits for the slowest
SURVEY_INTERVAL, FRESH = 10, 30     # seconds between surveys of all servers; how long memory is believed: two may fail
HOLD, RETRY_AFTER = 30, 5           # seconds for which a server that is down keeps its meetings; until a browser tries again
IDLE_TIMEOUT, LINGER = 75, 2        # seconds of a client's silence (nginx gives up after 60); to let it finish if refused
DRAIN_TIMEOUT, MAX_CONNECTIONS = 10, 1000       # seconds that a stop waits for calls in progress; clients, a thread each
MAX_POOL, MAX_IDLE = 32, 30         # connections kept open to a server, seconds each waits for a call (nginx closes after 75)
MAX_PROBES, WORKERS = 64, 16        # meetings searched for at once; threads for what a server is asked among several
MAX_QUERY, MAX_BODY = 2**16, 100 * 2**20    # bytes of a query (in a form too) or of headers, and of slides
MAX_ANSWER = 64 * 2**20             # bytes of a server's answer: some 20,000 recordings

# ---- answers ---------------------------------------------------------------------------------------------------------
XML = "text/xml;charset=utf-8"          # without the charset Python clients read it as Latin-1
NOTHING = ET.Element("nothing")         # in place of an answer that is no XML of BBB
READS = {"getMeetings", "getMeetingInfo", "isMeetingRunning", "getRecordings"}      # change nothing: may be repeated
JSON_CALLS = {"getRecordingTextTracks", "putRecordingTextTrack"}

@dataclass
class Request:
    """A call; one of a client's only after its checksum was right."""
    call: str                           # what follows /bigbluebutton/api/
    query: str = ""                     # raw, without its checksum
    params: dict[str, str] = field(default_factory=dict)        # the same, decoded
    method: str = "GET"
    body: bytes = b""                   # slides or a file, which the checksum does not cover
    content_type: str = ""
    browser: bool = False               # a person waits for the answer, not a program
    chosen: str = ""                    # for the log: which server, and why
    def __post_init__(self) -> None:
        self.meeting_id = self.params.get("meetingID", "")
        ids = unquote_plus(self.params.get("recordID", "")).split(",")      # decoded twice, as in BBB's RecordingController
        self.record_ids = {text.strip() for text in ids} - {""}
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
    def response(self, call: str = "") -> Response:
        """The answer, in the format of the call."""
        fields = {"returncode": "FAILED", "messageKey": self.key, "message": self.message}
        if call in JSON_CALLS:
            return Response(self.status, json.dumps({"response": fields}).encode(), "application/json;charset=utf-8")
        inner = "".join(f"<{name}>{text}</{name}>" for name, text in fields.items())      # our own words: nothing to escape
        return Response(self.status, f"<response>{inner}</response>".encode())
class Unavailable(ApiError):
    """No usable answer from this server, or from any. `acted`: it may have carried out the call all the same."""
    def __init__(self, server: Server | None = None, acted: bool = False) -> None:
        super().__init__("serverUnavailable", "The server cannot be reached now. Please try again in a minute.")
        self.server, self.acted = server, acted
def parse(body: bytes) -> ET.Element:
    """The <response> that a body consists of; NOTHING if it is anything else."""
    with contextlib.suppress(ET.ParseError, LookupError, ValueError):   # not well-formed, or in an unknown encoding
        root = ET.fromstring(re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b" ", body))     # a control character in a name must not hide the rest
        level = [root]
        for _ in range(50):             # BBB's are ten deep, and thousands end in a RecursionError when they are written
            level = [child for element in level for child in element]
        return root if root.tag == "response" and not level else NOTHING
    return NOTHING
def number(text: str | None) -> int:
    """A number in BBB's XML or parameters; -1 if the text is none."""
    return int(text) if text and re.fullmatch("[+]?[0-9]{1,18}", text) else -1
VERSION = Response(200, b"<response><returncode>SUCCESS</returncode><version>2.0</version><apiVersion>2.0</apiVersion></response>")
RETRY_PAGE = Response(503, f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>One moment</title>
<meta http-equiv="refresh" content="{RETRY_AFTER}"><meta name="viewport" content="width=device-width">
<body style="font: 1.2em/1.5 sans-serif; margin: 10vh 10vw; color-scheme: light dark"><h1>One moment, please</h1>
<p>The server of this room cannot be reached right now. This page tries again by itself: just leave it open.""".encode(),
                      "text/html;charset=utf-8", [("Retry-After", str(RETRY_AFTER)), ("Cache-Control", "no-store")])
LISTS = {   # call -> path of an item, what identifies it, what tells the newest; and BBB's words (and typo) for an empty list
    "getMeetings": ("meetings/meeting", "meetingID", "createTime", (
        "<meetings/><messageKey>noMeetings</messageKey><message>no meetings were found on this server</message>")),
    "getSessions": ("sessions/meeting", "", "none", (
        "<sessions/><messageKey>noSessions</messageKey><message>no sessions were found on this serverr</message>")),
    "getRecordings": ("recordings/recording", "recordID", "startTime", ("<recordings></recordings>"
        "<messageKey>noRecordings</messageKey><message>There are no recordings for the meeting(s).</message>")),
    "hooks/list": ("hooks/hook", "callbackURL", "none", "<hooks></hooks>"),
}
def merge(call: str, answers: Iterable[Response]) -> list[ET.Element]:
    """The items of several answers to a call of LISTS, the newest first; of those with one identity only the newest."""
    path, identity, newest, _ = LISTS[call]
    items = (item for answer in answers for item in answer.xml.iterfind(path))
    merged: dict[Any, ET.Element] = {}
    for item in sorted(items, key=lambda item: number(item.findtext(newest)), reverse=True):
        merged.setdefault(item.findtext(identity) if identity else item, item)
    return list(merged.values())
def listing(call: str, items: Sequence[ET.Element], pagination: str = "") -> Response:
    """BBB's answer to a call of LISTS that has these items."""
    path, _, _, empty = LISTS[call]
    name, inner = path.split("/")[0], "".join(ET.tostring(item, encoding="unicode") for item in items)
    inner = f"<{name}>{inner}</{name}>" if items else empty
    return Response(200, f"<response><returncode>SUCCESS</returncode>{inner}{pagination}</response>".encode())

# ---- checksums -------------------------------------------------------------------------------------------------------
DIGESTS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}       # by the length in hex, as BBB tells them apart
def checksum(call: str, query: str, secret: str, digest: str) -> str:
    """The hex checksum of a call: over its name, its raw query without the checksum, and the secret (BBB's API docs)."""
    return hashlib.new(digest, (call + query + secret).encode()).hexdigest()
def sign(call: str, query: str, secret: str, digest: str = "sha256") -> str:
    return f"{query}{query and '&'}checksum={checksum(call, query, secret, digest)}"
def without(query: str, *names: str) -> str:
    """The raw query less the parameters of these names; the rest stays byte for byte, empty parts too."""
    return "&".join(part for part in query.split("&") if part.partition("=")[0] not in names)
def verify(call: str, query: str, secrets: Iterable[str], form: bool = False) -> tuple[str, dict[str, str]]:
    """Check the checksum in a raw query; return the query without it, and its decoded parameters.
    A form's query may also be signed as BBB does since 2.6.18: as if it were empty. Raises ApiError if the checksum is
    missing, repeated or wrong, or if meetingID or recordID is repeated: BBB's calls differ in which one counts, and a
    server must not read a call differently from us. (parse_qsl splits at ";" before Python 3.8.8; BBB does not.)"""
    given = [part[len("checksum="):].lower() for part in query.split("&") if part.startswith("checksum=")]
    digest, unsigned = DIGESTS.get(len(given[0]), "") if len(given) == 1 else "", without(query, "checksum")
    for secret in filter(str.strip, secrets if digest else ()):             # a blank secret never verifies anything
        for text in [unsigned, ""] if form else [unsigned]:
            if hmac.compare_digest(checksum(call, text, secret, digest).encode(), given[0].encode()):
                parts = [part.partition("=") for part in query.split("&") if part]      # decoding is dear: not for strangers
                pairs = [(unquote_plus(name), unquote_plus(value)) for name, _, value in parts]
                names = collections.Counter(name for name, _ in pairs)
                if names["checksum"] == 1 and names["meetingID"] < 2 and names["recordID"] < 2:
                    return unsigned, dict(reversed(pairs))      # of other repeated ones the first counts, as in BBB
    raise ApiError("checksumError", "Checksums do not match")

# ---- settings --------------------------------------------------------------------------------------------------------
class SettingsError(Exception):
    """A mistake in the settings: one line that says where it is and how to mend it."""
class Entry(NamedTuple):
    """An entry of servers.json, its host reduced to the origin."""
    host: str
    secret: str
    weight: int = 1
    cordoned: bool = False
    checksum: str = "sha256"
def origin(url: Any) -> str:
    """The origin in any form of a server's URL that bbb-conf prints; "" if it is no such URL."""
    match = re.fullmatch(r"(?ai)(https?://[\w.:\[\]-]+)(/bigbluebutton(/api)?)?/?", str(url))
    text = re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", match[1].lower()) if match else ""
    with contextlib.suppress(ValueError):                   # a port or an IPv6 address that is none
        return text if urlsplit(text).hostname and urlsplit(text).port != 0 else ""
    return ""
FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "host": (origin, 'must look like "https://bbb1.example.org"'),
    "secret": (lambda value: isinstance(value, str) and value.strip() and value.isprintable(), "must be what 'bbb-conf --secret' prints"),
    "weight": (lambda value: type(value) is int and 1 <= value <= 100, "must be a whole number from 1 to 100"),
    "cordoned": (lambda value: isinstance(value, bool), "must be true or false"),
    "checksum": (lambda value: value in DIGESTS.values(), 'must be "sha1", "sha256", "sha384" or "sha512"'),
}
@contextlib.contextmanager
def mistakes(where: str, mend: str) -> Iterator[None]:
    """Turn what goes wrong with a file, or with our address, into a SettingsError."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: {getattr(error, 'strerror', None) or error}. {mend}") from None
def load_servers(path: str) -> list[Entry]:
    """Read servers.json. Raises SettingsError: nothing half valid comes out."""
    with mistakes(path, "It must be JSON like servers.json.example."), open(path, encoding="utf-8-sig") as file:
        items = json.load(file)
        if os.fstat(file.fileno()).st_mode & 0o004:
            log.warning("%s holds secrets, but everyone may read it. Mend it with: chmod o-r %s", path, path)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f'{path}: must be a list of servers: [{{"host": "...", "secret": "..."}}, ...]')
    entries: dict[str, Entry] = {}
    for count, item in enumerate(items, 1):
        host = origin(item.get("host"))
        where = f"{path}: entry {count}{host and f' ({host})'}"
        for name in dict.fromkeys(["host", "secret", *item]):
            right, rule = FIELDS.get(name, (bool, f"is an unknown key. Known are {', '.join(FIELDS)}"))
            if name not in FIELDS or not right(item.get(name)):
                raise SettingsError(f'{where}: {json.dumps(name)} {"" if name in item else "is missing, it "}{rule}.')
        if host in entries:
            raise SettingsError(f"{where}: an earlier entry has the same host. Take one of them out.")
        entries[host] = Entry(**{**item, "host": host, "secret": item["secret"].strip()})
    return list(entries.values())
def load_secrets() -> list[str]:
    """Our own secrets, from the environment: with commas between them, or one a line of a file. Raises SettingsError."""
    text, path = os.environ.get("TINYSCALE_SECRET", ""), os.environ.get("TINYSCALE_SECRET_FILE", "")
    secrets = text.split(",") if text else []
    with mistakes(f"TINYSCALE_SECRET_FILE: {path}", "It must hold the secrets, one a line."), open(path or os.devnull) as file:
        secrets += filter(str.strip, file)
    if not secrets or not all(map(str.strip, secrets)):
        raise SettingsError(f"TINYSCALE_SECRET: {'a secret is blank' if secrets else 'there is none'}. Set it to what the "
                            "front ends shall use, for example to the output of: openssl rand -hex 32")
    return [secret.strip() for secret in secrets]
def load_tls() -> ssl.SSLContext | None:
    """The TLS of the listener, from the files that the environment names; None for plain HTTP. Raises SettingsError."""
    cert, key = os.environ.get("TINYSCALE_CERT"), os.environ.get("TINYSCALE_KEY")
    if not cert and not key:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2            # the default only since Python 3.10
    with mistakes(f"TINYSCALE_CERT {cert}, TINYSCALE_KEY {key}", "They must be PEM files that fit together."):
        tls.load_cert_chain(cert or "", key or None, lambda: "")        # a pass phrase is never asked for
    return tls

# ---- one BBB server --------------------------------------------------------------------------------------------------
class KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Keeps connections to a server open. It may close one just as we write to it, and then nobody knows whether it saw the
    request: so what must not be sent twice says "Connection: close", and gets a connection of its own."""
    trust = ssl.create_default_context()                    # the system's authorities, or SSL_CERT_FILE
    def __init__(self) -> None:
        super().__init__(context=self.trust)
        self.idle: collections.deque[tuple[float, http.client.HTTPConnection]] = collections.deque()
    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        """Return the Response. Raises URLError if there is no connection, else OSError or HTTPException."""
        kept = None
        with contextlib.suppress(IndexError):               # none is kept
            while time.monotonic() - self.idle[0][0] > MAX_IDLE:
                self.idle.popleft()[1].close()
            kept = None if req.has_header("Connection") else self.idle.pop()[1]
        connection = kept or http_class(req.host, timeout=CONNECT_TIMEOUT, **http_conn_args)
        connected = kept is not None
        try:
            if not connected:
                connection.connect()
                connected = True
            connection.sock.settimeout(req.timeout)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):        # it may have refused a body half sent
                connection.request(req.get_method(), req.selector, req.data, {**req.headers, **req.unredirected_hdrs})
            answer, body, deadline = connection.getresponse(), bytearray(), time.monotonic() + (req.timeout or 0)
            length = answer.length
            while len(body) != length and len(body) <= MAX_ANSWER and (piece := answer.read1(2**16)):
                body += piece
                if time.monotonic() > deadline:             # it comes in drops
                    raise socket.timeout
            answer.close()
            if len(body) > MAX_ANSWER or length not in (None, len(body)):       # read1 does not tell
                raise http.client.IncompleteRead(b"")
        except BaseException as error:
            connection.close()                              # never kept half read
            if not connected:
                raise urllib.error.URLError(str(error)) from error
            if kept and isinstance(error, (ConnectionError, ssl.SSLEOFError)):      # closed meanwhile
                self.idle.clear()
                return self.do_open(http_class, req, **http_conn_args)
            raise
        if connection.sock and not req.has_header("Connection") and len(self.idle) < MAX_POOL:
            self.idle.append((time.monotonic(), connection))
        else:                                               # without a sock: the server said that it closes
            connection.close()
        headers = [(name, value) for name in ("Location", "Set-Cookie") for value in answer.headers.get_all(name, [])]
        return Response(answer.status, bytes(body), answer.headers.get("Content-Type", ""), headers, parse(bytes(body)))
def trouble(call: str, response: Response) -> tuple[str, bool]:
    """Why an answer says more of the server than of the call, so that no caller may see it ("" if not), and whether it is an outage."""
    status, length = response.status, len(response.body)
    if response.xml.findtext("messageKey") == "checksumError":
        return "it refuses our checksum: compare the secret in servers.json with 'bbb-conf --secret'", True
    if status < 200 or 300 <= status < 400 and call != "join":
        return f"HTTP {status}: a redirect? The host in servers.json must be where it leads", True
    gone = status in (502, 503, 504)    # nginx is there, BBB behind it is not; else it may be the trouble of one meeting
    broken = gone or call in READS and (status >= 500 or status < 300 and response.xml is NOTHING)
    return f"HTTP {status}, {length} bytes that are no answer of BigBlueButton" if broken else "", gone or call == "getMeetings"

class Server:
    """One BBB server: how to call it, and whether it is up. Times are time.monotonic's seconds."""
    def __init__(self, entry: Entry) -> None:
        self.entry = entry                                  # replaced as a whole when servers.json changes
        self.opener = urllib.request.OpenerDirector()       # build_opener's follows redirects and uses proxies
        self.opener.addheaders = [("User-Agent", f"tinyscale/{__version__}")]
        self.opener.add_handler(KeepAliveHandler())
        self.pools = {True: futures.ThreadPoolExecutor(WORKERS), False: futures.ThreadPoolExecutor(WORKERS)}     # for questions?
        self.lock = threading.Lock()                        # for down_since and reason
        self.down_since: float | None = time.monotonic()    # None: it is up, which it first has to show
        self.reason = "no answer yet"                       # why it is down
        self.doubtful = False                               # it failed to answer a question, and has not answered since
        self.answered, self.turn = 0.0, 0.0                 # when it last gave a usable answer; for Cluster.in_turn
        self.running = 0                                    # meetings, in the last survey
    def __str__(self) -> str:
        return self.entry.host
    def url_for(self, call: str, query: str) -> str:
        return f"{self}/bigbluebutton/api/{call}?{sign(call, query, self.entry.secret, self.entry.checksum)}"
    def call(self, request: Request, why: str = "") -> Response:
        """Sign a call and return the answer. Raises Unavailable if there is no usable one; an outage marks the server down."""
        request.chosen = f"{self} ({why})"
        call, asked, bbb = request.call, time.monotonic(), not request.call.startswith("hooks/")    # another program there
        headers = {} if call in READS and not request.body else {"Connection": "close"}
        if request.body:
            headers["Content-Type"] = request.content_type
        timeout = WORK_TIMEOUT if request.body or call == "create" else ANSWER_TIMEOUT
        data = request.body if request.body or request.method == "POST" else None
        signed = urllib.request.Request(self.url_for(call, request.query), data, headers, method=request.method)
        try:
            response: Response = self.opener.open(signed, timeout=timeout)
        except urllib.error.URLError as error:
            raise self.failed(f"no connection: {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:       # the text of the latter may quote what was sent
            reason = (f"no answer in {timeout} s" if isinstance(error, socket.timeout) else
                      f"broken answer: {error if isinstance(error, OSError) else type(error).__name__}")
            outage = self.answered < asked                  # else other calls were answered meanwhile: it is this one's trouble
            raise self.failed(reason, acted=True, outage=bbb and outage) from error
        reason, outage = trouble(call, response)
        if reason:
            raise self.failed(reason, acted=response.status == 504, outage=bbb and outage)
        self.answered, self.doubtful = time.monotonic(), False
        return response
    def failed(self, reason: str, acted: bool = False, outage: bool = True) -> Unavailable:
        """The error to raise; an outage marks the server down."""
        with self.lock:
            if self.down_since is None or self.reason != reason:
                log.warning("%s %s: %s", self, "is down" if outage else "failed", reason)
            if outage:
                self.down_since, self.reason = self.down_since or time.monotonic(), reason
        return Unavailable(self, acted)
def log_bug(where: str, error: BaseException | None) -> None:
    """Log an error that is ours, without its text, which might quote a query."""
    log.error("%s failed with %s. Please report this:\n%s", where, type(error).__name__,
              "".join(traceback.format_tb(error.__traceback__ if error else None)))

# ---- all servers -----------------------------------------------------------------------------------------------------
class Meeting(NamedTuple):
    """A meeting as we last heard of it."""
    server: Server
    created: int                        # BBB's createTime: milliseconds since 1970
    heard: float                        # when, as time.monotonic
class Cluster:
    """All servers: which one has a meeting, and which one gets a new one."""
    def __init__(self, path: str) -> None:
        self.path, self.modified = path, 0.0        # of servers.json; modified is modification() when it was read
        self.wake = threading.Event()               # set: read servers.json and survey now
        self.lock = threading.Lock()                # to change what follows; never held while a server is asked
        self.servers: list[Server] = []
        self.turn = 0.0                             # see in_turn
        self.meetings: dict[str, Meeting] = {}      # by meetingID and by internalMeetingID: BBB accepts both
        self.creating: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self.pool = futures.ThreadPoolExecutor(MAX_PROBES)
        self.probes: dict[str, futures.Future[tuple[Server | None, bool]]] = {}      # those going on, by meetingID
        self.twins: set[str] = set()                # IDs that the last survey found on more than one server
        self.load()
    def modification(self) -> float:
        return os.stat(self.path).st_mtime if os.path.exists(self.path) else 0.0
    def load(self) -> None:
        """Read servers.json. A server that stays keeps its state and its meetings. Raises SettingsError."""
        self.modified = self.modification()
        entries = load_servers(self.path)
        with self.lock:
            known = {str(server): server for server in self.servers}
            self.servers = [known.get(entry.host) or Server(entry) for entry in entries]
            for server, entry in zip(self.servers, entries):
                server.entry = entry
            self.meetings = {key: meeting for key, meeting in self.meetings.items() if meeting.server in self.servers}
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.down_since is None]
    def usable(self) -> list[Server]:
        """The servers to ask what any server may answer; a doubtful one only if there is no other."""
        return [server for server in self.up() if not server.doubtful] or self.up()
    def ask(self, servers: Sequence[Server], request: Request, patience: float) -> Iterator[tuple[Server, Response]]:
        """Ask servers at once and yield each with its answer as it comes. Who fails or takes longer is left out."""
        question = request.call in ("getMeetings", "getMeetingInfo")        # quick: does not wait behind lists, shows doubts
        asked = {server.pools[question].submit(server.call, request): server for server in servers}
        try:
            for future in futures.as_completed(asked, patience):
                try:
                    yield asked[future], future.result()
                except Unavailable:                         # logged where it was found out
                    asked[future].doubtful |= question
        except futures.TimeoutError:
            for server in [server for future, server in asked.items() if future.running()]:
                server.doubtful |= question
                log.warning("%s left %s without an answer for %d s", server, request.call, patience)
        finally:
            for future in asked:
                future.cancel()                             # if it still waits for a thread
    def find(self, meeting_id: str) -> tuple[Server | None, str]:
        """The server that has the meeting, None if none that is up has it, and how that is known.
        Raises Unavailable while its server is down and may come back with it."""
        known, now = self.meetings.get(meeting_id), time.monotonic()
        down_since = known.server.down_since if known else None
        if known and down_since is None and now - known.heard < FRESH:
            return known.server, "remembered"
        if known and down_since is not None and now - down_since < HOLD:
            raise Unavailable(known.server)
        with self.lock:                             # who asks for the same meeting meanwhile shares the answer
            probe = self.probes.get(meeting_id) or self.pool.submit(self.probe, meeting_id, self.usable())
            self.probes[meeting_id] = probe
        probe.add_done_callback(lambda _: self.probes.pop(meeting_id, None))
        found = probe.result()[0]
        return found, "probed" if found else "nowhere"
    def probe(self, meeting_id: str, servers: Sequence[Server]) -> tuple[Server | None, bool]:
        """The first of these servers to have the meeting, which is then remembered; and if none, whether all said so."""
        asked, denials = time.monotonic(), []
        for server, response in self.ask(servers, Request("getMeetingInfo", f"meetingID={quote_plus(meeting_id)}"), PATIENCE):
            ids = {response.xml.findtext("meetingID"), response.xml.findtext("internalMeetingID")}
            if response.success and meeting_id in ids:      # BBB also takes the beginning of an internal ID for it
                self.remember(server, meeting_id, response.xml)
                return server, True
            if response.xml is not NOTHING:
                self.forget(meeting_id, server, asked)
                denials.append(server)
        return None, len(denials) == len(servers)
    def remember(self, server: Server, meeting_id: str, told: ET.Element, heard: float | None = None) -> None:
        """Note that the server has the meeting, as it told; if that is NOTHING, that it may have it."""
        meeting = Meeting(server, number(told.findtext("createTime")), heard or time.monotonic())
        with self.lock:
            for key in (meeting_id, told.findtext("meetingID"), told.findtext("internalMeetingID")):
                self.meetings[key or meeting_id] = meeting
    def forget(self, meeting_id: str, server: Server, asked: float) -> None:
        """Note that the server, asked then, did not have the meeting. What was created since, or is just being, stays."""
        with self.lock:
            known = self.meetings.get(meeting_id)
            if known and known.server is server and known.heard < asked and meeting_id not in self.creating:
                del self.meetings[meeting_id]
    def in_turn(self) -> Iterator[Server]:
        """The servers for a new meeting: the one whose turn it is, then those to try if it cannot be reached.
        After its turn a server waits for 1 / weight of a round; nobody saves up turns; of equals the list's first is next."""
        tried: set[Server] = set()
        while True:
            with self.lock:
                able = [server for server in self.up() if not server.entry.cordoned and server not in tried]
                if not able:
                    return
                server = min(able, key=lambda server: (server.doubtful, max(server.turn, self.turn)))
                self.turn = max(server.turn, self.turn)
                server.turn = self.turn + 1 / server.entry.weight
            tried.add(server)
            yield server
    def survey(self, patience: float) -> None:
        """Ask every server which meetings it runs: that shows which are up, and where each meeting is."""
        asked = time.monotonic()
        listed: dict[str, list[str]] = collections.defaultdict(list)
        for server, response in self.ask(self.servers, Request("getMeetings"), patience):
            if not response.success:
                server.failed(f"getMeetings failed: {response.xml.findtext('messageKey')!r:.80}")
                continue
            items = {item.findtext("meetingID", ""): item for item in merge("getMeetings", [response])}
            for key in self.meetings.keys() - items.keys() - {item.findtext("internalMeetingID") for item in items.values()}:
                self.forget(key, server, asked)
            server.running = len(items)
            for meeting_id, item in items.items():
                listed[meeting_id].append(str(server))
                known = self.meetings.get(meeting_id)
                if (known is None or known.server is server or known.server.down_since is not None
                        or known.created < number(item.findtext("createTime"))):        # else a twin, and the older one
                    self.remember(server, meeting_id, item, asked)
            with server.lock:
                if server.down_since is not None and server.down_since <= asked:        # else it went down since
                    server.down_since = None
                    log.info("%s is up", server)
        twins = {meeting_id for meeting_id, servers in listed.items() if len(servers) > 1}
        for meeting_id in twins - self.twins:
            log.warning("meeting %r runs on %s: the newer one counts", meeting_id, " and ".join(listed[meeting_id]))
        self.twins = twins
    def watch(self) -> None:
        """Survey the servers, and read servers.json when it has changed, for ever."""
        while True:
            forced = self.wake.wait(SURVEY_INTERVAL)
            self.wake.clear()
            try:
                if forced or self.modification() != self.modified:
                    self.load()
                    log.info("%s was read again: %d servers", self.path, len(self.servers))
                self.survey(SURVEY_INTERVAL)
            except SettingsError as error:
                log.error("%s The servers stay as they were.", error)
            except Exception as error:              # noqa: BLE001  whatever it is, there must be a next survey
                log_bug("a survey", error)

# ---- calls -----------------------------------------------------------------------------------------------------------
def first_to_answer(servers: Iterable[Server], request: Request, why: str) -> tuple[Server, Response]:
    """Try servers one after the other, but none after one that may have carried out the call. Raises Unavailable."""
    for server in servers:
        try:
            return server, server.call(request, why)
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
    response = server.call(request, why)
    denied = response.xml.findtext("returncode") == "FAILED" or (
        request.call == "isMeetingRunning" and response.xml.findtext("running") == "false")
    if denied and cluster.probe(request.meeting_id, [server]) == (None, True):      # else it has it, and its answer is right
        other = cluster.find(request.meeting_id)[0]
        return other.call(request, "moved") if other not in (None, server) else response
    return response
def join(cluster: Cluster, request: Request) -> Response:
    """A browser is sent to the meeting's server itself, whose cookie it needs; a program may want the answer instead."""
    try:
        if request.params.get("redirect", "").lower() not in ("", "true"):      # BBB's parseBoolean, unless it is empty
            return relay(cluster, request)
        found, why = cluster.find(request.meeting_id) if request.meeting_id else (None, "any")
        server = found or next(iter(cluster.usable()), None)
        if server is None:
            raise Unavailable()
    except Unavailable:
        if request.browser:
            return RETRY_PAGE
        raise
    request.chosen = f"{server} ({why})"
    return Response(302, b"", "", [("Location", server.url_for("join", request.query))])
def place(cluster: Cluster, request: Request) -> Response:
    """Create a new meeting: a breakout room on its parent's server, any other on the server whose turn it is."""
    server = cluster.find(request.params["parentMeetingID"])[0] if request.params.get("parentMeetingID") else None
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
def create(cluster: Cluster, request: Request) -> Response:
    """To the server that has the meeting; a new one is placed. Once it has its server, creates run side by side."""
    if not request.meeting_id:
        return relay_anywhere(cluster, request)
    with cluster.lock:
        placing = cluster.creating.setdefault(request.meeting_id, threading.Lock())     # gone when nobody holds it
    with placing:
        server, why = cluster.find(request.meeting_id)
        if server and server.entry.cordoned and cluster.probe(request.meeting_id, [server]) == (None, True):
            server = None                                   # it ended there, and must not begin there again
        if server is None:
            return place(cluster, request)
    response = server.call(request, why)
    if response.success:
        cluster.remember(server, request.meeting_id, response.xml)
    return response
def ask_all(cluster: Cluster, request: Request) -> dict[Server, Response]:
    """The answers of all servers that give one, in the order of the list. Raises Unavailable if there is none."""
    brief = request.call in ("getMeetings", "getSessions")      # of the others a list that lacks a server does harm
    servers, patience = (cluster.usable(), PATIENCE) if brief else (cluster.up(), CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    answers = dict(cluster.ask(servers, request, patience))
    request.chosen = f"{len(answers)} of {len(cluster.servers)} servers"
    if not answers:
        raise Unavailable()
    return {server: answers[server] for server in cluster.servers if server in answers}
def best(answers: Iterable[Response]) -> Response:
    """The first answer that says SUCCESS, else the first in BBB's XML, else the first."""
    return max(answers, key=lambda response: (response.success, response.xml is not NOTHING))
def merge_lists(cluster: Cluster, request: Request) -> Response:
    """One list of what all servers have. A server without a usable answer is left out."""
    answers = ask_all(cluster, request).values()
    response = best(answers)
    return listing(request.call, merge(request.call, answers)) if response.success else response
def recordings(cluster: Cluster, request: Request, query: str) -> dict[Server, Response]:
    """All servers' answers to getRecordings. Raises Unavailable if one gives no list, unless every recordID of the request
    is in the lists of the others: a front end takes a recording that is missing in a SUCCESS for deleted."""
    answers, paged = ask_all(cluster, Request("getRecordings", query)), "limit" in request.params
    lists = [response for response in answers.values()      # one without <recordings> refuses to list all, unless in pages
             if response.success and not (paged and response.xml.find("recordings") is None)]
    request.chosen = f"{len(lists)} of {len(cluster.servers)} servers"
    found = {item.findtext("recordID") for response in lists for item in response.xml.iter("recording")}
    refused = len(answers) == len(cluster.servers) and not best(answers.values()).success       # by all, so for a reason
    if not refused and len(lists) < len(cluster.servers) and not (request.record_ids and request.record_ids <= found):
        raise Unavailable()
    return answers
def get_recordings(cluster: Cluster, request: Request) -> Response:
    """One list of all servers' recordings, and of that the page that is asked for, with BBB's limits for it."""
    answers = recordings(cluster, request, without(request.query, "offset", "limit")).values()
    if not best(answers).success:
        return best(answers)
    items, params = merge("getRecordings", answers), request.params
    if not re.fullmatch("[+-]?[0-9]{1,9}", params.get("limit", "")):
        return listing("getRecordings", items)
    offset, limit = max(0, number(params.get("offset"))), min(max(1, number(params["limit"])), 100)
    page = items[offset:offset + limit]
    return listing("getRecordings", page, f"<pagination><pageable><offset>{offset}</offset><limit>{limit}</limit>"
                   "<paged>true</paged><unpaged>false</unpaged></pageable>"
                   f"<totalElements>{len(items)}</totalElements><empty>{str(not page).lower()}</empty></pagination>")
def relay_recording(cluster: Cluster, request: Request) -> Response:
    """A call about recordings: to the servers that have them. SUCCESS if any of these says so; of JSON answers the first."""
    if not request.record_ids:
        return relay_anywhere(cluster, request)
    answers = recordings(cluster, request, f"recordID={quote_plus(','.join(request.record_ids))}&state=any")
    owners = [server for server, response in answers.items()
              if any(item.findtext("recordID") in request.record_ids for item in response.xml.iter("recording"))]
    if not owners:
        return relay_anywhere(cluster, request, "nowhere")
    return best([server.call(request, "owner") for server in owners])
def hook_id(callback_url: str) -> str:
    """One ID for the hooks that all servers have for this URL: BBB allows only one hook a URL (bbb-webhooks, hooks.js)."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, callback_url))
def hooks(cluster: Cluster, request: Request) -> Response:
    """A hook is made and listed on all servers that have webhooks, and shown as one."""
    answers = ask_all(cluster, request)
    response = best(answers.values())
    for element in [element for answer in answers.values() for element in answer.xml.iter()]:
        for shown in element.findall("hookID"):
            shown.text = hook_id(element.findtext("callbackURL", request.params.get("callbackURL", "")))
    if response.success and request.call == "hooks/list":
        return listing(request.call, merge(request.call, answers.values()))
    return response._replace(body=ET.tostring(response.xml)) if response.success else response
def destroy_hook(cluster: Cluster, request: Request) -> Response:
    """Remove the hook of this ID from every server, each of which knows it by another."""
    wanted = request.params.get("hookID")
    if not wanted:
        raise ApiError("missingParamHookID", "You must specify a hookID in the parameters.")
    found = [(server, hook) for server, response in ask_all(cluster, Request("hooks/list")).items()
             for hook in response.xml.iter("hook") if hook_id(hook.findtext("callbackURL", "")) == wanted]
    if not found:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    request.chosen = f"{len(found)} of {len(cluster.servers)} servers"
    return best([server.call(Request("hooks/destroy", f"hookID={quote_plus(hook.findtext('hookID', ''))}"))
                 for server, hook in found])
CALLS: dict[str, Callable[[Cluster, Request], Response]] = {        # any other: relay
    "create": create,
    "join": join,
    **dict.fromkeys(("getMeetings", "getSessions"), merge_lists),
    "getRecordings": get_recordings,
    **dict.fromkeys(("publishRecordings", "deleteRecordings", "updateRecordings", *JSON_CALLS), relay_recording),
    **dict.fromkeys(("hooks/create", "hooks/list"), hooks),
    "hooks/destroy": destroy_hook,
}
def health(cluster: Cluster) -> Response:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    able = any(not server.entry.cordoned for server in cluster.up())
    return Response(*(200, b"ok\n") if able else (503, b"no server for a new meeting\n"), "text/plain")

# ---- HTTP ------------------------------------------------------------------------------------------------------------
REQUEST_LINE = re.compile(rb"[A-Z]+ [!-\"$-~]+ HTTP/1\.[01]\r?\n")      # ASCII; a "#" is no part of a request's target
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*)?\r?\n")
FORM, XML_TYPES = "application/x-www-form-urlencoded", ("application/xml", "text/xml")
IDLE, READING, ANSWERING, OVER = range(4)       # a connection: awaits a request, receives one, is answered, is done with

class LoadBalancer(http.server.ThreadingHTTPServer):
    """The listener: a thread for each connection."""
    request_queue_size = 1024           # listen(2): at nine o'clock every class joins at once
    def __init__(self, cluster: Cluster, secrets: Sequence[str], bind: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.cluster, self.secrets, self.tls, self.stopping = cluster, secrets, tls, False
        self.connections: dict[Any, tuple[int, float]] = {}     # socket -> what it does, since when
        self.change = threading.Condition()
        everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        info: Any = socket.getaddrinfo(bind or everywhere, port, type=socket.SOCK_STREAM)[0]
        self.address_family = info[0]
        super().__init__(info[4], Handler)
    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)      # IPv4 as well
        socketserver.TCPServer.server_bind(self)        # HTTPServer's asks DNS for our own name
    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.tls:        # the handshake comes with the first read, in the connection's thread: a mute client stops nobody
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address
    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread. If there are too many, the one that has kept us waiting longest must go."""
        with self.change:
            while len(self.connections) >= MAX_CONNECTIONS and not self.stopping:
                waits = {other: since for other, (doing, since) in self.connections.items() if doing < ANSWERING}
                other = min(waits, key=lambda other: waits[other], default=None)
                if other and waits[other] + 1 < time.monotonic():
                    self.connections[other] = ANSWERING, 0.0
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(other, socket.SHUT_RDWR)     # its thread reads the end, and is done
                self.change.wait(0.1)
        self.now(request, IDLE)
        super().process_request(request, client_address)
    def shutdown_request(self, request: Any) -> None:
        self.now(request, OVER)
        super().shutdown_request(request)
    def now(self, connection: Any, doing: int) -> None:
        """Note what a connection does from now on."""
        with self.change:
            self.connections[connection] = doing, time.monotonic()
            if doing == OVER:
                del self.connections[connection]
            self.change.notify_all()
    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.info("%s went away: %s", client_address[0], error)
        else:
            log_bug("a connection", error)

class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. It stays open only after a request that cannot have left bytes on it: one without a body."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True      # head and body are two writes
    timeout = IDLE_TIMEOUT              # for the TLS handshake, and for each read and write
    server: LoadBalancer
    raw_requestline: bytes
    call, unread, started = Request("-"), 0, 0.0        # what is being answered, bytes of its body to come, time.monotonic
    def parse_request(self) -> bool:
        """Refuse what is not plain HTTP, and what two readers could read differently."""
        self.server.now(self.request, READING)
        self.call, self.started, self.command = Request("-"), time.monotonic(), ""
        if not REQUEST_LINE.fullmatch(self.raw_requestline):
            self.send_error(400)
        elif self.parse_head():
            lengths = ",".join(self.headers.get_all("Content-Length", ["0"]))
            if "Transfer-Encoding" not in self.headers and re.fullmatch("[0-9]{1,15}", lengths):
                self.unread = int(lengths)
                self.close_connection |= self.unread > 0 or self.request_version < "HTTP/1.1"
                return True
            self.send_error(411 if "Transfer-Encoding" in self.headers else 400)
        return False
    def parse_head(self) -> bool:
        """Let http.server's parser, which is made for e-mail, see only headers that are few and well-formed."""
        stream, lines = self.rfile, [b""]
        while lines[-1] not in (b"\r\n", b"\n"):
            lines.append(stream.readline(MAX_QUERY + 1))
            if not lines[-1]:
                raise ConnectionError("its request was cut short")
            if sum(map(len, lines)) > MAX_QUERY or len(lines) > 102 or not HEADER.fullmatch(lines[-1]):
                self.send_error(400 if sum(map(len, lines)) <= MAX_QUERY and len(lines) <= 102 else 431)
                return False
        self.rfile = io.BytesIO(b"".join(lines))
        parsed, self.rfile = super().parse_request(), stream
        return parsed
    def do_GET(self) -> None:
        try:
            response = self.answer()
        except ApiError as error:
            self.call.chosen = f"{self.call.chosen or self.client_address[0]} {error.key}"
            response = error.response(self.call.call)
        except OSError:
            raise                       # the client went away while we read its body
        except Exception as error:      # noqa: BLE001  whatever it is, the caller gets an answer
            log_bug(self.call.call, error)
            response = ApiError("internalError", "An error of tinyscale; its log tells more.", 500).response()
        self.respond(response)
    do_HEAD = do_POST = do_GET
    def answer(self) -> Response:
        """The answer to the request. Raises ApiError if it is refused."""
        path, _, query = re.sub("^https?://[^/?]*", "", self.requestline.split(" ")[1]).partition("?")
        if path in ("/bigbluebutton/", "/bigbluebutton/api", "/bigbluebutton/api/"):
            return VERSION
        if path == "/health":
            return health(self.server.cluster)
        match = re.fullmatch("/bigbluebutton/api/([A-Za-z]+(?:/[A-Za-z]+)*)", path)
        if not match:
            raise ApiError("notFound", "There is nothing at this address.", 404)
        self.call = Request(match[1])
        self.call = self.read_call(match[1], query)
        self.server.now(self.request, ANSWERING)
        return CALLS.get(match[1], relay)(self.server.cluster, self.call)
    def read_call(self, call: str, query: str) -> Request:
        """Verify the checksum, then read the body; only a form, which is the query, before that. Raises ApiError."""
        if call == "join" and (self.unread or self.command == "POST"):      # its checksum is in the hands of every guest
            raise ApiError("unsupportedRequest", "join is called with GET only, without a body", 405)
        content_type, body = self.headers.get("Content-Type", ""), b""
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type == FORM and not query and self.unread:
            query = self.body(MAX_QUERY).decode("latin-1")
            if not re.fullmatch("[!-\"$-~]*", query):
                raise ApiError("badRequest", "The form is not URL-encoded.", 400)
            query, params = verify(call, query, self.server.secrets, form=True)
        else:
            query, params = verify(call, query, self.server.secrets)
            if self.unread and media_type not in (FORM, *XML_TYPES, "multipart/form-data"):
                raise ApiError("unsupportedContentType", "POST request Content-Type is missing or unsupported")
            self.server.now(self.request, ANSWERING)
            body = self.body(MAX_BODY)
            if media_type == FORM and body and not re.match(rb"(\xef\xbb\xbf)?\s*<", body):
                raise ApiError("checksumError", "Parameters must be in the URL or in the body, not in both")
            if media_type != "multipart/form-data":         # XML, whatever it is labelled: BBB wants the bare type
                content_type = "application/xml"
        return Request(call, query, params, "POST" if self.command == "POST" else "GET", body, content_type,
                       browser="text/html" in self.headers.get("Accept", ""))
    def body(self, limit: int) -> bytes:
        """The whole body of the request. Raises ApiError if it is too large, ConnectionError if it is cut short."""
        if self.unread > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        body = self.rfile.read(self.unread)
        if len(body) < self.unread:
            raise ConnectionError("the body of its request was cut short")
        self.unread = 0
        return body
    def respond(self, response: Response) -> None:
        """Write the answer, and a line in the log."""
        self.server.now(self.request, READING)          # it may go if it does not take the answer
        self.close_connection |= self.server.stopping
        self.send_response_only(response.status)
        for name, value in (("Date", self.date_time_string()), ("Content-Type", response.content_type), *response.headers,
                            ("Content-Length", str(len(response.body))), ("Connection", "close" if self.close_connection else "")):
            if value:
                self.send_header(name, re.sub(r"[\x00-\x1f\x7f]+\s*", " ", value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)
        log.info("%s %r %s %d %.0f ms", self.call.call, self.call.meeting_id, self.call.chosen or self.client_address[0],
                 response.status, 1000 * (time.monotonic() - self.started))
        deadline = time.monotonic() + LINGER            # a client that still sends might not see why it was refused
        with contextlib.suppress(OSError):
            while self.unread and time.monotonic() < deadline:
                self.connection.settimeout(LINGER)
                self.unread = len(self.connection.recv(65536))
        self.call, self.unread = Request("-"), 0
        self.server.now(self.request, IDLE)
    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.started, self.close_connection, self.request_version = time.monotonic(), True, "HTTP/1.1"
        self.respond(ApiError("badRequest", http.client.responses[code], code).response())
    def log_message(self, format: str, *args: Any) -> None:
        if self.server.connections[self.request][0] != IDLE:        # else it was merely kept long enough
            log.info("%s went silent in the middle of a request", self.client_address[0])

# ---- command line ----------------------------------------------------------------------------------------------------
def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises SettingsError."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # before any thread starts; sigwait receives them
    cluster, secrets = Cluster(options.servers), load_secrets()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))    # a thousand clients, and the servers' connections
    with mistakes(f"PORT {options.port}, TINYSCALE_BIND {options.bind or 'all'}", "Choose another, or stop who has it."):
        balancer = LoadBalancer(cluster, secrets, options.bind, int(options.port), load_tls())
    cluster.survey(CONNECT_TIMEOUT + ANSWER_TIMEOUT)        # a hung server delays the start, but no meeting is overlooked
    for loop in (balancer.serve_forever, cluster.watch):
        threading.Thread(target=loop, daemon=True).start()
    log.info("tinyscale %s listens on port %d, with %d of %d servers up", __version__, balancer.server_address[1],
             len(cluster.up()), len(cluster.servers))
    while signal.sigwait(signals) == signal.SIGHUP:
        cluster.wake.set()
    for last in (signal.SIGINT, signal.SIGTERM):            # a second one ends at once, as PID 1 too
        signal.signal(last, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    balancer.stopping = True
    log.info("stopping")
    balancer.shutdown()
    balancer.server_close()
    with balancer.change:
        done = balancer.change.wait_for(lambda: all(doing == IDLE for doing, _ in balancer.connections.values()), DRAIN_TIMEOUT)
    log.info("stopped" if done else "stopped with calls in progress")
    return 0
def check(options: argparse.Namespace) -> int:
    """Try every server and print what came of it; return 1 if one is unusable."""
    cluster = Cluster(options.servers)
    cluster.survey(CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    for server in cluster.servers:
        print(f"{server!s:40} {f'up, {server.running} meetings' if server in cluster.up() else f'UNUSABLE: {server.reason}'}")
    return 0 if cluster.up() == cluster.servers else 1
def url(options: argparse.Namespace) -> int:
    call, _, query = options.call.partition("?")
    host = f"[{options.bind}]" if ":" in options.bind else options.bind or "localhost"
    scheme, query = "https" if load_tls() else "http", sign(call, query, load_secrets()[0])
    print(f"{scheme}://{host}:{options.port}/bigbluebutton/api/{call}?{query}")
    return 0
def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"serve": serve, "check": check, "url": url}
    parser = argparse.ArgumentParser("tinyscale.py", description="Makes several BigBlueButton servers look like one. See README.md.")
    parser.add_argument("command", nargs="?", default="serve", choices=commands, help="serve, try all servers, print a URL")
    parser.add_argument("call", nargs="?", default="getMeetings", help="for url, such as 'getMeetingInfo?meetingID=x'")
    for name, variable, default in (("port", "PORT", "3005"), ("bind", "TINYSCALE_BIND", ""),
                                    ("servers", "TINYSCALE_SERVERS", "servers.json")):
        parser.add_argument(f"--{name}", default=os.environ.get(variable) or default, help=f"{variable} ({default or 'all'})")
    options = parser.parse_args(argv)
    try:
        if not 0 <= number(options.port) < 65536:
            raise SettingsError(f"PORT {options.port!r} is no port. It must be a number up to 65535.")
        return commands[options.command](options)
    except SettingsError as error:
        print(f"tinyscale: {error}", file=sys.stderr, flush=True)
        return 2

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)        # the threads of the pools may wait for a hung server, and Python would wait for them
