import hashlib
import json
import urllib.error
import urllib.request

import pytest
from builders import contents
from hub_stand_in import hub_stand_in

from srepa_ds.encoders import publications
from srepa_ds.encoders.publications import PUBLISHED, WEB_FILES, WebFile
from srepa_ds.encoders.published import find_published
from srepa_ds.errors import DataError
from srepa_ds.fetching.store import bring
from srepa_ds.fetching.web import web_plan_of

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def web(monkeypatch, tmp_path):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    with hub_stand_in() as stand_in:
        stand_in.web["/files/reference.npz"] = CONTENT
        yield stand_in


def file_of(web, content=CONTENT, path="/files/reference.npz"):
    digest = hashlib.sha256(content).hexdigest()
    return WebFile(f"{web.address}{path}", digest, len(content))


def unknown_file_of(web):
    """A file of which neither hash nor size is published."""
    return WebFile(f"{web.address}/files/reference.npz")


def fetched(file):
    return bring(web_plan_of(file))


def test_a_row_is_all_that_a_file_needs(web, monkeypatch):
    monkeypatch.setitem(publications.WEB_FILES, "reference", file_of(web))
    published = PUBLISHED["web"]("reference")
    assert find_published(published) is None
    folder = fetched(published)
    assert find_published(published) == folder
    assert contents(folder) == {"reference.npz": CONTENT}


def test_rows_have_plain_names_of_their_own():
    assert len({file.folder_name for file in WEB_FILES.values()}) == len(WEB_FILES)
    for file in WEB_FILES.values():
        assert file.url.startswith("https://")
        assert "/" not in file.name
        assert (file.sha256 is None) == (file.num_bytes is None)
    inception = WEB_FILES["inception"]
    assert inception.sha256[:8] in inception.name


@pytest.mark.parametrize("make", [file_of, unknown_file_of])
def test_a_download_that_breaks_off_goes_on(web, make):
    plan = web_plan_of(make(web))
    web.requests.clear()
    web.break_after, web.breaks = 100_000, 2
    folder = bring(plan)
    assert (folder / "reference.npz").read_bytes() == CONTENT
    assert [r.partition(" bytes=")[2] for r in web.requests] == ["0-", "100000-", "200000-"]


@pytest.mark.parametrize("make", [file_of, unknown_file_of])
def test_the_next_call_goes_on_too(web, tmp_path, make):
    plan = web_plan_of(make(web))
    web.break_after, web.breaks = 100_000, 3
    with pytest.raises(DataError, match=r"reference\.npz: the answer ends too early.*goes on"):
        bring(plan)
    assert not (tmp_path / "fetched/fetched.json").exists()
    folder = fetched(make(web))
    assert web.requests[-1].endswith("bytes=300000-")
    assert (folder / "reference.npz").read_bytes() == CONTENT


def test_a_file_that_is_replaced_meanwhile_is_fetched_from_its_start(web):
    plan = web_plan_of(unknown_file_of(web))
    web.break_after, web.breaks = 100_000, 3
    with pytest.raises(DataError, match="the answer ends too early"):
        bring(plan)
    other = CONTENT[::-1]
    web.web["/files/reference.npz"] = other
    folder = fetched(unknown_file_of(web))
    assert (folder / "reference.npz").read_bytes() == other
    assert [path.name for path in folder.iterdir()] == ["reference.npz"]


def test_a_server_that_comes_back_is_asked_again(web, monkeypatch):
    lost = [urllib.error.URLError(ConnectionResetError("reset by peer"))] * 2

    def urlopen(*args, **kwargs):
        if lost:
            raise lost.pop()
        return real(*args, **kwargs)

    real = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    folder = fetched(file_of(web))
    assert (folder / "reference.npz").read_bytes() == CONTENT
    assert not lost


def test_other_contents_are_refused(web, tmp_path):
    web.damaged.add("reference.npz")
    with pytest.raises(DataError, match=rf"damaged on its way.*expected 1,280,000 with {DIGEST}"):
        fetched(file_of(web))
    assert not (tmp_path / "fetched").exists()
    web.damaged.clear()
    fetched(file_of(web))


@pytest.mark.parametrize("num_bytes", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_another_size_is_refused_before_anything_is_written(web, tmp_path, num_bytes):
    file = WebFile(f"{web.address}/files/reference.npz", DIGEST, num_bytes)
    words = f"the file there has 1,280,000 bytes, and {num_bytes:,} are expected"
    with pytest.raises(DataError, match=words):
        fetched(file)
    assert not (tmp_path / "fetched").exists()


def test_a_server_without_sizes(web, tmp_path):
    """It cannot be asked for the size, and sends all of a file again after a break."""
    web.states_size = False
    with pytest.raises(DataError, match=r"does not state the size.*download it yourself"):
        web_plan_of(unknown_file_of(web))
    web.break_after, web.breaks = 100_000, 2
    folder = fetched(file_of(web))
    assert (folder / "reference.npz").read_bytes() == CONTENT


def test_the_hash_of_the_first_download_is_kept_and_compared(web, tmp_path):
    file = unknown_file_of(web)
    plan = web_plan_of(file)
    assert (plan.num_bytes, plan.sha256) == (len(CONTENT), None)
    assert web.requests == ["GET /files/reference.npz bytes=0-0"]
    folder = bring(plan)
    document = json.loads((tmp_path / "fetched/fetched.json").read_text())
    noted = document["fetched"]["web--reference.npz"]["files"]["reference.npz"]
    assert noted == {"num_bytes": len(CONTENT), "sha256": DIGEST}
    assert find_published(file) == folder
    (folder / "reference.npz").write_bytes(b"spoilt")
    web.damaged.add("reference.npz")
    words = r"damaged on its way.*replaced the file.*remove 'web--reference\.npz' from .*fetched\."
    with pytest.raises(DataError, match=words):
        fetched(file)
    web.web["/files/reference.npz"] = CONTENT[1:]
    with pytest.raises(DataError, match=r"has 1,279,999 bytes, and 1,280,000 are.*replaced"):
        fetched(file)
    web.damaged.clear()
    web.web["/files/reference.npz"] = CONTENT
    fetched(file)
    assert find_published(file) == folder


def test_addresses_that_cannot_be_read(web, tmp_path):
    with pytest.raises(DataError, match="answers with 404"):
        fetched(file_of(web, path="/nothing"))
    with pytest.raises(DataError, match="answers with 404"):
        fetched(WebFile(f"{web.address}/nothing"))
    for known in (("0" * 64, 5), (None, None)):
        with pytest.raises(DataError, match="Connection refused"):
            fetched(WebFile("http://127.0.0.1:9/x.npz", *known))
    assert not (tmp_path / "fetched").exists()
