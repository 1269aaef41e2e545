"""The command line: `srepa-ds COMMAND CONFIG [section.field=value ...]`."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from srepa_ds.console import show_warnings_once
from srepa_ds.distributed.launcher import check_number, run_ranks
from srepa_ds.distributed.offline import stay_offline
from srepa_ds.distributed.surroundings import check_surroundings, launched
from srepa_ds.errors import OutputError, SRepaError, TopologyError

if TYPE_CHECKING:
    from srepa_ds.config.experiment import Config
    from srepa_ds.schema import Section


INTERRUPTED = 75
"""Exit code of a training run that saved and stopped on a signal (EX_TEMPFAIL: run it again)."""

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace the file's."),
]
RankCount = Annotated[
    int,
    typer.Option("--ranks", help="Processes on this machine; omit under torchrun."),
]


def _print_version(wanted: bool) -> bool:
    if wanted:
        from srepa_ds import __version__

        typer.echo(f"srepa_ds {__version__}")
        raise typer.Exit
    return wanted


@app.callback(help=__doc__)
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options that come before a command."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to put them.")] = Path(),
) -> None:
    """Copy the shipped configurations into a folder: configs/ and ds_configs/."""
    from srepa_ds.commands.init import init as run

    typer.echo(run(folder))


@app.command()
def config(path: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration with the documentation of every field."""
    from srepa_ds.config.yaml_text import to_yaml

    typer.echo(to_yaml(_any_config(path, overrides), documented=True), nl=False)


@app.command()
def fetch(
    path: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what is there and what is missing.")
    ] = False,
) -> None:
    """Download the published files that CONFIG names: no other command downloads anything."""
    from srepa_ds.commands.fetch import fetch as run

    _in_one_process("fetch")
    typer.echo(run(_any_config(path, overrides), dry_run=dry_run))


@app.command()
def prepare(
    path: ConfigPath,
    overrides: Overrides = None,
    store_teachers: Annotated[
        bool,
        typer.Option("--teacher", help="CONFIG is an experiment: store its teachers' tokens."),
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(help="Do shards i, i+n, ... only, of several commands on one folder: i/n."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
    ] = False,
    ranks: RankCount = 1,
) -> None:
    """Make shards from a source of images; with --teacher, store teacher tokens beside them."""
    if store_teachers:
        _check_alone_with_teacher(share=share is not None, dry_run=dry_run)
        _store_teachers(path, overrides, ranks)

    from srepa_ds.preparation.config import PrepareConfig
    from srepa_ds.preparation.share import EVERYTHING, Share
    from srepa_ds.schema import load_section

    own = EVERYTHING if share is None else Share.of(share)

    def action() -> int:
        from srepa_ds.commands import prepare

        config = _of_all_ranks(lambda: load_section(PrepareConfig, path, overrides or ()))
        if dry_run:
            typer.echo(prepare.dry_run(config, ranks_here=ranks))
        else:
            prepare.prepare(config, share=own)
        return 0

    if dry_run:
        check_number(ranks)
        _in_one_process("prepare --dry-run")
    given = ["--share", share] if share else []
    command = ["prepare", str(path), *(overrides or ()), *given]
    _on_ranks(action, 1 if dry_run else ranks, command=command)


def _check_alone_with_teacher(**others: bool) -> None:
    """Raises ConfigError for options that `prepare --teacher` does not have."""
    from srepa_ds.errors import ConfigError, Fault

    names = [f"--{name.replace('_', '-')}" for name, given in others.items() if given]
    if names:
        reason = "is for images, not for --teacher, whose ranks share the shards; leave it out"
        raise ConfigError("prepare --teacher", [Fault(name, reason) for name in names])


def _store_teachers(path: Path, overrides: list[str] | None, ranks: int) -> NoReturn:
    def action() -> int:
        from srepa_ds.commands.store_teacher_tokens import store_tokens

        store_tokens(_config_of_all_ranks(path, overrides))
        return 0

    _on_ranks(action, ranks, command=["prepare", str(path), "--teacher", *(overrides or ())])


@app.command()
def teacher(path: ConfigPath, overrides: Overrides = None) -> None:
    """Train a small ViT classifier on shards, as a teacher where no pretrained one fits."""
    from srepa_ds.commands.teacher import TeacherTrainingConfig, train_teacher
    from srepa_ds.schema import load_section

    _in_one_process("teacher")
    train_teacher(load_section(TeacherTrainingConfig, path, overrides or ()))


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    ranks: RankCount = 1,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Resume even if settings changed.")
    ] = False,
) -> None:
    """Train a SiT; the same command resumes. Ctrl-C saves before it stops."""

    def action() -> int:
        from srepa_ds.commands.train import train as run_training

        config = _config_of_all_ranks(path, overrides)
        finished = run_training(config, allow_config_change=allow_config_change)
        return 0 if finished else INTERRUPTED

    changes = ["--allow-config-change"] if allow_config_change else []
    _on_ranks(action, ranks, command=["train", str(path), *(overrides or ()), *changes])


