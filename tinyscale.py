#!/usr/bin/env python3
"""tinyscale makes several BigBlueButton (BBB) servers look like one.

It verifies the checksum of each API call, finds the server that runs the meeting, signs the call again with that
server's secret and relays the answer. A meeting that exists nowhere is created on the next server of the list, in turn.
The way of a call; the file has its sections from the bottom up, and a class's methods from the top down:
    process_request()    LoadBalancer       a thread for each connection, in which socketserver calls Handler.handle()
      read_head()        Handler            refuses what is not plain HTTP
      answer()           Handler, verify    our own pages; else the checksum, only then the body (a form is the query)
        CALLS[call]      create, relay ...  which server, or all of them
          find, in_turn  Cluster            who has the meeting, who gets it
            call()       Server             signed again; urllib calls do_open(); a failure marks the server down
      respond()          Handler            a line in the log, and the answer
In memory is where each meeting was last seen and which servers are down: hints, renewed by a survey every ten seconds.
It holds your servers' secrets, so read it before you run it: first verify (who may call), Handler.read_head to respond
(what strangers may send, what is logged), Server.call, exchange and parse (what servers are sent and may answer).
"""
from __future__ import annotations  # noqa: I001
import argparse, base64, collections, contextlib, email.utils, hashlib, hmac, html, http.client, http.server, json
import logging, os, re, resource, signal, socket, socketserver, ssl, sys, threading, time, traceback, urllib.error
import urllib.request, weakref, xml.etree.ElementTree as ET
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote_plus, unquote_plus, urlsplit
__version__ = "1.1"
log = logging.getLogger("tinyscale")

# ---- limits ----------------------------------------------------------------------------------------------------------
CONNECT_TIMEOUT, PATIENCE = 3, 3    # seconds to reach a server, TLS included; to answer what several are asked at once
ANSWER_TIMEOUT, WORK_TIMEOUT = 10, 60       # seconds for an answer to other calls; to a create, or a call with a body
SURVEY_INTERVAL, MEETING_TTL = 10, 30       # seconds between surveys; for which a place is believed: two may fail
ABSENCE_TTL = 1                     # seconds for which "no server has this meeting" is believed: waiting clients poll
HOLD, RETRY_AFTER = 30, 5           # seconds for which a server that is down keeps its meetings; until browsers retry
IDLE_TIMEOUT, LINGER = 75, 2        # seconds of a client's silence (nginx's is 60); for a refused one to end sending
DRAIN_TIMEOUT = 10                  # seconds that a stop waits for calls in progress
MAX_CONNECTIONS, BACKLOG = 1000, 1024       # clients, a thread each; those that wait to be accepted when school begins
MAX_POOL, POOL_TIMEOUT = 32, 30     # connections kept to a server; seconds each waits for a call (nginx waits 75)
MAX_PROBES, MAX_ASKED = 64, 1000    # meetings searched for at once; calls put to several servers at once, a thread each
MAX_HEAD, MAX_BODY, MAX_ANSWER = 2**16, 100 * 2**20, 2**25      # bytes of a request's head or form; slides; an answer

# ---- answers ---------------------------------------------------------------------------------------------------------
NOTHING = ET.Element("nothing")         # in place of an answer that is no XML of BBB
READS = {"getMeetings", "getMeetingInfo", "isMeetingRunning", "getRecordings"}      # change nothing: may be repeated
PRINTABLE = bytes(byte if byte > 31 or byte in b"\t\r\n" else 32 for byte in range(256))
@dataclass
class Request:
    """A call, a client's or our own. What a client sent, but for `call`, is in it only once its checksum was right."""
    call: str                           # what follows /bigbluebutton/api/
    query: str = ""                     # raw, without its checksum: it goes on byte for byte
    params: dict[str, str] = field(default_factory=dict)        # the same, decoded
    body: bytes = b""                   # slides or a file, which the checksum does not cover; makes the call a POST
    content_type: str = ""
    language: str = ""                  # of the person who waits for the answer; "" for a program
    timeout: float = 0                  # seconds for the server's answer; else it depends on the call
    chosen: str = ""                    # for the log: which server, and why
    def __post_init__(self) -> None:
        self.meeting_id = self.params.get("meetingID", "")
        record_ids = unquote_plus(self.params.get("recordID", ""))      # decoded a second time, as BBB does
        self.record_ids = {text.strip() for text in record_ids.split(",")} - {""}
class Response(NamedTuple):
    """An answer, a server's or our own."""
    status: int
    body: bytes
    headers: Sequence[tuple[str, str]] = (("Content-Type", "text/xml;charset=utf-8"),)      # else some read Latin-1
    xml: ET.Element = NOTHING           # the <response> of a server's answer, if it is one
    mended: bool = False                # it counts for what it says, not for what it lacks: a name may hide something
    @property
    def success(self) -> bool:
        return self.xml.findtext("returncode") == "SUCCESS"
class ApiError(Exception):
    """A call that is refused, with BBB's messageKey and message, and an HTTP status, which in BBB is always 200."""
    def __init__(self, key: str, message: str, status: int = 200) -> None:
        super().__init__(key)
        self.key, self.message, self.status = key, message, status
    def response(self) -> Response:
        """In BBB's shape. The words are our own: there is nothing to escape."""
        return Response(self.status, f"<response><returncode>FAILED</returncode><messageKey>{self.key}</messageKey>"
                        f"<message>{self.message}</message></response>".encode())
class Unavailable(ApiError):
    """No usable answer from a server, which may have carried out the call all the same; or from any."""
    def __init__(self) -> None:
        super().__init__("serverUnavailable", "The server cannot be reached now. Please try again in a minute.")
class Unreachable(Unavailable):
    """A server that cannot have carried out the call: another one may be asked."""
RETRY_TEXTS = {     # by language: title and text of the page
    "en": ("One moment, please", "The server of this room cannot be reached right now. This page tries again itself."),
    "de": ("Einen Moment bitte", "Der Server dieses Raums ist gerade nicht erreichbar. Die Seite versucht es weiter.")}
