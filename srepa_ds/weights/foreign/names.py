"""The current names of the official REPA code, from those in files of its family."""

import re
from collections.abc import Iterable

from srepa_ds.weight_file import without_wrappers

_PARTS = frozenset(
    {
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "decoder_blocks",
        "final_layer", "projectors", "cls_projectors2", "wg_norm",
    }
)  # fmt: skip
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LATER_BLOCK = re.compile(r"^decoder_blocks\.(\d+)\.")
_LAYER_OF_MLP = re.compile(r"^(projectors\.\d+\.)projection_layer\.(?=\d)")
_OF_IREPA = re.compile(r"(^|\.)projectors\.\d+\.projection_layer\.")


def is_official(name: str) -> bool:
    """Returns whether a name begins as one of a model of REPA's family does."""
    return name.partition(".")[0] in _PARTS


def has_names_of_irepa(names: Iterable[str]) -> bool:
    """Returns whether projectors have the names that iREPA gives them."""
    return any(_OF_IREPA.search(name) for name in names)


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the official name of each of a state_dict's names, in the order of `names`.

    Prefixes of wrappers (`module.`, `_orig_mod.`) go; REPA's early names (`decoder_blocks`, which
    continue the numbers of `blocks`) and iREPA's of an MLP (`projection_layer.0`) become the
    current ones. Raises ValueError, which names them, if two become the same.
    """
    plain = without_wrappers({name: name for name in names}, is_official)
    # Blocks after the alignment once had numbers of their own.
    first = len({match[1] for name in plain if (match := _BLOCK.match(name))})

    def today(name: str) -> str:
        name = _LATER_BLOCK.sub(lambda match: f"blocks.{int(match[1]) + first}.", name, count=1)
        return _LAYER_OF_MLP.sub(r"\1", name, count=1)

    found = {old: today(name) for name, old in plain.items()}
    by_new: dict[str, str] = {}
    for old, new in found.items():
        if (other := by_new.setdefault(new, old)) != old:
            raise ValueError(f"'{other}' and '{old}' are both {new}")
    return found
