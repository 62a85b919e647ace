"""Music source separation in JAX, refined by diffusion and by consistency distillation."""
