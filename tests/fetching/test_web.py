import hashlib

import pytest
from builders import contents
from hub_stand_in import hub_stand_in

from srepa_ds.encoders import publications
from srepa_ds.encoders.publications import PUBLISHED, WebFile
from srepa_ds.encoders.published import find_published
from srepa_ds.errors import DataError
from srepa_ds.fetching.store import bring
from srepa_ds.fetching.web import WebPlan

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def web(monkeypatch, tmp_path):
    monkeypatch.setenv("SREPA_FETCHED", str(tmp_path / "fetched"))
    with hub_stand_in() as stand_in:
        stand_in.web["/files/reference.npz"] = CONTENT
        yield stand_in


def file_of(web, content=CONTENT, path="/files/reference.npz"):
    digest = hashlib.sha256(content).hexdigest()
    return WebFile(f"{web.address}{path}", digest, len(content))


def test_a_row_is_all_that_a_file_needs(web, monkeypatch):
    monkeypatch.setitem(publications.WEB_FILES, "reference", file_of(web))
    published = PUBLISHED["web"]("reference")
    assert find_published(published) is None
    folder = bring(WebPlan(published))
    assert find_published(published) == folder
    assert contents(folder) == {"reference.npz": CONTENT}


def test_a_download_that_breaks_off_goes_on(web):
    web.break_after, web.breaks = 100_000, 2
    folder = bring(WebPlan(file_of(web)))
    assert (folder / "reference.npz").read_bytes() == CONTENT
    assert [r.partition(" bytes=")[2] for r in web.requests] == ["0-", "100000-", "200000-"]


def test_the_next_call_goes_on_too(web, tmp_path):
    web.break_after, web.breaks = 100_000, 3
    with pytest.raises(DataError, match=r"reference\.npz: the answer ends too early.*goes on"):
        bring(WebPlan(file_of(web)))
    assert not (tmp_path / "fetched/fetched.json").exists()
    folder = bring(WebPlan(file_of(web)))
    assert web.requests[-1].endswith("bytes=300000-")
    assert (folder / "reference.npz").read_bytes() == CONTENT


def test_other_contents_are_refused(web, tmp_path):
    web.damaged.add("reference.npz")
    with pytest.raises(DataError, match="damaged on its way"):
        bring(WebPlan(file_of(web)))
    assert not (tmp_path / "fetched").exists()
    web.damaged.clear()
    bring(WebPlan(file_of(web)))


def test_addresses_that_cannot_be_read(web, tmp_path):
    with pytest.raises(DataError, match="answers with 404"):
        bring(WebPlan(file_of(web, path="/nothing")))
    closed = WebFile("http://127.0.0.1:9/x.npz", "0" * 64, 5)
    with pytest.raises(DataError, match="Connection refused"):
        bring(WebPlan(closed))
    assert not (tmp_path / "fetched").exists()
