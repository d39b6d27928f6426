#!/usr/bin/env python3
"""Tests of tinyscale, on fake BigBlueButton servers over real sockets, and a demo.

    python3 test_tinyscale.py              run the tests
    python3 test_tinyscale.py CheckTest    run some of them
    python3 test_tinyscale.py demo         try it without BBB, on fake servers (--port 3005)
    python3 test_tinyscale.py bench        calls a second, beside a bare ThreadingHTTPServer's

First come the tests of checksums, which need nothing; then the fakes, which verify each checksum
and answer as BBB does until a test tells them to refuse, hang, hang up or talk rubbish, and what
starts tinyscale, in this process (ClusterTest) or in one of its own (ProcessCase). Then the other
tests, in the order of the program:

Part I, secrets and strangers
    ChecksumTest       checksums are verified and made as BBB does it
    HttpTest           what strangers send is read in one way, or refused
    FuzzTest           no bytes of a stranger or a server are a mistake of ours
    BodiesTest         slides, XML and forms, with their limits
    FormsTest          a form is the query of a call
    RefusalTest        a call that is refused has a line in the log that says why
    SecretsTest        no secret, password or name gets out
    CrowdTest          too many clients, slow ones and mute ones
Part II, where meetings are, where calls go
    RoutingTest        each call goes to the server that has the meeting
    PlacementTest      a new meeting goes where the load is least
    EvidenceTest       what servers say in any order, played on the directory itself
    CreateTest         a meeting is created once, whatever servers do
    RacesTest          many at the same time
    OutageTest         servers that are down, silent or broken
    ListsTest          lists of all servers are one list
    RecordingsTest     a recording that is out of reach is never said to be gone
    HooksTest          webhooks on all servers are one webhook
    ClientHabitsTest   what Moodle, Nextcloud, Greenlight and others are known to do
Part III, for the admin
    WatchingTest       the status page, metrics, health
    SettingsTest       each setting, and each mistake in one
    ServersFileTest    the files are read again when they change
    StartTest          how it begins, and reads its settings again
    StopTest           how it ends: what is in progress is answered
    SystemdTest        notifications, a socket unit, the journal
    StderrTest         a log that nobody reads stops nothing
    CheckTest          check, a doctor; and url
And then
    DocumentationTest  the README is true, and the program is short enough to be read
    DemoTest           the demo and the benchmark, which stand at the end of this file
"""

from __future__ import annotations

import argparse
import ast
import base64
import bisect
import calendar
import collections
import contextlib
import errno
import functools
import gc
import hashlib
import heapq
import html
import html.parser
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
import unittest
import uuid
import warnings
import weakref
import xml.etree.ElementTree as ET
from concurrent import futures
from unittest import mock
from urllib.parse import parse_qsl, quote_plus, unquote_plus

import tinyscale

tinyscale.log.addHandler(logging.NullHandler())  # a thread that outlives its test prints nothing
# what a shell starts with "&" ignores Ctrl-C, and so would all that we start
signal.signal(signal.SIGINT, signal.default_int_handler)
HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "tinyscale.py")
SECRET = "the-front-ends-secret"
DIGESTS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}


# ---- checksums -----------------------------------------------------------------------------------


class ChecksumTest(unittest.TestCase):
    DOCUMENTED = "name=Test+Meeting&meetingID=abc123&attendeePW=111222&moderatorPW=333444"
    DOCUMENTED_SECRET = "639259d4-9dd8-4b25-bf01-95f9567eaf4b"

    def test_the_worked_example_of_the_api_documentation_is_verified(self):
        self.assertEqual(
            tinyscale.checksum("create", self.DOCUMENTED, self.DOCUMENTED_SECRET, "sha1"),
            "1fcbb0c4fc1f039f73aa6d697d2db9ba7f803f17",
        )
        query = self.DOCUMENTED + "&checksum=1fcbb0c4fc1f039f73aa6d697d2db9ba7f803f17"
        unsigned, params = tinyscale.verify("create", query, [self.DOCUMENTED_SECRET])
        self.assertEqual((unsigned, params["name"]), (self.DOCUMENTED, "Test Meeting"))

    def test_all_digests_in_any_position_leave_the_rest_byte_for_byte(self):
        for digest in DIGESTS.values():
            for before, after in (
                ("", ""),
                ("", "a=1"),
                ("a=1", ""),
                ("a=1", "b=2"),
                ("", "&a=1"),
                ("&a=1&&", "b=+%20"),
                ("fullName=A+B%20!*()~", "x="),
                ("meetingID=%C3%BC", "c"),
            ):
                rest = "&".join(part for part in (before, after) if part)
                value = hashlib.new(digest, f"join{rest}s3".encode()).hexdigest()
                for text in (value, value.upper()):
                    query = "&".join(part for part in (before, "checksum=" + text, after) if part)
                    with self.subTest(query):
                        self.assertEqual(tinyscale.verify("join", query, ["s1", "s3"])[0], rest)

    def test_what_clients_send_before_an_empty_query(self):
        value = hashlib.sha1(b"getMeetingss").hexdigest()
        self.assertEqual(tinyscale.verify("getMeetings", f"&checksum={value}", ["s"])[0], "")
        value = hashlib.sha1(b"join&fullName=Xs").hexdigest()
        self.assertEqual(
            tinyscale.verify("join", f"&fullName=X&checksum={value}", ["s"])[0], "&fullName=X"
        )

    def test_a_checksum_that_is_missing_wrong_repeated_or_veiled_is_refused(self):
        right = hashlib.sha1(b"enda=1s").hexdigest()
        of_nothing = hashlib.sha1(b"ends").hexdigest()
        twice = hashlib.sha1(b"endmeetingID=a&meetingID=bs").hexdigest()
        encoded = hashlib.sha1(b"endmeetingID=a&meeting%49D=bs").hexdigest()
        for query in (
            "",
            "a=1",
            "a=1&checksum=",
            "a=1&checksum",
            f"checksum&checksum={of_nothing}",
            f"checksum={of_nothing}&checksum=",
            f"a=1&checksum={right[1:]}",
            f"a=2&checksum={right}",
            f"a=1&checksum={right}&checksum={right}",
            f"checksum=&a=1&checksum={right}",
            f"a=1&%63hecksum={right}",
            f"a=1&checksum={right}&%63hecksum=x",
            f"a=1&Checksum={right}",
            f"meetingID=a&meetingID=b&checksum={twice}",
            f"meetingID=a&meeting%49D=b&checksum={encoded}",
            f"a=1&checksum=%{right[:39]}",
            "a=1&checksum=" + "\xe9" * 40,
            "a=1&checksum=" + "z" * 40,
            f"a=1&xchecksum={right}",
            f"a=1&checksum={right}&" + "x=y&" * 10000,
        ):
            with self.subTest(query[:80]), self.assertRaises(tinyscale.ApiError) as caught:
                tinyscale.verify("end", query, ["s"])
            self.assertEqual(caught.exception.key, "checksumError")

    def test_a_crowd_of_parameters_costs_nothing_before_it_is_refused(self):
        """Each is decoded before the checksum can be verified, and anybody can send them."""
        most = "&".join(["a"] * (tinyscale.MAX_PARAMETERS - 1))
        tinyscale.verify("create", signed("create", most), [SECRET])
        decode = mock.Mock(wraps=unquote_plus)
        with mock.patch.object(tinyscale, "unquote_plus", decode):
            for text in (f"{most}&a", "&" * 65000):
                with self.assertRaises(tinyscale.ApiError) as caught:
                    tinyscale.verify("create", signed("create", text), [SECRET])
                self.assertEqual(caught.exception.key, "checksumError")
        self.assertEqual(decode.call_count, 0)

    def test_a_blank_secret_verifies_nothing(self):
        for secret in ("", " ", "\t"):
            with self.assertRaises(tinyscale.ApiError):
                tinyscale.verify("end", signed("end", "a=1", secret), [secret])

    def test_a_form_may_be_signed_over_its_text_or_over_nothing(self):
        for text in ("a=1", ""):
            value = hashlib.sha256(f"end{text}s".encode()).hexdigest()
            self.assertEqual(
                tinyscale.verify("end", f"a=1&checksum={value}", ["s"], is_form=True)[0], "a=1"
            )
        with self.assertRaises(tinyscale.ApiError):
            tinyscale.verify("end", f"a=1&checksum={value}", ["s"])

    def test_a_repeated_record_id_is_refused_and_of_other_parameters_the_first_counts(self):
        for name in ("recordID", "meetingID"):
            with self.assertRaises(tinyscale.ApiError):
                tinyscale.verify("end", signed("end", f"{name}=a&{name}=b", "s"), ["s"])
        _, params = tinyscale.verify(
            "join", signed("join", "fullName=A&redirect=false&redirect=true", "s"), ["s"]
        )
        self.assertEqual((params["fullName"], params["redirect"]), ("A", "false"))

    def test_verify_agrees_with_another_reading_of_bbbs_rule_on_100_000_random_queries(self):
        seed = random.randrange(10**6)
        accepted = 0
        for call, query, is_form in random_calls(random.Random(seed), 100_000):
            expected = judge(call, query, is_form)
            try:
                said = tinyscale.verify(call, query, OUR_SECRETS, is_form)
            except tinyscale.ApiError:
                said = None
            if said:
                accepted += 1
                said = said[0], said[1].get("meetingID"), said[1].get("a")
            if said != expected:
                self.fail(f"seed {seed}: {call} {query!r}, form: {is_form}: {said}, not {expected}")
        # else they agreed about nothing
        self.assertGreater(accepted, 10_000, seed)


OUR_SECRETS = ("s1", " ", "s2")


# What a random query is made of, the plain ones several times; "V" is for the checksum's value.
PIECES = (
    *["", "a=1", "b", "meetingID=a", "recordID=r", "a=+%20%2B", "meetingid=A;b"] * 7,
    "meetingID=b",
    "meeting%49D=c",
    "meetingID",
    "%72ecordID=s",
    "checksum",
    "checksum=",
    "checksum=x",
    "checksum=V",
    "%63hecksum",
    "%63hecksum=V",
    "checksu%6D=x",
    "checksum+=V",
    "Checksum=V",
    "xchecksum=V",
    "a=checksum=V",
    ";checksum=V",
)


# What the checksum stands in.
CARRIERS = (*["checksum=V"] * 12, "%63hecksum=V", "checksum%3DV", "Checksum=V", "xchecksum=V")


# Of these, what is hashed: all but checksums, or but what looks like one; or as if BBB's words were
# taken literally; or nothing.
HASHED = (
    lambda pieces: [piece for piece in pieces if "V" not in piece],
    lambda pieces: [piece for piece in pieces if "ecksu" not in piece],
    lambda pieces: [piece.replace("checksum=V", "") for piece in pieces if piece != "checksum=V"],
    lambda pieces: [],
)


# What becomes of a right checksum; most stay right.
SPOILERS = (
    *[str] * 12,
    *[str.upper] * 3,
    lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
    lambda value: value[1:],
    lambda value: value + "0",
    lambda value: value + "+",
    lambda value: f"%{ord(value[0]):x}{value[1:]}",
    lambda value: f"%{ord(value[0]):x}{value[3:]}",
    lambda value: "z" * len(value),
)


HASHES = {length: getattr(hashlib, name) for length, name in DIGESTS.items()}


def random_calls(chance, count):
    """So many calls, each with its query, and whether that came as a form.

    The checksum is mostly one that a careless reader takes for right.
    """
    for number in range(count):
        # some of everything, four times in different order
        if number % 4 == 0:
            call = chance.choice(("end", "join", "hooks/list"))
            pieces = chance.choices(PIECES, k=chance.randrange(5))
            secret = chance.choice(("s1", "s1", "s2", "s2", "s2", " ", "", "s3"))
            text = "&".join(chance.choice(HASHED)(pieces))
            value = HASHES[chance.choice((40, 64, 96, 128))]((call + text + secret).encode())
            value = value.hexdigest()
        place = chance.randint(0, len(pieces))
        pieces.insert(place, chance.choice(CARRIERS))
        query = "&".join(pieces).replace("V", chance.choice(SPOILERS)(value))
        del pieces[place]
        yield call, query, chance.random() < 0.3


def judge(call, query, is_form):
    """The query less its checksum, its meetingID and its a.

    None if BBB refuses it, or if it could be read in two ways.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in pairs]
    if names.count("checksum") != 1 or max(names.count("meetingID"), names.count("recordID")) > 1:
        return None
    # the first of several counts
    params = dict(reversed(pairs))
    value = params["checksum"]
    literal = "checksum=" + value
    if len(value) not in HASHES or literal not in query.split("&"):
        return None
    texts = []
    # BBB replaces it wherever these words stand, also in the middle of another parameter
    if query.count(literal) == 1:
        texts.append(
            query.replace("&" + literal, "").replace(literal + "&", "").replace(literal, "")
        )
    if is_form:
        texts.append("")
    for text in texts:
        # not the blank one
        for secret in ("s1", "s2"):
            right = HASHES[len(value)](f"{call}{text}{secret}".encode()).hexdigest()
            if right == value.lower():
                rest = query.split("&")
                rest.remove(literal)
                return "&".join(rest), params.get("meetingID"), params.get("a")
    return None


GOOD_ENTRY = {"host": "https://bbb1.example.org", "secret": "hush-hush"}


# ---- helpers -------------------------------------------------------------------------------------

# A throw-away key and certificate for localhost, only for these tests, valid until 2126. Made with:
# openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj
# /CN=localhost \     -addext subjectAltName=DNS:localhost,IP:127.0.0.1
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg2wlwJDq1Q5CLOUm7
RSNs8gOFB8k64hh3HeSuTSg7m+uhRANCAAQakvu2sgPfGUZTfOCBh2t6B6UPWWUP
0pixK+7o8UMl3N8wMJ5TEZzn2vizVbkmngiyN6dZmhn6wNZY7/0LWvgO
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUNYref1UUNpi0pZdnZO1QWsoj0ewwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDA3MzcyNVoYDzIxMjYxMDMx
MDczNzI1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQakvu2sgPfGUZTfOCBh2t6B6UPWWUP0pixK+7o8UMl3N8wMJ5TEZzn
2vizVbkmngiyN6dZmhn6wNZY7/0LWvgOo28wbTAdBgNVHQ4EFgQUZ22nFoR62brg
4abS83m3t+vdkpowHwYDVR0jBBgwFoAUZ22nFoR62brg4abS83m3t+vdkpowDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIhAP+SoWaOvY/tNkSkMBfDpiq5ZPZDiKjxQeQDBI/fV6uDAiBZ
Xupze+xjgpB1DJgBDQ2S4yV7IkLiKE+6pgKdDCqoCQ==
-----END CERTIFICATE-----
"""


def signed(call, query, secret=SECRET, digest="sha1"):
    """A query with its checksum, made without tinyscale's code."""
    checksum = hashlib.new(digest, (call + query + secret).encode()).hexdigest()
    return f"{query}{'&' if query else ''}checksum={checksum}"


def until(condition, seconds=5.0):
    """Poll for a condition; return its last value."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def certified(folder):
    """Write the key and the certificate.

    Return the path of the PEM file, and the TLS of a server that has them.
    """
    path = os.path.join(folder, "tls.pem")
    with open(path, "w") as file:
        file.write(KEY + CERTIFICATE)
    os.chmod(path, 0o600)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    return path, tls


def background(job, *args):
    """Run a job in a thread of its own. Return the future of its result."""
    future = futures.Future()

    def run():
        try:
            future.set_result(job(*args))
        except Exception as error:  # noqa: BLE001  the future raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


# ---- a fake BBB server ---------------------------------------------------------------------------

FIXED = (
    "<createDate>Tue Nov 14 22:13:20 UTC 2023</createDate><voiceBridge>70000</voiceBridge>"
    "<dialNumber>613-555-1234</dialNumber><hasUserJoined>false</hasUserJoined><duration>0</duration>"
    "<hasBeenForciblyEnded>false</hasBeenForciblyEnded>"
)


class FakeMeeting:
    def __init__(self, params, created):
        self.id, self.created = params["meetingID"], created
        self.internal_id = f"{hashlib.sha1(self.id.encode()).hexdigest()}-{created}"
        self.name, self.people = params.get("name", ""), 0
        self.given = params.get("attendeePW"), params.get("moderatorPW")
        self.attendee_pw, self.moderator_pw = (
            password or uuid.uuid4().hex[:8] for password in self.given
        )
        self.breakout, self.custom = params.get("isBreakout") == "true", ""

    def info(self):
        return (
            f"<meetingName>{html.escape(self.name)}</meetingName><meetingID>{html.escape(self.id)}</meetingID>"
            f"<internalMeetingID>{self.internal_id}</internalMeetingID>"
            f"<createTime>{self.created}</createTime>{FIXED}"
            f"<attendeePW>{html.escape(self.attendee_pw)}</attendeePW>"
            f"<moderatorPW>{html.escape(self.moderator_pw)}</moderatorPW>"
            f"<running>{str(self.people > 0).lower()}</running><participantCount>{self.people}</participantCount>"
            f"<moderatorCount>0</moderatorCount><attendees>{self.custom}</attendees><metadata/>"
            f"<isBreakout>{str(self.breakout).lower()}</isBreakout>"
        )


def success(inner):
    return (
        200,
        "text/xml;charset=utf-8",
        f"<response><returncode>SUCCESS</returncode>{inner}</response>",
        {},
    )


def failed(key, message="no"):
    return (
        200,
        "text/xml;charset=utf-8",
        (
            f"<response><returncode>FAILED</returncode><messageKey>{key}</messageKey>"
            f"<message>{message}</message></response>"
        ),
        {},
    )


class FakeBBB:
    """A BBB server. `calls` has what it was asked, `faults` what it shall do instead of answering,
    by call or "*".
    """

    def __init__(self, name="bbb", secret="its-own-secret", tls=None):
        self.name, self.secret, self.tls = name, secret, tls
        self.meetings, self.recordings, self.hooks = {}, {}, {}
        self.calls, self.faults, self.sockets, self.queue = [], {}, set(), []
        self.has_hooks, self.refuses_all_recordings, self.refuses_bodies = True, False, False
        self.clock = 1700000000000
        self.released, self.server = threading.Event(), None
        place = (
            socket.socket()
        )  # bound, never listening: while we are down nobody else gets our port
        weakref.finalize(self, place.close)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        self.port = place.getsockname()[1]
        self.up()

    @property
    def url(self):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def up(self):
        self.down()
        fake, self.released = self, threading.Event()

        class Listener(http.server.ThreadingHTTPServer):
            request_queue_size, daemon_threads = 1000, True

            def get_request(self):
                connection, address = super().get_request()
                if fake.tls:
                    connection = fake.tls.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                return connection, address

            def process_request(self, request, client_address):
                fake.sockets.add(request)
                super().process_request(request, client_address)

            def shutdown_request(self, request):
                fake.sockets.discard(request)
                super().shutdown_request(request)

            def handle_error(self, request, client_address):
                """A balancer that hangs up is no news."""

        class Handler(FakeHandler):
            bbb = fake

        self.server = Listener(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()

    def swallow(self):
        """Do not even take connections: the queue of those that nobody accepts is full."""
        self.down()
        self.queue = [socket.socket()]
        self.queue[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.queue[0].bind(("127.0.0.1", self.port))
        self.queue[0].listen(0)
        for _ in range(4):
            self.queue.append(socket.socket())
            self.queue[-1].setblocking(False)
            self.queue[-1].connect_ex(("127.0.0.1", self.port))

    def down(self):
        """Pull the plug: nobody listens, and what is open breaks off."""
        self.released.set()
        while self.queue:
            self.queue.pop().close()
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        for connection in list(self.sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def count(self, *names):
        return sum(call in names for call, *_ in self.calls)

    def put(self, meeting_id, people=1, created=None):
        """A meeting that did not come through tinyscale."""
        self.clock += 1
        self.meetings[meeting_id] = meeting = FakeMeeting(
            {"meetingID": meeting_id}, created or self.clock
        )
        meeting.people = people
        return meeting

    def record(self, meeting_id, start, state="published", copy_of=None):
        record_id = copy_of or f"{hashlib.sha1(meeting_id.encode()).hexdigest()}-{start}"
        self.recordings[record_id] = {
            "meetingID": meeting_id,
            "start": start,
            "state": state,
            "meta": {},
            "tracks": [],
        }
        return record_id

    def find(self, meeting_id):
        """BBB's lookup: the beginning of an internal ID, or the external ID."""
        for meeting in self.meetings.values():
            if meeting.internal_id.startswith(meeting_id) or meeting.id == meeting_id:
                return meeting
        return None

    # -- the calls

    def create(self, params):
        meeting = self.meetings.get(params["meetingID"])
        passwords = params.get("attendeePW"), params.get("moderatorPW")
        key = ""
        if params.get("isBreakout") == "true" and not self.find(params.get("parentMeetingID", "-")):
            return failed("parentMeetingDoesNotExist")
        if len(params["meetingID"]) < 2:
            return failed("validationError", "Meeting ID must be between 2 and 256 characters")
        if meeting and passwords not in ((None, None), (meeting.attendee_pw, meeting.moderator_pw)):
            return failed("idNotUnique")
        if meeting:
            key = "duplicateWarning"
        else:
            self.clock += 1
            meeting = self.meetings[params["meetingID"]] = FakeMeeting(params, self.clock)
        return success(
            f"<meetingID>{html.escape(meeting.id)}</meetingID>"
            f"<internalMeetingID>{meeting.internal_id}</internalMeetingID>"
            f"<attendeePW>{html.escape(meeting.attendee_pw)}</attendeePW>"
            f"<moderatorPW>{html.escape(meeting.moderator_pw)}</moderatorPW>"
            f"<createTime>{meeting.created}</createTime>{FIXED}"
            f"<messageKey>{key}</messageKey><message></message>"
        )

    def join(self, params):
        meeting, token = self.find(params["meetingID"]), uuid.uuid4().hex[:16]
        if not meeting:
            errors = quote_plus('[{"key":"invalidMeetingIdentifier"}]')
            return (
                302,
                "",
                "",
                {"Location": f"{params.get('errorRedirectUrl', self.url)}?errors={errors}"},
            )
        meeting.people += 1
        cookie = {"Set-Cookie": f"JSESSIONID={token}; Path=/bigbluebutton; HttpOnly"}
        if params.get("redirect", "true").lower() not in ("", "true"):
            status, content_type, body, _ = success(
                f"<messageKey>successfullyJoined</messageKey><session_token>{token}"
                f"</session_token><url>{self.url}/html5client/</url>"
            )
            return status, content_type, body, cookie
        name = quote_plus(params.get("fullName", ""))
        return (
            302,
            "",
            "",
            {"Location": f"{self.url}/html5client/?sessionToken={token}&name={name}", **cookie},
        )

    def isMeetingRunning(self, params):
        meeting = self.find(params["meetingID"])
        return success(f"<running>{str(bool(meeting and meeting.people)).lower()}</running>")

    def getMeetingInfo(self, params):
        meeting = self.find(params["meetingID"])
        return (
            success(meeting.info())
            if meeting
            else failed("notFound", "A meeting with that ID does not exist")
        )

    def end(self, params):
        meeting = self.find(params["meetingID"])
        if not meeting:
            return failed("notFound")
        if params.get("password", meeting.moderator_pw) != meeting.moderator_pw:
            return failed("invalidPassword")
        del self.meetings[meeting.id]
        return success("<messageKey>sentEndMeetingRequest</messageKey><message>wait</message>")

    def getMeetings(self, params):
        items = "".join(
            f"<meeting>{meeting.info()}</meeting>" for meeting in list(self.meetings.values())
        )
        return success(
            f"<meetings>{items}</meetings>"
            if items
            else "<meetings/><messageKey>noMeetings</messageKey>"
            "<message>no meetings were found on this server</message>"
        )

    def getSessions(self, params):
        items = "".join(
            f"<meeting><meetingID>{meeting.internal_id}</meetingID><userName>user {number}</userName></meeting>"
            for meeting in self.meetings.values()
            for number in range(meeting.people)
        )
        return success(
            f"<sessions>{items}</sessions>"
            if items
            else "<sessions/><messageKey>noSessions</messageKey>"
            "<message>no sessions were found on this serverr</message>"
        )

    def insertDocument(self, params):
        return (
            success("<message>Presentation is being uploaded</message>")
            if self.find(params["meetingID"])
            else (
                200,
                "text/xml",
                "<response><returncode>FAILED</returncode><message>not found.</message></response>",
                {},
            )
        )

    def sendChatMessage(self, params):
        return (
            success("<messageKey></messageKey>")
            if self.find(params["meetingID"])
            else failed("meetingNotFound")
        )

    def selected(self, params):
        """The recordings that a call means: by the beginning of an ID, as BBB does it."""
        ids = [text for text in unquote_plus(params.get("recordID", "")).split(",") if text.strip()]
        ids = ids or [
            hashlib.sha1(text.encode()).hexdigest()
            for text in unquote_plus(params.get("meetingID", "")).split(",")
            if text.strip()
        ]
        states = params.get("state", "published,unpublished").split(",")
        meta = {name[5:]: value for name, value in params.items() if name.startswith("meta_")}
        found = [
            key
            for key, recording in self.recordings.items()
            if (recording["state"] in states or "any" in states)
            and all(recording["meta"].get(name) == value for name, value in meta.items())
        ]
        return [key for key in found if not ids or any(key.startswith(text) for text in ids)], ids

    def getRecordings(self, params):
        found, ids = self.selected(params)
        if self.refuses_all_recordings and not ids and "limit" not in params:
            return success(
                "<messageKey>noRecordings</messageKey><message>fetching all is not allowed</message>"
            )
        if "limit" in params:
            raise AssertionError("tinyscale has to page the merged list")
        items = "".join(
            f"<recording><recordID>{key}</recordID><meetingID>{self.recordings[key]['meetingID']}</meetingID>"
            f"<state>{self.recordings[key]['state']}</state><startTime>{self.recordings[key]['start']}</startTime>"
            f"<name>from {self.name}</name></recording>"
            for key in found
        )
        return success(
            f"<recordings>{items}</recordings>"
            + (
                ""
                if items
                else "<messageKey>noRecordings</messageKey>"
                "<message>There are no recordings for the meeting(s).</message>"
            )
        )

    def changed(self, params, element, value, state=None):
        if not params.get("recordID"):
            return failed("missingParamRecordID", "You must specify a recordID.")
        ids = [key for key in params["recordID"].split(",") if key in self.recordings]
        for key in ids:
            self.recordings[key]["state"] = state or self.recordings[key]["state"]
        return (
            success(f"<{element}>{value}</{element}>")
            if ids
            else failed("notFound", "We could not find recordings")
        )

    def publishRecordings(self, params):
        return self.changed(
            params,
            "published",
            params["publish"],
            "published" if params["publish"] == "true" else "unpublished",
        )

    def deleteRecordings(self, params):
        return self.changed(params, "deleted", "true", "deleted")

    def updateRecordings(self, params):
        return self.changed(params, "updated", "true")

    def getRecordingTextTracks(self, params):
        recording = self.recordings.get(params.get("recordID", ""))
        answer = (
            {"returncode": "SUCCESS", "tracks": recording["tracks"]}
            if recording
            else {"returncode": "FAILED", "messageKey": "noCaptionsFound", "message": "none"}
        )
        return 200, "application/json;charset=utf-8", json.dumps({"response": answer}), {}

    def putRecordingTextTrack(self, params):
        recording = self.recordings.get(params.get("recordID", ""))
        if recording:
            recording["tracks"].append({"kind": params["kind"], "lang": params["lang"]})
        answer = {
            "returncode": "SUCCESS" if recording else "FAILED",
            "messageKey": "upload_text_track_success" if recording else "noRecordings",
        }
        return 200, "application/json;charset=utf-8", json.dumps({"response": answer}), {}

    def hooks_create(self, params):
        known = [key for key, hook in self.hooks.items() if hook == params.get("callbackURL")]
        if not params.get("callbackURL"):
            return failed("missingParamCallbackURL")
        key = known[0] if known else str(uuid.uuid4())
        self.hooks[key] = params["callbackURL"]
        return success(
            f"<hookID>{key}</hookID><permanentHook>false</permanentHook><rawData>false</rawData>"
            + ("<messageKey>duplicateWarning</messageKey>" if known else "")
        )

    def hooks_list(self, params):
        items = "".join(
            f"<hook><hookID>{key}</hookID><callbackURL><![CDATA[{url}]]></callbackURL></hook>"
            for key, url in self.hooks.items()
        )
        return success(f"<hooks>{items}</hooks>")

    def hooks_destroy(self, params):
        known = self.hooks.pop(params["hookID"], None)
        return success("<removed>true</removed>") if known else failed("destroyMissingHook")


CALLS_OF_BBB = (
    "create",
    "join",
    "isMeetingRunning",
    "getMeetingInfo",
    "end",
    "getMeetings",
    "getSessions",
    "insertDocument",
    "sendChatMessage",
    "getRecordings",
    "publishRecordings",
    "deleteRecordings",
    "updateRecordings",
    "getRecordingTextTracks",
    "putRecordingTextTrack",
    "hooks/create",
    "hooks/list",
    "hooks/destroy",
)


class FakeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bbb = None

    def do_GET(self):
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length", 0))
        if length and self.bbb.refuses_bodies:
            self.close_connection = True  # with bytes unread: the sender is cut off
            return self.answer(413, "text/html", "<html>413 Request Entity Too Large</html>", {})
        body = self.rfile.read(length)
        if not path.startswith("/bigbluebutton/api/"):
            token = html.escape(dict(parse_qsl(query)).get("name", ""))
            return self.answer(
                200,
                "text/html;charset=utf-8",
                f"<h1>This is {self.bbb.name}</h1><p>Hello {token}.",
                {},
            )
        call = path[len("/bigbluebutton/api/") :]
        if not call:
            return self.answer(*success("<version>2.0</version><bbbVersion>3.0.4</bbbVersion>"))
        self.bbb.calls.append(
            (call, query, self.command, body, self.headers.get("Content-Type", ""))
        )
        fault = self.bbb.faults.get(call) or self.bbb.faults.get("*")
        answer = fault(self) if fault else self.call(call, query, body)
        return self.answer(*answer) if answer else None

    do_POST = do_GET

    def call(self, call, query, body):
        """What BBB's controllers do: first the checksum over the raw query, then the content type,
        then the call.
        """
        if call.startswith("hooks/") and not self.bbb.has_hooks:
            return 502, "text/html", "<html>502 Bad Gateway</html>", {}
        given = dict(parse_qsl(query, keep_blank_values=True)).get("checksum", "")
        bare = query
        for part in (f"&checksum={given}", f"checksum={given}&", f"checksum={given}"):
            bare = bare.replace(part, "")
        digest = DIGESTS.get(len(given))
        if (
            not digest
            or hashlib.new(digest, (call + bare + self.bbb.secret).encode()).hexdigest() != given
        ):
            return failed("checksumError", "Checksums do not match")
        params = dict(parse_qsl(bare, keep_blank_values=True))
        media_type = self.headers.get("Content-Type", "").partition(";")[0]
        if body and media_type not in ("application/xml", "multipart/form-data"):
            return failed("unsupportedContentType")
        if call in (
            "create",
            "join",
            "isMeetingRunning",
            "getMeetingInfo",
            "end",
        ) and not params.get("meetingID"):
            return failed("missingParamMeetingID", "You must provide a meeting ID")
        if call not in CALLS_OF_BBB:
            return 404, "text/html", "<html>no such call</html>", {}
        return getattr(self.bbb, call.replace("/", "_"))(params)

    def answer(self, status, content_type, body, headers):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Tests look at `calls`."""


# What a fake can do instead of answering: each takes its handler, and returns an answer to send, if
# any.


def proper(handler):
    """The answer without a fault."""
    path, _, query = handler.path.partition("?")
    return handler.call(path[len("/bigbluebutton/api/") :], query, b"")


def silent(handler):
    """Take the call and never answer."""
    handler.close_connection = True
    handler.bbb.released.wait(30)


def reset(handler):
    """Break off in the middle of the answer."""
    handler.close_connection = True
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 1000\r\n\r\n<response><returnco"
    )
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def sends(data, *, then_close=True):
    """Send these bytes."""

    def fault(handler):
        handler.close_connection = then_close
        handler.wfile.write(data)

    return fault


def status(code, body="<html>an error page</html>", content_type="text/html", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: (code, content_type, body, named)


def held(gate, arrived=None):
    """Answer only when the gate is open."""

    def fault(handler):
        if arrived:
            arrived.set()
        gate.wait(10)
        return proper(handler)

    return fault


# ---- tinyscale in front of fakes -----------------------------------------------------------------


class Clock:
    """time, as tinyscale sees it: a test can move it on."""

    ahead = 0.0

    def monotonic(self):
        return time.monotonic() + self.ahead

    def __getattr__(self, name):
        return getattr(time, name)


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def xml(self):
        return ET.fromstring(self.body)

    def __getattr__(self, name):
        """The text of an element of the answer: answer.returncode."""
        return self.xml.findtext(name)


def fetch(port, path, method="GET", body=None, headers=None, trust=None):
    """The Answer to a request over a connection of its own; over HTTPS if an SSLContext is given."""
    connection = (
        http.client.HTTPSConnection("localhost", port, timeout=10, context=trust)
        if trust
        else (http.client.HTTPConnection("127.0.0.1", port, timeout=10))
    )
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        return Answer(connection.getresponse())


# tinyscale's limits where servers fail
SHORT = (
    ("CONNECT_TIMEOUT", 0.5),
    ("ANSWER_TIMEOUT", 0.6),
    ("LONG_TIMEOUT", 0.6),
    ("PROBE_TIMEOUT", 0.3),
    ("LATE", 0.05),
)
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class ClusterTest(unittest.TestCase):
    """Three fake servers and tinyscale in this process. Surveys come when the test says so."""

    servers = 3
    limits = ()  # (name, value), ...: of tinyscale's limits
    settings = ()  # (variable, value), ...: its environment, but for the secrets

    def setUp(self):
        self.directories, self.servers_had = [], []
        self.addCleanup(self.close_kept)
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        tinyscale.log.addHandler(handler)
        tinyscale.log.setLevel(logging.INFO)
        tinyscale.log.propagate = False
        self.addCleanup(tinyscale.log.removeHandler, handler)
        self.clock = Clock()
        limits = {"HEAD_TIMEOUT": 10, **dict(self.limits)}
        for patch in (
            mock.patch.multiple(tinyscale, **limits),
            mock.patch.object(tinyscale, "time", self.clock),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        self.fakes = [
            FakeBBB(f"bbb{number}", f"secret-of-{number}") for number in range(1, self.servers + 1)
        ]
        for fake in self.fakes:
            self.addCleanup(fake.down)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "servers.json")
        self.write_servers()
        self.start()
        self.addCleanup(self.check_log)

    def check_log(self):
        """Whatever a test did: no secret and no checksum is in the log."""
        log = self.log.getvalue()
        for secret in (
            SECRET,
            "another-secret",
            "checksum=",
            *(fake.secret for fake in self.fakes),
        ):
            self.assertNotIn(secret, log)
        # else an internalMeetingID
        for word in re.findall("(?<![0-9a-f])[0-9a-f]{40,}(?![0-9a-f-])", log):
            self.assertNotIn(len(word), DIGESTS)

    def clear_log(self):
        self.check_log()
        self.log.seek(0)
        self.log.truncate()

    def entries(self):
        return [
            {"host": fake.url + "/bigbluebutton/", "secret": fake.secret} for fake in self.fakes
        ]

    def write_servers(self, entries=None):
        with open(self.path, "w") as file:
            json.dump(entries or self.entries(), file)
        os.chmod(self.path, 0o600)

    def environment(self):
        return {
            "TINYSCALE_SECRET": f"{SECRET},another-secret",
            "TINYSCALE_SERVERS": self.path,
            "TINYSCALE_BIND": "127.0.0.1",
            "PORT": "0",
            **dict(self.settings),
        }

    def start(self):
        """A new tinyscale, which knows nothing yet but what a survey shows."""
        settings = tinyscale.read_settings(self.environment())
        self.directory = tinyscale.Directory(self.clock.monotonic)
        listener = tinyscale.listen(settings)
        self.balancer = tinyscale.Balancer(settings, self.directory, listener, self.connections)
        self.use(settings)
        self.port = listener.getsockname()[1]
        thread = threading.Thread(target=self.balancer.serve_forever, args=(0.002,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.balancer.server_close)
        self.addCleanup(self.balancer.shutdown)
        self.directories.append(self.directory)
        self.survey()

    connections = 100

    def use(self, settings):
        """What tinyscale.apply does, but that nobody surveys the servers."""
        self.balancer.settings = settings
        self.directory.use(settings.entries, settings.placement)
        self.servers_had += self.directory.servers

    def load(self, entries=None):
        """Have tinyscale read the settings again."""
        self.write_servers(entries)
        self.use(tinyscale.read_settings(self.environment()))

    def close_kept(self):
        """A process that ends takes its threads and connections with it; this one goes on."""
        # first who may still bring connections back
        self.balancer.threads.shutdown()
        for directory in self.directories:
            directory.threads.shutdown()
        for server in set(self.servers_had):
            server.close_kept()

    def survey(self):
        """A survey of all servers, after which the fakes have been asked nothing."""

        def survey_one(server):
            with contextlib.suppress(tinyscale.Unavailable):
                tinyscale.survey(self.directory, server)

        for future in [background(survey_one, server) for server in self.directory.servers]:
            future.result(20)
        for fake in self.fakes:
            fake.calls.clear()

    def states(self):
        return [server.state for server in self.directory.servers]

    def http(self, path, *args, **kwargs):
        return fetch(self.port, path, *args, **kwargs)

    def get(self, call, query="", secret=SECRET, digest="sha1", **kwargs):
        return self.http(
            f"/bigbluebutton/api/{call}?{signed(call, query, secret, digest)}", **kwargs
        )

    def create(self, meeting_id, extra="", **kwargs):
        return self.get(
            "create", f"name=A+room&meetingID={quote_plus(meeting_id)}{extra}", **kwargs
        )

    def create_rooms(self, count, name="room"):
        for number in range(count):
            self.assertEqual(self.create(f"{name}{number}").returncode, "SUCCESS")

    def having(self, meeting_id):
        """The fakes that have the meeting."""
        return [fake for fake in self.fakes if meeting_id in fake.meetings]

    def counts(self, *calls):
        return [fake.count(*calls) for fake in self.fakes]

    def together(self, jobs):
        """Run jobs at the same time; return what each returned."""
        barrier = threading.Barrier(len(jobs))

        def run(job):
            barrier.wait(10)
            return job()

        return [future.result(20) for future in [background(run, job) for job in jobs]]

    def talk(self, data, timeout=5.0):
        """Send raw bytes; return all that comes back, and b"..." if the connection stays open then."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(data)
            received = b""
            try:
                while True:
                    piece = connection.recv(65536)
                    if not piece:
                        return received
                    received += piece
            except socket.timeout:
                return received + b"..."
            except ConnectionError:
                return received


# ---- HTTP ----------------------------------------------------------------------------------------


class HttpTest(ClusterTest):
    servers = 1
    PATH = "/bigbluebutton/api/getMeetings?" + signed("getMeetings", "")

    def test_a_hostile_request_is_refused_and_nothing_that_follows_it_is_taken_for_a_call(self):
        path, smuggled = self.PATH.encode(), b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n"
        get = b"GET " + path + b" HTTP/1.1\r\n"
        post = b"POST " + path + b" HTTP/1.1\r\nContent-Type: text/xml\r\n"
        table = [  # a request, the status of its answer
            (post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            (post + b"Transfer-Encoding: chunked\r\n\r\n5\r\n<xml>\r\n0\r\n\r\n", 411),
            (post + b"Transfer-Encoding: identity\r\n\r\n", 411),
            (post + b"transfer-encoding:\tchunked\r\nContent-Length: 0\r\n\r\n", 411),
            (post + b"Content-Length: -1\r\n\r\n", 411),
            (post + b"Content-Length: +5\r\n\r\n<xml>", 411),
            (post + b"Content-Length: 1_0\r\n\r\n<xml></xml", 411),
            (post + b"Content-Length: 5, 5\r\n\r\n<xml>", 411),
            (post + b"Content-Length: 0x5\r\n\r\n<xml>", 411),
            (post + b"Content-Length: \xb2\r\n\r\n<x", 411),
            (post + b"Content-Length:\r\n\r\n", 411),
            (post + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 411),
            (post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n<xml>", 400),
            (post + b"Content-Length: 5\r\ncontent-LENGTH: 5\r\n\r\n<xml>", 400),
            (post + b"Content-Length: 0\r\nX: y\r\nContent-Length: 0\r\n\r\n", 400),
            (post + b"Content-Length: 5\r\n 6\r\n\r\n<xml>", 400),
            (get + b"Host: a\r\nHost: b\r\n\r\n", 400),
            (get + b"Host: a\r\nX: y\r\nhOST:a\r\n\r\n", 400),
            (get + b"Host:\r\nHost:\r\n\r\n", 400),
            (get + b"X: a\r\r\nContent-Length: 44\r\n\r\n", 400),
            (get + b"X: a\rTransfer-Encoding: chunked\r\n\r\n", 400),
            (get + b"X: \0\r\n\r\n", 400),
            (get + b"X: a\nContent-Length: 44\r\n\r\n", 400),
            (get + b"\n\r\n", 400),
            (b"GET " + path + b" HTTP/1.1\n\n", 400),
            (b"GET " + path + b" HTTP/1.1\nHost: x\r\n\r\n", 400),
            (get + (b"A: " + b"b" * 8000 + b"\r\n") * 9 + b"\r\n", 431),
            (get + b"A: " + b"b" * 70000 + b"\r\n\r\n", 431),
            (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 431),
            (post + b"no colon\r\nContent-Length: 5\r\n\r\n<xml>", 400),
            (post + b"Content-Length : 5\r\n\r\n<xml>", 400),
            (post + b": no name\r\n\r\n", 400),
            (get + b" continued: 5\r\n\r\n", 400),
            (b"GET  " + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET\t" + path + b" HTTP/1.1\r\n\r\n", 400),
            (b" GET " + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET " + path + b"\r\n\r\n", 400),
            (b"GET\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"\x00\r\n\r\n", 400),
            (b"get " + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET " + path + b" HTTP/2.0\r\n\r\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
            (b"GET " + path + b" HTTP/1.1 x\r\n\r\n", 400),
            (b"GET " + path + b" ICY/1.1\r\n\r\n", 400),
            (b"GET " + path + b" HTTP/1.11111111\r\n\r\n", 400),
            (b"GET user@host" + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET http://user@host" + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET ftp://host" + path + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET * HTTP/1.1\r\n\r\n", 400),
            (b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 400),
        ]
        for bad in (
            b"\x00",
            b"\r",
            b"\n",
            b"x\rX: y",
            b"\x0b",
            b"\x1f",
            b"\x7f",
            b"\x85",
            b"\xa0",
            b"\xff",
            b"\xc3\xa4",
            b"x y",
            b"#b",
        ):
            table += [
                (b"GET /bigbluebutton/api/%sgetMeetings HTTP/1.1\r\n\r\n" % bad, 400),
                (b"GET /bigbluebutton/api/getMeetings?a=%s HTTP/1.1\r\n\r\n" % bad, 400),
            ]
        for data, expected in table:
            with self.subTest(data[:120]):
                self.clear_log()
                answer = self.talk(data + smuggled)
                self.assertEqual(
                    re.findall(rb"HTTP/1\.1 (\d{3}) ", answer), [b"%d" % expected], answer
                )
                self.assertFalse(answer.endswith(b"..."))
                head, _, body = answer.partition(b"\r\n\r\n")
                self.assertIn(b"Content-Type: text/xml;charset=utf-8", head)
                self.assertIn(b"Connection: close", head)
                self.assertEqual(ET.fromstring(body).findtext("returncode"), "FAILED")
                self.assertTrue(
                    until(lambda: self.log.getvalue().count("\n") == 1), self.log.getvalue()
                )
        self.assertEqual(self.fakes[0].calls, [])

    def test_a_body_over_the_limit_is_too_large_however_large_it_is(self):
        for length in (tinyscale.MAX_BODY + 1, tinyscale.MAX_BODIES + 1, 999999999999):
            head = f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\n"
            answer = self.talk(f"{head}Content-Length: {length}\r\n\r\n".encode())
            self.assertTrue(answer.startswith(b"HTTP/1.1 413 "), answer)

    def test_a_line_that_ends_without_cr_is_refused_at_once(self):
        """Not only when the head is whole: who ends lines so never sends the end of it."""
        for data in (
            b"GET / HTTP/1.1\n",
            b"\n",
            b"GET / HTTP/1.1\r\nHost: x\n",
            b"GET / HTTP/1.1\n\n",
        ):
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(data)
                self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 400 "), data)

    def test_a_body_that_comes_with_its_head_is_no_part_of_the_head(self):
        line = f"POST /bigbluebutton/api/create?{signed('create', 'meetingID=room')} HTTP/1.1\r\n"
        for body in (
            b"<modules>\n<module/>\n</modules>",
            b"<modules>\r\n\r\n</modules>\n",
            b"<modules>" + b"x" * tinyscale.MAX_HEAD + b"</modules>",
        ):
            head = f"{line}Content-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            for half in (0, 20, len(head) - 2):
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    if half:
                        connection.sendall(head[:half])
                        self.assertTrue(until(lambda: self.balancer.handlers))
                    connection.sendall(head[half:] + body)
                    answer = connection.recv(65536)
                self.assertIn(b"<returncode>SUCCESS", answer)
                self.assertEqual(self.fakes[0].calls[-1][3], body)

    def test_a_connection_is_for_one_request_and_what_follows_is_never_answered(self):
        get = f"GET {self.PATH} HTTP/1.1\r\n"
        post = f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\n"
        for first in (
            f"{get}\r\n",
            f"{get}Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n\r\n",
            f"{get}Content-Length: 0\r\n\r\n",
            f"{get}Connection: close\r\n\r\n",
            f"GET {self.PATH} HTTP/1.0\r\n\r\n",
            f"GET {self.PATH} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            f"{post}Content-Length: 4\r\n\r\n<x/>",
        ):
            with self.subTest(first):
                self.fakes[0].calls.clear()
                received = self.talk(f"{first}{get}\r\n{get}\r\n".encode())
                self.assertFalse(received.endswith(b"..."))
                self.assertEqual(received.count(b"HTTP/1.1 "), 1, received)
                self.assertTrue(received.startswith(b"HTTP/1.1 200 "), received)
                self.assertEqual(re.findall(rb"(?i)connection: *([^\r]*)", received), [b"close"])
                self.assertEqual(len(self.fakes[0].calls), 1)
        for path in ("/health", "/bigbluebutton/api", "/nothing"):
            received = self.talk(f"GET {path} HTTP/1.1\r\n\r\n{get}\r\n".encode())
            self.assertEqual(re.findall(rb"(?i)connection: *([^\r]*)", received), [b"close"])
            self.assertEqual(received.count(b"HTTP/1.1 "), 1, received)
        # also if it comes only when the answer is there
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"{get}\r\n".encode())
            self.assertTrue(connection.recv(65536).startswith(b"HTTP/1.1 200 "))
            with contextlib.suppress(ConnectionError):
                connection.sendall(f"{get}\r\n".encode())
                self.assertEqual(connection.recv(65536), b"")

    def test_https_on_the_plain_port_is_closed_at_once_with_one_clear_line(self):
        line = re.compile("127[.]0[.]0[.]1 broke off: .*HTTPS.* plain HTTP\n")
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self.clear_log()
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(connection)
        self.assertTrue(until(lambda: line.fullmatch(self.log.getvalue())), self.log.getvalue())
        # its first bytes are enough
        for data in (b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"):
            self.clear_log()
            self.assertEqual(self.talk(data), b"")
            self.assertTrue(until(lambda: line.fullmatch(self.log.getvalue())), self.log.getvalue())

    def test_a_call_knows_get_and_post_only(self):
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PAINT"):
            for body in (None, b"<x/>"):
                answer = self.http(self.PATH, method, body)
                self.assertEqual(answer.status, 405, method)
                if method != "HEAD":
                    self.assertEqual(answer.messageKey, "unsupportedRequest")
        query = signed("create", "meetingID=room")
        self.assertEqual(self.http(f"/bigbluebutton/api/create?{query}", "HEAD").status, 405)
        query = signed("join", "meetingID=room&fullName=X")
        for method in ("POST", "PUT", "OPTIONS"):
            self.assertEqual(self.http(f"/bigbluebutton/api/join?{query}", method).status, 405)
        for path in ("/health", "/bigbluebutton/api"):
            for method in ("PUT", "OPTIONS", "DELETE"):
                self.assertEqual(self.http(path, method).status, 405)
        self.assertEqual(self.http("/health", "POST").status, 405)
        self.assertEqual(self.http("/bigbluebutton/api", "POST").status, 200)
        self.assertEqual(self.fakes[0].calls, [])

    def test_head_of_join_and_of_our_own_pages_is_answered_like_get_without_the_body(self):
        self.create("room")
        join = "/bigbluebutton/api/join?" + signed("join", "meetingID=room&fullName=X")
        broken = "/bigbluebutton/api/join?" + signed("join", "meetingID=room", "wrong secret")
        for path in ("/health", "/bigbluebutton/api", "/bigbluebutton/", "/none", join, broken):
            get, head = self.http(path), self.http(path, "HEAD")
            for answer in (get, head):
                del answer.headers["Date"]
            self.assertEqual((head.status, head.headers.items()), (get.status, get.headers.items()))
            self.assertEqual(head.headers["Content-Length"], str(len(get.body)))
            # not by http.client, which would not look for one
            received = self.talk(f"HEAD {path} HTTP/1.1\r\n\r\n".encode())
            self.assertTrue(received.endswith(b"Connection: close\r\n\r\n"), received)
        self.assertEqual(self.http(join, "HEAD").status, 302)

    def test_paths_that_are_none_of_ours_are_not_found(self):
        beneath = (
            "../api/getMeetings",
            "%2e%2e/x",
            "create//",
            "//create",
            "hooks//create",
            "get%4Deetings",
            "a;b",
            "a_b",
            "joi",
            "joinm",
            "hooks/cre:te",
        )
        for path in (
            "/",
            "/health/",
            "/status",
            "/metrics",
            "/BigBlueButton/api/",
            "//bigbluebutton/api/",
            "/bigbluebutton",
            "/bigbluebutton/x",
            "/bigbluebutton/api//",
            "http://127.0.0.1/",
            *(f"/bigbluebutton/api/{path}" for path in beneath),
        ):
            received = self.talk(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            self.assertTrue(received.startswith(b"HTTP/1.1 404 "), path)
            self.assertIn(b"<messageKey>notFound", received)

    def test_a_slash_too_many_before_or_after_a_call_is_forgiven(self):
        query = self.PATH.partition("?")[2]
        for call in ("/getMeetings", "getMeetings/", "/getMeetings/"):
            answer = self.http(f"/bigbluebutton/api/{call}?{query}")
            self.assertEqual(answer.returncode, "SUCCESS", call)

    def test_the_absolute_form_of_a_target_is_taken(self):
        for origin in ("http://any.example.org", "https://x:1", "http://[::1]:3005"):
            received = self.talk(f"GET {origin}{self.PATH} HTTP/1.1\r\n\r\n".encode())
            self.assertIn(b"SUCCESS", received, origin)
            received = self.talk(f"GET {origin}/health HTTP/1.1\r\n\r\n".encode())
            self.assertTrue(received.startswith(b"HTTP/1.1 200 "), origin)

    def test_no_head_takes_long_to_refuse(self):
        for head in (
            b"GET http://" + b"a" * 65000 + b" HTTP/2.0\r\n\r\n",
            b"GET http://" + b"a." * 32000 + b"\r\n\r\n",
            b"GET /" + b"http://" * 9000 + b" HTTP/1.2\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a:" * 32000 + b"\0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 16000 + b"\0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"host" * 16000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: " + b"\thost:" * 10000 + b"\r\nHost:x\r\n\r\n",
        ):
            started = time.thread_time()
            with self.assertRaises(tinyscale.ApiError):
                tinyscale.parse_head(head)
            # of the processor: it was 29 s once, with all others waiting
            self.assertLess(time.thread_time() - started, 1)
            self.assertIn(b" 400 ", self.talk(head))

    def test_a_stranger_cannot_fill_the_log(self):
        self.clear_log()
        self.http("/bigbluebutton/api/" + "A" * 60000)
        self.assertTrue(until(lambda: "checksumError" in self.log.getvalue()))
        self.http("/" + "A" * 60000)
        self.assertTrue(until(lambda: "notFound" in self.log.getvalue()))
        self.assertLess(len(self.log.getvalue()), 1000)

    def test_a_request_may_come_byte_by_byte(self):
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            for byte in f"GET {self.PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
                connection.sendall(byte.encode())
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n"))

    def read_in_pieces(self, pieces):
        """The head that a handler reads if these pieces come."""
        handler = tinyscale.Handler(self.balancer, None, "")
        handler.receive = iter(pieces).__next__
        return handler.read_head()

    def test_a_head_is_the_same_wherever_it_is_cut_into_pieces(self):
        head = f"GET {self.PATH} HTTP/1.1\r\nHost: x\r\nX: y\r\n\r\n".encode()
        for cut in range(1, len(head)):
            self.assertEqual(self.read_in_pieces([head[:cut], head[cut:] + b"body\n"]), head)
        self.assertEqual(self.read_in_pieces([bytes([byte]) for byte in head]), head)

    def test_a_bare_lf_is_refused_wherever_the_head_is_cut_into_pieces(self):
        for head in (b"GET / HTTP/1.1\nHost: x\r\n\r\n", b"\nGET / HTTP/1.1\r\n\r\n"):
            for cut in range(1, len(head)):
                with self.assertRaises(tinyscale.ApiError):
                    tinyscale.parse_head(self.read_in_pieces([head[:cut], head[cut:]]))

    def test_a_call_whose_caller_has_gone_is_in_the_log_all_the_same(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["end"] = held(gate, arrived)
        self.fakes[0].put("room")
        self.survey()
        query = signed("end", "meetingID=room")
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"GET /bigbluebutton/api/end?{query} HTTP/1.1\r\n\r\n".encode())
            arrived.wait(5)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gate.set()
        self.assertTrue(until(lambda: "127.0.0.1 broke off" in self.log.getvalue()))
        self.assertIn(
            f"end 'room' {self.fakes[0].url} (remembered) success 200 ", self.log.getvalue()
        )

    def test_a_body_that_is_cut_short_reaches_no_server(self):
        query = signed("create", "meetingID=room")
        head = "Content-Type: text/xml\r\nContent-Length: 100\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(
                f"POST /bigbluebutton/api/create?{query} HTTP/1.1\r\n{head}<half".encode()
            )
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(connection.recv(100), b"")
        self.assertTrue(until(lambda: "127.0.0.1 broke off: it hung up" in self.log.getvalue()))
        self.assertEqual(self.fakes[0].calls, [])
        self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_clients_that_break_off_leave_one_line_and_no_traceback(self):
        head = "Content-Type: text/xml\r\nContent-Length: 100\r\n\r\n"
        post = f"POST {self.PATH} HTTP/1.1\r\n{head}half"
        for data in (
            post,
            f"GET {self.PATH} HTTP/1.1\r\nX: ",
            f"GET {self.PATH} HTTP/1.1\r\nX: y\r\n",
        ):
            for is_reset in (True, False):
                self.clear_log()
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    connection.sendall(data.encode())
                    if is_reset:
                        linger = struct.pack("ii", 1, 0)
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.assertTrue(
                    until(lambda: self.log.getvalue().count("\n") == 1), self.log.getvalue()
                )
                self.assertIn("127.0.0.1 broke off", self.log.getvalue())
        self.assertTrue(until(lambda: not self.balancer.handlers))
        # who says nothing has not even begun: a proxy that looks whether we are there
        self.clear_log()
        socket.create_connection(("127.0.0.1", self.port), 5).close()
        self.http("/nothing")
        self.assertTrue(until(lambda: "notFound" in self.log.getvalue()))
        self.assertEqual(self.log.getvalue().count("\n"), 1, self.log.getvalue())

    def test_a_mistake_of_ours_is_answered_and_logged_without_its_text(self):
        route = tinyscale.Route(mock.Mock(side_effect=KeyError("a query")))
        with mock.patch.dict(tinyscale.ROUTES, getMeetings=route):
            answer = self.http(self.PATH)
        self.assertEqual((answer.status, answer.messageKey), (500, "internalError"))
        self.assertTrue(until(lambda: " bug 500 " in self.log.getvalue()))
        self.assertIn("getMeetings failed with KeyError. Please report", self.log.getvalue())
        self.assertNotIn("a query", self.log.getvalue())

    def test_header_lines_of_a_server_cannot_smuggle_in_others(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].faults["sendChatMessage"] = sends(
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"
            b"Set-Cookie: a=b\r\n X-Evil: 1\r\nContent-Type: a\rB: c\r\n\r\n"
        )
        received = self.talk(
            b"GET /bigbluebutton/api/sendChatMessage?"
            + signed("sendChatMessage", "meetingID=room").encode()
            + b" HTTP/1.1\r\n\r\n"
        )
        self.assertTrue(received.startswith(b"HTTP/1.1 200 "), received)
        _, *lines, last, end = received.decode("ascii").split("\r\n")
        self.assertEqual((last, end), ("", ""))
        for line in lines:
            self.assertRegex(
                line,
                r"^(Connection|Content-Length|Content-Security-Policy|Content-Type|Date|Set-Cookie)"
                r": [ -~]*$",
            )
        self.assertIn("Set-Cookie: a=b X-Evil: 1", lines)
        # and what a browser would take for a script of ours does not run
        self.assertIn("Content-Security-Policy: sandbox", lines)

    def test_a_crowd_at_one_moment_waits_to_be_accepted(self):
        # nobody accepts now
        self.balancer.shutdown()
        connections = [socket.create_connection(("127.0.0.1", self.port), 2) for _ in range(200)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual(len(connections), 200)

    def cut_off(self, data):
        """Send this and wait until tinyscale breaks off; it must not have answered."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            # if it has broken off before we came to send
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                self.assertEqual(connection.recv(1000), b"", data)

    def test_a_client_has_one_deadline_for_its_whole_head(self):
        """Also who sends a byte now and then; and for a form, which is not verified yet."""
        form = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\nx"
        post = b"POST /bigbluebutton/api/getMeetings HTTP/1.1\r\n" + form
        patch = mock.patch.object(tinyscale, "HEAD_TIMEOUT", 100)
        patch.start()
        self.addCleanup(patch.stop)
        for data in (b"GET /hea", b"GET / HTTP/1.1\r\nX: ", post, post[:-1]):
            with self.subTest(data):
                self.clear_log()
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    connection.sendall(data)
                    self.assertTrue(until(lambda: self.balancer.handlers))
                    for _ in range(4):
                        self.clock.ahead += 20
                        connection.sendall(b"l")
                    self.assertEqual(select.select([connection], [], [], 0.02)[0], [])
                    self.clock.ahead += 21
                    connection.sendall(b"t")
                    self.assertEqual(connection.recv(1000), b"")
                self.assertTrue(until(lambda: "127.0.0.1 broke off" in self.log.getvalue()))
                self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_after_the_deadline_there_is_another_look_only_if_nothing_has_been_read(self):
        """A pause of our machine may be why; but a form that has begun to come has had its time."""
        for path in ("", "/bigbluebutton/api/create"):
            ours, theirs = socket.socketpair()
            with self.subTest(path), ours, theirs:
                handler = tinyscale.Handler(self.balancer, ours, "127.0.0.1")
                handler.head = handler.head._replace(path=path)
                theirs.sendall(b"x=1")
                self.clock.ahead += 10 * tinyscale.HEAD_TIMEOUT
                if path:
                    self.assertRaises(socket.timeout, handler.receive)
                else:
                    self.assertEqual(handler.receive(), b"x=1")

    def test_who_says_nothing_is_disconnected(self):
        with mock.patch.object(tinyscale, "HEAD_TIMEOUT", 0.1):
            for data in (b"", b"GET /hea", b"GET / HTTP/1.1\r\n"):
                self.cut_off(data)

    def test_who_is_silent_in_the_middle_of_its_slides_is_disconnected(self):
        head = f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 9\r\n\r\n<x"
        with mock.patch.object(tinyscale, "SILENCE_TIMEOUT", 0.1):
            self.cut_off(head.encode())
        self.assertEqual(self.fakes[0].calls, [])

    def test_a_stop_waits_for_who_waits_for_us_alone(self):
        head = "Content-Type: {}\r\nContent-Length: 1000\r\n\r\na"
        form = head.format(tinyscale.FORM)
        for path, rest, is_waited_for in (
            # what it still sends is dropped
            ("/nothing", head.format("text/xml"), False),
            # that it was verified does not matter then
            (self.PATH, head.format("text/plain"), False),
            # it has shown no checksum yet
            ("/bigbluebutton/api/create", form, False),
            (self.PATH, head.format("text/xml"), True),
        ):
            with self.subTest(path):
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    connection.sendall(f"POST {path} HTTP/1.1\r\n{rest}".encode())
                    self.assertTrue(until(lambda: self.balancer.handlers))
                    (handler,) = self.balancer.handlers
                    self.assertTrue(until(lambda: handler.head.path))
                    if not is_waited_for and rest != form:
                        self.assertIn(b"FAILED", connection.recv(1000))
                    if is_waited_for:
                        self.assertTrue(until(lambda: handler.took_body))
                    self.clock.ahead += 2
                    is_busy = tinyscale.is_busy
                    self.assertTrue(until(lambda: is_busy(self.balancer) == is_waited_for))
                    self.assertFalse(until(lambda: is_busy(self.balancer) != is_waited_for, 0.1))
                self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_a_stop_waits_until_an_answer_is_sent_also_if_the_body_is_not_wanted(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            handler = tinyscale.Handler(self.balancer, ours, "127.0.0.1")
            handler.head = handler.head._replace(path="/bigbluebutton/api/join", length=9)
            handler.call.params = {"meetingID": "room"}
            self.clock.ahead += 2
            # as `respond` does before it sends
            handler.waiting_since = self.clock.monotonic()
            self.balancer.handlers.add(handler)
            self.addCleanup(self.balancer.handlers.discard, handler)
            self.assertTrue(tinyscale.is_busy(self.balancer))
            handler.is_answered = True
            self.assertFalse(tinyscale.is_busy(self.balancer))

    def test_who_knows_the_secret_may_send_its_slides_slowly(self):
        head = f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(head.encode())
            for piece in (b"<sl", b"ide", b"s/>"):
                self.assertEqual(select.select([connection], [], [], 0.02)[0], [])
                self.clock.ahead += 60
                connection.sendall(piece)
            self.assertIn(b"SUCCESS", connection.recv(65536))

    def ask_for_much(self, size, silence):
        """A connection over which so many bytes will come, and which may pause for so long."""
        arrived, gate = threading.Event(), threading.Event()
        serve = tinyscale.Handler.serve

        def serve_with_a_small_buffer(handler):
            handler.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            serve(handler)

        def answer(handler):
            arrived.set()
            gate.wait(10)
            return 200, "text/plain", b"x" * size, {}

        self.fakes[0].faults["newCall"] = answer
        small = mock.patch.object(tinyscale.Handler, "serve", serve_with_a_small_buffer)
        short = mock.patch.object(tinyscale, "SILENCE_TIMEOUT", silence)
        small.start()
        self.addCleanup(small.stop)
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        self.addCleanup(connection.close)
        query = signed("newCall", "")
        connection.sendall(f"GET /bigbluebutton/api/newCall?{query} HTTP/1.1\r\n\r\n".encode())
        self.assertTrue(arrived.wait(10))
        short.start()
        self.addCleanup(short.stop)
        gate.set()
        return connection

    def test_a_reader_that_is_slow_but_steady_gets_its_whole_answer(self):
        """However long it takes: only a pause is too long."""
        size = 2_000_000
        connection = self.ask_for_much(size, silence=1)
        received = b""
        began = time.monotonic()
        while time.monotonic() < began + 1.3:
            piece = connection.recv(16384)
            self.assertTrue(piece, len(received))
            received += piece
            time.sleep(0.02)
        self.assertLess(len(received), size)
        pieces = [received]
        while pieces[-1]:
            pieces.append(connection.recv(65536))
        self.assertTrue(b"".join(pieces).endswith(b"\r\n\r\n" + b"x" * size))

    def test_who_takes_nothing_of_its_answer_is_disconnected(self):
        self.ask_for_much(10_000_000, silence=0.1)
        self.assertTrue(until(lambda: "127.0.0.1 broke off" in self.log.getvalue(), 10))
        self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_who_is_refused_while_it_still_sends_sees_why(self):
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        xml = b"Content-Type: text/xml\r\n"
        form = b"Content-Type: application/x-www-form-urlencoded\r\n"
        large = b"Content-Length: %d\r\n\r\n" % (64 * len(chunk))

        def send(head):
            with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                path = self.PATH.encode().partition(b"?")[0]
                connection.sendall(b"POST " + path + b" HTTP/1.1\r\n" + head)
                for _ in range(16):
                    connection.sendall(chunk)
                received = b""
                while not received.endswith(b"</response>"):
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    received += piece
                return received[:13]

        with mock.patch.object(tinyscale, "HEAD_TIMEOUT", 10):
            for head, answer in (
                (xml + b"Transfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 411 "),
                (form + large, b"HTTP/1.1 413 "),
                (xml + large, b"HTTP/1.1 200 "),
                (b"Host: a\r\nHost: b\r\n\r\n", b"HTTP/1.1 400 "),
            ):
                jobs = [lambda head=head: send(head) for _ in range(60)]
                self.assertEqual(self.together(jobs), [answer] * 60)


# How much of it: enough to find what was ever found, and a few seconds at most.
HEADS, ANSWERS, REQUESTS = 20_000, 20_000, 3_000


SEED = 20


BYTES = [
    bytes([number]) for number in (0, 9, 10, 11, 13, 22, 27, 32, 34, 35, 37, 38, 47, 58, 60, 62)
]


BYTES += [
    b"\x7f",
    b"\x85",
    b"\xa0",
    b"\xb2",
    b"\xff",
    b"\xc3\xa4",
    b"\xed\xa0\x80",
    b"\xef\xbf\xbe",
]


BYTES += [b"\r\n", b"\n\n", b"\r\n\r\n", b" \r\n", b"\r\n ", b"x" * 300, b"%", b"?", b";", b"]]>"]


METHODS = [
    b"GET",
    b"GET",
    b"GET",
    b"POST",
    b"HEAD",
    b"PUT",
    b"OPTIONS",
    b"CONNECT",
    b"get",
    b"",
    b"P\xd6ST",
]


ORIGINS = [
    b"",
    b"",
    b"",
    b"",
    b"http://a",
    b"https://[::1]:1",
    b"HTTP://a",
    b"http://a@b",
    b"//a",
    b"*",
]


PATHS = [name.encode() for name in CALLS_OF_BBB] + [
    b"/",
    b"//",
    b"x",
    b"1",
    b"..",
    b"%2e",
    b";",
    b"health",
]


QUERIES = [
    b"a=1",
    b"&",
    b"&meetingID=room",
    b"&meetingID=%00",
    b"&meetingID=r%C3%B6om",
    b"&meetingID=",
]


QUERIES += [
    b"&recordID=a,b",
    b"&recordID=%252c",
    b"&limit=%d" % 2,
    b"&limit=-1",
    b"&offset=+",
    b"&redirect=false",
]


QUERIES += [
    b"&name=x",
    b"&parentMeetingID=room",
    b"&checksum=",
    b"&hookID=1",
    b"&callbackURL=http://x",
    b"&=",
    b"%",
]


QUERIES += [
    b"&meetingID=other",
    b"&isBreakout=true",
    b"&attendeePW=a&moderatorPW=b",
    b"&%6deetingID=x",
    b"&x=%ff",
]


VERSIONS = [b"HTTP/1.1"] * 8 + [
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.10",
    b"http/1.1",
    b"",
]


FIELDS = [
    b"Host",
    b"host",
    b"Content-Length",
    b"Content-Type",
    b"Accept",
    b"X",
    b"Expect",
    b"Authorization",
]


FIELDS += [
    b"X-Y",
    b"Cookie",
    b"Connection",
    b"Transfer-Encoding",
    b"",
    b"a b",
    b"\xff",
    b"content-LENGTH",
]


VALUES = [
    b"",
    b"a",
    b"0",
    b"5",
    b"+5",
    b"1_0",
    b"9" * 20,
    b"\xb2",
    b"chunked",
    b"close",
    b"text/html",
    b"x:y",
]


VALUES += [
    b"application/xml",
    b"text/xml;charset=utf-8",
    b"multipart/form-data;boundary=x",
    b"application/x-www-form-urlencoded",
]


ITEMS = {
    b"meetings": b"<meeting><meetingID>room</meetingID><createTime>7</createTime></meeting>",
    b"recordings": b"<recording><recordID>a</recordID><startTime>5</startTime></recording>",
    b"sessions": b"<meeting><meetingID>room</meetingID><userName>x</userName></meeting>",
    b"hooks": b"<hook><hookID>7</hookID><callbackURL><![CDATA[http://x?<&]]></callbackURL></hook>",
}


MARKUP = [b"<meeting>", b"</meeting>", b"<meetingID>a</meetingID>"]


MARKUP += [b"<recording/>", b"</recording>"]


MARKUP += [b"<hook>", b"<meetings>"]


MARKUP += [
    b"<a b>",
    b"<1>",
    b"</1>",
    b"<lms:role>",
    b"</customdata>",
    b"</response>",
    b"</meetings>",
    b"<x/>",
    b"<x>",
]


MARKUP += [
    b"<x y='1' y='2'>",
    b"<x 1='2'/>",
    b"<![CDATA[",
    b"]]>",
    b"<!-- ",
    b"-->",
    b"<?xml?>",
    b"<?x",
    b"<!DOCTYPE a>",
]


MARKUP += [
    b"&amp;",
    b"&nbsp;",
    b"&#0;",
    b"&#xD800;",
    b"&#65;",
    b"&#99999999;",
    b"&",
    b"<",
    b">",
    b'"',
    b"text ",
    b"\n",
]


MARKUP += [
    b"<createTime>5</createTime>",
    b"<createTime>\xc2\xb2</createTime>",
    b"<participantCount>-3</participantCount>",
]


MARKUP += [
    b"<messageKey>notFound</messageKey>",
    b"<messageKey>checksumError</messageKey>",
    b"<running>false</running>",
]


MARKUP += [
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbf\xbf",
    b"\x00",
    b"\x0b",
    b"<\xc3\xa4>",
    b"</\xc3\xa4>",
    b"<\xc3\xa4>x</\xc3\xa4>",
    b"</x>",
]


MARKUP += [
    b"<participantCount>" + b"9" * 30 + b"</participantCount>",
    b"<x xmlns='y'/>",
    b"<internalMeetingID/>",
]


class FuzzTest(ClusterTest):
    """Whatever strangers and servers send: an answer or a refusal, and never a mistake of ours.

    The same each time: it begins with SEED, and the message of a failure has what led to it.
    """

    servers = 2

    def setUp(self):
        super().setUp()
        self.random = random.Random(SEED)

    def some(self, choices, most):
        """A few of these, one after the other."""
        return b"".join(self.random.choices(choices, k=self.random.randint(0, most)))

    def damaged(self, data):
        """The bytes with some taken out, put in, changed or repeated. Often none."""
        for _ in range(self.random.choice((0, 0, 0, 1, 1, 2, 5))):
            begin = self.random.randint(0, len(data))
            end = min(len(data), begin + self.random.choice((0, 1, 1, 3, 20)))
            middle = self.random.choice((b"", data[begin:end] * 2, self.random.choice(BYTES)))
            data = data[:begin] + middle + data[end:]
        return data

    def head(self):
        choice = self.random.choice
        path = choice((b"/bigbluebutton/api/", b"/bigbluebutton/", b"/")) + self.some(PATHS, 3)
        query = b"?" + self.some(QUERIES, 4) if choice((True, False)) else b""
        line = b" ".join((choice(METHODS), choice(ORIGINS) + path + query, choice(VERSIONS)))
        lines = b"".join(
            choice(FIELDS) + choice((b":", b": ", b":\t", b" :")) + choice(VALUES) + b"\r\n"
            for _ in range(choice((0, 0, 1, 2, 5)))
        )
        return self.damaged(line + b"\r\n" + lines + b"\r\n")

    def test_no_head_is_more_than_refused(self):
        taken = 0
        for _ in range(HEADS):
            data = self.head()
            try:
                head = tinyscale.parse_head(data)
            except tinyscale.ApiError as error:
                self.assertIn(error.status, (400, 411), data)
                continue
            except Exception as error:
                # the message must have the bytes that led to it
                self.fail(f"{error!r} of {data!r}")
            taken += 1
            # by other means than the program's: what was taken is plain
            first, *lines, last, end = data.decode("latin-1").split("\r\n")
            self.assertEqual((last, end), ("", ""), data)
            self.assertIsNone(re.search("[\0\r\n]", first + "".join(lines)), data)
            method, target, version = first.split(" ")
            mark = "?" if "?" in target else ""
            self.assertEqual((head.method, version[:7]), (method, "HTTP/1."), data)
            self.assertTrue(target.endswith(f"{head.path}{mark}{head.query}"), data)
            self.assertRegex(head.path, "^/[!-~]*$", data)
            self.assertTrue(target.isascii() and "#" not in target, data)
            names = [line.partition(":")[0].lower() for line in lines]
            self.assertEqual(set(names), set(head.fields), data)
            self.assertNotIn("transfer-encoding", names, data)
            self.assertLess(max(names.count("host"), names.count("content-length")), 2, data)
            length = head.fields.get("content-length", "0").lstrip("0") or "0"
            self.assertEqual(str(head.length), length, data)
        # it must not be all refused, or nothing was shown
        self.assertGreater(taken, HEADS / 20)

    def xml(self, random, tag):
        """What a server might answer: often XML that is almost right."""
        begin = random.choice(
            (b"", b"", b"\xef\xbb\xbf", b"<?xml version='1.0'?>\n", b"<!DOCTYPE x>")
        )
        code = random.choice((b"SUCCESS", b"SUCCESS", b"SUCCESS", b"FAILED"))
        inner = b""
        for _ in range(random.randint(0, 4)):
            odd = b"".join(random.choices(MARKUP, k=random.choice((0, 0, 1, 3))))
            if random.random() < 0.0005:
                odd = b"<a>" * 3000 + b"</a>" * 3000
            inner += random.choice((odd, ITEMS[tag].replace(b"><", b">%s<" % odd, 1)))
        if random.random() < 0.7:
            inner = b"<%s>%s</%s>" % (tag, inner, tag)
        return b"%s<response>\n<returncode>%s</returncode>%s</response>" % (begin, code, inner)

    def test_no_answer_of_a_server_is_more_than_left_out(self):
        shapes = list(tinyscale.LISTS.values())
        readable = listed = 0
        for _ in range(ANSWERS):
            shape = self.random.choice(shapes)
            data = self.damaged(self.xml(self.random, shape.tag.encode()))
            answer = tinyscale.Answer(200, data)
            try:
                root, is_whole = tinyscale.parse(answer)
                told = tinyscale.info_by(answer)
                items = tinyscale.items_of(shape, answer) or []
                written = tinyscale.write_list(shape, tinyscale.merge(shape, [items, items]))
                # what we write of it is read by a parser that forgives nothing
                again = ET.fromstring(written.body)
            except Exception as error:
                # the message must have the bytes that led to it
                self.fail(f"{error!r} of {data!r}")
            readable += bool(len(root))
            listed += bool(items)
            self.assertTrue(len(root) or not (is_whole or told or items), data)
            self.assertTrue(told is None or (told.meeting_id and told.participants >= 0), data)
            self.assertEqual(again.findtext("returncode"), "SUCCESS", data)
            self.assertLessEqual(len(again.find(shape.tag)), 2 * len(items), data)
        # it must not be all left out, or nothing was shown
        self.assertGreater(readable, ANSWERS / 4)
        self.assertGreater(listed, ANSWERS / 10)
        self.assertGreater(ANSWERS, readable)

    def request(self):
        """What a client might send: often a call whose checksum is right."""
        choice = self.random.choice
        if choice((True, False, False)):
            return self.head() + self.some(BYTES, 2)
        call = choice((*CALLS_OF_BBB, "newCall", "joi", "create/x"))
        query = self.some(QUERIES, 4).decode("latin-1").lstrip("&")
        body = choice((b"", b"", b"", b"<x/>", b"a=b&meetingID=x", choice(MARKUP)))
        fields = b"Content-Type: %s\r\nContent-Length: %d\r\n" % (choice(VALUES), len(body))
        is_form = body and choice((True, False))
        if is_form:
            body = signed(call, query).encode("latin-1")
            query = ""
            fields = (
                b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n"
                % len(body)
            )
        signature = "" if is_form else "?" + signed(call, query, choice((SECRET, SECRET, "wrong")))
        method = choice(("GET", "GET", "POST", "HEAD"))
        line = f"{method} /bigbluebutton/api/{call}{signature} HTTP/1.1\r\n"
        more = choice((b"", b"Accept: text/html\r\n", b"Expect: 100-continue\r\n"))
        data = line.encode("latin-1") + (fields if body else b"") + more + b"\r\n" + body
        return self.damaged(data) if self.random.random() < 0.2 else data

    def odd(self, random):
        """A fault: each third answer is none of BBB's."""

        def fault(handler):
            if random.random() < 0.7:
                return proper(handler)
            code = random.choice((200, 200, 200, 302, 404, 500))
            kind = random.choice(("text/xml", "text/html", "application/json", ""))
            return code, kind, self.xml(random, random.choice(list(ITEMS))), {}

        return fault

    def test_no_request_is_more_than_refused_whatever_servers_answer(self):
        answered = 0
        for count in range(REQUESTS):
            if count % 100 == 0:
                for fake in self.fakes:
                    fake.faults.clear()
                    fake.put("room")
                self.survey()
                for number, fake in enumerate(self.fakes):
                    fake.faults["*"] = self.odd(random.Random(SEED + count + number))
            data = self.request()
            with socket.create_connection(("127.0.0.1", self.port), 20) as connection:
                received = b""
                with contextlib.suppress(ConnectionError):
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    piece = b"-"
                    while piece:
                        piece = connection.recv(65536)
                        received += piece
            received = received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 1)
            if received:
                answered += 1
                self.assertRegex(received, rb"\AHTTP/1\.1 [2-5][0-9][0-9] ", data)
                self.assertIn(b"\r\nConnection: close\r\n", received, data)
            if "Please report" in self.log.getvalue():
                self.fail(f"{data!r}\n{self.log.getvalue()}")
            if count % 100 == 99:
                self.clear_log()
        self.assertGreater(answered, REQUESTS / 2)
        self.assertTrue(until(lambda: not self.balancer.handlers))
        for fake in self.fakes:
            fake.faults.clear()
        self.survey()
        self.assertEqual(self.states(), ["up", "up"])
        self.assertEqual(self.create("at the end").returncode, "SUCCESS")

    def test_no_call_fails_over_an_answer_that_is_nested_very_deep(self):
        deep = "<a>" * 3000 + "</a>" * 3000
        lists = "".join(f"<{tag}>{deep}{item}</{tag}>" for tag, item in self.deep_items(deep))
        info = f"<meetingID>room</meetingID><hookID>7</hookID><callbackURL>x</callbackURL>{deep}"
        for fake in self.fakes:
            fake.faults["*"] = lambda handler: success(info + lists)
        for call in CALLS_OF_BBB:
            answer = self.get(call, "meetingID=room&recordID=a&hookID=1&callbackURL=x")
            self.assertNotEqual(answer.status, 500, call)
        self.survey()
        self.assertEqual(self.states(), ["up", "up"])
        self.assertNotIn("Please report", self.log.getvalue())

    def deep_items(self, deep):
        """The lists of BBB, each with an item that has this in it."""
        for tag, item in ITEMS.items():
            yield tag.decode(), item.decode().replace("><", f">{deep}<", 1)


FORM = "application/x-www-form-urlencoded"


def takes_a_form(handler):
    """What BBB has done since 2.6.18: the checksum is over an empty query."""
    call, query, method, body, content_type = handler.bbb.calls[-1]
    if method == "GET":
        return proper(handler)
    text, _, given = body.decode("ascii").rpartition("&checksum=")
    expected = hashlib.sha256((call + handler.bbb.secret).encode()).hexdigest()
    if (query, given, content_type) != ("", expected, FORM):
        return failed("checksumError")
    return handler.call(call, signed(call, text, handler.bbb.secret), b"")


class BodiesTest(ClusterTest):
    SLIDES = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<modules><module name="presentation">\u00e4</module></modules>\r\n'
    ).encode()

    def post(self, call, query, body, content_type, **kwargs):
        return self.get(
            call, query, method="POST", body=body, headers={"Content-Type": content_type}, **kwargs
        )

    def test_xml_passes_byte_for_byte_with_a_bare_content_type(self):
        for content_type in (
            "application/xml",
            "text/xml; charset=UTF-8",
            "Application/XML;charset=utf-8",
            FORM,
        ):
            for body in (self.SLIDES, b"\xef\xbb\xbf \n" + self.SLIDES):
                answer = self.post("create", "name=x&meetingID=room", body, content_type)
                self.assertEqual(answer.returncode, "SUCCESS")
                (owner,) = self.having("room")
                self.assertEqual(owner.calls[-1][2:], ("POST", body, "application/xml"))
        answer = self.post("insertDocument", "meetingID=room", self.SLIDES, "application/xml")
        self.assertEqual(answer.returncode, "SUCCESS")

    def form(self, call, text, over, **kwargs):
        checksum = hashlib.sha256((call + over + SECRET).encode()).hexdigest()
        return self.http(
            f"/bigbluebutton/api/{call}",
            "POST",
            f"{text}&checksum={checksum}".encode(),
            {"Content-Type": f"{FORM}; charset=UTF-8", **kwargs},
        )

    def test_nothing_is_held_of_calls_that_have_ended(self):
        """Neither by a kept connection nor by an error, until Python looks for circles."""
        self.fakes[0].put("room")
        self.survey()
        size = 3_000_000
        slides = b"<modules>" + b"x" * size + b"</modules>"
        fault = status(200, SUCCESS + "<x>" + "x" * size + "</x></response>", "text/xml")

        def refuses(handler):
            return failed("checksumError")

        for name, query, body, faults in (
            ("insertDocument", "meetingID=room", slides, {}),
            ("insertDocument", "meetingID=nowhere", slides, {"insertDocument": refuses}),
            ("getMeetingInfo", "meetingID=room", b"", {"getMeetingInfo": fault}),
            ("getSessions", "", b"", {"getSessions": fault}),
        ):
            with self.subTest(name, query=query):
                for fake in self.fakes:
                    fake.faults = dict(faults)
                gc.disable()
                self.addCleanup(gc.enable)
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                if body:
                    self.post(name, query, body, "text/xml")
                else:
                    self.get(name, query)
                self.assertTrue(until(lambda: not self.balancer.handlers))
                own = tracemalloc.Filter(True, tinyscale.__file__)

                def held(own=own):
                    traces = tracemalloc.take_snapshot().filter_traces([own]).traces
                    return sum(trace.size for trace in traces)

                self.assertTrue(until(lambda: held() < size / 2, 2), held())
                tracemalloc.stop()
                gc.enable()

    def test_a_form_counts_as_the_query_and_goes_on_in_the_url(self):
        text = "name=A+b&meetingID=room&moderatorPW=m%26p&attendeePW=ap"
        for over in (text, ""):
            self.assertEqual(self.form("create", text, over).returncode, "SUCCESS")
            (owner,) = self.having("room")
            self.assertEqual(
                owner.calls[-1][1:4], (signed("create", text, owner.secret, "sha256"), "GET", b"")
            )
        self.assertEqual(self.form("create", text, "something else").messageKey, "checksumError")
        # a URL that holds only the checksum has no query
        for over in (text, ""):
            checksum = signed("create", over).rpartition("checksum=")[2]
            path = f"/bigbluebutton/api/create?checksum={checksum}"
            answer = self.http(path, "POST", text, {"Content-Type": FORM})
            self.assertEqual(answer.messageKey, "duplicateWarning")
        self.assertEqual(
            self.form("end", "meetingID=room&password=m%26p", "").messageKey,
            "sentEndMeetingRequest",
        )
        self.assertEqual(self.form("getMeetings", "a=b", "a=b").returncode, "SUCCESS")

    def test_a_form_that_would_make_a_long_url_goes_on_as_a_form(self):
        for fake in self.fakes:
            fake.faults["*"] = takes_a_form
        welcome = "welcome=" + "%C3%A4" * 2000
        text = f"name=A+b&meetingID=room&&{welcome}&moderatorPW=mp&attendeePW=ap"
        for over in (text, ""):
            self.assertEqual(self.form("create", text, over).meetingID, "room")
            (owner,) = self.having("room")
            checksum = hashlib.sha256(("create" + owner.secret).encode()).hexdigest()
            body = f"{text}&checksum={checksum}".encode()
            self.assertEqual(owner.calls[-1][1:], ("", "POST", body, FORM))
        ids = []
        for number in range(150):
            ids.append(self.fakes[number % 3].record(f"lecture{number}", 1700000000000 + number))
        many = f"recordID={','.join(ids)}&limit=100"
        self.assertEqual(self.form("getRecordings", many, "").totalElements, "150")
        self.assertEqual(self.form("updateRecordings", f"{many}&meta_x=y", "").updated, "true")
        self.assertEqual(self.counts("updateRecordings"), [1, 1, 1])
        # nginx refuses 8 KiB
        lengths = [len(fake.url + call[1]) for fake in self.fakes for call in fake.calls]
        self.assertLess(max(lengths), 8000)

    def test_an_old_server_that_refuses_a_long_form_is_not_down(self):
        text = "name=x&meetingID={}&welcome=" + "x" * 9000
        # the caller could not do anything about a checksumError
        self.assertEqual(
            self.form("create", text.format("room"), "").messageKey, "serverUnavailable"
        )
        self.assertEqual(self.states(), ["up"] * 3)
        # one has been upgraded
        self.fakes[2].faults["create"] = takes_a_form
        self.assertEqual(self.form("create", text.format("room"), "").returncode, "SUCCESS")
        self.assertEqual(self.having("room"), [self.fakes[2]])
        self.assertEqual(self.states(), ["up"] * 3)
        self.create_rooms(3, "other")
        self.assertEqual(len({self.having(f"other{number}")[0] for number in range(3)}), 3)

    def test_a_file_passes_byte_for_byte_with_its_boundary(self):
        content_type = 'multipart/form-data; boundary="B; x"'
        body = b"--B; x\r\nContent-Disposition: form-data; name=x\r\n\r\n\n\xff\0\r\n--B; x--\r\n"
        answer = self.post("create", "name=x&meetingID=room", body, content_type)
        self.assertEqual(answer.returncode, "SUCCESS")
        (owner,) = self.having("room")
        self.assertEqual(owner.calls[-1][2:], ("POST", body, content_type))

    def test_a_body_may_hold_anything_and_come_in_any_pieces(self):
        query = signed("create", "name=x&meetingID=room")
        body = b"<x>\n\r\n\r\n\r\n\0" + b"y" * 200000 + b"\n</x>"
        head = f"POST /bigbluebutton/api/create?{query} HTTP/1.1\r\nContent-Type: text/xml\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        receive, received = tinyscale.Handler.receive, []

        def receive_and_note(handler):
            piece = receive(handler)
            received.append(len(piece))
            return piece

        end_of_head = len(data) - len(body)
        with mock.patch.object(tinyscale.Handler, "receive", receive_and_note):
            for size in (1, 99, end_of_head, end_of_head + 1, end_of_head + 9, len(data)):
                received.clear()
                with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                    connection.sendall(data[:size])
                    # else the two pieces could become one on their way
                    self.assertTrue(until(lambda size=size: sum(received) >= size))
                    connection.sendall(data[size:])
                    answer = b"".join(iter(lambda: connection.recv(10000), b""))
                self.assertIn(b"<returncode>SUCCESS", answer, size)
                self.assertEqual(self.having("room")[0].calls[-1][3], body)

    def test_parameters_in_both_places_and_other_types_are_refused(self):
        query = "name=x&meetingID=room"
        self.assertEqual(
            self.post("create", query, b"attendeePW=ap", FORM).messageKey, "checksumError"
        )
        for path in (f"create?{query}", f"create?{signed('create', query)}"):
            mixed = self.http(
                f"/bigbluebutton/api/{path}",
                "POST",
                signed("create", query),
                {"Content-Type": FORM},
            )
            self.assertEqual(mixed.messageKey, "checksumError")
        for content_type in ("application/json", "text/plain", "text/xmlx", "application/xml2", ""):
            answer = self.post("create", query, b"{}", content_type)
            self.assertEqual(answer.messageKey, "unsupportedContentType")
            self.assertEqual((answer.status, answer.returncode), (200, "FAILED"))
        self.assertEqual(self.counts("create"), [0, 0, 0])
        for bad in (" ", "#", "\u00e4", "\r\nA: b"):
            text = f"name=x{bad}&meetingID=room"
            self.assertEqual(self.form("create", text, text).status, 400)

    def test_an_empty_body_is_none_whatever_its_type(self):
        self.create("room")
        for content_type in (
            "application/json",
            "application/xml",
            FORM,
        ):
            self.assertEqual(
                self.post("getMeetingInfo", "meetingID=room", b"", content_type).meetingID, "room"
            )

    def test_20_megabytes_of_slides_arrive_whole(self):
        slides = b"<modules>" + b"A" * 20 * 2**20 + b"</modules>"
        self.assertEqual(
            self.post("create", "name=x&meetingID=room", slides, "application/xml").returncode,
            "SUCCESS",
        )
        self.assertTrue(self.having("room")[0].calls[-1][3] == slides)

    def test_what_is_too_large_is_refused_and_the_client_sees_why(self):
        with mock.patch.multiple(tinyscale, MAX_BODY=1000, MAX_BODIES=2000, MAX_HEAD=500):
            for size in (1500, 10**6):
                answer = self.post("create", "meetingID=room", b"<" * size, "application/xml")
                self.assertEqual((answer.status, answer.messageKey), (413, "requestTooLarge"))
                self.assertEqual(answer.headers["Connection"], "close")
            self.assertEqual(
                self.form("create", "meetingID=room&name=" + "x" * 600, "").status, 413
            )
            self.assertEqual(self.http("/health", headers={"X": "y" * 600}).status, 431)
        self.assertEqual(self.counts("create"), [0, 0, 0])

    def test_a_few_large_bodies_are_held_at_a_time_and_the_others_see_why_not(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.fakes[0].put("class")
        self.survey()
        for fake in self.fakes:
            fake.faults["create"] = held(gate)

        def upload(number, size=10**6):
            query = f"name=x&meetingID=room{number}"
            return self.post("create", query, b"<" * size, "application/xml")

        with mock.patch.multiple(tinyscale, MAX_BODIES=25 * 10**5):
            large = [background(upload, number) for number in (1, 2)]
            self.assertTrue(until(lambda: sum(self.counts("create")) == 2))
            refused = upload(3)
            self.assertEqual((refused.status, refused.messageKey), (503, "serverBusy"))
            self.assertEqual(refused.headers["Content-Type"], "text/xml;charset=utf-8")
            # forms are small, and need no room
            with mock.patch.multiple(tinyscale, MAX_BODIES=10**6):
                form = self.form("getMeetingInfo", "meetingID=class", "")
                self.assertEqual(form.returncode, "SUCCESS")
            # what is small goes on all the while, and a body that is not read takes no room
            small = self.post("insertDocument", "meetingID=class", self.SLIDES, "application/xml")
            self.assertEqual(small.returncode, "SUCCESS")
            gate.set()
            self.assertEqual([future.result(10).returncode for future in large], ["SUCCESS"] * 2)
            # the room comes back just after the answer
            self.assertTrue(until(lambda: not self.balancer.handlers))
            self.assertEqual(upload(3).returncode, "SUCCESS")
            self.assertTrue(until(lambda: not self.balancer.handlers))
            for number in range(3):
                # also from who hangs up half way
                half = signed("create", f"name=x&meetingID=half{number}")
                head = (
                    f"POST /bigbluebutton/api/create?{half} HTTP/1.1\r\nContent-Type: text/xml\r\n"
                )
                with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                    connection.sendall(f"{head}Content-Length: 2000000\r\n\r\n<x>".encode())
                self.assertTrue(until(lambda: "it hung up" in self.log.getvalue()))
                self.clear_log()
            self.assertEqual(upload(4, 2 * 10**6).returncode, "SUCCESS")
        self.assertEqual(self.having("half0"), [])

    def test_who_does_not_know_the_secret_cannot_make_us_read_a_body(self):
        with mock.patch.object(
            tinyscale.Handler, "read_body", side_effect=AssertionError("it was read")
        ):
            for content_type in ("application/xml", "multipart/form-data; boundary=x", FORM):
                answer = self.post(
                    "create", "meetingID=room", self.SLIDES, content_type, secret="wrong"
                )
                self.assertEqual(answer.messageKey, "checksumError")

    def expect(self, body, length=None, **kwargs):
        """Ask whether a body may be sent, and do if so; return the answer's begin and its rest."""
        query = signed("create", "name=x&meetingID=room", **kwargs)
        head = (
            f"POST /bigbluebutton/api/create?{query} HTTP/1.1\r\nExpect: 100-continue\r\n"
            f"Content-Type: text/xml\r\nContent-Length: {length or len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(head.encode())
            begin = connection.recv(25)
            if b" 100 " in begin:
                connection.sendall(body)
            return begin, b"".join(iter(lambda: connection.recv(10000), b""))

    def test_who_expects_a_100_continue_gets_it_before_the_body(self):
        begin, answer = self.expect(b"<x/>")
        self.assertEqual(begin, b"HTTP/1.1 100 Continue\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer)
        self.assertIn(b"<returncode>SUCCESS", answer)
        self.assertEqual(self.having("room")[0].calls[-1][3], b"<x/>")

    def test_who_is_refused_need_not_send_the_body_first(self):
        for kwargs, expected in (
            ({"secret": "wrong"}, b"HTTP/1.1 200 "),
            ({"length": tinyscale.MAX_BODY + 1}, b"HTTP/1.1 413 "),
        ):
            begin, _ = self.expect(b"<x/>", **kwargs)
            self.assertTrue(begin.startswith(expected), begin)
        with mock.patch.multiple(tinyscale, MAX_BODIES=3):
            begin, _ = self.expect(b"<x/>")
            self.assertTrue(begin.startswith(b"HTTP/1.1 503 "), begin)
        self.assertEqual(self.counts("create"), [0, 0, 0])

    def test_what_a_server_says_arrives_unchanged(self):
        self.fakes[0].put("room")
        self.survey()
        for code, body, content_type in (
            (200, f"{SUCCESS}<x>\u00e4&#9;</x>\r\n</response>", "text/xml"),
            (200, "<x/>", ""),
            (200, '{"response": 1}', "application/json"),
            (404, "<html>", "text/html;charset=utf-8"),
            (500, "oops", "text/plain"),
            (201, "", "text/xml"),
        ):
            self.fakes[0].faults["newCall"] = status(
                code, body, content_type, X_Other="no", Set_Cookie="a=b; Path=/"
            )
            answer = self.get("newCall", "meetingID=room", headers={"Accept": "application/json"})
            self.assertEqual(
                (
                    answer.status,
                    answer.body,
                    answer.headers["Content-Type"],
                    answer.headers["Set-Cookie"],
                ),
                (code, body.encode(), content_type or None, "a=b; Path=/"),
            )
            self.assertIsNone(answer.headers["X-Other"])
            self.assertNotIn("", answer.headers.values())

    def test_an_answer_may_come_in_chunks_or_end_with_its_connection(self):
        self.fakes[0].put("room")
        self.survey()
        answer = (SUCCESS + "<running>true</running></response>").encode()
        chunks = b"".join(
            b"%x\r\n%b\r\n" % (len(part), part) for part in (answer[:10], answer[10:], b"")
        )
        for head, body in ((b"Transfer-Encoding: chunked", chunks), (b"Connection: close", answer)):
            self.fakes[0].faults["isMeetingRunning"] = sends(
                b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (head, body)
            )
            self.assertEqual(self.get("isMeetingRunning", "meetingID=room").body, answer)

    def test_a_connection_that_breaks_off_is_closed_at_once(self):
        self.fakes[0].put("room")
        self.survey()
        faults = [
            reset,
            silent,
            sends(b"what?\r\n\r\n"),
            sends(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nx"),
        ]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for fault in faults:
                self.fakes[0].faults["isMeetingRunning"] = fault
                with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.1, MAX_ANSWER=0):
                    answer = self.get("isMeetingRunning", "meetingID=room")
                self.assertEqual(answer.messageKey, "serverUnavailable")
                self.survey()
        self.assertEqual([str(warning.message) for warning in seen], [])

    def test_redirects_of_a_server_are_not_passed_on_and_never_followed(self):
        self.fakes[0].put("room")
        self.survey()
        for code in (301, 302, 303, 307, 308):
            self.fakes[0].faults["end"] = status(
                code, Location=self.fakes[1].url + "/bigbluebutton/api/end"
            )
            self.assertEqual(self.get("end", "meetingID=room").messageKey, "serverUnavailable")
            self.assertIn(f"is down: HTTP {code} without an answer", self.log.getvalue())
            self.survey()
        self.assertEqual(self.counts("end"), [0, 0, 0])

    def test_each_cookie_of_a_server_is_passed_on(self):
        self.fakes[0].put("room")
        self.survey()
        body = f"{SUCCESS}<url>x</url></response>".encode()
        self.fakes[0].faults["join"] = sends(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\n%b"
            % (len(body), body)
        )
        answer = self.get("join", "meetingID=room&redirect=false")
        self.assertEqual(answer.headers.get_all("Set-Cookie"), ["a=1", "b=2"])


class FormsTest(ClusterTest):
    """A form is the query of a call, if its URL has none; other bodies go on as they are."""

    FORM = "application/x-www-form-urlencoded"
    LONG = "a=+%20&&b=!*~&welcome=" + "x" * 9000

    def post(self, call, form, url_query=""):
        return self.http(
            f"/bigbluebutton/api/{call}{url_query and '?'}{url_query}",
            "POST",
            form.encode(),
            {"Content-Type": self.FORM},
        )

    def setUp(self):
        super().setUp()
        for fake in self.fakes:
            for call in ("create", "getRecordings", "isMeetingRunning"):
                fake.faults[call] = takes_forms

    def sent(self, call):
        """What the servers got of a call."""
        return [item for fake in self.fakes for item in fake.calls if item[0] == call]

    def test_a_long_form_goes_on_as_a_form_with_a_checksum_over_nothing(self):
        text = f"meetingID=room&{self.LONG}"
        over_text = hashlib.sha1(f"create{text}{SECRET}".encode()).hexdigest()
        over_nothing = hashlib.sha256(f"create{SECRET}".encode()).hexdigest()
        for value in (over_text, over_nothing):
            first, rest = text.split("&", 1)
            for form in (
                f"{text}&checksum={value}",
                f"checksum={value}&{text}",
                f"{first}&checksum={value}&{rest}",
            ):
                with self.subTest(form[:99]):
                    self.survey()
                    self.assertEqual(self.post("create", form).returncode, "SUCCESS")
                    ((_, query, method, body, content_type),) = self.sent("create")
                    self.assertEqual((query, method, content_type), ("", "POST", self.FORM))
                    # the old checksum is nowhere, and the rest is byte for byte
                    (owner,) = self.having("room")
                    right = hashlib.sha256(f"create{owner.secret}".encode()).hexdigest()
                    self.assertEqual(body.decode(), f"{text}&checksum={right}")

    def test_a_short_form_goes_on_in_the_url(self):
        form = signed("create", "meetingID=room&a=+%20&&b=!*~")
        self.assertEqual(self.post("create", form).returncode, "SUCCESS")
        (owner,) = self.having("room")
        ((_, query, method, body, _),) = self.sent("create")
        expected = signed("create", "meetingID=room&a=+%20&&b=!*~", owner.secret, "sha256")
        self.assertEqual((query, method, body), (expected, "GET", b""))

    def test_no_url_is_longer_than_nginx_and_tomcat_take(self):
        kinds = set()
        for size in range(6600, 8400, 200):
            self.survey()
            form = signed("create", "meetingID=room&welcome=" + "x" * size)
            self.assertEqual(self.post("create", form).returncode, "SUCCESS")
            ((_, query, method, _, _),) = self.sent("create")
            kinds.add(method)
            self.assertLess(len(f"{method} /bigbluebutton/api/create?{query} HTTP/1.1"), 8000)
        self.assertEqual(kinds, {"GET", "POST"})

    def test_a_url_that_holds_only_the_checksum_has_no_query(self):
        short = "meetingID=room&a=+%20"
        for text, method in ((short, "GET"), (f"meetingID=room&{self.LONG}", "POST")):
            over_text = hashlib.sha1(f"create{text}{SECRET}".encode()).hexdigest()
            over_nothing = hashlib.sha256(f"create{SECRET}".encode()).hexdigest()
            for value in (over_text, over_nothing):
                with self.subTest(text[:99]):
                    self.survey()
                    answer = self.post("create", text, f"checksum={value}")
                    self.assertEqual(answer.returncode, "SUCCESS")
                    (sent,) = self.sent("create")
                    self.assertEqual(sent[2], method)
                    self.assertNotIn(value, sent[1] + sent[3].decode())
        self.survey()
        value = hashlib.sha1(f"create{short}{SECRET}".encode()).hexdigest()
        for form, url_query in (
            (f"{short}&checksum={value}", f"checksum={value}"),
            (short, f"checksum={value}&checksum={value}"),
            (short, ""),
            (short, "checksum=" + "0" * 40),
            # parameters in both places
            (short, signed("create", "name=x")),
            (short, f"name=x&checksum={over_nothing}"),
            (short, "name=x" + signed("create", f"{short}&name=x")[len(f"{short}&name=x") :]),
            (short, "name=x" + signed("create", f"name=x&{short}")[len(f"name=x&{short}") :]),
        ):
            with self.subTest((form, url_query)):
                self.assertEqual(self.post("create", form, url_query).messageKey, "checksumError")
        self.assertEqual(self.sent("create"), [])

    def test_a_long_list_of_recordings_is_asked_for_with_a_form(self):
        ids = [fake.record(f"lecture{number}", number) for number, fake in enumerate(self.fakes)]
        wanted = ids + [hashlib.sha1(str(number).encode()).hexdigest() for number in range(250)]
        form = signed("getRecordings", "recordID=" + "%2C".join(wanted))
        answer = self.post("getRecordings", form)
        found = [item.findtext("recordID") for item in answer.xml.iter("recording")]
        self.assertEqual(found, ids[::-1])
        self.assertEqual([item[1:3] for item in self.sent("getRecordings")], [("", "POST")] * 3)

    def test_a_server_that_refuses_a_long_form_is_not_down_and_gets_other_meetings(self):
        """BBB before 2.6.18 hashes forms in another way."""
        for fake in self.fakes:
            fake.faults["create"] = lambda handler: (
                failed("checksumError") if handler.command == "POST" else proper(handler)
            )
        keys = set()
        # of any length that is not sent on in a URL
        for size in (*range(6800, 7800, 50), 9000):
            form = signed("create", f"meetingID=room{size}&welcome=" + "x" * size)
            keys.add(self.post("create", form).messageKey)
            self.assertEqual(self.states(), ["up"] * 3)
        self.assertEqual(keys, {"", "serverUnavailable"})
        self.assertEqual(self.create("another").returncode, "SUCCESS")

    def test_slides_that_every_server_refuses_hold_up_no_other_meeting(self):
        """A proxy before BBB may take less than we do: 413."""
        headers = {"Content-Type": "application/xml"}
        for fake in self.fakes:
            fake.faults["create"] = None
            fake.refuses_bodies = True
        for number in range(3):
            query = signed("create", f"meetingID=large{number}")
            answer = self.http(f"/bigbluebutton/api/create?{query}", "POST", b"<modules/>", headers)
            self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual(self.states(), ["up"] * 3)
        self.assertEqual(self.create("another").returncode, "SUCCESS")


def takes_forms(handler):
    """What BBB does since 2.6.18: the checksum of a form is one over nothing."""
    call, query, _, body, content_type = handler.bbb.calls[-1]
    if not body:
        return proper(handler)
    params = dict(parse_qsl(body.decode(), keep_blank_values=True))
    right = hashlib.sha256(f"{call}{handler.bbb.secret}".encode()).hexdigest()
    if query or content_type != FormsTest.FORM or params.pop("checksum", "") != right:
        return failed("checksumError")
    return getattr(handler.bbb, call)(params)


class RefusalTest(ClusterTest):
    """What the log says of each call: key, server and path, so that an admin needs no guessing."""

    servers = 2

    def line_after(self, *args, **kwargs):
        """The last line that a request leaves in the log, without how long it took."""
        self.clear_log()
        self.http(*args, **kwargs)
        self.assertTrue(until(lambda: self.log.getvalue().endswith(" ms\n")), self.log.getvalue())
        (line,) = [line for line in self.log.getvalue().splitlines() if line.endswith(" ms")]
        return re.sub(r" \d+ ms$", "", line)

    def line_of(self, call, query="", secret=SECRET, **kwargs):
        return self.line_after(f"/bigbluebutton/api/{call}?{signed(call, query, secret)}", **kwargs)

    def test_each_refusal_has_a_line_with_its_key_and_the_path_that_was_not_found(self):
        for path in ("/", "/favicon.ico", "/bigbluebutton/api/a_b", "/bigbluebutton/x/create"):
            line = self.line_after(path + "?a=b")
            self.assertRegex(line, f"^- '' '?{re.escape(path)}'? notFound 404$")
        who = "'' 127.0.0.1"
        call = "/bigbluebutton/api/getMeetings"
        query = signed("getMeetings", "")
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for expected, args in (
            (f"getMeetings {who} checksumError 200", (call,)),
            (f"create {who} unsupportedRequest 405", ("/bigbluebutton/api/create", "PUT")),
            (f"join {who} unsupportedRequest 405", ("/bigbluebutton/api/join", "POST")),
            (f"- {who} badRequest 431", ("/" + "x" * 70000,)),
            (f"- {who} badRequest 411", (call, "POST", None, {"Transfer-Encoding": "chunked"})),
            (f"getMeetings {who} requestTooLarge 413", (call, "POST", b"a" * 70000, form)),
            (f"getMeetings {who} badRequest 400", (call, "POST", b"\xff", form)),
            (
                f"getMeetings {who} unsupportedContentType 200",
                (f"{call}?{query}", "POST", b"x", {"Content-Type": "text/plain"}),
            ),
        ):
            self.assertEqual(self.line_after(*args), expected)

    def test_a_line_of_a_relayed_call_names_the_server_and_why_it_was_chosen(self):
        self.fakes[0].put("room")
        self.survey()
        url = self.fakes[0].url
        for call, query, expected in (
            ("getMeetingInfo", "meetingID=room", f"'room' {url} (remembered) success 200"),
            ("end", "meetingID=room&password=x", f"'room' {url} (remembered) failed 200"),
            ("join", "meetingID=room", f"'room' {url} (remembered) success 302"),
            ("getMeetingInfo", "meetingID=none", f"'none' {url} (nowhere) failed 200"),
            ("create", "meetingID=new", f"'new' {url} (in turn) success 200"),
            ("getMeetings", "", "'' 2 of 2 servers success 200"),
            ("newCall", "", f"'' {url} (any) failed 404"),
        ):
            self.assertEqual(self.line_of(call, query), f"{call} {expected}")

    def test_what_is_refused_for_an_outage_names_the_server_that_is_down(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].down()
        self.survey()
        for call in ("join", "getMeetingInfo", "create", "end", "newCall"):
            self.assertEqual(
                self.line_of(call, "meetingID=room"),
                f"{call} 'room' {self.fakes[0].url} (held) serverUnavailable 200",
            )
        first, second = [fake.url for fake in self.fakes]
        self.assertEqual(
            self.line_of("getRecordings", "recordID=a"),
            f"getRecordings '' 1 of 2 servers, not {first} serverUnavailable 200",
        )
        self.fakes[1].down()
        self.survey()
        for call, expected in (
            ("isMeetingRunning", "'other' no server gives a usable answer serverUnavailable 200"),
            ("create", "'other' no server can take a new meeting serverUnavailable 200"),
            (
                "getMeetings",
                f"'other' 0 of 2 servers, not {first}, {second} serverUnavailable 200",
            ),
        ):
            self.assertEqual(self.line_of(call, "meetingID=other"), f"{call} {expected}")

    def test_so_does_the_line_of_a_browser_that_waits(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].down()
        self.survey()
        for ahead, why in ((0, "held"), (tinyscale.HOLD + 1, "down for long")):
            self.clock.ahead += ahead
            self.assertEqual(
                self.line_of("join", "meetingID=room", headers=BROWSER),
                f"join 'room' {self.fakes[0].url} ({why}) serverUnavailable 503",
            )


class SecretsTest(ClusterTest):
    limits = SHORT

    def test_no_secret_checksum_password_or_name_reaches_the_log_or_an_answer(self):
        answers = []
        private = "&".join(
            f"{name}=PRIVATE"
            for name in ("name", "fullName", "attendeePW", "moderatorPW", "password", "userID")
        )
        for fault in (
            None,
            silent,
            reset,
            status(500),
            status(502),
            sends(b"GET rubbish PRIVATE\r\n\r\n"),
            lambda handler: sends(handler.raw_requestline)(handler),
            lambda handler: failed("checksumError"),
            status(301, Location="https://PRIVATE.example.org"),
            sends(b"HTTP/1.1 200 PRIVATE\r\nPRIVATE\r\n"),
        ):
            for fake in self.fakes:
                fake.faults.clear()
                fake.put("room")
            self.survey()
            for fake in self.fakes:
                fake.faults.update({"*": fault} if fault else {})
            for call in (
                "getMeetingInfo",
                "create",
                "join",
                "end",
                "getMeetings",
                "getRecordings",
                "deleteRecordings",
                "hooks/list",
                "newCall",
            ):
                for query in ("meetingID=room", "recordID=a"):
                    answers += [
                        self.get(call, f"{query}&{private}", secret)
                        for secret in (SECRET, "wrong-secret")
                    ]
            # the path of what is not found is in the log, the query never
            for path in ("?", "bigbluebutton/api?", "bigbluebutton/api/a;b?", "status?"):
                answers.append(self.http(f"/{path}{private}"))
            answers.append(self.http(f"/status?{private}", headers={"Authorization": "PRIVATE"}))
            answers.append(self.talk(f"GET /{private} \xff\r\n\r\n".encode("latin-1")))
            answers.append(self.talk(f"GET /#{private} HTTP/1.1\r\n\r\n".encode()))
            answers.append(
                self.talk(f"PRIVATE /?{private} HTTP/1.1\r\nX: PRIVATE\r\n\r\n".encode())
            )
            answers.append(self.talk(f"private /?{private} HTTP/1.1\r\n\r\n".encode()))
        log = self.log.getvalue()
        self.assertGreater(log.count("\n"), 200)
        told = b"".join(
            answer if isinstance(answer, bytes) else answer.body + str(answer.headers).encode()
            for answer in answers
            if isinstance(answer, bytes) or answer.status != 302
        )
        for secret in [SECRET, "another-secret", "wrong-secret"] + [
            fake.secret for fake in self.fakes
        ]:
            self.assertNotIn(secret, log)
            self.assertNotIn(secret.encode(), told)
        self.assertNotIn("PRIVATE", log)
        self.assertNotIn("checksum=", log)
        self.assertNotIn("Traceback", log)
        self.assertIsNone(re.search("[0-9a-f]{40}", log))
        self.assertNotIn(b"checksum=", told)

    def test_a_query_that_is_taken_for_a_path_is_not_in_the_log(self):
        query = "fullName=PRIVATE&password=PRIVATE&checksum=" + "0123456789" * 4
        for mark in ("", "&", "%3F", "/", ";"):
            for text in (query, query.replace("=", "%3D").replace("&", "%26")):
                self.clear_log()
                self.assertEqual(self.http(f"/bigbluebutton/api/join{mark}{text}").status, 404)
                self.assertTrue(until(lambda: "notFound" in self.log.getvalue()))
                self.assertIn("/bigbluebutton/api/join", self.log.getvalue())
                self.assertNotIn("PRIVATE", self.log.getvalue())
                self.assertNotIn("0123456789", self.log.getvalue())


CROWD = 20


class CrowdTest(ClusterTest):
    servers = 1
    connections = CROWD
    # nobody goes because of its own deadline
    limits = (("HEAD_TIMEOUT", 1000),)

    def open(self, count, data=b""):
        """Open so many connections, and send this over each; wait until each is served."""
        before = len(self.balancer.handlers)
        connections = [socket.create_connection(("127.0.0.1", self.port), 5) for _ in range(count)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.sendall(data)
        self.assertTrue(until(lambda: len(self.balancer.handlers) == before + count))
        return connections

    def verified(self):
        """How many calls that were verified are not answered yet."""
        handlers = list(self.balancer.handlers)
        return sum(handler.waiting_since == tinyscale.NEVER for handler in handlers)

    def test_who_says_nothing_must_go_when_others_want_in(self):
        form = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 99\r\n\r\nx"
        for data in (
            b"",
            b"GET /bigbl",
            b"GET /health HTTP/1.1\r\nX-Slow: ",
            b"POST /bigbluebutton/api/end HTTP/1.1\r\n" + form,
        ):
            mute = self.open(CROWD, data)
            self.clock.ahead += 2
            self.assertEqual(self.http("/health").status, 200)
            closed, _, _ = select.select(mute, [], [], 5)
            self.assertEqual({connection.recv(1000) for connection in closed}, {b""})
            for connection in mute:
                connection.close()
            self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_who_has_kept_us_waiting_longest_goes_first_and_nobody_else(self):
        (slowest,) = self.open(1, b"GET /slow")
        self.clock.ahead = 100
        others = self.open(CROWD - 1, b"GET /")
        # so the others have only just come, however slow this machine is
        self.clock.ahead = 50
        self.assertEqual(self.http("/health").status, 200)
        self.assertEqual(slowest.recv(1000), b"")
        self.assertEqual(select.select(others, [], [], 0)[0], [])
        for connection in others:
            connection.sendall(b"health HTTP/1.1\r\n\r\n")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 "))

    def test_who_does_not_take_its_answer_must_go_too(self):
        self.fakes[0].faults["newCall"] = status(200, b"x" * 10_000_000, "text/plain")
        query = signed("newCall", "")
        self.open(CROWD, f"GET /bigbluebutton/api/newCall?{query} HTTP/1.1\r\n\r\n".encode())
        self.assertTrue(until(lambda: self.fakes[0].count("newCall") == CROWD))
        self.assertTrue(until(lambda: not self.verified(), 20))
        self.clock.ahead += 2
        self.assertEqual(self.http("/health").status, 200)

    def test_who_takes_its_answer_slowly_may_stay_before_who_does_nothing(self):
        text = b"x" * 10_000_000
        self.fakes[0].faults["newCall"] = status(200, text, "text/plain")
        query = signed("newCall", "")
        (reader,) = self.open(
            1, f"GET /bigbluebutton/api/newCall?{query} HTTP/1.1\r\n\r\n".encode()
        )
        self.assertTrue(until(lambda: self.fakes[0].count("newCall") and not self.verified()))
        (handler,) = self.balancer.handlers
        self.clock.ahead = 100
        self.open(CROWD - 1, b"GET /")
        self.clock.ahead = 150
        received = b""
        while handler.waiting_since < self.clock.monotonic() - 40:
            received += reader.recv(65536)
            self.assertLess(len(received), len(text))
        for _ in range(3):
            self.assertEqual(self.http("/health").status, 200)
        pieces = [received]
        while pieces[-1]:
            pieces.append(reader.recv(65536))
        self.assertTrue(b"".join(pieces).endswith(b"\r\n\r\n" + text))

    def test_who_is_being_answered_may_stay(self):
        gate, arrived = threading.Event(), threading.Event()
        self.addCleanup(gate.set)
        self.fakes[0].faults["sendChatMessage"] = held(gate, arrived)
        query = signed("sendChatMessage", "meetingID=room")
        self.create("room")
        self.assertTrue(until(lambda: not self.balancer.handlers))
        (answered,) = self.open(
            1, f"GET /bigbluebutton/api/sendChatMessage?{query} HTTP/1.1\r\n\r\n".encode()
        )
        self.assertTrue(arrived.wait(5))
        self.clock.ahead += 20
        self.open(CROWD - 1)
        self.clock.ahead += 2
        for _ in range(3):
            self.assertEqual(self.http("/health").status, 200)
        gate.set()
        self.assertTrue(answered.recv(1000).startswith(b"HTTP/1.1 200 OK"))

    def test_who_sends_slides_may_stay_once_its_checksum_was_right(self):
        head = "Content-Type: text/xml\r\nContent-Length: 9\r\n\r\n"
        create = "/bigbluebutton/api/create"
        right, wrong = (
            f"POST {create}?{signed('create', 'meetingID=room', secret)} HTTP/1.1\r\n{head}"
            for secret in (SECRET, "wrong secret")
        )
        (teacher,) = self.open(1, right.encode() + b"<sli")
        self.assertTrue(until(self.verified))
        self.clock.ahead += 20
        self.open(CROWD - 1)
        self.clock.ahead += 2
        for _ in range(3):
            self.assertEqual(self.http("/health").status, 200)
        # nor does it hold up who is refused
        self.assertIn(b"checksumError", self.talk(wrong.encode() + b"<slides/>"))
        teacher.sendall(b"des/>")
        self.assertIn(b"SUCCESS", teacher.recv(1000))
        self.assertEqual(self.fakes[0].calls[-1][3], b"<slides/>")

    def crowd_of_calls(self, gate):
        """As many calls as there may be connections, and one connection more that waits."""
        self.addCleanup(gate.set)
        self.fakes[0].faults["newCall"] = held(gate)
        query = signed("newCall", "")
        calls = self.open(
            CROWD, f"GET /bigbluebutton/api/newCall?{query} HTTP/1.1\r\n\r\n".encode()
        )
        self.assertTrue(until(lambda: self.fakes[0].count("newCall") == CROWD))
        waiting = socket.create_connection(("127.0.0.1", self.port), 5)
        self.addCleanup(waiting.close)
        waiting.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        # it is accepted, and finds no room
        self.assertTrue(until(lambda: not tinyscale.is_readable(self.balancer.socket)))
        self.clock.ahead += 2
        return calls, waiting

    def test_if_all_are_being_answered_who_comes_waits_until_one_has_its_answer(self):
        gate = threading.Event()
        calls, waiting = self.crowd_of_calls(gate)
        self.assertEqual(select.select([*calls, waiting], [], [], 0.1)[0], [])
        gate.set()
        for connection in calls:
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 404 "))
            connection.close()
        self.assertTrue(waiting.recv(1000).startswith(b"HTTP/1.1 200 "))

    def test_a_stop_does_not_wait_for_room(self):
        gate = threading.Event()
        self.crowd_of_calls(gate)
        with mock.patch.object(tinyscale, "DRAIN_TIMEOUT", 0.1):
            stop = background(tinyscale.drain, self.balancer)
            self.addCleanup(stop.result, 20)
            # long before the calls come to their end
            self.assertTrue(until(stop.done, 6))
            self.assertFalse(gate.is_set())
        self.assertIn("stopped with calls in progress", self.log.getvalue())

    def test_nothing_is_left_behind(self):
        """After 1,500 calls and 300 broken connections: threads, sockets, claims, memory."""

        def sockets():
            count = 0
            for name in os.listdir("/proc/self/fd"):
                # closed meanwhile
                with contextlib.suppress(OSError):
                    count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            return count

        if not os.path.isdir("/proc/self/fd"):
            self.skipTest("counts sockets in /proc")
        self.create("room")
        self.survey()

        def calls(number, many):
            some = (
                ("isMeetingRunning", f"meetingID=no{number}"),
                ("getMeetings", ""),
                ("bad", "x"),
                ("getMeetingInfo", "meetingID=room"),
                ("create", "meetingID=room"),
                *[("join", "meetingID=room")] * 15,
            )
            for count in range(many):
                call, query = some[count % len(some)]
                path = f"/bigbluebutton/api/{call}?{signed(call, query)}"
                with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                    connection.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
                    self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 "))

        self.together([lambda number=number: calls(number, 40) for number in range(8)])
        before = threading.active_count(), sockets()
        self.together([lambda number=number: calls(number, 180) for number in range(8)])
        for _ in range(300):
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(b"GET /health HT")
        # pools may have filled; a leak would be hundreds
        self.assertTrue(
            until(
                lambda: threading.active_count() <= before[0] + 60 and sockets() <= before[1] + 60
            ),
            (before, threading.active_count(), sockets()),
        )
        self.survey()
        self.assertTrue(until(lambda: not self.balancer.handlers))
        self.clock.ahead += tinyscale.MEETING_TTL
        self.survey()
        self.assertEqual((self.directory.probes, self.directory.absent), ({}, {}))
        self.assertEqual(self.directory.denials, {})
        internal_id = self.fakes[0].meetings["room"].internal_id
        self.assertEqual(set(self.directory.meetings), {"room", internal_id})


# ---- where calls go ------------------------------------------------------------------------------


class RoutingTest(ClusterTest):
    def test_new_meetings_go_round_the_list(self):
        for number in range(9):
            self.assertEqual(self.create(f"room{number}").returncode, "SUCCESS")
        self.assertEqual(
            [list(fake.meetings) for fake in self.fakes],
            [["room0", "room3", "room6"], ["room1", "room4", "room7"], ["room2", "room5", "room8"]],
        )
        self.assertEqual(self.log.getvalue().count("(in turn)"), 9)

    def test_in_turn_nothing_counts_but_the_order_of_the_list(self):
        self.fakes[0].put("crowd", 500)
        self.survey()
        self.create_rooms(3)
        self.clock.ahead += 1000
        self.fakes[0].put("more", 500)
        self.survey()
        self.create_rooms(3, "later")
        names = [self.having(f"{name}{n}")[0].name for name in ("room", "later") for n in range(3)]
        self.assertEqual(names, ["bbb1", "bbb2", "bbb3"] * 2)

    def test_a_breakout_room_takes_no_turn(self):
        self.create_rooms(2)
        breakout = self.create("breakout", "&isBreakout=true&parentMeetingID=room0")
        self.assertEqual(breakout.returncode, "SUCCESS")
        self.create("next")
        self.assertEqual(self.having("next"), [self.fakes[2]])

    def test_weights_share_the_turns_and_cordoned_servers_get_none(self):
        entries = self.entries()
        entries[0]["weight"], entries[2]["cordoned"] = 3, True
        self.write_servers(entries)
        self.start()
        for number in range(8):
            self.create(f"room{number}")
        self.assertEqual(
            [self.having(f"room{number}")[0].name for number in range(8)],
            ["bbb1", "bbb1", "bbb1", "bbb2"] * 2,
        )

    def test_join_sends_the_browser_to_the_meetings_server_without_a_call(self):
        self.create("room")
        (owner,) = self.having("room")
        self.survey()
        query = "&fullName=J%C3%BCrgen+M&meetingID=room&password=ap"
        answer = self.get("join", query)
        self.assertEqual(
            (answer.status, answer.body, [fake.calls for fake in self.fakes]),
            (302, b"", [[], [], []]),
        )
        self.assertEqual(
            answer.headers["Location"],
            f"{owner.url}/bigbluebutton/api/join?{signed('join', query, owner.secret, 'sha256')}",
        )
        self.assertNotIn("Set-Cookie", answer.headers)
        self.assertNotIn("Content-Type", answer.headers)

    def test_any_other_call_costs_one_call_to_the_meetings_server(self):
        for number in range(3):
            self.create(f"room{number}")
        self.fakes[1].meetings["room1"].people = 2
        self.survey()
        for call, expected in (
            ("getMeetingInfo", "room1"),
            ("isMeetingRunning", None),
            ("sendChatMessage", None),
        ):
            with self.subTest(call):
                answer = self.get(call, "meetingID=room1&message=hi")
                self.assertEqual((answer.returncode, answer.meetingID), ("SUCCESS", expected))
                self.assertEqual(
                    (self.counts(call), sum(len(fake.calls) for fake in self.fakes)), ([0, 1, 0], 1)
                )
                self.survey()

    def test_the_query_reaches_the_server_byte_for_byte(self):
        self.create("room")
        (owner,) = self.having("room")
        for query in (
            "meetingID=room&a=+%20&&b=!*()~&c",
            "&meetingID=room",
            "&&meetingID=%72oom&x=%c3%BC&",
        ):
            for digest in DIGESTS.values():
                self.survey()
                self.assertEqual(self.get("getMeetingInfo", query, digest=digest).meetingID, "room")
                self.assertEqual(
                    owner.calls[0][1], signed("getMeetingInfo", query, owner.secret, "sha256")
                )

    def test_servers_are_signed_to_as_their_entry_says(self):
        self.write_servers(
            [
                dict(entry, checksum=digest)
                for entry, digest in zip(self.entries(), ("sha1", "sha384", "sha512"))
            ]
        )
        self.start()
        for fake, length in zip(self.fakes, (40, 96, 128)):
            fake.put(fake.name)
            self.assertEqual(
                self.get("getMeetingInfo", f"meetingID={fake.name}").returncode, "SUCCESS"
            )
            self.assertEqual(len(dict(parse_qsl(fake.calls[-1][1]))["checksum"]), length)

    def test_a_meeting_that_is_not_remembered_is_probed_on_all_servers_once(self):
        self.fakes[2].put("stranger")
        self.assertEqual(self.get("getMeetingInfo", "meetingID=stranger").meetingID, "stranger")
        # the answer does not wait for the others
        self.assertTrue(until(lambda: self.counts("getMeetingInfo") == [1, 1, 2]))
        self.survey()
        self.assertEqual(self.get("getMeetingInfo", "meetingID=stranger").meetingID, "stranger")
        self.assertEqual(self.counts("getMeetingInfo"), [0, 0, 1])

    def test_many_who_ask_for_an_unknown_meeting_share_one_probe(self):
        meeting, gate = self.fakes[1].put("stranger"), threading.Event()
        self.fakes[1].faults["getMeetingInfo"] = held(gate)
        jobs = [
            lambda: self.get("join", f"meetingID={meeting.id}&fullName=X").headers["Location"]
        ] * 20
        probe = mock.Mock(side_effect=self.directory.probe)
        with mock.patch.object(self.directory, "probe", probe):
            # when all of them wait
            background(lambda: until(lambda: probe.call_count == len(jobs)) and gate.set())
            urls = self.together(jobs)
        self.assertEqual({url.partition("/big")[0] for url in urls}, {self.fakes[1].url})
        self.assertEqual(self.counts("getMeetingInfo"), [1, 1, 1])

    def test_who_polls_for_a_meeting_to_begin_causes_one_probe_a_second(self):
        self.assertEqual(tinyscale.ABSENCE_TTL, 1)
        # long enough for a slow machine
        with mock.patch.object(tinyscale, "ABSENCE_TTL", 1000):
            for ahead, expected in ((0, [1, 1, 1]), (500, [1, 1, 1]), (501, [2, 2, 2])):
                self.clock.ahead += ahead
                for _ in range(10):
                    answer = self.get("isMeetingRunning", "meetingID=soon")
                    self.assertEqual(answer.running, "false")
                self.assertEqual(self.counts("getMeetingInfo"), expected)
            # not through us: a create must not believe the last probe
            self.fakes[1].put("soon")
            self.assertEqual(
                (self.create("soon").messageKey, self.having("soon")),
                ("duplicateWarning", [self.fakes[1]]),
            )
        self.clock.ahead += tinyscale.MEETING_TTL
        self.survey()
        self.assertEqual((self.directory.probes, self.directory.absent), ({}, {}))
        self.assertEqual(self.directory.denials, {})

    def test_ids_are_compared_whole(self):
        meeting = self.fakes[1].put("10")
        self.fakes[0].put("1")
        self.fakes[2].put("a&b <c> \u00fc")
        for meeting_id, owner in (
            ("1", 0),
            ("10", 1),
            (meeting.internal_id, 1),
            ("a&b <c> \u00fc", 2),
        ):
            answer = self.get("join", f"meetingID={quote_plus(meeting_id)}&fullName=X")
            self.assertTrue(
                answer.headers["Location"].startswith(self.fakes[owner].url), meeting_id
            )
        prefix = meeting.internal_id[:5]
        self.assertEqual(self.directory.find(prefix), (None, "nowhere"))

    def test_an_internal_id_is_remembered_too(self):
        self.create("room")
        (owner,) = self.having("room")
        internal_id = owner.meetings["room"].internal_id
        owner.calls.clear()
        for _ in range(2):
            answer = self.get("join", f"meetingID={internal_id}&fullName=X")
            self.assertTrue(answer.headers["Location"].startswith(owner.url))
            self.assertEqual(owner.calls, [])
            self.survey()

    def test_for_a_meeting_that_exists_nowhere_the_error_is_bbbs_own(self):
        self.assertEqual(self.get("getMeetingInfo", "meetingID=no").messageKey, "notFound")
        self.assertEqual(self.get("isMeetingRunning", "meetingID=no").running, "false")
        self.assertEqual(self.get("end", "meetingID=no&password=x").messageKey, "notFound")
        self.assertEqual(self.get("getMeetingInfo", "").messageKey, "missingParamMeetingID")
        self.assertEqual(self.get("create", "name=x").messageKey, "missingParamMeetingID")
        location = self.get("join", "meetingID=no&fullName=X").headers["Location"]
        self.assertTrue(
            location.startswith(self.fakes[0].url + "/bigbluebutton/api/join?meetingID=no")
        )

    def test_a_denial_is_passed_on_only_after_the_other_servers_were_asked(self):
        for call in ("getMeetingInfo", "isMeetingRunning", "end"):
            with self.subTest(call):
                self.fakes[0].put("room")
                self.survey()
                self.fakes[0].meetings.clear()
                self.fakes[1].put("room")
                answer = self.get(call, "meetingID=room")
                self.assertEqual(answer.returncode, "SUCCESS")
                self.assertNotEqual(answer.running, "false")
                self.assertEqual(self.fakes[1].count(call), 2 if call == "getMeetingInfo" else 1)
                self.fakes[1].meetings.clear()

    def test_a_meeting_that_was_probed_and_moved_within_a_second_is_found_again(self):
        self.fakes[0].put("room")
        self.assertIs(self.directory.find("room")[0], self.directory.servers[0])
        self.fakes[1].meetings["room"] = self.fakes[0].meetings.pop("room")
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").meetingID, "room")
        self.assertEqual(self.directory.find("room")[0], self.directory.servers[1])

    def test_a_join_without_redirect_that_is_denied_is_sent_to_the_right_server(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[1].meetings["room"] = self.fakes[0].meetings.pop("room")
        self.assertEqual(
            self.get("join", "meetingID=room&fullName=X&redirect=false").messageKey,
            "successfullyJoined",
        )
        self.assertEqual(self.counts("join"), [1, 1, 0])

    def test_a_denial_about_something_else_asks_nobody_else(self):
        self.create("room")
        self.survey()
        self.assertEqual(
            self.get("end", "meetingID=room&password=wrong").messageKey, "invalidPassword"
        )
        self.assertEqual(self.get("isMeetingRunning", "meetingID=room").running, "false")
        self.assertEqual([len(fake.calls) for fake in self.fakes], [4, 0, 0])
        self.assertEqual(len(self.having("room")), 1)

    def test_what_a_survey_no_longer_lists_is_forgotten_but_not_what_was_placed_meanwhile(self):
        self.create("old")
        self.fakes[0].meetings.clear()
        gate, arrived = threading.Event(), threading.Event()

        def after_listing(handler):
            answer = proper(handler)
            arrived.set()
            gate.wait(10)
            return answer

        self.fakes[1].faults["getMeetings"] = after_listing
        server = self.directory.servers[1]
        survey = background(tinyscale.survey, self.directory, server)
        self.assertTrue(arrived.wait(10))
        self.create("new")
        self.assertEqual(self.having("new"), [self.fakes[1]])
        gate.set()
        survey.result(10)
        tinyscale.survey(self.directory, self.directory.servers[0])
        self.assertNotIn("old", self.directory.meetings)
        self.assertEqual(self.directory.find("new")[1], "remembered")

    def test_memory_is_believed_only_for_a_while(self):
        self.create("room")
        (owner,) = self.having("room")
        other = self.fakes[1]
        other.meetings["room"] = owner.meetings.pop("room")
        self.assertTrue(
            self.get("join", "meetingID=room&fullName=X").headers["Location"].startswith(owner.url)
        )
        self.clock.ahead += tinyscale.MEETING_TTL
        self.assertTrue(
            self.get("join", "meetingID=room&fullName=X").headers["Location"].startswith(other.url)
        )

    def test_twins_are_named_once_and_the_newer_one_counts(self):
        self.fakes[0].put("no twin")
        self.survey()
        self.assertNotIn("runs on", self.log.getvalue())
        self.fakes[0].meetings.clear()
        self.fakes[0].put("room", created=1000)
        self.fakes[2].put("room", created=2000)
        self.fakes[1].put("room", created=1500)
        servers = self.directory.servers
        # one after the other: of answers to questions that were put at one moment either may count
        for order in (servers, servers[::-1], servers):
            for server in order:
                tinyscale.survey(self.directory, server)
            self.assertIs(self.directory.find("room")[0], servers[2])
        self.assertEqual(self.log.getvalue().count("'room' runs on"), 1)
        for fake in self.fakes:
            self.assertIn(fake.url, self.log.getvalue().partition("'room' runs on")[2])
        listed = self.get("getMeetings").xml.findall("meetings/meeting")
        self.assertEqual([item.findtext("createTime") for item in listed], ["2000"])

    def test_join_without_redirect_is_relayed_with_its_cookie(self):
        self.create("room")
        (owner,) = self.having("room")
        for value in ("false", "FALSE", "0", "yes"):
            answer = self.get("join", f"meetingID=room&fullName=X&redirect={value}")
            self.assertEqual((answer.status, answer.messageKey), (200, "successfullyJoined"))
            self.assertTrue(answer.headers["Set-Cookie"].startswith("JSESSIONID="))
        for value in ("true", "TRUE", ""):
            answer = self.get("join", f"meetingID=room&fullName=X&redirect={value}")
            self.assertTrue(
                answer.headers["Location"].startswith(owner.url + "/bigbluebutton/api/join?")
            )
        answer = self.get(
            "join",
            "meetingID=no&fullName=X&redirect=false&errorRedirectUrl=https%3A%2F%2Fexample.org",
        )
        self.assertEqual(
            (answer.status, answer.headers["Location"].partition("?")[0]),
            (302, "https://example.org"),
        )

    def test_join_is_called_with_get_only_and_a_body_with_it_is_not_read(self):
        self.create("room")
        query, headers = "meetingID=room&fullName=X", {"Content-Type": "text/xml"}
        self.assertEqual(self.get("join", query, method="POST").status, 405)
        # some clients send one with each GET; but every guest knows a checksum of a join
        with mock.patch.object(tinyscale.Handler, "read_body", side_effect=KeyError):
            answer = self.get("join", query, body=b"<" * 10**6, headers=headers)
        self.assertEqual(answer.status, 302)

    def test_the_checksum_of_a_join_link_is_good_for_nothing_else(self):
        """Call and query are hashed without a separator, so its boundary can be moved."""
        self.create("room")
        self.survey()
        query = signed("join", "fullName=G&meetingID=room")
        for moved in (
            f"joinfullName?={query[len('fullName=') :]}",
            f"joi?n{query}",
            f"/joi?n{query}",
            f"joi/?n{query}",
            f"/joi/?n{query}",
            f"join/x?{query}",
            f"j?oin{query}",
        ):
            for method, body in (("GET", None), ("POST", b"<x/>")):
                answer = self.http(
                    f"/bigbluebutton/api/{moved}", method, body, {"Content-Type": "text/xml"}
                )
                self.assertEqual(answer.status, 404, moved)
        self.assertEqual([fake.calls for fake in self.fakes], [[], [], []])

    def test_a_breakout_room_is_created_on_its_parents_server(self):
        self.create("zero")
        self.create("parent")
        (parent,) = self.having("parent")
        for number, parent_id in enumerate(
            ("parent", parent.meetings["parent"].internal_id, "parent", "parent")
        ):
            answer = self.create(
                f"breakout{number}",
                f"&isBreakout=true&sequence={number}&parentMeetingID={parent_id}",
            )
            self.assertEqual(
                (answer.returncode, self.having(f"breakout{number}")), ("SUCCESS", [parent])
            )
        # once it is there nobody is asked for its parent, not even if that has ended
        del parent.meetings["parent"]
        self.survey()
        again = self.create("breakout0", "&isBreakout=true&parentMeetingID=parent")
        self.assertNotEqual(again.messageKey, "serverUnavailable")
        self.assertEqual(sum(self.counts("getMeetingInfo")), 0)
        lost = self.create("lost", "&isBreakout=true&parentMeetingID=no")
        self.assertEqual(lost.messageKey, "parentMeetingDoesNotExist")
        self.assertEqual(self.create("plain", "&parentMeetingID=").returncode, "SUCCESS")
        self.assertNotIn("lost", self.directory.meetings)

    def test_calls_that_do_not_exist_yet_go_to_who_has_the_meeting_or_to_any_server(self):
        self.fakes[1].put("room")
        for query, owner in (("meetingID=room", 1), ("meetingID=no", 0), ("colour=red", 0)):
            answer = self.get("paintTheWalls", query)
            self.assertEqual((answer.status, answer.body), (404, b"<html>no such call</html>"))
            self.assertEqual(
                self.counts("paintTheWalls"), [int(number == owner) for number in range(3)]
            )
            self.survey()

    def test_two_tinyscales_in_front_of_the_same_servers_agree(self):
        ports = [self.port]
        self.start()
        ports.append(self.port)
        for number in range(6):
            self.port = ports[number % 2]
            self.create(f"room{number}")
            self.port = ports[1 - number % 2]
            (owner,) = self.having(f"room{number}")
            location = self.get("join", f"meetingID=room{number}&fullName=X").headers["Location"]
            self.assertTrue(location.startswith(owner.url))
            self.assertEqual(self.create(f"room{number}").messageKey, "duplicateWarning")
        self.get("end", "meetingID=room5")  # through one of them; the other one believes its memory
        self.port = ports[1]
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room5").messageKey, "notFound")

    def test_servers_behind_one_reverse_proxy_are_told_apart_by_their_paths(self):
        fakes = self.fakes

        class Proxy(fakes[0].server.RequestHandlerClass):
            def do_GET(self):
                _, name, rest = self.path.split("/", 2)
                self.bbb = next(fake for fake in fakes if fake.name == name)
                self.path = "/" + rest
                super().do_GET()

            do_POST = do_GET

        fakes[0].server.RequestHandlerClass = Proxy
        origin = fakes[0].url
        endings = ("", "/bigbluebutton/", "/bigbluebutton/api")
        self.write_servers(
            [
                {"host": f"{origin}/{fake.name}{ending}", "secret": fake.secret}
                for fake, ending in zip(fakes, endings)
            ]
        )
        self.start()
        self.assertEqual(self.states(), ["up"] * 3)
        self.create_rooms(3)
        for number, fake in enumerate(fakes):
            query = f"fullName=X&meetingID=room{number}"
            self.assertEqual(list(fake.meetings), [f"room{number}"])
            location = self.get("join", query).headers["Location"]
            expected = signed("join", query, fake.secret, "sha256")
            self.assertEqual(location, f"{origin}/{fake.name}/bigbluebutton/api/join?{expected}")
            self.assertEqual(self.get("end", f"meetingID=room{number}").returncode, "SUCCESS")
        self.assertEqual(self.get("getMeetings").messageKey, "noMeetings")

    def test_a_slash_too_many_before_or_behind_a_call_is_forgiven(self):
        calls = (
            ("create", "meetingID=room&name=A+room"),
            ("getMeetingInfo", "meetingID=room"),
            ("join", "meetingID=room&fullName=X&redirect=false"),
            ("hooks/list", ""),
        )
        for call, query in calls:
            for path in (f"/{call}", f"{call}/", f"/{call}/"):
                with self.subTest(path):
                    self.survey()
                    answer = self.http(f"/bigbluebutton/api/{path}?{signed(call, query)}")
                    self.assertEqual((answer.status, answer.returncode), (200, "SUCCESS"))
                    # the servers see none
                    self.assertGreater(sum(self.counts(call)), 0)
                    self.assertEqual(sum(self.counts(path)), 0)
        # Greenlight's redirect, which a browser follows
        location = self.http(
            f"/bigbluebutton/api//join?{signed('join', 'meetingID=room&fullName=X')}"
        ).headers["Location"]
        self.assertIn("/bigbluebutton/api/join?", location)

    def test_other_slashes_are_none_of_ours(self):
        self.survey()
        for path in (
            "//getMeetings",
            "getMeetings//",
            "hooks//list",
            "//hooks/list",
            "hooks/list//",
            "/",
            "getMeetings/./",
            "getMeetings%2F",
        ):
            with self.subTest(path):
                for call in ("getMeetings", "hooks/list", path):
                    answer = self.http(f"/bigbluebutton/api/{path}?{signed(call, '')}")
                    self.assertEqual(answer.status, 404)
        self.assertEqual(self.counts("getMeetings", "hooks/list"), [0, 0, 0])


class PlacementTest(ClusterTest):
    """TINYSCALE_PLACEMENT=load: each new meeting goes to the server with the least load."""

    settings = (("TINYSCALE_PLACEMENT", "load"),)
    limits = (("PROBE_TIMEOUT", 20),)

    def fill(self, *rooms, are_young=False):
        """Rooms with so many people on each server, which we have known for long, or not."""
        for fake, people in zip(self.fakes, rooms):
            for number, count in enumerate(people):
                fake.put(f"{fake.name}'s {number}", count)
        self.survey()
        if not are_young:
            self.clock.ahead += 15 * 60
            self.survey()

    def place(self, count, name="new"):
        """Create rooms, one after the other. Return the numbers of their servers, as a text."""
        self.create_rooms(count, name)
        return "".join(self.having(f"{name}{number}")[0].name[-1] for number in range(count))

    def loads(self, people):
        """The servers' loads after new rooms were placed beside so many people."""
        new = [sum("new" in name for name in fake.meetings) for fake in self.fakes]
        return [before + 10 * count for before, count in zip(people, new)]

    def weigh(self, *weights):
        self.load([dict(entry, weight=n) for entry, n in zip(self.entries(), weights)])

    def test_what_has_ended_counts_no_more_also_while_the_list_must_be_mended(self):
        self.fill([30, 30], [20], [25])
        odd = self.fakes[0].meetings["bbb1's 0"]
        odd.custom = attendee("1")
        del self.fakes[0].meetings["bbb1's 1"]
        odd.people = 1
        self.survey()
        self.assertEqual(self.directory.load(self.directory.servers[0]), 1)
        self.assertEqual(self.place(2), "11")

    def test_the_order_of_placements_follows_from_the_lists(self):
        for rooms, expected in (
            # ties in turn
            (([], [], []), "123123"),
            (([50], [50], [20, 30]), "123123"),
            # a new room counts for 10: 30, 0, 15; 30, 20, 15; 30, 20, 25; 30, 30, 25; 30, 30, 35
            (([30], [], [15]), "223231"),
            # people count, not rooms
            (([1, 1, 1, 1, 1], [2, 4], [7]), "123123"),
            (([9, 9], [], [1] * 19), "221321"),
            # one that is far behind gets two of three
            (([200], [200], []), "331332"),
        ):
            with self.subTest(rooms):
                for fake in self.fakes:
                    fake.meetings.clear()
                # not where the circle of the last one stood
                self.start()
                self.fill(*rooms)
                self.assertEqual(self.place(6), expected)
        self.assertEqual(self.log.getvalue().count("(least load)"), 36)

    def test_a_young_room_counts_for_ten_people_at_least(self):
        self.fill([1, 0], [19], [12, 9], are_young=True)
        # 20, 19, 22; 20, 29, 22; 30, 29, 22; 30, 29, 32; 30, 39, 32
        self.assertEqual(self.place(5), "21321")

    def test_a_room_is_young_for_15_minutes_by_our_own_clock(self):
        self.fill([0, 0, 0], [12], [40], are_young=True)
        for ahead, expected in ((0, "2"), (15 * 60 - 30, "2"), (60, "1")):
            self.clock.ahead += ahead
            # a survey is news of it, but not the first
            self.survey()
            self.assertEqual(self.place(1, f"after {ahead} "), expected)
            (owner,) = self.having(f"after {ahead} 0")
            del owner.meetings[f"after {ahead} 0"]
            self.survey()

    def test_a_room_that_begins_again_is_young_again(self):
        self.fill([0, 0, 0], [12], [40])
        self.assertEqual(self.place(1), "1")
        for meeting_id in list(self.fakes[0].meetings):
            self.fakes[0].put(meeting_id, 0)
        self.survey()
        self.assertEqual(self.place(1, "next"), "2")

    def test_a_repeated_create_does_not_empty_its_room(self):
        """Front ends repeat it for each moderator that comes; what it answers tells no people."""
        self.fill([50], [20], [20])
        self.assertEqual(self.create("bbb1's 0").messageKey, "duplicateWarning")
        self.assertEqual(self.place(4), "2323")

    def test_breakout_rooms_are_left_out(self):
        for number in range(5):
            self.fakes[0].put(f"breakout{number}", 100).breakout = True
        self.fill([15], [25], [30], are_young=True)
        # 15, 25, 30; 25, 25, 30, in turn; 25, 35, 30; 35, 35, 30
        self.assertEqual(self.place(4), "1213")

    def test_a_load_is_divided_by_the_weight(self):
        self.weigh(2, 1, 1)
        self.fill([30], [20], [20])
        # 15, 20, 20; 20, 20, 20: the first one has two turns; 25, 20, 20; 25, 30, 20; 25, 30, 30
        self.assertEqual(self.place(5), "11231")
        self.place(36, "newer")
        # 480 people in four shares
        first, second, third = self.loads([30, 20, 20])
        self.assertEqual((first, second, third), (240, 120, 120))

    def test_a_burst_of_100_creates_between_two_surveys_spreads_evenly(self):
        with futures.ThreadPoolExecutor(20) as threads:
            answers = list(threads.map(lambda number: self.create(f"new{number}"), range(100)))
        self.assertEqual({answer.returncode for answer in answers}, {"SUCCESS"})
        self.assertEqual(sorted(len(fake.meetings) for fake in self.fakes), [33, 33, 34])

    def test_a_burst_fills_up_those_that_have_less(self):
        self.fill([100], [], [20, 30])
        with futures.ThreadPoolExecutor(20) as threads:
            list(threads.map(lambda number: self.create(f"new{number}"), range(100)))
        loads = self.loads([100, 0, 50])
        self.assertEqual(sum(loads), 1150)
        self.assertLessEqual(max(loads) - min(loads), 10)

    def test_creates_that_are_not_answered_yet_count(self):
        self.fill([], [20], [])
        gate = threading.Event()
        self.addCleanup(gate.set)
        for fake in self.fakes:
            fake.faults["create"] = held(gate)
        creates = []
        for number in range(8):
            creates.append(background(self.create, f"new{number}"))
            self.assertTrue(until(lambda n=number: sum(self.counts("create")) > n, 10))
        loads = [people + 10 * count for people, count in zip((0, 20, 0), self.counts("create"))]
        self.assertEqual(sorted(loads), [30, 30, 40])
        gate.set()
        self.assertEqual({create.result(10).returncode for create in creates}, {"SUCCESS"})

    def test_one_that_comes_back_empty_never_gets_more_than_two_in_a_row(self):
        self.fill([500], [500], [500])
        self.fakes[1].down()
        self.survey()
        self.assertEqual(self.states(), ["up", "down", "up"])
        self.fakes[1].up()
        self.fakes[1].meetings.clear()
        self.survey()
        order = self.place(30)
        self.assertNotRegex(order, r"(.)\1\1")
        self.assertEqual(order.count("2"), 20)

    def test_if_no_other_one_is_able_it_gets_them_all(self):
        self.load([dict(entry, cordoned=n != 1) for n, entry in enumerate(self.entries())])
        self.fill([], [100], [])
        self.assertEqual(self.place(5), "22222")
        self.load()
        self.assertEqual(self.place(2, "then"), "31")


class Asking(Exception):
    """The program would ask the servers for a meeting now, and wait for what they say."""


class PlayedDirectory(tinyscale.Directory):
    """A Directory without threads: it raises where it would wait, and is asked again later."""

    def __init__(self, clock):
        super().__init__(clock)
        # what came of the probe of a meeting, for who asks again
        self.heard = {}

    def probe(self, meeting_id):
        if meeting_id not in self.heard:
            raise Asking
        return self.heard.pop(meeting_id)


def remember_without_age(self, server, info, asked):
    tinyscale.Directory.remember(self, server, info, self.clock())


def forget_without_age(self, server, meeting_id, asked):
    tinyscale.Directory.forget(self, server, meeting_id, self.clock())


def release_without_remembering(self, meeting_id, may_have, info=None):
    tinyscale.Directory.release(self, meeting_id, may_have)


def release_when_silent(self, meeting_id, may_have, info=None):
    tinyscale.Directory.release(self, meeting_id, False, info)


def tie_without_claims(self, meeting_id):
    tie = tinyscale.Directory.tie(self, meeting_id)
    return None if isinstance(tie, tinyscale.Claim) else tie


def release_if_claimed(self, meeting_id, may_have, info=None):
    if meeting_id in self.claims:
        tinyscale.Directory.release(self, meeting_id, may_have, info)


def assign_where_silence_is_a_no(self, meeting_id, *args):
    try:
        return tinyscale.Directory.assign(self, meeting_id, *args)
    except tinyscale.Unavailable as error:
        if "cordoned" not in error.note:
            raise
        self.meetings.pop(meeting_id, None)
        self.claims.pop(meeting_id, None)
        return tinyscale.Directory.assign(self, meeting_id, *args)


def is_lost_at_once(self, server):
    return server.is_down


BROKEN = {
    "a yes has no age": {"remember": remember_without_age},
    "a no has no age": {"forget": forget_without_age},
    "a create that says SUCCESS is not remembered": {"release": release_without_remembering},
    "a create that was not answered leaves no claim": {"release": release_when_silent},
    "a create on its way has no claim": {
        "tie": tie_without_claims,
        "release": release_if_claimed,
    },
    "a cordoned server's silence is a no": {"assign": assign_where_silence_is_a_no},
    "a server that is down loses its meetings at once": {"is_lost": is_lost_at_once},
}


class Box(list):
    """Letters, and who waits for one."""

    reader = None


class Machine:
    """The truth about a server: how it answers, and which meetings it runs."""

    def __init__(self, url, skew):
        self.url, self.skew = url, skew
        # flaky: most of its answers are lost; mute: all of them; dead: it takes no calls
        self.mode = "well"
        self.lives, self.creates = {}, []


class Life:
    """A meeting, from its begin to its end."""

    def __init__(self, meeting_id, began, created):
        self.began = began
        self.info = tinyscale.MeetingInfo(
            meeting_id, f"{meeting_id}-{created}", "", created, 0, False
        )
        # the directory was told of it, in an answer to what was asked when it ran
        self.is_known = False


class Create:
    """A create, on its way or in a server's queue."""

    def __init__(self, meeting_id):
        self.meeting_id, self.gave_up = meeting_id, None
        # the server said no when it was asked after we gave up: it will not be carried out any more
        self.is_over = False


class Play:
    """People, servers and late answers around a Directory; each move is drawn from a seed.

    What happens at the same time is written as generators. They yield a Box and for how long they
    wait, and are sent the first letter in it, or None. All that they do is what the program does.
    """

    REFUSED, FAILED, GARBLED = "refused", "failed", "garbled"

    def __init__(self, seed, kind=PlayedDirectory):
        self.seed, self.random = seed, random.Random(seed)
        self.now = 1000.0
        self.events, self.count = [], 0
        self.story = collections.deque(maxlen=50)
        self.directory = kind(self.monotonic)
        # who waits for a probe that runs, by meeting; and answers that are on their way
        self.rounds, self.withheld = {}, []
        # their clocks differ: createTime does not tell which life was first
        self.machines = {
            f"http://{name}": Machine(f"http://{name}", self.random.uniform(-60, 60))
            for name in ("one", "two", "three")
        }
        # some worlds are quiet, some are wild
        self.busy = self.random.choice((1, 2, 4))
        self.calm = self.random.choice((20, 60))
        self.polls = self.random.choice((1, 4, 12))
        self.cordons = self.random.choice((0.2, 0.6))
        self.quick = self.random.choice((0.6, 0.9, 0.97))
        self.garbled = self.random.choice((0.05, 0.3))
        self.late = self.random.choice((0.2, 0.4))
        self.ends = self.random.choice((0.3, 1))

    def monotonic(self):
        return self.now

    def __getattr__(self, name):
        """It stands for the module time, too."""
        return getattr(time, name)

    def run(self, seconds):
        """Play. Raises AssertionError, with what happened before, if a rule was broken."""
        self.reload()
        for server in self.directory.servers:
            self.directory.learn(server, [], self.now, True)
            self.begin(self.survey(server))
        for process in (self.people(), self.endings(), self.outages(), self.reloads()):
            self.begin(process)
        end = self.now + seconds
        try:
            while self.now < end:
                self.now, _, job, args = heapq.heappop(self.events)
                self.bury()
                job(*args)
                self.check()
        except AssertionError as error:
            raise AssertionError("\n".join([*self.story, f"seed {self.seed}: {error}"])) from None

    # -- what happens at the same time

    def at(self, when, job, *args):
        self.count += 1
        heapq.heappush(self.events, (when, self.count, job, args))

    def begin(self, process, seconds=0):
        self.at(self.now + seconds, self.go_on, process, None)

    def go_on(self, process, letter):
        try:
            box, seconds = process.send(letter)
        except StopIteration:
            return
        if box:
            self.at(self.now, self.go_on, process, box.pop(0))
        else:
            box.reader = process
            self.at(self.now + seconds, self.time_out, box, process)

    def time_out(self, box, process):
        if box.reader is process:
            box.reader = None
            self.go_on(process, None)

    def put(self, box, letter):
        reader, box.reader = box.reader, None
        if reader:
            self.go_on(reader, letter)
        else:
            box.append(letter)

    def sleep(self, seconds):
        return Box(), seconds

    # -- the truth

    def tell(self, text):
        self.story.append(f"{self.now:9.3f} {text}")

    def check(self):
        """What is alive and known is found without asking."""
        for server in self.directory.servers:
            for meeting_id, life in self.machines[str(server)].lives.items():
                tie = self.directory.tie(meeting_id)
                if life.is_known and not (tie and tie.server is server):
                    raise AssertionError(f"{meeting_id} is on {server}, not at {tie}")

    def is_lost(self, server):
        return server.is_down and self.now - server.since >= tinyscale.HOLD

    def bury(self):
        """What was on a server that is down for so long may begin elsewhere: here it ends."""
        for server in self.directory.servers:
            if self.is_lost(server):
                machine = self.machines[str(server)]
                machine.lives.clear()
                for create in machine.creates:
                    create.is_over = create.is_over or create.gave_up is not None

    def let_go(self, meeting_id):
        """The meeting begins or ends: the answers that told otherwise arrive soon."""
        left, self.withheld = self.withheld, []
        for question, box, letter in left:
            if question in ("list", meeting_id) and self.random.random() < 0.5:
                self.at(self.now + self.random.uniform(0, 4), self.put, box, letter)
            else:
                self.withheld.append((question, box, letter))

    def carry_out(self, server, create):
        """What the server tells of the meeting that it begins, or has; None if it is too late."""
        machine, meeting_id = self.machines[str(server)], create.meeting_id
        if create.is_over or self.is_lost(server):
            return None
        if meeting_id not in machine.lives:
            others = [other.url for other in self.machines.values() if meeting_id in other.lives]
            if others:
                raise AssertionError(f"{meeting_id} is on {others}, and begins on {server}")
            self.tell(f"{meeting_id} begins on {server}")
            created = round(1000 * (self.now + machine.skew))
            machine.lives[meeting_id] = Life(meeting_id, self.now, created)
            self.let_go(meeting_id)
        return machine.lives[meeting_id].info

    def answer(self, server, question, asked):
        """What the server says at this moment; None: nothing that arrives."""
        machine = self.machines[str(server)]
        losses = {"well": 0.03, "flaky": 0.6, "mute": 1, "dead": 1}[machine.mode]
        is_lost = self.random.random() < losses
        if isinstance(question, Create):
            machine.creates.remove(question)
            if losses == 1 and self.random.random() < 0.5:
                return None
            info = self.carry_out(server, question)
            is_garbled = self.random.random() < self.garbled
            return None if is_lost else self.GARBLED if is_garbled else info
        for create in machine.creates:
            # what it does not have when it is asked after we gave up, it will never have
            was_given_up = create.gave_up is not None and create.gave_up < asked
            is_meant = question in ("list", create.meeting_id)
            if was_given_up and is_meant and create.meeting_id not in machine.lives:
                create.is_over = True
        if is_lost:
            return None
        if question == "list":
            return [life.info for life in machine.lives.values()]
        return machine.lives[question].info if question in machine.lives else self.FAILED

    # -- what the program does

    def send(self, server, question, box):
        """Ask a server: "list", a meetingID, or a Create. The letter (server, answer) may come."""
        machine, asked = self.machines[str(server)], self.now
        if machine.mode == "dead":
            self.at(self.now + 0.01, self.put, box, (server, self.REFUSED))
            return

        def arrive():
            # the truth of this moment is read later
            answer = self.answer(server, question, asked)
            if answer is None:
                return
            if not isinstance(question, Create) and self.random.random() < self.late:
                # it comes when it is wrong
                self.withheld.append((question, box, (server, answer)))
            else:
                self.at(self.now + self.delay(), self.put, box, (server, answer))

        if isinstance(question, Create):
            machine.creates.append(question)
        self.at(self.now + self.delay(), arrive)

    def delay(self):
        dice = self.random.random()
        if dice < 0.01:
            return self.random.uniform(3, 70)
        if dice < self.quick:
            return self.random.uniform(0.001, 0.05)
        return self.random.uniform(0.1, 3)

    def judge(self, server, answer, asked):
        """Server.judge: whether this is a usable answer."""
        if answer in (None, self.REFUSED):
            server.note_down("silent", asked)
            return False
        server.reacted = max(server.reacted, asked)
        if answer == self.GARBLED:
            return False
        server.answered = max(server.answered, asked)
        return True

    def know(self, server, info, asked):
        life = self.machines[str(server)].lives.get(info.meeting_id)
        if life and life.info == info and life.began < asked:
            life.is_known = True

    def survey(self, server):
        """tinyscale.watch"""
        while True:
            server.wake.clear()
            asked, box = self.now, Box()
            self.send(server, "list", box)
            letter = yield box, 10
            infos = letter and letter[1]
            if self.judge(server, infos, asked):
                is_whole = self.random.random() < 0.7
                infos = infos if is_whole else infos[1:]
                self.directory.learn(server, infos, asked, is_whole)
                for info in infos:
                    self.know(server, info, asked)
            yield self.sleep(1 if server.wake.is_set() else 10)

    def probe(self, meeting_id):
        """Directory.probe: who asks for the same meeting meanwhile shares the answer."""
        if meeting_id in self.rounds:
            box = Box()
            self.rounds[meeting_id].append(box)
            return (yield box, 100)
        boxes = self.rounds[meeting_id] = []
        servers = [server for server in self.directory.servers if not server.is_down]
        asked = self.now
        yield from self.ask_for(meeting_id, servers, 3)
        del self.rounds[meeting_id]
        for box in boxes:
            self.put(box, asked)
        return asked

    def ask_for(self, meeting_id, servers, seconds):
        """Directory.ask_for, answer by answer."""
        asked, box, silent_ones = self.now, Box(), list(servers)
        for server in servers:
            self.send(server, meeting_id, box)
        while silent_ones:
            letter = yield box, max(0, asked + seconds - self.now)
            if letter is None:
                break
            server, answer = letter
            silent_ones.remove(server)
            if not self.judge(server, answer, asked):
                continue
            if answer != self.FAILED:
                self.directory.remember(server, answer, asked)
                self.know(server, answer, asked)
                break
            self.directory.forget(server, meeting_id, asked)
        for server in silent_ones:
            # the probe is over, but not the call
            self.at(max(self.now, asked + 10), server.note_down, "silent", asked)

    def played(self, job, meeting_id, *args):
        """What a function of the program returns. It begins again after each wait."""
        while True:
            try:
                return job(self.directory, *args)
            except Asking:
                self.directory.heard[meeting_id] = yield from self.probe(meeting_id)
            except tinyscale.Unavailable:
                return None

    def create(self, meeting_id):
        """tinyscale.create"""
        call = tinyscale.ApiCall("create", params={"meetingID": meeting_id})
        deadline, tried, answer = self.now + 60, set(), self.REFUSED
        while answer == self.REFUSED:
            place = yield from self.played(tinyscale.place, meeting_id, call, tried)
            if place is None:
                return
            server, why = place
            self.tell(f"create {meeting_id} goes to {server} ({why})")
            create, box, asked = Create(meeting_id), Box(), self.now
            self.send(server, create, box)
            letter = yield box, max(1, deadline - self.now)
            answer = letter and letter[1]
            info = answer if self.judge(server, answer, asked) else None
            may_have = info is None and answer != self.REFUSED
            self.tell(f"create {meeting_id} at {server}: {answer}")
            self.directory.release(meeting_id, may_have, info)
            tried.add(server)
            if info:
                self.know(server, info, self.now)
            else:
                server.doubts = 2
            if may_have:
                create.gave_up = self.now
                # somebody clicks again
                self.begin(self.create(meeting_id), self.random.uniform(0, 2))
            if why in ("remembered", "may have it"):
                return

    def poll(self, meeting_id):
        """tinyscale.relay: the meeting's own server is asked before a denial is passed on."""
        place = yield from self.played(tinyscale.Directory.find, meeting_id, meeting_id)
        if place and place[0]:
            yield from self.ask_for(meeting_id, [place[0]], 75)

    # -- chance

    def any_meeting(self):
        return self.random.choice(("red", "green", "blue"))

    def any_machine(self):
        return self.random.choice(list(self.machines.values()))

    def people(self):
        while True:
            yield self.sleep(self.random.expovariate(self.busy))
            process = self.random.choice([self.create] + [self.poll] * self.polls)
            self.begin(process(self.any_meeting()))

    def endings(self):
        while True:
            yield self.sleep(self.random.expovariate(self.ends))
            meeting_id = self.any_meeting()
            if not any(machine.lives.pop(meeting_id, None) for machine in self.machines.values()):
                continue
            self.tell(f"{meeting_id} ends")
            self.let_go(meeting_id)
            # as when a moderator has ended it by mistake, and opens it again
            self.begin(self.poll(meeting_id), self.random.uniform(0, 1))
            self.begin(self.create(meeting_id), self.random.uniform(0, 5))

    def outages(self):
        while True:
            yield self.sleep(self.random.uniform(1, self.calm))
            machine = self.any_machine()
            machine.mode = self.random.choice(("mute", "dead", "flaky", "flaky"))
            self.tell(f"{machine.url} is {machine.mode}")
            # shorter and longer than HOLD
            yield self.sleep(self.random.choice((1, 5, 15, 35, 50)))
            machine.mode = "well"
            self.tell(f"{machine.url} is well")

    def reloads(self):
        while True:
            yield self.sleep(self.random.expovariate(0.2))
            self.reload()

    def reload(self):
        """Other weights, other cordons, another order."""
        urls = list(self.machines)
        self.random.shuffle(urls)
        cordoned = [url for url in urls if self.random.random() < self.cordons]
        self.directory.use(
            [tinyscale.Entry(url, "s", self.random.randint(1, 3), url in cordoned) for url in urls],
            self.random.choice(("turn", "load")),
        )
        self.tell(f"cordoned: {cordoned}")


class EvidenceTest(unittest.TestCase):
    """What a Directory makes of answers that come late, in any order, or never."""

    SEEDS = range(80)

    def play(self, seed, kind=PlayedDirectory):
        """A few thousand steps. Raises AssertionError if there is a twin, or one is forgotten."""
        play = Play(seed, kind)
        with mock.patch.object(tinyscale, "time", play):
            play.run(150)

    def test_no_order_of_answers_makes_a_twin_or_forgets_a_meeting(self):
        for seed in self.SEEDS:
            self.play(seed)

    def test_a_claim_outlives_a_yes_that_was_asked_before_we_gave_up(self):
        now = 100.0
        directory = tinyscale.Directory(lambda: now)
        entries = [tinyscale.Entry(f"http://{name}", "s") for name in ("one", "two")]
        directory.use(entries, "turn")
        one, two = directory.servers
        directory.assign("room", (), now, one)
        now = 160.0
        directory.release("room", may_have=True)
        directory.remember(one, tinyscale.MeetingInfo("room", created=1), 158.0)
        directory.forget(one, "room", 159.0)
        self.assertEqual(directory.tie("room").why, "may have it")
        directory.forget(one, "room", 161.0)
        self.assertIsNone(directory.tie("room"))

    def test_a_yes_that_comes_after_a_newer_no_is_no_news(self):
        directory = tinyscale.Directory(lambda: 100.0)
        entries = [tinyscale.Entry(f"http://{name}", "s") for name in ("one", "two")]
        directory.use(entries, "turn")
        one, two = directory.servers
        room = tinyscale.MeetingInfo("room", created=1)
        directory.forget(one, "room", 12.0)
        # and a no that is older still changes nothing in that
        directory.forget(one, "room", 10.0)
        directory.remember(one, room, 11.0)
        self.assertIsNone(directory.tie("room"))
        # of another server it says nothing
        directory.remember(two, room, 11.0)
        self.assertIs(directory.tie("room").server, two)
        directory.remember(one, room, 13.0)
        self.assertIs(directory.tie("room").server, one)

    def test_an_internal_id_takes_no_meeting_of_that_name_away(self):
        directory = tinyscale.Directory(lambda: 100.0)
        entries = [tinyscale.Entry(f"http://{name}", "s") for name in ("one", "two")]
        directory.use(entries, "turn")
        one, two = directory.servers
        directory.remember(one, tinyscale.MeetingInfo("room", "room-1", created=2000), 98.0)
        directory.remember(two, tinyscale.MeetingInfo("mine", "room", created=3000), 99.0)
        self.assertIs(directory.tie("room").server, one)
        self.assertIs(directory.tie("mine").server, two)
        self.assertIs(directory.tie("room-1").server, one)

    def test_the_play_notices_when_a_rule_is_broken(self):
        for rule, methods in BROKEN.items():
            with self.subTest(rule):
                kind = type("BrokenDirectory", (PlayedDirectory,), methods)
                with self.assertRaises(AssertionError):
                    for seed in self.SEEDS:
                        self.play(seed, kind)


# For calls to silent servers.
short = mock.patch.multiple(
    tinyscale,
    CONNECT_TIMEOUT=0.4,
    ANSWER_TIMEOUT=0.4,
    LONG_TIMEOUT=0.4,
    PROBE_TIMEOUT=0.3,
    LATE=0.05,
)


PASSWORDS = "&attendeePW=ap&moderatorPW=mp"


def late(gate, arrived):
    """Find the answer out at once, but send it when the gate is open. Only the first is late."""

    def fault(handler):
        handler.bbb.faults.clear()
        answer = proper(handler)
        arrived.set()
        gate.wait(10)
        return answer

    return fault


def breaks_off(gate, arrived):
    """Take the call, and hang up when the gate is open."""

    def fault(handler):
        handler.close_connection = True
        arrived.set()
        gate.wait(10)

    return fault


def survey_one_by_one(directory):
    """A survey of all servers, the last one first."""
    for server in reversed(directory.servers):
        with contextlib.suppress(tinyscale.Unavailable):
            tinyscale.survey(directory, server)


def slow_by(seconds):
    """Answer so much later."""

    def fault(handler):
        handler.bbb.released.wait(seconds)
        return proper(handler)

    return fault


class CreateTest(ClusterTest):
    def test_once_placed_creates_run_side_by_side(self):
        self.create("room")
        gate, arrived = threading.Event(), threading.Semaphore(0)

        def wait(handler):
            arrived.release()
            gate.wait(10)
            return proper(handler)

        self.having("room")[0].faults["create"] = wait
        creates = [background(self.create, "room") for _ in range(3)]
        self.assertTrue(all(arrived.acquire(timeout=5) for _ in creates))
        gate.set()
        self.assertEqual([create.result(5).returncode for create in creates], ["SUCCESS"] * 3)

    def test_creates_of_one_meeting_go_where_the_first_is_on_its_way_and_hold_up_no_other(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["create"] = held(gate, arrived)
        first = background(self.create, "room")
        self.assertTrue(arrived.wait(5))
        self.fakes[0].faults.clear()
        self.assertEqual(self.create("another").returncode, "SUCCESS")
        self.assertEqual(self.create("room").messageKey, "")
        gate.set()
        self.assertEqual(first.result(5).messageKey, "duplicateWarning")
        self.assertEqual(self.counts("create"), [2, 1, 0])

    def test_a_survey_during_a_create_does_not_forget_where_it_is_being_carried_out(self):
        self.create("room")
        gate, arrived = threading.Event(), threading.Event()
        # it is over, and begins anew
        self.fakes[0].meetings.clear()
        self.fakes[0].faults["create"] = held(gate, arrived)
        first = background(self.create, "room")
        self.assertTrue(arrived.wait(5))
        self.survey()
        self.fakes[0].faults.clear()
        second = self.create("room")
        gate.set()
        self.assertEqual((first.result(5).returncode, second.returncode), ("SUCCESS", "SUCCESS"))
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_create_or_a_body_has_more_time_than_other_calls(self):
        self.create("room")
        self.survey()
        gate = threading.Event()
        self.fakes[0].faults["*"] = held(gate)
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.05):
            slides = {"body": b"<x/>", "headers": {"Content-Type": "text/xml"}}
            calls = [
                background(self.create, "room"),
                background(
                    lambda: self.get("insertDocument", "meetingID=room", method="POST", **slides)
                ),
            ]
            self.assertTrue(until(lambda: self.fakes[0].count("create", "insertDocument") == 2))
            answer = self.get("sendChatMessage", "meetingID=room")
            self.assertEqual(answer.messageKey, "serverUnavailable")
            gate.set()
            self.assertEqual([call.result(5).returncode for call in calls], ["SUCCESS"] * 2)

    def test_passwords_are_bbbs_business(self):
        first = self.create("room", PASSWORDS)
        self.assertEqual((first.attendeePW, first.moderatorPW, first.messageKey), ("ap", "mp", ""))
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "duplicateWarning")
        self.assertEqual(self.create("room", "&attendeePW=other").messageKey, "idNotUnique")
        self.assertEqual(self.create("x").messageKey, "validationError")
        self.assertNotIn("x", self.directory.meetings)

    def test_a_meeting_on_a_cordoned_server_stays_there_and_starts_elsewhere_when_it_is_over(self):
        self.create("room")
        entries = self.entries()
        entries[0]["cordoned"] = True
        self.load(entries)
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[0]])
        self.fakes[0].meetings.clear()
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(self.having("room"), [self.fakes[1]])
        self.assertEqual(self.create("other").returncode, "SUCCESS")
        self.assertEqual(self.having("other"), [self.fakes[2]])

    def test_a_server_that_is_cordoned_while_a_create_is_on_its_way_gets_the_next_one_too(self):
        self.create("room")
        self.get("end", "meetingID=room")
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["create"] = held(gate, arrived)
        first = background(self.create, "room")
        self.assertTrue(arrived.wait(5))
        entries = self.entries()
        entries[0]["cordoned"] = True
        self.load(entries)
        second = background(self.create, "room")
        until(lambda: self.fakes[0].count("create") == 3 or second.done())
        gate.set()
        answers = first.result(5).returncode, second.result(5).returncode
        self.assertEqual(answers, ("SUCCESS", "SUCCESS"))
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_server_that_cannot_be_reached_or_refuses_leaves_its_turn_to_the_next(self):
        for fault in (
            None,
            status(404),
            status(502),
            status(503),
            status(301, Location="https://elsewhere.example.org"),
            lambda handler: failed("checksumError"),
        ):
            with self.subTest(fault):
                self.start()
                if fault:
                    self.fakes[0].faults["create"] = fault
                else:
                    self.fakes[0].down()
                answers = [self.create(f"room{number}") for number in range(3)]
                self.assertEqual([answer.returncode for answer in answers], ["SUCCESS"] * 3)
                self.assertEqual([len(fake.meetings) for fake in self.fakes], [0, 2, 1])
                self.assertIn(f"{self.fakes[0].url} is down: ", self.log.getvalue())
                for fake in self.fakes:
                    fake.meetings.clear()
                    fake.faults.clear()
                if not fault:
                    self.fakes[0].up()

    def test_if_it_may_have_been_carried_out_a_create_is_never_tried_elsewhere(self):
        cut = "<response><returncode>SUCCESS</returncode><meetingID>ro"
        for name, fault, state in (
            ("silence", silent, "down"),
            ("a reset", reset, "down"),
            ("rubbish", sends(b"rubbish\r\n"), "down"),
            ("504", status(504), "down"),
            ("500", status(500), "up"),
            ("a page", status(200), "up"),
            ("nothing", status(200, "", "text/xml"), "up"),
            ("half an answer", status(200, cut, "text/xml"), "up"),
        ):
            with self.subTest(name):
                self.start()
                fake, room = self.fakes[0], f"after {name}"
                fake.faults["create"] = fault
                with short if name == "silence" else contextlib.nullcontext():
                    answer = self.create(room)
                self.assertEqual((answer.status, answer.messageKey), (200, "serverUnavailable"))
                self.assertEqual(self.counts("create"), [1, 0, 0])
                self.assertEqual(self.directory.servers[0].state, state)
                fake.faults.clear()
                if state == "down":
                    self.assertEqual(self.create(room).messageKey, "serverUnavailable")
                    self.survey()
                # it says that it has no such meeting, and had no success with a create
                self.assertEqual(self.create(room).returncode, "SUCCESS")
                self.assertEqual(self.having(room), [self.fakes[1]])
                self.assertNotIn(room, self.directory.claims)

    def test_a_create_that_was_carried_out_without_an_answer_is_found_by_the_next(self):
        hang_up = sends(b"")
        self.fakes[0].faults["create"] = lambda handler: proper(handler) and hang_up(handler)
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[0].faults.clear()
        self.survey()
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_server_that_garbled_the_answer_to_a_create_gets_the_next_until_it_denies(self):
        whole = "<response><returncode>SUCCESS</returncode><meetingID>ro"
        for name, text in (("nothing", ""), ("half of it", whole), ("no ID", whole[:-13])):
            with self.subTest(name):
                self.start()
                fake, room = self.fakes[0], f"answered with {name}"
                garbled = status(200, text, "text/xml")
                fake.faults["create"] = lambda handler: proper(handler) and garbled(handler)
                for _ in range(3):
                    self.assertEqual(self.create(room).messageKey, "serverUnavailable")
                    # so it can neither confirm nor deny
                    fake.faults["getMeetingInfo"] = status(500)
                self.assertEqual((self.counts("create"), self.having(room)), ([3, 0, 0], [fake]))
                fake.faults.clear()
                self.assertEqual(self.create(room).messageKey, "duplicateWarning")
                self.get("end", f"meetingID={quote_plus(room)}")
                for fake in self.fakes:
                    fake.calls.clear()

    def test_creates_behind_one_that_hangs_do_not_wait_for_it_and_then_for_themselves(self):
        self.fakes[0].faults["create"] = silent
        creates = [background(self.create, "room") for _ in range(3)]
        # all of them wait for the server, each for itself
        self.assertTrue(until(lambda: self.fakes[0].count("create") == 3))
        self.fakes[0].down()
        answers = {create.result(5).messageKey for create in creates}
        self.assertEqual((answers, self.counts("create")), ({"serverUnavailable"}, [3, 0, 0]))

    def test_what_a_create_had_to_wait_before_it_was_sent_is_part_of_its_time(self):
        calls = []
        call = tinyscale.Server.call

        def note(server, request, why, timeout=0):
            if request.name == "create":
                calls.append(timeout)
            return call(server, request, why, timeout)

        def slow(handler):
            self.clock.ahead += 20
            return proper(handler)

        self.fakes[0].faults["getMeetingInfo"] = slow
        with mock.patch.object(tinyscale.Server, "call", note):
            self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(len(calls), 1)
        self.assertLess(calls[0], tinyscale.LONG_TIMEOUT - 19)

    def test_the_claim_of_a_failed_create_is_given_up(self):
        for fake in self.fakes:
            fake.down()
        for _ in range(3):
            self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.assertEqual(self.directory.meetings, {})
        self.fakes[1].up()
        self.survey()
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(self.having("room"), [self.fakes[1]])

    def test_slides_are_sent_again_to_the_next_server(self):
        slides = b'<modules><module name="presentation"/></modules>'
        self.fakes[0].faults["create"] = status(502)
        headers = {"Content-Type": "application/xml"}
        answer = self.create("room", method="POST", body=slides, headers=headers)
        self.assertEqual(answer.returncode, "SUCCESS")
        self.assertEqual(self.fakes[1].calls[-1][2:], ("POST", slides, "application/xml"))

    def test_breakout_rooms_follow_their_parent_to_a_cordoned_server_but_not_away_from_a_lost_one(
        self,
    ):
        self.create("parent")
        (parent,) = self.having("parent")
        self.load(
            [dict(entry, cordoned=entry["host"].startswith(parent.url)) for entry in self.entries()]
        )
        breakout = "&isBreakout=true&parentMeetingID=parent"
        self.create("breakout1", breakout)
        self.assertEqual(self.having("breakout1"), [parent])
        parent.faults["create"] = status(502)
        # the call finds out; then it is known
        for number in (2, 3):
            answer = self.create(f"breakout{number}", breakout)
            self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual(self.counts("create")[1:], [0, 0])

    def test_a_server_whose_create_failed_gets_no_new_meeting_until_its_second_good_survey(self):
        for fault in (status(502), status(500), sends(b"")):
            with self.subTest(fault):
                self.start()
                self.fakes[0].faults["create"] = fault
                self.create("lost")
                self.fakes[0].faults.clear()
                self.survey()
                self.assertEqual(self.states(), ["up"] * 3)
                self.create_rooms(3, "early")
                self.assertEqual(self.fakes[0].meetings, {})
                self.survey()
                self.create_rooms(3, "then")
                self.assertEqual(len(self.fakes[0].meetings), 1)
                for fake in self.fakes:
                    fake.meetings.clear()

    def test_a_server_that_cuts_its_answer_to_a_create_is_in_doubt_too(self):
        cut = "<response><returncode>SUCCESS</returncode><meetingID>ro"
        self.fakes[0].faults["create"] = status(200, cut, "text/xml")
        self.assertEqual(self.create("lost").returncode, "FAILED")
        self.create_rooms(4)
        self.assertEqual(self.counts("create"), [1, 2, 2])

    def test_a_survey_that_was_asked_before_a_create_failed_is_no_good_survey(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["getMeetings"] = late(gate, arrived)
        survey = background(tinyscale.survey, self.directory, self.directory.servers[0])
        self.assertTrue(arrived.wait(5))
        self.fakes[0].faults["create"] = status(502)
        self.create("room")
        self.fakes[0].faults.clear()
        gate.set()
        survey.result(5)
        self.survey()
        self.create_rooms(3, "early")
        self.assertEqual(self.fakes[0].meetings, {})
        self.survey()
        self.create_rooms(3, "then")
        self.assertEqual(len(self.fakes[0].meetings), 1)

    def test_what_bbb_itself_refuses_takes_no_server_out_of_the_turn(self):
        self.create("room", PASSWORDS)
        for _ in range(3):
            self.assertEqual(self.create("x").messageKey, "validationError")
            self.assertEqual(self.create("room", "&attendeePW=x").messageKey, "idNotUnique")
        self.create_rooms(3, "new")
        self.assertEqual(sorted(len(fake.meetings) for fake in self.fakes), [1, 1, 2])

    def test_a_create_that_was_one_too_many_for_a_server_takes_it_out_of_no_turn(self):
        with mock.patch.multiple(tinyscale, MAX_WAITING=2):
            self.start()
        gate = threading.Event()
        self.fakes[0].faults["create"] = held(gate)
        creates = [background(self.create, "room") for _ in range(2)]
        self.assertTrue(until(lambda: self.fakes[0].count("create") == 2))
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        gate.set()
        self.assertEqual({create.result(5).returncode for create in creates}, {"SUCCESS"})
        self.create_rooms(3, "new")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [2, 1, 1])

    def test_a_slow_server_gets_new_meetings_only_if_no_other_one_can(self):
        # it takes longer than that for each question
        with mock.patch.multiple(tinyscale, SLOW=0.2, PROBE_TIMEOUT=10, ANSWER_TIMEOUT=10):
            for call in ("getMeetingInfo", "getMeetings"):
                self.fakes[0].faults[call] = slow_by(0.3)
            self.survey()
            self.create_rooms(4)
            self.assertEqual([len(fake.meetings) for fake in self.fakes], [0, 2, 2])
            entries = self.entries()
            for entry in entries[1:]:
                entry["cordoned"] = True
            self.load(entries)
            self.assertEqual(self.create("last").returncode, "SUCCESS")
            self.assertEqual(self.having("last"), [self.fakes[0]])


class RacesTest(ClusterTest):
    def where(self, meeting_id):
        """Where a browser is sent that joins."""
        location = self.get("join", f"meetingID={meeting_id}&fullName=x").headers["Location"]
        return next(fake for fake in self.fakes if location.startswith(fake.url))

    def test_200_creates_of_one_meeting_at_once_end_on_one_server(self):
        answers = self.together([lambda: self.create("room", PASSWORDS)] * 200)
        self.assertEqual({answer.returncode for answer in answers}, {"SUCCESS"})
        self.assertEqual(len({answer.internalMeetingID for answer in answers}), 1)
        self.assertEqual((len(self.having("room")), sum(self.counts("create"))), (1, 200))

    def test_200_creates_while_the_server_dies_never_end_on_a_second_one(self):
        def die(handler):
            proper(handler)
            background(handler.bbb.down)
            return silent(handler)

        self.fakes[0].faults["create"] = die
        answers = self.together([lambda: self.create("room")] * 200)
        self.assertEqual({answer.messageKey for answer in answers}, {"serverUnavailable"})
        self.assertEqual(
            (self.having("room"), self.counts("create")[1:]), ([self.fakes[0]], [0, 0])
        )
        self.fakes[0].faults.clear()
        self.fakes[0].up()
        self.survey()
        answers = self.together([lambda: self.create("room")] * 50)
        self.assertEqual({answer.messageKey for answer in answers}, {"duplicateWarning"})
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_creates_ends_surveys_and_reloads_at_once_break_nothing(self):
        stop, mistakes = threading.Event(), []

        def loop(job):
            while not stop.is_set():
                try:
                    job()
                except (AssertionError, OSError, ET.ParseError) as error:
                    mistakes.append(error)

        def create(number):
            answer = self.create(f"room{number}")
            self.assertEqual(answer.returncode, "SUCCESS")
            self.assertLessEqual(len(self.having(f"room{number}")), 1)

        def end(number):
            answer = self.get("end", f"meetingID=room{number}")
            self.assertIn(answer.messageKey, ("notFound", "sentEndMeetingRequest"))

        def reload():
            self.load(
                [dict(entry, weight=weight) for entry, weight in zip(self.entries(), weights)]
            )
            weights.append(weights.pop(0))

        def survey():
            for server in self.directory.servers:
                tinyscale.survey(self.directory, server)

        weights = [1, 2, 3]
        jobs = [
            lambda number=number, job=job: job(number)
            for number in range(3)
            for job in (create, create, end)
        ]
        loops = [background(loop, job) for job in [*jobs, reload, survey]]
        until(lambda: sum(self.counts("create")) > 200, 0.7)
        stop.set()
        # none broke off
        self.assertEqual([loop.result(20) for loop in loops], [None] * len(loops))
        self.assertEqual(mistakes, [])
        for number in range(3):
            self.assertEqual(self.create(f"room{number}").returncode, "SUCCESS")
            self.assertEqual(len(self.having(f"room{number}")), 1)

    def test_of_two_creates_that_a_server_refuses_at_once_one_at_least_finds_another_place(self):
        gate = threading.Event()
        refused = status(502)
        self.fakes[0].faults["create"] = lambda handler: gate.wait(10) and refused(handler)
        creates = [background(self.create, "room") for _ in range(2)]
        self.assertTrue(until(lambda: self.fakes[0].count("create") == 2))
        gate.set()
        self.assertIn("SUCCESS", [create.result(5).returncode for create in creates])
        self.assertEqual(self.having("room"), [self.fakes[1]])
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")

    def test_a_server_that_is_taken_out_and_put_back_while_a_create_is_on_its_way_keeps_its_claim(
        self,
    ):
        owner, gate, arrived = self.fakes[0], threading.Event(), threading.Event()
        hang_up = breaks_off(gate, arrived)
        owner.faults["create"] = lambda handler: hang_up(handler) or (proper(handler) and None)
        create = background(self.create, "room")
        self.assertTrue(arrived.wait(5))
        self.load(self.entries()[1:])
        self.load()
        self.survey()
        owner.faults.clear()
        gate.set()
        self.assertEqual(create.result(5).messageKey, "serverUnavailable")
        # it may have it, and says neither yes nor no
        owner.faults["getMeetingInfo"] = status(500)
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [owner])

    def test_a_late_yes_about_an_earlier_life_of_a_meeting_changes_nothing(self):
        # its clock goes ahead: createTime does not tell which life is the earlier one
        self.fakes[0].clock += 10**6
        self.create("room")
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["getMeetingInfo"] = late(gate, arrived)
        # nobody has joined, so its server is asked once more
        poll = background(self.get, "isMeetingRunning", "meetingID=room")
        self.assertTrue(arrived.wait(5))
        self.get("end", "meetingID=room")
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").messageKey, "notFound")
        self.create("room")
        self.assertEqual(self.having("room"), [self.fakes[1]])
        gate.set()
        self.assertEqual(poll.result(5).running, "false")
        self.assertIs(self.where("room"), self.fakes[1])
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[1]])

    def test_a_late_no_does_not_forget_a_meeting_that_a_create_began_again(self):
        # not the first server: that one gets what is nowhere
        self.create_rooms(1, "other")
        self.create("room")
        self.get("end", "meetingID=room")
        gate, arrived = threading.Event(), threading.Event()
        owner = self.fakes[1]
        # the answer to the call comes at once, that to the question after it is late
        owner.faults["getMeetingInfo"] = lambda handler: (
            owner.faults.update(getMeetingInfo=late(gate, arrived)) or proper(handler)
        )
        poll = background(self.get, "getMeetingInfo", "meetingID=room")
        self.assertTrue(arrived.wait(5))
        self.assertEqual(self.create("room").messageKey, "")
        owner.faults["getMeetingInfo"] = status(500)
        gate.set()
        poll.result(5)
        # it is known without asking
        self.assertIs(self.where("room"), owner)

    def test_a_no_that_was_asked_before_the_answer_to_a_create_does_not_forget_the_meeting(self):
        # not the first server: that one gets what is nowhere
        self.create_rooms(1, "other")
        owner, go, gate = self.fakes[1], threading.Event(), threading.Event()
        create_arrived, survey_arrived = threading.Event(), threading.Event()
        owner.faults["create"] = held(go, create_arrived)
        create = background(self.create, "room")
        self.assertTrue(create_arrived.wait(5))
        # its list is made before the meeting begins, and comes when it runs
        owner.faults["getMeetings"] = late(gate, survey_arrived)
        survey = background(tinyscale.survey, self.directory, self.directory.servers[1])
        self.assertTrue(survey_arrived.wait(5))
        go.set()
        self.assertEqual(create.result(5).returncode, "SUCCESS")
        owner.faults["getMeetingInfo"] = status(500)
        gate.set()
        survey.result(5)
        self.assertIs(self.where("room"), owner)

    def test_of_two_meetings_of_one_id_the_one_that_can_be_reached_counts(self):
        # a twin: the newer one
        self.fakes[0].put("room", created=1800000000000)
        self.fakes[1].put("room")
        survey_one_by_one(self.directory)
        self.assertIs(self.where("room"), self.fakes[0])
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD + 1
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertIs(self.where("room"), self.fakes[1])
        self.assertEqual(self.fakes[2].meetings, {})

    def test_what_began_anew_is_remembered_whatever_the_clocks_of_the_servers_say(self):
        self.fakes[0].clock += 10**6
        self.create("room")
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD + 1
        self.assertEqual(self.create("room").messageKey, "")
        # it is known without asking
        for fake in self.fakes[1:]:
            fake.faults["getMeetingInfo"] = status(500)
        self.assertIs(self.where("room"), self.fakes[1])
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), self.fakes[:2])


class OutageTest(ClusterTest):
    def ways_to_fail(self):
        """Each way in which the first server can fail, and how it comes back."""
        fake = self.fakes[0]
        yield "refused", fake.down, fake.up
        yield "SYN swallowed", fake.swallow, fake.up
        for name, fault in (
            ("silent", silent),
            ("reset", reset),
            ("nothing", sends(b"")),
            ("404", status(404)),
            ("500", status(500)),
            ("502", status(502)),
            ("503", status(503)),
            ("504", status(504)),
            ("a page", status(200)),
            ("malformed", status(200, "<response><ret", "text/xml")),
            ("rubbish", sends(b"\x16\x03\x01 no HTTP at all\r\n\r\n")),
            ("cut short", sends(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n<response>")),
            ("wrong secret", lambda handler: failed("checksumError")),
            ("redirect", status(302, Location="https://elsewhere.example.org/")),
            ("switching", sends(b"HTTP/1.1 101 Switching\r\n\r\n")),
        ):
            yield name, lambda fault=fault: fake.faults.update({"*": fault}), fake.faults.clear

    # what a server may say of one meeting alone: that it is down, a survey finds out
    ODD = ("500", "a page", "malformed")
    SILENT = ("silent", "SYN swallowed")

    def lose(self, meeting_id):
        """The meeting is on the first server, which has been down for long now."""
        self.fakes[0].put(meeting_id)
        self.survey()
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD + 1

    def test_after_an_outage_of_all_servers_each_has_its_time_to_be_found_again(self):
        """It was our own network: the meetings run, and the first survey is of one server."""
        first, second, _ = self.directory.servers
        self.fakes[0].put("room")
        self.survey()
        for fake in self.fakes:
            fake.down()
        self.survey()
        self.assertEqual(self.states(), ["down"] * 3)
        self.clock.ahead += tinyscale.HOLD + 15
        for fake in self.fakes:
            fake.up()
        tinyscale.survey(self.directory, second)
        self.assertEqual(self.states(), ["down", "up", "down"])
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.assertEqual(self.having("room"), [self.fakes[0]])
        # but not for ever
        self.clock.ahead += tinyscale.HOLD - 1
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.clock.ahead += 2
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(self.having("room"), self.fakes[:2])
        # nor does each that comes back give the others more time
        tinyscale.survey(self.directory, first)
        self.assertTrue(self.directory.is_lost(self.directory.servers[2]))

    def test_the_first_to_come_back_may_be_a_new_server_or_one_whose_list_is_cut_short(self):
        cut = status(200, SUCCESS + "<meetings><meet", "text/xml")
        for fault in (None, cut):
            with self.subTest(fault):
                self.start()
                self.load(self.entries()[:2])
                self.survey()
                self.fakes[0].put("room")
                self.survey()
                for fake in self.fakes:
                    fake.down()
                self.survey()
                self.clock.ahead += tinyscale.HOLD + 15
                self.load(self.entries())
                for fake in self.fakes:
                    fake.up()
                new = self.directory.servers[2]
                if fault:
                    self.fakes[2].faults["getMeetings"] = fault
                tinyscale.survey(self.directory, new)
                self.assertEqual(self.states(), ["down", "down", "up"])
                self.assertFalse(self.directory.is_lost(self.directory.servers[0]))
                # but it gives them that time once, also if its list is never whole
                tinyscale.survey(self.directory, new)
                self.clock.ahead += tinyscale.HOLD - 1
                tinyscale.survey(self.directory, new)
                self.clock.ahead += 2
                self.assertTrue(self.directory.is_lost(self.directory.servers[0]))
                self.fakes[0].meetings.clear()
                self.fakes[2].faults.clear()

    def test_who_went_down_since_its_survey_was_asked_has_not_come_back(self):
        """So it gives nobody more time."""
        self.survey()
        asked = self.clock.monotonic()
        self.clock.ahead += 1
        for fake in self.fakes:
            fake.down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD + 1
        first = self.directory.servers[0]
        self.directory.learn(first, [], asked, True)
        self.assertEqual(self.states(), ["down"] * 3)
        self.assertTrue(self.directory.is_lost(first))

    def test_a_yes_that_was_ignored_counts_if_who_had_a_claim_is_taken_out_meanwhile(self):
        second = self.directory.servers[1]
        self.fakes[0].put("room")
        # a new meeting would go to the third
        self.directory.turn = 1
        with self.directory.lock:
            self.directory.claims["room"] = tinyscale.Claim(second, gave_up=self.clock.monotonic())
        arrived = threading.Event()
        self.fakes[1].faults["getMeetingInfo"] = late(threading.Event(), arrived)
        with mock.patch.object(tinyscale, "PROBE_TIMEOUT", 0.5):
            create = background(self.create, "room")
            self.assertTrue(arrived.wait(5))
            self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo")))
            self.assertTrue(until(lambda: self.directory.denials))
            self.load([self.entries()[0], self.entries()[2]])
            self.assertEqual(create.result(5).messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_yes_that_cannot_be_read_is_a_yes(self):
        self.fakes[1].put("room")
        cut = status(200, SUCCESS + "<meetingID>ro", "text/xml")
        self.fakes[1].faults["getMeetingInfo"] = cut
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[1]])

    def test_a_server_that_never_lists_its_meetings_delays_new_ones_once(self):
        self.start_unknown()
        self.survey_one(1)
        self.survey_one(2)
        create = background(self.create, "room")
        self.assertFalse(until(create.done, 0.2))
        self.clock.ahead += tinyscale.CONNECT_TIMEOUT + tinyscale.ANSWER_TIMEOUT
        self.assertEqual(create.result(5).returncode, "SUCCESS")
        self.assertEqual(self.states(), ["unknown", "up", "up"])
        self.assertEqual(background(self.create, "another").result(2).returncode, "SUCCESS")

    def test_a_server_whose_list_does_not_come_is_up_if_it_answers_other_calls(self):
        self.fakes[0].put("room")
        self.start_unknown()
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["getMeetings"] = breaks_off(gate, arrived)
        with self.watched(self.directory.servers[0]):
            self.assertTrue(arrived.wait(5))
            self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
            gate.set()
            self.assertTrue(until(lambda: self.states()[0] == "up"))

    def test_a_create_is_not_tried_elsewhere_with_too_little_time(self):
        """Silence would be taken for an outage then."""
        for seconds, expected in ((0.7, [1, 0, 0]), (0.1, [1, 1, 0])):
            with self.subTest(seconds), mock.patch.object(tinyscale, "LONG_TIMEOUT", 1):
                self.start()
                slow, away = slow_by(seconds), status(502)
                self.fakes[0].faults["create"] = lambda handler, slow=slow: (
                    slow(handler),
                    away(handler),
                )[1]
                self.create(f"room{seconds}")
                self.assertEqual(self.counts("create"), expected)

    def test_the_word_of_who_has_a_claim_is_waited_for(self):
        """Another server says yes first, but of a meeting that began before the claim."""
        for call in ("create", "getMeetingInfo"):
            with self.subTest(call):
                self.fakes[0].put("room")
                self.fakes[0].down()
                self.start()
                self.fakes[1].faults["create"] = status(500)
                self.directory.turn = 1
                self.assertEqual(self.create("room").messageKey, "serverUnavailable")
                self.assertIs(self.directory.claims["room"].server, self.directory.servers[1])
                self.fakes[0].up()
                tinyscale.survey(self.directory, self.directory.servers[0])
                self.fakes[1].faults = {"getMeetingInfo": slow_by(0.1)}
                # its no ends the claim; then the yes of the other counts
                self.assertNotEqual(self.get(call, "meetingID=room").messageKey, "notFound")
                self.assertEqual(self.create("room").messageKey, "duplicateWarning")
                self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_when_the_newer_of_two_meetings_has_ended_the_older_counts_at_once(self):
        self.fakes[1].put("room", created=1000)
        self.fakes[0].put("room", created=2000)
        self.survey()
        # it is asked, so that what has ended there can begin elsewhere
        self.load([dict(entry, cordoned=not number) for number, entry in enumerate(self.entries())])
        self.fakes[0].meetings.clear()
        self.fakes[0].faults["getMeetingInfo"] = slow_by(0.1)
        self.directory.turn = 2
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[1]])

    def test_an_answer_about_another_meeting_is_no_denial(self):
        """BBB takes a meetingID for the beginning of an internal ID first."""
        names = (f"room-{number}" for number in itertools.count())
        other = next(
            name for name in names if hashlib.sha1(name.encode()).hexdigest().startswith("7b")
        )
        self.fakes[1].put(other, people=0)
        self.fakes[1].put("7b", people=0)
        self.survey()
        self.get("isMeetingRunning", "meetingID=7b")
        self.assertEqual(self.fakes[1].count("getMeetingInfo"), 1)
        self.create("7b")
        self.assertEqual(self.having("7b"), [self.fakes[1]])

    def test_a_server_is_up_before_anybody_can_look_for_what_it_has_told(self):
        self.lose("room")
        self.fakes[0].up()
        server = self.directory.servers[0]
        note_up, seen = server.note_up, []

        def note_up_late(asked):
            look = background(self.directory.tie, "room")
            with contextlib.suppress(futures.TimeoutError):
                look.result(0.1)
            note_up(asked)
            seen.append(look)

        with mock.patch.object(server, "note_up", note_up_late):
            tinyscale.survey(self.directory, server)
        self.assertIs(seen[0].result(5).server, server)

    def test_a_browser_waits_for_who_may_have_the_meeting_also_when_it_is_down_for_long(self):
        self.fakes[0].faults["create"] = reset
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[0].down()
        self.survey()
        for _ in range(2):
            answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
            self.assertEqual(answer.status, 503)
            self.clock.ahead += tinyscale.HOLD + 1
        # of a server that is taken out of the list, and stays out, no claim is kept for ever
        self.load(self.entries()[1:])
        self.survey()
        self.assertEqual(self.directory.claims, {})

    def test_nobody_waits_for_a_server_that_was_taken_out_of_the_list(self):
        """Also if it may have a meeting, of which we shall never hear again."""
        self.fakes[0].faults["create"] = reset
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[0].down()
        self.survey()
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual(answer.status, 503)
        self.load(self.entries()[1:])
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual(answer.status, 302)

    def test_a_question_that_waited_too_long_for_a_thread_is_not_sent(self):
        """Or hung servers would have all threads, for questions that nobody waits for."""
        gate = threading.Event()
        self.addCleanup(gate.set)
        with futures.ThreadPoolExecutor(1) as threads:
            threads.submit(gate.wait, 10)
            mine = mock.patch.object(self.directory, "threads", threads)
            with mine, mock.patch.object(tinyscale, "PROBE_TIMEOUT", 0.1):
                self.directory.ask_for("room", self.directory.servers)
            gate.set()
        self.assertEqual(self.counts("getMeetingInfo"), [0, 0, 0])

    def test_an_outage_is_held_out_and_over_when_the_server_answers_again(self):
        for name, fail, mend in self.ways_to_fail():
            with self.subTest(name):
                self.start()
                server = self.directory.servers[0]
                lost, healthy = f"lost {name}", f"healthy {name}"
                self.fakes[0].put(lost)
                self.fakes[1].put(healthy)
                self.survey()
                fail()
                # the first call fails and marks the server down; its meeting is held, everything
                # else goes on
                query = f"meetingID={quote_plus(lost)}"
                with short if name in self.SILENT else contextlib.nullcontext():
                    answer = self.get("getMeetingInfo", query)
                self.assertEqual(answer.messageKey, "serverUnavailable")
                if name in self.ODD:
                    self.assertEqual(server.state, "up")
                    self.survey()
                self.assertEqual(server.state, "down")
                for call in ("getMeetingInfo", "isMeetingRunning", "end", "create"):
                    self.assertEqual(self.get(call, query).messageKey, "serverUnavailable")
                query = f"meetingID={quote_plus(healthy)}"
                self.assertEqual(self.get("getMeetingInfo", query).returncode, "SUCCESS")
                for number in range(4):
                    self.assertEqual(self.create(f"new {name} {number}").returncode, "SUCCESS")
                self.assertEqual(len(self.fakes[0].meetings), 1)
                self.assertEqual(len(self.get("getMeetings").xml.findall("meetings/meeting")), 5)
                if name not in self.SILENT:
                    self.survey()
                self.assertEqual(self.create(lost).messageKey, "serverUnavailable")
                # it comes back within one survey, with its meeting
                mend()
                self.survey()
                self.assertEqual(server.state, "up")
                self.assertEqual(self.create(lost).messageKey, "duplicateWarning")
            mend()
            for fake in self.fakes:
                fake.meetings.clear()

    def test_a_server_that_fails_from_the_start_is_left_out_until_it_answers(self):
        for name, fail, mend in self.ways_to_fail():
            with self.subTest(name):
                fail()
                self.start_unknown()
                with short if name in self.SILENT else contextlib.nullcontext():
                    self.survey_one(0)
                self.survey_one(1)
                self.survey_one(2)
                self.assertEqual(self.states(), ["down", "up", "up"])
                self.create_rooms(4)
                self.assertEqual([len(fake.meetings) for fake in self.fakes], [0, 2, 2])
                mend()
                self.survey()
                self.create_rooms(3, "again")
                self.assertTrue(self.fakes[0].meetings)
            mend()
            for fake in self.fakes:
                fake.meetings.clear()

    def test_a_server_that_refuses_to_list_its_meetings_is_down(self):
        self.fakes[0].faults["getMeetings"] = lambda handler: failed("x\nforged line" + "y" * 500)
        self.survey()
        self.assertEqual(self.states(), ["down", "up", "up"])
        self.assertRegex(self.log.getvalue(), "is down: .*getMeetings.*'x")
        # and what it says cannot forge lines of the log
        self.assertNotIn("\nforged", self.log.getvalue())
        self.assertNotIn("yyyy" * 50, self.log.getvalue())
        self.start()
        self.assertEqual(self.states(), ["down", "up", "up"])

    def test_a_tls_handshake_that_never_ends_is_an_outage(self):
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(50)
            host = f"https://127.0.0.1:{mute.getsockname()[1]}"
            self.write_servers([{"host": host, "secret": "s"}, *self.entries()])
            self.start_unknown(4)
            with short:
                self.survey_one(0)
            for number in (1, 2, 3):
                self.survey_one(number)
            self.assertIn("is down: no connection: ", self.log.getvalue())
            self.create_rooms(3)

    # -- what may mark a server down

    # the calls whose failure may be an outage, with parameters
    TELLING = (
        ("getMeetings", ""),
        ("getMeetingInfo", "meetingID=room"),
        ("isMeetingRunning", "meetingID=room"),
        ("end", "meetingID=room"),
        ("create", "meetingID=room"),
    )
    # all others
    OTHER = (
        ("join", "meetingID=room&redirect=false"),
        ("insertDocument", "meetingID=room"),
        ("sendChatMessage", "meetingID=room&message=x"),
        ("getSessions", ""),
        ("getRecordings", ""),
        ("publishRecordings", "recordID=R&publish=true"),
        ("deleteRecordings", "recordID=R"),
        ("updateRecordings", "recordID=R"),
        ("getRecordingTextTracks", "recordID=R"),
        ("putRecordingTextTrack", "recordID=R&kind=subtitles&lang=en"),
        ("hooks/create", "callbackURL=http%3A%2F%2Fx"),
        ("hooks/list", ""),
        ("hooks/destroy", f"hookID={tinyscale.hook_id('http://x')}"),
        ("somethingNew", ""),
        ("somethingNew", "meetingID=room"),
    )
    BREAKDOWNS = (
        ("nothing", sends(b"")),
        ("404", status(404)),
        ("502", status(502)),
        ("503", status(503)),
        ("504", status(504)),
        ("a redirect", status(301, Location="https://elsewhere.example.org")),
        ("wrong secret", lambda handler: failed("checksumError")),
    )
    # of one meeting, or of a client's odd call
    REFUSALS = (
        ("400", status(400)),
        ("413", status(413)),
        ("414", status(414)),
        ("500", status(500)),
        ("a page", status(200)),
    )

    def break_once(self, call, query, fault, **kwargs):
        """What states the servers are in when the first one has failed so at this call alone."""
        owner = self.fakes[0]
        owner.faults[call] = fault
        answer = self.get(call, query, **kwargs)
        owner.faults.clear()
        states = self.states()
        # twice, or it would get no new meetings
        if "down" in states:
            self.survey()
            self.survey()
        return answer, states

    def test_only_calls_about_running_meetings_mark_a_server_down(self):
        self.fakes[0].put("room")
        self.fakes[0].record("room", 1, copy_of="R")
        self.fakes[0].hooks["its own ID"] = "http://x"
        self.survey()
        for name, fault in self.BREAKDOWNS:
            for call, query in self.TELLING:
                with self.subTest(name, call=call):
                    answer, states = self.break_once(call, query, fault)
                    self.assertEqual(states, ["down", "up", "up"])
                    if call != "getMeetings":
                        self.assertEqual(answer.messageKey, "serverUnavailable")
            for call, query in self.OTHER:
                with self.subTest(name, call=call):
                    _, states = self.break_once(call, query, fault)
                    self.assertEqual(states, ["up"] * 3)
        for call, _ in self.OTHER:
            with self.subTest(call):
                self.assertTrue(self.fakes[0].count(call), "it was never asked")

    def test_what_a_server_says_of_one_call_is_no_outage_but_none_may_break_its_list(self):
        self.fakes[0].put("room")
        self.survey()
        for name, fault in self.REFUSALS:
            for call, query in self.TELLING:
                with self.subTest(name, call=call):
                    answer, states = self.break_once(call, query, fault)
                    is_list = call == "getMeetings"
                    self.assertEqual(states, ["down" if is_list else "up", "up", "up"])
                    self.assertEqual(
                        answer.messageKey if answer.status == 200 else answer.status,
                        "noMeetings" if is_list else "serverUnavailable",
                    )
            with self.subTest(name, call="a client's own getMeetings"):
                self.assertEqual(self.break_once("getMeetings", "x=y", fault)[1], ["up"] * 3)

    def test_silence_marks_a_server_down_only_at_these_calls_too(self):
        self.fakes[0].put("room")
        self.fakes[0].record("room", 1, copy_of="R")
        self.survey()
        self.fakes[0].faults.update({call: silent for call, _ in self.OTHER})
        calls = [lambda call=call, query=query: self.get(call, query) for call, query in self.OTHER]
        with short:
            self.together(calls)
        self.assertEqual(self.states(), ["up"] * 3)
        calls = []
        for fake, (call, query) in zip(self.fakes, self.TELLING[1:4]):
            fake.put(f"room {call}")
            fake.faults[call] = silent
            calls.append(lambda call=call: self.get(call, f"meetingID=room+{call}"))
        self.survey()
        with short:
            answers = self.together(calls)
        self.assertEqual({answer.messageKey for answer in answers}, {"serverUnavailable"})
        self.assertEqual(self.states(), ["down"] * 3)

    def test_a_body_that_is_refused_is_no_outage(self):
        self.create("room")
        slides = {"method": "POST", "body": b"<modules/>", "headers": {"Content-Type": "text/xml"}}
        for name, fault in self.BREAKDOWNS + self.REFUSALS:
            with self.subTest(name):
                _, states = self.break_once("create", "meetingID=room", fault, **slides)
                self.assertEqual(states, ["up"] * 3)
        self.create_rooms(3, "new")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [2, 1, 1])

    def post_form(self, call, form):
        checksum = hashlib.sha256((call + form + SECRET).encode()).hexdigest()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        path = f"/bigbluebutton/api/{call}?checksum={checksum}"
        return self.http(path, method="POST", body=form, headers=headers)

    def test_a_long_form_that_old_servers_refuse_is_no_outage(self):
        form = "meetingID=long&name=" + "x" * 9000
        for fault in (lambda handler: failed("checksumError"), status(400), status(413)):
            with self.subTest(fault):
                for fake in self.fakes:
                    fake.faults["create"] = fault
                self.assertEqual(self.post_form("create", form).messageKey, "serverUnavailable")
                self.assertEqual(self.states(), ["up"] * 3)
        for fake in self.fakes:
            fake.faults.clear()
        self.create_rooms(3)
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [1, 1, 1])

    def test_a_short_form_that_is_refused_for_its_checksum_is_an_outage_like_a_url(self):
        self.fakes[0].faults["create"] = lambda handler: failed("checksumError")
        self.assertEqual(self.post_form("create", "meetingID=room").returncode, "SUCCESS")
        self.assertEqual(self.states(), ["down", "up", "up"])

    def test_a_huge_id_is_no_outage_whatever_servers_make_of_its_url(self):
        def refuses_long_urls(answer):
            return lambda handler: (answer if len(handler.path) > 8192 else proper)(handler)

        for answer in (status(400), status(414), sends(b""), reset):
            for call in ("isMeetingRunning", "getMeetingInfo", "end", "create"):
                with self.subTest(answer, call=call):
                    for fake in self.fakes:
                        fake.faults["*"] = refuses_long_urls(answer)
                    self.post_form(call, "meetingID=" + "x" * 60000)
                    self.assertEqual(self.states(), ["up"] * 3)
                for fake in self.fakes:
                    fake.faults.clear()
                self.survey()
                self.survey()

    def drop_kept(self):
        for server in self.directory.servers:
            server.close_kept()

    @contextlib.contextmanager
    def without_files(self):
        """We cannot open another connection to a server."""
        ports = {fake.port for fake in self.fakes}
        connect = http.client.HTTPConnection.connect

        def fail(connection):
            if connection.port in ports:
                raise OSError(errno.EMFILE, "Too many open files")
            connect(connection)

        with mock.patch.object(http.client.HTTPConnection, "connect", fail):
            yield

    def test_our_own_lack_of_file_descriptors_is_no_outage(self):
        self.fakes[0].put("room")
        self.survey()
        self.drop_kept()
        with self.without_files():
            for call, query in self.TELLING:
                with self.subTest(call):
                    self.assertEqual(self.get(call, query).messageKey, "serverUnavailable")
                    self.assertEqual(self.states(), ["up"] * 3)
        self.create_rooms(3, "new")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [2, 1, 1])

    def test_nor_is_it_when_a_kept_connection_has_just_been_closed(self):
        self.fakes[0].put("room")
        self.survey()
        with self.without_files():
            self.fakes[0].faults["getMeetingInfo"] = sends(b"")
            answer = self.get("getMeetingInfo", "meetingID=room")
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual(self.fakes[0].count("getMeetingInfo"), 1)
        self.assertEqual(self.states(), ["up"] * 3)

    def test_a_failure_counts_only_if_nothing_was_answered_that_was_asked_later(self):
        self.create("room")
        owner, gate, arrived = self.fakes[0], threading.Event(), threading.Event()
        owner.faults["end"] = breaks_off(gate, arrived)
        slow = background(self.get, "end", "meetingID=room")
        self.assertTrue(arrived.wait(5))
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        gate.set()
        self.assertEqual(slow.result(5).messageKey, "serverUnavailable")
        self.assertEqual(self.states(), ["up"] * 3)
        # nothing was asked later
        self.assertEqual(self.get("end", "meetingID=room").messageKey, "serverUnavailable")
        self.assertEqual(self.states(), ["down", "up", "up"])

    def test_one_slow_call_is_no_outage_but_it_is_told(self):
        self.create("room")
        self.fakes[0].faults["sendChatMessage"] = silent
        with short:
            answer = self.get("sendChatMessage", "meetingID=room&message=x")
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertIn(f"{self.fakes[0].url} failed at sendChatMessage: no ", self.log.getvalue())
        self.assertEqual(self.states(), ["up"] * 3)

    def test_a_call_that_fails_again_after_it_was_answered_is_told_again(self):
        self.create("room")
        for _ in range(2):
            self.clear_log()
            for call in ("getRecordings", "getSessions"):
                self.fakes[0].faults[call] = status(502)
                for _ in range(3):
                    self.get(call)
                self.assertEqual(self.log.getvalue().count(f" failed at {call}: "), 1)
            self.fakes[0].faults.clear()
            for call in ("getRecordings", "getSessions"):
                self.get(call)

    # -- while a server is down, and when it comes back

    def test_a_browser_that_joins_gets_a_page_that_tries_again_and_a_program_xml(self):
        self.create("room")
        self.having("room")[0].down()
        self.get("getMeetingInfo", "meetingID=room")
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "5"))
        self.assertEqual(answer.headers["Refresh"], "5")
        self.assertNotIn(b"://", answer.body)
        for title in ("Einen Moment bitte", "One moment, please"):
            self.assertIn(f"<h1>{title}</h1>".encode(), answer.body)
        answer = self.get("join", "meetingID=room&fullName=X")
        self.assertEqual(answer.messageKey, "serverUnavailable")

    def test_the_page_stays_until_the_server_is_back_or_something_newer_is_known(self):
        self.create("room")
        self.fakes[0].down()
        self.survey()

        def join():
            return self.get("join", "meetingID=room&fullName=X", headers=BROWSER)

        for _ in range(3):
            self.clock.ahead += tinyscale.HOLD
            self.survey()
            self.assertEqual((join().status, join().headers["Refresh"]), (503, "5"))
        # who was never there is told so by BBB
        answer = self.get("join", "meetingID=other&fullName=X", headers=BROWSER)
        self.assertEqual(answer.status, 302)
        # it is back, with its meeting
        self.fakes[0].up()
        self.survey()
        self.assertTrue(join().headers["Location"].startswith(self.fakes[0].url))
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD
        self.assertEqual(join().status, 503)
        # the teacher opens the room again
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertTrue(join().headers["Location"].startswith(self.fakes[1].url))

    def test_a_create_that_fails_does_not_lose_who_waits_for_a_server_that_is_down(self):
        self.create("room")
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD
        for fault in (lambda handler: failed("maxConcurrent"), status(502)):
            for fake in self.fakes[1:]:
                fake.faults["create"] = fault
            self.assertEqual(self.create("room").returncode, "FAILED")
            self.survey()
            answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
            self.assertEqual(answer.status, 503)

    def test_a_server_that_is_down_and_taken_out_keeps_nobody_waiting(self):
        self.create("room")
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD
        self.load(self.entries()[1:])
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual((answer.status, self.directory.meetings), (302, {}))

    def test_the_page_ends_when_the_server_is_back_without_the_meeting(self):
        self.create("room")
        self.fakes[0].down()
        self.survey()
        self.clock.ahead += tinyscale.HOLD
        self.fakes[0].meetings.clear()
        self.fakes[0].up()
        self.survey()
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual(answer.status, 302)

    def test_the_meetings_of_a_server_that_is_down_are_placed_anew_after_a_while(self):
        self.create("room")
        (lost,) = self.having("room")
        lost.down()
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.clock.ahead += tinyscale.HOLD - 1
        self.survey()
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.clock.ahead += 2
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").messageKey, "notFound")
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(self.having("room"), [lost, self.fakes[1]])
        # the old one comes back with an older meeting: the new one stays
        lost.meetings["room"].created -= 10
        self.fakes[1].meetings["room"].created += 10
        lost.up()
        survey_one_by_one(self.directory)
        self.assertIs(self.directory.find("room")[0], self.directory.servers[1])
        self.assertNotIn("'room' runs on", self.log.getvalue())
        survey_one_by_one(self.directory)
        warnings = re.findall("'room' runs on .*", self.log.getvalue())
        self.assertEqual(len(warnings), 1)
        for fake in (lost, self.fakes[1]):
            self.assertIn(fake.url, warnings[0])
        self.survey()
        self.assertEqual(self.log.getvalue().count("'room' runs on"), 1)

    def test_a_failed_survey_forgets_no_meeting(self):
        self.create("room")
        (owner,) = self.having("room")
        owner.down()
        for _ in range(5):
            self.survey()
            self.clock.ahead += tinyscale.HOLD
        owner.up()
        self.survey()
        self.assertEqual(self.directory.find("room")[1], "remembered")

    def test_an_outage_that_goes_on_is_told_once_and_so_is_its_end(self):
        self.fakes[0].down()
        for _ in range(3):
            self.survey()
        self.fakes[0].up()
        for _ in range(3):
            self.survey()
        # it was up at the start, too
        for news, count in (("is down: ", 1), ("is up\n", 2)):
            self.assertEqual(self.log.getvalue().count(f"{self.fakes[0].url} {news}"), count)

    def test_when_all_servers_are_down_each_call_says_so_until_they_are_back(self):
        self.create("room")
        for fake in self.fakes:
            fake.down()
        self.survey()
        for call in (*CALLS_OF_BBB, "somethingElse"):
            for query in ("meetingID=unknown&hookID=1", "recordID=unknown&hookID=1"):
                with self.subTest(call, query=query):
                    self.assertEqual(self.get(call, query).messageKey, "serverUnavailable")
        self.assertEqual(self.get("join", "meetingID=unknown", headers=BROWSER).status, 503)
        self.assertEqual(self.http("/health").status, 503)
        for fake in self.fakes:
            fake.up()
        self.survey()
        self.assertEqual(self.http("/health").status, 200)
        self.assertEqual(self.create("room").messageKey, "duplicateWarning")

    def test_a_survey_asked_before_a_failure_does_not_mark_the_server_up(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].faults["getMeetings"] = held(gate, arrived)
        survey = background(tinyscale.survey, self.directory, self.directory.servers[0])
        self.assertTrue(arrived.wait(5))
        self.fakes[0].faults["getMeetingInfo"] = status(503)
        self.get("getMeetingInfo", "meetingID=room")
        gate.set()
        survey.result(5)
        self.assertEqual(self.directory.servers[0].state, "down")
        self.survey()
        self.assertEqual(self.directory.servers[0].state, "up")

    @contextlib.contextmanager
    def watched(self, server):
        """Survey a server as the program does."""
        watch = background(tinyscale.watch, self.directory, server)
        try:
            yield
        finally:
            self.directory.use([], "turn")
            server.wake.set()
            watch.result(5)

    def test_who_refuses_a_connection_is_asked_again_after_a_second_not_after_ten(self):
        self.fakes[0].put("room")
        self.survey()
        server = self.directory.servers[0]
        before = server.surveyed
        limits = {"SURVEY_INTERVAL": 600, "FIRST_RETRY": 0.01, "RETRY_INTERVAL": 600}
        with mock.patch.multiple(tinyscale, **limits), self.watched(server):
            # not in the middle of its answer
            self.assertTrue(until(lambda: server.surveyed > before))
            # it refuses one connection, and is well again
            self.fakes[0].down()
            answer = self.get("getMeetingInfo", "meetingID=room")
            self.assertEqual(answer.messageKey, "serverUnavailable")
            self.fakes[0].up()
            self.assertTrue(until(lambda: self.states() == ["up"] * 3))
        self.assertIn("is down: no connection", self.log.getvalue())

    def test_a_server_that_stays_down_is_asked_again_and_again(self):
        self.fakes[0].faults["getMeetings"] = status(502)
        limits = {"SURVEY_INTERVAL": 600, "FIRST_RETRY": 0.01, "RETRY_INTERVAL": 0.01}
        with mock.patch.multiple(tinyscale, **limits), self.watched(self.directory.servers[0]):
            self.assertTrue(until(lambda: self.fakes[0].count("getMeetings") > 3))
            self.assertEqual(self.states(), ["down", "up", "up"])
            self.fakes[0].faults.clear()
            self.assertTrue(until(lambda: self.states() == ["up"] * 3))

    # -- at the start

    def start_unknown(self, count=3):
        with mock.patch.object(self, "survey"):
            self.start()
        self.assertEqual(self.states(), ["unknown"] * count)

    def survey_one(self, number):
        with contextlib.suppress(tinyscale.Unavailable):
            tinyscale.survey(self.directory, self.directory.servers[number])

    def test_at_the_start_what_is_found_is_served_at_once_and_the_rest_when_all_are_known(self):
        first, _, last = self.fakes
        first.put("found")
        last.put("hidden")
        last.put("hidden too")
        self.start_unknown()
        # it cannot say yet whether it has a meeting
        last.faults["*"] = status(500)
        answer = self.get("getMeetingInfo", "meetingID=found")
        self.assertEqual(answer.returncode, "SUCCESS")
        location = self.get("join", "meetingID=found").headers["Location"]
        self.assertTrue(location.startswith(first.url))
        self.survey_one(0)
        self.survey_one(1)
        self.assertEqual(self.states(), ["up", "up", "unknown"])
        # "nowhere", and a new place, wait for it
        asked = last.count("getMeetingInfo")
        poll = background(self.get, "getMeetingInfo", "meetingID=hidden")
        create = background(self.create, "hidden too")
        self.assertTrue(until(lambda: last.count("getMeetingInfo") > asked))
        self.assertTrue(until(lambda: len(self.balancer.handlers) == 2))
        last.faults.clear()
        self.survey_one(2)
        self.assertEqual(poll.result(5).returncode, "SUCCESS")
        self.assertEqual(create.result(5).messageKey, "duplicateWarning")
        self.assertEqual(self.having("hidden too"), [last])

    def test_a_server_that_refuses_its_first_survey_has_never_been_up(self):
        self.start_unknown()
        refusal = "<response><returncode>FAILED</returncode><messageKey>odd</messageKey></response>"
        self.fakes[0].faults["getMeetings"] = status(200, refusal, "text/xml")
        self.clear_log()
        self.survey_one(0)
        self.assertEqual(self.states()[0], "down")
        self.assertNotIn("is up", self.log.getvalue())

    def test_at_the_start_the_first_list_of_a_server_is_waited_for_even_if_it_answers_before(self):
        self.fakes[1].put("room")
        self.start_unknown()
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[1].faults["getMeetings"] = late(gate, arrived)
        self.survey_one(0)
        self.survey_one(2)
        survey = background(self.survey_one, 1)
        self.assertTrue(arrived.wait(5))
        # its answer to our question comes too late
        self.fakes[1].faults["getMeetingInfo"] = slow_by(0.4)
        with mock.patch.multiple(tinyscale, PROBE_TIMEOUT=0.2, LATE=0.05):
            poll = background(self.get, "isMeetingRunning", "meetingID=room")
            self.assertTrue(until(lambda: self.directory.servers[1].answered))
            self.assertFalse(poll.done())
            gate.set()
            survey.result(5)
            self.assertEqual(poll.result(5).returncode, "SUCCESS")
        self.assertEqual(self.fakes[1].count("isMeetingRunning"), 1)

    def test_at_the_start_the_first_list_of_a_server_is_waited_for_until_it_has_been_read(self):
        self.fakes[1].put("room")
        self.start_unknown()
        self.survey_one(0)
        self.survey_one(2)
        gate, arrived = threading.Event(), threading.Event()
        parse = tinyscale.parse

        def parse_slowly(answer):
            if b"<meetings><meeting>" in answer.body:
                arrived.set()
                gate.wait(5)
            return parse(answer)

        limits = mock.patch.multiple(tinyscale, PROBE_TIMEOUT=0.2, LATE=0.05, parse=parse_slowly)
        with limits, self.watched(self.directory.servers[1]):
            self.assertTrue(arrived.wait(5))
            self.fakes[1].faults["getMeetingInfo"] = slow_by(0.4)
            poll = background(self.get, "isMeetingRunning", "meetingID=room")
            self.assertTrue(until(lambda: self.directory.servers[1].answered))
            self.assertFalse(until(poll.done, 0.3))
            gate.set()
            self.assertEqual(poll.result(5).returncode, "SUCCESS")
        self.assertEqual(self.fakes[1].count("isMeetingRunning"), 1)

    def test_at_the_start_nobody_waits_for_ever_for_a_server_that_does_not_become_known(self):
        self.start_unknown()
        self.fakes[2].faults["*"] = status(500)
        self.survey_one(0)
        self.survey_one(1)
        calls = [lambda number=number: self.create(f"room{number}") for number in range(4)]
        calls.append(lambda: self.get("getMeetingInfo", "meetingID=nowhere"))
        with short:
            *creates, poll = self.together(calls)
        self.assertEqual({answer.returncode for answer in creates}, {"SUCCESS"})
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [2, 2, 0])
        self.assertEqual(poll.messageKey, "notFound")

    def test_only_a_survey_marks_a_server_up(self):
        self.start_unknown()
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].put("room")
        self.fakes[0].faults["getMeetings"] = breaks_off(gate, arrived)
        survey = background(self.survey_one, 0)
        self.assertTrue(arrived.wait(5))
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        gate.set()
        survey.result(5)
        # it answers, so its list that broke off is no outage; but nobody knows its meetings yet
        self.assertEqual(self.states()[0], "unknown")
        del self.fakes[0].faults["getMeetings"]
        self.survey_one(0)
        self.assertEqual(self.states()[0], "up")

    # -- what probes and lists show

    def test_a_server_that_is_silent_to_a_probe_gets_no_new_meetings(self):
        self.fakes[0].faults["*"] = silent
        with short:
            self.create_rooms(1)
        self.assertTrue(until(lambda: self.states() == ["down", "up", "up"]))
        self.create_rooms(3, "another")
        self.assertEqual(self.fakes[0].count("create"), 0)
        self.assertIn("is down: no answer in ", self.log.getvalue())

    def test_calls_for_other_servers_are_as_fast_as_ever_while_one_hangs(self):
        self.fakes[0].put("hung")
        self.fakes[1].put("healthy")
        self.survey()
        self.fakes[0].faults["*"] = silent
        waiting = [background(self.get, "getMeetingInfo", "meetingID=hung") for _ in range(40)]
        self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo") == 40))
        done = [self.get("getMeetingInfo", "meetingID=healthy").returncode for _ in range(20)]
        self.assertEqual((done, any(call.done() for call in waiting)), (["SUCCESS"] * 20, False))
        self.fakes[0].down()
        self.assertEqual({call.result(5).messageKey for call in waiting}, {"serverUnavailable"})

    def test_what_exceeds_the_bound_of_a_server_is_refused_at_once_and_harms_nobody_else(self):
        with mock.patch.multiple(tinyscale, MAX_WAITING=3):
            self.start()
        self.fakes[0].put("busy")
        self.fakes[1].put("calm")
        self.survey()
        gate = threading.Event()
        self.fakes[0].faults["getMeetingInfo"] = held(gate)
        waiting = [background(self.get, "getMeetingInfo", "meetingID=busy") for _ in range(3)]
        self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo") == 3))
        for call in ("getMeetingInfo", "end", "create", "sendChatMessage"):
            answer = self.get(call, "meetingID=busy")
            self.assertEqual((call, answer.messageKey), (call, "serverUnavailable"))
        self.assertEqual(len(self.fakes[0].calls), 3)
        # calls for others, new meetings, and surveys go on
        self.assertEqual(self.get("getMeetingInfo", "meetingID=calm").returncode, "SUCCESS")
        self.create_rooms(2)
        self.assertEqual(len(self.fakes[0].meetings), 1)
        self.survey_one(0)
        self.assertEqual((self.fakes[0].count("getMeetings"), self.states()), (1, ["up"] * 3))
        self.assertFalse(any(call.done() for call in waiting))
        gate.set()
        self.assertEqual({call.result(5).returncode for call in waiting}, {"SUCCESS"})
        self.assertEqual(self.get("getMeetingInfo", "meetingID=busy").returncode, "SUCCESS")

    def test_slow_reads_of_recordings_have_a_bound_of_their_own(self):
        with mock.patch.multiple(tinyscale, MAX_WAITING=3):
            self.start()
        self.fakes[0].put("room")
        self.survey()
        record_id = self.fakes[0].record("lecture", 5)
        gate = threading.Event()
        self.addCleanup(gate.set)
        for call in ("getRecordingTextTracks", "getRecordings"):
            with self.subTest(call):
                gate.clear()
                self.fakes[0].faults[call] = held(gate)
                slow = [background(self.get, call, f"recordID={record_id}") for _ in range(3)]
                self.assertTrue(until(lambda: self.fakes[0].count(call) == 3))
                answer = self.get("getMeetingInfo", "meetingID=room")
                self.assertEqual(answer.returncode, "SUCCESS")
                gate.set()
                for answer in slow:
                    answer.result(5)
                self.fakes[0].faults.clear()
                self.fakes[0].calls.clear()

    def test_at_the_start_a_call_about_no_meeting_goes_to_an_unknown_server(self):
        self.start_unknown()
        self.assertEqual(self.get("deleteRecordings").messageKey, "missingParamRecordID")
        # but rather to one that is up
        self.survey_one(2)
        self.get("newCall")
        self.assertEqual(self.counts("newCall"), [0, 0, 1])

    def test_no_call_waits_for_more_than_one_silent_server(self):
        with mock.patch.multiple(tinyscale, ABSENCE_TTL=600):
            # that it is nowhere is believed for a while
            self.assertEqual(self.get("getMeetingInfo", "meetingID=later").messageKey, "notFound")
            for fake in self.fakes:
                fake.calls.clear()
                fake.faults["*"] = silent
            with short:
                answer = self.get("getMeetingInfo", "meetingID=later")
            self.assertEqual(answer.messageKey, "serverUnavailable")
            self.assertEqual(self.counts("getMeetingInfo"), [1, 0, 0])
        # others are asked at the same time, and once
        with short:
            answer = self.get("getMeetingInfo", "meetingID=other")
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual(self.counts("getMeetingInfo"), [1, 1, 1])

    def test_what_came_in_time_counts_even_if_it_is_read_late(self):
        for number, fake in enumerate(self.fakes):
            fake.put(f"room{number}")
        self.survey()

        once = threading.Lock()
        once.acquire()

        def pause(handler):
            # as if our machine was paused while the answers came
            if once.acquire(blocking=False):
                self.clock.ahead += 100
            return proper(handler)

        jobs = [lambda: self.get("getMeetings"), lambda: self.create("room3")]
        for number in range(3):
            jobs.append(
                lambda number=number: self.get("isMeetingRunning", f"meetingID=room{number}")
            )
        # a create that has been paused still has time
        with mock.patch.multiple(tinyscale, LATE=5, LONG_TIMEOUT=1000):
            for fake in self.fakes:
                fake.faults["*"] = pause
            for job in jobs:
                before = self.clock.ahead
                once.release()
                self.assertEqual(job().returncode, "SUCCESS")
                self.assertEqual(self.clock.ahead, before + 100)
                self.assertEqual(self.states(), ["up"] * 3)

    def test_the_rest_of_an_answer_counts_even_if_we_paused_in_its_middle(self):
        begun = threading.Event()
        read_answer = tinyscale.read_answer

        def note(*args):
            begun.set()
            return read_answer(*args)

        def pause(handler):
            handler.close_connection = True
            _, _, body, _ = proper(handler)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body[:9]}"
            handler.wfile.write(head.encode())
            begun.wait(10)
            self.clock.ahead += 100
            handler.wfile.write(body[9:].encode())

        # in more than one piece
        self.fakes[0].put("room").name = "x" * 500000
        self.survey()
        self.fakes[0].faults["getMeetingInfo"] = pause
        with mock.patch.multiple(tinyscale, LATE=5, read_answer=note):
            answer = self.get("getMeetingInfo", "meetingID=room")
        self.assertEqual(answer.returncode, "SUCCESS")
        self.assertEqual(self.states(), ["up"] * 3)

    def test_a_server_that_does_not_answer_a_probe_has_not_denied_the_meeting(self):
        for fault, is_outage in ((silent, True), (status(502), True), (status(500), False)):
            with self.subTest(fault), short if fault is silent else contextlib.nullcontext():
                self.start()
                self.create("room")
                (owner,) = self.having("room")
                owner.faults["getMeetingInfo"] = fault
                # nobody has joined yet, so its server is asked once more
                self.get("isMeetingRunning", "meetingID=room")
                server = self.directory.servers[self.fakes.index(owner)]
                self.assertTrue(until(lambda: server.is_down == is_outage))
                key = "serverUnavailable" if is_outage else "duplicateWarning"
                self.assertEqual(self.create("room").messageKey, key)
                self.assertEqual(self.having("room"), [owner])
            owner.faults.clear()
            owner.meetings.clear()

    def test_a_cordoned_server_that_does_not_answer_a_probe_keeps_its_meeting(self):
        self.create("room")
        first, *others = self.entries()
        self.load([{**first, "cordoned": True}, *others])
        self.survey()
        for fault in (status(500), silent, status(502)):
            with self.subTest(fault), short if fault is silent else contextlib.nullcontext():
                self.fakes[0].faults["getMeetingInfo"] = fault
                # the create is not sent there either: it may have ended, and shall begin elsewhere
                self.assertEqual(self.create("room").messageKey, "serverUnavailable")
                self.assertEqual(self.counts("create"), [0, 0, 0])
                self.fakes[0].faults.clear()
                self.survey()
                self.assertEqual(self.create("room").messageKey, "duplicateWarning")
                self.assertEqual(self.having("room"), [self.fakes[0]])
                self.fakes[0].calls.clear()

    def test_servers_that_fail_for_unknown_meetings_still_get_new_ones(self):
        for fake in self.fakes:
            fake.faults["getMeetingInfo"] = status(500)
        self.create_rooms(3)
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [1, 1, 1])
        self.assertEqual(self.http("/health").status, 200)

    def test_what_a_survey_finds_during_a_probe_counts(self):
        self.fakes[0].put("room")
        self.fakes[0].faults["*"] = status(502)
        self.start()
        # the next new meeting is for another server
        self.directory.turn = 1
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[1].faults["getMeetingInfo"] = held(gate, arrived)
        create = background(self.create, "room")
        self.assertTrue(arrived.wait(5))
        self.fakes[0].faults.clear()
        # it shows that the server is up, and has the meeting
        self.survey()
        gate.set()
        self.assertEqual(create.result(5).messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_meeting_whose_server_is_slow_for_long_stays_there(self):
        """It answers some calls, so it is up; but no survey, so memory is stale, and no probe."""
        owner, server = self.fakes[0], self.directory.servers[0]
        for later, is_down in (("getSessions", True), ("isMeetingRunning", False), (None, True)):
            with self.subTest(later):
                owner.put("room")
                self.survey()
                self.survey()
                gate, arrived = threading.Event(), threading.Event()
                owner.faults["getMeetingInfo"] = breaks_off(gate, arrived)
                self.clock.ahead += tinyscale.MEETING_TTL + 1
                with mock.patch.multiple(tinyscale, PROBE_TIMEOUT=0.3):
                    probe = background(self.directory.find, "room")
                    self.assertTrue(arrived.wait(5))
                    self.assertEqual(probe.result(5), (server, "remembered"))
                if later:
                    # it answers what was asked later: not each call tells its health
                    server.call(tinyscale.ApiCall(later, "meetingID=room"), "test")
                gate.set()
                self.assertTrue(until(lambda: server.is_down == is_down))
                # it still cannot say whether it has the meeting
                owner.faults["getMeetingInfo"] = status(500)
                self.create("room")
                self.assertEqual((self.having("room"), server.is_down), ([owner], is_down))
                owner.faults.clear()
                self.survey()

    def test_slow_lists_hold_up_neither_surveys_nor_new_meetings(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        for fake in self.fakes:
            fake.faults["getRecordings"] = held(gate)
        lists = [background(self.get, "getRecordings") for _ in range(40)]
        self.assertTrue(until(lambda: self.fakes[0].count("getRecordings") == 40))
        self.assertEqual(self.create("room").returncode, "SUCCESS")
        self.assertEqual(self.http("/health").status, 200)
        self.survey()
        self.assertEqual(self.states(), ["up"] * 3)
        gate.set()
        self.assertEqual({answer.result(5).returncode for answer in lists}, {"SUCCESS"})

    # -- connections to servers

    def test_only_reads_use_kept_connections_and_only_they_are_repeated(self):
        self.create("room")
        (owner,) = self.having("room")
        self.survey()
        # closed while idle: the next read notices
        for connection in list(owner.sockets):
            connection.shutdown(socket.SHUT_RDWR)
        for _ in range(5):
            self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        self.assertEqual((owner.count("getMeetingInfo"), len(owner.sockets)), (5, 1))
        for call in ("sendChatMessage", "end", "create"):
            # it takes the call and hangs up
            owner.faults[call] = sends(b"")
            # leaves a connection
            self.get("getMeetingInfo", "meetingID=room")
            self.get(call, "meetingID=room")
            self.assertEqual(owner.count(call), 1)
            self.survey()

    def test_a_create_with_both_passwords_rides_on_a_kept_connection(self):
        self.create("room", PASSWORDS)
        self.survey()
        owner = self.fakes[0]
        before = set(owner.sockets)
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "duplicateWarning")
        self.assertEqual(owner.sockets, before)
        slides = {"method": "POST", "body": b"<modules/>", "headers": {"Content-Type": "text/xml"}}
        for extra, more in (("", {}), ("&attendeePW=ap", {})):
            with self.subTest(extra):
                before = set(owner.sockets)
                self.create("room", extra, **more)
                self.assertEqual(len(owner.sockets - before), 1)
        # with a body it has a connection of its own, which is not kept, as it holds the body
        before = list(self.directory.servers[0].kept)
        self.create("room", PASSWORDS, **slides)
        self.assertEqual(self.directory.servers[0].kept, before)

    def test_such_a_create_is_repeated_at_its_server_if_the_connection_breaks(self):
        hang_up = sends(b"")

        def carried_out_once(handler):
            handler.bbb.faults.clear()
            return proper(handler) and hang_up(handler)

        self.fakes[0].faults["create"] = carried_out_once
        answer = self.create("room", PASSWORDS)
        self.assertEqual((answer.returncode, answer.messageKey), ("SUCCESS", "duplicateWarning"))
        self.assertEqual((self.counts("create"), self.having("room")), ([2, 0, 0], self.fakes[:1]))

    def test_if_the_repeat_is_refused_the_first_may_have_been_carried_out(self):
        hang_up, owner = sends(b""), self.fakes[0]

        def carried_out(handler):
            # as by a BBB that makes up a password
            handler.bbb.faults["create"] = lambda handler: failed("idNotUnique")
            return proper(handler) and hang_up(handler)

        owner.faults["create"] = carried_out
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "serverUnavailable")
        self.assertEqual((self.counts("create"), self.having("room")), ([2, 0, 0], [owner]))
        owner.faults.clear()
        # it may have it, and says neither yes nor no
        owner.faults["getMeetingInfo"] = status(500)
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [owner])

    def test_whatever_but_success_answers_a_repeat_the_first_may_have_been_carried_out(self):
        """A restart of the server's nginx, for example: the repeat is told 502."""
        for code in (301, 404, 500, 502, 503, 504):
            with self.subTest(code):
                self.start()
                room = f"room{code}"
                answers = [lambda handler: proper(handler) and sends(b"")(handler), status(code)]
                self.fakes[0].faults["create"] = lambda handler, answers=answers: answers.pop(0)(
                    handler
                )
                self.assertEqual(self.create(room, PASSWORDS).messageKey, "serverUnavailable")
                self.assertEqual(self.having(room), [self.fakes[0]])
                self.fakes[0].faults.clear()
                self.survey()
                self.assertEqual(self.create(room, PASSWORDS).messageKey, "duplicateWarning")

    def test_a_repeat_has_no_time_of_its_own(self):
        self.fakes[0].put("room")
        self.survey()
        asked = []

        def slow_then_closed(handler):
            asked.append(time.monotonic())
            handler.bbb.released.wait(0.5 if len(asked) == 1 else 10)
            return sends(b"")(handler)

        self.fakes[0].faults["getMeetingInfo"] = slow_then_closed
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.8, LATE=0.05):
            answer = self.get("getMeetingInfo", "meetingID=room")
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual(len(asked), 2)
        # the second one gave up when the time of the first was over
        self.assertLess(time.monotonic() - asked[1], 0.75)

    def test_if_the_repeat_cannot_connect_the_first_may_have_been_carried_out(self):
        def carried_out_then_down(handler):
            proper(handler)
            handler.bbb.down()

        self.fakes[0].faults["create"] = carried_out_then_down
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "serverUnavailable")
        self.assertEqual(self.create("room", PASSWORDS).messageKey, "serverUnavailable")
        self.assertEqual((self.counts("create"), self.having("room")), ([1, 0, 0], self.fakes[:1]))

    def test_a_kept_connection_that_can_be_read_is_discarded_unsent(self):
        owner, server = self.fakes[0], self.directory.servers[0]
        self.create("room", PASSWORDS)
        for name, spoil in (
            ("its end", lambda connection: connection.shutdown(socket.SHUT_RDWR)),
            ("an answer", lambda connection: connection.sendall(b"HTTP/1.1 408 Late\r\n\r\n")),
        ):
            with self.subTest(name):
                self.survey()
                for connection in list(owner.sockets):
                    spoil(connection)
                kept = [connection.sock for connection in server.kept]
                self.assertTrue(kept)
                self.assertTrue(until(lambda: all(map(tinyscale.is_readable, kept))))
                # had it been sent there, too, nobody could tell what this refusal means
                answer = self.create("room", "&attendeePW=other&moderatorPW=mp")
                self.assertEqual(answer.messageKey, "idNotUnique")
                self.assertEqual(owner.count("create"), 1)

    def test_a_connection_is_kept_for_a_while_only(self):
        self.fakes[0].put("room")
        self.survey()
        before = set(self.fakes[0].sockets)
        self.get("getMeetingInfo", "meetingID=room")
        self.assertEqual(self.fakes[0].sockets, before)
        self.clock.ahead += tinyscale.KEPT_FOR - 1
        self.survey()
        self.assertEqual(self.fakes[0].sockets, before)
        # its age counts from its begin: the server's name may have another address by now
        self.clock.ahead += 2
        self.survey()
        self.assertTrue(until(lambda: not self.fakes[0].sockets & before))

    def test_when_one_connection_is_silent_the_others_are_not_kept(self):
        """A firewall that has forgotten them all, for example: new ones work at once."""
        self.fakes[0].put("room")
        self.survey()
        server = self.directory.servers[0]
        self.drop_kept()
        mute = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(mute.close)
        for _ in range(5):
            connection = http.client.HTTPConnection(*mute.getsockname())
            connection.connect()
            connection.usable_until = self.clock.monotonic() + 1
            server.kept.append(connection)
        with short:
            answer = self.get("getMeetingInfo", "meetingID=room")
            self.assertEqual(answer.messageKey, "serverUnavailable")
            self.survey()
            self.assertEqual(self.states(), ["up"] * 3)
            answer = self.get("getMeetingInfo", "meetingID=room")
            self.assertEqual(answer.returncode, "SUCCESS")

    def test_a_connection_with_more_to_come_is_not_kept(self):
        for number in range(2):
            self.fakes[0].put(f"room{number}")
        self.survey()
        hint = sends(b"HTTP/1.1 103 Early Hints\r\n\r\n", then_close=False)
        self.fakes[0].faults["getMeetingInfo"] = lambda handler: hint(handler) or proper(handler)
        answer = self.get("getMeetingInfo", "meetingID=room0")
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.fakes[0].faults.clear()
        self.survey()
        for number in (1, 0, 1):
            answer = self.get("getMeetingInfo", f"meetingID=room{number}")
            self.assertEqual(answer.meetingID, f"room{number}")

    def test_a_create_that_is_answered_with_an_early_hint_is_not_tried_elsewhere(self):
        hint = sends(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        self.fakes[0].faults["create"] = lambda handler: (proper(handler), hint(handler))[0]
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.assertEqual((self.counts("create"), self.having("room")), ([1, 0, 0], [self.fakes[0]]))

    def test_an_answer_in_drops_has_a_deadline(self):
        head = b"HTTP/1.1 200 OK\r\n"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
        parts = {
            "body": (head + b"Content-Length: 10000\r\n\r\n", b"x"),
            "rest": (head + b"Connection: close\r\n\r\n", b"x"),
            "chunks": (chunked, b"1\r\nx\r\n"),
            "size": (chunked, b"0"),
            "trailer": (chunked + b"0\r\n", b"X: y\r\n"),
            "field": (head + b"X: ", b"x"),
            "status": (b"HTTP/1.1 1", b"0"),
            "hundreds": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        }

        def drops(handler):
            before, drop = parts[re.search("meetingID=([a-z]+)", handler.path)[1]]
            handler.close_connection = True
            handler.wfile.write(before)
            with contextlib.suppress(OSError):
                while not handler.bbb.released.wait(0.02):
                    handler.wfile.write(drop)

        for name in parts:
            self.fakes[0].put(name)
        self.survey()
        self.fakes[0].faults["getMeetingInfo"] = drops
        with short:
            calls = {
                name: background(self.get, "getMeetingInfo", f"meetingID={name}") for name in parts
            }
            futures.wait(calls.values(), 3)
            endless = [name for name, call in calls.items() if not call.done()]
        self.fakes[0].down()
        self.assertEqual(endless, [])
        answers = {call.result(5).messageKey for call in calls.values()}
        self.assertEqual((answers, self.states()[0]), ({"serverUnavailable"}, "down"))

    def test_refused_bodies_over_http_and_https_are_no_outage_and_reads_share_a_connection(self):
        path, tls = certified(os.path.dirname(self.path))
        trust = ssl.create_default_context(cafile=path)
        owner = self.fakes[0]
        slides = {"method": "POST", "headers": {"Content-Type": "text/xml"}}
        for owner.tls in (None, tls):
            with self.subTest(owner.url):
                self.write_servers()
                with mock.patch.object(tinyscale, "TRUST", trust):
                    self.start()
                owner.put("room")
                self.survey()
                before = set(owner.sockets)
                for _ in range(5):
                    answer = self.get("getMeetingInfo", "meetingID=room")
                    self.assertEqual(answer.returncode, "SUCCESS")
                self.assertEqual(owner.sockets, before)
                owner.refuses_bodies = True
                for _ in range(5):
                    body = b"<" + b"x" * 5 * 2**20
                    answer = self.get("insertDocument", "meetingID=room", body=body, **slides)
                    self.assertEqual((answer.status, self.states()), (413, ["up"] * 3))
                owner.refuses_bodies = False

    def test_a_call_that_changes_something_is_not_repeated_at_another_server_after_silence(self):
        for fault in (sends(b""), reset):
            with self.subTest(fault):
                self.fakes[0].faults["paintTheWalls"] = fault
                self.assertEqual(self.get("paintTheWalls").messageKey, "serverUnavailable")
                self.assertEqual(self.counts("paintTheWalls"), [1, 0, 0])
                self.survey()
        # what a server says is passed on: old ones do not know every call
        for code in (404, 502, 504):
            self.fakes[0].faults["paintTheWalls"] = status(code)
            self.assertEqual(self.get("paintTheWalls").status, code)
        self.assertEqual(self.counts("paintTheWalls"), [3, 0, 0])
        # it cannot have begun
        self.fakes[0].down()
        self.assertEqual(self.get("paintTheWalls").status, 404)
        self.assertEqual(self.counts("paintTheWalls"), [3, 1, 0])

    def test_proxies_of_the_environment_are_ignored(self):
        with mock.patch.dict(os.environ, http_proxy="http://127.0.0.1:9", no_proxy=""):
            self.start()
            self.create_rooms(3)


EMPTY = "{}<messageKey>{}</messageKey><message>{}</message>"


SHAPES = {  # call -> the path of an item, the empty answer
    "getMeetings": (
        "meetings/meeting",
        EMPTY.format("<meetings/>", "noMeetings", "no meetings were found on this server"),
    ),
    "getSessions": (
        "sessions/meeting",
        EMPTY.format("<sessions/>", "noSessions", "no sessions were found on this serverr"),
    ),
    "getRecordings": (
        "recordings/recording",
        EMPTY.format(
            "<recordings></recordings>",
            "noRecordings",
            "There are no recordings for the meeting(s).",
        ),
    ),
}


SUCCESS = "<response><returncode>SUCCESS</returncode>"


# What a join's userdata-... and a create's meta_... may be called: in BBB names of elements.
ODD_NAMES = (
    "1",
    "lms:role",
    "a b",
    'a b="c"',
    'a b="c" b="d"',
    'a 1="c"',
    'xmlns="x"',
    'a xmlns="x"',
    "",
    "/",
    "?",
    "!",
    "<",
    ">",
    "&",
    "a&b;",
    "&#001;<",
    "]]>",
    "![CDATA[",
    "![CDATA[x]]",
    "<!--",
    "!--",
    "-->",
    "<b",
    "a><b",
    "x/",
    "/x",
    "=",
    '"',
    "\u00e4",
    "\U0001f600",
    "\x01",
    "\ufffe",
    "meeting",
    "meetingID",
    "recording",
    "recordID",
    "xmlns:x",
    "</customdata>",
    "</metadata>",
    "</attendee>",
    "/meeting",
    "/meetings",
    "/recordings",
    "/response",
    "b></customdata><b",
    "/customdata></meetings",
    "/metadata></recordings",
    "x></metadata><customdata",
    "x></customdata><metadata",
    "n></customdata></attendee></attendees></meeting><x",
    "n></metadata></meeting><customdata",
    "n></metadata></recording><x",
    "a><",
    "?xml version='2'?",
    "!DOCTYPE x",
)


def custom(name):
    """What BBB writes for a parameter of this name."""
    return f"<{name}>value</{name}>"


def attendee(name):
    """What BBB writes of somebody with custom data of this name."""
    return f"<attendee><customdata>{custom(name)}</customdata></attendee>"


def with_text(old, new):
    """A fault: the proper answer, but for this text in it."""

    def fault(handler):
        code, content_type, body, headers = proper(handler)
        return code, content_type, body.replace(old, new), headers

    return fault


class ListsTest(ClusterTest):
    def listed(self):
        """The IDs of the meetings in the list, by a parser that forgives nothing."""
        text = self.get("getMeetings").body.decode("utf-8")
        items = ET.fromstring(text).findall("meetings/meeting")
        return sorted(item.findtext("meetingID") for item in items)

    def test_a_reference_to_a_huge_number_breaks_no_list(self):
        self.fakes[0].put("room")
        digits = "1" * 5000
        custom_data = f"<a>&#{digits};<b>v</a>&#{digits};<b>"
        self.fakes[0].meetings[
            "room"
        ].custom = (
            f"<attendee><fullName>x</fullName><customdata>{custom_data}</customdata></attendee>"
        )
        self.survey()
        self.assertEqual(self.listed(), ["room"])
        self.assertEqual(self.states(), ["up"] * 3)

    def test_a_section_is_not_searched_for_its_end_for_ever(self):
        """Each character costs memory meanwhile: of 30 MB some 2 GB."""
        for length, expected in ((100000, True), (100001, False)):
            body = f"{SUCCESS}<a><![CDATA[{'x' * length}]]></a></response>".encode()
            root, is_whole = tinyscale.parse(tinyscale.Answer(200, body))
            self.assertEqual(is_whole, expected)
            self.assertEqual(root.find("a") is not None, True)

    def test_what_a_server_puts_into_a_list_is_no_script_of_ours(self):
        script = '<h:script xmlns:h="http://www.w3.org/1999/xhtml">alert(1)</h:script>'
        self.fakes[0].put("room").custom = script
        self.survey()
        for call, query in (("getMeetings", ""), ("getMeetingInfo", "meetingID=room"), ("end", "")):
            answer = self.get(call, query)
            self.assertEqual(answer.headers["Content-Security-Policy"], "sandbox")
        self.assertIn("alert(1)", self.get("getMeetings").body.decode())

    def test_a_list_of_a_crowd_of_tiny_elements_is_left_out(self):
        """A megabyte of them would become a hundred megabytes of ours."""
        self.create("here")
        self.create("there")
        self.survey()
        for crowd in ("<a/>" * 300, "<a>" * 300, "<" * 300):
            with self.subTest(crowd[:9]), mock.patch.object(tinyscale, "MAX_TAGS", 300):
                fault = with_text("</meetings>", f"{crowd}</meetings>")
                self.fakes[0].faults["getMeetings"] = fault
                self.survey()
                self.assertEqual(self.listed(), ["there"])
                self.assertEqual(self.states(), ["up"] * 3)
                # what it lacks is not forgotten, nor gone from /status
                self.assertEqual(set(self.directory.servers[0].listed), {"here"})
                answer = self.get("join", "meetingID=here&fullName=X")
                self.assertTrue(answer.headers["Location"].startswith(self.fakes[0].url))

    def test_empty_lists_have_bbbs_shape_to_the_letter(self):
        for call, (_, empty) in SHAPES.items():
            answer = self.get(call)
            self.assertEqual(answer.body.decode(), f"{SUCCESS}{empty}</response>")
            self.assertEqual(answer.headers["Content-Type"], "text/xml;charset=utf-8")

    def test_lists_have_what_all_servers_have(self):
        for number, fake in enumerate(self.fakes):
            fake.put(f"r\u00f6\u00f6m & {number}", people=number)
            fake.record(f"lecture{number}", number)
        for call, (path, _) in SHAPES.items():
            with self.subTest(call):
                answer = self.get(call)
                self.assertEqual(
                    (len(answer.xml.findall(path)), [child.tag for child in answer.xml]),
                    (3, ["returncode", path.split("/")[0]]),
                )
                self.assertEqual(self.counts(call), [1, 1, 1])
                self.survey()
        self.assertEqual(self.listed(), [f"r\u00f6\u00f6m & {number}" for number in range(3)])

    def test_no_session_is_taken_for_another_one(self):
        for fake in self.fakes:
            fake.put("room", people=2, created=1700000000000)
        answer = self.get("getSessions")
        self.assertEqual(len(answer.xml.findall("sessions/meeting")), 6)
        shape, session = tinyscale.LISTS["getSessions"], "<meeting><userName>A</userName></meeting>"
        lists = []
        for number in range(600):
            text = f"{SUCCESS}<sessions>{session * (number % 9)}</sessions></response>"
            lists.append(tinyscale.items_of(shape, tinyscale.Answer(200, text.encode())))
        self.assertEqual(len(tinyscale.merge(shape, lists)), sum(map(len, lists)))

    def test_a_section_with_a_comment_in_it_is_text_and_the_list_is_whole(self):
        for text in (
            "<!--[if gte mso 9]>",
            "<!-- c -->",
            "<!DOCTYPE html>",
            "a <b> & c",
            "<p>Hello <b>you</b></p>",
            "a</name><meetingID>another</meetingID>",
        ):
            with self.subTest(text):
                item = f"<meeting><meetingID>x</meetingID><name><![CDATA[{text}]]></name></meeting>"
                body = f"{SUCCESS}<meetings>{item}</meetings></response>".encode()
                root, is_whole = tinyscale.parse(tinyscale.Answer(200, body))
                self.assertEqual((root.findtext("meetings/meeting/name"), is_whole), (text, True))

    def test_items_keep_their_elements_when_they_are_written_again(self):
        names = [
            "<![CDATA[<meeting> & \u00e4]]>",
            "a&#x26;b",
            "plain\x08",
        ]
        items = [
            f"<meeting>\r\n<meetingName>{name}</meetingName><meetingID>room{number}</meetingID>"
            "<metadata><meeting>x</meeting></metadata></meeting>\n"
            for number, name in enumerate(names)
        ]
        for fake, item in zip(self.fakes, items):
            fake.faults["getMeetings"] = status(
                200,
                f"<?xml version='1.0'?>\n{SUCCESS}<meetings>{item}</meetings></response>",
                "text/xml",
            )
        listed = self.get("getMeetings").xml.findall("meetings/meeting")
        self.assertEqual(
            [item.findtext("meetingName") for item in listed],
            ["<meeting> & \u00e4", "a&b", "plain "],
        )
        self.assertEqual([item.findtext("metadata/meeting") for item in listed], ["x"] * 3)
        # twins: each is shown once
        self.fakes[0].faults["getMeetings"] = self.fakes[1].faults["getMeetings"]
        self.assertEqual(self.listed(), ["room1", "room2"])

    def test_no_name_that_people_type_hides_a_meeting_or_takes_a_server_down(self):
        for fake in self.fakes:
            fake.put("before at " + fake.name)
            fake.put("odd room at " + fake.name)
            fake.put("zebra at " + fake.name)
        self.survey()
        expected = self.listed()
        self.assertEqual(len(expected), 9)
        for name in ODD_NAMES:
            with self.subTest(name):
                data = attendee(name)
                for fake in self.fakes:
                    fake.meetings["odd room at " + fake.name].custom = data
                    metadata = f"<metadata>{custom(name)}</metadata>"
                    fake.faults["getMeetings"] = with_text("<metadata/>", metadata)
                # what memory knows comes from the next survey alone
                self.clock.ahead += tinyscale.MEETING_TTL + 1
                self.survey()
                self.assertEqual(self.states(), ["up"] * 3)
                self.assertEqual(self.listed(), expected)
                for meeting_id in expected:
                    self.assertEqual(self.directory.find(meeting_id)[1], "remembered")
                again = self.get("create", f"meetingID={quote_plus('odd room at bbb1')}")
                self.assertEqual(again.messageKey, "duplicateWarning")
                self.directory.forget(
                    self.directory.servers[0], expected[3], self.clock.monotonic()
                )
                self.assertIs(self.directory.find(expected[3])[0], self.directory.servers[0])
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [3] * 3)

    def test_a_typed_name_that_ends_the_custom_data_around_it_is_found(self):
        """The text is well-formed all the same."""
        for outer in ("customdata", "metadata"):
            name = f"{outer}></{outer}><isbreakout>true</isbreakout><{outer}"
            inner = f"<meeting><{outer}><{name}>x</{name}></{outer}></meeting>"
            body = f"{SUCCESS}<meetings>{inner}</meetings></response>".encode()
            ET.fromstring(body)
            self.assertFalse(tinyscale.parse(tinyscale.Answer(200, body))[1])

    # what looks like another meeting, and a name that puts it into the list
    FALSE = "<meeting><meetingID>victim</meetingID><createTime>9999999999999</createTime>"
    THIEF = f"a/></customdata></attendee></attendees></meeting>{FALSE}<customdata><a"

    def test_no_name_that_people_type_draws_a_meeting_that_runs_to_another_server(self):
        self.fakes[0].put("victim")
        room = self.fakes[1].put("room")
        self.survey()
        # BBB's own end of this name becomes a comment, and the rest is well-formed
        hidden = (
            f"a></a></customdata></attendee></attendees></meeting>{self.FALSE}</meeting>"
            "<meeting><attendees><attendee><customdata><!--"
        )
        for name in (self.THIEF, hidden):
            room.custom = attendee(name)
            self.survey()
            self.assertIs(self.directory.find("victim")[0], self.directory.servers[0])
            self.assertIs(self.directory.find("room")[0], self.directory.servers[1])

    def test_elements_within_those_that_people_named_are_not_believed(self):
        root, is_whole = tinyscale.parse(
            tinyscale.Answer(
                200, (SUCCESS + "<customdata><a><b/></a></customdata></response>").encode()
            )
        )
        self.assertFalse(is_whole)
        self.assertEqual(root.findtext("returncode"), "SUCCESS")

    def test_an_odd_name_in_one_room_costs_the_others_no_call(self):
        self.fakes[0].put("calm")
        self.survey()
        self.fakes[0].put("odd").custom = attendee("1")
        for _ in range(4):
            self.clock.ahead += 10
            self.survey()
        self.get("join", "meetingID=calm&fullName=X")
        self.assertEqual(self.counts("getMeetingInfo"), [0, 0, 0])
        # what the list alone told is asked for
        self.get("join", "meetingID=odd&fullName=X")
        self.assertEqual(self.fakes[0].count("getMeetingInfo"), 1)

    def test_what_a_broken_list_alone_tells_is_asked_for(self):
        """As after a restart, when the lists come in any order."""
        self.fakes[0].put("victim")
        self.fakes[1].put("room").custom = attendee(self.THIEF)
        for is_asked_first in (True, False):
            with self.subTest(is_asked_first=is_asked_first), mock.patch.object(self, "survey"):
                self.start()
                _, second, _ = self.directory.servers
                tinyscale.survey(self.directory, second)
                if is_asked_first:
                    self.assertEqual(self.create("victim").messageKey, "duplicateWarning")
                for server in self.directory.servers:
                    tinyscale.survey(self.directory, server)
                for meeting_id, fake in (("victim", self.fakes[0]), ("room", self.fakes[1])):
                    location = self.get("join", f"meetingID={meeting_id}").headers["Location"]
                    self.assertTrue(location.startswith(fake.url))
        self.assertEqual(self.having("victim"), [self.fakes[0]])

    def test_no_mixture_of_odd_characters_makes_a_list_unreadable(self):
        dice = random.Random(20)
        item = "<meeting><meetingID>{}</meetingID><metadata>{}</metadata></meeting>"
        pieces = ["<", ">", "/", "!", "?", "-", "--", "[", "]", "]]", "&", ";", "=", '"', "'", " "]
        pieces += ["a", "b", "1", ":", "</", "/>", "<!--", "-->", "<?", "?>", "![CDATA[", "]]>"]
        pieces += ["\x01", "&#001;", "&amp;", ' x="1"', "x='2'", "xmlns", "metadata", "/meetings"]
        for _ in range(1500):
            names = ["".join(dice.choices(pieces, k=dice.randint(1, 3))) for _ in range(2)]
            data = ["", custom(names[0]), "", custom(names[1]), ""]
            items = "".join(item.format(number, text) for number, text in enumerate(data))
            text = f"{SUCCESS}<meetings>{items}</meetings></response>"
            root, _ = tinyscale.parse(tinyscale.Answer(200, text.encode()))
            ids = [element.findtext("meetingID") for element in root.iterfind("meetings/meeting")]
            self.assertEqual(ids, list("01234"), names)

    def test_a_list_that_had_to_be_mended_counts_only_for_what_it_says(self):
        self.fakes[0].put("first room")
        self.fakes[0].put("second room")
        self.survey()
        # what follows is hidden
        hiding = "</attendees></meeting></meetings><x><"
        self.fakes[0].meetings["first room"].custom = hiding
        self.survey()
        self.assertEqual(self.directory.find("second room")[1], "remembered")

    def test_a_clients_own_odd_call_is_no_outage(self):
        self.fakes[0].put("room")
        self.survey()
        for fault in (status(200, "{}", "application/json"), status(500), status(404)):
            for fake in self.fakes:
                fake.faults["getMeetings"] = fault
            answer = self.get("getMeetings", "format=json")
            self.assertEqual(answer.messageKey, "serverUnavailable")
            self.assertEqual(self.states(), ["up"] * 3)

    def test_a_tag_that_is_none_misleads_nobody(self):
        meeting = "<meeting><meetingID>%s</meetingID></meeting>"
        for fake, answer in zip(
            self.fakes,
            (
                SUCCESS + f"<!--<meetings>--><meetings>{meeting % 0}</meetings></response>",
                SUCCESS
                + f"<meetings>{meeting % 1}</meetings><x><![CDATA[</meetings>]]></x></response>",
                SUCCESS
                + f"<meetings >{meeting % 2}</meetings ><!-- <meetings> </meetings> --></response>",
            ),
        ):
            fake.faults["getMeetings"] = status(200, answer, "text/xml")
        self.assertEqual(self.listed(), ["0", "1", "2"])

    def test_what_could_mean_something_else_elsewhere_is_left_out(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        others, item = (
            ["at bbb1", "at bbb3"],
            "<meeting><meetingID>%s</meetingID></meeting></meetings></response>",
        )
        for text, expected in (
            (
                f'<?xml version="1.0" encoding="ISO-8859-1"?>{SUCCESS}<meetings>' + item % "\u00e4",
                [*others, "\ufffd"],
            ),
            (f'<!DOCTYPE response [<!ENTITY x "y">]>{SUCCESS}<meetings>' + item % "&x;", others),
            (f"{SUCCESS}<meetings a='b'>" + item % "c", [*others, "c"]),
        ):
            self.fakes[1].faults["getMeetings"] = status(200, text.encode("latin-1"), "text/xml")
            self.assertEqual(self.listed(), expected, text)
            self.fakes[1].faults.clear()
            self.survey()

    def test_one_bad_server_never_spoils_meetings_and_sessions(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        others = [meeting for fake in self.fakes[::2] for meeting in fake.meetings.values()]
        expected = {
            "getMeetings": sorted(meeting.id for meeting in others),
            "getSessions": sorted(meeting.internal_id for meeting in others),
        }
        deep = f"{SUCCESS}<meetings>{'<a>' * 20000}{'</a>' * 20000}</meetings></response>"
        deeper = deep.replace("<a>", "<meeting>").replace("</a>", "</meeting>")
        texts = (
            "",
            "<response><meet",
            "\u00e4".encode("latin-1"),
            "<meetings/>",
            deep,
            deeper,
            deeper.replace("meetings>", "sessions>"),
            deeper.replace("<meeting>", "<1><meeting>", 1),
            f"{SUCCESS}</response>",
            '<?xml version="1.0" encoding="klingon"?><response/>',
        )
        faults = [
            reset,
            status(500),
            status(502),
            status(404),
            lambda handler: failed("apiNotEnabled"),
            lambda handler: failed("checksumError"),
            *(status(200, text, "text/xml") for text in texts),
        ]
        for number, fault in enumerate(faults):
            for call in ("getMeetings", "getSessions"):
                with self.subTest((call, number)):
                    self.fakes[1].faults[call] = fault
                    answer = self.get(call)
                    items = answer.xml.findall(SHAPES[call][0])
                    # what has no ID is that server's rubbish
                    ids = sorted(filter(None, (item.findtext("meetingID") for item in items)))
                    self.assertEqual((answer.returncode, ids), ("SUCCESS", expected[call]))
                    self.fakes[1].faults.clear()
                    self.survey()
        self.assertNotIn("report", self.log.getvalue())

    def test_if_all_servers_refuse_the_answer_is_bbbs_own(self):
        for fake in self.fakes:
            fake.faults["*"] = lambda handler: failed("apiNotEnabled")
        for call in ("getMeetings", "getSessions", "getRecordings", "deleteRecordings"):
            self.assertEqual(self.get(call, "recordID=x").messageKey, "apiNotEnabled", call)
        self.assertEqual(self.log.getvalue().count(" servers failed 200 "), 4)

    def test_entity_bombs_and_endless_answers_are_refused(self):
        entities = "".join(
            f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdef", "bcdefg")
        )
        bomb = f'<!DOCTYPE x [<!ENTITY a "{"a" * 10000}">{entities}]><response>&g;</response>'
        self.fakes[1].put("room")
        self.survey()
        many_headers = b"".join(b"X-%d: y\r\n" % number for number in range(200))
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%s\r\n" + b"x" * 200000
        raw = (
            b"\r\n" + b"x" * 200000,
            b"Content-Length: 1000000000\r\n\r\n" + b"x" * 200000,
            chunked % b"30d40",
            chunked % b"-5",
            chunked % b"-1",
            many_headers + b"\r\n",
            b"X: " + b"y" * 70000,
        )
        with mock.patch.multiple(tinyscale, MAX_ANSWER=100000):
            for fault in (
                status(200, bomb, "text/xml"),
                status(200, "x" * 200000),
                *(sends(b"HTTP/1.1 200 OK\r\n" + rest) for rest in raw),
            ):
                self.fakes[1].faults["getMeetingInfo"] = fault
                self.assertEqual(
                    self.get("getMeetingInfo", "meetingID=room").messageKey, "serverUnavailable"
                )
                self.fakes[1].faults.clear()
                self.survey()

    def test_a_list_of_meetings_does_not_wait_for_a_slow_server(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        calls = ("getMeetings", "getSessions")
        self.fakes[1].faults = dict.fromkeys(calls, silent)
        with mock.patch.multiple(tinyscale, PROBE_TIMEOUT=0.5):
            answers = self.together([lambda call=call: self.get(call) for call in calls])
        for call, answer in zip(calls, answers):
            self.assertEqual(len(answer.xml.findall(SHAPES[call][0])), 2)
        # it still has time to answer
        self.assertEqual(self.directory.servers[1].state, "up")

    def test_a_character_in_a_name_that_xml_forbids_hides_nothing(self):
        for character in "\x00\x08\x1f\ufffe\uffff":
            with self.subTest(character):
                self.fakes[0].put("room").name = f"a{character}b"
                self.survey()
                listed = self.get("getMeetings").xml
                self.assertEqual(listed.findtext("meetings/meeting/meetingName"), "a b")
                # what is relayed stays as it is
                relayed = self.get("getMeetingInfo", "meetingID=room").body.decode()
                self.assertIn(f"<meetingName>a{character}b</meetingName>", relayed)
                self.assertEqual(self.directory.find("room")[1], "remembered")
                self.directory.forget(self.directory.servers[0], "room", self.clock.monotonic())
                self.assertIs(self.directory.find("room")[0], self.directory.servers[0])
                self.assertEqual(self.directory.servers[0].state, "up")


class RecordingsTest(ClusterTest):
    def setUp(self):
        super().setUp()
        self.ids = [
            fake.record(f"lecture{number}", 1000 + number) for number, fake in enumerate(self.fakes)
        ]

    def listed(self, query=""):
        """The IDs of the recordings in the list, by a parser that forgives nothing."""
        text = self.get("getRecordings", query).body.decode("utf-8")
        items = ET.fromstring(text).findall("recordings/recording")
        return [item.findtext("recordID") for item in items]

    def test_the_newest_come_first_and_each_once(self):
        self.fakes[0].record("", 1002, copy_of=self.ids[2])
        self.assertEqual(self.listed(), self.ids[::-1])

    def test_metadata_named_like_a_recording_loses_nobody_the_list(self):
        names = custom("recording") + custom("1")
        fault = with_text("<name>", f"<metadata>{names}</metadata><name>")
        self.fakes[0].faults["getRecordings"] = fault
        self.assertEqual(self.listed(), self.ids[::-1])

    def test_each_way_to_select_recordings_selects_on_all_servers(self):
        self.fakes[2].recordings[self.ids[2]]["state"] = "unpublished"
        self.fakes[1].recordings[self.ids[1]]["meta"]["course"] = "7"
        for query, expected in (
            (f"recordID={self.ids[0]}", [0]),
            (f"recordID={self.ids[0]},{self.ids[2]},", [2, 0]),
            (f"recordID={self.ids[0]}%2C{self.ids[1]}", [1, 0]),
            ("recordID=no", []),
            ("recordID=" + ",".join(["x" * 54] * 99 + [self.ids[1]]), [1]),
            ("meetingID=lecture1", [1]),
            ("meetingID=lecture1,lecture0,,", [1, 0]),
            ("meta_course=7", [1]),
            ("meetingID=&recordID=", [2, 1, 0]),
            ("state=published", [1, 0]),
            ("state=unpublished", [2]),
        ):
            self.assertEqual(
                self.listed(query), [self.ids[number] for number in expected], query[:99]
            )

    def test_pages_are_cut_from_the_merged_list(self):
        for number in range(150):
            self.fakes[number % 3].record(f"more{number}", 2000 + number)
        every = self.listed()
        self.assertEqual(len(every), 153)
        for query, first, last, limit in (
            ("offset=0&limit=10", 0, 10, 10),
            ("offset=10&limit=5", 10, 15, 5),
            ("limit=3", 0, 3, 3),
            ("offset=150&limit=100", 150, 153, 100),
            ("offset=-4&limit=0", 0, 1, 1),
            ("offset=x&limit=-7", 0, 1, 1),
            ("offset=1&limit=1000", 1, 101, 100),
            ("offset=200&limit=2", 200, 200, 2),
        ):
            with self.subTest(query):
                self.assertEqual(self.listed(query), every[first:last])
                answer = self.get("getRecordings", query)
                tags = [child.tag for child in answer.xml]
                self.assertEqual(tags[:2], ["returncode", "recordings"])
                # clients look for it there, too
                self.assertEqual(tags[-2:], ["totalElements", "pagination"])
                self.assertEqual((answer.totalElements, len(tags) == 6), ("153", first == last))
                pagination = answer.xml[-1]
                self.assertEqual(
                    {child.tag: child.text for child in pagination.iter() if child.text},
                    {
                        "offset": str(first),
                        "limit": str(limit),
                        "paged": "true",
                        "unpaged": "false",
                        "totalElements": "153",
                        "empty": str(first == last).lower(),
                    },
                )
                self.assertIsNotNone(pagination.find("pageable/offset"))
        for limit in ("", "ten", "1.5"):
            self.assertEqual(self.listed(f"limit={limit}&offset=2"), every)
            answer = self.get("getRecordings", f"limit={limit}")
            self.assertEqual([child.tag for child in answer.xml], ["returncode", "recordings"])

    def test_what_is_taken_for_a_parameter_is_what_is_taken_out(self):
        # the fakes complain of a limit
        for query in (
            "%6Cimit=2",
            "limi%74=2&o%66fset=0",
            "limit=2&limit=1&%6cimit=1",
            "&&limit=2",
        ):
            self.assertEqual(self.listed(query), self.ids[:0:-1], query)
        self.assertEqual(self.listed("limit=2&Limit=1&xlimit=1&limits=1"), self.ids[:0:-1])
        asked = self.fakes[0].calls[-1][1]
        self.assertTrue(asked.startswith("Limit=1&xlimit=1&limits=1&checksum="), asked)

    def test_a_list_that_lost_recordings_when_it_was_mended_is_no_list(self):
        item = "<recording><recordID>{}</recordID><metadata><d><![CDATA[{}]]></d></metadata>"
        for value, returncode in (
            ("<p>Hello <b>you</b></p>", "SUCCESS"),
            ("a</metadata></recording><recording>", "FAILED"),
        ):
            with self.subTest(value):
                items = [item.format("first", value), item.format("second", "")]
                text = "".join(f"{item}</recording>" for item in items)
                self.fakes[0].faults["getRecordings"] = status(
                    200, f"{SUCCESS}<recordings>{text}</recordings></response>", "text/xml"
                )
                answer = self.get("getRecordings")
                self.assertEqual(answer.returncode, returncode)
                if returncode == "SUCCESS":
                    self.assertEqual(answer.xml.findtext(".//metadata/d"), value)

    def test_a_list_that_lacks_a_server_is_no_success(self):
        queries = (
            "",
            "limit=1",
            "meetingID=lecture0",
            "recordID=no",
            f"recordID={self.ids[0]},{self.ids[1]}",
            f"recordID={self.ids[0][:20]}",
        )
        faults = [
            reset,
            status(500),
            status(502),
            status(404),
            status(200, "<response><rec", "text/xml"),
            status(200, f"{SUCCESS}<recordings>", "text/xml"),
            lambda handler: failed("apiNotEnabled"),
        ]
        for number, fault in enumerate(faults):
            self.fakes[1].faults["getRecordings"] = fault
            for query in queries:
                with self.subTest((query, number)):
                    answer = self.get("getRecordings", query)
                    self.assertEqual(answer.messageKey, "serverUnavailable")
            # the others have them
            answer = self.get("getRecordings", f"recordID={self.ids[0]},{self.ids[2]},")
            self.assertEqual((answer.returncode, answer.messageKey), ("SUCCESS", None))
            self.assertEqual(self.states(), ["up"] * 3)
            self.fakes[1].faults.clear()
        self.assertNotIn("report", self.log.getvalue())

    def test_a_recording_that_is_nested_very_deep_is_listed_all_the_same(self):
        deep = f"<recording><recordID>deep</recordID>{'<a>' * 2000}{'</a>' * 2000}</recording>"
        self.fakes[1].faults["getRecordings"] = lambda handler: success(
            f"<recordings>{deep}</recordings>"
        )
        self.assertEqual(self.listed(), [self.ids[2], self.ids[0], "deep"])
        self.assertNotIn("report", self.log.getvalue())

    def test_a_silent_server_gives_no_list(self):
        self.fakes[1].faults["getRecordings"] = silent
        queries = ("", f"recordID={self.ids[0]},{self.ids[2]}")
        with mock.patch.multiple(tinyscale, CONNECT_TIMEOUT=0.5, LONG_TIMEOUT=0.5):
            every, some = self.together(
                [lambda query=query: self.get("getRecordings", query) for query in queries]
            )
        self.assertEqual(every.messageKey, "serverUnavailable")
        self.assertEqual(len(some.xml.findall("recordings/recording")), 2)
        # recordings are slow: that is no outage
        self.assertEqual(self.states(), ["up"] * 3)

    def test_a_server_with_thousands_of_recordings_may_take_its_time(self):
        def slow(handler):
            handler.bbb.released.wait(0.3)
            return proper(handler)

        self.fakes[1].faults["getRecordings"] = slow
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.1, PROBE_TIMEOUT=0.1):
            self.assertEqual(self.listed(), self.ids[::-1])

    def test_no_name_of_metadata_hides_a_recording(self):
        for name in ODD_NAMES:
            with self.subTest(name):
                inner = f"<metadata>{custom(name)}</metadata><name>"
                for fake in self.fakes:
                    fake.faults["getRecordings"] = with_text("<name>", inner)
                self.assertEqual(self.listed(), self.ids[::-1])
                self.assertEqual(self.listed("limit=2&offset=1"), self.ids[1::-1])
                change = self.get("updateRecordings", f"recordID={self.ids[1]}&meta_x=y")
                self.assertEqual(change.updated, "true")
        self.assertEqual(self.counts("updateRecordings"), [0, len(ODD_NAMES), 0])

    def test_metadata_that_is_called_recording_ends_no_recording(self):
        item = (
            "<recording><recordID>{0}</recordID><metadata><recording>{0}</recording><1>x</1>"
            "</metadata><playback>{0}</playback></recording>"
        )
        items = [item.format("first"), item.format("second")]
        text = f"{SUCCESS}<recordings>{''.join(items)}</recordings></response>"
        self.fakes[0].faults["getRecordings"] = status(200, text, "text/xml")
        recordings = self.get("getRecordings").xml.findall("recordings/recording")
        told = [recording.findtext("playback") for recording in recordings]
        self.assertEqual(sorted(filter(None, told)), ["first", "second"])

    def test_a_server_that_lists_recordings_only_in_pages_is_not_taken_for_an_empty_one(self):
        self.fakes[1].refuses_all_recordings = True
        self.assertEqual(self.get("getRecordings", "limit=10").messageKey, "serverUnavailable")
        self.assertEqual(self.get("getRecordings").messageKey, "serverUnavailable")
        self.fakes[0].refuses_all_recordings = self.fakes[2].refuses_all_recordings = True
        self.assertEqual(self.get("getRecordings", "limit=10").messageKey, "serverUnavailable")
        self.assertEqual(self.get("getRecordings").messageKey, "serverUnavailable")
        self.assertEqual(self.listed("meetingID=lecture1"), self.ids[1:2])

    def test_changes_reach_the_servers_that_have_the_recordings(self):
        first, second, third = self.ids
        for call, extra, element in (
            ("publishRecordings", "&publish=false", "published"),
            ("updateRecordings", "&meta_x=y", "updated"),
            ("deleteRecordings", "", "deleted"),
        ):
            for wanted, owners in (
                ([first], [1, 0, 0]),
                ([first, second], [1, 1, 0]),
                ([third, "unknown", second], [0, 1, 1]),
            ):
                with self.subTest((call, wanted)):
                    answer = self.get(call, f"recordID={','.join(wanted)}{extra}")
                    self.assertEqual((answer.returncode, self.counts(call)), ("SUCCESS", owners))
                    self.assertIsNotNone(answer.xml.find(element))
                    for fake in self.fakes:
                        fake.calls.clear()
                        for recording in fake.recordings.values():
                            recording["state"] = "published"
            self.assertEqual(self.get(call, f"recordID=unknown,too{extra}").messageKey, "notFound")
            self.assertEqual(self.get(call, extra[1:]).messageKey, "missingParamRecordID")

    def test_a_change_of_what_is_found_nowhere_is_no_success_while_a_server_is_down(self):
        first, second, third = self.ids
        self.fakes[1].down()
        self.survey()
        for call in ("publishRecordings", "deleteRecordings", "updateRecordings"):
            for ids, owners in (
                ([second], [0, 0, 0]),
                (["unknown"], [0, 0, 0]),
                # what can be done is done, and a repeat finishes it
                ([first, second], [1, 0, 0]),
            ):
                answer = self.get(call, f"recordID={','.join(ids)}&publish=false")
                self.assertEqual(answer.messageKey, "serverUnavailable")
                self.assertEqual(self.counts(call), owners)
        answer = self.get("deleteRecordings", f"recordID={first},{third}")
        self.assertEqual((answer.deleted, self.counts("deleteRecordings")), ("true", [2, 0, 1]))
        self.fakes[1].up()
        self.survey()
        answer = self.get("deleteRecordings", f"recordID={first},{second}")
        self.assertEqual((answer.deleted, self.counts("deleteRecordings")), ("true", [1, 1, 0]))

    def test_what_can_be_changed_is_changed_before_a_failure_is_told(self):
        first, _, third = self.ids
        for call, extra, state in (
            ("publishRecordings", "&publish=false", "unpublished"),
            ("updateRecordings", "&meta_x=y", "published"),
            ("deleteRecordings", "", "deleted"),
        ):
            for fault in (reset, status(502), status(500), lambda handler: failed("checksumError")):
                with self.subTest((call, fault)):
                    # the first of the owners: the other one comes after it
                    self.fakes[0].faults[call] = fault
                    query = f"recordID={first},{third}{extra}"
                    self.assertEqual(self.get(call, query).messageKey, "serverUnavailable")
                    self.assertEqual(self.counts(call), [1, 0, 1])
                    owners = f"{self.fakes[0].url} and {self.fakes[2].url} (owner)"
                    self.assertIn(f"{owners} serverUnavailable", self.log.getvalue())
                    self.clear_log()
                    self.assertEqual(self.fakes[0].recordings[first]["state"], "published")
                    self.assertEqual(self.fakes[2].recordings[third]["state"], state)
                    # it is no outage, and a repeat finishes it
                    self.assertEqual(self.states(), ["up"] * 3)
                    self.fakes[0].faults.clear()
                    self.assertEqual(self.get(call, query).returncode, "SUCCESS")
                    self.assertEqual(self.fakes[0].recordings[first]["state"], state)
                    for fake in self.fakes:
                        fake.calls.clear()
                        for recording in fake.recordings.values():
                            recording["state"] = "published"

    def test_text_tracks_are_json_and_reach_the_one_owner_once(self):
        query, content_type = (
            f"recordID={self.ids[1]}&kind=subtitles&lang=de-DE",
            "multipart/form-data; boundary=B",
        )
        disposition = b"Content-Disposition: form-data; name=file; filename=a.vtt"
        body = b"--B\r\n" + disposition + b"\r\n\r\nWEBVTT\xff\r\n--B--\r\n"
        put = self.get(
            "putRecordingTextTrack",
            query,
            method="POST",
            body=body,
            headers={"Content-Type": content_type},
        )
        self.assertEqual(
            json.loads(put.body)["response"]["messageKey"], "upload_text_track_success"
        )
        self.assertEqual(self.counts("putRecordingTextTrack"), [0, 1, 0])
        self.assertEqual(self.fakes[1].calls[-1][2:], ("POST", body, content_type))
        got = self.get("getRecordingTextTracks", f"recordID={self.ids[1]}")
        self.assertEqual(
            (got.headers["Content-Type"], json.loads(got.body)["response"]["tracks"]),
            ("application/json;charset=utf-8", [{"kind": "subtitles", "lang": "de-DE"}]),
        )
        # only the probes that come before are short
        self.fakes[1].faults["getRecordingTextTracks"] = slow_by(0.4)
        with mock.patch.multiple(tinyscale, PROBE_TIMEOUT=0.2, LATE=0.05):
            got = self.get("getRecordingTextTracks", f"recordID={self.ids[1]}")
        self.assertEqual(len(json.loads(got.body)["response"]["tracks"]), 1)
        missing = json.loads(self.get("getRecordingTextTracks", "recordID=no").body)["response"]
        self.assertEqual(missing["messageKey"], "noCaptionsFound")
        self.fakes[1].down()
        self.survey()
        gone = self.get("getRecordingTextTracks", f"recordID={self.ids[1]}")
        self.assertEqual(gone.messageKey, "serverUnavailable")

    def test_one_success_is_a_success_in_json_too(self):
        record_id = self.fakes[0].record("lecture", 5)
        self.fakes[1].record("lecture", 5, copy_of=record_id)
        for number in range(2):
            answers = [
                '{"response":{"returncode":"FAILED"}}',
                '{"response":{"returncode":"SUCCESS"}}',
            ]
            for fake, answer in zip(self.fakes[number:2] + self.fakes[:number], answers):
                fake.faults["getRecordingTextTracks"] = status(200, answer, "application/json")
            tracks = self.get("getRecordingTextTracks", f"recordID={record_id}")
            self.assertIn(b"SUCCESS", tracks.body)

    def test_recordings_in_any_state_are_found_to_be_changed(self):
        record_id = self.fakes[2].record("lecture", 5, state="processing")
        for call in ("deleteRecordings", "publishRecordings"):
            self.assertEqual(
                self.get(call, f"recordID={record_id}&publish=true").returncode, "SUCCESS"
            )
            self.assertEqual(self.counts(call), [0, 0, 1])

    def test_record_ids_are_decoded_twice_as_bbb_does(self):
        self.fakes[1].down()
        self.survey()
        answer = self.get("getRecordings", f"recordID={self.ids[0]}%252C{self.ids[2]}")
        self.assertEqual(
            (answer.returncode, len(answer.xml.findall("recordings/recording"))), ("SUCCESS", 2)
        )


class HooksTest(ClusterTest):
    URL = "https://moodle.example.org/hook?a=1"
    OTHER = "https://other.example.org/"

    def create_hook(self, url=URL):
        return self.get("hooks/create", f"callbackURL={quote_plus(url)}")

    def destroy(self, hook_id):
        return self.get("hooks/destroy", f"hookID={hook_id}")

    def listed(self):
        """The hooks in the list: callback URL -> ID."""
        hooks = self.get("hooks/list").xml.findall("hooks/hook")
        listed = {hook.findtext("callbackURL"): hook.findtext("hookID") for hook in hooks}
        self.assertEqual(len(listed), len(hooks))
        return listed

    def owned(self):
        """The callback URLs of each server."""
        return [sorted(fake.hooks.values()) for fake in self.fakes]

    def no_webhooks(self, fake):
        """nginx where bbb-webhooks is not installed."""
        for call in ("hooks/create", "hooks/list", "hooks/destroy"):
            fake.faults[call] = status(404)

    def test_the_answer_to_a_new_webhook_is_xml_whatever_its_elements_are_called(self):
        for fake in self.fakes:
            fake.faults["hooks/create"] = lambda handler: success(
                "<hookID>1</hookID><permanentHook>false</permanentHook><\u00e4>x</\u00e4>"
            )
        answer = self.get("hooks/create", "callbackURL=http%3A%2F%2Fx")
        self.assertEqual(answer.xml.findtext("\u00e4"), "x")

    def test_a_hook_on_all_servers_is_one_hook_for_the_caller(self):
        for without in (None, 0, 1):
            with self.subTest(without=without):
                if without is not None:
                    self.no_webhooks(self.fakes[without])
                first, again = self.create_hook(), self.create_hook()
                self.assertEqual((first.messageKey, again.messageKey), (None, "duplicateWarning"))
                self.assertEqual((first.hookID, first.permanentHook), (again.hookID, "false"))
                other = self.create_hook(self.OTHER)
                expected = {self.URL: first.hookID, self.OTHER: other.hookID}
                self.assertEqual(self.listed(), expected)
                self.assertEqual(self.destroy(first.hookID).removed, "true")
                count = 3 if without is None else 2
                removed = f"hooks/destroy '' removed from {count} of 3 servers success"
                self.assertIn(removed, self.log.getvalue())
                self.assertEqual(self.destroy(first.hookID).messageKey, "destroyMissingHook")
                self.assertEqual(self.listed(), {self.OTHER: other.hookID})
                self.assertEqual(self.destroy(other.hookID).removed, "true")
                self.assertEqual(self.owned(), [[], [], []])
                empty = self.get("hooks/list").body.decode()
                self.assertEqual(empty, f"{SUCCESS}<hooks></hooks></response>")
                self.assertEqual(self.states(), ["up"] * 3)
                for fake in self.fakes:
                    fake.faults.clear()
                self.clear_log()

    def test_what_a_call_lacks_is_said_as_bbb_says_it(self):
        for query in ("", "hookID="):
            self.assertEqual(self.get("hooks/destroy", query).messageKey, "missingParamHookID")
        self.assertEqual(self.get("hooks/create").messageKey, "missingParamCallbackURL")
        self.assertEqual(self.destroy("1").messageKey, "destroyMissingHook")

    def test_its_id_comes_from_the_url_alone(self):
        hook_id = self.create_hook().hookID
        # old front ends keep it in 32 bits
        self.assertTrue(0 < int(hook_id) < 2**31)
        self.assertEqual(hook_id, str(int(hook_id)))
        self.assertNotEqual(hook_id, self.create_hook(self.OTHER).hookID)
        for fake in self.fakes:
            fake.down()
            self.survey()
            self.assertEqual(self.listed()[self.URL], hook_id)
            self.assertEqual(self.create_hook().hookID, hook_id)
            fake.up()
            self.survey()
        # all servers have new numbers, and we know nothing any more
        for fake in self.fakes:
            fake.hooks.clear()
        self.start()
        self.assertEqual(self.create_hook().hookID, hook_id)

    def test_another_hooks_own_number_is_never_destroyed(self):
        self.fakes[0].hooks = {"1": self.URL, "2": self.OTHER}
        self.fakes[1].hooks = {"1": self.OTHER}
        self.fakes[2].hooks = {"2": self.URL}
        listed = self.listed()
        self.assertEqual(set(listed), {self.URL, self.OTHER})
        self.assertFalse(set(listed.values()) & {"1", "2"})
        for number in ("1", "2"):
            self.assertEqual(self.destroy(number).messageKey, "destroyMissingHook")
        self.assertEqual(self.counts("hooks/destroy"), [0, 0, 0])
        self.assertEqual(self.destroy(listed[self.URL]).removed, "true")
        self.assertEqual(self.owned(), [[self.OTHER], [self.OTHER], []])
        # nor is it handed on
        cut_short = status(200, SUCCESS + "<hookID>1</hookID>", "text/xml")
        self.fakes[0].faults["hooks/create"] = cut_short
        self.assertEqual(self.create_hook().messageKey, "serverUnavailable")

    def test_a_server_that_is_away_is_completed_by_a_repeat(self):
        self.fakes[1].down()
        self.survey()
        self.clear_log()
        hook_id = self.create_hook().hookID
        self.assertEqual(self.owned(), [[self.URL], [], [self.URL]])
        (warning,) = [line for line in self.log.getvalue().splitlines() if "not on" in line]
        self.assertIn(self.fakes[1].url, warning)
        self.assertNotIn(self.fakes[0].url, warning)
        self.fakes[1].up()
        self.survey()
        self.clear_log()
        self.assertEqual(self.create_hook().hookID, hook_id)
        self.assertEqual(self.owned(), [[self.URL]] * 3)
        self.assertNotIn("not on", self.log.getvalue())

        self.fakes[0].down()
        self.survey()
        for _ in range(2):
            # what can be done is done
            self.assertEqual(self.destroy(hook_id).messageKey, "serverUnavailable")
            self.assertEqual(self.owned(), [[self.URL], [], []])
        self.fakes[0].up()
        self.survey()
        self.assertEqual(self.destroy(hook_id).removed, "true")
        self.assertEqual(self.owned(), [[], [], []])
        self.assertEqual(self.destroy(hook_id).messageKey, "destroyMissingHook")

    def test_not_found_is_said_only_when_all_have_said_so(self):
        hook_id = self.create_hook().hookID
        answers = (
            ("hooks/list", reset),
            ("hooks/list", status(500)),
            ("hooks/list", status(502)),
            ("hooks/list", lambda handler: failed("checksumError")),
            ("hooks/list", lambda handler: failed("internalError")),
            ("hooks/list", status(200, f"{SUCCESS}<hooks>", "text/xml")),
            ("hooks/list", lambda handler: success("<hooks><hook><a b></hook></hooks>")),
            ("hooks/destroy", reset),
            ("hooks/destroy", status(502)),
            ("hooks/destroy", lambda handler: failed("checksumError")),
            ("hooks/destroy", lambda handler: failed("destroyHookError")),
        )
        for number, (call, fault) in enumerate(answers):
            with self.subTest(number):
                self.create_hook()
                self.fakes[0].faults = {call: fault}
                for _ in range(2):
                    self.assertEqual(self.destroy(hook_id).messageKey, "serverUnavailable")
                    self.assertEqual(self.owned(), [[self.URL], [], []])
                # webhooks are another program
                self.assertEqual(self.states(), ["up"] * 3)
                self.fakes[0].faults.clear()
                self.assertEqual(self.destroy(hook_id).removed, "true")
                self.assertEqual(self.owned(), [[], [], []])

    def test_a_hook_is_removed_from_all_servers_at_once(self):
        hook_id = self.create_hook().hookID
        barrier = threading.Barrier(3, timeout=5)
        for fake in self.fakes:
            fake.faults["hooks/destroy"] = lambda handler: (barrier.wait(), proper(handler))[1]
        self.assertEqual(self.destroy(hook_id).removed, "true")

    def test_a_permanent_hook_is_not_said_to_be_removed(self):
        hook_id = self.create_hook().hookID
        for fake in self.fakes:
            fake.faults["hooks/destroy"] = lambda handler: failed("destroyMissingHook")
        self.assertEqual(self.destroy(hook_id).messageKey, "destroyMissingHook")
        self.assertEqual(self.owned(), [[self.URL]] * 3)

    def test_webhooks_that_are_missing_or_refuse_are_no_outage_of_the_server(self):
        self.fakes[0].has_hooks = False
        self.fakes[1].faults["hooks/create"] = lambda handler: failed("checksumError")
        self.assertEqual(self.create_hook().returncode, "SUCCESS")
        self.assertEqual(list(self.listed()), [self.URL])
        for code in (404, 500, 502):
            for fake in self.fakes:
                fake.faults["hooks/create"] = fake.faults["hooks/list"] = status(code)
            self.assertEqual(self.create_hook().messageKey, "serverUnavailable")
            # a server without webhooks has said that it has none
            expected = None if code == 404 else "serverUnavailable"
            self.assertEqual(self.get("hooks/list").messageKey, expected)
        self.assertEqual(self.states(), ["up"] * 3)

    def test_silent_webhooks_hide_no_hook_of_the_others(self):
        self.create_hook()
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.5, PROBE_TIMEOUT=0.5):
            self.fakes[1].faults = dict.fromkeys(("hooks/create", "hooks/list"), silent)
            listed, created = self.together([self.listed, lambda: self.create_hook(self.OTHER)])
        self.assertIn(self.URL, listed)
        self.assertEqual(created.returncode, "SUCCESS")
        both = [self.URL, self.OTHER]
        self.assertEqual(self.owned(), [both, [self.URL], both])
        self.assertEqual(self.states(), ["up"] * 3)


class ClientHabitsTest(ClusterTest):
    """Each test is what one front end is known to do."""

    def test_moodle_sends_an_ampersand_first_and_follows_no_redirects(self):
        self.fakes[1].put("room")
        value = hashlib.sha256(f"getMeetings{SECRET}".encode()).hexdigest()
        self.assertEqual(
            self.http(f"/bigbluebutton/api/getMeetings?&checksum={value}").returncode, "SUCCESS"
        )
        ids = [self.fakes[number % 3].record(f"lecture{number}", number) for number in range(25)]
        answer = self.get("getRecordings", f"recordID={','.join(ids)},&state=any")
        self.assertEqual(
            (answer.status, len(answer.xml.findall("recordings/recording"))), (200, 25)
        )
        self.assertEqual(
            len(self.get("getRecordings", "meetingID=none").xml.findall("recordings")), 1
        )

    def test_nextcloud_signs_the_root_with_an_empty_secret(self):
        for path in ("/bigbluebutton/api/", "/bigbluebutton/api", "/bigbluebutton/"):
            answer = self.http(f"{path}?checksum={hashlib.sha1(b'').hexdigest()}")
            self.assertEqual(
                (answer.status, answer.returncode, answer.version), (200, "SUCCESS", "2.0")
            )

    def test_greenlight_repeats_a_create_without_passwords_and_asks_for_meeting_0(self):
        first, again = self.create("room"), self.create("room")
        self.assertEqual(
            (again.messageKey, again.internalMeetingID),
            ("duplicateWarning", first.internalMeetingID),
        )
        self.assertEqual(self.get("isMeetingRunning", "meetingID=0").running, "false")

    def test_greenlight_and_bigbluepy_send_a_slash_too_many(self):
        query = signed("create", "name=x&meetingID=room")
        answer = self.http(f"/bigbluebutton/api//create?{query}")
        self.assertEqual(answer.returncode, "SUCCESS")
        query = signed("join", "fullName=X&meetingID=room")
        location = self.http(f"/bigbluebutton/api/join/?{query}").headers["Location"]
        self.assertTrue(
            location.startswith(self.having("room")[0].url + "/bigbluebutton/api/join?")
        )
        answer = self.http(f"/bigbluebutton/api/hooks/list/?{signed('hooks/list', '')}")
        self.assertEqual(answer.returncode, "SUCCESS")

    def test_mattermost_sends_empty_parameters(self):
        self.create("room", "&parentMeetingID=&logoutURL=&redirect=")
        answer = self.get("join", "fullName=X&meetingID=room&redirect=&password=")
        self.assertEqual(answer.status, 302)

    def test_bbb_exporter_sends_the_checksum_first(self):
        value = hashlib.sha1(f"getRecordingsstate=published{SECRET}".encode()).hexdigest()
        answer = self.http(f"/bigbluebutton/api/getRecordings?checksum={value}&state=published")
        self.assertEqual(answer.returncode, "SUCCESS")

    def test_the_php_library_signs_with_sha256_and_labels_its_posts_as_forms(self):
        answer = self.get(
            "create",
            "name=x&meetingID=room",
            digest="sha256",
            method="POST",
            body=BodiesTest.SLIDES,
            headers={"Content-Type": FORM, "Expect": "100-continue"},
        )
        self.assertEqual(answer.returncode, "SUCCESS")

    def test_a_java_client_wants_exactly_200(self):
        for call in ("getMeetingInfo", "end", "isMeetingRunning", "getRecordings"):
            self.assertEqual(self.get(call, "meetingID=no").status, 200)

    def test_a_front_end_with_a_secret_of_its_own_is_let_in(self):
        self.assertEqual(self.get("getMeetings", secret="another-secret").returncode, "SUCCESS")
        self.assertEqual(self.get("getMeetings", secret="wrong").messageKey, "checksumError")


# ---- for the admin -------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: tags, attributes, and the texts of the cells of each row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.texts = set(), [], [], []
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


class WatchingTest(ClusterTest):
    settings = (("TINYSCALE_STATUS_PASSWORD", "s3same"),)

    def login(self, password="s3same", user="admin"):
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": "Basic " + token}

    def status_page(self):
        answer = self.http("/status", headers=self.login())
        self.assertEqual(answer.status, 200)
        return Page(answer.body.decode())

    def figures(self):
        """The samples of /metrics, by name and labels."""
        text = self.http("/metrics", headers=self.login()).body.decode()
        return dict(re.findall("^(tinyscale[^ ]*) ([-+.e0-9]+)$", text, re.MULTILINE))

    def test_only_the_password_opens_status_and_metrics(self):
        for path in ("/status", "/metrics"):
            for headers in (
                {},
                self.login("wrong"),
                self.login(""),
                self.login(user="root"),
                {"Authorization": "Basic x"},
                {"Authorization": "Basic \xff"},
                {"Authorization": self.login()["Authorization"][6:]},
            ):
                answer = self.http(path, headers=headers)
                self.assertEqual(
                    (answer.status, answer.headers["WWW-Authenticate"][:6]), (401, "Basic ")
                )
                self.assertEqual(answer.body, b"")
            self.assertEqual(self.http(path, headers=self.login()).status, 200)
        self.assertEqual(self.http("/health").status, 200)
        self.settings = (("TINYSCALE_STATUS_PASSWORD", " "),)
        self.load()
        for password in ("", " "):
            self.assertEqual(self.http("/status", headers=self.login(password)).status, 404)

    def test_the_status_page_tells_at_a_glance_what_is_down_and_which_room_is_where(self):
        biology = self.fakes[0].put("bio-7b", people=3)
        biology.name = "Biology 7b"
        self.fakes[0].put("zoo").name = "At the zoo"
        self.fakes[0].put("empty", people=0).name = "An empty room"
        self.fakes[1].put("art", people=7).name = "Art"
        self.fakes[2].put("lost", people=5).name = "Lost"
        entries = self.entries()
        entries[1]["cordoned"] = True
        entries.append({"host": "https://new.example.org", "secret": "secret-of-new"})
        self.load(entries)
        new = self.directory.servers.pop()
        self.survey()
        self.fakes[2].down()
        self.survey()
        self.directory.servers.append(new)
        self.clock.ahead += 120
        page = self.status_page()
        self.assertIn("2 of 4 servers up · 11 people in 4 rooms", page.texts)
        facts = f"tinyscale {tinyscale.__version__}, running for 2 min · surveyed 2 min ago"
        self.assertIn(facts, page.texts)
        self.assertIn("The settings on disk are good. ", page.texts)
        heads, *rows = page.rows
        self.assertEqual(
            heads, ["Server", "State", "Rooms", "People", "Answers in", "BBB", "Certificate"]
        )
        states = {row[0]: row[1] for row in rows[:4]}
        # what is down comes first, what gets no new meetings last
        self.assertEqual(
            list(states),
            [self.fakes[2].url, str(new), self.fakes[0].url, self.fakes[1].url],
        )
        self.assertRegex(states[self.fakes[2].url], "^down for 2 min: no connection: .*refused")
        self.assertEqual(states[str(new)], "unknown for 2 min: no survey yet")
        self.assertEqual(states[self.fakes[0].url], "up for 2 min")
        self.assertEqual(states[self.fakes[1].url], "cordoned for 2 min")
        unknown = ["-", "-", "-"]
        self.assertEqual(rows[0][2:5], unknown)
        self.assertEqual(rows[1][2:], unknown + ["-", "-"])
        self.assertEqual((rows[2][2:4], rows[2][5:]), (["3", "4"], ["3.0.4", "-"]))
        self.assertRegex(rows[2][4], "^[0-9]+ ms$")
        self.assertEqual(rows[3][2:4], ["1", "7"])
        bars = [
            value for name, value in page.attributes if name in ("value", "max")
        ]  # of all people
        self.assertEqual(bars, ["4", "11", "7", "11"])
        self.assertEqual(
            rows[4:],
            [["Biology 7b bio-7b", "3"], ["At the zoo zoo", "1"], ["An empty room empty", "0"]]
            + [["Art art", "7"]],
        )
        titles = [text for text in page.texts if text.startswith(self.fakes[0].url + ":")]
        self.assertEqual(titles, [f"{self.fakes[0].url}: 3 rooms, 4 people"])

    def test_the_status_page_loads_nothing_and_runs_nothing_whatever_rooms_are_called(self):
        markup = "<script>alert('&')</script>"
        quote = '"><img src=x onerror=y>'
        self.fakes[0].put(quote, people=3).name = markup
        self.fakes[1].put("room").name = quote
        self.survey()
        self.directory.servers[2].note_down(f"it answers {quote}", self.clock.monotonic())
        answer = self.http("/status", headers=self.login())
        self.assertEqual(answer.headers["Content-Type"], "text/html;charset=utf-8")
        self.assertEqual(
            (answer.headers["Refresh"], answer.headers["Cache-Control"]), ("10", "no-store")
        )
        text = answer.body.decode()
        page = Page(text)
        self.assertIn([f"{markup} {quote}", "3"], page.rows)
        self.assertIn([f"{quote} room", "1"], page.rows)
        self.assertIn(f"it answers {quote}", page.rows[1][1])
        self.assertLessEqual(
            page.tags,
            {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "table"}
            | {"thead", "tbody", "tr", "th", "td", "span", "small", "meter"},
        )
        names = {name for name, _ in page.attributes}
        self.assertLessEqual(
            names,
            {
                "lang",
                "charset",
                "name",
                "content",
                "scope",
                "class",
                "title",
                "value",
                "max",
                "min",
            },
        )
        style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
        for wrong in ("url(", "@import", "\\"):
            self.assertNotIn(wrong, style)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self.assertEqual(
            answer.headers["Content-Security-Policy"],
            f"default-src 'none'; style-src 'sha256-{digest}'",
        )

    def test_a_server_that_refuses_a_survey_is_down_and_the_page_says_why(self):
        self.fakes[0].faults["getMeetings"] = lambda handler: failed("internalError")
        self.survey()
        self.assertEqual(self.states(), ["down", "up", "up"])
        row = self.status_page().rows[1]
        self.assertEqual(row[0], self.fakes[0].url)
        self.assertRegex(row[1], "^down for [0-9]+ s: it answers getMeetings with 'internalError'$")

    def test_what_writes_html_escapes_whatever_it_is_given(self):
        fill = tinyscale.fill
        for text in ("<b>", "a & b", "\"quoted'", "</p><script>", "&lt;", "<!--", "]]>", "\x00<"):
            for written in (
                fill("<p>{text}</p>", text=text),
                fill('<p title="{text}"></p>', text=text),
                fill('<p title="{text}">{b}{text}</p>', text=text, b=fill("<b>{x}</b>", x=text)),
            ):
                page = Page(written)
                self.assertLessEqual(page.tags, {"p", "b"})
                found = "".join(page.texts) + "".join(value for _, value in page.attributes)
                self.assertEqual(found.replace(text, ""), "")
        bold = fill("<b>{x}</b>", x="{x}")
        self.assertEqual(fill("<p>{a}{b}{c}</p>", a=5, b=None, c=bold), "<p>5None<b>{x}</b></p>")
        # a text that was put together from what was written is a text again
        self.assertEqual(fill("<p>{x}</p>", x=bold + "<i>")[:12], "<p>&lt;b&gt;")

    def test_broken_settings_are_shown_until_they_are_mended(self):
        entries = self.entries()
        entries[1]["weight"] = "<b>heavy</b>"
        self.write_servers(entries)
        tinyscale.reload(self.balancer, self.environment(), True)
        for _ in range(2):
            page = self.status_page()
            (line,) = [text for text in page.texts if "settings on disk" in text]
            self.assertIn(
                f'broken. {self.path}: entry 2 ({self.fakes[1].url}): "weight" must', line
            )
            self.assertIn('not "<b>heavy</b>"', line)
            self.assertNotIn("b", page.tags)
            self.assertIn(("class", "broken"), page.attributes)
            self.assertEqual(self.figures()["tinyscale_settings_ok"], "0")
            # it does not come to look good by itself
            tinyscale.reload(self.balancer, self.environment(), False)
        self.write_servers()
        tinyscale.reload(self.balancer, self.environment(), False)
        self.assertIn("The settings on disk are good. ", self.status_page().texts)
        self.assertEqual(self.figures()["tinyscale_settings_ok"], "1")

    def test_metrics_count_calls_by_outcome_and_tell_all_about_servers(self):
        self.fakes[0].put("room", people=5)
        self.fakes[1].put("room", people=2)
        self.load(
            [dict(entry, cordoned=number == 1) for number, entry in enumerate(self.entries())]
        )
        # on two servers is what two surveys running say
        for _ in range(3):
            self.survey()
        self.fakes[2].down()
        for query in ("meetingID=room", "meetingID=room", "meetingID=none"):
            self.get("getMeetingInfo", query)
        self.get("create", "meetingID=room", "wrong secret")
        self.get("paintTheWalls", "")
        self.get("join", "meetingID=room&fullName=X")
        self.create("another")
        self.survey()
        answer = self.http("/metrics", headers=self.login())
        self.assertEqual(answer.headers["Content-Type"], "text/plain; version=0.0.4")
        text = answer.body.decode()
        self.assertTrue(text.endswith("\n"))
        values = dict(re.findall("^(tinyscale[^ ]*) ([-+.e0-9]+)$", text, re.MULTILINE))
        for call, outcome, count in (
            ("getMeetingInfo", "success", 2),
            ("getMeetingInfo", "failed", 1),
            ("create", "checksumError", 1),
            ("create", "success", 1),
            ("join", "success", 1),
            ("other", "failed", 1),
        ):
            labels = f'{{call="{call}",outcome="{outcome}"}}'
            self.assertEqual(values["tinyscale_call_seconds_count" + labels], str(count), labels)
            self.assertGreater(float(values["tinyscale_call_seconds_sum" + labels]), 0)
        for name, number, value in (
            ("up", 0, "1"),
            ("up", 2, "0"),
            ("cordoned", 0, "0"),
            ("cordoned", 1, "1"),
            ("meetings", 0, "2"),
            ("participants", 0, "5"),
            ("participants", 1, "2"),
            ("certificate_end_seconds", 0, "0"),
        ):
            labels = f'{{server="{self.fakes[number].url}"}}'
            self.assertEqual(values[f"tinyscale_server_{name}{labels}"], value, name)
        self.assertEqual(values["tinyscale_twin_meetings"], "1")
        self.assertEqual(values[f'tinyscale_info{{version="{tinyscale.__version__}"}}'], "1")
        self.assertEqual(values["tinyscale_settings_ok"], "1")
        age = time.time() - float(values["tinyscale_start_time_seconds"])
        self.assertTrue(-1 < age < 60, age)
        # no label is a meeting's: there would be thousands
        self.assertNotIn("room", text)
        self.assertNotIn("another", text)

    def test_metrics_describe_each_family(self):
        self.get("getMeetings")
        text = self.http("/metrics", headers=self.login()).body.decode()
        kinds = dict(re.findall("^# TYPE ([a-z_]+) ([a-z]+)$", text, re.MULTILINE))
        self.assertEqual(
            kinds,
            {
                "tinyscale_info": "gauge",
                "tinyscale_start_time_seconds": "gauge",
                "tinyscale_settings_ok": "gauge",
                "tinyscale_twin_meetings": "gauge",
                "tinyscale_server_up": "gauge",
                "tinyscale_server_cordoned": "gauge",
                "tinyscale_server_meetings": "gauge",
                "tinyscale_server_participants": "gauge",
                "tinyscale_server_certificate_end_seconds": "gauge",
                "tinyscale_call_seconds": "summary",
            },
        )
        family = ""
        for line in text.splitlines():
            # each family: what it is, its type, then its samples, and nothing else
            word = line.split(" ")
            if line.startswith("# HELP "):
                family = word[2]
                self.assertRegex(line, r"^# HELP [a-z_]+ [A-Z].*[.]$")
            elif line.startswith("# TYPE "):
                self.assertEqual(word[2], family)
            else:
                self.assertRegex(line, "^" + family + r"(_sum|_count)?(\{[^{}]*\})? [0-9.e+-]+$")
        self.assertEqual(len(re.findall("^# HELP", text, re.MULTILINE)), len(kinds))

    def test_the_end_of_a_servers_certificate_is_told(self):
        with tempfile.TemporaryDirectory() as folder:
            path, tls = certified(folder)
            trust = ssl.create_default_context(cafile=path)
        secure = FakeBBB("secure", "secret-of-secure", tls)
        self.addCleanup(secure.down)
        self.fakes.append(secure)
        with mock.patch.object(tinyscale, "TRUST", trust):
            self.load()
        self.survey()
        end = calendar.timegm((2126, 10, 31, 7, 37, 25))
        name = f'tinyscale_server_certificate_end_seconds{{server="{secure.url}"}}'
        self.assertEqual(self.figures()[name], str(end))
        (row,) = [row for row in self.status_page().rows if row[0] == secure.url]
        days, unit = row[6].split()
        self.assertAlmostEqual(int(days), (end - time.time()) / 86400, delta=1)
        self.assertEqual(unit, "d")

    def test_health_tells_whether_a_new_meeting_could_be_placed(self):
        self.assertEqual(
            (self.http("/health").status, self.http("/health", "HEAD").body), (200, b"")
        )
        self.load(
            [dict(entry, cordoned=number != 1) for number, entry in enumerate(self.entries())]
        )
        self.assertEqual(self.http("/health").status, 200)
        self.fakes[1].down()
        self.survey()
        self.assertEqual(self.http("/health").status, 503)
        self.fakes[1].up()
        self.survey()
        self.assertEqual(self.http("/health").status, 200)
        self.load([dict(entry, cordoned=True) for entry in self.entries()])
        self.assertEqual(self.http("/health").status, 503)

    def test_health_agrees_with_the_next_create_after_a_failed_one(self):
        self.load(self.entries()[:1])
        self.fakes[0].faults["create"] = status(500)
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[0].faults.clear()
        for count in range(3):
            is_healthy = self.http("/health").status == 200
            is_placed = self.create(f"room{count}").returncode == "SUCCESS"
            self.assertEqual(is_healthy, is_placed)
            self.survey()
        self.assertEqual((is_healthy, is_placed), (True, True))

    def test_pages_of_our_own_that_succeed_leave_no_line_in_the_log(self):
        self.clear_log()
        for method in ("GET", "HEAD"):
            for path in ("/health", "/status", "/metrics", "/bigbluebutton/api"):
                self.assertEqual(self.http(path, method, headers=self.login()).status, 200)
        self.get("getMeetings")
        self.assertTrue(until(lambda: "getMeetings" in self.log.getvalue()))
        self.assertEqual(self.log.getvalue().count("\n"), 1, self.log.getvalue())

    def test_pages_of_our_own_that_are_refused_or_fail_are_named_in_the_log(self):
        self.load([dict(entry, cordoned=True) for entry in self.entries()])
        self.clear_log()
        self.http("/health")
        self.http("/status", headers=self.login("wrong"))
        self.settings = ()
        self.load()
        self.http("/metrics")
        self.assertTrue(until(lambda: self.log.getvalue().count("\n") == 3), self.log.getvalue())
        for line, path, code in zip(
            self.log.getvalue().splitlines(), ("/health", "/status", "/metrics"), (503, 401, 404)
        ):
            self.assertIn(path, line)
            self.assertIn(f" {code} ", line)


class SettingsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name, content, mode=0o600):
        """A file with this text, these bytes, or this in JSON. Return its path."""
        path = os.path.join(self.folder, name)
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
        return path

    def load(self, content, mode=0o600):
        return list(tinyscale.read_servers(self.file("servers.json", content, mode)))

    def settings(self, **environment):
        """The Settings of this environment, and of good ones where it says nothing."""
        servers = self.file("servers.json", [GOOD_ENTRY])
        return tinyscale.read_settings(
            {"TINYSCALE_SECRET": "hush" * 5, "TINYSCALE_SERVERS": servers, **environment}
        )

    def mistake(self, job, *args, **kwargs):
        """The one line that a mistake ends in. No secret of these tests is in it."""
        with self.assertRaises(tinyscale.SettingsError) as caught:
            job(*args, **kwargs)
        line = str(caught.exception)
        self.assertEqual(line.splitlines(), [line])
        self.assertNotIn("hush", line)
        return line

    def test_a_host_is_taken_in_every_form_that_bbb_prints(self):
        endings = (
            "",
            "/",
            "/bigbluebutton",
            "/bigbluebutton/",
            "/bigbluebutton/api",
            "/bigbluebutton/api/",
        )
        for base in (
            "https://bbb1.example.org",
            "https://bbb.example.org/bbb1",
            "https://bbb.example.org/Schools/bbb_2.b~c-d",
            "http://127.0.0.1:8080",
            "https://[::1]:9",
        ):
            for ending in endings:
                entries = self.load([{"host": base + ending, "secret": " s "}])
                self.assertEqual(entries, [tinyscale.Entry(base, "s")])
        for host, expected in (
            ("HTTPS://BBB1.example.org:4430", "https://bbb1.example.org:4430"),
            ("HTTPS://BBB.example.org/BBB1/", "https://bbb.example.org/BBB1"),
            ("http://bbb1:80/", "http://bbb1:80"),
            ("http://bbb1:443", "http://bbb1:443"),
        ):
            self.assertEqual(self.load([{"host": host, "secret": "s"}])[0].host, expected)

    def test_the_servers_of_one_reverse_proxy_are_told_apart_by_their_paths(self):
        hosts = ["https://bbb.example.org/bbb1", "https://bbb.example.org/bbb2"]
        entries = self.load([{"host": host, "secret": "s"} for host in hosts])
        self.assertEqual([entry.host for entry in entries], hosts)

    def test_the_example_is_a_list_that_is_taken(self):
        with open(os.path.join(HERE, "servers.json.example"), "rb") as file:
            entries = self.load(file.read())
        self.assertTrue(
            len(entries) > 1 and all(entry.host.startswith("https://") for entry in entries)
        )

    def test_each_mistake_is_one_line_that_names_the_entry_and_the_mend(self):
        good = GOOD_ENTRY
        values = {  # key -> wrong values of it, and words of the error
            "host": (
                (
                    "bbb1.example.org",
                    "ftp://b",
                    "https://",
                    "https://a b",
                    "https://u:p@b",
                    "https://b/oth er",
                    "https://b//bbb1",
                    "https://b..example",
                    "https://.b",
                    f"https://{'b' * 64}.example",
                    "https://b/bigbluebutton/apis?",
                    f"https://b/bigbluebutton/{'hush' * 5}",
                    f"https://b/bigbluebutton/api/{'hush' * 5}",
                    "https://b?x",
                    "https://b:x",
                    "https://b:99999",
                    "https://b:0",
                    "https://[::1",
                    "https://b\n",
                    "https://b\u00fccher.example",
                    "",
                    None,
                    5,
                    ["https://b"],
                ),
                'entry 1: "host" must look like',
            ),
            "secret": ((" ", "", 5, None, "hush\x00", ["hush"]), "'bbb-conf --secret'"),
            "weight": ((0, -1, 1.5, "2", True, None, 101), '"weight" must be a whole number'),
            "cordoned": (("yes", 1, None), '"cordoned" must be true or false'),
            "checksum": (("md5", 5, None, ["sha1"]), '"checksum" must be'),
            "wieght": ((2,), '"wieght" is no key. Known are host, secret, weight'),
        }
        for content, words in (
            (b"", "this is no JSON. It must be JSON in UTF-8, like servers.json.example"),
            (b"\xff", "this is no JSON. It must be JSON in UTF-8"),
            (b"[" * 100000, "this is no JSON"),
            ({}, "list of servers"),
            ([], "list of servers"),
            (["x"], "entry 1: it must look like"),
            ([good, None], "entry 2: it must look like"),
            ([{"secret": "hush"}], 'entry 1: "host" is missing. It must look like'),
            ([good, {"host": "https://b"}], 'entry 2 (https://b): "secret" is missing'),
            (
                [good, {**good, "host": "https://BBB1.example.org/bigbluebutton/"}],
                "entry 2 (https://bbb1.example.org): an earlier one has this host",
            ),
            *(
                ([{**good, key: value}], words)
                for key, (wrong, words) in values.items()
                for value in wrong
            ),
        ):
            with self.subTest(str(content)[:99]):
                line = self.mistake(self.load, content)
                self.assertIn(words.replace("'", '"'), line)
                self.assertIn(os.path.join(self.folder, "servers.json"), line)

    def test_a_wrong_value_is_shown_but_for_secrets(self):
        for key, value, shown in (
            ("host", "bbb1.example.org", 'not "bbb1.example.org"'),
            ("weight", "2", 'not "2"'),
            ("cordoned", "yes", 'not "yes"'),
            ("checksum", "md5", 'not "md5"'),
        ):
            self.assertIn(shown, self.mistake(self.load, [{**GOOD_ENTRY, key: value}]))
        for password in ("hush", "hush-hush" * 20):
            url = "https://bbb1.example.org/bigbluebutton/"
            for host in (
                f"https://admin:{password}@bbb1.example.org",
                # what else bbb-conf prints
                f"{url} Secret: {password}",
                f"https://mconf.github.io/api-mate/#server={url}&sharedSecret={password}",
                f"{url}?secret={password}",
            ):
                line = self.mistake(self.load, [{**GOOD_ENTRY, "host": host}])
                self.assertIn('"host" must', line)
        # the two are swapped
        swapped = {"host": "hush-hush", "secret": "https://bbb1.example.org"}
        self.assertIn('"host" must', self.mistake(self.load, [swapped]))
        # or the secret is in another wrong place
        for key in ("weight", "cordoned", "checksum"):
            line = self.mistake(self.load, [{**GOOD_ENTRY, key: "hush" * 10}])
            self.assertIn(f'"{key}" must', line)
        # also if it is no mere letters and digits, and a part of it is short
        for key in ("host", "weight", "cordoned", "checksum"):
            line = self.mistake(self.load, [{**GOOD_ENTRY, key: "A" * 24 + "-hush"}])
            self.assertIn(f'"{key}" must', line)

    def test_each_mistake_of_the_environment_is_one_line_that_names_what_was_found_and_the_mend(
        self,
    ):
        text = self.file("a-text", "no PEM, but a secret: hush\n")
        for environment, words in (
            ({"TINYSCALE_SECRET": '"hush"'}, ("TINYSCALE_SECRET:", "quotes", "Set it to")),
            ({"TINYSCALE_SECRET": "a,'hush'"}, ("TINYSCALE_SECRET:", "quotes", "Set it to")),
            ({"TINYSCALE_SECRET": "TINYSCALE_SECRET=hush"}, ("NAME=", "Set it to")),
            ({"PORT": "abc"}, ("PORT: 'abc' is no port", "a number up to 65535")),
            ({"PORT": "65536"}, ("PORT: '65536' is no port", "a number up to 65535")),
            ({"PORT": "-1"}, ("PORT: '-1' is no port",)),
            ({"PORT": "\u0663"}, ("PORT: '\u0663' is no port",)),
            ({"TINYSCALE_PLACEMENT": "Load"}, ("TINYSCALE_PLACEMENT: 'Load'", "turn, load")),
            (
                {"SSL_CERT_FILE": "/nowhere/ca.pem"},
                ("SSL_CERT_FILE", "/nowhere/ca.pem", "Check its name"),
            ),
            ({"SSL_CERT_FILE": self.folder}, ("SSL_CERT_FILE", self.folder)),
            ({"TINYSCALE_SERVERS": "nowhere.json"}, (os.path.abspath("nowhere.json"), "No such")),
            ({"TINYSCALE_SERVERS": self.folder}, ("TINYSCALE_SERVERS", "Is a directory")),
            ({"TINYSCALE_SECRET_FILE": "nowhere"}, (os.path.abspath("nowhere"), "No such file")),
            ({"TINYSCALE_SECRET_FILE": text + "/x"}, ("TINYSCALE_SECRET_FILE", "Not a directory")),
            ({"TINYSCALE_CERT": "/nowhere/tls.pem"}, ("/nowhere/tls.pem", "No such file")),
            ({"TINYSCALE_CERT": text}, (text, "PEM files that belong together")),
            ({"TINYSCALE_KEY": text}, (text, "PEM files that belong together")),
            (
                {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"},
                ("LISTEN_FDS", "one ListenStream="),
            ),
            ({"LISTEN_PID": str(os.getpid())}, ("LISTEN_FDS", "one ListenStream=")),
        ):
            with self.subTest(environment):
                line = self.mistake(self.settings, **environment)
                for word in words:
                    self.assertIn(word, line)
                # nothing of Python's own words
                self.assertNotRegex(line, "literal|Errno|codec|Expecting|Traceback|Error")

    def test_a_mistake_in_a_file_names_the_file_and_what_mends_it(self):
        good = json.dumps(GOOD_ENTRY)
        for name, text, words in (
            (
                "TINYSCALE_SERVERS",
                f"[{good},]",
                'line 1: this is no JSON. A comma stands before a "]"',
            ),
            ("TINYSCALE_SERVERS", good[:-1] + ",}", 'A comma stands before a "]" or "}": take it'),
            (
                "TINYSCALE_SERVERS",
                f"[{good},\n\n]\n",
                'A comma stands before a "]" or "}": take it',
            ),
            (
                "TINYSCALE_SERVERS",
                f"[{good}\n{good}]",
                "line 2: this is no JSON. It must be JSON in UTF-8",
            ),
            # this comma is within a secret
            (
                "TINYSCALE_SERVERS",
                f"[{good}".replace("hush-", "hush,]"),
                "It must be JSON in UTF-8",
            ),
            ("TINYSCALE_SECRET_FILE", "TINYSCALE_SECRET=hush\n", "NAME= before it"),
            ("TINYSCALE_SECRET_FILE", "hush\n'hush'\n", "quotes"),
            ("TINYSCALE_SECRET_FILE", "hush\nhu\x00sh\n", "cannot be printed"),
            ("TINYSCALE_SECRET_FILE", b"\xff\xfeh\0u\0s\0h\0", "cannot be printed"),
        ):
            with self.subTest(text):
                path = self.file("the-file", text)
                line = self.mistake(self.settings, **{name: path})
                self.assertIn(words, line)
                self.assertIn(path, line)

    def test_a_file_that_must_not_be_read_is_not_said_to_be_wrong_inside(self):
        refuse = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
        with mock.patch.object(tinyscale, "open", refuse, create=True):
            line = self.mistake(self.settings)
        self.assertIn("Permission denied. Check its name, and that the user of tinyscale may", line)
        self.assertNotIn("JSON", line)
        self.assertIn(os.path.join(self.folder, "servers.json"), line)

    def test_a_mistake_on_the_command_line_is_told_too(self):
        servers = self.file("servers.json", [GOOD_ENTRY])
        environment = {"TINYSCALE_SECRET": "hush", "TINYSCALE_SERVERS": servers}
        for arguments, words in (
            (["check", "bbb1"], "check takes no 'bbb1'"),
            (["serve", "now"], "serve takes no 'now'"),
            (["url", "/bigbluebutton/api/getMeetings"], "is no call. Write it like"),
            (["url", "https://bbb1.example.org"], "'https://bbb1.example.org' is no call"),
            (["url", "--port", "abc"], "PORT: 'abc' is no port"),
            (["check", "--servers", "/nowhere.json"], "/nowhere.json: No such file"),
        ):
            with self.subTest(arguments), mock.patch.dict(os.environ, environment, clear=True):
                with contextlib.redirect_stderr(io.StringIO()) as stderr:
                    try:
                        status = tinyscale.main(arguments)
                    except SystemExit as end:
                        status = end.code
                self.assertEqual(status, 2)
                self.assertIn(words, stderr.getvalue().splitlines()[-1])
                self.assertNotIn("hush", stderr.getvalue())

    def test_what_is_odd_but_no_reason_to_refuse_is_a_warning(self):
        path, _ = certified(self.folder)
        os.chmod(path, 0o600)
        known = "Known are TINYSCALE_SECRET, "
        for environment, words in (
            ({"TINYSCALE_SECRET": "s3cr3t"}, ("TINYSCALE_SECRET: a short", "openssl rand -hex 32")),
            ({"TINYSCALE_SECRET": "s3cr3t," + "hush" * 5}, ("TINYSCALE_SECRET: a short",)),
            ({"TINYSCALE_SERVRES": "x"}, ("TINYSCALE_SERVRES is no setting", known)),
            ({"TINYSCALE_PORT": "tcp://10.0.0.1:3005"}, ("TINYSCALE_PORT is no setting", known)),
            ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "PORT": "80"}, ("ListenStream=",)),
            (
                {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "TINYSCALE_BIND": "::1"},
                ("ListenStream=",),
            ),
        ):
            with self.subTest(environment):
                (warning,) = self.settings(**environment).warnings
                self.assertEqual(warning.splitlines(), [warning])
                for word in words:
                    self.assertIn(word, warning)
                for value in environment.values():
                    self.assertNotIn(value, warning)

    def test_good_settings_are_not_warned_of(self):
        path, _ = certified(self.folder)
        for environment in (
            {},
            {"PATH": "/bin", "PORT": "80", "TINYSCALE_BIND": "::1", "TINYSCALE_PLACEMENT": "load"},
            {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"},
            # inherited, but not meant for us, as LISTEN_PID tells: PORT does count
            {"LISTEN_PID": "1", "LISTEN_FDS": "1", "PORT": "80"},
            # it ends in 2126
            {"TINYSCALE_CERT": path},
        ):
            with self.subTest(environment):
                self.assertEqual(list(self.settings(**environment).warnings), [])

    def test_our_own_certificate_is_warned_of_when_it_has_expired(self):
        path, _ = certified(self.folder)
        for year, expected in ((2125, False), (2127, True)):
            moment = time.gmtime((year - 1970) * 365.2425 * 86400)
            now = mock.Mock(wraps=time, gmtime=lambda moment=moment: moment)
            with self.subTest(year), mock.patch.object(tinyscale, "time", now):
                warnings_of_it = self.settings(TINYSCALE_CERT=path).warnings
                self.assertEqual([path in line for line in warnings_of_it], [True] * expected)

    def test_the_end_of_a_certificate_is_read_in_both_ways_to_write_it(self):
        """X.509 has two digits for the year before 2050, and four after that."""
        for ending, expected in (
            (b"\x17\x0d270224073725Z", "2027-02-24 07:37:25"),
            (b"\x17\x0d491231235959Z", "2049-12-31 23:59:59"),
            (b"\x18\x0f20500101000000Z", "2050-01-01 00:00:00"),
            (b"\x18\x0f21261031073725Z", "2126-10-31 07:37:25"),
        ):
            with self.subTest(ending):
                pem = ssl.DER_cert_to_PEM_cert(b"0\x1e\x17\x0d261124073725Z" + ending)
                last = calendar.timegm(time.strptime(expected, "%Y-%m-%d %H:%M:%S"))
                for seconds, has_expired in ((last, False), (last + 1, True)):
                    moment = time.gmtime(seconds)
                    now = mock.Mock(wraps=time, gmtime=lambda moment=moment: moment)
                    with mock.patch.object(tinyscale, "time", now):
                        self.assertEqual(tinyscale.has_expired(pem), has_expired)

    def test_a_file_that_everyone_may_read_is_warned_about(self):
        secrets = self.file("secrets", "hush\n")
        paths = {
            "TINYSCALE_SERVERS": self.file("list.json", [GOOD_ENTRY]),
            "TINYSCALE_SECRET_FILE": secrets,
            "TINYSCALE_KEY": self.file("key.pem", KEY),
        }
        # it is no secret alone, but its key is
        certificate = self.file("certificate.pem", CERTIFICATE, 0o644)
        for name, path in paths.items():
            for mode, expected in ((0o600, 0), (0o640, 0), (0o644, 1), (0o602, 1)):
                with self.subTest((name, oct(mode))):
                    os.chmod(path, mode)
                    found = self.settings(TINYSCALE_CERT=certificate, **paths).warnings
                    found = [line for line in found if "chmod" in line]
                    self.assertEqual(len(found), expected)
                    self.assertTrue(all(line.endswith(f"chmod o-rw {path}") for line in found))
            os.chmod(path, 0o600)

    def test_our_secrets_come_from_the_environment_and_from_a_file(self):
        secrets = self.file("secrets", "third\n\n fourth \r\n")
        for text, path, expected in (
            ("first, second", "", ("first", "second")),
            ("", secrets, ("third", "fourth")),
            ("first", secrets, ("first", "third", "fourth")),
        ):
            environment = {"TINYSCALE_SECRET": text, "TINYSCALE_SECRET_FILE": path}
            self.assertEqual(self.settings(**environment).secrets, expected)

    def test_a_blank_secret_or_a_file_without_one_is_a_mistake(self):
        for text, path, words in (
            ("", "", "there is no"),
            (" ", "", "blank"),
            ("a,,b", "", "blank"),
            ("a, ", "", "blank"),
            ("a\udcffb", "", "blank"),
            ("", os.devnull, "there is no"),
            ("", "/nowhere/secret", "TINYSCALE_SECRET_FILE"),
            ("a", os.devnull + "/x", "TINYSCALE_SECRET_FILE"),
        ):
            with self.subTest((text, path)):
                environment = {"TINYSCALE_SECRET": text, "TINYSCALE_SECRET_FILE": path}
                line = self.mistake(self.settings, **environment)
                self.assertIn(words, line)
                self.assertIn(path, line)

    def test_a_file_with_a_byte_order_mark_is_taken(self):
        text = b'\xef\xbb\xbf[{"host": "https://b", "secret": "s"}]'
        self.assertEqual(self.load(text), [tinyscale.Entry("https://b", "s")])
        path = self.file("secrets", b"\xef\xbb\xbfhush\r\n")
        self.assertEqual(tinyscale.read_secrets("", path), ("hush",))


class ServersFileTest(ClusterTest):
    """The files are read again when they change."""

    def setUp(self):
        super().setUp()
        # a new server's thread would ask beside the test's own surveys
        self.real_watch = tinyscale.watch
        patch = mock.patch.object(tinyscale, "watch")
        self.watch = patch.start()
        self.addCleanup(patch.stop)

    def reload(self, is_forced=False):
        tinyscale.reload(self.balancer, self.environment(), is_forced)
        self.servers_had += self.directory.servers

    def spoil(self, text="[{"):
        with open(self.path, "w") as file:
            file.write(text)

    def facts(self):
        """What is in use."""
        settings = self.balancer.settings
        return self.directory.servers, settings.entries, settings.secrets, settings.tls

    def test_it_is_read_again_and_servers_that_stay_keep_their_meetings(self):
        self.create("room0")
        self.create("room1")
        kept, gone = self.directory.servers[0], self.fakes[1]
        self.load([self.entries()[2], dict(self.entries()[0], weight=2)])
        self.assertIs(self.directory.servers[1], kept)
        self.survey()
        self.assertEqual(self.directory.find("room0"), (kept, "remembered"))
        self.assertEqual(self.directory.find("room1"), (None, "nowhere"))
        for number in range(2, 8):
            self.create(f"room{number}")
        # the circle goes on where it was
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [5, 1, 2])
        self.assertEqual(gone.count("getMeetings", "getMeetingInfo"), 0)

    def test_a_create_whose_server_is_taken_out_meanwhile_is_not_remembered(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["create"] = held(gate, arrived)
        create = background(self.create, "room")
        self.assertTrue(arrived.wait(10))
        self.load(self.entries()[1:])
        gate.set()
        self.assertEqual(create.result(10).returncode, "SUCCESS")
        self.assertEqual(self.directory.find("room"), (None, "nowhere"))

    def test_each_server_that_is_new_is_watched_and_no_other(self):
        entries = self.entries()
        # no thread can begin: the next look at the files tries it again
        with mock.patch.object(tinyscale, "begin", mock.Mock(side_effect=RuntimeError)):
            self.write_servers(entries[:1])
            with self.assertRaises(RuntimeError):
                self.reload()
        self.assertEqual(self.watch.call_args_list, [])
        self.reload()
        self.assertTrue(until(lambda: self.watch.call_count > 0))
        self.watch.reset_mock()
        self.reload()
        self.assertEqual(self.watch.call_args_list, [])
        self.write_servers([{**entries[0], "weight": 2}, entries[2]])
        self.reload()
        new = self.directory.servers[1]
        self.assertTrue(until(lambda: self.watch.call_count > 0))
        self.assertEqual(self.watch.call_args_list, [mock.call(self.directory, new)])
        self.assertEqual(self.states(), ["up", "unknown"])

    def test_a_thread_looks_at_the_files_again_and_again_also_after_a_mistake_of_ours(self):
        reload, wake, stop = tinyscale.reload, threading.Event(), threading.Event()
        looks = []

        def look(*args):
            looks.append(args)
            if len(looks) == 1:
                raise KeyError("a query")
            if stop.is_set():
                raise SystemExit
            reload(*args)

        args = self.balancer, self.environment(), wake
        thread = threading.Thread(target=tinyscale.watch_files, args=args, daemon=True)
        with mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0.02, reload=look):
            thread.start()
            self.spoil()
            self.assertTrue(until(lambda: "The settings stay as they were" in self.log.getvalue()))
            self.assertEqual(len(self.directory.servers), 3)
            self.write_servers(self.entries()[:2])
            self.assertTrue(until(lambda: len(self.directory.servers) == 2))
            # as SIGHUP does: for one look, whether something has changed or not
            self.assertNotIn(True, [args[2] for args in looks])
            wake.set()
            self.assertTrue(until(lambda: True in [args[2] for args in looks]))
            self.assertTrue(until(lambda: looks[-1][2] is False))
            self.assertEqual([args[2] for args in looks].count(True), 1)
            stop.set()
            thread.join(10)
        self.assertFalse(thread.is_alive())

    def test_our_own_mistake_is_logged_without_its_text_and_the_thread_lives(self):
        look = mock.Mock(side_effect=[KeyError("a query"), None, SystemExit])
        args = self.balancer, self.environment(), threading.Event()
        thread = threading.Thread(target=tinyscale.watch_files, args=args, daemon=True)
        with mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0, reload=look):
            thread.start()
            thread.join(10)
        self.assertEqual(look.call_count, 3)
        log = self.log.getvalue()
        self.assertIn("reading the settings failed with KeyError. Please report this", log)
        self.assertNotIn("a query", log)

    def test_the_thread_of_a_server_goes_on_after_a_mistake_of_ours_and_ends_with_its_entry(self):
        silence = tinyscale.Unavailable()
        survey = mock.Mock(side_effect=[KeyError("a query"), silence, *[None] * 10**6])
        server = self.directory.servers[0]
        args = self.directory, server
        thread = threading.Thread(target=self.real_watch, args=args, daemon=True)
        with mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0.01, survey=survey):
            thread.start()
            self.assertTrue(until(lambda: survey.call_count > 3))
            self.load(self.entries()[1:])
            thread.join(10)
        self.assertFalse(thread.is_alive())
        self.assertIn("a survey failed with KeyError. Please report this", self.log.getvalue())
        self.assertNotIn("a query", self.log.getvalue())

    def change(self, job):
        """Do the job until a look at the files notices it.

        Within one tick of the file system's clock no time of a file changes.
        """
        before = self.balancer.settings
        deadline = time.monotonic() + 5
        while self.balancer.settings is before and time.monotonic() < deadline:
            job()
            self.reload()
        self.assertIsNot(self.balancer.settings, before)

    def test_what_is_unchanged_is_not_read_again(self):
        before = self.balancer.settings
        self.reload()
        self.assertIs(self.balancer.settings, before)
        self.reload(is_forced=True)
        self.assertIsNot(self.balancer.settings, before)
        files = f"read again: {self.path}: 3 servers, 2 secrets"
        self.assertEqual(self.log.getvalue().count(files), 1)

    def test_a_mended_mode_of_a_file_is_noticed(self):
        os.chmod(self.path, 0o644)
        self.reload(is_forced=True)
        self.assertIn(f"Mend it with: chmod o-rw {self.path}", self.log.getvalue())
        self.clear_log()
        self.change(lambda: os.chmod(self.path, 0o600))
        self.assertNotIn("chmod", self.log.getvalue())

    def test_every_file_of_the_settings_is_watched(self):
        folder = os.path.dirname(self.path)
        paths = {}
        for name, text in (
            ("TINYSCALE_SECRET_FILE", "another-secret"),
            ("TINYSCALE_CERT", CERTIFICATE),
            ("TINYSCALE_KEY", KEY),
        ):
            paths[name] = os.path.join(folder, name)
            with open(paths[name], "w") as file:
                file.write(text)
        self.settings = tuple(paths.items())
        self.reload(is_forced=True)
        for path in (self.path, *paths.values()):
            with self.subTest(path):
                # as certbot does it: another file under the same name
                self.change(lambda path=path: replace_file(path))

    def test_one_broken_file_leaves_all_settings_as_they_were_until_it_is_mended(self):
        folder = os.path.dirname(self.path)
        certificate, _ = certified(folder)
        secrets = os.path.join(folder, "secrets")
        self.settings = (("TINYSCALE_SECRET_FILE", secrets), ("TINYSCALE_CERT", certificate))
        texts = {}
        for path, text, spoilt in (
            (self.path, json.dumps(self.entries()), "[{"),
            (secrets, "another-secret", "TINYSCALE_SECRET=another-secret"),
            (certificate, KEY + CERTIFICATE, KEY),
        ):
            texts[path] = text, spoilt
            with open(path, "w") as file:
                file.write(text)
        for path, (text, spoilt) in texts.items():
            with self.subTest(path):
                self.write_servers()
                self.reload(is_forced=True)
                before = self.facts()
                # what is good in itself does not count either
                self.write_servers(self.entries()[:1])
                with open(path, "w") as file:
                    file.write(spoilt)
                self.reload()
                self.assertEqual(self.facts(), before)
                self.assertTrue(self.balancer.mistake)
                with open(path, "w") as file:
                    file.write(text)
                self.write_servers(self.entries()[:2])
                self.reload()
                self.assertEqual(self.balancer.mistake, "")
                self.assertEqual(len(self.directory.servers), 2)

    def test_everyone_can_see_that_a_file_is_broken_until_it_is_mended(self):
        self.settings = (("TINYSCALE_STATUS_PASSWORD", "pw"),)
        self.reload(is_forced=True)
        login = {"Authorization": "Basic " + base64.b64encode(b"admin:pw").decode()}

        def seen():
            """What the pages say of it."""
            status = self.http("/status", headers=login).body.decode()
            metrics = self.http("/metrics", headers=login).body.decode()
            return self.path in status, re.findall("(?m)^tinyscale_settings_ok (.*)$", metrics)

        self.assertEqual(seen(), (False, ["1"]))
        self.spoil()
        for _ in range(3):
            self.reload()
            self.assertEqual(seen(), (True, ["0"]))
        self.write_servers()
        self.reload()
        self.assertEqual(seen(), (False, ["1"]))

    def test_a_file_that_is_again_what_it_was_before_is_mended(self):
        """A link that is turned back, or a folder that was not mounted for a while."""
        target = self.path + ".good"
        os.rename(self.path, target)
        os.symlink(target, self.path)
        self.reload(is_forced=True)
        os.remove(self.path)
        self.reload()
        self.assertTrue(self.balancer.mistake)
        os.symlink(target, self.path)
        self.reload()
        self.assertEqual(self.balancer.mistake, "")

    def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(self):
        """Too many files were open, for example: it is the same file as before."""
        self.write_servers(self.entries()[:1])
        broken = mock.patch.object(
            tinyscale, "read_text", side_effect=tinyscale.SettingsError("too many files")
        )
        with broken:
            for _ in range(2):
                self.reload()
        self.assertEqual(self.log.getvalue().count("too many files"), 1)
        self.assertEqual(len(self.directory.servers), len(self.fakes))
        self.reload()
        self.assertEqual((len(self.directory.servers), self.balancer.mistake), (1, ""))

    def test_a_mistake_is_told_once_and_again_if_the_file_changes_or_an_admin_asks(self):
        said = "The settings stay as they were; a restart would fail."
        self.spoil()
        for _ in range(3):
            self.reload()
        self.assertEqual(self.log.getvalue().count(said), 1)
        self.spoil("[{}")
        for _ in range(3):
            self.reload()
        self.assertEqual(self.log.getvalue().count(said), 2)
        self.reload(is_forced=True)
        self.assertEqual(self.log.getvalue().count(said), 3)
        os.remove(self.path)
        for _ in range(3):
            self.reload()
        self.assertEqual(self.log.getvalue().count(said), 4)
        self.assertEqual(self.log.getvalue().count("No such file"), 1)
        self.assertEqual(len(self.directory.servers), 3)

    def test_a_renewed_certificate_is_taken_up(self):
        path, _ = certified(os.path.dirname(self.path))
        self.settings = (("TINYSCALE_CERT", path),)
        self.reload(is_forced=True)
        before = self.balancer.settings.tls
        self.change(lambda: replace_file(path))
        self.assertIsNot(self.balancer.settings.tls, before)
        trust = ssl.create_default_context(cadata=CERTIFICATE)
        self.assertEqual(self.http("/health", trust=trust).status, 200)

    def test_new_secrets_count_at_once_and_old_ones_no_longer(self):
        secrets = os.path.join(os.path.dirname(self.path), "secrets")
        self.settings = (("TINYSCALE_SECRET", ""), ("TINYSCALE_SECRET_FILE", secrets))
        for text, expected in (
            ("another-secret", "SUCCESS"),
            ("new-secret\nanother-secret", "SUCCESS"),
            ("new-secret", "FAILED"),
        ):
            with open(secrets, "w") as file:
                file.write(text)
            self.reload(is_forced=True)
            self.assertEqual(self.get("getMeetings", secret="another-secret").returncode, expected)


def replace_file(path):
    """The same text in another file under the same name."""
    with open(path) as file:
        text = file.read()
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


# ---- the process ---------------------------------------------------------------------------------


class Log:
    """The lines that a process writes, read as they come; shown, too, if a stream for that is
    given.
    """

    def __init__(self, stream, shown=None):
        self.lines = []
        self.stream = stream
        self.shown = shown
        self.reader = background(self.read)

    def read(self):
        with self.stream:
            for line in self.stream:
                self.lines.append(line)
                if self.shown:
                    self.shown.write(line)

    def find(self, words, times=1):
        """The match of the line that has these words (a pattern), once it is there; None if it
        never comes.
        """
        matches = []

        def found():
            has_ended = self.reader.done()
            matches[:] = filter(None, [re.search(words, line) for line in list(self.lines)])
            return has_ended or len(matches) >= times

        until(found, 20)
        return matches[times - 1] if len(matches) >= times else None

    def text(self):
        """All of it, once the process has ended."""
        self.reader.result(20)
        return "".join(self.lines)


class ProcessCase(unittest.TestCase):
    """tinyscale as an admin starts it, in front of two fakes."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.servers_file = os.path.join(self.folder, "servers.json")
        self.fakes = [self.fake("bbb1"), self.fake("bbb2")]
        self.write_servers()

    def fake(self, name, **options):
        fake = FakeBBB(name, **options)
        self.addCleanup(fake.down)
        return fake

    def entries(self, *fakes):
        return [{"host": fake.url, "secret": fake.secret} for fake in fakes or self.fakes]

    def write(self, name, text):
        """Write a file that only we may read; return its path."""
        path = os.path.join(self.folder, name)
        with open(path + ".new", "w") as file:
            file.write(text)
        os.chmod(path + ".new", 0o600)
        # at once: nobody reads a half
        os.replace(path + ".new", path)
        return path

    def write_servers(self, text=None):
        self.write("servers.json", text or json.dumps(self.entries()))

    def run_it(self, *arguments, launcher=(), program=(PROGRAM,), files=(), **options):
        """A process, with its environment in capitals: a value of None takes a variable out."""
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **{name: value for name, value in options.items() if name.islower()},
        }
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": self.folder,
            "TINYSCALE_SECRET": SECRET,
            "PORT": "0",
            "PYTHONPATH": HERE,
            "PYTHONWARNINGS": "error",
            **{name: value for name, value in options.items() if name.isupper()},
        }
        process = subprocess.Popen(
            [*launcher, sys.executable, *program, *arguments],
            cwd=self.folder,
            env={name: value for name, value in environment.items() if value is not None},
            pass_fds=files,
            universal_newlines=True,
            **streams,
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in filter(None, [process.stdout, process.stderr]):
            stream.close()

    def outcome(self, process):
        """The exit status of a command, and what it wrote to stdout and stderr."""
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors

    def run_here(self, *arguments, **environment):
        """The same of a command that ends at once, so it can run in a thread of this process."""
        environment = {
            "TINYSCALE_SECRET": SECRET,
            "TINYSCALE_SERVERS": self.servers_file,
            "PORT": "0",
            **environment,
        }
        given = {name: value for name, value in environment.items() if value is not None}
        output, errors = io.StringIO(), io.StringIO()
        handlers = list(tinyscale.log.handlers)

        def run():
            try:
                return tinyscale.main(arguments)
            except SystemExit as error:
                return error.code

        patch = mock.patch.dict(os.environ, given, clear=True)
        with patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = background(run).result(30)
        # nothing of it stays here
        self.assertEqual(tinyscale.log.handlers, handlers)
        return code, output.getvalue(), errors.getvalue()

    def begun(self, *arguments, stderr=None, **options):
        """A tinyscale that begins, and its log; what it writes to the pipe `stderr`, if that is
        given.
        """
        pipe = stderr or os.pipe()
        process = self.run_it(*arguments, stderr=pipe[1], **options)
        os.close(pipe[1])
        log = Log(os.fdopen(pipe[0]))
        self.addCleanup(log.reader.result, 20)
        # before that, as cleanups run backwards
        self.addCleanup(self.end, process)
        return process, log

    def started(self, *arguments, **options):
        """A tinyscale that serves, its log and its port."""
        process, log = self.begun(*arguments, **options)
        match = log.find(r"listens on port (\d+)")
        if not match:
            self.fail(log.text())
        return process, log, int(match[1])

    def get(self, port, call, query=""):
        return fetch(port, f"/bigbluebutton/api/{call}?{signed(call, query)}")

    def wait_until_refused(self, port):
        def is_refused():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return False
            return True

        self.assertTrue(until(is_refused, 20))


def changed(code):
    """Arguments for Python: tinyscale, after this code has changed it."""
    return ["-c", f"import os, time, tinyscale\n{code}\nos._exit(tinyscale.main())"]


class Sent:
    """A call that was sent, on a connection that may not be accepted yet, and that nobody reads
    yet.
    """

    def __init__(self, test, port, call="", query=""):
        self.connection = socket.create_connection(("127.0.0.1", port), 20)
        test.addCleanup(self.connection.close)
        target = f"/bigbluebutton/api/{call}?{signed(call, query)}"
        self.connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def answer(self):
        """All that comes; b"" for a connection that breaks off."""
        with contextlib.suppress(ConnectionError), self.connection.makefile("rb") as file:
            return file.read()
        return b""


class StartTest(ProcessCase):
    """How it begins, and reads its settings again."""

    def test_mistakes_end_in_one_line_and_status_2(self):
        own = "the-secret-of-bbb1"
        host = "https://bbb1.example.org"
        files = {
            name: self.write(name, text)
            for name, text in (
                ("broken.json", f'[{{"host": "{host}", "secret": "{own}"]'),
                ("key.json", json.dumps([{"host": host, "secret": own, "wieght": 2}])),
                ("quoted", f'"{SECRET}"\n'),
                ("other.pem", CERTIFICATE),
            )
        }
        mistakes = (
            ({"TINYSCALE_SECRET": " "}, "TINYSCALE_SECRET"),
            ({"TINYSCALE_SECRET": f"{SECRET},\t"}, "blank"),
            ({"TINYSCALE_SECRET_FILE": files["quoted"]}, "quotes"),
            ({"PORT": "65536"}, "65536"),
            ({"TINYSCALE_SERVERS": "none.json"}, "none.json"),
            ({"TINYSCALE_SERVERS": files["broken.json"]}, "broken.json: line 1"),
            ({"TINYSCALE_SERVERS": files["key.json"]}, "wieght"),
            ({"TINYSCALE_CERT": files["other.pem"]}, "other.pem"),
            ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}, "LISTEN_FDS"),
            ({"LISTEN_PID": str(os.getpid())}, "LISTEN_FDS"),
        )
        for env, words in mistakes:
            with self.subTest(env):
                code, output, errors = self.run_here(**env)
                self.assertEqual((code, output, errors.count("\n")), (2, "", 1), errors)
                self.assertTrue(errors.startswith("tinyscale: "), errors)
                self.assertIn(words, errors)
                self.assertNotIn(SECRET, errors)
                self.assertNotIn(own, errors)

    def test_what_is_no_address_is_a_mistake(self):
        code, output, errors = self.outcome(self.run_it("--bind", "no address"))
        self.assertEqual((code, output, errors.count("\n")), (2, "", 1), errors)
        self.assertIn("'no address'", errors)

    def test_an_address_that_cannot_be_used_now_is_one_line_and_status_1(self):
        _, _, port = self.started()
        taken = self.fakes[0].port
        cases = (
            (self.run_it("--port", str(port)), port, "in use"),
            (self.run_it("--port", str(taken), "--bind", "127.0.0.1"), taken, "in use"),
            # an address of a net that is only for documentation
            (self.run_it("--bind", "192.0.2.1"), "192.0.2.1", "assign"),
        )
        for process, place, words in cases:
            with self.subTest(process.args[2:]):
                code, output, errors = self.outcome(process)
                self.assertEqual((code, output, errors.count("\n")), (1, "", 1), errors)
                self.assertIn(str(place), errors)
                self.assertIn(words, errors)

    def test_it_serves_ipv4_and_ipv6(self):
        _, _, port = self.started()
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as connection:
                connection.settimeout(20)
                connection.connect((address, port))
                connection.sendall(b"GET /bigbluebutton/api HTTP/1.0\r\n\r\n")
                self.assertIn(b"200 OK", connection.recv(1000))

    def test_a_server_that_is_down_at_the_start_is_only_a_warning(self):
        self.fakes[1].down()
        _, log, port = self.started()
        for number in range(3):
            answer = self.get(port, "create", f"meetingID=room{number}")
            self.assertEqual(answer.returncode, "SUCCESS")
        self.assertTrue(log.find(f"WARNING {self.fakes[1].url} is down: no connection"))
        self.assertEqual(len(self.fakes[0].meetings), 3)

    def test_a_server_that_is_silent_at_the_start_does_not_delay_the_others(self):
        self.fakes[1].faults["*"] = silent
        self.fakes[0].put("room")
        # who waited for that one would wait for longer than we do for the answer
        limits = "tinyscale.ANSWER_TIMEOUT = tinyscale.PROBE_TIMEOUT = 60"
        _, _, port = self.started(program=changed(limits))
        answer = self.get(port, "getMeetingInfo", "meetingID=room")
        self.assertEqual(answer.meetingID, "room")

    def test_after_kill_and_restart_each_meeting_is_still_on_its_server(self):
        process, _, port = self.started()
        for number in range(4):
            self.get(port, "create", f"meetingID=room{number}")
        homes = [sorted(fake.meetings) for fake in self.fakes]
        self.assertEqual([len(home) for home in homes], [2, 2])
        process.kill()
        process.wait()
        _, _, port = self.started()
        for fake, home in zip(self.fakes, homes):
            for meeting_id in home:
                answer = self.get(port, "join", f"meetingID={meeting_id}&fullName=X")
                self.assertTrue(answer.headers["Location"].startswith(fake.url + "/"))
                answer = self.get(port, "create", f"meetingID={meeting_id}")
                self.assertEqual(answer.messageKey, "duplicateWarning")
        self.assertEqual([sorted(fake.meetings) for fake in self.fakes], homes)

    def test_a_sighup_just_after_a_look_at_the_files_is_not_lost(self):
        class Wake(threading.Event):
            signals = 1

            def wait(self, timeout=None):
                if not self.signals:
                    return super().wait(0)
                # the time is over, and now the signal comes
                self.signals = 0
                self.set()
                return False

            def is_set(self):
                # who asked that before the signal came
                return False

        looks = mock.Mock(side_effect=[None, KeyboardInterrupt])
        with mock.patch.object(tinyscale, "attempt", looks):
            self.assertRaises(KeyboardInterrupt, tinyscale.watch_files, None, {}, Wake())
        self.assertEqual([look[0][-1] for look in looks.call_args_list], [False, True])

    def test_sighup_reads_servers_and_secrets_again(self):
        path = self.write("secrets", "old\n")
        process, log, port = self.started(TINYSCALE_SECRET=None, TINYSCALE_SECRET_FILE=path)
        self.assertEqual(self.get(port, "getMeetings").messageKey, "checksumError")
        process.send_signal(signal.SIGHUP)
        # though no file has changed
        self.assertTrue(log.find("read again: .*servers.json.*secrets: 2 servers, 1 secrets"))
        self.write("secrets", f"old\n{SECRET}\n")
        self.write_servers(json.dumps(self.entries()[:1]))
        process.send_signal(signal.SIGHUP)
        self.assertTrue(log.find("read again: .*: 1 servers, 2 secrets"))
        for number in range(3):
            answer = self.get(port, "create", f"meetingID=room{number}")
            self.assertEqual(answer.returncode, "SUCCESS")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [3, 0])

    def test_everyone_can_see_that_the_settings_on_disk_are_broken_until_they_are_mended(self):
        login = {"Authorization": "Basic " + base64.b64encode(b"admin:pass").decode()}
        process, log, port = self.started(
            program=changed("tinyscale.SURVEY_INTERVAL = 0.1"), TINYSCALE_STATUS_PASSWORD="pass"
        )

        def shown():
            """What /metrics and /status say."""
            figures = fetch(port, "/metrics", headers=login).body.decode()
            page = fetch(port, "/status", headers=login).body.decode()
            is_ok = re.search("^tinyscale_settings_ok (.*)$", figures, re.MULTILINE)[1]
            return is_ok, "are broken" in page, "servers.json: line 1" in page

        self.assertEqual(shown(), ("1", False, False))
        for _ in range(2):
            self.write_servers(f'[{{"host": "{self.fakes[0].url}", "secret": "its-own-secret"')
            self.assertTrue(until(lambda: shown() == ("0", True, True), 20), shown())
            self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
            # that a restart would fail is known before it
            self.assertEqual(self.run_here("check")[0], 2)
            self.assertEqual(shown(), ("0", True, True))
            self.write_servers()
            self.assertTrue(until(lambda: shown() == ("1", False, False), 20), shown())
        process.kill()
        told = re.findall("ERROR .*servers.json: line 1.*settings stay as they were", log.text())
        # once each time, though it was looked at again and again
        self.assertEqual(len(told), 2, log.text())
        self.assertNotIn("its-own-secret", log.text())

    def test_it_serves_https_itself_and_takes_up_a_new_certificate(self):
        certificate, _ = certified(self.folder)
        process, log, port = self.started(TINYSCALE_CERT=certificate)
        trust = ssl.create_default_context(cafile=certificate)
        # none of them stops the others
        for _ in range(20):
            self.addCleanup(socket.create_connection(("127.0.0.1", port), 5).close)

        def version(context):
            return fetch(port, "/bigbluebutton/api", trust=context).version

        self.assertEqual(version(trust), "2.0")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.verify_mode = ssl.CERT_NONE
        with warnings.catch_warnings():
            # what is deprecated is tested here
            warnings.simplefilter("ignore", DeprecationWarning)
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            version(old)
        os.utime(certificate, (1, 1))
        process.send_signal(signal.SIGHUP)
        self.assertTrue(log.find("read again: .*tls.pem"))
        self.assertEqual(version(trust), "2.0")
        self.write("tls.pem", CERTIFICATE)
        process.send_signal(signal.SIGHUP)
        self.assertTrue(log.find("ERROR TINYSCALE_CERT .*belong together.* The settings stay"))
        self.assertEqual(version(trust), "2.0")

    def test_an_expired_certificate_is_a_warning_and_one_that_lasts_is_none(self):
        certificate, _ = certified(self.folder)
        environment = {
            "TINYSCALE_SECRET": SECRET,
            "TINYSCALE_SERVERS": self.servers_file,
            "TINYSCALE_CERT": certificate,
        }
        self.assertFalse(tinyscale.read_settings(environment).warnings)
        moment = time.gmtime(time.time() + 101 * 366 * 86400)
        later = mock.Mock(wraps=time, gmtime=lambda: moment)
        with mock.patch.object(tinyscale, "time", later):
            warned = tinyscale.read_settings(environment).warnings
        self.assertRegex("".join(warned), "^TINYSCALE_CERT .*tls.pem has expired")


class StopTest(ProcessCase):
    """How it ends: what is in progress is answered."""

    def test_sigterm_and_ctrl_c_finish_what_is_in_progress(self):
        gate = threading.Event()
        self.fakes[0].put("room")
        self.fakes[0].faults["sendChatMessage"] = held(gate)
        cases = []
        for number in (signal.SIGTERM, signal.SIGINT):
            process, log, port = self.started()
            # who says nothing
            self.addCleanup(socket.create_connection(("127.0.0.1", port), 5).close)
            slow = background(self.get, port, "sendChatMessage", "meetingID=room")
            cases.append((number, process, log, port, slow))
        self.assertTrue(until(lambda: self.fakes[0].count("sendChatMessage") == 2, 20))
        for number, process, _, port, _ in cases:
            process.send_signal(number)
            self.wait_until_refused(port)
            # as a terminal that closes sends it
            process.send_signal(signal.SIGHUP)
            self.assertIsNone(process.poll())
        gate.set()
        for number, process, log, _, slow in cases:
            with self.subTest(number):
                answer = slow.result(20)
                self.assertEqual(answer.returncode, "SUCCESS")
                self.assertEqual(answer.headers["Connection"], "close")
                self.assertEqual(process.wait(20), 0)
                self.assertTrue(log.text().endswith("INFO stopped\n"), log.text())
                self.assertNotIn("Traceback", log.text())

    def test_a_file_that_cannot_be_read_to_its_end_does_not_hold_up_the_end(self):
        process, log, port = self.started(program=changed("tinyscale.SURVEY_INTERVAL = 0.05"))
        os.remove(self.servers_file)
        # who opens it waits until somebody writes to it, as with a network drive that hangs
        os.mkfifo(self.servers_file, 0o600)
        process.send_signal(signal.SIGHUP)
        with self.opened_by_a_reader(self.servers_file):
            process.terminate()
            self.assertEqual(process.wait(20), 0)

    @contextlib.contextmanager
    def opened_by_a_reader(self, path):
        """Wait until somebody has it open, and let him wait."""
        writer = []

        def is_open():
            with contextlib.suppress(OSError):
                writer.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return bool(writer)

        try:
            self.assertTrue(until(is_open, 20))
            yield
        finally:
            for file in writer:
                os.close(file)

    def test_a_hung_server_does_not_hold_up_the_end(self):
        program = changed("tinyscale.DRAIN_TIMEOUT = 0.2")
        process, log, port = self.started(program=program)
        self.fakes[0].put("room")
        self.fakes[0].faults["end"] = silent
        hung = background(self.get, port, "end", "meetingID=room")
        self.assertTrue(until(lambda: self.fakes[0].count("end"), 20))
        process.terminate()
        # long before the server's 10 s are over, which ANSWER_TIMEOUT are
        self.assertEqual(process.wait(20), 0)
        self.assertIn("stopped with calls in progress", log.text())
        self.assertIsInstance(hung.exception(20), OSError)

    def test_a_second_signal_ends_at_once_even_with_a_hung_server(self):
        self.fakes[0].put("room")
        self.fakes[0].faults["end"] = silent
        cases = []
        for first, second in (
            (signal.SIGTERM, signal.SIGINT),
            (signal.SIGINT, signal.SIGTERM),
        ):
            process, log, port = self.started()
            hung = background(self.get, port, "end", "meetingID=room")
            cases.append((first, second, process, log, hung))
        self.assertTrue(until(lambda: self.fakes[0].count("end") == 2, 20))
        for first, second, process, log, hung in cases:
            with self.subTest(first):
                process.send_signal(first)
                self.assertTrue(log.find("stopping"))
                process.send_signal(second)
                self.assertEqual(process.wait(20), 1)
                self.assertIsInstance(hung.exception(20), OSError)

    def test_it_ends_as_pid_1_too(self):
        unshare = ["unshare", "--pid", "--fork"]
        with contextlib.suppress(OSError):
            if subprocess.call([*unshare, "true"], stderr=subprocess.DEVNULL) == 0:
                process, _, _ = self.started(launcher=unshare)
                with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                    os.kill(int(file.read()), signal.SIGTERM)
                self.assertEqual(process.wait(20), 0)
                return
        self.skipTest("needs the right to make a PID namespace")

    def check_that_a_stop_answers(self, process, port, count):
        """Send so many calls to a process that is frozen, and told to stop before it thaws."""
        process.send_signal(signal.SIGSTOP)
        calls = [Sent(self, port) for _ in range(count)]
        process.terminate()
        process.send_signal(signal.SIGCONT)
        for call in calls:
            self.assertIn(b"<version>", call.answer())
        self.assertEqual(process.wait(20), 0)

    def test_who_waits_to_be_accepted_at_a_stop_is_answered(self):
        process, _, port = self.started()
        self.check_that_a_stop_answers(process, port, 300)

    def test_who_was_accepted_just_before_a_stop_is_answered(self):
        late = (
            "serve = tinyscale.Handler.serve\n"
            "def late(*args):\n"
            "    time.sleep(0.5)\n"
            "    serve(*args)\n"
            "tinyscale.Handler.serve = late"
        )
        process, _, port = self.started(program=changed(late))
        self.check_that_a_stop_answers(process, port, 5)

    def test_who_takes_a_large_answer_slowly_gets_all_of_it(self):
        size = 8 * 2**20
        self.fakes[0].put("room")
        self.fakes[0].faults["sendChatMessage"] = status(200, "x" * size, "text/plain")
        process, log, port = self.started()
        call = Sent(self, port, "sendChatMessage", "meetingID=room")
        begin = call.connection.recv(1000)
        process.terminate()
        self.assertTrue(log.find("stopping"))
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(1.2)
        head, _, body = (begin + call.answer()).partition(b"\r\n\r\n")
        self.assertEqual((head[:15], len(body)), (b"HTTP/1.1 200 OK", size))
        self.assertEqual(process.wait(20), 0)


class SystemdTest(ProcessCase):
    """What systemd gives, and what it is told: notifications, a socket unit, the journal.

    Nothing of it elsewhere.
    """

    # puts a file in place 3, as systemd does
    LAUNCHER = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )

    def unit(self, file, **options):
        """How to start a tinyscale with this file from its socket unit."""
        launcher = [sys.executable, "-ISc", self.LAUNCHER, str(file.fileno())]
        return {
            "launcher": launcher,
            "files": [file.fileno()],
            "LISTEN_FDS": "1",
            "PORT": None,
            # a mistake leaves the socket to the end of the process
            "PYTHONWARNINGS": None,
            **options,
        }

    def listener(self, family=socket.AF_INET, kind=socket.SOCK_STREAM, address=("127.0.0.1", 0)):
        sock = socket.socket(family, kind)
        self.addCleanup(sock.close)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(1000)
        return sock

    def notified(self, name):
        """A socket for notifications."""
        sock = self.listener(socket.AF_UNIX, socket.SOCK_DGRAM, name)
        sock.settimeout(20)
        return sock

    def test_systemd_is_told_when_it_is_ready_and_when_it_stops(self):
        path = os.path.join(self.folder, "notify")
        abstract = f"tinyscale-test-{uuid.uuid4().hex}"
        cases = []
        for name, address in ((path, path), ("@" + abstract, "\0" + abstract)):
            told = self.notified(address)
            listener = self.listener()
            process, log = self.begun(**self.unit(listener, NOTIFY_SOCKET=name))
            cases.append((told, listener.getsockname()[1], process, log))
        for told, port, process, log in cases:
            with self.subTest(told.getsockname()):
                self.assertEqual(told.recv(100), b"READY=1")
                self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
                process.terminate()
        for told, _, process, log in cases:
            with self.subTest(told.getsockname()):
                self.assertEqual(told.recv(100), b"STOPPING=1")
                self.assertEqual(process.wait(20), 0)
                self.assertNotIn("WARNING", log.text())

    def test_who_cannot_start_is_never_ready(self):
        told = self.notified(os.path.join(self.folder, "notify"))
        self.write_servers("[{")
        self.assertEqual(self.outcome(self.run_it(NOTIFY_SOCKET=told.getsockname()))[0], 2)
        told.setblocking(False)
        with self.assertRaises(BlockingIOError):
            told.recv(100)

    def test_a_notification_that_fails_is_a_warning(self):
        process, log, port = self.started(NOTIFY_SOCKET="/nowhere/notify")
        self.assertTrue(log.find("WARNING .*READY=1"))
        self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
        process.kill()
        self.assertNotIn("Traceback", log.text())

    def test_the_listener_of_a_socket_unit_is_taken(self):
        cases = []
        for env in ({}, {"PORT": "1", "TINYSCALE_BIND": "::1"}):
            listener = self.listener()
            process, log = self.begun(**self.unit(listener, **env))
            cases.append((env, listener.getsockname()[1], process, log))
        for env, port, process, log in cases:
            with self.subTest(env):
                # it may wait there until tinyscale has begun
                self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
                self.assertTrue(log.find(f"listens on port {port}"))
                process.kill()
                warned = re.findall("WARNING.*", log.text())
                self.assertEqual(len(warned), 1 if env else 0, warned)
                self.assertEqual("ListenStream" in "".join(warned), bool(env))

    def test_the_listener_of_another_process_is_left_alone(self):
        listener = self.listener()
        unit = self.unit(listener, LISTEN_PID="1", LISTEN_FDS="2", PORT="0", launcher=())
        process, log, port = self.started(**unit)
        self.assertNotEqual(port, listener.getsockname()[1])
        process.kill()
        self.assertNotIn("WARNING", log.text())

    def test_anything_but_one_stream_socket_is_a_mistake(self):
        path = os.path.join(self.folder, "unix")
        with open(os.devnull) as no_socket:
            cases = (
                ("of datagrams", self.unit(self.listener(kind=socket.SOCK_DGRAM))),
                ("of Unix", self.unit(self.listener(socket.AF_UNIX, address=path))),
                ("no socket", self.unit(no_socket)),
            )
            processes = [self.run_it(**unit) for _, unit in cases]
        for process, (what, _) in zip(processes, cases):
            with self.subTest(what):
                code, output, errors = self.outcome(process)
                self.assertEqual((code, output, errors.count("\n")), (2, "", 1), errors)
                self.assertIn("LISTEN_FDS", errors)

    def test_three_restarts_on_one_socket_lose_no_call(self):
        listener = self.listener()
        port = listener.getsockname()[1]
        self.fakes[0].put("room")
        is_over = threading.Event()
        counts = collections.Counter()

        def client():
            """Calls, one after the other, until it is over."""
            while not is_over.is_set():
                try:
                    answer = self.get(port, "getMeetingInfo", "meetingID=room")
                    counts[answer.returncode, answer.messageKey] += 1
                except (OSError, http.client.HTTPException) as error:
                    counts[repr(error)] += 1

        clients = [background(client) for _ in range(5)]
        self.addCleanup(is_over.set)
        for _ in range(3):
            process, log, _ = self.started(**self.unit(listener))
            self.wait_for_more(counts)
            process.terminate()
            self.assertEqual(process.wait(20), 0, log.text())
            self.assertTrue(log.text().endswith("stopped\n"), log.text())
        # the third restart: those that wait now are answered by one more
        self.started(**self.unit(listener))
        is_over.set()
        for future in clients:
            future.result(30)
        self.assertEqual(set(counts), {("SUCCESS", None)}, counts)

    def wait_for_more(self, counts):
        enough = sum(counts.values()) + 50
        self.assertTrue(until(lambda: sum(counts.values()) > enough, 30), counts)

    def test_what_waits_at_the_socket_of_a_unit_is_answered_by_the_next_process(self):
        listener = self.listener()
        port = listener.getsockname()[1]
        process, _, _ = self.started(**self.unit(listener))
        process.send_signal(signal.SIGSTOP)
        calls = [Sent(self, port) for _ in range(300)]
        process.terminate()
        process.send_signal(signal.SIGCONT)
        self.assertEqual(process.wait(20), 0)
        self.started(**self.unit(listener))
        for call in calls:
            self.assertIn(b"<version>", call.answer())

    def test_lines_for_the_journal_have_a_level_and_no_time(self):
        self.fakes[1].down()
        pipes = [os.pipe(), os.pipe()]
        inodes = [os.fstat(pipe[1]) for pipe in pipes]
        own = f"{inodes[0].st_dev}:{inodes[0].st_ino}"
        # which that one has inherited
        of_another = f"{inodes[1].st_dev}:{inodes[1].st_ino + 1}"
        cases = []
        for pipe, stream, is_journal in zip(pipes, (own, of_another), (True, False)):
            process, log, _ = self.started(stderr=pipe, JOURNAL_STREAM=stream)
            self.assertTrue(log.find("is down"))
            cases.append((process, log, is_journal))
        self.write_servers("[{")
        for process, log, is_journal in cases:
            with self.subTest(is_journal=is_journal):
                process.send_signal(signal.SIGHUP)
                self.assertTrue(log.find("settings stay"))
                process.kill()
                for level, name, words in (
                    ("<6>", "INFO", "tinyscale .* listens"),
                    ("<4>", "WARNING", "http.* is down"),
                    ("<3>", "ERROR", ".*servers.json: line 1"),
                ):
                    before = level if is_journal else rf"\d{{4}}-\d\d-\d\d \S+ {name} "
                    self.assertRegex(log.text(), f"(?m)^{before}{words}")
                count = len(re.findall("(?m)^<[0-9]>", log.text()))
                self.assertEqual(count, len(log.lines) if is_journal else 0)

    def test_a_mistake_in_the_settings_is_an_error_in_the_journal(self):
        pipe = os.pipe()
        inode = os.fstat(pipe[1])
        self.write_servers("[{")
        _, log = self.begun(stderr=pipe, JOURNAL_STREAM=f"{inode.st_dev}:{inode.st_ino}")
        self.assertRegex(log.text(), r"^<3>tinyscale: .*servers.json: line 1.*\n$")


class StderrTest(ProcessCase):
    """A log that nobody reads stops neither a call nor the end."""

    def test_the_last_line_is_written_before_it_ends(self):
        slow = (
            "import sys\n"
            "class Slow:\n"
            "    def write(self, text): time.sleep(0.2); sys.__stderr__.write(text)\n"
            "    def flush(self): sys.__stderr__.flush()\n"
            "sys.stderr = Slow()"
        )
        process, log, _ = self.started(program=changed(slow))
        for fake in self.fakes:
            self.assertTrue(log.find(f"{fake.url} is up"))
        process.terminate()
        self.assertEqual(process.wait(20), 0)
        self.assertTrue(log.text().endswith("INFO stopped\n"), log.text())

    def stuck(self, **options):
        """A tinyscale whose log nobody reads any more, so that it cannot write a line; its port."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        # of its queue, too, there is little
        program = changed("tinyscale.MAX_LOG = 5")
        process = self.run_it(program=program, stderr=writer, **options)
        begin = b""
        while not re.search(rb"listens on port (\d+)\D", begin):
            begin += os.read(reader, 1000)
        # a pipe that select says can be written takes that much
        while select.select([], [writer], [], 0)[1]:
            os.write(writer, 4096 * b"x")
        os.close(writer)
        port = int(re.search(rb"listens on port (\d+)", begin)[1])
        for _ in range(20):
            self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
        return process, port

    def test_a_log_that_nobody_reads_stops_neither_calls_nor_the_end_nor_a_second_signal(self):
        self.fakes[0].put("room")
        once, _ = self.stuck()
        once.terminate()
        twice, port = self.stuck()
        self.fakes[0].faults["end"] = silent
        hung = background(self.get, port, "end", "meetingID=room")
        self.assertTrue(until(lambda: self.fakes[0].count("end"), 20))
        twice.terminate()
        self.wait_until_refused(port)
        twice.terminate()
        self.assertEqual(twice.wait(20), 1)
        self.assertIsInstance(hung.exception(20), OSError)
        self.assertEqual(once.wait(20), 0)

    def test_stderr_may_be_closed_full_or_without_a_reader(self):
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        cases = []
        for redirection in ("2>&-", "<&- >&- 2>&-", "2>/dev/full", f"2>&{writer}"):
            # a port that is ours, though nobody listens there yet
            place = self.fake("a place")
            place.down()
            process = self.run_it(
                launcher=["bash", "-c", f'exec "$@" {redirection}', "-"],
                files=[writer],
                PORT=str(place.port),
                TINYSCALE_BIND="127.0.0.1",
            )
            cases.append((redirection, place.port, process))

        def is_well(port, process):
            with contextlib.suppress(OSError):
                return fetch(port, "/health").status == 200
            return process.poll() is not None

        for redirection, port, process in cases:
            with self.subTest(redirection):
                until(functools.partial(is_well, port, process), 20)
                self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")
                process.terminate()
        for redirection, _, process in cases:
            with self.subTest(redirection):
                self.assertEqual(process.wait(20), 0)


def takes_only(digest):
    """A fault: the server refuses checksums of any other digest."""

    def fault(handler):
        given = dict(parse_qsl(handler.path.partition("?")[2]))["checksum"]
        return proper(handler) if DIGESTS[len(given)] == digest else failed("checksumError")

    return fault


class CheckTest(ProcessCase):
    """check, a doctor; and url."""

    def check(self, *arguments, **options):
        # it leaves its connections to the end of the process
        return self.run_it("check", *arguments, PYTHONWARNINGS=None, **options)

    def test_check_tells_all_about_each_server(self):
        certificate, tls = certified(self.folder)
        secure = self.fake("bbb3", tls=tls)
        secure.put("room", people=7)
        for fake, digest in zip(self.fakes, ("sha1", "sha512")):
            fake.faults["*"] = takes_only(digest)
        entries = self.entries(*self.fakes, secure)
        for entry, digest in zip(entries, ("sha1", "sha512", "sha384")):
            entry["checksum"] = digest
        entries[0]["cordoned"] = True
        self.write_servers(json.dumps(entries))
        code, output, errors = self.outcome(self.check(SSL_CERT_FILE=certificate))
        self.assertEqual((code, errors), (0, ""), output)
        *rows, last = output.splitlines()
        self.assertEqual(last, "All is well.")
        for row, fake, shown in zip(
            rows,
            [*self.fakes, secure],
            (
                r"cordoned +\d+ ms, BBB 3.0.4 +sha1 +certificate +-, 0 meetings, 0 people",
                r"up +\d+ ms, BBB 3.0.4 +sha512 +certificate +-, 0 meetings, 0 people",
                r"up +\d+ ms, BBB 3.0.4 +sha1 sha256 sha384 sha512 +certificate +3\d{4} d, 1 meetings, 7 people",
            ),
        ):
            self.assertRegex(row, f"^{fake.url} +{shown}$")

    def test_check_says_of_each_failure_what_mends_it(self):
        _, tls = certified(self.folder)
        secure = self.fake("speaks HTTPS", tls=tls)
        plain = self.fake("speaks HTTP")
        down = self.fake("is down")
        down.down()
        secret = self.fake("has another secret")
        sha1 = self.fake("takes only SHA-1")
        sha1.faults["*"] = takes_only("sha1")
        cases = [
            (sha1.url, 'the secret is right, .*set "checksum": "sha1"'),
            (secret.url, "it refuses our checksum: compare the secret .*bbb-conf --secret"),
            (down.url, "refused.*firewall"),
            (plain.url.replace("http:", "https:"), "write http://"),
            (secure.url.replace("https:", "http:"), "write https://"),
            (secure.url, "CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"),
        ]
        for code, mend in (
            # so nginx says that it wants HTTPS
            (400, "write https://"),
            (301, "redirects.*https://"),
            (401, "proxy"),
            (403, "proxy.*address of this host"),
            (404, "bbb-conf --secret"),
            (502, "bbb-conf --status"),
            (503, "bbb-conf --status"),
        ):
            fake = self.fake(f"answers {code}")
            fake.faults["*"] = status(code)
            cases.append((fake.url, f"HTTP {code} .*{mend}"))
        entries = [{"host": host, "secret": "its-own-secret"} for host, _ in cases]
        entries[1]["secret"] = "not-its-own-secret"
        self.write_servers(json.dumps(entries))
        code, output, errors = self.outcome(self.check())
        self.assertEqual((code, errors), (1, ""), output)
        rows = output.splitlines()
        for row, (host, mend) in zip(rows, cases):
            with self.subTest(mend):
                self.assertRegex(row, f"^{host} +UNUSABLE: .*{mend}")
        self.assertRegex(rows[len(cases)], f"^Mend {len(cases)} of {len(cases)} servers")
        self.assertNotIn("own-secret", output)
        self.assertNotIn("checksum=", output)
        self.assertNotIn("\033", output)

    def test_a_server_whose_certificate_is_not_right_is_unusable(self):
        certificate, tls = certified(self.folder)
        secure = self.fake("bbb3", tls=tls)
        # a name that the certificate lacks
        hosts = (secure.url, secure.url.replace("127.0.0.1", "127.1"))
        self.write_servers(json.dumps([{"host": host, "secret": secure.secret} for host in hosts]))
        for env, refused in (({}, 2), ({"SSL_CERT_FILE": certificate}, 1)):
            with self.subTest(env):
                code, output, _ = self.outcome(self.check(**env))
                self.assertEqual(code, 1)
                found = re.findall("UNUSABLE: no connection: .*CERTIFICATE_VERIFY_FAILED", output)
                self.assertEqual(len(found), refused, output)
                self.assertIn(f"Mend {refused} of 2", output)
        # what goes out is never signed for one whom we do not trust
        self.assertEqual({call for call, *_ in secure.calls}, {"getMeetings"})

    def test_check_tries_our_own_port(self):
        certificate, _ = certified(self.folder)
        _, _, port = self.started()
        _, _, secure = self.started(TINYSCALE_CERT=certificate)
        mute = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(mute.close)
        free = self.fake("nobody")
        free.down()
        cases = (
            (port, {}, True),
            (secure, {"TINYSCALE_CERT": certificate}, True),
            (free.port, {"TINYSCALE_BIND": "127.0.0.1"}, True),
            (self.fakes[0].port, {"TINYSCALE_BIND": "127.0.0.1"}, False),
            (mute.getsockname()[1], {"TINYSCALE_BIND": "127.0.0.1"}, False),
        )
        program = changed("tinyscale.CONNECT_TIMEOUT = 0.5")
        processes = [
            self.check("--port", str(number), program=program, **env) for number, env, _ in cases
        ]
        for process, (number, env, is_well) in zip(processes, cases):
            with self.subTest(env, is_well=is_well):
                code, output, errors = self.outcome(process)
                self.assertEqual((code, errors), (0 if is_well else 1, ""), output)
                self.assertEqual("All is well." in output, is_well, output)
                self.assertEqual(f"PORT {number}" in output, not is_well, output)

    def test_check_tries_our_own_settings(self):
        no_key = self.write("no-key.pem", CERTIFICATE)
        broken = self.write("broken.json", "[{")
        for env, words in (
            ({"TINYSCALE_SECRET": None}, "TINYSCALE_SECRET"),
            ({"TINYSCALE_CERT": no_key}, "no-key.pem"),
            ({"TINYSCALE_SERVERS": broken}, "broken.json: line 1"),
        ):
            with self.subTest(words):
                code, output, errors = self.run_here("check", **env)
                self.assertEqual((code, output, errors.count("\n")), (2, "", 1), errors)
                self.assertIn(words, errors)
        code, _, errors = self.outcome(self.check(TINYSCALE_BIND="lb..example.org"))
        self.assertEqual((code, errors.count("\n")), (2, 1), errors)
        self.assertIn("TINYSCALE_BIND 'lb..example.org': it is no address of this host", errors)
        os.chmod(self.servers_file, 0o644)
        _, output, errors = self.outcome(self.check(TINYSCALE_SERCET="x"))
        self.assertEqual(errors, "")
        self.assertRegex(output, "tinyscale itself: .*servers.json.*chmod")
        self.assertRegex(output, "tinyscale itself: TINYSCALE_SERCET")
        self.assertNotIn("All is well", output)

    def test_what_is_no_command_is_a_mistake(self):
        for arguments in (["check", "bbb1"], ["bbb1"], ["serve", "getMeetings"], ["--prot", "80"]):
            with self.subTest(arguments):
                code, output, errors = self.run_here(*arguments)
                self.assertEqual((code, output), (2, ""))
                self.assertIn(arguments[-1].strip("-"), errors)

    def test_what_is_no_call_has_no_url(self):
        for call in (
            "/bigbluebutton/api/getMeetings",
            "https://lb.example.org/bigbluebutton/api/getMeetings",
            "getMeetings/",
            "getMeetingInfo?meetingID=room 7",
        ):
            with self.subTest(call):
                code, output, errors = self.run_here("url", call)
                self.assertEqual((code, output, errors.count("\n")), (2, "", 1), output + errors)
                self.assertTrue(errors.startswith("tinyscale: "), errors)

    def test_url_prints_a_url_that_works(self):
        _, _, port = self.started()
        self.fakes[1].put("a room")
        for call, expected in (
            ("getMeetings", "meetings"),
            ("getMeetingInfo?meetingID=a+room", "meetingName"),
            ("hooks/list", "hooks"),
        ):
            # it needs no servers
            options = ["--port", str(port), "--servers", "none.json"]
            code, output, errors = self.run_here("url", call, *options)
            self.assertEqual((code, errors), (0, ""))
            match = re.fullmatch(r"http://localhost:\d+(/bigbluebutton/api/.*)\n", output)
            self.assertIn(expected.encode(), fetch(port, match[1]).body)

    def test_url_knows_where_tinyscale_listens(self):
        certificate, _ = certified(self.folder)
        for env, expected in (
            ({"PORT": "80"}, "http://localhost:80/"),
            ({"TINYSCALE_BIND": "::1"}, "http://[::1]:0/"),
            ({"TINYSCALE_CERT": certificate}, "https://localhost:0/"),
        ):
            _, output, _ = self.run_here("url", **env)
            begin = f"{expected}bigbluebutton/api/getMeetings?checksum="
            self.assertTrue(output.startswith(begin), output)

    def test_ctrl_c_ends_check_at_once_without_a_traceback(self):
        self.fakes[0].faults["getMeetings"] = silent
        process = self.check()
        self.assertTrue(until(lambda: self.fakes[0].count("getMeetings"), 20))
        process.send_signal(signal.SIGINT)
        # long before the server's 10 s are over, and without their end
        code, _, errors = self.outcome(process)
        self.assertEqual((code, errors), (130, ""))

    def test_stdout_may_be_closed_full_or_without_a_reader(self):
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        cases = (
            ("check", ">&-", 0),
            ("check", ">/dev/full", 1),
            ("check", f">&{writer}", 1),
            ("url", ">/dev/full", 1),
        )
        processes = [
            self.run_it(
                command,
                launcher=["bash", "-c", f'exec "$@" {redirection}', "-"],
                files=[writer],
                PYTHONWARNINGS=None,
            )
            for command, redirection, _ in cases
        ]
        for process, (command, redirection, expected) in zip(processes, cases):
            with self.subTest(command, redirection=redirection):
                code, _, errors = self.outcome(process)
                # a line says why, but for a stdout that was closed on purpose
                self.assertEqual((code, errors.count("\n")), (expected, expected), errors)
                self.assertNotIn("Traceback", errors)

    def test_version_and_help_fit_a_terminal(self):
        code, output, _ = self.run_here("--version")
        self.assertEqual((code, output), (0, f"tinyscale {tinyscale.__version__}\n"))
        code, output, _ = self.run_here("--help", COLUMNS="80")
        self.assertEqual(code, 0)
        self.assertLessEqual(output.count("\n"), 40, output)
        self.assertEqual([line for line in output.splitlines() if len(line) > 80], [])


# ---- the documentation ---------------------------------------------------------------------------


# Where README.md, the program and this file are.
FOLDER = HERE


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# Of Python's tokens those that only lay out.
LAYOUT = {"NL", "NEWLINE", "INDENT", "DEDENT", "COMMENT", "ENDMARKER"}


SHORT_FORMS = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def tokens_of(source):
    """Where each token of some Python begins; an f-string is one token, as before Python 3.12."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if not depth and kind not in LAYOUT:
            yield token.start
        depth += {"FSTRING_START": 1, "FSTRING_END": -1}.get(kind, 0)


def complexity(statements):
    """The branches of some statements, as ruff's C901 counts them; a function has one more."""
    count = 0
    for node in statements:
        if isinstance(
            node, (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, *FUNCTIONS)
        ):
            count += 1
        if isinstance(node, ast.Try) and node.orelse:
            count += 1
        for block in ("body", "handlers", "orelse", "finalbody"):
            count += complexity(getattr(node, block, []))
    return count


class Budget:
    """How much there is to read in some Python, whatever its layout.

    Docstrings and comments are free.
    """

    def __init__(self, source):
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
        docstrings = [
            node.body[0]
            for node in nodes
            if isinstance(node, documented) and ast.get_docstring(node) is not None
        ]
        self.statements = [
            node for node in nodes if isinstance(node, ast.stmt) and node not in docstrings
        ]
        places = {(node.lineno, node.col_offset) for node in docstrings}
        # in their order
        self.tokens = [start for start in tokens_of(source) if start not in places]
        self.short_forms = [node for node in nodes if isinstance(node, SHORT_FORMS)]
        self.functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
        tables = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        self.simple = [
            node for node in self.statements if not hasattr(node, "body") and node not in tables
        ]

    def totals(self, end):
        """What there is above a line."""
        statements = sum(node.lineno < end for node in self.statements)
        tokens = sum(line < end for line, _ in self.tokens)
        short_forms = sum(node.lineno < end for node in self.short_forms)
        return {
            "statements": statements,
            "tokens": tokens,
            "tokens a statement": tokens / statements,
            "conditional expressions and comprehensions in 100 statements": 100
            * short_forms
            / statements,
        }

    def tokens_in(self, node):
        begin = bisect.bisect_left(self.tokens, (node.lineno, node.col_offset))
        return bisect.bisect_left(self.tokens, (node.end_lineno, node.end_col_offset)) - begin

    def fullest(self):
        """(tokens, line) of each statement, most first."""
        return sorted(((self.tokens_in(node), node.lineno) for node in self.simple), reverse=True)

    def longest(self):
        """(statements, name) of each function, most first."""
        sizes = [
            sum(isinstance(part, ast.stmt) for part in ast.walk(node)) - 1
            for node in self.functions
        ]
        return sorted(zip(sizes, (node.name for node in self.functions)), reverse=True)

    def most_complex(self):
        """(complexity, name) of each function, most first."""
        return sorted(
            ((1 + complexity(node.body), node.name) for node in self.functions), reverse=True
        )


class DocumentationTest(unittest.TestCase):
    """What the README, the program's own words and this file say is true."""

    @classmethod
    def setUpClass(cls):
        texts = []
        for name in ("README.md", "tinyscale.py", "test_tinyscale.py"):
            with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
                texts.append(file.read())
        cls.readme, cls.program, cls.tests = texts
        cls.tree = ast.parse(cls.program)

    def section(self, title):
        """A section of the README, with those in it."""
        level = re.search(f"^(#+) {re.escape(title)}$", self.readme, re.MULTILINE)[1]
        begin = self.readme.index(f"\n{level} {title}\n")
        end = re.compile(f"^#{{1,{len(level)}}} ", re.MULTILINE).search(self.readme, begin + 9)
        return self.readme[begin : end.start() if end else None]

    def rows(self, title):
        """The rows of the tables in a section: the cells of each."""
        lines = [line for line in self.section(title).splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        return [cells for cells in rows if not cells[0].startswith("---")]

    def names(self, title, pattern):
        """What matches in the first cells of the tables in a section."""
        return {name for cells in self.rows(title) for name in re.findall(pattern, cells[0])}

    def help(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), self.assertRaises(SystemExit):
            tinyscale.main(["--help"])
        return output.getvalue()

    def strings(self):
        """The program's strings, those within f-strings, too, but no docstring."""
        free = set(self.docstrings(self.tree))
        constants = [node for node in ast.walk(self.tree) if isinstance(node, ast.Constant)]
        texts = {node.value for node in constants if isinstance(node.value, str)}
        return texts - free

    def docstrings(self, tree):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
                yield ast.get_docstring(node, clean=False)

    def test_the_program_keeps_its_budgets(self):
        # each ceiling is one number here
        of_part_1 = {
            "statements": 450,
            "tokens": 4500,
            "tokens a statement": 10,
            "conditional expressions and comprehensions in 100 statements": 6,
        }
        of_the_whole = {
            "statements": 1690,
            "tokens": 16900,
            "tokens a statement": 10,
            "conditional expressions and comprehensions in 100 statements": 6,
        }
        of_each = {
            "tokens of a statement, tables of constants aside": 40,
            "statements of a function": 25,
            "complexity of a function": 10,
        }
        budget = Budget(self.program)
        lines = self.program.splitlines()
        begins = [number for number, line in enumerate(lines, 1) if line.startswith("# ==== Part ")]
        self.assertEqual(len(begins), 3)
        for what, ceilings, end in (
            ("Part I", of_part_1, begins[1]),
            ("the whole", of_the_whole, len(lines) + 1),
        ):
            for name, value in budget.totals(end).items():
                with self.subTest(f"{what}: {name}"):
                    self.assertLessEqual(value, ceilings[name])
        worst = (budget.fullest(), budget.longest(), budget.most_complex())
        for (name, ceiling), values in zip(of_each.items(), worst):
            with self.subTest(name):
                self.assertEqual([(value, where) for value, where in values if value > ceiling], [])

    def test_budgets_are_counted_alike_by_every_python(self):
        budget = Budget(
            '"""A docstring is free."""\n'
            "# as is a comment\n"
            "TABLE = [1, 2, 3]\n"
            "def first(a, b):\n"
            '    """And this one."""\n'
            "    if a and b:\n"
            "        return f\"{a['x']!r:>{b}} of {[c for c in b]}\" 'x'\n"
            "    elif b:\n"
            "        try:\n"
            "            a = (b if a else\n"
            "                 0)\n"
            "        except OSError:\n"
            "            pass\n"
            "    for c in a: print(c); print(a)\n"
        )
        totals = budget.totals(100)
        # TABLE, def, if, return, elif, try, a =, pass, for, print, print
        self.assertEqual(totals["statements"], 11)
        # 9 of TABLE, 8, 5, 3, 3, 2, 9, 3, 1, 5, 4, a semicolon, 4
        self.assertEqual(totals["tokens"], 57)
        self.assertEqual(len(budget.short_forms), 2)
        self.assertEqual(budget.fullest()[0], (9, 10))
        self.assertEqual(budget.longest(), [(10, "first")])
        self.assertEqual(budget.most_complex(), [(5, "first")])

    def test_the_program_needs_only_the_standard_library(self):
        names = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module)
        self.assertGreater(len(names), 20)
        for name in names:
            self.assertNotIn("-packages", importlib.util.find_spec(name).origin or "", name)

    def test_nothing_is_defined_or_imported_that_is_not_used(self):
        defined = set()
        for node in self.tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                defined.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
                defined |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        names = [node for node in ast.walk(self.tree) if isinstance(node, ast.Name)]
        used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
        self.assertGreater(len(defined), 100)
        # that one is of __future__
        self.assertEqual(defined - used, {"annotations"})

    def test_what_an_auditor_looks_for_is_in_one_place(self):
        for words in (
            "os.environ",
            ".recv(",
            "request.send(",
            "shell=",
            "eval(",
            "exec(",
            "pickle",
            "rfile",
            "wfile",
        ):
            with self.subTest(words):
                self.assertLessEqual(self.program.count(words), 1)
        # that one builds the checksum, this one compares it; and one of these is for the status
        # password
        self.assertEqual(self.program.count("compare_digest("), 2)
        # what fill writes into an attribute cannot leave it, because there are quotes around it
        self.assertNotRegex(self.program, r"<[a-z][^<>]*=\{")
        lines = self.program.splitlines()
        for node in ast.walk(self.tree):
            kind = getattr(getattr(node, "type", None), "id", "")
            if isinstance(node, ast.ExceptHandler) and kind == "Exception":
                self.assertRegex(lines[node.lineno], "^ +# ", "why is everything caught?")
            elif isinstance(node, ast.ExceptHandler) and (kind == "BaseException" or not node.type):
                self.assertIsInstance(node.body[-1], ast.Raise)

    def test_the_way_of_a_call_is_as_the_docstring_says(self):
        way = re.findall(
            r"^ +([\w.]+(?:\[call\]\.handle)?) {2,}", ast.get_docstring(self.tree), re.MULTILINE
        )
        self.assertGreater(len(way), 5)
        for name in way:
            place = tinyscale
            for part in name.replace("[call]", ".call").split("."):
                place = (
                    place["create"]
                    if part == "call" and place is tinyscale.ROUTES
                    else getattr(place, part)
                )
            self.assertTrue(callable(place), name)

    def test_every_setting_is_in_the_readme_and_in_the_help_and_no_other(self):
        told = self.help()
        settings = set(tinyscale.VARIABLES)
        # that one is OpenSSL's
        self.assertEqual(self.names("Settings", "^`([A-Z_]+)`"), {*settings, "SSL_CERT_FILE"})
        self.assertEqual(
            set(re.findall(r"\b(?:TINYSCALE_[A-Z_]+|PORT)\b", told)) - {"TINYSCALE_"}, settings
        )
        for option in re.findall("--[a-z]+", told):
            self.assertTrue(option in self.readme, option)
        for default in ("3005", "servers.json", "turn"):
            self.assertIn(default, told)
            self.assertIn(default, self.section("Settings"))

    def test_every_key_of_an_entry_is_in_the_readme_and_no_other(self):
        keys = self.names("Keys in `servers.json`", '^`"([a-z]+)"`')
        self.assertEqual(keys, set(tinyscale.Entry.__dataclass_fields__))
        self.assertEqual(keys, set(tinyscale.ENTRY_RULES))

    def test_every_call_is_in_the_readme_and_no_other(self):
        calls = self.names("Calls", "`([a-zA-Z/]+)`")
        pages = set(tinyscale.PAGES) - {"/bigbluebutton/", "/bigbluebutton/api/"}
        self.assertEqual(calls, {*tinyscale.ROUTES, *pages})

    def test_every_error_is_in_the_readme_and_no_other(self):
        errors = collections.defaultdict(set)
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            key, *rest = [getattr(argument, "value", None) for argument in node.args]
            is_error = getattr(node.func, "id", "") == "ApiError"
            # what has a page is no answer of its own
            is_error = is_error and "page" not in [keyword.arg for keyword in node.keywords]
            if is_error or key == "serverUnavailable":
                errors[key].update(map(str, rest[1:]))
        told = {}
        for keys, statuses, *_ in self.rows("Errors of its own"):
            for key in re.findall("`([a-zA-Z]+)`", keys):
                told[key] = set(re.findall(r"\d+", statuses))
        self.assertGreater(len(told), 8)
        self.assertEqual(told, errors)

    def test_every_metric_is_in_the_readme_and_no_other(self):
        figures = {*tinyscale.FIGURES, "call_seconds_count", "call_seconds_sum"}
        figures.update(re.findall("^tinyscale_([a-z_]+)", tinyscale.METRICS, re.MULTILINE))
        told = self.names("Prometheus", r"`tinyscale_(\w+)`")
        self.assertEqual(told, figures)
        for name in re.findall(r"expr: .*?tinyscale_(\w+)", self.section("Prometheus")):
            self.assertIn(name, figures)

    def test_each_exit_status_is_in_the_readme_and_in_the_help(self):
        told = list(dict.fromkeys(cells[0] for cells in self.rows("Exit status")))
        self.assertEqual(told, ["status", "0", "1", "2"])
        for status in told[1:]:
            self.assertRegex(self.help(), rf"\b{status} \w+")

    def test_what_the_readme_quotes_of_the_log_is_what_is_logged(self):
        watched = [cells[0] for cells in self.rows("Watch it")]
        lines = watched[watched.index("why not") :]
        quoted = re.findall("`([^`]+)`", "\n".join(lines))
        for cells in self.rows("It does not work"):
            quoted += re.findall("(?:^|; )(?:tinyscale's log|`check`): `([^`]+)`", cells[0])
        self.assertGreater(len(quoted), 30)
        program = "\n".join(self.strings())
        for text in quoted:
            # between these words is what the program puts in, or OpenSSL or a front end has said
            inserted = r"\.\.\.|: |\d+|getMeetings|hooks/list|HTTP_REQUEST|\S*/create"
            for words in re.split(inserted, text):
                with self.subTest(text):
                    # not assertIn, which would show all of it
                    self.assertTrue(words.strip(" :'") in program, words)

    def test_why_a_server_was_chosen_is_in_the_readme(self):
        told = [cells[0] for cells in self.rows("Watch it")]
        reasons = told[told.index("why this server") + 1 : told.index("why not")]
        words = {word for cell in reasons for word in cell.split(", ")}
        # which stand for other numbers, too
        words -= {"2 of 3 servers", "removed from 2 of 3 servers"}
        strings = self.strings()
        for word in words:
            with self.subTest(word):
                self.assertTrue({word, f" ({word})"} & strings)
        for word in re.findall(r'\.call\([^"\n]*, "([a-z ]+)"', self.program):
            # these two are of calls that have no line of their own
            self.assertIn(word, {*words, "asked", "has it"})

    def test_the_limits_of_the_readme_are_those_of_the_program(self):
        readme = " ".join(self.readme.split())
        t = tinyscale
        mib = 2**20
        for words in (
            f"connections at once | {t.MAX_CONNECTIONS:,};",
            f"calls that wait for one server | {t.MAX_WAITING};",
            f"a body, slides for example | {t.MAX_BODY // mib} MiB;",
            f"all that are held at one time {t.MAX_BODIES // mib} MiB",
            f"a form | {t.MAX_HEAD // 1024} KiB",
            f"parameters of a call | {t.MAX_PARAMETERS:,} |",
            f"a form, which *is* the query ... {t.MAX_HEAD // 1024} KiB ... at most",
            f"a body over {t.MAX_BODY // mib} MiB, or a form over {t.MAX_HEAD // 1024} KiB",
            f"an answer of a server | {t.MAX_ANSWER // mib} MiB",
            f"time to reach a server | {t.CONNECT_TIMEOUT} s",
            f"time for an answer | {t.ANSWER_TIMEOUT} s;",
            f"for a create, slides, `getRecordings` or `getRecordingTextTracks` {t.LONG_TIMEOUT} s",
            f"A stranger has {t.HEAD_TIMEOUT} s for a whole request",
            f"asks each server every {t.SURVEY_INTERVAL} seconds",
            f"again after {'a second' if t.FIRST_RETRY == 1 else t.FIRST_RETRY}, then every",
            f"then every {t.RETRY_INTERVAL} seconds",
            f"takes more than {t.SLOW} s for an answer",
            f"refreshes itself every {t.SURVEY_INTERVAL} seconds",
            f"It takes {t.PROBE_TIMEOUT} s at most",
            f"who has not answered within {t.PROBE_TIMEOUT} s is left out",
            f"has failed once: {t.CONNECT_TIMEOUT + t.ANSWER_TIMEOUT} s at most",
            f"its meetings, for {t.HOLD} s | `serverUnavailable`",
            f"has been down for {t.HOLD} s",
            f"tries again every {t.RETRY_AFTER} s",
            f"at least {t.EXPECTED} people",
            f"less than {t.YOUNG // 60} minutes",
            f"not answered yet counts for {t.EXPECTED}",
            f"calls in progress finish for {t.DRAIN_TIMEOUT} s at most",
            f"Calls in progress have {t.DRAIN_TIMEOUT} s to finish",
        ):
            with self.subTest(words):
                # a few words may stand in the place of three points
                pattern = ".{1,60}".join(map(re.escape, words.split(" ... ")))
                self.assertTrue(re.search(pattern, readme), pattern)
        # nginx waits a little longer for us than we do for a server
        wait = int(re.search("proxy_read_timeout ([0-9]+)s", readme)[1])
        self.assertGreater(wait, t.LONG_TIMEOUT + t.CONNECT_TIMEOUT + t.ANSWER_TIMEOUT)
        # and the nginx of a server keeps a connection for longer than we do
        self.assertLess(t.KEPT_FOR, 75)

    def test_examples_of_the_list_of_servers_are_right(self):
        heredoc = re.search(
            r"servers\.json >/dev/null <<'END'\n(.*?)\nEND\n", self.readme, re.DOTALL
        )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "servers.json")
            with open(path, "w") as file:
                file.write(heredoc[1])
            for name in (path, os.path.join(FOLDER, "servers.json.example")):
                self.assertGreater(len(tinyscale.read_servers(name)), 1)

    def test_each_link_within_the_readme_leads_somewhere(self):
        headings = re.findall("^#+ (.*)$", self.readme, re.MULTILINE)
        places = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
        links = re.findall(r"\]\(#(.*?)\)", self.readme)
        self.assertGreater(len(links), 10)
        self.assertEqual(set(links) - places, set())
        contents = re.findall(
            r"\[(.*?)\]\(#", re.search("Contents:(.*?)\n\n", self.readme, re.DOTALL)[1]
        )
        self.assertEqual(contents, re.findall("^## (.*)$", self.readme, re.MULTILINE))

    def test_no_section_of_the_readme_is_empty_or_unfinished(self):
        parts = re.split("^#+ .*\n", self.readme, flags=re.MULTILINE)
        titles = re.findall("^(#+) (.*)$", self.readme, re.MULTILINE)
        self.assertEqual(len(parts), len(titles) + 1)
        for (level, title), (below, _), text in zip(titles, [*titles[1:], ("#", "")], parts[1:]):
            self.assertTrue(text.strip() or len(below) > len(level), title)
        self.assertEqual(re.findall(".*TODO.*", self.readme), [])

    def test_the_index_of_this_file_names_its_tests_in_their_order(self):
        tree = ast.parse(self.tests)
        index = re.findall(
            r"^    (\w+Test) {2,}\S", ast.get_docstring(tree, clean=False), re.MULTILINE
        )
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        have_tests = [
            node.name
            for node in classes
            if any(getattr(part, "name", "").startswith("test_") for part in node.body)
        ]
        self.assertEqual(index, have_tests)


# ---- the demo and the benchmark ------------------------------------------------------------------


@contextlib.contextmanager
def running(fakes, port, shown=None, **env):
    """tinyscale in a process of its own, in front of these fakes.

    Yields the process, its port once it listens, None if it does not, and its secret. Its log is
    shown there.
    """
    secret = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "servers.json")
        with open(path, "w") as file:
            json.dump([{"host": fake.url, "secret": fake.secret} for fake in fakes], file)
        os.chmod(path, 0o600)
        options = ["--servers", path, "--port", str(port), "--bind", "127.0.0.1"]
        process = subprocess.Popen(
            [sys.executable, PROGRAM, *options],
            env={**os.environ, "TINYSCALE_SECRET": secret, **env},
            stderr=subprocess.PIPE,
            universal_newlines=True,
            # a Ctrl-C reaches it once, through us
            start_new_session=True,
        )
        log = Log(process.stderr, shown)
        try:
            match = log.find(r"listens on port (\d+)")
            yield process, match and int(match[1]), secret
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait()
            log.text()


def demo(port):
    """tinyscale in front of three fake servers, until Ctrl-C or SIGTERM; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fakes = [FakeBBB(f"server {number}", uuid.uuid4().hex) for number in (1, 2, 3)]
    password = uuid.uuid4().hex[:8]
    begun = running(fakes, port, sys.stderr, TINYSCALE_STATUS_PASSWORD=password)
    with contextlib.suppress(KeyboardInterrupt), begun as (process, port_taken, secret):
        if port_taken:
            print_links(port_taken, secret, password)
        else:
            print(
                "The demo needs a free port: python3 test_tinyscale.py demo --port 4005", flush=True
            )
        process.wait()
    for fake in fakes:
        fake.down()
    return process.returncode


def print_links(port, secret, password):
    origin = f"http://127.0.0.1:{port}"
    url = f"{origin}/bigbluebutton/api"
    print("\ntinyscale stands in front of three fake servers.")
    print(f"  URL:    {url}")
    print(f"  secret: {secret}")
    print(f"  status: {origin}/status, user admin, password {password}")
    print("\nCreate a meeting, join it, and see what runs.")
    print("Each link may be used again, but not changed:")
    for call, query in (
        ("create", "name=Demo&meetingID=demo&attendeePW=ap&moderatorPW=mp"),
        ("join", "fullName=Ada&meetingID=demo&password=mp"),
        ("getMeetings", ""),
    ):
        print(f"  {url}/{call}?{signed(call, query, secret, 'sha256')}")
    print("\nCtrl-C ends it.\n", flush=True)


# A server of Python that does nothing, but writes an answer in one piece, as tinyscale does.
BARE = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    wbufsize = -1
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *args):
        pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1000
    daemon_threads = True
server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


CLIENTS = 20


FAKES = 4


ROOMS = 25


def run_fakes():
    """Some fakes, and nothing else, until the process is ended: they are to take no time from who
    measures.
    """
    for number in range(FAKES):
        fake = FakeBBB(f"bbb{number}")
        for room in range(ROOMS):
            fake.put(f"room{number}-{room}")
        print(fake.port, flush=True)
    threading.Event().wait()


def one_call(port, path):
    """A call over a connection of its own. Return how long it took, in milliseconds."""
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while True:
            data = connection.recv(65536)
            if not data:
                break
            answer += data
    if not re.match(rb"HTTP/1.[01] (200|302) ", answer) or b"FAILED" in answer:
        raise ValueError(answer)
    return 1000 * (time.perf_counter() - started)


def measure(port, paths, seconds):
    """Call these paths for some seconds, on new connections.

    Return calls a second, median and 95 % in milliseconds.
    """
    lock = threading.Lock()
    started = time.perf_counter()
    times = []

    def client():
        # at least one call
        is_over = False
        while not is_over:
            with lock:
                path = next(paths)
            times.append(one_call(port, path))
            is_over = time.perf_counter() - started > seconds

    for future in [background(client) for _ in range(CLIENTS)]:
        future.result()
    rate = len(times) / (time.perf_counter() - started)
    times.sort()
    return rate, times[len(times) // 2], times[len(times) * 95 // 100]


def paths_of(call, query, secret):
    """The paths of a call, signed, each for another room or user."""
    number = 0
    while True:
        room = f"room{number % FAKES}-{number % ROOMS}"
        text = query.format(number=number, room=room)
        yield f"/bigbluebutton/api/{call}?{signed(call, text, secret)}"
        number += 1


def bench(seconds=2.0):
    """Print calls a second and latency of tinyscale, in front of four fakes, beside a bare
    ThreadingHTTPServer's.
    """
    commands = (["-c", BARE], [os.path.abspath(__file__), "fakes"])
    processes = [
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) for command in commands
    ]
    try:
        bare_port = int(processes[0].stdout.readline())
        ports = [int(processes[1].stdout.readline()) for _ in range(FAKES)]
        fakes = [
            argparse.Namespace(url=f"http://127.0.0.1:{port}", secret="its-own-secret")
            for port in ports
        ]
        with running(fakes, 0) as (_, port, secret):
            print(f"{'':26}{'calls/s':>8}{'median':>11}{'95 %':>11}{'of bare':>9}")
            bare = None
            for call, query in (
                ("bare ThreadingHTTPServer", None),
                ("join", "fullName=User+{number}&meetingID={room}"),
                ("isMeetingRunning", "meetingID={room}"),
                ("getMeetingInfo", "meetingID={room}"),
                ("getMeetings", ""),
                ("create", "meetingID=new-{number}"),
            ):
                if query is None:
                    bare = result = measure(bare_port, iter(lambda: "/", None), seconds)
                else:
                    result = measure(port, paths_of(call, query, secret), seconds)
                rate, median, slow = result
                row = f"{call:26}{rate:8.0f}{median:8.1f} ms{slow:8.1f} ms{rate / bare[0]:9.2f}"
                print(row, flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.communicate()
    return 0


class DemoTest(unittest.TestCase):
    """The demo and the benchmark."""

    def run_it(self, *arguments):
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)
        return process

    def test_the_demo_prints_links_that_work(self):
        # a port that is ours, though nobody listens there yet
        place = FakeBBB("a place")
        self.addCleanup(place.down)
        place.down()
        process = self.run_it("demo", "--port", str(place.port))
        links = []
        for line in process.stdout:
            links += re.findall(rf"^  http://127\.0\.0\.1:{place.port}(/\S+checksum=\S+)$", line)
            if line.startswith("Ctrl-C"):
                break
        self.assertEqual([fetch(place.port, link).status for link in links], [200, 302, 200])
        process.terminate()
        self.assertEqual(process.wait(20), 0)

    def test_a_demo_whose_port_is_taken_says_so_and_prints_no_links(self):
        taken = FakeBBB("another program")
        self.addCleanup(taken.down)
        process = self.run_it("demo", "--port", str(taken.port))
        output, errors = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 1)
        self.assertIn("--port", output)
        self.assertNotIn("http", output)
        self.assertRegex(errors, f"{taken.port}.*in use")

    def test_the_benchmark_prints_its_table(self):
        process = self.run_it("bench", "--seconds", "0.05")
        output, errors = process.communicate(timeout=60)
        self.assertEqual(errors, "")
        self.assertEqual(process.returncode, 0)
        head, *rows = output.splitlines()
        self.assertEqual(head.split(), ["calls/s", "median", "95", "%", "of", "bare"])
        self.assertEqual(len(rows), 6)
        for row in rows:
            self.assertRegex(row, r"^\w.{25} +\d+ +\d+\.\d ms +\d+\.\d ms +\d+\.\d\d$")
        self.assertRegex(rows[0], "^bare ThreadingHTTPServer .* 1.00$")


# Most tests wait for something, so several classes run at a time, each in a process of its own.
WORKERS = 4


def run_class(name):
    """Run the tests of a class. Return the exit status, and what it printed."""
    command = [sys.executable, "-W", "error", "-m", "unittest", f"test_tinyscale.{name}"]
    process = subprocess.run(
        command,
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return process.returncode, process.stdout.decode("utf-8", "replace")


def run_all():
    """Run all tests. Return the exit status."""
    started = time.monotonic()
    cases = [thing for thing in globals().values() if isinstance(thing, type)]
    cases = [case for case in cases if issubclass(case, unittest.TestCase)]
    # first those that take longest, as they wait for silent servers, or start processes
    cases.sort(key=lambda case: not issubclass(case, (OutageTest, ProcessCase)))
    names = [case.__name__ for case in cases if case.__name__ not in ("ClusterTest", "ProcessCase")]
    counts, broken = [], []
    with futures.ThreadPoolExecutor(WORKERS) as threads:
        for name, (code, text) in zip(names, threads.map(run_class, names)):
            count = re.search(r"(?m)^Ran (\d+) tests?", text)
            counts.append(int(count[1]) if count else 0)
            if code or not counts[-1]:
                broken.append(name)
                print(text)
    print(f"Ran {sum(counts)} tests of {len(names)} classes in {time.monotonic() - started:.1f}s")
    print("FAILED: " + ", ".join(broken) if broken else "OK")
    return bool(broken)


def main():
    if not sys.argv[1:]:
        return run_all()
    if sys.argv[1] not in ("demo", "bench", "fakes"):
        return unittest.main()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="demo|bench")
    command = commands.add_parser("demo", help="try it without BBB")
    command.add_argument("--port", type=int, default=3005)
    command = commands.add_parser("bench", help="measure it")
    command.add_argument("--seconds", type=float, default=2.0, help="for each row")
    commands.add_parser("fakes")
    options = parser.parse_args()
    if options.command == "demo":
        return demo(options.port)
    return bench(options.seconds) if options.command == "bench" else run_fakes()


if __name__ == "__main__":
    sys.exit(main())