STYLE = """:root{font:1em/1.5 sans-serif;padding:1em;color-scheme:light dark}table{border-collapse:collapse}
td,th{padding:.4em 2em .4em 0;border-top:1px solid #8886;text-align:left;max-width:30em;overflow-wrap:break-word}
.down{color:red}meter{display:block}@media(max-width:50em){tr,th{display:block}td{display:inline-block;border:0}}"""
def page(language: str, title: str, body: str, seconds: int, status: int = 200) -> Response:
    """A page of HTML that is loaded again after so many seconds, and loads nothing else."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    text = f'<!DOCTYPE html><html lang="{language}">{head}<style>{STYLE}</style><h1>{title}</h1>{body}'
    return Response(status, text.encode(), [
        ("Content-Type", "text/html;charset=utf-8"), ("Refresh", str(seconds)), ("Retry-After", str(seconds)),
        ("Cache-Control", "no-store"), ("Content-Security-Policy", f"default-src 'none'; style-src 'sha256-{digest}'")])
VERSION = Response(200, b"<response><returncode>SUCCESS</returncode><version>2.0</version>"
                        b"<apiVersion>2.0</apiVersion></response>")
LISTS = {   # call -> the list's tag, an item's, its ID's, its time's ("": none); BBB's words (and typo) if it is empty
    "getMeetings": ("meetings", "meeting", "meetingID", "createTime", (
        "<meetings/><messageKey>noMeetings</messageKey><message>no meetings were found on this server</message>")),
    "getSessions": ("sessions", "meeting", "", "", (
        "<sessions/><messageKey>noSessions</messageKey><message>no sessions were found on this serverr</message>")),
    "getRecordings": ("recordings", "recording", "recordID", "startTime", ("<recordings></recordings>"
        "<messageKey>noRecordings</messageKey><message>There are no recordings for the meeting(s).</message>")),
    "hooks/list": ("hooks", "hook", "callbackURL", "", "<hooks></hooks>")}
TAG = re.compile(r"(<!\[CDATA\[.*?\]\]>|<[^<>]*>)", re.DOTALL)
PLAIN_TAG = re.compile(r"""(?a)<(/?)([A-Za-z_][\w.-]*)((?:\s+[\w-]+=(?:"[^"&<]*"|'[^'&<]*'))*)\s*(/?)>""")
LOOSE_AND = re.compile("&(?!(?:amp|lt|gt|quot|apos|#3[2-9]|#[4-9][0-9]|#[0-9]{3,4});)")
def mend(text: str) -> str:
    """Well-formed XML of what is none. BBB makes names of elements of what people typed (userdata-NAME of a join,
    meta_NAME of a create): a tag that is no plain one is left out, with the text behind it; an end without its begin is
    left out, too; what is still open at the end of what is around it is closed there."""
    def escaped(text: str) -> str:
        return LOOSE_AND.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")
    head, *rest = TAG.split(text)
    parts: list[str] = [escaped(head)]
    opened: list[str] = []
    for tag, behind in zip(rest[::2], rest[1::2]):
        match = PLAIN_TAG.fullmatch(tag)
        if tag.startswith("<![CDATA["):
            parts += [tag, escaped(behind)]
        if not match or (match[1] and (match[2] not in opened or match[3] or match[4])):
            continue
        end, name, _, empty = match.groups()
        while end and opened[-1] != name:
            parts.append(f"</{opened.pop()}>")
        if end:
            opened.pop()
        elif not empty:
            opened.append(name)
        parts += [tag, escaped(behind)]
    return "".join([*parts, *(f"</{name}>" for name in reversed(opened))])
def parse(response: Response) -> Response:
    """The response with its xml, if it begins as BBB's: nothing before <response> could declare entities. In UTF-8,
    with spaces for what XML forbids, control characters, U+FFFE and U+FFFF: one in a name would hide a whole list."""
    body = response.body.translate(PRINTABLE).replace(b"\xef\xbf\xbe", b" ").replace(b"\xef\xbf\xbf", b" ")
    begin = re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml [^>]*>\s*)?(?=<response>)", body)
    if not begin:
        return response
    with contextlib.suppress(ET.ParseError, ValueError):
        return response._replace(body=body, xml=ET.fromstring(body, ET.XMLParser(encoding="utf-8")))
    if not re.match(rb"<response>\s*<returncode>SUCCESS</returncode>.*</response>\s*$", body[begin.end():], re.DOTALL):
        return response                                     # it may have been cut short
    with contextlib.suppress(ET.ParseError, ValueError):
        mended = mend(body[begin.end():].decode("utf-8", "replace"))
        return response._replace(body=body, xml=ET.fromstring(mended), mended=True)
    return response
def number(text: str | None) -> int:
    """A number in BBB's XML or parameters; -1 if the text is no such number."""
    return int(text) if text and re.fullmatch("[+]?[0-9]{1,18}", text) else -1
def merge(call: str, answers: Iterable[Response]) -> list[ET.Element]:
    """The items of several answers to a call of LISTS, the newest first; of those with one identity only the newest."""
    name, tag, identity, newest, _ = LISTS[call]
    items = [item for answer in answers for item in answer.xml.iterfind(f"{name}/{tag}")]
    merged: dict[Any, ET.Element] = {}
    for item in sorted(items, key=lambda item: number(item.findtext(newest)), reverse=True):
        merged.setdefault(item.findtext(identity) if identity else item, item)
    return list(merged.values())
def written(items: Iterable[ET.Element]) -> bytes:
    """The items in UTF-8: in ASCII, its default, ElementTree would write an element's name as &#228;."""
    return "".join(ET.tostring(item, "unicode") for item in items).encode()
def listing(call: str, inner: bytes, pagination: str = "") -> Response:
    """BBB's answer to a call of LISTS that has these items."""
    name, *_, empty = LISTS[call]
    inner = b"<%b>%b</%b>" % (name.encode(), inner, name.encode()) if inner else empty.encode()
    return Response(200, b"<response><returncode>SUCCESS</returncode>%b%b</response>" % (inner, pagination.encode()))

# ---- checksums -------------------------------------------------------------------------------------------------------
DIGESTS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}       # by the length in hex, as BBB tells them apart
def checksum(call: str, query: str, secret: str, digest: str) -> str:
    """The hex checksum over a call's name, its raw query without the checksum, and the secret (BBB's API docs)."""
    return hashlib.new(digest, (call + query + secret).encode()).hexdigest()
def sign(call: str, query: str, secret: str, digest: str = "sha256") -> str:
    return f"{query}{query and '&'}checksum={checksum(call, query, secret, digest)}"
def without(query: str, *names: str) -> str:
    """The raw query less the parameters of these names; the rest stays byte for byte, empty parts too."""
    return "&".join(part for part in query.split("&") if part.partition("=")[0] not in names)
def verify(call: str, query: str, secrets: Iterable[str], form: bool = False) -> tuple[str, dict[str, str]]:
    """Check the checksum in a raw query, or in a form, which may also be signed as if it were empty (BBB since 2.6.18).
    Return the query without it, and the decoded parameters. Raises ApiError if it is missing, repeated or wrong, or if
    meetingID or recordID is repeated: BBB's calls differ in which one counts, so a server might take the other one."""
    given = [part.partition("=")[2].lower() for part in query.split("&") if part.startswith("checksum=")]
    digest, unsigned = (DIGESTS.get(len(given[0]), "") if len(given) == 1 else ""), without(query, "checksum")
    right = [checksum(call, text, secret, digest) for text in ([unsigned, ""] if form else [unsigned])
             for secret in secrets if digest and secret.strip()]            # a blank secret never verifies anything
    if any(hmac.compare_digest(text.encode(), given[0].encode()) for text in right):
        raw = [part.partition("=") for part in query.split("&") if part]    # parse_qsl may split at ";" as well
        pairs = [(unquote_plus(name), unquote_plus(value)) for name, _, value in raw]
        if all(sum(name == once for name, _ in pairs) < 2 for once in ("checksum", "meetingID", "recordID")):
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
    checksum: str = "sha256"            # its digest's name
def origin(url: Any) -> str:
    """The origin in any form of a server's URL that bbb-conf prints; "" if it is no such URL."""
    match = re.fullmatch(r"(?ai)(https?://[\w.:\[\]-]+)(/bigbluebutton(/api)?)?/?", str(url))
    text = re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", match[1].lower()) if match else ""
    with contextlib.suppress(ValueError):                   # a port or an IPv6 address that is none
        return text if urlsplit(text).hostname and urlsplit(text).port != 0 else ""
    return ""
RULES: dict[str, tuple[Callable[[Any], Any], str]] = {      # key of an entry -> what tests it, what it must be
    "host": (origin, 'must look like "https://bbb1.example.org"'),
    "secret": (lambda it: isinstance(it, str) and it.strip() and it.isprintable(), "must be as in 'bbb-conf --secret'"),
    "weight": (lambda value: type(value) is int and 1 <= value <= 100, "must be a whole number from 1 to 100"),
    "cordoned": (lambda value: isinstance(value, bool), "must be true or false"),
    "checksum": (lambda value: value in DIGESTS.values(), f"must be one of {', '.join(DIGESTS.values())}")}
