#!/usr/bin/env python3
"""Tests of tinyscale, on fake BigBlueButton servers over real sockets, and a demo.

    python3 test_tinyscale.py              run the tests
    python3 test_tinyscale.py demo         tinyscale in front of three fake servers, to try without BBB (--port 3005)
    python3 test_tinyscale.py bench        calls per second and latency, beside a bare ThreadingHTTPServer's

The fakes verify each checksum and answer as BBB does, until a test tells them to refuse, hang, hang up or talk rubbish.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import html
import http.client
import http.server
import importlib.util
import io
import json
import logging
import os
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
import unittest
import uuid
import warnings
import weakref
import xml.etree.ElementTree as ET
from concurrent import futures
from unittest import mock
from urllib.parse import parse_qsl, quote_plus, unquote_plus

import tinyscale

tinyscale.log.addHandler(logging.NullHandler())        # a thread that outlives its test prints nothing
HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "tinyscale.py")
SECRET = "the-front-ends-secret"
DIGESTS = {40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}
# A throw-away key and certificate for localhost, only for these tests, valid until 2126. Made with:
# openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=localhost \
#     -addext subjectAltName=DNS:localhost,IP:127.0.0.1
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
    """Write the key and the certificate. Return the path of the PEM file, and the TLS of a server that has them."""
    path = os.path.join(folder, "tls.pem")
    with open(path, "w") as file:
        file.write(KEY + CERTIFICATE)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path)
    return path, tls


def background(job, *args):
    """Run a job in a thread of its own. Return the future of its result."""
    future = futures.Future()

    def run():
        try:
            future.set_result(job(*args))
        except Exception as error:          # noqa: BLE001  the future raises it
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future


# ---- a fake BBB server -----------------------------------------------------------------------------------------------

FIXED = ("<createDate>Tue Nov 14 22:13:20 UTC 2023</createDate><voiceBridge>70000</voiceBridge>"
         "<dialNumber>613-555-1234</dialNumber><hasUserJoined>false</hasUserJoined><duration>0</duration>"
         "<hasBeenForciblyEnded>false</hasBeenForciblyEnded>")


class FakeMeeting:
    def __init__(self, params, created):
        self.id, self.created = params["meetingID"], created
        self.internal_id = f"{hashlib.sha1(self.id.encode()).hexdigest()}-{created}"
        self.name, self.people = params.get("name", ""), 0
        self.given = params.get("attendeePW"), params.get("moderatorPW")
        self.attendee_pw, self.moderator_pw = (password or uuid.uuid4().hex[:8] for password in self.given)
        self.breakout, self.custom = params.get("isBreakout") == "true", ""

    def info(self):
        return (f"<meetingName>{html.escape(self.name)}</meetingName><meetingID>{html.escape(self.id)}</meetingID>"
                f"<internalMeetingID>{self.internal_id}</internalMeetingID>"
                f"<createTime>{self.created}</createTime>{FIXED}"
                f"<attendeePW>{html.escape(self.attendee_pw)}</attendeePW>"
                f"<moderatorPW>{html.escape(self.moderator_pw)}</moderatorPW>"
                f"<running>{str(self.people > 0).lower()}</running><participantCount>{self.people}</participantCount>"
                f"<moderatorCount>0</moderatorCount><attendees>{self.custom}</attendees><metadata/>"
                f"<isBreakout>{str(self.breakout).lower()}</isBreakout>")


def success(inner):
    return 200, "text/xml;charset=utf-8", f"<response><returncode>SUCCESS</returncode>{inner}</response>", {}


def failed(key, message="no"):
    return 200, "text/xml;charset=utf-8", (f"<response><returncode>FAILED</returncode><messageKey>{key}</messageKey>"
                                           f"<message>{message}</message></response>"), {}


class FakeBBB:
    """A BBB server. `calls` has what it was asked, `faults` what it shall do instead of answering, by call or "*"."""

    def __init__(self, name="bbb", secret="its-own-secret", tls=None):
        self.name, self.secret, self.tls = name, secret, tls
        self.meetings, self.recordings, self.hooks = {}, {}, {}
        self.calls, self.faults, self.sockets, self.queue = [], {}, set(), []
        self.has_hooks, self.refuses_all_recordings, self.refuses_bodies = True, False, False
        self.clock = 1700000000000
        self.released, self.server = threading.Event(), None
        place = socket.socket()             # bound, never listening: while we are down nobody else gets our port
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
                    connection = fake.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
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
        self.meetings[meeting_id] = meeting = FakeMeeting({"meetingID": meeting_id}, created or self.clock)
        meeting.people = people
        return meeting

    def record(self, meeting_id, start, state="published", copy_of=None):
        record_id = copy_of or f"{hashlib.sha1(meeting_id.encode()).hexdigest()}-{start}"
        self.recordings[record_id] = {"meetingID": meeting_id, "start": start, "state": state, "meta": {}, "tracks": []}
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
        return success(f"<meetingID>{html.escape(meeting.id)}</meetingID>"
                       f"<internalMeetingID>{meeting.internal_id}</internalMeetingID>"
                       f"<attendeePW>{html.escape(meeting.attendee_pw)}</attendeePW>"
                       f"<moderatorPW>{html.escape(meeting.moderator_pw)}</moderatorPW>"
                       f"<createTime>{meeting.created}</createTime>{FIXED}"
                       f"<messageKey>{key}</messageKey><message></message>")

    def join(self, params):
        meeting, token = self.find(params["meetingID"]), uuid.uuid4().hex[:16]
        if not meeting:
            errors = quote_plus('[{"key":"invalidMeetingIdentifier"}]')
            return 302, "", "", {"Location": f"{params.get('errorRedirectUrl', self.url)}?errors={errors}"}
        meeting.people += 1
        cookie = {"Set-Cookie": f"JSESSIONID={token}; Path=/bigbluebutton; HttpOnly"}
        if params.get("redirect", "true").lower() not in ("", "true"):
            status, content_type, body, _ = success(f"<messageKey>successfullyJoined</messageKey><session_token>{token}"
                                                    f"</session_token><url>{self.url}/html5client/</url>")
            return status, content_type, body, cookie
        name = quote_plus(params.get("fullName", ""))
        return 302, "", "", {"Location": f"{self.url}/html5client/?sessionToken={token}&name={name}", **cookie}

    def isMeetingRunning(self, params):
        meeting = self.find(params["meetingID"])
        return success(f"<running>{str(bool(meeting and meeting.people)).lower()}</running>")

    def getMeetingInfo(self, params):
        meeting = self.find(params["meetingID"])
        return success(meeting.info()) if meeting else failed("notFound", "A meeting with that ID does not exist")

    def end(self, params):
        meeting = self.find(params["meetingID"])
        if not meeting:
            return failed("notFound")
        if params.get("password", meeting.moderator_pw) != meeting.moderator_pw:
            return failed("invalidPassword")
        del self.meetings[meeting.id]
        return success("<messageKey>sentEndMeetingRequest</messageKey><message>wait</message>")

    def getMeetings(self, params):
        items = "".join(f"<meeting>{meeting.info()}</meeting>" for meeting in list(self.meetings.values()))
        return success(f"<meetings>{items}</meetings>" if items else "<meetings/><messageKey>noMeetings</messageKey>"
                       "<message>no meetings were found on this server</message>")

    def getSessions(self, params):
        items = "".join(
            f"<meeting><meetingID>{meeting.internal_id}</meetingID><userName>user {number}</userName></meeting>"
            for meeting in self.meetings.values() for number in range(meeting.people))
        return success(f"<sessions>{items}</sessions>" if items else "<sessions/><messageKey>noSessions</messageKey>"
                       "<message>no sessions were found on this serverr</message>")

    def insertDocument(self, params):
        return success("<message>Presentation is being uploaded</message>") if self.find(params["meetingID"]) else (
            200, "text/xml", "<response><returncode>FAILED</returncode><message>not found.</message></response>", {})

    def sendChatMessage(self, params):
        return success("<messageKey></messageKey>") if self.find(params["meetingID"]) else failed("meetingNotFound")

    def selected(self, params):
        """The recordings that a call means: by the beginning of an ID, as BBB does it."""
        ids = [text for text in unquote_plus(params.get("recordID", "")).split(",") if text.strip()]
        ids = ids or [hashlib.sha1(text.encode()).hexdigest()
                      for text in unquote_plus(params.get("meetingID", "")).split(",") if text.strip()]
        states = params.get("state", "published,unpublished").split(",")
        meta = {name[5:]: value for name, value in params.items() if name.startswith("meta_")}
        found = [key for key, recording in self.recordings.items() if (recording["state"] in states or "any" in states)
                 and all(recording["meta"].get(name) == value for name, value in meta.items())]
        return [key for key in found if not ids or any(key.startswith(text) for text in ids)], ids

    def getRecordings(self, params):
        found, ids = self.selected(params)
        if self.refuses_all_recordings and not ids and "limit" not in params:
            return success("<messageKey>noRecordings</messageKey><message>fetching all is not allowed</message>")
        if "limit" in params:
            raise AssertionError("tinyscale has to page the merged list")
        items = "".join(
            f"<recording><recordID>{key}</recordID><meetingID>{self.recordings[key]['meetingID']}</meetingID>"
            f"<state>{self.recordings[key]['state']}</state><startTime>{self.recordings[key]['start']}</startTime>"
            f"<name>from {self.name}</name></recording>" for key in found)
        return success(f"<recordings>{items}</recordings>" + ("" if items else "<messageKey>noRecordings</messageKey>"
                       "<message>There are no recordings for the meeting(s).</message>"))

    def changed(self, params, element, value, state=None):
        if not params.get("recordID"):
            return failed("missingParamRecordID", "You must specify a recordID.")
        ids = [key for key in params["recordID"].split(",") if key in self.recordings]
        for key in ids:
            self.recordings[key]["state"] = state or self.recordings[key]["state"]
        return success(f"<{element}>{value}</{element}>") if ids else failed("notFound", "We could not find recordings")

    def publishRecordings(self, params):
        return self.changed(params, "published", params["publish"],
                            "published" if params["publish"] == "true" else "unpublished")

    def deleteRecordings(self, params):
        return self.changed(params, "deleted", "true", "deleted")

    def updateRecordings(self, params):
        return self.changed(params, "updated", "true")

    def getRecordingTextTracks(self, params):
        recording = self.recordings.get(params.get("recordID", ""))
        answer = {"returncode": "SUCCESS", "tracks": recording["tracks"]} if recording else {
            "returncode": "FAILED", "messageKey": "noCaptionsFound", "message": "none"}
        return 200, "application/json;charset=utf-8", json.dumps({"response": answer}), {}

    def putRecordingTextTrack(self, params):
        recording = self.recordings.get(params.get("recordID", ""))
        if recording:
            recording["tracks"].append({"kind": params["kind"], "lang": params["lang"]})
        answer = {"returncode": "SUCCESS" if recording else "FAILED",
                  "messageKey": "upload_text_track_success" if recording else "noRecordings"}
        return 200, "application/json;charset=utf-8", json.dumps({"response": answer}), {}

    def hooks_create(self, params):
        known = [key for key, hook in self.hooks.items() if hook == params.get("callbackURL")]
        if not params.get("callbackURL"):
            return failed("missingParamCallbackURL")
        key = known[0] if known else str(uuid.uuid4())
        self.hooks[key] = params["callbackURL"]
        return success(f"<hookID>{key}</hookID><permanentHook>false</permanentHook><rawData>false</rawData>"
                       + ("<messageKey>duplicateWarning</messageKey>" if known else ""))

    def hooks_list(self, params):
        items = "".join(f"<hook><hookID>{key}</hookID><callbackURL><![CDATA[{url}]]></callbackURL></hook>"
                        for key, url in self.hooks.items())
        return success(f"<hooks>{items}</hooks>")

    def hooks_destroy(self, params):
        known = self.hooks.pop(params["hookID"], None)
        return success("<removed>true</removed>") if known else failed("destroyMissingHook")


CALLS_OF_BBB = (
    "create", "join", "isMeetingRunning", "getMeetingInfo", "end", "getMeetings", "getSessions", "insertDocument",
    "sendChatMessage", "getRecordings", "publishRecordings", "deleteRecordings", "updateRecordings",
    "getRecordingTextTracks", "putRecordingTextTrack", "hooks/create", "hooks/list", "hooks/destroy")


class FakeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bbb = None

    def do_GET(self):
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length", 0))
        if length and self.bbb.refuses_bodies:
            self.close_connection = True                # with bytes unread: the sender is cut off
            return self.answer(413, "text/html", "<html>413 Request Entity Too Large</html>", {})
        body = self.rfile.read(length)
        if not path.startswith("/bigbluebutton/api/"):
            token = html.escape(dict(parse_qsl(query)).get("name", ""))
            return self.answer(200, "text/html;charset=utf-8", f"<h1>This is {self.bbb.name}</h1><p>Hello {token}.", {})
        call = path[len("/bigbluebutton/api/"):]
        if not call:
            return self.answer(*success("<version>2.0</version><bbbVersion>3.0.4</bbbVersion>"))
        self.bbb.calls.append((call, query, self.command, body, self.headers.get("Content-Type", "")))
        fault = self.bbb.faults.get(call) or self.bbb.faults.get("*")
        answer = fault(self) if fault else self.call(call, query, body)
        return self.answer(*answer) if answer else None

    do_POST = do_GET

    def call(self, call, query, body):
        """What BBB's controllers do: first the checksum over the raw query, then the content type, then the call."""
        if call.startswith("hooks/") and not self.bbb.has_hooks:
            return 502, "text/html", "<html>502 Bad Gateway</html>", {}
        given = dict(parse_qsl(query, keep_blank_values=True)).get("checksum", "")
        bare = query
        for part in (f"&checksum={given}", f"checksum={given}&", f"checksum={given}"):
            bare = bare.replace(part, "")
        digest = DIGESTS.get(len(given))
        if not digest or hashlib.new(digest, (call + bare + self.bbb.secret).encode()).hexdigest() != given:
            return failed("checksumError", "Checksums do not match")
        params = dict(parse_qsl(bare, keep_blank_values=True))
        media_type = self.headers.get("Content-Type", "").partition(";")[0]
        if body and media_type not in ("application/xml", "multipart/form-data"):
            return failed("unsupportedContentType")
        if call in ("create", "join", "isMeetingRunning", "getMeetingInfo", "end") and not params.get("meetingID"):
            return failed("missingParamMeetingID", "You must provide a meeting ID")
        if call not in CALLS_OF_BBB:
            return 404, "text/html", "<html>no such call</html>", {}
        return getattr(self.bbb, call.replace("/", "_"))(params)

    def answer(self, status, content_type, body, headers):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Tests look at `calls`."""


# What a fake can do instead of answering: each takes its handler, and returns an answer to send, if any.

def proper(handler):
    """The answer without a fault."""
    path, _, query = handler.path.partition("?")
    return handler.call(path[len("/bigbluebutton/api/"):], query, b"")


def silent(handler):
    """Take the call and never answer."""
    handler.close_connection = True
    handler.bbb.released.wait(30)


def reset(handler):
    """Break off in the middle of the answer."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 1000\r\n\r\n<response><returnco")
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


# ---- tinyscale in front of fakes -------------------------------------------------------------------------------------

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
    connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=trust) if trust else (
        http.client.HTTPConnection("127.0.0.1", port, timeout=10))
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        return Answer(connection.getresponse())


