"""SiT diffusion transformers with structural representation alignment (sREPA) on DeepSpeed."""

__version__ = "0.1.0"
