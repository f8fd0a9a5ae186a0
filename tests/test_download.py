"""Behaviour of aerial_nb.data.download and unpack, against a server that does everything a bad server does."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from email.utils import format_datetime
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aerial_nb.data import download, unpack as unpacking
from aerial_nb.data.download import Line, Partial, Remote, fetch_file, fetch_files, fetch_text, list_bucket, list_page
from aerial_nb.data.raster import DataError
from aerial_nb.data.unpack import unpack

DATA = np.random.default_rng(0).integers(0, 256, 1_000_003, dtype="uint8").tobytes()
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()
C = 20 << 14  # the client keeps whole pieces of 16 kB
Seen = namedtuple("Seen", "path start headers")


class Host(ThreadingHTTPServer):
    """Files by path. `script[path]` is a list of moods, one for each request; the last one stays.

    A mood is a dict: status, headers, cut (bytes before the connection drops), ranges (False ignores them), data,
    etag, lie (bytes by which a partial answer starts wrong), slow (s between chunks), chunked, silent (no length)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.script, self.seen = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address):
        "A client that hangs up is part of the test."

    def starts(self, path):
        return [s.start for s in self.seen if s.path == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        host, path = self.server, self.path
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        host.seen.append(Seen(path, start, dict(self.headers)))
        moods = host.script.get(path, [{}])
        mood = moods.pop(0) if len(moods) > 1 else moods[0]
        data = mood.get("data", host.files.get(path))
        etag = mood.get("etag", '"one"')
        if data is None or "status" in mood:
            return self.answer(mood.get("status", 404), mood.get("headers", {}), mood.get("body", b"no"))
        if self.headers.get("If-Range") not in (None, etag) or not mood.get("ranges", True):
            start, wanted = 0, None
        if start >= len(data) and wanted:
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        first = start + mood.get("lie", 0) if wanted else 0
        body = data[first:]
        headers = {"ETag": etag} if etag else {}
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.answer(206 if wanted else 200, headers | mood.get("headers", {}), body, mood)

    def answer(self, status, headers, body, mood=None):
        mood = mood or {}
        chunked, cut = mood.get("chunked"), mood.get("cut")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not mood.get("silent"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for i in range(0, len(body) if cut is None else min(cut, len(body)), 50_000):
            piece = body[i : i + 50_000] if cut is None else body[i : min(i + 50_000, cut)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            time.sleep(mood.get("slow", 0))
        if chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")
        if cut is not None or mood.get("silent"):
            self.close_connection = True


@contextmanager
def serving():
    host = Host()
    thread = threading.Thread(target=host.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield host
    finally:
        host.shutdown()
        host.server_close()


@pytest.fixture
def host():
    with serving() as host:
        host.files["/a.bin"] = DATA
        yield host


@pytest.fixture
def waits():
    return []


@pytest.fixture
def line(waits):
    return Line(sleep=waits.append, timeout_s=(5, 5))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# ---- one file


def test_a_good_server(host, line, waits, tmp_path):
    file = fetch_file(Remote(f"{host.url}/a.bin", "deep/er/a.bin", MD5), tmp_path, line)
    assert file.read_bytes() == DATA and names(tmp_path) == ["deep/er/a.bin"] and waits == []
    assert fetch_file(Remote(f"{host.url}/a.bin", "deep/er/a.bin", MD5), tmp_path, line) == file and len(host.seen) == 1
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_line_that_drops_goes_on_where_it_stopped(host, line, waits, tmp_path):
    host.script["/a.bin"] = [{"cut": C}]
    file = fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line)
    assert file.read_bytes() == DATA and host.starts("/a.bin") == [0, C, 2 * C, 3 * C]
    assert all(s.headers["If-Range"] == '"one"' for s in host.seen[1:]) and len(waits) == 3


@pytest.mark.parametrize("checksum", [MD5, None])
def test_a_server_without_ranges_sends_all_again(host, line, tmp_path, checksum):
    host.script["/a.bin"] = [{"cut": C, "ranges": False}, {"ranges": False}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", checksum), tmp_path, line).read_bytes() == DATA
    assert host.starts("/a.bin") == [0, C]


def test_a_file_that_changes_between_two_requests_begins_anew(host, line, tmp_path):
    new = bytes(reversed(DATA))
    host.script["/a.bin"] = [{"cut": C}, {"data": new, "etag": '"two"'}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == new


@pytest.mark.parametrize("liar", [{"lie": 7}, {"headers": {"ETag": '"two"'}}, {"headers": {"Content-Range": f"bytes {C}-1000002/2000000"}}])
def test_a_partial_answer_that_does_not_fit_is_not_appended(host, line, tmp_path, liar):
    host.script["/a.bin"] = [{"cut": C}, liar, {}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == DATA
    assert host.starts("/a.bin") == [0, C, 0]


def test_without_a_mark_of_version_only_a_checksum_allows_to_resume(host, line, tmp_path):
    for checksum, starts in ((None, [0, 0]), (MD5, [0, C])):
        host.seen.clear()
        host.script["/a.bin"] = [{"cut": C, "etag": ""}, {"etag": ""}]
        assert fetch_file(Remote(f"{host.url}/a.bin", f"{len(starts)}{starts[1]}.bin", checksum), tmp_path, line).read_bytes() == DATA
        assert host.starts("/a.bin") == starts


def test_a_mixture_of_two_versions_is_found_and_mended(host, line, tmp_path):
    "A part of another version, whose server gives no mark: the sum is wrong, and one fresh try follows."
    part = Partial(tmp_path / "a.bin")
    part.file.write_bytes(b"x" * 500_000)
    part.notes.write_text(json.dumps(dict(url=f"{host.url}/a.bin", mark="", total=len(DATA))))
    host.script["/a.bin"] = [{"etag": ""}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line).read_bytes() == DATA
    assert host.starts("/a.bin") == [500_000, 0] and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("notes", ["", "not json", "[]", json.dumps(dict(url="http://elsewhere/a.bin", mark='"one"', total=9))])
def test_a_part_of_unknown_origin_is_thrown_away(host, line, tmp_path, notes):
    (tmp_path / ".a.bin.part").write_bytes(b"x" * 100)
    if notes:
        (tmp_path / ".a.bin.part.json").write_text(notes)
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == DATA
    assert names(tmp_path) == ["a.bin"]


def test_a_part_that_is_whole_needs_no_request(host, line, tmp_path):
    "Killed between the last byte and the new name."
    part = Partial(tmp_path / "a.bin")
    part.file.write_bytes(DATA)
    part.notes.write_text(json.dumps(dict(url=f"{host.url}/a.bin", mark='"one"', total=len(DATA))))
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line).read_bytes() == DATA and not host.seen


def test_wrong_bytes_never_get_the_name(host, line, tmp_path):
    host.script["/a.bin"] = [{"data": b"y" * len(DATA)}]
    with pytest.raises(DataError, match="wrong bytes, removed: md5:.* was expected.*try again"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line)
    assert names(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(b"an older one")
    with pytest.raises(DataError, match="wrong bytes"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line)
    assert (tmp_path / "a.bin").read_bytes() == b"an older one"


def test_wrong_bytes_with_the_right_name_are_fetched_again(host, line, tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA[:-1])
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line).read_bytes() == DATA


@pytest.mark.parametrize(("code", "says"), [(404, "not there .404.*moved or withdrawn.*https://page"), (410, "not there"), (403, "does not admit.*terms of use.*https://page"),
                                            (401, "credentials are missing"), (400, "answered 400"), (501, "answered 501")])
def test_answers_that_stay_are_told_at_once(host, line, waits, tmp_path, code, says):
    host.script["/a.bin"] = [{"status": code}]
    with pytest.raises(DataError, match=says):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin", page="https://page"), tmp_path, line)
    assert len(host.seen) == 1 and not waits and names(tmp_path) == []


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_answers_that_pass_are_waited_for(host, line, waits, tmp_path, code):
    host.script["/a.bin"] = [{"status": code}, {"status": code}, {}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == DATA
    assert waits == [1, 2]


def test_the_server_says_how_long(host, line, waits, tmp_path):
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    host.script["/a.bin"] = [{"status": 429, "headers": {"Retry-After": "7"}}, {"status": 503, "headers": {"Retry-After": soon}},
                             {"status": 503, "headers": {"Retry-After": "soon"}}, {}]
    fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line)
    assert waits[0] == 7 and 55 < waits[1] <= 60 and waits[2] == 4


def test_a_server_that_asks_for_an_hour(host, line, waits, tmp_path):
    host.script["/a.bin"] = [{"cut": C}, {"status": 429, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(DataError, match="429 and asks to wait 3600 s; what has arrived is kept: run the same command again later"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line)
    assert waits == [1] and (tmp_path / ".a.bin.part").stat().st_size == C


def test_a_server_that_stays_down(host, line, waits, tmp_path):
    host.script["/a.bin"] = [{"status": 500}]
    with pytest.raises(DataError, match="answered 500, 6 times in a row; what has arrived is kept"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line)
    assert waits == [1, 2, 4, 8, 16]


def test_new_bytes_renew_the_patience(host, line, tmp_path):
    "Twenty drops in a row are no reason to stop while each brings something; drops that bring nothing are."
    host.script["/a.bin"] = [{"cut": 49_152}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line).read_bytes() == DATA and len(host.seen) == 21
    host.script["/a.bin"] = [{"cut": 49_152}, {"cut": 0}]
    with pytest.raises(DataError, match="6 times in a row"):
        fetch_file(Remote(f"{host.url}/a.bin", "b.bin", MD5), tmp_path, line)


def test_a_server_that_begins_anew_for_ever_is_given_up(host, line, tmp_path):
    host.script["/a.bin"] = [{"cut": c, "ranges": False} for c in (300_000, 200_000) * 6]
    with pytest.raises(DataError, match="in a row"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, line)
    assert len(host.seen) < 12


def test_a_silent_and_a_slow_server(host, waits, tmp_path):
    host.script["/a.bin"] = [{"slow": 0.4}, {"slow": 0}]
    impatient = Line(sleep=waits.append, timeout_s=(5, 0.15))
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path, impatient).read_bytes() == DATA
    assert host.starts("/a.bin")[1] >= 49_152 and len(waits) == 1


def test_nobody_there(line, waits, tmp_path):
    with pytest.raises(DataError, match="127.0.0.1:9: cannot be reached .is this machine online.., 6 times in a row"):
        fetch_file(Remote("http://127.0.0.1:9/a.bin", "a.bin"), tmp_path, line)
    for url in ("a.bin", "gopher://x/a.bin", "http://"):
        with pytest.raises(DataError, match="no web address"):
            fetch_file(Remote(url, "a.bin"), tmp_path, line)


@pytest.mark.parametrize("mood", [{"chunked": True}, {"silent": True}])
def test_a_length_that_is_not_told(host, line, tmp_path, mood):
    host.script["/a.bin"] = [mood]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == DATA


def test_a_drop_in_chunks_is_no_end(host, line, tmp_path):
    host.script["/a.bin"] = [{"chunked": True, "cut": 300_000}, {"chunked": True}]
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line).read_bytes() == DATA
    assert len(host.seen) == 2


def test_an_end_without_an_error_is_still_an_end(tmp_path):
    "Old versions of urllib3 end quietly where the line dropped."
    load = download.Resuming(Remote("http://x/a.bin", "a.bin"), tmp_path)
    raw = namedtuple("Raw", "stream")(lambda size, decode_content: iter([b"x" * 10]))
    answer = namedtuple("Answer", "headers raw")({"Content-Length": "20"}, raw)
    load.part.begin("http://x/a.bin", answer)
    with pytest.raises(download._Again, match="stopped at 10 of 20 bytes"):
        download._append(load, answer, 0)
    with pytest.raises(download._Again, match="more bytes than announced"):
        for _ in range(2): download._append(load, answer, 10)
    assert len(load.part) == 0


def test_a_log_in_page_is_no_file(host, line, tmp_path):
    host.script["/a.bin"] = [{"data": b"<html>please sign in", "headers": {"Content-Type": "text/html; charset=utf-8"}}]
    with pytest.raises(DataError, match="a web page instead of a.bin.*open https://page in a browser"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin", page="https://page"), tmp_path, line)
    assert names(tmp_path) == []


def test_a_redirect_is_followed_and_credentials_stay_home(host, line, tmp_path):
    with serving() as other:
        other.files["/b.bin"] = DATA
        there = other.url.replace("127.0.0.1", "localhost")
        host.script["/a.bin"] = [{"status": 302, "headers": {"Location": f"{there}/b.bin"}}]
        other.script["/b.bin"] = [{"cut": C}, {}]
        remote = Remote(f"{host.url}/a.bin", "a.bin", MD5, headers={"Authorization": "Basic c2VjcmV0"})
        assert fetch_file(remote, tmp_path, line).read_bytes() == DATA
        assert [s.headers.get("Authorization") for s in host.seen] == ["Basic c2VjcmV0"] * 2
        assert [s.headers.get("Authorization") for s in other.seen] == [None] * 2 and other.starts("/b.bin") == [0, C]
        assert "c2VjcmV0" not in repr(remote)


# ---- the disk


def test_a_full_disk_keeps_what_came(host, line, tmp_path, monkeypatch):
    "A real ENOSPC: the part is a link to /dev/full."
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(Partial, "begin", lambda self, url, response: self.file.symlink_to("/dev/full"))
    with pytest.raises(DataError, match="no room for a.bin .No space left.*GB free.; free some, or choose another disk.*is kept"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line)
    assert not (tmp_path / "a.bin").exists() and len(host.seen) == 1


def test_a_file_that_cannot_fit_is_not_begun(host, line, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_free", lambda path: 1000)
    with pytest.raises(DataError, match="no room for a.bin .needs 0.00 GB"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path, line)
    assert not (tmp_path / "a.bin").exists() and not (tmp_path / ".a.bin.part").exists()


def test_a_place_that_cannot_be_written(host, line, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write a.bin there .*--folder or AERIAL_DATA"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path / "file" / "data", line)


def test_a_read_only_folder(host, line, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)   # root ignores the bits of a folder
    with pytest.raises(DataError, match="cannot write a.bin there .Permission denied"):
        fetch_file(Remote(f"{host.url}/a.bin", "a.bin"), tmp_path / "new", line)


@pytest.mark.parametrize("path", ["../a.bin", "x/../../a.bin", "/etc/a.bin"])
def test_a_name_that_leaves_the_folder(line, tmp_path, path):
    with pytest.raises(DataError, match="would leave"):
        fetch_file(Remote("http://127.0.0.1:9/a", path), tmp_path, line)


def test_two_at_a_time(host, tmp_path):
    host.script["/a.bin"] = [{"slow": 0.05}]
    told = []
    def work():
        try: told.append(fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path))
        except DataError as error: told.append(str(error))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sum("another process is downloading a.bin" in str(t) for t in told) == 1
    assert (tmp_path / "a.bin").read_bytes() == DATA and names(tmp_path) == ["a.bin"]


def test_a_kill_then_the_same_command(host, tmp_path):
    host.script["/a.bin"] = [{"slow": 0.2}, {}]
    code = ("import sys; from aerial_nb.data.download import Remote, fetch_file; "
            "print(fetch_file(Remote(sys.argv[1], 'a.bin', sys.argv[2]), sys.argv[3]).name)")
    command = [sys.executable, "-c", code, f"{host.url}/a.bin", MD5, str(tmp_path)]
    first = subprocess.Popen(command)
    part, deadline = tmp_path / ".a.bin.part", time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 250_000) and time.monotonic() < deadline: time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = part.stat().st_size
    assert 250_000 < kept < len(DATA) and not (tmp_path / "a.bin").exists()
    assert fetch_file(Remote(f"{host.url}/a.bin", "a.bin", MD5), tmp_path).read_bytes() == DATA
    assert host.starts("/a.bin") == [0, kept] and names(tmp_path) == ["a.bin"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({}, optional=dict(cut=st.integers(0, 5000), ranges=st.booleans(), lie=st.integers(-3, 3), etag=st.sampled_from(['"one"', '"two"', ""]),
                                                         status=st.sampled_from([429, 500, 503]), chunked=st.booleans())), max_size=5))
def test_whatever_a_server_does_first_the_file_is_right(host, tmp_path_factory, moods):
    data = DATA[:5000]
    host.files["/p.bin"] = data
    host.script["/p.bin"] = [dict(m, **({"headers": {}} if "status" in m else {})) for m in moods] + [{}]
    folder = tmp_path_factory.mktemp("p")
    remote = Remote(f"{host.url}/p.bin", "p.bin", "sha256:" + hashlib.sha256(data).hexdigest())
    assert fetch_file(remote, folder, Line(attempts=9, sleep=lambda s: None, timeout_s=(5, 5))).read_bytes() == data
    assert names(folder) == ["p.bin"]


# ---- many files


def test_failures_are_told_together_and_the_rest_is_kept(host, line, tmp_path):
    for i in range(12):
        host.files[f"/{i}.bin"] = DATA[: 1000 + i]
    host.script["/3.bin"] = [{"status": 404}]
    host.script["/7.bin"] = [{"status": 403}]
    remotes = [Remote(f"{host.url}/{i}.bin", f"t/{i}.bin") for i in range(12)]
    with pytest.raises(DataError, match=r"2 of 12 files failed, the others are kept; run the same command again:\n- .*3.bin: not there.*\n- .*7.bin"):
        fetch_files(remotes, tmp_path, line, progress=False)
    assert len(names(tmp_path)) == 10
    host.script.clear(); host.seen.clear()
    files = fetch_files(remotes, tmp_path, line, progress=False)
    assert [f.name for f in files] == [f"{i}.bin" for i in range(12)] and {s.path for s in host.seen} == {"/3.bin", "/7.bin"}


def test_bars(host, line, tmp_path, capsys):
    host.script["/a.bin"] = [{"cut": C}, {}]
    fetch_files([Remote(f"{host.url}/a.bin", "a.bin")], tmp_path, line)
    assert "a.bin: 100%" in capsys.readouterr().err.replace("|", " ").replace("  ", " ")


# ---- lists


def test_links_of_a_page(host, line):
    host.files["/data/sat/index.html"] = (
        b'<a href="1.tiff">x</a> <a href="1.tiff">again</a> <a href="' + host.url.encode() + b'/data/sat//2.TIFF">y</a>'
        b'<a href="../map/3.tiff">up</a> <a href="http://elsewhere/4.tiff">z</a> <a href="notes.txt">n</a> <a>none</a>')
    found = list_page(f"{host.url}/data/sat/index.html", line=line)
    assert found == [f"{host.url}/data/sat/1.tiff", f"{host.url}/data/sat/2.TIFF"]
    host.files["/empty.html"] = b"<p>moved"
    with pytest.raises(DataError, match="no link to a .tif or .tiff: the page has changed"):
        list_page(f"{host.url}/empty.html", line=line)


def listing(keys, token="", folders=()):
    rows = "".join(f'<Contents><Key>{k}</Key><ETag>&quot;{t}&quot;</ETag><Size>{n}</Size></Contents>' for k, t, n in keys)
    rows += "".join(f"<CommonPrefixes><Prefix>{f}</Prefix></CommonPrefixes>" for f in folders)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{rows}{more}</ListBucketResult>'.encode()


def test_a_bucket_page_by_page(host, line):
    md5 = "0" * 32
    host.files["/?list-type=2&prefix=a/b/"] = listing([("a/b/1", md5, 5)], token="t/+=")
    host.files["/?list-type=2&prefix=a/b/&continuation-token=t%2F%2B%3D"] = listing([("a/b/2", f"{md5}-3", 7)])
    host.script["/?list-type=2&prefix=a/b/"] = [{"status": 503}, {}]
    assert list_bucket(host.url, "a/b/", line=line) == [dict(key="a/b/1", size=5, md5=md5), dict(key="a/b/2", size=7, md5=None)]
    host.files["/?list-type=2&prefix=a/&delimiter=/"] = listing([], folders=["a/b/", "a/c/"])
    assert list_bucket(host.url, "a/", folders=True, line=line) == [dict(key="a/b/"), dict(key="a/c/")]
    host.files["/?list-type=2&prefix=x/"] = b"<html><p>sign in"
    with pytest.raises(DataError, match="no listing of a bucket, but '<html>"):
        list_bucket(host.url, "x/", line=line)


def test_texts_are_patient_too(host, line, waits):
    host.files["/t"] = "grüße".encode()
    host.script["/t"] = [{"status": 500}, {"cut": 2}, {}]
    assert fetch_text(f"{host.url}/t", line) == "grüße" and waits == [1, 2]


# ---- unpacking


def zipped(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def tarred(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                t.addfile(info)
            else:
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return path


FILES = {"top/a/1.bin": DATA[:70_000], "top/a/2.bin": DATA[70_000:90_000], "top/3.txt": b"", "readme": b"r"}


@pytest.mark.parametrize(("name", "make"), [("x.zip", zipped), ("x.tar.gz", tarred), ("x.tar", lambda p, f: tarred(p, f, "w")), ("x.tar.xz", lambda p, f: tarred(p, f, "w:xz"))])
def test_archives_come_out_as_they_went_in(tmp_path, name, make):
    archive = make(tmp_path / name, FILES)
    assert unpack(archive, tmp_path / "all", progress=False) == 4
    assert {n: (tmp_path / "all" / n).read_bytes() for n in names(tmp_path / "all")} == FILES
    assert unpack(archive, tmp_path / "some", strip=1, keep=lambda n: n.startswith("a/"), progress=False) == 2
    assert names(tmp_path / "some") == ["a/1.bin", "a/2.bin"]


@pytest.mark.parametrize("bad", ["../out.txt", "a/../../out.txt", "/abs.txt", "..\\out.txt", "C:\\out.txt"])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_names_that_lead_outside_are_refused(tmp_path, bad, make):
    archive = make(tmp_path / "x.arc", {"good.txt": b"g", bad: b"evil"})
    with pytest.raises(DataError, match="would be written outside the folder; the archive is refused"):
        unpack(archive, tmp_path / "in" / "deep", progress=False)
    assert not [n for n in names(tmp_path) if "out.txt" in n or "abs.txt" in n] and not (tmp_path / "in/deep/good.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with pytest.raises(DataError, match="'x' is a link or a device"):
        unpack(tarred(tmp_path / "x.tar.gz", {"x": (kind, "/etc/passwd")}), tmp_path / "out", progress=False)
    info = zipfile.ZipInfo("x")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="'x' is a link"):
        unpack(tmp_path / "x.zip", tmp_path / "out", progress=False)


def damaged(archive, how):
    data = bytearray(archive.read_bytes())
    if how == "cut": data = data[: len(data) // 2]
    elif how == "flipped": data[len(data) // 3] ^= 255
    else: data = bytearray(b"<html>not found")
    archive.write_bytes(data)
    return archive


@pytest.mark.parametrize("how", ["cut", "flipped", "other"])
@pytest.mark.parametrize(("name", "make"), [("x.zip", zipped), ("x.tar.gz", tarred)])
def test_a_damaged_archive_leaves_nothing_at_its_place(tmp_path, how, name, make):
    archive = damaged(make(tmp_path / name, {"1.bin": DATA[:200_000], "2.bin": DATA[:100]}), how)
    with pytest.raises(DataError, match="delete it and fetch it again"):
        unpack(archive, tmp_path / "out", progress=False)
    assert [n for n in names(tmp_path / "out") if not n.startswith(".")] == []


def test_a_kill_while_unpacking_is_continued(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "x.zip", {f"{i}.bin": DATA[: 1000 + i] for i in range(10)})
    written, plain = [], unpacking._write
    def stop(member, waiting):
        if len(written) == 6: raise KeyboardInterrupt
        before = (waiting / member.name).exists()
        plain(member, waiting); written.append((str(member.name), before))
    monkeypatch.setattr(unpacking, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "out", progress=False)
    assert [n for n in names(tmp_path / "out") if not n.startswith(".")] == []
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.bin")}
    (tmp_path / "out/.x.zip.unpacking/5.bin").write_bytes(b"half")
    monkeypatch.setattr(unpacking, "_write", plain)
    assert unpack(archive, tmp_path / "out", progress=False) == 10 and len(kept) == 6
    assert all((tmp_path / "out" / f"{i}.bin").read_bytes() == DATA[: 1000 + i] for i in range(10))
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in kept.items() if n != "5.bin")
    assert names(tmp_path / "out") == sorted(f"{i}.bin" for i in range(10))


def test_files_that_are_there_stay_or_are_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine"); (tmp_path / "out/1.txt").write_text("old")
    unpack(zipped(tmp_path / "x.zip", {"1.txt": b"new", "2.txt": b"two"}), tmp_path / "out", progress=False)
    assert {n: (tmp_path / "out" / n).read_text() for n in names(tmp_path / "out")} == {"mine.txt": "mine", "1.txt": "new", "2.txt": "two"}


def test_no_room_to_unpack(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda path: namedtuple("U", "free")(10))
    with pytest.raises(DataError, match="no room to unpack x.zip .1.bin needs 0.00 GB.*run the same command again"):
        unpack(zipped(tmp_path / "x.zip", {"1.bin": b"x" * 100}), tmp_path / "out", progress=False)


def test_a_locked_zip_and_a_missing_one(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"1.bin": b"x"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1; data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match="locked with a password"):
        unpack(archive, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="no such archive"):
        unpack(tmp_path / "y.zip", tmp_path / "out", progress=False)


def program(folder, text):
    "A stand-in for 7-Zip."
    folder.mkdir(exist_ok=True)
    (folder / "7z").write_text(f"#!{sys.executable}\nimport sys, pathlib\nout = pathlib.Path(next(a for a in sys.argv if a[:2] == '-o')[2:])\n{text}\n")
    (folder / "7z").chmod(0o755)
    return str(folder)


def test_7z(tmp_path, monkeypatch):
    parts = tmp_path / "x.7z.001"
    parts.write_bytes(b"7z")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="7-Zip is not installed: install it"):
        unpack(parts, tmp_path / "out", progress=False)
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "(out / 'd').mkdir(); (out / 'd/1.txt').write_text(sys.argv[-1][-8:])"))
    assert unpack(parts, tmp_path / "out", progress=False) == 1 and (tmp_path / "out/d/1.txt").read_text() == "x.7z.001"
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "print('ERROR: Missing volume : x.7z.002'); sys.exit(2)"))
    with pytest.raises(DataError, match="failed with code 2 .ERROR: Missing volume : x.7z.002.; is every part there"):
        unpack(parts, tmp_path / "new", progress=False)
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "(out / 'l').symlink_to('/etc')"))
    with pytest.raises(DataError, match="'l' is a link"):
        unpack(parts, tmp_path / "new", progress=False)
    assert names(tmp_path / "new") == []
