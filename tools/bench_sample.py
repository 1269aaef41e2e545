"""Times the sampler against a plain loop like that of research code, on random weights.

python tools/bench_sample.py --model SiT-XL/2 --images 64 --batch 32 --precision bf16 --compile
python tools/bench_sample.py --model SiT-S/2 --images 4 --steps 4
"""

import argparse

import torch
from sample_measure import measured

from srepa_ds.distributed.devices import use_exact_float32
from srepa_ds.model.variants import SIT_VARIANTS
from srepa_ds.sampling.config import SamplerConfig


def main() -> None:
    options = parsed()
    use_exact_float32()
    config = SamplerConfig(
        num_steps=options.steps,
        num_samples=options.images,
        batch_size=options.batch,
        cfg_scale=options.cfg_scale,
        precision=options.precision,
    )
    speeds = measured(
        options.model,
        config,
        latent_size=options.latents,
        compiled=options.compile,
        rounds=options.rounds,
    )
    print(
        f"{options.model}, latents of {options.latents} px, {options.images} images in chunks of "
        f"{options.batch}, {options.steps} steps, guidance {options.cfg_scale:g}, "
        f"{options.precision}"
    )
    print(f"{'':20}{'img/s':>10}{'of matmul ceiling':>20}{'of plain loop':>16}")
    for speed in speeds:
        ratio = speed.images_per_second / speeds[0].images_per_second
        print(f"{speed.name:20}{speed.images_per_second:10.4g}{speed.share:20.1%}{ratio:15.2f}x")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SIT_VARIANTS, default="SiT-XL/2")
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=250 if on_gpu else 10)
    parser.add_argument("--cfg-scale", type=float, default=1.8)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="how many turns each way gets")
    return parser.parse_args()


if __name__ == "__main__":
    main()