# tinyscale's limits where servers fail
SHORT = (("CONNECT_TIMEOUT", 0.3), ("ANSWER_TIMEOUT", 0.3), ("WORK_TIMEOUT", 0.3), ("PATIENCE", 0.15))
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class ClusterTest(unittest.TestCase):
    """Three fake servers and tinyscale in this process. Surveys come when the test says so."""
    servers = 3
    limits = ()                 # (name, value), ...: of tinyscale's limits
    settings = ()               # (variable, value), ...: its environment, but for the secrets

    def setUp(self):
        self.clusters, self.servers_had = [], []
        self.addCleanup(self.close_kept)
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        tinyscale.log.addHandler(handler)
        tinyscale.log.setLevel(logging.INFO)
        tinyscale.log.propagate = False
        self.addCleanup(tinyscale.log.removeHandler, handler)
        self.clock = Clock()
        limits = {"LINGER": 0.2, **dict(self.limits)}
        for patch in (mock.patch.multiple(tinyscale, **limits), mock.patch.object(tinyscale, "time", self.clock)):
            patch.start()
            self.addCleanup(patch.stop)
        self.fakes = [FakeBBB(f"bbb{number}", f"secret-of-{number}") for number in range(1, self.servers + 1)]
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
        for secret in (SECRET, "another-secret", "checksum=", *(fake.secret for fake in self.fakes)):
            self.assertNotIn(secret, log)
        for word in re.findall("(?<![0-9a-f])[0-9a-f]{40,}(?![0-9a-f-])", log):     # else an internalMeetingID
            self.assertNotIn(len(word), DIGESTS)

    def clear_log(self):
        self.check_log()
        self.log.seek(0)
        self.log.truncate()

    def entries(self):
        return [{"host": fake.url + "/bigbluebutton/", "secret": fake.secret} for fake in self.fakes]

    def write_servers(self, entries=None):
        with open(self.path, "w") as file:
            json.dump(entries or self.entries(), file)
        os.chmod(self.path, 0o600)

    def start(self):
        """A new tinyscale, which knows nothing yet but what a survey shows."""
        with mock.patch.dict(os.environ, TINYSCALE_SECRET=f"{SECRET},another-secret", **dict(self.settings)):
            self.balancer = tinyscale.LoadBalancer(self.path, "127.0.0.1", "0")
        self.cluster = self.balancer.cluster
        self.port = self.balancer.server_address[1]
        thread = threading.Thread(target=self.balancer.serve_forever, args=(0.002,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.balancer.server_close)
        self.addCleanup(self.balancer.shutdown)
        self.clusters.append(self.cluster)
        self.servers_had += self.cluster.servers
        self.survey()

    def close_kept(self):
        """A process that ends takes its threads and connections with it; this one goes on."""
        for cluster in self.clusters:
            cluster.probing.shutdown()
            cluster.asking.shutdown()
        for server in {server for cluster in self.clusters for server in cluster.servers} | set(self.servers_had):
            for handler in server.opener.handlers:
                while handler.idle:
                    handler.idle.pop()[1].close()

    def load(self, entries=None):
        """Have tinyscale read the settings again."""
        self.write_servers(entries)
        with mock.patch.dict(os.environ, TINYSCALE_SECRET=f"{SECRET},another-secret", **dict(self.settings)):
            self.balancer.load()

    def survey(self):
        """A survey, after which the fakes have been asked nothing."""
        self.cluster.survey(3)
        for fake in self.fakes:
            fake.calls.clear()

    def http(self, path, *args, **kwargs):
        return fetch(self.port, path, *args, **kwargs)

    def get(self, call, query="", secret=SECRET, digest="sha1", **kwargs):
        return self.http(f"/bigbluebutton/api/{call}?{signed(call, query, secret, digest)}", **kwargs)

    def create(self, meeting_id, extra="", **kwargs):
        return self.get("create", f"name=A+room&meetingID={quote_plus(meeting_id)}{extra}", **kwargs)

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


# ---- checksums -------------------------------------------------------------------------------------------------------

class ChecksumTest(unittest.TestCase):
    DOCUMENTED = "name=Test+Meeting&meetingID=abc123&attendeePW=111222&moderatorPW=333444"
    DOCUMENTED_SECRET = "639259d4-9dd8-4b25-bf01-95f9567eaf4b"

    def test_the_worked_example_of_the_api_documentation_is_verified(self):
        self.assertEqual(tinyscale.checksum("create", self.DOCUMENTED, self.DOCUMENTED_SECRET, "sha1"),
                         "1fcbb0c4fc1f039f73aa6d697d2db9ba7f803f17")
        query = self.DOCUMENTED + "&checksum=1fcbb0c4fc1f039f73aa6d697d2db9ba7f803f17"
        unsigned, params = tinyscale.verify("create", query, [self.DOCUMENTED_SECRET])
        self.assertEqual((unsigned, params["name"]), (self.DOCUMENTED, "Test Meeting"))

    def test_all_digests_in_any_position_leave_the_rest_byte_for_byte(self):
        for digest in DIGESTS.values():
            for before, after in (
                    ("", ""), ("", "a=1"), ("a=1", ""), ("a=1", "b=2"), ("", "&a=1"), ("&a=1&&", "b=+%20"),
                    ("fullName=A+B%20!*()~", "x="), ("meetingID=%C3%BC", "c")):
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
        self.assertEqual(tinyscale.verify("join", f"&fullName=X&checksum={value}", ["s"])[0], "&fullName=X")

    def test_a_checksum_that_is_missing_wrong_repeated_or_veiled_is_refused(self):
        right = hashlib.sha1(b"enda=1s").hexdigest()
        twice = hashlib.sha1(b"endmeetingID=a&meetingID=bs").hexdigest()
        encoded = hashlib.sha1(b"endmeetingID=a&meeting%49D=bs").hexdigest()
        for query in ("", "a=1", "a=1&checksum=", "a=1&checksum", f"a=1&checksum={right[1:]}", f"a=2&checksum={right}",
                      f"a=1&checksum={right}&checksum={right}", f"checksum=&a=1&checksum={right}",
                      f"a=1&%63hecksum={right}", f"a=1&checksum={right}&%63hecksum=x", f"a=1&Checksum={right}",
                      f"meetingID=a&meetingID=b&checksum={twice}", f"meetingID=a&meeting%49D=b&checksum={encoded}",
                      f"a=1&checksum=%{right[:39]}", "a=1&checksum=" + "\xe9" * 40, "a=1&checksum=" + "z" * 40,
                      f"a=1&xchecksum={right}", f"a=1&checksum={right}&" + "x=y&" * 10000):
            with self.subTest(query[:80]), self.assertRaises(tinyscale.ApiError) as caught:
                tinyscale.verify("end", query, ["s"])
            self.assertEqual(caught.exception.key, "checksumError")

    def test_a_blank_secret_verifies_nothing(self):
        for secret in ("", " ", "\t"):
            with self.assertRaises(tinyscale.ApiError):
                tinyscale.verify("end", signed("end", "a=1", secret), [secret])

    def test_a_form_may_be_signed_over_its_text_or_over_nothing(self):
        for text in ("a=1", ""):
            value = hashlib.sha256(f"end{text}s".encode()).hexdigest()
            self.assertEqual(tinyscale.verify("end", f"a=1&checksum={value}", ["s"], form=True)[0], "a=1")
        with self.assertRaises(tinyscale.ApiError):
            tinyscale.verify("end", f"a=1&checksum={value}", ["s"])

    def test_a_repeated_record_id_is_refused_and_of_other_parameters_the_first_counts(self):
        for name in ("recordID", "meetingID"):
            with self.assertRaises(tinyscale.ApiError):
                tinyscale.verify("end", signed("end", f"{name}=a&{name}=b", "s"), ["s"])
        _, params = tinyscale.verify("join", signed("join", "fullName=A&redirect=false&redirect=true", "s"), ["s"])
        self.assertEqual((params["fullName"], params["redirect"]), ("A", "false"))


# ---- settings --------------------------------------------------------------------------------------------------------

class SettingsTest(unittest.TestCase):
    def load(self, content, mode=0o600):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "servers.json")
            with open(path, "wb") as file:
                file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
            os.chmod(path, mode)
            return tinyscale.load_servers(path)

    def test_a_host_is_taken_in_every_form_that_bbb_prints(self):
        paths = ("", "/", "/bigbluebutton", "/bigbluebutton/", "/bigbluebutton/api", "/bigbluebutton/api/")
        for host, expected in (
                *((f"https://bbb1.example.org{path}", "https://bbb1.example.org") for path in paths),
                ("HTTPS://BBB1.example.org:443", "https://bbb1.example.org"), ("http://bbb1:80/", "http://bbb1"),
                ("http://bbb1:443", "http://bbb1:443"), ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
                ("https://[::1]:9", "https://[::1]:9")):
            self.assertEqual(self.load([{"host": host, "secret": " s "}]), [tinyscale.Entry(expected, "s")])

    def test_the_example_is_a_list_that_is_taken(self):
        with open(os.path.join(HERE, "servers.json.example"), "rb") as file:
            entries = self.load(file.read())
        self.assertTrue(len(entries) > 1 and all(entry.host.startswith("https://") for entry in entries))

    def test_each_mistake_is_one_line_that_names_the_entry_and_the_mend(self):
        good = {"host": "https://bbb1.example.org", "secret": "s"}
        values = {      # key -> wrong values of it, and words of the error
            "host": (("bbb1.example.org", "ftp://b", "https://", "https://a b", "https://u:p@b", "https://b/other",
                      "https://b?x", "https://b:x", "https://b:99999", "https://b:0", "https://[::1", "https://b\n",
                      "https://b\u00fccher.example", None, 5, ["https://b"]), '"host" must look like'),
            "secret": ((" ", "", 5, None, "a\x00b"), "'bbb-conf --secret'"),
            "weight": ((0, -1, 1.5, "2", True, None, 101), '"weight" must be a whole number'),
            "cordoned": (("yes", 1, None), '"cordoned" must be true or false'),
            "checksum": (("md5", 5, None), '"checksum" must be'),
            "wieght": ((2,), '"wieght" is an unknown key')}
        for content, words in (
                (b"", "must be JSON"), (b"\xff", "must be JSON"), (b"[" * 100000, "must be JSON"),
                ({}, "list of servers"), ([], "list of servers"), (["x"], "list of servers"),
                ([{"secret": "s"}], 'entry 1: "host" is missing'),
                ([good, {"host": "https://b"}], 'entry 2 (https://b): "secret" is missing'),
                ([good, {**good, "host": "https://BBB1.example.org/bigbluebutton/"}],
                 "entry 2 (https://bbb1.example.org): an earlier entry"),
                *(([{**good, key: value}], words) for key, (wrong, words) in values.items() for value in wrong)):
            with self.subTest(str(content)[:99]), self.assertRaises(tinyscale.SettingsError) as caught:
                self.load(content)
            self.assertIn(words, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
            self.assertNotIn("u:p", str(caught.exception))

    def test_a_file_that_everyone_may_read_is_warned_about(self):
        content = [{"host": "https://b", "secret": "s"}]
        with self.assertLogs("tinyscale", "WARNING") as logs:
            self.load(content, 0o644)
        self.assertIn("chmod o-rw", logs.output[0])
        with self.assertLogs("tinyscale", "WARNING"):
            self.load(content, 0o602)
        with tempfile.NamedTemporaryFile() as file, self.assertLogs("tinyscale", "WARNING") as logs:
            os.chmod(file.name, 0o604)
            for name in ("TINYSCALE_SECRET_FILE", "TINYSCALE_KEY"):
                with mock.patch.dict(os.environ, {name: file.name}):
                    self.load(content, 0o640)
        self.assertEqual([file.name in line for line in logs.output], [True, True])

    def test_our_secrets_come_from_the_environment_and_from_a_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("third\n\n fourth \n")
            file.flush()
            for text, path, expected in (
                    ("first, second", "", ["first", "second"]), ("", file.name, ["third", "fourth"]),
                    ("first", file.name, ["first", "third", "fourth"])):
                with mock.patch.dict(os.environ, TINYSCALE_SECRET=text, TINYSCALE_SECRET_FILE=path):
                    self.assertEqual(tinyscale.load_secrets(), expected)

    def test_a_blank_secret_or_a_file_without_one_is_a_mistake(self):
        for text, path, words in (
                ("", "", "there is none"), (" ", "", "blank"), ("a,,b", "", "blank"), ("a, ", "", "blank"),
                ("a\udcffb", "", "blank"), ("", os.devnull, "there is none"),
                ("", "/nowhere/secret", "TINYSCALE_SECRET_FILE"), ("a", os.devnull + "/x", "TINYSCALE_SECRET_FILE")):
            with self.subTest((text, path)), self.assertRaises(tinyscale.SettingsError) as caught, mock.patch.dict(
                    os.environ, TINYSCALE_SECRET=text, TINYSCALE_SECRET_FILE=path):
                tinyscale.load_secrets()
            self.assertIn(words, str(caught.exception))

    def test_a_file_with_a_byte_order_mark_is_taken(self):
        text = b'\xef\xbb\xbf[{"host": "https://b", "secret": "s"}]'
        self.assertEqual(self.load(text), [tinyscale.Entry("https://b", "s")])


class ServersFileTest(ClusterTest):
    def test_it_is_read_again_and_servers_that_stay_keep_their_meetings(self):
        self.create("room0")
        self.create("room1")
        kept, gone = self.cluster.servers[0], self.fakes[1]
        self.load([self.entries()[2], dict(self.entries()[0], weight=2)])
        self.assertIs(self.cluster.servers[1], kept)
        self.survey()
        self.assertEqual(self.cluster.find("room0"), (kept, "remembered"))
        self.assertEqual(self.cluster.find("room1"), (None, "nowhere"))
        for number in range(2, 8):
            self.create(f"room{number}")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [5, 1, 2])    # the circle goes on where it was
        self.assertEqual(gone.count("getMeetings", "getMeetingInfo"), 0)

    def test_a_create_whose_server_is_taken_out_meanwhile_is_not_remembered(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["create"] = held(gate, arrived)
        create = background(self.create, "room")
        arrived.wait(5)
        self.load(self.entries()[1:])
        gate.set()
        self.assertEqual(create.result(5).returncode, "SUCCESS")
        self.assertEqual(self.cluster.meetings, {})

    def test_the_watch_takes_up_a_new_file_and_keeps_the_old_list_if_it_is_broken(self):
        patch = mock.patch.dict(os.environ, TINYSCALE_SECRET=SECRET)
        patch.start()
        self.addCleanup(patch.stop)
        with mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0.05):
            background(self.balancer.watch)
            with open(self.path, "w") as file:
                file.write("[{")
            self.assertTrue(until(lambda: "The settings stay as they were" in self.log.getvalue()))
            self.assertEqual(len(self.cluster.servers), 3)
            self.write_servers(self.entries()[:2])
            os.utime(self.path, (1, 1))
            self.assertTrue(until(lambda: len(self.cluster.servers) == 2))
            os.remove(self.path)
            self.fakes[0].put("after the file was gone")
            self.assertTrue(until(lambda: "after the file was gone" in self.cluster.meetings))

    def test_the_watch_goes_on_after_a_mistake_of_ours(self):
        survey = mock.Mock(side_effect=[KeyError("a query"), *[None] * 1000])
        with mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0.05), mock.patch.object(self.cluster, "survey", survey):
            watch = background(self.balancer.watch)
            self.assertTrue(until(lambda: survey.call_count >= 3))
            self.assertFalse(watch.done() and watch.exception(0))
        self.assertIn("a survey failed with KeyError. Please report this", self.log.getvalue())
        self.assertNotIn("a query", self.log.getvalue())

    def test_a_mended_mode_of_a_file_is_noticed(self):
        before = self.balancer.changed()
        os.chmod(self.path, 0o640)
        self.assertNotEqual(self.balancer.changed(), before)

    def test_every_file_of_the_settings_is_watched(self):
        for name in ("TINYSCALE_SECRET_FILE", "TINYSCALE_CERT", "TINYSCALE_KEY"):
            path = os.path.join(os.path.dirname(self.path), name)
            with self.subTest(name), mock.patch.dict(os.environ, {name: path}):
                before = self.balancer.changed()
                with open(path, "w"):
                    self.assertNotEqual(self.balancer.changed(), before)

    def test_one_broken_file_leaves_all_settings_as_they_were(self):
        self.write_servers(self.entries()[:1])
        for name in ("TINYSCALE_SECRET_FILE", "TINYSCALE_CERT"):
            with self.subTest(name), mock.patch.dict(os.environ, {"TINYSCALE_SECRET": "new", name: "/nowhere"}):
                with self.assertRaises(tinyscale.SettingsError):
                    self.balancer.load()
                self.assertEqual((len(self.cluster.servers), self.get("getMeetings").returncode), (3, "SUCCESS"))

    def test_a_broken_file_is_told_once(self):
        with mock.patch.dict(os.environ, TINYSCALE_SECRET=SECRET), mock.patch.multiple(tinyscale, SURVEY_INTERVAL=0.05):
            with open(self.path, "w") as file:
                file.write("[{")
            background(self.balancer.watch)
            self.assertTrue(until(lambda: self.fakes[0].count("getMeetings") > 3))
        self.assertEqual(self.log.getvalue().count("The settings stay as they were"), 1)

    def test_a_renewed_certificate_is_taken_up(self):
        path, _ = certified(os.path.dirname(self.path))
        self.settings = (("TINYSCALE_CERT", path),)
        self.load()
        before = self.balancer.tls
        self.load()
        self.assertIsNot(self.balancer.tls, before)


# ---- where a call goes -----------------------------------------------------------------------------------------------

