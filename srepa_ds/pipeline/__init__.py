"""Models as diffusers loads them: `SiTPipeline` and its parts. Needs the extra `vae`.

    pipeline = SiTPipeline.from_pretrained("runs/mine/export-diffusers")
    images = pipeline(["golden retriever", 207], guidance_scale=1.5, seed=0).images

`SiTPipeline.from_pretrained` reads the folders of `export.format=diffusers` and those of the
community's `SiT-diffusers`. diffusers' own `DiffusionPipeline.from_pretrained` reads neither: it
finds the class of a pipeline in diffusers alone, or in a Python file that comes with the weights.
Parts can be loaded by themselves (`SiTTransformer2DModel.from_pretrained(folder,
subfolder="transformer")`), and a `SiTPipeline` that is saved is read by `SiTPipeline`.
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "srepa_ds.pipeline needs diffusers; install the extra: pip install 'srepa_ds[vae]'"
    ) from error

from srepa_ds.pipeline.pipeline import SiTPipeline
from srepa_ds.pipeline.scheduler import SiTFlowMatchScheduler
from srepa_ds.pipeline.transformer import SiTTransformer2DModel

__all__ = ["SiTFlowMatchScheduler", "SiTPipeline", "SiTTransformer2DModel"]
