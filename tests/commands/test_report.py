import base64
import io
import json
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srepa_ds.commands.report import report
from srepa_ds.config.experiment import samples_folder
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError, OutputError, SRepaError
from srepa_ds.report.pictures import real_sheet

SECTIONS = [
    "curves", "samples", "similarity", "scores", "environment", "timings", "config", "files",
]  # fmt: skip
NASTY = "<script>alert('&')</script>"
VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """A page read back: its text, its sections, its pictures, and whether its tags match."""

    def __init__(self, path: Path):
        super().__init__()
        self.open_tags, self.tags, self.sections, self.pictures = [], [], [], {}
        self.words, self.notes = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open_tags.append((tag, values))
        if tag == "section":
            self.sections.append(values["id"])
        for name in ("src", "srcset"):
            if name in values:
                kind, data = values[name].split(",")
                assert kind == "data:image/png;base64"
                picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                picture.load()
                self.pictures.setdefault(values.get("alt", ""), []).append(picture)

    def handle_endtag(self, tag):
        assert self.open_tags.pop()[0] == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1][0] != "style":
            self.words.append(data)
            if self.open_tags[-1][1].get("class") == "note":
                self.notes.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


@pytest.fixture(scope="module")
def whole(small_run):
    """Returns a run that has everything, and its page."""
    run = small_run()
    run.write_everything()
    path = report(run.config)
    assert path == run.folder / "report.html"
    return run, Page(path)


def test_a_whole_run(whole):
    run, page = whole
    assert not list(run.folder.glob("*.partial"))
    assert page.sections == SECTIONS
    assert page.notes == []
    assert "sREPA-MSE" in page.text
    assert "flow matching + 1 · point-wise + 2 · structural MSE at block 2" in page.text
    for expected in ("12.35", "0.625", "0.875", "0.9688", "heun", "1 min 30 s", "7.2 s", "15.0 s"):
        assert expected in page.text
    for name in ("extractor_sha256", "reference_id"):
        digest = json.loads((run.folder / "results.json").read_text())[name]
        assert f" ({digest[:12]}…)" in page.text
        assert digest not in page.text
    parameters = sum(weight.numel() for weight in run.objective.sit.parameters())
    assert f"{parameters:,} parameters" in page.text
    assert "export/model.safetensors" in page.text