class RoutingTest(ClusterTest):
    def test_new_meetings_go_round_the_list(self):
        for number in range(9):
            self.assertEqual(self.create(f"room{number}").returncode, "SUCCESS")
        self.assertEqual([list(fake.meetings) for fake in self.fakes],
                         [["room0", "room3", "room6"], ["room1", "room4", "room7"], ["room2", "room5", "room8"]])

    def test_weights_share_the_turns_and_cordoned_servers_get_none(self):
        entries = self.entries()
        entries[0]["weight"], entries[2]["cordoned"] = 3, True
        self.write_servers(entries)
        self.start()
        for number in range(8):
            self.create(f"room{number}")
        self.assertEqual([self.having(f"room{number}")[0].name for number in range(8)],
                         ["bbb1", "bbb1", "bbb1", "bbb2"] * 2)

    def test_join_sends_the_browser_to_the_meetings_server_without_a_call(self):
        self.create("room")
        owner, = self.having("room")
        self.survey()
        query = "&fullName=J%C3%BCrgen+M&meetingID=room&password=ap"
        answer = self.get("join", query)
        self.assertEqual((answer.status, answer.body, [fake.calls for fake in self.fakes]), (302, b"", [[], [], []]))
        self.assertEqual(answer.headers["Location"],
                         f"{owner.url}/bigbluebutton/api/join?{signed('join', query, owner.secret, 'sha256')}")
        self.assertNotIn("Set-Cookie", answer.headers)
        self.assertNotIn("Content-Type", answer.headers)

    def test_any_other_call_costs_one_call_to_the_meetings_server(self):
        for number in range(3):
            self.create(f"room{number}")
        self.fakes[1].meetings["room1"].people = 2
        self.survey()
        for call, expected in (("getMeetingInfo", "room1"), ("isMeetingRunning", None), ("sendChatMessage", None)):
            with self.subTest(call):
                answer = self.get(call, "meetingID=room1&message=hi")
                self.assertEqual((answer.returncode, answer.meetingID), ("SUCCESS", expected))
                self.assertEqual((self.counts(call), sum(len(fake.calls) for fake in self.fakes)), ([0, 1, 0], 1))
                self.survey()

    def test_the_query_reaches_the_server_byte_for_byte(self):
        self.create("room")
        owner, = self.having("room")
        for query in ("meetingID=room&a=+%20&&b=!*()~&c", "&meetingID=room", "&&meetingID=%72oom&x=%c3%BC&"):
            for digest in DIGESTS.values():
                self.survey()
                self.assertEqual(self.get("getMeetingInfo", query, digest=digest).meetingID, "room")
                self.assertEqual(owner.calls[0][1], signed("getMeetingInfo", query, owner.secret, "sha256"))

    def test_servers_are_signed_to_as_their_entry_says(self):
        self.write_servers([dict(entry, checksum=digest) for entry, digest in
                            zip(self.entries(), ("sha1", "sha384", "sha512"))])
        self.start()
        for fake, length in zip(self.fakes, (40, 96, 128)):
            fake.put(fake.name)
            self.assertEqual(self.get("getMeetingInfo", f"meetingID={fake.name}").returncode, "SUCCESS")
            self.assertEqual(len(dict(parse_qsl(fake.calls[-1][1]))["checksum"]), length)

    def test_a_meeting_that_is_not_remembered_is_probed_on_all_servers_once(self):
        self.fakes[2].put("stranger")
        self.assertEqual(self.get("getMeetingInfo", "meetingID=stranger").meetingID, "stranger")
        self.assertLessEqual(max(self.counts("getMeetingInfo")[:2]), 1)     # none if the owner was faster
        self.survey()
        self.assertEqual(self.get("getMeetingInfo", "meetingID=stranger").meetingID, "stranger")
        self.assertEqual(self.counts("getMeetingInfo"), [0, 0, 1])

    def test_many_who_ask_for_an_unknown_meeting_share_one_probe(self):
        meeting, gate = self.fakes[1].put("stranger"), threading.Event()
        self.fakes[1].faults["getMeetingInfo"] = held(gate)
        threading.Timer(0.15, gate.set).start()
        jobs = [lambda: self.get("join", f"meetingID={meeting.id}&fullName=X").headers["Location"]] * 20
        self.assertEqual({url.partition("/big")[0] for url in self.together(jobs)}, {self.fakes[1].url})
        self.assertEqual(self.counts("getMeetingInfo"), [1, 1, 1])

    def test_who_polls_for_a_meeting_to_begin_causes_one_probe_a_second(self):
        for ahead, expected in ((0, [1, 1, 1]), (0.5, [1, 1, 1]), (1.1, [2, 2, 2])):
            self.clock.ahead += ahead
            for _ in range(10):
                self.assertEqual(self.get("isMeetingRunning", "meetingID=soon").running, "false")
            self.assertEqual(self.counts("getMeetingInfo"), expected)
        self.fakes[1].put("soon")                       # not through us: a create must not believe the last probe
        self.assertEqual((self.create("soon").messageKey, self.having("soon")), ("duplicateWarning", [self.fakes[1]]))
        self.clock.ahead += 20
        self.survey()
        self.assertEqual(self.cluster.probes, {})

    def test_ids_are_compared_whole(self):
        meeting = self.fakes[1].put("10")
        self.fakes[0].put("1")
        self.fakes[2].put("a&b <c> \u00fc")
        for meeting_id, owner in (("1", 0), ("10", 1), (meeting.internal_id, 1), ("a&b <c> \u00fc", 2)):
            answer = self.get("join", f"meetingID={quote_plus(meeting_id)}&fullName=X")
            self.assertTrue(answer.headers["Location"].startswith(self.fakes[owner].url), meeting_id)
        prefix = meeting.internal_id[:5]
        self.assertEqual(self.cluster.find(prefix), (None, "nowhere"))

    def test_an_internal_id_is_remembered_too(self):
        self.create("room")
        owner, = self.having("room")
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
        self.assertTrue(location.startswith(self.fakes[0].url + "/bigbluebutton/api/join?meetingID=no"))

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
        self.assertEqual(self.cluster.find("room"), (self.cluster.servers[0], "probed"))
        self.fakes[1].meetings["room"] = self.fakes[0].meetings.pop("room")
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").meetingID, "room")
        self.assertEqual(self.cluster.find("room")[0], self.cluster.servers[1])

    def test_a_join_without_redirect_that_is_denied_is_sent_to_the_right_server(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[1].meetings["room"] = self.fakes[0].meetings.pop("room")
        self.assertEqual(self.get("join", "meetingID=room&fullName=X&redirect=false").messageKey, "successfullyJoined")
        self.assertEqual(self.counts("join"), [1, 1, 0])

    def test_a_denial_about_something_else_asks_nobody_else(self):
        self.create("room")
        self.survey()
        self.assertEqual(self.get("end", "meetingID=room&password=wrong").messageKey, "invalidPassword")
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
        survey = background(self.cluster.survey, 3)
        arrived.wait(5)
        self.create("new")
        self.assertEqual(self.having("new"), [self.fakes[1]])
        gate.set()
        survey.result(5)
        self.assertNotIn("old", self.cluster.meetings)
        self.assertEqual(self.cluster.find("new")[1], "remembered")

    def test_memory_is_believed_only_for_a_while(self):
        self.create("room")
        owner, = self.having("room")
        other = self.fakes[1]
        other.meetings["room"] = owner.meetings.pop("room")
        self.assertTrue(self.get("join", "meetingID=room&fullName=X").headers["Location"].startswith(owner.url))
        self.clock.ahead += tinyscale.MEETING_TTL
        self.assertTrue(self.get("join", "meetingID=room&fullName=X").headers["Location"].startswith(other.url))

    def test_twins_are_named_once_and_the_newer_one_counts(self):
        self.fakes[0].put("no twin")
        self.survey()
        self.assertNotIn("runs on", self.log.getvalue())
        self.fakes[0].meetings.clear()
        self.fakes[0].put("room", created=1000)
        self.fakes[2].put("room", created=2000)
        self.fakes[1].put("room", created=1500)
        for _ in range(2):
            self.survey()
            self.assertIs(self.cluster.find("room")[0], self.cluster.servers[2])
        self.assertEqual(self.log.getvalue().count("'room' runs on"), 1)
        for fake in self.fakes:
            self.assertIn(fake.url, self.log.getvalue().partition("'room' runs on")[2])
        listed = self.get("getMeetings").xml.findall("meetings/meeting")
        self.assertEqual([item.findtext("createTime") for item in listed], ["2000"])

    def test_join_without_redirect_is_relayed_with_its_cookie(self):
        self.create("room")
        owner, = self.having("room")
        for value in ("false", "FALSE", "0", "yes"):
            answer = self.get("join", f"meetingID=room&fullName=X&redirect={value}")
            self.assertEqual((answer.status, answer.messageKey), (200, "successfullyJoined"))
            self.assertTrue(answer.headers["Set-Cookie"].startswith("JSESSIONID="))
        for value in ("true", "TRUE", ""):
            answer = self.get("join", f"meetingID=room&fullName=X&redirect={value}")
            self.assertTrue(answer.headers["Location"].startswith(owner.url + "/bigbluebutton/api/join?"))
        answer = self.get("join", "meetingID=no&fullName=X&redirect=false&errorRedirectUrl=https%3A%2F%2Fexample.org")
        self.assertEqual((answer.status, answer.headers["Location"].partition("?")[0]), (302, "https://example.org"))

    def test_join_is_called_with_get_only(self):
        self.create("room")
        query, headers = "meetingID=room&fullName=X", {"Content-Type": "text/xml"}
        self.assertEqual(self.get("join", query, method="POST").status, 405)
        with mock.patch.object(tinyscale.Handler, "body", side_effect=AssertionError("it was read")):
            self.assertEqual(self.get("join", query, body=b"<" * 10**6, headers=headers).status, 405)

    def test_the_checksum_of_a_join_link_is_good_for_nothing_else(self):
        """Call and query are hashed without a separator, so its boundary can be moved."""
        self.create("room")
        self.survey()
        query = signed("join", "fullName=G&meetingID=room")
        for moved in (f"joinfullName?={query[len('fullName='):]}", f"joi?n{query}", f"join/x?{query}", f"j?oin{query}"):
            for method, body in (("GET", None), ("POST", b"<x/>")):
                answer = self.http(f"/bigbluebutton/api/{moved}", method, body, {"Content-Type": "text/xml"})
                self.assertEqual(answer.status, 404, moved)
        self.assertEqual([fake.calls for fake in self.fakes], [[], [], []])

    def test_a_breakout_room_is_created_on_its_parents_server(self):
        self.create("zero")
        self.create("parent")
        parent, = self.having("parent")
        for number, parent_id in enumerate(("parent", parent.meetings["parent"].internal_id, "parent", "parent")):
            answer = self.create(f"breakout{number}", f"&isBreakout=true&sequence={number}&parentMeetingID={parent_id}")
            self.assertEqual((answer.returncode, self.having(f"breakout{number}")), ("SUCCESS", [parent]))
        lost = self.create("lost", "&isBreakout=true&parentMeetingID=no")
        self.assertEqual(lost.messageKey, "parentMeetingDoesNotExist")
        self.assertEqual(self.create("plain", "&parentMeetingID=").returncode, "SUCCESS")
        self.assertNotIn("lost", self.cluster.meetings)

    def test_calls_that_do_not_exist_yet_go_to_who_has_the_meeting_or_recording(self):
        self.fakes[1].put("room")
        record_id = self.fakes[2].record("lecture", 5)
        for query, owner in (("meetingID=room", 1), (f"recordID={record_id}", 2), ("colour=red", 0)):
            answer = self.get("paintTheWalls", query)
            self.assertEqual((answer.status, answer.body), (404, b"<html>no such call</html>"))
            self.assertEqual(self.counts("paintTheWalls"), [int(number == owner) for number in range(3)])
            self.survey()

    def test_two_tinyscales_in_front_of_the_same_servers_agree(self):
        ports = [self.port]
        self.start()
        ports.append(self.port)
        for number in range(6):
            self.port = ports[number % 2]
            self.create(f"room{number}")
            self.port = ports[1 - number % 2]
            owner, = self.having(f"room{number}")
            location = self.get("join", f"meetingID=room{number}&fullName=X").headers["Location"]
            self.assertTrue(location.startswith(owner.url))
            self.assertEqual(self.create(f"room{number}").messageKey, "duplicateWarning")
        self.get("end", "meetingID=room5")              # through one of them; the other one believes its memory
        self.port = ports[1]
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room5").messageKey, "notFound")


class CreateTest(ClusterTest):
    limits = SHORT

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

    def test_a_create_waits_for_the_placing_of_the_same_meeting_only(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["create"] = held(gate, arrived)
        first = background(self.create, "room")
        arrived.wait(5)
        second = background(self.create, "room")
        self.assertEqual(self.create("another").returncode, "SUCCESS")
        self.assertEqual(self.counts("create"), [1, 1, 0])
        gate.set()
        self.assertEqual((first.result(5).messageKey, second.result(5).messageKey), ("", "duplicateWarning"))
        self.assertEqual(self.counts("create"), [2, 1, 0])

    def test_a_survey_during_a_create_does_not_forget_where_it_is_being_carried_out(self):
        self.create("room")
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].meetings.clear()              # it is over, and begins anew
        self.fakes[0].faults["create"] = held(gate, arrived)
        first = background(self.create, "room")
        arrived.wait(5)
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
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=0.05, WORK_TIMEOUT=5):
            headers = {"Content-Type": "text/xml"}
            calls = [background(self.create, "room"), background(
                lambda: self.get("insertDocument", "meetingID=room", method="POST", body=b"<x/>", headers=headers))]
            self.assertTrue(until(lambda: self.fakes[0].count("create", "insertDocument") == 2))
            self.assertEqual(self.get("sendChatMessage", "meetingID=room").messageKey, "serverUnavailable")
            gate.set()
            self.assertEqual([call.result(5).returncode for call in calls], ["SUCCESS"] * 2)

    def test_passwords_are_bbbs_business(self):
        first = self.create("room", "&attendeePW=ap&moderatorPW=mp")
        self.assertEqual((first.attendeePW, first.moderatorPW, first.messageKey), ("ap", "mp", ""))
        self.assertEqual(self.create("room", "&attendeePW=ap&moderatorPW=mp").messageKey, "duplicateWarning")
        self.assertEqual(self.create("room", "&attendeePW=other").messageKey, "idNotUnique")
        self.assertEqual(self.create("x").messageKey, "validationError")
        self.assertNotIn("x", self.cluster.meetings)

    def test_a_meeting_on_a_cordoned_server_stays_there_and_starts_elsewhere_when_it_is_over(self):
        self.create("room")
        entries = self.entries()
        entries[0]["cordoned"] = True
        self.load(entries)
        self.assertEqual((self.create("room").messageKey, self.having("room")), ("duplicateWarning", [self.fakes[0]]))
        self.fakes[0].meetings.clear()
        self.assertEqual((self.create("room").returncode, self.having("room")), ("SUCCESS", [self.fakes[1]]))
        self.assertEqual(self.create("other").returncode, "SUCCESS")
        self.assertEqual(self.having("other"), [self.fakes[2]])

    def test_a_server_that_cannot_be_reached_or_refuses_leaves_its_turn_to_the_next(self):
        for fault in (None, status(502), status(503), status(301, Location="https://elsewhere.example.org"),
                      lambda handler: failed("checksumError")):
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

    def test_after_silence_a_504_or_a_500_a_create_is_never_tried_elsewhere(self):
        for number, (fault, messageKey) in enumerate(((silent, "serverUnavailable"), (reset, "serverUnavailable"),
                                                      (sends(b"rubbish\r\n"), "serverUnavailable"),
                                                      (status(504), "serverUnavailable"), (status(500), None))):
            with self.subTest(fault):
                self.start()
                fake = self.fakes[0]
                fake.faults["create"] = fault
                answer = self.create(f"room{number}")
                self.assertEqual(answer.status, 500 if messageKey is None else 200)
                if messageKey:
                    self.assertEqual(answer.messageKey, messageKey)
                self.assertEqual(self.counts("create"), [1, 0, 0])
                fake.faults.clear()
                fake.calls.clear()
                if messageKey:              # the server is down; the next survey shows that it has no such meeting
                    self.assertEqual(self.create(f"room{number}").messageKey, "serverUnavailable")
                    self.assertTrue(until(lambda: not len(self.cluster.creating)))      # the thread may linger
                    self.survey()
                self.assertEqual(self.create(f"room{number}").returncode, "SUCCESS")
                self.assertEqual(self.having(f"room{number}"), [self.fakes[1 if messageKey else 0]])

    def test_a_create_that_was_carried_out_without_an_answer_is_found_by_the_next(self):
        def carried_out_then_silent(handler):
            proper(handler)
            return silent(handler)
        self.fakes[0].faults["create"] = carried_out_then_silent
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[0].faults.clear()
        self.survey()
        self.assertEqual((self.create("room").messageKey, self.having("room")), ("duplicateWarning", [self.fakes[0]]))

    def test_the_lock_of_a_failed_create_is_released(self):
        for fake in self.fakes:
            fake.down()
        for _ in range(3):
            self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.fakes[1].up()
        self.survey()
        self.assertEqual((self.create("room").returncode, self.having("room")), ("SUCCESS", [self.fakes[1]]))
        self.assertTrue(until(lambda: not len(self.cluster.creating)))

    def test_slides_are_sent_again_to_the_next_server(self):
        slides = b'<modules><module name="presentation"/></modules>'
        self.fakes[0].faults["create"] = status(502)
        answer = self.create("room", method="POST", body=slides, headers={"Content-Type": "application/xml"})
        self.assertEqual(answer.returncode, "SUCCESS")
        self.assertEqual(self.fakes[1].calls[-1][2:], ("POST", slides, "application/xml"))

    def test_breakout_rooms_follow_their_parent_to_a_cordoned_server_but_not_away_from_a_lost_one(self):
        self.create("parent")
        parent, = self.having("parent")
        self.load([dict(entry, cordoned=entry["host"].startswith(parent.url)) for entry in self.entries()])
        breakout = "&isBreakout=true&parentMeetingID=parent"
        self.create("breakout1", breakout)
        self.assertEqual(self.having("breakout1"), [parent])
        parent.faults["create"] = status(502)
        for number in (2, 3):                           # the call finds out; then it is known
            self.assertEqual(self.create(f"breakout{number}", breakout).messageKey, "serverUnavailable")
        self.assertEqual(self.counts("create")[1:], [0, 0])


class RacesTest(ClusterTest):
    def test_200_creates_of_one_meeting_at_once_end_on_one_server(self):
        answers = self.together([lambda: self.create("room", "&attendeePW=ap&moderatorPW=mp")] * 200)
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
        self.assertEqual((self.having("room"), self.counts("create")[1:]), ([self.fakes[0]], [0, 0]))
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
            self.assertIn(self.get("end", f"meetingID=room{number}").messageKey, ("notFound", "sentEndMeetingRequest"))

        def reload():
            self.load([dict(entry, weight=weight) for entry, weight in zip(self.entries(), weights)])
            weights.append(weights.pop(0))
        weights = [1, 2, 3]
        jobs = [lambda number=number, job=job: job(number) for number in range(3) for job in (create, create, end)]
        loops = [background(loop, job) for job in [*jobs, reload, lambda: self.cluster.survey(3)]]
        until(lambda: sum(fake.count("create") for fake in self.fakes) > 200, 0.7)
        stop.set()
        self.assertEqual([loop.result(20) for loop in loops], [None] * len(loops))      # none broke off
        self.assertEqual(mistakes, [])
        for number in range(3):
            self.assertEqual(self.create(f"room{number}").returncode, "SUCCESS")
            self.assertEqual(len(self.having(f"room{number}")), 1)


# ---- outages ---------------------------------------------------------------------------------------------------------