@app.command()
def export(
    path: ConfigPath,
    overrides: Overrides = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace a model of another run, in folder or repository."),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Upload it to this repository on the Hub, too."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: make the repository private.")
    ] = False,
) -> None:
    """Write a checkpoint's weights for other programs: safetensors, REPA's .pt, diffusers."""
    from srepa_ds.commands.export import export as run
    from srepa_ds.config.experiment import load_config
    from srepa_ds.weights.pushing import Push

    if private and push is None:
        raise typer.BadParameter("--private needs --push, the repository to upload to")
    _in_one_process("export")
    target = None if push is None else Push(push, is_private=private)
    run(load_config(path, overrides or ()), replace=replace, push=target)


@app.command("import")
def import_weights(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A .pt or .safetensors file, or a folder.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The run to make of it.")],
    overrides: Overrides = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Its layout, if it is recognised wrongly: repa, sit or diffusers."),
    ] = None,
    latent_statistics: Annotated[
        Path | None,
        typer.Option(metavar="PT", help="iREPA: the statistics its latents were scaled by."),
    ] = None,
) -> None:
    """Make a run of the weights of REPA, iREPA, REG, SiT or diffusers."""
    from srepa_ds.commands.import_weights import import_weights as run

    _in_one_process("import")
    typer.echo(
        run(source, folder, overrides or (), layout=layout, latent_statistics=latent_statistics)
    )


@app.command()
def sample(
    path: ConfigPath,
    overrides: Overrides = None,
    share: Annotated[
        str | None,
        typer.Option(
            "--share",
            "--shard",
            help="Draw chunks i, i+n, ... only: i/n, for machines that share no folder.",
        ),
    ] = None,
    ranks: RankCount = 1,
) -> None:
    """Draw images from a model; commands that share a folder share the work."""
    from srepa_ds.preparation.share import EVERYTHING, Share

    own = EVERYTHING if share is None else Share.of(share, command="sample")

    def action() -> int:
        from srepa_ds.commands.sample import sample as run_sampling

        run_sampling(_config_of_all_ranks(path, overrides), share=own)
        return 0

    given = ["--share", share] if share else []
    _on_ranks(action, ranks, command=["sample", str(path), *(overrides or ()), *given])


@app.command()
def evaluate(
    path: ConfigPath,
    overrides: Overrides = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(
            metavar="NPZ", help="Write the reference and its statistics as ADM does, and no scores."
        ),
    ] = None,
    ranks: RankCount = 1,
) -> None:
    """Score images: FID, sFID, IS, precision, recall, KID, or distances by another encoder."""

    def action() -> int:
        from srepa_ds.commands.evaluate import evaluate as run_evaluation
        from srepa_ds.commands.evaluate import write_reference

        config = _config_of_all_ranks(path, overrides)
        if save_reference is not None:
            write_reference(config, save_reference)
        else:
            run_evaluation(config)
        return 0

    option = [] if save_reference is None else [f"--save-reference={save_reference}"]
    _on_ranks(action, ranks, command=["evaluate", str(path), *(overrides or ()), *option])


@app.command()
def parity(path: ConfigPath, overrides: Overrides = None) -> None:
    """Measure scores that others have published; exit code 1 if they differ."""

    def action() -> int:
        from srepa_ds.commands.parity import ParityConfig
        from srepa_ds.commands.parity import parity as run
        from srepa_ds.schema import load_section

        found = run(load_section(ParityConfig, path, overrides or ()))
        typer.echo(str(found))
        return 0 if found.agrees else 1

    _in_one_process("parity")
    _on_ranks(action, 1, command=["parity", str(path)])


@app.command()
def sweep(path: ConfigPath, overrides: Overrides = None, ranks: RankCount = 1) -> None:
    """Score a run over steps, weights, guidance scale and interval into one table and plot."""

    def action() -> int:
        from srepa_ds.commands.sweep import sweep as run_sweep

        run_sweep(_config_of_all_ranks(path, overrides))
        return 0

    _on_ranks(action, ranks, command=["sweep", str(path), *(overrides or ())])


