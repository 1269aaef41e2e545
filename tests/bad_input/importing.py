"""What is wrong with weights that are to be imported, or with where to."""

import torch
from bad_input.arrangements import nothing
from bad_input.case import Case, Place
from foreign_runs import repa_run


def _saved(place: Place, **changes: object) -> None:
    repa_run(place.folder / "experiment.yaml").save(place.folder / "0000001.pt", **changes)


def of_repa(place: Place) -> None:
    _saved(place)


def of_repa_beside_a_run(place: Place) -> None:
    _saved(place)
    place.run.mkdir()
    (place.run / "notes.txt").write_text("mine")


def of_repa_as_a_link(place: Place) -> None:
    _saved(place)
    (place.folder / "link").symlink_to(place.folder / "nowhere")


def of_irepa(place: Place) -> None:
    loop = repa_run(place.folder / "experiment.yaml")
    loop.arguments |= {"projection_layer_type": "mlp", "spnorm_method": "zscore"}
    loop.weights["x_embedder.proj.weight"] = torch.zeros(48, 4, 2, 2)
    loop.ema["x_embedder.proj.weight"] = torch.zeros(48, 4, 2, 2)
    loop.save(place.folder / "0000001.pt", opt=None)


def of_an_x_prediction(place: Place) -> None:
    loop = repa_run(place.folder / "experiment.yaml")
    loop.arguments["prediction"] = "x"
    loop.save(place.folder / "0000001.pt")


def of_two_groups(place: Place) -> None:
    _saved(place, opt={"state": {}, "param_groups": [{}, {}]})


def of_no_sit(place: Place) -> None:
    torch.save({"fc.weight": torch.zeros(3, 3)}, place.folder / "0000001.pt")


def without_an_average(place: Place) -> None:
    _saved(place, ema=None, opt=None)


def statistics_of_three(place: Place) -> None:
    of_irepa(place)
    torch.save({"latents_scale": torch.ones(3)}, place.folder / "stats.pt")


_IMPORT = "import 0000001.pt run"
_HEADS = f"{_IMPORT} model.num_heads=3"

CASES = [
    Case("import of nothing", nothing, "import", ("Missing argument 'SOURCE'",)),
    Case("import to nowhere", nothing, "import 0000001.pt", ("Missing argument 'FOLDER'",)),
    Case("import of a missing file", nothing, _IMPORT, ("0000001.pt: no such file",)),
    Case("import of an unknown user's file", nothing, "import ~nobody-here/a.pt run",
         ("SOURCE ~nobody-here/a.pt", "home folder")),
    Case("import of no SiT", of_no_sit, _IMPORT, ("0000001.pt",)),
    Case("import into a folder in use", of_repa_beside_a_run, _HEADS,
         ("run is not empty (notes.txt); choose another FOLDER",)),
    Case("import into a file", of_repa, "import 0000001.pt 0000001.pt", ("Not a directory",)),
    Case("import into a link to nowhere", of_repa_as_a_link,
         "import 0000001.pt link/run model.num_heads=3 alignments=[]",
         ("cannot write", "link is a link to")),
    Case("import of an unknown layout", of_repa, f"{_IMPORT} --layout rapa",
         ("--layout: unknown layout 'rapa'; did you mean 'repa'?",)),
    Case("import without heads", of_repa, _IMPORT,
         ("model.num_heads: sizes of no variant, and the number of heads changes no shape",)),
    Case("import with wrong settings", of_repa, f"{_HEADS} train.steps=0 ema.decay=2",
         ("2 faults", "train.steps: ", "ema.decay: ")),
    Case("import of a misspelt setting", of_repa, f"{_HEADS} train.stps=3",
         ("train.stps: unknown key; did you mean 'steps'?",)),
    Case("import for another teacher", of_repa, _HEADS,
         ("projectors.0.4.weight is (32, 64), but (768, 64) here", "alignments")),
    Case("import for a deeper model", of_repa, f"{_HEADS} model.depth=4 alignments=[]",
         ("0000001.pt: model does not fit the experiment: it lacks blocks.3.attn.qkv.weight",)),
    Case("import for a smaller model", of_repa, f"{_HEADS} model.depth=2 alignments=[]",
         ("nothing here takes blocks.2.",)),
    Case("import of a run into another's folder", of_repa, f"{_HEADS} run.folder=elsewhere",
         ("run.folder: is FOLDER, run; leave it out",)),
    Case("import of weights from elsewhere", of_repa,
         f"{_HEADS} alignments=[] train.init_from.path=elsewhere.pt",
         ("train.init_from.path: is the model that is made of SOURCE; leave it out",)),
    Case("import of a kind that is not there", without_an_average,
         f"{_HEADS} alignments=[] train.init_from.weights=ema",
         ("does not hold 'ema', but model; set train.init_from.weights to match",)),
    Case("import of another optimizer", of_two_groups, _HEADS,
         ("it has 2 groups of weights, and one is expected", "train.init_from.weights=ema")),
    Case("import of another prediction", of_an_x_prediction, _HEADS,
         ("0000001.pt predicts 'x'; only a model of the velocity",)),
    Case("import of iREPA without its statistics", of_irepa, _HEADS,
         ("codec.scale: iREPA scales each channel of its latents", "--latent-statistics")),
    Case("import with statistics of something else", statistics_of_three,
         f"{_HEADS} --latent-statistics stats.pt", ("stats.pt holds no statistics of latents",)),
    Case("import of iREPA with half of its statistics", of_irepa,
         f"{_HEADS} codec.scale=[1.0,1.0,1.0,1.0]", ("codec.shift: iREPA scales each channel",)),
    Case("import of iREPA as of any VAE", of_irepa, f"{_HEADS} codec.kind=vae",
         ("codec.scale: iREPA scales each channel",)),
    Case("import of weights that nothing starts from", without_an_average,
         f"{_HEADS} alignments=[] train.init_from=null",
         ("train.init_from: training would not start from these weights",)),
    Case("import with missing statistics", of_irepa, f"{_HEADS} --latent-statistics stats.pt",
         ("stats.pt: no such file",)),
]  # fmt: skip