class OutageTest(ClusterTest):
    limits = SHORT

    def ways_to_fail(self):
        """Each way in which the first server can fail, and how it comes back."""
        fake = self.fakes[0]
        yield "refused", fake.down, fake.up
        yield "SYN swallowed", fake.swallow, fake.up
        for name, fault in (
                ("silent", silent), ("reset", reset), ("nothing", sends(b"")),
                ("500", status(500)), ("502", status(502)), ("503", status(503)), ("504", status(504)),
                ("a page", status(200)), ("malformed", status(200, "<response><ret", "text/xml")),
                ("rubbish", sends(b"\x16\x03\x01 no HTTP at all\r\n\r\n")),
                ("cut short", sends(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n<response>")),
                ("wrong secret", lambda handler: failed("checksumError")),
                ("redirect", status(302, Location="https://elsewhere.example.org/")),
                ("switching", sends(b"HTTP/1.1 101 Switching\r\n\r\n"))):
            yield name, lambda fault=fault: fake.faults.update({"*": fault}), fake.faults.clear

    def test_an_outage_is_held_out_and_over_when_the_server_answers_again(self):
        for name, fail, mend in self.ways_to_fail():
            with self.subTest(name):
                self.start()
                lost, healthy = f"lost {name}", f"healthy {name}"
                self.fakes[0].put(lost)
                self.fakes[1].put(healthy)
                self.survey()
                fail()
                # the first call fails and marks the server down (a survey does, if it might be the meeting's fault);
                # its meeting is held, everything else goes on
                query = f"meetingID={quote_plus(lost)}"
                self.assertEqual(self.get("getMeetingInfo", query).messageKey, "serverUnavailable")
                if name in ("500", "a page", "malformed"):
                    self.assertIsNone(self.cluster.servers[0].down_since)
                    self.survey()
                self.assertIsNotNone(self.cluster.servers[0].down_since)
                for call in ("getMeetingInfo", "isMeetingRunning", "end", "create"):
                    self.assertEqual(self.get(call, query).messageKey, "serverUnavailable")
                query = f"meetingID={quote_plus(healthy)}"
                self.assertEqual(self.get("getMeetingInfo", query).returncode, "SUCCESS")
                for number in range(4):
                    self.assertEqual(self.create(f"new {name} {number}").returncode, "SUCCESS")
                self.assertEqual(len(self.fakes[0].meetings), 1)
                self.assertEqual(len(self.get("getMeetings").xml.findall("meetings/meeting")), 5)
                self.survey()
                self.assertEqual(self.create(lost).messageKey, "serverUnavailable")
                # it comes back within one survey, with its meeting
                mend()
                self.survey()
                self.assertIsNone(self.cluster.servers[0].down_since)
                self.assertEqual(self.create(lost).messageKey, "duplicateWarning")
                for fake in self.fakes:
                    fake.meetings.clear()

    def test_a_server_that_fails_from_the_start_is_left_out_until_it_answers(self):
        for name, fail, mend in self.ways_to_fail():
            with self.subTest(name):
                fail()
                self.start()
                self.create_rooms(4)
                self.assertEqual([len(fake.meetings) for fake in self.fakes], [0, 2, 2])
                mend()
                self.survey()
                self.create_rooms(3, "again")
                self.assertTrue(self.fakes[0].meetings)
                for fake in self.fakes:
                    fake.meetings.clear()

    def test_a_tls_handshake_that_never_ends_is_an_outage(self):
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(50)
            self.write_servers([{"host": f"https://127.0.0.1:{mute.getsockname()[1]}", "secret": "s"}, *self.entries()])
            self.start()
            self.assertIn("is down: no connection: ", self.log.getvalue())
            self.create_rooms(3)

    def test_a_browser_that_joins_gets_a_page_that_tries_again_and_a_program_xml(self):
        self.create("room")
        self.having("room")[0].down()
        self.get("getMeetingInfo", "meetingID=room")
        answer = self.get("join", "meetingID=room&fullName=X", headers=BROWSER)
        self.assertEqual((answer.status, answer.headers["Retry-After"]), (503, "5"))
        self.assertEqual(answer.headers["Refresh"], "5")
        self.assertNotIn(b"://", answer.body)
        german, english = b"<h1>Einen Moment bitte</h1>", b"<h1>One moment, please</h1>"
        for languages, title in (("de-DE,de;q=0.9,en;q=0.8", german), ("fr,de;q=0.5", german),
                                 ("en-US,en;q=0.9,de;q=0.8", english), ("sv", english)):
            headers = {**BROWSER, "Accept-Language": languages}
            self.assertIn(title, self.get("join", "meetingID=room&fullName=X", headers=headers).body)
        self.assertEqual(self.get("join", "meetingID=room&fullName=X").messageKey, "serverUnavailable")

    def test_the_meetings_of_a_server_that_is_down_are_placed_anew_after_a_while(self):
        self.create("room")
        lost, = self.having("room")
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
        self.survey()
        self.assertIs(self.cluster.find("room")[0], self.cluster.servers[1])
        self.assertIn("'room' runs on", self.log.getvalue())

    def test_a_failed_survey_forgets_no_meeting(self):
        self.create("room")
        owner, = self.having("room")
        owner.down()
        for _ in range(5):
            self.survey()
            self.clock.ahead += tinyscale.HOLD
        owner.up()
        self.survey()
        self.assertEqual(self.cluster.find("room")[1], "remembered")

    def test_a_server_that_is_silent_to_a_probe_gets_no_new_meetings(self):
        self.fakes[0].faults["*"] = silent
        self.create_rooms(4)
        self.assertEqual((self.fakes[0].count("create"), self.fakes[0].count("getMeetingInfo")), (0, 1))
        self.assertIn("is down: no answer in 0.15 s", self.log.getvalue())

    def test_an_outage_that_goes_on_is_told_once_and_so_is_its_end(self):
        self.fakes[0].down()
        for _ in range(3):
            self.survey()
        self.fakes[0].up()
        for _ in range(3):
            self.survey()
        for news, count in (("is down: ", 1), ("is up\n", 2)):              # as it was at the start
            self.assertEqual(self.log.getvalue().count(f"{self.fakes[0].url} {news}"), count)

    def test_one_slow_call_is_no_outage(self):
        self.create("room")
        owner, gate, arrived = self.having("room")[0], threading.Event(), threading.Event()
        owner.faults["sendChatMessage"] = held(gate, arrived)
        slow = background(self.get, "sendChatMessage", "meetingID=room&message=x")
        arrived.wait(5)
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        self.assertEqual(slow.result(5).messageKey, "serverUnavailable")
        self.assertIn(f"{owner.url} failed at sendChatMessage: no answer in 0.3 s", self.log.getvalue())
        gate.set()
        self.assertIsNone(self.cluster.servers[0].down_since)

    def test_when_all_servers_are_down_each_call_says_so_until_they_are_back(self):
        self.create("room")
        for fake in self.fakes:
            fake.down()
        self.survey()
        for call in (*CALLS_OF_BBB, "somethingElse"):
            for query in ("meetingID=unknown", "recordID=unknown", ""):
                self.assertEqual(self.get(call, query).messageKey, "serverUnavailable", (call, query))
        self.assertEqual(self.get("join", "meetingID=unknown", headers=BROWSER).status, 503)
        self.assertEqual(self.http("/health").status, 503)
        for fake in self.fakes:
            fake.up()
        self.survey()
        self.assertEqual((self.http("/health").status, self.create("room").messageKey), (200, "duplicateWarning"))

    def test_a_survey_asked_before_a_failure_does_not_mark_the_server_up(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].faults["getMeetings"] = held(gate, arrived)
        survey = background(self.cluster.survey, 3)
        arrived.wait(5)
        self.fakes[0].faults["getMeetingInfo"] = status(503)
        self.get("getMeetingInfo", "meetingID=room")
        gate.set()
        survey.result(5)
        self.assertIsNotNone(self.cluster.servers[0].down_since)
        self.survey()
        self.assertIsNone(self.cluster.servers[0].down_since)

    def test_only_reads_use_kept_connections_and_only_they_are_repeated(self):
        self.create("room")
        owner, = self.having("room")
        self.survey()
        for connection in list(owner.sockets):
            connection.shutdown(socket.SHUT_RDWR)               # closed while idle: the next read notices
        for _ in range(5):
            self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        self.assertEqual((owner.count("getMeetingInfo"), len(owner.sockets)), (5, 1))
        for call in ("sendChatMessage", "end", "create"):
            owner.faults[call] = sends(b"")                     # it takes the call and hangs up
            self.get("getMeetingInfo", "meetingID=room")        # leaves a connection
            self.get(call, "meetingID=room")
            self.assertEqual(owner.count(call), 1)
            self.survey()

    def test_calls_for_other_servers_are_as_fast_as_ever_while_one_hangs(self):
        self.fakes[0].put("hung")
        self.fakes[1].put("healthy")
        self.survey()
        self.fakes[0].faults["*"] = silent
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=10):
            waiting = [background(self.get, "getMeetingInfo", "meetingID=hung") for _ in range(40)]
            self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo") == 40))
            done = [self.get("getMeetingInfo", "meetingID=healthy").returncode for _ in range(20)]
            self.assertEqual((done, any(call.done() for call in waiting)), (["SUCCESS"] * 20, False))
            self.fakes[0].down()
            self.assertEqual({call.result(5).messageKey for call in waiting}, {"serverUnavailable"})

    def test_a_server_that_does_not_answer_a_probe_has_not_denied_the_meeting(self):
        for fault, down in ((silent, True), (status(502), True), (status(500), False)):
            with self.subTest(fault):
                self.start()
                self.create("room")
                owner, = self.having("room")
                owner.faults["getMeetingInfo"] = fault
                # nobody has joined yet, so this is asked once more
                self.assertEqual(self.get("isMeetingRunning", "meetingID=room").running, "false")
                self.assertEqual(self.create("room").messageKey, "serverUnavailable" if down else "duplicateWarning")
                self.assertEqual(self.having("room"), [owner])
                owner.faults.clear()
                owner.meetings.clear()

    def test_a_cordoned_server_that_does_not_answer_a_probe_keeps_its_meeting(self):
        self.create("room")
        first, *others = self.entries()
        self.load([{**first, "cordoned": True}, *others])
        for fault in (status(500), silent, status(502)):
            self.fakes[0].faults["getMeetingInfo"] = fault
            self.assertEqual(self.create("room").messageKey, "duplicateWarning")
            self.assertEqual(self.having("room"), [self.fakes[0]])
            self.survey()

    def test_servers_that_fail_for_unknown_meetings_still_get_new_ones(self):
        for fake in self.fakes:
            fake.faults["getMeetingInfo"] = status(500)
        self.create_rooms(3)
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [1, 1, 1])
        self.assertEqual(self.http("/health").status, 200)

    def test_an_answer_in_drops_has_a_deadline(self):
        def drops(before, drop):
            def fault(handler):
                handler.close_connection = True
                handler.wfile.write(before)
                with contextlib.suppress(OSError):
                    while not handler.bbb.released.wait(0.05):
                        handler.wfile.write(drop)
            return fault
        head = b"HTTP/1.1 200 OK\r\n"
        for before, drop in (
                (head + b"Content-Length: 1000\r\n\r\n", b"x"), (head + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
                (head + b"X: ", b"x"), (b"HTTP/1.1 1", b"0"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n")):
            with self.subTest(drop):
                self.fakes[0].put("room")
                self.survey()
                self.fakes[0].faults["getMeetingInfo"] = drops(before, drop)
                client = background(self.get, "getMeetingInfo", "meetingID=room")
                self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo")))
                for _ in range(2):                          # it may begin once more if the connection had been kept
                    self.clock.ahead += 2
                    self.survey()                           # cuts off what is overdue
                    futures.wait([client], 1)
                self.assertEqual(client.result(1).messageKey, "serverUnavailable")
                self.assertEqual(tinyscale.KeepAliveHandler.deadlines, {})
                self.fakes[0].up()
                self.fakes[0].faults.clear()
                self.survey()

    def test_a_connection_with_more_to_come_is_not_kept(self):
        for number in range(2):
            self.fakes[0].put(f"room{number}")
        self.survey()
        hint = sends(b"HTTP/1.1 103 Early Hints\r\n\r\n", then_close=False)
        self.fakes[0].faults["getMeetingInfo"] = lambda handler: hint(handler) or proper(handler)
        self.assertEqual(self.get("getMeetingInfo", "meetingID=room0").messageKey, "serverUnavailable")
        self.fakes[0].faults.clear()
        self.survey()
        for number in (1, 0, 1):
            self.assertEqual(self.get("getMeetingInfo", f"meetingID=room{number}").meetingID, f"room{number}")

    def test_a_message_of_a_server_cannot_forge_lines_of_the_log(self):
        self.fakes[0].faults["getMeetings"] = lambda handler: failed("x\nforged line" + "y" * 500)
        self.survey()
        self.assertIn("is down: getMeetings: 'x", self.log.getvalue())
        self.assertNotIn("\nforged", self.log.getvalue())
        self.assertNotIn("yyyy" * 50, self.log.getvalue())

    def test_one_refused_call_is_no_outage(self):
        self.create("room")
        for fake in self.fakes:
            fake.faults["getRecordings"], fake.refuses_bodies = status(414), True
        self.assertEqual(self.get("getRecordings", "recordID=" + "x" * 5000).status, 414)
        answer = self.get("insertDocument", "meetingID=room", method="POST", body=b"<" + b"x" * 5 * 2**20,
                          headers={"Content-Type": "text/xml"})
        self.assertEqual(answer.status, 413)
        self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)

    def test_over_https_too_one_refused_body_is_no_outage_and_reads_share_a_connection(self):
        path, self.fakes[0].tls = certified(os.path.dirname(self.path))
        with mock.patch.object(tinyscale.KeepAliveHandler, "trust", ssl.create_default_context(cafile=path)):
            self.write_servers()
            self.start()
        self.fakes[0].put("room")
        self.survey()
        before = set(self.fakes[0].sockets)
        for _ in range(5):
            self.assertEqual(self.get("getMeetingInfo", "meetingID=room").returncode, "SUCCESS")
        self.assertEqual(self.fakes[0].sockets, before)
        self.fakes[0].refuses_bodies = True
        for _ in range(5):
            answer = self.get("insertDocument", "meetingID=room", method="POST", body=b"<" + b"x" * 5 * 2**20,
                              headers={"Content-Type": "text/xml"})
            self.assertEqual((answer.status, self.cluster.servers[0].down_since), (413, None))

    def test_a_call_that_changes_something_is_not_repeated_at_another_server_after_silence(self):
        for fault in (silent, reset, status(504)):
            with self.subTest(fault):
                self.fakes[0].faults["paintTheWalls"] = fault
                self.assertEqual(self.get("paintTheWalls").messageKey, "serverUnavailable")
                self.assertEqual(self.counts("paintTheWalls"), [1, 0, 0])
                self.survey()
        self.fakes[0].faults["paintTheWalls"] = status(502)         # it has not even begun
        self.assertEqual((self.get("paintTheWalls").status, self.counts("paintTheWalls")), (404, [1, 1, 0]))
        self.survey()
        self.fakes[0].faults["getMeetingInfo"] = silent             # which may be repeated
        self.assertEqual(self.get("getMeetingInfo", "meetingID=").messageKey, "missingParamMeetingID")

    def test_a_body_that_bbb_refuses_as_a_wrong_checksum_takes_no_server_down(self):
        for fake in self.fakes:
            fake.faults["create"] = lambda handler: failed("checksumError")     # parameters in the URL and in the body
        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        answer = self.create("room", method="POST", body=b"--B--", headers=headers)
        self.assertEqual(answer.messageKey, "serverUnavailable")
        self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)

    def test_a_create_that_is_answered_with_an_early_hint_is_not_tried_elsewhere(self):
        hint = sends(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        self.fakes[0].faults["create"] = lambda handler: (hint(handler), proper(handler))[1]
        self.assertEqual(self.create("room").messageKey, "serverUnavailable")
        self.assertEqual((self.counts("create"), self.having("room")), ([1, 0, 0], [self.fakes[0]]))

    def test_what_a_survey_finds_during_a_probe_counts(self):
        self.fakes[0].put("room")
        self.fakes[0].faults["*"] = status(502)
        self.start()
        self.cluster.turn = 1                       # the next new meeting is for another server
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[1].faults["getMeetingInfo"] = held(gate, arrived)
        with mock.patch.multiple(tinyscale, PATIENCE=5):
            create = background(self.create, "room")
            arrived.wait(5)
            self.fakes[0].faults.clear()
            self.survey()                           # shows that it is up, and has the meeting
            gate.set()
            self.assertEqual(create.result(5).messageKey, "duplicateWarning")
        self.assertEqual(self.having("room"), [self.fakes[0]])

    def test_a_probe_that_had_to_wait_does_not_ask_who_went_down_meanwhile(self):
        with mock.patch.multiple(tinyscale, MAX_PROBES=2):
            self.start()
        self.fakes[1].faults["*"] = silent
        answers = self.together([lambda number=number: self.create(f"room{number}") for number in range(8)])
        self.assertEqual({answer.returncode for answer in answers}, {"SUCCESS"})
        self.assertEqual(self.fakes[1].count("getMeetingInfo"), 2)

    def test_a_meeting_whose_server_is_slow_for_long_stays_there(self):
        """It answers some calls, so it is up; but no survey, so memory is stale, and no probe."""
        for other_calls_are_answered in (True, False):
            with self.subTest(other_calls_are_answered=other_calls_are_answered):
                self.fakes[0].put("room")
                self.survey()
                self.fakes[0].faults["getMeetingInfo"] = silent
                self.clock.ahead += tinyscale.MEETING_TTL + 1
                probe = background(self.cluster.find, "room")
                self.assertTrue(until(lambda: self.fakes[0].count("getMeetingInfo")))
                if other_calls_are_answered:
                    self.cluster.servers[0].call(tinyscale.Request("hooks/list"))
                self.assertEqual(probe.result(5), (self.cluster.servers[0], "remembered"))
                self.assertEqual(self.cluster.servers[0].down_since is None, other_calls_are_answered)
                self.create("room")
                self.assertEqual(self.having("room"), [self.fakes[0]])
                self.fakes[0].faults.clear()
                self.survey()

    def test_slow_lists_hold_up_neither_surveys_nor_new_meetings(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=3):
            for fake in self.fakes:
                fake.faults["getRecordings"] = held(gate)
            lists = [background(self.get, "getRecordings") for _ in range(40)]
            self.assertTrue(until(lambda: self.fakes[0].count("getRecordings") == 40))
            self.assertEqual((self.create("room").returncode, self.http("/health").status), ("SUCCESS", 200))
            self.survey()
            self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)
            gate.set()
            self.assertEqual({answer.result(5).returncode for answer in lists}, {"SUCCESS"})

    def test_a_connection_is_kept_for_a_while_only(self):
        self.fakes[0].put("room")
        self.survey()
        before = set(self.fakes[0].sockets)
        self.get("getMeetingInfo", "meetingID=room")
        self.assertEqual(self.fakes[0].sockets, before)
        self.clock.ahead += tinyscale.POOL_TIMEOUT + 1
        self.survey()
        self.assertTrue(until(lambda: not self.fakes[0].sockets & before))

    def test_proxies_of_the_environment_are_ignored(self):
        with mock.patch.dict(os.environ, http_proxy="http://127.0.0.1:9", no_proxy=""):
            self.start()
            self.create_rooms(3)


# ---- lists, recordings, hooks ----------------------------------------------------------------------------------------

EMPTY = "{}<messageKey>{}</messageKey><message>{}</message>"
SHAPES = {      # call -> the path of an item, the empty answer
    "getMeetings": ("meetings/meeting", EMPTY.format(
        "<meetings/>", "noMeetings", "no meetings were found on this server")),
    "getSessions": ("sessions/meeting", EMPTY.format(
        "<sessions/>", "noSessions", "no sessions were found on this serverr")),
    "getRecordings": ("recordings/recording", EMPTY.format(
        "<recordings></recordings>", "noRecordings", "There are no recordings for the meeting(s)."))}
SUCCESS = "<response><returncode>SUCCESS</returncode>"


class ListsTest(ClusterTest):
    limits = SHORT

    def listed(self):
        """The IDs of the meetings in the list."""
        items = self.get("getMeetings").xml.findall("meetings/meeting")
        return sorted(item.findtext("meetingID") for item in items)

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
                self.assertEqual((len(answer.xml.findall(path)), [child.tag for child in answer.xml]),
                                 (3, ["returncode", path.split("/")[0]]))
                self.assertEqual(self.counts(call), [1, 1, 1])
                self.survey()
        self.assertEqual({item.findtext("meetingID") for item in self.get("getMeetings").xml.iter("meeting")},
                         {f"r\u00f6\u00f6m & {number}" for number in range(3)})

    def test_items_keep_their_elements_when_they_are_written_again(self):
        names = ["<![CDATA[</meeting> <meeting> & \u00e4]]>", "a&#x26;b<!-- <meeting> -->", "plain\x08"]
        items = [f"<meeting>\r\n<meetingName>{name}</meetingName><meetingID>room{number}</meetingID>"
                 "<metadata><meeting>x</meeting></metadata></meeting>\n" for number, name in enumerate(names)]
        for fake, item in zip(self.fakes, items):
            fake.faults["getMeetings"] = status(
                200, f"<?xml version='1.0'?>\n{SUCCESS}<meetings>{item}</meetings></response>", "text/xml")
        listed = self.get("getMeetings").xml.findall("meetings/meeting")
        self.assertEqual([item.findtext("meetingName") for item in listed],
                         ["</meeting> <meeting> & \u00e4", "a&b", "plain "])
        self.assertEqual([item.findtext("metadata/meeting") for item in listed], ["x"] * 3)
        self.fakes[0].faults["getMeetings"] = self.fakes[1].faults["getMeetings"]       # twins: each is shown once
        self.assertEqual(self.listed(), ["room1", "room2"])

    def test_no_name_that_people_type_hides_a_meeting_or_takes_a_server_down(self):
        """BBB makes names of elements of the names of a join's userdata-... and a create's meta_..., unfiltered."""
        names = ("1", "lms:role", "a b", 'a b="c"', "", "/", "?", "!", "<", ">", "&", "a&b;", "]]>", "<!--", "-->",
                 "<b", "a><b", "x/", "/x", "=", '"', "\u00e4", "\x01", "\ufffe", "meeting", "meetingID", "xmlns:x",
                 "</customdata>", "</attendee>", "b></customdata><b", "a><", "?xml version='2'?", "!DOCTYPE x")
        for fake in self.fakes:
            fake.put("before at " + fake.name)
            fake.put("odd room at " + fake.name)
            fake.put("zebra at " + fake.name)
        self.survey()
        expected = self.listed()
        self.assertEqual(len(expected), 9)
        for name in names:
            with self.subTest(name):
                data = f"<attendee><customdata><{name}>value</{name}></customdata></attendee>"
                for fake in self.fakes:
                    fake.meetings["odd room at " + fake.name].custom = data
                self.clock.ahead += tinyscale.MEETING_TTL + 1       # what memory knows comes from the next survey alone
                self.survey()
                self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)
                self.assertEqual(self.listed(), expected)           # by a parser that forgives nothing
                for meeting_id in expected:
                    self.assertEqual(self.cluster.find(meeting_id)[1], "remembered")
                again = self.get("create", f"meetingID={quote_plus('odd room at bbb1')}")
                self.assertEqual(again.messageKey, "duplicateWarning")
        self.assertEqual([len(fake.meetings) for fake in self.fakes], [3] * 3)

    def test_a_list_that_had_to_be_mended_counts_only_for_what_it_says(self):
        self.fakes[0].put("first room")
        self.fakes[0].put("second room")
        self.survey()
        self.fakes[0].meetings["first room"].custom = "</attendees></meeting></meetings><x><"       # hides what follows
        self.survey()
        self.assertEqual(self.cluster.find("second room")[1], "remembered")

    def test_a_clients_own_odd_call_is_no_outage(self):
        self.fakes[0].put("room")
        self.survey()
        for fault in (status(200, "{}", "application/json"), status(500), status(404)):
            for fake in self.fakes:
                fake.faults["getMeetings"] = fault
            self.get("getMeetings", "format=json")
            self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)

    def test_a_tag_that_is_none_misleads_nobody(self):
        meeting = "<meeting><meetingID>%s</meetingID></meeting>"
        for fake, answer in zip(self.fakes, (
                SUCCESS.replace("><", "><!--<meetings>--><", 1) + f"<meetings>{meeting % 0}</meetings></response>",
                SUCCESS + f"<meetings>{meeting % 1}</meetings><x><![CDATA[</meetings>]]></x></response>",
                SUCCESS + f"<meetings >{meeting % 2}</meetings ><!-- <meetings> </meetings> --></response>")):
            fake.faults["getMeetings"] = status(200, answer, "text/xml")
        self.assertEqual(self.listed(), ["0", "1", "2"])

    def test_what_could_mean_something_else_elsewhere_is_left_out(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        others, item = ["at bbb1", "at bbb3"], "<meeting><meetingID>%s</meetingID></meeting></meetings></response>"
        for text, expected in (
                (f'<?xml version="1.0" encoding="ISO-8859-1"?>{SUCCESS}<meetings>' + item % "\u00e4",
                 [*others, "\ufffd"]),
                (f'<!DOCTYPE response [<!ENTITY x "y">]>{SUCCESS}<meetings>' + item % "&x;", others),
                (f"{SUCCESS}<meetings a='b'>" + item % "c", [*others, "c"])):
            self.fakes[1].faults["getMeetings"] = status(200, text.encode("latin-1"), "text/xml")
            self.assertEqual(self.listed(), expected, text)
            self.fakes[1].faults.clear()
            self.survey()

    def test_one_bad_server_never_spoils_meetings_and_sessions(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        deep = f"{SUCCESS}<meetings>{'<a>' * 20000}{'</a>' * 20000}</meetings></response>"
        texts = ("", "<response><meet", "\u00e4".encode("latin-1"), "<meetings/>", deep, f"{SUCCESS}</response>",
                 '<?xml version="1.0" encoding="klingon"?><response/>')
        for fault in (silent, reset, status(500), status(502), status(404), lambda handler: failed("apiNotEnabled"),
                      lambda handler: failed("checksumError"), *(status(200, text, "text/xml") for text in texts)):
            for call in ("getMeetings", "getSessions"):
                with self.subTest((call, fault)):
                    self.fakes[1].faults[call] = fault
                    answer = self.get(call)
                    self.assertEqual((answer.returncode, len(answer.xml.findall(SHAPES[call][0]))), ("SUCCESS", 2))
                    self.fakes[1].faults.clear()
                    self.survey()

    def test_if_all_servers_refuse_the_answer_is_bbbs_own(self):
        for fake in self.fakes:
            fake.faults["*"] = lambda handler: failed("apiNotEnabled")
        for call in ("getMeetings", "getSessions", "getRecordings", "deleteRecordings"):
            self.assertEqual(self.get(call, "recordID=x").messageKey, "apiNotEnabled", call)

    def test_entity_bombs_and_endless_answers_are_refused(self):
        entities = "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdef", "bcdefg"))
        bomb = f'<!DOCTYPE x [<!ENTITY a "{"a" * 10000}">{entities}]><response>&g;</response>'
        self.fakes[1].put("room")
        self.survey()
        many_headers = b"".join(b"X-%d: y\r\n" % number for number in range(200))
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%s\r\n" + b"x" * 200000
        raw = (b"\r\n" + b"x" * 200000, b"Content-Length: 1000000000\r\n\r\n" + b"x" * 200000,
               chunked % b"30d40", chunked % b"-5", chunked % b"-1", many_headers + b"\r\n", b"X: " + b"y" * 70000)
        with mock.patch.multiple(tinyscale, MAX_ANSWER=100000):
            for fault in (status(200, bomb, "text/xml"), status(200, "x" * 200000),
                          *(sends(b"HTTP/1.1 200 OK\r\n" + rest) for rest in raw)):
                self.fakes[1].faults["getMeetingInfo"] = fault
                self.assertEqual(self.get("getMeetingInfo", "meetingID=room").messageKey, "serverUnavailable")
                self.fakes[1].faults.clear()
                self.survey()

    def test_a_list_of_meetings_does_not_wait_for_a_slow_server(self):
        for fake in self.fakes:
            fake.put("at " + fake.name)
        self.survey()
        with mock.patch.multiple(tinyscale, ANSWER_TIMEOUT=3):
            for call in ("getMeetings", "getSessions"):
                self.fakes[1].faults[call] = silent
                self.assertEqual(len(self.get(call).xml.findall(SHAPES[call][0])), 2)
                self.assertIsNone(self.cluster.servers[1].down_since)       # it still has time to answer

    def test_a_character_in_a_name_that_xml_forbids_hides_nothing(self):
        for character in "\x00\x08\x1f\ufffe\uffff":
            with self.subTest(character):
                self.fakes[0].put("room").name = f"a{character}b"
                self.survey()
                self.assertEqual(self.get("getMeetings").xml.findtext("meetings/meeting/meetingName"), "a b")
                self.assertEqual(self.get("getMeetingInfo", "meetingID=room").meetingName, "a b")
                self.assertEqual(self.cluster.find("room")[1], "remembered")
                self.assertIsNone(self.cluster.servers[0].down_since)


