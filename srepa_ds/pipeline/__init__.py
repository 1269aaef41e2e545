"""Models as diffusers loads them: `SiTPipeline` and its parts. Needs the extra `vae`."""