def test_the_page_needs_nothing_else(whole):
    run, page = whole
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "a", "base"}
    assert not any(name.startswith("on") for _, values in page.tags for name in values)
    style = (run.folder / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_curves_are_drawn_for_both_screens(whole):
    _, page = whole
    curves = {alt: p for alt, p in page.pictures.items() if " points, last " in alt}
    assert [alt.split(" over ")[0] for alt in curves][:4] == [
        "total loss",
        "flow matching",
        "point-wise (negative cosine)",
        "structural",
    ]
    assert all("over 5 points" in alt for alt in curves)
    assert "flow matching over 5 points, last 0.1" in curves
    for tag, values in page.tags:
        if tag == "source":
            assert values["media"] == "(prefers-color-scheme: dark)"
    assert len(curves) == sum(tag == "source" for tag, _ in page.tags)


def test_real_images_lie_as_the_samples_do(whole):
    run, page = whole
    drawn, real = (
        np.asarray(picture.convert("RGB"))
        for alt, pictures in page.pictures.items()
        for picture in pictures
        if alt.startswith("contact sheet")
    )
    assert np.array_equal(
        drawn, np.asarray(Image.open(samples_folder(run.config) / "contact_sheet.png"))
    )
    assert drawn.shape == real.shape
    # Rows are the four classes drawn; the shards hold nine images of each class.
    dataset = ShardDataset(run.config.evaluate.reference)
    for row in range(4):
        third = (dataset.labels == row).nonzero()[2]
        expected = dataset.read(third).images[0].permute(1, 2, 0).numpy()
        top, left = 2 + row * 50, 2 + 2 * 50
        tile = real[top : top + 48 : 3, left : left + 48 : 3]
        assert np.array_equal(tile, expected)
        assert (real[top : top + 48, 2 + 9 * 50 :] == 255).all()


def test_similarity_maps_and_their_numbers(whole):
    _, page = whole
    maps = [alt for alt in page.pictures if alt.startswith("similarity to the token")]
    spaces = {alt.rsplit(", ", 1)[1] for alt in maps}
    assert spaces == {"teacher", "block 2", "projected"}
    assert sum(len(page.pictures[alt]) for alt in maps) == 3 * 4 * 3
    centre = page.pictures["similarity to the token at (4, 4), teacher"][0].convert("RGB")
    assert centre.size == (144, 144)
    # The query is outlined, and its similarity to itself is 1: the colour at the top of the scale.
    assert centre.getpixel((4 * 18, 4 * 18)) == (255, 64, 64)
    assert centre.getpixel((4 * 18 + 9, 4 * 18 + 9)) == (253, 231, 36)
    assert "±" in page.text


def test_all_text_is_escaped(small_run):
    run = small_run(name='a<b>&"c"')
    run.write_everything()
    results = json.loads((run.folder / "results.json").read_text())
    results["scores"][NASTY] = 1.0
    results["settings"]["reference"] = NASTY
    (run.folder / "results.json").write_text(json.dumps(results))
    (run.folder / NASTY.replace("/", ":")).touch()
    page = Page(report(run.config))
    assert not any(tag in ("script", "b<b>") for tag, _ in page.tags)
    assert 'a<b>&"c"' in page.words
    assert NASTY in page.words
    assert NASTY.replace("/", ":") in page.words


def test_damaged_lines_are_left_out_and_named(small_run, caplog):
    run = small_run()
    run.write_metrics()
    path = run.folder / "metrics.jsonl"
    damaged = b'{"step": 2, "loss_total": "\xfc"}\n' + b"\0" * 64 + b"\n[3]\n"
    huge = f'{{"step": 6, "loss_total": 1{"0" * 400}, "loss_flow": 1e308}}\n'.encode()
    lines = path.read_bytes().splitlines(keepends=True)[:5]
    path.write_bytes(damaged + b"".join(lines) + huge)
    before = path.read_bytes()
    page = Page(report(run.config))
    assert path.read_bytes() == before
    assert not (run.folder / "metrics.jsonl.bad").exists()
    assert "4 damaged lines (the first is line 1); the report leaves them out" in caplog.text
    assert any("total loss over 5 points" in alt for alt in page.pictures)


def test_a_file_whose_name_is_no_unicode_is_listed(small_run):
    run = small_run()
    run.write_metrics()
    (run.folder / os.fsdecode(b"M\xfcnchen.txt")).touch()
    assert "M?nchen.txt" in Page(report(run.config)).text


def test_an_unfinished_page_of_another_process_is_left_alone(small_run):
    run = small_run()
    run.write_metrics()
    unfinished = run.folder / "report.html.partial"
    unfinished.write_text("of another process")
    report(run.config)
    assert unfinished.read_text() == "of another process"
    assert len(list(run.folder.glob("report.html*"))) == 2


def test_what_is_missing_is_named(small_run):
    run = small_run()
    run.write_metrics()
    page = Page(report(run.config))
    assert page.sections == ["curves", "config", "files"]
    assert [text.split(":")[0] for text in page.notes] == [
        "No samples",
        "No token similarities",
        "No scores",
        "No environment",
        "No timings",
    ]
    assert all("\n" not in text for text in page.notes)
    for command in ("sample", "export", "evaluate"):
        assert f"`srepa-ds {command} CONFIG`" in " ".join(page.notes)


def test_samples_are_shown_even_without_real_images(small_run):
    run = small_run("evaluate.reference=nowhere")
    run.write_metrics()
    run.write_samples(checkpoint="")
    page = Page(report(run.config))
    assert "samples" in page.sections
    assert "similarity" not in page.sections
    assert len([alt for alt in page.pictures if alt.startswith("contact sheet")]) == 1
    assert any(
        text.startswith("No real images: evaluate.reference: nowhere") for text in page.notes
    )


def test_classes_without_real_images_do_not_hide_the_samples(small_run, tmp_path):
    description = DatasetDescription(
        source={"kind": "test"}, image_shape=(3, 16, 16), class_names=tuple("0123456789")
    )
    folder = tmp_path / "nines"
    with ShardWriter(folder, description=description, samples_per_shard=1) as writer:
        writer.add(np.zeros((16, 16, 3), np.uint8), 9)
    run = small_run(f"evaluate.reference={folder}")
    run.write_metrics()
    run.write_samples(checkpoint="")
    page = Page(report(run.config))
    assert "samples" in page.sections
    assert len([alt for alt in page.pictures if alt.startswith("contact sheet")]) == 1
    assert any("holds no image of the classes that were drawn" in text for text in page.notes)


def test_classes_the_sheet_leaves_out_need_no_real_images(small_world):
    real = ShardDataset(small_world.folder / "shards")
    # Ten rows for 0, 2, ... of these; the shards hold 0 to 9.
    sheet = np.asarray(real_sheet(real, torch.arange(20)))
    assert sheet.shape[0] == 10 * 50 + 2
    assert (sheet[5 * 50 + 2 :] == 255).all()
    assert all((sheet[row * 50 + 2 :][:48] < 255).any() for row in range(5))
    # The class 9 is there, but of the twelve classes it is one of the two without a row.
    labels = torch.tensor([-3, -2, -1, 9, *range(20, 28)])
    with pytest.raises(DataError, match="no image of the classes"):
        real_sheet(real, labels)


def test_a_set_without_labels_is_shown_alone(small_run):
    run = small_run()
    run.write_metrics()
    run.write_samples(checkpoint="")
    images = np.load(samples_folder(run.config) / "samples.npz")["arr_0"]
    np.savez(samples_folder(run.config) / "samples.npz", images)
    page = Page(report(run.config))
    assert len([alt for alt in page.pictures if alt.startswith("contact sheet")]) == 1
    assert any(text.startswith("No real images:") for text in page.notes)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("samples.npz", lambda content: b""),
        ("samples.npz", lambda content: content[:-50]),
        ("samples.npz", lambda content: b"somebody's"),
        ("contact_sheet.png", lambda content: content[: len(content) // 2]),
        ("contact_sheet.png", lambda content: content[:20]),
        ("contact_sheet.png", lambda content: content[:8] + b"x" * len(content[8:])),
    ],
)
def test_damaged_samples_are_named(small_run, name, damaged):
    run = small_run()
    run.write_metrics()
    run.write_samples(checkpoint="")
    path = samples_folder(run.config) / name
    path.write_bytes(damaged(path.read_bytes()))
    page = Page(report(run.config))
    assert "samples" not in page.sections
    (text,) = [text for text in page.notes if text.startswith("No samples:")]
    assert str(path) in text
    assert "`srepa-ds sample CONFIG`" in text


def test_samples_of_unknown_origin_are_shown_with_a_note(small_run):
    run = small_run()
    run.write_everything()
    path = samples_folder(run.config) / "provenance.json"
    path.write_text("[]")
    page = Page(report(run.config))
    assert page.sections == SECTIONS
    (text,) = page.notes
    assert text.startswith(f"{path}: is not a JSON object")


def write_results(run, **changes):
    """Writes results.json as the small run has it, with changes."""
    run.write_results()
    document = json.loads((run.folder / "results.json").read_text())
    (run.folder / "results.json").write_text(json.dumps({**document, **changes}))


def test_scores_of_inception_have_their_names_and_all_is_shown(small_run):
    run = small_run()
    run.write_everything()
    sampler = {"num_samples": 2000, "solver": "heun", "cfg_scale": 1.8}
    samples = {
        "ema": "ema",
        "sampler": sampler,
        "preset": "repa",
        "deviations": {"solver": {"preset": "euler_maruyama", "here": "heun"}},
        "evaluations": {"conditional": 99, "unconditional": 70, "guide": 0},
    }
    settings = {"extractor": {"name": "inception", "weights": None}, "reference": "adm"}
    scores = {"frechet_distance": 2.5, "spatial_frechet_distance": 4.5, "inception_score": 200.5}
    precision = {str(number): number / 20 for number in range(20)}
    write_results(
        run,
        scores=scores,
        further_scores={"dinov2-vit-b": {"frechet_distance": 77.5}},
        settings=settings,
        extractors={"inception": {}, "dinov2-vit-b": {}},
        samples=samples,
        num_images=2000,
        class_precision=precision,
    )
    page = Page(report(run.config))
    for expected in ("FID", "sFID", "IS", "FD-dinov2-vit-b", "77.5", "99 conditional + 70 uncond"):
        assert expected in page.text
    assert "solver heun (preset euler_maruyama)" in page.text
    (verdict,) = [text for text in page.words if text.startswith("no, because ")]
    assert "2,000 images, and published scores are of 50,000" in verdict
    assert "solver is heun, and repa has euler_maruyama" in verdict
    # The five worst and the five best of twenty, the worst first; classes here have digits' names.
    bars = [values["style"] for tag, values in page.tags if tag == "i"]
    shares = [*range(5), *range(15, 20)]
    assert bars == [f"width:{100 * number / 20:.1f}%" for number in shares]
    assert "the median of 20 classes is 0.475" in page.text


def test_results_of_an_earlier_release_are_shown(whole):
    _, page = whole
    assert "FD-vit_tiny_patch16_224" in page.words
    assert any(
        text.startswith("no, because the features are those of vit_tiny") for text in page.words
    )
    assert "Precision by class" not in page.text


@pytest.mark.parametrize("labelled", [True, False])
def test_a_reference_of_any_form_stands_beside_the_samples(small_run, tmp_path, labelled):
    images = torch.randint(0, 256, (300, 16, 16, 3), dtype=torch.uint8).numpy()
    labels = np.arange(300) % 4
    np.savez(tmp_path / "reference.npz", images, *([labels] if labelled else []))
    run = small_run(f"evaluate.reference={tmp_path}/reference.npz")
    run.write_metrics()
    run.write_samples(checkpoint="")
    page = Page(report(run.config))
    (alt,) = [alt for alt in page.pictures if "Real images, from" in alt]
    (sheet,) = page.pictures[alt]
    # Rows of one class where labels tell it, else the first hundred in rows of ten.
    second = 4 if labelled else 1
    tile = np.asarray(sheet.convert("RGB"))[2 : 2 + 48 : 3, 2 + 50 : 2 + 50 + 48 : 3]
    assert np.array_equal(tile, images[second])
    assert sheet.height == 2 + 50 * (4 if labelled else 10)
    (caption,) = [text for text in page.words if text.startswith("Real images, from")]
    assert caption.endswith("One class per row.") == labelled


def test_results_of_another_form_break_nothing(small_run):
    run = small_run()
    run.write_metrics()
    document = {"scores": 3, "settings": [], "samples": "", "extractor_sha256": 1}
    (run.folder / "results.json").write_text(json.dumps(document))
    assert "scores" in Page(report(run.config)).sections


def test_damaged_documents_are_named(small_run):
    run = small_run()
    run.write_metrics()
    (run.folder / "results.json").write_text("{")
    (run.folder / "timings.json").write_text("[]")
    page = Page(report(run.config))
    assert page.sections == ["curves", "config", "files"]
    assert any(text.startswith("No scores: results.json: is not JSON") for text in page.notes)
    assert any(
        text.startswith("No timings: timings.json: is not a JSON obj") for text in page.notes
    )


def test_parts_that_do_not_belong_together_are_named(small_run):
    run = small_run()
    run.write_everything()
    drawn = samples_folder(run.config)
    run.write_export(step=4)
    drawn.rename(samples_folder(run.config))
    (samples_folder(run.config) / "provenance.json").write_text('{"checkpoint_sha256": "other"}')
    notes = Page(report(run.config)).notes
    assert [text.rsplit(":", 1)[1] for text in notes] == [
        " export again.",
        " sample again.",
        " evaluate again.",
    ]


def test_scores_of_another_feature_space_or_reference_are_named(small_run, small_world, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(small_world.folder / "teacher.safetensors", weights)
    extractor = small_run().config.evaluate.extractor.model_copy(update={"weights": weights})
    run = small_run(f"evaluate.extractor={extractor.model_dump_json()}")
    run.write_everything()
    assert Page(report(run.config)).notes == []
    results = json.loads((run.folder / "results.json").read_text())
    results["reference_id"] = "another"
    (run.folder / "results.json").write_text(json.dumps(results))
    weights.write_bytes(b"another")
    by, against = Page(report(run.config)).notes
    assert by == (
        f"The scores were measured with other weights than those in {weights}: evaluate again."
    )
    assert against.startswith("The scores were measured against other images than those in ")
    weights.unlink()
    assert Page(report(run.config)).notes == [against]


def test_a_run_trained_elsewhere(small_run):
    """A report does not need the DeepSpeed JSON of the training machine."""
    run = small_run()
    run.write_everything()
    for path in (run.folder / "config.yaml", run.config.export_folder / "config.json"):
        text = path.read_text()
        assert "ds_configs/zero2.json" in text
        path.write_text(text.replace("ds_configs/zero2.json", "nowhere/zero2.json"))
    page = Page(report(run.config))
    assert page.sections == SECTIONS
    assert page.notes == []


def test_the_run_is_described_as_it_was_trained(small_run):
    run = small_run()
    run.write_metrics()
    run.write_documents()
    other = small_run("alignments=[]", "train.batch_size=8", beside=run)
    page = Page(report(other.config))
    assert "sREPA-MSE" in page.text
    assert "batch_size: 16" in page.text
    assert any("train.batch_size: was 16, is 8" in text for text in page.notes)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "loss_to', "[]\n3\n"])
def test_without_a_record_there_is_nothing_to_report(small_run, content):
    run = small_run()
    if content is not None:
        run.folder.mkdir()
        (run.folder / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="train first"):
        report(run.config)
    assert not (run.folder / "report.html").exists()


def test_a_page_that_cannot_be_written(small_run):
    run = small_run()
    run.write_metrics()
    (run.folder / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        report(run.config)
    assert not list(run.folder.glob("*.partial"))


def test_without_matplotlib_the_extra_is_named(small_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SRepaError, match=r"srepa_ds\[demo\]"):
        report(small_run().config)


def test_reporting_twice_gives_the_same_page(whole):
    run, _ = whole
    before = (run.folder / "report.html").read_bytes()
    torch.manual_seed(1)
    assert report(run.config).read_bytes() == before