class RecordingsTest(ClusterTest):
    limits = SHORT

    def setUp(self):
        super().setUp()
        self.ids = [fake.record(f"lecture{number}", 1000 + number) for number, fake in enumerate(self.fakes)]

    def listed(self, query=""):
        return [item.findtext("recordID") for item in self.get("getRecordings", query).xml.iter("recording")]

    def test_the_newest_come_first_and_each_once(self):
        self.fakes[0].record("", 1002, copy_of=self.ids[2])
        self.assertEqual(self.listed(), self.ids[::-1])

    def test_each_way_to_select_recordings_selects_on_all_servers(self):
        self.fakes[2].recordings[self.ids[2]]["state"] = "unpublished"
        self.fakes[1].recordings[self.ids[1]]["meta"]["course"] = "7"
        for query, expected in (
                (f"recordID={self.ids[0]}", [0]), (f"recordID={self.ids[0]},{self.ids[2]},", [2, 0]),
                (f"recordID={self.ids[0]}%2C{self.ids[1]}", [1, 0]), ("recordID=no", []),
                ("recordID=" + ",".join(["x" * 54] * 99 + [self.ids[1]]), [1]),
                ("meetingID=lecture1", [1]), ("meetingID=lecture1,lecture0,,", [1, 0]), ("meta_course=7", [1]),
                ("meetingID=&recordID=", [2, 1, 0]), ("state=published", [1, 0]), ("state=unpublished", [2])):
            self.assertEqual(self.listed(query), [self.ids[number] for number in expected], query[:99])

    def test_pages_are_cut_from_the_merged_list(self):
        for number in range(150):
            self.fakes[number % 3].record(f"more{number}", 2000 + number)
        every = self.listed()
        self.assertEqual(len(every), 153)
        for query, first, last, limit in (
                ("offset=0&limit=10", 0, 10, 10), ("offset=10&limit=5", 10, 15, 5), ("limit=3", 0, 3, 3),
                ("offset=150&limit=100", 150, 153, 100), ("offset=-4&limit=0", 0, 1, 1), ("offset=x&limit=-7", 0, 1, 1),
                ("offset=1&limit=1000", 1, 101, 100), ("offset=200&limit=2", 200, 200, 2)):
            with self.subTest(query):
                self.assertEqual(self.listed(query), every[first:last])
                pagination = self.get("getRecordings", query).xml[-1]
                self.assertEqual({child.tag: child.text for child in pagination.iter() if child.text}, {
                    "offset": str(first), "limit": str(limit), "paged": "true", "unpaged": "false",
                    "totalElements": "153", "empty": str(first == last).lower()})
                self.assertIsNotNone(pagination.find("pageable/offset"))
        for limit in ("", "ten", "1.5"):
            self.assertEqual(self.listed(f"limit={limit}&offset=2"), every)
            self.assertIsNone(self.get("getRecordings", f"limit={limit}").xml.find("pagination"))

    def test_a_list_that_lacks_a_server_is_no_success(self):
        for fault in (silent, reset, status(500), status(502), status(200, "<response><rec", "text/xml"),
                      lambda handler: failed("apiNotEnabled")):
            self.fakes[1].faults["getRecordings"] = fault
            for query in ("", "meetingID=lecture0", "recordID=no", f"recordID={self.ids[0]},{self.ids[1]}",
                          f"recordID={self.ids[0][:20]}"):
                with self.subTest((query, fault)):
                    self.assertEqual(self.get("getRecordings", query).messageKey, "serverUnavailable")
            answer = self.get("getRecordings", f"recordID={self.ids[0]},{self.ids[2]},")    # the others have them
            self.assertEqual((answer.returncode, answer.messageKey), ("SUCCESS", None))
            self.fakes[1].faults.clear()
            self.survey()

    def test_a_server_that_lists_recordings_only_in_pages_is_not_taken_for_an_empty_one(self):
        self.fakes[1].refuses_all_recordings = True
        self.assertEqual(self.get("getRecordings", "limit=10").messageKey, "serverUnavailable")
        self.fakes[0].refuses_all_recordings = self.fakes[2].refuses_all_recordings = True
        self.assertEqual(self.get("getRecordings", "limit=10").messageKey, "serverUnavailable")
        self.assertEqual(self.get("getRecordings").messageKey, "noRecordings")
        self.assertEqual(self.listed("meetingID=lecture1"), self.ids[1:2])

    def test_changes_reach_the_servers_that_have_the_recordings(self):
        first, second, third = self.ids
        for call, extra, element in (("publishRecordings", "&publish=false", "published"),
                                     ("updateRecordings", "&meta_x=y", "updated"), ("deleteRecordings", "", "deleted")):
            for wanted, owners in (([first], [1, 0, 0]), ([first, second], [1, 1, 0]),
                                   ([third, "unknown", second], [0, 1, 1])):
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

    def test_a_change_of_what_is_found_nowhere_is_refused_while_a_server_is_down(self):
        self.fakes[1].down()
        self.survey()
        for call in ("publishRecordings", "deleteRecordings", "updateRecordings"):
            for ids in ([self.ids[1]], [self.ids[0], self.ids[1]], ["unknown"]):
                answer = self.get(call, f"recordID={','.join(ids)}&publish=false")
                self.assertEqual((answer.messageKey, self.counts(call)), ("serverUnavailable", [0, 0, 0]))
        answer = self.get("deleteRecordings", f"recordID={self.ids[0]},{self.ids[2]}")
        self.assertEqual((answer.deleted, self.counts("deleteRecordings")), ("true", [1, 0, 1]))

    def test_text_tracks_are_json_and_reach_the_one_owner_once(self):
        query, content_type = f"recordID={self.ids[1]}&kind=subtitles&lang=de-DE", "multipart/form-data; boundary=B"
        body = b"--B\r\nContent-Disposition: form-data; name=file; filename=a.vtt\r\n\r\nWEBVTT\xff\r\n--B--\r\n"
        put = self.get("putRecordingTextTrack", query, method="POST", body=body, headers={"Content-Type": content_type})
        self.assertEqual(json.loads(put.body)["response"]["messageKey"], "upload_text_track_success")
        self.assertEqual(self.counts("putRecordingTextTrack"), [0, 1, 0])
        self.assertEqual(self.fakes[1].calls[-1][2:], ("POST", body, content_type))
        got = self.get("getRecordingTextTracks", f"recordID={self.ids[1]}")
        self.assertEqual((got.headers["Content-Type"], json.loads(got.body)["response"]["tracks"]),
                         ("application/json;charset=utf-8", [{"kind": "subtitles", "lang": "de-DE"}]))
        missing = json.loads(self.get("getRecordingTextTracks", "recordID=no").body)["response"]
        self.assertEqual(missing["messageKey"], "noCaptionsFound")
        self.fakes[1].down()
        self.survey()
        gone = self.get("getRecordingTextTracks", f"recordID={self.ids[1]}")
        self.assertEqual(gone.messageKey, "serverUnavailable")

    def test_recordings_in_any_state_are_found_to_be_changed(self):
        record_id = self.fakes[2].record("lecture", 5, state="processing")
        for call in ("deleteRecordings", "publishRecordings"):
            self.assertEqual(self.get(call, f"recordID={record_id}&publish=true").returncode, "SUCCESS")
            self.assertEqual(self.counts(call), [0, 0, 1])

    def test_record_ids_are_decoded_twice_as_bbb_does(self):
        self.fakes[1].down()
        self.survey()
        answer = self.get("getRecordings", f"recordID={self.ids[0]}%252C{self.ids[2]}")
        self.assertEqual((answer.returncode, len(answer.xml.findall("recordings/recording"))), ("SUCCESS", 2))


class HooksTest(ClusterTest):
    URL = "callbackURL=https%3A%2F%2Fmoodle.example.org%2Fhook%3Fa%3D1"

    def test_a_hook_on_all_servers_is_one_hook_for_the_caller(self):
        for without_hooks in (None, 0, 1):
            with self.subTest(without_hooks=without_hooks):
                for number, fake in enumerate(self.fakes):
                    fake.has_hooks = number != without_hooks
                first, again = self.get("hooks/create", self.URL), self.get("hooks/create", self.URL)
                self.assertEqual((first.messageKey, again.messageKey), (None, "duplicateWarning"))
                self.assertTrue(first.hookID and first.hookID == again.hookID)
                self.get("hooks/create", "callbackURL=https%3A%2F%2Fother.example.org")
                hooks = self.get("hooks/list").xml.findall("hooks/hook")
                self.assertEqual([hook.findtext("callbackURL") for hook in hooks],
                                 ["https://moodle.example.org/hook?a=1", "https://other.example.org"])
                self.assertEqual(hooks[0].findtext("hookID"), first.hookID)
                self.assertEqual(self.get("hooks/destroy", f"hookID={first.hookID}").removed, "true")
                self.assertIn(f"hooks/destroy '' {3 - (without_hooks is not None)} of 3 servers success",
                              self.log.getvalue())
                self.assertEqual(self.get("hooks/destroy", f"hookID={first.hookID}").messageKey, "destroyMissingHook")
                self.assertEqual(self.get("hooks/destroy", f"hookID={hooks[1].findtext('hookID')}").removed, "true")
                self.assertEqual([fake.hooks for fake in self.fakes], [{}, {}, {}])
                self.assertEqual(self.get("hooks/list").body.decode(), f"{SUCCESS}<hooks></hooks></response>")
        self.assertEqual(self.get("hooks/destroy").messageKey, "destroyMissingHook")
        self.assertEqual(self.get("hooks/create", "").messageKey, "missingParamCallbackURL")

    def test_webhooks_that_are_missing_or_refuse_are_no_outage_of_the_server(self):
        self.fakes[0].has_hooks = False
        self.fakes[1].faults["hooks/create"] = lambda handler: failed("checksumError")
        self.assertEqual(self.get("hooks/create", self.URL).returncode, "SUCCESS")
        self.assertEqual([server.down_since for server in self.cluster.servers], [None] * 3)


# ---- what clients send, and what they get ----------------------------------------------------------------------------