@contextlib.contextmanager
def mistakes(where: str, mend: str) -> Iterator[None]:
    """Turn what goes wrong with a file, or with our address, into a SettingsError."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: {getattr(error, 'strerror', None) or error}. {mend}") from None
def load_servers(path: str) -> list[Entry]:
    """Read servers.json; warn of files of secrets that are open. Raises SettingsError: nothing half valid comes out."""
    with mistakes(path, "It must be JSON like servers.json.example."), open(path, encoding="utf-8-sig") as file:
        items = json.load(file)
    for name in (path, os.environ.get("TINYSCALE_SECRET_FILE", ""), os.environ.get("TINYSCALE_KEY", "")):
        if os.path.isfile(name) and os.stat(name).st_mode & 0o006:
            log.warning("%s holds secrets, but is open to everyone. Mend it with: chmod o-rw %s", name, name)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f'{path}: must be a list of servers: [{{"host": "...", "secret": "..."}}, ...]')
    entries: dict[str, Entry] = {}
    for count, item in enumerate(items, 1):
        host = origin(item.get("host"))
        where = f"{path}: entry {count}{host and f' ({host})'}"
        for name in dict.fromkeys(["host", "secret", *item]):
            right, rule = RULES.get(name, (lambda _: False, f"is an unknown key. Known are {', '.join(RULES)}"))
            if not right(item.get(name)):
                raise SettingsError(f'{where}: {json.dumps(name)} {"" if name in item else "is missing, it "}{rule}.')
        if host in entries:
            raise SettingsError(f"{where}: an earlier entry has the same host. Take one of them out.")
        entries[host] = Entry(**{**item, "host": host, "secret": item["secret"].strip()})
    return list(entries.values())
def load_secrets() -> list[str]:
    """Our own secrets, from the environment and from the file that it names. Raises SettingsError."""
    text, path = os.environ.get("TINYSCALE_SECRET", ""), os.environ.get("TINYSCALE_SECRET_FILE", "")
    with mistakes(f"TINYSCALE_SECRET_FILE {path}", "It must hold the secrets."), open(path or os.devnull) as file:
        secrets = [*(text.split(",") if text else ()), *filter(str.strip, file)]
    if not all(text.strip() and text.strip().isprintable() for text in secrets or [""]):
        raise SettingsError(f"TINYSCALE_SECRET: {'a secret is blank' if secrets else 'there is none'}. Set it to what "
                            "the front ends shall use, for example to the output of: openssl rand -hex 32")
    return [secret.strip() for secret in secrets]
def load_tls() -> ssl.SSLContext | None:
    """The TLS of the listener, from the files that the environment names; None for plain HTTP. Raises SettingsError."""
    cert, key = os.environ.get("TINYSCALE_CERT", ""), os.environ.get("TINYSCALE_KEY")
    if not cert and not key:
        return None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2            # as for the servers
    with mistakes(f"TINYSCALE_CERT {cert}, TINYSCALE_KEY {key or 'in it'}", "They must be PEM files that fit."):
        tls.load_cert_chain(cert, key or None, lambda: "")  # a pass phrase is never asked for
    return tls

# ---- one BBB server --------------------------------------------------------------------------------------------------
class KeepAliveHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Keeps connections to a server open. A server may close one just as we write to it, and nobody knows then whether
    it saw the request: so what must not be sent twice says "Connection: close", and gets a connection of its own."""
    trust = ssl.create_default_context()                    # the system's authorities, or SSL_CERT_FILE
    trust.minimum_version = ssl.TLSVersion.TLSv1_2          # the default only since Python 3.10
    deadlines: ClassVar[dict[socket.socket, float]] = {}    # of answers that are being read, of all servers
    def __init__(self) -> None:
        super().__init__(context=self.trust)                # with it the opener calls our do_open, for http and https
        self.idle: collections.deque[tuple[float, http.client.HTTPConnection]] = collections.deque()
    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> Any:
        """Return the Response. Raises URLError if there is no connection, else OSError or HTTPException."""
        end = time.monotonic() + CONNECT_TIMEOUT + (req.timeout or 0)
        while self.idle and time.monotonic() < end and not req.has_header("Connection"):
            with contextlib.suppress(IndexError, ConnectionError, ssl.SSLEOFError):     # taken or closed meanwhile
                since, connection = self.idle.pop()
                if time.monotonic() - since < POOL_TIMEOUT:
                    return self.exchange(connection, req, end)
                connection.close()
        connection = http_class(req.host, timeout=CONNECT_TIMEOUT, **http_conn_args)
        try:
            connection.connect()
        except OSError as error:
            raise urllib.error.URLError(str(error)) from error
        return self.exchange(connection, req, end)
    def exchange(self, connection: http.client.HTTPConnection, req: urllib.request.Request, end: float) -> Response:
        """Send the request and read the whole answer; then keep the connection, or close it."""
        sock, keep = connection.sock, False
        self.deadlines[sock] = end
        try:
            sock.settimeout(req.timeout)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):   # it refused half a body
                connection.request(req.get_method(), req.selector, req.data, {**req.headers, **req.unredirected_hdrs})
            with connection.getresponse() as answer:
                body, length = bytearray(), answer.length
                while len(body) != length and not answer.isclosed():
                    body += answer.read1(2**16)
                    cut = answer.isclosed() and length not in (None, len(body))
                    if cut or len(body) > MAX_ANSWER or time.monotonic() > end:     # or it comes in drops
                        raise http.client.IncompleteRead(b"")
            keep = bool(connection.sock and answer.status > 199 and not req.has_header("Connection"))  # 1xx: more comes
        finally:
            del self.deadlines[sock]
            if keep and len(self.idle) < MAX_POOL:
                self.idle.append((time.monotonic(), connection))
            else:
                connection.close()
        return Response(answer.status, bytes(body), [
            (name, re.sub(r"[\x00-\x1f\x7f]+\s*", " ", value)) for name in ("Content-Type", "Location", "Set-Cookie")
            for value in answer.headers.get_all(name, []) if value])
def trouble(request: Request, response: Response) -> tuple[str, bool]:
    """What is wrong with the server that answers so, "" if nothing is; and then whether it is down, an outage."""
    call, status, xml = request.call, response.status, response.xml
    if xml.findtext("messageKey") == "checksumError":       # so BBB says of parameters in a body, too
        return "it refuses our checksum: compare the secret in servers.json with 'bbb-conf --secret'", not request.body
    gone = status in (502, 503, 504) or status < 200 or (300 <= status < 400 and call != "join")    # BBB is not there
    broken = gone or (call in READS and (status >= 500 or (status < 300 and xml is NOTHING)))   # maybe for one meeting
    return (f"HTTP {status} without an answer of BigBlueButton" if broken else ""), gone or (
        call == "getMeetings" and not request.query)        # a client's own odd call says nothing about the server
