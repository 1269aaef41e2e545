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


def of_irepa_alone(place: Place) -> None:
    """A bare state_dict, in which only the names of its projector tell."""
    state = {**repa_run(place.folder / "experiment.yaml").ema}
    state["x_embedder.proj.weight"] = torch.zeros(48, 4, 2, 2)
    state = {
        name.replace("projectors.0.", "projectors.0.projection_layer."): value
        for name, value in state.items()
    }
    torch.save(state, place.folder / "0000001.pt")


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


def _statistics(place: Place, channels: int) -> None:
    values = dict.fromkeys(("latents_scale", "latents_bias"), torch.ones(channels))
    torch.save(values, place.folder / "stats.pt")


def statistics_of_sixteen(place: Place) -> None:
    of_irepa(place)
    _statistics(place, 16)


def statistics_for_pixels(place: Place) -> None:
    of_repa(place)
    _statistics(place, 3)


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
    Case("import with a section model without heads", of_repa,
         'import 0000001.pt run model={{"variant":"SiT-B/2","depth":3,"hidden_size":48}}',
         ("model.num_heads: sizes of no variant",)),
    Case("import without initial weights", without_an_average,
         f"{_HEADS} alignments=[] train.init_from=null",
         ("train.init_from: is the model that is made of SOURCE; do not set it to null",)),
    Case("import with a section train", without_an_average,
         _HEADS + ' alignments=[] train={{"steps":100}}',
         ("train.init_from: is the model that is made of SOURCE", "train.steps=100")),
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
    *(
        Case(f"import of iREPA without its statistics: {name}", damage, f"{_HEADS} {settings}",
             (f"{place}: iREPA scales each channel of its latents", "--latent-statistics"))
        for name, damage, settings, place in (
            ("the kind alone", of_irepa, "codec.kind=vae", "codec.scale"),
            ("no shift", of_irepa, "codec.scale=[1,2,3,4]", "codec.shift"),
            ("a state_dict", of_irepa_alone, "", "codec.scale"),
        )
    ),
    Case("import with statistics of other latents", statistics_of_sixteen,
         f"{_HEADS} --latent-statistics stats.pt",
         ("--latent-statistics: is of 16 channels, and the model's latents have 4",)),
    Case("import of pixels with statistics", statistics_for_pixels,
         f"{_HEADS} --latent-statistics stats.pt",
         ("--latent-statistics: codec.kind is identity, which scales nothing; leave it out",)),
    Case("import with statistics of something else", statistics_of_three,
         f"{_HEADS} --latent-statistics stats.pt", ("stats.pt holds no statistics of latents",)),
    Case("import with missing statistics", of_irepa, f"{_HEADS} --latent-statistics stats.pt",
         ("stats.pt: no such file",)),
]  # fmt: skip
