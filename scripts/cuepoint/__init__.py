"""Cuepoint's library: what the rules' scripts and the `cuepoint` command call. It knows nothing of Snakemake."""

__version__ = "0.1.0"
