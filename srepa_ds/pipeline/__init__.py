"""Models as diffusers loads them: `SiTPipeline` and its parts. Needs the extra `vae`."""

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