class Server:
    """One BBB server: how to call it, and whether it is up. Times are time.monotonic's seconds."""
    def __init__(self, entry: Entry) -> None:
        self.entry = entry                                  # replaced as a whole when servers.json changes
        self.opener = urllib.request.OpenerDirector()       # build_opener's follows redirects and uses proxies
        self.opener.addheaders = [("User-Agent", f"tinyscale/{__version__}")]
        self.opener.add_handler(KeepAliveHandler())
        self.down_since: float | None = time.monotonic()    # None: it is up, which it first has to show
        self.reason = "no answer yet"                       # why it is down
        self.answered, self.took = 0.0, 0.0                 # when it last gave a usable answer, in how many seconds
        self.placed, self.meetings, self.participants = 0, 0, 0     # new ones it was given; what the last survey found
    def __str__(self) -> str:
        return self.entry.host
    def url_for(self, call: str, query: str) -> str:
        return f"{self}/bigbluebutton/api/{call}?{sign(call, query, self.entry.secret, self.entry.checksum)}"
    def call(self, request: Request, why: str = "") -> Response:
        """Sign a call and return the answer. Raises Unavailable if there is no usable one; an outage marks it down."""
        request.chosen = f"{self} ({why})"
        call, asked = request.call, time.monotonic()
        headers = {} if call in READS and not request.body else {"Connection": "close"}
        headers.update({"Content-Type": request.content_type} if request.body else {})
        timeout = request.timeout or (WORK_TIMEOUT if request.body or call == "create" else ANSWER_TIMEOUT)
        signed = urllib.request.Request(self.url_for(call, request.query), request.body or None, headers)
        try:
            response = parse(self.opener.open(signed, timeout=timeout))
        except urllib.error.URLError as error:
            raise self.failed(call, f"no connection: {error.reason}", Unreachable()) from error
        except (OSError, http.client.HTTPException, ValueError) as error:       # only its type: its text may quote
            silent, outage = isinstance(error, socket.timeout), self.answered < asked   # else another call was answered
            reason = f"no answer in {timeout} s" if silent else f"broken answer: {type(error).__name__}"
            raise self.failed(call, reason, Unavailable(), outage) from error
        reason, outage = trouble(request, response)
        if reason:
            raise self.failed(call, reason, Unreachable() if 504 != response.status > 199 else Unavailable(), outage)
        self.answered, self.took = time.monotonic(), time.monotonic() - asked
        return response
    def failed(self, call: str, reason: str, error: Unavailable, outage: bool = True) -> Unavailable:
        """Log news; return the error to raise. An outage marks the server down, but webhooks are another program."""
        news, outage = self.down_since is None or self.reason != reason, outage and not call.startswith("hooks/")
        if outage:
            self.down_since, self.reason = self.down_since or time.monotonic(), reason
        if news:
            log.warning("%s %s: %s", self, "is down" if outage else f"failed at {call}", reason)
        return error

# ---- all servers -----------------------------------------------------------------------------------------------------
class Meeting(NamedTuple):
    """A meeting as we last heard of it."""
    id: str
    server: Server
    created: int                        # BBB's createTime: milliseconds since 1970
    participants: int
    heard: float                        # when, as time.monotonic
class Cluster:
    """All servers: which one has a meeting, and which one gets a new one."""
    def __init__(self) -> None:
        self.lock = threading.Lock()                # to change what follows; never held while a server is asked
        self.servers: list[Server] = []
        self.turn = 0                               # in in_turn's circle
        self.meetings: dict[str, Meeting] = {}      # by meetingID and by internalMeetingID: BBB accepts both
        self.creating: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self.asking, self.probing = map(futures.ThreadPoolExecutor, (MAX_ASKED, MAX_PROBES))   # a probe waits in asking
        self.probes: dict[str, tuple[futures.Future[tuple[Server | None, bool]], float]] = {}   # by meetingID, and when
        self.twins: set[str] = set()                # meetings that the last survey found on more than one server
        self.totals: dict[tuple[str, str, str], float] = collections.defaultdict(float)     # of calls, for metrics
    def use(self, entries: Sequence[Entry]) -> None:
        """Take these servers from now on. One that stays keeps its state and its meetings."""
        with self.lock:
            known = {str(server): server for server in self.servers}
            self.servers = [known.get(entry.host) or Server(entry) for entry in entries]
            for server, entry in zip(self.servers, entries):
                server.entry = entry
            self.meetings = {key: meeting for key, meeting in self.meetings.items() if meeting.server in self.servers}
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.down_since is None]
    def ask(self, servers: Iterable[Server], request: Request, seconds: float) -> Iterator[tuple[Server, Response]]:
        """Ask servers at once and yield each with its answer as it comes. Who fails or takes longer is left out."""
        calls = {self.asking.submit(server.call, request): server for server in servers}
        with contextlib.suppress(futures.TimeoutError):     # who stays silent fails a little later, and is marked down
            for future in futures.as_completed(calls, seconds):
                with contextlib.suppress(Unavailable):      # logged where it was found out
                    yield calls[future], future.result()
    def find(self, meeting_id: str, for_sure: bool = False) -> tuple[Server | None, str]:
        """The meeting's server, or None; and how we know. Raises Unavailable for HOLD after its server went down."""
        known, now = self.meetings.get(meeting_id), time.monotonic()
        if known and known.server.down_since is None and now - known.heard < MEETING_TTL:
            return known.server, "remembered"
        if known and now - (known.server.down_since or -HOLD) < HOLD:       # -HOLD: it is up, but memory is stale
            raise Unavailable()
        with self.lock:                             # who asks for the same meeting meanwhile shares the answer
            probe, began = self.probes.get(meeting_id, (None, now))
            if not probe or (probe.done() and (for_sure or probe.result()[0] or now - began > ABSENCE_TTL)):
                probe, _ = self.probes[meeting_id] = self.probing.submit(self.probe, meeting_id), now
        found, known = probe.result()[0], self.meetings.get(meeting_id)     # forgotten, if its server denied it
        if known and not found and now - (known.server.down_since or now) < HOLD:
            return known.server, "remembered"       # by a survey since; or its server is silent, which is no denial
        return found, "probed" if found else "nowhere"
    def probe(self, meeting_id: str, servers: Sequence[Server] = ()) -> tuple[Server | None, bool]:
        """The first of these servers, or of all, that has the meeting, else None; and whether each denies it."""
        asked, denials, servers = time.monotonic(), 0, servers or self.up()
        question = Request("getMeetingInfo", f"meetingID={quote_plus(meeting_id)}", timeout=PATIENCE)
        for server, response in self.ask(servers, question, CONNECT_TIMEOUT + PATIENCE):
            if response.success and meeting_id in map(response.xml.findtext, ("meetingID", "internalMeetingID")):
                self.remember(server, meeting_id, response.xml)     # else it has one whose internal ID begins like this
                return server, True
            if response.xml is not NOTHING:
                self.forget(meeting_id, server, asked)
                denials += 1
        return None, denials == len(servers)
    def denies(self, server: Server, meeting_id: str) -> bool:
        """Whether the server itself, asked now, says that it does not have the meeting. Silence is no denial."""
        return self.probe(meeting_id, [server]) == (None, True)
    def remember(self, server: Server, meeting_id: str, told: ET.Element, heard: float | None = None) -> None:
        """Note that the server has the meeting, as it told; if that is NOTHING, that it may have it."""
        meeting = Meeting(told.findtext("meetingID") or meeting_id, server, number(told.findtext("createTime")),
                          max(0, number(told.findtext("participantCount"))), heard or time.monotonic())
        ids = {meeting_id, meeting.id, told.findtext("internalMeetingID") or meeting_id}
        with self.lock:
            self.meetings.update(dict.fromkeys(ids if server in self.servers else (), meeting))     # it may be removed
    def forget(self, meeting_id: str, server: Server, asked: float) -> None:
        """Note that the server did not have the meeting at the time `asked`. One created since, or just now, stays."""
        with self.lock:
            known = self.meetings.get(meeting_id)
            if known and known.server is server and known.heard < asked and meeting_id not in self.creating:
                del self.meetings[meeting_id]
    def in_turn(self) -> Iterator[Server]:
        """The servers for a new meeting: the one whose turn it is, then those to try if it cannot be reached."""
        circle = [server for server in self.servers for _ in range(server.entry.weight)]        # in the list's order
        able = {server for server in circle if server.down_since is None and not server.entry.cordoned}
        while able:
            with self.lock:
                server, self.turn = circle[self.turn % len(circle)], self.turn + 1
            if server in able:
                able.remove(server)
                yield server
    def survey(self, seconds: float) -> None:
        """Ask every server which meetings it runs: that shows which are up, and where each meeting is."""
        asked, runs_on = time.monotonic(), collections.defaultdict(list)
        for sock in [sock for sock, end in list(KeepAliveHandler.deadlines.items()) if end + 1 < asked]:
            with contextlib.suppress(OSError):      # its answer comes in drops, which no timeout of sockets ends
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for server, response in self.ask(self.servers, Request("getMeetings"), seconds):
            if response.success:
                for meeting_id in self.learn(server, response, asked):
                    runs_on[meeting_id].append(str(server))
            else:
                server.failed("getMeetings", f"getMeetings: {response.xml.findtext('messageKey')!r:.80}", Unavailable())
        twins = {meeting_id for meeting_id, servers in runs_on.items() if len(servers) > 1}
        for meeting_id in twins - self.twins:
            log.warning("meeting %r runs on %s: the newer one counts", meeting_id, " and ".join(runs_on[meeting_id]))
        with self.lock:
            self.twins = twins
            self.probes = {key: probe for key, probe in self.probes.items() if asked - probe[1] < ABSENCE_TTL}
    def learn(self, server: Server, response: Response, asked: float) -> list[str]:
        """Note what a server that was asked at the time `asked` answered to getMeetings. Return its meetings' IDs."""
        items = {item.findtext("meetingID", ""): item for item in merge("getMeetings", [response])}
        listed = items.keys() | {it.findtext("internalMeetingID") for it in items.values()}
        for key in set() if response.mended else self.meetings.keys() - listed:
            self.forget(key, server, asked)
        for meeting_id, item in items.items():
            known = self.meetings.get(meeting_id)
            if (known is None or known.server is server or known.server.down_since is not None
                    or known.created < number(item.findtext("createTime"))):        # else a twin, and the older one
                self.remember(server, meeting_id, item, asked)
        server.meetings = len(items)
        server.participants = sum(max(0, number(item.findtext("participantCount"))) for item in items.values())
        if server.down_since is not None and server.down_since <= asked:        # else it went down since
            server.down_since = None
            log.info("%s is up", server)
        return list(items)