@app.command()
def report(path: ConfigPath, overrides: Overrides = None) -> None:
    """Write a self-contained report.html of a run: curves, images, similarity maps, scores."""
    from srepa_ds.commands.report import report as run
    from srepa_ds.config.experiment import load_config

    _in_one_process("report")
    run(load_config(path, overrides or ()))


@app.command()
def structure(path: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the spatial structure of a teacher's and a student's tokens: LDS, CDS, SRSS, RMSC."""
    from srepa_ds.commands.structure import structure as run
    from srepa_ds.config.experiment import load_config

    _in_one_process("structure")
    run(load_config(path, overrides or ()))


@app.command()
def demo(
    mode: Annotated[
        str, typer.Option(help="sit, repa, srepa-mse, srepa-kl, irepa, reg, ...")
    ] = "srepa-mse",
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes for training and sampling.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and noise.")] = 0,
    images: Annotated[int | None, typer.Option(help="Images to draw.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your own images, a folder for each class, instead of digits."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="With --data: pixels along a side, by default 32.")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="With --data: train on the latents of this VAE, a folder or fetched."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="With --data: a known teacher or timm ViT; without it one is trained."),
    ] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="With --teacher: a file of weights, or else fetched ones.")
    ] = None,
) -> None:
    """Run everything on handwritten digits: prepare, teach, train, sample, score, report."""
    from srepa_ds.commands.demo import run_demo
    from srepa_ds.config.own_images import look_at

    only_with_data = {
        "--size": size,
        "--vae": vae,
        "--teacher": teacher,
        "--teacher-weights": teacher_weights,
    }
    if data is None and (given := [name for name, value in only_with_data.items() if value]):
        raise typer.BadParameter(f"{' and '.join(given)} need --data, a folder of images")
    own = None
    if data is not None:
        own = look_at(
            data,
            image_size=32 if size is None else size,
            vae=vae,
            teacher=teacher,
            teacher_weights=teacher_weights,
        )
    code = run_demo(mode=mode, steps=steps, ranks=ranks, seed=seed, images=images, own=own)
    raise typer.Exit(code)


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Data, stored tokens, a run, a model, a teacher.")
    ],
    vae: Annotated[
        Path | None,
        typer.Option(metavar="WEIGHTS", help="Compare latents with those of this VAE."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write a picture of images of each class.")
    ] = None,
    classes: Annotated[bool, typer.Option("--classes", help="Count each class.")] = False,
) -> None:
    """Read all of a folder and compare it with the hashes that were written with it."""
    from srepa_ds.commands.verify import verify as run

    _log()
    typer.echo(run(path, vae=vae, sheet=sheet, every_class=classes))


@app.command()
def status(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its YAML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for scripts.")] = False,
) -> None:
    """Say where a run is, from its files alone: rate, last checkpoint, scores, troubles."""
    from srepa_ds.commands.status import status as run

    typer.echo(run(path, as_json=as_json))


@app.command()
def version() -> None:
    """Print the versions of all packages, next to those this release was tested with."""
    from srepa_ds.commands.version import version as run

    typer.echo(run())


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; an SRepaError becomes one message."""
    try:
        check_surroundings()
        return app(_without_local_rank(arguments), standalone_mode=False) or 0
    except SRepaError as error:
        _print_error(error)
        return error.exit_code
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        named = OutputError(f"{os.fsdecode(error.filename)}: {error.strerror or error}")
        named.__cause__ = error
        _print_error(named)
        return named.exit_code
    except typer.TyperException as error:
        text = error.format_message()
        text = f"{(text + _advice_on_options(error)).rstrip('.')}."
        typer.echo(f"error: {text} See `srepa-ds --help`." if arguments else text, err=True)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted; run the same command again to continue")
        return 130


def _advice_on_options(error: typer.TyperException) -> str:
    """Returns how to write a setting that was given as if it were an option."""
    option = getattr(error, "option_name", None) or ""
    setting = option.lstrip("-").partition("=")[0]
    return f"; write a setting as {setting}=VALUE." if "." in setting else ""


def main() -> None:
    """Runs this process's command line and exits."""
    show_warnings_once()
    stay_offline(sys.argv[1:])
    code = run(sys.argv[1:])
    if launched() and "srepa_ds.distributed.ranks" in sys.modules:
        from srepa_ds.distributed import ranks

        ranks.leave(code)
    sys.exit(code)


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Returns `arguments` without the option that DeepSpeed's launcher adds.

    It gives the same number in LOCAL_RANK.
    """
    if arguments and re.fullmatch(r"--local[_-]rank=\d+", arguments[0]):
        return list(arguments[1:])
    return list(arguments)


def _say(text: str) -> None:
    """Prints `text` to the terminal, on one rank only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=True)


