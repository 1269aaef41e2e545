"""The table of teachers: `TEACHERS`, a spec for each.

Preprocessing follows REPA, and iREPA where REPA has no such teacher (DINOv1, DINOv3). Every row but
the demo's gives a grid of 16 x 16 tokens at 256 px, and in proportion at other sizes.
"""

from srepa_ds.encoders.spec import TeacherSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

_SIZES = {
    "s": ("small", 384),
    "b": ("base", 768),
    "l": ("large", 1024),
    "g": ("giant", 1536),
}


def _dinov2(letter: str, *, registers: int) -> TeacherSpec:
    size, width = _SIZES[letter]
    suffix = f"_reg{registers}" if registers else ""
    return TeacherSpec(
        architecture=f"vit_{size}_patch14{suffix}_dinov2.lvd142m",
        width=width,
        patch_size=14,
        input_size_per_256=224,
        num_prefix_tokens=1 + registers,
    )


def _dinov3(size: str, width: int) -> TeacherSpec:
    return TeacherSpec(
        architecture=f"vit_{size}_patch16_dinov3.lvd1689m",
        layout="dinov3",
        width=width,
        patch_size=16,
        input_size_per_256=256,
        resize="bilinear",
        antialias=True,
        order="resize_then_normalise",
        num_prefix_tokens=1 + 4,
    )


def _mocov3(letter: str, *, num_heads: int) -> TeacherSpec:
    size, width = _SIZES[letter]
    # No tag: the weights timm publishes for this architecture were trained differently.
    return TeacherSpec(
        architecture=f"vit_{size}_patch16_224",
        arguments={"num_heads": num_heads},
        layout="mocov3",
        width=width,
        patch_size=16,
        input_size_per_256=256,
    )


def _siglip2(size: str, width: int) -> TeacherSpec:
    # `gap`: without the attention pooling head, which patch tokens do not pass through.
    return TeacherSpec(
        architecture=f"vit_{size}_patch16_siglip_gap_256.v2_webli",
        width=width,
        patch_size=16,
        input_size_per_256=256,
        mean=HALF,
        std=HALF,
        num_prefix_tokens=0,
        has_cls=False,
    )


def _perception(kind: str, size: str, width: int, *, final_norm: bool) -> TeacherSpec:
    patch_size = int(size.partition("patch")[2][:2])
    has_cls = "gigantic" not in size
    return TeacherSpec(
        architecture=f"vit_pe_{kind}_{size}.fb",
        width=width,
        patch_size=patch_size,
        input_size_per_256=16 * patch_size,
        mean=HALF,
        std=HALF,
        num_prefix_tokens=int(has_cls),
        has_cls=has_cls,
        final_norm=final_norm,
    )


_CLIP_L = TeacherSpec(
    architecture="vit_large_patch14_clip_quickgelu_224.openai",
    width=1024,
    patch_size=14,
    input_size_per_256=224,
    order="resize_then_normalise",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    final_norm=False,
)

_MAE_L = TeacherSpec(
    architecture="vit_large_patch16_224.mae",
    layout="mae",
    width=1024,
    patch_size=16,
    input_size_per_256=256,
    final_norm=False,
)

_IJEPA_H = TeacherSpec(
    architecture="vit_huge_patch14_gap_224.in1k_ijepa",
    layout="ijepa",
    width=1280,
    patch_size=14,
    input_size_per_256=224,
    num_prefix_tokens=0,
    has_cls=False,
)

_DINOV1_B = TeacherSpec(
    architecture="vit_base_patch16_224.dino",
    layout="dinov1",
    width=768,
    patch_size=16,
    input_size_per_256=256,
)


# The demo's own teachers: there are no pretrained weights, `srepa-ds teacher` trains them.
def _digits(*, has_cls: bool) -> TeacherSpec:
    return TeacherSpec(
        architecture="vit_tiny_patch16_224",
        arguments={
            "patch_size": 2,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "act_layer": "relu",
            "class_token": has_cls,
            "global_pool": "token" if has_cls else "avg",
            "fc_norm": False,
        },
        width=64,
        patch_size=2,
        input_size=16,
        mean=(0.3, 0.3, 0.3),
        std=(0.38, 0.38, 0.38),
        num_prefix_tokens=int(has_cls),
        has_cls=has_cls,
        num_classes=10,
    )


TEACHERS: dict[str, TeacherSpec] = {
    **{f"dinov2-vit-{letter}": _dinov2(letter, registers=0) for letter in _SIZES},
    **{f"dinov2reg-vit-{letter}": _dinov2(letter, registers=4) for letter in _SIZES},
    "dinov3-vit-s": _dinov3("small", 384),
    "dinov3-vit-b": _dinov3("base", 768),
    "dinov3-vit-l": _dinov3("large", 1024),
    "dinov3-vit-hplus": _dinov3("huge_plus", 1280),
    "mocov3-vit-s": _mocov3("s", num_heads=12),
    "mocov3-vit-b": _mocov3("b", num_heads=12),
    "mocov3-vit-l": _mocov3("l", num_heads=16),
    "clip-vit-l": _CLIP_L,
    "mae-vit-l": _MAE_L,
    "jepa-vit-h": _IJEPA_H,
    "dinov1-vit-b": _DINOV1_B,
    "siglip2-vit-b": _siglip2("base", 768),
    "siglip2-vit-l": _siglip2("large", 1024),
    "siglip2-vit-so400m": _siglip2("so400m", 1152),
    "pe-core-vit-b": _perception("core", "base_patch16_224", 768, final_norm=True),
    "pe-core-vit-l": _perception("core", "large_patch14_336", 1024, final_norm=True),
    "pe-spatial-vit-s": _perception("spatial", "small_patch16_512", 384, final_norm=False),
    "pe-spatial-vit-b": _perception("spatial", "base_patch16_512", 768, final_norm=False),
    "pe-spatial-vit-l": _perception("spatial", "large_patch14_448", 1024, final_norm=False),
    "pe-spatial-vit-g": _perception("spatial", "gigantic_patch14_448", 1536, final_norm=False),
    "digits-vit": _digits(has_cls=False),
    "digits-vit-cls": _digits(has_cls=True),
}