# ---- calls -----------------------------------------------------------------------------------------------------------
def relay_anywhere(cluster: Cluster, request: Request, why: str = "any") -> Response:
    """A call about no meeting or recording that we know: to the first server that answers, so that BBB itself does."""
    for server in cluster.up():
        with contextlib.suppress(Unavailable if request.call in READS else Unreachable):
            return server.call(request, why)
    raise Unavailable()
def relay(cluster: Cluster, request: Request) -> Response:
    """A call about a meeting: to its server. A denial is passed on only when no other server has the meeting."""
    if not request.meeting_id:
        return relay_recording(cluster, request)
    server, why = cluster.find(request.meeting_id)
    if server is None:
        return relay_anywhere(cluster, request, why)
    response = server.call(request, why)
    denied = response.status == 302 or response.xml.findtext("returncode") == "FAILED" or (     # 302: a join
        request.call == "isMeetingRunning" and response.xml.findtext("running") == "false")
    if denied and cluster.denies(server, request.meeting_id):       # else FAILED is about something else
        other = cluster.find(request.meeting_id)[0]
        return other.call(request, "moved") if other not in (None, server) else response
    return response
def join(cluster: Cluster, request: Request) -> Response:
    """A browser is sent to the meeting's server itself, whose cookie it needs; a program may want the answer."""
    if request.params.get("redirect", "").lower() not in ("", "true"):      # BBB's parseBoolean, unless it is empty
        return relay(cluster, request)
    with contextlib.suppress(Unavailable):
        owner, why = cluster.find(request.meeting_id)
        for server in [owner] if owner else cluster.up():   # nowhere: the first says so, in BBB's words
            request.chosen = f"{server} ({why})"
            return Response(302, b"", [("Location", server.url_for("join", request.query))])
    if request.language:                                    # a person waits
        return page(request.language, *RETRY_TEXTS[request.language], RETRY_AFTER, 503)
    raise Unavailable()
def place(cluster: Cluster, request: Request) -> Response:
    """Create a new meeting: a breakout room on its parent's server, else on the first in turn that can be reached."""
    server = cluster.find(request.params["parentMeetingID"])[0] if request.params.get("parentMeetingID") else None
    servers, why = ([server], "parent's") if server else (cluster.in_turn(), "in turn")
    for server in servers:
        try:
            response = server.call(request, why)
        except Unreachable:
            continue
        except Unavailable:
            cluster.remember(server, request.meeting_id, NOTHING)       # it may have it now: the next create asks there
            raise
        if response.success or response.status >= 500:      # which may have created it
            cluster.remember(server, request.meeting_id, response.xml)
            server.placed += 1
        return response
    raise Unavailable()
def create(cluster: Cluster, request: Request) -> Response:
    """To the server that has the meeting; a new one is placed. Once it has its server, creates run side by side."""
    with cluster.lock:
        placing = cluster.creating.setdefault(request.meeting_id, threading.Lock())     # gone with its last user
    with placing:
        server, why = cluster.find(request.meeting_id, for_sure=True)
        if server is None or (server.entry.cordoned and cluster.denies(server, request.meeting_id)):
            return place(cluster, request)                  # what ended on a cordoned server does not begin there again
    return server.call(request, why)
def ask_all(cluster: Cluster, request: Request) -> dict[Server, Response]:
    """The answers of all servers that give one, in the order of the list. Raises Unavailable if there is none."""
    brief = request.call in ("getMeetings", "getSessions")      # others wait: see recordings
    answers = dict(cluster.ask(cluster.up(), request, PATIENCE if brief else CONNECT_TIMEOUT + ANSWER_TIMEOUT))
    request.chosen = f"{len(answers)} of {len(cluster.servers)} servers"
    if not answers:
        raise Unavailable()
    return {server: answers[server] for server in cluster.servers if server in answers}
def best(answers: Iterable[Response]) -> Response:
    """The first answer that says SUCCESS, else the first in BBB's XML, else the first."""
    return max(answers, key=lambda response: (response.success, response.xml is not NOTHING))
def merge_lists(cluster: Cluster, request: Request) -> Response:
    """One list of what all servers have; who gives none is left out."""
    answers = ask_all(cluster, request).values()
    items = written(merge(request.call, answers))
    return listing(request.call, items) if best(answers).success else best(answers)
def recordings(cluster: Cluster, request: Request, query: str) -> dict[Server, Response]:
    """All servers' answers to getRecordings. Raises Unavailable if one gives no list, unless every recordID of the
    request is in the lists of the others: a front end takes what a SUCCESS lacks for deleted."""
    answers, every = ask_all(cluster, Request("getRecordings", query)), len(cluster.servers)
    lists = [response for response in answers.values()      # no <recordings>: allowFetchAllRecordings is false there
             if response.success and ("limit" not in request.params or response.xml.find("recordings") is not None)]
    request.chosen = f"{len(lists)} of {every} servers"
    found = {item.findtext("recordID") for response in lists for item in response.xml.iter("recording")}
    refused = len(answers) == every and not best(answers.values()).success      # by all, so for a reason
    if len(lists) < every and not refused and not (request.record_ids and request.record_ids <= found):
        raise Unavailable()
    return answers
