"""The configs of the library: `ovseg_jax.configs`, in a checkout this folder (README.md lists them)."""