class BodiesTest(ClusterTest):
    SLIDES = ('<?xml version="1.0" encoding="UTF-8"?>\n'
              '<modules><module name="presentation">\u00e4</module></modules>\r\n').encode()

    def post(self, call, query, body, content_type, **kwargs):
        return self.get(call, query, method="POST", body=body, headers={"Content-Type": content_type}, **kwargs)

    def test_xml_passes_byte_for_byte_with_a_bare_content_type(self):
        for content_type in ("application/xml", "text/xml; charset=UTF-8", "Application/XML;charset=utf-8",
                             "application/x-www-form-urlencoded"):
            for body in (self.SLIDES, b"\xef\xbb\xbf \n" + self.SLIDES):
                answer = self.post("create", "name=x&meetingID=room", body, content_type)
                self.assertEqual(answer.returncode, "SUCCESS")
                owner, = self.having("room")
                self.assertEqual(owner.calls[-1][2:], ("POST", body, "application/xml"))
        answer = self.post("insertDocument", "meetingID=room", self.SLIDES, "application/xml")
        self.assertEqual(answer.returncode, "SUCCESS")

    def form(self, call, text, over, **kwargs):
        checksum = hashlib.sha256((call + over + SECRET).encode()).hexdigest()
        return self.http(f"/bigbluebutton/api/{call}", "POST", f"{text}&checksum={checksum}".encode(),
                         {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8", **kwargs})

    def test_a_form_counts_as_the_query_and_goes_on_in_the_url(self):
        text = "name=A+b&meetingID=room&moderatorPW=m%26p&attendeePW=ap"
        for over in (text, ""):
            self.assertEqual(self.form("create", text, over).returncode, "SUCCESS")
            owner, = self.having("room")
            self.assertEqual(owner.calls[-1][1:4], (signed("create", text, owner.secret, "sha256"), "GET", b""))
        self.assertEqual(self.form("create", text, "something else").messageKey, "checksumError")
        self.assertEqual(self.form("end", "meetingID=room&password=m%26p", "").messageKey, "sentEndMeetingRequest")
        self.assertEqual(self.form("getMeetings", "a=b", "a=b").returncode, "SUCCESS")

    def test_parameters_in_both_places_and_other_types_are_refused(self):
        query = "name=x&meetingID=room"
        form = "application/x-www-form-urlencoded"
        self.assertEqual(self.post("create", query, b"attendeePW=ap", form).messageKey, "checksumError")
        self.assertEqual(self.post("create", "", query.encode(), form).messageKey, "checksumError")
        mixed = self.http(f"/bigbluebutton/api/create?{query}", "POST", signed("create", query), {"Content-Type": form})
        self.assertEqual(mixed.messageKey, "checksumError")
        for content_type in ("application/json", "text/plain", ""):
            self.assertEqual(self.post("create", query, b"{}", content_type).messageKey, "unsupportedContentType")
        self.assertEqual(self.counts("create"), [0, 0, 0])
        for bad in (" ", "#", "\u00e4", "\r\nA: b"):
            text = f"name=x{bad}&meetingID=room"
            self.assertEqual(self.form("create", text, text).status, 400)

    def test_an_empty_body_is_none_whatever_its_type(self):
        self.create("room")
        for content_type in ("application/json", "application/xml", "application/x-www-form-urlencoded"):
            self.assertEqual(self.post("getMeetingInfo", "meetingID=room", b"", content_type).meetingID, "room")

    def test_20_megabytes_of_slides_arrive_whole(self):
        slides = b"<modules>" + b"A" * 20 * 2**20 + b"</modules>"
        self.assertEqual(self.post("create", "name=x&meetingID=room", slides, "application/xml").returncode, "SUCCESS")
        self.assertTrue(self.having("room")[0].calls[-1][3] == slides)

    def test_what_is_too_large_is_refused_and_the_client_sees_why(self):
        with mock.patch.multiple(tinyscale, MAX_BODY=1000, MAX_HEAD=500):
            answer = self.post("create", "meetingID=room", b"<" + b"x" * 10**6, "application/xml")
            self.assertEqual((answer.status, answer.messageKey), (413, "requestTooLarge"))
            self.assertEqual(answer.headers["Connection"], "close")
            self.assertEqual(self.form("create", "meetingID=room&name=" + "x" * 600, "").status, 413)
            self.assertEqual(self.http("/health", headers={"X": "y" * 600}).status, 431)
        self.assertEqual(self.counts("create"), [0, 0, 0])

    def test_who_does_not_know_the_secret_cannot_make_us_read_a_body(self):
        with mock.patch.object(tinyscale.Handler, "body", side_effect=AssertionError("it was read")):
            answer = self.post("create", "meetingID=room", self.SLIDES, "application/xml", secret="wrong")
        self.assertEqual(answer.messageKey, "checksumError")

    def test_who_expects_a_100_continue_gets_it_before_the_body(self):
        head = (f"POST /bigbluebutton/api/create?{signed('create', 'name=x&meetingID=room')} HTTP/1.1\r\n"
                "Expect: 100-continue\r\nContent-Type: text/xml\r\nContent-Length: 4\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(head.encode())
            self.assertEqual(connection.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(b"<x/>")
            self.assertIn(b"<returncode>SUCCESS", b"".join(iter(lambda: connection.recv(10000), b"")))

    def test_what_a_server_says_arrives_unchanged(self):
        self.fakes[0].put("room")
        self.survey()
        for code, body, content_type in (
                (200, f"{SUCCESS}<x>\u00e4&#9;</x>\r\n</response>", "text/xml"), (200, "<x/>", ""),
                (200, '{"response": 1}', "application/json"), (404, "<html>", "text/html;charset=utf-8"),
                (500, "oops", "text/plain"), (201, "", "text/xml")):
            self.fakes[0].faults["newCall"] = status(code, body, content_type, X_Other="no", Set_Cookie="a=b; Path=/")
            answer = self.get("newCall", "meetingID=room", headers={"Accept": "application/json"})
            self.assertEqual((answer.status, answer.body, answer.headers["Content-Type"], answer.headers["Set-Cookie"]),
                             (code, body.encode(), content_type or None, "a=b; Path=/"))
            self.assertIsNone(answer.headers["X-Other"])
            self.assertNotIn("", answer.headers.values())

    def test_an_answer_may_come_in_chunks_or_end_with_its_connection(self):
        self.fakes[0].put("room")
        self.survey()
        answer = (SUCCESS + "<running>true</running></response>").encode()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (answer[:10], answer[10:], b""))
        for head, body in ((b"Transfer-Encoding: chunked", chunks), (b"Connection: close", answer)):
            self.fakes[0].faults["isMeetingRunning"] = sends(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (head, body))
            self.assertEqual(self.get("isMeetingRunning", "meetingID=room").body, answer)

    def test_redirects_of_a_server_are_not_passed_on_and_never_followed(self):
        self.fakes[0].put("room")
        self.survey()
        for code in (301, 302, 303, 307, 308):
            self.fakes[0].faults["end"] = status(code, Location=self.fakes[1].url + "/bigbluebutton/api/end")
            self.assertEqual(self.get("end", "meetingID=room").messageKey, "serverUnavailable")
            self.assertIn(f"is down: HTTP {code} without an answer", self.log.getvalue())
            self.survey()
        self.assertEqual(self.counts("end"), [0, 0, 0])

    def test_each_cookie_of_a_server_is_passed_on(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].faults["join"] = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: a=1\r\n"
                                             b"Set-Cookie: b=2\r\n\r\n")
        answer = self.get("join", "meetingID=room&redirect=false")
        self.assertEqual(answer.headers.get_all("Set-Cookie"), ["a=1", "b=2"])


class ClientHabitsTest(ClusterTest):
    """Each test is what one front end is known to do."""

    def test_moodle_sends_an_ampersand_first_and_follows_no_redirects(self):
        self.fakes[1].put("room")
        value = hashlib.sha256(f"getMeetings{SECRET}".encode()).hexdigest()
        self.assertEqual(self.http(f"/bigbluebutton/api/getMeetings?&checksum={value}").returncode, "SUCCESS")
        ids = [self.fakes[number % 3].record(f"lecture{number}", number) for number in range(25)]
        answer = self.get("getRecordings", f"recordID={','.join(ids)},&state=any")
        self.assertEqual((answer.status, len(answer.xml.findall("recordings/recording"))), (200, 25))
        self.assertEqual(len(self.get("getRecordings", "meetingID=none").xml.findall("recordings")), 1)

    def test_nextcloud_signs_the_root_with_an_empty_secret(self):
        for path in ("/bigbluebutton/api/", "/bigbluebutton/api", "/bigbluebutton/"):
            answer = self.http(f"{path}?checksum={hashlib.sha1(b'').hexdigest()}")
            self.assertEqual((answer.status, answer.returncode, answer.version), (200, "SUCCESS", "2.0"))

    def test_greenlight_repeats_a_create_without_passwords_and_asks_for_meeting_0(self):
        first, again = self.create("room"), self.create("room")
        self.assertEqual((again.messageKey, again.internalMeetingID), ("duplicateWarning", first.internalMeetingID))
        self.assertEqual(self.get("isMeetingRunning", "meetingID=0").running, "false")

    def test_mattermost_sends_empty_parameters(self):
        self.create("room", "&parentMeetingID=&logoutURL=&redirect=")
        answer = self.get("join", "fullName=X&meetingID=room&redirect=&password=")
        self.assertEqual(answer.status, 302)

    def test_bbb_exporter_sends_the_checksum_first(self):
        value = hashlib.sha1(f"getRecordingsstate=published{SECRET}".encode()).hexdigest()
        answer = self.http(f"/bigbluebutton/api/getRecordings?checksum={value}&state=published")
        self.assertEqual(answer.returncode, "SUCCESS")

    def test_the_php_library_signs_with_sha256_and_labels_its_posts_as_forms(self):
        answer = self.get("create", "name=x&meetingID=room", digest="sha256", method="POST", body=BodiesTest.SLIDES,
                          headers={"Content-Type": "application/x-www-form-urlencoded", "Expect": "100-continue"})
        self.assertEqual(answer.returncode, "SUCCESS")

    def test_a_java_client_wants_exactly_200(self):
        for call in ("getMeetingInfo", "end", "isMeetingRunning", "getRecordings"):
            self.assertEqual(self.get(call, "meetingID=no").status, 200)

    def test_a_front_end_with_a_secret_of_its_own_is_let_in(self):
        self.assertEqual(self.get("getMeetings", secret="another-secret").returncode, "SUCCESS")
        self.assertEqual(self.get("getMeetings", secret="wrong").messageKey, "checksumError")


# ---- watching --------------------------------------------------------------------------------------------------------

class WatchingTest(ClusterTest):
    settings = (("TINYSCALE_STATUS_PASSWORD", "s3same"),)

    def login(self, password="s3same", user="admin"):
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}

    def test_only_the_password_opens_status_and_metrics(self):
        for path in ("/status", "/metrics"):
            for headers in ({}, self.login("wrong"), self.login(""), self.login(user="root"),
                            {"Authorization": "Basic x"}, {"Authorization": "Basic \xff"},
                            {"Authorization": self.login()["Authorization"][6:]}):
                answer = self.http(path, headers=headers)
                self.assertEqual((answer.status, answer.headers["WWW-Authenticate"][:6]), (401, "Basic "))
            self.assertEqual(self.http(path, headers=self.login()).status, 200)
        self.assertEqual(self.http("/health").status, 200)
        self.settings = (("TINYSCALE_STATUS_PASSWORD", " "),)
        self.load()
        for password in ("", " "):
            self.assertEqual(self.http("/status", headers=self.login(password)).status, 404)

    def test_the_status_page_shows_servers_and_meetings_and_loads_nothing(self):
        markup = "<script>alert('&')</script>"
        self.fakes[0].put(markup, people=3)
        self.fakes[0].put("zoo")
        self.fakes[1].put("room", people=7)
        self.load([dict(entry, cordoned=number == 1) for number, entry in enumerate(self.entries())])
        self.fakes[2].down()
        self.survey()
        self.create("new")
        self.clock.ahead += 120
        answer = self.http("/status", headers=self.login())
        page = answer.body.decode()
        self.assertEqual((answer.headers["Content-Type"], answer.headers["Refresh"], answer.headers["Cache-Control"]),
                         ("text/html;charset=utf-8", "10", "no-store"))
        policy = re.fullmatch("default-src 'none'; style-src '(sha256-.*)'", answer.headers["Content-Security-Policy"])
        style = re.search("<style>(.*)</style>", page, re.DOTALL)
        self.assertEqual(policy[1], "sha256-" + base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode())
        self.assertIn("<h1>2 of 3 servers up, 4 meetings</h1>", page)
        self.assertNotIn("<script", page)
        for wrong in (" style=", "src=", "href=", "@import", "url("):
            self.assertNotIn(wrong, page)
        servers, _, meetings = page.partition("<h2>")
        first, second, third = re.findall("<tr.*?(?=<tr|$)", servers, re.DOTALL)
        self.assertIn(f'<tr class="up"><th>{self.fakes[0].url}<td>up<td>2 meetings<meter max="2" value="2"></meter>'
                      '<td>4 people<meter max="7" value="4"></meter>', first)
        self.assertTrue(first.endswith(" ms<td>1 placed"), first)
        self.assertIn('class="cordoned"><th>' + self.fakes[1].url + "<td>cordoned<td>1 meetings", second)
        self.assertIn(f'class="down"><th>{self.fakes[2].url}<td>down for 2 min: no connection: ', third)
        self.assertIn(f"<tr><th>{html.escape(markup)}<td>{self.fakes[0].url}<td>3 people", meetings)
        self.assertEqual(re.findall("<th>([a-z]+)<", meetings), ["new", "room", "zoo"])

    def test_metrics_count_calls_by_outcome_and_describe_each_family(self):
        self.fakes[0].put("room", people=5)
        self.survey()
        self.fakes[2].down()
        for query in ("meetingID=room", "meetingID=room", "meetingID=none"):
            self.get("getMeetingInfo", query)
        self.get("create", "meetingID=room", "wrong secret")
        self.get("paintTheWalls", "")
        self.get("join", "meetingID=room&fullName=X")
        self.create("another")
        text = self.http("/metrics", headers=self.login()).body.decode()
        values = dict(re.findall("^(tinyscale[^ ]*) ([-+.e0-9]+)$", text, re.MULTILINE))
        for call, outcome, count in (
                ("getMeetingInfo", "success", 2), ("getMeetingInfo", "failed", 1), ("create", "checksumError", 1),
                ("create", "success", 1), ("join", "success", 1), ("other", "failed", 1)):
            labels = f'{{call="{call}",outcome="{outcome}"}}'
            self.assertEqual(values["tinyscale_call_seconds_count" + labels], str(count), labels)
            self.assertGreater(float(values["tinyscale_call_seconds_sum" + labels]), 0)
        for name, number, value in (("up", 0, "1"), ("up", 2, "0"), ("meetings", 0, "1"), ("participants", 0, "5")):
            self.assertEqual(values[f'tinyscale_server_{name}{{server="{self.fakes[number].url}"}}'], value, name)
        families = re.findall("^# TYPE ([a-z_]+) (?:gauge|counter|summary)$", text, re.MULTILINE)
        self.assertEqual(families, re.findall("^# HELP ([a-z_]+) [A-Z].*[.]$", text, re.MULTILINE))
        self.assertTrue(all(any(name.startswith(family) for family in families) for name in values))
        self.assertNotIn("room", text)

    def test_health_tells_whether_a_new_meeting_could_be_placed(self):
        self.assertEqual((self.http("/health").status, self.http("/health", "HEAD").body), (200, b""))
        self.load([dict(entry, cordoned=True) for entry in self.entries()])
        self.assertEqual(self.http("/health").status, 503)


# ---- HTTP ------------------------------------------------------------------------------------------------------------

class HttpTest(ClusterTest):
    servers = 1
    PATH = "/bigbluebutton/api/getMeetings?" + signed("getMeetings", "")


    def test_a_hostile_request_is_refused_and_nothing_that_follows_it_is_taken_for_a_call(self):
        path, smuggled = self.PATH.encode(), b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n"
        get, post = b"GET " + path + b" HTTP/1.1\r\n", b"POST " + path + b" HTTP/1.1\r\nContent-Type: text/xml\r\n"
        table = [           # a request, the status of its answer
            (post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
            (post + b"Transfer-Encoding: chunked\r\n\r\n5\r\n<xml>\r\n0\r\n\r\n", 411),
            (post + b"Transfer-Encoding: identity\r\n\r\n", 411),
            (post + b"transfer-encoding:\tchunked\r\nContent-Length: 0\r\n\r\n", 411),
            (post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n<xml>", 411),
            (post + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 411),
            (post + b"Content-Length: -1\r\n\r\n", 411), (post + b"Content-Length: +5\r\n\r\n<xml>", 411),
            (post + b"Content-Length: 1_0\r\n\r\n<xml></xml", 411), (post + b"Content-Length: 5, 5\r\n\r\n<xml>", 411),
            (post + b"Content-Length: 0x5\r\n\r\n<xml>", 411), (post + b"Content-Length: \xb2\r\n\r\n<x", 411),
            (post + b"Content-Length:\r\n\r\n", 411), (post + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 411),
            (post + b"Content-Length: 5\r\n 6\r\n\r\n<xml>", 400),
            (post + b"Content-Length: 999999999999\r\n\r\n", 413),
            (get + b"X: a\r\r\nContent-Length: 44\r\n\r\n", 400),
            (get + b"X: a\rTransfer-Encoding: chunked\r\n\r\n", 400),
            (get + b"X: \0\r\n\r\n", 400), (get + (b"A: " + b"b" * 8000 + b"\r\n") * 9 + b"\r\n", 431),
            (post + b"no colon\r\nContent-Length: 5\r\n\r\n<xml>", 400),
            (post + b"Content-Length : 5\r\n\r\n<xml>", 400),
            (post + b": no name\r\n\r\n", 400), (get + b" continued: 5\r\n\r\n", 400),
            (get + b"A: b\r\n" * 101 + b"\r\n", 431), (get + b"A: " + b"b" * 70000 + b"\r\n\r\n", 431),
            (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 431),
            (b"GET  " + path + b" HTTP/1.1\r\n\r\n", 400), (b"GET\t" + path + b" HTTP/1.1\r\n\r\n", 400),
            (b" GET " + path + b" HTTP/1.1\r\n\r\n", 400), (b"GET " + path + b"\r\n\r\n", 400), (b"GET\r\n\r\n", 400),
            (b"\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400), (b"\x00\r\n\r\n", 400),
            (b"get " + path + b" HTTP/1.1\r\n\r\n", 400), (b"GET " + path + b" HTTP/2.0\r\n\r\n", 400),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400), (b"GET " + path + b" HTTP/1.1 x\r\n\r\n", 400),
            (b"GET " + path + b" ICY/1.1\r\n\r\n", 400), (b"GET " + path + b" HTTP/1.11111111\r\n\r\n", 400),
            (b"DELETE " + path + b" HTTP/1.1\r\n\r\n", 400), (b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 400)]
        for bad in (b"\x00", b"\r", b"x\rX: y", b"\x0b", b"\x1f", b"\x7f", b"\x85", b"\xa0", b"\xff", b"\xc3\xa4",
                    b"x y", b"#b"):
            table += [(b"GET /bigbluebutton/api/%sgetMeetings HTTP/1.1\r\n\r\n" % bad, 400),
                      (b"GET /bigbluebutton/api/getMeetings?a=%s HTTP/1.1\r\n\r\n" % bad, 400)]
        for data, expected in table:
            with self.subTest(data[:120]):
                self.clear_log()
                answer = self.talk(data + smuggled)
                self.assertEqual(re.findall(rb"HTTP/1\.1 (\d{3}) ", answer), [b"%d" % expected], answer)
                self.assertFalse(answer.endswith(b"..."))
                head, _, body = answer.partition(b"\r\n\r\n")
                self.assertIn(b"Content-Type: text/xml;charset=utf-8", head)
                self.assertEqual(ET.fromstring(body).findtext("returncode"), "FAILED")
                self.assertTrue(until(lambda: self.log.getvalue().count("\n") == 1), self.log.getvalue())
        self.assertEqual(self.fakes[0].calls, [])

    def test_paths_that_are_none_of_ours_are_not_found(self):
        beneath = ("../api/getMeetings", "%2e%2e/x", "create/", "/create", "getMeetings1", "get%4Deetings", "a;b")
        for path in ("/", "*", "/health/", "/status", "/metrics", "http://127.0.0.1", "/BigBlueButton/api/",
                     "//bigbluebutton/api/", "/bigbluebutton", "/bigbluebutton/x",
                     *(f"/bigbluebutton/api/{path}" for path in beneath)):
            received = self.talk(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            self.assertTrue(received.startswith(b"HTTP/1.1 404 "), path)
            self.assertIn(b"<messageKey>notFound", received)

    def test_each_refusal_has_a_line_of_its_own(self):
        for path in ("/", "/", "/bigbluebutton/api/getMeetings", "/" + "x" * 70000, "/"):
            self.clear_log()
            self.talk(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            self.assertTrue(until(lambda: "\n" in self.log.getvalue()))
            self.assertRegex(self.log.getvalue(), r"^(-|getMeetings) '' 127\.0\.0\.1 "
                             r"(notFound 404|checksumError 200|badRequest 431) \d{1,4} ms\n$")

    def test_no_head_takes_long_to_refuse(self):
        for head in (b"GET http://" + b"a" * 65000 + b" HTTP/2.0\r\n\r\n", b"GET http://" + b"a." * 32000 + b"\r\n\r\n",
                     b"GET /" + b"http://" * 9000 + b" HTTP/1.2\r\n\r\n",
                     b"GET / HTTP/1.1\r\n" + b"a:" * 32000 + b"\0\r\n\r\n"):
            started = time.monotonic()
            self.assertIn(b" 400 ", self.talk(head))
            self.assertLess(time.monotonic() - started, 5)          # it was 29 s, with all others waiting

    def test_a_stranger_cannot_fill_the_log(self):
        self.http("/bigbluebutton/api/" + "A" * 60000)
        self.assertTrue(until(lambda: "checksumError" in self.log.getvalue()))
        self.assertLess(len(self.log.getvalue()), 1000)

    def test_the_absolute_form_of_a_target_is_taken(self):
        for target in ("http://any.example.org" + self.PATH, "HTTPS://x:1" + self.PATH):
            received = self.talk(f"GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            self.assertEqual(b"SUCCESS" in received, target.startswith("http://"), received)

    def test_connections_stay_open_after_requests_without_a_body_only(self):
        get = f"GET {self.PATH} HTTP/1.1\r\n"
        for requests, count in ((f"{get}\r\n{get}\r\n{get}", 3), (f"{get}Content-Length: 0\r\n\r\n{get}", 2)):
            received = self.talk(f"{requests}Connection: close\r\n\r\n".encode())
            self.assertEqual(re.findall(rb"HTTP/1\.1 (\d{3}) ", received), [b"200"] * count)
            self.assertFalse(received.endswith(b"..."))
        for last in (f"GET {self.PATH} HTTP/1.0\r\n\r\n", f"GET {self.PATH} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
                     f"{get}Connection: close\r\n\r\n",
                     f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 4\r\n\r\n<x/>"):
            received = self.talk(f"{last}{get}\r\n".encode())
            self.assertEqual((received.count(b"HTTP/1.1 200"), received.count(b"Connection: close")), (1, 1))

    def test_a_request_may_come_byte_by_byte(self):
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            for byte in f"GET {self.PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n":
                connection.sendall(byte.encode())
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_head_is_answered_like_get_without_the_body(self):
        get, head = self.http(self.PATH), self.http(self.PATH, "HEAD")
        self.assertEqual((head.status, head.headers["Content-Length"], head.body), (200, str(len(get.body)), b""))
        self.assertEqual(self.fakes[0].calls[-1][2], "GET")

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
        self.assertIn(f"end 'room' {self.fakes[0].url} (remembered) success 200 ", self.log.getvalue())

    def test_a_body_that_is_cut_short_reaches_no_server(self):
        query, head = signed("create", "meetingID=room"), "Content-Type: text/xml\r\nContent-Length: 100\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(f"POST /bigbluebutton/api/create?{query} HTTP/1.1\r\n{head}<half".encode())
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(connection.recv(100), b"")
        self.assertTrue(until(lambda: "broke off: the body of its request was cut short" in self.log.getvalue()))
        self.assertEqual(self.fakes[0].calls, [])

    def test_clients_that_break_off_leave_one_line_and_no_traceback(self):
        post = f"POST {self.PATH} HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 100\r\n\r\nhalf"
        for data in (post, f"GET {self.PATH} HTTP/1.1\r\nX: ", f"GET {self.PATH} HTTP/1.1\r\nX: y\r\n"):
            self.clear_log()
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(data.encode())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.assertTrue(until(lambda: self.log.getvalue().count("\n") == 1), self.log.getvalue())
            self.assertIn("127.0.0.1 broke off", self.log.getvalue())
        self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_a_mistake_of_ours_is_answered_and_logged_without_its_text(self):
        with mock.patch.dict(tinyscale.CALLS, getMeetings=mock.Mock(side_effect=KeyError("a query"))):
            answer = self.http(self.PATH)
        self.assertEqual((answer.status, answer.messageKey), (500, "internalError"))
        self.assertIn("getMeetings failed with KeyError", self.log.getvalue())
        self.assertNotIn("a query", self.log.getvalue())

    def test_header_lines_of_a_server_cannot_smuggle_in_others(self):
        self.fakes[0].put("room")
        self.survey()
        self.fakes[0].faults["end"] = sends(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"
                                            b"Set-Cookie: a=b\r\n X-Evil: 1\r\nContent-Type: a\rB: c\r\n\r\n")
        answer = self.get("end", "meetingID=room")
        self.assertNotIn("X-Evil", answer.headers)
        self.assertNotIn("B", answer.headers)

    def test_a_crowd_at_one_moment_waits_to_be_accepted(self):
        self.balancer.shutdown()                        # nobody accepts now
        connections = [socket.create_connection(("127.0.0.1", self.port), 2) for _ in range(200)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual(len(connections), 200)

    def test_who_is_silent_for_long_is_disconnected(self):
        with mock.patch.object(tinyscale.Handler, "timeout", 0.1):
            for data, answers in ((b"", 0), (b"GET /health HTTP/1.1\r\n\r\n", 1), (b"GET /hea", 0)):
                received = self.talk(data)
                self.assertEqual((received.count(b"HTTP/1.1 200"), received[-3:] == b"..."), (answers, False), data)


CROWD = 20


class CrowdTest(ClusterTest):
    servers = 1
    limits = (("MAX_CONNECTIONS", CROWD), ("MAX_ASKED", 8), ("MAX_PROBES", 4))

    def open(self, count, data=b""):
        connections = [socket.create_connection(("127.0.0.1", self.port), 5) for _ in range(count)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.sendall(data)
        return connections

    def test_who_says_nothing_must_go_when_others_want_in(self):
        form = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 99\r\n\r\nx"
        for data in (b"", b"GET /bigbl", b"GET /health HTTP/1.1\r\nX-Slow: ",
                     b"POST /bigbluebutton/api/end HTTP/1.1\r\n" + form):
            mute = self.open(CROWD, data)
            self.assertTrue(until(lambda: len(self.balancer.handlers) == CROWD))
            self.clock.ahead += 2
            self.assertEqual(self.http("/health").status, 200)
            closed, _, _ = select.select(mute, [], [], 5)
            self.assertEqual({connection.recv(1000) for connection in closed}, {b""})
            for connection in mute:
                connection.close()
            self.assertTrue(until(lambda: not self.balancer.handlers))

    def test_who_does_not_take_its_answers_must_go_too(self):
        self.create("room")
        query = signed("join", "meetingID=room&fullName=" + "x" * 5000)
        greedy, setup = [], tinyscale.Handler.setup

        def setup_with_a_small_buffer(handler):
            handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            setup(handler)
        patch = mock.patch.object(tinyscale.Handler, "setup", setup_with_a_small_buffer)
        patch.start()
        self.addCleanup(patch.stop)
        for _ in range(CROWD):
            connection = socket.socket()
            self.addCleanup(connection.close)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self.port))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(f"GET /bigbluebutton/api/join?{query} HTTP/1.1\r\n\r\n".encode() * 20)
            greedy.append(connection)
        self.assertTrue(until(lambda: len(self.balancer.handlers) == CROWD))
        self.clock.ahead += 2
        self.assertEqual(self.http("/health").status, 200)

    def test_who_never_stops_asking_must_go_too(self):
        """And sooner than a newcomer that takes its time."""
        stop, asked = threading.Event(), []
        self.addCleanup(stop.set)

        def ask_on(connection):
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                    if not connection.recv(1000):
                        return
                    asked.append(connection)
        for connection in self.open(CROWD):
            background(ask_on, connection)
        self.assertTrue(until(lambda: len(self.balancer.handlers) == CROWD))
        self.clock.ahead += 2
        newcomer, = self.open(1)
        asked.clear()
        self.assertTrue(until(lambda: len(asked) > 3 * CROWD))
        self.assertEqual([self.http("/health").status for _ in range(5)], [200] * 5)
        newcomer.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        self.assertTrue(newcomer.recv(1000).startswith(b"HTTP/1.1 200 OK"))

    def test_who_is_being_answered_may_stay(self):
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["sendChatMessage"] = held(gate, arrived)
        query = signed("sendChatMessage", "meetingID=room")
        self.create("room")
        answered, = self.open(1, f"GET /bigbluebutton/api/sendChatMessage?{query} HTTP/1.1\r\n\r\n".encode())
        arrived.wait(5)
        self.open(CROWD - 1)
        self.clock.ahead += 0.5
        self.assertTrue(until(lambda: len(self.balancer.handlers) == CROWD))
        self.clock.ahead += 2
        gate.set()
        self.assertEqual(self.http("/health").status, 200)
        self.assertTrue(answered.recv(1000).startswith(b"HTTP/1.1 200 OK"))

    def test_nothing_is_left_behind(self):
        """After 10,000 calls and 1,000 broken connections: threads, sockets, locks, probes and memory."""
        def sockets():
            count = 0
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):          # closed meanwhile
                    count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            return count
        if not os.path.isdir("/proc/self/fd"):
            self.skipTest("counts sockets in /proc")
        self.create("room")
        self.survey()

        def calls(number, many=1250):
            some = (("isMeetingRunning", f"meetingID=no{number}"), ("getMeetings", ""), ("bad", "x"),
                    ("getMeetingInfo", "meetingID=room"), *[("join", "meetingID=room")] * 46)
            requests = "".join(f"GET /bigbluebutton/api/{call}?{signed(call, query)} HTTP/1.1\r\n\r\n"
                               for call, query in some).encode()
            with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                for _ in range(many // 50):
                    connection.sendall(requests)
                    received = b""
                    while received.count(b"HTTP/1.1 ") < 50:
                        received += connection.recv(65536)
        self.together([lambda number=number: calls(number, 100) for number in range(8)])
        before = threading.active_count(), sockets()
        self.together([lambda number=number: calls(number) for number in range(8)])
        for _ in range(1000):
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(b"GET /health HT")
        # pools may have filled; a leak would be thousands
        self.assertTrue(until(lambda: threading.active_count() <= before[0] + 60 and sockets() <= before[1] + 60),
                        (before, threading.active_count(), sockets()))
        self.survey()
        self.assertTrue(until(lambda: not self.balancer.handlers))
        self.clock.ahead += 2
        self.survey()
        self.assertEqual((len(self.cluster.creating), self.cluster.probes, set(self.cluster.meetings)),
                         (0, {}, {"room", self.fakes[0].meetings["room"].internal_id}))


class SecretsTest(ClusterTest):
    limits = SHORT

    def test_no_secret_checksum_password_or_name_reaches_the_log_or_an_answer(self):
        answers = []
        private = "&".join(f"{name}=PRIVATE" for name in (
            "name", "fullName", "attendeePW", "moderatorPW", "password", "userID"))
        for fault in (None, silent, reset, status(500), status(502), sends(b"GET rubbish PRIVATE\r\n\r\n"),
                      lambda handler: sends(handler.raw_requestline)(handler), lambda handler: failed("checksumError"),
                      status(301, Location="https://PRIVATE.example.org"),
                      sends(b"HTTP/1.1 200 PRIVATE\r\nPRIVATE\r\n")):
            for fake in self.fakes:
                fake.faults.clear()
                fake.put("room")
            self.survey()
            for fake in self.fakes:
                fake.faults.update({"*": fault} if fault else {})
            for call in ("create", "join", "getMeetingInfo", "end", "getMeetings", "getRecordings", "deleteRecordings",
                         "hooks/list", "newCall"):
                for query in ("meetingID=room", "recordID=a"):
                    answers += [self.get(call, f"{query}&{private}", secret) for secret in (SECRET, "wrong-secret")]
            for path in ("", "bigbluebutton/api?", "bigbluebutton/api/PRIVATE&", "bigbluebutton/api/x#"):
                answers.append(self.http(f"/{path}{private}"))
            answers.append(self.talk(f"GET /{private} \xff\r\n\r\n".encode("latin-1")))
            answers.append(self.talk(f"PRIVATE /{private} HTTP/1.1\r\n\r\n".encode()))
        log = self.log.getvalue()
        self.assertGreater(log.count("\n"), 200)
        told = b"".join(answer if isinstance(answer, bytes) else answer.body + str(answer.headers).encode()
                        for answer in answers if isinstance(answer, bytes) or answer.status != 302)
        for secret in [SECRET, "another-secret", "wrong-secret"] + [fake.secret for fake in self.fakes]:
            self.assertNotIn(secret, log)
            self.assertNotIn(secret.encode(), told)
        self.assertNotIn("PRIVATE", log)
        self.assertNotIn("checksum=", log)
        self.assertNotIn("Traceback", log)
        self.assertIsNone(re.search("[0-9a-f]{40}", log))
        self.assertNotIn(b"checksum=", told)


# ---- the process -----------------------------------------------------------------------------------------------------

class ProcessTest(unittest.TestCase):
    """tinyscale as an admin starts it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.fakes = folder.name, [FakeBBB("bbb1"), FakeBBB("bbb2")]
        for fake in self.fakes:
            self.addCleanup(fake.down)
        self.write_servers()

    def write_servers(self, text=None):
        with open(os.path.join(self.folder, "servers.json"), "w") as file:
            file.write(text or json.dumps([{"host": fake.url, "secret": fake.secret} for fake in self.fakes]))
        os.chmod(file.name, 0o600)

    def run_it(self, *arguments, launcher=(), program=(PROGRAM,), **env):
        environment = {"PATH": os.environ["PATH"], "HOME": self.folder, "TINYSCALE_SECRET": SECRET, "PORT": "0",
                       "PYTHONWARNINGS": "error", **env}
        process = subprocess.Popen(
            [*launcher, sys.executable, *program, *arguments], cwd=self.folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        if process.poll() is None:
            process.kill()
        process.communicate()

    def started(self, *arguments, **env):
        """A running tinyscale, and its port."""
        process = self.run_it(*arguments, **env)
        self.lines = []
        for line in process.stderr:
            self.lines.append(line)
            match = re.search(r"listens on port (\d+)", line)
            if match:
                return process, int(match[1])
        self.fail("".join(self.lines))

    def line(self, process, words):
        """The next line of its log that has these words."""
        return background(next, (line for line in process.stderr if words in line)).result(10)

    def get(self, port, call, query=""):
        return fetch(port, f"/bigbluebutton/api/{call}?{signed(call, query)}")

    def test_mistakes_end_in_one_line_and_status_2(self):
        mistakes = (({"TINYSCALE_SECRET": ""}, "TINYSCALE_SECRET"), ({"TINYSCALE_SECRET": " "}, "TINYSCALE_SECRET"),
                    ({"PORT": "x"}, "PORT x"), ({"PORT": "65536"}, "65536"), ({"PORT": "-1"}, "-1"),
                    ({"TINYSCALE_SERVERS": "none.json"}, "none.json"), ({"TINYSCALE_CERT": "no.pem"}, "no.pem"),
                    ({"TINYSCALE_KEY": "no.pem"}, "TINYSCALE_CERT"))
        processes = [self.run_it(**env) for env, _ in mistakes]
        for process, (env, words) in zip(processes, mistakes):
            with self.subTest(env):
                output, errors = process.communicate(timeout=20)
                self.assertEqual((process.returncode, output, errors.count("\n")), (2, "", 1), errors)
                self.assertTrue(errors.startswith("tinyscale: "), errors)
                self.assertIn(words, errors)

    def test_a_port_in_use_is_one_line_and_status_2(self):
        for bind in ("", "127.0.0.1", "::1"):
            with self.subTest(bind):
                _, port = self.started(TINYSCALE_BIND=bind)
                second = self.run_it("--port", str(port), TINYSCALE_BIND=bind)
                _, errors = second.communicate(timeout=20)
                self.assertEqual((second.returncode, errors.count("\n")), (2, 1), errors)
                self.assertIn(f"PORT {port}, ", errors)
                self.assertIn("in use", errors)

    def test_it_serves_ipv4_and_ipv6(self):
        _, port = self.started()
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as connection:
                connection.connect((address, port))
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                self.assertIn(b"200 OK", connection.recv(1000))

    def test_a_server_that_is_down_at_the_start_is_only_a_warning(self):
        self.fakes[1].down()
        _, port = self.started()
        self.assertIn(f"{self.fakes[1].url} is down", "".join(self.lines))
        self.assertIn("with 1 of 2 servers up", self.lines[-1])
        for number in range(3):
            self.assertEqual(self.get(port, "create", f"meetingID=room{number}").returncode, "SUCCESS")

    def test_after_kill_and_restart_each_meeting_is_still_on_its_server(self):
        process, port = self.started()
        for number in range(6):
            self.get(port, "create", f"meetingID=room{number}")
        process.kill()
        process.wait()
        _, port = self.started()
        for number in range(6):
            location = self.get(port, "join", f"meetingID=room{number}&fullName=X").headers["Location"]
            self.assertTrue(location.startswith(self.fakes[number % 2].url))
            self.assertEqual(self.get(port, "create", f"meetingID=room{number}").messageKey, "duplicateWarning")

    def test_sigterm_finishes_what_is_in_progress(self):
        self.ends_well(signal.SIGTERM)

    def test_ctrl_c_finishes_what_is_in_progress_too(self):
        self.ends_well(signal.SIGINT)

    def ends_well(self, number):
        process, port = self.started()
        gate, arrived = threading.Event(), threading.Event()
        self.fakes[0].faults["sendChatMessage"] = held(gate, arrived)
        self.fakes[0].put("room")
        idle = socket.create_connection(("127.0.0.1", port), 5)
        self.addCleanup(idle.close)
        slow = background(self.get, port, "sendChatMessage", "meetingID=room")
        arrived.wait(5)
        process.send_signal(number)

        def refused():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return False
            return True
        self.assertTrue(until(refused))
        process.send_signal(signal.SIGHUP)          # as a terminal that closes sends it
        self.assertIsNone(process.poll())
        gate.set()
        answer = slow.result(10)
        self.assertEqual((answer.returncode, answer.headers["Connection"]), ("SUCCESS", "close"))
        self.assertEqual(process.wait(10), 0)
        errors = process.stderr.read()
        self.assertTrue(errors.endswith("stopped\n"), errors)
        self.assertNotIn("Traceback", errors)

    def test_a_hung_server_does_not_hold_up_the_end(self):
        program = "import os, tinyscale; tinyscale.DRAIN_TIMEOUT = 0.2; os._exit(tinyscale.main())"
        process, port = self.started(program=["-c", program], PYTHONPATH=HERE)
        self.fakes[0].put("room")
        self.fakes[0].faults["end"] = silent
        hung = background(self.get, port, "end", "meetingID=room")
        self.assertTrue(until(lambda: self.fakes[0].count("end")))
        process.terminate()
        self.assertEqual(process.wait(5), 0)
        self.assertIn("stopped with calls in progress", process.stderr.read())
        self.assertIsInstance(hung.exception(5), OSError)

    def test_it_ends_as_pid_1_too(self):
        unshare = ["unshare", "--pid", "--fork"]
        with contextlib.suppress(OSError):
            if subprocess.call([*unshare, "true"], stderr=subprocess.DEVNULL) == 0:
                process, _ = self.started(launcher=unshare)
                with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                    os.kill(int(file.read()), signal.SIGTERM)
                self.assertEqual(process.wait(5), 0)
                return
        self.skipTest("needs the right to make a PID namespace")

    def test_sighup_reads_the_servers_again(self):
        process, port = self.started()
        for text, words in (("[{", "The settings stay as they were"), (None, "were read again: 2 servers")):
            self.write_servers(text)
            process.send_signal(signal.SIGHUP)
            self.assertIn(words, self.line(process, "settings"))
        process.send_signal(signal.SIGHUP)                          # though no file has changed
        self.assertIn("were read again: 2 servers", self.line(process, "settings"))
        self.assertEqual(self.get(port, "create", "meetingID=room").returncode, "SUCCESS")

    def test_check_tells_all_about_each_server(self):
        certificate, tls = certified(self.folder)
        secure = FakeBBB("bbb3", tls=tls)
        self.addCleanup(secure.down)
        secure.put("room", people=7)
        for number, digest in enumerate(("sha1", "sha512")):
            def accept_one(handler, digest=digest):
                given = dict(parse_qsl(handler.path.partition("?")[2]))["checksum"]
                return proper(handler) if DIGESTS[len(given)] == digest else failed("checksumError")
            self.fakes[number].faults["*"] = accept_one
        entries = [{"host": fake.url, "secret": fake.secret, "checksum": digest}
                   for fake, digest in zip([*self.fakes, secure], ("sha1", "sha512", "sha384"))]
        entries[0]["cordoned"] = True
        self.write_servers(json.dumps(entries))
        process = self.run_it("check", TINYSCALE_SECRET="", SSL_CERT_FILE=certificate, PYTHONWARNINGS="")
        output, errors = process.communicate(timeout=20)
        self.assertEqual((process.returncode, errors), (0, ""), output)
        *rows, last = output.splitlines()
        self.assertEqual(last, "All is well.")
        for row, fake, shown in zip(rows, [*self.fakes, secure], (
                r"cordoned +\d+ ms, BBB '3.0.4' +sha1 +certificate +-, 0 meetings, 0 people",
                r"up +\d+ ms, BBB '3.0.4' +sha512 +certificate +-, 0 meetings, 0 people",
                r"up +\d+ ms, BBB '3.0.4' +sha1 sha256 sha384 sha512 +certificate 3\d{4} d, 1 meetings, 7 people")):
            self.assertRegex(row, f"^{fake.url} +{shown}$")

    def test_check_fails_if_a_server_is_unusable_and_tells_a_wrong_secret_from_an_unreachable_server(self):
        self.fakes[0].secret = "another"
        self.fakes[1].down()
        process = self.run_it("check")
        output, _ = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 1)
        self.assertRegex(output, f"^{self.fakes[0].url} +UNUSABLE: it refuses our checksum.*\n"
                                 f"{self.fakes[1].url} +UNUSABLE: no connection: .*\n"
                                 "Mend 2 of 2, or take them out of servers.json.\n$")
        self.assertNotIn("\033", output)

    def test_it_serves_https_itself_and_takes_up_a_new_certificate(self):
        certificate, _ = certified(self.folder)
        process, port = self.started(TINYSCALE_CERT=certificate)
        trust = ssl.create_default_context(cafile=certificate)
        mute = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(20)]       # none stops the others
        for connection in mute:
            self.addCleanup(connection.close)

        def version(context):
            return fetch(port, "/bigbluebutton/api", trust=context).version
        self.assertEqual(version(trust), "2.0")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)         # what is deprecated is tested here
            old.check_hostname, old.verify_mode, old.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            version(old)
        self.assertIn("listens on port", self.lines[-1])
        with open(certificate, "a") as file:
            file.write("# the same, written again\n")
        os.utime(certificate, (1, 1))
        process.send_signal(signal.SIGHUP)
        self.assertIn("were read again", self.line(process, "settings"))
        self.assertEqual(version(trust), "2.0")
        with open(certificate, "w") as file:
            file.write(CERTIFICATE)
        process.send_signal(signal.SIGHUP)
        self.assertIn("They must be PEM files that fit. The settings stay", self.line(process, "settings"))
        self.assertEqual(version(trust), "2.0")

    def test_new_secrets_in_the_file_count_after_a_sighup(self):
        path = os.path.join(self.folder, "secrets")
        with open(path, "w") as file:
            file.write("old\n")
        process, port = self.started(TINYSCALE_SECRET="", TINYSCALE_SECRET_FILE=path)
        self.assertEqual(self.get(port, "getMeetings").messageKey, "checksumError")
        with open(path, "w") as file:
            file.write(f"old\n{SECRET}\n")
        process.send_signal(signal.SIGHUP)
        self.line(process, "were read again")
        self.assertEqual(self.get(port, "getMeetings").returncode, "SUCCESS")

    def test_url_knows_where_tinyscale_listens(self):
        certificate, _ = certified(self.folder)
        for env, expected in (({"PORT": "80"}, "http://localhost:80/"), ({"TINYSCALE_BIND": "::1"}, "http://[::1]:0/"),
                              ({"TINYSCALE_CERT": certificate}, "https://localhost:0/")):
            output, _ = self.run_it("url", **env).communicate(timeout=20)
            self.assertTrue(output.startswith(f"{expected}bigbluebutton/api/getMeetings?checksum="), output)

    def test_url_prints_a_url_that_works(self):
        _, port = self.started()
        self.fakes[1].put("a room")
        for call, expected in (("getMeetings", "meetings"), ("getMeetingInfo?meetingID=a+room", "meetingName")):
            process = self.run_it("url", call, "--port", str(port))
            output, _ = process.communicate(timeout=20)
            match = re.fullmatch(r"http://localhost:\d+(/bigbluebutton/api/.*)\n", output)
            self.assertIn(expected.encode(), fetch(port, match[1]).body)

    def test_a_server_whose_certificate_is_not_right_is_unusable(self):
        certificate, tls = certified(self.folder)
        secure = FakeBBB("bbb3", tls=tls)
        self.addCleanup(secure.down)
        hosts = secure.url, secure.url.replace("127.0.0.1", "127.1")        # a name that the certificate lacks
        self.write_servers(json.dumps([{"host": host, "secret": secure.secret} for host in hosts]))
        for env, refused in (({}, 2), ({"SSL_CERT_FILE": certificate}, 1)):
            output, _ = self.run_it("check", **env).communicate(timeout=20)
            self.assertEqual(output.count("UNUSABLE: no connection: [SSL: CERTIFICATE_VERIFY_FAILED]"), refused, output)
            self.assertIn(f"Mend {refused} of 2", output)
        self.assertEqual({call for call, *_ in secure.calls}, {"getMeetings"})

    def test_a_second_signal_ends_at_once_even_with_a_hung_server(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                self.fakes[0].put("room")
                process, port = self.started()
                self.fakes[0].faults["end"] = silent
                hung = background(self.get, port, "end", "meetingID=room")
                self.assertTrue(until(lambda: self.fakes[0].count("end")))
                process.send_signal(number)
                self.line(process, "stopping")
                process.send_signal(number)
                self.assertEqual(process.wait(5), 1)
                self.assertIsInstance(hung.exception(5), OSError)
                self.fakes[0].calls.clear()


# ---- the documentation -----------------------------------------------------------------------------------------------

class DocumentationTest(unittest.TestCase):
    def setUp(self):
        self.texts = {}
        for name in ("README.md", "tinyscale.py", "test_tinyscale.py"):
            with open(os.path.join(HERE, name), encoding="utf-8") as file:
                self.texts[name] = file.read()
        self.tree = ast.parse(self.texts["tinyscale.py"])
        self.settings = {"PORT", *re.findall(r"TINYSCALE_[A-Z_]+\b", self.texts["tinyscale.py"])}

    def section(self, title):
        """The rows of the tables in a section of the README: the cells of each."""
        text = re.search(rf"^## {title}\n(.*?)(?:^## |\Z)", self.texts["README.md"], re.DOTALL | re.MULTILINE)[1]
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        return [cells for cells in rows if not cells[0].startswith("-")]

    def test_the_program_can_be_read_in_one_sitting(self):
        self.assertLessEqual(self.texts["README.md"].count("\n"), 250)
        for name in ("tinyscale.py", "test_tinyscale.py"):
            for number, line in enumerate(self.texts[name].splitlines(), 1):
                self.assertLessEqual(len(line), 120, f"{name}:{number}")
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                self.assertLessEqual(node.end_lineno - node.lineno + 1 - docstring, 25, node.name)

    def test_it_needs_only_the_standard_library(self):
        names = [alias.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        self.assertGreater(len(names), 20)
        for name in names:
            self.assertNotIn("-packages", importlib.util.find_spec(name).origin or "", name)

    def test_nothing_is_defined_or_imported_that_is_not_used(self):
        defined = set()
        for node in self.tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                defined |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)
                            and isinstance(name.ctx, ast.Store)}
        used = {node.id for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        self.assertGreater(len(defined), 100)
        self.assertEqual(defined - used, {"annotations"})           # from __future__

    def test_every_setting_is_in_the_readme_and_in_the_help_and_no_other(self):
        environment = {"COLUMNS": "100", "PATH": os.environ["PATH"]}
        told = subprocess.check_output([sys.executable, PROGRAM, "--help"], universal_newlines=True, env=environment)
        rows = {name for cells in self.section("Settings") for name in re.findall("`([A-Z_]+)`", cells[0])}
        self.assertEqual(rows, {*self.settings, "SSL_CERT_FILE"})       # which is OpenSSL's
        self.assertEqual(set(re.findall(r"\b(?:TINYSCALE_[A-Z_]+|PORT)\b", told)), self.settings)
        for option in re.findall("--[a-z]+", told):
            self.assertIn(option, self.texts["README.md"] + "--help")
        for default in ("3005", "servers.json"):
            self.assertIn(default, told)
            self.assertIn(default, str(self.section("Settings")))

    def test_every_key_of_an_entry_is_in_the_readme_and_no_other(self):
        rows = {json.loads(cells[0].strip("`")) for cells in self.section("Settings") if cells[0].startswith('`"')}
        self.assertEqual((rows, set(tinyscale.Entry._fields)), (set(tinyscale.RULES), set(tinyscale.RULES)))

    def test_every_call_is_in_the_readme_and_no_other(self):
        rows = {name for cells in self.section("Calls") for name in re.findall("`([a-zA-Z/]+)`", cells[0])}
        self.assertEqual(rows, {*tinyscale.CALLS, *tinyscale.PAGES, "meetingID", "/bigbluebutton/api"})

    def test_no_section_of_the_readme_is_empty(self):
        for title, text in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", self.texts["README.md"], re.MULTILINE):
            self.assertTrue(text.strip(), title)

    def test_the_limits_of_the_readme_are_those_of_the_program(self):
        readme, t = " ".join(self.texts["README.md"].split()), tinyscale
        for words in (
                f"of every server, every {t.SURVEY_INTERVAL} seconds", f"For {t.HOLD} s its meetings stay its own",
                f"tries again every {t.RETRY_AFTER} s", f"without an answer in {t.PATIENCE} s is left out",
                f"wait for {t.ANSWER_TIMEOUT} s (probes for {t.PATIENCE} s, a create or slides for {t.WORK_TIMEOUT} s)",
                f"no answer in {t.ANSWER_TIMEOUT} s", f"finish for at most {t.DRAIN_TIMEOUT} seconds",
                f"delays the start by up to {t.CONNECT_TIMEOUT + t.ANSWER_TIMEOUT} s",
                f"bodies over {t.MAX_BODY // 2**20} MiB", f"of a server over {t.MAX_ANSWER // 2**20} MiB",
                f"a form of at most {t.MAX_HEAD // 2**10} KiB", f"- {t.MAX_CONNECTIONS:,} connections at once"):
            self.assertIn(words, readme)
        self.assertEqual(t.Handler.timeout, t.IDLE_TIMEOUT)
        self.assertGreater(t.IDLE_TIMEOUT, 60)          # nginx closes a kept connection first
        self.assertLess(t.POOL_TIMEOUT, 75)             # and we do before the nginx of a server

    def test_the_demo_prints_urls_that_work(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "demo", "--port", str(port)],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)
        urls = []
        for line in process.stdout:
            urls += re.findall(r"^  http://127\.0\.0\.1:\d+(/\S+checksum=\S+)$", line)
            if line.startswith("Ctrl-C"):
                break
        self.assertEqual([fetch(port, url).status for url in urls], [200, 302, 200])
        process.terminate()
        self.assertEqual(process.wait(10), 0)


# ---- the demo and the benchmark --------------------------------------------------------------------------------------

@contextlib.contextmanager
def running(fakes, port, stderr=None, **env):
    """tinyscale in a process of its own, in front of these fakes, once it serves. Yields the process and its secret."""
    secret = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "servers.json")
        with open(path, "w") as file:
            json.dump([{"host": fake.url, "secret": fake.secret} for fake in fakes], file)
        os.chmod(path, 0o600)
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--servers", path, "--port", str(port), "--bind", "127.0.0.1"],
            env={**os.environ, "TINYSCALE_SECRET": secret, **env}, stderr=stderr,
            start_new_session=True)                     # a Ctrl-C reaches it once, through us

        def ready():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return connection.recv(1000)
            return process.poll() is not None
        try:
            until(ready, 10)
            yield process, secret
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait()


def demo(port):
    """tinyscale in front of three fake servers, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fakes = [FakeBBB(f"server {number}", uuid.uuid4().hex) for number in (1, 2, 3)]
    password = uuid.uuid4().hex[:8]
    tinyscale_runs = running(fakes, port, TINYSCALE_STATUS_PASSWORD=password)
    with contextlib.suppress(KeyboardInterrupt), tinyscale_runs as (process, secret):
        if process.poll() is None:
            url = f"http://127.0.0.1:{port}/bigbluebutton/api"
            print(f"\ntinyscale stands in front of three fake servers.\n  URL:    {url}\n  secret: {secret}\n"
                  f"  status: http://127.0.0.1:{port}/status, user admin, password {password}\n\n"
                  "Create a meeting, join it, and see what runs (each link may be repeated, but not changed):")
            for call, query in (("create", "name=Demo&meetingID=demo&attendeePW=ap&moderatorPW=mp"),
                                ("join", "fullName=Ada&meetingID=demo&password=mp"), ("getMeetings", "")):
                print(f"  {url}/{call}?{signed(call, query, secret, 'sha256')}")
            print("\nCtrl-C ends it.\n", flush=True)
        process.wait()
    for fake in fakes:
        fake.down()
    return process.returncode


BARE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size, daemon_threads = 1000, True
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
FAKES = """
import sys, threading, test_tinyscale as test
for number in range(4):
    fake = test.FakeBBB(f"bbb{number}", "its-own-secret")
    for meeting in range(int(sys.argv[1])):
        fake.put(f"room{number}-{meeting}")
    print(fake.port, flush=True)
threading.Event().wait()
"""


def measure(port, paths, kept, clients, seconds):
    """Call these paths for some seconds; return calls per second, and the median and 95th percentile in ms."""
    times, end = [], time.perf_counter() + seconds
    paths = iter(paths)
    lock = threading.Lock()

    def client():
        connection = None
        while time.perf_counter() < end:
            with lock:
                path = next(paths)
            started = time.perf_counter()
            connection = connection or socket.create_connection(("127.0.0.1", port), 10)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            missing = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) - len(body)
            while missing > 0:
                missing -= len(connection.recv(65536))
            times.append(1000 * (time.perf_counter() - started))
            assert b" 200 " in head or b" 302 " in head, head
            if not kept:
                connection.close()
                connection = None
        if connection:
            connection.close()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    return len(times) / seconds, times[len(times) // 2], times[len(times) * 95 // 100]


def bench(port, seconds=2.0):
    """Calls per second and latency of tinyscale, in front of four fakes, beside a bare ThreadingHTTPServer's."""
    def calls(call, query, secret):
        for number in range(10**9):
            text = query.format(number, room=f"room{number % 4}-{number % 25}")
            yield f"/bigbluebutton/api/{call}?{signed(call, text, secret)}"

    def start(code, *arguments):
        return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, stdout=subprocess.PIPE)
    processes = [start(BARE, port + 1), start(FAKES, 25)]
    try:
        ports = [int(processes[1].stdout.readline()) for _ in range(4)]
        fakes = [argparse.Namespace(url=f"http://127.0.0.1:{number}", secret="its-own-secret") for number in ports]
        with running(fakes, port, subprocess.DEVNULL) as (_, secret):
            print(f"{'':38}{'calls/s':>8}{'median':>10}{'95 %':>10}{'of bare':>9}")
            bare = {}
            for name, kept in (("new connections", False), ("kept connections", True)):
                bare[kept] = measure(port + 1, iter(lambda: "/", None), kept, 20, seconds)
                print("{:38}{:8.0f}{:7.1f} ms{:7.1f} ms".format(f"bare ThreadingHTTPServer, {name}", *bare[kept]))
            for call, query in (
                    ("join", "fullName=User+{0}&meetingID={room}"), ("isMeetingRunning", "meetingID={room}"),
                    ("getMeetingInfo", "meetingID={room}"), ("getMeetings", ""), ("create", "meetingID=new-{0}")):
                for name, kept in (("new", False), ("kept", True)):
                    result = measure(port, calls(call, query, secret), kept, 20, seconds)
                    print("{:38}{:8.0f}{:7.1f} ms{:7.1f} ms{:9.2f}".format(f"{call}, {name} connections", *result,
                                                                            result[0] / bare[kept][0]), flush=True)
    finally:
        for process in processes:
            process.terminate()
            process.communicate()
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "bench"))
    parser.add_argument("--port", type=int, default=3005)
    if sys.argv[1:2] in (["demo"], ["bench"]):
        options = parser.parse_args()
        return {"demo": demo, "bench": bench}[options.command](options.port)
    return unittest.main()


if __name__ == "__main__":
    sys.exit(main())