def get_recordings(cluster: Cluster, request: Request) -> Response:
    """One list of all servers' recordings, and of that the page that is asked for, with BBB's limits for it."""
    answers = recordings(cluster, request, without(request.query, "offset", "limit")).values()
    if not best(answers).success:
        return best(answers)
    items, params = merge("getRecordings", answers), request.params
    if not re.fullmatch("[+-]?[0-9]{1,9}", params.get("limit", "")):
        return listing("getRecordings", written(items))
    offset, limit = max(0, number(params.get("offset"))), min(max(1, number(params["limit"])), 100)
    shown = items[offset:offset + limit]
    return listing("getRecordings", written(shown), f"<pagination><pageable><offset>{offset}"
                   f"</offset><limit>{limit}</limit><paged>true</paged><unpaged>false</unpaged></pageable>"
                   f"<totalElements>{len(items)}</totalElements><empty>{str(not shown).lower()}</empty></pagination>")
def relay_recording(cluster: Cluster, request: Request) -> Response:
    """A call about recordings: to each server that has some. Raises Unavailable if one of these does not answer."""
    if not request.record_ids:
        return relay_anywhere(cluster, request)
    answers = recordings(cluster, request, f"recordID={quote_plus(','.join(request.record_ids))}&state=any")
    owners = [server for server, response in answers.items()
              if any(item.findtext("recordID") in request.record_ids for item in response.xml.iter("recording"))]
    if not owners:
        return relay_anywhere(cluster, request, "nowhere")
    return best([server.call(request, "owner") for server in owners])
def destroy_hook(cluster: Cluster, request: Request) -> Response:
    """Remove a hook from all servers, each of which knows it by another ID, but by one URL (bbb-webhooks, hooks.js)."""
    hooks = [(server, hook.findtext("hookID", ""), hook.findtext("callbackURL"))
             for server, answer in ask_all(cluster, Request("hooks/list")).items() for hook in answer.xml.iter("hook")]
    urls = [url for _, hook_id, url in hooks if hook_id == request.params.get("hookID")]
    if not urls:
        raise ApiError("destroyMissingHook", "The hook informed was not found.")
    known = [(server, hook_id) for server, hook_id, url in hooks if url == urls[0]]
    request.chosen = f"{len(known)} of {len(cluster.servers)} servers"
    return best([server.call(Request("hooks/destroy", f"hookID={quote_plus(hook_id)}")) for server, hook_id in known])
CALLS: dict[str, Callable[[Cluster, Request], Response]] = {    # any other: relay. See also READS, LISTS, ask_all
    "create": create, "join": join, "getRecordings": get_recordings, "hooks/destroy": destroy_hook,
    **dict.fromkeys(("getMeetingInfo", "isMeetingRunning", "end", "insertDocument", "sendChatMessage"), relay),
    **dict.fromkeys(("getMeetings", "getSessions", "hooks/list"), merge_lists),
    **dict.fromkeys(("publishRecordings", "deleteRecordings", "updateRecordings"), relay_recording),
    **dict.fromkeys(("getRecordingTextTracks", "putRecordingTextTrack"), relay_recording),
    "hooks/create": lambda cluster, request: best(ask_all(cluster, request).values())}     # known by the first one's ID

# ---- watching --------------------------------------------------------------------------------------------------------
def metrics(cluster: Cluster) -> Response:
    """Figures for Prometheus, in its text format."""
    lines = ["# HELP tinyscale_call_seconds Calls, and the time they took.", "# TYPE tinyscale_call_seconds summary"]
    lines += [f'tinyscale_call_seconds_{name}{{call="{call}",outcome="{outcome}"}} {value:.12g}'
              for (call, outcome, name), value in sorted(cluster.totals.items())]
    for name, text, value in (
            ("up", "Whether the server answers.", lambda server: int(server.down_since is None)),
            ("meetings", "Meetings on the server.", lambda server: server.meetings),
            ("participants", "People in these meetings.", lambda server: server.participants)):
        lines += [f"# HELP tinyscale_server_{name} {text}", f"# TYPE tinyscale_server_{name} gauge"]
        lines += [f'tinyscale_server_{name}{{server="{server}"}} {value(server)}' for server in cluster.servers]
    return Response(200, "\n".join([*lines, ""]).encode(), [("Content-Type", "text/plain; version=0.0.4")])
def state(server: Server) -> str:
    """The state of a server in an admin's words, and why."""
    if (down_since := server.down_since) is not None:
        return f"down for {(time.monotonic() - down_since) / 60:.0f} min: {server.reason}"
    return "cordoned" if server.entry.cordoned else "up"
def status(cluster: Cluster) -> Response:
    """A page for an admin to leave open: how the servers are, and which meeting runs where."""
    most = [max(1, *values) for values in zip(*((server.meetings, server.participants) for server in cluster.servers))]
    servers = "".join(
        f'<tr class="{state(server).split()[0]}"><th>{server}<td>{html.escape(state(server))}' + "".join(
            f'<td>{count} {what}<meter max="{limit}" value="{count}"></meter>'
            for limit, count, what in zip(most, (server.meetings, server.participants), ("meetings", "people")))
        + f"<td>{1000 * server.took:.0f} ms<td>{server.placed} placed" for server in cluster.servers)
    meetings = sorted({meeting.id: meeting for meeting in list(cluster.meetings.values())}.values())
    rooms = "".join(f"<tr><th>{html.escape(it.id)}<td>{it.server}<td>{it.participants} people" for it in meetings)
    return page("en", f"{len(cluster.up())} of {len(cluster.servers)} servers up, {len(meetings)} meetings",
                f"<table>{servers}</table><h2>Meetings</h2><table>{rooms}</table>", SURVEY_INTERVAL)
def health(cluster: Cluster) -> Response:
    """For proxies and monitors: 200 while a new meeting could be placed, else 503."""
    able = any(not server.entry.cordoned for server in cluster.up())
    return Response(*(200, b"ok") if able else (503, b"no server for new meetings"), [("Content-Type", "text/plain")])
PAGES = {"/health": health, "/status": status, "/metrics": metrics}     # the last two want a password

# ---- HTTP ------------------------------------------------------------------------------------------------------------
HEAD = re.compile(r"(?a)(GET|HEAD|POST) (?:http://[\w.:\[\]-]*(?=/))?([!-\"$-~]+) HTTP/1[.]([01])\r\n"   # no fragment
                  r"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r\n)*)\r\n")
FORM, XML_TYPES = "application/x-www-form-urlencoded", ("application/xml", "text/xml")
IDLE, WAITING, WORKING = range(3)       # between requests; we wait for the client; it waits for us, and may stay
def log_error(where: str, error: BaseException | None) -> None:
    """Log what broke off, a connection or survey; or an error of ours, without its text, which might quote a query."""
    if isinstance(error, OSError):
        return log.info("%s broke off: %s", where, error)
    log.error("%s failed with %s. Please report this:\n%s", where, type(error).__name__,
              "".join(traceback.format_tb(error.__traceback__ if error else None)))