def _print_error(error: SRepaError) -> None:
    """Prints an error once, not on every rank; with SREPA_DEBUG set, with its traceback."""
    if os.environ.get("SREPA_DEBUG", "").lower() not in ("", "0", "false", "no", "off"):
        traceback.print_exception(error)
    if os.environ.get("RANK", "0") == "0" or not error.on_all_ranks:
        typer.echo("\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)


def _on_ranks(action: Callable[[], int], ranks: int, *, command: Sequence[str]) -> NoReturn:
    """Runs `action` on this rank, or starts `ranks` processes that each run `command`."""
    if ranks != 1 and not launched():
        _check_readable_often(Path(command[1]))
        raise typer.Exit(run_ranks(command, ranks))
    from srepa_ds.distributed.devices import choose_accelerator
    from srepa_ds.distributed.ranks import close, lost_connection

    _log()
    choose_accelerator()
    try:
        code = action()
    except Exception as error:
        if launched() and (lost := lost_connection(error)):
            raise lost from error
        raise
    finally:
        if not launched():
            close()
    raise typer.Exit(code)


def _in_one_process(command: str) -> None:
    """Sets up logging for a command that runs once; raises TopologyError on one rank of several."""
    if launched() and os.environ["WORLD_SIZE"] != "1":
        raise TopologyError(
            f"`srepa-ds {command}` runs in one process, but a launcher started "
            f"{os.environ['WORLD_SIZE']}; run it once, without a launcher"
        )
    _log()


def _check_readable_often(path: Path) -> None:
    """Raises ConfigError for a pipe, which only one of the ranks could read."""
    if path.is_fifo():
        from srepa_ds.errors import ConfigError, Fault

        advice = "with --ranks, each of them reads the file, and a pipe can be read once; save it"
        raise ConfigError(str(path), [Fault("", advice)])


def _config_of_all_ranks(path: Path, overrides: list[str] | None) -> "Config":
    """Joins the other ranks and returns the experiment; see `_of_all_ranks`."""
    from srepa_ds.config.experiment import load_config

    return _of_all_ranks(lambda: load_config(path, overrides or ()))


def _of_all_ranks(load: Callable[[], Any]) -> Any:
    """Joins the other ranks and returns the configuration that `load` returns.

    A fault that any rank finds in its file is raised on all of them, and ConfigError if the ranks'
    settings differ.
    """
    from srepa_ds.distributed import ranks
    from srepa_ds.schema import to_tree
    from srepa_ds.trees import leaves

    ranks.initialize()
    config = ranks.together(load)
    advice = "ranks were given different settings; give them all the same file and overrides"
    ranks.check_same(dict(leaves(to_tree(config))), what=advice)
    return config


def _log() -> None:
    from srepa_ds.console import set_up_logging

    set_up_logging(is_main=os.environ.get("RANK", "0") == "0")


def _any_config(path: Path, overrides: list[str] | None) -> "Section":
    """Returns the configuration of the kind that the file's `kind` names."""
    from srepa_ds.commands.parity import ParityConfig
    from srepa_ds.commands.teacher import TeacherTrainingConfig
    from srepa_ds.config.experiment import config_of
    from srepa_ds.errors import ConfigError, Fault, nearest
    from srepa_ds.preparation.config import PrepareConfig
    from srepa_ds.schema import kind_of, section_of
    from srepa_ds.trees import apply_overrides, load_files, merged_files

    # Read once: the file may be a pipe.
    files, overrides = load_files(path), overrides or []
    kind = kind_of(apply_overrides(merged_files(files), overrides))
    kinds: dict[str, type[Section]] = {
        "prepare": PrepareConfig,
        "teacher": TeacherTrainingConfig,
        "parity": ParityConfig,
    }
    if kind == "experiment":
        return config_of(files, overrides, source=str(path))
    if not isinstance(kind, str) or kind not in kinds:
        fault = Fault("kind", f"unknown '{kind}'; {nearest(str(kind), [*kinds, 'experiment'])}")
        raise ConfigError(str(path), [fault])
    return section_of(kinds[kind], files, overrides, source=str(path))
