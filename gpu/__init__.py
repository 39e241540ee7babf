"""The functions of `reference` on a GPU. Nothing is here yet; `--backend gpu` says so."""