class LoadBalancer(http.server.ThreadingHTTPServer):
    """The settings, the listener, and a thread for each connection."""
    def __init__(self, path: str, bind: str, port: str) -> None:
        """Read the settings, and listen. Raises SettingsError."""
        self.servers_file, self.cluster, self.stopping = path, Cluster(), False
        self.handlers: set[Handler] = set()     # one for each connection
        self.wake = threading.Event()           # set: read the settings again and survey now
        self.load()
        both = not bind and socket.has_dualstack_ipv6()     # IPv4 and IPv6
        with mistakes(f"PORT {port}, TINYSCALE_BIND {bind or 'all'}", "Choose another, or stop who has it."):
            address = bind or ("::" if both else "0.0.0.0"), range(65536).index(int(port))      # ValueError for others
            info: Any = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            super().__init__(info[4], Handler, bind_and_activate=False)     # else it asks DNS for our own name
            self.socket.close()
            self.socket = socket.create_server(info[4], family=info[0], backlog=BACKLOG, dualstack_ipv6=both)
        self.server_address = self.socket.getsockname()
    def changed(self) -> list[float]:
        """When the files of the settings, their names or their modes were changed."""
        names = self.servers_file, *map(os.environ.get, ("TINYSCALE_SECRET_FILE", "TINYSCALE_CERT", "TINYSCALE_KEY"))
        return [os.path.getctime(name) for name in names if name and os.path.exists(name)]
    def load(self) -> None:
        """Read the settings: all of them count from now on, or (so in one assignment) none. Raises SettingsError."""
        self.loaded, password = self.changed(), os.environ.get("TINYSCALE_STATUS_PASSWORD", "").strip()
        entries, self.secrets, self.tls = load_servers(self.servers_file), load_secrets(), load_tls()
        self.login = b"Basic " + base64.b64encode(os.fsencode(f"admin:{password}")) if password else b""
        self.cluster.use(entries)
    def watch(self) -> None:
        """Survey the servers, and read the settings again when a file has changed, for ever."""
        while True:
            try:
                if self.wake.wait(SURVEY_INTERVAL) or self.changed() != self.loaded:
                    self.wake.clear()
                    self.load()
                    log.info("the settings were read again: %d servers", len(self.cluster.servers))
                self.cluster.survey(SURVEY_INTERVAL)
            except SettingsError as error:
                log.error("%s The settings stay as they were.", error)
            except Exception as error:              # noqa: BLE001  whatever it is, there must be a next survey
                log_error("a survey", error)
    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread. If there are too many, the one that has kept us waiting longest must go."""
        while len(self.handlers) >= MAX_CONNECTIONS and not self.stopping:
            slowest = min(list(self.handlers), key=lambda it: (it.doing == WORKING, it.since), default=None)
            if slowest and slowest.doing != WORKING and slowest.since + 1 < time.monotonic():   # each has a second
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(slowest.request, socket.SHUT_RDWR)   # not SSLSocket's, which forgets its TLS
            time.sleep(0.001)
        if self.tls:        # its handshake comes with the first read, in the connection's thread: a mute one stops none
            request = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        super().process_request(request, client_address)
    def handle_error(self, request: Any, client_address: Any) -> None:
        log_error(client_address[0], sys.exc_info()[1])
    def stop(self) -> None:
        """Take no more connections, and wait for the calls in progress."""
        self.stopping, deadline = True, time.monotonic() + DRAIN_TIMEOUT
        self.shutdown()
        self.server_close()
        while any(handler.doing != IDLE for handler in list(self.handlers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        log.info("stopped" if time.monotonic() < deadline else "stopped with calls in progress")
class Handler(socketserver.StreamRequestHandler):
    """One connection. It stays open only after a request that cannot have left bytes on it: one without a body."""
    close_connection, disable_nagle_algorithm, timeout = False, True, IDLE_TIMEOUT  # for TLS, each read, each write
    server: LoadBalancer
    def note(self, doing: int, ago: float = 0) -> None:
        self.doing, self.since = doing, time.monotonic() - ago
    def handle(self) -> None:
        """Answer requests until the client has no more of them, or no further one could be trusted."""
        self.note(IDLE)
        self.server.handlers.add(self)
        try:
            while not self.close_connection:
                self.answer_next()
                self.note(IDLE, 1)                          # it had its turn: see process_request
        finally:
            self.server.handlers.remove(self)
    def answer_next(self) -> None:
        """Wait for a request, and answer it. Raises OSError if the client goes away in the middle of it."""
        self.current, self.method, self.unread, self.close_connection, line = Request("-"), "", 0, True, b""
        with contextlib.suppress(socket.timeout):           # it was merely kept long enough
            line = self.rfile.readline(MAX_HEAD)
        self.note(WAITING)
        if line:
            self.started = self.since
            try:
                self.read_head(line)
                response = self.answer()
                failed = response.status >= 400 or response.xml.findtext("returncode") == "FAILED"
                self.respond(response, "failed" if failed else "success")
            except ApiError as error:
                self.respond(error.response(), error.key)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, the caller gets an answer
                log_error(self.current.call, error)
                self.respond(ApiError("internalError", "A mistake of tinyscale; see its log", 500).response(), "bug")
    def read_head(self, line: bytes) -> None:
        """Read the rest of a request's head. Raises ApiError for what is no plain HTTP, or could be read differently by
        others: http.server's parser, which is made for e-mail, takes a bare CR for the end of a line, for example."""
        lines = [line]
        while lines[-1] not in (b"\r\n", b""):
            lines.append(self.rfile.readline(MAX_HEAD))
            if len(lines) > 102 or sum(map(len, lines)) > MAX_HEAD:         # 100 fields
                raise ApiError("badRequest", "The head of the request is too large", 431)
        match = HEAD.fullmatch(b"".join(lines).decode("latin-1"))
        if not match:
            raise ApiError("badRequest", "This is no request of HTTP/1.1", 400)
        self.method, self.target, minor, fields = match.groups()
        headers = [(name.lower(), value.strip(" \t")) for name, value in re.findall("(.*?):(.*)\r\n", fields)]
        self.headers = collections.defaultdict(str, headers)        # of repeated ones the last
        lengths = [value for name, value in headers if name == "content-length"] or ["0"]
        if "transfer-encoding" in self.headers or len(lengths) > 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]):
            raise ApiError("badRequest", "A body must have one Content-Length, and no Transfer-Encoding", 411)
        self.unread = int(lengths[0])
        self.close_connection = self.unread > 0 or minor == "0" or "close" in self.headers["connection"].lower()
    def answer(self) -> Response:
        """The answer; ApiError if it is refused. Only join begins with j: joi?nmeetingID=x would have its checksum."""
        path, _, query = self.target.partition("?")
        if path in ("/bigbluebutton/", "/bigbluebutton/api", "/bigbluebutton/api/"):
            return VERSION
        if path == "/health" or path in PAGES and self.server.login:
            if path != "/health" and not hmac.compare_digest(self.headers["authorization"].encode(), self.server.login):
                return Response(401, b"", [("WWW-Authenticate", 'Basic realm="tinyscale", charset="UTF-8"')])
            return PAGES[path](self.server.cluster)
        match = re.fullmatch("/bigbluebutton/api/(join|(?!j)[A-Za-z]+(?:/[A-Za-z]+)*)", path)
        if not match:
            raise ApiError("notFound", "There is nothing at this address", 404)
        self.current = Request(match[1])            # for the log, should the next line refuse it
        self.current = self.read_call(match[1], query)
        self.note(WORKING)
        return CALLS.get(match[1], relay)(self.server.cluster, self.current)
    def read_call(self, call: str, query: str) -> Request:
        """Verify the checksum, then read the body; only a form, which is the query, before that. Raises ApiError."""
        if call == "join" and (self.unread or self.method == "POST"):       # every guest has a valid checksum
            raise ApiError("unsupportedRequest", "join is called with GET only, without a body", 405)
        content_type, body = self.headers["content-type"], b""
        media_type = content_type.partition(";")[0].strip().lower()
        form = media_type == FORM and not query and self.unread > 0
        if form:
            query = self.body(MAX_HEAD).decode("latin-1")
            if not re.fullmatch("[!-\"$-~]*", query):
                raise ApiError("badRequest", "The form is not URL-encoded", 400)
        query, params = verify(call, query, self.server.secrets, form)
        if self.unread:
            if media_type not in (FORM, *XML_TYPES, "multipart/form-data"):
                raise ApiError("unsupportedContentType", "POST request Content-Type is missing or unsupported")
            self.note(WORKING)                              # who knows a secret may be slow
            body = self.body(MAX_BODY)
            if media_type == FORM and not re.match(rb"(\xef\xbb\xbf)?\s*<", body):
                raise ApiError("checksumError", "Parameters must be in the URL or in the body, not in both")
            if media_type != "multipart/form-data":         # XML, whatever it is labelled: BBB wants the bare type
                content_type = "application/xml"
        wished = re.search(rf"\b({'|'.join(RETRY_TEXTS)})\b", self.headers["accept-language"].lower())
        language = (wished[0] if wished else "en") if "text/html" in self.headers["accept"] else ""
        return Request(call, query, params, body, content_type, language)
    def body(self, limit: int) -> bytes:
        """The whole body of the request. Raises ApiError if it is too large, ConnectionError if it is cut short."""
        if self.unread > limit:
            raise ApiError("requestTooLarge", f"The body is larger than {limit} bytes", 413)
        if self.unread and self.headers["expect"]:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(self.unread)
        if len(body) < self.unread:
            raise ConnectionError("the body of its request was cut short")
        self.unread = 0
        return body
    def respond(self, response: Response, outcome: str) -> None:
        """Write a line in the log, even for a client that is gone: call, meetingID, server, outcome; and the answer."""
        self.note(WAITING)                                  # for the client to take the answer
        self.close_connection |= self.server.stopping
        head = "".join(f"{name}: {value}\r\n" for name, value in (
            ("Date", email.utils.formatdate(usegmt=True)), *response.headers, ("Content-Length", len(response.body)),
            ("Connection", "close" if self.close_connection else "keep-alive")))
        head = f"HTTP/1.1 {response.status} {http.client.responses.get(response.status, '')}\r\n{head}\r\n"
        request, seconds, cluster = self.current, time.monotonic() - self.started, self.server.cluster
        with cluster.lock:
            for name, value in (("count", 1), ("sum", seconds)):
                cluster.totals[request.call if request.call in CALLS else "other", outcome, name] += value
        log.info("%.99s %.300r %s %s %d %.0f ms", request.call, request.meeting_id,
                 request.chosen or self.client_address[0], outcome, response.status, 1000 * seconds)
        self.wfile.write(head.encode("latin-1") + (b"" if self.method == "HEAD" else response.body))
        with contextlib.suppress(OSError):                  # a client that still sends might not see why it was refused
            while self.unread and time.monotonic() < self.since + LINGER:
                self.connection.settimeout(LINGER)
                self.unread = len(self.connection.recv(65536))

# ---- command line ----------------------------------------------------------------------------------------------------
def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises SettingsError."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)       # before any thread starts; sigwait receives them
    with contextlib.suppress(OSError, ValueError):          # a thousand clients, and the servers' connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    balancer = LoadBalancer(options.servers, options.bind, options.port)
    balancer.cluster.survey(CONNECT_TIMEOUT + ANSWER_TIMEOUT)       # even by a slow server: what runs there is known
    for loop in (balancer.serve_forever, balancer.watch):
        threading.Thread(target=loop, daemon=True).start()
    log.info("tinyscale %s listens on port %d, with %d of %d servers up", __version__, balancer.server_address[1],
             len(balancer.cluster.up()), len(balancer.cluster.servers))
    while signal.sigwait(signals) == signal.SIGHUP:
        balancer.wake.set()
    log.info("stopping")
    for last in (signal.SIGINT, signal.SIGTERM):            # a second one ends at once, as PID 1 too
        signal.signal(last, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals - {signal.SIGHUP})
    balancer.stop()
    return 0
def examine(server: Server) -> str:
    """A line of check: what a server says, the digests it accepts, the days for which its certificate is valid."""
    if server.down_since is not None:
        return f"{server!s:40} UNUSABLE: {server.reason}"
    accepted, days, version, host = [], "-", "?", urlsplit(str(server))
    for digest in DIGESTS.values():
        with contextlib.suppress(Unavailable):
            Server(server.entry._replace(checksum=digest)).call(Request("getMeetings"))
            accepted.append(digest)
    with contextlib.suppress(Unavailable):
        version = server.call(Request("")).xml.findtext("bbbVersion") or version
    if host.scheme == "https":
        with contextlib.suppress(OSError):
            plain = socket.create_connection((host.hostname or "", host.port or 443), CONNECT_TIMEOUT)
            with KeepAliveHandler.trust.wrap_socket(plain, server_hostname=host.hostname) as tls:
                certificate: Any = tls.getpeercert()
                days = f"{(ssl.cert_time_to_seconds(certificate['notAfter']) - time.time()) / 86400:.0f} d"
    return (f"{server!s:40} {state(server):8} {1000 * server.took:5.0f} ms, BBB {version!r:9.9} "
            f"{' '.join(accepted):27} certificate {days:>4}, {server.meetings} meetings, {server.participants} people")
def check(options: argparse.Namespace) -> int:
    """Try every server and print what came of it; return 1 if one is unusable."""
    cluster = Cluster()
    cluster.use(load_servers(options.servers))
    logging.disable()
    cluster.survey(CONNECT_TIMEOUT + ANSWER_TIMEOUT)
    print(*cluster.asking.map(examine, cluster.servers), sep="\n")
    every, bad = len(cluster.servers), len(cluster.servers) - len(cluster.up())
    print(f"Mend {bad} of {every}, or take them out of {options.servers}." if bad else "All is well.", flush=True)
    return 1 if bad else 0
def url(options: argparse.Namespace) -> int:
    """Print the signed URL of a call."""
    call, _, query = options.call.partition("?")
    host = f"[{options.bind}]" if ":" in options.bind else options.bind or "localhost"
    query = sign(call, query, load_secrets()[0])
    print(f"{'https' if load_tls() else 'http'}://{host}:{options.port}/bigbluebutton/api/{call}?{query}", flush=True)
    return 0
def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(
        "tinyscale.py", description="Makes several BigBlueButton servers look like one. In the environment also: "
        "TINYSCALE_SECRET or TINYSCALE_SECRET_FILE; to serve HTTPS TINYSCALE_CERT and TINYSCALE_KEY; to have /status "
        "and /metrics TINYSCALE_STATUS_PASSWORD. README.md tells more.")
    parser.add_argument("command", nargs="?", default="serve", choices=("serve", "check", "url"),
                        help="serve, try all servers, or print a signed URL")
    parser.add_argument("call", nargs="?", default="getMeetings", help="for url, such as 'getMeetingInfo?meetingID=x'")
    for name, default in (("PORT", "3005"), ("TINYSCALE_BIND", ""), ("TINYSCALE_SERVERS", "servers.json")):
        parser.add_argument(f"--{name.split('_')[-1].lower()}", default=os.environ.get(name) or default,
                            help=f"{name} in the environment; by default {default or 'all addresses'}")
    options = parser.parse_args(argv)
    try:
        return {"serve": serve, "check": check, "url": url}[options.command](options)
    except SettingsError as error:
        print(f"tinyscale: {error}", file=sys.stderr, flush=True)
        return 2
if __name__ == "__main__":
    os._exit(main())            # the threads of the pools may wait for a hung server, and Python would wait for them
